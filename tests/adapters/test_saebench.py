"""SAEBench driven by saehub in; proof against independent formulas, and that no state of one measurement reaches another, out."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from saehub.api import EvalContext, Subject
from saehub.checkpoint.format import save
from saehub.pipeline.evaluation import open_context
from saehub.testing.saes import VARIANTS, fit_to, random_sae, zoo
from saehub.testing.stage import Stage

SITE = "resid_post.0"
TEMPORAL = {"n_heads": 2, "n_attn_layers": 1, "bottleneck_factor": 4, "k": 3, "tied": False, "input_scale": 1.0}


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    """One tiny Llama and its texts."""
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def rows(stage) -> torch.Tensor:
    """float32 [n, 32]: activations at SITE."""
    return stage.reference(SITE, stage.tokens().tokens(0, 28)).float()


@pytest.fixture
def context(stage, tmp_path):
    """A function: SAEs by name -> what the hub gives an evaluator."""

    def make(saes: dict, datasets: tuple[str, ...] = ("in_sample",), model: bool = True) -> EvalContext:
        paths = {name: save(sae, tmp_path / "saes" / name, site=SITE, overwrite=True) for name, sae in saes.items()}
        from dataclasses import asdict

        spec = {
            "subjects": [{"id": name, "path": str(path), "site": SITE, "target_site": None} for name, path in paths.items()],
            "model": asdict(stage.spec) if model else None,
            "datasets": {name: str(stage.tokens(name).path) for name in datasets},
            "extractor": {"address": "native/hf", "config": {}},
            "seed": 0,
            "device": "cpu",
            "work_dir": str(tmp_path / "work"),
            "lm_batch": 4,
        }
        return open_context(spec, model=stage.model if model else None)

    return make


def by_metric(rows, subject: str) -> dict:
    """metric -> row of one SAE."""
    return {row.metric: row for row in rows if row.subjects == (subject,)}


# ---------------------------------------------------------------------- the SAE as SAEBench sees it
@pytest.mark.quick
@pytest.mark.parametrize("name, sae", [(name, sae) for name, sae in zoo() if sae.config.kind == "autoencoder"], ids=lambda value: str(value)[:30])
def test_unit_decoder_rows_change_no_reconstruction(name, sae):
    from saehub_saebench.sae import BenchConfig, BenchSAE

    bench = BenchSAE(sae, BenchConfig(16, 48, sae.config.architecture, "blocks.0.hook_resid_post", 0, "tiny"))
    x_BTD = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    features_BTF = bench.encode(x_BTD)
    assert torch.allclose(bench.W_dec.norm(dim=1), torch.ones(48), atol=1e-6)
    assert torch.allclose(bench.decode(features_BTF), sae(x_BTD), atol=1e-4, rtol=1e-4)
    plain_BTF = sae.encode(x_BTD)
    assert torch.equal(features_BTF != 0, plain_BTF != 0)
    assert torch.allclose(features_BTF, plain_BTF * sae.W_dec.norm(dim=1), rtol=1e-5)
    assert bench.encode(torch.zeros(2, 16)).isfinite().all()  # SAEBench zeroes padding before it encodes


# ---------------------------------------------------------------------- core
def test_core_on_every_class_of_sae(context):
    """Every architecture, and every norm and flag of TopK, goes through; transcoders are refused with the reason."""
    from saehub_saebench.config import CoreConfig
    from saehub_saebench.core import Core

    saes = {f"{name}".replace(", ", "-").replace(" ", "_"): sae for name, sae in wide_zoo()}
    found = Core(CoreConfig(batch_size_prompts=2, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, seeds=(1, 2))).evaluate(context(saes))
    for name, sae in saes.items():
        table = by_metric(found, name)
        if sae.config.kind == "autoencoder":
            assert {row.status for row in table.values()} == {"ok"}, name
        else:
            assert {row.status for row in table.values()} == {"not_measured"} and "another site" in table["l0"].reason, name


def wide_zoo():
    """Each architecture as it comes, TopK in every variant, and temporal."""
    from saehub.checkpoint.registry import BUILT_IN

    for entry in BUILT_IN:
        yield entry.name, random_sae(entry.name, d_in=32, d_sae=48, **({"params": TEMPORAL} if entry.name == "temporal" else {}))
    for variant, fields in VARIANTS.items():
        if variant:
            yield f"topk, {variant}", random_sae("topk", d_in=32, **{key: 36 if key == "d_out" else value for key, value in fields.items()})


def test_corrected_numbers_are_the_textbook_s_and_seeds_read_disjoint_text(context, stage, rows):
    from saehub_saebench.config import CoreConfig
    from saehub_saebench.core import Core

    sae = fit_to(rows)
    there = context({"sae": sae})
    tokens = stage.tokens("in_sample")
    batch = 3
    config = CoreConfig(batch_size_prompts=batch, seeds=(1, 2))
    evaluator = Core(config)
    table = by_metric(evaluator.evaluate(there), "sae")
    dataset = there.datasets["in_sample"]
    parts = [evaluator._sequences(dataset, part).tolist() for part in range(2)]
    assert not set(parts[0]) & set(parts[1])
    wanted = {"explained_variance_corrected": [], "mse_corrected": []}
    for part in parts:
        used = part[: len(part) // batch * batch]
        ids_ST = torch.cat([tokens.tokens(i, i + 1) for i in used])
        left_out = torch.tensor([*tokens.manifest["exclude_ids"], 256, 257])
        keep_N = ~torch.isin(ids_ST.flatten(), left_out)
        x_ND = stage.reference(SITE, ids_ST).float()[keep_N]
        error = (x_ND - sae(x_ND)).double().square().sum()
        wanted["explained_variance_corrected"].append(float(1 - error / (x_ND.double() - x_ND.double().mean(0)).square().sum()))
        wanted["mse_corrected"].append(float(error / x_ND.numel()))
    for metric, values in wanted.items():
        assert table[metric].parts["values"] == pytest.approx(values, rel=1e-5)
        assert table[metric].value == pytest.approx(sum(values) / 2, rel=1e-5)
        assert table[metric].stderr == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-3) and table[metric].n == 2
    assert "explained_variance_corrected" in table["explained_variance"].note and "mse_corrected" in table["mse"].note


def test_the_mean_predictor_shows_which_explained_variance_is_right(context, rows):
    """An SAE that says the mean whatever it reads explains nothing: SAEBench's formula says something else, the corrected one says so."""
    from saehub.checkpoint.config import SAEConfig
    from saehub.checkpoint.sae import SAE
    from saehub_saebench.config import CoreConfig
    from saehub_saebench.core import Core

    shifted = rows.mean(0)
    tensors = {"W_enc": torch.zeros(32, 8), "b_enc": -torch.ones(8), "W_dec": torch.eye(8, 32), "b_dec": shifted}
    silent = SAE.build(SAEConfig("relu", 32, 8), tensors)
    table = by_metric(Core(CoreConfig(batch_size_prompts=2, seeds=(1,))).evaluate(context({"mean": silent})), "mean")
    assert table["explained_variance_corrected"].value == pytest.approx(0, abs=0.05)
    assert abs(table["explained_variance"].value) > 0.1
    assert table["l0"].value == 0 and table["l0"].stderr is None and "one seed" in table["l0"].note


