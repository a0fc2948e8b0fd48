"""``scaled_dot_product_attention``: torch's own function, with the attention op behind it."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.core.checks import TORCHS, kind, misfit_beside, named
from bigkern.ops.attention import attention
from bigkern.ops.attention.varlen import varlen_attention


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
    neither four-dimensional nor nested, has no heads or no head dimension, or drops everything goes to
    torch's own function, and so does what :func:`bigkern.explain` leaves to stock. Dropout draws from torch's
    default generator, but other numbers than torch's function.

    Raises:
        TypeError, ValueError: as :func:`bigkern.attention`; RuntimeError: as torch's function.

    Source: :func:`torch.nn.functional.scaled_dot_product_attention`.

    Example:
        >>> import torch, bigkern
        >>> q = torch.randn(1, 8, 128, 64)
        >>> bigkern.scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([1, 8, 128, 64])
    """
    if _is_torchs(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        try:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        except TORCHS as error:
            raise named(error, _misfit(query, key, value, attn_mask)) from error
    options: dict[str, Any] = {"causal": is_causal, "scale": scale, "dropout_p": dropout_p}
    try:
        if query.layout == torch.jagged and attn_mask is None:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return cast(Tensor, varlen_attention(q, k, v, **options)).transpose(1, 2)
        boolean = attn_mask is not None and attn_mask.dtype == torch.bool
        mask, bias = (attn_mask, None) if boolean else (None, attn_mask)
        return cast(Tensor, attention(query, key, value, mask=mask, bias=bias, **options))
    except (TypeError, ValueError) as error:
        raise type(error)(_in_torchs_words(str(error))) from error


def _is_torchs(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> bool:
    """Whether a call is left to torch's own function, to run or to refuse."""
    given = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if not all(isinstance(x, Tensor) for x in given) or query.dim() != 4:
        return True
    if dropout_p == 1.0 or (attn_mask is not None and is_causal):
        return True
    if query.is_nested or key.is_nested:
        return False
    grouped = key.dim() != 4 or query.shape[1] != key.shape[1]
    return 0 in (query.shape[1], query.shape[3]) or (grouped and not enable_gqa)


# ---- errors ----------------------------------------------------------------------------------------

TORCHS_WORDS = {
    "q": "query", "k": "key", "v": "value", "mask": "attn_mask", "bias": "attn_mask", "causal": "is_causal",
}  # fmt: skip


def _in_torchs_words(said: str) -> str:
    """What our attention says of its arguments, said of torch's."""
    return re.sub(rf"\b({'|'.join(TORCHS_WORDS)})\b", lambda word: TORCHS_WORDS[word[0]], said)


def _misfit(query: Any, key: Any, value: Any, attn_mask: Any) -> str | None:
    """Which argument torch cannot mean, what it was and what it must be."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if (misfit := misfit_beside(name, x, query, "query")) is not None:
            return misfit
        if x.dim() < 2 or x.dim() != query.dim():
            return f"{name} must be [..., S, E] with as many dimensions as query, not {tuple(x.shape)}"
    if key.shape[-1] != query.shape[-1]:
        return f"key must be [..., S, {query.shape[-1]}] to match query, not {tuple(key.shape)}"
    if value.shape[-2] != key.shape[-2]:
        return f"value must be [..., {key.shape[-2]}, E] to match key, not {tuple(value.shape)}"
    for name, x in (("key", key), ("value", value)):
        if x.shape[:-2] != query.shape[:-2]:
            return f"{name} must be {list(query.shape[:-2])} + [S, E] to match query, not {tuple(x.shape)}"
    if attn_mask is None:
        return None
    found = tuple(attn_mask.shape) if isinstance(attn_mask, Tensor) else kind(attn_mask)
    scores = [*query.shape[:-1], key.shape[-2]]
    return f"attn_mask must be bool or {query.dtype} and broadcast to {scores}, not {found}"
