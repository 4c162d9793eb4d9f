"""Train the small model, taught by a large one.

    python distill.py                                         # teacher: runs/teacher/best.pth
    python distill.py --teacher-checkpoint runs/teacher/best.pth --method feature --teacher-layer layer3 \\
        --student-layer layer3
    python distill.py --teacher-model timm:resnet50 --teacher-weights FILE --dataset imagefolder --data-root DIR
    python distill.py --teacher-embeddings embeddings --method embedding     # of extract_embeddings.py: no teacher is run
    python distill.py --resume runs/distill

The teacher is frozen and judged on val before training.  Writes the run folder as train_student.py does.
Needs from common: augment.py, cli.py, data.py, dermatology.py, distributed.py, embeddings.py, evaluation.py, images.py,
loader.py, losses.py, metrics.py, models.py, optimizer.py, splitting.py, tables.py, training.py.
Packages: torch, timm, numpy, pillow, scikit-learn, tqdm (torchvision for CIFAR, transformers for hf: names).
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from common import cli
from common.augment import Augmenter, Policy
from common.data import DATASETS, load_splits
from common.embeddings import Store, StoredTeacher, difference, split_folder
from common.evaluation import distillation_loss, is_chance_level, live_teacher, predict, write_results
from common.images import TASK
from common.loader import Loader, save_sample_grid
from common.losses import FEATURE_LOSSES, METHODS, TEACHER_PROJECTORS, DistillationLoss, class_weights, method_weights
from common.metrics import CLASSIFICATION, FIDELITY, classification, fidelity
from common.models import build_model
from common.optimizer import make_updater
from common.training import (
    Interrupts,
    Precision,
    Preprocess,
    Recorder,
    file_sha256,
    load_checkpoint,
    load_model,
    select_device,
    start_model,
    start_weights,
    use_compile,
)

DEFAULT_TEACHER = "runs/teacher/best.pth"


def build_parser():
    parser = cli.Parser(__doc__)
    cli.add_run_flags(parser, output="runs/distill")
    cli.add_data_flags(parser, dataset=None)
    cli.add_augment_flags(parser)
    cli.add_model_flags(parser, model="resnet8")
    cli.add_training_flags(parser, epochs=32, select=(*CLASSIFICATION, *FIDELITY, "distillation_loss"))
    parser.set_defaults(optimizer=None, select_metric=None)  # the method's, see settle
    g = parser.add_argument_group("teacher")
    g.add_argument("--teacher-checkpoint", metavar="FILE", help=f"a checkpoint of these scripts ({DEFAULT_TEACHER})")
    g.add_argument("--teacher-model", metavar="NAME", help="a model by name, as --model, with --teacher-pretrained or --teacher-weights")
    g.add_argument("--teacher-pretrained", action="store_true", help="the hub's weights for --teacher-model")
    g.add_argument("--teacher-weights", metavar="FILE", help="a foreign state dict for --teacher-model, strictly")
    g.add_argument("--teacher-embeddings", metavar="DIR", help="what extract_embeddings.py stored, in place of a teacher; the student sees the stored views")
    g.add_argument("--num-views", type=cli.POSITIVE, metavar="K", help="use the first K stored views; by default all")
    g.add_argument("--teacher-resolution", type=cli.POSITIVE, help="the teacher's input side in pixels; by default the one it was trained at")
    g.add_argument("--allow-weak-teacher", action="store_true", help="go on with a teacher that is no better than chance on val")
    g = parser.add_argument_group("distillation")
    g.add_argument("--method", default="response", choices=list(METHODS), help="published combination; sets the weights below")
    g.add_argument("--alpha", type=float, help="response, feature: alpha * cross-entropy + (1 - alpha) * T^2 * KL; feature_matching: "
                   "(1 - alpha) * cross-entropy + alpha * features (0.5)")  # fmt: skip
    g.add_argument("--temperature", type=float, default=4.0, help="T of the KL")
    g.add_argument("--ce-weight", type=float, help="of the cross-entropy; by default the method's")
    g.add_argument("--kl-weight", type=float, help="of T^2 * KL(teacher || student); by default the method's")
    g.add_argument("--feature-weight", type=float, help="of the feature loss; by default the method's")
    g.add_argument("--feature-loss", default="mse", choices=FEATURE_LOSSES, help="on projected and pooled maps")
    g.add_argument("--student-layer", nargs="+", default=[], metavar="PATH", help="module paths of the student's features, as layer3, layers.2 or blocks.5")
    g.add_argument("--teacher-layer", nargs="+", default=[], metavar="PATH", help="module paths of the teacher's features, paired in order")
    g.add_argument("--embedding-weight", type=float, help="of the embedding loss; by default the method's")
    g.add_argument("--lambda-feat", type=cli.AMOUNT, default=1.0, help="of the squared error, summed over dimensions, in the embedding loss")
    g.add_argument("--lambda-cos", type=cli.AMOUNT, default=1.0, help="of 1 - cosine in the embedding loss")
    g.add_argument("--shared-dim", type=cli.POSITIVE, help="width of the space of the embedding loss; by default the teacher's")
    g.add_argument("--teacher-projector", default="identity", choices=TEACHER_PROJECTORS, help="of the embedding loss; a learned one may collapse")
    g.add_argument("--pooling", choices=("cls", "mean", "map"), help="what is the student's embedding; by default what its head takes")
    g.add_argument("--projector-weight-decay", type=cli.AMOUNT, default=0.0, help="of the projectors' matrices")
    return parser


class Student(torch.nn.Module):
    """Model and loss in one module: so DDP averages the gradients of the projectors too."""

    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, inputs, taught, labels, batch_labels):
        out = self.model(inputs)
        return out, self.criterion(out, taught, labels, batch_labels)


class Source(NamedTuple):
    """What teaches: a frozen model or what one has left in a store.  Nothing that follows asks which."""

    targets: Callable  # (batch, split) -> {"logits": (B, C), "embedding": (B, D), "features": {layer: (B, C_l, H_l, W_l)}}
    choose_view: Callable  # batch -> the batch with the views that are shown
    logits: Callable  # (split, loader) -> (N, C) of the plain images, or None
    resolution: int  # the teacher's input side in pixels
    title: str
    described: dict  # for results.json


def settle(args):
    """The loss's weights {term: float}; defaults that depend on the method are filled in."""
    weights = method_weights(
        args.method, args.alpha, ce=args.ce_weight, kl=args.kl_weight, feature=args.feature_weight,
        embedding=args.embedding_weight,
    )  # fmt: skip
    if not weights["feature"] and (args.student_layer or args.teacher_layer):
        raise cli.UserError(f"--student-layer and --teacher-layer with --method {args.method}: its feature weight is 0")
    # a squared error summed over hundreds of dimensions diverges with SGD's rate
    args.optimizer = args.optimizer or ("adamw" if weights["embedding"] else "sgd")
    # without cross-entropy and KL nothing trains the logits
    args.select_metric = args.select_metric or ("accuracy" if weights["ce"] or weights["kl"] else "distillation_loss")
    return weights


