"""What trains and judges a model: device, precision, input, cross-entropy, optimizer, predictions, results of a run.

Needs augment.py, data.py, loader.py, metrics.py, models.py and run.py of `common`, torch and numpy (image_text.py and
multimodal.py for models of images and texts, distributed.py for several processes).  The epoch loop itself stands in
each script.
"""

import contextlib
import copy
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from common import metrics
from common.augment import Augmenter, Policy, normalize
from common.data import TASK, WITH_TEXTS, DatasetInfo, Splits, are_findings, logits_name, tasks_of
from common.loader import Loader
from common.models import build_model, multiply_adds
from common.run import (
    CHECKPOINT,
    Recorder,
    UserError,
    atomic_write,
    distributed,
    file_sha256,
    gather_objects,
    launched_processes,
    load_checkpoint,
    load_tensors,
    optional,
    read_json,
    stops,
    world_size,
    write_array,
    write_json,
)

CHECK_EVERY = 50  # steps between looks at the device for a loss that is not finite


# ----------------------------------------------------------------------------------- device, precision and processes


def select_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N, mps -> torch.device that is there; joins the other processes.  Raises UserError."""
    processes = launched_processes()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and processes.size > 1 and torch.cuda.device_count() > 1:  # else srun shows each its own
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not there: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if processes.size > 1:
        distributed().join_processes(device)
    return device


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory since the start: the GPU's, else the process's resident set."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


class Precision:
    """Mixed precision: `with precision.autocast():` around forward passes, `precision.scaler` around fp16's
    gradients."""

    def __init__(self, amp: str, device: torch.device):
        if amp == "auto":
            amp = "off"
            if device.type == "cuda":
                amp = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        if amp == "fp16" and device.type != "cuda":
            raise UserError(f"--amp fp16 needs a GPU; on {device.type} use bf16 or off")
        self.name, self.device = amp, device
        self.dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self):
        if self.name == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def place(model: nn.Module, device: torch.device, compile: str = "off") -> None:
    """Move a model to the device, for convolutions over channels-last images, and compile it (auto: on a GPU)."""
    model.to(device).to(memory_format=torch.channels_last)
    if compile == "on" or (compile == "auto" and device.type == "cuda"):
        model.compile()


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite these tensors with rank 0's."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


# -------------------------------------------------------------------------------------------- a model and its input


@dataclass
class Preprocess:
    """A model's own input: side in pixels, mean and std, and, of a model that reads texts, its tokens.

    `preprocess(pixels)`: (B, 3, R, R) in 0..1 -> normalized; `preprocess.inputs(batch, pixels)` -> what the model
    takes.
    """

    resolution: int
    mean: list
    std: list
    source: str = "the checkpoint"  # whose mean and std these are
    crop_mode: str = "squash"  # of the plain image, see augment.Policy; of checkpoints that do not say it

    @classmethod
    def for_model(cls, model, resolution: int, dataset: str, info: DatasetInfo, crop_mode: str = "center"):
        """For a model that comes from no checkpoint: what its weights expect, else what suits the dataset."""
        if model.mean:
            mean, std, source = model.mean, model.std, f"the weights of {model.name}"
        else:
            mean, std, source = info.mean, info.std, dataset
            if getattr(model, "known_classes", None) is not None:
                source += f", assumed: the weights of {model.name} come without mean and std"
        return cls(resolution, mean, std, source, crop_mode).reads(model)

    def __str__(self):
        mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}, of {self.source}"

    def __post_init__(self):
        self.mean, self.std = [float(v) for v in self.mean], [float(v) for v in self.std]
        self._tensors, self.tokens = None, None
        self.plain_view = Augmenter(Policy(crop_mode=self.crop_mode), 0)

    def reads(self, model: nn.Module):
        """Take the tokenizer of a model that reads texts."""
        if getattr(model, "tokenizer", None) is not None:
            image_text = optional("common.image_text", "a model of images and texts")
            self.tokens = image_text.TokenBatches(model.tokenizer, model.max_length)
        return self

    def prepare(self, *datasets) -> None:
        """Tokenize the texts of these datasets, once.  Raises UserError where they have none."""
        for dataset in datasets if self.tokens else ():
            self.tokens.prepare(dataset)

    def inputs(self, batch: dict, pixels: torch.Tensor) -> dict:
        """{"image": (B, 3, R, R)}, and {"input_ids", "attention_mask": (B, L)} for a model that reads texts."""
        return {"image": self(pixels), **(self.tokens(batch, pixels.device) if self.tokens else {})}

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._tensors is None or self._tensors[0].device != pixels.device:
            self._tensors = [torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std)]
        return normalize(pixels, *self._tensors).contiguous(memory_format=torch.channels_last)

    def plain(self, batch: dict) -> dict:
        """The model's input from a raw batch without augmentation."""
        return self.inputs(batch, self.plain_view(batch, self.resolution))

    def to_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"resolution": self.resolution, "mean": self.mean, "std": self.std, "crop_mode": self.crop_mode}


