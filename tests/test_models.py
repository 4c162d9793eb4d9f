"""Models: contract, weights, features, rebuilding without a hub; against timm, torchvision and sums done by hand."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from conftest import ROOT  # noqa: E402

from common.models import ModelError, build_model, load_weights, multiply_adds  # noqa: E402

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


def test_vit_is_timms():
    from timm.models.vision_transformer import VisionTransformer

    reference = VisionTransformer(16, 4, num_classes=7, embed_dim=192, depth=6, num_heads=3)
    model = build_model("vit_6_192", 7, 16)
    names = {"patch_embed.": "patch_embed.proj.", ".qkv.": ".attn.qkv.", ".proj.": ".attn.proj."}
    names.update({"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"})
    state = {}
    for name, value in model.backbone.state_dict().items():
        for ours, theirs in names.items():
            if ours in name and (ours != ".proj." or name.startswith("blocks")):
                name = name.replace(ours, theirs)
        state[name] = value
    reference.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected = reference.eval()(images(16))
    torch.testing.assert_close(forward(model, images(16))["logits"], expected, rtol=1e-4, atol=1e-5)


def test_vit_at_another_resolution():
    """Positions follow the image: at 24 px as timm resamples them, at its own size untouched."""
    model = build_model("vit_6_192", 3, 16)
    assert model.backbone.positions(4, 4) is model.backbone.pos_embed
    resized = model.backbone.positions(6, 6)
    assert resized.shape == (1, 37, 192) and torch.equal(resized[:, 0], model.backbone.pos_embed[:, 0])
    with torch.no_grad():  # a ramp down the grid's rows stays a ramp down the rows
        rows = torch.arange(4.0).repeat_interleave(4)
        model.backbone.pos_embed.copy_(torch.cat([torch.zeros(1), rows])[None, :, None])
    ramp = model.backbone.positions(6, 6)[0, 1:, 0].view(6, 6)
    torch.testing.assert_close(ramp[:, 0], ramp[:, 5])
    assert (ramp[1:] > ramp[:-1]).all()
    assert forward(model, images(24))["logits"].shape == (2, 3)


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
    assert model._indices is not None
    known = forward(model, pixels)
    assert torch.equal(known["logits"], plain["logits"])
    first = {"timm:resnet10t": "conv1", "timm:test_efficientnet": "conv_stem"}.get(name, "patch_embed")
    model.set_feature_layers([first, *shapes])  # a layer that timm does not list: hooks for all
    assert model._indices is None
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
        grid = net.patch_embed(pixels)
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


# --------------------------------------------------------------------------------------------------------- Hugging Face


def hugging_face_configs():
    import transformers

    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {
        "vit": transformers.ViTConfig(**vit, image_size=32, patch_size=8),
        "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        "registers": transformers.Dinov2WithRegistersConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
            num_register_tokens=4,
        ),
        "deit": transformers.DeiTConfig(**vit, image_size=32, patch_size=8),
        "swin": transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        "bert": transformers.BertConfig(**vit),
    }  # fmt: skip


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """Folders as one downloads them: config and, of two, random weights (also as original.pth), the ViT's in bfloat16."""
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("hub")
    for name, config in hugging_face_configs().items():
        config.save_pretrained(folder / name)
        if name in ("vit", "resnet"):
            body = AutoModel.from_config(config).to(torch.bfloat16 if name == "vit" else torch.float32)
            body.save_pretrained(folder / name)
            torch.save(body.state_dict(), folder / name / "original.pth")
    processor = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    processor["image_processor_type"] = "ViTImageProcessor"
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(
    "name, width, family", [("vit", 32, "vit"), ("resnet", 16, "cnn"), ("registers", 32, "vit"), ("swin", 32, "vit")]
)
def test_hugging_face_models_are_rebuilt_without_a_hub(hub_folder, tmp_path, name, width, family):
    folder = tmp_path / "gone"
    shutil.copytree(hub_folder / name, folder)
    model = build_model(f"hf:{folder}", 5, 32)
    out = forward(model, images())
    assert {k: tuple(v.shape) for k, v in out.items()} == {"embedding": (2, width), "logits": (2, 5)}
    assert model.family == family
    torch.save({"args": model.build_args, "model": model.state_dict()}, tmp_path / "checkpoint.pth")
    shutil.rmtree(folder)
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    rebuilt = build_model(**saved["args"])
    rebuilt.load_state_dict(saved["model"], strict=True)
    assert torch.equal(forward(rebuilt, images())["logits"], out["logits"])
    assert rebuilt.build_args == model.build_args
    assert forward(rebuilt, images(64))["logits"].shape == (2, 5), "positions follow the image's size"


