"""Tables of images, skin lesions, folds, include lists and hair removal: files in the official formats, made here or
real."""

import csv
import re
import sys

import numpy as np
import pytest
import torch
from conftest import run_script, succeed, unpack
from PIL import Image, ImageDraw

import evaluate
from common import cli, data, medical, run
from common.augment import PRESETS, Policy
from common.data import DATASETS, DataError, load_splits, read_image, sorted_classes
from common.groups import fold_of_rows, grouped_rows
from common.loader import Loader
from common.medical import hair_mask, remove_hair

SPLITS = ("train", "val", "test")
DX = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]


def save_image(path, number, size=(20, 15)):
    """A JPEG whose colour tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), number % 200 + 20, np.uint8)).save(path, quality=95)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def fails(*args, match, error=DataError, **options):
    with pytest.raises(error, match=match) as caught:
        load_splits(*args, **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def parts_of(splits):
    return {k: getattr(splits, k) for k in SPLITS}


def check_groups_whole(splits):
    groups = [set(part.groups) for part in parts_of(splits).values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


@pytest.fixture
def ham(tmp_path):
    """HAM10000's layout: 280 images of 140 lesions, two images each, seven diagnoses; half of them in the official
    second folder."""
    rows = []
    for i in range(280):
        name = f"ISIC_{24306 + i:07d}"
        save_image(tmp_path / f"HAM10000_images_part_{1 + i % 2}" / f"{name}.jpg", i)
        rows.append(
            {"lesion_id": f"HAM_{i // 2:07d}", "image_id": name, "dx": DX[i // 2 % 7], "age": "", "sex": "male"}
        )
    write_csv(tmp_path / "HAM10000_metadata.csv", rows)
    return tmp_path


@pytest.fixture
def table(tmp_path):
    """90 images of 30 patients; columns image, label, patient_id."""
    rows = [
        {"image": f"{i:03d}.jpg", "label": ("no", "yes")[i % 9 == 0], "patient_id": f"p{i // 3}"} for i in range(90)
    ]
    for i in range(90):
        save_image(tmp_path / "images" / f"{i:03d}.jpg", i)
    write_csv(tmp_path / "table.csv", rows)
    return tmp_path


# --------------------------------------------------------------------------------------------------------------
# HAM10000


def test_ham10000(ham):
    splits = load_splits("ham10000", str(ham))
    assert splits.classes == DX and splits.domain == "medical"
    check_groups_whole(splits)
    ids = [i for part in parts_of(splits).values() for i in part.ids]
    assert len(ids) == len(set(ids)) == 280
    assert np.bincount(splits.test.labels).tolist() == [8] * 7  # a fifth of 40
    number = int(splits.test.ids[3].split("_")[1]) - 24306
    assert DX[splits.test.labels[3]] == DX[number // 2 % 7] and splits.test.groups[3] == f"HAM_{number // 2:07d}"
    assert abs(int(splits.test[3]["image"].float().mean()) - (number % 200 + 20)) <= 2
    assert load_splits("ham10000", str(ham), split_seed=4).test.ids == splits.test.ids  # test never moves
    assert load_splits("ham10000", str(ham), split_seed=4).val.ids != splits.val.ids
    two = load_splits("ham10000", str(ham), binary=True)
    assert two.classes == ["benign", "malignant"] and two.test.ids == splits.test.ids
    assert np.array_equal(two.test.labels, np.isin(splits.test.labels, [0, 1, 4]))
    limited = load_splits("ham10000", str(ham), limit_train=70)
    assert len(limited.train) == 70 and limited.val.ids == splits.val.ids and len(limited.train.groups) == 70
    outside = load_splits(
        "ham10000", str(ham), splits=("test",), classes=["benign", "malignant"]
    )  # a binary model's classes
    assert np.array_equal(outside.test.labels, two.test.labels)


def test_ham10000_errors(ham, capsys):
    fails("ham10000", None, match="--dataset ham10000 needs --data-root FOLDER with HAM10000_metadata.csv")
    fails("ham10000", str(ham / "none"), match="none is not a folder")
    gone = ham / "HAM10000_images_part_1" / "ISIC_0024308.jpg"
    gone.rename(ham / "HAM10000_images_part_1" / "ISIC_9999999.jpg")
    fails(
        "ham10000",
        str(ham),
        match=r"1 rows of .*HAM10000_metadata.csv have no image in .*, the first is 'ISIC_0024308' \(--on-bad",
    )
    splits = load_splits("ham10000", str(ham), on_bad_image="skip")
    assert sum(len(p) for p in parts_of(splits).values()) == 279
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("skipped: 1 rows") and "1 images in" in printed[1] and "'ISIC_9999999'" in printed[1]
    text = (ham / "HAM10000_metadata.csv").read_text()
    path = ham / "HAM10000_metadata.csv"
    for changed, match in [
        (text.replace("dx,", "diagnosis,", 1), "has no column 'dx': it has lesion_id, image_id, diagnosis"),
        (
            text.replace(",nv,", ",naevus,", 1),
            "1 rows of .* have an unknown dx, the first is 'naevus': it must be one of akiec",
        ),
        (text.replace(",nv,", ",,", 1), "1 rows of .* have no dx"),
        (text + text.splitlines()[5] + "\n", "1 rows whose image an earlier row has, the first is 'ISIC_0024310'"),
        (text + "a,b\n", "line 282 has 2 values, the header has 5"),
        ("", "has no column 'lesion_id': it has none"),
        (text.splitlines()[0] + "\n", "has no rows"),
        (text.replace("ISIC_0024310", "ISIC_\xe9", 1).encode("latin1"), "is not a CSV file in UTF-8"),
    ]:
        path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
        fails("ham10000", str(ham), match=match, on_bad_image="skip")
    path.unlink()
    fails("ham10000", str(ham), match="cannot read .*HAM10000_metadata.csv: No such file")


# ------------------------------------------------------------------------------------------------------------- ISIC
# 2017


@pytest.fixture
def isic2017(tmp_path):
    number = 0
    for name, count in (("Training", 30), ("Validation", 9), ("Test_v2", 12)):
        rows = []
        for i in range(count):
            number += 1
            save_image(tmp_path / f"ISIC-2017_{name}_Data" / f"ISIC_{number:07d}.jpg", number)
            Image.new("RGB", (20, 15)).save(tmp_path / f"ISIC-2017_{name}_Data" / f"ISIC_{number:07d}_superpixels.png")
            rows.append(
                {
                    "image_id": f"ISIC_{number:07d}",
                    "melanoma": float(i % 3 == 0),
                    "seborrheic_keratosis": float(i % 3 == 2),
                }
            )
        write_csv(tmp_path / f"ISIC-2017_{name}_Part3_GroundTruth.csv", rows)
    return tmp_path


def test_isic2017(isic2017, capsys):
    splits = load_splits("isic2017", str(isic2017))
    assert [len(p) for p in parts_of(splits).values()] == [30, 9, 12] and capsys.readouterr().out == ""
    assert splits.classes == ["melanoma", "nevus", "seborrheic_keratosis"]
    assert splits.val.labels.tolist() == [0, 1, 2] * 3 and splits.val.ids[0] == "ISIC_0000031"
    two = load_splits("isic2017", str(isic2017), binary=True)
    assert two.classes == ["benign", "malignant"] and two.test.labels.tolist() == [1, 0, 0] * 4
    fails("isic2017", str(isic2017), val_split=0.1, match="isic2017 has a val split of its own")
    folds = [load_splits("isic2017", str(isic2017), folds=3, fold=i) for i in range(3)]  # of train and val together
    assert sorted(i for s in folds for i in s.val.ids) == sorted([*splits.train.ids, *splits.val.ids])
    assert all(s.test.ids == splits.test.ids and abs(np.bincount(s.val.labels) - 13 / 3).max() < 1 for s in folds)
    assert load_splits("isic2017", str(isic2017), splits=("val",), folds=3, fold=1).val.ids == folds[1].val.ids


def test_isic2017_errors(isic2017, capsys):
    path = isic2017 / "ISIC-2017_Test_v2_Part3_GroundTruth.csv"
    text = path.read_text()
    path.write_text(text.replace("1.0,0.0", "1.0,1.0", 1))
    fails(
        "isic2017",
        str(isic2017),
        match="1 rows of .* are melanoma and seborrheic_keratosis, the first is 'ISIC_0000040'",
    )
    path.write_text(text.replace("1.0,0.0", "maybe,0.0", 1))
    fails("isic2017", str(isic2017), match="unknown melanoma, the first is 'maybe'")
    path.write_text(text.replace("1.0,0.0", "0.0,0.0"))
    capsys.readouterr()
    assert [len(p) for p in parts_of(load_splits("isic2017", str(isic2017))).values()] == [
        30,
        9,
        12,
    ]  # an official split stands
    load_splits("isic2017", str(isic2017), binary=True)
    assert capsys.readouterr().out.splitlines() == [
        f"note: test has no image of {c!r} (12 images): its metrics are of the other classes"
        for c in ("melanoma", "malignant")
    ]
    path.unlink()
    fails("isic2017", str(isic2017), match="cannot read .*Test_v2_Part3")
    assert len(load_splits("isic2017", str(isic2017), splits=("train", "val")).train) == 30


# ------------------------------------------------------------------------------------------------------------- ISIC
# 2024


@pytest.fixture
def isic2024(tmp_path):
    """300 images of 60 patients, 24 of them malignant; the official table and the HDF5 of JPEG bytes."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    rows = []
    with h5py.File(tmp_path / "train-image.hdf5", "w") as file:
        for i in range(300):
            save_image(tmp_path / "x.jpg", i)
            name = f"ISIC_{i:07d}"
            file.create_dataset(name, data=np.void((tmp_path / "x.jpg").read_bytes()))
            rows.append(
                {"isic_id": name, "target": int(i % 25 < 2), "patient_id": f"IP_{i // 5:07d}", "age_approx": "60.0"}
            )
    (tmp_path / "x.jpg").unlink()
    write_csv(tmp_path / "train-metadata.csv", rows)
    return tmp_path


