"""Datasets and their splits.

Needs augment.py, dermatology.py, distributed.py, images.py, splitting.py and tables.py of `common`, torch and numpy
(loader.py too for medmnist, image_text.py for medpix and image_text; scikit-learn for digits, torchvision for CIFAR, h5py for ISIC 2024,
opencv-python-headless for hair removal, datasets for --hf-dataset).

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
from common.augment import PRESETS, Policy
from common.dermatology import BINARY, STREAM_NEGATIVES, add_positives, fixed_test, read_ham10000, read_isic2017, read_isic2024
from common.images import (
    IMAGE_SUFFIXES,
    TASK,
    DataError,
    ImageDataset,
    RowImage,
    available_cpus,
    images_below,
    listed_images,
    opencv,
    remove_hair,
    rows_with_images,
    tasks_of,
    to_uint8,
)
from common.splitting import check_groups, limit, split_fold, split_off, stratified_rows, without_rows
from common.tables import counted, note, read_csv

DIGITS_TEST_SHARE = 0.4  # of scikit-learn's 1,797 digits, which come without a split
STREAM_VAL, STREAM_LIMIT, STREAM_DIGITS_TEST, STREAM_FOLDS = 1001, 1002, 1003, 1006  # of the counter-based generator
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
    "csv": DatasetInfo("custom", 224, *IMAGENET, CROP_AND_FLIP, 0.15),
    "ham10000": DatasetInfo("medical", 224, *IMAGENET, PRESETS["derm"], 0.15),
    "isic2017": DatasetInfo("medical", 224, *IMAGENET, PRESETS["derm"]),
    "isic2024": DatasetInfo("medical", 224, *IMAGENET, PRESETS["derm"], 0.2),
    "medpix": DatasetInfo("medical", 224, *IMAGENET, Policy("pad", 0.125, rotation=10)),
    "image_text": DatasetInfo("custom", 224, *IMAGENET, Policy("pad", 0.125)),
    # val only says how far the student is from its teacher, for which some thousand images are enough
    "unlabeled": DatasetInfo("custom", 224, *IMAGENET, Policy("resized", hflip=0.5), 0.05),
}
# options of `load_splits` that one dataset has
OWN_OPTIONS = {
    "csv": ("table", "image_column", "label_column", "group_column", "split_column"),
    "ham10000": ("binary",),
    "isic2017": ("binary",),
    "isic2024": ("binary", "negatives", "extra_train"),  # it is binary anyway
    "unlabeled": ("hf_dataset",),
    "medpix": ("text_fields",),
    "image_text": ("text_fields", "tasks", "group_column"),
}
WITHOUT_TEST = ("csv", "isic2024")  # the first may have one
WITH_TEXTS = ("medpix", "image_text")  # and several tasks


@dataclass
class Splits:
    name: str
    domain: str
    classes: list  # or, of several tasks, {task: list}
    train: ImageDataset = None
    val: ImageDataset = None
    test: ImageDataset = None

    def __str__(self):
        parts = {k: getattr(self, k) for k in ("train", "val", "test")}
        sizes = ", ".join(f"{len(part)} {k}" for k, part in parts.items() if part is not None)
        counts = ", ".join(f"{len(names)} classes" + ("" if task == TASK else f" of {task}") for task, names in tasks_of(self.classes).items())
        return f"{self.name}: {sizes}, {counts}"

    def describe(self):
        """Plain types for results.json."""
        parts = {k: getattr(self, k) for k in ("train", "val", "test") if getattr(self, k) is not None}
        return {
            "name": self.name,
            "domain": self.domain,
            "classes": self.classes if isinstance(self.classes, dict) else list(self.classes),
            "sizes": {k: len(v) for k, v in parts.items()},
            "sha256": {k: v.fingerprint(self.classes) for k, v in parts.items()},
        }


def load_splits(name, root=None, *, val_split=None, split_seed=0, limit_train=None, splits=("train", "val", "test"),
                classes=None, download=False, on_bad_image="error", decode_size=512, window=None, hair_removal=False,
                folds=None, fold=None, include_list=None, labels=True, **own):
    """Read a dataset's splits; see DATASETS for the names.

    root: the folder (medmnist: the .npz, or a folder with one); val_split: share of train that becomes val where the
    dataset has none of its own (by default DATASETS'); split_seed: fixes val, folds, negatives and limit_train (that
    many of train, classes in proportion); splits: those wanted, the others are None; classes: the names a checkpoint
    knows, in its order, for an outside test set; window: see `to_uint8`; hair_removal: see `remove_hair`; folds, fold:
    see `_divide`; include_list: a file of images' names, a line each, train keeps only these, or, beside extra_train,
    all of its own and of the extra images these: see `_only_listed`; labels: whether the run needs them, which
    "unlabeled" has not (-1, no classes, no test); own: see OWN_OPTIONS and the readers.  Patients and lesions are never
    cut, where the dataset has groups.  Raises DataError.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    if window is not None and not -math.inf < window[0] < window[1] < math.inf:
        raise DataError(f"--window {window[0]:g} {window[1]:g}: LOW must be below HIGH")
    if name == "unlabeled" and labels:
        raise DataError("--dataset unlabeled has no labels: it is for distill.py --method tokens or embedding without them, and extract_embeddings.py")
    _check_options(name, own, folds, fold)
    if hair_removal:
        opencv()  # refuses where it is missing
    if classes is not None and list(classes) == BINARY and "binary" in OWN_OPTIONS.get(name, ()):
        own["binary"] = True
    negatives, extra_train = own.pop("negatives", None), own.pop("extra_train", None)
    wanted = set(splits) | ({"train", "val"} if folds and set(splits) - {"test"} else set())  # folds are cut from both
    if name == "digits":
        parts, found = _digits()
    elif name in ("cifar10", "cifar100"):
        parts, found = _cifar(name, root, download)
    elif name == "medmnist":
        parts, found = _medmnist(root, window, wanted)
    elif name == "imagefolder":
        parts, found = _imagefolder(root, wanted, classes, decode_size, window)
    elif name == "unlabeled":
        parts, found, classes = {"train": _unlabeled(root, decode_size, window, **own)}, [], None
    elif name in WITH_TEXTS:
        from common.image_text import read_image_text, read_medpix

        if "group_column" in own:
            own["group_field"] = own.pop("group_column")
        known = classes if isinstance(classes, dict) else None
        reader = read_medpix if name == "medpix" else read_image_text
        parts, found = reader(root, splits=[split for split in ("train", "val", "test") if split in wanted], classes=known, on_bad_image=on_bad_image,
                              decode_size=decode_size, window=window, **own)  # fmt: skip
    else:
        decoding = {"decode_size": decode_size, "window": window, "on_bad_image": on_bad_image}
        if name == "csv":
            parts, found = read_csv(root, **decoding, **own)
        elif name == "ham10000":
            parts, found = read_ham10000(root, **decoding, **own)
        elif name == "isic2017":
            parts, found = read_isic2017(root, splits=wanted, **decoding, **own)
        else:
            parts, found = read_isic2024(root, **decoding)
    if classes is not None and isinstance(classes, dict) != isinstance(found, dict):
        raise DataError(f"--dataset {name} has the tasks {', '.join(tasks_of(found))}, the checkpoint knows {', '.join(tasks_of(classes))}")
    if classes is not None and not isinstance(found, dict) and list(classes) != list(found):
        parts = {k: _with_classes(v, found, list(classes), name) for k, v in parts.items()}
        found = classes
    if on_bad_image == "skip":
        parts = {k: without_bad_images(v) for k, v in parts.items()}
    known = {i for part in parts.values() for i in part.ids} if extra_train else None
    pool = [parts[k] for k in ("train", "val") if k in parts and (k == "train" or folds)]  # what train is chosen from
    parts = _divide(name, parts, val_split, split_seed, folds, fold, negatives)
    result = Splits(name, DATASETS[name].domain, found if isinstance(found, dict) else list(found), **parts)
    own = len(result.train) if "train" in splits and extra_train else None
    if own is not None:
        result.train = add_positives(result.train, extra_train, known)
    if "train" in splits and include_list:
        result.train = _only_listed(result.train, include_list, pool, own)
    for split in {"train", "val", "test"} - set(splits):
        setattr(result, split, None)
    if classes is None and (name in OWN_OPTIONS or folds or include_list):
        _check_classes(result)
    if limit_train is not None and result.train is not None:
        if not 1 <= limit_train <= len(result.train):
            raise DataError(f"--limit-train {limit_train} is not in 1 to {len(result.train)}, the images of train")
        result.train = limit(result.train, limit_train, split_seed, STREAM_LIMIT)
    if hair_removal:
        for part in filter(None, (result.train, result.val, result.test)):
            part.hair_removal = True
            if part.images is not None:  # small images that lie decoded in memory
                part.images = np.stack([remove_hair(part.read(i)) for i in range(len(part))])
    return result


