"""Batches: caching of decoded images, order, transfer.

Needs augment.py, data.py and run.py of `common`, torch, numpy and pillow (torchvision for sample grids).

    loader = Loader(splits.train, batch_size=128, device=device, shuffle=True)
    for batch in loader.batches(epoch=1):                            # image (B, 3, H, W) uint8 on the device, ...
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from common.augment import uniform
from common.data import DataError, ImageDataset, available_cpus, note
from common.run import launched_processes, rank, world_size

ON_HOST = ("index", "key", "view", "size", "sides")  # of a batch: what is planned is computed of these on the CPU
PLANNED = 2**16  # images whose steps are planned together
REPEAT_STRIDE = 1_000_003  # views between an image's repeats in an epoch: a prime, so that stored views differ too


def pad_images(images: list[torch.Tensor], shared: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """List of (3, H, W) uint8 -> (B, 3, H_max, W_max), each in the top left corner, and their sizes (B, 2).

    shared: in memory that other processes can read.
    """
    sizes = torch.tensor([image.shape[1:] for image in images])
    shape = len(images), 3, *sizes.amax(0).tolist()
    if shared:  # written there at once, not copied
        out = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(math.prod(shape))).view(shape)
    if (sizes == sizes[0]).all():
        return torch.stack(images, out=out if shared else None), sizes
    out = out if shared else images[0].new_empty(shape)
    out.zero_()
    for row, image in zip(out, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return out, sizes


class ImageCache:
    """Decoded images of a dataset, in memory once: one tensor where all are of one size, else a flat one."""

    def __init__(self, dataset: ImageDataset, device: torch.device | str):
        self.on_device = torch.device(device).type != "cpu"
        if dataset.images is not None:
            images = torch.from_numpy(dataset.images)  # (N, H, W) or (N, H, W, 3)
            images = images[:, None].expand(-1, 3, -1, -1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
            images = images.contiguous()
        else:
            with ThreadPoolExecutor(available_cpus()) as pool:  # Pillow decodes without Python's lock
                images = list(pool.map(lambda i: dataset[i]["image"], range(len(dataset))))
        self.hold(images, device)

    def hold(self, images: torch.Tensor | list[torch.Tensor], device: torch.device | str) -> None:
        """Take (N, 3, H, W) uint8, or a list of (3, H, W)."""
        if torch.is_tensor(images):
            self.sizes = torch.tensor(images.shape[2:]).repeat(len(images), 1)
            self.uniform = images.to(device)
            return
        self.sizes = torch.tensor([image.shape[1:] for image in images])
        self.uniform = torch.stack(images).to(device) if (self.sizes == self.sizes[0]).all() else None
        if self.uniform is None:  # a pixel a row for a gather, else an image after another
            pixels = self.sizes.prod(1)
            self.offsets = (pixels.cumsum(0) - pixels).to(device)  # of each image, in pixels
            flat = [image.permute(1, 2, 0).reshape(-1, 3) if self.on_device else image.flatten() for image in images]
            self.flat, self.device_sizes = torch.cat(flat).to(device), self.sizes.to(device)

    def batch(self, rows: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) uint8 of these rows (B,), where the cache and they lie; sides: (2,) on the CPU, the
        largest height and width among them."""
        if self.uniform is not None:
            return self.uniform.index_select(0, rows)
        if not self.on_device:
            places = zip((3 * self.offsets[rows]).tolist(), self.sizes[rows].tolist())
            return pad_images([self.flat[at : at + 3 * h * w].view(3, h, w) for at, (h, w) in places])[0]
        height, width = sides.tolist()
        high, wide = self.device_sizes[rows][:, :, None, None].unbind(1)  # (B, 1, 1)
        y, x = torch.arange(height, device=rows.device)[:, None], torch.arange(width, device=rows.device)
        inside = (y < high) & (x < wide)
        at = (self.offsets[rows][:, None, None] + y * wide + x) * inside  # (B, H, W)
        return (self.flat[at] * inside[..., None]).permute(0, 3, 1, 2)


