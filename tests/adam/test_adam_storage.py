"""Everything that the adam op can store a parameter and its moments in, and what it can do on the way.

Trajectories are held against torch.optim in float64; "stock" is the reference in the same storage, so that a
quantisation error is compared with a quantisation error.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from parity import BACKENDS, KERNEL_BACKENDS, assert_parity, device_of, run_backend
from torch import Tensor

from bigkern.core.parity import Yardstick
from bigkern.ops.adam import adam, reference
from bigkern.ops.adam.call import Lists, bind
from bigkern.ops.adam.dynamic8 import blocks_of, dequantised
from bigkern.ops.adam.grad_norm import grad_norm

F32, BF16, F16, CODES = torch.float32, torch.bfloat16, torch.float16, torch.uint8
SIZES = (1, 7, 0, 255, 1023)
STEPS = {"cpu": 200, "torch": 10, "cuda": 200, "simt": 10, "triton": 2}


class Storage(NamedTuple):
    """Dtypes of p, of m and v, and of the master, if any."""

    p: torch.dtype
    m: torch.dtype
    master: torch.dtype | None = None

    def __str__(self) -> str:
        names = (str(dtype).removeprefix("torch.") for dtype in self if dtype is not None)
        return "-".join(names)


STORAGES = [
    *(Storage(F32, m) for m in (BF16, CODES)),
    *(Storage(BF16, m, master) for m in (F32, BF16, CODES) for master in (None, F32, torch.int16)),
    *(Storage(F16, m, master) for m in (F32, BF16, F16, CODES) for master in (None, F32)),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Odd sizes, one empty, one that starts off any 16-byte boundary, one stored in another order."""
    made = [torch.randn(n, device=device).to(dtype) for n in SIZES]
    return [
        *made,
        torch.randn(258, device=device).to(dtype)[1:],
        torch.randn(9, 30, device=device).to(dtype).t(),
    ]


def like(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format) for p in params]


def call(storage: Storage, device: torch.device, amsgrad: bool = False) -> dict[str, Any]:
    """A first step's lists."""
    torch.manual_seed(0)
    params = tensors(storage.p, device)
    lists: dict[str, Any] = {
        "params": params,
        "grads": [g.copy_(torch.randn(g.shape)) for g in like(params)],
        "exp_avgs": like(params, storage.m),
        "exp_avg_sqs": like(params, storage.m),
        "max_exp_avg_sqs": like(params, storage.m) if amsgrad else [],
        "state_steps": [torch.zeros((), device=device) for _ in params],
        "masters": [],
        "exp_avg_scales": [],
        "exp_avg_sq_scales": [],
    }
    if storage.master is not None:
        lists["masters"] = like(params, storage.master)
        if storage.master == F32:
            lists["masters"] = [m.copy_(p) for m, p in zip(lists["masters"], params, strict=True)]
    if storage.m == CODES:
        for name in ("exp_avg_scales", "exp_avg_sq_scales"):
            lists[name] = [torch.zeros(blocks_of(p.numel()), device=device) for p in params]
    return lists


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    def copy(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.preserve_format)

    return {name: [copy(x) for x in arguments[name]] for name in Lists.names}


def same(x: dict[str, Any], y: dict[str, Any]) -> bool:
    return all(torch.equal(a, b) for name in Lists.names for a, b in zip(x[name], y[name], strict=True))


def gradients(step: int, params: list[Tensor]) -> list[Tensor]:
    """The same for every trajectory, of two sizes."""
    generator = torch.Generator().manual_seed(step)
    return [
        g.copy_(torch.randn(g.shape, generator=generator) * (0.1 if i % 2 else 1.0))
        for i, g in enumerate(like(params))
    ]


def flat(listed: list[Tensor]) -> Tensor:
    return torch.cat([reference.in_memory(x.detach()) for x in listed])


