"""Tables of images: a CSV file with a row an image.  Needs images.py and distributed.py of `common` and numpy.

table = read_table("train.csv", ["image", "label"])              # {"image": [...], "label": [...]}, strings
"""

import csv
import os
import unicodedata
from decimal import Decimal, InvalidOperation

import numpy as np

from common import distributed
from common.images import MISSING, DataError, ImageDataset, images_below

# by which names a column is found where no flag names it; case and what is neither letter nor digit do not count
COLUMNS = {
    "image": ("image", "image_id", "isic_id", "image_path", "path", "file", "filename", "id"),
    "label": ("label", "target", "class", "diagnosis", "dx"),
    "group": ("group", "patient_id", "patient", "subject_id", "subject", "lesion_id"),
    "split": ("split",),
}
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def note(text):
    """A line on stdout, from one process."""
    if not distributed.rank():
        print(f"note: {text}", flush=True)


def counted(names, what):
    """ "3 rows of x.csv, the first is 'a'", of which `what` is the middle."""
    return f"{len(names)} {what}, the first is {names[0]!r}"


def nfc(name):
    """A name in one of its Unicode forms: macOS writes "ä" as two characters."""
    return unicodedata.normalize("NFC", name)


def check_folder(name, root, content):
    """Refuse a --data-root that is not given or no folder; content: what a dataset of that name has in it."""
    if root is None or not os.path.isdir(root):
        raise DataError(
            f"--dataset {name} needs --data-root FOLDER with "
            f"{content}{'' if root is None else f': {root} is no folder'}"
        )


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
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns {twice[0]!r}: rename or remove one of them")
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


def match_images(table_path, ids, images, where, on_bad_image="error"):
    """(rows, their images) of those whose id has one; images: {id: path}; where: what holds them, for the messages.

    Two rows of one image are refused, as are rows without one, which on_bad_image="skip" skips; images without a row
    are noted.
    """
    seen, twice = set(), []
    for i in ids:
        image = images.get(i, i)  # a file may have two names, "a.png" and "./a.png"
        twice += [i] if image in seen else []
        seen.add(image)
    if twice:
        raise DataError(f"{table_path} has {counted(twice, 'rows whose image an earlier row has')}")
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
    rows = [row for row, i in enumerate(ids) if i in images]
    return rows, [images[ids[row]] for row in rows]


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
    place = {nfc(name): i for i, name in enumerate(classes)}
    values = [nfc(v) for v in values]
    unknown = [v for v in values if v not in place]
    if unknown:
        text = f"rows of {path} have an unknown {column}" if unknown[0] else f"rows of {path} have no {column}"
        raise DataError(f"{counted(unknown, text)}: it must be one of {', '.join(classes[:12])}")
    return np.array([place[v] for v in values], np.int64)


# ------------------------------------------------------------------------------------------------------------ any table


def read_csv(
    root,
    *,
    on_bad_image="error",
    table=None,
    image_column=None,
    label_column=None,
    group_column=None,
    split_column=None,
    **decoding,
):
    """({split: ImageDataset}, classes) of any table; all is train where it has no split column.  Raises DataError."""
    check_folder("csv", root, "the images")
    path = _table_path(root, table)
    content = read_table(path)
    given = {"image": image_column, "label": label_column, "group": group_column, "split": split_column}
    column = {kind: _column(path, content, kind, name) for kind, name in given.items()}
    files = _files_of(content[column["image"]], root)
    rows, _ = match_images(path, content[column["image"]], files, root, on_bad_image)
    content = select_rows(content, _labelled(path, content, column, rows))
    classes = sorted_classes(path, content[column["label"]])
    labels = label_numbers(path, content[column["label"]], classes, column["label"])
    groups = content[column["group"]] if column["group"] else None
    ids = content[column["image"]]
    whole = ImageDataset(ids, labels, paths=[files[i] for i in ids], groups=groups, **decoding)
    spare = [name for name in content if name and name not in column.values()]
    note(
        f"{path}: "
        + ", ".join(f"{kind} from {name}" for kind, name in column.items() if name)
        + (f"; not used: {', '.join(spare[:12])}" if spare else "")
    )
    return _official_splits(
        path, whole, content[column["split"]] if column["split"] else None, column["split"]
    ), classes


