"""``bigkern train``: train a small language model on any text, from data to checkpoint to sample."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bigkern.terminal import files, options
from bigkern.terminal.console import Console, Failure
from bigkern.train import checkpoint, compare, corpus
from bigkern.train.families import CHOICES, FAMILIES, all_settings, flag, merged
from bigkern.train.run import Run, build, describe, restore, train
from bigkern.train.trainer import Recipe


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
    this = _prepare(settings, arguments, console)
    if arguments.compare:
        return compare.run(this, console, arguments.seconds)
    if restored is None and checkpoint.folders(this.out):
        raise Failure(f"{this.out} holds a checkpoint; pass --resume to go on from it, or another --out")
    checkpoint.require_safetensors()
    trainer = build(this)
    if restored is not None and folder is not None:
        restore(trainer, this, restored, folder)
        console.say(f"resuming from {folder}")
    describe(this, trainer.model, console)
    return train(this, trainer, arguments.save_every, arguments.sample, console)


def _newest(arguments: argparse.Namespace) -> Path:
    if arguments.compare:
        raise Failure("--resume and --compare do not go together")
    found = checkpoint.folders(arguments.out)
    if not found:
        raise Failure(f"cannot resume: there is no checkpoint in {arguments.out}")
    return found[-1]


def _prepare(settings: dict[str, Any], arguments: argparse.Namespace, console: Console) -> Run:
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
