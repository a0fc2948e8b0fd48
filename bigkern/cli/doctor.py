"""``bigkern doctor``: every op on every backend of this machine, held to parity with float64, in seconds."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass

import torch

from bigkern.cli.env import devices
from bigkern.core import info, registry
from bigkern.core.parity import Yardstick
from bigkern.core.problem import Problem, expect, judge
from bigkern.ops import problems
from bigkern.terminal.console import Console, machine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


@dataclass
class Finding:
    """What the cases of one op on one backend and device said."""

    op: str
    backend: str
    device: str
    cases: int = 0
    worst: float = 0.0  # smallest factor of the parity rule that all would still pass
    problem: str | None = None
    refused: str | None = None  # why, the last case that it refused
    fix: str | None = None


def run(arguments: argparse.Namespace, console: Console) -> int:
    began = time.perf_counter()
    findings = []
    for device in devices():
        for op in problems.OPS:
            findings += examine(op, problems.small(op), device)
    _show(findings, console)
    failures = [finding for finding in findings if finding.problem]
    if info.import_error is not None:
        console.say(f"\nthe compiled extension did not load: {info.import_error}\n  fix: {_extension_fix()}")
    for failure in failures:
        console.say(f"\n{failure.op} on {failure.backend}: {failure.problem}\n  fix: {failure.fix}")
    bad = len(failures) + (info.import_error is not None)
    verdict = _count(bad, "problem") if bad else "all well"
    tested = sum(finding.cases for finding in findings)
    console.say(f"\n{tested} checks in {time.perf_counter() - began:.1f} s: {verdict}")
    console.emit(
        {
            "machine": machine(),
            "import_error": info.import_error,
            "findings": [asdict(finding) for finding in findings],
            "passed": bad == 0,
        }
    )
    return 1 if bad else 0


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def examine(op: str, cases: list[Problem], device: torch.device) -> list[Finding]:
    """Run the cases in every dtype on every backend; a backend is done at its first failure."""
    findings = {name: Finding(op, name, str(device)) for name in registry.get(op).backends}
    for problem in cases:
        for dtype in DTYPES:
            expected = None
            for finding in findings.values():
                if finding.problem is None:
                    expected = expected or expect(problem, dtype, device)
                    _try(finding, problem, dtype, device, expected)
    return list(findings.values())


def _try(
    finding: Finding,
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    expected: Yardstick,
) -> None:
    where = f"{problem.label} {str(dtype).removeprefix('torch.')}"
    try:
        verdicts = judge(problem, dtype, device, finding.backend, expected)
    except registry.BackendRefused as error:
        finding.refused = str(error).rsplit("this call: ", 1)[-1]
        return
    except ModuleNotFoundError as error:
        finding.refused = f"{error.name} is not installed"
        return
    except Exception as error:  # whatever a kernel does, the others are still to be examined
        finding.problem = f"{where}: {type(error).__name__}: {error}".strip()
        finding.fix = _fix(problem.op, finding.backend, crashed=True)
        return
    for name, verdict in verdicts.items():
        finding.cases += 1
        finding.worst = max(finding.worst, verdict.ratio)
        if not verdict.passed:
            finding.problem = f"{where}: {name}: {verdict.problem}"
            finding.fix = _fix(problem.op, finding.backend, crashed=False)
            return


REBUILD = "pip install --force-reinstall --no-build-isolation bigkern"


def _fix(op: str, backend: str, crashed: bool) -> str:
    if registry.is_stock(backend):
        return "this is stock PyTorch itself: reinstall torch, then report what `bigkern env` prints"
    if crashed and backend in ("cpu", "cuda"):
        return f"rebuild for torch {torch.__version__}: {REBUILD}"
    if crashed and backend in ("triton", "triton_library"):
        return "install the triton that this torch wants: pip install --upgrade 'triton>=3.6'"
    return f'use stock PyTorch here, `with bigkern.use({op}="torch"):`, and report what `bigkern env` prints'


def _extension_fix() -> str:
    if info.OPS_LIBRARY is None:
        return "compile it: pip install --no-build-isolation bigkern, or `make build` in the repository"
    return f"it was perhaps compiled for another torch than {torch.__version__}: {REBUILD}"


def _show(findings: list[Finding], console: Console) -> None:
    rows = []
    for f in findings:
        refused = f"not run: {_short(f.refused)}" if f.refused and not f.cases else None
        verdict = "failed" if f.problem else refused or "passed"
        worst = f"{f.worst:.2f}" if f.cases else "-"
        rows.append((f.op, f.backend, f.device, f.cases, worst, verdict))
    console.table(("op", "backend", "device", "checks", "error/stock's", ""), rows)


def _short(reason: str) -> str:
    return "the extension did not load" if info.import_error and info.import_error in reason else reason
