"""The same GPT trained with every way of storing parameters and AdamW's state: where does the loss end up?

    python -m bigkern.benchmarks.adam_storage --out FOLDER [--steps N]

All runs start from the same float32 weights and see the same batches, from Python's standard library. Written
are ``adam_storage.json`` and a figure of it, ``adam_storage.png``; the exit code is 1 where a run ends more
than 1 % off the one in float32. A run in plain bfloat16, torch's own way, stands beside them and is held to
nothing: rounding to nearest loses small updates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigkern.models import GPT, TransformerConfig
from bigkern.optim import AdamW
from bigkern.terminal.console import Console, machine
from bigkern.train import corpus
from bigkern.train.trainer import BETAS, Recipe, Trainer, parameter_groups

WITHIN = 0.01  # of the float32 run's validation loss
CLIP = 1.0
REFERENCE = "float32"
FP32, BF16, CODES = torch.float32, torch.bfloat16, torch.uint8


@dataclass(frozen=True)
class Variant:
    """The model's dtype, and its optimizer's options."""

    dtype: torch.dtype
    options: dict[str, Any]
    held: bool = True  # to WITHIN


VARIANTS = {
    REFERENCE: Variant(FP32, {}),
    "float32, bf16 moments": Variant(FP32, {"state_dtype": BF16}),
    "float32, 8-bit moments": Variant(FP32, {"state_dtype": CODES}),
    "bf16, fp32 masters and moments": Variant(BF16, {"master_weights": True, "state_dtype": FP32}),
    "bf16, remainders, bf16 moments": Variant(BF16, {"master_weights": "remainder"} | {"state_dtype": BF16}),
    "bf16, remainders, 8-bit moments": Variant(BF16, {"master_weights": "remainder", "state_dtype": CODES}),
    "bf16 at random": Variant(BF16, {"stochastic_rounding": True}),
    "bf16 at random, 8-bit moments": Variant(BF16, {"stochastic_rounding": True, "state_dtype": CODES}),
    "bf16 to nearest": Variant(BF16, {}, held=False),
}


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    steps: int = 600
    context: int = 64
    batch: int = 8
    layers: int = 2
    width: int = 96
    eval_batches: int = 32

    def recipe(self) -> Recipe:
        return Recipe(
            steps=self.steps,
            batch=self.batch,
            context=self.context,
            lr=2e-3,
            warmup=self.steps // 20,
            weight_decay=0.1,
            clip=0.0,  # the optimizer clips
            seed=0,
            eval_every=max(1, self.steps // 12),
            eval_batches=self.eval_batches,
        )


def train(variant: Variant, size: Size, text: corpus.Corpus) -> dict[str, Any]:
    """One run: its validation losses, and the bytes that a parameter and its state take."""
    config = TransformerConfig(
        vocab_size=256, context=size.context, layers=size.layers, heads=4, width=size.width, seed=0
    )
    model = GPT(config).to(variant.dtype)
    groups = parameter_groups(model, 0.1)
    optimizer = AdamW(groups, lr=2e-3, betas=BETAS, max_norm=CLIP, seed=0, **variant.options)
    trainer = Trainer(model, optimizer, text, size.recipe(), torch.device("cpu"))
    while trainer.step < size.steps:
        trainer.train_step()
        if trainer.due_evaluation():
            trainer.evaluate()
    history = trainer.history
    return {
        "validation": history.validation[-1][1],
        "train": sum(history.train[-20:]) / len(history.train[-20:]),
        "bytes_a_parameter": _bytes(optimizer),
        "curve": history.validation,
    }


def _bytes(optimizer: AdamW) -> float:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = params + [x for p in params for name, x in optimizer.state[p].items() if name != "step"]
    return sum(x.numel() * x.element_size() for x in tensors) / sum(p.numel() for p in params)


def compare(size: Size, text: corpus.Corpus, say: Callable[[str], None]) -> dict[str, Any]:
    """Every variant, and how far each ends from the float32 run, as a share of that run's loss."""
    runs: dict[str, dict[str, Any]] = {}
    for name, variant in VARIANTS.items():
        runs[name] = train(variant, size, text)
        runs[name]["off"] = runs[name]["validation"] / runs[REFERENCE]["validation"] - 1
        runs[name]["held"] = variant.held
        say(f"{name:<34}{runs[name]['validation']:.4f}  {runs[name]['off']:+.2%}")
    return {"machine": machine(), "size": vars(size), "within": WITHIN, "runs": runs}


def too_far(report: dict[str, Any]) -> list[str]:
    return [name for name, run in report["runs"].items() if run["held"] and not abs(run["off"]) <= WITHIN]


def draw(report: dict[str, Any], path: Path) -> None:
    """Validation losses by step; on the right, where they end, relative to float32."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from bigkern.benchmarks.plot import COLOURS

    runs = report["runs"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for colour, (name, run) in zip(COLOURS, runs.items(), strict=True):
        left.plot(*zip(*run["curve"], strict=True), color=colour, label=name, linewidth=1.2)
    left.set(xlabel="step", ylabel="validation loss (nats a byte)")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    names = [f"{name}\n{run['bytes_a_parameter']:.2f} bytes a parameter" for name, run in runs.items()]
    right.barh(names, [100 * run["off"] for run in runs.values()], color=COLOURS[: len(runs)])
    for limit in (-100 * WITHIN, 100 * WITHIN):
        right.axvline(limit, color="black", linestyle=":", linewidth=1)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=8)
    right.set_xlabel(f"validation loss after {report['size']['steps']} steps, % off float32")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Size.steps)
    arguments = parser.parse_args()
    size, console = Size(steps=arguments.steps), Console()
    text = corpus.load([], "bytes", 256, size.context, arguments.out)
    report = compare(size, text, console.say)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "adam_storage.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, arguments.out / "adam_storage.png")
    for name in too_far(report):
        console.say(f"{name} is more than {WITHIN:.0%} off")
    return 1 if too_far(report) else 0


if __name__ == "__main__":
    sys.exit(main())
