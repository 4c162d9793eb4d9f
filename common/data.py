"""Datasets and their splits.  Needs augment.py, distributed.py, images.py and splitting.py of `common`, torch and numpy
(scikit-learn for digits, torchvision for CIFAR).

    splits = load_splits("imagefolder", "data/cifar10")              # .train .val .test .classes .domain

A dataset yields `index, id, image (uint8), targets {task: label}` and never augments; see augment.py.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common import distributed
from common.augment import Policy
from common.images import IMAGE_SUFFIXES, TASK, DataError, ImageDataset, available_cpus, images_below, to_uint8  # noqa: F401
from common.splitting import split_off

DIGITS_TEST_SHARE = 0.4  # of scikit-learn's 1,797 digits, which come without a split
STREAM_VAL, STREAM_LIMIT, STREAM_DIGITS_TEST = 1001, 1002, 1003  # of the counter-based generator
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CROP_AND_FLIP = Policy(crop="pad", padding=0.125, hflip=0.5)


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
            files = images_below(os.path.join(folder, name))
            if not files:
                raise DataError(f"{os.path.join(folder, name)} has no images ({', '.join(IMAGE_SUFFIXES[:4])}, ...)")
            paths += files
            labels += [found.index(name)] * len(files)
        ids = [os.path.relpath(p, root).replace(os.sep, "/") for p in paths]
        parts[split] = ImageDataset(ids, labels, paths=paths, decode_size=decode_size, window=window)
    return parts, found


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
