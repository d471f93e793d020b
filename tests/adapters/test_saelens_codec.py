"""The SAELens codec without the library: configs of every age, the side channel, and what cannot be said."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.checkpoint.sae import SAE
from saehub.errors import CheckFailed, FormatError
from saehub_saelens.codec import SAELensFormat

pytestmark = pytest.mark.quick
SAYABLE = [
    ("relu", {}), ("gated", {}), ("topk", {}), ("topk", {"decoder_norm_scaling": True}), ("abstopk", {}), ("jumprelu", {}), ("matching_pursuit", {}),
    ("topk", {"subtract_b_dec": False}), ("topk", {"norm_in": "layer_norm", "norm_out": "layer_norm"}),
    ("jumprelu", {"norm_in": "constant_norm_rescale", "norm_out": "constant_norm_rescale"}),
    *[(name, {"kind": kind, "subtract_b_dec": False, "d_out": 9}) for name in ("relu", "jumprelu") for kind in ("transcoder", "skip_transcoder")],
    ("relu", {"kind": "transcoder", "subtract_b_dec": False, "norm_in": "layer_norm"}), ("batchtopk", {}), ("matryoshka", {}),
]  # fmt: skip
UNSAYABLE = [
    ("groupmax", {}, "no groupmax autoencoder"),
    ("topk", {"kind": "transcoder", "subtract_b_dec": False}, "no topk transcoder"),
    ("gated", {"kind": "skip_transcoder", "subtract_b_dec": False}, "no gated skip_transcoder"),
    ("topk", {"norm_in": "layer_norm"}, "undoes layer_norm on the output"),
]
PROVENANCE = {
    "site": "resid_post.2",
    "model": {"name": "org/model", "revision": "abc", "fingerprint": "sha256:1", "dtype": "float32"},
    "tokens": {"context": 128, "bos": "sequence", "exclude": ["bos", "pad"]},
    "data": {"hash": "d", "tokens_trained": 1000},
    "origin": {"format": "elsewhere", "config": {"π": [1, 2.5, None]}},
}


def same(a: SAE, b: SAE) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return (
        a.config == b.config
        and ours.keys() == theirs.keys()
        and all(ours[n].dtype == theirs[n].dtype and ours[n].shape == theirs[n].shape and torch.equal(ours[n], theirs[n]) for n in ours)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("architecture", "config"), SAYABLE)
def test_there_and_back_is_bit_exact(toy, tmp_path, architecture, config, dtype):
    """saehub -> SAELens -> saehub: tensors, config and provenance; thresholds of batchtopk come back as the scalar they were."""
    sae = toy(architecture, dtype=dtype, provenance=PROVENANCE, **config)
    codec = SAELensFormat()
    notes = codec.write(sae, tmp_path)
    again = codec.read(tmp_path)
    assert codec.sniff(tmp_path) and same(sae, again) and again.provenance == PROVENANCE
    assert bool(notes["folded"]) == (architecture in ("batchtopk", "matryoshka"))
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (
        int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6 and cfg["metadata"]["saehub"]["config"]["architecture"] == architecture
    )
    assert (
        cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
        and cfg["metadata"]["model_name"] == "org/model"
        and cfg["metadata"]["context_size"] == 128
    )


@pytest.mark.parametrize(("architecture", "config", "words"), UNSAYABLE)
def test_what_cannot_be_said_is_refused(toy, tmp_path, architecture, config, words):
    sae, codec = toy(architecture, **config), SAELensFormat()
    assert words in codec.refusal(sae)
    with pytest.raises(CheckFailed, match=words):
        codec.write(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists() and codec.refusal(toy("topk")) is None


def test_float32_thresholds_beside_bf16_weights_are_loaded_as_float32(toy, tmp_path):
    """SAELens casts every tensor to cfg.dtype: were it bfloat16, the thresholds would be rounded."""
    sae = toy("jumprelu", dtype=torch.bfloat16)
    sae = SAE.build(sae.config, sae.tensors() | {"threshold": torch.full((48,), 1 + 2.0**-12)})
    SAELensFormat().write(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == "float32"
    stored = load_file(tmp_path / "sae_weights.safetensors")
    assert stored["W_enc"].dtype == torch.bfloat16 and stored["threshold"].dtype == torch.float32
    assert same(SAELensFormat().read(tmp_path), sae)


def test_folding_the_decoder_norm(toy, rows, tmp_path):
    """relu with decoder_norm_scaling has no flag in SAELens: f and the reconstruction stay, the tensors change."""
    for architecture in ("relu", "jumprelu", "batchtopk"):
        sae = toy(architecture, decoder_norm_scaling=True)
        notes = SAELensFormat().write(sae, tmp_path / architecture)
        again = SAELensFormat().read(tmp_path / architecture)
        assert "decoder norms" in notes["folded"][0] and not again.config.decoder_norm_scaling
        assert torch.allclose(again.encode(rows), sae.encode(rows), rtol=1e-5, atol=1e-5) and torch.allclose(
            again(rows), sae(rows), rtol=1e-5, atol=1e-5
        )


def written(path, config, tensors):
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "sae_weights.safetensors")
    return path


V6 = {
    "d_in": 16,
    "d_sae": 48,
    "dtype": "float32",
    "device": "cuda",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
FOREIGN = {
    "version 6": ({**V6, "architecture": "topk", "k": 6, "rescale_acts_by_decoder_norm": True, "metadata": {"sae_lens_version": "6.20.1", "hook_name": "blocks.1.hook_mlp_out", "x": {"y": [1]}}}, "topk"),
    "topk by default has k 100": ({**V6, "d_sae": 48, "architecture": "topk", "k": 6, "metadata": {"sae_lens_version": "6.0.0"}}, "topk"),
    "expected_average_only_in": ({**V6, "architecture": "standard", "normalize_activations": "expected_average_only_in", "metadata": {"sae_lens_version": "6.54.12"}}, "relu"),
    "no bias subtraction": ({**V6, "architecture": "jumprelu", "apply_b_dec_to_input": False, "metadata": {"sae_lens_version": "6.54.12"}}, "jumprelu"),
    "version 3, flat": ({"d_in": 16, "d_sae": 48, "dtype": "float32", "hook_name": "blocks.3.hook_resid_pre", "model_name": "gpt2-small", "activation_fn_str": "relu", "context_size": 64, "normalize_activations": "none", "sae_lens_training_version": "3.1.0"}, "relu"),
    "version 1, hook_point": ({"d_in": 16, "d_sae": 48, "hook_point": "blocks.0.attn.hook_z", "normalize_activations": False}, "relu"),
    "version 4, topk by activation": ({"d_in": 16, "d_sae": 48, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 6}, "architecture": "standard", "finetuning_scaling_factor": False}, "topk"),
    "version 5, gated": ({"d_in": 16, "d_sae": 48, "architecture": "gated", "sae_lens_version": "5.10.1", "hook_name": "blocks.0.hook_resid_post"}, "gated"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_folder_comes_back_as_it_was(toy, tmp_path, case):
    """SAELens -> saehub (its own format, on disk) -> SAELens: every tensor's bits, every key of cfg.json."""
    from saehub.checkpoint import format as v1

    config, architecture = FOREIGN[case]
    tensors = toy(architecture).tensors()
    if "version 3" in case:
        tensors["scaling_factor"] = torch.ones(48)
    folder, codec = written(tmp_path / "theirs", config, tensors), SAELensFormat()
    assert codec.sniff(folder)
    sae = codec.read(folder)
    assert sae.config.architecture == architecture and sae.config.subtract_b_dec == config.get("apply_b_dec_to_input", True)
    again = v1.load(v1.save(sae, tmp_path / "ours"))
    codec.write(again, tmp_path / "back")
    assert json.loads((tmp_path / "back/cfg.json").read_text()) == config
    stored = load_file(tmp_path / "back/sae_weights.safetensors")
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_hook_names_become_sites_or_stay_as_they_are(toy, tmp_path):
    tensors = toy("relu").tensors()
    for name, site in (
        ("blocks.5.hook_resid_pre", "resid_pre.5"),
        ("blocks.5.attn.hook_z", "attn_z.5"),
        ("blocks.5.hook_mlp_out", "mlp_out.5"),
        ("hook_embed", "embed"),
    ):
        folder = written(
            tmp_path / name, {**V6, "architecture": "standard", "metadata": {"sae_lens_version": "6.0.0", "hook_name": name}}, tensors
        )
        assert SAELensFormat().read(folder).provenance["site"] == site
    odd = {"sae_lens_version": "6.0.0", "hook_name": "blocks.5.hook_strange"}
    sae = SAELensFormat().read(written(tmp_path / "odd", {**V6, "architecture": "standard", "metadata": odd}, tensors))
    assert "site" not in sae.provenance and sae.provenance["unknown_site"] == "blocks.5.hook_strange"
    changed = SAE.build(
        sae.config, sae.tensors() | {"b_dec": sae.b_dec.detach() + 1}, {k: v for k, v in sae.provenance.items() if k != "origin"}
    )
    SAELensFormat().write(changed, tmp_path / "again")
    assert json.loads((tmp_path / "again/cfg.json").read_text())["metadata"]["hook_name"] == "blocks.5.hook_strange"
    head = {"sae_lens_version": "6.0.0", "hook_name": "blocks.5.attn.hook_z", "hook_head_index": 3}
    assert (
        "site"
        not in SAELensFormat().read(written(tmp_path / "head", {**V6, "architecture": "standard", "metadata": head}, tensors)).provenance
    )


