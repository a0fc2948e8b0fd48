"""What :mod:`bigkern.models.transformer.generation` continues, for models that carry a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Carried = TypeVar("Carried")


class Stepped(Generic[Carried]):
    """Sequences that read one token of each row a call.

    Args:
        step: (tokens ``[B]``, what is carried) to (logits ``[B, vocabulary]``, what is carried from there).
        reorder: (what is carried, rows ``[B']``) to the same where row i goes on as ``rows[i]`` did.
        carried: what the model carries from the prompts.
        logits: ``[B, vocabulary]`` of the first new token.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Carried], tuple[Tensor, Carried]],
        reorder: Callable[[Carried, Tensor], Carried],
        carried: Carried,
        logits: Tensor,
    ):
        self.step, self.reorder, self.carried, self.logits = step, reorder, carried, logits

    def __call__(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            self.carried = self.reorder(self.carried, rows)
        self.logits, self.carried = self.step(tokens, self.carried)
        return self.logits
