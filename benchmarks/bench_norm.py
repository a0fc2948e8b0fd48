"""LayerNorm and RMSNorm, with and without a residual, against eager torch, torch.compile and Liger."""

from __future__ import annotations

from torch import Tensor

from bigkern.benchmarks.harness import Bench, Case, Contestant, by_autograd, compiled, ours
from bigkern.core.problem import Inputs, Problem
from bigkern.ops.norm.problems import norm


def cases(bench: Bench) -> list[Case]:
    if bench.device.type == "cuda":
        sizes = (
            [(16384, 4096)] if bench.quick else [(16384, N) for N in (768, 1024, 4096, 8192)] + [(256, 1024)]
        )
    else:
        sizes = [(1024, 768)] if bench.quick else [(2048, 256), (2048, 768), (4096, 4096)]
    kinds = [("layer", False), ("layer", True), ("rms", False)]
    return [_case(norm(*size, *kind), bench) for size in sizes for kind in kinds]


def _case(problem: Problem, bench: Bench) -> Case:
    contestants = [ours(problem), by_autograd("eager", problem.stock, "torch")]
    contestants += [] if bench.quick else compiled(problem, bench.device)
    contestants += _liger(problem) if bench.device.type == "cuda" else []
    return Case(problem, contestants, group="norm")


def _liger(problem: Problem) -> list[Contestant]:
    """Liger's norms know no residual."""
    if "residual" in problem.shapes:
        return []
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return []

    def call(inputs: Inputs) -> Tensor:
        x, weight = inputs["x"], inputs["weight"]
        if "bias" in inputs:
            return LigerLayerNormFunction.apply(x, weight, inputs["bias"], 1e-5)  # type: ignore[no-any-return]
        return LigerRMSNormFunction.apply(x, weight, 1e-5)  # type: ignore[no-any-return]

    return [by_autograd("liger", call, "triton")]
