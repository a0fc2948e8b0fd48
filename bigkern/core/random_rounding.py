"""Stock PyTorch as another machine might have rounded it.

Under :class:`RandomRounding` every torch operation is computed in float64, and its result is then rounded at
random, up or down, in the dtype that the operation returns here. A sum gets the error besides that it has if
its terms are added one after another in float32. Libraries add in other orders and round elsewhere, so the
errors of such runs show how far correct results in a dtype may be from the exact ones, whatever this machine
makes of one case. It is a form of Monte Carlo arithmetic (D. S. Parker, 1997).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten, prims = torch.ops.aten, torch.ops.prims

SUMS = {
    aten.addbmm, aten.addmm, aten.addmv, aten.baddbmm, aten.bmm, aten.convolution, aten.convolution_backward,
    aten.cumsum, aten.dot, aten.linalg_vector_norm, aten.mean, aten.mm, aten.mv, aten.sum,
    prims.sum,
}  # fmt: skip
SQUARES = {prims.var}  # sums of squares, which are their own absolute values

# One operation to torch, but sums or several roundings in themselves, some of which cancel: taken apart.
COMPOUND = {
    aten._fused_rms_norm, aten._fused_rms_norm_backward, aten._log_softmax, aten._log_softmax_backward_data,
    aten._native_batch_norm_legit, aten._softmax, aten._softmax_backward_data, aten.gelu, aten.gelu_backward,
    aten.logsumexp, aten.native_batch_norm, aten.native_batch_norm_backward, aten.native_layer_norm,
    aten.native_layer_norm_backward, aten.sigmoid_backward, aten.silu, aten.silu_backward,
    aten.tanh_backward, aten.var, aten.var_mean,
}  # fmt: skip

ROUNDING = torch.finfo(torch.float32).eps / 2  # the largest relative error of one rounding in float32
# Of n terms with random signs, added in turn and rounded to nearest: the error's standard deviation, in
# roundings of the sum of absolutes. A sum's error is as wide as its partial sums are high: Laplace's tails.
CHAIN = 0.47


@contextmanager
def random_rounding(seed: int) -> Iterator[None]:
    """:class:`RandomRounding` without oneDNN, to which a layer of an LSTM is one operation, in one dtype."""
    onednn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with RandomRounding(seed):
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)


class RandomRounding(TorchDispatchMode):
    """Within it, each operation's results are rounded at random; ``seed`` decides how."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.overloadpacket in COMPOUND and op in decomposition_table:
            with self:
                return taken_apart(op, args, kwargs)
        if op.is_view or torch.Tag.nondeterministic_seeded in op.tags or not _has_floats((args, kwargs)):
            return op(*args, **kwargs)
        if op.namespace not in ("aten", "prims"):
            raise NotImplementedError(f"{op} is one operation to torch: call what it is made of")
        exact = _exactly(op, args, kwargs)  # before the operation itself, which may work in place
        if op.overloadpacket in SUMS:
            self._add_in_turn(exact, _exactly(op, args, kwargs, Tensor.abs))
        if op.overloadpacket in SQUARES:
            self._add_in_turn(exact, exact.clone())
        result = op(*args, **kwargs)
        for here, wide in zip(tree_leaves(result), tree_leaves(exact), strict=True):
            if _is_rounded(here):
                here.copy_(self._rounded(wide, here.dtype))
        return result

    def _add_in_turn(self, sums: Any, absolutes: Any) -> None:
        for x, total in zip(tree_leaves(sums), tree_leaves(absolutes), strict=True):
            if isinstance(x, Tensor):
                noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float64)
                noise *= torch.empty_like(noise).exponential_(generator=self.generator).sqrt_()
                x.add_(noise.to(x.device).mul_(CHAIN * ROUNDING).mul_(total.abs_()))

    def _rounded(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """One of the two numbers of dtype next to each element, the nearer one with more likelihood."""
        limits = torch.finfo(dtype)
        step = torch.ldexp(torch.full_like(exact, limits.eps / 2), torch.frexp(exact).exponent)
        step.clamp_(min=limits.smallest_normal * limits.eps)
        noise = torch.rand(exact.shape, generator=self.generator, dtype=torch.float64).to(exact.device)
        nearest = exact.to(dtype)
        return torch.where(nearest == exact, nearest, (exact + (noise - 0.5) * step).to(dtype))


def taken_apart(op: Any, args: Any, kwargs: Any) -> Any:
    """A compound operation by simple ones."""
    if op.overloadpacket is aten.native_batch_norm and args[0].dtype != torch.float32:
        # torch's own way rounds the statistics to x's dtype, which its operation does not.
        y, *statistics = decomposition_table[op](args[0].float(), *args[1:], **kwargs)
        return y.to(args[0].dtype), *statistics
    return decomposition_table[op](*args, **kwargs)


def _exactly(op: Any, args: Any, kwargs: Any, change: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """The operation in float64 on copies of its arguments, each of them changed."""

    def widened(x: Any) -> Any:
        if isinstance(x, Tensor):
            return change(x.double()) if x.is_floating_point() else x.clone()
        return torch.float64 if x in (torch.float32, torch.bfloat16, torch.float16) else x

    return op(*tree_map(widened, args), **tree_map(widened, kwargs))


def _has_floats(arguments: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(arguments))


def _is_rounded(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
