"""Thousands of broken recipes: whatever is done to a file, the answer is a recipe or a list of problems, never an exception."""

import random
import time

import pytest

from saehub.recipe import builtin_dir, check, check_text, dump, to_plain
from saehub.recipe.load import load_bytes

SOURCES = sorted(builtin_dir().glob("*.yaml"))
PIECES = ["\t", "[", "]", "{", "}", ":", ": ", "- ", "&a ", "*a", "<<: ", "!x ", "|\n", ">\n", '"', "'", "#", "---\n", "...\n", "?", "%", "@", "`", "\n", "\r", " ", "  ", "\x00", "\x85", "\u2028", "\ufeff", "~", "null", "true", "-1", "0", "1e999", ".nan", "9" * 400, "é", "日本", "\U0001f600", "remove: true\n", "extends: topk-llama\n", "id: native-k32\n", "sweep: {k: [1, 2]}\n", "with: {}\n", "<<<<<<< x\n"]  # fmt: skip
PATHS = ["", "a", "train", "train.0", "train.native-k32", "train.native-k32.with.k", "train.9", "data.train", "data.train.mix.0.source", "data.eval.in_sample", "model", "model.shape", "extract.sites", "extract.sites.0", "extract.with", "evaluate.native/core.saes", "export.0", "saehub", "name", "train.0.sweep", "train.0.sweep.k", "saes", "saes.0.load", "seed"]  # fmt: skip
VALUES = ["", "1", "-1", "x", "[]", "{}", "[1, x]", "{a: {b: [c]}}", "true", "null", "1e6", "1.5", "'", "[", "{remove: true}", "[[[]]]", "a: b", "[{id: x}]", "{k: [1, 2], seed: [0]}", "&a [*a]", "builtin/nothing", ".", "\x00", "hf://x/y"]  # fmt: skip


def mutate(text, rng):
    """A few random edits: delete, repeat, move or insert a piece, or swap lines."""
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(7)
        i, j = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        j = min(j, i + rng.choice((1, 5, 40, 400)))
        if kind == 0:
            text = text[:i] + text[j:]
        elif kind == 1:
            text = text[:i] + text[i:j] + text[i:]
        elif kind in (2, 3):
            text = text[:i] + rng.choice(PIECES) + text[i:]
        elif kind == 4:
            text = text[:i] + chr(rng.choice((rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) + text[i + 1 :]
        else:
            lines = text.split("\n")
            a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
            if kind == 5:
                lines[a], lines[b] = lines[b], lines[a]
            else:
                lines[a] = " " * rng.randrange(8) + lines[b].strip()
            text = "\n".join(lines)
    return text


def restructure(data, rng):
    """Put a random value, or another part of the recipe, at a random place of its plain data."""
    places, stack = [], [data]
    while stack:
        node = stack.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                stack.append(node[key])
    for _ in range(rng.randint(1, 3)):
        node, key = rng.choice(places)
        other, other_key = rng.choice(places)
        values = [None, 0, -1, 1.5, True, "", "x", [], {}, [None], {"a": None}, [[1]], [{}], "builtin/x", 10**30, {"remove": True}]
        value = rng.choice([*values, str(other.get(other_key) if isinstance(other, dict) else None)])
        try:
            if rng.random() < 0.2 and isinstance(node, dict):
                node[rng.choice(["", "x", "id", "with", "sweep", "uses", "source", "mix", "a.b", "remove"])] = value
            else:
                node[key] = value
        except (IndexError, KeyError):
            continue
    return data


def judge(recipe, problems):
    """A recipe, or at least one error; everything printable."""
    errors = [problem for problem in problems if problem.severity == "error"]
    assert (recipe is None) == bool(errors)
    for problem in problems:
        assert str(problem).encode("utf-8")
        assert problem.message and problem.file


@pytest.mark.quick
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_mutated_text(catalog, source):
    rng = random.Random(f"text {source.name}")
    text = source.read_text(encoding="utf-8")
    short = "\n".join(line.partition("  #")[0] for line in text.splitlines() if not line.startswith("#"))
    for _ in range(200):
        broken = mutate(short, rng)
        started = time.process_time()
        judge(*check_text(broken, str(source), catalog=catalog))
        assert time.process_time() - started < 5, broken


@pytest.mark.quick
def test_mutated_bytes():
    rng = random.Random("bytes")
    for source in SOURCES:
        raw = source.read_bytes()
        for _ in range(100):
            broken = bytearray(raw)
            for _ in range(rng.randint(1, 5)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            document = load_bytes(bytes(broken[: rng.randrange(len(broken))]), "x")
            for problem in document.problems:
                assert str(problem).encode("utf-8")


@pytest.mark.quick
def test_mutated_structure(catalog, good):
    rng = random.Random("structure")
    recipe, _ = check_text(good.replace("with: {k: 32}", "with: {k: 32}, sweep: {k: [1, 2], seed: [0]}"), catalog=catalog)
    for _ in range(150):
        judge(*check_text(dump(restructure(to_plain(recipe), rng)), "x.yaml", catalog=catalog))


@pytest.mark.quick
def test_random_overrides(catalog, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "good.yaml"
    path.write_text(good.replace("id: a", "id: native-k32"))
    rng = random.Random("overrides")
    for _ in range(300):
        options = [rng.choice(PATHS) + rng.choice(("=", "=", "=", "", ".x=")) + rng.choice(VALUES) for _ in range(rng.randint(1, 3))]
        judge(*check(path, options, catalog))


@pytest.mark.quick
def test_mutated_bases(catalog, tmp_path):
    rng = random.Random("bases")
    base, child = (path.read_text(encoding="utf-8") for path in sorted(SOURCES, key=lambda path: len(path.stem))[:2])
    strip = lambda text: "\n".join(line.partition("  #")[0] for line in text.splitlines() if not line.startswith("#"))  # noqa: E731
    for _ in range(100):
        (tmp_path / "topk-llama.yaml").write_text(mutate(strip(base), rng), encoding="utf-8")
        (tmp_path / "child.yaml").write_text(mutate(strip(child), rng), encoding="utf-8")
        judge(*check(tmp_path / "child.yaml", (), catalog))
