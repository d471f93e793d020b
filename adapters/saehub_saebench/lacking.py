"""The settings of an evaluator and the planned model in; what this machine lacks to run it, each with the setting and the fix, out: before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import did_you_mean
from saehub_saebench import hubdata

if TYPE_CHECKING:
    from saehub.api import ModelShape, ModelSpec

Lack = tuple[str, str, str]
"""(setting, what is lacking, how to get it)."""
RAVEL_FAMILIES = ("llama", "gemma2", "gpt_neox")
"""Families of models whose layers RAVEL finds."""


def of(evaluator: str, config: Any, model: ModelSpec | None, shape: ModelShape | None) -> Iterator[Lack]:
    """What `evaluator` (such as `unlearning`) would not find here; nothing that takes the library or the weights to know."""
    if evaluator == "autointerp" and not os.environ.get(config.api_key_env):
        yield "api_key_env", f"it needs a judge, and {config.api_key_env} is not set", judge(config.api_key_env)
    if evaluator == "ravel" and shape is not None and shape.family not in RAVEL_FAMILIES:
        yield "", f"RAVEL does not find the layers of a {shape.family} model", f"a model of the families {', '.join(RAVEL_FAMILIES)}"
    if evaluator == "unlearning":
        yield from _unlearning(config, model)
    yield from _datasets(evaluator, config)


def judge(variable: str) -> str:
    """How to get one."""
    return f"export {variable}=…; a server of your own: also with: {{base_url: http://localhost:8000/v1}}"


def _unlearning(config: Any, model: ModelSpec | None) -> Iterator[Lack]:
    from saehub.data.model import has_chat_template

    if model is not None and has_chat_template(model) is False:
        yield "", f"it asks questions, and the tokenizer of {model.name} has no chat template", "an instruct model, such as google/gemma-2-2b-it"
    if not Path(config.forget_file()).is_file():
        yield "forget", f"text about what is to be forgotten: {config.forget_file()} is not there", config.how_to_get_the_corpus()
    for setting, files in (("retain", [config.retain]), ("questions", config.questions.values())):
        for file in filter(None, files):
            if not Path(file).expanduser().is_file():
                yield setting, f"{file} does not exist", "a file of lines of JSON, as the setting's description says"


def _datasets(evaluator: str, config: Any) -> Iterator[Lack]:
    for name, folder in getattr(config, "labelled", {}).items():
        for part in ("train", "test"):
            file = Path(folder).expanduser() / f"{part}.jsonl"
            if name in config.dataset_names and not file.is_file():
                yield "labelled", f"{file} does not exist", 'train.jsonl and test.jsonl, lines of {"text": …, "label": …}'
    wanted = names(config)
    missing = hubdata.absent(wanted, config.data_dir) if wanted else []
    if missing and hubdata.offline():
        word = "is" if len(missing) == 1 else "are"
        what = f"{', '.join(missing)} {word} not on this machine, and the hub is switched off (HF_HUB_OFFLINE)"
        yield "data_dir", what, hubdata.commands(missing, config.data_dir, parts(config))


def names(config: Any) -> tuple[str, ...]:
    """Hub datasets that an evaluator with these settings reads."""
    for method in ("repositories", "published"):
        if hasattr(config, method):
            return getattr(config, method)()
    return tuple(getattr(config, "dataset_names", ())) if hasattr(config, "data_dir") else ()


def parts(config: Any) -> Mapping[str, tuple[str, ...]]:
    """Of hub datasets of which only parts are read, the patterns of their files, as far as settings decide them."""
    return config.parts() if hasattr(config, "parts") else {}


def unknown(wanted: tuple[str, ...], known: tuple[str, ...], whose: str, instead: str) -> None:
    """ValueError, with the nearest name, where one of `wanted` is not among `known`."""
    odd = next((name for name in wanted if name not in known), None)
    if odd is not None:
        listed = ", ".join(known) if len(known) <= 10 else f"{', '.join(known[:4])} …"
        raise ValueError(f"dataset_names holds {odd!r}, which {whose} does not know{did_you_mean(odd, known)}; it knows {listed}{instead}")


def of_the_wheel() -> tuple[str, ...]:
    """Names of the datasets in the sae-probes wheel; empty where it is not installed. The library is not imported."""
    from importlib.util import find_spec

    found = find_spec("sae_probes")
    if found is None or found.origin is None:
        return ()
    return tuple(sorted(path.name.partition(".csv")[0] for path in (Path(found.origin).parent / "data" / "cleaned_data").glob("*.csv*")))
