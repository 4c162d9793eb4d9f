"""evaluate.py, extract_embeddings.py and report.py on models of images and texts; figures recomputed from the
predictions."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, launch, run_script, succeed
from PIL import Image
from sklearn import metrics as sk
from sklearn.neighbors import KNeighborsClassifier
from test_scripts import needed_files
from transformers import AutoTokenizer

from common.run import load_checkpoint
from common.training import load_model

CLASSES = {"organ": ["brain", "liver", "lung"], "plane": ["axial", "coronal"]}
DATA = ["--dataset", "image_text", "--tasks", "organ", "plane", "--resolution", 16, "--device", "cpu"]
MODEL = [
    "--image-model",
    "resnet8",
    "--text-model",
    "bert-tiny-scratch",
    "--fusion-dim",
    64,
    "--max-length",
    16,
    "--batch-size",
    12,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """66 images of noise with a colour for the organ and, in one plane, stripes; the text names both."""
    root, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    (root / "images").mkdir()
    for split, count in (("train", 36), ("val", 12), ("test", 18)):
        rows = []
        for i in range(count):
            organ, plane, name = i % 3, i // 3 % 2, f"{split}_{i}.png"
            pixels = rng.integers(0, 60, (32, 32, 3))
            pixels[..., organ] += 120
            pixels[:: 4 if plane else 32] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name)
            labels = {"organ": CLASSES["organ"][organ], "plane": CLASSES["plane"][plane]}
            rows.append(
                {
                    "image": name,
                    "text": f"{labels['plane']} view of the {labels['organ']}",
                    **labels,
                    "group": f"{split} {i // 2}",
                }
            )
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder):
    """A teacher that reads both sides, a student and a distilled student that see images alone."""
    root = tmp_path_factory.mktemp("studies") / "runs"
    both = [*DATA, *MODEL, "--data-root", folder, "--augment", "none", "--epochs", 2]
    succeed("train_teacher.py", *both, "--output", root / "teacher")
    succeed("train_student.py", *both, "--inputs", "image", "--output", root / "student")
    succeed(
        "distill.py",
        *both,
        "--inputs",
        "image",
        "--teacher-checkpoint",
        root / "teacher/best.pth",
        "--allow-weak-teacher",
        "--output",
        root / "distill",
    )
    return root


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, runs):
    """(folder, stdout) of the distilled student beside its teacher."""
    output = tmp_path_factory.mktemp("evaluated") / "e"
    done = succeed(
        "evaluate.py",
        runs / "distill/best.pth",
        "--teacher-checkpoint",
        runs / "teacher/best.pth",
        "--knn",
        "--linear-probe",
        "--device",
        "cpu",
        "--output",
        output,
    )
    return output, done.stdout


def read(path):
    return json.loads(path.read_text())


def predictions(path):
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def cells(stdout):
    """{row: words behind its name} of a printed table, whose names take 36 columns."""
    return {line[:36].strip(): line[36:].split() for line in stdout.splitlines()}


def refused(name, *args, words):
    done = run_script(name, *args)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, (
        done.returncode,
        done.stderr,
    )
    assert all(word in done.stderr for word in words), done.stderr


# ------------------------------------------------------------------------------------------------------------ evaluate


def test_each_task_s_metrics_equal_scikit_learn_s_on_the_predictions(evaluated):
    output, _ = evaluated
    found, stored = read(output / "evaluation.json")["student"], predictions(output / "predictions_test.npz")
    accuracies, f1 = [], []
    for task, names in CLASSES.items():
        labels, logits = stored[f"labels_{task}"], stored[f"logits_{task}"]
        assert list(stored[f"classes_{task}"]) == names and logits.shape == (18, len(names))
        assert labels.tolist() == [i % 3 if task == "organ" else i // 3 % 2 for i in range(18)]
        predicted, shares = logits.argmax(1), np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        accuracies.append(sk.accuracy_score(labels, predicted))
        f1.append(sk.f1_score(labels, predicted, average="macro"))
        assert found[f"{task}_accuracy"] == pytest.approx(accuracies[-1]) and found[
            f"{task}_macro_f1"
        ] == pytest.approx(f1[-1])
        assert found[f"{task}_balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
        assert found[f"{task}_loss"] == pytest.approx(sk.log_loss(labels, shares), abs=1e-5)
        matrix = np.load(output / f"confusion_test_{task}.npy", allow_pickle=False)
        assert np.array_equal(matrix, sk.confusion_matrix(labels, predicted))
        recalls = sk.recall_score(labels, predicted, average=None)
        assert [found["class_recalls"][f"{task}_{name}"] for name in names] == pytest.approx(list(recalls))
        low, high = found["intervals"][f"{task}_accuracy"]
        assert 0 <= low <= accuracies[-1] <= high <= 1
    assert found["accuracy"] == pytest.approx(np.mean(accuracies)) and found["macro_f1"] == pytest.approx(np.mean(f1))
    assert len(set(stored["groups"])) == 9, "patients, two images each"


def test_the_figures_are_those_of_the_run_and_the_teacher_is_followed_by_task(evaluated, runs):
    output, _ = evaluated
    judged, student = read(output / "evaluation.json"), read(runs / "distill/results.json")["test"]
    for name in student:
        if isinstance(student[name], float):
            assert judged["student"][name] == pytest.approx(student[name], abs=1e-4), name
    of_teacher = predictions(runs / "teacher/predictions_test.npz")
    own = predictions(output / "predictions_test.npz")
    agreements = {}
    for task in CLASSES:
        right = of_teacher[f"logits_{task}"].argmax(1)
        agreements[task] = np.mean(own[f"logits_{task}"].argmax(1) == right)
        assert judged["teacher"][f"{task}_accuracy"] == pytest.approx(np.mean(right == own[f"labels_{task}"]))
        assert judged["student"][f"{task}_agreement"] == pytest.approx(agreements[task])
        kept = judged["student"][f"{task}_accuracy"] / judged["teacher"][f"{task}_accuracy"]
        assert judged["student"]["kept"][f"{task}_accuracy"] == pytest.approx(kept)
    assert judged["student"]["agreement"] == pytest.approx(np.mean(list(agreements.values())))
    assert judged["student"]["family"] == "cnn" and judged["teacher"]["family"] == "cnn+bert"
    assert judged["teacher"]["multiply_adds"] > judged["student"]["multiply_adds"] > 1e6, "the text's are counted"


def test_the_table_has_each_task_s_rows_with_intervals(evaluated):
    output, stdout = evaluated
    judged, table = read(output / "evaluation.json"), cells(stdout)
    for task in CLASSES:
        expected = []
        for role in ("student", "teacher"):
            low, high = judged[role]["intervals"][f"{task}_accuracy"]
            expected += [f"{judged[role][f'{task}_accuracy']:.4f}", f"[{low:.3f},", f"{high:.3f}]"]
        assert table[f"{task}_accuracy"] == expected
        assert table[f"kept {task}_accuracy"] == [f"{100 * judged['student']['kept'][f'{task}_accuracy']:.1f}", "%"]
    assert table["recall plane_coronal"] == [
        f"{judged[role]['class_recalls']['plane_coronal']:.4f}" for role in ("student", "teacher")
    ]
    assert table["model"] == ["resnet8", "resnet8+bert-tiny-scratch"]


def test_knn_and_the_probe_judge_each_task_on_the_fused_embedding(evaluated, runs):
    """k-NN against scikit-learn's, on embeddings that are taken here."""
    from common.data import load_splits
    from common.loader import Loader
    from common.run import load_checkpoint
    from common.training import Precision, load_model, select_device
    from common.training import model_outputs as outputs

    output, stdout = evaluated
    checkpoint = load_checkpoint(runs / "teacher/best.pth")
    model, preprocess = load_model(checkpoint)
    splits = load_splits("image_text", checkpoint["flags"]["data_root"], tasks=list(CLASSES))
    train, test = (
        outputs(model, Loader(part, 12, "cpu"), preprocess, Precision("off", select_device("cpu")), ("embedding",))[
            "embedding"
        ]
        for part in (splits.train, splits.test)
    )
    found = read(output / "evaluation.json")["teacher"]
    assert list(found["knn"]) == ["10", "20", "36"]
    accuracies = []
    for task in CLASSES:
        neighbours = KNeighborsClassifier(10, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        predicted = neighbours.fit(train, splits.train.targets[task]).predict(test)
        accuracies.append(np.mean(predicted == splits.test.targets[task]))
        assert found["knn"]["10"][f"{task}_accuracy"] == pytest.approx(accuracies[-1])
        assert found["knn"]["10"][f"{task}_loss"] is None and 0 <= found["linear_probe"][f"{task}_accuracy"] <= 1
        assert (
            found["linear_probe"][f"{task}_held_out"] in (6, 8) and f"{task}_lr" in found["linear_probe"]
        )  # a fifth of 36, patients whole
        assert cells(stdout)[f"{task}_knn_10"][1] == f"{accuracies[-1]:.4f}"
    assert found["knn"]["10"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["linear_probe"]["accuracy"] > 0.6, "the text says it all"


def test_another_folder_with_other_fields_and_a_model_of_texts_alone(tmp_path, folder, runs):
    """An outside test set in other keys' order; --text-fields names its text; images play no part."""
    succeed(
        "train_student.py",
        *DATA,
        *MODEL,
        "--data-root",
        folder,
        "--inputs",
        "text",
        "--epochs",
        1,
        "--output",
        tmp_path / "t",
    )
    outside = tmp_path / "outside"
    (outside / "images").mkdir(parents=True)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for row in rows:
        Image.new("RGB", (32, 32)).save(outside / "images" / row["image"])
    (outside / "test.jsonl").write_text(
        "".join(json.dumps({**row, "report": row["text"], "text": "nothing"}) + "\n" for row in rows)
    )
    flags = [
        "--dataset",
        "image_text",
        "--data-root",
        outside,
        "--tasks",
        "plane",
        "organ",
        "--text-fields",
        "report",
        "--device",
        "cpu",
    ]
    succeed("evaluate.py", tmp_path / "t/best.pth", *flags, "--output", tmp_path / "e")
    found, own = read(tmp_path / "e/evaluation.json")["student"], read(tmp_path / "t/results.json")["test"]
    for task in CLASSES:
        assert found[f"{task}_loss"] == pytest.approx(own[f"{task}_loss"], abs=1e-4)
    assert found["family"] == "bert" and found["parameters"] == read(tmp_path / "t/results.json")["model"]["parameters"]
    assert found["multiply_adds"] > 0


def test_tasks_that_do_not_fit_are_one_line(tmp_path, runs, folder, teacher):
    other = ["--device", "cpu", "--output", tmp_path / "e"]
    refused(
        "evaluate.py",
        runs / "student/best.pth",
        "--teacher-checkpoint",
        teacher / "best.pth",
        *other,
        words=[
            "teacher knows 10 (0, 1, 2, 3, ...)",
            "student organ: 3 (brain, liver, lung) and plane: 2 (axial, coronal)",
        ],
    )
    refused(
        "evaluate.py",
        teacher / "best.pth",
        "--dataset",
        "image_text",
        "--data-root",
        folder,
        "--tasks",
        "organ",
        *other,
        words=["organ", "label"],
    )
    refused(
        "evaluate.py", runs / "teacher/best.pth", "--dataset", "digits", "--knn", *other, words=["images without texts"]
    )
    assert not (tmp_path / "e").exists()


def test_knn_of_an_ordinary_model_on_other_tasks_leaves_its_head_out(tmp_path, folder, teacher):
    succeed(
        "evaluate.py",
        teacher / "best.pth",
        "--dataset",
        "image_text",
        "--data-root",
        folder,
        "--tasks",
        "organ",
        "plane",
        "--knn",
        "--device",
        "cpu",
        "--output",
        tmp_path / "e",
    )
    found = read(tmp_path / "e/evaluation.json")["student"]
    assert (
        "accuracy" not in found
        and 0 <= found["knn"]["10"]["plane_accuracy"] <= 1
        and not (tmp_path / "e/predictions_test.npz").exists()
    )


# ------------------------------------------------------------------------------------------------- extract_embeddings


def test_stores_refuse_models_and_datasets_with_several_tasks(tmp_path, runs, folder, teacher):
    for args, word in [
        (["--checkpoint", runs / "teacher/best.pth"], "best.pth"),
        (["--checkpoint", runs / "student/best.pth", "--images", folder / "images"], "best.pth"),
        (["--checkpoint", runs / "teacher/best.pth", "--dataset", "digits"], "best.pth"),
        (
            ["--checkpoint", teacher / "best.pth", "--dataset", "image_text", "--data-root", folder],
            "--dataset image_text",
        ),
        (["--model", "resnet8", "--dataset", "medpix", "--data-root", folder], "--dataset medpix"),
    ]:
        refused(
            "extract_embeddings.py", *args, "--output", tmp_path / "e", words=[word, "distill.py --teacher-checkpoint"]
        )
    assert not (tmp_path / "e").exists()


# -------------------------------------------------------------------------------------------------------------- report


def test_a_report_of_mixed_runs_shows_a_task_s_metric_and_confusions(tmp_path, runs, teacher):
    shutil.copytree(teacher, tmp_path / "digits")
    succeed("train_student.py", *SMALL, "--epochs", 1, "--output", tmp_path / "digits_student")
    done = succeed(
        "report.py",
        runs,
        tmp_path,
        "--metric",
        "organ_accuracy",
        "--reevaluate",
        "--device",
        "cpu",
        "--output",
        tmp_path / "report",
    )
    assert not done.stderr, "what was recorded is found again"
    report = read(tmp_path / "report/report.json")
    tests = {role: read(runs / role / "results.json")["test"] for role in ("teacher", "student", "distill")}
    group = next(group for group in report["groups"] if group["dataset"] == "image_text")
    means = [f"{100 * tests[role]['organ_accuracy']:.2f}" for role in tests]
    gain = 100 * (tests["distill"]["organ_accuracy"] - tests["student"]["organ_accuracy"])
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("| image_text")
    ]
    (row,) = rows
    assert [*row[:8], row[-1]] == [
        "image_text",
        "resnet8+bert-tiny-scratch",
        "resnet8",
        "response",
        *means,
        f"{gain:+.2f}",
        "1",
    ]
    assert group["teacher_accuracy"]["mean"] == pytest.approx(tests["teacher"]["accuracy"], abs=1e-6)
    assert any(line.startswith("| digits") and " - " in line for line in done.stdout.splitlines()), (
        "digits have no organs"
    )
    titles = list(report["figures"].values())
    for task in (*CLASSES, "label"):
        assert any(title.startswith("Confusion matrix") and title.endswith(f", {task}") for title in titles), task
    assert all((tmp_path / "report" / name).stat().st_size for name in report["figures"])
    assert "test organ_accuracy" in (tmp_path / "report/report.md").read_text()


def test_a_confusion_figure_has_its_task_s_class_names(tmp_path, runs, monkeypatch):
    """The figures' own function is asked what it is given."""
    import report
    from common import page

    drawn, draw = [], page.draw_confusion

    def note(figures, name, heading, counts, classes):
        drawn.append((heading, counts.shape, list(classes)))
        draw(figures, name, heading, counts, classes)

    monkeypatch.setattr(page, "draw_confusion", note)
    monkeypatch.chdir(tmp_path)
    report.main(report.build_parser().parse_args([str(runs), "--metric", "macro_f1"]))
    assert len(drawn) == 6
    for title, shape, classes in drawn:
        task = title.rsplit(", ", 1)[1]
        assert classes == CLASSES[task] and shape == (len(classes),) * 2


def test_select_by_a_task_s_loss_takes_the_lowest(tmp_path, runs):
    done = succeed(
        "report.py", runs / "student", runs / "teacher", "--select", "val_plane_loss", "--output", tmp_path / "r"
    )
    losses = {role: read(runs / role / "results.json")["val"]["plane_loss"] for role in ("student", "teacher")}
    best = min(losses, key=losses.get)
    assert done.stdout.splitlines()[-3].startswith(f"best val_plane_loss: {losses[best]:.4f}, {runs / best}")


# --------------------------------------------------------------------------------------------------------- copying out


@pytest.mark.parametrize("script", ["train_teacher.py", "evaluate.py"])
def test_a_copied_script_reads_texts_with_the_four_files_more(tmp_path, folder, runs, script):
    (tmp_path / "common").mkdir()
    shutil.copy(ROOT / script, tmp_path)
    for name in [*needed_files(script), "image_text.py", "groups.py", "medical.py", "multimodal.py"]:
        shutil.copy(ROOT / "common" / name, tmp_path / "common")
    args = (
        [runs / "teacher/best.pth"]
        if script == "evaluate.py"
        else [*DATA, *MODEL, "--data-root", folder, "--epochs", 1]
    )
    succeed(script, *args, "--device", "cpu", "--output", "out", cwd=tmp_path, root=tmp_path, run=launch)


@pytest.mark.parametrize("kind", [".onnx", ".pt2"])
def test_an_export_takes_texts_too(runs, tmp_path, kind):
    """The file's runtime is given token ids of another length than at the export, made by its own tokenizer."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path / f"both{kind}"
    done = succeed("evaluate.py", runs / "teacher" / "best.pth", "--export", target)
    assert float(re.search(r"largest difference of logits ([\d.e+-]+)", done.stdout)[1]) < 1e-4
    about = json.loads((tmp_path / f"both{kind}.json").read_text())
    assert about["outputs"] == ["logits_organ", "logits_plane"] and about["classes"] == CLASSES
    tokenizer = AutoTokenizer.from_pretrained(f"{target}.tokenizer")
    tokens = tokenizer(["axial view of the liver", "view"], padding="max_length", max_length=9, truncation=True)
    inputs = {"image": np.zeros((2, 3, 16, 16), np.float32)}
    inputs.update({name: np.array(tokens[name], np.int64) for name in ("input_ids", "attention_mask")})
    if kind == ".onnx":
        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        found = session.run(None, inputs)
    else:
        found = [
            v.detach().numpy() for v in torch.export.load(target).module()(*map(torch.from_numpy, inputs.values()))
        ]
    model, _ = load_model(load_checkpoint(runs / "teacher" / "best.pth"))
    with torch.no_grad():
        expected = model({name: torch.from_numpy(value) for name, value in inputs.items()})
    for name, values in zip(about["outputs"], found):
        assert np.abs(values - expected[name].numpy()).max() < 1e-4
