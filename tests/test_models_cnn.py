"""The CNN families: published counts and keys, parity with plain torch, folding, formats, timm, errors."""

from __future__ import annotations

import copy
import hashlib
import pickle
import re
from typing import Any

import parity
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigkern.nn
from bigkern.core.parity import Yardstick
from bigkern.models import cnn
from bigkern.models.cnn import inception
from bigkern.models.cnn.convnext import Block, LayerNorm2d

# Parameters as torchvision publishes them with its weights, and the sha256 of its state dict's sorted
# "key shape" lines; both from torchvision 0.28.0.
ARCHITECTURES = {
    "convnext_tiny": (28589128, "ddd0f74f783edf2b61768911145612faf5673df05b0603b55ea91cff555c52f5"),
    "convnext_small": (50223688, "6c5c4d12ec41e5f726b47543a07140421e20bef8353b7571401aba533de775f2"),
    "convnext_base": (88591464, "a2ebf7cb239916290bc777484273ea6b266605d8995b3a4a094be3b66469034d"),
    "convnext_large": (197767336, "b0ce25f12797812be9b45fd9bbc88d012fca0a8e4fb8bd515678d6bff61309d6"),
    "inception_v3": (27161264, "4c9e13f64584de741d008cd24d3aae249cd3871df374ba3da192ffb031ba7376"),
    "resnet18": (11689512, "5191d63ec398959223d67ef37376f9061e6965b859fc2d4e40e23d037147a0d7"),
    "resnet34": (21797672, "f8de2a1812ef85e46b3f60c61589921afee0c2a6d4165e27508ad215f101671b"),
    "resnet50": (25557032, "a87e91cd6bd1f939e0b723852e567a7205d33b0ac984ac02dd1a5f225d37c036"),
    "resnet101": (44549160, "dbc3ca74fffafc728641ec2b524ccedcbae337de9d3e3cf1f0552330d07303ea"),
    "resnet152": (60192808, "7d486dbdc941506eeed76c4b06e6a00c943ff5aa11c0ced1b2e1b12faebd4729"),
    "resnext50_32x4d": (25028904, "20929ac81dfcc94f1881e0e17fe3e5466d5b44c9be2adc47868c4a8b1be05281"),
    "wide_resnet50_2": (68883240, "03413d59409d9728773d8fcf2d05d4271112b6717944913ce0c044e3eb81054c"),
    "vgg11": (132863336, "b11acd4f90d9643fb47e4326d0f40d1ae7ee580b0509f272826300b0996358c2"),
    "vgg11_bn": (132868840, "56ed5816909a813293b13a7b24c808b5f2594f625d2f5b4ae45cac233d75a268"),
    "vgg13": (133047848, "79ca8fd7a1480aa7c17b8cdc8d302bc34640bccfe080031fa21b40f7b70edc21"),
    "vgg13_bn": (133053736, "e4f52ce016e5e82f373b5f48665a1bbeb1a16e6ead9829c72cfed1b3d6635444"),
    "vgg16": (138357544, "ba63c2556d912509cba94697742dd762a05c284047650150bab0c2ddc806bb59"),
    "vgg16_bn": (138365992, "86bad13b66635552f31b1a53eaf739fc05bf6111f696e97fd006755355d50d26"),
    "vgg19": (143667240, "393fac8b08b63fbee1e3ef721e98f1710adc57be373a2067ea1af78fc5ccb504"),
    "vgg19_bn": (143678248, "faf0fdbb92f698c6862d90e64500a658c4328d5dbadfc9e24785038b3c1208a6"),
}
TIMM_CONVNEXT_TINY = "b07384a3160b01d850e9042eb3442abca07273e806ead68b65b095d2d85b9032"  # timm 1.0.31


def digest(state_dict: dict[str, Tensor]) -> str:
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in state_dict.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_named_architectures_are_the_published_ones(name: str) -> None:
    count, keys = ARCHITECTURES[name]
    size = 299 if name == "inception_v3" else 224
    with torch.device("meta"):
        model = getattr(cnn, name)().eval()
        logits = model(torch.empty(2, 3, size, size))
    assert sum(p.numel() for p in model.parameters()) == count
    assert digest(model.state_dict()) == keys
    assert logits.shape == (2, 1000)


def test_small_cnn_is_its_formula() -> None:
    model = cnn.small_cnn(10, in_channels=1, image_size=8, widths=(6, 16), hidden=84)
    convolutions = (9 + 1) * 6 + (9 * 6 + 1) * 16
    assert sum(p.numel() for p in model.parameters()) == convolutions + (64 + 1) * 84 + (84 + 1) * 10
    assert cnn.small_cnn(in_channels=3, image_size=32)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_inception_has_a_second_classifier_in_training() -> None:
    with torch.device("meta"):
        outputs = cnn.inception_v3(7)(torch.empty(2, 3, 299, 299))
    assert isinstance(outputs, cnn.InceptionOutputs)
    assert outputs.logits.shape == outputs.aux_logits.shape == (2, 7)
    with torch.device("meta"):
        model = cnn.inception_v3(7, aux_logits=False)
        assert model(torch.empty(2, 3, 107, 139)).shape == (2, 7)
    assert not any(name.startswith("AuxLogits") for name in model.state_dict())


