"""What teaches a student: a frozen model that is run, or what one has left in a store; and what it is worth.

Needs from common: augment.py, cli.py, data.py, embeddings.py, evaluation.py, images.py, loader.py, losses.py,
metrics.py, models.py, probes.py,
training.py (and what these need) and torch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from common import cli
from common.augment import Policy
from common.data import DATASETS, load_splits
from common.embeddings import Store, StoredTeacher, difference, split_folder
from common.evaluation import chance_auc, live_teacher, outputs, predict, task_metrics
from common.images import TASK, in_words
from common.loader import Loader
from common.losses import FEATURE_TERMS, LOGIT_TERMS, RELATIONS, uses
from common.metrics import classification
from common.models import build_model
from common.probes import knn
from common.training import Preprocess, file_sha256, load_model, need_head, start_weights, use_compile

NEIGHBOURS = 20  # of --eval-dataset


class Source(NamedTuple):
    """What teaches: a frozen model or what one has left in a store.  Nothing that follows asks which."""

    # (batch, split) -> {"logits": (B, C), "embedding": (B, D), "tokens": (B, T, D), "features": {layer: (B, C_l, H_l,
    # W_l)}}
    targets: Callable
    choose_view: Callable  # batch -> the batch with the views that are shown
    # (split, loader) -> {task: (N, C)} of the plain images, or None where no head is trained for these classes
    logits: Callable
    model: tuple  # (model, Preprocess) of a live one, else None
    resolution: int  # the teacher's input side in pixels
    title: str
    described: dict  # for results.json


def open_stores(args):
    """{split: Store} of --teacher-embeddings, or None; the run's data are the store's, other flags are refused."""
    if not args.teacher_embeddings:
        if args.num_views:
            raise cli.UserError("--num-views needs --teacher-embeddings DIR")
        return None
    for name in (
        "teacher_checkpoint",
        "teacher_model",
        "teacher_resolution",
        "teacher_pooling",
        "teacher_pretrained",
        "teacher_weights",
        *Policy.__dataclass_fields__,
        "augment",
        "no_augment",
    ):
        if getattr(args, name) is not None and getattr(args, name) is not False:  # 0 is given
            flag = "--" + name.replace("_", "-")
            raise cli.UserError(
                f"{flag} and --teacher-embeddings contradict each other: teacher and views are the stored ones"
            )
    stores = {"train": Store(split_folder(args.teacher_embeddings, "train"))}
    meta = stores["train"].meta
    for split in ("val",) if meta["dataset"] == "unlabeled" else ("val", "test"):
        stores[split] = Store(split_folder(args.teacher_embeddings, split))
    for store in stores.values():
        differs = difference({**store.meta, **{key: meta[key] for key in ("split", "sha256", "count")}}, meta)
        if differs:
            raise cli.UserError(f"{store.folder} and {stores['train'].folder} are of different extractions ({differs})")
    for name in ("dataset", *cli.STORED_FLAGS):
        own = getattr(args, name)
        if own is not None and own is not False and own != meta.get(name):
            raise cli.UserError(f"--{name.replace('_', '-')} {own}: the embeddings were made with {meta.get(name)}")
        setattr(args, name, meta.get(name))
    args.data_root = args.data_root or meta.get("data_root")
    return stores


def stored_source(args, stores, splits, weights):
    """Source of --teacher-embeddings."""
    of_maps = [f"--{name}-weight 0" for name in FEATURE_TERMS if weights[name]]
    if of_maps:
        raise cli.UserError(
            f"--teacher-embeddings hold no feature maps: --method {args.method} needs a teacher, or {' '.join(of_maps)}"
        )
    of_terms = {
        **dict.fromkeys(("embedding", "cls", "projection", *RELATIONS), "embeddings"),
        "patch": "tokens",
        **dict.fromkeys(LOGIT_TERMS, "logits"),
    }
    wanted = list(dict.fromkeys(name for term, name in of_terms.items() if weights[term]))
    datasets = {split: getattr(splits, split) for split in stores}
    meta = stores["train"].meta
    kept = {key: meta["teacher"][key] for key in ("name", "family", "parameters", "checkpoint", "sha256")}
    stored = StoredTeacher(stores, datasets, wanted, args.num_views, args.seed)
    described = {
        **kept,
        "embeddings": args.teacher_embeddings,
        "num_views": stored.num_views,
        "resolution": meta["resolution"],
    }
    title = (
        f"teacher {kept['name']}: {kept['parameters']:,} parameters, {meta['resolution']} px, {stored.num_views} "
        "stored views"
    )
    if args.global_crops > stored.num_views:
        raise cli.UserError(
            f"--global-crops {args.global_crops}: {args.teacher_embeddings} gives {stored.num_views} views of an image"
        )
    judged = splits.classes and (
        uses(weights, LOGIT_TERMS) or meta["teacher"]["weights"] == "checkpoint"
    )  # others have no trained head
    return Source(
        stored.targets,
        stored.choose_view,
        lambda split, loader: by_task(stored.logits(split)) if judged else None,
        None,
        meta["resolution"],
        title,
        described,
    )


def by_task(logits):
    return None if logits is None else {TASK: logits}


def load_teacher(args, path, checkpoint, classes, resolution, info):
    """(model, Preprocess, dict for results.json); the model on the CPU; classes: [] where no logits are needed."""
    if checkpoint is None:
        if isinstance(classes, dict):
            raise cli.UserError(
                f"--teacher-model {args.teacher_model} has no head for each of {', '.join(classes)}: give "
                "--teacher-checkpoint, "
                "or a method without the teacher's logits"
            )
        side = args.teacher_resolution or resolution
        teacher = build_model(args.teacher_model, len(classes), side, pretrained=args.teacher_pretrained)
        weights = start_weights(teacher, args.teacher_weights, flag="--teacher-weights")
        if classes:
            need_head(teacher, classes, args.teacher_weights)
        preprocess = Preprocess.of_new(teacher, side, args.dataset, info)
        sha = file_sha256(args.teacher_weights) if args.teacher_weights else None
    else:
        if classes and checkpoint["classes"] != classes:
            raise cli.UserError(
                f"teacher and data have different classes: {path} knows {in_words(checkpoint['classes'])}, "
                f"{args.dataset} has {in_words(classes)}"
            )
        teacher, preprocess = load_model(checkpoint, resolution=args.teacher_resolution, path=path)
        sha = file_sha256(path)
        weights = f"weights of {path}"
    described = {"name": teacher.name, "family": teacher.family, "parameters": teacher.num_parameters}
    described.update(checkpoint=path, sha256=sha, weights=weights, normalization=str(preprocess))
    return teacher, preprocess, described


def need_image_model(model, flag):
    if model.kind != "image":
        raise cli.UserError(f"{flag} is for image models alone: {model.name} reads texts too, and fuses both")


def live_source(args, weights, path, checkpoint, splits, resolution, augment, precision, interrupts):
    """Source of a teacher that is run."""
    of_logits = uses(weights, LOGIT_TERMS)
    teacher, preprocess, described = load_teacher(
        args, path, checkpoint, splits.classes if of_logits else [], resolution, DATASETS[args.dataset]
    )
    teacher.set_feature_layers(args.teacher_layer)
    if args.teacher_pooling:
        need_image_model(teacher, "--teacher-pooling")
        teacher.set_pooling(args.teacher_pooling)
    preprocess.prepare(splits.train, splits.val)
    teacher.with_tokens = bool(weights["patch"])
    teacher.to(precision.device).to(memory_format=torch.channels_last)
    targets = live_teacher(teacher, preprocess, augment, precision)
    if use_compile(args.compile, precision.device):
        teacher.compile()
    title = f"teacher {described['name']}: {described['parameters']:,} parameters, {preprocess.resolution} px"
    judged = splits.classes and (of_logits or checkpoint and checkpoint["classes"] == splits.classes)
    return Source(
        lambda batch, split="train": targets(batch),
        lambda batch: batch,
        lambda split, loader: predict(teacher, loader, preprocess, precision, interrupts) if judged else None,
        (teacher, preprocess),
        preprocess.resolution,
        title,
        described,
    )


class Neighbours:
    """--eval-dataset: accuracy of the nearest images of its train on its val, by a model's embeddings."""

    def __init__(self, args, device, precision, interrupts):
        same = args.eval_dataset == args.dataset and args.eval_data_root in (None, args.data_root)
        options = (
            cli.split_flags(vars(args))
            if same
            else {name: getattr(args, name) for name in ("split_seed", "decode_size", "on_bad_image")}
        )
        options = {name: value for name, value in options.items() if name not in ("limit_train", "limit_labels")}
        root = args.eval_data_root or (args.data_root if same else None)
        self.splits = load_splits(args.eval_dataset, cli.data_root(root), splits=("train", "val"), **options)
        self.loaders = [
            Loader(part, args.batch_size, device, cache=args.cache, workers=args.workers)
            for part in (self.splits.train, self.splits.val)
        ]
        self.precision, self.interrupts = precision, interrupts

    def __call__(self, model, preprocess):
        """{"accuracy", "balanced_accuracy", "auc"}"""
        found = [
            outputs(model, loader, preprocess, self.precision, ("embedding",), self.interrupts)["embedding"]
            for loader in self.loaders
        ]
        train, labels, val = (
            torch.from_numpy(v).to(self.precision.device) for v in (found[0], self.splits.train.labels, found[1])
        )
        votes = knn(train, labels, val, len(self.splits.classes), k=(NEIGHBOURS,))
        found = classification(next(iter(votes.values())).cpu().numpy(), self.splits.val.labels)
        return {name: found[name] for name in ("accuracy", "balanced_accuracy", "auc")}