def _labelled(path, content, column, rows):
    """Those of the rows that have a label; how many have none is noted.  Raises DataError where none has."""
    labels = content[column["label"]]
    kept = [row for row in rows if labels[row] not in MISSING]
    bare = {content[column["image"]][row]: repr(labels[row]) for row in rows if labels[row] in MISSING}
    if bare:
        text = counted([*bare], f"rows of {path} have no {column['label']} ({' or '.join(sorted({*bare.values()}))})")
        if not kept:
            raise DataError(text)
        note(f"{text}: they are left out")
    return kept


def _table_path(root, table):
    """--table as it is given or in root; by default root's only CSV file."""
    if table:
        return (
            table
            if os.path.exists(table) or not os.path.exists(os.path.join(root, table))
            else os.path.join(root, table)
        )
    found = sorted(f for f in os.listdir(root) if f.lower().endswith(".csv"))
    if len(found) != 1:
        raise DataError(f"{root} holds {len(found)} .csv files: name the one, --table FILE.csv")
    return os.path.join(root, found[0])


def _letters(name):
    """A column's name without what people write in different ways: "Patient ID", "patient_id" and "PatientID"."""
    return "".join(filter(str.isalnum, name.lower()))


def _column(path, content, kind, name):
    if name == "none" and kind in ("group", "split"):
        return None
    if name is not None:
        if name not in content:
            raise DataError(f"{path} has no column {name!r} (--{kind}-column): it has {', '.join(list(content)[:12])}")
        return name
    plain = {_letters(c): c for c in reversed(content)}
    found = next((plain[_letters(c)] for c in COLUMNS[kind] if _letters(c) in plain), None)
    if found is None and kind in ("image", "label"):
        raise DataError(
            f"{path} has no column {', '.join(COLUMNS[kind])}: name the one, --{kind}-column "
            f"(it has {', '.join(list(content)[:12])})"
        )
    return found


def _files_of(names, root):
    """{name: path}, then the images that none names.

    A name is a file's path in root as it is written, or else the path or the name of one image anywhere below it, in
    any case and Unicode form, with or without its ending.  Raises DataError where that is several images.
    """

    def plain(name):
        return os.path.normpath(name.replace("\\", "/"))

    paths, found = images_below(root), {}
    for spell in (plain, lambda name: nfc(plain(name)).casefold()):
        left = [name for name in names if name not in found]
        places = (
            {},
            {},
            {},
            {},
        )  # path in root, the same without its ending, name of the file, the same without its ending
        for path in paths if left else ():
            inside = spell(os.path.relpath(path, root))
            base = os.path.basename(inside)
            for place, key in zip(places, (inside, os.path.splitext(inside)[0], base, os.path.splitext(base)[0])):
                place[key] = None if key in place else path  # None: several
        for name in left:
            hits = [place[spell(name)] for place in places if spell(name) in place]
            if hits and hits[0] is None:
                raise DataError(f"{name!r} is the name of several images below {root}: write its folder too")
            found.update({name: hits[0]} if hits else {})
    elsewhere = {name: os.path.join(root, plain(name)) for name in names if name not in found}  # or of another ending
    found.update((name, path) for name, path in elsewhere.items() if os.path.isfile(path))
    used = set(found.values())
    found.update((os.path.relpath(path, root), path) for path in paths if path not in used)
    return found


def sorted_classes(path, names):
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


def _official_splits(path, whole, values, column):
    if values is None:
        return {"train": whole}
    unknown = [v for v in values if v.lower() not in SPLIT_NAMES]
    if unknown:
        raise DataError(
            f"{counted(unknown, f'rows of {path} have an unknown {column}')}: it must be train, val or test "
            "(--split-column none ignores it)"
        )
    splits = np.array([SPLIT_NAMES[v.lower()] for v in values])
    return {s: whole.subset(np.flatnonzero(splits == s)) for s in SPLITS if (splits == s).any()}
