"""Adam and AdamW in plain torch: what every adam kernel must compute, in place, for each parameter.

    t    = t + 1
    g    = g / grad_scale                                       where a scale is given
    g    = g min(1, max_norm / (grad_norm / grad_scale + 1e-6)) where the norm of all g is given
    g    = -g                                                   with maximize
    p    = p (1 - lr weight_decay)   or   g = g + weight_decay p      decoupled (AdamW) or not (Adam)
    m    = m + (1 - beta1) (g - m)                              exp_avg
    v    = beta2 v + (1 - beta2) g^2                            exp_avg_sq
    vmax = max(vmax, v), which then takes v's place below       with amsgrad
    p    = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

The math is fp32 (fp64 for fp64), rounded to each tensor's storage once, at the end. Where found_inf is not 0
nothing changes, t included. What goes with a parameter may lie in memory in another order than p does.
Three things are stored in ways of their own:

    p    in bf16 or fp16 may have a master: p in fp32; or, for bf16, the 16 bits that rounding took from it
    m, v may be 8-bit codes with a scale for each 256 neighbours: see dynamic8.py
    v and p in bf16 may be rounded at random, in proportion to the two neighbours' distances, by a seed; m
         is rounded to nearest, because each step moves it by 1 - beta1 of its way, and not by too little
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.core.dropout import GOLDEN, MASK32, mix
from bigkern.ops.adam.call import Adam
from bigkern.ops.adam.dynamic8 import dequantised, quantised

SQUARES, PARAMETER = 0, 1  # the generator's heads: for v and vmax, and for p


def adam(call: Adam) -> None:
    """One step, in place."""
    if call.found_inf is not None and bool(call.found_inf != 0):
        return
    lr = call.lr if call.lr_tensor is None else float(call.lr_tensor)
    beta1, beta2, seed, masters = call.beta1, call.beta2, call.seed, call.masters
    m_scales, v_scales = call.exp_avg_scales, call.exp_avg_sq_scales
    before = 0  # elements of the parameters ahead in the list
    for i, param in enumerate(call.params):
        p = _master_of(param, masters[i]) if masters else in_memory(param)
        g = in_memory(call.grads[i], order_of=param).to(p.dtype)
        m, v = call.exp_avgs[i], call.exp_avg_sqs[i]
        if m_scales:
            m, v = decoded(m, m_scales[i], signed=True), decoded(v, v_scales[i], signed=False)
        m, v = in_memory(m, order_of=param).to(p.dtype), in_memory(v, order_of=param).to(p.dtype)
        call.state_steps[i] += 1
        t = float(call.state_steps[i])
        if call.grad_scale is not None:
            g = g / call.grad_scale
            store(call.grads[i], g, order_of=param)
        if call.grad_norm is not None:
            norm = call.grad_norm if call.grad_scale is None else call.grad_norm / call.grad_scale
            g = g * (call.max_norm / (norm + 1e-6)).clamp(max=1.0)
        if call.maximize:
            g = -g
        if call.decoupled:
            p = p * (1 - lr * call.weight_decay)
        else:
            g = g + call.weight_decay * p
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        bits = None if seed is None else drawn(seed, SQUARES, int(t), before, len(p), p.device)
        if m_scales:
            encode(call.exp_avgs[i], m_scales[i], shaped(m, param), signed=True)
            encode(call.exp_avg_sqs[i], v_scales[i], shaped(v, param), signed=False)
        else:
            store(call.exp_avgs[i], m, order_of=param)
            store(call.exp_avg_sqs[i], v, bits, order_of=param)
        if call.amsgrad:
            v = torch.maximum(in_memory(call.max_exp_avg_sqs[i], order_of=param).to(p.dtype), v)
            store(call.max_exp_avg_sqs[i], v, bits, order_of=param)
        denominator = v.sqrt() / (1 - beta2**t) ** 0.5 + call.eps
        p = p - lr / (1 - beta1**t) * m / denominator
        if masters:
            _store_master(param, masters[i], p)
        else:
            bits = None if seed is None else drawn(seed, PARAMETER, int(t), before, len(p), p.device)
            store(param, p, bits)
        if call.zero_grads:
            call.grads[i].zero_()  # not before: g may be a view of it
        before += len(p)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of all gradients, one fp32."""
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(g.to(wide)) for g in grads]
    return torch.linalg.vector_norm(torch.stack(norms))  # type: ignore[no-any-return]


