"""Integers and a bound in; the places of those that reach it, with and without the processor's instruction for that, beside numpy's."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.quick


def check() -> None:
    from saehub_native.kernels.cpu_arithmetic import SPARE, pack

    rng = np.random.default_rng(0)
    for n in (1, 15, 16, 17, 100, 512):
        for low, high in ((-3, 3), (-(2**31), 2**31 - 1)):
            keys_N = rng.integers(low, high, n, dtype=np.int32)
            for bound in (keys_N.min(), np.sort(keys_N)[n // 2], keys_N.max(), np.int32(2**31 - 1)):
                wanted_M = np.flatnonzero(keys_N >= bound)
                places_C, kept_C = np.full(n + SPARE + 1, -7, np.int32), np.full(n + SPARE + 1, -7, np.int32)
                assert pack(keys_N, n, bound, places_C, kept_C, n) == len(wanted_M)
                np.testing.assert_array_equal(places_C[: len(wanted_M)], wanted_M)
                np.testing.assert_array_equal(kept_C[: len(wanted_M)], keys_N[wanted_M])
                most = len(wanted_M) // 2
                if most < len(wanted_M):
                    places_C[:], kept_C[:] = -7, -7
                    assert most < pack(keys_N, n, bound, places_C, kept_C, most)
                    assert (places_C[most + SPARE :] == -7).all() and (kept_C[most + SPARE :] == -7).all()


def test_as_numpy() -> None:
    check()


def test_as_numpy_on_an_old_processor() -> None:
    code = (
        "from saehub_native.kernels import instructions; assert instructions.packer() is None; import test_cpu_pack; test_cpu_pack.check()"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
