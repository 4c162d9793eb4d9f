"""Images without labels: any folder of them, and Hugging Face datasets.

Needs augment.py, data.py and run.py of `common`, numpy and pillow (datasets for --hf-dataset).
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from common.data import (
    HIDDEN,
    IMAGE_SUFFIXES,
    DataError,
    ImageDataset,
    images_below,
    refuse_without_images,
    without_bad_images,
)
from common.run import optional


def read_unlabeled(
    root: str | None, decode_size: int = 512, window: list | None = None, hf_dataset: str | None = None
) -> ImageDataset:
    """The images of --hf-dataset, else those anywhere below root, all with the label -1.  Raises DataError."""
    if hf_dataset:
        source = os.path.abspath(hf_dataset) if os.path.isdir(hf_dataset) else hf_dataset
        split, column, rows = rows_with_images(source)
        images = [RowImage(source, split, column, row) for row in range(len(rows))]
        ids = [f"{split}/{row:08d}" for row in range(len(rows))]
        return ImageDataset(ids, np.full(len(ids), -1), paths=images, decode_size=decode_size, window=window)
    if root is None:
        raise DataError(
            "--dataset unlabeled needs --data-root FOLDER, any tree of images, or --hf-dataset NAME_OR_FOLDER"
        )
    return _tree("--data-root", root, decode_size, window)


def load_folder(
    folder: str,
    decode_size: int = 512,
    window: list | None = None,
    on_bad_image: str = "error",
    hair_removal: bool = False,
) -> ImageDataset:
    """The images anywhere below a folder, unlabelled (label -1), as ImageDataset; an id is the path below the folder.

    Keywords as in `load_splits`.  Raises DataError.
    """
    if hair_removal:
        optional("common.medical", "--hair-removal").opencv()  # refuses where it is missing
    dataset = _tree("--images", folder, decode_size, window)
    dataset.hair_removal = hair_removal
    return without_bad_images(dataset) if on_bad_image == "skip" else dataset


def add_images(dataset: ImageDataset, folder: str, on_bad_image: str = "error") -> ImageDataset:
    """A labelled dataset with the images anywhere below a folder beside its own, unlabelled (label -1).

    Their ids begin with "unlabeled/".  Raises DataError.
    """
    if type(dataset) is not ImageDataset:
        raise DataError("--unlabeled-root is for images with one label, without texts")
    more = _tree("--unlabeled-root", folder, dataset.decode_size, dataset.window)
    more.frame = dataset.frame
    more = without_bad_images(more) if on_bad_image == "skip" else more
    ids = [*dataset.ids, *(f"unlabeled/{name}" for name in more.ids)]
    paths = dataset.paths
    if paths is None:
        sample_image = optional("common.custom", "--unlabeled-root beside images in one array").SampleImage
        paths = [sample_image(dataset.images[:, None], row, name) for row, name in enumerate(dataset.ids)]
    groups = None if dataset.groups is None else [*dataset.groups, *ids[len(dataset) :]]
    labels = np.concatenate([dataset.labels, more.labels])
    kept = {"decode_size": dataset.decode_size, "window": dataset.window, "frame": dataset.frame, "groups": groups}
    return ImageDataset(ids, labels, paths=[*paths, *more.paths], **kept)


def _tree(flag, folder, decode_size, window):
    """The images anywhere below a folder, unlabelled; an id is the path below the folder."""
    if not os.path.isdir(folder):
        raise DataError(f"{flag} {folder} is not a folder")
    folder = os.path.realpath(folder)
    paths = listed_images(folder)
    if not paths:
        refuse_without_images(f"{flag} {folder}", folder)
    ids = [path[len(folder.rstrip(os.sep)) + 1 :].replace(os.sep, "/") for path in paths]
    return ImageDataset(ids, np.full(len(ids), -1), paths=paths, decode_size=decode_size, window=window)


def list_cache(folder: str) -> str:
    """Where the list of a folder's images is kept: in $XDG_CACHE_HOME or ~/.cache, for the folder may be read-only."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.path.realpath(folder).encode(errors="surrogateescape")).hexdigest()[:16]
    return os.path.join(home, "distillation", f"images-{name}.json")


def listed_images(folder: str) -> list[str]:
    """`images_below`, from a list of an earlier time where no folder of the tree has changed since."""
    path, folder = list_cache(folder), os.path.realpath(folder)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(path) as file:
            kept = json.load(file)
        fits = kept["root"] == folder and kept["names"] == [*IMAGE_SUFFIXES, *HIDDEN]
        if fits and all(os.stat(name).st_mtime_ns == changed for name, changed in kept["folders"].items()):
            return [os.path.join(folder, name) for name in kept["images"]]
    folders, errors = {}, []
    paths = images_below(folder, folders, errors.append)
    # a file that comes within the clock's tick would not be seen
    if errors or not folders or max(folders.values()) > time.time_ns() - 2_000_000_000:
        return paths
    with contextlib.suppress(OSError):  # no home, no space: then it is listed again
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "w") as file:
            names = [os.path.relpath(name, folder) for name in paths]
            json.dump({"root": folder, "names": [*IMAGE_SUFFIXES, *HIDDEN], "folders": folders, "images": names}, file)
        os.replace(f"{path}.{os.getpid()}", path)
    return paths


# ------------------------------------------------------------------------------------------------ Hugging Face datasets

_loaded = {}  # source -> rows of a dataset


class RowImage(NamedTuple):
    """In the place of a file's path: an image in a column of a dataset of the package datasets."""

    source: str
    split: str
    column: str
    row: int

    def __str__(self):
        return f"{self.source}[{self.split}][{self.row}]"

    def image(self) -> Image.Image:
        content = rows_with_images(self.source)[2][self.row][self.column]
        return Image.open(content["path"] if content["bytes"] is None else BytesIO(content["bytes"]))


def rows_with_images(source: str) -> tuple[str, str, Any]:
    """(split, column, its rows with undecoded images) of a dataset on the hub, or of a folder from `save_to_disk`.

    The split is train where there is one, else the only one.  Loaded once.  Raises DataError.
    """
    if source not in _loaded:
        _loaded[source] = _load_rows(source)
    return _loaded[source]


def _load_rows(source):
    datasets = optional("datasets", "--hf-dataset")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line of ours, not one for each retry
    try:
        rows = datasets.load_from_disk(source) if os.path.isdir(source) else datasets.load_dataset(source)
    except Exception as error:  # the hub's and pyarrow's errors are of many kinds
        text = " ".join(str(error).split())[:160]
        raise DataError(
            f"cannot load --hf-dataset {source} ({type(error).__name__}: {text}): where the hub cannot be "
            "reached, load_dataset and save_to_disk it elsewhere and name that folder"
        ) from None
    split = "train"
    if isinstance(rows, dict):
        if "train" not in rows and len(rows) != 1:
            raise DataError(
                f"--hf-dataset {source} has the splits {', '.join(rows)} and no train: save the one that is meant"
            )
        split = "train" if "train" in rows else next(iter(rows))
        rows = rows[split]
    column = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise DataError(f"--hf-dataset {source} has no column of images, only {', '.join(rows.features)}")
    return split, column, rows.cast_column(column, datasets.Image(decode=False))