def load_model(
    checkpoint: dict, device="cpu", resolution: int | None = None, path: str = "the checkpoint"
) -> tuple[nn.Module, Preprocess]:
    """(model in eval mode, Preprocess) from a checkpoint alone; no hub is asked.  Raises UserError, ModelError."""
    if checkpoint["kind"] not in ("image", "image_text"):
        raise UserError(f"{path} is of the unknown kind {checkpoint['kind']!r}")
    build = build_model
    if checkpoint["kind"] == "image_text":
        build = optional("common.multimodal", path).build_image_text_model
    try:
        model, preprocess = build(**checkpoint["model_args"]), Preprocess(**checkpoint["preprocess"])
    except TypeError as error:
        raise UserError(f"{path} is of another version or damaged: {error}") from None
    try:
        model.load_state_dict(checkpoint["model"], strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit its architecture {model.name}, so it is damaged or an older version of these scripts "
            f"wrote it: {str(error).splitlines()[-1].strip()[:160]}"
        ) from None
    preprocess.reads(model)
    if resolution and resolution != preprocess.resolution:
        model.set_resolution(resolution)
        preprocess.resolution = resolution
    return model.to(device).to(memory_format=torch.channels_last).eval(), preprocess


def model_starter(texts: list | None) -> Callable:
    """What makes the new model: `start_model`, for images with texts that of multimodal.py."""
    if texts is not None:
        return optional("common.multimodal", "a model of images and texts").start_model
    return start_model


def start_model(
    classes: list | dict,
    resolution: int,
    texts: list | None = None,
    *,
    model: str,
    seed: int,
    patch_size: int | None = None,
    pretrained: bool = False,
    weights: str | None = None,
    init_checkpoint: str | None = None,
    freeze_backbone: bool = False,
    dropout: float = 0.0,
    local_crops: int = 0,
    freeze: list | None = None,
    image_model: str | None = None,
) -> tuple[nn.Module, str | None]:
    """(new model on the CPU, line for the log or None), from the weights of the seed; keywords are the flags.

    classes: of images with several findings {finding: its two}; texts: for models that read them alone.  Raises
    UserError, ModelError.
    """
    if freeze or image_model:
        flag = "--freeze" if freeze else "--image-model"
        raise UserError(f"{flag} is for images with texts (--dataset medpix, image_text)")
    torch.manual_seed(seed)
    findings = list(classes) if isinstance(classes, dict) else None
    options = {"dynamic": bool(local_crops), "findings": findings}
    new = build_model(model, len(classes), resolution, patch_size, pretrained, **options)
    note = start_weights(new, weights, init_checkpoint)
    new.set_dropout(dropout)
    if freeze_backbone:
        new.freeze_backbone()
    return new, note


def start_weights(
    model: nn.Module, weights: str | None = None, init_checkpoint: str | None = None, flag: str = "--weights"
) -> str | None:
    """Load --weights FILE or --init-checkpoint FILE into a new model; returns a line for the log, or None; flag: for
    messages."""
    if weights and init_checkpoint:
        raise UserError("--weights and --init-checkpoint cannot be combined: give one of them")
    path = weights or init_checkpoint
    if path:
        try:
            state = load_checkpoint(path) if init_checkpoint else load_tensors(path)
        except UserError as error:
            raise UserError(f"{'--init-checkpoint' if init_checkpoint else flag} {error}") from None
        taken = optional("common.weights", flag if weights else "--init-checkpoint").load_weights(model, state, path)
        if CHECKPOINT.keys() <= state.keys():  # of these scripts
            model.mean, model.std = state["preprocess"]["mean"], state["preprocess"]["std"]
    elif model.known_classes is None:
        return None
    else:
        taken = model.name
    wanted, known = model.build_args["num_classes"], model.known_classes
    new = f", with a new head of {wanted} classes: theirs has {known or 'none'}"
    return f"weights of {taken}" + new * (wanted not in (0, known))


