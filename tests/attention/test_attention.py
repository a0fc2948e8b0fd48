"""Attention beyond test_parity.py: its edges, its gradients' gradients and its public face."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import BACKENDS, DTYPES, KERNEL_BACKENDS, check, device_of, poisoned_empty_memory, run_backend
from torch import Tensor

import bigkern
from bigkern.core import info
from bigkern.core.problem import Problem, judge, results
from bigkern.ops.attention import stock_kernels
from bigkern.ops.attention.call import bind
from bigkern.ops.attention.problems import form, forms, heads_first, varlen
from bigkern.ops.attention.transforms import RULES

EVERY = pytest.mark.parametrize("backend", BACKENDS)
KERNELS = pytest.mark.parametrize("backend", KERNEL_BACKENDS)


def ours(problem: Problem, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    with run_backend("attention", backend):
        return results(problem.ours, problem.make(dtype, device_of(backend)), problem.outputs)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask for the same bits in every run; a warning where torch itself has no such algorithm."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@KERNELS
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "problem",
    [p for p in forms() if p.emulated and "grouped and multi-query heads" in p.features],
    ids=lambda problem: problem.label,
)
def test_parity_of_deterministic_gradients(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    check(problem, backend, dtype)


# ---- edges -----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, "bottom_right"])
def test_rows_that_see_nothing(dtype: torch.dtype, causal: Any, backend: str) -> None:
    problem = form(S=40, keys=20, masked="dead", causal=causal)
    mine = ours(problem, backend, dtype)
    right = results(problem.specification, problem.make(dtype, torch.device("cpu")), problem.outputs)
    dead = torch.isneginf(right["lse"]).to(mine["lse"].device)
    assert bool(dead.any())
    assert not bool(dead.all())
    assert torch.equal(torch.isneginf(mine["lse"]), dead)
    assert not mine["output"][dead].any()
    assert not mine["dq"].transpose(1, 2)[dead].any()
    assert all(bool(mine[name].isfinite().all()) for name in ("output", "dq", "dk", "dv"))


@EVERY
def test_nothing_is_seen_at_all(backend: str) -> None:
    device = device_of(backend)
    q = torch.randn(1, 2, 9, 16, device=device, requires_grad=True)
    mask = torch.zeros(9, 9, dtype=torch.bool, device=device)
    with run_backend("attention", backend):
        o = bigkern.attention(q, q, q, mask=mask)
        (dq,) = torch.autograd.grad(o.sum(), q)
    assert not o.any()
    assert not dq.any()


@EVERY
@pytest.mark.parametrize(
    "sizes", [(0, 2, 2, 5, 5), (2, 2, 2, 0, 5), (2, 2, 2, 5, 0), (1, 0, 1, 5, 5), (2, 4, 2, 0, 0)], ids=str
)
def test_empty_tensors(sizes: tuple[int, ...], backend: str) -> None:
    B, Hq, Hkv, Sq, Sk = sizes
    device = device_of(backend)
    q = torch.randn(B, Hq, Sq, 8, device=device, requires_grad=True)
    k = torch.randn(B, Hkv, Sk, 8, device=device, requires_grad=True)
    v = torch.randn(B, Hkv, Sk, 4, device=device, requires_grad=True)
    with run_backend("attention", backend):
        poisoned_empty_memory()
        o, lse = bigkern.attention(q, k, v, return_lse=True)
        grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert o.shape == (B, Hq, Sq, 4)
    assert lse.shape == (B, Hq, Sq)
    assert not o.any()
    assert all(not grad.any() for grad in grads)
    assert [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]
    assert bool(torch.isneginf(lse).all())


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_scores(dtype: torch.dtype, backend: str) -> None:
    """Scores in the tens of thousands, all scores equal, and a bias that shuts a key out: never NaN."""
    device = device_of(backend)
    big = torch.linspace(-1, 1, 40, device=device).view(1, 1, 40, 1).expand(1, 1, 40, 16) * 200
    q = big.to(dtype).clone().requires_grad_()
    v = torch.randn(1, 1, 40, 16, device=device).to(dtype)
    bias = torch.zeros(40, device=device, dtype=dtype)
    bias[7] = float("-inf")
    bias[11] = torch.finfo(dtype).min
    with run_backend("attention", backend):
        below = -q.detach().abs()  # every key is far below the zeros beyond the last one
        for k, options in [
            (q, {"scale": 1.0}),
            (below, {"scale": 1.0}),
            (torch.zeros_like(q), {}),
            (q, {"bias": bias}),
        ]:
            o, lse = bigkern.attention(q, k, v, **options, return_lse=True)  # type: ignore[arg-type]
            (dq,) = torch.autograd.grad(o.float().sum(), q)
            assert all(bool(x.isfinite().all()) for x in (o, lse, dq))
        o = bigkern.attention(torch.zeros_like(q), q, v, bias=bias)
    kept = [j for j in range(40) if j not in (7, 11)]
    mean = v[:, :, kept].float().mean(2, keepdim=True).expand(1, 1, 40, 16)
    assert_close = torch.testing.assert_close
    assert_close(o.float(), mean, atol=4 * torch.finfo(dtype).eps, rtol=0)


@EVERY
@pytest.mark.usefixtures("deterministic")
def test_the_same_twice(backend: str) -> None:
    problem = form(H=4, S=50, keys=60, causal="bottom_right")
    first, again = ours(problem, backend), ours(problem, backend)
    assert all(torch.equal(first[x], again[x]) for x in first)


@pytest.mark.skipif(info.import_error is not None, reason="the extension is not built")
@pytest.mark.parametrize("threads", [1, 3])
def test_cpu_thread_counts(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(form(S=200, keys=300, D=64, kv_heads=1, causal="bottom_right"), "cpu", torch.float32)
        check(form(S=1, keys=900, D=64, kv_heads=1), "cpu", torch.float32)
    finally:
        torch.set_num_threads(before)


@EVERY
def test_gradients_of_some_inputs(backend: str) -> None:
    q, k, v = (x.detach() for x in heads_first(form().make(torch.float32, device_of(backend))))
    k.requires_grad_()
    with run_backend("attention", backend):
        o, lse = bigkern.attention(q, k, v, causal=True, return_lse=True)
        assert o.requires_grad
        assert lse.requires_grad
        (dk,) = torch.autograd.grad(o.square().sum(), k)
        with torch.no_grad():
            assert not bigkern.attention(q, k, v).requires_grad
        assert not bigkern.attention(q, k.detach(), v).requires_grad
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        o = bigkern.attention(*inputs, causal=True)
        torch.testing.assert_close(dk, torch.autograd.grad(o.square().sum(), inputs)[1])


@KERNELS
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"softcap": 1.5, "dropout_p": 0.3, "seed": 1}], ids=str
)
def test_second_derivatives(options: dict[str, Any], backend: str) -> None:
    """They run on the reference: a gradient penalty in float32 is that of float64."""

    def penalty(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        o = bigkern.attention(q, k, v, **options)
        (dq,) = torch.autograd.grad(o.sin().sum(), q, create_graph=True)  # type: ignore[union-attr]
        return torch.autograd.grad(dq.square().sum(), (q, k, v))

    inputs = [torch.randn(1, 2, 6, 8, device=device_of(backend), requires_grad=True) for _ in "qkv"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        right = penalty(*(x.detach().double().requires_grad_() for x in inputs))
    with run_backend("attention", backend):
        mine = penalty(*inputs)
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-4)


# ---- the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("features", ["mask", "all"])
def test_gradcheck(features: str, causal: str) -> None:
    """The specification's own gradients, first and second, and those of stock through the public function."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    inputs = (draw(2, 4, 5, 3), draw(2, 2, 4, 3), draw(2, 2, 4, 6), draw(4, 1, 4), draw(4))
    mask = torch.rand(5, 4) < 0.7
    mask[:, 0] = True
    options: dict[str, Any] = {"causal": causal, "mask": mask}
    if features == "all":
        options |= {
            "softcap": 1.3,
            "window": (2, 2),
            "dropout_p": 0.3,
            "seed": 7,
            "alibi_slopes": torch.rand(4),
        }

    def by_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Any:
        return bigkern.attention(q, k, v, bias=bias, sinks=sinks, **options, return_lse=True)

    def by_stock(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return bigkern.attention(q, k, v, bias=bias, **options)

    torch.autograd.gradcheck(by_reference, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(by_reference, inputs, fast_mode=True)
    if causal != "bottom_right":  # there the first row sees nothing, and stock has no gradient
        torch.autograd.gradcheck(by_stock, inputs[:4], fast_mode=True)


def test_gradcheck_of_packed_sequences() -> None:
    q, k = (torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (7, 9))
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 3, 7], [0, 4, 5, 9]))

    def packed(q: Tensor, k: Tensor) -> Any:
        return bigkern.varlen_attention(
            q, k, k, ends_q, ends_k, causal="bottom_right", dropout_p=0.2, seed=3, return_lse=True
        )

    torch.autograd.gradcheck(packed, (q, k), fast_mode=True)


