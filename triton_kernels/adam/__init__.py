"""Adam and AdamW over lists of tensors, in place, in one launch.

    p, g, m, v [, vmax, master]  ->  p, m, v [, vmax, master]      every element read once, written once

A program finds its CHUNK elements through the tables of adam_table.py and goes through them a BLOCK at a
time; adam_storage.py knows how p and the moments are stored. t is a device scalar, and so can lr, the
gradients' scale and norm, and found_inf be: nothing waits for the device, and a step can be captured in a
CUDA graph. A second, tiny kernel advances t, after all programs of the first have read it.

The math is fp32. The bias corrections 1 - beta^t are computed as -expm1(t log beta), because the difference
itself has lost four digits at t = 1, beta = 0.999.

Kingma, Ba, Adam (2015); Loshchilov, Hutter, AdamW (2019); Reddi et al., AMSGrad (2018).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.adam.grad_norm import grad_norm
from bigkern.triton_kernels.adam.storage import (
    PARAMETER,
    QUANTISED,
    SQUARES,
    at_random,
    drawn,
    load_codes,
    load_p,
    load_wide,
    seed_of,
    store_codes,
    store_narrow,
    store_p,
)
from bigkern.triton_kernels.adam.table import BEFORE, BLOCK, CHUNK, POINTEES, SIZE, address, build, prepare
from bigkern.triton_kernels.common import launch

__all__ = ["BLOCK", "CHUNK", "adam", "build", "grad_norm", "prepare"]

# The table's lists.
P, G, M, V, VMAX, MASTERS, STEPS, M_SCALES, V_SCALES = (tl.constexpr(row) for row in range(9))


class Hyper(NamedTuple):
    """Scalars, fp32 in the kernel."""

    lr: float
    log_beta1: float
    log_beta2: float
    beta1_left: float  # 1 - beta1, taken in double
    beta2: float
    beta2_left: float
    eps: float
    weight_decay: float
    max_norm: float


@triton.jit
def one_minus_exp(x):
    """1 - e^x for x <= 0, to fp32's full relative precision."""
    y = 1.0 + x * (1.0 / 6 + x * (1.0 / 42))
    series = x * (
        1.0 + x * (1.0 / 2) * (1.0 + x * (1.0 / 3) * (1.0 + x * (1.0 / 4) * (1.0 + x * (1.0 / 5) * y)))
    )
    return tl.where(x > -0.25, -series, 1.0 - tl.exp(x))


@triton.jit
def step_of(steps_at, hyper, grad_scale, grad_norm, lr_tensor):
    """What a tensor's elements share: t, lr, what m, the root of v and g are multiplied by."""
    t = tl.load(steps_at) + 1.0
    lr = hyper.lr
    if lr_tensor is not None:
        lr = tl.load(lr_tensor)
    step_size = tl.div_rn(lr, one_minus_exp(t * hyper.log_beta1))
    root_correction = tl.div_rn(1.0, tl.sqrt_rn(one_minus_exp(t * hyper.log_beta2)))
    clip = 1.0
    if grad_norm is not None:
        norm = tl.load(grad_norm)
        if grad_scale is not None:
            norm = tl.div_rn(norm, tl.load(grad_scale))
        share = tl.div_rn(hyper.max_norm, norm + 1e-6)
        clip = tl.where(share > 1.0, 1.0, share)  # a NaN stays one
    return t.to(tl.uint32), lr, step_size, root_correction, clip


