"""Judge a checkpoint: metrics, cost, and how it follows its teacher.

    python evaluate.py runs/distill/best.pth
    python evaluate.py runs/distill/best.pth --teacher-checkpoint runs/teacher/best.pth
    python evaluate.py runs/student/best.pth --dataset imagefolder --data-root outside --split test

A checkpoint knows its model, classes, preprocessing and dataset; flags name another dataset with the same classes.
Writes evaluation.json, predictions and the confusion matrix, and prints a table.
Needs from common: augment.py, cli.py, data.py, dermatology.py, distributed.py, evaluation.py, images.py, loader.py,
metrics.py, models.py, splitting.py, tables.py, training.py.
Packages: torch, timm, numpy, pillow, scikit-learn, tqdm (torchvision for CIFAR, transformers for hf: names).
"""

import os
import time

import torch

from common import cli, metrics
from common.data import DATASETS
from common.evaluation import brackets, predict, splits_of, uncertainty, write_predictions
from common.loader import Loader
from common.models import multiply_adds
from common.training import (
    Precision,
    device_name,
    file_sha256,
    load_checkpoint,
    load_model,
    peak_memory_mb,
    select_device,
)


def build_parser():
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoint", help="best.pth, latest.pth or epoch_N.pth of a run")
    parser.add_argument("--teacher-checkpoint", metavar="FILE", help="compare with this teacher")
    parser.add_argument("--dataset", choices=list(DATASETS), help="dataset; by default the checkpoint's")
    parser.add_argument("--data-root", help="its folder or file; by default the checkpoint's, $DATA_ROOT or data/")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="part of the dataset")
    parser.add_argument("--resolution", type=cli.POSITIVE, help="input side in pixels; by default the one it was trained at")
    parser.add_argument("--teacher-resolution", type=cli.POSITIVE, help="the teacher's input side in pixels; likewise")
    parser.add_argument("--batch-size", type=cli.POSITIVE, default=128, help="images a step")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--amp", default="off", choices=("auto", "off", "bf16", "fp16"), help="mixed precision")
    parser.add_argument("--output", default="runs/evaluate", help="folder that is written")
    cli.add_reading_flags(parser)
    parser.set_defaults(decode_size=None, window=None)  # the checkpoint's
    return parser


def timed(run, device, at_least=1.0, most=200):
    """Median seconds of run(), after two warm-up calls."""
    seconds, began = [], None
    for i in range(2 + most):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 2:
            began = began or start
            seconds.append(time.perf_counter() - start)
            if time.perf_counter() - began > at_least and len(seconds) >= 3:
                break
    return sorted(seconds)[len(seconds) // 2]


def cost(model, resolution, batch_size, device, precision):
    """Size and speed of a model: parameters, multiply-adds of one image, images/s at batch_size, latency at batch 1."""

    @torch.no_grad()
    def forward(count):
        images = torch.rand(count, 3, resolution, resolution, device=device).contiguous(memory_format=torch.channels_last)

        def run():
            with torch.no_grad(), precision.autocast():
                model({"image": images})

        return run

    return {
        "parameters": model.num_parameters,
        "multiply_adds": multiply_adds(model, resolution),
        "images_per_second": round(batch_size / timed(forward(batch_size), device), 1),
        "latency_ms": round(1000 * timed(forward(1), device), 3),
    }


def judge(path, loader, args, resolution, device, precision):
    """(logits, dict) of one checkpoint on a loader."""
    checkpoint = load_checkpoint(path)
    model, preprocess = load_model(checkpoint, device, resolution, path)
    logits = predict(model, loader, preprocess, precision)
    described = {
        "checkpoint": path, "sha256": file_sha256(path), "model": model.name, "family": model.family,
        "resolution": preprocess.resolution, **metrics.classification(logits, loader.dataset.labels),
        **cost(model, preprocess.resolution, args.batch_size, device, precision),
    }  # fmt: skip
    return logits, described


def print_table(columns):
    """columns: {title: what `main` found}; one line a metric, with its interval, and one a class's recall, of up to 20 classes."""
    hidden, cells = ("checkpoint", "sha256", "intervals", "class_recalls"), {}
    for title, found in columns.items():
        recalls = {f"recall {name}": recall for name, recall in found["class_recalls"].items() if len(found["class_recalls"]) <= 20}
        for row, value in {**{key: value for key, value in found.items() if key not in hidden}, **recalls}.items():
            interval = found["intervals"].get(row)
            cells.setdefault(row, {})[title] = f"{shown(value):>14} {brackets(interval) if interval else '':14}"
    width = max(map(len, cells))
    cells = {"": {title: f"{title:>14}{' ' * 15}" for title in columns}, **cells}
    for row, of in cells.items():
        print(f"{row:{width}} {' '.join(of.get(title, ' ' * 29) for title in columns)}".rstrip())


def shown(value):
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 100 else f"{value:.4f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main(args):
    if os.path.exists(os.path.join(args.output, "config.json")):
        raise cli.UserError(f"--output {args.output} holds a run: name a folder of its own")
    device = select_device(args.device)
    precision = Precision(args.amp, device)
    checkpoint = load_checkpoint(args.checkpoint)
    splits = splits_of(checkpoint, args.dataset, args.data_root, args.split, **cli.split_flags(vars(args)))
    dataset = getattr(splits, args.split)
    loader = Loader(dataset, args.batch_size, device, cache=args.cache, workers=args.workers)
    teacher_logits = teacher = None
    if args.teacher_checkpoint:
        classes = load_checkpoint(args.teacher_checkpoint)["classes"]
        if classes != checkpoint["classes"]:
            raise cli.UserError(f"teacher and student have different classes: {len(classes)} ({', '.join(classes[:4])}, ...) "
                                f"and {len(checkpoint['classes'])} ({', '.join(checkpoint['classes'][:4])}, ...)")  # fmt: skip
        teacher_logits, teacher = judge(args.teacher_checkpoint, loader, args, args.teacher_resolution, device, precision)
    logits, student = judge(args.checkpoint, loader, args, args.resolution, device, precision)
    if teacher:
        student.update(metrics.fidelity(logits, teacher_logits, dataset.labels))
    result = {
        "dataset": splits.describe(), "split": args.split, "student": student, "teacher": teacher,
        "peak_memory_mb": peak_memory_mb(device), "batch_size": args.batch_size, "amp": precision.name,
        "environment": cli.environment(device_name(device)),
    }  # fmt: skip
    for judged, found in ((student, logits), (teacher, teacher_logits)):  # after the peak of memory was read
        if judged:
            judged.update(uncertainty(found, dataset, splits.classes))
    os.makedirs(args.output, exist_ok=True)
    cli.write_json(os.path.join(args.output, "evaluation.json"), result)
    write_predictions(args.output, args.split, dataset, logits, splits.classes)
    print(f"{splits}; {args.split} split, {device_name(device)}, batch {args.batch_size}, peak memory {result['peak_memory_mb']:,.0f} MB")
    table = {"student" if teacher else "model": student, **({"teacher": teacher} if teacher else {})}
    print_table(table)
    print(os.path.join(args.output, "evaluation.json"))


if __name__ == "__main__":
    cli.run_script(main, build_parser)
