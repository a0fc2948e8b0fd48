"""``bigkern train --compare``: the same training by bigkern and by stock PyTorch, timed side by side.

All variants live in one process and take turns, a few steps each, in an order that rotates, so that a
noisy machine is noisy for everyone. They start from the same weights and see the same batches. Memory is
measured in a process of its own for each variant.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigkern.core import registry
from bigkern.core.tune import tune
from bigkern.terminal import files
from bigkern.terminal.console import INTERRUPTED, Console, Failure, RunFailed, machine
from bigkern.train import figures
from bigkern.train.run import Run, build, caption, describe, sample, write_json
from bigkern.train.trainer import Interruptible, Recipe, Trainer

BLOCK = 5  # steps a turn
WARM_UP = 5  # first steps that do not count in the timings
TUNING = 8.0  # seconds
TRIAL_STEPS = 5  # of each variant, to see how many steps fit into --seconds
LEAST_STEPS = 40  # however slow the machine is: fewer show nothing

VARIANTS: dict[str, Callable[[Run], Trainer]] = {
    "bigkern": build,
    "pytorch, AdamW": lambda this: build(this, torch.optim.AdamW),
    "pytorch, AdamW(fused)": lambda this: build(this, partial(torch.optim.AdamW, fused=True)),
}


def run(this: Run, console: Console, seconds: float | None = None) -> int:
    files.sweep(this.out)
    if seconds is not None:
        this = _fitted(this, seconds)
    _tune(this, console)
    memory = measure_memory(this)
    trainers = {name: make(this) for name, make in VARIANTS.items()}
    describe(this, trainers["bigkern"].model, console)
    _check_same_start(trainers)
    with Interruptible() as interrupt, console.progress(this.recipe.steps) as progress:
        blocks = 0
        while (done := trainers["bigkern"].step) < this.recipe.steps and not interrupt.asked:
            for name in _rotated(list(trainers), blocks):
                _take_turn(name, trainers[name], min(BLOCK, this.recipe.steps - done))
            blocks += 1
            first = trainers["bigkern"]
            progress.update(first.step, caption(first, first.history.train[-1]))
    if interrupt.asked:
        console.say("interrupted; nothing was written")
        return INTERRUPTED
    report = summarise(this, trainers, memory)
    prompt, continuation = sample(this, trainers["bigkern"].model, 200)
    report["sample"] = {"prompt": prompt, "continuation": continuation}
    rates = {name: tuple(v["tokens_per_second"]) for name, v in report["variants"].items()}
    report["figure"] = figures.comparison(this.out / "compare.png", _curves(trainers), rates, console)
    write_json(this.out / "compare.json", report)
    _show(report, console)
    console.say(f"\n--- prompt\n{prompt}\n--- bigkern goes on\n{continuation}\n---")
    console.say(f"written to {this.out / 'compare.json'}")
    console.emit(report)
    return 0


def _tune(this: Run, console: Console) -> None:
    """Measure the candidates of this run's own calls, so that bigkern takes part with what is best here."""
    trainer = build(this)
    began = time.perf_counter()
    with tune(TUNING) as measured:
        trainer.train_step()
    ours = sum(not registry.is_stock(m.after) for m in measured)
    seconds = time.perf_counter() - began
    console.say(f"tuned in {seconds:.0f} s: kernels of ours run {ours} of {len(measured)} kinds of calls")


def _fitted(this: Run, seconds: float) -> Run:
    """The same run with as many steps as train within ``seconds``, judged by a few steps thrown away."""
    trials = [make(this) for make in VARIANTS.values()]
    for _ in range(TRIAL_STEPS):
        for trial in trials:
            trial.train_step()
    a_round = sum(statistics.median(trial.history.seconds) for trial in trials)
    steps = min(this.recipe.steps, max(LEAST_STEPS, int(seconds / a_round)))
    settings = {**this.settings, "steps": steps}
    return replace(this, settings=settings, recipe=replace(this.recipe, steps=steps))


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _take_turn(name: str, trainer: Trainer, steps: int) -> None:
    try:
        for _ in range(steps):
            trainer.train_step()
            if trainer.due_evaluation():
                trainer.evaluate()
    except RunFailed as error:
        raise RunFailed(f"{name}: {error}; nothing was written") from error


def _check_same_start(trainers: dict[str, Trainer]) -> None:
    ours = trainers["bigkern"].model.state_dict()
    for name, trainer in trainers.items():
        for key, value in trainer.model.state_dict().items():
            if not torch.equal(ours[key], value):
                raise Failure(f"{name} does not start from bigkern's weights: {key} differs")


# ---- the report ------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    if len(values) < 2:
        return (values[0],) * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[-1]


