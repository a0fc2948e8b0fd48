"""torch's own databases, shipped in its wheel, with bigkern's classes in the place of torch's.

``common_modules.module_db`` lists with what arguments torch's modules must be built and called,
``common_optimizers.optim_db`` with what its optimizers must step and what they must refuse. Every case of
every entry that bigkern has a class for runs here on torch's class and on ours, with the same weights: the
results must agree within the tolerances of torch's own test_modules.py and test_optim.py.

Left out:

- Second derivatives of the Transformer entries: torch's attention has none on a CPU. Their first ones are not
  taken by differences but are torch's to 1e-9 in float64.
- Derivatives by differences of the recurrent entries: in float64 torch's own forward runs.
- The CPU's kernels for the LSTM entries with proj_size, which they refuse: torch's own forward runs.
- Memory formats of all but the norms, as in torch's own tests: the other layers know no channels_last.
- Factory arguments of TransformerEncoder, as in torch's own tests: a container takes none.
- The eval mode in checks other than results, gradients and errors: the cases have no dropout.
- Reference functions in float64: RMSNorm's computes in float32, the others call the same module.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import bigkern

pytest.importorskip("expecttest")  # torch.testing._internal asks for it

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

MODULES = [
    "LayerNorm",
    "RMSNorm",
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "Transformer",
    "LSTM",
    "GRU",
    "RNN",
    "LSTMCell",
    "GRUCell",
    "RNNCell",
]
CONTAINERS = ["TransformerEncoder", "Transformer"]
NORMS = ["LayerNorm", "RMSNorm"]
OPTIMIZERS = ["Adam", "AdamW"]

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
modules = pytest.mark.parametrize("name", MODULES)

Sample = Any  # a ModuleInput: constructor_input and forward_input, each args and kwargs; a reference_fn


def entry(name: str) -> Any:
    """A class's entry in its database. The import takes seconds, and would freeze torch.backends' flags."""
    with mock.patch.object(torch.backends, "disable_global_flags"):
        from torch.testing._internal.common_modules import module_db
        from torch.testing._internal.common_optimizers import optim_db
    if name in OPTIMIZERS:
        return next(e for e in optim_db if e.optim_cls is getattr(torch.optim, name))
    return next(e for e in module_db if e.module_cls is getattr(nn, name))


def samples(name: str, dtype: torch.dtype, training: bool, requires_grad: bool = False) -> list[Sample]:
    torch.manual_seed(0)
    inputs = entry(name).module_inputs_func
    found = inputs(entry(name), "cpu", dtype, requires_grad, training)
    return [sample for sample in found if sample.forward_input is not None]


def build(cls: type[nn.Module], sample: Sample, dtype: torch.dtype, training: bool) -> nn.Module:
    given = copy.deepcopy(sample.constructor_input)
    torch.manual_seed(1)
    return cls(*given.args, **given.kwargs).to(dtype).train(training)


def pairs(
    name: str, dtype: torch.dtype, training: bool, requires_grad: bool = False
) -> Iterator[tuple[nn.Module, nn.Module, Sample]]:
    """torch's module and ours for every sample, with the same weights, the biases not 0."""
    for sample in samples(name, dtype, training, requires_grad):
        stock = build(getattr(nn, name), sample, dtype, training)
        ours = build(getattr(bigkern.nn, name), sample, dtype, training)
        for parameter in stock.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 0.5, 0.2)
        assert list(ours.state_dict()) == list(stock.state_dict())
        ours.load_state_dict(stock.state_dict())
        yield stock, ours, sample


def distinct(name: str) -> Iterator[tuple[nn.Module, nn.Module, Sample]]:
    """A pair for each way to build the module, for what does not depend on how it is called."""
    built = set()
    for stock, ours, sample in pairs(name, torch.float32, True):
        if repr(stock) not in built:
            built.add(repr(stock))
            yield stock, ours, sample


