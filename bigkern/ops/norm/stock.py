"""LayerNorm and RMSNorm by torch's own functions, whose errors get the argument's name before them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.checks import TORCHS, misfit_dtype, named
from bigkern.core.dropout_reference import dropped
from bigkern.ops.norm.reference import OUTPUT


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(y, sum)``."""
    if dropout_p > 0.0:
        x = F.dropout(x, dropout_p) if key is None else dropped(x, key, dropout_p, OUTPUT)
    total = None if residual is None else x + residual
    s = x if total is None else total
    try:
        if kind == "layer":
            return F.layer_norm(s, s.shape[-1:], weight, bias, eps), total
        return F.rms_norm(s, s.shape[-1:], weight, eps), total
    except TORCHS as error:
        raise named(error, misfit_dtype(s, {"weight": weight, "bias": bias})) from error
