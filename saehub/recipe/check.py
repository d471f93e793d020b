"""A recipe's name or path, overrides and the catalogue of plugins in; the recipe, and all its problems at once, out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import RecipeError, UsageError
from saehub.recipe import library
from saehub.recipe.assemble import assemble, display, overrides_as_text
from saehub.recipe.components import make_config
from saehub.recipe.rules import Rules
from saehub.recipe.schema import FORMAT_VERSION, Recipe
from saehub.recipe.tree import Node, Problem, set_paths, show, walk
from saehub.recipe.typed import fill

if TYPE_CHECKING:
    from saehub.plugins import Catalog

__all__ = ["check", "check_text", "locator", "make_config", "resolve"]

SECTIONS = {"model", "data", "extract", "train", "saes", "evaluate", "export"}

Overrides = Sequence[str] | Mapping[str, Any]


def check(path_or_name: str | os.PathLike[str], overrides: Overrides = (), catalog: Catalog | None = None) -> tuple[Recipe | None, list[Problem]]:
    """Read, merge, override and check a recipe; nothing heavier than a plugin's registrations and config classes is imported.

    Args:
        path_or_name: a file, or a name of `saehub recipe ls`.
        overrides: `["train.native-k32.with.k=64"]`, or `{"train.native-k32.with.k": 64}`.
        catalog: the installed plugins unless given.

    Returns:
        The recipe (sweeps not expanded; None when there is an error), and all problems: errors, warnings, missing libraries.
    """
    try:
        path = library.find(path_or_name, catalog)
    except UsageError as error:
        return None, [Problem(os.fspath(path_or_name), 0, 0, "", error.what, error.fix)]
    given = Path(os.fspath(path_or_name))
    return _check(path, str(given) if given == path else display(path), overrides, catalog, None)


def check_text(text: str, name: str = "recipe.yaml", overrides: Overrides = (), catalog: Catalog | None = None) -> tuple[Recipe | None, list[Problem]]:
    """`check` of YAML that stands in no file; `name` is what problems call it, and where relative `extends` start from."""
    return _check(Path(name), name, overrides, catalog, text)


def resolve(
    path_or_name: str | os.PathLike[str],
    overrides: Overrides = (),
    catalog: Catalog | None = None,
    on_problem: Callable[[Problem], None] | None = None,
) -> Recipe:
    """The recipe, or a RecipeError that holds and prints all its problems.

    Warnings and missing libraries do not stop it; they go to `on_problem`."""
    recipe, problems = check(path_or_name, overrides, catalog)
    errors = [problem for problem in problems if problem.severity == "error"]
    if recipe is None:
        count = f"{len(errors)} problem{'s' if len(errors) != 1 else ''}"
        raise RecipeError(f"{count} in {os.fspath(path_or_name)}", problems)
    for problem in problems:
        if on_problem is not None:
            on_problem(problem)
    return recipe


def locator(path_or_name: str | os.PathLike[str], overrides: Overrides = (), catalog: Catalog | None = None) -> Callable[[str, str, str | None], Problem]:
    """A function (dotted path, message, hint) -> Problem at the place in the recipe that the path names, or at the nearest one above it.

    For problems that show only when a recipe is planned."""
    path = library.find(path_or_name, catalog)
    root, _, _ = assemble(path, display(path), overrides_as_text(overrides), catalog, None)
    nodes: dict[str, Node] = {}
    if root is not None:
        set_paths(root)
        nodes = {node.path: node for node in walk(root)}

    def at(dotted: str, message: str, hint: str | None = None) -> Problem:
        prefix = dotted
        while prefix and prefix not in nodes:
            prefix = prefix.rpartition(".")[0]
        node = nodes.get(prefix)
        return Problem(display(path), 0, 0, dotted, message, hint) if node is None else Problem.at(node.mark, dotted, message, hint)

    return at


def _check(path: Path, name: str, overrides: Overrides, catalog: Catalog | None, text: str | None) -> tuple[Recipe | None, list[Problem]]:
    if catalog is None:
        from saehub.plugins import catalog as installed

        catalog = installed()
    options = overrides_as_text(overrides)
    root, problems, complete = assemble(path, name, options, catalog, text)
    recipe = None
    if root is not None:
        version = _version_problem(root)
        if version is not None:
            problems.append(version)
        else:
            found = Rules(root, catalog).run()
            recipe = fill(Recipe, root, found)
            if not complete:  # what an unreadable base would have brought is not missing here
                found = [problem for problem in found if not _absence(problem)]
            problems += found
    problems = _sorted(problems, name, options)
    failed = any(problem.severity == "error" for problem in problems)
    return (None if failed else recipe), problems


def _absence(problem: Problem) -> bool:
    return problem.message.startswith(("missing key", "nothing to do", "no sites", "training needs", "no text", "no SAE has")) or "needs a dataset" in problem.message


def in_order(problems: list[Problem], path_or_name: str | os.PathLike[str], overrides: Overrides) -> list[Problem]:
    """Without repetitions; the recipe's own file first, then those that it extends, then options; by line and column."""
    path, given = library.find(path_or_name), Path(os.fspath(path_or_name))
    return _sorted(problems, str(given) if given == path else display(path), overrides_as_text(overrides))


def _version_problem(root: Node) -> Problem | None:
    node = root.get("saehub")
    if node is None:
        if not set(root.data) & SECTIONS:
            hint = "a recipe begins with `saehub: 1`, a name and a model; one that works: saehub recipe cp topk-llama my-recipe.yaml"
            return Problem.at(root.mark, "", "this is no recipe: none of a recipe's sections is in it", hint)
        return None  # the schema says that it is missing
    if isinstance(node.data, bool) or not isinstance(node.data, int):
        return Problem.at(node.mark, "saehub", f"should be the version of the recipe format, {FORMAT_VERSION}, got {show(node)}")
    if node.data == FORMAT_VERSION:
        return None
    hint = "pip install -U saehub" if node.data > FORMAT_VERSION else f"write saehub: {FORMAT_VERSION}"
    return Problem.at(node.mark, "saehub", f"recipe format {node.data} is not known; this saehub reads format {FORMAT_VERSION}", hint)


def _sorted(problems: list[Problem], name: str, options: list[str]) -> list[Problem]:
    """Without repetitions; the recipe's own file first, then those that it extends, then options; by line and column."""
    order = {name: 0}
    for problem in problems:
        if not problem.file.startswith("--set "):
            order.setdefault(problem.file, len(order))
    for option in options:
        order.setdefault(f"--set {option}", len(order))
    return sorted(dict.fromkeys(problems), key=lambda problem: (order[problem.file], problem.line, problem.column))
