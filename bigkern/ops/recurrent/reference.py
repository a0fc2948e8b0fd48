"""One recurrent layer's scan over time in plain torch: what every kernel must compute.

    LSTM  i f o = sigmoid(.), g = tanh(.);  c = f c' + i g;  h = o tanh(c)
    GRU   r z = sigmoid(.);  n = tanh(x_n + r (W_hn h' + b_hn));  h = (1 - z) n + z h'
    RNN   h = tanh(.) or relu(.)
    zoneout, after any of them: h = h~ + m (h' - h~)

``.`` is the projected input, ``gates``, plus W_hh h'; h' and c' are of the step before. Gates stand in
torch's order: i f g o, r z n. Sizes are named in ``call.py``.

Step t has ``batch_sizes[t]`` rows, those of a PackedSequence's data; without batch sizes B at every step. The
reverse direction walks from the last step to the first. Either way a step moves the first rows of the state
and leaves the others, whose sequence is over or has not begun.

State is fp32 (fp64 for fp64), whatever the dtype of the gates: rounded is what is stored, and what a product
takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.recurrent.call import Scan, ScanBackward, ScanGradients, Scanned

Function = Callable[[Tensor], Tensor]


def scan(call: Scan) -> Scanned:
    """Without ``save`` it is differentiable by torch's autograd."""
    result, active = _walks(call, [_product(weight, call.gates.dtype) for weight in _directions(call)])
    if active is not None:
        call.gates.copy_(active)
    return result


