"""The arguments of dropout: its probability, and a key from a seed or from torch's generator."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.core.checks import check_number


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