def teacher_checkpoint(args):
    """(path, checkpoint) of the teacher, or (None, None) where it is a --teacher-model."""
    if args.teacher_model:
        if args.teacher_checkpoint:
            raise cli.UserError("--teacher-model and --teacher-checkpoint contradict each other: give one of them")
        if not args.teacher_pretrained and not args.teacher_weights:
            raise cli.UserError("--teacher-model needs --teacher-pretrained or --teacher-weights FILE")
        return None, None
    if args.teacher_pretrained or args.teacher_weights:
        raise cli.UserError("--teacher-pretrained and --teacher-weights need --teacher-model NAME")
    path = args.teacher_checkpoint or DEFAULT_TEACHER
    if not args.teacher_checkpoint and not os.path.exists(path):
        raise cli.UserError(f"no --teacher-checkpoint, and {path} is missing: python train_teacher.py makes it")
    return path, load_checkpoint(path)


def take_dataset_from(checkpoint, args):
    """Settle --dataset, --data-root and --limit-train where they are not given."""
    taught = checkpoint["flags"] if checkpoint else {"dataset": "digits", "data_root": None}
    args.dataset = args.dataset or taught["dataset"]
    if args.dataset == taught["dataset"]:
        args.data_root = args.data_root or taught["data_root"]
        cli.take_split_flags(args, taught)
    if args.limit_train is None:
        args.limit_train = DATASETS[args.dataset].student_images


