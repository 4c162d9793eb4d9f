"""--dry-run: what it prints against figures counted by hand, that nothing is written, and what a real run then does."""

import copy
import json
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SMALL, script_environment
from PIL import Image
from sklearn.datasets import load_digits
from test_scripts import RUN_FILES

import train_student
from common import cli, dry_run
from common.models import build_model
from common.training import Precision, make_optimizer

MB = 2**20


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def cells(text, label):
    """The figures behind a label at the start of a line."""
    line = next(line for line in text.splitlines() if line.startswith(f"{label}  "))
    return line[len(label) :].split()


def amounts(text):
    """{part: MB} of the memory estimate."""
    found = re.findall(
        r"^(weights|gradients|optimizer state|average of the weights|teacher|activations|data cache|together)"
        r"  +([\d,.]+) MB$",
        text,
        re.M,
    )
    return {name: float(value.replace(",", "")) for name, value in found}


@pytest.fixture
def dry(here, tmp_path):
    """Run a script with --dry-run in this process: its stdout; it must write nothing."""

    def run(name, *args):
        before = listing(tmp_path)
        code, out, errors = here(name, "--dry-run", "--device", "cpu", *args)
        assert code == 0 and not errors, (code, errors)
        assert listing(tmp_path) == before
        return out

    return run


def test_a_student_of_digits_and_what_the_run_then_leaves(dry, here, tmp_path):
    flags = [
        "--dataset",
        "digits",
        "--epochs",
        2,
        "--limit-train",
        100,
        "--batch-size",
        32,
        "--save-every",
        1,
        "--save-samples",
        "grid.png",
    ]
    out = dry("train_student.py", *flags)
    assert "digits (handwriting)" in out and cells(out, "resolution") == ["8", "px"]
    labels = load_digits().target
    assert cells(out, "images") == ["100", "270", "719"]  # 40 % of 1,797 are test, 25 % of the others val
    counts = np.array([[int(n) for n in cells(out, str(c))] for c in range(10)])
    assert counts.sum(0).tolist() == [100, 270, 719]
    assert (counts.sum(1) <= np.bincount(labels)).all() and np.abs(counts[:, 2] - np.bincount(labels) * 0.4).max() < 1
    assert cells(out, "parameters") == cells(out, "of them trained") == ["4,903,242"]
    assert [cells(out, name) for name in ("steps an epoch", "epochs", "steps", "images a step")] == [
        ["3"],
        ["2"],
        ["6"],
        ["32"],
    ]
    buffers = sum(b.nbytes for b in build_model("resnet8", 10, 8).buffers())
    weights = 4 * 4_903_242 + buffers
    parts = amounts(out)
    assert parts["weights"] == pytest.approx(weights / MB, abs=0.06) and cells(out, "checkpoint weights") == [
        f"{weights / MB:.1f}",
        "MB",
    ]
    assert parts["gradients"] == parts["optimizer state"] == pytest.approx(4 * 4_903_242 / MB, abs=0.06)
    assert parts["data cache"] == pytest.approx((100 + 270) * 3 * 64 / MB, abs=0.06)
    assert parts["together"] == pytest.approx(sum(v for k, v in parts.items() if k != "together"), abs=0.3)
    assert "runs/student (new)" in out and "grid.png" in out

    code, _, errors = here("train_student.py", "--device", "cpu", *flags)
    assert code == 0, errors
    folder = tmp_path / "runs" / "student"
    named = set(" ".join(cells(out, "files")).split(", ")) | {"best.pth", "latest.pth"}
    assert named == RUN_FILES and {f.name for f in folder.iterdir()} == RUN_FILES | {"epoch_1.pth", "epoch_2.pth"}
    each, together = (
        float(v) * MB for v in re.search(r"epoch_N.pth \(2\): ([\d.]+) MB each, ([\d.]+) MB together", out).groups()
    )
    assert each == pytest.approx((folder / "latest.pth").stat().st_size, rel=0.02) and together == pytest.approx(
        4 * each, rel=0.02
    )
    for name in ("config.json", "results.json"):  # the flag is no setting, not even where a file says so
        saved = json.loads((folder / name).read_text())["flags"]
        assert saved["dry_run"] is False
        (tmp_path / "dry.json").write_text(json.dumps({"flags": {**saved, "dry_run": True}}))
        again = cli.parse_flags(train_student.build_parser(), ["--config", str(tmp_path / "dry.json")])
        assert again.dry_run is False and again.epochs == 2

    again = dry("train_student.py", *flags)
    assert "it holds a run: --overwrite or --resume would be needed" in again
    assert "which is replaced" in dry("train_student.py", *flags, "--overwrite")
    resumed = dry("train_student.py", "--resume", folder, "--epochs", 5)
    assert (
        "continued after epoch 2" in resumed
        and "2 of 5 epochs are done" in resumed
        and cells(resumed, "steps") == ["15"]
    )
    code, _, errors = here("train_student.py", "--dry-run", "--config", folder / "config.json", "--output", "other")
    assert code == 0 and not (tmp_path / "other").exists()


