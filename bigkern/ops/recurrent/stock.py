"""A recurrent layer without kernels: torch's own functions, and the reference where they have no word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.linear import reference as linear_reference
from bigkern.ops.linear.call import LinearBackward
from bigkern.ops.recurrent import reference
from bigkern.ops.recurrent.call import layout_of
from bigkern.ops.recurrent.layer import composed, composed_backward

REFERENCE = composed(reference.scan, F.linear)
REFERENCE_BACKWARD = composed_backward(
    reference.scan_backward, lambda *arguments: linear_reference.linear_backward(LinearBackward(*arguments))
)

FUNCTIONS: dict[str, Any] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}


def stock(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    zoneout: Tensor | None,
    mode: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, hn, cn)``, differentiable by torch's own autograd; zoneout is the reference's."""
    if zoneout is not None:
        y, hn, cn, _, _ = REFERENCE(x, h0, c0, weights, batch_sizes, zoneout, mode, False)
        return y, hn, cn
    layout = layout_of(weights)
    hx = h0 if c0 is None else (h0, c0)
    options = list(weights), layout.biases, 1, 0.0, save, layout.directions == 2  # one layer, no dropout
    if batch_sizes is None:
        y, hn, *cn = FUNCTIONS[mode](x, hx, *options, False)
    else:
        y, hn, *cn = FUNCTIONS[mode](x, batch_sizes, hx, *options)
    return y, hn, cn[0] if cn else None
