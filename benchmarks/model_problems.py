"""Whole models: a training step, or inference, of networks built from transformers' configs at random.

Stock and bigkern are the same model with the same weights: bigkern's is a copy of stock's, patched.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bigkern
from bigkern.core.parity import Verdict, Yardstick
from bigkern.core.problem import Inputs, Problem, judge
from bigkern.ops.adam.problems import adam
from bigkern.patch import Report
from bigkern.terminal.console import Failure

LIKE = "like"  # an empty input: the dtype and the device that the model is built in
SMALL = 1 << 20  # the optimizer is judged on parameters up to this size


@dataclass(frozen=True)
class Network:
    """A model by its config, without dropout; ``batch`` takes rows and their length: tokens, or a side."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Inputs]
    unit: str = "tokens"

    def stock(self) -> nn.Module:
        """A model of its own with the same weights each time."""
        return copy.deepcopy(_built(self))


@lru_cache(maxsize=1)  # building takes seconds, and memory
def _built(network: Network) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network.build()


# ---- the networks ----------------------------------------------------------------------------------


def need_transformers() -> None:
    """Raises Failure: transformers is absent or too old."""
    try:
        import bigkern.patch.transformers.attention  # noqa: F401
    except ImportError as error:
        raise Failure(f"models: {error}") from error


def gpt2(name: str = "GPT-2 124M", **sizes: Any) -> Network:
    def build() -> Any:
        from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(**dropouts, use_cache=False, **sizes))
        model.loss_type = "ForCausalLM"  # what transformers takes, but not without a warning
        return model

    def batch(rows: int, length: int) -> Inputs:
        ids = _ids(sizes.get("vocab_size", 50257), rows, length)
        return {"input_ids": ids, "labels": ids}

    return Network(name, build, batch)


def bert(name: str = "BERT-base", **sizes: Any) -> Network:
    """With a classifier of two classes; the second half of the rows ends in padding, up to a half of it."""

    def build() -> Any:
        from transformers.models.bert import BertConfig, BertForSequenceClassification

        dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        return BertForSequenceClassification(BertConfig(**dropouts, **sizes))  # type: ignore[arg-type]

    def batch(rows: int, length: int) -> Inputs:
        lengths = torch.linspace(1.5, 0.5, rows).clamp(max=1.0) * length
        mask = (torch.arange(length) < lengths[:, None]).long()
        ids = _ids(sizes.get("vocab_size", 30522), rows, length)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}

    return Network(name, build, batch)


def vit(name: str = "ViT-B/16", **sizes: Any) -> Network:
    def build() -> Any:
        from transformers.models.vit import ViTConfig, ViTForImageClassification

        return ViTForImageClassification(ViTConfig(num_labels=1000, **sizes))

    return Network(name, build, _images, "images")


def encoder_layer(width: int) -> Network:
    """torch's own Transformer layer alone, pre-norm, with a head for each 64 columns."""

    def batch(rows: int, length: int) -> Inputs:
        x = torch.randn(rows, length, width, generator=torch.Generator().manual_seed(0))
        return {"x": x, "labels": torch.arange(rows)}

    return Network(f"encoder layer D{width}", lambda: EncoderLayer(width), batch)


