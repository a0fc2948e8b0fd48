"""``BatchNorm2d``: torch's layer, with the residual addition and the ReLU that follow it in a CNN."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bigkern.core import registry
from bigkern.nn.torchscript import ScriptsAsStock
from bigkern.ops.batch_norm import Activation, batch_norm


class BatchNorm2d(ScriptsAsStock, nn.BatchNorm2d):
    r"""Drop-in for :class:`torch.nn.BatchNorm2d`: same constructor, parameters, buffers, keys and errors.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)``

    Args:
        num_features, eps, momentum, affine, track_running_stats, bias, device, dtype: as torch's.
        activation: None or ``"relu"``.

    Shapes: ``x [N, C, H, W]``, ``residual`` likewise or None, to the same; float32, bfloat16, float16;
    float64 on stock. The kernels read channels_last; other memory formats run on stock.

    Saved for backward: x, weight, fp32 mean and variance a channel; for a ReLU bias, or with a residual y.

    Raises:
        TypeError, RuntimeError, ValueError: as :func:`bigkern.batch_norm`; ValueError if x is not 4D.

    ``SyncBatchNorm.convert_sync_batchnorm`` knows neither residual nor activation: convert plain layers only.

    Source: Ioffe and Szegedy, Batch Normalization (2015); :class:`torch.nn.BatchNorm2d`.

    Example:
        >>> import torch, bigkern
        >>> layer = bigkern.nn.BatchNorm2d(8, activation="relu")
        >>> x, shortcut = torch.randn(2, 4, 8, 16, 16).unbind(0)
        >>> layer(x, residual=shortcut).shape
        torch.Size([4, 8, 16, 16])
    """

    activation: Activation | None = (
        None  # of the class: a layer of torch's that becomes one of these has none
    )

    def __init__(self, *args: Any, activation: Activation | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if activation not in (None, "relu"):
            raise ValueError(f"activation must be None or 'relu', not {activation!r}")
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None and self.activation is None and input.is_cpu and not registry.forced():
            return super().forward(input)  # no CPU kernel: asking would cost more than the call
        self._check_input_dim(input)
        return batch_norm(
            input,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            self._step(),
            self.eps,
            residual,
            self.activation,
        )

    def _step(self) -> float:
        """Count a training batch; the part of the way that running statistics move towards it."""
        if not (self.training and self.track_running_stats and self.num_batches_tracked is not None):
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _beyond_stock(self) -> str | None:
        return None if self.activation is None else "an activation"

    def extra_repr(self) -> str:
        said = str(super().extra_repr())
        return said if self.activation is None else f"{said}, activation={self.activation!r}"
