"""The kernels whose blocks meet, a thousand times over: every bit of every result must be the same.

A race that parity forgives, because either order gives a right result, shows here. Meanwhile a second stream
keeps some of the GPU busy, for lengths of time that vary, so that blocks meet in ever different ways.

    python tests/gpu_race.py [ITERATIONS]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import bigkern
from bigkern.core import registry
from bigkern.ops.batch_norm import batch_norm
from bigkern.ops.recurrent import recurrent as recurrent_layer

BACKENDS = ("cuda", "triton")
INTEGERS = {2: torch.int16, 4: torch.int32}
Run = Callable[[], list[Tensor]]


def drawn(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def training(device: torch.device, causal: bool, D: int, packed: bool = False) -> Run:
    """Forward and backward with shared keys, dropout and, if not packed, a bias that learns."""
    shape = (2 * 640,) if packed else (2, 640)
    q, k, v = (drawn(*shape, H, D, device=device).requires_grad_() for H in (8, 2, 2))
    wanted, do = [q, k, v], drawn(*shape, 8, D, device=device)
    options = {"causal": causal, "dropout_p": 0.1, "seed": 1}
    if packed:
        ends = torch.tensor([0, 100, 101, 101, 900, 1280], dtype=torch.int32, device=device)

        def run() -> list[Tensor]:
            o = bigkern.varlen_attention(q, k, v, ends, ends, 799, 799, **options)
            return [o, *torch.autograd.grad(o, wanted, do)]

        return run
    bias = drawn(8, 640, 640, device=device).requires_grad_()

    def run_dense() -> list[Tensor]:
        o = bigkern.attention(*(x.transpose(1, 2) for x in (q, k, v)), bias=bias, **options).transpose(1, 2)
        return [o, *torch.autograd.grad(o, [*wanted, bias], do)]

    return run_dense


def decoding(device: torch.device, page_size: int) -> Run:
    """Eight sequences of different lengths, whose spans are joined."""
    width = 4096 // page_size
    q = drawn(8, 8, 1, 128, device=device)
    k, v = (drawn(8 * width, 2, page_size, 128, device=device) + i for i in range(2))
    lengths = torch.tensor([4096, 3000, 2049, 1024, 513, 64, 1, 0], dtype=torch.int32, device=device)
    table = torch.arange(8 * width, dtype=torch.int32, device=device).flip(0).view(8, width)
    return lambda: list(
        bigkern.decode_attention(q, k, v, lengths, page_table=table, return_lse=True)  # type: ignore[arg-type]
    )


def recurrent(device: torch.device, mode: str, T: int, B: int, H: int, packed: bool = False) -> Run:
    """A layer whose blocks wait for one another at every step; packed, in both directions."""
    gates = {"LSTM": 4, "GRU": 3}[mode] * H
    lengths = torch.arange(T, 0, -1) * B // T + 1 if packed else None
    rows = (int(lengths.sum()),) if lengths is not None else (T, B)
    shapes = [(gates, 128), (gates, H), (gates,), (gates,)] * (1 + packed)
    weights = [drawn(*shape, device=device).div_(H**0.5).requires_grad_() for shape in shapes]
    x = drawn(*rows, 128, device=device).requires_grad_()
    dy = drawn(*rows, H * (1 + packed), device=device)

    def run() -> list[Tensor]:
        y, state = recurrent_layer(x, None, weights, mode, lengths)
        states = state if isinstance(state, tuple) else (state,)
        return [y, *states, *torch.autograd.grad(y, [x, *weights], dy)]

    return run


def norming(device: torch.device) -> Run:
    """BatchNorm over so many rows that several blocks add up a channel's statistics."""
    x = drawn(16, 128, 29, 31, device=device).to(memory_format=torch.channels_last)
    residual, dy = x.flip(0), x.flip(2)
    weight, bias = (drawn(128, device=device, dtype=torch.float32).requires_grad_() for _ in range(2))
    wanted = [x.requires_grad_(), residual.requires_grad_(), weight, bias]

    def run() -> list[Tensor]:
        y = batch_norm(x, None, None, weight, bias, training=True, residual=residual, activation="relu")
        return [y, *torch.autograd.grad(y, wanted, dy)]

    return run


RUNS: dict[str, Callable[[torch.device], Run]] = {
    "full, D 128": lambda device: training(device, False, 128),
    "causal, D 64": lambda device: training(device, True, 64),
    "packed, D 128": lambda device: training(device, True, 128, packed=True),
    "decode, pages of 64": lambda device: decoding(device, 64),
    "LSTM": lambda device: recurrent(device, "LSTM", 20, 32, 512),
    "GRU": lambda device: recurrent(device, "GRU", 33, 1, 1024),
    "GRU, packed, both directions": lambda device: recurrent(device, "GRU", 20, 16, 256, packed=True),
}
TRITON_RUNS = {"batch_norm": norming}  # of what has no CUDA kernel


def differing(run: Run, iterations: int, device: torch.device) -> int:
    """How many values in all differ from the first run's."""
    first = [x.clone() for x in run()]
    differences = torch.zeros((), dtype=torch.int64, device=device)
    disturb = _Disturbance(device)
    for i in range(iterations):
        disturb(i)
        for x, before in zip(run(), first, strict=True):
            kind = INTEGERS[x.element_size()]
            differences += (x.contiguous().view(kind) != before.contiguous().view(kind)).sum()
    return int(differences)


class _Disturbance:
    """Work of varying length on another stream; nothing on a CPU."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.scratch = torch.empty(1 << 24, device=device) if self.stream else None

    def __call__(self, i: int) -> None:
        if self.stream is not None and self.scratch is not None:
            with torch.cuda.stream(self.stream):
                self.scratch[: 1 << (10 + i % 15)].add_(1.0)


def main(iterations: int, backends: tuple[str, ...], device: torch.device) -> list[str]:
    """The runs, in words, that were not the same every time."""
    bad = []
    for backend in backends:
        for name, prepare in {**RUNS, **(TRITON_RUNS if backend == "triton" else {})}.items():
            began = time.perf_counter()
            with registry.use(backend):
                found = differing(prepare(device), iterations, device)
            verdict = f"{found} values differ" if found else "the same bits"
            print(f"{backend}, {name}: {iterations} runs in {time.perf_counter() - began:.1f} s: {verdict}")
            bad += [f"{backend}, {name}"] if found else []
    return bad


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu_race: there is no GPU here")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    if wrong := main(count, BACKENDS, torch.device("cuda", 0)):
        sys.exit(f"gpu_race: not the same every time: {'; '.join(wrong)}")