def test_hugging_face_weights_and_normalization(hub_folder):
    """Of a folder with weights in bfloat16: kept, in float32, with the mean and std that its processor names."""
    stored = torch.load(hub_folder / "vit" / "original.pth", weights_only=True)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    model = build_model(f"hf:{hub_folder / 'vit'}", 5, 32, pretrained=True)
    own = model.backbone.body.state_dict()
    assert own.keys() == stored.keys() and all(torch.equal(own[name], value.float()) for name, value in stored.items())
    assert {value.dtype for value in own.values()} == {torch.float32}
    assert (model.mean, model.std) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
    assert "pretrained" not in model.build_args
    fresh = build_model(f"hf:{hub_folder / 'vit'}", 5, 32)
    assert fresh.mean is None
    assert not torch.equal(fresh.backbone.body.embeddings.cls_token, model.backbone.body.embeddings.cls_token)
    assert build_model(f"hf:{hub_folder / 'resnet'}", 5, 32, pretrained=True).mean is None


@pytest.mark.parametrize("name, prefix", [("vit", 1), ("deit", 2), ("registers", 5), ("swin", 0), ("resnet", 0)])
def test_hugging_face_features(hub_folder, name, prefix):
    model = build_model(f"hf:{hub_folder / name}", 5, 32)
    assert model.backbone.num_prefix_tokens == prefix
    text = refusal(model.set_feature_layers, ["layer3"])
    blocks = [layer for layer in text.split("; it has ")[1].split(", ") if layer[-1].isdigit()]
    assert len(blocks) == 2
    model.set_feature_layers(blocks)
    got = forward(model, images())["features"]
    with torch.no_grad():
        hidden = model.backbone.body(pixel_values=images(), output_hidden_states=True).hidden_states
    if name == "resnet":
        torch.testing.assert_close(got[blocks[1]], hidden[-1])
    elif name == "swin":  # it normalizes its last hidden state
        assert got[blocks[1]].shape == (2, 32, 4, 4)
    else:
        tokens = hidden[1][:, prefix:]
        torch.testing.assert_close(got[blocks[0]], tokens.transpose(1, 2).reshape(2, 32, 4, 4))


def test_hugging_face_pooling(hub_folder):
    """The class token where there is one, else the mean of the patches."""
    for name in ("vit", "swin"):
        model = build_model(f"hf:{hub_folder / name}", 5, 32)
        out = forward(model, images())["embedding"]
        with torch.no_grad():
            hidden = model.backbone.body(pixel_values=images()).last_hidden_state
        torch.testing.assert_close(out, hidden[:, 0] if name == "vit" else hidden.mean(1))


def test_hugging_face_bad_names(hub_folder, tmp_path):
    assert "no image model" in refusal(build_model, f"hf:{hub_folder / 'bert'}", 5, 32)
    missing = refusal(build_model, f"hf:{tmp_path / 'nothing'}", 5, 32)
    assert "nothing" in missing and "config.json" in missing and "hf:FOLDER" in missing
    offline = refusal(build_model, "hf:google/vit-base-patch16-224", 5, 32, pretrained=True)
    assert "google/vit-base-patch16-224" in offline and "model.safetensors" in offline


# ------------------------------------------------------------------------------------------------- names and hub weights


@pytest.mark.parametrize(
    "name, near", [("resnet9", "resnet8"), ("vit_tny", "vit_tiny"), ("timm:resnet8", "resnet18"), ("zzzz", "vit_6_192")]
)
def test_unknown_names_hint_at_near_ones(name, near):
    text = refusal(build_model, name, 10)
    assert repr(name) in text and near in text.split(";")[1]


