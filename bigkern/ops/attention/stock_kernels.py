"""Attention by one kernel of torch's: the candidates `torch_cudnn`, `torch_flash` and `torch_efficient`.

Torch's function chooses among its kernels by fixed rules; here measurement may. Each kernel is called by the
op that torch's function calls when it has chosen. `torch.nn.attention.sdpa_kernel` would set flags that other
threads see; an op is traced as it is, and its backward is that of its own kernel. Only what a kernel takes as
it stands runs on it: torch's function pads heads and expands masks besides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.backends import cuda

from bigkern.core import wisdom
from bigkern.core.library import KERNEL_DTYPES, in_functorch
from bigkern.core.registry import Backend, Reason
from bigkern.ops.attention.call import Attention

HALF = (torch.bfloat16, torch.float16)
LONGEST_TRACED = 128  # head_dim: what is longer some GPUs take, which torch's own rule would have to ask
aten = torch.ops.aten


class Kernel(NamedTuple):
    op: Callable[..., Any]
    takes_bias: bool  # also whether a backward will read the statistics
    dtypes: tuple[torch.dtype, ...]
    refuses: Callable[[Attention], Reason]  # besides what all of them refuse
    can_use: Callable[[Any], bool]  # torch's own rule


def _cudnn_refuses(call: Attention) -> Reason:
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for, and its backward is none"
    if call.dropout_p > 0.0:
        return "which dropout it has depends on its version"
    return "it does not take a single key" if call.k.shape[2] == 1 else None


def _flash_refuses(call: Attention) -> Reason:
    D, Dv = call.q.shape[3], call.v.shape[3]
    return None if Dv == D else f"v's head_dim {Dv} is not q's {D}"


def _efficient_refuses(call: Attention) -> Reason:
    return None if call.q.shape[1] == call.k.shape[1] else "it knows no heads that share keys"


KERNELS = {
    "torch_cudnn": Kernel(
        aten._scaled_dot_product_cudnn_attention.default,
        True, HALF, _cudnn_refuses, cuda.can_use_cudnn_attention,
    ),
    "torch_flash": Kernel(
        aten._scaled_dot_product_flash_attention.default,
        False, HALF, _flash_refuses, cuda.can_use_flash_attention,
    ),
    "torch_efficient": Kernel(
        aten._scaled_dot_product_efficient_attention.default,
        True, KERNEL_DTYPES, _efficient_refuses, cuda.can_use_efficient_attention,
    ),
}  # fmt: skip


def backend(name: str) -> Backend:
    """The candidate of a kernel, one of ``KERNELS``."""
    kernel = KERNELS[name]

    def forward(call: Attention) -> Tensor:
        q, k, v = call.q, call.k, call.v
        options: tuple[Any, ...] = (call.dropout_p, call.causal != "none")
        if kernel.takes_bias:
            training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            options = (None, training, *options)
        return cast(Tensor, kernel.op(q, k, v, *options, scale=call.scale)[0])

    def refuses(call: Attention) -> Reason:
        return _needs_more(call) or _misfit(call, kernel) or kernel.refuses(call) or _torchs(call, kernel)

    return Backend(name, forward, refuses=refuses, declines=_declines, by_torch=True)


def _declines(call: Attention) -> Reason:
    return "not measured here"


def _needs_more(call: Attention) -> Reason:
    """What no kernel runs by itself."""
    if not call.q.is_cuda:
        return f"tensors are on {call.q.device.type}"
    if in_functorch():
        return "transforms of torch.func are for torch's whole function"
    if call.softcap or call.sinks is not None or call.dropout_key is not None:
        return "softcap, sinks and seeded dropout run on the reference"
    if call.cu_seqlens_q is not None:
        return "packed sequences go to torch's whole function, one by one"
    windowed = call.window_left >= 0 or (call.causal == "none" and call.window_right >= 0)
    if windowed or call.mask is not None or call.bias is not None or call.alibi_slopes is not None:
        return "masks, windows, biases and slopes are for torch's whole function"
    queries, keys = call.q.shape[2], call.k.shape[2]
    if wisdom.left_open((queries, keys)):
        return "nothing is measured of sizes that torch.compile leaves open"
    if call.causal != "none" and queries != keys:
        return "causal with more queries or keys: kernels differ in the corner"
    return None


def _misfit(call: Attention, kernel: Kernel) -> Reason:
    """What a kernel could only run on copies."""
    if call.q.dtype not in kernel.dtypes:
        return f"dtype {call.q.dtype}"
    for x in (call.q, call.k, call.v):
        if x.stride(3) != 1:
            return "rows are strided"
        if x.shape[3] * x.element_size() % 16 != 0:
            return f"rows of head_dim {x.shape[3]} are not whole 16 bytes"
    return None


def _torchs(call: Attention, kernel: Kernel) -> Reason:
    """What torch's own rule refuses: it asks the GPU, and cannot be traced."""
    q, k, v = call.q, call.k, call.v
    if torch.compiler.is_compiling():
        longest = max(q.shape[3], v.shape[3])
        return None if longest <= LONGEST_TRACED else f"head_dim {longest} > {LONGEST_TRACED} in a trace"
    grouped = q.shape[1] != k.shape[1]
    asked = cuda.SDPAParams(q, k, v, None, call.dropout_p, call.causal != "none", grouped)
    return None if kernel.can_use(asked) else "torch's own rule does not allow it on this GPU"
