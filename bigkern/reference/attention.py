"""Attention in plain torch: what every attention kernel must compute.

    s   = scale * q @ k^T + bias        where mask and causal allow, else -inf    [B, Hq, Sq, Sk]
    lse = log(sum(exp(s), -1))                                                    [B, Hq, Sq] fp32
    o   = exp(s - lse) @ v                                                        [B, Hq, Sq, Dv]

A row with nothing to attend to gives o = 0, lse = -inf and zero gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(Sq: int, Sk: int, causal: str, device: torch.device) -> Tensor:
    """[Sq, Sk] bool, True where the query may look: key j <= query i, counted from the named corner."""
    offset = Sk - Sq if causal == "bottom_right" else 0
    return torch.ones(Sq, Sk, dtype=torch.bool, device=device).tril(offset)


def scores(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, causal: str
) -> Tensor:
    """[B, Hq, Sq, Sk] logits in fp32 (fp64 for fp64), -inf where nothing may be seen."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if bias is not None:
        s = s + bias.to(wide)
    if causal != "none":
        s = s.masked_fill(~causal_mask(s.shape[-2], s.shape[-1], causal, s.device), float("-inf"))
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    return s


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: str,
) -> tuple[Tensor, Tensor]:
    """``o [B, Hq, Sq, Dv]`` in q's dtype and ``lse [B, Hq, Sq]`` in fp32 (fp64 for fp64)."""
    s = scores(q, k, mask, bias, scale, causal)
    if s.shape[-1] == 0:
        o = q.new_zeros(*q.shape[:-1], v.shape[-1])
        return o, s.new_full(s.shape[:-1], float("-inf"))
    lse = torch.logsumexp(s, dim=-1)
    p = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return (p @ v.to(p.dtype)).to(q.dtype), lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: str,
    bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (and of bias, if asked) from the saved o and lse.

    p  = exp(s - lse)           delta = rowsum(do * o)
    dv = p^T do                 ds = p * (do v^T - delta)
    dq = scale * ds k           dk = scale * ds^T q         dbias = ds, summed where it was broadcast
    """
    B, Hq = q.shape[:2]
    Hkv, Sk = k.shape[1], k.shape[2]
    s = scores(q, k, mask, bias, scale, causal)
    p = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    wide, group = p.dtype, Hq // Hkv
    do_, q_ = do.to(wide), q.to(wide)
    k_ = k.to(wide).repeat_interleave(group, dim=1)
    v_ = v.to(wide).repeat_interleave(group, dim=1)
    delta = (do_ * o.to(wide)).sum(-1, keepdim=True)
    ds = p * (do_ @ v_.transpose(-1, -2) - delta)

    def sum_group(x: Tensor) -> Tensor:  # [B, Hq, Sk, D] -> [B, Hkv, Sk, D]
        return x.view(B, Hkv, group, Sk, x.shape[-1]).sum(2)

    dq = (scale * (ds @ k_)).to(q.dtype)
    dk = sum_group(scale * (ds.transpose(-1, -2) @ q_)).to(k.dtype)
    dv = sum_group(p.transpose(-1, -2) @ do_).to(v.dtype)
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if bias_grad and bias is not None else None
    return dq, dk, dv, dbias
