"""One bad argument at a time: every error names it, and says what it was and what it must be."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bigkern.ops.adam import adam
from bigkern.ops.adam.grad_norm import grad_norm
from bigkern.optim import Adam, AdamW

NOT_TENSORS: list[Any] = [None, True, 0, 1.5, math.nan, "a", object(), 1j, torch.float32, np.float32(0.5)]
NOT_LISTS: list[Any] = [*NOT_TENSORS, iter([]), {}, torch.ones(2, 3), torch.ones(()), np.ones(2)]
NOT_BOOLS: list[Any] = [None, 0, 1, 1.5, math.nan, "a", "", [], torch.ones(2), torch.ones(()), torch.float32]
NOT_NUMBERS: list[Any] = [None, "a", [], [1.0], {}, object(), 1j, torch.float32, np.ones(1)]
BAD_NUMBERS: list[Any] = [-1.0, -math.inf, math.inf, math.nan, 10**400]
BAD_SCALARS: list[Any] = [
    *NOT_TENSORS[1:],
    torch.ones(2),
    torch.ones(0),
    torch.ones((), dtype=torch.complex64),
    torch.ones((), device="meta"),
    torch.ones(1).to_sparse(),
]


def shown(value: Any) -> str:
    """The same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def arguments() -> dict[str, Any]:
    params = [torch.ones(3), torch.ones(2, 2)]
    return {
        "params": params,
        "grads": [torch.ones_like(p) for p in params],
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "max_exp_avg_sqs": [],
        "state_steps": [torch.zeros(()) for _ in params],
    }


def refused(name: str, **changes: Any) -> None:
    """adam refuses the call, naming ``name``, and has written nothing."""
    given = arguments()
    tensors = [x for listed in given.values() for x in listed]
    before = [x.clone() for x in tensors]
    with pytest.raises((ValueError, TypeError), match=rf"^{name}(?!\w).* must "):
        adam(**{**given, **changes})
    assert all(map(torch.equal, tensors, before))


LISTS = [*arguments(), "masters", "exp_avg_scales", "exp_avg_sq_scales"]


@pytest.mark.parametrize("value", NOT_LISTS, ids=shown)
@pytest.mark.parametrize("name", LISTS)
def test_adam_names_what_is_not_a_list(name: str, value: Any) -> None:
    refused(name, **{name: value})


@pytest.mark.parametrize("value", NOT_TENSORS, ids=shown)
@pytest.mark.parametrize("name", LISTS)
def test_adam_names_the_element_that_is_not_a_tensor(name: str, value: Any) -> None:
    refused(rf"{name}\[1\]", **{name: [torch.ones(3), value]})


@pytest.mark.parametrize(
    "step",
    [
        torch.ones(2),
        torch.ones((), dtype=torch.int32),
        torch.ones((), dtype=torch.complex64),
        torch.ones((), device="meta"),
        torch.ones(1).to_sparse(),
    ],
    ids=str,
)
def test_adam_names_a_step_that_cannot_be_counted(step: Tensor) -> None:
    refused(r"state_steps\[1\]", state_steps=[torch.zeros(()), step])


@pytest.mark.parametrize("value", NOT_BOOLS, ids=shown)
@pytest.mark.parametrize("name", ["decoupled", "amsgrad", "maximize", "zero_grads"])
def test_adam_names_a_flag_that_is_not_one(name: str, value: Any) -> None:
    refused(name, **{name: value})


@pytest.mark.parametrize("value", [*NOT_NUMBERS, *BAD_NUMBERS], ids=shown)
@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "eps", "weight_decay", "max_norm"])
def test_adam_names_a_number_that_is_not_one(name: str, value: Any) -> None:
    if name == "max_norm" and value is None:
        return
    refused(name, **({"grad_norm": torch.ones(())} if name == "max_norm" else {}), **{name: value})


@pytest.mark.parametrize(
    "lr",
    [x for x in BAD_SCALARS if isinstance(x, Tensor)] + [torch.tensor(math.nan), torch.tensor(-1.0)],
    ids=str,
)
def test_adam_names_a_learning_rate_tensor_that_is_no_rate(lr: Tensor) -> None:
    refused("lr", lr=lr)


@pytest.mark.parametrize("value", BAD_SCALARS, ids=shown)
@pytest.mark.parametrize("name", ["grad_scale", "found_inf", "grad_norm"])
def test_adam_names_a_scalar_tensor_that_is_not_one(name: str, value: Any) -> None:
    refused(name, **({"max_norm": 1.0} if name == "grad_norm" else {}), **{name: value})


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, True, "a", torch.ones(())], ids=shown)
def test_adam_names_a_seed_that_is_not_one(value: Any) -> None:
    refused("seed", seed=value)


