"""loader.py: the same batches whatever caches, decodes or interrupts them."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common import cli
from common import loader as loader_module
from common.augment import hash_id
from common.data import DataError, ImageDataset, load_splits
from common.loader import ImageCache, Loader, available_memory, choose_cache, pad_images, save_sample_grid

N = 23  # no multiple of the batch size
WAYS = [("ram", 0), ("device", 0), ("off", 0), ("off", 1), ("off", 2)]  # cache, workers


@pytest.fixture(scope="module")
def tiles():
    """Real images, 427 x 640 x 3 cut to 32 x 32 x 3."""
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("flower.jpg")
    return [photo[32 * i : 32 * i + 32, 32 * j : 32 * j + 32] for i in range(13) for j in range(20)]


def dataset_of(folder, tiles, unequal):
    paths = []
    for i in range(N):
        tile = tiles[7 * i][: 32 - i % 5, : 32 - 3 * (i % 4)] if unequal else tiles[7 * i]
        paths.append(str(folder / f"{i:02d}.png"))
        Image.fromarray(tile).save(paths[-1])
    return ImageDataset([f"train/{i:02d}.png" for i in range(N)], [i % 3 for i in range(N)], paths=paths)


@pytest.fixture(scope="module")
def equal(tmp_path_factory, tiles):
    return dataset_of(tmp_path_factory.mktemp("equal"), tiles, False)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory, tiles):
    return dataset_of(tmp_path_factory.mktemp("unequal"), tiles, True)


@pytest.fixture(params=["equal", "unequal"])
def dataset(request):
    return request.getfixturevalue(request.param)


def same(batch, other):
    return (
        batch["valid"] == other["valid"]
        and torch.equal(batch["targets"]["label"], other["targets"]["label"])
        and all(torch.equal(batch[k], other[k]) for k in ("index", "key", "view", "size", "image"))
    )


def check_contents(batch, dataset):
    """Each row is its file's pixels in the top left corner and black elsewhere, with its own key and label."""
    height, width = batch["image"].shape[2:]
    assert batch["image"].dtype == torch.uint8
    for row, i in enumerate(batch["index"].tolist()):
        pixels = np.array(Image.open(dataset.paths[i]))
        expected = np.zeros((height, width, 3), np.uint8)
        expected[: pixels.shape[0], : pixels.shape[1]] = pixels
        assert np.array_equal(batch["image"][row].permute(1, 2, 0), expected)
        assert batch["size"][row].tolist() == list(pixels.shape[:2])
        assert batch["key"][row] == hash_id(dataset.ids[i]) and batch["targets"]["label"][row] == i % 3


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("shuffle", [True, False])
def test_same_batches_for_any_cache_and_workers(dataset, shuffle):
    reference = None
    for cache, workers in WAYS:
        loader = Loader(dataset, 5, "cpu", shuffle, seed=3, cache=cache, workers=workers)
        batches = [b for epoch in (1, 2) for b in loader.batches(epoch)]  # workers are kept for the second
        if reference is None:
            reference = batches
            for batch in batches:
                check_contents(batch, dataset)
        assert len(batches) == len(reference) == 2 * len(loader) == (8 if shuffle else 10)
        assert all(map(same, batches, reference)), (cache, workers)


@pytest.mark.parametrize("grey", [False, True])
def test_same_batches_for_images_in_memory(tiles, grey):
    images = np.stack(tiles[:N])[..., 1] if grey else np.stack(tiles[:N])
    dataset = ImageDataset([f"train/{i}" for i in range(N)], [0] * N, images)
    made = [list(Loader(dataset, 5, "cpu", True, cache=cache, workers=0).batches(1)) for cache in ("auto", "off")]
    assert all(map(same, *made))
    for batch in made[0]:
        expected = images[batch["index"]]
        expected = np.repeat(expected[:, None], 3, 1) if grey else expected.transpose(0, 3, 1, 2)
        assert np.array_equal(batch["image"], expected)


def test_order_is_a_function_of_seed_and_epoch(equal):
    def order(seed, epoch, batch_size=5):
        return torch.cat(
            [b["index"] for b in Loader(equal, batch_size, "cpu", True, seed, "ram").batches(epoch)]
        ).tolist()

    first = order(0, 1)
    torch.manual_seed(99)
    assert order(0, 1) == first and len(first) == len(set(first)) == 20  # the last three of 23 are dropped
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(1, 4)]
    assert len({tuple(o) for o in orders}) == 9
    assert len(set(sum(orders, []))) == N  # other samples are dropped in other epochs
    assert order(0, 1, batch_size=4) == first  # nor does the batch size change it
    assert len(order(0, 1, batch_size=64)) == N  # a batch larger than the dataset is cut to it


