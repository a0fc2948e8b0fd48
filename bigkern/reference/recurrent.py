"""One recurrent layer's scan over time in plain torch: what every kernel must compute.

    LSTM  i f o = sigmoid(.), g = tanh(.);  c = f c' + i g;  h = o tanh(c)
    GRU   r z = sigmoid(.);  n = tanh(x_n + r (W_hn h' + b_hn));  h = (1 - z) n + z h'
    RNN   h = tanh(.) or relu(.)
    zoneout, after any of them: h = h~ + m (h' - h~)

``.`` is the projected input, ``gates``, plus W_hh h'; h' and c' are of the step before. Gates stand in
torch's order: i f g o, r z n. N = rows of all steps, D = directions, B = batch, H = hidden size, G = gates.

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

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

Norm = Callable[[Tensor], Tensor]


def scan(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    w_hh_reverse: Tensor | None,
    bias_n: Tensor | None,
    batch_sizes: Tensor | None,
    zoneout: Tensor | None,
    mode: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(y [N, D*H], hn [D, B, H], cn [D, B, H], reserve [N, D*H])`` of projected ``gates`` ``[N, D*G*H]``.

    With ``save`` the gates are activated in place, and reserve is kept: an LSTM's cells, a GRU's
    W_hn h' + b_hn. ``bias_n`` ``[D, H]`` is that b_hn. Without ``save`` it is differentiable by torch's
    autograd.
    """
    results = []
    for d, weight in enumerate(_directions(w_hh, w_hh_reverse)):
        own = _columns(gates, d, len(h0))
        bias = None if bias_n is None else bias_n[d]
        product = _product(weight, gates.dtype)
        y, hn, cn, active, kept = _walk(
            own.to(_wide(gates)), h0[d], None if c0 is None else c0[d], product, bias, None,
            batch_sizes, None if zoneout is None else _columns(zoneout, d, len(h0)), mode, d == 1,
        )  # fmt: skip
        if save:
            own.copy_(active)
        results.append((y.to(gates.dtype), hn.to(gates.dtype), cn, kept))
    ys, hns, cns, reserve = zip(*results, strict=True)
    return (
        torch.cat(ys, 1),
        torch.stack(hns),
        None if c0 is None else torch.stack(cns).to(c0.dtype),
        torch.cat(reserve, 1) if save and not mode.startswith("RNN") else None,
    )


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
    results = []
    for d, weight in enumerate(w_hh):
        gamma, beta = norm_weight[d], None if norm_bias is None else norm_bias[d]
        product = _normalised_product(_product(weight, gates.dtype), gamma, beta, mode, eps)
        of_cell = None
        if cell_weight is not None:
            of_cell = _norm(cell_weight[d], None if cell_bias is None else cell_bias[d], eps)
        y, hn, cn, _, _ = _walk(
            _columns(gates, d, len(h0)).to(_wide(gates)), h0[d], None if c0 is None else c0[d], product, None,
            of_cell, batch_sizes, None if zoneout is None else _columns(zoneout, d, len(h0)), mode, d == 1,
        )  # fmt: skip
        results.append((y.to(gates.dtype), hn.to(gates.dtype), cn))
    ys, hns, cns = zip(*results, strict=True)
    return torch.cat(ys, 1), torch.stack(hns), None if c0 is None else torch.stack(cns).to(c0.dtype)


# ---- one direction ---------------------------------------------------------------------------------


def _walk(
    gates: Tensor,
    h: Tensor,
    c: Tensor | None,
    product: Norm,
    bias_n: Tensor | None,
    of_cell: Norm | None,
    batch_sizes: Tensor | None,
    zoneout: Tensor | None,
    mode: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Any, Tensor, Any]:
    """``(y, hn, cn, activated gates, reserve)``, all wide, of wide gates ``[N, G*H]``."""
    h, c = h.to(gates.dtype), None if c is None else c.to(gates.dtype)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, b in _steps(batch_sizes, len(gates), len(h), reverse):
        rows, before = slice(start, start + b), h[:b]
        x, hidden = gates[rows], product(before)
        if mode == "LSTM":
            assert c is not None
            i, f, g, o = (x + hidden).chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            cell = f * c[:b] + i * g
            new = o * (cell if of_cell is None else of_cell(cell)).tanh()
            active, kept = torch.cat((i, f, g, o), 1), cell
            c = torch.cat((cell, c[b:]))
        elif mode == "GRU":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), hidden.chunk(3, 1)
            kept = h_n if bias_n is None else h_n + bias_n
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            n = (x_n + r * kept).tanh()
            new = (1 - z) * n + z * before
            active = torch.cat((r, z, n), 1)
        else:
            new = (x + hidden).tanh() if mode == "RNN_TANH" else (x + hidden).relu()
            active = kept = new
        if zoneout is not None:
            new = new + zoneout[rows] * (before - new)
        found.append((new, active, kept))
        h = torch.cat((new, h[b:]))
    if reverse:
        found.reverse()
    if not found:  # no rows at all
        return h, h, c, gates, h
    y, active, kept = (torch.cat(part) for part in zip(*found, strict=True))
    return y, h, c, active, kept


