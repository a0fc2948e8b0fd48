"""The training loop of ``bigkern train``: a model, an optimizer, batches by step; nothing of its own."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.terminal.console import RunFailed
from bigkern.train.checkpoint import misfit
from bigkern.train.corpus import Corpus

BETAS = (0.9, 0.95)  # AdamW's; the usual second one, 0.999, forgets too slowly for short runs


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train, whatever the model."""

    steps: int
    batch: int
    context: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    seed: int
    eval_every: int
    eval_batches: int = 8

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings decay; biases and norm weights do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@dataclass
class History:
    """Losses by step, and the seconds of every step."""

    train: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Trainer:
    """Takes one optimizer step after another; ``step`` counts them, and names the batch.

    The model gives the logits of a batch ``[batch, context]``, drawn anywhere from the text.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        corpus: Corpus,
        recipe: Recipe,
        device: torch.device,
        compiled: bool = False,
    ):
        self.model = model
        self.optimizer = optimizer
        self.corpus = corpus
        self.recipe = recipe
        self.device = device
        self.step = 0
        self.history = History()
        self._call: Callable[..., Any] = torch.compile(model) if compiled else model

    @staticmethod
    def least(batch: int, context: int) -> int:
        """How many tokens each part of the text must have: a batch may begin at different places."""
        return context + batch

    def carried(self) -> dict[str, Tensor]:
        """What a checkpoint must keep besides the model and the optimizer."""
        return {}

    def carry(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what was carried when the checkpoint was written.

        Raises:
            ValueError: it is not what this model carries.
        """

    def batch(self, part: str, step: int) -> tuple[Tensor, Tensor]:
        r = self.recipe
        inputs, targets = self.corpus.batch(part, r.seed, step, r.batch, r.context)
        return inputs.to(self.device), targets.to(self.device)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self._call(inputs)  # [B, S, vocabulary]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def train_step(self) -> float:
        """One step: forward, backward, clip, update. Returns the loss; its seconds go to the history.

        Raises:
            RunFailed: the loss is not finite.
        """
        inputs, targets = self.batch("train", self.step)
        lr = self.recipe.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        began = time.perf_counter()
        loss = self.loss(inputs, targets)
        loss.backward()
        if self.recipe.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()  # waits for the device
        if not math.isfinite(value):
            raise RunFailed(f"training diverged: the loss of step {self.step + 1} is {value}")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.history.seconds.append(time.perf_counter() - began)
        self.history.train.append(value)
        self.step += 1
        return value

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss over the same batches every time.

        Raises:
            RunFailed: it is not finite.
        """
        self.model.eval()
        losses = [self.loss(*self.batch("validation", i)).item() for i in range(self.recipe.eval_batches)]
        value = sum(losses) / len(losses)
        if not math.isfinite(value):
            raise RunFailed(f"training diverged: the validation loss after step {self.step} is {value}")
        self.history.validation.append((self.step, value))
        return value

    def due_evaluation(self) -> bool:
        return self.step == self.recipe.steps or self.step % self.recipe.eval_every == 0

    def tokens_per_second(self, last: int = 50) -> float:
        """By the median of the last steps: a pause does not count."""
        recent = sorted(self.history.seconds[-last:])
        return self.recipe.batch * self.recipe.context / recent[len(recent) // 2] if recent else 0.0


class Streaming(Trainer):
    """Reads the text as ``batch`` streams side by side, a stretch of each a step: truncated back-propagation.

    The model takes (inputs, state, targets) and gives its loss, and the state that the next stretch begins
    with. Where the streams end they begin anew, without a state.
    """

    state: Any = None

    @staticmethod
    def least(batch: int, context: int) -> int:
        return batch * (context + 1)

    def carried(self) -> dict[str, Tensor]:
        return _named(self.state)

    @torch.no_grad()
    def carry(self, tensors: dict[str, Tensor]) -> None:
        inputs, _ = self.batch("train", 0)
        _, usual = self.model(inputs[:, :1], None)
        if problem := misfit(_named(usual), tensors):
            raise ValueError(f"the carried state: {problem}")
        # Copied into memory of torch's own alignment: on a file's, a product may round otherwise.
        states = tuple(tensors[name].to(self.device, copy=True) for name in ("h", "c") if name in tensors)
        self.state = states if len(states) == 2 else next(iter(states), None)

    def batch(self, part: str, step: int) -> tuple[Tensor, Tensor]:
        r = self.recipe
        place = step % self.corpus.stretches(part, r.batch, r.context)
        if place == 0:
            self.state = None
        inputs, targets = self.corpus.stretch(part, place, r.batch, r.context)
        return inputs.to(self.device), targets.to(self.device)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss, self.state = self._call(inputs, self.state, targets)
        return cast(Tensor, loss)

    def evaluate(self) -> float:
        kept = self.state  # of the training text
        value = super().evaluate()
        self.state = kept
        return value


def _named(state: Any) -> dict[str, Tensor]:
    """The tensors of a recurrent state by name: h, and c where there is one."""
    states = (state,) if isinstance(state, Tensor) else state or ()
    return dict(zip(("h", "c"), states, strict=False))


class Interruptible:
    """While it lasts, Ctrl-C (or SIGTERM) only sets ``asked``; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
