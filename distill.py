"""Train the small model, taught by a large one.

    python distill.py                 # teacher: runs/teacher/best.pth, or several: --teacher-checkpoint A.pth B.pth
    python distill.py --method feature --teacher-layer layer3 --student-layer layer3
    python distill.py --loss ce=0.3 dkd=1 --loss-options dkd.beta=2
    python distill.py --teacher-model timm:resnet50 --teacher-weights FILE --dataset imagefolder --data-root DIR
    python distill.py --teacher-embeddings embeddings --method embedding     # stored: no teacher is run
    python distill.py --method tokens --teacher-model dinov2_vitb14 --teacher-pretrained --teacher-resolution 196 \\
        --dataset unlabeled --data-root FOLDER --eval-dataset ham10000 --eval-data-root DIR        # without labels
    python distill.py --resume runs/distill

The teacher is frozen and judged on val before training.  Writes the run folder as train_student.py does.  Without
cross-entropy and the teacher's logits no label trains, the student has no head and val's distillation loss chooses the
best epoch.

Files of common: augment, cli, data, loader, losses, metrics, models, run, teacher, training; embeddings for
--teacher-embeddings, several for several teachers and --standardize-teachers, probes for --eval-dataset, unlabeled for
--dataset unlabeled; those that the dataset and the models need (see train_student.py).
Packages: torch, timm, numpy, pillow, scikit-learn, tqdm (torchvision for CIFAR, transformers for hf: names and texts,
datasets for --hf-dataset).
"""

import argparse
import functools

from common import cli

with cli.torch_later():
    from common.augment import Augmenter, Policy
    from common.data import (
        DATASETS,
        STORED_FLAGS,
        WITH_TEXTS,
        are_findings,
        dataset_flags,
        dataset_info,
        load_splits,
        split_options,
        tasks_of,
    )
    from common.loader import Loader, save_sample_grid
    from common.metrics import CLASSIFICATION, FIDELITY
    from common.run import Recorder, RunFolder, UserError, distributed, load_checkpoint, optional, world_size

TEXT_MODEL = "bert-tiny-scratch"
DEFAULT_TEACHER = "runs/teacher/best.pth"
NEIGHBOURS = 20  # of --eval-dataset
TRAIN_ONLY = ("limit_train", "limit_labels", "unlabeled_root")
TOKEN_DEFAULTS = {
    "model": "vit_small_patch16_224",
    "epochs": 100,
    "batch_size": 64,
    "optimizer": "adamw",
    "save_every": 10,
}
TOKEN_ADAMW = {"lr": 5e-4, "weight_decay": 0.04}
# --method NAME stands for these words after --loss
METHODS = {
    "response": "ce=0.5 kl=0.5",  # Hinton et al. 2015, arXiv:1503.02531
    "feature": "ce=0.5 kl=0.5 feature=1",  # the same and a hint, Romero et al. 2015, arXiv:1412.6550
    "feature_matching": "ce=0.5 feature=0.5",  # intermediate maps of Swins and ViTs in place of logits
    "embedding": "ce=1 embedding=1",  # stored or live embeddings in a shared space
    "tokens": "cls=1 patch=0.5",  # class token and patch tokens, without labels
    # Ranzinger et al. 2024, arXiv:2312.06709: 1 - cosine of class tokens
    "radio": "cls=0.5 patch=1 patch.cosine=0.9 patch.smooth_l1=0.1",
    "projection": "ce=1 kl=1 projection=100 kl.temperature=2",  # logits, and what image + text models project
    "combined": "ce=1 kl=1 projection=100 crd=1 kl.temperature=2",  # projection and crd
    "crd": "ce=1 crd=1",  # Tian et al. 2020, arXiv:1910.10699, with the batch in place of their memory bank
    "rkd": "ce=1 rkd_distance=25 rkd_angle=50",  # Park et al. 2019, arXiv:1904.05068
    "mmd": "ce=1 mmd=1",  # Huang and Wang 2017, arXiv:1707.01219, on embeddings
    "dkd": "ce=1 dkd=1",  # Zhao et al. 2022, arXiv:2203.08679; their code warms it up over 20 of 240 epochs: `warm_up`
    "dist": "ce=1 dist=2",  # Huang et al. 2022, arXiv:2205.10536: both relations weigh 2 there, 1 each within our term
    "logit_standardization": "ce=0.1 standardized_kl=9",  # Sun et al. 2024, arXiv:2403.01427, their code's weights
    # Zagoruyko and Komodakis 2017, arXiv:1612.03928; theirs sums over layers, ours is the mean
    "attention": "ce=1 attention=1000",
    "pkt": "ce=1 pkt=30000",  # Passalis and Tefas 2018, arXiv:1803.10837; weight of RepDistiller, at batches of 64
    "sp": "ce=1 sp=3000",  # Tung and Mori 2019, arXiv:1907.09682, on embeddings
    "srd": "ce=1 srd=1",  # Miles and Mikolajczyk 2023, arXiv:2303.11098, their code's weights for ImageNet
    "hard": "ce=0.5 hard=0.5",  # Touvron et al. 2021, arXiv:2012.12877
    "pld": "pld=1",  # Bassam et al. 2025, arXiv:2506.12542: its first summand is a cross-entropy
    "wkd": "ce=1 wkd=0.006",  # Lv et al. 2024, arXiv:2412.08139; for CIFAR-100 in a copy of their code
}
# methods that have --alpha: it weighs the first of these terms, 1 - alpha the second
ALPHA = {"response": ("ce", "kl"), "feature": ("ce", "kl"), "feature_matching": ("feature", "ce")}


