"""Every architecture against its equation, written a second time in numpy float64, one row at a time."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from saehub.checkpoint import sae as module
from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.sae import SAE
from saehub.errors import FormatError, NeedsInput, UsageError

pytestmark = pytest.mark.quick
ARCHITECTURES = ("relu", "topk", "abstopk", "batchtopk", "matryoshka", "jumprelu", "gated", "groupmax", "matching_pursuit")
SCALING = ("relu", "topk", "abstopk", "batchtopk", "matryoshka", "jumprelu", "groupmax")


def close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    """Equal within tolerances (defaults for float64 and float32 alike)."""
    np.testing.assert_allclose(a.detach().double().numpy(), b.detach().double().numpy(), rtol=rtol, atol=atol)


def reference(sae: SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and reconstruction of one row, from the published equations."""
    c, t = sae.config, {name: tensor.double().numpy() for name, tensor in sae.tensors().items()}
    mean, std = x.mean(), np.sqrt(((x - x.mean()) ** 2).sum() / (len(x) - 1))
    xn = {"none": x, "constant_norm_rescale": x * np.sqrt(len(x)) / np.linalg.norm(x), "layer_norm": (x - mean) / (std + 1e-5)}[c.norm_in]
    xp = xn - t["b_dec"] if c.subtract_b_dec else xn
    f = activations(c, t, xp)
    norms = np.linalg.norm(t["W_dec"], axis=1)
    y = (f / norms if c.decoder_norm_scaling else f) @ t["W_dec"] + t["b_dec"]
    if c.architecture == "matching_pursuit" and not c.subtract_b_dec:
        y = y - t["b_dec"]
    y = {"none": y, "constant_norm_rescale": y * np.linalg.norm(x) / np.sqrt(len(x)), "layer_norm": y * std + mean}[c.norm_out]
    return f, y + (t["W_skip"] @ x if c.skip else 0)


