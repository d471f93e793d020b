"""saprmarks' dictionary_learning as a saehub plugin: what it offers, as data; imports neither torch nor dictionary_learning."""

from __future__ import annotations

from saehub import Component, hookimpl

# Set in the worker before the library is imported: it brings wandb and nnsight along whether they are used or not.
OFFLINE = (("WANDB_MODE", "disabled"),)
LIBRARY = {"requires": ("dictionary_learning",), "extra": "dictionary-learning", "env": OFFLINE}

TRAINERS = {
    "standard": ("StandardConfig", "ReLU with L1, decoder rows of norm 1 (Towards Monosemanticity); resampling"),
    "standard_april": ("StandardAprilConfig", "ReLU with L1 weighted by decoder norms (Anthropic's April 2024 update)"),
    "topk": ("TopKConfig", "TopK with AuxK"),
    "batch_topk": ("BatchTopKConfig", "BatchTopK with AuxK; one tracked threshold in use"),
    "matryoshka_batch_topk": ("MatryoshkaBatchTopKConfig", "Matryoshka BatchTopK: nested groups of latents"),
    "jump_relu": ("JumpReluConfig", "JumpReLU with a target L0"),
    "gated": ("GatedConfig", "gated SAE with L1 on its gate"),
    "p_anneal": ("PAnnealConfig", "ReLU with ‖f‖_p, p annealed"),
    "gated_anneal": ("GatedAnnealConfig", "gated SAE with p annealed"),
}


@hookimpl
def saehub_extractors() -> list[Component]:
    """nnsight, the tracer behind the library's own buffer."""
    return [
        Component(
            name="nnsight",
            target="saehub_dictionary_learning.extract:NNsightExtractor",
            needs=("model", "tokens"),
            summary="activations through nnsight, as dictionary_learning's buffer reads them; any module, whole forward passes",
            **{**LIBRARY, "requires": ("dictionary_learning", "nnsight")},
        )
    ]


@hookimpl
def saehub_evaluators() -> list[Component]:
    """The library's `evaluate` and `loss_recovered`."""
    return [
        Component(
            name="evaluate",
            target="saehub_dictionary_learning.evaluate:EvaluateEvaluator",
            config="saehub_dictionary_learning.evaluate_config:EvaluateConfig",
            needs=("model", "tokens", "sequences"),
            summary="L2, L1, L0, variance explained, cosine, bias, alive latents, loss recovered, as dictionary_learning defines them",
            **{**LIBRARY, "requires": ("dictionary_learning", "nnsight")},
        )
    ]


@hookimpl
def saehub_trainers() -> list[Component]:
    """The library's trainers, each driven through its own `update`."""
    return [
        Component(
            name=name,
            target="saehub_dictionary_learning.train:DictionaryTrainer",
            config=f"saehub_dictionary_learning.config:{config}",
            needs=("activations",),
            summary=summary,
            **LIBRARY,
        )
        for name, (config, summary) in TRAINERS.items()
    ]


@hookimpl
def saehub_exporters() -> list[Component]:
    """Read, write and run dictionary_learning folders (`config.json`, `ae.pt`)."""
    return [
        Component(
            name="dictionary_learning",
            target="saehub_dictionary_learning.codec:DictionaryLearningFormat",
            summary="dictionary_learning folders: AutoEncoder(New), TopK, BatchTopK, Matryoshka, JumpReLU and gated dictionaries",
            **LIBRARY,
        )
    ]
