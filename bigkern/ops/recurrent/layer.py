"""A recurrent layer around a scan: the products before it and, in backward, after it.

    gates  = x W_ih^T + biases          one product for all steps and directions
    y, ..  = scan(gates, ..)            the walk over time
    dgates = scan_backward(dy, ..)
    dx     = dgates W_ih       dW_ih = dgates^T x       dW_hh = dgates^T h'       db = dgates' column sums

h' is y one step before. A GRU's W_hn h' + b_hn meets r before it joins the gates and has a gradient of its
own, ``dhidden_n``, which takes the n columns' place in dW_hh and db_hh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.linear.backends import LINEAR
from bigkern.ops.linear.call import Linear, LinearBackward
from bigkern.ops.recurrent import reference
from bigkern.ops.recurrent.call import layout_of

Result = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]  # of x, h0, c0 and the weights


# ---- products: by our linear kernels where they would be chosen --------------------------------------

LONG = 4096  # rows


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    call, ours = Linear(x, weight, bias), LINEAR.backends["cpu"]
    return cast(Tensor, (ours if ours.objection(call) is None else LINEAR.reference).forward(call))


def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, *wanted: bool) -> tuple[Any, Any]:
    """A weight's gradient sums over all rows: stock's product of few columns in one go, ours in parts."""
    call, ours = Linear(x, weight, None), LINEAR.backends["cpu"]
    long_sums = x.dtype == torch.float32 and len(x) >= LONG and ours.refuses(call) is None
    takes = long_sums or ours.objection(call) is None
    backward = cast(Any, ours if takes else LINEAR.reference).backward
    return cast(tuple[Any, Any], backward(LinearBackward(dy, x, weight, *wanted)))


# ---- the layer -------------------------------------------------------------------------------------


def composed(scan: Callable[..., Any], linear: Callable[..., Tensor] = _linear) -> Callable[..., Result]:
    """The op from a scan and a product."""

    def recurrent(
        x: Tensor, h0: Tensor, c0: Any, weights: Sequence[Tensor], batch_sizes: Any, zoneout: Any, mode: str,
        save: bool,
    ) -> Result:  # fmt: skip
        w_ih, w_hh, bias, bias_n = _merged(weights, mode)
        gates = linear(_rows(x), w_ih, bias)
        h0, c0, zoneout = h0.contiguous(), _contiguous(c0), _contiguous(zoneout)
        y, hn, cn, reserve = scan(gates, h0, c0, *w_hh, bias_n, batch_sizes, zoneout, mode, save)
        return y.view(*x.shape[:-1], y.shape[1]), hn, cn, gates if save else None, reserve

    return recurrent


def composed_backward(
    scan_backward: Callable[..., Any], linear_backward: Callable[..., tuple[Any, Any]] = _linear_backward
) -> Callable[..., Gradients]:
    """The op's backward from a scan's and a product's."""

    def recurrent_backward(
        dy: Any, dhn: Any, dcn: Any, x: Tensor, h0: Tensor, c0: Any, weights: Sequence[Tensor],
        batch_sizes: Any, zoneout: Any, y: Tensor, gates: Tensor, reserve: Any, mode: str, want_x: bool,
        want_state: bool, want_weights: bool,
    ) -> Gradients:  # fmt: skip
        w_ih, w_hh, _, _ = _merged(weights, mode)
        h0, c0, zoneout = h0.contiguous(), _contiguous(c0), _contiguous(zoneout)
        dhn, dcn = _contiguous(dhn), _contiguous(dcn)
        dy, y = _contiguous(None if dy is None else _rows(dy)), _rows(y)
        dgates, dhidden_n, dh0, dc0 = scan_backward(
            dy, dhn, dcn, gates, h0, c0, *w_hh, batch_sizes, zoneout, y, reserve, mode
        )
        dx: Any = None
        dw_ih: Any = None
        dweights: list[Tensor] = []
        if want_x or want_weights:
            dx, dw_ih = linear_backward(dgates, _rows(x), w_ih, want_x, want_weights)
        if want_weights:
            D, biases = len(h0), layout_of(weights).biases
            halves = [dw_ih] if D == 1 else [half.clone() for half in dw_ih.chunk(D)]  # none another's alias
            for d, (own, y_) in enumerate(zip(dgates.chunk(D, 1), y.chunk(D, 1), strict=True)):
                parts, w_parts = [own], [w_hh[d]]
                if dhidden_n is not None:
                    H = y_.shape[1]
                    parts = [own[:, :-H], dhidden_n.chunk(D, 1)[d]]
                    w_parts = w_hh[d].split([2 * H, H])
                before = reference.previous_states(y_, h0[d], batch_sizes, d == 1)
                dw_hh = [
                    linear_backward(part, before, w_part, False, True)[1]
                    for part, w_part in zip(parts, w_parts, strict=True)
                ]
                dweights += [halves[d], dw_hh[0] if len(dw_hh) == 1 else torch.cat(dw_hh)]
                if biases:
                    db_ih = own.sum(0)
                    of_n = [] if dhidden_n is None else [parts[1].sum(0)]
                    dweights += [db_ih, torch.cat([db_ih[: parts[0].shape[1]], *of_n])]
        dx = None if dx is None else dx.view(x.shape)
        return (dx, dh0, dc0, dweights) if want_state else (dx, None, None, dweights)

    return recurrent_backward


def _merged(weights: Sequence[Tensor], mode: str) -> tuple[Tensor, list[Any], Tensor | None, Tensor | None]:
    """``(w_ih, [w_hh, w_hh_reverse], bias, bias_n)``: w_ih and biases of all directions in one.

    b_hh joins b_ih, but for a GRU's b_hn, which r multiplies: that is ``bias_n`` ``[D, H]``.
    """
    layout = layout_of(weights)
    D = layout.directions
    w_ihs, w_hhs, *biases = (weights[i :: layout.each] for i in range(layout.each))
    w_ih = w_ihs[0].contiguous() if D == 1 else torch.cat(list(w_ihs))
    w_hh = [w.contiguous() for w in w_hhs] + [None] * (2 - D)
    if not layout.biases:
        return w_ih, w_hh, None, None
    b_ih, b_hh = (bias[0] if D == 1 else torch.cat(list(bias)) for bias in biases)
    if mode != "GRU":
        return w_ih, w_hh, b_ih + b_hh, None
    by_gate = b_hh.view(D, 3, -1)
    return w_ih, w_hh, b_ih + F.pad(by_gate[:, :2], (0, 0, 0, 1)).flatten(), by_gate[:, 2].contiguous()


def _rows(x: Tensor) -> Tensor:
    """``[T, B, I]`` as ``[N, I]``."""
    return x.flatten(0, 1) if x.dim() == 3 else x


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
