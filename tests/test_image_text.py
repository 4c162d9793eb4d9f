"""MedPix and folders with JSONL: what is read, what is refused; tokens by batch.  Texts and labels are written out
here."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import unpack
from PIL import Image

from common.data import DataError, limit, load_splits, split_off
from common.image_text import as_text, read_image_text, read_jsonl, read_medpix, token_batch, tokenize
from common.run import UserError

DESCRIPTIONS = {  # split: (image, case, type, location category, caption)
    "train": [
        ("MPX1_a", "MPX1", "CT", "Thorax", "CT of the chest."),
        ("MPX1_b", "MPX1", "MR", "Head", None),
        ("MPX2_a", "MPX2", "MR", "Abdomen", "pelvis"),
        ("MPX2_b", "MPX2", "CT", "Spine and Muscles", "  "),
        ("MPX3_a", "MPX3", "CT", "Reproductive and Urinary System", 'Line one\nline "two" \u2013 caf\u00e9'),
    ],
    "dev": [("MPX4_a", "MPX4", "MR", "Head", "T2 axial")],
    "test": [("MPX5_a", "MPX5", "CT", "Thorax", "x"), ("MPX5_b", "MPX5", "MR", "Thorax", "y")],
}
MODES = ["L", "RGB", "RGBA"]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def description(image, case, kind, place, caption):
    return {
        "Type": kind,
        "U_id": case,
        "image": image,
        "Location": f"{place}, fine",
        "Location Category": place,
        "Description": {"Caption": caption, "Age": 41, "Plane": "Axial", "Figure Part": None},
    }


@pytest.fixture
def medpix(tmp_path):
    """A MedPix of eight images in the official layout."""
    root = tmp_path / "MedPix-2-0"
    for split, rows in DESCRIPTIONS.items():
        write_jsonl(root / "splitted_dataset" / f"descriptions_{split}.jsonl", [description(*row) for row in rows])
        cases = [
            {
                "U_id": case,
                "TAC": [],
                "MRI": ["x"],
                "Case": {"Title": f"title {case}", "History": f"history {case}", "Exam": None},
                "Topic": {"Title": f"topic {case}", "Keywords": ["one", None, "two"]},
            }
            for case in dict.fromkeys(row[1] for row in rows)
        ]
        write_jsonl(root / "splitted_dataset" / f"data_{split}.jsonl", cases)
    (root / "images").mkdir()
    for number, row in enumerate(row for rows in DESCRIPTIONS.values() for row in rows):
        mode = MODES[number % 3]
        colour = {"L": 100, "RGB": (10, 20, 30), "RGBA": (10, 20, 30, 0 if number == 2 else 255)}[mode]
        Image.new(mode, (8, 6), colour).save(root / "images" / f"{row[0]}.png")
    return root


def refusal(call, *args, **options):
    """The message of a DataError, which must be one line and exit 2."""
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- MedPix


def test_medpix_splits_labels_and_cases(medpix):
    parts, classes = read_medpix(medpix)
    assert classes == {
        "modality": ["CT", "MR"],
        "location": ["Abdomen", "Head", "Reproductive and Urinary System", "Spine and Muscles", "Thorax"],
    }
    assert {split: part.ids for split, part in parts.items()} == {
        "train": ["MPX1_a", "MPX1_b", "MPX2_a", "MPX2_b", "MPX3_a"],
        "val": ["MPX4_a"],
        "test": ["MPX5_a", "MPX5_b"],
    }
    train = parts["train"]
    assert train.targets["modality"].tolist() == [0, 1, 1, 0, 0] and train.targets["location"].tolist() == [
        4,
        1,
        0,
        3,
        2,
    ]
    assert {labels.dtype for labels in train.targets.values()} == {np.dtype(np.int64)}
    assert train.groups.tolist() == ["MPX1", "MPX1", "MPX2", "MPX2", "MPX3"]
    assert train.texts == ["CT of the chest.", "", "pelvis", "", 'Line one\nline "two" \u2013 caf\u00e9']
    assert train.labels.tolist() == [4, 5 + 1, 5 + 0, 3, 2], "the joint class"
    sample = train[1]
    assert sample["targets"] == {"modality": 1, "location": 1} and sample["text"] == "" and sample["id"] == "MPX1_b"


def test_medpix_images_of_three_modes(medpix):
    train = read_medpix(medpix, splits=["train"])[0]["train"]
    first = [train[i]["image"] for i in range(3)]
    assert {tuple(image.shape) for image in first} == {(3, 6, 8)} and {image.dtype for image in first} == {torch.uint8}
    assert [image[:, 0, 0].tolist() for image in first] == [[100] * 3, [10, 20, 30], [0] * 3]  # the last is transparent


def test_medpix_text_fields(medpix):
    def texts(*fields):
        return read_medpix(medpix, splits=["train"], text_fields=fields)[0]["train"].texts

    assert texts("Caption", "Plane")[:2] == ["CT of the chest.\nAxial", "Axial"]
    assert texts("Age", "Figure Part")[0] == "41"
    assert texts("Location")[0] == "Thorax, fine"
    assert texts("History", "Caption")[:3] == ["history MPX1\nCT of the chest.", "history MPX1", "history MPX2\npelvis"]
    assert texts("Keywords", "Exam")[0] == "one, two"
    assert texts("Case.Title", "Topic.Title")[4] == "title MPX3\ntopic MPX3"
    (medpix / "splitted_dataset" / "data_train.jsonl").unlink()
    assert texts("Caption")[0] == "CT of the chest.", "without need the cases are not read"
    assert "data_train.jsonl" in refusal(texts, "History")


def test_medpix_bad_text_fields(medpix):
    unknown = refusal(read_medpix, medpix, text_fields=["Captions"])
    assert all(
        repr(name) in unknown
        for name in ("Captions", "Caption", "Plane", "History", "Keywords", "Case.Title", "Topic.Title")
    )
    assert "Type" not in unknown, "the label is no text"
    ambiguous = refusal(read_medpix, medpix, text_fields=["Title"])
    assert "'Case.Title' or 'Topic.Title'" in ambiguous


def test_subsets_keep_texts_and_targets(medpix):
    train = read_medpix(medpix, splits=["train"], decode_size=64)[0]["train"]
    part = train.subset(np.array([4, 0]))
    assert part.ids == ["MPX3_a", "MPX1_a"] and part.texts == [train.texts[4], "CT of the chest."]
    assert part.targets["location"].tolist() == [2, 4] and part.classes == train.classes
    assert (
        part.groups.tolist() == ["MPX3", "MPX1"]
        and part.decode_size == 64
        and [os.path.basename(p) for p in part.paths] == ["MPX3_a.png", "MPX1_a.png"]
    )
    joined = part.joined(train.subset([1]))
    assert (
        joined.ids == ["MPX3_a", "MPX1_a", "MPX1_b"]
        and joined.targets["modality"].tolist() == [0, 0, 1]
        and joined.texts[2] == ""
    )
    rest, chosen = split_off(train, 2, 0, 1001)
    assert sorted(rest.ids + chosen.ids) == sorted(train.ids) and not set(rest.groups) & set(chosen.groups)
    assert len(limit(train, 3, 0).texts) == 3


def test_fingerprint_sees_texts_and_labels_but_no_order(medpix):
    train, other = (
        read_medpix(medpix, splits=["train"], text_fields=[field])[0]["train"] for field in ("Caption", "Age")
    )
    assert train.fingerprint() == train.subset([3, 1, 0, 2, 4]).fingerprint(train.classes) != other.fingerprint()
    changed = train.subset(range(5))
    changed.targets["location"][0] = 0
    assert changed.fingerprint() != train.fingerprint() != train.subset(range(4)).fingerprint()


def test_medpix_in_a_checkpoints_order(medpix):
    order = {
        "location": ["Thorax", "Head", "Abdomen", "Spine and Muscles", "Reproductive and Urinary System"],
        "modality": ["MR", "CT"],
    }
    parts, classes = read_medpix(medpix, splits=["test"], classes=order)
    assert list(parts) == ["test"] and classes == order
    assert parts["test"].targets["modality"].tolist() == [1, 0] and parts["test"].targets["location"].tolist() == [0, 0]
    assert "modality" in refusal(read_medpix, medpix, classes={"organ": ["a", "b"]})


def test_medpix_missing_images(medpix, capsys):
    for name in ("MPX1_b", "MPX2_b"):
        (medpix / "images" / f"{name}.png").unlink()
    text = refusal(read_medpix, medpix)
    assert text.startswith("2 rows of") and "'MPX1_b'" in text and "--on-bad-image skip" in text
    parts, _ = read_medpix(medpix, on_bad_image="skip")
    assert parts["train"].ids == ["MPX1_a", "MPX2_a", "MPX3_a"] and parts["train"].targets["location"].tolist() == [
        4,
        0,
        2,
    ]
    assert parts["train"].texts[1] == "pelvis" and "skipped: 2 rows" in capsys.readouterr().out
    for file in (medpix / "images").iterdir():
        file.unlink()
    (medpix / "images").rmdir()
    assert refusal(read_medpix, medpix).endswith("has no folder images/")
    assert "--data-root" in refusal(read_medpix, None) and "is not a folder" in refusal(read_medpix, medpix / "nothing")


@pytest.mark.parametrize(
    "split, line, wanted",
    [
        ("dev", '{"U_id": "MPX4",', "descriptions_dev.jsonl line 2 is not valid JSON"),
        ("train", "[1, 2]", "descriptions_train.jsonl line 6 is not a JSON object"),
        (
            "test",
            json.dumps(description("MPX5_c", "MPX5", "PET", "Head", "x")),
            "unknown Type, the first is 'PET': it must be one of CT, MR",
        ),
        (
            "dev",
            json.dumps(description("MPX5_c", "MPX5", "CT", "Foot", "x")),
            "unknown Location Category, the first is 'Foot'",
        ),
        (
            "dev",
            json.dumps({**description("MPX5_c", "MPX5", "CT", "Head", "x"), "Type": None}),
            "line 2: 'Type' must be a name",
        ),
        ("dev", json.dumps({"image": "MPX4_b", "U_id": "MPX4"}), "line 2 has no 'Description': it has image, U_id"),
        (
            "train",
            json.dumps(description("MPX1_a", "MPX1", "CT", "Head", "x")),
            "1 rows whose image an earlier row has, the first is 'MPX1_a'",
        ),
        (
            "dev",
            json.dumps(description("MPX5_c", "MPX1", "CT", "Head", "x")),
            "the group 'MPX1' is in train and in val",
        ),
        (
            "dev",
            json.dumps({**description("MPX5_c", "MPX4", "CT", "Head", "x"), "Description": "x"}),
            "line 2: 'Description' is not a JSON object",
        ),
    ],
)
def test_medpix_bad_lines(medpix, split, line, wanted):
    Image.new("L", (8, 6)).save(medpix / "images" / "MPX5_c.png")
    Image.new("L", (8, 6)).save(medpix / "images" / "MPX4_b.png")
    path = medpix / "splitted_dataset" / f"descriptions_{split}.jsonl"
    path.write_text(path.read_text() + line + "\n")
    assert wanted in refusal(read_medpix, medpix)


def test_medpix_cases_that_are_missing(medpix):
    path = medpix / "splitted_dataset" / "data_train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert "1 cases (U_id)" in (text := refusal(read_medpix, medpix, text_fields=["History"])) and "'MPX1'" in text


def test_the_real_medpix(tmp_path):
    """Counts of the published splits, and a few labels and texts read off the files by hand."""
    unpack("medpix-2-0.tar", tmp_path)
    parts, classes = read_medpix(tmp_path / "MedPix-2-0", text_fields=["Caption", "History"])
    assert {split: len(part) for split, part in parts.items()} == {"train": 1653, "val": 197, "test": 200}
    assert {split: len(set(part.groups)) for split, part in parts.items()} == {"train": 535, "val": 67, "test": 69}
    assert [np.bincount(parts[s].targets["modality"]).tolist() for s in parts] == [[878, 775], [84, 113], [100, 100]]
    assert np.bincount(parts["train"].targets["location"]).tolist() == [264, 742, 127, 257, 263]
    assert np.bincount(parts["test"].targets["location"]).tolist() == [32, 76, 11, 40, 41]
    first = parts["train"][0]
    assert first["id"] == "MPX1024_synpic40275" and first["targets"] == {"modality": 0, "location": 4}
    assert first["text"].startswith("CT of the chest reveals an obstructing mass and resultant LUL collapse.\n")
    assert sum(text.startswith("pelvis\n") for text in parts["train"].texts) >= 2
    assert all(texts for part in parts.values() for texts in part.texts)
    modes = {}
    for part in parts.values():
        for row, path in enumerate(part.paths):
            with Image.open(path) as image:
                modes.setdefault(image.mode, (part, row))
    assert set(modes) == {"L", "RGB", "RGBA"}
    for part, row in modes.values():
        image = part[row]["image"]
        assert image.shape[0] == 3 and image.float().std() > 5, "not black"


# ------------------------------------------------------------------------------------------------------ any such folder


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "scans"
    (root / "images" / "b").mkdir(parents=True)
    lines = {
        "train": [
            ("a.png", "one", "liver", 10, "p1"),
            ("b/c.png", None, "heart", 9, "p2"),
            ("d.png", ["x", None, {"k": "y"}], "heart", 10, None),
        ],
        "val": [("e.png", "", "liver", 9, "p3")],
        "test": [("f.png", "two", "heart", 10, "p4")],
    }
    for split, rows in lines.items():
        write_jsonl(
            root / f"{split}.jsonl", [dict(zip(("image", "text", "organ", "grade", "group"), row)) for row in rows]
        )
        for row in rows:
            Image.new("RGB", (5, 4)).save(root / ("images" if row[0] != "a.png" else "") / row[0])
    return root


def test_any_folder_with_jsonl(folder):
    parts, classes = read_image_text(folder, tasks=["organ", "grade"])
    assert classes == {"organ": ["heart", "liver"], "grade": ["9", "10"]}, "numbers in their own order"
    train = parts["train"]
    assert train.ids == ["a.png", "b/c.png", "d.png"] and train.texts == ["one", "", "x, y"]
    assert train.targets["organ"].tolist() == [1, 0, 0] and train.targets["grade"].tolist() == [1, 0, 1]
    assert (
        train.groups.tolist() == ["p1", "p2", "d.png"]
        and train[0]["image"].shape == (3, 4, 5) == train[1]["image"].shape
    )
    assert parts["val"].targets == {"organ": np.array([1]), "grade": np.array([0])}
    assert read_image_text(folder, tasks=["organ"], group_field="none")[0]["train"].groups is None
    (folder / "val.jsonl").unlink()
    assert list(read_image_text(folder, tasks=["organ"])[0]) == ["train", "test"], (
        "val is split off train by the caller"
    )
    only = read_image_text(folder, tasks=["organ"], splits=["test"], classes={"organ": ["liver", "heart"]})
    assert list(only[0]) == ["test"] and only[0]["test"].targets["organ"].tolist() == [1]


def test_bad_folders_with_jsonl(folder):
    def refused(**options):
        return refusal(read_image_text, folder, **{"tasks": ["organ"], **options})

    assert "--tasks NAME" in refused(tasks=None)
    assert "'a.b'" in refused(tasks=["a.b"]) and "named once" in refused(tasks=["organ", "organ"])
    assert "train.jsonl line 1 has no 'lobe': it has image, text, organ, grade, group" in refused(tasks=["lobe"])
    assert "choose from 'text', 'grade'" in refused(text_fields=["caption"])
    assert "the checkpoint knows side" in refused(classes={"side": ["l", "r"]})
    for split, row, wanted in [
        (
            "val",
            {"image": "e.png", "text": "", "organ": "lung"},
            "unknown organ, the first is 'lung': it must be one of heart, liver",
        ),
        ("val", {"image": "e.png", "text": "", "organ": None}, "val.jsonl line 1: 'organ' must be a name, not null"),
        ("test", {"image": "gone.png", "text": "", "organ": "liver"}, "1 rows of"),
        (
            "test",
            {"image": "f.png", "text": "", "organ": "liver", "group": "p1"},
            "the group 'p1' is in train and in test",
        ),
    ]:
        kept = (folder / f"{split}.jsonl").read_text()
        write_jsonl(folder / f"{split}.jsonl", [row])
        assert wanted in refused(), wanted
        (folder / f"{split}.jsonl").write_text(kept)
    (folder / "test.jsonl").write_text("\n\n")
    assert "has no lines" in refused()
    (folder / "test.jsonl").unlink()
    assert "cannot read" in refused() and "test.jsonl" in refused()


def test_classes_that_official_splits_lack(folder, capsys):
    splits = load_splits("image_text", str(folder), tasks=["organ", "grade"])
    assert len(splits.val) == len(splits.test) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"note: {text} (1 images): its metrics are of the other classes"
        for text in (
            "val has no image of organ 'heart'",
            "test has no image of organ 'liver'",
            "val has no image of grade '10'",
            "test has no image of grade '9'",
        )
    ]
    for split in ("train", "val", "test"):
        (folder / f"{split}.jsonl").write_text((folder / f"{split}.jsonl").read_text().replace("heart", "liver"))
    with pytest.raises(DataError, match="--dataset image_text has one organ class only, 'liver'"):
        load_splits("image_text", str(folder), tasks=["organ"])


def test_jsonl_as_people_write_it(folder):
    """A byte order mark, back slashes, no group, a label that is missing or written in two ways."""
    rows = [
        {"image": ".\\b\\c.png", "text": "t", "organ": "liver", "group": None},
        {"image": "./d.png", "text": "u", "organ": "heart", "group": float("nan")},
        {"image": "images/a.png", "text": "v", "organ": "heart", "group": ""},
    ]
    (folder / "a.png").rename(folder / "images" / "a.png")
    write_jsonl(folder / "train.jsonl", rows)
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "train.jsonl").read_bytes())
    train = read_image_text(folder, tasks=["organ"])[0]["train"]
    assert train.groups.tolist() == train.ids == [row["image"] for row in rows] and train.labels.tolist() == [1, 0, 0]
    assert [os.path.relpath(path, folder) for path in train.paths] == ["images/b/c.png", "images/d.png", "images/a.png"]
    for change, wanted in [
        ({"organ": float("nan")}, "line 2: 'organ' must be a name, not NaN"),
        ({"organ": "nan"}, "line 2: 'organ' must be a name, not \"nan\""),
        ({"organ": " "}, "line 2: 'organ' must be a name"),
        ({"image": "b/c.png"}, "1 rows whose image an earlier row has, the first is 'b/c.png'"),
    ]:
        write_jsonl(folder / "train.jsonl", [rows[0], {**rows[1], **change}, rows[2]])
        assert wanted in refusal(read_image_text, folder, tasks=["organ"])
    write_jsonl(folder / "train.jsonl", [{**row, "organ": organ} for row, organ in zip(rows, (1, 2, 1.0))])
    assert "train.jsonl writes one class as '1' and as '1.0'" in refusal(read_image_text, folder, tasks=["organ"])


def test_jsonl_lines_and_texts(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "x\xe2\x80\xa8y"}')
    assert read_jsonl(path) == [(1, {"a": 1}), (4, {"a": "x\u2028y"})]
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    assert "line 2 is not valid JSON" in refusal(read_jsonl, path)
    for value, wanted in [
        (None, ""),
        ("  a b\n", "a b"),
        (3, "3"),
        (True, "true"),
        (["a", "", None, ["b"]], "a, b"),
        ({"k": "v", "l": {}}, "v"),
        ([], ""),
        ("a\ud83d", "a?"),
    ]:
        assert as_text(value) == wanted


# -------------------------------------------------------------------------------------------------------------- tokens


class Letters:
    """A tokenizer: 1, a number for each letter, 2; padding is 9."""

    pad_token_id = 9

    def __call__(self, texts, truncation, max_length):
        assert truncation
        return {"input_ids": [[1, *(ord(c) - 87 for c in text)][: max_length - 1] + [2] for text in texts]}


def test_tokens_are_padded_to_the_batchs_longest():
    tokens = tokenize(["a", "", "abcdefgh", "ab"], Letters(), 6)
    assert tokens.lengths.tolist() == [3, 2, 6, 4] and tokens.ids.dtype == torch.int32
    batch = token_batch(tokens, torch.tensor([3, 0]))
    assert batch["input_ids"].tolist() == [[1, 10, 11, 2], [1, 10, 2, 9]] and batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert token_batch(tokens, torch.tensor([2]))["input_ids"].tolist() == [[1, 10, 11, 12, 13, 2]]
    assert token_batch(tokens, torch.tensor([1, 1]))["input_ids"].tolist() == [[1, 2], [1, 2]]


def test_texts_without_a_single_token():
    class Bare(Letters):
        def __call__(self, texts, **options):
            return {"input_ids": [[] for _ in texts]}

    batch = token_batch(tokenize(["", ""], Bare(), 4), torch.tensor([0, 1]))
    assert batch["input_ids"].tolist() == [[9], [9]] and batch["attention_mask"].tolist() == [[0], [0]]
    assert tokenize([], Letters(), 4).ids.shape == (0, 1)


def test_many_texts_are_tokenized_in_parts(monkeypatch):
    texts = ["abcdefgh"[: n % 7] for n in range(25)]
    whole = tokenize(texts, Letters(), 8)
    monkeypatch.setattr("common.image_text.TOKENIZED_AT_ONCE", 4)
    parts = tokenize(texts, Letters(), 8)
    assert torch.equal(whole.ids, parts.ids) and torch.equal(whole.lengths, parts.lengths)


def test_a_file_that_is_missing_is_named(monkeypatch):
    """image_text.py was copied, and medical.py, which it needs, was not."""
    monkeypatch.delitem(sys.modules, "common.image_text")
    monkeypatch.setitem(sys.modules, "common.medical", None)
    with pytest.raises(UserError, match="^--dataset medpix needs the file common/medical.py: copy it from"):
        load_splits("medpix", "nowhere")
