"""The feed-forward block by torch's own functions, differentiable by torch's own autograd."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from bigkern.core.dropout import HIDDEN, OUTPUT, dropped
from bigkern.ops.layernorm_ffn.call import GATED, LayernormFfn
from bigkern.ops.layernorm_ffn.reference import norms
from bigkern.ops.norm.call import Norm
from bigkern.ops.norm.stock import norm as stock_norm


def layernorm_ffn(call: LayernormFfn, sums: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """y; the backward adds the gradients of w1 and w2 to ``sums``, if there are any."""
    b1, b2, key = call.b1, call.b2, call.dropout_key
    affine = (call.norm_weight, call.norm_bias, call.eps, call.norm)
    pre, post = norms(call)

    def drop(t: Tensor, p: float, head: int) -> Tensor:
        if p == 0.0:
            return t
        return F.dropout(t, p) if key is None else dropped(t, key, p, head)

    def block(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        n = stock_norm(Norm(x, None, *affine, 0.0, None))[0] if pre else x
        a = drop(activate(F.linear(n, w1, b1), call.activation), call.hidden_dropout_p, HIDDEN)
        y = drop(F.linear(a, w2, b2), call.dropout_p, OUTPUT)
        y = x + y if call.residual else y
        return stock_norm(Norm(y, None, *affine, 0.0, None))[0] if post else y

    w1, w2 = call.w1, call.w2
    if sums is not None:
        w1, w2 = (_AddGradient.apply(w, into) for w, into in zip((w1, w2), sums, strict=True))
    if call.save == "input":
        return cast(Tensor, checkpoint(block, call.x, w1, w2, use_reentrant=False))
    return block(call.x, w1, w2)


class _AddGradient(torch.autograd.Function):
    """A weight as it is; its gradient goes to an fp32 sum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, into: Tensor) -> Tensor:  # type: ignore[override]
        ctx.into = into
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.into += gradient
        return None, None


def activate(p: Tensor, activation: str) -> Tensor:
    if activation in GATED:
        gate, up = p.chunk(2, dim=-1)
        return activate(gate, GATED[activation]) * up
    if activation == "gelu_tanh":
        return F.gelu(p, approximate="tanh")
    return cast(Tensor, getattr(F, activation)(p))