def need_head(model: nn.Module, classes: list, weights: str | None) -> None:
    """Refuse a model by name whose logits are those of a new head; weights: the file, or None.  Raises UserError."""
    known = model.known_classes
    if known != len(classes):
        head = f"a head of {known} classes" if known else "no head that can be kept"
        raise UserError(
            f"{weights or model.name} has {head}, the data have {len(classes)}: its logits would mean nothing; "
            "fine-tune it with train_teacher.py, or do without its logits (--method rkd, mmd, tokens, ...)"
        )


def check_normalization(model: nn.Module, resolution: int, rows: int) -> None:
    """Refuse one image a step where a layer normalizes over the batch and would have one value.  Raises UserError.

    model: on the CPU; resolution: its input side in pixels; rows: images that go through it together.
    """
    if rows > 1:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            copy.deepcopy(model).train()(model.example(resolution, 1))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"BatchNorm of {model.name} needs two images at once at {resolution} px and gets one: take a larger "
            "--batch-size, fewer "
            " --accumulation-steps or fewer processes"
        ) from None


def check_mixing(policy: Policy, dataset: str, one_class: list[str] = (), local_crops: int = 0) -> None:
    """Refuse views of two images where they do not fit.  Raises UserError.

    one_class: terms of the loss that need one class an image; local_crops: their number.
    """
    reasons = {
        f"--dataset {dataset}": "its texts are of one image" if dataset in WITH_TEXTS else None,
        f"the term {' '.join(one_class)}": "it needs one class an image" if one_class else None,
        "--local-crops": "they show one image, the teacher's class token is of two" if local_crops else None,
    }
    for other, why in reasons.items() if policy.mixes else ():
        if why:
            raise UserError(f"mixed views (--mixup, --cutmix) and {other} cannot be combined: {why}")


# ----------------------------------------------------------------------------------------------------- supervised loss


def class_weights(spec: str, labels: Any, num_classes: int, of_task: str = "") -> torch.Tensor | None:
    """Class weights (C,) float32, or None: spec is "none", "balanced" or one number a class, separated by commas.

    balanced: N / (C * n_c), so that each class has the same sum and the mean over samples is 1 (King and Zeng 2001).
    Of two classes (1, w) and w = negatives / positives, as a positive weight, up to a factor.
    labels: (N,) of the training images; -1 is no label; of_task: for the message.
    """
    if spec == "none":
        return None
    if spec == "balanced":
        labels = torch.as_tensor(labels)
        labels = labels[labels >= 0]
        counts = torch.bincount(labels, minlength=num_classes)
        if not counts.all():
            empty = int(counts.argmin())
            raise UserError(f"--class-weights balanced: class number {empty}{of_task} has no training image")
        return len(labels) / (num_classes * counts.float())
    try:
        weights = torch.tensor([float(word) for word in spec.split(",")])
    except ValueError:
        raise UserError(f"--class-weights {spec}: give none, balanced or numbers with commas, as 1,4.5") from None
    if len(weights) != num_classes or not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
        raise UserError(
            f"--class-weights {spec}: give {num_classes} numbers, one a class, that are at least 0 and not all 0"
        )
    return weights


# (B,) int64; of mixed images (labels, others, share of the first)
Labels = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _of_labels(values, labels):
    """values(labels) (B,); of mixed images their mean, weighted by the shares."""
    if torch.is_tensor(labels):
        return values(labels)
    first, second, share = labels
    return share * values(first) + (1 - share) * values(second)