def test_steps_parts_and_a_point_of_a_sweep(dry, tmp_path):
    (tmp_path / "grid.json").write_text(
        json.dumps([{"name": "slow", "lr": 0.01}, {"name": "wide", "batch-size": 48, "epochs": 7}])
    )
    flags = ["--dataset", "digits", "--limit-train", 100, "--model", "resnet8", "--accumulation-steps", 3]
    out = dry("train_teacher.py", *flags, "--sweep", "grid.json", "--sweep-index", 1)
    assert [cells(out, name) for name in ("steps an epoch", "epochs", "steps", "images a step")] == [
        ["2"],
        ["7"],
        ["14"],
        ["48"],
    ]
    assert "3 parts" in out and "images at once: 16 of 8 px" in out and "runs/teacher/wide (new)" in out


def test_parameters_and_checkpoint_of_a_timm_model(dry):
    """AdamW keeps two figures of each parameter, --ema a copy of the weights."""
    reference = timm.create_model("resnet10t", num_classes=10)
    count = sum(p.numel() for p in reference.parameters())
    state = sum(v.nbytes for v in reference.state_dict().values())
    out = dry(
        "train_student.py", "--model", "timm:resnet10t", "--resolution", 32, "--optimizer", "adamw", "--ema", 0.99
    )
    assert cells(out, "parameters") == [f"{count:,}"] == cells(out, "of them trained")
    parts = amounts(out)
    assert parts["optimizer state"] == pytest.approx(8 * count / MB, abs=0.06) and parts["gradients"] == pytest.approx(
        4 * count / MB, abs=0.06
    )
    assert parts["average of the weights"] == parts["weights"] == pytest.approx(state / MB, abs=0.06)
    each = float(re.search(r"latest.pth: ([\d.]+) MB each", out)[1])
    assert each == pytest.approx((2 * state + 8 * count) / MB, abs=0.06)


def test_a_teacher_and_its_student(dry, teacher):
    out = dry(
        "distill.py",
        *SMALL,
        "--model",
        "resnet18",
        "--teacher-checkpoint",
        teacher / "best.pth",
        "--epochs",
        4,
        "--method",
        "feature",
        "--student-layer",
        "layer3",
        "--teacher-layer",
        "layer3",
    )
    assert cells(out, "name") == ["resnet18", "resnet8"] and cells(out, "parameters") == ["11,173,962", "4,903,242"]
    assert cells(out, "of them trained") == ["11,173,962", "0"]
    assert "the teacher is not judged on val in a dry run" in out and "val accuracy" not in out
    assert cells(out, "steps") == ["20"]
    assert amounts(out)["teacher"] == pytest.approx(4 * 4_903_242 / MB, rel=0.01)
    assert cells(out, "projectors, parameters")[0].replace(",", "").isdigit()


