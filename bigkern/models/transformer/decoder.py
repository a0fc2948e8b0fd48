"""The decoder: GPT and Llama, by their config.

x = token[t] + position                                        [B, S, W]
x = block(... block(x))                                        causal, see blocks.py
logits = norm(x) token^T                                       [B, S, vocabulary], or head^T if not tied
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from bigkern.models.transformer.blocks import OURS, Parts
from bigkern.models.transformer.cache import Cache
from bigkern.models.transformer.config import TransformerConfig
from bigkern.models.transformer.generation import generated, sequences
from bigkern.models.transformer.trunk import Decoder, check_tokens, checked_mask


class GPT(Decoder):
    """A decoder-only Transformer on bigkern's kernels: GPT, Llama and what lies between, by the config.

    Args:
        config: the model's shape; ``config.seed`` fixes the initial weights.
        parts: what the blocks are made of; :class:`StockGPT` is made of plain PyTorch.

    Shapes: tokens int64 ``[B, S]``, S <= config.context, to logits ``[B, S, vocabulary]``.

    Raises:
        TypeError, ValueError: tokens or mask do not fit; the message names the argument.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019); Touvron et al.,
    Llama 2 (2023).

    Example:
        >>> import torch
        >>> from bigkern.models import GPT, TransformerConfig
        >>> model = GPT(TransformerConfig(context=16, layers=1, heads=2, width=32))
        >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(self, config: TransformerConfig, parts: Parts = OURS):
        super().__init__(config, parts)
        self.product = parts.product
        if not config.tied:
            self.head = parts.linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, S, vocabulary]`` of the token after each of ``tokens``.

        Args:
            tokens: int64 or int32 ``[B, S]``, S <= context.
            mask: bool (or 0 and 1) ``[B, S]``, True where a token stands; padding is not looked at and does
                not count in positions.
        """
        check_tokens("tokens", tokens, self.config.context)
        mask = checked_mask("mask", mask, "tokens", tokens)
        return self.logits(self.hidden(self.token(tokens), mask))

    def logits(self, x: Tensor) -> Tensor:
        """``[..., W]`` to ``[..., vocabulary]``."""
        return self.product(x, self.token.weight) if self.config.tied else cast(Tensor, self.head(x))

    def _states(self, tokens: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        return self.hidden(self.token(tokens), mask, cache=cache)

    def generate(
        self, tokens: Tensor, count: int, *, mask: Tensor | None = None, cache: bool = True, **how: Any
    ) -> Tensor:
        """``tokens [B, S]`` continued by at most ``count`` tokens: int64 ``[B, S + n]``.

        n < count if every sequence ends before, see ``end``. The model is in eval mode meanwhile.

        Args:
            mask: bool ``[B, S]``, True where a token stands; prompts may be padded on either side.
            cache: keep keys and values, so that each token is computed once. Beyond the context, and without
                a cache, every step computes the last ``context`` tokens anew.
            how: temperature, top_k, top_p, seed, beams, length_penalty, end (default config.end_token) and
                pad (default config.pad_token), see :class:`bigkern.models.transformer.generation.Decoding`.

        Example:
            >>> import torch
            >>> from bigkern.models import GPT, TransformerConfig
            >>> model = GPT(TransformerConfig(context=16, layers=1, heads=2, width=32))
            >>> prompt = torch.zeros(2, 4, dtype=torch.long)
            >>> model.generate(prompt, 8, temperature=0.8, top_p=0.9, seed=1).shape
            torch.Size([2, 12])
        """
        return generated(self, tokens, count, lambda: sequences(self, tokens, mask, count, cache), how)
