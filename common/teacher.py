"""What teaches a student: a frozen model that is run, or what one has left in a store; and what it is worth.

Needs data.py, loader.py, losses.py, metrics.py, models.py, run.py and training.py of `common`, torch and numpy
(embeddings.py for stored embeddings, probes.py for k-NN during training, several.py for several teachers).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common.augment import Augmenter, Policy
from common.data import TASK, DatasetInfo, Splits, are_findings, in_words
from common.loader import Loader
from common.losses import DistillationLoss, loss_words, terms_on
from common.metrics import classification
from common.models import build_model
from common.run import UserError, file_sha256, gather_objects, load_checkpoint, optional, stops, world_size
from common.training import (
    Precision,
    Preprocess,
    broadcast,
    live_teacher,
    load_model,
    model_outputs,
    need_head,
    place,
    predict_logits,
    start_weights,
    task_metrics,
)

TEACHER_KINDS = ("teacher_checkpoint", "teacher_model", "teacher_embeddings")  # flags that name teachers, in this order
TEACHER_FLAGS = (  # that each teacher may have of its own
    *TEACHER_KINDS,
    *("teacher_pretrained", "teacher_weights", "teacher_resolution", "teacher_pooling", "teacher_layer", "num_views"),
)


class Found(NamedTuple):
    """A teacher, before data are read."""

    flags: dict  # its values of TEACHER_FLAGS
    stores: dict | None  # of a stored one, see `open_stores`
    path: str | None  # of a checkpoint, and what it holds
    checkpoint: dict | None


class Source(NamedTuple):
    """A frozen model, what one has left in a store, or several of these.  Nothing that follows asks which."""

    # (batch, split) -> {"logits": (B, C), "embedding": (B, D), "tokens": (B, T, D), "features": {layer: (B, C, H, W)}}
    targets: Callable
    choose_view: Callable  # training batch, or a plan of many, -> that of the views that are shown
    # (split, loader) -> {task: (N, C)} of the plain images, made once, or None without a head for these classes
    logits: Callable
    model: tuple | None  # (model, Preprocess) of a live one
    resolution: int  # the teacher's input side in pixels
    title: str  # for the log
    described: dict  # for results.json
    has_head: bool  # whether its logits are those of the data's classes
    parts: tuple = ()  # of several teachers, the Source of each

    @property
    def teachers(self) -> dict:
        """{what its metrics' names end in: Source} of each teacher: "" of the only one, else "_1", "_2", ..."""
        return {f"_{number}": one for number, one in enumerate(self.parts, 1)} or {"": self}


# --------------------------------------------------------------------------------------------------------------- live


def find_checkpoint(
    default: str,
    *,
    teacher_checkpoint: str | None,
    teacher_model: str | None,
    teacher_pretrained: bool,
    teacher_weights: str | None,
) -> tuple[str | None, dict | None]:
    """(path, checkpoint) of the teacher, or (None, None) where it is a --teacher-model.  Raises UserError.

    default: the checkpoint where neither is given.
    """
    path = teacher_checkpoint
    if teacher_model:
        if teacher_pretrained and teacher_weights:
            raise UserError(
                "--teacher-pretrained and --teacher-weights cannot be combined: the hub's weights or a file's"
            )
        if not teacher_pretrained and not teacher_weights:
            raise UserError("--teacher-model needs weights: --teacher-pretrained or --teacher-weights FILE")
        return None, None
    if teacher_pretrained or teacher_weights:
        raise UserError("--teacher-pretrained and --teacher-weights need --teacher-model NAME")
    if path is None:
        path = default
        try:
            open(path, "rb").close()
        except FileNotFoundError:
            raise UserError(
                f"no --teacher-checkpoint, and {path} is missing: python train_teacher.py makes it"
            ) from None
    return path, load_checkpoint(path)


def load_teacher(
    path: str | None,
    checkpoint: dict | None,
    classes: list | dict,
    info: DatasetInfo,
    crop_mode: str,
    must_know: bool = True,
    *,
    dataset: str,
    resolution: int,
    teacher_model: str | None = None,
    teacher_pretrained: bool = False,
    teacher_weights: str | None = None,
    teacher_resolution: int | None = None,
) -> tuple[nn.Module, Preprocess, dict]:
    """(model on the CPU, its Preprocess, dict for results.json); keywords are the flags.

    path, checkpoint: as `find_checkpoint` returns them; classes: [] where no logits are needed; must_know: refuse one
    that knows other classes; resolution: the student's, which a model by name takes too.  Raises UserError.
    """
    if checkpoint is None:
        if isinstance(classes, dict):
            raise UserError(
                f"--teacher-model {teacher_model} has no head for each of {', '.join(classes)}: give "
                "--teacher-checkpoint, or a method without the teacher's logits"
            )
        side = teacher_resolution or resolution
        teacher = build_model(teacher_model, len(classes), side, pretrained=teacher_pretrained)
        weights = start_weights(teacher, teacher_weights, flag="--teacher-weights")
        if classes and must_know:
            need_head(teacher, classes, teacher_weights)
        preprocess = Preprocess.for_model(teacher, side, dataset, info, crop_mode)
    else:
        if classes and must_know and checkpoint["classes"] != classes:
            raise UserError(
                f"teacher and data have different classes: {path} knows {in_words(checkpoint['classes'])}, "
                f"{dataset} has {in_words(classes)}"
            )
        teacher, preprocess = load_model(checkpoint, resolution=teacher_resolution, path=path)
        weights = f"weights of {path}"
    file = path or teacher_weights
    described = {
        "name": teacher.name,
        "family": teacher.family,
        "parameters": teacher.num_parameters,
        "checkpoint": path,
        "sha256": file_sha256(file) if file else None,
        "weights": weights,
        "normalization": str(preprocess),
    }
    return teacher, preprocess, described


def need_image_model(model: nn.Module, flag: str) -> None:
    if model.kind != "image":
        raise UserError(f"{flag} is for image models alone: {model.name} reads texts too, and fuses both")


def live_source(
    teacher: nn.Module,
    preprocess: Preprocess,
    described: dict,
    loss_weights: dict,
    splits: Splits,
    augment: Augmenter,
    precision: Precision,
    has_head: bool,
    *,
    teacher_pooling: str | None = None,
    teacher_layer: list = (),
    compile: str = "auto",
) -> Source:
    """Source of a teacher that is run, as `load_teacher` returns it; keywords are the flags.

    has_head: whether its logits are those of the data's classes.  Raises UserError.
    """
    teacher.set_feature_layers(teacher_layer)
    if teacher_pooling:
        need_image_model(teacher, "--teacher-pooling")
        teacher.set_pooling(teacher_pooling)
    preprocess.prepare(splits.train, splits.val)
    teacher.with_tokens = bool(terms_on(loss_weights, "tokens"))
    targets = live_teacher(teacher, preprocess, augment, precision)
    plain_view = Augmenter(Policy(crop_mode=augment.policy.crop_mode), 0)  # as the student's, planned and rendered once
    plain = live_teacher(teacher, preprocess, plain_view, precision)
    place(teacher, precision.device, compile)

    @functools.cache
    def logits(split, loader):
        return predict_logits(teacher, loader, preprocess, precision) if has_head else None

    start = f"teacher: {described['weights']}; normalization: {preprocess}"
    size = f"{described['parameters']:,} parameters, {preprocess.resolution} px"
    return Source(
        lambda batch, split="train": (targets if split == "train" else plain)(batch),
        lambda batch: batch,
        logits,
        (teacher, preprocess),
        preprocess.resolution,
        f"{start}\nteacher {described['name']}: {size}",
        described,
        has_head,
    )


# -------------------------------------------------------------------------------------------------------------- stored


def open_stores(folder: str) -> dict:
    """{split: Store} of what extract_embeddings.py wrote to a folder, all of one extraction.  Raises UserError."""
    embeddings = optional("common.embeddings", "--teacher-embeddings")
    stores = {"train": embeddings.Store(embeddings.split_folder(folder, "train"))}
    meta = stores["train"].meta
    for split in ("val",) if meta["dataset"] == "unlabeled" else ("val", "test"):
        stores[split] = embeddings.Store(embeddings.split_folder(folder, split))
    for store in stores.values():
        theirs = {**store.meta, **{key: meta[key] for key in ("split", "sha256", "count")}}
        differs = embeddings.difference(theirs, meta)
        if differs:
            raise UserError(f"{store.folder} and {stores['train'].folder} are of different extractions ({differs})")
    return stores


def store_flags(stores: dict, flags: dict, stored_flags: tuple) -> dict:
    """{flag: value} of the data that the stores were made of; flags that say otherwise are refused.

    stored_flags: names of the flags that say what the samples are (data.STORED_FLAGS).  Raises UserError.
    """
    given = {name: value for name, value in flags.items() if value is not None and value is not False}  # 0 is given
    teachers = ("resolution", "pooling", "pretrained", "weights")
    for name in (*(f"teacher_{name}" for name in teachers), *Policy.__dataclass_fields__, "augment"):
        if name in given:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} and --teacher-embeddings cannot be combined: teacher and views are the stored ones"
            )
    meta = stores["train"].meta
    stored = {name: meta.get(name, flags.get(name)) for name in ("dataset", *stored_flags)}  # of an older store
    for name, value in stored.items():
        if given.get(name, value) != value:
            flag = f"--{name.replace('_', '-')} {given[name]}"
            raise UserError(f"{flag}: the embeddings were made with {value}")
    return {**stored, "data_root": flags["data_root"] or meta.get("data_root")}


