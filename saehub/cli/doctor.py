"""`saehub doctor`: this machine in; what works, what does not, and what to do next, out."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from saehub.cli.lazy import SETTINGS
from saehub.cli.options import json_option
from saehub.cli.talk import out_json, say
from saehub.report import numbers

LOW_DISK = 2_000_000_000
"""Bytes of free disk below which a warning is due: the default recipe needs well under 1 GB, and an HF model more."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    name: str
    status: str
    """`ok`, `warning` (something will not work) or `failed` (nothing will)."""
    detail: str
    fix: str | None = None
    """The command or the edit that mends it."""


@click.command(context_settings=SETTINGS)
@click.option("--recipe", "recipe_name", metavar="NAME|FILE", help="Check what this recipe would train on, instead of the machine.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="With --recipe: change one setting, as in `recipe run`.")
@json_option()
def doctor(recipe_name: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check this machine, and say what to do next.

    Looks at Python, torch, devices, disk, the Hugging Face cache and the plugins. With --recipe, at its activations: is the tensor the one
    that the site names, finite, in range, shuffled; for loaded SAEs, does another site fit better.
    """
    from saehub.cli.failure import FAILED, OK

    if recipe_name is not None:
        return _recipe(recipe_name, list(overrides), as_json)
    findings = [finding for look in LOOKS for finding in _guarded(look)]
    code = FAILED if any(finding.status == "failed" for finding in findings) else OK
    if as_json:
        out_json({"ok": code == OK, "findings": findings, "next": advice(findings)})
        return code
    from saehub.cli import render

    render.table(("what", "status", "detail"), [(finding.name, finding.status, finding.detail) for finding in findings])
    say()
    for finding in findings:
        if finding.fix:
            say(f"{finding.name}: {finding.fix}")
    say(f"next: {advice(findings)}")
    return code


def _recipe(name: str, overrides: list[str], as_json: bool) -> int:
    """The preflight checks of a recipe: one line each, with the fix."""
    from saehub.cli import render
    from saehub.cli.failure import FAILED, OK
    from saehub.pipeline.plan import make_plan
    from saehub.plugins import catalog
    from saehub.preflight.run import for_recipe
    from saehub.recipe import locator, resolve

    known = catalog()
    checks = for_recipe(make_plan(resolve(name, overrides, known), known, locate=locator(name, overrides, known)))
    code = FAILED if any(check.status == "failed" for check in checks) else OK
    if as_json:
        out_json({"ok": code == OK, "recipe": name, "checks": checks})
        return code
    render.table(("what", "status", "detail"), [(check.name, check.status, check.detail) for check in checks])
    say()
    for check in checks:
        if check.fix and check.status in ("warning", "failed"):
            say(f"{check.name}: {check.fix}")
    if not checks:
        say("nothing is trained or loaded by this recipe: there is nothing to check")
    say(f"next: {'mend the above, and ask again' if code == FAILED else f'saehub recipe run {shlex.quote(name)}'}")
    return code


def advice(findings: list[Finding]) -> str:
    """The one thing to do next."""
    worst = next((finding for finding in findings if finding.status == "failed" and finding.fix), None)
    return worst.fix if worst else "saehub recipe run topk-llama"


def _guarded(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A look that itself breaks is a finding, not the end of the doctor."""
    try:
        return list(look())
    except Exception as error:  # noqa: BLE001
        return [Finding(look.__name__.strip("_"), "warning", f"could not be looked at: {type(error).__name__}: {error}")]


def _python() -> Iterator[Finding]:
    from saehub import __version__

    yield Finding("saehub", "ok", f"{__version__} in {Path(__file__).parents[1]}")
    inside = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding(
        "python",
        "ok" if inside else "warning",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        None if inside else "saehub is tested on Python 3.11 and 3.12: uv venv --python 3.12",
    )


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "failed", str(error), "pip install torch")
        return
    yield Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    found = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            found.append(f"cuda:{i} {card.name} ({numbers.size(card.total_memory)})")
    if torch.backends.mps.is_available():
        found.append("mps")
    yield Finding("devices", "ok", ", ".join([*found, "cpu"]))


def _libraries() -> Iterator[Finding]:
    from importlib import metadata

    seen, absent = [], []
    for name in ("transformers", "safetensors", "numpy", "datasets", "numba"):
        try:
            seen.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            absent.append(name)
    status, fix = ("warning", f"pip install {' '.join(absent)}") if absent else ("ok", None)
    yield Finding("libraries", status, ", ".join(seen) + (f"; missing: {', '.join(absent)}" if absent else ""), fix)


def _disk() -> Iterator[Finding]:
    from saehub.pipeline.workspace import free_bytes, home

    base = home()
    free = free_bytes(base)
    exists = next(folder for folder in (base, *base.parents) if folder.exists())
    if not os.access(exists, os.W_OK):
        yield Finding("disk", "failed", f"{exists} cannot be written", "export SAEHUB_HOME=/a/folder/you/may/write")
        return
    low = free < LOW_DISK
    yield Finding(
        "disk",
        "warning" if low else "ok",
        f"{numbers.size(free)} free for {base}",
        "saehub runs gc, or export SAEHUB_HOME=/path/with/space" if low else None,
    )


def _hugging_face() -> Iterator[Finding]:
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub")
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    sets = len(list(cache.glob("datasets--*"))) if cache.is_dir() else 0
    offline = bool(os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"))
    mode = ", offline: only what is cached can be used" if offline else ""
    yield Finding("hugging face", "ok", f"{models} models and {sets} datasets in {cache}{mode}")


def _model_in_the_box() -> Iterator[Finding]:
    from saehub.data.model import read_shape

    shape = read_shape("builtin/tiny-llama", None, None)
    yield Finding("builtin/tiny-llama", "ok", f"{shape.n_layers} layers, width {shape.d_model}")


def _plugins() -> Iterator[Finding]:
    from saehub.errors import MissingDependency
    from saehub.plugins import catalog

    known = catalog()
    if not any(row.status == "ok" for row in known.rows()):
        yield Finding("plugins", "failed", "none is installed", "reinstall saehub: its plugins are registered at installation")
    for row in known.rows():
        fixes = []
        for item in row.components:
            try:
                known.require(item)
            except MissingDependency as error:
                fixes.append(error.fix)
        if row.status == "broken":
            yield Finding(f"plugin {row.plugin}", "warning", row.error or "broken", "saehub plugins ls --trace")
        elif row.status == "disabled":
            yield Finding(f"plugin {row.plugin}", "ok", "disabled by SAEHUB_DISABLE_PLUGINS")
        elif fixes:
            yield Finding(f"plugin {row.plugin}", "warning", "its library is not installed", fixes[0])
        else:
            yield Finding(f"plugin {row.plugin}", "ok", f"{row.distribution} {row.version}, {len(row.components)} component{'s' if len(row.components) > 1 else ''}")


LOOKS = (_python, _torch, _libraries, _disk, _hugging_face, _model_in_the_box, _plugins)
