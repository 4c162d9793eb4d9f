"""Images with texts and labels for several tasks: MedPix 2.0, and any folder with JSONL files; tokens, batch by batch.

Needs data.py, groups.py, medical.py and what these need of `common`, torch and numpy; `tokenize` is given a tokenizer
of transformers.

    parts, classes = read_medpix("MedPix-2-0", text_fields=["Caption", "History"])
    tokens = tokenize(parts["train"].texts, model.tokenizer, 128)    # once, ahead of training
    batch.update(token_batch(tokens, batch["index"], device))        # input_ids, attention_mask (B, L)

Readers return ({split: ImageTextDataset}, {task: class names}) and raise DataError; `decoding` is passed on to
ImageDataset.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from common.data import FINDING, MISSING, SPLITS, DataError, are_findings, check_folder, counted, sorted_classes
from common.groups import check_groups
from common.medical import (
    TasksDataset,
    finding_names,
    findings_strata,
    images_by_name,
    label_numbers,
    match_images,
)
from common.run import UserError

MEDPIX_CLASSES = {
    "modality": ["CT", "MR"],
    "location": ["Abdomen", "Head", "Reproductive and Urinary System", "Spine and Muscles", "Thorax"],
}
MEDPIX_COLUMNS = {"modality": "Type", "location": "Location Category"}
MEDPIX_SPLITS = {"train": "train", "val": "dev", "test": "test"}  # their names in the official files
TOKENIZED_AT_ONCE = 10_000  # texts, so that a large dataset never lies in Python lists as a whole


class ImageTextDataset(TasksDataset):
    """Samples of one split: images in files, a text each, and a label for each task.

    texts: N strings, "" where there is none; `labels` is the tasks' joint class (N,), of findings `findings_strata`.
    The rest as in TasksDataset.
    """

    PER_SAMPLE = (*TasksDataset.PER_SAMPLE, "texts")

    def __init__(self, ids: list, targets: dict, classes: dict, texts: list, paths: list, **options):
        self.texts, joint = list(texts), np.zeros(len(ids), np.int64)
        for task, labels in targets.items():
            joint = joint * len(classes[task]) + np.asarray(labels, np.int64)
        if are_findings(classes):
            joint = findings_strata(np.stack([*targets.values()], 1))
        super().__init__(ids, targets, classes, joint, paths=paths, **options)

    def __getitem__(self, i: int) -> dict:
        return {**super().__getitem__(i), "text": self.texts[i]}


# ------------------------------------------------------------------------------------------------------------- reading


def read_jsonl(path: str, required: list = ()) -> list[tuple[int, dict]]:
    """[(line number, dict)] of a file with a JSON object a line; required: keys of each.  Raises DataError."""
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
            raise DataError(f"{path} line {number} is not valid JSON ({why})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is not a JSON object: {line[:40].decode(errors='replace')}")
        for key in required:
            if key not in row:
                raise DataError(f"{path} line {number} has no {key!r}: it has {', '.join(list(row)[:12]) or 'nothing'}")
        rows.append((number, row))
    if not rows:
        raise DataError(f"{path} has no lines")
    return rows


def as_text(value: Any) -> str:
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


def read_medpix(
    root: str | None,
    *,
    splits: list = SPLITS,
    text_fields: list = ("Caption",),
    classes: dict | None = None,
    on_bad_image: str = "error",
    **decoding,
) -> tuple[dict, dict]:
    """MedPix 2.0 as published (Siragusa et al. 2025, doi 10.1007/s41019-025-00297-8).

    Its dev is val; a group is a case.
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
        named = {i: images[i] for i in ids if i in images}
        matched, files = match_images(path, ids, named, folder, on_bad_image)
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
            raise DataError(f"{path} line {number}: 'Description' is not a JSON object")
        records.append({"Location": row.get("Location"), **row["Description"]})
    described = list(dict.fromkeys(key for record in records for key in record))
    if all(field in described for field in text_fields):
        return _joined_texts(records, text_fields)
    cases = {}
    for number, case in read_jsonl(cases_path, ["U_id", "Case", "Topic"]):
        flat = cases[as_text(case["U_id"])] = {}
        for part in ("Case", "Topic"):
            if not isinstance(case[part], (dict, type(None))):
                raise DataError(f"{cases_path} line {number}: {part!r} is not a JSON object")
            flat.update({f"{part}.{key}": value for key, value in (case[part] or {}).items()})
    joined = list(dict.fromkeys(key for case in cases.values() for key in case))
    lacking = list(dict.fromkeys(case for case in _names(path, rows, "U_id") if case not in cases))
    if lacking:
        raise DataError(counted(lacking, f"cases (U_id) of {path} are not in {cases_path}"))
    for record, (_, row) in zip(records, rows):
        record.update(cases[as_text(row["U_id"])])
    return _joined_texts(records, [_full_name(field, described, joined) for field in text_fields])


