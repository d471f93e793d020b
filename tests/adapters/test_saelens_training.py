"""SAELens' training checkpoints, as its own trainer writes them: what we read is what SAELens makes of them when training ends."""

from __future__ import annotations

import json
import os
import pickle

os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.checkpoint import format as v1
from saehub.checkpoint.convert import convert, in_process
from saehub.checkpoint.load import find_format, load
from saehub.errors import FormatError
from saehub_saelens.codec import SAELensFormat

D, F, BATCH, STEPS = 16, 48, 64, 24
K = {"k": 6}
CASES = {
    "standard": ("relu", {"l1_coefficient": 0.1}), "gated": ("gated", {"l1_coefficient": 0.1}), "topk": ("topk", K), "abstopk": ("abstopk", K),
    "batchtopk": ("batchtopk", {"k": 5.5}), "matryoshka_batchtopk": ("matryoshka", {"k": 6, "matryoshka_widths": [8, 20]}),
    "jumprelu": ("jumprelu", {"l0_coefficient": 0.05, "jumprelu_init_threshold": 0.1}),
    "matching_pursuit": ("matching_pursuit", {"max_iterations": 4, "residual_threshold": 0.3, "decoder_init_norm": 1.0}),
}  # fmt: skip
SETTINGS = [
    *[(word, {}) for word in CASES],
    *[(word, {"normalize_activations": "expected_average_only_in"}) for word in CASES],
    *[(word, {"normalize_activations": "covariance_whitening"}) for word in CASES if word != "matching_pursuit"],
    *[(word, {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": False}) for word in ("standard", "gated", "batchtopk")],
    ("batchtopk", {"rescale_acts_by_decoder_norm": False, "normalize_activations": "expected_average_only_in"}),
    ("topk", {"rescale_acts_by_decoder_norm": False, "normalize_activations": "covariance_whitening"}),
    ("jumprelu", {"normalize_activations": "layer_norm"}), ("standard", {"normalize_activations": "constant_norm_rescale"}),
]  # fmt: skip


def stream():
    """Rows of a sparse dictionary with a mean, on another scale than 1."""
    draw = torch.Generator().manual_seed(3)
    atoms, mean = torch.randn(40, D, generator=draw), torch.randn(D, generator=draw) * 2
    while True:
        codes = torch.rand(BATCH, 40, generator=draw) * (torch.rand(BATCH, 40, generator=draw) < 0.1)
        yield 4 * (codes @ atoms) + mean


def train(folder, word: str, dtype: str = "float32", **settings):
    """Train for a few steps with SAETrainer; the folder of the checkpoint in the middle, as its own code writes it."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    cls, cfg_cls = get_sae_training_class(word)
    torch.manual_seed(0)
    cfg = cfg_cls(d_in=D, d_sae=F, dtype=dtype, **CASES[word][1], **settings)
    cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    sae = cls(cfg)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=1e-2, lr_end=1e-3, device="cpu", n_checkpoints=1,
            checkpoint_path=str(folder), n_batches_for_norm_estimate=8, save_final_checkpoint=True, logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae, data_provider=stream(),
    )  # fmt: skip
    trainer.fit()
    final, middle = sorted(folder.iterdir(), key=lambda path: not path.name.startswith("final"))
    assert (middle / "trainer_state.pt").is_file() and (middle / "activation_scaler.json").is_file()
    return middle, final


def inference_by_sae_lens(checkpoint, into):
    """The library's own way from a training checkpoint to an inference SAE."""
    from sae_lens import SAE, TrainingSAE
    from sae_lens.training.activation_scaler import ActivationScaler

    sae, scaler = TrainingSAE.load_from_disk(checkpoint, dtype="float32"), ActivationScaler()
    scaler.load(checkpoint / "activation_scaler.json")
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        sae.fold_activation_whitening(scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix)
    sae.save_inference_model(into)
    return SAE.load_from_disk(into, dtype="float32")


@pytest.mark.parametrize(("word", "settings"), SETTINGS)
def test_a_checkpoint_of_sae_trainer(tmp_path, word, settings):
    """Read, computed and certified: in the middle of training, and at its end, where the scaler has been folded already."""
    middle, final = train(tmp_path / "run", word, **settings)
    # an optimizer state that must never be opened
    (middle / "trainer_state.pt").write_bytes(pickle.dumps(Bomb()))
    x = torch.cat([next(rows) for rows in [stream()] for _ in range(4)])
    for checkpoint in (middle, final):
        assert find_format(checkpoint) == "saelens/saelens"
        ours, theirs = load(checkpoint), inference_by_sae_lens(checkpoint, tmp_path / f"{checkpoint.name}-inference")
        assert ours.config.architecture == CASES[word][0] and ours.provenance["site"] == "resid_post.2"
        with torch.no_grad():
            features, output = theirs.encode(x), theirs(x)
        mine, reconstruction = ours.encode(x, dtype=torch.float64), ours(x, dtype=torch.float64)
        assert float((features != 0).any(1).double().mean()) > 0.9
        assert int(((features != 0) != (mine != 0)).sum()) <= 1  # a float32 pre-activation at its boundary
        same_N = ((features != 0) == (mine != 0)).all(1)
        assert float((features - mine)[same_N].abs().max() / mine.abs().max()) < 1e-5
        assert float((output - reconstruction)[same_N].norm() / reconstruction.norm()) < 3e-6
        for target in ("saehub", "saelens"):
            certificate = convert(checkpoint, tmp_path / f"{checkpoint.name}-{target}", target, invoke=in_process)
            assert certificate.outcome == "verified by the target's library", str(certificate)
            said = any("on reading: the " in fold for fold in certificate.folded)
            assert said == (checkpoint == middle and settings.get("normalize_activations", "").startswith(("expected", "covariance")))
        again = load(tmp_path / f"{checkpoint.name}-saelens")
        assert again.config.architecture == CASES[word][0]
        assert again.provenance["origin"]["config"] == json.loads((checkpoint / "cfg.json").read_text())
    assert not (tmp_path / "opened").exists() and Bomb.opened == 0


class Bomb:
    """Counts how often it is unpickled."""

    opened = 0

    def __reduce__(self):
        return (Bomb.open, ())

    @staticmethod
    def open():
        Bomb.opened += 1


def test_nothing_is_folded_that_need_not_be(tmp_path):
    """Without a scaler every tensor is as the optimizer left it: decoder rows of any norm, the threshold in float64."""
    checkpoint, _ = train(tmp_path, "batchtopk")
    stored, sae = load_file(checkpoint / "sae_weights.safetensors"), load(checkpoint)
    assert sae.config.decoder_norm_scaling and sae.threshold.dtype == torch.float64 and sae.threshold.shape == ()
    assert all(torch.equal(sae.tensors()[name], stored[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    assert torch.equal(sae.threshold, stored["topk_threshold"]) and sae.config.params["k"] == 5.5
    assert v1.load(v1.save(sae, tmp_path / "ours")).threshold.dtype == torch.float64
    assert load(train(tmp_path / "m", "matryoshka_batchtopk")[0]).group_sizes.tolist() == [8, 12, 28]


def test_bf16_and_old_log_thresholds(tmp_path):
    """float32 thresholds beside bf16 weights survive; `log_threshold`, as SAELens stored it until 2026, is exponentiated, as it does today."""
    checkpoint, _ = train(tmp_path / "run", "jumprelu", dtype="bfloat16")
    sae = load(checkpoint)
    assert sae.threshold.dtype == torch.float32 and sae.W_enc.dtype == torch.bfloat16
    assert convert(checkpoint, tmp_path / "a", "saelens", invoke=in_process).passed
    stored = load_file(checkpoint / "sae_weights.safetensors")
    stored["log_threshold"] = stored.pop("threshold").clamp(min=1e-6).log()
    save_file(stored, checkpoint / "sae_weights.safetensors")
    old = load(checkpoint)
    assert torch.allclose(old.threshold, stored["log_threshold"].exp(), rtol=2e-7)
    certificate = convert(checkpoint, tmp_path / "b", "saelens", invoke=in_process)
    assert certificate.passed and "log_threshold" in certificate.folded[0]


def test_a_scaler_that_is_damaged_is_refused(tmp_path):
    scaled, _ = train(tmp_path / "s", "topk", normalize_activations="expected_average_only_in")
    white, _ = train(tmp_path / "w", "standard", normalize_activations="covariance_whitening")
    for content in ('{"scaling_factor": 0}', '{"scaling_factor": "2"}', '{"scaling_factor": null}', "[]", "{"):
        (scaled / "activation_scaler.json").write_text(content)
        with pytest.raises(FormatError, match="activation_scaler.json"):
            SAELensFormat().read(scaled)
    tensors = load_file(white / "activation_whitening.safetensors")
    for change in ({"inverse_matrix": tensors["inverse_matrix"].T}, {"mean": tensors["mean"][:3]}, {"matrix": tensors["matrix"] * float("nan")}):
        save_file({n: t.contiguous() for n, t in (tensors | change).items()}, white / "activation_whitening.safetensors")
        with pytest.raises(FormatError, match="activation_whitening.safetensors"):
            SAELensFormat().read(white)
