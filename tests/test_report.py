"""report.py on run folders with known numbers, called as its command line calls it."""

import base64
import contextlib
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

import report
from common import cli, page, statistics
from common.run import UserError

REPO = Path(__file__).resolve().parents[1]
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
CLASSES = ["cat", "dog", "a class with a rather long name"]


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write_run(
    folder,
    role,
    accuracy,
    *,
    seed=0,
    model="resnet8",
    family="cnn",
    method=None,
    teacher=None,
    dataset="toy",
    test_set="test",
    train_set="train",
    val_set="",
    images=90,
    labelled=None,
    classes=CLASSES,
    resolution=32,
    flags=None,
    figures=False,
    **more,
):
    """A run folder as the scripts write it; returns the SHA-256 that stands for its checkpoint."""
    folder.mkdir(parents=True)
    results = {
        "role": role,
        "script": f"{role}.py",
        "method": method,
        "flags": {"seed": seed, "epochs": 10, "lr": 0.1, "output": str(folder), "device": "cpu", **(flags or {})},
        "environment": {},
        "dataset": {
            "name": dataset,
            "domain": "natural",
            "classes": classes,
            "sizes": {"train": images, "val": 10, "test": 30},
            **({} if labelled is None else {"labelled": {"train": 100, "sha256": sha(dataset + labelled)}}),
            "sha256": {"train": sha(dataset + train_set), "val": sha("val" + val_set), "test": sha(dataset + test_set)},
        },
        "model": {"name": model, "family": family, "parameters": 1000, "resolution": resolution},
        "teacher": teacher
        and {"name": "resnet18", "family": "cnn", "checkpoint": "somewhere/best.pth", "sha256": teacher},
        "checkpoint": "best.pth",
        "checkpoint_sha256": sha(str(folder)),
        "select_metric": "accuracy",
        "best_epoch": 2,
        "last_epoch": 3,
        "stopped_early": False,
        "val": {"accuracy": 0.5},
        "test": {"accuracy": accuracy, "macro_f1": accuracy - 0.1, "loss": 1.5},
        "final_val": {"accuracy": 0.5},
        "final_test": {"accuracy": accuracy - 0.01},
        "throughput": 100.0,
        "peak_memory_mb": None,
        "wall_time_s": 1.0,
        **more,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps({"flags": results["flags"], "environment": {}}))
    rows = [{"epoch": epoch, "train_loss": 1 / epoch, "val_accuracy": accuracy - 0.1 / epoch} for epoch in (1, 2, 3)]
    (folder / "metrics.json").write_text(json.dumps(rows))
    if figures:
        np.save(folder / "confusion_test_label.npy", np.array([[8, 1, 1], [2, 7, 1], [0, 0, 10]]))
    return results["checkpoint_sha256"]


def run_report(cwd, *args):
    """What `python report.py ARGS` prints and exits with; in this process, which has imported torch and matplotlib
    already."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, argv = os.getcwd(), sys.argv
    try:
        os.chdir(cwd)
        sys.argv = ["report.py", *map(str, args)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.run_script(report.main, report.build_parser)
    finally:
        os.chdir(before)
        sys.argv = argv
    return subprocess.CompletedProcess(
        args, ended.value.code, *(stream.buffer.getvalue().decode() for stream in (out, err))
    )


def report_of(cwd, *args, run=run_report):
    done = run(cwd, *args)
    assert done.returncode == 0, done.stderr
    return json.loads((cwd / "report" / "report.json").read_text()), done


EVALUATION = ("evaluate", "evaluate.py")  # what --reevaluate imports


def only(items):
    assert len(items) == 1, items
    return items[0]


def accuracies(report):
    """Teacher, student without and with KD of the only group, means."""
    group = only(report["groups"])
    return [
        group[key]["mean"] for key in ("teacher_accuracy", "student_accuracy_without_kd", "student_accuracy_with_kd")
    ]


def matching(sentences, *words):
    return [sentence for sentence in sentences if all(word in sentence for word in words)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three seeds of a CNN, one of a ViT on another dataset, a teacher alone, a run that is not finished."""
    cwd = tmp_path_factory.mktemp("study")
    runs = cwd / "runs"
    cnn = write_run(runs / "teacher", "teacher", 0.95, model="resnet18", figures=True)
    for seed, without, with_kd in ((0, 0.80, 0.85), (1, 0.82, 0.86), (2, 0.84, 0.90)):
        write_run(runs / f"student_{seed}", "student", without, seed=seed, figures=True)
        write_run(
            runs / f"distill_{seed}",
            "distill",
            with_kd,
            seed=seed,
            method="response",
            teacher=cnn,
            figures=True,
            flags={"temperature": 4.0, "teacher_checkpoint": f"node{seed}/best.pth", "workers": seed},
        )
    vit = write_run(runs / "vit" / "teacher", "teacher", 0.9, model="vit_tiny", family="vit", dataset="skin")
    write_run(runs / "vit" / "student", "student", 0.7, model="vit_6_192", family="vit", dataset="skin")
    write_run(
        runs / "vit" / "distill",
        "distill",
        0.75,
        model="vit_6_192",
        family="vit",
        dataset="skin",
        method="feature",
        teacher=vit,
    )
    write_run(runs / "alone", "teacher", 0.6, model="resnet50", dataset="other")
    (runs / "unfinished").mkdir()
    (runs / "unfinished" / "config.json").write_text(json.dumps({"flags": {"seed": 0}, "environment": {}}))
    (runs / "hub").mkdir()
    (runs / "hub" / "config.json").write_text(json.dumps({"hidden_size": 192}))
    report, done = report_of(cwd, "runs")
    return cwd, report, done


def test_statistics_over_seeds(study):
    group = only([group for group in study[1]["groups"] if group["dataset"] == "toy"])
    assert {key: group[key] for key in ("domain", "teacher", "student", "family", "method")} == {
        "domain": "natural",
        "teacher": "resnet18",
        "student": "resnet8",
        "family": "cnn",
        "method": "response",
    }
    teacher, without, with_kd = (
        group[name] for name in ("teacher_accuracy", "student_accuracy_without_kd", "student_accuracy_with_kd")
    )
    assert (teacher["mean"], teacher["std"], teacher["n"]) == (0.95, None, 1)
    assert (without["n"], without["seeds"], with_kd["seeds"]) == (3, [0, 1, 2], [0, 1, 2])
    assert without["mean"] == pytest.approx(0.82) and without["std"] == pytest.approx(
        0.02
    )  # (0.02² + 0 + 0.02²) / 2 = 0.02²
    assert with_kd["mean"] == pytest.approx(0.87) and with_kd["std"] == pytest.approx(0.0007**0.5)  # (4 + 1 + 9)e-4 / 2
    assert group["gain"] == pytest.approx(0.05) and group["gain_std"] == pytest.approx(0.01)  # of 0.05, 0.04, 0.06
    assert group["gain_paired"]["seeds"] == [0, 1, 2]
    assert group["runs"] == {
        "teacher": "runs/teacher",
        "students": [f"runs/student_{seed}" for seed in range(3)],
        "distilled": [f"runs/distill_{seed}" for seed in range(3)],
    }
    assert group["notes"] == []


