"""The batch files on a real Slurm: results come back, whatever ends the job; requeueing, arrays, sweeps, several
nodes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, restored, succeed
from PIL import Image
from slurm_lab import slurm  # noqa: F401
from test_resume import assert_same_run, lines_in

QUICK = [*SMALL, "--epochs", "1", "--limit-train", "64"]
LONG = [
    *SMALL,
    "--epochs",
    "3",
    "--limit-train",
    "480",
    "--seed",
    "2",
]  # epochs of seconds, to be ended in the middle of one
OURS = {
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "SYNC_MINUTES": "0.005",
    **dict.fromkeys(("DATA_ROOT", "STAGE_DATA", "VENV", "MODULES", "MAX_REQUEUES", "LOG_GPU")),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """In what runs beside the jobs too: sums in another order would differ in their last bits."""
    with restored():
        os.environ["OMP_NUM_THREADS"] = OURS["OMP_NUM_THREADS"]
        torch.set_num_threads(int(OURS["OMP_NUM_THREADS"]))
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's copy of the code, where jobs are submitted and runs/ grows; site.sh lets a test choose TMPDIR."""
    folder = tmp_path_factory.mktemp("project with space")
    for name in ("common", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "site.sh"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    (folder / "slurm" / "site.sh").write_text('[ -z "$TEST_TMPDIR" ] || export TMPDIR=$TEST_TMPDIR\n')
    (folder / ".gitignore").write_text("*\n!*.py\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def submit(slurm, project):  # noqa: F811
    def submit(script, *args, options=(), env=None):
        return slurm.sbatch(
            *options, f"slurm/{script}.sbatch", *map(str, args), cwd=project, env={**OURS, **(env or {})}
        )

    yield submit
    slurm.cancel_all()


@pytest.fixture(scope="module")
def uninterrupted(project):
    """The run of LONG that nothing disturbed, without Slurm."""
    succeed("train_student.py", *LONG, "--output", "runs/whole", cwd=project)
    return project / "runs" / "whole"


def until(condition, what, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def here(project, script, *args, env=None):
    """A batch file without Slurm."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in OURS}
    environment.update({k: str(v) for k, v in {**OURS, **(env or {})}.items() if v is not None})
    command = ["bash", f"slurm/{script}", *map(str, args)]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=900)


def processes(slurm, job):  # noqa: F811
    """Pids of a job's script, by its path in the stage: job numbers alone are the same in every Slurm of this
    machine."""
    return running(rf"{re.escape(str(slurm.folder))}/[^\0]*-{job}/code/train_student\.py\0")


def running(pattern):
    """Pids of the processes whose command has a match of this pattern."""
    script, found = re.compile(pattern), []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if script.search(entry.read_text()):
                found.append(int(entry.parent.name))
        except OSError:  # it has ended
            pass
    return found


def figures(run):
    results = json.loads((run / "results.json").read_text())
    return {key: results[key] for key in ("val", "test", "final_test", "best_epoch", "parameters") if key in results}


def hidden(folder):
    return [f.name for f in folder.iterdir() if f.name.startswith(".") and f.name != ".slurm_job"]


# ------------------------------------------------------------------------------------------------------------- stages


def test_every_batch_file_runs_its_stage(slurm, project, submit):  # noqa: F811
    teacher = submit("train_teacher", *QUICK, "--limit-train", 640, "--model", "resnet8")
    student = submit("train_student", *QUICK)
    after = [f"--dependency=afterok:{teacher}", "--kill-on-invalid-dep=yes"]
    distill = submit("distill", *QUICK, options=after)  # its teacher: runs/teacher/best.pth
    after[0] = f"--dependency=afterok:{distill}"
    flags = ["runs/distill/best.pth", "--teacher-checkpoint", "runs/teacher/best.pth", "--device", "cpu"]
    evaluate = submit("evaluate", *flags, options=after)
    after[0] = f"--dependency=afterok:{distill}:{student}"
    report = submit("report", "runs/teacher", "runs/student", "runs/distill", options=after)
    for job in (teacher, student, distill, evaluate, report):
        slurm.wait(job, seconds=300)
        assert slurm.exit_code(job) == 0, slurm.log(job)

    # the same figures as the script gives
    succeed("distill.py", *QUICK, "--output", "runs/direct", cwd=project)
    assert figures(project / "runs" / "distill") == figures(project / "runs" / "direct")
    saved, direct = (
        torch.load(project / "runs" / name / "best.pth", weights_only=True)["model"] for name in ("distill", "direct")
    )
    assert all(torch.equal(saved[name], direct[name]) for name in direct)
    evaluation = json.loads((project / "runs" / "evaluate" / "evaluation.json").read_text())
    assert evaluation["student"]["accuracy"] == figures(project / "runs" / "distill")["test"]["accuracy"]
    assert json.loads((project / "report" / "report.json").read_text())["groups"][0]["method"] == "response"
    assert not hidden(project / "runs") and not hidden(project / "report")

    # the log's head and foot
    log = slurm.log(distill)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True).stdout.strip()
    node = slurm.jobs(distill)[0]["NodeList"]
    for line in (
        f"job: {distill}",
        f"node: {node}",
        f"commit: {commit}",
        "command: distill.py --dataset digits",
        "gpu: ",
    ):
        assert re.search(f"^{re.escape(line)}", log, re.M), f"{line} in\n{log}"
    assert re.search(r"\nwall time: 0:\d\d:\d\d\nexit code: 0\n$", log)
    resources = {
        name: slurm.jobs(job)[0] for name, job in (("teacher", teacher), ("student", student), ("report", report))
    }
    assert [r["TimeLimit"] for r in resources.values()] == ["1-00:00:00", "16:00:00", "01:00:00"]
    assert ["gres" in json.dumps(r) for r in resources.values()] == [True, True, False]


def test_without_slurm(project, uninterrupted, tmp_path):
    done = here(project, "train_student.sbatch", *LONG, "--output", "runs/here", env={"TMPDIR": tmp_path})
    assert done.returncode == 0 and done.stdout.endswith("exit code: 0\n"), done.stdout + done.stderr
    assert f"staged to {tmp_path}/kd-" in done.stdout and not list(tmp_path.glob("kd-*"))
    assert_same_run(project / "runs" / "here", uninterrupted)
    again = here(project, "train_student.sbatch", *LONG, "--output", "runs/here")
    assert (
        again.returncode == 2 and "error: runs/here holds a run" in again.stderr and len(again.stderr.splitlines()) == 1
    )


def test_sigkill_of_the_batch_file_ends_its_training(project, uninterrupted, tmp_path):
    """Only bash is killed: its script stops, what it saves comes back, the stage goes, and the run can be resumed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in OURS}
    environment.update({k: v for k, v in OURS.items() if v is not None}, TMPDIR=str(tmp_path), SYNC_MINUTES="10")
    command, run = (
        ["bash", "slurm/train_student.sbatch", *LONG, "--output", "runs/left alone"],
        project / "runs" / "left alone",
    )
    with open(tmp_path / "said", "w") as said:
        shell = subprocess.Popen(command, cwd=project, env=environment, stdout=said, stderr=said)
        until(lambda: "epoch 1/3:" in (tmp_path / "said").read_text(), "epoch 1")
        os.kill(shell.pid, signal.SIGKILL)
        assert shell.wait() == -signal.SIGKILL
    until(lambda: not running(f"{tmp_path}/kd-"), "the training ends", 30)
    until(lambda: not list(tmp_path.glob("kd-*")), "the stage goes", 30)
    assert "epoch 3/3" not in (tmp_path / "said").read_text()
    succeed("train_student.py", "--resume", run.relative_to(project), cwd=project)
    assert_same_run(run, uninterrupted)


def test_data_come_from_a_tar(slurm, project, submit, tmp_path):  # noqa: F811
    """Its single top folder becomes DATA_ROOT; files of other names beside the run and an old run's are treated as they
    should."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in ("a", "b"):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    with tarfile.open(tmp_path / "pictures.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "pictures", "top")
    run = project / "runs" / "tar"
    run.mkdir(parents=True)
    for name in ("best.pth", "epoch_7.pth", "notes.txt"):
        (run / name).write_text("old")
    flags = [
        "--dataset",
        "imagefolder",
        "--resolution",
        8,
        "--epochs",
        1,
        "--device",
        "cpu",
        "--val-split",
        0.25,
        "--output",
        "runs/tar",
    ]
    job = submit("train_student", *flags, "--overwrite", env={"STAGE_DATA": tmp_path / "pictures.tar.gz", "LOG_GPU": 1})
    slurm.wait(job)
    assert slurm.exit_code(job) == 0, slurm.log(job)
    assert "imagefolder: 18 train, 6 val, 8 test, 2 classes" in slurm.log(job)
    assert (run / "notes.txt").read_text() == "old" and not (run / "epoch_7.pth").exists()
    assert torch.load(run / "best.pth", weights_only=True)["classes"] == ["a", "b"]
    assert (run / "gpu.csv").exists() if shutil.which("nvidia-smi") else "LOG_GPU: no nvidia-smi here" in slurm.log(job)


# -------------------------------------------------------------------------------------------------------- interrupted


def start_long(slurm, submit, project, name, *flags, synced=False, **env):  # noqa: F811
    """Submit LONG and wait until it is in epoch 2 (synced: and epoch 1 is back in the user's folder); returns (job,
    run folder)."""
    job, run = submit("train_student", *LONG, *flags, "--output", f"runs/{name}", env=env), project / "runs" / name
    until(lambda: "\nepoch 1/" in slurm.log(job), "epoch 1")
    if synced:
        until(lambda: lines_in(run / "log.txt", "epoch 1/") and (run / "latest.pth").exists(), "epoch 1 is back")
    return job, run


ENDLESS = ["--epochs", "500"]  # of a run that is not compared: on a loaded machine LONG may end before it is stopped


def test_time_limit_requeues_and_resumes(slurm, project, submit, uninterrupted):  # noqa: F811
    """In mid-epoch, and in another job before its script runs: there --overwrite still replaces the old run, which is
    not
    taken for the job's own and resumed."""
    old = project / "runs" / "old"
    old.mkdir(parents=True)
    (old / "latest.pth").write_text("of another run")
    early = submit("train_student", *QUICK, "--output", "runs/old", "--overwrite")
    until(lambda: "\ndate: " in slurm.log(early), "started")
    slurm.run("scancel", "--batch", "--signal=USR1", early, check=True)
    until(lambda: slurm.jobs(early)[0]["Restarts"] == "1", "requeued")
    assert (old / "latest.pth").read_text() == "of another run" and "staged" not in slurm.log(early)

    job, run = start_long(slurm, submit, project, "limit")
    slurm.run("scancel", "--batch", "--signal=USR1", job, check=True)
    until(lambda: slurm.jobs(job)[0]["Restarts"] == "1", "requeued")
    epoch, step = re.search(r"interrupted by SIGUSR1 in epoch (\d) after step (\d+)", slurm.log(job)).groups()
    stopped = torch.load(run / "latest.pth", weights_only=True)
    assert (stopped["epoch"], stopped["step"]) == (int(epoch), int(step)) and 0 < int(step) <= 15
    slurm.wait(job, ["COMPLETED"], seconds=300)
    log = slurm.log(job)
    assert f"requeueing job {job}, 1 of at most 10" in log and "requeued 1 times" in log  # one log for both
    assert_same_run(run, uninterrupted)
    slurm.wait(early, ["COMPLETED"], seconds=90)
    assert torch.load(old / "latest.pth", weights_only=True)["epoch"] == 2 and (old / "results.json").exists()
    assert not hidden(run) and not hidden(old) and not hidden(project / "runs")


def test_too_many_requeues_fail(slurm, project, submit):  # noqa: F811
    job = submit("train_student", *LONG, "--output", "runs/early", env={"MAX_REQUEUES": 0})
    dependent = submit("report", "runs/early", options=[f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"])
    until(lambda: "\ndate: " in slurm.log(job), "started")
    slurm.run("scancel", "--batch", "--signal=USR1", job, check=True)  # before the script runs
    slurm.wait(job, ["FAILED"])
    assert slurm.exit_code(job) == 75
    assert "not finished after 0 requeues (MAX_REQUEUES=0)" in slurm.log(job)
    assert not (project / "runs" / "early").exists()
    assert slurm.wait(dependent)[0]["JobState"] == "CANCELLED"


def test_scancel_brings_the_results_back(slurm, project, submit):  # noqa: F811
    job, run = start_long(slurm, submit, project, "cancelled", *ENDLESS, SYNC_MINUTES=0.01)
    slurm.run("scancel", job, check=True)
    slurm.wait(job, ["CANCELLED"])
    until(lambda: "\nexit code: " in slurm.log(job), "the batch file's last line, when all is copied")
    assert not processes(slurm, job) and "interrupted by SIGTERM" in slurm.log(job)
    stopped = torch.load(run / "latest.pth", weights_only=True)
    assert f"in epoch {stopped['epoch']} after step {stopped['step']}" in slurm.log(job) and stopped["step"] > 0
    assert not hidden(run) and not hidden(project / "runs")


@pytest.mark.parametrize("what", ["script", "node"])
def test_sigkill_leaves_what_was_synced(slurm, project, submit, uninterrupted, what):  # noqa: F811
    flags = ENDLESS if what == "script" else []
    job, run = start_long(slurm, submit, project, f"killed_{what}", *flags, synced=True)
    until(
        lambda: len(processes(slurm, job)) == 1, "one process"
    )  # a child that was just forked bears the script's name
    (script,) = processes(slurm, job)
    if what == "node":  # the batch shell with all its children
        shell = int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{script}/status").read_text())[1])
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(shell)], capture_output=True, text=True
        ).stdout.split()
        for pid in (shell, *children):
            os.kill(int(pid), signal.SIGKILL)
    else:
        os.kill(script, signal.SIGKILL)
    slurm.wait(job, ["FAILED"])
    assert slurm.exit_code(job) == 137
    if what == "script":
        assert slurm.log(job).endswith("exit code: 137\n") and not hidden(project / "runs")
        assert torch.load(run / "latest.pth", weights_only=True)["epoch"] >= 2
        return
    succeed("train_student.py", "--resume", run.relative_to(project), cwd=project)
    assert_same_run(run, uninterrupted)


# A run folder of version 1 in both places, then newer ones in the stage
TWO_VERSIONS = """
. slurm/env.sh
STAGE=$1/stage WHERE=$1 OUT=run JOB=1 MARK= REPLACED=() version=2
write() { for name in metrics.json best.pth latest.pth; do echo "$1" > "$STAGE/work/run/$name"; done; }
show() { (cd "$WHERE/run" && paste -d ' ' metrics.json best.pth latest.pth); }
mkdir -p "$STAGE/work/run"
write 1
sync_back
write 2
"""
KILLED_BETWEEN = 'mv() { command mv "$@"; show; }'  # what is there after each rename
WRITES_MEANWHILE = 'cp() { write $((version++)); command cp "$@"; }'  # a newer version before each copy


@pytest.mark.parametrize("what, lines", [(KILLED_BETWEEN, 4), (WRITES_MEANWHILE, 1)])
def test_what_is_copied_back_fits_together_at_any_time(project, tmp_path, what, lines):
    """No checkpoint is newer than the metrics beside it, and latest.pth, from which a run resumes, not newer than
    best.pth."""
    command = ["bash", "-euc", f"{TWO_VERSIONS}\n{what}\nsync_back\nshow", "bash", tmp_path]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [[int(version) for version in line.split()] for line in done.stdout.splitlines()]
    assert len(seen) == lines and min(seen[-1]) >= 2, done.stdout
    assert all(metrics >= best >= latest for metrics, best, latest in seen), seen


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: root is needed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_tmpdir(slurm, project, submit, small_disk, tmp_path):  # noqa: F811
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "big").write_bytes(bytes(8 * 2**20))
    job = submit(
        "train_student",
        *QUICK,
        "--output",
        "runs/full",
        env={"TEST_TMPDIR": small_disk, "STAGE_DATA": tmp_path / "data"},
    )
    slurm.wait(job, ["FAILED"])
    assert slurm.exit_code(job) == 2
    assert re.search(
        rf"^error: \$TMPDIR \({small_disk}\) is full: (9|10) MB needed, 3 MB free$", slurm.log(job), re.M
    ), slurm.log(job)
    # a packed tar is larger than it looks: copying fails
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "data", "data")
    packed = {"TMPDIR": small_disk, "STAGE_DATA": tmp_path / "data.tar.gz"}
    done = here(project, "train_student.sbatch", *QUICK, "--output", "runs/full", env=packed)
    assert done.returncode == 2 and f"error: $TMPDIR ({small_disk}) is full" in done.stderr, done.stderr
    assert not list(small_disk.glob("kd-*")) and not (project / "runs" / "full").exists()