def build_parser():
    parser = cli.Parser(__doc__)
    cli.add_run_flags(parser, output="runs/distill")
    cli.add_data_flags(parser, DATASETS, default=None)
    cli.add_augment_flags(parser)
    cli.add_model_flags(parser)
    cli.add_image_text_flags(parser, TEXT_MODEL)
    cli.add_training_flags(parser, select=(*CLASSIFICATION, *FIDELITY, "distillation_loss"))
    # None: the loss's, see loss_defaults, and the teacher's
    parser.set_defaults(optimizer=None, warmup_epochs=None, save_every=None, select_metric=None)
    parser.set_defaults(split_seed=None, decode_size=None)
    add_teacher_flags(parser)
    add_loss_flags(parser)
    add_crop_flags(parser)
    return parser


class OneOrMore(argparse.Action):
    """A flag with nargs="+": one value is kept as it is, several are a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def add_teacher_flags(parser):
    add = parser.add_argument_group("teacher").add_argument
    several = {"nargs": "+", "action": OneOrMore}
    add(
        "--teacher-checkpoint",
        **several,
        metavar="FILE",
        help=f"a checkpoint of these scripts ({DEFAULT_TEACHER})\nseveral teachers: several values of this, of "
        "--teacher-model and of --teacher-embeddings, together and in this order",
    )
    add("--teacher-model", **several, type=cli.name_or_file, help="a model by name, as --model takes it")
    cli.switch(
        add,
        "--teacher-pretrained",
        "--teacher-model has weights: the hub's, or those that FILE.py:FUNCTION loads itself",
    )
    add(
        "--teacher-weights",
        **several,
        metavar="FILE",
        help="a foreign state dict for --teacher-model, strictly\none for each of several",
    )
    add(
        "--teacher-embeddings",
        **several,
        metavar="DIR",
        help="stored outputs (extract_embeddings.py) in place of a teacher\nseveral must hold the same views of "
        "the same images, which teachers that are run beside them see too",
    )
    add("--num-views", type=cli.POSITIVE, metavar="K", help="use the first K stored views; else all")
    add(
        "--teacher-resolution",
        **several,
        type=cli.POSITIVE,
        metavar="PX",
        help="the teacher's input side in pixels, one for all that are run or one for each; else that of its training, "
        "for --teacher-model the student's",
    )
    add(
        "--teacher-pooling",
        **several,
        choices=("cls", "mean", "map"),
        help="what is the live teacher's embedding, one for all or one for each; else what its head takes",
    )
    add(
        "--teacher-shares",
        nargs="+",
        type=cli.ABOVE_ZERO,
        metavar="SHARE",
        help="relative weights of several teachers in each term that they have; else equal",
    )
    add(
        "--teacher-average",
        choices=("terms", "probabilities"),
        default="terms",
        help="mean over those teachers that know the classes: of the terms on logits, or of the probabilities, which "
        "these terms then compare once",
    )
    add(
        "--standardize-teachers",
        choices=("none", "channel", "phi-s"),
        default="none",
        help="each teacher's embeddings and tokens lose their mean and spread over train: by channel, or by a rotation "
        "and one scale, which keeps angles (arXiv:2410.01680)",
    )
    cli.switch(add, "--allow-weak-teacher", "go on with a teacher that is no better than chance on val")
    add = parser.add_argument_group("k-NN during training").add_argument
    labelled = [name for name in DATASETS if name not in ("unlabeled", *WITH_TEXTS)]
    add(
        "--eval-dataset",
        choices=labelled,
        metavar="NAME",
        help=f"labelled images: {NEIGHBOURS} neighbours of train classify val, for student and teacher",
    )
    add(
        "--eval-data-root",
        metavar="DIR",
        help="its folder or file; else --data-root where the dataset is the same, $DATA_ROOT or data/",
    )
    add("--eval-every", type=cli.POSITIVE, default=5, help="epochs between evaluations")


class Sum(argparse.Action):
    """--loss and --method both set the sum: the later one counts."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.method = namespace.loss = None
        setattr(namespace, self.dest, values)


