"""``scaled_dot_product_attention``: torch's own function, with the attention op behind it."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.attention import attention
from bigkern.ops.varlen_attention import varlen_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` with bigkern's kernels behind it.

    The same signature and meaning, nested tensors ``[B, H, j, D]`` of layout torch.jagged included. What is
    neither four-dimensional nor nested goes to torch's own function, and so does what :func:`bigkern.explain`
    leaves to stock. Dropout draws from torch's default generator, but other numbers than torch's function.

    Raises:
        TypeError, ValueError: as :func:`bigkern.attention`; RuntimeError: as torch's function.

    Source: :func:`torch.nn.functional.scaled_dot_product_attention`.

    Example:
        >>> import torch, bigkern
        >>> q = torch.randn(1, 8, 128, 64)
        >>> bigkern.scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([1, 8, 128, 64])
    """
    nested = query.is_nested and query.layout == torch.jagged and attn_mask is None
    if nested and query.dim() == key.dim() == value.dim() == 4:
        rows = [x.transpose(1, 2) for x in (query, key, value)]
        o = varlen_attention(*rows, causal=is_causal, scale=scale, dropout_p=dropout_p)  # type: ignore[arg-type]
        return cast(Tensor, o).transpose(1, 2)
    grouped = enable_gqa or (query.dim() == 4 and key.dim() == 4 and query.shape[1] == key.shape[1])
    both_masks = attn_mask is not None and is_causal
    if query.dim() != 4 or not grouped or both_masks:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    mask, bias = (attn_mask, None) if boolean else (None, attn_mask)
    o = attention(query, key, value, causal=is_causal, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p)
    return cast(Tensor, o)
