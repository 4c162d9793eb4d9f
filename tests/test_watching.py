"""A run is seen while it goes on: --tensorboard of the scripts that train, --watch of report.py."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL, script_environment, succeed
from PIL import Image


def events(folder):
    """{tag: [(step, value)]} of the scalars, and the names of the images, of a run folder's only event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.glob("events.out.tfevents.*")
    read = EventAccumulator(str(file), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    tags = read.Tags()
    scalars = {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, {tag: read.Images(tag)[0].encoded_image_string for tag in tags["images"]}, read


@pytest.mark.parametrize("script", ["train_student.py", "distill.py"])
def test_tensorboard_has_each_epoch_once_also_after_a_resume(tmp_path, teacher, script):
    pytest.importorskip("tensorboard")
    run, more = tmp_path / "run", ["--teacher-checkpoint", teacher / "best.pth"] if script == "distill.py" else []
    succeed(script, *SMALL, *more, "--model", "resnet8", "--epochs", 2, "--tensorboard", "--output", run)
    succeed(script, "--resume", run, "--epochs", 3)
    scalars, images, read = events(run)
    rows = json.loads((run / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for tag, name in (("loss/train", "train_loss"), ("accuracy/val", "val_accuracy"), ("run/lr", "lr")):
        assert [step for step, _ in scalars[tag]] == [1, 2, 3]
        assert np.allclose([value for _, value in scalars[tag]], [row[name] for row in rows], rtol=1e-6)
    results = json.loads((run / "results.json").read_text())
    ((step, accuracy),) = scalars["accuracy/test"]
    assert step == 3 and accuracy == pytest.approx(results["test"]["accuracy"])
    assert {"samples", "confusion_val_label", "confusion_test_label"} <= set(images)
    drawn = np.asarray(Image.open(run / "tensorboard_samples.png").convert("RGB"))
    (run / "again.png").write_bytes(images["samples"])
    assert (np.asarray(Image.open(run / "again.png").convert("RGB")) == drawn).all()
    (flags,) = read.Tensors("flags/text_summary")
    assert '"batch_size": 32' in flags.tensor_proto.string_val[0].decode()


def test_without_the_flag_there_is_no_event_file_and_overwriting_removes_one(tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    flags = [*SMALL, "--model", "resnet8", "--epochs", 1, "--output", run]
    succeed("train_student.py", *flags, "--tensorboard")
    assert list(run.glob("events*"))
    succeed("train_student.py", *flags, "--overwrite")
    assert not list(run.glob("events*")) and not (run / "tensorboard_samples.png").exists()


def test_a_watched_report_waits_for_the_first_run_and_takes_those_that_end_later(tmp_path, teacher):
    runs, report = tmp_path / "runs", tmp_path / "report" / "report.html"
    (runs / "a").mkdir(parents=True)
    for name in ("config.json", "metrics.json"):
        shutil.copy(teacher / name, runs / "a" / name)
    command = [sys.executable, ROOT / "report.py", runs, "--watch", "1", "--output", report.parent, "--gallery", "0"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, env=script_environment(), bufsize=1
    )
    try:
        line = process.stdout.readline()
        accuracy = json.loads((teacher / "metrics.json").read_text())[-1]["val_accuracy"]
        assert line.startswith("waiting: ") and f"; 2 of 2 epochs are done, val accuracy {accuracy:.4f}" in line
        for file in teacher.iterdir():
            if file.name != "results.json":
                shutil.copy(file, runs / "a" / file.name)
        shutil.copy(teacher / "results.json", runs / "a" / "results.tmp")
        os.replace(runs / "a" / "results.tmp", runs / "a" / "results.json")
        written = set()
        for line in process.stdout:
            if line.startswith("report: "):
                written.add(report.stat().st_mtime_ns)
                if len(written) == 2:
                    break
        assert '<meta http-equiv="refresh" content="1">' in report.read_text()
    finally:
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.wait(timeout=60) == 130


def test_a_report_that_is_not_watched_does_not_load_itself_anew(tmp_path, teacher):
    succeed("report.py", teacher, "--output", tmp_path / "report", "--gallery", 0)
    assert "http-equiv" not in (tmp_path / "report" / "report.html").read_text()
