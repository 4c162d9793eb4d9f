"""Datasets: their names and defaults, image files, splits.

    splits = load_splits("imagefolder", "data/cifar10")              # .train .val .test .classes .domain

A dataset yields `index, id, image (uint8), targets {task: label}` and never augments; see augment.py.
Needs augment.py and run.py of `common`, torch, numpy and pillow (scikit-learn for digits, torchvision for CIFAR);
medical.py for tables, skin lesions, MedMNIST and deep grey levels, groups.py for patients and folds, custom.py for your
own data, unlabeled.py for images without labels, image_text.py for texts.
"""

from __future__ import annotations

import copy
import hashlib
import os
import stat
import unicodedata
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from common.augment import PRESETS, Policy, hash_id, uniform
from common.run import UserError, barrier, optional, rank

TASK = "label"  # the one task of a classification dataset
FINDING = ["absent", "present"]  # the classes of a task of an image with several findings
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".dcm")
HIDDEN = (".", "@eaDir", "__MACOSX")  # so begins what a desktop, a network drive or an archive leaves beside the images
# how tables write that a value is missing: pandas' list, without what may be a class ("none")
MISSING = {"", "NA", "N/A", "n/a", "#N/A", "<NA>", "nan", "-nan", "NaN", "NAN", "null", "NULL", "Null", "None"}
DIGITS_TEST_SHARE = 0.4  # of scikit-learn's 1,797 digits, which come without a split
TEST_SHARE = 0.2  # of other datasets that come without a test split
# of the counter-based generator, one a choice; medical.py has 1005, groups.py 1006, evaluate.py 1007
STREAM_VAL, STREAM_LIMIT, STREAM_DIGITS_TEST, STREAM_TEST = 1001, 1002, 1003, 1004
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CROP_AND_FLIP = Policy(crop="pad", padding=0.125, hflip=0.5)

# Pillow warns of damaged metadata in several lines; what it cannot read it raises
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class DataError(UserError, ValueError):
    """Data that are missing, broken or do not fit (a user's mistake)."""


# ------------------------------------------------------------------------------------------------ names and defaults


class Recipe(NamedTuple):
    """What a script trains, and for how long, where no flag says otherwise."""

    model: str
    epochs: int
    batch_size: int
    lr: float  # of sgd


class DatasetInfo(NamedTuple):
    """The defaults of a dataset."""

    domain: str
    resolution: int  # input side in pixels
    mean: tuple
    std: tuple
    policy: Policy  # augmentation
    teacher: Recipe
    student: Recipe
    val_split: float = 0.1  # share of train, where the dataset has no val split
    student_labels: int = 0  # with which students are trained (--limit-train, of distill.py --limit-labels); 0 is all

    def defaults(self, role: str, optimizer: str = "sgd") -> dict:
        """{flag: value}; role: "teacher" or "student"."""
        recipe = (self.teacher if role == "teacher" else self.student)._asdict()
        if role == "student":
            recipe["limit_train"] = self.student_labels
        if optimizer != "sgd":
            del recipe["lr"]
        return {"resolution": self.resolution, **recipe}


# of 3x3 stems, for small images
CIFAR = (Recipe("resnet18", 60, 128, 0.1), Recipe("resnet8", 60, 128, 0.1))
MEDMNIST = (Recipe("resnet18", 30, 128, 0.05), Recipe("resnet8", 30, 128, 0.05))
LARGE = (Recipe("timm:resnet50", 30, 32, 0.02), Recipe("timm:resnet18", 30, 32, 0.02))
TEXTS = (Recipe("timm:resnet50", 10, 16, 0.02), Recipe("timm:resnet18", 10, 16, 0.02))
DIGITS = (Recipe("resnet18", 10, 64, 0.02), Recipe("resnet8", 32, 32, 0.02))
DERM = PRESETS["derm"]
SHIFT, SHIFT_AND_ROTATE = Policy("pad", 0.125), Policy("pad", 0.125, rotation=10)
DATASETS = {
    # a hundred labels: enough to learn from, too few to learn all of it alone, so that a teacher has something to give
    "digits": DatasetInfo("handwriting", 8, (0.305,) * 3, (0.376,) * 3, SHIFT_AND_ROTATE, *DIGITS, 0.25, 100),
    "cifar10": DatasetInfo("natural", 32, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), CROP_AND_FLIP, *CIFAR),
    "cifar100": DatasetInfo("natural", 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), CROP_AND_FLIP, *CIFAR),
    "imagefolder": DatasetInfo("custom", 32, *IMAGENET, CROP_AND_FLIP, *CIFAR),
    "medmnist": DatasetInfo("medical", 28, (0.5,) * 3, (0.5,) * 3, SHIFT, *MEDMNIST),  # no flips: sides matter
    "csv": DatasetInfo("custom", 224, *IMAGENET, CROP_AND_FLIP, *LARGE, 0.15),
    "ham10000": DatasetInfo("medical", 224, *IMAGENET, DERM, *LARGE, 0.15),
    "isic2017": DatasetInfo("medical", 224, *IMAGENET, DERM, *LARGE),
    "isic2024": DatasetInfo("medical", 224, *IMAGENET, DERM, *LARGE, 0.2),
    "medpix": DatasetInfo("medical", 224, *IMAGENET, SHIFT_AND_ROTATE, *TEXTS),
    "image_text": DatasetInfo("custom", 224, *IMAGENET, SHIFT, *TEXTS),
    # val only says how far the student is from its teacher, for which some thousand images are enough
    "unlabeled": DatasetInfo("custom", 224, *IMAGENET, Policy("resized", hflip=0.5), *LARGE, 0.05),
}
CUSTOM = DatasetInfo("custom", 224, *IMAGENET, CROP_AND_FLIP, *LARGE)  # of FILE.py:FUNCTION
# options of `load_splits` that one dataset has
DATASET_OPTIONS = {
    "csv": ("table", "image_column", "label_column", "label_columns", "group_column", "split_column"),
    "ham10000": ("binary",),
    "isic2017": ("binary",),
    "isic2024": ("binary", "negatives", "extra_train"),  # it is binary anyway
    "unlabeled": ("hf_dataset",),
    "medpix": ("text_fields",),
    "image_text": ("text_fields", "tasks", "group_column"),
}
WITHOUT_TEST = ("csv", "isic2024")  # the first may have one
WITH_TEXTS = ("medpix", "image_text")  # and several tasks
# beside one of these the other class is positive
NEGATIVE = ("0", "benign", "control", "false", "healthy", "negative", "no", "normal")

