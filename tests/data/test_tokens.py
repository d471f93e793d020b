"""Packed tokens: against the documents they came from, token by token; splits, weights, order, exclusion and hashes."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from saehub.api import ModelSpec
from saehub.data.packing import pick
from saehub.data.tokens import TokenDataset, TokenPolicy, build
from saehub.errors import FormatError, SaehubError, StageFailed, UsageError


def entry(source, **more):
    return SimpleNamespace(
        **{"source": str(source), "split": "all", "field": "text", "config": None, "streaming": False, "revision": None} | more
    )


def stored(dataset):
    """int64 [n, context] as it lies on disk, in the order in which it was packed."""
    files = sorted(dataset.path.glob("tokens-*.safetensors"))
    return np.concatenate([load_file(file)["tokens"] for file in files]).astype(np.int64)


def make(model_dir, out, sources, policy=TokenPolicy(context=16), **more):
    return build(sources, ModelSpec(str(model_dir)), policy, out, **({"rows": 300, "calibration": 60, "seed": 1} | more))


@pytest.mark.quick
def test_the_order_of_documents_does_not_depend_on_where_files_lie(model_dir, corpus, tmp_path):
    import shutil

    from saehub.pipeline.keys import source_identity
    from saehub.recipe.schema import SourceEntry

    source = corpus("a.jsonl", 0, 40, 23)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    moved = shutil.copy(source, tmp_path / "deep" / "er" / "b.jsonl")
    here, there = (make(model_dir, tmp_path / name, [(entry(path), 1.0)]) for name, path in (("one", source), ("two", moved)))
    assert here.hash == there.hash and np.array_equal(stored(here), stored(there))
    keys = [source_identity(SourceEntry(source=str(path))) for path in (source, moved)]
    assert keys[0] == keys[1] and str(tmp_path) not in str(keys)
    twice = make(model_dir, tmp_path / "three", [(entry(source), 1.0), (entry(moved), 1.0)])
    read = load_file(twice.path / "index.safetensors")["source"]
    first, second = (stored(twice)[read == s] for s in range(2))
    n = min(len(first), len(second))
    assert not np.array_equal(first[:n], second[:n])  # two places in a mix are two orders


@pytest.mark.quick
@pytest.mark.parametrize("bos", ["sequence", "document", "none"])
def test_every_document_is_there_whole_and_once(model_dir, corpus, tmp_path, bos):
    source = corpus("a.jsonl", 0, 40, 23)
    policy = TokenPolicy(context=16, bos=bos, exclude=("bos", "pad"))
    dataset = make(model_dir, tmp_path / "t", [(entry(source), 1.0)], policy, rows=700, calibration=60)
    ids = stored(dataset)
    if bos == "sequence":
        assert (ids[:, 0] == 0).all() and not (ids[:, 1:] == 0).any()
        ids = ids[:, 1:]
    stream = ids.reshape(-1).tolist()
    mark = 0 if bos == "document" else 1
    texts = [tuple(4 + d * 23 + i for i in range(23)) for d in range(40)]
    pieces, piece = [], []
    for token in stream:
        if token == mark:
            pieces.append(tuple(piece))
            piece = []
        else:
            piece.append(token)
    if bos == "document":
        assert pieces[0] == ()  # a BOS stands before the first one
        pieces = pieces[1:]
    assert len(set(pieces)) == len(pieces) and set(pieces) <= set(texts)
    assert any(tuple(piece) == text[: len(piece)] for text in texts if text not in pieces)  # the last one is cut
    assert pieces != [text for text in texts if text in pieces]  # and they are mixed


@pytest.mark.quick
def test_rows_are_counted_without_reading_a_model_and_excluded_tokens_are_out(model_dir, corpus, tmp_path):
    dataset = make(
        model_dir, tmp_path / "t", [(entry(corpus("a.jsonl", 0, 60, 11)), 1.0)], TokenPolicy(16, exclude=("bos", "eos", "w7", 30)), rows=400
    )
    ids = dataset.tokens(0, dataset.n_sequences)
    assert ids.dtype == torch.int64 and ids.shape == (dataset.n_sequences, 16)
    out = (ids == 0) | (ids == 1) | (ids == 11) | (ids == 30)  # w7 is id 11
    keep = dataset.keep(0, dataset.n_sequences)
    assert keep.dtype == torch.bool and torch.equal(keep, ~out)
    c = dataset.calibration_sequences
    assert dataset.rows == int(keep[c:].sum()) == dataset.kept(c, dataset.n_sequences) >= 400
    assert dataset.calibration_rows == int(keep[:c].sum()) == dataset.kept(0, c) >= 60
    assert dataset.kept(c, dataset.n_sequences - 1) < 400  # no more than asked for, to the sequence
    assert [dataset.kept(i, i + 1) for i in range(5)] == keep[:5].sum(1).tolist()


@pytest.mark.quick
def test_calibration_rows_are_never_training_rows_even_when_sources_repeat(model_dir, corpus, tmp_path):
    sources = [(entry(corpus("a.jsonl", 0, 20, 30)), 3.0), (entry(corpus("b.jsonl", 1000, 100, 30)), 1.0)]
    dataset = make(model_dir, tmp_path / "t", sources, rows=5000, calibration=150, repeat=True)
    c = dataset.calibration_sequences
    calibration, training = set(dataset.tokens(0, c).flatten().tolist()), set(dataset.tokens(c, dataset.n_sequences).flatten().tolist())
    assert calibration & training <= {0, 1}  # BOS and EOS; every word stands once in the corpus
    assert dataset.manifest["sources"][0]["passes"] > 1
    first = [about["share"] for about in dataset.manifest["sources"]]
    assert first == pytest.approx([0.75, 0.25], abs=1 / dataset.n_sequences)


@pytest.mark.quick
def test_order_of_use_is_a_permutation_of_what_was_packed(model_dir, corpus, tmp_path):
    dataset = make(model_dir, tmp_path / "t", [(entry(corpus("a.jsonl", 0, 60, 20)), 1.0)], rows=800)
    packed, used = stored(dataset), dataset.tokens(0, dataset.n_sequences).numpy()
    c = dataset.calibration_sequences
    assert np.array_equal(packed[:c], used[:c])
    assert not np.array_equal(packed[c:], used[c:])
    assert sorted(map(tuple, packed[c:])) == sorted(map(tuple, used[c:]))
    assert torch.equal(dataset.tokens(3, 9), dataset.tokens(0, 20)[3:9])


@pytest.mark.quick
def test_builds_are_deterministic_and_the_hash_tells_data_apart(model_dir, corpus, tmp_path):
    sources = [(entry(corpus("a.jsonl", 0, 60, 20)), 2.0), (entry(corpus("b.jsonl", 2000, 60, 20)), 1.0)]
    one, two = (make(model_dir, tmp_path / name, sources, rows=900) for name in ("one", "two"))
    assert one.hash == two.hash and one.manifest == two.manifest
    assert all((one.path / shard["file"]).read_bytes() == (two.path / shard["file"]).read_bytes() for shard in one.manifest["shards"])
    again = make(model_dir, one.path, sources, rows=900)  # over a finished one
    assert again.hash == one.hash
    others = [
        make(model_dir, tmp_path / "x", sources, **change).hash
        for change in (
            {"rows": 900, "seed": 2},
            {"rows": 901},
            {"rows": 900, "calibration": 0},
            {"rows": 900, "policy": TokenPolicy(16, exclude=())},
        )
    ]
    assert len({one.hash, *others}) >= 4
    assert TokenDataset.open(one.path).hash == one.hash


@pytest.mark.quick
def test_several_shards_read_as_one(model_dir, corpus, tmp_path, monkeypatch):
    sources = [(entry(corpus("a.jsonl", 0, 60, 20)), 1.0)]
    whole = make(model_dir, tmp_path / "one", sources, rows=900)
    monkeypatch.setattr("saehub.data.tokens.SHARD_TOKENS", 16 * 7)
    cut = make(model_dir, tmp_path / "many", sources, rows=900)
    assert len(cut.manifest["shards"]) > 5 and cut.hash == whole.hash
    assert torch.equal(cut.tokens(0, cut.n_sequences), whole.tokens(0, whole.n_sequences))


@pytest.mark.quick
def test_language_model_batches_never_mix_calibration_and_training(model_dir, corpus, tmp_path):
    dataset = make(model_dir, tmp_path / "t", [(entry(corpus("a.jsonl", 0, 60, 20)), 1.0)], rows=800, calibration=70)
    assert dataset.calibration_sequences % 4
    ranges = [dataset.batch_range(b, 4) for b in range(dataset.n_batches(4))]
    assert [i for i, j in ranges] + [dataset.n_sequences] == [0] + [j for i, j in ranges]
    assert ranges[dataset.calibration_batches(4) - 1][1] == dataset.calibration_sequences


@pytest.mark.quick
def test_pick_keeps_every_prefix_near_the_weights():
    draw = random.Random(0)
    for _ in range(50):
        raw = [draw.random() + 0.01 for _ in range(draw.randint(1, 6))]
        weights = [w / sum(raw) for w in raw]
        counts = [0] * len(weights)
        for n in range(1, 400):
            counts[pick(weights, counts)] += 1
            for w, c in zip(weights, counts, strict=True):
                assert c < w * n + 1
                assert c > w * n - len(weights)


@pytest.mark.quick
def test_running_out_names_the_rows_there_are(model_dir, corpus, tmp_path):
    source = corpus("a.jsonl", 0, 30, 20)
    with pytest.raises(StageFailed) as caught:
        make(model_dir, tmp_path / "t", [(entry(source), 1.0)], rows=10_000, calibration=0)
    available = int(str(caught.value).split(":")[1].split()[0].replace(",", ""))
    assert "repeat: true" in caught.value.fix
    assert make(model_dir, tmp_path / "t", [(entry(source), 1.0)], rows=available, calibration=0).rows == available
    assert not list((tmp_path / "u").glob("manifest.json"))
    once = make(model_dir, tmp_path / "t", [(entry(source), 1.0)], rows=10_000, calibration=0, repeat=True)
    assert once.rows == available  # one epoch; the stream repeats it
    with pytest.raises(StageFailed, match="calibration rows"):
        make(model_dir, tmp_path / "t", [(entry(source), 1.0)], calibration=10_000, repeat=True)


@pytest.mark.quick
def test_chat_template_renders_turns_and_plain_text(model_dir, tmp_path):
    file = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "w1", "content": f"w{i}"}, {"role": "w2", "content": f"w{i + 1}"}]} for i in range(100, 180, 2)]
    rows += [{"text": f"w{i} w{i}"} for i in range(200, 260)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = make(
        model_dir,
        tmp_path / "t",
        [(entry(file), 1.0)],
        TokenPolicy(12, bos="document", exclude=("bos",), template="chat"),
        rows=200,
        calibration=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    documents = tokenizer.decode(stored(dataset).reshape(-1)).replace("<bos>", "|").split("|")
    inner = {" ".join(document.split()) for document in documents[1:-1]}
    expected = {f"w1 w{i} w2 w{i + 1}" for i in range(100, 180, 2)} | {
        f"<unk> w{i} w{i}" for i in range(200, 260)
    }  # `user` is no word here
    assert inner <= expected and any(text.startswith("w1") for text in inner) and any(text.startswith("<unk>") for text in inner)
    with pytest.raises(UsageError, match="template: chat") as caught:
        make(model_dir, tmp_path / "t", [(entry(file), 1.0)], rows=200, calibration=0)
    assert "conversations" in str(caught.value)


@pytest.mark.quick
def test_manifest_records_tokenizer_python_and_counts(tmp_path):
    import platform

    dataset = build(
        [(entry("builtin/python-code", split="heldout"), 1.0)], ModelSpec("builtin/tiny-llama"), TokenPolicy(64), tmp_path, rows=2000
    )
    assert dataset.manifest["python"] == platform.python_version()
    assert len(dataset.manifest["tokenizer"]["hash"]) == 64
    (about,) = dataset.manifest["sources"]
    assert about["tokens"] == dataset.n_sequences * 63 and about["sequences"] == dataset.n_sequences and about["documents"] > 0


@pytest.mark.quick
@pytest.mark.parametrize(
    "policy, words",
    [
        (TokenPolicy(128), ["longer than the model", "64"]),
        (TokenPolicy(1), ["no room"]),
        (TokenPolicy(16, exclude=("w99999",)), ["no token 'w99999'"]),
        (TokenPolicy(16, exclude=(10**6,)), ["outside the vocabulary"]),
        (TokenPolicy(16, bos="begin"), ["sequence, document or none"]),
        (TokenPolicy(16, template="prompt"), ["template"]),
    ],
)
def test_policies_that_cannot_be_followed(model_dir, corpus, tmp_path, policy, words):
    with pytest.raises(UsageError) as caught:
        make(model_dir, tmp_path / "t", [(entry(corpus("a.jsonl", 0, 30, 20)), 1.0)], policy)
    assert caught.value.fix and all(word in str(caught.value) for word in words)


@pytest.mark.quick
def test_a_tokenizer_without_special_tokens(model_dir, corpus, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token", "chat_template"):
        config.pop(name, None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    for other in bare.glob("*chat_template*"):
        other.unlink()
    source = [(entry(corpus("a.jsonl", 0, 40, 20)), 1.0)]
    with pytest.raises(UsageError, match="bos: none"):
        make(bare, tmp_path / "t", source)
    with pytest.raises(UsageError, match="no chat template"):
        make(bare, tmp_path / "t", source, TokenPolicy(16, bos="none", template="chat"))
    dataset = make(bare, tmp_path / "t", source, TokenPolicy(16, bos="none"))
    assert dataset.keep(0, dataset.n_sequences).all()  # bos and pad are not in this vocabulary, so nothing is excluded


@pytest.mark.quick
def test_damaged_folders_are_named(model_dir, corpus, tmp_path):
    dataset = make(model_dir, tmp_path / "t", [(entry(corpus("a.jsonl", 0, 40, 20)), 1.0)])
    shard = dataset.path / dataset.manifest["shards"][0]["file"]
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(FormatError, match=shard.name):
        TokenDataset.open(dataset.path).tokens(0, 1)
    shard.unlink()
    with pytest.raises(FormatError, match="missing"):
        TokenDataset.open(dataset.path).tokens(0, 1)
    (dataset.path / "manifest.json").unlink()
    with pytest.raises(FormatError, match="manifest.json"):
        TokenDataset.open(dataset.path)


@pytest.mark.quick
def test_a_mixture_needs_positive_weights_and_a_tokenizer_that_loads(model_dir, corpus, tmp_path):
    source = corpus("a.jsonl", 0, 40, 20)
    with pytest.raises(UsageError, match="weights"):
        make(model_dir, tmp_path / "t", [(entry(source), 0.0)])
    with pytest.raises(UsageError, match="weights"):
        make(model_dir, tmp_path / "t", [])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model_dir / "config.json").read_text())
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(SaehubError, match="tokenizer of"):
        make(broken, tmp_path / "t", [(entry(source), 1.0)])


@pytest.mark.quick
def test_a_full_disk_and_a_wish_to_stop(model_dir, corpus, tmp_path, monkeypatch):
    source = [(entry(corpus("a.jsonl", 0, 200, 20)), 1.0)]

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # while text is read, before the first sequence
        make(model_dir, tmp_path / "t", source, emit=stop)
    assert not (tmp_path / "t" / "manifest.json").exists()

    def full(arrays, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(StageFailed, match="disk is full"):
        make(model_dir, tmp_path / "t", source)
    assert not (tmp_path / "t" / "manifest.json").exists()
