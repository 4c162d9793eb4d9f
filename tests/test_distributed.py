"""Two processes take the steps of one, judge every image once, stop together and leave one run."""

import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, restored, script_environment, succeed
from test_resume import lines_in, locker, same

FEATURE = ["--method", "feature", "--student-layer", "layer2", "--teacher-layer", "layer3"]


def start(size, script, *args, cwd=None):
    """`size` processes of a script as torchrun starts them, but without it: each with its own exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        own = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / script), *map(str, args)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=cwd,
                env={**script_environment(), **{k: str(v) for k, v in own.items()}},
            )
        )
    return processes


def ends(processes, seconds=600):
    """(exit codes, stdout and stderr of all) of processes that end by themselves."""
    outputs = [process.communicate(timeout=seconds) for process in processes]
    return [process.returncode for process in processes], "".join(o for o, _ in outputs), "".join(e for _, e in outputs)


def two(script, *args, **options):
    codes, out, errors = ends(start(2, script, *args, **options))
    assert codes == [0, 0], (codes, out, errors)
    return out


def weights(folder, name="latest.pth"):
    return torch.load(folder / name, weights_only=True)["model"]


# ------------------------------------------------------------------------------------------------------ equal training


SETTINGS = [
    (accumulate, weighted, mixed) for accumulate in (1, 2) for weighted in (False, True) for mixed in (False, True)
]


def train_6_steps(accumulate, weighted, mixed):
    """A ResNet-8 with frozen BatchNorm, taught through a projector, in float64: 6 steps, of which 4 are an epoch."""
    from common.augment import Augmenter, Policy
    from common.data import DATASETS, TASK, load_splits
    from common.loader import Loader
    from common.losses import DistillationLoss
    from common.models import build_model
    from common.training import (
        Precision,
        Schedule,
        Updater,
        class_weights,
        make_optimizer,
        select_device,
        task_cross_entropy,
    )
    from distill import Student

    device = select_device("cpu")
    splits = load_splits("digits")
    loader = Loader(splits.train.subset(np.arange(100)), 24, device, True, 5, accumulate=accumulate)
    augment = Augmenter(Policy("pad", mixup=1.0, cutmix=1.0) if mixed else DATASETS["digits"].policy, 5)
    torch.manual_seed(0)
    teacher, model = (build_model("resnet8", 10, 8).double().eval() for _ in range(2))  # eval: BatchNorm is frozen
    teacher.set_feature_layers(["layer3"])
    model.set_feature_layers(["layer2"])
    weight = class_weights("0.2,3,1,1,5,1,1,0.5,1,9", splits.train.labels, 10) if weighted else None
    criterion = DistillationLoss(
        {"ce": 1.0, "kl": 0.5, "feature": 1.0},
        cross_entropy=lambda out, labels, whole: task_cross_entropy(out, labels, 0.0, {"label": weight}, whole),
    )
    with torch.no_grad():
        dry = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.float64)}
        criterion.build(model(dry), teacher(dry))
    criterion.double()
    optimizer = make_optimizer(model, criterion, optimizer="sgd", lr=0.05)
    schedule = Schedule(0.05, 16, schedule="constant", epochs=2)
    options = {"clip_grad": 1.0, "accumulation_steps": accumulate}
    student = Student(model, criterion)
    updater = Updater(model, optimizer, schedule, Precision("off", device), student, **options)
    keys = []
    for epoch in (1, 2):
        for batch in loader.batches(epoch, plan=augment.plan):
            if updater.steps < 6:
                keys += batch["key"].tolist()
                inputs = {"image": augment(batch, 8).double()}
                with torch.no_grad():
                    taught = teacher(inputs)
                _, loss = updater.parallel(inputs, taught, batch["targets"][TASK], batch["batch_targets"][TASK])
                updater(loss)
    assert updater.steps == 6 and loader.batch_size == 24
    state = {**model.state_dict(), **{f"projector.{k}": v for k, v in criterion.state_dict().items()}}
    return {
        "state": state,
        "keys": keys,
        "size": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
    }


def test_two_processes_take_the_steps_of_one(tmp_path):
    with restored():
        results = {1: [[train_6_steps(*setting) for setting in SETTINGS]]}
    codes, _, errors = ends(start(2, "tests/test_distributed.py", tmp_path / "rank"))
    assert codes == [0, 0], errors
    results[2] = [torch.load(tmp_path / f"rank.{rank}", weights_only=True) for rank in range(2)]
    for i, (accumulate, weighted, mixed) in enumerate(SETTINGS):
        one = results[1][0][SETTINGS.index((1, weighted, mixed))]
        for size, ranks in results.items():
            assert sorted(k for r in ranks for k in r[i]["keys"]) == sorted(one["keys"])  # the same images, each once
            for r in ranks:
                assert r[i]["size"] == size
                worst = max(
                    (r[i]["state"][k].double() - v.double()).abs().max().item() for k, v in one["state"].items()
                )
                assert worst < 1e-6, (size, accumulate, weighted, mixed, worst)
    plain, weighted = (results[1][0][SETTINGS.index((1, weighted, False))]["state"] for weighted in (False, True))
    moved = {name: (plain[name] - weighted[name]).abs().max().item() for name in plain}
    assert max(moved.values()) > 1e-3, "the class weights matter"
    assert moved["projector.projectors.feature.0.weight"] > 1e-5, "the projector learns"


# ------------------------------------------------------------------------------------------- what differs between ranks


def differing(folder):
    """On each of two processes: BatchNorm that has seen other images, a loss that is NaN on one, dropout's random
    numbers."""
    from common.augment import normalize
    from common.data import load_splits
    from common.loader import Loader
    from common.losses import DistillationLoss
    from common.models import build_model
    from common.run import Recorder, RunFolder
    from common.teacher import distillation_loss
    from common.training import NonFiniteLoss, Precision, Preprocess, Schedule, Updater, predict_logits, select_device

    device = select_device("cpu")
    rank, precision = torch.distributed.get_rank(), Precision("off", device)
    torch.manual_seed(0)
    model = build_model("resnet8", 10, 8).eval()
    model.backbone.bn1.running_mean += 0.5 * rank
    val = load_splits("digits").val.subset(np.arange(40))
    pixels = torch.stack([val[i]["image"] for i in range(40)]) / 255
    with torch.no_grad():
        own = model({"image": normalize(pixels, *torch.full((2, 3), 0.5))})["logits"]  # (40, 10)
    judged = Loader(val, 8, device), Preprocess(8, [0.5] * 3, [0.5] * 3), precision
    found = predict_logits(model, *judged)["label"]
    model.backbone.bn1.running_mean += 0.5 * rank
    even = lambda batch: {"logits": torch.zeros(len(batch["index"]), 10)}  # noqa: E731
    loss = distillation_loss(model, DistillationLoss({"kl": 1.0}, {"kl.temperature": 1.0}), even, *judged)
    updater = Updater(
        model, torch.optim.SGD(model.parameters(), 0.1), Schedule(0.1, 1, schedule="constant", epochs=9), precision
    )
    updater(sum(p.sum() for p in model.parameters()) * (float("nan") if rank else 1.0))
    try:
        updater.check_finite()
        message = ""
    except NonFiniteLoss as error:
        message = str(error)
    dropped = []
    for resume in (False, True, True):
        model = build_model("resnet8", 10, 8)
        updater = Updater(
            model, torch.optim.SGD(model.parameters(), 0.1), Schedule(0.1, 1, schedule="constant", epochs=9), precision
        )
        content = {
            "classes": [],
            "preprocess": {},
            "flags": {"dataset": "d", "data_root": None},
            "data": {"classes": [], "sha256": {}},
        }
        recorder = Recorder(
            RunFolder(f"{folder}/run", resume, not resume),
            updater,
            epochs=9,
            select_metric="accuracy",
            patience=0,
            save_every=0,
            content=content,
        )
        torch.manual_seed(0)
        recorder.open({}, 0)
        dropped.append(torch.rand(8))
        if not resume:
            recorder.save()
    return {
        "own": own,
        "found": torch.from_numpy(found),
        "loss": loss,
        "message": message,
        "dropped": torch.stack(dropped),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("differing")
    codes, _, errors = ends(start(2, "tests/test_distributed.py", folder / "rank", folder))
    assert codes == [0, 0], errors
    return [torch.load(f"{folder / 'rank'}.{rank}", weights_only=True) for rank in range(2)]


def test_batch_norm_of_rank_0_is_what_is_judged(two_ranks):
    a, b = two_ranks
    assert (a["own"] - b["own"]).abs().max() > 0.01
    for found in (a["found"], b["found"]):
        torch.testing.assert_close(found, a["own"], rtol=1e-4, atol=1e-4)
    divergence = [
        (-np.log(10) - found["own"].log_softmax(1).mean()).item() for found in two_ranks
    ]  # KL(even || student)
    assert abs(divergence[0] - divergence[1]) > 0.001
    assert a["loss"] == b["loss"] == pytest.approx(divergence[0], abs=1e-5)


def test_a_loss_that_is_not_finite_on_one_process_stops_both(two_ranks):
    assert all(found["message"].startswith("the loss of step 1 is not finite") for found in two_ranks)


def test_dropout_masks_differ_between_processes(two_ranks):
    a, b = (found["dropped"] for found in two_ranks)
    assert not torch.equal(a[0], b[0])
    for own in (a, b):
        assert torch.equal(own[1], own[2]) and not torch.equal(own[0], own[1])  # it goes on where it was saved


# ------------------------------------------------------------------------------------------------------------ scripts


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Runs of one and of two processes without BatchNorm, which sees other batches in each."""
    folder = tmp_path_factory.mktemp("vit")
    flags = [
        *SMALL,
        "--model",
        "vit_6_192",
        "--patch-size",
        4,
        "--optimizer",
        "adamw",
        "--epochs",
        2,
        "--class-weights",
        "balanced",
    ]
    succeed("train_student.py", *flags, "--output", folder / "one")
    out = two("train_student.py", *flags, "--output", folder / "two")
    return folder, out


