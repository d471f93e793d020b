"""Honest toys and one liar for every promise in; proof that each suite passes the first and catches the second, by name, out."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from saehub.api import Measurement
from saehub.errors import CheckFailed, SaehubError, UsageError
from saehub.testing import ConformanceReport, check_exporter, check_extractor, check_trainer
from saehub.testing import components as toys
from saehub.testing.settings import ToyExtract, ToyTrain

SMALL = ToyTrain(latents=80, batch=128)


def broken(report: ConformanceReport) -> set[str]:
    """Names of the broken promises."""
    return {check.name for check in report.failures}


# ---------------------------------------------------------------------- trainers
def test_the_toy_trainer_passes():
    check_trainer((toys.ToyTrainer, SMALL), refuses=[{"k": 1000}]).raise_if_failed()


def trainer(training: type | None = None, check=None, **settings):
    """A liar: the toy trainer with another session class, or another `check`."""

    class Config(ToyTrain):
        pass

    Config.__module__ = __name__
    if check is not None:
        Config.check = check

    class Liar(toys.ToyTrainer):
        def open(self, job, calibration):
            if training is None:
                return super().open(job, calibration)
            problems = list(self.config.check(job))
            if problems:
                raise UsageError(problems[0])
            return training(self.config, job, calibration)

    return Liar, replace(Config(latents=80, batch=128), **settings)


class GlobalNoise(toys.ToyTraining):
    def step(self, x_BD, y_BD=None):
        super().step(x_BD, y_BD)
        self.parameters[0].data += 1e-6 * torch.randn_like(self.parameters[0])


class SharedCounter(toys.ToyTraining):
    seen = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        SharedCounter.seen = 0

    def step(self, x_BD, y_BD=None):
        SharedCounter.seen += 1  # all jobs count together
        super().step(x_BD * (1 + 1e-3 * (SharedCounter.seen % 2)), y_BD)


class ForgetsMoments(toys.ToyTraining):
    def state(self):
        tensors, data = super().state()
        return {name: tensor for name, tensor in tensors.items() if "exp_avg" not in name and "step" not in name}, data


class TupleState(toys.ToyTraining):
    def state(self):
        tensors, data = super().state()
        return tensors, {**data, "rng": torch.get_rng_state()}


class CentresInPlace(toys.ToyTraining):
    def step(self, x_BD, y_BD=None):
        x_BD -= x_BD.mean(0)
        super().step(x_BD, y_BD)


class KeepsTheBatch(toys.ToyTraining):
    late = None

    def step(self, x_BD, y_BD=None):
        super().step(x_BD if self.late is None else self.late, y_BD)
        self.late = x_BD


class SpendsCalibration(toys.ToyTraining):
    def __init__(self, config, job, calibration):
        super().__init__(config, job, calibration)
        calibration(64)[0].mul_(0.0)


class SeedsTheWorld(toys.ToyTraining):
    def step(self, x_BD, y_BD=None):
        random.seed(0)
        super().step(x_BD, y_BD)


class TurnsGradientsOff(toys.ToyTraining):
    def finish(self):
        torch.set_grad_enabled(False)
        return super().finish()


class WantsGradients(toys.ToyTraining):
    def step(self, x_BD, y_BD=None):
        if torch.is_grad_enabled():
            super().step(x_BD, y_BD)


class NoLoss(toys.ToyTraining):
    def metrics(self):
        return {"fvu": 0.1}


class NotANumber(toys.ToyTraining):
    def metrics(self):
        return {"loss": float("nan")}


class DoublePrecision(toys.ToyTraining):
    def finish(self):
        return super().finish().astype(torch.float64)


class OtherWidth(toys.ToyTraining):
    def finish(self):
        from saehub.checkpoint.sae import SAE

        sae = super().finish()
        tensors = {"W_enc": sae.W_enc[:, :72], "b_enc": sae.b_enc[:72], "W_dec": sae.W_dec[:72], "b_dec": sae.b_dec}
        return SAE.build(sae.config.replace(d_sae=72), tensors)


class NeverLearns(toys.ToyTraining):
    def step(self, x_BD, y_BD=None):
        super().step(torch.zeros_like(x_BD), y_BD)


class OtherUnits(toys.ToyTraining):
    def finish(self):
        sae = super().finish()
        return sae.build(sae.config, sae.tensors() | {"W_dec": 3 * sae.W_dec})


class IgnoresInit(toys.ToyTraining):
    def __init__(self, config, job, calibration):
        super().__init__(config, replace(job, init_from=None), calibration)


def says_yes(self, job):
    return ()


def nearly_yes(self, job):
    return [] if self.k <= 80 else ["k is too large"]


TRAINERS = {
    "global random numbers": ("same job, same bytes", trainer(GlobalNoise)),
    "class state": ("jobs side by side as alone", trainer(SharedCounter)),
    "optimizer state lost": ("save and restore", trainer(ForgetsMoments)),
    "state that is not JSON": ("save and restore", trainer(TupleState)),
    "inputs changed": ("inputs untouched", trainer(CentresInPlace)),
    "inputs kept": ("inputs untouched", trainer(KeepsTheBatch)),
    "calibration changed": ("inputs untouched", trainer(SpendsCalibration)),
    "world seeded": ("surroundings untouched", trainer(SeedsTheWorld)),
    "gradients switched off": ("surroundings untouched", trainer(TurnsGradientsOff)),
    "needs the caller's gradient mode": ("surroundings untouched", trainer(WantsGradients)),
    "no loss": ("metrics", trainer(NoLoss)),
    "loss is NaN": ("metrics", trainer(NotANumber)),
    "float64": ("a valid SAE", trainer(DoublePrecision)),
    "another width than said": ("a valid SAE", trainer(OtherWidth)),
    "transcoder promised, not trained": ("transcoders done or refused", trainer(check=nearly_yes)),
    "accepts everything": ("impossible jobs refused", trainer(check=says_yes)),
    "init_from ignored": ("warm start done or refused", trainer(IgnoresInit)),
    "does not learn": ("finds planted features", trainer(NeverLearns)),
    "wrong units": ("finds planted features", trainer(OtherUnits)),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_lying_trainer_is_caught(name):
    promise, component = TRAINERS[name]
    report = check_trainer(component, steps=60, recover=0.5, only=[promise])
    assert promise in broken(report), str(report)
    with pytest.raises(CheckFailed, match=promise):
        report.raise_if_failed()


def test_a_trainer_that_requires_a_library_is_checked_in_its_worker(tmp_path, monkeypatch):
    """The suite goes the way of a run: rows, states and SAEs cross to the worker process and back."""
    from saehub.plugins import catalog

    (tmp_path / "boxed_plugin.py").write_text(
        "from saehub import Component, hookimpl\n\n@hookimpl\ndef saehub_trainers():\n"
        "    return [Component('toy', 'saehub.testing.components:ToyTrainer', config='saehub.testing.settings:ToyTrain', requires=('colorsys',))]\n"
    )
    info = tmp_path / "saehub_boxed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saehub-boxed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[saehub.plugins]\nboxed = boxed_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    catalog.cache_clear()
    try:
        wanted = ["registration imports no torch", "same job, same bytes", "save and restore", "a valid SAE", "impossible jobs refused"]
        report = check_trainer("boxed/toy", {"latents": 80, "batch": 32}, steps=30, refuses=[{"k": 1000}], only=wanted)
    finally:
        catalog.cache_clear()
    assert report.ok and len(report.checks) == len(wanted), str(report)


def test_planted_features_are_told_from_random_ones():
    """The bound of 0.8 lies far above what random decoder rows reach, and below what the toy trainer reaches."""
    from saehub.testing import mmcs, planted

    _, dictionary = planted(16, 32, 64, 4.0, seed=3)
    chance = [mmcs(dictionary, torch.randn(96, 32, generator=torch.Generator().manual_seed(seed))) for seed in range(20)]
    assert max(chance) < 0.55


# ---------------------------------------------------------------------- extractors
def extractor(session: type):
    """A liar: the toy extractor with another session class."""

    class Liar(toys.ToyExtractor):
        def open(self, model, tokens, sites, *, lm_batch):
            super().open(model, tokens, sites, lm_batch=lm_batch)
            return session(self.config, sites, lm_batch)

    return Liar, ToyExtract()


def test_the_toy_extractor_passes():
    check_extractor((toys.ToyExtractor, ToyExtract()), sites=toys.ToyExtractor.SITES).raise_if_failed()


class DrawsGlobally(toys.ToyExtraction):
    def rows(self, batch):
        rows = super().rows(batch)
        return replace(rows, acts={site: acts + torch.rand(()) for site, acts in rows.acts.items()})


class RemembersOrder(toys.ToyExtraction):
    calls = 0

    def rows(self, batch):
        self.calls += 1
        rows = super().rows(batch)
        return replace(rows, acts={site: acts + self.calls for site, acts in rows.acts.items()})


class CountsWrong(toys.ToyExtraction):
    def kept(self, batch):
        return super().kept(batch) + 1


class SitesInteract(toys.ToyExtraction):
    def rows(self, batch):
        rows = super().rows(batch)
        return replace(rows, acts={site: acts + len(self.sites) for site, acts in rows.acts.items()})


class Shuffles(toys.ToyExtraction):
    def rows(self, batch):
        rows = super().rows(batch)
        order = torch.randperm(len(rows.keep_N), generator=torch.Generator().manual_seed(batch))
        moved = {name: getattr(rows, name)[order] for name in ("keep_N", "positions_N", "sequences_N")}
        return replace(rows, acts={site: acts[order] for site, acts in rows.acts.items()}, **moved)


class NormsTheBatch(toys.ToyExtraction):
    def rows(self, batch):
        rows = super().rows(batch)
        return replace(rows, acts={site: acts - acts.mean(0) for site, acts in rows.acts.items()})


class GivesItsBuffer(toys.ToyExtraction):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.made = {}

    def rows(self, batch):
        return self.made.setdefault(batch, super().rows(batch))


class HoldsGradients(toys.ToyExtraction):
    def rows(self, batch):
        rows = super().rows(batch)
        return replace(rows, acts={site: acts.requires_grad_() for site, acts in rows.acts.items()})


class AnySite(toys.ToyExtractor):
    SITES = ("signal.0", "signal.1", "no_such_site.99")


class SetsThreads(toys.ToyExtraction):
    def rows(self, batch):
        torch.set_num_threads(2)
        return super().rows(batch)


EXTRACTORS = {
    "global random numbers": ("batch i is a function of i", extractor(DrawsGlobally)),
    "history": ("batch i is a function of i", extractor(RemembersOrder)),
    "miscounts": ("kept without running", extractor(CountsWrong)),
    "sites interact": ("one pass as each site alone", extractor(SitesInteract)),
    "shuffled": ("row order", extractor(Shuffles)),
    "batch statistics": ("batch size changes no row", extractor(NormsTheBatch)),
    "buffers handed out": ("rows belong to the caller", extractor(GivesItsBuffer)),
    "gradients held": ("well-formed rows", extractor(HoldsGradients)),
    "any site": ("unknown sites refused", (AnySite, ToyExtract())),
    "threads set": ("surroundings untouched", extractor(SetsThreads)),
}


@pytest.mark.parametrize("name", EXTRACTORS)
def test_a_lying_extractor_is_caught(name):
    promise, component = EXTRACTORS[name]
    report = check_extractor(component, sites=("signal.0", "signal.1"), only=[promise])
    assert promise in broken(report), str(report)


# ---------------------------------------------------------------------- exporters
def test_the_toy_exporter_passes():
    report = check_exporter((toys.ToyExporter, None)).raise_if_failed()
    assert "3 written" in str(report)  # float32, bfloat16, float16


def test_the_native_format_passes_with_every_architecture_and_variant():
    from saehub.checkpoint.load import NativeFormat

    report = check_exporter((NativeFormat, None)).raise_if_failed()
    assert "0 refused" in str(report)


class Transposes(toys.ToyExporter):
    def read(self, path):
        sae = super().read(path)
        return sae.build(sae.config, sae.tensors() | {"W_dec": sae.W_dec.flip(0)})


class Rounds(toys.ToyExporter):
    def read(self, path):
        sae = super().read(path)
        return sae.build(sae.config, sae.tensors() | {"b_dec": sae.b_dec.bfloat16().to(sae.b_dec.dtype)})


class RoundsAndSaysSo(Rounds):
    def write(self, sae, path):
        super().write(sae, path)
        return {"bit_exact": ["W_enc", "b_enc", "W_dec"], "folded": ["b_dec: rounded to bfloat16"], "dropped": []}


class WrongEquation(toys.ToyExporter):
    def run(self, path, x_ND):
        return super().run(path, x_ND * 1.001)


class OffByOne(toys.ToyExporter):
    def read(self, path):
        sae = super().read(path)
        return sae.build(sae.config.replace(params={"k": sae.config.params["k"] + 1}), sae.tensors())


class SniffsAll(toys.ToyExporter):
    def sniff(self, path):
        return True


class SniffRaises(toys.ToyExporter):
    def sniff(self, path):
        import json

        return json.loads((Path(path) / "toy.json").read_text())["format"] == self.FORMAT


class RefusesRudely(toys.ToyExporter):
    def write(self, sae, path):
        assert sae.config.architecture == "topk"
        return super().write(sae, path)


class AcceptsAll(toys.ToyExporter):
    def write(self, sae, path):
        if sae.config.architecture == "relu" and sae.config.kind == "autoencoder":
            params = {"k": sae.config.d_sae}
            sae = sae.build(
                sae.config.replace(
                    architecture="topk", params=params, norm_in="none", norm_out="none", decoder_norm_scaling=False, subtract_b_dec=True
                ),
                sae.tensors(),
            )
        return super().write(sae, path)


class LeavesARuin(toys.ToyExporter):
    def write(self, sae, path):
        try:
            return super().write(sae, path)
        except SaehubError:
            Path(path).mkdir(parents=True, exist_ok=True)
            (Path(path) / "toy.json").write_text('{"format": "saehub-toy/1", "k": 3}')
            raise


class ScalesInPlace(toys.ToyExporter):
    def write(self, sae, path):
        notes = super().write(sae, path)
        sae.W_dec.data.div_(sae.W_dec.data.norm(dim=1, keepdim=True))
        return notes


class LeaksErrors(toys.ToyExporter):
    @staticmethod
    def _tensors(path):
        from safetensors.torch import load_file

        return load_file(Path(path) / "toy.safetensors")


EXPORTERS = {
    "rows in another order": ("round trip computes the same", Transposes),
    "rounded silently": ("round trip bit-exact or declared", Rounds),
    "another k": ("round trip computes the same", OffByOne),
    "rounding declared, but not small": ("round trip computes the same", RoundsAndSaysSo),
    "other equation": ("its own code agrees", WrongEquation),
    "sniffs everything": ("sniffs its own files only", SniffsAll),
    "sniff raises": ("sniffs its own files only", SniffRaises),
    "refuses with an assertion": ("writes or refuses, cleanly", RefusesRudely),
    "writes what it cannot say": ("round trip computes the same", AcceptsAll),
    "leaves a ruin": ("writes or refuses, cleanly", LeavesARuin),
    "changes the SAE": ("nothing mutated", ScalesInPlace),
    "leaks a library's errors": ("damaged files refused", LeaksErrors),
}


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_lying_exporter_is_caught(name):
    promise, cls = EXPORTERS[name]
    report = check_exporter((cls, None), only=[promise])
    assert promise in broken(report), str(report)


# ---------------------------------------------------------------------- every kind
@dataclass
class Thawed:
    k: int = 4
    latents: int = 80
    batch: int = 128
    lr: float = 3e-3
    check = ToyTrain.check
    d_sae = ToyTrain.d_sae
    architecture = ToyTrain.architecture
    memory = ToyTrain.memory


def test_settings_that_can_be_changed_are_caught():
    report = check_trainer(
        (toys.ToyTrainer, Thawed()), steps=30, recover=0.0, only=["settings are frozen data", "registration imports no torch"]
    )
    assert "settings are frozen data" in broken(report)
    assert "imports torch" in str(report)  # this module, which defines the settings, does


def test_a_report_is_a_table_and_plain_data():
    report = check_extractor((toys.ToyExtractor, ToyExtract()), sites=toys.ToyExtractor.SITES)
    assert report.ok and report.raise_if_failed() is report
    data = report.to_json()
    assert data["ok"] and {row["name"] for row in data["checks"]} >= {"row order", "kept without running"}
    assert str(report).count("\n") + 1 == len(report.checks)


@pytest.mark.quick
@pytest.mark.parametrize(("returned", "words"), [(None, "returned nothing (None)"), ("row", "returned a str"), ([{"value": 1}], "returned a dict among its rows")])
def test_an_evaluator_that_returns_no_rows_is_told_so_once(returned, words):
    from saehub.pipeline.evaluate import rows_of
    from saehub.testing.conformance import run_checks

    def ask() -> None:
        rows_of(returned, "house/metric")

    report = run_checks("evaluator", "house/metric", [("first", ask), ("second", lambda: "fine"), ("third", ask)])
    first, second, third = report.checks
    assert words in first.detail and "saehub.Measurement" in first.detail and second.ok and third.detail == "as above: first"


def test_a_wrong_kind_is_a_usage_error():
    with pytest.raises(UsageError, match="is a trainer, not an exporter"):
        check_exporter("native/topk")


def test_measurements_with_infinities_fail_in_json():
    row = Measurement("fvu", float("inf"), ("a",), "toy/l0", "toy.fvu/1")
    assert row.to_json()["status"] == "failed" and row.to_json()["value"] is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_tiny_models_load_speak_bytes_and_leave_the_random_state_alone(family, tmp_path):
    import transformers

    from saehub.testing import tiny_model

    before = torch.get_rng_state()
    folder = tiny_model(tmp_path / family, family)
    again = tiny_model(tmp_path / "again", family)
    assert torch.equal(before, torch.get_rng_state())
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = "sparse ünïcode ✓"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text and ids.shape[1] == len(text.encode())
    assert model.config.model_type == family and int(ids.max()) < model.config.vocab_size
    with torch.no_grad():
        assert float(model(ids).logits.std()) > 0.5  # predictions depend on the input


def test_planted_rows_are_what_they_say():
    from saehub.testing import mmcs, planted

    x_ND, D_FD = planted(20_000, 64, 40, 5.0, seed=1)
    codes = torch.linalg.lstsq(D_FD.T.double(), x_ND.T.double()).solution.T  # 40 features in 64 dimensions: the code is unique
    assert abs(float((codes.abs() > 1e-4).sum(1).double().mean()) - 5.0) < 0.1
    active = codes[codes.abs() > 1e-4]
    assert float(active.min()) >= 0.5 - 1e-3 and float(active.max()) <= 1.5 + 1e-3
    assert mmcs(D_FD, D_FD) == pytest.approx(1.0) and torch.allclose(D_FD.norm(dim=1), torch.ones(40))
    assert torch.equal(planted(100, 64, 40, 5.0, seed=1)[1], D_FD)  # features do not depend on the number of rows


def test_the_fixtures_for_plugin_authors(saehub_planted, saehub_tiny_model):
    from saehub.testing import planted

    x_ND, dictionary_FD = saehub_planted(8, 4, 5, 1.0)
    assert torch.equal(x_ND, planted(8, 4, 5, 1.0)[0]) and dictionary_FD.shape == (5, 4)
    assert (saehub_tiny_model("gpt2") / "model.safetensors").is_file()
    assert saehub_tiny_model("gpt2") == saehub_tiny_model("gpt2") != saehub_tiny_model()
