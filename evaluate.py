"""Judge a checkpoint, or stored embeddings: metrics, cost, k-NN, a linear probe, and what it keeps of its teacher.

    python evaluate.py runs/distill/best.pth
    python evaluate.py runs/distill/best.pth --teacher-checkpoint runs/teacher/best.pth --knn --linear-probe
    python evaluate.py runs/student/best.pth --dataset imagefolder --data-root outside --split test
    python evaluate.py embeddings --knn --linear-probe           # stored embeddings; the plain view is used
    python evaluate.py runs/student/best.pth --predict FOLDER a.png --output predictions.csv     # new images
    python evaluate.py runs/student/best.pth --export out/student.onnx --with-preprocessing      # or .safetensors, .pt2

A checkpoint knows its model, classes, preprocessing and dataset; flags name another dataset with the same classes.
k-NN and the probe take the embeddings of all of the run's train split, whatever its --limit-train, and are judged once
on --split; the probe's learning rate and weight decay are chosen on a fifth of train, whole lesions or patients.
Where the data have other classes than a checkpoint, these two judge its embeddings and its head is left out.
With several tasks each figure is there as <task>_<figure>, k-NN's and the probe's too, and as their mean, <figure>.
Writes evaluation.json, predictions and a confusion matrix for each task, and prints a table; `kept` is student by
teacher.  --predict writes the class probabilities of new images as CSV; no dataset is read.

Files of common: augment, cli, data, loader, metrics, models, run, training; embeddings for stored embeddings, probes
for --knn and --linear-probe, export for --export, and those that the checkpoint's dataset and model need (see
train_student.py).
Packages: torch, timm, numpy, pillow, scikit-learn, tqdm (torchvision for CIFAR, transformers for hf: names).
"""

import argparse
import csv
import os

import numpy as np

from common import cli

with cli.torch_later():
    from common.data import (
        DATASETS,
        SPLITS,
        TASK,
        DataError,
        ImageDataset,
        Splits,
        are_findings,
        chosen_rows,
        dataset_info,
        images_below,
        in_words,
        load_splits,
        logits_name,
        note,
        split_options,
        tasks_of,
        without_bad_images,
    )
    from common.loader import Loader
    from common.run import (
        UserError,
        atomic_write,
        environment,
        file_sha256,
        load_checkpoint,
        optional,
        rank,
        write_json,
    )

PARAMETERS = 100_000_000  # the mark that a deployable student stays below
OUTPUT = "runs/evaluate"
HELD_OUT, STREAM_PROBE = 0.2, 1007  # the share of train on which the probe is chosen, and the stream that draws it
MOST_CLASSES = 20  # are counted, or have their recall printed
# flags that say something beside --predict; --on-bad-image does not: broken images are named and left out in any case
PREDICT_FLAGS = set(
    "checkpoint predict output overwrite device batch_size resolution amp workers cache decode_size window "
    "frame".split()
)

# with --export likewise
EXPORT_FLAGS = set(
    "checkpoint export with_preprocessing quantize data_licence overwrite dataset data_root split batch_size workers "
    "cache on_bad_image text_fields tasks positive".split()
)


def build_parser():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", help="best.pth, latest.pth or epoch_N.pth of a run, or a folder of stored embeddings")
    add("--teacher-checkpoint", metavar="FILE", help="compare with this teacher")
    add("--teacher-embeddings", metavar="DIR", help="compare with stored outputs of this teacher")
    cli.switch(add, "--knn", "classify by the 10, 20, 100 and 200 nearest images of train")
    cli.switch(add, "--linear-probe", "train a linear classifier on the embeddings of train")
    add("--seed", type=cli.NATURAL, default=0, help="fixes the probe's held-out part and order")
    add(
        "--dataset",
        type=cli.dataset_name(DATASETS),
        metavar="NAME",
        help=f"{', '.join(DATASETS)}, FILE.py:FUNCTION; else the checkpoint's",
    )
    add("--data-root", metavar="DIR", help="its folder or file; else the checkpoint's, $DATA_ROOT or data/")
    add("--split", default="test", choices=SPLITS, help="part of the dataset")
    add("--resolution", type=cli.POSITIVE, metavar="PX", help="input side in pixels; else that of the training")
    add("--teacher-resolution", type=cli.POSITIVE, metavar="PX", help="the teacher's input side in pixels; likewise")
    add("--batch-size", type=cli.POSITIVE, default=128, help="images a step")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--amp", default="off", choices=("auto", "off", "bf16", "fp16"), help="mixed precision")
    add(
        "--output",
        default=OUTPUT,
        metavar="PATH",
        help="folder that is written; with --predict a file, else predictions.csv",
    )
    add("--predict", nargs="+", metavar="PATH", help="class probabilities of these images and folders, as CSV")
    add(
        "--export", metavar="FILE", help="write the model as .safetensors, .onnx or .pt2, run it on --split and compare"
    )
    cli.switch(add, "--with-preprocessing", "with --export .onnx, .pt2: uint8 images in, probabilities out")
    add("--quantize", choices=("int8",), help="with --export .onnx: a second file in 8 bits, calibrated on train")
    add("--data-licence", metavar="TEXT", help="with --export: licence of the data, for the model card")
    cli.switch(add, "--overwrite", "with --predict and --export: replace the file")
    cli.add_reading_flags(add)
    cli.add_positive_flag(add)
    cli.add_text_flags(add)
    parser.set_defaults(decode_size=None, window=None)  # the checkpoint's
    return parser