def test_two_processes_of_a_script_agree_with_one(vit):
    folder, out = vit
    a, b = (json.loads((folder / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert len(a) == len(b) == 2 and out.count("epoch 2/2") == 1  # rank 0 alone speaks
    for x, y in zip(a, b):
        for key in ("lr", "train_loss", "train_accuracy", "val_loss"):
            assert x[key] == pytest.approx(y[key], abs=2e-4), key
    results = json.loads((folder / "two" / "results.json").read_text())
    assert results["processes"] == 2 and results["test"]["loss"] == pytest.approx(
        json.loads((folder / "one" / "results.json").read_text())["test"]["loss"], abs=2e-4
    )


def test_every_image_is_judged_once(vit, tmp_path):
    """Predictions of two processes equal those of one from the same checkpoint, bit for bit, in the dataset's order."""
    folder, _ = vit
    succeed(
        "evaluate.py", folder / "two" / "best.pth", "--device", "cpu", "--batch-size", 32, "--output", tmp_path / "e"
    )
    ours, theirs = (np.load(f / "predictions_test.npz") for f in (folder / "two", tmp_path / "e"))
    assert len(set(ours["ids"])) == 719
    said = two(
        "evaluate.py", folder / "two" / "best.pth", "--device", "cpu", "--batch-size", 32, "--output", tmp_path / "f"
    )
    assert said.count("evaluation.json") == 1  # one of them writes
    for key in ("ids", "labels", "logits"):
        assert np.array_equal(ours[key], theirs[key]) and np.array_equal(
            np.load(tmp_path / "f" / "predictions_test.npz")[key], theirs[key]
        ), key


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, teacher):
    """An undisturbed run of two processes: projectors, BatchNorm, EMA, accumulation."""
    folder = tmp_path_factory.mktemp("two") / "run"
    flags = [
        *SMALL,
        *FEATURE,
        "--epochs",
        3,
        "--ema",
        0.9,
        "--clip-grad",
        1,
        "--accumulation-steps",
        2,
        "--teacher-checkpoint",
        teacher / "best.pth",
    ]
    two("distill.py", *flags, "--output", folder)
    return folder, flags


def test_a_signal_to_one_process_stops_both_and_they_resume_exactly(distilled, tmp_path):
    reference, flags = distilled
    run = tmp_path / "run"
    processes = start(2, "distill.py", *flags, "--output", run)
    end = time.time() + 120
    while not lines_in(run / "log.txt", "epoch 1/3:"):
        assert all(p.poll() is None for p in processes) and time.time() < end, [p.communicate() for p in processes]
        time.sleep(0.002)
    processes[1].send_signal(signal.SIGUSR1)
    codes, _, errors = ends(processes)
    assert codes == [75, 75] and errors.startswith("interrupted by SIGUSR1") and len(errors.splitlines()) == 1, (
        codes,
        errors,
    )
    saved = torch.load(run / "latest.pth", weights_only=True)
    assert saved["epoch"] in (2, 3) and len(saved["processes"]) == 2 and not (run / "results.json").exists()
    two("distill.py", "--resume", run)
    for name in ("latest.pth", "best.pth"):
        same(*(torch.load(f / name, weights_only=True) for f in (run, reference)), name)
    times = ("images_per_second", "seconds")
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in times} for row in json.loads((f / "metrics.json").read_text())]
        for f in (run, reference)
    )
    assert ours == theirs


