"""``CNNConfig``: the shape of a convolutional network, of whichever family; and the check of its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

Kind = Literal["small", "vgg", "resnet", "inception", "convnext"]

# The fields that each kind has besides those of all kinds, with their usual values.
USUAL: dict[str, dict[str, Any]] = {
    "small": {"widths": (32, 64), "hidden": 128, "image_size": 28, "batch_norm": False, "dropout": 0.0},
    "vgg": {
        "widths": (64, 128, 256, 512, 512),
        "depths": (2, 2, 3, 3, 3),
        "hidden": 4096,
        "batch_norm": False,
        "dropout": 0.5,
    },
    "resnet": {
        "widths": (64, 128, 256, 512),
        "depths": (3, 4, 6, 3),
        "block": "bottleneck",
        "groups": 1,
        "width_per_group": 64,
        "zero_init_residual": False,
    },
    "inception": {"aux_logits": True, "transform_input": False, "dropout": 0.5},
    "convnext": {
        "widths": (96, 192, 384, 768),
        "depths": (3, 3, 9, 3),
        "layer_scale": 1e-6,
        "stochastic_depth": 0.0,
    },
}
USUAL_OF_THE_KIND: Any = None


@dataclass(frozen=True, slots=True)
class CNNConfig:
    """The shape of a convolutional network.

    A field that is not given takes the usual value of its kind (those of ``CNNConfig(kind)`` are VGG-16,
    ResNet-50, Inception v3 and ConvNeXt-T); one that the kind does not have stays None.

    Args:
        kind: ``"small"``, ``"vgg"``, ``"resnet"``, ``"inception"`` or ``"convnext"``.
        num_classes: logits of an image.
        in_channels: channels of an image.
        channels_last: keep weights and images channels last; as they come otherwise. The network computes
            the same either way, and ``model.to(memory_format=torch.channels_last)`` does it later. For
            inference on two Zen 4 cores in float32 it makes Inception 1.4 and VGG 1.1 times as fast, ResNet
            no faster; ConvNeXt is channels last inside whatever it is given, and a folded network (see
            ``fold``) runs alike. A GPU's tensor cores read channels last.
        widths: channels of each stage; small, vgg, resnet (before a bottleneck's expansion), convnext.
        depths: convolutions (vgg) or blocks (resnet, convnext) of each stage.
        hidden: width of the hidden layers of the classifier; small, vgg.
        image_size: of the square images; small.
        batch_norm: whether BatchNorm follows each convolution; small, vgg.
        dropout: in the classifier while training, in [0, 1); small, vgg, inception.
        block: ``"basic"`` or ``"bottleneck"``; resnet.
        groups, width_per_group: of the bottleneck's 3 x 3 convolution; resnet.
        zero_init_residual: let each block start as the identity; resnet.
        aux_logits: a second classifier while training; inception.
        transform_input: take images normalised as ImageNet's and normalise them to [-1, 1]; inception.
        layer_scale: initial scale of each block's branch; convnext.
        stochastic_depth: probability, in [0, 1), of dropping the last block's branch in training; that of
            the others grows to it linearly; convnext.

    Raises:
        ValueError: a value is out of its range, or the kind does not have the field.

    Example:
        >>> from bigkern.models.cnn import CNNConfig, build
        >>> model = build(CNNConfig("resnet", depths=(2, 2, 2, 2), block="basic", num_classes=10))
        >>> sum(p.numel() for p in model.parameters())
        11181642
    """

    kind: Kind
    num_classes: int = 1000
    in_channels: int = 3
    channels_last: bool = False
    widths: tuple[int, ...] = USUAL_OF_THE_KIND
    depths: tuple[int, ...] = USUAL_OF_THE_KIND
    hidden: int = USUAL_OF_THE_KIND
    image_size: int = USUAL_OF_THE_KIND
    batch_norm: bool = USUAL_OF_THE_KIND
    dropout: float = USUAL_OF_THE_KIND
    block: Literal["basic", "bottleneck"] = USUAL_OF_THE_KIND
    groups: int = USUAL_OF_THE_KIND
    width_per_group: int = USUAL_OF_THE_KIND
    zero_init_residual: bool = USUAL_OF_THE_KIND
    aux_logits: bool = USUAL_OF_THE_KIND
    transform_input: bool = USUAL_OF_THE_KIND
    layer_scale: float = USUAL_OF_THE_KIND
    stochastic_depth: float = USUAL_OF_THE_KIND

    def __post_init__(self) -> None:
        if self.kind not in USUAL:
            raise ValueError(f"kind must be one of {', '.join(USUAL)}, not {self.kind!r}")
        usual = USUAL[self.kind]
        for name in self.__slots__[4:]:
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual.get(name))
            elif name not in usual:
                raise ValueError(f"{name} means nothing for kind {self.kind!r}: leave it out")
        self._check_sizes()
        self._check_kind()

    def _check_sizes(self) -> None:
        for name in ("num_classes", "in_channels", "hidden", "image_size", "groups", "width_per_group"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in ("widths", "depths"):
            sizes = getattr(self, name)
            if sizes is not None and (not sizes or min(sizes) < 1):
                raise ValueError(f"{name} must be one or more sizes of at least 1, not {sizes}")
        if self.depths is not None and len(self.depths) != len(self.widths):
            raise ValueError(f"depths {self.depths} must be as many as widths {self.widths}")
        for name in ("dropout", "stochastic_depth"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), not {value}")

    def _check_kind(self) -> None:
        if self.kind == "small" and self.image_size < 2 ** len(self.widths):
            raise ValueError(
                f"image_size must be at least {2 ** len(self.widths)} to be halved {len(self.widths)} times,"
                f" not {self.image_size}"
            )
        if self.kind == "resnet":
            if self.block not in ("basic", "bottleneck"):
                raise ValueError(f'block must be "basic" or "bottleneck", not {self.block!r}')
            if self.block == "basic" and (self.groups, self.width_per_group) != (1, 64):
                raise ValueError('groups and width_per_group must be 1 and 64 for block "basic"')
        if self.kind == "inception" and self.transform_input and self.in_channels != 3:
            raise ValueError(f"in_channels must be 3 for transform_input, not {self.in_channels}")


def checked(images: Tensor, config: CNNConfig, smallest: int) -> Tensor:
    """``images [N, C, H, W]`` in the memory format that the config asks for."""
    if images.dim() != 4 or images.shape[1] != config.in_channels:
        raise ValueError(f"images must be [N, {config.in_channels}, H, W], not {tuple(images.shape)}")
    if min(images.shape[2:]) < smallest:
        size = " x ".join(map(str, images.shape[2:]))
        raise ValueError(f"images must be at least {smallest} x {smallest} for this network, not {size}")
    return images.contiguous(memory_format=torch.channels_last) if config.channels_last else images


def of_kind(config: CNNConfig, kind: Kind) -> CNNConfig:
    """The config, which must be of this kind."""
    if config.kind != kind:
        raise ValueError(f"config must be of kind {kind!r}, not {config.kind!r}")
    return config


def arrange(model: nn.Module) -> None:
    """Put a model's weights channels last if its config asks for it."""
    if cast(CNNConfig, model.config).channels_last:
        cast(Any, model).to(memory_format=torch.channels_last)