# flags of a run that say what its samples are; stores hold images with one label
STORED_FLAGS = (
    *("val_split", "split_seed", "decode_size", "window", "hair_removal", "folds", "fold", "binary", "negatives"),
    *("frame", "group_by_patient"),
    *("table", "image_column", "label_column", "group_column", "split_column", "hf_dataset", "unlabeled_root"),
)
SAMPLE_FLAGS = (*STORED_FLAGS, "label_columns", "text_fields", "tasks", "positive")
SPLIT_FLAGS = ("limit_train", "limit_labels", "on_bad_image", "include_list", "extra_train", *SAMPLE_FLAGS)
DIVISION = (
    "val_split",
    "split_seed",
    "folds",
    "fold",
    "group_column",
    "split_column",
    "group_by_patient",
)  # what makes an image val


def dataset_info(name: str) -> DatasetInfo:
    """The defaults of a dataset, by its name or FILE.py:FUNCTION.  Raises DataError."""
    if ".py:" in name:
        return CUSTOM
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}, or FILE.py:FUNCTION")
    return DATASETS[name]


def split_options(flags: dict) -> dict:
    """Keywords of `load_splits` from {flag: value} of a run, of any age: those that say something."""
    given = {name: flags.get(name) for name in SPLIT_FLAGS}
    # 0 is a fold, but no limit
    return {k: v for k, v in given.items() if v or v == 0 and v is not False and "limit" not in k}


def dataset_flags(flags: dict, checkpoint: dict | None, path: str | None) -> dict:
    """{flag: value} of the dataset and of what its samples are, from the flags, else from a checkpoint, if any.

    On its own data another division is refused: its model has learned from what would be val here.  path: the
    checkpoint's.  Raises DataError.
    """
    saved = checkpoint["flags"] if checkpoint else {}
    dataset = flags["dataset"] or ("unlabeled" if flags["hf_dataset"] else saved.get("dataset", "digits"))
    settled = {"dataset": dataset, "split_seed": flags["split_seed"], "decode_size": flags["decode_size"]}
    if dataset == saved.get("dataset"):
        settled["data_root"] = flags["data_root"] or (None if flags["hf_dataset"] else saved["data_root"])
        same_root = os.path.realpath(settled["data_root"] or "") == os.path.realpath(saved["data_root"] or "")
        default_split = dataset_info(dataset).val_split
        for name in SAMPLE_FLAGS:
            value, theirs = flags.get(name), saved.get(name)  # extract_embeddings.py has no flags of texts
            if value is None or value is False:
                if name != "hf_dataset" or not settled["data_root"]:  # else these are other images
                    settled[name] = theirs
            elif name in DIVISION and same_root:
                if value != (default_split if (name, theirs) == ("val_split", None) else theirs):
                    flag = f"--{name.replace('_', '-')}"
                    trained = "none" if theirs is None else theirs
                    why = f"{path} was trained with {trained}, so it knows images of this val"
                    raise DataError(f"{flag} {value}: {why}; leave {flag} out")
    return {**settled, "split_seed": settled["split_seed"] or 0, "decode_size": settled["decode_size"] or 512}


# ------------------------------------------------------------------------------------------------------ small helpers


def tasks_of(classes: list | dict) -> dict[str, list]:
    """{task: its class names} of a dataset's or a checkpoint's classes: a list where TASK is the only one."""
    return classes if isinstance(classes, dict) else {TASK: classes}


def are_findings(classes: list | dict) -> bool:
    """Whether an image has several findings: every task says if one is absent or present."""
    return isinstance(classes, dict) and bool(classes) and all(names == FINDING for names in classes.values())


def logits_name(task: str) -> str:
    """The key of a task's logits in a model's output."""
    return "logits" if task == TASK else f"logits_{task}"