def test_isic2024(isic2024):
    splits = load_splits("isic2024", str(isic2024))
    check_groups_whole(splits)
    assert splits.classes == ["benign", "malignant"] and sum(len(p) for p in parts_of(splits).values()) == 300
    assert all(0.04 < part.labels.mean() < 0.14 for part in parts_of(splits).values())
    for part in parts_of(splits).values():
        i = len(part) // 2
        number = int(part.ids[i][5:])
        assert (
            part.labels[i] == (number % 25 < 2) and abs(int(part[i]["image"].float().mean()) - (number % 200 + 20)) <= 2
        )
    # workers that were forked after the file was opened here, and those that were spawned, read the same
    whole = torch.cat([b["image"][: b["valid"]] for b in Loader(splits.val, 8, "cpu", cache="ram").batches()])
    loaded = torch.cat(
        [b["image"][: b["valid"]] for b in Loader(splits.val, 8, "cpu", cache="off", workers=2).batches()]
    )
    assert torch.equal(whole, loaded)


def test_isic2024_negatives_and_extra(isic2024, tmp_path_factory, capsys):
    whole, fewer = load_splits("isic2024", str(isic2024)), load_splits("isic2024", str(isic2024), negatives=100)
    positives = [p.labels.sum() for p in parts_of(whole).values()]
    assert fewer.test.ids == whole.test.ids and sum(p.labels.sum() for p in parts_of(fewer).values()) == sum(positives)
    kept = [i for p in (fewer.train, fewer.val) for i, label in zip(p.ids, p.labels) if not label]
    assert len(kept) == 100 and set(kept) <= {*whole.train.ids, *whole.val.ids}
    again = load_splits("isic2024", str(isic2024), negatives=100)
    assert again.describe() == fewer.describe()
    fails("isic2024", str(isic2024), negatives=1000, match="--negatives 1000: train and val have 2")
    folder = tmp_path_factory.mktemp("archive")
    for name in ("a.jpg", "sub/b.jpg", "ISIC_0000007.jpg"):
        save_image(folder / name, 5)
    extra = load_splits("isic2024", str(isic2024), negatives=100, extra_train=str(folder))
    assert (
        set(extra.train.ids) - set(fewer.train.ids) == {"extra/a.jpg", "extra/sub/b.jpg"}
        and extra.val.ids == fewer.val.ids
    )
    assert extra.train.labels[extra.train.ids.index("extra/a.jpg")] == 1 and extra.train[len(extra.train) - 1][
        "image"
    ].shape == (3, 15, 20)
    assert "1 images of --extra-train" in capsys.readouterr().out  # one is in the dataset: it could be in test
    fails("isic2024", str(isic2024), extra_train="nowhere", match="--extra-train nowhere is not a folder")
    fails("digits", negatives=3, match="--negatives with --dataset digits: it is for isic2024")


