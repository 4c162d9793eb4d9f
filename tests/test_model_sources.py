"""Where models come from: Hugging Face folders, timm, hub and foreign weights; other resolutions.  No network."""

import argparse
import ast
import contextlib
import json
import shutil

import pytest
import torch
from conftest import ROOT, shared_archive
from test_models import SWIN, forward, images, no_network, refusal  # noqa: F401

from common.data import DATASETS
from common.models import ModelError, build_model
from common.multimodal import _load
from common.run import UserError, load_checkpoint
from common.training import Preprocess, load_model, need_head, start_weights
from common.weights import load_weights

# --------------------------------------------------------------------------------------------------------- Hugging Face


def hugging_face_configs():
    import transformers

    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {
        "vit": transformers.ViTConfig(**vit, image_size=32, patch_size=8),
        "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        "registers": transformers.Dinov2WithRegistersConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            num_register_tokens=4,
        ),
        "deit": transformers.DeiTConfig(**vit, image_size=32, patch_size=8),
        "swin": transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        "bert": transformers.BertConfig(**vit),
    }


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
    """A folder whose config names classes of its own, as of a hub's repository: it is refused or taken without them,
    and nobody is asked."""
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
            assert function not in ("eval", "exec", "pickle.load", "pickle.loads", "torch.hub.load", "joblib.load"), (
                file,
                function,
            )
            name, value = wanted.get(function.split(".")[-1], (None, None))
            if function in ("torch.load", "np.load"):
                name, value = ("weights_only", True) if function == "torch.load" else ("allow_pickle", False)
            if name:
                seen.append(function)
                assert given.get(name) == str(value), f"{file}:{call.lineno}: {function} without {name}={value}"
    assert {
        "torch.load",
        "np.load",
        "AutoModel.from_pretrained",
        "AutoModel.from_config",
        "AutoTokenizer.from_pretrained",
    } <= set(seen)


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


def test_a_processor_that_does_not_normalize(hub_folder, tmp_path):
    """do_normalize false: pixels of 0 to 1 as they are, neither the mean that it names nor the dataset's."""
    shutil.copytree(hub_folder / "vit", tmp_path / "vit")
    path = tmp_path / "vit" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_normalize": False}))
    model = build_model(f"hf:{tmp_path / 'vit'}", 5, 32, pretrained=True)
    pixels = torch.rand(2, 3, 4, 4)
    assert torch.equal(Preprocess.for_model(model, 4, "digits", DATASETS["digits"])(pixels), pixels)


def test_what_is_assumed_without_a_processor_is_said(hub_folder):
    model = build_model(f"hf:{hub_folder / 'resnet'}", 5, 32, pretrained=True)
    said = str(Preprocess.for_model(model, 32, "digits", DATASETS["digits"]))
    assert said.startswith("mean 0.305 0.305 0.305, std 0.376 0.376 0.376, of digits, assumed") and "resnet" in said
    assert "assumed" not in str(Preprocess.for_model(build_model("resnet8", 5, 32), 32, "digits", DATASETS["digits"]))


@pytest.mark.parametrize("name, kept", [("vit", True), ("resnet", True), ("convnext", False)])
def test_the_head_of_a_fine_tuned_classifier(tmp_path, name, kept):
    """Kept where its classes are as many and it reads what ours reads (ConvNeXt's reads a norm between): the same
    logits."""
    import transformers

    torch.manual_seed(0)
    configs = {
        **hugging_face_configs(),
        "convnext": transformers.ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2),
    }
    configs[name].num_labels = 5
    whole = transformers.AutoModelForImageClassification.from_config(configs[name]).eval()
    for m in whole.modules():
        if isinstance(m, torch.nn.LayerNorm):
            torch.nn.init.normal_(m.weight)
    whole.save_pretrained(tmp_path / name)
    model = build_model(f"hf:{tmp_path / name}", 5, 32, pretrained=True)
    with torch.no_grad():
        theirs = whole(pixel_values=images()).logits
    same = torch.allclose(forward(model, images())["logits"], theirs, atol=1e-5)
    assert same == kept and model.known_classes == (5 if kept else 0)
    assert ("new head" in start_weights(model)) != kept
    other = build_model(f"hf:{tmp_path / name}", 4, 32, pretrained=True)
    assert other.known_classes == 5 and "with a new head of 4 classes: theirs has 5" in start_weights(other)
    assert forward(other, images())["logits"].abs().max() < 0.5


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
    assert "is not an image model" in refusal(build_model, f"hf:{hub_folder / 'bert'}", 5, 32)
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
    assert "--patch-size 4: timm:resnet10t takes none" in refusal(build_model, "timm:resnet10t", 10, 32, 4)
    assert "--patch-size 5" in refusal(build_model, "timm:test_vit", 10, 32, 5), "timm would cut the image"
    assert "--patch-size 5" in refusal(build_model, "vit_tiny", 10, 32, 5)
    assert "timm:resnet18" in refusal(build_model, "resnet18", 10, pretrained=True)
    assert "33 px" in refusal(build_model, "timm:twins_svt_small", 10, 33)
    assert "8 px" in refusal(build_model, "timm:test_maxvit", 10, 8)
    assert "foo" in refusal(build_model, "timm:resnet18.foo", 10)


