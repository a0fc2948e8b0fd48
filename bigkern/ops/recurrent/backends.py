"""The recurrent op: its declaration and its candidates.

The scan alone is a kernel's; the products around it are the same for every candidate: ``layer.py`` composes
them. Only the candidate ``cpu`` multiplies the input itself, some steps at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigkern.core import wisdom
from bigkern.core.library import (
    KERNEL_DTYPES,
    SLOW_PRODUCTS,
    autocast,
    define_native,
    foreign,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.core.op import Autograd, Measures, Op, native, of_fields
from bigkern.core.registry import Backend, Reason
from bigkern.ops.linear import reference as linear_reference
from bigkern.ops.recurrent import stock
from bigkern.ops.recurrent.call import (
    GATES,
    Gradients,
    Recurrent,
    RecurrentBackward,
    Result,
    bind,
    check_batch_sizes,
    layout_of,
    options,
    sizes,
)
from bigkern.ops.recurrent.layer import composed, composed_backward

define_native(
    "recurrent_scan(Tensor(a!) gates, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? w_hh_reverse,"
    " Tensor? bias_n, Tensor? batch_sizes, Tensor? zoneout, str mode, bool save)"
    " -> (Tensor y, Tensor hn, Tensor? cn, Tensor? reserve)"
)
define_native(
    "recurrent_scan_backward(Tensor? dy, Tensor? dhn, Tensor? dcn, Tensor gates, Tensor h0, Tensor? c0,"
    " Tensor w_hh, Tensor? w_hh_reverse, Tensor? batch_sizes, Tensor? zoneout, Tensor y, Tensor? reserve,"
    " str mode) -> (Tensor dgates, Tensor? dhidden_n, Tensor dh0, Tensor? dc0)"
)
define_native("recurrent_fits(Tensor h0, str mode) -> bool")


# ---- gradients and fakes ---------------------------------------------------------------------------


def _twice(call: RecurrentBackward, needed: Any) -> tuple[Any, ...]:
    """Gradients of x, h0, c0 and, as a list, the weights, by torch's autograd through the reference."""
    x, h0, c0, weights = call.x, call.h0, call.c0, call.weights
    forward = Recurrent(x, h0, c0, weights, call.batch_sizes, call.zoneout, call.mode, False)
    results = zip(stock.REFERENCE.forward(forward), (call.dy, call.dhn, call.dcn), strict=False)
    outputs, upstream = zip(*((t, grad) for t, grad in results if grad is not None), strict=True)
    wanted = *needed[:3], *needed[3]
    inputs: Any = [t for t, want in zip((x, h0, c0, *weights), wanted, strict=True) if want]
    found = iter(torch.autograd.grad(outputs, inputs, upstream, create_graph=True, allow_unused=True))
    dx, dh0, dc0, *dweights = (next(found) if want else None for want in wanted)
    return dx, dh0, dc0, dweights


def _fake(call: Recurrent) -> Result:
    x, D, B, H = call.x, *call.h0.shape
    N = x.numel() // x.shape[-1] if x.dim() == 3 else x.shape[0]
    hn = x.new_empty(D, B, H)
    wide = torch.promote_types(x.dtype, torch.float32)
    return Result(
        x.new_empty(*x.shape[:-1], D * H),
        hn,
        None if call.c0 is None else torch.empty_like(hn),
        x.new_empty(N, D * GATES[call.mode] * H) if call.save else None,
        x.new_empty(N, D * H, dtype=wide) if call.save and not call.mode.startswith("RNN") else None,
    )


def _fake_backward(call: RecurrentBackward) -> Gradients:
    x, h0, c0 = call.x, call.h0, call.c0
    return Gradients(
        x.new_empty(x.shape) if call.want_x else None,
        h0.new_empty(h0.shape),
        None if c0 is None else c0.new_empty(c0.shape),
        [w.new_empty(w.shape) for w in call.weights] if call.want_weights else [],
    )


def _check_values(call: Recurrent) -> None:
    if call.batch_sizes is not None:
        check_batch_sizes(call.batch_sizes, len(call.x))


RECURRENT = Op(
    "recurrent",
    Recurrent,
    Result,
    bind=bind,
    fake=_fake,
    reference=stock.REFERENCE,
    outputs=3,
    check_values=_check_values,
    measures=Measures(sizes, options),
    autograd=Autograd(
        RecurrentBackward,
        Gradients,
        twice=_twice,
        fake=_fake_backward,
        compiled=False,
    ),
)


# ---- candidates ------------------------------------------------------------------------------------


def _refuses(backend: str) -> Callable[[Recurrent], Reason]:
    def refuses(call: Recurrent) -> Reason:
        x, h0, c0, weights = call.x, call.h0, call.c0, call.weights
        if (reason := unavailable(backend, x) or foreign(x, h0, c0, call.zoneout, *weights)) is not None:
            return reason
        if x.dtype not in KERNEL_DTYPES:
            return f"dtype {x.dtype} is not float32, bfloat16 or float16"
        for i, weight in enumerate(weights):
            if weight.dtype != x.dtype:
                return f"weights[{i}] has dtype {weight.dtype}, x has {x.dtype}"
        for name, state in (("h0", h0), ("c0", c0)):
            if state is not None and state.dtype != x.dtype:
                return f"{name} has dtype {state.dtype}, x has {x.dtype}"
        if layout_of(weights).projection:
            return "w_hr, the projection of proj_size, is stock's alone"
        if x.numel() == 0 or h0.numel() == 0:
            return "x or the state is empty"
        return autocast(x)

    return refuses


