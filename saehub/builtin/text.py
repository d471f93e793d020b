"""The running interpreter's own standard library comes in; documents of prose (`python-docs`) or of code (`python-code`) go out.

Every Python installation carries this text, so the hub needs no download to have a corpus and copies none of it.
`python-docs` is the docstrings of modules, classes and functions (found with `ast`, nothing is imported) and the language
reference in `pydoc_data/topics.py`; `python-code` is the same files with their docstrings cut out. One split, by SHA-256 of
the module's path, covers both sources: a held-out module is unseen as prose and as code.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saehub.builtin import SOURCES, unknown_name
from saehub.errors import UsageError

HELDOUT_PERCENT = 10
TOPICS = "pydoc_data/topics.py"
MIN_CHARS = 64  # shorter documents (an empty `__init__.py`, a one-line docstring) hold no sentence and are left out

# Installed apart, or not at all, by common distributions: what is left is as equal as possible between two installations of one version.
_OPTIONAL = frozenset({"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo", "venv"})
_TESTS = frozenset({"test", "tests", "idle_test"})
_NEVER = frozenset({"__pycache__", "site-packages", "dist-packages", "lib-dynload"})
_GENERATED = ("_sysconfigdata", "config-", "__phello__", "_sysconfig_vars")  # written for one platform, or there to be frozen
_TABLES = ("encodings/", "html/entities.py", TOPICS)  # rows of data: neither prose nor code, and near-copies of one another


@dataclass(frozen=True)
class Document:
    """One text of a source."""

    id: str
    """Path below the library with forward slashes; a topic of the language reference adds `#topic`."""
    text: str
    """The document, with line feeds only."""


def documents(source: str, split: str) -> Iterator[Document]:
    """Yield the documents of `python-docs` or `python-code` in one split, sorted by path.

    Args:
        source: one of `saehub.builtin.SOURCES`, with or without `builtin/` in front.
        split: `train` (about 90 % of the modules) or `heldout`.

    Raises:
        UnknownBuiltin: an unknown source or split (a UsageError and a ValueError), with the choices.
        UsageError: this interpreter ships its library without source files (for instance in a zip archive).
    """
    name = source.removeprefix("builtin/")
    if name not in SOURCES:
        raise unknown_name("text source", source, SOURCES)
    if split not in ("train", "heldout"):
        raise unknown_name("split", split, ("train", "heldout"))
    return read(name, (path for path in modules() if split_of(path) == split))


def split_of(path: str) -> str:
    """`heldout` for about 10 % of all module paths, `train` for the others: SHA-256 of the path, mod 100.

    The language reference is one module: its topics quote one another at length, so they stay on one side."""
    digest = hashlib.sha256(path.partition("#")[0].encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT else "train"


def library() -> Path:
    """The folder of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "argparse.py").is_file():
        raise UsageError("this Python has no source files of its standard library", where=str(root),
                         why="builtin/python-docs and builtin/python-code are read from the interpreter's own .py files",
                         fix="use an interpreter that ships them, or a local .txt, .jsonl or .parquet file as the source")
    return root


def modules(extra: bool = False) -> list[str]:
    """Sorted module paths, relative to the library; `extra=True` gives the test and optional packages *instead* of the library proper."""
    root = library()
    found = []
    for file in root.rglob("*.py"):
        path = file.relative_to(root).as_posix()
        parts = path.split("/")
        if _NEVER.intersection(parts) or any(part.startswith(_GENERATED) for part in parts):
            continue
        apart = bool(_TESTS.intersection(parts)) or parts[0] in _OPTIONAL
        if apart == extra:
            found.append(path)
    return sorted(found)


def read(name: str, paths: Iterable[str]) -> Iterator[Document]:
    """The documents of a source in the given modules, in the given order; files that cannot be decoded or parsed are passed over."""
    root = library()
    for path in paths:
        if name == "python-docs" and path == TOPICS:
            yield from _topics(_read(root / path))
            continue
        if path.startswith(_TABLES):
            continue
        source = _read(root / path)
        if source is None:
            continue
        try:
            tree = _parse(source)
        except (SyntaxError, ValueError):  # the test packages hold files that are wrong on purpose
            continue
        text = _docstrings(path, tree) if name == "python-docs" else strip_docstrings(source, tree)
        if len(text) >= MIN_CHARS:
            yield Document(path, text)


