"""The scripts as a user runs them: what they write, what they refuse, and that each copies out."""

import ast
import csv
import errno
import importlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run_script, succeed
from PIL import Image

import extract_embeddings
import train_student
from common import cli, run, training

TRAINING = ("train_teacher.py", "train_student.py", "distill.py")
RUN_FILES = {
    "best.pth",
    "latest.pth",
    "config.json",
    "metrics.csv",
    "metrics.json",
    "results.json",
    "log.txt",
    "predictions_val.npz",
    "predictions_test.npz",
    "confusion_val_label.npy",
    "confusion_test_label.npy",
}


def read(path):
    return json.loads(path.read_text())


# -------------------------------------------------------------------------------------------------------- main job


def test_few_labels_many_images(here, refused, teacher):
    """distill.py shows all images and takes the labels that train_student.py --limit-train has; on digits 100 by
    default."""
    flags = ["--dataset", "digits", "--epochs", 1, "--batch-size", 64, "--device", "cpu"]
    taught = [*flags, "--teacher-checkpoint", teacher / "best.pth"]
    assert here("train_student.py", *flags, "--output", "alone")[0] == 0
    code, log, _ = here("distill.py", *taught, "--output", "taught")
    alone, kd = (read(Path(name, "results.json")) for name in ("alone", "taught"))
    assert code == 0 and "808 train (100 with labels)" in log
    assert kd["dataset"]["labelled"] == {"train": 100, "sha256": alone["dataset"]["sha256"]["train"]}
    assert kd["dataset"]["sizes"]["train"] == 808 and alone["dataset"]["sizes"]["train"] == 100
    row = read(Path("taught/metrics.json"))[0]
    assert all(math.isfinite(row[f"train_{name}"]) for name in ("loss", "ce", "kl", "accuracy"))
    assert here("distill.py", *taught, "--limit-labels", 0, "--method", "dkd", "--output", "all")[0] == 0
    assert "labelled" not in read(Path("all/results.json"))["dataset"]
    refused("distill.py", *taught, "--sampler", "balanced", words=["--sampler balanced", "--limit-labels 100"])
    refused("distill.py", *taught, "--method", "tokens", "--limit-labels", 9, words=["--limit-labels", "needs labels"])
    refused("distill.py", *taught, "--limit-train", 200, "--limit-labels", 201, words=["--limit-labels 201", "200"])


