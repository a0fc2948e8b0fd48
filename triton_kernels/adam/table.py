"""How the adam kernels find their tensors: a table of addresses, and a list of chunks.

    table  [2 + lists, n] int64   elements of each tensor, elements ahead of it, its address in each list
    chunks [c, 2] int32           tensor, and which CHUNK elements of it; program i does chunks[i]

Both live on the device and are kept from step to step while the addresses stay the same.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements that a program holds at once
CHUNK = 8 * BLOCK  # elements that a program works on

SIZE, BEFORE, FIRST_LIST = (tl.constexpr(row) for row in range(3))

POINTEES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


@triton.jit
def address(table, row, tensor, n, POINTEE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the tensor of list ``row`` begins."""
    pointer = tl.load(table + (FIRST_LIST + row) * n + tensor).to(tl.pointer_type(POINTEE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


class Work(NamedTuple):
    """On the device, what the kernels find their tensors by; whether all may be read in 16 bytes."""

    table: Tensor
    chunks: Tensor
    aligned: bool


_prepared: OrderedDict[tuple[object, ...], Work] = OrderedDict()
_KEPT = 32  # lists of tensors whose tables are kept


def prepare(arrays: list[list[Tensor]], numbers: list[list[Tensor]]) -> Work:
    """The tables of lists of like-sized tensors, and of lists of a few numbers for each; those of the last
    calls are kept, by address and size."""
    sizes = [x.numel() for x in arrays[0]]
    addresses = [[x.data_ptr() for x in tensors] for tensors in (*arrays, *numbers)]
    key = (arrays[0][0].device, arrays[0][0].dtype, len(arrays), *sizes, *map(tuple, addresses))
    work = _prepared.get(key)
    if work is None:
        work = _prepared[key] = build(arrays[0][0].device, sizes, addresses, len(arrays))
        while len(_prepared) > _KEPT:
            _prepared.popitem(last=False)
    _prepared.move_to_end(key)
    return work


def build(device: torch.device, sizes: list[int], addresses: list[list[int]], arrays: int) -> Work:
    """The tables for these addresses; the first ``arrays`` lists decide whether all is aligned."""
    size = torch.tensor(sizes, dtype=torch.int64)
    counts = (size + CHUNK - 1) // CHUNK
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    within = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    chunks = torch.stack([tensors, within], dim=1).to(torch.int32)
    table = torch.stack([size, size.cumsum(0) - size, *map(torch.tensor, addresses)])
    aligned = all(address % 16 == 0 for row in addresses[:arrays] for address in row)
    return Work(table.to(device), chunks.to(device), aligned)
