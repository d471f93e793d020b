"""A component and its `with:` in; its config dataclass, or problems at their places, out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saehub.errors import SaehubError, UsageError
from saehub.recipe.tree import Mark, Node, Problem, from_plain, set_paths
from saehub.recipe.typed import fill, keys_of

if TYPE_CHECKING:
    from saehub.api import Component
    from saehub.plugins import Registered


def config_class(component: Component | Registered) -> type | None:
    """The component's config dataclass; None where it takes no settings."""
    if hasattr(component, "load_config"):
        return component.load_config()
    if component.config is None:
        return None
    module, _, attribute = component.config.partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_config(component: Component | Registered, address: str, node: Node, problems: list[Problem], uses: Node | None = None) -> Any:
    """The config that `node` (the map under `with`) describes; None with problems where it is not valid, or there are no settings.

    A config class that cannot be loaded is reported at `uses`."""
    named = uses or node
    try:
        cls = config_class(component)
    except SaehubError as error:
        said = (error.said or "").strip().splitlines()
        problems.append(Problem.at(named.mark, named.path, error.what + (f": {said[-1]}" if said else ""), error.fix))
        return None
    except Exception as error:
        problems.append(Problem.at(named.mark, named.path, f"the settings of {address} cannot be loaded: {type(error).__name__}: {error}", "saehub plugins ls"))
        return None
    if not node.is_map:  # the schema of the recipe says so
        return None
    if cls is None:
        for key in node.data:
            problems.append(Problem.at(node.keys[key], node.path, f"unknown key {key!r}: {address} takes no settings"))
        return None
    return fill(cls, node, problems, address)


def make_config(component: Component | Registered, with_: Mapping[str, Any] | None = None) -> Any:
    """An instance of the component's config dataclass; None where it has none. UsageError naming every problem."""
    address = getattr(component, "address", component.name)
    node = from_plain(dict(with_ or {}), Mark(f"settings of {address}"))
    set_paths(node, "with")
    problems: list[Problem] = []
    config = check_config(component, address, node, problems)
    if problems:
        cls = config_class(component)
        known = f"known keys: {', '.join(keys_of(cls))}" if cls is not None else None
        raise UsageError("\n".join(str(problem) for problem in problems), fix=known)
    return config