def activations(c: SAEConfig, t: dict[str, np.ndarray], xp: np.ndarray) -> np.ndarray:
    if c.architecture == "matching_pursuit":
        return pursuit(c, t["W_dec"], xp)
    if c.architecture == "gated":
        gate = xp @ t["W_enc"] + t["b_gate"] > 0
        return gate * np.maximum(xp @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"], 0)
    p = xp @ t["W_enc"] + t["b_enc"]
    if c.decoder_norm_scaling:
        p = p * np.linalg.norm(t["W_dec"], axis=1)
    f = np.zeros_like(p)
    if c.architecture == "relu":
        f = np.where(p > 0, p, 0)
    elif c.architecture == "topk":
        best = np.argsort(-p)[: c.params["k"]]
        f[best] = np.maximum(p[best], 0)
    elif c.architecture == "abstopk":
        best = np.argsort(-np.abs(p))[: c.params["k"]]
        f[best] = p[best]
    elif c.architecture == "groupmax":
        for group in np.split(np.arange(len(p)), c.params["k"]):
            best = group[p[group].argmax()]
            f[best] = max(p[best], 0)
    else:  # one threshold, or one each
        f = np.where((p > t["threshold"]) & (p > 0), p, 0)
    return f


def pursuit(c: SAEConfig, D_FD: np.ndarray, residual: np.ndarray) -> np.ndarray:
    f, support = np.zeros(len(D_FD)), set()
    for _ in range(c.params["max_iterations"]):
        best = (D_FD @ residual).argmax()
        value = max(D_FD[best] @ residual, 0)
        f[best] += value
        residual = residual - value * D_FD[best]
        now = set(np.flatnonzero(f))
        if now == support or np.linalg.norm(residual) < c.params["residual_threshold"]:
            break
        support = now
    return f


CASES = [(name, {}) for name in ARCHITECTURES]
CASES += [(name, {"decoder_norm_scaling": True}) for name in SCALING]
CASES += [(name, {"subtract_b_dec": False}) for name in ("topk", "gated", "matching_pursuit")]
CASES += [
    (name, {"norm_in": norm, "norm_out": norm})
    for name in ("topk", "jumprelu", "matching_pursuit")
    for norm in ("constant_norm_rescale", "layer_norm")
]
CASES += [
    (name, {"kind": kind, "subtract_b_dec": False, "d_out": 7})
    for name in ("relu", "topk", "gated", "jumprelu")
    for kind in ("transcoder", "skip_transcoder")
]
CASES += [("relu", {"kind": "transcoder", "subtract_b_dec": False, "norm_in": "layer_norm"})]


@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_equation(toy, rows, architecture, config):
    sae = toy(architecture, **config)
    expected = [reference(sae, row) for row in rows.double().numpy()]
    acts = np.stack([f for f, _ in expected])
    assert 0 < (acts != 0).mean() < 0.6
    np.testing.assert_allclose(sae.encode(rows, dtype=torch.float64).numpy(), acts, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sae(rows, dtype=torch.float64).numpy(), np.stack([y for _, y in expected]), rtol=1e-11, atol=1e-11)
    assert sae(rows).dtype == torch.float32
    np.testing.assert_allclose(sae(rows).numpy(), np.stack([y for _, y in expected]), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sparse_equals_dense_in_any_shape(toy, rows, architecture, monkeypatch):
    sae = toy(architecture)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * sae.config.d_sae)  # five rows at a time
    seen = []
    centre = type(sae).centre
    monkeypatch.setattr(type(sae), "centre", lambda self, x: (seen.append(len(x)), centre(self, x))[1])
    values, indices = sae.encode_sparse(rows)
    assert max(seen) == 5
    dense = sae.encode(rows.reshape(4, 24, -1))
    assert dense.shape == (4, 24, sae.config.d_sae)
    dense = dense.reshape(96, -1)
    again = torch.zeros_like(dense)
    for row in range(96):
        kept = indices[row] >= 0
        ascending = indices[row][kept]
        assert torch.equal(ascending, ascending.sort().values) and len(ascending.unique()) == len(ascending)
        assert bool((values[row][~kept] == 0).all()) and bool((values[row][kept] != 0).all())
        assert not bool(kept[1:].logical_and(~kept[:-1]).any())  # padding stands at the end
        again[row, ascending] = values[row][kept]
    close(again, dense, rtol=1e-5, atol=1e-6)
    close(sae.decode_sparse(values, indices), sae.decode(dense), rtol=1e-4, atol=1e-5)


def test_sparse_refuses_what_does_not_fit(toy, rows):
    sae = toy("relu")
    widest = int((sae.encode(rows) != 0).sum(1).max())
    assert sae.encode_sparse(rows)[0].shape == (96, widest)
    assert sae.encode_sparse(rows, k_max=widest + 3)[1].shape == (96, widest + 3)
    with pytest.raises(UsageError, match=f"a row has {widest} active"):
        sae.encode_sparse(rows, k_max=widest - 1)
    with pytest.raises(UsageError, match="GiB as sparse features"):
        sae.encode_sparse(rows, limit_bytes=1000)
    values, indices = toy("topk").encode_sparse(rows[:0])
    assert values.shape == indices.shape == (0, 5)
    asleep = SAE.build(toy("jumprelu").config, toy("jumprelu").tensors() | {"threshold": torch.full((40,), 1e9)})
    values, indices = asleep.encode_sparse(rows)
    assert values.shape == indices.shape == (96, 0)
    close(asleep.decode_sparse(values, indices), asleep.b_dec.expand(96, -1))


@pytest.mark.parametrize(
    "config", [{"norm_in": "layer_norm", "norm_out": "layer_norm"}, {"kind": "skip_transcoder", "subtract_b_dec": False}]
)
def test_decode_needs_the_input_where_it_must(toy, rows, config):
    sae = toy("topk", **config)
    acts = sae.encode(rows)
    with pytest.raises(NeedsInput, match="like=x"):
        sae.decode(acts)
    close(sae.decode(acts, like=rows), sae(rows))
    sae.encode(rows[:3])  # nothing is remembered between calls
    close(sae.decode(acts, like=rows), sae(rows))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "matching_pursuit"])
def test_margin_is_where_the_support_changes(toy, rows, architecture):
    """Moving one pre-activation by less than its margin keeps that latent's membership; by a little more, in one direction, changes it."""
    sae = toy(architecture, dtype=torch.float64)
    p_BF = sae.preacts(sae.centre(rows[:4].double()))
    margin_BF, on_BF = sae.margin(p_BF), sae.activate(p_BF) != 0

    def member(row: int, latent: int, shift: float) -> bool:
        moved = p_BF[row : row + 1].clone()
        moved[0, latent] += shift
        return bool((sae.activate(moved) != 0)[0, latent])

    for row in range(4):
        for latent in range(sae.config.d_sae):
            m, on = float(margin_BF[row, latent]), bool(on_BF[row, latent])
            assert member(row, latent, 0.999 * m) == on == member(row, latent, -0.999 * m)
            assert not (member(row, latent, 1.001 * m + 1e-12) == on == member(row, latent, -1.001 * m - 1e-12))


