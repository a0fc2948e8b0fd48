"""How adam's kernels store p and the moments: masters, bf16 rounded at random, 8-bit codes.

    p    as it is; with a master in fp32 beside it; or, of bf16, with the int16 that its rounding left
    m, v as they are; or as 8-bit codes, with a scale for each block of 256 neighbours

A tile of codes is [blocks, 256], so that a block's largest magnitude is a maximum along a row. The codes are
csrc/adam/dynamic8.h's, by arithmetic: seven decades, in each of which a code's number lies on a line.

Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from bigkern.triton_kernels.common.dropout import random_bits

QUANTISED = tl.constexpr(256)  # elements of a block

# The generator's heads: for v and vmax, and for p.
SQUARES, PARAMETER = tl.constexpr(0), tl.constexpr(1)


class Seed(NamedTuple):
    key0: int  # 2^33 + 2 key + 1, as in dropout.py: no seed compiles a variant of its own
    key1: int


def seed_of(seed: int | None) -> Seed | None:
    if seed is None:
        return None
    key0, key1 = (2**33 + 2 * number + 1 for number in (seed & 0xFFFFFFFF, seed >> 32))
    return Seed(key0, key1)


@triton.jit
def load_wide(pointer, at, exists, MASKED: tl.constexpr):
    x = tl.load(pointer + at, mask=exists, other=0.0) if MASKED else tl.load(pointer + at)
    return x.to(tl.float32)


@triton.jit
def store_narrow(pointer, at, x, exists, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + at, x.to(pointer.dtype.element_ty), mask=exists)
    else:
        tl.store(pointer + at, x.to(pointer.dtype.element_ty))


# ---- bf16, rounded at random ------------------------------------------------------------------------


@triton.jit
def drawn(seed, HEAD: tl.constexpr, t, position, first, BLOCK: tl.constexpr):
    """32 random bits for BLOCK elements from position ``first`` on, in step t: random_row in adam.h."""
    if first >> 32 == (first + BLOCK - 1) >> 32:
        bits = random_bits(seed.key0, seed.key1, HEAD, t ^ (first >> 32 << 24), position)
    else:
        bits = random_bits(seed.key0, seed.key1, HEAD, t ^ (position >> 32 << 24), position)
    return bits


@triton.jit
def at_random(x, bits):
    """x as one of its two neighbours in bf16, by the high half of bits; infinities and NaN as they are."""
    raw = x.to(tl.uint32, bitcast=True)
    up = (raw + (bits >> 16)) & 0xFFFF0000
    return tl.where((raw & 0x7F800000) == 0x7F800000, raw, up).to(tl.float32, bitcast=True)


# ---- p ----------------------------------------------------------------------------------------------


@triton.jit
def load_p(p_at, master_at, at, exists, MASTER: tl.constexpr, MASKED: tl.constexpr):
    if MASTER == "remainder":
        upper = tl.load(p_at + at, mask=exists, other=0).to(tl.int32) << 16
        rest = tl.load(master_at + at, mask=exists, other=0).to(tl.int32)
        p = (upper + rest).to(tl.float32, bitcast=True)
    elif MASTER == "float32":
        p = load_wide(master_at, at, exists, MASKED)
    else:
        p = load_wide(p_at, at, exists, MASKED)
    return p


@triton.jit
def store_p(p_at, master_at, at, p, exists, bits, MASTER: tl.constexpr, MASKED: tl.constexpr):
    if MASTER == "remainder":
        raw = p.to(tl.int32, bitcast=True)
        upper = (raw + 0x8000) >> 16
        store_narrow(p_at, at, upper, exists, MASKED)
        store_narrow(master_at, at, raw - (upper << 16), exists, MASKED)
    else:
        if MASTER == "float32":
            store_narrow(master_at, at, p, exists, MASKED)
        elif bits is not None:
            p = at_random(p, bits)
        store_narrow(p_at, at, p, exists, MASKED)


# ---- 8 bits -----------------------------------------------------------------------------------------


@triton.jit
def decoded(codes, SIGNED: tl.constexpr):
    """The value of each code, fp32."""
    FIRST: tl.constexpr = 0 if SIGNED else 1
    level = codes.to(tl.int32)
    k = (tl.abs(level - 127) if SIGNED else level + 1).to(tl.float32)
    cell = ((254 - (k.to(tl.int32, bitcast=True) >> 23)) << 23).to(tl.float32, bitcast=True)  # 2^-d
    tens = tl.full(k.shape, 1e-6, tl.float32)
    for E in tl.static_range(1, 7):
        tens = tl.where(k >= 2.0 ** (E + FIRST), 10.0 ** (E - 6), tens)
    value = tens * (0.1 + 0.9 * (k * cell - 1.0 + 0.5 * cell))
    value = tl.where(k == 2.0 ** (7 + FIRST), 1.0, value)
    if SIGNED:
        value = tl.where(k == 0.0, 0.0, tl.where(codes < 127, -value, value))
    else:
        value = tl.where(codes == 0, 0.0, value)
    return value


@triton.jit
def encoded(x, share, SIGNED: tl.constexpr):
    """The code of each x; ``share`` is |x| / scale, in [0, 1]."""
    FIRST: tl.constexpr = 0 if SIGNED else 1
    steps = tl.full(x.shape, 2.0**FIRST, tl.float32)
    tens = tl.full(x.shape, 1e6, tl.float32)
    for E in tl.static_range(1, 7):
        above = share > 10.0 ** (E - 7) * (1.0 + 0.9 / 2.0 ** (E - 1 + FIRST))
        steps = tl.where(above, 2.0 ** (E + FIRST), steps)
        tens = tl.where(above, 10.0 ** (6 - E), tens)
    place = (share * tens - 0.1) * (1.0 / 0.9) * steps
    k = (steps + tl.minimum(tl.maximum(place, 0.0), steps - 1.0)).to(tl.int32)
    k = tl.where(share <= 0.5e-6 * (0.1 + 0.45 / 2.0**FIRST), 0, k)
    if SIGNED:
        k = tl.where(share > 1.0 - 0.225 / 2.0**6, 128, k)
        code = 127 + tl.where(x < 0.0, -tl.minimum(k, 127), k)
    else:
        k = tl.where(share > 1.0 - 0.225 / 2.0**7, 256, k)
        code = tl.where(k == 0, (x > 0.0).to(tl.int32), k - 1)  # what is not 0 never takes the code of 0
    return code.to(tl.uint8)


@triton.jit
def load_codes(codes_at, scales_at, at, blocks, exists, size, SIGNED: tl.constexpr):
    scales = tl.load(scales_at + blocks, mask=blocks * QUANTISED < size, other=0.0)
    codes = tl.load(codes_at + at, mask=exists, other=127 if SIGNED else 0)
    return decoded(codes, SIGNED) * scales[:, None]


@triton.jit
def store_codes(codes_at, scales_at, at, x, blocks, exists, size, SIGNED: tl.constexpr):
    """x [blocks, 256]; the bits of magnitudes compare as they do, and a NaN's are the largest."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    share = tl.div_rn(tl.abs(x), tl.broadcast_to(tl.where(largest == 0.0, 1.0, largest)[:, None], x.shape))
    tl.store(codes_at + at, encoded(x, share, SIGNED), mask=exists)
    tl.store(scales_at + blocks, largest, mask=blocks * QUANTISED < size)
