"""Triton's feed-forward products with frozen weights: int8 and e4m3, few rows and many, against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import BACKENDS, assert_parity, device_of, poisoned_empty_memory
from torch import Tensor
from triton_interpreter import from_e4m3, to_e4m3

from bigkern.core.parity import Yardstick
from bigkern.ops.layernorm_ffn.call import GATED
from bigkern.ops.layernorm_ffn.reference import activate

if "triton" not in BACKENDS:
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

from bigkern.triton_kernels.common import launch
from bigkern.triton_kernels.layernorm_ffn import frozen as frozen_ffn
from bigkern.triton_kernels.layernorm_ffn.frozen import frozen_down, frozen_up, quantize_rows
from bigkern.triton_kernels.layernorm_ffn.quantize import LONGEST

DEVICE = device_of("triton")
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"]
FP8 = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 needs sm_89"
)
KINDS = [*DTYPES, pytest.param(E4M3, marks=FP8)]  # x's type


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def rows_of(M: int, K: int, kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x and its scale, as the products take them."""
    return quantize_rows(draw(M, K)) if kind == E4M3 else (draw(M, K, dtype=kind), None)


def frozen(N: int, K: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights of about 1 / sqrt(K) as they are frozen, with a scale for each row."""
    w = draw(N, K) / K**0.5
    if kind == E4M3:
        return quantize_rows(w)
    scale = w.abs().amax(1) / 127
    return torch.round(w / scale[:, None]).to(torch.int8), scale


def double(x: Any) -> Any:
    return None if x is None else x.double()


def product(x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor, b: Tensor | None) -> Tensor:
    p = F.linear(x, w) * w_scale
    p = p if x_scale is None else p * x_scale[:, None]
    return p if b is None else p + b


def in_torch(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    b: Tensor | None,
    dtype: torch.dtype,
    exactly: bool,
) -> Tensor:
    """The product with its bias in float64; or as stock torch makes it, in fp32 or in x's type."""
    if exactly:
        return product(*map(double, (x, x_scale, w, w_scale, b)))
    if x_scale is None:  # the weights thawed
        return F.linear(x, (w * w_scale[:, None]).to(dtype), b)
    return product(x.float(), x_scale, w.float(), w_scale, b).to(dtype)


def check_block(M: int, D: int, width: int, kind: torch.dtype, activation: str, bias: bool = True) -> None:
    """`frozen_up`, then `frozen_down` of what it returned."""
    dtype = torch.bfloat16 if kind == E4M3 else kind
    N = width * (2 if activation in GATED else 1)
    (x, x_scale), (w1, w1_scale), (w2, w2_scale) = (
        rows_of(M, D, kind), frozen(N, D, kind), frozen(D, width, kind),
    )  # fmt: skip
    b1, b2 = (draw(N, dtype=dtype), draw(D, dtype=dtype)) if bias else (None, None)
    residual = draw(M, D, dtype=dtype) if bias else None
    poisoned_empty_memory()
    a = frozen_up(x, x_scale, w1, w1_scale, b1, activation, dtype)
    first = partial(in_torch, x, x_scale, w1, w1_scale, b1, dtype)
    check("a", a, lambda exactly: activate(first(exactly), activation))
    left, a_scale = quantize_rows(a) if kind == E4M3 else (a, None)
    poisoned_empty_memory()
    y = frozen_down(left, a_scale, w2, w2_scale, b2, residual, dtype)
    second = partial(in_torch, left, a_scale, w2, w2_scale, b2, dtype)
    check("y", y, lambda exactly: second(exactly) if residual is None else second(exactly) + residual)


def check(name: str, ours: Tensor, by_stock: Callable[[bool], Tensor]) -> None:
    """``by_stock(exactly)`` computes in float64 or as stock does."""
    yardstick = Yardstick({name: by_stock(True)}, lambda: {name: by_stock(False)})
    assert_parity("frozen_ffn", "triton", {name: ours}, yardstick)


# ---- the products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kind: torch.dtype, activation: str) -> None:
    check_block(7, 63, 129, kind, activation)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 63), (63, 129, 7), (129, 63, 64), (70, 300, 1)], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_shapes(kind: torch.dtype, sizes: tuple[int, int, int], activation: str) -> None:
    check_block(*sizes, kind, activation, bias=False)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("M", [5, 130])
def test_every_configuration(
    monkeypatch: pytest.MonkeyPatch, arch: int, kind: torch.dtype, activation: str, M: int
) -> None:
    """Few rows and many; whole and ragged tiles; sums long enough for "tf32x3", and shorter ones."""
    monkeypatch.setattr(launch, "architecture", lambda device: arch)
    check_block(M, 264, 136, kind, activation)


@pytest.fixture
def many_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an H200 would cut sums, but sums of 64 products already: also into spans with nothing in them."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(frozen_ffn, "LEAST_SPAN", 64)


@pytest.mark.usefixtures("many_spans")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", False), ("geglu", True)])
def test_long_sums_of_few_rows_are_cut_into_spans(kind: torch.dtype, activation: str, bias: bool) -> None:
    spans = [frozen_ffn.spans_of(draw(6, K, dtype=torch.bfloat16), N) for K, N in ((264, 150), (150, 264))]
    assert spans == [4, 2]
    check_block(6, 264, 150, kind, activation, bias)