def test_evaluation_pads_the_last_batch(dataset):
    batches = list(Loader(dataset, 5, "cpu", cache="ram").batches())
    assert [b["valid"] for b in batches] == [5, 5, 5, 5, 3] and all(
        len(b["index"]) == len(b["image"]) == 5 for b in batches
    )
    assert torch.cat([b["index"][: b["valid"]] for b in batches]).tolist() == list(range(N))
    assert batches[-1]["index"].tolist() == [20, 21, 22, 22, 22]
    (only,) = Loader(dataset, 32, "cpu", cache="ram").batches()
    assert only["valid"] == N and len(only["image"]) == 32


def test_views(equal):
    train, val = Loader(equal, 5, "cpu", True), Loader(equal, 5, "cpu")
    assert {int(v) for b in train.batches(7) for v in b["view"]} == {7}
    assert {int(v) for b in val.batches(7) for v in b["view"]} == {0}


@pytest.mark.parametrize(("cache", "workers"), [("ram", 0), ("off", 0), ("off", 2)])
def test_start_continues_the_epoch(unequal, cache, workers):
    whole = list(Loader(unequal, 5, "cpu", True, 1, "ram").batches(4))
    loader = Loader(unequal, 5, "cpu", True, 1, cache, workers)
    next(loader.batches(4))  # what was begun and given up (as --save-samples does) leaves no trace
    for start in (1, 3, 4):
        assert (
            all(map(same, loader.batches(4, start), whole[start:])) and len(list(loader.batches(4, start))) == 4 - start
        )
    ends = list(Loader(unequal, 5, "cpu", cache="ram").batches(0, 4))
    assert len(ends) == 1 and ends[0]["valid"] == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_alone(equal, workers):
    """A resumed epoch starts its workers again: were they seeded by torch's generator, dropout would differ."""
    loader = Loader(equal, 5, "cpu", True, cache="off", workers=workers)
    before = torch.get_rng_state()
    list(loader.batches(1))
    list(loader.batches(1, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_leave_signals_to_the_main_process(equal):
    """srun and the scheduler signal every process of a step; the workers must go on until the step is done."""
    loader = Loader(equal, 1, "cpu", cache="off", workers=1)
    batches = loader.batches()
    seen = [next(batches)]
    worker = loader._workers._iterator._workers[0]
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    seen += list(batches)
    assert len(seen) == N and worker.is_alive()


@pytest.mark.parametrize(
    "signals",
    ["", "kill -STOP $pids; kill -TERM $pids; (sleep 3; kill -CONT $pids) > /dev/null 2>&1 &"],
    ids=["alone", "SIGTERM pending"],
)
def test_a_crash_ends_the_workers(signals):
    """multiprocessing ends them by SIGTERM at exit and waits: when they ignored it, a crashed job went on for ever.

    A scheduler's SIGTERM may be pending then; the kernel keeps one of the two, with its sender.
    """
    code = (
        "import subprocess\nfrom common.data import load_splits\nfrom common.loader import Loader\n"
        "loader = Loader(load_splits('digits').val, 8, 'cpu', cache='off', workers=2)\n"
        "for batch in loader.batches():\n"
        "    pids = ' '.join(str(worker.pid) for worker in loader._workers._iterator._workers)\n"
        f"    subprocess.run(f'pids=\"{{pids}}\"; {signals}', shell=True, check=True)\n"
        "    raise KeyError('our own fault')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "our own fault" in done.stderr


def test_pad_images():
    one, two = torch.full((3, 2, 5), 7, dtype=torch.uint8), torch.full((3, 4, 1), 9, dtype=torch.uint8)
    images, sizes = pad_images([one, two])
    assert images.shape == (2, 3, 4, 5) and sizes.tolist() == [[2, 5], [4, 1]]
    assert torch.equal(images[0, :, :2], one) and images[0, :, 2:].sum() == 0
    assert torch.equal(images[1, :, :, :1], two) and images[1, :, :, 1:].sum() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("cache", ["ram", "device", "off"])
def test_batches_on_a_gpu(unequal, cache):
    reference = list(Loader(unequal, 5, "cpu", True, cache="ram").batches(1))
    for batch, expected in zip(Loader(unequal, 5, "cuda", True, cache=cache, workers=1).batches(1), reference):
        assert batch["image"].is_cuda and batch["targets"]["label"].is_cuda and not batch["size"].is_cuda
        batch.update(image=batch["image"].cpu(), targets={"label": batch["targets"]["label"].cpu()})
        assert same(batch, expected)


# ---------------------------------------------------------------------------------------------------------------- cache


def test_choose_cache(equal, monkeypatch):
    cpu, needed = torch.device("cpu"), N * 32 * 32 * 3
    assert choose_cache(equal, "device", cpu) == "ram" and choose_cache(equal, "off", cpu) == "off"
    monkeypatch.setattr(loader_module, "available_memory", lambda: 4 * needed + 8)
    assert choose_cache(equal, "auto", cpu) == "ram"
    monkeypatch.setattr(loader_module, "available_memory", lambda: 4 * needed - 8)
    assert choose_cache(equal, "auto", cpu) == "off" and Loader(equal, 5, "cpu", workers=0).cache is None
    digits = load_splits("digits").val  # decoded and grey: cached as three channels they take three times as much again
    for spare, kind in ((-8, "off"), (8, "ram")):
        monkeypatch.setattr(loader_module, "available_memory", lambda spare=spare: 4 * 3 * digits.images.nbytes + spare)
        assert choose_cache(digits, "auto", cpu) == kind


def test_processes_of_a_node_share_its_memory_and_its_cores(equal, monkeypatch):
    """Of 4 here (and 4 on another node) each may take a quarter of what one alone would."""
    needed = N * 32 * 32 * 3
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loader_module, "available_cpus", lambda: 12)
    for free, cache in ((4 * 4 * needed + 8, "ram"), (4 * 4 * needed - 8, "off")):
        monkeypatch.setattr(loader_module, "available_memory", lambda free=free: free)
        assert choose_cache(equal, "auto", torch.device("cpu")) == cache
    assert Loader(equal, 5, "cpu", cache="off").workers == 3


def test_cache_holds_each_image_once(unequal):
    cache = ImageCache(unequal, "cpu")
    assert cache.uniform is None and cache.flat.numel() == int((3 * cache.sizes.prod(1)).sum())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/self/cgroup": "0::/\n"}, 8000),
        (
            {
                "/proc/self/cgroup": "0::/\n",
                "/sys/fs/cgroup/memory.max": "max\n",
                "/sys/fs/cgroup/memory.current": "5\n",
            },
            8000,
        ),
        (
            {
                "/proc/self/cgroup": "0::/\n",
                "/sys/fs/cgroup/memory.max": "5000\n",
                "/sys/fs/cgroup/memory.current": "1000\n",
            },
            4000,
        ),
        # a Slurm job: the limit stands two levels above the step
        (
            {
                "/proc/self/cgroup": "0::/slurm/job_7/step_0/user\n",
                "/sys/fs/cgroup/slurm/job_7/memory.max": "3000\n",
                "/sys/fs/cgroup/slurm/job_7/memory.current": "1000\n",
            },
            2000,
        ),
        (
            {
                "/proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n",
                "/sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "3500\n",
                "/sys/fs/cgroup/memory/slurm/job_7/memory.usage_in_bytes": "1000\n",
            },
            2500,
        ),
        (
            {
                "/proc/self/cgroup": "0::/\n",
                "/sys/fs/cgroup/memory.max": "1000\n",
                "/sys/fs/cgroup/memory.current": "2000\n",
            },
            0,
        ),
        ({}, 8000),
    ],
)
def test_available_memory(monkeypatch, files, expected):
    files = {"/proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 7.8125 kB\n".replace("7.8125", "8"), **files}

    def read(path, *_):
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])

    monkeypatch.setattr(loader_module, "open", read, raising=False)
    expected = 8192 if expected == 8000 else expected
    if "/proc/self/cgroup" not in files:  # no Linux
        expected = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert available_memory() == expected


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("cache", "workers"), WAYS)
def test_a_broken_image_is_one_line(tmp_path, tiles, cache, workers):
    dataset = dataset_of(tmp_path, tiles, False)
    with open(dataset.paths[17], "r+b") as file:
        file.truncate(200)
    with pytest.raises(DataError) as caught:
        list(Loader(dataset, 5, "cpu", cache=cache, workers=workers).batches())
    text = str(caught.value)
    assert dataset.paths[17] in text and "--on-bad-image skip" in text and "\n" not in text and "Traceback" not in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("cache", ["auto", "ram", "off"])