def _read(file: Path) -> str | None:
    """The file's text by its own coding line, with line feeds only; None when it cannot be decoded."""
    try:
        with tokenize.open(file) as stream:  # universal newlines
            return stream.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library are not the user's business
        return ast.parse(source)


def _owners(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Depth first, in source order: the node and every class or function below it, with its dotted name.

    Only statements are visited: expressions hold no docstrings and are most of a tree."""
    yield prefix, node
    stack = [(prefix, child) for child in reversed(_statements(node))]
    while stack:
        where, child = stack.pop()
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            where = f"{where}.{child.name}" if where else child.name
            yield where, child
        stack.extend((where, grandchild) for grandchild in reversed(_statements(child)))


def _statements(node: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for field in ("body", "handlers", "cases", "orelse", "finalbody"):
        value = getattr(node, field, None)
        if isinstance(value, list):
            found += value
    return found


def _is_string(statement: ast.AST) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)


def _docstrings(path: str, tree: ast.Module) -> str:
    """`dotted.name` on a line, then the cleaned docstring, for every documented owner of the module."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts = []
    for name, node in _owners(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body and _is_string(node.body[0]):
            text = inspect.cleandoc(node.body[0].value.value).strip()
            if text:
                parts.append(f"{module}.{name}\n{text}\n" if name else f"{module}\n{text}\n")
    return "\n".join(parts)


def _topics(source: str | None) -> Iterator[Document]:
    """The topics of `pydoc_data/topics.py`, whose one statement assigns a dict of strings; read, not imported."""
    tree = _parse(source or "")
    for statement in tree.body:
        value = getattr(statement, "value", None)
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(value).items()):
                if len(text) >= MIN_CHARS:
                    yield Document(f"{TOPICS}#{topic}", text.strip() + "\n")


def strip_docstrings(source: str, tree: ast.Module | None = None) -> str:
    """The code without its docstrings, otherwise as it was formatted; it still parses.

    String statements at the head of a module, class or function are cut by the positions `ast` gives. A body that consisted
    of nothing else becomes `pass`; lines that are left blank by a cut are removed.
    """
    lines = source.encode().split(b"\n")  # ast counts columns in UTF-8 bytes
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    code = source.encode()
    cuts: list[tuple[int, int, bytes]] = []
    for _, node in _owners(tree if tree is not None else _parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        head = 0
        while head < len(node.body) and _is_string(node.body[head]):  # a second string would be the next docstring
            head += 1
        for index, statement in enumerate(node.body[:head]):
            start = starts[statement.lineno - 1] + statement.col_offset
            end = starts[statement.end_lineno - 1] + statement.end_col_offset
            only = head == len(node.body) and index == head - 1 and not isinstance(node, ast.Module)
            cuts.append((start, end, b"pass" if only else b""))
    for start, end, new in sorted(cuts, reverse=True):
        if not new:
            start, end = _whole_lines(code, start, end)
        code = code[:start] + new + code[end:]
    return code.decode()


def _whole_lines(code: bytes, start: int, end: int) -> tuple[int, int]:
    """Widen a cut: over a `;` that follows it, and over its lines when nothing else stands on them."""
    rest = code[end:].split(b"\n", 1)[0]
    if rest.lstrip(b" \t").startswith(b";"):
        end += rest.index(b";") + 1
        end += len(code[end:end + 80]) - len(code[end:end + 80].lstrip(b" \t"))
        rest = code[end:].split(b"\n", 1)[0]
    line = code.rfind(b"\n", 0, start) + 1
    if not code[line:start].strip() and not rest.strip():
        return line, min(end + len(rest) + 1, len(code))
    return start, end