def test_dropout_draws_what_it_says() -> None:
    """The kept share is 1 - p within three sigma; heads, queries, seeds and offsets are unrelated."""
    ones = torch.ones(2, 4, 300, 8)
    eye = torch.eye(300).expand(2, 4, 300, 300)

    def kept(**options: Any) -> Tensor:
        o = bigkern.attention(ones, ones, eye, **options)  # uniform weights, seen one by one
        return o != 0  # type: ignore[return-value, comparison-overlap]

    with bigkern.use("torch"):
        for p in (0.1, 0.5, 0.9):
            mask = kept(dropout_p=p, seed=1)
            sigma = (p * (1 - p) / mask.numel()) ** 0.5
            assert abs(mask.double().mean() - (1 - p)) < 3 * sigma
        half = kept(dropout_p=0.5, seed=1)
        assert torch.equal(half, kept(dropout_p=0.5, seed=1, offset=0))
        others = [kept(dropout_p=0.5, seed=2), kept(dropout_p=0.5, seed=1, offset=1)]
        others += [half.roll(1, dims=dim) for dim in range(4)]
        for other in others:
            assert abs((half == other).double().mean() - 0.5) < 3 * 0.5 / half.numel() ** 0.5
        torch.manual_seed(0)
        first = kept(dropout_p=0.5)
        assert not torch.equal(first, kept(dropout_p=0.5))


