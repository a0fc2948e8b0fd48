"""Calls of the registered ops ``torch.ops.bigkern.*`` and ``torch.ops.bigkern_native.*``, drawn from a seed.

A forward's arguments are those that the public function would pass on; a backward's come from a forward by
the reference. What each must give is the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import public_calls as public
import torch
from source import DTYPES, Call, Source
from torch import Tensor

from bigkern.core import registry
from bigkern.ops.adam import call as adam_arguments
from bigkern.ops.adam import reference as reference_adam
from bigkern.ops.attention import call as attention_calls
from bigkern.ops.attention import decode_call as decode_op
from bigkern.ops.attention.backends import ATTENTION
from bigkern.ops.attention.call import Attention, AttentionBackward
from bigkern.ops.batch_norm import call as batch_norm_arguments
from bigkern.ops.batch_norm.backends import BATCH_NORM
from bigkern.ops.layernorm_ffn import call as ffn_arguments
from bigkern.ops.layernorm_ffn import frozen_call as frozen_arguments
from bigkern.ops.layernorm_ffn.backends import LAYERNORM_FFN
from bigkern.ops.norm import call as norm_arguments
from bigkern.ops.norm.backends import NORM
from bigkern.ops.recurrent import call as recurrent_arguments
from bigkern.ops.recurrent.backends import RECURRENT
from bigkern.ops.recurrent.reference import scan_backward

Arguments = list[Any]


def _like(source: Source, x: Tensor) -> Tensor:
    return source.laid(source.normal(*x.shape, dtype=x.dtype))


# ---- the arguments of each op, in its schema's order -------------------------------------------------


def attention_call(source: Source) -> Attention:
    if source.chance(0.4):
        return attention_calls.bind(**public.varlen_arguments(source))
    return attention_calls.bind(**public.attention_arguments(source))


def attention(source: Source) -> Arguments:
    return list(attention_call(source).flat())


def attention_backward(source: Source) -> Arguments:
    call = attention_call(source)
    o, lse = ATTENTION.reference.forward(call)
    dlse = source.maybe(lambda: source.normal(*lse.shape), 0.3)
    bias_grad = call.bias is not None and source.chance(0.5)
    do = _like(source, o)
    return list(AttentionBackward.of(call, do, dlse, o, lse, bias_grad).flat())


def decode_attention(source: Source) -> Arguments:
    given = public.decode_arguments(source)
    for name in ("k", "v"):
        given.pop(name, None)
    return list(decode_op.bind(**given).flat())


def norm(source: Source) -> Arguments:
    given, kind = public.norm_arguments(source), source.one_of(["layer", "rms"])
    if kind == "rms":
        given["bias"] = None
    return list(norm_arguments.bind(**given, kind=kind).flat())


def norm_backward(source: Source) -> Arguments:
    call = norm_arguments.Norm(*norm(source))
    result = NORM.reference.forward(call)
    s = call.x if result.sum is None else result.sum
    dsum = None if result.sum is None else source.maybe(lambda: _like(source, s))
    wanted, drop = (source.chance(0.5), source.chance(0.5)), (call.dropout_p, call.dropout_key)
    statistics = result.mean, result.rstd
    return [_like(source, s), dsum, s, call.weight, *statistics, call.kind, *wanted, *drop]


def linear(source: Source) -> Arguments:
    given = public.linear_arguments(source)
    if given["x"].numel() == 0:  # stock's
        given["x"] = source.normal(3, given["x"].shape[-1], dtype=given["x"].dtype)
    return list(given.values())


def linear_backward(source: Source) -> Arguments:
    x, weight, _ = linear(source)
    dy = source.laid(source.normal(*x.shape[:-1], weight.shape[0], dtype=x.dtype))
    return [dy, x, weight, source.chance(0.7), source.chance(0.7)]


def layernorm_ffn(source: Source) -> Arguments:
    given = public.ffn_arguments(source)
    if source.chance(0.3):
        given |= {"dropout_p": 0.3, "hidden_dropout_p": 0.2, "seed": source.below(2**32)}
    call = ffn_arguments.bind(**given)
    call.save = source.one_of(["preactivation", "input", "nothing"])
    return list(call.flat())


def layernorm_ffn_backward(source: Source) -> Arguments:
    call = ffn_arguments.LayernormFfn(*layernorm_ffn(source))
    call.save = "preactivation"
    *tensors, norm, activation, placement, residual, eps, p, hidden_p, _save = call.flat()
    _, *saved = LAYERNORM_FFN.reference.forward(call)
    if activation != "relu" and source.chance(0.2):
        saved = [None] * 4
    wanted = [source.chance(0.7) for _ in range(7)]
    for at in (2, 4, 5, 6):
        wanted[at] &= tensors[at] is not None
    options = norm, activation, placement, residual, eps, p, hidden_p
    return [_like(source, call.x), *tensors, *saved, *options, wanted]


def native_layernorm_ffn_backward(source: Source) -> Arguments:
    arguments = layernorm_ffn_backward(source)
    w1, w2, wanted = arguments[2], arguments[4], arguments[-1]
    sums = [None, None]
    if source.chance(0.3):
        sums = [source.normal(*w.shape) if wanted[at] else None for w, at in ((w1, 1), (w2, 3))]
    return [*arguments, *sums]


def frozen_layernorm_ffn(source: Source) -> Arguments:
    return list(frozen_arguments.bind(**public.frozen_arguments(source)).flat())


def batch_norm(source: Source) -> Arguments:
    call = batch_norm_arguments.bind(**public.batch_norm_arguments(source))
    return list(batch_norm_arguments.BatchNorm.flat(call))


def batch_norm_backward(source: Source) -> Arguments:
    call = batch_norm_arguments.BatchNorm(*batch_norm(source))
    result = BATCH_NORM.reference.forward(call)
    training, y = call.mean is None, result.y if call.relu else None
    mean, var = (result.mean, result.var) if training else (call.mean, call.var)
    wanted = call.residual is not None, source.chance(0.5), source.chance(0.5)
    options = call.eps, call.relu, training, *wanted
    return [_like(source, call.x), call.x, y, call.weight, call.bias, mean, var, *options]


def recurrent(source: Source) -> Arguments:
    call = recurrent_arguments.bind(**public.recurrent_arguments(source))
    call.save = source.chance(0.5)
    return list(call.flat())


def recurrent_backward(source: Source) -> Arguments:
    call = recurrent_arguments.Recurrent(*recurrent(source))
    call.save = True
    y, hn, cn, gates, reserve = RECURRENT.reference.forward(call)
    grads = [source.maybe(partial(_like, source, t), 0.8) if t is not None else None for t in (y, hn, cn)]
    *given, mode, _save = call.flat()
    return [*grads, *given, y, gates, reserve, mode, *(source.chance(0.7) for _ in range(2))]


def recurrent_scan_backward(source: Source) -> Arguments:
    dy, dhn, dcn, _x, h0, c0, weights, *rest = recurrent_backward(source)
    sizes, zoneout, y, gates, reserve, mode, *_wanted = rest
    each = len(weights) // h0.shape[0]
    w_hh = weights[1::each]
    dy, y = (None if t is None else t.reshape(len(gates), -1) for t in (dy, y))
    reverse = w_hh[1] if len(w_hh) == 2 else None
    return [dy, dhn, dcn, gates, h0, c0, w_hh[0], reverse, sizes, zoneout, y, reserve, mode]


def adam(source: Source) -> Arguments:
    return list(adam_arguments.bind(**public.adam_arguments(source)).flat())


def grad_norm(source: Source) -> Arguments:
    return [public.adam_arguments(source)["grads"]]


def adam_pack(source: Source) -> Arguments:
    lists = dict(zip(adam_arguments.Lists.names, adam(source), strict=False))
    del lists["grads"]
    return list(lists.values())


def pack_ffn_weight(source: Source) -> Arguments:
    rows, dtype = 2 * source.size(65), source.one_of([*DTYPES, torch.int8])
    return [source.laid((source.normal(rows, source.size(65)) * 10).to(dtype)), source.chance(0.5)]


# ---- calls -------------------------------------------------------------------------------------------

Draw = Callable[[Source], Arguments]

FORWARD: dict[str, Draw] = {
    "attention": attention,
    "decode_attention": decode_attention,
    "norm": norm,
    "linear": linear,
    "layernorm_ffn": layernorm_ffn,
    "frozen_layernorm_ffn": frozen_layernorm_ffn,
    "recurrent": recurrent,
    "adam": adam,
    "grad_norm": grad_norm,
}
BACKWARD: dict[str, Draw] = {
    "attention_backward": attention_backward,
    "norm_backward": norm_backward,
    "linear_backward": linear_backward,
}
OPS: dict[str, Draw] = {
    **FORWARD,
    **BACKWARD,
    "layernorm_ffn_backward": layernorm_ffn_backward,
    "batch_norm": batch_norm,
    "batch_norm_backward": batch_norm_backward,
    "recurrent_backward": recurrent_backward,
}
# Without adam_packed and grad_norm_packed: they are given addresses, for which their caller answers.
NATIVE: dict[str, Draw] = {
    **FORWARD,
    **BACKWARD,
    "layernorm_ffn_backward": native_layernorm_ffn_backward,
    "recurrent_scan_backward": recurrent_scan_backward,
    "adam_pack": adam_pack,
    "pack_ffn_weight": pack_ffn_weight,
}


def _exact(name: str) -> Callable[..., Any] | None:
    if name == "recurrent_scan_backward":
        return lambda **arguments: scan_backward(recurrent_arguments.ScanBackward(**arguments))
    if name == "adam":  # torch's reads where lists of other shapes have nothing
        return lambda **arguments: reference_adam.adam(adam_arguments.Adam(*arguments.values()))
    op = name.removesuffix("_backward")
    if op not in registry.ops():
        return None
    return partial(_by_call, registry.get(op), name)


def _by_call(op: Any, name: str, **arguments: Any) -> Any:
    """The op's reference."""
    reference = op.reference or op.backends["torch"]
    if name == op.name:
        return reference.forward(op.call(**arguments))
    return reference.backward(op.gradient.autograd.call(**arguments))


def _named(namespace: str, name: str, arguments: Arguments) -> Call:
    op = getattr(getattr(torch.ops, namespace), name).default
    schema = op._schema.arguments
    written = frozenset(a.name for a in schema if a.alias_info is not None and a.alias_info.is_write)
    exact = _exact(name)
    named = dict(zip([a.name for a in schema], arguments, strict=True))
    call = Call(f"{namespace}::{name}", lambda **given: op(*given.values()), named, written, exact, exact)
    call.kernels = namespace == "bigkern_native"
    return call


def _draw(namespace: str, name: str, draw: Draw) -> Callable[[Source], Call]:
    return lambda source: _named(namespace, name, draw(source))


DRAW_OPS = [_draw("bigkern", name, draw) for name, draw in OPS.items()]
DRAW_NATIVE = [_draw("bigkern_native", name, draw) for name, draw in NATIVE.items()]