def summarise(this: Run, trainers: dict[str, Trainer], memory: dict[str, Any]) -> dict[str, Any]:
    skipped = WARM_UP if this.recipe.steps > 2 * WARM_UP else 0
    seconds = {name: t.history.seconds[skipped:] for name, t in trainers.items()}
    tokens = this.recipe.batch * this.recipe.context
    variants = {}
    for name, trainer in trainers.items():
        history = trainer.history
        # The same step of both, a turn apart: a slow minute of the machine cancels.
        ratios = [theirs / ours for ours, theirs in zip(seconds["bigkern"], seconds[name], strict=True)]
        validation, first = (t.history.validation[-1][1] for t in (trainer, trainers["bigkern"]))
        gaps = [abs(a - b) for a, b in zip(history.train, trainers["bigkern"].history.train, strict=True)]
        variants[name] = {
            "loss": {
                "first": history.train[0],
                "train": history.train[-1],
                "validation": validation,
            },
            "relative_validation_gap": abs(validation / first - 1),
            "largest_gap_to_bigkern": max(gaps),
            "step_ms": [1e3 * s for s in spread(seconds[name])],
            "tokens_per_second": [tokens / s for s in reversed(spread(seconds[name]))],
            "bigkern_is_faster_by": spread(ratios),
            "memory": memory[name],
            "validation": history.validation,
            "train": history.train,
        }
    return {
        "machine": machine(),
        "model": this.model,
        "settings": this.settings,
        "device": str(this.device),
        "spread": "p20, median, p80",
        "steps_left_out_of_timings": skipped,
        "variants": variants,
    }


def _show(report: dict[str, Any], console: Console) -> None:
    rows = []
    for name, v in report["variants"].items():
        low, middle, high = v["step_ms"]
        speed = v["bigkern_is_faster_by"]
        rows.append(
            (
                name,
                f"{v['loss']['train']:.3f}",
                f"{v['loss']['validation']:.3f}",
                f"{v['tokens_per_second'][1]:,.0f}",
                f"{middle:.0f} ({low:.0f} to {high:.0f})",
                "-" if name == "bigkern" else f"{speed[1]:.2f}x ({speed[0]:.2f} to {speed[2]:.2f})",
                _megabytes(v["memory"]["saved_for_backward"]),
                _megabytes(v["memory"]["peak"]),
            )
        )
    columns = ("", "loss", "validation", "tokens/s", "ms a step", "bigkern's speed-up", "saved MB", "peak MB")
    console.say()
    console.table(columns, rows)
    apart = max(v["relative_validation_gap"] for v in report["variants"].values())
    console.say(f"validation losses lie within {apart:.2%} of bigkern's.")
    console.say("median (p20 to p80). saved: what autograd keeps for backward. peak: " + _peak_words(report))


def _peak_words(report: dict[str, Any]) -> str:
    on_gpu = report["device"].startswith("cuda")
    return (
        "torch's allocations on the GPU."
        if on_gpu
        else "resident memory while training, torch itself included."
    )


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def _curves(trainers: dict[str, Trainer]) -> figures.Curves:
    return {
        name: {"train": list(enumerate(t.history.train, 1)), "validation": t.history.validation}
        for name, t in trainers.items()
    }


# ---- memory ----------------------------------------------------------------------------------------


def measure_memory(this: Run) -> dict[str, dict[str, int | None]]:
    """Two steps of each variant in a fresh process, all at once; see :func:`probe`."""
    command = [sys.executable, "-c", "from bigkern.train.compare import probe; probe()"]
    request = {"model": this.model, "settings": this.settings, "device": str(this.device)}
    children = {
        name: subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name in VARIANTS
    }
    found = {}
    for name, child in children.items():
        output, errors = child.communicate(json.dumps({"variant": name, **request}))
        if child.returncode != 0:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise RunFailed(f"the memory measurement of {name} failed: {last}")
        found[name] = json.loads(output.splitlines()[-1])
    return found


def probe() -> None:
    """In the child: train on random tokens; print peak memory, and the bytes that autograd saves, as JSON."""
    from bigkern.train.corpus import Bytes, Corpus

    request = json.loads(sys.stdin.read())
    settings, device = request["settings"], torch.device(request["device"])
    names = ("batch", "context", "lr", "weight_decay", "clip", "seed")
    recipe = Recipe(steps=4, warmup=1, eval_every=4, **{name: settings[name] for name in names})
    tokenizer = Bytes()
    tokenizer.vocab_size = 256 if settings["tokenizer"] == "bytes" else settings["vocab_size"]
    tokens = torch.randint(0, tokenizer.vocab_size, (recipe.batch, 4 * recipe.context)).int().flatten()
    this = Run(request["model"], settings, Path(), device, Corpus(tokenizer, tokens, tokens, ""), recipe)
    trainer = VARIANTS[request["variant"]](this)
    saved = saved_bytes(trainer)
    trainer.train_step()  # the optimizer's state and torch's own buffers exist from here on
    _forget_peak(device)
    trainer.train_step()
    print(json.dumps({"peak": _peak(device), "saved_for_backward": saved}))


def saved_bytes(trainer: Trainer) -> int:
    """Bytes of the tensors that one forward pass keeps for backward, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = trainer.loss(*trainer.batch("train", 0))
    del loss
    return sum(seen.values())


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # then the peak is that of the whole process


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
