"""Filtering of generated images: an unlabelled folder's embeddings, nearest real images, kept.txt, --include-list."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from conftest import run_script, succeed
from PIL import Image

from common.augment import Policy
from common.data import DataError, load_splits
from common.embeddings import Store, Writer, model_of, nearest
from common.run import UserError
from common.unlabeled import load_folder

SCRIPT = "extract_embeddings.py"
MODEL = ["--model", "resnet8", "--device", "cpu"]
COUNT = 12  # of good images, and of noise


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The store of scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("real")
    succeed(SCRIPT, *MODEL, "--dataset", "digits", "--splits", "train", "--output", folder / "e")
    return folder / "e"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A nested folder: real digits of test, a little perturbed, and pure noise; the folders' file names are the
    same."""
    folder, test, rng = tmp_path_factory.mktemp("generated") / "g", load_splits("digits").test, np.random.default_rng(0)
    for i in range(COUNT):
        good = np.clip(test.read(i)[:, :, 0] + rng.normal(0, 4, (8, 8)), 0, 255).astype(np.uint8)
        save(folder / (f"{i}.png" if i < 3 else f"good/deep/{i}.png"), good)
        save(folder / "noise" / f"{i}.png", rng.integers(0, 256, (8, 8), dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def filtered(real, generated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("filtered") / "f"
    done = succeed(
        SCRIPT, *MODEL, "--images", generated, "--reference", real, "--keep-fraction", 0.5, "--output", folder
    )
    return folder, done.stdout


def brute_force(own, others):
    """(N,) distances, (N,) rows, in float64, one by one."""
    table = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in others] for a in own.astype(np.float64)])
    return table.min(1), table.argmin(1)


# ---------------------------------------------------------------------------------------------------------- the script


def test_the_folder_s_store(filtered, generated):
    store = Store(filtered[0] / "images_embeddings")
    assert sorted(store.ids) == sorted(str(p.relative_to(generated)) for p in generated.rglob("*.png"))
    assert (
        len(store) == 2 * COUNT
        and set(store.labels) == {-1}
        and store.arrays["embeddings"].shape == (2 * COUNT, 1, 512)
    )
    meta = store.meta
    assert meta["split"] == "images" and meta["dataset"] is None and meta["resolution"] == 8  # the reference's
    assert not (filtered[0] / "train_embeddings").exists()


