"""A node and a dataclass in; an instance of it, or every reason why not, each at its place, out. pydantic judges, strictly."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from functools import lru_cache
from typing import Any

from saehub.errors import did_you_mean
from saehub.recipe.schema import yaml_name
from saehub.recipe.tree import Node, Problem, copy, join, plain, show, walk

LAYERS = 8
"""How many problems of one part of a recipe are looked behind."""
_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a map (key: value)",
    "mapping_type": "a map (key: value)",
    "dataclass_type": "a map (key: value)",
}
_MAIN = {"ModelEntry": "name", "TrainData": "source", "EvalData": "source", "SourceEntry": "source", "TrainEntry": "uses", "UseEntry": "uses", "SaeEntry": "load"}
"""What a part of a recipe is mostly about: the key that somebody means who writes the value alone."""
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


@lru_cache(maxsize=256)
def adapter(cls: type) -> Any:
    """pydantic's TypeAdapter of a dataclass (a few ms to build, so kept)."""
    import pydantic

    return pydantic.TypeAdapter(cls)


@lru_cache(maxsize=256)
def keys_of(cls: type) -> dict[str, Any]:
    """YAML key -> type, of the fields that a user may set."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {yaml_name(item.name): hints[item.name] for item in dataclasses.fields(cls) if item.init}


def fill(cls: type, node: Node, problems: list[Problem], what: str = "") -> Any:
    """An instance of dataclass `cls` from a map; None, with `problems` extended, when it is not valid.

    `what` names the owner of the keys in messages ("native/topk"). Whatever the class itself raises is a problem too."""
    import json

    import pydantic

    before = len(problems)
    try:
        unknown_keys(cls, node, problems, what)
        return _checked(adapter(cls).validate_json(json.dumps(plain(node)), strict=True), len(problems) == before)
    except pydantic.ValidationError as error:
        found = _in_our_words(error.errors(include_url=False), node)
        problems += [*found, *_behind(cls, node, found)]
    except Exception as error:  # a plugin's own class: types that cannot be resolved, a __post_init__ that fails otherwise
        text = f"{type(error).__name__}: {error}"
        problems.append(Problem.at(node.mark, node.path, f"{what or cls.__name__} does not accept this: {text}"))
    return None


def _behind(cls: type, node: Node, found: list[Problem]) -> list[Problem]:
    """What the class says of the other settings once those that `found` is about are gone: a value of the wrong type keeps it from judging any,
    and it stops at the first that it does not accept. What speaks of a setting that is gone is left out: it is of a default then.
    """
    import json

    import pydantic

    rest, gone, more = copy(node), set(), []
    paths = [problem.path for problem in found]
    for _ in range(LAYERS):
        if not all([_drop(rest, path, gone) for path in dict.fromkeys(paths)]):
            break
        try:
            adapter(cls).validate_json(json.dumps(plain(rest)), strict=True)
            break
        except pydantic.ValidationError as error:
            told, paths = error.errors(include_url=False), []
            if not _fill_in(rest, told, gone):
                found = [problem for problem in _in_our_words(told, rest) if not _of_another(problem, gone)]
                more, paths = more + found, [problem.path for problem in found]
                if not paths:
                    break
        except Exception:  # noqa: BLE001  (said already, or of the defaults)
            break
    return more


def _fill_in(node: Node, errors: list[dict[str, Any]], gone: set[str]) -> bool:
    """Give a setting that is gone and has no default the value 1; whether that was to be done."""
    missing = [error["loc"] for error in errors if error["type"] == "missing" and error["loc"][-1] in gone]
    for loc in missing:
        holder = _locate(node, loc[:-1])
        holder.set(str(loc[-1]), Node(1, holder.mark, path=join(holder.path, str(loc[-1]))))
    return bool(missing)


def _drop(node: Node, path: str, gone: set[str]) -> bool:
    """Take the setting at `path`, or the map's key that holds it, out of the tree; False where there is none."""
    for holder in walk(node):
        for key, child in list(holder.data.items()) if holder.is_map else ():
            if child.path == path or (child.is_list and path.startswith(f"{child.path}.")):
                del holder.data[key]
                gone.add(key)
                return True
    return False


def _of_another(problem: Problem, gone: set[str]) -> bool:
    words = set(re.findall(r"\w+", problem.message))
    return problem.message.startswith("missing key") or problem.path.rpartition(".")[2] in gone or bool(words & gone)


def _checked(value: Any, ok: bool) -> Any:
    return value if ok else None


# --- unknown keys ------------------------------------------------------------------------------------------------------------


