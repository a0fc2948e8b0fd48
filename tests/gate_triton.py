"""Compile every Triton kernel for sm_80 and sm_90 without a GPU, and hold it to limits.

    python tests/gate_triton.py [--quick] [--arch 90] [--only attention] [--csv FILE] [--json FILE]

The public functions are called as a user calls them, on meta tensors. A stand-in for the GPU driver lets
Triton's own launch path choose signature and specialization and compile; the launch itself is left out. So
what is judged is what a GPU would run, in every configuration of the tables (--quick: a sixth). The limits:

    registers   255, and what the kernel's warps leave of the 65,536 of a processor
    stack       0 bytes: nothing spills
    shared      227 KiB on sm_90; 99 KiB for sm_80's configurations, which also serve sm_86, sm_89 and sm_120
    wgmma       on sm_90, in products of 16-bit and fp8 types, of attention up to head dim 128 and in FFNs

Exits with 1 where a kernel breaks one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("gate_triton.py compiles: run it without TRITON_INTERPRET")

from bigkern.triton_kernels import adam, attention, batch_norm, layernorm_ffn, recurrent
from bigkern.triton_kernels.attention import (
    configurations as attention_configurations,
)
from bigkern.triton_kernels.attention import (
    decode as attention_decode,
)
from bigkern.triton_kernels.common import launch
from bigkern.triton_kernels.layernorm_ffn import frozen as frozen_ffn

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
REGISTERS = 65536
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SENTENCE = 1031  # ragged: the masks at the end of rows are compiled in


@dataclass(frozen=True)
class Row:
    """A compiled kernel in one configuration."""

    arch: int
    kernel: str
    case: str
    warps: int
    registers: int
    stack: int
    shared: int
    wgmma: int
    needs_wgmma: bool

    def problems(self) -> list[str]:
        found = []
        if self.stack > 0:
            found.append(f"{self.stack} bytes of stack")
        if self.registers * 32 * self.warps > REGISTERS:
            found.append(f"{self.registers} registers x {self.warps} warps")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory > {SHARED_LIMIT[self.arch]}")
        if self.needs_wgmma and self.wgmma == 0:
            found.append("no wgmma")
        return found


class NoGpu:
    """What Triton asks of a driver in order to compile, answered for an architecture that is not here."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(arch: int) -> list[tuple[str, Any]]:
    """Let launches compile for ``arch`` instead of running; the list collects (kernel name, compiled)."""
    driver.set_active(NoGpu(arch))
    compiled: list[tuple[str, Any]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append((self.fn.__name__, launch_path(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = run  # type: ignore[method-assign]
    launch.architecture = lambda device: arch
    launch.multiprocessors = lambda device: 132
    return compiled


launch_path = JITFunction.run


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory a thread: 0 if and only if nothing spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage said: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


# ---- the cases: (description, call, whether its products must be wgmma) ------------------------------

Case = tuple[str, Callable[[], object], bool]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention_cases(arch: int) -> Iterator[Case]:
    for architecture, size, D in attention_configurations.CONFIGURATIONS:
        if architecture == arch:
            name = {2: "bfloat16", 4: "float32"}[size]
            for features in FEATURES:
                needed = size == 2 and D <= 128
                for fused in (False, True):
                    text = f"{name} D={D} {features}{', fused' if fused else ''}"
                    yield text, attention_call(DTYPES[name], D, features, fused), needed


FEATURES = ("plain", "causal", "window", "packed", "packed window", "everything")


def attention_call(dtype: torch.dtype, D: int, features: str, fused: bool) -> Callable[[], object]:
    """Forward and backward: dense, packed, in a window, and with all there is; dq by atomics if ``fused``."""

    def call() -> None:
        B, H, S = 2, 8, SENTENCE
        q, k, v, do = (meta(B, S, H, D, dtype=dtype).transpose(1, 2) for _ in range(4))
        rules = attention.Rules(
            *(None,) * attention.Rules._fields.index("scale"), scale=0.125, causal="none", window_left=-1,
            window_right=-1, softcap=0.0, dropout_p=0.0, max_seqlen_q=S, max_seqlen_k=S,
        )  # fmt: skip
        dlse = None
        if features not in ("plain", "everything"):
            rules = rules._replace(causal="bottom_right", window_right=0)
        if "packed" in features:
            q, k, v, do = (x[:1] for x in (q, k, v, do))
            ends = meta(5, dtype=torch.int32)
            rules = rules._replace(cu_seqlens_q=ends, cu_seqlens_k=ends)
        if "window" in features:
            rules = rules._replace(window_left=256)
        if features == "everything":
            rules = rules._replace(
                mask=meta(B, 1, S, S, dtype=torch.bool), bias=meta(1, H, S, S, dtype=dtype),
                alibi_slopes=meta(B, H), sinks=meta(H), dropout_key=torch.tensor([1, 2]), dropout_p=0.1,
                window_left=256, window_right=256, softcap=50.0,
            )  # fmt: skip
            dlse = meta(B, H, S)
        o, lse = attention.attention(q, k, v, *rules)
        torch.use_deterministic_algorithms(not fused)
        attention.attention_backward(do, dlse, q, k, v, o, lse, rules.bias is not None, *rules)

    return call


def decode_cases() -> Iterator[Case]:
    for size, D in attention_decode.CONFIGURATIONS:
        name = {2: "bfloat16", 4: "float32"}[size]
        for paged, Sq in ((False, 1), (True, 16)):
            text = f"{name} D={D} {'paged, everything' if paged else 'contiguous'}"
            yield text, decode_call(DTYPES[name], D, paged, Sq), False


def decode_call(dtype: torch.dtype, D: int, paged: bool, Sq: int) -> Callable[[], object]:
    """A query against a contiguous cache; or the most query rows a program takes, and all there is."""

    def call() -> None:
        B, Hq, Hkv, S = 2, 8, 2, 4096
        q, lengths = meta(B, Sq, Hq, D, dtype=dtype).transpose(1, 2), meta(B, dtype=torch.int32)
        k, v = (meta(B, S, Hkv, D, dtype=dtype).transpose(1, 2) for _ in range(2))
        rules = (None, None, None, 0.125, "bottom_right", -1, 0, 0.0)
        if paged:
            k, v = (meta(100, 48, Hkv, D, dtype=dtype).transpose(1, 2) for _ in range(2))
            table = meta(B, 48, dtype=torch.int32)
            rules = (table, meta(B, Hq), meta(Hq), 0.125, "bottom_right", 1000, 0, 50.0)
        attention_decode.decode_attention(q, k, v, lengths, *rules)

    return call


def norm_cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for N in (64, 768, 1023, 4096, 8192, 16384, 65536):
            for kind in ("layer", "rms"):
                yield f"{name} N={N} {kind}", norm_call(dtype, N, kind), False


def norm_call(dtype: torch.dtype, N: int, kind: str) -> Callable[[], object]:
    def call() -> None:
        x, residual, dy = (meta(4096, N, dtype=dtype) for _ in range(3))
        weight, bias = meta(N, dtype=dtype), meta(N, dtype=dtype) if kind == "layer" else None
        dropout = (0.1, torch.tensor([1, 2])) if kind == "rms" else (0.0, None)
        _, total, mean, rstd = layernorm_ffn.norm(x, residual, weight, bias, 1e-5, kind, *dropout)
        layernorm_ffn.norm_backward(dy, dy, total, weight, mean, rstd, kind, True, kind == "layer", *dropout)

    return call


def batch_norm_cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for C in (3, 64, 1001, 2048):
            for features in ("plain", "relu", "residual relu"):
                yield f"{name} C={C} {features}", batch_norm_call(dtype, C, features), False


def batch_norm_call(dtype: torch.dtype, C: int, features: str) -> Callable[[], object]:
    """In training, and with given statistics; fp32 parameters, as under autocast."""

    def call() -> None:
        x, residual, dy = (meta(1 << 20, C, dtype=dtype) for _ in range(3))
        weight, bias, mean, var = (meta(C) for _ in range(4))
        added, relu = "residual" in features, "relu" in features
        y, _, _ = batch_norm.batch_norm(x, residual if added else None, weight, bias, None, None, 1e-5, relu)
        kept, kept_bias = (y if added and relu else None), (bias if relu and not added else None)
        saved = (dy, x, kept, weight, kept_bias, mean, var, 1e-5, relu)
        batch_norm.batch_norm_backward(*saved, True, added, True, True)
        batch_norm.batch_norm(x, residual if added else None, weight, bias, mean, var, 1e-5, relu)
        batch_norm.batch_norm_backward(*saved, False, False, False, False)

    return call


def activation_cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for activation in ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"):
            yield f"{name} {activation}", activation_call(dtype, activation), False


def activation_call(dtype: torch.dtype, activation: str) -> Callable[[], object]:
    def call() -> None:
        F = 3072
        width = 2 * F if activation in layernorm_ffn.GATED else F
        product, bias, dout = (
            meta(512, width, dtype=dtype),
            meta(width, dtype=dtype),
            meta(512, F, dtype=dtype),
        )
        key = torch.tensor([1, 2])
        layernorm_ffn.bias_activation(product, bias, activation, 0.1, key)
        layernorm_ffn.bias_activation_backward(dout, product, activation, True, True, 0.1, key)
        layernorm_ffn.dropout_add(dout, dout, 0.1, key)

    return call


def product_cases() -> Iterator[Case]:
    """An FFN's products with all that can follow them; whole tiles, ragged ones, and few rows."""
    for name, dtype in DTYPES.items():
        for activation in ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"):
            yield f"{name} {activation}", product_call(dtype, activation, 4096, 1024, 4096), True
            if activation in ("gelu", "swiglu"):
                yield f"{name} {activation} ragged", product_call(dtype, activation, 4091, 1023, 4095), True
                few = product_call(dtype, activation, 16, 128, 192)
                yield f"{name} {activation} few", few, dtype != torch.float32


def product_call(dtype: torch.dtype, activation: str, M: int, D: int, F: int) -> Callable[[], object]:
    def call() -> None:
        width = 2 * F if activation in layernorm_ffn.GATED else F
        x, w1, b1 = meta(M, D, dtype=dtype), meta(width, D, dtype=dtype), meta(width, dtype=dtype)
        w2, b2, dropout = meta(D, F, dtype=dtype), meta(D, dtype=dtype), (0.1, torch.tensor([1, 2]))
        p, a = layernorm_ffn.up(x, w1, b1, activation, dropout, True)
        layernorm_ffn.down(a, w2, b2, x, dropout)
        layernorm_ffn.up_backward(x, w2, p, activation, dropout, True, True)
        layernorm_ffn.weight_gradient(p, x, None)
        layernorm_ffn.weight_gradient(p, x, meta(width, D))

    return call


def frozen_cases(arch: int) -> Iterator[Case]:
    """Frozen weights: whole tiles, ragged ones, and few rows, where long sums are cut into spans."""
    for name, x, w in FROZEN:
        if arch < 90 and x == torch.float8_e4m3fn:
            continue  # from sm_89 on
        wgmma = x != torch.float32
        for activation in ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"):
            shapes = {"": (4096, 1024, 4096)}
            if activation in ("gelu", "swiglu"):
                shapes |= {"ragged": (4091, 1023, 4095), "short": (4096, 128, 192)}
                shapes |= {f"{M} rows": (M, 1024, 1536) for M in (1, 64)}
                shapes |= {f"{M} rows, spans": (M, 2048, 4096) for M in (1, 64)}
            for shape, sizes in shapes.items():
                call = frozen_call(x, w, activation, *sizes)
                yield f"{name} {activation} {shape}".rstrip(), call, wgmma
    if arch == 90:
        for name, dtype in DTYPES.items():
            for N in (64, 1023, 4096, 16384, 65536):
                yield f"{name} N={N}", quantize_call(dtype, N), False


FROZEN = (
    ("float32 int8", torch.float32, torch.int8),
    ("bfloat16 int8", torch.bfloat16, torch.int8),
    ("float16 int8", torch.float16, torch.int8),
    ("e4m3", torch.float8_e4m3fn, torch.float8_e4m3fn),
)


def frozen_call(
    x_dtype: torch.dtype, w_dtype: torch.dtype, activation: str, M: int, D: int, F: int
) -> Callable[[], object]:
    def call() -> None:
        fp8 = x_dtype == torch.float8_e4m3fn
        dtype = torch.bfloat16 if fp8 else x_dtype
        N = 2 * F if activation in layernorm_ffn.GATED else F
        x, a, scale = meta(M, D, dtype=x_dtype), meta(M, F, dtype=x_dtype), meta(M) if fp8 else None
        w1, b1, w2, b2 = meta(N, D, dtype=w_dtype), meta(N), meta(D, F, dtype=w_dtype), meta(D)
        frozen_ffn.frozen_up(x, scale, w1, meta(N), b1.to(dtype), activation, dtype)
        frozen_ffn.frozen_down(a, scale, w2, meta(D), b2.to(dtype), meta(M, D, dtype=dtype), dtype)

    return call


def quantize_call(dtype: torch.dtype, N: int) -> Callable[[], object]:
    return lambda: frozen_ffn.quantize_rows(meta(4096, N, dtype=dtype))


def adam_cases() -> Iterator[Case]:
    """Every way to store p and the moments, plain and with all options."""
    for name, dtype in DTYPES.items():
        masters = (None, torch.float32, torch.int16) if dtype == torch.bfloat16 else (None,)
        for moments, master in product((torch.float32, torch.bfloat16, torch.uint8), masters):
            stored = "".join(f" {str(x).removeprefix('torch.')}" for x in (moments, master) if x is not None)
            for decoupled in (True, False):
                text = f"{name}{stored} {'AdamW' if decoupled else 'Adam, all options'}"
                yield text, adam_call(dtype, moments, master, decoupled), False
        yield f"{name} norm", grad_norm_call(dtype), False


def adam_call(
    dtype: torch.dtype, moments: torch.dtype, master: torch.dtype | None, decoupled: bool
) -> Callable[[], object]:
    def call() -> None:
        codes, extras = moments == torch.uint8, not decoupled
        p, g = ([meta(100_000, dtype=dtype)] for _ in range(2))
        m, v, vmax = ([meta(100_000, dtype=moments)] for _ in range(3))
        masters = [] if master is None else [meta(100_000, dtype=master)]
        scales, amsgrad = [meta(391)] if codes else [], extras and not codes
        scalar = meta(1) if extras else None
        hyper = (1e-3, 0.9, 0.999, 1e-8, 0.1, decoupled, amsgrad, extras, False, 1.0, 7 if extras else None)
        adam.adam(
            p, g, m, v, vmax if amsgrad else [], [meta(1)], masters, scales, scales, *hyper, scalar, scalar,
            scalar, scalar,
        )  # fmt: skip

    return call


def grad_norm_call(dtype: torch.dtype) -> Callable[[], object]:
    return lambda: adam.grad_norm([meta(100_000, dtype=dtype)])


def recurrent_cases() -> Iterator[Case]:
    """Few sequences without a backward; many, of which some end early, in whole tiles and ragged ones."""
    for name, dtype in DTYPES.items():
        for mode in recurrent.GATES:
            yield f"{name} {mode} few", recurrent_call(dtype, mode, [16], 512, few=True), False
            yield f"{name} {mode} packed", recurrent_call(dtype, mode, [512, 511, 2], 1024), False
            yield f"{name} {mode} ragged", recurrent_call(dtype, mode, [512, 511, 2], 1023), False


def recurrent_call(
    dtype: torch.dtype, mode: str, counts: list[int], H: int, few: bool = False
) -> Callable[[], object]:
    """Forward and backward, in both directions and with zoneout; few: one direction's forward, no more."""

    def call() -> None:
        N, D, B, width = sum(counts), 1 if few else 2, counts[0], recurrent.GATES[mode] * H
        gates, w_hh = meta(N, D * width, dtype=dtype), meta(width, H, dtype=dtype)
        h0, y = meta(D, B, H, dtype=dtype), meta(N, D * H, dtype=dtype)
        c0, reverse = h0 if mode == "LSTM" else None, None if few else w_hh
        bias_n = meta(D, H, dtype=dtype) if mode == "GRU" else None
        rest = (None, None) if few else (torch.tensor(counts), y)
        recurrent.recurrent_scan(gates, h0, c0, w_hh, reverse, bias_n, *rest, mode, not few)
        if not few:
            saved = (*rest, y, None if mode.startswith("RNN") else meta(N, D * H), mode)
            recurrent.recurrent_scan_backward(y, h0, c0, gates, h0, c0, w_hh, reverse, *saved)

    return call


OPS: dict[str, Callable[[int], Iterator[Case]]] = {
    "attention": attention_cases,
    "decode": lambda arch: decode_cases(),
    "norm": lambda arch: norm_cases(),
    "batch_norm": lambda arch: batch_norm_cases(),
    "activation": lambda arch: activation_cases(),
    "products": lambda arch: product_cases(),
    "frozen": frozen_cases,
    "adam": lambda arch: adam_cases(),
    "recurrent": lambda arch: recurrent_cases(),
}


WITHOUT_PRODUCTS = ("statistics_kernel", "column_sum_kernel", "up_join_kernel", "down_join_kernel")

QUICK = {
    "attention": r"bfloat16 .* (causal|packed)(, fused)?$",
    "decode": r"bfloat16",
    "norm": r"bfloat16 N=(1023|65536) layer",
    "batch_norm": r"bfloat16 C=(1001|2048) residual relu",
    "activation": r"bfloat16 (gelu|geglu)$",
    "products": r"bfloat16 (gelu|swiglu)$",
    "frozen": r"(bfloat16 int8|e4m3) (gelu|swiglu)( 1 rows.*)?$",
    "adam": r"bfloat16 (bfloat16 Adam|uint8 int16 Adam|norm)",
    "recurrent": r"bfloat16 (LSTM|GRU) ragged",
}


# ---- running them ----------------------------------------------------------------------------------


def rows(arch: int, op: str, wanted: str) -> list[Row]:
    """What the cases of a op compile to, each kernel once; ``wanted`` is a pattern for the cases."""
    compiled = compile_only(arch)
    found: list[Row] = []
    seen: set[int] = set()
    for case, call, wgmma in OPS[op](arch):
        if not re.search(wanted, case):
            continue
        compiled.clear()
        call()
        for name, kernel in compiled:
            if id(kernel) in seen:
                continue
            seen.add(id(kernel))
            registers, stack = usage(kernel.asm["cubin"])
            shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
            products = kernel.asm["ptx"].count("wgmma.mma_async")
            needed = wgmma and arch == 90 and name not in WITHOUT_PRODUCTS
            found.append(Row(arch, name, case, warps, registers, stack, shared, products, needed))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT), action="append")
    parser.add_argument("--only", choices=sorted(OPS), action="append")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"triton {triton.__version__}")
    print(f"{'arch':>5}  {'kernel':<32} {'case':<38} warps  regs stack  shared wgmma")
    results: list[Row] = []
    work = list(product(options.arch or sorted(SHARED_LIMIT), options.only or list(OPS)))
    patterns = [QUICK[op] if options.quick else "" for _, op in work]
    with ProcessPoolExecutor() as processes:  # as many as there are cores
        for row in chain.from_iterable(processes.map(rows, *zip(*work, strict=True), patterns)):
            numbers = f"{row.warps:>5} {row.registers:>5} {row.stack:>5} {row.shared:>7} {row.wgmma:>5}"
            verdict = "; ".join(row.problems())
            print(f"sm_{row.arch}  {row.kernel:<32} {row.case:<38} {numbers}  {verdict}".rstrip(), flush=True)
            results.append(row)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(results[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in results)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in results], indent=2) + "\n")
    broken = sum(bool(row.problems()) for row in results)
    print(f"{len(results)} kernels compiled, {broken} beyond a limit")
    return 1 if broken or not results else 0


if __name__ == "__main__":
    sys.exit(main())
