"""A recipe's name or path in, its file out: built-in recipes (in a wheel or a checkout), those of plugins, and files of the user's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saehub.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from saehub.plugins import Catalog


@dataclass(frozen=True)
class Entry:
    """One line of `saehub recipe ls`."""

    name: str
    """What to write after `saehub recipe run`."""
    path: Path
    origin: str
    """`built-in`, or the plugin that ships it."""
    description: str
    """The recipe's own, or why it cannot be read."""


def builtin_dir() -> Path:
    """The folder of built-in recipes: `saehub/recipes` in a wheel, `recipes/` beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def builtin() -> dict[str, Path]:
    """Built-in recipes by name."""
    return {path.stem: path for path in sorted(builtin_dir().glob("*.yaml"), key=lambda path: path.stem)}


def _all(catalog: Catalog | None) -> dict[str, Path]:
    if catalog is None:
        from saehub.plugins import catalog as installed

        catalog = installed()
    return {**builtin(), **catalog.recipes()}


def find(name_or_path: str | os.PathLike[str], catalog: Catalog | None = None) -> Path:
    """The file of a recipe.

    A file that exists wins; then a built-in recipe, as `topk-llama` or `topk-llama.yaml`; then a plugin's, as `plugin/name`, or as
    `name` while nobody else has it. UsageError with a did-you-mean otherwise.
    """
    text = os.fspath(name_or_path)
    path = Path(text)
    if _is_file(path):
        return path
    known = _all(catalog)
    name = text.removesuffix(".yaml").removesuffix(".yml")
    if name in known:
        return known[name]
    by_bare = {address: file for address, file in known.items() if address.rpartition("/")[2] == name}
    if len(by_bare) == 1:
        return next(iter(by_bare.values()))
    if by_bare:
        raise UsageError(f"{len(by_bare)} plugins ship a recipe {name!r}", fix=f"write one of: {', '.join(by_bare)}")
    if _is_dir(path):
        inside = path / "recipe.yaml"
        raise UsageError(f"{text} is a folder, not a recipe", fix=f"for the recipe of that run: {inside}" if _is_file(inside) else "name the .yaml file in it")
    bare = Path(name).name
    raise UsageError(
        f"there is no recipe or file {text!r}{did_you_mean(bare, [*known, *(key.rpartition('/')[2] for key in known)])}",
        why=f"looked for a file from {Path.cwd()}, then for a recipe of that name",
        fix=f"known recipes: {', '.join(known) or 'none'} (saehub recipe ls)",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def listing(catalog: Catalog | None = None) -> list[Entry]:
    """Every recipe that can be run by name, built-in ones first."""
    from saehub.recipe.load import read

    entries = []
    own = builtin()
    for name, path in _all(catalog).items():
        document = read(path)
        if document.root is None:
            description = f"cannot be read: {document.problems[0].message}" if document.problems else "empty"
        else:
            description = document.root.text("description") or ""
        origin = "built-in" if own.get(name) == path else f"plugin {name.partition('/')[0]}"
        entries.append(Entry(name, path, origin, description))
    return entries