def _steps(batch_sizes: Tensor | None, N: int, B: int, reverse: bool) -> Iterator[tuple[int, int]]:
    """First row and number of rows of every step, in the order of the walk."""
    sizes = [B] * (N // B if B else 0) if batch_sizes is None else batch_sizes.tolist()
    starts = [0]
    for b in sizes:
        starts.append(starts[-1] + b)
    pairs = list(zip(starts, sizes, strict=False))
    return iter(reversed(pairs) if reverse else pairs)


def _product(weight: Tensor, dtype: torch.dtype) -> Norm:
    """W_hh h' of a rounded h', added up wide."""
    wide = weight.to(torch.promote_types(dtype, torch.float32))
    return lambda h: F.linear(h.to(dtype).to(wide.dtype), wide)


def _normalised_product(product: Norm, gamma: Tensor, beta: Tensor | None, mode: str, eps: float) -> Norm:
    """LayerNorm of the product: of all gates at once, but of a GRU's n apart from its r and z."""
    rows = len(gamma)
    parts = (slice(rows),) if mode != "GRU" else (slice(rows // 3 * 2), slice(rows // 3 * 2, rows))
    norms = [_norm(gamma[part], None if beta is None else beta[part], eps) for part in parts]

    def normalised(h: Tensor) -> Tensor:
        gates = product(h)
        return torch.cat([norm(gates[:, part]) for norm, part in zip(norms, parts, strict=True)], 1)

    return normalised


def _norm(gamma: Tensor, beta: Tensor | None, eps: float) -> Norm:
    def normalised(x: Tensor) -> Tensor:
        bias = None if beta is None else beta.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], gamma.to(x.dtype), bias, eps)

    return normalised


# ---- backward --------------------------------------------------------------------------------------


def scan_backward(
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    w_hh_reverse: Tensor | None,
    batch_sizes: Tensor | None,
    zoneout: Tensor | None,
    y: Tensor,
    reserve: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients ``(dgates [N, D*G*H], dhidden_n [N, D*H], dh0, dc0)`` from activated gates; None counts as 0.

    dgates is of what the activations are applied to, and so of the projected input; dhidden_n of a GRU's
    W_hn h' + b_hn, where n's gradient meets r first. W_hh's gradient is a product of these with
    :func:`previous_states`.
    """
    wide, D = _wide(gates), len(h0)
    dgates, dh0 = torch.empty_like(gates), torch.empty_like(h0)
    dhidden_n = torch.empty_like(y) if mode == "GRU" else None
    dc0 = None if c0 is None else torch.empty_like(c0)
    for d, weight in enumerate(_directions(w_hh, w_hh_reverse)):
        mine = [None if t is None else _columns(t, d, D).to(wide) for t in (dy, zoneout, gates, y, reserve)]
        dy_, m, active, y_, kept = mine
        assert active is not None
        assert y_ is not None
        before = previous_states(y_, h0[d].to(wide), batch_sizes, d == 1)
        c_before = None
        if c0 is not None and kept is not None:
            c_before = previous_states(kept, c0[d].to(wide), batch_sizes, d == 1)
        dh, dc = (torch.zeros_like(h0[d], dtype=wide) if t is None else t[d].to(wide) for t in (dhn, dcn))
        weight = weight.to(wide)
        for start, b in _steps(batch_sizes, len(gates), h0.shape[1], d == 0):
            rows = slice(start, start + b)
            dnew = dh[:b] if dy_ is None else dh[:b] + dy_[rows]
            through = None
            if m is not None:
                through = m[rows] * dnew
                dnew = dnew - through
            state = before if c_before is None else c_before
            dx, dn, direct, dc_before = _step_backward(
                mode, dnew, dc[:b], active[rows], state[rows], None if kept is None else kept[rows]
            )
            dx = dx.to(gates.dtype)
            _columns(dgates, d, D)[rows] = dx
            if dhidden_n is not None:
                dn = dn.to(gates.dtype)
                _columns(dhidden_n, d, D)[rows] = dn
                dx = torch.cat((dx[:, : -dn.shape[1]], dn), 1)
            dbefore = dx.to(wide) @ weight
            for part in (direct, through):
                dbefore = dbefore if part is None else dbefore + part
            dh, dc = torch.cat((dbefore, dh[b:])), dc if dc_before is None else torch.cat((dc_before, dc[b:]))
        dh0[d] = dh
        if dc0 is not None:
            dc0[d] = dc
    return dgates, dhidden_n, dh0, dc0


def _step_backward(
    mode: str, dh: Tensor, dc: Tensor, active: Tensor, before: Tensor, kept: Tensor | None
) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
    """Gradients of the gates before activation, of a GRU's W_hn h' + b_hn, of h' past the product, of c'.

    ``before`` is an LSTM's c' or a GRU's h', ``kept`` a step of reserve.
    """
    if mode == "LSTM":
        assert kept is not None
        i, f, g, o = active.chunk(4, 1)
        t = kept.tanh()
        dc = dc + dh * o * (1 - t * t)
        di, df, dg, do = dc * g, dc * before, dc * i, dh * t
        parts = di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)
        return torch.cat(parts, 1), None, None, dc * f
    if mode == "GRU":
        assert kept is not None
        r, z, n = active.chunk(3, 1)
        dn = dh * (1 - z) * (1 - n * n)
        dz, dr = dh * (before - n), dn * kept
        return torch.cat((dr * r * (1 - r), dz * z * (1 - z), dn), 1), dn * r, dh * z, None
    return dh * (1 - active * active) if mode == "RNN_TANH" else dh * (active > 0), None, None, None


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


def _directions(w_hh: Tensor, w_hh_reverse: Tensor | None) -> list[Tensor]:
    return [w_hh] if w_hh_reverse is None else [w_hh, w_hh_reverse]


def _columns(x: Tensor, d: int, D: int) -> Tensor:
    """Direction d's part of the columns."""
    width = x.shape[1] // D
    return x[:, d * width : (d + 1) * width]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