def open_stores(args):
    """{split: Store} of --teacher-embeddings, or None; the run's data are the store's, other flags are refused."""
    if not args.teacher_embeddings:
        if args.num_views:
            raise cli.UserError("--num-views needs --teacher-embeddings DIR")
        return None
    for name in ("teacher_checkpoint", "teacher_model", "teacher_resolution", *Policy.__dataclass_fields__, "augment", "no_augment"):
        if getattr(args, name) not in (None, False):
            flag = "--" + name.replace("_", "-")
            raise cli.UserError(f"{flag} and --teacher-embeddings contradict each other: teacher and views are the stored ones")
    stores = {split: Store(split_folder(args.teacher_embeddings, split)) for split in ("train", "val", "test")}
    meta = stores["train"].meta
    for store in stores.values():
        differs = difference({**store.meta, **{key: meta[key] for key in ("split", "sha256", "count")}}, meta)
        if differs:
            raise cli.UserError(f"{store.folder} and {stores['train'].folder} are of different extractions ({differs})")
    defaults = {"split_seed": 0, "decode_size": 512}
    for name in ("dataset", *cli.STORED_FLAGS):
        if getattr(args, name) not in (None, False, defaults.get(name), meta[name]):
            raise cli.UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: the embeddings were made with {meta[name]}")
        setattr(args, name, meta[name])
    args.data_root = args.data_root or meta.get("data_root")
    return stores


def stored_source(args, stores, splits, weights):
    """Source of --teacher-embeddings."""
    if weights["feature"]:
        raise cli.UserError(f"--teacher-embeddings hold no feature maps: --method {args.method} needs a teacher, or --feature-weight 0")
    wanted = [name for name, term in (("embeddings", "embedding"), ("logits", "kl")) if weights[term]]
    datasets = {"train": splits.train, "val": splits.val, "test": splits.test}
    meta = stores["train"].meta
    kept = {key: meta["teacher"][key] for key in ("name", "family", "parameters", "checkpoint", "sha256")}
    stored = StoredTeacher(stores, datasets, wanted, args.num_views, args.seed)
    described = {**kept, "embeddings": args.teacher_embeddings, "num_views": stored.num_views, "resolution": meta["resolution"]}
    title = f"teacher {kept['name']}: {kept['parameters']:,} parameters, {meta['resolution']} px, {stored.num_views} stored views"
    return Source(stored.targets, stored.choose_view, lambda split, loader: stored.logits(split), meta["resolution"], title, described)


def load_teacher(args, path, checkpoint, classes, resolution, info):
    """(model, Preprocess, dict for results.json); the model on the CPU."""
    if checkpoint is None:
        side = args.teacher_resolution or resolution
        teacher = build_model(args.teacher_model, len(classes), side, pretrained=args.teacher_pretrained)
        start_weights(teacher, args.teacher_weights)
        preprocess = Preprocess(side, teacher.mean or info.mean, teacher.std or info.std)
        sha = file_sha256(args.teacher_weights) if args.teacher_weights else None
    else:
        if checkpoint["classes"] != classes:
            raise cli.UserError(f"teacher and data have different classes: {path} knows {len(checkpoint['classes'])} "
                                f"({', '.join(checkpoint['classes'][:4])}, ...), {args.dataset} has {len(classes)} "
                                f"({', '.join(classes[:4])}, ...)")  # fmt: skip
        teacher, preprocess = load_model(checkpoint, resolution=args.teacher_resolution, path=path)
        sha = file_sha256(path)
    described = {"name": teacher.name, "family": teacher.family, "parameters": teacher.num_parameters, "checkpoint": path, "sha256": sha}
    return teacher, preprocess, described