def cross_entropy(
    logits: torch.Tensor,
    labels: Labels,
    label_smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
    batch_labels: Labels | None = None,
) -> torch.Tensor:
    """Mean cross-entropy in nats.  logits (B, C); labels (B,) int64; weights (C,) of the classes: a weighted mean.

    A label of -1 is no label: the image does not count.  Without any label the loss is 0.
    Labels of mixed images are three tensors (B,): one label, the other, and the share of the first.  Their loss is that
    of probabilities, share at one class and 1 - share at the other, and so is their weight.
    batch_labels: those of the whole batch where `labels` are one process's or one accumulation step's part of it.  Its
    mean weight is the divisor, so that the mean over equal parts is the weighted mean of the whole batch.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    weights = None if weights is None else weights.to(logits)

    def loss(labels):  # (B,), 0 without a label
        return functional.cross_entropy(
            logits, labels, weights, ignore_index=-1, reduction="none", label_smoothing=label_smoothing
        )

    def weight(labels):
        counted = (labels >= 0).to(logits)
        return counted if weights is None else counted * weights[labels.clamp(min=0)]

    losses, counted = _of_labels(loss, labels), _of_labels(weight, labels if batch_labels is None else batch_labels)
    return losses.mean() / counted.mean().clamp(min=torch.finfo(logits.dtype).tiny)


def task_class_weights(spec: str, targets: dict, sizes: dict[str, int]) -> dict[str, torch.Tensor | None]:
    """{task: class_weights} of labels {task: (N,)} with {task: number of classes}."""
    words = {task: f" of {task}" if len(targets) > 1 else "" for task in targets}
    return {task: class_weights(spec, labels, sizes[task], words[task]) for task, labels in targets.items()}


def task_accuracy(out: dict, targets: dict[str, Labels]) -> torch.Tensor:
    """Accuracy on a batch's labelled images, mean over tasks: a scalar on the device, NaN without any label.

    out: a model's output; targets: {task: (B,)}, -1 is no label; of mixed images the first label counts.
    """
    firsts = {task: labels if torch.is_tensor(labels) else labels[0] for task, labels in targets.items()}
    shares = [(out[logits_name(task)].argmax(1) == first).sum() / (first >= 0).sum() for task, first in firsts.items()]
    return torch.stack(shares).mean()


def task_cross_entropy(
    out: dict,
    targets: dict[str, Labels],
    label_smoothing: float = 0.0,
    weights: dict[str, torch.Tensor | None] | None = None,
    batch_targets: dict[str, Labels] | None = None,
    task_weights: dict[str, float] | None = None,
) -> torch.Tensor:
    """Mean over tasks of `cross_entropy`, weighted by {task: weight} of task_weights where they are given.

    out: a model's output; the other arguments are {task: that of the task}.
    """
    weights, batch_targets, shares = weights or {}, batch_targets or targets, task_weights or {}
    losses = {
        task: cross_entropy(out[logits_name(task)], labels, label_smoothing, weights.get(task), batch_targets[task])
        for task, labels in targets.items()
    }
    if len(losses) == 1:
        return losses.popitem()[1]
    shares = {task: shares.get(task, 1.0) for task in losses}
    return sum(shares[task] * loss for task, loss in losses.items()) / sum(shares.values())


# --------------------------------------------------------------------------------------------- optimizer and schedule


class NonFiniteLoss(Exception):
    """The loss overflowed or became NaN: a fault of the run, not of the command line."""

    exit_code = 1


def make_optimizer(
    model: nn.Module,
    projectors: nn.Module | None = None,
    *,
    optimizer: str,
    lr: float | None = None,
    weight_decay: float | None = None,
    momentum: float = 0.9,
    nesterov: bool = False,
    projector_weight_decay: float = 0.0,
    backbone_lr: float | None = None,
) -> torch.optim.Optimizer:
    """Optimizer of the parameters, without decay on norms, biases, class tokens and positions; keywords are the flags.

    projectors: of the loss, with a decay of their own; lr: None is 0.02 for sgd, 0.001 for adam and adamw;
    weight_decay: None is 5e-4 for sgd, 0.05 for adamw, 0 for adam; backbone_lr: for the model's `backbones()`.  Raises
    UserError.
    """
    if nesterov and (optimizer != "sgd" or momentum == 0):
        other = f"--optimizer {optimizer}" if optimizer != "sgd" else "--momentum 0"
        raise UserError(f"--nesterov and {other} cannot be combined: it is a kind of momentum of sgd")
    if backbone_lr is not None and not hasattr(model, "backbones"):
        raise UserError("--backbone-lr is for image + text models")
    if lr is None:
        lr = 0.02 if optimizer == "sgd" else 1e-3
    if weight_decay is None:
        weight_decay = {"sgd": 5e-4, "adamw": 0.05, "adam": 0.0}[optimizer]
    scales = {}  # parameter of a backbone: its share of the rate
    if backbone_lr is not None:
        scales = {p: backbone_lr / lr for side in model.backbones().values() for p in side.parameters()}
    groups = {}  # (decay, share of the rate): parameters
    for module, decay in ((model, weight_decay), (projectors or nn.Module(), projector_weight_decay)):
        undecayed = set()
        for prefix, child in module.named_modules():
            if hasattr(child, "no_weight_decay"):
                undecayed |= {f"{prefix}.{name}" if prefix else name for name in child.no_weight_decay()}
        for name, p in module.named_parameters():
            if p.requires_grad:
                kind = (0.0 if p.ndim <= 1 or name in undecayed else decay, scales.get(p, 1.0))
                groups.setdefault(kind, []).append(p)
    groups = [{"params": params, "weight_decay": decay, "scale": scale} for (decay, scale), params in groups.items()]
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer](groups, lr=lr, fused=fused)


class Schedule:
    """Learning rate by step: linear warm-up, then cosine to 0, multistep, plateau or constant; keywords are the flags.

    peak: the optimizer's learning rate.  Raises UserError.
    """

    def __init__(
        self,
        peak: float,
        steps_per_epoch: int,
        *,
        schedule: str,
        epochs: int,
        warmup_epochs: float = 0.0,
        milestones: list | None = None,
        gamma: float = 0.1,
        plateau_patience: int = 5,
    ):
        if warmup_epochs > epochs:
            raise UserError(f"--warmup-epochs {warmup_epochs} is longer than --epochs {epochs}")
        if milestones and schedule != "multistep":
            raise UserError(f"--milestones and --schedule {schedule} cannot be combined")
        if schedule == "multistep" and not milestones:
            raise UserError("--schedule multistep needs --milestones EPOCH ...")
        self.kind, self.peak, self.gamma, self.patience = schedule, peak, gamma, plateau_patience
        self.total, self.warmup = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch
        self.milestones = [m * steps_per_epoch for m in milestones or []]
        self.factor, self.waited = 1.0, 0  # of plateau

    def __call__(self, step: int) -> float:
        """The rate of step number `step`, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.total - self.warmup)))
        if self.kind == "multistep":
            return self.peak * self.gamma ** sum(step >= m for m in self.milestones)
        return self.peak * self.factor

    def end_epoch(self, gain: bool) -> None:
        """plateau: lower the rate after `patience` epochs without gain on val."""
        self.waited = 0 if gain else self.waited + 1
        if self.kind == "plateau" and self.waited >= self.patience:
            self.factor, self.waited = self.factor * self.gamma, 0

    def state_dict(self) -> dict:
        return {"factor": self.factor, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        self.factor, self.waited = state["factor"], state["waited"]


class Updater:
    """One optimizer step: rate, backward, clipping, step, average of the weights, and an eye on the loss.

    module: what the forward pass goes through, as `parallel`, if it is not the model; among several processes under
    DDP, which averages the gradients in a step's last call; unused: whether some parameters get no gradient.  Keywords
    are the flags; accumulation_steps: calls that make one step, each with a part of the batch.

    The number of the first step whose loss was not finite stays on the device and is read every 50 steps and before
    anything is saved, so that no step waits for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        precision: Precision,
        module: nn.Module | None = None,
        unused: bool = False,
        *,
        clip_grad: float = 0.0,
        ema: float = 0.0,
        accumulation_steps: int = 1,
    ):
        self.model, self.optimizer, self.schedule, self.precision = model, optimizer, schedule, precision
        self.clip_grad, self.accumulate, self.calls = clip_grad, accumulation_steps, 0
        self.steps, self.lr = 0, schedule(0)
        self.parallel = module or model
        if world_size() > 1:
            self.parallel = distributed().data_parallel(self.parallel, precision.device, unused)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.first_bad = torch.full((), 2**31 - 1, dtype=torch.int32, device=self.parameters[0].device)
        self.average = None
        if ema:
            from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))
        self._average_gradients()

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that are judged and kept: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def _average_gradients(self):
        """DDP averages in the forward and backward pass that completes a step, and only there."""
        if hasattr(self.parallel, "require_backward_grad_sync"):
            self.parallel.require_backward_grad_sync = (self.calls + 1) % self.accumulate == 0

    def __call__(self, loss: torch.Tensor) -> None:
        """Backward, and after `accumulate` calls the optimizer's step."""
        step = torch.where(torch.isfinite(loss.detach()), 2**31 - 1, self.steps + 1)
        self.first_bad = torch.minimum(self.first_bad, step.to(torch.int32))
        self.precision.scaler.scale(loss / self.accumulate).backward()
        self.calls += 1
        self._average_gradients()
        if self.calls % self.accumulate == 0:
            self._step()

    def _step(self):
        self.lr = self.schedule(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("scale", 1.0)
        scaler = self.precision.scaler
        if self.clip_grad:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.steps += 1
        if self.steps % CHECK_EVERY == 0:
            self.check_finite()

    def check_finite(self) -> None:
        """Raise NonFiniteLoss where the loss of a step was not finite."""
        first = self.first_bad.clone()
        if world_size() > 1:
            dist.all_reduce(first, dist.ReduceOp.MIN)
        first = first.item()
        if first < 2**31 - 1:
            lr = self.schedule(first - 1)
            raise NonFiniteLoss(
                f"the loss of step {first} is not finite (learning rate {lr:.3g}): lower --lr, or use --warmup-epochs, "
                "--clip-grad or --amp off"
            )

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.steps = state["steps"]
        self.lr = self.schedule(max(0, self.steps - 1))  # of the last step: an epoch may have no step left to set it


# --------------------------------------------------------------------------------------------------------- predictions


def predict_logits(model: nn.Module, loader: Loader, preprocess: Preprocess, precision: Precision) -> dict:
    """{task: logits (N, C) float32 numpy} of a loader's samples on their plain images, the model in eval mode."""
    names = {task: logits_name(task) for task in loader.dataset.targets}
    outputs = model_outputs(model, loader, preprocess, precision, tuple(names.values()))
    return {task: outputs[name] for task, name in names.items()}


def model_outputs(
    model: nn.Module,
    loader: Loader,
    preprocess: Preprocess,
    precision: Precision,
    names: tuple = ("logits", "embedding"),
) -> dict:
    """{name: (N, ...) float32 numpy}: the model's outputs on a loader's plain images, in eval mode, without
    augmentation.

    Several processes share the batches; each has the outputs of all.
    """
    was_training, parts, rows = model.training, [], []
    model.eval()
    broadcast(model.buffers())  # each process's BatchNorm has seen other images
    with torch.no_grad():
        for number, batch in enumerate(loader.batches(plan=preprocess.plain_view.plan), 1):
            with precision.autocast():
                out = model(preprocess.plain(batch))
            parts.append([out[name][: batch["valid"]].float() for name in names])
            rows.append(batch["index"][: batch["valid"]])
            if number <= len(loader) // world_size():  # as many in each process
                stops.check()
    model.train(was_training)
    values = [torch.cat(part).cpu().numpy() for part in zip(*parts)]  # one array a name
    gathered = [part for part in gather_objects((torch.cat(rows).numpy(), values) if rows else None) if part]
    result = {}
    for number, name in enumerate(names):
        result[name] = np.empty((len(loader.dataset), *gathered[0][1][number].shape[1:]), np.float32)
        for index, values in gathered:
            result[name][index] = values[number]
    stops.check()
    return result


def live_teacher(
    teacher: nn.Module, preprocess: Preprocess, augment: Augmenter, precision: Precision
) -> Callable[[dict], dict]:
    """`targets(batch) -> dict`: the frozen teacher's outputs on its own input, made from the raw batch.

    no_grad, not inference_mode: outputs of the latter cannot be saved for backward.
    """
    teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def targets(batch):
        with precision.autocast():
            return teacher(preprocess.inputs(batch, augment(batch, preprocess.resolution)))

    return targets


def task_metrics(logits: dict, targets: dict, teacher: dict | None = None, positive: dict | None = None) -> dict:
    """Metrics of {task: logits (N, C)} against {task: labels (N,)}, and fidelity to a teacher's logits {task: (N, C)}.

    positive: {task: index} of the positive class of two (1).  Of several tasks <task>_<metric> for each, and <metric>,
    the mean of those that are defined: a finding that no image has, has no AUC.
    """
    scores = {}
    for task, values in logits.items():
        scores[task] = metrics.classification(values, targets[task], (positive or {}).get(task, 1))
        if teacher is not None:
            scores[task].update(metrics.fidelity(values, teacher[task], targets[task]))
    if len(scores) == 1:
        return scores[task]
    means = {}
    for name in scores[task]:
        values = [row[name] for row in scores.values() if row[name] is not None]
        means[name] = float(np.mean(values)) if values else None
    return {**means, **{f"{task}_{name}": value for task, row in scores.items() for name, value in row.items()}}


def uncertainty(logits: dict, dataset, splits: Splits) -> dict:
    """What stands beside a split's metrics: {"intervals": {metric: [low, high] or None}, "class_recalls": {class:
    recall or None}}.

    logits: {task: (N, C)}; splits: for classes and positive ones; of several tasks the keys are <task>_<metric> and
    <task>_<class>, and <metric> of their mean.  The intervals are of 95 %, by resampling lesions, patients or cases
    where the dataset has groups, else images.
    """
    resampled, recalls, means = {}, {}, {}
    for task, names in tasks_of(splits.classes).items():
        values, labels, prefix = logits[task], dataset.targets[task], f"{task}_" if len(logits) > 1 else ""
        chosen = (
            metrics.RESAMPLED if len(names) <= 100 else metrics.RESAMPLED[:2]
        )  # curves of 1000 classes take minutes
        positive = splits.positive.get(task, 1)
        numbers = metrics.resampled(values, labels, dataset.groups, names=chosen, positive=positive)
        resampled.update({prefix + name: values for name, values in numbers.items()})
        recalls.update({prefix + name: value for name, value in zip(names, metrics.class_recalls(values, labels))})
    for name in metrics.RESAMPLED if len(logits) > 1 else ():  # the same images are drawn for each task
        parts = [resampled.get(f"{task}_{name}") for task in logits]
        if all(part is not None for part in parts):
            means[name] = np.mean([part for part in parts if np.isfinite(part).any()] or parts, axis=0)
    intervals = {name: metrics.interval(values) for name, values in {**means, **resampled}.items()}
    return {"intervals": intervals, "class_recalls": recalls}


def brackets(interval: list) -> str:
    """[0.887, 0.917]"""
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def timed(run: Callable, device: torch.device, at_least: float = 1.0, most: int = 200) -> float:
    """Median seconds of run(), after two warm-up calls; at_least: seconds of all calls together."""
    seconds = []
    while len(seconds) < 5 or len(seconds) < most and sum(seconds[2:]) < at_least:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]))