# ---- parity with plain torch -----------------------------------------------------------------------


class StockNorm(nn.BatchNorm2d):
    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y = y if residual is None else y + residual
        return F.relu(y) if self.activation else y


class StockNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StockBlock(nn.Module):
    """torchvision's formula."""

    def forward(self: Any, x: Tensor) -> Tensor:
        conv, norm, up, down = self.block.values()
        y = F.layer_norm(conv(x).permute(0, 2, 3, 1), norm.normalized_shape, norm.weight, norm.bias, 1e-6)
        y = self.layer_scale * down(F.gelu(up(y))).permute(0, 3, 1, 2)
        if self.training and self.drop_p > 0:
            kept = torch.empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.drop_p)
            y = y * (kept / (1 - self.drop_p)).to(x.dtype)
        return x + y


STOCK = {bigkern.nn.BatchNorm2d: StockNorm, LayerNorm2d: StockNorm2d, Block: StockBlock}


def twin(model: nn.Module) -> nn.Module:
    """The same network with the formulas written in plain torch."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = STOCK.get(type(module), type(module))  # type: ignore[assignment]
    return model


def lively(model: nn.Module) -> nn.Module:
    """Norms and layer scales that a wrong use of them would show in."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_mean") or (tensor.dim() == 1 and name.endswith("bias")):
                tensor.normal_(0.0, 0.2)
            elif name.endswith(("running_var", "layer_scale")) or ("bn" in name and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
    return model


def results(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits and all gradients."""
    torch.manual_seed(3)  # of what is dropped
    images = images.clone().requires_grad_()
    logits = model(images)
    weights = torch.arange(logits.numel()).view_as(logits).to(logits).cos()
    (logits * weights).sum().backward()
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return {"logits": logits, "d images": images.grad, **gradients}  # type: ignore[dict-item]


def assert_parity(model: nn.Module, images: Tensor) -> None:
    yardstick = Yardstick(
        results(twin(model).double(), images.double()), lambda: results(twin(model), images)
    )
    parity.assert_parity("models", "cpu", results(model, images), yardstick)


SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "small": ({"widths": (8, 8), "hidden": 16, "in_channels": 3, "image_size": 12, "batch_norm": True}, 12),
    "vgg": ({"widths": (8, 8), "depths": (1, 2), "hidden": 16, "batch_norm": True, "dropout": 0.0}, 16),
    "resnet": ({"widths": (8, 8), "depths": (2, 1), "block": "basic"}, 32),
    "resnext": ({"widths": (8, 8), "depths": (1, 2), "groups": 2, "width_per_group": 32}, 32),
    "convnext": ({"widths": (16, 32), "depths": (2, 2), "layer_scale": 0.5, "stochastic_depth": 0.4}, 32),
}


def small(family: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    kind: Any = "resnet" if family == "resnext" else family
    return lively(cnn.build(cnn.CNNConfig(kind, num_classes=5, **{**SMALL[family][0], **options})))


def images_of(family: str, batch: int = 4) -> Tensor:
    size = SMALL[family][1]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", SMALL)
def test_parity_with_plain_torch(family: str, training: bool) -> None:
    assert_parity(small(family).train(training), images_of(family))


def test_running_statistics_are_stocks() -> None:
    model = small("resnext")
    stock = twin(model)
    for network in (model, stock):
        network(images_of("resnext"))
    for (name, ours), theirs in zip(model.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")


MIXED = {
    "5": lambda: inception.mixed_5(8, pooled=4),
    "6a": lambda: inception.mixed_6a(8),
    "6": lambda: inception.mixed_6(8, inner=6),
    "7a": lambda: inception.mixed_7a(8),
    "7": lambda: inception.mixed_7(8),
}


@pytest.mark.parametrize("name", MIXED)
def test_parity_of_inceptions_branches(name: str) -> None:
    torch.manual_seed(1)
    assert_parity(lively(MIXED[name]()), torch.randn(2, 8, 7, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [3, 12], ids=["scale_outside", "scale_in_weights"])
def test_parity_of_a_convnext_block(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = Block(16, 0.5, drop_p=0.3)
    with torch.no_grad():
        block.layer_scale.uniform_(0.1, 1.0)
    block, x = block.to(dtype), torch.randn(2, 16, size, size).to(dtype)
    assert_parity(block, x.contiguous(memory_format=torch.channels_last))


def test_a_tiny_layer_scale_reaches_the_branch_in_float16() -> None:
    """As a factor of the weights it would vanish, and with it every gradient of the branch."""
    block = Block(16, 1e-6, drop_p=0.0).half()
    (block(torch.randn(2, 16, 12, 12).half()) * 4096.0).sum().backward()
    assert block.block["3"].weight.grad.abs().max() > 0


def test_autocast_gives_stocks_dtype() -> None:
    block = Block(16, 0.5, drop_p=0.5)
    x = torch.randn(4, 16, 12, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, stock = results(block, x)["logits"], results(twin(block), x)["logits"]
    assert ours.dtype == stock.dtype == torch.float32
    torch.testing.assert_close(ours, stock, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "convnext_tiny", "inception_v3", "vgg11_bn"])
def test_torchvision_computes_the_same(name: str) -> None:
    """From the same seed: the same start, logits in both modes and gradients."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    theirs = getattr(models, name)(**({"init_weights": True} if name == "inception_v3" else {}))
    torch.manual_seed(0)
    ours = getattr(cnn, name)()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    ours.load_state_dict(lively(theirs).state_dict())
    images = torch.randn(2, 3, 299, 299) if name == "inception_v3" else torch.randn(2, 3, 64, 64)
    for training in (True, False):
        logits, gradients = [], []
        for model in (ours, theirs):
            torch.manual_seed(1)
            outputs = model.train(training)(images)
            total = sum(outputs) if isinstance(outputs, tuple) else outputs
            logits.append(total.detach())
            gradients.append(torch.autograd.grad(total.square().mean(), next(model.parameters()))[0])
        for a, b in (logits, gradients):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


# ---- memory formats, folding -----------------------------------------------------------------------


@pytest.mark.parametrize("family", SMALL)
def test_channels_last_computes_the_same(family: str) -> None:
    model, images = small(family).eval(), images_of(family)
    expected = model(images)
    last = small(family, channels_last=True).eval()
    assert any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in last.parameters()
    )
    torch.testing.assert_close(last(images), expected)
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(images), expected)


