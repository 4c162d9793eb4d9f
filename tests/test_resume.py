"""A run that was stopped and resumed equals one that was not, bit for bit, whatever stopped it and wherever."""

import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, run_script, script_environment, succeed

import train_student
from common import cli, run
from common.run import Interrupted, Meter, Recorder, RunFolder, UserError, stops
from common.training import Precision, Schedule, Updater

# all that has state of its own: projectors, EMA, AdamW's moments, warm-up, clipping, plateau
DISTILL = [
    *SMALL,
    "--epochs",
    3,
    "--method",
    "feature",
    "--student-layer",
    "layer2",
    "--teacher-layer",
    "layer3",
    "--optimizer",
    "adamw",
    "--ema",
    0.9,
    "--warmup-epochs",
    1,
    "--clip-grad",
    1,
    "--schedule",
    "plateau",
    "--plateau-patience",
    1,
    "--rotation",
    15,
    "--contrast",
    0.3,
    "--seed",
    3,
]
TIMES = ("images_per_second", "seconds")


def start(script, *args):
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=script_environment(),
    )


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


def stopped(line, number, script, *args):
    """Run a script in this process and tell it to stop at the first step after this line of its output."""
    check = stops.check

    def told():
        if stops.deferring and line.encode() in sys.stdout.buffer.getvalue():
            stops.receive(number)
        check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stops, "check", told)
        done = run_script(script, *args)
    assert done.returncode == stops.CODES[number], done.stderr
    assert done.stderr.startswith(f"interrupted by {number.name}") and len(done.stderr.splitlines()) == 1, done.stderr


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
    return [
        {k: v for k, v in row.items() if k not in TIMES} for row in json.loads((folder / "metrics.json").read_text())
    ]


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


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_in_the_middle_of_an_epoch(tmp_path, teacher, uninterrupted, number, code):
    run = tmp_path / "run"
    process = start("distill.py", *DISTILL, "--teacher-checkpoint", teacher / "best.pth", "--output", run)
    # between the line of an epoch and its checkpoint there is a moment: for SIGKILL wait for the checkpoint
    seen = (lambda: (run / "latest.pth").exists()) if code < 0 else (lambda: lines_in(run / "log.txt", "epoch 1/3:"))
    exit_code, errors = stop_when(process, seen, number)
    assert exit_code == code
    if code > 0:
        assert errors.startswith("interrupted by SIG") and f"--resume {run}" in errors and len(errors.splitlines()) == 1
    assert not (run / "results.json").exists()
    succeed("distill.py", "--resume", run)
    assert_same_run(run, uninterrupted)
    assert not [
        f.name for f in run.iterdir() if f.name.startswith(".")
    ]  # no half files, even of a writer that was killed


def test_stopped_twice_and_a_second_time_after_resuming(tmp_path, teacher, uninterrupted):
    run = tmp_path / "run"
    flags = [*DISTILL, "--teacher-checkpoint", teacher / "best.pth", "--output", run]
    stopped("train, ", signal.SIGTERM, "distill.py", *flags)  # in epoch 1
    stopped_at = torch.load(run / "latest.pth", weights_only=True)
    assert (stopped_at["epoch"], stopped_at["step"]) == (1, 1)
    stopped("epoch 2/3:", signal.SIGUSR1, "distill.py", "--resume", run)
    succeed("distill.py", "--resume", run)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("script", ["train_teacher.py", "train_student.py"])
def test_the_other_scripts_resume_too(tmp_path, script):
    flags = [*SMALL, "--epochs", 3, "--model", "resnet8", "--patience", 2, "--cache", "off", "--workers", 2]
    succeed(script, *flags, "--output", tmp_path / "whole")
    stopped("epoch 1/3:", signal.SIGTERM, script, *flags, "--output", tmp_path / "run")
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
    for flags, word in (
        (["--lr", 0.2], "--lr"),
        (["--batch-size", 16], "--batch-size"),
        (["--seed", 5], "--seed"),
        (["--overwrite"], "--overwrite"),
        (["--output", tmp_path / "other"], "--output"),
    ):
        done = run_script("train_student.py", "--resume", run, *flags)
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert (run / "latest.pth").read_bytes() == before
    succeed("train_student.py", "--resume", run, "--epochs", 2, "--workers", 1, "--batch-size", 32)
    assert len(rows(run)) == 2


