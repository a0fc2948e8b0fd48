"""Attention's problems, dense and packed, with every feature that a kernel can get wrong.

Stock is torch's own scaled_dot_product_attention where it can say the feature, with what it needs for that
(a mask for a window) made beforehand. Where it cannot, stock is the formula as one writes it in torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem, by_formulas
from bigkern.ops import attention as op
from bigkern.ops.attention import reference
from bigkern.ops.attention.backends import ATTENTION
from bigkern.ops.attention.call import Attention, bind
from bigkern.ops.attention.varlen import varlen_attention

Causal = Literal[False, True, "bottom_right"]
Bias = Literal["", "fixed", "learned"]
Window = tuple[int | None, int | None]
View = Callable[[Tensor], Tensor]


def attention(
    B: int, H: int, S: int, D: int, causal: Causal = False, *, kv_heads: int | None = None,
    keys: int | None = None, value_dim: int | None = None, masked: str = "", bias: Bias = "",
    over: str = "heads", window: Window | None = None, softcap: float = 0.0, alibi: str | bool = False,
    sinks: bool = False, dropout: float = 0.0, scale: float | None = None, lse: str | bool = False,
    layout: str = "bshd",
) -> Problem:  # fmt: skip
    """``keys`` is the length of k and v where it is not S, ``value_dim`` the width of v where it is not D.

    ``masked`` hides a fifth of the scores ("full"), of the keys ("keys"), or some rows altogether ("dead").
    A bias is ``over`` what its dimensions say: "full", "heads" (one for all batches), "keys" (one row for all
    queries) or "rows" (one column for all keys); a learned one has a gradient. ``alibi`` may differ by
    "batches". ``lse`` is an output, with a gradient unless it is asked for by "value".
    """
    kv, Sk, Dv = kv_heads or H, keys or S, value_dim or D
    sizes = {"q": (S, H, D), "k": (Sk, kv, D), "v": (Sk, kv, Dv)}
    shapes, views = laid_out(B, sizes, layout)
    masks = {"full": (B, H, S, Sk), "dead": (B, 1, S, Sk), "keys": (B, 1, 1, Sk)}
    biases = {"full": (B, H, S, Sk), "heads": (H, S, Sk), "keys": (B, 1, 1, Sk), "rows": (H, S, 1)}
    shapes |= {"fixed_bias" if bias == "fixed" else "bias": biases[over]} if bias else {}
    shapes |= {"sinks": (H,)} if sinks else {}
    given = keywords(causal, dropout, window=window, softcap=softcap, return_lse=bool(lse), scale=scale)
    stock_can = not (softcap or alibi or sinks or dropout or lse is True)
    dense_mask = masked or window is not None or causal == "bottom_right" or (bool(bias) and causal)

    def constants(device: torch.device) -> Inputs:
        made: Inputs = {}
        if masked:
            draw = torch.Generator().manual_seed(S + Sk)
            mask = torch.rand(masks[masked], generator=draw) < 0.8
            if masked == "dead":
                mask[:, :, torch.rand(S, generator=draw) < 0.3] = False
                mask[:, :, 0] = False
            made["mask"] = mask.to(device)
        if stock_can and dense_mask:
            sees = seen(S, Sk, causal, window, device)
            sees = sees & made["mask"] if masked else sees
            dead = ~sees.any(-1, keepdim=True)
            made["seen"] = sees | dead
            made |= {"dead": dead} if bool(dead.any()) else {}
        return made | (slopes(H, device, B if alibi == "batches" else 0) if alibi else {})

    def call(inputs: Inputs) -> Call:
        tensors = present(inputs, "mask", "bias", "alibi_slopes", "sinks")
        tensors |= {"bias": inputs["fixed_bias"]} if bias == "fixed" else {}
        return heads_first(inputs), tensors | given

    def sdpa(inputs: Inputs) -> Any:
        q, k, v = heads_first(inputs)
        allowed = inputs.get("seen")
        if bias:
            additive = inputs["fixed_bias" if bias == "fixed" else "bias"]
            additive = additive.expand(*(additive.shape[:-2] if additive.dim() > 3 else (1, H)), S, Sk)
            allowed = additive if allowed is None else additive.masked_fill(~allowed, float("-inf"))
        corner = causal is True and allowed is None
        o = F.scaled_dot_product_attention(
            q, k, v, allowed, is_causal=corner, scale=scale, enable_gqa=kv != H
        )
        o = o.masked_fill(inputs["dead"], 0.0) if "dead" in inputs else o
        return (o, bound(call, inputs, reference.attention).lse) if lse else o

    words = [f"{B}x{H}x{S}x{D}"]
    words += [f"{Sk} keys"] if keys else []
    words += [f"{kv} kv heads"] if kv != H else []
    words += [f"{Dv} columns of v"] if Dv != D else []
    words += causal_words(causal) + ([f"mask {masked}"] if masked else [])
    words += {"": [], "fixed": ["bias"], "learned": ["bias with gradient"]}[bias]
    words += ([f"over {over}"] if over != "heads" else []) + ([layout] if layout != "bshd" else [])
    words += feature_words(window, softcap, alibi, sinks, dropout, scale) + ["lse"] * bool(lse)
    features = {
        "boolean mask": masked,
        "additive bias": bias,
        "bias gradient, summed over broadcast dimensions": bias == "learned",
        "Sq != Sk": Sk != S,
        **features_of(causal, kv != H, D, Dv, window, softcap, alibi, sinks, dropout, lse, layout),
    }
    return Problem(
        "attention",
        ", ".join(words),
        shapes,
        partial(returned, op.attention, lse, layout) if lse else op.attention,
        call,
        partial(returned, sdpa if stock_can else partial(bound, call, function=composed), lse, layout),
        constants,
        partial(returned, partial(bound, call, function=partial(by_formulas, ATTENTION)), lse, layout),
        views=views,
        outputs=("output", "lse") if lse else ("output",),
        flops=4 * B * H * D * pairs(S, Sk, causal, window),
        elements=2 * B * D * (S * H + Sk * kv),
        backward_factor=2.5,
        features=tuple(name for name, used in features.items() if used),
    )


def varlen(
    lengths: Sequence[int], H: int, D: int, causal: Causal = False, *, kv_heads: int | None = None,
    keys: Sequence[int] | None = None, value_dim: int | None = None, label: str = "",
    window: Window | None = None, softcap: float = 0.0, alibi: str | bool = False, sinks: bool = False,
    dropout: float = 0.0, scale: float | None = None, lse: str | bool = False, layout: str = "bshd",
) -> Problem:  # fmt: skip
    """Packed sequences of so many queries, and of so many ``keys`` each where that is not the same."""
    kv, of_keys, Dv = kv_heads or H, list(keys or lengths), value_dim or D
    rows, columns = sum(lengths), sum(of_keys)
    shapes, views = laid_out(1, {"q": (rows, H, D), "k": (columns, kv, D), "v": (columns, kv, Dv)}, layout)
    shapes |= {"sinks": (H,)} if sinks else {}
    given = keywords(causal, dropout, window=window, softcap=softcap, return_lse=bool(lse), scale=scale)
    stock_can = not (keys or window or softcap or alibi or sinks or dropout or lse)

    def constants(device: torch.device) -> Inputs:
        def ends(each: Sequence[int]) -> Tensor:
            return torch.tensor([0, *each]).cumsum(0).to(device, torch.int32)

        made = {"q_ends": ends(lengths), "k_ends": ends(of_keys)}
        return made | (slopes(H, device, len(lengths) if alibi == "batches" else 0) if alibi else {})

    def call(inputs: Inputs) -> Call:
        q, k, v = (inputs[name].squeeze(0) for name in "qkv")
        tensors = (q, k, v, inputs["q_ends"], inputs["k_ends"], max(lengths), max(of_keys))
        return tensors, present(inputs, "alibi_slopes", "sinks") | given

    def loop(inputs: Inputs) -> Tensor:
        """One call for each sequence."""
        outputs = []
        for parts in zip(*(inputs[name].split(list(lengths), 1) for name in "qkv"), strict=True):
            q, k, v = (x.transpose(1, 2) for x in parts)
            o = F.scaled_dot_product_attention(
                q, k, v, is_causal=bool(causal), scale=scale, enable_gqa=kv != H
            )
            outputs.append(o.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    def packed(function: Callable[[Attention], Any], inputs: Inputs) -> Any:
        o, of_rows = bound(call, inputs, function)
        o = o.squeeze(0).transpose(0, 1)
        return (o, of_rows.squeeze(0)) if lse else o

    words = [label or f"varlen {'+'.join(str(n) for n in lengths)}, {H}x{D}"]
    words += [f"{'+'.join(str(n) for n in keys)} keys"] if keys else []
    words += [f"{kv} kv heads"] if kv != H else []
    words += [f"{Dv} columns of v"] if Dv != D else []
    words += causal_words(causal) + feature_words(window, softcap, alibi, sinks, dropout, scale)
    words += ([layout] if layout != "bshd" else []) + ["lse"] * bool(lse)
    features = {
        "packed sequences": True,
        "empty sequences": 0 in lengths or 0 in of_keys,
        "Sq != Sk": rows != columns,
        **features_of(causal, kv != H, D, Dv, window, softcap, alibi, sinks, dropout, lse, layout),
    }
    return Problem(
        "attention",
        ", ".join(words),
        shapes,
        partial(returned, varlen_attention, lse, layout) if lse else varlen_attention,
        call,
        partial(returned, loop if stock_can else partial(packed, composed), lse, layout),
        constants,
        partial(returned, partial(packed, partial(by_formulas, ATTENTION)), lse, layout),
        views=views,
        outputs=("output", "lse") if lse else ("output",),
        flops=4 * H * D * sum(pairs(n, m, causal, window) for n, m in zip(lengths, of_keys, strict=True)),
        elements=2 * D * (rows * H + columns * kv),
        backward_factor=2.5,
        features=tuple(name for name, used in features.items() if used),
    )


# ---- what they share -------------------------------------------------------------------------------


def keywords(causal: Causal, dropout: float, **given: Any) -> dict[str, Any]:
    """Keyword arguments of a call, without those that ask for nothing."""
    given |= {"dropout_p": dropout, "seed": 5, "offset": 3} if dropout else {}
    return {"causal": causal} | {name: value for name, value in given.items() if value}


def present(inputs: Inputs, *names: str) -> Inputs:
    """Those of these inputs that there are."""
    return {name: inputs[name] for name in names if name in inputs}


def heads_first(inputs: Inputs) -> tuple[Tensor, ...]:
    """q, k and v as views ``[B, H, S, D]``."""
    return tuple(inputs[name].transpose(1, 2) for name in "qkv")


def laid_out(
    B: int, sizes: dict[str, tuple[int, int, int]], layout: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, View]]:
    """Shapes in memory, and views ``[B, S, H, D]`` of them.

    Stored as [B, S, H, D], as projections leave them ("bshd"), as [B, H, S, D] ("bhsd"), as every second
    number of that ("sliced"), or, k and v, as one for all batches and heads ("expanded").
    """
    shapes: dict[str, tuple[int, ...]] = {}
    views: dict[str, View] = {}
    for name, (S, H, D) in sizes.items():
        shapes[name] = (B, S, H, D)
        if layout == "bhsd":
            shapes[name], views[name] = (B, H, S, D), lambda t: t.transpose(1, 2)
        if layout == "sliced":
            shapes[name], views[name] = (B, H, S, 2 * D), lambda t: t[..., ::2].transpose(1, 2)
        if layout == "expanded" and name != "q":
            shapes[name], views[name] = (1, S, 1, D), partial(Tensor.expand, size=(B, -1, H, -1))
    return shapes, views


def returned(
    function: Callable[..., Any], lse: str | bool, layout: str, *arguments: Any, **options: Any
) -> Any:
    """What a function returns; the gradient of a "sliced" output has steps of two."""
    found = function(*arguments, **options)
    o, of_rows = found if isinstance(found, tuple) else (found, None)
    if layout == "sliced":
        o = torch.stack([o, torch.zeros_like(o)], -1)[..., 0]
    if of_rows is None or not lse:
        return o
    return o, of_rows.detach() if lse == "value" else of_rows


def bound(call: Callable[[Inputs], Call], inputs: Inputs, function: Callable[[Attention], Any]) -> Any:
    """A function of the op's call."""
    arguments, options = call(inputs)
    return function(bind(*arguments, **options))