def in_words(classes: list | dict) -> str:
    """10 (airplane, automobile, bird, cat, ...); of several tasks modality: 2 (CT, MR) and location: ..."""
    if are_findings(classes):
        return f"{len(classes)} findings ({', '.join(classes)})"
    parts = []
    for task, names in tasks_of(classes).items():
        shown = ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])])
        parts.append(f"{'' if task == TASK else task + ': '}{len(names)} ({shown})")
    return " and ".join(parts)


def available_cpus() -> int:
    """Processors that this process may use: a Slurm job has a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def note(text: str) -> None:
    """A line on stdout, from one process."""
    if not rank():
        print(f"note: {text}", flush=True)


def counted(names: list[str], what: str) -> str:
    """ "3 rows of x.csv, the first is 'a'", of which `what` is the middle."""
    return f"{len(names)} {what}, the first is {names[0]!r}"


def nfc(name: str) -> str:
    """A name in one of its Unicode forms: macOS writes "ä" as two characters."""
    return unicodedata.normalize("NFC", name)


def check_folder(name: str, root: str | None, content: str) -> None:
    """Refuse a --data-root that is not given or not a folder; content: what a dataset of that name has in it."""
    if root is None or not os.path.isdir(root):
        problem = "" if root is None else f": {root} is not a folder"
        raise DataError(f"--dataset {name} needs --data-root FOLDER with {content}{problem}")


def sorted_classes(path: str, names: list[str]) -> list[str]:
    """Class names in order, as numbers where all are: the same in every process.  Raises DataError for 1 beside 1.0."""
    names, numbers = sorted({nfc(name) for name in names}), {}
    for name in names:
        try:
            number = Decimal(name)  # exact: codes may have 18 digits
        except InvalidOperation:
            continue
        if number.is_finite() and numbers.setdefault(number, name) != name:
            raise DataError(f"{path} writes one class as {numbers[number]!r} and as {name!r}: write it in one way")
    return [numbers[number] for number in sorted(numbers)] if len(numbers) == len(names) else names


# ---------------------------------------------------------------------------------------------------------- decoding


def _is_deep_colour(image):
    """Whether an opened file has 16 bits a colour channel, of which Pillow keeps the upper eight and says nothing."""
    tile = getattr(image, "tile", None)  # an image made in memory has none
    raw_mode = tile[0][3] if tile else ""
    if isinstance(raw_mode, (tuple, list)):
        raw_mode = raw_mode[0] if raw_mode else ""
    return not image.mode.startswith("I") and str(raw_mode).endswith((";16B", ";16L", ";16N"))


def _open(path, window, frame):
    """The Pillow image of a file, not decoded yet, or decoded from DICOM."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{path} is not a regular file")  # of a pipe nothing might ever come
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        dicom = optional("common.dicom", f"{path}, which Pillow does not know,")
        if not dicom.is_dicom(os.fspath(path)):
            raise
        return dicom.dicom_image(path, window, frame)