def terms_help():
    from common.losses import TERMS

    return "; ".join(f"{term}: {row.help}" for term, row in TERMS.items()) + "; of --loss and --method the later counts"


def options_help():
    from common.losses import TERMS, loss_words, term_options

    return loss_words({key: p.default or "N" for term in TERMS for key, p in term_options(term).items()})


def add_loss_flags(parser):
    add = parser.add_argument_group("distillation").add_argument
    add(
        "--loss",
        nargs="+",
        action=Sum,
        metavar="TERM=WEIGHT",
        help="a sum of losses in place of --method, as ce=0.5 kl=0.5; --help-all has the terms\n",
    ).more = terms_help
    sums = "; ".join(f"{name}: {words}" for name, words in METHODS.items())
    add(
        "--method",
        default="response",
        choices=list(METHODS),
        action=Sum,
        metavar="NAME",
        help=f"a name for a sum: {', '.join(METHODS)}\nwhich are {sums}",
    )
    add(
        "--loss-options",
        nargs="*",
        default=[],
        metavar="TERM.OPTION=VALUE",
        help="options of the terms, as dkd.beta=2 feature.distance=cosine\nwith the defaults (N: the teacher's width) ",
    ).more = options_help
    add(
        "--alpha",
        type=cli.SHARE,
        help="weight of ce in response and feature, of feature in feature_matching; 1 - alpha of the other term (0.5)",
    )
    add(
        "--temperature",
        type=cli.ABOVE_ZERO,
        metavar="T",
        help="of the terms on logits, but for those that --loss-options sets; else each term's",
    )
    add(
        "--limit-labels",
        type=cli.NATURAL,
        help="all images of train, N of them with labels, as train_student.py --limit-train N has; 0: all",
    )
    add(
        "--unlabeled-root",
        metavar="DIR",
        help="a tree of images that train gets beside its own: they have the teacher's terms alone",
    )
    add(
        "--labelled-share",
        type=cli.number(float, 0, 1),
        default=0.0,
        metavar="S",
        help="of the images of each batch S have a label, which come again and again; 0: as they come",
    )
    add(
        "--distillation-warmup-epochs",
        type=cli.AMOUNT,
        default=0.0,
        metavar="N",
        help="in epoch e all terms but the cross-entropy have min(1, e / N) of their weights; 0 is off",
    )
    add("--student-layer", nargs="+", default=[], metavar="PATH", help="module paths of the student's feature maps")
    add(
        "--teacher-layer",
        nargs="+",
        default=[],
        metavar="PATH",
        help="those of the teacher's, paired in order\nof several teachers as many for each, or for all",
    )
    add(
        "--pooling",
        choices=("cls", "mean", "map"),
        help="what is the student's embedding; else what its head takes",
    )


def add_crop_flags(parser):
    add = parser.add_argument_group("projectors and crops").add_argument
    add("--projector-weight-decay", type=cli.AMOUNT, default=0.0, help="weight decay of the projectors")
    add("--global-crops", type=cli.POSITIVE, default=1, metavar="G", help="views of each image a step")
    add(
        "--local-crops",
        type=cli.NATURAL,
        default=0,
        help="small crops of each image that the student alone sees; their class tokens are matched to the teacher's "
        "of the global crops, in the term cls",
    )
    add("--local-resolution", type=cli.POSITIVE, metavar="PX", help="their side in pixels; else half of --resolution")
    add(
        "--local-crop-scale",
        type=float,
        nargs=2,
        default=[0.05, 0.25],
        metavar=("MIN", "MAX"),
        help="their area, share of the image",
    )


if __name__ == "__main__":
    cli.check_command_line(build_parser)

# what loads torch
import torch

