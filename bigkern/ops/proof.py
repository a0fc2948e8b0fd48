"""Prove GPU kernels: every case of an op, by a candidate, held to parity, in a process of its own.

A kernel that crashes takes its process and the GPU's context with it, one that hangs keeps both. So the cases
run in a worker, which says which one it begins; if it falls silent or dies, that case counts as a crash and
another worker goes on after it. Workers of several candidates run side by side, which is also how Triton's
kernels are compiled at the same time: proofs need no quiet machine.

    python -m bigkern.ops.proof OP CANDIDATE DEVICE FIRST      a worker: the cases from FIRST on
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, cast

import torch

from bigkern.core import evidence, registry
from bigkern.core.evidence import CRASH, FAIL, PASS, Verdicts
from bigkern.core.problem import Problem, judge
from bigkern.ops import problems

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SILENT = 180.0  # seconds, after which a worker hangs: some kernels take a minute to compile
COMMAND = (sys.executable, "-m", "bigkern.ops.proof")
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))

_GRAVITY = (PASS, FAIL, CRASH)


@dataclass(slots=True)
class Proof:
    """Of a candidate on a device: the verdict on each variant of its calls, and what went wrong."""

    op: str
    candidate: str
    device: torch.device
    verdicts: Verdicts = field(default_factory=dict)
    cases: int = 0
    troubles: list[str] = field(default_factory=list)
    unwritten: str | None = None  # why it could only be kept for this process

    def add(self, verdict: str, variants: Sequence[str], trouble: str = "") -> None:
        for variant in variants:
            self.verdicts[variant] = max(self.verdicts.get(variant, PASS), verdict, key=_GRAVITY.index)
        self.cases += 1
        self.troubles += [trouble] if trouble else []


def cases(op: str) -> list[tuple[torch.dtype, Problem]]:
    """In the order in which they are run."""
    return [(dtype, problem) for dtype in DTYPES for problem in problems.proof(op)]


def unproven(ops: Sequence[str], device: torch.device) -> list[tuple[str, str]]:
    """Ops with those candidates that can run there, and have not passed all that they were asked."""
    jobs = []
    for op in ops:
        calls = [problems.bound(problem, torch.float32, device) for problem in problems.small(op)]
        for name, backend in registry.get(op).backends.items():
            if name.startswith(("cuda", "triton")) and any(backend.refuses(call) is None for call in calls):
                known = evidence.verdicts(op, name, device.index or 0)
                whole = {variant.split()[0] for variant in known} >= {word(dtype) for dtype in DTYPES}
                jobs += [] if whole and set(known.values()) == {PASS} else [(op, name)]
    return jobs


# ---- the one who asks ------------------------------------------------------------------------------


def prove(
    jobs: Sequence[tuple[str, str]], device: torch.device, tell: Callable[[Proof, str], None]
) -> list[Proof]:
    """Prove candidates, as ``("attention", "triton")``, and record what is found, dtype by dtype.

    ``tell`` is given the proof and the case's label, after each case.

    Raises:
        KeyboardInterrupt: what was recorded until then stays.
    """
    crew = _Crew(tell)
    with ThreadPoolExecutor(WORKERS) as pool:
        running = [pool.submit(crew.prove, Proof(*job, device)) for job in jobs]
        try:
            return [future.result() for future in running]
        finally:
            crew.stop()


class _Crew:
    """The workers of all candidates."""

    def __init__(self, tell: Callable[[Proof, str], None]):
        self.tell, self.lock, self.stopped = tell, threading.Lock(), False
        self.workers: set[subprocess.Popen[str]] = set()

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for worker in self.workers:
                worker.kill()

    def prove(self, proof: Proof) -> Proof:
        every, done = cases(proof.op), 0
        while done < len(every):
            begun: dict[str, Any] | None = None
            for said in self.worker(proof, done):
                begun, ended = said, "verdict" in said
                if ended and said["verdict"] is not None:
                    proof.add(said["verdict"], said["variants"], said["trouble"])
                if ended:
                    begun, done = None, said["case"] + 1
                    self.through(proof, every, done)
            if self.stopped:
                return proof
            if begun is not None:
                done = begun["case"] + 1
                label, dtype = every[begun["case"]][1].label, word(every[begun["case"]][0])
                proof.add(CRASH, begun["variants"], f"{label} {dtype}: the process died or fell silent")
                self.through(proof, every, done)
            elif done < len(every):
                proof.troubles.append("the worker did not start")
                return proof
        return proof

    def through(self, proof: Proof, every: Sequence[tuple[torch.dtype, Problem]], done: int) -> None:
        """Tell of a case; and record a dtype at its end, as half of a variant's cases prove nothing."""
        dtype, problem = every[done - 1]
        with self.lock:
            if self.stopped:
                return
            self.tell(proof, problem.label)
            if done == len(every) or every[done][0] != dtype:
                through = [word(of) for of in DTYPES[: DTYPES.index(dtype) + 1]]
                found = {name: v for name, v in proof.verdicts.items() if name.split()[0] in through}
                where = proof.device.index or 0
                proof.unwritten = evidence.record(proof.op, proof.candidate, where, found)

    def worker(self, proof: Proof, first: int) -> Iterator[dict[str, Any]]:
        """What a worker says, line by line, until it ends; one that is silent for too long is killed."""
        command = [*COMMAND, proof.op, proof.candidate, str(proof.device), str(first)]
        with self.lock:
            if self.stopped:
                return
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
            )
            self.workers.add(process)
        try:
            while True:
                watch = threading.Timer(SILENT, process.kill)
                watch.start()
                line = cast(IO[str], process.stdout).readline()
                watch.cancel()
                if not line:
                    return
                if line.startswith("{"):
                    yield json.loads(line)
        finally:
            process.kill()
            process.wait()
            with self.lock:
                self.workers.discard(process)


# ---- the worker ------------------------------------------------------------------------------------


def work(op: str, candidate: str, device: torch.device, first: int) -> None:
    """Run the cases from ``first`` on; say of each that it begins, and what came of it."""
    for number, (dtype, problem) in list(enumerate(cases(op)))[first:]:
        try:
            variants = registry.get(op).variants(problems.bound(problem, dtype, device))
        except ValueError:  # no call on this device: fp8 where no unit multiplies in it
            _say(case=number, variants=[], verdict=None, trouble="")
            continue
        _say(case=number, variants=variants)
        verdict, trouble = _judged(problem, dtype, device, candidate)
        _say(case=number, variants=variants, verdict=verdict, trouble=trouble)


def _judged(
    problem: Problem, dtype: torch.dtype, device: torch.device, candidate: str
) -> tuple[str | None, str]:
    """The verdict, or None where the candidate refuses the call; and what is wrong."""
    try:
        verdicts = judge(problem, dtype, device, candidate)
    except (registry.BackendRefused, torch.OutOfMemoryError):
        return None, ""
    except Exception as error:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a dead context raises again, and ends this process
        return FAIL, f"{problem.label} {word(dtype)}: {type(error).__name__}: {error}"
    wrong = [f"{name}: {verdict.problem}" for name, verdict in verdicts.items() if not verdict.passed]
    return (FAIL, f"{problem.label} {word(dtype)}: {wrong[0]}") if wrong else (PASS, "")


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], torch.device(sys.argv[3]), int(sys.argv[4]))
