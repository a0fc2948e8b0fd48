"""The linear layer by torch's own function, whose errors get the argument's name before them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.checks import TORCHS, named
from bigkern.ops.linear.call import misfit


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    try:
        return F.linear(x, weight, bias)
    except TORCHS as error:
        raise named(error, misfit(x, weight, bias)) from error
