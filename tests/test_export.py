"""evaluate.py --export: each file is run by its own runtime in a process without this project, and equals the model."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, succeed
from PIL import Image
from torchvision.transforms import v2

from common.export import plain_view


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A digits student of timm's ViT family, trained for one epoch."""
    folder = tmp_path_factory.mktemp("student") / "run"
    flags = ["--model", "vit_6_192", "--optimizer", "adamw", "--epochs", 1, "--output", folder]
    succeed("train_student.py", *SMALL, *flags)
    return folder


def exported(run, target, *flags):
    """(largest difference, {metric: (export's, checkpoint's)}) of each line that evaluate.py prints."""
    done = succeed("evaluate.py", run / "best.pth", "--export", target, "--batch-size", 100, *flags)
    found = []
    for line in done.stdout.splitlines()[:-1]:
        pairs = re.findall(r"(\w+) ([\d.]+) \(checkpoint ([\d.]+)\)", line)
        difference = float(re.search(r"largest difference of \w+ ([\d.e+-]+)", line)[1])
        found.append((difference, {name: (float(a), float(b)) for name, a, b in pairs}))
    return found


def alone(code, *args):
    """Run code in a process that does not see this project; returns what it prints, as JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", "import json, sys, numpy as np\n" + code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def digits_input():
    """(the test split's normalized 8 x 8 digits of the mean and std that DATASETS names, its stored order)."""
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images * 255 / 16) / 255


RUNTIMES = {
    ".safetensors": """
import timm, torch
from safetensors.torch import load_file
about = json.load(open(sys.argv[1] + ".json"))
model = timm.create_model(**about["timm"]).eval()
model.load_state_dict(load_file(sys.argv[1]))
with torch.no_grad():
    print(json.dumps(model(torch.from_numpy(np.load(sys.argv[2]))).tolist()))""",
    ".onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(json.dumps(session.run(["logits"], {"image": np.load(sys.argv[2])})[0].tolist()))""",
    ".pt2": """
import torch
with torch.no_grad():
    print(json.dumps(torch.export.load(sys.argv[1]).module()(torch.from_numpy(np.load(sys.argv[2])))[0].tolist()))""",
}


@pytest.mark.parametrize("kind", RUNTIMES)
def test_each_file_runs_without_this_project(student, tmp_path, kind):
    if kind == ".onnx":
        pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    target = tmp_path / f"model{kind}"
    ((difference, metrics),) = exported(student, target)
    assert difference < 1e-4 and all(a == b for a, b in metrics.values()) and "accuracy" in metrics
    about = json.loads((tmp_path / f"model{kind}.json").read_text())
    stored = np.load(student / "predictions_test.npz", allow_pickle=False)
    rows = [int(name.split("/")[1]) for name in stored["ids"][:7]]  # another batch size than any at the export
    mean, std = (np.array(about["preprocessing"][name]).reshape(3, 1, 1) for name in ("mean", "std"))
    images = ((digits_input()[rows][:, None] - mean) / std).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    found = alone(RUNTIMES[kind], target, tmp_path / "images.npy")
    assert np.abs(np.array(found) - stored["logits"][:7]).max() < 1e-3
    assert about["classes"] == [str(c) for c in range(10)] and about["outputs"] == ["logits"]


WHOLE = """
from PIL import Image
image = np.asarray(Image.open(sys.argv[2]).convert("RGB")).transpose(2, 0, 1)[None]
if sys.argv[1].endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    out = session.run(["probabilities"], {"image": image})[0]
else:
    import torch
    out = torch.export.load(sys.argv[1]).module()(torch.from_numpy(image.copy()))[0].detach().numpy()
print(json.dumps(out[0].tolist()))"""


