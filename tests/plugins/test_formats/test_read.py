"""Every published layout is recognised by one exporter, read bit for bit, and computes what its publication says."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import saehub
from saehub.checkpoint.load import codec, exporters, find_format
from saehub.errors import CheckFailed, FormatError

pytestmark = pytest.mark.quick


def test_one_exporter_knows_it(case):
    """Every registered exporter is asked, those of installed libraries included."""
    assert [address for address in exporters() if codec(address)[1].sniff(case.path)] == [case.address]
    assert find_format(case.path) == case.address


def test_tensors_config_site_and_origin(case):
    sae = codec(case.address)[1].read(case.path)
    stored = {name: tensor.numpy() for name, tensor in sae.tensors().items()}
    for name, array in case.stored.items():
        assert stored[name].dtype == array.dtype and np.array_equal(stored[name], array), name
    assert (sae.config.architecture, sae.config.kind) == (case.architecture, case.kind)
    said = sae.provenance
    assert (said.get("site"), said.get("target_site"), said.get("unknown_site")) == (case.site, case.target, case.unknown)
    assert case.origin.items() <= said["origin"]["config"].items() and json.loads(json.dumps(said)) == said


@pytest.mark.parametrize("which", ["run", "float64", "float32"])
def test_features_are_those_of_the_publication(case, rows, which):
    """The exporter's own reference, and the SAE in both precisions, against the formula in numpy."""
    f_NF, y_ND = case.formula(rows.astype(np.float64))
    x_ND = torch.from_numpy(rows)
    instance = codec(case.address)[1]
    if which == "run":
        acts_NF, recon_ND = instance.run(case.path, x_ND)
        assert acts_NF.dtype == recon_ND.dtype == torch.float32
    else:
        sae, dtype = instance.read(case.path), getattr(torch, which)
        acts_NF = sae.encode(x_ND, dtype=dtype)
        recon_ND = sae.decode(acts_NF, like=x_ND, dtype=dtype)
    assert 0.02 < (f_NF != 0).mean() < 0.7  # the rows exercise it
    assert np.array_equal(acts_NF.numpy() != 0, f_NF != 0)
    assert np.allclose(acts_NF.numpy(), f_NF, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(recon_ND.numpy() - y_ND) / np.linalg.norm(y_ND) < 1e-6


def test_load_and_inspect(case, capsys):
    """From Python, and what the command line shows: format, equation and what is missing."""
    from saehub.cli.main import run

    assert saehub.load(case.path).config.architecture == case.architecture
    assert run(["inspect", str(case.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoint"]
    assert found["format"] == case.address and found["provenance"]["origin"]["format"] == case.address.partition("/")[2]
    assert any(line.startswith("site:") for line in found["missing"]) == (case.site is None) and found["bytes"] > 0


def test_a_certificate_says_by_equation_or_by_whom(plain_case, tmp_path):
    """Converted into the hub's own format and proved against the published equation's run."""
    from saehub.checkpoint.convert import convert

    certificate = convert(plain_case.path, tmp_path / "ours", "saehub")
    assert certificate.outcome.startswith("verified") and certificate.support["unexplained"] == 0
    assert certificate.source["format"] == plain_case.address and set(plain_case.stored) <= set(certificate.bit_exact)
    with pytest.raises(CheckFailed) as refused:
        convert(tmp_path / "ours", tmp_path / "again", "goodfire")
    assert "does not write it" in str(refused.value)


@pytest.mark.parametrize("name", ["qwen_scope", "circuit_tracer", "gemma_scope"])
def test_hub_ids_of_files_and_folders(layout, tmp_path, monkeypatch, name):
    """As huggingface_hub keeps a repository: links into a store of blobs. One file of several is fetched with the texts beside it."""
    import huggingface_hub

    case, commit = layout(name), "0123456789abcdef0123456789abcdef01234567"
    repository = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5" if name == "qwen_scope" else "org/gemma-scope-2b-pt-mlp"
    folder = "layer_7/width_16k/average_l0_71/" if name == "gemma_scope" else ""
    home = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    for number, file in enumerate(sorted((case.path if case.path.is_dir() else case.path.parent).iterdir())):
        link = home / "snapshots" / commit / folder / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        (home / "blobs").mkdir(exist_ok=True)
        file.rename(home / "blobs" / str(number))
        link.symlink_to(home / "blobs" / str(number))
    (home / "refs").mkdir()
    (home / "refs/main").write_text(commit)
    asked, real = {}, huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *a, **k: asked.update(k) or real(*a, **k, cache_dir=tmp_path / "hub", local_files_only=True),
    )
    text = f"hf://{repository}/{folder.rstrip('/') if case.path.is_dir() else case.path.name}"
    sae = saehub.load(text)
    assert (
        sae.config.architecture == case.architecture and sae.provenance["hub"]["commit"] == commit and sae.provenance["site"] == case.site
    )
    assert {"README.md", "config.yaml", case.path.name} <= set(asked["allow_patterns"]) or case.path.is_dir()


def test_folds_are_named(layout, tmp_path):
    """Dataset norms are folded on reading, and the certificate says so."""
    from saehub.checkpoint.convert import convert

    case = layout("llama_scope")
    folds = codec(case.address)[1].folds(case.path)
    assert any(line.startswith("b_enc times 3.1") for line in folds) and any("jump_relu_threshold" in line for line in folds)
    assert codec(case.address)[1].read(case.path).provenance["origin"]["folded"] == folds
    assert convert(case.path, tmp_path / "out", "saelens", verify=False).outcome == "unverified"


def test_a_folder_with_several_names_them(layout):
    for name in ("qwen_scope", "circuit_tracer"):
        case = layout(name)
        with pytest.raises(FormatError, match="one is read at a time") as error:
            codec(case.address)[1].read(case.path.parent)
        assert str(next(case.path.parent.glob("layer*3*" if name == "qwen_scope" else "layer_0*"))) in error.value.fix
        assert find_format(case.path.parent) == case.address


def test_half_precision_is_kept(layout, rows, tmp_path):
    """bf16 weights stay bf16; what must be folded becomes float32, or features would change."""
    from safetensors.torch import load_file, save_file

    for name in ("gemma_scope_2", "llama_scope", "circuit_tracer_skip"):
        case = layout(name)
        save_file({key: tensor.bfloat16() for key, tensor in load_file(case.weights).items()}, case.weights)
        instance = codec(case.address)[1]
        sae = instance.read(case.path)
        assert {sae.W_enc.dtype, sae.W_dec.dtype} == {torch.bfloat16}
        assert sae.b_enc.dtype == (torch.float32 if name == "llama_scope" else torch.bfloat16)
        acts_NF, recon_ND = instance.run(case.path, torch.from_numpy(rows))
        wide = sae.encode(torch.from_numpy(rows), dtype=torch.float64)
        assert torch.equal(wide != 0, acts_NF != 0) and torch.allclose(wide.float(), acts_NF, rtol=1e-5, atol=1e-6)


def test_unknown_things_are_flagged_not_guessed(layout):
    """No path to tell model and site from: neither is said."""
    case = layout("gemma_scope")
    moved = case.path.parents[3] / "elsewhere"
    case.path.rename(moved)
    said = codec(case.address)[1].read(moved).provenance
    assert set(said) == {"origin"}
    embedding = case.path.parents[2] / "embedding/width_4k/average_l0_6"
    embedding.parent.mkdir(parents=True)
    moved.rename(embedding)
    said = codec(case.address)[1].read(embedding).provenance
    assert said["unknown_site"] == "embedding" and "site" not in said and said["model"] == {"name": "google/gemma-2-2b"}


def test_the_plugin_is_light():
    code = "import sys, saehub_formats; print(len(saehub_formats.saehub_exporters()), [m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "7 []"
    code = "import sys, importlib; [importlib.import_module('saehub_formats.' + c.name) for c in __import__('saehub_formats').saehub_exporters()]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