def read_image(path: Any, decode_size: int = 512, window: list | None = None, frame: int | None = None) -> np.ndarray:
    """Decode a file (its path, or an object whose `image()` is a Pillow image) to (H, W, 3) uint8.

    Grey becomes three equal channels, transparent pixels black, EXIF rotation is applied, and what is larger than
    decode_size (longest side, pixels) is shrunk to it; window: see medical.to_uint8 and dicom.dicom_image, frame: the
    latter.  Raises DataError, which names the file.
    """
    try:
        with path.image() if hasattr(path, "image") else _open(path, window, frame) as image:
            if _is_deep_colour(image):
                raise DataError(f"{path} has 16-bit colour, which --window cannot map: convert it to 8 bits a channel")
            image.draft("RGB", (decode_size, decode_size))  # a JPEG decodes at 1/2, 1/4 or 1/8, never below this size
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                medical = optional("common.medical", "an image of more than 8 bits a pixel")
                image = Image.fromarray(medical.to_uint8(np.asarray(image), window, path))
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.composite(image, Image.new("RGBA", image.size), image.getchannel("A"))
            image = image.convert("RGB")
            if max(image.size) > decode_size:
                scale = decode_size / max(image.size)
                size = [max(1, round(side * scale)) for side in image.size]
                image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
            return np.array(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds on damaged files (struct.error, IndexError, ...)
        raise DataError(f"cannot read image {path}: {str(error) or type(error).__name__}") from None


class ImageDataset:
    """Samples of one split.

    ids: N strings, stable when other files come or go; labels: (N,) int; images: (N, H, W) or (N, H, W, 3) uint8, or
    None where paths (N files) are given; groups: N strings, or None: whose images they are (patient, lesion), and an
    image whose group is MISSING is a group of its own; hair_removal: see medical.remove_hair, done when a file is
    decoded.
    """

    PER_SAMPLE = ("ids", "keys", "labels", "images", "paths", "groups")

    def __init__(
        self,
        ids: list[str],
        labels: Any,
        images: np.ndarray | None = None,
        paths: list | None = None,
        decode_size: int = 512,
        window: list | None = None,
        groups: Any = None,
        hair_removal: bool = False,
        frame: int | None = None,
    ):
        self.ids, self.labels, self.images, self.paths = list(ids), np.asarray(labels, np.int64), images, paths
        self.keys = np.array([hash_id(i) for i in self.ids], np.int64)
        self.decode_size, self.window, self.hair_removal, self.frame = decode_size, window, hair_removal, frame
        if groups is not None:
            groups = np.array([i if group in MISSING else group for i, group in zip(self.ids, groups)], dtype=str)
        self.groups = groups

    @property
    def targets(self) -> dict[str, np.ndarray]:
        """{task: labels (N,) int64}"""
        return {TASK: self.labels}

    def __len__(self):
        return len(self.ids)

    def read(self, i: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        if self.images is None:
            image = read_image(self.paths[i], self.decode_size, self.window, self.frame)
            if self.hair_removal:
                image = optional("common.medical", "--hair-removal").remove_hair(image)
            return image
        image = self.images[i]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, 2)

    def __getitem__(self, i: int) -> dict:
        image = torch.from_numpy(np.ascontiguousarray(self.read(i).transpose(2, 0, 1)))  # (3, H, W)
        return {"index": i, "id": self.ids[i], "image": image, "targets": {TASK: int(self.labels[i])}}

    def subset(self, rows: np.ndarray) -> ImageDataset:
        """The samples of these rows, in their order."""
        chosen = copy.copy(self)
        for name in self.PER_SAMPLE:
            values = getattr(self, name)
            if values is not None:
                setattr(chosen, name, values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows])
        return chosen

    def joined(self, other: ImageDataset) -> ImageDataset:
        """These samples, then those of another dataset of the same kind."""
        both = copy.copy(self)
        for name in self.PER_SAMPLE:
            values, more = getattr(self, name), getattr(other, name)
            if values is not None:
                setattr(
                    both, name, np.concatenate([values, more]) if isinstance(values, np.ndarray) else [*values, *more]
                )
        return both

    def fingerprint(self, classes: list) -> str:
        """SHA-256 over ids and class names in order of ids: equal where two runs saw the same samples."""
        lines = sorted(f"{i}\t{classes[label] if label >= 0 else ''}\n" for i, label in zip(self.ids, self.labels))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def images_below(
    folder: str,
    folders_seen: dict | None = None,
    onerror: Callable | None = None,
    others: list | None = None,
) -> list[str]:
    """Sorted paths of the images anywhere below a folder, without what is HIDDEN and what is not a file, as a pipe.

    folders_seen gets {folder: its mtime in ns}, others the paths of files with other endings, onerror the OSError of
    each folder that cannot be read.
    """
    paths, seen, pending = [], set(), [os.fspath(folder)]
    while pending:
        parent = pending.pop()
        real = os.path.realpath(parent)
        if real in seen:  # a link back to a folder above would be walked for ever
            continue
        seen.add(real)
        try:
            changed = os.stat(parent).st_mtime_ns
            with os.scandir(parent) as entries:
                entries = sorted((e for e in entries if not e.name.startswith(HIDDEN)), key=lambda e: e.name)
        except OSError as error:
            if onerror:
                onerror(error)
            continue
        if folders_seen is not None:
            folders_seen[parent] = changed
        folders = []
        for entry in entries:
            path, is_link = entry.path, entry.is_symlink()
            if os.path.isdir(path) if is_link else entry.is_dir():
                folders.append(path)
            elif not is_link and not entry.is_file():
                continue  # a link to nowhere stays: reading it says that the image is missing
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                paths.append(path)
            elif others is not None:
                others.append(path)
        pending += reversed(folders)
    return paths


# ------------------------------------------------------------------------------------------------------------ choices

# Choices are made by hashes of (seed, key), so they depend on no order of files and on no other random number.


def stratified_rows(labels: np.ndarray, keys: np.ndarray, count: int, seed: int, stream: int) -> np.ndarray:
    """Choose `count` of N rows, each class in proportion, by a hash of (seed, key).

    labels, keys: (N,) int64.  Returns sorted rows.  A sample's place in the order of its class depends on its own key
    alone, so one added file moves at most a sample or two of its class.
    """
    order = uniform(seed, 0, stream, torch.from_numpy(np.asarray(keys)))[:, 0].numpy()
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * (count / len(labels))
    counts = np.floor(shares).astype(int)
    remainders = np.argsort(-(shares - counts), kind="stable")  # the largest remainders get the rows that are left
    counts[remainders[: count - counts.sum()]] += 1
    rows = []
    for c, n in zip(classes, counts):
        members = np.flatnonzero(labels == c)
        rows.append(members[np.argsort(order[members], kind="stable")[:n]])
    return np.sort(np.concatenate(rows))


def chosen_rows(data: Any, count: int, seed: int, stream: int) -> np.ndarray:
    """Sorted rows of about `count` samples of a dataset or a Store, which has ids, labels and groups.

    Classes in proportion, as `stratified_rows`; where there are groups, whole ones, as groups.grouped_rows.
    """
    if data.groups is not None:
        groups = optional("common.groups", "a dataset with groups (patients, lesions)")
        return groups.grouped_rows(data.labels, data.groups, count, seed, stream)
    keys = np.array([hash_id(i) for i in data.ids], np.int64)
    return stratified_rows(data.labels, keys, count, seed, stream)


def split_off(dataset: ImageDataset, count: int, seed: int, stream: int) -> tuple[ImageDataset, ImageDataset]:
    """(rest, chosen): `count` samples chosen as in `chosen_rows`."""
    rows = chosen_rows(dataset, count, seed, stream)
    return without_rows(dataset, rows), dataset.subset(rows)