def pictures(folder, count=30, side=12):
    rng = np.random.default_rng(9)
    for i in range(count):
        (folder / f"part {i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(folder / f"part {i % 2}" / f"{i}.png")


def test_images_without_labels_beside_the_labelled(here, refused, teacher, tmp_path):
    """The labelled ones are a plain student's; live and from a store; a resumed run equals one that was not stopped."""
    pictures(tmp_path / "more")
    flags = ["--dataset", "digits", "--epochs", 2, "--batch-size", 32, "--device", "cpu", "--resolution", 8]
    more = ["--limit-train", 64, "--unlabeled-root", "more", "--labelled-share", 0.25]
    live = [*flags, *more, "--teacher-checkpoint", teacher / "best.pth", "--allow-weak-teacher"]
    assert here("train_student.py", *flags, "--limit-train", 64, "--output", "alone")[0] == 0
    code, log, errors = here("distill.py", *live, "--output", "live")
    assert code == 0 and "94 train (64 with labels)" in log, errors
    alone, kd = (read(Path(name, "results.json")) for name in ("alone", "live"))
    assert kd["dataset"]["labelled"] == {"train": 64, "sha256": alone["dataset"]["sha256"]["train"]}
    assert kd["flags"]["unlabeled_root"] == str(tmp_path / "more")
    assert here("distill.py", *live, "--epochs", 1, "--schedule", "constant", "--output", "part")[0] == 0
    assert here("distill.py", *live, "--schedule", "constant", "--output", "whole")[0] == 0
    assert here("distill.py", "--resume", "part", "--epochs", 2)[0] == 0
    part, whole = (torch.load(Path(name, "latest.pth"), weights_only=True)["model"] for name in ("part", "whole"))
    assert all(torch.equal(part[name], whole[name]) for name in whole)
    assert here("evaluate.py", "live/best.pth", "--knn", "--device", "cpu")[0] == 0, "train there has labels"

    store = ["extract_embeddings.py", "--checkpoint", teacher / "best.pth", "--save-logits", "--device", "cpu"]
    code, _, errors = here(*store, "--unlabeled-root", "more", "--output", "store")
    assert code == 0, errors
    stored = ["--teacher-embeddings", "store", "--allow-weak-teacher", *flags, "--limit-labels", 64]
    code, log, errors = here("distill.py", *stored, "--labelled-share", 0.5, "--output", "stored")
    assert code == 0 and "838 train (64 with labels)" in log, errors

    refused("distill.py", *live, "--labelled-share", 0.001, words=["--labelled-share 0.001", "64 images with and 30"])
    refused("distill.py", *live, "--unlabeled-root", "nowhere", words=["--unlabeled-root", "nowhere", "not a folder"])
    refused("distill.py", *live, "--sampler", "balanced", words=["--sampler balanced", "--unlabeled-root"])


def test_the_stages_one_after_the_other(tmp_path, teacher):
    """Teacher, student, distilled student, evaluation, report: files, figures that agree, and a second time."""
    shutil.copytree(teacher, tmp_path / "runs" / "teacher")
    for script, name in (("train_student.py", "student"), ("distill.py", "distill")):
        succeed(script, *SMALL, "--epochs", 2, cwd=tmp_path)
        folder = tmp_path / "runs" / name
        assert {f.name for f in folder.iterdir()} == RUN_FILES
        results, rows = read(folder / "results.json"), read(folder / "metrics.json")
        assert results["role"] == name and results["last_epoch"] == 2 and len(rows) == 2
        assert results["dataset"]["sizes"] == {"train": 160, "val": 270, "test": 719}
        assert results["model"]["parameters"] == 4_903_242
        assert results["val"]["accuracy"] == max(row["val_accuracy"] for row in rows)
        with open(folder / "metrics.csv") as file:
            table = list(csv.DictReader(file))
        assert [float(line["train_loss"]) for line in table] == [row["train_loss"] for row in rows]
        stored = np.load(folder / "predictions_test.npz", allow_pickle=False)
        assert stored["logits"].dtype == np.float32 and stored["logits"].shape == (719, 10)
        assert len(set(stored["ids"])) == 719 and list(stored["classes"]) == [str(i) for i in range(10)]
        accuracy = np.mean(stored["logits"].argmax(1) == stored["labels"])
        assert results["test"]["accuracy"] == pytest.approx(accuracy)
        matrix = np.load(folder / "confusion_test_label.npy", allow_pickle=False)
        assert matrix.sum() == 719 and np.trace(matrix) == round(accuracy * 719)
        assert np.array_equal(matrix.sum(1), np.bincount(stored["labels"], minlength=10))  # rows are the true classes
        recalls = results["class_recalls"]["test"]
        assert list(recalls) == list(stored["classes"]) and list(recalls.values()) == pytest.approx(
            matrix.diagonal() / matrix.sum(1)
        )
        assert {*results["class_recalls"]} == {*results["intervals"]} == {"val", "test"}
        for split, intervals in results["intervals"].items():
            assert {*intervals} == {"accuracy", "balanced_accuracy", "auc", "average_precision", "pauc"}
            for metric, (low, high) in intervals.items():
                assert low < results[split][metric] < high, (split, metric)
        low, high = results["intervals"]["test"]["accuracy"]
        assert f"test accuracy {accuracy:.4f} [{low:.3f}, {high:.3f}], balanced " in (folder / "log.txt").read_text()

    kd = read(tmp_path / "runs/distill/results.json")
    assert kd["method"] == "response" and kd["teacher"]["name"] == "resnet8"
    assert kd["teacher"]["sha256"] == read(teacher / "results.json")["checkpoint_sha256"]
    assert {"train_ce", "train_kl", "val_agreement", "val_teacher_kl"} <= read(tmp_path / "runs/distill/metrics.json")[
        0
    ].keys()

    done = succeed(
        "evaluate.py", "runs/distill/best.pth", "--teacher-checkpoint", "runs/teacher/best.pth", cwd=tmp_path
    )
    judged = read(tmp_path / "runs/evaluate/evaluation.json")
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "ece", "agreement", "teacher_kl"):
        assert judged["student"][key] == pytest.approx(kd["test"][key], abs=1e-6), key
    assert judged["teacher"]["accuracy"] == pytest.approx(read(teacher / "results.json")["test"]["accuracy"])
    assert judged["student"]["multiply_adds"] > 1e6 and judged["student"]["latency_ms"] > 0
    for key in ("intervals", "class_recalls"):
        assert judged["student"][key].keys() == kd[key]["test"].keys()
        for name, value in kd[key]["test"].items():
            assert judged["student"][key][name] == pytest.approx(value, abs=1e-6), name
    lines = {line[:31].strip(): line.split() for line in done.stdout.splitlines()}
    low, high = kd["intervals"]["test"]["auc"]
    assert (
        lines["auc"][2:4] == [f"[{low:.3f},", f"{high:.3f}]"]
        and lines["recall 3"][2] == f"{kd['class_recalls']['test']['3']:.4f}"
    )
    assert "multiply_adds" in done.stdout and (tmp_path / "runs/evaluate/confusion_test_label.npy").exists()

    succeed("report.py", "runs", "--reevaluate", cwd=tmp_path)
    (group,) = read(tmp_path / "report/report.json")["groups"]
    assert group["student_accuracy_with_kd"]["mean"] == pytest.approx(kd["test"]["accuracy"], abs=1e-6)
    assert group["teacher_accuracy"]["mean"] == pytest.approx(judged["teacher"]["accuracy"], abs=1e-6)

    # a second time: refused, nothing touched, then replaced with the same result
    before = (tmp_path / "runs/student/results.json").read_bytes()
    done = run_script("train_student.py", *SMALL, "--epochs", 2, cwd=tmp_path)
    assert done.returncode == 2 and "--overwrite" in done.stderr and "--resume" in done.stderr
    assert (tmp_path / "runs/student/results.json").read_bytes() == before
    succeed("train_student.py", *SMALL, "--epochs", 2, "--overwrite", cwd=tmp_path)
    assert read(tmp_path / "runs/student/results.json")["test"] == json.loads(before)["test"]