def _full_name(field, described, joined):
    """The key of a field: one of the description, else Case.NAME or Topic.NAME, or NAME where one of them has it."""
    if field in described or field in joined:
        return field
    keys = [key for key in joined if key.split(".", 1)[1] == field]
    if len(keys) > 1:
        raise DataError(f"--text-fields {field!r}: which one, {' or '.join(map(repr, keys))}?")
    if not keys:
        names = [key.split(".", 1)[1] for key in joined]
        short = [key if names.count(name) > 1 else name for key, name in zip(joined, names)]
        known = ", ".join(map(repr, [*described, *short]))
        raise DataError(f"--text-fields {field!r} is not a field of MedPix: choose from {known}")
    return keys[0]


# ------------------------------------------------------------------------------------------------------- any JSON Lines


def read_image_text(
    root: str | None,
    *,
    tasks: list | None = None,
    splits: list = SPLITS,
    text_fields: list = ("text",),
    group_field: str = "group",
    classes: dict | None = None,
    on_bad_image: str = "error",
    **decoding,
) -> tuple[dict, dict]:
    """A folder with train.jsonl, test.jsonl (val.jsonl, if there is one) and images, a line an image:

        {"image": "scans/17.png", "text": "...", "organ": "liver", "group": "patient 4"}

    image: its path in the folder or in its images/; tasks: the keys of the labels (by default those of classes), whose
    classes are those in train, or classes {task: names} in a checkpoint's order; group_field: the key of whose image it
    is, where lines have it.  Labels of one task may be lists, {"findings": ["mass", "effusion"]}: then each finding is
    a task, absent or present.
    """
    check_folder("image_text", root, "train.jsonl, test.jsonl and the images that they name")
    tasks = list(tasks or classes or [])
    _check_task_names(tasks)
    paths = {split: os.path.join(root, f"{split}.jsonl") for split in SPLITS}
    if not os.path.exists(paths["val"]):  # it is split off train then, which is the caller's to do
        splits = ["train" if split == "val" else split for split in splits]
    wanted = [split for split in paths if split in splits or (split == "train" and classes is None)]
    content, names, keys = {}, {}, ("image", group_field, *tasks)
    for split in wanted:
        content[split] = _with_images(paths[split], read_jsonl(paths[split], ["image", *tasks]), root, on_bad_image)
    if any(isinstance(row[task], list) for rows, *_ in content.values() for _, row in rows for task in tasks):
        tasks = classes = _spread_findings(paths, content, tasks, classes)
    _check_tasks(classes, tasks, "image_text")
    for split in wanted:
        names[split] = {task: _names(paths[split], content[split][0], task) for task in tasks}
    if classes is None:
        classes = {task: sorted_classes(paths["train"], names["train"][task]) for task in tasks}
    classes, parts = {task: list(classes[task]) for task in tasks}, {}
    for split in (split for split in wanted if split in splits):
        rows, ids, files = content[split]
        targets = {task: label_numbers(paths[split], names[split][task], classes[task], task) for task in tasks}
        records = [row for _, row in rows]
        _check_text_fields(paths[split], records, text_fields, keys)
        groups = [as_text(record.get(group_field)) for record in records]
        texts, groups = _joined_texts(records, text_fields), groups if any(groups) else None
        parts[split] = ImageTextDataset(ids, targets, classes, texts, files, groups=groups, **decoding)
    check_groups(parts)
    return parts, classes


