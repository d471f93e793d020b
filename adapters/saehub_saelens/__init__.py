"""SAELens as a saehub plugin: what it offers, as data; imports neither torch nor sae_lens."""

from __future__ import annotations

from saehub import Component, hookimpl

LIBRARY = {
    "requires": ("sae_lens",),
    "extra": "saelens",
    # one worker for all: no tracking by wandb, and no progress bars (SAELens' would fight ours)
    "env": (("WANDB_MODE", "disabled"), ("TQDM_DISABLE", "1")),
}
TRAINERS = {
    "standard": ("StandardConfig", "relu with an L1 penalty on f times the decoder's norms"),
    "gated": ("GatedConfig", "a gate and a magnitude, L1 on the gate"),
    "topk": ("TopKConfig", "the k largest pre-activations of each row, with an auxiliary loss for dead latents"),
    "abstopk": ("AbsTopKConfig", "the k largest absolute pre-activations, signs kept"),
    "jumprelu": ("JumpReLUConfig", "a trained threshold for every latent: step, tanh or quadratic sparsity"),
    "batchtopk": ("BatchTopKConfig", "the k largest a row on average over the batch; threshold set on calibration rows"),
    "matryoshka_batchtopk": ("MatryoshkaConfig", "batchtopk with nested dictionaries"),
    "matching_pursuit": ("MatchingPursuitConfig", "latents chosen one after another, encoder tied to the decoder"),
}


@hookimpl
def saehub_trainers() -> list[Component]:
    """SAELens' training classes under its own `SAETrainer`, fed by the hub."""
    return [
        Component(
            name=name,
            target="saehub_saelens.train:SAELensTrainer",
            config=f"saehub_saelens.train_config:{config}",
            needs=("activations",),
            summary=f"SAELens' {name}: {summary}",
            **LIBRARY,
        )
        for name, (config, summary) in TRAINERS.items()
    ]


@hookimpl
def saehub_evaluators() -> list[Component]:
    """SAELens' `run_evals` on any SAE."""
    return [
        Component(
            name="evals",
            target="saehub_saelens.evals:Evals",
            config="saehub_saelens.evals_config:EvalsConfig",
            needs=("model", "tokens", "sequences"),
            summary="sae_lens.evals.run_evals: CE and KL scores, explained variance, L0, shrinkage, density, by its own names and definitions",
            **LIBRARY,
        )
    ]


@hookimpl
def saehub_exporters() -> list[Component]:
    """Read, write and run SAELens checkpoint folders (`cfg.json`, `sae_weights.safetensors`)."""
    return [
        Component(
            name="saelens",
            target="saehub_saelens.codec:SAELensFormat",
            **LIBRARY,
            summary="SAELens checkpoints: every inference architecture, and training folders of any (read as the SAE that they become)",
        )
    ]
