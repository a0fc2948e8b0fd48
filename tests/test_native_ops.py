"""The compiled ops check for themselves: under torch.compile, and called by name, nobody else does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import BACKENDS
from torch import Tensor

import bigkern
from bigkern.core import info, library
from bigkern.optim import AdamW

pytestmark = pytest.mark.skipif(info.import_error is not None, reason="the extension is not built")

EMULATED = "simt" in BACKENDS
NAMESPACES = ["bigkern_native", *(["bigkern_simt"] if EMULATED else [])]


def op(namespace: str, name: str) -> Any:
    if namespace == "bigkern_simt":
        import simt_library

        simt_library.ops()
    return getattr(getattr(torch.ops, namespace), name)


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def freed(x: Tensor) -> Tensor:
    """x, whose memory has been given back."""
    x.untyped_storage().resize_(0)
    return x


# ---- values that say where to read and write -------------------------------------------------------

RULES = (None,) * 5
NUMBERS = (1.0, "none", -1, -1, 0.0, 0.0)


def packed(namespace: str, ends_q: Tensor, ends_k: Tensor, longest: tuple[int, int] = (8, 8)) -> Any:
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    return op(namespace, "attention")(q, k, k, *RULES, ends_q, ends_k, *NUMBERS, *longest)


@pytest.mark.parametrize("namespace", ["bigkern", *NAMESPACES])
@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (int32(0, 4, 1_000_000), "must run from 0 to 8, the rows there are, not 0..1000000"),
        (int32(0, 4, 7), "must run from 0 to 8, the rows there are, not 0..7"),
        (int32(1, 4, 8), "must run from 0 to 8, the rows there are, not 1..8"),
        (int32(0, 1_000_000, 8), "must not fall, but it does from 1000000 to 8"),
        (int32(0, -4, 8), "must not fall, but it does from 0 to -4"),
    ],
)
def test_cumulative_lengths_stay_within_the_rows(ends: Tensor, message: str, namespace: str) -> None:
    right = int32(0, 4, 8)
    packed(namespace, right, right)
    with pytest.raises(RuntimeError, match=f"^cu_seqlens_q {message}"):
        packed(namespace, ends, right)
    with pytest.raises(RuntimeError, match=f"^cu_seqlens_k {message}"):
        packed(namespace, right, ends)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_longest_sequence_is_at_least_what_the_lengths_say(namespace: str) -> None:
    ends = int32(0, 2, 8)
    packed(namespace, ends, ends, (6, 6))
    with pytest.raises(RuntimeError, match=r"^max_seqlen_q must be at least 6, the longest"):
        packed(namespace, ends, ends, (5, 6))
    with pytest.raises(RuntimeError, match=r"^max_seqlen_k must be at least 6, the longest"):
        packed(namespace, ends, ends, (6, -1))


def test_cumulative_lengths_are_checked_in_a_compiled_call() -> None:
    def call(x: Tensor, ends: Tensor) -> Any:
        return bigkern.varlen_attention(x, x, x, ends, ends, 8, 8)

    x, compiled = torch.randn(8, 2, 16), torch.compile(call, backend="aot_eager")
    with bigkern.use("cpu"):
        torch.testing.assert_close(compiled(x, int32(0, 4, 8)), call(x, int32(0, 4, 8)))
        with pytest.raises(RuntimeError, match="cu_seqlens_q must run from 0 to 8"):
            compiled(x, int32(0, 4, 1_000_000))


def decode(namespace: str, lengths: Tensor, page_table: Tensor | None = None) -> Any:
    q, cache = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 8, 16)
    numbers = (1.0, "bottom_right", -1, 0, 0.0)
    return op(namespace, "decode_attention")(q, cache, cache, lengths, page_table, None, None, *numbers)


@pytest.mark.parametrize("namespace", ["bigkern", *NAMESPACES])
@pytest.mark.parametrize("length", [-1, 9, 1_000_000])
def test_decode_lengths_stay_within_the_cache(length: int, namespace: str) -> None:
    decode(namespace, int32(8, 0))
    with pytest.raises(RuntimeError, match=r"^cache_seqlens must be within 0 and the cache's 8 keys, not"):
        decode(namespace, int32(8, length))
    with pytest.raises(RuntimeError, match=r"^cache_seqlens must be within 0 and the cache's 16 keys, not"):
        decode(namespace, int32(8, 8 + length if length > 0 else length), int32(0, 1, 1, 0).view(2, 2))


@pytest.mark.parametrize("namespace", ["bigkern", *NAMESPACES])
@pytest.mark.parametrize("page", [-1, 2, 1_000_000])
def test_page_numbers_stay_within_the_cache(page: int, namespace: str) -> None:
    decode(namespace, int32(16, 8), int32(1, 0, 1, page).view(2, 2))  # the last one is not asked for
    with pytest.raises(RuntimeError, match=f"^page_table must hold page numbers below 2, not {page}"):
        decode(namespace, int32(16, 9), int32(1, 0, 1, page).view(2, 2))


def test_decode_lengths_are_checked_in_a_compiled_call() -> None:
    q, cache = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 8, 16)
    with bigkern.use("cpu"):
        compiled = torch.compile(bigkern.decode_attention, backend="aot_eager")
        compiled(q, cache, cache, int32(8, 3))
        with pytest.raises(RuntimeError, match="cache_seqlens must be within 0 and the cache's 8 keys"):
            compiled(q, cache, cache, int32(8, 1_000_000))


# ---- shapes and memory of every tensor -------------------------------------------------------------
#
# A valid call of each op: its arguments by name, in the order of its schema.


def attention_call() -> dict[str, Any]:
    q, k, v = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 8)
    mask, bias = torch.ones(2, 4, 6, 5, dtype=torch.bool), torch.randn(2, 4, 6, 5)
    given = {"mask": mask, "bias": bias, "alibi_slopes": torch.rand(2, 4), "sinks": torch.rand(4)}
    rest = dict(zip(("scale", "causal", "left", "right", "softcap", "dropout_p"), NUMBERS, strict=True))
    ends = {"dropout_key": None, "cu_seqlens_q": None, "cu_seqlens_k": None}
    return {"q": q, "k": k, "v": v, **given, **ends, **rest, "max_seqlen_q": 6, "max_seqlen_k": 5}


def attention_backward_call() -> dict[str, Any]:
    forward = attention_call()
    o, lse = torch.ops.bigkern_native.attention(*forward.values())
    q, k, v = (forward.pop(name) for name in "qkv")
    first = {"do": torch.randn(o.shape), "dlse": torch.randn(lse.shape), "q": q, "k": k, "v": v}
    return {**first, "o": o, "lse": lse, "want_bias": True, **forward}


def decode_attention_call() -> dict[str, Any]:
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(3, 2, 5, 16), torch.randn(3, 2, 5, 8)
    table = int32(0, 1, 2, 1, 0, 2).view(2, 3)
    tensors = {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": int32(5, 7), "page_table": table}
    numbers = {"scale": 1.0, "causal": "bottom_right", "left": -1, "right": 0, "softcap": 0.0}
    return {**tensors, "alibi_slopes": torch.rand(2, 4), "sinks": torch.rand(4), **numbers}


def norm_call() -> dict[str, Any]:
    x, weight, bias = torch.randn(2, 7, 12), torch.randn(12), torch.randn(12)
    tensors = {"x": x, "residual": torch.randn(2, 7, 12), "weight": weight, "bias": bias}
    return {**tensors, "eps": 1e-5, "kind": "layer", "dropout_p": 0.0, "dropout_key": None}


def norm_backward_call() -> dict[str, Any]:
    forward = norm_call()
    _, s, mean, rstd = torch.ops.bigkern_native.norm(*forward.values())
    tensors = {"dy": torch.randn(2, 7, 12), "dsum": torch.randn(2, 7, 12), "s": s}
    tensors |= {"weight": forward["weight"], "mean": mean, "rstd": rstd}
    wanted = {"want_weight": True, "want_bias": True, "dropout_p": 0.0, "dropout_key": None}
    return {**tensors, "kind": "layer", **wanted}


def linear_call() -> dict[str, Any]:
    return {"x": torch.randn(2, 7, 12), "weight": torch.randn(8, 12), "bias": torch.randn(8)}


def linear_backward_call() -> dict[str, Any]:
    tensors = {"dy": torch.randn(6, 8), "x": torch.randn(6, 12), "weight": torch.randn(8, 12)}
    return {**tensors, "want_x": True, "want_weight": True}


def layernorm_ffn_call() -> dict[str, Any]:
    tensors = {"x": torch.randn(2, 7, 12), "w1": torch.randn(20, 12), "b1": torch.randn(20)}
    tensors |= {"w2": torch.randn(12, 20), "b2": torch.randn(12), "norm_weight": torch.randn(12)}
    words = {"kind": "layer", "activation": "gelu", "placement": "post", "residual": True, "eps": 1e-5}
    drop = {"dropout_p": 0.0, "hidden_dropout_p": 0.0}
    tensors |= {"norm_bias": torch.randn(12), "dropout_key": None}
    return {**tensors, **words, **drop, "save": "preactivation"}


def layernorm_ffn_backward_call() -> dict[str, Any]:
    forward = layernorm_ffn_call()
    _, s, mean, rstd, preactivation = torch.ops.bigkern_native.layernorm_ffn(*forward.values())
    saved = {"s": s, "mean": mean, "rstd": rstd, "preactivation": preactivation}
    items = [(name, x) for name, x in forward.items() if name != "save"]
    tensors = {"dy": torch.randn(2, 7, 12), **dict(items[:8]), **saved, **dict(items[8:])}
    sums = {"w1_sum": torch.zeros(20, 12), "w2_sum": torch.zeros(12, 20)}
    return {**tensors, "wanted": [True] * 7, **sums}


def frozen_layernorm_ffn_call() -> dict[str, Any]:
    w1, w2 = (torch.randint(-9, 9, shape, dtype=torch.int8) for shape in ((20, 12), (12, 20)))
    tensors = {"x": torch.randn(2, 7, 12), "w1": w1, "w1_scale": torch.rand(20), "b1": torch.randn(20)}
    tensors |= {"w2": w2, "w2_scale": torch.rand(12), "b2": torch.randn(12), "norm_weight": torch.randn(12)}
    tensors |= {"norm_bias": torch.randn(12), "w1_packed": None}
    tensors["w2_packed"] = torch.ops.bigkern_native.pack_ffn_weight(w2, False)
    words = {"kind": "layer", "activation": "gelu", "placement": "pre", "residual": True, "eps": 1e-5}
    return {**tensors, **words}


def recurrent_call() -> dict[str, Any]:
    x, h0, c0 = torch.randn(6, 12), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    weights = [torch.randn(32, 12), torch.randn(32, 8), torch.randn(32), torch.randn(32)]
    tensors = {"x": x, "h0": h0, "c0": c0, "weights": weights, "batch_sizes": torch.tensor([3, 2, 1])}
    return {**tensors, "zoneout": torch.rand(6, 8), "mode": "LSTM", "save": True}


def recurrent_scan_backward_call() -> dict[str, Any]:
    forward = recurrent_call()
    y, _hn, _cn, gates, reserve = torch.ops.bigkern_native.recurrent(*forward.values())
    gradients = {"dy": torch.randn(6, 8), "dhn": torch.randn(1, 3, 8), "dcn": torch.randn(1, 3, 8)}
    state = {"gates": gates, "h0": forward["h0"], "c0": forward["c0"], "w_hh": forward["weights"][1]}
    rest = {"w_hh_reverse": None, "batch_sizes": forward["batch_sizes"], "zoneout": forward["zoneout"]}
    return {**gradients, **state, **rest, "y": y, "reserve": reserve, "mode": "LSTM"}


ADAM_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")


def adam_call() -> dict[str, Any]:
    lists: dict[str, Any] = {name: [torch.rand(4, 6), torch.rand(5)] for name in ADAM_LISTS}
    lists["state_steps"] = [torch.zeros(()), torch.zeros(())]
    lists |= {"masters": [], "exp_avg_scales": [], "exp_avg_sq_scales": []}
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    flags = {"decoupled": True, "amsgrad": True, "maximize": False, "zero_grads": False}
    scalars = {name: torch.ones(()) for name in ("grad_scale", "found_inf", "lr_tensor", "grad_norm")}
    return {**lists, **hyper, **flags, "max_norm": 1.0, "seed": None, **scalars}


def grad_norm_call() -> dict[str, Any]:
    return {"grads": [torch.rand(4, 6), torch.rand(5)]}


CALLS: list[Callable[[], dict[str, Any]]] = [
    attention_call, attention_backward_call, decode_attention_call, norm_call, norm_backward_call,
    linear_call, linear_backward_call, layernorm_ffn_call, layernorm_ffn_backward_call,
    frozen_layernorm_ffn_call, recurrent_call, recurrent_scan_backward_call, adam_call, grad_norm_call,
]  # fmt: skip
UNREAD = [("frozen_layernorm_ffn", "w2")]  # it is packed
FIRST = {"q", "x", "s", "gates", "params", "w2"}  # the others are held to them, and named
ANY_SHAPE = {"batch_sizes", "state_steps", "grad_scale", "found_inf", "lr_tensor", "grad_norm", "w2_packed"}


def tensors_of(make: Callable[[], dict[str, Any]]) -> list[tuple[str, int | None]]:
    """Where a call has tensors: an argument's name, and a place in it if it is a list."""
    found: list[tuple[str, int | None]] = []
    for name, value in make().items():
        if isinstance(value, Tensor):
            found.append((name, None))
        elif isinstance(value, list):
            found += [(name, i) for i, x in enumerate(value) if isinstance(x, Tensor)]
    return found