def fixed_test(dataset: ImageDataset) -> dict[str, ImageDataset]:
    """{"train", "test"}: the same test whatever the seeds, so that figures of different runs compare."""
    train, test = split_off(dataset, round(len(dataset) * TEST_SHARE), 0, STREAM_TEST)
    return {"train": train, "test": test}


def limit(dataset: ImageDataset, count: int, seed: int) -> ImageDataset:
    """`count` samples, classes in proportion; groups may be cut, for none leaves its split."""
    return dataset.subset(stratified_rows(dataset.labels, dataset.keys, count, seed, STREAM_LIMIT))


def without_rows(dataset: ImageDataset, rows: np.ndarray) -> ImageDataset:
    """The samples of all other rows."""
    return dataset.subset(np.setdiff1d(np.arange(len(dataset)), rows))


# ------------------------------------------------------------------------------------------------------------- splits


@dataclass
class Splits:
    name: str
    domain: str
    classes: list  # or, of several tasks, {task: list}
    train: ImageDataset = None
    val: ImageDataset = None
    test: ImageDataset = None
    labelled: int = None  # images of train that keep their labels, where not all do
    positive: dict = None  # {task of two classes: index of the positive one}; names (--positive) become it

    def __post_init__(self):
        if not isinstance(self.positive, dict):
            self.positive = positive_classes(self.classes, self.positive or ())

    @property
    def parts(self) -> dict[str, ImageDataset]:
        """{split: its dataset} of those that there are."""
        return {name: getattr(self, name) for name in SPLITS if getattr(self, name) is not None}

    def __str__(self):
        sizes = ", ".join(f"{len(part)} {split}" for split, part in self.parts.items())
        if self.labelled is not None:
            sizes = sizes.replace(" train", f" train ({self.labelled} with labels)")
        if are_findings(self.classes):
            return f"{self.name}: {sizes}, {in_words(self.classes)}"
        tasks = tasks_of(self.classes).items()
        counts = [f"{len(names)} classes" + ("" if task == TASK else f" of {task}") for task, names in tasks]
        positive = [f"{key} class: {name}" for key, name in self.positive_names().items()]
        return ", ".join([f"{self.name}: {sizes}", *counts, *positive])

    def positive_names(self) -> dict[str, str]:
        """For results.json: {"positive": name}, of several tasks <task>_positive for those of two classes."""
        tasks = tasks_of(self.classes)
        several = len(tasks) > 1
        return {f"{t}_positive" if several else "positive": tasks[t][index] for t, index in self.positive.items()}

    def describe(self) -> dict:
        """Plain types for results.json."""
        result = {
            "name": self.name,
            "domain": self.domain,
            "classes": self.classes if isinstance(self.classes, dict) else list(self.classes),
            "sizes": {split: len(part) for split, part in self.parts.items()},
            "sha256": {split: part.fingerprint(self.classes) for split, part in self.parts.items()},
        }
        if self.labelled is not None:  # a run on these alone has the same fingerprint
            few = self.train.subset(np.flatnonzero(next(iter(self.train.targets.values())) >= 0))
            result["labelled"] = {"train": self.labelled, "sha256": few.fingerprint(self.classes)}
        return result


def positive_classes(classes: list | dict, given: list[str] = ()) -> dict[str, int]:
    """{task: index of the positive class} of the tasks with two classes; given: names of --positive.

    Where none is given it is the class beside a NEGATIVE one, else the second.  Raises DataError.
    """
    binary = {task: list(names) for task, names in tasks_of(classes).items() if len(names) == 2}
    unknown = [name for name in given if not any(name in names for names in binary.values())]
    if unknown:
        known = " or ".join(", ".join(names) for names in binary.values())
        problem = f" is not a class: choose {known}" if binary else ": no task here has two classes"
        raise DataError(f"--positive {unknown[0]}{problem}")
    result = {}
    for task, names in binary.items():
        chosen = [name for name in names if name in given]
        if len(chosen) == 2:
            raise DataError(
                f"--positive {' '.join(given)}: {names[0]} and {names[1]} are the two classes of one task, name one"
            )
        chosen = chosen or [name for name, other in (names, names[::-1]) if other.lower() in NEGATIVE]
        result[task] = names.index(chosen[0]) if len(chosen) == 1 else 1
    return result


