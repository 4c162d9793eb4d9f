"""A run that was stopped and resumed equals one that was not, bit for bit, whatever stopped it and wherever."""

import json
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, run_script, script_environment, succeed

from common import training

# all that has state of its own: projectors, EMA, AdamW's moments, warm-up, clipping, plateau
DISTILL = [
    *SMALL, "--epochs", 3, "--method", "feature", "--student-layer", "layer2", "--teacher-layer", "layer3",
    "--optimizer", "adamw", "--ema", 0.9, "--warmup-epochs", 1, "--clip-grad", 1, "--schedule", "plateau",
    "--plateau-patience", 1, "--rotation", 15, "--contrast", 0.3, "--seed", 3,
]  # fmt: skip
TIMES = ("images_per_second", "seconds")


def start(script, *args):
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=script_environment(),
    )  # fmt: skip


def stop_when(process, reached, number, seconds=120):
    """Send a signal as soon as reached() is true; returns (exit code, stderr)."""
    end = time.time() + seconds
    while not reached():
        assert process.poll() is None, f"ended before it was stopped: {process.communicate()}"
        assert time.time() < end, "never got there"
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def lines_in(path, needle):
    return path.read_text().count(needle) if path.exists() else 0


def same(a, b, where=""):
    """Assert equality of nested checkpoints, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "flags", "log_bytes", "checkpoint"):
                same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def rows(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in json.loads((folder / "metrics.json").read_text())]


def assert_same_run(folder, reference):
    for name in ("latest.pth", "best.pth"):
        same(torch.load(folder / name, weights_only=True), torch.load(reference / name, weights_only=True), name)
    assert rows(folder) == rows(reference)
    ours, theirs = (json.loads((f / "results.json").read_text()) for f in (folder, reference))
    for key in ("val", "test", "final_val", "final_test", "best_epoch", "last_epoch"):
        assert ours[key] == theirs[key], key
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + len(rows(folder))
    assert [lines_in(folder / "log.txt", f"epoch {e}/3:") for e in (1, 2, 3)] == [1, 1, 1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    succeed("distill.py", *DISTILL, "--teacher-checkpoint", teacher / "best.pth", "--output", folder)
    return folder


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 75), (signal.SIGKILL, -9)])
def test_stopped_in_the_middle_of_an_epoch(tmp_path, teacher, uninterrupted, number, code):
    run = tmp_path / "run"
    process = start("distill.py", *DISTILL, "--teacher-checkpoint", teacher / "best.pth", "--output", run)
    # the row of an epoch is there a moment before its checkpoint: for SIGKILL wait for the checkpoint
    seen = (lambda: (run / "latest.pth").exists()) if code < 0 else (lambda: lines_in(run / "log.txt", "epoch 1/3:"))
    exit_code, errors = stop_when(process, seen, number)
    assert exit_code == code
    if code > 0:
        assert errors.startswith("interrupted by SIG") and f"--resume {run}" in errors and len(errors.splitlines()) == 1
    assert not (run / "results.json").exists()
    succeed("distill.py", "--resume", run)
    assert_same_run(run, uninterrupted)
    assert not [f.name for f in run.iterdir() if f.name.startswith(".")] or code < 0  # no half files after a signal


def test_stopped_twice_and_a_second_time_after_resuming(tmp_path, teacher, uninterrupted):
    run = tmp_path / "run"
    process = start("distill.py", *DISTILL, "--teacher-checkpoint", teacher / "best.pth", "--output", run)
    assert stop_when(process, lambda: (run / "log.txt").exists(), signal.SIGTERM)[0] == 143  # before or in epoch 1
    stopped_at = torch.load(run / "latest.pth", weights_only=True)
    assert stopped_at["epoch"] == 1
    process = start("distill.py", "--resume", run)
    assert stop_when(process, lambda: lines_in(run / "log.txt", "epoch 2/3:"), signal.SIGUSR1)[0] == 75
    succeed("distill.py", "--resume", run)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("script", ["train_teacher.py", "train_student.py"])
def test_the_other_scripts_resume_too(tmp_path, script):
    flags = [*SMALL, "--epochs", 3, "--model", "resnet8", "--patience", 2, "--cache", "off", "--workers", 2]
    succeed(script, *flags, "--output", tmp_path / "whole")
    process = start(script, *flags, "--output", tmp_path / "run")
    code, _ = stop_when(process, lambda: lines_in(tmp_path / "run" / "log.txt", "epoch 1/3:"), signal.SIGTERM)
    assert code == 143
    succeed(script, "--resume", tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    """A run killed between its row and its checkpoint: the row is written again, not twice."""
    run = tmp_path / "run"
    succeed("train_student.py", *SMALL, "--epochs", 2, "--save-every", 1, "--output", run)
    reference = rows(run)
    (run / "latest.pth").unlink()
    (run / "epoch_1.pth").rename(run / "latest.pth")  # as if epoch 2's checkpoint had not been reached
    succeed("train_student.py", "--resume", run)
    assert rows(run) == reference
    assert lines_in(run / "log.txt", "epoch 2/2:") == 1 and lines_in(run / "metrics.csv", "\n2,") == 1


def test_the_best_metric_survives_a_resume(tmp_path):
    """A later, worse epoch must not become the best one because the memory of the best was lost."""
    run = tmp_path / "run"
    succeed("train_student.py", *SMALL, "--epochs", 2, "--output", run)
    saved = torch.load(run / "latest.pth", weights_only=True)
    saved["best"], saved["best_epoch"] = 1.1, 1  # nothing can beat it
    torch.save(saved, run / "latest.pth")
    best = (run / "best.pth").read_bytes()
    succeed("train_student.py", "--resume", run, "--epochs", 3)
    assert (run / "best.pth").read_bytes() == best
    assert json.loads((run / "results.json").read_text())["best_epoch"] == 1


def test_flags_beside_resume(tmp_path):
    run = tmp_path / "run"
    succeed("train_student.py", *SMALL, "--epochs", 1, "--output", run)
    before = (run / "latest.pth").read_bytes()
    for flags, word in ((["--lr", 0.2], "--lr"), (["--batch-size", 16], "--batch-size"), (["--seed", 5], "--seed"),
                        (["--overwrite"], "--overwrite"), (["--output", tmp_path / "other"], "--output")):  # fmt: skip
        done = run_script("train_student.py", "--resume", run, *flags)
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert (run / "latest.pth").read_bytes() == before
    succeed("train_student.py", "--resume", run, "--epochs", 2, "--workers", 1, "--batch-size", 32)
    assert len(rows(run)) == 2


def test_a_run_without_feature_layers_resumes_too(teacher, tmp_path):
    """Its lists of layers are empty: no flag of the saved ones may stand there without a value."""
    succeed("distill.py", *SMALL, "--epochs", 1, "--teacher-checkpoint", teacher / "best.pth", "--output", tmp_path / "run")
    succeed("distill.py", "--resume", tmp_path / "run", "--epochs", 2)
    assert len(rows(tmp_path / "run")) == 2


def test_the_command_that_continues_can_be_pasted():
    """A run folder with spaces, in the line of an interrupted script."""
    recorder = training.Recorder.__new__(training.Recorder)
    vars(recorder).update(epoch=2, epochs_wanted=1, step=3, stopped_early=False, run=SimpleNamespace(folder="my runs/a"))
    with pytest.raises(training.Interrupted) as stop, recorder.saving_when_interrupted():
        raise training.Interrupted("interrupted by SIGTERM", 143)
    words = shlex.split(str(stop.value))
    assert words[words.index("--resume") : words.index("--resume") + 3] == ["--resume", "my runs/a", "continues"]
