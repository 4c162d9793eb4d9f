"""Medical images: tables, several findings an image, HAM10000, ISIC 2017 and 2024, MedMNIST, deep grey levels, hair
removal, choices of images.

Readers return ({split: ImageDataset}, class names) and raise DataError; `decoding` is passed on to ImageDataset.
Needs augment.py, data.py, groups.py, loader.py and run.py of `common`, numpy and pillow (h5py for ISIC 2024,
opencv-python-headless for hair removal).
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from common.data import (
    DATASETS,
    FINDING,
    MISSING,
    SPLIT_NAMES,
    SPLITS,
    TASK,
    DataError,
    ImageDataset,
    check_folder,
    counted,
    fixed_test,
    images_below,
    nfc,
    note,
    sorted_classes,
    stratified_rows,
    without_rows,
)
from common.loader import available_memory
from common.run import optional, rank

# by which names a column is found where no flag names it; case and what is neither letter nor digit do not count
COLUMNS = {
    "image": ("image", "image_id", "isic_id", "image_path", "path", "file", "filename", "id"),
    "label": ("label", "target", "class", "diagnosis", "dx"),
    "group": ("group", "patient_id", "patient", "subject_id", "subject", "lesion_id"),
    "split": ("split",),
}
# of ChestMNIST's 14 columns, in the order of the package medmnist; its file does not hold them
CHESTMNIST = (
    "atelectasis cardiomegaly effusion infiltration mass nodule pneumonia pneumothorax consolidation edema emphysema "
    "fibrosis pleural hernia"
).split()
BINARY = ["benign", "malignant"]
HAM10000 = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
HAM10000_MALIGNANT = ("akiec", "bcc", "mel")
HAM10000_FOLDERS = (
    "images",
    "HAM10000_images_part_1",
    "HAM10000_images_part_2",
    "ham10000_images_part_1",
    "ham10000_images_part_2",
)
ISIC2017 = ["melanoma", "nevus", "seborrheic_keratosis"]
ISIC2017_SPLITS = {"train": "Training", "val": "Validation", "test": "Test_v2"}
STREAM_NEGATIVES = 1005  # of the counter-based generator, see data.py
_open_files = {}  # (process, path) -> HDF5 file: a worker that was forked opens its own


# -------------------------------------------------------------------------------------------------- deep grey levels


def to_uint8(array: np.ndarray, window: list | None, what: str) -> np.ndarray:
    """Grey levels of any depth -> uint8.  window: (low, high) mapped to 0..255, those outside are clipped, NaN is 0.

    what: for the message where there is no window.  Raises DataError.
    """
    if array.dtype in (np.uint8, np.bool_):
        return array * np.uint8(255) if array.dtype == np.bool_ else array
    if window is None:
        raise DataError(
            f"{what} has {array.dtype} grey levels ({array.min()} to {array.max()}): say which of them are black and "
            "white with --window LOW HIGH"
        )
    (low, high), out = window, np.empty(array.shape, np.uint8)
    for start in range(0, len(array), 256):  # rows of an image, or images: all in float64 take much
        levels = np.nan_to_num(array[start : start + 256].astype(np.float64), nan=low, posinf=high, neginf=low)
        out[start : start + 256] = np.rint((np.clip(levels, low, high) - low) * (255 / (high - low)))
    return out


# ------------------------------------------------------------------------------------------ several labels an image


class TasksDataset(ImageDataset):
    """Samples of one split with a label for each of several tasks.

    targets: {task: (N,) int}; classes: {task: its class names}; `labels` (N,): the strata of which splits, folds and
    limits keep the proportions.  The rest as in ImageDataset.
    """

    def __init__(self, ids: list, targets: dict, classes: dict, labels: np.ndarray, **options):
        self.task_labels = {task: np.asarray(values, np.int64) for task, values in targets.items()}
        self.classes = {task: list(names) for task, names in classes.items()}
        super().__init__(ids, labels, **options)

    @property
    def targets(self) -> dict[str, np.ndarray]:
        return self.task_labels

    def __getitem__(self, i: int) -> dict:
        return {**super().__getitem__(i), "targets": {task: int(labels[i]) for task, labels in self.targets.items()}}

    def subset(self, rows: np.ndarray) -> "TasksDataset":
        """The samples of these rows, in their order."""
        chosen = super().subset(rows)
        chosen.task_labels = {task: labels[rows] for task, labels in self.targets.items()}
        return chosen

    def joined(self, other: "TasksDataset") -> "TasksDataset":
        """These samples, then those of another dataset with the same tasks."""
        both = super().joined(other)
        both.task_labels = {
            task: np.concatenate([labels, other.targets[task]]) for task, labels in self.targets.items()
        }
        return both

    def fingerprint(self, classes: dict | None = None) -> str:
        """SHA-256 over ids, texts if any and class names of each task, in order of ids; `classes` is its own."""
        names = {
            task: [self.classes[task][n] if n >= 0 else "" for n in labels] for task, labels in self.targets.items()
        }
        texts = [self.texts] if hasattr(self, "texts") else []
        lines = sorted(map(list, zip(self.ids, *texts, *names.values())))
        return hashlib.sha256(json.dumps([list(self.targets), *lines]).encode()).hexdigest()


def findings_strata(present: np.ndarray) -> np.ndarray:
    """(N, F) of 0 and 1 -> (N,): the rarest finding that an image has, from 1, or 0.

    So rare findings reach every split: of their 2^F combinations most are too few to be divided.
    """
    rarest = present.sum(0).argsort(kind="stable")
    ranked = present[:, rarest]
    return np.where(ranked.any(1), 1 + rarest[ranked.argmax(1)], 0)


def findings_dataset(ids: list, present: np.ndarray, names: list[str], **options) -> TasksDataset:
    """A task for each finding; present: (N, F) of 0 and 1; names: of the F findings."""
    targets = dict(zip(names, present.T))
    return TasksDataset(ids, targets, dict.fromkeys(names, FINDING), findings_strata(present), **options)


def finding_names(path: str, columns: list[str]) -> list[str]:
    """The columns' names as names of tasks, "Pleural Effusion" as Pleural_Effusion.  Raises DataError.

    A task is a part of the names of files and metrics: balanced_accuracy and top5_accuracy are metrics, label is the
    task of a dataset with one.
    """
    names = [re.sub(r"[^\w-]+", "_", column) for column in columns]
    for name, column in zip(names, columns):
        if names.count(name) > 1 or name in ("", TASK, "balanced", "top5"):
            raise DataError(
                f"{path}: {column!r} cannot be the name of a finding: each is named once, and none is label, balanced "
                "or top5"
            )
    return names


# ------------------------------------------------------------------------------------------------------------ tables


def read_table(path: str, columns: list | None = None) -> dict[str, list[str]]:
    """{column: strings} of a CSV file with a header; columns: those that must be there.  Raises DataError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: it is not a CSV file in UTF-8 ({error})") from None
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns {twice[0]!r}: rename or remove one of them")
    for name in columns or []:
        if name not in header:
            raise DataError(f"{path} has no column {name!r}: it has {', '.join(header[:12]) or 'none'}")
    if not rows:
        raise DataError(f"{path} has no rows")
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path} line {line} has {len(row)} values, the header has {len(header)}")
    return {name: [row[i].strip() for _, row in rows] for i, name in enumerate(header)}


