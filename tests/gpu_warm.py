"""Compile the Triton kernels that doctor asks for, side by side, into Triton's cache.

One after the other takes minutes, most of a GPU run. Each process calls every Nth problem once and throws the
result away: whether it is right is doctor's question, and so is whether it runs at all.

    python tests/gpu_warm.py [PROCESSES]
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from bigkern.cli.doctor import DTYPES
from bigkern.core.problem import results
from bigkern.core.registry import BackendRefused, use
from bigkern.ops import problems


def calls() -> list[tuple[problems.Problem, torch.dtype]]:
    asked = [p for op in problems.OPS for p in (*problems.small(op), *problems.thorough(op))]
    return [(problem, dtype) for problem in asked for dtype in DTYPES]


def warm(first: int, step: int, device: torch.device, backend: str = "triton") -> list[str]:
    """Run every ``step``th call from ``first`` on; returns what failed, in words."""
    failed = []
    for problem, dtype in calls()[first::step]:
        try:
            with use(backend):
                results(problem.ours, problem.make(dtype, device), problem.outputs)
        except BackendRefused:
            continue
        except Exception as error:  # doctor will say it better
            failed.append(f"{problem.label}: {type(error).__name__}")
    return failed


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(*warm(int(sys.argv[1]), int(sys.argv[2]), torch.device("cuda", 0)), sep="\n")
    else:
        count = int(sys.argv[1]) if len(sys.argv) > 1 else min(12, os.cpu_count() or 1)
        started = [subprocess.Popen([sys.executable, __file__, str(i), str(count)]) for i in range(count)]
        sys.exit(max(process.wait() for process in started))