def live_source(args, path, checkpoint, splits, resolution, augment, precision, interrupts):
    """Source of a teacher that is run."""
    teacher, preprocess, described = load_teacher(args, path, checkpoint, splits.classes, resolution, DATASETS[args.dataset])
    teacher.set_feature_layers(args.teacher_layer)
    teacher.to(precision.device).to(memory_format=torch.channels_last)
    targets = live_teacher(teacher, preprocess, augment, precision)
    if use_compile(args.compile, precision.device):
        teacher.compile()
    title = f"teacher {described['name']}: {described['parameters']:,} parameters, {preprocess.resolution} px"
    return Source(lambda batch, split="train": targets(batch), lambda batch: batch,
                  lambda split, loader: predict(teacher, loader, preprocess, precision, interrupts), preprocess.resolution, title, described)  # fmt: skip


def judge_teacher(source, logits, splits, args):
    """Note the teacher's val metrics and refuse one at chance level; returns a line for the log."""
    if logits is None:
        return f"{source.title}; its logits are not stored, so it is not judged"
    source.described["val"] = classification(logits, splits.val.labels)
    check_teacher(source.described["val"]["balanced_accuracy"], len(splits.classes), splits.val.labels, args.allow_weak_teacher)
    return f"{source.title}, val accuracy {source.described['val']['accuracy']:.4f}"


def make_loss(args, weights, model, source, train, shown, classes):
    """DistillationLoss with its projectors, made from a dry batch before the optimizer sees the parameters."""
    class_weight = class_weights(args.class_weights, train.dataset.labels, len(classes))
    embedding = {"shared_dim": args.shared_dim, "teacher": args.teacher_projector,
                 "lambda_feat": args.lambda_feat, "lambda_cos": args.lambda_cos}  # fmt: skip
    criterion = DistillationLoss(weights, args.temperature, args.feature_loss, args.label_smoothing, class_weight, embedding)
    dry = source.choose_view(next(train.batches()))
    with torch.no_grad():
        criterion.build(model.eval()({"image": shown(dry)}), source.targets(dry))
    return criterion


def check_teacher(balanced_accuracy, num_classes, labels, allow_weak):
    """Refuse a teacher that is no better than chance on val."""
    if is_chance_level(balanced_accuracy, num_classes, labels) and not allow_weak:
        raise cli.UserError(
            f"the teacher is no better than chance on val (balanced accuracy {balanced_accuracy:.4f}): wrong checkpoint, "
            "classes or preprocessing? --allow-weak-teacher goes on"
        )


def differences(checkpoint, args):
    """Notes on a teacher of the same dataset that was trained with another val split."""
    taught = checkpoint["flags"] if checkpoint else {}
    for name in ("val_split", "split_seed", "folds", "fold"):
        if taught.get("dataset") == args.dataset and taught.get(name) != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            yield f"note: the teacher was trained with another {flag} ({taught.get(name)}): it may know val images"