def test_distillation_starts_from_the_baseline_s_weights(tmp_path, teacher, here):
    """The same seed, cross-entropy alone: the distilled student is the baseline, bit for bit (the harness is one)."""
    flags = [*SMALL, "--epochs", 1, "--seed", 7]
    assert here("train_student.py", *flags, "--output", "a")[0] == 0
    assert (
        here("distill.py", *flags, "--teacher-checkpoint", teacher / "best.pth", "--alpha", 1, "--output", "b")[0] == 0
    )
    a, b = (torch.load(tmp_path / f / "best.pth", weights_only=True)["model"] for f in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_split_seed_and_seed(tmp_path, here):
    """--seed never moves a split, --split-seed does."""
    hashes = {}
    for name, flags in (("a", []), ("b", ["--seed", 5]), ("c", ["--split-seed", 1])):
        assert here("train_student.py", *SMALL, "--epochs", 1, *flags, "--output", name)[0] == 0
        hashes[name] = read(tmp_path / name / "results.json")["dataset"]["sha256"]
    assert hashes["a"] == hashes["b"]
    assert hashes["a"]["val"] != hashes["c"]["val"] and hashes["a"]["train"] != hashes["c"]["train"]
    assert hashes["a"]["test"] == hashes["c"]["test"]


def test_image_folder_with_vits_and_features(tmp_path, cifar_folder, here):
    """Real colour images; ViT teacher at another resolution than the student; feature distillation; sample grid."""
    data = [
        "--dataset",
        "imagefolder",
        "--data-root",
        cifar_folder,
        "--batch-size",
        20,
        "--epochs",
        1,
        "--optimizer",
        "adamw",
    ]
    assert here("train_teacher.py", *data, "--model", "vit_tiny", "--patch-size", 8, "--output", "t")[0] == 0
    code, out, errors = here(
        "distill.py",
        "--teacher-checkpoint",
        "t/best.pth",
        "--batch-size",
        20,
        "--epochs",
        1,
        "--model",
        "vit_6_192",
        "--patch-size",
        4,
        "--resolution",
        16,
        "--method",
        "feature",
        "--student-layer",
        "blocks.5",
        "--teacher-layer",
        "blocks.11",
        "--loss-options",
        "feature.distance=cosine",
        "--save-samples",
        "grid.png",
        "--allow-weak-teacher",
        "--amp",
        "bf16",
        "--teacher-resolution",
        48,
        "--cache",
        "off",
        "--workers",
        1,
    )
    assert code == 0, errors
    results = read(tmp_path / "runs/distill/results.json")
    assert results["dataset"]["name"] == "imagefolder" and results["model"]["family"] == "vit"
    row = read(tmp_path / "runs/distill/metrics.json")[0]
    assert 0 < row["train_feature"] <= 2 and row["train_loss"] == pytest.approx(
        0.5 * row["train_ce"] + 0.5 * row["train_kl"] + row["train_feature"], rel=1e-5
    )
    with Image.open(tmp_path / "grid.png") as grid:
        top, bottom = np.split(np.asarray(grid.convert("L"), dtype=float)[1:-1], 2)
        assert grid.size == (16 * 66 + 2, 2 * 66 + 2)  # tiles of 64, gaps of 2
        assert np.abs(top - bottom).mean() < 20 < top.std()  # the same views at two resolutions, and not one grey


def test_dropout_state_and_custom_layers_of_timm(tmp_path, teacher, here):
    """A timm student, features of both by module path, one by hook and one by forward_intermediates."""
    code, _, errors = here(
        "distill.py",
        *SMALL,
        "--resolution",
        32,
        "--epochs",
        1,
        "--teacher-checkpoint",
        teacher / "best.pth",
        "--method",
        "feature",
        "--model",
        "timm:test_resnet",
        "--student-layer",
        "layer3",
        "--teacher-layer",
        "layer3.0",
    )
    assert code == 0, errors
    assert here("evaluate.py", "runs/distill/best.pth")[0] == 0
    assert read(tmp_path / "runs/evaluate/evaluation.json")["student"]["model"] == "timm:test_resnet"


# ----------------------------------------------------------------------------------------------------------- config


def test_config_file_and_command_line(tmp_path, here):
    (tmp_path / "c.json").write_text(
        json.dumps({"epochs": 1, "batch-size": 32, "lr": 0.2, "limit_train": 160, "nesterov": True})
    )
    assert here("train_student.py", "--config", "c.json", "--lr", 0.02)[0] == 0
    flags = read(tmp_path / "runs/student/config.json")["flags"]
    assert flags["lr"] == 0.02 and flags["epochs"] == 1 and flags["nesterov"] is True
    config = tmp_path / "runs/student/config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())  # the byte order mark of a Windows editor
    assert here("train_student.py", "--config", "runs/student/config.json", "--output", "again")[0] == 0
    assert read(tmp_path / "again/results.json")["test"] == read(tmp_path / "runs/student/results.json")["test"]


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"batchsize": 3}', ["batchsize", "did you mean --batch-size?"]),
        ('{"lr": "fast"}', ["--lr", "fast"]),
        ("[1]", ["c.json"]),
        ("{", ["c.json", "JSON"]),
        ('{"epochs": 0}', ["--epochs"]),
    ],
)
def test_bad_config(tmp_path, refused, content, words):
    (tmp_path / "c.json").write_text(content)
    refused("train_student.py", "--config", "c.json", words=words)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "args, words",
    [
        (["--epochs", 0], ["--epochs", "0"]),
        (["--batch-size", 0], ["--batch-size"]),
        (["--lr", "-1"], ["--lr"]),
        (["--lr", "nan"], ["--lr"]),
        (["--dataset", "cifar11"], ["cifar11", "cifar10"]),
        (["--model", "resnet9"], ["resnet9", "resnet8"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--device", "toaster"], ["toaster"]),
        (["--amp", "fp16", "--device", "cpu"], ["fp16"]),
        (["--dataset", "imagefolder"], ["--data-root"]),
        (["--dataset", "imagefolder", "--data-root", "nowhere"], ["nowhere"]),
        (["--dataset", "imagefolder", "--data-root", "."], ["train"]),
        (["--dataset", "cifar10", "--data-root", "nowhere"], ["nowhere", "--download"]),
        (["--dataset", "medmnist", "--data-root", "x.npz"], ["x.npz"]),
        (["--schedule", "cosine", "--milestones", 3], ["--milestones", "cosine"]),
        (["--schedule", "multistep"], ["--milestones"]),
        (["--warmup-epochs", 50, "--epochs", 3], ["--warmup-epochs", "--epochs"]),
        (["--augment", "none", "--hflip", 0.5], ["--augment", "none", "--hflip"]),
        (["--hflip", 2], ["--hflip"]),
        (["--nesterov", "--optimizer", "adamw"], ["--nesterov", "adamw"]),
        (["--limit-train", 100000], ["--limit-train", "808"]),
        (["--val-split", 0], ["--val-split"]),
        *(
            (["--window", *window], ["--window", "LOW must be below HIGH"])
            for window in ((5, 5), (9, 1), ("nan", 1), (0, "inf"))
        ),
        (["--weights", "no.pth"], ["no.pth"]),
        (["--weights", "a", "--init-checkpoint", "b"], ["--weights", "--init-checkpoint"]),
        (["--pretrained"], ["--pretrained", "resnet8"]),
        (["--patch-size", 4], ["--patch-size"]),
        (["--model", "vit_6_192", "--patch-size", 3, "--resolution", 8], ["3", "8"]),
        (["--select-metric", "luck"], ["luck", "accuracy"]),
        (["--save-samples", "x.doc"], ["x.doc"]),
        (["--resume", "runs/student"], ["runs/student"]),
        (["--resume", "a", "--config", "b"], ["--resume", "--config"]),
        (["--config", "no.json"], ["no.json"]),
        (["--output", "/proc/run"], ["/proc/run"]),
        (["--unheard-of"], ["--unheard-of"]),
        (["--learning-rate", 0.1], ["--learning-rate", "did you mean --lr?"]),
        (["--batchsize=3"], ["--batchsize=3", "did you mean --batch-size?"]),
    ],
)
def test_bad_flags_of_a_training_script(tmp_path, refused, args, words):
    refused("train_student.py", *args, words=words)
    assert not (tmp_path / "runs").exists()  # nothing half made


def test_samples_that_cannot_be_written_are_refused_before_data(tmp_path, monkeypatch):
    """The run folder itself may be made later; a point of a sweep has its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "grid.json").write_text('[{"name": "a", "lr": 0.1}]')
    parser, point = train_student.build_parser(), ["--sweep", "grid.json", "--sweep-index", "0"]
    for path in ("no/x.png", "file/x.png", "folder.png", "runs/student/deeper/x.png"):
        with pytest.raises(run.UserError, match=f"--save-samples {path}: "):
            cli.parse_flags(parser, ["--save-samples", path])
    for flags in (
        ["x.png"],
        ["runs/student/x.png"],
        ["runs/b/x.png", "--output", "runs/b/"],
        ["runs/student/a/x.png", *point],
    ):
        assert cli.parse_flags(parser, ["--save-samples", *flags]).save_samples == flags[0]
    with pytest.raises(run.UserError):
        cli.parse_flags(parser, ["--save-samples", "runs/student/b/x.png", *point])
    assert "--save-samples" not in extract_embeddings.build_parser()._option_string_actions  # it would draw nothing


@pytest.mark.parametrize(
    "args, words",
    [
        (["--alpha", 0.3, "--loss", "kl=1"], ["--alpha", "--loss"]),
        (["--alpha", 1.5], ["--alpha"]),
        (["--alpha", -0.1], ["--alpha"]),
        (["--alpha", "nan"], ["--alpha"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--temperature", 0], ["--temperature"]),
        (["--loss", "kl=-1"], ["--loss kl=-1"]),
        (["--loss", "ce=0", "kl=0"], ["weight"]),
        (["--loss", "ce=1", "cls", "--data-root", "nowhere"], ["--loss cls", "cls=VALUE"]),
        (["--loss-options", "dkd.beta=1", "--data-root", "nowhere"], ["'dkd.beta'", "ce=0.5 kl=0.5", "kl.temperature"]),
        (["--student-layer", "layer3"], ["--student-layer", "ce=0.5 kl=0.5", "attention"]),
        (["--method", "feature"], ["--student-layer", "--teacher-layer"]),
        (
            ["--method", "feature", "--student-layer", "layer9", "--teacher-layer", "layer3"],
            ["layer9", "layer3", "resnet8"],
        ),
        (["--method", "feature", "--student-layer", "layer3", "--teacher-layer", "x"], ["'x'", "layer4", "resnet8"]),
        (["--teacher-pretrained"], ["--teacher-model"]),
        (["--teacher-model", "resnet18", "--teacher-weights", "x"], ["--teacher-weights x: no such file"]),
        (["--dataset", "imagefolder"], ["--data-root"]),
    ],
)
def test_bad_flags_of_distill(tmp_path, teacher, refused, args, words):
    refused("distill.py", "--teacher-checkpoint", teacher / "best.pth", *args, words=words)
    assert not (tmp_path / "runs").exists()


def test_no_teacher_names_the_command(refused):
    refused("distill.py", words=["runs/teacher/best.pth", "train_teacher.py"])
    refused("distill.py", "--teacher-model", "resnet18", words=["--teacher-model", "--teacher-weights"])


def test_teacher_of_other_classes(tmp_path, teacher, refused, here):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(12):
                file = tmp_path / "pets" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), 100 * (name == "cat") + i, np.uint8)).save(file)
    data = ["--dataset", "imagefolder", "--data-root", "pets"]
    refused("distill.py", "--teacher-checkpoint", teacher / "best.pth", *data, words=["classes", "10", "2", "cat"])
    refused("evaluate.py", teacher / "best.pth", *data, words=["class", "cat"])
    assert here("train_student.py", *data, "--resolution", 8, "--epochs", 1, "--batch-size", 8)[0] == 0
    refused(
        "evaluate.py",
        teacher / "best.pth",
        "--teacher-checkpoint",
        "runs/student/best.pth",
        words=["classes", "10", "2"],
    )
    # a new head where classes differ
    code, out, _ = here(
        "train_student.py", *SMALL, "--epochs", 1, "--init-checkpoint", "runs/student/best.pth", "--output", "new"
    )
    assert code == 0 and "new head" in out
    code, out, _ = here(
        "train_student.py", *SMALL, "--epochs", 1, "--init-checkpoint", "new/best.pth", "--output", "same"
    )
    assert code == 0 and "new head" not in out


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_bad_checkpoints(tmp_path, teacher, refused):
    good = (teacher / "best.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"model": {}, "evil": Evil()}, tmp_path / "hostile.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    content = torch.load(teacher / "best.pth", weights_only=True)
    torch.save({**content, "model_args": {**content["model_args"], "name": "resnet18"}}, tmp_path / "other.pth")
    torch.save({**content, "model_args": {**content["model_args"], "num_classes": 7}}, tmp_path / "seven.pth")
    (tmp_path / "pickled.pth").write_bytes(pickle.dumps({"model": object}))
    for name, part in (
        ("model", [1]),
        ("model_args", {"nonsense": 1}),
        ("preprocess", {"resolution": 8}),
        ("classes", 5),
        ("flags", {}),
        ("flags", None),
    ):
        torch.save({**content, name: part}, tmp_path / "part.pth")
        with pytest.raises(run.UserError, match="part.pth"):
            training.load_model(run.load_checkpoint(tmp_path / "part.pth"), path="part.pth")
    for name in ("cut", "empty", "text", "pickled", "hostile", "foreign", "other", "seven", "absent"):
        refused("evaluate.py", f"{name}.pth", words=[f"{name}.pth"])
        refused("distill.py", "--teacher-checkpoint", f"{name}.pth", words=[f"{name}.pth"])
    assert not (tmp_path / "hacked").exists()
    refused("train_student.py", "--weights", "hostile.pth", words=["hostile.pth"])
    refused("train_student.py", "--weights", "foreign.pth", words=["foreign.pth", "resnet8"])


def test_evaluate_refuses_a_run_folder_as_output(teacher, refused):
    refused("evaluate.py", teacher / "best.pth", "--output", teacher, words=[teacher, "--output"])


def test_a_weak_teacher_is_refused(tmp_path, teacher, refused, here):
    """Right file, wrong weights: a teacher at chance level must not teach unnoticed."""
    content = torch.load(teacher / "best.pth", weights_only=True)
    torch.manual_seed(0)  # a random head on random features ranks some classes by luck
    content["model"] = {k: torch.randn_like(v) if v.ndim > 1 else v for k, v in content["model"].items()}
    torch.save(content, tmp_path / "weak.pth")
    flags = [*SMALL, "--epochs", 1, "--teacher-checkpoint", "weak.pth"]
    refused("distill.py", *flags, words=["chance", "AUC", "--allow-weak-teacher"])
    assert not (tmp_path / "runs").exists()
    assert here("distill.py", *flags, "--allow-weak-teacher")[0] == 0


def test_the_teacher_is_not_changed(monkeypatch, teacher, here):
    """No weight and no BatchNorm buffer of the model that teaches moves while the student learns."""
    before = torch.load(teacher / "best.pth", weights_only=True)["model"]
    teachers, load = [], torch.nn.Module.load_state_dict

    def noted(self, state, *args, **options):
        if state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before):
            teachers.append(self)
        return load(self, state, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", noted)
    assert here("distill.py", *SMALL, "--epochs", 1, "--teacher-checkpoint", teacher / "best.pth")[0] == 0
    assert teachers, "the checkpoint's weights were loaded"
    for model in teachers:
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_loss_that_is_not_finite(tmp_path, here):
    code, _, errors = here("train_student.py", *SMALL, "--epochs", 2, "--lr", "1e30")
    assert code == 1 and len(errors.splitlines()) == 1
    assert re.search(r"loss of step \d+ is not finite \(learning rate \d\.?\d*e\+", errors), errors
    assert not (tmp_path / "runs/student/best.pth").exists()  # broken weights are never saved


def test_out_of_memory_names_batch_and_model(here):
    code, _, errors = here("train_student.py", *SMALL, "--resolution", 60000, "--model", "resnet8", "--batch-size", 32)
    assert code == 1 and len(errors.splitlines()) == 1 and "--batch-size 32" in errors and "resnet8" in errors, errors


def test_broken_image_in_the_data(tmp_path, cifar_folder, refused, here):
    shutil.copytree(cifar_folder, tmp_path / "data")
    victim = sorted((tmp_path / "data/train").rglob("*.jpg"))[7]
    victim.write_bytes(victim.read_bytes()[:300])
    flags = ["--dataset", "imagefolder", "--data-root", "data", "--resolution", 8, "--epochs", 1, "--batch-size", 20]
    for cache in ("ram", "off"):
        refused("train_student.py", *flags, "--cache", cache, "--workers", 1, "--overwrite", words=[victim.name])
    code, out, _ = here("train_student.py", *flags, "--on-bad-image", "skip", "--output", "skip")
    assert code == 0 and victim.name in out
    assert sum(read(tmp_path / "skip/results.json")["dataset"]["sizes"].values()) == 259


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_and_read_only_disk(small_disk):
    """ResNet-8's best.pth has 20 MB: the run ends with the disk's own words, and no half file stays."""
    flags = [*SMALL, "--epochs", 1, "--output"]
    done = run_script("train_student.py", *flags, small_disk / "run")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "No space left" in done.stderr and "best.pth" in done.stderr
    assert {f.name for f in (small_disk / "run").iterdir()} == {"config.json", "metrics.csv", "metrics.json", "log.txt"}
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = run_script("train_student.py", *flags, small_disk / "other")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "Read-only" in done.stderr and str(small_disk) in done.stderr


@pytest.mark.parametrize("number", [errno.EFBIG, errno.ENOSPC, errno.EDQUOT])
def test_limits_of_the_disk_are_one_line(monkeypatch, capsys, number):
    def main(args):
        raise OSError(number, os.strerror(number), "embeddings.npy")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run_script(main, lambda: cli.Parser("writes"))
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {os.strerror(number)}: embeddings.npy\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_name_can_be_printed(monkeypatch, encoding):
    """A file's name that is not UTF-8 (of an old share), or a class's in another alphabet."""
    out = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(out, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run_script(lambda args: print("skipped: N\udce4vus.png"), lambda: cli.Parser("prints"))
    sys.stdout.flush()
    assert stop.value.code == 0 and out.getvalue() == b"skipped: N\\udce4vus.png\n"


def test_main_can_run_several_times_in_one_process(tmp_path, here):
    """The lock is let go, signals have their handlers again, no process group is left."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    for flags in ([], ["--overwrite"], ["--overwrite"]):
        assert here("train_student.py", *SMALL, "--limit-train", 64, "--epochs", 1, *flags)[0] == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1 and not run.stops.deferring and not torch.distributed.is_initialized()


def test_overwrite_loses_nothing_when_the_input_is_bad(tmp_path, refused, here):
    assert here("train_student.py", *SMALL, "--epochs", 1)[0] == 0
    before = (tmp_path / "runs/student/best.pth").read_bytes()
    for flags in (
        ["--model", "resnet9"],
        ["--limit-train", 10**6],
        ["--weights", "no.pth"],
        ["--batch-size", 1],
        ["--accumulation-steps", 32],
        ["--batch-size", 1, "--dry-run"],
    ):
        refused("train_student.py", *SMALL, "--overwrite", *flags)
    assert (tmp_path / "runs/student/best.pth").read_bytes() == before


# ------------------------------------------------------------------------------------------------------- copying out


def needed_files(script):
    """The files of common that a script's docstring names."""
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    names = re.search(r"Files of common: ([\w\s,.]+?)(?:;|, and those|\.\s)", docstring)[1]  # then what a flag needs
    return [name if "." in name else f"{name}.py" for name in names.replace(",", " ").split()]


def test_another_split_than_the_teacher_s_is_refused(teacher, refused):
    refused(
        "distill.py",
        *SMALL,
        "--teacher-checkpoint",
        teacher / "best.pth",
        "--split-seed",
        1,
        words=["--split-seed 1", "trained with 0", teacher],
    )


# ------------------------------------------------------------------------------------------------------------- shape


def test_teachers_are_not_smoothed_by_default(monkeypatch):
    """A teacher trained with label smoothing teaches worse (Mueller et al. 2019, arXiv:1906.02629)."""
    monkeypatch.syspath_prepend(str(ROOT))
    for script in ("train_teacher", "train_student", "distill"):
        assert __import__(script).build_parser().parse_args([]).label_smoothing == 0


def test_top_level():
    """Nothing but what was laid down."""
    allowed = {
        "train_teacher.py",
        "train_student.py",
        "distill.py",
        "extract_embeddings.py",
        "evaluate.py",
        "report.py",
        "common",
        "slurm",
        "tests",
        "requirements.txt",
        "README.md",
    }
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.split()
    if tracked:
        assert {path.split("/")[0] for path in tracked if not path.startswith(".")} <= allowed


@pytest.mark.parametrize("script", [*TRAINING, "extract_embeddings.py", "evaluate.py", "report.py"])
def test_every_flag_has_help(script):
    parser = importlib.import_module(script[:-3]).build_parser()
    done = succeed(script, "--help")
    assert "python " + script in done.stdout
    text = done.stdout + run_script(script, "--help-all").stdout
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for flag in flags:
        shown = (
            re.escape(re.sub("^--(no-)?", "--[no-]", flag))
            if f"--no-{flag.removeprefix('--no-').lstrip('-')}" in flags
            else flag
        )
        assert re.search(rf"(^|[\s,]){shown}\b", text), flag
    entries = [entry for entry in re.split(r"\n(?=\S|\n|  \S)", text) if entry.startswith("  -")]
    assert len(entries) > 5
    # what a flag takes stands behind it after one space, its help after two or on the next lines
    assert not [entry for entry in entries if not re.search(r"\S\s{2,}\S", entry)], "no help"


def test_the_readme_s_commands_parse(monkeypatch):
    """Each command of the pages that calls a script has flags that the script knows."""
    monkeypatch.syspath_prepend(str(ROOT))
    called = set()
    for page in ("README.md", "slurm/README.md", "tests/benchmarks/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        values = re.findall(r'^([A-Z])="([^"]*)"', text, re.M)
        for script, flags in re.findall(r"^\s*(?:\S*/)?python (\w+\.py)([^\n#&|]*)", text, re.M):
            called.add(script)
            if "--resume" in flags:
                continue  # reads a run that is not here
            for name, value in values:
                flags = flags.replace(f"${name} ", value + " ")
            assert not re.search(r"\$[A-Z]", flags), (page, flags)
            __import__(script[:-3]).build_parser().parse_args(flags.replace("$seed", "0").split(">")[0].split())
    assert called == {*TRAINING, "extract_embeddings.py", "evaluate.py", "report.py"}


def test_environment_has_the_threads_that_torch_uses():
    """They decide the last bits and the speed, not the machine's cores."""
    from common.run import environment

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(os.cpu_count() + 1)
        assert environment(torch.device("cpu"))["threads"] == os.cpu_count() + 1
    finally:
        torch.set_num_threads(threads)
