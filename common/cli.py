"""What the scripts share at their edge: flags, --config and --resume, errors in one line, the run folder.

Needs augment.py, data.py (and what that needs), distributed.py and metrics.py of `common`, for choices and defaults.
"""

import argparse
import contextlib
import csv
import difflib
import errno
import fcntl
import glob
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import torch

from common import distributed
from common.augment import CROPS, PRESETS, Policy
from common.data import DATASETS
from common.metrics import CLASSIFICATION

SCRIPT_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESUME_MAY_CHANGE = {"resume", "device", "workers", "epochs", "data_root", "output", "overwrite", "config", "dry_run"}
NOT_IN_CONFIG = {"resume", "output", "overwrite", "config", "sweep", "sweep_index", "dry_run", "seeds"}
STORED_FLAGS = (
    "val_split",
    "split_seed",
    "decode_size",
    "window",
    "hair_removal",
    "folds",
    "fold",
    "binary",
    "negatives",
    "table",
    "image_column",
    "label_column",
    "group_column",
    "split_column",
    "hf_dataset",
)
SAMPLE_FLAGS = (
    *STORED_FLAGS,
    "text_fields",
    "tasks",
    "positive",
)  # what the samples are; stores hold images with one label
SPLIT_FLAGS = ("limit_train", "limit_labels", "on_bad_image", "include_list", "extra_train", *SAMPLE_FLAGS)
DIVISION = ("val_split", "split_seed", "folds", "fold", "group_column", "split_column")  # what makes an image val
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.EFBIG,
}


class UserError(Exception):
    """Something the user gave is wrong: one line on stderr and exit code 2."""

    exit_code = 2


# ------------------------------------------------------------------------------------------------------------ signals


