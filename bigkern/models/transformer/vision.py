"""The image model: a Transformer over patches.

x = patch(images)                                              [B, (H/p)(W/p), width], one convolution
x = drop(concat(cls, x) + position)                            cls with pooling="class" only
x = norm(block(... block(x)))                                  every patch sees every patch
logits = head(x[:, 0])   or   head(mean(x))                    [B, classes]
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from bigkern.models.transformer.blocks import OURS, Look, Parts
from bigkern.models.transformer.config import TransformerConfig
from bigkern.models.transformer.trunk import Trunk


class ViT(Trunk):
    """A Transformer that sorts images, on bigkern's kernels.

    Args:
        config: the model's shape; the context is as long as its images need, whatever ``context`` says.
        parts: what the blocks are made of.

    Shapes: images ``[B, channels, image_size, image_size]`` to logits ``[B, classes]``.

    Raises:
        TypeError, ValueError: images do not fit; or positions are neither learned nor sinusoidal.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021); mean pooling: Beyer et al., Better
    Plain ViT Baselines for ImageNet-1k (2022).

    Example:
        >>> import torch
        >>> from bigkern.models import TransformerConfig, ViT
        >>> model = ViT(TransformerConfig.vit_b16(layers=1, heads=2, width=32, image_size=32, classes=10))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: TransformerConfig, parts: Parts = OURS):
        if config.positions not in ("learned", "sinusoidal"):
            raise ValueError(f"positions must be learned or sinusoidal for images, not {config.positions!r}")
        first = 1 if config.pooling == "class" else 0
        super().__init__(replace(config, context=first + config.patches, segments=0), parts, tokens=False)
        p = config.patch_size
        self.patch = nn.Conv2d(config.channels, config.width, kernel_size=p, stride=p)
        if first:
            self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.head = nn.Linear(config.width, config.classes)
        self.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``images [B, channels, image_size, image_size]``."""
        x = self.features(images)
        return cast(Tensor, self.head(x[:, 0] if self.config.pooling == "class" else x.mean(1)))

    def features(self, images: Tensor) -> Tensor:
        """Hidden states ``[B, patches, width]``, behind the class token's if there is one."""
        self._check(images)
        x = self.patch(images).flatten(2).transpose(1, 2)  # [B, patches, width]
        if self.config.pooling == "class":
            x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1)
        return self.run(self.embed(x), None, Look())

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating point Tensor, not {kind}")
        size, channels = self.config.image_size, self.config.channels
        if images.dim() != 4 or tuple(images.shape[1:]) != (channels, size, size):
            raise ValueError(f"images must be [B, {channels}, {size}, {size}], not {list(images.shape)}")
