"""Attention: every backend against float64, its gradients, its edges and its public face."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import (
    BACKENDS,
    FUZZ_FROM,
    KERNEL_BACKENDS,
    RECORD,
    assert_parity,
    device_of,
    poisoned_empty_memory,
    run_backend,
)
from torch import Tensor

import bigkern
from bigkern.core import info
from bigkern.core.parity import Yardstick
from bigkern.ops.attention import reference
from bigkern.ops.attention import stock as torchs
from bigkern.ops.attention.call import Attention, AttentionBackward, bind
from bigkern.ops.attention.transforms import RULES

NATIVE = [name for name in BACKENDS if name in ("cpu", "torch", "cuda")]  # fast enough for large tensors
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY = pytest.mark.parametrize("backend", BACKENDS)
KERNELS = pytest.mark.parametrize("backend", KERNEL_BACKENDS)


# ---- a call, as data -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The arguments of one call; ``check(Case(...), backend)`` repeats it exactly."""

    def __str__(self) -> str:
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return "-".join(f"{name}={getattr(self, name)}" for name in changed) or "plain"

    dtype: torch.dtype = torch.float32
    B: int = 1
    Hq: int = 2
    Hkv: int = 2
    Sq: int = 33
    Sk: int = 33
    D: int = 32
    Dv: int = 32
    causal: str = "none"
    mask: str = ""  # "", "full", "keys" (one row for all queries) or "dead" (some rows see nothing)
    bias: str = ""  # "", "full", "keys", "heads" (one for all batches) or "rows" (one for all keys)
    bias_grad: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    alibi: str = ""  # "", "heads" or "batches" (slopes of their own)
    sinks: bool = False
    dropout: float = 0.0
    lse_grad: bool = False
    lengths: tuple[tuple[int, int], ...] = ()  # (Sq, Sk) of packed sequences; then B, Sq and Sk do not count
    scale: float | None = None
    layout: str = "bshd"  # "bhsd", "bshd", "sliced" (last stride 2) or "expanded" (k and v stride 0)
    seed: int = 0

    def tensors(self, device: torch.device) -> dict[str, Tensor | None]:
        """Every tensor of the call, and the gradients of its results; the same numbers on every device."""
        if self.lengths:
            totals = [sum(lengths) for lengths in zip(*self.lengths, strict=True)]
            found = replace(self, lengths=(), B=1, Sq=totals[0], Sk=totals[1], alibi="").tensors(device)
            for name, lengths in zip(
                ("cu_seqlens_q", "cu_seqlens_k"), zip(*self.lengths, strict=True), strict=True
            ):
                ends = torch.tensor([0, *lengths]).cumsum(0)
                found[name] = ends.to(device, torch.int32)
            if self.alibi:
                found["alibi_slopes"] = self.slopes(len(self.lengths)).to(device)
            return found
        generator = torch.Generator().manual_seed(self.seed)

        def values(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        def laid_out(H: int, S: int, D: int, keys: bool = False) -> Tensor:
            if self.layout == "bhsd":
                return values(self.B, H, S, D)
            if self.layout == "sliced":
                return values(self.B, H, S, 2 * D)[..., ::2]
            if self.layout == "expanded" and keys:
                return values(1, 1, S, D).expand(self.B, H, S, D)
            return values(self.B, S, H, D).transpose(1, 2)

        found: dict[str, Tensor | None] = {
            "q": laid_out(self.Hq, self.Sq, self.D),
            "k": laid_out(self.Hkv, self.Sk, self.D, keys=True),
            "v": laid_out(self.Hkv, self.Sk, self.Dv, keys=True),
            "do": laid_out(self.Hq, self.Sq, self.Dv),
        }
        shapes = {
            "full": (self.B, self.Hq, self.Sq, self.Sk),
            "dead": (self.B, 1, self.Sq, self.Sk),
            "heads": (self.Hq, self.Sq, self.Sk),
            "keys": (self.B, 1, 1, self.Sk),
            "rows": (self.Hq, self.Sq, 1),
        }
        found["mask"] = torch.rand(shapes[self.mask], generator=generator) < 0.8 if self.mask else None
        if self.mask == "dead" and self.Sq > 0:
            found["mask"][:, :, torch.rand(self.Sq, generator=generator) < 0.3] = False  # type: ignore[index]
            found["mask"][:, :, 0] = False  # type: ignore[index]
        found["bias"] = values(*shapes[self.bias]) if self.bias else None
        found["alibi_slopes"] = self.slopes(self.B) if self.alibi else None
        found["sinks"] = torch.randn(self.Hq, generator=generator) if self.sinks else None
        found["dlse"] = torch.randn(self.B, self.Hq, self.Sq, generator=generator) if self.lse_grad else None
        return {name: None if x is None else x.to(device) for name, x in found.items()}

    def features(self) -> list[str]:
        """What the call uses, in the words of the feature table."""
        used = {
            "causal, from the top left": self.causal == "top_left",
            "causal, from the bottom right": self.causal == "bottom_right",
            "boolean mask": self.mask != "",
            "additive bias": self.bias != "",
            "bias gradient, summed over broadcast dimensions": self.bias_grad,
            "ALiBi": self.alibi != "",
            "sliding window": self.window is not None,
            "softcap": self.softcap != 0.0,
            "sinks, with gradient": self.sinks,
            "dropout": self.dropout != 0.0,
            "gradient of the log-sum-exp": self.lse_grad,
            "grouped and multi-query heads": self.Hq != self.Hkv,
            "Sq != Sk": self.Sq != self.Sk,
            "Dv != D": self.Dv != self.D,
            "head dims that are no multiple of 8": self.D % 8 != 0,
            "head dims above 128": self.D > 128,
            "any strides": self.layout in ("sliced", "expanded"),
            "packed sequences": bool(self.lengths),
            "empty sequences": any(0 in pair for pair in self.lengths),
            str(self.dtype).removeprefix("torch."): True,
        }
        return [name for name, yes in used.items() if yes]

    def slopes(self, B: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (B, self.Hq) if self.alibi == "batches" else (self.Hq,)
        return torch.rand(shape, generator=generator)

    def options(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The public function's keyword arguments."""
        given = {name: tensors[name] for name in ("mask", "bias") if not self.lengths}
        given |= {name: tensors[name] for name in ("alibi_slopes", "sinks")}
        numbers = {name: getattr(self, name) for name in ("causal", "window", "softcap", "scale")}
        return given | numbers | {"dropout_p": self.dropout, "seed": self.seed, "offset": 3}


Results = dict[str, Tensor]  # o, lse and the gradients


def leaves(tensors: dict[str, Any], *names: str) -> list[Tensor]:
    return [tensors[name].detach().requires_grad_() for name in names]


def with_gradients(case: Case) -> list[str]:
    optional = [name for name, asked in (("bias", case.bias_grad), ("sinks", case.sinks)) if asked]
    return ["q", "k", "v", *optional]


def differentiate(case: Case, tensors: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Results:
    """o, lse and all gradients of ``call(tensors) -> (o, lse)``, with NaN in all free memory."""
    names = with_gradients(case)
    inputs = dict(zip(names, leaves(tensors, *names), strict=True))
    poisoned_empty_memory()
    o, lse = call(tensors | inputs)
    poisoned_empty_memory()
    results = [(o, tensors["do"])]
    if tensors["dlse"] is not None and lse.requires_grad:
        results.append((lse, tensors["dlse"].to(lse)))
    outputs, upstream = zip(*results, strict=True)
    grads = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    return {"o": o, "lse": lse} | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def ours(case: Case, backend: str) -> Results:
    """Forward and backward by the public function."""

    def call(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, v = (given[name] for name in ("q", "k", "v"))
        if not case.lengths:
            return bigkern.attention(q, k, v, **case.options(given), return_lse=True)  # type: ignore[return-value]
        packed = [x.squeeze(0).transpose(0, 1) for x in (q, k, v)]
        ends = (given["cu_seqlens_q"], given["cu_seqlens_k"])
        o, lse = bigkern.varlen_attention(*packed, *ends, **case.options(given), return_lse=True)
        return o.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)

    with run_backend("attention", backend):
        return differentiate(case, case.tensors(device_of(backend)), call)


def bound(case: Case, tensors: dict[str, Any]) -> Attention:
    """The op's call."""
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    if not case.lengths:
        return bind(q, k, v, **case.options(tensors))
    packed = [x.squeeze(0).transpose(0, 1) for x in (q, k, v)]
    return bind(*packed, tensors["cu_seqlens_q"], tensors["cu_seqlens_k"], **case.options(tensors))


def by_reference(case: Case, tensors: dict[str, Any]) -> Results:
    """The specification, in the tensors' dtype."""
    call = bound(case, tensors)
    o, lse = reference.attention(call)
    do, dlse = tensors["do"], None if tensors["dlse"] is None else tensors["dlse"].to(lse)
    backward = AttentionBackward.of(call, do, dlse, o, lse, case.bias_grad)
    dq, dk, dv, dbias = reference.attention_backward(backward)
    results = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if case.bias_grad:
        results["dbias"] = dbias.view(tensors["bias"].shape)  # type: ignore[union-attr]
    if case.sinks:
        results["dsinks"] = reference.sinks_gradient(backward)
    return results


def exact(case: Case, backend: str) -> Results:
    tensors = case.tensors(device_of(backend))
    for name in ("q", "k", "v", "bias", "do", "dlse"):
        if tensors[name] is not None:
            tensors[name] = tensors[name].double()  # type: ignore[union-attr]
    return by_reference(case, tensors)


def stock(case: Case, tensors: dict[str, Any]) -> Results:
    """Stock PyTorch in the case's own precision: scores, softmax and products one by one.

    Where torch's own function can do the call, its results; where a row sees nothing, what it should have
    given. Beyond that, the math as one writes it in torch, intermediate results in the case's dtype.
    """
    call = bound(case, tensors)
    beyond = case.softcap or case.sinks or case.dropout or case.lse_grad or case.lengths
    if beyond:
        return differentiate(case, tensors, lambda given: composed(case, given))
    allowed = reference.visible(call)
    if allowed is None:
        allowed = torch.ones(case.Sq, case.Sk, dtype=torch.bool, device=call.q.device)
    dead = ~allowed.any(-1, keepdim=True)
    if bool(dead.any()):
        alive = {"mask": allowed | dead, "do": tensors["do"].masked_fill(dead, 0.0)}
        case, tensors = replace(case, causal="none", window=None), tensors | alive

    def run(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return torchs.attention(bound(case, given)), reference.attention(bound(case, given)).lse

    lse = reference.attention(call).lse
    results = differentiate(case, tensors, run)
    return results | {"o": results["o"].masked_fill(dead, 0.0), "lse": lse}


def composed(case: Case, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attention as one would write it in torch in the case's dtype, sequence by sequence."""
    call = bound(case, given)
    if not case.lengths:
        return composed_of(call, 0)
    parts = [composed_of(own, b) for b, (_, _, own) in enumerate(reference.sequences(call))]
    o, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return o, lse


def composed_of(call: Attention, first: int) -> tuple[Tensor, Tensor]:
    q, group = call.q, call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (call.k, call.v))
    x = q @ k.transpose(-1, -2) * call.scale
    if call.softcap:
        x = call.softcap * torch.tanh(x / call.softcap)
    s = reference.restricted(x, call).float()
    if call.sinks is not None:
        s = torch.cat([s, call.sinks.view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    lse = torch.logsumexp(s.detach(), -1) if s.shape[-1] else s.new_full(s.shape[:-1], float("-inf"))
    dead = torch.isneginf(lse).unsqueeze(-1)
    s = s.masked_fill(dead, 0.0)
    p = torch.softmax(s, -1)[..., : k.shape[2]].masked_fill(dead, 0.0)
    if s.requires_grad and s.shape[-1]:
        lse = torch.where(dead.squeeze(-1), lse, torch.logsumexp(s, -1))
    p = reference.drop(p, call, first).to(q.dtype)
    return p @ v, lse


def check(case: Case, backend: str) -> None:
    """Hold a backend to the parity rule on one call: output, log-sum-exp and all gradients."""
    tensors = case.tensors(device_of(backend))
    yardstick = Yardstick(
        exact(case, backend), partial(stock, case, tensors), partial(by_reference, case, tensors)
    )
    assert_parity("attention", backend, ours(case, backend), yardstick, case)
    RECORD.passed("attention", backend, case.features())


# ---- parity ----------------------------------------------------------------------------------------

SMALL = [
    Case(Sq=64, Sk=64, D=64, Dv=64),
    Case(Sq=7, Sk=63, D=40, Dv=40),
    Case(Sq=1, Sk=70),
    Case(Sq=5, Sk=1, D=1, Dv=1),
    Case(Sq=65, Sk=70, causal="top_left"),
    Case(Sq=70, Sk=33, causal="top_left"),
    Case(Sq=33, Sk=70, causal="bottom_right"),
    Case(Sq=70, Sk=33, causal="bottom_right"),  # the first rows see nothing
    Case(Hq=4, Hkv=2, Sq=20, Sk=37, causal="bottom_right", layout="bhsd"),
    Case(Hq=6, Hkv=1, Sq=3, Sk=50, mask="full"),
    Case(mask="full"),
    Case(B=2, mask="keys", bias="keys"),
    Case(mask="dead", causal="top_left"),
    Case(B=2, bias="heads"),
    Case(bias="full", mask="full", causal="bottom_right", Sq=20, Sk=40),
    Case(scale=0.5, D=24, Dv=56),
    Case(scale=-0.1, D=128, Dv=128, Sq=17, Sk=20),
    Case(D=256, Dv=256, Sq=9, Sk=40),
    Case(B=2, layout="sliced"),
    Case(B=2, Hq=4, Hkv=2, layout="expanded"),
    # one feature beyond dot products at a time ...
    Case(B=2, bias="heads", bias_grad=True),  # summed over batches
    Case(Hq=4, Hkv=2, bias="full", bias_grad=True, causal="top_left", mask="dead"),
    Case(B=2, bias="keys", bias_grad=True, Sq=70, Sk=40),
    Case(bias="rows", bias_grad=True, sinks=True, Sq=20, Sk=70),  # without a sink its gradient is 0
    Case(window=(5, 3)),
    Case(window=(7, None), causal="bottom_right", Sq=40, Sk=70),
    Case(window=(0, 0), Sq=70, Sk=70),
    Case(window=(None, 4), Sq=33, Sk=20),  # the first rows see nothing
    Case(window=(2, 0), causal="top_left", Sq=70, Sk=20),  # and here the last ones
    Case(softcap=0.7),
    Case(softcap=2.0, causal="top_left", scale=1.0, Sq=70, Sk=70),
    Case(alibi="heads", causal="top_left"),
    Case(B=2, alibi="batches", Sq=20, Sk=70),
    Case(sinks=True, Hq=4, causal="bottom_right", Sq=40, Sk=20),  # rows with nothing but a sink
    Case(sinks=True, B=2, Hq=8, Hkv=2, mask="dead"),
    Case(dropout=0.3),
    Case(B=2, Hq=4, Hkv=2, dropout=0.8, causal="bottom_right", Sq=20, Sk=70),
    Case(lse_grad=True, causal="top_left", Sk=20),
    Case(lengths=((5, 5), (0, 0), (40, 40), (1, 1))),
    Case(lengths=((5, 9), (0, 7), (9, 0), (33, 70)), causal="bottom_right", Hq=4),
    Case(lengths=((70, 30), (3, 3)), causal="top_left", window=(9, 0), layout="bhsd"),
    # ... and all together
    Case(
        B=2, Hq=4, bias="heads", bias_grad=True, mask="full", window=(20, 10), softcap=1.5, alibi="batches",
        sinks=True, dropout=0.2, lse_grad=True, Sq=40, Sk=50,
    ),
    Case(
        lengths=((20, 30), (0, 4), (33, 33)), Hq=4, causal="bottom_right", window=(12, None), softcap=1.5,
        alibi="batches", sinks=True, dropout=0.2, lse_grad=True,
    ),
]  # fmt: skip

LARGE = [
    Case(B=2, Hq=3, Hkv=3, Sq=129, Sk=129, D=64, Dv=64, causal="top_left"),
    Case(Sq=1023, Sk=1023, D=64, Dv=64),
    Case(Sq=1023, Sk=1023, D=64, Dv=64, causal="top_left"),
    Case(Sq=63, Sk=1023, D=128, Dv=128, causal="bottom_right"),
    Case(Hq=4, Hkv=1, Sq=129, Sk=511, D=40, Dv=72, mask="dead", bias="heads"),
    Case(B=2, Hq=8, Hkv=2, Sq=1, Sk=1023, D=64, Dv=64, mask="keys"),
    Case(Sq=257, Sk=129, D=256, Dv=128, causal="bottom_right", layout="sliced"),
    Case(B=8, Hq=4, Hkv=4, Sq=128, Sk=128, causal="top_left"),
]


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_parity(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(replace(case, dtype=dtype), backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_parity_of_large_tensors(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(replace(case, dtype=dtype), backend)


def random_case(seed: int, largest: int) -> Case:
    """Anything the contract allows, with sizes up to ``largest``."""
    draw = random.Random(seed)
    size = lambda: draw.choice([1, draw.randint(1, 16), draw.randint(1, largest)])  # noqa: E731
    side = lambda: draw.choice([None, 0, draw.randint(1, largest)])  # noqa: E731
    Hkv = draw.choice([1, 2, 3])
    D = draw.choice([1, 8, 40, 64, draw.randint(1, 96), 128])
    packed = draw.random() < 0.2
    lengths = tuple((draw.choice([0, size()]), draw.choice([0, size()])) for _ in range(draw.randint(1, 4)))
    bias = "" if packed else draw.choice(["", "", "full", "keys", "heads", "rows"])
    return Case(
        dtype=draw.choice(DTYPES),
        B=draw.choice([1, 2]),
        Hq=Hkv * draw.choice([1, 1, 2, 4]),
        Hkv=Hkv,
        Sq=size(),
        Sk=size(),
        D=D,
        Dv=draw.choice([D, draw.randint(1, 96)]),
        causal=draw.choice(["none", "top_left", "bottom_right"]),
        mask="" if packed else draw.choice(["", "", "full", "keys", "dead"]),
        bias=bias,
        bias_grad=bias not in ("", "rows") and draw.random() < 0.5,
        window=draw.choice([None, None, (side(), side())]),
        softcap=draw.choice([0.0, 0.0, 0.0, 1.5]),
        alibi=draw.choice(["", "", "", "heads", "batches"]),
        sinks=draw.random() < 0.2,
        dropout=draw.choice([0.0, 0.0, 0.0, 0.1, 0.7]),
        lse_grad=draw.random() < 0.2,
        lengths=lengths if packed else (),
        scale=draw.choice([None, None, 0.3, -0.2]),
        layout=draw.choice(["bhsd", "bshd", "sliced", "expanded"]),
        seed=seed,
    )


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask for the same bits in every run; a warning where torch itself has no such algorithm."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@KERNELS
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in SMALL if case.Hq > 2 and case.Sq < 70], ids=str)
def test_parity_of_deterministic_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(replace(case, dtype=dtype), backend)


SEEDS = {"cpu": 1400, "torch": 100, "cuda": 60, "triton": 24, "simt": 30}
FUZZ = [(backend, seed) for backend in BACKENDS for seed in range(SEEDS[backend])]


@pytest.mark.parametrize(("backend", "seed"), FUZZ)
def test_fuzz(backend: str, seed: int) -> None:
    case = random_case(seed + FUZZ_FROM, largest=300 if backend in NATIVE else 40)
    try:
        check(case, backend)
    except BaseException:
        print(f"to repeat: from test_attention import *; check({case!r}, {backend!r})")
        raise


# ---- edges -----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_rows_that_see_nothing(dtype: torch.dtype, causal: str, backend: str) -> None:
    case = Case(dtype=dtype, Sq=40, Sk=20, mask="dead", causal=causal)
    mine, right = ours(case, backend), exact(case, backend)
    dead = torch.isneginf(right["lse"])
    assert bool(dead.any())
    assert not bool(dead.all())
    assert torch.equal(torch.isneginf(mine["lse"]), dead)
    assert not mine["o"][dead].any()
    assert not mine["dq"][dead].any()
    assert all(bool(x.isfinite().all()) for x in (mine["o"], mine["dq"], mine["dk"], mine["dv"]))


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
    case = Case(Hq=4, Hkv=2, Sq=50, Sk=60, causal="bottom_right")
    first, again = ours(case, backend), ours(case, backend)
    assert all(torch.equal(first[x], again[x]) for x in first)


@pytest.mark.skipif(info.import_error is not None, reason="the extension is not built")
@pytest.mark.parametrize("threads", [1, 3])
def test_cpu_thread_counts(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Case(Hq=2, Hkv=1, Sq=200, Sk=300, D=64, Dv=64, causal="bottom_right"), "cpu")
        check(Case(Hq=2, Hkv=1, Sq=1, Sk=900, D=64, Dv=64), "cpu")
    finally:
        torch.set_num_threads(before)


@EVERY
def test_gradients_of_some_inputs(backend: str) -> None:
    tensors = Case().tensors(device_of(backend))
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    k = k.detach().requires_grad_()  # type: ignore[union-attr]
    with run_backend("attention", backend):
        o, lse = bigkern.attention(q, k, v, causal=True, return_lse=True)
        assert o.requires_grad
        assert lse.requires_grad
        (dk,) = torch.autograd.grad(o, k, tensors["do"])
        with torch.no_grad():
            assert not bigkern.attention(q, k, v).requires_grad
        assert not bigkern.attention(q, k.detach(), v).requires_grad
    torch.testing.assert_close(dk, ours(Case(causal="top_left"), backend)["dk"])


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
    case = Case(Sq=9, Sk=12, D=16, Dv=8, causal="bottom_right")
    if features == "all":
        case = replace(case, Hq=4, mask="full", bias="heads", bias_grad=True, dtype=torch.bfloat16)
        case = replace(case, sinks=True, alibi="heads", dropout=0.2, lse_grad=True)
    if features == "packed":
        case = replace(case, lengths=((3, 4), (0, 2), (6, 6)))
    tensors = case.tensors(device_of(backend))
    names = with_gradients(case)
    tensors |= dict(zip(names, leaves(tensors, *names), strict=True))
    args = bound(case, tensors).flat()
    with run_backend("attention", backend):
        torch.library.opcheck(torch.ops.bigkern.attention.default, args)
        o, lse = torch.ops.bigkern.attention(*args)
        detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
        saved = (*detached[:3], o.detach(), lse.detach(), case.bias_grad, *detached[3:])
        torch.library.opcheck(
            torch.ops.bigkern.attention_backward.default, (tensors["do"], tensors["dlse"], *saved)
        )


@EVERY
@pytest.mark.parametrize("return_lse", [False, True])
def test_compile(return_lse: bool, backend: str) -> None:
    """One graph, the same results, and nothing compiled twice."""
    tensors = Case(causal="top_left").tensors(device_of(backend))
    q, k, v = leaves(tensors, "q", "k", "v")

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = bigkern.attention(q, k, v, causal=True, return_lse=return_lse)
        return result[0] * 2 + result[1].unsqueeze(-1) if return_lse else result * 2  # type: ignore[operator]

    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    with run_backend("attention", backend), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            o = compiled(q, k, v)
            grads = torch.autograd.grad(o, (q, k, v), tensors["do"])
        expected = f(q, k, v)
        right = torch.autograd.grad(expected, (q, k, v), tensors["do"])
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
    explanation = bigkern.explain("attention", Q, Q, Q, causal=True)
    assert [choice.backend for choice in explanation] == ["cuda", "triton", "cpu", "torch"]
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
