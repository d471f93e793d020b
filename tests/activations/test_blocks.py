"""Blocks of the stream: against a naive construction from the same language-model batches, row by row; purity, epochs, calibration, bad values."""

import numpy as np
import pytest
import torch

from saehub.activations.blocks import BlockStream, scale_of
from saehub.api import Rows
from saehub.errors import StageFailed, UsageError

A, B = "resid_post.0", "mlp_out.1"


class Session:
    """Rows that say where they come from: acts[A] = (batch, row), acts[B] = 1000 * batch + row."""

    widths = {A: 2, B: 1}
    data_hash = "d" * 64

    def __init__(self, n_batches=11, size=10, seed=0, poison=None):
        draw = np.random.default_rng(seed)
        self.n_batches, self.size, self.poison, self.calls = n_batches, size, poison, []
        self.keep = draw.random((n_batches, size)) > 0.3

    def rows(self, batch):
        self.calls.append(batch)
        row_N = torch.arange(self.size, dtype=torch.float32)
        pair = torch.stack([torch.full_like(row_N, batch), row_N], dim=1)
        code = (1000 * batch + row_N)[:, None].clone()
        if self.poison and self.poison[0] == batch:
            code[int(np.flatnonzero(self.keep[batch])[0])] = self.poison[1]
            code[int(np.flatnonzero(~self.keep[batch])[0])] = float("nan")  # an excluded row may hold anything
        ids = torch.arange(self.size)
        return Rows({A: pair, B: code}, torch.from_numpy(self.keep[batch]), ids * 7, ids, ids // 5 + 2 * batch)

    def kept(self, batch):
        return int(self.keep[batch].sum())

    def close(self):
        pass


def stream(session=None, **more):
    session = session or Session()
    return BlockStream(
        session, **({"sites": [A, B], "seed": 3, "batches_per_block": 3, "dtype": "float32", "rows": 50, "calibration_batches": 2} | more)
    )


def batches_of(block):
    return sorted(set(block.acts[A][:, 0].int().tolist()))


@pytest.mark.quick
def test_a_block_holds_the_kept_rows_of_its_batches_shuffled_together():
    session = Session()
    total = int(session.keep[2:].sum())
    blocks = stream(session, rows=total)
    assert blocks.n_blocks == 3 and [blocks.first_row(b) for b in range(4)] == [
        0,
        *np.cumsum([session.keep[i : i + 3].sum() for i in (2, 5, 8)]),
    ]
    assert session.calls == []  # counting needs no model
    for b in range(3):
        block = blocks.block(b)
        naive = [(batch, row) for batch in range(2 + 3 * b, 5 + 3 * b) for row in range(10) if session.keep[batch, row]]
        got = [tuple(pair) for pair in block.acts[A].int().tolist()]
        assert sorted(got) == naive and got != naive
        assert block.first_row == blocks.first_row(b)
        # every column travels with its row
        assert torch.equal(block.acts[B][:, 0], 1000 * block.acts[A][:, 0] + block.acts[A][:, 1])
        assert torch.equal(block.positions_N, block.acts[A][:, 1].long()) and torch.equal(block.token_ids_N, 7 * block.positions_N)
        assert torch.equal(block.sequences_N, block.positions_N // 5 + 2 * block.acts[A][:, 0].long())


@pytest.mark.quick
def test_blocks_are_pure():
    forward = [stream().block(b) for b in range(2)]
    other = stream()
    backward = [other.block(b) for b in (1, 0, 1)]
    for one, two in ((forward[0], backward[1]), (forward[1], backward[0]), (forward[1], backward[2])):
        assert one.hash == two.hash and one.first_row == two.first_row
        assert all(torch.equal(one.acts[site], two.acts[site]) for site in (A, B))
    assert stream(seed=4).block(0).hash != forward[0].hash
    assert (
        stream().hash == other.hash and len({stream().hash, stream(seed=4).hash, stream(rows=49).hash, stream(dtype="bfloat16").hash}) == 4
    )
    assert other.hashes == {0: forward[0].hash, 1: forward[1].hash}


@pytest.mark.quick
def test_the_last_block_is_cut_to_the_rows_asked_for_and_reads_no_more_than_it_needs():
    for rows in (1, 20, 21, 37, 50):
        session = Session()
        blocks = stream(session, rows=rows)
        got = [blocks.block(b) for b in range(blocks.n_blocks)]
        assert sum(len(block.acts[A]) for block in got) == rows == blocks.first_row(blocks.n_blocks)
        needed = next(n for n in range(1, 10) if session.keep[2 : 2 + n].sum() >= rows)
        assert session.calls == list(range(2, 2 + needed))
        assert stream(Session(), rows=50).block(0).hash == got[0].hash or len(got) == 1


@pytest.mark.quick
def test_epochs_take_every_batch_once_in_another_order():
    session = Session(n_batches=9)
    per_epoch = int(session.keep[2:].sum())
    blocks = stream(session, rows=3 * per_epoch, repeat=True, batches_per_block=7)
    assert blocks.n_blocks == 3
    for b in range(3):
        session.calls.clear()
        block = blocks.block(b)
        assert len(block.acts[A]) == per_epoch and sorted(session.calls) == list(range(2, 9))
        assert (session.calls == list(range(2, 9))) == (b == 0)
    assert len({blocks.block(b).hash for b in range(3)}) == 3
    for rows, batches_per_block, times in ((2 * per_epoch + 5, 7, {2, 3}), (3 * per_epoch, 4, {3})):  # the latter's blocks span two epochs
        across = stream(session, rows=rows, repeat=True, batches_per_block=batches_per_block)
        got = torch.cat([across.block(b).acts[B] for b in range(across.n_blocks)])[:, 0].tolist()
        counts = {code: got.count(code) for code in set(got)}
        assert len(got) == rows and len(counts) == per_epoch and set(counts.values()) == times


@pytest.mark.quick
def test_too_few_rows_without_repeat_name_how_many_there_are():
    session = Session()
    available = int(session.keep[2:].sum())
    with pytest.raises(StageFailed, match=f"{available} are available") as caught:
        stream(session, rows=available + 1)
    assert str(available) in caught.value.fix and "repeat: true" in caught.value.fix
    with pytest.raises(StageFailed, match="0 are available"):
        stream(Session(n_batches=2), repeat=True)
    with pytest.raises(UsageError, match="at least one"):
        stream(batches_per_block=0)


@pytest.mark.quick
def test_calibration_rows_are_shuffled_and_apart():
    session = Session()
    total = int(session.keep[:2].sum())
    blocks = stream(session)
    assert blocks.calibration_rows == total
    rows = blocks.calibration(total)
    assert sorted(rows[B][:, 0].tolist()) == [1000 * batch + row for batch in range(2) for row in range(10) if session.keep[batch, row]]
    assert torch.equal(blocks.calibration(5)[A], rows[A][:5]) and sorted(set(session.calls)) == [0, 1]
    assert torch.equal(stream().calibration(total)[A], rows[A])
    training = torch.cat([blocks.block(b).acts[B] for b in range(blocks.n_blocks)])
    assert not set(training[:, 0].tolist()) & set(rows[B][:, 0].tolist())
    with pytest.raises(StageFailed, match=f"there are {total}"):
        blocks.calibration(total + 1)
    empty = stream(calibration_batches=0)
    assert empty.calibration(0)[A].shape == (0, 2)
    with pytest.raises(StageFailed, match="no calibration rows"):
        empty.scale(A, "sqrt_d")


@pytest.mark.quick
def test_scales_bring_the_mean_norm_where_it_should_be():
    x = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * 7
    norms = np.linalg.norm(x.double().numpy(), axis=1)
    assert scale_of(x, "sqrt_d") == pytest.approx(12**0.5 / norms.mean(), rel=1e-12)
    assert scale_of(x, "unit") == pytest.approx(1 / norms.mean(), rel=1e-12)
    assert scale_of(x, "none") == 1.0 == stream().scale(A, "none")
    with pytest.raises(StageFailed, match="zero"):
        scale_of(torch.zeros(3, 4), "unit")


@pytest.mark.quick
@pytest.mark.parametrize(
    "value, dtype, words",
    [(float("nan"), "float32", "come so from the model"), (float("inf"), "bfloat16", "come so from the model"), (1e6, "float16", "overflow")],
)
def test_values_that_are_not_finite_stop_the_stage(value, dtype, words):
    with pytest.raises(StageFailed) as caught:
        stream(Session(poison=(3, value)), dtype=dtype).block(0)
    assert (
        B in str(caught.value)
        and "1 of" in str(caught.value)
        and "batch 3" in str(caught.value)
        and words in str(caught.value)
        and caught.value.fix
    )
    assert stream(Session(poison=(3, 5.0))).block(0).acts[B].isfinite().all()  # what stands on excluded rows does not matter


@pytest.mark.quick
def test_rows_are_cast_before_anything_else():
    exact, half = stream().block(0), stream(dtype="bfloat16").block(0)
    assert half.acts[B].dtype == torch.bfloat16 and torch.equal(half.acts[B], exact.acts[B].bfloat16()) and half.hash == exact.hash


@pytest.mark.quick
def test_sites_that_the_session_lacks():
    with pytest.raises(StageFailed, match="embed"):
        stream(sites=["embed"]).block(0)