def test_isic2024_folds(isic2024):
    tests = []
    for i in range(4):
        splits = load_splits("isic2024", str(isic2024), folds=4, fold=i)
        check_groups_whole(splits)
        tests += splits.test.ids
        assert 4 <= splits.test.labels.sum() <= 8 and splits.val.labels.sum()
    assert sorted(tests) == [f"ISIC_{i:07d}" for i in range(300)]
    fails("isic2024", str(isic2024), folds=61, fold=0, match="--folds 61 of 60 groups: a fold would be empty")
    fails("isic2024", str(isic2024), folds=40, fold=39, match="test has no image of 'malignant' .*fewer folds")


def test_isic2024_errors(isic2024):
    h5py = sys.modules["h5py"]
    with h5py.File(isic2024 / "train-image.hdf5", "a") as file:
        del file["ISIC_0000003"]
    fails(
        "isic2024",
        str(isic2024),
        match=r"1 rows of .*metadata.csv have no image in .*train-image.hdf5, the first is 'ISIC_0000003'",
    )
    assert len(load_splits("isic2024", str(isic2024), on_bad_image="skip").train)
    medical._open_files.popitem()[1].close()  # HDF5 refuses to write what is being read
    with h5py.File(isic2024 / "train-image.hdf5", "a") as file:
        file.create_dataset("ISIC_0000003", data=np.void(b"no image at all"))
    splits = load_splits("isic2024", str(isic2024))
    part = next(p for p in parts_of(splits).values() if "ISIC_0000003" in p.ids)
    with pytest.raises(DataError, match=r"cannot read image .*train-image.hdf5\[ISIC_0000003\]"):
        part.read(part.ids.index("ISIC_0000003"))
    (isic2024 / "train-image.hdf5").write_bytes(b"no HDF5")
    fails("isic2024", str(isic2024), match="cannot read .*train-image.hdf5")
    (isic2024 / "train-image.hdf5").unlink()
    fails("isic2024", str(isic2024), match="has no file train-image.hdf5")


