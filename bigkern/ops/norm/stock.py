"""LayerNorm and RMSNorm by torch's own functions, whose errors get the argument's name before them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.checks import TORCHS, misfit_dtype, named
from bigkern.core.dropout import OUTPUT, dropped
from bigkern.ops.norm.call import Norm


def norm(call: Norm) -> tuple[Tensor, Tensor | None]:
    """``(y, sum)``."""
    x, weight, bias, p, key = call.x, call.weight, call.bias, call.dropout_p, call.dropout_key
    if p > 0.0:
        x = F.dropout(x, p) if key is None else dropped(x, key, p, OUTPUT)
    total = None if call.residual is None else x + call.residual
    s = x if total is None else total
    try:
        if call.kind == "layer":
            return F.layer_norm(s, s.shape[-1:], weight, bias, call.eps), total
        return F.rms_norm(s, s.shape[-1:], weight, call.eps), total
    except TORCHS as error:
        raise named(error, misfit_dtype(s, {"weight": weight, "bias": bias})) from error
