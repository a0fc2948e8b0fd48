"""``bigkern <command>``: finds the command, runs it, turns a :class:`Failure` into one line."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from bigkern.cli.console import Console, Failure

COMMANDS = {
    "env": "versions, build, devices, and which backend runs each op here",
    "doctor": "test every op on every backend of this machine against float64",
    "bench": "benchmark the kernels against stock PyTorch on this machine",
    "train": "train a small model from end to end, beside stock PyTorch if you like",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="bigkern", description="Fused kernels for PyTorch.")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        import_module(f"bigkern.cli.{name}").add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 good, 1 the command found a problem, 2 a wrong call."""
    arguments = parser().parse_args(argv)
    console = Console(arguments.json)
    try:
        return int(import_module(f"bigkern.cli.{arguments.command}").run(arguments, console))
    except Failure as failure:
        print(f"bigkern {arguments.command}: {failure}", file=sys.stderr)
        return 2