def test_a_run_of_two_processes_goes_on_in_one(distilled, tmp_path):
    """The batch is the global one, so the number of processes may change."""
    folder = shutil.copytree(distilled[0], tmp_path / "run")
    succeed("distill.py", "--resume", folder, "--epochs", 4)
    assert len(json.loads((folder / "metrics.json").read_text())) == 4


def test_parameters_without_a_gradient(teacher, tmp_path):
    """Features of an inner layer leave those behind it untouched (there is no head); DDP must not wait for their
    gradient."""
    flags = [
        *SMALL,
        *FEATURE,
        "--loss",
        "feature=1",
        "--epochs",
        1,
        "--teacher-checkpoint",
        teacher / "best.pth",
    ]
    two("distill.py", *flags, "--output", tmp_path / "two")
    last = weights(tmp_path / "two")["backbone.layer4.0.conv1.weight"]
    succeed("distill.py", *flags, "--output", tmp_path / "one")
    assert torch.equal(last, weights(tmp_path / "one")["backbone.layer4.0.conv1.weight"])


def test_torchrun(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(ROOT / "train_teacher.py"),
            *SMALL,
            "--model",
            "resnet8",
            "--epochs",
            "1",
            "--cache",
            "off",
            "--output",
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=script_environment(),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["processes"] == 2 and results["role"] == "teacher" and results["environment"]["processes"] == 2


# --------------------------------------------------------------------------------------------------------------- errors


def test_one_line_from_all_processes(tmp_path):
    """Of an error that all meet after they have joined."""
    codes, _, errors = ends(start(2, "train_student.py", *SMALL, "--batch-size", "33", cwd=tmp_path))
    assert 2 in codes and 0 not in codes, codes
    assert errors.startswith("error: ") and "multiple of 2" in errors and len(errors.splitlines()) == 1, errors


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_bad_flags_are_told_by_the_first_process(monkeypatch, here, rank, lines):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    code, _, errors = here("train_student.py", *SMALL, "--lrr", 1)
    assert code == 2 and errors.count("--lrr") == len(errors.splitlines()) == lines, errors


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    processes = start(2, "train_student.py", *SMALL, "--epochs", 50, "--output", tmp_path / "run")
    end = time.time() + 120
    while not (tmp_path / "run" / "latest.pth").exists():
        assert time.time() < end
        time.sleep(0.01)
    processes[1].kill()
    codes, _, _ = ends(processes, 60)
    assert codes[1] == -9 and codes[0] not in (0, None)
    assert (tmp_path / "run" / "latest.pth").exists() and not (tmp_path / "run" / "results.json").exists()


def test_run_folders_are_refused_by_all_processes(distilled):
    folder, flags = distilled
    before = (folder / "latest.pth").read_bytes()
    codes, _, errors = ends(start(2, "distill.py", *flags, "--output", folder))
    assert codes == [2, 2] and "--overwrite" in errors and len(errors.splitlines()) == 1
    assert (folder / "latest.pth").read_bytes() == before


def test_the_environment_names_the_process(monkeypatch):
    from common.run import Processes
    from common.run import launched_processes as environment

    for name in [n for n in os.environ if n.startswith("SLURM_") or n in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    assert environment() == Processes(0, 1, 0, 1)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert environment() == Processes(0, 1, 0, 1)  # the batch script of a job of four tasks is no task
    for name, value in {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    }.items():
        monkeypatch.setenv(name, value)
    assert environment() == Processes(6, 7, 0, 1)
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert environment().local_size == 3
    monkeypatch.setenv("SLURM_STEP_ID", "")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert environment() == Processes(0, 1, 0, 1)  # empty is not set


def test_a_process_alone_says_whom_it_awaits_and_gives_up(monkeypatch):
    """RANK and WORLD_SIZE left by a launcher: nobody else will come."""
    from common import distributed, run
    from common.run import UserError
    from common.training import select_device

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", datetime.timedelta(seconds=0.5))
    monkeypatch.setattr(run, "joining", False)
    with pytest.raises(UserError) as caught:
        select_device("cpu")
    for words in ("process 1 waits for the others of 3 (WORLD_SIZE=3)", f"127.0.0.1:{port}", "in vain", "env -u RANK"):
        assert words in str(caught.value)
    assert run.first_to_fail()  # it speaks, though it is not rank 0


def test_a_second_run_on_the_folder_of_two_processes(distilled, locked):
    """Both are refused in one line, whatever the flags."""
    folder, flags = distilled
    before = (folder / "latest.pth").read_bytes()
    locked(folder)
    codes, _, errors = ends(start(2, "distill.py", *flags, "--output", folder, "--overwrite"))
    assert (
        codes == [2, 2]
        and errors.startswith(f"error: another run is writing {folder}")
        and len(errors.splitlines()) == 1
    ), errors
    assert (folder / "latest.pth").read_bytes() == before


@pytest.fixture
def locked():
    others = []
    yield lambda folder: others.append(locker(folder)[0])
    for other in others:
        other.kill()
        other.wait()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    done = differing(sys.argv[2]) if sys.argv[2:] else [train_6_steps(*setting) for setting in SETTINGS]
    torch.save(done, f"{sys.argv[1]}.{os.environ.get('RANK', 0)}")
