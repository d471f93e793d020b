"""The golden probe holds what float64 says, verify finds what changed, and with the model it finds a wrong site."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from saehub.api import ModelShape
from saehub.checkpoint import format as v1
from saehub.checkpoint.probe import make_probe, read_probe
from saehub.checkpoint.verify import verify
from saehub.errors import FormatError, UsageError
from saehub.jsonio import sha256_file

pytestmark = pytest.mark.quick
ARCHITECTURES = ("relu", "topk", "abstopk", "batchtopk", "matryoshka", "jumprelu", "gated", "groupmax", "matching_pursuit")


def statuses(report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def details(report) -> str:
    return "\n".join(check.detail for check in report.checks)


# A model of four residual blocks, as much of one as `taps` needs: verify takes any object with `.hf`, `.shape` and `.fingerprint`.
class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Linear(width, width)

    def forward(self, hidden_states):
        return hidden_states + self.mlp(hidden_states).tanh()


class Trunk(nn.Module):
    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList([Block(width) for _ in range(4)])

    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Toy(nn.Module):
    def __init__(self, width: int = 12, vocab: int = 50, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.model = Trunk(width, vocab)

    def forward(self, input_ids):
        return self.model(input_ids)


def handle(seed: int = 0, fingerprint: str = "sha256:toy"):
    shape = ModelShape("llama", n_layers=4, d_model=12, d_mlp=48, n_heads=2, d_head=6, vocab=50, context=16)
    return SimpleNamespace(hf=Toy(seed=seed).eval(), shape=shape, fingerprint=fingerprint, spec=SimpleNamespace(name="toy"))


def trained_at(toy, layer: int, *, claims: str, **settings):
    """An SAE with a probe of resid_post.`layer` of the toy model, whose header claims the site `claims`."""
    model = handle()
    draw = torch.Generator().manual_seed(5)
    contexts = torch.randint(0, 50, (20, 16), generator=draw)
    hidden = model.hf.model.embed_tokens(contexts)
    for block in model.hf.model.layers[: layer + 1]:
        hidden = block(hidden)
    which, position = torch.arange(80) % 20, 1 + torch.arange(80) % 15
    x = hidden.detach()[which, position]
    sae = toy("topk", provenance={"site": claims, "model": {"name": "toy", "fingerprint": "sha256:toy"}})
    return sae, make_probe(sae, x, contexts[which, position], position, contexts[which], **settings)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probe_is_what_float64_says(toy, rows, architecture, tmp_path):
    sae = toy(architecture, dtype=torch.bfloat16)
    wide = type(sae)(sae.config, {n: t.double() if t.is_floating_point() else t for n, t in sae.tensors().items()})
    folder = v1.save(sae, tmp_path / "sae", probe=make_probe(sae, rows))
    probe = read_probe(folder / "probe.safetensors", sae)
    dense = torch.zeros(96, 40, dtype=torch.float64)
    for row in range(96):
        span = slice(probe.row_offsets[row], probe.row_offsets[row + 1])
        dense[row, probe.feature_indices[span]] = probe.feature_values[span]
    np.testing.assert_allclose(dense, wide.encode(rows).numpy(), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(probe.reconstruction_ND, wide(rows).numpy(), rtol=1e-13, atol=1e-13)
    assert probe.mean_l0 == float((dense != 0).sum(1).double().mean())
    report = verify(folder)
    assert report.ok and statuses(report) == {
        "header": "ok",
        "tensors": "ok",
        "probe file": "ok",
        "probe replay": "ok",
        "site": "not verified",
    }


@pytest.mark.parametrize("threads", [1, 2])
def test_replay_does_not_depend_on_threads(toy, rows, tmp_path, threads):
    sae = toy("jumprelu")
    folder = v1.save(sae, tmp_path / "sae", probe=make_probe(sae, rows))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert verify(folder).ok
    finally:
        torch.set_num_threads(before)


def forge(folder, **changes):
    """Change tensors and make every hash fit again, so that only the probe can tell."""
    from saehub.jsonio import sha256_tensor

    header, found = json.loads((folder / "saehub.json").read_text()), load_file(folder / "sae.safetensors")
    for name, change in changes.items():
        if name in found:
            found[name] = change(found[name]).contiguous()
            header["tensors"][name]["sha256"] = sha256_tensor(found[name])
        else:
            header[name] = change(header[name])
    save_file(found, folder / "sae.safetensors")
    header["tensors_hash"] = v1.tensors_hash(header["tensors"])
    header["hash"] = v1.header_hash(header)
    (folder / "saehub.json").write_text(json.dumps(header))


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    """The lowest bit of the largest number."""
    raw = tensor.clone().view(torch.int32)
    raw.view(-1)[tensor.abs().argmax()] ^= 1
    return raw.view(torch.float32)


FAULTS = {
    "one bit of W_enc": {"W_enc": one_bit},
    "one bit of b_enc": {"b_enc": lambda t: flip_active(t)},
    "one bit of W_dec": {"W_dec": one_bit},
    "one bit of b_dec": {"b_dec": one_bit},
    "thresholds rounded to bf16": {"threshold": lambda t: t.bfloat16().float()},
    "a decoder row swapped": {"W_dec": lambda t: t[[1, 0, *range(2, 40)]]},
    "b_dec not subtracted": {"subtract_b_dec": lambda _: False},
    "ReLU for JumpReLU": {"threshold": lambda t: t * 0},
    "another norm": {"norm_in": lambda _: "constant_norm_rescale", "norm_out": lambda _: "constant_norm_rescale"},
    "scaling flag flipped": {"decoder_norm_scaling": lambda _: True},
}


def flip_active(tensor: torch.Tensor) -> torch.Tensor:
    """The lowest bit of every bias: which latents the probe activates is not known here."""
    return (tensor.view(torch.int32) ^ 1).view(torch.float32)


@pytest.mark.parametrize("fault", FAULTS)
def test_replay_finds_what_hashes_were_made_to_hide(toy, rows, tmp_path, fault):
    sae = toy("jumprelu")
    folder = v1.save(sae, tmp_path / "sae", probe=make_probe(sae, rows))
    forge(folder, **FAULTS[fault])
    report = verify(folder)
    assert not report.ok and statuses(report)["tensors"] == "ok" and statuses(report)["probe replay"] == "failed", str(report)


@pytest.mark.parametrize("wrong", [4, 6])
def test_replay_finds_k_off_by_one(toy, rows, tmp_path, wrong):
    sae = toy("topk")
    folder = v1.save(sae, tmp_path / "sae", probe=make_probe(sae, rows))
    forge(folder, params=lambda _: {"k": wrong})
    assert statuses(verify(folder))["probe replay"] == "failed"


def test_a_flipped_bit_is_found_by_its_hash(toy, rows, tmp_path):
    sae = toy("topk")
    folder = v1.save(sae, tmp_path / "sae", probe=make_probe(sae, rows))
    found = load_file(folder / "sae.safetensors")
    save_file(found | {"W_enc": one_bit(found["W_enc"])}, folder / "sae.safetensors")
    report = verify(folder)
    assert not report.ok and statuses(report) == {"header": "ok", "tensors": "failed"}


def test_ties_are_not_false_alarms(toy, rows, tmp_path):
    """Two equal latents tie for the last place of some rows: which one is taken may differ between machines."""
    sae = toy("topk")
    tensors = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    tensors["W_enc"][:, 1], tensors["b_enc"][1] = tensors["W_enc"][:, 0], tensors["b_enc"][0]
    sae = type(sae)(sae.config, tensors)
    probe = make_probe(sae, rows)
    tied = probe.margin_N == 0
    assert 1 <= int(tied.sum()) <= 9
    folder = v1.save(sae, tmp_path / "sae", probe=probe)
    stored = load_file(folder / "probe.safetensors")
    for row in tied.nonzero().squeeze(1).tolist():  # what another machine would have stored: the other twin of each
        span = slice(int(stored["row_offsets"][row]), int(stored["row_offsets"][row + 1]))
        here = stored["feature_indices"][span]
        stored["feature_indices"][span] = torch.where(here < 2, here ^ 1, here)
    save_file(stored, folder / "probe.safetensors")
    forge(folder, probe=lambda entry: entry | {"sha256": sha256_file(folder / "probe.safetensors")})
    report = verify(folder)
    assert statuses(report)["probe replay"] == "ok", str(report)


def test_a_probe_that_activates_nothing_proves_nothing(toy, rows, tmp_path):
    sae = toy("jumprelu")
    asleep = type(sae)(sae.config, sae.tensors() | {"threshold": torch.full((40,), 1e6)})
    report = verify(v1.save(asleep, tmp_path / "sae", probe=make_probe(asleep, rows)))
    assert not report.ok and statuses(report)["probe replay"] == "inconclusive" and "0 of 96 rows" in details(report)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.unlink(), "is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "not the probe that was saved"),
        (lambda f: f.write_bytes(b""), "not the probe that was saved"),
    ],
)
def test_a_damaged_probe_file(toy, rows, tmp_path, damage, words):
    sae = toy("topk")
    folder = v1.save(sae, tmp_path / "sae", probe=make_probe(sae, rows))
    damage(folder / "probe.safetensors")
    report = verify(folder)
    assert not report.ok and statuses(report)["probe file"] == "failed" and words in details(report)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("feature_indices", lambda t: t + 40, "points outside"),
        ("feature_indices", lambda t: t.int(), "feature_indices is torch.int32"),
        ("row_offsets", lambda t: t.flip(0), "do not partition"),
        ("row_offsets", lambda t: t[:-1], "expected [97]"),
        ("reconstruction", lambda t: t[:, :5], "expected [96, 12]"),
        ("margin", lambda t: t * float("nan"), "NaN"),
        ("x", None, "missing: x"),
        ("other", lambda _: torch.zeros(3), "not known: other"),
        ("positions", lambda _: torch.zeros(96, dtype=torch.int64), "not a probe"),
    ],
)
def test_probe_tensors_are_checked(toy, rows, tmp_path, name, change, words):
    sae = toy("topk")
    stored = make_probe(sae, rows).to_tensors()
    if change is None:
        del stored[name]
    else:
        stored[name] = change(stored.get(name)).contiguous()
    save_file(stored, tmp_path / "probe.safetensors")
    with pytest.raises(FormatError) as error:
        read_probe(tmp_path / "probe.safetensors", sae)
    assert words in str(error.value)


def test_the_site_is_proved_with_the_model_only(toy, tmp_path):
    sae, probe = trained_at(toy, 2, claims="resid_post.2")
    folder = v1.save(sae, tmp_path / "sae", probe=probe)
    assert statuses(verify(folder))["site"] == "not verified"
    report = verify(folder, handle())
    assert report.ok and statuses(report)["site"] == "ok", str(report)
    assert (
        statuses(verify(v1.save(*trained_at(toy, 2, claims="resid_pre.3")[:1], tmp_path / "same", probe=probe), handle()))["site"] == "ok"
    )


@pytest.mark.parametrize("claims", ["resid_post.1", "resid_post.3", "embed", "mlp_out.2"])
def test_a_wrong_site_or_layer_is_found_and_the_right_one_named(toy, tmp_path, claims):
    sae, probe = trained_at(toy, 2, claims=claims)
    report = verify(v1.save(sae, tmp_path / "sae", probe=probe), handle())
    assert not report.ok and statuses(report)["site"] == "failed"
    assert "resid_post.2" in details(report) or "resid_pre.3" in details(report)


def test_another_model_is_found(toy, tmp_path):
    sae, probe = trained_at(toy, 2, claims="resid_post.2")
    report = verify(v1.save(sae, tmp_path / "sae", probe=probe), handle(seed=1, fingerprint="sha256:other"))
    assert not report.ok and statuses(report)["model"] == "failed" and statuses(report)["site"] == "failed"
    assert "no site of this model gives these rows" in details(report)


def test_a_layer_that_the_model_lacks(toy, tmp_path):
    sae, probe = trained_at(toy, 2, claims="resid_post.9")
    report = verify(v1.save(sae, tmp_path / "sae", probe=probe), handle())
    assert statuses(report)["site"] == "failed" and "no layer 9" in details(report)


def test_a_transcoders_target_site_is_verified_too(toy, tmp_path):
    model = handle()
    sae, probe = trained_at(toy, 1, claims="resid_post.1")
    after = model.hf.model.layers[2](probe.x_ND).detach()  # resid_post.2 of the same rows
    made = toy("topk", kind="transcoder", subtract_b_dec=False, provenance={"site": "resid_post.1", "target_site": "resid_post.2"})
    contexts = probe.contexts_ST[probe.context_of_row_N]
    for target, status in (("resid_post.2", "ok"), ("resid_post.3", "failed")):
        made.provenance["target_site"] = target
        with_target = make_probe(made, probe.x_ND, probe.token_ids_N, probe.positions_N, contexts, target_ND=after)
        report = verify(v1.save(made, tmp_path / target, probe=with_target), model)
        assert statuses(report)["site"] == "ok" and statuses(report)["target site"] == status


def test_what_a_probe_refuses(toy, rows):
    sae = toy("topk")
    with pytest.raises(UsageError, match="at least 64 rows"):
        make_probe(sae, rows[:63])
    with pytest.raises(UsageError, match="NaN"):
        make_probe(sae, rows * float("nan"))
    with pytest.raises(UsageError, match="all three"):
        make_probe(sae, rows, token_ids=torch.zeros(96))
    ids = torch.arange(96)
    with pytest.raises(UsageError, match="token_ids are not the tokens"):
        make_probe(sae, rows, ids, torch.zeros(96), torch.zeros(96, 4))
    with pytest.raises(UsageError, match="outside its context"):
        make_probe(sae, rows, ids, torch.full((96,), 4), torch.zeros(96, 4))


def test_report_as_data_and_as_text(toy, rows, tmp_path):
    report = verify(v1.save(toy("topk"), tmp_path / "sae"))
    data = json.loads(json.dumps(report.to_json()))
    assert data["ok"] is True and data["format"] == "saehub" and {"name", "status", "detail", "fix"} == set(data["checks"][0])
    assert "probe replay" in str(report) and "not verified" in str(report)
    with pytest.raises(UsageError):
        verify(tmp_path / "nowhere")