def test_a_changed_sae_does_not_get_its_old_config(toy, rows, tmp_path):
    """Read from SAELens, then changed (here: units): the verbatim config is still right, a config that is not is never written."""
    folder = written(
        tmp_path / "theirs", {**V6, "architecture": "topk", "k": 6, "metadata": {"sae_lens_version": "6.0.0"}}, toy("topk").tensors()
    )
    sae = SAELensFormat().read(folder)
    fewer = SAE.build(sae.config.replace(params={"k": 3}), sae.tensors(), sae.provenance)
    SAELensFormat().write(fewer, tmp_path / "fewer")
    assert json.loads((tmp_path / "fewer/cfg.json").read_text())["k"] == 3
    assert torch.equal(SAELensFormat().read(tmp_path / "fewer").encode(rows), fewer.encode(rows))


def edited(path, change):
    cfg = json.loads((path / "cfg.json").read_text())
    change(cfg)
    (path / "cfg.json").write_text(json.dumps(cfg))


def test_the_side_channel_never_overrules_the_folder(toy, rows, tmp_path):
    """Edited after saehub wrote it: tensors, k or hook name count as they stand, not as the side channel remembers them."""
    codec = SAELensFormat()
    codec.write(toy("batchtopk", provenance=PROVENANCE), tmp_path / "a")
    stored = load_file(tmp_path / "a/sae_weights.safetensors")
    stored["threshold"][7] += 1
    save_file(stored, tmp_path / "a/sae_weights.safetensors")
    sae = codec.read(tmp_path / "a")
    assert sae.config.architecture == "jumprelu" and float(sae.threshold[7]) == 3.5

    codec.write(toy("topk", provenance=PROVENANCE), tmp_path / "b")
    edited(tmp_path / "b", lambda cfg: cfg.update(k=2))
    assert codec.read(tmp_path / "b").config.params["k"] == 2

    codec.write(toy("topk", provenance=PROVENANCE), tmp_path / "c")
    edited(tmp_path / "c", lambda cfg: cfg["metadata"].update(hook_name="blocks.7.hook_resid_pre"))
    assert codec.read(tmp_path / "c").provenance["site"] == "resid_pre.7"

    for value in (
        "text",
        [],
        {"config": {"architecture": "topk"}},
        {"config": 3},
        {"config": {"architecture": "nope", "d_in": 1, "d_sae": 1}, "tensors": 5},
    ):
        codec.write(toy("topk"), tmp_path / "d")
        edited(tmp_path / "d", lambda cfg, value=value: cfg["metadata"].update(saehub=value))
        assert same(codec.read(tmp_path / "d"), toy("topk"))