def test_layer_norm_2d_copies_nothing() -> None:
    norm, x = LayerNorm2d(16), torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert norm(x).is_contiguous(memory_format=torch.channels_last)
    assert seen[0].permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("family", SMALL)
def test_folded_networks_compute_the_same(family: str) -> None:
    model, images = small(family).eval(), images_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = cnn.fold(model)
    yardstick = Yardstick(
        {"logits": twin(model).double()(images.double())}, lambda: {"logits": twin(model)(images)}
    )
    parity.assert_parity("models", "cpu", {"logits": folded(images)}, yardstick)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any("layer_scale" in name for name in folded.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_fold_knows_what_it_must_leave() -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU())
    shared = nn.Sequential(conv, norm, conv, nn.BatchNorm2d(3))
    hooked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    hooked[1].register_forward_hook(lambda *_: None)
    batch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    model = nn.ModuleList([plain, shared, hooked, batch]).eval()
    x = torch.randn(2, 3, 4, 4)
    folded = cnn.fold(model)
    left = [sum(isinstance(m, nn.BatchNorm2d) for m in part.modules()) for part in folded]
    assert left == [0, 2, 1, 1]
    assert [type(part).__name__ for part in folded[0]] == [
        "Identity",
        "FoldedConv2d",
        "ReLU",
        "Identity",
        "FoldedConv2d",
    ]
    for before, after in zip(model, folded, strict=True):
        torch.testing.assert_close(after(x), before(x))


