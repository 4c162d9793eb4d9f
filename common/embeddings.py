"""Stored outputs of a teacher: a folder for each split that grows, is read by sample id, and explains itself.

    <dir>/train_embeddings/  embeddings.npy (N, V, D)   logits.npy (N, V, C)   tokens.npy (N, V, T, D)
                             ids.npy (N,)   labels.npy (N,)   groups.npy (N,), of lesions or patients   meta.json
    store = Store("embeddings/train_embeddings")
    rows = store.rows(["a.jpg", "b.jpg"])
    store.read("embeddings", rows, views)                  # (B, D) float32, of view number views[i] of row i

View 0 is the plain image; view v is that of `Augmenter(store.policy, store.seed)`, so that a student can be shown it
again.
Needs augment.py, data.py, loader.py and run.py of `common`, torch and numpy.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from common.augment import Policy, uniform
from common.data import TASK
from common.loader import free_memory
from common.run import UserError, read_json, write_array, write_json

FORMAT = 1
PART = ".part"  # of all that is not complete
DTYPES = ("float16", "float32")
META = ("seed", "policy", "num_views", "shapes", "count", "dtype")  # what every store says


def split_folder(root, split):
    return os.path.join(root, f"{split}_embeddings")


def shard_suffix(shard):
    """ ".I-of-N" of shard (I, N), counted from 0; "" of the only one."""
    return f".{shard[0]}-of-{shard[1]}" if shard[1] > 1 else ""


def shard_rows(count, shard):
    """The rows (start, stop) of `count` that shard (I, N) holds."""
    return count * shard[0] // shard[1], count * (shard[0] + 1) // shard[1]


def difference(ours, theirs):
    """The first key in which two meta dicts differ, in words, or None."""
    for key in sorted({*ours, *theirs} - {"environment", "data_root"}):
        if ours.get(key) != theirs.get(key):
            return f"{key}: {shown(theirs.get(key))}, not {shown(ours.get(key))}"
    return None


def shown(value):
    text = json.dumps(value)
    return text if len(text) < 90 else text[:80] + "..."


class Writer:
    """One split, or a shard of it, while it grows.

    folder: where; meta: dict of all that makes the values; ids, labels: of the whole split; shapes: {name: shape of a
    row}, as {"embeddings": (V, D)}; dtype: "float16" or "float32"; shard: (I, N); groups: as a dataset's.  What an
    interrupted extraction of the
    same meta has done is kept (`todo` are the rows that are left); another one's is refused unless overwrite is set.
    Several processes of one machine may write disjoint rows.  Raises UserError.
    """

    def __init__(
        self,
        folder,
        meta,
        ids,
        labels,
        shapes,
        dtype="float16",
        shard=(0, 1),
        overwrite=False,
        creates=True,
        groups=None,
    ):
        self.folder, self.suffix = folder, shard_suffix(shard)
        self.start, self.stop = shard_rows(len(ids), shard)
        self.ids, self.labels, self.groups = np.asarray(ids), np.asarray(labels), groups
        self.meta = {
            **meta,
            "format": FORMAT,
            "dtype": dtype,
            "count": len(ids),
            "shapes": {k: list(v) for k, v in shapes.items()},
        }
        self.meta = json.loads(json.dumps(self.meta))  # as it will be read
        self.complete = False
        if creates:
            self._create(overwrite, dtype)
        if not self.complete:
            self.arrays = {name: load(self.path(name) + PART, "r+") for name in shapes}
            self.done = load(self.path("done") + PART, "r+")

    def path(self, name):
        return os.path.join(self.folder, f"{name}{self.suffix}.npy")

    @property
    def _meta_path(self):
        return os.path.join(self.folder, f"meta{self.suffix}.json")

    def _create(self, overwrite, dtype):
        os.makedirs(self.folder, exist_ok=True)
        whole = os.path.join(self.folder, "meta.json")
        present = [p for p in (whole, self._meta_path, self._meta_path + PART) if os.path.exists(p)]
        if present and overwrite:
            for path in dict.fromkeys(
                [*present, *(self.path(n) + end for n in (*self.meta["shapes"], "done") for end in ("", PART))]
            ):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
            present = []
        if present:
            differs = difference(self.meta, read_json(present[0]))
            if differs:
                raise UserError(
                    f"{self.folder} holds other embeddings ({differs}): --overwrite replaces them, --output names "
                    "another folder"
                )
            self._check_ids()
            self.complete = not present[0].endswith(PART)
            if self.complete or os.path.exists(self.path("done") + PART):
                return
        write_array(os.path.join(self.folder, "ids.npy"), self.ids)
        write_array(os.path.join(self.folder, "labels.npy"), self.labels)
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.folder, "groups.npy"))  # of what is replaced
        if self.groups is not None:
            write_array(os.path.join(self.folder, "groups.npy"), self.groups)
        rows = self.stop - self.start
        for name, shape in self.meta["shapes"].items():
            allocate(self.path(name) + PART, dtype, (rows, *shape))
        write_json(self._meta_path + PART, self.meta)
        allocate(self.path("done") + PART, np.uint8, (rows,))  # last: it says that all is there

    def _check_ids(self):
        ids = load(os.path.join(self.folder, "ids.npy"))
        if not np.array_equal(ids, self.ids):
            raise UserError(
                f"{self.folder} holds embeddings of other images: --overwrite replaces them, --output names "
                "another folder"
            )

    @property
    def todo(self):
        """Rows of the split that are not done, sorted."""
        return self.start + np.flatnonzero(self.done == 0)

    def write(self, rows, values):
        """values {name: (B, ...) array} of these rows of the split; a row counts as done when all of it is written."""
        places = np.asarray(rows) - self.start
        for name, value in values.items():
            value = np.asarray(value)
            with np.errstate(over="ignore"):
                small = value.astype(self.arrays[name].dtype)
            if not np.isfinite(small).all():
                bad = self.ids[np.asarray(rows)[~np.isfinite(small).reshape(len(small), -1).all(1)][0]]
                why = "does not fit float16: --dtype float32 holds it" if np.isfinite(value).all() else "is not finite"
                raise UserError(f"the teacher's {name} of {bad} {why}")
            self.arrays[name][places] = small
        self.done[places] = 1

    def flush(self):
        """To the disk: values before the marks that they are there."""
        for array in self.arrays.values():
            array.flush()
        self.done.flush()

    def finish(self):
        """All rows are done: give the files their names, meta.json last."""
        self.flush()
        if not self.done.all():
            raise RuntimeError(f"{np.count_nonzero(self.done == 0)} rows of {self.folder} are not done")
        for name in self.meta["shapes"]:
            os.replace(self.path(name) + PART, self.path(name))
        os.replace(self._meta_path + PART, self._meta_path)
        os.remove(self.path("done") + PART)


def allocate(path, dtype, shape):
    """A new .npy of zeros, memory-mapped.  Raises UserError.

    Its space is taken at once: a disk or quota that is too small is found now, not by a bus error when rows are
    written.
    """
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path)
        size = np.dtype(dtype).itemsize * math.prod(shape) / 1e6
        raise UserError(f"cannot write {path}, which takes {size:,.1f} MB: {error.strerror}") from None
    return array


def load(path, mmap=None):
    """np.load without pickles; what is wrong with the file as UserError."""
    try:
        return np.load(path, mmap, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is truncated or damaged: {' '.join(str(error).split())[:120]}") from None


def merge(folder, count):
    """Join the `count` shards of a split's folder into one store and remove them.  Raises UserError."""
    metas, here = [], sorted(name for name in os.listdir(folder) if name.startswith("meta.") and "-of-" in name)
    wanted = [f"meta{shard_suffix((i, count))}.json" for i in range(count)]
    others = [name for name in here if name not in wanted]
    if others:
        raise UserError(
            f"{folder} holds {', '.join(others)} beside the {count} shards to merge: shards of one extraction only"
        )
    for i, name in enumerate(wanted):
        if name not in here:
            state = "not finished" if name + PART in os.listdir(folder) else "missing"
            raise UserError(f"shard {i} of {count} in {folder} is {state}: extract it with --shard {i}/{count}")
        metas.append(read_json(os.path.join(folder, name)))
        differs = difference(metas[0], metas[-1])
        if differs:
            raise UserError(f"shards 0 and {i} of {folder} do not belong together ({differs})")
    meta = metas[0]
    files = []
    for name, shape in meta["shapes"].items():
        target = os.path.join(folder, name + ".npy")
        whole = allocate(target + PART, meta["dtype"], (meta["count"], *shape))
        for i in range(count):
            start, stop = shard_rows(meta["count"], (i, count))
            path = os.path.join(folder, f"{name}{shard_suffix((i, count))}.npy")
            part = load(path, "r")
            if part.shape != (stop - start, *shape) or part.dtype != meta["dtype"]:
                raise UserError(
                    f"{path} is {part.dtype} {part.shape}, not {meta['dtype']} {(stop - start, *shape)}: rows "
                    "overlap or are lacking"
                )
            whole[start:stop] = part
            files.append(path)
        whole.flush()
        os.replace(target + PART, target)
    write_json(os.path.join(folder, "meta.json"), meta)
    for path in files + [os.path.join(folder, name) for name in wanted]:
        os.remove(path)