def select_rows(table: dict, rows: list[int]) -> dict[str, list[str]]:
    """These rows of a table {column: strings}."""
    return {name: [values[i] for i in rows] for name, values in table.items()}


def match_images(
    table_path: str, ids: list[str], images: dict[str, Any], where: str, on_bad_image: str = "error"
) -> tuple[list[int], list]:
    """(rows, their images) of those whose id has one; images: {id: path}; where: what holds them, for the messages.

    Two rows of one image are refused, as are rows without one, which on_bad_image="skip" skips; images without a row
    are noted.
    """
    seen, twice = set(), []
    for i in ids:
        image = images.get(i, i)  # a file may have two names, "a.png" and "./a.png"
        twice += [i] if image in seen else []
        seen.add(image)
    if twice:
        raise DataError(f"{table_path} has {counted(twice, 'rows whose image an earlier row has')}")
    missing = [i for i in ids if i not in images]
    if missing:
        text = counted(missing, f"rows of {table_path} have no image in {where}")
        if on_bad_image != "skip" or len(missing) == len(ids):
            raise DataError(text + (" (--on-bad-image skip leaves them out)" if len(missing) < len(ids) else ""))
        if not rank():
            print(f"skipped: {text}", flush=True)
    known = set(ids)
    spare = [i for i in images if i not in known]
    if spare:
        note(counted(spare, f"images in {where} have no row in {table_path} and are not used"))
    rows = [row for row, i in enumerate(ids) if i in images]
    return rows, [images[ids[row]] for row in rows]