if __name__ == "__main__":
    cli.check_command_line(build_parser)

# what loads torch
import torch

from common.training import (
    Precision,
    brackets,
    cost,
    load_model,
    model_outputs,
    peak_memory_mb,
    predict_logits,
    select_device,
    task_metrics,
    uncertainty,
    write_predictions,
)

# --------------------------------------------------------------------------------------------------- one checkpoint


def checkpoint_splits(checkpoint, dataset=None, data_root=None, split="test", **reading):
    """Splits that hold `split` of a checkpoint's own dataset, or of another with the checkpoint's classes, if any.

    reading: keywords of `load_splits` that win over the checkpoint's flags.  Raises UserError, DataError.
    """
    flags = checkpoint["flags"]
    if dataset is None and flags["dataset"] == "unlabeled":
        raise UserError("this run's images have no labels: name a set that has, --dataset NAME --data-root DIR")
    same = dataset in (None, flags["dataset"])
    divided = same and split != "test"  # train and val are the run's own division
    options = {**split_options(flags), "positive": checkpoint["classes"] and checkpoint.get("positive")}
    for name in ("limit_labels", "unlabeled_root"):  # to be judged, an image needs its label
        options.pop(name, None)
    if not same:  # how images are read stays; which samples there are is another dataset's own matter
        kept = ("split_seed", "decode_size", "window", "frame", "hair_removal", "positive")
        options = {k: v for k, v in options.items() if k in kept}
    if split != "train":  # what changes train alone may be gone by now
        options = {k: v for k, v in options.items() if k not in ("limit_train", "include_list", "extra_train")}
    result = load_splits(
        dataset or flags["dataset"],
        cli.data_root(data_root or (flags["data_root"] if same else None)),
        classes=checkpoint["classes"] or None,
        splits=SPLITS if divided else (split,),
        **{**options, **reading},
    )
    if not divided:
        result.train, result.val, result.test = (getattr(result, k) if k == split else None for k in SPLITS)
    return result


def evaluate_checkpoint(path, split="test", device="auto", batch_size=128, data_root=None):
    """Metrics of a checkpoint on a split of its own dataset, read anew.  data_root: where it is now, if it moved."""
    device, checkpoint = select_device(device), load_checkpoint(path)
    model, preprocess = load_model(checkpoint, device, path=path)
    splits = checkpoint_splits(checkpoint, data_root=data_root, split=split)
    dataset = getattr(splits, split)
    logits = predict_logits(model, Loader(dataset, batch_size, device), preprocess, Precision("off", device))
    return task_metrics(logits, dataset.targets, positive=splits.positive)


def measure_checkpoint(path, device="auto", batch_size=128):
    """`cost` of a checkpoint's model, in float32 and not compiled."""
    device, checkpoint = select_device(device), load_checkpoint(path)
    model, preprocess = load_model(checkpoint, device, path=path)
    return cost(model, preprocess.resolution, batch_size, Precision("off", device))


# ------------------------------------------------------------------------------------------------- outputs of models


