"""Attention by torch's own function, differentiable by torch's own autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.attention import reference
from bigkern.ops.attention.call import Attention, draw
from bigkern.ops.attention.decode_call import Decode
from bigkern.ops.attention.decode_reference import as_attention


def attention(call: Attention) -> Tensor:
    """o alone. Torch has no softcap and no sinks, and its dropout has no seed: those run on the reference."""
    if call.softcap or call.sinks is not None or call.dropout_key is not None:
        draw(call)
        return reference.attention(call)[0]
    if call.cu_seqlens_q is None:
        return _sdpa(call)
    parts = [call.q[..., :0, :] @ call.v.new_empty(call.q.shape[3], call.v.shape[3])]
    parts += [_sdpa(own) for _rows, _keys, own in reference.sequences(call)]
    return torch.cat(parts, dim=2)


def decode_attention(call: Decode) -> Tensor:
    """The same over a cache."""
    return attention(as_attention(call))


def _sdpa(call: Attention) -> Tensor:
    q, k, v = call.q, call.k, call.v
    corner = call.causal == "top_left" or q.shape[2] == k.shape[2]
    is_causal = call.causal != "none" and corner and call.window_left < 0
    is_causal = is_causal and call.mask is None and call.bias is None and call.alibi_slopes is None
    allowed = None if is_causal else _attn_mask(call)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}  # a branch: a bool, never a SymBool
    return F.scaled_dot_product_attention(
        q, k, v, allowed, call.dropout_p, is_causal, scale=call.scale, **grouped
    )


def _attn_mask(call: Attention) -> Tensor | None:
    """Mask, window, bias and slopes as the one ``attn_mask`` that torch's function takes."""
    mask, bias = reference.visible(call), call.bias
    if call.alibi_slopes is not None:
        slopes = reference.alibi(call.alibi_slopes, reference.distance(call)).to(call.q.dtype)
        bias = slopes if bias is None else bias + slopes
    if bias is None:
        return mask
    bias = bias.to(call.q.dtype)
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))