def test_the_last_epoch_has_a_column(study):
    """Beside the figure of the epoch chosen on val stands that of the last one, which no choice has flattered: here
    0.01 lower."""
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in (study[0] / "report/report.md").read_text().splitlines()
        if "|" in line
    ]
    head = only([line for line in lines if line[0] == "run"])
    shown = {line[0]: dict(zip(head, line)) for line in lines if line[0].startswith("runs/") and len(line) == len(head)}
    for run, accuracy in (("runs/teacher", 0.95), ("runs/student_0", 0.80), ("runs/distill_2", 0.90)):
        found = [float(shown[run][name]) for name in ("test accuracy", "at the last epoch")]
        assert found == pytest.approx([100 * accuracy, 100 * accuracy - 1])


def test_one_seed_has_no_deviation(study):
    group = only([group for group in study[1]["groups"] if group["dataset"] == "skin"])
    assert group["student_accuracy_with_kd"] == {"mean": 0.75, "std": None, "n": 1, "seeds": [0]}
    assert group["gain"] == pytest.approx(0.05) and group["gain_std"] is None


def test_every_run_is_listed_and_the_unfinished_named(study):
    _, report, done = study
    assert len(report["runs"]) == 11 and "runs/alone" in [run["run"] for run in report["runs"]]
    assert only(matching(report["missing"], "runs/unfinished"))
    assert not matching(report["missing"], "runs/hub")  # its config.json is another tool's
    assert "missing: runs/unfinished" in done.stdout


def test_table_and_last_line(study):
    cwd, _, done = study
    lines = done.stdout.splitlines()
    head = "dataset teacher student method teacher without_KD with_KD difference_(points) 95_%_over_test_images"
    head += " 95_%_over_seeds verdict seeds"
    assert [text.strip().replace(" ", "_") for text in lines[0].strip("|").split("|")] == head.split()
    row = [text.strip() for text in only(matching(lines, "| toy", "response")).strip("|").split("|")]
    assert row == [
        "toy",
        "resnet18",
        "resnet8",
        "response",
        "95.00",
        "82.00 ± 2.00",
        "87.00 ± 2.65",
        "+5.00 ± 1.00",
        "-",
        "-",
        "-",
        "3",
    ]
    assert lines[-1] == "report: report/report.html"
    assert "87.00 ± 2.65" in (cwd / "report" / "report.md").read_text()


def test_figures(study):
    cwd, report, _ = study
    text = (cwd / "report" / "report.md").read_text()
    for name in report["figures"]:
        with Image.open(cwd / "report" / name) as image:
            assert image.format == "PNG" and 400 < image.width < 2000 and 300 < image.height < 2000
            assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something is drawn
        assert f"({name})" in text
    names = list(report["figures"])
    assert "cost-toy.png" in names
    assert len(matching(names, "curves-")) == 3  # two groups, and the run that is in none
    assert len(matching(names, "confusion-")) == 3  # teacher, first baseline and first distilled; the others saved none
    assert {path.name for path in (cwd / "report").iterdir()} == {
        *names,
        "report.json",
        "report.md",
        "report.html",
        "report.csv",
    }


def test_runs_named_twice_count_once_and_output_is_rewritten(study, tmp_path):
    cwd, report, _ = study
    shutil.copytree(cwd / "runs", tmp_path / "runs")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("old")
    (tmp_path / "report" / "mine.txt").write_text("mine")
    again, _ = report_of(tmp_path, "runs", "runs/student_0", tmp_path / "runs" / "vit")
    assert again["groups"] == report["groups"]
    assert (tmp_path / "report" / "mine.txt").read_text() == "mine"


def test_other_metric(tmp_path):
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    write_run(tmp_path / "runs/s", "student", 0.6)
    figures = {"accuracy": 0.7, "loss": 1.25, "macro_f1": 0.66}
    write_run(tmp_path / "runs/d", "distill", 0.7, method="response", teacher=teacher, test=figures)
    report, _ = report_of(tmp_path, "runs", "--metric", "macro_f1")
    part = only(report["groups"])["macro_f1"]
    assert part["teacher_macro_f1"]["mean"] == pytest.approx(0.8)
    assert part["gain"] == pytest.approx(0.66 - 0.5)
    assert accuracies(report)[2] == 0.7 and "Test macro_f1 against cost, toy" in report["figures"].values()
    _, done = report_of(tmp_path, "runs", "--metric", "loss")
    assert "| -0.2500 " in done.stdout  # 1.25 - 1.5, no percentage


def test_what_differs_is_never_averaged(tmp_path):
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    write_run(tmp_path / "runs/s", "student", 0.6)
    variants = {
        "test_set": "another",
        "train_set": "another",
        "classes": CLASSES[::-1],
        "resolution": 64,
        "teacher": sha("another"),
        "flags": {"temperature": 2.0},
        "method": "feature",
        "model": "resnet20",
    }
    same = {"teacher": teacher, "method": "response", "flags": {"temperature": 4.0}}
    for seed, (key, value) in enumerate({"none": None, **variants}.items()):
        changed = {} if key == "none" else {key: value}
        write_run(tmp_path / "runs" / f"d_{key}", "distill", 0.7, seed=seed, **{**same, **changed})
    report, _ = report_of(tmp_path, "runs")
    groups = {Path(only(group["runs"]["distilled"])).name[2:]: group for group in report["groups"]}
    assert set(groups) == {"none", *variants}
    no_baseline = {key for key, group in groups.items() if group["student_accuracy_without_kd"]["mean"] is None}
    assert no_baseline == {"test_set", "train_set", "classes", "resolution", "model"}
    no_teacher = {key for key, group in groups.items() if group["teacher_accuracy"]["mean"] is None}
    assert no_teacher == {"test_set", "classes", "teacher"}
    assert groups["test_set"]["gain"] is None and groups["test_set"]["gain_std"] is None
    assert "--temperature 2.0" in groups["flags"]["variant"]
    assert "trained on other data" in only(groups["train_set"]["notes"])
    assert matching(report["missing"], "no baseline", "runs/d_test_set", "other test set", "runs/s")
    assert matching(report["missing"], "teacher run runs/t was tested on other images", "runs/d_test_set")
    assert matching(report["missing"], "teacher run of resnet18", sha("another")[:12], "runs/d_teacher")


def test_the_same_seed_twice_keeps_the_newest(tmp_path):
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    for age, name, accuracy in ((300, "old", 0.5), (100, "new", 0.7), (200, "middle", 0.6)):
        write_run(tmp_path / "runs" / f"s_{name}", "student", accuracy, seed=4)
        write_run(
            tmp_path / "runs" / f"d_{name}", "distill", accuracy + 0.1, seed=4, method="response", teacher=teacher
        )
        for kind in "sd":
            file = tmp_path / "runs" / f"{kind}_{name}" / "results.json"
            os.utime(file, (file.stat().st_mtime - age,) * 2)
    report, _ = report_of(tmp_path, "runs")
    group = only(report["groups"])
    assert group["student_accuracy_without_kd"] == {"mean": 0.7, "std": None, "n": 1, "seeds": [4]}
    assert group["student_accuracy_with_kd"]["mean"] == pytest.approx(0.8) and group["runs"]["distilled"] == [
        "runs/d_new"
    ]
    assert matching(group["notes"], "seed 4", "runs/s_new is the newest", "left out: runs/s_old, runs/s_middle")
    assert matching(group["notes"], "seed 4", "runs/d_new is the newest", "left out: runs/d_old, runs/d_middle")


