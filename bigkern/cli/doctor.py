"""``bigkern doctor``: every op on every backend of this machine, held to parity with float64, in seconds."""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bigkern.cli.env import devices
from bigkern.core import evidence, info, registry
from bigkern.core.parity import Yardstick
from bigkern.core.problem import Problem, expect, judge
from bigkern.ops import problems
from bigkern.terminal.console import Console, RunFailed, machine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify",
        action="store_true",
        help="record the GPU kernels that pass, so that they are used by default on this machine",
    )


@dataclass
class Finding:
    """What the cases of one op on one backend and device said."""

    op: str
    backend: str
    device: str
    cases: int = 0
    worst: float = 0.0  # smallest factor of the parity rule that all would still pass
    problem: str | None = None
    refused: str | None = None
    fix: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and self.refused is None


def run(arguments: argparse.Namespace, console: Console) -> int:
    began = time.perf_counter()
    findings = []
    for device in devices():
        for op in problems.OPS:
            cases = problems.small(op)
            cases += problems.thorough(op) if arguments.verify and device.type == "cuda" else []
            findings += examine(op, cases, device)
    _show(findings, console)
    failures = [finding for finding in findings if finding.problem]
    if info.import_error is not None:
        console.say(f"\nthe compiled extension did not load: {info.import_error}\n  fix: {_extension_fix()}")
    for failure in failures:
        console.say(f"\n{failure.op} on {failure.backend}: {failure.problem}\n  fix: {failure.fix}")
    recorded = verify(findings) if arguments.verify else None
    if recorded is not None:
        console.say(f"\n{_recorded_words(recorded)}")
    bad = len(failures) + (info.import_error is not None)
    verdict = _count(bad, "problem") if bad else "all well"
    tested = sum(finding.cases for finding in findings)
    console.say(f"\n{tested} checks in {time.perf_counter() - began:.1f} s: {verdict}")
    console.emit(
        {
            "machine": machine(),
            "import_error": info.import_error,
            "findings": [asdict(finding) for finding in findings],
            "recorded": recorded and [asdict(entry) for entry in recorded],
            "passed": bad == 0,
        }
    )
    return 1 if bad else 0


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def examine(op: str, cases: list[Problem], device: torch.device) -> list[Finding]:
    """Run the cases in every dtype on every backend; a backend is done at its first failure or refusal."""
    findings = {name: Finding(op, name, str(device)) for name in registry.get(op).backends}
    for problem in cases:
        for dtype in DTYPES:
            expected = None
            for finding in findings.values():
                if finding.passed:
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
        verdict = "failed" if f.problem else f"not run: {_short(f.refused)}" if f.refused else "passed"
        worst = f"{f.worst:.2f}" if f.cases else "-"
        rows.append((f.op, f.backend, f.device, f.cases, worst, verdict))
    console.table(("op", "backend", "device", "checks", "error/stock's", ""), rows)


def _short(reason: str) -> str:
    return "the extension did not load" if info.import_error and info.import_error in reason else reason


# ---- --verify --------------------------------------------------------------------------------------


def verify(findings: list[Finding]) -> list[evidence.Entry]:
    """Record the CUDA and Triton kernels that passed on a GPU; returns what was recorded."""
    entries = []
    for f in findings:
        device = torch.device(f.device)
        if f.passed and not registry.is_stock(f.backend) and device.type == "cuda":
            entries.append(
                evidence.Entry(
                    op=f.op,
                    backend=f.backend,
                    arch=evidence.device_arch(device.index),
                    cases=f.cases,
                    machine=f"{torch.cuda.get_device_name(device)}, {platform.system()}",
                    torch=torch.__version__,
                    bigkern=machine()["bigkern"],
                )
            )
    if entries:
        try:
            evidence.write(evidence.user_file(), entries)
        except (OSError, ValueError) as error:
            raise RunFailed(f"cannot record in {evidence.user_file()}: {error}") from error
    return entries


def _recorded_words(entries: list[Any]) -> str:
    if not entries:
        return "nothing to record: no GPU kernel passed on a GPU here"
    names = ", ".join(f"{e.op} ({e.backend}, {e.arch})" for e in entries)
    return f"recorded in {evidence.user_file()}: {names}"
