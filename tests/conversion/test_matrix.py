"""Every architecture between every ordered pair of formats: verified, or refused with a reason; and back again, exactly or within the rounding of a fold."""

from __future__ import annotations

import json
import sys
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from saehub.checkpoint.convert import convert
from saehub.checkpoint.load import load
from saehub.checkpoint.sae import SAE
from saehub.testing.saes import rows_for



def _matrix():
    """The module, under the name that conftest.py gives it: its lists are the tests' parameters."""
    name = "saehub_conversion_matrix"
    if name not in sys.modules:
        spec = spec_from_file_location(name, Path(__file__).with_name("matrix.py"))
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


SUBJECTS, LAYOUTS = list(_matrix().subjects()), list(_matrix().layouts())
U = 2.0**-24


@pytest.fixture(scope="module")
def cells(matrix, invoke, tmp_path_factory):
    """`cells(name)`: the conversions of a subject or a published layout, made once."""
    made: dict[str, list] = {}

    def of(name: str) -> list:
        if name not in made:
            make = matrix.convert_subject if name in matrix.subjects() else matrix.convert_layout
            made[name] = make(name, tmp_path_factory.mktemp("cells") / "all", invoke)
        return made[name]

    return of


def again(path: Path, out: Path, format: str, **settings):
    """A conversion whose libraries need not run: its tensors are compared here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(path, out, format, **{"verify": False, **settings})


def read(path: Path) -> SAE:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(path)


def raw(format: str, folder: Path) -> tuple[dict[str, torch.Tensor], object]:
    """Tensors and config as they stand in the files, by the containers' own readers."""
    if format == "saehub":
        header = json.loads((folder / "saehub.json").read_text())
        return load_file(folder / "sae.safetensors"), {k: header[k] for k in ("architecture", "params", "kind", "provenance", "tensors")}
    if format == "saelens":
        return load_file(folder / "sae_weights.safetensors"), json.loads((folder / "cfg.json").read_text())
    if format == "sparsify":
        return load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())
    if format == "dictionary_learning":
        return torch.load(folder / "ae.pt", weights_only=True), json.loads((folder / "config.json").read_text())
    if format == "gemma_scope":
        return {name: torch.from_numpy(array) for name, array in np.load(folder / "params.npz", allow_pickle=False).items()}, None
    if format == "circuit_tracer":
        return load_file(folder / "layer_1.safetensors"), yaml.safe_load((folder / "config.yaml").read_text())
    raise AssertionError(f"how are {format}'s files read?")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)


# ---------------------------------------------------------------------- outcomes
@pytest.mark.parametrize("name", [*SUBJECTS, *LAYOUTS])
def test_every_cell_has_an_outcome(matrix, cells, name):
    """Under the numbers that a certificate promises; a refusal says why and names a format that can."""
    assert cells(name)
    for cell in cells(name):
        where = f"{name}: {cell.source} -> {cell.target}: {cell.outcome}: {cell.reason}"
        if cell.outcome == matrix.REFUSED:
            assert cell.reason and cell.fix.startswith("formats that can: saehub") and cell.path is None, where
            assert cell.target not in {matrix.short(word) for word in cell.fix.partition(": ")[2].split(", ")}, where
            continue
        assert cell.outcome in (matrix.LIBRARY, matrix.EQUATION), where
        c = cell.certificate
        assert c.passed and c.support["unexplained"] == 0 and c.active_share >= 0.9 and c.latents_exercised > 0.3, where
        assert c.reconstruction["frobenius"] <= 1e-6 and c.reconstruction["worst_row"] <= 1e-5 and c.rows >= 256, where
        assert not c.changed or c.folded, f"{where}: {c.changed} changed, and nothing says why"
        assert json.loads((cell.path / "conversion.json").read_text())["passed"], where
        # the word "library" is only used where one ran
        assert (cell.outcome == matrix.LIBRARY) == (cell.target == "saehub" or bool(c.target["versions"].keys() - {"saehub"})), where


def test_sources_are_what_they_are_called(matrix, cells):
    """Each format is a source of its own kind of folder, and nearly every format reads every architecture that it has."""
    sources = {(cell.source, cell.subject) for name in SUBJECTS for cell in cells(name)}
    assert {source for source, _ in sources} == set(matrix.writable())
    for format, architectures in {
        "saelens": ("relu", "topk", "abstopk", "batchtopk", "matryoshka", "jumprelu", "gated", "matching_pursuit"),
        "sparsify": ("topk", "groupmax"),
        "dictionary_learning": ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated"),
        "gemma_scope": ("jumprelu",),
        "circuit_tracer": ("relu, transcoder", "jumprelu, skip transcoder"),
    }.items():
        assert all((format, name) in sources for name in architectures), format


