"""data.py: decoding, datasets, splits, and each way in which data can be wrong."""

import hashlib
import os
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA
from PIL import Image

from common.data import DataError, ImageDataset, Splits, load_splits, read_image, split_off, stratified_rows
from common.medical import to_uint8

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def photo():
    """A real photo, 427 x 640 x 3 uint8, bundled with scikit-learn."""
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")


@pytest.fixture(scope="module")
def tiles(photo):
    """260 real images of 32 x 32 x 3."""
    return np.stack([photo[32 * i : 32 * i + 32, 32 * j : 32 * j + 32] for i in range(13) for j in range(20)])


def make_folder(root, tiles, counts, size=16):
    """An image folder of PNGs; counts: {split: {class: number}}."""
    number = 0
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(tiles[number % len(tiles)][:size, :size]).save(folder / f"{i:03d}.png")
                number += 1
    return root


def fails(*args, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        load_splits(*args, **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- decoding


def write_png16(path, array, colour_type):
    """A PNG of 16 bits a channel by hand (Pillow writes grey ones only); colour_type: 0 grey, 2 RGB, 6 RGBA."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_read_rgb_grey_and_bilevel(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "rgb.png")
    image = read_image(tmp_path / "rgb.png", 1000)
    assert image.dtype == np.uint8 and np.array_equal(image, photo)
    Image.fromarray(photo[..., 1]).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png", 1000), np.stack([photo[..., 1]] * 3, 2))
    Image.fromarray(photo[..., 1] > 127).save(tmp_path / "bilevel.png")
    assert np.array_equal(read_image(tmp_path / "bilevel.png", 1000)[..., 2], (photo[..., 1] > 127) * 255)


def test_read_transparency_is_black(tmp_path, photo):
    small, alpha = photo[:20, :30], np.linspace(0, 255, 600).astype(np.uint8).reshape(20, 30)
    expected = small.astype(int) * alpha[..., None] / 255
    Image.fromarray(np.dstack([small, alpha])).save(tmp_path / "rgba.png")
    assert np.abs(read_image(tmp_path / "rgba.png") - expected).max() <= 1
    Image.fromarray(np.dstack([small[..., 0], alpha]), "LA").save(tmp_path / "la.png")
    assert np.abs(read_image(tmp_path / "la.png") - expected[..., :1]).max() <= 1

    palette = Image.fromarray(small).quantize(4)  # a palette, of which colours 1 and 2 are see-through and half so
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0, 128, 255]))
    indices, colours = np.asarray(palette), np.array(palette.getpalette()[:12]).reshape(4, 3)
    expected = (colours * np.array([[255], [0], [128], [255]]) / 255)[indices]
    assert set(np.unique(indices)) == {0, 1, 2, 3}
    assert np.abs(read_image(tmp_path / "palette.png") - expected).max() <= 1
    palette.save(tmp_path / "opaque.png")
    assert np.array_equal(read_image(tmp_path / "opaque.png"), colours[indices])
    palette.save(tmp_path / "palette.gif", transparency=3)
    assert (read_image(tmp_path / "palette.gif")[indices == 3] == 0).all()

    Image.fromarray(small).save(tmp_path / "key.png", transparency=tuple(int(v) for v in small[3, 4]))
    image, keyed = read_image(tmp_path / "key.png"), (small == small[3, 4]).all(2)
    assert (image[keyed] == 0).all() and np.array_equal(image[~keyed], small[~keyed])


def test_read_cmyk(tmp_path, photo):
    image = Image.fromarray(photo[:40, :40])
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - photo[:40, :40]).mean() < 8


def test_read_16_bit_by_a_window_or_not_at_all(tmp_path, photo):
    levels = photo[::20, ::20, 0].astype(np.uint16) * 200  # up to 51,000
    assert levels.min() < 1000 and levels.max() > 40000
    Image.fromarray(levels).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=rf"deep.png.*\({levels.min()} to {levels.max()}\).*--window LOW HIGH"):
        read_image(tmp_path / "deep.png")
    expected = [[min(max((int(v) - 1000) * 255 / 39000, 0), 255) for v in row] for row in levels]
    image = read_image(tmp_path / "deep.png", window=(1000, 40000))
    assert np.abs(image[..., 0] - np.array(expected)).max() <= 0.5 and np.array_equal(image[..., 0], image[..., 2])
    assert image.min() == 0 and image.max() == 255  # outside of the window: clipped, not wrapped
    Image.fromarray(levels).save(tmp_path / "deep.tif")
    assert np.array_equal(read_image(tmp_path / "deep.tif", window=(1000, 40000)), image)
    write_png16(tmp_path / "hand.png", levels, 0)
    assert np.array_equal(read_image(tmp_path / "hand.png", window=(1000, 40000)), image)
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "int32.tif")
    assert np.array_equal(read_image(tmp_path / "int32.tif", window=(1000, 40000)), image)
    floats = levels.astype(np.float32)
    floats[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(floats).save(tmp_path / "float.tif")
    with np.errstate(all="raise"):
        assert read_image(tmp_path / "float.tif", window=(1000, 40000))[0, :3, 0].tolist() == [0, 255, 0]
    for colour_type, channels in ((2, 3), (6, 4)):  # Pillow would keep the upper eight bits and say nothing
        write_png16(tmp_path / "colour.png", np.stack([levels] * channels, 2), colour_type)
        with pytest.raises(DataError, match="colour.png has 16-bit colour"):
            read_image(tmp_path / "colour.png", window=(1000, 40000))


def test_to_uint8():
    assert to_uint8(np.array([0, 7, 255], np.uint8), None, "x").tolist() == [0, 7, 255]
    assert to_uint8(np.array([False, True]), None, "x").tolist() == [0, 255]
    assert to_uint8(np.array([-2000, -1000, 0, 1000, 3000], np.int16), (-1000, 1000), "x").tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, np.rot90),
    ],
)
def test_read_applies_exif_rotation(tmp_path, photo, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo[:20, :30]).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), turned(photo[:20, :30]))
    Image.fromarray(photo[:400]).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    expected = turned(read_array(photo[:400], tmp_path))  # shrunk, too
    assert np.abs(read_image(tmp_path / "turned.jpg", 128) - expected).mean() < 2


def read_array(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "array.png")
    return read_image(tmp_path / "array.png", 128).astype(int)


def test_read_shrinks_to_the_decode_size(tmp_path, photo):
    import torchvision.transforms.functional as TF

    photo = photo[:400]
    expected = (
        TF.resize(torch.tensor(photo).permute(2, 0, 1).float(), [80, 128], antialias=True).permute(1, 2, 0).numpy()
    )
    for name, options in (("photo.png", {}), ("photo.jpg", {"quality": 95})):  # a JPEG is decoded at half its size
        Image.fromarray(photo).save(tmp_path / name, **options)
        image = read_image(tmp_path / name, 128)
        assert image.shape == (80, 128, 3)
        assert np.abs(image - expected).mean() < 2, name
        assert read_image(tmp_path / name, 640).shape == photo.shape  # no larger: left alone
    assert read_array(photo[:1], tmp_path).shape == (1, 128, 3)  # no side of nothing


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", ["truncated.jpg", "truncated.png", "header.png", "empty.png", "text.jpg", "missing.jpg", "noise.tif"]
)
def test_a_broken_image_is_named(tmp_path, photo, kind):
    path = tmp_path / kind
    if kind.startswith("truncated"):
        Image.fromarray(photo).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "header.png":
        Image.fromarray(photo).save(path)
        path.write_bytes(path.read_bytes()[:20])
    elif kind == "noise.tif":
        Image.fromarray(photo[:20, :20]).save(path)
        data = bytearray(path.read_bytes())
        data[4:8] = struct.pack("<I", len(data) - 3)  # the directory begins at the end
        path.write_bytes(data)
    elif kind != "missing.jpg":
        path.write_bytes(b"" if kind == "empty.png" else b"no image at all")
    with pytest.raises(DataError, match=kind) as caught:
        read_image(path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_of_any_kind_is_a_data_error(tmp_path, photo):
    """Pillow raises SyntaxError, struct.error, ValueError and more; each must end as one line that names the file."""
    rng, refused = np.random.default_rng(0), 0
    for name in ("x.png", "x.gif", "x.tif", "x.bmp", "x.jpg"):
        Image.fromarray(photo[:16, :16]).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for at in rng.integers(0, min(200, len(whole)), 3):
                damaged[at] = rng.integers(256)
            (tmp_path / name).write_bytes(damaged)
            try:
                assert read_image(tmp_path / name).dtype == np.uint8
            except DataError as error:
                refused += 1
                assert name in str(error)
    assert refused > 50


# --------------------------------------------------------------------------------------------------------------- splits


def test_digits():
    from sklearn.datasets import load_digits

    digits, splits = load_digits(), load_splits("digits")
    assert [len(getattr(splits, k)) for k in SPLITS] == [808, 270, 719] and splits.classes == [
        str(i) for i in range(10)
    ]
    assert str(splits) == "digits: 808 train, 270 val, 719 test, 10 classes"
    seen = set()
    for split in SPLITS:
        part = getattr(splits, split)
        for i in range(0, len(part), 10):
            sample = part[i]
            row = int(sample["id"].split("/")[1])
            assert sample["index"] == i and sample["targets"] == {"label": int(digits.target[row])}
            assert sample["image"].dtype == torch.uint8 and sample["image"].shape == (3, 8, 8)
            assert np.abs(sample["image"][1].numpy() - digits.images[row] * 255 / 16).max() <= 0.5
        seen.update(part.ids)
    assert len(seen) == 1797
    # test never changes, whatever the seeds: figures of different versions compare
    assert splits.test.fingerprint(splits.classes) == DIGITS_TEST
    assert load_splits("digits", split_seed=9).test.ids == splits.test.ids


DIGITS_TEST = "a43a5c3ba851809e6243a816944ecb12779cc79c1aaf67ef655831c44db69864"


def test_validation_split_is_stratified_and_disjoint():
    splits = load_splits("digits", val_split=0.2)
    together = np.concatenate([splits.train.labels, splits.val.labels])
    assert len(splits.val) == round(0.2 * 1078) and not set(splits.val.ids) & set(splits.train.ids)
    for c in range(10):
        assert abs((splits.val.labels == c).sum() - 0.2 * (together == c).sum()) < 1
    with_ids = dict(zip(splits.train.ids, splits.train.labels))
    assert all(splits.train.labels[i] == with_ids[splits.train.ids[i]] for i in range(50))
    assert np.array_equal(splits.val.keys, load_splits("digits", val_split=0.2).val.keys)


def test_only_the_split_seed_moves_the_split():
    first = load_splits("digits", limit_train=300)
    torch.manual_seed(123)
    np.random.seed(123)
    assert load_splits("digits", limit_train=300).describe() == first.describe()
    other = load_splits("digits", limit_train=300, split_seed=1)
    assert set(other.val.ids) != set(first.val.ids) and set(other.train.ids) != set(first.train.ids)
    assert load_splits("digits").val.ids == first.val.ids  # --limit-train does not touch val


def test_limit_train_keeps_the_proportions():
    whole, part = load_splits("digits").train, load_splits("digits", limit_train=100).train
    assert len(part) == 100 and set(part.ids) < set(whole.ids)
    for c in range(10):
        assert abs((part.labels == c).sum() - 100 * (whole.labels == c).mean()) < 1
    assert len(load_splits("digits", limit_train=808).train) == 808
    fails("digits", limit_train=809, match="--limit-train 809 is not in 1 to 808")
    fails("digits", limit_train=0, match="--limit-train 0")


@pytest.mark.parametrize("images", [None, 300])
def test_limit_labels_keeps_those_of_limit_train(images):
    """All images stay; the labels are those of the images that --limit-train would have left."""
    few, splits = (
        load_splits("digits", limit_train=100, split_seed=3),
        load_splits("digits", limit_train=images, limit_labels=100, split_seed=3),
    )
    train, whole = splits.train, load_splits("digits", limit_train=images, split_seed=3).train
    assert train.ids == whole.ids and len(train) == (images or 808)
    kept = np.isin(train.ids, few.train.ids)
    assert kept.sum() == 100 and (train.labels[kept] == whole.labels[kept]).all() and (train.labels[~kept] == -1).all()
    assert (splits.val.labels >= 0).all() and (splits.test.labels >= 0).all()
    told = splits.describe()
    assert told["labelled"] == {
        "train": 100,
        "sha256": few.describe()["sha256"]["train"],
    }  # what a baseline is found by
    assert told["sizes"]["train"] == len(train) and "100 with labels" in str(splits)
    assert "labelled" not in few.describe()
    fails("digits", limit_labels=809, match="--limit-labels 809 is not in 1 to 808")
    fails("digits", limit_train=50, limit_labels=51, match="--limit-labels 51 is not in 1 to 50")


def test_stratified_rows():
    labels, keys = np.array([0] * 90 + [1] * 9 + [2]), np.random.default_rng(0).integers(-(2**63), 2**63, 100)
    rows = stratified_rows(labels, keys, 10, 0, 1001)
    assert np.bincount(labels[rows], minlength=3).tolist() == [9, 1, 0] and (np.diff(rows) > 0).all()
    assert len(stratified_rows(labels, keys, 100, 0, 1001)) == 100
    order = np.random.default_rng(1).permutation(100)  # the same samples in whatever order they come
    assert set(keys[order][stratified_rows(labels[order], keys[order], 10, 0, 1001)]) == set(keys[rows])
    chosen = [keys[stratified_rows(labels, keys, 10, seed, 1001)[0]] for seed in range(20)]
    assert len(set(chosen)) > 10


def test_an_added_file_moves_few_samples():
    ids = [f"train/{i:04d}.jpg" for i in range(2000)]
    labels = np.arange(2000) % 7

    def val_of(ids, labels):
        return set(
            split_off(ImageDataset(ids, labels, np.zeros((len(ids), 2, 2), np.uint8)), len(ids) // 10, 0, 1001)[1].ids
        )

    before = val_of(ids, labels)
    for new in ("train/0000a.jpg", "train/zzz.jpg", "train/-.jpg"):
        after = val_of(sorted([*ids, new]), [labels[ids.index(i)] if i != new else 3 for i in sorted([*ids, new])])
        assert len(before ^ after) <= 5


def test_fingerprint():
    images = np.zeros((3, 2, 2), np.uint8)
    one, two = ImageDataset(["a", "b", "c"], [0, 1, 0], images), ImageDataset(["c", "a", "b"], [0, 0, 1], images)
    expected = hashlib.sha256(b"a\tcat\nb\tdog\nc\tcat\n").hexdigest()
    assert one.fingerprint(["cat", "dog"]) == two.fingerprint(["cat", "dog"]) == expected
    others = [
        one.fingerprint(["cat", "fox"]),
        ImageDataset(["a", "b", "d"], [0, 1, 0], images).fingerprint(["cat", "dog"]),
        ImageDataset(["a", "b", "c"], [0, 1, 1], images).fingerprint(["cat", "dog"]),
    ]
    assert len({expected, *others}) == 4


def test_wanted_splits_alone():
    assert load_splits("digits", splits=("test",)).train is None
    val = load_splits("digits", splits=("val",))
    assert val.train is None and val.test is None and val.val.ids == load_splits("digits").val.ids


def test_classes_are_mapped_by_name():
    """An outside test set is judged by the names of classes, never by their position."""
    backwards = [str(i) for i in reversed(range(10))]
    plain, mapped = load_splits("digits"), load_splits("digits", classes=backwards)
    assert mapped.classes == backwards and np.array_equal(mapped.test.labels, 9 - plain.test.labels)
    rotated = load_splits("digits", classes=[*"1234567890"])  # unlike a reversal no inverse of itself
    assert np.array_equal(rotated.test.labels, (plain.test.labels - 1) % 10)
    more = load_splits("digits", classes=[*plain.classes, "ten"])
    assert len(more.classes) == 11 and np.array_equal(more.test.labels, plain.test.labels)
    fails("digits", classes=["cat", "dog"], match=r"digits has 10 classes, the checkpoint knows 2 \(cat, dog.*0, 1, 2")
    fails("digits", classes=[f"c{i}" for i in range(10)], match="0, 1, 2, 3, 4 are not among them")


@pytest.mark.parametrize(
    "classes, given, expected",
    [
        (["benign", "malignant"], (), "malignant"),
        (["0", "1"], (), "1"),
        (["cancer", "normal"], (), "cancer"),
        (["NORMAL", "PNEUMONIA"], (), "PNEUMONIA"),
        (["abnormal", "normal"], (), "abnormal"),
        (["negative", "positive"], (), "positive"),
        (["no", "yes"], (), "yes"),
        (["false", "true"], (), "true"),
        (["disease", "healthy"], (), "disease"),
        (["case", "control"], (), "case"),
        (["cat", "dog"], (), "dog"),
        (["benign", "normal"], (), "normal"),
        (["cat", "dog"], ["cat"], "cat"),
        (["benign", "malignant"], ["benign"], "benign"),
        (["1", "2"], (), "2"),
    ],
)
def test_the_positive_class(classes, given, expected):
    """What --positive names, else the one beside a name that says no, else the second."""
    splits = Splits("x", "custom", classes, positive=given)
    assert splits.positive == {"label": classes.index(expected)} and splits.positive_names() == {"positive": expected}
    assert str(splits).endswith(f"positive class: {expected}")


def test_the_positive_classes_of_several_tasks():
    classes = {"organ": ["liver", "lung", "skin"], "side": ["left", "right"], "sign": ["absent", "present"]}
    assert Splits("x", "custom", classes).positive_names() == {"side_positive": "right", "sign_positive": "present"}
    assert Splits("x", "custom", classes, positive=["left", "absent"]).positive == {"side": 0, "sign": 0}
    assert Splits("x", "custom", [str(i) for i in range(10)]).positive == {}
    for names, given, match in (
        (classes, ["lung"], "--positive lung is not a class: choose left, right or absent, present"),
        (["cat", "dog"], ["cow"], "--positive cow is not a class: choose cat, dog"),
        (["cat", "dog"], ["cat", "dog"], "name one"),
        (["a", "b", "c"], ["a"], "--positive a: no task here has two classes"),
    ):
        with pytest.raises(DataError, match=match):
            Splits("x", "custom", names, positive=given)


def test_bad_values():
    fails("mnist", match="unknown dataset 'mnist': choose one of digits, cifar10")
    for share in (0, 1):
        fails("digits", val_split=share, match=f"--val-split {share} of 1078 images")


# ---------------------------------------------------------------------------------------------------------------- CIFAR


def write_cifar(folder, parts, labels_key, meta):
    """Batches as published: pickled dicts of data (N, 3072), red first, and labels; returns [[name, MD5]]."""
    folder.mkdir(parents=True)
    sums = {}
    for name, content in [
        (n, {"data": i.transpose(0, 3, 1, 2).reshape(len(i), -1), labels_key: y}) for n, i, y in parts
    ] + [meta]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return [[name, sums[name]] for name, _, _ in parts], sums[meta[0]]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, tiles, monkeypatch, name):
    import torchvision.datasets as published

    kind = {"cifar10": published.CIFAR10, "cifar100": published.CIFAR100}[name]
    labels = [i % 10 for i in range(len(tiles))]
    names = [f"class {c}" for c in range(10)]
    cuts = [0, 40, 80, 120, 160, 200, 260] if name == "cifar10" else [0, 200, 260]
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if name == "cifar10" else ["train", "test"]
    parts = [(f, tiles[a:b], labels[a:b]) for f, a, b in zip(files, cuts, cuts[1:])]
    meta_key = kind.meta["key"]
    listed, meta_sum = write_cifar(
        tmp_path / kind.base_folder,
        parts,
        "labels" if name == "cifar10" else "fine_labels",
        (kind.meta["filename"], {meta_key: names}),
    )
    monkeypatch.setattr(kind, "train_list", listed[:-1])
    monkeypatch.setattr(kind, "test_list", listed[-1:])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta_sum})
    splits = load_splits(name, str(tmp_path))
    assert [len(getattr(splits, k)) for k in SPLITS] == [180, 20, 60] and splits.classes == names
    for split, offset in (("train", 0), ("val", 0), ("test", 200)):
        part = getattr(splits, split)
        for i in range(len(part)):
            row = int(part.ids[i].split("/")[1]) + offset
            assert np.array_equal(part[i]["image"].permute(1, 2, 0), tiles[row]) and part.labels[i] == labels[row]
    os.remove(tmp_path / kind.base_folder / files[0])
    fails(name, str(tmp_path), match=rf"{name} is not in .*: add --download")


def test_cifar_errors(tmp_path):
    fails("cifar10", match="--dataset cifar10 needs --data-root")
    fails("cifar100", str(tmp_path), match="cifar100 is not in .*add --download")


# ------------------------------------------------------------------------------------------------------------- MedMNIST


def medmnist_arrays(tiles, grey=False):
    images = tiles[:60, :28, :28, 1] if grey else tiles[:60, :28, :28]
    labels = (np.arange(60) % 4).astype(np.uint8)[:, None]
    cuts = {"train": slice(0, 40), "val": slice(40, 50), "test": slice(50, 60)}
    return {f"{s}_{k}": v[cuts[s]] for s in SPLITS for k, v in (("images", images), ("labels", labels))}


@pytest.mark.parametrize("grey", [False, True])
def test_medmnist(tmp_path, tiles, grey):
    arrays = medmnist_arrays(tiles, grey)
    np.savez(tmp_path / "pathmnist.npz", **arrays)
    for root in (tmp_path, tmp_path / "pathmnist.npz"):
        splits = load_splits("medmnist", str(root))
        assert [len(getattr(splits, k)) for k in SPLITS] == [40, 10, 10] and splits.classes == ["0", "1", "2", "3"]
        for split in SPLITS:
            part = getattr(splits, split)
            assert np.array_equal(part.labels, arrays[f"{split}_labels"][:, 0]) and part.ids[1] == f"{split}/000001"
            expected = arrays[f"{split}_images"][3]
            expected = np.stack([expected] * 3) if grey else expected.transpose(2, 0, 1)
            assert np.array_equal(part[3]["image"], expected)
    fails("medmnist", str(tmp_path), val_split=0.1, match=r"--val-split 0.1: medmnist has a val split of its own \(10")
    deep = {k: v.astype(np.uint16) * 100 if "images" in k else v for k, v in arrays.items()}
    np.savez(tmp_path / "pathmnist.npz", **deep)
    fails("medmnist", str(tmp_path), match="train_images has uint16 grey levels .* --window LOW HIGH")
    scaled = load_splits("medmnist", str(tmp_path), window=(0, 25500))
    assert np.array_equal(scaled.train.images, arrays["train_images"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"val_images": None, "test_labels": None}, "is not a MedMNIST file: it lacks val_images, test_labels"),
        ({"test_labels": np.full((10, 1), 4, np.uint8)}, "test_labels are out of range: 4, train has 0, 1, 2, 3"),
        ({"val_labels": np.full((10, 1), -1)}, "val_labels are out of range .* from -1"),
        (
            {"train_labels": np.array([[255]] + [[i % 4] for i in range(39)], np.uint8)},
            "train_labels are out of range: 255",
        ),
        ({"train_labels": np.full((40, 1), 0.5)}, "train_labels are out of range .float64"),
        ({"train_labels": np.array([[np.nan]] + [[1.0]] * 39)}, "train_labels are out of range .float64"),
        ({"train_labels": np.zeros((40, 14), np.uint8)}, "the labels of train have 14 columns, val have 1 columns"),
        (
            {"train_labels": np.zeros((39, 1), np.uint8)},
            r"train_labels of shape \(39,\) are not one class for each image",
        ),
        (
            {"train_images": np.zeros((40, 28, 28, 28), np.uint8)},
            r"train_images of shape \(40, 28, 28, 28\) are neither grey",
        ),
        (
            {"val_images": np.zeros((0, 28, 28), np.uint8), "val_labels": np.zeros((0, 1), np.uint8)},
            r"val_labels of shape \(0,\) are not",
        ),
        ({"train_labels": np.array([["a"]] * 40, object)}, "cannot read .*: Object arrays"),
        ({"test_labels": np.array([["cat"]] * 10)}, "test_labels holds values of type <U3, not numbers"),
        ({"val_images": np.full((10, 28, 28), "0")}, "val_images holds values of type <U1, not numbers"),
        ({"val_images": np.zeros((10, 0, 0), np.uint8)}, r"val_images of shape \(10, 0, 0\) are neither grey"),
        (
            {"train_images": np.zeros((40, 28, 0, 3), np.uint8)},
            r"train_images of shape \(40, 28, 0, 3\) are neither grey",
        ),
    ],
)
def test_medmnist_errors(tmp_path, tiles, change, match):
    arrays = {**medmnist_arrays(tiles, grey=True), **change}
    np.savez(tmp_path / "x.npz", **{k: v for k, v in arrays.items() if v is not None})
    assert "x.npz" in fails("medmnist", str(tmp_path / "x.npz"), match=match)


def test_medmnist_in_other_forms(tmp_path, tiles, capsys):
    """Labels from 1 or as floats, a channel axis of one, a class that train lacks: what the numbers say, no spare
    class."""
    plain = medmnist_arrays(tiles, grey=True)

    def load(change, **options):
        np.savez(tmp_path / "x.npz", **{k: change.get(k.split("_")[1], lambda v: v)(v) for k, v in plain.items()})
        return load_splits("medmnist", str(tmp_path / "x.npz"), **options)

    splits = load({"labels": lambda v: v + 1})
    assert splits.classes == ["1", "2", "3", "4"] and splits.test.labels.tolist() == [2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    splits = load({"labels": lambda v: v * 3})
    assert splits.classes == ["0", "3", "6", "9"] and splits.val.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    mapped = load({"labels": lambda v: v * 3}, splits=("test",), classes=["9", "6", "3", "0"])
    assert mapped.test.labels.tolist() == [1, 0, 3, 2, 1, 0, 3, 2, 1, 0]
    splits = load({"labels": lambda v: v.astype(np.float32), "images": lambda v: v[..., None]})
    assert splits.classes == ["0", "1", "2", "3"] and splits.test.labels.tolist() == [2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    assert (
        np.array_equal(splits.test[3]["image"], np.stack([plain["test_images"][3]] * 3))
        and capsys.readouterr().out == ""
    )
    load({"images": lambda v: v.repeat(8, 1).repeat(8, 2)})  # 224 px, as in pathmnist_224.npz
    assert (
        capsys.readouterr().out
        == f"note: {tmp_path}/x.npz has images of 224 px: --resolution 224 keeps them, the default is 28\n"
    )
    load({"labels": lambda v: v if len(v) == 40 else v % 3})
    assert capsys.readouterr().out.splitlines() == [
        f"note: {s} has no image of '3' (10 images): its metrics are of the other classes" for s in ("val", "test")
    ]
    (tmp_path / "x.npz").unlink()
    arrays = {k: np.zeros_like(v) for k, v in plain.items()}
    np.savez(tmp_path / "x.npz", **arrays)
    fails("medmnist", str(tmp_path), match="--dataset medmnist has one class only, '0': there is nothing to tell apart")
    assert (
        len(load_splits("medmnist", str(tmp_path), labels=False).train) == 40
    )  # to extract embeddings there need not be two


def test_a_small_medmnist_file_that_unpacks_to_much(tmp_path, tiles, monkeypatch):
    """36 MB of zeros, packed: refused unread, and not read at all where only the other splits are wanted."""
    arrays = medmnist_arrays(tiles)
    np.savez_compressed(tmp_path / "x.npz", **{**arrays, "train_images": np.zeros((40, 548, 548, 3), np.uint8)})
    assert (tmp_path / "x.npz").stat().st_size < 150_000
    monkeypatch.setattr("common.medical.available_memory", lambda: 30_000_000)
    tracemalloc.start()
    try:
        match = r"x.npz takes 0.\d GB of memory unpacked, 0.0 GB are free"
        fails("medmnist", str(tmp_path), match=match)
        splits = load_splits("medmnist", str(tmp_path), splits=("test",))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert splits.train is None and splits.val is None and splits.classes == ["0", "1", "2", "3"]
    assert np.array_equal(splits.test.images, arrays["test_images"])
    np.savez_compressed(tmp_path / "x.npz", **{**arrays, "test_images": np.zeros((10, 548, 548, 3), np.float64)})
    fails("medmnist", str(tmp_path), match=match)
    monkeypatch.undo()
    assert load_splits("medmnist", str(tmp_path), splits=("train",)).test is None
    assert len(load_splits("medmnist", str(tmp_path), splits=("val",)).val) == 10


def test_grey_levels_are_mapped_in_parts():
    """A window of a whole dataset takes little more memory than its result, which no part's end changes."""
    levels = np.arange(600 * 100 * 100, dtype=np.uint16).reshape(600, 100, 100)
    tracemalloc.start()
    try:
        mapped = to_uint8(levels, (0, 65535), "x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(mapped, np.rint(levels / 257)) and peak < 600 * 100 * 100 * 16


def test_medmnist_files(tmp_path, tiles):
    fails("medmnist", match="--dataset medmnist needs --data-root FILE.npz")
    fails("medmnist", str(tmp_path), match="holds 0 .npz files")
    fails("medmnist", str(tmp_path / "none.npz"), match="cannot read .*none.npz")
    np.savez(tmp_path / "a.npz", **medmnist_arrays(tiles))
    data = (tmp_path / "a.npz").read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"text"):
        (tmp_path / "b.npz").write_bytes(damaged)
        fails("medmnist", str(tmp_path / "b.npz"), match="cannot read .*b.npz")
    fails("medmnist", str(tmp_path), match="holds 2 .npz files")
    np.save(tmp_path / "c.npy", np.zeros(3))
    fails("medmnist", str(tmp_path / "c.npy"), match="cannot read .*c.npy")


# --------------------------------------------------------------------------------------------------------- image folder


def test_imagefolder(tmp_path, tiles):
    root = make_folder(tmp_path / "data", tiles, {"train": {"dog": 20, "cat": 10}, "test": {"cat": 3, "dog": 2}})
    splits = load_splits("imagefolder", str(root))
    assert splits.classes == ["cat", "dog"] and [len(getattr(splits, k)) for k in SPLITS] == [27, 3, 5]
    assert np.bincount(splits.val.labels).tolist() == [1, 2]
    assert splits.test.ids == [f"test/{c}/{i:03d}.png" for c, n in (("cat", 3), ("dog", 2)) for i in range(n)]
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(splits.test[3]["image"].permute(1, 2, 0), tiles[33][:16, :16])
    moved = root.rename(tmp_path / "elsewhere")  # ids do not know where the folder lies
    assert load_splits("imagefolder", f"{moved}/").describe() == splits.describe()


def test_imagefolder_with_its_own_val(tmp_path, tiles):
    counts = {"train": {"cat": 12, "dog": 8}, "val": {"dog": 2}, "test": {"cat": 3}}
    root = str(make_folder(tmp_path, tiles, counts))
    splits = load_splits("imagefolder", root)
    assert [len(getattr(splits, k)) for k in SPLITS] == [20, 2, 3] and splits.val.labels.tolist() == [1, 1]
    fails(
        "imagefolder",
        root,
        val_split=0.2,
        match=r"--val-split 0.2: imagefolder has a val split of its own \(2 images\)",
    )
    alone = load_splits("imagefolder", root, splits=("train",))
    assert len(alone.train) == 20 and alone.val is None  # nothing is split off a train that has a val beside it
    assert load_splits("imagefolder", root, splits=("val",), classes=["cat", "dog"]).val.labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "valid", "test"),
        ("training", "validation", "testing"),
        ("Train", "Val", "TEST"),
        ("train", "dev", "test"),
    ],
)
def test_imagefolder_with_other_names_of_splits(tmp_path, tiles, capsys, train, val, test):
    make_folder(tmp_path, tiles, {train: {"cat": 12, "dog": 8}, val: {"cat": 3, "dog": 2}, test: {"cat": 1, "dog": 1}})
    splits = load_splits("imagefolder", str(tmp_path))
    assert [len(getattr(splits, k)) for k in SPLITS] == [20, 5, 2] and splits.val.ids[0] == f"{val}/cat/000.png"
    renamed = [(name, split) for name, split in ((train, "train"), (val, "val"), (test, "test")) if name != split]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(
        f"note: {tmp_path}: {n}/ is taken as {s}" for n, s in renamed
    )
    if val == "valid":
        make_folder(tmp_path, tiles, {"val": {"cat": 1, "dog": 1}})
        assert len(load_splits("imagefolder", str(tmp_path)).val) == 2
        assert capsys.readouterr().out == f"note: {tmp_path}: valid/ is not used beside val/\n"