class Stops:
    """How SIGTERM, SIGUSR1 and Ctrl-C end a script: at once, with the exit codes 143, 75 and 130.

    A thread hears them, since the main one may be waiting in C, for another process or for a disk, where Python's own
    handlers do not run.  The training loop sets `defer`, which is then called with the signal's number instead of
    `end`.
    Nothing is lost by ending at once: files are written beside and then renamed.
    """

    CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 75, signal.SIGINT: 130}
    defer, hint, seeds = (
        None,
        "",
        [],
    )  # how to go on and, of several runs, this one's seed and those after it, for the last line

    @contextlib.contextmanager
    def heard(self):
        """Hear signals within this block."""
        self.defer, self.hint, self.seeds = None, "", []
        read, write = os.pipe()
        os.set_blocking(write, False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in self.CODES}
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._hear, args=(read,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.write(write, b"\0")
            thread.join()
            os.close(read), os.close(write)

    def _hear(self, pipe):
        while number := os.read(pipe, 1)[0]:  # 0: the block is left
            if number in self.CODES:
                (self.defer or self.end)(number)

    def left(self):
        """Which of --seeds have left nothing that could be resumed, in words."""
        seeds = self.seeds[1:] if self.hint else self.seeds
        return f" (not run: --seeds {' '.join(map(str, seeds))})" if seeds else ""

    def end(self, number):
        """End this process and its workers now, whatever its threads are doing."""
        if distributed.environment().rank == 0:  # of several processes a scheduler stops all
            os.write(
                2,
                f"interrupted by {signal.Signals(number).name}{self.hint}{self.left()}\n".encode(
                    errors="surrogateescape"
                ),
            )
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(self.CODES[number])


stops = Stops()


# ------------------------------------------------------------------------------------------------------------- errors


def run_script(main, build_parser):
    """main(flags); every error that is the user's to mend ends in one line on stderr.

    Exceptions with an `exit_code` (UserError, DataError, ModelError, NonFiniteLoss, Interrupted, ...) exit with it,
    disk errors with 2,
    out of memory with 1, naming batch size and model; anything else is our own fault and keeps its traceback.
    """
    args = None
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files and classes may not fit its encoding
    try:
        with stops.heard():
            runs = [(argv, parse_flags(build_parser(), argv)) for argv in expand_seeds(build_parser(), sys.argv[1:])]
            for _, args in runs if len(runs) > 1 else ():
                RunFolder(
                    args.output, overwrite=args.overwrite, dry=is_dry(args)
                )  # one that holds a run is refused now
            for number, (argv, args) in enumerate(runs):
                sys.argv[1:] = argv  # what results.json tells to repeat
                stops.hint, stops.seeds = "", [later.seed for _, later in runs[number:]] if len(runs) > 1 else []
                if (
                    getattr(args, "data_root", None) and "KD_STAGED" not in os.environ
                ):  # a job's stage is gone afterwards
                    args.data_root = os.path.abspath(args.data_root)  # saved so: a run is resumed from any folder
                code = main(args) or 0
            distributed.stop()
            sys.exit(code)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
    except Exception as error:
        text = " ".join(str(error).split())
        if getattr(error, "exit_code", None):
            fail(text + stops.left(), error.exit_code)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            fail(f"{error.strerror}: {error.filename or 'while writing'}", 2)
        if "out of memory" in text or "can't allocate memory" in text or isinstance(error, MemoryError):
            model, batch = getattr(args, "model", None), getattr(args, "batch_size", None)
            fail(f"out of memory with --batch-size {batch} and --model {model}: try a smaller batch or model", 1)
        if "DataLoader worker" in text:
            fail(
                f"a process that decodes images was killed ({text}): out of memory? --workers 0 or fewer, or a "
                "smaller --batch-size",
                1,
            )
        if distributed.lost(error):
            fail(f"another of the {distributed.size()} processes has ended or was killed ({text[:160]})", 1)
        if not distributed.first_to_fail():
            sys.exit(1)  # another process failed, said why, and this one lost its connection
        raise


def fail(text, code):
    """One line on stderr, from the first process that fails."""
    if not distributed.first_to_fail():
        sys.exit(code)
    prefix = "" if text.startswith("interrupted") else "error: "
    print(f"{prefix}{text}", file=sys.stderr, flush=True)
    if distributed.size() > 1 and distributed.rank() == 0:
        time.sleep(1)  # the others ask it who was first
    sys.exit(code)


# -------------------------------------------------------------------------------------------------------------- flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, keeps the docstring's commands as they are."""

    def _fill_text(self, text, width, indent):
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _get_help_string(self, action):
        if action.default is None or action.default is False or isinstance(action, argparse._StoreTrueAction):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            message += next((self.nearest(word) for word in message.split() if word.startswith("--")), "")
        fail(f"{message} (see {self.prog} --help)", 2)

    def nearest(self, flag):
        """ ": did you mean --lr?", by the name or, as for --learning-rate, by the words of its help; or nothing."""
        flag, near = (
            flag.split("=")[0],
            lambda cutoff: difflib.get_close_matches(flag, self._option_string_actions, 1, cutoff),
        )
        words = flag[2:].replace("-", " ")
        by_help = sorted(
            (name for name, action in self._option_string_actions.items() if f" {words} " in f" {action.help} "),
            key=len,
        )
        found = near(0.8) or by_help or near(0.6)
        return f": did you mean {found[0]}?" if found else ""


def number(kind, low=-math.inf, high=math.inf, above=False):
    """An argparse type: an int or float within [low, high], or above low."""

    def convert(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or value != value:
            limits = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    convert.__name__ = kind.__name__
    return convert


def picture(text):
    """An argparse type: a file name that Pillow can write."""
    if not text.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .jpg or .webp")
    return text


POSITIVE, NATURAL = number(int, 1), number(int, 0)
SHARE = number(float, 0, 1)
AMOUNT = number(float, 0)


def add_run_flags(parser, output):
    g = parser.add_argument_group("run")
    g.add_argument("--output", default=output, help="run folder that this run writes")
    g.add_argument("--overwrite", action="store_true", help="replace the run that is in the run folder")
    g.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print what the run would read, build, take and write, and stop",
    )
    g.add_argument("--resume", metavar="RUN", help="continue this run folder; needs no other flag")
    g.add_argument(
        "--config", metavar="FILE.json", help="flags from a JSON object or a run's config.json; the command line wins"
    )
    g.add_argument(
        "--sweep",
        metavar="GRID.json",
        help="take flags from a point of this grid: {flag: [values]} or a list of points; runs go to OUTPUT/POINT",
    )
    g.add_argument("--sweep-index", type=NATURAL, metavar="N", help="the grid's point, from 0")
    g.add_argument("--seed", type=NATURAL, default=0, help="fixes weights, order and augmentation, never a split")
    g.add_argument(
        "--seeds",
        type=NATURAL,
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="SEED",
        help="one run after another with each of these seeds, into OUTPUT_SEED",
    )
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    g.add_argument(
        "--save-every", type=NATURAL, default=0, metavar="N", help="keep epoch_N.pth every N epochs; 0 is off"
    )
    g.add_argument(
        "--save-samples",
        type=picture,
        metavar="FILE.png",
        help="draw what the models see in the first epoch, side by side",
    )


def add_data_flags(parser, dataset="digits", batch_size=32):
    g = parser.add_argument_group("data")
    g.add_argument(
        "--dataset",
        default=dataset,
        choices=list(DATASETS),
        help="dataset" if dataset else "dataset; by default the checkpoint's",
    )
    g.add_argument(
        "--data-root", help="folder or file of the dataset; by default $DATA_ROOT, then data/ beside the script"
    )
    g.add_argument(
        "--hf-dataset",
        metavar="NAME_OR_FOLDER",
        help="of unlabeled: a dataset of the package datasets, by its name on the hub or saved to disk",
    )
    g.add_argument("--download", action="store_true", help="fetch CIFAR-10 or CIFAR-100 into --data-root")
    g.add_argument(
        "--val-split",
        type=SHARE,
        help="share of train that becomes val, by class, where the dataset has no val (0.1; digits 0.25, "
        "csv and HAM10000 0.15, ISIC 2024 0.2, unlabeled 0.05)",
    )
    g.add_argument(
        "--folds",
        type=number(int, 2),
        metavar="K",
        help="cut train and val into K folds, by class, patients whole; with --fold",
    )
    g.add_argument(
        "--fold",
        type=NATURAL,
        metavar="I",
        help="fold I (0 to K - 1) is val; where the dataset has no test (ISIC 2024, csv without split "
        "column) it is test, and val is split off the rest",
    )
    g.add_argument(
        "--split-seed",
        type=NATURAL,
        default=0,
        help="fixes the val split, the folds, --negatives, --limit-train and --limit-labels",
    )
    g.add_argument(
        "--limit-train",
        type=NATURAL,
        metavar="N",
        help="train on N images, classes in proportion; 0 is all "
        "(the default, but 100 for students on digits that are trained with labels)",
    )
    g.add_argument(
        "--resolution",
        type=POSITIVE,
        help="input side in pixels; by default the dataset's (CIFAR and image "
        "folders 32, MedMNIST 28, digits 8, the others 224)",
    )
    g.add_argument(
        "--batch-size",
        type=POSITIVE,
        default=batch_size,
        help="images a step, over all processes and accumulation steps",
    )
    add_reading_flags(g)
    g.add_argument(
        "--include-list",
        metavar="FILE.txt",
        help="images one a line, by id, file name or end of path: train keeps only these; with "
        "--extra-train it judges only the extra images",
    )
    g.add_argument(
        "--hair-removal",
        action="store_true",
        help="fill hairs (dark, thin, long) from what is around them, at decoding",
    )
    g.add_argument(
        "--binary",
        action="store_true",
        help="benign against malignant (HAM10000: mel, bcc, akiec; ISIC 2017: melanoma)",
    )
    g.add_argument(
        "--negatives",
        type=POSITIVE,
        metavar="N",
        help="of ISIC 2024: keep N negatives of train and val; test keeps all",
    )
    g.add_argument(
        "--extra-train", metavar="FOLDER", help="of ISIC 2024: malignant images from elsewhere, to train only"
    )


def add_reading_flags(g):
    g.add_argument(
        "--cache", default="auto", choices=("auto", "off", "ram", "device"), help="where decoded images are kept"
    )
    g.add_argument("--workers", type=NATURAL, help="processes that decode what is not cached; by default up to 8")
    g.add_argument(
        "--on-bad-image",
        default="error",
        choices=("error", "skip"),
        help="stop at a broken image, or name it and leave it out",
    )
    g.add_argument(
        "--decode-size",
        type=POSITIVE,
        default=512,
        help="larger images are shrunk to this longest side (pixels) when decoded",
    )
    g.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="grey levels that become black and white in 16-bit images",
    )
    g.add_argument(
        "--table", metavar="FILE.csv", help="of csv: the table, a row an image; by default the one in --data-root"
    )
    g.add_argument(
        "--image-column",
        metavar="NAME",
        help="of csv: paths or names of images in --data-root (image, image_id, isic_id, file, ...)",
    )
    g.add_argument("--label-column", metavar="NAME", help="of csv: classes (label, target, class, diagnosis or dx)")
    g.add_argument(
        "--group-column",
        metavar="NAME",
        help="of csv and image_text: images that stay in one split (csv: group, patient_id, patient, "
        "lesion_id, none is off; image_text: group)",
    )
    g.add_argument(
        "--split-column",
        metavar="NAME",
        help="of csv: train, val or test (split); none is off: then a fifth, always the same, is test",
    )