def stored_source(
    stores: dict,
    loss_weights: dict,
    splits: Splits,
    device: torch.device,
    *,
    seed: int,
    teacher_embeddings: str,
    num_views: int | None = None,
    global_crops: int = 1,
) -> Source:
    """Source of stored embeddings; keywords are the flags.  Raises UserError."""
    on_maps = terms_on(loss_weights, "features")
    if on_maps:
        raise UserError(
            f"--teacher-embeddings {teacher_embeddings}: a store holds no feature maps, which the loss "
            f"{loss_words(loss_weights)} compares: use a live teacher, or a --loss without {' and '.join(on_maps)}"
        )
    arrays = {"embeddings": "embedding", "tokens": "tokens", "logits": "logits"}
    wanted = [array for array, output in arrays.items() if terms_on(loss_weights, output)]
    meta = stores["train"].meta
    teacher = meta["teacher"]
    stored = optional("common.embeddings", "--teacher-embeddings").StoredTeacher(
        stores, {split: getattr(splits, split) for split in stores}, wanted, num_views, seed, device
    )
    described = {
        **{key: teacher[key] for key in ("name", "family", "parameters", "checkpoint", "sha256")},
        "embeddings": teacher_embeddings,
        "num_views": stored.num_views,
        "resolution": meta["resolution"],
    }
    if global_crops > stored.num_views:
        raise UserError(
            f"--global-crops {global_crops}: {teacher_embeddings} gives {stored.num_views} views of an image"
        )
    # others have no trained head
    has_head = bool(splits.classes and (terms_on(loss_weights, "logits") or teacher["weights"] == "checkpoint"))

    @functools.cache
    def logits(split, loader):
        values = stored.logits(split) if has_head else None
        return None if values is None else {TASK: values}

    size = f"{teacher['parameters']:,} parameters, {meta['resolution']} px"
    title = f"teacher {teacher['name']}: {size}, {stored.num_views} stored views"
    return Source(stored.targets, stored.choose_view, logits, None, meta["resolution"], title, described, has_head)


