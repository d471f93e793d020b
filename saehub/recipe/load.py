"""YAML text in, nodes with file, line and column out; whatever is not strict YAML 1.2 comes out as problems instead.

PyYAML scans and parses (it reads YAML 1.1 syntax, which differs in no way that a recipe meets); plain scalars are resolved here,
by the core schema of YAML 1.2 with one addition, `1_000_000`. So `1e-4` is a number, `no` and `12:30` are text, `010` is ten.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from saehub.recipe.tree import Mark, Node, Problem, copy

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_NODES = 20_000  # after aliases are expanded
MAX_DIGITS = 40

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE, _FALSE = re.compile(r"true|True|TRUE"), re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_LINE_END = re.compile(r"\r\n|[\r\n\x85\u2028\u2029]")  # what PyYAML counts as the end of a line
_CONFLICT = re.compile(r"(<{7}|={7}|>{7})(?: |$)")


@dataclass
class Document:
    """One YAML document, or the problems that kept it from being one."""

    name: str
    root: Node | None = None
    problems: list[Problem] = field(default_factory=list)


def scalar(text: str) -> str | int | float | bool | None:
    """The value of a plain (unquoted) scalar; ValueError for a number that cannot be used."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    is_int = _INT.fullmatch(text)
    if not (is_int or _BASED.fullmatch(text) or _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text)):
        return text
    if len(text) > MAX_DIGITS:
        raise ValueError("a number of so many digits; put it in quotes if it is text")
    if is_int:
        return int(text.replace("_", ""), 10)
    if _BASED.fullmatch(text):
        return int(text, 0)
    value = math.inf if _NOT_FINITE.fullmatch(text) else float(text.replace("_", ""))
    if not math.isfinite(value):  # 1e999 too
        raise ValueError(f"{text} is not a finite number")
    return value


def read(path: Path, name: str | None = None) -> Document:
    """The document in a file; a file that cannot be read is a problem, not an exception."""
    name = name or str(path)

    def refuse(message: str, hint: str | None = None) -> Document:
        return Document(name, None, [Problem(name, 0, 0, "", message, hint)])

    try:
        if path.is_dir():
            return refuse("this is a folder, not a recipe file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            return refuse(f"{size:,} bytes is no recipe (at most {MAX_BYTES:,})", "is this a checkpoint or a data file?")
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        return refuse(f"the file cannot be read: {reason}")
    return load_bytes(raw, name)


def load_bytes(raw: bytes, name: str) -> Document:
    """`load_text` of UTF-8 bytes, with or without a byte-order mark."""
    try:
        return load_text(raw.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        head = before.rpartition(b"\n")[2].decode("utf-8")
        tail = raw[error.start :].partition(b"\n")[0].decode("utf-8", errors="replace")
        source_line = (head + tail).rstrip("\r")
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        return Document(name, None, [Problem(name, line, len(head) + 1, "", message, "save the file with UTF-8 encoding", source_line)])


def load_text(text: str, name: str) -> Document:
    """Parse one YAML document; `name` is what problems call it."""
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_BYTES:
        return Document(name, None, [Problem(name, 0, 0, "", f"{len(text):,} characters is no recipe (at most {MAX_BYTES:,})")])
    lines = _LINE_END.split(text)

    def mark(line: int, column: int) -> Mark:
        return Mark(name, line + 1, column + 1, lines[line] if line < len(lines) else "")

    document = Document(name)
    conflicts = [index for index, line in enumerate(lines) if _CONFLICT.match(line)]
    if any(lines[index].startswith("<") for index in conflicts):
        starts = [index for index in conflicts if lines[index].startswith("<")]
        document.problems = [
            Problem.at(mark(index, 0), "", "an unresolved merge conflict", "keep one side and delete the lines <<<<<<<, ======= and >>>>>>>")
            for index in starts
        ]
        return document
    if bad := Reader.NON_PRINTABLE.search(text):
        before = _LINE_END.split(text[: bad.start()])
        document.problems.append(Problem.at(mark(len(before) - 1, len(before[-1])), "", f"character U+{ord(bad.group()):04X} cannot stand in YAML"))
        return document
    composer = _Composer(text, mark)
    try:
        root = composer.get_single_node()
        if root is not None:
            document.root = _Converter(mark, document.problems).convert(root)
    except _Refused as refused:
        document.problems.append(refused.problem)
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error, mark, lines))
    if document.problems:
        document.root = None
    return document