@triton.jit
def load_g(
    g_at, at, exists, grad_scale, clip, MAXIMIZE: tl.constexpr, ZERO: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """g as the step wants it, leaving it in memory as the caller wants it: divided, or 0."""
    g = load_wide(g_at, at, exists, MASKED)
    if grad_scale is not None:
        g = tl.div_rn(g, tl.load(grad_scale))
    if ZERO:
        store_narrow(g_at, at, tl.zeros_like(g), exists, MASKED)
    elif grad_scale is not None:
        store_narrow(g_at, at, g, exists, MASKED)
    g *= clip
    return -g if MAXIMIZE else g


@triton.jit
def update(
    arrays, start, size, before, step, grad_scale, seed, hyper, MASTER: tl.constexpr,
    DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one tensor from ``start`` on."""
    p_at, g_at, m_at, v_at, vmax_at, masters_at, m_scales_at, v_scales_at = arrays
    t, lr, step_size, root_correction, clip = step
    CODES: tl.constexpr = m_at.dtype.element_ty == tl.uint8
    at = start + tl.arange(0, BLOCK)
    if CODES:
        at = at.reshape([BLOCK // QUANTISED, QUANTISED])
        blocks = start // QUANTISED + tl.arange(0, BLOCK // QUANTISED)
    exists = at < size
    p = load_p(p_at, masters_at, at, exists, MASTER, MASKED)
    if CODES:
        m = load_codes(m_at, m_scales_at, at, blocks, exists, size, True)
        v = load_codes(v_at, v_scales_at, at, blocks, exists, size, False)
    else:
        m, v = load_wide(m_at, at, exists, MASKED), load_wide(v_at, at, exists, MASKED)
    g = load_g(g_at, at, exists, grad_scale, clip, MAXIMIZE, ZERO, MASKED)
    if DECOUPLED:
        p -= lr * hyper.weight_decay * p
    else:
        g += hyper.weight_decay * p
    m += hyper.beta1_left * (g - m)
    v = hyper.beta2 * v + hyper.beta2_left * g * g
    largest = v
    if AMSGRAD:
        vmax = load_wide(vmax_at, at, exists, MASKED)
        largest = tl.maximum(v, vmax, propagate_nan=tl.PropagateNan.ALL)
    p -= step_size * tl.div_rn(m, tl.sqrt_rn(largest) * root_correction + hyper.eps)
    bits = None
    if seed is not None and MASTER == "none" and p_at.dtype.element_ty == tl.bfloat16:
        bits = drawn(seed, PARAMETER, t, before + at, before + start, BLOCK)
    store_p(p_at, masters_at, at, p, exists, bits, MASTER, MASKED)
    if CODES:
        store_codes(m_at, m_scales_at, at, m, blocks, exists, size, True)
        store_codes(v_at, v_scales_at, at, v, blocks, exists, size, False)
    else:
        if seed is not None and m_at.dtype.element_ty == tl.bfloat16:
            bits = drawn(seed, SQUARES, t, before + at, before + start, BLOCK)
            v, largest = at_random(v, bits), at_random(largest, bits)
        store_narrow(m_at, at, m, exists, MASKED)
        store_narrow(v_at, at, v, exists, MASKED)
        if AMSGRAD:
            store_narrow(vmax_at, at, largest, exists, MASKED)


@triton.jit
def adam_kernel(
    table, chunks, n, hyper, seed, grad_scale, found_inf, lr_tensor, grad_norm,
    P_TYPE: tl.constexpr, M_TYPE: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:  # noqa: SIM102, Triton does not cut an `and` short
        if tl.load(found_inf) != 0.0:
            return
    entry = chunks + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(entry)
    start = tl.load(entry + 1).to(tl.int64) * CHUNK
    size = tl.load(table + SIZE * n + tensor)
    before = tl.load(table + BEFORE * n + tensor)
    REMAINDER: tl.constexpr = MASTER == "remainder"  # then p is 16 bits of something else
    arrays = (
        address(table, P, tensor, n, tl.int16 if REMAINDER else P_TYPE, ALIGNED),
        address(table, G, tensor, n, P_TYPE, ALIGNED),
        address(table, M, tensor, n, M_TYPE, ALIGNED),
        address(table, V, tensor, n, M_TYPE, ALIGNED),
        address(table, VMAX, tensor, n, M_TYPE, ALIGNED),
        address(table, MASTERS, tensor, n, tl.int16 if REMAINDER else tl.float32, ALIGNED),
        address(table, M_SCALES, tensor, n, tl.float32, False),
        address(table, V_SCALES, tensor, n, tl.float32, False),
    )
    steps_at = address(table, STEPS, tensor, n, tl.float32, False)
    step = step_of(steps_at, hyper, grad_scale, grad_norm, lr_tensor)
    count = tl.minimum(size - start, CHUNK).to(tl.int32)
    if count == CHUNK:  # no masks: 16-byte loads and stores
        for _ in range(0, CHUNK, BLOCK):
            update(
                arrays, start, size, before, step, grad_scale, seed, hyper, MASTER, DECOUPLED, AMSGRAD,
                MAXIMIZE, ZERO, BLOCK, False,
            )  # fmt: skip
            start += BLOCK
    else:
        for _ in range(0, count, BLOCK):
            update(
                arrays, start, size, before, step, grad_scale, seed, hyper, MASTER, DECOUPLED, AMSGRAD,
                MAXIMIZE, ZERO, BLOCK, True,
            )  # fmt: skip
            start += BLOCK


@triton.jit
def advance_kernel(steps, found_inf, n, BLOCK: tl.constexpr):
    """t = t + 1 through the table's row of addresses."""
    if found_inf is not None:  # noqa: SIM102, Triton does not cut an `and` short
        if tl.load(found_inf) != 0.0:
            return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(steps + i, mask=i < n, other=0).to(tl.pointer_type(tl.float32))
    tl.store(at, tl.load(at, mask=i < n) + 1.0, mask=i < n)


# ---- launcher --------------------------------------------------------------------------------------


def adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    masters: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    zero_grads: bool = False,
    max_norm: float = 0.0,
    seed: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    grad_norm: Tensor | None = None,
) -> None:
    """One step, in place; 1 is added to each of ``state_steps`` (fp32 scalars). ``grads`` are left divided by
    ``grad_scale``, or 0; where ``found_inf`` is not 0 nothing changes; ``lr_tensor`` replaces ``lr``.

    All tensors are on one device and dense, each list is of one dtype, and what goes with a parameter has its
    strides. ``masters`` (fp32, or int16 remainders) and the scales of uint8 moments may be empty lists.
    """
    if not params:
        return
    m_scales, v_scales = exp_avg_scales or state_steps, exp_avg_sq_scales or state_steps  # any address
    work = prepare(
        [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or params, masters or params],
        [state_steps, m_scales, v_scales],
    )
    n = len(params)
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    hyper = Hyper(lr, log_beta1, log_beta2, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, max_norm)
    master = "none"
    if masters:
        master = "remainder" if masters[0].dtype == torch.int16 else "float32"
    stored = {x[0].element_size() for x in (params, exp_avgs, masters) if x}
    warps = 8 if stored == {2, 4} else 4  # 4 elements a thread: 8 of them in two sizes would spill
    if len(work.chunks) > 0:
        adam_kernel[(len(work.chunks),)](
            work.table, work.chunks, n, hyper, seed_of(seed), grad_scale, found_inf, lr_tensor, grad_norm,
            P_TYPE=POINTEES[params[0].dtype], M_TYPE=POINTEES[exp_avgs[0].dtype], MASTER=master,
            ALIGNED=work.aligned, DECOUPLED=decoupled, AMSGRAD=amsgrad, MAXIMIZE=maximize, ZERO=zero_grads,
            BLOCK=BLOCK, CHUNK=CHUNK, num_warps=warps, **launch.OPTIONS,
        )  # fmt: skip
    steps = work.table[2 + STEPS.value]
    advance_kernel[(triton.cdiv(n, 256),)](steps, found_inf, n, BLOCK=256, num_warps=4, **launch.OPTIONS)