def numbers(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What the lists stand for: p at its widest, the moments decoded."""
    params, masters = arguments["params"], arguments["masters"]
    found = {"p": flat(params)}
    if masters and masters[0].dtype == F32:
        found["p"] = flat(masters)
    elif masters:
        found["p"] = torch.cat([reference.joined(p, m) for p, m in zip(params, masters, strict=True)])
    for name, scales, signed in (
        ("exp_avg", "exp_avg_scales", True),
        ("exp_avg_sq", "exp_avg_sq_scales", False),
    ):
        states = [reference.in_memory(x) for x in arguments[f"{name}s"]]
        if arguments[scales]:
            pairs = zip(states, arguments[scales], strict=True)
            states = [dequantised(codes, scale, signed) for codes, scale in pairs]
        found[name] = torch.cat(states)
    return found


# ---- trajectories ----------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"weight_decay": 0.1, "decoupled": True},
    "random": {"weight_decay": 0.1, "amsgrad": True, "seed": 12345},  # amsgrad where it can be
    "clipped": {"scale": 8.0, "max_norm": 10.0, "zero_grads": True, "maximize": True},
}


def run(
    backend: str, storage: Storage, device: torch.device, steps: int, options: dict[str, Any]
) -> dict[str, Tensor]:
    """A trajectory in this storage; "reference" is a backend here."""
    options = {"lr": 1e-2, "eps": epsilon(storage)} | options
    scale, max_norm = options.pop("scale", None), options.get("max_norm")
    options["amsgrad"] = amsgrad = bool(options.get("amsgrad")) and storage.m != CODES
    arguments = call(storage, device, amsgrad)
    for step in range(steps):
        arguments["grads"] = gradients(step, arguments["params"])
        if scale is not None:
            torch._foreach_mul_(arguments["grads"], scale)
            options["grad_scale"] = torch.tensor(scale, device=device)
        if max_norm is not None:
            options["grad_norm"] = reference.grad_norm(arguments["grads"])
        if backend == "reference":
            reference.adam(bind(**arguments, **options))
        else:
            adam(**arguments, **options)
        if options.get("zero_grads"):
            assert not any(g.any() for g in arguments["grads"])
    assert flat(arguments["state_steps"]).tolist() == [steps] * len(arguments["params"])
    return numbers(arguments)


def epsilon(storage: Storage) -> float:
    return 1e-3 if storage.m == F16 else 1e-8  # 1e-8 is 0 in float16


@cache
def exact(storage: Storage, device: torch.device, steps: int, options: str) -> dict[str, Tensor]:
    """torch.optim's trajectory in float64 on the same gradients, clipped as torch clips."""
    given: dict[str, Any] = {"lr": 1e-2, "eps": epsilon(storage), "weight_decay": 0.0} | OPTIONS[options]
    maker = torch.optim.AdamW if given.pop("decoupled", False) else torch.optim.Adam
    max_norm = given.pop("max_norm", None)
    given["amsgrad"] = bool(given.get("amsgrad")) and storage.m != CODES
    for name in ("seed", "scale", "zero_grads"):
        given.pop(name, None)
    params = call(storage, device)["params"]
    leaves = [torch.nn.Parameter(p.double()) for p in params]
    optimizer = maker(leaves, **given)
    for step in range(steps):
        for leaf, g in zip(leaves, gradients(step, params), strict=True):
            leaf.grad = g.double()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        optimizer.step()
    states = {key: flat([optimizer.state[leaf][key] for leaf in leaves]) for key in ("exp_avg", "exp_avg_sq")}
    return {"p": flat(leaves), **states}


@cache
def stock(storage: Storage, device: torch.device, steps: int, options: str) -> dict[str, Tensor]:
    return run("reference", storage, device, steps, OPTIONS[options])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_trajectory(backend: str, storage: Storage, options: str) -> None:
    device, steps = device_of(backend), STEPS[backend]
    steps = steps if options == "plain" else min(steps, 50)
    low = stock(storage, device, steps, options)
    yardstick = Yardstick(
        exact(storage, device, steps, options), lambda: low
    )  # one run of very many roundings
    with run_backend("adam", backend):
        ours = run(backend, storage, device, steps, OPTIONS[options])
    assert_parity("adam", backend, ours, yardstick, storage)


@pytest.mark.parametrize("moments", [F32, BF16, CODES], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_remainders_are_float32_masters_to_the_last_bit(backend: str, moments: torch.dtype) -> None:
    device = device_of(backend)
    options = {"lr": 1e-2, "weight_decay": 0.1, "decoupled": True}
    ends = []
    with run_backend("adam", backend):
        for master in (F32, torch.int16):
            found = run(backend, Storage(BF16, moments, master), device, min(STEPS[backend], 50), options)
            ends.append(found["p"])
    assert torch.equal(*ends)


# ---- rounding at random ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 12345, 2**62 + 7])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_rounds_moments_by_the_reference_bits(backend: str, seed: int) -> None:
    """With beta 0, m is g and v g^2 before they are rounded, exactly, whoever computes them: m to nearest."""
    arguments = call(Storage(F32, BF16), device_of(backend), amsgrad=True)
    expected = copied(arguments)
    options = {"beta1": 0.0, "beta2": 0.0, "amsgrad": True, "seed": seed}
    with run_backend("adam", backend):
        adam(**arguments, **options)
    reference.adam(bind(**expected, **options))
    assert torch.equal(flat(expected["exp_avgs"]), flat(expected["grads"]).to(BF16))
    names = ("exp_avg_sqs", "max_exp_avg_sqs")
    for name in names if backend == "triton" else ("exp_avgs", *names):  # whose interpreter truncates m
        assert torch.equal(flat(arguments[name]), flat(expected[name]))


@pytest.mark.parametrize("moments", [F32, BF16, CODES], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_rounds_parameters_by_the_reference_bits(backend: str, moments: torch.dtype) -> None:
    """Gradients of a power of two, beta 0 and eps 0: a step is lr, exactly, and most of it would be lost."""
    arguments = call(Storage(BF16, moments), device_of(backend))
    for g in arguments["grads"]:
        g.copy_(torch.where(g > 0, 0.25, -0.25))
    expected = copied(arguments)
    options = {"lr": 2.0**-11, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "seed": 99}
    for _ in range(3):
        with run_backend("adam", backend):
            adam(**arguments, **options)
        reference.adam(bind(**expected, **options))
    assert torch.equal(flat(arguments["params"]), flat(expected["params"]))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("simt", "triton")])
def test_small_steps_are_not_lost_on_average(backend: str) -> None:
    """A hundredth of bf16's spacing a step: rounded to nearest p would never move."""
    device = device_of(backend)
    p, g = [torch.ones(20000, device=device, dtype=BF16)], [torch.ones(20000, device=device, dtype=BF16)]
    arguments = (p, g, like(p), like(p), [], [torch.zeros((), device=device)])
    with run_backend("adam", backend):
        for _ in range(100):
            adam(*arguments, lr=2.0**-8 / 100, seed=5)
    assert abs(float(p[0].float().mean()) - (1 - 2.0**-8)) < 2e-4


# ---- nothing, zeros, and many ----------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_found_inf_changes_nothing(backend: str, storage: Storage) -> None:
    device = device_of(backend)
    arguments = call(storage, device)
    before = copied(arguments)
    one = torch.ones((), device=device)
    with run_backend("adam", backend):
        adam(
            **arguments,
            zero_grads=True,
            seed=1,
            grad_scale=one * 4,
            found_inf=one,
            max_norm=1.0,
            grad_norm=one,
        )
    assert same(arguments, before)


@pytest.mark.parametrize("storage", [Storage(F32, F32), Storage(BF16, CODES, torch.int16)], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_zero_grads_uses_them_first(backend: str, storage: Storage) -> None:
    device = device_of(backend)
    kept = call(storage, device)
    emptied = copied(kept)
    with run_backend("adam", backend):
        adam(**kept)
        adam(**emptied, zero_grads=True)
    assert not any(g.any() for g in emptied["grads"])
    emptied["grads"] = kept["grads"]
    assert same(kept, emptied)


@pytest.mark.parametrize("factor", [0.01, 100.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_is_torch_clipping(backend: str, factor: float) -> None:
    """Against clip_grad_norm_ ahead of an unclipped step: below the norm and above it."""
    device = device_of(backend)
    folded = call(Storage(F32, F32), device)
    ahead = copied(folded)
    leaves = [torch.nn.Parameter(p) for p in ahead["params"]]
    for leaf, g in zip(leaves, ahead["grads"], strict=True):
        leaf.grad = g
    norm = reference.grad_norm(folded["grads"])
    total = torch.nn.utils.clip_grad_norm_(leaves, factor * float(norm))
    torch.testing.assert_close(norm, total)
    with run_backend("adam", backend):
        adam(**folded, max_norm=factor * float(norm), grad_norm=norm)
        adam(**ahead)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        torch.testing.assert_close(flat(folded[name]), flat(ahead[name]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_is_no_number_reaches_the_parameters(backend: str) -> None:
    device = device_of(backend)
    arguments = call(Storage(F32, F32), device)
    with run_backend("adam", backend):
        adam(**arguments, max_norm=1.0, grad_norm=torch.tensor(float("nan"), device=device))
    assert flat(arguments["params"]).isnan().all()


@pytest.mark.parametrize("backend", [name for name in KERNEL_BACKENDS if name != "triton"])
def test_many_small_parameters(backend: str) -> None:
    """More than one launch takes, in codes: scales of one block each, threads that end anywhere."""
    device = device_of(backend)
    sizes = [3] * 500 + [0, 300, 5] + [257] * 20
    params = [torch.randn(n, device=device).to(BF16) for n in sizes]
    arguments: dict[str, Any] = {key: [] for key in Lists.names}
    arguments |= {"params": params, "grads": [torch.randn_like(p) for p in params]}
    arguments |= {"masters": [p.float() for p in params]}
    arguments |= {name: like(params, CODES) for name in ("exp_avgs", "exp_avg_sqs")}
    arguments |= {"state_steps": [torch.zeros((), device=device) for _ in params]}
    for name in ("exp_avg_scales", "exp_avg_sq_scales"):
        arguments[name] = [torch.zeros(blocks_of(n), device=device) for n in sizes]
    expected = copied(arguments)
    torch.set_num_threads(2)
    with run_backend("adam", backend):
        adam(**arguments)
    reference.adam(bind(**expected))
    torch.testing.assert_close(flat(arguments["masters"]), flat(expected["masters"]), rtol=1e-5, atol=1e-6)
    for name in ("exp_avg_scales", "exp_avg_sq_scales"):
        torch.testing.assert_close(flat(arguments[name]), flat(expected[name]), rtol=1e-5, atol=0.0)


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "change", "error", "message"),
    [
        (Storage(F32, F32), {"masters": lambda a: like(a["params"])}, TypeError, "masters must be empty"),
        (
            Storage(F16, F32),
            {"masters": lambda a: like(a["params"], torch.int16)},
            TypeError,
            r"masters\[0\]",
        ),
        (Storage(BF16, F32), {"masters": lambda a: like(a["params"])}, TypeError, r"masters\[0\] must be"),
        (Storage(BF16, F32), {"masters": lambda a: a["exp_avgs"][1:]}, ValueError, "masters must have one"),
        (Storage(BF16, F32), {"masters": lambda a: a["exp_avgs"][::-1]}, ValueError, r"masters\[0\] must"),
        (Storage(BF16, F16), {}, TypeError, r"exp_avgs\[0\] must have"),
        (Storage(F32, torch.float64), {}, TypeError, r"exp_avgs\[0\] must have"),
        (Storage(F32, BF16), {"exp_avg_sqs": lambda a: like(a["params"])}, TypeError, r"exp_avg_sqs\[0\]"),
        (Storage(F32, CODES), {"exp_avg_scales": []}, ValueError, "exp_avg_scales must have one"),
        (
            Storage(F32, CODES),
            {"exp_avg_sq_scales": lambda a: a["exp_avg_scales"][::-1]},
            ValueError,
            "exp_avg_sq_s",
        ),
        (
            Storage(F32, F32),
            {"exp_avg_scales": lambda a: a["params"]},
            ValueError,
            "exp_avg_scales must be empty",
        ),
        (Storage(F32, CODES), {"amsgrad": True}, ValueError, "amsgrad must be False"),
        (Storage(F32, F32), {"max_norm": 1.0}, ValueError, "max_norm and grad_norm"),
        (Storage(F32, F32), {"grad_norm": torch.ones(())}, ValueError, "max_norm and grad_norm"),
        (
            Storage(F32, F32),
            {"max_norm": -1.0, "grad_norm": torch.ones(())},
            ValueError,
            "max_norm must be in",
        ),
        (Storage(F32, F32), {"max_norm": 1.0, "grad_norm": 1.0}, TypeError, "grad_norm must be a Tensor"),
        (Storage(F32, F32), {"max_norm": 1.0, "grad_norm": torch.ones(2)}, ValueError, "grad_norm must have"),
        (Storage(F32, F32), {"seed": -1}, ValueError, "seed must be"),
        (Storage(F32, F32), {"seed": 2**63}, ValueError, "seed must be"),
        (Storage(F32, F32), {"seed": True}, ValueError, "seed must be"),
    ],
)
def test_bad_inputs_change_nothing(
    storage: Storage, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = call(storage, torch.device("cpu"))
    before = copied(arguments)
    changed = {name: make(arguments) if callable(make) else make for name, make in change.items()}
    with pytest.raises(error, match=message):
        adam(**(arguments | changed))
    assert same(arguments, before)


@pytest.mark.parametrize("backend", [name for name in KERNEL_BACKENDS if name not in ("triton", "simt")])
@pytest.mark.parametrize(
    ("storage", "broken", "message"),
    [
        (Storage(BF16, F16), {}, "exp_avgs"),
        (Storage(F16, F32), {"masters": lambda a: like(a["params"], torch.int16)}, "masters"),
        (Storage(BF16, F32), {"masters": lambda a: a["exp_avgs"][::-1]}, "masters"),
        (Storage(F32, CODES), {"exp_avg_scales": lambda a: a["exp_avg_scales"][::-1]}, "exp_avg_scales"),
        (Storage(F32, F32), {"amsgrad": True}, "max_exp_avg_sqs"),
        (Storage(F32, F32), {"max_exp_avg_sqs": lambda a: like(a["params"])}, "max_exp_avg_sqs"),
        (Storage(F32, F32), {"grad_norm": torch.ones(2)}, "grad_norm"),
        (Storage(F32, F32), {"grad_norm": torch.ones((), dtype=torch.float64)}, "grad_norm"),
    ],
)
def test_native_op_checks_for_itself(
    backend: str, storage: Storage, broken: dict[str, Any], message: str
) -> None:
    arguments = call(storage, device_of(backend))
    before = copied(arguments)
    changed = {name: make(arguments) if callable(make) else make for name, make in broken.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bigkern_native.adam(*raw(arguments | changed))
    assert same(arguments, before)


def raw(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The op's arguments, without the public function's checks."""
    flags = {"decoupled": False, "amsgrad": False, "maximize": False, "zero_grads": False}
    hyper: dict[str, Any] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        **flags,
    }
    hyper |= {"max_norm": 1.0, "seed": None, "grad_scale": None, "found_inf": None}
    hyper |= {"lr_tensor": None, "grad_norm": None}
    return (*(arguments[name] for name in Lists.names), *(arguments.get(name, hyper[name]) for name in hyper))


# ---- as an op of torch's ---------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [Storage(F32, BF16), Storage(BF16, CODES, torch.int16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, storage: Storage) -> None:
    device = device_of(backend)
    arguments = {name: listed[1:2] for name, listed in call(storage, device).items()}
    norm = torch.ones((), device=device)
    with run_backend("adam", backend):
        bound = bind(**arguments, seed=3, max_norm=0.5, grad_norm=norm, zero_grads=True)
        torch.library.opcheck(torch.ops.bigkern.adam.default, bound.flat())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend: str) -> None:
    """The norm and the clipped step in one graph, without a break and without a recompile."""
    device = device_of(backend)
    eager = {name: listed[1:2] for name, listed in call(Storage(BF16, CODES, F32), device).items()}
    twin = copied(eager)

    def step(arguments: dict[str, Any]) -> Tensor:
        norm = grad_norm(arguments["grads"])
        adam(**arguments, max_norm=0.5, grad_norm=norm, seed=7)
        return norm

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with run_backend("adam", backend), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(step(eager), compiled(twin))
    torch.testing.assert_close(flat(eager["masters"]), flat(twin["masters"]))