def open_splits(root, splits):
    """{split: Store} of the folder that extract_embeddings.py wrote, all by one model.  Raises UserError."""
    for split in splits:
        if not os.path.isdir(split_folder(root, split)):
            raise UserError(
                f"{root} holds no {split}_embeddings: name a checkpoint (best.pth), or a folder of "
                "extract_embeddings.py with this split"
            )
    stores = {split: Store(split_folder(root, split)) for split in splits}
    first, *others = ({**model_of(store.meta), "classes": store.meta["classes"]} for store in stores.values())
    for other in others:
        differs = difference(first, other)
        if differs:
            raise UserError(f"{root} holds splits of different models ({differs}): extract them together")
    return stores


class Store:
    """A complete split, read by sample id; see the head of this file.  Raises UserError where it is not whole."""

    def __init__(self, folder):
        self.folder = folder
        if not os.path.exists(os.path.join(folder, "meta.json")):
            names = os.listdir(folder) if os.path.isdir(folder) else []
            if any("-of-" in name for name in names):
                raise UserError(f"{folder} holds shards: extract_embeddings.py --merge joins them")
            state = (
                "is not finished: the same command of extract_embeddings.py goes on"
                if names
                else "is not a folder of stored embeddings"
            )
            raise UserError(f"{folder} {state}")
        self.meta = read_json(os.path.join(folder, "meta.json"))
        if not isinstance(self.meta, dict) or self.meta.get("format") != FORMAT:
            raise UserError(f"{folder}/meta.json is of another format than this version's ({FORMAT})")
        lacking = [name for name in META if name not in self.meta]
        if lacking:
            raise UserError(f"{folder}/meta.json lacks {', '.join(lacking)}: extract them again")
        self.seed, self.policy, self.num_views = (
            self.meta["seed"],
            Policy.from_dict(self.meta["policy"]),
            self.meta["num_views"],
        )
        self.ids, self.labels = (load(os.path.join(folder, f"{name}.npy")) for name in ("ids", "labels"))
        groups = os.path.join(folder, "groups.npy")
        self.groups = load(groups) if os.path.exists(groups) else None
        self.arrays = {}
        for name, shape in self.meta["shapes"].items():
            path = os.path.join(folder, f"{name}.npy")
            array, expected = load(path, "r"), (self.meta["count"], *shape)
            if array.shape != expected or array.dtype != self.meta["dtype"]:
                raise UserError(
                    f"{path} is {array.dtype} {array.shape}, its meta.json says {self.meta['dtype']} {expected}"
                )
            self.arrays[name] = array
        ids, labels, count = self.ids, self.labels, self.meta["count"]
        if not ids.shape == labels.shape == (count,) or ids.dtype.kind != "U" or labels.dtype.kind not in "iu":
            told = f"ids {ids.dtype} {ids.shape} and labels {labels.dtype} {labels.shape}"
            raise UserError(f"{folder} has {told} for {count} rows")
        if self.groups is not None and len(self.groups) != len(self.ids):
            raise UserError(f"{folder} has {len(self.groups)} groups for {len(self.ids)} rows")
        self._order = np.argsort(self.ids, kind="stable")

    def __len__(self):
        return len(self.ids)

    @property
    def targets(self):
        """{task: labels (N,)}, as a dataset's."""
        return {TASK: self.labels}

    def fingerprint(self, classes):
        """SHA-256 of the dataset's ids and classes, as `ImageDataset.fingerprint`."""
        return self.meta["sha256"]

    def find(self, ids):
        """Rows (N,) int64 of these sample ids, -1 where one is not there."""
        ids = np.asarray(ids)
        places = np.searchsorted(self.ids, ids, sorter=self._order).clip(max=len(self.ids) - 1)
        rows = self._order[places]
        return np.where(self.ids[rows] == ids, rows, -1)

    def rows(self, ids):
        """Rows (N,) int64 of these sample ids.  Raises UserError, which counts and names those that are not there."""
        rows = self.find(ids)
        missing = np.asarray(ids)[rows < 0]
        if len(missing):
            raise UserError(
                f"{self.folder} lacks {len(missing)} of {len(ids)} images, the first is {missing[0]}: it was made "
                "from other data"
            )
        return rows

    def check_views(self, wanted):
        if wanted > self.num_views:
            raise UserError(f"--num-views {wanted}: {self.folder} holds {self.num_views}")

    def read(self, name, rows, views):
        """(B, ...) float32 of one view of each row; rows, views (B,) int64.  Raises UserError on values that are not
        finite."""
        if name not in self.arrays:
            raise UserError(f"{self.folder} holds no {name}: extract them with --save-{name}")
        values = self.arrays[name][np.asarray(rows), np.asarray(views)].astype(np.float32)
        self._check(name, rows, values)
        return values

    def views(self, name, rows, count, device, chunk=4096):
        """(B * count, ...) tensor on the device, as stored, of the first `count` views of each row.  Raises
        UserError."""
        shape = len(rows) * count, *self.arrays[name].shape[2:]
        kept = torch.empty(shape, dtype=getattr(torch, self.meta["dtype"]), device=device)
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            values = self.arrays[name][part, :count]
            self._check(name, part, values)
            kept[start * count : (start + len(part)) * count] = torch.from_numpy(values).flatten(0, 1)
        return kept

    def _check(self, name, rows, values):
        if not np.isfinite(values).all():
            bad = np.asarray(rows)[~np.isfinite(values).reshape(len(values), -1).all(1)][0]
            raise UserError(f"{self.folder}/{name}.npy holds NaN or infinity at {self.ids[bad]}: extract it again")

    def plain(self, ids):
        """{"embedding": (N, D), "logits": (N, C)} float32 of the plain view of these images; logits only of a trained
        head."""
        rows = self.rows(ids)
        names = [
            "embeddings",
            *(["logits"] if "logits" in self.arrays and self.meta["teacher"]["weights"] == "checkpoint" else []),
        ]
        return {StoredTeacher.KEYS[name]: self.read(name, rows, np.zeros(len(rows), int)) for name in names}