def test_pretrained_offline_names_the_file():
    text = refusal(build_model, "timm:resnet10t", 10, 64, pretrained=True)
    assert "model.safetensors of timm/resnet10t" in text and "--weights FILE" in text
    assert "the hub has no weights" in refusal(build_model, "timm:test_vit4", 10, 64, pretrained=True)
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
    [
        ("resnet8", "cnn"),
        ("vit_tiny", "vit"),
        ("timm:test_convnext", "cnn"),
        ("timm:test_nfnet", "cnn"),
        ("timm:levit_128s", "vit"),
        ("timm:twins_svt_small", "vit"),
        ("timm:test_maxvit", "vit"),
        ("timm:xcit_nano_12_p16_224", "vit"),
    ],
)
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
    states += [
        prefixed(p)
        for p in (
            "module.",
            "_orig_mod.",
            "module._orig_mod.",
            "module.backbone.",
            "_orig_mod.module.",
            "module.module.",
        )
    ]
    for state in states:
        model = build_model(name, 4, 32)
        assert not same_state(model, source)
        assert load_weights(model, state, "x.pth").startswith("x.pth") and model.known_classes == 4
        assert same_state(model, source)


@pytest.mark.parametrize(
    "name, head", [("resnet8", "fc."), ("vit_6_192", "head."), ("timm:test_vit", "head."), (SWIN, "head.fc.")]
)
def test_a_head_of_other_classes_stays_new(name, head):
    source, model = build_model(name, 4, 32), build_model(name, 7, 32)
    states = [source.backbone.state_dict()]
    states.append({key: value for key, value in states[0].items() if not key.startswith(head)})  # a body without head
    for state in states:
        load_weights(model, state, "x.pth")
        assert model.known_classes == (4 if any(key.startswith(head) for key in state) else 0)
        for key, value in model.backbone.state_dict().items():
            if key.startswith(head):  # new and small: logits near 0, whatever the architecture's own start
                assert (
                    value.shape[0] == 7
                    and value.abs().max() <= 0.06
                    and (value.std() > 0.005) == key.endswith("weight")
                ), key
            else:
                assert torch.equal(value, source.backbone.state_dict()[key]), key


def raised(state, by):
    return {key: value + by if value.is_floating_point() else value for key, value in state.items()}


