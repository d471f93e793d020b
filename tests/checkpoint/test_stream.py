"""Blocks against whole tensors: the same hash, counts and bytes as hashlib, torch and safetensors' own writer give."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.checkpoint import stream
from saehub.jsonio import sha256_tensor

pytestmark = pytest.mark.quick
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.fixture(params=[8, 100, 2**26])
def block(request, monkeypatch):
    """Blocks of a few elements, of odd lengths, and larger than everything here."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", request.param)


def make(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=draw) * 100).to(dtype)


SHAPES = ((7, 13), (29,), (), (0, 4), (3, 0), (2, 3, 5))


def test_hash_and_file_are_the_plain_ones(block, tmp_path):
    tensors = {f"{str(dtype)[6:]}.{'x'.join(map(str, shape)) or 'scalar'} é": make(dtype, *shape) for dtype in DTYPES for shape in SHAPES}
    for tensor in tensors.values():
        assert stream.tensor_hash(tensor) == sha256_tensor(tensor)
    # by hand, from the definition
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert stream.tensor_hash(x) == hashlib.sha256(b"float32[2, 3]" + x.numpy().tobytes()).hexdigest()
    for metadata in (None, {"format": "pt"}):
        stream.write_safetensors(tmp_path / "ours", tensors, metadata)
        save_file(tensors, tmp_path / "theirs", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    stream.write_safetensors(tmp_path / "odd", {"a": make(torch.float32, 4).to(torch.float8_e5m2), "b": x.T})
    assert load_file(tmp_path / "odd")["a"].dtype == torch.float8_e5m2  # a dtype for which the library writes


def test_transposed_tensors_are_turned(block, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        x = make(dtype, 17, 9)
        assert not x.T.is_contiguous() and stream.tensor_hash(x.T) == sha256_tensor(x.T.contiguous())
        stream.write_safetensors(tmp_path / "t", {"x": x.T, "y": x[::2]})
        found = load_file(tmp_path / "t")
        assert torch.equal(found["x"], x.T) and torch.equal(found["y"], x[::2])


def test_counts_and_equality(block):
    x = make(torch.float32, 11, 7)
    assert stream.count_bad(x) == 0 and stream.count_bad(torch.arange(5)) == 0
    x[3, 4], x[10, 6], x[0, 0] = float("nan"), float("inf"), -float("inf")
    assert stream.count_bad(x) == 3 and stream.count_bad(x, allow_infinite=True) == 1
    a = make(torch.float32, 11, 7)
    b = a.clone()
    assert stream.equal(a, b) and stream.equal(a, a.T.contiguous().T) and stream.equal(torch.zeros(0), torch.zeros(0))
    b[10, 6] += 1
    assert not stream.equal(a, b) and not stream.equal(a, a.double()) and not stream.equal(a, a.T) and not stream.equal(x, x)


def test_what_was_written_to_a_mapped_tensor_is_not_lost(block, tmp_path):
    """Pages are given back, changes are not: a tensor mapped from a file, changed in place, is hashed and saved as changed."""
    from safetensors import safe_open

    save_file({"x": torch.zeros(64 * 1024)}, tmp_path / "x")
    with safe_open(tmp_path / "x", framework="pt") as opened:
        x = opened.get_tensor("x")
    x += 1
    assert stream.tensor_hash(x) == sha256_tensor(torch.ones(64 * 1024)) == stream.tensor_hash(x)
    stream.write_safetensors(tmp_path / "y", {"x": x})
    assert bool((load_file(tmp_path / "y")["x"] == 1).all()) and bool((x == 1).all()) and bool((load_file(tmp_path / "x")["x"] == 0).all())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of a process is read from /proc")
def test_a_large_file_is_not_held_in_memory(tmp_path):
    """192 MiB, hashed, checked, compared and written again in a fresh process: neither the heap nor the mapped pages grow with it."""
    code = """
import sys, torch
from safetensors import safe_open
from saehub.checkpoint import stream
def kib(name):
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
torch.set_num_threads(1)
stream.BLOCK_BYTES = 2**22
stream.count_bad(torch.zeros(8)); stream.tensor_hash(torch.zeros(8))
with open('/proc/self/clear_refs', 'w') as refs:
    refs.write('5')  # resets VmHWM
base = kib('VmRSS')
with safe_open(sys.argv[1], framework='pt') as opened:
    x, y = opened.get_tensor('x'), opened.get_tensor('y')
stream.tensor_hash(x), stream.count_bad(x), stream.equal(x, y)
stream.write_safetensors(sys.argv[2], {'x': x, 'y': y})
print((kib('VmHWM') - base) // 1024)
"""
    x = torch.ones(96 * 2**20 // 4)
    save_file({"x": x, "y": x.clone()}, tmp_path / "big")
    with open(tmp_path / "big", "rb+") as written:
        os.fsync(written.fileno())  # a page that the disk does not have yet cannot be given back
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "big", tmp_path / "again"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64, f"{done.stdout} MiB"  # of 192 that were read; a few blocks of 4 MiB are live
    assert (tmp_path / "big").read_bytes() == (tmp_path / "again").read_bytes()
