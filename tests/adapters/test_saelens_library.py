"""sae_lens itself: what it loads from our folders, what we read from its, and certificates made with it in a worker."""

from __future__ import annotations

import json
import os

os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file

from saehub.checkpoint import format as v1
from saehub.checkpoint.convert import Refused, convert, in_process
from saehub.checkpoint.load import find_format, load
from saehub.checkpoint.probe import make_probe
from saehub.checkpoint.sae import SAE
from saehub_saelens.codec import SAELensFormat

CASES = [
    ("relu", "standard", {}), ("gated", "gated", {}), ("topk", "topk", {}), ("topk", "topk", {"decoder_norm_scaling": True}), ("abstopk", "abstopk", {}),
    ("abstopk", "abstopk", {"decoder_norm_scaling": True}), ("jumprelu", "jumprelu", {}), ("matching_pursuit", "matching_pursuit", {}),
    ("matching_pursuit", "matching_pursuit", {"subtract_b_dec": False}), ("topk", "topk", {"subtract_b_dec": False}),
    ("topk", "topk", {"norm_in": "layer_norm", "norm_out": "layer_norm"}), ("jumprelu", "jumprelu", {"norm_in": "constant_norm_rescale", "norm_out": "constant_norm_rescale"}),
    ("relu", "standard", {"decoder_norm_scaling": True}), ("jumprelu", "jumprelu", {"decoder_norm_scaling": True}),
    ("batchtopk", "jumprelu", {}), ("batchtopk", "jumprelu", {"decoder_norm_scaling": True}), ("matryoshka", "jumprelu", {}),
    ("relu", "transcoder", {"kind": "transcoder", "subtract_b_dec": False, "d_out": 9}),
    ("relu", "transcoder", {"kind": "transcoder", "subtract_b_dec": False, "norm_in": "layer_norm"}),
    ("relu", "skip_transcoder", {"kind": "skip_transcoder", "subtract_b_dec": False, "d_out": 9}),
    ("jumprelu", "jumprelu_transcoder", {"kind": "transcoder", "subtract_b_dec": False, "d_out": 9}),
    ("jumprelu", "jumprelu_skip_transcoder", {"kind": "skip_transcoder", "subtract_b_dec": False, "d_out": 9}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "word", "config"), CASES)
def test_sae_lens_computes_the_same(toy, rows, tmp_path, architecture, word, config, dtype):
    """Our folder, loaded by `SAE.load_from_disk`: its own encode and forward against ours in float64."""
    from sae_lens import SAE as Theirs

    sae = toy(architecture, dtype=dtype, provenance={"site": "resid_post.2", "model": {"name": "gpt2"}}, **config)
    SAELensFormat().write(sae, tmp_path)
    theirs = Theirs.load_from_disk(tmp_path, device="cpu", dtype="float32")
    assert theirs.cfg.architecture() == word
    assert (
        theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post" and theirs.cfg.metadata.saehub["config"]["architecture"] == architecture
    )
    with torch.no_grad():
        features, output = theirs.encode(rows), theirs(rows)
    expected, reconstruction = sae.encode(rows, dtype=torch.float64), sae(rows, dtype=torch.float64)
    assert torch.equal(features != 0, expected != 0) and 0 < float((features != 0).double().mean()) < 0.6
    assert float((features - expected).abs().max() / expected.abs().max()) < 2e-6
    assert float((output - reconstruction).norm() / reconstruction.norm()) < 1e-6