def test_margin_of_matching_pursuit(toy, rows):
    """The row margin bounds how far the choices are from others: correlations off by less leave the path as it is."""
    sae = toy("matching_pursuit", dtype=torch.float64)
    x_BD = sae.centre(rows.double())
    margin_B = sae.margin(x_BD)[:, 0]
    largest = sae.W_dec.norm(dim=1).max() * (1 + sae.W_dec.norm(dim=1).max() ** 2) ** 6  # how much a disturbance of x can grow on the way
    moved = x_BD + torch.nn.functional.normalize(torch.ones_like(x_BD), dim=1) * (0.4 * margin_B / largest)[:, None]
    assert torch.equal(sae.activate(moved) != 0, sae.activate(x_BD) != 0)
    assert bool((margin_B > 0).all())


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "groupmax"])
def test_rival_is_the_latent_that_would_trade_places(toy, rows, architecture):
    sae = toy(architecture, dtype=torch.float64)
    p_BF = sae.preacts(sae.centre(rows[:6].double()))
    rank_BF = p_BF.abs() if architecture == "abstopk" else p_BF
    rival_BF, margin_BF = sae.rival(p_BF), sae.margin(p_BF)
    gap_BF = (rank_BF - rank_BF.gather(1, rival_BF)).abs()
    inner = rank_BF.gather(1, rival_BF) > 0  # where the boundary is another latent, not zero
    close(margin_BF[inner], gap_BF[inner])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scale_input_is_a_change_of_units(toy, rows, architecture):
    sae, s = toy(architecture, dtype=torch.float64), 3.7
    raw = sae.scale_input(s)
    x = rows.double()
    close(raw.encode(x), sae.encode(x * s) / s)
    close(raw(x), sae(x * s) / s)
    assert torch.equal(raw.W_dec, sae.W_dec)


def test_scale_input_of_a_transcoder_has_two_scales(toy, rows):
    sae = toy("jumprelu", dtype=torch.float64, kind="skip_transcoder", subtract_b_dec=False, d_out=7)
    raw, x = sae.scale_input(3.0, 0.5), rows.double()
    close(raw.encode(x), sae.encode(x * 3) / 3)
    close(raw(x), sae(x * 3) / 0.5)
    with pytest.raises(UsageError):
        toy("topk").scale_input(3.0, 0.5)
    with pytest.raises(UsageError):
        toy("topk", norm_in="layer_norm", norm_out="layer_norm").scale_input(3.0)


def test_a_float32_threshold_is_not_rounded_beside_bf16_weights(toy):
    for architecture in ("jumprelu", "batchtopk"):
        sae = toy(architecture, dtype=torch.bfloat16)
        theta = 1.0 + 2.0**-12  # between two bf16 numbers: rounded, it would be 1
        shape = sae.threshold.shape
        sae = SAE.build(sae.config, sae.tensors() | {"threshold": torch.full(shape, theta)})
        p = torch.full((1, sae.config.d_sae), 1.0, dtype=torch.bfloat16)
        assert not bool(sae.activate(p).any())
        sae = SAE.build(sae.config, sae.tensors() | {"threshold": torch.full(shape, 2 - theta)})
        assert bool(sae.activate(p).all())


def test_bf16_weights_compute_in_bf16_or_as_asked(toy, rows):
    sae = toy("topk", dtype=torch.bfloat16)
    assert sae.encode(rows).dtype == sae(rows).dtype == torch.bfloat16
    wide = SAE.build(sae.config, {name: tensor.double() for name, tensor in sae.tensors().items()})
    close(sae(rows, dtype=torch.float64), wide(rows), rtol=1e-13, atol=1e-13)


def test_matryoshka_prefixes(toy, rows):
    sae = toy("matryoshka", dtype=torch.float64)
    acts, x = sae.encode(rows), rows.double()
    for groups, width in ((1, 8), (2, 20), (3, 40)):
        close(sae.decode_prefix(acts, groups), acts[:, :width] @ sae.W_dec[:width] + sae.b_dec)
    close(sae.decode_prefix(acts, 3), sae(x))
    with pytest.raises(UsageError):
        sae.decode_prefix(acts, 4)


