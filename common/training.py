"""What the training scripts call beside the optimizer: interrupts, device, precision, checkpoints, the run's record.

Needs augment.py, cli.py, distributed.py, images.py, metrics.py and models.py of `common` (image_text.py and
multimodal.py too for models
of images and texts) and torch.  The epoch loop itself stands in each script.
"""

import argparse
import contextlib
import copy
import hashlib
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common import distributed
from common.augment import normalize
from common.cli import UserError, atomic_write, environment, stops
from common.images import TASK, tasks_of
from common.metrics import better
from common.models import build_model, load_weights

# torch's loader says so on stderr before it refuses the file
warnings.filterwarnings("ignore", message="Detected pickle protocol")


class Interrupted(Exception):
    """Raised between steps after a signal; `exit_code` as in Interrupts."""

    def __init__(self, message, exit_code):
        super().__init__(message)
        self.exit_code = exit_code


class Interrupts:
    """Stops in the training loop: a signal is noted, and the loop asks after each step, so that it can save.

    A second Ctrl-C stops at once, as does a step that takes far longer than those before it: another process or a disk
    does not answer.  Several processes stop at the same step, one step after any of them was told to.
    """

    def __init__(self):
        self.requested, self.agreement, self.saving = 0, distributed.Agreement(), False
        self.checked, self.slowest, stops.defer = time.monotonic(), 0.0, None

    def begin(self):
        """From here on signals wait for the end of a step."""
        self.checked, self.slowest = time.monotonic(), 0.0
        stops.defer = self._note

    def end(self):
        """All is saved: from here on signals end the script at once."""
        stops.defer = None
        if self.requested:
            stops.end(self.requested)

    def _note(self, number):  # in the thread that hears signals
        if number == signal.SIGINT == self.requested:
            stops.end(number)
        self.requested = number
        timer = threading.Timer(3 + 2 * self.slowest, lambda: self.saving or stops.end(number))
        timer.daemon = True
        timer.start()

    def check(self):
        """Raise Interrupted where a stop was asked for; called equally often by all processes."""
        if stops.defer:
            now = time.monotonic()
            self.slowest, self.checked = max(0.97 * self.slowest, now - self.checked), now  # forgets a slow start
        number = self.agreement(int(self.requested))
        if number:
            self.saving = True
            raise Interrupted(f"interrupted by {signal.Signals(number).name}", stops.CODES[number])


# ------------------------------------------------------------------------------------------------ device and precision


