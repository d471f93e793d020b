"""An SAE of every class under every SAEBench evaluator in; a measurement where the evaluator admits the class, else the reason, out."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from saehub.checkpoint.format import save
from saehub.pipeline.evaluation import open_context
from saehub.plugins import catalog
from saehub.recipe.components import make_config
from saehub.testing.saes import VARIANTS, random_sae
from saehub.testing.stage import Stage

spec = spec_from_file_location("saebench_toys", Path(__file__).with_name("saebench_toys.py"))
toys = module_from_spec(spec)
spec.loader.exec_module(toys)
SITE = "resid_post.0"
TEMPORAL = {"n_heads": 2, "n_attn_layers": 1, "bottleneck_factor": 4, "k": 3, "tied": False, "input_scale": 1.0}
SHORTER = {"ravel": {"num_pairs_per_attribute": 6, "llm_batch_size": 4}, "sae_probes": {"max_seq_len": 16}}
"""So many SAEs: less for each."""
WHOLE = ("meta_structure",)
"""Evaluators that encode whole sequences, or nothing: they admit architectures that mix positions."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    """One tiny Llama and its texts."""
    return Stage(tmp_path_factory.mktemp("stage"))


def classes() -> dict[str, object]:
    """Each architecture as it comes, and TopK in every variant of kind, norm and flag; rows of 32 numbers."""
    from saehub.checkpoint.registry import BUILT_IN

    found = {entry.name: random_sae(entry.name, d_in=32, **({"params": TEMPORAL} if entry.name == "temporal" else {})) for entry in BUILT_IN}
    for variant, fields in VARIANTS.items():
        if variant:
            found["topk-" + variant.replace(" ", "-")] = random_sae("topk", d_in=32, **{key: 36 if key == "d_out" else value for key, value in fields.items()})
    return found


def context_of(stage: Stage, folder: Path, saes: dict[str, object]):
    """What the hub gives an evaluator."""
    paths = {name: save(sae, folder / "saes" / name, site=SITE) for name, sae in saes.items()}
    given = {
        "subjects": [{"id": name, "path": str(path), "site": SITE, "target_site": None} for name, path in paths.items()], "model": asdict(stage.spec),
        "datasets": {"in_sample": str(stage.tokens().path)}, "extractor": {"address": "native/hf", "config": {}}, "seed": 0, "device": "cpu",
        "work_dir": str(folder / "work"), "lm_batch": 4,
    }  # fmt: skip
    return open_context(given, model=stage.model)


@pytest.mark.quick
def test_every_evaluator_is_here():
    ours = {item.address.partition("/")[2] for item in catalog().components("evaluator").values() if item.address.startswith("saebench/")}
    assert ours == set(toys.SETTINGS)


@pytest.mark.parametrize("word", [word for word in toys.SETTINGS if word != "core"])  # core: test_core_on_every_class_of_sae
def test_every_class_is_measured_or_refused_with_the_reason(word, stage, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    own, settings = toys.prepared(word, tmp_path)
    stage = own or stage
    saes = classes()
    registered = catalog().find("evaluator", f"saebench/{word}")
    rows = registered.load()(make_config(registered, {**settings, "seeds": [1], **SHORTER.get(word, {})})).evaluate(context_of(stage, tmp_path, saes))
    for name, sae in saes.items():
        own_rows = [row for row in rows if row.subjects == (name,)]
        told = {row.reason for row in own_rows if row.status != "ok"}
        if sae.config.kind != "autoencoder":
            assert all("predicts another site" in reason for reason in told) and not any(row.status == "ok" for row in own_rows), name
        elif not sae.row_wise and word not in WHOLE:
            assert all("needs whole sequences" in reason for reason in told) and not any(row.status == "ok" for row in own_rows), name
        else:
            assert any(row.status == "ok" for row in own_rows), (name, told)
            assert not any(row.status == "failed" for row in own_rows), (name, told)


@pytest.mark.parametrize("word", ["absorption", "autointerp", "unlearning"])
def test_activations_are_computed_once_for_all_saes_and_change_no_bit(word, stage, tmp_path, monkeypatch):
    """Two SAEs with files of activations shared and without: the same values, in fewer forward passes."""
    from saehub_saebench.admission import bridge_of

    from saehub.testing.saes import fit_to

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    own, settings = toys.prepared(word, tmp_path)
    stage = own or stage
    x_ND = stage.reference(SITE, stage.tokens().tokens(0, 28)).float()
    context = context_of(stage, tmp_path, {f"sae-{seed}": fit_to(x_ND, seed=seed) for seed in range(2)})
    kind, passes = type(bridge_of(context)), []
    plain = kind.run_with_cache
    monkeypatch.setattr(kind, "run_with_cache", lambda self, *args, **options: passes.append(1) or plain(self, *args, **options))
    registered, tables, measured, counts = catalog().find("evaluator", f"saebench/{word}"), [], [], []
    for share in (True, False):
        evaluator = registered.load()(make_config(registered, {**settings, "seeds": [1]}))
        evaluator.share = share
        passes.clear()
        rows = evaluator.evaluate(context)
        tables.append([(row.metric, row.subjects, row.status) for row in rows])
        measured.append([value for row in rows for value in (row.value, row.stderr)])
        counts.append(len(passes))
    assert tables[0] == tables[1] and "ok" in {status for *_, status in tables[0]}
    assert measured[0] == measured[1]
    assert counts[0] < counts[1]
    assert not list((tmp_path / "work").iterdir()), "files are left behind"