def test_results_that_cannot_be_copied_back_are_kept(project, small_disk, tmp_path):
    """The user's disk is full: the job fails, says where the results are, and does not remove them."""
    (project / "runs").mkdir(exist_ok=True)
    (project / "runs" / "linked").symlink_to(small_disk / "run")
    done = here(project, "train_student.sbatch", *QUICK, "--output", "runs/linked", env={"TMPDIR": tmp_path})
    assert done.returncode == 2, done.stdout
    kept = Path(re.search(r"they are in (.*) on ", done.stderr)[1])
    assert figures(kept) and not list(small_disk.rglob("*.pth")) and not hidden(small_disk)
    (project / "runs" / "linked").unlink()


@pytest.mark.parametrize(
    "env, said",
    [
        ({"PYTHON": None, "VENV": "nowhere/venv"}, "error: VENV: nowhere/venv/bin/python is missing"),
        ({"PYTHON": "nowhere/python"}, "error: PYTHON: nowhere/python is missing"),
        ({"DATA_ROOT": "nowhere/data"}, "error: DATA_ROOT: nowhere/data is missing"),
        ({"STAGE_DATA": "nowhere.tar"}, "error: STAGE_DATA: nowhere.tar is missing"),
    ],
)
def test_missing_places(project, tmp_path, env, said):
    (tmp_path / "grid.json").write_text('{"seed": [0, 1]}')
    for command in (
        ["train_student.sbatch", *QUICK],
        ["sweep.sh", "train_student.py", tmp_path / "grid.json"],
        ["lab.sh"],
    ):
        done = here(project, *command, env=env)
        assert done.returncode == 2 and done.stderr.startswith(said) and len(done.stderr.splitlines()) == 1, done.stderr
    assert "exit code: 2" in here(project, "train_student.sbatch", env=env).stdout


