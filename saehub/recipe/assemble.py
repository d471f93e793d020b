"""A recipe file and `--set` options in; one tree out, with `extends` and shorthands resolved and every node's own file and line kept.

How a recipe builds on another (`extends: NAME or PATH`):

* maps merge key by key, the extending recipe wins;
* lists of entries (`train`, `saes`, `evaluate`, `export`) merge by `id` (where an entry has none: by what it `uses`): an entry with a
  known id changes that entry, others are appended;
* every other list (`sites`, `mix`, `exclude`, ...) is replaced;
* `{id: x, remove: true}` drops an entry, `out_of_sample: {remove: true}` drops a key;
* what belongs to a choice goes with it: another `uses` does not inherit `with`, another model `name` not `revision` and `shape`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import UsageError, did_you_mean
from saehub.recipe import library
from saehub.recipe.load import load_text, read
from saehub.recipe.schema import EvalData, SourceEntry, TrainData
from saehub.recipe.tree import Mark, Node, Problem, item_id, join, set_paths, show

if TYPE_CHECKING:
    from saehub.plugins import Catalog

ENTRY_LISTS = ("train", "saes", "evaluate", "export")
MAX_CHAIN = 16  # recipes that extend one another
_FOLLOWS = {"uses": ("with",), "name": ("revision", "shape")}  # keys that are not inherited past another choice
_SOURCE_KEYS = tuple(item.name for item in fields(SourceEntry))


def overrides_as_text(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """`{"train.x.with.k": 64}` as `["train.x.with.k=64"]`; a sequence of such texts as it is."""
    if isinstance(overrides, Mapping):
        return [f"{key}={_inline(key, value)}" for key, value in overrides.items()]
    if isinstance(overrides, str):
        overrides = [overrides]
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates, which cannot be printed.
    return ["".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in str(item)) for item in overrides]


def _inline(key: str, value: Any) -> str:
    from yaml.representer import RepresenterError

    from saehub.recipe.plain import dump_inline

    try:
        return dump_inline(value)
    except RepresenterError as error:
        found = f"{type(value).__module__}.{type(value).__name__}"
        raise UsageError(f"{key} cannot be set to {value!r:.80}, a {found}", fix="numbers, text, lists and maps; int(…) or float(…) of another library's number") from error


def assemble(path: Path, name: str, overrides: Sequence[str], catalog: Catalog | None, text: str | None = None) -> tuple[Node | None, list[Problem], bool]:
    """The whole tree of the recipe in `path` (or `text`, which stands there), or None; the problems so far; whether all that it extends is in it."""
    problems: list[Problem] = []
    root = _with_bases(path, name, catalog, problems, [], text)
    if root is None:
        return None, problems, False
    complete = not any(problem.path == "extends" or problem.file != name for problem in problems)
    for option in overrides:
        _override(root, option, problems)
    _expand_shorthands(root, problems)
    set_paths(root)
    _misplaced_removals(root, "", problems)
    return root, problems, complete


def display(path: Path) -> str:
    """A path as problems show it: relative to the working directory where it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except (OSError, ValueError):
        return str(path)


def _with_bases(path: Path, name: str, catalog: Catalog | None, problems: list[Problem], chain: list[Path], text: str | None = None) -> Node | None:
    document = read(path, name) if text is None else load_text(text, name)
    problems += document.problems
    if document.problems:
        return None
    root = document.root
    if root is None or root.data is None:
        hint = "begin with one that works: saehub recipe cp topk-llama my-recipe.yaml"
        problems.append(Problem(name, 0, 0, "", "the file is empty", hint))
        return None
    if not root.is_map:
        kind = "a list" if root.is_list else "a single value"
        problems.append(Problem.at(root.mark, "", f"a recipe is a map of keys (`saehub: 1`, `name: ...`), this file holds {kind}"))
        return None
    set_paths(root)
    _flat_sources(root, problems)
    base_name = root.data.pop("extends", None)
    if base_name is None:
        return root
    where = base_name.mark
    if not isinstance(base_name.data, str):
        problems.append(Problem.at(where, "extends", "should be the name or path of one recipe", "such as 'extends: topk-llama'"))
        return root
    for key in ("saehub", "name"):
        if key not in root.data:
            problems.append(Problem.at(root.mark, "", f"missing key {key!r}: a recipe that extends another has one of its own"))
    base_path = _find_base(base_name, path, catalog, problems)
    if base_path is None:
        return root
    here = [*chain, _real(path)]
    if _real(base_path) in here:
        circle = " -> ".join(display(item) for item in [*here[here.index(_real(base_path)) :], base_path])
        problems.append(Problem.at(where, "extends", f"recipes that extend each other in a circle: {circle}"))
        return root
    if len(here) > MAX_CHAIN:
        problems.append(Problem.at(where, "extends", f"more than {MAX_CHAIN} recipes extend one another"))
        return root
    base = _with_bases(base_path, display(base_path), catalog, problems, here)
    return root if base is None else _merge(base, root, "", problems)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _find_base(name: Node, path: Path, catalog: Catalog | None, problems: list[Problem]) -> Path | None:
    """A file beside the extending recipe, else by `library.find`."""
    for candidate in (path.parent / name.data, path.parent / f"{name.data}.yaml"):
        if library._is_file(candidate) and _real(candidate) != _real(path):
            return candidate
    try:
        return library.find(name.data, catalog)
    except UsageError as error:
        problems.append(Problem.at(name.mark, "extends", error.what, error.fix))
        return None