def load_splits(
    name: str,
    root: str | None = None,
    *,
    splits: tuple = SPLITS,
    classes: list | dict | None = None,
    labels: bool = True,
    positive: list | dict | None = None,
    download: bool = False,
    val_split: float | None = None,
    split_seed: int = 0,
    folds: int | None = None,
    fold: int | None = None,
    limit_train: int | None = None,
    limit_labels: int | None = None,
    include_list: str | None = None,
    on_bad_image: str = "error",
    decode_size: int = 512,
    window: list | None = None,
    frame: int | None = None,
    group_by_patient: bool = False,
    hair_removal: bool = False,
    unlabeled_root: str | None = None,
    **options,
) -> Splits:
    """Read the splits of a dataset; see DATASETS for the names, or FILE.py:FUNCTION (custom.py).

    root: its folder or file; splits: those wanted, the others are None; classes: the names that a checkpoint knows, in
    its order; labels: whether the run needs them, which "unlabeled" has not (-1, no classes, no test); positive: see
    `positive_classes`.

    val_split: share of train that becomes val where the dataset has none (by default that of DATASETS); split_seed:
    fixes val, folds, negatives, limit_train (so many of train, classes in proportion) and limit_labels (so many keep
    their labels, the images that limit_train would leave; the others get -1); folds, fold: see `_divide`; include_list:
    see medical.only_listed.  Patients and lesions are never cut, where the dataset has groups.

    unlabeled_root: a tree of images that train gets beside its own, without labels.  window, frame: see
    medical.to_uint8 and dicom.dicom_image; group_by_patient: groups are the patients of DICOM files; hair_removal: see
    medical.remove_hair; options: see DATASET_OPTIONS.  Raises DataError.
    """
    info = dataset_info(name)
    if name == "unlabeled" and labels:
        raise DataError(
            "--dataset unlabeled has no labels: it is for distill.py --method tokens or embedding without them, "
            "and extract_embeddings.py"
        )
    _check_options(name, options, folds, fold)
    if classes == ["benign", "malignant"] and "binary" in DATASET_OPTIONS.get(name, ()):
        options["binary"] = True
    negatives, extra_train = options.pop("negatives", None), options.pop("extra_train", None)
    medical = None
    if hair_removal or negatives or extra_train or include_list:
        medical = optional("common.medical", "this selection of images")
    if hair_removal:
        medical.opencv()  # refuses where it is missing
    wanted = set(splits) | ({"train", "val"} if folds and set(splits) - {"test"} else set())  # folds are cut from both
    decoding = {"decode_size": decode_size, "window": window}
    parts, class_names = _read(name, root, wanted, classes, download, on_bad_image, decoding, options)
    if name != "unlabeled" and classes is not None:
        parts, class_names = _in_order_of(parts, class_names, classes, name)
    _take_dicom(parts, frame, group_by_patient)
    if on_bad_image == "skip":
        parts = {split: without_bad_images(part) for split, part in parts.items()}
    official = set() if name == "ham10000" else {"val", "test"} & set(parts) - ({"val"} if folds else set())
    divided = _divide(name, info, parts, val_split, split_seed, folds, fold, negatives)
    result = Splits(name, info.domain, class_names, **divided, positive=positive)
    if "train" in splits and (extra_train or include_list):
        sources = ("train", "val") if folds else ("train",)  # what train was chosen from
        result.train = medical.chosen_train(result.train, parts, sources, extra_train, include_list)
    for split in set(SPLITS) - set(splits):
        setattr(result, split, None)
    if classes is None or name == "unlabeled":
        _check_classes(result, official, labels, name in DATASET_OPTIONS or folds or include_list)
    if result.train is not None:
        result.train = _limited(result.train, limit_train, limit_labels, split_seed)
        result.labelled = limit_labels
        if unlabeled_root:
            result.labelled = limit_labels or len(result.train)
            add_images = optional("common.unlabeled", "--unlabeled-root").add_images
            result.train = add_images(result.train, unlabeled_root, on_bad_image)
    if hair_removal:
        medical.mark_for_hair_removal(result.parts)
    return result


def _read(name, root, wanted, classes, download, on_bad_image, decoding, options):
    """({split: ImageDataset}, class names) as a dataset has them; see `load_splits`."""
    if name == "digits":
        return read_digits()
    if name in ("cifar10", "cifar100"):
        return read_cifar(name, root, download)
    if name == "imagefolder":
        return read_imagefolder(root, wanted, classes, **decoding)
    if name == "unlabeled":
        unlabeled = optional("common.unlabeled", "--dataset unlabeled")
        return {"train": unlabeled.read_unlabeled(root, **decoding, **options)}, []
    if ".py:" in name:
        return optional("common.custom", f"--dataset {name}").read_function(name, root, **decoding)
    ordered = [split for split in SPLITS if split in wanted]
    if name in WITH_TEXTS:
        image_text = optional("common.image_text", f"--dataset {name}")
        if "group_column" in options:
            options["group_field"] = options.pop("group_column")
        reader = image_text.read_medpix if name == "medpix" else image_text.read_image_text
        known = classes if isinstance(classes, dict) else None
        return reader(root, splits=ordered, classes=known, on_bad_image=on_bad_image, **decoding, **options)
    medical = optional("common.medical", f"--dataset {name}")
    if name == "medmnist":
        return medical.read_medmnist(root, ordered, decoding["window"])
    decoding = {**decoding, "on_bad_image": on_bad_image}
    if name == "csv":
        return medical.read_csv(root, **decoding, **options)
    if name == "ham10000":
        return medical.read_ham10000(root, **decoding, **options)
    if name == "isic2017":
        return medical.read_isic2017(root, splits=ordered, **decoding, **options)
    return medical.read_isic2024(root, **decoding)


def _take_dicom(parts, frame, group_by_patient):
    """Note which frame of DICOM files is read, and whose they are."""
    for part in parts.values():
        part.frame = frame
        if group_by_patient:
            part.groups = optional("common.dicom", "--group-by-patient").patients(part)