def cost(model: nn.Module, resolution: int, batch_size: int, precision: Precision, at_least: float = 1.0) -> dict:
    """Size and speed of a model: parameters, multiply-adds of one image, images/s at batch_size, latency at batch 1.

    at_least: seconds of each of the two measurements.  A model that reads texts gets those of its max_length, the
    longest.
    """

    def seconds(count):
        batch = model.example(resolution, count)
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), precision.autocast():
            return timed(lambda: model(batch), precision.device, at_least)

    return {
        "parameters": model.num_parameters,
        "multiply_adds": multiply_adds(model, resolution),
        "images_per_second": round(batch_size / seconds(batch_size), 1),
        "latency_ms": round(1000 * seconds(1), 3),
    }


# ----------------------------------------------------------------------------------------------------- results of a run


def run_content(role: str, splits: Splits, preprocess: Preprocess, policy: Policy, flags: dict, **more: Any) -> dict:
    """The constant part of a run's checkpoints; see run.Recorder.  A distilled student keeps its teacher when tuned."""
    if start := flags.get("init_checkpoint"):
        origin = load_checkpoint(start)
        if "method" in origin:
            more = {"method": f"{origin['method']}, fine-tuned", "teacher": origin["teacher"], **more}
    return {
        "role": role,
        "classes": splits.classes,
        "positive": splits.positive,
        "preprocess": preprocess.to_dict(),
        "data": splits.describe(),
        "augment": policy.to_dict(),
        "flags": flags,
        **more,
    }