def test_the_baseline_with_the_same_flags_is_preferred(tmp_path):
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    write_run(tmp_path / "runs/a_short", "student", 0.5, seed=0, flags={"epochs": 5})
    write_run(tmp_path / "runs/a_short_1", "student", 0.5, seed=1, flags={"epochs": 5})
    write_run(tmp_path / "runs/b_long", "student", 0.6, seed=0, flags={"epochs": 30})
    write_run(tmp_path / "runs/d", "distill", 0.7, method="response", teacher=teacher, flags={"epochs": 30, "lr": 0.2})
    report, _ = report_of(tmp_path, "runs")
    group = only(report["groups"])
    assert group["runs"]["students"] == ["runs/b_long"] and group["gain"] == pytest.approx(0.1)
    assert matching(group["notes"], "left out: runs/a_short, runs/a_short_1", "--epochs 5 (not 30)")
    assert matching(group["notes"], "the baseline has other flags", "--lr 0.1 (not 0.2)")


def test_seeds_that_do_not_match(tmp_path):
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    for seed, accuracy in ((0, 0.5), (1, 0.6)):
        write_run(tmp_path / f"runs/s{seed}", "student", accuracy, seed=seed)
    for seed, accuracy in ((1, 0.7), (2, 0.9)):
        write_run(tmp_path / f"runs/d{seed}", "distill", accuracy, seed=seed, method="response", teacher=teacher)
    report, _ = report_of(tmp_path, "runs")
    group = only(report["groups"])
    assert group["gain"] == pytest.approx(0.8 - 0.55) and group["gain_std"] is None
    assert group["gain_paired"] == {"mean": pytest.approx(0.1), "seeds": [1]}
    assert matching(report["missing"], "seeds differ", "[1, 2]", "[0, 1]")


def test_a_loss_of_the_labels_alone_is_a_baseline(tmp_path):
    """distill.py --loss ce=1: the same steps and labels in each batch, nothing of the teacher."""
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    for name, method, accuracy in (("alone", "ce=1", 0.4), ("kd", "response", 0.7), ("other", "ce=0.5 kl=1", 0.6)):
        more = {"teacher": teacher, "labelled": "few", "images": 130}
        write_run(tmp_path / "runs" / name, "distill", accuracy, method=method, **more)
    report, _ = report_of(tmp_path, "runs")
    found = {group["method"]: (group["runs"]["students"], group["gain"]) for group in report["groups"]}
    assert found == {
        "response": (["runs/alone"], pytest.approx(0.3)),
        "ce=0.5 kl=1": (["runs/alone"], pytest.approx(0.2)),
    }
    told = {"student without KD": "100 labels", "student with KD": "100 labels and 30 images without"}
    assert all({**group["trained_on"], **told} == group["trained_on"] for group in report["groups"])


def test_students_fine_tuned_after_distillation_have_a_gain(tmp_path):
    """train_student.py from a student of distill.py: of one group over seeds, taught, and never the baseline."""
    flags = {"seed": 0, "init_checkpoint": None}
    for seed in (0, 1):
        write_run(tmp_path / f"runs/alone_{seed}", "student", 0.4, flags={**flags, "seed": seed})
        for start, method, accuracy in (
            ("runs/tokens_{}/best.pth", "tokens, fine-tuned", 0.7 + 0.1 * seed),
            ("elsewhere/long_{}/best.pth", "tokens, fine-tuned", 0.8),
            ("runs/plain_{}/best.pth", "ce=1, fine-tuned", 0.6),
        ):
            more = {**flags, "seed": seed, "init_checkpoint": start.format(seed)}
            folder = tmp_path / "runs" / f"tuned_{start.split('/')[1].format(seed)}"
            write_run(folder, "student", accuracy, method=method, teacher=sha("teacher"), flags=more)
    report, _ = report_of(tmp_path, "runs")
    found = {group["variant"]: (group["method"], len(group["runs"]["distilled"])) for group in report["groups"]}
    assert found == {f"--init-checkpoint {name}": ("tokens, fine-tuned", 2) for name in ("tokens", "long")}
    assert [group["gain"] for group in report["groups"]] == [pytest.approx(0.4), pytest.approx(0.35)]
    for group in report["groups"]:
        assert group["runs"]["students"] == ["runs/alone_0", "runs/alone_1"]
        assert group["trained_on"] == {
            "student without KD": "90 labels",
            "student with KD": "90 labels, after distillation",
        }


def test_a_baseline_without_distillation(tmp_path):
    write_run(tmp_path / "runs/t", "teacher", 0.9)
    write_run(tmp_path / "runs/s", "student", 0.6)
    report, done = report_of(tmp_path, "runs")
    assert accuracies(report) == [0.9, 0.6, None]
    assert only(report["groups"])["gain"] is None and only(
        matching(report["missing"], "no distilled student resnet8 on toy")
    )
    write_run(tmp_path / "runs/t2", "teacher", 0.8)
    report, done = report_of(tmp_path, "runs")  # which of two teachers it would have is not known
    assert accuracies(report)[0] is None


