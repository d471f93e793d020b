"""`native/hf` on the embedded model and on an encoder: rows equal plain hooks bit for bit; stored and streamed batches are the same."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from saehub.activations.batches import Batcher
from saehub.activations.blocks import BlockStream
from saehub.activations.shards import ShardStore
from saehub.api import ModelSpec
from saehub.data.model import ModelHandle
from saehub.data.tokens import TokenPolicy, build
from saehub.errors import StageFailed, UsageError
from saehub_native.extract import HFExtractor
from saehub_native.extract_config import HFConfig

SITES = ["resid_post.2", "mlp_act.1", "model.layers.3.input_layernorm:out"]


def entry(source):
    return SimpleNamespace(source=str(source), split="all", field="text", config=None, streaming=False, revision=None)


@pytest.fixture(scope="module")
def model():
    return ModelHandle.load(ModelSpec("builtin/tiny-llama", device="cpu"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    source = folder / "text.jsonl"
    texts = [f"def f{i}(x):\n    return x * {i} + len('{'ab' * (i % 7)}')\n" for i in range(300)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return build(
        [(entry(source), 1.0)],
        ModelSpec("builtin/tiny-llama"),
        TokenPolicy(32, exclude=("bos", "pad", "eos")),
        folder / "t",
        rows=2500,
        calibration=300,
        seed=5,
    )


def plain(model, ids_BT):
    """One hook a site on the whole model; no code of ours."""
    hf, found, handles = model.hf, {}, []
    handles.append(hf.model.layers[2].register_forward_hook(lambda m, a, out: found.__setitem__(SITES[0], out.clone())))
    handles.append(hf.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: found.__setitem__(SITES[1], a[0].clone())))
    handles.append(hf.model.layers[3].input_layernorm.register_forward_hook(lambda m, a, out: found.__setitem__(SITES[2], out.clone())))
    with torch.no_grad():
        hf(ids_BT)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.quick
def test_rows_equal_plain_hooks_to_the_last_bit(model, tokens):
    session = HFExtractor(HFConfig()).open(model, tokens, SITES, lm_batch=8)
    assert session.widths == {SITES[0]: model.shape.d_model, SITES[1]: model.shape.d_mlp, SITES[2]: model.shape.d_model}
    assert list(session.widths) == SITES and session.n_batches == tokens.n_batches(8)
    for batch in (0, session.n_batches - 1):
        i, j = tokens.batch_range(batch, 8)
        ids_BT = tokens.tokens(i, j)
        rows, want = session.rows(batch), plain(model, ids_BT)
        for site in SITES:
            assert torch.equal(rows.acts[site], want[site].reshape(-1, want[site].shape[-1])), site
        assert torch.equal(rows.token_ids_N, ids_BT.flatten())
        assert rows.positions_N.tolist() == list(range(32)) * (j - i) and rows.sequences_N.tolist() == [
            s for s in range(i, j) for _ in range(32)
        ]
        assert not ((rows.token_ids_N <= 2) & rows.keep_N).any() and int(rows.keep_N.sum()) == session.kept(batch)
    session.close()


@pytest.mark.quick
def test_streamed_and_stored_give_the_same_batches_bit_for_bit(model, tokens, tmp_path):
    def stream():
        session = HFExtractor(HFConfig()).open(model, tokens, SITES[:2], lm_batch=8)
        return BlockStream(
            session,
            sites=SITES[:2],
            seed=11,
            batches_per_block=3,
            dtype="bfloat16",
            rows=4000,
            calibration_batches=session.calibration_batches,
            repeat=True,
        )

    streamed, store = stream(), ShardStore(tmp_path)
    other = stream()
    for b in reversed(range(other.n_blocks)):
        store.write(b, other.block(b))

    def batches(blocks):
        batcher = Batcher(96)
        return [batch for block in blocks for batch in batcher.feed(block.acts)]

    one = batches(streamed.block(b) for b in range(streamed.n_blocks))
    two = batches(store.read(b) for b in range(streamed.n_blocks))
    assert len(one) == 4000 // 96 and streamed.n_blocks > 5
    assert all(torch.equal(x[site], y[site]) for x, y in zip(one, two, strict=True) for site in SITES[:2])
    assert streamed.hash == other.hash and streamed.hashes == other.hashes


@pytest.mark.quick
def test_encoders_work_too(tmp_path):
    sizes = dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=60, max_position_embeddings=40
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    (tmp_path / "a.txt").write_text("\n".join(" ".join(f"w{(i * j) % 55}" for j in range(12)) for i in range(1, 200)))
    spec = ModelSpec(str(tmp_path / "bert"), device="cpu")
    tokens = build([(entry(tmp_path / "a.txt"), 1.0)], spec, TokenPolicy(20), tmp_path / "t", rows=1000)
    assert (tokens.tokens(0, tokens.n_sequences)[:, 0] == 2).all()  # CLS stands for BOS, and its rows are dropped
    model = ModelHandle.load(spec)
    session = HFExtractor(HFConfig()).open(model, tokens, ["resid_post.1", "attn_z.2"], lm_batch=4)
    rows = session.rows(1)
    with torch.no_grad():
        want = model.hf(tokens.tokens(4, 8), output_hidden_states=True).hidden_states[2]
    assert torch.equal(rows.acts["resid_post.1"], want.reshape(-1, 32)) and not rows.keep_N.reshape(4, 20)[:, 0].any()
    assert int(rows.keep_N.sum()) == 4 * 19 == session.kept(1)


@pytest.mark.quick
def test_what_does_not_fit_the_model_is_refused_with_a_fix(model, tokens):
    extractor = HFExtractor(HFConfig())

    def fails(kind, words, model=model, tokens=tokens, sites=("resid_post.1",)):
        with pytest.raises(kind) as caught:
            extractor.open(model, tokens, list(sites), lm_batch=4).rows(0)
        assert caught.value.fix and all(word in str(caught.value) for word in words), str(caught.value)

    last = model.shape.n_layers - 1
    fails(UsageError, [f"resid_post.{last + 1}", f"0 to {last}"], sites=[f"resid_post.{last + 1}"])
    fails(UsageError, ["did you mean 'model.layers.1.mlp'"], sites=["model.layers.1.mpl:out"])
    fails(UsageError, ["no site"], sites=[])
    fails(UsageError, ["needs a model"], model=None)
    long = SimpleNamespace(context=10_000)
    fails(UsageError, ["10000", str(model.shape.context)], tokens=long)
    from dataclasses import replace

    small = replace(model, shape=replace(model.shape, vocab=5))
    fails(StageFailed, ["outside the model's vocabulary"], model=small)


@pytest.mark.quick
def test_a_model_that_computes_nan_is_named(model, tokens):
    import copy

    broken = copy.copy(model)
    broken.hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        broken.hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    session = HFExtractor(HFConfig()).open(broken, tokens, ["resid_post.0", "resid_post.1"], lm_batch=4)
    stream = BlockStream(session, sites=["resid_post.0", "resid_post.1"], seed=0, batches_per_block=2, dtype="float32", rows=100)
    with pytest.raises(StageFailed) as caught:
        stream.block(0)
    assert "resid_post.1" in str(caught.value) and "batch 0" in str(caught.value) and caught.value.fix


def test_another_process_gives_the_same_blocks(model, tokens):
    """Same machine and thread count: the hash covers order, the sum of all bits covers the activations."""
    import subprocess
    import sys

    code = f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})
from pathlib import Path
from saehub.activations.blocks import BlockStream
from saehub.api import ModelSpec
from saehub.data.model import ModelHandle
from saehub.data.tokens import TokenDataset
from saehub.jsonio import sha256_tensor
from saehub_native.extract import HFExtractor
session = HFExtractor(None).open(ModelHandle.load(ModelSpec("builtin/tiny-llama", device="cpu")), TokenDataset.open(Path({str(tokens.path)!r})), ["resid_post.2"], lm_batch=8)
stream = BlockStream(session, sites=["resid_post.2"], seed=2, batches_per_block=3, dtype="float32", rows=2000, calibration_batches=session.calibration_batches)
block = stream.block(int(sys.argv[1]))
print(block.hash, sha256_tensor(block.acts["resid_post.2"]), stream.hash)
"""
    out = subprocess.run([sys.executable, "-c", code, "2"], capture_output=True, text=True, check=True).stdout.split()
    from saehub.jsonio import sha256_tensor

    session = HFExtractor(None).open(model, tokens, ["resid_post.2"], lm_batch=8)
    stream = BlockStream(
        session,
        sites=["resid_post.2"],
        seed=2,
        batches_per_block=3,
        dtype="float32",
        rows=2000,
        calibration_batches=session.calibration_batches,
    )
    block = stream.block(2)
    assert out == [block.hash, sha256_tensor(block.acts["resid_post.2"]), stream.hash]
