"""Train the small model, taught by a large one.

    python distill.py                                         # teacher: runs/teacher/best.pth
    python distill.py --teacher-checkpoint runs/teacher/best.pth --method feature --teacher-layer layer3 \\
        --student-layer layer3
    python distill.py --teacher-model timm:resnet50 --teacher-weights FILE --dataset imagefolder --data-root DIR
    python distill.py --teacher-embeddings embeddings --method embedding     # stored: no teacher is run
    python distill.py --method tokens --teacher-model dinov2_vitb14 --teacher-pretrained --teacher-resolution 196 \\
        --dataset unlabeled --data-root FOLDER --eval-dataset ham10000 --eval-data-root DIR        # without labels
    python distill.py --resume runs/distill

The teacher is frozen and judged on val before training.  Writes the run folder as train_student.py does.  Without
cross-entropy and the teacher's logits no label trains, the student has no head and val's distillation loss chooses the
best epoch.
Needs from common: augment.py, cli.py, data.py, dermatology.py, distributed.py, dry_run.py, embeddings.py,
evaluation.py,
images.py, loader.py, losses.py, metrics.py, models.py, optimizer.py, probes.py, splitting.py, tables.py, teacher.py,
training.py.
Models and datasets of images and texts need image_text.py and multimodal.py too.
Packages: torch, timm, numpy, pillow, scikit-learn, tqdm (torchvision for CIFAR, transformers for hf: names and texts,
datasets for
--hf-dataset).
"""

import os

import torch

from common import cli, distributed, dry_run
from common.augment import Augmenter, Policy
from common.data import DATASETS, WITH_TEXTS, load_splits
from common.evaluation import distillation_loss, predict, task_metrics, write_results
from common.images import tasks_of
from common.loader import Loader, save_sample_grid, several_views
from common.losses import (
    FEATURE_LOSSES,
    FEATURE_TERMS,
    LOGIT_TERMS,
    METHODS,
    TEACHER_PROJECTORS,
    TEMPERATURES,
    TERMS,
    DistillationLoss,
    method_weights,
    task_accuracy,
    task_class_weights,
    uses,
)
from common.metrics import CLASSIFICATION, FIDELITY
from common.optimizer import make_updater
from common.teacher import (
    NEIGHBOURS,
    Neighbours,
    judge_teacher,
    live_source,
    need_image_model,
    open_stores,
    stored_source,
)
from common.training import (
    Interrupts,
    Precision,
    Preprocess,
    Recorder,
    check_normalization,
    load_checkpoint,
    select_device,
    start_model,
    use_compile,
)

DEFAULT_TEACHER = "runs/teacher/best.pth"
DEFAULTS = {
    "model": "resnet8",
    "epochs": 32,
    "batch_size": 32,
    "optimizer": "sgd",
    "warmup_epochs": 0.0,
    "save_every": 0,
}
TOKEN_DEFAULTS = {
    "model": "vit_small_patch16_224",
    "epochs": 100,
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 5e-4,
    "weight_decay": 0.04,
    "save_every": 10,
}


