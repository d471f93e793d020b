"""`native/hf` runs a batch in pieces, on several threads: the rows are those of plain hooks on one whole forward pass of each family."""

import pytest
import torch
import transformers

from saehub.activations import taps
from saehub.errors import StageFailed
from saehub.sites import Site
from saehub_native import extract

SIZES = dict(vocab_size=61, num_hidden_layers=4, hidden_size=32, num_attention_heads=4, intermediate_size=48, max_position_embeddings=32)
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_layer=4, n_embd=32, n_head=4, n_positions=32)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
}


def build(family, dtype=torch.float32):
    torch.manual_seed(0)
    return FAMILIES[family]().eval().to(dtype)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.quick
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_on_threads_give_the_rows_of_one_pass(toys, family, threads, monkeypatch):
    monkeypatch.setattr(extract, "TOKENS_A_PIECE", toys.context)  # a sequence a piece
    hf = build(family)
    passes = []
    counter = hf.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    session, tokens_NT = toys.opened(hf)
    for batch, size in ((0, 4), (2, 3)):
        passes.clear()
        rows = session.rows(batch)
        assert len(passes) == size
        want = toys.plain(hf, tokens_NT[4 * batch : 4 * batch + size])
        for site in toys.sites:
            assert rows.acts[site].shape == (size * toys.context, want[site].shape[-1]) and not rows.acts[site].is_inference()
            assert toys.relative(rows.acts[site].reshape(want[site].shape), want[site]) < 1e-6, site
    counter.remove()
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules()) == 0
    assert torch.get_num_threads() == threads


@pytest.mark.quick
def test_a_thread_runs_its_own_piece_unless_there_are_very_many(toys, monkeypatch):
    session, _ = toys.opened(build("llama"))
    split = lambda threads, *shape: (monkeypatch.setattr(torch, "get_num_threads", lambda: threads), session._split(*shape))[1]  # noqa: E731
    assert split(1, 4, 12) == 4 and split(2, 32, 128) == 8 and split(3, 32, 128) == 6 and split(2, 5, 128) == 3
    assert split(2, 4, 4096) == 1 and split(8, 2, 16) == 1
    assert split(extract.MOST_THREADS + 1, 32, 128) is None


@pytest.mark.quick
def test_what_goes_wrong_in_a_piece_is_raised_and_leaves_nothing_behind(toys, threads, monkeypatch):
    monkeypatch.setattr(extract, "TOKENS_A_PIECE", toys.context)
    hf = build("llama")
    session, tokens_NT = toys.opened(hf)
    with torch.no_grad():
        hf.model.embed_tokens.weight.data = hf.model.embed_tokens.weight[:5].clone()  # ids above are outside
    with pytest.raises(IndexError):
        session.rows(0)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules()) == 0

    class Odd(torch.nn.Module):  # a module without a batch dimension
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Linear(3, 5)

        def forward(self, x):
            return x.sum() + self.table(torch.ones(7, 3))

    with pytest.raises(StageFailed, match="one row a sequence"):
        taps.read(Odd(), torch.ones(4, 2), {"t": Site.parse("table:out").tap(session.model.shape)}, split=1, run=session._team.run)