def name_of(make: Callable[[], dict[str, Any]]) -> str:
    return make.__name__.removesuffix("_call")


def every_tensor(but: Callable[[str, str], bool]) -> list[Any]:
    calls = CALLS if info.import_error is None else []
    return [
        pytest.param(make, name, at, id=f"{name_of(make)}-{name}{'' if at is None else at}")
        for make in calls
        for name, at in tensors_of(make)
        if not but(name_of(make), name)
    ]


def changed(make: Callable[[], dict[str, Any]], name: str, at: int | None, change: Any) -> dict[str, Any]:
    call = make()
    if at is None:
        call[name] = change(call[name])
    else:
        call[name][at] = change(call[name][at])
    return call


@pytest.mark.parametrize("make", CALLS, ids=name_of)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_valid_call_runs(make: Callable[[], dict[str, Any]], namespace: str) -> None:
    if namespace == "bigkern_simt" and not implemented(make, namespace):
        pytest.skip("the CPU's alone")
    op(namespace, name_of(make))(*make().values())


def implemented(make: Callable[[], dict[str, Any]], namespace: str) -> bool:
    op(namespace, name_of(make))
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name_of(make)}", "CPU")


@pytest.mark.parametrize(("make", "name", "at"), every_tensor(but=lambda call, name: (call, name) in UNREAD))
def test_memory_that_was_given_back_is_named(
    make: Callable[[], dict[str, Any]], name: str, at: int | None
) -> None:
    call = changed(make, name, at, lambda x: freed(x.clone()))
    with pytest.raises(RuntimeError, match=said(make, name, at)):
        op("bigkern_native", name_of(make))(*call.values())


