"""Several findings an image: readers, splits, the head, losses, metrics, and the scripts from training to report.

Expected values are torch's binary cross-entropy with positive weights, a binary KL written out in float64, and
scikit-learn's macro averages.
"""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import succeed
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from common import metrics, statistics
from common.data import DataError, ImageDataset, Splits, are_findings, load_splits
from common.losses import TERMS, DistillationLoss, LossError, check_findings
from common.medical import CHESTMNIST, findings_dataset
from common.models import build_model
from common.run import UserError
from common.teacher import chance_auc
from common.training import task_class_weights, task_cross_entropy, task_metrics, uncertainty

NAMES = ["mass", "effusion", "hernia"]


@pytest.fixture(scope="module")
def outputs():
    """A teacher's and a student's logits (64, 3) in float64, and which findings are present (64, 3)."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 64, 3, dtype=torch.float64, generator=generator) * 3
    present = torch.rand(64, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.1])
    return teacher, student, present.long()


def out_of(logits):
    """Logits (B, 3) as a model of NAMES gives them."""
    model = build_model("resnet8", 3, 8, findings=NAMES)
    return model.heads(logits)


def targets_of(present):
    return dict(zip(NAMES, present.T))


# -------------------------------------------------------------------------------------------------- the head and losses


def test_one_linear_head_gives_a_logit_a_finding():
    plain, model = (build_model("resnet8", 3, 8, findings=names) for names in (None, NAMES))
    model.load_state_dict(plain.state_dict())  # the same parameters
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        logits, out = plain.eval()({"image": images})["logits"], model.eval()({"image": images})
    assert {*out} == {"embedding", *(f"logits_{name}" for name in NAMES)}
    for number, name in enumerate(NAMES):
        assert torch.equal(out[f"logits_{name}"], torch.stack([torch.zeros(4), logits[:, number]], 1))
    assert build_model(**model.build_args).build_args["findings"] == NAMES


def test_a_model_of_ones_own_too(tmp_path):
    (tmp_path / "my.py").write_text(
        "from torch import nn\ndef model(n):\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, n))\n"
    )
    model = build_model(f"{tmp_path}/my.py:model", 3, 8, findings=NAMES)
    assert [*model({"image": torch.zeros(2, 3, 8, 8)})][:3] == [f"logits_{name}" for name in NAMES]


def test_cross_entropy_is_the_binary_one(outputs):
    _, student, present = outputs
    expected = F.binary_cross_entropy_with_logits(student, present.double())
    assert task_cross_entropy(out_of(student), targets_of(present)).item() == pytest.approx(expected.item())


def test_balanced_weights_are_positive_weights(outputs):
    """Negatives over positives, as pos_weight; each finding's mean is divided by its mean weight."""
    _, student, present = outputs
    weights = task_class_weights("balanced", targets_of(present), dict.fromkeys(NAMES, 2))
    positive = (present == 0).sum(0) / present.sum(0)
    for number, name in enumerate(NAMES):
        assert (weights[name][1] / weights[name][0]).item() == pytest.approx(positive[number].item())
    losses = F.binary_cross_entropy_with_logits(student, present.double(), pos_weight=positive, reduction="none").mean(
        0
    )
    mean_weight = torch.where(present == 1, positive, torch.ones(3)).mean(0)
    expected = (losses / mean_weight).mean().item()
    assert task_cross_entropy(out_of(student), targets_of(present), weights=weights).item() == pytest.approx(expected)
    with pytest.raises(UserError, match="class number 1 of hernia has no training image"):
        task_class_weights("balanced", targets_of(present * torch.tensor([1, 1, 0])), dict.fromkeys(NAMES, 2))


def test_mixed_images_have_soft_labels(outputs):
    _, student, present = outputs
    share = torch.linspace(0.5, 1, 64, dtype=torch.float64)
    other = present.flip(0)
    mixed = {name: (present[:, i], other[:, i], share) for i, name in enumerate(NAMES)}
    soft = share[:, None] * present + (1 - share[:, None]) * other
    expected = F.binary_cross_entropy_with_logits(student, soft).item()
    assert task_cross_entropy(out_of(student), mixed).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_binary_one_at_a_temperature(outputs, temperature):
    teacher, student, _ = outputs
    p, q = (1 / (1 + np.exp(-logits.numpy() / temperature)) for logits in (teacher, student))
    expected = temperature**2 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    loss = DistillationLoss({"kl": 1.0}, {"kl.temperature": temperature})
    assert loss(out_of(student), out_of(teacher)).item() == pytest.approx(expected)


