"""SAEBench's evals on labelled texts, a spelling model and a judge in; proof that saehub hands them on faithfully, and says what is missing, out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

from saehub.checkpoint.format import save
from saehub.errors import StageFailed, UsageError
from saehub.pipeline.evaluation import open_context
from saehub.testing.saes import fit_to
from saehub.testing.stage import Stage

spec = spec_from_file_location("saebench_toys", Path(__file__).with_name("saebench_toys.py"))
toys = module_from_spec(spec)
spec.loader.exec_module(toys)
SITE = "resid_post.0"


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    """One tiny Llama and its texts."""
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Labelled texts."""
    return toys.labelled_texts(tmp_path_factory.mktemp("data"))


def context_of(stage: Stage, folder: Path, saes: dict, datasets: tuple[str, ...] = (), site: str = SITE):
    """What the hub gives an evaluator."""
    paths = {name: save(sae, folder / "saes" / name, site=site, overwrite=True) for name, sae in saes.items()}
    spec = {
        "subjects": [{"id": name, "path": str(path), "site": site, "target_site": None} for name, path in paths.items()],
        "model": asdict(stage.spec),
        "datasets": {name: str(stage.tokens(name).path) for name in datasets},
        "extractor": {"address": "native/hf", "config": {}},
        "seed": 0,
        "device": "cpu",
        "work_dir": str(folder / "work"),
        "lm_batch": 4,
    }
    return open_context(spec, model=stage.model)


def sae_of(stage: Stage, seed: int = 1):
    """A TopK SAE that fires on the model's rows."""
    return fit_to(stage.reference(SITE, stage.tokens().tokens(0, 28)).float(), seed=seed)


# ---------------------------------------------------------------------- probing
def test_sparse_probing_is_saebench_s_own_number(stage, data, tmp_path, monkeypatch):
    """The same SAE, model and texts through SAEBench's documented loop: its second SAE's numbers, from its own cache."""
    from sae_bench.evals.sparse_probing.main import run_eval_single_sae
    from saehub_saebench.admission import bridge_of
    from saehub_saebench.config import SparseProbingConfig
    from saehub_saebench.isolation import seed_everything, untouched_world
    from saehub_saebench.sparse_probing import SparseProbing

    there = context_of(stage, tmp_path, {"sae": sae_of(stage)})
    settings = dict(dataset_names=(toys.BIOS,), data_dir=str(data), k_values=(1, 2), probe_train_set_size=24, probe_test_set_size=12, context_length=16, seeds=(3,))
    evaluator = SparseProbing(SparseProbingConfig(**settings))
    ours = {row.metric: row.value for row in evaluator.evaluate(there) if row.dataset is None}
    monkeypatch.chdir(data)
    with untouched_world():
        seed_everything(3)
        sae = evaluator.wrap(there.subjects[0], there)
        for _ in range(2):
            theirs, _by_class = run_eval_single_sae(evaluator._settings(sae, 3), sae, bridge_of(there), "cpu", str(tmp_path / "artifacts"))
    assert ours["sae_test_accuracy"] == theirs["sae_test_accuracy"]
    for k in (1, 2):
        assert ours[f"sae_top_k_test_accuracy@{k}"] == theirs[f"sae_top_{k}_test_accuracy"]
        assert ours[f"llm_top_k_test_accuracy@{k}"] == theirs[f"llm_top_{k}_test_accuracy"]


def test_padding_adds_to_saebench_s_ablation_and_not_to_ours():
    """Two rows of five tokens, three of them padding: the mean over tokens of ablated activations, by SAEBench's function and by hand."""
    from sae_bench.evals.scr_and_tpp.main import ablated_precomputed_activations
    from saehub.testing.saes import random_sae
    from saehub_saebench.sae import BenchConfig, BenchSAE
    from saehub_saebench.standin import WithoutPadding

    sae = BenchSAE(random_sae("relu", subtract_b_dec=True), BenchConfig(16, 48, "relu", "blocks.0.hook_resid_post", 0, "tiny"))
    x_BLD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    x_BLD[:, 2:] = 0
    chosen = torch.zeros(48, dtype=torch.bool)
    chosen[sae.encode(torch.zeros(16)).topk(4).indices] = True  # latents that fire on the zero vector
    kept_BLD = x_BLD[:, :2]
    change_BLF = sae.encode(kept_BLD) * chosen
    by_hand_BD = (kept_BLD - (sae.decode(change_BLF) - sae.decode(torch.zeros_like(change_BLF)))).mean(1)
    assert torch.allclose(ablated_precomputed_activations(x_BLD, WithoutPadding(sae), chosen, 8), by_hand_BD, atol=1e-5)
    assert (ablated_precomputed_activations(x_BLD, sae, chosen, 8) - by_hand_BD).norm() > 0.1


