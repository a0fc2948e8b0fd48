"""Inception v3; keys and start of torchvision's."""

from __future__ import annotations

from collections import namedtuple
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.models.cnn.config import CNNConfig, arrange, checked, of_kind
from bigkern.nn import BatchNorm2d

InceptionOutputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])

Kernel = int | tuple[int, int]
Conv = tuple[int, Kernel]  # width, kernel
Chain = list[Conv | list[Conv]]  # one after the other; a list, only at the end, stands side by side


class ConvNorm(nn.Module):
    """``relu(bn(conv(x)))``; the image keeps its size, or with ``valid`` loses what the kernel overlaps."""

    conv_bn = (("conv", "bn"),)  # what `fold` may fold

    def __init__(self, channels: int, width: int, kernel: Kernel, stride: int = 1, valid: bool = False):
        super().__init__()
        height, across = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid else (height // 2, across // 2)
        self.conv = nn.Conv2d(channels, width, (height, across), stride, padding, bias=False)
        self.bn = BatchNorm2d(width, eps=0.001, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions side by side and a pooled branch, concatenated.

    Args:
        channels: of the input.
        chains: ``branch_1``, ``branch_2``, ... of each branch, just ``branch`` where it is one.
        pooled: width of the 1 x 1 convolution behind the average pool; None halves the image: the pool is
            a maximum and the chains' last convolutions have stride 2.
    """

    def __init__(self, channels: int, chains: dict[str, Chain], pooled: int | None):
        super().__init__()
        self.chains: list[list[list[str]]] = []  # the names of each chain's steps, one or more a step
        for branch, chain in chains.items():
            self.chains.append([])
            leaving = channels
            for i, step in enumerate(chain, start=1):
                number = f"_{i}" if len(chain) > 1 else ""
                forked = isinstance(step, list)
                convs = cast(list[Conv], step) if forked else [cast(Conv, step)]
                names = [f"{branch}{number}{letter if forked else ''}" for letter in "abc"[: len(convs)]]
                halving = pooled is None and i == len(chain)
                for name, (width, kernel) in zip(names, convs, strict=True):
                    conv = ConvNorm(leaving, width, kernel, 2 if halving else 1, valid=halving)
                    self.add_module(name, conv)
                self.chains[-1].append(names)
                leaving = convs[0][0]
        self.branch_pool = None if pooled is None else ConvNorm(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for *steps, last in self.chains:
            y = x
            for (name,) in steps:
                y = getattr(self, name)(y)
            outputs += [getattr(self, name)(y) for name in last]
        if self.branch_pool is None:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1)))
        return torch.cat(outputs, dim=1)


def mixed_5(channels: int, pooled: int) -> Mixed:
    """35 x 35: 3 x 3 twice instead of 5 x 5 in one branch (figure 5 of the paper)."""
    chains: dict[str, Chain] = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return Mixed(channels, chains, pooled)


def mixed_6a(channels: int) -> Mixed:
    """35 x 35 to 17 x 17 (figure 10)."""
    return Mixed(channels, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, None)


def mixed_6(channels: int, inner: int) -> Mixed:
    """17 x 17: 7 x 7 as 1 x 7 and 7 x 1 (figure 6)."""
    across, down = (1, 7), (7, 1)
    chains: dict[str, Chain] = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(inner, 1), (inner, across), (192, down)],
        "branch7x7dbl": [(inner, 1), (inner, down), (inner, across), (inner, down), (192, across)],
    }
    return Mixed(channels, chains, pooled=192)


def mixed_7a(channels: int) -> Mixed:
    """17 x 17 to 8 x 8."""
    chains: dict[str, Chain] = {
        "branch3x3": [(192, 1), (320, 3)],
        "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
    }
    return Mixed(channels, chains, None)


def mixed_7(channels: int) -> Mixed:
    """8 x 8: 1 x 3 and 3 x 1 side by side (figure 7)."""
    fork: list[Conv] = [(384, (1, 3)), (384, (3, 1))]
    chains: dict[str, Chain] = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), fork],
        "branch3x3dbl": [(448, 1), (384, 3), fork],
    }
    return Mixed(channels, chains, pooled=192)


class InceptionAux(nn.Module):
    """The second classifier, behind the 17 x 17 stage."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.conv0 = ConvNorm(channels, 128, 1)
        self.conv1 = ConvNorm(128, 768, 5, valid=True)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv0(F.avg_pool2d(x, 5, stride=3)))  # [N, 768, 1, 1] of 17 x 17
        return cast(Tensor, self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


class InceptionV3(nn.Module):
    """Inception v3: branches of factored convolutions, concatenated.

    Parameters have the names, shapes and initialisation of torchvision's ``Inception3``. BatchNorm and the
    ReLU behind it are one op.

    Args:
        config: of kind ``"inception"``.

    Shapes: ``images [N, C, H, W]`` to ``[N, num_classes]``; H and W at least 75, and 299 while training with
    the second classifier. Then the result is ``InceptionOutputs(logits, aux_logits)``, as torchvision's.

    Raises:
        ValueError: the config is of another kind, or the images do not fit.

    Source: Szegedy, Vanhoucke, Ioffe, Shlens and Wojna, Rethinking the Inception Architecture (2015).

    Example:
        >>> import torch
        >>> from bigkern.models.cnn import inception_v3
        >>> with torch.device("meta"):
        ...     model = inception_v3()
        >>> model.eval()(torch.empty(2, 3, 299, 299, device="meta")).shape
        torch.Size([2, 1000])
    """

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = of_kind(config, "inception")
        self.Conv2d_1a_3x3 = ConvNorm(config.in_channels, 32, 3, stride=2, valid=True)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, valid=True)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = mixed_5(192, pooled=32)
        self.Mixed_5c = mixed_5(256, pooled=64)
        self.Mixed_5d = mixed_5(288, pooled=64)
        self.Mixed_6a = mixed_6a(288)
        self.Mixed_6b = mixed_6(768, inner=128)
        self.Mixed_6c = mixed_6(768, inner=160)
        self.Mixed_6d = mixed_6(768, inner=160)
        self.Mixed_6e = mixed_6(768, inner=192)
        self.AuxLogits = InceptionAux(768, config.num_classes) if config.aux_logits else None
        self.Mixed_7a = mixed_7a(768)
        self.Mixed_7b = mixed_7(1280)
        self.Mixed_7c = mixed_7(2048)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(2048, config.num_classes)
        self._initialise()
        arrange(self)

    def _initialise(self) -> None:
        aux_fc = None if self.AuxLogits is None else self.AuxLogits.fc
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.001 if module is aux_fc else 0.1)

    def forward(self, images: Tensor) -> Tensor | InceptionOutputs:
        aux = self.AuxLogits if self.training else None
        x = checked(images, self.config, smallest=75 if aux is None else 299)
        if self.config.transform_input:
            x = _as_inception_expects(x)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # 147 x 147 of 299 x 299
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))  # 71 x 71
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))  # 35 x 35
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # 17 x 17
        aux_logits = None if aux is None else aux(x)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # 8 x 8
        logits = self.fc(torch.flatten(self.dropout(self.avgpool(x)), 1))
        return logits if aux is None else InceptionOutputs(logits, aux_logits)


def _as_inception_expects(images: Tensor) -> Tensor:
    """From ImageNet's mean and deviation of each channel to those of images in [-1, 1]."""
    mean = images.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = images.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return images * (deviation / 0.5) + (mean - 0.5) / 0.5


def inception_v3(num_classes: int = 1000, **options: Any) -> InceptionV3:
    """Inception v3 with its second classifier; options as :class:`CNNConfig`'s."""
    return InceptionV3(CNNConfig("inception", num_classes, **options))