def main(args):
    interrupts = Interrupts()
    run = cli.RunFolder(args.output, bool(args.resume), args.overwrite)
    device = select_device(args.device)
    precision = Precision(args.amp, device)
    weights = settle(args)

    # data: the teacher's dataset where none is named
    stores = open_stores(args)
    teacher_path, checkpoint = (None, None) if stores else teacher_checkpoint(args)
    take_dataset_from(checkpoint, args)
    info = DATASETS[args.dataset]
    resolution = args.resolution or info.resolution
    policy = stores["train"].policy if stores else cli.augment_policy(args)
    augment = Augmenter(policy, stores["train"].seed if stores else args.seed)
    splits = load_splits(args.dataset, cli.data_root(args.data_root), download=args.download, **cli.split_flags(vars(args)))
    balanced = len(splits.classes) if args.sampler == "balanced" else 0
    train = Loader(splits.train, args.batch_size, device, True, args.seed, args.cache, args.workers, args.accumulation_steps, balanced)
    val = Loader(splits.val, args.batch_size, device, cache=args.cache, workers=args.workers)

    # teacher and student; the student starts from the weights that train_student.py has for this seed
    if stores:
        source = stored_source(args, stores, splits, weights)
    else:
        source = live_source(args, teacher_path, checkpoint, splits, resolution, augment, precision, interrupts)
    model, weights_from = start_model(args, len(splits.classes), resolution)
    preprocess = Preprocess(resolution, model.mean or info.mean, model.std or info.std)
    model.set_pooling(args.pooling or model.pooling)
    model.set_feature_layers(args.student_layer)
    model.to(device).to(memory_format=torch.channels_last)

    # loss, optimizer
    criterion = make_loss(args, weights, model, source, train, lambda batch: preprocess(augment(batch, resolution)), splits.classes)
    if use_compile(args.compile, device):
        model.compile()
    updater = make_updater(args, model, precision, len(train), criterion, Student(model, criterion), not weights["ce"] and not weights["kl"])

    # the teacher is judged before it teaches; val images are plain, so its logits there are computed once
    teacher_logits = {"val": source.logits("val", val)}
    run.log(judge_teacher(source, teacher_logits["val"], splits, args))
    for note in differences(checkpoint, args):
        run.log(note)

    # run folder
    recorder = Recorder(
        run, updater, interrupts, epochs=args.epochs, metric=args.select_metric, patience=args.patience,
        save_every=args.save_every, loss=criterion,
        content={"role": "distill", "classes": splits.classes, "preprocess": preprocess.to_dict(),
                 "augment": policy.to_dict(), "flags": vars(args), "teacher": source.described},
    )  # fmt: skip
    recorder.open(args)
    run.log(f"{args.model}: {model.num_parameters:,} parameters, {resolution} px, {device}, {precision.name}")
    run.log(f"{splits}, {train.cache_kind} cache")
    run.log(f"{args.method}: " + " + ".join(f"{value:g} * {name}" for name, value in criterion.weights.items()))
    if weights_from:
        run.log(weights_from)
    if args.save_samples:
        batch = source.choose_view(next(train.batches(1)))
        save_sample_grid(args.save_samples, [augment(batch, source.resolution), augment(batch, resolution)])

    with recorder.saving_when_interrupted():
        for _ in recorder.epochs():
            model.train()
            for batch in recorder.batches(train):
                batch = source.choose_view(batch)
                taught = source.targets(batch)  # {"logits": (B, C), ...}, of the same views at the teacher's resolution
                images = preprocess(augment(batch, resolution))  # (B, 3, R, R)
                labels = batch["targets"][TASK]  # (B,)
                with precision.autocast():
                    out, loss = updater.parallel({"image": images}, taught, labels, batch["batch_targets"][TASK])
                updater(loss)
                right = (out["logits"].argmax(1) == labels).float().mean()
                recorder.meter.add(loss=loss, accuracy=right, **criterion.terms)
            student = updater.evaluated_model
            logits = predict(student, val, preprocess, precision, interrupts)  # (N, C)
            values = classification(logits, splits.val.labels)
            if teacher_logits["val"] is not None:
                values.update(fidelity(logits, teacher_logits["val"], splits.val.labels))
            if args.select_metric == "distillation_loss":
                on_val = lambda batch: source.targets(batch, "val")  # noqa: E731
                values["distillation_loss"] = distillation_loss(student, criterion, on_val, val, preprocess, precision, interrupts)
            warning = criterion.collapsed(recorder.train_means)
            if warning:  # before the epoch is saved, or a resumed run would drop the line
                run.log(f"warning: {warning}")
            recorder.end_epoch(values)

        test = Loader(splits.test, args.batch_size, device, cache=args.cache, workers=args.workers)
        teacher_logits["test"] = source.logits("test", test)
        write_results(
            run, splits, {"val": val, "test": test}, recorder, preprocess, precision, script="distill.py",
            method=args.method, teacher=source.described,
            teacher_logits=None if teacher_logits["val"] is None else teacher_logits,
        )  # fmt: skip


if __name__ == "__main__":
    cli.run_script(main, build_parser)
