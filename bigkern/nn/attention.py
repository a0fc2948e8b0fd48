"""``MultiheadAttention``: torch's layer, with the attention op between its projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.nn.torchscript import ScriptsAsStock
from bigkern.ops.attention import attention
from bigkern.ops.linear import linear


def canonical_masks(
    padding: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    padding_name: str = "key_padding_mask",
    mask_name: str = "attn_mask",
) -> tuple[Tensor | None, Tensor | None]:
    """Two masks of one kind. Of two kinds, torch warns and makes both floating; others it refuses."""
    kinds = {given.dtype for given in (padding, mask) if given is not None}
    if kinds <= {torch.bool} or kinds == {dtype}:
        return padding, mask
    mask_kind = F._none_or_dtype(mask)
    padding = F._canonical_mask(padding, padding_name, mask_kind, mask_name, dtype)
    return padding, F._canonical_mask(mask, mask_name, None, "", dtype, check_other=False)


class MultiheadAttention(ScriptsAsStock, nn.MultiheadAttention):
    r"""Drop-in for :class:`torch.nn.MultiheadAttention`: same constructor, parameters, keys and errors.

    ``o = softmax(scale * q k^T + mask) v`` for each head, between the input and output projections.

    The op runs when no attention weights are asked for (``need_weights=False``), which is what torch's own
    Transformer layers do. :meth:`stock_reason` says, for a call that the op does not cover, why torch's
    own code runs it: weights are asked for, ``bias_k``/``add_zero_attn``, nested or unbatched input.
    Dropout draws other numbers than torch's. A query with nothing to attend to gives 0 before the output
    projection, never NaN. As in torch's layer, ``out_proj`` holds parameters and is not called: no hook on
    it fires.

    Saved for backward: the input, the projected q, k, v, the attention output and one number a row.

    Raises:
        torch's own errors, from torch's own checks.

    Source: Vaswani et al., Attention Is All You Need (2017); :class:`torch.nn.MultiheadAttention`.

    Example:
        >>> import torch, bigkern
        >>> attention = bigkern.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 10, 64)
        >>> attention(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 10, 64])
    """

    def stock_reason(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
    ) -> str | None:
        """Why torch's own forward runs this call, or None if the attention op does."""
        if need_weights:
            return "attention weights are asked for (need_weights=True)"
        if self.training and self.dropout >= 1.0:
            return f"dropout {self.dropout}"
        if self.bias_k is not None or self.add_zero_attn:
            return "bias_k, bias_v or add_zero_attn is set"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensors"
        if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
            return "input without a batch dimension"
        if not self._well_formed(query, key, value, key_padding_mask, attn_mask):
            return "torch's own checks are to judge these shapes and dtypes"
        return None

    def _well_formed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> bool:
        """Whether shapes and dtypes are what the projections and the op expect."""
        batch, sequence = (0, 1) if self.batch_first else (1, 0)
        B, Sq, Sk = query.shape[batch], query.shape[sequence], key.shape[sequence]
        widths = (query.shape[2], key.shape[2], value.shape[2])
        if widths != (self.embed_dim, self.kdim, self.vdim) or key.shape[:2] != value.shape[:2]:
            return False
        if key.shape[batch] != B:
            return False
        kinds = (torch.bool, query.dtype)
        if key_padding_mask is not None and (
            key_padding_mask.dtype not in kinds or key_padding_mask.shape != (B, Sk)
        ):
            return False
        return attn_mask is None or (
            attn_mask.dtype in kinds and attn_mask.shape in ((Sq, Sk), (B * self.num_heads, Sq, Sk))
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        hint_alone = is_causal and attn_mask is None  # an error, which torch's forward words
        reason = self.stock_reason(query, key, value, key_padding_mask, need_weights, attn_mask)
        if hint_alone or reason is not None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        key_padding_mask, attn_mask = canonical_masks(key_padding_mask, attn_mask, query.dtype)
        q, k, v = self._project(query, key, value)  # each [B, S, E] or [S, B, E]
        q, k, v = (self._split_heads(x) for x in (q, k, v))
        causal = is_causal and key_padding_mask is None
        mask, bias = (None, None) if causal else self._masks(attn_mask, key_padding_mask, q.shape[0])
        dropout_p = self.dropout if self.training else 0.0
        o = attention(q, k, v, causal=causal, mask=mask, bias=bias, dropout_p=dropout_p)
        assert isinstance(o, Tensor)
        o = o.permute(0, 2, 1, 3) if self.batch_first else o.permute(2, 0, 1, 3)
        return linear(o.flatten(2), self.out_proj.weight, self.out_proj.bias), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            inputs = (query, key, value)
            q, k, v = (linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
            return q, k, v
        if query is key and key is value:
            q, k, v = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        E = self.embed_dim
        w_q, w_kv = self.in_proj_weight.split([E, 2 * E])
        b_q, b_kv = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split([E, 2 * E])
        q = linear(query, w_q, b_q)
        if key is value:
            k, v = linear(key, w_kv, b_kv).chunk(2, dim=-1)
            return q, k, v
        (w_k, w_v), (b_k, b_v) = w_kv.chunk(2), (None, None) if b_kv is None else b_kv.chunk(2)
        return q, linear(key, w_k, b_k), linear(value, w_v, b_v)

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, S, E] or [S, B, E] -> [B, H, S, D], a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)

    def _masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, B: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's two masks (bool: True forbids; float: added) as the op's (bool: True allows) and bias."""
        mask: Tensor | None = None
        bias: Tensor | None = None
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (B, self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        for given in (attn_mask, key_padding_mask):
            if given is None:
                continue
            if given.dtype == torch.bool:
                mask = ~given if mask is None else mask & ~given
            else:
                bias = given if bias is None else bias + given
        return mask, bias
