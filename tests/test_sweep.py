"""--sweep: the points of a grid, their names and flags, and what a grid cannot say; --seeds: a run for each."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import SMALL, run_script, succeed

import train_student
from common import cli, run, sweep


@pytest.fixture
def parser():
    return train_student.build_parser()


@pytest.fixture
def flags(parser, tmp_path):
    """flags(grid, index, *argv) -> Namespace"""

    def parse(grid, index, *argv):
        path = tmp_path / "grid.json"
        path.write_text(grid if isinstance(grid, str) else json.dumps(grid))
        return cli.parse_flags(parser, [*argv, "--sweep", str(path), "--sweep-index", str(index)])

    return parse


def test_a_grid_is_crossed_the_last_axis_varying_fastest(flags):
    grid = {"lr": [0.1, 1e-4], "batch-size": [8, 16], "nesterov": [True, False]}
    seen = [flags(grid, i, "--seed", "4") for i in range(8)]
    expected = [(lr, b, n) for lr in (0.1, 1e-4) for b in (8, 16) for n in (True, False)]
    assert [(a.lr, a.batch_size, a.nesterov) for a in seen] == expected
    assert all(a.seed == 4 and a.epochs is None for a in seen)
    assert len({a.output for a in seen}) == 8
    assert seen[0].output == "runs/student/lr-0.1_batch-size-8_nesterov-true"
    assert seen[7].output == "runs/student/lr-0.0001_batch-size-16_nesterov-false"


def test_a_list_of_named_points(flags):
    grid = [{"name": "large", "lr": 0.1, "milestones": [1, 2], "schedule": "multistep"}, {"batch_size": 8}]
    first, second = flags(grid, 0, "--output=runs/x"), flags(grid, 1)
    assert first.output == "runs/x/large" and first.milestones == [1, 2] and first.lr == 0.1
    assert second.output == "runs/student/batch_size-8" and second.batch_size == 8 and second.lr is None


def test_a_point_has_flags_for_each_script(flags, parser):
    grid = [
        {
            "name": "a",
            "epochs": 3,
            "train_student.py": {"lr": 0.1},
            "train_teacher.py": {"lr": 0.2, "model": "resnet18"},
        }
    ]
    parser.prog = "train_student.py"
    args = flags(grid, 0)
    assert (args.output, args.epochs, args.lr, args.model) == ("runs/student/a", 3, 0.1, None)


def test_the_grid_of_medpix_swaps_the_backbones_of_teacher_and_student():
    from pathlib import Path

    grid = str(Path(run.SCRIPT_FOLDER, "slurm/grids/medpix_swaps.json"))
    teachers, students, alone = (
        dict(sweep.grid_points(grid, script)) for script in ("train_teacher.py", "distill.py", "train_student.py")
    )
    assert list(teachers) == ["original", "swap_image", "swap_text", "swap_both"] and students == alone
    first, second = teachers["original"], students["original"]
    for name, side in (("swap_image", "image-model"), ("swap_text", "text-model")):
        assert teachers[name] == {**first, side: second[side]} and students[name] == {**second, side: first[side]}
    assert (teachers["swap_both"], students["swap_both"]) == (second, first)


def test_the_name_stands_in_any_value(flags):
    """A sweep of students follows a sweep of teachers."""
    grid = [{"name": "a", "lr": 0.1, "weights": "w/{name}.pth"}]
    args = flags(grid, 0, "--init-checkpoint", "runs/teacher/{name}/best.pth", "--output", "runs/{name}")
    assert (args.init_checkpoint, args.weights, args.output) == ("runs/teacher/a/best.pth", "w/a.pth", "runs/a/a")


def test_names_fit_for_folders(flags):
    args = flags({"model": ["timm:resnet18", "hf:some/folder"], "crop-scale": [[0.5, 1.0]]}, 1)
    assert args.output == "runs/student/model-hf-some-folder_crop-scale-0.5-1.0"


def test_the_command_line_s_config_stays_below_the_point(flags, tmp_path):
    (tmp_path / "base.json").write_text('{"lr": 0.5, "momentum": 0.8}')
    args = flags({"lr": [0.1]}, 0, "--config", str(tmp_path / "base.json"))
    assert args.lr == 0.1 and args.momentum == 0.8


@pytest.mark.parametrize(
    "grid, index, argv, words",
    [
        ({"lr": [0.1, 0.2]}, 2, [], "2 points, 0 to 1"),
        ({"lrr": [0.1]}, 0, [], "did you mean --lr"),
        ({"lr": []}, 0, [], "'lr' must be a list"),
        ({"lr": 0.1}, 0, [], "'lr' must be a list"),
        ({}, 0, [], "is not a grid"),
        ([], 0, [], "is not a grid"),
        ([3], 0, [], "is not a grid"),
        ([{"name": "a", "train_student.py": 3}], 0, [], "object of flags"),
        ("{", 0, [], "not valid JSON"),
        ([{"name": "a", "lr": 1}, {"name": "a", "lr": 2}], 0, [], "the name 'a'"),
        ({"lr": [1]}, 0, ["--lr=2"], "--lr is given"),
        ({"output": ["x"]}, 0, [], "must not set output"),
        ({"lr": [1]}, 0, ["--resume", "runs/student"], "cannot be combined"),
    ],
)
def test_bad_grids(flags, grid, index, argv, words):
    with pytest.raises(run.UserError, match=words):
        flags(grid, index, *argv)


def test_a_bad_value_is_argparse_s(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        flags({"lr": ["fast"]}, 0)
    assert stop.value.code == 2 and "fast" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--sweep", "g.json"], ["--sweep-index", "0"]])
def test_grid_and_index_belong_together(parser, argv):
    with pytest.raises(run.UserError, match="belong together"):
        cli.parse_flags(parser, argv)


def test_a_point_is_run_and_its_config_repeats_it(tmp_path):
    (tmp_path / "grid.json").write_text('{"lr": [0.03, 0.01]}')
    succeed("train_student.py", *SMALL, "--epochs", 1, "--sweep", "grid.json", "--sweep-index", 1, cwd=tmp_path)
    folder = tmp_path / "runs/student/lr-0.01"
    results = json.loads((folder / "results.json").read_text())
    assert results["flags"]["lr"] == 0.01
    succeed("train_student.py", "--config", folder / "config.json", "--output", "again", cwd=tmp_path)
    assert json.loads((tmp_path / "again/results.json").read_text())["test"] == results["test"]
    done = run_script("train_student.py", "--sweep", "grid.json", "--sweep-index", 2, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_seeds_are_ordinary_runs(here):
    """Of several seeds in one process, each leaves what a run of that seed alone leaves, and tells how to repeat it."""
    flags = [*SMALL, "--limit-train", 64, "--epochs", 1]
    assert here("train_student.py", *flags, "--seeds", 3, 1, "--output", "both")[0] == 0
    assert here("train_student.py", *flags, "--seed", 1, "--output", "one")[0] == 0
    weights = [torch.load(f"{folder}/best.pth", weights_only=True)["model"] for folder in ("both_3", "both_1", "one")]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[2].items())
    assert not all(torch.equal(weights[0][name], value) for name, value in weights[2].items())
    told = json.loads(Path("both_1/results.json").read_text())
    assert told["flags"]["seed"] == 1 and told["flags"]["seeds"] is None
    assert (
        told["environment"]["command"].endswith("--seed 1 --output both_1")
        and "--seeds" not in told["environment"]["command"]
    )


def test_seeds_go_to_folders_beside_each_other(parser):
    argv = ["--seeds", "0", "7", "--lr", "0.1", "--output=x/y/", "--nesterov"]
    assert sweep.expand_seeds(parser, argv) == [
        ["--lr", "0.1", "--nesterov", "--seed", s, "--output", f"x/y_{s}"] for s in ("0", "7")
    ]
    assert sweep.expand_seeds(parser, ["--lr", "0.1"]) == [["--lr", "0.1"]]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--seeds", 0, 1, "--seed", 2], ["--seed ", "--seeds"]),
        (["--seeds", 0, 1, "--resume", "run"], ["--resume", "--seeds"]),
        (["--seeds", 0, 1, 0], ["--seeds 0 1 0", "twice"]),
        (["--seeds", 0, "x"], ["--seeds", "'x'"]),
        (["--seeds", 0, 1, "--lr", -1], ["--lr"]),  # before the first run
    ],
)
def test_bad_seeds(refused, argv, words):
    refused("train_student.py", *SMALL, *argv, words=words)
    assert not os.listdir()


def test_which_seeds_are_left_is_said(refused, monkeypatch):
    refused("train_student.py", *SMALL, "--limit-train", 10**6, "--seeds", 0, 1, words=["(not run: --seeds 0 1)"])
    monkeypatch.setattr(run.stops, "seeds", [0, 1, 2])
    monkeypatch.setattr(run.stops, "hint", ": python train_student.py --resume runs/student_0 continues")
    assert run.stops.seeds_left() == " (not run: --seeds 1 2)"
    monkeypatch.setattr(run.stops, "seeds", [2])
    assert run.stops.seeds_left() == ""