def images_by_name(folders: list[str], keep: Callable = lambda stem: True) -> dict[str, str]:
    """{file name without its extension: path} of the images below folders; of two of one name the first counts."""
    paths = {}
    for folder in folders:
        for path in images_below(folder):
            stem = os.path.splitext(os.path.basename(path))[0]
            if keep(stem):
                paths.setdefault(stem, path)
    return paths


def label_numbers(path: str, values: list[str], classes: list[str], column: str) -> np.ndarray:
    """(N,) int64: each value's place in classes.  Raises DataError for others, and for none."""
    place = {nfc(name): i for i, name in enumerate(classes)}
    values = [nfc(v) for v in values]
    unknown = [v for v in values if v not in place]
    if unknown:
        text = f"rows of {path} have an unknown {column}" if unknown[0] else f"rows of {path} have no {column}"
        raise DataError(f"{counted(unknown, text)}: it must be one of {', '.join(classes[:12])}")
    return np.array([place[v] for v in values], np.int64)


def read_csv(
    root: str | None,
    *,
    on_bad_image: str = "error",
    table: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    label_columns: list[str] | None = None,
    group_column: str | None = None,
    split_column: str | None = None,
    **decoding,
) -> tuple[dict, list | dict]:
    """Any table, beside its images; all is train where it has no split column.

    label_columns: several of 0 and 1, each the task of a finding.
    """
    if label_column and label_columns:
        raise DataError("--label-column and --label-columns cannot be combined: give one of them")
    check_folder("csv", root, "the images")
    path = _table_path(root, table)
    content = read_table(path, label_columns)
    given = {"image": image_column, "label": label_column, "group": group_column, "split": split_column}
    if label_columns:
        del given["label"]
    column = {kind: _column(path, content, kind, name) for kind, name in given.items()}
    files = _files_of(content[column["image"]], root)
    rows, _ = match_images(path, content[column["image"]], files, root, on_bad_image)
    content = select_rows(content, rows if label_columns else _labelled(path, content, column, rows))
    ids, groups, splits = (content.get(column[kind]) for kind in ("image", "group", "split"))
    options = {"paths": [files[i] for i in ids], "groups": groups, **decoding}
    if label_columns:
        names = finding_names(path, label_columns)
        whole = findings_dataset(ids, _findings(path, content, label_columns, ids), names, **options)
        classes = whole.classes
    else:
        classes = sorted_classes(path, content[column["label"]])
        labels = label_numbers(path, content[column["label"]], classes, column["label"])
        whole = ImageDataset(ids, labels, **options)
    spare = [name for name in content if name and name not in (*column.values(), *(label_columns or ()))]
    sources = ", ".join(f"{kind} from {name}" for kind, name in column.items() if name)
    note(f"{path}: {sources}" + (f"; not used: {', '.join(spare[:12])}" if spare else ""))
    return _official_splits(path, whole, splits, column["split"]), classes


def _findings(path, content, columns, ids):
    """(N, F) int64 of 0 and 1, written as 0, 1, 0.0 or 1.0.  Raises DataError, which names the row, for others."""
    for column in columns:
        wrong = {i: value for i, value in zip(ids, content[column]) if value not in ("0", "1", "0.0", "1.0")}
        if wrong:
            text = counted([*wrong], f"rows of {path} have neither 0 nor 1 in {column}")
            raise DataError(f"{text} (it has {next(iter(wrong.values()))!r}): write one, or leave out the row")
    return np.array([[value[0] == "1" for value in content[column]] for column in columns], np.int64).T


def _labelled(path, content, column, rows):
    """Those of the rows that have a label; how many have none is noted.  Raises DataError where none has."""
    labels = content[column["label"]]
    kept = [row for row in rows if labels[row] not in MISSING]
    bare = {content[column["image"]][row]: repr(labels[row]) for row in rows if labels[row] in MISSING}
    if bare:
        text = counted([*bare], f"rows of {path} have no {column['label']} ({' or '.join(sorted({*bare.values()}))})")
        if not kept:
            raise DataError(text)
        note(f"{text}: they are left out")
    return kept


