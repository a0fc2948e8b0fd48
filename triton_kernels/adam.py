"""Adam and AdamW over lists of tensors, in place, in one launch.

    p, g, m, v [, vmax]  ->  p, m, v [, vmax]      every element read once, written once: bound by memory

The kernel finds its tensors through a table of addresses, and its share of the work through a list of chunks:

    table  [6, n] int64          addresses of p, g, m, v, vmax and t of each tensor
    sizes  [n] int64             elements of each tensor
    chunks [c, 2] int32          tensor, and which CHUNK elements of it        program i does chunks[i]

Both live on the device and are kept from step to step while the addresses stay the same. t is a device scalar
too, and so can lr, the gradient scale and found_inf be: nothing waits for the device, and a step can be
captured in a CUDA graph. A second, tiny kernel advances t, after all programs of the first have read it.

The math is fp32. The bias corrections 1 - beta^t are computed as -expm1(t log beta), because the difference
itself has lost four digits at t = 1, beta = 0.999.

Kingma, Ba, Adam (2015); Loshchilov, Hutter, AdamW (2019); Reddi et al., AMSGrad (2018).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

BLOCK = 1024  # elements that a program holds at once
CHUNK = 8 * BLOCK  # elements that a program updates

POINTEES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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


@triton.jit
def one_minus_exp(x):
    """1 - e^x for x <= 0, to fp32's full relative precision."""
    y = 1.0 + x * (1.0 / 6 + x * (1.0 / 42))
    series = x * (
        1.0 + x * (1.0 / 2) * (1.0 + x * (1.0 / 3) * (1.0 + x * (1.0 / 4) * (1.0 + x * (1.0 / 5) * y)))
    )
    return tl.where(x > -0.25, -series, 1.0 - tl.exp(x))


@triton.jit
def load_wide(pointer, at, exists, MASKED: tl.constexpr):
    x = tl.load(pointer + at, mask=exists, other=0.0) if MASKED else tl.load(pointer + at)
    return x.to(tl.float32)


@triton.jit
def store_narrow(pointer, at, x, exists, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + at, x.to(pointer.dtype.element_ty), mask=exists)
    else:
        tl.store(pointer + at, x.to(pointer.dtype.element_ty))


