"""Where models come from: Hugging Face folders, timm, hub and foreign weights; other resolutions.  No network."""

import ast
import contextlib
import json
import shutil

import pytest
import torch
from conftest import ROOT
from test_models import SWIN, forward, images, no_network, refusal  # noqa: F401

from common.models import ModelError, build_model, load_weights
from common.multimodal import _load

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
    """Folders as one downloads them: config and, of two, random weights (also as original.pth); the ViT in bfloat16."""
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


CUSTOM_CODE = """
from pathlib import Path
Path("{marker}").touch()
from transformers import PretrainedConfig, ViTModel
class Own(PretrainedConfig):
    model_type = "own"
class OwnModel(ViTModel):
    pass
"""


@pytest.mark.parametrize("known", [True, False])  # whether transformers has a model of this type too
@pytest.mark.parametrize("kind, pretrained", [("image", True), ("image", False), ("text", True), ("text", False)])
def test_code_of_a_hugging_face_folder_never_runs(hub_folder, tmp_path, monkeypatch, kind, pretrained, known):
    """A folder whose config names classes of its own, as of a hub's repository: it is refused or taken without them, and nobody is asked."""
    folder = tmp_path / "model"
    shutil.copytree(hub_folder / ("vit" if kind == "image" else "bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModel": "own.OwnModel", "AutoTokenizer": ["own.Own", None]}
    config["model_type"] = config["model_type"] if known else "own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CUSTOM_CODE.replace("{marker}", str(tmp_path / "ran")))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asks on the terminal"))
    with contextlib.suppress(ModelError):
        if kind == "image":
            build_model(f"hf:{folder}", 5, 32, pretrained=pretrained)
        else:
            _load(str(folder), str(folder), pretrained)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_loaded_that_could_run_code():
    """In no file of the project, by the arguments themselves: pickles, code of a hub's repository, torch.hub, eval."""
    wanted = {"from_pretrained": ("trust_remote_code", False), "from_config": ("trust_remote_code", False)}
    seen = []
    for file in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("slurm/*.py")]:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert function not in ("eval", "exec", "pickle.load", "pickle.loads", "torch.hub.load", "joblib.load"), (file, function)
            name, value = wanted.get(function.split(".")[-1], (None, None))
            if function in ("torch.load", "np.load"):
                name, value = ("weights_only", True) if function == "torch.load" else ("allow_pickle", False)
            if name:
                seen.append(function)
                assert given.get(name) == str(value), f"{file}:{call.lineno}: {function} without {name}={value}"
    assert {"torch.load", "np.load", "AutoModel.from_pretrained", "AutoModel.from_config", "AutoTokenizer.from_pretrained"} <= set(seen)


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


# ------------------------------------------------------------------------------------------------ names and hub weights


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