def build_parser():
    parser = cli.Parser(__doc__)
    cli.add_run_flags(parser, output="runs/distill")
    cli.add_data_flags(parser, dataset=None)
    cli.add_augment_flags(parser)
    cli.add_model_flags(parser, model=None)
    cli.add_image_text_flags(parser, text_model="bert-tiny-scratch")
    cli.add_training_flags(parser, epochs=None, select=(*CLASSIFICATION, *FIDELITY, "distillation_loss"))
    parser.set_defaults(**dict.fromkeys(DEFAULTS), select_metric=None)  # the method's, see settle
    parser.set_defaults(split_seed=None, decode_size=None)  # the teacher's
    g = parser.add_argument_group("teacher")
    g.add_argument("--teacher-checkpoint", metavar="FILE", help=f"a checkpoint of these scripts ({DEFAULT_TEACHER})")
    g.add_argument(
        "--teacher-model",
        metavar="NAME",
        help="a model by name, as --model, with --teacher-pretrained or --teacher-weights",
    )
    g.add_argument("--teacher-pretrained", action="store_true", help="the hub's weights for --teacher-model")
    g.add_argument("--teacher-weights", metavar="FILE", help="a foreign state dict for --teacher-model, strictly")
    g.add_argument(
        "--teacher-embeddings",
        metavar="DIR",
        help="what extract_embeddings.py stored, in place of a teacher; the student sees the stored views",
    )
    g.add_argument("--num-views", type=cli.POSITIVE, metavar="K", help="use the first K stored views; by default all")
    g.add_argument(
        "--teacher-resolution",
        type=cli.POSITIVE,
        help="the teacher's input side in pixels; by default the one it was trained at, of --teacher-model "
        "the student's",
    )
    g.add_argument(
        "--teacher-pooling",
        choices=("cls", "mean", "map"),
        help="what is the live teacher's embedding; by default what its head takes",
    )
    g.add_argument(
        "--allow-weak-teacher", action="store_true", help="go on with a teacher that is no better than chance on val"
    )
    g = parser.add_argument_group("distillation")
    g.add_argument(
        "--method",
        default="response",
        choices=list(METHODS),
        help="published combination; sets the weights below. Defaults of tokens: "
        "vit_small_patch16_224, adamw, learning rate 0.0005, weight decay 0.04, 100 epochs, a tenth of them "
        "warm-up (10 at most), batch 64, "
        "epoch_N.pth every 10; of the others: resnet8, sgd, 32 epochs, batch 32",
    )
    g.add_argument(
        "--alpha",
        type=float,
        help="response, feature: alpha * cross-entropy + (1 - alpha) * T^2 * KL; feature_matching: "
        "(1 - alpha) * cross-entropy + alpha * features (0.5)",
    )
    g.add_argument(
        "--temperature",
        type=float,
        help="T of all terms on logits, whatever each would take alone: by default the method's "
        "(vanilla, combined, logit_standardization 2; dist 1; others 4)",
    )
    g.add_argument(
        "--limit-labels",
        type=cli.NATURAL,
        metavar="N",
        help="show all images of train, N of them with their labels: those that "
        "train_student.py --limit-train N takes; the others have the teacher's terms alone. 0 is all "
        "(the default, but 100 on digits)",
    )
    g.add_argument(
        "--distillation-warmup-epochs",
        type=cli.AMOUNT,
        default=0.0,
        help="in epoch e all terms but the cross-entropy have min(1, e / this) of "
        "their weights; 0: their whole weights from the start",
    )
    g.add_argument("--ce-weight", type=float, help="of the cross-entropy; by default the method's")
    g.add_argument("--kl-weight", type=float, help="of T^2 * KL(teacher || student); by default the method's")
    g.add_argument(
        "--dkd-weight",
        type=float,
        help="of the decoupled KL, T^2 * (alpha * target against the rest + beta * within the rest); dkd: 1",
    )
    g.add_argument("--dkd-alpha", type=cli.AMOUNT, default=1.0, help="alpha in it")
    g.add_argument("--dkd-beta", type=cli.AMOUNT, default=8.0, help="beta in it")
    g.add_argument(
        "--dist-weight",
        type=float,
        help="of 1 - correlation of both models' probabilities: T^2 * (beta * over classes + gamma * over the "
        "images of a batch); dist: 2",
    )
    g.add_argument("--dist-beta", type=cli.AMOUNT, default=1.0, help="beta in it")
    g.add_argument("--dist-gamma", type=cli.AMOUNT, default=1.0, help="gamma in it")
    g.add_argument(
        "--standardized-kl-weight",
        type=float,
        help="of T^2 * KL of logits with mean 0 and deviation 1; logit_standardization: 9",
    )
    g.add_argument("--feature-weight", type=float, help="of the feature loss; by default the method's")
    g.add_argument("--feature-loss", default="mse", choices=FEATURE_LOSSES, help="on projected and pooled maps")
    g.add_argument(
        "--attention-weight",
        type=float,
        help="of the squared difference of the layers' attention maps, mean over layers; attention: 1000",
    )
    g.add_argument(
        "--student-layer",
        nargs="+",
        default=[],
        metavar="PATH",
        help="module paths of the student's features, as layer3, layers.2 or blocks.5",
    )
    g.add_argument(
        "--teacher-layer",
        nargs="+",
        default=[],
        metavar="PATH",
        help="module paths of the teacher's features, paired in order",
    )
    g.add_argument("--embedding-weight", type=float, help="of the embedding loss; by default the method's")
    g.add_argument(
        "--lambda-feat",
        type=cli.AMOUNT,
        default=1.0,
        help="of the squared error, a mean over dimensions, in the embedding "
        "loss; the embeddings' width makes it their sum",
    )
    g.add_argument("--lambda-cos", type=cli.AMOUNT, default=1.0, help="of 1 - cosine in the embedding loss")
    g.add_argument(
        "--shared-dim", type=cli.POSITIVE, help="width of the space of the embedding loss; by default the teacher's"
    )
    g.add_argument(
        "--teacher-projector",
        default="identity",
        choices=TEACHER_PROJECTORS,
        help="of the embedding loss; a learned one may collapse",
    )
    g.add_argument(
        "--projection-weight",
        type=float,
        help="of the mean squared error between both models' projected image and text sides, else their "
        "embeddings, the student's mapped to the teacher's width; vanilla and combined: 100",
    )
    g.add_argument(
        "--contrastive-weight",
        type=float,
        help="of the contrastive loss of embeddings within the batch; crd and combined: 1",
    )
    g.add_argument(
        "--crd-temperature", type=cli.number(float, 0, above=True), default=0.07, help="of the contrastive loss"
    )
    g.add_argument(
        "--crd-base-temperature", type=cli.number(float, 0, above=True), default=0.07, help="by which it is divided"
    )
    g.add_argument("--rkd-distance-weight", type=float, help="of the distances between a batch's embeddings; rkd: 25")
    g.add_argument("--rkd-angle-weight", type=float, help="of the angles between a batch's embeddings; rkd: 50")
    g.add_argument("--mmd-weight", type=float, help="of the maximum mean discrepancy of a batch's embeddings; mmd: 1")
    g.add_argument(
        "--cls-weight",
        type=float,
        help="of the class tokens' (or pooled embeddings') squared distance at unit length, summed over dimensions, "
        "averaged over images: 2 - 2 cosine; tokens: 1",
    )
    g.add_argument(
        "--patch-weight",
        type=float,
        help="of the patch tokens', averaged over tokens too, the teacher's grid resized to the student's; tokens: 0.5",
    )
    g.add_argument("--global-crops", type=cli.POSITIVE, default=1, metavar="G", help="views of each image a step")
    g.add_argument(
        "--local-crops",
        type=cli.NATURAL,
        default=0,
        metavar="N",
        help="small crops of each image that the student alone sees; their class tokens "
        "are matched to the teacher's of the global crops, with --cls-weight",
    )
    g.add_argument(
        "--local-resolution", type=cli.POSITIVE, help="their side in pixels; by default half of --resolution"
    )
    g.add_argument(
        "--local-crop-scale",
        type=float,
        nargs=2,
        default=[0.05, 0.25],
        metavar=("MIN", "MAX"),
        help="their area, share of the image",
    )
    g.add_argument(
        "--pooling",
        choices=("cls", "mean", "map"),
        help="what is the student's embedding (tokens: what stands for the image); by default what its head takes",
    )
    g.add_argument("--projector-weight-decay", type=cli.AMOUNT, default=0.0, help="of the projectors' matrices")
    g = parser.add_argument_group("k-NN during training")
    labelled = [name for name in DATASETS if name not in ("unlabeled", *WITH_TEXTS)]
    g.add_argument(
        "--eval-dataset",
        choices=labelled,
        help=f"labelled images: {NEIGHBOURS} neighbours of train classify val, for student and teacher",
    )
    g.add_argument(
        "--eval-data-root",
        help="its folder or file; by default --data-root where the dataset is the same, $DATA_ROOT or data/",
    )
    g.add_argument(
        "--eval-every",
        type=cli.POSITIVE,
        default=5,
        metavar="N",
        help="epochs between looks; the last of --epochs is always judged",
    )
    return parser


