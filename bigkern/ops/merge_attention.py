"""``merge_attention``: attention over all keys from attention over parts of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    outputs, lses = list(outputs), list(lses)
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(f"lses must be as many as outputs, and at least 1: {len(lses)} and {len(outputs)}")
    for x, lse in zip(outputs, lses, strict=True):
        if x.shape != outputs[0].shape or lse.shape != x.shape[:-1]:
            shape, found = list(outputs[0].shape), f"{list(x.shape)} and {list(lse.shape)}"
            raise ValueError(f"outputs must all be {shape} and lses {shape[:-1]}, not {found}")
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