def test_submitted_from_elsewhere(slurm, project, tmp_path):  # noqa: F811
    job = slurm.sbatch(project / "slurm" / "train_student.sbatch", cwd=tmp_path, env=OURS)
    slurm.wait(job, ["FAILED"])
    assert slurm.exit_code(job) == 2 and "error: no slurm/env.sh in" in slurm.log(job)


# ------------------------------------------------------------------------------------------------------------- arrays


def test_array_of_seeds(slurm, project, submit):  # noqa: F811
    job = submit("train_student", *QUICK, "--output", "runs/seeds", options=["--array=0-1"])
    slurm.wait(job)
    assert slurm.exit_code(job) == 0, slurm.log(job)
    runs = [project / "runs" / f"seeds_{seed}" for seed in (0, 1)]
    assert [json.loads((run / "results.json").read_text())["flags"]["seed"] for run in runs] == [0, 1]
    first, second = (torch.load(run / "best.pth", weights_only=True)["model"] for run in runs)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_array_of_shards(slurm, project, submit):  # noqa: F811
    """Three jobs extract a third each; merged they are what one process extracts."""
    flags = ["--model", "resnet8", "--num-views", 2, "--device", "cpu", "--output"]
    job = submit("extract_embeddings", *flags, "stored", options=["--array=0-2"])
    slurm.wait(job)
    assert slurm.exit_code(job) == 0, slurm.log(job)
    for more in (["stored", "--merge", 3], ["whole"]):
        succeed("extract_embeddings.py", *flags, *more, cwd=project)
    for split in ("train", "val", "test"):
        merged, whole = (
            np.load(project / name / f"{split}_embeddings" / "embeddings.npy") for name in ("stored", "whole")
        )
        assert merged.shape[1:] == (2, 512) and np.array_equal(merged, whole)


