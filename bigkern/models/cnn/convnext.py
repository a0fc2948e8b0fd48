"""ConvNeXt in four sizes; keys and start of torchvision's, and timm's state dicts under those keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from bigkern.models.cnn.config import CNNConfig, arrange, checked, of_kind
from bigkern.nn import FrozenLinear, LayerNorm
from bigkern.nn.frozen import frozen_feed_forward
from bigkern.ops.layernorm_ffn import layernorm_ffn

EPS = 1e-6


class LayerNorm2d(LayerNorm):
    """LayerNorm of the channels at each pixel of ``x [N, C, H, W]``: without a copy where x is channels last.

    The result always is.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    r"""``x + drop(scale * (W2 gelu(W1 norm(conv7x7(x)) + b1) + b2))``, norm to b2 as one op.

    In training the scale is a factor of W2's rows and of b2 (``diag(scale) W2``, computed at each call), so
    that neither pass nor memory of the branch's size is spent on it. Where that is the greater work, with
    fewer pixels than W2 has columns, or without a gradient, it is part of the addition instead; and in
    float16, which cannot hold the products: an initial 1e-6 times a weight is less than its smallest number.

    Parameters have torchvision's names: ``block.0`` the convolution, ``block.2`` the norm, ``block.3`` and
    ``block.5`` the linear layers, ``layer_scale [C, 1, 1]``. But for the convolution these hold parameters
    only: hooks on them do not run.
    """

    def __init__(self, width: int, layer_scale: float, drop_p: float):
        super().__init__()
        self.block = nn.ModuleDict(
            {
                "0": nn.Conv2d(width, width, 7, padding=3, groups=width),
                "2": LayerNorm(width, eps=EPS),
                "3": nn.Linear(width, 4 * width),
                "5": nn.Linear(4 * width, width),
            }
        )
        self.layer_scale: Tensor | None = nn.Parameter(torch.full((width, 1, 1), layer_scale))
        self.drop_p = drop_p

    def forward(self, x: Tensor) -> Tensor:
        y = self.block["0"](x).permute(0, 2, 3, 1)  # [N, H, W, C]
        y, factor = self._feed_forward(y)
        y = y.permute(0, 3, 1, 2)
        if self.training and self.drop_p > 0.0:
            kept = y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(1.0 - self.drop_p)
            kept.div_(1.0 - self.drop_p)
            factor = kept if factor is None else factor * kept
        return x + y if factor is None else torch.addcmul(x, y, factor)

    def _feed_forward(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The branch behind the convolution, and the factor that it still needs."""
        norm, up, down = (cast(Any, self.block[name]) for name in ("2", "3", "5"))
        affine, options = (norm.weight, norm.bias), {"eps": norm.eps, "residual": False}
        factor, w2, b2 = self.layer_scale, down.weight, down.bias
        if isinstance(down, FrozenLinear):
            return frozen_feed_forward(y, up, down, *affine, activation="gelu", **options), factor
        if factor is not None and _scales_weights(y, w2):
            w2, b2, factor = factor.view(-1, 1) * w2, factor.flatten() * b2, None
        return layernorm_ffn(y, up.weight, up.bias, w2, b2, *affine, **options), factor

    @torch.no_grad()
    def fold(self) -> None:
        """For inference: the scale in the second linear layer, where its dtype can hold it; both packed."""
        up, down = (cast(nn.Linear, self.block[name]) for name in ("3", "5"))
        if self.layer_scale is not None and down.weight.dtype != torch.float16:
            down.weight.mul_(self.layer_scale.view(-1, 1))
            down.bias.mul_(self.layer_scale.flatten())
            self.layer_scale = None
        self.block["3"], self.block["5"] = (FrozenLinear(linear.weight, linear.bias) for linear in (up, down))

    def extra_repr(self) -> str:
        return f"drop_p={self.drop_p:.3g}"


def _scales_weights(y: Tensor, w2: Tensor) -> bool:
    pixels = y.numel() // w2.shape[0]
    return torch.is_grad_enabled() and y.dtype != torch.float16 and pixels >= w2.shape[1]


class ConvNeXt(nn.Module):
    """ConvNeXt: depthwise 7 x 7 convolutions, each with the feed-forward block of a Transformer.

        x = norm(conv4x4(images))                                      a quarter of the resolution
        x = x + drop(scale * ffn(norm(conv7x7(x))))                    each block
        x = conv2x2(norm(x))                                           between stages: half of it
        logits = linear(norm(mean over pixels of x))

    Norm, linear layers, GELU and scale of a block are one op, :func:`bigkern.layernorm_ffn`. Parameters have
    the names, shapes and initialisation of torchvision's; :func:`from_timm` renames those of timm. From the
    first norm on everything is channels last, whatever the images are.

    Args:
        config: of kind ``"convnext"``.

    Shapes: ``images [N, C, H, W]``, H and W at least 32 (for four stages), to ``[N, num_classes]``.

    Raises:
        ValueError: the config is of another kind, or the images do not fit.

    Source: Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, A ConvNet for the 2020s (2022); Huang et al., Deep
    Networks with Stochastic Depth (2016).

    Example:
        >>> import torch
        >>> from bigkern.models.cnn import convnext_tiny
        >>> model = convnext_tiny(num_classes=10, widths=(16, 32), depths=(1, 1))
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = of_kind(config, "convnext")
        widths, depths = config.widths, config.depths
        conv = nn.Conv2d(config.in_channels, widths[0], 4, stride=4)
        layers: list[nn.Module] = [nn.Sequential(conv, LayerNorm2d(widths[0], eps=EPS))]
        most, before = max(sum(depths) - 1, 1), 0
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if i > 0:
                down = nn.Conv2d(widths[i - 1], width, 2, stride=2)
                layers.append(nn.Sequential(LayerNorm2d(widths[i - 1], eps=EPS), down))
            drops = [config.stochastic_depth * (before + j) / most for j in range(depth)]
            layers.append(nn.Sequential(*(Block(width, config.layer_scale, p) for p in drops)))
            before += depth
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            LayerNorm2d(widths[-1], eps=EPS), nn.Flatten(1), nn.Linear(widths[-1], config.num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(cast(Tensor, module.bias))
        arrange(self)

    def forward(self, images: Tensor) -> Tensor:
        x = checked(images, self.config, smallest=4 * 2 ** (len(self.config.widths) - 1))
        return cast(Tensor, self.classifier(self.avgpool(self.features(x))))


_TIMM_PARTS = {
    "conv_dw": "block.0",
    "norm": "block.2",
    "mlp.fc1": "block.3",
    "mlp.fc2": "block.5",
    "gamma": "layer_scale",
}
# timm's names as patterns, and torchvision's. An odd feature is a stage, an even one what stands before it.
_TIMM: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"stem\.([01])\.", lambda m: f"features.0.{m[1]}."),
    (r"stages\.(\d+)\.downsample\.([01])\.", lambda m: f"features.{2 * int(m[1])}.{m[2]}."),
    (
        r"stages\.(\d+)\.blocks\.(\d+)\.(conv_dw|norm|mlp\.fc1|mlp\.fc2|gamma)\b",
        lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.{_TIMM_PARTS[m[3]]}",
    ),
    (r"head\.norm\.", lambda m: "classifier.0."),
    (r"head\.fc\.", lambda m: "classifier.2."),
)


