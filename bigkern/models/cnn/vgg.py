"""VGG with 11, 13, 16 and 19 layers, with and without BatchNorm; keys and start of torchvision's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bigkern.models.cnn.config import CNNConfig, arrange, checked, of_kind
from bigkern.nn import BatchNorm2d


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions, halved after each, and three linear layers.

        x = relu(conv3x3(x))   or   relu(bn(conv3x3(x)))      as often as the stage is deep
        x = maxpool(x)
        logits = linear(drop(relu(linear(drop(relu(linear(flatten(avgpool7x7(x)))))))))

    Parameters have the names, shapes and initialisation of torchvision's. With BatchNorm, the norm and the
    ReLU behind it are one op.

    Args:
        config: of kind ``"vgg"``.

    Shapes: ``images [N, C, H, W]``, H and W at least 32 (2 for each stage), to ``[N, num_classes]``.

    Raises:
        ValueError: the config is of another kind, or the images do not fit.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition
    (2014).

    Example:
        >>> import torch
        >>> from bigkern.models.cnn import vgg11_bn
        >>> model = vgg11_bn(num_classes=10, widths=(8, 8, 16, 16, 16), hidden=32)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = of_kind(config, "vgg")
        layers: list[nn.Module] = []
        channels = config.in_channels
        for width, depth in zip(config.widths, config.depths, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if config.batch_norm:  # the norm rectifies; where torchvision has its ReLU stands nothing
                    layers += [BatchNorm2d(width, activation="relu"), nn.Identity()]
                else:
                    layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, config.hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, module.bias))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)
        arrange(self)

    def forward(self, images: Tensor) -> Tensor:
        x = checked(images, self.config, smallest=2 ** len(self.config.widths))
        return cast(Tensor, self.classifier(torch.flatten(self.avgpool(self.features(x)), 1)))


DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def _vgg(layers: int, num_classes: int, batch_norm: bool, options: dict[str, Any]) -> VGG:
    options = {"depths": DEPTHS[layers], "batch_norm": batch_norm, **options}
    return VGG(CNNConfig("vgg", num_classes, **options))


def vgg11(num_classes: int = 1000, **options: Any) -> VGG:
    """Configuration A of the paper; options as :class:`CNNConfig`'s."""
    return _vgg(11, num_classes, False, options)


def vgg11_bn(num_classes: int = 1000, **options: Any) -> VGG:
    """Configuration A with BatchNorm; options as :class:`CNNConfig`'s."""
    return _vgg(11, num_classes, True, options)


def vgg13(num_classes: int = 1000, **options: Any) -> VGG:
    """Configuration B of the paper; options as :class:`CNNConfig`'s."""
    return _vgg(13, num_classes, False, options)


def vgg13_bn(num_classes: int = 1000, **options: Any) -> VGG:
    """Configuration B with BatchNorm; options as :class:`CNNConfig`'s."""
    return _vgg(13, num_classes, True, options)


def vgg16(num_classes: int = 1000, **options: Any) -> VGG:
    """Configuration D of the paper; options as :class:`CNNConfig`'s."""
    return _vgg(16, num_classes, False, options)


def vgg16_bn(num_classes: int = 1000, **options: Any) -> VGG:
    """Configuration D with BatchNorm; options as :class:`CNNConfig`'s."""
    return _vgg(16, num_classes, True, options)


def vgg19(num_classes: int = 1000, **options: Any) -> VGG:
    """Configuration E of the paper; options as :class:`CNNConfig`'s."""
    return _vgg(19, num_classes, False, options)


def vgg19_bn(num_classes: int = 1000, **options: Any) -> VGG:
    """Configuration E with BatchNorm; options as :class:`CNNConfig`'s."""
    return _vgg(19, num_classes, True, options)