class Student(torch.nn.Module):
    """Model and loss in one module: so DDP averages the gradients of the projectors too."""

    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, inputs, taught, labels, batch_labels, local=()):
        out, tokens = self.model(inputs), None
        if local:  # N of (B, 3, r, r)
            tokens = self.model({"image": torch.cat(local)})["embedding"].unflatten(0, (len(local), -1))  # (N, B, D)
        return out, self.criterion(out, taught, labels, batch_labels, tokens)


def settle(args):
    """The loss's weights {term: float}; defaults that depend on the method are filled in."""
    weights = method_weights(args.method, args.alpha, **{term: getattr(args, f"{term}_weight") for term in TERMS})
    if not uses(weights, FEATURE_TERMS) and (args.student_layer or args.teacher_layer):
        raise cli.UserError(
            f"--student-layer and --teacher-layer with --method {args.method}: its weights of "
            f"{' and '.join(FEATURE_TERMS)} are 0"
        )
    if args.local_crops and not weights["cls"]:
        raise cli.UserError(
            f"--local-crops {args.local_crops} are matched to class tokens, whose weight is 0: --method tokens or "
            "--cls-weight"
        )
    defaults = TOKEN_DEFAULTS if args.method == "tokens" else DEFAULTS
    for name, value in defaults.items():
        if getattr(args, name) is None and (
            name not in ("lr", "weight_decay") or args.optimizer == "adamw"
        ):  # these are adamw's
            setattr(args, name, value)
    if args.temperature is None:
        args.temperature = TEMPERATURES.get(args.method, 4.0)
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10.0, args.epochs / 10)
    if args.distillation_warmup_epochs > args.epochs:
        raise cli.UserError(
            f"--distillation-warmup-epochs {args.distillation_warmup_epochs:g} is longer than --epochs {args.epochs}"
        )
    labelled = uses(weights, ("ce", *LOGIT_TERMS))  # else nothing trains the logits
    args.select_metric = args.select_metric or ("accuracy" if labelled else "distillation_loss")
    if not labelled and args.select_metric != "distillation_loss":
        raise cli.UserError(
            f"--select-metric {args.select_metric}: without cross-entropy and the teacher's logits "
            "the student has none, distillation_loss is left"
        )
    for name, given in (
        ("--freeze-backbone", args.freeze_backbone),
        ("--class-weights", args.class_weights != "none"),
        ("--sampler balanced", args.sampler == "balanced"),
        ("--limit-labels", args.limit_labels),
        ("--positive", args.positive),
    ):
        if given and not labelled:
            raise cli.UserError(
                f"{name} needs labels and a head: without cross-entropy and the teacher's logits there are none"
            )
    return weights, labelled


