"""SAEBench as a saehub plugin: what it offers, as data; imports neither torch nor sae_bench."""

from __future__ import annotations

from saehub import Component, hookimpl

# SAEBench's run-time type checks refuse a TransformerBridge, and crash under beartype >= 0.18.
ENVIRONMENT = (("JAXTYPING_DISABLE", "1"), ("WANDB_MODE", "disabled"))


def _evaluator(name: str, target: str, config: str, summary: str, needs: tuple[str, ...] = ("model",)) -> Component:
    return Component(
        name=name,
        target=f"saehub_saebench.{target}",
        config=f"saehub_saebench.{config}",
        requires=("sae_bench",),
        extra="saebench",
        summary=summary,
        needs=needs,
        env=ENVIRONMENT,
    )


@hookimpl
def saehub_evaluators() -> list[Component]:
    """SAEBench 0.6's evals, each on any SAE and any model."""
    return [
        _evaluator(
            "core",
            "core:Core",
            "config:CoreConfig",
            "CE and KL recovered, explained variance, L0, shrinkage: SAEBench's numbers with corrected ones beside them",
            ("model", "tokens", "sequences"),
        ),
        _evaluator("sae_probes", "probes:SaeProbes", "config:SaeProbesConfig", "k-sparse probes on up to 113 labelled texts that come with it: the most reliable"),
        _evaluator(
            "sparse_probing", "sparse_probing:SparseProbing", "config:SparseProbingConfig", "k-sparse probes on SAEBench's eight datasets, or on labelled texts of yours"
        ),
        _evaluator("scr", "scr_tpp:Scr", "config:ScrConfig", "spurious correlation removal (with the published caution)"),
        _evaluator("tpp", "scr_tpp:Tpp", "config:TppConfig", "targeted probe perturbation (with the published caution)"),
        _evaluator("absorption", "absorption:Absorption", "config:AbsorptionConfig", "first-letter absorption and splitting, for models that can spell"),
        _evaluator(
            "autointerp",
            "autointerp:Autointerp",
            "config:AutointerpConfig",
            "a judge explains latents and sorts examples; needs an OpenAI-compatible address",
            ("model", "tokens", "sequences"),
        ),
        _evaluator("ravel", "ravel:Ravel", "config:RavelConfig", "RAVEL: cause, isolation and disentanglement of an entity's attributes"),
        _evaluator(
            "unlearning", "unlearning:Unlearning", "config_unlearning:UnlearningConfig", "how many questions an instruct model forgets, and keeps, when latents are clamped"
        ),
        _evaluator(
            "meta_structure",
            "meta_structure:MetaStructure",
            "config:MetaStructureConfig",
            "how much of the decoder a small SAE trained on its rows explains",
            (),
        ),
    ]


@hookimpl
def saehub_results() -> list[Component]:
    """SAEBench's result files."""
    return [
        Component(
            name="saebench-json",
            target="saehub_saebench.saebench_json:SAEBenchJson",
            requires=("sae_bench",),
            extra="saebench",
            summary="SAEBench's result files: written, validated by its own classes, and read, published ones too",
            env=ENVIRONMENT,
        )
    ]
