"""A training step, and inference, of whole models: stock, stock compiled, patched, patched and compiled.

The models are one layer of torch's Transformer, and those of transformers, built from their configs with
random weights. A training step is
forward, loss, backward and AdamW's step, each contestant on weights of its own. On a CPU batches and images
are fewer and sequences shorter than in earnest; widths, depths and vocabularies never are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bigkern
from bigkern.benchmarks import breakdown
from bigkern.benchmarks import model_problems as problems
from bigkern.benchmarks.harness import BYTES, Bench, Case, Contestant, LeftOut, compiler_works
from bigkern.benchmarks.model_problems import ModelProblem, Network, call
from bigkern.benchmarks.table import Row
from bigkern.core.parity import Verdict
from bigkern.core.problem import Inputs
from bigkern.core.timing import Task

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
FEWER = "batches and lengths are cut for a CPU, widths, depths and vocabularies are not"
# What the default run compiles, at its first size, on a GPU in bfloat16: it takes up to a minute or two.
COMPILED = (("GPT-2 124M", True), ("BERT-base", False))

Size = tuple[int, int]  # rows, and their length in tokens or an image's side


class Plan(NamedTuple):
    """A network's sizes: the one that parity is judged on, and those for inference and for training."""

    network: Network
    gate: Size
    gpu: tuple[list[Size], list[Size]]
    cpu: tuple[list[Size], list[Size]]


PLANS = [
    *(
        Plan(problems.encoder_layer(D), (1, 64), ([(8, 1024)], [(8, 1024)]), (sizes, sizes))
        for D, sizes in ((768, [(1, 128), (4, 512)]), (1024, [(1, 512)]))
    ),
    Plan(problems.gpt2(), (1, 128), ([(8, 1024)], [(8, 1024)]), ([(1, 512)], [(2, 256), (1, 512)])),
    Plan(problems.bert(), (2, 64), ([(64, 128)], [(32, 512)]), ([(8, 128)], [(2, 128)])),
    Plan(problems.vit(), (1, 224), ([(64, 224)], [(64, 224)]), ([(4, 224)], [(4, 224)])),
    Plan(problems.resnet50(), (2, 224), ([(128, 224)], [(128, 224)]), ([(8, 224)], [(4, 224)])),
    Plan(problems.convnext(), (1, 224), ([(64, 224)], [(64, 224)]), ([(4, 224)], [(4, 224)])),
]
QUICK: dict[tuple[str, bool], Size] = {  # on a CPU; on a GPU these cases in full
    ("GPT-2 124M", True): (1, 64),
    ("BERT-base", False): (2, 64),
}


def cases(bench: Bench) -> list[Case]:
    """Raises Failure: transformers is not installed."""
    problems.need_transformers()
    gpu = bench.device.type == "cuda"
    if not gpu:
        bench.console.say(FEWER)
    found = []
    for plan in PLANS:
        for training in (False, True):
            sizes = (plan.gpu if gpu else plan.cpu)[training]
            if bench.quick:
                small = QUICK.get((plan.network.name, training))
                sizes = [] if small is None else sizes if gpu else [small]
            for size in sizes:
                affordable = (plan.network.name, training) in COMPILED and size == sizes[0]
                compiles = [torch.bfloat16 if gpu else torch.float32] if affordable else []
                compiles = list(BYTES) if bench.compile_all else [] if bench.quick else compiles
                found.append(case(bench, plan.network, size, training, plan.gate, compiles))
    return found


def case(
    bench: Bench,
    network: Network,
    size: Size,
    training: bool,
    gate: Size,
    compiles: Sequence[torch.dtype] = (),
) -> Case:
    """``compiles`` are the dtypes in which torch.compile takes part."""
    asked = problems.problem(network, *size, training, flops=True)
    judged = problems.problem(network, *gate, training)
    gpu = bench.device.type == "cuda"

    def judge(dtype: torch.dtype, device: torch.device) -> dict[str, Verdict]:
        torch.compiler.reset()  # what was compiled for another case counts towards a limit
        return judged.judge(dtype, device)

    def observe(row: Row, task: Task) -> Row:
        """Peak memory with what is kept between calls; and where time goes, which compiled code hides."""
        shares, peak = breakdown.profiled(task, bench.device)
        if "compile" not in row.contestant:
            bench.breakdowns.append(breakdown.Breakdown.of(row, shares))
        return replace(row, peak_mb=row.state_mb + (row.peak_mb if gpu else peak))

    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    if gpu:
        dtypes = (torch.bfloat16,) if bench.quick else (torch.bfloat16, torch.float32)
    group = ("training" if training else "inference") + ("" if gpu else ", cut for a CPU")
    return Case(
        asked,
        contestants(asked, compiles),
        None,
        dtypes,
        group,
        judge=judge,
        observe=observe,
    )


