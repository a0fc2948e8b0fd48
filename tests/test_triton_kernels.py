"""What only Triton's kernels have: their configurations, their long rows, their padded masks and kept tables.

The ops' own tests run every backend through the public functions; here the kernels are called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import BACKENDS, assert_parity, check, device_of, poisoned_empty_memory
from torch import Tensor

from bigkern.core.dropout import HIDDEN, OUTPUT, dropped
from bigkern.core.parity import Yardstick
from bigkern.ops.attention import decode_problems
from bigkern.ops.attention import problems as attention_problems
from bigkern.ops.attention.transforms import RULES
from bigkern.ops.layernorm_ffn import reference as ffn_reference
from bigkern.ops.norm import reference as norm_reference

if "triton" not in BACKENDS:
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

from bigkern.triton_kernels import adam, attention, layernorm_ffn
from bigkern.triton_kernels.attention import (
    decode as attention_decode,
)
from bigkern.triton_kernels.attention import (
    scores as attention_scores,
)
from bigkern.triton_kernels.attention import (
    tiles as attention_tiles,
)
from bigkern.triton_kernels.common import launch, products
from bigkern.triton_kernels.norm import LONGEST_FORWARD

DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = torch.tensor([12345, 2**32 - 7])  # of dropout


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def double(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def check_function(op: str, names: str, ours: Any, by_stock: Callable[..., Any], *inputs: Any) -> None:
    """``by_stock(*inputs)`` gives what ``names`` says, in the inputs' dtype."""

    def named(results: Any) -> dict[str, Tensor]:
        return {name: t for name, t in zip(names.split(), results, strict=True) if t is not None}

    yardstick = Yardstick(named(by_stock(*double(*inputs))), lambda: named(by_stock(*inputs)))
    assert_parity(op, "triton", named(ours), yardstick)


# ---- attention -------------------------------------------------------------------------------------


def rules(q: Tensor, k: Tensor, scale: float, causal: str, **changes: Any) -> tuple[Any, ...]:
    """The op's arguments after q, k and v."""
    given: dict[str, Any] = dict.fromkeys(RULES)
    given |= {"scale": scale, "causal": causal, "window_left": -1}
    given |= {"window_right": -1 if causal == "none" else 0, "softcap": 0.0, "dropout_p": 0.0}
    given |= {"max_seqlen_q": q.shape[2], "max_seqlen_k": k.shape[2]}
    return tuple((given | changes).values())


CAUSAL = {"S": 150, "keys": 170, "causal": "bottom_right"}
WINDOW = {"S": 150, "keys": 170, "window": (40, 20)}
EVERYTHING = {
    "S": 70, "keys": 90, "window": (50, 30), "masked": "full", "bias": "learned",
    "softcap": 1.5, "alibi": "heads", "sinks": True, "dropout": 0.2, "lse": True,
}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("D", [24, 96, 136])
@pytest.mark.parametrize(
    ("features", "deterministic"),
    [(CAUSAL, False), (WINDOW, False), (EVERYTHING, False), (CAUSAL, True), (EVERYTHING, True)],
    ids=[
        "fused-causal",
        "fused-window",
        "fused-everything",
        "deterministic-causal",
        "deterministic-everything",
    ],
)
def test_attention_in_every_configuration(
    monkeypatch: pytest.MonkeyPatch,
    arch: int,
    dtype: torch.dtype,
    D: int,
    features: dict[str, Any],
    deterministic: bool,
) -> None:
    """Plain tiles, tiles on an edge and a ragged end, through every row of the tables."""
    monkeypatch.setattr(launch, "architecture", lambda device: arch)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    check(attention_problems.form(D=D, kv_heads=1, **features), "triton", dtype)


def test_tensor_descriptors_express_whole_vectors() -> None:
    q = draw(2, 16, 4, 24, dtype=torch.bfloat16).transpose(1, 2)
    assert attention_tiles.describable(q)
    assert not attention_tiles.describable(q[..., :1].expand(2, 4, 16, 24))
    assert not attention_tiles.describable(q[:1].expand(2, 4, 16, 24))
    assert not attention_tiles.describable(q[:, :, :0])
    assert not attention_tiles.describable(draw(2, 4, 16, 25, dtype=torch.bfloat16))


