"""Datasets, splits and decoding.  Needs augment.py and distributed.py of `common`, torch, numpy and pillow
(scikit-learn for digits, torchvision for CIFAR).

    splits = load_splits("imagefolder", "data/cifar10")              # .train .val .test .classes .domain

A dataset yields `index, id, image (uint8), targets {task: label}` and never augments; see augment.py.
"""

import hashlib
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from common import distributed
from common.augment import Policy, hash_id, uniform

TASK = "label"  # the one task of a classification dataset
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
DIGITS_TEST_SHARE = 0.4  # of scikit-learn's 1,797 digits, which come without a split
STREAM_VAL, STREAM_LIMIT, STREAM_DIGITS_TEST = 1001, 1002, 1003  # of the counter-based generator
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CROP_AND_FLIP = Policy(crop="pad", padding=0.125, hflip=0.5)


# Pillow warns of damaged metadata in several lines; what it cannot read it raises
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class DatasetInfo(NamedTuple):
    """What the scripts take where no flag says otherwise."""

    domain: str
    resolution: int  # input side in pixels
    mean: tuple
    std: tuple
    policy: Policy  # augmentation
    val_split: float = 0.1  # share of train, where the dataset has no val of its own
    student_images: int = 0  # --limit-train of the students; 0 is all


DATASETS = {
    # a hundred images: enough to learn from, too few to learn all of it alone, so that a teacher has something to give
    "digits": DatasetInfo("handwriting", 8, (0.305,) * 3, (0.376,) * 3, Policy("pad", 0.125, rotation=10), 0.25, 100),
    "cifar10": DatasetInfo("natural", 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), CROP_AND_FLIP),
    "cifar100": DatasetInfo("natural", 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), CROP_AND_FLIP),
    "imagefolder": DatasetInfo("custom", 32, *IMAGENET, CROP_AND_FLIP),
    "medmnist": DatasetInfo("medical", 28, (0.5,) * 3, (0.5,) * 3, Policy("pad", 0.125)),  # no flips: sides matter
}


class DataError(ValueError):
    """Data that is missing, broken or does not fit (a user's mistake)."""

    exit_code = 2


