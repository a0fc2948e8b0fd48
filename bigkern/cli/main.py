"""``bigkern <command>``: finds the command, runs it, turns a :class:`Failure` into one line."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from importlib import import_module

import torch

from bigkern.terminal.console import INTERRUPTED, Console, Failure

COMMANDS = {  # name -> its module, and what it does
    "env": ("bigkern.cli.env", "versions, build, devices, and which backend runs each op here"),
    "doctor": ("bigkern.cli.doctor", "test every op on every backend of this machine against float64"),
    "tune": ("bigkern.cli.tune", "measure every op's candidates here, so that the fastest runs"),
    "bench": ("bigkern.benchmarks.cli", "benchmark the kernels against stock PyTorch on this machine"),
    "train": ("bigkern.cli.train", "train a small model from end to end, beside stock PyTorch if you like"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="bigkern", description="Fused kernels for PyTorch.")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        import_module(module).add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0: good; 1: the command failed, or found a problem; 2: a wrong call; 130: interrupted.
    """
    arguments = parser().parse_args(argv)
    console = Console(arguments.json)
    try:
        module, _ = COMMANDS[arguments.command]
        return int(import_module(module).run(arguments, console))
    except KeyboardInterrupt:
        code, words = INTERRUPTED, "interrupted"
    except Failure as failure:
        code, words = failure.code, str(failure)
    except (MemoryError, RuntimeError) as error:
        if not _of_memory(error):
            raise
        code, words = 1, f"out of memory: {error}"
    with suppress(OSError):
        print(f"bigkern {arguments.command}: {' '.join(words.split())}", file=sys.stderr, flush=True)
    return code


def _of_memory(error: Exception) -> bool:
    """Return whether torch or Python ran out of memory; torch says so on a CPU only in its message."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