def test_shared_forward_passes_change_no_bit(context, rows):
    from saehub_saebench.config import CoreConfig
    from saehub_saebench.core import Core

    saes = {"a": fit_to(rows, seed=1), "b": fit_to(rows, seed=2, k=4), "c": fit_to(rows, seed=3, d_sae=40)}
    config = CoreConfig(batch_size_prompts=4, seeds=(5, 6))
    shared = Core(config).evaluate(context(saes))
    alone = Core(config, share=False).evaluate(context(saes))
    strip = lambda row: replace(row, parts={"values": row.parts["values"]})  # noqa: E731  SAEBench's own result holds a time and a UUID
    assert [strip(row) for row in shared] == [strip(row) for row in alone]
    assert len(shared) == 3 * 27


def test_a_changed_sae_under_the_same_name_gives_new_numbers(context, rows):
    """sae-probes would have reported the first SAE's scores again."""
    from saehub_saebench.config import CoreConfig, SaeProbesConfig
    from saehub_saebench.core import Core
    from saehub_saebench.probes import SaeProbes

    for evaluator in (
        Core(CoreConfig(batch_size_prompts=4, seeds=(1,))),
        SaeProbes(SaeProbesConfig(dataset_names=("119_us_state_TX",), ks=(1,), seeds=(1,), include_llm_baseline=False)),
    ):
        first, again, other = (evaluator.evaluate(context({"same": sae})) for sae in (fit_to(rows, seed=1), fit_to(rows, seed=1), fit_to(rows, seed=2)))
        values = lambda rows: [row.value for row in rows]  # noqa: E731
        assert values(first) == values(again)
        assert values(first) != values(other)


