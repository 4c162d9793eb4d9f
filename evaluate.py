"""Judge a checkpoint, or stored embeddings: metrics, cost, k-NN, a linear probe, and what it keeps of its teacher.

    python evaluate.py runs/distill/best.pth
    python evaluate.py runs/distill/best.pth --teacher-checkpoint runs/teacher/best.pth
    python evaluate.py runs/student/best.pth --dataset imagefolder --data-root outside --split test
    python evaluate.py runs/distill/best.pth --teacher-checkpoint runs/teacher/best.pth --knn --linear-probe
    python evaluate.py embeddings --knn --linear-probe           # stored embeddings; the plain view is used
    python evaluate.py runs/tokens/best.pth --dataset ham10000 --data-root DIR --knn --linear-probe
    python evaluate.py runs/student/best.pth --predict FOLDER a.png --output predictions.csv     # of new images
    python evaluate.py runs/medpix/best.pth --dataset image_text --data-root DIR     # images and texts of another place

A checkpoint knows its model, classes, preprocessing and dataset; flags name another dataset with the same classes.
k-NN and the probe take the embeddings of all of the run's train split, whatever its --limit-train, and are judged once
on --split; the probe's learning rate and weight decay are chosen on a fifth of train, whole lesions or patients.
Where the data have other classes than a checkpoint, these two judge its embeddings and its head is left out.
Of several tasks each figure is there as <task>_<figure>, k-NN's and the probe's too, and as their mean, <figure>.
Writes evaluation.json, predictions and a confusion matrix for each task, and prints a table; `kept` is student /
teacher.
Needs from common: augment.py, cli.py, data.py, dermatology.py, distributed.py, embeddings.py, evaluation.py, images.py,
loader.py, metrics.py, models.py, prediction.py, probes.py, splitting.py, tables.py, training.py.
Models and datasets of images and texts need image_text.py and multimodal.py too.
Packages: torch, timm, numpy, pillow, scikit-learn, tqdm (torchvision for CIFAR, transformers for hf: names).
"""

import os

import numpy as np
import torch

from common import cli, distributed, probes
from common.data import DATASETS, SPLITS, Splits
from common.embeddings import open_splits
from common.evaluation import brackets, cost, outputs, splits_of, task_metrics, uncertainty, write_predictions
from common.images import TASK, DataError, in_words, logits_name, tasks_of
from common.loader import Loader
from common.prediction import check_predict_flags, predict_files
from common.splitting import held_out
from common.tables import note
from common.training import (
    Precision,
    device_name,
    file_sha256,
    load_checkpoint,
    load_model,
    peak_memory_mb,
    select_device,
)

PARAMETERS = 100_000_000  # the mark that a deployable student stays below
OUTPUT = "runs/evaluate"
HELD_OUT, STREAM_PROBE = 0.2, 1007  # the share of train on which the probe is chosen, and the stream that draws it


def build_parser():
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "checkpoint", help="best.pth, latest.pth or epoch_N.pth of a run, or a folder of stored embeddings"
    )
    parser.add_argument("--teacher-checkpoint", metavar="FILE", help="compare with this teacher")
    parser.add_argument("--teacher-embeddings", metavar="DIR", help="compare with what this teacher said, stored")
    parser.add_argument(
        "--knn",
        action="store_true",
        help=f"classify by the {', '.join(map(str, probes.NEIGHBOURS))} nearest images of train",
    )
    parser.add_argument(
        "--linear-probe", action="store_true", help="train a linear classifier on the embeddings of train"
    )
    parser.add_argument("--seed", type=cli.NATURAL, default=0, help="fixes the probe's held-out part and order")
    parser.add_argument("--dataset", choices=list(DATASETS), help="dataset; by default the checkpoint's")
    parser.add_argument("--data-root", help="its folder or file; by default the checkpoint's, $DATA_ROOT or data/")
    parser.add_argument("--split", default="test", choices=SPLITS, help="part of the dataset")
    parser.add_argument(
        "--resolution", type=cli.POSITIVE, help="input side in pixels; by default the one it was trained at"
    )
    parser.add_argument("--teacher-resolution", type=cli.POSITIVE, help="the teacher's input side in pixels; likewise")
    parser.add_argument("--batch-size", type=cli.POSITIVE, default=128, help="images a step")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--amp", default="off", choices=("auto", "off", "bf16", "fp16"), help="mixed precision")
    parser.add_argument(
        "--output", default=OUTPUT, help="folder that is written; with --predict a file, by default predictions.csv"
    )
    parser.add_argument(
        "--predict",
        nargs="+",
        metavar="PATH",
        help="write the class probabilities of these images, and of all in these folders, as CSV; nothing is judged",
    )
    parser.add_argument("--overwrite", action="store_true", help="of --predict: replace the file")
    cli.add_reading_flags(parser)
    cli.add_positive_flag(parser)
    cli.add_text_flags(parser)
    parser.set_defaults(decode_size=None, window=None)  # the checkpoint's
    return parser


