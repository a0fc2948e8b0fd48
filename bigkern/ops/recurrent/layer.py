"""A recurrent layer around a scan: the products before it and, in backward, after it.

    gates  = x W_ih^T + biases          one product for all steps and directions
    y, ..  = scan(gates, ..)            the walk over time
    dgates = scan_backward(dy, ..)
    dx     = dgates W_ih       dW_ih = dgates^T x       dW_hh = dgates^T h'       db = dgates' column sums

h' is y one step before. A GRU's W_hn h' + b_hn meets r before it joins the gates and has a gradient of its
own, ``dhidden_n``, which takes the n columns' place in dW_hh and db_hh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.linear.call import Linear, LinearBackward
from bigkern.ops.linear.product import product, product_backward
from bigkern.ops.recurrent import reference
from bigkern.ops.recurrent.call import (
    Gradients,
    Recurrent,
    RecurrentBackward,
    Result,
    Scan,
    ScanBackward,
    layout_of,
)


def composed(
    scan: Callable[[Scan], Any], linear: Callable[[Linear], Tensor] = product
) -> Callable[[Recurrent], Result]:
    """The op from a scan and a product."""

    def recurrent(call: Recurrent) -> Result:
        x, merged, zoneout = call.x, _merged(call.weights, call.mode), _contiguous(call.zoneout)
        gates = linear(Linear(_rows(x), merged.w_ih, merged.bias))
        h0, c0, sizes = call.h0.contiguous(), _contiguous(call.c0), call.batch_sizes
        w_hh, w_hh_reverse = merged.w_hh
        y, hn, cn, reserve = scan(
            Scan(gates, h0, c0, w_hh, w_hh_reverse, merged.bias_n, sizes, zoneout, call.mode, call.save)
        )
        return Result(y.view(*x.shape[:-1], y.shape[1]), hn, cn, gates if call.save else None, reserve)

    return recurrent


def composed_backward(
    scan_backward: Callable[[ScanBackward], Any],
    linear_backward: Callable[[LinearBackward], Any] = product_backward,
) -> Callable[[RecurrentBackward], Gradients]:
    """The op's backward from a scan's and a product's."""

    def recurrent_backward(call: RecurrentBackward) -> Gradients:
        merged, zoneout = _merged(call.weights, call.mode), _contiguous(call.zoneout)
        dy, dhn, dcn = _contiguous(_rows(call.dy)), _contiguous(call.dhn), _contiguous(call.dcn)
        h0, c0, y, sizes = call.h0.contiguous(), _contiguous(call.c0), _rows(call.y), call.batch_sizes
        (w_hh, w_hh_reverse), gates, reserve = merged.w_hh, call.gates, call.reserve
        dgates, dhidden_n, dh0, dc0 = scan_backward(
            ScanBackward(
                dy, dhn, dcn, gates, h0, c0, w_hh, w_hh_reverse, sizes, zoneout, y, reserve, call.mode
            )
        )
        dx: Any = None
        dw_ih: Any = None
        dweights: list[Tensor] = []
        if call.want_x or call.want_weights:
            of_input = LinearBackward(dgates, _rows(call.x), merged.w_ih, call.want_x, call.want_weights)
            dx, dw_ih = linear_backward(of_input)
        if call.want_weights:
            D, biases = len(h0), layout_of(call.weights).biases
            halves = [dw_ih] if D == 1 else [half.clone() for half in dw_ih.chunk(D)]  # none another's alias
            for d, (own, y_) in enumerate(zip(dgates.chunk(D, 1), y.chunk(D, 1), strict=True)):
                w: Any = merged.w_hh[d]
                parts, w_parts = [own], [w]
                if dhidden_n is not None:
                    H = y_.shape[1]
                    parts = [own[:, :-H], dhidden_n.chunk(D, 1)[d]]
                    w_parts = w.split([2 * H, H])
                before = reference.previous_states(y_, h0[d], sizes, d == 1)
                dw_hh = [
                    linear_backward(LinearBackward(part, before, w_part, False, True))[1]
                    for part, w_part in zip(parts, w_parts, strict=True)
                ]
                dweights += [halves[d], dw_hh[0] if len(dw_hh) == 1 else torch.cat(dw_hh)]
                if biases:
                    db_ih = own.sum(0)
                    of_n = [] if dhidden_n is None else [parts[1].sum(0)]
                    dweights += [db_ih, torch.cat([db_ih[: parts[0].shape[1]], *of_n])]
        return Gradients(None if dx is None else dx.view(call.x.shape), dh0, dc0, dweights)

    return recurrent_backward


class Merged(NamedTuple):
    """A layer's weights as a scan takes them: those of the input and the biases of all directions in one.

    b_hh joins b_ih, but for a GRU's b_hn, which r multiplies.
    """

    w_ih: Tensor  # [D*G*H, I]
    w_hh: tuple[Tensor, Tensor | None]  # of either direction
    bias: Tensor | None  # [D*G*H]
    bias_n: Tensor | None  # [D, H]


def _merged(weights: list[Tensor], mode: str) -> Merged:
    layout = layout_of(weights)
    D = layout.directions
    w_ihs, w_hhs, *biases = (weights[i :: layout.each] for i in range(layout.each))
    w_ih = w_ihs[0].contiguous() if D == 1 else torch.cat(w_ihs)
    w_hh = w_hhs[0].contiguous(), w_hhs[1].contiguous() if D == 2 else None
    if not layout.biases:
        return Merged(w_ih, w_hh, None, None)
    b_ih, b_hh = (bias[0] if D == 1 else torch.cat(bias) for bias in biases)
    if mode != "GRU":
        return Merged(w_ih, w_hh, b_ih + b_hh, None)
    by_gate = b_hh.view(D, 3, -1)
    bias = b_ih + F.pad(by_gate[:, :2], (0, 0, 0, 1)).flatten()
    return Merged(w_ih, w_hh, bias, by_gate[:, 2].contiguous())


def _rows(x: Any) -> Any:
    """``[T, B, I]`` as ``[N, I]``."""
    return x.flatten(0, 1) if x is not None and x.dim() == 3 else x


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