def add_positive_flag(g):
    g.add_argument(
        "--positive",
        nargs="+",
        metavar="NAME",
        help="positive class of average precision, pAUC and sensitivity, of each task with two "
        "classes; by default the other one beside benign, normal, negative, no, ..., else the second",
    )


def add_text_flags(g):
    g.add_argument(
        "--text-fields",
        nargs="+",
        metavar="FIELD",
        help="whose values are the text, a line each (medpix: Caption; image_text: text)",
    )
    g.add_argument("--tasks", nargs="+", metavar="NAME", help="of image_text: the keys of the labels")


def add_image_text_flags(parser, text_model):
    g = parser.add_argument_group("image + text", "of the datasets medpix and image_text")
    add_text_flags(g)
    g.add_argument("--inputs", default="both", choices=("both", "image", "text"), help="train on one side alone")
    g.add_argument(
        "--image-model",
        metavar="NAME",
        help="vit-large, deit-base, deit-small, or any name that --model takes (the default is --model)",
    )
    g.add_argument(
        "--text-model",
        default=text_model,
        metavar="NAME",
        help="bio-clinical-bert, distilbert, hf:NAME_OR_FOLDER, or bert-mini-scratch and "
        "bert-tiny-scratch: random weights, with the vocabulary of train's texts",
    )
    g.add_argument(
        "--fusion",
        default="simple",
        choices=("simple", "concat_mlp", "cross_attention", "gated", "transformer_concat"),
        help="of both sides",
    )
    g.add_argument("--fusion-layers", type=POSITIVE, default=1, help="of the fusion")
    g.add_argument("--fusion-dim", type=POSITIVE, default=512, help="width to which both sides are projected")
    g.add_argument("--max-length", type=POSITIVE, default=128, help="tokens to which texts are cut")
    g.add_argument("--text-pooling", default="mean", choices=("mean", "cls"), help="what stands for the text")
    g.add_argument(
        "--freeze",
        nargs="+",
        choices=("image", "text"),
        help="these backbones keep their weights; --freeze-backbone: both",
    )
    g.add_argument(
        "--backbone-lr", type=number(float, 0, above=True), help="peak learning rate of both backbones; by default --lr"
    )
    g.add_argument(
        "--task-weights",
        type=AMOUNT,
        nargs="+",
        metavar="W",
        help="of the tasks in the mean of their losses, in order; by default equal",
    )