def live(path, loaders, classes, batch_size, resolution, device, precision):
    """(outputs {split: {"logits": {task: (N, C)}, "embedding": (N, D)}}, what it is, what it costs) of a checkpoint.

    loaders: {split: Loader}.  Logits of other classes than the data's are left out: "logits" is empty then.
    """
    checkpoint = load_checkpoint(path)
    model, preprocess = load_model(checkpoint, device, resolution, path)
    heads = (
        {task: logits_name(task) for task in tasks_of(classes)} if checkpoint["classes"] == classes else {}
    )  # a student without labels has none
    found = {}
    for split, loader in loaders.items():
        outs = outputs(model, loader, preprocess, precision, ("embedding", *heads.values()))
        found[split] = {"embedding": outs["embedding"], "logits": {task: outs[name] for task, name in heads.items()}}
    described = {
        "checkpoint": path,
        "sha256": file_sha256(path),
        "model": model.name,
        "family": model.family,
        "resolution": preprocess.resolution,
    }
    return found, described, cost(model, preprocess.resolution, batch_size, device, precision)


def stored(folder, data):
    """The same of stored embeddings, for the images of data {split: dataset or Store}, which are found by their ids."""
    stores = open_splits(folder, data)
    found = {}
    for split, samples in data.items():
        outs = stores[split].plain(samples.ids)
        found[split] = {"embedding": outs["embedding"], "logits": {TASK: outs["logits"]} if "logits" in outs else {}}
    meta = next(iter(stores.values())).meta
    teacher = meta["teacher"]
    described = {
        "checkpoint": folder,
        "sha256": teacher["sha256"],
        "model": teacher["name"],
        "family": teacher["family"],
        "resolution": meta["resolution"],
    }
    return found, described, {"parameters": teacher["parameters"]}


def read_data(args, wanted):
    """Splits with those that are wanted: the checkpoint's dataset, or another, or the stores themselves."""
    if os.path.isdir(args.checkpoint):
        stores = open_splits(args.checkpoint, wanted)
        meta = stores[args.split].meta
        return Splits(
            meta["dataset"], DATASETS[meta["dataset"]].domain, meta["classes"], **stores, positive=args.positive
        )
    checkpoint, reading = load_checkpoint(args.checkpoint), cli.split_flags(vars(args))
    try:
        splits = splits_of(checkpoint, args.dataset, args.data_root, args.split, **reading)
    except DataError:
        if "train" not in wanted or not checkpoint["classes"]:
            raise
        checkpoint["classes"] = []  # k-NN and the probe need no head: the data may have other classes
        splits = splits_of(checkpoint, args.dataset, args.data_root, args.split, **reading)
    if "train" in wanted:
        splits.train = splits_of(
            checkpoint, args.dataset, args.data_root, "train", **{**reading, "limit_train": None}
        ).train
    return splits


def probe(found, train, judged, split, splits, args, device):
    """{"knn": {k: metrics}, "linear_probe": metrics and the choice} of a model's embeddings; found: as `live` gives it.

    Metrics as in `task_metrics`; of several tasks the choice too is <task>_lr and so on.
    """
    result, votes, logits, chosen, classes = {}, {}, {}, {}, splits.classes
    x, features = (torch.from_numpy(found[name]["embedding"]).to(device) for name in ("train", split))
    for task, names in tasks_of(classes).items():
        y = torch.from_numpy(train.targets[task]).to(device)
        if args.knn:
            tiny = torch.finfo(
                torch.float32
            ).tiny  # a class without a vote: its logarithm stays finite, the loss would say nothing
            for k, share in probes.knn(x, y, features, len(names)).items():
                votes.setdefault(k, {})[task] = share.clamp(min=tiny).log().cpu().numpy()
        if args.linear_probe:
            held = torch.from_numpy(held_out(train, HELD_OUT, args.seed, STREAM_PROBE))
            own, choice = probes.linear_probe(x, y, held, features, len(names), seed=args.seed)
            logits[task] = own.cpu().numpy()
            chosen.update(
                {prefix + name: value for prefix in prefixes(classes, task) for name, value in choice.items()}
            )
    if args.knn:
        result["knn"] = {
            k: without_loss(task_metrics(of, judged.targets, positive=splits.positive)) for k, of in votes.items()
        }
    if args.linear_probe:
        result["linear_probe"] = {**task_metrics(logits, judged.targets, positive=splits.positive), **chosen}
    return result


