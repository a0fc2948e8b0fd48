"""The feed-forward block with its norm, at the sizes of known models, against eager torch, compile, Liger."""

from __future__ import annotations

from torch import Tensor

from bigkern.benchmarks.harness import Bench, Case, Contestant, by_autograd, compiled, ours
from bigkern.core.problem import Inputs, Problem
from bigkern.ops.layernorm_ffn.problems import layernorm_ffn


def cases(bench: Bench) -> list[Case]:
    if bench.quick:
        return [_case(bench, layernorm_ffn(512, 256, 1024), "sizes")]
    return [*sizes(bench), *models(bench)]


def sizes(bench: Bench) -> list[Case]:
    """Tokens x D x F of pre-norm blocks with gelu; one of them saves its input alone, stock by checkpoint."""
    if bench.device.type == "cuda":
        found = [(M, D, 4 * D) for D in (768, 1024, 2048, 4096) for M in (2048, 16384)]
    else:
        found = [(128, 768, 3072), (2048, 768, 3072), (512, 1024, 4096), (2048, 512, 2048)]
    cases = [_case(bench, layernorm_ffn(*size), "sizes") for size in found]
    return [*cases, _case(bench, layernorm_ffn(*found[1], save="input"), "save input")]


def models(bench: Bench) -> list[Case]:
    """One layer of each: on a GPU of 16k tokens or 64 images, on a CPU of a part of them, and said so."""
    gpu = bench.device.type == "cuda"
    tokens, images = (16384, 64) if gpu else (1024, 4)
    problems = [
        layernorm_ffn(tokens, 768, 3072, "gelu_tanh", name="GPT-2"),
        layernorm_ffn(tokens, 768, 3072, "gelu", "post", name="BERT-base"),
        layernorm_ffn(197 * images, 768, 3072, "gelu", name="ViT-B/16"),
        layernorm_ffn(tokens, 2048, 8192, "swiglu", norm="rms", name="Llama 3.2 1B"),
        layernorm_ffn(14 * 14 * images, 384, 1536, "gelu", name="ConvNeXt-T stage 3"),
    ]
    if gpu:
        problems.append(layernorm_ffn(tokens, 4096, 14336, "swiglu", norm="rms", name="Llama 3.1 8B"))
    return [_case(bench, problem, "models") for problem in problems]


def _case(bench: Bench, problem: Problem, group: str) -> Case:
    contestants = [ours(problem), by_autograd("eager", problem.stock, "torch")]
    contestants += [] if bench.quick else compiled(problem, bench.device, autotuned=True)
    gate = None
    if bench.device.type == "cuda":  # float64 is slow there, and the largest do not fit
        gate = layernorm_ffn(512, 768, 3072)
        contestants += _liger(problem)
    return Case(problem, contestants, gate, group=group)


def _liger(problem: Problem) -> list[Contestant]:
    """Liger has the pieces of Llama's block: RMSNorm, and silu(gate) * up between torch's products."""
    if "b1" in problem.shapes:
        return []
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return []

    def call(inputs: Inputs) -> Tensor:
        x = inputs["x"]
        n = LigerRMSNormFunction.apply(x, inputs["norm_weight"], 1e-5)
        gate, up = (n @ inputs["w1"].t()).chunk(2, dim=-1)
        return x + LigerSiLUMulFunction.apply(gate, up) @ inputs["w2"].t()  # type: ignore[no-any-return]

    return [by_autograd("liger", call, "triton")]
