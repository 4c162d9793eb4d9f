"""Images with texts and labels for several tasks: MedPix 2.0, and any folder with JSONL files; tokens, batch by batch.

Needs images.py, splitting.py and tables.py of `common` (and what these need), torch and numpy; `tokenize` is given a
tokenizer of transformers.

    parts, classes = read_medpix("MedPix-2-0", text_fields=["Caption", "History"])
    tokens = tokenize(parts["train"].texts, model.tokenizer, 128)    # once, ahead of training
    batch.update(token_batch(tokens, batch["index"], device))        # input_ids, attention_mask (B, L)

Readers return ({split: ImageTextDataset}, {task: class names}) and raise DataError; `decoding` is passed on to
ImageDataset.
"""

import hashlib
import json
import os
import re
from typing import NamedTuple

import numpy as np
import torch

from common.images import MISSING, DataError, ImageDataset
from common.splitting import check_groups
from common.tables import SPLITS, check_folder, counted, images_by_name, label_numbers, match_images, sorted_classes

MEDPIX_CLASSES = {
    "modality": ["CT", "MR"],
    "location": ["Abdomen", "Head", "Reproductive and Urinary System", "Spine and Muscles", "Thorax"],
}
MEDPIX_COLUMNS = {"modality": "Type", "location": "Location Category"}
MEDPIX_SPLITS = {"train": "train", "val": "dev", "test": "test"}  # their names in the official files
TOKENIZED_AT_ONCE = 10_000  # texts, so that a large dataset never lies in Python lists as a whole