def test_a_run_without_feature_layers_resumes_too(teacher, tmp_path):
    """Its lists of layers are empty: no flag of the saved ones may stand there without a value."""
    succeed(
        "distill.py", *SMALL, "--epochs", 1, "--teacher-checkpoint", teacher / "best.pth", "--output", tmp_path / "run"
    )
    succeed("distill.py", "--resume", tmp_path / "run", "--epochs", 2)
    assert len(rows(tmp_path / "run")) == 2


# --------------------------------------------------------------------------------------- the recorder and the run
# folder

DATA = {"name": "d", "classes": ["cat", "dog"], "sizes": {"train": 8, "val": 4}, "sha256": {"train": "a", "val": "b"}}


class Tiny(torch.nn.Linear):
    name, kind, build_args = "tiny", "image", {}


def recorder(folder, resume=False, epochs=9, patience=0, data=DATA):
    model = Tiny(2, 2)
    updater = Updater(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        Schedule(0.1, 1, schedule="constant", epochs=9),
        Precision("off", torch.device("cpu")),
    )
    made = Recorder(
        RunFolder(str(folder), resume, not resume),
        updater,
        epochs=epochs,
        select_metric="accuracy",
        patience=patience,
        save_every=0,
        content={"flags": {"dataset": "d", "data_root": None}, "classes": [], "preprocess": {}, "data": data},
    )
    made.open({}, 0)
    return made


def run_epochs(made, values):
    """Epochs that were run, with these accuracies on val."""
    done = []
    for epoch in range(made.start_epoch, made.epochs + 1):
        made.images, made.train_means, made.train_seconds, made.epoch_started = 0, {}, 1, time.time()
        made.end_epoch({"accuracy": values[epoch - 1]})
        done.append(epoch)
        if made.stopped_early:
            break
    made.wait()
    return done


def test_patience_is_a_number_of_epochs_without_gain(tmp_path):
    """The best is epoch 2: with a patience of 3 epochs 3, 4 and 5 are waited for, and a resumed run stays stopped."""
    assert run_epochs(recorder(tmp_path, patience=3), [0.5, 0.6, 0.6, 0.5, 0.59, 0.9, 0.9]) == [1, 2, 3, 4, 5]
    again = recorder(tmp_path, True, patience=3)
    assert again.stopped_early and run_epochs(again, [1.0] * 9) == []
    assert again.best_epoch == 3  # of two that are equally good the later


def test_patience_goes_on_after_a_resume(tmp_path):
    assert run_epochs(recorder(tmp_path, epochs=3, patience=3), [0.6, 0.5, 0.6]) == [1, 2, 3]
    assert run_epochs(recorder(tmp_path, True, patience=3), [0.6, 0.5, 0.6, 0.6, 0.6]) == [4]  # epoch 3 was no gain


@pytest.mark.parametrize(
    "change, words",
    [
        ({"classes": ["dog", "cat"]}, ["order", "['dog', 'cat']", "['cat', 'dog']"]),
        ({"classes": ["ape", "cat", "dog"]}, ["also have 'ape'"]),
        ({"classes": ["dog", "zebra"]}, ["lack 'cat'", "also have 'zebra'"]),
        (
            {"sizes": {"train": 7, "val": 4}, "sha256": {"train": "c", "val": "b"}},
            ["train had other images or labels (8 then, 7 now)"],
        ),
        ({"sha256": {"train": "a", "val": "c"}}, ["val had other images or labels (4 then, 4 now)"]),
    ],
)
def test_a_resumed_run_refuses_other_data(tmp_path, change, words):
    run_epochs(recorder(tmp_path, epochs=2), [0.5, 0.6])
    before = (tmp_path / "latest.pth").read_bytes()
    with pytest.raises(UserError) as caught:
        recorder(tmp_path, True, data={**DATA, **change})
    assert all(word in str(caught.value) for word in [str(tmp_path), *words]), str(caught.value)
    assert (tmp_path / "latest.pth").read_bytes() == before and len(rows(tmp_path)) == 2
    assert run_epochs(recorder(tmp_path, True, epochs=3), [0.5] * 3) == [3]  # the same data go on


