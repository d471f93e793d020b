"""A Python function over numpy arrays in, its machine code (numba) out, kept in the user's cache folder between processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Sums may be reordered and multiply-adds fused; NaN and infinity keep their meaning (rows that are not finite must be seen).
FAST = {"reassoc", "contract", "nsz", "arcp"}


def cache_folder(*sources: str) -> Path | None:
    """Where machine code of the functions in `sources` is kept: None where nothing can be written (then every process compiles for itself).

    `$NUMBA_CACHE_DIR`, else `$XDG_CACHE_HOME/saehub` or `~/.cache/saehub`. numba looks at the file of the outer function only, so
    the name holds a hash over all of them.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "saehub" / "numba"
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()[:12]
    folder = base / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError:
        return None
    return folder


def compiler(*sources: str) -> Callable[[Callable], Any]:
    """A decorator: compile at the first call, without the interpreter lock while it runs, for the functions in these files."""
    import numba

    folder = cache_folder(*sources)

    def decorate(function: Callable) -> Any:
        held = numba.config.CACHE_DIR
        try:  # numba reads the folder while it decorates
            numba.config.CACHE_DIR = str(folder or "")
            return numba.njit(fastmath=FAST, nogil=True, error_model="numpy", cache=folder is not None)(function)
        finally:
            numba.config.CACHE_DIR = held

    return decorate


def prefetcher() -> Any:
    """An operation for compiled functions, `prefetch(rows, row, i)`: ask for the cache line at `rows[row, i]` before it is needed."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def prefetch(typing_context: Any, rows: Any, row: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = signature.args[0]
            array = context.make_array(kind)(context, builder, arguments[0])
            where = [context.cast(builder, a, t, types.intp) for a, t in zip(arguments[1:], signature.args[1:], strict=True)]
            place = cgutils.get_item_pointer(context, builder, kind, array, where, wraparound=False)
            byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            call = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [byte, number, number, number]), "llvm.prefetch.p0i8"
            )
            read, second_level, data = (ir.Constant(number, v) for v in (0, 2, 1))
            builder.call(call, [builder.bitcast(place, byte), read, second_level, data])
            return context.get_dummy_value()

        return types.void(rows, row, i), generate

    return prefetch


WIDTH = 16
"""Numbers that `packer`'s operation takes at once."""


def packer() -> Any | None:
    """An operation for compiled functions, `pack(keys, i, bound, places, kept, m)`: write the places i … i + 15 of those of `keys[i : i + 16]` that are at
    least `bound` to `places` from m on, and those keys to `kept`; returns m plus their number. All int32 and contiguous, and up to 16 numbers from m on
    are overwritten. None where the processor that numba compiles for has no instruction for it (AVX-512)."""
    import llvmlite.binding
    import numba
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    chosen = numba.config.CPU_NAME or numba.config.CPU_FEATURES
    if chosen or not llvmlite.binding.get_host_cpu_features().get("avx512f", False):
        return None

    @intrinsic
    def pack(typing_context: Any, keys: Any, i: Any, bound: Any, places: Any, kept: Any, m: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number, vector, mask_type = ir.IntType(32), ir.VectorType(ir.IntType(32), WIDTH), ir.VectorType(ir.IntType(1), WIDTH)

            def place(k: int, index: Any) -> Any:
                kind = signature.args[k]
                array = context.make_array(kind)(context, builder, arguments[k])
                pointer = cgutils.get_item_pointer(context, builder, kind, array, [index], wraparound=False)
                return builder.bitcast(pointer, vector.as_pointer())

            def spread(value: Any) -> Any:
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(number, 0))
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(vector, [0] * WIDTH))

            first = context.cast(builder, arguments[1], signature.args[1], types.intp)
            begin = context.cast(builder, arguments[5], signature.args[5], types.intp)
            least = context.cast(builder, arguments[2], signature.args[2], types.int32)
            keys_16 = builder.load(place(0, first), align=4)
            mask = builder.icmp_signed(">=", keys_16, spread(least))
            compress = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector, vector, mask_type]), f"llvm.x86.avx512.mask.compress.v{WIDTH}i32"
            )
            here = builder.add(spread(builder.trunc(first, number)), ir.Constant(vector, list(range(WIDTH))))
            for k, value in ((3, here), (4, keys_16)):
                builder.store(builder.call(compress, [value, ir.Constant(vector, None), mask]), place(k, begin), align=4)
            taken = builder.ctpop(builder.bitcast(mask, ir.IntType(WIDTH)))
            return builder.add(begin, builder.zext(taken, begin.type))

        return types.intp(keys, i, bound, places, kept, m), generate

    return pack