def composed(call: Attention) -> tuple[Tensor, Tensor]:
    """``(o, lse)`` as one would write it in torch in the call's dtype, sequence by sequence."""
    if call.cu_seqlens_q is None:
        return _composed(call, 0)
    parts = [_composed(own, b) for b, (_, _, own) in enumerate(reference.sequences(call))]
    o, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return o, lse


def _composed(call: Attention, first: int) -> tuple[Tensor, Tensor]:
    q, group = call.q, call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (call.k, call.v))
    x = q @ k.transpose(-1, -2) * call.scale
    x = call.softcap * torch.tanh(x / call.softcap) if call.softcap else x
    s = reference.restricted(x, call)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if call.sinks is not None:
        s = torch.cat([s, call.sinks.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    lse = torch.logsumexp(s.detach(), -1) if s.shape[-1] else s.new_full(s.shape[:-1], float("-inf"))
    dead = torch.isneginf(lse).unsqueeze(-1)
    s = s.masked_fill(dead, 0.0)
    p = torch.softmax(s, -1)[..., : k.shape[2]].masked_fill(dead, 0.0)
    if s.requires_grad and s.shape[-1]:
        lse = torch.where(dead.squeeze(-1), lse, torch.logsumexp(s, -1))
    return reference.drop(p, call, first).to(q.dtype) @ v, lse


def seen(S: int, Sk: int, causal: Causal, window: Window | None, device: torch.device) -> Tensor:
    """[S, Sk] bool: what causal rule and window let a query see."""
    left, right = (S + Sk if side is None else side for side in window or (None, None))
    place = torch.arange(S, device=device).unsqueeze(1) + (0 if causal is True else Sk - S)
    j = torch.arange(Sk, device=device)
    return (j >= place - left) & (j <= place + (0 if causal else right))


def slopes(H: int, device: torch.device, batches: int = 0) -> Inputs:
    """ALiBi's: a geometric sequence that ends at 2^-8; of each batch another multiple of it."""
    found = torch.tensor([2.0 ** (-8 * (h + 1) / H) for h in range(H)], device=device)
    return {"alibi_slopes": torch.arange(1, batches + 1, device=device).outer(found) if batches else found}


def pairs(S: int, Sk: int, causal: Causal, window: Window | None) -> float:
    """How many scores count. Published numbers take half of them under a causal rule, and so do we."""
    if window is None:
        return S * Sk * (0.5 if causal else 1.0)
    return float(seen(S, Sk, causal, window, torch.device("cpu")).sum())


def causal_words(causal: Causal) -> list[str]:
    return ["causal" if causal is True else str(causal)] if causal else []


def feature_words(
    window: Window | None, softcap: float = 0.0, alibi: str | bool = False, sinks: bool = False,
    dropout: float = 0.0, scale: float | None = None,
) -> list[str]:  # fmt: skip
    words = [f"window {window[0]},{window[1]}"] if window else []
    words += [f"softcap {softcap:g}"] if softcap else []
    words += ["ALiBi by batches" if alibi == "batches" else "ALiBi"] * bool(alibi) + ["sinks"] * sinks
    words += [f"scale {scale:g}"] if scale is not None else []
    return words + ([f"dropout {dropout:g}"] if dropout else [])


def features_of(
    causal: Causal, grouped: bool, D: int, Dv: int, window: Window | None, softcap: float,
    alibi: str | bool, sinks: bool, dropout: float, lse: str | bool, layout: str,
) -> dict[str, object]:  # fmt: skip
    """What a call uses, in the words of the feature table."""
    return {
        "causal, from the top left": causal is True,
        "causal, from the bottom right": causal == "bottom_right",
        "ALiBi": alibi,
        "sliding window": window,
        "softcap": softcap,
        "sinks, with gradient": sinks,
        "dropout": dropout,
        "gradient of the log-sum-exp": lse is True,
        "grouped and multi-query heads": grouped,
        "Dv != D": Dv != D,
        "head dims that are no multiple of 8": D % 8,
        "head dims above 128": D > 128,
        "any strides": layout in ("sliced", "expanded"),
    }


# ---- feature by feature ------------------------------------------------------------------------------


def form(B: int = 1, H: int = 2, S: int = 33, keys: int | None = 33, D: int = 32, **options: Any) -> Problem:
    """A small call; its log-sum-exp is judged, too."""
    return attention(B, H, S, D, keys=keys, **{"lse": "value", "kv_heads": 2, **options})


def forms() -> list[Problem]:
    packed = partial(varlen, H=2, D=32, kv_heads=2, lse="value")
    every: dict[str, Any] = {"softcap": 1.5, "alibi": "batches", "sinks": True, "dropout": 0.2, "lse": True}
    large = [
        form(2, 3, 129, 129, 64, causal=True, kv_heads=3),
        form(S=1023, keys=1023, D=64),
        form(S=1023, keys=1023, D=64, causal=True),
        form(S=63, keys=1023, D=128, causal="bottom_right"),
        form(H=4, S=129, keys=511, D=40, value_dim=72, kv_heads=1, masked="dead", bias="fixed"),
        form(2, 8, 1, 1023, 64, masked="keys"),
        form(S=257, keys=129, D=256, value_dim=128, causal="bottom_right", layout="sliced"),
        form(8, 4, 128, 128, causal=True, kv_heads=4),
    ]
    return [
        *(replace(problem, emulated=False) for problem in large),
        form(S=64, keys=64, D=64),
        form(S=7, keys=63, D=40),
        form(S=1, keys=70),
        form(S=5, keys=1, D=1),
        form(S=65, keys=70, causal=True),
        form(S=70, causal=True),
        form(keys=70, causal="bottom_right"),
        form(S=70, causal="bottom_right"),  # the first rows see nothing
        form(H=4, S=20, keys=37, causal="bottom_right", layout="bhsd"),
        form(H=6, S=3, keys=50, kv_heads=1, masked="full"),
        form(masked="full"),
        form(2, masked="keys", bias="fixed", over="keys"),
        form(masked="dead", causal=True),
        form(2, bias="fixed"),
        form(S=20, keys=40, bias="fixed", over="full", masked="full", causal="bottom_right"),
        form(scale=0.5, D=24, value_dim=56),
        form(S=17, keys=20, D=128, scale=-0.1),
        form(S=9, keys=40, D=256),
        form(2, layout="sliced"),
        form(2, 4, layout="expanded"),
        # one feature beyond dot products at a time ...
        form(2, bias="learned"),  # summed over batches
        form(H=4, bias="learned", over="full", causal=True, masked="dead"),
        form(2, S=70, keys=40, bias="learned", over="keys"),
        form(S=20, keys=70, bias="learned", over="rows", sinks=True),  # without a sink its gradient is 0
        form(window=(5, 3)),
        form(S=40, keys=70, window=(7, None), causal="bottom_right"),
        form(S=70, keys=70, window=(0, 0)),
        form(keys=20, window=(None, 4)),  # the first rows see nothing
        form(S=70, keys=20, window=(2, 0), causal=True),  # and here the last ones
        form(softcap=0.7),
        form(S=70, keys=70, softcap=2.0, causal=True, scale=1.0),
        form(alibi="heads", causal=True),
        form(2, S=20, keys=70, alibi="batches"),
        form(H=4, S=40, keys=20, sinks=True, causal="bottom_right"),  # rows with nothing but a sink
        form(2, 8, sinks=True, masked="dead"),
        form(dropout=0.3),
        form(2, 4, S=20, keys=70, dropout=0.8, causal="bottom_right"),
        form(keys=20, lse=True, causal=True),
        packed((5, 0, 40, 1)),
        packed((5, 0, 9, 33), H=4, keys=(9, 7, 0, 70), causal="bottom_right"),
        packed((70, 3), keys=(30, 3), causal=True, window=(9, 0), layout="bhsd"),
        # ... and all together
        form(2, 4, 40, 50, bias="learned", masked="full", window=(20, 10), **every),
        varlen((20, 0, 33), 4, 32, "bottom_right", kv_heads=2, keys=(30, 4, 33), window=(12, None), **every),
    ]


def drawn(draw: random.Random, largest: int) -> Problem:
    size = lambda: draw.choice([1, draw.randint(1, 16), draw.randint(1, largest)])  # noqa: E731
    side = lambda: draw.choice([None, 0, draw.randint(1, largest)])  # noqa: E731
    kv_heads, D = draw.choice([1, 2, 3]), draw.choice([1, 8, 40, 64, draw.randint(1, 96), 128])
    causal: Causal = draw.choice([False, True, "bottom_right"])
    options: dict[str, Any] = {
        "kv_heads": kv_heads,
        "value_dim": draw.choice([D, draw.randint(1, 96)]),
        "window": draw.choice([None, None, (side(), side())]),
        "softcap": draw.choice([0.0, 0.0, 0.0, 1.5]),
        "alibi": draw.choice(["", "", "", "heads", "batches"]),
        "sinks": draw.random() < 0.2,
        "dropout": draw.choice([0.0, 0.0, 0.0, 0.1, 0.7]),
        "lse": draw.choice(["value", "value", "value", "value", True]),
        "scale": draw.choice([None, None, 0.3, -0.2]),
        "layout": draw.choice(["bhsd", "bshd", "sliced", "expanded"]),
    }
    H = kv_heads * draw.choice([1, 1, 2, 4])
    if draw.random() < 0.2:
        pairs = [(draw.choice([0, size()]), draw.choice([0, size()])) for _ in range(draw.randint(1, 4))]
        lengths, keys = zip(*pairs, strict=True)
        return varlen(lengths, H, D, causal, keys=keys, **options)
    over = draw.choice(["", "", "full", "keys", "heads", "rows"])
    learned = over != "rows" and draw.random() < 0.5
    bias: Bias = "" if not over else "learned" if learned else "fixed"
    masked = draw.choice(["", "", "full", "keys", "dead"])
    beside: dict[str, Any] = {"keys": size(), "masked": masked, "bias": bias, "over": over or "heads"}
    return attention(draw.choice([1, 2]), H, size(), D, causal, **beside, **options)


def small() -> list[Problem]:
    """Odd sizes, and every feature once."""
    return [
        attention(2, 4, 129, 64, causal=True),
        attention(1, 4, 63, 32, causal=False, kv_heads=2),
        attention(1, 2, 257, 128, causal=False),
        attention(2, 4, 33, 64, "bottom_right", kv_heads=2, keys=97),
        attention(1, 2, 97, 64, True, window=(31, 0)),
        attention(1, 2, 65, 64, softcap=2.0),
        attention(1, 4, 65, 64, True, alibi=True),
        attention(1, 4, 65, 64, True, sinks=True, kv_heads=2),
        attention(1, 2, 65, 64, dropout=0.2),
        attention(2, 2, 65, 64, True, bias="learned"),
        attention(1, 2, 65, 64, lse=True),
        varlen((33, 1, 65), 2, 64, True),
    ]


def thorough() -> list[Problem]:
    """Sizes that choose other code in a kernel, and the features together."""
    every: dict[str, Any] = {
        "kv_heads": 2, "keys": 231, "bias": "learned", "window": (99, 0), "softcap": 5.0, "alibi": True,
        "sinks": True, "dropout": 0.1, "lse": True,
    }  # fmt: skip
    return [
        *(
            attention(1, 2, 193, D, causal)
            for D in (16, 40, 64, 80, 96, 128, 160, 256)
            for causal in (False, True)
        ),
        *(attention(2, 4, S, 64, True, kv_heads=1) for S in (1, 7, 128, 1023)),
        attention(1, 4, 65, 128, "bottom_right", keys=511),
        attention(1, 4, 300, 64, keys=77, masked="full"),
        attention(2, 2, 130, 64, True, bias="fixed"),
        attention(4, 8, 1024, 128, True),
        *(attention(1, 2, 321, 64, window=window) for window in ((0, 0), (17, 40), (200, 0))),
        attention(1, 4, 190, 128, "bottom_right", kv_heads=2, keys=401, window=(129, 0)),
        *(attention(2, 4, 193, D, "bottom_right", **every) for D in (64, 128, 256)),
        attention(2, 4, 259, 64, masked="full", bias="learned", dropout=0.3),
        varlen((129, 0, 1, 300, 64), 4, 128, True, kv_heads=2),
        varlen((65, 7, 0, 128), 4, 64, "bottom_right", keys=(200, 0, 33, 128)),
        varlen((65, 200), 2, 256, True, window=(33, 0), dropout=0.1),
    ]


def grid() -> list[Problem]:
    sizes = ((1, 4, 4), (8, 8, 16), (4, 12, 64), (1, 8, 256), (4, 12, 256), (1, 8, 1024))
    return [
        *(attention(*size, 64, causal) for causal in (False, True) for size in sizes),
        *(attention(*size, 128, causal) for causal in (False, True) for size in sizes[2:4]),
        *(attention(*size, 64, masked="keys") for size in sizes[1:]),
        *(attention(*size, 64, bias="learned") for size in sizes[2:5]),
        *(attention(*size, 64, True, kv_heads=size[1] // 4) for size in sizes[1:]),
    ]


def large() -> list[Problem]:
    sizes = ((16, 16, 1024), (64, 16, 256), (4, 16, 4096))
    return [
        *(attention(*size, D, causal) for D in (64, 128) for causal in (False, True) for size in sizes),
        *(attention(*size, 128, True, kv_heads=size[1] // 4) for size in sizes),
        *(attention(*size, 64, masked="keys") for size in sizes[:2]),
    ]


def typical() -> Problem:
    return attention(4, 12, 512, 64, causal=True)
