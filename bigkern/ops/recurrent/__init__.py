"""A layer of an LSTM, a GRU or an RNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigkern.core.library import is_autocast_on, narrowed
from bigkern.ops.recurrent.backends import RECURRENT
from bigkern.ops.recurrent.call import bind


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
    y, hn, cn = RECURRENT(bind(x, hx, weights, mode, batch_sizes, zoneout))
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
