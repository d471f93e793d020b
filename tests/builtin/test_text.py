"""The standard library's text: one split for prose and code, docstrings cut exactly, nothing of it copied into the project."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import saehub.builtin
from saehub.builtin import SOURCES, model_dir, text
from saehub.errors import UsageError

SAMPLES = ("dataclasses.py", "argparse.py", "asyncio/base_events.py", "typing.py", "_pydecimal.py", "unittest/mock.py", "enum.py", "this.py")


@pytest.fixture(scope="module")
def everything() -> dict[tuple[str, str], list[text.Document]]:
    return {(source, split): list(text.documents(source, split)) for source in SOURCES for split in ("train", "heldout")}


def parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


class WithoutDocstrings(ast.NodeTransformer):
    """The reference: the same cut on the tree instead of on the text."""

    def visit_Module(self, node):
        self.generic_visit(node)
        while node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant) and isinstance(node.body[0].value.value, str):
            del node.body[0]
        if not node.body and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]
        return node

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = visit_Module


@pytest.mark.quick
def test_one_split_by_module_path_covers_both_sources(everything):
    path = lambda document: document.id.partition("#")[0]  # noqa: E731
    train = {path(d) for source in SOURCES for d in everything[source, "train"]}
    heldout = {path(d) for source in SOURCES for d in everything[source, "heldout"]}
    assert not train & heldout
    share = len(heldout) / len(train | heldout)
    assert 0.04 < share < 0.16
    for name in heldout:  # the rule as the model card states it
        assert int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 100 < 10
    assert all(everything[key] for key in everything)


@pytest.mark.quick
def test_documents_are_sorted_unique_and_the_same_on_every_reading(everything):
    again = list(text.documents("builtin/python-code", "heldout"))
    assert again == everything["python-code", "heldout"]
    for documents in everything.values():
        modules = [d.id.partition("#")[0] for d in documents]
        assert modules == sorted(modules)
        assert len({d.id for d in documents}) == len(documents)


def test_order_does_not_depend_on_the_hash_seed():
    code = ("import hashlib; from saehub.builtin import text; h = hashlib.sha256()\n"
            "for s in ('python-docs', 'python-code'):\n for d in text.documents(s, 'heldout'): h.update((d.id + d.text).encode())\n"
            "print(h.hexdigest())")
    digests = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True,
                              check=True).stdout for seed in ("1", "2")}
    assert len(digests) == 1


@pytest.mark.quick
@pytest.mark.parametrize("path", SAMPLES)
def test_docstrings_are_cut_and_nothing_else(path):
    source = (text.library() / path).read_text()
    stripped = text.strip_docstrings(source)
    assert ast.dump(parse(stripped)) == ast.dump(WithoutDocstrings().visit(parse(source)))
    kept = iter(source.splitlines())  # the formatting stays: every line but the new `pass` ones is a line of the file, in its order
    assert [line for line in stripped.splitlines() if line.strip() != "pass" and line not in kept] == []


@pytest.mark.quick
def test_code_documents_parse_and_hold_no_docstring(everything):
    for document in everything["python-code", "heldout"] + everything["python-code", "train"][::10]:
        for node in ast.walk(parse(document.text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                assert ast.get_docstring(node) is None, document.id


@pytest.mark.quick
@pytest.mark.parametrize("source, expected", [
    ('"""Doc."""\n', ""),
    ('"""Doc."""; x = 1\n', "x = 1\n"),
    ('class A: "doc"\n', "class A: pass\n"),
    ('def f():\n    """Doc."""  # why\n    return 1\n', 'def f():\n      # why\n    return 1\n'),
    ('def f():\n    ("a"\n     "b")\n    return "c"\n', 'def f():\n    return "c"\n'),
    ('def f():\n    """One."""\n    """Two."""\n', "def f():\n    pass\n"),
    ('if 1:\n    def f():\n        "é, ü"\n        x = "stays"\n', 'if 1:\n    def f():\n        x = "stays"\n'),
    ('def f(): "é"; return 1\n', "def f(): return 1\n"),
    ('def f():\n    f"""no docstring"""\n', 'def f():\n    f"""no docstring"""\n'),
])
def test_cutting_corner_cases(source, expected):
    assert text.strip_docstrings(source) == expected
    parse(expected)


@pytest.mark.quick
def test_docs_are_the_docstrings_that_import_shows(everything):
    import fnmatch
    import statistics

    docs = {d.id: d.text for split in ("train", "heldout") for d in everything["python-docs", split]}
    for module, path in ((statistics, "statistics.py"), (fnmatch, "fnmatch.py"), (json, "json/__init__.py")):
        for owner in (module, *(v for v in vars(module).values() if inspect.isfunction(v) and v.__module__ == module.__name__)):
            if owner.__doc__:
                assert inspect.cleandoc(owner.__doc__).strip() in docs[path]
    assert "\nstatistics.NormalDist.samples\n" in docs["statistics.py"]
    from pydoc_data.topics import topics

    assert docs["pydoc_data/topics.py#assert"] == topics["assert"].strip() + "\n"


@pytest.mark.quick
def test_what_is_left_out(everything):
    for documents in everything.values():
        for path in (d.id for d in documents):
            parts = path.split("/")
            assert not {"site-packages", "test", "tests", "lib2to3", "idlelib", "tkinter", "encodings"} & set(parts[:-1]), path
            assert not path.startswith(("_sysconfigdata", "config-", "test")), path
    assert not any(d.id.startswith("pydoc_data") for d in everything["python-code", "train"])


@pytest.mark.quick
def test_no_copy_of_the_text_lies_in_the_project(everything):
    """No file of the package holds a long line of a document: the tokenizer's merges are the longest trace."""
    package = Path(saehub.builtin.__file__).parent
    contents = "\n".join(f.read_text() for f in package.rglob("*") if f.suffix in {".py", ".md", ".json", ".jsonl"})
    files = {f.suffix for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert files <= {".py", ".md", ".json", ".jsonl", ".safetensors"}
    for key in everything:
        lines = {line.strip() for d in everything[key] for line in d.text.splitlines() if len(line.strip()) > 45 and len(set(line)) > 15}
        assert len(lines) > 500
        assert [line for line in lines if line in contents] == []


@pytest.mark.quick
def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="did you mean 'builtin/tiny-llama'"):
        model_dir("builtin/tiny-lama")
    with pytest.raises(UsageError, match="python-code, python-docs"):
        text.documents("python-prose", "train")
    with pytest.raises(ValueError, match="heldout, train"):
        text.documents("python-docs", "test")


@pytest.mark.quick
def test_an_interpreter_without_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=str(tmp_path)):
        list(text.documents("python-docs", "train"))


@pytest.mark.quick
def test_importing_and_reading_needs_no_torch():
    code = ("import sys; from saehub.builtin import model_dir, text; model_dir('builtin/tiny-llama'); next(text.documents('python-code', 'heldout'))\n"
            "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