def _table_path(root, table):
    """--table as it is given or in root; by default root's only CSV file."""
    if table:
        inside = os.path.join(root, table)
        return inside if os.path.exists(inside) and not os.path.exists(table) else table
    names = sorted(name for name in os.listdir(root) if name.lower().endswith(".csv"))
    if len(names) != 1:
        raise DataError(f"{root} holds {len(names)} .csv files: name the one, --table FILE.csv")
    return os.path.join(root, names[0])


def _letters(name):
    """A column's name without what people write in different ways: "Patient ID", "patient_id" and "PatientID"."""
    return "".join(filter(str.isalnum, name.lower()))


def _column(path, content, kind, name):
    """The column of a kind (image, label, group, split): the one that a flag names, else one of COLUMNS, or None."""
    columns = ", ".join(list(content)[:12])
    if name == "none" and kind in ("group", "split"):
        return None
    if name is not None:
        if name not in content:
            raise DataError(f"{path} has no column {name!r} (--{kind}-column): it has {columns}")
        return name
    by_letters = {_letters(column): column for column in reversed(content)}
    for candidate in map(_letters, COLUMNS[kind]):
        if candidate in by_letters:
            return by_letters[candidate]
    if kind in ("image", "label"):
        names = ", ".join(COLUMNS[kind])
        raise DataError(f"{path} has no column {names}: name the one, --{kind}-column (it has {columns})")
    return None


def _files_of(names, root):
    """{name: path}, then the images that none names.

    A name is a file's path in root as it is written, or else the path or the name of one image anywhere below it, in
    any case and Unicode form, with or without its extension.  Raises DataError where that is several images.
    """

    def normal(name):
        return os.path.normpath(name.replace("\\", "/"))

    def lower(name):
        return nfc(normal(name)).casefold()

    paths, path_of = images_below(root), {}
    for spell in (normal, lower):
        left = [name for name in names if name not in path_of]
        # by the path in root, the same without its extension, the file's name, the same without its extension
        places = ({}, {}, {}, {})
        for path in paths if left else ():
            inside = spell(os.path.relpath(path, root))
            base = os.path.basename(inside)
            for place, key in zip(places, (inside, os.path.splitext(inside)[0], base, os.path.splitext(base)[0])):
                place[key] = None if key in place else path  # None: several
        for name in left:
            hits = [place[spell(name)] for place in places if spell(name) in place]
            if hits and hits[0] is None:
                raise DataError(f"{name!r} is the name of several images below {root}: write its folder too")
            if hits:
                path_of[name] = hits[0]
    elsewhere = {name: os.path.join(root, normal(name)) for name in names if name not in path_of}  # or of other endings
    path_of.update((name, path) for name, path in elsewhere.items() if os.path.isfile(path))
    used = set(path_of.values())
    path_of.update((os.path.relpath(path, root), path) for path in paths if path not in used)
    return path_of


def _official_splits(path, whole, values, column):
    if values is None:
        return {"train": whole}
    unknown = [v for v in values if v.lower() not in SPLIT_NAMES]
    if unknown:
        raise DataError(
            f"{counted(unknown, f'rows of {path} have an unknown {column}')}: it must be train, val or test "
            "(--split-column none ignores it)"
        )
    splits = np.array([SPLIT_NAMES[v.lower()] for v in values])
    return {s: whole.subset(np.flatnonzero(splits == s)) for s in SPLITS if (splits == s).any()}


# ------------------------------------------------------------------------------------------------------ skin lesions


class HDF5Image(NamedTuple):
    """In the place of a file's path: an image whose encoded bytes lie in an HDF5 file under its id."""

    file: str
    id: str

    def __str__(self):
        return f"{self.file}[{self.id}]"

    def image(self) -> Image.Image:
        """The Pillow image, not yet decoded."""
        h5py, key = optional("h5py", self.file), (os.getpid(), self.file)
        if key not in _open_files:
            _open_files[key] = h5py.File(self.file, "r")
        return Image.open(io.BytesIO(bytes(_open_files[key][self.id][()])))