def call(module: nn.Module, sample: Sample) -> Any:
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def floating(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def inputs_of(sample: Sample) -> list[Tensor]:
    given = sample.forward_input
    return [x for x in floating((given.args, given.kwargs)) if x.requires_grad]


def output_and_gradients(module: nn.Module, sample: Sample) -> tuple[Any, list[Tensor | None]]:
    out = call(module, sample)
    torch.manual_seed(2)
    tensors = floating(out)
    weights = [torch.randn(x.shape).to(x.dtype) for x in tensors]  # whatever the strides
    wanted = [*inputs_of(sample), *module.parameters()]
    return out, list(torch.autograd.grad(tensors, wanted, weights, allow_unused=True))


def assert_close(ours: Any, stock: Any, case: str, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        ours, stock, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {text}"
    )


def assert_same(ours: tuple[Any, list[Any]], stock: tuple[Any, list[Any]], case: str) -> None:
    """Outputs, and gradients relative to the largest of each: norms over 4 numbers can blow them up."""
    double = all(x.dtype == torch.float64 for x in floating(stock[0]))
    assert_close(ours[0], stock[0], case, 1e-9 if double else 1e-5)
    largest = [1.0 if g is None or g.numel() == 0 else max(1.0, float(g.abs().max())) for g in stock[1]]
    scaled = (
        [g if g is None else g / scale for g, scale in zip(gradients, largest, strict=True)]
        for gradients in (ours[1], stock[1])
    )
    assert_close(*scaled, f"gradients of {case}", 1e-9 if double else 5e-5)


def forced(backend: str, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The small shapes of the database are stock's by choice; the CPU's kernels have to be named."""
    if backend == "chosen" or getattr(module, "proj_size", 0):
        return contextlib.nullcontext()
    return bigkern.use(attention=backend, layernorm_ffn=backend, norm=backend, recurrent=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@modes
@modules
def test_forward_and_gradients(name: str, training: bool, dtype: torch.dtype) -> None:
    """torch's result, its gradients, its inference path and, where the database has one, the reference."""
    for stock, ours, sample in pairs(name, dtype, training, requires_grad=True):
        case, given = f"{name} {sample.desc} {sample.constructor_input.kwargs}", sample.forward_input
        theirs = output_and_gradients(stock, sample)
        for backend in ("chosen", "cpu") if dtype == torch.float32 else ("chosen",):
            with forced(backend, ours):
                result = output_and_gradients(ours, sample)
                assert_same(result, theirs, f"{case} on {backend}")
                if sample.reference_fn is not None and dtype == torch.float32:
                    reference = sample.reference_fn(ours, *given.args, **given.kwargs)
                    assert_close(result[0], reference, f"the reference of {case} on {backend}")
        if not training:
            with torch.no_grad():
                assert_close(call(ours, sample), call(stock, sample), f"{case} in inference")


@pytest.mark.parametrize("name", ["TransformerEncoder", "Transformer"])
def test_torchs_containers_with_our_layers(name: str) -> None:
    for stock, _, sample in pairs(name, torch.float32, True, requires_grad=True):
        theirs = output_and_gradients(stock, sample)
        bigkern.patch(stock)
        assert_same(output_and_gradients(stock, sample), theirs, f"{name} {sample.constructor_input.kwargs}")


@pytest.mark.parametrize("backend", ["chosen", "cpu"])
def test_attention_cases_batched_and_without_weights(backend: str) -> None:
    """The database asks for attention weights of unbatched input, which stock runs: here the op does."""
    for stock, ours, sample in pairs("MultiheadAttention", torch.float32, True):
        given = sample.forward_input
        batch = 0 if ours.batch_first else 1
        args = [x.unsqueeze(batch).requires_grad_() for x in given.args]
        masks = {key: x if x is None or x.dim() == 3 else x[None] for key, x in given.kwargs.items()}
        sample.forward_input = type(given)(*args, **masks, need_weights=False)
        theirs = output_and_gradients(stock, sample)
        with forced(backend, ours):
            assert_same(output_and_gradients(ours, sample), theirs, f"{sample.constructor_input.kwargs}")


@modes
@modules
def test_errors(name: str, training: bool) -> None:
    """What an entry holds is raised with torch's own words; in torch 2.13 the recurrent ones hold errors."""
    inputs = entry(name).module_error_inputs_func
    for case in inputs(entry(name), "cpu", torch.float32, False, training) if inputs else []:
        for cls in (getattr(nn, name), getattr(bigkern.nn, name)):
            with pytest.raises(case.error_type, match=case.error_regex):
                call(build(cls, case.module_error_input, torch.float32, training), case.module_error_input)


@pytest.mark.parametrize("name", [*NORMS, "MultiheadAttention"])
def test_derivatives(name: str) -> None:
    """First and second derivatives against differences."""
    for sample in samples(name, torch.float64, True, requires_grad=True):
        module = build(getattr(bigkern.nn, name), sample, torch.float64, True)

        def outputs(*_: Tensor, module: nn.Module = module, sample: Sample = sample) -> tuple[Tensor, ...]:
            return tuple(floating(call(module, sample)))  # the differences are taken in place

        leaves = (*inputs_of(sample), *module.parameters())
        assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)


@modules
def test_repr_copies_and_dtypes(name: str) -> None:
    for stock, ours, sample in distinct(name):
        assert repr(ours) == repr(stock)
        expected, file = call(ours, sample), io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for copied in (copy.deepcopy(ours), torch.load(file, weights_only=False), ours.double().float()):
            assert [type(m) for m in copied.modules()] == [type(m) for m in ours.modules()]
            torch.testing.assert_close(call(copied, sample), expected, rtol=0.0, atol=0.0)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert {t.dtype for t in ours.to(dtype).state_dict().values()} <= {dtype}


def strided(x: Any) -> Any:
    """The same numbers with gaps between them."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() < 2:
        return x
    return torch.stack((x.detach(), x.detach()), -1)[..., 0].requires_grad_(x.requires_grad)


@modules
def test_non_contiguous_inputs_and_parameters(name: str) -> None:
    for stock, ours, sample in pairs(name, torch.float32, True, requires_grad=True):
        theirs = output_and_gradients(stock, sample)
        given = sample.forward_input
        args, kwargs = tree_map(strided, (given.args, given.kwargs))
        sample.forward_input = type(given)(*args, **kwargs)
        for parameter in ours.parameters():
            parameter.data = strided(parameter.data)
        with forced("cpu", ours):
            assert_same(
                output_and_gradients(ours, sample), theirs, f"{name} {sample.constructor_input.kwargs}"
            )


@pytest.mark.parametrize("backend", ["chosen", "cpu"])
@pytest.mark.parametrize("name", NORMS)
def test_memory_formats(name: str, backend: str) -> None:
    for stock, ours, sample in pairs(name, torch.float32, True, requires_grad=True):
        (x,) = sample.forward_input.args
        if x.dim() != 4:
            continue
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        sample.forward_input = type(sample.forward_input)(x)
        with forced(backend, ours):
            assert_same(output_and_gradients(ours, sample), output_and_gradients(stock, sample), name)


@modules
def test_factory_arguments_meta_and_to_empty(name: str) -> None:
    """Built in another dtype, on no device at all and by device context; given memory, it is whole again."""
    for stock, ours, sample in distinct(name):
        cls, given = getattr(bigkern.nn, name), copy.deepcopy(sample.constructor_input)
        if name == "TransformerEncoder":
            with pytest.raises(TypeError, match="device"):
                cls(*given.args, **given.kwargs, device="cpu")
            built = [copy.deepcopy(ours).to("meta")]
        else:
            wide = cls(*given.args, **given.kwargs, device="cpu", dtype=torch.float64)
            assert {p.dtype for p in wide.parameters()} <= {torch.float64}
            with torch.device("meta"):
                built = [cls(*given.args, **given.kwargs)]
            built.append(cls(*given.args, **given.kwargs, device="meta"))
        for module in built:
            assert {p.device.type for p in module.parameters()} <= {"meta"}
            abstract = tree_map(
                lambda x: x.to("meta") if isinstance(x, Tensor) else x,
                (sample.forward_input.args, sample.forward_input.kwargs),
            )
            shapes = [x.shape for x in floating(module(*abstract[0], **abstract[1]))]
            module.to_empty(device="cpu").load_state_dict(stock.state_dict())
            assert_close(call(module, sample), call(stock, sample), name)
            assert shapes == [x.shape for x in floating(call(stock, sample))]


# ---- optimizers --------------------------------------------------------------------------------------


def trajectory(
    cls: Any, options: dict[str, Any], dtype: torch.dtype, schedulers: Sequence[Callable[..., Any]] = ()
) -> tuple[Any, ...]:
    """Parameters and states, groups, and the learning rates of five steps."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (7,), (), (0,))]
    if options.get("differentiable"):
        params = [p.detach() for p in params]  # torch will not write to a leaf that asks for a gradient
    optimizer = cls(params, **copy.deepcopy(options))
    planned = [make(optimizer) for make in schedulers]
    rates = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
        for plan in planned:
            plan.step(*[1.0] * isinstance(plan, torch.optim.lr_scheduler.ReduceLROnPlateau))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    saved = optimizer.state_dict()
    return ([p.detach() for p in params], saved["state"]), saved["param_groups"], rates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_inputs(name: str, dtype: torch.dtype) -> None:
    """Every input in every implementation of torch's; our 16-bit numbers are those of its fused one."""
    low = dtype in (torch.float16, torch.bfloat16)
    tolerance = {"rtol": 5e-3, "atol": 5e-3} if low else {"rtol": 1e-5, "atol": 1e-6}
    for sample in entry(name).optim_inputs_func(device="cpu", dtype=dtype):
        for flag in ("fused",) if low else ("default", *entry(name).supported_impls):
            options = sample.kwargs if flag == "default" else {**sample.kwargs, flag: True}
            (ours, *plan), (theirs, *other) = (
                trajectory(getattr(module, name), options, dtype) for module in (bigkern.optim, torch.optim)
            )
            case = f"{name}, {sample.desc}, {flag}"
            torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda text, c=case: f"{c}: {text}")
            assert plan == other, case


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_schedulers(name: str) -> None:
    for schedulers in entry(name).scheduler_inputs:
        (ours, *plan), (theirs, *other) = (
            trajectory(getattr(module, name), {"lr": 0.01}, torch.float32, schedulers)
            for module in (bigkern.optim, torch.optim)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert plan == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_errors(name: str, dtype: torch.dtype) -> None:
    """torch's types and, to the letter, its messages."""
    for case in entry(name).optim_error_inputs_func(device="cpu", dtype=dtype):
        sample, said = case.optimizer_error_input, []
        params = [nn.Parameter(torch.randn(2, 3, dtype=dtype))] if sample.params is None else sample.params
        caught = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        for module in (torch.optim, bigkern.optim):
            with caught(case.error_type, match=case.error_regex) as heard:
                optimizer = getattr(module, name)(params, **sample.kwargs)
                if case.error_on.name == "STEP_ERROR":
                    optimizer.step()
            said.append([str(w.message) for w in heard] if caught is pytest.warns else str(heard.value))
        assert said[0] == said[1], sample.desc