# ---- torch's machinery -----------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("features", ["plain", "all", "packed"])
def test_opcheck(features: str, backend: str) -> None:
    sizes: dict[str, Any] = {"causal": "bottom_right", "value_dim": 8, "kv_heads": 2, "lse": True}
    every = {"masked": "full", "bias": "learned", "sinks": True, "alibi": "heads", "dropout": 0.2}
    problem = {
        "plain": lambda: form(1, 2, 9, 12, 16, **sizes),
        "all": lambda: form(1, 4, 9, 12, 16, **sizes, **every),
        "packed": lambda: varlen((3, 0, 6), 2, 16, keys=(4, 2, 6), **sizes),
    }[features]()
    dtype = torch.bfloat16 if features == "all" else torch.float32
    arguments, options = problem.arguments(problem.make(dtype, device_of(backend)))
    args = bind(*arguments, **options).flat()
    with run_backend("attention", backend):
        torch.library.opcheck(torch.ops.bigkern.attention.default, args)
        o, lse = (x.detach() for x in torch.ops.bigkern.attention(*args))
        detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
        saved = (*detached[:3], o, lse, features == "all", *detached[3:])
        dlse = torch.randn_like(lse) if features == "all" else None
        torch.library.opcheck(
            torch.ops.bigkern.attention_backward.default, (torch.randn_like(o), dlse, *saved)
        )


@EVERY
@pytest.mark.parametrize("return_lse", [False, True])
def test_compile(return_lse: bool, backend: str) -> None:
    """One graph, the same results, and nothing compiled twice."""
    made = heads_first(form().make(torch.float32, device_of(backend)))
    q, k, v = (x.detach().requires_grad_() for x in made)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = bigkern.attention(q, k, v, causal=True, return_lse=return_lse)
        return result[0] * 2 + result[1].unsqueeze(-1) if return_lse else result * 2  # type: ignore[operator]

    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    with run_backend("attention", backend), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            o = compiled(q, k, v)
            grads = torch.autograd.grad(o.square().sum(), (q, k, v))
        expected = f(q, k, v)
        right = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(o, expected)
    for mine, theirs in zip(grads, right, strict=True):
        torch.testing.assert_close(mine, theirs)