from common.losses import TERMS, DistillationLoss, LossError, check_findings, loss_words, parse_loss, terms_on
from common.teacher import (
    TEACHER_FLAGS,
    TEACHER_KINDS,
    Found,
    Neighbours,
    distillation_loss,
    find_checkpoint,
    judge_teacher,
    live_source,
    load_teacher,
    need_image_model,
    open_stores,
    several_views,
    store_flags,
    stored_source,
)
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

# --------------------------------------------------------------------------------------------------- settling the flags


def loss_settings(method="response", loss=None, loss_options=(), temperature=None, alpha=None):
    """({term: weight}, {"TERM.OPTION": value}) of the flags; see losses.parse_loss."""
    words = METHODS[method].split() if loss is None else loss
    if alpha is not None:
        if loss is not None or method not in ALPHA:
            name = f"--method {method}" if loss is None else "--loss"
            advice = "give the weights, as --loss ce=0.3 kl=0.7"
            raise LossError(f"--alpha {alpha} cannot be combined with {name}: {advice}")
        first, second = ALPHA[method]
        weights = {first: alpha, second: 1 - alpha}
        words = [f"{term}={weights.get(term, weight)}" for term, weight in (word.split("=") for word in words)]
    return parse_loss(words, loss_options, temperature)


def check_loss(args):
    """The loss's (weights, options), and whether labels train; refuses flags that do not fit them."""
    weights, options = loss_settings(args.method, args.loss, args.loss_options, args.temperature, args.alpha)
    if not terms_on(weights, "features") and (args.student_layer or args.teacher_layer):
        raise UserError(
            f"--student-layer and --teacher-layer: the loss {loss_words(weights)} has no term on feature maps, "
            f"which are {' and '.join(terms_on(TERMS, 'features'))}"
        )
    if args.local_crops and "cls" not in weights:
        need = "need the term cls in the loss, as in --method tokens"
        raise UserError(f"--local-crops {args.local_crops} {need}; it is {loss_words(weights)}")
    if args.local_resolution and not args.local_crops:
        raise UserError("--local-resolution needs --local-crops N")
    low, high = args.local_crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"--local-crop-scale {low:g} {high:g} must ascend within 0 to 1")
    on_vectors = [term for term in terms_on(weights, "embedding", "tokens") if not TERMS[term].both_sides]
    for flag, default, terms, of in (
        ("standardize_teachers", "none", on_vectors, "embeddings or tokens"),
        ("teacher_average", "terms", terms_on(weights, "logits"), "logits"),
    ):
        value = getattr(args, flag)
        if value != default and not terms:
            flag = f"--{flag.replace('_', '-')} {value}"
            raise UserError(f"{flag}: the loss {loss_words(weights)} has no term on {of}")
    labelled = bool(terms_on(weights, "labels", "logits"))  # else nothing trains the student's logits
    if not labelled:
        lacks = f"but the loss {loss_words(weights)} has neither ce nor a term on logits"
        if args.select_metric not in (None, "distillation_loss"):
            metric = f"--select-metric {args.select_metric}"
            raise UserError(f"{metric} needs a head, {lacks} to train one: distillation_loss chooses without")
        given = {
            "--freeze-backbone": args.freeze_backbone,
            "--class-weights": args.class_weights != "none",
            "--sampler balanced": args.sampler == "balanced",
            "--limit-labels": args.limit_labels,
            "--labelled-share": args.labelled_share,
            "--positive": args.positive,
        }
        for flag in (flag for flag, value in given.items() if value):
            raise UserError(f"{flag} needs labels and a head, {lacks}")
    return weights, options, labelled


def find_teachers(args):
    """Found of each teacher: flags, and what can be opened before data are read."""
    flags = {name: getattr(args, name) for name in TEACHER_FLAGS}
    kinds = sum(flags[kind] is not None for kind in TEACHER_KINDS)
    if kinds < 2 and not any(isinstance(flags[name], list) for name in TEACHER_FLAGS if name != "teacher_layer"):
        if args.teacher_shares or args.teacher_average != "terms":
            raise UserError("--teacher-shares and --teacher-average need several teachers")
        return [find_teacher(flags)]
    several = optional("common.several", "a run with several teachers")
    teachers = [find_teacher(own) for own in several.flags_of_each(flags, TEACHER_KINDS, len(args.student_layer))]
    several.check_stores([one.stores for one in teachers if one.stores], STORED_FLAGS, args.num_views)
    if len(args.teacher_shares or teachers) != len(teachers):
        shares = " ".join(f"{share:g}" for share in args.teacher_shares)
        raise UserError(f"--teacher-shares {shares}: give one for each of the {len(teachers)} teachers")
    return teachers


