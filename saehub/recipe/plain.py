"""A recipe in, its normalised plain data or YAML out: what is hashed, locked and dumped."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from saehub.recipe.load import scalar
from saehub.recipe.schema import Recipe, yaml_name


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """Every field with its value, defaults included, as dicts and lists under YAML's keys.

    Reading `dump(to_plain(recipe))` gives an equal recipe."""
    return _plain(recipe)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {yaml_name(f.name): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that our reader would take for something else (`1e-4`), and leaves others (`no`) plain where it may."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    try:
        ambiguous = not isinstance(scalar(value), str)
    except ValueError:
        ambiguous = True
    style = "'" if ambiguous or value == "<<" else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def dump(data: Any) -> str:
    """YAML text that `saehub.recipe.load_text` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_inline(data: Any) -> str:
    """The same on one line, for the value of a `--set` option."""
    text = yaml.dump(data, Dumper=_Inline, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


class _Inline(_Dumper):
    """One line: text with line ends is quoted."""


def _inline_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    node = _text(dumper, value)
    if "\n" in value:
        node.style = '"'
    return node


_Inline.add_representer(str, _inline_text)
