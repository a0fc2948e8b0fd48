"""One concrete call of an op, as bigkern writes it and as stock PyTorch does: tests, doctor, benchmarks.

A problem makes its inputs, calls the public function, calls the stock counterpart, and can be judged: the
stock call in float64 is the reference, and the parity rule compares errors (``bigkern.core.parity``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bigkern.core import registry
from bigkern.core.parity import Verdict, Yardstick

Inputs = dict[str, Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments

ON_THE_CPU = 1 << 24  # inputs of more elements are drawn where they are used


def _nothing(device: torch.device) -> Inputs:
    return {}


def _as_drawn(inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True, eq=False)
class Problem:
    """A call of ``op``; ``label`` is its row's name in every table.

    ``shapes`` are inputs to be drawn, ``constants`` inputs that are what they are: lengths, masks, slopes.
    ``values`` changes drawn numbers before they are rounded; ``views`` are how inputs lie, of what was drawn.
    ``outputs`` names what the public function and stock return; of a longer tuple only the first counts.
    ``specification`` says what stock cannot, or not for every row: it is the reference then, and in low
    precision another stock.
    ``flops`` and ``elements`` are of the forward pass: the useful arithmetic, and how many elements of the
    dtype must at least cross the memory bus. A backward pass takes ``backward_factor`` times as much.
    """

    op: str
    label: str
    shapes: dict[str, tuple[int, ...]]
    public: Callable[..., Any]
    arguments: Callable[[Inputs], Call]
    stock: Callable[[Inputs], Any]
    constants: Callable[[torch.device], Inputs] = _nothing
    specification: Callable[[Inputs], Any] | None = None
    values: Callable[[Inputs], Inputs] = _as_drawn
    views: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    float32: tuple[str, ...] = ()  # the drawn inputs that have this dtype whatever the others have
    outputs: tuple[str, ...] = ("output",)
    flops: float = 0.0
    elements: float = 0.0
    backward_factor: float = 2.0
    differentiable: bool = True
    parameters: tuple[str, ...] = ()  # the inputs that a layer would own
    explain_options: dict[str, Any] = field(default_factory=dict)  # what explain must be told besides
    features: tuple[str, ...] = ()  # in the words of the feature table
    kernels: tuple[str, ...] = ("cpu", "triton", "cuda")  # that can run it
    emulated: bool = True  # whether it is small enough for Triton's interpreter and the CUDA emulator

    def make(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Inputs drawn in float32 from ``seed``, rounded to dtype; small ones are alike on all devices."""
        count = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        source = device if count > ON_THE_CPU else torch.device("cpu")
        generator = torch.Generator(source).manual_seed(seed)
        drawn: Inputs = {}
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=generator, device=source)
            if name.startswith(("w1", "w2")):
                value /= shape[-1] ** 0.5
            if name.endswith("weight") or name.startswith("norm_weight"):
                value = 1 + 0.1 * value
            if name.startswith("v_"):
                value = value.square()  # Adam's second moment
            drawn[name] = value
        made: Inputs = {}
        for name, value in self.values(drawn).items():
            lies = self.views.get(name, Tensor.detach)
            x = lies(value.to(device, torch.float32 if name in self.float32 else dtype))
            made[name] = x.requires_grad_(self.differentiable and not name.startswith("fixed_"))
        return made | self.constants(device)

    def ours(self, inputs: Inputs) -> Any:
        """One tensor, or as many as ``outputs`` names."""
        arguments, options = self.arguments(inputs)
        result = self.public(*arguments, **options)
        return result[0] if isinstance(result, tuple) and len(self.outputs) == 1 else result

    def explain(self, inputs: Inputs) -> registry.Explanation:
        arguments, options = self.arguments(inputs)
        return registry.explain(self.op, *arguments, **options, **self.explain_options)


def results(
    call: Callable[[Inputs], Any], inputs: Inputs, names: tuple[str, ...] = ("output",)
) -> dict[str, Tensor]:
    """The outputs of ``call`` and, for fixed random gradients of them, the gradient of every input."""
    returned = call(inputs)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    found = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
    wanted = {name: value for name, value in inputs.items() if value.requires_grad}
    differentiable = [output for output in outputs if output.requires_grad]
    if wanted and differentiable:
        drawn = (_drawn(output.shape, seed) for seed, output in enumerate(differentiable))
        upstream = [torch.empty_like(y).copy_(dy) for y, dy in zip(differentiable, drawn, strict=True)]
        grads = torch.autograd.grad(differentiable, list(wanted.values()), upstream)
        found.update({f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)})
    return found


@lru_cache(maxsize=8)
def _drawn(shape: torch.Size, seed: int) -> Tensor:
    """Random gradients that every dtype holds; drawn once, for stock also runs with random roundings."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expect(problem: Problem, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Yardstick:
    """What float64 makes of the problem, and stock PyTorch."""
    inputs = problem.make(dtype, device, seed)
    stocks = [problem.stock] if problem.specification is None else [problem.stock, problem.specification]
    exact = results(stocks[-1], widened(inputs), problem.outputs)
    return Yardstick(exact, *(partial(results, stock, inputs, problem.outputs) for stock in stocks))


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in float64; integers as they are."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }


def by_formulas(op: Any, call: Any) -> Any:
    """The op's reference with the backward of its own, for torch's modes to look into."""
    return op.gradient.function.apply(op, op.reference, call, *op.gradient.inputs(call))


def judge(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    expected: Yardstick | None = None,
) -> dict[str, Verdict]:
    """The parity rule for every output and every gradient; without ``backend`` bigkern chooses one.

    Raises:
        BackendRefused: the backend cannot run this call.
    """
    inputs = problem.make(dtype, device)
    with registry.use(**({} if backend is None else {problem.op: backend})):
        ours = results(problem.ours, inputs, problem.outputs)
    expected = expected or expect(problem, dtype, device)
    return {name: expected.judge(name, value) for name, value in ours.items()}