@pytest.mark.parametrize("kind", [".onnx", ".pt2"])
def test_with_preprocessing_an_image_file_gives_its_probabilities(student, tmp_path, kind):
    """Of images of any size: beside --predict, which decodes and renders them."""
    if kind == ".onnx":
        pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    target = tmp_path / f"model{kind}"
    ((difference, metrics),) = exported(student, target, "--with-preprocessing")
    assert difference < 1e-4 and all(a == b for a, b in metrics.values())
    for number, size in enumerate([(8, 8), (31, 20), (5, 9)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    flags = ["--predict", tmp_path / "0.png", tmp_path / "1.png", tmp_path / "2.png", "--device", "cpu"]
    succeed("evaluate.py", student / "best.pth", *flags, "--output", tmp_path / "table.csv", "--workers", 0)
    table = np.genfromtxt(tmp_path / "table.csv", delimiter=",", skip_header=1)[:, 3:]
    for number in range(3):
        found = alone(WHOLE, target, tmp_path / f"{number}.png")
        assert np.abs(np.array(found) - table[number]).max() < 2e-3
    assert not np.allclose(table[0], table[1], atol=0.02) or not np.allclose(table[1], table[2], atol=0.02)


@pytest.mark.parametrize("size", [(50, 70), (70, 50), (64, 64), (20, 31)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_the_plain_view_is_torchvision_s(size, crop_mode):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shown = v2.functional.center_crop(images, min(size)) if crop_mode == "center" else images
    expected = v2.functional.resize(shown.float(), [32, 32], antialias=True) / 255
    if crop_mode == "center" and (size[0] - size[1]) % 2:  # torchvision rounds half of an odd border to even
        top, left = ((side - min(size)) // 2 for side in size)
        shown = images[:, :, top : top + min(size), left : left + min(size)]
        expected = v2.functional.resize(shown.float(), [32, 32], antialias=True) / 255
    assert (plain_view(images, 32, crop_mode) - expected).abs().max() < 1e-5


def test_eight_bits(student, tmp_path):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    (_, whole), (difference, small) = exported(student, tmp_path / "model.onnx", "--quantize", "int8")
    assert os.path.getsize(tmp_path / "model.int8.onnx") < 0.4 * os.path.getsize(tmp_path / "model.onnx")
    assert 1e-4 < difference and small["accuracy"][1] == whole["accuracy"][1]
    assert "`model.onnx` and `model.int8.onnx`: inputs" in (tmp_path / "README.md").read_text()
    assert abs(small["accuracy"][0] - small["accuracy"][1]) < 0.1


def test_the_card_says_what_results_json_says(student, tmp_path):
    exported(student, tmp_path / "model.safetensors", "--data-licence", "CC-BY-4.0")
    card, results = (tmp_path / "README.md").read_text(), json.loads((student / "results.json").read_text())
    low, high = results["intervals"]["test"]["accuracy"]
    assert f"| accuracy | {results['test']['accuracy']:.4f} | {low:.4f} to {high:.4f} |" in card
    assert "CC-BY-4.0" in card and "# vit_6_192" in card and card.startswith("---\nlibrary_name: timm\n")
    assert "supervised" in card and "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "model.safetensors", "model.safetensors.json"]
    weights = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from safetensors import safe_open as o; print(o(sys.argv[1], 'pt').metadata())",
        ]
        + [str(tmp_path / "model.safetensors")],
        capture_output=True,
        text=True,
    )
    assert "vit_tiny_patch16_224" in weights.stdout  # timm's arguments are in its metadata too
    exported(student, tmp_path / "other.pt2")
    card = (tmp_path / "README.md").read_text()
    assert "`model.safetensors`: inputs" in card and "`other.pt2`: inputs" in card and "CC-BY-4.0" in card
    modes = {oct(os.stat(tmp_path / name).st_mode) for name in ("model.safetensors", "other.pt2", "README.md")}
    assert len(modes) == 1, modes


def test_what_is_refused(student, tmp_path, refused):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    checkpoint = student / "best.pth"
    (tmp_path / "there.pt2").write_text("kept")
    (tmp_path / "a.int8.onnx").write_text("kept")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# My project")
    for flags, words in (
        (["--export", "a.bin"], ["a.bin", ".safetensors, .onnx, .pt2"]),
        (["--export", "a.pt2", "--quantize", "int8"], ["--quantize", ".pt2"]),
        (["--export", "a.safetensors", "--with-preprocessing"], ["--with-preprocessing", "weights alone"]),
        (["--export", "there.pt2"], ["there.pt2 is there", "--overwrite"]),
        (["--export", "a.onnx", "--quantize", "int8"], ["a.int8.onnx is there", "--overwrite"]),
        (["--export", "mine/a.pt2"], ["README.md", "not a model card"]),
        (["--export", "a.pt2", "--knn"], ["--knn and --export"]),
        (["--export", "a.pt2", "--data-root", "nowhere", "--dataset", "imagefolder"], ["nowhere"]),
        (["--with-preprocessing"], ["--with-preprocessing needs --export"]),
        (["--quantize", "int8"], ["--quantize needs --export"]),
        (["--data-licence", "MIT"], ["--data-licence needs --export"]),
    ):
        refused("evaluate.py", checkpoint, *flags, words=words)
    assert (tmp_path / "there.pt2").read_text() == "kept"
    assert (tmp_path / "a.int8.onnx").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.int8.onnx", "mine", "there.pt2"]


def test_a_model_that_no_exporter_knows_is_named(tmp_path, refused):
    (tmp_path / "own.py").write_text(
        "import torch\n\nclass Odd(torch.nn.Module):\n    def __init__(self, classes):\n        super().__init__()\n"
        "        self.layer = torch.nn.Linear(192, classes)\n\n    def forward(self, x):\n"
        "        return self.layer(torch.from_numpy(x.detach().cpu().flatten(1).numpy()) if not self.training\n"
        "                          else x.flatten(1))\n\ndef odd(classes):\n    return Odd(classes)\n"
    )
    flags = ["--model", tmp_path / "own.py:odd", "--epochs", 1, "--output", tmp_path / "run"]
    succeed("train_student.py", *SMALL, *flags)
    refused("evaluate.py", tmp_path / "run" / "best.pth", "--export", "a.pt2", words=["cannot be exported to a.pt2"])
    assert not (tmp_path / "a.pt2").exists()