def test_a_pipe_is_no_image(tmp_path, tiles, cache):
    """To open one would wait for its other end, perhaps for ever."""
    dataset = dataset_of(tmp_path, tiles, False)
    os.remove(dataset.paths[3])
    os.mkfifo(dataset.paths[3])
    with pytest.raises(DataError, match="03.png is not a regular file.*--on-bad-image skip"):
        list(Loader(dataset, 5, "cpu", cache=cache, workers=0).batches())


def test_too_little_shared_memory_is_one_line(equal, monkeypatch):
    """The worker that cannot hand its batch over says so; the batch would be awaited for ever."""

    def full(*args, **more):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)  # the worker is forked
    with pytest.raises(DataError, match="/dev/shm is too small.*--workers 0.*--shm-size") as caught:
        list(Loader(equal, 5, "cpu", cache="off", workers=1).batches())
    assert "--on-bad-image" not in str(caught.value)
    assert len(list(Loader(equal, 5, "cpu", cache="off", workers=0).batches())) == 5


def test_a_worker_that_is_killed_is_one_line(equal, monkeypatch, capsys):
    def main(args):
        loader = Loader(equal, 1, "cpu", cache="off", workers=1)
        for _ in loader.batches():
            loader._workers._iterator._workers[0].kill()

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run_script(main, lambda: cli.Parser("trains"))
    errors = capsys.readouterr().err
    assert (
        stop.value.code == 1
        and errors.startswith("error: a process that decodes images was killed")
        and len(errors.splitlines()) == 1
    )


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "socket")])
def test_a_worker_that_dies_while_it_sends_is_one_line(equal, monkeypatch, capsys, error):
    """Whichever end of the pipe notices first."""

    def main(args):
        loader = Loader(equal, 1, "cpu", cache="off", workers=1)
        batches = loader.batches()
        next(batches)
        monkeypatch.setattr(type(loader._workers._iterator), "_next_data", lambda self: (_ for _ in ()).throw(error))
        list(batches)

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run_script(main, lambda: cli.Parser("trains"))
    errors = capsys.readouterr().err
    assert stop.value.code == 1 and len(errors.splitlines()) == 1
    assert errors.startswith("error: a process that decodes images was killed")


