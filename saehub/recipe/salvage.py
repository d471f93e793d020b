"""A recipe with problems in; what is left of it without the parts that have them, so that the rest can be planned, out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from saehub.recipe import library
from saehub.recipe.assemble import assemble, display, overrides_as_text
from saehub.recipe.rules import Rules
from saehub.recipe.schema import Recipe
from saehub.recipe.tree import Mark, Node, Problem
from saehub.recipe.typed import fill

if TYPE_CHECKING:
    from saehub.plugins import Catalog
    from saehub.recipe.check import Overrides

VITAL = ("model", "data", "extract")
"""Sections on which everything else depends."""
ENTRIES = ("train.", "saes.", "evaluate.", "export.")
ROUNDS = 4  # what one cut brings with it is cut in the next: a key, the map that lacks it, the entry that lacks that


def salvage(path_or_name: str | os.PathLike[str], overrides: Overrides, catalog: Catalog) -> Recipe | None:
    """The recipe without unknown keys, and without what keeps it from being one; None where nothing whole is left, or what is left would be
    another recipe: without its model, its text or its extractor's settings.

    Wrong settings of components stay: a plan passes over the entries that have them.
    """
    path = library.find(path_or_name, catalog)
    root, _, complete = assemble(path, display(path), overrides_as_text(overrides), catalog, None)
    for _ in range(ROUNDS if root is not None and complete else 0):
        found = Rules(root, catalog).run()
        recipe = fill(Recipe, root, found)
        unfit = [problem for problem in found if problem.severity == "error" and (_unknown_key(problem) or ".with" not in problem.path)]
        if recipe is not None and not any(map(_unknown_key, unfit)):
            return recipe
        vital = any(problem.path.startswith(VITAL) and ".sites." not in problem.path and not _unknown_key(problem) for problem in unfit)
        if not unfit or vital or not all([_cut(root, problem) for problem in unfit]):  # a list: every one is cut
            return None
    return None


def concerns(problem: Problem, path: str) -> bool:
    """Whether what a plan says about `path` could come from `problem`: both are about one entry, or one of them is inside the other. An
    unknown key changes nothing else."""
    if _unknown_key(problem):
        return False
    entry = ".".join(problem.path.split(".")[:2]) if problem.path.startswith(ENTRIES) else problem.path
    members = tuple(entry + mark for mark in "-@")  # of a sweep, or of several sites
    return _inside(entry, path) or _inside(path, entry) or (problem.path.startswith(ENTRIES) and path.startswith(members))


def _inside(path: str, other: str) -> bool:
    return not other or path == other or path.startswith(other + ".")


def _unknown_key(problem: Problem) -> bool:
    return problem.message.startswith("unknown key")


def _cut(root: Node, problem: Problem) -> bool:
    """Take the value that a problem points at (or, if that is gone, the nearest one above it) out of the tree; False if that is the root."""
    place = Mark(problem.file, problem.line, problem.column, problem.source_line)
    path = problem.path
    while path:
        for node in _containers(root):
            for key, child in list(node.data.items() if node.is_map else enumerate(node.data)):
                if child.path == path and not _unknown_key(problem):
                    del node.data[key]
                    return True
                if node.is_map and node.path == path and _unknown_key(problem) and node.keys[key] == place:
                    del node.data[key]
                    return True
        path = path.rpartition(".")[0]
    if _unknown_key(problem):
        for key in [key for key in root.data if root.keys[key] == place]:
            del root.data[key]
            return True
    return False


def _containers(node: Node) -> list[Node]:
    """The maps and lists of a tree, outer ones first."""
    children = node.data.values() if node.is_map else node.items()
    return [node, *(inner for child in children if child.is_map or child.is_list for inner in _containers(child))]