# ------------------------------------------------------------------------------------------------------------ judgement


class Neighbours:
    """--eval-dataset: accuracy of the k nearest images of its train on its val, by a model's embeddings."""

    def __init__(
        self,
        splits: Splits,
        precision: Precision,
        k: int,
        *,
        epochs: int,
        eval_every: int,
        batch_size: int,
        cache: str = "auto",
        workers: int | None = None,
    ):
        self.knn = optional("common.probes", "--eval-dataset").knn
        self.splits, self.precision, self.k, self.epochs, self.every = splits, precision, k, epochs, eval_every
        self.loaders = [
            Loader(part, batch_size, precision.device, cache=cache, workers=workers)
            for part in (splits.train, splits.val)
        ]

    def __call__(self, model: nn.Module, preprocess: Preprocess) -> dict:
        """{"accuracy", "balanced_accuracy", "auc"}"""
        train, val = (
            model_outputs(model, loader, preprocess, self.precision, ("embedding",))["embedding"]
            for loader in self.loaders
        )
        tensors = (torch.from_numpy(v).to(self.precision.device) for v in (train, self.splits.train.labels, val))
        votes = self.knn(*tensors, len(self.splits.classes), k=(self.k,))
        scores = classification(next(iter(votes.values())).cpu().numpy(), self.splits.val.labels)
        return {name: scores[name] for name in ("accuracy", "balanced_accuracy", "auc")}

    def after_epoch(self, epoch: int, model: nn.Module, preprocess: Preprocess) -> dict:
        """{"knn": accuracy} of the student every --eval-every epochs and after the last, None in between."""
        due = epoch % self.every == 0 or epoch == self.epochs
        return {"knn": self(model, preprocess)["accuracy"] if due else None}