def teacher_checkpoint(args):
    """(path, checkpoint) of the teacher, or (None, None) where it is a --teacher-model."""
    if args.teacher_model:
        if args.teacher_pretrained and args.teacher_weights:
            raise cli.UserError(
                "--teacher-pretrained and --teacher-weights contradict each other: the hub's weights or a file's"
            )
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


def take_dataset_from(checkpoint, path, args, labelled):
    """Settle --dataset, what its samples are and --limit-labels where they are not given."""
    cli.take_dataset(args, checkpoint, path)
    if args.limit_labels is None:  # labels are scarce, images are not
        args.limit_labels = DATASETS[args.dataset].student_labels if labelled and not args.limit_train else 0
    if args.limit_labels and args.sampler == "balanced":
        raise cli.UserError(
            f"--sampler balanced cannot be combined with --limit-labels {args.limit_labels}, "
            "whose other images are of no class: --limit-labels 0 is all"
        )


def make_loss(args, weights, model, source, train, shown, classes):
    """DistillationLoss with its projectors, made from a dry batch before the optimizer sees the parameters."""
    tasks = tasks_of(classes) if classes else {}
    class_weight = task_class_weights(
        args.class_weights,
        {task: train.dataset.targets[task] for task in tasks},
        {t: len(names) for t, names in tasks.items()},
    )
    contrastive = {"temperature": args.crd_temperature, "base_temperature": args.crd_base_temperature}
    embedding = {
        "shared_dim": args.shared_dim,
        "teacher": args.teacher_projector,
        "lambda_feat": args.lambda_feat,
        "lambda_cos": args.lambda_cos,
    }
    criterion = DistillationLoss(
        weights,
        args.temperature,
        args.feature_loss,
        args.label_smoothing,
        class_weight,
        embedding,
        cli.task_weights(args, tasks),
        contrastive,
        distributed.gather_rows,
        {"alpha": args.dkd_alpha, "beta": args.dkd_beta},
        {"beta": args.dist_beta, "gamma": args.dist_gamma},
    )
    dry = source.choose_view(next(train.batches()))
    with torch.no_grad():
        criterion.build(model.eval()(shown(dry)), source.targets(dry))
    return criterion


