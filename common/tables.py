"""Tables of images: a CSV file with a row an image.  Needs images.py and distributed.py of `common` and numpy.

    table = read_table("train.csv", ["image", "label"])              # {"image": [...], "label": [...]}, strings
"""

import csv
import os

import numpy as np

from common import distributed
from common.images import DataError, ImageDataset, images_below

# by which names a column is found where no flag names it
COLUMNS = {
    "image": ("image", "image_id", "isic_id", "image_path", "path", "file", "filename", "file_name", "id"),
    "label": ("label", "target", "class", "diagnosis", "dx"),
    "group": ("group", "patient_id", "patient", "lesion_id"),
    "split": ("split",),
}
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def note(text):
    """A line on stdout, from one process."""
    if not distributed.rank():
        print(f"note: {text}", flush=True)


def counted(names, what):
    """ "3 rows of x.csv, the first is 'a'", of which `what` is the middle."""
    return f"{len(names)} {what}, the first is {names[0]!r}"


def check_folder(name, root, content):
    """Refuse a --data-root that is not given or no folder; content: what a dataset of that name has in it."""
    if root is None or not os.path.isdir(root):
        raise DataError(f"--dataset {name} needs --data-root FOLDER with {content}{'' if root is None else f': {root} is no folder'}")


def read_table(path, columns=None):
    """{column: strings} of a CSV file with a header; columns: those that must be there.  Raises DataError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: it is no CSV file in UTF-8 ({error})") from None
    for name in columns or []:
        if name not in header:
            raise DataError(f"{path} has no column {name!r}: it has {', '.join(header[:12]) or 'none'}")
    if not rows:
        raise DataError(f"{path} has no rows")
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path} line {line} has {len(row)} values, the header has {len(header)}")
    return {name: [row[i].strip() for _, row in rows] for i, name in enumerate(header)}


def select_rows(table, rows):
    return {name: [values[i] for i in rows] for name, values in table.items()}


def check_ids(path, ids):
    """Refuse ids that stand twice."""
    seen, twice = set(), []
    for i in ids:
        if i in seen:
            twice.append(i)
        seen.add(i)
    if twice:
        raise DataError(f"{path} has {counted(twice, 'rows whose id stands there already')}")


def match_images(table_path, ids, images, where, on_bad_image="error"):
    """[(row, image)] of the rows whose id has one; images: {id: path}; where: what holds them, for the messages.

    Rows without an image are refused, or skipped with on_bad_image="skip"; images without a row are noted.
    """
    check_ids(table_path, ids)
    missing = [i for i in ids if i not in images]
    if missing:
        text = counted(missing, f"rows of {table_path} have no image in {where}")
        if on_bad_image != "skip" or len(missing) == len(ids):
            raise DataError(text + (" (--on-bad-image skip leaves them out)" if len(missing) < len(ids) else ""))
        if not distributed.rank():
            print(f"skipped: {text}", flush=True)
    known = set(ids)
    spare = [i for i in images if i not in known]
    if spare:
        note(counted(spare, f"images in {where} have no row in {table_path} and are not used"))
    return [(row, images[i]) for row, i in enumerate(ids) if i in images]


def images_by_name(folders, keep=lambda stem: True):
    """{file name without its ending: path} of the images below folders; of two of one name the first counts."""
    found = {}
    for folder in folders:
        for path in images_below(folder):
            stem = os.path.splitext(os.path.basename(path))[0]
            if keep(stem):
                found.setdefault(stem, path)
    return found


def label_numbers(path, values, classes, column):
    """(N,) int64: each value's place in classes.  Raises DataError for others, and for none."""
    place = {name: i for i, name in enumerate(classes)}
    unknown = [v for v in values if v not in place]
    if unknown:
        text = f"rows of {path} have an unknown {column}" if unknown[0] else f"rows of {path} have no {column}"
        raise DataError(f"{counted(unknown, text)}: it must be one of {', '.join(classes[:12])}")
    return np.array([place[v] for v in values], np.int64)


# ------------------------------------------------------------------------------------------------------------ any table


