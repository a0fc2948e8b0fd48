"""The small conv-pool-linear net, for images of 8 x 8 digits and more."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bigkern.models.cnn.config import CNNConfig, arrange, checked, of_kind
from bigkern.nn import BatchNorm2d


class SmallCNN(nn.Module):
    """A small network: each stage convolves, rectifies and halves; two linear layers end it.

        x = maxpool(relu(conv3x3(x)))                         one stage for each of the config's widths
        logits = linear(drop(relu(linear(flatten(x)))))

    Args:
        config: of kind ``"small"``.

    Shapes: ``images [N, C, S, S]`` with S the config's image_size, to ``[N, num_classes]``.

    Raises:
        ValueError: the config is of another kind, or the images are not of its channels and size.

    Source: LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition
    (1998), with what came later: max pooling, ReLU, dropout, BatchNorm.

    Example:
        >>> import torch
        >>> from bigkern.models.cnn import small_cnn
        >>> small_cnn(num_classes=10, in_channels=1, image_size=8)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = of_kind(config, "small")
        layers: list[nn.Module] = []
        channels, size = config.in_channels, config.image_size
        for width in config.widths:
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not config.batch_norm))
            layers.append(BatchNorm2d(width, activation="relu") if config.batch_norm else nn.ReLU())
            layers.append(nn.MaxPool2d(2))
            channels, size = width, size // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * size * size, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.num_classes),
        )
        arrange(self)

    def forward(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        x = checked(images, self.config, size)
        if x.shape[2:] != (size, size):
            raise ValueError(f"images must be {size} x {size}, not {x.shape[2]} x {x.shape[3]}")
        return cast(Tensor, self.classifier(torch.flatten(self.features(x), 1)))


def small_cnn(num_classes: int = 10, **options: Any) -> SmallCNN:
    """A :class:`SmallCNN`; options as :class:`CNNConfig`'s."""
    return SmallCNN(CNNConfig("small", num_classes, **options))