def test_tasks_texts_and_many_classes(dry, tmp_path):
    """Counts of each task, of 30 classes the 20 that train has most of."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    for split in ("train", "val", "test"):
        lines = []
        for c in range(30):
            for i in range((c // 10 + 1) * (2 if split == "train" else 1)):  # 2, 4 and 6 images of ten classes each
                name = f"{split}_{c}_{i}.png"
                Image.new("L", (16, 16)).save(tmp_path / "data" / "images" / name)
                lines.append(
                    json.dumps(
                        {
                            "image": name,
                            "text": "a dark view",
                            "kind": f"k{c:02d}",
                            "side": "rl"[i % 2] if c // 10 else "r",
                        }
                    )
                    + "\n"
                )
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines))
    out = dry(
        "train_student.py",
        "--dataset",
        "image_text",
        "--data-root",
        "data",
        "--tasks",
        "kind",
        "side",
        "--resolution",
        16,
        "--image-model",
        "resnet8",
        "--text-model",
        "bert-tiny-scratch",
        "--fusion-dim",
        32,
        "--max-length",
        8,
    )
    assert cells(out, "images") == ["120", "60", "60"]
    shown = re.findall(r"^kind: (k\d\d) +(\d+) +(\d+) +(\d+)$", out, re.M)
    assert shown == [(f"k{c}", *(("4", "2", "2") if c < 20 else ("6", "3", "3"))) for c in range(10, 30)]
    assert "and 10 more of kind" in out and "and 10 more of side" not in out
    assert re.findall(r"^side: (\w) +(\d+)", out, re.M) == [("l", "50"), ("r", "70")]
    assert (
        "confusion_val_kind.npy" in out
        and "confusion_test_side.npy" in out
        and cells(out, "name") == ["resnet8+bert-tiny-scratch"]
    )


def test_bad_input_is_refused_as_in_a_run(here, tmp_path):
    for flags, word in (
        (["--limit-train", 5000], "--limit-train 5000"),
        (["--model", "resnet9000"], "resnet9000"),
        (["--resume", "gone"], "gone"),
    ):
        (code, _, errors), real = (
            here("train_student.py", "--device", "cpu", *flags, *dry) for dry in (["--dry-run"], [])
        )
        assert code == real[0] == 2 and errors == real[2] and word in errors and len(errors.splitlines()) == 1
        assert not list(tmp_path.iterdir())


def test_two_processes_print_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        world = {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {**script_environment(), **{k: str(v) for k, v in world.items()}, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, ROOT / "train_student.py", "--dry-run", "--device", "cpu"],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert outs[1][0] == "" and "2 processes" in outs[0][0] and "images at once: 16 of 8 px" in outs[0][0]
    parts = amounts(outs[0][0])
    assert parts["gradients"] == pytest.approx(2 * parts["optimizer state"], abs=0.11) and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- bytes


class Small(torch.nn.Module):
    """3 * side^2 values -> 7 -> ReLU -> 2."""

    def __init__(self, side):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3 * side * side, 7), torch.nn.Linear(7, 2)

    def example(self, side, rows):
        return {"image": torch.zeros(rows, 3, side, side)}

    def forward(self, batch):
        return self.last(torch.relu(self.first(batch["image"].flatten(1))))


def test_activations_of_two_layers_by_hand():
    """The input and the ReLU's output, once though two layers save it, of each image; no weight is counted."""
    precision = Precision("off", torch.device("cpu"))
    assert dry_run.kept_bytes(Small(4), precision, 4, 3) == 3 * (48 + 7) * 4
    assert dry_run.activations(Small(4), precision, 4, 100) == 100 * (48 + 7) * 4


def test_half_precision_halves_the_activations():
    """All that a convolution and its norm save of images is in bfloat16; but the input, and the norm's in float32."""
    model = build_model("vit_tiny", 10, 16)
    full, half = (dry_run.activations(model, Precision(name, torch.device("cpu")), 16, 64) for name in ("off", "bf16"))
    assert 0.4 < half / full < 0.85


@pytest.mark.parametrize(
    "name, momentum, figures", [("sgd", 0.9, 1), ("sgd", 0.0, 0), ("adam", 0.9, 2), ("adamw", 0.9, 2)]
)
def test_optimizer_state_is_what_a_step_makes(name, momentum, figures):
    """61 parameters of 4 bytes, and what torch's optimizer holds after a step, its counters of steps apart."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 10), torch.nn.Linear(10, 1))
    optimizer = make_optimizer(model, optimizer=name, lr=0.1, momentum=momentum)
    updater = SimpleNamespace(
        parameters=[p for group in optimizer.param_groups for p in group["params"]], optimizer=optimizer, average=None
    )
    found = dry_run.training_bytes(updater)
    assert found == {"gradients": 61 * 4, "optimizer state": figures * 61 * 4}
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    held = sum(
        v.nbytes
        for state in optimizer.state.values()
        for key, v in state.items()
        if isinstance(v, torch.Tensor) and key != "step"
    )
    assert held == found["optimizer state"]


def test_a_compiled_model_is_measured_uncompiled():
    """A shallow copy shares the weights and calls the plain forward pass."""
    model = build_model("resnet8", 10, 8)
    model.compile(backend=lambda graph, inputs: pytest.fail("it was compiled"))
    plain = copy.copy(model)
    assert dry_run.kept_bytes(plain, Precision("off", torch.device("cpu")), 8, 2) > 0
    assert all(a is b for a, b in zip(plain.parameters(), model.parameters()))
