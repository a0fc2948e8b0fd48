"""Attention's problems, dense and packed, with every feature that a kernel can get wrong.

Stock is torch's own scaled_dot_product_attention where it can say the feature, with what it needs for that
(a mask for a window) made beforehand. Where it cannot, stock is the reference in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops import attention as op
from bigkern.ops.attention import reference
from bigkern.ops.attention.call import bind
from bigkern.ops.attention.varlen import varlen_attention

Causal = Literal[False, True, "bottom_right"]
Bias = Literal["", "fixed", "learned"]


def attention(
    B: int, H: int, S: int, D: int, causal: Causal = False, *, kv_heads: int | None = None,
    keys: int | None = None, masked: bool = False, bias: Bias = "", window: tuple[int, int] | None = None,
    softcap: float = 0.0, alibi: bool = False, sinks: bool = False, dropout: float = 0.0, lse: bool = False,
) -> Problem:  # fmt: skip
    """``keys`` is the length of k and v where it is not S; ``masked`` hides every fifth key or so.

    A bias is one for all batches, ``[H, S, keys]``; a learned one has a gradient, and so has ``lse``.
    """
    kv, Sk = kv_heads or H, keys or S
    # Stored as [B, S, H, D], as projections leave them.
    shapes: dict[str, tuple[int, ...]] = {"q": (B, S, H, D), "k": (B, Sk, kv, D), "v": (B, Sk, kv, D)}
    shapes |= {"fixed_bias" if bias == "fixed" else "bias": (H, S, Sk)} if bias else {}
    shapes |= {"sinks": (H,)} if sinks else {}
    given = keywords(causal, dropout, window=window, softcap=softcap, return_lse=lse)
    stock_can = not (softcap or alibi or sinks or dropout or lse)
    dense_mask = masked or window is not None or causal == "bottom_right" or (bool(bias) and causal)

    def constants(device: torch.device) -> Inputs:
        made: Inputs = {}
        if masked:
            i, j = torch.arange(S, device=device).unsqueeze(1), torch.arange(Sk, device=device)
            made["mask"] = (3 * i + 7 * j) % 5 != 1
        if stock_can and dense_mask:
            made["seen"] = seen(S, Sk, causal, window, device) & made.get("mask", torch.tensor(True))
        return made | (slopes(H, device) if alibi else {})

    def call(inputs: Inputs) -> Call:
        tensors = present(inputs, "mask", "bias", "alibi_slopes", "sinks")
        tensors |= {"bias": inputs["fixed_bias"]} if bias == "fixed" else {}
        return heads_first(inputs), tensors | given

    def sdpa(inputs: Inputs) -> Tensor:
        q, k, v = heads_first(inputs)
        allowed = inputs.get("seen")
        if bias:
            additive = inputs["fixed_bias" if bias == "fixed" else "bias"].unsqueeze(0)
            allowed = additive if allowed is None else additive.masked_fill(~allowed, float("-inf"))
        corner = causal is True and allowed is None
        return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=corner, enable_gqa=kv != H)

    words = [f"{B}x{H}x{S}x{D}"]
    words += [f"{Sk} keys"] if keys else []
    words += [f"{kv} kv heads"] if kv != H else []
    words += causal_words(causal) + ["mask"] * masked
    words += {"": [], "fixed": ["bias"], "learned": ["bias with gradient"]}[bias]
    words += feature_words(window, softcap, alibi, sinks, dropout) + ["lse"] * lse
    return Problem(
        "attention",
        ", ".join(words),
        shapes,
        op.attention,
        call,
        sdpa if stock_can else by_reference(call),
        constants,
        outputs=("output", "lse") if lse else ("output",),
        flops=4 * B * H * D * pairs(S, Sk, causal, window),
        elements=2 * B * D * (S * H + Sk * kv),
        backward_factor=2.5,
    )


def varlen(
    lengths: Sequence[int], H: int, D: int, causal: Causal = False, *, kv_heads: int | None = None,
    keys: Sequence[int] | None = None, label: str = "", window: tuple[int, int] | None = None,
    dropout: float = 0.0,
) -> Problem:  # fmt: skip
    """Packed sequences of so many queries, and of so many ``keys`` each where that is not the same."""
    kv, of_keys = kv_heads or H, list(keys or lengths)
    rows, columns = sum(lengths), sum(of_keys)
    shapes: dict[str, tuple[int, ...]] = {"q": (rows, H, D), "k": (columns, kv, D), "v": (columns, kv, D)}
    given = keywords(causal, dropout, window=window)

    def constants(device: torch.device) -> Inputs:
        def ends(each: Sequence[int]) -> Tensor:
            return torch.tensor([0, *each]).cumsum(0).to(device, torch.int32)

        return {"q_ends": ends(lengths), "k_ends": ends(of_keys)}

    def call(inputs: Inputs) -> Call:
        tensors = tuple(inputs[name] for name in ("q", "k", "v", "q_ends", "k_ends"))
        return (*tensors, max(lengths), max(of_keys)), given

    def loop(inputs: Inputs) -> Tensor:
        """One call for each sequence."""
        outputs = []
        for parts in zip(*(inputs[name].split(list(lengths)) for name in "qkv"), strict=True):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal), enable_gqa=kv != H)
            outputs.append(o.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    def specified(inputs: Inputs) -> Tensor:
        return by_reference(call)(inputs).squeeze(0).transpose(0, 1)  # type: ignore[no-any-return]

    words = [label or f"varlen {'+'.join(str(n) for n in lengths)}, {H}x{D}"]
    words += [f"{'+'.join(str(n) for n in keys)} keys"] if keys else []
    words += [f"{kv} kv heads"] if kv != H else []
    words += causal_words(causal) + feature_words(window, dropout=dropout)
    return Problem(
        "attention",
        ", ".join(words),
        shapes,
        varlen_attention,
        call,
        specified if keys or window or dropout else loop,
        constants,
        flops=4 * H * D * sum(pairs(n, m, causal, window) for n, m in zip(lengths, of_keys, strict=True)),
        elements=2 * D * (rows * H + columns * kv),
        backward_factor=2.5,
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


def by_reference(call: Callable[[Inputs], Call]) -> Callable[[Inputs], Any]:
    """The specification of a call, in the dtype of its inputs."""

    def stock(inputs: Inputs) -> Any:
        arguments, options = call(inputs)
        o, lse = reference.attention(bind(*arguments, **options))
        return (o, lse) if options.get("return_lse") else o

    return stock


def seen(S: int, Sk: int, causal: Causal, window: tuple[int, int] | None, device: torch.device) -> Tensor:
    """[S, Sk] bool: what causal rule and window let a query see."""
    left, right = window or (S + Sk, S + Sk)
    place = torch.arange(S, device=device).unsqueeze(1) + (0 if causal is True else Sk - S)
    j = torch.arange(Sk, device=device)
    return (j >= place - left) & (j <= place + (0 if causal else right))


def slopes(H: int, device: torch.device) -> Inputs:
    """ALiBi's: a geometric sequence that ends at 2^-8."""
    return {"alibi_slopes": torch.tensor([2.0 ** (-8 * (h + 1) / H) for h in range(H)], device=device)}


