"""Models: contract, features, sizes; against timm, torchvision and sums done by hand.  No network."""

import copy
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"

from conftest import ROOT  # noqa: E402

from common.models import ModelError, build_model, multiply_adds

SWIN = "timm:swin_tiny_patch4_window7_224"
REGISTERS = "timm:vit_small_patch14_reg4_dinov2"  # one class token and four registers


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may ask a hub."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def images(side=32, count=2, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def forward(model, pixels):
    with torch.no_grad():
        return model.eval()({"image": pixels})


def refusal(call, *args, **kwargs):
    """The one line that a ModelError says."""
    with pytest.raises(ModelError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------- shapes and numbers


def resnet_parameters(blocks, classes):
    """Convolutions without bias, two numbers a channel for each BatchNorm."""
    total, width_in = 3 * 64 * 9 + 2 * 64, 64
    for count, width in zip(blocks, (64, 128, 256, 512)):
        for _ in range(count):
            total += 9 * width_in * width + 9 * width * width + 4 * width
            if width_in != width:
                total += width_in * width + 2 * width
            width_in = width
    return total + 512 * classes + classes


def vit_parameters(depth, patch, side, classes, dim=192):
    norms, qkv, proj = 2 * 2 * dim, 3 * dim * dim + 3 * dim, dim * dim + dim
    block = norms + qkv + proj + (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim)
    tokens = (side // patch) ** 2 + 1
    return 3 * patch**2 * dim + dim + dim + tokens * dim + depth * block + 2 * dim + dim * classes + classes


@pytest.mark.parametrize(
    "name, patch, width, family, parameters",
    [
        ("resnet8", None, 512, "cnn", resnet_parameters([1, 1, 1, 1], 10)),
        ("resnet18", None, 512, "cnn", resnet_parameters([2, 2, 2, 2], 10)),
        ("vit_6_192", None, 192, "vit", vit_parameters(6, 4, 32, 10)),
        ("vit_6_192", 8, 192, "vit", vit_parameters(6, 8, 32, 10)),
        ("vit_tiny", 4, 192, "vit", vit_parameters(12, 4, 32, 10)),
        ("vit_tiny", 8, 192, "vit", vit_parameters(12, 8, 32, 10)),
    ],
)
def test_our_models(name, patch, width, family, parameters):
    model = build_model(name, 10, 32, patch)
    out = forward(model, images())
    assert {key: tuple(value.shape) for key, value in out.items()} == {"logits": (2, 10), "embedding": (2, width)}
    head = model.backbone.fc if family == "cnn" else model.backbone.head
    torch.testing.assert_close(out["logits"], head(out["embedding"]).detach())
    assert model.num_parameters == parameters == sum(p.numel() for p in model.parameters())
    assert model.family == family and model.name == name and model.mean is None
    rebuilt = build_model(**model.build_args)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(forward(rebuilt, images())["logits"], out["logits"])


def test_known_sizes():
    """11,173,962 is the usual ResNet-18 for CIFAR-10."""
    assert resnet_parameters([2, 2, 2, 2], 10) == 11_173_962 and resnet_parameters([1, 1, 1, 1], 10) == 4_903_242
    assert vit_parameters(12, 4, 32, 10) == 5_362_762


def test_resnet18_is_torchvisions_with_another_stem():
    from torchvision.models import resnet18

    reference = resnet18(num_classes=7)
    reference.conv1, reference.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    model = build_model("resnet18", 7, 16)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that are not those of a fresh model
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    state = {k.replace("shortcut", "downsample"): v for k, v in model.backbone.state_dict().items()}
    reference.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected = reference.eval()(images(16))
    torch.testing.assert_close(forward(model, images(16))["logits"], expected)
    shapes = {f"layer{i}": (2, 32 << i, 32 >> i, 32 >> i) for i in (1, 2, 3, 4)}  # (2, 64, 16, 16) to (2, 512, 2, 2)
    model.set_feature_layers(list(shapes))
    assert {k: tuple(v.shape) for k, v in forward(model, images(16))["features"].items()} == shapes


@pytest.mark.parametrize("name, depth", [("vit_6_192", 6), ("vit_tiny", 12)])
def test_vit_is_timms(name, depth):
    """Width 192, 3 heads, a class token, the MLP four times as wide: timm's class with these arguments, strictly."""
    from timm.models.vision_transformer import VisionTransformer

    reference = VisionTransformer(16, 4, num_classes=7, embed_dim=192, depth=depth, num_heads=3, mlp_ratio=4)
    model = build_model(name, 7, 16)
    reference.load_state_dict(model.backbone.state_dict(), strict=True)
    with torch.no_grad():
        expected = reference.eval()(images(16))
    torch.testing.assert_close(forward(model, images(16))["logits"], expected, rtol=1e-4, atol=1e-5)


def test_vit_at_another_resolution():
    """Positions follow the image, as local crops need it: timm's own at 24 px, the weights untouched."""
    import timm

    model = build_model("vit_6_192", 3, 16)
    options = {"patch_size": 4, "depth": 6, "num_classes": 3}
    reference = timm.create_model("vit_tiny_patch16_224", img_size=24, **options)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    state = timm.models.vision_transformer.checkpoint_filter_fn(dict(before), reference)
    assert state["pos_embed"].shape == (1, 37, 192)
    reference.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected = reference.eval()(images(24))
    torch.testing.assert_close(forward(model, images(24))["logits"], expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize("name, patch", [("vit_tiny_patch16_224", 4), ("timm:test_vit", 8), (SWIN, 2)])
def test_patch_size_of_timm_models(name, patch):
    """It counts the tokens of the first layer, and is kept in a checkpoint."""
    model = build_model(name, 3, 32, patch)
    first = model.backbone.patch_embed(images())
    tokens = first.shape[1] if first.dim() == 3 else first.shape[1] * first.shape[2]
    assert tokens == (32 // patch) ** 2
    rebuilt = build_model(**model.build_args)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(forward(rebuilt, images())["logits"], forward(model, images())["logits"])


# ------------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize(
    "name, side, family, shapes",
    [
        ("timm:resnet10t", 64, "cnn", {"layer2": (128, 8, 8), "layer4": (512, 2, 2)}),
        ("timm:test_efficientnet", 64, "cnn", {"blocks.1": (24, 16, 16)}),
        ("timm:test_vit", 64, "vit", {"blocks.1": (64, 4, 4), "blocks.5": (64, 4, 4)}),
        (SWIN, 64, "vit", {"layers.0": (96, 16, 16), "layers.3": (768, 2, 2)}),
        (REGISTERS, 56, "vit", {"blocks.1": (384, 4, 4)}),
    ],
)
def test_timm_models(name, side, family, shapes):
    """Contract, and the same features by forward_intermediates and by hooks."""
    model = build_model(name, 5, side)
    pixels = images(side)
    plain = forward(model, pixels)
    with torch.no_grad():
        assert torch.equal(plain["logits"], model.backbone(pixels))
    assert plain["logits"].shape == (2, 5) and plain["embedding"].dim() == 2 and "features" not in plain
    assert model.family == family
    model.set_feature_layers(list(shapes))
    assert list(model._indices) == list(shapes)
    known = forward(model, pixels)
    assert torch.equal(known["logits"], plain["logits"])
    first = {"timm:resnet10t": "conv1", "timm:test_efficientnet": "conv_stem"}.get(name, "patch_embed")
    model.set_feature_layers([first, *shapes])  # a layer that timm does not list: hooks for all
    assert not model._indices
    hooked = forward(model, pixels)
    assert torch.equal(hooked["logits"], plain["logits"])
    for layer, shape in shapes.items():
        assert known["features"][layer].shape == (2, *shape)
        torch.testing.assert_close(hooked["features"][layer], known["features"][layer])
    grid = hooked["features"][first]
    assert grid.dim() == 4 and grid.shape[2] == grid.shape[3], "channels first, whatever the layer's format"
    if family == "vit":
        first_shape = next(iter(shapes.values()))  # of a ViT's block or of Swin's first stage
        assert grid.shape[1:] == first_shape
    model.set_feature_layers([])
    assert "features" not in forward(model, pixels)


def test_prefix_tokens_are_removed():
    """Against the blocks run by hand: a class token and four registers, then patches row by row."""
    model = build_model(REGISTERS, 2, 56)
    net, pixels = model.backbone, images(56)
    model.set_feature_layers(["blocks.2", "patch_embed"])
    out = forward(model, pixels)["features"]
    with torch.no_grad():
        patches = net.patch_embed(pixels)  # (B, 16, D)
        tokens = net.norm_pre(net.patch_drop(net._pos_embed(patches)))
        for block in net.blocks[:3]:
            tokens = block(tokens)
    assert tokens.shape[1] == 1 + 4 + 16
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(out["blocks.2"][:, :, row, column], tokens[:, 5 + row * 4 + column])
            torch.testing.assert_close(out["patch_embed"][:, :, row, column], patches[:, row * 4 + column])


def test_vit_features_by_hand():
    model = build_model("vit_6_192", 2, 16)
    net, pixels = model.backbone, images(16)
    model.set_feature_layers(["blocks.1", "norm", "patch_embed"])
    out = forward(model, pixels)["features"]
    with torch.no_grad():
        grid = F.conv2d(pixels, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=4)  # (B, 192, 4, 4)
        tokens = torch.cat([net.cls_token.expand(2, -1, -1), grid.flatten(2).transpose(1, 2)], 1) + net.pos_embed
        tokens = net.blocks[1](net.blocks[0](tokens))
    expected = tokens[:, 1:].reshape(2, 4, 4, 192).permute(0, 3, 1, 2)
    torch.testing.assert_close(out["blocks.1"], expected)
    torch.testing.assert_close(out["patch_embed"], grid)
    assert list(out) == ["blocks.1", "norm", "patch_embed"], "in the order asked for: losses pair them"


def test_order_of_layers():
    model = build_model("timm:test_vit", 2, 32)
    model.set_feature_layers(["blocks.4", "blocks.0"])
    back = forward(model, images())["features"]
    model.set_feature_layers(["blocks.0", "blocks.4"])
    there = forward(model, images())["features"]
    assert list(back) == ["blocks.4", "blocks.0"] and list(there) == ["blocks.0", "blocks.4"]
    assert all(torch.equal(back[layer], there[layer]) for layer in back)
    assert not torch.equal(back["blocks.0"], back["blocks.4"])


def test_the_head_is_a_layer_too():
    model = build_model("resnet8", 4, 16)
    model.set_feature_layers(["layer4", "fc"])
    for seed in (0, 1):
        out = forward(model, images(16, seed=seed))
        assert torch.equal(out["features"]["fc"][:, :, 0, 0], out["logits"])


@pytest.mark.parametrize(
    "name, listed",
    [("resnet8", ["layer3", "layer3.0", "fc"]), ("vit_6_192", ["blocks.5", "norm"]), ("timm:resnet10t", ["layer4"])],
)
def test_unknown_layers_are_answered_with_the_valid_ones(name, listed):
    model = build_model(name, 4, 32)
    text = refusal(model.set_feature_layers, ["layer9"])
    assert "'layer9'" in text and name in text
    offered = text.split("; it has ")[1].split(", ")
    assert {*listed} <= {*offered} and len(offered) < 40
    model.set_feature_layers([layer for layer in offered if layer != "head.drop"])
    assert list(forward(model, images())["features"]) == model.feature_layers, "each that is offered works"
    assert "twice" in refusal(model.set_feature_layers, ["conv1", "conv1"] if "resnet" in name else ["norm", "norm"])
    assert "''" in refusal(model.set_feature_layers, [""])


def test_a_copy_of_a_model_has_features_of_its_own():
    """The average of the weights (EMA) is a deep copy, made after the hooks."""
    model = build_model("resnet8", 4, 16)
    model.set_feature_layers(["layer2"])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.conv1.weight.mul_(2).add_(0.1)
    one, two = (forward(m, images(16))["features"]["layer2"] for m in (model, other))
    assert not torch.allclose(one, two)
    assert torch.equal(forward(model, images(16))["features"]["layer2"], one)


@pytest.mark.parametrize(
    "name, layers", [("resnet8", ["layer3"]), ("vit_6_192", ["blocks.1"]), ("timm:test_vit", ["blocks.1"])]
)
def test_features_of_compiled_models(name, layers):
    """Layers are named before compiling, as distill.py does; every call brings its own maps, with gradients."""
    torch.compiler.reset()
    model = build_model(name, 4, 32)
    model.set_feature_layers(layers)
    expected = [forward(model, images(seed=s)) for s in (0, 1)]
    model.compile(backend="eager", fullgraph=True)
    for seed in (0, 1, 0):
        got = forward(model, images(seed=seed))
        torch.testing.assert_close(got["features"][layers[0]], expected[seed]["features"][layers[0]])
        torch.testing.assert_close(got["logits"], expected[seed]["logits"])
    model({"image": images()})["features"][layers[0]].sum().backward()
    assert next(model.parameters()).grad.abs().sum() > 0
    torch.compiler.reset()


# -------------------------------------------------------------------------------------------------------- multiply-adds


def test_multiply_adds_by_hand():
    """Each counted once: half of the FLOPs."""
    side, total, width_in = 32, 32 * 32 * 27 * 64, 64
    for i, width in enumerate((64, 128, 256, 512)):
        side = 32 >> i
        total += side**2 * 9 * (width_in + width) * width
        if width_in != width:
            total += side**2 * width_in * width
        width_in = width
    assert multiply_adds(build_model("resnet8", 10, 32), 32) == total + 512 * 10

    def vit(depth, dim, patch, side, classes):
        patches = (side // patch) ** 2
        tokens = patches + 1
        attention = tokens * dim * 3 * dim + 2 * tokens**2 * dim + tokens * dim**2
        return patches * 3 * patch**2 * dim + depth * (attention + 2 * tokens * dim * 4 * dim) + dim * classes

    assert multiply_adds(build_model("vit_6_192", 10, 32, 8), 32) == vit(6, 192, 8, 32, 10)
    assert multiply_adds(build_model("vit_6_192", 10, 32, 8), 64) == vit(6, 192, 8, 64, 10)
    from timm.models.vision_transformer import VisionTransformer

    model = build_model("vit_6_192", 3, 16)
    model.backbone = VisionTransformer(16, 4, num_classes=3, embed_dim=48, depth=2, num_heads=3)
    assert multiply_adds(model.train(), 16) == vit(2, 48, 4, 16, 3)
    assert model.training


# -------------------------------------------------------------------------------------------------------------- copying


def test_each_file_copies_out_alone(tmp_path):
    """losses, metrics, models, augment need no other file of common."""
    names = ("losses", "metrics", "models", "augment")
    for name in names:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "common" / f"{name}.py", tmp_path / name)
    code = """
import sys
for name in sys.argv[2:]:
    sys.path.insert(0, f"{sys.argv[1]}/{name}")
    __import__(name)
    sys.path.pop(0)
assert not [name for name in sys.modules if name.split(".")[0] == "common"]
"""
    command = [sys.executable, "-I", "-c", code, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
