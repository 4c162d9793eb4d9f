"""What every script stands on: errors in one line, whole files, signals, processes, checkpoints, the record of a run.

Imports no other file of `common`.  Needs torch and tqdm (safetensors, which comes with timm, for .safetensors files).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import errno
import fcntl
import glob
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import platform
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

SCRIPT_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# torch's loader says so on stderr before it refuses the file
warnings.filterwarnings("ignore", message="Detected pickle protocol")


# ------------------------------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """Something that the user gave is wrong: one line on stderr and exit code 2."""

    exit_code = 2


class Interrupted(Exception):
    """Raised between steps after a signal, with the signal's exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def fail(text: str, code: int) -> None:
    """One line on stderr, from the first process that fails, and exit."""
    if first_to_fail():
        prefix = "" if text.startswith("interrupted") else "error: "
        print(f"{prefix}{text}", file=sys.stderr, flush=True)
        if world_size() > 1 and rank() == 0:
            time.sleep(1)  # the others ask it who was first
    if world_size() > 1:  # gloo's threads, which are still there, would abort an interpreter that is torn down
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def optional(module: str, needed_by: str):
    """A file of `common`, or a package, that one feature needs, imported when it is used.  Raises UserError."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith("common."):  # this file, or one that it needs
            file = missing.replace(".", "/") + ".py"
            raise UserError(f"{needed_by} needs the file {file}: copy it from the collection") from None
        if not missing or not f"{module}.".startswith(f"{missing}."):
            raise
        package = {"cv2": "opencv-python-headless"}.get(module, module)
        raise UserError(f"{needed_by} needs the package {package}: pip install {package}") from None


# ---------------------------------------------------------------------------------------------------------- processes

# set by distributed.join_processes: the group for objects and signals, and whether it still waits for the others
cpu_group, joining = None, False


class Processes(NamedTuple):
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this node
    local_size: int = 1


def launched_processes() -> Processes:
    """Which of how many processes this is, from torchrun's variables or those of an srun step."""
    get = os.environ.get
    process, count = get("RANK"), get("WORLD_SIZE")
    if process and count:
        return Processes(int(process), int(count), int(get("LOCAL_RANK") or 0), int(get("LOCAL_WORLD_SIZE") or count))
    process = get("SLURM_PROCID")
    if process and get("SLURM_STEP_ID"):  # the batch script itself has no step id
        counts = []  # "2(x3),1" -> [2, 2, 2, 1] tasks on each node
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", get("SLURM_STEP_TASKS_PER_NODE", "1")):
            counts += [int(count)] * int(times or 1)
        node = int(get("SLURM_NODEID") or 0)
        local_size = counts[node] if node < len(counts) else 1
        size = int(get("SLURM_STEP_NUM_TASKS") or 1)
        return Processes(int(process), size, int(get("SLURM_LOCALID") or 0), local_size)
    return Processes()


def distributed():
    """The file of `common` that only several processes need.  Raises UserError where it is missing."""
    return optional("common.distributed", f"a run of {launched_processes().size} processes")


def joined() -> bool:
    """Whether this process has joined others."""
    return cpu_group is not None and torch.distributed.is_initialized()


def leave_processes() -> None:
    """At the end of a script that went well."""
    if joined():
        torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank() if joined() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if joined() else 1


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier(group=cpu_group)