def is_dry(args):
    """Whether --dry-run was given; it is no attribute of other runs' flags, so that none saves it."""
    return getattr(args, "dry_run", False)


def task_weights(args, tasks):
    """{task: weight} of --task-weights, or None."""
    if args.task_weights is None:
        return None
    if len(args.task_weights) != len(tasks) or not any(args.task_weights):
        raise UserError(
            f"--task-weights {' '.join(map(str, args.task_weights))}: {len(tasks)} are needed, of "
            f"{', '.join(tasks)}, not all 0"
        )
    return dict(zip(tasks, args.task_weights))


def balanced_classes(args, tasks):
    """Number of classes that --sampler balanced draws equally often, or 0; tasks: {task: class names}."""
    if args.sampler != "balanced":
        return 0
    if len(tasks) > 1:
        raise UserError(
            f"--sampler balanced is for one task, here are {', '.join(tasks)}: --class-weights balanced weighs "
            "the classes of each"
        )
    return len(next(iter(tasks.values())))


def split_flags(flags):
    """load_splits' keywords from {flag: value} of a run, of any age: those that say something."""
    given = {name: flags.get(name) for name in SPLIT_FLAGS}
    # 0 is a fold, but no limit
    return {
        name: value
        for name, value in given.items()
        if value or value == 0 and value is not False and "limit" not in name
    }


def take_dataset(args, checkpoint, path):
    """Settle the dataset and the flags that say what its samples are, where they are not given, from a checkpoint, if
    any.

    On its own data another division is refused: its model has learned from what would be val here.  path: the
    checkpoint's.  Raises UserError.
    """
    flags = checkpoint["flags"] if checkpoint else {}
    args.dataset = args.dataset or ("unlabeled" if args.hf_dataset else flags.get("dataset", "digits"))
    if args.dataset == flags.get("dataset"):
        args.data_root = args.data_root or (None if args.hf_dataset else flags["data_root"])
        _take_samples(args, flags, path)
    args.split_seed, args.decode_size = args.split_seed or 0, args.decode_size or 512


def _take_samples(args, flags, path):
    same = os.path.realpath(args.data_root or "") == os.path.realpath(flags["data_root"] or "")
    for name in SAMPLE_FLAGS:
        own, theirs = getattr(args, name, None), flags.get(name)  # extract_embeddings.py has no flags of texts
        if own is None or own is False:
            if name != "hf_dataset" or not args.data_root:  # else these are other images
                setattr(args, name, theirs)
        elif (
            name in DIVISION
            and same
            and own != (DATASETS[args.dataset].val_split if (name, theirs) == ("val_split", None) else theirs)
        ):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} {own}: {path} was trained with {'none' if theirs is None else theirs}, so it knows "
                "images of this val; "
                f"leave {flag} out"
            )


def add_augment_flags(parser):
    g = parser.add_argument_group(
        "augmentation",
        "by default the dataset's: CIFAR, image folders and csv are cropped with "
        "padding and flipped, digits and MedPix shifted and rotated, MedMNIST and image_text shifted, skin "
        "lesions have "
        "derm, unlabeled images a random resized crop and flips",
    )
    g.add_argument(
        "--augment",
        choices=list(PRESETS),
        help="a preset, of which the flags below change a part; derm: both flips, rotation 30, "
        "scale 0.8 to 1.2, colours 0.2",
    )
    g.add_argument("--no-augment", action="store_true", help="train on plain images")
    g.add_argument("--crop", choices=CROPS, help="pad: shift by whole pixels; resized: random resized crop")
    g.add_argument("--padding", type=float, help="reach of --crop pad, share of the side")
    g.add_argument(
        "--crop-scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="area of --crop resized, share of the image"
    )
    g.add_argument("--hflip", type=float, help="probability of a horizontal flip")
    g.add_argument("--vflip", type=float, help="probability of a vertical flip")
    g.add_argument("--rotation", type=float, help="largest angle, degrees")
    g.add_argument(
        "--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="zoom about the centre, above 1 enlarges"
    )
    g.add_argument("--brightness", type=float, help="factor within 1 +- this")
    g.add_argument("--contrast", type=float, help="factor within 1 +- this")
    g.add_argument("--saturation", type=float, help="factor within 1 +- this")
    g.add_argument("--hue", type=float, help="turn of the colour circle, at most 0.5")