BAD = {
    "unknown architecture": (lambda c: c.update(architecture="topkk"), "did you mean 'topk'"),
    "temporal": (lambda c: c.update(architecture="temporal"), "no multiple of n_heads x bottleneck_factor"),
    "training checkpoint with inference tensors": (lambda c: c.update(architecture="batchtopk", rescale_acts_by_decoder_norm=True), "missing: threshold"),
    "training topk from before the option": (lambda c: c.update(decoder_init_norm=0.1), "changed what its absence means"),
    "training without its scale": (lambda c: c.update(decoder_init_norm=0.1, rescale_acts_by_decoder_norm=True, normalize_activations="expected_average_only_in"), "no scaling_factor of activation_scaler.json"),
    "training without its whitening": (lambda c: c.update(decoder_init_norm=0.1, rescale_acts_by_decoder_norm=True, normalize_activations="covariance_whitening"), "no activation_whitening.safetensors"),
    "matryoshka without widths": (lambda c: c.update(architecture="matryoshka_batchtopk", rescale_acts_by_decoder_norm=True), "matryoshka_widths is None"),
    "whitening that is not folded": (lambda c: c.update(normalize_activations="covariance_whitening"), "whitening"),
    "unknown norm": (lambda c: c.update(normalize_activations="batch"), "'batch' cannot be read"),
    "d_in a string": (lambda c: c.update(d_in="16"), "d_in is '16'"),
    "d_sae missing": (lambda c: c.pop("d_sae"), "d_sae is None"),
    "d_sae wrong": (lambda c: c.update(d_sae=47), "expected [16, 47]"),
    "k missing means 100": (lambda c: c.pop("k"), "parameter 'k' is 100"),
    "k negative": (lambda c: c.update(k=-1), "parameter 'k' is -1"),
    "another architecture": (lambda c: c.update(architecture="jumprelu"), "missing: threshold"),
    "odd activation": (lambda c: (c.clear(), c.update(d_in=16, d_sae=48, activation_fn_str="tanh-relu")), "'tanh-relu' cannot be read"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_configs(toy, tmp_path, fault):
    change, words = BAD[fault]
    config = {**V6, "architecture": "topk", "k": 6, "metadata": {"sae_lens_version": "6.0.0"}}
    change(config)
    folder = written(tmp_path / "theirs", config, toy("topk").tensors())
    with pytest.raises(FormatError) as error:
        SAELensFormat().read(folder)
    assert words in str(error.value) and str(folder) in str(error.value)


def test_bad_files(toy, tmp_path):
    config = {**V6, "architecture": "topk", "k": 6, "metadata": {"sae_lens_version": "6.0.0"}}
    tensors, codec = toy("topk").tensors(), SAELensFormat()
    for number, (change, words) in enumerate(
        [
            (lambda p: (p / "sae_weights.safetensors").write_bytes(b"\x80\x04pickle"), "cannot be read"),
            (lambda p: (p / "sae_weights.safetensors").unlink(), "does not exist"),
            (lambda p: (p / "cfg.json").write_bytes(b"\xff\xfe{"), "cfg.json"),
            (lambda p: (p / "cfg.json").write_text("[1]"), "is a list"),
            (lambda p: (p / "cfg.json").write_text("[" * 100_000), "cfg.json"),
            (lambda p: save_file(tensors | {"scaling_factor": torch.full((48,), 2.0)}, p / "sae_weights.safetensors"), "scaling_factor"),
            (
                lambda p: save_file(tensors | {"b_enc": torch.full((48,), float("nan"))}, p / "sae_weights.safetensors"),
                "b_enc holds 48 values",
            ),
            (lambda p: save_file(tensors | {"extra": torch.ones(2)}, p / "sae_weights.safetensors"), "not expected: extra"),
        ]
    ):
        folder = written(tmp_path / str(number), config, tensors)
        change(folder)
        with pytest.raises(FormatError) as error:
            codec.read(folder)
        assert words in str(error.value), number
    for odd in (tmp_path / "nothing", tmp_path, tmp_path / "0/cfg.json"):
        assert not codec.sniff(odd)


def test_the_plugin_is_light():
    code = "import sys, saehub_saelens; c, = saehub_saelens.saehub_exporters(); print(c.address if hasattr(c, 'address') else c.name, [m for m in ('torch', 'sae_lens') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "saelens []"
    code = "import sys, saehub_saelens.codec; print([m for m in ('sae_lens', 'transformer_lens') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
