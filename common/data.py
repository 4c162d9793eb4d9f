"""Datasets and their splits.

Needs augment.py, dermatology.py, distributed.py, images.py, splitting.py and tables.py of `common`, torch and numpy
(loader.py too for medmnist, image_text.py for medpix and image_text; scikit-learn for digits, torchvision for CIFAR,
h5py for ISIC 2024,
opencv-python-headless for hair removal, datasets for --hf-dataset).

    splits = load_splits("imagefolder", "data/cifar10")              # .train .val .test .classes .domain

A dataset yields `index, id, image (uint8), targets {task: label}` and never augments; see augment.py.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common import distributed
from common.augment import PRESETS, Policy
from common.dermatology import (
    BINARY,
    STREAM_NEGATIVES,
    add_positives,
    fixed_test,
    read_ham10000,
    read_isic2017,
    read_isic2024,
)
from common.images import (
    HIDDEN,
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
from common.tables import SPLIT_NAMES, SPLITS, counted, nfc, note, read_csv, sorted_classes

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
    student_labels: int = 0  # with which students are trained (--limit-train, of distill.py --limit-labels); 0 is all


DATASETS = {
    # a hundred labels: enough to learn from, too few to learn all of it alone, so that a teacher has something to give
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
NEGATIVE = (
    "0",
    "benign",
    "control",
    "false",
    "healthy",
    "negative",
    "no",
    "normal",
)  # beside one of these the other class is positive


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
    def parts(self):
        """{split: its dataset} of those that there are."""
        return {name: getattr(self, name) for name in SPLITS if getattr(self, name) is not None}

    def __str__(self):
        sizes = ", ".join(f"{len(part)} {k}" for k, part in self.parts.items())
        sizes = sizes.replace(" train", f" train ({self.labelled} with labels)") if self.labelled is not None else sizes
        counts = ", ".join(
            f"{len(names)} classes" + ("" if task == TASK else f" of {task}")
            for task, names in tasks_of(self.classes).items()
        )
        return ", ".join(
            [
                f"{self.name}: {sizes}, {counts}",
                *(f"{key} class: {name}" for key, name in self.positive_names().items()),
            ]
        )

    def positive_names(self):
        """For results.json: {"positive": name}, of several tasks <task>_positive for those of two classes."""
        tasks = tasks_of(self.classes)
        return {
            f"{task}_positive" if len(tasks) > 1 else "positive": tasks[task][index]
            for task, index in self.positive.items()
        }

    def describe(self):
        """Plain types for results.json."""
        if self.labelled is not None:  # a run on these alone has the same fingerprint
            few = self.train.subset(np.flatnonzero(next(iter(self.train.targets.values())) >= 0))
        return {
            "name": self.name,
            "domain": self.domain,
            "classes": self.classes if isinstance(self.classes, dict) else list(self.classes),
            "sizes": {k: len(v) for k, v in self.parts.items()},
            "sha256": {k: v.fingerprint(self.classes) for k, v in self.parts.items()},
            **(
                {}
                if self.labelled is None
                else {"labelled": {"train": self.labelled, "sha256": few.fingerprint(self.classes)}}
            ),
        }


def positive_classes(classes, given=()):
    """{task: index of the positive class} of the tasks with two classes; given: names of --positive.  Raises
    DataError."""
    binary = {task: list(names) for task, names in tasks_of(classes).items() if len(names) == 2}
    unknown = [name for name in given if not any(name in names for names in binary.values())]
    if unknown:
        known = " or ".join(", ".join(names) for names in binary.values())
        raise DataError(
            f"--positive {unknown[0]} is no class: choose {known}"
            if binary
            else f"--positive {unknown[0]}: no task here has two classes"
        )
    found = {}
    for task, names in binary.items():
        chosen = [name for name in names if name in given]
        if len(chosen) == 2:
            raise DataError(
                f"--positive {' '.join(given)}: {names[0]} and {names[1]} are the two classes of one task, name one"
            )
        chosen = chosen or [b for a, b in (names, names[::-1]) if a.lower() in NEGATIVE]
        found[task] = names.index(chosen[0]) if len(chosen) == 1 else 1
    return found


def load_splits(
    name,
    root=None,
    *,
    val_split=None,
    split_seed=0,
    limit_train=None,
    limit_labels=None,
    splits=SPLITS,
    classes=None,
    download=False,
    on_bad_image="error",
    decode_size=512,
    window=None,
    hair_removal=False,
    folds=None,
    fold=None,
    include_list=None,
    labels=True,
    positive=None,
    **own,
):
    """Read a dataset's splits; see DATASETS for the names.

    root: the folder (medmnist: the .npz, or a folder with one); val_split: share of train that becomes val where the
    dataset has none of its own (by default DATASETS'); split_seed: fixes val, folds, negatives, limit_train (that
    many of train, classes in proportion) and limit_labels (so many keep their labels, the images that limit_train would
    leave; the others get -1); splits: those wanted, the others are None; classes: the names a checkpoint
    knows, in its order, for an outside test set; window: see `to_uint8`; hair_removal: see `remove_hair`; folds, fold:
    see `_divide`; include_list: a file of images' names, a line each, train keeps only these, or, beside extra_train,
    all of its own and of the extra images these: see `_only_listed`; positive: see `positive_classes`; labels: whether
    the run needs them, which
    "unlabeled" has not (-1, no classes, no test); own: see OWN_OPTIONS and the readers.  Patients and lesions are never
    cut, where the dataset has groups.  Raises DataError.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    if name == "unlabeled" and labels:
        raise DataError(
            "--dataset unlabeled has no labels: it is for distill.py --method tokens or embedding without them, "
            "and extract_embeddings.py"
        )
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
        parts, found = reader(
            root,
            splits=[split for split in SPLITS if split in wanted],
            classes=known,
            on_bad_image=on_bad_image,
            decode_size=decode_size,
            window=window,
            **own,
        )
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
        raise DataError(
            f"--dataset {name} has the tasks {', '.join(tasks_of(found))}, the checkpoint knows "
            f"{', '.join(tasks_of(classes))}"
        )
    if classes is not None and not isinstance(found, dict) and list(classes) != list(found):
        parts = {k: _with_classes(v, found, list(classes), name) for k, v in parts.items()}
        found = classes
    if on_bad_image == "skip":
        parts = {k: without_bad_images(v) for k, v in parts.items()}
    known = {i for part in parts.values() for i in part.ids} if extra_train else None
    pool = [parts[k] for k in ("train", "val") if k in parts and (k == "train" or folds)]  # what train is chosen from
    given = set() if name == "ham10000" else {"val", "test"} & set(parts) - ({"val"} if folds else set())
    parts = _divide(name, parts, val_split, split_seed, folds, fold, negatives)
    result = Splits(
        name, DATASETS[name].domain, found if isinstance(found, dict) else list(found), **parts, positive=positive
    )
    own = len(result.train) if "train" in splits and extra_train else None
    if own is not None:
        result.train = add_positives(result.train, extra_train, known)
    if "train" in splits and include_list:
        result.train = _only_listed(result.train, include_list, pool, own)
    for split in set(SPLITS) - set(splits):
        setattr(result, split, None)
    if classes is None:
        _check_classes(result, given, labels, name in OWN_OPTIONS or folds or include_list)
    if result.train is not None:
        result.train = _limited(result.train, limit_train, limit_labels, split_seed)
        result.labelled = limit_labels
    if hair_removal:
        for part in result.parts.values():
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
        _refuse_without_images(f"{flag} {folder}", folder)
    ids = [path[len(folder.rstrip(os.sep)) + 1 :].replace(os.sep, "/") for path in paths]
    return ImageDataset(ids, np.full(len(ids), -1), paths=paths, decode_size=decode_size, window=window)