class _Refused(Exception):
    """Stops at something that cannot be read past."""

    def __init__(self, problem: Problem):
        super().__init__(problem.message)
        self.problem = problem


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's own composer with explicit tags refused and depth bounded; it resolves no scalars."""

    def __init__(self, text: str, mark: Any):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._mark, self._depth = mark, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        where = self._mark(event.start_mark.line, event.start_mark.column)
        if getattr(event, "tag", None) is not None:
            raise _Refused(Problem.at(where, "", f"tags such as {event.tag!r} are not used in recipes", "remove the part from '!' on; text can be quoted"))
        if self._depth >= MAX_DEPTH:
            raise _Refused(Problem.at(where, "", f"nested more than {MAX_DEPTH} levels deep"))
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Converter:
    """PyYAML nodes in, ours out: scalars resolved, aliases and `<<` expanded within bounds, duplicate keys refused."""

    def __init__(self, mark: Any, problems: list[Problem]):
        self._place, self._problems = mark, problems
        self._count, self._open = 0, []

    def _mark(self, node: Any) -> Mark:
        return self._place(node.start_mark.line, node.start_mark.column)

    def convert(self, node: Any) -> Node:
        where = self._mark(node)
        self._count += 1
        if self._count > MAX_NODES:
            raise _Refused(Problem.at(where, "", f"more than {MAX_NODES:,} values once aliases (*) are expanded", "write fewer, or fewer nested, aliases"))
        if id(node) in self._open:
            raise _Refused(Problem.at(where, "", "an alias (*) inside the value that it stands for"))
        if len(self._open) >= MAX_DEPTH:
            raise _Refused(Problem.at(where, "", f"nested more than {MAX_DEPTH} levels deep once aliases (*) are expanded"))
        self._open.append(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, where)
            if isinstance(node, yaml.SequenceNode):
                return Node([self.convert(child) for child in node.value], where)
            return self._map(node, where)
        finally:
            self._open.pop()

    def _scalar(self, node: Any, where: Mark) -> Node:
        if node.style:  # quoted or a block: text, whatever it looks like
            return Node(node.value, where)
        try:
            return Node(scalar(node.value), where)
        except ValueError as error:
            self._problems.append(Problem.at(where, "", str(error)))
            return Node(None, where)

    def _map(self, node: Any, where: Mark) -> Node:
        result, merged = Node({}, where), []
        for key_node, value_node in node.value:
            at = self._mark(key_node)
            value = self.convert(value_node)
            key = scalar_or_text(key_node)
            if not isinstance(key, str):
                kind = "a list or map" if not isinstance(key_node, yaml.ScalarNode) else repr(key_node.value)
                self._problems.append(Problem.at(at, "", f"a key must be text, got {kind}", "put it in quotes if it is meant as text"))
            elif key == "<<" and not key_node.style:
                merged += self._merge(value, at)
            elif key in result.data:
                first = result.keys[key]
                self._problems.append(Problem.at(at, "", f"the key {key!r} stands here a second time", f"the first is in line {first.line}; keep one"))
            else:
                result.set(key, value, at)
        for base in merged:  # YAML's merge: what stands in the map itself wins, then earlier bases
            for key, value in base.data.items():
                if key not in result.data:
                    result.set(key, copy(value), base.keys[key])
        return result

    def _merge(self, value: Node, at: Mark) -> list[Node]:
        bases = value.data if isinstance(value.data, list) else [value]
        if all(base.is_map for base in bases):
            return bases
        self._problems.append(Problem.at(at, "", "<< takes an alias of a map, such as '<<: *defaults'"))
        return []


def scalar_or_text(node: Any) -> Any:
    """A key: its value; None for a key that is no usable scalar."""
    if not isinstance(node, yaml.ScalarNode):
        return None
    if node.style:
        return node.value
    try:
        return scalar(node.value)
    except ValueError:
        return None