def contestants(asked: ModelProblem, compiles: Sequence[torch.dtype]) -> list[Contestant]:
    def compiled(model: nn.Module, inputs: Inputs) -> nn.Module:
        like = inputs[problems.LIKE]
        if like.dtype not in compiles:
            raise LeftOut("compiling takes too long for this run; --compile includes it")
        if not compiler_works(like.device.type):
            raise LeftOut("torch.compile does not work here")
        return torch.compile(model, dynamic=False)  # type: ignore[return-value]

    stock, ours, fused = torch.optim.AdamW, bigkern.optim.AdamW, {"fused": True}
    found = [
        _entrant(asked, "bigkern", _patched, ours),
        _entrant(asked, "eager", _stock, stock),
    ]
    if asked.training:
        found.append(_entrant(asked, "eager-fused", _stock, stock, fused))
    else:
        found.append(_entrant(asked, "bigkern-frozen", _frozen, ours))
    return [
        *found,
        _entrant(asked, "compile", _stock, stock, fused, compiled),
        _entrant(asked, "bigkern-compile", _patched, ours, {}, compiled),
    ]


# ---- a model and what runs it ------------------------------------------------------------------------


Built = tuple[nn.Module, str]  # and the backends that its modules run on


def _stock(asked: ModelProblem, inputs: Inputs) -> Built:
    return asked.model(inputs), "torch"


def _patched(asked: ModelProblem, inputs: Inputs) -> Built:
    model, report = asked.patched(inputs)
    backends = sorted({row.backend for row in report if row.op != "-"})
    return model, "+".join(backends) or "torch"


def _frozen(asked: ModelProblem, inputs: Inputs) -> Built:
    model, backends = _patched(asked, inputs)
    if bigkern.freeze(model, "packed").patched == 0:
        raise LeftOut("has nothing to freeze")
    return model, backends


def _entrant(
    asked: ModelProblem,
    name: str,
    build: Callable[[ModelProblem, Inputs], Built],
    optimizer: type[torch.optim.Optimizer],
    options: dict[str, Any] | None = None,
    compiled: Callable[[nn.Module, Inputs], nn.Module] = lambda model, inputs: model,
) -> Contestant:
    """The model lives as long as its tasks do: the next case needs the memory."""
    seen: dict[str, Any] = {}

    def tasks(inputs: Inputs) -> dict[str, Task]:
        compiled(nn.Identity(), inputs)  # refuses before anything is built
        model, seen["backends"] = build(asked, inputs)
        runs = compiled(model, inputs)
        if runs is not model:
            seen["backends"] = "inductor" if build is _stock else f"inductor+{seen['backends']}"
        seen["model"] = weakref.ref(runs)
        if not asked.training:
            return {"inference": Task(_inference(runs, inputs), state=lambda: _megabytes(_held(model)))}
        steps: Any = optimizer(model.parameters(), **HYPER, **(options or {}))
        kept = lambda: _megabytes([*_held(model), *_states(steps)])  # noqa: E731
        return {"training": Task(_training(runs, steps, inputs), state=kept)}

    def results(inputs: Inputs) -> dict[str, Tensor]:
        return asked.results(seen["model"](), inputs)

    return Contestant(name, tasks, lambda inputs: str(seen["backends"]), results)


def _inference(model: nn.Module, inputs: Inputs) -> Callable[[Any], Any]:
    def run(_: Any) -> Any:
        with torch.no_grad():
            return call(model, inputs)

    return run


def _training(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs) -> Callable[[Any], Any]:
    def run(_: Any) -> None:
        call(model, inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _held(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and weights that a frozen layer has laid out anew."""
    plain = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    return [*model.parameters(), *model.buffers(), *plain]


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


def _megabytes(tensors: list[Tensor]) -> float:
    """Of the memory behind them, each block counted once."""
    blocks = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(blocks.values()) / 2**20
