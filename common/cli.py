"""Flags: those that scripts share, --config and --resume, help in two lengths, and the frame that runs a script.

Needs augment.py, metrics.py and run.py of `common` (sweep.py for --seeds and --sweep).
"""

import argparse
import contextlib
import copy
import difflib
import errno
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType


class _Later(ModuleType):
    def __getattr__(self, name):
        return getattr(importlib.import_module("torch"), name)


@contextlib.contextmanager
def torch_later() -> Iterator[None]:
    """Files that are imported in this block, and `import torch` at their heads, load it when they first use it.

    It takes seconds, for which --help and a wrong flag should not wait.  For files that use torch in functions alone.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = _Later("torch")
    try:
        yield
    finally:
        del sys.modules["torch"]


with torch_later():
    from common.augment import CROP_MODES, CROPS, PRESETS, Policy
    from common.metrics import CLASSIFICATION
    from common.run import (
        SCRIPT_FOLDER,
        RunFolder,
        UserError,
        fail,
        first_to_fail,
        leave_processes,
        lost_process,
        optional,
        read_json,
        stops,
        world_size,
    )

RESUME_MAY_CHANGE = {"resume", "device", "workers", "epochs", "data_root", "output", "overwrite", "config", "dry_run"}
NOT_IN_CONFIG = {"resume", "output", "overwrite", "config", "sweep", "sweep_index", "dry_run", "seeds"}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS}  # of a write, which names no file
# what --help shows, by name; --help-all shows the others too
FIRST_FLAGS = set(
    "help help_all output overwrite resume seed seeds device dry_run dataset data_root download limit_train "
    "limit_labels resolution batch_size augment model pretrained weights epochs optimizer lr weight_decay "
    "class_weights "
    "amp teacher_checkpoint teacher_model teacher_pretrained teacher_weights teacher_embeddings method alpha "
    "temperature "
    "loss loss_options student_layer teacher_layer checkpoint splits images reference keep_fraction num_views "
    "save_logits save_tokens shard merge knn linear_probe split predict metric select gallery reevaluate".split()
)


# ---------------------------------------------------------------------------------------------------------- the frame


def run_script(main: Callable, build_parser: Callable) -> None:
    """main(flags); every error that the user can mend ends in one line on stderr.

    Exceptions with an `exit_code` (UserError, DataError, ModelError, NonFiniteLoss, Interrupted, ...) exit with it,
    disk errors with 2, out of memory with 1; anything else is our own fault and keeps its traceback.
    """
    flags = None
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files and classes may not fit its encoding
    try:
        with stops.heard():
            runs = [(argv, parse_flags(build_parser(), argv)) for argv in expand_seeds(build_parser(), sys.argv[1:])]
            for _, flags in runs if len(runs) > 1 else ():  # one that holds a run is refused now
                RunFolder(flags.output, overwrite=flags.overwrite, dry_run=flags.dry_run)
            for number, (argv, flags) in enumerate(runs):
                sys.argv[1:] = argv  # what results.json tells to repeat
                stops.hint, stops.seeds = "", [later.seed for _, later in runs[number:]] if len(runs) > 1 else []
                for name in ("data_root", "unlabeled_root") if "KD_STAGED" not in os.environ else ():
                    if getattr(flags, name, None):  # a job's stage is gone later
                        setattr(flags, name, os.path.abspath(getattr(flags, name)))  # a run is resumed from any folder
                code = main(flags) or 0
            leave_processes()
            sys.exit(code)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
    except Exception as error:
        report_error(error, getattr(flags, "batch_size", None), getattr(flags, "model", None))
        raise


def check_command_line(build_parser: Callable) -> None:
    """Answer --help and wrong flags now.  A script calls it before it imports what loads torch, which takes seconds;
    `run_script` parses once more."""
    try:
        for argv in expand_seeds(build_parser(), sys.argv[1:]):
            parse_flags(build_parser(), argv)
    except Exception as error:
        report_error(error)
        raise


def report_error(error: Exception, batch_size: int | None = None, model: str | None = None) -> None:
    """Exit with one line for an error that is not our own fault; batch_size, model: named where memory was short."""
    text = " ".join(str(error).split())
    if getattr(error, "exit_code", None):
        fail(text + stops.seeds_left(), error.exit_code)
    if isinstance(error, OSError) and (error.filename or error.errno in DISK_ERRORS):
        fail(f"{error.strerror}: {error.filename or 'while writing'}", 2)
    if "out of memory" in text or "can't allocate memory" in text or isinstance(error, MemoryError):
        given = {"--batch-size": batch_size, "--model": model}
        words = " and ".join(f"{flag} {value}" for flag, value in given.items() if value)
        fail(f"out of memory{words and f' with {words}'}: try a smaller --batch-size or --model", 1)
    if "DataLoader worker" in text:
        advice = "out of memory? --workers 0 or fewer, or a smaller --batch-size"
        fail(f"a process that decodes images was killed ({text}): {advice}", 1)
    if lost_process(error):
        fail(f"another of the {world_size()} processes has ended or was killed ({text[:160]})", 1)
    if not first_to_fail():
        sys.exit(1)  # another process failed, said why, and this one lost its connection


# ---------------------------------------------------------------------------------------------------------- the parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, keeps the docstring's commands as they are, and --x, --no-x as --[no-]x."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=118)

    def _fill_text(self, text, width, indent):
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)

    def _format_args(self, action, default_metavar):
        if action.nargs in ("+", "*"):
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)

    def _get_default_metavar_for_optional(self, action):
        return {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", None), "NAME")

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class _HelpAll(argparse.Action):
    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str):
        super().__init__(
            description=description or "", usage="%(prog)s [flags]", formatter_class=HelpFormatter, allow_abbrev=False
        )
        self.add_argument("--help-all", action=_HelpAll, help="show all flags and exit")

    def format_help(self, everything: bool = False) -> str:
        """The help; without `everything` the docstring's head, FIRST_FLAGS and the first line of their help.

        What an action's function `more` returns is added to its whole help; it may import what is slow to load.
        """
        formatter, hidden = self._get_formatter(), 0
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        head = "\n\n".join(self.description.split("\n\n")[:2])  # what it does, and its commands
        formatter.add_text(self.description if everything else head)
        for group in self._action_groups:
            actions = [a for a in group._group_actions if everything or not a.option_strings or a.dest in FIRST_FLAGS]
            hidden += len(group._group_actions) - len(actions)
            formatter.start_section(group.title)
            if everything:
                formatter.add_text(group.description)
            for action in actions:
                action = copy.copy(action)
                if everything:
                    action.help += getattr(action, "more", str)()
                else:
                    action.help = action.help.split("\n")[0]
                formatter.add_argument(action)
            formatter.end_section()
        if hidden:
            formatter.add_text(f"{hidden} more flags: --help-all")
        return formatter.format_help()

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            message += next((self.nearest(word) for word in message.split() if word.startswith("--")), "")
        fail(f"{message} (see {self.prog} --help)", 2)

    def nearest(self, flag: str) -> str:
        """ ": did you mean --lr?", by the name or, as for --learning-rate, by the words of its help; or nothing."""
        flag, near = (
            flag.split("=")[0],
            lambda cutoff: difflib.get_close_matches(flag, self._option_string_actions, 1, cutoff),
        )
        words = flag[2:].replace("-", " ")
        actions = self._option_string_actions.items()
        by_help = sorted((name for name, action in actions if f" {words} " in f" {action.help} "), key=len)
        names = near(0.8) or by_help or near(0.6)
        return f": did you mean {names[0]}?" if names else ""


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: an int or float within [low, high], or above low."""

    def convert(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or not math.isfinite(value):
            limits = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    convert.__name__ = kind.__name__
    return convert


def picture(text: str) -> str:
    """An argparse type: a file name that Pillow can write."""
    if not text.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .jpg or .webp")
    return text


POSITIVE, NATURAL = number(int, 1), number(int, 0)
SHARE, AMOUNT, ABOVE_ZERO = number(float, 0, 1), number(float, 0), number(float, 0, above=True)


def name_or_file(text: str) -> str:
    """An argparse type: FILE.py:FUNCTION is made absolute, so that a run is resumed from any folder."""
    return os.path.abspath(text) if ".py:" in text else text


def dataset_name(datasets: Iterable[str]) -> Callable:
    """An argparse type: one of these names, or FILE.py:FUNCTION."""

    def convert(text):
        if ".py:" not in text and text not in datasets:
            names = ", ".join(datasets)
            raise argparse.ArgumentTypeError(f"unknown dataset {text!r}: choose one of {names}, or FILE.py:FUNCTION")
        return name_or_file(text)

    return convert


def switch(add: Callable, flag: str, help: str) -> None:
    """Add a flag that is off by default, with a --no- form that overrides a config; add: a group's add_argument."""
    add(flag, action=argparse.BooleanOptionalAction, default=False).help = help


# --------------------------------------------------------------------------------------------------------- the flags


def add_run_flags(parser: Parser, output: str) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output", default=output, metavar="DIR", help="run folder that is written")
    switch(add, "--overwrite", "replace the run that is in the run folder")
    switch(add, "--dry-run", "print what the run would read, build, need and write, and stop")
    add("--resume", metavar="RUN", help="continue this run folder; needs no other flag")
    add(
        "--config",
        metavar="FILE.json",
        help="flags from a JSON object or a run's config.json; the command line wins",
    )
    add(
        "--sweep",
        metavar="GRID.json",
        help="flags from a point of this grid: {flag: [values]} or a list of points; runs go to OUTPUT/POINT",
    )
    add("--sweep-index", type=NATURAL, help="the point of the grid, from 0")
    add("--seed", type=NATURAL, default=0, help="fixes weights, order and augmentation, never a split")
    add(
        "--seeds",
        type=NATURAL,
        nargs="+",
        metavar="SEED",
        help="one run after another with each of these seeds, into OUTPUT_SEED",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--save-every", type=NATURAL, default=0, help="epochs between epoch_N.pth; 0 is off")
    switch(add, "--tensorboard", "write scalars, samples, confusion matrices and flags for TensorBoard")
    add("--save-samples", type=picture, metavar="FILE.png", help="draw what the models see in epoch 1")


def add_data_flags(parser: Parser, datasets: Iterable[str], default: str | None = "digits") -> None:
    """datasets: names for the help; default: of --dataset, None where it is a checkpoint's."""
    add = parser.add_argument_group("data").add_argument
    text = f"{', '.join(datasets)}, or FILE.py:FUNCTION"
    add(
        "--dataset",
        type=dataset_name(datasets),
        default=default,
        help=text if default else f"{text}; else the checkpoint's",
    )
    add("--data-root", metavar="DIR", help="folder or file of the dataset; else $DATA_ROOT, then data/")
    add("--hf-dataset", metavar="NAME_OR_FOLDER", help="unlabeled: a Hugging Face dataset, on the hub or saved to disk")
    switch(add, "--download", "fetch CIFAR-10 or CIFAR-100 into --data-root")
    add("--val-split", type=SHARE, metavar="SHARE", help="share of train for val, where the dataset has none")
    add("--folds", type=number(int, 2), metavar="K", help="cut train and val into K folds, by class, patients whole")
    add(
        "--fold",
        type=NATURAL,
        metavar="I",
        help="fold I (0 to K - 1) is val; where the dataset has no test (ISIC 2024, csv without split column) "
        "it is test, and val is split off the rest",
    )
    add("--split-seed", type=NATURAL, default=0, help="fixes the val split, the folds and all limits")
    add("--limit-train", type=NATURAL, help="train on N images, classes in proportion; 0: all")
    add("--resolution", type=POSITIVE, metavar="PX", help="input side in pixels; else the dataset's")
    add("--batch-size", type=POSITIVE, help="images a step, over all processes and accumulation steps")
    add_reading_flags(add)
    add(
        "--include-list",
        metavar="FILE.txt",
        help="images one a line, by id, file name or end of path: train keeps only these; with "
        "--extra-train it judges only the extra images",
    )
    switch(add, "--hair-removal", "fill hairs (dark, thin, long) from what is around them, at decoding")
    switch(add, "--binary", "benign against malignant (HAM10000: mel, bcc, akiec; ISIC 2017: melanoma)")
    add("--negatives", type=POSITIVE, help="ISIC 2024: keep N negatives of train and val")
    add("--extra-train", metavar="FOLDER", help="ISIC 2024: malignant images from elsewhere, for train only")


def add_reading_flags(add: Callable) -> None:
    add("--cache", default="auto", choices=("auto", "off", "ram", "device"), help="where decoded images are kept")
    add("--workers", type=NATURAL, help="processes that decode what is not cached; else up to 8")
    add(
        "--on-bad-image", default="error", choices=("error", "skip"), help="stop at a broken image, or name and skip it"
    )
    add(
        "--decode-size",
        type=POSITIVE,
        default=512,
        metavar="PX",
        help="larger images are shrunk to this longest side when decoded",
    )
    add(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="grey levels that become black and white, in 16-bit images and, for their own window, in DICOM files",
    )
    add("--frame", type=NATURAL, metavar="I", help="DICOM: frame of files with several, from 0; else the middle one")
    switch(add, "--group-by-patient", "DICOM: images of one patient (a hash of its id) stay in one split or fold")
    add("--table", metavar="FILE.csv", help="csv: the table, a row an image; else the one in --data-root")
    add(
        "--image-column",
        help="csv: paths or names of images in --data-root (image, image_id, isic_id, file, ...)",
    )
    add("--label-column", help="csv: classes (label, target, class, diagnosis or dx)")
    add("--label-columns", nargs="+", metavar="COLUMN", help="csv: several findings an image, a column of 0 and 1 each")
    add(
        "--group-column",
        help="csv, image_text: images that stay in one split (csv: group, patient_id, patient, lesion_id; none is off)",
    )
    add(
        "--split-column",
        help="csv: train, val or test (split); none is off: then a fifth, always the same, is test",
    )


def add_positive_flag(add: Callable) -> None:
    add(
        "--positive",
        nargs="+",
        help="positive class of average precision, pAUC and sensitivity, for each task with two "
        "classes; else the one beside benign, normal, negative, no, ..., or the second",
    )


def add_text_flags(add: Callable) -> None:
    add(
        "--text-fields",
        nargs="+",
        metavar="FIELD",
        help="fields whose values are the text, a line each (medpix: Caption; image_text: text)",
    )
    add("--tasks", nargs="+", help="image_text: the keys of the labels")


def add_image_text_flags(parser: Parser, text_model: str) -> None:
    add = parser.add_argument_group("image + text", "of the datasets medpix and image_text").add_argument
    add_text_flags(add)
    add("--inputs", default="both", choices=("both", "image", "text"), help="train on one side alone")
    add("--image-model", help="vit-large, deit-base, deit-small, or a name as --model takes")
    add(
        "--text-model",
        default=text_model,
        help="bio-clinical-bert, distilbert, hf:NAME_OR_FOLDER, bert-mini-scratch, bert-tiny-scratch",
    )
    add(
        "--fusion",
        default="simple",
        choices=("simple", "concat_mlp", "cross_attention", "gated", "transformer_concat"),
        help="fusion of image and text",
    )
    add("--fusion-layers", type=POSITIVE, default=1, help="layers of the fusion")
    add("--fusion-dim", type=POSITIVE, default=512, metavar="D", help="width of both projected sides")
    add("--max-length", type=POSITIVE, default=128, metavar="L", help="tokens to which texts are cut")
    add("--text-pooling", default="mean", choices=("mean", "cls"), help="pooling of the text's tokens")
    add(
        "--freeze",
        nargs="+",
        choices=("image", "text"),
        help="these backbones keep their weights; --freeze-backbone: both",
    )
    add("--backbone-lr", type=ABOVE_ZERO, metavar="LR", help="peak learning rate of both backbones; else --lr")
    add("--task-weights", type=AMOUNT, nargs="+", metavar="W", help="weights of the tasks in the mean loss, in order")


def add_augment_flags(parser: Parser) -> None:
    add = parser.add_argument_group(
        "augmentation",
        "by default the dataset's: CIFAR, image folders and csv are cropped with padding and flipped, digits and "
        "MedPix\nshifted and rotated, MedMNIST and image_text shifted, skin lesions have derm, unlabeled images a "
        "random resized\ncrop and flips",
    ).add_argument
    add(
        "--augment",
        choices=("none", *PRESETS),
        help="none, or a preset (derm: both flips, rotation 30, scale 0.8 to 1.2, colours 0.2)",
    )
    add("--crop", choices=CROPS, help="pad: shift by whole pixels; resized: random resized crop")
    add("--padding", type=float, metavar="SHARE", help="reach of --crop pad, share of the side")
    add("--crop-scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="area of --crop resized, share of the image")
    add(
        "--crop-mode",
        choices=CROP_MODES,
        help="what is not square: center, resize the shorter side and crop the centre (default); squash",
    )
    add("--hflip", type=float, metavar="P", help="probability of a horizontal flip")
    add("--vflip", type=float, metavar="P", help="probability of a vertical flip")
    add("--rotation", type=float, metavar="DEGREES", help="largest angle")
    add("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="zoom about the centre, above 1 enlarges")
    add("--brightness", type=float, metavar="X", help="factor within 1 +- X")
    add("--contrast", type=float, metavar="X", help="factor within 1 +- X")
    add("--saturation", type=float, metavar="X", help="factor within 1 +- X")
    add("--hue", type=float, metavar="X", help="turn of the colour circle, at most 0.5")
    add("--grayscale", type=float, metavar="P", help="probability of a grey image")
    add("--blur", type=float, metavar="P", help="probability of a Gaussian blur, up to 2 pixels of 224")
    add("--solarize", type=float, metavar="P", help="probability that bright pixels are inverted")
    add("--random-erasing", type=float, metavar="P", help="probability of a black box, 2 to 33 %% of the area")
    add(
        "--mixup",
        type=float,
        metavar="ALPHA",
        help="blend a view with another image of train, its share from Beta(ALPHA, ALPHA), 0 is off; train's accuracy "
        "is then of the label with the larger share",
    )
    add(
        "--cutmix",
        type=float,
        metavar="ALPHA",
        help="put a box of another image into a view, its area from Beta(ALPHA, ALPHA); beside --mixup half of the "
        "views each",
    )
    add("--mix-probability", type=float, metavar="P", help="share of the views that --mixup and --cutmix mix (1)")


def augment_policy(flags: dict, default: Policy) -> Policy:
    """The dataset's default policy, or that of --augment, with the other augmentation flags that were given."""
    given = {name: flags[name] for name in Policy.__dataclass_fields__ if flags[name] is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    base = default
    if flags["augment"]:
        base = PRESETS.get(flags["augment"], Policy())
    changes = [name for name in given if name != "crop_mode"]
    if flags["augment"] == "none" and changes:
        raise UserError(f"--augment none and --{changes[0].replace('_', '-')} cannot be combined")
    return Policy(**{**base.__dict__, **given})


def add_model_flags(parser: Parser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        type=name_or_file,
        help="resnet8 (4.9 M), vit_6_192, cifar_resnet20 (0.3 M), any timm name, hf:NAME_OR_FOLDER, FILE.py:FUNCTION\n"
        "(also resnet18, vit_tiny, and the models of cifar_models.py, those of the published CIFAR tables)",
    )
    add("--patch-size", type=POSITIVE, metavar="PX", help="patch side of a ViT (vit_tiny, vit_6_192: 4)")
    switch(add, "--pretrained", "start from the hub's weights")
    add(
        "--weights",
        metavar="FILE",
        help="start from a foreign state dict (.pth or .safetensors), strictly; with texts: of the image side",
    )
    add("--init-checkpoint", metavar="FILE", help="start from a checkpoint of these scripts")
    switch(add, "--freeze-backbone", "train the head alone, of a model that starts from weights")
    add("--dropout", type=number(float, 0, 0.99), default=0.0, help="dropout of the head's input in training")


def add_training_flags(parser: Parser, select: Iterable[str] = CLASSIFICATION) -> None:
    """select: val metrics that may choose the best epoch."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=POSITIVE, help="passes over train; else the dataset's")
    add("--optimizer", default="sgd", choices=("sgd", "adam", "adamw"), help="optimizer")
    add("--lr", type=ABOVE_ZERO, help="peak learning rate (default: the dataset's; adam, adamw: 0.001)")
    add("--momentum", type=SHARE, default=0.9, help="momentum of sgd")
    switch(add, "--nesterov", "Nesterov momentum, with sgd")
    add("--weight-decay", type=AMOUNT, help="never on norms and biases (sgd 0.0005, adamw 0.05, adam 0)")
    add(
        "--schedule",
        default="cosine",
        choices=("cosine", "multistep", "plateau", "constant"),
        help="learning-rate schedule",
    )
    add(
        "--milestones",
        type=POSITIVE,
        nargs="+",
        metavar="EPOCH",
        help="epochs after which multistep multiplies by --gamma",
    )
    add("--gamma", type=SHARE, default=0.1, help="factor of multistep and plateau")
    add(
        "--plateau-patience",
        type=POSITIVE,
        default=5,
        help="epochs without gain before plateau lowers the rate",
    )
    add("--warmup-epochs", type=AMOUNT, default=0.0, metavar="N", help="linear learning-rate warm-up")
    add(
        "--sampler",
        default="shuffle",
        choices=("shuffle", "balanced"),
        help="each image once an epoch, or each class equally often",
    )
    add(
        "--class-weights",
        "--positive-weights",
        default="none",
        metavar="W",
        help="for the cross-entropy: none, balanced (1 / count) or W0,W1,...\nbalanced gives each finding the "
        "positive weight negatives / positives, at a mean weight of 1",
    )
    add("--label-smoothing", type=SHARE, default=0.0, help="for the cross-entropy; a smoothed teacher teaches worse")
    add(
        "--accumulation-steps",
        type=POSITIVE,
        default=1,
        help="run each batch in N parts, for less memory; the batch size stays",
    )
    add("--clip-grad", type=AMOUNT, default=0.0, metavar="NORM", help="largest gradient norm; 0 is off")
    add(
        "--ema",
        type=number(float, 0, 0.999999),
        default=0.0,
        metavar="DECAY",
        help="evaluate and keep an average of the weights, as 0.999; 0 is off",
    )
    add(
        "--patience",
        type=NATURAL,
        default=0,
        help="stop after N epochs without gain in --select-metric; 0 is off",
    )
    add(
        "--select-metric",
        default="accuracy",
        choices=select,
        metavar="METRIC",
        help=f"val metric that chooses the best epoch\nis one of {', '.join(select)}",
    )
    add_positive_flag(add)
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="mixed precision; auto: on a GPU")
    add("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU")


# -------------------------------------------------------------------------------------------------- values of the flags


def fill_defaults(flags: dict, defaults: dict) -> argparse.Namespace:
    """The flags, in which those that were not given (None) have these defaults."""
    return argparse.Namespace(**{**flags, **{k: v for k, v in defaults.items() if flags.get(k) is None}})


def replaced(flags: argparse.Namespace, **values) -> argparse.Namespace:
    """A copy of the flags with these values."""
    return argparse.Namespace(**{**vars(flags), **values})


def options(function: Callable, flags: dict) -> dict:
    """Those of the flags that a function has keyword-only parameters for."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: flags[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in flags}


def data_root(given: str | None) -> str | None:
    """The folder or file that was given, else $DATA_ROOT, else data/ beside the scripts where there is one."""
    beside = os.path.join(SCRIPT_FOLDER, "data")
    return given or os.environ.get("DATA_ROOT") or (beside if os.path.isdir(beside) else None)


def task_weights(weights: list[float] | None, tasks: dict) -> dict | None:
    """{task: weight} of --task-weights, or None.  Raises UserError."""
    if weights is None:
        return None
    if len(weights) != len(tasks) or not any(weights):
        values = " ".join(map(str, weights))
        raise UserError(f"--task-weights {values}: {len(tasks)} are needed, for {', '.join(tasks)}, not all 0")
    return dict(zip(tasks, weights))


def balanced_classes(sampler: str, tasks: dict) -> int:
    """Number of classes that --sampler balanced draws equally often, or 0; tasks: {task: class names}."""
    if sampler != "balanced":
        return 0
    if len(tasks) > 1:
        advice = "--class-weights balanced weighs the classes of each"
        raise UserError(f"--sampler balanced is for one task, here are {', '.join(tasks)}: {advice}")
    return len(next(iter(tasks.values())))


def config_argv(parser: Parser, values: dict, source: str) -> list[str]:
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


def without_flags(argv: list[str], names: tuple[str, ...]) -> list[str]:
    """argv without these flags and their values."""
    kept, skip = [], False
    for word in argv:
        if word.startswith("--"):
            skip = word.split("=")[0] in names
        if not skip:
            kept.append(word)
    return kept


def check_flags(flags: argparse.Namespace) -> argparse.Namespace:
    """Refuse values that argparse cannot judge one by one.  Raises UserError."""
    get = vars(flags).get
    if get("window") and not -math.inf < flags.window[0] < flags.window[1] < math.inf:
        raise UserError(f"--window {flags.window[0]:g} {flags.window[1]:g}: LOW must be below HIGH")
    if get("hf_dataset") and flags.data_root:
        both = f"--hf-dataset {flags.hf_dataset} and --data-root {flags.data_root}"
        raise UserError(f"{both} cannot be combined: give one of them")
    if get("nesterov") and flags.optimizer not in ("sgd", None):
        raise UserError(f"--nesterov and --optimizer {flags.optimizer} cannot be combined: it is a kind of sgd")
    if get("tensorboard") and not flags.dry_run:
        optional("tensorboard", "--tensorboard")
        flags.save_samples = flags.save_samples or os.path.join(flags.output, "tensorboard_samples.png")
    if get("save_samples"):
        folder = os.path.dirname(os.path.abspath(flags.save_samples))
        writable = folder == os.path.abspath(flags.output) or os.path.isdir(folder) and os.access(folder, os.W_OK)
        if os.path.isdir(flags.save_samples) or not writable:
            where = "no file can be written there, name one in a folder that exists"
            raise UserError(f"--save-samples {flags.save_samples}: {where}")
    frozen = "--freeze-backbone" if get("freeze_backbone") else "--freeze" if get("freeze") else None
    if frozen and not (flags.pretrained or flags.weights or flags.init_checkpoint):
        sources = "--pretrained, --weights or --init-checkpoint"
        raise UserError(f"{frozen} needs {sources}: random features teach a head nothing")
    return flags


def parse_flags(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parse argv over --config FILE or the flags of --resume RUN, and a point of --sweep.  Raises UserError."""
    flags = parser.parse_args(argv)
    if getattr(flags, "sweep", None) is not None or getattr(flags, "sweep_index", None) is not None:
        argv = optional("common.sweep", "--sweep").expand_sweep(parser, argv)
        flags = parser.parse_args(argv)
    resume, config = getattr(flags, "resume", None), getattr(flags, "config", None)
    if resume and config:
        raise UserError("--resume and --config cannot be combined: a resumed run has its own flags")
    if not resume and not config:
        return check_flags(flags)
    path = config or os.path.join(resume, "config.json")
    values = read_json(path)
    if isinstance(values, dict) and isinstance(values.get("flags"), dict):
        script = str((values.get("environment") or {}).get("command") or parser.prog).split()[0]
        if resume and script != parser.prog:
            raise UserError(f"--resume {resume} is a run of {script}: python {script} --resume {resume}")
        values = values["flags"]
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object of flags")
    saved = config_argv(parser, values, path)
    flags = check_flags(parser.parse_args(saved + argv))
    if resume:
        before = parser.parse_args(saved)
        for dest, value in vars(flags).items():
            if dest not in RESUME_MAY_CHANGE and value != getattr(before, dest):
                now, then = (
                    " ".join(map(str, v)) if isinstance(v, list) else "none" if v is None else v
                    for v in (value, getattr(before, dest))
                )
                raise UserError(
                    f"--{dest.replace('_', '-')} {now} with --resume: the run has {then}; "
                    "only device, workers, epochs and data-root may change"
                )
        if flags.output not in (parser.get_default("output"), resume):
            raise UserError(f"--output {flags.output} with --resume {resume}: a resumed run stays in its folder")
        flags.output = resume
    return flags


def expand_seeds(parser: Parser, argv: list[str]) -> list[list[str]]:
    """[argv], or an argv for each of --seeds.  Raises UserError."""
    if getattr(parser.parse_args(argv), "seeds", None) is None:
        return [argv]
    return optional("common.sweep", "--seeds").expand_seeds(parser, argv)
