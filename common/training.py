"""What the training scripts call beside the optimizer: interrupts, device, precision, checkpoints, the run's record.

Needs augment.py, cli.py, distributed.py, metrics.py and models.py of `common` (image_text.py and multimodal.py too for models
of images and texts) and torch.  The epoch loop itself stands in each script.
"""

import contextlib
import hashlib
import os
import pickle
import resource
import shlex
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common import distributed
from common.augment import normalize
from common.cli import UserError, atomic_write, environment
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
    """Notes SIGTERM, SIGUSR1 and the first Ctrl-C; the loop asks after each step.  A second Ctrl-C stops at once.

    Several processes stop at the same step, one step after any of them was told to.
    """

    CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 75, signal.SIGINT: 130}

    def __init__(self):
        self.requested, self.agreement = 0, distributed.Agreement()
        for number in self.CODES:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if number == signal.SIGINT and self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number

    def check(self):
        """Raise Interrupted where a stop was asked for; called equally often by all processes."""
        number = self.agreement(int(self.requested))
        if number:
            raise Interrupted(f"interrupted by {signal.Signals(number).name}", self.CODES[number])


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
        raise UserError(f"process {processes.rank} of {processes.size} found no way to the others: {str(error).splitlines()[0]}") from None
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
    """Mixed precision: `with precision.autocast():` around forward passes, `precision.scaler` around fp16's gradients."""

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

    `preprocess(pixels)`: (B, 3, R, R) in 0..1 -> normalized; `preprocess.inputs(batch, pixels)` -> what the model takes.
    """

    resolution: int
    mean: list
    std: list
    tokenizer: object = None  # of transformers; the model's own, so it is not kept with the other values
    max_length: int = None  # tokens to which texts are cut

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
                raise UserError("a model of images and texts was given images without texts: its datasets are medpix and image_text")
            if id(dataset) not in self._tokens:
                self._tokens[id(dataset)] = dataset, tokenize(dataset.texts, self.tokenizer, self.max_length)

    def inputs(self, batch, pixels):
        """{"image": (B, 3, R, R)}, and {"input_ids", "attention_mask": (B, L)} for a model that reads texts."""
        if self.tokenizer is None:
            return {"image": self(pixels)}
        from common.image_text import token_batch

        self.prepare(batch["dataset"])
        return {"image": self(pixels), **token_batch(self._tokens[id(batch["dataset"])][1], batch["index"], pixels.device)}

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
        raise UserError(f"cannot write {path}: {error.__cause__ or error.__context__ or error}") from None


# what every script needs of one
CHECKPOINT = {"kind": str, "model": dict, "model_args": dict, "classes": (list, dict), "preprocess": dict, "flags": dict}


def load_checkpoint(path):
    """A checkpoint of these scripts as a dict, on the CPU, loaded safely.  Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint {path}")
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{path} is damaged or no safe checkpoint: {reason[:160]}") from None
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
        raise UserError(f"{path} does not fit its own architecture {model.name}: {str(error).splitlines()[-1].strip()[:160]}") from None
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

        for name, given in (("--weights", args.weights), ("--init-checkpoint", args.init_checkpoint), ("--patch-size", args.patch_size)):
            if given:
                raise UserError(f"{name} is for image models alone, not for images with texts")
        model = build_image_text_model(args.image_model or args.model, args.text_model, {task: len(names) for task, names in classes.items()}, resolution,
                                       args.fusion, args.fusion_layers, args.fusion_dim, args.pretrained, inputs=args.inputs, texts=texts,
                                       max_length=args.max_length, text_pooling=args.text_pooling)  # fmt: skip
        model.set_dropout(args.dropout)
        if args.freeze_backbone or args.freeze:
            model.freeze_backbone(("image", "text") if args.freeze_backbone else args.freeze)
        return model, None
    if args.freeze or args.image_model:
        raise UserError(f"--{'freeze' if args.freeze else 'image-model'} is for images with texts (--dataset medpix, image_text)")
    model = build_model(args.model, len(classes), resolution, args.patch_size, args.pretrained, dynamic=bool(getattr(args, "local_crops", 0)))
    note = start_weights(model, args.weights, args.init_checkpoint)
    model.set_dropout(args.dropout)
    if args.freeze_backbone:
        model.freeze_backbone()
    return model, note


def start_weights(model, weights=None, init_checkpoint=None, flag="--weights"):
    """Load --weights FILE or --init-checkpoint FILE into a new model; returns a line for the log, or None; flag: for messages."""
    if weights and init_checkpoint:
        raise UserError("--weights and --init-checkpoint contradict each other: give one of them")
    if init_checkpoint:
        state = load_checkpoint(init_checkpoint)["model"]
        state = {name.removeprefix("backbone."): value for name, value in state.items()}
    elif weights:
        if not os.path.isfile(weights):
            raise UserError(f"{flag} {weights}: no such file")
        try:
            if weights.endswith(".safetensors"):
                from safetensors.torch import load_file

                state = load_file(weights)
            else:
                state = torch.load(weights, weights_only=True, map_location="cpu")
        except Exception as error:  # each format has its own kinds
            raise UserError(f"{flag} {weights} is damaged or unsafe: {str(error).splitlines()[0][:160]}") from None
        if not isinstance(state, dict):
            raise UserError(f"{flag} {weights} holds no state dict")
    else:
        return None
    source = weights or init_checkpoint
    kept = load_weights(model, state, source)
    return f"weights of {source}" + ("" if kept else ", with a new head: its classes differ")


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()


