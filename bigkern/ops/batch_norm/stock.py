"""BatchNorm, addition and ReLU by torch's own functions, whose errors get the argument's name before them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.checks import TORCHS, misfit_dtype, named
from bigkern.core.library import plain
from bigkern.ops.batch_norm.call import Step


def batch_norm(call: Step) -> tuple[Tensor, None, None]:
    """``(y, None, None)``: running statistics have been moved, and nothing is left to do with x's own.

    Nobody but this function has seen BatchNorm's output, and its backward does not need it: what follows is
    done in place, but under transforms and subclasses.
    """
    x, residual, weight, bias = call.x, call.residual, call.weight, call.bias
    mean, var = call.running_mean, call.running_var
    try:
        y = F.batch_norm(x, mean, var, weight, bias, call.training, call.momentum, call.eps)
    except TORCHS as error:
        channels = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        raise named(error, misfit_dtype(x, channels)) from error
    in_place = plain(x, residual, weight, bias)
    if residual is not None:
        y = y.add_(residual) if in_place and residual.dtype == y.dtype else y + residual
    if call.relu:
        y = y.relu_() if in_place else y.relu()
    return y, None, None