def test_imagefolder_without_images_of_a_class(tmp_path, tiles, capsys):
    """In a split that is given a class may be absent, which is said; a class to learn and a whole split may not."""
    root = make_folder(tmp_path, tiles, {"train": {"cat": 20, "dog": 20}, "test": {"cat": 3}})
    (root / "test" / "dog").mkdir()
    splits = load_splits("imagefolder", str(root))
    assert splits.test.labels.tolist() == [0, 0, 0] and splits.classes == ["cat", "dog"]
    assert (
        capsys.readouterr().out == "note: test has no image of 'dog' (3 images): its metrics are of the other classes\n"
    )
    for file in (root / "test" / "cat").iterdir():
        file.unlink()
    fails("imagefolder", str(root), match="test holds no images")
    alone = str(make_folder(tmp_path / "alone", tiles, {"train": {"cat": 9}, "test": {"cat": 3}}))
    fails("imagefolder", alone, match="--dataset imagefolder has one class only, 'cat': there is nothing to tell apart")


def test_what_lies_beside_the_images(tmp_path, tiles, capsys):
    """Thumbnails of a network drive, a Mac's forks, a pipe, files of other endings, a link to nowhere."""
    root = make_folder(tmp_path / "data", tiles, {"train": {"cat": 10, "dog": 10}, "test": {"cat": 2, "dog": 2}})
    cat, png = root / "train" / "cat", (root / "train" / "cat" / "000.png").read_bytes()
    for folder in ("train/@eaDir", "train/cat/@eaDir/000.png", "train/__MACOSX", "test/dog/__MACOSX"):
        (root / folder).mkdir(parents=True)
        (root / folder / "SYNOFILE_THUMB_M.png").write_bytes(png)
    (cat / ".DS_Store").write_bytes(b"\0")
    os.mkfifo(cat / "pipe.png")  # opening it would wait for ever
    (cat / "loop.png").symlink_to(cat / "loop.png")
    splits = load_splits("imagefolder", str(root), val_split=0.1)
    ids = {*splits.train.ids, *splits.val.ids}
    assert splits.classes == ["cat", "dog"] and len(splits.test) == 4 and capsys.readouterr().out == ""
    assert ids == {*(f"train/{c}/{i:03d}.png" for c in ("cat", "dog") for i in range(10)), "train/cat/loop.png"}
    with pytest.raises(
        DataError, match="cannot read image .*loop.png"
    ):  # an image that is missing is named, not passed over
        read_image(cat / "loop.png")
    (cat / "IM0001.raw").write_bytes(b"\0" * 128 + b"DICM")
    (cat / "IM0002").write_bytes(b"\0" * 128 + b"DICM")
    load_splits("imagefolder", str(root))
    expected = (
        f"note: 2 files in {root / 'train'} do not have the extension of an image and are not used, the first is "
        f"'{cat / 'IM0001.raw'}'\n"
    )
    assert capsys.readouterr().out == expected
    for file in cat.glob("*.png"):
        file.unlink() if file.is_symlink() or file.is_file() else None
    fails(
        "imagefolder",
        str(root),
        match=r"train/cat holds no images \(.jpg, .*\), only 2 other files, the first is .*IM0001.raw'",
    )
    fails("unlabeled", str(cat), labels=False, match="--data-root .*cat holds no images .*, only 2 other files")


