"""Images: decoding and the dataset that holds them.

Needs augment.py of `common`, torch, numpy and pillow (opencv-python-headless for hair removal, h5py for HDF5).
"""

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import stat
import time
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from common.augment import hash_id

TASK = "label"  # the one task of a classification dataset
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
HIDDEN = (".", "@eaDir", "__MACOSX")  # so begins what a desktop, a network drive or an archive leaves beside the images
# how tables write that a value is missing: pandas' list, without what may be a class ("none")
MISSING = {"", "NA", "N/A", "n/a", "#N/A", "<NA>", "nan", "-nan", "NaN", "NAN", "null", "NULL", "Null", "None"}


def tasks_of(classes):
    """{task: its class names} of a dataset's or a checkpoint's classes: a list where TASK is the only one, else this
    dict."""
    return classes if isinstance(classes, dict) else {TASK: classes}


def logits_name(task):
    """The key of a task's logits in a model's output."""
    return "logits" if task == TASK else f"logits_{task}"


def in_words(classes):
    """10 (airplane, automobile, bird, cat, ...); of several tasks modality: 2 (CT, MR) and location: ..."""
    parts = []
    for task, names in tasks_of(classes).items():
        parts.append(
            f"{'' if task == TASK else task + ': '}{len(names)} "
            f"({', '.join([*names[:4], *(['...'] if len(names) > 4 else [])])})"
        )
    return " and ".join(parts)


# Pillow warns of damaged metadata in several lines; what it cannot read it raises
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class DataError(ValueError):
    """Data that is missing, broken or does not fit (a user's mistake)."""

    exit_code = 2


def available_cpus():
    """Processors that this process may use: a Slurm job has a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def optional(module, package, why):
    """A package that one feature needs, imported when it is asked for."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{why} needs the package {package}: pip install {package}") from None


# --------------------------------------------------------------------------------------------------------------- HDF5

_open_files = {}  # (process, path) -> HDF5 file: a worker that was forked opens its own; source -> rows of a dataset


class HDF5Image(NamedTuple):
    """In the place of a file's path: an image whose encoded bytes lie in an HDF5 file under its id."""

    file: str
    id: str

    def __str__(self):
        return f"{self.file}[{self.id}]"

    def open(self):
        h5py, key = optional("h5py", "h5py", self.file), (os.getpid(), self.file)
        if key not in _open_files:
            _open_files[key] = h5py.File(self.file, "r")
        return io.BytesIO(bytes(_open_files[key][self.id][()]))


def hdf5_ids(path):
    """The ids in an HDF5 file.  Raises DataError."""
    h5py = optional("h5py", "h5py", path)
    try:
        with h5py.File(path, "r") as file:
            return list(file)
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


# -------------------------------------------------------------------------------------------------- Hugging Face
# datasets


class RowImage(NamedTuple):
    """In the place of a file's path: an image in a column of a dataset of the package datasets."""

    source: str
    split: str
    column: str
    row: int

    def __str__(self):
        return f"{self.source}[{self.split}][{self.row}]"

    def open(self):
        content = rows_with_images(self.source)[2][self.row][self.column]
        if content["bytes"] is None:
            return open(content["path"], "rb")
        return io.BytesIO(content["bytes"])


def rows_with_images(source):
    """(split, column, its rows with undecoded images) of a dataset on the hub, or of a folder that `save_to_disk`
    wrote.

    The split is train where there is one, else the only one.  Loaded once.  Raises DataError.
    """
    if source not in _open_files:
        _open_files[source] = _load_rows(source)
    return _open_files[source]