def find_teacher(flags):
    """Found of one teacher; flags: its values of TEACHER_FLAGS."""
    if flags["teacher_embeddings"]:
        return Found(flags, open_stores(flags["teacher_embeddings"]), None, None)
    if flags["num_views"]:
        raise UserError("--num-views needs --teacher-embeddings DIR")
    return Found(flags, None, *find_checkpoint(DEFAULT_TEACHER, **cli.options(find_checkpoint, flags)))


def settle_flags(args, weights, labelled, teachers=()):
    """The flags with the teachers' data, where no other are named, and the defaults of dataset and loss."""
    for one in teachers:
        if one.stores:
            args = cli.replaced(args, **store_flags(one.stores, {**vars(args), **one.flags}, STORED_FLAGS))
    path, checkpoint = next(((one.path, one.checkpoint) for one in teachers if one.checkpoint), (None, None))
    args = cli.replaced(args, **dataset_flags(vars(args), checkpoint, path))
    info = dataset_info(args.dataset)
    defaults = {"optimizer": "sgd", "warmup_epochs": 0.0, "save_every": 0}
    defaults["select_metric"] = "accuracy" if labelled else "distillation_loss"
    defaults["limit_labels"] = info.student_labels if labelled and not args.limit_train else 0  # images are not scarce
    if "cls" in weights or "patch" in weights:
        defaults.update(TOKEN_DEFAULTS, **(TOKEN_ADAMW if args.optimizer in (None, "adamw") else {}))
        defaults["warmup_epochs"] = min(10.0, (args.epochs or TOKEN_DEFAULTS["epochs"]) / 10)
    recipe = info.defaults("student", args.optimizer or defaults["optimizer"])
    recipe.pop("limit_train")
    args = cli.fill_defaults(vars(args), {**recipe, **defaults})
    if args.local_crops:
        args = cli.fill_defaults(vars(args), {"local_resolution": args.resolution // 2})
    if args.distillation_warmup_epochs > args.epochs:
        warmup = f"--distillation-warmup-epochs {args.distillation_warmup_epochs:g}"
        raise UserError(f"{warmup} is longer than --epochs {args.epochs}")
    for flag in ("limit_labels", "unlabeled_root") if args.sampler == "balanced" else ():
        if getattr(args, flag):
            given = f"--{flag.replace('_', '-')} {getattr(args, flag)}"
            raise UserError(
                f"--sampler balanced cannot be combined with {given}, which gives images of no class: --limit-labels 0 "
                "is all"
            )
    return args


# -------------------------------------------------------------------------------------------------------------- parts


class Student(torch.nn.Module):
    """Model and loss in one module: so DDP averages the gradients of the projectors too."""

    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, inputs, teacher, labels, batch_labels, local=()):
        out, tokens = self.model(inputs), None
        if local:  # N of (B, 3, r, r)
            tokens = self.model({"image": torch.cat(local)})["embedding"].unflatten(0, (len(local), -1))  # (N, B, D)
        return out, self.criterion(out, teacher, labels, batch_labels, local_crops=tokens)


def read_data(args, device, labelled):
    """(Splits, Loader of train, Loader of val)"""
    root, options = cli.data_root(args.data_root), split_options(vars(args))
    splits = load_splits(args.dataset, root, download=args.download, labels=labelled, **options)
    balanced = cli.balanced_classes(args.sampler, tasks_of(splits.classes))
    parts, reading = args.accumulation_steps, {"cache": args.cache, "workers": args.workers}
    mixing = {"accumulate": parts, "balanced": balanced, "labelled_share": args.labelled_share}
    train = Loader(splits.train, args.batch_size, device, True, args.seed, **mixing, **reading)
    return splits, train, Loader(splits.val, args.batch_size, device, **reading)


def open_neighbours(args, precision):
    """Neighbours of --eval-dataset, or None."""
    if not args.eval_dataset:
        return None
    same = args.eval_dataset == args.dataset and args.eval_data_root in (None, args.data_root)
    options = split_options(vars(args))
    if not same:
        options = {name: options[name] for name in ("split_seed", "decode_size", "on_bad_image") if name in options}
    options = {name: value for name, value in options.items() if name not in TRAIN_ONLY}
    root = cli.data_root(args.eval_data_root or (args.data_root if same else None))
    splits = load_splits(args.eval_dataset, root, splits=("train", "val"), **options)
    if are_findings(splits.classes):
        raise UserError(
            f"--eval-dataset {args.eval_dataset}: neighbours vote for one class an image, these have findings"
        )
    return Neighbours(splits, precision, NEIGHBOURS, **cli.options(Neighbours, vars(args)))


def views_of(flags, teachers):
    """(policy, seed) of the views: those of stored outputs, which were made of them, else the flags'."""
    stores = next((one.stores for one in teachers if one.stores), None)
    if stores:
        return stores["train"].policy, stores["train"].seed
    return cli.augment_policy(flags, dataset_info(flags["dataset"]).policy), flags["seed"]


def make_source(args, teachers, weights, splits, augment, precision):
    """What teaches: the only teacher, or several as one."""
    alone = len(teachers) == 1
    sources = [make_one_source(args, one, alone, weights, splits, augment, precision) for one in teachers]
    if alone:
        return sources[0]
    return optional("common.several", "a run with several teachers").join(sources, shares_of(args, sources))


def shares_of(args, teachers):
    return args.teacher_shares or [1.0] * len(teachers)


def make_one_source(args, found, alone, weights, splits, augment, precision):
    """A teacher: stored outputs, or a model that is run.  One of several need not know the classes."""
    flags, classes, checkpoint = {**vars(args), **found.flags}, splits.classes, found.checkpoint
    if found.stores:
        if not alone and "logits" not in found.stores["train"].arrays:
            weights = {term: weight for term, weight in weights.items() if term not in terms_on(weights, "logits")}
        return stored_source(found.stores, weights, splits, precision.device, **cli.options(stored_source, flags))
    wanted = classes if terms_on(weights, "logits") else []
    if not alone and not checkpoint and isinstance(classes, dict):
        wanted = []  # no model by name has a head for each task
    info, crop_mode = dataset_info(args.dataset), augment.policy.crop_mode
    loaded = load_teacher(found.path, checkpoint, wanted, info, crop_mode, alone, **cli.options(load_teacher, flags))
    knows = checkpoint["classes"] == classes if checkpoint else bool(wanted) and loaded[0].known_classes == len(classes)
    has_head = bool(classes) and knows
    return live_source(*loaded, weights, splits, augment, precision, has_head, **cli.options(live_source, flags))


def make_student(args, classes, weights, splits, train, crop_mode):
    """(model on the device, its Preprocess, line for the log); it starts from the weights of train_student.py's seed.

    train: its Loader.
    """
    texts, info = getattr(splits.train, "texts", None), dataset_info(args.dataset)
    start = model_starter(texts)
    if are_findings(classes):
        check_findings(weights)
    model, weights_from = start(classes, args.resolution, texts, **cli.options(start, vars(args)))
    preprocess = Preprocess.for_model(model, args.resolution, args.dataset, info, crop_mode)
    preprocess.prepare(splits.train, splits.val)  # texts become numbers once
    for name in ("pooling", "local_crops", "eval_dataset"):
        if getattr(args, name):
            need_image_model(model, f"--{name.replace('_', '-')}")
    if args.pooling:
        model.set_pooling(args.pooling)
    model.set_feature_layers(args.student_layer)
    model.with_tokens = bool(terms_on(weights, "tokens"))
    if model.kind == "image" and "ce" in weights and terms_on(weights, "logits"):
        model.split_heads()  # labels train one, the teacher the other
    if args.local_crops:
        model.check_side(args.local_resolution)
    check_normalization(model, args.resolution, train.rows_at_once * args.global_crops)
    place(model, train.device)
    return model, preprocess, weights_from


def make_loss(args, weights, options, classes, targets, source):
    """DistillationLoss, or SeveralLosses, which has one for each teacher; targets: {task: labels of train (N,)}."""
    tasks = tasks_of(classes) if classes else {}
    sizes = {task: len(names) for task, names in tasks.items()}
    class_weights = task_class_weights(args.class_weights, {task: targets[task] for task in tasks}, sizes)
    task_weights = cli.task_weights(args.task_weights, tasks)

    def cross_entropy(out, labels, batch_labels):
        return task_cross_entropy(out, labels, args.label_smoothing, class_weights, batch_labels, task_weights)

    make = functools.partial(
        DistillationLoss,
        weights,
        options,
        cross_entropy=cross_entropy,
        task_weights=task_weights,
        **({"gather": distributed().gather_rows} if world_size() > 1 else {}),
    )
    if not source.parts:
        return make()
    several = optional("common.several", "a run with several teachers")
    return several.SeveralLosses(make, shares_of(args, source.parts), args.teacher_average)


def make_planner(source, augment, local_augment, global_crops):
    """plan(batch) for `Loader.batches`: the views that are shown, and what is drawn for them and for local crops."""

    def plan(batch):
        for crop in local_augment:
            batch = crop.plan(batch)
        return augment.plan(source.choose_view(several_views(batch, global_crops)))

    return plan


def standardize_teachers(args, run, criterion, source, train, plan):
    """--standardize-teachers, by what train shows; a resumed run has the figures that it began with."""
    if args.standardize_teachers == "none":
        return
    several = optional("common.several", "--standardize-teachers")
    saved = load_checkpoint(run.path("latest.pth"))["loss"] if run.resume else None
    outputs = map(source.targets, train.batches(1, plan=plan))
    images = 0 if args.dry_run else several.IMAGES
    several.standardize(criterion, args.standardize_teachers, outputs, saved, images)


def build_projectors(criterion, model, preprocess, source, train, augment, plan):
    """The loss's projectors, for what a dry batch shows, before the optimizer sees the parameters."""
    batch = next(train.batches(1, plan=plan))
    with torch.no_grad():
        out = model.eval()(preprocess.inputs(batch, augment(batch, preprocess.resolution)))
        criterion.build(out, source.targets(batch))


def make_updater(args, model, criterion, precision, steps, labelled):
    """Updater whose `parallel` is a Student; steps: of an epoch.  Without labels the head gets no gradient."""
    flags, student = vars(args), Student(model, criterion)
    place(model, precision.device, args.compile)
    optimizer = make_optimizer(model, criterion, **cli.options(make_optimizer, flags))
    schedule = Schedule(optimizer.defaults["lr"], steps, **cli.options(Schedule, flags))
    return Updater(model, optimizer, schedule, precision, student, not labelled, **cli.options(Updater, flags))


def local_augmenters(args, policy):
    """An Augmenter for each of --local-crops: small crops, otherwise changed as the views are."""
    small = Policy(**{**policy.__dict__, "crop": "resized", "crop_scale": tuple(args.local_crop_scale)})
    return [Augmenter(small, args.seed, stream) for stream in range(1, args.local_crops + 1)]


def make_judge(recorder, source, preprocess, labelled, neighbours):
    """judge(split, loader, epoch=None) -> metrics of the student on a split, as it stands; after an epoch k-NN too."""
    updater, precision, positive = recorder.updater, recorder.updater.precision, recorder.content["positive"]

    def judge(split, loader, epoch=None):
        student, scores = updater.evaluated_model, {}
        if labelled:
            logits = predict_logits(student, loader, preprocess, precision)  # {task: (N, C)}
            scores = task_metrics(logits, loader.dataset.targets, source.logits(split, loader), positive)
        if recorder.metric == "distillation_loss":
            targets = functools.partial(source.targets, split=split)
            value = distillation_loss(student, recorder.criterion, targets, loader, preprocess, precision)
            scores["distillation_loss"] = value
        warning = epoch and recorder.criterion.collapsed(recorder.train_means)
        if warning:  # before the epoch is saved, or a resumed run would drop the line
            recorder.run.log(f"warning: {warning}")
        if neighbours and epoch:
            scores.update(neighbours.after_epoch(epoch, student, preprocess))
            for name, one in source.teachers.items():
                scores[f"teacher_knn{name}"] = one.described.get("knn", {}).get("accuracy")
        return scores

    return judge


def log_teacher(args, run, source, splits, val, neighbours):
    """Judge each teacher on val; refuses one at chance level, and a metric that needs logits where there are none."""
    for one in source.teachers.values():
        run.log(judge_teacher(one, one.logits("val", val), splits, neighbours, args.allow_weak_teacher))
    if args.select_metric in FIDELITY and source.logits("val", val) is None:
        raise UserError(
            f"--select-metric {args.select_metric} compares logits, and this teacher has none for the classes"
        )


def sum_lines(method, weights, options):
    """The sum for the log, as --loss and --loss-options take it."""
    lines = [f"{method or 'loss'}: {loss_words(weights)}"]
    return lines + ([f"loss options: {loss_words(options)}"] if options else [])


def show_dry_run(args, recorder, splits, loaders, preprocess, weights_from, source, neighbours):
    loaders = loaders + (neighbours.loaders if neighbours else [])
    views = [(args.resolution, args.global_crops), (args.local_resolution, args.local_crops)]
    dry_run = optional("common.dry_run", "--dry-run")
    dry_run.show(recorder, splits, loaders, preprocess, weights_from, args.save_samples, source=source, views=views)


def draw_samples(args, train, source, augment, local_augment, plan):
    """--save-samples: the views of teacher and student, and the local crops."""
    if not args.save_samples:
        return
    batch = next(train.batches(1, plan=plan))
    sides = [*(one.resolution for one in source.teachers.values()), args.resolution]
    rows = [part for side in sides for part in augment(batch, side).chunk(args.global_crops)]
    save_sample_grid(args.save_samples, rows + [crop(batch, args.local_resolution) for crop in local_augment])


# --------------------------------------------------------------------------------------------------------------- main


def main(args):
    run = RunFolder(args.output, bool(args.resume), args.overwrite, args.dry_run)
    weights, options, labelled = check_loss(args)
    teachers = find_teachers(args)
    args = settle_flags(args, weights, labelled, teachers)
    flags, precision = vars(args), Precision(args.amp, select_device(args.device))

    # data
    policy, seed = views_of(flags, teachers)
    check_mixing(policy, args.dataset, [term for term in weights if TERMS[term].uses_labels], args.local_crops)
    augment = Augmenter(policy, seed)
    local_augment = local_augmenters(args, policy)
    splits, train, val = read_data(args, precision.device, labelled)
    neighbours = open_neighbours(args, precision)

    # teacher, student, loss, optimizer
    source = make_source(args, teachers, weights, splits, augment, precision)
    classes = splits.classes if labelled else type(splits.classes)()  # of several tasks a dict
    model, preprocess, weights_from = make_student(args, classes, weights, splits, train, policy.crop_mode)
    criterion = make_loss(args, weights, options, classes, splits.train.targets, source)
    plan = make_planner(source, augment, local_augment, args.global_crops)
    standardize_teachers(args, run, criterion, source, train, plan)
    build_projectors(criterion, model, preprocess, source, train, augment, plan)
    updater = make_updater(args, model, criterion, precision, len(train), labelled)

    # run folder; the teacher is judged before it teaches
    about = {"classes": classes, "method": args.method or loss_words(weights), "teacher": source.described}
    content = run_content("distill", splits, preprocess, policy, flags, **about)
    recorder = Recorder(run, updater, content=content, criterion=criterion, **cli.options(Recorder, flags))
    if args.dry_run:
        return show_dry_run(args, recorder, splits, [train, val], preprocess, weights_from, source, neighbours)
    judge = make_judge(recorder, source, preprocess, labelled, neighbours)
    log_teacher(args, run, source, splits, val, neighbours)
    recorder.open(flags, args.seed)
    lines = start_lines(model, preprocess, splits, train, precision, weights_from)
    run.log("\n".join(lines + sum_lines(args.method, weights, options)))
    draw_samples(args, train, source, augment, local_augment, plan)

    with recorder:
        for epoch in range(recorder.start_epoch, args.epochs + 1):
            model.train()
            criterion.warm_up(epoch, args.distillation_warmup_epochs)
            for batch in recorder.batches(train, epoch, plan):  # G * B rows
                targets = source.targets(batch)  # {"logits": (G * B, C), ...}, of the same views
                inputs = preprocess.inputs(batch, augment(batch, args.resolution))  # "image" (G * B, 3, R, R)
                local = [preprocess(crop(batch, args.local_resolution)) for crop in local_augment]  # N of (B, 3, r, r)
                labels = batch["targets"]  # {task: (G * B,)}
                with precision.autocast():
                    out, loss = updater.parallel(inputs, targets, labels, batch["batch_targets"], local)
                updater(loss)
                accuracy = {"accuracy": task_accuracy(out, labels)} if labelled else {}
                recorder.meter.add(loss=loss, **accuracy, **criterion.terms)
            recorder.end_epoch(judge("val", val, epoch))
            if recorder.stopped_early:
                break

    loaders = {"val": val}
    if splits.test is not None:
        loaders["test"] = Loader(splits.test, args.batch_size, precision.device, cache=args.cache, workers=args.workers)
    judged = {"teacher_logits": source.logits} if labelled else {"judge": judge}
    write_results(recorder, splits, loaders, preprocess, script="distill.py", **judged)


if __name__ == "__main__":
    cli.run_script(main, build_parser)