def available_cpus():
    """Processors that this process may use: a Slurm job has a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------- decoding


def to_uint8(array, window, what):
    """Grey levels of any depth -> uint8.  window: (low, high) mapped to 0..255, those outside are clipped, NaN is 0."""
    if array.dtype in (np.uint8, np.bool_):
        return array * np.uint8(255) if array.dtype == np.bool_ else array
    if window is None:
        raise DataError(
            f"{what} has {array.dtype} grey levels ({array.min()} to {array.max()}): say which of them are black and "
            "white with --window LOW HIGH"
        )
    low, high = window
    levels = np.nan_to_num(array.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.rint((np.clip(levels, low, high) - low) * (255 / (high - low))).astype(np.uint8)


def _is_deep_colour(image):
    """Whether an opened file has 16 bits a colour channel, of which Pillow keeps the upper eight and says nothing."""
    raw_mode = image.tile[0][3] if image.tile else ""
    if isinstance(raw_mode, (tuple, list)):
        raw_mode = raw_mode[0] if raw_mode else ""
    return not image.mode.startswith("I") and str(raw_mode).endswith((";16B", ";16L", ";16N"))


def read_image(path, decode_size=512, window=None):
    """Decode a file to (H, W, 3) uint8.

    Grey becomes three equal channels, transparent pixels black, EXIF rotation is applied, and what is larger than
    decode_size (longest side, pixels) is shrunk to it.  Raises DataError, which names the file.
    """
    try:
        with Image.open(path) as image:
            if _is_deep_colour(image):
                raise DataError(f"{path} has 16-bit colour, which --window cannot map: convert it to 8 bits a channel")
            image.draft("RGB", (decode_size, decode_size))  # a JPEG decodes at 1/2, 1/4 or 1/8, never below this size
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                image = Image.fromarray(to_uint8(np.asarray(image), window, path))
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


# ----------------------------------------------------------------------------------------------------------- datasets


class ImageDataset(torch.utils.data.Dataset):
    """Samples of one split.

    ids: N strings, stable when other files come or go; labels: (N,) int; images: (N, H, W) or (N, H, W, 3) uint8, or
    None where paths (N files) are given.
    """

    def __init__(self, ids, labels, images=None, paths=None, decode_size=512, window=None):
        self.ids, self.labels, self.images, self.paths = list(ids), np.asarray(labels, np.int64), images, paths
        self.keys = np.array([hash_id(i) for i in self.ids], np.int64)
        self.decode_size, self.window = decode_size, window

    def __len__(self):
        return len(self.ids)

    def read(self, i):
        """(H, W, 3) uint8."""
        if self.images is None:
            return read_image(self.paths[i], self.decode_size, self.window)
        image = self.images[i]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, 2)

    def __getitem__(self, i):
        image = torch.from_numpy(np.ascontiguousarray(self.read(i).transpose(2, 0, 1)))  # (3, H, W)
        return {"index": i, "id": self.ids[i], "image": image, "targets": {TASK: int(self.labels[i])}}

    def subset(self, rows):
        """The samples of these rows, in their order."""
        images = None if self.images is None else self.images[rows]
        paths = None if self.paths is None else [self.paths[i] for i in rows]
        ids = [self.ids[i] for i in rows]
        return ImageDataset(ids, self.labels[rows], images, paths, self.decode_size, self.window)

    def fingerprint(self, classes):
        """SHA-256 over ids and class names in order of ids: equal where two runs saw the same samples."""
        lines = sorted(f"{i}\t{classes[label]}\n" for i, label in zip(self.ids, self.labels))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


@dataclass
class Splits:
    name: str
    domain: str
    classes: list
    train: ImageDataset = None
    val: ImageDataset = None
    test: ImageDataset = None

    def __str__(self):
        parts = {k: getattr(self, k) for k in ("train", "val", "test")}
        sizes = ", ".join(f"{len(part)} {k}" for k, part in parts.items() if part is not None)
        return f"{self.name}: {sizes}, {len(self.classes)} classes"

    def describe(self):
        """Plain types for results.json."""
        parts = {k: getattr(self, k) for k in ("train", "val", "test") if getattr(self, k) is not None}
        return {
            "name": self.name,
            "domain": self.domain,
            "classes": list(self.classes),
            "sizes": {k: len(v) for k, v in parts.items()},
            "sha256": {k: v.fingerprint(self.classes) for k, v in parts.items()},
        }


def stratified_rows(labels, keys, count, seed, stream):
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


def split_off(dataset, count, seed, stream):
    """(rest, chosen): `count` samples chosen as in `stratified_rows`."""
    chosen = stratified_rows(dataset.labels, dataset.keys, count, seed, stream)
    rest = np.setdiff1d(np.arange(len(dataset)), chosen)
    return dataset.subset(rest), dataset.subset(chosen)


def load_splits(name, root=None, *, val_split=None, split_seed=0, limit_train=None, splits=("train", "val", "test"),
                classes=None, download=False, on_bad_image="error", decode_size=512, window=None):
    """Read a dataset's splits; see DATASETS for the names.

    root: the folder (medmnist: the .npz, or a folder with one); val_split: share of train that becomes val where the
    dataset has none of its own (by default DATASETS'); split_seed: fixes val and limit_train (that many of train,
    classes in proportion); splits: those wanted, the others are None; classes: the names a checkpoint knows, in its
    order, for an outside test set; window: see `to_uint8`.  Raises DataError.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    if window is not None and not -math.inf < window[0] < window[1] < math.inf:
        raise DataError(f"--window {window[0]:g} {window[1]:g}: LOW must be below HIGH")
    if name == "digits":
        parts, found = _digits()
    elif name in ("cifar10", "cifar100"):
        parts, found = _cifar(name, root, download)
    elif name == "medmnist":
        parts, found = _medmnist(root, window)
    else:
        parts, found = _imagefolder(root, splits, classes, decode_size, window)
    if classes is not None and list(classes) != list(found):
        parts = {k: _with_classes(v, found, list(classes), name) for k, v in parts.items()}
        found = classes
    if on_bad_image == "skip":
        parts = {k: _without_bad_images(v) for k, v in parts.items()}
    result = Splits(name, DATASETS[name].domain, list(found), **parts)
    if result.val is not None and val_split is not None:
        raise DataError(f"--val-split {val_split}: {name} has a val split of its own ({len(result.val)} images)")
    if result.train is not None and result.val is None:
        share = DATASETS[name].val_split if val_split is None else val_split
        count = round(len(result.train) * share)
        if not 0 < count < len(result.train):
            raise DataError(f"--val-split {share:g} of {len(result.train)} images leaves train or val empty")
        result.train, result.val = split_off(result.train, count, split_seed, STREAM_VAL)
    if limit_train is not None and result.train is not None:
        if not 1 <= limit_train <= len(result.train):
            raise DataError(f"--limit-train {limit_train} is not in 1 to {len(result.train)}, the images of train")
        result.train = split_off(result.train, limit_train, split_seed, STREAM_LIMIT)[1]
    for split in {"train", "val", "test"} - set(splits):
        setattr(result, split, None)
    return result


