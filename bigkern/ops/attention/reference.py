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
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from bigkern.core.dropout import kept
from bigkern.ops.attention.call import Attention, AttentionBackward, Gradients, Result

Either = TypeVar("Either", bound=Attention)


# ---- scores ----------------------------------------------------------------------------------------


def distance(call: Attention) -> Tensor:
    """[Sq, Sk], how many keys before its own place a query looks; negative: after it."""
    Sq, Sk, device = call.q.shape[2], call.k.shape[2], call.q.device
    offset = 0 if call.causal == "top_left" else Sk - Sq
    return torch.arange(Sq, device=device)[:, None] + offset - torch.arange(Sk, device=device)


def visible(call: Attention) -> Tensor | None:
    """[..., Sq, Sk] bool, what mask, causal rule and window let a query see; None: everything."""
    if call.window_left < 0 and call.window_right < 0:
        return call.mask
    seen = within(distance(call), call.window_left, call.window_right)
    return seen if call.mask is None else call.mask & seen


def within(back: Tensor, left: int, right: int) -> Tensor:
    """Whether keys so many places before a query's lie in its window; -1: unlimited."""
    seen = torch.ones_like(back, dtype=torch.bool)
    if left >= 0:
        seen = seen & (back <= left)
    if right >= 0:
        seen = seen & (-back <= right)
    return seen


def alibi(slopes: Tensor, back: Tensor) -> Tensor:
    """[B or 1, Hq, Sq, Sk], the bias of attention with linear biases (Press et al., 2022)."""
    return -slopes.view(-1, slopes.shape[-1], 1, 1) * back.abs()