def test_what_a_file_holds_is_said_and_taken():
    """Several state dicts, a backbone beside other parts, both: which one was taken is told by its values."""
    source = build_model("resnet8", 4, 32)
    bare = source.backbone.state_dict()
    average, other = raised(bare, 1), raised(bare, 2)

    def below(prefix, state, **more):
        return {**{prefix + key: value for key, value in state.items()}, **more}

    extra = {"dino_head.mlp.weight": torch.zeros(3, 3), "loss.center": torch.zeros(1)}
    for state, taken, words in [
        (
            {"state_dict": bare, "state_dict_ema": average, "optimizer": {"state": {0: {"step": torch.zeros(1)}}}},
            average,
            "(state_dict_ema, not state_dict)",
        ),
        ({"model": bare, "model_ema": average}, average, "(model_ema, not model)"),
        ({"student": other, "teacher": bare}, bare, "(teacher, not student)"),
        ({"net": bare, "epoch": 3}, bare, "(net)"),
        ({"model": {"ema": average, "state_dict": bare}}, average, "(model.ema, not model.state_dict)"),
        (
            {"student": below("module.backbone.", other), "teacher": below("backbone.", bare, **extra)},
            bare,
            "(teacher, not student; backbone.*; left out: dino_head.*, loss.*)",
        ),
        (below("module.encoder_q.", bare, queue=torch.zeros(2, 2)), bare, "(module.encoder_q.*; left out: queue.*)"),
        (
            {"model": below("net.", bare), "other": raised(build_model("vit_6_192", 4, 32).backbone.state_dict(), 0)},
            bare,
            "(model; net.*)",
        ),
    ]:
        model = build_model("resnet8", 4, 32)
        assert load_weights(model, state, "x.pth") == f"x.pth {words}"
        assert all(torch.equal(value, taken[name]) for name, value in model.backbone.state_dict().items()), words
    both = {"model": {**below("student.backbone.", bare), **below("teacher.backbone.", other)}, "optimizer": {}}
    assert "several parts that fit resnet8, student.backbone.*, teacher.backbone.*" in refusal(
        load_weights, model, both, "x.pth"
    )
    wrong = {"model": below("encoder.", build_model("vit_6_192", 4, 32).backbone.state_dict()), "epoch": 3}
    text = refusal(load_weights, model, wrong, "x.pth")
    assert "its names begin with encoder., encoder.patch_embed., encoder.blocks." in text and text.endswith(
        "; its keys: model, epoch"
    )


def test_blocks_in_chunks_as_dinov2_saves_them():
    source, model = (build_model("timm:test_vit", 0, 32) for _ in range(2))
    state = {
        f"backbone.{name.replace('blocks.', 'blocks.0.')}": value
        for name, value in source.backbone.state_dict().items()
    }
    load_weights(model, {"teacher": {**state, "dino_head.weight": torch.zeros(1)}}, "x.pth")
    assert same_state(model, source)


def test_files_of_other_scripts(tmp_path):
    """A Namespace beside the weights is let through; what is no weights file is said in one line, without escape
    codes."""
    import numpy as np
    from safetensors.torch import save_file

    bare = build_model("resnet8", 4, 32).backbone.state_dict()
    torch.save(
        {"state_dict": bare, "args": argparse.Namespace(lr=0.1, more=argparse.Namespace(a=[1]))},
        tmp_path / "namespace.pth",
    )
    save_file(bare, tmp_path / "renamed.bin")
    for name in ("namespace.pth", "renamed.bin"):
        model = build_model("resnet8", 4, 32)
        assert name in start_weights(model, str(tmp_path / name))
        assert all(torch.equal(value, bare[key]) for key, value in model.backbone.state_dict().items())
    torch.save(build_model("resnet8", 4, 32), tmp_path / "whole.pth")
    torch.save({"model": bare, "best": np.float64(0.5)}, tmp_path / "numpy.pth")
    whole = (tmp_path / "namespace.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "renamed.bin").read_bytes()[:1000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>\n<html>404</html>")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, words in (
        ("whole.pth", "ImageModel"),
        ("numpy.pth", "scalar"),
        ("cut.pth", "damaged"),
        ("cut.safetensors", "damaged"),
        ("empty.pth", "empty"),
        ("page.pth", "<!DOCTYPE"),
        ("lfs.safetensors", "git-lfs"),
        ("absent.pth", "no such file"),
    ):
        for load in (load_checkpoint, lambda path: start_weights(model, path, flag="--teacher-weights")):
            with pytest.raises(UserError) as caught:
                load(str(tmp_path / name))
            text = str(caught.value)
            assert name in text and words in text and text.isprintable(), text
        assert text.startswith("--teacher-weights ")