def test_sweep(slurm, project, submit):  # noqa: F811
    """Each point in its folder; the one that fails is named with the command that runs it again; the best is found."""
    (project / "grid.json").write_text(
        json.dumps([{"name": "good", "lr": 0.02}, {"name": "still", "lr": 1e-9}, {"name": "broken", "lr": 1e30}])
    )
    flags = ["--max-running", "2", "--comment=sweep", "train_student.py", "grid.json", *QUICK, "--output", "runs/sweep"]
    done = slurm.run("bash", "slurm/sweep.sh", *flags, cwd=project, env=OURS)
    assert done.returncode == 0, done.stderr
    assert "0\tgood\truns/sweep/good\n" in done.stdout
    assert json.loads((project / "runs" / "sweep" / "still.json").read_text())["lr"] == 1e-9
    job = re.search(r"Submitted batch job (\d+)", done.stdout)[1]
    first = slurm.jobs(job)[0]
    assert first["Comment"] == "sweep" and "ArrayTaskThrottle" in first and first["ArrayTaskThrottle"] == "2"
    slurm.wait(job, seconds=90)
    states = [j["JobState"] for j in slurm.jobs(job)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"], slurm.log(job)
    said = slurm.log(job)
    assert "failed: array index 2, broken; again, alone:" in said
    again = re.search(r"^  sbatch (--array=2 .*)$", said, re.M)[1].split()
    assert again[1] == "slurm/train_student.sbatch" and again[-1] == "--overwrite"
    report = succeed("report.py", "runs/sweep", "--select", "val_loss", "--mode", "min", cwd=project)
    assert re.search("^best val_loss: .*, runs/sweep/good$", report.stdout, re.M), report.stdout


def test_sweep_without_slurm(project):
    grid, flags = project / "local.json", ["train_student.py", "local.json", *QUICK, "--output", "runs/local"]
    grid.write_text('[{"name": "bad", "lr": 1e30}, {"name": "fine", "lr": 0.02}]')
    dry = here(project, "sweep.sh", "--dry-run", *flags)
    assert dry.returncode == 0 and dry.stdout == "0\tbad\truns/local/bad\n1\tfine\truns/local/fine\n", dry.stderr
    assert sorted(f.name for f in (project / "runs" / "local").iterdir()) == ["bad.json", "fine.json"]
    done = here(project, "sweep.sh", "--local", *flags)
    assert done.returncode == 1 and (project / "runs" / "local" / "fine" / "results.json").exists(), (
        done.stdout + done.stderr
    )
    again = re.search(
        r"failed: point 0 bad; again, alone:\n  slurm/sweep.sh (--local --points 0 .* --overwrite)\n", done.stderr
    )
    assert again and done.stderr.count("failed: point") == 1, done.stderr
    grid.write_text('[{"name": "bad", "lr": 0.02}, {"name": "fine", "lr": 0.02}]')
    assert here(project, "sweep.sh", *again[1].split()).returncode == 0
    assert figures(project / "runs" / "local" / "bad") == figures(project / "runs" / "local" / "fine")


def test_bad_sweeps_are_refused_before_the_queue(slurm, project):  # noqa: F811
    (project / "bad.json").write_text('{"lr": [0.1, -1]}')
    done = slurm.run("bash", "slurm/sweep.sh", "train_student", "bad.json", *QUICK, cwd=project, env=OURS)
    assert done.returncode == 2 and "argument --lr" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not done.stdout and not slurm.run("squeue", "-h").stdout


# ---------------------------------------------------------------------------------------------------------------- lab


def test_lab_submits_what_it_needs(slurm, project):  # noqa: F811
    """Six runs and a report, each after what it needs; a job that fails takes those that need it along, but not the
    report."""
    lab = [
        "bash",
        "slurm/lab.sh",
        "--comment=lab",
        "--runs",
        "runs/lab",
        "--dataset",
        "imagefolder",
        "--data-root",
        "common",
    ]
    done = slurm.run(*lab, "--lr", "-1", cwd=project, env=OURS)
    assert (
        done.returncode == 2
        and "argument --lr" in done.stderr
        and len(done.stderr.splitlines()) == 1
        and not done.stdout
    )
    done = slurm.run(*lab, "--epochs", "1", cwd=project, env=OURS)  # there are no pictures in common
    assert done.returncode == 0, done.stderr
    ids = dict(re.findall(r"^(\w+): job (\d+)", done.stdout, re.M))
    assert list(ids) == [
        "cnn_teacher",
        "vit_teacher",
        "cnn_student",
        "vit_student",
        "cnn_distill",
        "vit_distill",
        "report",
    ]
    jobs = {name: slurm.jobs(job)[0] for name, job in ids.items()}
    after = {
        name: set(re.findall(rf"after{'any' if name == 'report' else 'ok'}:(\d+)", job["Dependency"]))
        for name, job in jobs.items()
    }
    assert after == {
        **dict.fromkeys(ids, set()),
        "cnn_distill": {ids["cnn_teacher"]},
        "vit_distill": {ids["vit_teacher"]},
        "report": {job for name, job in ids.items() if name != "report"},
    }
    assert jobs["vit_distill"]["Comment"] == "lab" and jobs["vit_distill"]["JobName"] == "vit_distill"
    command = slurm.run("scontrol", "write", "batch_script", ids["vit_distill"], "-", check=True).stdout
    assert "run_stage distill.py" in command
    for name, job in ids.items():
        state = slurm.wait(job)[0]["JobState"]
        assert state == ("CANCELLED" if name in ("cnn_distill", "vit_distill") else "FAILED"), name
    assert "error: " in slurm.log(ids["report"])  # there is nothing to report on


def test_lab_runs_what_is_not_finished(tmp_path):
    """The batch files are stand-ins: a failed run keeps back those that need it alone, and the same command then runs
    these."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("site.sh"))
    for file in (tmp_path / "slurm").glob("*.sbatch"):
        file.write_text('[ "${!#}" != "$FAILS" ] || exit 1\nmkdir -p "${!#}"\necho "{}" > "${!#}/results.json"\n')

    def lab(*flags, fails="none"):
        done = here(
            tmp_path,
            "lab.sh",
            *flags,
            "--runs",
            "my runs",
            "--dataset",
            "digits",
            env={"PYTHON": shutil.which("true"), "FAILS": fails},
        )
        return done, re.findall(r"^--- (\w+)$", done.stdout, re.M)

    done, started = lab("--local", fails="my runs/cnn_teacher")
    assert (
        done.returncode == 1
        and done.stderr == "error: failed, or not started after one that did: cnn_teacher cnn_distill\n"
    )
    assert started == ["cnn_teacher", "vit_teacher", "cnn_student", "vit_student", "vit_distill", "report"]
    dry, _ = lab("--dry-run")
    assert re.findall(r"(?:--output|# after) (.*)$", dry.stdout, re.M) == [
        "my\\ runs/cnn_teacher",
        "my\\ runs/cnn_distill   # after cnn_teacher",
        "my\\ runs/report   # after cnn_teacher cnn_distill",
    ]
    done, started = lab("--local")
    assert done.returncode == 0 and started == ["cnn_teacher", "cnn_distill", "report"], done.stderr
    assert done.stdout.count(": finished, in my runs/") == 4
    assert lab("--local")[1] == ["report"]
    done = here(
        tmp_path,
        "lab.sh",
        "--local",
        "--runs",
        "my runs",
        "--dataset",
        "digits",
        "--overwrite",
        env={"PYTHON": shutil.which("true")},
    )
    assert done.stdout.count("--- ") == 7


def test_lab_without_slurm(project):
    flags = [
        *SMALL,
        "--limit-train",
        "640",
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--lr",
        "0.0005",
    ]  # both teachers learn
    done = here(project, "lab.sh", "--local", "--runs", "runs/all", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((project / "runs" / "all" / "report" / "report.json").read_text())
    assert len(report["runs"]) == 6 and not report["missing"]
    assert {group["family"] for group in report["groups"]} == {"cnn", "vit"}
    assert all(
        group[f"student_accuracy_{kind}_kd"]["mean"] for group in report["groups"] for kind in ("with", "without")
    )


# ----------------------------------------------------------------------------------- several GPUs, several nodes


def test_a_process_for_each_gpu(slurm, project):  # noqa: F811
    """submit_best_gpu.sh --gpus 2 trains with two processes."""
    done = slurm.run(
        "bash",
        "slurm/submit_best_gpu.sh",
        "--parsable",
        "--gpus",
        "2",
        "slurm/train_student.sbatch",
        *QUICK,
        "--output",
        "runs/gpus",
        cwd=project,
        env=OURS,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    slurm.wait(job)
    assert slurm.exit_code(job) == 0, slurm.log(job)
    assert json.loads((project / "runs" / "gpus" / "results.json").read_text())["processes"] == 2


def test_two_nodes(slurm, project, submit):  # noqa: F811
    """Each has a stage of its own; a signal reaches all processes; rank 0's results come back; the requeued job goes
    on."""
    run = project / "runs" / "two"
    two = ["--nodes=2", "--ntasks-per-node=1", "-C", "a100"]
    job = submit("train_student", *LONG, "--output", "runs/two", options=two)
    until(lambda: "\nepoch 1/3:" in slurm.log(job) and len(processes(slurm, job)) == 2, "epoch 1")
    stages = {Path(f"/proc/{pid}/cwd").resolve().parent for pid in processes(slurm, job)}
    assert {stage.parent.name for stage in stages} == {f"a1.{job}", f"a2.{job}"}
    slurm.run("scancel", "--batch", "--signal=USR1", job, check=True)
    until(lambda: slurm.jobs(job)[0]["Restarts"] == "1", "requeued")
    assert not processes(slurm, job) and not any(stage.exists() for stage in stages)
    epoch, step = re.search(r"interrupted by SIGUSR1 in epoch (\d) after step (\d+)", slurm.log(job)).groups()
    stopped = torch.load(run / "latest.pth", weights_only=True)
    assert (stopped["epoch"], stopped["step"]) == (int(epoch), int(step))
    slurm.wait(job, ["COMPLETED"], seconds=300)
    assert len(json.loads((run / "metrics.json").read_text())) == 3 and lines_in(run / "log.txt", "epoch 1/3:") == 1
    assert figures(run)["test"]["accuracy"] > 0.4
