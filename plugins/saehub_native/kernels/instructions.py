"""The name of an operation of the processor in; a function that compiled loops can call, out: what numba has no word for.

Each is None where the processor that numba compiles for does not have it; loops then do without. Vectors are of 16 numbers of 32 bits, places in
arrays are trusted, and arrays are contiguous.
"""

from __future__ import annotations

from typing import Any

WIDTH = 16
"""Numbers that `pack`, `sift` and `multiply` take at once."""
ROWS, VECTORS = 6, 4
"""Rows and vectors of latents of one `multiply`: their sums, the weights at hand and one number of a row fill the 32 registers."""
LATENTS = WIDTH * VECTORS


def has(*features: str) -> bool:
    """Whether numba compiles for a processor with all of these."""
    import llvmlite.binding
    import numba

    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:  # the user's choice; LLVM alone knows what it means
        return False
    host = llvmlite.binding.get_host_cpu_features()
    return all(host.get(feature, False) for feature in features)


class Emit:
    """The code that the operations below have in common; `arguments` as numba passes them, by the types in `signature`."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any):
        from llvmlite import ir

        self.context, self.builder, self.signature, self.arguments, self.ir = context, builder, signature, arguments, ir
        self.number, self.size, self.byte = ir.IntType(32), ir.IntType(64), ir.IntType(8)
        self.vector, self.floats = ir.VectorType(self.number, WIDTH), ir.VectorType(ir.FloatType(), WIDTH)
        self.undefined, self.zero = ir.Constant(self.vector, ir.Undefined), ir.Constant(self.vector, None)

    def index(self, k: int) -> Any:
        """Argument k as a 64-bit integer."""
        from numba import types

        return self.context.cast(self.builder, self.arguments[k], self.signature.args[k], types.intp)

    def scalar(self, k: int, kind: Any) -> Any:
        """Argument k as `kind`."""
        return self.context.cast(self.builder, self.arguments[k], self.signature.args[k], kind)

    def array(self, k: int) -> Any:
        """Argument k, an array."""
        return self.context.make_array(self.signature.args[k])(self.context, self.builder, self.arguments[k])

    def at(self, pointer: Any, offset: Any, kind: Any) -> Any:
        """`offset` bytes beyond a pointer, as a pointer to `kind`."""
        offset = self.ir.Constant(self.size, offset) if isinstance(offset, int) else offset
        byte = self.builder.bitcast(pointer, self.byte.as_pointer())
        return self.builder.bitcast(self.builder.gep(byte, [offset]), kind.as_pointer())

    def times(self, value: Any, factor: int) -> Any:
        return self.builder.mul(value, self.ir.Constant(self.size, factor))

    def of(self, k: int, index: Any, kind: Any) -> Any:
        """Element `index` of argument k, an array of 4-byte numbers, as a pointer to `kind`."""
        return self.at(self.array(k).data, self.times(index, 4), kind)

    def spread(self, value: Any, vector: Any) -> Any:
        """A vector of one value."""
        undefined = self.ir.Constant(vector, self.ir.Undefined)
        one = self.builder.insert_element(undefined, value, self.ir.Constant(self.number, 0))
        return self.builder.shuffle_vector(one, undefined, self.ir.Constant(self.vector, [0] * WIDTH))

    def call(self, name: str, result: Any, *values: Any) -> Any:
        """An intrinsic function of LLVM."""
        from numba.core import cgutils

        kind = self.ir.FunctionType(result, [v.type for v in values])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), values)

    def write_some(self, mask: Any, m: Any, *pairs: tuple[int, Any]) -> Any:
        """For each (argument, vector): the numbers of the vector that the mask names, to the array from m on. Returns m plus their number."""
        for k, value in pairs:
            packed = self.call(f"llvm.x86.avx512.mask.compress.v{WIDTH}i32", self.vector, value, self.zero, mask)
            self.builder.store(packed, self.of(k, m, self.vector), align=4)
        taken = self.builder.ctpop(self.builder.bitcast(mask, self.ir.IntType(WIDTH)))
        return self.builder.add(m, self.builder.zext(taken, m.type))

    def places(self, first: Any) -> Any:
        """first … first + 15."""
        counted = self.ir.Constant(self.vector, list(range(WIDTH)))
        return self.builder.add(self.spread(self.builder.trunc(first, self.number), self.vector), counted)


def prefetcher() -> Any:
    """`prefetch(rows, row, i)`: ask for the cache line at `rows[row, i]` before it is needed."""
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def prefetch(typing_context: Any, rows: Any, row: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, signature, arguments)
            place = cgutils.get_item_pointer(
                context, builder, signature.args[0], emit.array(0), [emit.index(1), emit.index(2)], wraparound=False
            )
            read, second_level, data = (emit.ir.Constant(emit.number, v) for v in (0, 2, 1))
            emit.call("llvm.prefetch.p0i8", emit.ir.VoidType(), builder.bitcast(place, emit.byte.as_pointer()), read, second_level, data)
            return context.get_dummy_value()

        return types.void(rows, row, i), generate

    return prefetch


def packer() -> Any | None:
    """`pack(keys, i, bound, places, kept, m)`: write the places of those of keys[i : i + 16] that are at least `bound` to `places` from m on, and those
    keys to `kept`; returns m plus their number. All int32; up to 16 numbers from m on are overwritten."""
    if not has("avx512f"):
        return None
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def pack(typing_context: Any, keys: Any, i: Any, bound: Any, places: Any, kept: Any, m: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, signature, arguments)
            first = emit.index(1)
            values = builder.load(emit.of(0, first, emit.vector), align=4)
            mask = builder.icmp_signed(">=", values, emit.spread(emit.scalar(2, types.int32), emit.vector))
            return emit.write_some(mask, emit.index(5), (3, emit.places(first)), (4, values))

        return types.intp(keys, i, bound, places, kept, m), generate

    return pack


def sifter() -> Any | None:
    """`sift(sums, i, factor, scale, bias, f, mask, bound, places, kept, m)`: for the 16 sums from i on, of the latents f … f + 15, the float32 scores
    `(sum · (scale · factor) + bias) & mask`; where one is not below `bound`, which what is not a number is not either, the latent goes to `places` and the
    score's bits to `kept`, from m on. Returns m plus their number. Up to 16 numbers from m on are overwritten. Mostly none is expected."""
    if not has("avx512f"):
        return None
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def sift(
        typing_context: Any,
        sums: Any,
        i: Any,
        factor: Any,
        scale: Any,
        bias: Any,
        f: Any,
        mask: Any,
        bound: Any,
        places: Any,
        kept: Any,
        m: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, signature, arguments)
            floats, word, first, begin = emit.floats, emit.ir.IntType(WIDTH), emit.index(5), emit.index(10)
            summed = builder.sitofp(builder.load(emit.of(0, emit.index(1), emit.vector), align=4), floats)
            scales = builder.fmul(builder.load(emit.of(3, first, floats), align=4), emit.spread(emit.scalar(2, types.float32), floats))
            value = emit.call(f"llvm.fma.v{WIDTH}f32", floats, summed, scales, builder.load(emit.of(4, first, floats), align=4))
            bits = builder.and_(builder.bitcast(value, emit.vector), emit.spread(emit.scalar(6, types.int32), emit.vector))
            reached = builder.fcmp_unordered(">=", builder.bitcast(bits, floats), emit.spread(emit.scalar(7, types.float32), floats))
            some = builder.icmp_unsigned("!=", builder.bitcast(reached, word), emit.ir.Constant(word, 0))
            before = builder.block
            with builder.if_then(some, likely=False):
                more = emit.write_some(reached, begin, (8, emit.places(first)), (9, bits))
                inside = builder.block
            now = builder.phi(begin.type)
            now.add_incoming(begin, before)
            now.add_incoming(more, inside)
            return now

        return types.intp(sums, i, factor, scale, bias, f, mask, bound, places, kept, m), generate

    return sift