def test_noise_is_dropped(filtered, real, generated):
    folder, said = filtered
    kept = (folder / "kept.txt").read_text().splitlines()
    assert sorted(kept) == sorted(
        str(p.relative_to(generated)) for p in generated.rglob("*.png") if "noise" not in p.parts
    )
    with open(folder / "distances.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    store, reference = Store(folder / "images_embeddings"), Store(real / "train_embeddings")
    distances, places = brute_force(
        store.arrays["embeddings"][:, 0], reference.arrays["embeddings"][:, 0].astype(np.float64)
    )
    order = np.argsort(distances, kind="stable")
    assert [row["id"] for row in rows] == list(store.ids[order]) and kept == list(store.ids[order[:COUNT]])
    assert np.allclose([float(row["distance"]) for row in rows], distances[order], rtol=1e-4)
    assert [row["nearest"] for row in rows] == list(reference.ids[places[order]])
    line = said.splitlines()[-1]
    assert f"kept.txt: {COUNT} of {2 * COUNT} images" in line
    assert f"at most {distances[order[COUNT - 1]]:.4g} from" in line and f"nearest of {len(reference)}" in line


def test_another_fraction_needs_no_extraction(filtered, real, generated, tmp_path):
    folder = tmp_path / "f"
    shutil.copytree(filtered[0], folder)
    values = (folder / "images_embeddings" / "embeddings.npy").read_bytes()
    done = succeed(
        SCRIPT,
        *MODEL,
        "--images",
        generated,
        "--reference",
        real / "train_embeddings",
        "--keep-fraction",
        0.01,
        "--output",
        folder,
    )
    assert "images_embeddings: complete" in done.stdout
    assert (folder / "kept.txt").read_text().splitlines() == (filtered[0] / "kept.txt").read_text().splitlines()[:1]
    assert (folder / "images_embeddings" / "embeddings.npy").read_bytes() == values


def test_shards_of_a_folder(filtered, real, generated, tmp_path):
    flags = [*MODEL, "--images", generated, "--resolution", 8, "--output", tmp_path]
    for shard in ("0/2", "1/2"):
        succeed(SCRIPT, *flags, "--shard", shard)
    succeed(SCRIPT, "--merge", 2, "--images", generated, "--output", tmp_path)
    assert list(Store(tmp_path / "images_embeddings").ids) == list(Store(filtered[0] / "images_embeddings").ids)


def test_train_of_a_dataset_ranked_by_itself(real, tmp_path):
    """No image is its own neighbour: the nearest is another one, as when itself is taken away."""
    shutil.copytree(real, tmp_path / "copy")
    succeed(
        SCRIPT,
        *MODEL,
        "--dataset",
        "digits",
        "--splits",
        "train",
        "--reference",
        real,
        "--keep-fraction",
        1,
        "--output",
        tmp_path / "copy",
    )
    with open(tmp_path / "copy" / "distances.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    store = Store(real / "train_embeddings")
    assert len(rows) == len(store) and all(row["nearest"] != i for i, row in rows.items())
    values = store.arrays["embeddings"][:, 0].astype(np.float64)
    for i in range(0, len(store), 200):
        distance, place = brute_force(values[i : i + 1], np.delete(values, i, 0))
        assert float(rows[store.ids[i]]["distance"]) == pytest.approx(distance[0], rel=1e-4)


def test_another_folder_of_the_same_names_is_other_images(filtered, generated, tmp_path):
    shutil.copytree(generated, tmp_path / "g")
    save(tmp_path / "g" / "0.png", np.full((8, 8), 99, np.uint8))
    done = run_script(SCRIPT, *MODEL, "--images", tmp_path / "g", "--resolution", 8, "--output", filtered[0])
    assert done.returncode == 2 and "holds other embeddings" in done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--reference", "{real}", "--keep-fraction", "0"], "0 must be above 0"),
        (["--reference", "{real}", "--keep-fraction", "1.5"], "at most 1"),
        (["--reference", "{real}", "--keep-fraction", "nan"], "nan"),
        (["--reference", "{real}"], "--keep-fraction F belong together"),
        (["--keep-fraction", "0.5"], "belong together"),
        (["--reference", "{real}", "--keep-fraction", "0.5", "--shard", "0/2"], "--merge"),
        (
            ["--reference", "nowhere", "--keep-fraction", "0.5"],
            "nowhere/train_embeddings is not a folder of stored embeddings",
        ),
        (
            ["--reference", "{real}", "--keep-fraction", "0.5", "--seed", "1"],
            'weights: "random, seed 0", not "random, seed 1"',
        ),
        (["--reference", "{real}", "--keep-fraction", "0.5", "--model", "resnet18"], 'name: "resnet8", not "resnet18"'),
        (["--reference", "{real}", "--keep-fraction", "0.5", "--resolution", "16"], "resolution: 8, not 16"),
        (["--reference", "{real}", "--keep-fraction", "0.5", "--pooling", "mean"], 'pooling: null, not "mean"'),
        (["--images", "{empty}"], "holds no images"),
        (["--images", "nowhere"], "--images nowhere is not a folder"),
        (["--dataset", "digits"], "--dataset and --images cannot be combined"),
        (["--data-root", "x"], "--data-root and --images cannot be combined"),
        (["--fold", "0"], "--fold and --images cannot be combined"),
        (["--splits", "train", "val", "test"], "--splits and --images cannot be combined"),
        (["--save-logits"], "--checkpoint"),
    ],
)
def test_bad_flags(real, generated, tmp_path, flags, words):
    (tmp_path / "empty").mkdir()
    flags = [f.format(real=real, empty=tmp_path / "empty") for f in flags]
    done = run_script(SCRIPT, *MODEL, "--images", generated, *flags, "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_reference_is_not_what_is_written(real):
    before = (real / "train_embeddings" / "embeddings.npy").read_bytes()
    done = run_script(
        SCRIPT,
        *MODEL,
        "--dataset",
        "digits",
        "--splits",
        "train",
        "--overwrite",
        "--reference",
        real,
        "--keep-fraction",
        0.5,
        "--output",
        real,
    )
    assert done.returncode == 2 and "is what this command writes" in done.stderr
    assert (real / "train_embeddings" / "embeddings.npy").read_bytes() == before


def test_a_store_of_a_folder_teaches_nobody(filtered):
    done = run_script("distill.py", "--teacher-embeddings", filtered[0])
    assert (
        done.returncode == 2
        and "train_embeddings is not a folder of stored embeddings" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_broken_images(real, generated, tmp_path):
    shutil.copytree(generated, tmp_path / "g")
    (tmp_path / "g" / "broken.png").write_bytes(b"no image")
    flags = [*MODEL, "--images", tmp_path / "g", "--reference", real, "--keep-fraction", 1, "--output", tmp_path / "f"]
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 2 and "broken.png" in done.stderr and len(done.stderr.splitlines()) == 1
    succeed(SCRIPT, *flags, "--on-bad-image", "skip", "--overwrite")
    assert len((tmp_path / "f" / "kept.txt").read_text().splitlines()) == 2 * COUNT
    shutil.rmtree(tmp_path / "g")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="all 1 images are broken, as cannot read image .*broken.png"):
        load_folder(str(tmp_path / "g"), on_bad_image="skip")


def test_logits_of_a_checkpoint(teacher, generated, tmp_path):
    """A checkpoint brings its resolution and classes; its plain image is the same as through a dataset."""
    succeed(
        SCRIPT,
        "--checkpoint",
        teacher / "best.pth",
        "--images",
        generated,
        "--save-logits",
        "--num-views",
        2,
        "--device",
        "cpu",
        "--output",
        tmp_path,
    )
    store = Store(tmp_path / "images_embeddings")
    assert store.arrays["logits"].shape == (2 * COUNT, 2, 10) and store.meta["classes"] == [str(i) for i in range(10)]
    good = [i for i in store.ids if not i.startswith("noise")]
    predicted = store.read("logits", store.rows(good), np.zeros(len(good), int)).argmax(1)
    labels = [load_splits("digits").test.labels[int(i.rsplit("/", 1)[-1].removesuffix(".png"))] for i in good]
    assert (predicted == labels).mean() > 0.6


# --------------------------------------------------------------------------------------------------------- the distance


def store_of(folder, values, ids=None, **meta):
    ids = ids or [f"{folder.name}{i}" for i in range(len(values))]
    meta = {"seed": 0, "policy": Policy().to_dict(), "num_views": values.shape[1], **meta}
    writer = Writer(str(folder), meta, ids, np.full(len(ids), -1), {"embeddings": values.shape[1:]}, "float32")
    writer.write(np.arange(len(ids)), {"embeddings": values})
    writer.finish()
    return Store(str(folder))


@pytest.mark.parametrize("chunk", [1, 7, 40, 64, 1000])
def test_chunks_change_nothing(tmp_path, chunk):
    """Far from the origin, near each other: what a product of matrices alone would round away.  View 1 must not
    count."""
    rng = np.random.default_rng(1)
    own, others = (300 + rng.normal(0, 1, (n, 2, 24)).astype(np.float32) for n in (40, 64))
    own[:8, 0] = others[10:18, 0] + 1e-3
    distances, rows = nearest(store_of(tmp_path / "a", own), store_of(tmp_path / "b", others), chunk=chunk)
    expected, places = brute_force(own[:, 0], others[:, 0].astype(np.float64))
    assert (
        np.array_equal(rows, places) and np.allclose(distances, expected, rtol=1e-4) and distances.dtype == np.float32
    )


def test_an_image_is_not_its_own_neighbour(tmp_path):
    values = np.array([[0.0, 10], [0, 12], [0, 20], [0, 23]], np.float32)[:, None]
    store = store_of(tmp_path / "a", values, ids=["w", "x", "y", "z"])
    distances, rows = nearest(store, store, chunk=3)
    assert rows.tolist() == [1, 0, 3, 2] and distances.tolist() == [2, 2, 3, 3]
    moved = values + np.float32([0, 0.01])  # the same images, in another precision
    distances, rows = nearest(store_of(tmp_path / "b", moved, ids=["w", "x", "y", "z"]), store)
    assert rows.tolist() == [1, 0, 3, 2]
    other = values + np.float32([3, 0])  # other images, of another folder, of the same names
    distances, rows = nearest(store_of(tmp_path / "c", other, ids=["w", "x", "y", "z"]), store)
    assert rows.tolist() == [0, 1, 2, 3] and distances.tolist() == [3, 3, 3, 3]
    distances, rows = nearest(store_of(tmp_path / "d", values, ids=["p", "q", "r", "s"]), store)  # copies count
    assert rows.tolist() == [0, 1, 2, 3] and not distances.any()
    one = store_of(tmp_path / "e", values[:1], ids=["w"])
    with pytest.raises(UserError, match="holds no image but w itself"):
        nearest(store, one)


def test_what_makes_a_model_the_same():
    def meta(weights="hub", parameters=1, sha=None, mean=0.5):
        preprocess = {"resolution": 8, "mean": [mean] * 3, "std": [1.0] * 3}
        return {
            "pooling": None,
            "teacher": {
                "name": "n",
                "weights": weights,
                "sha256": sha,
                "parameters": parameters,
                "preprocess": preprocess,
            },
        }

    assert model_of(meta()) == model_of(meta(parameters=2))  # another head
    random = "random, seed 0"
    assert model_of(meta(random)) != model_of(meta(random, parameters=2)) and model_of(meta(sha="a")) != model_of(
        meta(sha="b")
    )
    assert model_of(meta()) != model_of(meta(mean=0.4))


# -------------------------------------------------------------------------------------------------- kept.txt as a
# filter


def test_kept_images_train(filtered, generated, tmp_path):
    """As the class `a` of an image folder, beside real images of `b`, that a second list adds."""
    test = load_splits("digits").test
    shutil.copytree(generated, tmp_path / "train" / "a")
    for i in range(20, 32):
        save(tmp_path / "train" / "b" / f"real{i}.png", test.read(i))
        save(tmp_path / "test" / "ab"[i % 2] / f"{i}.png", test.read(i))
    kept = (filtered[0] / "kept.txt").read_text()
    (tmp_path / "list.txt").write_text(kept + "".join(f"b/real{i}.png\n" for i in range(20, 32)))
    whole = load_splits("imagefolder", str(tmp_path), val_split=0.2)
    for seed in range(4):  # 0.png is a/0.png and a/noise/0.png, also where one of them is in val
        with pytest.raises(DataError, match=r"'[012].png' is the name of 2 images of train"):
            load_splits(
                "imagefolder", str(tmp_path), val_split=0.4, split_seed=seed, include_list=str(tmp_path / "list.txt")
            )
    (tmp_path / "list.txt").write_text(
        "".join(f"a/{line}\n" for line in kept.splitlines()) + "".join(f"real{i}\n" for i in range(20, 32))
    )
    splits = load_splits("imagefolder", str(tmp_path), val_split=0.2, include_list=str(tmp_path / "list.txt"))
    assert set(splits.train.ids) == {i for i in whole.train.ids if "noise" not in i} and splits.val.ids == whole.val.ids
    assert any("noise" in i for i in whole.train.ids) and any("deep" in i for i in splits.train.ids)


def test_kept_images_beside_isic2024(filtered, generated, tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "train-image.hdf5", "w") as file, open(tmp_path / "train-metadata.csv", "w") as table:
        table.write("isic_id,target,patient_id\n")
        for i in range(60):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), 20 + i, np.uint8)).save(buffer, "JPEG")
            file[f"ISIC_{i:07d}"] = np.void(buffer.getvalue())
            table.write(f"ISIC_{i:07d},{int(i % 4 == 0)},p{i}\n")
    plain = load_splits("isic2024", str(tmp_path))
    options = {"extra_train": str(generated), "include_list": str(filtered[0] / "kept.txt")}
    splits = load_splits("isic2024", str(tmp_path), **options)
    good = [p.relative_to(generated).as_posix() for p in generated.rglob("*.png") if "noise" not in p.parts]
    assert splits.train.ids[: len(plain.train)] == plain.train.ids  # the list does not judge the real ones
    assert sorted(splits.train.ids[len(plain.train) :]) == sorted(
        f"extra/{i}" for i in good
    )  # 0.png is not noise/0.png
    assert (
        splits.val.ids == plain.val.ids
        and splits.test.ids == plain.test.ids
        and set(splits.train.labels[len(plain.train) :]) == {1}
    )
    assert "not in" not in capsys.readouterr().out
    (tmp_path / "l.txt").write_text("extra/0.png\nnoise/1.png\ndeep/5.png\ngood/deep/4\nISIC_0000000\n")
    splits = load_splits("isic2024", str(tmp_path), extra_train=str(generated), include_list=str(tmp_path / "l.txt"))
    assert set(splits.train.ids) - set(plain.train.ids) == {"extra/0.png", "extra/noise/1.png", "extra/good/deep/5.png"}
    assert "2 names of" in capsys.readouterr().out
    for names, match in (
        ("5.png", "'5.png' is the name of 2 images of the extra images"),
        ("ISIC_0000000", "leaves the extra images empty"),
    ):
        (tmp_path / "l.txt").write_text(names)
        with pytest.raises(DataError, match=match):
            load_splits("isic2024", str(tmp_path), extra_train=str(generated), include_list=str(tmp_path / "l.txt"))