def select_device(name):
    """auto, cpu, cuda, cuda:N, mps -> torch.device that is there; joins the other processes.  Raises UserError."""
    processes = distributed.environment()
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
    try:
        distributed.start(device)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None
    return device


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_mb(device):
    """Peak memory since the start: the GPU's, else the process's resident set."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


class Precision:
    """Mixed precision: `with precision.autocast():` around forward passes, `precision.scaler` around fp16's
    gradients."""

    def __init__(self, amp, device):
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


def use_compile(choice, device):
    return choice == "on" or (choice == "auto" and device.type == "cuda")


@dataclass
class Preprocess:
    """A model's own input: side in pixels, mean and std, and, of a model that reads texts, its tokenizer.

    `preprocess(pixels)`: (B, 3, R, R) in 0..1 -> normalized; `preprocess.inputs(batch, pixels)` -> what the model
    takes.
    """

    resolution: int
    mean: list
    std: list
    tokenizer: object = None  # of transformers; the model's own, so it is not kept with the other values
    max_length: int = None  # tokens to which texts are cut
    source: str = "the checkpoint"  # whose mean and std these are

    @classmethod
    def of_new(cls, model, resolution, dataset, info):
        """Of a model that is no checkpoint's: what its weights expect, else what suits the dataset (name and info)."""
        if model.mean:
            return cls(resolution, model.mean, model.std, source=f"the weights of {model.name}").reads(model)
        assumed = getattr(model, "known_classes", None) is not None
        source = dataset + (f", assumed: with the weights of {model.name} come no mean and std" if assumed else "")
        return cls(resolution, info.mean, info.std, source=source).reads(model)

    def __str__(self):
        mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}, of {self.source}"

    def __post_init__(self):
        self.mean, self.std = [float(v) for v in self.mean], [float(v) for v in self.std]
        self._tensors, self._tokens = None, {}

    def reads(self, model):
        """Take the tokenizer of a model that reads texts."""
        self.tokenizer, self.max_length = getattr(model, "tokenizer", None), getattr(model, "max_length", None)
        return self

    def prepare(self, *datasets):
        """Tokenize the texts of these datasets, once."""
        if self.tokenizer is None:
            return
        from common.image_text import tokenize

        for dataset in datasets:
            if not hasattr(dataset, "texts"):
                raise UserError(
                    "a model of images and texts was given images without texts: its datasets are medpix and image_text"
                )
            if id(dataset) not in self._tokens:
                self._tokens[id(dataset)] = dataset, tokenize(dataset.texts, self.tokenizer, self.max_length)

    def inputs(self, batch, pixels):
        """{"image": (B, 3, R, R)}, and {"input_ids", "attention_mask": (B, L)} for a model that reads texts."""
        if self.tokenizer is None:
            return {"image": self(pixels)}
        from common.image_text import token_batch

        self.prepare(batch["dataset"])
        return {
            "image": self(pixels),
            **token_batch(self._tokens[id(batch["dataset"])][1], batch["index"], pixels.device),
        }

    def __call__(self, pixels):
        if self._tensors is None or self._tensors[0].device != pixels.device:
            self._tensors = [torch.tensor(v, device=pixels.device) for v in (self.mean, self.std)]
        return normalize(pixels, *self._tensors).contiguous(memory_format=torch.channels_last)

    def to_dict(self):
        return {"resolution": self.resolution, "mean": self.mean, "std": self.std}


# --------------------------------------------------------------------------------------------------------- checkpoints


def random_state():
    """Of torch's generators, which dropout draws from; order and augmentation need none."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state):
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(path, content, also=()):
    """torch.save to a file beside, then rename; `also`: further paths that get the same file (hard links)."""
    try:
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(content, file)
            for other in also:
                with atomic_write(other) as second:
                    os.remove(second)
                    try:
                        os.link(temporary, second)
                    except OSError:  # a file system without links
                        shutil.copyfile(temporary, second)
    except RuntimeError as error:  # torch's writer hides the disk's error
        if "DataLoader worker" in str(error):  # raised wherever the main process is when one is killed
            raise
        raise UserError(f"cannot write {path}: {error.__cause__ or error.__context__ or error}") from None


# what every script needs of one
CHECKPOINT = {
    "kind": str,
    "model": dict,
    "model_args": dict,
    "classes": (list, dict),
    "preprocess": dict,
    "flags": dict,
}


def load_tensors(path):
    """What a .pth or .safetensors file holds, on the CPU; nothing in it is run.  Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(24)
    if start.isascii() and min(start, default=9) >= 9:
        what = f"begins with the text {start.decode()!r}" if start else "is empty"
        raise UserError(f"{path} {what}: it is damaged or was not downloaded")
    torch.serialization.add_safe_globals([argparse.Namespace])  # a plain holder of values that many scripts save
    try:
        if start[8:9] == b"{":  # whatever the file's name
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # each format has its own kinds
        text = str(error)
        refused, reason = re.search(r"GLOBAL (\S+)", text), re.search(r"WeightsUnpickler error:\s*(\S.*)", text)
        if refused:
            raise UserError(
                f"{path} holds a {refused[1]}, and loading that could run code: save its tensors alone, "
                "torch.save(model.state_dict(), FILE)"
            ) from None
        reason = reason[1] if reason else [*text.strip().splitlines(), type(error).__name__][0]
        raise UserError(f"{path} is damaged: {reason[:160]}") from None


