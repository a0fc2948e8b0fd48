"""A recurrent layer without kernels: torch's own functions, and the reference where they have no word.

On a GPU torch's functions are cuDNN's kernels already, so stock has no other candidate there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigkern.core.registry import Backend
from bigkern.ops.linear import reference as linear_reference
from bigkern.ops.recurrent import reference
from bigkern.ops.recurrent.call import Recurrent, layout_of
from bigkern.ops.recurrent.layer import composed, composed_backward

REFERENCE = Backend(
    "reference",
    composed(reference.scan, linear_reference.linear),
    composed_backward(reference.scan_backward, linear_reference.linear_backward),
)

FUNCTIONS: dict[str, Any] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}


def recurrent(call: Recurrent) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, hn, cn)`` differentiable by torch's own autograd; zoneout is the reference's."""
    if call.zoneout is not None:
        y, hn, cn, _, _ = REFERENCE.forward(replace(call, save=False))
        return y, hn, cn
    layout = layout_of(call.weights)
    hx = call.h0 if call.c0 is None else (call.h0, call.c0)
    layers, dropout = 1, 0.0
    options = call.weights, layout.biases, layers, dropout, call.save, layout.directions == 2
    if call.batch_sizes is None:
        y, hn, *cn = FUNCTIONS[call.mode](call.x, hx, *options, False)
    else:
        y, hn, *cn = FUNCTIONS[call.mode](call.x, call.batch_sizes, hx, *options)
    return y, hn, cn[0] if cn else None