@pytest.mark.parametrize("name", ["digits", "medmnist"])
def test_datasets_in_memory_take_a_list(tmp_path, name):
    digits, root = load_splits("digits"), None
    if name == "medmnist":
        root = str(tmp_path / "x.npz")
        np.savez(
            root,
            **{
                f"{split}_{what}": value
                for split in ("train", "val", "test")
                for what, value in (
                    ("images", getattr(digits, split).images),
                    ("labels", getattr(digits, split).labels[:, None]),
                )
            },
        )
    train = load_splits(name, root).train
    (tmp_path / "l.txt").write_text("\n".join([train.ids[-1], *(i.split("/")[1] for i in train.ids[:99])]))
    assert load_splits(name, root, include_list=str(tmp_path / "l.txt")).train.ids == [*train.ids[:99], train.ids[-1]]


def test_names_with_odd_bytes(real, tmp_path):
    for i, name in enumerate(["a b.png", 'ü,".png', b"\xff.png".decode("utf-8", "surrogateescape")]):
        save(tmp_path / "g" / name, load_splits("digits").test.read(i))
    succeed(
        SCRIPT,
        *MODEL,
        "--images",
        tmp_path / "g",
        "--reference",
        real,
        "--keep-fraction",
        1,
        "--output",
        tmp_path / "f",
    )
    names = (tmp_path / "f" / "kept.txt").read_text(errors="surrogateescape").splitlines()
    assert sorted(names) == sorted(p.name for p in (tmp_path / "g").iterdir())
    assert json.loads((tmp_path / "f" / "images_embeddings" / "meta.json").read_text())["count"] == 3