def test_weights_bring_their_normalization(tmp_path):
    """As with --pretrained, by the architecture's name alone; a checkpoint of ours brings its own."""
    import timm

    name = "timm:vit_tiny_patch16_224"
    model = build_model(name, 4, 32)
    assert model.mean is None, "random weights expect nothing"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4).state_dict(), tmp_path / "x.pth")
    start_weights(model, str(tmp_path / "x.pth"))
    assert (
        str(Preprocess.for_model(model, 32, "digits", DATASETS["digits"]))
        == f"mean 0.5 0.5 0.5, std 0.5 0.5 0.5, of the weights of {name}"
    )
    checkpoint = {
        "kind": "image",
        "model": model.state_dict(),
        "model_args": model.build_args,
        "classes": list("abcd"),
        "flags": {"dataset": "digits", "data_root": None},
        "preprocess": {"resolution": 32, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    torch.save(checkpoint, tmp_path / "own.pth")
    for given in ({"weights": str(tmp_path / "own.pth")}, {"init_checkpoint": str(tmp_path / "own.pth")}):
        model = build_model(name, 4, 32)
        start_weights(model, **given)
        assert (model.mean, model.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_a_checkpoint_of_an_older_version_is_refused():
    """The ViTs had other names of their own before timm's took their place."""
    model = build_model("vit_6_192", 4, 32)
    older = {name.replace("patch_embed.proj.", "patch_embed."): value for name, value in model.state_dict().items()}
    preprocess = {"resolution": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    checkpoint = {"kind": "image", "model": older, "model_args": model.build_args, "preprocess": preprocess}
    with pytest.raises(UserError, match="^old.pth does not fit its architecture vit_6_192.* an older version .*patch_"):
        load_model(checkpoint, path="old.pth")


@pytest.mark.parametrize("size", [0, 2])
def test_real_imagenet_weights(size):
    """tf_efficientnet_lite expects mean and std 0.5; its ImageNet head does not fit seven classes."""
    model = build_model(f"tf_efficientnet_lite{size}", 7, 64)
    note = start_weights(model, str(shared_archive(f"tf_efficientnet_lite{size}.safetensors")))
    assert note.endswith("with a new head of 7 classes: theirs has 1000") and (model.mean, model.std) == (
        [0.5] * 3,
        [0.5] * 3,
    )
    assert forward(model, images(64))["logits"].abs().max() < 1, "timm's own start gives up to 10"
    with pytest.raises(UserError, match="a head of 1000 classes, the data have 7"):
        need_head(model, list("abcdefg"), "x.safetensors")


def test_a_head_that_does_not_fit_is_none(tmp_path):
    """Of as many classes, but without its bias: the head is new, and its logits mean nothing."""
    model, state = build_model("resnet8", 4, 32), build_model("resnet8", 4, 32).backbone.state_dict()
    del state["fc.bias"]
    torch.save({"model": state, "preprocess": "of another script"}, tmp_path / "x.pth")
    assert start_weights(model, str(tmp_path / "x.pth")).endswith(", with a new head of 4 classes: theirs has none")
    with pytest.raises(UserError, match="no head that can be kept"):
        need_head(model, list("abcd"), "x.pth")


def test_wrong_weights_are_refused():
    """Strictly: nothing missing, nothing over."""
    model, good = build_model("resnet8", 4, 32), build_model("resnet8", 4, 32).backbone.state_dict()
    missing = {key: value for key, value in good.items() if key != "layer2.0.bn1.running_var"}
    for state, word in [
        (missing, "layer2.0.bn1.running_var is missing in it"),
        ({k: v for k, v in good.items() if k != "conv1.weight"}, "conv1.weight is missing in it, (64, 3, 3, 3) in the"),
        ({f"module.{k}": v for k, v in good.items() if k != "conv1.weight"}, "conv1.weight is missing in it"),
        ([torch.zeros(2)], "no state dict of tensors; it is a list"),
        ({**good, "layer9.weight": torch.zeros(1)}, "layer9.weight"),
        ({**good, "conv1.weight": torch.zeros(64, 3, 7, 7)}, "conv1.weight"),
        (build_model("resnet18", 4, 32).backbone.state_dict(), "layer1.1"),
        (build_model("vit_6_192", 4, 32).backbone.state_dict(), "resnet8"),
        ({}, "no state dict"),
        ({"epoch": 3}, "no state dict of tensors; its keys: epoch"),
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
    load_weights(model, dict(state), "x.pth")
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
