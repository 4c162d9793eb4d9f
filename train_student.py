"""Train the small model alone: the baseline that distillation has to beat.

    python train_student.py
    python train_student.py --dataset cifar10 --data-root data --download --epochs 200 --batch-size 128 --lr 0.1 \\
        --schedule multistep --milestones 100 150 180
    python train_student.py --resume runs/student

Writes the run folder: best.pth, latest.pth, metrics.csv, metrics.json, results.json, predictions, confusion matrices.

Files of common: augment, cli, data, loader, metrics, models, run, training; medical for tables, skin lesions
and MedMNIST, groups for patients and --folds, custom for your own model and data, weights for --weights and
--init-checkpoint, image_text, multimodal, medical and groups for images with texts, hugging_face for hf: models, sweep
for --seeds and --sweep, dry_run for --dry-run, distributed for torchrun and srun, dicom for DICOM files, tensorboard
for --tensorboard.
Packages: torch, timm, numpy, pillow, scikit-learn, tqdm (torchvision for CIFAR, transformers for hf: names and texts,
h5py for ISIC 2024, opencv-python-headless for --hair-removal).
"""

from common import cli

with cli.torch_later():
    from common.augment import Augmenter
    from common.data import DATASETS, dataset_info, load_splits, split_options, tasks_of
    from common.loader import Loader, save_sample_grid
    from common.run import Recorder, RunFolder, optional

ROLE, TEXT_MODEL = "student", "bert-tiny-scratch"


def build_parser():
    parser = cli.Parser(__doc__)
    cli.add_run_flags(parser, output=f"runs/{ROLE}")
    cli.add_data_flags(parser, DATASETS)
    cli.add_augment_flags(parser)
    cli.add_model_flags(parser)
    cli.add_image_text_flags(parser, TEXT_MODEL)
    cli.add_training_flags(parser)
    return parser


if __name__ == "__main__":
    cli.check_command_line(build_parser)

# what loads torch
from common.training import (
    Precision,
    Preprocess,
    Schedule,
    Updater,
    check_mixing,
    check_normalization,
    make_optimizer,
    model_starter,
    place,
    predict_logits,
    run_content,
    select_device,
    start_lines,
    task_accuracy,
    task_class_weights,
    task_cross_entropy,
    task_metrics,
    write_results,
)


def read_data(args, device):
    """(Splits, Loader of train, Loader of val)"""
    root, options = cli.data_root(args.data_root), split_options(vars(args))
    splits = load_splits(args.dataset, root, download=args.download, **options)
    balanced = cli.balanced_classes(args.sampler, tasks_of(splits.classes))
    parts, reading = args.accumulation_steps, {"cache": args.cache, "workers": args.workers}
    train = Loader(
        splits.train, args.batch_size, device, True, args.seed, accumulate=parts, balanced=balanced, **reading
    )
    return splits, train, Loader(splits.val, args.batch_size, device, **reading)


def main(args):
    info = dataset_info(args.dataset)
    args = cli.fill_defaults(vars(args), info.defaults(ROLE, args.optimizer))
    flags, resolution, policy = vars(args), args.resolution, cli.augment_policy(vars(args), info.policy)
    check_mixing(policy, args.dataset)
    run = RunFolder(args.output, bool(args.resume), args.overwrite, args.dry_run)
    precision = Precision(args.amp, select_device(args.device))

    # data
    augment = Augmenter(policy, args.seed)
    splits, train, val = read_data(args, precision.device)
    tasks = tasks_of(splits.classes)

    # model and optimizer
    texts = getattr(splits.train, "texts", None)
    start = model_starter(texts)
    model, weights_from = start(splits.classes, resolution, texts, **cli.options(start, flags))
    preprocess = Preprocess.for_model(model, resolution, args.dataset, info, policy.crop_mode)
    preprocess.prepare(splits.train, splits.val)  # texts become numbers once
    check_normalization(model, resolution, train.rows_at_once)
    place(model, precision.device, args.compile)
    optimizer = make_optimizer(model, **cli.options(make_optimizer, flags))
    schedule = Schedule(optimizer.defaults["lr"], len(train), **cli.options(Schedule, flags))
    updater = Updater(model, optimizer, schedule, precision, **cli.options(Updater, flags))

    # loss: the cross-entropy, a mean over tasks
    sizes = {task: len(names) for task, names in tasks.items()}
    class_weights = task_class_weights(args.class_weights, splits.train.targets, sizes)
    task_weights = cli.task_weights(args.task_weights, tasks)

    # run folder
    content = run_content(ROLE, splits, preprocess, policy, flags)
    recorder = Recorder(run, updater, content=content, **cli.options(Recorder, flags))
    if args.dry_run:
        dry_run = optional("common.dry_run", "--dry-run")
        return dry_run.show(recorder, splits, [train, val], preprocess, weights_from, args.save_samples)
    recorder.open(flags, args.seed)
    run.log("\n".join(start_lines(model, preprocess, splits, train, precision, weights_from)))
    if args.save_samples:
        save_sample_grid(args.save_samples, [augment(next(train.batches(1, plan=augment.plan)), resolution)])

    with recorder:
        for epoch in range(recorder.start_epoch, args.epochs + 1):
            model.train()
            for batch in recorder.batches(train, epoch, augment.plan):
                inputs = preprocess.inputs(batch, augment(batch, resolution))  # "image" (B, 3, R, R), "input_ids"
                targets, whole = batch["targets"], batch["batch_targets"]  # {task: (B,)}
                with precision.autocast():
                    out = updater.parallel(inputs)  # "logits" (B, C), or "logits_<task>"
                    loss = task_cross_entropy(out, targets, args.label_smoothing, class_weights, whole, task_weights)
                updater(loss)
                recorder.meter.add(loss=loss, accuracy=task_accuracy(out, targets))
            logits = predict_logits(updater.evaluated_model, val, preprocess, precision)  # {task: (N, C)}
            recorder.end_epoch(task_metrics(logits, splits.val.targets, positive=splits.positive))
            if recorder.stopped_early:
                break

    test = Loader(splits.test, args.batch_size, precision.device, cache=args.cache, workers=args.workers)
    write_results(recorder, splits, {"val": val, "test": test}, preprocess, script=f"train_{ROLE}.py")


if __name__ == "__main__":
    cli.run_script(main, build_parser)