def test_decoding_joins_many_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(attention_decode, "LEAST_SPAN", 16)
    problem = decode_problems.form((600, 3, 0), sinks=True, queries=3, window=(500, 0))
    assert attention_decode.spans_of(6, 603, 132) == 37
    check(problem, "triton", torch.float32)


def test_a_mask_is_padded_but_not_expanded() -> None:
    mask = (torch.rand(2, 1, 5, 17) > 0.5).to(DEVICE)
    seen = attention_scores.broadcast(mask)
    assert seen.data is not None
    assert seen.head == 0
    assert seen.row == 32
    assert seen.data.untyped_storage().nbytes() == 2 * 5 * 32
    torch.testing.assert_close(seen.data.bool(), mask)
    expanded = attention_scores.broadcast(mask.expand(2, 3, 5, 17))
    assert expanded.data is not None
    assert expanded.data.shape == mask.shape


def test_a_mask_with_whole_vectors_is_not_copied() -> None:
    mask = torch.ones(1, 1, 8, 32, dtype=torch.bool, device=DEVICE)
    seen = attention_scores.broadcast(mask)
    assert seen.data is not None
    assert seen.data.data_ptr() == mask.data_ptr()


def test_rows_without_unit_stride_are_copied() -> None:
    q = draw(1, 2, 16, 33).transpose(2, 3)
    o, _ = attention.attention(q, q, q, *rules(q, q, 0.25, "none"))
    o_dense, _ = attention.attention(*[q.contiguous()] * 3, *rules(q, q, 0.25, "none"))
    torch.testing.assert_close(o, o_dense, rtol=0, atol=0)


def test_gradients_are_the_same_in_every_run() -> None:
    q, k, v, do = (draw(1, 4, 70, 32, dtype=torch.bfloat16) for _ in range(4))
    options = rules(q, k, 0.2, "top_left")
    o, lse = attention.attention(q, k, v, *options)
    first, second = (
        attention.attention_backward(do, None, q, k, v, o, lse, False, *options) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- norm ------------------------------------------------------------------------------------------


def stock_norm(x: Tensor, weight: Any, bias: Any, kind: str) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


def check_norm(x: Tensor, residual: Tensor | None, weight: Any, bias: Any, kind: str) -> None:
    """Everything that the two functions return, residual and its gradient included."""
    dy, dsum = torch.randn_like(x), None if residual is None else torch.randn_like(x)
    wanted = (weight is not None, bias is not None)
    poisoned_empty_memory()
    y, total, mean, rstd = layernorm_ffn.norm(x, residual, weight, bias, 1e-5, kind)
    s = x if total is None else total
    ds, dx, *others = layernorm_ffn.norm_backward(dy, dsum, s, weight, mean, rstd, kind, *wanted)
    assert dx is None
    if residual is not None:
        torch.testing.assert_close(total, x + residual, rtol=0, atol=0)

    def by_stock(s: Any, weight: Any, bias: Any, dy: Any, dsum: Any) -> Any:
        _, _, mean, rstd = norm_reference.norm(s, None, weight, bias, 1e-5, kind)
        inputs = [None if t is None else t.clone().requires_grad_() for t in (s, weight, bias)]
        y = stock_norm(*inputs, kind)
        found = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dy))
        ds, dweight, dbias = (None if t is None else next(found) for t in inputs)
        ds = ds if dsum is None else ds + dsum
        return y, mean, rstd, ds, dweight, dbias

    names, found = "y mean rstd ds dweight dbias", (y, mean, rstd, ds, *others)
    check_function("norm", names, found, by_stock, s, weight, bias, dy, dsum)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N"), [(1, 7), (7, 1), (63, 129), (130, 64), (20, 1023), (3, 8200)])
def test_norm(kind: str, dtype: torch.dtype, M: int, N: int) -> None:
    x, residual = draw(M, N, dtype=dtype) + 1, draw(M, N, dtype=dtype)
    weight, bias = draw(N, dtype=dtype), draw(N, dtype=dtype) if kind == "layer" else None
    check_norm(x, residual, weight, bias, kind)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_of_rows_longer_than_registers(kind: str) -> None:
    N = LONGEST_FORWARD + 3
    check_norm(draw(2, N) + 1, draw(2, N), None, None, kind)
    check_norm(draw(2, N) + 1, None, draw(N), draw(N) if kind == "layer" else None, kind)