def test_imagefolder_has_the_order_of_a_table(tmp_path, tiles):
    """The same names in a table of the same images are in the same order, so that a model of one teaches on the
    other."""
    root = make_folder(
        tmp_path, tiles, {split: {str(c): 2 for c in (10, 2, 0, 9)} for split in ("train", "val", "test")}
    )
    lines = [f"{path.relative_to(root)},{path.parent.name},{path.parts[-3]}" for path in root.rglob("*.png")]
    (root / "table.csv").write_text("\n".join(["image,label,split", *lines]))
    for name in ("imagefolder", "csv"):
        splits = load_splits(name, str(root))
        assert splits.classes == ["0", "2", "9", "10"]
        assert {(i.split("/")[1], label) for i, label in zip(splits.test.ids, splits.test.labels)} == {
            ("0", 0),
            ("2", 1),
            ("9", 2),
            ("10", 3),
        }
    make_folder(root, tiles, {"train": {"02": 1}})
    fails("imagefolder", str(root), match="train writes one class as '02' and as '2': write it in one way")


def test_imagefolder_in_two_unicode_forms(tmp_path, tiles):
    """A Mac writes the umlaut as two characters: one class, whichever form train, test and checkpoint have."""
    one, two = "N\u00e4vus", "Na\u0308vus"
    root = make_folder(tmp_path, tiles, {"train": {one: 12, "Other": 8}, "test": {two: 3, "Other": 2}})
    splits = load_splits("imagefolder", str(root))
    assert splits.classes == [one, "Other"] and splits.test.labels.tolist() == [0, 0, 0, 1, 1]
    outside = load_splits("imagefolder", str(root), splits=("test",), classes=["Other", two])
    assert outside.test.labels.tolist() == [1, 1, 1, 0, 0]
    make_folder(root, tiles, {f"train/{two}": {".": 4}})
    more = load_splits("imagefolder", str(root))
    assert [*more.train.labels, *more.val.labels].count(0) == 16 and more.classes == splits.classes


