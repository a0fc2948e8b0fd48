"""Makes calls number ``first`` to ``first + count`` of a kind, and prints a line before and after each.

Runs under the guarding allocator; attack.py starts it, and knows by the last line which call killed it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time

import op_calls
import public_calls
import torch
from judge import Finding, judge
from source import Call, Source
from spoil import spoil

from bigkern.core import info


def draw(kind: str, number: int) -> Call:
    source = Source(f"{kind} {number}")
    torch.manual_seed(number)
    torch.set_num_threads(source.one_of([1, 1, 1, 2, 3]))
    info.set_isa(source.one_of([*info.isas(), *[info.isas()[-1]] * 3]))
    if kind == "public":
        return source.one_of(public_calls.DRAW)(source)
    if kind == "bad":
        call = source.one_of(public_calls.FUNCTIONS)(source)
        call.gradients = False
        return spoil(source, call)
    call = source.one_of(op_calls.DRAW_OPS if kind == "op" else op_calls.DRAW_NATIVE)(source)
    for _ in range(source.one_of([0, 0, 1, 1, 1, 2])):
        call = spoil(source, call)
    return call


def make(kind: str, number: int) -> Finding | None:
    if kind == "planted":
        return planted(number)
    call = draw(kind, number)
    say("call", number, call.name)
    return judge(call, named_errors=kind == "bad")


def planted(number: int) -> Finding | None:
    """Faults that the harness must find, for its own test."""
    x = torch.empty(10)
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2:
        time.sleep(3600)
    if number == 3:
        ctypes.memset(x.data_ptr() + x.nbytes, 0, 1)
    if number == 4:
        return Finding("wrong", f"{x.sum()}")
    if number == 5:
        address = x.data_ptr()
        del x
        ctypes.memset(address, 0, 1)
    return None


def say(*words: object) -> None:
    print(*words, flush=True)


def describe(kind: str, number: int) -> None:
    call = draw(kind, number)
    spoiled = f"\nspoiled: {', '.join(call.spoiled)}" if call.spoiled else ""
    say(f"{call}{spoiled}")


def main(kind: str, first: int, count: int) -> None:
    faulthandler.enable()
    say("call", first, kind)
    for number in range(first, first + count):
        say("begin", number)
        found = make(kind, number)
        say("end", number, json.dumps([found.kind, found.message] if found else None))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
