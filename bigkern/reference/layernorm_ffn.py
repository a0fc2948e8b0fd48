"""A Transformer's feed-forward block in plain torch: what every layernorm_ffn kernel must compute.

    pre    n = norm(x)     p = n W1^T + b1     y = (x +) act(p) W2^T + b2
    post                   p = x W1^T + b1     s = (x +) act(p) W2^T + b2     y = norm(s)

x is [..., D], W1 [F, D] ([2F, D] gated: gate rows, then up rows), W2 [D, F]; p is the preactivation.
Gated activations compute ``act(gate) * up``. Norm and activation are computed in fp32 (fp64 for fp64)
and rounded to x's dtype where they are stored.

The block is written once, over four :class:`Pieces` and torch's matrix products. With the plain pieces
below it is the reference; a GPU backend is the same block with its kernels for pieces. b1 goes into the
product: there it costs no pass over memory, and p is rounded once (rounding the product first can turn
the sign of a p near 0, and with it relu's gradient).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.reference.norm import norm as plain_norm
from bigkern.reference.norm import norm_backward as plain_norm_backward

GATED = {"swiglu": "silu", "geglu": "gelu"}  # gated activation -> what it applies to the gate

Gradients = tuple[Tensor | None, ...]  # of x, w1, b1, w2, b2, norm_weight, norm_bias


class Pieces(NamedTuple):
    """What a backend computes between the two products, on [M, N] tensors."""

    norm: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor]]
    norm_backward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    bias_activation: Callable[..., tuple[Tensor, Tensor]]
    bias_activation_backward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


# ---- the plain pieces ------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _act(u: Tensor, name: str) -> Tensor:
    if name == "gelu":
        return F.gelu(u)
    if name == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    return F.silu(u) if name == "silu" else F.relu(u)


def _act_derivative(u: Tensor, name: str) -> Tensor:
    if name == "gelu":  # d/du u Phi(u) = Phi(u) + u phi(u)
        phi = torch.exp(-0.5 * u * u) * math.sqrt(0.5 / math.pi)
        return 0.5 * (1 + torch.erf(u * math.sqrt(0.5))) + u * phi
    if name == "gelu_tanh":
        c, cubic = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(c * (u + cubic * u * u * u))
        return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * c * (1 + 3 * cubic * u * u)
    if name == "silu":
        sigmoid = torch.sigmoid(u)
        return sigmoid * (1 + u * (1 - sigmoid))
    return (u > 0).to(u.dtype)


def activate(preactivation: Tensor, activation: str) -> Tensor:
    """``act(p)``, or ``act(gate) * up``."""
    p = _wide(preactivation)
    if activation not in GATED:
        return _act(p, activation).to(preactivation.dtype)
    gate, up = p.chunk(2, dim=-1)
    return (_act(gate, GATED[activation]) * up).to(preactivation.dtype)


def bias_activation(product: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """``(preactivation, out)``: the product with its bias, and the activation of that, in product's dtype.

    The product may be overwritten by the preactivation.
    """
    preactivation = product if bias is None else product + bias
    return preactivation, activate(preactivation, activation)


def bias_activation_backward(
    dout: Tensor, preactivation: Tensor, activation: str, want_bias: bool, rebuild: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dpre = dout * act'(p)``; if asked, the activation rebuilt and ``dbias = sum(dpre)`` over rows."""
    p, dout_ = _wide(preactivation), _wide(dout)
    if activation in GATED:
        gate, up = p.chunk(2, dim=-1)
        name = GATED[activation]
        dpre = torch.cat([dout_ * up * _act_derivative(gate, name), dout_ * _act(gate, name)], dim=-1)
    else:
        dpre = dout_ * _act_derivative(p, activation)
    dbias = dpre.sum(0).to(dout.dtype) if want_bias else None
    out = activate(preactivation, activation) if rebuild else None
    return dpre.to(dout.dtype), out, dbias


PLAIN = Pieces(plain_norm, plain_norm_backward, bias_activation, bias_activation_backward)


# ---- the block -------------------------------------------------------------------------------------


def layernorm_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    activation: str,
    placement: str,
    residual: bool,
    eps: float,
    save: bool,
    pieces: Pieces = PLAIN,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``y`` shaped like x; if ``save`` also ``s [M, D]`` (post), ``mean``, ``rstd``, ``preactivation``."""
    rows = _rows(x)
    affine = (norm_weight, norm_bias, eps, norm)
    if placement == "pre":
        n, _, mean, rstd = pieces.norm(rows, None, *affine)
        preactivation, a = pieces.bias_activation(F.linear(n, w1, b1), None, activation)
        y, s = F.linear(a, w2, b2), None
        if residual:
            y += rows
    else:
        preactivation, a = pieces.bias_activation(F.linear(rows, w1, b1), None, activation)
        ffn = F.linear(a, w2, b2)
        y, s, mean, rstd = pieces.norm(ffn, rows if residual else None, *affine)
        s = ffn if s is None else s
    y = y.view(x.shape)
    return (y, s, mean, rstd, preactivation) if save else (y, None, None, None, None)


def layernorm_ffn_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    s: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    preactivation: Tensor,
    norm: str,
    activation: str,
    placement: str,
    residual: bool,
    eps: float,
    wanted: Sequence[bool],
    pieces: Pieces = PLAIN,
) -> Gradients:
    """Gradients of x, w1, b1, w2, b2, norm_weight and norm_bias; None where not ``wanted``.

    da = ds W2              dW2 = ds^T a        db2 = sum(ds)         ds = dy, or post: the norm's gradient
    dp = da act'(p)         dW1 = dp^T n        db1 = sum(dp)         n = norm(x), or post: x
    dn = dp W1              dx = the norm's gradient of dn, or post: dn; + ds through the residual
    """
    rows, dy = _rows(x), _rows(dy)
    want_x, want_w1, want_b1, want_w2, want_b2, want_weight, want_bias = wanted
    pre = placement == "pre"
    dx = dw1 = db1 = dw2 = db2 = dweight = dbias = None

    ds = dy
    if not pre:
        ds, dweight, dbias = pieces.norm_backward(
            dy, None, s, norm_weight, mean, rstd, norm, want_weight, want_bias
        )
    if want_b2:
        db2 = ds.sum(0)

    want_dn = want_x or (pre and (want_weight or want_bias))
    if want_dn or want_w1 or want_b1:
        dp, a, db1 = pieces.bias_activation_backward(ds @ w2, preactivation, activation, want_b1, want_w2)
    elif want_w2:
        _, a = pieces.bias_activation(preactivation, None, activation)
    if want_w2:
        dw2 = ds.t() @ cast(Tensor, a)
    if want_w1:
        n = pieces.norm(rows, None, norm_weight, norm_bias, eps, norm)[0] if pre else rows
        dw1 = dp.t() @ n

    if want_dn:
        dx = dp @ w1
        if pre:
            through = dy if residual else None
            dx, dweight, dbias = pieces.norm_backward(
                dx, through, rows, norm_weight, mean, rstd, norm, want_weight, want_bias
            )
        elif residual:
            dx += ds
        dx = dx.view(x.shape) if want_x else None
    return dx, dw1, db1, dw2, db2, dweight, dbias


def _rows(x: Any) -> Any:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