def hdf5_ids(path: str) -> list[str]:
    """The ids in an HDF5 file.  Raises DataError."""
    h5py = optional("h5py", path)
    try:
        with h5py.File(path, "r") as file:
            return list(file)
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def read_ham10000(
    root: str | None, *, on_bad_image: str = "error", binary: bool = False, **decoding
) -> tuple[dict, list]:
    """HAM10000_metadata.csv and the images beside it (Tschandl et al. 2018); split by lesion."""
    check_folder("ham10000", root, "HAM10000_metadata.csv and images/")
    path = os.path.join(root, "HAM10000_metadata.csv")
    table = read_table(path, ["lesion_id", "image_id", "dx"])
    folders = [os.path.join(root, f) for f in HAM10000_FOLDERS if os.path.isdir(os.path.join(root, f))]
    if not folders:
        raise DataError(f"{root} has no folder images/ nor HAM10000_images_part_1/ and _2/")
    rows, paths = match_images(path, table["image_id"], images_by_name(folders), root, on_bad_image)
    table = select_rows(table, rows)
    labels = label_numbers(path, table["dx"], HAM10000, "dx")
    whole = ImageDataset(table["image_id"], labels, paths=paths, groups=table["lesion_id"], **decoding)
    parts = fixed_test(whole)
    if not binary:
        return parts, list(HAM10000)
    for part in parts.values():  # of the same test
        part.labels = np.isin(part.labels, [HAM10000.index(c) for c in HAM10000_MALIGNANT]).astype(np.int64)
    return parts, list(BINARY)


def read_isic2017(
    root: str | None, *, splits: list, on_bad_image: str = "error", binary: bool = False, **decoding
) -> tuple[dict, list]:
    """The challenge's folders ISIC-2017_*_Data and tables ISIC-2017_*_Part3_GroundTruth.csv; its own splits."""
    check_folder("isic2017", root, "ISIC-2017_Training_Data/, ISIC-2017_Training_Part3_GroundTruth.csv, ...")
    parts = {}
    for split in splits:
        name = f"ISIC-2017_{ISIC2017_SPLITS[split]}"
        path, folder = os.path.join(root, f"{name}_Part3_GroundTruth.csv"), os.path.join(root, f"{name}_Data")
        table = read_table(path, ["image_id", "melanoma", "seborrheic_keratosis"])
        if not os.path.isdir(folder):
            raise DataError(f"{root} has no folder {name}_Data/")
        images = images_by_name([folder], keep=lambda stem: not stem.endswith("_superpixels"))
        rows, paths = match_images(path, table["image_id"], images, folder, on_bad_image)
        table = select_rows(table, rows)
        melanoma, keratosis = (_flags(path, column, table[column]) for column in ("melanoma", "seborrheic_keratosis"))
        if (melanoma & keratosis).any():
            both = [i for i, m, k in zip(table["image_id"], melanoma, keratosis) if m and k]
            raise DataError(counted(both, f"rows of {path} are melanoma and seborrheic_keratosis"))
        labels = melanoma if binary else np.where(melanoma, 0, np.where(keratosis, 2, 1))
        parts[split] = ImageDataset(table["image_id"], labels, paths=paths, **decoding)
    return parts, list(BINARY if binary else ISIC2017)


def read_isic2024(root: str | None, *, on_bad_image: str = "error", **decoding) -> tuple[dict, list]:
    """train-metadata.csv and train-image.hdf5 (JPEG bytes by isic_id) of SLICE-3D; all is train, grouped by patient."""
    check_folder("isic2024", root, "train-metadata.csv and train-image.hdf5")
    path, store = os.path.join(root, "train-metadata.csv"), os.path.join(root, "train-image.hdf5")
    table = read_table(path, ["isic_id", "target", "patient_id"])
    if not os.path.isfile(store):
        raise DataError(f"{root} has no file train-image.hdf5")
    images = {i: HDF5Image(store, i) for i in hdf5_ids(store)}
    rows, paths = match_images(path, table["isic_id"], images, store, on_bad_image)
    table = select_rows(table, rows)
    labels = _flags(path, "target", table["target"])
    whole = ImageDataset(table["isic_id"], labels, paths=paths, groups=table["patient_id"], **decoding)
    return {"train": whole}, list(BINARY)


def _flags(path, column, values):
    """(N,) int64 of 0 and 1, written as 0, 1, 0.0 or 1.0."""
    plain = [v.removesuffix(".0") for v in values]
    return label_numbers(path, plain, ["0", "1"], column)


# ---------------------------------------------------------------------------------------------------------- MedMNIST