def test_imagefolder_alone(tmp_path, tiles):
    """A single split, as for an outside test set; val without a folder is made from train."""
    root = make_folder(tmp_path, tiles, {"train": {"cat": 12, "dog": 8}, "test": {"dog": 3}})
    assert (
        load_splits("imagefolder", str(root), splits=("val",)).val.ids == load_splits("imagefolder", str(root)).val.ids
    )
    (root / "train").rename(root / "unused")
    outside = load_splits("imagefolder", str(root), splits=("test",), classes=["ant", "cat", "dog"])
    assert (
        outside.test.labels.tolist() == [2, 2, 2] and outside.classes == ["ant", "cat", "dog"] and outside.train is None
    )
    fails("imagefolder", str(root), splits=("test",), classes=["ant", "cat"], match="the checkpoint does not know: dog")


def test_imagefolder_nested_hidden_and_linked(tmp_path, tiles):
    root = make_folder(tmp_path / "data", tiles, {"train": {"cat": 10, "dog": 10}, "test": {"cat": 2, "dog": 2}})
    cat = root / "train" / "cat"
    (cat / "patient 7" / "scan").mkdir(parents=True)
    (cat / "009.png").rename(cat / "patient 7" / "scan" / "UPPER.PNG")
    for hidden in (".ipynb_checkpoints", "patient 7/.cache"):
        (cat / hidden).mkdir()
        (cat / hidden / "x.png").write_bytes((cat / "000.png").read_bytes())
    (cat / "._000.png").write_bytes(b"a Mac's resource fork")
    (cat / "notes.txt").write_text("no image")
    (root / "train" / ".git").mkdir()
    (root / "train" / "list.csv").write_text("no class")
    (root / "train" / "dog").rename(tmp_path / "dogs")
    (root / "train" / "dog").symlink_to(tmp_path / "dogs")
    (cat / "loop").symlink_to(cat)  # must neither hang nor count an image twice
    (cat / "linked.png").symlink_to(tmp_path / "dogs" / "000.png")
    splits = load_splits("imagefolder", str(root), val_split=0.05)
    ids = sorted([*splits.train.ids, *splits.val.ids])
    cats = [*(f"train/cat/{i:03d}.png" for i in range(9)), "train/cat/linked.png", "train/cat/patient 7/scan/UPPER.PNG"]
    assert ids == sorted([*cats, *(f"train/dog/{i:03d}.png" for i in range(10))]) and splits.classes == ["cat", "dog"]


