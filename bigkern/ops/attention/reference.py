"""Attention in plain torch: what every attention kernel must compute.

    x   = scale * q @ k^T                 x = softcap * tanh(x / softcap), if asked
    s   = x + bias - slope * |i + offset - j|, -inf where mask, window or causal forbid   [B, Hq, Sq, Sk]
    lse = log(sum(exp(s), -1) + exp(sink))                                                [B, Hq, Sq] fp32
    p   = exp(s - lse)
    o   = dropout(p) @ v                                                                  [B, Hq, Sq, Dv]

Query i stands at key i + offset: offset is 0 where the causal rule says "top_left", else Sk - Sq. A row
with nothing to attend to gives o = 0, lse = -inf (or its sink) and zero gradients.

Packed sequences, given by their cumulative lengths, lie behind each other in q ``[1, Hq, total, D]`` and k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bigkern.core.dropout_reference import kept


class Rules(NamedTuple):
    """How scores come from dot products: what attention's arguments say besides the tensors multiplied."""

    mask: Tensor | None  # bool, broadcastable to [B, Hq, Sq, Sk], True where the query may look
    bias: Tensor | None  # broadcastable to [B, Hq, Sq, Sk]
    alibi_slopes: Tensor | None  # [Hq] or [B, Hq] fp32
    sinks: Tensor | None  # [Hq] fp32
    dropout_key: Tensor | None  # two numbers below 2^32, int64 on the CPU
    cu_seqlens_q: Tensor | None  # [sequences + 1] int32
    cu_seqlens_k: Tensor | None
    scale: float
    causal: str  # "none", "top_left" or "bottom_right"
    window_left: int  # -1: unlimited
    window_right: int
    softcap: float  # 0: none
    dropout_p: float
    max_seqlen_q: int
    max_seqlen_k: int


# ---- scores ----------------------------------------------------------------------------------------


def distance(Sq: int, Sk: int, causal: str, device: torch.device) -> Tensor:
    """[Sq, Sk], how many keys before its own place a query looks; negative: after it."""
    offset = 0 if causal == "top_left" else Sk - Sq
    i, j = torch.arange(Sq, device=device), torch.arange(Sk, device=device)
    return i[:, None] + offset - j


def visible(Sq: int, Sk: int, rules: Rules, device: torch.device) -> Tensor | None:
    """[Sq, Sk] bool, what causal rule and window let a query see; None: everything."""
    if rules.window_left < 0 and rules.window_right < 0:
        return None
    back = distance(Sq, Sk, rules.causal, device)
    seen = torch.ones_like(back, dtype=torch.bool)
    if rules.window_left >= 0:
        seen = seen & (back <= rules.window_left)
    if rules.window_right >= 0:
        seen = seen & (-back <= rules.window_right)
    return seen


def alibi(slopes: Tensor, Sq: int, Sk: int, causal: str) -> Tensor:
    """[B or 1, Hq, Sq, Sk], the bias of attention with linear biases (Press et al., 2022)."""
    slopes = slopes.view(-1, slopes.shape[-1], 1, 1)
    return -slopes * distance(Sq, Sk, causal, slopes.device).abs()