def test_settings_that_do_not_fit():
    assert "--patch-size" in refusal(build_model, "resnet8", 10, 32, 4)
    assert "--patch-size" in refusal(build_model, "timm:test_vit", 10, 32, 4)
    assert "--patch-size 5" in refusal(build_model, "vit_tiny", 10, 32, 5)
    assert "timm:resnet18" in refusal(build_model, "resnet18", 10, pretrained=True)
    assert "33 px" in refusal(build_model, "timm:twins_svt_small", 10, 33)
    assert "8 px" in refusal(build_model, "timm:test_maxvit", 10, 8)
    assert "foo" in refusal(build_model, "timm:resnet18.foo", 10)


def test_pretrained_offline_names_the_file():
    text = refusal(build_model, "timm:resnet10t", 10, 64, pretrained=True)
    assert "model.safetensors of timm/resnet10t" in text and "--weights FILE" in text
    assert "no hub weights" in refusal(build_model, "timm:test_vit4", 10, 64, pretrained=True)
    wrong_size = refusal(build_model, "timm:twins_svt_small", 10, 33, pretrained=True)
    assert "33 px" in wrong_size and "fetch" not in wrong_size, "not the weights' fault"


def test_pretrained_models_bring_their_normalization(monkeypatch):
    """timm asked for weights: mean and std are theirs; rebuilding asks for none."""
    import timm

    asked, create = [], timm.create_model

    def record(name, pretrained=False, **arguments):
        asked.append(pretrained)
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", record)
    model = build_model("timm:test_vit", 10, 32, pretrained=True)
    assert asked == [True] and model.mean == list(timm.get_pretrained_cfg("test_vit").mean)
    assert model.std == list(timm.get_pretrained_cfg("test_vit").std)
    rebuilt = build_model(**model.build_args)
    assert asked == [True, False] and rebuilt.mean is None


def test_checking_the_input_draws_no_random_numbers():
    import timm

    torch.manual_seed(3)
    model, after = build_model("timm:test_resnet", 5, 32), torch.rand(1)
    torch.manual_seed(3)
    plain = timm.create_model("test_resnet", num_classes=5)
    assert torch.equal(after, torch.rand(1)) and model.training
    state = model.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    "name, family",
    [("resnet8", "cnn"), ("vit_tiny", "vit"), ("timm:test_convnext", "cnn"), ("timm:test_nfnet", "cnn"),
     ("timm:levit_128s", "vit"), ("timm:twins_svt_small", "vit"), ("timm:test_maxvit", "vit"),
     ("timm:xcit_nano_12_p16_224", "vit")],
)  # fmt: skip
def test_families(name, family):
    assert build_model(name, 3, 64).family == family


def test_clips_resnet_is_a_cnn():
    """It attends in its pooling alone."""
    from timm.layers import AttentionPool2d

    model = build_model("resnet8", 3, 32)
    model.backbone.pool = AttentionPool2d(512, feat_size=4)
    assert model.family == "cnn"


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


# -------------------------------------------------------------------------------------------------------------- weights


def same_state(model, other):
    state = other.backbone.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize("name", ["resnet8", "vit_6_192", "timm:test_vit", "timm:test_convnext"])
def test_foreign_weights(name):
    """As a bare state dict and in the wrappings that are common."""
    source = build_model(name, 4, 32)
    bare = source.backbone.state_dict()

    def prefixed(prefix):
        return {prefix + key: value for key, value in bare.items()}

    states = [bare, {"state_dict": bare, "epoch": 3}, {"model": bare}, {"model": source.state_dict(), "epoch": 1}]
    states += [prefixed(p) for p in ("module.", "_orig_mod.", "module._orig_mod.", "module.backbone.")]
    for state in states:
        model = build_model(name, 4, 32)
        assert not same_state(model, source)
        assert load_weights(model, state, "x.pth") is True
        assert same_state(model, source)


