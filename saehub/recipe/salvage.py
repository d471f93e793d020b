"""A recipe with problems in; what is left of it without the parts that have them, so that the rest can be planned, out."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from saehub.recipe import library
from saehub.recipe.assemble import assemble, display, overrides_as_text
from saehub.recipe.rules import Rules
from saehub.recipe.schema import Recipe
from saehub.recipe.tree import Mark, Node, Problem, from_plain
from saehub.recipe.typed import fill

if TYPE_CHECKING:
    from saehub.plugins import Catalog
    from saehub.recipe.check import Overrides

VITAL = ("model", "data", "extract")
"""Sections on which everything else depends."""
HEART = ("model", "model.name", "model.shape", "data", "extract", "extract.uses", "extract.with", "extract.sites")
"""Parts of them without which there is nothing to plan; of the others a default stands in."""
TOKENS = 10**9
"""Stands in for `data.train.tokens`: enough for any batch."""
ENTRIES = ("train.", "saes.", "evaluate.", "export.")
ROUNDS = 4  # what one cut brings with it is cut in the next: a key, the map that lacks it, the entry that lacks that


def salvage(path_or_name: str | os.PathLike[str], overrides: Overrides, catalog: Catalog) -> Recipe | None:
    """The recipe without unknown keys, and without what keeps it from being one; None where nothing whole is left, or what is left would be
    another recipe: of another model or other sites. For a faulty setting of the model, the text or the extraction its default stands in.

    Wrong settings of components are taken out too; where that does not help they stay, and a plan passes over the entries that have them.
    """
    path = library.find(path_or_name, catalog)
    root, _, complete = assemble(path, display(path), overrides_as_text(overrides), catalog, None)
    whole = None
    for _ in range(ROUNDS if root is not None and complete else 0):
        found = Rules(root, catalog).run()
        recipe = fill(Recipe, root, found)
        errors = [problem for problem in found if problem.severity == "error"]
        unfit = [problem for problem in errors if _unknown_key(problem) or ".with" not in problem.path]
        if recipe is not None and not any(map(_unknown_key, unfit)):
            whole = recipe
            wrong = [problem for problem in errors if ".with" in problem.path]
            if not wrong or not all([_mend(root, problem) for problem in wrong]):
                return whole
            continue
        vital = any(_vital(problem) for problem in unfit)
        if not unfit or vital or not all([_stand_in(root, problem) or _cut(root, problem) for problem in unfit]):  # a list: every one is cut
            return whole
    return whole


def _mend(root: Node, problem: Problem) -> bool:
    """Take a component's wrong setting out, or give one that is needed the value 1; False where it is about no single setting."""
    if ".with." in problem.path:
        return _cut(root, problem)
    key = re.fullmatch(r"missing key '(\w+)'", problem.message)
    holder = next((node for node in _containers(root) if node.is_map and node.path == problem.path), None)
    if key is None or holder is None:
        return False
    holder.set(key[1], from_plain(1, holder.mark, f"{problem.path}.{key[1]}"))
    return True


def concerns(problem: Problem, path: str, message: str = "") -> bool:
    """Whether what a plan says about `path` could come from `problem`: both are about one entry, or one of them is inside the other. An
    unknown key changes nothing else, and of two settings of a component one that is not named beside the other."""
    if _unknown_key(problem):
        return False
    entry = ".".join(problem.path.split(".")[:2]) if problem.path.startswith(ENTRIES) else problem.path
    members = tuple(entry + mark for mark in "-@")  # of a sweep, or of several sites
    (mine, _, key), (other, _, knob) = problem.path.partition(".with."), path.partition(".with.")
    if key and knob and (other == mine or other.startswith(members)):
        return key.split(".")[0] == knob.split(".")[0] or key.split(".")[0] in re.findall(r"\w+", message)
    return _inside(entry, path) or _inside(path, entry) or (problem.path.startswith(ENTRIES) and path.startswith(members))


def shaky(problems: list[Problem], path: str, message: str) -> bool:
    """Whether what a plan says about `path` may come from a default that stands in: where text or extraction is faulty, all that counts rows."""
    faulty = any(problem.path.startswith(VITAL) and not _unknown_key(problem) for problem in problems)
    return faulty and (path.startswith(VITAL) and not path.startswith("extract.sites") or "rows of the stream" in message)


def _vital(problem: Problem) -> bool:
    if _unknown_key(problem) or ".sites." in problem.path:
        return False
    return problem.path in HEART and not problem.message.startswith("missing key") or problem.path.startswith(("model.shape.", "extract.with."))


def _stand_in(root: Node, problem: Problem) -> bool:
    """Give `data.train.tokens` a value where it has none that can be used; False for any other problem."""
    train = root.get("data").get("train") if root.get("data") is not None else None
    if train is None or not train.is_map or (problem.path, problem.message) != ("data.train", "missing key 'tokens'") and problem.path != "data.train.tokens":
        return False
    train.set("tokens", from_plain(TOKENS, train.mark, "data.train.tokens"))
    return True


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