@pytest.mark.parametrize("variable, absolute", [("WHERE", True), ("KD_STAGED", False)])
def test_a_relative_data_root_is_saved_absolute(tmp_path, monkeypatch, variable, absolute):
    """But not by a job: its stage, in which it is relative, is gone afterwards."""
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys, "argv", ["train_student.py", "--data-root", "d"])
    with pytest.raises(SystemExit):
        cli.run_script(lambda args: seen.append(args.data_root), train_student.build_parser)
    assert seen == [str(tmp_path / "d") if absolute else "d"]
    assert "KD_STAGED=1" in (ROOT / "slurm" / "env.sh").read_text()


def test_a_process_without_labels_does_not_count(tmp_path, monkeypatch):
    """It saw 2 batches without one: the accuracy is that of the others, the loss the mean over all."""

    class Done(list):
        accumulate, batches = 1, lambda self, epoch, step, plan: self

    made, other = recorder(tmp_path), Meter()
    for accuracy in (0.25, 0.75):
        made.meter.add(loss=torch.tensor(1.0), accuracy=torch.tensor(accuracy))
        other.add(loss=torch.tensor(3.0), accuracy=torch.tensor(float("nan")))
    monkeypatch.setattr("common.run.gather_objects", lambda own: [own, other.total])
    list(made.batches(Done(), 1))
    assert made.train_means == {"loss": 2.0, "accuracy": 0.5}


def test_a_run_of_an_earlier_version_is_not_resumed(tmp_path):
    run_epochs(recorder(tmp_path, epochs=1), [0.5])
    saved = torch.load(tmp_path / "latest.pth", weights_only=True)
    torch.save({key: value for key, value in saved.items() if key != "data"}, tmp_path / "latest.pth")
    with pytest.raises(UserError, match="an earlier version of these scripts wrote it"):
        recorder(tmp_path, True)


def test_epochs_may_not_shrink_below_what_is_done(tmp_path):
    run_epochs(recorder(tmp_path, epochs=3), [0.5] * 3)
    with pytest.raises(UserError, match="--epochs 2 .* 3 epochs of .* are done"):
        recorder(tmp_path, True, epochs=2)
    half = recorder(tmp_path, True, epochs=4)
    half.step = 1  # stopped in epoch 4
    half.save()
    half.wait()
    with pytest.raises(UserError, match="--epochs 3 .* 4 epochs"):
        recorder(tmp_path, True, epochs=3)
    assert run_epochs(recorder(tmp_path, True, epochs=4), [0.5] * 4) == [4]


LOCKING = (
    "import fcntl, sys\nfile = open(sys.argv[1], 'a')\nfcntl.lockf(file, fcntl.LOCK_EX | "
    "fcntl.LOCK_NB)\nprint('held', flush=True)\nsys.stdin.read()"
)


