"""Eight bits a number: block-wise dynamic quantisation, which Adam's moments are stored in.

A block of 256 neighbours keeps its largest magnitude, and each number's share of that as one of 256 values.
They lie as a person would write numbers down: seven decades, each twice as finely divided as the one below.

    value(k) = 10^(d-6) (0.1 + 0.9 (k / 2^d - 1 + 2^-d / 2))       d = floor(log2 k), k = 1 .. 127

    m, signed      code 127 + level: level 0 is 0, +-k is +-value(k), 128 is 1
    v, unsigned    level 0 is 0, level k - 1 is value(k) with 10^(d-7), k = 2 .. 255, level 255 is 1

A number takes the nearest value's code. A v that is not 0 never takes the code of 0: p's step divides by its
root, while m of the same element may well have a code of its own.

Dettmers, Lewis, Shleifer, Zettlemoyer, 8-bit Optimizers via Block-wise Quantization (2022).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256


def blocks_of(n: int) -> int:
    return (n + BLOCK - 1) // BLOCK


@cache
def codebook(signed: bool) -> Tensor:
    """``[256]`` fp64: the value of each code, ascending."""
    k = torch.arange(1, 128) if signed else torch.arange(2, 256)
    steps = 2 ** k.log2().floor()  # 2^d cells in decade d; unsigned 2^(d+1)
    decade = steps.log2() - (6 if signed else 7)
    positive = 10.0 ** decade.double() * (0.1 + 0.9 * (k / steps - 1 + 0.5 / steps).double())
    ends = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return torch.cat([-positive.flip(0) if signed else positive[:0], ends[0], positive, ends[1]])


def quantised(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """``[n]`` -> codes ``[n]`` uint8 and one fp32 scale a block, the largest magnitude in it."""
    padded = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(1)
    shares = padded / torch.where(scales == 0, 1, scales)[:, None]
    values = codebook(signed).to(x.device)
    codes = torch.bucketize(shares, ((values[1:] + values[:-1]) / 2).to(x.dtype))
    if not signed:
        codes = torch.where(padded > 0, codes.clamp(min=1), codes)
    return codes.view(-1)[: len(x)].to(torch.uint8), scales.float()


def dequantised(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """``[n]`` fp32."""
    values = codebook(signed).float().to(codes.device)[codes.long()]
    return values * scales.repeat_interleave(BLOCK)[: len(codes)]
