"""The linear layer by torch's own function, whose errors get the argument's name before them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.checks import TORCHS, named
from bigkern.ops.linear.call import Linear, misfit


def linear(call: Linear) -> Tensor:
    try:
        return F.linear(call.x, call.weight, call.bias)
    except TORCHS as error:
        raise named(error, misfit(call)) from error