DAMAGE = {
    "cut short": (lambda text: text[: len(text) // 2], "damaged"),
    "no JSON object": (lambda text: "[]", "damaged"),
    "without a key": (lambda text: text.replace('"sha256"', '"md5"'), "lacks 'sha256'"),
    "NaN": (lambda text: text.replace('"test": {"accuracy": 0.6', '"test": {"accuracy": NaN'), "test accuracy is nan"),
    "in percent": (
        lambda text: text.replace('"test": {"accuracy": 0.6', '"test": {"accuracy": 60'),
        "test accuracy is 60",
    ),
    "unknown role": (lambda text: text.replace('"role": "student"', '"role": "probe"'), "role is 'probe'"),
    "environment as a list": (lambda text: json.dumps({**json.loads(text), "environment": [1]}), "damaged"),
    "command cut": (
        lambda text: json.dumps({**json.loads(text), "environment": {"command": "a.py --output 'x"}}),
        "damaged",
    ),
    "script as a number": (lambda text: json.dumps({**json.loads(text), "script": 3}), "script is 3"),
    "select_metric as a list": (
        lambda text: text.replace('"select_metric": "accuracy"', '"select_metric": ["x"]'),
        "select_metric is ['x']",
    ),
    "seed in words": (lambda text: text.replace('"seed": 0', '"seed": "zero"'), "flags.seed is 'zero'"),
}


def test_damaged_runs_are_named_and_the_others_reported(tmp_path):
    write_run(tmp_path / "runs/good", "student", 0.6)
    for index, (damage, _) in enumerate(DAMAGE.values()):
        file = tmp_path / f"runs/bad{index}" / "results.json"
        write_run(file.parent, "student", 0.6)
        assert damage(file.read_text()) != file.read_text()
        file.write_text(damage(file.read_text()))
    write_run(tmp_path / "runs/curves", "teacher", 0.9, figures=True)
    (tmp_path / "runs/curves/metrics.json").write_text("[{")
    write_run(tmp_path / "runs/deep", "teacher", 0.9)
    (tmp_path / "runs/deep/metrics.json").write_text("[" * 5000)
    (tmp_path / "runs/curves/confusion_test_label.npy").write_bytes(b"\x93NUMPY")
    report, _ = report_of(tmp_path, "runs")
    assert [run["run"] for run in report["runs"]] == ["runs/curves", "runs/deep", "runs/good"]
    for index, (_, words) in enumerate(DAMAGE.values()):
        assert matching(report["missing"], f"runs/bad{index} is left out", words), (report["missing"], words)
    assert all(matching(report["missing"], f"runs/{name}/metrics.json") for name in ("curves", "deep"))
    assert matching(report["missing"], "runs/curves/confusion_test_label.npy")


@pytest.mark.parametrize("name", ["ids", "labels", "logits", "classes"])
def test_predictions_of_another_type_are_named(tmp_path, name):
    """Strings, or one value, where numbers or a row an image should stand."""
    arrays = {
        "ids": np.array(["a", "b"]),
        "labels": np.array([0, 1]),
        "logits": np.eye(2, dtype=np.float32),
        "classes": np.array(["x", "y"]),
    }
    run = {"path": str(tmp_path), "seed": 0, "test": {"accuracy": 1.0}, "dataset": {"sha256": {"test": ""}}}
    for value in ([None] if name in ("labels", "logits") else []) + [np.array("a")]:
        np.savez(
            tmp_path / "predictions_test.npz", **{**arrays, name: arrays[name].astype(str) if value is None else value}
        )
        missing = []
        report.load_predictions([run], missing)
        assert run.pop("predictions") is None
        assert "predictions_test.npz cannot be used" in only(missing)
    np.savez(tmp_path / "predictions_test.npz", **arrays)
    missing = []
    report.load_predictions([run], missing)
    assert list(run["predictions"].ids) == ["a", "b"] and not missing


def refused(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    line = only(done.stderr.splitlines())
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/config.json").write_text(json.dumps({"flags": {}}))
    write_run(tmp_path / "damaged", "student", 0.6)
    (tmp_path / "damaged/results.json").write_text("{")
    write_run(tmp_path / "good", "student", 0.6)
    (tmp_path / "file").write_text("mine")
    refused(run_report(tmp_path, "nowhere"), "nowhere is not a folder")
    refused(run_report(tmp_path, "empty"), "no run in empty", "distill.py")
    refused(run_report(tmp_path, "unfinished"), "no finished run", "unfinished is unfinished")
    refused(run_report(tmp_path, "damaged"), "no finished run", "damaged is left out")
    refused(run_report(tmp_path, "good", "--metric", "acuracy"), "--metric acuracy", "accuracy, loss, macro_f1")
    refused(run_report(tmp_path, "good", "--output", "file"), "--output file is a file")
    refused(run_report(tmp_path, "good", "--output", "file/report"), "file")
    refused(run_report(tmp_path, "good", "--batch-size", "0"), "batch-size")
    refused(run_report(tmp_path), "RUNS")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "report").exists()


def test_output_that_cannot_be_written(tmp_path):
    write_run(tmp_path / "good", "student", 0.6)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").mkdir()  # as good as a read-only disk, which root would not notice
    refused(run_report(tmp_path, "good"), "report.json")
    assert not list((tmp_path / "report").glob(".*"))  # no half file is left


def test_reevaluate(tmp_path, monkeypatch):
    """The evaluation itself is replaced by one that reads its figures from the checkpoint."""

    def evaluate_checkpoint(path, split, device, batch_size, data_root):
        if not path.exists():
            raise UserError(f"{path} does not exist")
        assert (split, device, batch_size, data_root) == ("test", "cpu", 7, None)
        return json.loads(path.read_text())

    functions = evaluate_checkpoint, lambda path, device, batch_size: {"multiply_adds": 123}
    monkeypatch.setattr(report, "evaluation_functions", lambda: functions)
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    write_run(tmp_path / "runs/s", "student", 0.6)
    write_run(tmp_path / "runs/d", "distill", 0.7, method="response", teacher=teacher)
    flags = ("runs", "--reevaluate", "--device", "cpu", "--batch-size", "7")
    refused(run_report(tmp_path, *flags), "--reevaluate could evaluate no checkpoint")
    (tmp_path / "runs/s/best.pth").write_text('{"accuracy": 0.60005, "macro_f1": 0.1}')
    (tmp_path / "runs/d/best.pth").write_text('{"accuracy": 0.75}')
    result, done = report_of(tmp_path, *flags)
    assert accuracies(result) == [0.9, 0.60005, 0.75]
    run = only([run for run in result["runs"] if run["run"] == "runs/d"])
    assert run["recorded_test"]["accuracy"] == 0.7 and run["test"]["accuracy"] == 0.75
    assert run["recomputed_test"] == {"accuracy": 0.75} and run["cost"]["multiply_adds"] == 123
    warnings = done.stderr.splitlines()
    assert len(warnings) == 2 and all(line.startswith("warning: ") for line in warnings)
    assert matching(warnings, "runs/d", "0.7,", "0.75") and matching(warnings, "runs/t", "not evaluated again")


def test_a_fault_of_our_own_is_not_a_warning(tmp_path, monkeypatch):
    def faulty(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(report, "evaluation_functions", lambda: (faulty, faulty))
    write_run(tmp_path / "runs/s", "student", 0.6)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        report.main(report.build_parser().parse_args(["runs", "--reevaluate"]))


def test_missing_files_are_named_with_what_needs_them(tmp_path, monkeypatch):
    """Of a copy without the evaluation, without the page's template, without the readers of data."""
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    write_predicted(tmp_path / "runs/s", "student", np.arange(30) < 20)
    write_predicted(tmp_path / "runs/d", "distill", np.arange(30) < 25, method="response", teacher=teacher)
    name, file = EVALUATION
    monkeypatch.setitem(sys.modules, name, None)
    refused(run_report(tmp_path, "runs", "--reevaluate"), f"--reevaluate needs {file}, which is missing")
    _, done = report_of(tmp_path, "runs")
    assert "note: no gallery for toy: its results.json or its checkpoint lacks 'dataset'" in done.stdout
    monkeypatch.setitem(sys.modules, "common.data", None)
    _, done = report_of(tmp_path, "runs")
    assert "note: no gallery for toy: it needs common/data.py, which is missing" in done.stdout
    monkeypatch.setattr(page, "__file__", str(tmp_path / "page.py"))
    refused(run_report(tmp_path, "runs"), str(tmp_path / "page.html"), "is missing", "report.py")


@pytest.mark.parametrize("error", [ModuleNotFoundError("no timm", name="timm"), ModuleNotFoundError(name="timm.data")])
def test_a_missing_package_is_named(error):
    assert report.missing_part(error) == "the package timm: pip install timm"


# --------------------------------------------------------------------------------------------------------- --select


def sweep(folder):
    for lr, losses in ((0.1, (0.9, 0.7)), (0.01, (0.5, 0.7)), (0.001, (0.65, 0.65))):
        for seed, loss in enumerate(losses):
            write_run(
                folder / "runs" / f"lr-{lr}_{seed}",
                "student",
                0.9 - lr,
                seed=seed,
                flags={"lr": lr},
                val={"accuracy": loss, "loss": loss},
            )


def test_select_names_the_best_setting_by_its_mean_over_seeds(tmp_path):
    sweep(tmp_path)
    for flags, order in (
        (["val_loss"], [0.01, 0.001, 0.1]),
        (["val_loss", "--mode", "min"], [0.01, 0.001, 0.1]),
        (["val_loss", "--mode", "max"], [0.1, 0.001, 0.01]),
        (["val_accuracy"], [0.1, 0.001, 0.01]),
    ):
        report, done = report_of(tmp_path, "runs", "--select", *flags)
        ranked = report["selected"]["ranked"]
        assert [setting["flags"] for setting in ranked] == [{"--lr": lr} for lr in order]
        assert [setting["value"] for setting in ranked] == pytest.approx(
            [{0.1: 0.8, 0.01: 0.6, 0.001: 0.65}[lr] for lr in order]
        )
        best = [f"runs/lr-{order[0]}_{seed}" for seed in (0, 1)]
        assert (
            ranked[0]["runs"] == best
            and f"best {flags[0]}: {ranked[0]['value']:.4f}, {', '.join(best)}\n" in done.stdout
        )
        assert "## Selection" in (tmp_path / "report" / "report.md").read_text()


def test_a_copy_of_a_run_is_not_chosen_with_its_setting(tmp_path):
    """Of one seed twice the newest counts, here as in the groups."""
    for age, (name, val, lr) in enumerate((("new", 0.6, 0.1), ("other", 0.7, 0.01), ("old", 0.9, 0.1))):
        write_run(tmp_path / "runs" / name, "student", 0.5, flags={"lr": lr}, val={"accuracy": val})
        file = tmp_path / "runs" / name / "results.json"
        os.utime(file, (file.stat().st_mtime - 100 * age,) * 2)
    report, _ = report_of(tmp_path, "runs", "--select", "val_accuracy")
    assert [setting["runs"] for setting in report["selected"]["ranked"]] == [["runs/other"], ["runs/new"]]


@pytest.mark.parametrize("metric", ["test_accuracy", "accuracy", "val_pauc", "val_"])
def test_select_on_val_alone(tmp_path, metric):
    sweep(tmp_path)
    done = run_report(tmp_path, "runs", "--select", metric)
    assert done.returncode == 2 and "val_accuracy, val_loss" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "report").exists()


def test_hidden_folders_hold_no_runs(tmp_path):
    """A batch job copies its results back through one; it must not count twice."""
    write_run(tmp_path / "runs" / "student", "student", 0.8)
    write_run(tmp_path / "runs" / ".student.sync.7", "student", 0.7)
    report, _ = report_of(tmp_path, "runs")
    assert [run["run"] for run in report["runs"]] == ["runs/student"]


# ----------------------------------------------------------------------------------------------- verdicts and warnings


def page_of(cwd):
    """report.html without the figures' bytes, its lines joined."""
    return html.unescape(re.sub(r"base64,[^\"]*|\s+", " ", (cwd / "report" / "report.html").read_text()))


def write_predicted(folder, role, right, *, groups=None, name="i", **more):
    """A run with predictions: right (N,) bool, of three classes."""
    sha256 = write_run(folder, role, float(np.mean(right)), **more)
    labels = np.arange(len(right)) % 3
    logits = np.eye(3, dtype=np.float32)[np.where(right, labels, (labels + 1) % 3)] * 5
    found = {
        "ids": np.array([f"{name}{i}" for i in range(len(right))]),
        "labels": labels,
        "logits": logits,
        "classes": np.array(CLASSES),
    }
    np.savez(folder / "predictions_test.npz", **found, **({} if groups is None else {"groups": groups}))
    return sha256


def test_both_intervals_stand_beside_the_verdict(tmp_path):
    """In the printed table, the headline and the page; expected by scipy's bootstrap and its t-test of the seeds'
    gains."""
    rng = np.random.default_rng(0)
    teacher, gains = write_run(tmp_path / "runs/t", "teacher", 0.95), []
    for seed in range(3):
        before = rng.random(600) < 0.7
        after = before | (rng.random(600) < 0.3)
        gains.append(after.astype(float) - before)
        write_predicted(tmp_path / f"runs/s{seed}", "student", before, seed=seed)
        write_predicted(tmp_path / f"runs/d{seed}", "distill", after, seed=seed, method="response", teacher=teacher)
    report, done = report_of(tmp_path, "runs")
    seeds = scipy.stats.ttest_1samp(np.mean(gains, axis=1), 0).confidence_interval()
    images = scipy.stats.bootstrap(
        (np.mean(gains, axis=0),), np.mean, n_resamples=4000, method="percentile", rng=0
    ).confidence_interval
    row = [text.strip() for text in only(matching(done.stdout.splitlines(), "| toy", "response")).strip("|").split("|")]
    assert [float(text) for text in row[8].split(" to ")] == pytest.approx([100 * value for value in images], abs=0.4)
    assert row[9] == f"{100 * seeds.low:+.2f} to {100 * seeds.high:+.2f}" and row[10] == "gain"
    page = page_of(tmp_path)
    headline = page[page.index("What did distillation buy?") : page.index("<table")]
    cells = re.findall("<td[^>]*>([^<]*)</td>", page[page.index("<tbody>") : page.index("</tbody>")])
    assert cells[1:5] == ["gain", row[7], row[8], row[9]]
    assert (
        f"{row[8]} points over test images and {row[9]} points over seeds, exclude 0" in headline and "gain" in headline
    )
    assert f"{row[8]} points over test images and {row[9]} points over seeds" in done.stdout
    assert "McNemar's test of accuracy" in page and "not about the noise of training" in page


def test_lesions_are_resampled_whole(tmp_path):
    """Eight equal images of each lesion: the interval of the lesions, 2.8 times as wide as one of images."""
    rng, groups = np.random.default_rng(0), np.repeat([f"lesion{i}" for i in range(100)], 8)
    before, after = (np.repeat(rng.random(100) < share, 8) for share in (0.6, 0.7))
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.95)
    write_predicted(tmp_path / "runs/s", "student", before, groups=groups)
    write_predicted(tmp_path / "runs/d", "distill", after, groups=groups, method="response", teacher=teacher)
    report, done = report_of(tmp_path, "runs")
    evidence = only(report["groups"])["evidence"]
    low, high = evidence["interval"]
    expected = 2 * 1.96 * np.std(after.astype(float) - before) / 10
    assert high - low == pytest.approx(expected, rel=0.1) and evidence["units"] == 100
    assert "over groups of test images" in done.stdout


def test_a_teacher_worse_than_the_student_alone_is_in_the_headline(tmp_path):
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.61)
    write_predicted(tmp_path / "runs/s", "student", np.arange(100) < 63)
    write_predicted(tmp_path / "runs/d", "distill", np.arange(100) < 80, method="response", teacher=teacher)
    _, done = report_of(tmp_path, "runs")
    text = "the teacher (61.00) is worse than the student alone (63.00)"
    page = page_of(tmp_path)
    assert f"response: {text}\n" in done.stdout and page.index(text) < page.index("<table")
    assert text in (tmp_path / "report/report.md").read_text()
    _, done = report_of(tmp_path, "runs", "--metric", "loss")  # 1.5 for all: neither is worse
    assert "is worse" not in done.stdout


