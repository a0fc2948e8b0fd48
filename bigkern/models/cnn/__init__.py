"""Convolutional networks: a small one, VGG, ResNet, Inception v3 and ConvNeXt.

Convolution is oneDNN's and cuDNN's; ours is what stands between: ConvNeXt's LayerNorm, linear layers, GELU
and scale as one op, BatchNorm with the addition and ReLU behind it as one op, and :func:`fold`, which leaves
nothing of BatchNorm for inference. State dicts are torchvision's. Initial weights are torchvision's too, from
torch's generator: after the same ``torch.manual_seed`` they are the same.
"""

from __future__ import annotations

from torch import nn

from bigkern.models.cnn.config import CNNConfig
from bigkern.models.cnn.convnext import (
    ConvNeXt,
    convnext_base,
    convnext_large,
    convnext_small,
    convnext_tiny,
    from_timm,
)
from bigkern.models.cnn.folding import fold
from bigkern.models.cnn.inception import InceptionOutputs, InceptionV3, inception_v3
from bigkern.models.cnn.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    wide_resnet50_2,
)
from bigkern.models.cnn.small import SmallCNN, small_cnn
from bigkern.models.cnn.vgg import (
    VGG,
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)

_CLASSES: dict[str, type[nn.Module]] = {
    "small": SmallCNN,
    "vgg": VGG,
    "resnet": ResNet,
    "inception": InceptionV3,
    "convnext": ConvNeXt,
}


def build(config: CNNConfig) -> nn.Module:
    """The network of a config.

    Args:
        config: of any kind.

    Raises:
        TypeError: config is not a :class:`CNNConfig`.

    Example:
        >>> from bigkern.models.cnn import CNNConfig, build
        >>> type(build(CNNConfig("convnext", widths=(8, 16), depths=(1, 1)))).__name__
        'ConvNeXt'
    """
    if not isinstance(config, CNNConfig):
        raise TypeError(f"config must be a CNNConfig, not {type(config).__name__}")
    return _CLASSES[config.kind](config)


__all__ = [
    "VGG",
    "CNNConfig",
    "ConvNeXt",
    "InceptionOutputs",
    "InceptionV3",
    "ResNet",
    "SmallCNN",
    "build",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "fold",
    "from_timm",
    "inception_v3",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "small_cnn",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "wide_resnet50_2",
]
