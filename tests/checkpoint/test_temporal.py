"""The temporal architecture against loops written from the paper's equations, its files, its probe and its refusals."""

from __future__ import annotations

import math

import pytest
import torch

from saehub.checkpoint import format as v1
from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.convert import Refused, convert, in_process
from saehub.checkpoint.inputs import synthetic_rows
from saehub.checkpoint.load import load
from saehub.checkpoint.probe import make_probe, read_probe
from saehub.checkpoint.sae import SAE
from saehub.checkpoint.verify import verify
from saehub.errors import FormatError, NeedsInput, UsageError

pytestmark = pytest.mark.quick
D, F = 6, 16
PARAMS = {"n_heads": 2, "n_attn_layers": 2, "bottleneck_factor": 4, "k": 3, "tied": True, "input_scale": 1.0}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, params: dict | None = None, **config) -> SAE:
    from saehub.checkpoint.architectures.temporal import Temporal

    draw = torch.Generator().manual_seed(seed)
    made = SAEConfig("temporal", D, F, params={**PARAMS, **(params or {})}, **config)
    tensors = {name: torch.randn(*spec.shape, generator=draw) / (F**0.5 if "attn" in name else 1) for name, spec in Temporal.specs(made).items()}
    return SAE.build(made, {name: tensor.to(dtype) for name, tensor in tensors.items()}, {"site": "resid_post.1"})