def _with_classes(dataset, found, classes, name):
    """A dataset whose labels point into `found` -> one whose labels point into `classes`, by name."""
    unknown = [c for c in found if c not in classes]
    if unknown:
        raise DataError(
            f"{name} has {len(found)} classes, the checkpoint knows {len(classes)} ({', '.join(classes[:5])}, ...): "
            f"{', '.join(unknown[:5])} {'is' if len(unknown) == 1 else 'are'} not among them"
        )
    dataset.labels = np.array([classes.index(c) for c in found], np.int64)[dataset.labels]
    return dataset


def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 8 x 8
    full = ImageDataset([f"digits/{i:04d}" for i in range(len(images))], digits.target, images)
    train, test = split_off(full, round(len(full) * DIGITS_TEST_SHARE), 0, STREAM_DIGITS_TEST)
    return {"train": train, "test": test}, [str(i) for i in range(10)]


def _cifar(name, root, download):
    import torchvision

    if root is None:
        raise DataError(f"--dataset {name} needs --data-root (or $DATA_ROOT): where the files are or shall go")
    parts, source = {}, {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    for split in ("train", "test"):
        try:
            if download and distributed.rank():
                distributed.barrier()  # rank 0 fetches, then the others find it
            part = source(root, train=split == "train", download=download)
            if download and not distributed.rank():
                distributed.barrier()
        except RuntimeError as error:
            advice = "the download is damaged, try again" if download else "add --download"
            raise DataError(f"{name} is not in {root} ({str(error).splitlines()[0]}): {advice}") from None
        except OSError as error:
            raise DataError(f"cannot download {name} to {root}: {error}") from None
        parts[split] = ImageDataset([f"{split}/{i:05d}" for i in range(len(part))], part.targets, part.data)
    return parts, part.classes


def _medmnist(root, window):
    if root is None:
        raise DataError("--dataset medmnist needs --data-root FILE.npz")
    path = root
    if os.path.isdir(root):
        files = sorted(f for f in os.listdir(root) if f.endswith(".npz"))
        if len(files) != 1:
            raise DataError(f"{root} holds {len(files)} .npz files: name the one, --data-root FILE.npz")
        path = os.path.join(root, files[0])
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [f"{s}_{k}" for s in ("train", "val", "test") for k in ("images", "labels")]
            missing = [n for n in names if n not in archive.files]
            if missing:
                raise DataError(f"{path} is no MedMNIST file: it lacks {', '.join(missing)}")
            arrays = {n: archive[n] for n in names}
    except (DataError, MemoryError):
        raise
    except Exception as error:  # zipfile and numpy raise half a dozen kinds on a damaged file
        raise DataError(f"cannot read {path}: {error}") from None
    num_classes, parts = 0, {}
    for split in ("train", "val", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3) or not len(images):
            raise DataError(f"{path}: {split}_images of shape {images.shape} are no grey or colour images")
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.shape != (len(images),):
            raise DataError(f"{path}: {split}_labels of shape {labels.shape} are not one class for each image")
        if labels.dtype.kind not in "ui" or labels.min() < 0:
            raise DataError(f"{path}: {split}_labels are out of range ({labels.dtype}, from {labels.min()})")
        if split == "train":
            num_classes, present = int(labels.max()) + 1, len(np.unique(labels))
            if num_classes > 2 * present + 10:  # as 255, a -1 that was written as uint8
                raise DataError(f"{path}: train_labels are out of range: {labels.max()} where {present} differ")
        if labels.max() >= num_classes:
            known = f"train has 0 to {num_classes - 1}"
            raise DataError(f"{path}: {split}_labels are out of range: {labels.max()}, {known}")
        images = to_uint8(images, window, f"{path}: {split}_images")
        parts[split] = ImageDataset([f"{split}/{i:06d}" for i in range(len(images))], labels, images)
    return parts, [str(i) for i in range(num_classes)]


def _imagefolder(root, splits, classes, decode_size, window):
    if root is None:
        raise DataError("--dataset imagefolder needs --data-root FOLDER with train/ and test/ (val/ if there is one)")
    if not os.path.isdir(root):
        raise DataError(f"--data-root {root} is no folder")
    parts, found = {}, list(classes) if classes is not None else None
    own_val, wanted = os.path.isdir(os.path.join(root, "val")), set(splits)
    if "train" in wanted or ("val" in wanted and not own_val):  # val is split off train where it has no folder
        wanted |= {"train", "val"}
    for split in ("train", "val", "test"):
        folder = os.path.join(root, split)
        if split not in wanted or (split == "val" and not own_val):
            continue
        if not os.path.isdir(folder):
            raise DataError(f"{root} has no folder {split}/: imagefolder wants train/CLASS/..., test/CLASS/...")
        names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        if not names:
            raise DataError(f"{folder} has no class folders")
        if found is None:
            found = names
        unknown = [n for n in names if n not in found]
        if unknown:
            where = "train/ has not" if classes is None else "the checkpoint does not know"
            raise DataError(f"{folder} has class folders that {where}: {', '.join(unknown[:5])}")
        paths, labels = [], []
        for name in names:
            files = _images_below(os.path.join(folder, name))
            if not files:
                raise DataError(f"{os.path.join(folder, name)} has no images ({', '.join(IMAGE_SUFFIXES[:4])}, ...)")
            paths += files
            labels += [found.index(name)] * len(files)
        ids = [os.path.relpath(p, root).replace(os.sep, "/") for p in paths]
        parts[split] = ImageDataset(ids, labels, paths=paths, decode_size=decode_size, window=window)
    return parts, found


def _images_below(folder):
    paths, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back to a folder above would be walked for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        paths += [
            os.path.join(parent, f) for f in sorted(files) if f.lower().endswith(IMAGE_SUFFIXES) and f[0] != "."
        ]
    return paths


def _without_bad_images(dataset):
    """Decode every file once, say which are broken and leave them out (before val is split off)."""
    if dataset.paths is None:
        return dataset

    def complaint(i):
        try:
            dataset.read(i)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(available_cpus()) as pool:
        complaints = list(pool.map(complaint, range(len(dataset))))
    bad = [text for text in complaints if text]
    for text in bad:
        print(f"skipped: {text}", flush=True)
    good = np.array([i for i, text in enumerate(complaints) if not text], int)
    lost = set(dataset.labels.tolist()) - set(dataset.labels[good].tolist())
    if lost:
        raise DataError(f"after skipping {len(bad)} broken images a class has none left (label {min(lost)})")
    return dataset.subset(good)
