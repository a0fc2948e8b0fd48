"""A training run: built, taken up again, trained, saved, sampled from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigkern.terminal import files
from bigkern.terminal.console import (
    INTERRUPTED,
    Console,
    Failure,
    OutputClosed,
    Progress,
    RunFailed,
    machine,
    to_json,
)
from bigkern.train import checkpoint, corpus, figures
from bigkern.train.families import FAMILIES
from bigkern.train.trainer import BETAS, Interruptible, Recipe, Trainer, parameter_groups

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """One training run: what it trains, its settings, its folder, its data."""

    model: str  # of FAMILIES
    settings: dict[str, Any]
    out: Path
    device: torch.device
    corpus: corpus.Corpus
    recipe: Recipe

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings["dtype"]]


def build(this: Run, stock: Callable[..., torch.optim.Optimizer] | None = None) -> Trainer:
    """bigkern's model with bigkern's AdamW; or the twin in plain PyTorch with an optimizer of torch's."""
    from bigkern.optim import AdamW

    family, recipe = FAMILIES[this.model], this.recipe
    torch.manual_seed(recipe.seed)  # of dropout
    try:
        model = family.model(this.settings, this.corpus.tokenizer.vocab_size, stock is not None)
    except ValueError as error:
        raise Failure(str(error)) from error
    model = model.to(this.device, this.dtype)
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = (stock or AdamW)(groups, lr=recipe.lr, betas=BETAS)
    return family.trainer(model, optimizer, this.corpus, recipe, this.device, this.settings["compile"])


def restore(trainer: Trainer, this: Run, restored: tuple[dict[str, Any], ...], folder: Path) -> None:
    weights, optimizer, state = restored
    if state["corpus"] != this.corpus.digest:
        raise Failure(
            f"cannot resume from {folder}: the data or its tokenizer has changed since it was written"
        )
    if this.recipe.steps < state["step"]:
        raise Failure(f"cannot resume with --steps {this.recipe.steps}: {folder} has more behind it")
    model_file, optimizer_file = (folder / name for name in checkpoint.FILES)
    if problem := checkpoint.misfit(trainer.model.state_dict(), weights):
        raise checkpoint.damaged(model_file, problem)
    trainer.model.load_state_dict(weights)
    if problem := checkpoint.misfit(_moments(trainer.optimizer), checkpoint.flatten(optimizer)[0]):
        raise checkpoint.damaged(optimizer_file, problem)
    trainer.optimizer.load_state_dict(optimizer)
    try:
        trainer.carry(state["carried"])
        checkpoint.restore_rng(state["rng"])  # last: what comes before drew random numbers
    except ValueError as error:
        raise checkpoint.damaged(optimizer_file, str(error)) from error
    trainer.step = state["step"]
    trainer.history.train = state["history"]["train"]
    trainer.history.validation = [(step, loss) for step, loss in state["history"]["validation"]]


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors as those of the optimizer's state after a step, by name."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    usual = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}
    return checkpoint.flatten({"state": usual, "param_groups": []})[0]


def describe(this: Run, model: nn.Module, console: Console) -> None:
    count = sum(p.numel() for p in model.parameters())
    tokens = len(this.corpus.train) + len(this.corpus.validation)
    console.say(
        f"{count / 1e6:.2f} M parameters in {this.settings['dtype']} on {this.device}, "
        f"{tokens / 1e6:.2f} M {this.settings['tokenizer']} tokens, {torch.get_num_threads()} threads"
    )


def train(this: Run, trainer: Trainer, save_every: int, sampled: int, console: Console) -> int:
    """Take the steps that are left, saving every so many and at the end; then say what became of it."""
    files.sweep(this.out)
    try:
        with Interruptible() as interrupt, console.progress(this.recipe.steps, trainer.step) as progress:
            _take_steps(this, trainer, save_every, interrupt, progress)
        if interrupt.asked:
            console.say(f"interrupted after step {trainer.step}; go on with --resume --out {this.out}")
            return INTERRUPTED
        return _finish(this, trainer, sampled, console)
    except RunFailed as error:
        raise RunFailed(f"{error}; {checkpoint.newest(this.out)}") from error


def _take_steps(
    this: Run, trainer: Trainer, save_every: int, interrupt: Interruptible, progress: Progress
) -> None:
    """Train until the last step, or until someone interrupts; what was trained is saved."""
    saved_at = trainer.step
    try:
        while trainer.step < this.recipe.steps and not interrupt.asked:
            loss = trainer.train_step()
            if trainer.due_evaluation():
                trainer.evaluate()
            if save_every and trainer.step % save_every == 0:
                saved_at = save(this, trainer)
            progress.update(trainer.step, caption(trainer, loss))
    except OutputClosed:
        save(this, trainer)
        raise
    if trainer.step != saved_at:
        save(this, trainer)


def caption(trainer: Trainer, loss: float) -> str:
    text = f"loss {loss:.3f}  {trainer.tokens_per_second():,.0f} tokens/s"
    if trainer.history.validation:
        text += f"  validation {trainer.history.validation[-1][1]:.3f}"
    return text


def save(this: Run, trainer: Trainer) -> int:
    history = {"train": trainer.history.train, "validation": trainer.history.validation}
    extra = {"model": this.model, "settings": this.settings, "corpus": this.corpus.digest, "history": history}
    model, optimizer = trainer.model.state_dict(), trainer.optimizer.state_dict()
    checkpoint.save(this.out, trainer.step, model, optimizer, extra, trainer.carried())
    return trainer.step


def sample(this: Run, model: nn.Module, count: int) -> tuple[str, str]:
    """The first tokens of the validation text, and how the model goes on."""
    prompt = this.corpus.validation[: min(64, this.recipe.context)].long().to(this.device)
    tokens: Any = model.generate(prompt[None], count, temperature=0.7, top_k=40, seed=this.recipe.seed)  # type: ignore[operator]
    decode = this.corpus.tokenizer.decode
    return decode(prompt.tolist()), decode(tokens[0, len(prompt) :].tolist())


def _finish(this: Run, trainer: Trainer, sampled: int, console: Console) -> int:
    history = trainer.history
    if not history.validation or history.validation[-1][0] != trainer.step:
        trainer.evaluate()
    losses = {"train": history.train[-1], "validation": history.validation[-1][1]}
    perplexity = float(torch.tensor(losses["validation"]).exp())
    summary: dict[str, Any] = {
        "machine": machine(),
        "model": this.model,
        "settings": this.settings,
        "device": str(this.device),
        "step": trainer.step,
        "loss": losses,
        "perplexity": perplexity,
        "tokens_per_second": trainer.tokens_per_second(sys.maxsize),
        "validation": history.validation,
        "out": str(this.out),
    }
    lines = [f"validation loss {losses['validation']:.3f}, perplexity {perplexity:.2f}"]
    if sampled > 0:
        prompt, continuation = sample(this, trainer.model, sampled)
        lines.append(f"\n--- prompt\n{prompt}\n--- continuation\n{continuation}\n---")
        summary["sample"] = {"prompt": prompt, "continuation": continuation}
    figure = this.out / "loss.png"
    curves: dict[str, figures.Curve] = {
        "train": list(enumerate(history.train, 1)),
        "validation": history.validation,
    }
    summary["figure"] = figures.losses(figure, {"bigkern": curves}, console)
    write_json(this.out / "summary.json", summary)
    console.say("\n".join(lines))
    console.emit(summary)
    return 0


def write_json(path: Path, document: dict[str, Any]) -> None:
    files.write_atomically(path, lambda scratch: scratch.write_text(to_json(document) + "\n"))
