"""``bigkern tune``: prove GPU kernels, and measure every op's candidates, so that the fastest here runs."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bigkern.core import device as processor
from bigkern.core import evidence, tune, wisdom
from bigkern.core.tune import Measured
from bigkern.ops import problems, proof
from bigkern.terminal import options
from bigkern.terminal.console import Console, Failure, RunFailed, machine

DTYPES = (torch.float32, torch.bfloat16)
SECONDS = 55.0
SHOWN = 25  # changes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", help=f"which: {', '.join(problems.OPS)} (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="about how long, at least (default: 55)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="write all of this machine's wisdom there"
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    for name in arguments.op:
        if name not in problems.OPS:
            raise Failure(f"there is no op {name!r}; there are {', '.join(problems.OPS)}")
    if not arguments.seconds > 0.0:
        raise Failure(f"--seconds must be a positive number, not {arguments.seconds}")
    device = options.device(arguments.device)
    ops = arguments.op or problems.OPS
    proofs = _prove(ops, device, console) if processor.is_gpu(device) else []
    noise = tune.noise(device)
    console.say(f"{wisdom.file_name(wisdom.machine(device))}: a task differs from itself by {noise:.1%}")
    if noise > tune.NOISY:
        console.say("this machine is too busy to be trusted: tune it again when it is quiet")
    plans = [plan for op in ops for plan in problems.plans(op, device, DTYPES)]
    found: dict[tune.Plan, Measured] = {}
    began, turns = time.perf_counter(), {plan: turn for turn, plan in enumerate(plans, 1)}
    sittings: Counter[tune.Plan] = Counter()
    with console.progress(2 * len(plans)) as progress:

        def tell(plan: tune.Plan, measured: Measured | None) -> None:
            sittings[plan] += 1
            found.update({} if measured is None else {plan: measured})
            done = (turns[plan], len(plans) + turns[plan], 2 * len(plans))[sittings[plan] - 1]
            progress.update(done, f"{plan.op.name} {plan.label} {'training' if plan.training else 'forward'}")

        try:
            _, problem = tune.run(plans, device, arguments.seconds, tell)
        except KeyboardInterrupt:
            _show(list(found.values()), console)
            raise
    _show(list(found.values()), console)
    seconds = time.perf_counter() - began
    where = wisdom.folder() / wisdom.file_name(wisdom.machine(device))
    kept = problem or (f"kept in {where}" if found else "there is nothing to choose between here")
    console.say(f"\n{len(found)} points in {seconds:.0f} s; {kept}")
    if arguments.export is not None:
        try:
            wisdom.export(arguments.export, device)
        except (OSError, ValueError) as error:
            raise RunFailed(f"cannot write {arguments.export}: {error}") from error
        console.say(f"written to {arguments.export}")
    console.emit(
        {
            "machine": machine(),
            "noise": noise,
            "seconds": seconds,
            "problem": problem,
            "proofs": [{f.name: getattr(p, f.name) for f in fields(p)} for p in proofs],
            "points": [_row(m) for m in found.values()],
        }
    )
    return 0


def _prove(ops: Sequence[str], device: torch.device, console: Console) -> list[proof.Proof]:
    """Show each candidate's proof, and in full what is wrong."""
    jobs = proof.unproven(ops, device)
    if not jobs:
        return []
    console.say(f"{len(jobs)} candidates to prove on {evidence.place(device.index or 0)}")
    done = 0
    with console.progress(sum(len(proof.cases(op)) for op, _ in jobs)) as progress:

        def tell(of: proof.Proof, label: str) -> None:
            nonlocal done
            done += 1
            progress.update(done, f"{of.op}, {of.candidate}: {label}")

        found = proof.prove(jobs, device, tell)
    rows = []
    for p in found:
        wrong = ", ".join(f"{variant} ({v})" for variant, v in p.verdicts.items() if v != evidence.PASS)
        right = "passed" if p.verdicts else "nothing to prove"
        rows.append((p.op, p.candidate, p.cases, f"not right: {wrong}" if wrong else right))
    console.table(("op", "candidate", "cases", ""), rows)
    for p in found:
        for trouble in p.troubles:
            console.say(f"{p.op}, {p.candidate}: {trouble}")
    unwritten = next((p.unwritten for p in found if p.unwritten), None)
    console.say(f"\n{unwritten or f'kept in {evidence.user_file()}'}\n")
    return found


def _row(m: Measured) -> dict[str, Any]:
    return {
        "op": m.plan.op.name,
        "kind": " ".join(m.kind),
        "sizes": m.point.sizes,
        "us": m.point.us,
        "gain": m.point.gain,
        "before": m.before,
        "after": m.after,
    }


def _show(found: list[Measured], console: Console) -> None:
    rows = []
    for op in dict.fromkeys(m.plan.op.name for m in found):
        of = [m for m in found if m.plan.op.name == op]
        chosen = Counter(m.after for m in of)
        said = ", ".join(f"{name} {count}" for name, count in chosen.most_common())
        rows.append((op, len(of), said, sum(m.after != m.before for m in of)))
    console.table(("op", "points", "fastest", "changed"), rows)
    changes = sorted((m for m in found if m.after != m.before), key=lambda m: -m.gain)
    if changes:
        console.say("\nwhat changed, and how many times faster that is here")
        console.table(
            ("op", "kind", "sizes", "before", "now", ""),
            [
                (m.plan.op.name, " ".join(m.kind), "x".join(map(str, m.point.sizes)), m.before, m.after,
                 f"{m.gain:.2f}x")
                for m in changes[:SHOWN]
            ],
        )  # fmt: skip
        if len(changes) > SHOWN:
            console.say(f"and {len(changes) - SHOWN} more")