_PARTNER = {"]": "[", "}": "{"}


def _closer_alone(lines: list[str], line: int) -> tuple[int, int, str, str] | None:
    """The first bracket that closes nothing, in the top-level value that `line` belongs to: (line, column, it, its partner).

    Only if without it every bracket has its partner: else what is open is what lacks its end.
    """
    tops = [number for number, text in enumerate(lines) if text[:1].strip() and text[0] not in "]}#"]
    first = max((number for number in tops if number <= line), default=0)
    last = min((number for number in tops if number > line), default=len(lines))
    stack: list[str] = []
    found, quote = None, ""
    for number in range(first, last):
        before = " "  # the last character that was not a space
        for column, char in enumerate(lines[number]):
            if quote:
                quote = "" if char == quote and not (quote == '"' and lines[number][column - 1] == "\\") else quote
            elif char in "'\"" and before in " :,[{-":
                quote = char
            elif char == "#" and (column == 0 or lines[number][column - 1] in " \t"):
                break
            elif char in "[{":
                stack.append(char)
            elif char in "]}" and stack and stack[-1] == _PARTNER[char]:
                stack.pop()
            elif char in "]}":
                if found is not None or _PARTNER[char] in stack:
                    return None
                found = number, column, char, _PARTNER[char]
            before = char if not char.isspace() else before
    return found if not stack else None


def _syntax_problem(error: yaml.MarkedYAMLError, mark: Any, lines: list[str]) -> Problem:
    """PyYAML's error in our words: what it means most often, at the place where the reader must look."""
    problem, context = error.problem or "cannot be parsed", error.context or ""
    at = error.problem_mark or error.context_mark
    line, column = (at.line, at.column) if at else (0, 0)
    opened = error.context_mark
    text = lines[line] if line < len(lines) else ""

    indent = text[: len(text) - len(text.lstrip())]
    if "'\\t'" in problem or ("\t" in indent and column <= len(indent)):
        return Problem.at(mark(line, indent.find("\t") if "\t" in indent else column), "", "a tab in the indentation", "indent with spaces")
    alone = _closer_alone(lines, line)
    if alone is not None:
        row, place, closer, opener = alone
        return Problem.at(mark(row, place), "", f"this {closer!r} closes nothing: there is no {opener!r} before it", f"add {opener!r} where it begins, or delete {closer!r}")
    if "flow" in context and problem.endswith("got ':'") and opened is not None and opened.line == line:
        return Problem.at(mark(line, column), "", "a second ':' in one entry", "a map inside another has braces of its own, 'key: {a: 1, b: 2}'; entries are parted by commas")
    if "flow" in context and opened is not None:
        bracket = "[" if "sequence" in context else "{"
        found = f"line {line + 1} goes on without it" if line < len(lines) and line != opened.line else "a comma or the closing bracket is missing"
        closing = {"[": "]", "{": "}"}[bracket]
        return Problem.at(mark(opened.line, opened.column), "", f"this {bracket!r} is not closed by {closing!r}: {found}", f"{context}: {problem}")
    if "quoted scalar" in context and "end of stream" in problem and opened is not None:
        return Problem.at(mark(opened.line, opened.column), "", "this quote is never closed")
    if "mapping values are not allowed" in problem:
        return Problem.at(mark(line, column), "", "a ':' that belongs to no key", "check the indentation; text that holds ': ' needs quotes")
    if "could not find expected ':'" in problem and opened is not None:
        return Problem.at(mark(opened.line, opened.column), "", "a key without ':'", "write 'key: value'; long text goes in quotes")
    if "cannot start any token" in problem:
        return Problem.at(mark(line, column), "", f"{text[column : column + 1]!r} cannot begin a value", "put the text in quotes")
    if "single document" in context:
        return Problem.at(mark(line, column), "", "a second document begins here", "one recipe a file: delete the '---' and what follows")
    if "block" in context and ("expected <block end>" in problem):
        return Problem.at(mark(line, column), "", "this line is not indented like the ones that it belongs to", f"{context}: {problem}")
    return Problem.at(mark(line, column), "", f"{context + ': ' if context else ''}{problem}")