def capped(call: Attention) -> Tensor:
    """[B, Hq, Sq, Sk] dot products, scaled and capped, in fp32 (fp64 for fp64)."""
    q, wide = call.q, torch.promote_types(call.q.dtype, torch.float32)
    k = call.k.repeat_interleave(q.shape[1] // call.k.shape[1], dim=1)
    x = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * call.scale
    return call.softcap * torch.tanh(x / call.softcap) if call.softcap else x


def restricted(x: Tensor, call: Attention) -> Tensor:
    """Scores from dot products: biases added, -inf where nothing may be seen."""
    if call.bias is not None:
        x = x + call.bias.to(x.dtype)
    if call.alibi_slopes is not None:
        x = x + alibi(call.alibi_slopes, distance(call)).to(x.dtype)
    seen = visible(call)
    return x if seen is None else x.masked_fill(~seen, float("-inf"))


# ---- dropout ---------------------------------------------------------------------------------------


def drop(p: Tensor, call: Attention, first: int) -> Tensor:
    """Weights [B, Hq, Sq, Sk] of the batches from ``first`` on: dropped, or divided by 1 - dropout_p."""
    if call.dropout_key is None:
        return p
    B, Hq, Sq, Sk = p.shape
    heads = torch.arange(first * Hq, (first + B) * Hq, device=p.device).view(B, Hq)
    return p * kept(call.dropout_key, call.dropout_p, heads, Sq, Sk) / (1.0 - call.dropout_p)


# ---- forward ---------------------------------------------------------------------------------------


def attention(call: Attention) -> Result:
    """``o`` in q's dtype, stored as [B, Sq, Hq, Dv], and ``lse`` in fp32 (fp64 for fp64).

    Differentiable any number of times by torch's autograd.
    """
    if call.cu_seqlens_q is None:
        o, lse = _attention(call, 0)
    else:
        results = [_attention(_part(call, slice(0), slice(0), None), 0)]
        results += [_attention(own, b) for b, (_rows, _keys, own) in enumerate(sequences(call))]
        o, lse = (torch.cat(parts, dim=2) for parts in zip(*results, strict=True))
    return Result(stored_bshd(o), lse)


def stored_bshd(x: Tensor) -> Tensor:
    """The same ``[B, H, S, D]``, stored as ``[B, S, H, D]``: merging heads needs no copy."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _attention(call: Attention, first: int) -> Result:
    q, (Hkv, Sk) = call.q, call.k.shape[1:3]
    s = restricted(capped(call), call)
    origin = s.detach().amax(-1) if Sk > 0 else s.new_full(q.shape[:3], float("-inf"))
    sink = None if call.sinks is None else call.sinks.to(s.dtype).view(1, -1, 1)
    if sink is not None:
        origin = torch.maximum(origin, sink.detach())
    origin = origin.masked_fill(origin == float("-inf"), 0.0)
    p = torch.exp(s - origin.unsqueeze(-1))
    total = p.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - origin)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    p = drop(p / total.unsqueeze(-1), call, first)
    v = call.v.repeat_interleave(q.shape[1] // Hkv, dim=1)
    lse = (origin + torch.log(total)).masked_fill(empty, float("-inf"))
    return Result((p @ v.to(p.dtype)).to(q.dtype), lse)


def sequences(call: Either) -> Iterator[tuple[slice, slice, Either]]:
    """The query rows, the key rows and the own call of each packed sequence."""
    assert call.cu_seqlens_q is not None
    assert call.cu_seqlens_k is not None
    rows, keys = (pairwise(ends.tolist()) for ends in (call.cu_seqlens_q, call.cu_seqlens_k))
    for b, (of_q, of_k) in enumerate(zip(rows, keys, strict=True)):
        slopes = call.alibi_slopes
        own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        yield slice(*of_q), slice(*of_k), _part(call, slice(*of_q), slice(*of_k), own)


def _part(call: Either, rows: slice, keys: slice, slopes: Tensor | None) -> Either:
    """The same of these queries and keys alone."""
    q, k, v = call.q[..., rows, :], call.k[..., keys, :], call.v[..., keys, :]
    return replace(call, q=q, k=k, v=v, alibi_slopes=slopes, cu_seqlens_q=None, cu_seqlens_k=None)


# ---- backward --------------------------------------------------------------------------------------


def attention_backward(call: AttentionBackward) -> Gradients:
    """Gradients of q, k, v and bias (empty unless ``want_bias``) from the saved o and lse.

    p  = exp(s - lse)             delta = rowsum(do * o) - dlse
    dv = dropout(p)^T do          ds    = p * (dropout(do v^T) - delta)
    dbias = ds, summed where bias was broadcast
    dx = ds * (1 - (x / softcap)^2)          dq = scale * dx k          dk = scale * dx^T q
    """
    if call.cu_seqlens_q is None:
        dq, dk, dv, dbias = _attention_backward(call, 0)
        return Gradients(stored_bshd(dq), stored_bshd(dk), stored_bshd(dv), dbias)
    dq, dk, dv = (torch.zeros_like(stored_bshd(x)) for x in (call.q, call.k, call.v))
    for b, (rows, keys, own) in enumerate(sequences(call)):
        own.do, own.o, own.lse = own.do[..., rows, :], own.o[..., rows, :], own.lse[..., rows]
        own.dlse = None if own.dlse is None else own.dlse[..., rows]
        grads = _attention_backward(own, b)
        dq[..., rows, :], dk[..., keys, :], dv[..., keys, :] = grads.dq, grads.dk, grads.dv
    return Gradients(dq, dk, dv, call.q.new_empty(0))


def _attention_backward(call: AttentionBackward, first: int) -> Gradients:
    q, k, v = call.q, call.k, call.v
    (B, Hq), (Hkv, Sk) = q.shape[:2], k.shape[1:3]
    x = capped(call)
    s = restricted(x, call)
    p = torch.exp(s - call.lse.masked_fill(call.lse == float("-inf"), 0.0).unsqueeze(-1))
    wide, group = p.dtype, Hq // Hkv
    do_, q_ = call.do.to(wide), q.to(wide)
    k_ = k.to(wide).repeat_interleave(group, dim=1)
    v_ = v.to(wide).repeat_interleave(group, dim=1)
    delta = row_delta(call).unsqueeze(-1)
    ds = p * (drop(do_ @ v_.transpose(-1, -2), call, first) - delta)
    dx = ds * (1.0 - (x / call.softcap).square()) if call.softcap else ds

    def sum_group(x: Tensor) -> Tensor:  # [B, Hq, Sk, D] -> [B, Hkv, Sk, D]
        return x.view(B, Hkv, group, Sk, x.shape[-1]).sum(2)

    dq = (call.scale * (dx @ k_)).to(q.dtype)
    dk = sum_group(call.scale * (dx.transpose(-1, -2) @ q_)).to(k.dtype)
    dv = sum_group(drop(p, call, first).transpose(-1, -2) @ do_).to(v.dtype)
    bias = call.bias if call.want_bias else None
    dbias = q.new_empty(0) if bias is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    return Gradients(dq, dk, dv, dbias)


def row_delta(call: AttentionBackward) -> Tensor:
    """[B, Hq, Sq]: what all weights of a row have to give back, rowsum(do * o) less the gradient of lse."""
    wide = torch.promote_types(call.o.dtype, torch.float32)
    delta = (call.do.to(wide) * call.o.to(wide)).sum(-1)
    return delta if call.dlse is None else delta - call.dlse


def sinks_gradient(call: AttentionBackward) -> Tensor:
    """[Hq] fp32: a sink's weight is exp(sink - lse), and there is no value behind it."""
    assert call.sinks is not None
    p = torch.exp(call.sinks.view(1, -1, 1) - call.lse).masked_fill(call.lse == float("-inf"), 0.0)
    return -(p * row_delta(call)).sum((0, 2)).to(call.sinks.dtype)
