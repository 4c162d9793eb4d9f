"""evaluate.py --predict on images that are no dataset; the probabilities are those of the run's own predictions."""

import csv

import numpy as np
import pytest
from conftest import succeed
from PIL import Image
from scipy.special import softmax
from sklearn.datasets import load_digits

from common.run import UserError
from evaluate import table_header

SMALL = ["--device", "cpu", "--batch-size", 32, "--epochs", 1, "--workers", 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student of the digits."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    succeed("train_student.py", *SMALL, "--dataset", "digits", "--output", folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, run):
    """(folder, {path below it: probabilities (10,)}): the test digits as grey PNGs in three folders, one hidden and two
    broken files."""
    root = tmp_path_factory.mktemp("pictures")
    stored = np.load(run / "predictions_test.npz", allow_pickle=False)
    images, expected = load_digits().images, {}
    for i, (name, probabilities) in enumerate(zip(stored["ids"], softmax(stored["logits"].astype(np.float64), 1))):
        number = int(name.split("/")[1])
        path = root / f"part {i % 3}" / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.rint(images[number] * 255 / 16).astype(np.uint8)).save(path)
        expected[str(path.relative_to(root))] = probabilities
    (root / "part 1" / ".hidden.png").write_bytes((root / next(iter(expected))).read_bytes())
    (root / "part 1" / "broken.png").write_bytes(b"no image")
    (root / "part 2" / "notes.txt").write_text("no image")
    return root, expected


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def predict(here):
    """evaluate.py in this process, in the empty folder tmp_path; it must go well: its stdout."""

    def run(*args):
        code, out, errors = here("evaluate.py", *args, "--device", "cpu", "--workers", 0)
        assert code == 0 and not errors, (code, errors)
        return out

    return run


def test_probabilities_are_those_of_the_test_split(run, pictures, tmp_path):
    root, expected = pictures
    done = succeed("evaluate.py", run / "best.pth", "--predict", root, "--device", "cpu", "--workers", 0, cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.csv"]
    rows = table(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["path", "predicted", "confidence", *map(str, range(10))]
    assert [row["path"] for row in rows] == sorted(str(root / name) for name in expected) and len(rows) == 719
    found = np.array([[float(row[str(c)]) for c in range(10)] for row in rows])
    wanted = np.array([expected[row["path"][len(str(root)) + 1 :]] for row in rows])
    assert np.abs(found - wanted).max() < 1e-6
    assert [int(row["predicted"]) for row in rows] == found.argmax(1).tolist()
    assert [float(row["confidence"]) for row in rows] == found.max(1).tolist()
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("skipped:")] == [
        line for line in lines if "broken.png" in line
    ] and "broken.png" in done.stdout
    assert "719 images" in done.stdout and lines[-1] == "predictions.csv"
    counts = {
        line.split()[0]: int(line.split()[1])
        for line in lines[lines.index(next(x for x in lines if "719 images" in x)) + 1 : -1]
    }
    of_class = np.bincount(found.argmax(1), minlength=10)
    assert counts == {str(c): n for c, n in enumerate(of_class) if n}


def test_images_and_folders_in_order_each_once(run, pictures, tmp_path):
    root, expected = pictures
    names = sorted(expected)
    one, other = next(n for n in names if n.startswith("part 0")), next(n for n in names if n.startswith("part 2"))
    succeed(
        "evaluate.py",
        run / "best.pth",
        "--predict",
        other,
        "part 0",
        one,
        "--output",
        tmp_path / "new" / "p.csv",
        "--device",
        "cpu",
        "--workers",
        0,
        "--batch-size",
        7,
        cwd=root,
    )
    rows = table(tmp_path / "new" / "p.csv")
    assert [row["path"] for row in rows] == [*(n for n in names if n.startswith("part 0")), other]
    for row in rows[:3] + rows[-1:]:
        assert [float(row[str(c)]) for c in range(10)] == pytest.approx(expected[row["path"]].tolist(), abs=1e-6)


def test_any_mode_size_and_turn(run, pictures, tmp_path, predict):
    """One digit, written in many ways that lose nothing, has the probabilities of the plain file."""
    root, expected = pictures
    name = sorted(expected)[0]
    grey = Image.open(root / name)
    pixels = np.asarray(grey)
    grey.convert("RGB").save(tmp_path / "colour.png")
    grey.convert("RGB").quantize(64).save(tmp_path / "palette.png")
    grey.convert("RGBA").save(tmp_path / "transparent.png")
    grey.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    turned, exif = grey.rotate(90, expand=True), Image.Exif()  # counter-clockwise; orientation 6 says to turn it back
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 31, 3), np.uint8)).save(tmp_path / "large.jpg")
    out = predict(run / "best.pth", "--predict", ".", "--window", 0, 65535)
    rows = {row["path"]: row for row in table(tmp_path / "predictions.csv")}
    assert list(rows) == [
        "cmyk.tif",
        "colour.png",
        "deep.png",
        "large.jpg",
        "palette.png",
        "transparent.png",
        "turned.png",
    ], out
    for path, row in rows.items():
        found = [float(row[str(c)]) for c in range(10)]
        assert sum(found) == pytest.approx(1, abs=1e-6)
        if path != "large.jpg":
            assert found == pytest.approx(expected[name].tolist(), abs=1e-6), path


