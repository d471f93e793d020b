"""Names of tensors through conversions: translated by the table, carried as they are where it has no word, and never turned into resid_post."""

from __future__ import annotations

import json

import pytest
import yaml

from saehub.checkpoint.convert import convert
from saehub.checkpoint.inspect import inspect
from saehub.checkpoint.load import load

pytestmark = pytest.mark.quick
LENS = {
    "resid_pre.1": "blocks.1.hook_resid_pre", "resid_mid.1": "blocks.1.hook_resid_mid", "resid_post.1": "blocks.1.hook_resid_post",
    "attn_z.1": "blocks.1.attn.hook_z", "attn_out.1": "blocks.1.hook_attn_out", "mlp_in.1": "blocks.1.mlp.hook_in",
    "mlp_act.1": "blocks.1.mlp.hook_post", "mlp_out.1": "blocks.1.hook_mlp_out", "embed": "hook_embed",
}  # fmt: skip
"""Every kind of site, and TransformerLens' name for it (its documentation)."""
MODULES = {"model.layers.1:out": "resid_post.1", "model.layers.1.mlp.down_proj:in": "mlp_act.1", "model.layers.1.mlp.gate_proj:out": None}
"""Modules, and the kind of site that they are."""
UNKNOWN = "blocks.3.attn.hook_result"
"""A real hook that no module of a Hugging Face model holds."""


def again(path, out, format):
    return convert(path, out, format, verify=False)


def write(matrix, folder, name, **provenance):
    sae = matrix.subjects()[name]
    kept, sae.provenance = sae.provenance, {**matrix.MODEL, **provenance}
    try:
        return matrix.write(sae, "saehub", folder)
    finally:
        sae.provenance = kept


@pytest.mark.parametrize("site", [*LENS, *MODULES])
def test_every_site_through_every_format(matrix, tmp_path, site):
    """Back in saehub it is the same tensor, by one of its names."""
    source = write(matrix, tmp_path / "source", "topk", site=site)
    jump = write(matrix, tmp_path / "jump", "jumprelu", site=site)
    same = {site, MODULES.get(site)} - {None}
    for target in matrix.writable():
        path = jump if target == "gemma_scope" else source
        if target in ("saehub", "circuit_tracer"):
            continue
        there = again(path, tmp_path / target, target)
        again(tmp_path / target, tmp_path / f"{target}-back", "saehub")
        assert load(tmp_path / f"{target}-back").provenance["site"] in same, target
        assert not there.dropped
        matrix.STRIP[target](tmp_path / target)  # as the library itself would hand it on
        assert load(tmp_path / target).provenance.get("site") in {*same, None}, target
    if site in LENS:
        assert json.loads((tmp_path / "saelens/cfg.json").read_text())["metadata"]["hook_name"] == LENS[site]
        assert load(tmp_path / "saelens").provenance["site"] == site  # the hook name says it, not the side channel


def test_a_module_of_an_unknown_model_is_not_translated(matrix, tmp_path):
    """`post_attention_layernorm:out` is mlp_in in Llama and attn_out in Gemma 2: without the model's config nobody knows."""
    site = "model.layers.1.post_attention_layernorm:out"
    source = write(matrix, tmp_path / "source", "topk", site=site, model={"name": "google/gemma-2-2b"})
    for target in ("saelens", "sparsify", "dictionary_learning"):
        again(source, tmp_path / target, target)
        assert load(tmp_path / target).provenance["site"] == site, target
    assert json.loads((tmp_path / "saelens/cfg.json").read_text())["metadata"]["hook_name"] == site
    known = write(matrix, tmp_path / "known", "topk", site=site)  # a Llama
    again(known, tmp_path / "known-saelens", "saelens")
    assert load(tmp_path / "known-saelens").provenance["site"] == "mlp_in.1"


def test_both_sites_of_a_transcoder(matrix, tmp_path):
    source = write(matrix, tmp_path / "source", "jumprelu, transcoder", site="resid_mid.2", target_site="mlp_out.2")
    for target in ("saelens", "circuit_tracer", "gemma_scope"):
        again(source, tmp_path / target, target)
        again(tmp_path / target, tmp_path / f"{target}-back", "saehub")
        found = load(tmp_path / f"{target}-back").provenance
        assert (found["site"], found["target_site"]) == ("resid_mid.2", "mlp_out.2"), target
    metadata = json.loads((tmp_path / "saelens/cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == ("blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out")
    config = yaml.safe_load((tmp_path / "circuit_tracer/config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("hook_resid_mid", "hook_mlp_out")
    assert (tmp_path / "circuit_tracer/layer_2.safetensors").is_file()


def test_an_unknown_name_is_carried_and_flagged(matrix, tmp_path):
    source = write(matrix, tmp_path / "source", "topk", site="resid_post.1")
    again(source, tmp_path / "lens", "saelens")
    cfg = json.loads((tmp_path / "lens/cfg.json").read_text())
    cfg["metadata"] = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": UNKNOWN}
    (tmp_path / "lens/cfg.json").write_text(json.dumps(cfg))
    (tmp_path / "lens/conversion.json").unlink()
    path = tmp_path / "lens"
    for step, target in enumerate(("saehub", "sparsify", "dictionary_learning", "saelens", "saehub")):
        again(path, tmp_path / str(step), target)
        path = tmp_path / str(step)
        found = load(path).provenance
        assert found["unknown_site"] == UNKNOWN and "site" not in found, target
        assert any(line.startswith("site:") for line in inspect(path)["missing"]), target
    assert json.loads((tmp_path / "3/cfg.json").read_text())["metadata"]["hook_name"] == UNKNOWN


def test_no_site_stays_no_site(matrix, tmp_path):
    """In a folder that is called as if it were one, too."""
    source = write(matrix, tmp_path / "source", "topk")
    for target in ("saelens", "dictionary_learning"):
        again(source, tmp_path / target / "layers.3", target)
        assert "site" not in load(tmp_path / target / "layers.3").provenance, target


def test_a_site_that_the_format_cannot_say_is_named(matrix, tmp_path):
    """A sparsify folder keeps its site in its own name: what it is written back as has none."""
    source = write(matrix, tmp_path / "source", "topk", site="resid_post.1")
    again(source, tmp_path / "first", "sparsify")
    matrix.STRIP["sparsify"](tmp_path / "first")
    (tmp_path / "first/conversion.json").unlink()
    (tmp_path / "first").rename(tmp_path / "layers.4")
    certificate = again(tmp_path / "layers.4", tmp_path / "out", "sparsify")
    site = load(tmp_path / "layers.4").provenance["site"]
    assert load(tmp_path / "out").provenance.get("site") == site or f"site {site}" in certificate.dropped