def start_lines(
    model: nn.Module,
    preprocess: Preprocess,
    splits: Splits,
    train: Loader,
    precision: Precision,
    weights_from: str | None = None,
) -> list[str]:
    """What the log says before the first epoch."""
    return [
        f"{model.name}: {model.num_parameters:,} parameters, {preprocess.resolution} px, "
        f"{precision.device}, {precision.name}",
        f"normalization: {preprocess}",
        f"{splits}, {train.cache_kind} cache",
        *filter(None, [weights_from]),
    ]


def write_results(
    recorder: Recorder,
    splits: Splits,
    loaders: dict[str, Loader],
    preprocess: Preprocess,
    *,
    script: str,
    teacher_logits: Callable | None = None,
    judge: Callable | None = None,
) -> None:
    """Judge last and best weights on val and test, once, at the end; write results.json, predictions, confusions.

    loaders: of "val" and "test"; teacher_logits: (split, loader) -> {task: (N, C)} or None; judge: (split, loader) ->
    metrics of a student without logits, and so without predictions.  Intervals and recalls of the classes are of the
    best weights alone.
    """
    run, model, precision = recorder.run, recorder.updater.model, recorder.updater.precision
    results = {
        "role": recorder.content["role"],
        "script": script,
        "method": recorder.content.get("method"),
        **(read_json(run.path("config.json")) if run.writes else {}),
        "dataset": splits.describe(),
        "model": {
            "name": model.name,
            "family": model.family,
            "parameters": model.num_parameters,
            "resolution": preprocess.resolution,
        },
        "teacher": recorder.content.get("teacher"),
    }
    best_logits = {}
    for prefix in ("final_", ""):
        best = None if prefix else _load_best(recorder)
        for split, loader in loaders.items():
            if judge is not None:
                results[prefix + split] = judge(split, loader)
                continue
            logits = predict_logits(recorder.updater.evaluated_model, loader, preprocess, precision)
            reference = teacher_logits and teacher_logits(split, loader)
            scores = task_metrics(logits, loader.dataset.targets, reference, splits.positive)
            results[prefix + split] = {**scores, **splits.positive_names()}
            if not prefix and run.writes:
                write_predictions(run.folder, split, loader.dataset, logits, splits)
                best_logits[split] = logits
    if not run.writes:
        return
    results.update(_course(recorder))
    # after the peak of memory was read, and while no other process waits
    spread = {split: uncertainty(logits, loaders[split].dataset, splits) for split, logits in best_logits.items()}
    for key in ("intervals", "class_recalls"):
        results[key] = {split: values[key] for split, values in spread.items()}
    write_json(run.path("results.json"), results)
    try:  # the figures above are safe by now
        fresh, _ = load_model(best, precision.device)  # neither compiled nor wrapped
        batch = min(next(iter(loaders.values())).batch_size, 64)
        results["model"].update(cost(fresh, preprocess.resolution, batch, precision, at_least=0.2))
        write_json(run.path("results.json"), results)
    except RuntimeError as error:  # out of memory above all
        run.log(f"warning: the model's cost could not be measured: {str(error).splitlines()[0]}")
    if run.board:
        run.board.finish()
    run.log(summary_line(results, run.path("results.json")))


