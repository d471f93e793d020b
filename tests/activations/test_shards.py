"""Stored blocks: the bits that were written, or an error that names the file."""

import errno

import pytest
import torch

from saehub.activations.batches import Batcher
from saehub.activations.blocks import Block
from saehub.activations.shards import ShardStore
from saehub.errors import FormatError, StageFailed


def block(dtype=torch.float32, ids=True):
    g = torch.Generator().manual_seed(1)
    acts = {"resid_post.0": torch.randn(50, 6, generator=g).to(dtype), "model.layers.1.mlp:in": torch.randn(50, 3, generator=g).to(dtype)}
    columns = [torch.randint(0, 9, (50,), generator=g) for _ in range(3)] if ids else [None] * 3
    return Block(acts, *columns, first_row=700, hash="f" * 64)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, dtype, ids):
    store, wrote = ShardStore(tmp_path / "s"), block(dtype, ids)
    assert not store.complete(4)
    store.write(4, wrote)
    read = ShardStore(tmp_path / "s").read(4)
    assert store.complete(4) and list(tmp_path.glob("s/.*")) == []
    assert read.acts.keys() == wrote.acts.keys() and all(
        read.acts[s].dtype == dtype and torch.equal(read.acts[s], wrote.acts[s]) for s in wrote.acts
    )
    for name in ("token_ids_N", "positions_N", "sequences_N"):
        one, two = getattr(read, name), getattr(wrote, name)
        assert (one is None and two is None) or torch.equal(one, two)
    assert (read.first_row, read.hash) == (700, "f" * 64)
    store.delete(4)
    assert not store.complete(4) and list((tmp_path / "s").iterdir()) == []
    store.delete(4)


@pytest.mark.quick
def test_damage_is_found_and_named(tmp_path):
    store = ShardStore(tmp_path)
    store.write(0, block())
    file = tmp_path / "block-000000.safetensors"
    whole = file.read_bytes()
    for raw in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1]), b"", whole + b"x"):
        file.write_bytes(raw)
        with pytest.raises(FormatError, match=file.name) as caught:
            store.read(0)
        assert str(file) in caught.value.fix
    file.unlink()
    with pytest.raises(FormatError, match="missing"):
        store.read(0)
    with pytest.raises(FormatError, match="block-000001.json"):
        store.read(1)
    store.write(0, block())
    assert torch.equal(store.read(0).acts["resid_post.0"], block().acts["resid_post.0"])


@pytest.mark.quick
def test_a_full_disk_leaves_no_half_block(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    store = ShardStore(tmp_path)
    monkeypatch.setattr("saehub.activations.shards.save_file", full)
    with pytest.raises(StageFailed, match="disk is full") as caught:
        store.write(0, block())
    assert "SAEHUB_HOME" in caught.value.fix and not store.complete(0) and list(tmp_path.iterdir()) == []


@pytest.mark.quick
def test_a_block_without_its_json_does_not_count(tmp_path):
    store = ShardStore(tmp_path)
    store.write(0, block())
    (tmp_path / "block-000000.json").unlink()  # a writer that died between the two
    assert not store.complete(0)
    store.write(0, block())
    assert store.complete(0)


@pytest.mark.quick
@pytest.mark.parametrize("batch", [1, 3, 7, 64, 500])
def test_batches_do_not_depend_on_how_the_rows_arrive(batch):
    x = {"a": torch.arange(300.0)[:, None], "b": torch.arange(300.0)[:, None] * 2}
    for cuts in ([0, 300], [0, 1, 2, 50, 50, 130, 299, 300], list(range(0, 301, 5))):
        batcher, got = Batcher(batch), []
        for i, j in zip(cuts, cuts[1:], strict=False):
            got += list(batcher.feed({name: x_ND[i:j] for name, x_ND in x.items()}))
        n = 300 // batch
        assert len(got) == n and all(
            torch.equal(b["a"], x["a"][k * batch : (k + 1) * batch]) and torch.equal(b["b"], 2 * b["a"]) for k, b in enumerate(got)
        )
        assert batcher.carried == 300 % batch
        if batcher.carried:
            assert torch.equal(batcher.carry["b"], x["b"][n * batch :])
            resumed = Batcher(batch)
            resumed.carry = batcher.carry
            more = list(resumed.feed({name: x_ND[:batch] for name, x_ND in x.items()}))
            assert torch.equal(more[0]["a"][: 300 % batch], x["a"][n * batch :])