def read_medmnist(root: str | None, splits: list, window: list | None = None) -> tuple[dict, list | dict]:
    """A .npz file with {train,val,test}_images and _labels (Yang et al. 2023), or a folder that holds one.

    Labels (N, F) of 0 and 1, as ChestMNIST's, are findings.
    """
    if root is None:
        raise DataError("--dataset medmnist needs --data-root FILE.npz")
    path = root
    if os.path.isdir(root):
        files = sorted(f for f in os.listdir(root) if f.endswith(".npz"))
        if len(files) != 1:
            raise DataError(f"{root} holds {len(files)} .npz files: name the one, --data-root FILE.npz")
        path = os.path.join(root, files[0])
    kept = set(splits) | ({"val"} if "train" in splits else set())
    arrays = _read_npz(path, [f"{s}_images" for s in sorted(kept)] + [f"{s}_labels" for s in SPLITS])
    labels = {split: _npz_labels(path, split, arrays) for split in SPLITS}
    findings, parts = labels["train"].ndim == 2, {}
    names = _npz_findings(path, labels) if findings else _npz_classes(path, labels)
    for split in (split for split in SPLITS if split in kept):
        images = _npz_images(path, split, arrays, window)
        ids = [f"{split}/{i:06d}" for i in range(len(images))]
        if findings:
            parts[split] = findings_dataset(ids, labels[split], names, images=images)
        else:
            parts[split] = ImageDataset(ids, np.searchsorted(names, labels[split]), images)
    return parts, parts[split].classes if findings else [str(i) for i in names]


def _npz_findings(path, labels):
    """The findings' names: ChestMNIST's, or else numbers."""
    counts = {split: values.shape[1] if values.ndim == 2 else 1 for split, values in labels.items()}
    if len({*counts.values()}) > 1:
        raise DataError(f"{path}: the labels of {', '.join(f'{s} have {n} columns' for s, n in counts.items())}")
    if os.path.basename(path).lower().startswith("chestmnist") and counts["train"] == len(CHESTMNIST):
        return CHESTMNIST
    return [f"finding_{number}" for number in range(counts["train"])]


def _npz_classes(path, labels):
    """The numbers that stand for the classes, in order."""
    classes = np.unique(labels["train"])  # from 0 in MedMNIST's own files, from 1 in others
    if classes[-1] >= 2 * len(classes) + 10:  # as 255, a -1 that was written as uint8
        raise DataError(f"{path}: train_labels are out of range: {classes[-1]} where {len(classes)} differ")
    for split in SPLITS:  # the labels of all say what classes there are
        unknown = np.setdiff1d(labels[split], classes)
        if len(unknown):
            known = ", ".join(map(str, classes[:12]))
            raise DataError(f"{path}: {split}_labels are out of range: {unknown[-1]}, train has {known}")
    return classes


def _npz_labels(path, split, arrays):
    """(N,) integers: one class for each image; or (N, F) of 0 and 1, its findings."""
    images, labels = arrays.get(f"{split}_images"), arrays[f"{split}_labels"]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or not labels.size or images is not None and images.shape[:1] != labels.shape[:1]:
        raise DataError(
            f"{path}: {split}_labels of shape {labels.shape} are not one class for each image, nor a row of findings"
        )
    with np.errstate(invalid="ignore"):
        if labels.dtype.kind == "f" and not (labels % 1).any():  # whole numbers; NaN % 1 is NaN, which counts as true
            labels = labels.astype(np.int64)
    if labels.dtype.kind not in "ui" or labels.min() < 0 or labels.ndim == 2 and labels.max() > 1:
        raise DataError(
            f"{path}: {split}_labels are out of range ({labels.dtype}, from {labels.min()} to {labels.max()})"
        )
    return labels


def _npz_images(path, split, arrays, window):
    """(N, H, W) or (N, H, W, 3) uint8."""
    images, default = arrays[f"{split}_images"], DATASETS["medmnist"].resolution
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim not in (3, 4) or images.ndim == 4 and images.shape[3] != 3 or not images.size:
        raise DataError(
            f"{path}: {split}_images of shape {images.shape} are neither grey nor colour images (volumes are not read)"
        )
    side = images.shape[1]
    if split == "train" and side > default:
        note(f"{path} has images of {side} px: --resolution {side} keeps them, the default is {default}")
    return to_uint8(images, window, f"{path}: {split}_images")


