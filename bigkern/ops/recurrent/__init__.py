"""A layer of an LSTM, a GRU or an RNN: schema, fake, autograd, backends, the public function.

The op is one layer in one or two directions: the input's product over all steps at once, the scan over time,
and in backward the products of the weights' gradients. The scan alone is a kernel's; the rest is the same on
every backend: ``recurrent_layer.py`` composes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from bigkern.core import registry
from bigkern.core.library import (
    KERNEL_DTYPES,
    LIBRARY,
    autocast,
    define,
    define_native,
    foreign,
    is_autocast_on,
    plain,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.ops.attention.call import autocast as narrowed
from bigkern.ops.recurrent import reference
from bigkern.ops.recurrent.call import bind, check_batch_sizes, layout_of
from bigkern.ops.recurrent.layer import Gradients, Result, composed, composed_backward
from bigkern.ops.recurrent.stock import REFERENCE, REFERENCE_BACKWARD, stock

define(
    "recurrent(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? zoneout,"
    " str mode, bool save) -> (Tensor y, Tensor hn, Tensor? cn, Tensor? gates, Tensor? reserve)"
)
LIBRARY.define(
    "recurrent_backward(Tensor? dy, Tensor? dhn, Tensor? dcn, Tensor x, Tensor h0, Tensor? c0,"
    " Tensor[] weights, Tensor? batch_sizes, Tensor? zoneout, Tensor y, Tensor gates, Tensor? reserve,"
    " str mode, bool want_x, bool want_state, bool want_weights)"
    " -> (Tensor? dx, Tensor? dh0, Tensor? dc0, Tensor[] dweights)"
)
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


# ---- the public function ---------------------------------------------------------------------------


def recurrent(
    x: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    mode: str = "LSTM",
    batch_sizes: Tensor | None = None,
    zoneout: Tensor | None = None,
) -> tuple[Tensor, Any]:
    r"""One layer of an LSTM, a GRU or an RNN, in one or two directions.

    LSTM: ``i, f, o = sigmoid(.)``, ``g = tanh(.)``, ``c = f c' + i g``, ``h = o tanh(c)``.
    GRU: ``r, z = sigmoid(.)``, ``n = tanh(x_n + r (W_hn h' + b_hn))``, ``h = (1 - z) n + z h'``.
    RNN: ``h = tanh(.)`` or ``relu(.)``. Here ``. = W_ih x + b_ih + W_hh h' + b_hh``, ``'`` is of the step
    before, and zoneout makes ``h + m (h' - h)`` of h; an LSTM's c is not touched.

    Args:
        x: ``[T, B, I]``, or ``[N, I]`` with batch_sizes, a PackedSequence's data; float32, bfloat16 or
            float16 (float64 runs on stock PyTorch).
        hx: h0 ``[D, B, H]``, for an LSTM ``(h0, c0)``; None for zeros.
        weights: torch's flat list, for each of the D = 1 or 2 directions ``w_ih [G*H, I]``,
            ``w_hh [G*H, H]``, and ``b_ih``, ``b_hh [G*H]`` or neither. G gates stand in torch's order: 4 of
            an LSTM, i f g o; 3 of a GRU, r z n; 1 of an RNN. With ``w_hr [P, H]`` behind them, an LSTM's
            proj_size, stock runs.
        mode: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``.
        batch_sizes: ``[T]`` int64 on the CPU, positive and never rising: how many rows each step has. Under
            torch.compile hx must then be given.
        zoneout: m, of y's shape (or ``[N, D*H]``) and x's dtype: zeros and ones in training, the probability
            everywhere in evaluation. It has no gradient.

    Returns:
        ``(y, hn)``, for an LSTM ``(y, (hn, cn))``: y ``[T, B, D*H]`` or ``[N, D*H]``, states ``[D, B, H]``.

    Saved for backward: the inputs, y, activated gates ``[N, D*G*H]``, and in fp32 ``[N, D*H]`` of an LSTM's
    cells or a GRU's W_hn h' + b_hn. Differentiable twice.

    Raises:
        TypeError: an argument is not a tensor, hx is not of the mode's form, or a dtype does not fit.
        RuntimeError: shapes do not fit, in torch's words where it has any.
        ValueError: mode, devices, x's dtype beside the weights', or the numbers in batch_sizes do not fit.

    Source: :class:`torch.nn.LSTM`, :class:`torch.nn.GRU`, :class:`torch.nn.RNN`; Krueger et al., Zoneout
    (2016).

    Example:
        >>> import torch
        >>> from bigkern.ops.recurrent import recurrent
        >>> weights = [torch.randn(80, 10), torch.randn(80, 20), torch.randn(80), torch.randn(80)]
        >>> y, (hn, cn) = recurrent(torch.randn(5, 3, 10), None, weights, "LSTM")
        >>> y.shape, hn.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """
    if zoneout is not None and isinstance(x, Tensor) and is_autocast_on(x):
        return _in_autocast(x, hx, weights, mode, batch_sizes, zoneout)
    arguments = bind(x, hx, weights, mode, batch_sizes, zoneout)
    backend = RECURRENT.resolve(*arguments)
    x, h0, c0, weights, *rest, save = arguments
    tensors = x, h0, c0, zoneout, *weights
    if backend.name == "torch" and _left_to_stock(arguments, tensors):
        y, hn, cn = stock(*arguments)
    elif not plain(*tensors):
        y, hn, cn, _, _ = torch.ops.bigkern.recurrent(*arguments)
    elif save:
        y, hn, cn = _Recurrent.apply(backend, rest, x, h0, c0, *weights)
    else:
        y, hn, cn, _, _ = backend.forward(*arguments)
    return (y, hn) if cn is None else (y, (hn, cn))


def _in_autocast(
    x: Tensor, hx: Any, weights: Sequence[Tensor], mode: str, batch_sizes: Any, zoneout: Tensor
) -> tuple[Tensor, Any]:
    """All in autocast's dtype: it knows torch's own functions, and they know no zoneout."""
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    x, zoneout, *others = narrowed(x, zoneout, *states, *weights)
    states, weights = others[: len(states)], others[len(states) :]
    with torch.autocast(x.device.type, enabled=False):
        hx = (states[0], states[1]) if len(states) == 2 else states[0]
        return recurrent(x, hx, weights, mode, batch_sizes, zoneout)


def _left_to_stock(arguments: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether torch's own functions are called, and torch's autograd, rather than the reference.

    They know no zoneout. torch.compile cannot trace them with batch sizes, nor train a CPU's LSTM.
    """
    x, _, _, weights, batch_sizes, zoneout, _, _ = arguments
    if zoneout is None and not torch.compiler.is_compiling():
        return True
    if foreign(*tensors) is not None or autocast(x) is not None or layout_of(weights).projection:
        return True
    return zoneout is None and batch_sizes is None and not x.is_cpu


# ---- the op: fake, kernel, autograd ----------------------------------------------------------------


@torch.library.register_fake("bigkern::recurrent", lib=LIBRARY)
def _fake(
    x: Tensor, h0: Tensor, c0: Tensor | None, _weights: Any, _sizes: Any, _m: Any, mode: str, save: bool
) -> Result:
    D, B, H = h0.shape
    N = x.numel() // x.shape[-1] if x.dim() == 3 else x.shape[0]
    y, hn = x.new_empty(*x.shape[:-1], D * H), x.new_empty(D, B, H)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        y,
        hn,
        None if c0 is None else torch.empty_like(hn),
        x.new_empty(N, D * reference.GATES[mode] * H) if save else None,
        x.new_empty(N, D * H, dtype=wide) if save and not mode.startswith("RNN") else None,
    )


@torch.library.register_fake("bigkern::recurrent_backward", lib=LIBRARY)
def _fake_backward(
    dy: Any, dhn: Any, dcn: Any, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor],
    sizes: Any, m: Any, y: Any, gates: Any, reserve: Any, mode: str, want_x: bool, want_state: bool,
    want_weights: bool,
) -> Gradients:  # fmt: skip
    return (
        x.new_empty(x.shape) if want_x else None,
        h0.new_empty(h0.shape) if want_state else None,
        c0.new_empty(c0.shape) if want_state and c0 is not None else None,
        [w.new_empty(w.shape) for w in weights] if want_weights else [],
    )


def _forward(*arguments: Any) -> Result:
    x, batch_sizes = arguments[0], arguments[4]
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, len(x))
    return cast(Result, RECURRENT.of_node(*arguments).forward(*arguments))