def test_a_broken_image_found_when_choosing_a_cache(tmp_path, tiles):
    dataset = dataset_of(tmp_path, tiles, False)
    os.remove(dataset.paths[0])
    with pytest.raises(DataError, match="00.png.*--on-bad-image skip"):
        Loader(dataset, 5, "cpu", cache="auto")


# ---------------------------------------------------------------------------------------------------------------
# samples


def test_sample_grid(tmp_path, tiles):
    teacher = torch.from_numpy(np.stack(tiles[:20])).permute(0, 3, 1, 2) / 255  # (20, 3, 32, 32)
    student = torch.nn.functional.avg_pool2d(teacher, 4)  # (20, 3, 8, 8)
    save_sample_grid(tmp_path / "grid.png", [teacher, student])
    sheet = np.array(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 + 2 * 66, 2 + 16 * 66, 3)  # sixteen columns of 64 px, gaps of two between and around them
    sheet = sheet[2:, 2:]
    for i in (0, 15):
        above, below = sheet[:64, 66 * i : 66 * i + 64], sheet[66:130, 66 * i : 66 * i + 64]
        assert np.array_equal(above, tiles[i].repeat(2, 0).repeat(2, 1))
        expected = tiles[i].reshape(8, 4, 8, 4, 3).mean((1, 3)).repeat(8, 0).repeat(8, 1)
        assert np.abs(below - expected).max() <= 0.5 + 1e-3
    save_sample_grid(tmp_path / "few.png", [teacher[:3]])
    assert Image.open(tmp_path / "few.png").size == (2 + 3 * 66, 2 + 66)
    with pytest.raises(DataError, match="cannot draw samples to .*grid.xyz"):
        save_sample_grid(str(tmp_path / "grid.xyz"), [teacher])


# -------------------------------------------------------------------------------------------------- labels in a batch


@pytest.mark.parametrize("share, wanted", [(0.25, 2), (0.5, 4), (0.875, 7)])
def test_each_batch_has_its_share_of_labels(share, wanted):
    labels = np.where(np.arange(100) < 10, np.arange(100) % 3, -1)
    dataset = ImageDataset([str(i) for i in range(100)], labels, images=np.zeros((100, 4, 4, 3), np.uint8))

    def loader(seed=0):
        return Loader(dataset, 8, "cpu", shuffle=True, cache="ram", labelled_share=share, seed=seed)

    seen = []
    for batch in loader().batches(3):
        assert (batch["targets"]["label"] >= 0).sum() == wanted
        seen += list(zip(batch["index"].tolist(), batch["view"].tolist()))
    assert len(seen) == 96 and len(set(seen)) == 96, "an image that comes again has another view"
    counts = np.bincount([row for row, _ in seen], minlength=100)
    for pool, drawn in ((counts[:10], 12 * wanted), (counts[10:], 12 * (8 - wanted))):
        assert pool.sum() == drawn and pool.max() - pool.min() <= 1
    order = loader().order(3)
    assert torch.equal(order, loader().order(3)) and not torch.equal(order, loader(1).order(3))
    halves = torch.from_numpy(labels)[order].view(-1, 2, 4)  # of two processes
    assert ((halves >= 0).any(2).float().mean(0) > 0.3).all(), "each process gets some of both"


def test_a_share_that_cannot_be_had():
    dataset = ImageDataset(list("abcd"), np.zeros(4), images=np.zeros((4, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="--labelled-share 0.5 of --batch-size 4 .* 4 images with and 0 without"):
        Loader(dataset, 4, "cpu", shuffle=True, cache="ram", labelled_share=0.5).order(1)