# --- merging -----------------------------------------------------------------------------------------------------------------


def _removed(node: Node) -> bool:
    mark = node.get("remove")
    return mark is not None and mark.data is True


def _merge(base: Node, over: Node, path: str, problems: list[Problem]) -> Node:
    if base.is_map and over.is_map:
        return _merge_maps(base, over, path, problems)
    if path in ENTRY_LISTS and base.is_list and over.is_list:
        return _merge_entries(base, over, path, problems)
    return over


def _merge_maps(base: Node, over: Node, path: str, problems: list[Problem]) -> Node:
    result = Node(dict(base.data), over.mark, dict(base.keys))
    for choice, followers in _FOLLOWS.items():
        if path == "" or (choice == "name" and path != "model"):
            continue
        mine, theirs = over.get(choice), base.get(choice)
        if mine is not None and theirs is not None and mine.data != theirs.data:
            for key in followers:
                result.data.pop(key, None)
    for key, value in over.data.items():
        if _removed(value):
            if key not in base.data:
                problems.append(Problem.at(over.keys[key], join(path, key), f"nothing to remove{did_you_mean(key, base.data)}"))
            result.data.pop(key, None)
        else:
            old = result.data.get(key)
            result.set(key, value if old is None else _merge(old, value, join(path, key), problems), over.keys[key])
    return result


def _merge_entries(base: Node, over: Node, path: str, problems: list[Problem]) -> Node:
    entries = list(base.data)
    added: list[Node] = []  # kept apart, so that two new entries of one id stay two, and are reported as such
    for new in over.data:
        name = item_id(new)
        names = [item_id(old) for old in entries]
        index = names.index(name) if name is not None and name in names else None
        if _removed(new):
            if index is None:
                known = [known for known in names if known]
                at = new.get("id") or new.get("uses") or new
                hint = f"the extended recipe has: {', '.join(known) or 'none'}"
                problems.append(Problem.at(at.mark, path, f"nothing to remove: no entry {name!r}{did_you_mean(name or '', known)}", hint))
            else:
                del entries[index]
        elif index is None:
            added.append(new)
        else:
            entries[index] = _merge_maps(entries[index], new, join(path, str(name)), problems)
    entries += added
    return Node(entries, over.mark)


def _misplaced_removals(node: Node, key: str, problems: list[Problem]) -> None:
    """`remove: true` that no merge has used up."""
    if key in ("with", "sweep"):
        return
    if node.is_map and _removed(node):
        del node.data["remove"]
        problems.append(Problem.at(node.keys["remove"], node.path, "'remove' has nothing to remove: it drops what an extended recipe brings"))
    for name, child in node.data.items() if node.is_map else (("", item) for item in node.items()):
        _misplaced_removals(child, name, problems)


# --- shorthands --------------------------------------------------------------------------------------------------------------


def _data_nodes(root: Node) -> list[tuple[Node, bool]]:
    """`data.train` and each of `data.eval`, with whether it is for evaluation."""
    data = root.get("data")
    train, evals = (data.get("train"), data.get("eval")) if data is not None else (None, None)
    found = [(train, False)] if train is not None else []
    found += [(node, True) for node in evals.data.values()] if evals is not None and evals.is_map else []
    return [(node, heldout) for node, heldout in found if node.is_map]


def _flat_sources(root: Node, problems: list[Problem]) -> None:
    """`{source: x, split: y}` becomes `{mix: [{source: x, split: y}]}` within one file, so that a flat source replaces an extended mix."""
    for node, _ in _data_nodes(root):
        if node.get("source") is None:
            continue
        if node.get("mix") is not None:
            at = node.keys["source"]
            problems.append(Problem.at(at, node.path, "'source' beside 'mix'", "put the source into the mix, with a weight"))
            del node.data["source"]
            continue
        entry = Node({}, node.data["source"].mark)
        for key in [key for key in node.data if key in _SOURCE_KEYS]:
            entry.set(key, node.data.pop(key), node.keys[key])
        node.set("mix", Node([entry], entry.mark), entry.mark)