# ---------------------------------------------------------------------------------------------------- the run's record


class Meter:
    """Sums of an epoch's batch means in this process, kept on the device until they are read."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, **values):
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach().float().clone()
        self.count += 1

    def means(self):
        return {name: float(total) / self.count for name, total in self.sums.items()} if self.count else {}

    def state_dict(self):
        return {"sums": {name: total.cpu() for name, total in self.sums.items()}, "count": self.count}

    def load_state_dict(self, state, device):
        self.sums, self.count = {name: total.to(device) for name, total in state["sums"].items()}, state["count"]


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
        self.best, self.best_epoch, self.stopped_early = None, 0, False
        self.started, self.seconds_before = time.time(), 0.0

    def open(self, args):
        """Make the run folder, or go on with what --resume names."""
        saved = load_checkpoint(self.run.path("latest.pth")) if args.resume else {"rows": 0, "log_bytes": 0}
        if args.resume:
            self.restore(saved)
        self.run.open(vars(args), environment(device_name(self.updater.precision.device)), saved["rows"], saved["log_bytes"])

    @property
    def seconds(self):
        """Wall time of the run, earlier processes included."""
        return self.seconds_before + time.time() - self.started

    def epochs(self):
        """The epochs that are left."""
        while self.epoch <= self.epochs_wanted and not self.stopped_early:
            yield self.epoch

    def batches(self, loader):
        """The batches that are left of this epoch, with a progress bar on a terminal; stops after a signal."""
        self.epoch_started, self.images = time.time(), 0
        bar = tqdm(
            loader.batches(self.epoch, self.step), total=(len(loader) - self.step) * loader.accumulate, unit="batch",
            leave=False, desc=f"epoch {self.epoch}/{self.epochs_wanted}",
            disable=distributed.rank() > 0 or not sys.stderr.isatty(),
        )  # fmt: skip
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
        means = distributed.gather(self.meter.means())  # waits for the device
        self.train_means = {name: sum(m[name] for m in means) / len(means) for name in means[0]}
        self.train_seconds = time.time() - self.epoch_started

    def end_epoch(self, values):
        """Record an epoch: values {metric: number} on val; decides on best, plateau and early stop, and saves."""
        if self.metric not in values:
            raise UserError(f"--select-metric {self.metric} is none of {', '.join(values)}")
        self.updater.check_finite()
        gain = better(self.metric, values[self.metric], self.best)
        if gain or not self.best_epoch:
            self.best, self.best_epoch = values[self.metric], self.epoch
        self.updater.schedule.end_epoch(self.metric, values[self.metric])
        self.stopped_early = bool(self.patience) and self.epoch - self.best_epoch >= self.patience
        row = {"epoch": self.epoch, "lr": self.updater.lr}
        row.update({f"train_{name}": value for name, value in self.train_means.items()})
        row.update({f"val_{name}": value for name, value in values.items()})
        rate = self.images / max(self.train_seconds, 1e-9)
        row.update(images_per_second=round(rate, 1), seconds=round(time.time() - self.epoch_started, 2))
        self.run.add_row(row)
        shown = dict.fromkeys(["train_loss", "train_accuracy", "val_loss", "val_accuracy", f"val_{self.metric}", "val_agreement", "val_knn", "val_teacher_knn"])
        parts = [f"{name} {row[name]:.4f}" for name in shown if row.get(name) is not None]
        mark = " *" if self.best_epoch == self.epoch else ""
        self.run.log(f"epoch {self.epoch}/{self.epochs_wanted}: lr {row['lr']:.4g}, {', '.join(parts)}, {rate:.0f} images/s{mark}")
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
            **self.content, "kind": updater.model.kind, "model": updater.evaluated_model.state_dict(),
            "model_args": updater.model.build_args,
            "raw_model": None if updater.average is None else updater.model.state_dict(),
            "loss": None if self.loss is None else self.loss.state_dict(),
            "updater": updater.state_dict(), "processes": processes, "epoch": self.epoch, "step": self.step,
            "metric": self.metric, "best": self.best, "best_epoch": self.best_epoch,
            "stopped_early": self.stopped_early, "seconds": self.seconds, "rows": len(self.run.rows),
            "log_bytes": self.run.log_bytes,
        }  # fmt: skip
        save_checkpoint(self.run.path("latest.pth"), content, [self.run.path(name) for name in names])
        distributed.barrier()

    def restore(self, checkpoint):
        """Put a latest.pth back into freshly built parts."""
        device = self.updater.parameters[0].device
        self.updater.model.load_state_dict(checkpoint["raw_model"] or checkpoint["model"])
        if self.loss is not None:
            self.loss.load_state_dict(checkpoint["loss"])
        self.updater.load_state_dict(checkpoint["updater"])
        for name in ("epoch", "step", "best", "best_epoch", "stopped_early"):
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
            again = f"python {os.path.basename(sys.argv[0])} --resume {shlex.quote(self.run.folder)}"
            text = f"{stop} in epoch {self.epoch} after step {self.step}: {again} continues"
            raise Interrupted(text, stop.exit_code) from None