def multiplier() -> Any | None:
    """`multiply(weights, tile, steps, rows, b, begin, sums)`: with weights int8 [tiles, steps, 64, 4], whose bytes are w ^ −128 (as unsigned: w + 128), and
    int8 rows [·, ≥ 4 · steps], `sums[r, l] = begin[b + r] + Σ_i (w_li + 128) x_(b + r)i` for six rows and the 64 latents of a tile, int32.

    Beyond the last row, the last one again. `begin` is to be −128 Σ_i x_i. 3 bytes beyond the rows may be read."""
    if not has("avx512f", "avx512vnni"):
        return None
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def multiply(typing_context: Any, weights: Any, tile: Any, steps: Any, rows: Any, b: Any, begin: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, signature, arguments)
            steps_, first, line = emit.index(2), emit.index(4), 4 * WIDTH
            tile_at = emit.at(emit.array(0).data, emit.times(builder.mul(emit.index(1), steps_), VECTORS * line), emit.byte)
            x = emit.array(3)
            (n_rows, _), (stride, _) = (cgutils.unpack_tuple(builder, pair, 2) for pair in (x.shape, x.strides))
            last = builder.sub(n_rows, emit.ir.Constant(emit.size, 1))
            row_at, sums_at = [], [[cgutils.alloca_once(builder, emit.vector) for _ in range(VECTORS)] for _ in range(ROWS)]
            for r in range(ROWS):
                row = builder.add(first, emit.ir.Constant(emit.size, r))
                row = builder.select(builder.icmp_signed("<", row, last), row, last)
                row_at.append(emit.at(x.data, builder.mul(row, stride), emit.byte))
                start = emit.spread(builder.load(emit.of(5, row, emit.number)), emit.vector)
                for place in sums_at[r]:
                    builder.store(start, place)
            with cgutils.for_range(builder, steps_) as loop:
                step_at = emit.times(loop.index, VECTORS * line)
                held = [
                    builder.load(emit.at(tile_at, builder.add(step_at, emit.ir.Constant(emit.size, j * line)), emit.vector), align=4)
                    for j in range(VECTORS)
                ]
                for r in range(ROWS):
                    four = builder.load(emit.at(row_at[r], emit.times(loop.index, 4), emit.number), align=1)
                    spread = emit.spread(four, emit.vector)
                    for j in range(VECTORS):
                        total = emit.call("llvm.x86.avx512.vpdpbusd.512", emit.vector, builder.load(sums_at[r][j]), held[j], spread)
                        builder.store(total, sums_at[r][j])
            for r in range(ROWS):
                for j in range(VECTORS):
                    builder.store(builder.load(sums_at[r][j]), emit.at(emit.array(6).data, (r * VECTORS + j) * line, emit.vector), align=4)
            return context.get_dummy_value()

        return types.void(weights, tile, steps, rows, b, begin, sums), generate

    return multiply
