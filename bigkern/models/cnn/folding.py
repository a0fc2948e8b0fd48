"""``fold``: a network for inference, without its BatchNorms."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bigkern.models.cnn.convnext import Block
from bigkern.nn import BatchNorm2d
from bigkern.nn.transformer import hooked


class AddReLU(nn.Module):
    """What is left of a folded BatchNorm: ``relu(x + residual)``, or ``relu(x)``, in x's place."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return torch.relu_(x if residual is None else x.add_(residual))


def fold(model: nn.Module) -> nn.Module:
    r"""A copy of a network for inference: each BatchNorm multiplied into the convolution before it.

    ``bn(W * x + b) = W' * x + b'`` with ``W' = g W``, ``b' = g (b - mean) + bias``,
    ``g = weight / sqrt(var + eps)``

    The addition and the ReLU behind the norm then run in place on what the convolution has written. In a
    ConvNeXt the layer scale is multiplied into the linear layer before it. The model stays as it was; the
    copy has fewer parameters, and its state dict is its own.

    Folded are a BatchNorm2d that follows a Conv2d in an ``nn.Sequential``, and the pairs that a module
    names in ``conv_bn``, as those of :mod:`bigkern.models.cnn` do. Left alone are norms without running
    statistics, parts with hooks, and parts that the network uses in several places.

    Args:
        model: in evaluation mode.

    Returns:
        A network that computes the same, but for rounding.

    Raises:
        TypeError: model is not a module.
        RuntimeError: the model, or a BatchNorm in it, is in training mode: its statistics are the batch's.

    Source: Jacob et al., Quantization and Training of Neural Networks (2017), section 3.2;
    :func:`torch.nn.utils.fusion.fuse_conv_bn_eval`.

    Example:
        >>> import torch
        >>> from bigkern.models.cnn import fold, resnet18
        >>> model = resnet18(num_classes=10, widths=(8, 16, 16, 32)).eval()
        >>> sum(isinstance(m, torch.nn.BatchNorm2d) for m in fold(model).modules())
        0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, nn.BatchNorm2d)):
            raise RuntimeError(f"{name or 'model'} is in training mode: call model.eval() first")
    model = copy.deepcopy(model)
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for parent in list(model.modules()):
        if type(parent) is Block:
            parent.fold()
        for conv_name, bn_name in _pairs(parent):
            conv, bn = getattr(parent, conv_name), getattr(parent, bn_name)
            if uses[id(conv)] == uses[id(bn)] == 1 and _folds(conv, bn):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(parent, bn_name, _what_follows(bn))
    return model


def _pairs(parent: nn.Module) -> list[tuple[str, str]]:
    """Names of children of which the second reads what the first writes, and nothing else does."""
    if type(parent) is nn.Sequential:
        names = list(parent._modules)
        return list(pairwise(names))
    return list(getattr(parent, "conv_bn", ()))


def _folds(conv: Any, bn: Any) -> bool:
    if type(conv) is not nn.Conv2d or type(bn) not in (nn.BatchNorm2d, BatchNorm2d):
        return False
    return bn.running_mean is not None and not hooked(conv, bn)


def _what_follows(bn: nn.Module) -> nn.Module:
    activation = cast(str | None, getattr(bn, "activation", None))
    return nn.Identity() if activation is None else AddReLU()
