"""Train the large model, which will teach.

    python train_teacher.py
    python train_teacher.py --dataset cifar10 --data-root data --download --epochs 300 --batch-size 128 --lr 0.1 \\
        --schedule multistep --milestones 150 225 275
    python train_teacher.py --resume runs/teacher

Writes the run folder: best.pth, latest.pth, metrics.csv, metrics.json, results.json, predictions, confusion matrices.
Needs from common: augment.py, cli.py, data.py, dermatology.py, distributed.py, dry_run.py, evaluation.py, images.py,
loader.py, losses.py, metrics.py, models.py, optimizer.py, splitting.py, tables.py, training.py.
Models and datasets of images and texts need image_text.py and multimodal.py too.
Packages: torch, timm, numpy, pillow, scikit-learn, tqdm (torchvision for CIFAR, transformers for hf: names and texts,
h5py for ISIC 2024, opencv-python-headless for --hair-removal).
"""

import torch

from common import cli, dry_run
from common.augment import Augmenter
from common.data import DATASETS, load_splits
from common.evaluation import predict, task_metrics, write_results
from common.images import tasks_of
from common.loader import Loader, save_sample_grid
from common.losses import task_accuracy, task_class_weights, task_cross_entropy
from common.optimizer import make_updater
from common.training import (
    Interrupts,
    Precision,
    Preprocess,
    Recorder,
    check_normalization,
    select_device,
    start_model,
    use_compile,
)


def build_parser():
    parser = cli.Parser(__doc__)
    cli.add_run_flags(parser, output="runs/teacher")
    cli.add_data_flags(parser, batch_size=64)
    cli.add_augment_flags(parser)
    cli.add_model_flags(parser, model="resnet18")
    cli.add_image_text_flags(parser, text_model="bert-mini-scratch")
    cli.add_training_flags(parser, epochs=10)
    return parser


def main(args):
    interrupts = Interrupts()
    run = cli.RunFolder(args.output, bool(args.resume), args.overwrite, cli.is_dry(args))
    device = select_device(args.device)
    precision = Precision(args.amp, device)

    # data
    info = DATASETS[args.dataset]
    resolution = args.resolution or info.resolution
    policy = cli.augment_policy(args)
    augment = Augmenter(policy, args.seed)
    splits = load_splits(
        args.dataset, cli.data_root(args.data_root), download=args.download, **cli.split_flags(vars(args))
    )
    balanced = cli.balanced_classes(args, tasks_of(splits.classes))
    train = Loader(
        splits.train,
        args.batch_size,
        device,
        True,
        args.seed,
        args.cache,
        args.workers,
        args.accumulation_steps,
        balanced,
    )
    val = Loader(splits.val, args.batch_size, device, cache=args.cache, workers=args.workers)

    # model, optimizer
    model, weights_from = start_model(args, splits.classes, resolution, getattr(splits.train, "texts", None))
    preprocess = Preprocess.of_new(model, resolution, args.dataset, info)
    preprocess.prepare(splits.train, splits.val)  # texts become numbers once
    check_normalization(model, resolution, train.rows_at_once)
    model.to(device).to(memory_format=torch.channels_last)
    if use_compile(args.compile, device):
        model.compile()
    updater = make_updater(args, model, precision, len(train))
    tasks = tasks_of(splits.classes)
    weights = task_class_weights(
        args.class_weights, splits.train.targets, {task: len(names) for task, names in tasks.items()}
    )
    task_weights = cli.task_weights(args, tasks)

    if cli.is_dry(args):
        return dry_run.show(args, run, splits, [train, val], updater, preprocess, splits.classes, weights_from)

    # run folder
    recorder = Recorder(
        run,
        updater,
        interrupts,
        epochs=args.epochs,
        metric=args.select_metric,
        patience=args.patience,
        save_every=args.save_every,
        content={
            "role": "teacher",
            "classes": splits.classes,
            "positive": splits.positive,
            "preprocess": preprocess.to_dict(),
            "data": splits.describe(),
            "augment": policy.to_dict(),
            "flags": vars(args),
        },
    )
    recorder.open(args)
    run.log(f"{model.name}: {model.num_parameters:,} parameters, {resolution} px, {device}, {precision.name}")
    run.log(f"normalization: {preprocess}")
    run.log(f"{splits}, {train.cache_kind} cache")
    if weights_from:
        run.log(weights_from)
    if args.save_samples:
        save_sample_grid(args.save_samples, [augment(next(train.batches(1)), resolution)])

    with recorder.saving_when_interrupted():
        for _ in recorder.epochs():
            model.train()
            for batch in recorder.batches(train):
                inputs = preprocess.inputs(
                    batch, augment(batch, resolution)
                )  # "image" (B, 3, R, R), and of texts "input_ids" (B, L)
                targets = batch["targets"]  # {task: (B,)}
                with precision.autocast():
                    out = updater.parallel(inputs)  # "logits" (B, C), or "logits_<task>"
                    loss = task_cross_entropy(
                        out, targets, args.label_smoothing, weights, batch["batch_targets"], task_weights
                    )
                updater(loss)
                recorder.meter.add(loss=loss, accuracy=task_accuracy(out, targets))
            logits = predict(updater.evaluated_model, val, preprocess, precision, interrupts)  # {task: (N, C)}
            recorder.end_epoch(task_metrics(logits, splits.val.targets, positive=splits.positive))

        test = Loader(splits.test, args.batch_size, device, cache=args.cache, workers=args.workers)
        write_results(
            run, splits, {"val": val, "test": test}, recorder, preprocess, precision, script="train_teacher.py"
        )


if __name__ == "__main__":
    cli.run_script(main, build_parser)