def load_checkpoint(path):
    """A checkpoint of these scripts as a dict, on the CPU, loaded safely.  Raises UserError."""
    checkpoint = load_tensors(path)
    known = isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(k), kind) for k, kind in CHECKPOINT.items())
    if not known or not {"dataset", "data_root"} <= checkpoint["flags"].keys():
        raise UserError(f"{path} is no checkpoint of these scripts; foreign weights go to --weights FILE")
    return checkpoint


def load_model(checkpoint, device="cpu", resolution=None, path="the checkpoint"):
    """(model in eval mode, Preprocess) from a checkpoint alone; no hub is asked.  Raises UserError, ModelError."""
    if checkpoint["kind"] not in ("image", "image_text"):
        raise UserError(f"{path} is of the unknown kind {checkpoint['kind']!r}")
    build = build_model
    if checkpoint["kind"] == "image_text":
        from common.multimodal import build_image_text_model as build
    try:
        model, preprocess = build(**checkpoint["model_args"]), Preprocess(**checkpoint["preprocess"])
    except TypeError as error:
        raise UserError(f"{path} is of another version or damaged: {error}") from None
    try:
        model.load_state_dict(checkpoint["model"], strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit its own architecture {model.name}: {str(error).splitlines()[-1].strip()[:160]}"
        ) from None
    preprocess.reads(model)
    if resolution and resolution != preprocess.resolution:
        model.set_resolution(resolution)
        preprocess.resolution = resolution
    return model.to(device).to(memory_format=torch.channels_last).eval(), preprocess


def start_model(args, classes, resolution, texts=None):
    """(new model on the CPU, line for the log or None) by --model and the flags beside it, from the weights of --seed.

    classes: a list, or {task: list} for a model of images and texts; texts: those of train.
    """
    torch.manual_seed(args.seed)
    if isinstance(classes, dict):
        from common.multimodal import build_image_text_model

        for name, given in (
            ("--weights", args.weights),
            ("--init-checkpoint", args.init_checkpoint),
            ("--patch-size", args.patch_size),
        ):
            if given:
                raise UserError(f"{name} is for image models alone, not for images with texts")
        model = build_image_text_model(
            args.image_model or args.model,
            args.text_model,
            {task: len(names) for task, names in classes.items()},
            resolution,
            args.fusion,
            args.fusion_layers,
            args.fusion_dim,
            args.pretrained,
            inputs=args.inputs,
            texts=texts,
            max_length=args.max_length,
            text_pooling=args.text_pooling,
        )
        model.set_dropout(args.dropout)
        if args.freeze_backbone or args.freeze:
            model.freeze_backbone(("image", "text") if args.freeze_backbone else args.freeze)
        return model, None
    if args.freeze or args.image_model:
        raise UserError(
            f"--{'freeze' if args.freeze else 'image-model'} is for images with texts (--dataset medpix, image_text)"
        )
    model = build_model(
        args.model,
        len(classes),
        resolution,
        args.patch_size,
        args.pretrained,
        dynamic=bool(getattr(args, "local_crops", 0)),
    )
    note = start_weights(model, args.weights, args.init_checkpoint)
    model.set_dropout(args.dropout)
    if args.freeze_backbone:
        model.freeze_backbone()
    return model, note


def start_weights(model, weights=None, init_checkpoint=None, flag="--weights"):
    """Load --weights FILE or --init-checkpoint FILE into a new model; returns a line for the log, or None; flag: for
    messages."""
    if weights and init_checkpoint:
        raise UserError("--weights and --init-checkpoint contradict each other: give one of them")
    path = weights or init_checkpoint
    if path:
        try:
            state = load_checkpoint(path) if init_checkpoint else load_tensors(path)
        except UserError as error:
            raise UserError(f"{'--init-checkpoint' if init_checkpoint else flag} {error}") from None
        taken = load_weights(model, state, path)
        if CHECKPOINT.keys() <= state.keys():  # of these scripts
            model.mean, model.std = state["preprocess"]["mean"], state["preprocess"]["std"]
    elif model.known_classes is None:
        return None
    else:
        taken = model.name
    wanted, known = model.build_args["num_classes"], model.known_classes
    new = f", with a new head of {wanted} classes: theirs has {known or 'none'}"
    return f"weights of {taken}" + (new if wanted not in (0, known) else "")