@triton.jit
def update(
    p_at, g_at, m_at, v_at, vmax_at, at, size, lr, step_size, root_correction, grad_scale, hyper,
    DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The elements `at` of one tensor."""
    exists = at < size
    p, g = load_wide(p_at, at, exists, MASKED), load_wide(g_at, at, exists, MASKED)
    m, v = load_wide(m_at, at, exists, MASKED), load_wide(v_at, at, exists, MASKED)
    if grad_scale is not None:
        g = tl.div_rn(g, tl.load(grad_scale))
        store_narrow(g_at, at, g, exists, MASKED)
    if MAXIMIZE:
        g = -g
    if DECOUPLED:
        p -= lr * hyper.weight_decay * p
    else:
        g += hyper.weight_decay * p
    m += hyper.beta1_left * (g - m)
    v = hyper.beta2 * v + hyper.beta2_left * g * g
    store_narrow(m_at, at, m, exists, MASKED)
    store_narrow(v_at, at, v, exists, MASKED)
    if AMSGRAD:
        v = tl.maximum(v, load_wide(vmax_at, at, exists, MASKED), propagate_nan=tl.PropagateNan.ALL)
        store_narrow(vmax_at, at, v, exists, MASKED)
    p -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * root_correction + hyper.eps)
    store_narrow(p_at, at, p, exists, MASKED)


@triton.jit
def address(table, row, tensor, n, POINTEE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + row * n + tensor).to(tl.pointer_type(POINTEE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def adam_kernel(
    table, sizes, chunks, n, hyper, grad_scale, found_inf, lr_tensor,
    POINTEE: tl.constexpr, ALIGNED: tl.constexpr, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:  # noqa: SIM102, Triton does not cut an `and` short
        if tl.load(found_inf) != 0.0:
            return
    entry = chunks + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(entry)
    start = tl.load(entry + 1).to(tl.int64) * CHUNK
    size = tl.load(sizes + tensor)
    p_at = address(table, 0, tensor, n, POINTEE, ALIGNED)
    g_at = address(table, 1, tensor, n, POINTEE, ALIGNED)
    m_at = address(table, 2, tensor, n, POINTEE, ALIGNED)
    v_at = address(table, 3, tensor, n, POINTEE, ALIGNED)
    vmax_at = address(table, 4, tensor, n, POINTEE, ALIGNED)
    t = tl.load(address(table, 5, tensor, n, tl.float32, False)) + 1.0
    lr = hyper.lr
    if lr_tensor is not None:
        lr = tl.load(lr_tensor)
    step_size = tl.div_rn(lr, one_minus_exp(t * hyper.log_beta1))
    root_correction = tl.div_rn(1.0, tl.sqrt_rn(one_minus_exp(t * hyper.log_beta2)))
    count = tl.minimum(size - start, CHUNK).to(tl.int32)
    at = start + tl.arange(0, BLOCK)
    if count == CHUNK:  # no masks: 16-byte loads and stores
        for _ in range(0, CHUNK, BLOCK):
            update(
                p_at, g_at, m_at, v_at, vmax_at, at, size, lr, step_size, root_correction, grad_scale, hyper,
                DECOUPLED, AMSGRAD, MAXIMIZE, False,
            )  # fmt: skip
            at += BLOCK
    else:
        for _ in range(0, count, BLOCK):
            update(
                p_at, g_at, m_at, v_at, vmax_at, at, size, lr, step_size, root_correction, grad_scale, hyper,
                DECOUPLED, AMSGRAD, MAXIMIZE, True,
            )  # fmt: skip
            at += BLOCK


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


class Work(NamedTuple):
    """What the kernels find their tensors by, on the device."""

    table: Tensor
    sizes: Tensor
    chunks: Tensor
    aligned: bool


_prepared: OrderedDict[tuple[object, ...], Work] = OrderedDict()
_KEPT = 16  # parameter groups whose tables are kept


def adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    lr_tensor: Tensor | None = None,
) -> None:
    """One step, in place; 1 is added to each of ``state_steps`` (fp32 scalars). ``grads`` are left divided by
    ``grad_scale``; where ``found_inf`` is not 0 nothing changes; ``lr_tensor`` replaces ``lr``.

    All tensors share one dtype and device, are dense, and state and gradient have their parameter's strides.
    """
    if not params:
        return
    work = prepare(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else params, state_steps)
    n = len(params)
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    hyper = Hyper(lr, log_beta1, log_beta2, 1 - beta1, beta2, 1 - beta2, eps, weight_decay)
    if len(work.chunks) > 0:
        adam_kernel[(len(work.chunks),)](
            work.table, work.sizes, work.chunks, n, hyper, grad_scale, found_inf, lr_tensor,
            POINTEE=POINTEES[params[0].dtype], ALIGNED=work.aligned, DECOUPLED=decoupled, AMSGRAD=amsgrad,
            MAXIMIZE=maximize, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
    advance_kernel[(triton.cdiv(n, 256),)](
        work.table[5], found_inf, n, BLOCK=256, num_warps=4, **launch.OPTIONS
    )


def prepare(*lists: list[Tensor]) -> Work:
    """The tables for these tensors; those of the last steps are kept, by address and size."""
    params = lists[0]
    addresses = [x.data_ptr() for tensors in lists for x in tensors]
    sizes = [p.numel() for p in params]
    key = (params[0].device, params[0].dtype, *addresses, *sizes)
    work = _prepared.get(key)
    if work is None:
        work = _prepared[key] = build(params[0].device, addresses, sizes)
        while len(_prepared) > _KEPT:
            _prepared.popitem(last=False)
    _prepared.move_to_end(key)
    return work


def build(device: torch.device, addresses: list[int], sizes: list[int]) -> Work:
    n = len(sizes)
    counts = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    tensors = torch.repeat_interleave(torch.arange(n), counts)
    within = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    chunks = torch.stack([tensors, within], dim=1).to(torch.int32)
    table = torch.tensor(addresses, dtype=torch.int64).view(-1, n)
    aligned = all(address % 16 == 0 for address in addresses[: 5 * n])
    return Work(
        table.to(device), torch.tensor(sizes, dtype=torch.int64).to(device), chunks.to(device), aligned
    )
