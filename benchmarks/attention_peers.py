"""Who attention is measured against, by name: torch's own ways, FlexAttention, flash-attn and xformers.

Each peer gets what it needs (a mask, a block mask, another layout) made beforehand, outside the time. What is
not installed is not here; what refuses a case says so itself, and the harness writes it down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigkern.benchmarks.harness import Contestant, LeftOut, by_autograd, compiler_works
from bigkern.core.problem import Inputs, Problem
from bigkern.core.timing import Task

Left = int | None  # how many keys before its own a query of a causal window sees; None: all


def dense(
    problem: Problem, device: torch.device, causal: bool, left: Left = None, with_flex: bool = True
) -> list[Contestant]:
    """The peers of q, k and v with a causal rule, a window or a bias; stock first."""
    found = [sdpa(problem), *(forced_sdpa(problem, way) for way in WAYS[device.type])]
    found += [flex(problem, causal, left)] if with_flex and compiler_works(device.type) else []
    return found + (_of_others(problem, causal, left) if device.type == "cuda" else [])


def packed(problem: Problem, device: torch.device, causal: bool, lengths: list[int]) -> list[Contestant]:
    """The peers of sequences behind each other."""
    found = [by_autograd("sdpa", problem.stock, "a call for each sequence")]
    if device.type == "cuda":
        found += [
            _nested(causal, max(lengths)),
            *_torch_varlen(problem, causal),
            *_flash_varlen(problem, causal),
        ]
    return found


def decoding(problem: Problem, device: torch.device, lengths: list[int], paged: bool) -> list[Contestant]:
    """The peers of one new query for each sequence."""
    found = _sdpa_over_cache(problem, lengths, paged)
    return found + (_flash_decoding(problem) if device.type == "cuda" else [])


# ---- scaled_dot_product_attention -------------------------------------------------------------------

WAYS = {"cpu": ("flash", "math"), "cuda": ("flash", "cudnn", "efficient", "math")}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SCORES = {"cpu": 1 << 24, "cuda": 1 << 28}  # so many the math way may keep


def sdpa(problem: Problem) -> Contestant:
    """Stock: whatever torch chooses, which the column ``backend`` names."""
    return by_autograd("sdpa", problem.stock, partial(sdpa_choice, problem))


def sdpa_choice(problem: Problem, inputs: Inputs) -> str:
    """Which of its own implementations torch takes for this call; two if a graph makes a difference."""
    (q, k, v), options = problem.arguments(inputs)
    mask = inputs.get("seen")
    if "bias" in inputs:
        mask = inputs["bias"].unsqueeze(0)
    corner = bool(options["causal"]) and mask is None

    def choice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
        grouped = q.shape[1] != k.shape[1]
        number = torch._fused_sdp_choice(q, k, v, mask, is_causal=corner, enable_gqa=grouped)
        return SDPBackend(number).name.removesuffix("_ATTENTION").lower()

    with torch.no_grad():
        forward = choice(*(x if x is None else x.detach() for x in (q, k, v, mask)))
    return "/".join(dict.fromkeys([forward, choice(q, k, v, mask)]))


def forced_sdpa(problem: Problem, way: str) -> Contestant:
    """One of torch's implementations, unless it is the one that torch chooses anyway."""
    contestant = by_autograd(f"sdpa-{way}", problem.stock, way, partial(sdpa_kernel, BACKENDS[way]))

    def tasks(inputs: Inputs) -> dict[str, Task]:
        if sdpa_choice(problem, inputs) == way:
            return {}
        B, S, H, _D = inputs["q"].shape
        scores = B * H * S * inputs["k"].shape[1]
        if way == "math" and scores > SCORES[inputs["q"].device.type]:
            raise LeftOut(f"{scores / 1e6:.0f} M scores do not fit")
        return contestant.tasks(inputs)

    return replace(contestant, tasks=tasks)


# ---- FlexAttention ----------------------------------------------------------------------------------


