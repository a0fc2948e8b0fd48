"""Scaled dot product attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.attention.backends import ATTENTION, run
from bigkern.ops.attention.call import Causal, Window


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: Causal = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention, computed tile by tile without ever storing the score matrix.

    ``o = dropout(softmax(s)) @ v`` with ``s = softcap(scale * q @ k^T) + bias + alibi``, masked

    Args:
        q: ``[B, Hq, Sq, D]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch). Any
            strides: views of ``[B, S, H, D]`` tensors cost no copy.
        k: ``[B, Hkv, Sk, D]``, Hq a multiple of Hkv; query head h reads key head ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, Sk, Dv]``.
        causal: ``False``; ``"top_left"`` (the same as ``True``, as in torch): query i stands at key i and
            sees the keys ``j <= i``; ``"bottom_right"``: the last query stands at the last key, query i at
            ``i + Sk - Sq``. Without a causal rule, windows and ALiBi count from the bottom right too.
        mask: bool, broadcastable to ``[B, Hq, Sq, Sk]``, True where the query may look.
        bias: added to the scores, q's dtype, broadcastable to ``[B, Hq, Sq, Sk]``; its gradient is summed
            where it was broadcast.
        scale: default ``1 / sqrt(D)``.
        window: ``(left, right)``, how many keys before and after its own place a query sees; None is
            unlimited. Under a causal rule right is 0.
        softcap: c > 0 bounds the products, ``c * tanh(x / c)`` (Gemma 2); 0 does not.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``; adds ``-slope * |place - j|`` (Press et al., 2022). Constant.
        sinks: ``[Hq]``, a logit for each head that takes part in the softmax's sum and has no value
            (gpt-oss); differentiable.
        dropout_p: probability in [0, 1) with which each weight is dropped; the others are divided by
            ``1 - dropout_p``. Always active if positive.
        seed, offset: what is dropped, a function of (seed, offset, head, query, key) alone and the same on
            every backend. Without a seed one is drawn from torch's default generator (the CPU's, so that
            nothing waits for a GPU; a captured CUDA graph drops the same in every replay).
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        ``o [B, Hq, Sq, Dv]`` in q's dtype, stored as ``[B, Sq, Hq, Dv]``; with ``return_lse`` also
        ``lse [B, Hq, Sq]`` in fp32, differentiable. A row with nothing to attend to gives o = 0, lse = -inf
        (its sink, if it has one) and zero gradients. A NaN in a row of q, or in a key, makes NaN of the rows
        that see it and of no other, an infinity can; for a NaN in q torch's own kernel on a CPU gives 0.

    Saved for backward: the arguments, o and lse: nothing of size Sq x Sk. A kernel's backward can itself
    be differentiated, by way of plain torch operations and with all scores in memory. It is deterministic:
    each gradient has one owner, nothing is summed by atomics. Only Triton's sums dq by atomics, in another
    ``4 * B * Hq * Sq * D`` bytes, unless ``torch.use_deterministic_algorithms`` is on.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: shapes, devices, head counts, or any number do not fit; the message names the argument.

    Source: Dao et al., FlashAttention (2022); Milakov and Gimelshein, online softmax (2018).

    Example:
        >>> import torch, bigkern
        >>> q, k = torch.randn(2, 8, 16, 64), torch.randn(2, 2, 32, 64)
        >>> bigkern.attention(q, k, k, causal="bottom_right", window=(8, 0)).shape
        torch.Size([2, 8, 16, 64])
    """
    plain = (
        mask is None and bias is None and scale is None and window is None and softcap == 0.0
        and alibi_slopes is None and sinks is None and dropout_p == 0.0 and seed is None and not return_lse
        and (causal is True or causal is False) and type(q) is type(k) is type(v) is Tensor
    )  # fmt: skip
    likeness = (q.shape, k.shape, v.shape, q.dtype, q.is_cuda, q.requires_grad, causal) if plain else ()
    if plain and ATTENTION.stocks.have(likeness):
        grouped: Any = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        try:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal is True, **grouped)
        except RuntimeError:
            pass  # torch refused: bind says why in the op's own words
    candidate, call, needs_grad = ATTENTION.decided(
        q, k, v, None, None, None, None, causal, mask, bias, scale, window, softcap, alibi_slopes, sinks,
        dropout_p, seed, offset, return_lse,
    )  # fmt: skip
    if plain and not torch.compiler.is_compiling():
        square = q.shape[2] == k.shape[2]  # else torch's causal mask is not quite ours
        ATTENTION.stocks.learn(candidate.name == "torch" and square, likeness)
    return run(candidate, call, needs_grad, return_lse)
