"""The norm of all gradients beyond test_parity.py, and its checks."""

from __future__ import annotations

import pytest
import torch
from parity import BACKENDS, KERNEL_BACKENDS, device_of, run_backend
from torch import Tensor

import bigkern
from bigkern.ops.adam import Packed
from bigkern.ops.adam.call import Lists
from bigkern.ops.adam.grad_norm import grad_norm

SIZES = (1, 7, 0, 63, 129, 1023, 9000)


def gradients(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Odd sizes, one empty, one that starts off any 16-byte boundary, one stored in another order."""
    torch.manual_seed(0)
    made = [torch.randn(n, device=device) for n in SIZES]
    made += [torch.randn(258, device=device)[1:], torch.randn(9, 5, device=device).t()]
    return [g.to(dtype) for g in made]


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_torch_total_norm(backend: str) -> None:
    grads = gradients(torch.float32, device_of(backend))
    with run_backend("grad_norm", backend):
        norm = grad_norm(grads)
        assert norm.dtype == torch.float32
        assert norm.shape == ()
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(grads))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_shows(backend: str, value: float) -> None:
    grads = gradients(torch.float32, device_of(backend))
    grads[5][1000] = value
    with run_backend("grad_norm", backend):
        torch.testing.assert_close(grad_norm(grads).cpu(), torch.tensor(abs(value)), equal_nan=True)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_twice_is_the_same(backend: str) -> None:
    grads = gradients(torch.bfloat16, device_of(backend))
    with run_backend("grad_norm", backend):
        assert torch.equal(grad_norm(grads), grad_norm(grads))


def test_threads_change_no_bit() -> None:
    grads = [torch.randn(n) for n in (70000, 3, 150000)]
    before = torch.get_num_threads()
    try:
        with run_backend("grad_norm", "cpu"):
            norms = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                norms.append(grad_norm(grads))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*norms)


def test_many_and_none() -> None:
    torch.testing.assert_close(grad_norm([torch.ones(3)] * 1000), torch.tensor(3000.0).sqrt())
    assert grad_norm([]) == 0
    assert torch.ops.bigkern.grad_norm([]) == 0
    assert bigkern.explain("grad_norm", []).chosen == "torch"
    assert grad_norm([torch.ones(0), torch.ones(2, 0)]) == 0


def test_other_dtypes_and_layouts_go_to_stock() -> None:
    assert bigkern.explain("grad_norm", [torch.ones(4, dtype=torch.float64)]).chosen == "torch"
    assert grad_norm([torch.full((4,), 2.0, dtype=torch.float64)]).dtype == torch.float64
    strided = torch.ones(4, 6)[:, ::2]
    assert bigkern.explain("grad_norm", [strided]).chosen == "torch"
    torch.testing.assert_close(grad_norm([strided]), torch.tensor(12.0).sqrt())


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([torch.ones(2), 1.0], TypeError, r"grads\[1\] must be a Tensor"),
        ([torch.ones(2), torch.ones(2).int()], TypeError, r"grads\[1\] must be floating point"),
        ([torch.ones(2), torch.ones(2).half()], ValueError, r"grads\[1\] must be torch.float32"),
    ],
)
def test_bad_inputs(grads: list[Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grad_norm(grads)


def test_native_op_checks_for_itself() -> None:
    with pytest.raises(RuntimeError, match=r"grads\[1\] must have grads\[0\]'s dtype"):
        torch.ops.bigkern_native.grad_norm([torch.ones(2), torch.ones(2).half()])
    with pytest.raises(RuntimeError, match=r"grads\[0\] must be dense"):
        torch.ops.bigkern_native.grad_norm([torch.ones(4, 6)[:, ::2]])


def test_packed() -> None:
    params = [torch.randn(n) for n in (5, 0, 300)]
    steps = [torch.zeros(()) for _ in params]
    grads = [torch.randn_like(p) for p in params]
    lists = Lists(params, grads, params, params, [], steps)
    packed = Packed(lists)
    found = packed.find(lists)
    assert found is not None
    torch.testing.assert_close(packed.grad_norm(found), torch.nn.utils.get_total_norm(grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    grads = gradients(torch.float32, device_of(backend))
    with run_backend("grad_norm", backend):
        torch.library.opcheck(torch.ops.bigkern.grad_norm.default, (grads,))