def _backward(dy: Any, dhn: Any, dcn: Any, *rest: Any) -> Gradients:
    backend = RECURRENT.of_node(*rest[:6], rest[9], True)
    return cast(Gradients, cast(Any, backend.backward)(dy, dhn, dcn, *rest))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("recurrent", _forward, _key)
    LIBRARY.impl("recurrent_backward", _backward, _key)


class _Recurrent(torch.autograd.Function):
    """Eager autograd straight onto the chosen backend: a fifth of the cost of a Python custom op."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, backend: registry.Backend, rest: list[Any], x: Tensor, h0: Tensor, c0: Any, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = x, h0, c0, weights, *rest, True
        result = backend.forward(*inputs)
        ctx.backend = backend
        _save(ctx, inputs, result)
        return cast(tuple[Tensor, Tensor, "Tensor | None"], result[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        x, h0, c0, *weights = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable_gradients(ctx, grads, (x, h0, c0, *weights))
        dx, dh0, dc0, dweights = _gradients(ctx.backend.backward, ctx, grads, x, h0 or c0, any(weights))
        return None, None, dx, dh0, dc0, *dweights


def _save(ctx: Any, inputs: Sequence[Any], output: Result) -> None:
    x, h0, c0, weights, batch_sizes, zoneout, ctx.mode, _ = inputs
    y, _hn, _cn, gates, reserve = output
    ctx.save_for_backward(x, h0, c0, batch_sizes, zoneout, y, gates, reserve, *weights)
    ctx.set_materialize_grads(False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*(t for t in output[3:] if t is not None))


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    want_x, want_h0, want_c0, want_weights, *_ = ctx.needs_input_grad
    backward = torch.ops.bigkern.recurrent_backward
    wanted = want_x, want_h0 or want_c0, any(want_weights)
    return *_gradients(backward, ctx, grads[:3], *wanted), None, None, None, None


def _gradients(
    backward: Callable[..., Gradients], ctx: Any, grads: Sequence[Tensor | None], *wanted: bool
) -> tuple[Any, ...]:
    """Of x, h0, c0 and, as a list, the weights."""
    x, h0, c0, batch_sizes, zoneout, y, gates, reserve, *weights = ctx.saved_tensors
    nothing = [None] * len(weights)
    if all(grad is None for grad in grads):
        return None, None, None, nothing
    inputs = x, h0, c0, weights, batch_sizes, zoneout
    dx, dh0, dc0, dweights = backward(*grads, *inputs, y, gates, reserve, ctx.mode, *wanted)
    return dx, dh0, dc0, dweights or nothing


def _differentiable_gradients(
    ctx: Any, grads: Sequence[Tensor | None], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients asked for with ``create_graph``, by torch's autograd through the reference."""
    x, h0, c0, batch_sizes, zoneout, _, _, _, *weights = ctx.saved_tensors
    results = REFERENCE(x, h0, c0, weights, batch_sizes, zoneout, ctx.mode, False)
    asked = [(t, grad) for t, grad in zip(results, grads, strict=False) if grad is not None]
    inputs = [t for t, need in zip((x, h0, c0, *weights), needed, strict=True) if need]
    if not asked:
        return (None,) * len(needed)
    outputs, upstream = zip(*asked, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, upstream, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


torch.library.register_autograd("bigkern::recurrent", _autograd, setup_context=_setup_context, lib=LIBRARY)


# ---- backends --------------------------------------------------------------------------------------

RECURRENT = registry.declare("recurrent", bind)


def _refuses(backend: str) -> Callable[..., registry.Reason]:
    def refuses(
        x: Tensor, h0: Tensor, c0: Any, weights: Sequence[Tensor], batch_sizes: Any, zoneout: Any, *_: Any
    ) -> registry.Reason:
        if (reason := unavailable(backend, x) or foreign(x, h0, c0, zoneout, *weights)) is not None:
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


def _cpu_declines(
    x: Tensor, h0: Any, c0: Any, weights: Any, batch_sizes: Any, zoneout: Any, mode: str, save: bool
) -> registry.Reason:
    if not x.is_cpu:
        return f"tensors are on {x.device.type}"
    if zoneout is not None:
        return None  # stock knows none, and the reference walks from step to step in Python
    T = x.shape[0] if batch_sizes is None else len(batch_sizes)
    if T < FASTER_FROM:
        return f"stock is as fast below {FASTER_FROM} steps"
    if torch.compiler.is_exporting():
        return None  # a choice by the batch would bind the graph to batches of one side
    B = x.shape[1] if batch_sizes is None else x.shape[0] // T
    if save and mode != "GRU" and T * B * weights[1].shape[1] < LEAST:
        return f"stock is as fast below {LEAST} numbers in y"
    if mode == "LSTM" and batch_sizes is None and B > 1 and x.dtype != torch.float16:
        return _onednn_is_as_fast(x, B, weights[1].shape[1], save)
    return None


def _onednn_is_as_fast(x: Tensor, B: int, H: int, save: bool) -> registry.Reason:
    """Of an LSTM on several sequences that are not packed: what oneDNN has a kernel for."""
    if save and x.dtype == torch.float32 and x.requires_grad:
        return "stock's LSTM is as fast in float32 where x has a gradient"
    if not save and B >= MOST:
        return f"stock's LSTM is as fast from {MOST} sequences on without a graph"
    if not save and H >= WIDE:
        return f"stock's LSTM is as fast from {WIDE} units on without a graph"
    return None


def declined(*arguments: Any) -> bool:
    """Whether every backend but stock declines a call, which costs less to ask than to bind and resolve it.

    The arguments are the op's, but for h0 and c0: what declines looks at neither.
    """
    kernels = (backend for backend in RECURRENT.backends.values() if backend.name != "torch")
    return all(backend.declines(*arguments) is not None for backend in kernels)


def _backend_of(name: str, scan: Any, scan_backward: Any, refuses: Any, declines: Any) -> registry.Backend:
    return registry.Backend(name, composed(scan), composed_backward(scan_backward), refuses, declines)


def native_scans(native: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (
        lambda *arguments: native.recurrent_scan.default(*arguments),
        lambda *arguments: native.recurrent_scan_backward.default(*arguments),
    )


def cuda_backend(native: Any, *, emulated: bool = False) -> registry.Backend:
    """The CUDA kernels in ``native``: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses_tensors = _refuses("cpu" if emulated else "cuda")
    fits: dict[tuple[Any, ...], bool] = {}  # asked once for each

    def refuses(
        x: Tensor, h0: Tensor, c0: Any, weights: Any, batch_sizes: Any, zoneout: Any, mode: str, *_: Any
    ) -> registry.Reason:
        reason = refuses_tensors(x, h0, c0, weights, batch_sizes, zoneout)
        if reason is not None or torch.compiler.is_compiling():  # the op itself asks again
            return reason
        D, _B, H = h0.shape
        key = h0.device, h0.dtype, mode, D, H
        if key not in fits:
            fits[key] = native.recurrent_fits.default(h0, mode)
        return None if fits[key] else f"the weights of {H} hidden units do not fit on chip"

    return _backend_of("cuda", *native_scans(native), refuses, unproven("recurrent", "cuda"))


_native = torch.ops.bigkern_native
_triton = triton_kernel("recurrent", "recurrent_scan"), triton_kernel("recurrent", "recurrent_scan_backward")

RECURRENT.register(cuda_backend(_native))
RECURRENT.register(_backend_of("triton", *_triton, _refuses("triton"), unproven("recurrent", "triton")))
RECURRENT.register(
    registry.Backend(  # multiplies the input itself, some steps at a time: what waits stays in the caches
        "cpu",
        lambda *arguments: _native.recurrent.default(*arguments),
        composed_backward(native_scans(_native)[1]),
        _refuses("cpu"),
        _cpu_declines,
    )
)
RECURRENT.register(registry.Backend("torch", REFERENCE, REFERENCE_BACKWARD))
