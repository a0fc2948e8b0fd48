"""What dropout keeps, drawn where it is needed; csrc/common/dropout.h has the formula of all backends."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

GOLDEN = tl.constexpr(0x9E3779B9)  # 2^32 / golden ratio
MIX_1 = tl.constexpr(0x7FEB352D)
MIX_2 = tl.constexpr(0x846CA68B)

OUTPUT = tl.constexpr(0)  # the heads of a block's dropouts: of its output, of its inner layer
HIDDEN = tl.constexpr(1)


class Dropout(NamedTuple):
    key0: int  # 2^33 + 2 key + 1: always of one type and odd, so that no key compiles a variant of its own
    key1: int
    threshold: int
    scale: float  # 1 / (1 - p)


def dropout_of(key: Tensor | None, p: float) -> Dropout | None:
    if key is None or p == 0.0:
        return None
    key0, key1 = (2**33 + 2 * number + 1 for number in key.tolist())
    return Dropout(key0, key1, min(round(p * 2**32), 2**32 - 1), 1.0 / (1.0 - p))


@triton.jit
def mix(x, half_way):
    """A bijection of 32-bit numbers (Wellons' lowbias32), with a number added half-way."""
    x = (x ^ (x >> 16)) * MIX_1 + half_way
    x = (x ^ (x >> 15)) * MIX_2
    return x ^ (x >> 16)


@triton.jit
def random_bits(key0, key1, head, i, j):
    """32 bits for a head's rows i and columns j; the keys as Dropout has them."""
    zero = tl.cast(0, tl.uint32)
    k0 = mix((key0 >> 1).to(tl.uint32) + tl.cast(head, tl.uint32) * GOLDEN, zero)
    k1 = mix((key1 >> 1).to(tl.uint32) ^ k0, zero)
    a = mix(k0 + i.to(tl.uint32) * GOLDEN, zero)
    c = mix(k1 + a, zero)
    return mix(a + j.to(tl.uint32) * GOLDEN, c)


@triton.jit
def kept(dropout, head, i, j):
    """Which elements of a head's rows i and columns j dropout keeps."""
    return random_bits(dropout.key0, dropout.key1, head, i, j) >= tl.cast(dropout.threshold, tl.uint32)


@triton.jit
def dropped(x, dropout, head, i, j):
    """x fp32 where dropout keeps it, / (1 - p); x itself without dropout."""
    if dropout is not None:
        x = tl.where(kept(dropout, head, i, j), x * dropout.scale, 0.0)
    return x
