"""Nothing in; the components of saehub's own extractor, trainer and evaluator out: registrations only, torch-free."""

from __future__ import annotations

from saehub import Component, hookimpl


TRAINERS = (
    ("topk", "config:TopKConfig", "TopK: the k largest pre-activations a row, dead latents revived through AuxK"),
    ("batchtopk", "config:BatchTopKConfig", "BatchTopK: k a row on average, chosen over the batch; one calibrated threshold at inference"),
    ("matryoshka_batchtopk", "config:MatryoshkaConfig", "Matryoshka BatchTopK: every prefix of latents reconstructs by itself"),
    ("abstopk", "config:AbsTopKConfig", "AbsTopK: the k largest pre-activations a row by absolute value, signs kept"),
    ("relu", "config_dense:ReLUConfig", "ReLU: L1 weighted by the decoder's norms, steered to an L0; p-annealing"),
    ("jumprelu", "config_dense:JumpReLUConfig", "JumpReLU: a threshold a latent, trained straight through, by Anthropic's recipe or GDM's"),
    ("gated", "config_dense:GatedConfig", "Gated: which latents fire and how much, decided apart"),
    ("groupmax", "config:GroupMaxConfig", "GroupMax: the largest pre-activation of each of k groups of latents"),
)


@hookimpl
def saehub_extractors() -> list[Component]:
    """`native/hf` and `native/files`."""
    return [
        Component(
            name="hf",
            target="saehub_native.extract:HFExtractor",
            config="saehub_native.extract_config:HFConfig",
            needs=("model", "tokens"),
            summary="activations of any Hugging Face model: one forward pass for all sites, stopped after the deepest",
            cache_version=2,  # pieces of a batch, and in bfloat16 fewer roundings
        ),
        Component(
            name="files",
            target="saehub_native.files:FilesExtractor",
            config="saehub_native.extract_config:FilesConfig",
            summary="activations that exist already: a folder of safetensors or npy files",
        ),
    ]


@hookimpl
def saehub_trainers() -> list[Component]:
    """One trainer an architecture: `native/topk` and its siblings."""
    return [
        Component(
            name=name,
            target="saehub_native.train:NativeTrainer",
            config=f"saehub_native.{config}",
            needs=("activations",),
            summary=summary,
        )
        for name, config, summary in TRAINERS
    ]


@hookimpl
def saehub_evaluators() -> list[Component]:
    """Everything that measures or judges: core, health, stability, paraphrase, drift, verdict."""
    return [
        Component(
            name="core",
            target="saehub_native.evaluate.core:CoreEvaluator",
            config="saehub_native.evaluate.config:CoreConfig",
            needs=("model", "tokens", "sequences"),
            cache_version=2,
            summary="FVU, L0, CE and KL recovered, deadness and baselines, each with a standard error over sequences",
        ),
        Component(
            name="health",
            target="saehub_native.health.evaluator:HealthEvaluator",
            config="saehub_native.health.config:HealthConfig",
            needs=("model", "tokens", "sequences"),
            cache_version=2,
            summary="redundancy beside its random null, duplicates, deadness over tokens, scale, finiteness, out-of-sample shifts",
        ),
        Component(
            name="stability",
            target="saehub_native.evaluate.stability.evaluator:StabilityEvaluator",
            config="saehub_native.evaluate.stability.config:StabilityConfig",
            needs=("model", "tokens", "sequences", "several_saes"),
            summary="what SAEs of one site share: exact matchings with a certified gap, by firing rate, beside random and untrained nulls",
        ),
        Component(
            name="paraphrase",
            target="saehub_native.evaluate.robust.paraphrase:ParaphraseEvaluator",
            config="saehub_native.evaluate.robust.config:ParaphraseConfig",
            needs=("model", "tokens", "sequences"),
            summary="active latents of a text and of the same text put differently (six built-in ways, or your pairs), beside a null",
        ),
        Component(
            name="drift",
            target="saehub_native.evaluate.robust.drift:DriftEvaluator",
            config="saehub_native.evaluate.robust.config:DriftConfig",
            needs=("model", "tokens", "sequences"),
            summary="firing rates on other text, and FVU, L0 and active latents at the same site of another model",
        ),
        Component(
            name="verdict",
            target="saehub_native.verdict.evaluator:VerdictEvaluator",
            config="saehub_native.verdict.config:VerdictConfig",
            needs=("measurements",),
            cache_version=2,
            summary="good, deceptively good, dead, duplicated, collapsed or undecided, with the evidence and what to check next",
        ),
    ]