def augment_policy(args):
    """The dataset's default policy, or a preset's, with the flags that were given."""
    given = {}
    for name in Policy.__dataclass_fields__:
        value = getattr(args, name)
        if value is not None:
            given[name] = tuple(value) if isinstance(value, list) else value
    if args.no_augment:
        if given or args.augment:
            raise UserError(
                f"--no-augment and --{'augment' if args.augment else next(iter(given)).replace('_', '-')} "
                "contradict each other"
            )
        return Policy()
    base = PRESETS[args.augment] if args.augment else DATASETS[args.dataset].policy
    return Policy(**{**base.__dict__, **given})


def add_model_flags(parser, model):
    g = parser.add_argument_group("model")
    g.add_argument(
        "--model", default=model, help="resnet8, resnet18, vit_6_192, vit_tiny, any timm name, or hf:NAME_OR_FOLDER"
    )
    g.add_argument("--patch-size", type=POSITIVE, help="patch side of vit_6_192 and vit_tiny in pixels (4)")
    g.add_argument("--pretrained", action="store_true", help="start from the hub's weights")
    g.add_argument("--weights", metavar="FILE", help="start from a foreign state dict (.pth or .safetensors), strictly")
    g.add_argument(
        "--init-checkpoint",
        metavar="FILE",
        help="start from a checkpoint of these scripts; new head where classes differ",
    )
    g.add_argument(
        "--freeze-backbone", action="store_true", help="train the head alone, of a model that starts from weights"
    )
    g.add_argument(
        "--dropout",
        type=number(float, 0, 0.99),
        default=0.0,
        help="share of the head's input that is dropped in training",
    )


def add_training_flags(parser, epochs, select=CLASSIFICATION):
    """epochs: the default; select: val metrics that may choose the best epoch."""
    g = parser.add_argument_group("training")
    g.add_argument("--epochs", type=POSITIVE, default=epochs, help="passes over train")
    g.add_argument("--optimizer", default="sgd", choices=("sgd", "adam", "adamw"), help="optimizer")
    g.add_argument(
        "--lr", type=number(float, 0, above=True), help="peak learning rate (sgd 0.02, adam and adamw 0.001)"
    )
    g.add_argument("--momentum", type=SHARE, default=0.9, help="of sgd")
    g.add_argument("--nesterov", action="store_true", help="Nesterov momentum, with sgd")
    g.add_argument("--weight-decay", type=AMOUNT, help="never on norms and biases (sgd 0.0005, adamw 0.05, adam 0)")
    g.add_argument(
        "--schedule",
        default="cosine",
        choices=("cosine", "multistep", "plateau", "constant"),
        help="of the learning rate",
    )
    g.add_argument(
        "--milestones",
        type=POSITIVE,
        nargs="+",
        metavar="EPOCH",
        help="epochs after which multistep multiplies by --gamma",
    )
    g.add_argument("--gamma", type=SHARE, default=0.1, help="factor of multistep and plateau")
    g.add_argument(
        "--plateau-patience", type=POSITIVE, default=5, help="epochs without gain before plateau lowers the rate"
    )
    g.add_argument("--warmup-epochs", type=AMOUNT, default=0.0, help="linear warm-up, epochs")
    g.add_argument(
        "--sampler",
        default="shuffle",
        choices=("shuffle", "balanced"),
        help="each image once an epoch, or each class equally often",
    )
    g.add_argument(
        "--class-weights",
        default="none",
        metavar="WEIGHTS",
        help="of the cross-entropy: none, balanced (by 1 / count in train) or numbers W0,W1,...",
    )
    g.add_argument(
        "--label-smoothing", type=SHARE, default=0.0, help="of the cross-entropy; a smoothed teacher teaches worse"
    )
    g.add_argument(
        "--accumulation-steps",
        type=POSITIVE,
        default=1,
        metavar="N",
        help="run each batch in N parts, for less memory; the batch size stays",
    )
    g.add_argument("--clip-grad", type=AMOUNT, default=0.0, help="largest gradient norm; 0 is off")
    g.add_argument(
        "--ema",
        type=number(float, 0, 0.999999),
        default=0.0,
        metavar="DECAY",
        help="evaluate and keep an average of the weights, as 0.999; 0 is off",
    )
    g.add_argument(
        "--patience",
        type=NATURAL,
        default=0,
        help="stop after this many epochs without gain in --select-metric; 0 is off",
    )
    g.add_argument(
        "--select-metric",
        default="accuracy",
        choices=select,
        metavar="METRIC",
        help=f"val metric that chooses the best epoch: {', '.join(select)}",
    )
    add_positive_flag(g)
    g.add_argument(
        "--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="mixed precision; auto: on a GPU"
    )
    g.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU")


