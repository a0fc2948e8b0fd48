"""Repairs to Triton's interpreter, without which bfloat16 and fp8 kernels cannot be judged by it.

The interpreter keeps a bfloat16 as a uint16. Its ``tl.dot`` multiplies those integers as if they were
numbers, and its conversion from float32 truncates, where the hardware rounds to nearest even. Both are
replaced here, for the tests; kernels do no bfloat16 arithmetic other than products (they widen at load).
An integer that becomes a bfloat16 becomes its bits. float32 -> e4m3 rounds ties up, loses the carry of a
significand that rounds to the next power of two, and turns what is beyond 448, and NaN, into any number.
Products of fp32 that ask for ``tf32x3`` are made as tensor cores are believed to make them, so that the
parity rule can judge them. Atomics through tensor descriptors are missing. Triton 3.6 also cannot turn its
scalars, arrays of one element, into loop bounds under numpy 2.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BITS_OF_FLOAT32 = np.uint64(0xFFFFFFFFE0000000)  # sign, exponent and 23 bits of a float64's significand


def to_bfloat16(x: Any) -> Any:
    """float32 -> the uint16 of the nearest bfloat16, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(bits: Any) -> Any:
    """The uint16 of a bfloat16 -> float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_e4m3(bits: Any) -> Any:
    """The uint8 of an e4m3 -> float32."""
    exponent, significand = (bits >> 3).astype(np.int32) & 15, bits & 7
    size = np.ldexp(np.where(exponent > 0, significand + 8.0, significand), np.maximum(exponent, 1) - 10)
    size = np.where(bits & 127 == 127, np.nan, size)
    return np.where(bits > 127, -size, size).astype(np.float32)


def to_e4m3(x: Any) -> Any:
    """float32 -> the uint8 of the nearest e4m3, ties to even; 448 beyond it, and a NaN stays one."""
    size = np.minimum(np.abs(x), np.float32(448))
    unit = np.ldexp(1.0, np.maximum(np.frexp(size)[1] - 4, -9))
    bits = np.searchsorted(from_e4m3(np.arange(127, dtype=np.uint8)), np.rint(size / unit) * unit)
    return np.where(np.isnan(x), 127, bits).astype(np.uint8) | (np.signbit(x).astype(np.uint8) << 7)


def to_tf32(x: Any) -> Any:
    """float32 -> the nearest number of 11 significant bits, as a float32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def product(a: Any, b: Any, sums: Any, cut: bool = False) -> Any:
    """sums + a @ b in fp32, eight products at a time, each time rounded or cut.

    One order of sums for a @ b and its transpose, as in hardware: the backward relies on equal scores.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[1], 8):
        exact = sums + a[:, k : k + 8] @ b[k : k + 8]
        if cut:
            exact = (exact.view(np.uint64) & BITS_OF_FLOAT32).view(np.float64)
        sums = exact.astype(np.float32)
    return sums


def tf32x3(a: Any, b: Any) -> Any:
    """a @ b from the upper and lower halves of both: all but lower times lower."""
    a_big, b_big = to_tf32(a), to_tf32(b)
    a_small, b_small = to_tf32(a - a_big), to_tf32(b - b_big)
    small = product(a_small, b_big, np.zeros((a.shape[0], b.shape[1]), np.float32), cut=True)
    small = product(a_big, b_small, small, cut=True)
    small = np.where(np.isnan(small), np.float32(0), small)  # of infinite factors
    return product(a_big, b_big, small, cut=True)


def repair() -> None:
    """Install the replacements; twice does no harm."""
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "_bigkern_repaired", False):
        return
    convert_float = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return from_bfloat16(data)
        if source == tl.float32 and target == tl.float8e4nv:
            return to_e4m3(data)
        return convert_float(data, source, target, rounding)

    cast_impl = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, value: Any, target: Any) -> Any:
        if value.dtype.scalar.is_int() and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16(value.data.astype(np.float32)), tl.bfloat16)
        return cast_impl(self, value, target)

    widened = {tl.bfloat16: from_bfloat16, tl.float8e4nv: from_e4m3}

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_imprecise: Any) -> Any:
        if "x3" in str(input_precision).lower() and a.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(tf32x3(a.data, b.data) + d.data, d.dtype.scalar)
        x, y = (widened.get(t.dtype.scalar, np.asarray)(t.data) for t in (a, b))
        return interpreter.TensorHandle(product(x, y, d.data), d.dtype.scalar)

    def create_descriptor_reduce(self: Any, kind: Any, tiles: Any, value: Any, offsets: Any) -> Any:
        assert kind == interpreter._ir.DESCRIPTOR_REDUCE_KIND.ADD
        pointers, mask = tiles.materialize_pointers(offsets)
        add, relaxed = interpreter._ir.ATOMIC_OP.FADD, interpreter._ir.MEM_SEMANTIC.RELAXED
        return self.create_atomic_rmw(add, pointers, value, mask, relaxed, None)

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    patch_lang = interpreter._patch_lang

    def patch_once(fn: Any) -> Any:
        """A kernel's device functions find the language patched; doing it anew is a third of the time."""
        seen = [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]
        if seen and not any(tl.core.is_builtin(lang.load) for lang in seen):
            return interpreter._LangPatchScope()
        return patch_lang(fn)

    interpreter._patch_lang = patch_once
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce
    interpreter._bigkern_repaired = True