def said(make: Callable[[], dict[str, Any]], name: str, at: int | None) -> str:
    """The name by which a message begins."""
    if at is None:
        return rf"^{name}\b"
    if name == "weights":
        return rf"^{('w_ih', 'w_hh', 'b_ih', 'b_hh')[at]}\b"
    return rf"^{name}\[{at}\]"


def turned(x: Tensor) -> Tensor:
    """As many elements in another shape."""
    return x.reshape(-1, 1) if x.dim() == 1 else x.reshape(x.shape[::-1]) if x.dim() > 1 else x


@pytest.mark.parametrize(
    ("make", "name", "at"), every_tensor(but=lambda call, name: call == "grad_norm" or name in ANY_SHAPE)
)
def test_another_shape_of_as_many_elements_is_named(
    make: Callable[[], dict[str, Any]], name: str, at: int | None
) -> None:
    call = changed(make, name, at, turned)
    with pytest.raises(RuntimeError, match="must" if name in FIRST else said(make, name, at)):
        op("bigkern_native", name_of(make))(*call.values())


# ---- arguments by name -----------------------------------------------------------------------------
#
# The stack that torch hands over has no names: an op.cpp's struct must list the schema's, in its order.

CSRC = Path(__file__).parent.parent / "csrc"
SCHEMA_TYPES = {
    "tensor": "Tensor", "optional": "Optional[Tensor]", "list": "List[Tensor]", "real": "float",
    "integer": "int", "optional_integer": "Optional[int]", "flag": "bool", "flags": "List[bool]",
    "text": "str",
}  # fmt: skip
STRUCT = re.compile(r"struct (\w+) \{\n  Arguments& in;\n(.*?)\n(?:\n|\};)", re.DOTALL)
FIELD = re.compile(r"(?P<name>\w+) = in\.(?P<type>\w+)\(\)|(?P<part>\w+) \w+\{in\};")