def locker(folder):
    """Another process that locks a run folder's log.txt, if it can."""
    code = [sys.executable, "-c", LOCKING, str(folder / "log.txt")]
    process = subprocess.Popen(
        code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return process, process.stdout.readline()


def test_a_run_folder_is_one_run_s(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    run_epochs(recorder(tmp_path, epochs=1), [0.5])
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    other, held = locker(tmp_path)
    assert held == "held\n"
    for resume in (True, False):  # or --overwrite
        with pytest.raises(UserError, match=f"another run is writing {tmp_path}"):
            recorder(tmp_path, resume)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    other.kill()  # a lock dies with its process
    other.wait()
    (tmp_path / ".latest.pth.0123abcd").write_text("of a writer that was killed")
    gc.collect()  # a process that closes the file elsewhere loses its lock
    running = recorder(tmp_path, True)
    run_epochs(running, [0.5] * 9)
    assert locker(tmp_path)[1] == "" and not (tmp_path / ".latest.pth.0123abcd").exists()
    del running


def test_a_run_that_came_and_went_meanwhile_is_not_replaced(tmp_path):
    waiting = RunFolder(str(tmp_path / "run"))
    run_epochs(recorder(tmp_path / "run", epochs=1), [0.5])
    with pytest.raises(UserError, match="holds a run"):
        waiting.lock()
    assert len(rows(tmp_path / "run")) == 1


def test_files_have_the_user_s_umask(tmp_path):
    before = os.umask(0o027)
    try:
        run_epochs(recorder(tmp_path / "run", epochs=1), [0.5])
    finally:
        os.umask(before)
    assert {oct(f.stat().st_mode & 0o777) for f in (tmp_path / "run").iterdir()} == {"0o640"}


# ---------------------------------------------------------------------------------------------------------------
# signals

WAITING = """
import os, signal, sys
import torch.distributed as dist
from common import cli

def main(args):
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    os.write(write, b"x")
    store.wait(["what nobody sets"])  # in C, where Python's handlers do not run

for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        sys.argv = ["waiting.py"]
        cli.run_script(main, lambda: cli.Parser("waits"))
    os.read(read, 1)
    os.kill(pid, number)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_signals_are_heard_while_a_script_waits_for_another_process():
    done = subprocess.run(
        [sys.executable, "-c", WAITING], cwd=ROOT, capture_output=True, text=True, timeout=120, env=script_environment()
    )
    assert done.stdout.split() == ["143", "75", "130"]
    assert [line for line in done.stderr.splitlines() if line.startswith("interrupted by")] == [
        f"interrupted by {name}" for name in ("SIGTERM", "SIGUSR1", "SIGINT")
    ]


def test_a_signal_in_the_loop_waits_for_the_step_but_not_for_ever(monkeypatch):
    ended = []
    monkeypatch.setattr(stops, "end", ended.append)
    stops.begin()
    try:
        stops.receive(signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM") as caught:
            stops.check()  # the step ended: it is saved
        assert caught.value.exit_code == 143 and not ended
        stops.begin()
        stops.receive(signal.SIGUSR1)
        deadline = time.time() + 60
        while signal.SIGUSR1 not in ended and time.time() < deadline:
            time.sleep(0.1)
        assert signal.SIGUSR1 in ended
        stops.receive(signal.SIGINT)
        stops.receive(signal.SIGINT)  # a second Ctrl-C
        assert ended[-1] == signal.SIGINT
        ended.clear()
        stops.finish()  # of the loop: what came too late for its last check
        assert not stops.deferring and ended == [signal.SIGINT]
    finally:
        stops.deferring, stops.requested = False, 0  # their timers do nothing now


def test_the_command_that_continues_can_be_pasted():
    """A run folder with spaces, in the line of an interrupted script."""
    recorder = run.Recorder.__new__(run.Recorder)
    vars(recorder).update(
        epoch=2, epochs=1, step=3, stopped_early=False, run=SimpleNamespace(folder="my runs/a"), writing=None
    )
    with pytest.raises(run.Interrupted) as stop, recorder:
        raise run.Interrupted("interrupted by SIGTERM", 143)
    words = shlex.split(str(stop.value))
    assert words[words.index("--resume") : words.index("--resume") + 3] == ["--resume", "my runs/a", "continues"]


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_best_pth_holds_the_model_alone_and_latest_pth_all(tmp_path):
    """And what training changes after `save` is not in the file."""
    made = recorder(tmp_path, epochs=1)
    model = made.updater.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made.images, made.train_means, made.train_seconds, made.epoch_started = 0, {}, 1, time.time()
    slow = threading.Event()
    made.writer.submit(slow.wait)  # the disk takes its time
    made.end_epoch({"accuracy": 0.5})
    with torch.no_grad():
        model.weight.zero_()
    assert not (tmp_path / "latest.pth").exists()
    slow.set()
    made.wait()
    best, latest = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pth", "latest.pth"))
    for saved in (best, latest):
        assert all(torch.equal(saved["model"][name], value) for name, value in before.items())
    assert latest.keys() - best.keys() == {"updater", "raw_model", "processes", "seconds", "rows", "log_bytes"}


def test_what_went_wrong_in_writing_is_said(tmp_path, monkeypatch):
    made = recorder(tmp_path, epochs=2)
    monkeypatch.setattr(run, "save_checkpoint", lambda *args: (_ for _ in ()).throw(UserError("the disk is full")))
    with pytest.raises(UserError, match="the disk is full"):
        run_epochs(made, [0.5, 0.6])


def test_another_script_s_run_is_named(tmp_path):
    succeed("train_student.py", *SMALL, "--epochs", 1, "--output", tmp_path / "run")
    done = run_script("train_teacher.py", "--resume", tmp_path / "run")
    assert (
        done.returncode == 2
        and f"is a run of train_student.py: python train_student.py --resume {tmp_path / 'run'}" in done.stderr
    )
    done = run_script("train_student.py", "--resume", tmp_path / "run", "--scale", 0.9, 1.1)
    assert done.returncode == 2 and "--scale 0.9 1.1 with --resume: the run has none" in done.stderr, done.stderr
