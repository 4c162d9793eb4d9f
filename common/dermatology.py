"""Skin lesions: HAM10000, ISIC 2017 and ISIC 2024 in their official layouts.

Needs images.py, splitting.py and tables.py of `common` (and what these need) and numpy; h5py for ISIC 2024.

Readers return ({split: ImageDataset}, classes) and raise DataError; `decoding` is passed on to ImageDataset.
"""

import os

import numpy as np

from common.images import DataError, HDF5Image, ImageDataset, hdf5_ids, images_below
from common.splitting import split_off
from common.tables import (
    check_folder,
    counted,
    images_by_name,
    label_numbers,
    match_images,
    note,
    read_table,
    select_rows,
)

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
TEST_SHARE = 0.2  # of a dataset that comes without a test split
STREAM_TEST, STREAM_NEGATIVES = 1004, 1005


def fixed_test(dataset):
    """{"train", "test"}: the same test whatever the seeds, so that figures of different runs compare."""
    train, test = split_off(dataset, round(len(dataset) * TEST_SHARE), 0, STREAM_TEST)
    return {"train": train, "test": test}


def read_ham10000(root, *, on_bad_image="error", binary=False, **decoding):
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


def read_isic2017(root, *, splits, on_bad_image="error", binary=False, **decoding):
    """The challenge's folders ISIC-2017_*_Data and tables ISIC-2017_*_Part3_GroundTruth.csv; its own splits."""
    check_folder("isic2017", root, "ISIC-2017_Training_Data/, ISIC-2017_Training_Part3_GroundTruth.csv, ...")
    parts = {}
    for split in splits:
        name = f"ISIC-2017_{ISIC2017_SPLITS[split]}"
        path, folder = os.path.join(root, f"{name}_Part3_GroundTruth.csv"), os.path.join(root, f"{name}_Data")
        table = read_table(path, ["image_id", "melanoma", "seborrheic_keratosis"])
        if not os.path.isdir(folder):
            raise DataError(f"{root} has no folder {name}_Data/")
        found = images_by_name([folder], keep=lambda stem: not stem.endswith("_superpixels"))
        rows, paths = match_images(path, table["image_id"], found, folder, on_bad_image)
        table = select_rows(table, rows)
        melanoma, keratosis = (_flags(path, column, table[column]) for column in ("melanoma", "seborrheic_keratosis"))
        if (melanoma & keratosis).any():
            both = [i for i, m, k in zip(table["image_id"], melanoma, keratosis) if m and k]
            raise DataError(counted(both, f"rows of {path} are melanoma and seborrheic_keratosis"))
        labels = melanoma if binary else np.where(melanoma, 0, np.where(keratosis, 2, 1))
        parts[split] = ImageDataset(table["image_id"], labels, paths=paths, **decoding)
    return parts, list(BINARY if binary else ISIC2017)


def read_isic2024(root, *, on_bad_image="error", **decoding):
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


def add_positives(train, folder, known):
    """Train with the images of a folder as malignant; known: ids of the dataset, which are left out of them."""
    if not os.path.isdir(folder):
        raise DataError(f"--extra-train {folder} is no folder")
    paths = images_below(folder)
    fresh = [p for p in paths if os.path.splitext(os.path.basename(p))[0] not in known]
    if len(fresh) < len(paths):
        note(f"{len(paths) - len(fresh)} images of --extra-train {folder} are in the dataset already and are left out")
    if not fresh:
        raise DataError(f"--extra-train {folder} has no images that the dataset has not")
    ids = ["extra/" + os.path.relpath(p, folder).replace(os.sep, "/") for p in fresh]
    extra = ImageDataset(ids, [1] * len(ids), paths=fresh, groups=ids)
    return train.joined(extra)


def _flags(path, column, values):
    """(N,) int64 of 0 and 1, written as 0, 1, 0.0 or 1.0."""
    plain = [v.removesuffix(".0") for v in values]
    return label_numbers(path, plain, ["0", "1"], column)