def test_folded_convolutions_follow_shapes_weights_and_gradients() -> None:
    model = small("resnet").eval()
    folded = cnn.fold(model)
    for images in (images_of("resnet"), images_of("resnet", batch=1), torch.randn(2, 3, 40, 36)):
        torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)
    copies = copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))
    other = lively(small("resnet")).eval()
    folded.load_state_dict(cnn.fold(other).state_dict())
    torch.testing.assert_close(folded(images), other(images), rtol=1e-4, atol=1e-4)
    for kept in copies:
        torch.testing.assert_close(kept(images), model(images), rtol=1e-4, atol=1e-4)
    for factor in (0.5, 2.0):  # each into the memory that the ones before have left
        weights = {name: p * factor for name, p in folded.named_parameters()}
        expected = copy.deepcopy(folded)
        expected.load_state_dict(weights)
        found = torch.func.functional_call(folded, weights, images)
        torch.testing.assert_close(found, expected(images), rtol=1e-4, atol=1e-4)
        del weights
    images.requires_grad_()
    gradients = [torch.autograd.grad(network(images).sum(), images)[0] for network in (folded, other)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(folded.double()(images.double()), other.double()(images.double()))


def test_fold_refuses_training() -> None:
    model = small("resnet")
    with pytest.raises(RuntimeError, match="model is in training mode"):
        cnn.fold(model)
    model.eval().layer1[0].bn1.train()
    with pytest.raises(RuntimeError, match=r"layer1\.0\.bn1 is in training mode"):
        cnn.fold(model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not int"):
        cnn.fold(3)  # type: ignore[arg-type]


# ---- timm ------------------------------------------------------------------------------------------


def to_timm(name: str) -> str:
    name = re.sub(r"^features\.0\.", "stem.", name)
    name = re.sub(r"^features\.([246])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample.", name)
    name = re.sub(r"^features\.([1357])\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.", name)
    name = name.replace("block.0", "conv_dw").replace("block.2", "norm").replace("layer_scale", "gamma")
    name = name.replace("block.3", "mlp.fc1").replace("block.5", "mlp.fc2")
    return name.replace("classifier.0", "head.norm").replace("classifier.2", "head.fc")


def test_timms_state_dicts_load() -> None:
    with torch.device("meta"):
        ours = cnn.convnext_tiny().state_dict()
    theirs = {to_timm(k): t.flatten() if "layer_scale" in k else t for k, t in ours.items()}
    assert digest(theirs) == TIMM_CONVNEXT_TINY
    assert digest(cnn.from_timm(theirs)) == digest(ours)
    model = small("convnext")
    state = {to_timm(k): t.flatten() if "layer_scale" in k else t for k, t in model.state_dict().items()}
    small("convnext").load_state_dict(cnn.from_timm(state))
    with pytest.raises(
        ValueError, match=r"not timm's ConvNeXt's: stages\.0\.blocks\.0\.attn\.qkv, cls_token"
    ):
        cnn.from_timm({**state, "stages.0.blocks.0.attn.qkv": torch.ones(1), "cls_token": torch.ones(1)})


# ---- what torch does with modules; errors ----------------------------------------------------------


@pytest.mark.parametrize("family", ["small", "convnext"])
def test_copies_pickles_and_compiled_networks_agree(family: str) -> None:
    model, images = small(family), images_of(family)
    expected = model.eval()(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cnn.fold(model)):
        torch.testing.assert_close(other(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected, rtol=1e-4, atol=1e-4
    )


def test_a_state_dict_that_does_not_fit_is_listed() -> None:
    model = small("resnet")
    state = model.state_dict()
    state["fc.scale"] = state.pop("fc.bias")
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"fc\.bias".*Unexpected key.*"fc\.scale"'):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "lenet"}, "kind must be one of small, vgg, resnet, inception, convnext, not 'lenet'"),
        ({"kind": "vgg", "groups": 2}, "groups means nothing for kind 'vgg'"),
        ({"kind": "resnet", "num_classes": 0}, "num_classes must be at least 1, not 0"),
        ({"kind": "convnext", "widths": ()}, "widths must be one or more sizes"),
        ({"kind": "convnext", "widths": (8, 8)}, r"depths \(3, 3, 9, 3\) must be as many as widths \(8, 8\)"),
        ({"kind": "vgg", "dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"kind": "convnext", "stochastic_depth": -0.1}, "stochastic_depth must be in"),
        ({"kind": "resnet", "block": "wide"}, 'block must be "basic" or "bottleneck"'),
        ({"kind": "resnet", "block": "basic", "groups": 2}, "groups and width_per_group must be 1 and 64"),
        ({"kind": "small", "image_size": 3}, "image_size must be at least 4 to be halved 2 times, not 3"),
        ({"kind": "inception", "transform_input": True, "in_channels": 1}, "in_channels must be 3"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cnn.CNNConfig(**options)


def test_bad_calls_are_refused() -> None:
    with torch.device("meta"):
        network, x = cnn.inception_v3(), torch.empty(1, 3, 100, 298)
        with pytest.raises(ValueError, match=r"images must be at least 299 x 299 .* not 100 x 298"):
            network(x)
        assert network.eval()(x).shape == (1, 1000)
        for model, least in ((network, 75), (cnn.vgg11(), 32), (cnn.convnext_tiny(), 32)):
            with pytest.raises(ValueError, match=f"at least {least} x {least} .* not {least} x {least - 1}"):
                model(torch.empty(1, 3, least, least - 1))
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\], not \(1, 1, 32, 32\)"):
        small("resnet")(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="images must be 28 x 28, not 32 x 28"):
        cnn.small_cnn()(torch.randn(1, 3, 32, 28))
    with pytest.raises(ValueError, match="config must be of kind 'vgg', not 'resnet'"):
        cnn.VGG(cnn.CNNConfig("resnet"))
    with pytest.raises(TypeError, match="config must be a CNNConfig, not dict"):
        cnn.build({})  # type: ignore[arg-type]
