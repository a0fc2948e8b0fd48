"""``merge_attention``: attention over all keys from attention over parts of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigkern.core.checks import check_dense, kind


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Join attention results of the same queries over disjoint sets of keys, by their log-sum-exp.

    ``lse = log(sum_i exp(lse_i))``, ``o = sum_i exp(lse_i - lse) o_i``

    For keys that lie in several places: a shared prefix and a suffix, the ranks of a ring. Differentiable,
    and with :func:`bigkern.attention`'s own ``lse`` the gradients are those of attention over all keys.

    Args:
        outputs: tensors ``[..., Dv]`` of one shape and dtype, as attention returned them.
        lses: their log-sum-exps, ``[...]``, fp32. (Of packed sequences attention returns ``[H, total]``:
            transpose it to match ``[total, H, Dv]``.)

    Returns:
        ``o [..., Dv]`` in the outputs' dtype and ``lse [...]`` in fp32. Where no part has seen anything,
        0 and -inf.

    Saved for backward: the arguments and one weight a row and part.

    Raises:
        ValueError: there is nothing to merge, or shapes differ.

    Source: Rabe and Staats, Self-attention Does Not Need O(n^2) Memory (2021).

    Example:
        >>> import torch, bigkern
        >>> q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 30, 16)
        >>> parts = [bigkern.attention(q, x, x, return_lse=True) for x in k.split([10, 20], dim=2)]
        >>> o, lse = bigkern.merge_attention(*zip(*parts))
        >>> torch.allclose(o, bigkern.attention(q, k, k), atol=1e-5)
        True
    """
    outputs, lses = _tensors("outputs", outputs), _tensors("lses", lses)
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(f"lses must be as many as outputs, and at least 1: {len(lses)} and {len(outputs)}")
    first = outputs[0]
    for x, lse in zip(outputs, lses, strict=True):
        if x.shape != first.shape or lse.shape != x.shape[:-1] or x.dim() == 0:
            shape, found = list(first.shape), f"{list(x.shape)} and {list(lse.shape)}"
            raise ValueError(f"outputs must all be {shape} and lses {shape[:-1]}, not {found}")
        if x.dtype != first.dtype:
            raise TypeError(f"outputs must all be {first.dtype}, not {x.dtype}")
        if x.device != first.device or lse.device != first.device:
            found = f"{x.device} and {lse.device}"
            raise ValueError(f"outputs and lses must all be on {first.device}, not {found}")
    parts = torch.stack(lses)
    most = parts.detach().amax(0)
    most = most.masked_fill(most == float("-inf"), 0.0)
    weights = torch.exp(parts - most)
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    o = sum(x * (w / total).unsqueeze(-1) for x, w in zip(outputs, weights, strict=True))
    lse = (most + torch.log(total)).masked_fill(nothing, float("-inf"))
    return o.to(outputs[0].dtype), lse  # type: ignore[union-attr]


def _tensors(name: str, given: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        raise TypeError(f"{name} must be a sequence of Tensors, not {kind(given)}")
    for i, x in enumerate(given):
        check_dense(f"{name}[{i}]", x)
        if not x.is_floating_point():
            raise TypeError(f"{name}[{i}] must be floating point, not {x.dtype}")
    return list(given)
