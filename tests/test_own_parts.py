"""`--model` and `--dataset` FILE.py:FUNCTION, of the user's own: the contract, every script, and every error."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_models import forward, images, refusal
from torch.nn import functional as F

import report
from common.data import DataError, load_splits
from common.models import build_model, multiply_adds
from common.weights import load_weights

# the head is made before what feeds it, there is a module beside the file, and a linear layer that is no head
FILE = """
import torch
from torch import nn

from own_blocks import block


class Net(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.classify = nn.Linear(width, num_classes)
        self.stem, self.body = block(3, width), block(width, width)
        self.gate = nn.Linear(width, width)

    def forward(self, x):
        pooled = self.body(self.stem(x)).mean((2, 3))
        return self.classify(pooled * torch.sigmoid(self.gate(pooled)))


def small(num_classes):
    return Net(num_classes, 8)


def large(num_classes):
    return Net(num_classes, 16)


def without_linear(num_classes):
    return nn.Sequential(block(3, 8), nn.Conv2d(8, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def raises(num_classes):
    width = 8
    return nn.Linear(width, num_classes, bos=True)


def no_module(num_classes):
    return {"classes": num_classes}


def too_few(num_classes):
    return Net(num_classes - 1, 8)


def a_tuple(num_classes):
    net = Net(num_classes, 8)
    net.forward = lambda x: (x, x)
    return net


def only_large_images(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 40), nn.Flatten(), nn.Linear(8, num_classes))
"""
BLOCKS = """
from torch import nn


def block(width_in, width):
    return nn.Sequential(nn.Conv2d(width_in, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
"""
SMALL = ["--dataset", "digits", "--limit-train", 160, "--epochs", 1, "--device", "cpu"]


@pytest.fixture
def folder(tmp_path):
    """Holds my.py and a module that it imports."""
    path = tmp_path / "mine"
    path.mkdir()
    (path / "my.py").write_text(FILE)
    (path / "own_blocks.py").write_text(BLOCKS)
    return path


# ------------------------------------------------------------------------------------------------------------ contract


def test_outputs_by_hand(folder, monkeypatch):
    """Logits are the module's own, the embedding is what its head takes, features come from any module path."""
    monkeypatch.chdir(folder)
    model = build_model("my.py:small", 5, 16)
    assert model.training and model.build_args["name"] == str(folder / "my.py:small") and model.name == "my.py:small"
    net, pixels = model.backbone, images(16)
    model.set_feature_layers(["body", "stem.0", "gate"])
    out = forward(model, pixels)
    assert set(out) == {"logits", "embedding", "features"}
    with torch.no_grad():
        maps = net.stem(pixels)
        pooled = net.body(maps).mean((2, 3))
        gate = F.linear(pooled, net.gate.weight, net.gate.bias)
        embedding = pooled * gate.sigmoid()
    torch.testing.assert_close(out["embedding"], embedding)
    torch.testing.assert_close(out["logits"], F.linear(embedding, net.classify.weight, net.classify.bias))
    torch.testing.assert_close(out["features"]["body"], net.body(maps))
    torch.testing.assert_close(out["features"]["stem.0"], F.conv2d(pixels, net.stem[0].weight, None, 2, 1))
    torch.testing.assert_close(out["features"]["gate"][:, :, 0, 0], gate)
    assert model.family == "cnn" and "body" in refusal(model.set_feature_layers, ["layer3"])
    # two convolutions of half the side each, then two linear layers
    assert multiply_adds(model, 16) == 64 * 27 * 8 + 16 * 72 * 8 + 8 * 8 + 8 * 5


def test_it_is_rebuilt_copied_and_compiled(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model = build_model("my.py:small", 5, 16)
    expected = forward(model, images(16))
    monkeypatch.chdir(folder.parent)
    rebuilt = build_model(**model.build_args)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    other = copy.deepcopy(rebuilt)  # as for EMA: its hooks are its own
    with torch.no_grad():
        other.backbone.stem[0].weight.mul_(2).add_(1)
    assert not torch.allclose(forward(other, images(16))["embedding"], expected["embedding"])
    torch.compiler.reset()
    compiled = copy.deepcopy(rebuilt)
    compiled.compile(backend="eager", fullgraph=True)
    for one in (rebuilt, compiled):
        for key, value in forward(one, images(16)).items():
            torch.testing.assert_close(value, expected[key])
    torch.compiler.reset()
    rebuilt.set_resolution(24)
    assert forward(rebuilt, images(24))["logits"].shape == (2, 5)


def test_without_classes_the_head_is_taken_off(folder):
    source, model = (build_model(f"{folder}/my.py:small", classes, 16) for classes in (5, 0))
    load_weights(model, source.state_dict(), "x.pth")
    out = forward(model, images(16))
    assert list(out) == ["embedding"]
    assert torch.equal(out["embedding"], forward(source, images(16))["embedding"])
    model({"image": images(16)})["embedding"].sum().backward()
    assert all(p.grad is not None for p in model.parameters()), "as DDP asks for"
    assert source.num_parameters - model.num_parameters == 8 * 5 + 5
    assert build_model(**model.build_args).state_dict().keys() == model.state_dict().keys()


def test_head_dropout_and_freezing(folder):
    model = build_model(f"{folder}/my.py:small", 5, 16)
    model.set_dropout(0.9)
    model.backbone.stem[1].eval()
    out = model({"image": images(16)})
    net = model.backbone
    assert not torch.allclose(out["logits"], F.linear(out["embedding"], net.classify.weight, net.classify.bias))
    model.freeze_backbone()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "backbone.classify.weight",
        "backbone.classify.bias",
    ]
    model.train()
    assert net.classify.training and not net.stem.training


def test_weights_of_other_classes(folder):
    source, model = (build_model(f"{folder}/my.py:small", classes, 16) for classes in (5, 3))
    load_weights(model, {"model": source.backbone.state_dict()}, "x.pth")
    assert model.known_classes == 5 and torch.equal(model.backbone.gate.weight, source.backbone.gate.weight)
    assert model.backbone.classify.weight.abs().max() < 0.06, "new and small"
    loaded = build_model(f"{folder}/my.py:small", 5, 16, pretrained=True)
    assert loaded.known_classes == 5 and loaded.mean is None, "the function has loaded them"


def test_a_module_without_a_linear_head(folder):
    """It gives logits and features; the embedding is refused where it is asked for."""
    model = build_model(f"{folder}/my.py:without_linear", 5, 16)
    model.set_feature_layers(["0"])
    out = forward(model, images(16))
    assert set(out) == {"logits", "features"} and out["features"]["0"].shape == (2, 8, 8, 8)
    text = refusal(lambda: out["embedding"])
    assert "my.py:without_linear has no embedding" in text and "nn.Linear" in text
    assert "--freeze-backbone" in refusal(model.freeze_backbone) and "--dropout" in refusal(model.set_dropout, 0.1)
    other = build_model(f"{folder}/my.py:without_linear", 5, 16)
    load_weights(other, model.backbone.state_dict(), "x.pth")
    assert other.known_classes == 5 and torch.equal(other.backbone[1].weight, model.backbone[1].weight)


def test_what_it_does_not_have(folder):
    source = f"{folder}/my.py:small"
    assert "--patch-size 4" in refusal(build_model, source, 5, 16, 4)
    model = build_model(source, 5, 16)
    for pooling in ("cls", "mean", "map"):
        text = refusal(model.set_pooling, pooling)
        assert f"--pooling {pooling}" in text and "my.py:small" in text
    model.with_tokens = True
    assert "my.py:small has no tokens" in refusal(model, {"image": images(16)})


@pytest.mark.parametrize(
    "source, words",
    [
        ("absent.py:small", ["absent.py", "does not exist"]),
        ("my.py:smal", ["my.py has no function 'smal'; it has Net, small, large"]),
        ("my.py:", ["no function ''"]),
        ("my.py:raises", ["called with 5 classes: TypeError", "bos", "(line 34 of "]),
        ("my.py:no_module", ["nn.Module", "returns a dict"]),
        ("my.py:too_few", ["(2, 5)", "gives (2, 4)"]),
        ("my.py:a_tuple", ["(2, 5)", "gives tuple"]),
        ("my.py:only_large_images", ["cannot take 16 px"]),
        ("broken.py:small", ["broken.py cannot be imported: NameError", "undefined_name", "(line 2 of "]),
        ("unclosed.py:small", ["unclosed.py cannot be imported: SyntaxError"]),
    ],
)
def test_errors(folder, source, words):
    (folder / "broken.py").write_text("x = 1\nundefined_name\n")
    (folder / "unclosed.py").write_text("def small(:\n")
    text = refusal(build_model, f"{folder}/{source}", 5, 16)
    assert all(word in text for word in words), text


def test_a_missing_optional_file_is_named(monkeypatch):
    """As where models.py was copied out alone, or transformers is not installed."""
    import sys

    for module, words in (
        ("common.hugging_face", "hf:x needs the file common/hugging_face.py"),
        ("transformers", "hf:x needs the package transformers: pip install transformers"),
    ):
        monkeypatch.delitem(sys.modules, "common.hugging_face", raising=False)
        monkeypatch.setitem(sys.modules, module, None)
        assert words in refusal(build_model, "hf:x", 5, 16)
        monkeypatch.undo()


# ------------------------------------------------------------------------------------------------------------- scripts


def results(run):
    return json.loads((run / "results.json").read_text())


def test_through_every_script(here, refused, folder, tmp_path):
    """Own teacher and own student: train, distill, resume, evaluate, extract, report; the file is needed throughout."""

    def run(name, *flags):
        code, out, errors = here(name, *flags)
        assert code == 0, errors
        return out

    run("train_teacher.py", *SMALL, "--model", "mine/my.py:large", "--output", "teacher", "--epochs", 2)
    teacher = torch.load(tmp_path / "teacher" / "best.pth", weights_only=True)
    assert teacher["model_args"]["name"] == teacher["flags"]["model"] == str(folder / "my.py:large")
    torch.save({k.removeprefix("backbone."): v for k, v in teacher["model"].items()}, tmp_path / "large.pth")
    weights = ["--teacher-model", "mine/my.py:large", "--teacher-weights", "large.pth"]
    student = [*SMALL, "--model", "mine/my.py:small", "--allow-weak-teacher"]
    layers = ["--teacher-layer", "stem", "body", "--student-layer", "stem", "body"]
    for output, flags in {
        "runs/response": ["--teacher-checkpoint", "teacher/best.pth"],
        "runs/weights": weights,
        "runs/rkd": ["--teacher-checkpoint", tmp_path / "teacher" / "best.pth", "--method", "rkd"],
        "runs/feature": [*weights, "--method", "feature", *layers, "--ema", 0.9],
    }.items():
        run("distill.py", *student, *flags, "--output", output)
        assert results(tmp_path / output)["model"]["name"] == "my.py:small"
        assert results(tmp_path / output)["teacher"]["name"] == "my.py:large"
    same = [torch.load(tmp_path / "runs" / name / "best.pth", weights_only=True) for name in ("response", "weights")]
    assert all(torch.equal(value, same[1]["model"][key]) for key, value in same[0]["model"].items())

    run("evaluate.py", "runs/rkd/best.pth", "--teacher-checkpoint", "teacher/best.pth", "--knn", "--device", "cpu")
    found = json.loads((tmp_path / "runs" / "evaluate" / "evaluation.json").read_text())
    recorded = results(tmp_path / "runs" / "rkd")["test"]["accuracy"]
    assert found["student"]["accuracy"] == pytest.approx(recorded) and "knn" in found["student"]
    run("extract_embeddings.py", "--checkpoint", "runs/rkd/best.pth", "--save-logits", "--device", "cpu")
    stored = np.load(tmp_path / "embeddings" / "test_embeddings" / "embeddings.npy")
    assert stored.shape[1:] == (1, 8) and np.isfinite(stored).all()
    run("report.py", "runs", "--output", "page")
    assert "my.py:small" in (tmp_path / "page" / "report.html").read_text()

    (tmp_path / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:  # a resumed run finds the file from any folder
        patch.chdir(tmp_path / "elsewhere")
        run("distill.py", "--resume", tmp_path / "runs" / "rkd", "--epochs", 2)
    assert results(tmp_path / "runs" / "rkd")["last_epoch"] == 2
    shutil.move(folder, tmp_path / "moved")
    for script, *flags in (
        ("evaluate.py", "runs/rkd/best.pth"),
        ("distill.py", "--resume", "runs/rkd", "--epochs", 3),
        ("distill.py", "--teacher-checkpoint", "teacher/best.pth", "--output", "new"),
    ):
        refused(script, *flags, words=[str(folder / "my.py"), "does not exist"])


def test_methods_that_a_module_cannot_serve(here, refused, folder):
    """Without an embedding: response and features teach and are taught, evaluate judges; the rest is refused."""
    both = [*SMALL, "--model", "mine/my.py:without_linear"]
    assert here("train_student.py", *both, "--output", "teacher")[0] == 0
    taught = [*both, "--teacher-checkpoint", "teacher/best.pth", "--allow-weak-teacher", "--overwrite"]
    layers = ["--teacher-layer", "0", "--student-layer", "0"]
    for flags in ([], ["--method", "feature", *layers]):
        assert here("distill.py", *taught, *flags)[0] == 0
    assert here("evaluate.py", "runs/distill/best.pth", "--device", "cpu")[0] == 0
    embedding = ["my.py:without_linear has no embedding"]
    for method in ("embedding", "mmd", "rkd"):  # before the run that is there is replaced: it is evaluated below
        refused("distill.py", *taught, "--method", method, words=["no embedding"])
    refused("distill.py", *taught, "--method", "tokens", words=["my.py:without_linear has no tokens"])
    refused("distill.py", *taught, "--pooling", "mean", words=["--pooling mean"])
    refused("evaluate.py", "runs/distill/best.pth", "--knn", "--device", "cpu", words=embedding)
    refused("extract_embeddings.py", "--checkpoint", "runs/distill/best.pth", "--device", "cpu", words=embedding)
    refused("train_student.py", *both, "--dropout", 0.5, "--output", "new", words=["--dropout"])


def test_labelfree_student(here, folder, tmp_path):
    """Embeddings alone: the student's head is off, its checkpoint is judged by k-NN and goes into a run with labels."""
    assert here("train_teacher.py", *SMALL, "--model", "mine/my.py:large", "--output", "teacher")[0] == 0
    flags = [*SMALL, "--teacher-checkpoint", "teacher/best.pth", "--model", "mine/my.py:small", "--loss", "embedding=1"]
    assert here("distill.py", *flags, "--allow-weak-teacher")[0] == 0
    saved = torch.load(tmp_path / "runs" / "distill" / "best.pth", weights_only=True)
    assert "backbone.classify.weight" not in saved["model"]
    assert here("evaluate.py", "runs/distill/best.pth", "--knn", "--device", "cpu")[0] == 0
    more = ["--model", "mine/my.py:small", "--init-checkpoint", "runs/distill/best.pth", "--output", "tuned"]
    code, out, errors = here("train_student.py", *SMALL, *more)
    assert code == 0 and "with a new head of 10 classes" in out, errors


# ------------------------------------------------------------------------------------------------------------- dataset

# Bars: class "across" or "down" by their direction, which any small network learns.
DATA = """
import numpy as np
from PIL import Image

KINDS = ["across", "down"]


def bar(i, size=16):
    pixels = np.full((size, size, 3), 20, np.uint8)
    place = i % (size - 4) + 1
    pixels[(slice(place, place + 3),) if i % 2 == 0 else (slice(None), slice(place, place + 3))] = 200 + i % 50
    return pixels


class Samples:
    # as a dataset of torchvision
    def __init__(self, count, first=0, folder=None):
        self.count, self.first, self.folder = count, first, folder
        self.targets = [i % 2 for i in range(first, first + count)]
        self.classes = KINDS

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return Image.fromarray(bar(self.first + row)), self.targets[row]


def bars(root):
    return {"train": Samples(96), "val": Samples(24, 96), "test": Samples(32, 120)}


def files(root):
    return {"train": [(f"{root}/{i:02d}.png", KINDS[i % 2]) for i in range(48)]}


def arrays(root):
    return {"train": [(bar(i)[:, :, 0], i % 2) for i in range(60)], "test": [(bar(i), i % 2) for i in range(60, 80)]}


def patients(root):
    train = Samples(60)
    train.groups = np.arange(60) // 6
    return {"train": train}


def undecoded(root):
    train = Samples(40)
    train.__class__ = type("NoImages", (Samples,), {"__getitem__": lambda self, row: 1 / 0})
    return {"train": train}


def lists(root):
    return [Samples(10)]


def raises(root):
    return {"train": open(root + "/nothing.txt")}


def named_valid(root):
    return {"train": Samples(10), "valid": Samples(10)}


def no_samples(root):
    return {"train": 17}


def empty(root):
    return {"train": []}


def halves(root):
    return {"train": [(bar(i), i / 2) for i in range(8)]}


def mixed(root):
    return {"train": [(bar(0), 0), (bar(1), "down")]}


def unknown(root):
    return {"train": [(bar(0), "across"), (bar(1), "down")], "test": [(bar(2), "aslant")]}


def twice(root):
    train = Samples(10)
    train.classes = ["bar", "bar"]
    return {"train": train}


def short_targets(root):
    train = Samples(10)
    train.targets = [0, 1]
    return {"train": train}


def short_groups(root):
    train = Samples(10)
    train.groups = ["a", "b"]
    return {"train": train}


def half_groups(root):
    splits = bars(root)
    splits["train"].groups = list(range(96))
    return splits


def shared_groups(root):
    splits = bars(root)
    for samples in splits.values():
        samples.groups = ["patient 7"] * len(samples)
    return splits


def broken(root):
    return {"train": [(bar(i), i % 2) for i in range(40)] + [("gone.png", 1)]}


def deep(root):
    return {"train": [(bar(i)[:, :, 0].astype(np.uint16) * 16, i % 2) for i in range(40)]}


number = 3
"""
DATA_RUN = ["--resolution", 16, "--batch-size", 16, "--model", "resnet8", "--device", "cpu"]


@pytest.fixture
def data(tmp_path):
    """mine/data.py."""
    path = tmp_path / "mine"
    path.mkdir()
    (path / "data.py").write_text(DATA)
    return path / "data.py"


def pixels(i, size=16):
    """The image that DATA calls bar(i), pixel by pixel."""
    image, place = np.full((size, size, 3), 20, np.uint8), i % (size - 4) + 1
    for a in range(size):
        for b in range(3):
            image[(place + b, a) if i % 2 == 0 else (a, place + b)] = 200 + i % 50
    return image


def test_a_dataset_of_pillow_images(data):
    """Its own splits, classes and targets; an id is the split and the row."""
    splits = load_splits(f"{data}:bars")
    assert splits.classes == ["across", "down"] and splits.domain == "custom"
    assert {name: len(part) for name, part in splits.parts.items()} == {"train": 96, "val": 24, "test": 32}
    assert splits.val.ids[5] == "val/000005" and splits.val.labels[5] == 1
    assert np.array_equal(splits.val[5]["image"].numpy(), pixels(101).transpose(2, 0, 1))
    assert splits.val[5]["targets"] == {"label": 1}


def test_a_dataset_of_files_and_of_arrays(data, tmp_path):
    """What is missing is split off train: test is a fixed fifth, val follows --val-split and --split-seed."""
    for i in range(48):
        Image.fromarray(pixels(i)).save(tmp_path / f"{i:02d}.png")
    first, second = (load_splits(f"{data}:files", str(tmp_path), val_split=0.25, split_seed=seed) for seed in (0, 1))
    assert first.classes == ["across", "down"] and [len(part) for part in first.parts.values()] == [28, 10, 10]
    assert first.test.ids == second.test.ids and first.val.ids != second.val.ids
    assert sorted(sum((part.ids for part in first.parts.values()), [])) == [f"train/{i:06d}" for i in range(48)]
    for row, name in enumerate(first.test.ids):
        i = int(name.split("/")[1])
        assert first.test.labels[row] == i % 2 and np.array_equal(first.test.read(row), pixels(i))

    splits = load_splits(f"{data}:arrays", decode_size=8)
    assert splits.classes == ["0", "1"] and [len(part) for part in splits.parts.values()] == [54, 6, 20]
    assert splits.test.read(3).shape == (8, 8, 3)  # as any image, shrunk to --decode-size
    grey = load_splits(f"{data}:arrays").train
    assert np.array_equal(grey.read(0)[..., 2], pixels(int(grey.ids[0].split("/")[1]))[..., 0])


def test_groups_stay_whole_and_targets_spare_reading(data):
    for options in ({}, {"folds": 5, "fold": 2}):
        parts = load_splits(f"{data}:patients", **options).parts
        groups = [{int(name.split("/")[1]) // 6 for name in part.ids} for part in parts.values()]
        assert len(parts) == 3 and sum(map(len, groups)) == 10 == len(set.union(*groups))
    assert len(load_splits(f"{data}:undecoded").train) == 29  # of 40, 8 are test and a tenth of 32 is val


def test_deep_grey_levels_and_broken_images(data):
    with pytest.raises(DataError, match=r"data.py:deep train\[\d+\] has uint16 grey levels .* --window LOW HIGH"):
        load_splits(f"{data}:deep").train.read(0)
    train = load_splits(f"{data}:deep", window=[0, 4080]).train  # 255 * 16
    assert np.array_equal(train.read(0), pixels(int(train.ids[0].split("/")[1]))[..., :1].repeat(3, 2))
    parts = load_splits(f"{data}:broken", on_bad_image="skip").parts
    assert sum(map(len, parts.values())) == 40
    with pytest.raises(DataError, match=r"cannot read image .*data.py:broken train\[40\]: .*gone.png"):
        for part in load_splits(f"{data}:broken").parts.values():
            [part.read(row) for row in range(len(part))]


@pytest.mark.parametrize(
    "function, words",
    [
        ("lists", ["must return a dict of train, val and test (train at least), not list"]),
        ("named_valid", ["must return a dict of train, val and test", "not a dict of 'train', 'valid'"]),
        (
            "raises",
            ["FileNotFoundError", "nothing.txt", f"(line {DATA[: DATA.index('nothing.txt')].count(chr(10)) + 1} of "],
        ),
        ("no_samples", ["train is not a sequence of (image, label) (TypeError: object of type 'int' has no len())"]),
        ("empty", ["train is not a sequence of (image, label)", "it has 0 samples and 0 labels"]),
        ("halves", ["train is not a sequence of (image, label)", "'float' object cannot be interpreted as an integer"]),
        ("mixed", ["the labels of train are ints and class names: write them in one way"]),
        ("unknown", ["test[0] has the label 'aslant'; the classes are across, down"]),
        ("twice", ["the classes of train have one name twice: bar, bar"]),
        ("short_targets", ["it has 10 samples and 2 labels"]),
        ("short_groups", ["train has 10 samples and 2 groups"]),
        ("half_groups", ["val has no groups, other splits have: give them to all or to none"]),
        ("shared_groups", ["the group 'patient 7' is in train and in val"]),
        ("number", ["has no function 'number'; it has bar, Samples, bars, files"]),
        ("nothing", ["has no function 'nothing'"]),
    ],
)
def test_what_a_dataset_must_be(data, refused, function, words):
    flags = ["--data-root", data.parent, *DATA_RUN]
    refused("train_student.py", "--dataset", "mine/data.py:" + function, *flags, words=words)


def test_a_dataset_whose_file_is_not_there(refused):
    refused("train_student.py", "--dataset", "gone.py:bars", words=["gone.py", "does not exist"])


def test_a_dataset_through_every_script(here, refused, data, tmp_path):
    """Teacher, student, resume from another folder, evaluate with --predict, stored embeddings, report's gallery."""

    def run(name, *flags):
        code, out, errors = here(name, *flags)
        assert code == 0, errors
        return out

    named = ["--dataset", "mine/data.py:bars", *DATA_RUN]
    run("train_teacher.py", *named, "--epochs", 3, "--output", "runs/teacher")
    assert torch.load("runs/teacher/best.pth", weights_only=True)["flags"]["dataset"] == f"{data}:bars"
    teacher = results(tmp_path / "runs" / "teacher")["dataset"]
    assert teacher["classes"] == ["across", "down"] and teacher["sizes"] == {"train": 96, "val": 24, "test": 32}
    run("train_student.py", *named, "--epochs", 1, "--output", "runs/student")
    # the teacher's dataset counts where none is named
    teacher = ["--teacher-checkpoint", tmp_path / "runs" / "teacher" / "best.pth", "--allow-weak-teacher"]
    run("distill.py", *DATA_RUN, *teacher, "--epochs", 1)
    assert results(tmp_path / "runs" / "distill")["dataset"]["name"] == f"{data}:bars"

    (tmp_path / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        run("distill.py", "--resume", tmp_path / "runs" / "distill", "--epochs", 2)
    assert results(tmp_path / "runs" / "distill")["last_epoch"] == 2

    run("evaluate.py", "runs/distill/best.pth", "--device", "cpu")
    evaluation = json.loads((tmp_path / "runs" / "evaluate" / "evaluation.json").read_text())
    recorded = results(tmp_path / "runs" / "distill")["test"]["accuracy"]
    assert evaluation["student"]["accuracy"] == pytest.approx(recorded)
    Image.fromarray(pixels(7)).save(tmp_path / "seven.png")
    run(
        "evaluate.py", "runs/distill/best.pth", "--predict", "seven.png", "--device", "cpu", "--output", "predicted.csv"
    )
    assert "seven.png" in (tmp_path / "predicted.csv").read_text()
    run("extract_embeddings.py", "--checkpoint", "runs/distill/best.pth", "--device", "cpu")
    assert len(np.load(tmp_path / "embeddings" / "test_embeddings" / "embeddings.npy")) == 32
    assert "no gallery" not in run("report.py", "runs", "--output", "page")
    notes, (records, _) = [], report.read_runs(report.find_run_folders(["runs/distill"]))
    images = report.open_test_set(records[0], {}, notes)  # for the gallery
    assert not notes and np.array_equal(images.read(2), pixels(122))

    data.unlink()
    refused("evaluate.py", "runs/distill/best.pth", "--device", "cpu", words=[data, "does not exist"])
    refused("distill.py", "--resume", "runs/distill", "--epochs", 3, words=[data, "does not exist"])