def test_scr_carries_the_caution_and_names_what_does_not_fit(stage, data, tmp_path):
    from saehub_saebench.config import ScrConfig
    from saehub_saebench.scr_tpp import Scr

    config = ScrConfig(
        dataset_names=(toys.BIOS,), data_dir=str(data), pairs={toys.BIOS: (("professor", "nurse"),)}, n_values=(2, 500), train_set_size=24,
        test_set_size=12, context_length=16, probe_epochs=2, seeds=(1, 2),
    )  # fmt: skip
    rows = {row.metric: row for row in Scr(config).evaluate(context_of(stage, tmp_path, {"sae": sae_of(stage)}))}
    assert rows["scr_metric@2"].status == "ok" and rows["scr_metric@2"].n == 2 and rows["scr_metric_corrected@2"].status == "ok"
    assert all("should not be used to evaluate SAEs" in row.note for row in rows.values())
    assert rows["scr_metric@500"].status == "not_measured" and "64 latents" in rows["scr_metric@500"].reason
    assert any("should not be used" in text for text in config.warnings())


@pytest.mark.quick
def test_a_missing_dataset_is_named_with_the_command_that_fetches_it(monkeypatch, tmp_path):
    from saehub_saebench import hubdata
    from saehub_saebench.config import SparseProbingConfig

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    toys.labelled_texts(tmp_path / "mine")
    names = (toys.BIOS, "fancyzhx/ag_news", "canrager/amazon_reviews_mcauley_1and5_sentiment")
    with pytest.raises(StageFailed, match="fancyzhx/ag_news, canrager/amazon_reviews_mcauley_1and5, which are not") as error:
        hubdata.require(names, str(tmp_path / "mine"), "sparse_probing")
    for repo in ("fancyzhx/ag_news", "canrager/amazon_reviews_mcauley_1and5"):
        assert f"hf download {repo} --repo-type dataset --local-dir {tmp_path / 'mine' / repo}" in error.value.fix
    assert "bias_in_bios" not in error.value.fix
    config = SparseProbingConfig(dataset_names=names, data_dir=str(tmp_path / "mine"))
    assert config.warnings() == []  # nothing will be fetched: it is lacking
    assert [(setting, fix) for setting, _, fix in config.lacking(None, None)] == [("data_dir", error.value.fix)]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (told,) = config.warnings()
    assert "hf download fancyzhx/ag_news" in told and not list(config.lacking(None, None))


def test_the_names_are_the_librarys():
    from sae_bench.evals.scr_and_tpp.main import COLUMN2_VALS_LOOKUP
    from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset
    from sae_probes import DATASETS
    from saehub_saebench.config import AMAZON, BIOS, PROBING
    from saehub_saebench.lacking import RAVEL_FAMILIES, of_the_wheel
    from saehub_saebench.ravel import LAYERS

    assert set(PROBING) == set(chosen_classes_per_dataset) and {BIOS, AMAZON} == set(COLUMN2_VALS_LOOKUP)
    assert set(DATASETS) <= set(of_the_wheel()) and set(RAVEL_FAMILIES) == set(LAYERS)


def test_a_changed_local_dataset_is_not_read_from_an_old_cache(monkeypatch, tmp_path):
    """`datasets` finds what it built of a folder by the folder's name; the plan's key and the loaded rows follow the contents."""
    import datasets
    from saehub_saebench import hubdata
    from saehub_saebench.config import TppConfig

    from saehub.pipeline.keys import tree_hash

    (folder := tmp_path / "mine" / "LabHC" / "bias_in_bios").mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs:\n  - config_name: default\n    data_files:\n      - {split: test, path: test.jsonl}\n---\n")
    (work := tmp_path / "work" / "private").mkdir(parents=True)
    monkeypatch.chdir(work)
    found, keys = [], []
    for word in ("old", "new"):
        (folder / "test.jsonl").write_text(f'{{"hard_text": "{word}"}}\n')
        with hubdata.found_here([toys.BIOS], str(tmp_path / "mine"), "tpp"):
            found.append(datasets.load_dataset("LabHC/bias_in_bios", split="test")["hard_text"])
        keys.append([tree_hash(Path(path)) for path in TppConfig(dataset_names=(toys.BIOS,), data_dir=str(tmp_path / "mine")).files()])
    assert found == [["old"], ["new"]]
    assert len(keys[0]) == 1 and keys[0] != keys[1]


@pytest.mark.quick
def test_labelled_texts_are_read_strictly(tmp_path):
    from saehub_saebench.sparse_probing import labelled

    with pytest.raises(UsageError, match="does not exist"):
        labelled(tmp_path, "train")
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(UsageError, match="train.jsonl:2 is no labelled text"):
        labelled(tmp_path, "train")


# ---------------------------------------------------------------------- absorption
def test_a_model_that_cannot_spell_is_said_to_be_one(stage, tmp_path):
    from saehub_saebench.absorption import Absorption
    from saehub_saebench.config import AbsorptionConfig

    rows = Absorption(AbsorptionConfig(seeds=(1,))).evaluate(context_of(stage, tmp_path, {"sae": sae_of(stage)}))
    assert {row.status for row in rows} == {"not_measured"} and "cannot spell" in rows[0].reason
    elsewhere = context_of(stage, tmp_path, {"mlp": sae_of(stage)}, site="mlp_out.0")
    assert "reads resid_post of the layer" in Absorption(AbsorptionConfig(seeds=(1,))).evaluate(elsewhere)[0].reason


