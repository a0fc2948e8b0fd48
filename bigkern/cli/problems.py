"""One concrete call of each op, as bigkern writes it and as stock PyTorch does: for doctor and benchmarks.

A problem makes its inputs, calls the public function, calls the stock counterpart, and can be judged: the
stock call in float64 is the reference, and the parity rule compares errors (``bigkern.parity``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern import registry
from bigkern.ops import adam as adam_room
from bigkern.ops import attention as attention_room
from bigkern.ops import layernorm_ffn as ffn_room
from bigkern.ops import norm as norm_room
from bigkern.parity import Verdict, compare

Causal = Literal[False, True, "bottom_right"]
Inputs = dict[str, Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments

ON_THE_CPU = 1 << 24  # inputs of more elements are drawn where they are used


@dataclass(frozen=True)
class Problem:
    """A call of ``op``; ``label`` is its row's name in every table.

    ``flops`` and ``elements`` are of the forward pass: the useful arithmetic, and how many elements of the
    dtype must at least cross the memory bus. A backward pass takes ``backward_factor`` times as much.
    """

    op: str
    label: str
    shapes: dict[str, tuple[int, ...]]
    public: Callable[..., Any]
    arguments: Callable[[Inputs], Call]
    stock: Callable[[Inputs], Tensor]
    flops: float = 0.0
    elements: float = 0.0
    backward_factor: float = 2.0
    differentiable: bool = True
    explain_options: dict[str, Any] = field(default_factory=dict)  # what explain must be told besides

    def make(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Inputs drawn in float32 from ``seed``, rounded to dtype; small ones are alike on all devices."""
        drawn = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        source = device if drawn > ON_THE_CPU else torch.device("cpu")
        generator = torch.Generator(source).manual_seed(seed)
        made: Inputs = {}
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=generator, device=source)
            if name.startswith(("w1", "w2")):
                value /= shape[-1] ** 0.5
            if name.endswith("weight"):
                value = 1 + 0.1 * value
            if name.startswith("v_"):
                value = value.square()  # Adam's second moment
            wanted = self.differentiable and not name.startswith("fixed_")
            made[name] = value.to(device, dtype).requires_grad_(wanted)
        return made

    def ours(self, inputs: Inputs) -> Tensor:
        arguments, options = self.arguments(inputs)
        result = self.public(*arguments, **options)
        return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]

    def explain(self, inputs: Inputs) -> registry.Explanation:
        arguments, options = self.arguments(inputs)
        return registry.explain(self.op, *arguments, **options, **self.explain_options)