def layer_norm_scan(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Sequence[Tensor],
    norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor] | None,
    cell_weight: Sequence[Tensor] | None,
    cell_bias: Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    zoneout: Tensor | None,
    mode: str,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, hn, cn)`` of :func:`scan`, with LayerNorm on the recurrent product and on an LSTM's cell.

    ``.`` becomes ``gates + LN(W_hh h')``, an LSTM's output ``h = o tanh(LN(c))``; ``gates`` are of x, already
    normalised and with their bias. A GRU's n is normalised apart from its r and z, which meet it later. The
    weights are one tensor a direction: ``w_hh`` ``[G*H, H]``, ``norm_weight`` and ``norm_bias`` ``[G*H]``,
    ``cell_weight`` and ``cell_bias`` ``[H]``, without which cells are not normalised. Differentiable by
    torch's autograd.

    Source: Ba, Kiros and Hinton, Layer Normalization (2016).
    """
    nothing = [None] * len(w_hh)
    products = [
        _normalised_product(_product(w, gates.dtype), gamma, beta, mode, eps)
        for w, gamma, beta in zip(w_hh, norm_weight, norm_bias or nothing, strict=True)
    ]
    of_cells = None
    if cell_weight is not None:
        of_cells = [_norm(*affine, eps) for affine in zip(cell_weight, cell_bias or nothing, strict=True)]
    call = Scan(gates, h0, c0, w_hh[0], None, None, batch_sizes, zoneout, mode, False)
    y, hn, cn, _ = _walks(call, products, of_cells)[0]
    return y, hn, cn


# ---- forward ---------------------------------------------------------------------------------------


def _walks(
    call: Scan, products: Sequence[Function], of_cells: Sequence[Function] | None = None
) -> tuple[Scanned, Tensor | None]:
    """All directions side by side; and, if they are saved, the activated gates."""
    cells: Sequence[Any] = of_cells or [None] * len(products)
    own = [_walk(call, d, *of) for d, of in enumerate(zip(products, cells, strict=True))]
    y, hn, cn, active, kept = zip(*own, strict=True)
    dtype, c0, save = call.gates.dtype, call.c0, call.save
    result = Scanned(
        torch.cat(y, 1).to(dtype),
        torch.stack(hn).to(dtype),
        None if c0 is None else torch.stack(cn).to(c0.dtype),
        torch.cat(kept, 1) if save and not call.mode.startswith("RNN") else None,
    )
    return result, torch.cat(active, 1) if save else None


def _walk(
    call: Scan, d: int, product: Function, of_cell: Function | None
) -> tuple[Tensor, Tensor, Any, Any, Any]:
    """``(y, hn, cn, activated gates, reserve)`` of one direction, all wide."""
    mode, save, reverse, batch_sizes = call.mode, call.save, d == 1, call.batch_sizes
    wide, D = _wide(call.gates), len(call.h0)
    gates, zoneout = _columns(call.gates, d, D).to(wide), _columns(call.zoneout, d, D)
    h, c = call.h0[d].to(wide), None if call.c0 is None else call.c0[d].to(wide)
    bias_n = None if call.bias_n is None else call.bias_n[d]
    found: list[tuple[Tensor, ...]] = []
    steps = list(_steps(batch_sizes, len(gates), len(h), reverse))
    in_order = steps[::-1] if reverse else steps
    given = gates.split([b for _, b in in_order])  # at once: the gradient of a slice is as large as all of it
    for (start, b), x in zip(steps, given[::-1] if reverse else given, strict=True):
        rows, before = slice(start, start + b), h[:b]
        hidden = product(before)
        if mode == "LSTM":
            assert c is not None
            i, f, g, o = (x + hidden).chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            cell = f * c[:b] + i * g
            new = o * (cell if of_cell is None else of_cell(cell)).tanh()
            active, kept = [i, f, g, o], cell
            c = cell if b == len(c) else torch.cat((cell, c[b:]))
        elif mode == "GRU":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), hidden.chunk(3, 1)
            kept = h_n if bias_n is None else h_n + bias_n
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            n = (x_n + r * kept).tanh()
            new = (1 - z) * n + z * before
            active = [r, z, n]
        else:
            new = (x + hidden).tanh() if mode == "RNN_TANH" else (x + hidden).relu()
            active, kept = [new], new
        if zoneout is not None:
            new = new + zoneout[rows] * (before - new)
        found.append((new, torch.cat(active, 1), kept) if save else (new,))
        h = new if b == len(h) else torch.cat((new, h[b:]))
    if reverse:
        found.reverse()
    if not found:  # no rows at all
        return h[:0], h, c, gates, h[:0]
    y, *saved = (torch.cat(part) for part in zip(*found, strict=True))
    return y, h, c, *(saved or (None, None))


def _steps(batch_sizes: Tensor | None, N: int, B: int, reverse: bool) -> Iterator[tuple[int, int]]:
    """First row and number of rows of every step, in the order of the walk."""
    sizes = [B] * (N // B if B else 0) if batch_sizes is None else batch_sizes.tolist()
    starts = [0]
    for b in sizes:
        starts.append(starts[-1] + b)
    pairs = list(zip(starts, sizes, strict=False))
    return iter(reversed(pairs) if reverse else pairs)


def _product(weight: Tensor, dtype: torch.dtype) -> Function:
    """W_hh h' of a rounded h', added up wide."""
    wide = weight.to(torch.promote_types(dtype, torch.float32))
    return lambda h: F.linear(h.to(dtype).to(wide.dtype), wide)


def _normalised_product(
    product: Function, gamma: Tensor, beta: Tensor | None, mode: str, eps: float
) -> Function:
    """LayerNorm of the product: of all gates at once, but of a GRU's n apart from its r and z."""
    rows = len(gamma)
    parts = (slice(rows),) if mode != "GRU" else (slice(rows // 3 * 2), slice(rows // 3 * 2, rows))
    norms = [_norm(gamma[part], None if beta is None else beta[part], eps) for part in parts]

    def normalised(h: Tensor) -> Tensor:
        gates = product(h)
        if len(norms) == 1:
            return norms[0](gates)
        return torch.cat([norm(gates[:, part]) for norm, part in zip(norms, parts, strict=True)], 1)

    return normalised


def _norm(gamma: Tensor, beta: Tensor | None, eps: float) -> Function:
    def normalised(x: Tensor) -> Tensor:
        bias = None if beta is None else beta.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], gamma.to(x.dtype), bias, eps)

    return normalised


# ---- backward --------------------------------------------------------------------------------------


def scan_backward(call: ScanBackward) -> ScanGradients:
    """Gradients that are None count as 0.

    dgates is of the projected input too; dhidden_n is where n's gradient meets r first. W_hh's gradient is a
    product of these with :func:`previous_states`.
    """
    h0, c0 = call.h0, call.c0
    own = [_walk_backward(call, d, weight) for d, weight in enumerate(_directions(call))]
    dgates, dhidden_n, dh0, dc0 = zip(*own, strict=True)
    return ScanGradients(
        torch.cat(dgates, 1),
        torch.cat(dhidden_n, 1) if call.mode == "GRU" else None,
        torch.stack(dh0).to(h0.dtype),
        None if c0 is None else torch.stack(dc0).to(c0.dtype),
    )


def _walk_backward(call: ScanBackward, d: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dgates, dhidden_n, dh0, dc0)`` of one direction, wide but the first two, which are rounded."""
    dtype, batch_sizes, reverse, D = call.gates.dtype, call.batch_sizes, d == 1, len(call.h0)
    by_row = (_columns(t, d, D) for t in (call.dy, call.gates, call.zoneout, call.y, call.reserve))
    states = (None if t is None else t[d] for t in (call.dhn, call.dcn, call.h0, call.c0))
    parts: Any = [None if t is None else t.to(_wide(call.gates)) for t in (*by_row, *states)]
    dy, gates, zoneout, y, kept, dh, dc, h0, c0 = parts
    weight = weight.to(gates)
    dh, dc = (torch.zeros_like(h0) if t is None else t for t in (dh, dc))
    before = previous_states(*((y, h0) if c0 is None else (kept, c0)), batch_sizes, reverse)
    found = []
    for start, b in _steps(batch_sizes, len(gates), len(h0), not reverse):
        rows = slice(start, start + b)
        dnew = dh[:b] if dy is None else dh[:b] + dy[rows]
        past = 0.0 if zoneout is None else zoneout[rows] * dnew  # what reaches h' past the step
        dx, dn, direct, dc_before = _step_backward(
            call.mode, dnew - past, dc[:b], gates[rows], before[rows], None if kept is None else kept[rows]
        )
        dx, dn = dx.to(dtype), dn.to(dtype)
        found.append((dx, dn))
        dhidden = torch.cat((dx[:, : -dn.shape[1]], dn), 1).to(weight.dtype)
        dh = torch.cat((dhidden @ weight + direct + past, dh[b:]))
        dc = torch.cat((dc_before, dc[b:]))
    if not reverse:
        found.reverse()
    if not found:  # no rows at all
        return gates.to(dtype), h0[:0].to(dtype), dh, dc
    dgates, dhidden_n = (torch.cat(part) for part in zip(*found, strict=True))
    return dgates, dhidden_n, dh, dc


def _step_backward(
    mode: str, dh: Tensor, dc: Tensor, active: Tensor, before: Tensor, kept: Any
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Gradients of the gates before activation, of their last part where W_hh h' enters it, of h' past that
    product, and of c'.

    ``before`` is an LSTM's c' or else h', ``kept`` a step of reserve.
    """
    if mode == "LSTM":
        i, f, g, o = active.chunk(4, 1)
        t = kept.tanh()
        dc = dc + dh * o * (1 - t * t)
        di, df, dg, do = dc * g, dc * before, dc * i, dh * t
        do = do * o * (1 - o)
        return torch.cat((di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do), 1), do, 0.0, dc * f
    if mode == "GRU":
        r, z, n = active.chunk(3, 1)
        dn = dh * (1 - z) * (1 - n * n)
        dz, dr = dh * (before - n), dn * kept
        return torch.cat((dr * r * (1 - r), dz * z * (1 - z), dn), 1), dn * r, dh * z, dc
    dx = dh * (1 - active * active) if mode == "RNN_TANH" else dh * (active > 0)
    return dx, dx, 0.0, dc


def previous_states(y: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """h' ``[N, H]`` of every row of a direction's ``y`` ``[N, H]`` that started from ``h0`` ``[B, H]``."""
    N, B = len(y), len(h0)
    if batch_sizes is None:
        return (torch.cat((y[B:], h0)) if reverse else torch.cat((h0, y[: N - B])))[:N]
    T, start = len(batch_sizes), batch_sizes.cumsum(0) - batch_sizes
    step = torch.arange(T).repeat_interleave(batch_sizes)
    row = torch.arange(N) - start[step]
    other = step + 1 if reverse else step - 1
    inside = (other >= 0) & (other < T)
    other = other.clamp(0, T - 1)
    index = torch.where(inside & (row < batch_sizes[other]), start[other] + row, N + row)
    return torch.cat((y, h0)).index_select(0, index.to(y.device))


# ---- layout ----------------------------------------------------------------------------------------


def _directions(call: Scan | ScanBackward) -> list[Tensor]:
    return [call.w_hh] if call.w_hh_reverse is None else [call.w_hh, call.w_hh_reverse]


def _columns(x: Any, d: int, D: int) -> Any:
    """Direction d's part of the columns."""
    return None if x is None else x.chunk(D, 1)[d]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