def _load_best(recorder: Recorder) -> dict | None:
    """The weights of best.pth, into the model and the loss of every process; the file may be on rank 0's node alone."""
    best = load_checkpoint(recorder.run.path("best.pth")) if recorder.run.writes else None
    parts = {"model": recorder.updater.evaluated_model}
    if recorder.criterion is not None:
        parts["loss"] = recorder.criterion  # projectors are of an epoch too
    for name, part in parts.items():
        if best:
            part.load_state_dict(best[name])
        broadcast(part.state_dict().values())
    return best


def _course(recorder: Recorder) -> dict:
    """What results.json says of the training itself."""
    rows = recorder.run.rows
    rates = [row["images_per_second"] for row in (rows[1:] or rows) if row["images_per_second"]]
    return {
        "checkpoint": "best.pth",
        "checkpoint_sha256": file_sha256(recorder.run.path("best.pth")),
        "select_metric": recorder.metric,
        "best_epoch": recorder.best_epoch,
        "last_epoch": len(rows),
        "stopped_early": recorder.stopped_early,
        "processes": world_size(),
        "throughput": round(float(np.median(rates)), 1) if rates else None,  # images/s, without the first epoch
        "peak_memory_mb": peak_memory_mb(recorder.updater.precision.device),
        "wall_time_s": round(recorder.seconds, 1),
    }