def _in_order_of(parts, names, classes, dataset):
    """The splits and class names of a dataset in the order that a checkpoint's classes have.  Raises DataError."""
    several = isinstance(names, dict)
    if isinstance(classes, dict) != several or several and set(classes) != set(names):
        raise DataError(
            f"--dataset {dataset} has the tasks {', '.join(tasks_of(names))}, the checkpoint knows "
            f"{', '.join(tasks_of(classes))}"
        )
    if several or list(names) == list(classes):
        return parts, names
    unknown = [c for c in names if c not in classes]
    if unknown:
        raise DataError(
            f"{dataset} has {len(names)} classes, the checkpoint knows {len(classes)} ({', '.join(classes[:5])}, ...): "
            f"{', '.join(unknown[:5])} {'is' if len(unknown) == 1 else 'are'} not among them"
        )
    place = np.array([classes.index(c) for c in names], np.int64)
    for part in parts.values():
        part.labels = place[part.labels]
    return parts, list(classes)


def _check_options(name, options, folds, fold):
    for option in options:
        if option not in DATASET_OPTIONS.get(name, ()):
            having = ", ".join(k for k, v in DATASET_OPTIONS.items() if option in v)
            raise DataError(f"--{option.replace('_', '-')} with --dataset {name}: it is for {having or 'none'}")
    if (folds is None) != (fold is None):
        raise DataError("--folds K and --fold I belong together: which of the folds?")
    if folds is not None and (folds < 2 or not 0 <= fold < folds):
        raise DataError(f"--folds {folds} --fold {fold}: there must be two folds at least, numbered from 0 to K - 1")


def _divide(name, info, parts, val_split, split_seed, folds, fold, negatives):
    """The dataset's own parts -> train, val and test.

    With folds, fold number `fold` is val and the others are train, with the dataset's own test; where it has none the
    fold is test, and val is split off the others.  Without folds such a dataset has one fixed test, see `fixed_test`.
    """
    if "train" not in parts:
        return parts
    parts, as_test = dict(parts), "test" not in parts and (name in WITHOUT_TEST or ".py:" in name)
    if as_test and not folds:
        parts.update(fixed_test(parts["train"]))
    elif folds:
        if val_split is not None and not as_test:
            raise DataError(f"--val-split {val_split:g} cannot be combined with --folds: fold {fold} is val")
        pool = parts["train"] if as_test or "val" not in parts else parts["train"].joined(parts["val"])
        split_fold = optional("common.groups", f"--folds {folds}").split_fold
        parts["train"], parts["test" if as_test else "val"] = split_fold(pool, folds, fold, split_seed)
    elif "val" in parts and val_split is not None:
        raise DataError(f"--val-split {val_split}: {name} has a val split of its own ({len(parts['val'])} images)")
    if negatives:
        fewer_negatives = optional("common.medical", "--negatives").fewer_negatives
        parts["train"] = fewer_negatives(parts["train"], negatives, split_seed)
    if "val" not in parts:
        share, images = info.val_split if val_split is None else val_split, len(parts["train"])
        count = round(images * share)
        if 0 < count < images:
            parts["train"], parts["val"] = split_off(parts["train"], count, split_seed, STREAM_VAL)
        if not 0 < count < images or not len(parts["train"]) or not len(parts["val"]):
            raise DataError(f"--val-split {share:g} of {images} images leaves train or val empty")
    if any(part.groups is not None for part in parts.values()):
        optional("common.groups", "a dataset with groups (patients, lesions)").check_groups(parts)
    return parts


def _limited(train, images, labels, seed):
    """`images` of train, of which `labels` keep theirs (None: all); chosen alike, so that the fewer are among the
    more."""
    for flag, count, most in (("train", images, len(train)), ("labels", labels, images or len(train))):
        if count is not None and not 1 <= count <= most:
            raise DataError(f"--limit-{flag} {count} is not in 1 to {most}, the images of train")
    kept = None if labels is None else limit(train, labels, seed).ids
    if images is not None:
        train = limit(train, images, seed)
    if labels is not None:
        unlabelled = ~np.isin(train.ids, kept)
        for values in (train.labels, *train.targets.values()):
            values[unlabelled] = -1
    return train


def _check_classes(result, given, labels, refuse):
    """Say which classes a split lacks; with `refuse` that is an error, but in val or test where they are `given`.

    One class alone is refused where the run needs labels.
    """
    for task, names in tasks_of(result.classes).items():
        kind = "" if task == TASK else f"{task} "
        if len(names) == 1 and labels:
            raise DataError(
                f"--dataset {result.name} has one {kind}class only, {names[0]!r}: there is nothing to tell apart"
            )
        for split, part in result.parts.items():
            present = set(part.targets[task].tolist())
            lacking = [name for label, name in enumerate(names) if label not in present]
            if not lacking:
                continue
            shown = ", ".join([*map(repr, lacking[:5]), *(["..."] if lacking[5:] else [])])
            text = f"{split} has no image of {kind}{shown} ({len(part)} images)"
            if refuse and split not in given:
                advice = ": take another --split-seed, fewer folds, or a larger --val-split or dataset"
                raise DataError(text + ("" if given == {"val", "test"} else advice))
            note(f"{text}: its metrics are of the other classes")