def test_a_gain_over_a_baseline_that_another_run_beats_says_so(tmp_path):
    """The baseline of the distilled runs' flags is used; a student alone with another rate is better than it, and than
    the distilled one."""
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.95)
    for name, right, flags in (("same", 60, {}), ("faster", 75, {"lr": 0.3}), ("slower", 50, {"lr": 0.01})):
        write_predicted(tmp_path / f"runs/{name}", "student", np.arange(100) < right, flags=flags)
    write_predicted(tmp_path / "runs/more", "student", np.arange(100) < 90, train_set="more images", flags={"lr": 0.3})
    write_predicted(tmp_path / "runs/d", "distill", np.arange(100) < 70, method="response", teacher=teacher)
    report, done = report_of(tmp_path, "runs")
    group = only([group for group in report["groups"] if group["method"]])
    assert group["runs"]["students"] == ["runs/same"]
    assert group["warnings"] == [
        "another student alone, with --lr 0.3 (not 0.1), is better (75.00) than this baseline (60.00), and than "
        "the student "
        "with KD (70.00): runs/faster"
    ]
    assert group["warnings"][0] in done.stdout and group["warnings"][0] in page_of(tmp_path)
    shutil.rmtree(tmp_path / "runs/faster")
    report, _ = report_of(tmp_path, "runs")
    assert only([group for group in report["groups"] if group["method"]])["warnings"] == []


