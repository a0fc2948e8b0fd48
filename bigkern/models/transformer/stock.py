"""The twin: the same blocks in plain PyTorch, as people write them, to compare with."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.models.transformer.blocks import Parts
from bigkern.models.transformer.config import TransformerConfig
from bigkern.models.transformer.decoder import GPT


def stock_norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=config.eps)
    return nn.LayerNorm(config.width, config.eps, bias=config.bias)


class StockFFN(nn.Module):
    """``x + linear2(act(linear1(norm(x))))``, or with the norm behind the sum."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation, self.pre = config.activation, config.placement == "pre"
        hidden = config.ffn_width
        self.linear1 = nn.Linear(config.width, 2 * hidden if config.gated else hidden, config.bias)
        self.linear2 = nn.Linear(hidden, config.width, config.bias)
        self.norm = stock_norm(config)
        self.drop = nn.Dropout(config.dropout)
        self.hidden_drop = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden_drop(self.act(self.linear1(self.norm(x) if self.pre else x)))
        y = x + self.drop(self.linear2(h))
        return cast(Tensor, y if self.pre else self.norm(y))

    def act(self, h: Tensor) -> Tensor:
        if self.activation in ("swiglu", "geglu"):
            gate, up = h.chunk(2, dim=-1)
            return (F.silu(gate) if self.activation == "swiglu" else F.gelu(gate)) * up
        if self.activation == "gelu_tanh":
            return F.gelu(h, approximate="tanh")
        return cast(Tensor, getattr(F, self.activation)(h))


def stock_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    mask: Tensor | None,
    slopes: Tensor | None,
    dropout_p: float,
) -> Tensor:
    if causal and (mask is not None or slopes is not None):
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask, causal = seen if mask is None else seen & mask, False
    if slopes is not None:
        queries, keys = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
        bias = (-slopes[:, None, None] * (queries[:, None] - keys).abs()).to(q.dtype)  # [H, Sq, Sk]
        mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, enable_gqa=grouped)


def stock_add_norm(norm: nn.Module, x: Tensor, residual: Tensor, dropout_p: float) -> Tensor:
    return cast(Tensor, norm(residual + F.dropout(x, dropout_p)))


STOCK = Parts(nn.Linear, F.linear, stock_norm, StockFFN, stock_attend, stock_add_norm)


class StockGPT(GPT):
    """:class:`GPT` in plain PyTorch, to compare with: same parameters, same names, same start.

    Only a generation's cache is bigkern's; ``generate(..., cache=False)`` is without.

    Args:
        config: as for :class:`GPT`.

    Raises:
        TypeError, ValueError: as :class:`GPT`.

    Example:
        >>> from bigkern.models import GPT, StockGPT, TransformerConfig
        >>> config = TransformerConfig(context=16, layers=1, heads=2, width=32)
        >>> StockGPT(config).load_state_dict(GPT(config).state_dict())
        <All keys matched successfully>
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config, STOCK)
