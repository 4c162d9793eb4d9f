"""slurm/resolve.py: what a job runs, writes and copies, and what it refuses before anything is copied."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, succeed

spec = importlib.util.spec_from_file_location("resolve", ROOT / "slurm" / "resolve.py")
resolve = importlib.util.module_from_spec(spec)
first = sys.path[0]
spec.loader.exec_module(resolve)
sys.path[0] = first
UserError = resolve.cli.UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder: an empty one."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in list(os.environ):
        if name.startswith(("SLURM", "HF_", "HUGGINGFACE", "TRANSFORMERS", "REQUIRE_HF")):
            monkeypatch.delenv(name)
    return folder


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def job(script, *argv):
    """Records of a job as {kind: [values]}."""
    kinds = {}
    for record in resolve.job(script, list(map(str, argv))):
        kinds.setdefault(record[0], []).append(record[2:])
    return kinds


def refused(*argv):
    with pytest.raises(UserError) as error:
        job(*argv)
    return str(error.value)


def test_records_of_a_plain_job():
    found = job("train_student.py", "--lr", 0.1, "--nesterov")
    assert found == {"O": ["runs/student"], "R": [""], "A": ["--lr", "0.1", "--nesterov", "--output", "runs/student"]}
    assert job("train_student.py", "--output=runs/x/", "--overwrite")["O"] == ["runs/x"]
    assert "best.pth" not in job("train_student.py")["A"]
    assert "*.pth" in job("train_student.py", "--overwrite")["W"]
    assert job("evaluate", "x.pth")["A"] == ["x.pth", "--output", "runs/evaluate"] and "R" not in job(
        "evaluate", "x.pth"
    )


def test_a_report_goes_without_runs_that_failed(folder, capsys):
    touch(folder / "runs" / "a" / "config.json")
    found = job("report.py", "runs/a", "runs/b", "--output", "runs/report")
    assert found["A"] == ["runs/a", "--output", "runs/report"] and found["L"] == ["runs/a"]
    assert capsys.readouterr().err == "note: the report goes without what is missing: runs/b\n"
    assert job("report.py", "runs/b")["A"] == ["runs/b", "--output", "report"]  # none is there: the script says so


def test_a_job_is_one_run(folder):
    assert "--seeds in a job" in refused("train_student.py", "--seeds", 0, 1)


def test_existing_relative_paths_are_staged(folder):
    touch(folder / "w" / "a.pth")
    touch(folder / "flags.json", '{"init_checkpoint": "w/b.pth", "lr": 0.5}')
    touch(folder / "w" / "b.pth")
    absolute = touch(folder / "c.pth")
    touch(folder / "digits")  # a choice, no path
    touch(folder / "runs" / "x" / "notes.txt")
    found = job(
        "train_student.py",
        "--weights",
        "./w/a.pth",
        "--config",
        "flags.json",
        "--output",
        "runs/x",
        "--dataset",
        "digits",
    )
    assert sorted(found["S"]) == ["flags.json", "w/a.pth", "w/b.pth"]
    assert "S" not in job("train_student.py", "--weights", absolute)
    assert "S" not in job("train_student.py", "--weights", "missing.pth")
    touch(folder / "model" / "config.json")
    assert job("train_student.py", "--model", "hf:model")["S"] == ["model"]


def test_paths_outside_the_folder_become_absolute(folder):
    outside = touch(folder.parent / "far" / "best.pth")
    found = job("train_student.py", "--weights=../far/best.pth", "--output", "../far/run")
    assert found["A"] == [f"--weights={outside}", "--output", str(folder.parent / "far" / "run")] and "S" not in found
    touch(folder / "flags.json", '{"weights": "../far/best.pth"}')
    assert job("train_student.py", "--config", "flags.json")["A"][2:4] == ["--weights", str(outside)]
    assert job("train_student.py", "--save-samples", "grid.png")["A"][:2] == [
        "--save-samples",
        str(folder / "grid.png"),
    ]


def test_distill_takes_its_default_teacher_along(folder, tmp_path):
    assert "S" not in job("distill.py")
    flags = [*SMALL, "--model", "resnet8", "--epochs", 1, "--data-root", "pictures"]
    succeed("train_teacher.py", *flags, "--output", folder / "runs" / "teacher")
    assert job("distill.py")["S"] == ["runs/teacher/best.pth"]
    assert "S" not in job("distill.py", "--teacher-model", "resnet18", "--teacher-weights", "/w.pth")
    # the data folder that the script takes from the checkpoint is absolute there: it is read where it lies
    touch(folder / "pictures" / "a.png")
    assert job("distill.py")["S"] == job("evaluate.py", "runs/teacher/best.pth")["S"] == ["runs/teacher/best.pth"]
    assert job("distill.py", "--data-root", tmp_path)["S"] == ["runs/teacher/best.pth"]
    # a report reads no checkpoint, unless it evaluates them again
    assert job("report.py", "runs")["L"] == ["runs"] and job("report.py", "runs", "--reevaluate")["S"] == ["runs"]
    assert job("report.py", "runs", "runs/teacher")["L"] == ["runs"]
    # the run itself is resumed with all that it has
    found = job("train_teacher.py", "--resume", "runs/teacher", "--epochs", 2)
    assert found["S"] == ["runs/teacher"] and found["O"] == ["runs/teacher"]
    assert found["A"] == ["--epochs", "2", "--resume", "runs/teacher"]
    assert "holds a run" in refused("train_teacher.py")
    assert "holds a run" in refused("evaluate.py", "runs/teacher/best.pth", "--output", "runs/teacher")


def test_array_index(folder, monkeypatch):
    touch(folder / "grid.json", '{"lr": [0.1, 0.2], "model": ["resnet8", "resnet18"]}')
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    found = job("train_student.py", "--output=runs/s", "--epochs", 3)
    assert found["A"] == ["--epochs", "3", "--seed", "2", "--output", "runs/s_2"] and found["O"] == ["runs/s_2"]
    assert job("train_student.py")["O"] == ["runs/student_2"]
    found = job("train_student.py", "--sweep", "grid.json", "--output", "runs/s")
    assert (
        found["A"] == ["--lr", "0.2", "--model", "resnet8", "--output", "runs/s/lr-0.2_model-resnet8"]
        and "S" not in found
    )
    assert "--seed in an array job" in refused("train_student.py", "--seed", 1)
    assert "--resume in an array job" in refused("train_student.py", "--resume", "runs/s")
    assert "an array of report.py" in refused("report.py", "runs")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert "past the grid" in refused("train_student.py", "--sweep", "grid.json")


def test_a_requeued_job_goes_on_with_its_own_run_only(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    succeed("train_student.py", *SMALL, "--epochs", 1, "--output", "runs/x", cwd=folder)
    flags = [*SMALL, "--epochs", 1, "--output", "runs/x"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "holds a run" in refused("train_student.py", *flags)  # of somebody else
    again = job("train_student.py", *flags, "--overwrite")
    assert "--resume" not in again["A"] and "W" in again
    mark = touch(folder / "runs" / "x" / ".slurm_job", "7\n")
    for extra in ([], ["--overwrite"]):
        found = job("train_student.py", *flags, *extra)
        assert (
            found["A"] == ["--device", "cpu", "--epochs", "1", "--resume", "runs/x"]
            and found["S"] == ["runs/x"]
            and "W" not in found
        )
    mark.write_text("8\n")
    assert "holds a run" in refused("train_student.py", *flags)
    mark.write_text("7\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert "holds a run" in refused("train_student.py", *flags)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (folder / "runs" / "x" / "latest.pth").unlink()  # interrupted before its first checkpoint
    assert "--overwrite" in job("train_student.py", *flags)["A"]


def test_bad_input(folder):
    assert "no script" in refused("train_nothing.py")
    assert "--data-root nowhere is missing" in refused(
        "train_student.py", "--dataset", "imagefolder", "--data-root", "nowhere"
    )
    assert "--output . is the folder" in refused("train_student.py", "--output", ".")
    for argv, said in ((["--learning-rate", "1"], "unrecognized arguments"), (["--resume", "no"], "no/config.json")):
        command = [sys.executable, str(ROOT / "slurm" / "resolve.py"), "train_student.py", *argv]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith("error: ") and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_hub_weights_need_a_token_or_a_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asks = [
        ("train_student.py", "--model", "timm:resnet18", "--pretrained"),
        ("distill.py", "--teacher-model", "vit_tiny_patch16_224", "--teacher-pretrained"),
        ("train_student.py", "--model", "hf:some/model"),
    ]
    for argv in asks:
        assert "HF_TOKEN" in refused(*argv) and argv[2] in refused(*argv)
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "REQUIRE_HF_TOKEN"):
            monkeypatch.setenv(name, {"HF_HUB_OFFLINE": "1", "REQUIRE_HF_TOKEN": "0"}.get(name, "secret"))
            assert "secret" not in str(job(*argv))
            monkeypatch.delenv(name)
    touch(folder / "local" / "config.json")
    for argv in (["timm:resnet18"], ["hf:local"], ["no_such", "--pretrained"]):
        job("train_student.py", "--model", *argv)
    cached = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    touch(cached / "refs" / "main", "abc")
    touch(cached / "snapshots" / "abc" / "config.json")
    assert "timm:resnet18" in refused(*asks[0])  # without the weights
    touch(cached / "snapshots" / "abc" / "model.safetensors")
    job(*asks[0])


def test_points_of_a_sweep(folder, capsys):
    touch(
        folder / "grid.json",
        '[{"name": "a", "lr": 0.1}, {"name": "b", "lr": 0.2, "milestones": [1, 2], "schedule": "multistep"}]',
    )
    touch(folder / "base.json", '{"flags": {"momentum": 0.5, "seed": 4, "output": "no"}}')
    argv = ["train_student.py", "grid.json", "--config", "base.json", "--seed", "5", "--output", "runs/s"]
    resolve.main(["--points", *argv])
    assert capsys.readouterr().out == "0\ta\truns/s/a\n1\tb\truns/s/b\n" and not (folder / "runs").exists()
    resolve.main(["--points", "--write", "--only", "1", *argv])
    assert capsys.readouterr().out == "1\tb\truns/s/b\n"
    assert os.listdir(folder / "runs" / "s") == ["b.json"]
    written = json.loads((folder / "runs" / "s" / "b.json").read_text())
    assert written == {"momentum": 0.5, "seed": 5, "lr": 0.2, "milestones": [1, 2], "schedule": "multistep"}
    parser = resolve.load_script("train_student").build_parser()
    flags, point = (
        vars(resolve.cli.parse_flags(parser, argv))
        for argv in (
            ["--config", "runs/s/b.json"],
            ["--config", "base.json", "--seed", "5", "--sweep", "grid.json", "--sweep-index", "1"],
        )
    )
    assert {**flags, "config": None, "output": None} == {**point, "config": None, "output": None}
    for only in ("2", "0-5", "x", ""):
        with pytest.raises(UserError, match="--points"):
            resolve.main(["--points", "--only", only, *argv])
    touch(folder / "runs" / "s" / "a" / "best.pth", "x")
    with pytest.raises(UserError, match="runs/s/a holds a run"):
        resolve.main(["--points", *argv])
    resolve.main(["--points", "--only", "1", *argv])  # the others are not asked for
    for grid, said in (
        ('{"lr": []}', "axis 'lr'"),
        ('{"learning-rate": [1]}', "unknown key"),
        ('{"output": ["x"]}', "must not set"),
    ):
        (folder / "grid.json").write_text(grid)
        with pytest.raises(UserError, match=said):
            resolve.main(["--points", *argv])


def test_shards(monkeypatch, folder):
    """An array of extract_embeddings.py; its store is never copied, for other shards write beside it."""
    model = ["--model", "resnet8"]
    for name, value in {"TASK_ID": "2", "TASK_MIN": "0", "TASK_MAX": "3", "TASK_COUNT": "4"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    touch(folder / "embeddings" / "train_embeddings" / "meta.json.part")
    kinds = job("extract_embeddings.py", *model)
    assert kinds["A"][-4:] == ["--shard", "2/4", "--output", str(folder / "embeddings")]
    assert kinds["O"] == [str(folder / "embeddings")] and "R" in kinds and "S" not in kinds
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued: what is done stays
    assert "--overwrite" not in job("extract_embeddings.py", *model, "--overwrite")["A"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "2")
    for argv, words in (([], "--shard {index}/N"), (["--shard", "1/2"], "array index is the shard")):
        with pytest.raises(UserError, match=words):
            job("extract_embeddings.py", *model, *argv)
    assert "2/4" in job("extract_embeddings.py", *model, "--shard", "{index}/4")["A"]


def test_a_prediction_is_no_job(folder):
    """Its file would stay in the job's own folder."""
    touch(folder / "a.png")
    assert "--predict in a job" in refused("evaluate", "x.pth", "--predict", "a.png")
    assert job("evaluate", "x.pth")["O"] == ["runs/evaluate"]
