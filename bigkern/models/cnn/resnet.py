"""ResNet, ResNeXt and Wide ResNet; keys and start of torchvision's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bigkern.models.cnn.config import CNNConfig, arrange, checked, of_kind
from bigkern.nn import BatchNorm2d


def conv3x3(channels: int, width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``, norm, addition and ReLU as one op."""

    expansion = 1
    conv_bn = (("conv1", "bn1"), ("conv2", "bn2"))  # what `fold` may fold

    def __init__(
        self, channels: int, width: int, stride: int, downsample: nn.Module | None, config: CNNConfig
    ):
        super().__init__()
        self.conv1 = conv3x3(channels, width, stride)
        self.bn1 = BatchNorm2d(width, activation="relu")
        self.conv2 = conv3x3(width, width)
        self.bn2 = BatchNorm2d(width, activation="relu")
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        shortcut = x if self.downsample is None else self.downsample(x)
        return cast(Tensor, self.bn2(self.conv2(y), shortcut))


class Bottleneck(nn.Module):
    """``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))``: 1 x 1, 3 x 3, 1 x 1.

    The stride is the 3 x 3 convolution's, as torchvision and everyone since have it, not the paper's.
    """

    expansion = 4
    conv_bn = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self, channels: int, width: int, stride: int, downsample: nn.Module | None, config: CNNConfig
    ):
        super().__init__()
        inner = int(width * (config.width_per_group / 64)) * config.groups
        self.conv1 = conv1x1(channels, inner)
        self.bn1 = BatchNorm2d(inner, activation="relu")
        self.conv2 = conv3x3(inner, inner, stride, config.groups)
        self.bn2 = BatchNorm2d(inner, activation="relu")
        self.conv3 = conv1x1(inner, 4 * width)
        self.bn3 = BatchNorm2d(4 * width, activation="relu")
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return cast(Tensor, self.bn3(self.conv3(y), shortcut))


class ResNet(nn.Module):
    """Residual blocks in stages ``layer1``, ``layer2``, ..., each after the first at half the resolution.

        x = maxpool(relu(bn(conv7x7(images))))                a quarter of the resolution
        x = relu(branch(x) + x)                               each block
        logits = linear(mean over pixels of x)

    Parameters have the names, shapes and initialisation of torchvision's. BatchNorm with what follows it,
    addition and ReLU, is one op: see :class:`bigkern.nn.BatchNorm2d`.

    Args:
        config: of kind ``"resnet"``.

    Shapes: ``images [N, C, H, W]`` of any size to ``[N, num_classes]``.

    Raises:
        ValueError: the config is of another kind, or the images do not fit.

    Source: He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition (2015); Xie et al.,
    Aggregated Residual Transformations (2016); Zagoruyko and Komodakis, Wide Residual Networks (2016).

    Example:
        >>> import torch
        >>> from bigkern.models.cnn import resnet18
        >>> resnet18(num_classes=10, widths=(8, 16, 16, 32))(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    conv_bn = (("conv1", "bn1"),)

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = of_kind(config, "resnet")
        channels = config.widths[0]
        self.conv1 = nn.Conv2d(config.in_channels, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(channels, activation="relu")
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            stage, channels = _stage(channels, width, depth, 1 if i == 0 else 2, config)
            self.add_module(f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, config.num_classes)
        self._initialise()
        arrange(self)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif self.config.zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                nn.init.zeros_(last.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = checked(images, self.config, smallest=1)
        x = self.maxpool(self.bn1(self.conv1(x)))
        for i in range(len(self.config.depths)):
            x = getattr(self, f"layer{i + 1}")(x)
        return cast(Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))


def _stage(
    channels: int, width: int, depth: int, stride: int, config: CNNConfig
) -> tuple[nn.Sequential, int]:
    """The blocks of a stage and the channels that leave it."""
    block: type[BasicBlock | Bottleneck] = BasicBlock if config.block == "basic" else Bottleneck
    leaving = width * block.expansion
    downsample = None
    if stride != 1 or channels != leaving:
        downsample = nn.Sequential(conv1x1(channels, leaving, stride), BatchNorm2d(leaving))
    blocks = [block(channels, width, stride, downsample, config)]
    blocks += [block(leaving, width, 1, None, config) for _ in range(depth - 1)]
    return nn.Sequential(*blocks), leaving


def _resnet(num_classes: int, options: dict[str, Any], **shape: Any) -> ResNet:
    return ResNet(CNNConfig("resnet", num_classes, **{**shape, **options}))


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """18 layers of basic blocks; options as :class:`CNNConfig`'s."""
    return _resnet(num_classes, options, block="basic", depths=(2, 2, 2, 2))


def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """34 layers of basic blocks; options as :class:`CNNConfig`'s."""
    return _resnet(num_classes, options, block="basic", depths=(3, 4, 6, 3))


def resnet50(num_classes: int = 1000, **options: Any) -> ResNet:
    """50 layers of bottlenecks; options as :class:`CNNConfig`'s."""
    return _resnet(num_classes, options, depths=(3, 4, 6, 3))


def resnet101(num_classes: int = 1000, **options: Any) -> ResNet:
    """101 layers of bottlenecks; options as :class:`CNNConfig`'s."""
    return _resnet(num_classes, options, depths=(3, 4, 23, 3))


def resnet152(num_classes: int = 1000, **options: Any) -> ResNet:
    """152 layers of bottlenecks; options as :class:`CNNConfig`'s."""
    return _resnet(num_classes, options, depths=(3, 8, 36, 3))


def resnext50_32x4d(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-50 with 32 groups of 4 channels; options as :class:`CNNConfig`'s."""
    return _resnet(num_classes, options, depths=(3, 4, 6, 3), groups=32, width_per_group=4)


def wide_resnet50_2(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-50 with twice the channels inside its bottlenecks; options as :class:`CNNConfig`'s."""
    return _resnet(num_classes, options, depths=(3, 4, 6, 3), width_per_group=128)
