"""``fold``: a network for inference, without its BatchNorms."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bigkern.core.library import plain
from bigkern.models.cnn.convnext import Block
from bigkern.nn import BatchNorm2d
from bigkern.nn.transformer import hooked


class FoldedConv2d(nn.Conv2d):
    r"""A convolution for inference, ``relu(conv(x) + residual)``, that stands in the place of its norm.

    On a CPU in float32 convolution, addition and ReLU are one call of oneDNN, which reads the weight in an
    order of its own: it is made for the shape of the images, and anew for another shape or weight. Elsewhere
    the addition and the ReLU run in place on what the convolution has written. The parameters take no
    gradient; images may.

    Args:
        conv: whose weight and bias it uses.
        relu: whether a ReLU follows.

    Shapes: as the convolution's; ``residual`` that of the result, or None.

    Example:
        >>> import torch
        >>> from bigkern.models.cnn.folding import FoldedConv2d
        >>> conv = FoldedConv2d(torch.nn.Conv2d(3, 8, 3, padding=1), relu=True)
        >>> conv(torch.randn(2, 3, 8, 8), residual=torch.randn(2, 8, 8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(self, conv: nn.Conv2d, relu: bool):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            cast(Any, conv.kernel_size),
            cast(Any, conv.stride),
            cast(Any, conv.padding),
            cast(Any, conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        self.weight = nn.Parameter(conv.weight.detach(), requires_grad=False)
        if conv.bias is not None:
            self.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
        self.relu = relu
        # What it was made from, the weight itself, which may lie where another lay, and that in the order.
        self._packed: tuple[Any, weakref.ref[Tensor], Tensor] | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._is_one_call(input, residual):
            return self._one_call(input, residual)
        y = super().forward(input)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if self.relu else y

    def _is_one_call(self, x: Tensor, residual: Tensor | None) -> bool:
        images = (x,) if residual is None else (x, residual)
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.dim() == 4
            and x.numel() > 0
            and plain(*images, self.weight)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in images))
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
        )

    def _one_call(self, x: Tensor, residual: Tensor | None) -> Tensor:
        geometry = list(self.padding), list(self.stride), list(self.dilation), self.groups
        weight = self._packed_weight(x, geometry)
        operands = weight, self.bias, *geometry
        relu: Any = ("relu" if self.relu else "none", [], "")
        if residual is None:
            return cast(Tensor, torch.ops.mkldnn._convolution_pointwise(x, *operands, *relu))
        added: Any = ("add", 1.0, "relu" if self.relu else None, [], "")
        return cast(Tensor, torch.ops.mkldnn._convolution_pointwise.binary(x, residual, *operands, *added))

    def _packed_weight(self, x: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        weight = self.weight
        source = x.shape, weight.data_ptr(), 0 if weight.is_inference() else weight._version
        packed = self._packed
        if packed is None or packed[0] != source or packed[1]() is not weight:
            made = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
            self._packed = packed = source, weakref.ref(weight), made
        return packed[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # copies and pickles make their own

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"


def fold(model: nn.Module) -> nn.Module:
    r"""A copy of a network for inference: each BatchNorm multiplied into the convolution before it.

    ``bn(W * x + b) = W' * x + b'`` with ``W' = g W``, ``b' = g (b - mean) + bias``,
    ``g = weight / sqrt(var + eps)``

    A :class:`FoldedConv2d` stands where the norm stood, and does the addition and the ReLU behind it too;
    nothing stands where the convolution stood. In a ConvNeXt the layer scale is multiplied into the linear
    layer before it, and each block's two are :class:`bigkern.nn.FrozenLinear`. The model stays as it was; the
    state dict of the copy is its own. On a CPU each weight is there twice, once in its kernel's order.

    Folded are a BatchNorm2d or a ReLU that follows a Conv2d in an ``nn.Sequential``, and the pairs that a
    module names in ``conv_bn``, as those of :mod:`bigkern.models.cnn` do. Left alone are norms without
    running statistics, parts with hooks, and parts that the network uses in several places.

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
        if type(parent) is Block and isinstance(parent.block["5"], nn.Linear):
            parent.fold()
        for conv_name, name in _pairs(parent):
            conv, follower = getattr(parent, conv_name), getattr(parent, name)
            if uses[id(conv)] == uses[id(follower)] == 1 and _folds(conv, follower):
                setattr(parent, conv_name, nn.Identity())
                setattr(parent, name, _folded(conv, follower))
    return model


def _pairs(parent: nn.Module) -> list[tuple[str, str]]:
    """Names of children of which the second reads what the first writes, and nothing else does."""
    if type(parent) is nn.Sequential:
        names = list(parent._modules)
        return list(pairwise(names))
    return list(getattr(parent, "conv_bn", ()))


def _folds(conv: Any, follower: Any) -> bool:
    if type(conv) is not nn.Conv2d or hooked(conv, follower):
        return False
    if type(follower) is nn.ReLU:
        return True
    return type(follower) in (nn.BatchNorm2d, BatchNorm2d) and follower.running_mean is not None


def _folded(conv: nn.Conv2d, follower: Any) -> FoldedConv2d:
    if type(follower) is nn.ReLU:
        return FoldedConv2d(conv, relu=True)
    relu = getattr(follower, "activation", None) == "relu"
    return FoldedConv2d(fuse_conv_bn_eval(conv, follower), relu)