def live_outputs(path, loaders, classes, batch_size, resolution, device, precision):
    """(outputs {split: {"logits": {task: (N, C)}, "embedding": (N, D)}}, its description, its cost) of a checkpoint.

    loaders: {split: Loader}.  Logits of other classes than the data's are left out: "logits" is empty then.
    """
    checkpoint = load_checkpoint(path)
    model, preprocess = load_model(checkpoint, device, resolution, path)
    heads = {}
    if checkpoint["classes"] == classes:  # a student without labels has none
        heads = {task: logits_name(task) for task in tasks_of(classes)}
    embedding = ("embedding",) if "train" in loaders else ()  # k-NN and the probe alone need embeddings
    outputs = {}
    for split, loader in loaders.items():
        values = model_outputs(model, loader, preprocess, precision, (*embedding, *heads.values()))
        logits = {task: values[name] for task, name in heads.items()}
        outputs[split] = {"embedding": values.get("embedding"), "logits": logits}
    described = {
        "checkpoint": path,
        "sha256": file_sha256(path),
        "model": model.name,
        "family": model.family,
        "resolution": preprocess.resolution,
    }
    return outputs, described, cost(model, preprocess.resolution, batch_size, precision)


def stored_outputs(folder, data):
    """The same of stored embeddings, for the images of data {split: dataset or Store}, which are found by their ids."""
    stores = open_splits(folder, data)
    outputs = {}
    for split, samples in data.items():
        values = stores[split].plain(samples.ids)
        logits = {TASK: values["logits"]} if "logits" in values else {}
        outputs[split] = {"embedding": values["embedding"], "logits": logits}
    meta = next(iter(stores.values())).meta
    teacher = meta["teacher"]
    described = {
        "checkpoint": folder,
        "sha256": teacher["sha256"],
        "model": teacher["name"],
        "family": teacher["family"],
        "resolution": meta["resolution"],
    }
    return outputs, described, {"parameters": teacher["parameters"]}


def open_splits(folder, splits):
    return optional("common.embeddings", folder).open_splits(folder, splits)


def read_data(args, wanted):
    """Splits with those that are wanted: the checkpoint's dataset, or another, or the stores themselves."""
    if os.path.isdir(args.checkpoint):
        stores = open_splits(args.checkpoint, wanted)
        meta = stores[args.split].meta
        domain = dataset_info(meta["dataset"]).domain
        return Splits(meta["dataset"], domain, meta["classes"], **stores, positive=args.positive)
    checkpoint, reading = load_checkpoint(args.checkpoint), split_options(vars(args))
    try:
        splits = checkpoint_splits(checkpoint, args.dataset, args.data_root, args.split, **reading)
    except DataError:
        if "train" not in wanted or not checkpoint["classes"]:
            raise
        checkpoint["classes"] = []  # k-NN and the probe need no head: the data may have other classes
        splits = checkpoint_splits(checkpoint, args.dataset, args.data_root, args.split, **reading)
    if "train" in wanted:
        reading["limit_train"] = None
        splits.train = checkpoint_splits(checkpoint, args.dataset, args.data_root, "train", **reading).train
    return splits


# ---------------------------------------------------------------------------------------- k-NN, probe and the table


def probe_embeddings(outputs, train, judged, split, splits, device, *, knn, linear_probe, seed):
    """{"knn": {k: metrics}, "linear_probe": metrics and the choice} of a model's embeddings.

    outputs: as `live_outputs` gives them; train, judged: datasets.  Metrics as in `task_metrics`; with several tasks
    the choice too is <task>_lr and so on.
    """
    probes = optional("common.probes", "--knn and --linear-probe")
    result, votes, logits, chosen, classes = {}, {}, {}, {}, splits.classes
    x, features = (torch.from_numpy(outputs[name]["embedding"]).to(device) for name in ("train", split))
    for task, names in tasks_of(classes).items():
        y = torch.from_numpy(train.targets[task]).to(device)
        if knn:
            # a class without a vote: its logarithm stays finite, the loss would say nothing
            tiny = torch.finfo(torch.float32).tiny
            for k, share in probes.knn(x, y, features, len(names)).items():
                votes.setdefault(k, {})[task] = share.clamp(min=tiny).log().cpu().numpy()
        if linear_probe:
            held = torch.zeros(len(train), dtype=torch.bool)
            held[chosen_rows(train, round(HELD_OUT * len(train)), seed, STREAM_PROBE)] = True
            values, choice = probes.linear_probe(x, y, held, features, len(names), seed=seed)
            logits[task] = values.cpu().numpy()
            prefix = task_prefix(classes, task)
            chosen.update({prefix + name: value for name, value in choice.items()})
    if knn:
        result["knn"] = {
            k: without_loss(task_metrics(by_task, judged.targets, positive=splits.positive))
            for k, by_task in votes.items()
        }
    if linear_probe:
        result["linear_probe"] = {**task_metrics(logits, judged.targets, positive=splits.positive), **chosen}
    return result