def without_loss(found):
    return {name: None if name == "loss" or name.endswith("_loss") else value for name, value in found.items()}


def prefixes(classes, *tasks):
    """Of the names of these tasks' figures, by default all tasks': "" of the only one."""
    several = len(tasks_of(classes)) > 1
    return [f"{task}_" if several else "" for task in tasks or tasks_of(classes)]


def check_train(train, judged, classes, knn):
    """Say, once, what k-NN and the probe cannot do with this train."""
    cut = [str(k) for k in probes.NEIGHBOURS if k > len(train)]
    if cut and knn:
        note(f"train has {len(train)} images: k of {', '.join(cut)} is cut to that")
    for task, names in tasks_of(classes).items():
        lacking = [names[c] for c in np.setdiff1d(judged.targets[task], train.targets[task])]
        if lacking:
            of = "" if task == TASK else f" of the task {task}"
            note(
                f"train has no image of {', '.join(lacking[:5])}{of}, which --split has: k-NN and the probe "
                "cannot find it"
            )


def scores(found, classes):
    """{row: accuracy} of the model itself, k-NN and the probe; of several tasks their means, then each task's."""
    own, neighbours, probed = {}, {}, {}
    for prefix in dict.fromkeys(["", *prefixes(classes)]):
        own.update(
            {
                prefix + name: found[prefix + name]
                for name in ("accuracy", "balanced_accuracy")
                if prefix + name in found
            }
        )
        neighbours.update({f"{prefix}knn_{k}": of[f"{prefix}accuracy"] for k, of in found.get("knn", {}).items()})
        if "linear_probe" in found:
            probed[f"{prefix}linear_probe"] = found["linear_probe"][f"{prefix}accuracy"]
    return {**own, **neighbours, **probed}


def rows_of(found, classes):
    """{row of the table: value} of what `main` found of a model; recalls of up to 20 classes."""
    rows = {
        key: value
        for key, value in found.items()
        if key not in ("checkpoint", "sha256") and not isinstance(value, dict)
    }
    rows["of 100 M parameters"] = f"{100 * found['parameters'] / PARAMETERS:.1f} %"
    rows.update(scores(found, classes))
    for prefix in prefixes(classes) if "linear_probe" in found else ():
        rows.update(
            {
                f"{prefix}linear_probe {name}": f"{found['linear_probe'][prefix + name]:g}"
                for name in ("lr", "weight_decay")
            }
        )
    rows.update({f"kept {name}": f"{100 * share:.1f} %" for name, share in found.get("kept", {}).items()})
    recalls = found.get("class_recalls", {})
    return {**rows, **({f"recall {name}": recall for name, recall in recalls.items()} if len(recalls) <= 20 else {})}


def print_table(columns, classes):
    """columns: {title: what `main` found}; one line a metric, with its interval where there is one."""
    cells = {"": {title: f"{title:>14}" for title in columns}}
    for title, found in columns.items():
        for row, value in rows_of(found, classes).items():
            interval = found.get("intervals", {}).get(row)
            cells.setdefault(row, {})[title] = f"{shown(value):>14} {brackets(interval) if interval else ''}".rstrip()
    width = max(map(len, cells))
    widths = {
        title: max(29, *(len(of.get(title, "")) for of in cells.values())) for title in columns
    }  # a model's name may be long
    for row, of in cells.items():
        print(f"{row:{width}} {' '.join(of.get(title, '').ljust(widths[title]) for title in columns)}".rstrip())


def shown(value):
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 100 else f"{value:.4f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def check_flags(args):
    contradictions = [
        (
            args.teacher_checkpoint and args.teacher_embeddings,
            "--teacher-checkpoint and --teacher-embeddings contradict each other",
        ),
        (
            args.teacher_resolution and not args.teacher_checkpoint,
            "--teacher-resolution belongs to --teacher-checkpoint FILE",
        ),
        (args.overwrite, "--overwrite belongs to --predict: evaluation.json is always replaced"),
        (
            args.split == "train" and (args.knn or args.linear_probe),
            "--split train contradicts --knn and --linear-probe, which learn from train",
        ),
        (
            os.path.exists(os.path.join(args.output, "config.json")),
            f"--output {args.output} holds a run: name a folder of its own",
        ),
    ]
    if os.path.isdir(args.checkpoint):
        contradictions += [
            (
                getattr(args, name) is not None,
                f"--{name.replace('_', '-')} contradicts stored embeddings: {args.checkpoint} holds no images",
            )
            for name in ("dataset", "data_root", "resolution", "teacher_checkpoint")
        ]
    for wrong, text in contradictions:
        if wrong:
            raise cli.UserError(text)


