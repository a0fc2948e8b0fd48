"""Whole recurrent layers against torch's on the same weights: LSTM, GRU, RNN, forward and training.

Not every size with every other: two layers of 256 to 512 as everybody quotes them, one line each over batch,
hidden size and length, and one case for every further form. On a GPU all batches meet all hidden sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bigkern.benchmarks import recurrent_peers as peers
from bigkern.benchmarks.harness import BYTES, Bench, Case, Contestant, by_autograd
from bigkern.benchmarks.recurrent_peers import Layer
from bigkern.benchmarks.table import Row
from bigkern.core.parity import Verdict
from bigkern.core.problem import Inputs, judge
from bigkern.core.timing import Task

KINDS = ("LSTM", "GRU")
BATCHES = (1, 8, 32, 128)
HIDDEN = (128, 256, 512, 768, 1024, 1536)
LENGTHS = (32, 256, 1024)
BOTH = (torch.float32, torch.bfloat16)
GATE_STEPS = 16  # of the problem that parity is judged on; its batch and sizes are those that are timed


def cases(bench: Bench) -> list[Case]:
    if bench.quick:
        return [_case(bench, Layer(kind, 32, 8, 256), "forms", (torch.float32,)) for kind in KINDS]
    sweeps = everywhere(bench) if bench.device.type == "cuda" else star(bench)
    return [*headline(bench), *sweeps, *forms(bench)]


def headline(bench: Bench) -> list[Case]:
    """256 to 512, two layers, 128 steps; backward alone, too, and what forward keeps for it."""
    dtypes = tuple(BYTES) if bench.device.type == "cuda" else BOTH
    asked = [Layer(kind, 128, B, 512, layers=2) for kind in KINDS for B in (32, 1)]
    return [_case(bench, layer, f"{layer.kind}, 2 layers", dtypes, alone=True) for layer in asked]


def star(bench: Bench) -> list[Case]:
    """For a CPU: sizes that take torch less than two seconds a run on two cores."""
    float16 = (*BOTH, torch.float16)  # in which torch is slow: 0.4 s for a single row's training
    found = []
    for kind in KINDS:
        found += [_swept(bench, kind, "batch", B, 128, B, 512, float16 if B == 1 else BOTH) for B in BATCHES]
        found += [_swept(bench, kind, "hidden size", H, 64, 8, H) for H in HIDDEN]
        found += [_swept(bench, kind, "length", T, T, 1, 256) for T in LENGTHS]
    return found


def everywhere(bench: Bench) -> list[Case]:
    """For a GPU: a line over the hidden size for each batch, and one over the length."""
    dtypes, found = tuple(BYTES), []
    for kind in KINDS:
        for B in BATCHES:
            found += [_swept(bench, kind, f"hidden size, batch {B}", H, 128, B, H, dtypes) for H in HIDDEN]
        found += [_swept(bench, kind, "length", T, T, 16, 768, dtypes) for T in LENGTHS]
    return found


def forms(bench: Bench) -> list[Case]:
    """Both directions, packed, the plain RNN, an LSTM with LayerNorm."""
    dtypes = tuple(BYTES) if bench.device.type == "cuda" else (torch.float32,)
    lengths = tuple(range(128, 0, -4))
    asked = [
        *(Layer(kind, 128, 32, 512, bidirectional=True) for kind in KINDS),
        *(Layer(kind, 128, 32, 512, lengths=lengths) for kind in KINDS),
        Layer("RNN", 128, 32, 512),
        Layer("LSTM", 128, 32, 512, layer_norm=True),
    ]
    return [_case(bench, layer, "forms", dtypes) for layer in asked]


# ---- a case ------------------------------------------------------------------------------------------


def _swept(
    bench: Bench,
    kind: str,
    axis: str,
    x: float,
    T: int,
    B: int,
    H: int,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> Case:
    case = _case(bench, Layer(kind, T, B, H), kind, dtypes)
    return replace(case, panel=f"{kind}: {axis}", x=x, budget=0.5)


def _case(bench: Bench, layer: Layer, group: str, dtypes: Sequence[torch.dtype], alone: bool = False) -> Case:
    """``alone``: backward is timed by itself, too."""
    problem = layer.problem()
    gate = replace(layer, T=min(layer.T, GATE_STEPS), lengths=layer.lengths[-GATE_STEPS // 4 :]).problem()
    entrants = [("bigkern", layer.ours, layer.choice), ("eager", layer.stock, layer.dispatched)]
    contestants = [_contestant(*entrant) for entrant in entrants]
    if bench.device.type == "cuda":
        contestants += [_contestant(*entrant) for entrant in peers.flashrnn(layer)]
    if not alone:
        contestants = [replace(each, tasks=_without_backward(each)) for each in contestants]
    if not bench.quick and (bench.compile_all or alone or layer.T <= peers.COMPILED_STEPS):
        contestants.append(peers.compiled(layer, bench))

    def judged(dtype: torch.dtype, device: torch.device) -> dict[str, Verdict]:
        """The fewer steps on the backends that the timed ones choose, with a graph and without."""
        inputs, found = problem.make(dtype, device), {}
        for backend in dict.fromkeys(_choices(layer, inputs)):
            verdicts = judge(gate, dtype, device, backend)
            found |= {f"{name} on {backend}": verdict for name, verdict in verdicts.items()}
        return found

    def observe(row: Row, task: Task) -> Row:
        return replace(row, step_us=1e3 * row.ms / (layer.T * layer.layers))

    return Case(problem, contestants, None, tuple(dtypes), group, judge=judged, observe=observe)


def _choices(layer: Layer, inputs: Inputs) -> Iterator[str]:
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            yield layer.choice(inputs)


def _contestant(name: str, build: peers.Build, backend: Callable[[Inputs], str]) -> Contestant:
    """A layer is built around the inputs' own tensors, once for all its tasks."""

    def output_of(inputs: Inputs) -> Callable[[Inputs], Tensor]:
        run = build(inputs)
        return lambda given: run(given["x"])[0]

    def tasks(inputs: Inputs) -> dict[str, Task]:
        return by_autograd(name, output_of(inputs), backend).tasks(inputs)

    def results(inputs: Inputs) -> dict[str, Tensor]:
        compared = by_autograd(name, output_of(inputs), backend).results
        assert compared is not None
        return compared(inputs)

    return Contestant(name, tasks, backend, results)


def _without_backward(contestant: Contestant) -> Callable[[Inputs], dict[str, Task]]:
    return lambda inputs: {m: task for m, task in contestant.tasks(inputs).items() if m != "backward"}