def from_timm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm's ConvNeXt under the names and in the shapes of :class:`ConvNeXt`'s.

    Args:
        state_dict: as ``timm.create_model("convnext_tiny").state_dict()`` gives it.

    Raises:
        ValueError: a name is not one of timm's ConvNeXt's; all such names are listed.

    Source: ``timm/models/convnext.py``, timm 1.0.

    Example:
        >>> import torch
        >>> from bigkern.models.cnn import from_timm
        >>> list(from_timm({"stem.0.bias": torch.ones(4), "stages.1.blocks.0.gamma": torch.ones(8)}))
        ['features.0.0.bias', 'features.3.0.layer_scale']
    """
    renamed, foreign = {}, []
    for name, tensor in state_dict.items():
        for pattern, ours in _TIMM:
            if match := re.match(pattern, name):
                new = ours(match) + name[match.end() :]
                renamed[new] = tensor.view(-1, 1, 1) if new.endswith("layer_scale") else tensor
                break
        else:
            foreign.append(name)
    if foreign:
        raise ValueError(f"state_dict has names that are not timm's ConvNeXt's: {', '.join(foreign)}")
    return renamed


def _convnext(num_classes: int, options: dict[str, Any], **shape: Any) -> ConvNeXt:
    return ConvNeXt(CNNConfig("convnext", num_classes, **{**shape, **options}))


def convnext_tiny(num_classes: int = 1000, **options: Any) -> ConvNeXt:
    """ConvNeXt-T, stochastic depth 0.1; options as :class:`CNNConfig`'s."""
    return _convnext(num_classes, options, stochastic_depth=0.1)


def convnext_small(num_classes: int = 1000, **options: Any) -> ConvNeXt:
    """ConvNeXt-S, stochastic depth 0.4; options as :class:`CNNConfig`'s."""
    return _convnext(num_classes, options, depths=(3, 3, 27, 3), stochastic_depth=0.4)


def convnext_base(num_classes: int = 1000, **options: Any) -> ConvNeXt:
    """ConvNeXt-B, stochastic depth 0.5; options as :class:`CNNConfig`'s."""
    widths = (128, 256, 512, 1024)
    return _convnext(num_classes, options, widths=widths, depths=(3, 3, 27, 3), stochastic_depth=0.5)


def convnext_large(num_classes: int = 1000, **options: Any) -> ConvNeXt:
    """ConvNeXt-L, stochastic depth 0.5; options as :class:`CNNConfig`'s."""
    widths = (192, 384, 768, 1536)
    return _convnext(num_classes, options, widths=widths, depths=(3, 3, 27, 3), stochastic_depth=0.5)
