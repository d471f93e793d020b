"""The name of an installed plugin in; a conformance report for each of its components out (`saehub plugins check`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from saehub.api import KINDS
from saehub.errors import SaehubError, UsageError, did_you_mean
from saehub.plugins import PluginRow, Registered, catalog
from saehub.testing.conformance import Check, ConformanceReport


def find_plugin(name: str) -> PluginRow:
    """The row of an installed plugin; UsageError for an unknown, broken or disabled one, with the reason."""
    rows = {row.plugin: row for row in catalog().rows()}
    by_distribution = [row for row in rows.values() if row.distribution == name]
    row = rows.get(name) or (by_distribution[0] if len(by_distribution) == 1 else None)
    if row is None:
        raise UsageError(f"no plugin is called {name!r}{did_you_mean(name, rows)}", fix=f"one of: {', '.join(sorted(rows))} (saehub plugins ls)")
    if row.status != "ok":
        raise UsageError(
            f"{row.plugin} is {row.status}", why=row.error, fix="saehub plugins ls --trace" if row.status == "broken" else "unset SAEHUB_DISABLE_PLUGINS"
        )
    return row


def check_plugin(
    name: str,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    folders: Mapping[str, Mapping[str, Path]] | None = None,
    *,
    started: Callable[[Registered], None] = lambda registered: None,
) -> Iterator[ConformanceReport]:
    """One report a component, in the order of registration.

    Args:
        name: the plugin's name, or its distribution's.
        settings: component name or address -> settings to try it with. Default: the config's `EXAMPLE` (see `saehub.api.Component.config`).
        folders: the same for published folders (name -> path): what an exporter that only reads is tried on.
        started: called before each component.

    A component whose library is missing, or whose settings have no default and no example, is a report with one broken promise: what was
    not tried was not kept.
    """
    from saehub.pipeline.components import Components

    row = find_plugin(name)
    for given in (settings or {}, folders or {}):
        known = {word for item in row.components for word in (item.name, item.address)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise UsageError(f"{row.plugin} has no component {unknown[0]!r}{did_you_mean(unknown[0], known)}", fix=f"one of: {', '.join(item.name for item in row.components)}")
    with Components() as workers:
        for item in row.components:
            if item.kind not in KINDS:  # a format of result files: there is no suite for it
                continue
            started(item)
            pick = lambda given, item=item: (given or {}).get(item.address) or (given or {}).get(item.name)  # noqa: E731
            yield _check(item, pick(settings), pick(folders), workers)
    if not row.components:
        raise UsageError(f"{row.plugin} registers no component", fix="saehub plugins ls")


def _check(item: Registered, settings: Mapping[str, Any] | None, folders: Mapping[str, Path] | None, workers: Any) -> ConformanceReport:
    from saehub import testing

    def untried(why: str) -> ConformanceReport:
        return ConformanceReport(item.kind, item.address, (Check("can be tried", False, why),))

    try:
        catalog().require(item)
        config = item.load_config()
        with_ = dict(getattr(config, "EXAMPLE", {})) | dict(settings or {})
        needed = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING and f.name not in with_] if config else []
        if needed:
            return untried(f"{', '.join(needed)} must be set: --set {item.name}.{needed[0]}=…")
        extra: dict[str, Any] = {"folders": folders} if item.kind == "exporter" and folders else {}
        if item.kind == "extractor" and not {"model", "tokens"} & set(item.component.needs):
            from saehub.recipe.check import make_config

            extra["sites"] = list(make_config(item, with_).describe()["widths"])
        return getattr(testing, f"check_{item.kind}")(item, with_, workers=workers, **extra)
    except SaehubError as error:
        return untried(" — ".join(part for part in (error.what, error.why, error.said, error.fix) if part))