def without_loss(scores):
    return {name: None if name == "loss" or name.endswith("_loss") else value for name, value in scores.items()}


def task_prefix(classes, task):
    """Before the names of a task's figures: "" of the only one."""
    return f"{task}_" if len(tasks_of(classes)) > 1 else ""


def check_train(train, judged, classes, knn):
    """Say, once, what k-NN and the probe cannot do with this train."""
    neighbours = optional("common.probes", "--knn and --linear-probe").NEIGHBOURS
    cut = [str(k) for k in neighbours if k > len(train)]
    if cut and knn:
        note(f"train has {len(train)} images: k of {', '.join(cut)} is cut to that")
    for task, names in tasks_of(classes).items():
        lacking = [names[c] for c in np.setdiff1d(judged.targets[task], train.targets[task])]
        if lacking:
            where = "" if task == TASK else f" of the task {task}"
            note(
                f"train has no image of {', '.join(lacking[:5])}{where}, which --split has: k-NN and the probe "
                "cannot find it"
            )


def accuracies(scores, classes):
    """{row: accuracy} of the model itself, k-NN and the probe; of several tasks their means, then each task's."""
    model, neighbours, probed = {}, {}, {}
    for prefix in dict.fromkeys(["", *(task_prefix(classes, task) for task in tasks_of(classes))]):
        names = [prefix + name for name in ("accuracy", "balanced_accuracy")]
        model.update({name: scores[name] for name in names if name in scores})
        knn = scores.get("knn", {}).items()
        neighbours.update({f"{prefix}knn_{k}": metrics[f"{prefix}accuracy"] for k, metrics in knn})
        if "linear_probe" in scores:
            probed[f"{prefix}linear_probe"] = scores["linear_probe"][f"{prefix}accuracy"]
    return {**model, **neighbours, **probed}


def table_rows(scores, classes):
    """{row of the table: value} of a model's part of evaluation.json; recalls of up to MOST_CLASSES classes.

    Of each finding only what does not depend on a threshold.
    """
    hidden = ("checkpoint", "sha256")
    rows = {key: value for key, value in scores.items() if key not in hidden and not isinstance(value, dict)}
    rows["of 100 M parameters"] = f"{100 * scores['parameters'] / PARAMETERS:.1f} %"
    rows.update(accuracies(scores, classes))
    for task in tasks_of(classes) if "linear_probe" in scores else ():
        for name in (task_prefix(classes, task) + name for name in ("lr", "weight_decay")):
            prefix = task_prefix(classes, task)
            rows[f"{prefix}linear_probe {name.removeprefix(prefix)}"] = f"{scores['linear_probe'][name]:g}"
    rows.update({f"kept {name}": f"{100 * share:.1f} %" for name, share in scores.get("kept", {}).items()})
    recalls = scores.get("class_recalls", {})
    if len(recalls) <= MOST_CLASSES:
        rows.update({f"recall {name}": recall for name, recall in recalls.items()})
    if are_findings(classes):
        own = tuple(f"{before}{finding}_" for finding in classes for before in ("", "kept "))
        ranking = ("_auc", "_average_precision")
        rows = {name: value for name, value in rows.items() if not name.startswith(own) or name.endswith(ranking)}
    return rows


def print_table(columns, classes):
    """columns: {title: part of evaluation.json}; one line a metric, with its interval where there is one."""
    cells = {"": {title: f"{title:>14}" for title in columns}}
    for title, scores in columns.items():
        for row, value in table_rows(scores, classes).items():
            interval = scores.get("intervals", {}).get(row)
            cells.setdefault(row, {})[title] = f"{shown(value):>14} {brackets(interval) if interval else ''}".rstrip()
    width = max(map(len, cells))
    # a model's name may be long
    widths = {title: max(29, *(len(row.get(title, "")) for row in cells.values())) for title in columns}
    for name, row in cells.items():
        print(f"{name:{width}} {' '.join(row.get(title, '').ljust(widths[title]) for title in columns)}".rstrip())


