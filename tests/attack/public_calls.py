"""Valid calls of the public functions, drawn from a seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from source import DTYPES, Call, Source
from torch import Tensor, nn

import bigkern
from bigkern.ops.adam import adam
from bigkern.ops.adam.grad_norm import grad_norm

Arguments = dict[str, Any]


def _stock(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        with bigkern.use("torch"):
            return function(**arguments)

    return call


def _forced(function: Callable[..., Any]) -> Callable[..., Any]:
    """By our CPU kernels, also where stock is faster; what they refuse runs as it would."""

    def call(**arguments: Any) -> Any:
        try:
            with bigkern.use("cpu"):
                return function(**arguments)
        except bigkern.BackendRefused:
            return function(**arguments)

    return call


def _call(source: Source, function: Callable[..., Any], arguments: Arguments, **more: Any) -> Call:
    stock, forced = _stock(function), source.chance(0.6)
    ours = _forced(function) if forced else function
    kernels = forced and function not in (bigkern.merge_attention, bigkern.batch_norm, bigkern.linear)
    name = f"bigkern.{function.__name__}"
    return Call(name, ours, arguments, exact=stock, plain=stock, kernels=kernels, **more)


# ---- attention -------------------------------------------------------------------------------------


def _heads(source: Source) -> tuple[int, int]:
    return source.one_of([(1, 1), (2, 1), (2, 2), (4, 2), (3, 3), (6, 2)])


def _rules(source: Source, B: int, Hq: int) -> Arguments:
    slopes = source.one_of([(Hq,), (B, Hq)])
    rules: Arguments = {
        "scale": source.one_of([None, None, 0.3]),
        "window": source.one_of([None, None, (5, 0), (3, None), (None, 9), (0, 0)]),
        "softcap": source.one_of([0.0, 0.0, 4.0]),
        "alibi_slopes": source.maybe(lambda: source.positive(*slopes), 0.2),
        "sinks": source.maybe(lambda: source.normal(Hq), 0.2),
    }
    return {name: value for name, value in rules.items() if value is not None}


def attention_arguments(source: Source) -> Arguments:
    dtype, (Hq, Hkv), B = source.one_of(DTYPES), _heads(source), source.one_of([1, 2, 3])
    Sq, D, Dv = source.size(), source.size(96), source.size(96)
    Sk = source.one_of([Sq, source.size()])
    arguments: Arguments = {
        "q": source.laid(source.normal(B, Hq, Sq, D, dtype=dtype)),
        "k": source.laid(source.normal(B, Hkv, Sk, D, dtype=dtype)),
        "v": source.laid(source.normal(B, Hkv, Sk, Dv, dtype=dtype)),
        "causal": source.one_of([False, True, "top_left", "bottom_right"]),
    }
    broadcast = [source.one_of([1, n]) for n in (B, Hq, Sq, Sk)]
    if source.chance(0.25):
        arguments["mask"] = source.laid(source.mask(*broadcast[source.below(3) :]))
    if source.chance(0.25):
        arguments["bias"] = source.laid(source.normal(*broadcast[source.below(3) :], dtype=dtype))
    if source.chance(0.2):
        arguments |= {"dropout_p": 0.3, "seed": source.below(2**32), "offset": source.below(100)}
    return arguments | _rules(source, B, Hq)


def attention(source: Source) -> Call:
    arguments = attention_arguments(source) | {"return_lse": source.chance(0.3)}
    return _call(source, bigkern.attention, arguments, gradients=source.chance(0.5))


def varlen_arguments(source: Source) -> Arguments:
    dtype, (Hq, Hkv), D = source.one_of(DTYPES), _heads(source), source.size(64)
    B = source.one_of([1, 2, 3, 5])
    rows, keys = ([source.one_of([0, 1, 5, 17, 40]) for _ in range(B)] for _ in range(2))

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int()

    arguments: Arguments = {
        "q": source.laid(source.normal(sum(rows), Hq, D, dtype=dtype)),
        "k": source.laid(source.normal(sum(keys), Hkv, D, dtype=dtype)),
        "v": source.laid(source.normal(sum(keys), Hkv, source.size(64), dtype=dtype)),
        "cu_seqlens_q": ends(rows),
        "cu_seqlens_k": ends(keys),
        "causal": source.one_of([False, True, "top_left", "bottom_right"]),
    }
    if source.chance(0.5):
        arguments |= {"max_seqlen_q": max(rows), "max_seqlen_k": max(keys)}
    if source.chance(0.2):
        arguments |= {"dropout_p": 0.3, "seed": source.below(2**32)}
    return arguments | _rules(source, B, Hq)


def varlen_attention(source: Source) -> Call:
    arguments = varlen_arguments(source) | {"return_lse": source.chance(0.3)}
    return _call(source, bigkern.varlen_attention, arguments, gradients=source.chance(0.5))


def decode_arguments(source: Source) -> Arguments:
    dtype, (Hq, Hkv), B = source.one_of(DTYPES), _heads(source), source.one_of([1, 2, 3])
    Sq, D, Dv = source.one_of([1, 1, 2, 5]), source.size(64), source.size(64)
    paged, page_size, width = source.chance(0.4), source.one_of([4, 16]), source.one_of([2, 5])
    pages, S = (B * width + source.below(3), page_size) if paged else (B, Sq + source.size())
    capacity = S * width if paged else S
    new = capacity >= Sq and source.chance(0.4)
    arguments: Arguments = {
        "q": source.laid(source.normal(B, Hq, Sq, D, dtype=dtype)),
        "k_cache": source.laid(source.normal(pages, Hkv, S, D, dtype=dtype), unit_stride=True),
        "v_cache": source.laid(source.normal(pages, Hkv, S, Dv, dtype=dtype), unit_stride=True),
        "cache_seqlens": torch.tensor([source.below(capacity + 1 - Sq * new) for _ in range(B)]).int(),
        "causal": source.chance(0.7),
    }
    if new:
        arguments["k"] = source.normal(B, Hkv, Sq, D, dtype=dtype)
        arguments["v"] = source.normal(B, Hkv, Sq, Dv, dtype=dtype)
    if paged:
        order = source.normal(pages).argsort()[: B * width]
        arguments["page_table"] = order.view(B, width).int()
    return arguments | _rules(source, B, Hq)


def decode_attention(source: Source) -> Call:
    arguments = decode_arguments(source) | {"return_lse": source.chance(0.3)}
    return _call(source, bigkern.decode_attention, arguments, written=frozenset({"k_cache", "v_cache"}))


def merge_attention(source: Source) -> Call:
    dtype, shape = source.one_of(DTYPES), (source.size(9), source.size(), source.size(64))
    parts = source.one_of([1, 2, 3])
    outputs = [source.normal(*shape, dtype=dtype) for _ in range(parts)]
    lses = [source.normal(*shape[:-1]) for _ in range(parts)]
    return _call(source, bigkern.merge_attention, {"outputs": outputs, "lses": lses}, gradients=True)


def sdpa(source: Source) -> Call:
    given = attention_arguments(source)
    bias = source.one_of([given.get("mask"), given.get("bias"), None])
    arguments = {
        "query": given["q"],
        "key": given["k"],
        "value": given["v"],
        "attn_mask": bias,
        "is_causal": bias is None and source.chance(0.5),
        "scale": given.get("scale"),
        "enable_gqa": True,
    }
    return _call(source, bigkern.scaled_dot_product_attention, arguments, gradients=source.chance(0.5))


# ---- norms and products ----------------------------------------------------------------------------


def _drop(source: Source) -> Arguments:
    if source.chance(0.7):
        return {}
    return {"dropout_p": 0.3, "seed": source.below(2**32), "offset": source.below(9)}


def norm_arguments(source: Source) -> Arguments:
    """Of a LayerNorm over one dimension; without the bias, an RMSNorm's. At least 7 columns: the gradients of
    two are what rounding leaves."""
    dtype, N = source.one_of(DTYPES), source.one_of([7, 16, 63, 64, 129, 768, 1023])
    shape = [source.size(33) for _ in range(source.below(3))] + [N]
    arguments: Arguments = {
        "x": source.laid(source.normal(*shape, dtype=dtype)),
        "normalized_shape": (N,),
        "weight": source.maybe(lambda: source.laid(source.normal(N, dtype=dtype))),
        "bias": source.maybe(lambda: source.laid(source.normal(N, dtype=dtype))),
        "eps": source.one_of([1e-5, 1e-3]),
        "residual": source.maybe(lambda: source.laid(source.normal(*shape, dtype=dtype))),
    }
    return arguments | (_drop(source) if arguments["residual"] is not None else {})


def layer_norm(source: Source) -> Call:
    return _call(source, bigkern.layer_norm, norm_arguments(source), gradients=source.chance(0.5))


def rms_norm(source: Source) -> Call:
    arguments = norm_arguments(source)
    del arguments["bias"]
    return _call(source, bigkern.rms_norm, arguments, gradients=source.chance(0.5))


def linear_arguments(source: Source) -> Arguments:
    dtype, K, N = source.one_of(DTYPES), source.size(), source.size()
    rows = source.one_of([(), (source.size(),), (3, source.size(33)), (300,), (0,)])
    return {
        "x": source.laid(source.normal(*rows, K, dtype=dtype)),
        "weight": source.laid(source.normal(N, K, dtype=dtype)),
        "bias": source.maybe(lambda: source.laid(source.normal(N, dtype=dtype))),
    }


def linear(source: Source) -> Call:
    return _call(source, bigkern.linear, linear_arguments(source), gradients=source.chance(0.5))


def ffn_arguments(source: Source) -> Arguments:
    dtype, D, F = source.one_of(DTYPES), source.one_of([7, 16, 33, 64, 96]), source.size(129)
    activation = source.one_of(["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"])
    norm = source.one_of(["layer", "rms", "none"])
    rows = F * (2 if activation in ("swiglu", "geglu") else 1)
    shape = source.one_of([(source.size(),), (2, source.size(33)), (64,), (3, 1, 5)])

    def vector(n: int, wanted: bool = True) -> Tensor | None:
        return source.maybe(lambda: source.laid(source.normal(n, dtype=dtype)), 0.6 if wanted else 0.0)

    return {
        "x": source.laid(source.normal(*shape, D, dtype=dtype)),
        "w1": source.laid(source.normal(rows, D, dtype=dtype, scale=D**-0.5)),
        "b1": vector(rows),
        "w2": source.laid(source.normal(D, F, dtype=dtype, scale=F**-0.5)),
        "b2": vector(D),
        "norm_weight": vector(D, norm != "none"),
        "norm_bias": vector(D, norm == "layer"),
        "norm": norm,
        "activation": activation,
        "placement": source.one_of(["pre", "post"]),
        "residual": source.chance(0.7),
        "eps": 1e-5,
    }


def layernorm_ffn(source: Source) -> Call:
    arguments = ffn_arguments(source)
    if source.chance(0.3):
        arguments |= {"dropout_p": 0.3, "hidden_dropout_p": 0.2, "seed": source.below(2**32)}
    arguments["save"] = source.one_of(["preactivation", "input"])
    smooth = arguments["activation"] != "relu"  # a sign near 0 may differ, and a gradient with it
    return _call(source, bigkern.layernorm_ffn, arguments, gradients=smooth and source.chance(0.5))


def frozen_arguments(source: Source) -> Arguments:
    arguments, stored = ffn_arguments(source), source.one_of(["packed", "int8"])
    gated = arguments["activation"] in ("swiglu", "geglu")
    arguments["w1"] = bigkern.freeze_weight(arguments["w1"], stored, gated=gated)
    arguments["w2"] = bigkern.freeze_weight(arguments["w2"], stored)
    return arguments


def frozen_layernorm_ffn(source: Source) -> Call:
    return _call(source, bigkern.frozen_layernorm_ffn, frozen_arguments(source))


def batch_norm_arguments(source: Source) -> Arguments:
    dtype, C = source.one_of(DTYPES), source.size(33)
    shape = (source.one_of([2, 5]), C, *(source.size(9) for _ in range(source.below(3))))

    def channels(make: Callable[..., Tensor]) -> Tensor:
        return make(C)

    training = source.chance(0.5)
    running = not training or source.chance(0.5)
    return {
        "x": source.laid(source.normal(*shape, dtype=dtype)),
        "running_mean": channels(source.normal) if running else None,
        "running_var": channels(source.positive) if running else None,
        "weight": source.maybe(lambda: channels(source.normal)),
        "bias": source.maybe(lambda: channels(source.normal)),
        "training": training,
        "residual": source.maybe(lambda: source.laid(source.normal(*shape, dtype=dtype))),
        "activation": source.one_of([None, "relu"]),
    }


def batch_norm(source: Source) -> Call:
    arguments = batch_norm_arguments(source)
    return _call(source, bigkern.batch_norm, arguments, written=frozenset({"running_mean", "running_var"}))


# ---- recurrent layers ------------------------------------------------------------------------------


def recurrent_arguments(source: Source) -> Arguments:
    mode = source.one_of(["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
    dtype, D, B = source.one_of(DTYPES), source.one_of([1, 2]), source.one_of([1, 2, 5])
    I, H, T = source.size(48), source.size(48), source.one_of([1, 2, 5, 9])
    G, biases = {"LSTM": 4, "GRU": 3}.get(mode, 1), source.chance(0.7)
    shapes = [(G * H, I), (G * H, H)] + [(G * H,), (G * H,)] * biases
    sizes = None
    rows: tuple[int, ...] = (T, B)
    if source.chance(0.4):
        sizes = torch.tensor(sorted((1 + source.below(B) for _ in range(T)), reverse=True))
        B, rows = int(sizes[0]), (int(sizes.sum()),)

    def state() -> Tensor:
        return source.laid(source.normal(D, B, H, dtype=dtype))

    return {
        "x": source.laid(source.normal(*rows, I, dtype=dtype)),
        "hx": source.maybe(lambda: (state(), state()) if mode == "LSTM" else state()),
        "weights": [source.normal(*shape, dtype=dtype, scale=0.3) for _ in range(D) for shape in shapes],
        "mode": mode,
        "batch_sizes": sizes,
        "zoneout": source.maybe(lambda: source.mask(*rows, D * H).to(dtype), 0.2),
    }


def recurrent(source: Source) -> Call:
    arguments = recurrent_arguments(source)
    smooth = arguments["mode"] != "RNN_RELU"
    return _call(source, bigkern.recurrent, arguments, gradients=smooth and source.chance(0.5))


# ---- optimizers ------------------------------------------------------------------------------------


def adam_arguments(source: Source) -> Arguments:
    """Without masters, 8-bit moments and random rounding, whose results are not continuous."""
    dtype = source.one_of(DTYPES)
    shapes = [source.one_of([(1,), (), (7, 5), (33, 17), (4097,), (0,)]) for _ in range(1 + source.below(4))]
    layouts = [source.chance(0.2) for _ in shapes]
    amsgrad = source.chance(0.3)

    def each(make: Callable[..., Tensor], like: torch.dtype) -> list[Tensor]:
        made = [make(*shape, dtype=like) for shape in shapes]
        return [
            x.t().contiguous().t() if turned and x.dim() == 2 else x
            for x, turned in zip(made, layouts, strict=True)
        ]

    arguments: Arguments = {
        "params": each(source.normal, dtype),
        "grads": each(source.normal, dtype),
        "exp_avgs": each(source.normal, dtype),
        "exp_avg_sqs": each(source.positive, dtype),
        "max_exp_avg_sqs": each(source.positive, dtype) if amsgrad else [],
        "state_steps": [torch.tensor(float(source.below(5))) for _ in shapes],
        "lr": source.one_of([1e-3, 0.1]),
        "weight_decay": source.one_of([0.0, 0.1]),
        "decoupled": source.chance(0.5),
        "amsgrad": amsgrad,
        "maximize": source.chance(0.2),
        "zero_grads": source.chance(0.2),
        "grad_scale": source.maybe(lambda: torch.tensor([4.0]), 0.2),
        "found_inf": source.maybe(lambda: torch.tensor([float(source.below(2))]), 0.2),
    }
    if source.chance(0.2):
        arguments |= {"max_norm": 1.0, "grad_norm": torch.tensor(3.0)}
    return arguments


ADAM_LISTS = frozenset({"params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"})


def adam_step(source: Source) -> Call:
    return _call(source, adam, adam_arguments(source), written=ADAM_LISTS)


def norm_of_gradients(source: Source) -> Call:
    return _call(source, grad_norm, {"grads": adam_arguments(source)["grads"]})


def _steps(cls: type[torch.optim.Optimizer], params: list[Tensor], grads: list[list[Tensor]], **options: Any):
    owned = [nn.Parameter(p.clone()) for p in params]
    optimizer = cls(owned, **options)
    for step in grads:
        for p, g in zip(owned, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in owned]


def optimizer(source: Source) -> Call:
    arguments = adam_arguments(source)
    params = arguments["params"]
    of = {
        "params": params,
        "grads": [
            [source.normal(*p.shape, dtype=p.dtype) for p in params] for _ in range(1 + source.below(3))
        ],
        "lr": 1e-2,
        "weight_decay": source.one_of([0.0, 0.1]),
        "amsgrad": arguments["amsgrad"],
        "maximize": arguments["maximize"],
    }
    name = source.one_of(["Adam", "AdamW"])
    stock = partial(_steps, getattr(torch.optim, name))
    ours = partial(_steps, getattr(bigkern.optim, name))
    return Call(f"bigkern.optim.{name}", ours, of, exact=stock, plain=stock)


# ---- whole models ----------------------------------------------------------------------------------


def _model(source: Source) -> tuple[nn.Module, Tensor]:
    D = source.one_of([16, 32, 48])
    x = source.normal(source.one_of([1, 3]), source.size(33), D)
    kind = source.one_of(["encoder", "mlp", "lstm", "gru", "cnn"])
    if kind == "encoder":
        options = {"norm_first": source.chance(0.5), "activation": source.one_of(["relu", "gelu"])}
        return nn.TransformerEncoderLayer(D, 4, 2 * D, 0.0, batch_first=True, **options), x
    if kind == "mlp":
        return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)), x
    if kind == "cnn":
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
        return nn.Sequential(*layers), source.normal(2, 3, 8 + source.size(9), 12)
    cls = nn.LSTM if kind == "lstm" else nn.GRU
    return cls(D, source.size(33), 1 + source.below(2), batch_first=True, bidirectional=source.chance(0.5)), x


def _run(model: nn.Module, x: Tensor, patched: bool) -> Any:
    model = copy.deepcopy(model).to(x.dtype)
    if patched:
        bigkern.patch(model)
    return model(x)


def patched_model(source: Source) -> Call:
    model, x = _model(source)
    model.train(source.chance(0.5))
    stock = partial(_run, model, patched=False)
    return Call("bigkern.patch", partial(_run, model, patched=True), {"x": x}, exact=stock, plain=stock)


FUNCTIONS: list[Callable[[Source], Call]] = [
    attention, varlen_attention, decode_attention, merge_attention, sdpa, layer_norm, rms_norm, linear,
    layernorm_ffn, frozen_layernorm_ffn, batch_norm, recurrent, adam_step, norm_of_gradients,
]  # fmt: skip
DRAW = [*FUNCTIONS, optimizer, patched_model]