class ImageTextDataset(ImageDataset):
    """Samples of one split: images in files, a text each, and a label for each task.

    texts: N strings, "" where there is none; targets: {task: (N,) int}; classes: {task: its class names}.  `labels` is
    the tasks' joint class (N,), of which splits and --limit-train keep the proportions.  The rest as in ImageDataset.
    """

    def __init__(self, ids, targets, classes, texts, paths, **options):
        self.task_labels = {task: np.asarray(labels, np.int64) for task, labels in targets.items()}
        self.classes, self.texts = {task: list(names) for task, names in classes.items()}, list(texts)
        joint = np.zeros(len(ids), np.int64)
        for task, labels in self.task_labels.items():
            joint = joint * len(self.classes[task]) + labels
        super().__init__(ids, joint, paths=paths, **options)

    @property
    def targets(self):
        return self.task_labels

    def __getitem__(self, i):
        targets = {task: int(labels[i]) for task, labels in self.targets.items()}
        return {**super().__getitem__(i), "text": self.texts[i], "targets": targets}

    def _options(self, groups):
        return {
            "groups": groups,
            "decode_size": self.decode_size,
            "window": self.window,
            "hair_removal": self.hair_removal,
        }

    def subset(self, rows):
        """The samples of these rows, in their order."""
        ids, texts, paths = ([values[i] for i in rows] for values in (self.ids, self.texts, self.paths))
        targets = {task: labels[rows] for task, labels in self.targets.items()}
        return ImageTextDataset(
            ids,
            targets,
            self.classes,
            texts,
            paths,
            **self._options(None if self.groups is None else self.groups[rows]),
        )

    def joined(self, other):
        """These samples, then those of another dataset with the same tasks."""
        targets = {task: np.concatenate([labels, other.targets[task]]) for task, labels in self.targets.items()}
        groups = None if self.groups is None else np.concatenate([self.groups, other.groups])
        return ImageTextDataset(
            self.ids + other.ids,
            targets,
            self.classes,
            self.texts + other.texts,
            [*self.paths, *other.paths],
            **self._options(groups),
        )

    def fingerprint(self, classes=None):
        """SHA-256 over ids, texts and class names of each task, in order of ids; `classes` is its own."""
        lines = [
            [
                i,
                text,
                *(self.classes[task][labels[row]] if labels[row] >= 0 else "" for task, labels in self.targets.items()),
            ]
            for row, (i, text) in enumerate(zip(self.ids, self.texts))
        ]
        return hashlib.sha256(json.dumps([list(self.targets), *sorted(lines)]).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def read_jsonl(path, required=()):
    """[(line number, dict)] of a file with a JSON object a line; required: keys that each must have.  Raises
    DataError."""
    rows = []
    try:
        with open(path, "rb") as file:  # lines end at a newline alone: a text may hold other separators
            lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise DataError(f"{path} line {number} is no JSON ({why})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is no JSON object: {line[:40].decode(errors='replace')}")
        for key in required:
            if key not in row:
                raise DataError(f"{path} line {number} has no {key!r}: it has {', '.join(list(row)[:12]) or 'nothing'}")
        rows.append((number, row))
    if not rows:
        raise DataError(f"{path} has no lines")
    return rows


def as_text(value):
    """A JSON value as one text: null is "", of lists and objects the values that are not empty."""
    if value is None:
        return ""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return ", ".join(filter(None, map(as_text, value)))
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode().strip()  # half of a surrogate pair, which no tokenizer takes


def _joined_texts(records, fields):
    """N records {field: JSON value} -> N texts: what is not empty of these fields, a line each."""
    return ["\n".join(filter(None, (as_text(record.get(field)) for field in fields))) for record in records]


def _names(path, rows, key):
    """N strings that each row must have under a key, as an id or a label; numbers and booleans are written out."""
    names = []
    for number, row in rows:
        if isinstance(row[key], (list, dict)) or as_text(row[key]) in MISSING:
            raise DataError(f"{path} line {number}: {key!r} must be a name, not {json.dumps(row[key])[:40]}")
        names.append(as_text(row[key]))
    return names


def _check_tasks(classes, tasks, name):
    """Refuse classes {task: names} of a checkpoint with other tasks than the dataset's."""
    if classes is not None and set(classes) != set(tasks):
        raise DataError(f"--dataset {name} has the tasks {', '.join(tasks)}, the checkpoint knows {', '.join(classes)}")


# -------------------------------------------------------------------------------------------------------------- MedPix


def read_medpix(root, *, splits=SPLITS, text_fields=("Caption",), classes=None, on_bad_image="error", **decoding):
    """MedPix 2.0 as published (Siragusa et al. 2025, doi 10.1007/s41019-025-00297-8); its dev is val, a group is a
    case.

    text_fields: the description's fields, the case's and the topic's; where two of them have a name, as Title, it is
    Case.Title or Topic.Title.  classes: {task: names} in a checkpoint's order.
    """
    check_folder("medpix", root, "splitted_dataset/ and images/")
    folder = os.path.join(root, "images")
    if not os.path.isdir(folder):
        raise DataError(f"{root} has no folder images/")
    _check_tasks(classes, MEDPIX_CLASSES, "medpix")
    classes = {task: list((classes or MEDPIX_CLASSES)[task]) for task in MEDPIX_CLASSES}
    images, parts = images_by_name([folder]), {}
    for split in splits:
        path = os.path.join(root, "splitted_dataset", f"descriptions_{MEDPIX_SPLITS[split]}.jsonl")
        rows = read_jsonl(path, ["image", "U_id", "Description", *MEDPIX_COLUMNS.values()])
        ids = _names(path, rows, "image")
        own = {i: images[i] for i in ids if i in images}
        matched, files = match_images(path, ids, own, folder, on_bad_image)
        rows, ids = [rows[row] for row in matched], [ids[row] for row in matched]
        targets = {
            task: label_numbers(path, _names(path, rows, column), classes[task], column)
            for task, column in MEDPIX_COLUMNS.items()
        }
        cases = os.path.join(root, "splitted_dataset", f"data_{MEDPIX_SPLITS[split]}.jsonl")
        texts = _medpix_texts(path, rows, cases, text_fields)
        parts[split] = ImageTextDataset(
            ids, targets, classes, texts, files, groups=_names(path, rows, "U_id"), **decoding
        )
    check_groups(parts)
    return parts, classes


def _medpix_texts(path, rows, cases_path, text_fields):
    """N texts of a split's descriptions; the file of cases is read where a field is not the description's."""
    records = []
    for number, row in rows:
        if not isinstance(row["Description"], dict):
            raise DataError(f"{path} line {number}: 'Description' is no JSON object")
        records.append({"Location": row.get("Location"), **row["Description"]})
    own = list(dict.fromkeys(key for record in records for key in record))
    if all(field in own for field in text_fields):
        return _joined_texts(records, text_fields)
    cases = {}
    for number, case in read_jsonl(cases_path, ["U_id", "Case", "Topic"]):
        flat = cases[as_text(case["U_id"])] = {}
        for part in ("Case", "Topic"):
            if not isinstance(case[part], (dict, type(None))):
                raise DataError(f"{cases_path} line {number}: {part!r} is no JSON object")
            flat.update({f"{part}.{key}": value for key, value in (case[part] or {}).items()})
    joined = list(dict.fromkeys(key for case in cases.values() for key in case))
    lacking = list(dict.fromkeys(case for case in _names(path, rows, "U_id") if case not in cases))
    if lacking:
        raise DataError(counted(lacking, f"cases (U_id) of {path} are not in {cases_path}"))
    for record, (_, row) in zip(records, rows):
        record.update(cases[as_text(row["U_id"])])
    return _joined_texts(records, [_full_name(field, own, joined) for field in text_fields])


def _full_name(field, own, joined):
    """The key of a field: the description's own names, else Case.NAME or Topic.NAME, of which NAME does if it is
    one's."""
    if field in own or field in joined:
        return field
    found = [key for key in joined if key.split(".", 1)[1] == field]
    if len(found) > 1:
        raise DataError(f"--text-fields {field!r}: which one, {' or '.join(map(repr, found))}?")
    if not found:
        names = [key.split(".", 1)[1] for key in joined]
        short = [key if names.count(name) > 1 else name for key, name in zip(joined, names)]
        raise DataError(
            f"--text-fields {field!r} is no field of MedPix: choose of {', '.join(map(repr, [*own, *short]))}"
        )
    return found[0]


# ---------------------------------------------------------------------------------------------------- any folder of
# ours


def read_image_text(
    root,
    *,
    tasks=None,
    splits=SPLITS,
    text_fields=("text",),
    group_field="group",
    classes=None,
    on_bad_image="error",
    **decoding,
):
    """A folder with train.jsonl, test.jsonl (val.jsonl, if there is one) and images, a line an image:

        {"image": "scans/17.png", "text": "...", "organ": "liver", "group": "patient 4"}

    image: its path in the folder or in its images/; tasks: the keys of the labels (by default those of classes), whose
    classes are those in train, or classes {task: names} in a checkpoint's order; group_field: the key of whose image it
    is, where lines have it.
    """
    check_folder("image_text", root, "train.jsonl, test.jsonl and the images that they name")
    tasks = list(tasks or classes or [])
    if not tasks:
        raise DataError("--dataset image_text needs --tasks NAME ...: the keys of the labels in its JSONL files")
    for task in tasks:
        if (
            not re.fullmatch(r"[\w-]+", task) or tasks.count(task) > 1 or task in ("balanced", "top5")
        ):  # it names columns; balanced_accuracy is a metric
            raise DataError(
                f"--tasks {task!r}: a task's name is of letters, digits, - and _, not balanced or top5, and each "
                "is named once"
            )
    _check_tasks(classes, tasks, "image_text")
    paths = {split: os.path.join(root, f"{split}.jsonl") for split in SPLITS}
    if not os.path.exists(paths["val"]):  # it is split off train then, which is the caller's to do
        splits = ["train" if split == "val" else split for split in splits]
    wanted = [split for split in paths if split in splits or (split == "train" and classes is None)]
    content, names = {}, {}
    for split in wanted:
        content[split] = _with_images(paths[split], read_jsonl(paths[split], ["image", *tasks]), root, on_bad_image)
        names[split] = {task: _names(paths[split], content[split][0], task) for task in tasks}
    if classes is None:
        classes = {task: sorted_classes(paths["train"], names["train"][task]) for task in tasks}
    classes, parts = {task: list(classes[task]) for task in tasks}, {}
    for split in (split for split in wanted if split in splits):
        rows, ids, files = content[split]
        targets = {task: label_numbers(paths[split], names[split][task], classes[task], task) for task in tasks}
        records = [row for _, row in rows]
        fields = list(
            dict.fromkeys(key for record in records for key in record if key not in ("image", group_field, *tasks))
        )
        for field in text_fields:
            if field not in fields:
                raise DataError(
                    f"--text-fields {field!r} is no key of a text in {paths[split]}: choose of "
                    f"{', '.join(map(repr, fields)) or 'none'}"
                )
        groups = [as_text(record.get(group_field)) for record in records]
        texts, groups = _joined_texts(records, text_fields), groups if any(groups) else None
        parts[split] = ImageTextDataset(ids, targets, classes, texts, files, groups=groups, **decoding)
    check_groups(parts)
    return parts, classes


def _with_images(path, rows, root, on_bad_image):
    """(rows, ids, paths of their images) of those that have one; see `match_images`."""
    ids, found = _names(path, rows, "image"), {}
    for i in ids:
        inside = os.path.normpath(i.replace("\\", "/"))
        places = [os.path.join(root, inside), os.path.join(root, "images", inside)]
        place = next(filter(os.path.isfile, places), None)
        if place:
            found[i] = place
    matched, files = match_images(path, ids, found, root, on_bad_image)
    return [rows[row] for row in matched], [ids[row] for row in matched], files


# -------------------------------------------------------------------------------------------------------------- tokens


class Tokens(NamedTuple):
    """Texts as numbers: ids (N, L) int32, filled up with the padding's id, and the lengths (N,) int64."""

    ids: torch.Tensor
    lengths: torch.Tensor


def tokenize(texts, tokenizer, max_length):
    """Tokens of N texts, each cut to max_length; an empty one has its special tokens only, if there are such."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it prints a warning when a loader's workers fork
    rows = []
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        part = list(texts[start : start + TOKENIZED_AT_ONCE])
        rows += [
            np.array(row, np.int32) for row in tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
        ]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids = np.full((len(rows), max(1, int(lengths.max()) if rows else 1)), tokenizer.pad_token_id or 0, np.int32)
    for line, row in zip(ids, rows):
        line[: len(row)] = row
    return Tokens(torch.from_numpy(ids), lengths)


def token_batch(tokens, rows, device="cpu"):
    """`input_ids` and `attention_mask` (B, L) int64 of rows (B,), padded to the longest of them."""
    lengths = tokens.lengths[rows]  # on the CPU, as rows: nothing waits for the device
    longest = max(1, int(lengths.max()))
    batch = {
        "input_ids": tokens.ids[rows, :longest].long(),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }
    if torch.device(device).type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
