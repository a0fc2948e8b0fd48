"""What the recurrent op and its scan are called with, forward and backward, and what comes of it.

A layer is the input's product over all steps at once, the scan over time, and in backward the products of the
weights' gradients. N = rows of all steps, D = directions, B = batch, H = hidden size, G = gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bigkern.core.checks import check_dense, check_tensor, kind
from bigkern.core.op import Call

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


# ---- the layer -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Recurrent(Call):
    x: Tensor  # [T, B, I], or packed [N, I]
    h0: Tensor  # [D, B, H]
    c0: Tensor | None  # an LSTM's
    weights: list[Tensor]  # see Layout
    batch_sizes: Tensor | None  # [T]
    zoneout: Tensor | None  # [N, D*H]
    mode: str
    save: bool  # whether a gradient is wanted


class Result(NamedTuple):
    y: Tensor  # [T, B, D*H], or packed [N, D*H]
    hn: Tensor
    cn: Tensor | None
    gates: Tensor | None  # activated [N, D*G*H], if saved
    reserve: Tensor | None  # [N, D*H], if saved: an LSTM's cells, a GRU's W_hn h' + b_hn


@dataclass(slots=True)
class RecurrentBackward(Call):
    dy: Tensor | None
    dhn: Tensor | None
    dcn: Tensor | None
    x: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: list[Tensor]
    batch_sizes: Tensor | None
    zoneout: Tensor | None
    y: Tensor
    gates: Tensor
    reserve: Tensor | None
    mode: str
    want_x: bool
    want_weights: bool


class Gradients(NamedTuple):
    dx: Tensor | None
    dh0: Tensor
    dc0: Tensor | None
    dweights: list[Tensor]  # empty if not wanted


# ---- the scan --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Scan(Call):
    gates: Tensor  # [N, D*G*H], the projected input; with save activated in place
    h0: Tensor
    c0: Tensor | None
    w_hh: Tensor  # [G*H, H]
    w_hh_reverse: Tensor | None
    bias_n: Tensor | None  # [D, H], a GRU's b_hn
    batch_sizes: Tensor | None
    zoneout: Tensor | None
    mode: str
    save: bool


class Scanned(NamedTuple):
    y: Tensor  # [N, D*H]
    hn: Tensor
    cn: Tensor | None
    reserve: Tensor | None


@dataclass(slots=True)
class ScanBackward(Call):
    dy: Tensor | None
    dhn: Tensor | None
    dcn: Tensor | None
    gates: Tensor  # activated
    h0: Tensor
    c0: Tensor | None
    w_hh: Tensor
    w_hh_reverse: Tensor | None
    batch_sizes: Tensor | None
    zoneout: Tensor | None
    y: Tensor
    reserve: Tensor | None
    mode: str


class ScanGradients(NamedTuple):
    dgates: Tensor  # [N, D*G*H], of what the activations are applied to
    dhidden_n: Tensor | None  # [N, D*H], of a GRU's W_hn h' + b_hn
    dh0: Tensor
    dc0: Tensor | None


# ---- weights ---------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """What a flat list of weights holds."""

    directions: int
    biases: bool
    projection: bool  # w_hr, torch's proj_size

    @property
    def each(self) -> int:
        """Tensors a direction."""
        return 2 + 2 * self.biases + self.projection


# By the weights' numbers of dimensions: w_ih, w_hh, b_ih and b_hh or neither, w_hr or not, a direction.
LAYOUTS = {
    (*(2, 2), *(1, 1) * biases, *(2,) * projection) * directions: Layout(directions, biases, projection)
    for directions in (1, 2)
    for biases in (False, True)
    for projection in (False, True)
}


def layout_of(weights: Sequence[Tensor]) -> Layout:
    layout = LAYOUTS.get(tuple(weight.dim() for weight in weights))
    if layout is None:
        dims = ", ".join(f"{weight.dim()}D" for weight in weights)
        raise ValueError(
            f"weights must be w_ih, w_hh[, b_ih, b_hh][, w_hr] of 1 or 2 directions, not [{dims}]"
        )
    return layout


# ---- checks, in torch's words where it has any -------------------------------------------------------


def bind(
    x: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    mode: str = "LSTM",
    batch_sizes: Tensor | None = None,
    zoneout: Tensor | None = None,
) -> Recurrent:
    """Check a public call. Without hx the state is zeros."""
    check_dense("x", x)
    if not isinstance(mode, str) or mode not in GATES:
        raise ValueError(f"Unrecognized RNN mode: {mode}; mode must be one of {', '.join(GATES)}")
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence of Tensors, not {kind(weights)}")
    weights = list(weights)
    for i, weight in enumerate(weights):
        check_tensor(f"weights[{i}]", weight, x)
        if weight.dtype != weights[0].dtype:
            raise TypeError(
                f"weights[{i}] must have weights[0]'s dtype {weights[0].dtype}, not {weight.dtype}"
            )
    layout = layout_of(weights)
    _check_input(x, weights[0], batch_sizes)
    H, output_size = _check_weights(weights, layout, mode)
    if layout.projection and mode != "LSTM":
        raise ValueError(f"weights must have no w_hr for {mode}: only an LSTM projects its output")
    B = x.shape[1] if batch_sizes is None else None
    if batch_sizes is not None and not torch.compiler.is_compiling():
        check_batch_sizes(batch_sizes, len(x))
        B = int(batch_sizes[0])
    h0, c0 = _states(x, hx, mode, layout.directions, B, H, output_size)
    if zoneout is not None:
        if layout.projection:
            raise ValueError(
                "zoneout must be None where weights hold w_hr: it is not defined for a projection"
            )
        zoneout = _checked_zoneout(zoneout, x, layout.directions * output_size)
    tensors = (x, h0, *weights) if c0 is None else (x, h0, c0, *weights)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return Recurrent(x, h0, c0, weights, batch_sizes, zoneout, mode, save)


def _check_input(x: Tensor, w_ih: Tensor, batch_sizes: Any) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if x.dtype != w_ih.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            "x must have the dtype of weights: "
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    dims = 3 if batch_sizes is None else 2
    if x.dim() != dims:
        asked = "without batch_sizes" if batch_sizes is None else "with batch_sizes"
        raise RuntimeError(f"x: input must have {dims} dimensions, got {x.dim()}, {asked}")
    if x.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(
            f"x: input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {x.shape[-1]}"
        )
    if len(x) == 0:
        raise RuntimeError("x: Expected sequence length to be larger than 0 in RNN")
    if batch_sizes is None:
        return
    if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype != torch.int64:
        raise TypeError(f"batch_sizes must be an int64 Tensor, not {kind(batch_sizes)}")
    if not batch_sizes.is_cpu:
        raise ValueError("batch_sizes should always be on CPU")
    if batch_sizes.dim() != 1 or batch_sizes.numel() == 0:
        raise RuntimeError(f"batch_sizes must be of shape (T,), T > 0, not {tuple(batch_sizes.shape)}")


def check_batch_sizes(batch_sizes: Tensor, N: int) -> None:
    """What only the numbers show, and a traced call not before it runs."""
    sizes = batch_sizes.tolist()
    if sizes[-1] <= 0 or any(b > a for a, b in pairwise(sizes)):
        raise ValueError(f"batch_sizes must be positive and never rise, not {sizes[:8]}")
    if sum(sizes) != N:
        raise ValueError(f"batch_sizes must add up to x's {N} rows, not {sum(sizes)}")


def _check_weights(weights: list[Tensor], layout: Layout, mode: str) -> tuple[int, int]:
    """The hidden size, and the output's: another one where there is a projection."""
    rows, I = weights[0].shape
    G = GATES[mode]
    if rows % G:
        raise RuntimeError(f"weights[0] must have {G} * hidden_size rows for {mode}, not {rows}")
    H = rows // G
    output_size = weights[layout.each - 1].shape[0] if layout.projection else H
    shapes: list[tuple[int, ...]] = [(rows, I), (rows, output_size)]
    shapes += [(rows,)] * (2 * layout.biases) + [(output_size, H)] * layout.projection
    for i, weight in enumerate(weights):
        shape = shapes[i % layout.each]
        if weight.shape != shape:
            raise RuntimeError(f"weights[{i}] must have shape {shape} for {mode}, not {tuple(weight.shape)}")
    return H, output_size