@pytest.mark.parametrize("N", [1000, LONGEST_FORWARD + 1000])
def test_layer_norm_far_from_zero(N: int) -> None:
    """A mean of 10,000 and a deviation of 0.1: E[x^2] - E[x]^2 would have no digit left."""
    check_norm(draw(3, N) * 0.1 + 1e4, None, draw(N), draw(N), "layer")


def test_norm_of_strided_rows() -> None:
    check_norm(draw(65, 40).t(), draw(40, 130)[:, ::2], draw(65), draw(65), "layer")
    check_norm(draw(40, 130)[:, :65] + 1, draw(40, 200)[:, 3:68], draw(65), None, "rms")


def test_norm_of_no_rows() -> None:
    x, weight = draw(0, 16), draw(16)
    y, _, mean, rstd = layernorm_ffn.norm(x, None, weight, weight, 1e-5, "layer")
    ds, _, dweight, dbias = layernorm_ffn.norm_backward(y, None, x, weight, mean, rstd, "layer", True, True)
    assert ds.shape == (0, 16)
    assert dweight is not None
    assert dbias is not None
    assert not dweight.any()
    assert not dbias.any()


# ---- bias and activation ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "width", "p"), [(65, 33, 0.0), (3, 300, 0.25)])
def test_bias_activation(activation: str, dtype: torch.dtype, M: int, width: int, p: float) -> None:
    product = draw(M, width * (2 if activation in layernorm_ffn.GATED else 1), dtype=dtype) * 3
    product[0], product[1] = 100, -100
    bias, dout, drop = draw(product.shape[1], dtype=dtype), draw(M, width, dtype=dtype), (p, KEY)
    poisoned_empty_memory()
    preactivation = product.clone()
    out = layernorm_ffn.bias_activation(preactivation, bias, activation, *drop)
    torch.testing.assert_close(preactivation, product + bias, rtol=0, atol=0)
    dp, rebuilt, dbias = layernorm_ffn.bias_activation_backward(
        dout, preactivation, activation, True, True, *drop
    )
    assert rebuilt is not None
    assert torch.equal(rebuilt, out)

    def by_stock(x: Tensor, dout: Tensor) -> Any:
        x = x.clone().requires_grad_()
        out = dropped(stock_activation(x, activation), KEY, p, HIDDEN)
        (gradient,) = torch.autograd.grad(out, x, dout)
        return out, gradient, gradient.sum(0)

    check_function("layernorm_ffn", "out dp dbias", (out, dp, dbias), by_stock, preactivation, dout)