def test_hard_labels_are_the_teachers_decisions(outputs):
    teacher, student, _ = outputs
    expected = F.binary_cross_entropy_with_logits(student, (teacher > 0).double()).item()
    assert DistillationLoss({"hard": 1.0})(out_of(student), out_of(teacher)).item() == pytest.approx(expected)


def test_terms_between_classes_say_nothing_here_and_are_refused(outputs):
    """With two classes of which one logit is 0, dist's inter-class part and the standardized logits do not depend on
    the size of the other, and dkd's beta on nothing."""
    teacher, student, _ = outputs
    small, large = (out_of(teacher.abs() * scale + 1) for scale in (1.0, 1.5))
    ours = out_of(student.abs() + 1)
    standardized = DistillationLoss({"standardized_kl": 1.0})
    assert standardized(ours, small).item() == pytest.approx(standardized(ours, large).item())
    assert standardized(ours, small).item() == pytest.approx(0, abs=1e-12)
    inter = DistillationLoss({"dist": 1.0}, {"dist.gamma": 0.0})
    assert inter(ours, small).item() == pytest.approx(0, abs=1e-4)
    dkd, kl = DistillationLoss({"dkd": 1.0}, {"dkd.beta": 8.0}), DistillationLoss({"kl": 1.0})
    assert dkd(ours, small).item() == pytest.approx(kl(ours, small).item())
    for term in TERMS:
        if term in ("dkd", "dist", "standardized_kl", "pld"):
            with pytest.raises(LossError, match=f"the term {term} compares an image's classes"):
                check_findings(["ce", term])
        else:
            check_findings([term])


# ------------------------------------------------------------------------------------------------------------- metrics


def split_of(present, groups=None):
    ids = [str(i) for i in range(len(present))]
    dataset = findings_dataset(
        ids, present.numpy(), NAMES, images=np.zeros((len(present), 2, 2), np.uint8), groups=groups
    )
    return dataset, Splits("x", "custom", dataset.classes)


def test_means_are_scikit_learns_macro_averages(outputs):
    _, student, present = outputs
    out = {name: pair.numpy() for name, pair in zip(NAMES, out_of(student).values())}
    scores = task_metrics(out, {name: labels.numpy() for name, labels in targets_of(present).items()})
    assert scores["auc"] == pytest.approx(roc_auc_score(present, student, average="macro"))
    assert scores["average_precision"] == pytest.approx(average_precision_score(present, student, average="macro"))
    for number, name in enumerate(NAMES):
        assert scores[f"{name}_auc"] == pytest.approx(roc_auc_score(present[:, number], student[:, number]))
    assert scores["accuracy"] == pytest.approx(((student > 0) == present).double().mean().item())


@pytest.mark.parametrize("grouped", [False, True])
def test_the_interval_of_a_mean_is_over_resamples_of_all_findings(outputs, grouped, monkeypatch):
    _, student, present = outputs
    groups = [f"patient {i // 2}" for i in range(64)] if grouped else None
    dataset, splits = split_of(present, groups)
    draws = np.concatenate([*metrics.resamples(64, dataset.groups, 60)], 1)
    monkeypatch.setattr(metrics.resamples, "__defaults__", (None, 60, 0))
    wanted = metrics.resampled
    monkeypatch.setattr(metrics, "resampled", lambda *args, **options: wanted(*args, repeats=60, **options))
    logits = {name: pair.numpy() for name, pair in zip(NAMES, out_of(student).values())}
    found = uncertainty(logits, dataset, splits)["intervals"]
    for name, score in (("auc", roc_auc_score), ("average_precision", average_precision_score)):
        values = []
        for column in draws.T:
            rows = np.repeat(np.arange(64), column)
            if all(0 < present[rows, number].sum() < len(rows) for number in range(3)):
                values.append(score(present[rows], student[rows], average="macro"))
        assert found[name] == pytest.approx(np.percentile(values, (2.5, 97.5)).tolist())
        assert found[f"hernia_{name}"] != found[name]


