"""The adam op on every backend against torch.optim in float64, and its checks."""

from __future__ import annotations

import itertools
from functools import cache, partial
from typing import Any

import pytest
import torch
from parity import BACKENDS, KERNEL_BACKENDS, assert_parity, device_of, run_backend
from torch import Tensor

import bigkern
from bigkern.core.parity import Yardstick
from bigkern.ops.adam import ADAM, adam
from bigkern.ops.adam.call import Adam, bind
from bigkern.ops.adam.call import Lists as AllLists
from bigkern.ops.adam.reference import adam as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")
HYPER = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled": False,
    "amsgrad": False,
    "maximize": False,
    "zero_grads": False,
    "max_norm": 0.0,
    "seed": None,
    "grad_scale": None,
    "found_inf": None,
    "lr_tensor": None,
    "grad_norm": None,
}
SIZES = (1, 7, 0, 63, 129, 1023)

# Steps of a trajectory: the emulator and Triton's interpreter are slow, and a step is a step.
STEPS = {"cpu": 200, "torch": 25, "cuda": 200, "simt": 25, "triton": 3}

# decoupled, amsgrad, maximize, weight_decay
VARIANTS = list(itertools.product([False, True], [False, True], [False, True], [0.0, 0.1]))


def parameters(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Odd sizes, one empty, one that starts off any 16-byte boundary, one stored in another order."""
    sizes = [torch.randn(n, device=device).to(dtype) for n in SIZES]
    unaligned = torch.randn(258, device=device).to(dtype)[1:]
    transposed = torch.randn(9, 5, device=device).to(dtype).t()
    return [*sizes, unaligned, transposed]


def like(params: list[Tensor], fill: str = "zeros") -> list[Tensor]:
    """Tensors with the same strides: zeros, or random."""
    made = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in params]
    return [x.copy_(torch.randn(x.shape)) for x in made] if fill == "random" else made


def call(dtype: torch.dtype, device: torch.device, amsgrad: bool = False) -> dict[str, Any]:
    """A first step's arguments."""
    params = parameters(dtype, device)
    return {
        "params": params,
        "grads": like(params, "random"),
        "exp_avgs": like(params),
        "exp_avg_sqs": like(params),
        "max_exp_avg_sqs": like(params) if amsgrad else [],
        "state_steps": [torch.zeros((), device=device) for _ in params],
    }


def raw(arguments: dict[str, Any], **hyper: Any) -> tuple[Any, ...]:
    """The op's arguments in the order of its schema: lists by name, the rest changed from the defaults."""
    return (*(arguments.get(name, []) for name in AllLists.names), *(HYPER | hyper).values())


def snapshot(arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
    return {name: [x.detach().clone() for x in arguments[name]] for name in LISTS}


def unchanged(arguments: dict[str, Any], before: dict[str, list[Tensor]]) -> bool:
    return all(
        torch.equal(x, y) for name in LISTS for x, y in zip(arguments[name], before[name], strict=True)
    )


def gradients(step: int, params: list[Tensor]) -> list[Tensor]:
    """The same for every trajectory, of different sizes; in float16 few whose square is 0 or infinite."""
    generator = torch.Generator().manual_seed(step)
    smallest, sizes = (0, 2) if params[0].dtype == torch.float16 else (-3, 4)
    made = like(params)
    return [
        x.copy_(torch.randn(x.shape, generator=generator) * 10.0 ** (smallest + i % sizes))
        for i, x in enumerate(made)
    ]


@cache
def expected(
    dtype: torch.dtype, device: torch.device, steps: int, decoupled: bool, *options: Any
) -> Yardstick:
    """torch.optim's trajectories in float64 and in ``dtype``, for all backends."""
    torch.manual_seed(0)
    params = call(dtype, device)["params"]
    grads = [gradients(step, params) for step in range(steps)]
    exact = torch_trajectory([p.double() for p in params], grads, decoupled, **dict(options))
    return Yardstick(exact, partial(torch_trajectory, params, grads, decoupled, **dict(options)))


pytestmark = pytest.mark.usefixtures("one_thread")


def torch_trajectory(
    params: list[Tensor], grads: list[list[Tensor]], decoupled: bool, **options: Any
) -> dict[str, Tensor]:
    """torch.optim in params' own dtype on the gradients of each step."""
    leaves = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(leaves, **options)
    for now in grads:
        for p, g in zip(leaves, now, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    states = [key for key in optimizer.state[leaves[0]] if key != "step"]
    return {
        "p": flat(leaves),
        **{key: flat([optimizer.state[p][key] for p in leaves]) for key in states},
    }


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("decoupled", "amsgrad", "maximize", "weight_decay"), VARIANTS)
def test_trajectory(
    backend: str, dtype: torch.dtype, decoupled: bool, amsgrad: bool, maximize: bool, weight_decay: float
) -> None:
    options = {"lr": 1e-2, "amsgrad": amsgrad, "maximize": maximize, "weight_decay": weight_decay}
    options["eps"] = 1e-3 if dtype == torch.float16 else 1e-8  # 1e-8 is 0 in float16
    steps = STEPS[backend]
    arguments = call(dtype, device_of(backend), amsgrad)
    params = arguments["params"]
    yardstick = expected(dtype, params[0].device, steps, decoupled, *options.items())
    with run_backend("adam", backend):
        for step in range(steps):
            arguments["grads"] = gradients(step, params)
            adam(**arguments, decoupled=decoupled, **options)
    names = {"p": "params", "exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs"}
    names |= {"max_exp_avg_sq": "max_exp_avg_sqs"} if amsgrad else {}
    found = {name: flat(arguments[listed]) for name, listed in names.items()}
    assert_parity("adam", backend, found, yardstick)
    assert flat(arguments["state_steps"]).tolist() == [steps] * len(params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
def test_reference_is_torch_in_float64(dtype: torch.dtype, decoupled: bool) -> None:
    """The specification itself: in float64 it is torch.optim to the last digits."""
    params = [p.double() for p in parameters(dtype, torch.device("cpu"))]
    hyper = {"lr": 1e-2, "weight_decay": 0.1}
    start = [p.clone() for p in params]
    grads = [gradients(step, params) for step in range(20)]
    want = torch_trajectory(start, grads, decoupled, amsgrad=True, maximize=True, **hyper)
    states = [like(params) for _ in range(3)]
    steps = [torch.zeros(()) for _ in params]
    for step in range(20):
        arguments = dict(zip(LISTS, (params, grads[step], *states, steps), strict=True))
        reference(Adam(*raw(arguments, decoupled=decoupled, amsgrad=True, maximize=True, **hyper)))
    torch.testing.assert_close(flat(params), want["p"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_found_inf_changes_nothing(backend: str, dtype: torch.dtype, amsgrad: bool) -> None:
    device = device_of(backend)
    arguments = call(dtype, device, amsgrad)
    before = snapshot(arguments)
    scale = torch.tensor(8.0, device=device)
    with run_backend("adam", backend):
        adam(**arguments, amsgrad=amsgrad, grad_scale=scale, found_inf=torch.ones(1, device=device))
    assert unchanged(arguments, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scale_divides_the_gradients(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    plain, scaled = (call(dtype, device) for _ in range(2))
    for name in LISTS:
        scaled[name] = [x.clone(memory_format=torch.preserve_format) for x in plain[name]]
    scaled["params"] = [p.clone(memory_format=torch.preserve_format) for p in plain["params"]]
    for g in scaled["grads"]:
        g.mul_(4.0)
    extra = {"grad_scale": torch.tensor(4.0, device=device), "found_inf": torch.zeros(1, device=device)}
    with run_backend("adam", backend):
        adam(**plain)
        adam(**scaled, **extra)
    for name in LISTS:
        for x, y in zip(plain[name], scaled[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_lr_tensor_replaces_lr(backend: str) -> None:
    device = device_of(backend)
    number, tensor = call(torch.float32, device), call(torch.float32, device)
    for name in LISTS:
        tensor[name] = [x.clone(memory_format=torch.preserve_format) for x in number[name]]
    rate = torch.tensor(0.25, device=device)
    hyper = {"weight_decay": 0.1, "decoupled": True}
    with run_backend("adam", backend):
        torch.ops.bigkern.adam(*raw(number, lr=0.25, **hyper))
        torch.ops.bigkern.adam(*raw(tensor, lr=0.0, lr_tensor=rate, **hyper))
    for x, y in zip(number["params"], tensor["params"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "sizes", [[3] * 1000 + [0, 5], [3 * 4096 + 5, 0, 4096, 1, 70000]], ids=["many", "long"]
)
@pytest.mark.parametrize("backend", [name for name in KERNEL_BACKENDS if name != "triton"])
def test_many_and_long(backend: str, sizes: list[int]) -> None:
    """More parameters than one launch takes; parameters of several chunks and threads."""
    device = device_of(backend)
    lists = [[torch.rand(n, device=device) for n in sizes] for _ in range(4)]
    steps = [torch.tensor(float(i % 3), device=device) for i in range(len(sizes))]
    want = dict(zip(LISTS, (*lists, [], steps), strict=True))
    have = {name: [x.clone() for x in tensors] for name, tensors in want.items()}
    hyper = {"lr": 1e-2, "weight_decay": 0.1, "decoupled": True}
    reference(Adam(*raw(want, **hyper)))
    torch.set_num_threads(2)
    with run_backend("adam", backend):
        torch.ops.bigkern.adam(*raw(have, **hyper))
    for name in LISTS:
        for x, y in zip(want[name], have[name], strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend: str) -> None:
    """Zero gradients, beta 0, eps 0 with a large gradient, infinities that stay where they are."""
    device = device_of(backend)
    p = [torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)]
    g = [torch.tensor([0.0, 1e-20, 1e18, float("inf")], device=device)]
    arguments = (p, g, like(p), like(p), [], [torch.zeros((), device=device)])
    with run_backend("adam", backend):
        adam(*arguments, lr=0.5, beta1=0.0, beta2=0.0, eps=1e-8)
    assert p[0][0] == 1.0
    torch.testing.assert_close(p[0][1:3].cpu(), torch.tensor([2.0, 2.5]))
    assert torch.isnan(p[0][3])  # inf / inf, as torch has it


def test_empty_list() -> None:
    adam([], [], [], [], [], [])
    torch.ops.bigkern.adam(*raw({}))


# ---- refusals --------------------------------------------------------------------------------------


def wrong(change: dict[str, Any]) -> dict[str, Any]:
    arguments = {name: tensors[:2] for name, tensors in call(torch.float32, torch.device("cpu")).items()}
    return {
        **arguments,
        **{name: make(arguments) if callable(make) else make for name, make in change.items()},
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": 3.0}, TypeError, "params must be a list"),
        ({"grads": lambda a: [a["grads"][0], 1.0]}, TypeError, r"grads\[1\] must be a Tensor"),
        ({"grads": lambda a: a["grads"][:1]}, ValueError, "grads must have one tensor a parameter"),
        ({"exp_avgs": lambda a: [x.double() for x in a["exp_avgs"]]}, TypeError, r"exp_avgs\[0\] must have"),
        ({"exp_avg_sqs": lambda a: a["exp_avg_sqs"][::-1]}, ValueError, r"exp_avg_sqs\[0\] must have"),
        ({"grads": lambda a: [g.to_sparse() for g in a["grads"]]}, TypeError, r"grads\[0\] must be dense"),
        ({"state_steps": [torch.zeros(2), torch.zeros(2)]}, ValueError, r"state_steps\[0\] must have 1"),
        ({"max_exp_avg_sqs": lambda a: a["grads"]}, ValueError, "max_exp_avg_sqs must be empty"),
        ({"amsgrad": True}, ValueError, "max_exp_avg_sqs must have one tensor"),
        ({"lr": float("nan")}, ValueError, "lr must be in"),
        ({"lr": "fast"}, TypeError, "lr must be a number"),
        ({"beta1": 1.0}, ValueError, "beta1 must be in"),
        ({"beta2": -0.1}, ValueError, "beta2 must be in"),
        ({"eps": float("inf")}, ValueError, "eps must be in"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be in"),
        ({"found_inf": 1.0}, TypeError, "found_inf must be a Tensor"),
        ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale must have 1 element"),
    ],
)
def test_bad_inputs_change_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = wrong(change)
    tensors = [x for name in LISTS if isinstance(arguments[name], list) for x in arguments[name]]
    kept = [x.clone() if isinstance(x, Tensor) and not x.is_sparse else x for x in tensors]
    with pytest.raises(error, match=message):
        adam(**arguments)
    for x, y in zip(tensors, kept, strict=True):
        assert not isinstance(x, Tensor) or x.is_sparse or torch.equal(x, y)


def test_shared_memory_is_refused() -> None:
    arguments = call(torch.float32, torch.device("cpu"))
    arguments["params"][1] = arguments["params"][0]
    twice = {name: [tensors[0], tensors[0]] if tensors else [] for name, tensors in arguments.items()}
    with pytest.raises(ValueError, match=r"params\[1\] shares its memory with params\[0\]"):
        adam(**twice)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_dtypes_go_to_stock(dtype: torch.dtype) -> None:
    p, g = [torch.ones(3, dtype=dtype)], [torch.ones(3, dtype=dtype)]
    arguments = (p, g, like(p), like(p), [], [torch.zeros(())])
    explanation = bigkern.explain("adam", *arguments)
    assert explanation.chosen == "torch"
    assert any("is not float32" in choice.reason for choice in explanation)
    adam(*arguments, lr=0.5)
    torch.testing.assert_close(p[0].real, torch.full((3,), 0.5, dtype=p[0].real.dtype))
    with pytest.raises(bigkern.BackendRefused), bigkern.use("cpu"):
        adam(*arguments)


def test_other_layouts_go_to_stock() -> None:
    base = torch.ones(4, 6)
    p, g = [base[:, ::2]], [torch.ones(4, 3)]
    arguments = (p, g, like(p), like(p), [], [torch.zeros(())])
    assert bigkern.explain("adam", *arguments).chosen == "torch"
    adam(*arguments, lr=0.5)
    torch.testing.assert_close(base[:, ::2], torch.full((4, 3), 0.5))
    assert torch.equal(base[:, 1::2], torch.ones(4, 3))


@pytest.mark.parametrize("backend", [name for name in KERNEL_BACKENDS if name not in ("triton", "simt")])
def test_native_op_checks_for_itself(backend: str) -> None:
    arguments = call(torch.float32, device_of(backend))
    for name, broken in (
        ("grads", arguments["grads"][:-1]),
        ("exp_avgs", [x.double() for x in arguments["exp_avgs"]]),
        ("exp_avg_sqs", [x[:0] for x in arguments["exp_avg_sqs"]]),
        ("state_steps", [x.double() for x in arguments["state_steps"]]),
    ):
        before = snapshot(arguments)
        with pytest.raises(RuntimeError, match=name):
            torch.ops.bigkern_native.adam(*raw(arguments | {name: broken}))
        assert unchanged(arguments, before)


# ---- as an op of torch's ---------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, amsgrad: bool) -> None:
    device = device_of(backend)
    params = [torch.randn(7, device=device), torch.randn(3, 5, device=device)]
    steps = [torch.zeros((), device=device) for _ in params]
    maxima = like(params) if amsgrad else []
    lists = (params, like(params, "random"), like(params), like(params), maxima, steps)
    arguments = raw(dict(zip(LISTS, lists, strict=True)), weight_decay=0.1, decoupled=True, amsgrad=amsgrad)
    with run_backend("adam", backend):
        torch.library.opcheck(torch.ops.bigkern.adam.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend: str) -> None:
    device = device_of(backend)
    params = [torch.randn(7, device=device), torch.randn(3, 5, device=device)]
    eager = [[x.clone() for x in params], [x.clone() for x in params]]
    states = [
        [like(params), like(params), [torch.zeros((), device=device) for _ in params]] for _ in range(2)
    ]

    def step(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], t: list[Tensor]) -> Tensor:
        torch.ops.bigkern.adam(*raw(dict(zip(LISTS, (p, g, m, v, [], t), strict=True)), lr=1e-2))
        return p[0] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with run_backend("adam", backend), torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(3):
            grads = gradients(i, params)
            outputs = [f(p, grads, *s) for f, p, s in zip((step, compiled), eager, states, strict=True)]
            torch.testing.assert_close(*outputs)
    for x, y in zip(*eager, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_the_change(backend: str) -> None:
    arguments = call(torch.float32, device_of(backend))
    version = arguments["params"][0]._version
    with run_backend("adam", backend):
        adam(**arguments)
    assert arguments["params"][0]._version > version


def test_bind_gives_the_schema_order() -> None:
    bound = bind(**call(torch.float32, torch.device("cpu")))
    schema = torch.ops.bigkern.adam.default._schema
    assert list(bound.names) == [argument.name for argument in schema.arguments]
    assert len(bound.flat()) == len(schema.arguments)
    assert ADAM.explain(bound).chosen in ("cpu", "torch")
