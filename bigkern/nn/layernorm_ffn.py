"""``FeedForward``: two linear layers and an activation in one op; ``LayerNormFFN``: with norm, residual."""

from __future__ import annotations

from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from bigkern.core.checks import check_choice, check_eps, check_factory, check_flag, check_size
from bigkern.core.dropout import check_dropout
from bigkern.nn.frozen import FrozenLinear, frozen_feed_forward
from bigkern.nn.layer_norm import LayerNorm, RMSNorm
from bigkern.nn.torchscript import refuse
from bigkern.ops.layernorm_ffn import layernorm_ffn
from bigkern.ops.layernorm_ffn.call import GATED, Activation, Placement, Save


class FeedForward(nn.Module):
    r"""Two linear layers around an activation, in one op.

    ``y = drop(linear2(drop(act(linear1(x)))))``, plus x with ``residual``

    Parameters are those of the torch layers that it stands for, with torch's initialisation:
    ``linear1.weight``, ``linear1.bias``, ``linear2.weight``, ``linear2.bias``. The layers hold parameters
    only: hooks on them do not run.

    Args:
        d_model: D, the size of the last dimension of the input.
        dim_feedforward: F, the width between the two linear layers; a gated activation makes
            ``linear1`` ``[2F, D]``, the gate's rows first.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"silu"``, ``"swiglu"`` or ``"geglu"``.
        bias: whether the linear layers have biases.
        dropout: on ``linear2``'s output while training, in [0, 1).
        device, dtype: of the parameters.
        hidden_dropout: on the activation while training, in [0, 1).
        residual: whether x is added.
        save: what is kept for the backward, ``"preactivation"`` or ``"input"``: less memory for one more
            forward.

    Shapes: ``x [..., D]`` to ``[..., D]``; float32, bfloat16, float16; float64 on stock.

    Saved for backward: x, and with ``save="preactivation"`` the preactivation.

    Raises:
        ValueError: activation or save is not one of the above, a probability is not in [0, 1), or dtype is
            not floating point; else as :func:`bigkern.layernorm_ffn`.

    Source: Vaswani et al., Attention Is All You Need (2017); Shazeer, GLU Variants Improve Transformer
    (2020).

    Example:
        >>> import torch, bigkern
        >>> bigkern.nn.FeedForward(64, 256, activation="swiglu", bias=False)(torch.randn(2, 16, 64)).shape
        torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        activation: Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        hidden_dropout: float = 0.0,
        residual: bool = False,
        save: Save = "preactivation",
    ) -> None:
        super().__init__()
        check_choice("activation", activation, get_args(Activation))
        check_choice("save", save, get_args(Save))
        for name, size in (("d_model", d_model), ("dim_feedforward", dim_feedforward)):
            check_size(name, size)
        for name, p in (("dropout", dropout), ("hidden_dropout", hidden_dropout)):
            check_dropout(p, name)
        check_flag("bias", bias)
        check_flag("residual", residual)
        check_factory(device, dtype)
        self.activation, self.residual, self.save = activation, residual, save
        self.dropout, self.hidden_dropout = dropout, hidden_dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = 2 * dim_feedforward if activation in GATED else dim_feedforward
        self.linear1 = nn.Linear(d_model, rows, bias, **factory)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self._block(x, norm="none")

    def _block(self, x: Tensor, *norm_parameters: Tensor | None, **norm: Any) -> Tensor:
        if isinstance(self.linear1, FrozenLinear):
            return self._frozen_block(x, *norm_parameters, **norm)
        return layernorm_ffn(
            x,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            *norm_parameters,
            activation=self.activation,
            residual=self.residual,
            dropout_p=self.dropout if self.training else 0.0,
            hidden_dropout_p=self.hidden_dropout if self.training else 0.0,
            save=self.save,
            **norm,
        )

    def _frozen_block(self, x: Tensor, *norm_parameters: Tensor | None, **norm: Any) -> Tensor:
        if self.training and max(self.dropout, self.hidden_dropout) > 0.0:
            raise RuntimeError("a frozen block has no dropout: call eval(), or set dropout to 0")
        options = {"activation": self.activation, "residual": self.residual, **norm}
        return frozen_feed_forward(x, self.linear1, self.linear2, *norm_parameters, **options)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse(type(self).__name__)

    def extra_repr(self) -> str:
        names = ("activation", "dropout", "hidden_dropout", "residual", "save")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class LayerNormFFN(FeedForward):
    r"""Norm, two linear layers, an activation and the residual around them, in one op.

    ``pre``:  ``y = x + drop(linear2(drop(act(linear1(norm(x))))))``
    ``post``: ``y = norm(x + drop(linear2(drop(act(linear1(x))))))``

    Parameters as :class:`FeedForward`'s, and ``norm.weight``, ``norm.bias`` (not for ``"rms"``).

    Args:
        d_model, dim_feedforward, activation, bias, dropout, device, dtype, hidden_dropout, save: as
            :class:`FeedForward`'s; bias is LayerNorm's too.
        norm: ``"layer"`` or ``"rms"``.
        placement: ``"pre"`` or ``"post"``.
        eps: added to the norm's variance or mean square.

    Shapes: ``x [..., D]`` to ``[..., D]``; float32, bfloat16, float16; float64 on stock.

    Saved for backward: x; with ``save="preactivation"`` also the preactivation and the fp32 statistics of
    each row, and for post the norm's input.

    Raises:
        ValueError: norm or placement is not one of the above; else as :class:`FeedForward`.

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
        norm: Literal["layer", "rms"] = "layer",
        placement: Placement = "pre",
        bias: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        hidden_dropout: float = 0.0,
        save: Save = "preactivation",
    ) -> None:
        check_choice("norm", norm, ("layer", "rms"))
        check_choice("placement", placement, get_args(Placement))
        check_eps(eps)
        super().__init__(
            d_model, dim_feedforward, activation, bias, dropout, device, dtype, hidden_dropout, True, save
        )
        self.placement, self.eps = placement, eps
        self.norm: LayerNorm | RMSNorm
        if norm == "layer":
            self.norm = LayerNorm(d_model, eps, bias=bias, device=device, dtype=dtype)
        else:
            self.norm = RMSNorm(d_model, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.norm.bias if isinstance(self.norm, LayerNorm) else None
        return self._block(
            x,
            self.norm.weight,
            bias,
            norm="layer" if isinstance(self.norm, LayerNorm) else "rms",
            placement=self.placement,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, placement={self.placement!r}"