def test_guesses_are_judged_together():
    """The mean AUC of guesses on three findings stays below the mark in 97 of 100 draws; one finding alone does not
    stay below that mark."""
    rng = np.random.default_rng(0)
    present = (rng.random((200, 3)) < [0.5, 0.2, 0.02]).astype(int)
    counts = present.sum(0)
    expected = 0.5 + 2 * np.sqrt(201 / (12 * counts * (200 - counts))).mean()
    assert chance_auc(present) == pytest.approx(expected)
    aucs = [roc_auc_score(present, rng.random((200, 3)), average="macro") for _ in range(100)]
    assert np.mean(np.array(aucs) < expected) > 0.96


# ------------------------------------------------------------------------------------------------------ reading, splits


def pictures(folder, present, size=8, columns=NAMES):
    """Images whose red, green and blue tell the three findings, and labels.csv."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    images = rng.integers(0, 60, (len(present), size, size, 3)) + 150 * np.asarray(present)[:, None, None, :]
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "patient_id", "note", *columns])
        for i, row in enumerate(present):
            Image.fromarray(images[i].astype(np.uint8)).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", f"p{i // 2}", "x", *map(int, row)])
    return images.astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(2)
    present = (rng.random((240, 3)) < [0.5, 0.3, 0.15]).astype(int)
    root = tmp_path_factory.mktemp("findings") / "csv"
    return root, present, pictures(root, present, columns=["mass", "Pleural effusion", "hernia"])


COLUMNS = ["mass", "Pleural effusion", "hernia"]
TASKS = ["mass", "Pleural_effusion", "hernia"]


def test_a_table_with_a_column_a_finding(folder):
    root, present, _ = folder
    splits = load_splits("csv", str(root), label_columns=COLUMNS)
    assert are_findings(splits.classes) and [*splits.classes] == TASKS
    assert splits.positive == dict.fromkeys(TASKS, 1)
    assert str(splits).endswith("3 findings (mass, Pleural_effusion, hernia)")
    seen = {}
    for part in splits.parts.values():
        for row, name in enumerate(part.ids):
            seen[int(name.split(".")[0])] = [int(part[row]["targets"][task]) for task in TASKS]
    assert [seen[i] for i in range(240)] == present.tolist()
    groups = [{*part.groups} for part in splits.parts.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2]
    for part in splits.parts.values():  # each finding in proportion, to within a tenth
        shares = [part.targets[task].mean() for task in TASKS]
        assert np.abs(shares - present.mean(0)).max() < 0.1, shares
    other = load_splits("csv", str(root), label_columns=COLUMNS[:2])
    assert (
        other.train.fingerprint()
        != splits.train.fingerprint()
        == splits.train.subset(np.arange(len(splits.train))[::-1]).fingerprint()
    )


def test_rare_findings_are_divided(tmp_path):
    """Of 14 findings in over 500 combinations the rarest are the same share of each fold."""
    rng = np.random.default_rng(3)
    present = (rng.random((1500, 14)) < np.linspace(0.02, 0.2, 14)).astype(np.uint8)
    arrays = {
        f"{split}_{kind}": values[:count]
        for split, count in (("train", 1500), ("val", 200), ("test", 300))
        for kind, values in (("images", np.zeros((1500, 4, 4), np.uint8)), ("labels", present))
    }
    np.savez(tmp_path / "chestmnist_64.npz", **arrays)
    np.savez(tmp_path / "other.npz", **arrays)
    splits = load_splits("medmnist", str(tmp_path / "chestmnist_64.npz"))
    assert [*splits.classes] == list(CHESTMNIST) and CHESTMNIST[0] == "atelectasis" and CHESTMNIST[13] == "hernia"
    assert (np.stack([*splits.test.targets.values()], 1) == present[:300]).all()
    numbered = load_splits("medmnist", str(tmp_path / "other.npz"), limit_train=300)
    assert [*numbered.classes] == [f"finding_{i}" for i in range(14)]
    shares = np.array([labels.mean() for labels in numbered.train.targets.values()])
    assert np.abs(shares - present.mean(0)).max() < 0.03
    for fold in range(3):
        part = load_splits("medmnist", str(tmp_path / "other.npz"), folds=3, fold=fold).val
        shares = np.array([labels.mean() for labels in part.targets.values()])
        away = np.abs(shares - np.concatenate([present, present[:200]]).mean(0))
        assert away[:3].max() < 0.004 and away.max() < 0.05, away  # the rarest are divided first
    few = load_splits("medmnist", str(tmp_path / "other.npz"), limit_labels=300).train
    assert all((labels >= 0).sum() == 300 for labels in few.targets.values()) and (few.labels >= 0).sum() == 300


@pytest.mark.parametrize(
    "labels, words",
    [
        (np.full((9, 2), 2), "out of range"),
        (np.zeros((9, 2, 2), int), "are not one class for each image, nor a row of findings"),
        (np.full((9, 2), 0.5), "out of range"),
        (np.zeros((9, 3), int), "train have 3 columns, val have 2 columns"),
    ],
)
def test_bad_labels_of_an_archive(tmp_path, labels, words):
    arrays = {f"{split}_images": np.zeros((9, 4, 4), np.uint8) for split in ("train", "val", "test")}
    arrays.update({f"{split}_labels": np.eye(9, 2, dtype=int) for split in ("train", "val", "test")})
    np.savez(tmp_path / "a.npz", **{**arrays, "train_labels": labels})
    with pytest.raises(DataError, match=words):
        load_splits("medmnist", str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    "columns, words",
    [
        (["mass", "lung"], "no column 'lung'"),
        (["mass", "note"], "240 rows of .* have neither 0 nor 1 in note, the first is '0.png' .it has 'x'."),
        (["mass", "mass"], "'mass' cannot be the name of a finding"),
    ],
)
def test_bad_columns(folder, columns, words):
    with pytest.raises(DataError, match=words):
        load_splits("csv", str(folder[0]), label_columns=columns)


def test_a_missing_value_names_its_row(folder, tmp_path):
    lines = (folder[0] / "labels.csv").read_text().splitlines()
    lines[8] = lines[8].rsplit(",", 1)[0] + ","
    (tmp_path / "gap.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="1 rows of .*gap.csv have neither 0 nor 1 in hernia, the first is '7.png'"):
        load_splits("csv", str(folder[0]), table=str(tmp_path / "gap.csv"), label_columns=COLUMNS)
    with pytest.raises(DataError, match="--label-column and --label-columns cannot be combined"):
        load_splits("csv", str(folder[0]), label_column="note", label_columns=COLUMNS)


# ----------------------------------------------------------------------------------------------------------- JSON Lines


def write_lines(root, split, rows):
    with open(root / f"{split}.jsonl", "w") as file:
        for image, findings in rows:
            file.write(
                json.dumps({"image": image, "text": "seen " + " ".join(findings or ()), "found": findings}) + "\n"
            )


@pytest.fixture
def lists(folder, tmp_path):
    """The images of `folder`, their findings as lists."""
    root, present, _ = folder
    rows = [(f"{i}.png", [name for name, there in zip(COLUMNS, row) if there]) for i, row in enumerate(present)]
    rows[0][1][:] = [f" {name} " for name in rows[0][1]]
    (tmp_path / "images").symlink_to(root)
    for split, part in (("train", rows[:160]), ("test", rows[160:])):
        write_lines(tmp_path, split, part)
    return tmp_path, present


def test_lists_of_findings(lists):
    root, present = lists
    splits = load_splits("image_text", str(root), tasks=["found"])
    assert splits.classes == {name: ["absent", "present"] for name in sorted(TASKS)} and are_findings(splits.classes)
    seen = {}
    for part in splits.parts.values():
        for row, name in enumerate(part.ids):
            seen[int(name.split(".")[0])] = [int(part[row]["targets"][task]) for task in TASKS]
    assert [seen[i] for i in range(240)] == present.tolist()
    assert {*splits.train.labels} == {0, 1, 2, 3}, "the rarest finding, not one of the 8 combinations"
    two = {name: ["absent", "present"] for name in (*TASKS[::-1], "nodule")}
    other = load_splits("image_text", str(root), tasks=["found"], classes=two)
    assert [*other.classes] == [*two] and not other.test.targets["nodule"].any()
    assert (other.test.targets["mass"] == present[160:, 0]).all()


@pytest.mark.parametrize(
    "split, row, words",
    [
        ("train", ("0.png", None), "train.jsonl line 1: 'found' must be a list of names, not null"),
        ("train", ("0.png", "mass"), "train.jsonl line 1: 'found' must be a list of names, not \"mass\""),
        ("train", ("0.png", ["mass", ""]), '\'found\' must be a list of names, not \\["mass", ""\\]'),
        ("test", ("0.png", ["mass", "nodule"]), "test.jsonl line 1: train has no 'found' 'nodule'"),
        ("test", ("0.png", ["Pleural-effusion", "Pleural effusion", "Pleural,effusion"]), "cannot be the name of a f"),
        ("train", ("0.png", [" "]), "'found' must be a list of names, not \\[\" \"\\]"),
        ("train", ("0.png", []), "train.jsonl has no finding: 'found' is empty in each line"),
    ],
)
def test_bad_lists_of_findings(lists, split, row, words):
    write_lines(lists[0], split, [row] + [("1.png", ["mass"])] * (row[1] != []))
    with pytest.raises(DataError, match=words):
        load_splits("image_text", str(lists[0]), tasks=["found"])
    with pytest.raises(DataError, match="--tasks found image: where labels are lists, give the one task"):
        load_splits("image_text", str(lists[0]), tasks=["found", "image"])


# ------------------------------------------------------------------------------- a finding that no image of a split has


def test_means_are_of_the_findings_that_are_there(outputs):
    _, student, present = outputs
    present = present.clone()
    present[:, 2] = 0
    logits = {name: torch.stack([torch.zeros(64), student[:, i]], 1).numpy() for i, name in enumerate(NAMES)}
    targets = {name: values.numpy() for name, values in targets_of(present).items()}
    found, two = task_metrics(logits, targets), slice(0, 2)
    expected = roc_auc_score(present[:, two], student[:, two], average="macro")
    assert found["auc"] == pytest.approx(expected) and found["hernia_auc"] is None
    names = dict.fromkeys(NAMES, ["absent", "present"])
    predictions = statistics.Predictions(np.arange(64), None, targets, logits, names)
    assert predictions.value("auc") == pytest.approx(expected)
    dataset = findings_dataset([*map(str, range(64))], present.numpy(), NAMES, images=np.zeros((64, 2, 2), np.uint8))
    found = uncertainty(logits, dataset, Splits("toy", "natural", names, dataset, dataset, dataset))
    low, high = found["intervals"]["auc"]
    assert low < expected < high
    nothing = {name: np.zeros(64, np.int64) for name in NAMES}
    assert task_metrics(logits, nothing)["auc"] is None


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_a_finding(folder, here, refused, tmp_path, split):
    """Its mean is of the others, and the run ends well; without any finding val cannot choose by AUC."""
    lines = list(csv.reader(open(folder[0] / "labels.csv", newline="")))
    rows = [[*row, ("train", "val", "test")[i % 3]] for i, row in enumerate(lines[1:])]
    few = [[*row[:5], "0" if row[6] == split else row[5], row[6]] for row in rows]
    none = [[*row[:3], *["0" if row[6] == split else v for v in row[3:6]], row[6]] for row in rows]
    data = ["--dataset", "csv", "--data-root", folder[0], "--label-columns", *COLUMNS, "--model", "resnet8", *QUICK]
    for name, content in (("few", few), ("none", none)):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([[*lines[0], "split"], *content])
        args = ["train_student.py", *data, "--group-column", "none", "--table", tmp_path / f"{name}.csv", "--epochs", 2]
        if (name, split) == ("none", "val"):
            refused(*args, "--output", name, words=["--select-metric auc has no value on val, which lacks a class"])
            continue
        code, out, errors = here(*args, "--output", name)
        assert code == 0, errors
        scores = results_of(tmp_path / name)[split]
        assert (scores["auc"] is None) == (name == "none") and scores["hernia_auc"] is None
        assert (f"auc {results_of(tmp_path / name)['test']['auc'] or 0:.4f}" in out) == (scores["auc"] is not None)


# -------------------------------------------------------------------------------------------------------------- scripts

QUICK = ["--resolution", 8, "--batch-size", 16, "--device", "cpu", "--workers", 0, "--select-metric", "auc"]


@pytest.fixture(scope="module")
def runs(folder):
    """A teacher, a student and a distilled one, of a table; --positive-weights is --class-weights."""
    root, out = folder[0], folder[0].parent / "runs"
    data = ["--dataset", "csv", "--data-root", root, "--label-columns", *COLUMNS, "--model", "resnet8", *QUICK]
    words = {"teacher": "train_teacher.py", "student": "train_student.py", "weighted": "train_student.py"}
    more = {"teacher": ["--epochs", 4], "student": ["--epochs", 1, "--class-weights", "balanced"]}
    more["weighted"] = ["--epochs", 1, "--positive-weights", "balanced"]
    for name, script in words.items():
        place = out.parent / "aside" if name == "weighted" else out / name
        succeed(script, *data, *more[name], "--output", place)
    taught = ["--teacher-checkpoint", out / "teacher/best.pth", "--model", "resnet8", "--epochs", 1, *QUICK]
    succeed("distill.py", *taught, "--output", out / "distill")
    return out


def results_of(run):
    return json.loads((run / "results.json").read_text())


def test_a_trained_teacher_and_its_student(runs):
    for name in ("teacher", "student", "distill"):
        results, stored = results_of(runs / name), np.load(runs / name / "predictions_test.npz")
        present = np.stack([stored[f"labels_{task}"] for task in TASKS], 1)
        logits = np.stack([stored[f"logits_{task}"][:, 1] for task in TASKS], 1)
        assert not any(stored[f"logits_{task}"][:, 0].any() for task in TASKS)
        assert results["test"]["auc"] == pytest.approx(roc_auc_score(present, logits, average="macro"))
        low, high = results["intervals"]["test"]["auc"]
        assert low <= results["test"]["auc"] <= high and results["select_metric"] == "auc"
        assert "Pleural_effusion_average_precision" in results["test"]
    assert results_of(runs / "teacher")["test"]["auc"] > 0.9
    assert {"agreement", "mass_teacher_kl"} <= {*results_of(runs / "distill")["test"]}
    log = (runs / "distill" / "log.txt").read_text()
    assert "on average AUC" in log and "average precision" in log.splitlines()[-1]


def test_positive_weights_is_another_name_of_class_weights(runs):
    one, two = (
        torch.load(run / "best.pth", weights_only=True)["model"] for run in (runs / "student", runs.parent / "aside")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_probability_a_finding_for_new_images(runs, folder, here, tmp_path):
    code, _, errors = here(
        "evaluate.py", runs / "teacher/best.pth", "--predict", folder[0], "--output", "p.csv", "--device", "cpu"
    )
    assert code == 0, errors
    stored = np.load(runs / "teacher" / "predictions_test.npz")
    with open(tmp_path / "p.csv", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["path", *TASKS]
        rows = {row["path"].rsplit("/", 1)[-1]: row for row in reader}
    assert len(rows) == 240
    for task in TASKS:
        for name, logit in zip(stored["ids"], stored[f"logits_{task}"][:, 1].astype(np.float64)):
            assert float(rows[name][task]) == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-3, abs=1e-6)


def test_evaluation_says_of_a_finding_what_needs_no_threshold(runs, here):
    code, out, errors = here("evaluate.py", runs / "distill/best.pth", "--knn", "--device", "cpu")
    assert code == 0, errors
    names = {line.split("  ")[0].strip() for line in out.splitlines()}
    assert {"auc", "average_precision", "mass_auc", "mass_average_precision", "recall mass_present", "knn_10"} <= names
    assert not {"mass_accuracy", "mass_ece", "mass_knn_10", "mass_positive"} & names
    assert any(line.startswith("auc ") and "[" in line for line in out.splitlines())


def test_the_report_has_a_table_of_findings(runs, here, tmp_path):
    code, out, errors = here("report.py", runs, "--metric", "auc", "--output", "page", "--gallery", 0)
    assert code == 0, errors
    text, page = (tmp_path / "page/report.md").read_text(), (tmp_path / "page/report.html").read_text()
    expected = f"{100 * results_of(runs / 'teacher')['test']['Pleural_effusion_auc']:.2f}"
    row = next(line for line in text.splitlines() if line.startswith("| Pleural_effusion"))
    assert expected in row and "## Findings: csv, resnet8 to resnet8, response" in text
    assert "<h3>Each finding</h3>" in page and "<td>Pleural_effusion</td>" in page
    assert "<td>Pleural_effusion_ece</td>" not in page and "<td>ece</td>" in page


@pytest.mark.parametrize("suffix", ["safetensors", "pt2"])
def test_an_export_gives_the_same(runs, here, tmp_path, suffix):
    code, out, errors = here("evaluate.py", runs / "teacher/best.pth", "--export", f"m.{suffix}", "--split", "val")
    assert code == 0, errors
    assert "logits_hernia" in json.loads((tmp_path / f"m.{suffix}.json").read_text())["outputs"]
    assert float(out.split("largest difference of logits ")[1].split(",")[0]) < 1e-4


def test_what_does_not_fit_is_refused(runs, folder, refused):
    teacher, data = (
        runs / "teacher/best.pth",
        ["--dataset", "csv", "--data-root", folder[0], "--label-columns", *COLUMNS],
    )
    taught = ["--teacher-checkpoint", teacher, "--model", "resnet8", *QUICK]
    refused("distill.py", *taught, "--method", "dkd", words=["the term dkd", "take kl or hard"])
    eval_too = ["--eval-dataset", "csv"]
    refused("distill.py", *taught, *eval_too, words=["--eval-dataset csv", "these have findings"])
    refused(
        "distill.py", *taught, "--unlabeled-root", folder[0], words=["--unlabeled-root is for images with one label"]
    )
    refused("extract_embeddings.py", "--checkpoint", teacher, words=["a store holds images with one label"])
    refused("extract_embeddings.py", "--model", "resnet8", *data, words=["several findings", "a store holds one label"])
    refused("train_student.py", *data, "--sampler", "balanced", words=["--sampler balanced is for one task"])
    refused("train_student.py", "--label-columns", "a", "b", words=["--label-columns with --dataset digits"])
    refused("evaluate.py", teacher, *data[:-1], words=["the tasks mass, Pleural_effusion, the checkpoint knows mass"])


def test_one_model_by_name_has_no_head_for_findings(folder, refused, tmp_path):
    torch.save(build_model("resnet8", 3, 8).backbone.state_dict(), tmp_path / "w.pth")
    data = ["--dataset", "csv", "--data-root", folder[0], "--label-columns", *COLUMNS, *QUICK, "--model", "resnet8"]
    named = ["--teacher-model", "resnet8", "--teacher-weights", tmp_path / "w.pth"]
    refused("distill.py", *data, *named, words=["has no head for each of mass"])


def test_the_set_of_findings_must_be_the_checkpoints(folder):
    names = {"mass": ["absent", "present"], "fracture": ["absent", "present"]}
    with pytest.raises(DataError, match="has the tasks mass, hernia, the checkpoint knows mass, fracture"):
        load_splits("csv", str(folder[0]), label_columns=["mass", "hernia"], classes=names)
    other_order = load_splits(
        "csv", str(folder[0]), label_columns=COLUMNS[::-1], classes=dict.fromkeys(TASKS, ["absent", "present"])
    )
    assert {*other_order.classes} == {*TASKS}


def test_one_label_stays_as_it_was():
    assert not are_findings(["absent", "present"]) and not are_findings({}) and not are_findings({"organ": ["a", "b"]})
    dataset = ImageDataset(["a"], [0], np.zeros((1, 2, 2), np.uint8))
    assert [*dataset.targets] == ["label"]


def test_lists_of_findings_train_and_teach_images_with_texts(lists, here, tmp_path):
    data = ["--dataset", "image_text", "--data-root", lists[0], "--tasks", "found", "--image-model", "resnet8"]
    for script, name, more in (
        ("train_teacher.py", "teacher", ["--epochs", 3, *data, "--text-model", "bert-tiny-scratch"]),
        ("distill.py", "distill", ["--epochs", 1, "--teacher-checkpoint", "runs/teacher/best.pth", *data[-2:]]),
    ):
        code, _, errors = here(script, *more, "--fusion-dim", 16, *QUICK, "--output", f"runs/{name}")
        assert code == 0, errors
    taught = results_of(tmp_path / "runs/distill")
    assert taught["dataset"]["classes"] == {name: ["absent", "present"] for name in sorted(TASKS)}
    assert results_of(tmp_path / "runs/teacher")["test"]["auc"] > 0.9 and "mass_average_precision" in taught["test"]
    code, out, errors = here("evaluate.py", "runs/distill/best.pth", "--device", "cpu")
    assert code == 0 and f"{taught['test']['hernia_auc']:.4f}"[:5] in out, errors
    code, out, errors = here("report.py", "runs", "--metric", "auc", "--output", "page", "--gallery", 0)
    assert code == 0 and "## Findings: image_text" in (tmp_path / "page/report.md").read_text(), errors