def shown(value):
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 100 else f"{value:.4f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


# -------------------------------------------------------------------------------------------------- what is refused


def check_flags(args):
    learns = args.knn or args.linear_probe
    if args.teacher_checkpoint and args.teacher_embeddings:
        raise UserError("--teacher-checkpoint and --teacher-embeddings cannot be combined")
    if args.teacher_resolution and not args.teacher_checkpoint:
        raise UserError("--teacher-resolution needs --teacher-checkpoint FILE")
    if args.overwrite:
        raise UserError("--overwrite needs --predict or --export: evaluation.json is always replaced")
    for name in ("with_preprocessing", "quantize", "data_licence"):
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} needs --export FILE")
    if args.split == "train" and learns:
        raise UserError("--split train cannot be combined with --knn and --linear-probe, which learn from train")
    if os.path.exists(os.path.join(args.output, "config.json")):
        raise UserError(f"--output {args.output} holds a run: name another folder")
    if os.path.isdir(args.checkpoint):
        for name in ("dataset", "data_root", "resolution", "teacher_checkpoint"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} cannot be combined with stored embeddings: {args.checkpoint} holds no images")


def check_labels(args, splits, wanted):
    for split in wanted:
        if min(labels.min() for labels in getattr(splits, split).targets.values()) < 0:
            raise UserError(
                f"{split} of {args.checkpoint} has images without labels (-1): nothing can be judged, nor k-NN or "
                "a probe be built"
            )


def check_classes(args, classes):
    path = args.teacher_checkpoint or args.teacher_embeddings
    if not path or args.teacher_checkpoint and (args.knn or args.linear_probe):  # these two compare embeddings
        return
    if args.teacher_embeddings:
        teacher_classes = open_splits(path, [args.split])[args.split].meta["classes"]
    else:
        teacher_classes = load_checkpoint(path)["classes"]
    if teacher_classes and teacher_classes != classes:
        raise UserError(
            f"teacher and student have different classes: the teacher knows {in_words(teacher_classes)}, the student "
            f"{in_words(classes)}"
        )


# ------------------------------------------------------------------------------------------------------- new images


def check_given_flags(parser, purpose, allowed, why):
    """Refuse what the command line says beside --predict or --export and what would do nothing there.  Raises
    UserError."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # so that only what was given is there, be it a default's value
    parser._defaults.clear()
    for name in vars(parser.parse_args()):
        if name not in allowed:
            raise UserError(f"--{name.replace('_', '-')} and {purpose} cannot be combined: {why}")


def predict_files(args, path):
    """Write the probabilities of args.predict's images to `path` and print how often each class is the likeliest.

    Raises UserError, DataError.
    """
    if not path.endswith(".csv") or os.path.isdir(path):
        raise UserError(f"--output {path} with --predict: name a file that ends in .csv")
    if os.path.exists(path) and not args.overwrite:
        raise UserError(f"{path} is there: --overwrite replaces it, --output names another file")
    checkpoint = load_classifier(args.checkpoint)
    device = select_device(args.device)
    saved = split_options(checkpoint["flags"])
    options = {name: saved[name] for name in ("decode_size", "window", "frame", "hair_removal") if name in saved}
    given = {name: getattr(args, name) for name in ("decode_size", "window", "frame")}
    options.update({name: value for name, value in given.items() if value is not None})
    dataset = new_images(args.predict, **options)
    model, preprocess = load_model(checkpoint, device, args.resolution, args.checkpoint)
    classes = tasks_of(checkpoint["classes"])
    header = table_header(classes)
    names = {task: logits_name(task) for task in classes}
    loader = Loader(dataset, args.batch_size, device, cache=args.cache, workers=args.workers)
    outputs = model_outputs(model, loader, preprocess, Precision(args.amp, device), tuple(names.values()))
    probabilities = {task: softmax(outputs[name]) for task, name in names.items()}  # (N, C) each
    if rank() == 0:
        write_table(path, header, dataset.ids, classes, probabilities)
        print(f"{len(dataset):,} images, {model.name}, {preprocess.resolution} px")
        for task, values in probabilities.items():
            print("\n".join(counts(task, classes[task], values)))
        print(path)


def load_classifier(path):
    """A checkpoint that classifies images alone.  Raises UserError."""
    if os.path.isdir(path):
        raise UserError(f"--predict cannot be combined with stored embeddings: {path} holds no model")
    checkpoint = load_checkpoint(path)
    if not checkpoint["classes"]:
        raise UserError(f"{path} has no head, it was trained without labels: --predict needs one")
    if checkpoint["model_args"].get("inputs", "image") != "image":
        raise UserError(f"{path} reads texts, which --predict has not: take a model trained with --inputs image")
    return checkpoint


def new_images(paths, hair_removal=False, **decoding):
    """ImageDataset, unlabelled, of image files and of all images anywhere below folders, hidden ones left out, in order
    of their paths, which are their ids; broken ones are named and left out.  Raises UserError, DataError."""

    def refuse_folder(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    if hair_removal:
        optional("common.medical", "--hair-removal").opencv()  # refuses where it is missing
    files = set()
    for path in map(os.path.normpath, paths):
        if not os.path.exists(path):
            raise UserError(f"--predict {path}: no such file or folder")
        below = images_below(path, onerror=refuse_folder) if os.path.isdir(path) else [path]
        if not below:
            raise UserError(f"--predict {path} holds no images")
        files.update(below)
    files, unlabelled = sorted(map(os.path.normpath, files)), np.full(len(files), -1)
    return without_bad_images(ImageDataset(files, unlabelled, paths=files, hair_removal=hair_removal, **decoding))


def softmax(logits):
    """(N, C) logits -> probabilities, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def table_header(classes):
    """Column names.  Raises UserError where two columns would have one name."""
    findings = are_findings(classes)
    header = ["path", *(classes if findings else ())]
    for task, names in () if findings else classes.items():
        prefix = "" if task == TASK else f"{task}_"
        header += [f"{prefix}{name}" for name in ("predicted", "confidence", *names)]
    twice = [name for name in header if header.count(name) > 1] if len(set(header)) < len(header) else []
    if twice:
        raise UserError(f"the table would have two columns {twice[0]!r}: a class or task has the name of a column")
    return header


