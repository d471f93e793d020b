"""The `with:` of `saelens/evals` in, its settings, and SAELens' metrics with their formulas, out; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from saehub.api import PlannedSAE

PREFIX = "saelens.evals"


class Definition(NamedTuple):
    """What a metric of `sae_lens.evals.run_evals` is."""

    group: str
    """SAELens' own group, such as `sparsity`."""
    better: str
    title: str
    text: str


ZEROED = "zeros stand at BOS too, which saehub's own cross-entropies leave as it is: another baseline than theirs"
_KL, _CE = "Σ_v p_v log(p_v / q_v) a token, p the model's distribution", "cross-entropy a token of the model"
METRICS: dict[str, Definition] = {
    "kl_div_score": Definition("reconstruction", "higher", "KL score", "(KL(zero) - KL(SAE)) / KL(zero): share of the zero-ablation's KL that the reconstruction avoids"),
    "kl_div_with_ablation": Definition("reconstruction", "none", "KL, zero-ablated", f"{_KL}, q with zeros at the site; {ZEROED}"),
    "kl_div_with_sae": Definition("reconstruction", "lower", "KL with the SAE", f"{_KL}, q with the reconstruction at the site"),
    "ce_loss_score": Definition("reconstruction", "higher", "CE score", f"(CE(zero) - CE(SAE)) / (CE(zero) - CE(model)); {ZEROED}"),
    "ce_loss_with_ablation": Definition("reconstruction", "none", "CE, zero-ablated", f"{_CE} with zeros at the site; {ZEROED}"),
    "ce_loss_with_sae": Definition("reconstruction", "lower", "CE with the SAE", f"{_CE} with the reconstruction at the site"),
    "ce_loss_without_sae": Definition("reconstruction", "none", "CE of the model", f"{_CE}, unchanged"),
    "l2_norm_in": Definition("activations", "none", "norm in", "mean of ‖x‖ over tokens"),
    "l2_norm_out": Definition("activations", "none", "norm out", "mean of ‖x̂‖ over tokens"),
    "l2_ratio": Definition("activations", "none", "norm ratio", "mean of ‖x̂‖ / ‖x‖ over tokens (‖x‖ below 1e-4 counts as 1)"),
    "relative_reconstruction_bias": Definition("activations", "none", "relative reconstruction bias", "mean over batches of E‖x̂‖² / E⟨x, x̂⟩ (arXiv 2404.16014, eq. 10)"),
    "l0": Definition("activations", "none", "L0", "latents that are not zero, a token"),
    "l1": Definition("activations", "none", "L1", "Σ|f| a token"),
    "explained_variance": Definition("activations", "higher", "explained variance", "1 - E‖x - x̂‖² / (E‖x‖² - ‖E x‖²), over all tokens"),
    "explained_variance_legacy": Definition(
        "activations", "higher", "explained variance (legacy)", "mean over tokens of 1 - ‖x - x̂‖² / ‖x - x̄‖², x̄ the mean of the token's batch: not the share of variance"
    ),
    "mse": Definition("activations", "lower", "MSE", "mean of ‖x - x̂‖² over tokens, summed over dimensions"),
    "cossim": Definition("activations", "higher", "cosine", "mean of cos(x, x̂) over tokens"),
    "feature_density": Definition("density", "none", "feature density", "tokens on which a latent is not zero / tokens; mean over latents (each latent's in parts)"),
    "consistent_activation_heuristic": Definition(
        "density", "none", "activations a sequence", "tokens on which a latent fires / sequences in which it fires; mean over latents that fire (each latent's in parts)"
    ),
    "encoder_norm": Definition("weights", "none", "encoder norm", "‖W_enc_i‖; mean over latents (each latent's in parts)"),
    "encoder_bias": Definition("weights", "none", "encoder bias", "b_enc_i; mean over latents (each latent's in parts)"),
    "encoder_decoder_cosine_sim": Definition("weights", "none", "encoder-decoder cosine", "cos(W_enc_i, W_dec_i); mean over latents (each latent's in parts)"),
}  # fmt: skip
"""Metric -> definition, in SAELens' order and words."""


@dataclass(frozen=True)
class EvalsConfig:
    """`saelens/evals`: `sae_lens.evals.run_evals`, with SAELens' names for its settings.

    Three things are the hub's: rows that the recipe excludes are left out (SAELens leaves out special tokens), both halves of the metrics
    see the same sequences (SAELens' second half goes on where the first one stopped), and `None` means all sequences of a dataset.
    """

    batch_size_prompts: int = 8
    """Sequences a forward pass; `explained_variance_legacy` and `relative_reconstruction_bias` depend on it by their definition."""
    n_eval_reconstruction_batches: int | None = None
    """Batches for cross-entropy and KL, three forward passes each; None: all."""
    n_eval_sparsity_variance_batches: int | None = None
    """Batches for everything else; None: all."""
    compute_kl: bool = True
    """KL of the next-token distribution, with the reconstruction and with zeros at the site."""
    compute_ce_loss: bool = True
    """Cross-entropy, likewise."""
    compute_l2_norms: bool = True
    """Norms and their ratio."""
    compute_sparsity_metrics: bool = True
    """L0 and L1."""
    compute_variance_metrics: bool = True
    """Explained variance, MSE, cosine."""
    compute_featurewise_density_statistics: bool = True
    """How often each latent fires."""
    compute_featurewise_weight_based_metrics: bool = True
    """Encoder norms and biases, and their cosine with the decoder; for SAEs that have an encoder of their own."""

    def __post_init__(self) -> None:
        for name in ("batch_size_prompts", "n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    def refusal(self, sae: PlannedSAE) -> str | None:
        """Why an SAE will not be measured, or None; said at plan, and again in the results."""
        from saehub.sites import Site

        if sae.kind not in (None, "autoencoder") or sae.target_site is not None:
            return "SAELens' evals compare the reconstruction with the SAE's own input and put it back there; a transcoder predicts another site"
        if sae.site is None:
            return "the SAE does not say which site it reads"
        if Site.parse(sae.site).kind is None:
            return f"TransformerLens, through which SAELens' evals run the model, has no hook for {sae.site}"
        return None

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """definition id -> title and formula, for reports."""
        return {f"{PREFIX}.{name}/1": definition for name, definition in METRICS.items()}
