"""A component's address and plain settings in; an instance in this process out."""

from __future__ import annotations

from typing import Any

from saehub.plugins import Registered, catalog


def make_local(kind: str, address: str, config: dict | None) -> Any:
    """Instantiate a component in this process from its address and plain settings."""
    registered = catalog().find(kind, address)
    return registered.load()(configured(registered, config))


def configured(registered: Registered, config: Any) -> Any:
    """The component's config dataclass from plain settings (or as it is); None where it takes none."""
    cls = registered.load_config()
    if cls is None or isinstance(config, cls):
        return config if cls else None
    from saehub.recipe.check import make_config

    return make_config(registered, config or {})