def test_a_missing_package_is_named(isic2024, table, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    fails("isic2024", str(isic2024), match="needs the package h5py: pip install h5py", error=run.UserError)
    fails(
        "csv",
        str(table),
        hair_removal=True,
        error=run.UserError,
        match="--hair-removal needs the package opencv-python-headless: pip install opencv",
    )


# ------------------------------------------------------------------------------------------------------------- any
# table


def test_csv(table, capsys):
    splits = load_splits("csv", str(table))
    assert splits.classes == ["no", "yes"] and sum(len(p) for p in parts_of(splits).values()) == 90
    check_groups_whole(splits)
    assert "image from image, label from label, group from patient_id" in capsys.readouterr().out
    assert load_splits("csv", str(table), split_seed=3).test.ids == splits.test.ids
    plain = load_splits("csv", str(table), group_column="none")
    assert plain.train.groups is None and len(plain.test) == 18
    rows = [
        {"picture": f"images/{i:03d}", "y": i % 3 * 5, "part": ("train", "Valid", "TEST")[i % 10 % 3]}
        for i in range(90)
    ]
    write_csv(table / "other.csv", rows)
    fails("csv", str(table), match="holds 2 .csv files: name the one, --table FILE.csv")
    columns = {"image_column": "picture", "label_column": "y", "split_column": "part"}
    fails("csv", str(table), table="other.csv", match="has no column image, image_id, .*: name the one, --image-column")
    splits = load_splits("csv", str(table), table="other.csv", **columns)
    assert splits.classes == ["0", "5", "10"] and [len(p) for p in parts_of(splits).values()] == [36, 27, 27]
    assert splits.test.ids[0] == "images/002" and splits.test.groups is None
    fails(
        "csv",
        str(table),
        table="other.csv",
        **{**columns, "label_column": "z"},
        match=r"no column 'z' \(--label-column\)",
    )
    fails("csv", str(table), table="other.csv", **{**columns, "split_column": "y"}, match="unknown y, the first is '0'")
    fails("csv", str(table), table="none.csv", match="cannot read none.csv")
    fails("digits", table="x.csv", match="--table with --dataset digits: it is for csv")


def test_csv_rows_and_images_that_do_not_match(table, capsys):
    text = (table / "table.csv").read_text()
    (table / "table.csv").write_text(text + "absent.jpg,no,p1\ngone.jpg,no,p2\n")
    fails("csv", str(table), match="2 rows of .*table.csv have no image in .*, the first is 'absent.jpg'")
    assert sum(len(p) for p in parts_of(load_splits("csv", str(table), on_bad_image="skip")).values()) == 90
    assert "skipped: 2 rows" in capsys.readouterr().out
    (table / "table.csv").write_text("\n".join(text.splitlines()[:-4]) + "\n")
    load_splits("csv", str(table))
    assert "4 images in" in capsys.readouterr().out
    (table / "table.csv").write_text(text + "000.jpg,no,p1\n")
    fails("csv", str(table), match="1 rows whose image an earlier row has, the first is '000.jpg'")
    (table / "table.csv").write_text(text)
    save_image(table / "more" / "000.jpg", 1)
    fails("csv", str(table), match="'000.jpg' is the name of several images below")


def test_one_order_of_classes():
    """Whatever the set's order, which differs between processes."""
    for k in range(30):  # so that no luck of one order passes
        assert sorted_classes("t", [str(k + 1), "nan", str(k)]) == sorted([str(k + 1), "nan", str(k)])
    assert sorted_classes("t", ["10", "9", "-2", "1.5", "9"]) == ["-2", "1.5", "9", "10"]
    assert sorted_classes("t", ["10", "b", "9", "Infinity", "snan"]) == ["10", "9", "Infinity", "b", "snan"]
    codes = ["162245910001191031", "162245910001191030"]  # equal as floats
    assert sorted_classes("t", codes) == codes[::-1]
    assert sorted_classes("t", ["N\u00e4vus", "Na\u0308vus"]) == ["N\u00e4vus"]
    for one, two in (("1", "1.0"), ("01", "1"), ("0", "00"), ("1e2", "100")):
        for names in ([one, two, "7"], ["text", two, one]):
            with pytest.raises(
                DataError,
                match=f"t writes one class as '{min(one, two)}' and as '{max(one, two)}': write it in one way",
            ):
                sorted_classes("t", names)


@pytest.mark.parametrize("hole", ["", "nan", "NaN", "NA", "None", "null", "<NA>"])
def test_a_missing_label_is_no_class(table, capsys, hole):
    text = (table / "table.csv").read_text().replace("no", "0").replace("yes", "1")
    changed = text.replace("004.jpg,0", f"004.jpg,{hole}", 1).replace("006.jpg,0", f"006.jpg,{hole}", 1)
    (table / "table.csv").write_text(changed)
    splits = load_splits("csv", str(table))
    assert splits.classes == ["0", "1"] and sum(len(p) for p in parts_of(splits).values()) == 88
    assert not {"004.jpg", "006.jpg"} & {i for part in parts_of(splits).values() for i in part.ids}
    assert (
        f"note: 2 rows of {table}/table.csv have no label ({hole!r}), the first is '004.jpg': they are left out"
        in capsys.readouterr().out
    )
    (table / "table.csv").write_text(re.sub(r"jpg,\d", f"jpg,{hole}", text))
    fails("csv", str(table), match="90 rows of .*table.csv have no label .*, the first is '000.jpg'$")


def test_csv_headers_as_people_write_them(table, capsys):
    text = (table / "table.csv").read_text()
    for header in (
        "Image,Label,Patient_ID",
        "File Name,CLASS,PatientID",
        "image-path,Dx,subject_id",
        "ID,Target,Patient ID",
    ):
        (table / "table.csv").write_text(text.replace("image,label,patient_id", header))
        splits = load_splits("csv", str(table))
        check_groups_whole(splits)
        image, label, group = header.split(",")
        assert f"image from {image}, label from {label}, group from {group}\n" in capsys.readouterr().out
        assert len(splits.test.groups) == len(splits.test) and splits.classes == ["no", "yes"]
    rows = [line.split(",") for line in text.splitlines()[1:]]
    parts = [("train", "val", "test")[int(patient[1:]) % 3] for _, _, patient in rows]
    lines = ["image,label,patient_id,Split,AGE"] + [",".join([*row, part, "50"]) for row, part in zip(rows, parts)]
    (table / "table.csv").write_text("\n".join(lines))
    assert [len(p) for p in parts_of(load_splits("csv", str(table))).values()] == [30, 30, 30]
    assert "split from Split; not used: AGE\n" in capsys.readouterr().out
    for name in ("label", "image", "patient_id"):
        (table / "table.csv").write_text("\n".join([lines[0].replace("AGE", name)] + lines[1:]))
        fails("csv", str(table), match=f"table.csv has two columns '{name}': rename or remove one of them")
    (table / "table.csv").write_text(
        "\n".join(line.replace(",AGE", ",") + "," for line in lines)
    )  # a spreadsheet's empty columns
    assert load_splits("csv", str(table)).classes == ["no", "yes"]


def test_csv_names_as_people_write_them(table, capsys):
    """Other slashes, another case, a Mac's Unicode form, an ending of any kind; never two names for one image."""
    for i in range(8):
        save_image(table / "odd" / f"N\u00e4vus{i}.JPG", i)
    save_image(table / "odd" / "x.jpg", 8)
    (table / "odd" / "x.jpg").rename(table / "odd" / "x.jfif")
    save_image(table / "odd" / "Twin.jpg", 9)
    save_image(table / "odd" / "twin.JPG", 10)
    names = [
        "./odd/N\u00e4vus0.JPG",
        "odd\\N\u00e4vus1.JPG",
        "N\u00e4vus2.jpg",
        "odd/n\u00c4vus3.jpg",
        "Na\u0308vus4.jpg",
    ]
    names += [
        "odd/Na\u0308vus5",
        "odd//N\u00e4vus6.jpg",
        ".\\odd\\N\u00e4vus7.jpg",
        "odd/x.jfif",
        "odd/Twin.jpg",
        "twin.JPG",
    ]

    def write(names):
        path.write_text("image,label\n" + "\n".join(f"{name},{'ab'[i % 2]}" for i, name in enumerate(names)))

    path = table / "odd.csv"
    write([*names, *(f"{i:03d}.jpg" for i in range(20))])
    splits = load_splits("csv", str(table), table=str(path))
    greys = {
        i: int(part[row]["image"].float().mean())
        for part in parts_of(splits).values()
        for row, i in enumerate(part.ids)
    }
    assert [round(greys[name] - 20) for name in names] == pytest.approx(range(11), abs=1)
    for other in ("odd/Na\u0308vus0.jpg", "N\u00e4vus0", "odd/../odd/N\u00e4vus0.JPG"):
        write([*names, other])
        fails(
            "csv",
            str(table),
            table=str(path),
            match=f"odd.csv has 1 rows whose image an earlier row has, the first is {other!r}",
        )
    write(["odd/TWIN.jpg"])
    fails("csv", str(table), table=str(path), match="'odd/TWIN.jpg' is the name of several images below")


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_official_split_without_a_class_is_noted(table, capsys, split):
    rows = [
        {"image": f"{i:03d}.jpg", "label": "abc"[i % 3], "split": ("train", "val", "test")[i // 3 % 3]}
        for i in range(90)
    ]
    lacking = [row for row in rows if (row["label"], row["split"]) != ("c", split)]
    write_csv(table / "table.csv", lacking)
    splits = load_splits("csv", str(table))
    assert {k: sorted(set(p.labels)) for k, p in parts_of(splits).items()} == {
        k: [0, 1] if k == split else [0, 1, 2] for k in SPLITS
    }
    assert (
        f"note: {split} has no image of 'c' (20 images): its metrics are of the other classes"
        in capsys.readouterr().out
    )
    write_csv(table / "table.csv", [row for row in rows if row["label"] != "c" or row["split"] == split])
    with pytest.raises(
        DataError, match=r"train has no image of 'c' \(20 images\)$"
    ):  # no advice on splits that are given
        load_splits("csv", str(table))
    few = [row for row in rows if row["label"] != "c"] + [{**rows[2], "split": "train"}]
    write_csv(table / "table.csv", few)
    fails("csv", str(table), split_column="none", match="has no image of 'c' .*: take another --split-seed")


def test_an_image_without_a_group_is_its_own(ham, capsys):
    """An empty lesion_id made one lesion of all, which cannot be split."""
    path = ham / "HAM10000_metadata.csv"
    whole, text = load_splits("ham10000", str(ham)), path.read_text()
    path.write_text(re.sub(r"HAM_\d+", "", text))
    splits = load_splits("ham10000", str(ham))
    assert all(part.groups.tolist() == part.ids for part in parts_of(splits).values())
    assert np.bincount(splits.test.labels).tolist() == [8] * 7  # a fifth of 40
    path.write_text(re.sub(r"HAM_0000003", "NA", text))  # two images of one lesion, of which nothing is known now
    groups = {
        i: g for part in parts_of(load_splits("ham10000", str(ham))).values() for i, g in zip(part.ids, part.groups)
    }
    before = {i: g for part in parts_of(whole).values() for i, g in zip(part.ids, part.groups)}
    lost = ["ISIC_0024312", "ISIC_0024313"]
    assert groups == {**before, **{i: i for i in lost}} and [before[i] for i in lost] == ["HAM_0000003"] * 2
    dataset = data.ImageDataset(["a", "b", "c"], [0, 0, 0], np.zeros((3, 2, 2), np.uint8), groups=["", "p", "nan"])
    assert dataset.groups.tolist() == ["a", "p", "c"] and dataset.subset([2, 0]).groups.tolist() == ["c", "a"]


def test_csv_groups_in_two_splits_are_refused(table):
    with open(table / "table.csv", newline="") as file:
        rows = [
            {**row, "split": "test" if i in (0, 1) or i > 80 else "train"} for i, row in enumerate(csv.DictReader(file))
        ]
    write_csv(table / "table.csv", rows)
    fails("csv", str(table), match="the group 'p0' is in .* and in .*: a model would be judged on what it has seen")
    assert len(load_splits("csv", str(table), group_column="none").test) == 11


# ------------------------------------------------------------------------------------------------- folds, include lists


def test_folds_of_every_kind():
    whole = load_splits("digits")
    vals, sizes = [], []
    for i in range(5):
        splits = load_splits("digits", folds=5, fold=i)
        assert splits.test.ids == whole.test.ids and not set(splits.train.ids) & set(splits.val.ids)
        vals += splits.val.ids
        sizes.append(np.bincount(splits.val.labels, minlength=10))
    assert sorted(vals) == sorted([*whole.train.ids, *whole.val.ids]) and np.ptp(sizes, axis=0).max() <= 1
    assert (
        load_splits("digits", folds=5, fold=0, split_seed=1).val.ids != load_splits("digits", folds=5, fold=0).val.ids
    )
    fails("digits", folds=5, match="--folds K and --fold I belong together")
    fails("digits", fold=1, match="belong together")
    fails("digits", folds=5, fold=5, match="--folds 5 --fold 5")
    fails("digits", folds=5, fold=1, val_split=0.2, match="--val-split 0.2 cannot be combined with --folds")


def test_grouped_division_on_uneven_groups():
    """Few huge groups, mixed classes, a rare class: whole groups, classes near their share, no dependence on order."""
    rng = np.random.default_rng(0)
    groups = np.sort(rng.zipf(1.6, 3000) % 200).astype(str)
    labels = (rng.random(3000) < 0.04).astype(np.int64)
    rows = grouped_rows(labels, groups, 600, 0, 1)
    inside = np.isin(np.arange(3000), rows)
    assert not set(groups[inside]) & set(groups[~inside])
    order = rng.permutation(3000)
    assert set(order[grouped_rows(labels[order], groups[order], 600, 0, 1)]) == set(rows)
    folds = fold_of_rows(labels, None, groups, 4, 0, 1)
    assert all(len(set(folds[groups == g])) == 1 for g in np.unique(groups)) and set(folds) == {0, 1, 2, 3}
    assert np.array_equal(fold_of_rows(labels[order], None, groups[order], 4, 0, 1), folds[order])


def test_include_list(table, capsys):
    whole = load_splits("csv", str(table))
    keep = [*whole.train.ids[:9], whole.train.ids[9].removesuffix(".jpg"), whole.val.ids[0], "else.jpg"]
    keep += [i for i, label in zip(whole.train.ids, whole.train.labels) if label]
    (table / "kept.txt").write_text("\n".join(keep) + "\n\n")
    capsys.readouterr()
    splits = load_splits("csv", str(table), include_list=str(table / "kept.txt"))
    assert set(splits.train.ids) == set(keep) & set(whole.train.ids) | {whole.train.ids[9]}
    assert splits.val.ids == whole.val.ids and splits.test.ids == whole.test.ids
    assert (
        f"2 names of {table / 'kept.txt'} are not in train, the first is {whole.val.ids[0]!r}"
        in capsys.readouterr().out
    )
    (table / "kept.txt").write_text("nothing\n")
    fails(
        "csv",
        str(table),
        include_list=str(table / "kept.txt"),
        match="leaves train empty: none of its 1 names is in train",
    )
    (table / "kept.txt").write_text(next(i for i, y in zip(whole.train.ids, whole.train.labels) if not y))
    fails("csv", str(table), include_list=str(table / "kept.txt"), match="train has no image of 'yes'")
    fails("digits", include_list="no.txt", match="cannot read --include-list no.txt")


# ---------------------------------------------------------------------------------------------------------- hair
# removal


@pytest.mark.parametrize("side", [200, 600])
def test_hairs_go_and_the_lesion_stays(side):
    """A drawn lesion with a pigment network and spots, and over it hairs as thick as real ones, at two sizes."""
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    height = side * 3 // 4
    clean = Image.new("RGB", (side, height), (205, 150, 130))
    draw = ImageDraw.Draw(clean)
    draw.ellipse([side * 0.35, height * 0.3, side * 0.65, height * 0.7], fill=(120, 70, 50))
    for x in np.linspace(0.4, 0.6, 6):
        draw.ellipse([side * x, height / 2, side * (x + 0.02), height / 2 + side * 0.02], fill=(70, 40, 30))
    hairy = clean.copy()
    draw = ImageDraw.Draw(hairy)
    for start, end in (((0, 0.1), (1, 0.9)), ((0, 0.8), (0.9, 0)), ((0.1, 1), (0.3, 0))):
        draw.line(
            [start[0] * side, start[1] * height, end[0] * side, end[1] * height],
            fill=(60, 40, 30),
            width=max(2, side // 150),
        )
    clean, hairy = np.array(clean), np.array(hairy)
    drawn = (clean != hairy).any(2)
    assert hair_mask(hairy)[drawn].mean() > 0.8 and hair_mask(clean).mean() == 0
    before, after = (np.abs(image.astype(int) - clean)[drawn].mean() for image in (hairy, remove_hair(hairy)))
    assert after < before / 4 and np.array_equal(remove_hair(clean), clean)


def test_hair_is_removed_wherever_images_are_read(ham):
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    for path in ham.rglob("*.jpg"):
        image = np.full((75, 100, 3), 200, np.uint8)
        cv2.line(image, (5, 10), (90, 70), (40, 40, 40), 2)
        Image.fromarray(image).save(path, quality=95)
    splits = load_splits("ham10000", str(ham), hair_removal=True)
    for part in parts_of(splits).values():
        assert part.read(0).min() > 150 and part.subset([0]).read(0).min() > 150
        assert read_image(part.paths[0]).min() < 80
    cached = next(Loader(splits.val, 4, "cpu", cache="ram").batches())["image"]
    assert cached.min() > 150 and torch.equal(
        cached, next(Loader(splits.val, 4, "cpu", cache="off", workers=1).batches())["image"]
    )
    assert len(load_splits("digits", hair_removal=True).val) == 270  # decoded in memory: once, as they are read


# ------------------------------------------------------------------------------------------------- defaults and scripts


def test_derm_augmentation():
    for name in ("ham10000", "isic2017", "isic2024"):
        assert DATASETS[name].policy is PRESETS["derm"] and DATASETS[name].resolution == 224
    parser = cli.Parser("x")
    cli.add_augment_flags(parser)

    def policy_of(*flags):
        return cli.augment_policy(vars(parser.parse_args(flags)), Policy())

    policy = policy_of(*["--augment", "derm", "--rotation", "5"])
    assert (policy.hflip, policy.vflip, policy.rotation, policy.scale, policy.hue) == (0.5, 0.5, 5, (0.8, 1.2), 0.2)
    with pytest.raises(run.UserError, match="--augment none and --hflip"):
        policy_of("--augment", "none", "--hflip", "0.5")
    assert policy_of("--augment", "none") == Policy()


def test_flags_of_older_checkpoints():
    old = {
        "dataset": "digits",
        "data_root": None,
        "val_split": None,
        "split_seed": 0,
        "limit_train": 0,
        "decode_size": 512,
        "window": None,
    }
    assert data.split_options(old) == {"split_seed": 0, "decode_size": 512}
    assert data.split_options({**old, "folds": 5, "fold": 0, "binary": False})["fold"] == 0
    splits = evaluate.checkpoint_splits({"flags": old, "classes": [str(i) for i in range(10)]})
    assert splits.test.ids == load_splits("digits").test.ids and splits.train is None


def test_a_run_s_splits_are_rebuilt_from_its_checkpoint(ham, tmp_path):
    """Training on a fold, then evaluate.py's way back to each split; the predictions name the lesions."""
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    (ham / "kept.txt").write_text("\n".join(load_splits("ham10000", str(ham), folds=4, fold=1).train.ids[5:]))
    flags = [
        "--dataset",
        "ham10000",
        "--data-root",
        ham,
        "--binary",
        "--folds",
        4,
        "--fold",
        1,
        "--hair-removal",
        "--include-list",
        ham / "kept.txt",
        "--split-seed",
        2,
        "--resolution",
        8,
        "--model",
        "resnet8",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--limit-train",
        90,
    ]
    succeed("train_student.py", *flags, "--output", tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "best.pth", weights_only=True)
    options = {
        "binary": True,
        "folds": 4,
        "fold": 1,
        "include_list": str(ham / "kept.txt"),
        "split_seed": 2,
        "limit_train": 90,
    }
    wanted = load_splits("ham10000", str(ham), **options)
    for split in SPLITS:
        part = getattr(evaluate.checkpoint_splits(checkpoint, split=split), split)
        assert part.ids == getattr(wanted, split).ids and part.hair_removal
    predictions = np.load(tmp_path / "run" / "predictions_test.npz")
    assert (
        predictions["groups"].tolist() == wanted.test.groups.tolist() and predictions["ids"].tolist() == wanted.test.ids
    )
    (ham / "kept.txt").unlink()  # what changed train alone is not needed for val
    assert evaluate.checkpoint_splits(checkpoint, split="val").val.ids == wanted.val.ids


@pytest.mark.parametrize(
    "args, words",
    [
        (["--folds", 1, "--fold", 0], ["--folds"]),
        (["--folds", 3], ["--folds", "--fold"]),
        (["--binary"], ["--binary", "digits", "ham10000"]),
        (["--include-list", "no.txt"], ["no.txt"]),
        (["--dataset", "csv"], ["csv", "--data-root"]),
        (["--dataset", "isic2024", "--data-root", "nowhere"], ["nowhere", "train-metadata.csv"]),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path, args, words):
    done = run_script("train_student.py", *args, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- the real one


@pytest.fixture(scope="module")
def real_ham(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ham")
    unpack("ham10000.tar", folder)
    return str(folder / "ham10000")


def test_real_ham10000(real_ham):
    splits = load_splits("ham10000", real_ham)
    parts = parts_of(splits)
    assert [len(p) for p in parts.values()] == [6808, 1203, 2004] and sum(
        len(set(p.groups)) for p in parts.values()
    ) == 7470
    check_groups_whole(splits)
    labels = np.concatenate([p.labels for p in parts.values()])
    assert splits.classes == DX and np.bincount(labels).tolist() == [327, 514, 1099, 115, 1113, 6705, 142]
    for part in parts.values():
        assert np.abs(np.bincount(part.labels) / len(part) - np.bincount(labels) / 10015).max() < 0.01
    assert splits.train[0]["image"].shape == (3, 150, 200)
    binary = load_splits("ham10000", real_ham, binary=True)
    assert (
        binary.test.ids == splits.test.ids
        and sum(p.labels.sum() for p in parts_of(binary).values()) == 327 + 514 + 1113
    )
    check_groups_whole(binary)


def test_real_ham10000_folds(real_ham):
    splits = [load_splits("ham10000", real_ham, folds=5, fold=i) for i in range(5)]
    for s in splits:
        check_groups_whole(s)
        assert abs(len(s.val) - 1602) < 5 and abs((s.val.labels == 3).sum() - 18.4) <= 1
    assert len({i for s in splits for i in s.val.ids}) == 8011


HAIR = [("ISIC_0030120", 0.5, 0.8), ("ISIC_0024531", 0.3, 0.6), ("ISIC_0025161", 0, 0.01), ("ISIC_0026861", 0, 0.01)]


def test_real_hair(real_ham):
    """Two lesions covered with hair and two bare ones, the last a dense network of pigment; all looked at."""
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    for name, low, high in HAIR:
        assert low <= hair_mask(read_image(f"{real_ham}/images/{name}.jpg")).mean() <= high, name