def load_folder(folder, decode_size=512, window=None, on_bad_image="error", hair_removal=False):
    """The images anywhere below a folder, unlabelled (label -1), as ImageDataset; an id is the path below the folder.

    Keywords as in `load_splits`.  Raises DataError.
    """
    if hair_removal:
        opencv()
    dataset = _tree("--images", folder, decode_size, window)
    dataset.hair_removal = hair_removal
    return without_bad_images(dataset) if on_bad_image == "skip" else dataset


def _tree(flag, folder, decode_size, window):
    """The images anywhere below a folder, unlabelled; an id is the path below the folder."""
    if not os.path.isdir(folder):
        raise DataError(f"{flag} {folder} is no folder")
    folder = os.path.realpath(folder)
    paths = listed_images(folder)
    if not paths:
        raise DataError(f"{flag} {folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    ids = [path[len(folder.rstrip(os.sep)) + 1 :].replace(os.sep, "/") for path in paths]
    return ImageDataset(ids, np.full(len(ids), -1), paths=paths, decode_size=decode_size, window=window)


def _unlabeled(root, decode_size, window, hf_dataset=None):
    if hf_dataset:
        source = os.path.abspath(hf_dataset) if os.path.isdir(hf_dataset) else hf_dataset
        split, column, rows = rows_with_images(source)
        paths = [RowImage(source, split, column, row) for row in range(len(rows))]
        return ImageDataset([f"{split}/{row:08d}" for row in range(len(rows))], np.full(len(rows), -1), paths=paths,
                            decode_size=decode_size, window=window)  # fmt: skip
    if root is None:
        raise DataError("--dataset unlabeled needs --data-root FOLDER, any tree of images, or --hf-dataset NAME_OR_FOLDER")
    return _tree("--data-root", root, decode_size, window)


def _check_options(name, own, folds, fold):
    for option in own:
        if option not in OWN_OPTIONS.get(name, ()):
            having = ", ".join(k for k, v in OWN_OPTIONS.items() if option in v)
            raise DataError(f"--{option.replace('_', '-')} with --dataset {name}: it is for {having or 'none'}")
    if (folds is None) != (fold is None):
        raise DataError("--folds K and --fold I belong together: which of the folds?")
    if folds is not None and (folds < 2 or not 0 <= fold < folds):
        raise DataError(f"--folds {folds} --fold {fold}: there must be two folds at least, numbered from 0 to K - 1")


def _divide(name, parts, val_split, split_seed, folds, fold, negatives):
    """The dataset's own parts -> train, val and test.

    With folds, fold number `fold` is val and the others are train, with the dataset's own test; where it has none the
    fold is test, and val is split off the others.  Without folds such a dataset has one fixed test, see `fixed_test`.
    """
    if "train" not in parts:
        return parts
    parts, as_test = dict(parts), name in WITHOUT_TEST and "test" not in parts
    if as_test and not folds:
        parts.update(fixed_test(parts["train"]))
    elif folds:
        if val_split is not None and not as_test:
            raise DataError(f"--val-split {val_split:g} and --folds contradict each other: fold {fold} is val")
        pool = parts["train"] if as_test or "val" not in parts else parts["train"].joined(parts["val"])
        parts["train"], parts["test" if as_test else "val"] = split_fold(pool, folds, fold, split_seed, STREAM_FOLDS)
    elif "val" in parts and val_split is not None:
        raise DataError(f"--val-split {val_split}: {name} has a val split of its own ({len(parts['val'])} images)")
    if negatives:
        parts["train"] = _fewer_negatives(parts["train"], negatives, split_seed)
    if "val" not in parts:
        share, images = DATASETS[name].val_split if val_split is None else val_split, len(parts["train"])
        count = round(images * share)
        if 0 < count < images:
            parts["train"], parts["val"] = split_off(parts["train"], count, split_seed, STREAM_VAL)
        if not 0 < count < images or not len(parts["train"]) or not len(parts["val"]):
            raise DataError(f"--val-split {share:g} of {images} images leaves train or val empty")
    check_groups(parts)
    return parts


def _fewer_negatives(dataset, count, seed):
    """All positives and `count` negatives (label 0), chosen by a hash of (seed, key)."""
    negative = np.flatnonzero(dataset.labels == 0)
    if count > len(negative):
        raise DataError(f"--negatives {count}: train and val have {len(negative)}")
    kept = stratified_rows(dataset.labels[negative], dataset.keys[negative], count, seed, STREAM_NEGATIVES)
    return without_rows(dataset, np.delete(negative, kept))


def _only_listed(train, path, pool, own=None):
    """Train's samples that a file names, a line each; own: the first that many are kept in any case, the others are extra.

    A name is an id, or else the path in --extra-train (of "extra/a/x.png" a/x.png), or else what one image alone has, of
    the extra ones or of `pool`, the datasets that train was chosen from (so that no name means another image where val
    takes its own): the end of its id's path, its file's name, or that without its ending.  Raises DataError.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            names = [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise DataError(f"cannot read --include-list {path}: {error.strerror}") from None
    if own is not None:
        images = list(zip(train.ids[own:], train.paths[own:]))
    else:
        images = [image for part in pool for image in zip(part.ids, part.ids if part.paths is None else part.paths)]
    wanted, places = set(names), ({}, {}, {})
    for i, file in images:
        parts, file = i.split("/"), os.path.basename(str(file))
        ends = {"/".join(parts[k:]) for k in range(1, len(parts))} | {file, os.path.splitext(file)[0]}
        for place, keys in zip(places, ({i}, set() if own is None else {i.removeprefix("extra/")}, ends)):
            for key in keys & wanted:
                place.setdefault(key, []).append(i)
    rows = {i: row for row, i in enumerate(train.ids)}
    kept, unknown, where = set(), [], "train" if own is None else "the extra images"
    for name in names:
        found = next((place[name] for place in places if name in place), [])
        if len(found) > 1:
            raise DataError(f"{path}: {name!r} is the name of {len(found)} images of {where}: write their ids, as {found[0]}")
        if found and found[0] in rows:
            kept.add(rows[found[0]])
        else:
            unknown.append(name)
    if not kept:
        raise DataError(f"--include-list {path} leaves {where} empty: none of its {len(names)} names is in {where}, as {train.ids[own or 0]}")
    if unknown:
        note(counted(unknown, f"names of {path} are not in {where}"))
    return train.subset(np.array([*range(own or 0), *sorted(kept)]))


def _check_classes(result):
    """Refuse a split that lacks a class: its metrics would mean nothing."""
    for split in ("train", "val", "test"):
        part = getattr(result, split)
        for task, names in tasks_of(result.classes).items() if part is not None else ():
            present = set(part.targets[task].tolist())
            for label, name in enumerate(names):
                if label not in present:
                    raise DataError(f"{split} has no image of the class {name!r} ({len(part)} images): take another --split-seed, fewer folds, "
                                    "or a larger --val-split or dataset")  # fmt: skip


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


def _medmnist(root, window, wanted):
    if root is None:
        raise DataError("--dataset medmnist needs --data-root FILE.npz")
    path = root
    if os.path.isdir(root):
        files = sorted(f for f in os.listdir(root) if f.endswith(".npz"))
        if len(files) != 1:
            raise DataError(f"{root} holds {len(files)} .npz files: name the one, --data-root FILE.npz")
        path = os.path.join(root, files[0])
    kept = wanted | ({"val"} if "train" in wanted else set())
    arrays = _read_npz(path, [f"{s}_images" for s in sorted(kept)] + [f"{s}_labels" for s in ("train", "val", "test")])
    for split in {"train", "val", "test"} - kept:  # their labels say what classes there are
        arrays[f"{split}_images"] = np.broadcast_to(np.uint8(0), (len(arrays[f"{split}_labels"]), 1, 1))
    num_classes, parts = 0, {}
    for split in ("train", "val", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3) or not images.size:
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
    return {split: part for split, part in parts.items() if split in kept}, [str(i) for i in range(num_classes)]


def _read_npz(path, names):
    """{name: array} of a MedMNIST file.  By the headers, before any array is read, refuses what holds no numbers or does
    not fit in memory: 3 MB may unpack to 3 GB.  Raises DataError."""
    from common.loader import available_memory

    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [n for n in names if n not in archive.files]
            if missing:
                raise DataError(f"{path} is no MedMNIST file: it lacks {', '.join(missing)}")
            needed, free = 0, available_memory()
            for name in names:
                with archive.zip.open(f"{name}.npy") as file:
                    version = min(np.lib.format.read_magic(file)[0], 2)  # the third has the second's layout
                    shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(file)
                if dtype.kind not in "biuf":
                    raise DataError(f"{path}: {name} holds values of type {dtype}, not numbers")
                needed += math.prod(shape) * (dtype.itemsize + (dtype.itemsize > 1))  # what is deeper becomes uint8
            if needed > free:
                sizes = f"{needed / 1e9:,.1f} GB of memory unpacked, {free / 1e9:,.1f} GB are free"
                raise DataError(f"{path} takes {sizes}: use a smaller file or more memory")
            return {n: archive[n] for n in names}
    except (DataError, MemoryError):
        raise
    except Exception as error:  # zipfile and numpy raise half a dozen kinds on a damaged file
        raise DataError(f"cannot read {path}: {error}") from None


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


def without_bad_images(dataset):
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
    if len(bad) == len(complaints):
        raise DataError(f"all {len(bad)} images are broken, as {bad[0]}")
    for text in bad:
        print(f"skipped: {text}", flush=True)
    good = np.array([i for i, text in enumerate(complaints) if not text], int)
    lost = {label for labels in dataset.targets.values() for label in set(labels.tolist()) - set(labels[good].tolist())}
    if lost:
        raise DataError(f"after skipping {len(bad)} broken images a class has none left (label {min(lost)})")
    return dataset.subset(good)
