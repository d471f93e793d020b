"""Strict YAML: values against the YAML 1.2 core schema (10.3.2 of its specification), places against positions counted in the text."""

import time

import pytest

from saehub.recipe.load import MAX_BYTES, load_bytes, load_text, read, scalar
from saehub.recipe.tree import Node, plain

pytestmark = pytest.mark.quick

SCALARS = [
    # the specification's examples of the core schema
    ("null", None), ("~", None), ("", None), ("true", True), ("True", True), ("FALSE", False), ("0", 0), ("0o7", 7), ("0x3A", 58), ("-19", -19),
    ("0.", 0.0), ("-0.0", -0.0), (".5", 0.5), ("+12e03", 12000.0), ("-2E+05", -200000.0),
    # where YAML 1.1 says otherwise
    ("1e-4", 1e-4), ("1e6", 1e6), ("no", "no"), ("yes", "yes"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("010", 10), ("0o10", 8), ("08", 8), ("12:30", "12:30"),
    ("190:20:30", "190:20:30"), ("2001-12-14", "2001-12-14"), ("0b11", "0b11"), ("=", "="),
    # ours: separated thousands; only between digits
    ("1_000_000", 1_000_000), ("1_0.5", 10.5), ("_1", "_1"), ("1_", "1_"), ("1__0", "1__0"),
    # not numbers
    ("tRuE", "tRuE"), ("nul", "nul"), ("1.2.3", "1.2.3"), ("e3", "e3"), ("-", "-"), ("+", "+"), (".", "."), ("1e", "1e"), ("0x", "0x"), ("٣", "٣"), ("1e5x", "1e5x"),
]  # fmt: skip


@pytest.mark.parametrize("text, value", SCALARS)
def test_plain_scalars_follow_yaml_1_2(text, value):
    found = scalar(text)
    assert found == value and type(found) is type(value)
    if text not in ("", "-"):
        assert plain(load_text(f"a: {text}\n", "x").root) == {"a": value} or (isinstance(value, float) and value.is_integer())


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan", "1e999", "9" * 50])
def test_numbers_that_cannot_be_used_are_refused(text):
    (problem,) = load_text(f"a: [1, {text}]", "x").problems
    assert (problem.line, problem.column) == (1, 8)


@pytest.mark.parametrize("text", ['"32"', "'32'", "|\n  32", '"no"', "'~'", '"1e-4"'])
def test_quoted_scalars_are_text(text):
    assert isinstance(load_text(f"a: {text}", "x").root.get("a").data, str)


def test_whole_numbers_may_be_written_with_an_exponent():
    assert plain(load_text("[1e6, 2.5e1, 32.0, 1.5]", "x").root) == [1_000_000, 25, 32, 1.5]
    assert [type(item) for item in plain(load_text("[1e6, 1.5, 1e300]", "x").root)] == [int, float, float]


TEXT = """\
# a comment
name: tiny   # another
"quoted key": [one, {two: 2}]
größe:
    tief:
    - x: 1
      y: |
        text
    -   3
"""


def place(needle, occurrence=1):
    """Line and column of a needle, counted in the text itself."""
    at = -1
    for _ in range(occurrence):
        at = TEXT.index(needle, at + 1)
    return TEXT.count("\n", 0, at) + 1, at - TEXT.rfind("\n", 0, at)


def test_every_node_and_key_knows_its_place():
    root = load_text(TEXT, "some.yaml").root
    at = lambda mark: (mark.line, mark.column)  # noqa: E731
    assert at(root.get("name").mark) == place("tiny")
    assert at(root.keys["name"]) == place("name")
    assert at(root.keys["quoted key"]) == place('"quoted')
    flow = root.get("quoted key")
    assert at(flow.mark) == place("[one")
    assert at(flow.data[1].get("two").mark) == place("2}")
    deep = root.get("größe").get("tief")
    assert at(deep.data[0].keys["y"]) == place("y: |")
    assert at(deep.data[1].mark) == place("3")
    assert deep.data[1].mark.source_line == "    -   3" and deep.data[1].mark.file == "some.yaml"


def test_duplicate_keys_are_refused_all_of_them():
    problems = load_text("a: 1\nb: {c: 1, d: 2, c: 3}\na: 4\n", "x").problems
    assert [(p.line, p.column) for p in problems] == [(2, 17), (3, 1)]
    assert "'c' stands here a second time" in problems[0].message and "line 1" in problems[1].hint


def test_anchors_aliases_and_merge_keys():
    text = "base: &b {k: 1, batch: 2}\none: *b\ntwo: {<<: *b, k: 3}\nthree: {<<: [{k: 9, z: 0}, *b]}\n"
    assert plain(load_text(text, "x").root) == {
        "base": {"k": 1, "batch": 2},
        "one": {"k": 1, "batch": 2},
        "two": {"k": 3, "batch": 2},
        "three": {"k": 9, "z": 0, "batch": 2},
    }
    (problem,) = load_text("a: {<<: 3}", "x").problems
    assert "<< takes an alias of a map" in problem.message
    assert plain(load_text('a: {"<<": 3}', "x").root) == {"a": {"<<": 3}}


def test_changing_one_use_of_an_alias_leaves_the_other_alone():
    root = load_text("a: &x {k: 1}\nb: *x\n", "x").root
    root.get("a").set("k", Node(2, root.mark))
    assert plain(root.get("b")) == {"k": 1}


REFUSED = [
    ("a: 1\nb:\n\tc: 2\n", 3, 1, "a tab in the indentation"),
    ("a: [1, 2\nb: 3\n", 1, 4, "'[' is not closed"),
    ("a: {b: 1\n", 1, 4, "'{' is not closed"),
    ("a: {b: 1]\n", 1, 4, "'{' is not closed"),
    ("a: {b: 1, c: 2]}\nd: [1]\n", 1, 15, "']' closes nothing: there is no '['"),
    ("a: [b: 1}, {c: 2}]\n", 1, 9, "'}' closes nothing: there is no '{'"),
    ("a: {b: 1},\n  {c: 2}]  # [\n", 2, 9, "']' closes nothing: there is no '['"),
    ("a: b: '}', c: 2}\n", 1, 16, "'}' closes nothing: there is no '{'"),
    ("a: {b: c: 1, d: [2]}\n", 1, 9, "a second ':' in one entry"),
    ("a: {b: [1, 2}\nc: [3]\n", 1, 8, "'[' is not closed"),
    ('a: "open\nb: 1\n', 1, 4, "this quote is never closed"),
    ("a: b: c\n", 1, 5, "a ':' that belongs to no key"),
    ("a: 1\nbad\nc: 2\n", 2, 1, "a key without ':'"),
    ("a: @x\n", 1, 4, "'@' cannot begin a value"),
    ("a: *gone\n", 1, 4, "undefined alias"),
    ("a: 1\n---\nb: 2\n", 2, 1, "a second document"),
    ("a: !!python/object:os.system {}\n", 1, 4, "tags such as"),
    ("a: !!int 3\n", 1, 4, "tags such as"),
    ("a: ! x\n", 1, 4, "tags such as"),
    ("a: 1\n b: 2\n", 2, 3, "a ':' that belongs to no key"),
    ("- 1\nb: 2\n", 2, 1, "not indented like"),
    ("a: &x [*x]\n", 1, 4, "inside the value that it stands for"),
    ("{a: 1}: 2\n", 1, 1, "a key must be text, got a list or map"),
    ("1: 2\n", 1, 1, "a key must be text, got '1'"),
    ("true: 2\n", 1, 1, "a key must be text, got 'true'"),
    ("a: \x07\n", 1, 4, "U+0007"),
    ("a: 1\nb: x\x00y\n", 2, 5, "U+0000"),
    ("<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n", 1, 1, "an unresolved merge conflict"),
    ("a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> other\nc: 3\n<<<<<<< x\n>>>>>>> y\n", 2, 1, "an unresolved merge conflict"),
    ("[" * 60, 1, 41, "nested more than 40"),
]


@pytest.mark.parametrize("text, line, column, words", REFUSED)
def test_what_is_not_a_document(text, line, column, words):
    document = load_text(text, "x")
    assert document.root is None
    assert (document.problems[0].line, document.problems[0].column) == (line, column), str(document.problems[0])
    assert words in str(document.problems[0])


def test_a_conflict_names_every_place_and_the_way_out():
    problems = load_text("<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n<<<<<<< HEAD\n>>>>>>> other\n", "x").problems
    assert [problem.line for problem in problems] == [1, 6]
    assert "keep one side" in problems[0].hint


def test_billion_laughs_is_refused_quickly():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [" + ", ".join([f"*{chr(97 + i)}"] * 10) + "]" for i in range(9)]
    started = time.process_time()
    document = load_text("\n".join(lines), "laughs.yaml")
    assert time.process_time() - started < 5
    assert document.root is None and "once aliases (*) are expanded" in document.problems[0].message


def test_aliases_nested_too_deep_are_refused():
    text = "a0: &a0 [0]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60))
    assert "nested more than" in load_text(text, "x").problems[0].message


def test_very_deep_brackets_and_huge_texts_are_refused_quickly():
    started = time.process_time()
    assert load_text("[" * 100_000, "x").problems
    assert load_text("{a: " * 60_000, "x").problems
    assert load_text("- " * 100_000, "x").problems
    assert load_text("x" * (MAX_BYTES + 1), "x").problems
    assert time.process_time() - started < 10


def test_byte_order_mark_and_line_ends():
    assert plain(load_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", "x").root) == {"a": 1, "b": 2}
    root = load_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", "x").root
    assert (root.get("b").mark.line, root.get("b").mark.column, root.get("b").mark.source_line) == (2, 4, "b: 2")
    assert (load_bytes(b"\xef\xbb\xbfa: 1", "x").root.keys["a"].column) == 1


def test_bytes_that_are_not_utf_8():
    (problem,) = load_bytes("a: 1\nname: größe\n".encode("latin-1"), "x").problems
    assert (problem.line, problem.column) == (2, 9) and "0xf6 is not UTF-8" in problem.message
    assert load_bytes("a: 1".encode("utf-16"), "x").problems


def test_files_that_cannot_be_read(tmp_path):
    assert "folder" in read(tmp_path).problems[0].message
    assert "cannot be read" in read(tmp_path / "gone.yaml").problems[0].message
    big = tmp_path / "weights.yaml"
    big.write_bytes(b"\0" * (MAX_BYTES + 1))
    assert "no recipe" in read(big).problems[0].message


def test_empty_documents_have_no_root_and_no_problem():
    for text in ("", "\n\n", "# only a comment\n", "\ufeff", "---\n"):
        document = load_text(text, "x")
        assert document.problems == [] and (document.root is None or document.root.data is None)