def config_argv(parser, values, source):
    """{"batch_size": 64, "nesterov": true} -> ["--batch-size", "64", "--nesterov"], so that argparse checks them."""
    actions = {a.dest: a for a in parser._actions if a.option_strings}
    argv = []
    for key, value in values.items():
        dest = key.replace("-", "_")
        if dest not in actions:
            raise UserError(f"{source} has the unknown key {key!r}{parser.nearest('--' + dest.replace('_', '-'))}")
        if dest in NOT_IN_CONFIG or value is None or value is False or value == []:
            continue
        flag = actions[dest].option_strings[0]
        argv += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    return argv


def read_json(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def check(args):
    """Refuse values that argparse cannot judge one by one."""
    given = vars(args).get
    if given("window") and not -math.inf < args.window[0] < args.window[1] < math.inf:
        raise UserError(f"--window {args.window[0]:g} {args.window[1]:g}: LOW must be below HIGH")
    if given("hf_dataset") and args.data_root:
        raise UserError(
            f"--hf-dataset {args.hf_dataset} and --data-root {args.data_root} contradict each other: give one of them"
        )
    if given("nesterov") and args.optimizer not in ("sgd", None):
        raise UserError(f"--nesterov and --optimizer {args.optimizer} contradict each other: it is sgd's")
    samples = given("save_samples")
    if samples:
        folder = os.path.dirname(os.path.abspath(samples))
        if (
            os.path.isdir(samples)
            or folder != os.path.abspath(args.output)
            and not (os.path.isdir(folder) and os.access(folder, os.W_OK))
        ):
            raise UserError(f"--save-samples {samples}: no file can be written there, name one in a folder that exists")
    frozen = "--freeze-backbone" if given("freeze_backbone") else "--freeze" if given("freeze") else None
    if frozen and not (args.pretrained or args.weights or args.init_checkpoint):
        raise UserError(
            f"{frozen} needs --pretrained, --weights or --init-checkpoint: random features teach a head nothing"
        )
    return args


def parse_flags(parser, argv):
    """Parse argv over --config FILE or the flags of --resume RUN, and a point of --sweep; returns a Namespace."""
    args = parser.parse_args(argv)
    if not hasattr(args, "config"):  # evaluate.py and report.py
        return check(args)
    argv = expand_sweep(parser, argv)
    args = parser.parse_args(argv)
    if args.resume and args.config:
        raise UserError("--resume and --config contradict each other: a resumed run has its own flags")
    if not args.resume and not args.config:
        return check(args)
    path = args.config or os.path.join(args.resume, "config.json")
    values = read_json(path)
    if isinstance(values, dict) and isinstance(values.get("flags"), dict):
        values = values["flags"]
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object of flags")
    saved = config_argv(parser, values, path)
    args = check(parser.parse_args(saved + argv))
    if args.resume:
        before = parser.parse_args(saved)
        for dest, value in vars(args).items():
            if dest not in RESUME_MAY_CHANGE and value != getattr(before, dest):
                flag = dest.replace("_", "-")
                raise UserError(
                    f"--{flag} {value} beside --resume: the run has {getattr(before, dest)}; only device, "
                    "workers, epochs and data-root may change"
                )
        if args.output not in (parser.get_default("output"), args.resume):
            raise UserError(f"--output {args.output} beside --resume {args.resume}: a resumed run stays in its folder")
        args.output = args.resume
    return args


def grid_points(path, script=None):
    """[(name, {flag: value})] of a grid file: an object of lists is crossed, the last one varying fastest; a list of
    objects is taken as it is, "name" naming a point and a script's name, as "distill.py", an object of flags for that
    script
    alone.  Names are unique and fit for folders.  Raises UserError."""
    grid = read_json(path)
    if isinstance(grid, dict):
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(
                    f"{path}: the axis {key!r} must be a list of at least one value, not {json.dumps(values)}"
                )
        points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    elif isinstance(grid, list) and all(isinstance(point, dict) for point in grid):
        points = [_of_script(path, point, script) for point in grid]
    else:
        points = []
    if not points or not all(points):
        raise UserError(
            f'{path} is no grid: write {{"lr": [0.1, 0.01], "batch-size": [32, 64]}} or a list of such points'
        )
    names = []
    for point in points:
        name = point.pop("name", None) or "_".join(
            f"{k}-{'-'.join(map(str, v)) if isinstance(v, list) else json.dumps(v)}" for k, v in point.items()
        )
        name = re.sub(r"[^\w.+-]+", "-", str(name).replace('"', "")).strip("-.")[:150]
        if not name or name in names:
            raise UserError(f'{path}: two points have the name {name!r}: give each a "name" of its own')
        names.append(name)
    return list(zip(names, points))


def _of_script(path, point, script):
    """A point's flags without those of other scripts."""
    for key, flags in point.items():
        if key.endswith(".py") and not isinstance(flags, dict):
            raise UserError(f"{path}: {key!r} must hold an object of flags, not {json.dumps(flags)}")
    return {**{key: value for key, value in point.items() if not key.endswith(".py")}, **point.get(script, {})}


def without_flags(argv, names):
    """argv without these flags and their values."""
    kept, skip = [], False
    for word in argv:
        if word.startswith("--"):
            skip = word.split("=")[0] in names
        if not skip:
            kept.append(word)
    return kept


def expand_seeds(parser, argv):
    """[argv], one for each of --seeds: with that --seed, and OUTPUT_SEED for the run folder; [argv] itself without
    --seeds."""
    args = parser.parse_args(argv)
    seeds = getattr(args, "seeds", None)
    if seeds is None:
        return [argv]
    given = {word.split("=")[0] for word in argv}
    for flag in ("--seed", "--resume"):
        if flag in given:
            raise UserError(
                f"{flag} and --seeds cannot be combined: --seeds makes one run for each seed, in a folder of its own"
            )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: a seed is named twice")
    rest = without_flags(argv, ("--seeds", "--output"))
    return [[*rest, "--seed", str(seed), "--output", f"{args.output.rstrip('/')}_{seed}"] for seed in seeds]


def expand_sweep(parser, argv):
    """argv with --sweep GRID --sweep-index N replaced by the point's flags; its run folder is OUTPUT/NAME.

    "{name}" in any value becomes the point's name, so that a sweep of students can follow a sweep of teachers.
    """
    args = parser.parse_args(argv)
    if args.sweep is None and args.sweep_index is None:
        return argv
    if args.sweep is None or args.sweep_index is None:
        raise UserError("--sweep GRID.json and --sweep-index N belong together: which point of the grid?")
    if args.resume:
        raise UserError(
            "--sweep and --resume contradict each other: name the point's run folder, --resume OUTPUT/POINT"
        )
    points = grid_points(args.sweep, os.path.basename(parser.prog))
    if args.sweep_index >= len(points):
        raise UserError(
            f"--sweep-index {args.sweep_index} is past the grid: {args.sweep} has {len(points)} points, 0 to "
            f"{len(points) - 1}"
        )
    name, values = points[args.sweep_index]
    kept = [word.replace("{name}", name) for word in without_flags(argv, ("--sweep", "--sweep-index"))]
    given = {
        parser._option_string_actions[w.split("=")[0]].dest
        for w in kept
        if w.split("=")[0] in parser._option_string_actions
    }
    for key in values:
        dest = key.replace("-", "_")
        if dest in NOT_IN_CONFIG:
            raise UserError(f"{args.sweep} must not set {key}: the grid's points go to OUTPUT/POINT")
        if dest in given:
            raise UserError(
                f"--{dest.replace('_', '-')} is given and stands in {args.sweep}: leave it out of one of them"
            )
    own = [word.replace("{name}", name) for word in config_argv(parser, values, args.sweep)]
    return [*kept, *own, "--output", os.path.join(args.output.replace("{name}", name), name)]


def data_root(given):
    """The folder or file that was given, else $DATA_ROOT, else data/ beside the scripts where there is one."""
    beside = os.path.join(SCRIPT_FOLDER, "data")
    return given or os.environ.get("DATA_ROOT") or (beside if os.path.isdir(beside) else None)


# --------------------------------------------------------------------------------------------------------- run folder


@contextlib.contextmanager
def atomic_write(path):
    """Yield a path beside `path`; it takes the place of `path` if all goes well and is removed if not."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}")  # RunFolder.open clears those of killed writers
    open(temporary, "xb").close()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_json(path, value):
    with atomic_write(path) as temporary, open(temporary, "w") as file:
        json.dump(plain(value), file, indent=1, allow_nan=False)
        file.write("\n")


def write_array(path, array):
    """np.save; a full disk is an OSError that says so, as numpy's own does not."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(content.getbuffer())


def plain(value):
    """JSON's types: tuples become lists, numbers that are not finite null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(device):
    """Versions, git commit and hardware: what a figure depends on beside the flags."""
    versions = {}
    for package in ("torch", "torchvision", "timm", "transformers", "numpy", "scikit-learn", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    git = ["git", "-C", SCRIPT_FOLDER, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    commit = commit or os.environ.get("GIT_COMMIT")  # a job's copy of the scripts has no .git
    return {
        "python": platform.python_version(),
        **versions,
        "git_commit": commit,
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "platform": platform.platform(),
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


class RunFolder:
    """A run's files; of several processes rank 0 writes them.

    Nothing is written or replaced before `lock` and `open`, so that bad input found earlier loses nothing.
    """

    OWN = (
        "config.json",
        "metrics.csv",
        "metrics.json",
        "results.json",
        "log.txt",
        "*.pth",
        "confusion_*.npy",
        "predictions_*.npz",
    )

    def __init__(self, folder, resume=False, overwrite=False, dry=False):
        self.folder, self.resume, self.overwrite, self.rows, self._opened, self._early = (
            folder,
            resume,
            overwrite,
            [],
            False,
            [],
        )
        self.writes = distributed.environment().rank == 0
        if resume:
            if overwrite:
                raise UserError("--resume and --overwrite contradict each other")
            if not os.path.exists(self.path("latest.pth")):
                raise UserError(f"{folder} has no latest.pth: nothing to resume, start again with --overwrite")
        elif not dry:
            self._refuse_to_replace()

    def _refuse_to_replace(self):
        if not self.resume and not self.overwrite and any(map(os.path.getsize, self.own_files())):
            raise UserError(
                f"{self.folder} holds a run: --resume {shlex.quote(self.folder)} continues it, --overwrite "
                "replaces it, "
                "--output names another folder"
            )

    def path(self, name):
        return os.path.join(self.folder, name)

    def own_files(self, form="{}"):
        """Paths of what a run has left in the folder; form: of their names."""
        return [
            f for pattern in self.OWN for f in glob.glob(os.path.join(glob.escape(self.folder), form.format(pattern)))
        ]

    def lock(self):
        """Make the folder and keep every other run off it as long as this process lives.  Raises UserError in all
        processes.

        The lock is on log.txt, which is never replaced, and of the kind that NFS knows and workers do not inherit: it
        ends
        with this process, and earlier if this process opens and closes that file again.
        """
        refused = None
        if self.writes:
            try:
                self._lock()
                self._refuse_to_replace()  # a run that came and ended since
            except UserError as error:
                refused = error
        refused = distributed.gather(refused)[0]
        if refused:
            raise refused

    def _lock(self):
        os.makedirs(self.folder, exist_ok=True)
        self._log = open(self.path("log.txt"), "a+", buffering=1, encoding="utf-8", errors="backslashreplace")
        # a requeued job: of a node that died, NFS keeps the locks for a minute or two
        patience = time.monotonic() + (120 if os.environ.get("SLURM_RESTART_COUNT") else 0)
        while True:
            try:
                return fcntl.lockf(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return self.log(
                        f"note: {self.folder} cannot be locked ({error.strerror}): start no other run there"
                    )
                if time.monotonic() > patience:
                    self._log.close()
                    raise UserError(
                        f"another run is writing {self.folder}: wait for it or stop it, or name another folder "
                        "with --output"
                    ) from None
            time.sleep(1)

    def open(self, flags, environment, rows=0, log_bytes=0):
        """Begin to write, after `lock`; `rows` and `log_bytes`: what a resumed checkpoint had seen, later lines are
        dropped."""
        if not self.writes:
            return
        if self.resume:
            self.rows = read_json(self.path("metrics.json"))[:rows] if rows else []
        for file in self.own_files(".{}.????????") + (
            [] if self.resume else self.own_files()
        ):  # first of writers that were killed
            if not file.endswith("log.txt"):
                os.remove(file)
        self._log.truncate(min(log_bytes, os.path.getsize(self.path("log.txt"))))
        self._log.seek(0, os.SEEK_END)
        write_json(self.path("config.json"), {"flags": flags, "environment": environment})
        self._opened = True
        for line in self._early:
            self._log.write(line + "\n")
        self._write_rows()

    @property
    def log_bytes(self):
        return self._log.tell()

    def log(self, text):
        """A line on stdout and in log.txt."""
        if not self.writes:
            return
        print(text, flush=True)
        if self._opened:
            self._log.write(text + "\n")
        else:
            self._early.append(text)

    def add_row(self, row):
        """One epoch's metrics, to metrics.csv and metrics.json."""
        if not self.writes:
            return
        self.rows.append(plain(row))
        if len(self.rows) > 1 and list(row) == list(self.rows[0]):
            with open(self.path("metrics.csv"), "a", newline="") as file:
                csv.writer(file).writerow(self.rows[-1].values())
            write_json(self.path("metrics.json"), self.rows)
        else:
            self._write_rows()

    def _write_rows(self):
        with atomic_write(self.path("metrics.csv")) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in self.rows for k in row)))
            writer.writeheader()
            writer.writerows(self.rows)
        write_json(self.path("metrics.json"), self.rows)