@pytest.mark.usefixtures("many_spans")
@pytest.mark.parametrize("M", [6, 70])
def test_the_same_bits_in_every_run(M: int) -> None:
    x, (w, scale) = draw(M, 264, dtype=torch.bfloat16), frozen(72, 264, torch.bfloat16)
    first, second = (frozen_up(x, None, w, scale, None, "silu", x.dtype) for _ in range(2))
    assert torch.equal(first, second)


def test_spans_keep_all_processors_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    x = torch.empty(1, 14336, dtype=torch.bfloat16, device=DEVICE)
    assert frozen_ffn.spans_of(x, 4096) == 4
    assert frozen_ffn.spans_of(x[:, :4096], 28672) == 1
    assert frozen_ffn.spans_of(x[:, :1024], 1024) == 1
    assert frozen_ffn.spans_of(x.expand(65, -1), 4096) == 1


@pytest.mark.parametrize("kind", [torch.bfloat16, pytest.param(E4M3, marks=FP8)], ids=str)
def test_strided_inputs(kind: torch.dtype) -> None:
    """Columns out of larger matrices, transposed ones, every second scale and bias."""
    x, x_scale = rows_of(40, 66, kind)
    w, w_scale = frozen(65, 66, kind)
    b, residual = draw(130, dtype=torch.bfloat16)[::2], draw(65, 40, dtype=torch.bfloat16).t()
    apart = torch.stack([w_scale, w_scale], 1)[:, 0]
    y = frozen_down(x, x_scale, w, w_scale, b.contiguous(), residual.contiguous(), torch.bfloat16)
    x_far = torch.cat([x.view(torch.uint8)] * 2, 1).view(x.dtype)[:, : x.shape[1]]
    w_far = w.t().contiguous().t()
    assert torch.equal(frozen_down(x_far, x_scale, w_far, apart, b, residual, torch.bfloat16), y)
    a = frozen_up(x, x_scale, w, w_scale, b.contiguous(), "gelu", torch.bfloat16)
    assert torch.equal(frozen_up(x_far, x_scale, w_far, apart, b, "gelu", torch.bfloat16), a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_products_can_leave_in_any_type(dtype: torch.dtype) -> None:
    (x, x_scale), (w, w_scale) = rows_of(9, 40, E4M3), frozen(20, 40, E4M3)
    y = frozen_down(x, x_scale, w, w_scale, None, None, dtype)
    check("y", y, partial(in_torch, x, x_scale, w, w_scale, None, dtype))


def test_no_rows() -> None:
    w, scale = frozen(16, 32, torch.bfloat16)
    x = draw(0, 32, dtype=torch.bfloat16)
    assert frozen_up(x, None, w, scale, None, "swiglu", x.dtype).shape == (0, 8)
    assert frozen_down(x, None, w, scale, None, None, x.dtype).shape == (0, 16)
    assert [t.shape for t in quantize_rows(x)] == [(0, 32), (0,)]


# ---- rows as e4m3 ----------------------------------------------------------------------------------


def check_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bit by bit what torch does."""
    poisoned_empty_memory()
    q, scale = quantize_rows(x)
    expected = x.float().abs().amax(1) / 448
    expected[expected == 0] = 1
    torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)
    nearest = (x.float() / expected[:, None]).clamp(-448, 448).to(E4M3)
    torch.testing.assert_close(q.float(), nearest.float(), rtol=0, atol=0, equal_nan=True)
    return q, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 7), (7, 1), (63, 129), (130, 64), (3, LONGEST + 9)], ids=str)
def test_rows(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    x = draw(*sizes) * torch.exp2(torch.randint(-12, 12, sizes).to(DEVICE))
    x[-1] = 0
    _, scale = check_quantized(x.to(dtype))
    assert scale[-1] == 1


def test_strided_rows() -> None:
    check_quantized(draw(65, 40).t())
    check_quantized(draw(40, 130, dtype=torch.bfloat16)[:, 3:68])


@pytest.mark.parametrize("N", [9, LONGEST + 9])
def test_rows_that_are_not_numbers_and_rows_too_small_for_a_scale(N: int) -> None:
    x = draw(4, N)
    x[0, 5], x[1, 5], x[2] = float("nan"), float("-inf"), 1e-44
    q, _ = check_quantized(x)
    assert q[0].isnan().all()
    assert not q[2:].isnan().any()


def test_halfway_values_round_to_even() -> None:
    steps = torch.arange(0x7E, dtype=torch.uint8).view(E4M3).float()
    halves = (steps[:-1] + steps[1:]) / 2
    check_quantized(torch.cat([halves, -halves, torch.tensor([448.0])])[None].to(DEVICE))


def test_the_interpreters_e4m3_is_torchs() -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(codes).view(E4M3).float().numpy()
    np.testing.assert_array_equal(from_e4m3(codes), values)
    between = np.concatenate([values, (values[:126] + values[1:127]) / 2, np.float32([1e-9, -0.0, 440])])
    np.testing.assert_array_equal(to_e4m3(between), torch.from_numpy(between).to(E4M3).view(torch.uint8))
    np.testing.assert_array_equal(to_e4m3(np.float32([449, -1e9, np.inf])), [0x7E, 0xFE, 0x7E])
