"""Faults injected into checkpoints, writers and libraries: each is caught by its detector and by no other; clean checkpoints raise no alarm."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from saehub.activations.taps import read
from saehub.api import ModelSpec
from saehub.checkpoint import format as v1
from saehub.checkpoint.convert import Refused, convert
from saehub.checkpoint.load import codec, load
from saehub.checkpoint.probe import make_probe
from saehub.checkpoint.sae import SAE
from saehub.checkpoint.verify import verify
from saehub.data.model import ModelHandle
from saehub.errors import FormatError, SaehubError
from saehub.sites import Site
from saehub.testing.saes import random_sae


def _faults():
    name = "saehub_conversion_faults"
    if name not in sys.modules:
        spec = spec_from_file_location(name, Path(__file__).with_name("faults.py"))
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


faults = _faults()
pytestmark = pytest.mark.filterwarnings("ignore:.*decoder rows have lengths")
D, F, K = 160, 320, 8
TRANSCODER = {"kind": "transcoder", "subtract_b_dec": False}
SKIP = {"kind": "skip_transcoder", "subtract_b_dec": False}
BASES = {
    "topk": ("topk", {"params": {"k": K}}),
    "square": ("topk", {"params": {"k": K}, "d_sae": D}),
    "jumprelu": ("jumprelu", {"subtract_b_dec": False}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka", {}),
    "abstopk": ("abstopk", {"params": {"k": K}}),
    "relu": ("relu", {}),
    "gated": ("gated", {}),
    "groupmax": ("groupmax", {"params": {"k": K}}),
    "matching_pursuit": ("matching_pursuit", {}),
    "constant norm": ("relu", {"norm_in": "constant_norm_rescale", "norm_out": "constant_norm_rescale"}),
    "decoder norms": ("jumprelu", {"decoder_norm_scaling": True}),
    "transcoder": ("jumprelu", TRANSCODER),
    "topk transcoder": ("topk", {"params": {"k": K}, **TRANSCODER}),
    "skip transcoder": ("topk", {"params": {"k": K}, **SKIP}),
    "skip relu": ("relu", SKIP),
    "dead latent": ("topk", {"params": {"k": K}}),
    "mlp_out": ("topk", {"params": {"k": K}}),
}
"""The clean SAEs, on activations of the embedded language model."""


@pytest.fixture(scope="session")
def model():
    return ModelHandle.load(ModelSpec("builtin/tiny-llama"))


@pytest.fixture(scope="session")
def rows(model):
    """80 real rows a site, with their tokens: {site: [80, D]}, token ids, positions, contexts."""
    ids = model.tokenizer("def read(path):\n    '''Return the text of a file.'''\n" * 40, add_special_tokens=False)["input_ids"]
    contexts = torch.tensor(ids[: 8 * 32]).reshape(8, 32)
    which, position = torch.arange(80) % 8, 2 + torch.arange(80) // 8 * 3
    sites = ("resid_post.1", "resid_mid.1", "mlp_out.1")
    found = read(model.hf, contexts, {site: Site.parse(site).tap(model.shape) for site in sites})
    return {site: found[site][which, position].detach() for site in sites}, contexts[which, position], position, contexts[which]


def make(base: str, rows, model, dtype: str = "float32") -> tuple[SAE, dict]:
    """A clean SAE in raw units of its site, and what its probe is made of."""
    architecture, fields = BASES[base]
    kind = fields.get("kind", "autoencoder")
    site, target = ("resid_mid.1", "mlp_out.1") if kind != "autoencoder" else ("mlp_out.1" if base == "mlp_out" else "resid_post.1", None)
    x_ND = rows[0][site]
    sae = random_sae(architecture, **{"d_in": D, "d_sae": F, **fields})
    if sae.config.norm_in == "none":
        sae = sae.scale_input(1 / float(x_ND.square().mean().sqrt()))
    if base == "dead latent":
        tensors = {name: tensor.clone() for name, tensor in sae.tensors().items()}
        tensors["b_enc"][7] = -1e4  # float16 ends at 65504
        sae = SAE.build(sae.config, tensors)
    if dtype == "mixed":
        sae = SAE.build(sae.config, {n: t.bfloat16() if t.ndim == 2 else t for n, t in sae.tensors().items()})
    elif dtype != "float32":
        sae = sae.astype(getattr(torch, dtype))
    about = {"name": "builtin/tiny-llama", "dtype": "float32", "attention": "sdpa", "fingerprint": model.fingerprint}
    sae.provenance = {"site": site, "model": about, **({"target_site": target} if target else {})}
    return sae, {"x_ND": x_ND, "token_ids": rows[1], "positions": rows[2], "contexts": rows[3], "target_ND": rows[0][target] if target else None}


@pytest.fixture(scope="module")
def clean(rows, model, tmp_path_factory):
    """`clean(base)`: a folder that is in order; copied by whoever damages it."""
    made: dict[tuple, Path] = {}

    def of(base: str, dtype: str = "float32") -> Path:
        if (base, dtype) not in made:
            sae, about = make(base, rows, model, dtype)
            made[base, dtype] = v1.save(sae, tmp_path_factory.mktemp("clean") / "sae", probe=make_probe(sae, **about))
        return made[base, dtype]

    return of


@pytest.fixture(scope="module")
def converted(clean, invoke, tmp_path_factory):
    """`converted(base, format)`: a right conversion, with its original; copied by whoever damages it."""
    made: dict[tuple, Path] = {}

    def of(base: str, format: str) -> Path:
        if (base, format) not in made:
            made[base, format] = tmp_path_factory.mktemp("converted") / "sae"
            assert convert(clean(base), made[base, format], format, invoke=invoke, keep_original=True).passed
        return made[base, format]

    return of


def detected(report) -> dict[str, str]:
    """Detector -> what it said, of every check that did not pass."""
    found = {}
    for check in report.checks:
        if check.status in ("failed", "inconclusive"):
            by_hash = any(words in check.detail for words in ("that was saved", "was changed after", "were changed after", "does not follow from"))
            by_name = {"probe replay": faults.REPLAY, "site": faults.SITE, "target site": faults.SITE, "model": faults.SITE}
            detector = by_name.get(check.name, faults.HASH if by_hash else faults.SCHEMA)
            found[detector] = f"{found.get(detector, '')} {check.detail} {check.fix or ''}".strip()
    return found


# ---------------------------------------------------------------------- the hub's own folder
@pytest.mark.parametrize("name", faults.CHECKPOINT)
def test_verify_catches(name, clean, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fault = faults.CHECKPOINT[name]
    shutil.copytree(clean(fault.base), tmp_path / "sae")
    fault.inject(tmp_path / "sae")
    found = detected(verify(tmp_path / "sae", model))
    assert set(found) == {fault.detector}, found
    assert fault.words in found[fault.detector], found
    assert not (tmp_path / "trapped").exists()
    if fault.detector in (faults.HASH, faults.SCHEMA) and "probe" not in name:  # nor can it be used
        with pytest.raises(FormatError) as error:
            load(tmp_path / "sae")
        assert error.value.fix
        with pytest.raises(FormatError):
            convert(tmp_path / "sae", tmp_path / "out", "saehub")
        assert not (tmp_path / "out").exists()


def test_a_huge_shape_takes_no_memory(clean, tmp_path):
    from saehub.pipeline.environment import peak_resident

    names = [name for name in faults.CHECKPOINT if "huge" in name or "2^60" in name]
    for number, name in enumerate(names):
        shutil.copytree(clean("jumprelu"), tmp_path / str(number))
        faults.CHECKPOINT[name].inject(tmp_path / str(number))
    if Path("/proc/self/clear_refs").exists():  # Linux: forget the peak of earlier tests
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident()
    assert len(names) == 3 and not any(verify(tmp_path / str(number)).ok for number in range(3))
    assert peak_resident() - before < 64 << 20


# ---------------------------------------------------------------------- writers and libraries
@pytest.mark.parametrize("name", faults.WRITER)
def test_convert_catches_a_writer(name, clean, converted, invoke, tmp_path, monkeypatch):
    fault = faults.WRITER[name]
    assert converted(fault.base, fault.format)  # the writer as it is
    cls = type(codec(fault.format)[1])
    write = cls.write

    def wrong(self, sae, path):
        notes = write(self, sae, path)
        fault.inject(path)
        return notes

    monkeypatch.setattr(cls, "write", wrong)
    check_refused(fault, clean, tmp_path, invoke)


@pytest.mark.parametrize("name", faults.LOADER)
def test_convert_catches_a_library(name, clean, invoke, tmp_path):
    fault = faults.LOADER[name]

    def wrong(registered, config, method, *, path, x_ND):
        shutil.copytree(path, tmp_path / "as-loaded")
        fault.inject(tmp_path / "as-loaded")
        return invoke(registered, config, method, path=tmp_path / "as-loaded", x_ND=x_ND)

    check_refused(fault, clean, tmp_path, wrong)


def check_refused(fault, clean, tmp_path, invoke):
    with pytest.raises(Refused) as error:
        convert(clean(fault.base), tmp_path / "out", fault.format, invoke=invoke)
    certificate = error.value.certificate
    assert error.value.exit_code == 1 and certificate.outcome == "refused" and error.value.fix
    assert fault.words in error.value.why, error.value.why
    detector = faults.RUN if certificate.rows else faults.TENSORS  # libraries run only when what was written is what was meant
    assert detector == fault.detector, error.value.why
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# ---------------------------------------------------------------------- foreign folders
@pytest.mark.parametrize("name", faults.FOREIGN)
def test_a_foreign_folder_is_refused(name, clean, invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fault = faults.FOREIGN[name]
    folder = tmp_path / "a/b/sae"
    codec(fault.format)[1].write(load(clean(fault.base)), folder)
    assert verify(folder).ok
    fault.inject(folder)
    with pytest.raises(FormatError) as error:
        load(folder, format=fault.format)
    said = str(error.value)
    assert fault.words in said and str(folder) in said and error.value.fix, said
    report = verify(folder)
    assert set(detected(report)) == {fault.detector} and not report.ok
    with pytest.raises(FormatError):
        convert(folder, tmp_path / "out", "saehub", from_=fault.format, invoke=invoke)
    assert not (tmp_path / "out").exists() and not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", faults.CONVERTED)
def test_a_certificate_speaks_of_what_it_saw(name, converted, invoke, tmp_path):
    fault = faults.CONVERTED[name]
    shutil.copytree(converted(fault.base, fault.format), tmp_path / "out")
    assert verify(tmp_path / "out").ok
    fault.inject(tmp_path / "out")
    found = detected(verify(tmp_path / "out"))
    assert set(found) == {fault.detector} and fault.words in found[fault.detector], found
    with pytest.raises(FormatError, match="was changed after its conversion"):  # nor is the original taken for it
        convert(tmp_path / "out", tmp_path / "back", "saehub", invoke=invoke)


# ---------------------------------------------------------------------- no false alarms
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
def test_clean_checkpoints_pass(dtype, threads, clean, model, tmp_path):
    torch.set_num_threads(threads)
    for base in BASES:
        report = verify(clean(base, dtype), model)
        assert not detected(report) and report.ok, f"{base}: {report}"
        status = {check.name: check.status for check in report.checks}
        assert status["probe replay"] == status["site"] == "ok", base
        if "transcoder" in base or "skip" in base:
            assert status["target site"] == "ok"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed"])
def test_clean_conversions_pass(dtype, threads, clean, invoke, tmp_path):
    torch.set_num_threads(threads)
    for base, target in (("jumprelu", "saelens"), ("decoder norms", "saelens"), ("topk", "sparsify"), ("skip transcoder", "sparsify"), ("gated", "dictionary_learning"), ("batchtopk", "dictionary_learning"), ("jumprelu", "gemma_scope"), ("skip relu", "circuit_tracer")):  # fmt: skip
        certificate = convert(clean(base, dtype), tmp_path / f"{base}-{target}", target, invoke=invoke)
        assert certificate.passed and certificate.support["unexplained"] == 0, str(certificate)
        assert verify(tmp_path / f"{base}-{target}").ok


# ---------------------------------------------------------------------- nothing passes vacuously
@pytest.mark.parametrize(("asleep", "good"), [(80, False), (9, False), (8, True), (0, True)])
def test_a_probe_that_sleeps_proves_nothing(rows, model, tmp_path, asleep, good):
    """Of 80 rows, 72 must be active."""
    sae, about = make("jumprelu", rows, model)
    x_ND = about["x_ND"].clone()
    x_ND[:asleep] = 0  # p = b_enc, far under every threshold
    sae.b_enc.fill_(-1e-3)
    probe = make_probe(sae, x_ND)
    assert probe.active_rows == 80 - asleep
    v1.save(sae, tmp_path / "sae", probe=probe)
    report = {check.name: check.status for check in verify(tmp_path / "sae").checks}
    assert report["probe replay"] == ("ok" if good else "inconclusive") and verify(tmp_path / "sae").ok == good


@pytest.mark.parametrize("target", ["saelens", "dictionary_learning", "gemma_scope", "saehub"])
def test_a_dictionary_that_sleeps_is_inconclusive(rows, model, invoke, tmp_path, target):
    sae, _ = make("jumprelu", rows, model)
    sae.threshold.fill_(float("inf"))
    v1.save(sae, tmp_path / "sae")
    certificate = convert(tmp_path / "sae", tmp_path / "out", target, invoke=invoke)
    assert certificate.outcome == "inconclusive" and not certificate.passed and "--model" in certificate.reason
    if target != "saehub":
        assert not verify(tmp_path / "out").ok


def test_a_conversion_nobody_ran_is_no_proof(clean, tmp_path):
    certificate = convert(clean("topk"), tmp_path / "out", "saelens", verify=False)
    assert certificate.outcome == "unverified" and not certificate.passed
    assert not verify(tmp_path / "out").ok  # inconclusive: the certificate proves nothing


def test_at_least_twenty_five_faults_and_every_detector():
    listed = [fault for group in faults.ALL.values() for fault in group.values()]
    assert len(listed) >= 25 and {fault.detector for fault in listed} == set(faults.DETECTORS)
    assert issubclass(FormatError, SaehubError)


def test_the_table_in_the_readme_is_this_one(matrix):
    assert matrix.committed(matrix.FAULTS_START, matrix.FAULTS_END) == faults.table(), "python tests/conversion/matrix.py --faults"
