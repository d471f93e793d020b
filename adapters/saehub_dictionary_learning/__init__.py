"""saprmarks' dictionary_learning as a saehub plugin: what it offers, as data; imports neither torch nor dictionary_learning."""

from __future__ import annotations

from saehub import Component, hookimpl

OFFLINE = (("WANDB_MODE", "disabled"),)


@hookimpl
def saehub_exporters() -> list[Component]:
    """Read, write and run dictionary_learning folders (`config.json`, `ae.pt`)."""
    return [
        Component(
            name="dictionary_learning",
            target="saehub_dictionary_learning.codec:DictionaryLearningFormat",
            requires=("dictionary_learning",),
            extra="dictionary-learning",
            env=OFFLINE,
            summary="dictionary_learning folders: AutoEncoder(New), TopK, BatchTopK, Matryoshka, JumpReLU and gated dictionaries",
        )
    ]
