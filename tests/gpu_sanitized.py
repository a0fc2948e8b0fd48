"""Every GPU kernel once, on small odd shapes, for compute-sanitizer: a run takes seconds, not minutes.

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu_sanitized.py
"""

from __future__ import annotations

import sys

import torch

import bigkern
from bigkern.ops.adam import adam
from bigkern.ops.adam.dynamic8 import blocks_of
from bigkern.ops.adam.grad_norm import grad_norm
from bigkern.ops.batch_norm import batch_norm
from bigkern.ops.recurrent import recurrent
from bigkern.ops.recurrent.call import GATES

BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda"


def run_attention(dtype: torch.dtype) -> None:
    for D in (40, 64, 128, 256):
        q = torch.randn(2, 4, 67, D, dtype=dtype, device=DEVICE, requires_grad=True)
        k = torch.randn(2, 2, 83, D, dtype=dtype, device=DEVICE, requires_grad=True)
        mask = torch.rand(2, 1, 67, 83, device=DEVICE) < 0.8
        for options in ({}, {"causal": "bottom_right"}, {"mask": mask}):
            bigkern.attention(q, k, k, **options).sum().backward()


def run_attention_features(dtype: torch.dtype) -> None:
    """Window, softcap, ALiBi, sinks, dropout and a bias with a gradient; each alone would take too long."""
    for D in (64, 128):
        q = torch.randn(2, 4, 67, D, dtype=dtype, device=DEVICE, requires_grad=True)
        k = torch.randn(2, 2, 83, D, dtype=dtype, device=DEVICE, requires_grad=True)
        slopes, sinks = torch.rand(4, device=DEVICE), torch.randn(4, device=DEVICE, requires_grad=True)
        for shape in ((4, 67, 83), (2, 1, 1, 83)):  # the gradient is summed over batches, or heads and rows
            bias = torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)
            options = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks, "softcap": 5.0, "dropout_p": 0.1}
            o, lse = bigkern.attention(q, k, k, **options, window=(40, 9), return_lse=True)
            (o.sum() + lse.sum()).backward()
        bigkern.attention(q, k, k, causal="bottom_right", window=(31, 0)).sum().backward()


def run_packed_attention(dtype: torch.dtype) -> None:
    q = torch.randn(131, 4, 64, dtype=dtype, device=DEVICE, requires_grad=True)
    k = torch.randn(140, 2, 64, dtype=dtype, device=DEVICE, requires_grad=True)
    ends = ([0, 0, 1, 70, 131], [0, 9, 9, 77, 140])  # no queries, no keys, and some of both
    q_ends, k_ends = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ends)
    for causal in (False, "bottom_right"):
        o = bigkern.varlen_attention(q, k, k, q_ends, k_ends, 69, 68, causal=causal, dropout_p=0.1)
        o.sum().backward()


def run_decode_attention(dtype: torch.dtype) -> None:
    lengths = torch.tensor([129, 16, 0], dtype=torch.int32, device=DEVICE)
    table = torch.arange(27, dtype=torch.int32, device=DEVICE).flip(0).view(3, 9)
    for D in (40, 128):
        for queries in (1, 3):
            q = torch.randn(3, 4, queries, D, dtype=dtype, device=DEVICE)
            whole, pages = (
                torch.randn(*n, D, dtype=dtype, device=DEVICE) for n in ((3, 2, 133), (27, 2, 16))
            )
            bigkern.decode_attention(q, whole, whole, lengths, window=(100, 0))
            bigkern.decode_attention(q, pages, pages, lengths, page_table=table, softcap=5.0)


def run_norms(dtype: torch.dtype) -> None:
    for N in (63, 1024):
        x = torch.randn(37, N, dtype=dtype, device=DEVICE, requires_grad=True)
        w = torch.ones(N, dtype=dtype, device=DEVICE, requires_grad=True)
        y, total = bigkern.layer_norm(x, (N,), w, w, residual=x)
        (y + total + bigkern.rms_norm(x, (N,), w)).sum().backward()