@pytest.mark.parametrize(
    "name, head", [("resnet8", "fc."), ("vit_6_192", "head."), ("timm:test_vit", "head."), (SWIN, "head.fc.")]
)
def test_a_head_of_other_classes_stays_new(name, head):
    source, model = build_model(name, 4, 32), build_model(name, 7, 32)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    states = [source.backbone.state_dict()]
    states.append({key: value for key, value in states[0].items() if not key.startswith(head)})  # a body without head
    for state in states:
        assert load_weights(model, state, "x.pth") is False
        for key, value in model.backbone.state_dict().items():
            assert torch.equal(value, before[key] if key.startswith(head) else source.backbone.state_dict()[key]), key


def test_wrong_weights_are_refused():
    """Strictly: nothing missing, nothing over."""
    model, good = build_model("resnet8", 4, 32), build_model("resnet8", 4, 32).backbone.state_dict()
    missing = {key: value for key, value in good.items() if key != "layer2.0.bn1.running_var"}
    for state, word in [
        (missing, "layer2.0.bn1.running_var"),
        ({**good, "layer9.weight": torch.zeros(1)}, "layer9.weight"),
        ({**good, "conv1.weight": torch.zeros(64, 3, 7, 7)}, "conv1.weight"),
        (build_model("resnet18", 4, 32).backbone.state_dict(), "layer1.1"),
        (build_model("vit_6_192", 4, 32).backbone.state_dict(), "resnet8"),
        ({}, "no state dict"),
        ({"epoch": 3}, "no state dict"),
        ({"model": {}}, "no state dict"),
        ({0: torch.zeros(2)}, "no state dict"),
    ]:
        text = refusal(load_weights, model, state, "x.pth")
        assert "x.pth" in text and word in text
    for name in ("timm:test_vit", SWIN, "timm:test_resnet"):
        assert "does not fit" in refusal(load_weights, build_model(name, 4, 32), good, "x.pth")


def test_timm_weights_for_another_resolution():
    """A file fetched by hand fits as hub weights do: timm resamples the positions."""
    source, model = build_model("timm:vit_tiny_patch16_224", 4, 64), build_model("timm:vit_tiny_patch16_224", 4, 32)
    state = source.backbone.state_dict()
    assert load_weights(model, dict(state), "x.pth") is True
    own = model.backbone.state_dict()
    assert own["pos_embed"].shape == (1, 5, 192) and torch.equal(own["pos_embed"][:, 0], state["pos_embed"][:, 0])
    assert all(torch.equal(own[key], state[key]) for key in own if key != "pos_embed")


# ----------------------------------------------------------------------------------------------------------- resolution


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", SWIN, "timm:test_resnet", "resnet8"])
def test_another_resolution(name):
    """A teacher at another input side and back again; at its own it stays as it is."""
    model = build_model(name, 4, 32).eval()
    first = forward(model, images(32))["logits"]
    model.set_resolution(32)
    assert torch.equal(forward(model, images(32))["logits"], first)
    for side in (64, 32, 48):
        model.set_resolution(side)
        assert forward(model, images(side))["logits"].shape == (2, 4)
    assert not model.training and model.build_args["img_size"] == 32, "the grid of the weights in its checkpoint"


def test_positions_are_resampled_once_as_timm_does():
    import timm

    model = build_model("timm:vit_tiny_patch16_224", 4, 32)
    reference = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=4)
    state = timm.models.vision_transformer.checkpoint_filter_fn(dict(model.backbone.state_dict()), reference)
    reference.load_state_dict(state, strict=True)
    model.set_resolution(64)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, images(64))["logits"], reference.eval()(images(64)))


def test_resolutions_that_do_not_fit():
    ours = build_model("vit_6_192", 4, 32)
    ours.set_resolution(48)
    assert ours.build_args["img_size"] == 32, "the grid of its weights"
    assert forward(ours, images(48))["logits"].shape == (2, 4)
    assert "30" in refusal(ours.set_resolution, 30)
    fixed = build_model("timm:levit_128s", 4, 64)  # its attention biases are of one size
    assert "96 px" in refusal(fixed.set_resolution, 96) and fixed.training
    assert "8 px" in refusal(build_model("timm:test_maxvit", 4, 64).set_resolution, 8)


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