CANDIDATES = 4  # reference images whose distances are computed exactly
SAME = 0.01  # of its norm: how far an image may lie from itself, extracted in another batch or precision


def model_of(meta):
    """What the embeddings of two stores must share to be compared."""
    teacher = meta["teacher"]
    shared = {
        "name": teacher["name"],
        "weights": teacher["weights"],
        "sha256": teacher["sha256"],
        "pooling": meta["pooling"],
        **teacher["preprocess"],
    }
    if teacher["weights"].startswith(
        "random"
    ):  # these depend on the size of the head, whose weights are drawn among them
        shared["parameters"] = teacher["parameters"]
    return shared


def nearest(store, reference, device="cpu", chunk=4096):
    """(distances (N,) float32, rows (N,) int64): of each image's plain view to the nearest one of `reference`,
    Euclidean.

    An image that is itself in the reference (its id is there, at nearly its own embedding: other folders may use the
    same names) is not its own neighbour.  `chunk` rows of both are held at a time.  Raises UserError.
    """

    def plain(of, rows):
        return torch.from_numpy(of.read("embeddings", rows, np.zeros(len(rows), int))).to(device)

    ids, count = reference.find(store.ids), len(reference)
    centre = plain(reference, np.arange(min(chunk, count))).mean(0)  # near the origin float32 is more exact
    distances, rows = [], []
    for start in range(0, len(store), chunk):
        queries = plain(store, np.arange(start, min(start + chunk, len(store))))
        twins = torch.from_numpy(ids[start : start + chunk]).to(device)
        there = plain(reference, ids[start : start + chunk].clip(0))
        twins[(queries - there).norm(dim=1) > SAME * queries.norm(dim=1)] = -1
        values = queries.new_full((len(queries), CANDIDATES), torch.inf)
        places = torch.zeros_like(values, dtype=torch.int64)
        for first in range(0, count, chunk):
            others = plain(reference, np.arange(first, min(first + chunk, count))) - centre
            squared = (
                others.square().sum(1) - 2 * (queries - centre) @ others.T
            )  # (B, R), less what a row has in common
            here = torch.nonzero((twins >= first) & (twins < first + len(others)))[:, 0]
            squared[here, twins[here] - first] = torch.inf
            best, order = squared.topk(min(CANDIDATES, len(others)), largest=False)
            values, places = torch.cat([values, best], 1), torch.cat([places, order + first], 1)
            values, order = values.topk(CANDIDATES, largest=False)
            places = places.gather(1, order)
        exact = torch.stack([(queries - plain(reference, column)).norm(dim=1) for column in places.T.cpu().numpy()], 1)
        best, order = exact.masked_fill(values.isinf(), torch.inf).min(1)
        if best.isinf().any():
            raise UserError(
                f"{reference.folder} holds no image but {store.ids[start + int(best.isinf().nonzero()[0])]} itself"
            )
        distances.append(best.cpu().numpy())
        rows.append(places.gather(1, order[:, None])[:, 0].cpu().numpy())
    return np.concatenate(distances), np.concatenate(rows)