def test_what_each_side_saw_and_which_baseline_has_the_same_labels(tmp_path):
    """A student alone on 100 images, and one with KD on 808 of which the same 100 have labels; others have other
    labels."""
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.95, images=808, train_set="all")
    for name, accuracy, images in (("first 100", 0.6, 100), ("first 50", 0.5, 50), ("other 100", 0.9, 100)):
        write_run(
            tmp_path / "runs" / name, "student", accuracy, train_set=name, images=images, flags={"limit_train": images}
        )
    write_run(
        tmp_path / "runs/d",
        "distill",
        0.7,
        method="response",
        teacher=teacher,
        train_set="100 of all",
        images=808,
        labelled="first 100",
        flags={"limit_labels": 100, "limit_train": 0},
    )
    report, done = report_of(tmp_path, "runs")
    group = only([group for group in report["groups"] if group["method"]])
    assert group["runs"]["students"] == ["runs/first 100"] and group["warnings"] == []
    assert not matching(group["notes"], "limit") and not matching(group["notes"], "other data")
    words = "100 labels (student without KD), 100 labels and 708 images without (student with KD)"
    for text in (done.stdout, page_of(tmp_path), (tmp_path / "report/report.md").read_text()):
        assert f"trained on 808 labels (teacher), {words}" in text


def test_weight_decay_is_a_setting(tmp_path):
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    write_run(tmp_path / "runs/s", "student", 0.6, flags={"weight_decay": 0.0})
    for name, decay in (("none", None), ("small", 0.0005)):
        write_run(
            tmp_path / f"runs/d_{name}",
            "distill",
            0.7,
            method="response",
            teacher=teacher,
            flags={"weight_decay": decay},
        )
    report, _ = report_of(tmp_path, "runs")
    groups = {group["runs"]["distilled"][0]: group for group in report["groups"]}
    assert {name: group["variant"] for name, group in groups.items()} == {
        "runs/d_none": "--weight-decay default",
        "runs/d_small": "--weight-decay 0.0005",
    }
    assert matching(groups["runs/d_small"]["notes"], "the baseline has other flags", "--weight-decay 0.0 (not 0.0005)")


def test_a_partial_auc_stands_with_its_maximum_and_chance(tmp_path):
    write_run(tmp_path / "runs/s", "student", 0.6, test={"accuracy": 0.6, "pauc": 0.1576})
    _, done = report_of(tmp_path, "runs", "--metric", "pauc")
    assert "| 0.1576 " in done.stdout and "at most 0.2, chance 0.02" in (tmp_path / "report/report.md").read_text()
    report_of(tmp_path, "runs")  # among the other metrics
    assert re.search(
        r"<td>pauc \(above 80 % true-positive rate; at most 0.2, chance 0.02\)</td>.*<td>0.1576</td>", page_of(tmp_path)
    )


# --------------------------------------------------------------------------------------------- sweeps, folds, no labels


def test_a_sweep_opens_with_the_choice_on_val(tmp_path):
    """The best by val is not the best by test, and the test figure that is named is its own."""
    for lr, val, test in ((0.1, 0.7, 0.9), (0.01, 0.8, 0.6), (0.001, 0.5, 0.5)):
        write_run(tmp_path / f"runs/lr-{lr}", "student", test, flags={"lr": lr}, val={"accuracy": val})
    report, done = report_of(tmp_path, "runs")
    assert report["selected"]["metric"] == "val_accuracy" and report["selected"]["test"]["mean"] == 0.6
    assert [setting["runs"] for setting in report["selected"]["ranked"]] == [
        ["runs/lr-0.01"],
        ["runs/lr-0.1"],
        ["runs/lr-0.001"],
    ]
    page = page_of(tmp_path)
    assert (
        page.index("Selection on val") < page.index("Test figures")
        and "with test accuracy <b>60.00</b> in %: runs/lr-0.01" in page
    )
    assert "best val_accuracy: 0.8000, runs/lr-0.01\n" in done.stdout
    write_run(
        tmp_path / "runs/more", "student", 0.9, train_set="more", flags={"lr": 0.01}
    )  # another question than which rate
    assert report_of(tmp_path, "runs")[0]["selected"] is None


def fold_run(folder, role, fold, right, **more):
    """Of a cross-validation in three parts: each fold has a test set of its own."""
    return write_predicted(
        folder,
        role,
        right,
        name=f"fold{fold}-",
        test_set=f"test {fold}",
        train_set=f"train {fold}",
        val_set=f"val {fold}",
        images=90 + fold,
        flags={"folds": 3, "fold": fold, **more.pop("flags", {})},
        **more,
    )