def _load_rows(source):
    datasets = optional("datasets", "datasets", "--hf-dataset")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line of ours, not one for each retry
    try:
        found = datasets.load_from_disk(source) if os.path.isdir(source) else datasets.load_dataset(source)
    except Exception as error:  # the hub's and pyarrow's errors are of many kinds
        text = " ".join(str(error).split())[:160]
        raise DataError(
            f"cannot load --hf-dataset {source} ({type(error).__name__}: {text}): where the hub cannot be "
            "reached, load_dataset and "
            "save_to_disk it elsewhere and name that folder"
        ) from None
    split = "train"
    if isinstance(found, dict):
        if "train" not in found and len(found) != 1:
            raise DataError(
                f"--hf-dataset {source} has the splits {', '.join(found)} and no train: save the one that is meant"
            )
        split = "train" if "train" in found else next(iter(found))
        found = found[split]
    column = next((name for name, kind in found.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise DataError(f"--hf-dataset {source} has no column of images, only {', '.join(found.features)}")
    return split, column, found.cast_column(column, datasets.Image(decode=False))


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
    (low, high), out = window, np.empty(array.shape, np.uint8)
    for start in range(0, len(array), 256):  # rows of an image, or images: all in float64 take much
        levels = np.nan_to_num(array[start : start + 256].astype(np.float64), nan=low, posinf=high, neginf=low)
        out[start : start + 256] = np.rint((np.clip(levels, low, high) - low) * (255 / (high - low)))
    return out


def _is_deep_colour(image):
    """Whether an opened file has 16 bits a colour channel, of which Pillow keeps the upper eight and says nothing."""
    raw_mode = image.tile[0][3] if image.tile else ""
    if isinstance(raw_mode, (tuple, list)):
        raw_mode = raw_mode[0] if raw_mode else ""
    return not image.mode.startswith("I") and str(raw_mode).endswith((";16B", ";16L", ";16N"))


def read_image(path, decode_size=512, window=None):
    """Decode a file (its path, an HDF5Image or a RowImage) to (H, W, 3) uint8.

    Grey becomes three equal channels, transparent pixels black, EXIF rotation is applied, and what is larger than
    decode_size (longest side, pixels) is shrunk to it.  Raises DataError, which names the file.
    """
    try:
        if not isinstance(path, (HDF5Image, RowImage)) and not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path} is not a regular file")  # of a pipe nothing might ever come
        with Image.open(path.open() if isinstance(path, (HDF5Image, RowImage)) else path) as image:
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


# -------------------------------------------------------------------------------------------------------- hair removal

# Chosen by eye on HAM10000: hairs go, the network of pigment in a lesion stays.  Shares of the image's longest side.
HAIR_WIDTH, HAIR_LENGTH, HAIR_REACH, INPAINT_RADIUS = 0.03, 0.10, 0.005, 0.005
HAIR_CONTRAST = 10  # grey levels that a hair is darker than what lies around it
HAIR_ANGLES = 24
HAIR_SIDE = 256  # pixels: larger images are searched at this longest side, for the time grows with its cube


def opencv():
    cv2 = optional("cv2", "opencv-python-headless", "--hair-removal")
    cv2.setNumThreads(1)  # images are decoded side by side already
    return cv2


def hair_mask(image):
    """(H, W, 3) uint8 -> (H, W) uint8, 1 on hairs: dark, thin (black-hat), and straight over some length.

    The last is what tells hair from a lesion's own dark lines, as in DullRazor (Lee et al. 1997, Comput. Biol. Med.
    27).
    """
    cv2 = opencv()
    height, breadth = image.shape[:2]
    side = max(height, breadth)
    if side > HAIR_SIDE:
        small = [max(1, round(v * HAIR_SIDE / side)) for v in (breadth, height)]
        found = hair_mask(cv2.resize(image, small, interpolation=cv2.INTER_AREA))
        return cv2.resize(found, (breadth, height), interpolation=cv2.INTER_NEAREST)
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


def remove_hair(image):
    """(H, W, 3) uint8 -> the same with hairs filled from around them (Telea 2004)."""
    cv2 = opencv()
    mask = hair_mask(image)
    return (
        cv2.inpaint(image, mask, max(1, max(image.shape[:2]) * INPAINT_RADIUS), cv2.INPAINT_TELEA)
        if mask.any()
        else image
    )


# ----------------------------------------------------------------------------------------------------------- datasets


class ImageDataset(torch.utils.data.Dataset):
    """Samples of one split.

    ids: N strings, stable when other files come or go; labels: (N,) int; images: (N, H, W) or (N, H, W, 3) uint8, or
    None where paths (N files) are given; groups: N strings, or None: whose images they are (patient, lesion), and an
    image whose group is MISSING is a group of its own; hair_removal: see `remove_hair`, done when a file is decoded.
    """

    def __init__(
        self, ids, labels, images=None, paths=None, decode_size=512, window=None, groups=None, hair_removal=False
    ):
        self.ids, self.labels, self.images, self.paths = list(ids), np.asarray(labels, np.int64), images, paths
        self.keys = np.array([hash_id(i) for i in self.ids], np.int64)
        self.decode_size, self.window, self.hair_removal = decode_size, window, hair_removal
        if groups is not None:
            groups = np.array([i if group in MISSING else group for i, group in zip(self.ids, groups)], dtype=str)
        self.groups = groups

    @property
    def targets(self):
        """{task: labels (N,) int64}"""
        return {TASK: self.labels}

    def __len__(self):
        return len(self.ids)

    def read(self, i):
        """(H, W, 3) uint8."""
        if self.images is None:
            image = read_image(self.paths[i], self.decode_size, self.window)
            return remove_hair(image) if self.hair_removal else image
        image = self.images[i]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, 2)

    def __getitem__(self, i):
        image = torch.from_numpy(np.ascontiguousarray(self.read(i).transpose(2, 0, 1)))  # (3, H, W)
        return {"index": i, "id": self.ids[i], "image": image, "targets": {TASK: int(self.labels[i])}}

    def subset(self, rows):
        """The samples of these rows, in their order."""
        images = None if self.images is None else self.images[rows]
        paths = None if self.paths is None else [self.paths[i] for i in rows]
        groups = None if self.groups is None else self.groups[rows]
        ids = [self.ids[i] for i in rows]
        return ImageDataset(
            ids, self.labels[rows], images, paths, self.decode_size, self.window, groups, self.hair_removal
        )

    def joined(self, other):
        """These samples, then those of another dataset of the same kind."""
        images = None if self.images is None else np.concatenate([self.images, other.images])
        paths = None if self.paths is None else [*self.paths, *other.paths]
        groups = None if self.groups is None else np.concatenate([self.groups, other.groups])
        labels = np.concatenate([self.labels, other.labels])
        return ImageDataset(
            self.ids + other.ids, labels, images, paths, self.decode_size, self.window, groups, self.hair_removal
        )

    def fingerprint(self, classes):
        """SHA-256 over ids and class names in order of ids: equal where two runs saw the same samples."""
        lines = sorted(f"{i}\t{classes[label] if label >= 0 else ''}\n" for i, label in zip(self.ids, self.labels))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def list_cache(folder):
    """Where the list of a folder's images is kept: in $XDG_CACHE_HOME or ~/.cache, for the folder may be read-only."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.path.realpath(folder).encode(errors="surrogateescape")).hexdigest()[:16]
    return os.path.join(home, "distillation", f"images-{name}.json")


def listed_images(folder):
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
    if (
        errors or not folders or max(folders.values()) > time.time_ns() - 2_000_000_000
    ):  # a file that comes within the clock's tick would not be seen
        return paths
    with contextlib.suppress(OSError):  # no home, no space: then it is listed again
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "w") as file:
            names = [os.path.relpath(name, folder) for name in paths]
            json.dump({"root": folder, "names": [*IMAGE_SUFFIXES, *HIDDEN], "folders": folders, "images": names}, file)
        os.replace(f"{path}.{os.getpid()}", path)
    return paths


def images_below(folder, folders_seen=None, onerror=None, others=None):
    """Sorted paths of the images anywhere below a folder, without what is HIDDEN and what is no file, as a pipe.

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
