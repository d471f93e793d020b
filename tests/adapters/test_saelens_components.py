"""SAELens as trainer and as evaluator: the same numbers as its own code, driven directly on the same rows; one import for all of it."""

from __future__ import annotations

import itertools
import json
import os

os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.api import CalibrationRows, Job
from saehub.errors import FormatError, MissingDependency, StageFailed, UsageError
from saehub.testing.toys import planted
from saehub_saelens import train_config as settings
from saehub_saelens.train import SAELensTrainer, calibrated, init_seed

D, F, BATCH, STEPS = 16, 48, 64, 20
ROWS, _ = planted(BATCH * STEPS + 512, D, 40, 4.0, seed=5, noise=0.02)
CALIBRATION = CalibrationRows(ROWS[BATCH * STEPS :])
JOB = Job("parity", "resid_post.0", None, D, D, STEPS, BATCH, BATCH * STEPS, 7, calibration=512)
BASE = {"width": F, "batch": BATCH, "lr": 3e-3}
SCHEDULE = {"lr_warm_up_steps": 4, "lr_decay_steps": 6}
CASES = [
    (settings.StandardConfig, {"l1_coefficient": 0.1, "l1_warm_up_steps": 8, **SCHEDULE}),
    (settings.GatedConfig, {"l1_coefficient": 0.1, "lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 3}),
    (settings.TopKConfig, {"k": 4, "dead_feature_window": 5, "feature_sampling_window": 6}),
    (settings.TopKConfig, {"k": 4, "rescale_acts_by_decoder_norm": False, "use_sparse_activations": True}),
    (settings.AbsTopKConfig, {"k": 4, "adam_beta1": 0.0, "lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 2, "lr_end": 1e-3}),
    (settings.JumpReLUConfig, {"l0_coefficient": 0.05, "jumprelu_init_threshold": 0.1, "l0_warm_up_steps": 30}),
    (settings.JumpReLUConfig, {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0, "pre_act_loss_coefficient": 1e-3, "dead_feature_window": 4}),
    (settings.JumpReLUConfig, {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True, "normalize_activations": "layer_norm"}),
    (settings.BatchTopKConfig, {"k": 4.5, "threshold": "running", "topk_threshold_lr": 0.2}),
    (settings.MatryoshkaConfig, {"k": 4.0, "threshold": "running", "matryoshka_widths": (8, 24), "use_matryoshka_aux_loss": True, "dead_feature_window": 5}),
    (settings.MatchingPursuitConfig, {"max_iterations": 4, "residual_threshold": 0.3}),
    (settings.TopKConfig, {"k": 4, "normalize_activations": "covariance_whitening"}),
    (settings.BatchTopKConfig, {"k": 4.0, "threshold": "running", "normalize_activations": "expected_average_only_in", "autocast": True}),
]  # fmt: skip


def batches():
    return [x.clone() for x in ROWS[: BATCH * STEPS].split(BATCH)]


def through_saehub(config, folder, stop_at: int):
    """Trained by the adapter, stopped in between, and gone on in another session from files."""
    session = SAELensTrainer(config).open(JOB, CALIBRATION)
    for x in batches()[:stop_at]:
        session.step(x)
    tensors, data = session.state()
    save_file(tensors, folder / "state.safetensors")
    text = json.dumps(data, allow_nan=False)
    session = SAELensTrainer(config).open(JOB, CALIBRATION)
    session.load_state(load_file(folder / "state.safetensors"), json.loads(text))
    for x in batches()[stop_at:]:
        session.step(x)
    return session


def directly(config):
    """As a user of SAELens would: its classes, its `fit`, the same batches; calibration rows first where it estimates a norm from data."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    cls, cfg_cls = get_sae_training_class(config.word)
    ours = {"expansion", "width", "batch", "calibration", "threshold", *settings.TRAINER}
    given = {name: value for name, value in vars(config).items() if name not in ours}
    if "matryoshka_widths" in given:
        given["matryoshka_widths"] = list(given["matryoshka_widths"])
    torch.manual_seed(init_seed(JOB))
    sae = cls(cfg_cls(d_in=D, d_sae=F, **given))
    first = CALIBRATION.x_ND.split(BATCH) if config.normalize_activations in settings.ESTIMATED_NORMS else ()
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=BATCH * STEPS, train_batch_size_samples=BATCH, n_batches_for_norm_estimate=len(first),
            **{name: getattr(config, name) for name in settings.TRAINER if name != "lr_end"}, lr_end=config.lr_end or config.lr / 10,
        ),
        sae, itertools.chain(first, batches()),
    )  # fmt: skip
    return trainer.fit()


@pytest.mark.parametrize(("cls", "given"), CASES, ids=lambda value: value.word if isinstance(value, type) else "-".join(map(str, value))[:40])
def test_the_weights_are_those_of_sae_lens(cls, given, tmp_path):
    """Bit for bit (before its scaler is folded), with a stop and a restore in between; what comes out computes what SAELens' saved SAE computes."""
    from sae_lens import SAE as Theirs

    config = cls(**BASE, **given)
    assert list(config.check(JOB)) == []
    session = through_saehub(config, tmp_path, stop_at=9)
    theirs = directly(config)
    if config.normalize_activations not in settings.ESTIMATED_NORMS:  # `fit` folds those into the weights
        expected, found = theirs.state_dict(), session.sae.state_dict()
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name
    theirs.save_inference_model(tmp_path / "theirs")
    loaded = Theirs.load_from_disk(tmp_path / "theirs", device="cpu", dtype="float32")
    sae = session.finish()
    assert sae.config.architecture == config.architecture() and all(t.dtype in (torch.float32, torch.int64) for t in sae.tensors().values())
    x_ND = CALIBRATION.x_ND
    with torch.no_grad():
        features, output = loaded.encode(x_ND), loaded(x_ND)
    mine = sae.encode(x_ND)
    assert int(((features != 0) != (mine != 0)).sum()) <= 1  # a tie in the last bit
    assert float((output - sae(x_ND)).norm() / output.norm()) < 2e-6
    assert sae.provenance["origin"]["config"]["architecture"] == config.word


def test_every_setting_of_sae_lens_is_exposed():
    """Each field of its training configs and of SAETrainerConfig, with its default, but for those that the hub itself fills."""
    from dataclasses import MISSING, fields

    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class

    assert {config.word for config in settings.CONFIGS} == set(SAE_TRAINING_CLASS_REGISTRY)
    filled = {"d_in", "d_sae", "dtype", "device", "reshape_activations", "metadata"}  # sizes, float32, and the hub's own bookkeeping
    filled |= {"total_training_samples", "train_batch_size_samples", "n_batches_for_norm_estimate", "logger", "checkpoint_path", "n_checkpoints", "save_final_checkpoint"}
    differ = {"lr_end", "decoder_init_norm", "matryoshka_widths"}  # None means SAELens' lr / 10; 1 is forced for matching pursuit; required there
    for config in settings.CONFIGS:
        mine = {item.name: item.default for item in fields(config)}
        for item in (*fields(get_sae_training_class(config.word)[1]), *fields(SAETrainerConfig)):
            if item.name in filled:
                continue
            assert item.name in mine, (config.word, item.name)
            if mine[item.name] is not MISSING and item.name not in differ:
                assert mine[item.name] == item.default, (config.word, item.name)


def test_the_threshold_is_set_on_calibration_rows():
    """After few steps SAELens' running mean lets several times k through; the calibrated one k, as a sort of all values says."""
    for cls, k in ((settings.BatchTopKConfig, 4.5), (settings.MatryoshkaConfig, 4.0)):
        made = {}
        for threshold in ("running", "calibrated"):
            session = SAELensTrainer(cls(**BASE, k=k, threshold=threshold)).open(JOB, CALIBRATION)
            for x in batches():
                session.step(x)
            made[threshold] = session.finish()
        l0 = {name: float((sae.encode(CALIBRATION.x_ND) != 0).sum(1).float().mean()) for name, sae in made.items()}
        assert l0["running"] > 2 * k and abs(l0["calibrated"] - k) < 1 / 512 + 1e-9
        p = made["running"].preacts(made["running"].centre(CALIBRATION.x_ND)).flatten().sort(descending=True).values
        wanted = int(k * 512)
        assert float(made["calibrated"].tensors()["threshold"]) == pytest.approx(float(p[wanted - 1 : wanted + 1].mean()), abs=1e-6)
        assert made["calibrated"].provenance["origin"]["running_threshold"] == float(made["running"].tensors()["threshold"])
    few = calibrated(made["running"], torch.zeros(3, D), 1e6)  # fewer positive values than wanted: everything passes
    assert float(few.tensors()["threshold"]) == 0


@pytest.mark.parametrize(
    ("cls", "given", "said"),
    [
        (settings.TopKConfig, {"k": 49}, "k is 49, the dictionary has 48 latents"),
        (settings.TopKConfig, {"k": 4, "normalize_activations": "layer_norm"}, "auxiliary loss raises"),
        (settings.TopKConfig, {"k": 4, "use_sparse_activations": True}, "rescale_acts_by_decoder_norm: false"),
        (settings.StandardConfig, {"lr_warm_up_steps": 12, "lr_decay_steps": 8}, "leave none of the 20 steps"),
        (settings.StandardConfig, {"lr_end": 0.0, "lr_decay_steps": 2, "lr_scheduler_name": "cosineannealing"}, "from 0 to 0"),
        (settings.StandardConfig, {"expansion": 4.0}, "leave one out"),
        (settings.MatryoshkaConfig, {"k": 4.0, "matryoshka_widths": (24, 8)}, "must increase"),
        (settings.MatryoshkaConfig, {"k": 4.0, "matryoshka_widths": (24, 96)}, "must increase"),
        (settings.JumpReLUConfig, {"jumprelu_sparsity_loss_mode": "quadratic"}, "target_l0 is None"),
        (settings.MatchingPursuitConfig, {"decoder_init_norm": 0.1}, "rows of norm 1"),
        (settings.MatchingPursuitConfig, {"normalize_activations": "covariance_whitening"}, "cannot be folded"),
    ],
)
def test_what_cannot_be_done_is_said_before_work(cls, given, said):
    config = cls(**BASE, **given)
    assert any(said in problem for problem in config.check(JOB)), list(config.check(JOB))
    with pytest.raises(UsageError, match="cannot be trained"):
        SAELensTrainer(config).open(JOB, CALIBRATION)


def test_other_jobs_are_refused():
    config = settings.TopKConfig(**BASE, k=4)
    assert any("autoencoders only" in text for text in config.check(replace(JOB, target_site="mlp_out.0")))
    whitened = replace(config, normalize_activations="covariance_whitening")
    assert any("more calibration rows" in text for text in whitened.check(replace(JOB, calibration=10)))
    run_time = settings.StandardConfig(**BASE, normalize_activations="layer_norm")
    assert not list(run_time.check(JOB)) and any("extract.normalize: none" in text for text in run_time.check(replace(JOB, normalize="sqrt_d")))


def test_what_the_user_would_not_know_is_said():
    def said(cls, **given):
        return " | ".join(cls(**BASE, **given).cautions(JOB))

    assert "clips every gradient to norm 1" in said(settings.StandardConfig) and not list(settings.StandardConfig(**BASE).cautions(replace(JOB, normalize="sqrt_d")))
    assert "auxiliary loss never acts" in said(settings.TopKConfig, k=4) and "never acts" not in said(settings.TopKConfig, k=4, dead_feature_window=5)
    assert "has reached 18%" in said(settings.BatchTopKConfig, k=4.0, threshold="running") and "reached" not in said(settings.BatchTopKConfig, k=4.0)
    assert "never reaches its full value" in said(settings.JumpReLUConfig, l0_warm_up_steps=21)
    assert "up to d_in = 16 latents" in said(settings.MatchingPursuitConfig)


def test_rows_that_are_not_finite_stop_the_run_and_are_not_saved():
    session = SAELensTrainer(settings.TopKConfig(**BASE, k=4)).open(JOB, CALIBRATION)
    session.step(batches()[0])
    with pytest.raises(StageFailed, match="loss of parity is nan at step 2"):
        session.step(torch.full((BATCH, D), float("nan")))
    with pytest.raises(StageFailed):
        session.state()
    with pytest.raises(StageFailed, match=r"\[rows, 16\] was expected"):
        session.step(torch.zeros(BATCH, D + 1))


def test_a_state_of_another_job_is_refused():
    session = SAELensTrainer(settings.TopKConfig(**BASE, k=4)).open(JOB, CALIBRATION)
    tensors, data = session.state()
    with pytest.raises(FormatError, match="version 9"):
        session.load_state(tensors, {**data, "version": 9})
    with pytest.raises(FormatError, match="does not fit its settings: sae.W_dec"):
        session.load_state({**tensors, "sae.W_dec": torch.zeros(3, 3)}, data)


def test_a_start_of_another_kind_is_refused(tmp_path):
    from saehub.checkpoint.format import save

    topk = SAELensTrainer(settings.TopKConfig(**BASE, k=4)).open(JOB, CALIBRATION)
    save(topk.finish(), tmp_path / "topk")
    again = SAELensTrainer(settings.TopKConfig(**BASE, k=8)).open(replace(JOB, init_from=str(tmp_path / "topk")), CALIBRATION)
    assert torch.equal(again.sae.W_enc, topk.sae.W_enc)
    with pytest.raises(UsageError, match="architecture 'topk' for 'relu'"):
        SAELensTrainer(settings.StandardConfig(**BASE)).open(replace(JOB, init_from=str(tmp_path / "topk")), CALIBRATION)


@pytest.mark.parametrize(
    ("where", "name", "said"),
    [("sae_lens.training.sae_trainer:SAETrainer", "maybe_reset_sparsity", "has no 'maybe_reset_sparsity'"), ("sae_lens.registry", "get_sae_training_class", "no 'get_sae_training_class'")],
)  # fmt: skip
def test_a_version_without_what_we_call(monkeypatch, where, name, said):
    import importlib

    module, _, cls = where.partition(":")
    owner = importlib.import_module(module)
    monkeypatch.delattr(getattr(owner, cls) if cls else owner, name)
    with pytest.raises(MissingDependency, match=said) as error:
        SAELensTrainer(settings.TopKConfig(**BASE, k=4)).open(JOB, CALIBRATION)
    assert "sae-lens 6." in str(error.value) and "written for 6.54.12" in str(error.value)


# ---------------------------------------------------------------------- saelens/evals
@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    from saehub.testing.stage import Stage

    return Stage(tmp_path_factory.mktemp("stage"), "gpt2")


def evaluated(stage, folder, sae, site: str, target_site: str | None = None, **given) -> dict:
    """metric -> Measurement of one SAE on one dataset."""
    from dataclasses import asdict

    from saehub.checkpoint.format import save
    from saehub.pipeline.evaluation import open_context
    from saehub_saelens.evals import Evals
    from saehub_saelens.evals_config import EvalsConfig

    path = save(sae, folder / "sae", site=site)
    spec = {
        "subjects": [{"id": "a", "path": str(path), "site": site, "target_site": target_site}], "model": asdict(stage.spec), "seed": 0, "device": "cpu",
        "datasets": {"in_sample": str(stage.tokens().path)}, "extractor": {"address": "native/hf", "config": {}}, "work_dir": str(folder / "work"), "lm_batch": 4,
    }  # fmt: skip
    context = open_context(spec, model=stage.model)
    return {row.metric: row for row in Evals(EvalsConfig(**given)).evaluate(context)}


def fitted(stage, site: str, **config):
    """An SAE with rows of the site as its decoder, so that it reconstructs and its thresholds matter."""
    from saehub.testing.saes import fit_to

    tokens = stage.tokens()
    return fit_to(stage.reference(site, tokens.tokens(0, tokens.n_sequences)), **config)


@pytest.mark.parametrize("site", ["resid_post.0", "attn_z.1"])
def test_the_metrics_are_those_of_run_evals(stage, tmp_path, site):
    """A SAELens SAE given to `run_evals` by hand, on a bridge set up as SAELens' users do, and the same SAE through saehub."""
    from sae_lens import SAE as Theirs
    from sae_lens.evals import EvalConfig, get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens.model_bridge import TransformerBridge

    from saehub_saelens.codec import SAELensFormat

    sae = fitted(stage, site)
    sae.provenance.update(site=site)
    SAELensFormat().write(sae, tmp_path / "theirs")
    theirs = Theirs.load_from_disk(tmp_path / "theirs", device="cpu", dtype="float32")
    if site.startswith("attn_z"):
        theirs.turn_off_forward_pass_hook_z_reshaping()
    bridge = TransformerBridge.boot_transformers(stage.spec.name, device="cpu")
    bridge.enable_compatibility_mode(no_processing=True)
    tokens = stage.tokens()

    class Store:
        store_batch_size_prompts, context_size, at = 7, tokens.context, 0

        def get_batch_tokens(self, n):
            self.at += n
            return tokens.tokens(self.at - n, self.at)

        def reset_input_dataset(self):
            self.at = 0

    config: EvalConfig = get_eval_everything_config(batch_size_prompts=7, n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=4)
    excluded = tokens.manifest["exclude_ids"]
    scalars, features = run_evals(theirs, Store(), bridge, ActivationScaler(), config, exclude_special_tokens=excluded)
    scalars.pop("token_stats")
    rows = evaluated(stage, tmp_path, sae, site, batch_size_prompts=7, n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=4)
    wanted = {name: value for group in scalars.values() for name, value in group.items()}
    assert wanted.keys() | features.keys() == rows.keys() and len(excluded) > 1
    for name, value in wanted.items():
        assert rows[name].status == "ok" and rows[name].value == pytest.approx(value, rel=2e-5, abs=1e-7), name
    for name, values in features.items():
        found = [float("nan") if value is None else value for value in rows[name].parts["per_latent"]]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(values), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert rows["l0"].n == 28 and rows["ce_loss_score"].n == 21 and rows["encoder_norm"].dataset is None
    assert rows["mse"].definition == "saelens.evals.mse/1" and rows["mse"].version.startswith("sae-lens 6.") and "no standard error" in rows["mse"].note


def test_reconstructions_are_saehubs_where_sae_lens_has_none(stage, tmp_path):
    """Topk, and topk under a run-time norm (which needs its input again to decode): explained variance and CE by a float64 formula and a splice of ours."""
    from saehub.activations import taps
    from saehub.sites import Site

    tokens = stage.tokens()
    tokens_BT = tokens.tokens(0, tokens.n_sequences)
    keep_BT = tokens.keep(0, tokens.n_sequences)
    tap = Site.parse("resid_post.0").tap(stage.model.shape)
    x_ND = stage.reference("resid_post.0", tokens_BT)
    for number, sae in enumerate((fitted(stage, "resid_post.0"), fitted(stage, "resid_post.0", seed=3))):
        from saehub.checkpoint.sae import SAE

        config = sae.config.replace(norm_in="layer_norm", norm_out="layer_norm") if number else sae.config
        sae = SAE.build(config, sae.tensors())
        rows = evaluated(stage, tmp_path / str(number), sae, "resid_post.0")
        with torch.no_grad():
            y_ND = sae(x_ND)
            kept = keep_BT.flatten()
            x, y = x_ND[kept].double(), y_ND[kept].double()
            variance = x.square().sum(1).mean() - x.mean(0).square().sum()
            # 1 − a float32 ratio: where little is explained, what is left of it is exact to float32's 1e-7 of 1, not of itself.
            assert rows["explained_variance"].value == pytest.approx(float(1 - (x - y).square().sum(1).mean() / variance), rel=1e-5, abs=1e-6)
            assert rows["l0"].value == pytest.approx(float((sae.encode(x_ND)[kept] != 0).double().sum(1).mean()), rel=1e-6)

            def spliced(z_BTD, sae=sae):
                return torch.where(keep_BT[..., None], sae(z_BTD), z_BTD)

            logits = taps.splice(stage.model.hf, tokens_BT, tap, spliced)
            ce_BT = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens_BT[:, 1:], reduction="none")
            assert rows["ce_loss_with_sae"].value == pytest.approx(float(ce_BT[keep_BT[:, :-1]].mean()), rel=1e-5)


def test_what_run_evals_cannot_measure_is_said(stage, tmp_path):
    from saehub.testing.saes import random_sae
    from saehub_saelens.evals import RESID_MID

    def reasons(rows, *names):
        return {rows[name].reason for name in names or rows if rows[name].status != "ok"}

    mid = evaluated(stage, tmp_path / "mid", fitted(stage, "resid_mid.0"), "resid_mid.0")
    assert mid["ce_loss_score"].reason == mid["kl_div_with_sae"].reason == RESID_MID and mid["explained_variance"].status == "ok"
    across = random_sae("topk", d_in=32, kind="transcoder", d_out=32, subtract_b_dec=False)
    rows = evaluated(stage, tmp_path / "across", across, "mlp_in.0", "mlp_out.0")
    assert "a transcoder predicts another site" in rows["l0"].reason and rows["encoder_norm"].status == "ok"
    rows = evaluated(stage, tmp_path / "module", fitted(stage, "resid_post.0"), "transformer.h.0.ln_1:out")
    assert "has no hook for transformer.h.0.ln_1:out" in rows["l0"].reason
    rows = evaluated(stage, tmp_path / "tied", random_sae("matching_pursuit", d_in=32), "resid_post.0", n_eval_reconstruction_batches=1)
    assert rows["l0"].status == "ok" and "no encoder matrix" in rows["encoder_norm"].reason
    silent = fitted(stage, "resid_post.0")
    silent.b_enc.data.sub_(1e6)
    silent.b_dec.data.zero_()
    rows = evaluated(stage, tmp_path / "silent", silent, "resid_post.0")
    assert rows["l0"].value == 0 and rows["cossim"].status == "failed" and "a norm that it divides by is zero" in rows["cossim"].reason
    assert rows["consistent_activation_heuristic"].reason == "no latent fired"


def test_a_temporal_sae_gets_sequences(stage, tmp_path):
    from saehub.checkpoint.config import SAEConfig
    from saehub.checkpoint.registry import architecture
    from saehub.checkpoint.sae import SAE

    params = {"n_heads": 4, "n_attn_layers": 1, "bottleneck_factor": 4, "k": 5, "tied": True, "input_scale": 1.0}
    config = SAEConfig("temporal", 32, 48, params=params)
    draw = torch.Generator().manual_seed(1)
    sae = SAE.build(config, {name: torch.randn(spec.shape, generator=draw) * 0.2 for name, spec in architecture("temporal").specs(config).items()})
    rows = evaluated(stage, tmp_path, sae, "resid_post.0", n_eval_reconstruction_batches=1)
    tokens = stage.tokens()
    x_BTD = stage.reference("resid_post.0", tokens.tokens(0, tokens.n_sequences)).reshape(tokens.n_sequences, tokens.context, -1)
    with torch.no_grad():
        error = (sae(x_BTD) - x_BTD)[tokens.keep(0, tokens.n_sequences)].double().square().sum(1).mean()
    assert rows["mse"].value == pytest.approx(float(error), rel=1e-5)


def test_another_version_of_the_evals(stage, tmp_path, monkeypatch):
    """A function that is gone is named with both versions; numbers of a version with other formulas do not pass for ours."""
    import sae_lens.evals

    from saehub.capabilities import Library

    monkeypatch.setattr(Library, "installed", property(lambda self: "7.1.0"))
    sae = fitted(stage, "resid_post.0")
    rows = evaluated(stage, tmp_path / "newer", sae, "resid_post.0", n_eval_reconstruction_batches=1)
    assert rows["mse"].definition == "saelens.evals.mse.v7_1_0/1" and rows["mse"].version == "sae-lens 7.1.0"
    monkeypatch.delattr(sae_lens.evals, "get_featurewise_weight_based_metrics")
    with pytest.raises(MissingDependency, match="sae-lens 7.1.0 is installed") as error:
        evaluated(stage, tmp_path / "gone", sae, "resid_post.0")
    assert "has no 'get_featurewise_weight_based_metrics'" in error.value.what