def gather_objects(value: Any) -> list:
    """Every process's value (anything that pickles), by rank; the same list everywhere."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    torch.distributed.all_gather_object(values, value, group=cpu_group)
    return values


def first_to_fail() -> bool:
    """Whether this process is the first that ends with an error: it alone says why."""
    if not joined():
        return joining or launched_processes().rank == 0  # bad flags: all processes were given the same
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("failed", 1) == 1
    except (RuntimeError, ValueError):  # rank 0, which keeps the count, has gone
        return rank() == 0


def lost_process(error: Exception) -> bool:
    """Whether this error says that another process is no longer there."""
    return world_size() > 1 and any(word in str(error) for word in ("Connection", "Timed out", "NCCL", "gloo"))


# ------------------------------------------------------------------------------------------------------------ signals


class Stops:
    """How SIGTERM, SIGUSR1 and Ctrl-C end a script, with the exit codes 143, 75 and 130.

    At once, outside of a training loop: files are written beside and then renamed, so nothing is lost.  A thread hears
    the signals, since the main one may be waiting in C, for another process or for a disk, where Python's handlers do
    not run.

    Between `begin` and `finish` a signal is noted, and the loop calls `check` after each step, so that it can save.
    Several processes stop at the same step, one step after any of them was told to.  A second Ctrl-C ends the script at
    once, as does a step that takes far longer than those before it: another process or a disk does not answer.
    """

    CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 75, signal.SIGINT: 130}

    def __init__(self):
        self.deferring, self.saving, self.requested = False, False, 0
        # hint: how to go on; seeds: of several runs, this one's seed and those after it: both for the last line
        self.hint, self.seeds = "", []

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Hear signals within this block."""
        self.__init__()
        read, write = os.pipe()
        os.set_blocking(write, False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in self.CODES}
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._hear, args=(read,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.write(write, b"\0")
            thread.join()
            os.close(read), os.close(write)
            self.deferring, self.requested = False, 0  # of a timer that is left nothing comes

    def _hear(self, pipe: int) -> None:
        while number := os.read(pipe, 1)[0]:  # 0: the block is left
            if number in self.CODES:
                self.receive(number)

    def receive(self, number: int) -> None:
        """What the thread does with a signal."""
        if not self.deferring or number == signal.SIGINT == self.requested:
            return self.end(number)
        self.requested = number
        timer = threading.Timer(
            3 + 2 * self.slowest, lambda: self.saving or self.requested != number or self.end(number)
        )
        timer.daemon = True
        timer.start()

    def end(self, number: int) -> None:
        """End this process and its workers now, whatever its threads are doing."""
        if launched_processes().rank == 0:  # of several processes a scheduler stops all
            text = f"interrupted by {signal.Signals(number).name}{self.hint}{self.seeds_left()}\n"
            os.write(2, text.encode(errors="surrogateescape"))
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(self.CODES[number])

    def seeds_left(self) -> str:
        """Which of --seeds have left nothing that could be resumed, in words."""
        seeds = self.seeds[1:] if self.hint else self.seeds
        return f" (not run: --seeds {' '.join(map(str, seeds))})" if seeds else ""

    def begin(self) -> None:
        """From here on signals wait for the end of a step."""
        self.agreement = distributed().Agreement() if world_size() > 1 else None
        self.checked, self.slowest, self.requested, self.saving = time.monotonic(), 0.0, 0, False
        self.deferring = True

    def finish(self) -> None:
        """All is saved: from here on signals end the script at once."""
        self.deferring = False
        if self.requested:
            self.end(self.requested)

    def check(self) -> None:
        """Raise Interrupted where a stop was asked for; called equally often by all processes."""
        if not self.deferring:
            return
        now = time.monotonic()
        self.slowest, self.checked = max(0.97 * self.slowest, now - self.checked), now  # forgets a slow start
        number = self.agreement(self.requested) if self.agreement else self.requested
        if number:
            self.saving = True
            raise Interrupted(f"interrupted by {signal.Signals(number).name}", self.CODES[number])


stops = Stops()


# -------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[str]:
    """Yield a path beside `path`; it takes the place of `path` if all goes well and is removed if not."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}")  # RunFolder.open clears those of killed writers
    open(temporary, "xb").close()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def read_json(path: str) -> Any:
    """The content of a JSON file.  Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def write_json(path: str, value: Any) -> None:
    with atomic_write(path) as temporary, open(temporary, "w") as file:
        json.dump(plain(value), file, indent=1, allow_nan=False)
        file.write("\n")


def write_array(path: str, array: np.ndarray) -> None:
    """np.save; a full disk is an OSError that says so, as numpy's own does not."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(content.getbuffer())


def plain(value: Any) -> Any:
    """JSON types: tuples become lists, numbers that are not finite null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def environment(device: torch.device) -> dict:
    """Versions, git commit and hardware: what a figure depends on beside the flags."""
    versions = {}
    for package in ("torch", "torchvision", "timm", "transformers", "numpy", "scikit-learn", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    git = ["git", "-C", SCRIPT_FOLDER, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "python": platform.python_version(),
        **versions,
        "git_commit": commit or os.environ.get("GIT_COMMIT"),  # a job's copy of the scripts has no .git
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "platform": platform.platform(),
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


# --------------------------------------------------------------------------------------------------------- run folder


class RunFolder:
    """The files of a run; of several processes rank 0 writes them.

    Nothing is written or replaced before `lock` and `open`, so that bad input found earlier loses nothing.
    """

    PATTERNS = (
        "config.json",
        "metrics.csv",
        "metrics.json",
        "results.json",
        "log.txt",
        "*.pth",
        "confusion_*.npy",
        "predictions_*.npz",
        "events.out.tfevents.*",
        "tensorboard_samples.png",
    )

    def __init__(self, folder: str, resume: bool = False, overwrite: bool = False, dry_run: bool = False):
        self.folder, self.resume, self.overwrite = folder, resume, overwrite
        self.rows, self._opened, self._early_lines, self.board = [], False, [], None
        self.writes = launched_processes().rank == 0
        if resume:
            if overwrite:
                raise UserError("--resume and --overwrite cannot be combined")
            if not os.path.exists(self.path("latest.pth")):
                raise UserError(f"{folder} has no latest.pth: nothing to resume, start again with --overwrite")
        elif not dry_run:
            self._refuse_to_replace()

    def _refuse_to_replace(self) -> None:
        if not self.resume and not self.overwrite and any(map(os.path.getsize, self.files())):
            resume = f"--resume {shlex.quote(self.folder)} continues it"
            raise UserError(
                f"{self.folder} holds a run: {resume}, --overwrite replaces it, --output names another folder"
            )

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def files(self, form: str = "{}") -> list[str]:
        """Paths of what a run has left in the folder; form: of their names."""
        patterns = (os.path.join(glob.escape(self.folder), form.format(pattern)) for pattern in self.PATTERNS)
        return [file for pattern in patterns for file in glob.glob(pattern)]

    def lock(self) -> None:
        """Make the folder and keep every other run off it as long as this process lives.  Raises UserError everywhere.

        The lock is on log.txt, which is never replaced, and of the kind that NFS knows and workers do not inherit: it
        ends with this process, and earlier if this process opens and closes that file again.
        """
        refused = None
        if self.writes:
            try:
                self._lock()
                self._refuse_to_replace()  # a run that came and ended since
            except UserError as error:
                refused = error
        refused = gather_objects(refused)[0]
        if refused:
            raise refused

    def _lock(self) -> None:
        os.makedirs(self.folder, exist_ok=True)
        self._log = open(self.path("log.txt"), "a+", buffering=1, encoding="utf-8", errors="backslashreplace")
        # a requeued job: of a node that died, NFS keeps the locks for a minute or two
        patience = time.monotonic() + (120 if os.environ.get("SLURM_RESTART_COUNT") else 0)
        while True:
            try:
                return fcntl.lockf(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    why = f"{self.folder} cannot be locked ({error.strerror})"
                    return self.log(f"note: {why}: start no other run there")
                if time.monotonic() > patience:
                    self._log.close()
                    raise UserError(
                        f"another run is writing {self.folder}: wait for it or stop it, "
                        "or name another folder with --output"
                    ) from None
            time.sleep(1)

    def open(self, flags: dict, environment: dict, rows: int = 0, log_bytes: int = 0) -> None:
        """Begin to write, after `lock`; `rows`, `log_bytes`: what a resumed checkpoint had seen, later lines go."""
        if not self.writes:
            return
        if self.resume:
            self.rows = read_json(self.path("metrics.json"))[:rows] if rows else []
        leftovers = self.files(".{}.????????")  # of writers that were killed
        for file in leftovers + ([] if self.resume else self.files()):
            if not file.endswith("log.txt"):
                os.remove(file)
        self._log.truncate(min(log_bytes, os.path.getsize(self.path("log.txt"))))
        self._log.seek(0, os.SEEK_END)
        write_json(self.path("config.json"), {"flags": flags, "environment": environment})
        self._opened = True
        for line in self._early_lines:
            self._log.write(line + "\n")
        if flags.get("tensorboard"):
            self.board = optional("common.tensorboard", "--tensorboard").Board(self.folder, flags)
        self._write_rows()

    @property
    def log_bytes(self) -> int:
        return self._log.tell()

    def log(self, text: str) -> None:
        """A line on stdout and in log.txt."""
        if not self.writes:
            return
        print(text, flush=True)
        if self._opened:
            self._log.write(text + "\n")
        else:
            self._early_lines.append(text)

    def add_row(self, row: dict) -> None:
        """The metrics of an epoch, to metrics.csv and metrics.json."""
        if self.writes:
            self.rows.append(plain(row))
            self._write_rows()

    def _write_rows(self) -> None:
        with atomic_write(self.path("metrics.csv")) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in self.rows for k in row)))
            writer.writeheader()
            writer.writerows(self.rows)
        write_json(self.path("metrics.json"), self.rows)
        if self.board:
            self.board.update(self.rows)


# -------------------------------------------------------------------------------------------------------- checkpoints

# what every script needs of one
CHECKPOINT: dict[str, type | tuple] = {
    "kind": str,
    "model": dict,
    "model_args": dict,
    "classes": (list, dict),
    "preprocess": dict,
    "flags": dict,
}


def save_checkpoint(path: str, content: dict) -> None:
    """torch.save to a file beside, then rename."""
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's writer hides the disk's error
        if "DataLoader worker" in str(error):  # raised wherever the main process is when one is killed
            raise
        raise UserError(f"cannot write {path}: {error.__cause__ or error.__context__ or error}") from None


def copied(value: Any) -> Any:
    """Dicts and lists with copies of their tensors on the CPU, which training does not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        result = copy.copy(value)  # a state dict has attributes beside its keys
        result.update((k, copied(v)) for k, v in value.items())
        return result
    return [copied(v) for v in value] if isinstance(value, list) else value


def load_tensors(path: str) -> Any:
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
        refused, told = re.search(r"GLOBAL (\S+)", text), re.search(r"WeightsUnpickler error:\s*(\S.*)", text)
        if refused:
            raise UserError(
                f"{path} holds a {refused[1]}, and loading that could run code: save its tensors alone, "
                "torch.save(model.state_dict(), FILE)"
            ) from None
        reason = str(told[1]) if told else [*text.strip().splitlines(), type(error).__name__][0]
        raise UserError(f"{path} is damaged: {reason[:160]}") from None


def load_checkpoint(path: str) -> dict:
    """A checkpoint of these scripts, on the CPU, loaded safely.  Raises UserError."""
    checkpoint = load_tensors(path)
    known = isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(k), kind) for k, kind in CHECKPOINT.items())
    if not known or not {"dataset", "data_root"} <= checkpoint["flags"].keys():
        raise UserError(f"{path} is not a checkpoint of these scripts; foreign weights go to --weights FILE")
    return checkpoint


def data_difference(before: dict, now: dict) -> str | None:
    """How the data (`Splits.describe`) of a checkpoint and of now differ, in words, or None."""

    def names(classes):  # of several tasks a dict
        tasks = classes.items() if isinstance(classes, dict) else [("", classes)]
        return [f"{name} ({task})" if task else name for task, names in tasks for name in names]

    old, new = names(before["classes"]), names(now["classes"])
    if old != new:
        changes = ("lack", [c for c in old if c not in new]), ("also have", [c for c in new if c not in old])
        parts = [f"{verb} {', '.join(map(repr, classes[:5]))}" for verb, classes in changes if classes]
        return "the classes " + (" and ".join(parts) or f"are in the order {new[:10]}, not {old[:10]}")
    for split, sha in before["sha256"].items():
        if sha != now["sha256"].get(split):
            sizes = f"{before['sizes'][split]:,} then, {now['sizes'].get(split, 0):,} now"
            return f"{split} had other images or labels ({sizes})"
    return None


# ----------------------------------------------------------------------------------------------------- record of a run


LOWER_IS_BETTER = {"loss", "ece", "teacher_kl", "distillation_loss"}


def lower_is_better(metric: str) -> bool:
    """Whether lower values of a metric are better; of several tasks its name is <task>_<metric>."""
    return any(metric == name or metric.endswith(f"_{name}") for name in LOWER_IS_BETTER)


def better(metric: str, value: float | None, best: float | None) -> bool:
    """Whether `value` beats `best`; one that is undefined or not finite never does and always loses."""
    if value is None or not math.isfinite(value):
        return False
    if best is None or not math.isfinite(best):
        return True
    return value < best if lower_is_better(metric) else value > best


class Meter:
    """Sums of an epoch's batch means in this process, kept on the device until they are read.

    A mean of nothing (NaN: the accuracy of a batch without labels) is left out.
    """

    def __init__(self):
        self.names, self.total = [], torch.zeros(())  # (2, K): sums and counts

    def add(self, **values: torch.Tensor) -> None:
        """Scalars on the device, the same names each time."""
        self.names = list(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        there = ~stacked.isnan()
        self.total = self.total + torch.stack([torch.where(there, stacked, torch.zeros_like(stacked)), there.float()])

    def means(self) -> dict[str, float]:
        return dict(zip(self.names, (self.total[0] / self.total[1]).tolist())) if self.names else {}

    def state_dict(self) -> dict:
        return {"names": self.names, "total": self.total.cpu()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.names, self.total = state["names"], state["total"].to(device)


class Recorder:
    """Where a run stands and what it leaves: epoch and step, best epoch, rows, checkpoints, how to resume.

    updater: see training.Updater; content: the constant part of a checkpoint (role, classes, preprocess, augment, data,
    flags, teacher); criterion: a loss with projectors, or None; select_metric: on val, chooses the best epoch;
    patience: epochs without gain in it after which the run stops, 0 is off; save_every: epochs between epoch_N.pth, 0
    is off.

        recorder.open(vars(args), args.seed)
        with recorder:                        # a signal saves latest.pth and ends the script with the signal's code
            for epoch in range(recorder.start_epoch, args.epochs + 1):
                for batch in recorder.batches(loader, epoch, augment.plan):
                    ...
                    recorder.meter.add(loss=loss)
                recorder.end_epoch({"accuracy": 0.9})
                if recorder.stopped_early:
                    break
    """

    STATE = ("epoch", "step", "best", "best_epoch", "last_gain", "stopped_early")  # what a resumed run goes on with

    def __init__(
        self,
        run: RunFolder,
        updater,
        *,
        content: dict,
        criterion: torch.nn.Module | None = None,
        epochs: int,
        select_metric: str,
        patience: int,
        save_every: int,
    ):
        self.run, self.updater, self.criterion = run, updater, criterion
        self.epochs, self.metric = epochs, select_metric
        self.patience, self.save_every, self.content, self.meter = patience, save_every, content, Meter()
        self.epoch, self.step = 1, 0  # `step` batches of `epoch` are done
        self.best, self.best_epoch, self.last_gain, self.stopped_early = None, 0, 0, False
        self.started, self.seconds_before = time.time(), 0.0
        self.writer, self.writing = ThreadPoolExecutor(1), None

    def open(self, flags: dict, seed: int) -> None:
        """Lock the run folder and make it, or go on with the run that is resumed.  Raises UserError."""
        self.run.lock()
        if rank():
            torch.manual_seed(seed + 1_000_003 * rank())  # of dropout's masks: others than rank 0's
        saved = {"rows": 0, "log_bytes": 0}
        if self.run.resume:
            saved = load_checkpoint(self.run.path("latest.pth"))
            self.check_resumed(saved)
            self.restore(saved)
            stops.hint = f": {self.resume_command} continues"
        stops.begin()
        self.run.open(flags, environment(self.updater.precision.device), saved["rows"], saved["log_bytes"])

    @property
    def resume_command(self) -> str:
        return f"python {os.path.basename(sys.argv[0])} --resume {shlex.quote(self.run.folder)}"

    def check_resumed(self, saved: dict) -> None:
        """Refuse to go on with other data than the checkpoint's, or to fewer epochs.  Raises UserError."""
        if "data" not in saved:
            raise UserError(
                f"--resume {self.run.folder}: an earlier version of these scripts wrote it, start a new run"
            )
        begun = saved["epoch"] if saved["step"] else saved["epoch"] - 1
        if self.epochs < begun:
            raise UserError(
                f"--epochs {self.epochs} with --resume: {begun} epochs of {self.run.folder} are done or begun"
            )
        difference = data_difference(saved["data"], self.content["data"])
        if difference:
            raise UserError(
                f"--resume {self.run.folder} with other data: {difference}: bring them back, or start a new run"
            )

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier processes included."""
        return self.seconds_before + time.time() - self.started

    @property
    def start_epoch(self) -> int:
        """The first epoch that is left, past the last where the run had stopped early."""
        return self.epochs + 1 if self.stopped_early else self.epoch

    def batches(self, loader, epoch: int, plan: Callable[[dict], dict] | None = None) -> Iterator[dict]:
        """The batches that are left of this epoch, with a progress bar on a terminal; stops after a signal.

        plan: see loader.Loader.batches.
        """
        if epoch != self.epoch:
            self.epoch, self.step = epoch, 0
        self.epoch_started, self.images = time.time(), 0
        bar = tqdm(
            loader.batches(epoch, self.step, plan),
            total=(len(loader) - self.step) * loader.accumulate,
            unit="batch",
            leave=False,
            desc=f"epoch {epoch}/{self.epochs}",
            disable=rank() > 0 or not sys.stderr.isatty(),
        )
        for batch in bar:
            yield batch
            self.images += batch["valid"] * world_size()
            if not batch["last_part"]:
                continue
            self.step += 1
            if not bar.disable and self.step % 10 == 0:  # reads the device, so only now and then and for a person
                rate = self.images / (time.time() - self.epoch_started)
                shown = ", ".join(f"{name} {value:.3f}" for name, value in self.meter.means().items())
                bar.set_postfix_str(f"{shown}, {rate:.0f} images/s")
            stops.check()
        self.meter.total = sum(gather_objects(self.meter.total.cpu()))  # waits for the device
        self.train_means = self.meter.means()
        self.train_seconds = time.time() - self.epoch_started

    def end_epoch(self, values: dict) -> None:
        """Record an epoch: values {metric: number} on val; decides on best, plateau and early stop, and saves."""
        if self.metric not in values:
            raise UserError(f"--select-metric {self.metric} is not one of {', '.join(values)}")
        self.updater.check_finite()
        value = values[self.metric]
        if value is None:
            advice = "take another --select-metric or --split-seed"
            raise UserError(f"--select-metric {self.metric} has no value on val, which lacks a class: {advice}")
        gain = better(self.metric, value, self.best)
        if gain or not self.best_epoch:
            self.best, self.last_gain = value, self.epoch
        if value == self.best or not self.best_epoch:  # of equal ones the later, which has learned for longer
            self.best_epoch = self.epoch
        self.updater.schedule.end_epoch(gain)
        self.stopped_early = bool(self.patience) and self.epoch - self.last_gain >= self.patience
        rate = self.images / max(self.train_seconds, 1e-9)
        row = {
            "epoch": self.epoch,
            "lr": self.updater.lr,
            **{f"train_{name}": value for name, value in self.train_means.items()},
            **{f"val_{name}": value for name, value in values.items()},
            "images_per_second": round(rate, 1),
            "seconds": round(time.time() - self.epoch_started, 2),
        }
        self.run.add_row(row)
        self._log_row(row)
        epoch, self.epoch, self.step, self.meter = self.epoch, self.epoch + 1, 0, Meter()
        names = ["best.pth"] if self.best_epoch == epoch else []
        if self.save_every and epoch % self.save_every == 0:
            names.append(f"epoch_{epoch}.pth")
        self.save(*names)

    def _log_row(self, row: dict) -> None:
        names = ["train_loss", "train_accuracy", "val_loss", "val_accuracy", f"val_{self.metric}"]
        names += ["val_agreement", "val_knn", "val_teacher_knn"]
        parts = [f"{name} {row[name]:.4f}" for name in dict.fromkeys(names) if row.get(name) is not None]
        mark = " *" if self.best_epoch == self.epoch else ""
        rate = f"{row['images_per_second']:.0f} images/s"
        self.run.log(f"epoch {self.epoch}/{self.epochs}: lr {row['lr']:.4g}, {', '.join(parts)}, {rate}{mark}")
        if self.stopped_early:
            self.run.log(f"stopped early: no gain in val {self.metric} for {self.patience} epochs")

    def save(self, *names: str) -> None:
        """Write latest.pth and `names` in a thread, which `wait` waits for: plain tensors and built-in types, all that
        rebuilds and resumes, in best.pth what rebuilds alone."""
        self.updater.check_finite()
        updater = self.updater
        random = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
        }  # dropout's; all else needs none
        processes = gather_objects({"random": random, "meter": self.meter.state_dict()})
        if rank() > 0:
            return  # rank 0 writes
        model = {
            **self.content,
            "kind": updater.model.kind,
            "model": updater.evaluated_model.state_dict(),
            "model_args": updater.model.build_args,
            "loss": None if self.criterion is None else self.criterion.state_dict(),
            **{name: getattr(self, name) for name in self.STATE},
            "metric": self.metric,
        }
        rest = {
            "raw_model": None if updater.average is None else updater.model.state_dict(),
            "updater": updater.state_dict(),
            "processes": processes,
            "seconds": self.seconds,
            "rows": len(self.run.rows),
            "log_bytes": self.run.log_bytes,
        }
        self.wait()
        model, rest = copied(model), copied(rest)
        self.writing = self.writer.submit(self._write, model, rest, names)

    def _write(self, model: dict, rest: dict, names: tuple) -> None:
        for name in (*names, "latest.pth"):  # this last: it says that all of the epoch is there
            save_checkpoint(self.run.path(name), model if name == "best.pth" else {**model, **rest})
        stops.hint = f": {self.resume_command} continues"

    def wait(self) -> None:
        """Until what `save` began is on the disk.  Raises its errors."""
        stopping, stops.saving = stops.saving, True  # a slow disk may take its time
        try:
            if self.writing:
                self.writing.result()
        finally:
            self.writing, stops.saving = None, stopping

    def restore(self, checkpoint: dict) -> None:
        """Put a latest.pth back into freshly built parts."""
        device = self.updater.parameters[0].device
        self.updater.model.load_state_dict(checkpoint["raw_model"] or checkpoint["model"])
        if self.criterion is not None:
            self.criterion.load_state_dict(checkpoint["loss"])
        self.updater.load_state_dict(checkpoint["updater"])
        for name in self.STATE:
            setattr(self, name, checkpoint[name])
        self.seconds_before = checkpoint["seconds"]
        states = checkpoint["processes"]
        same_size = len(states) == world_size()
        state = states[rank() if same_size else 0]  # another number: about rank 0's figures
        self.meter.load_state_dict(state["meter"], device)
        if rank() == 0 or same_size:
            torch.set_rng_state(state["random"]["torch"])
            for number, value in enumerate(state["random"]["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(value, number)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """A signal has written latest.pth by then; without one, from here on signals end the script at once."""
        if isinstance(error, Interrupted) and self.epoch <= self.epochs and not self.stopped_early:
            self.save()
        self.wait()
        if kind is None or isinstance(error, Interrupted):
            barrier()  # who ends before rank 0 has written would end it too
        if kind is None:
            stops.finish()
        elif isinstance(error, Interrupted):
            where = f"in epoch {self.epoch} after step {self.step}: {self.resume_command} continues"
            raise Interrupted(f"{error} {where}", error.exit_code) from None