def _refuse_without_images(what, folder):
    others = []
    images_below(folder, others=others)
    found = f", only {counted(others, 'other files')}" if others else ""
    raise DataError(f"{what} holds no images ({', '.join(IMAGE_SUFFIXES)}){found}")


def _unlabeled(root, decode_size, window, hf_dataset=None):
    if hf_dataset:
        source = os.path.abspath(hf_dataset) if os.path.isdir(hf_dataset) else hf_dataset
        split, column, rows = rows_with_images(source)
        paths = [RowImage(source, split, column, row) for row in range(len(rows))]
        return ImageDataset(
            [f"{split}/{row:08d}" for row in range(len(rows))],
            np.full(len(rows), -1),
            paths=paths,
            decode_size=decode_size,
            window=window,
        )
    if root is None:
        raise DataError(
            "--dataset unlabeled needs --data-root FOLDER, any tree of images, or --hf-dataset NAME_OR_FOLDER"
        )
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
    """Train's samples that a file names, a line each; own: the first that many are kept in any case, the others are
    extra.

    A name is an id, or else the path in --extra-train (of "extra/a/x.png" a/x.png), or else what one image alone has,
    of
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
            raise DataError(
                f"{path}: {name!r} is the name of {len(found)} images of {where}: write their ids, as {found[0]}"
            )
        if found and found[0] in rows:
            kept.add(rows[found[0]])
        else:
            unknown.append(name)
    if not kept:
        raise DataError(
            f"--include-list {path} leaves {where} empty: none of its {len(names)} names is in {where}, as "
            f"{train.ids[own or 0]}"
        )
    if unknown:
        note(counted(unknown, f"names of {path} are not in {where}"))
    return train.subset(np.array([*range(own or 0), *sorted(kept)]))


def _limited(train, images, labels, seed):
    """`images` of train, of which `labels` keep theirs (None: all); chosen alike, so that the fewer are among the
    more."""
    for flag, count, most in (("train", images, len(train)), ("labels", labels, images or len(train))):
        if count is not None and not 1 <= count <= most:
            raise DataError(f"--limit-{flag} {count} is not in 1 to {most}, the images of train")
    kept = None if labels is None else limit(train, labels, seed, STREAM_LIMIT).ids
    if images is not None:
        train = limit(train, images, seed, STREAM_LIMIT)
    if labels is not None:
        unlabelled = np.flatnonzero(~np.isin(train.ids, kept))
        for values in train.targets.values():
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
            some = ", ".join([*map(repr, lacking[:5]), *(["..."] if lacking[5:] else [])])
            text = f"{split} has no image of {kind}{some} ({len(part)} images)"
            if refuse and split not in given:
                advice = ": take another --split-seed, fewer folds, or a larger --val-split or dataset"
                raise DataError(text + ("" if given == {"val", "test"} else advice))
            note(f"{text}: its metrics are of the other classes")


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
    arrays = _read_npz(path, [f"{s}_images" for s in sorted(kept)] + [f"{s}_labels" for s in SPLITS])
    classes, parts, default = None, {}, DATASETS["medmnist"].resolution
    for split in SPLITS:  # the labels of all say what classes there are
        images, labels = arrays.get(f"{split}_images"), arrays[f"{split}_labels"]
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1 or not len(labels) or split in kept and images.shape[:1] != labels.shape:
            raise DataError(
                f"{path}: {split}_labels of shape {labels.shape} are not one class for each image "
                "(multi-label data are not supported)"
            )
        with np.errstate(invalid="ignore"):
            if (
                labels.dtype.kind == "f" and not (labels % 1).any()
            ):  # whole numbers; NaN % 1 is NaN, which counts as true
                labels = labels.astype(np.int64)
        if labels.dtype.kind not in "ui" or labels.min() < 0:
            raise DataError(f"{path}: {split}_labels are out of range ({labels.dtype}, from {labels.min()})")
        if split == "train":
            classes = np.unique(labels)  # from 0 in MedMNIST's own files, from 1 in others
            if classes[-1] >= 2 * len(classes) + 10:  # as 255, a -1 that was written as uint8
                raise DataError(f"{path}: train_labels are out of range: {labels.max()} where {len(classes)} differ")
        unknown = np.setdiff1d(labels, classes)
        if len(unknown):
            known = ", ".join(map(str, classes[:12]))
            raise DataError(f"{path}: {split}_labels are out of range: {unknown[-1]}, train has {known}")
        if split not in kept:
            continue
        if images.ndim == 4 and images.shape[3] == 1:
            images = images[..., 0]
        if images.ndim not in (3, 4) or images.ndim == 4 and images.shape[3] != 3 or not images.size:
            raise DataError(f"{path}: {split}_images of shape {images.shape} are no grey or colour images")
        side = images.shape[1]
        if split == "train" and side > default:
            note(f"{path} has images of {side} px: --resolution {side} keeps them, the default is {default}")
        images = to_uint8(images, window, f"{path}: {split}_images")
        parts[split] = ImageDataset(
            [f"{split}/{i:06d}" for i in range(len(images))], np.searchsorted(classes, labels), images
        )
    return parts, [str(i) for i in classes]


def _read_npz(path, names):
    """{name: array} of a MedMNIST file; refused before it is read where it does not fit in memory: 3 MB may unpack to 3
    GB.

    Raises DataError.
    """
    from common.loader import available_memory

    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [n for n in names if n not in archive.files]
            if missing:
                raise DataError(f"{path} is no MedMNIST file: it lacks {', '.join(missing)}")
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


def _imagefolder(root, splits, classes, decode_size, window):
    if root is None:
        raise DataError("--dataset imagefolder needs --data-root FOLDER with train/ and test/ (val/ if there is one)")
    if not os.path.isdir(root):
        raise DataError(f"--data-root {root} is no folder")
    folders, parts, wanted, found = (
        _split_folders(root),
        {},
        set(splits),
        list(classes) if classes is not None else None,
    )
    if "train" in wanted or ("val" in wanted and "val" not in folders):  # val is split off train where it has no folder
        wanted |= {"train", "val"}
    for split in SPLITS:
        if split not in wanted or (split == "val" and "val" not in folders):
            continue
        if split not in folders:
            raise DataError(f"{root} has no folder {split}/: imagefolder wants train/CLASS/..., test/CLASS/...")
        folder, paths, labels, others = os.path.join(root, folders[split]), [], [], []
        names = sorted(
            (nfc(e.name), e.path) for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(HIDDEN)
        )
        if not names:
            raise DataError(f"{folder} has no class folders")
        if found is None:
            found = sorted_classes(folder, [name for name, _ in names])
        place = {nfc(name): label for label, name in enumerate(found)}
        unknown = [name for name, _ in names if name not in place]
        if unknown:
            where = "train/ has not" if classes is None else "the checkpoint does not know"
            raise DataError(f"{folder} has class folders that {where}: {', '.join(unknown[:5])}")
        for name, below in names:
            files = images_below(below, others=others)
            if not files and split == "train":  # in val and test a class may be absent
                _refuse_without_images(below, below)
            paths += files
            labels += [place[name]] * len(files)
        if not paths:
            _refuse_without_images(folder, folder)
        if others:
            note(counted(others, f"files in {folder} have no image's ending and are not used"))
        ids = [os.path.relpath(p, root).replace(os.sep, "/") for p in paths]
        parts[split] = ImageDataset(ids, labels, paths=paths, decode_size=decode_size, window=window)
    return parts, found


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