# On two Zen 4 cores: steps, below which packing the weights is not paid back; numbers in y, below which a
# graph costs more than is gained, but for GRU, of which stock has no kernel; sequences, and units, from which
# on oneDNN's LSTM is at its best.
FASTER_FROM, LEAST, MOST, WIDE = 4, 2048, 32, 768


def _cpu_declines(call: Recurrent) -> Reason:
    x, batch_sizes = call.x, call.batch_sizes
    if not x.is_cpu:
        return f"tensors are on {x.device.type}"
    if call.zoneout is not None:
        return None  # stock knows none, and the reference walks from step to step in Python
    T = x.shape[0] if batch_sizes is None else len(batch_sizes)
    if T < FASTER_FROM:
        return f"stock is as fast below {FASTER_FROM} steps"
    if x.dtype in SLOW_PRODUCTS:
        return None
    if torch.compiler.is_exporting():
        return None  # a choice by the batch would bind the graph to batches of one side
    B = x.shape[1] if batch_sizes is None else x.shape[0] // T
    H = call.weights[1].shape[1]
    if call.save and call.mode != "GRU" and T * B * H < LEAST:
        return f"stock is as fast below {LEAST} numbers in y"
    if call.mode == "LSTM" and batch_sizes is None and B > 1 and x.dtype != torch.float16:
        return _onednn_is_as_fast(x, B, H, call.save)
    return None


def _onednn_is_as_fast(x: Tensor, B: int, H: int, save: bool) -> Reason:
    """Of an LSTM on several sequences that are not packed: what oneDNN has a kernel for."""
    if save and x.dtype == torch.float32 and x.requires_grad:
        return "stock's LSTM is as fast in float32 where x has a gradient"
    if not save and B >= MOST:
        return f"stock's LSTM is as fast from {MOST} sequences on without a graph"
    if not save and H >= WIDE:
        return f"stock's LSTM is as fast from {WIDE} units on without a graph"
    return None


def declined(call: Recurrent) -> bool:
    """Whether all kernels decline a call, as those of another device do, which costs less to ask than to bind
    and resolve it.

    Its states may be None: neither looks at them.
    """
    if wisdom.noting is not None:
        return False
    if order := RECURRENT.measured(call):
        return order[0] == "torch"
    names = ("cpu",) if call.x.is_cpu else ("cuda", "triton")
    return all(RECURRENT.backends[name].declines(call) is not None for name in names)


def cuda_backend(namespace: Any, *, emulated: bool = False) -> Backend:
    """The CUDA kernels: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses_tensors = _refuses("cpu" if emulated else "cuda")
    fits: dict[tuple[Any, ...], bool] = {}  # asked once for each

    def refuses(call: Recurrent) -> Reason:
        reason = refuses_tensors(call)
        if reason is not None or torch.compiler.is_compiling():  # the op itself asks again
            return reason
        h0, mode = call.h0, call.mode
        D, _B, H = h0.shape
        key = h0.device, h0.dtype, mode, D, H
        if key not in fits:
            fits[key] = namespace.recurrent_fits.default(h0, mode)
        return None if fits[key] else f"the weights of {H} hidden units do not fit on chip"

    scan, scan_backward = (native(name, namespace) for name in ("recurrent_scan", "recurrent_scan_backward"))
    is_unproven = unproven("recurrent", "cuda")
    return Backend("cuda", composed(scan), composed_backward(scan_backward), refuses, is_unproven)


def _by_torch(call: Recurrent) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch's own functions and its autograd, or, where they have no word, the reference as an op."""
    if _left_to_torch(call):
        return stock.recurrent(call)
    y, hn, cn = RECURRENT.run(RECURRENT.reference, call)
    return y, hn, cn


def _left_to_torch(call: Recurrent) -> bool:
    """They know no zoneout. torch.compile cannot trace them with batch sizes, nor train a CPU's LSTM."""
    if call.zoneout is None and not torch.compiler.is_compiling():
        return True
    if foreign(*RECURRENT.tensors(call)) is not None or autocast(call.x) is not None:
        return True
    if layout_of(call.weights).projection:
        return True
    return call.zoneout is None and call.batch_sizes is None and not call.x.is_cpu


RECURRENT.register(cuda_backend(torch.ops.bigkern_native))
RECURRENT.register(
    Backend(
        "triton",
        composed(of_fields(triton_kernel("recurrent", "recurrent_scan"))),
        composed_backward(of_fields(triton_kernel("recurrent", "recurrent_scan_backward"))),
        _refuses("triton"),
        unproven("recurrent", "triton"),
    )
)
RECURRENT.register(
    Backend(  # multiplies the input itself, some steps at a time: what waits stays in the caches
        "cpu",
        native("recurrent"),
        composed_backward(native("recurrent_scan_backward")),
        _refuses("cpu"),
        declines=_cpu_declines,
    )
)


def _library_refuses(call: Recurrent) -> Reason:
    if call.mode == "RNN_RELU":
        return "the input's part of the gates is rounded by itself, which could turn the sign that ReLU sees"
    return _refuses("cpu_library")(call)


RECURRENT.register(
    Backend(
        "cpu_library",
        composed(native("recurrent_scan"), linear_reference.linear),
        composed_backward(native("recurrent_scan_backward"), linear_reference.linear_backward),
        _library_refuses,
        declines=lambda call: "not measured here: stock's products may be slower than ours",
    )
)
RECURRENT.register(Backend("torch", _by_torch, by_torch=True))