# ---- storage ---------------------------------------------------------------------------------------


def in_memory(x: Tensor, order_of: Tensor | None = None) -> Tensor:
    """``[n]`` x's elements as they lie in memory, or as ``order_of``'s do; numbers in at least fp32."""
    flat = x.permute(_outer_to_inner(x if order_of is None else order_of)).reshape(-1)
    return flat.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else flat


def store(x: Tensor, values: Tensor, bits: Tensor | None = None, order_of: Tensor | None = None) -> None:
    """The inverse: values ``[n]`` into x; bf16 by 16 random ``bits``, if given."""
    if bits is not None and x.dtype == torch.bfloat16:
        values = stochastically_rounded(values, bits)
    outer_to_inner = x.permute(_outer_to_inner(x if order_of is None else order_of))
    outer_to_inner.copy_(values.view(outer_to_inner.shape))


def shaped(values: Tensor, like: Tensor) -> Tensor:
    """Values ``[n]`` in ``like``'s shape, each where ``like`` has its element."""
    made = torch.empty_like(like, dtype=values.dtype)
    store(made, values, order_of=like)
    return made


def _outer_to_inner(x: Tensor) -> list[int]:
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def decoded(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """What 8-bit codes stand for, in their shape; a scale is that of 256 codes as they lie in memory."""
    return shaped(dequantised(in_memory(codes), scales, signed), codes)


def encode(codes: Tensor, scales: Tensor, values: Tensor, signed: bool) -> None:
    """Store values of the codes' shape as codes and their scales."""
    new_codes, new_scales = quantised(in_memory(values, order_of=codes), signed)
    store(codes, new_codes)
    scales.copy_(new_scales)


def stochastically_rounded(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to one of its two bf16 neighbours, the nearer one more often: on average, x."""
    raw = x.float().view(torch.int32)
    up = (raw + bits.to(torch.int32)) >> 16 << 16
    return torch.where(x.isfinite(), up, raw).view(torch.float32).to(torch.bfloat16)


def drawn(seed: int, head: int, t: int, before: int, n: int, device: torch.device) -> Tensor:
    """``[n]`` 16 random bits, in int64, for the elements before .. before + n of the list in step t.

    The high half of csrc/common/dropout.h's; t < 2^24 and the position's high half share a row.
    """
    position = torch.arange(before, before + n, device=device)
    row = (t ^ (position >> 32 << 24)) & MASK32
    key0 = torch.tensor(seed & MASK32, device=device)
    k0 = mix((key0 + head * GOLDEN) & MASK32)
    k1 = mix((seed >> 32) ^ k0)
    a = mix((k0 + row * GOLDEN) & MASK32)
    c = mix((k1 + a) & MASK32)
    return mix((a + (position & MASK32) * GOLDEN) & MASK32, c) >> 16


def _master_of(param: Tensor, master: Tensor) -> Tensor:
    """p in fp32: the master itself, or bf16's bits in the upper half plus the signed remainder."""
    if master.dtype == torch.float32:
        return in_memory(master, order_of=param)
    return joined(param, master)


def joined(param: Tensor, remainder: Tensor) -> Tensor:
    """``[n]`` fp32 from bf16 p and the int16 that its rounding left."""
    upper = in_memory(param.view(torch.int16)).to(torch.int32) << 16
    return (upper + in_memory(remainder, order_of=param).to(torch.int32)).view(torch.float32)


def split(p: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as bf16, rounded to nearest, ties up, and an int16 remainder: joined() gives every bit back."""
    raw = p.view(torch.int32)
    upper = (raw + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (raw - (upper << 16)).to(torch.int16)


def _store_master(param: Tensor, master: Tensor, p: Tensor) -> None:
    if master.dtype == torch.float32:
        store(master, p, order_of=param)
        store(param, p)
    else:
        rounded, remainder = split(p)
        store(param, rounded)
        store(master, remainder, order_of=param)