def read_csv(root, *, on_bad_image="error", table=None, image_column=None, label_column=None, group_column=None, split_column=None,
             **decoding):
    """({split: ImageDataset}, classes) of any table; all is train where it has no split column.  Raises DataError."""
    check_folder("csv", root, "the images")
    path = _table_path(root, table)
    content = read_table(path)
    given = {"image": image_column, "label": label_column, "group": group_column, "split": split_column}
    column = {kind: _column(path, content, kind, name) for kind, name in given.items()}
    files = _files_of(content[column["image"]], root)
    matched = match_images(path, content[column["image"]], files, root, on_bad_image)
    content = select_rows(content, [row for row, _ in matched])
    names = content[column["label"]]
    classes = sorted_classes(names)
    if "" in classes:
        raise DataError(f"{path}: {names.count('')} rows have no {column['label']}, the first is of image "
                        f"{content[column['image']][names.index('')]!r}")  # fmt: skip
    ids = content[column["image"]]
    groups = [g or i for g, i in zip(content[column["group"]], ids)] if column["group"] else None
    labels = label_numbers(path, names, classes, column["label"])
    whole = ImageDataset(ids, labels, paths=[p for _, p in matched], groups=groups, **decoding)
    note(f"{path}: " + ", ".join(f"{kind} from {name}" for kind, name in column.items() if name))
    return _official_splits(path, whole, content[column["split"]] if column["split"] else None, column["split"]), classes


def _table_path(root, table):
    """--table as it is given or in root; by default root's only CSV file."""
    if table:
        return table if os.path.exists(table) or not os.path.exists(os.path.join(root, table)) else os.path.join(root, table)
    found = sorted(f for f in os.listdir(root) if f.lower().endswith(".csv"))
    if len(found) != 1:
        raise DataError(f"{root} holds {len(found)} .csv files: name the one, --table FILE.csv")
    return os.path.join(root, found[0])


def _column(path, content, kind, name):
    if name == "none" and kind in ("group", "split"):
        return None
    if name is not None:
        if name not in content:
            raise DataError(f"{path} has no column {name!r} (--{kind}-column): it has {', '.join(list(content)[:12])}")
        return name
    found = next((c for c in COLUMNS[kind] if c in content), None)
    if found is None and kind in ("image", "label"):
        raise DataError(f"{path} has no column {', '.join(COLUMNS[kind])}: name the one, --{kind}-column "
                        f"(it has {', '.join(list(content)[:12])})")  # fmt: skip
    return found


def _files_of(names, root):
    """{name: path}: names are paths in root or anywhere below it, with or without their ending; then the files that none names."""
    paths, found, ambiguous = images_below(root), {}, set()
    places = [{}, {}, {}, {}]  # path in root, the same without its ending, name of the file, the same without its ending
    for path in paths:
        inside = os.path.relpath(path, root).replace(os.sep, "/")
        base = inside.rsplit("/", 1)[-1]
        for place, key in zip(places, (inside, os.path.splitext(inside)[0], base, os.path.splitext(base)[0])):
            if place.setdefault(key, path) != path:
                ambiguous.add(key)
    for name in names:
        place = next((p for p in places if name in p), None)
        if place is not None and (place is places[0] or name not in ambiguous):
            found[name] = place[name]
        elif place is not None:
            raise DataError(f"{name!r} is the name of several images below {root}: write its folder too")
        elif os.path.isabs(name) and os.path.isfile(name):
            found[name] = name
    used = set(found.values())
    found.update((os.path.relpath(path, root), path) for path in paths if path not in used)
    return found


def sorted_classes(names):
    """Class names in order: as numbers where all are."""
    try:
        return sorted(set(names), key=float)
    except ValueError:
        return sorted(set(names))


def _official_splits(path, whole, values, column):
    if values is None:
        return {"train": whole}
    unknown = [v for v in values if v.lower() not in SPLIT_NAMES]
    if unknown:
        raise DataError(f"{counted(unknown, f'rows of {path} have an unknown {column}')}: it must be train, val or test "
                        "(--split-column none ignores it)")  # fmt: skip
    splits = np.array([SPLIT_NAMES[v.lower()] for v in values])
    return {s: whole.subset(np.flatnonzero(splits == s)) for s in ("train", "val", "test") if (splits == s).any()}