def choose_cache(dataset: ImageDataset, cache: str, device: torch.device) -> str:
    """Where decoded images go: "off", "ram" or "device".  auto: the device, else memory, if a quarter of it is free."""
    if cache == "device" and device.type == "cpu":
        return "ram"
    if cache != "auto":
        return cache
    probe = range(0, len(dataset), max(1, len(dataset) // 16))
    needed = len(dataset) * np.mean([dataset.read(i).size for i in probe])
    if device.type == "cuda" and needed < free_memory(device) / 4:
        return "device"
    needed *= launched_processes().local_size  # each process of this node keeps its own
    return "ram" if needed < available_memory() / 4 else "off"


def free_memory(device: torch.device) -> int:
    """Free memory in bytes of a GPU, else the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def available_memory() -> int:
    """Free memory in bytes: the machine's or, if that is less, what the limits of the job's cgroups leave."""
    try:
        with open("/proc/meminfo") as file:  # counts what caches would give back
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2)[1:] for line in file]
    except (OSError, StopIteration):  # not Linux: half of the machine
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for controllers, path in groups:
        if controllers == "":  # cgroup v2
            folder, names = "/sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):  # v1
            folder, names = "/sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        while True:  # from the job's step up: each level may have a limit; in a container only the top is there
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                limit, used = (int(open(folder + path.rstrip("/") + "/" + name).read()) for name in names)
                free = min(free, limit - used)
            if path in ("/", ""):
                break
            path = os.path.dirname(path)
    return max(free, 0)


def _collate(samples):
    """Runs in a worker: what is wrong comes back as its message, for a traceback would not be one line."""
    errors = [s for s in samples if isinstance(s, str)]
    if errors:
        return errors[0]
    images = [s["image"] for s in samples]
    if not torch.utils.data.get_worker_info():
        return pad_images(images)
    try:  # here, for where the worker's queue does it, the batch would be lost and awaited for ever
        batch, sizes = pad_images(images, shared=True)
        return batch, sizes.tolist()  # one tensor: each is handed over by a connection of its own
    except RuntimeError:
        size = sum(image.nbytes for image in images) / 1e6
        return (
            f"/dev/shm is too small for batches of {size:,.0f} MB from several workers: take --workers 0, a smaller "
            "--decode-size or --batch-size, or a larger /dev/shm (docker run --shm-size)"
        )


def _leave_signals(ending, worker):
    """In a worker: a stop is the main process's to handle, where a scheduler sends it to every process of a job.

    SIGTERM is obeyed once `ending` is set: multiprocessing ends workers by it at the main process's exit and waits.
    """
    signal.set_wakeup_fd(-1)  # the main process's
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)


class _Readable:
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i):
        try:
            return self.dataset[i]
        except DataError as error:
            return str(error)


@contextlib.contextmanager
def _advice():
    """Around what decodes images: says how to go on without a broken one."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error} (--on-bad-image skip leaves such images out)") from None


def balanced_order(labels: torch.Tensor, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """As many rows as there are labels (N,), each class equally often, in random order.

    A class is gone through in random order before an image of it comes again.  Raises DataError for an empty class.
    """
    classes, count = [], len(labels)
    for c in range(num_classes):
        members = (labels == c).nonzero()[:, 0]
        if not len(members):
            raise DataError(f"--sampler balanced: class number {c} has no image in train")
        wanted = count * (c + 1) // num_classes - count * c // num_classes
        rounds = range(-(-wanted // len(members)))
        shuffled = [members[torch.randperm(len(members), generator=generator)] for _ in rounds]
        classes.append(torch.cat(shuffled)[:wanted])
    order = torch.cat(classes)
    return order[torch.randperm(count, generator=generator)]


def mixed_order(labels: torch.Tensor, batch_size: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Rows for as many whole batches as there are labels (N,), in each of which `share` of the images have a label.

    Those with and those without (-1) are gone through in random order before an image comes again.  Raises DataError.
    """
    steps, wanted, parts = len(labels) // batch_size, round(share * batch_size), []
    pools = (labels >= 0).nonzero()[:, 0], (labels < 0).nonzero()[:, 0]
    if not all(map(len, pools)) or not 0 < wanted < batch_size:
        images = f"{len(pools[0])} images with and {len(pools[1])} without a label"
        raise DataError(f"--labelled-share {share:g} of --batch-size {batch_size} cannot be had of {images}")
    for pool, count in zip(pools, (wanted, batch_size - wanted)):
        rounds = range(-(-steps * count // len(pool)))
        rows = torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in rounds])
        parts.append(rows[: steps * count].view(steps, count))
    places = torch.rand(steps, batch_size, generator=generator).argsort(1)  # each process gets some of both
    return torch.cat(parts, 1).gather(1, places).flatten()


def repeats(order: torch.Tensor) -> torch.Tensor:
    """How often each row of `order` (N,) stood in it before: (N,) int64."""
    by_row = order.argsort(stable=True)
    first = torch.searchsorted(order[by_row], order[by_row])
    return torch.empty_like(order).scatter_(0, by_row, torch.arange(len(order)) - first)


def _train_batch(wanted, count, accumulate):
    """The batch size in training, over all processes: `wanted`, or what `count` images give if they are fewer."""
    parts = world_size() * accumulate
    batch_size = min(wanted, count - count % parts)
    if wanted % parts or not batch_size:
        raise DataError(
            f"--batch-size {wanted} of {count} images cannot be cut into {world_size()} processes x "
            f"{accumulate} accumulation steps of the same size: take a multiple of {parts}"
        )
    return batch_size


def with_partners(index: torch.Tensor, planned: dict) -> torch.Tensor:
    """(S, R) rows of the images of each step: `index` (S, B), and the partners of what is planned."""
    return torch.cat([index, planned["partner"]], 1) if "partner" in planned else index


def _each_step(value, device, steps):
    """What was planned of `steps` steps as a list of one value a step: of tensors (S, ...), which go to the device,
    tuples and dicts of them, and lists."""
    if isinstance(value, torch.Tensor):
        return value.to(device).unbind(0)
    if isinstance(value, tuple):
        return list(zip(*(_each_step(part, device, steps) for part in value)))
    if isinstance(value, dict):
        parts = {k: _each_step(part, device, steps) for k, part in value.items()}
        return [{k: part[step] for k, part in parts.items()} for step in range(steps)]
    return value


class Loader:
    """Batches of a dataset on a device.

    shuffle: an order of (seed, epoch), dropping the last short batch, for training; else in order, the last batch
    filled up by repeating its last row (`valid` rows count), so that every batch has one shape.

    balanced: number of classes, which then come equally often in training, see `balanced_order`; 0: images do.
    labelled_share: of the images of each training batch, see `mixed_order`; 0: as they come.
    rows: of the dataset, those that are gone through in order where not all are.

    Several processes: in training each gets an equal share of every batch, else every size-th batch.  accumulate:
    parts into which a process's share is cut, yielded one after another.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        device: torch.device | str,
        shuffle: bool = False,
        seed: int = 0,
        cache: str = "auto",
        workers: int | None = None,
        accumulate: int = 1,
        balanced: int = 0,
        labelled_share: float = 0.0,
        rows: np.ndarray | None = None,
    ):
        self.dataset, self.device, self.shuffle, self.seed = dataset, torch.device(device), shuffle, seed
        self.accumulate, self.balanced, self.labelled_share = accumulate, balanced, labelled_share
        self.batch_size = _train_batch(batch_size, len(dataset), accumulate) if shuffle else batch_size
        self.keys = torch.from_numpy(dataset.keys)
        self.rows = torch.arange(len(dataset)) if rows is None else torch.from_numpy(rows)
        self.targets = {task: torch.from_numpy(labels) for task, labels in dataset.targets.items()}
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes share the cores, srun's do not
        self.workers = max(1, min(8, available_cpus() // sharing)) if workers is None else workers
        self.cache = self._workers = self.stream = None
        with _advice():
            self.cache_kind = choose_cache(dataset, cache, self.device)
            if self.cache_kind == "off" and shuffle and dataset.hair_removal:
                note("images are not cached, so --hair-removal is done again in each epoch: --cache ram does it once")
            if self.cache_kind != "off":
                self.cache = ImageCache(dataset, self.device if self.cache_kind == "device" else "cpu")

    @property
    def rows_at_once(self) -> int:
        """Images of a training batch that go through the model together in this process."""
        return self.batch_size // (world_size() * self.accumulate)

    def __len__(self):
        """Batches an epoch."""
        return len(self.rows) // self.batch_size if self.shuffle else -(-len(self.rows) // self.batch_size)

    def order(self, epoch: int) -> torch.Tensor:
        """(S, B) rows of the dataset, a batch of all processes in each of S steps."""
        if self.shuffle:
            seed = int(uniform(self.seed, epoch, 0, torch.zeros(1, dtype=torch.int64))[0, 0] * 2**53)
            generator = torch.Generator().manual_seed(seed)
            if self.balanced:
                order = balanced_order(torch.from_numpy(self.dataset.labels), self.balanced, generator)
            elif self.labelled_share:
                labels = torch.from_numpy(self.dataset.labels)
                order = mixed_order(labels, self.batch_size, self.labelled_share, generator)
            else:
                order = torch.randperm(len(self.dataset), generator=generator)
        else:
            order = self.rows[torch.arange(len(self) * self.batch_size).clamp(max=len(self.rows) - 1)]
        return order[: len(self) * self.batch_size].view(-1, self.batch_size)

    def batches(self, epoch: int = 0, start: int = 0, plan: Callable[[dict], dict] | None = None) -> Iterator[dict]:
        """Yield batches from number `start` on.  In training the view is the epoch (from 1), else 0, the plain image;
        an image that comes again in an epoch gets another view.

        plan: takes what is known of many steps at once, a dict of (S, B) `index`, `key`, `view`, `size` (S, B, 2),
        `targets` and `split` on the CPU, and returns it with what it computes of them, as `Augmenter.plan`; so a step
        waits for nothing.  It depends on each sample alone.  It is asked without `size` for partners that are to be
        decoded, and for the targets of a whole batch.  All tensors but ON_HOST are moved to the device at once.

        A batch: `dataset`, whose texts `index` finds; `index`, `key`, `view` (B,) and `size` (B, 2) on the CPU; on the
        device `image` (B, 3, H, W) uint8, behind which the images of `partner` stand where there is one, and `targets`
        {task: (B,)}; `rows` of the dataset, whose images these are, where the cache lies; `valid`, the rows that count;
        `batch_targets`, as targets, of the whole batch where this is a process's share or a part of it; `last_part`,
        whether it completes the batch; and what `plan` added.
        """
        order, plan = self.order(epoch), plan or (lambda known: known)
        again = torch.zeros_like(order)
        if self.balanced or self.labelled_share:
            again = repeats(order.flatten()).view_as(order)
        views = again * REPEAT_STRIDE + (epoch if self.shuffle else 0)
        numbers = torch.arange(len(order))
        if self.shuffle:  # this process's parts of every batch
            parts, rows = world_size() * self.accumulate, self.rows_at_once
            share = slice(rank() * self.accumulate, (rank() + 1) * self.accumulate)
            numbers = numbers[start:].repeat_interleave(self.accumulate)
            index, view = (v[start:].view(-1, parts, rows)[:, share].reshape(-1, rows) for v in (order, views))
        else:
            numbers = numbers[start:][rank() :: world_size()]
            index, view = order[numbers], views[numbers]
        which = numbers.tolist()
        # of the whole split, from which partners are drawn, see `Augmenter.plan`
        sizes = self.cache.sizes if self.cache else torch.zeros(len(self.dataset), 2, dtype=torch.int64)
        split = {"by_key": self.keys.argsort(), "key": self.keys, "size": sizes, "targets": self.targets}

        def known(index, view):
            targets = {task: labels[index] for task, labels in self.targets.items()}
            return {"index": index, "view": view, "key": self.keys[index], "targets": targets, "split": split}

        # without a cache sizes are known, and so views planned, when a step's images are decoded
        at_once, loaded = max(1, PLANNED // index.shape[1]), None
        if not self.cache:
            rows = with_partners(index, plan(known(index, view)))
            at_once, loaded = 1, self._loaded(rows)
        for first in range(0, len(index), at_once):
            block, decoded = slice(first, first + at_once), None
            if loaded:
                decoded, sizes[rows[first]] = next(loaded)
            planned = plan({**known(index[block], view[block]), "size": sizes[index[block]]})
            whole, images = planned, with_partners(index[block], planned)
            if self.rows_at_once != self.batch_size:
                whole = plan(known(order[numbers[block]], views[numbers[block]]))
            more = {"batch_targets": whole["targets"], "rows": images, "sides": sizes[images].amax(1)}
            for at, batch in enumerate(self._steps({**planned, **more}), first):
                image = self.cache.batch(batch["rows"], batch["sides"]) if self.cache else decoded
                batch["valid"] = min(index.shape[1], len(self.rows) - which[at] * self.batch_size)
                batch["last_part"] = not self.shuffle or (at + 1) % self.accumulate == 0
                yield self._with_images(batch, image, index.shape[1])

    def _steps(self, planned):
        """The batches of what is planned, without their images."""
        hosted = ON_HOST if self.cache and self.cache.on_device else (*ON_HOST, "rows")
        steps, kept = len(planned["index"]), planned.keys() - {"split", "partner"}
        parts = {k: _each_step(planned[k], "cpu" if k in hosted else self.device, steps) for k in kept}
        return ({"dataset": self.dataset, **{k: part[step] for k, part in parts.items()}} for step in range(steps))

    def _with_images(self, batch, image, count):
        """The batch and its images, copied while the model works, the first `count` as often as it has views of
        each."""
        if self.device.type == "cuda" and not image.is_cuda:
            self.stream = self.stream or torch.cuda.Stream(self.device)
            with torch.cuda.stream(self.stream):
                image = (image if image.is_pinned() else image.pin_memory()).to(self.device, non_blocking=True)
            torch.cuda.current_stream().wait_stream(self.stream)
            image.record_stream(torch.cuda.current_stream())
        views = len(batch["index"]) // count
        image = image.to(self.device)
        return {**batch, "image": torch.cat([*[image[:count]] * views, image[count:]]) if views > 1 else image}

    def _worker_init(self):
        ending = multiprocessing.RawValue("b", 0)  # no Event: a second signal in the handler would wait for its lock
        # at exit, before workers are ended
        multiprocessing.util.Finalize(self, setattr, (ending, "value", 1), exitpriority=0)
        return functools.partial(_leave_signals, ending)

    def _loaded(self, rows):
        if self._workers is None:
            self._order = []  # batches of rows: what a DataLoader that keeps its workers goes through again and again
            self._workers = torch.utils.data.DataLoader(
                _Readable(self.dataset),
                batch_sampler=self._order,
                collate_fn=_collate,
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
                persistent_workers=self.workers > 0,
                worker_init_fn=self._worker_init() if self.workers else None,
                generator=torch.Generator(),  # its seeds shall not come from the model's generator
            )
        self._order[:] = rows.tolist()
        for item in self._received():
            if isinstance(item, str):
                self._workers = None  # ends them now, not when the traceback is gone
                with contextlib.nullcontext() if item.startswith("/dev/shm") else _advice():
                    raise DataError(item)
            yield item[0], torch.as_tensor(item[1])

    def _received(self):
        """What the workers send; one that is killed while it sends leaves a broken connection, not torch's error."""
        try:
            yield from self._workers
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if not self.workers:
                raise
            with contextlib.suppress(RuntimeError):  # torch's own comes with the signal of the worker's end
                time.sleep(1)
            raise RuntimeError(f"DataLoader worker has ended: {type(error).__name__}") from None


def save_sample_grid(path: str, rows: list[torch.Tensor], columns: int = 16) -> None:
    """Draw what the models see: rows of (B, 3, R, R) images in 0..1, one row of tiles each, at one size."""
    from torchvision.utils import save_image

    side = max(64, *(row.shape[-1] for row in rows))
    columns = min(columns, len(rows[0]))
    resize = functools.partial(torch.nn.functional.interpolate, size=(side, side), mode="nearest-exact")
    tiles = [resize(row[:columns].float().cpu()) for row in rows]
    try:
        save_image(torch.cat(tiles).clamp(0, 1), path, nrow=columns, pad_value=1)
    except ValueError as error:  # the extension names no format
        raise DataError(f"cannot draw samples to {path}: {error}") from None
