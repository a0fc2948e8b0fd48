"""Where a token stands: sinusoidal and rotary tables, ALiBi's slopes.

sinusoidal   x + PE[p]                            Vaswani et al., Attention Is All You Need (2017)
learned      x + position[p]
rotary       q and k turned by p                  Su et al., RoFormer (2021)
ALiBi        scores - slope[h] * |p_q - p_k|      Press et al., Train Short, Test Long (2022)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigkern.models.transformer.config import RopeScaling, TransformerConfig


def tables(config: TransformerConfig) -> dict[str, Tensor]:
    """The constants of the config's kind of positions by name, all float32; learned ones have none."""
    if config.positions == "sinusoidal":
        return {"sinusoid": sinusoidal_positions(config.context, config.width)}
    if config.positions == "alibi":
        return {"slopes": alibi_slopes(config.heads)}
    if config.positions == "rotary":
        cosine, sine = rotary_positions(
            config.context, config.rotary_dim, config.rope_theta, config.rope_scaling
        )
        return {"cosine": cosine, "sine": sine}
    return {}


def sinusoidal_positions(context: int, width: int) -> Tensor:
    """``PE[p, 2i] = sin(p / 10000^(2i / width))``, ``PE[p, 2i+1] = cos(same)``: [context, width] fp32.

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.5. Computed in float64: in
    float32 the angle of a far position is off by more than the values' own rounding.
    """
    position = torch.arange(context, dtype=torch.float64).unsqueeze(1)
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = position * frequency  # [context, width / 2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


def alibi_slopes(heads: int) -> Tensor:
    """``2^(-8 (h + 1) / heads)`` for a power of two of heads: [heads] fp32.

    For other counts those of the power of two below, then every second one of the power of two above.

    Source: Press et al., Train Short, Test Long (2022), section 3, and its published code.

    Example:
        >>> alibi_slopes(3).tolist()
        [0.0625, 0.00390625, 0.25]
    """
    below = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / below) for h in range(below)]
    between = [2.0 ** (-8.0 * (h + 1) / (2 * below)) for h in range(0, 2 * below, 2)]
    return torch.tensor(slopes + between[: heads - below])


def rotary_positions(
    context: int, width: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``p * theta^(-2i / width)``: two [context, width / 2] fp32, computed in float64.

    Source: Su et al., RoFormer (2021), section 3.2.2; with ``scaling`` Llama 3.1's published code.
    """
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling is not None:
        turns = scaling.trained_context * frequency / (2 * math.pi)  # within the trained context
        kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0.0, 1.0)
        frequency = frequency * (kept + (1.0 - kept) / scaling.factor)
    angle = torch.arange(context, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The first dimensions of every head turned by their place, in fp32; dimension i with ``i + R / 2``.

    Args:
        x: ``[B, H, S, D]``.
        cosine, sine: ``[S, R / 2]`` or ``[B, 1, S, R / 2]``; dimensions from R on stay.
    """
    half = cosine.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
