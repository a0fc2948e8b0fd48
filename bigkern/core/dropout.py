"""Dropout: its arguments, a key from a seed or from torch's generator, and what it keeps, in plain torch.

Every kernel draws the same bits as the functions at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigkern.core.checks import check_number

OUTPUT, HIDDEN = 0, 1  # the heads of the generator: of a block's or sublayer's output, of its inner layer
GOLDEN = 0x9E3779B9
MASK32 = 0xFFFFFFFF


def check_dropout(p: float, name: str = "dropout_p") -> float:
    return check_number(name, p, "in [0, 1)", 0.0, 1.0)


def dropout_key(p: float, seed: int, offset: int) -> Tensor | None:
    """Two random 32-bit numbers from seed and offset; None without dropout."""
    for name, number in (("seed", seed), ("offset", offset)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{name} must be an int that is not negative, not {number!r}")
    if p == 0.0:
        return None
    key = _splitmix64(_splitmix64(seed) + offset)
    return torch.tensor([key & 0xFFFFFFFF, key >> 32], dtype=torch.int64, device="cpu")


def drawn_key() -> Tensor:
    """A key from torch's generator of the CPU, so that ``torch.manual_seed`` repeats it."""
    return torch.randint(0, 2**32, (2,), dtype=torch.int64, device="cpu")


def _splitmix64(x: int) -> int:
    """Vigna's SplitMix64: neighbouring numbers become unrelated ones."""
    low64 = 0xFFFFFFFFFFFFFFFF
    x = (x + 0x9E3779B97F4A7C15) & low64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & low64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & low64
    return x ^ (x >> 31)


# ---- what is kept ----------------------------------------------------------------------------------


def mix(x: Tensor, half_way: Tensor | int = 0) -> Tensor:
    """A bijection of 32-bit numbers in int64 (Wellons' lowbias32), with a number added half-way."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D + half_way) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def kept(key: Tensor, p: float, heads: Tensor, rows: int, columns: int) -> Tensor:
    """``[*heads.shape, rows, columns]`` bool: what dropout keeps, whose 32 random bits reach p * 2^32.

    The bits depend on the key, the head, the row and the column alone, so that no kernel has to store
    them; csrc/common/dropout.h has the formula.
    """
    key0, key1 = key.to(heads.device).unbind()
    i, j = torch.arange(rows, device=heads.device)[:, None], torch.arange(columns, device=heads.device)
    k0 = mix((key0 + heads[..., None, None] * GOLDEN) & MASK32)
    k1 = mix(key1 ^ k0)
    a = mix((k0 + i * GOLDEN) & MASK32)
    c = mix((k1 + a) & MASK32)
    return mix((a + j * GOLDEN) & MASK32, c) >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    return min(round(p * 2**32), MASK32)


def dropped(x: Tensor, key: Tensor | None, p: float, head: int) -> Tensor:
    """x ``[..., N]`` where dropout keeps it, divided by 1 - p, in x's dtype; x itself without a key."""
    if key is None or p == 0.0:
        return x
    N = x.shape[-1]
    keeps = kept(key, p, torch.tensor(head, device=x.device), math.prod(x.shape[:-1]), N)
    return torch.where(keeps.view(x.shape), x / (1.0 - p), 0.0)