def check_classes(args, classes):
    path = args.teacher_checkpoint or args.teacher_embeddings
    if path and not (args.teacher_checkpoint and (args.knn or args.linear_probe)):  # these two compare embeddings
        others = (
            open_splits(path, [args.split])[args.split].meta["classes"]
            if args.teacher_embeddings
            else load_checkpoint(path)["classes"]
        )
        if others and others != classes:
            raise cli.UserError(
                f"teacher and student have different classes: the teacher knows {in_words(others)}, the student "
                f"{in_words(classes)}"
            )


def main(args):
    if args.predict:
        check_predict_flags(build_parser())
        return predict_files(args, "predictions.csv" if args.output == OUTPUT else args.output)
    check_flags(args)
    device = select_device(args.device)
    precision = Precision(args.amp, device)
    wanted = [*(["train"] if args.knn or args.linear_probe else []), args.split]
    splits = read_data(args, wanted)
    data, classes = {split: getattr(splits, split) for split in wanted}, splits.classes
    for split, part in data.items():
        if min(labels.min() for labels in part.targets.values()) < 0:
            raise cli.UserError(
                f"{split} of {args.checkpoint} has images without labels (-1): nothing can be judged, nor k-NN or "
                "a probe be built"
            )
    check_classes(args, classes)
    dataset = data[args.split]
    if "train" in wanted:
        check_train(data["train"], dataset, classes, args.knn)
    is_live = {"teacher": bool(args.teacher_checkpoint), "student": os.path.isfile(args.checkpoint)}
    paths = {"teacher": args.teacher_checkpoint or args.teacher_embeddings, "student": args.checkpoint}
    sides = {"teacher": args.teacher_resolution, "student": args.resolution}
    loaders = (
        {k: Loader(part, args.batch_size, device, cache=args.cache, workers=args.workers) for k, part in data.items()}
        if any(is_live.values())
        else {}
    )
    found, judged = {}, {"student": None, "teacher": None}
    for role, path in paths.items():
        if not path:
            continue
        outs, described, costs = (
            live(path, loaders, classes, args.batch_size, sides[role], device, precision)
            if is_live[role]
            else stored(path, data)
        )
        logits = outs[args.split]["logits"]
        if not logits and "train" not in wanted:
            raise cli.UserError(
                f"{path} holds no logits of a trained head: give --knn or --linear-probe, which need none"
            )
        found[role] = outs
        own = task_metrics(logits, dataset.targets, positive=splits.positive) if logits else {}
        judged[role] = {**described, **own, **splits.positive_names(), **costs}
    student, teacher = judged["student"], judged["teacher"]
    logits, teacher_logits = (found.get(role, {}).get(args.split, {}).get("logits") for role in ("student", "teacher"))
    if logits and teacher_logits:
        student.update(
            task_metrics(logits, dataset.targets, teacher_logits, splits.positive)
        )  # with fidelity, behind what is there
    result = {
        "dataset": splits.describe(),
        "split": args.split,
        "student": student,
        "teacher": teacher,
        "peak_memory_mb": peak_memory_mb(device),
        "batch_size": args.batch_size,
        "amp": precision.name,
        "environment": cli.environment(device_name(device)),
    }
    for role in found:  # after the peak of memory was read
        if "train" in wanted:
            judged[role].update(probe(found[role], data["train"], dataset, args.split, splits, args, device))
        if found[role][args.split]["logits"]:
            judged[role].update(uncertainty(found[role][args.split]["logits"], dataset, splits))
    if teacher:
        reference = scores(teacher, classes)
        student["kept"] = {
            name: value / reference[name] for name, value in scores(student, classes).items() if reference.get(name)
        }
    if distributed.rank():
        return  # of several processes the first one writes
    os.makedirs(args.output, exist_ok=True)
    cli.write_json(os.path.join(args.output, "evaluation.json"), result)
    if logits:
        write_predictions(args.output, args.split, dataset, logits, splits)
    print(
        f"{splits}; {args.split} split, {device_name(device)}, batch {args.batch_size}, peak memory "
        f"{result['peak_memory_mb']:,.0f} MB"
    )
    print_table({"student" if teacher else "model": student, **({"teacher": teacher} if teacher else {})}, classes)
    print(os.path.join(args.output, "evaluation.json"))


if __name__ == "__main__":
    cli.run_script(main, build_parser)