@EVERY
def test_compile_with_dynamic_shapes(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k: bigkern.attention(q, k, k, causal=True),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    device = device_of(backend)
    with run_backend("attention", backend), torch._dynamo.config.patch(error_on_recompile=True):
        for S in (8, 12, 20):
            q, k = torch.randn(2, 4, S, 16, device=device), torch.randn(2, 2, S + 3, 16, device=device)
            torch.testing.assert_close(compiled(q, k), bigkern.attention(q, k, k, causal=True))


def by_torch(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, is_causal=True).sin().sum()


@EVERY
def test_functional_transforms(backend: str) -> None:
    """Kernels run under vmap and grad, mapped over some or all of q, k and v."""
    q, k = torch.randn(3, 1, 2, 9, 16, device=device_of(backend)), torch.randn(1, 2, 9, 16)
    k = k.to(q)

    def by_us(q: Tensor, k: Tensor) -> Tensor:
        return bigkern.attention(q, k, k, causal=True).sin().sum()  # type: ignore[union-attr]

    both = lambda f: torch.func.grad(f, argnums=(0, 1))  # noqa: E731
    with run_backend("attention", backend):
        mine = [
            torch.func.vmap(by_us, in_dims=(0, None))(q, k),
            *both(by_us)(q[0], k),
            *torch.func.vmap(both(by_us), in_dims=(0, None))(q, k),
            *torch.func.vmap(both(by_us), in_dims=(2, None), out_dims=2)(q.permute(1, 2, 0, 3, 4), k),
        ]
    per_sample = [both(by_torch)(x, k) for x in q]
    dq, dk = (torch.stack(grads) for grads in zip(*per_sample, strict=True))
    theirs = [torch.stack([by_torch(x, k) for x in q]), *per_sample[0], dq, dk]
    theirs += [dq.movedim(0, 2), dk.movedim(0, 2)]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_functional_transforms_that_need_stock() -> None:
    """A kernel has no forward derivative and no second one there, so stock runs; ``explain`` says so."""
    seen = []

    def loss(q: Tensor) -> Tensor:
        seen.append(bigkern.explain("attention", q, q, q))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return bigkern.attention(q, q, q, causal=True).sin().sum()  # type: ignore[union-attr]

    q = torch.randn(1, 2, 9, 16, dtype=torch.float64)
    with bigkern.use("torch"):
        right = torch.func.hessian(loss)(q)
    torch.testing.assert_close(torch.func.hessian(loss)(q.float()), right.float(), atol=1e-5, rtol=1e-4)
    assert seen[-1].chosen == "torch"
    assert "torch.func" in str(seen[-1])


def test_export() -> None:
    """One opaque node in an exported program, with the batch left open."""

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Any:
            return bigkern.attention(q, k, k, causal=True, window=(5, 0))

    q, k = torch.randn(2, 4, 12, 16), torch.randn(2, 2, 12, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Model(), (q, k), dynamic_shapes={"q": {0: batch}, "k": {0: batch}})
    if bigkern.explain("attention", q, k, k, window=(5, 0)).chosen != "torch":
        assert "torch.ops.bigkern.attention" in exported.graph_module.code
    q, k = torch.randn(5, 4, 12, 16), torch.randn(5, 2, 12, 16)
    torch.testing.assert_close(exported.module()(q, k), Model()(q, k))


def test_meta_tensors() -> None:
    q = torch.empty(2, 4, 12, 16, device="meta", requires_grad=True)
    k = torch.empty(2, 2, 20, 16, device="meta")
    o, lse = bigkern.attention(q, k, k, causal=True, sinks=torch.empty(4, device="meta"), return_lse=True)
    assert o.shape == q.shape
    assert lse.shape == (2, 4, 12)
    (dq,) = torch.autograd.grad(o.sum(), q)
    assert dq.shape == q.shape


@EVERY
def test_autocast(backend: str) -> None:
    """As torch's own function: inputs are narrowed, except float64, and gradients come back wide."""
    device = device_of(backend)
    q = torch.randn(1, 2, 8, 16, device=device, requires_grad=True)
    bias = torch.zeros(8, 8, device=device)
    with run_backend("attention", backend):
        with torch.autocast(device.type, torch.bfloat16):
            o = bigkern.attention(q, q.bfloat16(), q, bias=bias)
        (dq,) = torch.autograd.grad(o.float().sum(), q)  # type: ignore[union-attr]
    assert o.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert dq.dtype == torch.float32


# ---- errors, and the choice of a backend -----------------------------------------------------------

Q = torch.zeros(2, 4, 5, 8)

WRONG: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("q", TypeError, {"q": [1.0]}),
    ("k", TypeError, {"k": None}),
    ("q", ValueError, {"q": torch.zeros(4, 5, 8)}),
    ("v", ValueError, {"v": torch.zeros(5, 8)}),
    ("q", TypeError, {"q": Q.int(), "k": Q.int(), "v": Q.int()}),
    ("k", TypeError, {"k": Q.double()}),
    ("v", TypeError, {"v": Q.half()}),
    ("k", ValueError, {"k": Q.to("meta")}),
    ("k", ValueError, {"k": torch.zeros(3, 4, 5, 8)}),
    ("k", ValueError, {"k": torch.zeros(2, 4, 5, 7)}),
    ("v", ValueError, {"v": torch.zeros(2, 4, 6, 8)}),
    ("v", ValueError, {"v": torch.zeros(2, 2, 5, 8)}),
    ("q", ValueError, {"k": torch.zeros(2, 3, 5, 8), "v": torch.zeros(2, 3, 5, 8)}),
    ("q", ValueError, {"k": torch.zeros(2, 0, 5, 8), "v": torch.zeros(2, 0, 5, 8)}),
    ("q", ValueError, {"q": torch.zeros(2, 4, 5, 0), "k": torch.zeros(2, 4, 5, 0)}),
    ("scale", ValueError, {"scale": float("nan")}),
    ("scale", ValueError, {"scale": float("inf")}),
    ("causal", ValueError, {"causal": "upper"}),
    ("causal", ValueError, {"causal": 2}),
    ("causal", ValueError, {"causal": ["top_left"]}),
    ("mask", TypeError, {"mask": torch.zeros(5, 5)}),
    ("mask", TypeError, {"mask": True}),
    ("mask", ValueError, {"mask": torch.ones(5, 4, dtype=torch.bool)}),
    ("mask", ValueError, {"mask": torch.ones(1, 2, 4, 5, 5, dtype=torch.bool)}),
    ("mask", ValueError, {"mask": torch.ones(5, 5, dtype=torch.bool, device="meta")}),
    ("bias", TypeError, {"bias": torch.zeros(5, 5).half()}),
    ("bias", TypeError, {"bias": 1.0}),
    ("bias", ValueError, {"bias": torch.zeros(3, 5, 5)}),
    ("window", TypeError, {"window": 5}),
    ("window", TypeError, {"window": (1.0, None)}),
    ("window", ValueError, {"window": (-1, 0)}),
    ("softcap", ValueError, {"softcap": -1.0}),
    ("softcap", ValueError, {"softcap": float("inf")}),
    ("alibi_slopes", TypeError, {"alibi_slopes": [0.5] * 4}),
    ("alibi_slopes", ValueError, {"alibi_slopes": torch.ones(2)}),
    ("alibi_slopes", ValueError, {"alibi_slopes": torch.ones(4, requires_grad=True)}),
    ("sinks", TypeError, {"sinks": torch.ones(4, dtype=torch.int32)}),
    ("sinks", ValueError, {"sinks": torch.ones(2, 4)}),
    ("sinks", ValueError, {"sinks": torch.ones(4, device="meta")}),
    ("dropout_p", ValueError, {"dropout_p": 1.0}),
    ("dropout_p", ValueError, {"dropout_p": -0.1}),
    ("dropout_p", ValueError, {"dropout_p": float("nan")}),
    ("seed", ValueError, {"dropout_p": 0.5, "seed": -1}),
    ("offset", ValueError, {"dropout_p": 0.5, "seed": 1, "offset": 0.5}),
]