def test_adam_takes_any_real_number() -> None:
    given, other = arguments(), arguments()
    adam(**given, lr=np.float32(0.5), eps=0, weight_decay=True, beta1=np.float64(0.5))
    adam(**other, lr=0.5, eps=0.0, weight_decay=1.0, beta1=0.5)
    assert all(map(torch.equal, given["params"], other["params"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_adam_takes_scalars_of_any_real_dtype(dtype: torch.dtype) -> None:
    given, other = arguments(), arguments()
    for lists, kind in ((given, dtype), (other, torch.float32)):
        two = torch.full((1,), 2.0, dtype=kind)
        adam(**lists, grad_scale=two, found_inf=two * 0, max_norm=1.0, grad_norm=two)
    assert all(map(torch.equal, given["params"], other["params"]))


@pytest.mark.parametrize("value", NOT_LISTS, ids=shown)
def test_grad_norm_names_what_is_not_a_list(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^grads must be a list of Tensors, not "):
        grad_norm(value)


@pytest.mark.parametrize(
    "value", [*NOT_TENSORS, torch.ones(2).int(), torch.ones(2, dtype=torch.complex64)], ids=shown
)
def test_grad_norm_names_the_element_that_is_not_a_gradient(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^grads\[1\] must be "):
        grad_norm([torch.ones(2), value])


@pytest.mark.parametrize(
    "value", [torch.ones(2).to_sparse(), torch.ones(2).to_mkldnn()], ids=["coo", "mkldnn"]
)
def test_grad_norm_names_a_gradient_that_is_not_dense(value: Tensor) -> None:
    with pytest.raises(TypeError, match=r"^grads\[0\] must be dense, not "):
        grad_norm([value])


# ---- the optimizers --------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, list[Any]] = {
    "state_dtype": [True, 1, "float32", [], torch.ones(2), torch.float16, torch.float64, torch.int8],
    "master_weights": [None, 2, 1.5, math.nan, "half", [], [1.0], {}, np.ones(1), torch.ones(2), torch.int16],
    "stochastic_rounding": NOT_BOOLS,
    "seed": [True, -1, 1.5, 2**63, "a", [], torch.ones((), dtype=torch.int64)],
    "max_norm": [True, 0, *NOT_NUMBERS[1:], *BAD_NUMBERS, torch.ones(())],
    "zero_grads": NOT_BOOLS,
    "in_backward": NOT_BOOLS,
    "offload": NOT_BOOLS,
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD_OPTIONS.items() for v in vs], ids=shown)
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_optimizer_names_an_option_that_is_not_one(cls: Any, name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must be .*, not "):
        cls([Parameter(torch.ones(3, dtype=torch.bfloat16))], **{name: value})


@pytest.mark.parametrize("name", ["state_dtype", "master_weights", "stochastic_rounding"])
def test_optimizer_names_a_groups_option_that_is_not_one(name: str) -> None:
    optimizer = AdamW([Parameter(torch.ones(3))])
    for value in BAD_OPTIONS[name]:
        with pytest.raises((ValueError, TypeError), match=rf"^{name} must be .*, not "):
            optimizer.add_param_group({"params": [Parameter(torch.ones(3))], name: value})
    assert len(optimizer.param_groups) == 1


TORCHS: dict[str, list[Any]] = {
    "lr": [0, 1, True, 0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), -1.0],
    "betas": [[0.5, 0.9], (0, 0), (np.float32(0.5), 0.9), (0.9,), (math.nan, 0.9), (0.9, "a"), None, 0.9],
    "eps": [0, 1, True, np.float32(0.5), math.inf, math.nan, "a", None],
    "weight_decay": [0, 1, np.float32(0.5), math.nan, -1, "a", None],
    "amsgrad": [0, 1, None, "a", "", [], 1.5, math.nan],
    "maximize": [0, 1, None, "a", "", [], 1.5, math.nan],
    "foreach": [0, 1, None, "a"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in TORCHS.items() for v in vs], ids=shown)
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_torchs_arguments_are_taken_and_refused_as_torch_does(kind: str, name: str, value: Any) -> None:
    ends: list[Any] = []
    for cls in ({"Adam": Adam, "AdamW": AdamW}[kind], getattr(torch.optim, kind)):
        p = Parameter(torch.ones(3))
        p.grad = torch.tensor([1.0, -2.0, 0.5])
        try:
            optimizer = cls([p], **{name: value})
            optimizer.step()
            optimizer.step()
        except Exception as error:
            ends.append((type(error), re.sub(r"0x\w+", "", str(error))))
        else:
            ends.append(p.detach())
    if isinstance(ends[1], Tensor):
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6, equal_nan=True)
    else:
        assert ends[0] == ends[1]


@pytest.mark.parametrize("value", ["a", None, [], torch.ones(2)], ids=shown)
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "betas"])
def test_step_names_what_was_put_into_a_group_between_steps(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and name != "lr":
        return  # torch's own step takes it
    p = Parameter(torch.ones(3))
    optimizer = AdamW([p])
    for changed in (False, True):
        p.grad = torch.ones(3)
        if changed:
            optimizer.param_groups[0][name] = (0.9, value) if name == "betas" else value
            before = p.detach().clone()
            with pytest.raises(ValueError, match=rf"^{name} must be .*, not "):
                optimizer.step()
            assert torch.equal(p, before)
        else:
            optimizer.step()
