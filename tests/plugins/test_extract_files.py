"""`native/files`: the numbers in the files come out once each, aligned, from every layout; broken folders are named."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saehub.activations.blocks import Block, BlockStream
from saehub.activations.shards import ShardStore
from saehub.errors import FormatError, SaehubError, UsageError
from saehub_native.extract_config import FilesConfig
from saehub_native.files import FilesExtractor

N, D, E = 230, 6, 3
A, B = "resid_post.0", "mlp_out.1"


def table():
    x = torch.arange(N * D, dtype=torch.float32).reshape(N, D)
    return {A: x, B: x[:, :E] * 0.5, "token_ids": torch.arange(N) % 17, "positions": torch.arange(N) % 10}


def write(folder, layout, dtype=torch.float32):
    folder.mkdir()
    whole = {name: x.to(dtype) if x.is_floating_point() else x for name, x in table().items()}
    cuts = [0, 100, 101, N]
    if layout == "safetensors":
        for k, (i, j) in enumerate(zip(cuts, cuts[1:], strict=False)):
            save_file({name: x[i:j].contiguous() for name, x in whole.items()}, folder / f"part-{k}.safetensors")
    elif layout == "npy":
        for name, x in whole.items():
            np.save(folder / f"{name}.npy", x.numpy())
    else:
        for name, x in whole.items():
            (folder / name).mkdir()
            for k, (i, j) in enumerate(zip(cuts, cuts[1:], strict=False)):
                np.save(folder / name / f"{k}.npy", x[i:j].numpy())
    return folder


def everything(session):
    rows = [session.rows(batch) for batch in range(session.n_batches)]
    join = lambda columns: torch.cat(list(columns))  # noqa: E731
    return {
        A: join(r.acts[A] for r in rows),
        B: join(r.acts[B] for r in rows),
        "ids": join(r.token_ids_N for r in rows),
        "at": join(r.positions_N for r in rows),
        "keep": join(r.keep_N for r in rows),
    }


@pytest.mark.quick
@pytest.mark.parametrize(
    "layout, dtype",
    [(layout, dtype) for layout in ("safetensors", "npy", "folders") for dtype in (torch.float32, torch.float16, torch.float64)]
    + [("safetensors", torch.bfloat16)],
)
def test_every_row_comes_out_once_with_its_columns(tmp_path, layout, dtype):
    config = FilesConfig(str(write(tmp_path / "acts", layout, dtype)))
    assert config.describe()["widths"] == {A: D, B: E} and config.describe()["rows"] == N
    session = FilesExtractor(config).open(None, None, [A, B], lm_batch=32)
    assert session.widths == {A: D, B: E} and session.n_batches == 8
    got, want = everything(session), table()
    assert got[A].dtype == dtype
    lines = torch.cat([got[A].float(), got[B].float(), got["ids"][:, None].float(), got["at"][:, None].float()], dim=1)
    expected = torch.cat(
        [want[A].to(dtype).float(), want[B].to(dtype).float(), want["token_ids"][:, None].float(), want["positions"][:, None].float()],
        dim=1,
    )
    assert sorted(lines.tolist()) == sorted(expected.tolist()) and not torch.equal(lines, expected)
    assert sum(session.kept(batch) for batch in range(8)) == N


@pytest.mark.quick
def test_excluded_ids_are_dropped_and_counted(tmp_path):
    config = FilesConfig(str(write(tmp_path / "acts", "safetensors")), exclude_ids=(3, 5))
    session = FilesExtractor(config).open(None, None, [A, B], lm_batch=32)
    got = everything(session)
    assert torch.equal(got["keep"], (got["ids"] != 3) & (got["ids"] != 5))
    assert config.describe()["rows"] == int(got["keep"].sum()) == sum(session.kept(batch) for batch in range(session.n_batches))
    stream = BlockStream(session, sites=[A], seed=0, batches_per_block=3, dtype="float32", rows=int(got["keep"].sum()))
    rows = torch.cat([stream.block(b).acts[A] for b in range(stream.n_blocks)])
    keep = ~torch.isin(table()["token_ids"], torch.tensor([3, 5]))
    assert sorted(rows[:, 0].tolist()) == table()[A][keep][:, 0].tolist()


@pytest.mark.quick
def test_sequences_give_positions_and_names_can_be_mapped(tmp_path):
    x = torch.randn(7, 5, D)
    save_file({"acts": x, "token_ids": torch.arange(35).reshape(7, 5)}, tmp_path / "a.safetensors")
    config = FilesConfig(str(tmp_path), names={A: "acts"})
    session = FilesExtractor(config).open(None, None, [A], lm_batch=4)
    for batch in range(session.n_batches):
        rows = session.rows(batch)
        assert torch.equal(rows.acts[A], x.reshape(-1, D)[rows.token_ids_N])
        assert torch.equal(rows.positions_N, rows.token_ids_N % 5) and torch.equal(rows.sequences_N, rows.token_ids_N // 5)


@pytest.mark.quick
def test_what_the_hub_stores_can_be_read_back(tmp_path):
    whole = table()
    for b in range(2):
        part = slice(b * 115, (b + 1) * 115)
        ShardStore(tmp_path).write(b, Block({A: whole[A][part]}, whole["token_ids"][part], whole["positions"][part], None, b * 115, "h"))
    config = FilesConfig(str(tmp_path))
    assert config.describe()["widths"] == {A: D}
    session = FilesExtractor(config).open(None, None, [A], lm_batch=50)
    assert sorted(torch.cat([session.rows(b).acts[A] for b in range(session.n_batches)])[:, 0].tolist()) == whole[A][:, 0].tolist()


@pytest.mark.quick
def test_the_hash_follows_contents(tmp_path):
    one, two = (FilesConfig(str(write(tmp_path / name, "npy"))) for name in "ab")
    assert one.describe()["hash"] == two.describe()["hash"]
    np.save(tmp_path / "b" / f"{A}.npy", table()[A].numpy() + 1)
    assert one.describe()["hash"] != two.describe()["hash"]


@pytest.mark.quick
def test_broken_folders_are_named(tmp_path):
    def fails(kind, *words, sites=(A,), **config):
        with pytest.raises(kind) as caught:
            FilesExtractor(FilesConfig(**config)).open(None, None, list(sites), lm_batch=8)
        assert isinstance(caught.value, SaehubError)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    good = write(tmp_path / "good", "safetensors")
    fails(UsageError, "no such folder", path=str(tmp_path / "missing"))
    fails(UsageError, "did you mean 'resid_post.0'", path=str(good), sites=["resid_post.1"])
    fails(UsageError, "no tensor 'act'", path=str(good), names={A: "act"})
    (tmp_path / "empty").mkdir()
    fails(UsageError, "holds none", path=str(tmp_path / "empty"))
    cut = write(tmp_path / "cut", "safetensors")
    last = cut / "part-2.safetensors"
    last.write_bytes(last.read_bytes()[:-7])
    fails(FormatError, "part-2.safetensors", "announces", path=str(cut))
    last.write_bytes(b"\xff" * 40)
    fails(FormatError, "part-2.safetensors", path=str(cut))
    save_file({A: torch.zeros(3, D)}, last)
    fails(FormatError, "other tensors", path=str(cut))
    uneven = write(tmp_path / "uneven", "npy")
    np.save(uneven / f"{B}.npy", np.zeros((N - 1, E), dtype=np.float32))
    fails(FormatError, "same rows", f"{N - 1}", path=str(uneven))
    np.save(uneven / f"{B}.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    fails(FormatError, f"{B}.npy", path=str(uneven))
    np.save(uneven / f"{B}.npy", np.zeros((N, E), dtype=np.int64))
    fails(FormatError, f"{B}.npy", "I64", path=str(uneven))
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file({A: torch.zeros(4, D)}, bare / "a.safetensors")
    fails(UsageError, "token ids", path=str(bare), exclude_ids=(1,))
    save_file({A: torch.zeros(0, D)}, bare / "a.safetensors")
    fails(FormatError, "no rows", path=str(bare))


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["safetensors", "npy", "folders"])
def test_a_row_that_is_not_finite_is_named_with_its_file(tmp_path, layout):
    folder = write(tmp_path / "acts", layout)
    whole = {name: x.clone() for name, x in table().items()}
    whole[B][101 + 7, 2] = float("nan")
    place = {"safetensors": folder / "part-2.safetensors", "npy": folder / f"{B}.npy", "folders": folder / B / "2.npy"}[layout]
    if layout == "safetensors":
        save_file({name: x[101:].contiguous() for name, x in whole.items()}, place)
    else:
        np.save(place, whole[B].numpy()[0 if layout == "npy" else 101 :])
    inside = 108 if layout == "npy" else 7
    session = FilesExtractor(FilesConfig(str(folder))).open(None, None, [A, B], lm_batch=32)
    with pytest.raises(FormatError) as caught:
        everything(session)
    assert caught.value.what == f"{place}: row {inside} of {B!r} holds NaN or infinite numbers" and "row 108 of the folder" in caught.value.why
    everything(FilesExtractor(FilesConfig(str(folder), exclude_ids=(108 % 17,))).open(None, None, [A, B], lm_batch=32))  # nobody gets that row
    x = torch.zeros(7, 5, D, dtype=torch.bfloat16)
    x[3, 2, 0] = float("inf")
    save_file({A: x}, tmp_path / "whole.safetensors")
    with pytest.raises(FormatError, match="sequence 3, position 2 of 'resid_post.0'"):
        session = FilesExtractor(FilesConfig(str(tmp_path))).open(None, None, [A], lm_batch=64)
        session.rows(0)


@pytest.mark.quick
def test_planning_needs_no_torch(tmp_path):
    import subprocess
    import sys

    folder = write(tmp_path / "acts", "safetensors")
    code = f"import sys; from saehub_native.extract_config import FilesConfig; print(FilesConfig({str(folder)!r}).describe()['rows'], 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == [str(N), "False"]