def write_table(path, header, ids, classes, probabilities):
    """A row an image: path, and of each task the likeliest class, its probability and that of each class; of each
    finding the probability that it is present."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    encoding = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with atomic_write(path) as temporary, open(temporary, "w", **encoding) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row, name in enumerate(ids):
            cells, tasks = [name], probabilities.items()
            if are_findings(classes):
                cells, tasks = [name, *(f"{values[row, 1]:.8g}" for _, values in tasks)], ()
            for task, values in tasks:
                best = values[row].argmax()
                cells += [classes[task][best], *(f"{p:.8g}" for p in (values[row][best], *values[row]))]
            writer.writerow(cells)


def counts(task, names, probabilities):
    """Lines: how many images each class was predicted for, the most frequent first."""
    number = np.bincount(probabilities.argmax(1), minlength=len(names))
    order = [c for c in np.argsort(-number, kind="stable") if number[c]]
    width = max(len(names[c]) for c in order)
    lines = [f"{'' if task == TASK else task + ': '}{names[c]:{width}}  {number[c]:,}" for c in order[:MOST_CLASSES]]
    return lines + ([f"and {len(order) - MOST_CLASSES} more classes"] if len(order) > MOST_CLASSES else [])


# ----------------------------------------------------------------------------------------------------------- export


def export_model(args):
    """Write the checkpoint's model to args.export, compare it on --split and print how it went."""
    export = optional("common.export", "--export")
    export.check_export(args.export, args.with_preprocessing, args.quantize, args.overwrite)
    checkpoint = load_checkpoint(args.checkpoint)
    reading, splits = split_options(vars(args)), {}
    for split in (args.split, "train") if args.quantize else (args.split,):
        splits[split] = checkpoint_splits(checkpoint, args.dataset, args.data_root, split, **reading)
    parts = {split: getattr(read, split) for split, read in splits.items()}
    lines = export.export(
        args.export,
        checkpoint,
        args.checkpoint,
        parts[args.split],
        parts.get("train"),
        batch_size=args.batch_size,
        with_preprocessing=args.with_preprocessing,
        quantize_to=args.quantize,
        positive=splits[args.split].positive,
        licence=args.data_licence,
    )
    print("\n".join(lines))


# ------------------------------------------------------------------------------------------------------------- main


