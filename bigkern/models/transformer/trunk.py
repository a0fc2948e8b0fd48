"""``Trunk``: embedding, blocks and last norm, which every family is built on; and initial weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigkern.models.transformer.blocks import OURS, Block, Look, Parts
from bigkern.models.transformer.cache import Cache
from bigkern.models.transformer.config import TransformerConfig
from bigkern.models.transformer.positions import tables


class Trunk(nn.Module):
    """Embedding, blocks, last norm.

        x = drop(norm?(token[t] * scale + position + segment?))      [B, S, W]
        x = norm?(block(... block(x)))                               the last norm with pre-norm only

    ``scale`` is ``sqrt(W)`` for sinusoidal positions (as the paper: the table's entries are near 1), else 1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parts: Parts = OURS,
        *,
        tokens: bool = True,
        cross: bool = False,
        layers: int | None = None,
    ):
        super().__init__()
        self.config = config
        if tokens:
            self.token = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position = nn.Embedding(config.context, config.width)
        if config.segments:
            self.segment = nn.Embedding(config.segments, config.width)
        self.embedding_norm = parts.norm(config) if config.embedding_norm else nn.Identity()
        self.drop = nn.Dropout(config.dropout)
        self.scale = math.sqrt(config.width) if config.positions == "sinusoidal" else 1.0
        for name, table in tables(config).items():
            self.register_buffer(name, table, persistent=False)
        count = config.layers if layers is None else layers
        self.blocks = nn.ModuleList(Block(config, parts, layer, cross) for layer in range(count))
        self.norm = parts.norm(config) if config.placement == "pre" else nn.Identity()

    def embed(
        self, x: Tensor, places: Tensor | None = None, segments: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """``x [B, S, W]`` with its positions, ``places [B, S]`` int64 or 0 to S - 1, and segments."""
        x = x * scale if scale != 1.0 else x
        if self.config.positions in ("learned", "sinusoidal"):
            learned = self.config.positions == "learned"
            table = cast(Tensor, self.position.weight if learned else self.sinusoid).to(x.dtype)
            x = x + (table[: x.shape[1]] if places is None else table[places])
        if self.config.segments:
            x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        return cast(Tensor, self.drop(self.embedding_norm(x)))

    def run(self, x: Tensor, places: Tensor | None, look: Look) -> Tensor:
        """The blocks and the last norm over an embedded ``x [B, S, W]``."""
        if self.config.positions == "alibi":
            look = look._replace(slopes=cast(Tensor, self.slopes))
        if self.config.positions == "rotary":
            cosine, sine = cast(Tensor, self.cosine), cast(Tensor, self.sine)
            rows = slice(x.shape[1]) if places is None else places.unsqueeze(1)
            look = look._replace(rotary=(cosine[rows], sine[rows]))
        again = self.config.checkpointing and torch.is_grad_enabled() and look.cache is None
        for block in self.blocks:
            x = checkpoint(block, x, look, use_reentrant=False) if again else block(x, look)
        return cast(Tensor, self.norm(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Trunk:
        """``to``, ``half``, ``to_empty`` and the like: the tables are made anew, always in float32."""
        super()._apply(fn, recurse)
        for name, table in tables(self.config).items():
            setattr(self, name, table.to(cast(Tensor, getattr(self, name)).device))
        return self

    def reset_parameters(self) -> None:
        """The initial weights of the config's seed, see :func:`initialise`."""
        initialise(self, self.config, self.config.seed)


class Decoder(Trunk):
    """A trunk whose tokens see only those before them, and whose keys and values a cache can keep."""

    def hidden(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The last hidden states of token embeddings ``x [B, S, W]``; with a cache x are the newest."""
        places = places_of(mask)
        if cache is not None and cache.lengths is not None:
            places = cache.lengths.long().unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
        look = Look(True, keys_mask(mask), memory=memory, memory_mask=keys_mask(memory_mask), cache=cache)
        return self.run(self.embed(x, places, scale=self.scale), places, look)


# ---- arguments -------------------------------------------------------------------------------------


def check_tokens(name: str, tokens: Tensor, longest: int) -> None:
    """``tokens`` is int64 or int32 [B, S] and fits the context."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be an int64 or int32 Tensor [B, S], not {kind}")
    if tokens.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions [B, S], not shape {tuple(tokens.shape)}")
    if tokens.shape[1] > longest:
        raise ValueError(f"{name} must be at most {longest} long, not {tokens.shape[1]}")


def checked_mask(name: str, mask: Tensor | None, of: str, tokens: Tensor) -> Tensor | None:
    """A padding mask as bool, True where a token stands."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.int64, torch.int32):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool Tensor, or one of 0 and 1 (int64, int32), not {kind}")
    if mask.shape != tokens.shape:
        raise ValueError(f"{name} must have {of}'s shape {tuple(tokens.shape)}, not {tuple(mask.shape)}")
    return mask.bool()


def keys_mask(mask: Tensor | None) -> Tensor | None:
    """A padding mask as attention takes it."""
    return None if mask is None else mask[:, None, None, :]


def places_of(mask: Tensor | None) -> Tensor | None:
    """The place of each token among its row's: padding does not count. None without padding."""
    return None if mask is None else (mask.long().cumsum(1) - 1).clamp_(min=0)


# ---- initial weights -------------------------------------------------------------------------------


@torch.no_grad()
def initialise(module: nn.Module, config: TransformerConfig, seed: int) -> None:
    """normal(0, 0.02); biases 0, norms 1; with pre-norm the branches' last matrices as GPT-2's.

    Those are smaller by the square root of the number of branches. Drawn in the order of the state dict
    from a generator of its own, so that twins start alike. Parameters on the meta device are left alone.

    Source: Radford et al. (2019), section 2.3; Devlin et al. (2019).
    """
    generator = torch.Generator().manual_seed(seed)
    branches = 2 * config.layers if config.placement == "pre" else 1
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.dim() < 2:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        std = 0.02 / math.sqrt(branches) if name.endswith(("proj.weight", "linear2.weight")) else 0.02
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def parameters_of(config: TransformerConfig, family: Callable[..., nn.Module], **options: Any) -> int:
    """How many parameters a model has, counted without memory for them.

    Example:
        >>> from bigkern.models import GPT, TransformerConfig
        >>> parameters_of(TransformerConfig.gpt2(), GPT)
        124439808
    """
    with torch.device("meta"):
        model = family(config, **options)
    return sum(p.numel() for p in model.parameters())
