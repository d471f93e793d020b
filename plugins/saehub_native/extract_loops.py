"""bfloat16 activations of a layer (as int16 bits, numpy) in; norms, activation functions and attention of them out: compiled loops.

Everything between reading and writing is float32, so a result is rounded once, where a chain of tensor operations rounds after each.
A function works on a range, so that any number of threads can share it; nothing outside the range enters a result.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saehub_native.kernels import compiled

jit = compiled.compiler(compiled.__file__, __file__)

ROWS, COLUMNS = 4, 32
"""Of the product that is held in registers."""
LANES = 16


def _bits() -> tuple[Any, Any]:
    """float32 of int32 bits, and back, for compiled functions."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def number(typing_context: Any, bits: Any) -> Any:
        return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType())

    @intrinsic
    def bits(typing_context: Any, number: Any) -> Any:
        return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.IntType(32))

    return number, bits


def _product(transposed: bool) -> Any:
    """An operation for compiled functions on float32 matrices, `product(A, i, B, j, n, C)`, with r < ROWS and c < COLUMNS:

    C[r, j+c] = Σ_{k<n} A[r, i+k] B[k, j+c]; transposed: C[r, j+c] = Σ_{k<n} A[k, i+r] B[k, j+c]

    The sums stay in registers: numba's compiler cannot see that arrays do not overlap, and would write each sum to memory again and again.
    Nothing checks the bounds.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    single, word = ir.FloatType(), ir.IntType(64)
    vector = ir.VectorType(single, LANES)
    parts = COLUMNS // LANES

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        A, B, C = (context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 2, 5))
        first, column, count = arguments[1], arguments[3], arguments[4]

        def place(array: Any, row: Any, column: Any) -> Any:
            offset = builder.add(builder.mul(builder.extract_value(array.strides, 0), row), builder.mul(column, word(4)))
            return builder.inttoptr(builder.add(builder.ptrtoint(array.data, word), offset), single.as_pointer())

        def lanes(array: Any, row: Any, part: int) -> Any:
            return builder.bitcast(place(array, row, builder.add(column, word(part * LANES))), vector.as_pointer())

        zero, anything = ir.Constant(vector, [0.0] * LANES), ir.Constant(vector, ir.Undefined)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        sums = [[cgutils.alloca_once(builder, vector) for _ in range(parts)] for _ in range(ROWS)]
        for row in sums:
            for total in row:
                builder.store(zero, total)
        with cgutils.for_range(builder, count, intp=word) as loop:
            k = loop.index
            b = [builder.load(lanes(B, k, part), align=4) for part in range(parts)]
            for r in range(ROWS):
                here = (k, builder.add(first, word(r))) if transposed else (word(r), builder.add(first, k))
                a = builder.insert_element(anything, builder.load(place(A, *here), align=4), ir.IntType(32)(0))
                a = builder.shuffle_vector(a, anything, everywhere)
                for part in range(parts):
                    term = builder.fmul(a, b[part], flags=("contract",))
                    builder.store(builder.fadd(builder.load(sums[r][part]), term, flags=("contract",)), sums[r][part])
        for r in range(ROWS):
            for part in range(parts):
                builder.store(builder.load(sums[r][part]), lanes(C, word(r), part), align=4)
        return context.get_dummy_value()

    @intrinsic
    def product(typing_context: Any, A: Any, i: Any, B: Any, j: Any, n: Any, C: Any) -> Any:
        return types.void(A, types.int64, B, types.int64, types.int64, C), generate

    return product


_number, _of = _bits()
_of_columns, _of_rows = _product(True), _product(False)


@jit
def _wide(bits):
    """bfloat16 to float32."""
    return _number(np.int32(bits) << np.int32(16))


@jit
def _narrow(x):
    """To the nearest bfloat16, ties to even. NaN stays NaN: one of bfloat16, or of the processor, has no bits that could carry over."""
    b = _of(x)
    return np.int16((b + np.int32(0x7FFF) + ((b >> np.int32(16)) & np.int32(1))) >> np.int32(16))


@jit
def _exp(x):
    """e^x, at least e^-87, infinite above 88.3: 2^n times Cephes' polynomial (Moshier 1989) for what is left of x."""
    x = np.float32(-87) if x < np.float32(-87) else x  # so written, NaN stays
    x = np.float32(89) if x > np.float32(89) else x
    n = np.rint(x * np.float32(1.4426950408889634))
    f = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    return (p * f * f + f + np.float32(1)) * _number((np.int32(n) + np.int32(127)) << np.int32(23))