def test_too_little_text_is_refused_before_work(context, rows):
    from saehub.errors import StageFailed
    from saehub_saebench.config import CoreConfig
    from saehub_saebench.core import Core

    with pytest.raises(StageFailed, match="needs 200 batches of 16 sequences for each of 3 seeds") as error:
        Core(CoreConfig(n_eval_reconstruction_batches=200)).evaluate(context({"sae": fit_to(rows)}))
    assert "data.eval.in_sample.tokens: 153,600" in error.value.fix


def test_nothing_global_is_left_changed(tmp_path):
    import numpy as np
    from saehub_saebench.isolation import private_folder, untouched_world

    before = os.getcwd(), torch.get_rng_state(), np.random.get_state()[1].tolist(), dict(os.environ)  # noqa: NPY002
    with pytest.raises(KeyError), untouched_world(), private_folder(tmp_path, seed=1) as folder:
        assert os.getcwd() == str(folder)
        torch.set_grad_enabled(False)
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        os.environ["LEFT_BEHIND"] = "1"
        raise KeyError
    assert torch.is_grad_enabled() and not list(tmp_path.iterdir())
    assert (os.getcwd(), np.random.get_state()[1].tolist(), dict(os.environ)) == (before[0], before[2], before[3])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.quick
def test_what_is_imported_draws_nothing(tmp_path, monkeypatch):
    """After a seed, the first import of a package that draws from all three generators, and of one that it imports: the next numbers are the seed's."""
    import random
    import sys

    import numpy as np
    from saehub_saebench.isolation import seed_everything, untouched_world

    inner, outer = f"draws_{tmp_path.name}_inner", f"draws_{tmp_path.name}_outer"
    drawing = "import random, numpy, torch\nDRAWN = random.random(), numpy.random.rand(), torch.rand(1).item()\n"
    (tmp_path / f"{inner}.py").write_text(drawing)
    (tmp_path / f"{outer}.py").write_text(f"{drawing}import {inner}\nAFTER = random.random()\n")
    monkeypatch.syspath_prepend(tmp_path)

    def three() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    finders = list(sys.meta_path)
    with untouched_world():
        seed_everything(5)
        expected = three()
        seed_everything(5)
        module = __import__(outer)
        assert module.DRAWN == expected == three()  # it drew, and left nothing of it
        assert module.AFTER == sys.modules[inner].DRAWN[0] != expected[0]  # nor did what it imports
    assert sys.meta_path == finders


@pytest.mark.quick
@pytest.mark.parametrize("settings", [{"seeds": ()}, {"seeds": (1, 1)}, {"seeds": (-1,)}, {"batch_size_prompts": 0}])
def test_impossible_settings_are_refused(settings):
    from saehub_saebench.config import CoreConfig

    with pytest.raises(ValueError, match=next(iter(settings))):
        CoreConfig(**settings)


def test_subjects_are_named(context, rows):
    """The rows carry the tensor hash that the hub gave."""
    from saehub_saebench.config import MetaStructureConfig
    from saehub_saebench.meta_structure import MetaStructure

    there = context({"sae": fit_to(rows)}, datasets=(), model=False)
    subject: Subject = there.subjects[0]
    found = MetaStructure(MetaStructureConfig(train_steps=5, seeds=(1,))).evaluate(there)
    assert {row.subject_hashes for row in found} == {(subject.hash,)}
    assert {row.definition for row in found} == {f"saebench.meta_structure.{row.metric}/1" for row in found}