def _read_npz(path, names):
    """{name: array} of a MedMNIST file.

    Refused before it is read where it does not fit in memory: 3 MB may unpack to 3 GB.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [n for n in names if n not in archive.files]
            if missing:
                raise DataError(f"{path} is not a MedMNIST file: it lacks {', '.join(missing)}")
            needed, free = sum(archive.zip.getinfo(f"{n}.npy").file_size for n in names), available_memory()
            if needed > free:
                sizes = f"{needed / 1e9:,.1f} GB of memory unpacked, {free / 1e9:,.1f} GB are free"
                raise DataError(f"{path} takes {sizes}: use a smaller file or more memory")
            arrays = {n: archive[n] for n in names}
    except (DataError, MemoryError):
        raise
    except Exception as error:  # zipfile and numpy raise half a dozen kinds on a damaged file
        raise DataError(f"cannot read {path}: {error}") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise DataError(f"{path}: {name} holds values of type {array.dtype}, not numbers")
    return arrays


# --------------------------------------------------------------------------------------------------- choices of images


def chosen_train(
    train: ImageDataset,
    parts: dict[str, ImageDataset],
    sources: tuple,
    extra_train: str | None = None,
    include_list: str | None = None,
) -> ImageDataset:
    """Train with the images of --extra-train, and of its samples, or of these images, those of --include-list.

    parts: all splits as the dataset has them; sources: names of those that train was chosen from.  Raises DataError.
    """
    first_extra = None
    if extra_train:
        first_extra = len(train)
        train = add_positives(train, extra_train, {i for part in parts.values() for i in part.ids})
    if include_list:
        train = only_listed(train, include_list, [parts[s] for s in sources if s in parts], first_extra)
    return train


def add_positives(train: ImageDataset, folder: str, known: set[str]) -> ImageDataset:
    """Train with the images of a folder as malignant; known: ids of the dataset, which are left out of them."""
    if not os.path.isdir(folder):
        raise DataError(f"--extra-train {folder} is not a folder")
    paths = images_below(folder)
    fresh = [p for p in paths if os.path.splitext(os.path.basename(p))[0] not in known]
    if len(fresh) < len(paths):
        note(f"{len(paths) - len(fresh)} images of --extra-train {folder} are in the dataset already and are left out")
    if not fresh:
        raise DataError(f"--extra-train {folder} has no images that the dataset has not")
    ids = ["extra/" + os.path.relpath(p, folder).replace(os.sep, "/") for p in fresh]
    return train.joined(ImageDataset(ids, [1] * len(ids), paths=fresh, groups=ids))


def fewer_negatives(dataset: ImageDataset, count: int, seed: int) -> ImageDataset:
    """All positives and `count` negatives (label 0), chosen by a hash of (seed, key)."""
    negative = np.flatnonzero(dataset.labels == 0)
    if count > len(negative):
        raise DataError(f"--negatives {count}: train and val have {len(negative)}")
    kept = stratified_rows(dataset.labels[negative], dataset.keys[negative], count, seed, STREAM_NEGATIVES)
    return without_rows(dataset, np.delete(negative, kept))


def only_listed(
    train: ImageDataset, path: str, pool: list[ImageDataset], first_extra: int | None = None
) -> ImageDataset:
    """Train's samples that a file names, a line each.

    first_extra: the row of the first image of --extra-train: those before it are kept in any case; None: there is none.

    A name is an id, or else the path in --extra-train (of "extra/a/x.png" a/x.png), or else what one image alone has,
    of the extra ones or of `pool`, the datasets that train was chosen from (so that no name means another image where
    val takes its own): the end of its id's path, its file's name, or that without its extension.  Raises DataError.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            names = [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise DataError(f"cannot read --include-list {path}: {error.strerror}") from None
    if first_extra is not None:
        images, where = list(zip(train.ids[first_extra:], train.paths[first_extra:])), "the extra images"
    else:
        images = [image for part in pool for image in zip(part.ids, part.ids if part.paths is None else part.paths)]
        where = "train"
    ids_by_name = _ids_by_name(set(names), images, first_extra is not None)
    rows = {i: row for row, i in enumerate(train.ids)}
    kept, unknown = set(), []
    for name in names:
        ids = ids_by_name.get(name, [])
        if len(ids) > 1:
            raise DataError(
                f"{path}: {name!r} is the name of {len(ids)} images of {where}: write their ids, as {ids[0]}"
            )
        if ids and ids[0] in rows:
            kept.add(rows[ids[0]])
        else:
            unknown.append(name)
    if not kept:
        raise DataError(
            f"--include-list {path} leaves {where} empty: none of its {len(names)} names is in {where}, as "
            f"{train.ids[first_extra or 0]}"
        )
    if unknown:
        note(counted(unknown, f"names of {path} are not in {where}"))
    return train.subset(np.array([*range(first_extra or 0), *sorted(kept)]))


def _ids_by_name(names, images, extra):
    """{name: ids of the images that it may mean}; images: [(id, file)], extra: whether they are of --extra-train."""
    places = ({}, {}, {})  # the first that has a name counts
    for i, file in images:
        parts, file = i.split("/"), os.path.basename(str(file))
        ends = {"/".join(parts[k:]) for k in range(1, len(parts))} | {file, os.path.splitext(file)[0]}
        for place, keys in zip(places, ({i}, {i.removeprefix("extra/")} if extra else set(), ends)):
            for key in keys & names:
                place.setdefault(key, []).append(i)
    return places[2] | places[1] | places[0]


# -------------------------------------------------------------------------------------------------------- hair removal

# Chosen by eye on HAM10000: hairs go, the network of pigment in a lesion stays.  Shares of the image's longest side.
HAIR_WIDTH, HAIR_LENGTH, HAIR_REACH, INPAINT_RADIUS = 0.03, 0.10, 0.005, 0.005
HAIR_CONTRAST = 10  # grey levels that a hair is darker than what lies around it
HAIR_ANGLES = 24
HAIR_SIDE = 256  # pixels: larger images are searched at this longest side, for the time grows with its cube


def opencv() -> Any:
    """The package cv2.  Raises UserError where it is not installed."""
    cv2 = optional("cv2", "--hair-removal")
    cv2.setNumThreads(1)  # images are decoded side by side already
    return cv2


def hair_mask(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) uint8, 1 on hairs: dark, thin (black-hat), and straight over some length.

    The last tells hair from a lesion's own dark lines, as in DullRazor (Lee et al. 1997, Comput. Biol. Med. 27).
    """
    cv2 = opencv()
    height, breadth = image.shape[:2]
    side = max(height, breadth)
    if side > HAIR_SIDE:
        small = [max(1, round(v * HAIR_SIDE / side)) for v in (breadth, height)]
        mask = hair_mask(cv2.resize(image, small, interpolation=cv2.INTER_AREA))
        return cv2.resize(mask, (breadth, height), interpolation=cv2.INTER_NEAREST)
    width, length = max(5, round(side * HAIR_WIDTH)) | 1, max(5, round(side * HAIR_LENGTH)) | 1  # pixels, odd
    disc, square = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)), np.ones((3, 3), np.uint8)
    hat = cv2.morphologyEx(
        cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.MORPH_BLACKHAT, disc, borderType=cv2.BORDER_REPLICATE
    )
    dark = (hat > HAIR_CONTRAST).astype(np.uint8)
    padded = cv2.copyMakeBorder(dark, length, length, length, length, cv2.BORDER_CONSTANT, value=0)
    mask = np.zeros_like(padded)
    for angle in np.arange(HAIR_ANGLES) * (np.pi / HAIR_ANGLES):
        reach = np.array([np.cos(angle), np.sin(angle)]) * (length - 1) / 2
        line, centre = np.zeros((length, length), np.uint8), np.full(2, (length - 1) / 2)
        ends = [tuple(int(v) for v in np.rint(centre + sign * reach)) for sign in (-1, 1)]
        cv2.line(line, *ends, 1)
        mask |= cv2.morphologyEx(padded, cv2.MORPH_OPEN, line)
    mask = mask[length:-length, length:-length]
    for _ in range(max(1, round(side * HAIR_REACH))):  # ends that bend
        mask = cv2.dilate(mask, square) & dark
    return cv2.dilate(mask, square)  # a hair's soft edge


def remove_hair(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> the same with hairs filled from around them (Telea 2004)."""
    cv2, mask = opencv(), hair_mask(image)
    if not mask.any():
        return image
    return cv2.inpaint(image, mask, max(1, max(image.shape[:2]) * INPAINT_RADIUS), cv2.INPAINT_TELEA)


def mark_for_hair_removal(parts: dict[str, ImageDataset]) -> None:
    """Remove hair from images when their files are decoded, and at once from those that lie decoded in memory."""
    for part in parts.values():
        part.hair_removal = True
        if part.images is not None:
            part.images = np.stack([remove_hair(part.read(i)) for i in range(len(part))])