def test_absorption_is_the_same_in_a_new_process_as_where_all_is_imported(tmp_path):
    """Here SAEBench and what it needs are imported before; there in the middle of the measurement, after a seed was set, and strings hash otherwise."""
    import sae_bench.evals.absorption.main  # noqa: F401

    absorbs = spec_from_file_location("saebench_absorbs", Path(__file__).with_name("saebench_absorbs.py"))
    saebench_absorbs = module_from_spec(absorbs)
    absorbs.loader.exec_module(saebench_absorbs)
    folders = [tmp_path / name for name in ("here", "there")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = saebench_absorbs.measured(folders[0])
    finally:
        torch.set_num_threads(threads)
    hashed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = [sys.executable, absorbs.origin, str(folders[1])]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": hashed}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(here) == 12 and all(value is not None for *_, value in here)
    assert json.loads((folders[1] / "measured.json").read_text()) == here


# ---------------------------------------------------------------------- autointerp
@pytest.mark.quick
def test_a_window_is_found_again():
    from saehub_saebench.autointerp import Windows

    tokens_ST = np.random.default_rng(0).integers(0, 7, (9, 20))
    windows = Windows(tokens_ST, 5)
    for s, t in ((0, 0), (4, 11), (8, 15)):
        found = windows.find(tokens_ST[s, t : t + 5].tolist())
        assert tokens_ST[found[0], found[1] : found[1] + 5].tolist() == tokens_ST[s, t : t + 5].tolist()
    with pytest.raises(LookupError):
        windows.find([9, 9, 9, 9, 9])


def test_true_labels_change_the_score_of_the_judge(stage, tmp_path, monkeypatch):
    """A judge that says None to everything is right on every true negative, and on no mislabelled one."""
    from saehub_saebench.autointerp import Autointerp
    from saehub_saebench.config import AutointerpConfig

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(toys.Judge, "answer", staticmethod(lambda asked: {**base, "model": asked["model"]}))
    base = {"id": "0", "object": "chat.completion", "created": 0, "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "None"}}]}
    with toys.Judge() as judge:
        config = AutointerpConfig(
            n_latents=6, dead_latent_threshold=3, buffer=2, n_top_ex_for_generation=1, n_iw_sampled_ex_for_generation=1, n_top_ex_for_scoring=1,
            n_random_ex_for_scoring=6, n_iw_sampled_ex_for_scoring=1, base_url=judge.url, seeds=(1,),
        )  # fmt: skip
        rows = {row.metric: row.value for row in Autointerp(config).evaluate(context_of(stage, tmp_path, {"sae": sae_of(stage)}, ("in_sample",)))}
        assert {request["model"] for request in judge.requests} == {"gpt-4o-mini"}
    assert rows["autointerp_score"] == pytest.approx(6 / 8)  # the floor: negatives over all
    assert 0 < rows["autointerp_mislabelled"] < 1  # a latent of a tiny SAE fires often
    assert rows["autointerp_score_corrected"] == pytest.approx(6 / 8 * (1 - rows["autointerp_mislabelled"]))


def test_without_a_judge_nothing_is_asked(stage, tmp_path, monkeypatch):
    from saehub_saebench.autointerp import Autointerp

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(StageFailed, match="OPENAI_API_KEY is not set"):
        Autointerp().evaluate(context_of(stage, tmp_path, {"sae": sae_of(stage)}, ("in_sample",)))


# ---------------------------------------------------------------------- ravel
def test_ravel_without_its_prompts_is_refused_with_the_command_that_fetches_them(tmp_path, monkeypatch):
    """Where `data_dir` has none, and where there is no `data_dir` and no hub; a tokenizer without BOS is refused, too."""
    from saehub_saebench.config import RavelConfig
    from saehub_saebench.ravel import Ravel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stage = toys.RavelStage(tmp_path)
    there = context_of(stage, tmp_path, {"sae": sae_of(stage)})
    for config, folder in ((RavelConfig(data_dir=str(tmp_path / "none")), tmp_path / "none"), (RavelConfig(), Path("data"))):
        with pytest.raises(StageFailed, match=r"needs ravel_city_entity_attributes\.json, .*ravel_nobel_prize_winner_entity_to_split\.json") as error:
            Ravel(config).evaluate(there)
        assert f"hf download adamkarvonen/ravel_prompts --repo-type dataset --include 'ravel_city_*.json' --include 'ravel_nobel_prize_winner_*.json' --local-dir {folder / 'adamkarvonen' / 'ravel_prompts'}" in error.value.fix
    (tmp_path / "plain").mkdir()
    plain = Stage(tmp_path / "plain")
    with pytest.raises(StageFailed, match="would read the token after the entity"):
        Ravel().evaluate(context_of(plain, tmp_path, {"sae": sae_of(plain)}))
