"""What ``bigkern train`` can train: the settings of each family, its model and twin, and how batches come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from bigkern.terminal.console import Failure
from bigkern.train.trainer import Streaming, Trainer

Settings = dict[str, tuple[Any, str]]  # name: default, and what it is

# What makes a run what it is. A checkpoint remembers these; --resume takes them from it.
SETTINGS: Settings = {
    "data": ([], "files or folders of text (default: the source of Python's standard library)"),
    "tokenizer": ("bytes", "bytes, or bpe: byte-pair encoding trained on the data"),
    "vocab_size": (4096, "size of the bpe vocabulary"),
    "steps": (600, "optimizer steps"),
    "batch": (2, "sequences a step"),
    "context": (512, "tokens a sequence"),
    "layers": (4, "blocks, or recurrent layers"),
    "width": (128, "width of the residual stream, or of a layer's hidden state"),
    "dropout": (0.0, "dropout of the embedding and of both branches, or of all layers"),
    "lr": (1e-3, "highest learning rate; a cosine takes it down to a tenth"),
    "warmup": (20, "steps of linear warm-up"),
    "weight_decay": (0.1, "of matrices and embeddings"),
    "clip": (1.0, "largest gradient norm; 0: no clipping"),
    "seed": (0, "of weights, batches and sample"),
    "dtype": ("float32", "of parameters, activations and optimizer state: float32 or bfloat16"),
    "compile": (False, "run the model through torch.compile"),
}
CHOICES = {
    "tokenizer": ("bytes", "bpe"),
    "positions": ("learned", "sinusoidal", "rotary", "alibi"),
    "activation": ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"),
    "cell": ("lstm", "gru", "rnn_tanh", "rnn_relu"),
    "dtype": ("float32", "bfloat16"),
}
COUNTS = ("steps", "batch", "context", "layers", "heads", "width", "embedding", "vocab_size")
AMOUNTS = ("lr", "weight_decay", "clip", "warmup", "seed")
MOST = {  # what the integers of torch and NumPy hold
    **dict.fromkeys(COUNTS, 2**31 - 1),
    **dict.fromkeys(("steps", "warmup", "seed"), 2**63 - 1),
}
MAY_CHANGE = ("steps", "compile")  # when resuming


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        help: what it is.
        own: the settings that only it has.
        usual: its defaults where they are not those of ``SETTINGS``.
        model: (settings, size of the vocabulary, whether in plain PyTorch) to the model.
        trainer: how it reads batches.
    """

    help: str
    own: Settings
    usual: dict[str, Any]
    model: Callable[[dict[str, Any], int, bool], nn.Module]
    trainer: type[Trainer]

    def defaults(self) -> dict[str, Any]:
        return {**{name: default for name, (default, _) in {**SETTINGS, **self.own}.items()}, **self.usual}


def gpt(settings: dict[str, Any], vocab_size: int, stock: bool) -> nn.Module:
    from bigkern.models import GPT, StockGPT, TransformerConfig

    names = ("context", "layers", "heads", "width", "positions", "activation", "dropout", "seed")
    config = TransformerConfig(vocab_size=vocab_size, **{name: settings[name] for name in names})
    return StockGPT(config) if stock else GPT(config)


def lstm(settings: dict[str, Any], vocab_size: int, stock: bool) -> nn.Module:
    from bigkern.models import RecurrentConfig, RecurrentLM
    from bigkern.models.recurrent import OURS, STOCK

    names = ("cell", "layers", "width", "embedding", "seed")
    dropouts = dict.fromkeys(("input_dropout", "dropout", "output_dropout"), settings["dropout"])
    config = RecurrentConfig(vocab_size=vocab_size, **{name: settings[name] for name in names}, **dropouts)
    return RecurrentLM(config, STOCK if stock else OURS)


FAMILIES = {
    "gpt": Family(
        help="a decoder-only Transformer",
        own={
            "heads": (4, "attention heads"),
            "positions": ("learned", "learned, sinusoidal, rotary or alibi"),
            "activation": ("gelu", "relu, gelu, gelu_tanh, silu, swiglu or geglu"),
        },
        usual={},
        model=gpt,
        trainer=Trainer,
    ),
    "lstm": Family(
        help="a recurrent language model, whose state is carried along the text",
        own={
            "cell": ("lstm", "lstm, gru, rnn_tanh or rnn_relu"),
            "embedding": (256, "width of the token embedding"),
        },
        usual={"steps": 200, "batch": 16, "context": 128, "layers": 2, "width": 512, "lr": 4e-3},
        model=lstm,
        trainer=Streaming,
    ),
}


def flag(name: str) -> str:
    """A setting as one writes it on the command line."""
    return f"--{name.replace('_', '-')}"


def all_settings() -> dict[str, tuple[Any, str]]:
    """Every setting of any family: a value of its type, and its help."""
    found: Settings = {}
    for name, (value, text) in SETTINGS.items():
        usual = {family: f.usual[name] for family, f in FAMILIES.items() if name in f.usual}
        words = ", ".join(f"of {family} {default}" for family, default in usual.items())
        shown = f" (default: {value}{'; ' * bool(words)}{words})"
        found[name] = (value, text if name == "data" or value is False else text + shown)
    for family, f in FAMILIES.items():
        for name, (value, text) in f.own.items():
            found[name] = (value, f"of {family} alone: {text} (default: {value})")
    return found


def merged(model: str, given: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Defaults, under the checkpoint's settings, under what was asked for; the last two must not clash."""
    for other, family in FAMILIES.items():
        for name in given:
            if other != model and name in family.own:
                raise Failure(f"{flag(name)} is a setting of {other}, not of {model}")
    for name, value in given.items():
        if name in saved and saved[name] != value and name not in MAY_CHANGE:
            raise Failure(
                f"cannot resume with {flag(name)} {value}: the checkpoint was made with {saved[name]}"
            )
    settings = {**FAMILIES[model].defaults(), **saved, **given}
    for name in COUNTS:
        if name in settings and settings[name] < 1:
            raise Failure(f"{flag(name)} must be at least 1, not {settings[name]}")
    for name in AMOUNTS:
        if not 0 <= settings[name] < float("inf"):
            raise Failure(f"{flag(name)} must be finite and not negative, not {settings[name]}")
    for name, most in MOST.items():
        if name in settings and settings[name] > most:
            raise Failure(f"{flag(name)} must be at most {most}, not {settings[name]}")
    return settings