# ---------------------------------------------------------------------- back again
@pytest.mark.parametrize("name", SUBJECTS)
def test_through_saehub_and_back_is_exact(matrix, cells, name, tmp_path):
    for cell in cells(name):
        if cell.target == "saehub" and cell.path:
            again(cell.path, tmp_path / cell.source, cell.source)
            (was, config), (now, config_now) = raw(cell.source, cell.source_path), raw(cell.source, tmp_path / cell.source)
            assert same_bits(was, now) and config == config_now, f"{name}, {cell.source}"


@pytest.mark.parametrize("name", SUBJECTS)
def test_there_and_back(matrix, cells, equations, name, tmp_path):
    """Exact where the target's tensors are the source's; else the fold is undone within 2 ulp of products and 2 u (|b| + |c|) of sums."""
    for cell in cells(name):
        if not cell.path or cell.target == "saehub":
            continue
        where = f"{name}: {cell.source} -> {cell.target} -> {cell.source}"
        out = tmp_path / f"{cell.source}-{cell.target}"
        again(cell.path, out, cell.source)
        was, now = read(cell.source_path), read(out)
        if not cell.folded:
            assert was.config == now.config and same_bits(was.tensors(), now.tensors()), where
            assert same_bits(raw(cell.source, cell.source_path)[0], raw(cell.source, out)[0]), where
            continue
        a, b = (equations.canonical(sae.config, sae.tensors()) for sae in (was, now))
        assert a.keys() - {"threshold"} == b.keys() - {"threshold"}, where
        c = np.abs(was.b_dec.double().numpy()) @ np.abs(was.W_enc.double().numpy())
        if was.config.decoder_norm_scaling:
            c = c * np.linalg.norm(was.W_dec.double().numpy(), axis=1)
        if "r_mag" in a:
            c = c * np.maximum(1, np.exp(a["r_mag"]))
        for key in a.keys() & b.keys():
            allowed = 2 * np.spacing(np.abs(a[key]).astype(np.float32)).astype(np.float64)
            if key in ("b_enc", "b_gate", "b_mag"):
                allowed = allowed + 2 * U * (np.abs(a[key]) + c)
            assert (np.abs(a[key] - b[key]) <= allowed).all(), f"{where}: {key}"


@pytest.mark.parametrize(("name", "source", "target"), [("topk, decoder norms", "saelens", "sparsify"), ("relu", "dictionary_learning", "gemma_scope"), ("gated, b_dec not subtracted", "saelens", "dictionary_learning"), ("jumprelu, transcoder, decoder norms", "saehub", "circuit_tracer")])
def test_the_original_beside_is_an_exact_way_back(matrix, invoke, tmp_path, name, source, target):
    path = matrix.write(matrix.subjects()[name], source, tmp_path / "source")
    there = again(path, tmp_path / "there", target, keep_original=True, verify=True, invoke=invoke)
    assert there.passed and there.changed and there.exact_way_back
    again(tmp_path / "there", tmp_path / "back", source)
    (was, config), (now, config_now) = raw(source, path), raw(source, tmp_path / "back")
    assert same_bits(was, now) and config == config_now


# ---------------------------------------------------------------------- equations
@pytest.mark.parametrize("name", SUBJECTS)
def test_the_hub_computes_the_equation(matrix, equations, name):
    """What "library" means where the target is the hub's own format."""
    sae = matrix.subjects()[name]
    x = rows_for(sae, 128).double()
    x = x if sae.row_wise else x.reshape(8, 16, -1)
    with torch.no_grad():
        f, y = (part.flatten(0, -2) for part in (sae.encode(x, dtype=torch.float64), sae(x, dtype=torch.float64)))
    expected_f, expected_y = equations.run(sae.config, sae.tensors(), x.numpy())
    assert np.array_equal(f.numpy() != 0, expected_f != 0) and np.abs(f.numpy() - expected_f).max() < 1e-12
    assert np.abs(y.numpy() - expected_y).max() < 1e-11


