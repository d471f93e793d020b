"""What Gemma Scope's and circuit-tracer's layouts can hold, and how it comes back; everything else is refused with the reason."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from saehub.checkpoint import format as v1
from saehub.checkpoint.load import codec
from saehub.checkpoint.sae import SAE
from saehub.errors import CheckFailed, UsageError
from saehub.testing.saes import random_sae, rows_for

pytestmark = pytest.mark.quick
TRANSCODER = {"kind": "transcoder", "subtract_b_dec": False}
SKIP = {"kind": "skip_transcoder", "subtract_b_dec": False}
AT = {"site": "mlp_in.3", "target_site": "mlp_out.3", "model": {"name": "org/model"}, "trainer": {"config": {"lr": 1e-3}}}
SAYABLE = {
    "gemma_scope": [("jumprelu", {"subtract_b_dec": False}), ("relu", {"subtract_b_dec": False}), ("batchtopk", {"subtract_b_dec": False}), ("matryoshka", {"subtract_b_dec": False}),
                    ("jumprelu", {**TRANSCODER, "d_out": 20}), ("jumprelu", {}), ("relu", {"decoder_norm_scaling": True}), ("batchtopk", {"decoder_norm_scaling": True})],
    "circuit_tracer": [("relu", TRANSCODER), ("jumprelu", TRANSCODER), ("jumprelu", SKIP), ("relu", SKIP), ("batchtopk", TRANSCODER), ("matryoshka", SKIP), ("jumprelu", {**TRANSCODER, "decoder_norm_scaling": True})],
}  # fmt: skip
CASES = [(name, *item) for name, items in SAYABLE.items() for item in items]


def toy(architecture: str, fields: dict, dtype: str = "float32", **about) -> SAE:
    sae = random_sae(architecture, dtype=dtype, **fields)
    return SAE.build(sae.config, sae.tensors(), {**AT, **about})


def same(a: SAE, b: SAE) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return (
        a.config == b.config
        and ours.keys() == theirs.keys()
        and all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(("name", "architecture", "fields"), CASES)
def test_there_and_back(tmp_path, name, architecture, fields, dtype):
    """Bit-exact where nothing is folded; where something is, it is named, and the float64 features and reconstruction stay."""
    sae, codec_ = toy(architecture, fields, dtype), codec(name)[1]
    notes = codec_.write(sae, tmp_path / "out")
    again = codec_.read(tmp_path / "out")
    assert codec_.sniff(tmp_path / "out") and again.provenance == sae.provenance
    folds = sae.config.subtract_b_dec or sae.config.decoder_norm_scaling
    assert bool(notes["folded"]) == folds and same(sae, again) == (not folds)
    assert all(torch.equal(again.tensors()[n], sae.tensors()[n]) for n in notes["bit_exact"])
    x_ND = rows_for(sae)
    wide, back = (one.astype(torch.float64) for one in (sae, again))
    near = wide.margin(wide.preacts(wide.centre(x_ND.double()))) < 1e-5  # folding rounds once, to float32
    f_NF, g_NF = wide.encode(x_ND), back.encode(x_ND)
    assert bool((((f_NF != 0) == (g_NF != 0)) | near).all()) and float(near.double().mean()) < 1e-2
    assert float((wide(x_ND) - back(x_ND)).norm() / wide(x_ND).norm()) < 1e-6 or bool(near.any())


@pytest.mark.parametrize(
    ("name", "architecture", "fields", "words"),
    [
        ("gemma_scope", "topk", {}, "its only activation is JumpReLU, this SAE's is topk"),
        ("gemma_scope", "gated", {}, "gated"),
        ("gemma_scope", "jumprelu", SKIP, "no skip path"),
        ("gemma_scope", "jumprelu", {"norm_in": "layer_norm", "norm_out": "layer_norm"}, "run-time norm layer_norm"),
        ("circuit_tracer", "relu", {}, "this is an autoencoder"),
        ("circuit_tracer", "topk", TRANSCODER, "this SAE's is topk"),
        ("circuit_tracer", "relu", {**TRANSCODER, "d_out": 20}, "one width, this one has 16 and 20"),
    ],
)
def test_what_cannot_be_said_is_refused(tmp_path, name, architecture, fields, words):
    sae, codec_ = toy(architecture, fields), codec(name)[1]
    assert words in codec_.refusal(sae)
    with pytest.raises(CheckFailed, match=words):
        codec_.write(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"target_site": None}, "predicts; target_site is None"),
        ({"site": "mlp_in.2"}, "reads layer 2 and predicts layer 3"),
        ({"site": "model.layers.3.mlp:in"}, "reads; site is 'model.layers.3.mlp:in'"),
    ],
)
def test_circuit_tracer_must_know_both_hooks(about, words):
    assert words in codec("circuit_tracer")[1].refusal(toy("relu", TRANSCODER, **about))
    assert codec("circuit_tracer")[1].refusal(toy("relu", TRANSCODER, site=None, unknown_site="blocks.3.ln2.hook_normalized")) is None


@pytest.mark.parametrize("name", ["gemma_scope", "gemma_scope_compressed_transcoder", "circuit_tracer", "circuit_tracer_skip"])
def test_a_foreign_folder_comes_back_as_it_was(layout, tmp_path, name):
    """Theirs -> the hub's own format, on disk -> theirs: every array's name and bits, every key of the config."""
    case = layout(name)
    instance = codec(case.address)[1]
    again = v1.load(v1.save(instance.read(case.path), tmp_path / "ours"))
    notes = instance.write(again, tmp_path / "back")
    if case.address.endswith("gemma_scope"):
        was, now = (dict(np.load(path / "params.npz", allow_pickle=False)) for path in (case.path, tmp_path / "back"))
        assert was.keys() == now.keys() and all(was[n].dtype == now[n].dtype and np.array_equal(was[n], now[n]) for n in was)
    else:
        was, now = load_file(case.weights), load_file(tmp_path / "back" / case.weights.name)
        assert was.keys() == now.keys() and all(torch.equal(was[n], now[n]) for n in was)
        said = yaml.safe_load((tmp_path / "back/config.yaml").read_text())
        assert said == {key: value for key, value in case.origin.items() if key != "transcoders"}
        assert bool(notes["dropped"]) == ("transcoders" in case.origin)
    assert instance.read(tmp_path / "back").provenance == again.provenance


def test_the_files_are_the_publishers(tmp_path):
    """Names, shapes, dtypes and config as the publisher's loaders look them up."""
    sae = toy("batchtopk", {"subtract_b_dec": False}, "bfloat16")
    codec("gemma_scope")[1].write(sae, tmp_path / "g")
    stored = np.load(tmp_path / "g/params.npz", allow_pickle=False)
    assert {n: (stored[n].shape, str(stored[n].dtype)) for n in stored} == {
        "W_enc": ((16, 48), "float32"), "W_dec": ((48, 16), "float32"), "b_enc": ((48,), "float32"), "b_dec": ((16,), "float32"), "threshold": ((48,), "float32")}  # fmt: skip
    assert np.array_equal(stored["W_enc"], sae.W_enc.float().numpy()) and len(set(stored["threshold"].tolist())) == 1

    skip = toy("jumprelu", SKIP)
    codec("circuit_tracer")[1].write(skip, tmp_path / "c")
    layer = load_file(tmp_path / "c/layer_3.safetensors")
    assert {n: tuple(t.shape) for n, t in layer.items()} == {
        "W_enc": (48, 16),
        "W_dec": (48, 16),
        "b_enc": (48,),
        "b_dec": (16,),
        "W_skip": (16, 16),
        "activation_function.threshold": (48,),
    }
    assert torch.equal(layer["W_enc"].T, skip.W_enc)
    assert yaml.safe_load((tmp_path / "c/config.yaml").read_text()) == {
        "model_name": "org/model", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out", "scan": None}  # fmt: skip


def test_a_set_grows_by_layers_and_stays_one_set(tmp_path):
    instance = codec("circuit_tracer")[1]
    for layer in (0, 1):
        instance.write(toy("relu", TRANSCODER, site=f"mlp_in.{layer}", target_site=f"mlp_out.{layer}"), tmp_path)
    assert instance.read(tmp_path / "layer_1.safetensors").provenance["site"] == "mlp_in.1"
    with pytest.raises(UsageError, match="holds another set"):
        instance.write(toy("relu", TRANSCODER, site="resid_mid.2", target_site="mlp_out.2"), tmp_path)


def test_equal_dictionaries_give_equal_files(tmp_path):
    sae = toy("jumprelu", {"subtract_b_dec": False})
    for folder in ("a", "b"):
        codec("gemma_scope")[1].write(sae, tmp_path / folder)
    assert (tmp_path / "a/params.npz").read_bytes() == (tmp_path / "b/params.npz").read_bytes()


@pytest.mark.parametrize("name", ["gemma_scope", "circuit_tracer"])
def test_the_side_channel_never_overrules_the_arrays(tmp_path, name):
    """Edited, absent or broken: what stands in the weights counts, and provenance that no longer fits is not believed."""
    sae, instance = toy("batchtopk", TRANSCODER), codec(name)[1]
    instance.write(sae, tmp_path)
    side = next(tmp_path.glob("*.saehub.json"))
    assert instance.read(tmp_path).config.architecture == "batchtopk"
    said = json.loads(side.read_text())
    for text in (
        "{",
        "[]",
        '{"saehub": 3}',
        json.dumps({"saehub": said["saehub"] | {"config": said["saehub"]["config"] | {"d_sae": 47}}}),
        json.dumps({"saehub": said["saehub"] | {"dtypes": {"W_enc": "float16"}}}),
    ):
        side.write_text(text)
        assert instance.read(tmp_path).config.architecture == "jumprelu", text
    side.unlink()
    plain = instance.read(tmp_path)
    assert torch.equal(plain.threshold, sae.threshold.expand(48)) and torch.equal(plain.W_enc, sae.W_enc)


def test_negative_thresholds_become_zero_for_circuit_tracer(tmp_path):
    """Here a negative θ means ReLU; there negative features would pass."""
    sae = toy("jumprelu", TRANSCODER)
    sae = SAE.build(sae.config, sae.tensors() | {"threshold": sae.threshold - 0.5}, sae.provenance)
    notes = codec("circuit_tracer")[1].write(sae, tmp_path)
    again = codec("circuit_tracer")[1].read(tmp_path)
    assert "negative thresholds" in notes["folded"][0] and "threshold" not in notes["bit_exact"]
    assert torch.equal(again.encode(rows_for(sae)), sae.encode(rows_for(sae)))


@pytest.mark.parametrize(
    ("src", "dst"), [("gemma_scope", "circuit_tracer"), ("circuit_tracer", "gemma_scope"), ("circuit_tracer", "saehub")]
)
def test_certificates_between_the_two(tmp_path, src, dst):
    from saehub.checkpoint.certificate import BY_EQUATION, BY_LIBRARY
    from saehub.checkpoint.convert import convert

    codec(src)[1].write(toy("jumprelu", TRANSCODER), tmp_path / "a")
    certificate = convert(tmp_path / "a", tmp_path / "b", dst)
    assert certificate.outcome == (BY_LIBRARY if dst == "saehub" else BY_EQUATION)
    assert sorted(certificate.bit_exact) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"] and not certificate.folded