def need_head(model, classes, weights):
    """Refuse a model by name whose logits are those of a new head; weights: the file, or None.  Raises UserError."""
    known = model.known_classes
    if known != len(classes):
        head = f"a head of {known} classes" if known else "no head that can be kept"
        raise UserError(
            f"{weights or model.name} has {head}, the data have {len(classes)}: its logits would mean nothing; "
            "fine-tune it with train_teacher.py, or do without its logits (--method rkd, mmd, tokens, ...)"
        )


def check_normalization(model, resolution, rows):
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
            "--batch-size, "
            "fewer --accumulation-steps or fewer processes"
        ) from None


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def class_difference(before, now):
    """How the data's classes (lists, or {task: list}) differ from a checkpoint's, in words, or None."""
    old, new = (
        [c if t == TASK else f"{c} ({t})" for t, names in tasks_of(of).items() for c in names] for of in (before, now)
    )
    changes = ("lack", [c for c in old if c not in new]), ("also have", [c for c in new if c not in old])
    parts = [f"{verb} {', '.join(map(repr, names[:5]))}" for verb, names in changes if names]
    if old != new:
        return "the classes " + (" and ".join(parts) or f"are in the order {new[:10]}, not {old[:10]}")


# ---------------------------------------------------------------------------------------------------- the run's record


class Meter:
    """Sums of an epoch's batch means in this process, kept on the device until they are read.

    A mean of nothing (NaN: the accuracy of a batch without labels) is left out.
    """

    def __init__(self):
        self.names, self.total = [], torch.zeros(())  # (2, K): sums and counts

    def add(self, **values):
        """Scalars on the device, the same names each time."""
        self.names = list(values)
        values = torch.stack([value.detach().float() for value in values.values()])
        there = ~values.isnan()
        self.total = self.total + torch.stack([torch.where(there, values, 0.0), there.float()])

    def means(self):
        return dict(zip(self.names, (self.total[0] / self.total[1]).tolist())) if self.names else {}

    def state_dict(self):
        return {"names": self.names, "total": self.total.cpu()}

    def load_state_dict(self, state, device):
        self.names, self.total = state["names"], state["total"].to(device)


