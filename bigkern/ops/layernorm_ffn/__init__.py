"""A Transformer's feed-forward block with its norm."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from bigkern.ops.layernorm_ffn.backends import LAYERNORM_FFN, summing
from bigkern.ops.layernorm_ffn.call import Activation, Norm, Placement, Save, check_sums


def layernorm_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: Norm = "layer",
    activation: Activation = "gelu",
    placement: Placement = "pre",
    residual: bool = True,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    save: Save = "preactivation",
    weight_grads: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""The second half of a Transformer block: norm, two linear layers, activation and residual.

    ``pre``:  ``y = x + drop(drop(act(norm(x) @ w1.T + b1)) @ w2.T + b2)``
    ``post``: ``y = norm(x + drop(drop(act(x @ w1.T + b1)) @ w2.T + b2))``
    no norm:  ``y = x + drop(drop(act(x @ w1.T + b1)) @ w2.T + b2)``

    Args:
        x: ``[..., D]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        w1: ``[F, D]``; for a gated activation ``[2F, D]``, the gate's rows first, then the others.
        b1: ``[F]``, gated ``[2F]``, or None.
        w2: ``[D, F]``.
        b2: ``[D]`` or None.
        norm_weight: ``[D]`` or None for 1.
        norm_bias: ``[D]`` or None for 0; must be None for ``norm="rms"``.
        norm: ``"layer"`` for LayerNorm, ``"rms"`` for RMSNorm, ``"none"``.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"``, or gated:
            ``"swiglu"`` = silu(gate) * up, ``"geglu"`` = gelu(gate) * up.
        placement: where the norm is: before the first product, or after the residual.
        residual: whether x is added.
        eps: added to the norm's variance or mean square; not negative.
        dropout_p: probability in [0, 1) with which each element is dropped before the residual is added;
            the others are divided by ``1 - dropout_p``. Always active if positive.
        hidden_dropout_p: the same for the activation, before the second product.
        seed, offset: two non-negative ints that fix what is dropped, on every backend alike; without a
            seed torch's generator does.
        save: what the backward finds: ``"preactivation"``, or ``"input"``, x alone, with the rest of the
            block computed again: less memory for one more forward, the same gradients.
        weight_grads: two fp32 tensors of w1's and w2's shapes, to which the backward adds the gradients
            of w1 and w2; ``w1.grad`` and ``w2.grad`` are left alone. Eager mode only.

    Returns:
        ``y`` of x's shape and dtype.

    Saved for backward: x, the parameters, and with ``save="preactivation"`` the preactivation (``[..., F]``,
    gated ``[..., 2F]``), the fp32 statistics of each row, and for post the norm's input. What is dropped is
    drawn again. Without a gradient to compute, nothing.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not x's.
        ValueError: shapes, devices, norm, activation, placement, eps, a probability, seed, offset, save or
            weight_grads do not fit.
        RuntimeError: weight_grads under torch.compile or a transform of torch.func.

    Source: Vaswani et al. (2017); Xiong et al., On Layer Normalization in the Transformer
    Architecture (2020); Shazeer, GLU Variants Improve Transformer (2020).

    Example:
        >>> import torch, bigkern
        >>> x, w1, w2 = torch.randn(2, 16, 64), torch.randn(256, 64), torch.randn(64, 256)
        >>> bigkern.layernorm_ffn(x, w1, None, w2, None, torch.ones(64), activation="silu").shape
        torch.Size([2, 16, 64])
    """
    candidate, call, needs_grad = LAYERNORM_FFN.decided(
        x, w1, b1, w2, b2, norm_weight, norm_bias, norm, activation, placement, residual, eps, dropout_p,
        hidden_dropout_p, seed, offset, save,
    )  # fmt: skip
    if weight_grads is not None:
        check_sums(weight_grads, call)
        candidate = summing(candidate, *weight_grads)
    return cast(Tensor, LAYERNORM_FFN.run(candidate, call, needs_grad))