def test_folds_are_one_group(tmp_path):
    """Three folds of 100, 200 and 300 test images, each with its own teacher; the gain is the mean over folds."""
    rng, gains = np.random.default_rng(2), []
    for fold in range(3):
        before = rng.random(100 * (fold + 1)) < 0.6
        after = before | (rng.random(len(before)) < 0.3)
        gains.append(after.astype(float) - before)
        teacher = fold_run(tmp_path / f"runs/t{fold}", "teacher", fold, np.ones(len(before), bool), model="resnet18")
        fold_run(tmp_path / f"runs/s{fold}", "student", fold, before)
        fold_run(tmp_path / f"runs/d{fold}", "distill", fold, after, method="response", teacher=teacher)
    report, done = report_of(tmp_path, "runs")
    group, means = only(report["groups"]), [gain.mean() for gain in gains]
    assert (
        group["runs"]["distilled"] == ["runs/d0", "runs/d1", "runs/d2"]
        and group["student_accuracy_without_kd"]["n"] == 3
    )
    assert group["gain"] == pytest.approx(np.mean(means)) and group["teacher_accuracy"] == {
        "mean": 1,
        "std": 0,
        "n": 3,
        "seeds": [f"fold {fold}, seed 0" for fold in range(3)],
    }
    evidence = group["evidence"]
    assert evidence["gain"] == pytest.approx(np.mean(means)) and evidence["units"] == 600
    spread = 1.96 * np.sqrt(sum(gain.var() / len(gain) for gain in gains)) / 3  # of a mean of three independent means
    assert evidence["interval"] == pytest.approx([np.mean(means) - spread, np.mean(means) + spread], abs=0.01)
    assert evidence["seeds_interval"] == pytest.approx(list(scipy.stats.ttest_1samp(means, 0).confidence_interval()))
    assert "points over folds" in done.stdout and "95 % over folds" in done.stdout
    assert evidence["fidelity"]["student with KD"]["agreement"] == pytest.approx(
        np.mean(
            [json.loads((tmp_path / f"runs/d{fold}/results.json").read_text())["test"]["accuracy"] for fold in range(3)]
        )
    )  # the teachers are right
    assert sum(row["images"] for row in evidence["classes"]["label"]) == 600


def test_folds_of_another_division_are_not_paired(tmp_path):
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    for fold in range(2):
        fold_run(tmp_path / f"runs/s{fold}", "student", fold, np.arange(90) < 50)
        fold_run(tmp_path / f"runs/d{fold}", "distill", fold, np.arange(90) < 60, method="response", teacher=teacher)
    file = tmp_path / "runs/s1/results.json"
    file.write_text(file.read_text().replace(sha("toytest 1"), sha("toytest 7")))
    report, _ = report_of(tmp_path, "runs")
    group = only(report["groups"])
    assert group["runs"]["students"] == ["runs/s0"] and group["gain_paired"]["seeds"] == ["fold 0, seed 0"]
    assert matching(report["missing"], "runs/s1 are left out", "folds hold other images")
    assert "On fold 0, seed 0 alone" in group["evidence"]["sentence"]


def write_label_free(folder, seed, teacher):
    """A run of --method tokens on unlabelled images: no head, no test set."""
    write_run(
        folder,
        "distill",
        0.5,
        seed=seed,
        method="tokens",
        teacher=teacher,
        dataset="unlabeled",
        classes=[],
        model="vit_6_192",
        select_metric="distillation_loss",
        val={"distillation_loss": 0.25 + seed / 10},
        test=None,
        final_test=None,
    )
    results = json.loads((folder / "results.json").read_text())
    del results["test"], results["final_test"], results["dataset"]["sha256"]["test"]
    (folder / "results.json").write_text(json.dumps(results))
    rows = [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "val_distillation_loss": 10.0**-epoch,
            "val_knn": 0.1 * epoch if epoch != 2 else None,
            "val_teacher_knn": 0.4,
        }
        for epoch in (1, 2, 3)
    ]
    (folder / "metrics.json").write_text(json.dumps(rows))


def test_label_free_runs_have_their_page(tmp_path):
    """Alone, and beside runs with labels."""
    for seed in range(2):
        write_label_free(tmp_path / f"runs/free{seed}", seed, sha("t"))
    report, done = report_of(tmp_path, "runs")
    page = page_of(tmp_path)
    rows = [
        [text.strip() for text in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("| ")
    ]
    assert rows == [
        [
            "dataset",
            "teacher",
            "student",
            "method",
            "val distillation loss",
            "val k-NN (%)",
            "teacher's k-NN (%)",
            "seeds",
        ],
        ["unlabeled", "resnet18", "vit_6_192", "tokens", "0.3000 ± 0.0707", "30.00", "40.00", "2"],
    ]
    assert (
        "Students without labels" in page
        and "Test figures" not in page
        and "Test metrics" not in page
        and "McNemar" not in page
    )
    assert (
        not re.search(r"<tbody>\s*</tbody>", page)
        and "baseline" not in done.stdout
        and "predictions" not in done.stdout
    )
    assert "0.2500 (val distillation_loss)" in page and "90 images without labels" in page
    write_label_free(tmp_path / "runs/free0_again", 0, write_run(tmp_path / "runs/t", "teacher", 0.9))
    write_run(tmp_path / "runs/s", "student", 0.6)
    report, done = report_of(tmp_path, "runs")
    assert len(report["groups"]) == 3 and "| toy " in done.stdout and done.stdout.count("| unlabeled ") == 2
    assert not matching(report["missing"], "tested on other images")


def test_predictions_with_classes_in_another_order_have_their_own_reference(tmp_path):
    """Runs on one test set whose class names are ordered in two ways are in two groups; neither spoils the other."""
    runs, missing = [], []
    for name, classes in (("one", CLASSES), ("two", CLASSES[::-1])):
        for seed in (0, 1):
            write_predicted(tmp_path / f"{name}{seed}", "student", np.arange(30) < 20)
            file = tmp_path / f"{name}{seed}" / "predictions_test.npz"
            with np.load(file) as arrays:
                np.savez(file, **{**arrays, "classes": np.array(classes)})
            test_set = {"dataset": {"sha256": {"test": "same"}}, "test": {"accuracy": 20 / 30}}
            runs.append({"path": str(file.parent), "seed": seed, **test_set})
    statistics.load_predictions(runs, missing)
    assert not missing and [run["predictions"].classes["label"] for run in runs] == [CLASSES] * 2 + [CLASSES[::-1]] * 2


def test_figures_whose_names_would_be_one_file_are_two(tmp_path):
    """Tasks "a b" and "A-b", on a disk that ignores case too."""
    figures = page.Figures(tmp_path)
    for task in ("a b", "A-b"):
        with figures.new(f"roc-{task}", f"title of {task}", 3) as axis:
            axis.plot([0, 1], [0, 1])
    assert len({name.lower() for name in figures.titles}) == 2
    assert sorted(figures.titles) == sorted(path.name for path in tmp_path.iterdir())
    assert list(figures.titles.values()) == ["title of a b", "title of A-b"]


def test_a_legend_has_one_entry_for_each_label(tmp_path, monkeypatch):
    legends = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.legend", lambda figure, handles, labels, **_: legends.append([*labels])
    )
    with page.Figures(tmp_path).new("f", "title", 3, rows=2) as (one, two):
        for axis in (one, two):
            for label in ("seeds", "seeds", "best"):
                axis.plot([0, 1], label=label)
    assert legends == [["seeds", "best"]]


