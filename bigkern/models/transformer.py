"""A decoder-only Transformer from bigkern's layers, and its twin in plain PyTorch.

    x = token[t] + position                                        [B, S, W]
    x = x + proj(attention(qkv(norm(x))))      causal              one block, pre-norm:
    x = x + W2 act(W1 norm(x) + b1) + b2                           two residual branches
    logits = norm(x) token^T                                       [B, S, vocabulary], tied embedding

:class:`GPT` and :class:`StockGPT` have the same parameters under the same names, start from the same
weights for the same seed, and compute the same function: a state dict of one loads into the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.nn import LayerNorm, LayerNormFFN, RMSNorm
from bigkern.ops.attention import attention

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"]
GATED = ("swiglu", "geglu")


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The shape of a GPT. ``hidden`` is the FFN's inner width, by default four times ``width``."""

    vocab_size: int = 256
    context: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 256
    hidden: int | None = None
    positions: Literal["learned", "sinusoidal"] = "learned"
    activation: Activation = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    bias: bool = True
    dropout: float = 0.0  # of the embedding and of both branches; attention weights are not dropped
    seed: int = 0  # of the initial weights

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"width must be even for sinusoidal positions, not {self.width}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def ffn_width(self) -> int:
        return self.hidden or 4 * self.width


def sinusoidal_positions(context: int, width: int) -> Tensor:
    """``PE[p, 2i] = sin(p / 10000^(2i / width))``, ``PE[p, 2i+1] = cos(same)``: [context, width] fp32.

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.5. Computed in float64: in
    float32 the angle of a far position is off by more than the values' own rounding.
    """
    position = torch.arange(context, dtype=torch.float64).unsqueeze(1)
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = position * frequency  # [context, width / 2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


class _Decoder(nn.Module):
    """What the twins share: embedding, positions, output, initial weights, sampling. Not the blocks."""

    blocks: nn.ModuleList
    norm: nn.Module
    sinusoid: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position = nn.Embedding(config.context, config.width)
            self.scale = 1.0
        else:
            table = sinusoidal_positions(config.context, config.width)
            self.register_buffer("sinusoid", table, persistent=False)
            self.scale = math.sqrt(config.width)  # as the paper: the table's entries are near 1
        self.drop = nn.Dropout(config.dropout)

    @torch.no_grad()
    def _initialise(self) -> None:
        """GPT-2's: normal(0, 0.02), the branches' last matrices smaller by sqrt(2 * layers); biases 0.

        Drawn in the order of the state dict from a generator of its own, so that twins start alike.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            last = name.endswith(("proj.weight", "linear2.weight"))
            std = 0.02 / math.sqrt(2 * self.config.layers) if last else 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, S, vocabulary]`` of the token after each of ``tokens [B, S]`` int64, S <= context."""
        length, longest = tokens.shape[1], self.config.context
        if length > longest:
            raise ValueError(f"tokens must be at most {longest} long, not {length}")
        table = self.position.weight if self.config.positions == "learned" else self.sinusoid
        x = self.drop(self.token(tokens) * self.scale + table[:length].to(self.token.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """``tokens [B, S]`` int64 continued by ``count`` sampled tokens: ``[B, S + count]``.

        Args:
            temperature: divides the logits; 0 takes the most likely token each time.
            top_k: draw from the k most likely tokens only.
            seed: makes the draw reproducible on the same device; None draws from torch's generator.
        """
        if temperature < 0 or not math.isfinite(temperature):
            raise ValueError(f"temperature must be finite and not negative, not {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        training = self.training
        self.eval()
        for _ in range(count):
            logits = self(tokens[:, -self.config.context :])[:, -1].float()
            tokens = torch.cat((tokens, _draw(logits, temperature, top_k, generator)), dim=1)
        self.train(training)
        return tokens


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """[B, vocabulary] -> [B, 1] token."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)


# ---- bigkern ---------------------------------------------------------------------------------------


def _norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rms":
        return cast(nn.Module, RMSNorm(config.width, eps=1e-5))
    return cast(nn.Module, LayerNorm(config.width, bias=config.bias))


class Block(nn.Module):
    """Attention and FFN, each a residual branch, from bigkern's ops."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.norm = _norm(config)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.ffn = LayerNormFFN(
            config.width,
            config.ffn_width,
            activation=config.activation,
            norm=config.norm,
            bias=config.bias,
            dropout=config.dropout,
        )

    def forward(self, x: Tensor) -> Tensor:
        B, S, W = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = cast(Tensor, attention(q, k, v, causal=True))  # [B, H, S, D], stored as [B, S, H, D]
        x = x + self.drop(self.proj(o.transpose(1, 2).reshape(B, S, W)))
        return cast(Tensor, self.ffn(x))


class GPT(_Decoder):
    """A decoder-only Transformer on bigkern's kernels.

    Args:
        config: the model's shape; ``config.seed`` fixes the initial weights.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019).

    Example:
        >>> import torch
        >>> from bigkern.models import GPT, GPTConfig
        >>> model = GPT(GPTConfig(context=16, layers=1, heads=2, width=32))
        >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _norm(config)
        self._initialise()


# ---- the same in plain PyTorch ---------------------------------------------------------------------


def _stock_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=1e-5)
    return nn.LayerNorm(config.width, bias=config.bias)


class StockFFN(nn.Module):
    """``x + linear2(act(linear1(norm(x))))``."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        hidden = config.ffn_width
        self.linear1 = nn.Linear(
            config.width, 2 * hidden if config.activation in GATED else hidden, config.bias
        )
        self.linear2 = nn.Linear(hidden, config.width, config.bias)
        self.norm = _stock_norm(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.drop(self.linear2(self.act(self.linear1(self.norm(x))))))

    def act(self, h: Tensor) -> Tensor:
        if self.activation in GATED:
            gate, up = h.chunk(2, dim=-1)
            return (F.silu(gate) if self.activation == "swiglu" else F.gelu(gate)) * up
        if self.activation == "gelu_tanh":
            return F.gelu(h, approximate="tanh")
        return cast(Tensor, getattr(F, self.activation)(h))


class StockBlock(nn.Module):
    """:class:`Block` as people write it with stock PyTorch."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.norm = _stock_norm(config)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.ffn = StockFFN(config)

    def forward(self, x: Tensor) -> Tensor:
        B, S, W = x.shape
        q, k, v = self.qkv(self.norm(x)).split(W, dim=2)
        q, k, v = (t.view(B, S, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.proj(o.transpose(1, 2).contiguous().view(B, S, W)))
        return cast(Tensor, self.ffn(x))


class StockGPT(_Decoder):
    """:class:`GPT` in plain PyTorch, to compare with: same parameters, same names, same start.

    Args:
        config: as for :class:`GPT`.

    Example:
        >>> from bigkern.models import GPT, GPTConfig, StockGPT
        >>> config = GPTConfig(context=16, layers=1, heads=2, width=32)
        >>> StockGPT(config).load_state_dict(GPT(config).state_dict())
        <All keys matched successfully>
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(StockBlock(config) for _ in range(config.layers))
        self.norm = _stock_norm(config)
        self._initialise()