def stock_activation(p: Tensor, activation: str) -> Tensor:
    if activation in layernorm_ffn.GATED:
        gate, up = p.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * up
    if activation == "gelu_tanh":
        return F.gelu(p, approximate="tanh")
    return {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[activation](p)


def test_without_a_bias_the_product_is_not_written() -> None:
    product = draw(5, 8)
    before = product.clone()
    out = layernorm_ffn.bias_activation(product, None, "relu")
    assert torch.equal(product, before)
    torch.testing.assert_close(out, F.relu(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_add(dtype: torch.dtype) -> None:
    x, residual = draw(40, 130, dtype=dtype)[:, :65], draw(65, 40, dtype=dtype).t()
    for r in (None, residual):
        out = layernorm_ffn.dropout_add(x, r, 0.25, KEY)
        check_function("layernorm_ffn", "out", (out,), dropped_and_added, x, r)


def dropped_and_added(x: Tensor, residual: Tensor | None) -> tuple[Tensor]:
    left = dropped(x, KEY, 0.25, OUTPUT)
    return (left if residual is None else left + residual,)


# ---- an FFN's products -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_products_in_every_configuration(
    monkeypatch: pytest.MonkeyPatch, arch: int, dtype: torch.dtype, activation: str
) -> None:
    """Whole and ragged tiles, sums long enough for "tf32x3" and shorter ones, with all that can follow."""
    monkeypatch.setattr(launch, "architecture", lambda device: arch)
    (M, D, F_), drop = (150, 264, 136), (0.25, KEY)
    width = F_ * (2 if activation in layernorm_ffn.GATED else 1)
    x, dz, w1 = draw(M, D, dtype=dtype), draw(M, D, dtype=dtype), draw(width, D, dtype=dtype) / 16
    w2, b1, b2 = draw(D, F_, dtype=dtype) / 16, draw(width, dtype=dtype), draw(D, dtype=dtype)
    poisoned_empty_memory()
    p, a = layernorm_ffn.up(x, w1, b1, activation, drop, True)
    assert p is not None
    y = layernorm_ffn.down(a, w2, b2, x, drop)
    dp, again, db1 = layernorm_ffn.up_backward(dz, w2, p, activation, drop, True, True)
    dw = layernorm_ffn.weight_gradient(dp, x, None)
    into = torch.ones(width, D, device=DEVICE)
    assert layernorm_ffn.weight_gradient(dp, x, into) is None
    assert torch.equal(a, layernorm_ffn.up(x, w1, b1, activation, drop, False)[1])
    assert again is not None
    torch.testing.assert_close(again, a)

    def plain(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, dz: Any, p: Any, a: Any, dp: Any) -> Any:
        forward = *ffn_reference.up(x, w1, b1, activation, drop, True), ffn_reference.down(a, w2, b2, x, drop)
        dp_, _, db1_ = ffn_reference.up_backward(dz, w2, p, activation, drop, True, False)
        return *forward, dp_, db1_, dp.t() @ x

    inputs = (x, w1, b1, w2, b2, dz, p, a, dp)
    check_function("layernorm_ffn", "p a y dp db1 dw", (p, a, y, dp, db1, dw), plain, *inputs)
    torch.testing.assert_close(into - 1, (dp.t().double() @ x.double()).float(), rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_whole_vectors_are_padded_with_zeros() -> None:
    whole, odd = draw(6, 64), draw(5, 33)
    assert products.aligned(whole) is whole
    assert products.aligned(whole[:, 16:48]).data_ptr() == whole[:, 16:48].data_ptr()
    for x in (odd, whole[:, 1:33], whole.t(), whole[:1].expand(4, 64)):
        copy = products.aligned(x)
        assert copy.is_contiguous()
        assert copy.shape[1] % 16 == 0
        assert torch.equal(copy[:, : x.shape[1]], x)
        assert not copy[:, x.shape[1] :].any()


# ---- adam ------------------------------------------------------------------------------------------


def test_adam_keeps_its_tables_while_the_addresses_stay() -> None:
    arrays = [[draw(100), draw(3)] for _ in range(5)]
    numbers = [[torch.zeros((), device=DEVICE) for _ in range(2)]]
    first = adam.prepare(arrays, numbers)
    assert adam.prepare(arrays, numbers) is first
    assert first.chunks.tolist() == [[0, 0], [1, 0]]
    arrays[1] = [draw(100), draw(3)]
    assert adam.prepare(arrays, numbers) is not first


def test_adam_cuts_tensors_into_chunks() -> None:
    sizes, addresses = [0, adam.CHUNK, adam.CHUNK + 1], [[0, 16, 32], [4, 8, 12]]
    work = adam.build(DEVICE, sizes, addresses, 1)
    assert work.chunks.tolist() == [[1, 0], [2, 0], [2, 1]]
    assert work.table.tolist() == [sizes, [0, 0, adam.CHUNK], *addresses]
    assert work.aligned
    assert not adam.build(DEVICE, sizes, addresses, 2).aligned


@pytest.mark.parametrize("t", [1, 2, 10, 1000, 100_000])
def test_adam_bias_correction_keeps_its_digits(t: int) -> None:
    """One step from t - 1 with v = 0: p moves by lr / (1 - beta1^t) m / sqrt(v / (1 - beta2^t))."""
    p, g, m, v = (torch.tensor([x], device=DEVICE) for x in (0.0, 1.0, 0.0, 0.0))
    step = torch.tensor(float(t - 1), device=DEVICE)
    adam.adam([p], [g], [m], [v], [], [step], [], [], [], 1.0, 0.9, 0.999, 0.0, 0.0, True, False, False)
    expected = -(0.1 / (1 - 0.9**t)) / (0.001 / (1 - 0.999**t)) ** 0.5
    torch.testing.assert_close(p.item(), expected, rtol=5e-7, atol=0)
    assert step.item() == t