def test_a_long_legend_leaves_the_axes_their_height(tmp_path):
    heights = []
    for count in (1, 15):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with page.Figures(tmp_path).new(f"f{count}", "title", 3) as axis:
                for i in range(count):
                    axis.plot([0, 1], label=f"{i}: a label of many words that takes a line of its own")
                figure = axis.figure
        heights.append(axis.get_position().height * figure.get_figheight())
    assert heights[1] > 0.9 * heights[0]


@pytest.mark.parametrize(("count", "labels"), [(3, 4), (40, 2)])
def test_a_long_legend_of_costs_names_kinds_alone(tmp_path, monkeypatch, count, labels):
    """One baseline and `count` methods: beyond 30 points each method's name would hide the figure."""
    cost = {"multiply_adds": 1e6, "parameters": 10}
    groups = [
        {
            **{
                "dataset": "toy",
                "label_free": False,
                "teacher": None,
                "student": "s",
                "method": f"m{i}",
                "variant": "",
            },
            "cost": {"student without KD": cost, "student with KD": cost},
            "metrics": {
                "accuracy": {
                    "teacher": {"mean": None, "std": None, "n": 0},
                    "student without KD": {"mean": 0.5, "std": None, "n": 1},
                    "student with KD": {"mean": 0.6 + i / 1000, "std": None, "n": 1},
                }
            },
        }
        for i in range(count)
    ]
    legends = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.legend", lambda figure, handles, labels, **_: legends.append([*labels])
    )
    page.draw_costs(page.Figures(tmp_path), groups, "accuracy")
    assert len(only(legends)) == labels
    assert set(legends[0]) == (
        {"student without KD", "student with KD"} if labels == 2 else {"s, alone", "s, m0", "s, m1", "s, m2"}
    )


@pytest.fixture
def axes_seen(monkeypatch):
    """[(label, scale, tick labels)] of the y axes of all figures that are drawn."""
    seen, new = [], page.Figures.new

    @contextlib.contextmanager
    def look(*args, **more):
        with new(*args, **more) as axes:
            yield axes
            for axis in np.ravel(axes):
                axis.figure.canvas.draw()
                texts = [text.get_text() for text in axis.get_yticklabels(which="both")]
                seen.append((axis.get_ylabel(), axis.get_yscale(), texts))

    monkeypatch.setattr(page.Figures, "new", look)
    return seen


def test_learning_curves_show_what_chose_the_epoch(tmp_path, axes_seen):
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    write_run(
        tmp_path / "runs/d", "distill", 0.7, method="response", teacher=teacher, select_metric="balanced_accuracy"
    )
    write_run(tmp_path / "runs/alone", "teacher", 0.7, dataset="other", select_metric="loss")
    report_of(tmp_path, "runs")
    curves = [name for name, _, _ in axes_seen if name.startswith("val ")]
    assert curves == ["val balanced_accuracy (%)", "val loss"]


@pytest.mark.parametrize(("high", "log"), [(50.0, True), (0.09, False)])
def test_curves_have_panels_of_that_metric_and_a_log_axis_where_they_need_it(tmp_path, axes_seen, high, log):
    rows = [
        {"epoch": 1, "train_loss": high, "val_distillation_loss": high},
        {"epoch": 2, "train_loss": 0.05, "val_distillation_loss": 0.05},
    ]
    run = {"rows": rows, "best_epoch": 2, "select_metric": "distillation_loss"}
    page.draw_curves(page.Figures(tmp_path), "c", "title", [("student", "C0", run)])
    assert [name for name, _, _ in axes_seen] == ["train loss", "val distillation_loss"]
    for _, scale, texts in axes_seen:
        assert (scale == "log") == log and any(texts)
        assert not any("$" in text or "mathdefault" in text for text in texts)
        assert not log or {"0.1", "1", "10"} <= set(texts)


@pytest.mark.parametrize("size", [2, 10, 40])
def test_confusion_matrices_are_readable_on_a_narrow_screen(tmp_path, size):
    """On 400 px the page scrolls what would be shown at less than 45 % of its pixels: letters of 9 points are then 7 px
    tall."""
    write_run(tmp_path / "runs/s", "student", 0.6, classes=[f"class {i}" for i in range(size)])
    np.save(tmp_path / "runs/s/confusion_test_label.npy", np.eye(size, dtype=int))
    report, _ = report_of(tmp_path, "runs")
    name = only(matching(report["figures"], "confusion"))
    with Image.open(tmp_path / "report" / name) as image:
        least = only(re.findall(r'alt="Confusion[^>]*min-width: (\d+)px', page_of(tmp_path)))
        assert int(least) >= 0.44 * image.width and (int(least) <= 360) == (size <= 10)


ODD = {
    "a byte order mark": "\ufeff{}".encode(),
    "UTF-16": "{}".encode("utf-16"),
    "nothing": b"",
    "bytes": bytes(range(256)),
    "a number": b"7",
    "null": b"null",
    "a list": b"[]",
    "deep": b"[" * 5000,
}


def test_odd_folders_are_named_in_one_line_each(tmp_path):
    write_run(tmp_path / "runs/good", "student", 0.6)
    for index, content in enumerate(ODD.values()):
        write_run(tmp_path / f"runs/bad{index}", "student", 0.6)
        (tmp_path / f"runs/bad{index}/results.json").write_bytes(content)
    (tmp_path / "runs/going on").mkdir()
    (tmp_path / "runs/going on/config.json").write_text('{"flags": {}}')
    (tmp_path / "runs/folder/results.json").mkdir(parents=True)
    report, done = report_of(tmp_path, "runs")
    assert [run["run"] for run in report["runs"]] == ["runs/good"] and not done.stderr
    for name in [*(f"runs/bad{index}" for index in range(len(ODD))), "runs/going on", "runs/folder"]:
        assert len(only(matching(report["missing"], f"{name} is ")).splitlines()) == 1


def test_a_results_file_with_any_part_missing_ends_in_no_traceback(tmp_path, monkeypatch):
    """Each key down to the second level is left out or null, those of the first are a string or a list too."""
    monkeypatch.setattr(
        report, "draw_report", lambda *args: {} if not [group.update(figures=[]) for group in args[3]] else {}
    )
    teacher = write_run(tmp_path / "runs/t", "teacher", 0.9)
    write_run(tmp_path / "runs/s", "student", 0.6)
    write_run(tmp_path / "runs/d", "distill", 0.7, method="response", teacher=teacher)
    file = tmp_path / "runs/d/results.json"
    whole = json.loads(file.read_text())
    places = [(key,) for key in whole] + [
        (key, inner) for key in whole if isinstance(whole[key], dict) for inner in whole[key]
    ]
    for place in places:
        for change in (
            "drop",
            None,
            *(("word", ["list"]) if isinstance(whole[place[0]], dict) and len(place) == 1 else ()),
        ):
            results = json.loads(json.dumps(whole))
            part = results if len(place) == 1 else results[place[0]]
            if change == "drop":
                del part[place[-1]]
            else:
                part[place[-1]] = change
            file.write_text(json.dumps(results))
            done = run_report(tmp_path, "runs")
            assert done.returncode == 0, (place, change, done.stderr)