def results(problem: Problem, call: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The output of ``call`` and, for a fixed random gradient of it, the gradient of every input."""
    output = call(inputs)
    found = {"output": output.detach()}
    if problem.differentiable:
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        wanted = {name: value for name, value in inputs.items() if value.requires_grad}
        grads = torch.autograd.grad(output, list(wanted.values()), upstream)
        found.update({f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)})
    return found


Expected = tuple[dict[str, Tensor], dict[str, Tensor]]  # of stock, and of stock in float64


def expect(problem: Problem, dtype: torch.dtype, device: torch.device) -> Expected:
    """What stock PyTorch makes of the problem, and the float64 reference."""
    inputs = problem.make(dtype, device)
    wide = {n: value.detach().double().requires_grad_(value.requires_grad) for n, value in inputs.items()}
    return results(problem, problem.stock, inputs), results(problem, problem.stock, wide)


def judge(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    expected: Expected | None = None,
) -> dict[str, Verdict]:
    """The parity rule for the output and every gradient; without ``backend`` bigkern chooses one.

    Raises:
        BackendRefused: the backend cannot run this call.
    """
    inputs = problem.make(dtype, device)
    with registry.use(**({} if backend is None else {problem.op: backend})):
        ours = results(problem, problem.ours, inputs)
    stock, reference = expected or expect(problem, dtype, device)
    return {
        name: compare(value, reference[name], stock[name], gradient=name != "output")
        for name, value in ours.items()
    }


# ---- the ops ---------------------------------------------------------------------------------------


def attention(
    B: int,
    H: int,
    S: int,
    D: int,
    causal: Causal = False,
    *,
    kv_heads: int | None = None,
    keys: int | None = None,
    masked: bool = False,
    biased: bool = False,
) -> Problem:
    """``keys`` is the length of k and v where it is not S; ``masked`` hides every fifth key or so."""
    kv, Sk = kv_heads or H, keys or S
    # Stored as [B, S, H, D], as projections leave them.
    shapes: dict[str, tuple[int, ...]] = {"q": (B, S, H, D), "k": (B, Sk, kv, D), "v": (B, Sk, kv, D)}
    if biased:
        shapes["fixed_bias"] = (H, S, Sk)

    def split(inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(inputs[name].transpose(1, 2) for name in "qkv")

    def mask(device: torch.device) -> Tensor:
        i, j = torch.arange(S, device=device).unsqueeze(1), torch.arange(Sk, device=device)
        return (3 * i + 7 * j) % 5 != 1

    def call(inputs: Inputs) -> Call:
        hidden = {"mask": mask(inputs["q"].device)} if masked else {}
        return split(inputs), {"causal": causal, "bias": inputs.get("fixed_bias"), **hidden}

    def stock(inputs: Inputs) -> Tensor:
        q, k, v = split(inputs)
        if not masked and not biased and causal != "bottom_right":
            return F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal), enable_gqa=kv != H)
        allowed = mask(q.device) if masked else torch.ones(S, Sk, dtype=torch.bool, device=q.device)
        if causal:
            allowed = allowed.tril(Sk - S if causal == "bottom_right" else 0)
        bias = torch.zeros((), dtype=q.dtype, device=q.device) if not biased else inputs["fixed_bias"]
        additive = torch.where(allowed, bias, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, additive, enable_gqa=kv != H)

    words = [f"{B}x{H}x{S}x{D}"]
    words += [f"{Sk} keys"] if keys else []
    words += [f"{kv} kv heads"] if kv != H else []
    words += ["causal" if causal is True else str(causal)] if causal else []
    words += ["mask"] if masked else []
    words += ["bias"] if biased else []
    return Problem(
        "attention",
        ", ".join(words),
        shapes,
        attention_room.attention,
        call,
        stock,
        flops=4 * B * H * S * Sk * D * (0.5 if causal else 1.0),
        elements=2 * B * D * (S * H + Sk * kv),
        backward_factor=2.5,
    )


def norm(M: int, N: int, kind: str = "layer", residual: bool = False) -> Problem:
    label = f"{kind} {M}x{N}" + (" + residual" if residual else "")
    shapes: dict[str, tuple[int, ...]] = {"x": (M, N), "weight": (N,)}
    if kind == "layer":
        shapes["bias"] = (N,)
    if residual:
        shapes["residual"] = (M, N)

    def call(inputs: Inputs) -> Call:
        bias = {"bias": inputs["bias"]} if kind == "layer" else {}
        extra = {"residual": inputs["residual"]} if residual else {}
        return (inputs["x"], (N,), inputs["weight"]), {**bias, "eps": 1e-5, **extra}

    def stock(inputs: Inputs) -> Tensor:
        s = inputs["x"] + inputs["residual"] if residual else inputs["x"]
        if kind == "rms":
            return F.rms_norm(s, (N,), inputs["weight"], 1e-5)
        return F.layer_norm(s, (N,), inputs["weight"], inputs["bias"], 1e-5)

    elements = (4 if residual else 2) * M * N
    return Problem(
        "norm",
        label,
        shapes,
        norm_room.layer_norm if kind == "layer" else norm_room.rms_norm,
        call,
        stock,
        elements=elements,
        backward_factor=1.5,
        explain_options={} if kind == "layer" else {"kind": "rms"},
    )


def layernorm_ffn(M: int, D: int, hidden: int, activation: str = "gelu", placement: str = "pre") -> Problem:
    gated = activation in ("swiglu", "geglu")
    rows = 2 * hidden if gated else hidden
    shapes = {
        "x": (M, D),
        "w1": (rows, D),
        "b1": (rows,),
        "w2": (D, hidden),
        "b2": (D,),
        "norm_weight": (D,),
        "norm_bias": (D,),
    }

    def stock(inputs: Inputs) -> Tensor:
        x, w1, b1, w2, b2, weight, bias = inputs.values()
        n = F.layer_norm(x, (D,), weight, bias) if placement == "pre" else x
        y = x + F.linear(_activate(F.linear(n, w1, b1), activation), w2, b2)
        return y if placement == "pre" else F.layer_norm(y, (D,), weight, bias)

    return Problem(
        "layernorm_ffn",
        f"{M}x{D}x{hidden} {activation} {placement}",
        shapes,
        ffn_room.layernorm_ffn,
        lambda inputs: (tuple(inputs.values()), {"activation": activation, "placement": placement}),
        stock,
        flops=2 * M * D * (rows + hidden),
        elements=2 * M * D + D * (rows + hidden),
    )


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation in ("swiglu", "geglu"):
        gate, up = h.chunk(2, dim=-1)
        return _activate(gate, "silu" if activation == "swiglu" else "gelu") * up
    if activation == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    return getattr(F, activation)(h)  # type: ignore[no-any-return]


def adam(sizes: list[tuple[int, ...]], label: str, decoupled: bool = True) -> Problem:
    """One step from given moments; the output is everything that it writes, flattened."""
    shapes = {f"{letter}_{i}": size for letter in "pgmv" for i, size in enumerate(sizes)}
    hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}

    def lists(inputs: Inputs) -> tuple[list[Tensor], ...]:
        """Copies: a step writes them."""
        return tuple([t.clone() for name, t in inputs.items() if name[0] == letter] for letter in "pgmv")

    def step_tensors(params: list[Tensor]) -> list[Tensor]:
        return [torch.full((), 2.0, device=p.device) for p in params]

    def written(p: list[Tensor], m: list[Tensor], v: list[Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in (*p, *m, *v)])

    def call(inputs: Inputs) -> Call:
        p, g, m, v = lists(inputs)
        return (p, g, m, v, [], step_tensors(p)), {**hyper, "decoupled": decoupled}

    def public(
        p: list[Tensor], g: Any, m: list[Tensor], v: list[Tensor], *rest: Any, **options: Any
    ) -> Tensor:
        adam_room.adam(p, g, m, v, *rest, **options)
        return written(p, m, v)

    def stock(inputs: Inputs) -> Tensor:
        p, g, m, v = lists(inputs)
        maker = torch.optim.AdamW if decoupled else torch.optim.Adam
        betas = (hyper["beta1"], hyper["beta2"])
        optimizer = maker(
            p, lr=hyper["lr"], betas=betas, eps=hyper["eps"], weight_decay=hyper["weight_decay"]
        )
        for parameter, gradient, first, second, step in zip(p, g, m, v, step_tensors(p), strict=True):
            parameter.grad = gradient
            optimizer.state[parameter] = {"step": step.cpu(), "exp_avg": first, "exp_avg_sq": second}
        optimizer.step()
        return written(p, m, v)

    count = sum(torch.Size(size).numel() for size in sizes)
    return Problem("adam", label, shapes, public, call, stock, elements=7 * count, differentiable=False)


OPS = ("attention", "norm", "layernorm_ffn", "adam")


def small(op: str) -> list[Problem]:
    """Small calls with odd sizes, for ``bigkern doctor``: seconds for all of them."""
    return {
        "attention": [
            attention(2, 4, 129, 64, causal=True),
            attention(1, 4, 63, 32, causal=False, kv_heads=2),
            attention(1, 2, 257, 128, causal=False),
        ],
        "norm": [norm(65, 768), norm(7, 1023, residual=True), norm(33, 512, "rms")],
        "layernorm_ffn": [
            layernorm_ffn(33, 64, 256),
            layernorm_ffn(63, 96, 160, "swiglu"),
            layernorm_ffn(17, 128, 192, "relu", "post"),
        ],
        "adam": [
            adam([(1,), (7, 5), (4097,)], "3 tensors, AdamW"),
            adam([(63, 65), (1023,)], "2 tensors, Adam", decoupled=False),
        ],
    }[op]


def thorough(op: str) -> list[Problem]:
    """More calls, for ``bigkern doctor --verify``: sizes and options that choose other code in a kernel."""
    if op == "attention":
        return [
            *(
                attention(1, 2, 193, D, causal)
                for D in (16, 40, 64, 80, 96, 128, 160, 256)
                for causal in (False, True)
            ),
            *(attention(2, 4, S, 64, True, kv_heads=1) for S in (1, 7, 128, 1023)),
            attention(1, 4, 65, 128, "bottom_right", keys=511),
            attention(1, 4, 300, 64, keys=77, masked=True),
            attention(2, 2, 130, 64, True, biased=True),
            attention(4, 8, 1024, 128, True),
        ]
    if op == "norm":
        sizes = ((1, 1), (3, 63), (129, 1024), (1000, 4096), (17, 8191))
        return [
            norm(M, N, kind, residual)
            for M, N in sizes
            for kind in ("layer", "rms")
            for residual in (False, True)
        ]
    if op == "layernorm_ffn":
        activations = ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu")
        return [
            *(layernorm_ffn(129, 256, 520, a, p) for a in activations for p in ("pre", "post")),
            layernorm_ffn(1024, 1024, 4096),
        ]
    return [
        adam([(1 << 20,), (1,), (1023, 7)], "3 tensors, AdamW"),
        adam([(n,) for n in range(1, 200)], "199 tensors, Adam", decoupled=False),
    ]


def typical(op: str) -> Problem:
    """The call that ``bigkern env`` asks about: of an ordinary size."""
    return {
        "attention": attention(4, 12, 512, 64, causal=True),
        "norm": norm(2048, 768),
        "layernorm_ffn": layernorm_ffn(512, 768, 3072),
        "adam": adam([(768, 768), (768,)], "2 tensors"),
    }[op]