def judge_teacher(source, logits, splits, neighbours, args):
    """Note the teacher's val metrics and refuse one at chance level; returns a line for the log."""
    text = source.title
    if logits is not None:
        source.described["val"] = task_metrics(logits, splits.val.targets, positive=splits.positive)
        text += f", val accuracy {source.described['val']['accuracy']:.4f}"
        for task in logits:
            auc, how = source.described["val"]["auc" if len(logits) == 1 else f"{task}_auc"], f"in {task} "
            text += check_teacher(auc, splits.val.targets[task], args.allow_weak_teacher, "" if task == TASK else how)
    if neighbours and source.model:
        source.described["knn"] = neighbours(*source.model)
        found, eval_set = source.described["knn"], neighbours.splits
        text += f", k-NN accuracy {found['accuracy']:.4f} on val of {eval_set.name}"
        text += check_teacher(found["auc"], eval_set.val.labels, args.allow_weak_teacher, "by k-NN ")
    if "val" in source.described or "knn" in source.described:
        return text
    why = (
        "logits of a trained head are not stored"
        if source.model is None
        else "it has no head for these classes, --eval-dataset judges it by k-NN"
    )
    return f"{text}; it is not judged: {why}"


def check_teacher(auc, labels, allow_weak, how=""):
    """Refuse a teacher whose AUC on val is that of guessing; returns words for the log.

    Not by accuracy: under imbalance a teacher that ranks well may name one class alone.
    """
    chance = chance_auc(labels)
    if chance >= 1:
        return f", {how}not judged: {len(labels)} val images are too few"
    figure = f"guessing gives up to {chance:.4f}"
    figure = "no AUC, its outputs are not finite" if auc is None else f"AUC {auc:.4f}, {figure}"
    if (auc is None or auc < chance) and not allow_weak:
        raise cli.UserError(
            f"the teacher is {how}no better than chance on val ({figure}): wrong checkpoint, "
            "classes or preprocessing? --allow-weak-teacher goes on"
        )
    return f", {how}{figure}"
