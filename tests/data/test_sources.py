"""Text sources: what a file or dataset holds comes out once, split in two parts that share nothing; bad input names its place and fix."""

import json
from types import SimpleNamespace

import pytest

from saehub.data.sources import PIECE_CHARS, check_source, open_source
from saehub.errors import FormatError, SaehubError, StageFailed, UsageError


def entry(source, **more):
    return SimpleNamespace(
        **{"source": str(source), "split": "all", "field": "text", "config": None, "streaming": False, "revision": None} | more
    )


def texts(source, **more):
    return [document.text for document in open_source(entry(source, **more))]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


DOCUMENTS = [f"document number {i}" for i in range(300)]


@pytest.mark.quick
def test_jsonl_parquet_and_folders_give_their_documents_in_order(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in DOCUMENTS[:100]] + [{"text": ""}, {"text": None}])
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS[100:200], "n": list(range(100))}), tmp_path / "b.parquet")
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "c.jsonl", [{"text": text} for text in DOCUMENTS[200:]])
    (tmp_path / "notes.md").write_text("not a source")
    assert texts(tmp_path) == DOCUMENTS
    assert texts(tmp_path / "b.parquet") == DOCUMENTS[100:200]
    assert texts(write_jsonl(tmp_path / "d.jsonl", [{"body": "x"}]), field="body") == ["x"]


@pytest.mark.quick
def test_train_and_heldout_share_nothing_and_miss_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS + DOCUMENTS[:20]])
    train, held = texts(path, split="train"), texts(path, split="heldout")
    assert set(train).isdisjoint(held) and sorted(train + held) == sorted(DOCUMENTS + DOCUMENTS[:20])
    assert 10 <= len(held) <= 60


@pytest.mark.quick
def test_text_files_are_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * 60 for i in range(400)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    pieces = texts(tmp_path / "a.txt")
    assert "".join(pieces) == "\n\n".join(paragraphs) and len(pieces) > 10
    assert all(len(piece) < 1.2 * PIECE_CHARS for piece in pieces)
    assert all(piece.startswith("paragraph") or piece.startswith("\n") for piece in pieces)
    (tmp_path / "line.txt").write_text("x" * 100_000)
    assert "".join(texts(tmp_path / "line.txt")) == "x" * 100_000


@pytest.mark.quick
def test_builtin_sources_are_the_embedded_ones():
    from saehub.builtin import text

    got = texts("builtin/python-code", split="heldout")
    assert got == [document.text for document in text.documents("python-code", "heldout")] and got


@pytest.mark.quick
@pytest.mark.parametrize("streaming", [False, True])
def test_hub_datasets_streaming_or_not(monkeypatch, streaming):
    import datasets

    asked = {}

    def load(name, config, *, split, streaming, revision):
        asked.update(name=name, config=config, split=split, streaming=streaming, revision=revision)
        table = datasets.Dataset.from_list([{"text": text} for text in DOCUMENTS])
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    train = texts("org/name", split="train", config="en", revision="abc", streaming=streaming)
    assert asked == {"name": "org/name", "config": "en", "split": "train", "streaming": streaming, "revision": "abc"}
    assert sorted(train + texts("org/name", split="heldout")) == sorted(DOCUMENTS)
    assert asked["split"] == "train"
    assert texts("org/name", split="validation") == DOCUMENTS and asked["split"] == "validation"


@pytest.mark.quick
def test_a_hub_dataset_offline_says_what_to_do(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(StageFailed) as caught:
        texts("some-org/some-data", split="train")
    assert "some-org/some-data" in str(caught.value) and "hf download" in caught.value.fix and caught.value.said


@pytest.mark.quick
def test_conversations_are_normalised(tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"messages": [{"role": "user", "content": "x"}], "text": "plain"},
    ]
    one, two = open_source(entry(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert [m["role"] for m in one.messages] == ["user", "assistant"] and not one.text
    assert two.text == "plain" and two.messages[0]["content"] == "x"
    with pytest.raises(FormatError, match="a.jsonl:1"):
        list(open_source(entry(write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user"}]}]))))


@pytest.mark.quick
def test_bad_input_names_place_and_fix(tmp_path):
    def fails(kind, *words, **more):
        with pytest.raises(kind) as caught:
            texts(**more)
        assert isinstance(caught.value, SaehubError) and caught.value.fix
        for word in words:
            assert word in str(caught.value), str(caught.value)

    good = write_jsonl(tmp_path / "good.jsonl", [{"txt": "x", "other": 1}])
    fails(UsageError, "good.jsonl:1", "'text'", "did you mean 'txt'", "txt, other", source=good)
    fails(UsageError, "is not text", source=good, field="other")
    fails(UsageError, "no such file", "god.jsonl", "did you mean 'good.jsonl'", source=tmp_path / "god.jsonl")
    fails(UsageError, "did you mean 'builtin/python-docs'", source="builtin/python-doc")
    fails(UsageError, "did you mean 'heldout'", source="builtin/python-docs", split="held-out")
    fails(UsageError, "split 'validation'", source=good, split="validation")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    fails(FormatError, "broken.jsonl:2", source=broken)
    broken.write_text('["a"]\n')
    fails(FormatError, "broken.jsonl:1", "list", source=broken)
    broken.write_bytes(b'{"text": "\xff\xfe"}\n')
    fails(FormatError, "UTF-8", source=broken)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 nothing of the kind")
    fails(FormatError, "bad.parquet", source=bad)
    text = tmp_path / "latin.txt"
    text.write_bytes("caf\xe9".encode("latin-1"))
    fails(FormatError, "latin.txt", source=text)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "  "}\n')
    fails(StageFailed, "holds no text", source=empty)
    nothing = tmp_path / "nothing.txt"
    nothing.touch()
    fails(UsageError, "is empty", source=nothing)
    nothing.write_text("one document")
    fails(StageFailed, "no documents in split 'heldout'", source=nothing, split="heldout")
    word = tmp_path / "doc.docx"
    word.write_text("x")
    fails(UsageError, ".docx", source=word)
    (tmp_path / "none").mkdir()
    fails(UsageError, "holds no", source=tmp_path / "none")


@pytest.mark.quick
def test_check_source_needs_no_network_and_no_torch(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from types import SimpleNamespace as E; from saehub.data.sources import check_source; from saehub.sites import Site;"
        "from saehub.data.model import read_shape, fingerprint; from saehub.api import ModelSpec;"
        "check_source(E(source='some/hub-id', split='x', field='text')); check_source(E(source='builtin/python-docs', split='train', field='text'));"
        "shape = read_shape('builtin/tiny-llama'); fingerprint(ModelSpec('builtin/tiny-llama')); Site.parse('resid_post.2').tap(shape);"
        "import saehub.data.tokens; print('torch' in sys.modules, 'transformers' in sys.modules, 'datasets' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False", "False"]
    with pytest.raises(UsageError):
        check_source(entry(tmp_path / "missing.txt"))