def run_batch_norm(dtype: torch.dtype) -> None:
    for C in (24, 67):
        x = torch.randn(3, C, 13, 7, dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last)
        x.requires_grad_()
        w, mean, var = (torch.ones(C, device=DEVICE) for _ in range(3))
        w.requires_grad_()
        for training in (True, False):
            options = {"training": training, "activation": "relu"}
            batch_norm(x, mean, var, w, w, **options).sum().backward()
            batch_norm(x, mean, var, w, w, **options, residual=x).sum().backward()


def run_layernorm_ffn(dtype: torch.dtype) -> None:
    def parameter(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True)

    x, w2, b2 = parameter(37, 72), parameter(72, 136), parameter(72)
    for activation, rows in (("gelu", 136), ("swiglu", 272)):
        for placement in ("pre", "post"):
            w1, b1 = parameter(rows, 72), parameter(rows)
            bigkern.layernorm_ffn(
                x, w1, b1, w2, b2, b2, b2, activation=activation, placement=placement
            ).sum().backward()


def run_recurrent(dtype: torch.dtype) -> None:
    sizes = torch.tensor([9, 9, 4, 1])
    for mode, G in GATES.items():
        for H in (40, 136):
            shapes = [(G * H, 24), (G * H, H), (G * H,), (G * H,)]
            weights = [torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in shapes]
            x = torch.randn(4, 9, 24, dtype=dtype, device=DEVICE, requires_grad=True)
            packed = x.reshape(-1, 24)[:23]
            zoneout = torch.rand(4, 9, H, device=DEVICE).to(dtype)
            for y, _ in (
                recurrent(x, None, weights, mode, zoneout=zoneout),
                recurrent(packed, None, [*weights, *weights], mode, sizes),
            ):
                y.sum().backward()


def run_adam(dtype: torch.dtype) -> None:
    sizes = (1, 7, 1023, 4097)
    params, grads, m, v, top = ([torch.rand(n, dtype=dtype, device=DEVICE) for n in sizes] for _ in range(5))
    steps = [torch.zeros((), device=DEVICE) for _ in sizes]
    adam(params, grads, m, v, top, steps, amsgrad=True, decoupled=True, weight_decay=0.1)


def run_adam_storage(dtype: torch.dtype) -> None:
    sizes = (1, 7, 1023, 40_000)
    params, grads = ([torch.rand(n, dtype=dtype, device=DEVICE) for n in sizes] for _ in range(2))
    for stored in (torch.bfloat16, torch.uint8):
        m, v = ([torch.zeros(n, dtype=stored, device=DEVICE) for n in sizes] for _ in range(2))
        scales = [torch.zeros(blocks_of(n) if stored == torch.uint8 else 0, device=DEVICE) for n in sizes]
        beside = [scales, [x.clone() for x in scales]] if stored == torch.uint8 else [[], []]
        masters = [] if dtype == torch.float32 else [p.float() for p in params]
        for kept in ([], masters, [p.short() for p in params] if dtype == torch.bfloat16 else []):
            adam(
                params, grads, m, v, [], [torch.zeros((), device=DEVICE) for _ in sizes], masters=kept,
                exp_avg_scales=beside[0], exp_avg_sq_scales=beside[1], max_norm=1.0, seed=5,
                grad_norm=grad_norm(grads), zero_grads=True,
            )  # fmt: skip


RUNS = (
    run_attention,
    run_attention_features,
    run_packed_attention,
    run_decode_attention,
    run_norms,
    run_layernorm_ffn,
    run_recurrent,
    run_adam,
    run_adam_storage,
)
TRITON_RUNS = (run_batch_norm,)  # of what has no CUDA kernel


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_sanitized: there is no GPU here")
    for backend in BACKENDS:
        for run in (*RUNS, *(TRITON_RUNS if backend == "triton" else ())):
            for dtype in DTYPES:
                with bigkern.use(backend):
                    run(dtype)
            torch.cuda.synchronize()
            print(backend, run.__name__, "ran")


if __name__ == "__main__":
    main()