def flex(problem: Problem, causal: bool, left: Left) -> Contestant:
    """torch's FlexAttention, compiled for this very shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, blocks: Any) -> Any:
        def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert bias is not None
            return score + bias[h, i, j]

        return flex_attention(q, k, v, score_mod=None if bias is None else biased, block_mask=blocks)

    compiled = torch.compile(attend, dynamic=False, fullgraph=True)

    @cache
    def blocks(Sq: int, Sk: int, device: torch.device) -> Any:
        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j <= (Sk if left is None else left))

        return create_block_mask(seen, None, None, Sq, Sk, device=str(device)) if causal else None

    def call(inputs: Inputs) -> Any:
        (q, k, v), _ = problem.arguments(inputs)
        return compiled(q, k, v, inputs.get("bias"), blocks(q.shape[2], k.shape[2], q.device))

    contestant = by_autograd("flex", call, "inductor")

    def tasks(inputs: Inputs) -> dict[str, Task]:
        torch.compiler.reset()  # or the cases before this one count as recompilations of it
        return contestant.tasks(inputs)

    return replace(contestant, tasks=tasks)


# ---- packed sequences -------------------------------------------------------------------------------


def _nested(causal: bool, longest: int) -> Contestant:
    """SDPA of jagged nested tensors."""

    def call(inputs: Inputs) -> Any:
        ends = inputs["q_ends"].long()
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(inputs[name], ends, max_seqlen=longest).transpose(1, 2)
            for name in "qkv"
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).values()

    return by_autograd("sdpa-nested", call, "nested")


def _torch_varlen(problem: Problem, causal: bool) -> list[Contestant]:
    varlen = _imported("torch.nn.attention.varlen", "varlen_attn")
    if varlen is None:
        return []

    def call(inputs: Inputs) -> Any:
        packed, _ = problem.arguments(inputs)
        return varlen(*packed, window_size=(-1, 0) if causal else (-1, -1))

    return [by_autograd("torch-varlen", call, "flash")]


def _flash_varlen(problem: Problem, causal: bool) -> list[Contestant]:
    def call(function: Any, inputs: Inputs) -> Any:
        packed, _ = problem.arguments(inputs)
        return _first(function(*packed, causal=causal))

    return _flash_attn("flash_attn_varlen_func", call)


# ---- decoding ---------------------------------------------------------------------------------------


def _sdpa_over_cache(problem: Problem, lengths: list[int], paged: bool) -> list[Contestant]:
    """What people do: slice the cache if all sequences are of one length, else mask it; gather pages first.

    Where query heads share keys, a second one makes them rows of one head, so that no key is read twice.
    """
    same, longest = len(set(lengths)) == 1, max(lengths)

    @cache
    def mask(device: torch.device) -> Tensor | None:
        ends = torch.tensor(lengths, device=device).view(-1, 1, 1, 1)
        return None if same else torch.arange(longest, device=device) < ends

    def operands(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        (q, k, v, _lengths), options = problem.arguments(inputs)
        if paged:
            k, v = (x[options["page_table"]].transpose(1, 2).flatten(2, 3) for x in (k, v))
        return q, k[:, :, :longest], v[:, :, :longest]

    def plain(inputs: Inputs) -> Tensor:
        q, k, v = operands(inputs)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask(q.device), enable_gqa=grouped)

    def folded(inputs: Inputs) -> Tensor:
        q, k, v = operands(inputs)
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(rows, k, v, mask(q.device)).view(q.shape)

    way = ("gathered, " if paged else "") + ("sliced" if same else "masked")
    found = [by_autograd("sdpa", plain, way)]
    shared = problem.shapes["q"][2] != problem.shapes["cache_k"][2 if paged else 1]
    return found + ([by_autograd("sdpa-folded", folded, way)] if shared else [])


def _flash_decoding(problem: Problem) -> list[Contestant]:
    def call(function: Any, inputs: Inputs) -> Any:
        (q, k, v, lengths), options = problem.arguments(inputs)
        name = "page_table" if "page_table" in signature(function).parameters else "block_table"  # 3, and 2
        table = {name: options["page_table"]} if "page_table" in options else {}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = _first(function(q, k, v, cache_seqlens=lengths, causal=True, **table))
        return o.transpose(1, 2)

    return _flash_attn("flash_attn_with_kvcache", call)


# ---- packages of others -----------------------------------------------------------------------------


def _of_others(problem: Problem, causal: bool, left: Left) -> list[Contestant]:
    """flash-attn and xformers, on tensors [B, S, H, D]; neither knows a bias with a gradient."""
    if "bias" in problem.shapes:
        return []
    window = (-1 if left is None else left, 0 if causal else -1)

    def flash(function: Any, inputs: Inputs) -> Any:
        o = _first(function(inputs["q"], inputs["k"], inputs["v"], causal=causal, window_size=window))
        return o.transpose(1, 2)

    found = _flash_attn("flash_attn_func", flash)
    efficient = _imported("xformers.ops", "memory_efficient_attention")
    lower = _imported("xformers.ops", "LowerTriangularMask")
    if efficient is None or lower is None or left is not None:
        return found

    def xformers(inputs: Inputs) -> Any:
        rule = lower() if causal else None
        o = efficient(inputs["q"], inputs["k"], inputs["v"], attn_bias=rule)
        return o.transpose(1, 2)

    return [*found, by_autograd("xformers", xformers, "cutlass/flash")]


def _flash_attn(function: str, call: Callable[[Any, Inputs], Any]) -> list[Contestant]:
    """FlashAttention 2 and 3, which install under two names."""
    modules = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}
    found = {name: _imported(module, function) for name, module in modules.items()}
    return [by_autograd(name, partial(call, f), "cuda") for name, f in found.items() if f is not None]


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name, None)
    except Exception:  # absent, or built for another torch
        return None


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result
