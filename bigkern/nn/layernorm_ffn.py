"""``LayerNormFFN``: the second half of a Transformer block as one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigkern.nn.layer_norm import LayerNorm, RMSNorm
from bigkern.ops.layernorm_ffn import GATED, Activation, Norm, Placement, Save, layernorm_ffn


class LayerNormFFN(nn.Module):
    r"""Norm, two linear layers, an activation and the residual around them, in one op.

    ``pre``:  ``y = x + drop(linear2(drop(act(linear1(norm(x))))))``
    ``post``: ``y = norm(x + drop(linear2(drop(act(linear1(x))))))``

    Parameters are those of the torch layers that it stands for, with torch's initialisation:
    ``norm.weight``, ``norm.bias`` (not for ``"rms"``), ``linear1.weight``, ``linear1.bias``,
    ``linear2.weight``, ``linear2.bias``. The layers hold parameters only: hooks on them do not run.

    Args:
        d_model: D, the size of the last dimension of the input.
        dim_feedforward: F, the width between the two linear layers; a gated activation makes
            ``linear1`` ``[2F, D]``, the gate's rows first.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"silu"``, ``"swiglu"`` or ``"geglu"``.
        norm: ``"layer"`` or ``"rms"``.
        placement: ``"pre"`` or ``"post"``.
        bias: whether the linear layers and LayerNorm have biases.
        dropout: on ``linear2``'s output while training, in [0, 1).
        eps: added to the norm's variance or mean square.
        device, dtype: of the parameters.
        hidden_dropout: on the activation while training, in [0, 1).
        save: what is kept for the backward, ``"preactivation"`` or ``"input"``: less memory for one more
            forward.

    Shapes: ``x [..., D]`` to ``[..., D]``; float32, bfloat16, float16; float64 on stock.

    Saved for backward: x; with ``save="preactivation"`` also the preactivation and the fp32 statistics of
    each row, and for post the norm's input.

    Raises:
        ValueError: activation, norm, placement or save is not one of the above, or a probability is not in
            [0, 1); else as :func:`bigkern.layernorm_ffn`.

    Source: Vaswani et al., Attention Is All You Need (2017).

    Example:
        >>> import torch, bigkern
        >>> ffn = bigkern.nn.LayerNormFFN(64, 256, activation="swiglu", norm="rms", bias=False)
        >>> ffn(torch.randn(2, 16, 64)).shape
        torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        activation: Activation = "gelu",
        norm: Norm = "layer",
        placement: Placement = "pre",
        bias: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        hidden_dropout: float = 0.0,
        save: Save = "preactivation",
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("activation", activation, Activation),
            ("norm", norm, Norm),
            ("placement", placement, Placement),
            ("save", save, Save),
        ):
            choices = allowed.__args__  # type: ignore[attr-defined]
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for name, p in (("dropout", dropout), ("hidden_dropout", hidden_dropout)):
            if not 0.0 <= p < 1.0:
                raise ValueError(f"{name} must be in [0, 1), not {p}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = 2 * dim_feedforward if activation in GATED else dim_feedforward
        self.activation, self.placement = activation, placement
        self.dropout, self.hidden_dropout = dropout, hidden_dropout
        self.eps, self.save = eps, save
        self.norm: LayerNorm | RMSNorm
        if norm == "layer":
            self.norm = LayerNorm(d_model, eps, bias=bias, **factory)
        else:
            self.norm = RMSNorm(d_model, eps, **factory)
        self.linear1 = nn.Linear(d_model, rows, bias, **factory)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return layernorm_ffn(
            x,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            self.norm.weight,
            self.norm.bias if isinstance(self.norm, LayerNorm) else None,
            norm="layer" if isinstance(self.norm, LayerNorm) else "rms",
            activation=self.activation,
            placement=self.placement,
            eps=self.eps,
            dropout_p=self.dropout if self.training else 0.0,
            hidden_dropout_p=self.hidden_dropout if self.training else 0.0,
            save=self.save,
        )

    def extra_repr(self) -> str:
        return (
            f"activation={self.activation!r}, placement={self.placement!r}, dropout={self.dropout}, "
            f"hidden_dropout={self.hidden_dropout}, save={self.save!r}"
        )
