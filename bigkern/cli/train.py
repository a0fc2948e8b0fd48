"""``bigkern train``: train a small language model on any text, from data to checkpoint to sample."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigkern.cli import checkpoint, corpus, figures, files, options
from bigkern.cli.console import (
    INTERRUPTED,
    Console,
    Failure,
    OutputClosed,
    Progress,
    RunFailed,
    machine,
    to_json,
)
from bigkern.cli.families import CHOICES, FAMILIES, all_settings, flag, merged
from bigkern.cli.trainer import BETAS, Interruptible, Recipe, Trainer, parameter_groups

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "; ".join(f"{name}: {family.help}" for name, family in FAMILIES.items())
    parser.add_argument("model", choices=list(FAMILIES), help=kinds)
    for name, (value, text) in all_settings().items():
        if name == "data":
            parser.add_argument(flag(name), nargs="+", metavar="PATH", help=text)
        elif isinstance(value, bool):
            parser.add_argument(flag(name), action="store_true", default=None, help=text)
        else:
            parser.add_argument(flag(name), type=type(value), choices=CHOICES.get(name), help=text)
    parser.add_argument(
        "--device", default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)"
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/<model>)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--compare", action="store_true", help="train stock PyTorch beside it, and time both")
    parser.add_argument(
        "--seconds", type=_positive, help="with --compare: train only as many steps as fit into this time"
    )
    parser.add_argument("--eval-every", type=int, default=40, help="steps between validations (default: 40)")
    parser.add_argument(
        "--save-every", type=int, default=0, help="steps between checkpoints (default: the end)"
    )
    parser.add_argument("--sample", type=int, default=200, help="tokens to sample at the end (default: 200)")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, not {text}")
    return value


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


def run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.seconds is not None and not arguments.compare:
        raise Failure("--seconds goes with --compare; say --steps instead")
    if arguments.out is None:
        arguments.out = Path("runs") / arguments.model
    files.require_writable(arguments.out)
    folder = _newest(arguments) if arguments.resume else None
    restored = checkpoint.load(folder) if folder is not None else None
    if restored and (of := restored[2]["model"]) != arguments.model:
        raise Failure(f"cannot resume {arguments.model} from {folder}: the checkpoint is of {of}")
    given = {name: value for name in all_settings() if (value := getattr(arguments, name)) is not None}
    settings = merged(arguments.model, given, restored[2]["settings"] if restored else {})
    this = prepare(settings, arguments, console)
    if arguments.compare:
        from bigkern.cli import compare

        return compare.run(this, console, arguments.seconds)
    if restored is None and checkpoint.folders(this.out):
        raise Failure(f"{this.out} holds a checkpoint; pass --resume to go on from it, or another --out")
    checkpoint.require_safetensors()
    trainer = build(this)
    if restored is not None and folder is not None:
        _restore(trainer, this, restored, folder)
        console.say(f"resuming from {folder}")
    describe(this, trainer.model, console)
    return _train(this, trainer, arguments, console)


def _newest(arguments: argparse.Namespace) -> Path:
    if arguments.compare:
        raise Failure("--resume and --compare do not go together")
    found = checkpoint.folders(arguments.out)
    if not found:
        raise Failure(f"cannot resume: there is no checkpoint in {arguments.out}")
    return found[-1]


def prepare(settings: dict[str, Any], arguments: argparse.Namespace, console: Console) -> Run:
    device = options.device(arguments.device)
    if arguments.eval_every < 1:
        raise Failure(f"--eval-every must be at least 1, not {arguments.eval_every}")
    if arguments.save_every < 0:
        raise Failure(f"--save-every must not be negative, not {arguments.save_every}")
    if arguments.sample < 0:
        raise Failure(f"--sample must not be negative, not {arguments.sample}")
    paths = [Path(path) for path in settings["data"]]
    least = FAMILIES[arguments.model].trainer.least(settings["batch"], settings["context"])
    data = corpus.load(
        paths, settings["tokenizer"], settings["vocab_size"], least, arguments.out, console.say
    )
    names = ("steps", "batch", "context", "lr", "warmup", "weight_decay", "clip", "seed")
    recipe = Recipe(**{name: settings[name] for name in names}, eval_every=arguments.eval_every)
    return Run(arguments.model, settings, arguments.out, device, data, recipe)


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


def _restore(trainer: Trainer, this: Run, restored: tuple[dict[str, Any], ...], folder: Path) -> None:
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


def _train(this: Run, trainer: Trainer, arguments: argparse.Namespace, console: Console) -> int:
    files.sweep(this.out)
    try:
        with Interruptible() as interrupt, console.progress(this.recipe.steps, trainer.step) as progress:
            _take_steps(this, trainer, arguments.save_every, interrupt, progress)
        if interrupt.asked:
            console.say(f"interrupted after step {trainer.step}; go on with --resume --out {this.out}")
            return INTERRUPTED
        return _finish(this, trainer, arguments, console)
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


def _finish(this: Run, trainer: Trainer, arguments: argparse.Namespace, console: Console) -> int:
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
    if arguments.sample > 0:
        prompt, continuation = sample(this, trainer.model, arguments.sample)
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