def test_what_sae_lens_saves_comes_back(rows, tmp_path):
    """All inference architectures that saehub has, made and saved by sae_lens with random weights: read, computed, written and equal."""
    import sae_lens
    from sae_lens.registry import SAE_CLASS_REGISTRY

    common = {"d_in": 16, "d_sae": 48}
    extra = {"topk": {"k": 6}, "abstopk": {"k": 6}, "matching_pursuit": {"max_iterations": 5, "residual_threshold": 0.3}}
    seen = set()
    for word, (cls, cfg_cls) in SAE_CLASS_REGISTRY.items():
        if word == "temporal":
            continue
        settings = {**common, **extra.get(word, {})}
        if "transcoder" in word:
            settings |= {"d_out": 9, "apply_b_dec_to_input": False}
        torch.manual_seed(len(word))
        theirs = cls(cfg_cls(**settings, metadata=sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_mlp_out", note={"deep": [1]})))
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        theirs.save_model(tmp_path / word)
        assert find_format(tmp_path / word) == "saelens/saelens"
        ours = load(tmp_path / word)
        with torch.no_grad():
            features, output = theirs.encode(rows), theirs(rows)
        assert torch.allclose(ours.encode(rows), features, atol=1e-5), word
        assert torch.allclose(ours(rows), output, atol=1e-5), word
        assert ours.provenance["site"] == "mlp_out.1"
        SAELensFormat().write(v1.load(v1.save(ours, tmp_path / f"{word}-ours")), tmp_path / f"{word}-back")
        was, now = (load_file(tmp_path / name / "sae_weights.safetensors") for name in (word, f"{word}-back"))
        assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was), word
        assert json.loads((tmp_path / word / "cfg.json").read_text()) == json.loads((tmp_path / f"{word}-back" / "cfg.json").read_text()), (
            word
        )
        seen.add(word)
    assert len(seen) == 10


TEMPORAL = [
    {"kval_topk": 5}, {"sae_diff_type": "relu"}, {"kval_topk": 5, "tied_weights": False}, {"kval_topk": 5, "apply_b_dec_to_input": False},
    {"kval_topk": 5, "tied_weights": False, "apply_b_dec_to_input": False, "n_attn_layers": 2},
    {"kval_topk": 5, "normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.3},
    {"kval_topk": 5, "normalize_activations": "layer_norm"}, {"kval_topk": 5, "dtype": "bfloat16"},
]  # fmt: skip


@pytest.mark.parametrize("settings", TEMPORAL, ids=str)
def test_temporal(tmp_path, settings):
    """SAELens' TemporalSAE, saved by it: read, computed on sequences, certified in both directions, written again bit for bit."""
    import sae_lens
    from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

    torch.manual_seed(1)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_post")
    theirs = TemporalSAE(TemporalSAEConfig(d_in=16, d_sae=48, n_heads=4, bottleneck_factor=4, metadata=metadata, **settings))
    with torch.no_grad():
        theirs.b_dec.copy_(torch.randn(16))
    theirs.save_model(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    x = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(2)) * 3 + 1
    wide = TemporalSAE.load_from_disk(tmp_path / "theirs", dtype="float32")
    with torch.no_grad():
        features, output = wide.encode(x), wide(x)
        novel = wide.decode(features) if "normalize_activations" not in settings else None
    mine = ours.encode(x, dtype=torch.float64)
    assert torch.equal(features != 0, mine != 0) and float((features - mine).abs().max() / mine.abs().max()) < 1e-5
    assert float((output - ours(x, dtype=torch.float64)).norm() / output.norm()) < 1e-6
    if novel is not None and ours.W_dec.dtype == torch.float32:
        assert torch.allclose(ours.decode_novel(features), novel, atol=1e-4)
    there = convert(tmp_path / "theirs", tmp_path / "ours", "saehub", invoke=in_process)
    back = convert(tmp_path / "ours", tmp_path / "back", "saelens", invoke=in_process)
    assert there.passed and back.passed and not there.changed and not back.changed, (str(there), str(back))
    was, now = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("theirs", "back"))
    assert was.keys() == now.keys() and all(torch.equal(was[n], now[n]) and was[n].dtype == now[n].dtype for n in was)
    assert json.loads((tmp_path / "theirs/cfg.json").read_text()) == json.loads((tmp_path / "back/cfg.json").read_text())
    # and without SAELens' own config to fall back on
    SAELensFormat().write(SAE.build(ours.config, ours.tensors(), {"site": "resid_post.1"}), tmp_path / "plain")
    again = SAELensFormat().read(tmp_path / "plain")
    assert again.config == ours.config and all(torch.equal(again.tensors()[n], t) for n, t in ours.tensors().items())
    with torch.no_grad():
        assert torch.equal(TemporalSAE.load_from_disk(tmp_path / "plain", dtype="float32")(x), output)


def test_a_flat_config_of_version_3(toy, rows, tmp_path):
    """Before version 6 the config was flat: both sides upgrade it to the same SAE."""
    from sae_lens import SAE as Theirs
    from safetensors.torch import save_file

    (tmp_path / "cfg.json").write_text(
        json.dumps({"d_in": 16, "d_sae": 48, "dtype": "float32", "hook_point": "blocks.3.hook_resid_pre", "activation_fn_str": "topk",
                    "activation_fn_kwargs": {"k": 6}, "normalize_activations": "layer_norm", "apply_b_dec_to_input": False})
    )  # fmt: skip
    save_file(toy("topk").tensors() | {"scaling_factor": torch.ones(48)}, tmp_path / "sae_weights.safetensors")
    theirs, ours = Theirs.load_from_disk(tmp_path), load(tmp_path)
    with torch.no_grad():
        assert torch.allclose(theirs.encode(rows), ours.encode(rows), atol=1e-5) and torch.allclose(theirs(rows), ours(rows), atol=1e-4)
    assert ours.provenance["site"] == "resid_pre.3"


def test_attention_heads_are_read_flat(toy, rows, tmp_path):
    """At attn.hook_z SAELens takes [..., heads, d_head]; ours takes them side by side."""
    from sae_lens import SAE as Theirs

    sae = toy("topk", provenance={"site": "attn_z.1"})
    SAELensFormat().write(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    theirs = Theirs.load_from_disk(tmp_path)
    with torch.no_grad():
        output = theirs(rows.reshape(96, 1, 4, 4)).reshape(96, 16)
    assert torch.allclose(output, sae(rows), atol=1e-5)
    features, reconstruction = SAELensFormat().run(tmp_path, rows)
    assert torch.allclose(features, sae.encode(rows), atol=1e-5) and torch.allclose(reconstruction, output, atol=1e-5)


@pytest.mark.parametrize(("architecture", "word", "config"), CASES)
def test_certificates(toy, rows, tmp_path, architecture, word, config):
    """saehub -> SAELens -> saehub, certified by both libraries; bit-exact unless something was folded."""
    sae = toy(architecture, **config)
    v1.save(sae, tmp_path / "a", probe=make_probe(sae, rows))
    there = convert(tmp_path / "a", tmp_path / "b", "saelens", invoke=in_process)
    back = convert(tmp_path / "b", tmp_path / "c", "saehub", invoke=in_process)
    assert there.outcome == back.outcome == "verified by the target's library", (str(there), str(back))
    assert there.support["unexplained"] == back.support["unexplained"] == 0 and there.latents_exercised > 0.3
    folded = config.get("decoder_norm_scaling") and architecture not in ("topk", "abstopk")
    assert set(there.changed) == ({"W_enc", "b_enc", "W_dec"} if folded else set()) and not back.changed
    was, now = sae.tensors(), load(tmp_path / "c").tensors()
    for name in was:
        if not folded:
            assert torch.equal(was[name], now[name])


FAULTS = {
    "k off by one": ("topk", lambda cfg, t: cfg.update(k=cfg["k"] + 1)),
    "bias not subtracted": ("topk", lambda cfg, t: cfg.update(apply_b_dec_to_input=False)),
    "rescale flag flipped": ("topk", lambda cfg, t: cfg.update(rescale_acts_by_decoder_norm=True)),
    "topk loaded as standard": ("topk", lambda cfg, t: cfg.update(architecture="standard")),
    "threshold through bf16": ("jumprelu", lambda cfg, t: t.update(threshold=t["threshold"].bfloat16().float())),
    "decoder in bf16": ("jumprelu", lambda cfg, t: t.update(W_dec=t["W_dec"].bfloat16())),
    "norm forgotten": ("topk", lambda cfg, t: cfg.update(normalize_activations="layer_norm")),
    "encoder columns swapped": ("topk", lambda cfg, t: t.update(W_enc=t["W_enc"][:, [1, 0, *range(2, 48)]])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_saelens_folder_gets_no_certificate(toy, rows, tmp_path, monkeypatch, fault):
    """Faults as careless converters make them, put into what our writer writes: sae_lens then computes something else, and that is seen."""
    from saehub_saelens import mapping

    architecture, change = FAULTS[fault]
    honest = mapping.to_saelens

    def careless(sae: SAE):
        foreign = honest(sae)
        change(foreign.config, foreign.tensors)
        return foreign

    v1.save(toy(architecture), tmp_path / "a")
    monkeypatch.setattr("saehub_saelens.codec.to_saelens", careless)
    with pytest.raises(Refused):
        convert(tmp_path / "a", tmp_path / "b", "saelens", invoke=in_process)
    assert not (tmp_path / "b").exists()


def test_certified_in_a_worker(toy, rows, tmp_path):
    """The default: sae_lens is imported in a process of its own, with float32 thresholds beside bf16 weights."""
    sae = toy("jumprelu", dtype=torch.bfloat16)
    sae = SAE.build(sae.config, sae.tensors() | {"threshold": sae.threshold.float() + 2.0**-10})
    v1.save(sae, tmp_path / "a", probe=make_probe(sae, rows))
    certificate = convert(tmp_path / "a", tmp_path / "b", "saelens")
    assert certificate.passed and not certificate.changed and certificate.low_precision["dtype"] == "bfloat16"
    assert 1e-4 < certificate.low_precision["frobenius"] < 0.1
    assert "sae-lens" in certificate.target["versions"]
