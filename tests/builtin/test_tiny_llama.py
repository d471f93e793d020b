"""The embedded Llama: loads offline as what it says, its card's held-out figures are true, its training script resumes exactly."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from saehub.builtin import SOURCES, model_dir, text

FOLDER = model_dir("builtin/tiny-llama")


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def card() -> dict[str, tuple[float, float, str]]:
    """source -> nats/token, standard error, start of the data hash, as the model card's table states them."""
    rows = re.findall(r"\| `(python-\w+)` \| ([\d.]+) ± ([\d.]+) \|.*`([0-9a-f]{12})", (FOLDER / "README.md").read_text())
    return {source: (float(value), float(stderr), digest) for source, value, stderr, digest in rows}


@pytest.mark.quick
def test_architecture_and_size(loaded):
    from transformers import LlamaForCausalLM

    model, _ = loaded
    config = model.config
    assert type(model) is LlamaForCausalLM
    assert config.num_hidden_layers >= 4 and 128 <= config.hidden_size <= 192 and config.vocab_size == 4096
    assert config.max_position_embeddings == 256 and config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 8_000_000
    assert (FOLDER / "train_log.jsonl").stat().st_size < 200_000


@pytest.mark.quick
def test_weights_are_stored_in_bfloat16_and_loaded_exactly_in_float32(loaded):
    model, _ = loaded
    state = model.state_dict()
    with safe_open(FOLDER / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(state) - {"lm_head.weight"}
        for name in stored.keys():
            assert stored.get_tensor(name).dtype == torch.bfloat16
            assert state[name].dtype == torch.float32 and torch.equal(state[name], stored.get_tensor(name).float())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.quick
def test_tokenizer_adds_nothing_and_loses_nothing(loaded):
    _, tokenizer = loaded
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (0, 1, 2, 4096)
    for sample in ("def f(x):\n        return x + 1\n", " two  spaces ", "naïve – 漢字 🙂 \t\x00\x7f", "".join(map(chr, range(1, 500)))):
        ids = tokenizer(sample)["input_ids"]
        assert min(ids) > 2
        assert tokenizer.decode(ids) == sample


@pytest.mark.quick
@pytest.mark.parametrize("source", SOURCES)
def test_the_card_s_held_out_loss_is_found_again_by_a_plain_loop(loaded, card, source):
    model, tokenizer = loaded
    stream = []
    for document in text.documents(source, "heldout"):
        stream += tokenizer.encode(document.text, verbose=False) + [1]
    starts = range(0, len(stream) - 127, 127)
    losses = []
    for start in starts[:: max(1, len(starts) // 32)]:
        ids = [0] + stream[start : start + 127]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        total = 0.0
        for position in range(127):
            total -= (logits[position, ids[position + 1]] - logits[position].logsumexp(0)).item()
        losses.append(total / 127)
    mean = sum(losses) / len(losses)
    stderr = math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1) / len(losses))
    assert 0 < stderr < 0.25
    assert abs(mean - card[source][0]) < 4 * math.hypot(stderr, card[source][1])


def test_evaluate_command_prints_the_card_s_figures(card):
    command = [sys.executable, "-m", "saehub.builtin.train_tiny_llama", "--evaluate", "--threads", "1"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    printed = {s: (float(v), h) for s, v, h in re.findall(r"(python-\w+) +heldout: ([\d.]+) .*data ([0-9a-f]{12})", out)}
    assert set(printed) == set(card) == set(SOURCES)
    for source, (value, digest) in printed.items():  # another Python version has other text: the hash says so
        stated, stderr, stated_digest = card[source]
        assert abs(value - stated) < (0.002 if digest == stated_digest else 4 * stderr)


@pytest.mark.quick
def test_the_log_ends_with_a_saved_model():
    rows = [json.loads(line) for line in (FOLDER / "train_log.jsonl").read_text().splitlines()]
    assert rows[0]["event"] == "start" and rows[-1]["event"] == "save"
    losses = [row["loss"] for row in rows if "loss" in row]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 2


@pytest.mark.quick
def test_schedule_is_warm_up_plateau_decay():
    from saehub.builtin.train_tiny_llama import Recipe, learning_rate

    recipe = Recipe(lr=2.0, warmup=0.1, decay=0.5)
    assert [learning_rate(recipe, p) for p in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)] == [0.0, 1.0, 2.0, 2.0, 1.0, 0.0]


@pytest.mark.quick
def test_windows_put_bos_first_and_drop_the_tail():
    from saehub.builtin.train_tiny_llama import windows

    assert windows(torch.arange(10, 21), 4).tolist() == [[0, 10, 11, 12], [0, 13, 14, 15], [0, 16, 17, 18]]


@pytest.mark.quick
def test_training_resumes_bit_for_bit(tmp_path):
    from saehub.builtin.train_tiny_llama import Recipe, Trainer

    recipe = Recipe(vocab=64, d_model=16, layers=2, heads=2, d_mlp=24, positions=8, batch=4)
    streams = [torch.randint(64, (200,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    whole, first, second = (Trainer(recipe, streams, compiled=False) for _ in range(3))
    expected = [whole.update(0.1 * i) for i in range(6)]
    assert [first.update(0.1 * i) for i in range(3)] == expected[:3]
    first.seconds = 7.5
    first.save(tmp_path)
    assert second.restore(tmp_path) and (second.step, second.seconds) == (3, 7.5)
    assert [second.update(0.1 * i) for i in range(3, 6)] == expected[3:]
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(whole.optimizer.state[a][key], second.optimizer.state[b][key])


@pytest.mark.quick
def test_extra_training_text_keeps_held_out_modules_out():
    from saehub.builtin.train_tiny_llama import extra_modules

    paths = extra_modules()
    assert all(text.split_of(path) == "train" for path in paths) and not set(paths) & set(text.modules())
    assert text.split_of("statistics.py") == text.split_of("http/server.py") == text.split_of("unittest/mock.py") == "heldout"
    assert not [p for p in paths if re.search(r"test_(statistics|httpservers|warnings|pprint|imp\.|doctest)|testmock|ctypes/", p)]
