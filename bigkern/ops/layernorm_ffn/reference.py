"""A Transformer's feed-forward block in plain torch: what every layernorm_ffn kernel must compute.

    pre    n = norm(x)     p = n W1^T + b1     y = (x +) drop(drop(act(p)) W2^T + b2)
    post                   p = x W1^T + b1     s = (x +) drop(drop(act(p)) W2^T + b2)     y = norm(s)
    no norm                p = x W1^T + b1     y = (x +) drop(drop(act(p)) W2^T + b2)

x is [..., D], W1 [F, D] ([2F, D] gated: gate rows, then up rows), W2 [D, F]; p is the preactivation.
Gated activations compute ``act(gate) * up``. Norm and activation are computed in fp32 (fp64 for fp64)
and rounded to x's dtype where they are stored. The inner drop has a probability of its own.

The block is written once, over :class:`Pieces`. With the plain pieces below it is the reference; a GPU
backend is the same block with its kernels for pieces, a product and what follows it in one kernel, or in
two. p is rounded once: rounding the product first can turn the sign of a p near 0, and with it relu's
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.core.dropout import HIDDEN, OUTPUT, dropped
from bigkern.ops.layernorm_ffn.call import GATED, Gradients, LayernormFfn, LayernormFfnBackward, Result
from bigkern.ops.norm.reference import norm as plain_norm
from bigkern.ops.norm.reference import norm_backward as plain_norm_backward

Dropout = tuple[float, Tensor | None]  # probability, key
NO_DROPOUT: Dropout = (0.0, None)


class Pieces(NamedTuple):
    """What a backend computes, on [M, N] tensors. ``dropout`` is a pair: the probability, the key or None.

    norm, norm_backward     as in ``norm.py``
    up(x, w1, b1, activation, dropout, save) -> (preactivation or None, a)
                            p = x W1^T + b1, a = drop(act(p))
    down(a, w2, b2, residual, dropout) -> y
                            y = (residual +) drop(a W2^T + b2)
    down_norm(a, w2, b2, residual, dropout, norm_weight, norm_bias, eps, norm) -> (y, s, mean or None, rstd)
                            s as down's y, y = norm(s)
    down_backward(dy, dropout, want_bias) -> (dz, db2 or None)
                            dz = drop(dy), db2 its sum over rows
    up_backward(dz, w2, preactivation, activation, dropout, want_bias, rebuild)
        -> (dp, a or None, db1 or None)
                            dp = drop(dz W2) act'(p), db1 its sum over rows; a as in the forward
    weight_gradient(d, x, into) -> dW or None
                            d^T x; or added to the fp32 matrix ``into``
    """

    norm: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor]]
    norm_backward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]
    up: Callable[..., tuple[Tensor | None, Tensor]]
    down: Callable[..., Tensor]
    down_norm: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor]]
    down_backward: Callable[..., tuple[Tensor, Tensor | None]]
    up_backward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    weight_gradient: Callable[..., Tensor | None]


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


def up(
    x: Tensor, w1: Tensor, b1: Tensor | None, activation: str, dropout: Dropout, save: bool
) -> tuple[Tensor | None, Tensor]:
    preactivation = F.linear(x, w1, b1)
    return preactivation if save else None, activated(preactivation, activation, dropout)


def activated(preactivation: Tensor, activation: str, dropout: Dropout) -> Tensor:
    p, key = dropout
    return dropped(activate(preactivation, activation), key, p, HIDDEN)


def down(a: Tensor, w2: Tensor, b2: Tensor | None, residual: Tensor | None, dropout: Dropout) -> Tensor:
    p, key = dropout
    y = dropped(F.linear(a, w2, b2), key, p, OUTPUT)
    return y if residual is None else residual + y


def down_norm_by(down: Callable[..., Tensor], norm: Callable[..., Any]) -> Callable[..., Any]:
    """The piece of two others, one after the other."""

    def down_norm(
        a: Tensor, w2: Any, b2: Tensor | None, residual: Tensor | None, dropout: Dropout, *affine: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        s = down(a, w2, b2, residual, dropout)
        y, _, mean, rstd = norm(s, None, *affine, *NO_DROPOUT)
        return y, s, mean, rstd

    return down_norm


def down_backward(dy: Tensor, dropout: Dropout, want_bias: bool) -> tuple[Tensor, Tensor | None]:
    p, key = dropout
    dz = dropped(dy, key, p, OUTPUT)
    return dz, dz.sum(0) if want_bias else None


def up_backward(
    dz: Tensor,
    w2: Tensor,
    preactivation: Tensor,
    activation: str,
    dropout: Dropout,
    want_bias: bool,
    rebuild: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    p_, da = _wide(preactivation), _wide(dropped(dz @ w2, dropout[1], dropout[0], HIDDEN))
    if activation in GATED:
        gate, up_ = p_.chunk(2, dim=-1)
        name = GATED[activation]
        dp = torch.cat([da * up_ * _act_derivative(gate, name), da * _act(gate, name)], dim=-1)
    else:
        dp = da * _act_derivative(p_, activation)
    db1 = dp.sum(0).to(dz.dtype) if want_bias else None
    a = activated(preactivation, activation, dropout) if rebuild else None
    return dp.to(dz.dtype), a, db1


def weight_gradient(d: Tensor, x: Tensor, into: Tensor | None) -> Tensor | None:
    if into is None:
        return d.t() @ x
    if d.is_cuda and d.dtype != into.dtype:  # one product that adds in fp32
        torch.addmm(into, d.t(), x, out_dtype=into.dtype, out=into)
    else:
        into.addmm_(d.t().to(into.dtype), x.to(into.dtype))
    return None


PLAIN = Pieces(
    plain_norm, plain_norm_backward, up, down, down_norm_by(down, plain_norm), down_backward, up_backward,
    weight_gradient,
)  # fmt: skip


# ---- the block -------------------------------------------------------------------------------------


def layernorm_ffn(call: LayernormFfn, pieces: Pieces = PLAIN) -> Result:
    """``y`` shaped like x; with save ``"preactivation"`` also what the backward reads."""
    rows, keep = _rows(call.x), call.save == "preactivation"
    through = rows if call.residual else None
    affine = (call.norm_weight, call.norm_bias, call.eps, call.norm)
    dropout, hidden_dropout = (call.dropout_p, call.dropout_key), (call.hidden_dropout_p, call.dropout_key)
    n, s, mean, rstd = rows, None, None, None
    pre, post = norms(call)
    if pre:
        n, _, mean, rstd = pieces.norm(rows, None, *affine, *NO_DROPOUT)
    preactivation, a = pieces.up(n, call.w1, call.b1, call.activation, hidden_dropout, keep)
    if post:
        y, s, mean, rstd = pieces.down_norm(a, call.w2, call.b2, through, dropout, *affine)
    else:
        y = pieces.down(a, call.w2, call.b2, through, dropout)
    y = y.view(call.x.shape)
    return Result(y, s, mean, rstd, preactivation) if keep else Result(y, None, None, None, None)


def layernorm_ffn_backward(call: LayernormFfnBackward, pieces: Pieces = PLAIN) -> Gradients:
    """Gradients where ``wanted``; those of w1 and w2 are added to the sums where these are given. Without a
    preactivation the forward is computed again.

    dz = drop(ds)           ds = dy, or post: the norm's gradient                 db2 = sum(dz)
    da = drop(dz W2)        dW2 = dz^T a
    dp = da act'(p)         dW1 = dp^T n        db1 = sum(dp)         n = norm(x), or post: x
    dn = dp W1              dx = the norm's gradient of dn, or post: dn; + ds through the residual
    """
    saved: Any = layernorm_ffn(call.forward(), pieces) if call.preactivation is None else call
    rows, dy = _rows(call.x), _rows(call.dy)
    activation, hidden_dropout = call.activation, (call.hidden_dropout_p, call.dropout_key)
    statistics = (call.norm_weight, saved.mean, saved.rstd, call.norm)
    want_x, want_w1, want_b1, want_w2, want_b2, want_weight, want_bias = call.wanted
    pre, post = norms(call)
    dx = dw1 = db1 = dw2 = dweight = dbias = None

    ds = dy
    if post:
        ds, _, dweight, dbias = pieces.norm_backward(
            dy, None, saved.s, *statistics, want_weight, want_bias, *NO_DROPOUT
        )
    dz, db2 = pieces.down_backward(ds, (call.dropout_p, call.dropout_key), want_b2)

    want_dn = want_x or (pre and (want_weight or want_bias))
    if want_dn or want_w1 or want_b1:
        dp, a, db1 = pieces.up_backward(
            dz, call.w2, saved.preactivation, activation, hidden_dropout, want_b1, want_w2
        )
    elif want_w2:
        a = activated(saved.preactivation, activation, hidden_dropout)
    if want_w2:
        dw2 = pieces.weight_gradient(dz, cast(Tensor, a), call.w2_sum)
    if want_w1:
        affine = (call.norm_weight, call.norm_bias, call.eps, call.norm)
        n = pieces.norm(rows, None, *affine, *NO_DROPOUT)[0] if pre else rows
        dw1 = pieces.weight_gradient(dp, n, call.w1_sum)

    if want_dn:
        dx = dp @ call.w1
        if pre:
            through = dy if call.residual else None
            dx, _, dweight, dbias = pieces.norm_backward(
                dx, through, rows, *statistics, want_weight, want_bias, *NO_DROPOUT
            )
        elif call.residual:
            dx += ds
        dx = dx.view(call.x.shape) if want_x else None
    return Gradients(dx, dw1, db1, dw2, db2, dweight, dbias)


def norms(call: LayernormFfn | LayernormFfnBackward) -> tuple[bool, bool]:
    """Whether there is a norm before the first product, and one after the residual."""
    return call.norm != "none" and call.placement == "pre", call.norm != "none" and call.placement == "post"


def _rows(x: Any) -> Any:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