STREAM_VIEW = 2001  # of the counter-based generator


class StoredTeacher:
    """What a frozen teacher said, in its place: `targets(batch) -> dict`, and the view of which it said so.

    stores: {"train", "val", "test": Store}; datasets: {the same: dataset}, whose ids must be there; num_views: the
    first K stored views are used (None: all); device: where the outputs are wanted.  Those of train are kept there if
    they take less than a quarter of its free memory, else read from the files a step ahead.  Raises UserError.
    """

    KEYS = {"embeddings": "embedding", "logits": "logits", "tokens": "tokens"}

    def __init__(self, stores, datasets, wanted, num_views=None, seed=0, device="cpu"):
        self.store, self.stores, self.datasets, self.seed = stores["train"], stores, datasets, seed
        self.key = f"stored {self.store.folder}"  # in a batch: what to read, of each of several stores
        self.num_views, self.device = num_views or self.store.num_views, torch.device(device)
        self.store.check_views(self.num_views)
        for name in wanted:
            if name not in self.store.arrays:
                raise UserError(
                    f"{self.store.folder} holds no {name}: this method needs them, extract with --save-{name}"
                )
        self.wanted = wanted
        self.rows = {split: stores[split].rows(dataset.ids) for split, dataset in datasets.items()}
        if self.store.policy.mixes and len(self.rows["train"]) < len(self.store):
            raise UserError(
                f"{self.store.folder} holds mixed views of {len(self.store)} images, which are made again of all of "
                f"them; train has {len(self.rows['train'])}: leave --limit-train and --include-list out"
            )
        size = len(self.rows["train"]) * self.num_views * sum(self.store.arrays[name][0, 0].nbytes for name in wanted)
        self.kept = None
        if size < free_memory(self.device) / 4:  # (N * K, ...), in the dataset's order
            rows = self.rows["train"]
            self.kept = {name: self.store.views(name, rows, self.num_views, self.device) for name in wanted}

    def choose_view(self, batch):
        """In training the view becomes a stored one: a start drawn from (seed, key), then one after another.

        batch: a batch, or a plan of many, see loader.Loader.batches.
        """
        start = uniform(self.seed, 0, STREAM_VIEW, batch["key"].flatten()).view_as(batch["key"]) * self.num_views
        view = (start.long() + batch["view"]) % self.num_views
        if self.kept is not None:
            return {**batch, "view": view, self.key: batch["index"] * self.num_views + view}
        if view.dim() > 1:
            return {**batch, "view": view, self.key: Reads(self.read, batch["index"], view, self.device)}
        return {**batch, "view": view}

    def read(self, index, view, split="train"):
        """{"embedding": (B, D), ...} float32 from the files, on the CPU."""
        rows = self.rows[split][index.numpy()]
        read = self.stores[split].read
        return {self.KEYS[name]: torch.from_numpy(read(name, rows, view.numpy())) for name in self.wanted}

    def targets(self, batch, split="train"):
        """{"embedding": (B, D), "logits": (B, C), ...} float32 on the device, of view batch["view"] of a split."""
        stored = batch.get(self.key)
        if isinstance(stored, torch.Tensor):
            rows = stored.to(self.device)
            return {self.KEYS[name]: values.index_select(0, rows).float() for name, values in self.kept.items()}
        values = stored or self.read(batch["index"], batch["view"], split)
        return {key: value.to(self.device, non_blocking=True) for key, value in values.items()}

    def logits(self, split):
        """(N, C) float32 of the plain images of a split, or None where they are not stored."""
        rows, store = self.rows[split], self.stores[split]
        return store.read("logits", rows, np.zeros(len(rows), int)) if "logits" in store.arrays else None


class Reads:
    """What is read for each of many steps; for a GPU the next step's is read while the model works on this one's."""

    def __init__(self, read, index, view, device):
        self.read, self.index, self.view, self.pinned = read, index, view, device.type == "cuda"
        self.pool, self.ahead = ThreadPoolExecutor(1), {}

    def __getitem__(self, step):
        if not self.pinned:
            return self.read(self.index[step], self.view[step])
        now = self.ahead.pop(step, None) or self.pool.submit(self._pinned, step)
        if step + 1 < len(self.index):
            self.ahead[step + 1] = self.pool.submit(self._pinned, step + 1)
        return now.result()

    def _pinned(self, step):
        return {key: value.pin_memory() for key, value in self.read(self.index[step], self.view[step]).items()}