def published(format: str, folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the formats without a library: their equation, from the stored arrays alone."""
    stored = {name: tensor.double().numpy() for name, tensor in raw(format, folder)[0].items()}
    if format == "gemma_scope":
        p = x @ stored["W_enc"] + stored["b_enc"]
        f = np.maximum(p, 0) * (p > stored["threshold"])
        return f, f @ stored["W_dec"] + stored["b_dec"]
    theta = stored.get("activation_function.threshold")
    p = x @ stored["W_enc"].T + stored["b_enc"]
    f = np.maximum(p, 0) if theta is None else p * (p > theta)
    return f, f @ stored["W_dec"] + stored["b_dec"] + (x @ stored["W_skip"].T if "W_skip" in stored else 0)


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_published_equation_of_what_was_written(matrix, cells, equations, name):
    for cell in cells(name):
        if cell.outcome != matrix.EQUATION:
            continue
        source = read(cell.source_path)
        x = rows_for(source, 256, seed=7).double().numpy()
        (f, y), (f2, y2) = equations.run(source.config, source.tensors(), x), published(cell.target, cell.path, x)
        a = equations.canonical(source.config, source.tensors())
        c = np.abs(a["b_dec"]) @ np.abs(a["W_enc"]) if source.config.subtract_b_dec else 0
        near = np.abs(x @ a["W_enc"] + a["b_enc"] - a.get("threshold", 0)) <= 8 * U * (np.abs(x) @ np.abs(a["W_enc"]) + np.abs(a["b_enc"]) + c)
        differ = (f != 0) != (f2 != 0)
        assert not (differ & ~near).any() and (f != 0).any(1).mean() > 0.9, f"{name}: {cell.source} -> {cell.target}"
        kept = ~differ.any(1)
        gap = np.linalg.norm((y - y2)[kept], axis=1)
        assert np.linalg.norm(gap) <= 1e-6 * np.linalg.norm(y[kept]) and (gap <= 1e-5 * np.linalg.norm(y[kept], axis=1)).all()


# ---------------------------------------------------------------------- dtypes
MIXTURES = {
    "bfloat16": {"": torch.bfloat16},
    "float16": {"": torch.float16},
    "float32": {"": torch.float32},
    "bfloat16, float32 threshold and biases": {"": torch.bfloat16, "threshold": torch.float32, "b_enc": torch.float32, "b_dec": torch.float32},
    "float32, bfloat16 decoder": {"": torch.float32, "W_dec": torch.bfloat16},
}
STORES_ALL = ("saehub", "saelens", "dictionary_learning", "circuit_tracer")
"""Formats that keep any mixture in their files; Gemma Scope's has no bfloat16, Sparsify's loader casts all to one."""


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", ["topk", "jumprelu, b_dec not subtracted", "jumprelu, transcoder"])
def test_dtypes_survive(matrix, invoke, tmp_path, name, mixture):
    dtypes, base = MIXTURES[mixture], matrix.subjects()[name]
    cast = {key: tensor.to(dtypes.get(key, dtypes[""])) for key, tensor in base.tensors().items()}
    sae, converted = SAE.build(base.config, cast, base.provenance), 0
    origin = matrix.write(sae, "saehub", tmp_path / "saehub")
    for target in matrix.writable():
        cell = matrix.try_convert(name, "saehub", target, origin, tmp_path / f"there-{target}", invoke)
        if cell.outcome == matrix.REFUSED or target == "saehub":
            continue
        where = f"{name}, {mixture} -> {target}: {cell.outcome}: {cell.reason}"
        assert cell.outcome in (matrix.LIBRARY, matrix.EQUATION) and not cell.certificate.changed, where
        again(cell.path, tmp_path / f"back-{target}", "saehub")
        assert same_bits(read(tmp_path / f"back-{target}").tensors(), sae.tensors()), where
        stored = raw(target, cell.path)[0]
        if target in STORES_ALL:
            assert {t.dtype for t in stored.values() if t.is_floating_point() and t.ndim} == set(t.dtype for t in cast.values()), where
        if cast.get("threshold", torch.zeros(())).dtype == torch.float32 and "threshold" in cast:
            theta = next(t for key, t in stored.items() if key.endswith("threshold"))
            assert theta.dtype == torch.float32 and torch.equal(theta, cast["threshold"]), where
        assert "float16" not in mixture or cell.certificate.low_precision["dtype"], where
        converted += 1
    assert converted >= 2


# ---------------------------------------------------------------------- the table
def test_the_table_in_the_readme_is_this_one(matrix, cells):
    made = matrix.table([cell for name in [*SUBJECTS, *LAYOUTS] for cell in cells(name)])
    assert matrix.committed(matrix.START, matrix.END) == made, "python tests/conversion/matrix.py --write"
