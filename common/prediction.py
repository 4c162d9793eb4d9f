"""evaluate.py --predict: class probabilities of new images from a checkpoint alone, as CSV.

Needs cli.py, data.py, distributed.py, evaluation.py, images.py, loader.py and training.py of `common` (and what these
need), torch and
numpy.
"""

import argparse
import csv
import os

import numpy as np

from common import cli, distributed
from common.data import without_bad_images
from common.evaluation import outputs
from common.images import TASK, ImageDataset, images_below, logits_name, opencv, tasks_of
from common.loader import Loader
from common.training import Precision, load_checkpoint, load_model, select_device

# flags that say something beside --predict; --on-bad-image does not, for broken images are named and left out in any
# case
TAKEN = {
    "checkpoint",
    "predict",
    "output",
    "overwrite",
    "device",
    "batch_size",
    "resolution",
    "amp",
    "workers",
    "cache",
    "decode_size",
    "window",
}
MOST_CLASSES = 20  # are counted on stdout


def check_predict_flags(parser, argv=None):
    """Refuse what the command line says beside --predict and what would do nothing there.  Raises UserError."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # so that only what was given is there, be it a default's value
    parser._defaults.clear()
    for name in vars(parser.parse_args(argv)):
        if name not in TAKEN:
            raise cli.UserError(
                f"--{name.replace('_', '-')} and --predict contradict each other: new images have no labels, "
                "nothing is judged"
            )


def predict_files(args, path):
    """Write the probabilities of args.predict's images to `path` and print how often each class is the likeliest.

    Raises UserError, DataError.
    """
    check_output(path, args.overwrite)
    checkpoint = load_predictor(args.checkpoint)
    device = select_device(args.device)
    options = {
        name: value
        for name, value in cli.split_flags(checkpoint["flags"]).items()
        if name in ("decode_size", "window", "hair_removal")
    }
    options.update({name: value for name in ("decode_size", "window") if (value := getattr(args, name)) is not None})
    dataset = new_images(args.predict, **options)
    model, preprocess = load_model(checkpoint, device, args.resolution, args.checkpoint)
    classes = tasks_of(checkpoint["classes"])
    header = columns(classes)
    names = {task: logits_name(task) for task in classes}
    loader = Loader(dataset, args.batch_size, device, cache=args.cache, workers=args.workers)
    found = outputs(model, loader, preprocess, Precision(args.amp, device), tuple(names.values()))
    probabilities = {task: softmax(found[name]) for task, name in names.items()}  # (N, C) each
    if distributed.rank() == 0:
        write_table(path, header, dataset.ids, classes, probabilities)
        print(f"{len(dataset):,} images, {model.name}, {preprocess.resolution} px")
        for task, of in probabilities.items():
            print("\n".join(counts(task, classes[task], of)))
        print(path)


def check_output(path, overwrite):
    if not path.endswith(".csv") or os.path.isdir(path):
        raise cli.UserError(f"--output {path} beside --predict: name a file that ends in .csv")
    if os.path.exists(path) and not overwrite:
        raise cli.UserError(f"{path} is there: --overwrite replaces it, --output names another file")


def load_predictor(path):
    """A checkpoint that classifies images alone.  Raises UserError."""
    if os.path.isdir(path):
        raise cli.UserError(f"--predict contradicts stored embeddings: {path} holds no model")
    checkpoint = load_checkpoint(path)
    if not checkpoint["classes"]:
        raise cli.UserError(f"{path} has no head, it was trained without labels: --predict needs one")
    if checkpoint["model_args"].get("inputs", "image") != "image":
        raise cli.UserError(
            f"{path} reads texts, which --predict has not: take a model that was trained with --inputs image"
        )
    return checkpoint


def new_images(paths, hair_removal=False, **decoding):
    """ImageDataset, unlabelled, of image files and of all images anywhere below folders, hidden ones left out, in order
    of
    their paths, which are their ids; broken ones are named and left out.  Raises UserError, DataError."""
    if hair_removal:
        opencv()  # refuses where it is missing
    found = set()
    for path in map(os.path.normpath, paths):
        if not os.path.exists(path):
            raise cli.UserError(f"--predict {path}: no such file or folder")
        below = images_below(path, onerror=refuse_folder) if os.path.isdir(path) else [path]
        if not below:
            raise cli.UserError(f"--predict {path} holds no images")
        found.update(below)
    files = sorted(os.path.normpath(path) for path in found)
    return without_bad_images(
        ImageDataset(files, np.full(len(files), -1), paths=files, hair_removal=hair_removal, **decoding)
    )


def refuse_folder(error):
    raise cli.UserError(f"cannot read {error.filename}: {error.strerror}")


def softmax(logits):
    """(N, C) logits -> probabilities, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def columns(classes):
    """The table's header.  Raises UserError where two columns would have one name."""
    header = ["path"]
    for task, names in classes.items():
        prefix = "" if task == TASK else f"{task}_"
        header += [f"{prefix}{name}" for name in ("predicted", "confidence", *names)]
    twice = [name for name in header if header.count(name) > 1] if len(set(header)) < len(header) else []
    if twice:
        raise cli.UserError(f"the table would have two columns {twice[0]!r}: a class or task has the name of a column")
    return header


def write_table(path, header, ids, classes, probabilities):
    """A row an image: path, and of each task the likeliest class, its probability and that of each class."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with (
        cli.atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        for row, name in enumerate(ids):
            cells = [name]
            for task, of in probabilities.items():
                best = of[row].argmax()
                cells += [classes[task][best], *(f"{p:.8g}" for p in (of[row][best], *of[row]))]
            writer.writerow(cells)


def counts(task, names, probabilities):
    """Lines: how many images each class was predicted for, the most frequent first."""
    number = np.bincount(probabilities.argmax(1), minlength=len(names))
    order = [c for c in np.argsort(-number, kind="stable") if number[c]]
    width = max(len(names[c]) for c in order)
    lines = [f"{'' if task == TASK else task + ': '}{names[c]:{width}}  {number[c]:,}" for c in order[:MOST_CLASSES]]
    return lines + ([f"and {len(order) - MOST_CLASSES} more classes"] if len(order) > MOST_CLASSES else [])
