"""Parsed YAML in, as nodes that remember where they were written; problems that point at the place out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

WIDTH = 120  # columns of a source line that a problem shows


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file (or in a `--set` option)."""

    file: str
    """The file as the user would write it, or the whole option, `--set a.b=v`."""
    line: int = 0
    """From 1; 0 where there is no line (an option, a file that cannot be opened)."""
    column: int = 0
    """From 1, in characters."""
    source_line: str = ""
    """The line as written."""


@dataclass(slots=True)
class Node:
    """One YAML value with its place."""

    data: Any
    """`dict[str, Node]`, `list[Node]`, or str, int, float, bool, None."""
    mark: Mark
    keys: dict[str, Mark] = field(default_factory=dict)
    """Where each key of a map stands."""
    path: str = ""
    """Dotted path in the recipe, as `--set` takes it."""

    @property
    def is_map(self) -> bool:
        return isinstance(self.data, dict)

    @property
    def is_list(self) -> bool:
        return isinstance(self.data, list)

    def get(self, key: str) -> Node | None:
        """The value under `key`; None when there is none, or when this is no map."""
        return self.data.get(key) if isinstance(self.data, dict) else None

    def text(self, key: str) -> str | None:
        """The value under `key` where it is text."""
        child = self.get(key)
        return child.data if child is not None and isinstance(child.data, str) else None

    def items(self) -> list[Node]:
        """The items of a list; empty for anything else."""
        return self.data if isinstance(self.data, list) else []

    def set(self, key: str, value: Node, mark: Mark | None = None) -> None:
        """Put `value` under `key` of a map."""
        self.data[key] = value
        self.keys[key] = mark or value.mark


def plain(node: Node) -> Any:
    """The node as ordinary Python data; a whole number written with an exponent (`1e6`) is an int."""
    if isinstance(node.data, dict):
        return {key: plain(child) for key, child in node.data.items()}
    if isinstance(node.data, list):
        return [plain(child) for child in node.data]
    if isinstance(node.data, float) and node.data.is_integer() and abs(node.data) < 2**53:
        return int(node.data)
    return node.data


def from_plain(data: Any, mark: Mark, path: str = "") -> Node:
    """Ordinary data as nodes that all stand at `mark`."""
    if isinstance(data, dict):
        items = {str(key): from_plain(value, mark, join(path, str(key))) for key, value in data.items()}
        return Node(items, mark, dict.fromkeys(items, mark), path)
    if isinstance(data, (list, tuple)):
        return Node([from_plain(value, mark, join(path, str(index))) for index, value in enumerate(data)], mark, path=path)
    return Node(data, mark, path=path)


def copy(node: Node) -> Node:
    """A copy that shares nothing but marks."""
    if isinstance(node.data, dict):
        return Node({key: copy(child) for key, child in node.data.items()}, node.mark, dict(node.keys), node.path)
    if isinstance(node.data, list):
        return Node([copy(child) for child in node.data], node.mark, path=node.path)
    return Node(node.data, node.mark, path=node.path)


def join(path: str, key: str) -> str:
    """The dotted path of `key` inside `path`."""
    return f"{path}.{key}" if path else key


def item_id(node: Node) -> str | None:
    """What an item of a list is called: its `id`, else the component that it `uses`."""
    return node.text("id") or node.text("uses")


def set_paths(node: Node, path: str = "") -> None:
    """Write every node's dotted path; items of a list go by their id where that is unique, else by index."""
    node.path = path
    if isinstance(node.data, dict):
        for key, child in node.data.items():
            set_paths(child, join(path, key))
    elif isinstance(node.data, list):
        names = [item_id(child) for child in node.data]
        for index, (child, name) in enumerate(zip(node.data, names)):
            set_paths(child, join(path, name if name and names.count(name) == 1 else str(index)))


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it."""
    yield node
    children = node.data.values() if isinstance(node.data, dict) else node.data if isinstance(node.data, list) else ()
    for child in children:
        yield from walk(child)


def show(value: Any) -> str:
    """A value as a problem quotes it: short, and in YAML's words."""
    if isinstance(value, Node):
        value = value.data
    if isinstance(value, dict):
        return "a map"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a recipe, and where."""

    file: str
    """The file, or `--set a.b=v`."""
    line: int
    """From 1; 0: no line."""
    column: int
    """From 1."""
    path: str
    """Dotted path in the recipe, such as `train.native-k32.with.k`; may be empty."""
    message: str
    """What is wrong: observed against expected."""
    hint: str | None = None
    """What to write instead, or to run."""
    source_line: str = ""
    """The line as written."""
    severity: Literal["error", "warning", "missing"] = "error"
    """`error`: the recipe cannot run; `missing`: a library is not installed (exit code 3 at run); `warning`: it runs."""

    @classmethod
    def at(cls, mark: Mark, path: str, message: str, hint: str | None = None, severity: str = "error") -> Problem:
        """A problem at a mark."""
        return cls(mark.file, mark.line, mark.column, path, message, hint, mark.source_line, severity)

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        label = "" if self.severity == "error" else f"{self.severity}: "
        lines = [f"{place}: {label}{self.path + ': ' if self.path else ''}{self.message}"]
        if self.line and self.source_line:
            text, column = _window(self.source_line, self.column)
            number = str(self.line).rjust(5)
            # A tab stays a tab and a wide character takes two columns, so that the caret stands under its character.
            pad = "".join("\t" if c == "\t" else "  " if unicodedata.east_asian_width(c) in "WF" else " " for c in text[: column - 1])
            lines += [f"{number} | {text}", f"{' ' * len(number)} | {pad}^"]
        if self.hint:
            lines.append(f"      = {self.hint}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def _window(line: str, column: int) -> tuple[str, int]:
    """The part of a long line that surrounds `column`, and the column within it."""
    if len(line) <= WIDTH:
        return line, column
    start = max(0, min(column - 1 - WIDTH // 2, len(line) - WIDTH))
    head, tail = ("..." if start else ""), ("..." if start + WIDTH < len(line) else "")
    return head + line[start : start + WIDTH] + tail, column - start + len(head)