def summary_line(results: dict, path: str) -> str:
    """The last line of a run."""
    metric, best = results["select_metric"], f"(best epoch {results['best_epoch']})"
    if "accuracy" not in results["val"]:
        parts = [f"{split} {metric} {results[split][metric]:.4f}" for split in ("val", "test") if split in results]
        return f"{', '.join(parts)} {best}; last epoch {results['final_val'][metric]:.4f}; {path}"
    test, intervals, tasks = results["test"], results["intervals"]["test"], tasks_of(results["dataset"]["classes"])
    names, bracketed = {"accuracy": "accuracy", "balanced_accuracy": "balanced"}, {metric}
    if are_findings(results["dataset"]["classes"]):  # means of what may be many
        names = {"auc": "auc", "average_precision": "average precision", "accuracy": "accuracy"}
        bracketed = {*names}
    elif len(tasks) > 1:
        names = {"accuracy": "accuracy", **{f"{task}_accuracy": task for task in tasks}}
        bracketed = {*names, metric}
    if metric in intervals:
        names.setdefault(metric, metric)
    figures = [
        f"{name} {test[key]:.4f}" + (f" {brackets(intervals[key])}" if key in bracketed and intervals.get(key) else "")
        for key, name in names.items()
        if test[key] is not None
    ]
    return f"test {', '.join(figures)} {best}; last epoch {results['final_test']['accuracy']:.4f}; {path}"


def write_predictions(folder: str, split: str, dataset, logits: dict, splits: Splits) -> None:
    """predictions_<split>.npz and confusion_<split>_<task>.npy; logits: {task: (N, C)}."""
    arrays = {"ids": np.array(dataset.ids), **({} if dataset.groups is None else {"groups": dataset.groups})}
    for task, names in tasks_of(splits.classes).items():
        suffix = "" if task == TASK else f"_{task}"
        arrays["labels" + suffix] = dataset.targets[task]
        arrays["logits" + suffix] = logits[task].astype(np.float32)
        arrays["classes" + suffix] = np.array(names)
        if task in splits.positive:
            arrays["positive" + suffix] = np.array(names[splits.positive[task]])
    with atomic_write(os.path.join(folder, f"predictions_{split}.npz")) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    for task, values in logits.items():
        write_array(
            os.path.join(folder, f"confusion_{split}_{task}.npy"),
            metrics.confusion_matrix(values, dataset.targets[task]),
        )