def fields_of(struct: str, structs: dict[str, str]) -> Iterator[tuple[str, str]]:
    for field in FIELD.finditer(structs[struct]):
        if field["part"]:
            yield from fields_of(field["part"], structs)
        else:
            yield field["name"].rstrip("_"), SCHEMA_TYPES[field["type"]]


def structs_by_op() -> dict[str, list[tuple[str, str]]]:
    """The arguments, as names and types, that each op's C++ struct takes."""
    found = {}
    for folder in {path.parent for path in CSRC.glob("*/op.cpp")}:
        text = "\n".join(path.read_text() for path in sorted(folder.glob("op*")))
        structs = dict(STRUCT.findall(text))
        calls = dict(re.findall(r"(\w+)\(\s*(?:const )?(\w+)& call\) \{", text))
        for op_name, function in re.findall(r'm\.impl\("(\w+)", &boxed<(\w+)', text):
            found[op_name] = list(fields_of(calls[function], structs))
    return found


@pytest.mark.parametrize("schema", library.SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_a_kernel_takes_the_arguments_that_its_schema_lists(schema: str) -> None:
    parsed = torch._C.parse_schema(schema)
    listed = [(argument.name, str(argument.type)) for argument in parsed.arguments]
    taken = structs_by_op()[parsed.name]
    assert taken == listed


# ---- the optimizer ---------------------------------------------------------------------------------


def test_a_gradient_whose_memory_was_given_back_is_named_by_the_optimizer() -> None:
    params = [torch.nn.Parameter(torch.rand(5)) for _ in range(20)]
    optimizer = AdamW(params)
    for _ in range(3):  # the third step reads addresses alone
        for p in params:
            p.grad = torch.ones(5)
        optimizer.step()
    params[3].grad = freed(torch.ones(5))
    with pytest.raises(RuntimeError, match=r"^grads\[3\] must lie in its storage"):
        optimizer.step()


@pytest.mark.parametrize("shapes", [[(0,), (5,)], [(5,), (0, 3)], [(0,)]], ids=str)
def test_amsgrad_with_empty_parameters_does_as_torchs(shapes: list[tuple[int, ...]]) -> None:
    start = [torch.rand(shape) for shape in shapes]
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = kind(params, amsgrad=True)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["step"] for p in params)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("key", [(-1, 0), (0, -1), (2**32, 0), (0, 2**40)], ids=str)
def test_a_dropout_key_is_two_numbers_of_32_bits(key: tuple[int, int]) -> None:
    x = torch.ones(4, 8)
    arguments = (x, x, None, None, 1e-5, "layer", 0.5, torch.tensor(key))
    with pytest.raises(RuntimeError, match=r"^dropout_key must be two numbers within 0 and 2"):
        op("bigkern_native", "norm")(*arguments)