def _spread_findings(paths, content, tasks, classes):
    """{finding: absent, present} of lists of findings, those in train or in classes; each becomes a key of the rows."""
    if len(tasks) > 1:
        raise DataError(f"--tasks {' '.join(tasks)}: where labels are lists, give the one task that has them")
    key, given = tasks[0], {}
    for split, (rows, *_) in content.items():
        for number, row in rows:
            names = [as_text(v) if isinstance(v, str) else "" for v in row[key]] if isinstance(row[key], list) else [""]
            if not MISSING.isdisjoint(names):
                where = f"{paths[split]} line {number}"
                raise DataError(f"{where}: {key!r} must be a list of names, not {json.dumps(row[key])[:40]}")
            row[key] = names
            given.setdefault(split, {}).update(dict.fromkeys(names, number))
    every = sorted({value for values in given.values() for value in values})
    name = dict(zip(every, finding_names(key, every)))
    known = list(classes or (name[value] for value in sorted(given.get("train", ()))))
    if not known:
        raise DataError(f"{paths['train']} has no finding: {key!r} is empty in each line")
    for split, (rows, *_) in content.items():
        for value, number in given.get(split, {}).items():
            if name[value] not in known:
                who = "the checkpoint" if classes else "train"
                raise DataError(f"{paths[split]} line {number}: {who} has no {key!r} {value!r}")
        for _, row in rows:
            here = {name[value] for value in row[key]}
            row.update({finding: FINDING[finding in here] for finding in known})
    return dict.fromkeys(known, FINDING)


def _check_task_names(tasks):
    """Refuse what cannot be part of a column's name; balanced_accuracy and top5_accuracy are metrics."""
    if not tasks:
        raise DataError("--dataset image_text needs --tasks NAME ...: the keys of the labels in its JSONL files")
    for task in tasks:
        if not re.fullmatch(r"[\w-]+", task) or tasks.count(task) > 1 or task in ("balanced", "top5"):
            raise DataError(
                f"--tasks {task!r}: a task's name is of letters, digits, - and _, not balanced or top5, and each "
                "is named once"
            )


def _check_text_fields(path, records, text_fields, others):
    """Refuse a field that no record has; others: keys that are not texts."""
    fields = list(dict.fromkeys(key for record in records for key in record if key not in others))
    for field in text_fields:
        if field not in fields:
            known = ", ".join(map(repr, fields)) or "none"
            raise DataError(f"--text-fields {field!r} is not a key of a text in {path}: choose from {known}")


def _with_images(path, rows, root, on_bad_image):
    """(rows, ids, paths of their images) of those that have one; see `match_images`."""
    ids, path_of = _names(path, rows, "image"), {}
    for i in ids:
        inside = os.path.normpath(i.replace("\\", "/"))
        places = [os.path.join(root, inside), os.path.join(root, "images", inside)]
        place = next(filter(os.path.isfile, places), None)
        if place:
            path_of[i] = place
    matched, files = match_images(path, ids, path_of, root, on_bad_image)
    return [rows[row] for row in matched], [ids[row] for row in matched], files


# -------------------------------------------------------------------------------------------------------------- tokens


class Tokens(NamedTuple):
    """Texts as numbers: ids (N, L) int32, filled up with the padding's id, and the lengths (N,) int64."""

    ids: torch.Tensor
    lengths: torch.Tensor


def tokenize(texts: list[str], tokenizer: Callable, max_length: int) -> Tokens:
    """Tokens of N texts, each cut to max_length; an empty one has its special tokens only, if there are such."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it prints a warning when a loader's workers fork
    rows = []
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        part = list(texts[start : start + TOKENIZED_AT_ONCE])
        ids = tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
        rows += [np.array(row, np.int32) for row in ids]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids = np.full((len(rows), max(1, int(lengths.max()) if rows else 1)), tokenizer.pad_token_id or 0, np.int32)
    for line, row in zip(ids, rows):
        line[: len(row)] = row
    return Tokens(torch.from_numpy(ids), lengths)


def token_batch(tokens: Tokens, rows: torch.Tensor, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
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


class TokenBatches:
    """The tokens of a batch's texts; those of a dataset are made once."""

    def __init__(self, tokenizer, max_length: int):
        self.tokenizer, self.max_length, self.tokens = tokenizer, max_length, {}  # {id of a dataset: (dataset, Tokens)}

    def prepare(self, dataset) -> Tokens:
        """The tokens of a dataset's texts.  Raises UserError where it has none."""
        if not hasattr(dataset, "texts"):
            raise UserError(
                "a model of images and texts was given images without texts: its datasets are medpix and image_text"
            )
        if id(dataset) not in self.tokens:
            self.tokens[id(dataset)] = dataset, tokenize(dataset.texts, self.tokenizer, self.max_length)
        return self.tokens[id(dataset)][1]

    def __call__(self, batch: dict, device) -> dict:
        return token_batch(self.prepare(batch["dataset"]), batch["index"], device)
