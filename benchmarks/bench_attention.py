"""Attention against torch's own, and flash-attn where it is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bigkern.benchmarks.harness import Bench, Case, Contestant, by_autograd, ours
from bigkern.cli import problems
from bigkern.cli.problems import Inputs, Problem

GPU_DTYPES = (torch.bfloat16,)


def cases(bench: Bench) -> list[Case]:
    if bench.device.type == "cuda":
        lengths = (1024, 4096) if bench.quick else (512, 1024, 2048, 4096, 8192, 16384)
        # 16k tokens in all, 2048 wide: the layout that published numbers use.
        sizes = [(16384 // S, 2048 // D, S, D) for D in (64, 128) for S in lengths]
        return [
            _case(
                problems.attention(B, H, S, D, causal),
                problems.attention(1, 2, min(S, 1024), D, causal),
                GPU_DTYPES,
            )
            for B, H, S, D in sizes
            for causal in (False, True)
        ]
    sizes = [(2, 8, 256, 64)] if bench.quick else [(8, 4, 256, 64), (4, 12, 512, 64), (1, 8, 2048, 128)]
    found = [_case(problems.attention(*size, causal)) for size in sizes for causal in (False, True)]
    if not bench.quick:
        found.append(_case(problems.attention(4, 16, 1, 128, kv_heads=4, keys=2048)))  # a decoding step
    return found


def _case(
    problem: Problem, gate: Problem | None = None, dtypes: tuple[torch.dtype, ...] | None = None
) -> Case:
    contestants = [
        ours(problem),
        by_autograd("sdpa", problem.stock, lambda inputs: sdpa_backend(problem, inputs)),
    ]
    contestants += _flash_attn(problem)
    return Case(problem, contestants, gate, dtypes or (torch.float32, torch.bfloat16))


def sdpa_backend(problem: Problem, inputs: Inputs) -> str:
    """Which of its own implementations torch takes for this call."""
    (q, k, v), options = problem.arguments(inputs)
    grouped = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, is_causal=bool(options["causal"]), enable_gqa=grouped)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def _flash_attn(problem: Problem) -> list[Contestant]:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return []

    def call(inputs: Inputs) -> Tensor:
        _, options = problem.arguments(inputs)
        out: Any = flash_attn_func(inputs["q"], inputs["k"], inputs["v"], causal=bool(options["causal"]))
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return [by_autograd("flash-attn", call, "cuda")]