def local_augmenters(args, policy, resolution):
    """(side in pixels, [Augmenter]) of --local-crops: small crops, otherwise changed as the views are."""
    if not args.local_crops:
        if args.local_resolution:
            raise cli.UserError("--local-resolution needs --local-crops N")
        return None, []
    if not 0 < args.local_crop_scale[0] <= args.local_crop_scale[1] <= 1:
        raise cli.UserError(
            f"--local-crop-scale {args.local_crop_scale[0]:g} {args.local_crop_scale[1]:g} must ascend within 0 to 1"
        )
    small = Policy(**{**policy.__dict__, "crop": "resized", "crop_scale": tuple(args.local_crop_scale)})
    return args.local_resolution or resolution // 2, [
        Augmenter(small, args.seed, stream) for stream in range(1, args.local_crops + 1)
    ]


def main(args):
    interrupts = Interrupts()
    run = cli.RunFolder(args.output, bool(args.resume), args.overwrite, cli.is_dry(args))
    device = select_device(args.device)
    precision = Precision(args.amp, device)
    weights, labelled = settle(args)

    # data: the teacher's dataset where none is named
    stores = open_stores(args)
    teacher_path, checkpoint = (None, None) if stores else teacher_checkpoint(args)
    take_dataset_from(checkpoint, teacher_path, args, labelled)
    info = DATASETS[args.dataset]
    resolution = args.resolution or info.resolution
    policy = stores["train"].policy if stores else cli.augment_policy(args)
    augment = Augmenter(policy, stores["train"].seed if stores else args.seed)
    local_side, local_crops = local_augmenters(args, policy, resolution)
    splits = load_splits(
        args.dataset,
        cli.data_root(args.data_root),
        download=args.download,
        labels=labelled,
        **cli.split_flags(vars(args)),
    )
    classes = splits.classes if labelled else type(splits.classes)()  # of several tasks a dict
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
    neighbours = Neighbours(args, device, precision, interrupts) if args.eval_dataset else None

    # teacher and student; the student starts from the weights that train_student.py has for this seed
    if stores:
        source = stored_source(args, stores, splits, weights)
    else:
        source = live_source(
            args, weights, teacher_path, checkpoint, splits, resolution, augment, precision, interrupts
        )
    model, weights_from = start_model(args, classes, resolution, getattr(splits.train, "texts", None))
    preprocess = Preprocess.of_new(model, resolution, args.dataset, info)
    preprocess.prepare(splits.train, splits.val)  # texts become numbers once
    for flag in [
        f
        for f, given in (("--pooling", args.pooling), ("--local-crops", local_crops), ("--eval-dataset", neighbours))
        if given
    ]:
        need_image_model(model, flag)
    if args.pooling:
        model.set_pooling(args.pooling)
    model.set_feature_layers(args.student_layer)
    model.with_tokens = bool(weights["patch"])
    if local_crops:
        model.check_side(local_side)
    check_normalization(model, resolution, train.rows_at_once * args.global_crops)
    model.to(device).to(memory_format=torch.channels_last)

    # loss, optimizer
    criterion = make_loss(
        args, weights, model, source, train, lambda batch: preprocess.inputs(batch, augment(batch, resolution)), classes
    )
    if use_compile(args.compile, device):
        model.compile()
    updater = make_updater(args, model, precision, len(train), criterion, Student(model, criterion), not labelled)

    if cli.is_dry(args):
        loaders = [train, val, *(neighbours.loaders if neighbours else [])]
        return dry_run.show(
            args,
            run,
            splits,
            loaders,
            updater,
            preprocess,
            classes,
            weights_from,
            source=source,
            criterion=criterion,
            views=[(resolution, args.global_crops), (local_side, len(local_crops))],
        )

    # the teacher is judged before it teaches; val images are plain, so its logits there are computed once
    teacher_logits = {"val": source.logits("val", val)}
    if source.model:
        run.log(f"teacher: {source.described['weights']}; normalization: {source.described['normalization']}")
    run.log(judge_teacher(source, teacher_logits["val"], splits, neighbours, args))

    # run folder
    recorder = Recorder(
        run,
        updater,
        interrupts,
        epochs=args.epochs,
        metric=args.select_metric,
        patience=args.patience,
        save_every=args.save_every,
        loss=criterion,
        content={
            "role": "distill",
            "classes": classes,
            "positive": splits.positive,
            "preprocess": preprocess.to_dict(),
            "data": splits.describe(),
            "augment": policy.to_dict(),
            "flags": vars(args),
            "teacher": source.described,
        },
    )
    recorder.open(args)
    run.log(f"{model.name}: {model.num_parameters:,} parameters, {resolution} px, {device}, {precision.name}")
    run.log(f"normalization: {preprocess}")
    run.log(f"{splits}, {train.cache_kind} cache")
    run.log(f"{args.method}: " + " + ".join(f"{value:g} * {name}" for name, value in criterion.weights.items()))
    if weights_from:
        run.log(weights_from)
    if args.save_samples:
        raw = next(train.batches(1))
        batch = source.choose_view(several_views(raw, args.global_crops))
        rows = [
            part for side in (source.resolution, resolution) for part in augment(batch, side).chunk(args.global_crops)
        ]
        save_sample_grid(args.save_samples, rows + [crop(raw, local_side) for crop in local_crops])

    def judge(split, loader):
        """Metrics of the student on a split, as it stands."""
        student, values = updater.evaluated_model, {}
        if labelled:
            logits = predict(student, loader, preprocess, precision, interrupts)  # {task: (N, C)}
            values = task_metrics(logits, loader.dataset.targets, teacher_logits[split], splits.positive)
        if args.select_metric == "distillation_loss":
            of_split = lambda batch: source.targets(batch, split)  # noqa: E731
            values["distillation_loss"] = distillation_loss(
                student, criterion, of_split, loader, preprocess, precision, interrupts
            )
        return values

    with recorder.saving_when_interrupted():
        for epoch in recorder.epochs():
            model.train()
            criterion.warm_up(epoch, args.distillation_warmup_epochs)
            for raw in recorder.batches(train):
                batch = source.choose_view(several_views(raw, args.global_crops))  # G * B rows
                taught = source.targets(
                    batch
                )  # {"logits": (G * B, C), ...}, of the same views at the teacher's resolution
                inputs = preprocess.inputs(
                    batch, augment(batch, resolution)
                )  # "image" (G * B, 3, R, R), and of texts "input_ids" (G * B, L)
                local = [preprocess(crop(raw, local_side)) for crop in local_crops]  # N of (B, 3, r, r)
                targets = batch["targets"]  # {task: (G * B,)}
                with precision.autocast():
                    out, loss = updater.parallel(inputs, taught, targets, batch["batch_targets"], local)
                updater(loss)
                right = {"accuracy": task_accuracy(out, targets)} if labelled else {}
                recorder.meter.add(loss=loss, **right, **criterion.terms)
            values = judge("val", val)
            if neighbours:
                due = epoch % args.eval_every == 0 or epoch == args.epochs
                values["knn"] = neighbours(updater.evaluated_model, preprocess)["accuracy"] if due else None
                values["teacher_knn"] = source.described.get("knn", {}).get("accuracy")
            warning = criterion.collapsed(recorder.train_means)
            if warning:  # before the epoch is saved, or a resumed run would drop the line
                run.log(f"warning: {warning}")
            recorder.end_epoch(values)

        loaders = {"val": val}
        if splits.test is not None:
            loaders["test"] = Loader(splits.test, args.batch_size, device, cache=args.cache, workers=args.workers)
            teacher_logits["test"] = source.logits("test", loaders["test"]) if labelled else None
        write_results(
            run,
            splits,
            loaders,
            recorder,
            preprocess,
            precision,
            script="distill.py",
            method=args.method,
            teacher=source.described,
            teacher_logits=None if teacher_logits["val"] is None else teacher_logits,
            judge=None if labelled else judge,
        )


if __name__ == "__main__":
    cli.run_script(main, build_parser)