def without_bad_images(dataset: ImageDataset) -> ImageDataset:
    """Decode every file once, say which are broken and leave them out (before val is split off).  Raises DataError."""
    if dataset.paths is None:
        return dataset

    def problem(i):
        try:
            dataset.read(i)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(available_cpus()) as pool:
        problems = list(pool.map(problem, range(len(dataset))))
    bad = [text for text in problems if text]
    if len(bad) == len(problems):
        raise DataError(f"all {len(bad)} images are broken, as {bad[0]}")
    for text in bad:
        print(f"skipped: {text}", flush=True)
    good = np.flatnonzero([text is None for text in problems])
    lost = {label for labels in dataset.targets.values() for label in set(labels.tolist()) - set(labels[good].tolist())}
    if lost:
        raise DataError(f"after skipping {len(bad)} broken images a class has none left (label {min(lost)})")
    return dataset.subset(good)


# ------------------------------------------------------------------------------------------------------------ readers


def read_digits() -> tuple[dict, list]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, with a fixed test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 8 x 8
    full = ImageDataset([f"digits/{i:04d}" for i in range(len(images))], digits.target, images)
    train, test = split_off(full, round(len(full) * DIGITS_TEST_SHARE), 0, STREAM_DIGITS_TEST)
    return {"train": train, "test": test}, [str(i) for i in range(10)]


def read_cifar(name: str, root: str | None, download: bool) -> tuple[dict, list]:
    """cifar10 or cifar100 through torchvision, with its test."""
    import torchvision

    if root is None:
        raise DataError(f"--dataset {name} needs --data-root (or $DATA_ROOT): where the files are or shall go")
    parts, source = {}, getattr(torchvision.datasets, name.upper())  # CIFAR10, CIFAR100
    for split in ("train", "test"):
        try:
            if download and rank():
                barrier()  # rank 0 fetches, then the others find it
            part = source(root, train=split == "train", download=download)
            if download and not rank():
                barrier()
        except RuntimeError as error:
            advice = "the download is damaged, try again" if download else "add --download"
            raise DataError(f"{name} is not in {root} ({str(error).splitlines()[0]}): {advice}") from None
        except OSError as error:
            raise DataError(f"cannot download {name} to {root}: {error}") from None
        parts[split] = ImageDataset([f"{split}/{i:05d}" for i in range(len(part))], part.targets, part.data)
    return parts, part.classes


def read_imagefolder(
    root: str | None, splits: set, classes: list | None, decode_size: int = 512, window: list | None = None
) -> tuple[dict, list]:
    """root/SPLIT/CLASS/...; classes: those of a checkpoint, in its order; by default train's folders."""
    check_folder("imagefolder", root, "train/ and test/ (val/ if there is one)")
    folders, parts, wanted = _split_folders(root), {}, set(splits)
    if "train" in wanted or ("val" in wanted and "val" not in folders):  # val is split off train where it has no folder
        wanted |= {"train", "val"}
    unknown_to = "train/ has not" if classes is None else "the checkpoint does not know"
    for split in SPLITS:
        if split not in wanted or (split == "val" and "val" not in folders):
            continue
        if split not in folders:
            raise DataError(f"{root} has no folder {split}/: imagefolder wants train/CLASS/..., test/CLASS/...")
        folder, paths, labels, others = os.path.join(root, folders[split]), [], [], []
        entries = [e for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(HIDDEN)]
        class_folders = sorted((nfc(e.name), e.path) for e in entries)
        if not class_folders:
            raise DataError(f"{folder} has no class folders")
        if classes is None:
            classes = sorted_classes(folder, [name for name, _ in class_folders])
        place = {nfc(name): label for label, name in enumerate(classes)}
        unknown = [name for name, _ in class_folders if name not in place]
        if unknown:
            raise DataError(f"{folder} has class folders that {unknown_to}: {', '.join(unknown[:5])}")
        for name, below in class_folders:
            files = images_below(below, others=others)
            if not files and split == "train":  # in val and test a class may be absent
                refuse_without_images(below, below)
            paths += files
            labels += [place[name]] * len(files)
        if not paths:
            refuse_without_images(folder, folder)
        if others:
            note(counted(others, f"files in {folder} do not have the extension of an image and are not used"))
        ids = [os.path.relpath(p, root).replace(os.sep, "/") for p in paths]
        parts[split] = ImageDataset(ids, labels, paths=paths, decode_size=decode_size, window=window)
    return parts, list(classes)


def _split_folders(root):
    """{split: its folder in root}: train, val, test, or else one of SPLIT_NAMES in any case, which is noted."""
    folders = {}
    for name in sorted(os.listdir(root), key=lambda name: (name not in SPLIT_NAMES.values(), name)):
        split = SPLIT_NAMES.get(name.lower())
        if split and os.path.isdir(os.path.join(root, name)):
            taken = folders.setdefault(split, name)
            if name != split:
                note(f"{root}: {name}/ is " + (f"taken as {split}" if taken == name else f"not used beside {taken}/"))
    return folders


def refuse_without_images(what: str, folder: str) -> None:
    """Raise DataError for a folder that holds no images, with what else it holds; what: what was named."""
    others = []
    images_below(folder, others=others)
    instead = f", only {counted(others, 'other files')}" if others else ""
    raise DataError(f"{what} holds no images ({', '.join(IMAGE_SUFFIXES)}){instead}")