def by_hand(sae: SAE, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Novel codes [T, F] and reconstruction [T, D] of one sequence, a position and a head at a time, float64."""
    t, c, p = {n: v.double() for n, v in sae.tensors().items()}, sae.config, sae.config.params
    T, lam = x_TD.shape[0], 1 / (4 * D)
    W_enc = t["W_dec"].T if p["tied"] else t["W_enc"]
    norm = [math.sqrt(D) / float(row.double().norm()) if c.norm_in == "constant_norm_rescale" else p["input_scale"] for row in x_TD]
    r = [x_TD[i].double() * norm[i] - (t["b_dec"] if c.subtract_b_dec else 0) for i in range(T)]
    predicted = [torch.zeros(F, dtype=torch.float64) for _ in range(T)]
    for layer in range(p["n_attn_layers"]):
        W = {name: (t[f"attn_layers.{layer}.{name}.weight"], t[f"attn_layers.{layer}.{name}.bias"]) for name in ("k_ctx", "q_target", "v_ctx", "c_proj")}
        z = [torch.clamp(lam * r[i] @ W_enc, min=0) for i in range(T)]
        context = [torch.zeros(F, dtype=torch.float64), *z[:-1]]
        following = []
        for i in range(T):
            q = W["q_target"][0] @ z[i] + W["q_target"][1]
            mixed = torch.zeros(F, dtype=torch.float64)
            dk, dv = q.shape[0] // p["n_heads"], F // p["n_heads"]
            for head in range(p["n_heads"]):
                scores = [float(q[head * dk : (head + 1) * dk] @ (W["k_ctx"][0] @ context[j] + W["k_ctx"][1])[head * dk : (head + 1) * dk]) / math.sqrt(dk) for j in range(i + 1)]
                total = sum(math.exp(score) for score in scores)
                for j, score in enumerate(scores):
                    v = W["v_ctx"][0] @ context[j] + W["v_ctx"][1]
                    mixed[head * dv : (head + 1) * dv] += math.exp(score) / total * v[head * dv : (head + 1) * dv]
            guess = torch.clamp(W["c_proj"][0] @ mixed + W["c_proj"][1], min=0)
            direction = guess @ t["W_dec"]
            scale = float(direction @ r[i]) / (float(direction.norm()) + 1e-6) ** 2
            predicted[i] = predicted[i] + scale * guess
            following.append(r[i] - scale * direction)
        r = following
    codes, output = torch.zeros(T, F, dtype=torch.float64), torch.zeros(T, D, dtype=torch.float64)
    for i in range(T):
        f = torch.clamp(lam * r[i] @ W_enc, min=0)
        if p["k"] is not None:
            f = f * (f >= f.sort(descending=True).values[p["k"] - 1])
        codes[i] = f
        output[i] = (f + predicted[i]) @ t["W_dec"]
        if not p["tied"] or c.subtract_b_dec:
            output[i] += t["b_dec"]
        output[i] /= norm[i]
    return codes, output


CASES = [
    {}, {"params": {"k": None}}, {"params": {"tied": False}}, {"subtract_b_dec": False}, {"subtract_b_dec": False, "params": {"tied": False}},
    {"params": {"n_attn_layers": 0}}, {"params": {"n_heads": 4, "bottleneck_factor": 2, "n_attn_layers": 1}}, {"params": {"input_scale": 0.25}},
    {"norm_in": "constant_norm_rescale", "norm_out": "constant_norm_rescale"},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_loops(case):
    sae, x = build(**case), torch.randn(2, 7, D, generator=torch.Generator().manual_seed(5)) * 3
    acts, y = sae.encode(x, dtype=torch.float64), sae(x, dtype=torch.float64)
    for sequence in range(2):
        codes, output = by_hand(sae, x[sequence])
        assert torch.allclose(acts[sequence], codes, atol=1e-12) and torch.allclose(y[sequence], output, atol=1e-11)
    assert torch.allclose(sae.encode(x[0]).double(), acts[0], atol=1e-5) and 0 < float((acts != 0).double().mean()) < 0.7
    values, indices = sae.encode_sparse(x)
    assert torch.allclose(sae.decode_sparse(values, indices, like=x), sae(x).reshape(-1, D), atol=1e-5)
    assert int((indices >= 0).sum()) == int((sae.encode(x) != 0).sum())


def test_a_position_sees_only_what_came_before():
    sae, x = build(params={"k": None}), torch.randn(1, 8, D, generator=torch.Generator().manual_seed(6))
    changed = x.clone()
    changed[:, 5:] += 1
    a, b = sae.encode(x), sae.encode(changed)
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 6], b[:, 6])
    swapped = sae.encode(x[:, [1, 0, *range(2, 8)]])
    assert not torch.allclose(a[:, 7], swapped[:, 7], atol=1e-6)


def test_what_it_refuses(tmp_path):
    sae, x = build(), torch.randn(2, 7, D)
    assert not sae.row_wise and sae.needs_input_to_decode
    with pytest.raises(NeedsInput, match="input sequences"):
        sae.decode(sae.encode(x))
    assert sae.decode_novel(sae.encode(x)).shape == (2, 7, D)
    for wrong in (torch.randn(D), torch.randn(2, 7, D + 1), torch.randn(1, 2, 7, D)):
        with pytest.raises(UsageError, match="row_wise: false"):
            sae.encode(wrong)
    with pytest.raises(UsageError, match="sequences"):
        make_probe(sae, torch.randn(96, D))
    for params, words in (({"n_heads": 3}, "no multiple"), ({"k": 17}, "'k' is 17"), ({"tied": 1}, "tied"), ({"input_scale": 0.0}, "input_scale")):
        with pytest.raises(FormatError, match=words):
            build(params=params)
    with pytest.raises(FormatError, match="its own input"):
        build(kind="transcoder", subtract_b_dec=False)


def test_scaling_the_input():
    sae, x = build(), torch.randn(2, 7, D, generator=torch.Generator().manual_seed(7))
    raw = sae.scale_input(0.5)
    assert torch.allclose(raw(x), sae(x * 0.5) / 0.5, atol=1e-5) and torch.allclose(raw.encode(x), sae.encode(x * 0.5), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_verified_and_converted(tmp_path, dtype):
    """The folder is bit-exact; the probe holds whole sequences and catches a change; a conversion runs on sequences."""
    sae = build(dtype=dtype)
    x = synthetic_rows(sae, 128, length=16)
    assert x.shape == (8, 16, D)
    v1.save(sae, tmp_path / "a", probe=make_probe(sae, x))
    again = load(tmp_path / "a")
    assert again.config == sae.config and all(torch.equal(again.tensors()[n], t) and again.tensors()[n].dtype == dtype for n, t in sae.tensors().items())
    assert v1.read_header(tmp_path / "a")["row_wise"] is False and verify(tmp_path / "a").ok
    probe = read_probe(tmp_path / "a/probe.safetensors", again)
    assert probe.sequence_length == 16 and torch.equal(probe.x, x) and probe.active_rows > 115
    certificate = convert(tmp_path / "a", tmp_path / "b", "saehub", invoke=in_process)
    assert certificate.passed and "in sequences of 16" in certificate.inputs and verify(tmp_path / "b").ok
    # another order of rows is another sequence: the probe of one does not fit the other
    shuffled = make_probe(sae, x.flip(1))
    assert not torch.allclose(shuffled.reconstruction_ND.reshape(8, 16, D).flip(1), probe.reconstruction_ND.reshape(8, 16, D), atol=1e-3)
    name = "attn_layers.0.v_ctx.weight"
    v1.save(SAE.build(sae.config, sae.tensors() | {name: (sae.tensors()[name].float() * 1.01).to(dtype)}), tmp_path / "c", probe=probe)
    assert [c.status for c in verify(tmp_path / "c").checks if c.name == "probe replay"] == ["failed"]
    for target in ("sparsify", "dictionary_learning"):
        with pytest.raises(Refused) as error:
            convert(tmp_path / "a", tmp_path / target, target, invoke=in_process)
        assert error.value.why and "saelens/saelens" in error.value.fix
