"""Format v1: what is written comes back bit for bit, and anything else is a FormatError that names the file and the fix."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.checkpoint import format as v1
from saehub.checkpoint.probe import make_probe
from saehub.errors import FormatError, SaehubError, UsageError

pytestmark = pytest.mark.quick
ARCHITECTURES = ("relu", "topk", "abstopk", "batchtopk", "matryoshka", "jumprelu", "gated", "groupmax", "matching_pursuit")
PROVENANCE = {
    "site": "resid_post.2",
    "model": {"name": "m", "revision": None},
    "origin": {"config": {"pi": 3.141592653589793, "naïve": [1, None]}},
}


@pytest.fixture
def folder(toy, rows, tmp_path):
    """A checkpoint with a probe."""
    sae = toy("jumprelu", provenance=PROVENANCE)
    return v1.save(sae, tmp_path / "sae", probe=make_probe(sae, rows))


def same(a, b) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    equal = all(
        ours[n].dtype == theirs[n].dtype
        and torch.equal(
            ours[n].view(torch.uint8) if ours[n].ndim else ours[n], theirs[n].view(torch.uint8) if theirs[n].ndim else theirs[n]
        )
        for n in ours
    )
    return ours.keys() == theirs.keys() and equal and a.config == b.config and a.provenance == b.provenance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_is_bit_exact(toy, tmp_path, architecture, dtype):
    sae = toy(architecture, dtype=dtype, provenance=PROVENANCE)
    again = v1.load(v1.save(sae, tmp_path / "a"))
    assert same(sae, again)
    v1.save(again, tmp_path / "b")
    assert (tmp_path / "a/saehub.json").read_bytes() == (tmp_path / "b/saehub.json").read_bytes()
    assert (tmp_path / "a/sae.safetensors").read_bytes() == (tmp_path / "b/sae.safetensors").read_bytes()


def test_mixed_dtypes_and_kinds_survive(toy, tmp_path):
    sae = toy("jumprelu", dtype=torch.bfloat16, kind="skip_transcoder", subtract_b_dec=False, d_out=7)
    mixed = type(sae)(sae.config, sae.tensors() | {"threshold": sae.threshold.float() + 2**-12})
    again = v1.load(v1.save(mixed, tmp_path / "a"))
    assert same(mixed, again) and again.threshold.dtype == torch.float32 and again.W_skip.dtype == torch.bfloat16


def test_the_header_says_what_the_design_asks(folder):
    header = json.loads((folder / "saehub.json").read_text())
    tensors = load_file(folder / "sae.safetensors")
    assert header["format_version"] == 1 and header["architecture_provider"] == "saehub" and header["kind"] == "autoencoder"
    assert {name: entry["shape"] for name, entry in header["tensors"].items()} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():  # the hash, from its definition
        raw = f"float32{list(tensor.shape)}".encode() + tensor.numpy().tobytes()
        assert header["tensors"][name]["sha256"] == hashlib.sha256(raw).hexdigest()
    body = {key: value for key, value in header.items() if key != "hash"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert header["hash"] == hashlib.sha256(text.encode()).hexdigest()
    assert header["probe"]["sha256"] == hashlib.sha256((folder / "probe.safetensors").read_bytes()).hexdigest()
    assert header["provenance"] == PROVENANCE


def test_what_a_kill_leaves_is_not_a_checkpoint(toy, tmp_path, monkeypatch):
    sae = toy("topk")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(v1, "write_json_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        v1.save(sae, tmp_path / "sae")
    assert not v1.is_checkpoint(tmp_path / "sae")
    with pytest.raises(FormatError, match="half-written"):
        v1.load(tmp_path / "sae")
    monkeypatch.undo()
    assert same(v1.load(v1.save(sae, tmp_path / "sae")), sae)  # the next attempt needs no cleaning up
    assert sorted(os.listdir(tmp_path / "sae")) == ["sae.safetensors", "saehub.json"]


def test_overwriting_is_asked_for(toy, folder):
    other = toy("topk", seed=1)
    with pytest.raises(UsageError, match="overwrite"):
        v1.save(other, folder)
    v1.save(other, folder, overwrite=True)
    assert same(v1.load(folder), other) and not (folder / "probe.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(toy, tmp_path, value):
    sae = toy("jumprelu")
    broken = sae.tensors() | {"W_dec": sae.W_dec.detach().clone().index_put((torch.tensor([3]), torch.tensor([2])), torch.tensor(value))}
    with pytest.raises(FormatError, match="W_dec holds 1 values"):
        v1.save(type(sae)(sae.config, broken), tmp_path / "sae")
    assert not (tmp_path / "sae").exists()
    off = type(sae)(sae.config, sae.tensors() | {"threshold": torch.full_like(sae.threshold, float("inf"))})
    assert same(v1.load(v1.save(off, tmp_path / "off")), off)  # a latent switched off is a latent


def rewrite(folder, **changes):
    """Change the header and make its own hashes fit again: what a careful forger, or a buggy writer, would leave."""
    header = json.loads((folder / "saehub.json").read_text())
    for key, value in changes.items():
        if value is None and key in header:
            del header[key]
        else:
            header[key] = value
    if isinstance(header.get("tensors"), dict) and all(isinstance(e, dict) and "sha256" in e for e in header["tensors"].values()):
        header["tensors_hash"] = v1.tensors_hash(header["tensors"])
    header["hash"] = v1.header_hash(header)
    (folder / "saehub.json").write_text(json.dumps(header))


def tensors_of(folder, **changes):
    found = load_file(folder / "sae.safetensors")
    for name, change in changes.items():
        if change is None:
            del found[name]
        else:
            found[name] = change(found.get(name))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "sae.safetensors")


def header_of(folder):
    return json.loads((folder / "saehub.json").read_text())


def text(folder, change):
    file = folder / "saehub.json"
    file.write_text(change(file.read_text()))


ZOO = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "does not exist"),
    "no tensors file": (lambda f: (f / "sae.safetensors").unlink(), "sae.safetensors does not exist"),
    "truncated tensors": (lambda f: os.truncate(f / "sae.safetensors", 2000), "cannot be read"),
    "empty tensors": (lambda f: os.truncate(f / "sae.safetensors", 0), "cannot be read"),
    "appended bytes": (lambda f: open(f / "sae.safetensors", "ab").write(b"x" * 64), "cannot be read"),
    "huge safetensors header": (lambda f: (f / "sae.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}"), "cannot be read"),
    "huge shape": (
        lambda f: (f / "sae.safetensors").write_bytes(
            (h := b'{"W_enc":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}}').__len__().to_bytes(8, "little")
            + h
            + b"\0" * 64
        ),
        "sae.safetensors",
    ),
    "pickle instead": (lambda f: torch.save({"W_enc": torch.zeros(2)}, f / "sae.safetensors"), "cannot be read"),
    "flipped bit": (lambda f: tensors_of(f, W_enc=lambda t: flip(t)), "W_enc is not the tensor that was saved"),
    "swapped encoder columns": (lambda f: tensors_of(f, W_enc=lambda t: t.flip(1)), "W_enc is not the tensor"),
    "missing tensor": (lambda f: tensors_of(f, threshold=None), "missing: threshold"),
    "extra tensor": (lambda f: tensors_of(f, W_skip=lambda _: torch.zeros(2)), "not listed: W_skip"),
    "transposed decoder": (lambda f: tensors_of(f, W_dec=lambda t: t.T), "expected float32 [40, 12], found float32 [12, 40]"),
    "wrong dtype": (lambda f: tensors_of(f, b_enc=lambda t: t.bfloat16()), "expected float32 [40], found bfloat16 [40]"),
    "NaN": (lambda f: forge(f, "W_dec", lambda t: t * float("nan")), "W_dec holds 480 values"),
    "header not JSON": (lambda f: text(f, lambda s: s[:-40]), "not JSON"),
    "header not UTF-8": (lambda f: (f / "saehub.json").write_bytes(b'{"format": "\xff\xfe"}'), "not JSON in UTF-8"),
    "header is a list": (lambda f: (f / "saehub.json").write_text("[1, 2]"), "is not a saehub header"),
    "header of another program": (lambda f: (f / "saehub.json").write_text('{"name": "x"}'), "is not a saehub header"),
    "NaN in the header": (lambda f: text(f, lambda s: s.replace('"d_in": 12', '"d_in": NaN')), "NaN is not JSON"),
    "key twice": (lambda f: text(f, lambda s: s.replace('"d_in": 12', '"d_in": 12, "d_in": 12')), "occurs twice"),
    "deep nesting": (lambda f: (f / "saehub.json").write_text("[" * 200_000), "saehub.json"),
    "edited header": (
        lambda f: text(f, lambda s: s.replace('"subtract_b_dec": true', '"subtract_b_dec": false')),
        "was changed after it was written",
    ),
    "future version": (lambda f: rewrite(f, format_version=2), "pip install -U saehub"),
    "no version": (lambda f: rewrite(f, format_version=None), "format_version is None"),
    "version of another type": (lambda f: rewrite(f, format_version=True), "format_version is True"),
    "no tensors listed": (lambda f: rewrite(f, tensors={}), "'tensors' is dict"),
    "tensors a list": (lambda f: rewrite(f, tensors=[1]), "'tensors' is list"),
    "an entry without a shape": (
        lambda f: rewrite(f, tensors={"W_enc": {"dtype": "float32", "sha256": "0"}}),
        "the entry of tensor 'W_enc'",
    ),
    "an entry with a negative size": (
        lambda f: rewrite(f, tensors={"W_enc": {"dtype": "float32", "shape": [-1], "sha256": "0"}}),
        "the entry of tensor",
    ),
    "d_in a string": (lambda f: rewrite(f, d_in="12"), "d_in is '12'"),
    "d_sae does not fit": (lambda f: rewrite(f, d_sae=41), "expected [12, 41]"),
    "no architecture": (lambda f: rewrite(f, architecture=None), "'architecture' is missing"),
    "params a list": (lambda f: rewrite(f, params=[1]), "params is [1]"),
    "provenance a list": (lambda f: rewrite(f, provenance=[1]), "'provenance' is not a map"),
    "probe a number": (lambda f: rewrite(f, probe=3), "'probe' is 3"),
    "unknown architecture": (
        lambda f: rewrite(f, architecture="softcap", architecture_provider="saehub-softcap"),
        "pip install saehub-softcap",
    ),
    "another architecture": (lambda f: rewrite(f, architecture="relu"), "not expected: threshold"),
}


def flip(tensor: torch.Tensor) -> torch.Tensor:
    """The lowest bit of one number."""
    raw = tensor.clone().view(torch.int32)
    raw[3, 5] ^= 1
    return raw.view(torch.float32)


def forge(folder, name, change):
    """Change a tensor and all hashes with it."""
    from saehub.jsonio import sha256_tensor

    tensors_of(folder, **{name: change})
    entries = header_of(folder)["tensors"]
    entries[name]["sha256"] = sha256_tensor(load_file(folder / "sae.safetensors")[name])
    rewrite(folder, tensors=entries)


@pytest.mark.parametrize("fault", ZOO)
def test_zoo_of_damaged_checkpoints(folder, fault):
    damage, words = ZOO[fault]
    damage(folder)
    with pytest.raises(FormatError) as error:
        v1.load(folder)
    assert words in str(error.value) and str(folder) in str(error.value) and error.value.fix


@pytest.mark.parametrize("name", ["saehub.json", "sae.safetensors"])
def test_random_damage_is_found_or_harmless(folder, tmp_path, name):
    """200 random bytes changed, cut or inserted: the very same SAE comes back, or a FormatError; never another SAE, never a crash."""
    original, draw = v1.load(folder), random.Random(7)
    raw = (folder / name).read_bytes()
    found = 0
    for number in range(200):
        bad = bytearray(raw)
        place = draw.randrange(len(bad)) if draw.random() < 0.5 else draw.randrange(min(400, len(bad)))
        match number % 3:
            case 0:
                bad[place] ^= 1 << draw.randrange(8)
            case 1:
                del bad[place : place + draw.randrange(1, 50)]
            case 2:
                bad[place:place] = draw.randbytes(draw.randrange(1, 9))
        (folder / name).write_bytes(bad)
        try:
            again = v1.load(folder)
        except SaehubError as error:
            assert isinstance(error, FormatError)
            found += 1
        else:
            assert same(again, original)
    assert found > 150


def test_a_moved_folder_is_the_same_checkpoint(folder, tmp_path):
    moved = shutil.move(folder, tmp_path / "elsewhere é")
    assert v1.load(moved).config.architecture == "jumprelu"


def test_provenance_must_be_plain_data(toy, tmp_path):
    for value, words in ((object(), "is a object"), (float("nan"), "Out of range"), ({1: {2}}, "is a set")):
        with pytest.raises(UsageError, match="must be plain data") as error:
            v1.save(toy("topk", provenance={"model": value}), tmp_path / "a")
        assert words in str(error.value) and not (tmp_path / "a").exists()