def judge_teacher(
    source: Source, logits: dict | None, splits: Splits, neighbours: Neighbours | None, allow_weak: bool
) -> str:
    """Note the teacher's val metrics and refuse one at chance level; returns what the log says.  Raises UserError."""
    text, about = source.title, source.described
    name = f"teacher {about.get('name')} ({about.get('embeddings') or about.get('checkpoint') or about.get('weights')})"
    if logits is not None:
        scores = about["val"] = task_metrics(logits, splits.val.targets, positive=splits.positive)
        text += f", val accuracy {scores['accuracy']:.4f}"
        if are_findings(splits.classes):  # together: of the rarest val has too few to judge by
            labels = splits.val.targets.values()
            text += check_teacher(scores["auc"], np.stack([*labels], 1), allow_weak, "on average ", name)
            logits = {}
        for task in logits:
            auc = scores["auc" if len(logits) == 1 else f"{task}_auc"]
            how = "" if task == TASK else f"in {task} "
            text += check_teacher(auc, splits.val.targets[task], allow_weak, how, name)
    if neighbours and source.model:
        scores = about["knn"] = neighbours(*source.model)
        text += f", k-NN accuracy {scores['accuracy']:.4f} on val of {neighbours.splits.name}"
        text += check_teacher(scores["auc"], neighbours.splits.val.labels, allow_weak, "by k-NN ", name)
    if "val" in about or "knn" in about:
        return text
    why = "it has no head for these classes, --eval-dataset judges it by k-NN"
    if source.model is None:
        why = "logits of a trained head are not stored"
    return f"{text}; it is not judged: {why}"


def check_teacher(auc: float | None, labels: np.ndarray, allow_weak: bool, how: str = "", name: str = "teacher") -> str:
    """Refuse a teacher whose AUC on val is that of guessing; returns words for the log.  Raises UserError.

    Not by accuracy: under imbalance a teacher that ranks well may name one class alone.
    """
    chance = chance_auc(labels)
    if chance >= 1:
        return f", {how}not judged: {len(labels)} val images are too few"
    figure = f"guessing gives up to {chance:.4f}"
    figure = "no AUC, its outputs are not finite" if auc is None else f"AUC {auc:.4f}, {figure}"
    if (auc is None or auc < chance) and not allow_weak:
        raise UserError(
            f"the {name} is {how}no better than chance on val ({figure}): wrong checkpoint, "
            "classes or preprocessing? --allow-weak-teacher goes on"
        )
    return f", {how}{figure}"


def chance_auc(labels: np.ndarray) -> float:
    """The AUC that guesses on `labels` (N,) stay below: 0.5 and two standard deviations; infinity for one class alone.

    Of guesses the AUC of n1 against n0 has the variance (n1 + n0 + 1) / (12 n1 n0), Mann and Whitney 1947.  The mean
    over classes deviates by the mean of their deviations at most, however their scores depend on each other; so does
    that over findings, labels (N, F).
    """
    if labels.ndim == 2:
        return float(np.mean([chance_auc(finding) for finding in labels.T]))
    counts = np.unique(labels, return_counts=True)[1].astype(float)
    others = len(labels) - counts
    return math.inf if len(counts) < 2 else 0.5 + 2 * float(np.sqrt((len(labels) + 1) / (12 * counts * others)).mean())


@torch.no_grad()
def distillation_loss(
    model: nn.Module,
    criterion: DistillationLoss,
    targets: Callable,
    loader: Loader,
    preprocess: Preprocess,
    precision: Precision,
) -> float:
    """Mean loss of a split's plain images without its cross-entropy: what a run without labels is judged by.

    A last batch of one image is left out where the loss compares images.  criterion: its projectors have no average
    under --ema; targets: of the teacher, for batches of this split.
    """
    was_training, total, count = model.training, 0.0, 0
    model.eval(), criterion.eval()
    broadcast(model.buffers())
    for number, batch in enumerate(loader.batches(plan=preprocess.plain_view.plan), 1):
        if number <= len(loader) // world_size():  # as many in each process
            stops.check()
        with precision.autocast():
            out = model(preprocess.plain(batch))
        valid = batch["valid"]
        if valid == 1 and criterion.compares:
            continue
        loss = criterion(*(_first(side, valid) for side in (out, targets(batch), batch["targets"])), ce=False)
        total, count = total + loss * valid, count + valid
    model.train(was_training), criterion.train()
    parts = gather_objects((float(total), count))
    stops.check()
    return sum(part[0] for part in parts) / sum(part[1] for part in parts)


def _first(outputs: dict, count: int) -> dict:
    """The first `count` samples of a model's output."""
    return {k: _first(v, count) if isinstance(v, dict) else v[:count] for k, v in outputs.items()}


def several_views(batch: dict, count: int) -> dict:
    """A training batch `count` times over, or a plan of many: of view v the views count * (v - 1) + 1 to count * v.

    What is (..., B) becomes (..., count * B), crop after crop.
    """
    if count == 1:
        return batch
    axis = batch["view"].dim() - 1
    repeated = {key: torch.cat([batch[key]] * count, axis) for key in ("index", "key", "size") if key in batch}
    repeated["view"] = torch.cat([count * (batch["view"] - 1) + 1 + g for g in range(count)], axis)
    repeated["targets"] = {task: torch.cat([labels] * count, axis) for task, labels in batch["targets"].items()}
    return {**batch, **repeated}