class EncoderLayer(nn.Module):
    """What it returns is called as transformers does; to have a loss, any will do."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.layer(x)
        return SimpleNamespace(logits=y, loss=None if labels is None else y.square().mean())


def resnet50(name: str = "ResNet-50", **sizes: Any) -> Network:
    def build() -> Any:
        from transformers.models.resnet import ResNetConfig, ResNetForImageClassification

        return ResNetForImageClassification(ResNetConfig(num_labels=1000, **sizes))

    return Network(name, build, _images, "images")


def convnext(name: str = "ConvNeXt-T", **sizes: Any) -> Network:
    def build() -> Any:
        from transformers.models.convnext import ConvNextConfig, ConvNextForImageClassification

        return ConvNextForImageClassification(ConvNextConfig(num_labels=1000, **sizes))

    return Network(name, build, _images, "images")


def _ids(vocabulary: int, rows: int, length: int) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def _images(rows: int, side: int) -> Inputs:
    pixels = torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.arange(rows)}


# ---- a problem -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelProblem(Problem):
    """So many rows, of so many tokens or pixels a side, through a network; its inputs are the batch."""

    network: Network
    rows: int
    length: int
    training: bool
    differentiable: bool = field(default=False)

    def make(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        made = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in self.network.batch(self.rows, self.length).items()
            if self.training or name != "labels"
        }
        return made | {LIKE: torch.empty(0, dtype=dtype, device=device)}

    def model(self, inputs: Inputs) -> nn.Module:
        """Stock's, in the mode that the problem is about."""
        return self.network.stock().to(inputs[LIKE]).train(self.training)

    def patched(self, inputs: Inputs) -> tuple[nn.Module, Report]:
        return patched(self.model(inputs))

    def judge(self, dtype: torch.dtype, device: torch.device) -> dict[str, Verdict]:
        """The parity rule for logits and gradients of the patched model, and for a step of the optimizer."""
        inputs = self.make(dtype, device)
        wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
        ours = self.results(self.patched(inputs)[0], inputs)
        yardstick = Yardstick(
            self.results(self.model(wide), wide), lambda: self.results(self.model(inputs), inputs)
        )
        verdicts = {name: yardstick.judge(name, value) for name, value in ours.items()}
        return verdicts | (self._judge_step(dtype, device) if self.training else {})

    def _judge_step(self, dtype: torch.dtype, device: torch.device) -> dict[str, Verdict]:
        sizes = [tuple(p.shape) for p in self.network.stock().parameters() if p.numel() <= SMALL]
        verdicts = judge(adam(sizes[:12], "of the model"), dtype, device)
        return {f"step's {name}": verdict for name, verdict in verdicts.items()}

    def results(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """Logits and, if it is about training, gradients: those of a module's own parameters in one.

        In one, since some alone are zero but for rounding: of a key's bias, which softmax does not see.
        """
        with torch.set_grad_enabled(self.training):
            output = call(model, inputs)
        found = {"logits": output.logits.detach()}
        if self.training:
            output.loss.backward()
            for name, module in getattr(model, "_orig_mod", model).named_modules():
                own = [p.grad.flatten() for p in module.parameters(recurse=False) if p.grad is not None]
                if own:
                    found[f"d {name}"] = torch.cat(own)
            model.zero_grad()
        return found


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What transformers returns: ``logits``, and ``loss`` where the inputs have labels."""
    return model(**{name: value for name, value in inputs.items() if name != LIKE})


def patched(model: nn.Module) -> tuple[nn.Module, Report]:
    """The model on our ops, its attention, too."""
    from bigkern.patch.transformers.attention import NAME, enable

    report = bigkern.patch(model)
    config: Any = getattr(model, "config", None)
    if config is not None and config._attn_implementation != NAME:
        with contextlib.suppress(ValueError):  # a network without attention
            enable(model)  # type: ignore[arg-type]
    return model, report


def problem(network: Network, rows: int, length: int, training: bool, *, flops: bool = False) -> ModelProblem:
    """``flops`` has the forward's multiplications and additions counted, on a model without weights."""
    what = "training" if training else "inference"
    size = f"{rows}x{length}" if network.unit == "tokens" else f"{rows}x{length}x{length}"
    return ModelProblem(
        "models",
        f"{network.name} {what} {size}",
        {},
        call,
        lambda inputs: ((inputs,), {}),
        lambda inputs: call(network.stock().to(inputs[LIKE]).eval(), inputs).logits,
        flops=forward_flops(network, rows, length) if flops else 0.0,
        network=network,
        rows=rows,
        length=length,
        training=training,
    )


def forward_flops(network: Network, rows: int, length: int) -> float:
    """Of products and convolutions, attention as if nothing were masked."""
    with torch.device("meta"):
        model: Any = network.build().eval()
        if hasattr(model, "config"):
            model.set_attn_implementation("eager")
            model.config.use_cache = True  # without one GPT-2 looks into its positions
    batch = {name: x.to("meta") for name, x in network.batch(rows, length).items() if name != "labels"}
    batch.pop("attention_mask", None)  # which is looked into
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    return float(counter.get_total_flops())