def capped(q: Tensor, k: Tensor, rules: Rules) -> Tensor:
    """[B, Hq, Sq, Sk] dot products, scaled and capped, in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    x = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * rules.scale
    return rules.softcap * torch.tanh(x / rules.softcap) if rules.softcap else x


def restricted(x: Tensor, rules: Rules) -> Tensor:
    """Scores from dot products: biases added, -inf where nothing may be seen."""
    Sq, Sk = x.shape[-2:]
    if rules.bias is not None:
        x = x + rules.bias.to(x.dtype)
    if rules.alibi_slopes is not None:
        x = x + alibi(rules.alibi_slopes, Sq, Sk, rules.causal).to(x.dtype)
    for seen in (rules.mask, visible(Sq, Sk, rules, x.device)):
        if seen is not None:
            x = x.masked_fill(~seen, float("-inf"))
    return x


# ---- dropout ---------------------------------------------------------------------------------------


def drop(p: Tensor, rules: Rules, first: int) -> Tensor:
    """Weights [B, Hq, Sq, Sk] of the batches from ``first`` on: dropped, or divided by 1 - dropout_p."""
    if rules.dropout_key is None:
        return p
    B, Hq, Sq, Sk = p.shape
    heads = torch.arange(first * Hq, (first + B) * Hq, device=p.device).view(B, Hq)
    return p * kept(rules.dropout_key, rules.dropout_p, heads, Sq, Sk) / (1.0 - rules.dropout_p)


# ---- forward ---------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, *rules: object) -> tuple[Tensor, Tensor]:
    """``o`` as q, with Dv columns, in q's dtype, and ``lse`` in fp32 (fp64 for fp64).

    q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``; then what :class:`Rules` lists.
    Differentiable any number of times by torch's autograd.
    """
    parsed = Rules(*rules)  # type: ignore[arg-type]
    if parsed.cu_seqlens_q is None:
        return _attention(q, k, v, parsed, 0)
    nothing = parsed._replace(alibi_slopes=None)
    results = [_attention(q[..., :0, :], k[..., :0, :], v[..., :0, :], nothing, 0)]
    for b, (rows, keys, own) in enumerate(sequences(parsed)):
        results.append(_attention(q[..., rows, :], k[..., keys, :], v[..., keys, :], own, b))
    o, lse = (torch.cat(parts, dim=2) for parts in zip(*results, strict=True))
    return o, lse


def _attention(q: Tensor, k: Tensor, v: Tensor, rules: Rules, first: int) -> tuple[Tensor, Tensor]:
    B, Hq, Sq, Sk = *q.shape[:3], k.shape[2]
    s = restricted(capped(q, k, rules), rules)
    origin = s.detach().amax(-1) if Sk > 0 else s.new_full((B, Hq, Sq), float("-inf"))
    sink = None if rules.sinks is None else rules.sinks.to(s.dtype).view(1, Hq, 1)
    if sink is not None:
        origin = torch.maximum(origin, sink.detach())
    origin = origin.masked_fill(origin == float("-inf"), 0.0)
    p = torch.exp(s - origin.unsqueeze(-1))
    total = p.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - origin)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    p = drop(p / total.unsqueeze(-1), rules, first)
    v = v.repeat_interleave(Hq // v.shape[1], dim=1)
    lse = (origin + torch.log(total)).masked_fill(empty, float("-inf"))
    return (p @ v.to(p.dtype)).to(q.dtype), lse


def sequences(rules: Rules) -> Iterator[tuple[slice, slice, Rules]]:
    """The query rows, the key rows and the own rules of each packed sequence."""
    assert rules.cu_seqlens_q is not None
    assert rules.cu_seqlens_k is not None
    q_ends, k_ends = rules.cu_seqlens_q.tolist(), rules.cu_seqlens_k.tolist()
    for b in range(len(q_ends) - 1):
        slopes = rules.alibi_slopes
        own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        rows, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        yield rows, keys, rules._replace(alibi_slopes=own, cu_seqlens_q=None, cu_seqlens_k=None)


# ---- backward --------------------------------------------------------------------------------------


def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias_grad: bool,
    *rules: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty unless ``bias_grad``) from the saved o and lse.

    p  = exp(s - lse)             delta = rowsum(do * o) - dlse
    dv = dropout(p)^T do          ds    = p * (dropout(do v^T) - delta)
    dbias = ds, summed where bias was broadcast
    dx = ds * (1 - (x / softcap)^2)          dq = scale * dx k          dk = scale * dx^T q
    """
    parsed = Rules(*rules)  # type: ignore[arg-type]
    if parsed.cu_seqlens_q is None:
        return _attention_backward(do, dlse, q, k, v, o, lse, bias_grad, parsed, 0)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for b, (rows, keys, own) in enumerate(sequences(parsed)):
        saved = (q[..., rows, :], k[..., keys, :], v[..., keys, :], o[..., rows, :], lse[..., rows])
        own_dlse = None if dlse is None else dlse[..., rows]
        grads = _attention_backward(do[..., rows, :], own_dlse, *saved, False, own, b)
        dq[..., rows, :], dk[..., keys, :], dv[..., keys, :] = grads[:3]
    return dq, dk, dv, q.new_empty(0)


def _attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias_grad: bool,
    rules: Rules,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, Hq), (Hkv, Sk) = q.shape[:2], k.shape[1:3]
    x = capped(q, k, rules)
    s = restricted(x, rules)
    p = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    wide, group = p.dtype, Hq // Hkv
    do_, q_ = do.to(wide), q.to(wide)
    k_ = k.to(wide).repeat_interleave(group, dim=1)
    v_ = v.to(wide).repeat_interleave(group, dim=1)
    delta = row_delta(do, dlse, o).unsqueeze(-1)
    ds = p * (drop(do_ @ v_.transpose(-1, -2), rules, first) - delta)
    dx = ds * (1.0 - (x / rules.softcap).square()) if rules.softcap else ds

    def sum_group(x: Tensor) -> Tensor:  # [B, Hq, Sk, D] -> [B, Hkv, Sk, D]
        return x.view(B, Hkv, group, Sk, x.shape[-1]).sum(2)

    dq = (rules.scale * (dx @ k_)).to(q.dtype)
    dk = sum_group(rules.scale * (dx.transpose(-1, -2) @ q_)).to(k.dtype)
    dv = sum_group(drop(p, rules, first).transpose(-1, -2) @ do_).to(v.dtype)
    bias = rules.bias if bias_grad else None
    dbias = q.new_empty(0) if bias is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias


def row_delta(do: Tensor, dlse: Tensor | None, o: Tensor) -> Tensor:
    """[B, Hq, Sq]: what all weights of a row have to give back, rowsum(do * o) less the gradient of lse."""
    wide = torch.promote_types(o.dtype, torch.float32)
    delta = (do.to(wide) * o.to(wide)).sum(-1)
    return delta if dlse is None else delta - dlse


def sinks_gradient(do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """[Hq] fp32: a sink's weight is exp(sink - lse), and there is no value behind it."""
    p = torch.exp(sinks.view(1, -1, 1) - lse).masked_fill(lse == float("-inf"), 0.0)
    return -(p * row_delta(do, dlse, o)).sum((0, 2)).to(sinks.dtype)
