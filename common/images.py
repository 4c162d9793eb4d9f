"""Images: decoding and the dataset that holds them.

Needs augment.py of `common`, torch, numpy and pillow (opencv-python-headless for hair removal, h5py for HDF5).
"""

import hashlib
import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

from common.augment import hash_id

TASK = "label"  # the one task of a classification dataset
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

# Pillow warns of damaged metadata in several lines; what it cannot read it raises
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


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


def images_below(folder):
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
