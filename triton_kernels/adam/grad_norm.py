"""The Euclidean norm of all gradients, the same bits in every run.

    chunk    program i     fp32 sums of squares     sums [c] fp32
    sums     one program   double, in a fixed order, and the root

Reads each gradient once. An infinity or a NaN anywhere comes out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.adam.table import BLOCK, CHUNK, POINTEES, SIZE, address, prepare
from bigkern.triton_kernels.common import launch


@triton.jit
def squares_kernel(
    table, chunks, sums, n, POINTEE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.load(table + SIZE * n + tensor)
    g = address(table, 0, tensor, n, POINTEE, ALIGNED) + start
    count = tl.minimum(size - start, CHUNK).to(tl.int32)
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        x = tl.load(g + first + at, mask=first + at < count, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums + program, tl.sum(total))


@triton.jit
def norm_kernel(sums, norm, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        total += tl.load(sums + first + at, mask=first + at < count, other=0.0).to(tl.float64)
    tl.store(norm, tl.sqrt(tl.sum(total)).to(tl.float32))


def grad_norm(grads: list[Tensor]) -> Tensor:
    """``[]`` fp32: the norm of all elements of tensors of one dtype and device, dense in memory."""
    work = prepare([grads], [])
    count = len(work.chunks)
    sums = torch.empty(count, dtype=torch.float32, device=grads[0].device)
    norm = torch.empty((), dtype=torch.float32, device=grads[0].device)
    if count > 0:
        squares_kernel[(count,)](
            work.table, work.chunks, sums, len(grads), POINTEE=POINTEES[grads[0].dtype],
            ALIGNED=work.aligned, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
    norm_kernel[(1,)](sums, norm, count, BLOCK=BLOCK, num_warps=4, **launch.OPTIONS)
    return norm