def _expand_shorthands(root: Node, problems: list[Problem]) -> None:
    """After merging and `--set`: source settings that stand flat beside a mix of one go into it; `split` under `data.eval` is `heldout`."""
    for node, heldout in _data_nodes(root):
        known = {item.name for item in fields(EvalData if heldout else TrainData)}
        flat = [key for key in node.data if key in _SOURCE_KEYS and key not in known]
        mix = node.get("mix")
        if "source" in flat:  # only `--set` and an extending recipe reach this: another source, nothing inherited
            source = node.data.pop("source")
            mix = Node([Node({"source": source}, source.mark, {"source": node.keys["source"]})], source.mark)
            node.set("mix", mix, source.mark)
            flat.remove("source")
        if flat and mix is not None and len(mix.items()) == 1 and mix.data[0].is_map:
            mix.data[0] = Node(dict(mix.data[0].data), mix.data[0].mark, dict(mix.data[0].keys))
            for key in flat:
                mix.data[0].set(key, node.data.pop(key), node.keys[key])
        for entry in mix.items() if mix is not None and heldout else ():
            if entry.is_map and "split" not in entry.data:
                entry.set("split", Node("heldout", entry.mark))


# --- --set -------------------------------------------------------------------------------------------------------------------


def _override(root: Node, option: str, problems: list[Problem]) -> None:
    """Apply one `a.b=v`. Steps into lists go by id, by `uses`, or by index; the value follows the same YAML rules as a file."""
    mark = Mark(f"--set {option}")
    key, equals, value_text = option.partition("=")
    steps = [step.strip() for step in key.split(".")]

    def refuse(message: str, hint: str | None = None) -> None:
        problems.append(Problem.at(mark, "", message, hint))

    if not equals or not all(steps):
        return refuse("should be PATH=VALUE", "such as --set train.native-k32.with.k=64")
    if steps[0] == "extends":
        return refuse("'extends' cannot be set from outside", "write a recipe that extends the other one")
    document = load_text(value_text, mark.file)
    if document.problems:
        return refuse(document.problems[0].message, document.problems[0].hint)
    value = _at(document.root or Node(None, mark), mark)

    node, path = root, ""
    while steps:
        if node.is_list:
            index, used = _item(node, steps)
            if index is None:
                known = [item_id(item) for item in node.data if item_id(item)] or [str(i) for i in range(len(node.data))]
                return refuse(f"{path} has no entry {steps[0]!r}{did_you_mean(steps[0], known)}", f"entries: {', '.join(known) or 'none'}")
            path, steps = join(path, ".".join(steps[:used])), steps[used:]
            if steps == ["remove"] and value.data is True:
                del node.data[index]
                return None
            if not steps:
                node.data[index] = value
                return None
            node = node.data[index]
        elif node.is_map:
            used = next((n for n in range(len(steps), 0, -1) if ".".join(steps[:n]) in node.data), 1)  # a key may hold dots
            step, steps = ".".join(steps[:used]), steps[used:]
            path = join(path, step)
            if steps == ["remove"] and value.data is True and step in node.data and not _is_setting(path):
                del node.data[step]
                return None
            if not steps:
                node.set(step, value, mark)
                return None
            if node.data.get(step) is None or node.data[step].data is None:
                node.set(step, Node({}, mark), mark)
            node = node.data[step]
        else:
            return refuse(f"{path} is {show(node)}: there is no {steps[0]!r} in it")
    return None


def _is_setting(path: str) -> bool:
    """Inside a component's own settings, where `remove` may be a key of its own."""
    return ".with" in path


def _item(node: Node, steps: list[str]) -> tuple[int | None, int]:
    """The item that the first steps name, and how many steps that takes: ids may hold dots."""
    names = [item_id(item) for item in node.data]
    for used in range(len(steps), 0, -1):
        if names.count(".".join(steps[:used])) == 1:
            return names.index(".".join(steps[:used])), used
    step = steps[0]
    return (int(step), 1) if step.isascii() and step.isdigit() and len(step) < 6 and int(step) < len(node.data) else (None, 0)


def _at(node: Node, mark: Mark) -> Node:
    """The same value, all of it at one mark."""
    if node.is_map:
        return Node({key: _at(child, mark) for key, child in node.data.items()}, mark, dict.fromkeys(node.data, mark))
    if node.is_list:
        return Node([_at(child, mark) for child in node.data], mark)
    return Node(node.data, mark)