def pairs(S: int, Sk: int, causal: Causal, window: tuple[int, int] | None) -> float:
    """How many scores count. Published numbers take half of them under a causal rule, and so do we."""
    if window is None:
        return S * Sk * (0.5 if causal else 1.0)
    return float(seen(S, Sk, causal, window, torch.device("cpu")).sum())


def causal_words(causal: Causal) -> list[str]:
    return ["causal" if causal is True else str(causal)] if causal else []


def feature_words(
    window: tuple[int, int] | None, softcap: float = 0.0, alibi: bool = False, sinks: bool = False,
    dropout: float = 0.0,
) -> list[str]:  # fmt: skip
    words = [f"window {window[0]},{window[1]}"] if window else []
    words += [f"softcap {softcap:g}"] if softcap else []
    words += ["ALiBi"] * alibi + ["sinks"] * sinks
    return words + ([f"dropout {dropout:g}"] if dropout else [])


# ---- feature by feature ------------------------------------------------------------------------------


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
        attention(1, 4, 300, 64, keys=77, masked=True),
        attention(2, 2, 130, 64, True, bias="fixed"),
        attention(4, 8, 1024, 128, True),
        *(attention(1, 2, 321, 64, window=window) for window in ((0, 0), (17, 40), (200, 0))),
        attention(1, 4, 190, 128, "bottom_right", kv_heads=2, keys=401, window=(129, 0)),
        *(attention(2, 4, 193, D, "bottom_right", **every) for D in (64, 128, 256)),
        attention(2, 4, 259, 64, masked=True, bias="learned", dropout=0.3),
        varlen((129, 0, 1, 300, 64), 4, 128, True, kv_heads=2),
        varlen((65, 7, 0, 128), 4, 64, "bottom_right", keys=(200, 0, 33, 128)),
        varlen((65, 200), 2, 256, True, window=(33, 0), dropout=0.1),
    ]


def typical() -> Problem:
    return attention(4, 12, 512, 64, causal=True)