def test_imagefolder_with_a_name_that_is_no_utf8(tmp_path, tiles):
    root = make_folder(tmp_path, tiles, {"train": {"cat": 10, "dog": 10}, "test": {"cat": 2}})
    os.rename(root / "train/cat/000.png", os.path.join(os.fsencode(root), b"train/cat/caf\xe9.png"))
    splits = load_splits("imagefolder", str(root))
    assert len(splits.describe()["sha256"]["train"]) == 64 and len(set(splits.train.keys.tolist())) == 18


def test_imagefolder_errors(tmp_path, tiles):
    fails("imagefolder", match="--dataset imagefolder needs --data-root FOLDER")
    fails("imagefolder", str(tmp_path / "none"), match="none is not a folder")
    fails("imagefolder", str(tmp_path), match="has no folder train/")
    (tmp_path / "train").mkdir()
    fails("imagefolder", str(tmp_path), match="train has no class folders")
    make_folder(tmp_path, tiles, {"train/.": {"cat": 6}})
    fails("imagefolder", str(tmp_path), match="has no folder test/")
    make_folder(tmp_path, tiles, {"test": {"cat": 2, "dog": 2}})
    fails("imagefolder", str(tmp_path), match="test has class folders that train/ has not: dog")
    (tmp_path / "train" / "dog").mkdir()
    fails("imagefolder", str(tmp_path), match=r"train/dog holds no images \(.jpg, .jpeg, .*.dcm\)$")
    (tmp_path / "train" / "dog" / "readme.txt").write_text("no image")
    fails(
        "imagefolder",
        str(tmp_path),
        match="train/dog holds no images .*, only 1 other files, the first is .*dog/readme.txt",
    )
    Image.fromarray(tiles[0]).save(tmp_path / "train" / "dog" / "1.png")
    fails("imagefolder", str(tmp_path), val_split=0.01, match="--val-split 0.01 of 7 images leaves train or val empty")
    assert len(load_splits("imagefolder", str(tmp_path)).val) == 1