@pytest.mark.parametrize(("name", "error", "change"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_arguments_are_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    call = {"q": Q, "k": Q, "v": Q, **change}
    with pytest.raises(error, match=rf"^{name}\b"):
        bigkern.attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.skipif(info.import_error is not None, reason="the extension is not built")
def test_native_op_checks_for_itself() -> None:
    def native(q: Tensor, k: Tensor, v: Tensor, **changed: Any) -> Any:
        numbers = {"scale": 1.0, "causal": "none", "window_left": -1, "window_right": -1, "softcap": 0.0}
        numbers |= {"dropout_p": 0.0, "max_seqlen_q": q.shape[2], "max_seqlen_k": k.shape[2]}
        nothing = dict.fromkeys(RULES)
        return torch.ops.bigkern_native.attention(q, k, v, **nothing | numbers | changed)

    wide, ends = torch.zeros(1, 1, 2, 257), torch.tensor([0, 5], dtype=torch.int32)
    wrong: list[tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = [
        ("^k must have q's dtype", (Q, Q.half(), Q), {}),
        ("causal must be", (Q, Q, Q), {"causal": "upper"}),
        ("head_dim must be at most 256", (wide, wide, wide), {}),
        ("mask must have four dimensions", (Q, Q, Q), {"mask": torch.ones(5, 5, dtype=torch.bool)}),
        ("bias must have q's dtype", (Q, Q, Q), {"bias": Q[:1, :1, :, :5].half()}),
        ("sinks must be contiguous float32", (Q, Q, Q), {"sinks": torch.zeros(3)}),
        ("dropout needs a dropout_key", (Q, Q, Q), {"dropout_p": 0.5}),
        ("packed sequences need", (Q, Q, Q), {"cu_seqlens_q": ends}),
        ("cu_seqlens_q must be contiguous int32", (Q[:1], Q[:1], Q[:1]), {"cu_seqlens_q": ends.long()}),
    ]
    for message, tensors, changed in wrong:
        with pytest.raises(RuntimeError, match=message):
            native(*tensors, **changed)


def test_explain_gives_every_backend_a_reason() -> None:
    few = {c.backend: c.reason for c in bigkern.explain("attention", Q, Q, Q, causal=True)}
    assert few["cpu"] in ("not measured here: stock is faster below 32 tokens", info.summary())
    q = torch.zeros(2, 4, 32, 8)
    explanation = bigkern.explain("attention", q, q, q, causal=True)
    named = [choice.backend for choice in explanation]
    assert named == ["cuda", "triton", "cpu", "torch", *stock_kernels.KERNELS][: len(named)]
    assert len(named) == (7 if torch.backends.cuda.is_built() else 4)
    assert explanation.chosen == ("cpu" if info.import_error is None else "torch")
    assert all(choice.reason for choice in explanation)
    wide = torch.zeros(1, 1, 2, 320)
    assert "head_dim 320 > 256" in str(bigkern.explain("attention", wide, wide, wide))
    assert bigkern.explain("attention", wide, wide, wide).chosen == "torch"
    double = Q.double()
    assert "float64 is not" in str(bigkern.explain("attention", double, double, double))


def test_use_forces_or_refuses() -> None:
    wide = torch.zeros(1, 1, 2, 320)
    with bigkern.use("torch"):
        assert bigkern.explain("attention", Q, Q, Q).chosen == "torch"
        assert bigkern.attention(Q, Q, Q).shape == Q.shape
    with bigkern.use(attention="cpu"), pytest.raises(bigkern.BackendRefused, match=r"320|did not load"):
        bigkern.attention(wide, wide, wide)
    if not torch.cuda.is_available():
        with bigkern.use("cuda"), pytest.raises(bigkern.BackendRefused, match="cuda backend refuses"):
            bigkern.attention(Q, Q, Q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernels are a GPU's")
@pytest.mark.parametrize("name", stock_kernels.KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_torchs_single_kernels_are_attention(name: str, causal: bool) -> None:
    problem = form(D=64, causal=causal, lse=False)
    try:
        verdicts = judge(problem, torch.bfloat16, torch.device("cuda"), name)
    except bigkern.BackendRefused as error:
        pytest.skip(str(error))
    assert not [verdict.problem for verdict in verdicts.values() if not verdict.passed]


# ---- torch's own function --------------------------------------------------------------------------


def test_sdpa_has_torchs_signature() -> None:
    ours = inspect.signature(bigkern.scaled_dot_product_attention)
    torchs = torch.ops.aten.scaled_dot_product_attention.default._schema
    assert list(ours.parameters) == [argument.name for argument in torchs.arguments]
    for argument in torchs.arguments:
        default = ours.parameters[argument.name].default
        if argument.has_default_value():
            assert default == argument.default_value, argument.name
        else:
            assert default is inspect.Parameter.empty, argument.name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": torch.rand(5, 9) < 0.8},
        {"attn_mask": torch.randn(2, 1, 5, 9)},
        {"attn_mask": torch.randn(4, 5, 9)},
        {"enable_gqa": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_sdpa_means_what_torchs_does(options: dict[str, Any]) -> None:
    Hkv = 2 if "enable_gqa" in options else 4
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, Hkv, 9, 8), torch.randn(2, Hkv, 9, 6)
    mine = bigkern.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(mine, F.scaled_dot_product_attention(q, k, v, **options))


def test_sdpa_of_what_the_kernels_do_not_cover() -> None:
    ours, torchs = bigkern.scaled_dot_product_attention, F.scaled_dot_product_attention
    for shape in [(5, 8), (3, 5, 8), (2, 1, 3, 5, 8)]:
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x, x, x), torchs(x, x, x))
    q = torch.randn(1, 2, 5, 8)
    assert not torch.equal(ours(q, q, q, dropout_p=0.5), ours(q, q, q, dropout_p=0.5))
    both = {"attn_mask": torch.rand(5, 5).round().bool() | torch.eye(5).bool(), "is_causal": True}
    try:
        expected = torchs(q, q, q, **both)
    except RuntimeError:  # before torch 2.13
        with pytest.raises(RuntimeError):
            ours(q, q, q, **both)
    else:
        torch.testing.assert_close(ours(q, q, q, **both), expected)
    one_head = q[:, :1]
    torch.testing.assert_close(ours(q, one_head, one_head), torchs(q, one_head, one_head))


@pytest.mark.parametrize("mask", [None, torch.zeros(5, 5)], ids=["", "mask"])
def test_sdpa_under_autocast(mask: Tensor | None) -> None:
    q = torch.randn(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mine = bigkern.scaled_dot_product_attention(q, q.bfloat16(), q, mask)
        theirs = F.scaled_dot_product_attention(q, q.bfloat16(), q, mask)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("shape", "keys", "dropout_p"),
    [
        ((2, 4, 5, 8), 9, 1.0),
        ((2, 0, 5, 8), 9, 0.0),
        ((2, 4, 5, 0), 9, 0.0),
        ((0, 4, 5, 8), 9, 0.0),
        ((2, 4, 0, 8), 9, 0.0),
        ((2, 4, 5, 8), 0, 0.0),
    ],
    ids=["everything is dropped", "no heads", "D = 0", "no batch", "Sq = 0", "Sk = 0"],
)
def test_sdpa_of_nothing_is_torchs(shape: tuple[int, ...], keys: int, dropout_p: float) -> None:
    B, H, _S, D = shape
    q, k, v = torch.randn(shape), torch.randn(B, H, keys, D), torch.randn(B, H, keys, 6)
    for options in ({}, {"is_causal": True}, {"enable_gqa": True}):
        mine = bigkern.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, **options)
        theirs = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, **options)
        torch.testing.assert_close(mine, theirs)


# ---- numbers that are none ---------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("causal", [False, "bottom_right"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["q", "k"])
def test_nan_and_inf_stay_in_the_rows_that_see_them(
    name: str, bad: float, causal: str | bool, backend: str
) -> None:
    tensors = {"q": torch.randn(1, 2, 70, 16), "k": torch.randn(1, 2, 70, 16), "v": torch.randn(1, 2, 70, 16)}
    tensors[name][0, 1, 37, 3] = bad
    q, k, v = (x.double() for x in tensors.values())
    scores = q @ k.mT / 4
    if causal:
        scores = scores.masked_fill(~torch.ones(70, 70, dtype=torch.bool).tril(), float("-inf"))
    expected = torch.softmax(scores, -1) @ v
    with run_backend("attention", backend):
        o, lse = bigkern.attention(
            *(x.to(device_of(backend)) for x in tensors.values()), causal=causal, return_lse=True
        )
    o, lse = o.cpu().double(), lse.cpu().double()
    sees_it = torch.zeros(1, 2, 70, dtype=torch.bool)
    sees_it[0, 1, slice(37, 38) if name == "q" else slice(37 if causal else 0, None)] = True
    assert not o[~sees_it].isnan().any()
    assert o[expected.isnan()].isnan().all()
    finite = ~o.isnan().any(-1)
    torch.testing.assert_close(o[finite], expected[finite], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse[finite], scores.logsumexp(-1)[finite], rtol=1e-3, atol=1e-3)