def unknown_keys(hint: Any, node: Node, problems: list[Problem], what: str = "") -> None:
    """A problem for every key that no dataclass at its place has, all the way down."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        unknown_keys(args[0], node, problems, what)
    elif origin in (typing.Union, types.UnionType):
        fitting = [arm for arm in args if _fits(arm, node)]
        if len(fitting) == 1:
            unknown_keys(fitting[0], node, problems, what)
    elif dataclasses.is_dataclass(hint) and node.is_map:
        known = keys_of(hint)
        for key, child in node.data.items():
            if key in known:
                unknown_keys(known[key], child, problems, what)
            else:
                problems.append(_unknown(key, node, known, what))
    elif origin in (tuple, list, set, frozenset) or (origin and node.is_list):
        for index, child in enumerate(node.items()):
            if args:
                unknown_keys(args[0] if len(args) == 1 or args[-1] is Ellipsis else args[min(index, len(args) - 1)], child, problems, what)
    elif node.is_map and len(args) == 2:
        for child in node.data.values():
            unknown_keys(args[1], child, problems, what)


def _fits(arm: Any, node: Node) -> bool:
    bare = typing.get_args(arm)[0] if typing.get_origin(arm) is typing.Annotated else arm
    if node.is_map:
        return dataclasses.is_dataclass(bare) or typing.get_origin(bare) is dict
    return node.is_list and typing.get_origin(bare) in (tuple, list, set, frozenset)


def _unknown(key: str, node: Node, known: dict[str, Any], what: str) -> Problem:
    head, colon, rest = key.partition(":")
    near = did_you_mean(key, known)
    if colon and head in known:  # `{k:32}` is one key, `k:32`
        hint = f"put a space after the colon: {head}: {rest.strip()}"
    else:
        hint = f"known keys: {', '.join(known) or 'none'}" if not near else None
    owner = f" of {what}" if what else ""
    return Problem.at(node.keys[key], node.path, f"unknown key {key!r}{owner}{near}", hint)


# --- pydantic's errors -------------------------------------------------------------------------------------------------------


def _in_our_words(errors: list[dict[str, Any]], root: Node) -> list[Problem]:
    """One problem a place: the arms of a union that failed there are joined."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    places: dict[tuple[int, str], Node] = {}
    for error in errors:
        node = _locate(root, error["loc"])
        extra = str(error["loc"][-1]) if error["type"] == "missing" else ""
        groups.setdefault((id(node), extra), []).append(error)
        places[id(node), extra] = node
    return [_problem(found, places[key], key[1]) for key, found in groups.items()]


def _locate(root: Node, loc: tuple[Any, ...]) -> Node:
    """The node that a location leads to; names of union arms in it lead nowhere and are passed over."""
    node = root
    for step in loc:
        if isinstance(step, str) and node.is_map and step in node.data:
            node = node.data[step]
        elif isinstance(step, int) and node.is_list and step < len(node.data):
            node = node.data[step]
    return node


def _problem(errors: list[dict[str, Any]], node: Node, missing: str) -> Problem:
    first = errors[0]
    if missing:
        if isinstance(first["loc"][-1], int):  # a tuple of fixed length
            return Problem.at(node.mark, node.path, f"should have at least {first['loc'][-1] + 1} items, got {len(node.items())}")
        return Problem.at(node.mark, node.path, f"missing key {missing!r}")
    kind = first["type"]
    if kind == "value_error":
        return _own_words(str(first["ctx"]["error"]), node)
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return Problem.at(node.mark, node.path, f"should be {word} {first['ctx'][key]:g}, got {show(node)}")
    if kind in ("too_short", "too_long"):
        bound, word = (first["ctx"].get("min_length"), "at least") if kind == "too_short" else (first["ctx"].get("max_length"), "at most")
        return Problem.at(node.mark, node.path, f"should have {word} {bound} item{'s' if bound != 1 else ''}, got {first['ctx'].get('actual_length')}")
    if kind == "string_pattern_mismatch":
        return Problem.at(node.mark, node.path, f"should match {first['ctx']['pattern']}, got {show(node)}")
    expected, near = [], ""
    for error in errors:
        if error["type"] in _KINDS:
            expected.append(_KINDS[error["type"]])
        elif error["type"] == "literal_error":
            expected.append(error["ctx"]["expected"].replace("'", ""))
            choices = [word.strip("' ") for word in error["ctx"]["expected"].replace(" or ", ",").split(",")]
            near = did_you_mean(str(node.data), choices)
        else:
            return Problem.at(node.mark, node.path, f"{error['msg'].replace('Input should', 'should')}, got {show(node)}")
    if first["type"] == "dataclass_type" and isinstance(node.data, str) and (key := _MAIN.get(first["ctx"]["class_name"])):
        return Problem.at(node.mark, node.path, f"should be a map (key: value), got {show(node)}", f"write {{{key}: {node.data}}}")
    expected = list(dict.fromkeys(expected))
    return Problem.at(node.mark, node.path, f"should be {' or '.join(expected)}, got {show(node)}{near}", _hint({e["type"] for e in errors}, node))


def _hint(kinds: set[str], node: Node) -> str | None:
    value = node.data
    if value is None:
        return "delete the key to get its default"
    if kinds & {"list_type", "tuple_type"} and not isinstance(value, dict):
        return f"write a list: [{value}]"
    if "string_type" in kinds and isinstance(value, (int, float, bool)):
        return "text that looks like a number or a truth value needs quotes"
    if kinds & {"int_type", "float_type", "bool_type"} and isinstance(value, str):
        from saehub.recipe.load import scalar

        try:
            unquoted = scalar(value)
        except ValueError:
            return None
        return f"without the quotes: {value}" if not isinstance(unquoted, str) and unquoted is not None else None
    return None


def _own_words(text: str, node: Node) -> Problem:
    """A ValueError of the dataclass itself: `key: ...`, or a sentence that begins with a key, is placed at that key."""
    key, colon, rest = text.partition(":")
    if colon and key.strip().isidentifier():
        key, message = yaml_name(key.strip()), rest.strip()
        child = node.get(key)
        return Problem.at(child.mark if child is not None else node.mark, join(node.path, key), message)
    child = node.get(text.split(" ")[0])
    return Problem.at(child.mark if child is not None else node.mark, child.path if child is not None else node.path, text)