def test_several_tasks(tmp_path, predict, refused):
    """A model that was trained with texts at hand, on images alone; of a model that reads texts the words of a
    refusal."""
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "images").mkdir(parents=True)
    for split, count in (("train", 24), ("val", 12), ("test", 12)):
        lines = []
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(
                tmp_path / "data" / "images" / f"{split}_{i:02d}.png"
            )
            lines.append(
                f'{{"image": "{split}_{i:02d}.png", "text": "a view", "organ": "{"abc"[i % 3]}", "plane": '
                f'"{"xy"[i // 3 % 2]}"}}\n'
            )
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines))
    flags = [
        *SMALL,
        "--batch-size",
        12,
        "--dataset",
        "image_text",
        "--data-root",
        "data",
        "--tasks",
        "organ",
        "plane",
        "--resolution",
        16,
        "--image-model",
        "resnet8",
        "--fusion-dim",
        32,
    ]
    succeed("train_student.py", *flags, "--inputs", "image", "--output", "run", cwd=tmp_path)
    images = sorted((tmp_path / "data" / "images").glob("test_*.png"))
    out = predict("run/best.pth", "--predict", *images)
    rows, stored = (
        table(tmp_path / "predictions.csv"),
        np.load(tmp_path / "run" / "predictions_test.npz", allow_pickle=False),
    )
    assert list(rows[0]) == [
        "path",
        "organ_predicted",
        "organ_confidence",
        "organ_a",
        "organ_b",
        "organ_c",
        "plane_predicted",
        "plane_confidence",
        "plane_x",
        "plane_y",
    ]
    assert [row["path"] for row in rows] == list(map(str, images))
    for task, names in (("organ", "abc"), ("plane", "xy")):
        wanted = softmax(stored[f"logits_{task}"].astype(np.float64), 1)[np.argsort(stored["ids"])]
        assert (
            np.abs(np.array([[float(row[f"{task}_{name}"]) for name in names] for row in rows]) - wanted).max() < 1e-6
        )
        assert [row[f"{task}_predicted"] for row in rows] == [names[c] for c in wanted.argmax(1)]
        assert f"{task}: " in out
    succeed(
        "train_student.py",
        *flags,
        "--text-model",
        "bert-tiny-scratch",
        "--max-length",
        8,
        "--output",
        "both",
        cwd=tmp_path,
    )
    refused(
        "evaluate.py",
        tmp_path / "both/best.pth",
        "--predict",
        images[0],
        "--overwrite",
        words=["reads texts", "--inputs image"],
    )


def test_refusals(run, pictures, tmp_path, refused):
    root, expected = pictures
    image, best = root / sorted(expected)[0], run / "best.pth"
    for flags, words in (
        (["--knn"], ["--knn and --predict"]),
        (["--linear-probe"], ["--linear-probe and --predict"]),
        (["--split", "test"], ["--split and --predict"]),  # its default, but said
        (["--dataset", "digits"], ["--dataset and --predict"]),
        (["--teacher-checkpoint", best], ["--teacher-checkpoint and --predict"]),
        (["--output", "somewhere"], ["--output somewhere", ".csv"]),
    ):
        refused("evaluate.py", best, "--predict", image, *flags, words=words)
    refused("evaluate.py", best, "--predict", tmp_path / "gone", words=["gone", "no such file"])
    (tmp_path / "empty").mkdir()
    refused("evaluate.py", best, "--predict", tmp_path / "empty", words=["empty holds no images"])
    refused(
        "evaluate.py",
        best,
        "--predict",
        root / "part 1" / "broken.png",
        words=["all 1 images are broken", "broken.png"],
    )
    refused("evaluate.py", best, "--overwrite", words=["--overwrite needs --predict"])
    refused("evaluate.py", root, "--predict", image, words=["stored embeddings"])
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_file_is_replaced_only_when_told(run, pictures, tmp_path, predict, refused):
    root, expected = pictures
    args = [run / "best.pth", "--predict", root / sorted(expected)[0]]
    (tmp_path / "predictions.csv").write_text("mine")
    refused("evaluate.py", *args, words=["predictions.csv is there", "--overwrite"])
    assert (tmp_path / "predictions.csv").read_text() == "mine"
    predict(*args, "--overwrite")
    assert len(table(tmp_path / "predictions.csv")) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_model_without_a_head_is_refused(run, pictures, tmp_path, refused):
    root, expected = pictures
    succeed(
        "distill.py",
        *SMALL,
        "--teacher-checkpoint",
        run / "best.pth",
        "--loss",
        "embedding=1",
        "--limit-train",
        64,
        "--allow-weak-teacher",
        "--output",
        "run",
        cwd=tmp_path,
    )
    refused("evaluate.py", tmp_path / "run/best.pth", "--predict", root / sorted(expected)[0], words=["has no head"])


def test_columns_of_one_name_are_refused():
    assert table_header({"label": ["a", "b"]}) == ["path", "predicted", "confidence", "a", "b"]
    with pytest.raises(UserError, match="'confidence'"):
        table_header({"label": ["confidence", "b"]})
    with pytest.raises(UserError, match="'a_predicted'"):
        table_header({"a": ["predicted", "b"]})