def _states(
    x: Tensor, hx: Any, mode: str, D: int, B: int | None, H: int, output_size: int
) -> tuple[Tensor, Tensor | None]:
    """h0 and, for an LSTM, c0; B is None where only a traced batch_sizes knows it."""
    lstm = mode == "LSTM"
    if hx is None:
        if B is None:
            raise RuntimeError("hx must be given where batch_sizes is traced: its numbers are not known")
        return x.new_zeros(D, B, output_size), x.new_zeros(D, B, H) if lstm else None
    if lstm and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
        raise TypeError(f"hx must be (h0, c0) for LSTM, not {type(hx).__name__}")
    sizes = {"hx[0]": output_size, "hx[1]": H} if lstm else {"hx": H}
    for (name, size), state in zip(sizes.items(), hx if lstm else (hx,), strict=True):
        check_tensor(name, state, x)
        if state.dtype != x.dtype and not torch._C._is_any_autocast_enabled():
            raise TypeError(f"{name} must have x's dtype {x.dtype}, not {state.dtype}")
        expected = (D, state.shape[1] if B is None and state.dim() == 3 else B, size)
        if state.shape != expected:
            hidden = name.replace("hx", "hidden")  # torch's word
            found = f"got {list(state.shape)} for these weights"
            raise RuntimeError(f"{name}: Expected {hidden} size {expected}, {found}")
    return (hx[0], hx[1]) if lstm else (hx, None)


def _checked_zoneout(zoneout: Any, x: Tensor, width: int) -> Tensor:
    check_tensor("zoneout", zoneout, x)
    if zoneout.dtype != x.dtype:
        raise TypeError(f"zoneout must have x's dtype {x.dtype}, not {zoneout.dtype}")
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if zoneout.shape not in ((rows, width), (*x.shape[:-1], width)):
        raise RuntimeError(
            f"zoneout must have the output's shape {(*x.shape[:-1], width)}, not {tuple(zoneout.shape)},"
            " for this x"
        )
    return cast(Tensor, zoneout.reshape(rows, width))


# ---- what is measured ------------------------------------------------------------------------------


def sizes(call: Recurrent) -> tuple[int, ...]:
    """T, B, I and H."""
    x, H = call.x, call.weights[1].shape[1]
    if call.batch_sizes is None:
        return *x.shape, H
    T = len(call.batch_sizes)
    return T, x.shape[0] // max(T, 1), x.shape[1], H


def options(call: Recurrent) -> tuple[str, ...]:
    words = {
        call.mode: True,
        "packed": call.batch_sizes is not None,
        "both": layout_of(call.weights).directions == 2,
        "zoneout": call.zoneout is not None,
    }
    return tuple(word for word, used in words.items() if used)
