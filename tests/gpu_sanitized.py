"""Every GPU kernel once, on small odd shapes, for compute-sanitizer: a run takes seconds, not minutes.

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu_sanitized.py
"""

from __future__ import annotations

import sys

import torch

import bigkern
from bigkern.ops.adam import adam

BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_attention(dtype: torch.dtype) -> None:
    for D in (40, 64, 128, 256):
        q = torch.randn(2, 4, 67, D, dtype=dtype, device="cuda", requires_grad=True)
        k = torch.randn(2, 2, 83, D, dtype=dtype, device="cuda", requires_grad=True)
        mask = torch.rand(2, 1, 67, 83, device="cuda") < 0.8
        for options in ({}, {"causal": "bottom_right"}, {"mask": mask}):
            bigkern.attention(q, k, k, **options).sum().backward()


def run_norms(dtype: torch.dtype) -> None:
    for N in (63, 1024):
        x = torch.randn(37, N, dtype=dtype, device="cuda", requires_grad=True)
        w = torch.ones(N, dtype=dtype, device="cuda", requires_grad=True)
        y, total = bigkern.layer_norm(x, (N,), w, w, residual=x)
        (y + total + bigkern.rms_norm(x, (N,), w)).sum().backward()


def run_layernorm_ffn(dtype: torch.dtype) -> None:
    def parameter(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device="cuda", requires_grad=True)

    x, w2, b2 = parameter(37, 72), parameter(72, 136), parameter(72)
    for activation, rows in (("gelu", 136), ("swiglu", 272)):
        for placement in ("pre", "post"):
            w1, b1 = parameter(rows, 72), parameter(rows)
            bigkern.layernorm_ffn(
                x, w1, b1, w2, b2, b2, b2, activation=activation, placement=placement
            ).sum().backward()


def run_adam(dtype: torch.dtype) -> None:
    sizes = (1, 7, 1023, 4097)
    params, grads, m, v, top = ([torch.rand(n, dtype=dtype, device="cuda") for n in sizes] for _ in range(5))
    steps = [torch.zeros((), device="cuda") for _ in sizes]
    adam(params, grads, m, v, top, steps, amsgrad=True, decoupled=True, weight_decay=0.1)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_sanitized: there is no GPU here")
    for backend in BACKENDS:
        for run in (run_attention, run_norms, run_layernorm_ffn, run_adam):
            for dtype in DTYPES:
                with bigkern.use(backend):
                    run(dtype)
            torch.cuda.synchronize()
            print(backend, run.__name__, "ran")


if __name__ == "__main__":
    main()
