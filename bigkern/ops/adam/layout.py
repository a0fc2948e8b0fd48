"""How tensors lie in memory: what kernels that read it as one block ask."""

from __future__ import annotations

from torch import Tensor


def same_layout(p: Tensor, other: Tensor) -> bool:
    """Whether an element lies as far from the first in ``other`` as in p, which is of the same shape."""
    return p.stride() == other.stride() or (p.is_contiguous() and other.is_contiguous())


def dense(p: Tensor) -> bool:
    """Whether p's elements fill one block of memory, each once, in any order of dimensions."""
    if p.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