@jit
def activate(start, stop, x_N, linear, cubic, out_N):
    """x σ(linear·x + cubic·x³): SiLU (1, 0), GELU with tanh (√(8/π), 0.044715 √(8/π)), quick GELU (1.702, 0)."""
    x_N, out_N = x_N[start:stop], out_N[start:stop]
    # Indices from 0: numba looks at the sign of every other. Two loops: 0·x² is not a number where x² is infinite.
    if cubic == 0:
        for i in range(x_N.shape[0]):
            x = _wide(x_N[i])
            out_N[i] = _narrow(x / (np.float32(1) + _exp(-linear * x)))
    else:
        for i in range(x_N.shape[0]):
            x = _wide(x_N[i])
            out_N[i] = _narrow(x / (np.float32(1) + _exp(-x * (linear + cubic * x * x))))


@jit
def normalise(start, stop, x_BD, weight_D, eps, out_BD):
    """x / √(mean x² + eps) · weight."""
    x_BD, out_BD = x_BD[start:stop], out_BD[start:stop]
    n, d = x_BD.shape
    for b in range(n):
        square = np.float32(0)
        for i in range(d):
            x = _wide(x_BD[b, i])
            square += x * x
        factor = np.float32(1) / np.sqrt(square / np.float32(d) + eps)
        for i in range(d):
            out_BD[b, i] = _narrow(_wide(x_BD[b, i]) * factor * weight_D[i])


@jit
def _columns(x_TH, x_HP):
    """float32 and transposed."""
    for t in range(x_TH.shape[0]):
        for i in range(x_TH.shape[1]):
            x_HP[i, t] = _wide(x_TH[t, i])


@jit
def _rotate(x_HP, cos_RT, sin_RT):
    """(a, b) ← (a cos - b sin, b cos + a sin) for channels i and R + i."""
    R, T = cos_RT.shape
    for i in range(R):
        a_T, b_T, cos_T, sin_T = x_HP[i], x_HP[R + i], cos_RT[i], sin_RT[i]
        for t in range(T):
            a, b = a_T[t], b_T[t]
            a_T[t] = a * cos_T[t] - b * sin_T[t]
            b_T[t] = b * cos_T[t] + a * sin_T[t]


@jit
def _exponentials(s_T, scale, last, end):
    """s ← e^{scale (s - max s)} for the first `last`, 0 up to `end`; returns 1 / Σ."""
    top = np.int32(-(2**31))
    for j in range(last):  # floats as integers of the same order: their maximum takes no care of NaN, so that it is vectorised
        b = _of(s_T[j])
        b ^= (b >> np.int32(31)) & np.int32(0x7FFFFFFF)
        top = b if b > top else top
    highest = _number(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    total = np.float32(0)
    for j in range(last):
        e = _exp(scale * (s_T[j] - highest))
        s_T[j] = e
        total += e
    for j in range(last, end):
        s_T[j] = np.float32(0)
    return np.float32(1) / total


@jit
def attend(start, stop, q_BTD, k_BTD, v_BTD, cos_RT, sin_RT, heads, groups, scale, causal, out_BTD):
    """softmax(scale · rot(q) rot(k)ᵀ) v a head, `heads` of queries over `groups` of keys and values; units start … stop of (sequence, group).

    The sums of a few rows are made in registers, the exponentials of them in the first cache; nothing of size T² is held.
    """
    T, H = q_BTD.shape[1], q_BTD.shape[2] // heads
    P = (T + COLUMNS - 1) // COLUMNS * COLUMNS + LANES  # not a power of two: rows would fall on each other in the cache
    W = (H + COLUMNS - 1) // COLUMNS * COLUMNS
    q_HP, k_HP, v_PW = np.zeros((H, P), np.float32), np.zeros((H, P), np.float32), np.zeros((P, W), np.float32)
    s_RP, o_RW, factor_R = np.zeros((ROWS, P), np.float32), np.zeros((ROWS, W), np.float32), np.zeros(ROWS, np.float32)
    for unit in range(start, stop):
        b, g = unit // groups, unit % groups
        _columns(k_BTD[b, :, g * H : (g + 1) * H], k_HP)
        _rotate(k_HP, cos_RT, sin_RT)
        v_TH = v_BTD[b, :, g * H : (g + 1) * H]
        for t in range(T):
            for i in range(H):
                v_PW[t, i] = _wide(v_TH[t, i])
        for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
            _columns(q_BTD[b, :, h * H : (h + 1) * H], q_HP)
            _rotate(q_HP, cos_RT, sin_RT)
            for t in range(0, T, ROWS):
                rows = min(ROWS, T - t)
                end = t + rows if causal else T
                for j in range(0, end, COLUMNS):
                    _of_columns(q_HP, t, k_HP, j, H, s_RP)
                for r in range(rows):
                    factor_R[r] = _exponentials(s_RP[r], scale, t + r + 1 if causal else T, end)
                for i in range(0, H, COLUMNS):
                    _of_rows(s_RP, 0, v_PW, i, end, o_RW)
                for r in range(rows):
                    out_H, o_W, factor = out_BTD[b, t + r, h * H : (h + 1) * H], o_RW[r], factor_R[r]
                    for i in range(H):
                        out_H[i] = _narrow(o_W[i] * factor)