def judge(args, path, loaders, resolution, splits, data, device, precision):
    """(outputs, description with metrics and cost) of a checkpoint, or of stored embeddings where `loaders` is None."""
    if loaders is not None:
        outputs, described, costs = live_outputs(
            path, loaders, splits.classes, args.batch_size, resolution, device, precision
        )
    else:
        outputs, described, costs = stored_outputs(path, data)
    logits = outputs[args.split]["logits"]
    if not logits and "train" not in data:
        raise UserError(f"{path} holds no logits of a trained head: give --knn or --linear-probe, which need none")
    scores = task_metrics(logits, data[args.split].targets, positive=splits.positive) if logits else {}
    return outputs, {**described, **scores, **splits.positive_names(), **costs}


def main(args):
    if args.predict:
        check_given_flags(build_parser(), "--predict", PREDICT_FLAGS, "new images have no labels, nothing is judged")
        return predict_files(args, "predictions.csv" if args.output == OUTPUT else args.output)
    if args.export:
        check_given_flags(build_parser(), "--export", EXPORT_FLAGS, "the file is compared with the checkpoint alone")
        return export_model(args)
    check_flags(args)
    device = select_device(args.device)
    precision = Precision(args.amp, device)
    wanted = [*(["train"] if args.knn or args.linear_probe else []), args.split]
    splits = read_data(args, wanted)
    check_labels(args, splits, wanted)
    data, classes = {split: getattr(splits, split) for split in wanted}, splits.classes
    check_classes(args, classes)
    dataset, outputs, scores = data[args.split], {}, {"student": None, "teacher": None}
    is_live, loaders = {"student": os.path.isfile(args.checkpoint), "teacher": bool(args.teacher_checkpoint)}, None
    if any(is_live.values()):  # both models share the decoded images
        reading = {"cache": args.cache, "workers": args.workers}
        loaders = {split: Loader(part, args.batch_size, device, **reading) for split, part in data.items()}
    if "train" in wanted:
        check_train(data["train"], dataset, classes, args.knn)
    paths = {"teacher": args.teacher_checkpoint or args.teacher_embeddings, "student": args.checkpoint}
    sides = {"teacher": args.teacher_resolution, "student": args.resolution}
    for role, path in paths.items():
        if path:
            read = loaders if is_live[role] else None
            outputs[role], scores[role] = judge(args, path, read, sides[role], splits, data, device, precision)
    student, teacher = scores["student"], scores["teacher"]
    logits = {role: values[args.split]["logits"] for role, values in outputs.items()}
    if logits["student"] and logits.get("teacher"):  # with fidelity, behind what is there
        student.update(task_metrics(logits["student"], dataset.targets, logits["teacher"], splits.positive))
    result = {
        "dataset": splits.describe(),
        "split": args.split,
        "student": student,
        "teacher": teacher,
        "peak_memory_mb": peak_memory_mb(device),
        "batch_size": args.batch_size,
        "amp": precision.name,
        "environment": environment(device),
    }
    for role, values in outputs.items():  # after the peak of memory was read
        if "train" in wanted:
            chosen = {"knn": args.knn, "linear_probe": args.linear_probe, "seed": args.seed}
            scores[role].update(probe_embeddings(values, data["train"], dataset, args.split, splits, device, **chosen))
        if logits[role]:
            scores[role].update(uncertainty(logits[role], dataset, splits))
    if teacher:
        reference = accuracies(teacher, classes)
        kept = {k: v / reference[k] for k, v in accuracies(student, classes).items() if reference.get(k)}
        student["kept"] = kept
    if rank() == 0:  # of several processes the first one writes
        save_and_print(args, result, splits, dataset, logits["student"])


def save_and_print(args, result, splits, dataset, logits):
    """Write evaluation.json, predictions and confusion matrices; print the table."""
    os.makedirs(args.output, exist_ok=True)
    write_json(os.path.join(args.output, "evaluation.json"), result)
    if logits:
        write_predictions(args.output, args.split, dataset, logits, splits)
    device, memory = result["environment"]["device"], f"{result['peak_memory_mb']:,.0f} MB"
    print(f"{splits}; {args.split} split, {device}, batch {args.batch_size}, peak memory {memory}")
    teacher = {"teacher": result["teacher"]} if result["teacher"] else {}
    print_table({"student" if teacher else "model": result["student"], **teacher}, splits.classes)
    print(os.path.join(args.output, "evaluation.json"))


if __name__ == "__main__":
    cli.run_script(main, build_parser)