def test_gradients_reach_the_input(toy, rows):
    sae, x = toy("topk", dtype=torch.float64), rows[:4].double().requires_grad_(True)
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).double()
    (gradient,) = torch.autograd.grad((sae(x) * weight).sum(), x)
    for row, column in ((0, 3), (1, 7), (2, 0), (3, 11)):  # central differences
        step = torch.zeros_like(x).detach()
        step[row, column] = 1e-6
        slope = ((sae(x + step) - sae(x - step)) * weight).sum() / 2e-6
        assert abs(float(slope.detach() - gradient[row, column])) < 1e-7
    assert not any(parameter.requires_grad for parameter in sae.parameters())


def test_a_zero_decoder_row_never_gives_nan(toy, rows):
    sae = toy("topk", decoder_norm_scaling=True)
    tensors = sae.tensors()
    tensors["W_dec"] = tensors["W_dec"].clone().index_fill_(0, torch.arange(30), 0)
    dead = SAE.build(sae.config, tensors)
    assert bool(dead(rows).isfinite().all())


def test_copies_and_pickles(toy, rows):
    sae = toy("gated", provenance={"site": "resid_post.2"})
    for again in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), sae.astype(torch.float32)):
        assert again.config == sae.config and again.provenance == sae.provenance
        assert torch.equal(again(rows), sae(rows))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "topkk"}, "did you mean 'topk'"),
        ({"params": {"k": 41}}, "a whole number from 1 to 40"),
        ({"params": {"k": 2.5}}, "a whole number"),
        ({"params": {"k": True}}, "a whole number"),
        ({"params": {}}, "None"),
        ({"d_in": 0}, "positive whole number"),
        ({"d_sae": -1}, "positive whole number"),
        ({"kind": "transcodr", "subtract_b_dec": False}, "did you mean 'transcoder'"),
        ({"kind": "transcoder"}, "subtract_b_dec=False"),
        ({"d_out": 7}, "autoencoder with d_in 12 and d_out 7"),
        ({"norm_in": "layernorm"}, "did you mean 'layer_norm'"),
        ({"norm_out": "layer_norm"}, "norm_out must be"),
        ({"subtract_b_dec": "yes"}, "true or false"),
    ],
)
def test_impossible_configs(toy, change, words):
    sae = toy("topk")
    with pytest.raises(FormatError) as error:
        SAE.build(SAEConfig(**{**sae.config.to_json(), **change}), sae.tensors())
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        ("topk", {"threshold": torch.ones(40)}, "not expected: threshold"),
        ("jumprelu", {"threshold": None}, "missing: threshold"),
        ("topk", {"W_dec": torch.ones(12, 40)}, "W_dec has shape [12, 40]"),
        ("topk", {"W_enc": torch.ones(12, 40, dtype=torch.int64)}, "expected floating point"),
        ("matryoshka", {"group_sizes": torch.tensor([8, 12, 21])}, "sum to d_sae = 40"),
        ("matryoshka", {"group_sizes": torch.tensor([8.0, 12.0, 20.0])}, "expected int64"),
        ("batchtopk", {"threshold": torch.ones(40)}, "threshold has shape [40]"),
    ],
)
def test_wrong_tensors(toy, architecture, change, words):
    sae = toy(architecture)
    tensors = {name: tensor for name, tensor in (sae.tensors() | change).items() if tensor is not None}
    with pytest.raises(FormatError) as error:
        SAE.build(sae.config, tensors)
    assert words in str(error.value)


def test_a_wrong_input_names_the_shapes(toy):
    with pytest.raises(UsageError, match="d_in = 12"):
        toy("topk").encode(torch.zeros(3, 11))
    with pytest.raises(UsageError, match="d_sae = 40"):
        toy("topk").decode(torch.zeros(3, 41))


@pytest.mark.parametrize("rows", [[[1.0] * 32], "x", None, np.ones((3, 32), np.float32)])
def test_rows_that_are_no_tensor_are_named(rows):
    from saehub.testing.saes import random_sae

    sae = random_sae("topk", d_in=32)
    for call in (sae, sae.encode, sae.encode_sparse):
        with pytest.raises(UsageError, match="not a tensor"):
            call(rows)