def test_bad_images_are_skipped_by_name(tmp_path, tiles, capsys):
    root = make_folder(tmp_path, tiles, {"train": {"cat": 20, "dog": 10}, "test": {"cat": 4, "dog": 1}})
    clean = load_splits("imagefolder", str(root))
    (root / "train/cat/003.png").write_bytes(b"")
    broken = root / "test/cat/001.png"
    broken.write_bytes(broken.read_bytes()[:100])
    splits = load_splits("imagefolder", str(root), on_bad_image="skip")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(line.startswith("skipped: cannot read image ") for line in printed)
    assert "train/cat/003.png" in printed[0] and "test/cat/001.png" in printed[1]
    assert {*clean.train.ids, *clean.val.ids} - {*splits.train.ids, *splits.val.ids} == {"train/cat/003.png"}
    assert splits.test.ids == [
        i for i in clean.test.ids if i != "test/cat/001.png"
    ] and splits.test.labels.tolist() == [0, 0, 0, 1]
    assert len(load_splits("imagefolder", str(root)).test) == 5  # not looked at unless asked
    (root / "test/dog/000.png").write_bytes(b"")
    fails("imagefolder", str(root), on_bad_image="skip", match="after skipping 2 broken images a class has none left")


def test_real_image_folder(cifar_folder):
    splits = load_splits("imagefolder", str(cifar_folder))
    assert [len(getattr(splits, k)) for k in SPLITS] == [180, 20, 60] and "airplane" in splits.classes
    assert np.bincount(splits.val.labels).tolist() == [2] * 10 and splits.train[0]["image"].shape == (3, 32, 32)


@pytest.mark.skipif(not (SHARED_DATA / "medpix-2-0.tar").exists(), reason="medpix-2-0.tar is not here")
def test_real_medical_images(tmp_path):
    """MedPix: CT and MR in modes L, RGB, RGBA and palettes."""
    import tarfile

    modes = {}
    with tarfile.open(SHARED_DATA / "medpix-2-0.tar") as archive:
        for member in archive:
            if member.name.endswith(".png"):
                (tmp_path / "x.png").write_bytes(archive.extractfile(member).read())
                with Image.open(tmp_path / "x.png") as image:
                    modes[image.mode], size = modes.get(image.mode, 0) + 1, image.size
                if modes[image.mode] <= 20:
                    assert read_image(tmp_path / "x.png").shape == (size[1], size[0], 3)
            if sum(modes.values()) == 400:
                break
    assert len(modes) >= 2