class Recorder:
    """Where a run stands and what it leaves: position, best epoch, rows, checkpoints, the way back.

    run: cli.RunFolder; updater: optimizer.Updater; content: the checkpoint's constant part (role, classes, preprocess,
    augment, flags, metadata of the teacher); loss: a module with projectors, or None; patience: epochs without gain
    in `metric` on val after which it stops, 0 is off.
    """

    def __init__(self, run, updater, interrupts, *, epochs, metric, patience, save_every, content, loss=None):
        self.run, self.updater, self.interrupts, self.loss = run, updater, interrupts, loss
        self.epochs_wanted, self.metric, self.patience, self.save_every = epochs, metric, patience, save_every
        self.content, self.meter = content, Meter()
        self.epoch, self.step = 1, 0  # `step` batches of `epoch` are done
        self.best, self.best_epoch, self.last_gain, self.stopped_early = None, 0, 0, False
        self.started, self.seconds_before = time.time(), 0.0

    def open(self, args):
        """Lock the run folder and make it, or go on with what --resume names.  Raises UserError."""
        self.run.lock()
        if distributed.rank():
            torch.manual_seed(args.seed + 1_000_003 * distributed.rank())  # of dropout's masks: others than rank 0's
        saved = {"rows": 0, "log_bytes": 0}
        if args.resume:
            saved = load_checkpoint(self.run.path("latest.pth"))
            self.check_resumed(saved)
            self.restore(saved)
            stops.hint = f": {self.again} continues"
        self.interrupts.begin()
        self.run.open(
            vars(args), environment(device_name(self.updater.precision.device)), saved["rows"], saved["log_bytes"]
        )

    @property
    def again(self):
        """The command that resumes this run."""
        return f"python {os.path.basename(sys.argv[0])} --resume {shlex.quote(self.run.folder)}"

    def check_resumed(self, saved):
        """Refuse to go on with other data than the checkpoint's, or to fewer epochs.  Raises UserError."""
        if "data" not in saved:
            raise UserError(
                f"--resume {self.run.folder}: an earlier version of these scripts wrote it, start a new run"
            )
        begun = saved["epoch"] if saved["step"] else saved["epoch"] - 1
        if self.epochs_wanted < begun:
            raise UserError(
                f"--epochs {self.epochs_wanted} beside --resume: {begun} epochs of {self.run.folder} are done or begun"
            )
        before, now = saved["data"], self.content["data"]
        differ = class_difference(before["classes"], now["classes"])
        for split, sha in before["sha256"].items() if not differ else ():
            if sha != now["sha256"].get(split):
                differ = (
                    f"{split} had other images or labels ({before['sizes'][split]:,} then, "
                    f"{now['sizes'].get(split, 0):,} now)"
                )
        if differ:
            raise UserError(
                f"--resume {self.run.folder} with other data: {differ}: bring them back, or start a new run"
            )

    @property
    def seconds(self):
        """Wall time of the run, earlier processes included."""
        return self.seconds_before + time.time() - self.started

    def epochs(self):
        """The epochs that are left."""
        while self.epoch <= self.epochs_wanted and not self.stopped_early:
            yield self.epoch
        self.interrupts.end()

    def batches(self, loader):
        """The batches that are left of this epoch, with a progress bar on a terminal; stops after a signal."""
        self.epoch_started, self.images = time.time(), 0
        bar = tqdm(
            loader.batches(self.epoch, self.step),
            total=(len(loader) - self.step) * loader.accumulate,
            unit="batch",
            leave=False,
            desc=f"epoch {self.epoch}/{self.epochs_wanted}",
            disable=distributed.rank() > 0 or not sys.stderr.isatty(),
        )
        for batch in bar:
            yield batch
            self.images += batch["valid"] * distributed.size()
            if not batch["last_part"]:
                continue
            self.step += 1
            if not bar.disable and self.step % 10 == 0:  # reads the device, so only now and then and for a person
                rate = self.images / (time.time() - self.epoch_started)
                shown = ", ".join(f"{name} {value:.3f}" for name, value in self.meter.means().items())
                bar.set_postfix_str(f"{shown}, {rate:.0f} images/s")
            self.interrupts.check()
        self.meter.total = sum(distributed.gather(self.meter.total.cpu()))  # waits for the device
        self.train_means = self.meter.means()
        self.train_seconds = time.time() - self.epoch_started

    def end_epoch(self, values):
        """Record an epoch: values {metric: number} on val; decides on best, plateau and early stop, and saves."""
        if self.metric not in values:
            raise UserError(f"--select-metric {self.metric} is none of {', '.join(values)}")
        self.updater.check_finite()
        gain = better(self.metric, values[self.metric], self.best)
        if gain or not self.best_epoch:
            self.best, self.last_gain = values[self.metric], self.epoch
        if (
            values[self.metric] == self.best or not self.best_epoch
        ):  # of equal ones the later, which has learned for longer
            self.best_epoch = self.epoch
        self.updater.schedule.end_epoch(self.metric, values[self.metric])
        self.stopped_early = bool(self.patience) and self.epoch - self.last_gain >= self.patience
        row = {"epoch": self.epoch, "lr": self.updater.lr}
        row.update({f"train_{name}": value for name, value in self.train_means.items()})
        row.update({f"val_{name}": value for name, value in values.items()})
        rate = self.images / max(self.train_seconds, 1e-9)
        row.update(images_per_second=round(rate, 1), seconds=round(time.time() - self.epoch_started, 2))
        self.run.add_row(row)
        shown = dict.fromkeys(
            [
                "train_loss",
                "train_accuracy",
                "val_loss",
                "val_accuracy",
                f"val_{self.metric}",
                "val_agreement",
                "val_knn",
                "val_teacher_knn",
            ]
        )
        parts = [f"{name} {row[name]:.4f}" for name in shown if row.get(name) is not None]
        mark = " *" if self.best_epoch == self.epoch else ""
        self.run.log(
            f"epoch {self.epoch}/{self.epochs_wanted}: lr {row['lr']:.4g}, {', '.join(parts)}, {rate:.0f} "
            f"images/s{mark}"
        )
        if self.stopped_early:
            self.run.log(f"stopped early: no gain in val {self.metric} for {self.patience} epochs")
        epoch, self.epoch, self.step, self.meter = self.epoch, self.epoch + 1, 0, Meter()
        names = ["best.pth"] if self.best_epoch == epoch else []
        if self.save_every and epoch % self.save_every == 0:
            names.append(f"epoch_{epoch}.pth")
        self.save(*names)

    def save(self, *names):
        """Write latest.pth: plain tensors and built-in types, all that rebuilds and resumes. `names`: the same file."""
        self.updater.check_finite()
        updater = self.updater
        processes = distributed.gather({"random": random_state(), "meter": self.meter.state_dict()})
        if distributed.rank() > 0:
            return distributed.barrier()  # rank 0 writes; who ends before it has would end it too
        content = {
            **self.content,
            "kind": updater.model.kind,
            "model": updater.evaluated_model.state_dict(),
            "model_args": updater.model.build_args,
            "raw_model": None if updater.average is None else updater.model.state_dict(),
            "loss": None if self.loss is None else self.loss.state_dict(),
            "updater": updater.state_dict(),
            "processes": processes,
            "epoch": self.epoch,
            "step": self.step,
            "metric": self.metric,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "last_gain": self.last_gain,
            "stopped_early": self.stopped_early,
            "seconds": self.seconds,
            "rows": len(self.run.rows),
            "log_bytes": self.run.log_bytes,
        }
        stopping, self.interrupts.saving = self.interrupts.saving, True  # a slow disk may take its time
        save_checkpoint(self.run.path("latest.pth"), content, [self.run.path(name) for name in names])
        self.interrupts.saving = stopping
        stops.hint = f": {self.again} continues"
        distributed.barrier()

    def restore(self, checkpoint):
        """Put a latest.pth back into freshly built parts."""
        device = self.updater.parameters[0].device
        self.updater.model.load_state_dict(checkpoint["raw_model"] or checkpoint["model"])
        if self.loss is not None:
            self.loss.load_state_dict(checkpoint["loss"])
        self.updater.load_state_dict(checkpoint["updater"])
        for name in ("epoch", "step", "best", "best_epoch", "last_gain", "stopped_early"):
            setattr(self, name, checkpoint[name])
        self.seconds_before = checkpoint["seconds"]
        processes, rank = checkpoint["processes"], distributed.rank()
        own = processes[rank if len(processes) == distributed.size() else 0]  # another number: about rank 0's figures
        self.meter.load_state_dict(own["meter"], device)
        if rank == 0 or len(processes) == distributed.size():
            set_random_state(own["random"])

    @contextlib.contextmanager
    def saving_when_interrupted(self):
        """Around the loop: a signal writes latest.pth and ends the script with the signal's exit code."""
        try:
            yield
        except Interrupted as stop:
            if self.epoch <= self.epochs_wanted and not self.stopped_early:
                self.save()
            text = f"{stop} in epoch {self.epoch} after step {self.step}: {self.again} continues"
            raise Interrupted(text, stop.exit_code) from None
