"""extract_embeddings.py and the store: what is stored is what the teacher says of the view that can be made again."""

import errno
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, script_environment, succeed

from common import data
from common.augment import Augmenter, Policy
from common.data import load_splits
from common.embeddings import Store, StoredTeacher, Writer, difference, merge, shard_rows, split_folder
from common.loader import Loader
from common.models import build_model
from common.run import UserError, load_checkpoint
from common.teacher import Found, open_stores
from common.training import Precision, live_teacher, load_model

NAMES = ("embeddings", "logits", "tokens", "ids", "labels")
SAVE = ["--save-logits", "--save-tokens", "--num-views", 3, "--device", "cpu", "--batch-size", 32]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("embeddings") / "all"
    succeed("extract_embeddings.py", "--checkpoint", teacher / "best.pth", *SAVE, "--rotation", 20, "--output", folder)
    return folder


def assert_equal_stores(a, b):
    for split in ("train", "val", "test"):
        for name in NAMES:
            x, y = (np.load(split_folder(folder, split) + f"/{name}.npy", allow_pickle=False) for folder in (a, b))
            assert x.dtype == y.dtype and np.array_equal(x, y), (split, name)


@pytest.fixture
def file_limit():
    """file_limit(bytes): no file may grow larger, as with a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_quota_is_found_before_the_first_image(tmp_path, file_limit):
    ids, meta = [f"{i:04d}" for i in range(1000)], {"seed": 0}
    file_limit(500_000)
    with pytest.raises(UserError) as error:
        Writer(tmp_path, meta, ids, np.zeros(1000), {"embeddings": (1, 512)})
    assert str(error.value) == f"cannot write {tmp_path}/embeddings.npy.part, which takes 1.0 MB: File too large"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ids.npy", "labels.npy"]  # nothing that looks begun
    file_limit(10_000)
    with pytest.raises(OSError) as error:
        Writer(tmp_path / "ids", meta, ids, np.zeros(1000), {"embeddings": (1, 1)})
    assert error.value.errno == errno.EFBIG and not list((tmp_path / "ids").iterdir())


def test_space_is_taken_at_once(tmp_path):
    """Else a full disk would be a bus error in the middle."""
    writer = Writer(tmp_path, {"seed": 0}, list("abcd"), np.zeros(4), {"embeddings": (1, 100_000)})
    assert os.stat(tmp_path / "embeddings.npy.part").st_blocks * 512 >= 4 * 100_000 * 2
    writer.write([0, 1, 2, 3], {"embeddings": np.ones((4, 1, 100_000))})
    writer.finish()
    assert (np.load(tmp_path / "embeddings.npy") == 1).all()


# ------------------------------------------------------------------------------------------------------------- content


def test_layout_and_meta(extracted, teacher):
    sizes = {"train": 808, "val": 270, "test": 719}
    for split, count in sizes.items():
        folder = extracted / f"{split}_embeddings"
        assert {f.name for f in folder.iterdir()} == {f"{name}.npy" for name in NAMES} | {"meta.json"}
        store = Store(folder)
        assert len(store) == count and store.num_views == 3 and store.arrays["embeddings"].shape == (count, 3, 512)
        assert store.arrays["embeddings"].dtype == np.float16 and store.arrays["tokens"].shape == (count, 3, 1, 512)
        dataset = getattr(load_splits("digits"), split)  # all of its images, though the teacher saw a part
        assert list(store.ids) == dataset.ids and np.array_equal(store.labels, dataset.labels)
        assert (
            store.meta["teacher"]["sha256"] == json.loads((teacher / "results.json").read_text())["checkpoint_sha256"]
        )
        assert store.meta["split"] == split and store.policy == Policy("pad", 0.125, rotation=20)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_stored_view_is_the_live_teacher_s_of_the_remade_view(extracted, teacher, split):
    """Another batch size, order and process: cosine above 0.999 for every image and view."""
    store = Store(extracted / f"{split}_embeddings")
    model, preprocess = load_model(load_checkpoint(str(teacher / "best.pth")))
    targets = live_teacher(
        model, preprocess, Augmenter(store.policy, store.seed), Precision("off", torch.device("cpu"))
    )
    dataset = getattr(load_splits("digits"), split).subset(np.arange(100)[::-1])
    rows = store.rows(dataset.ids)
    for batch in Loader(dataset, 25, "cpu", shuffle=True, seed=9).batches(7):
        own = rows[batch["index"].numpy()]
        for view in range(3):
            live = targets({**batch, "view": torch.full_like(batch["view"], view)})
            for name, key in (("embeddings", "embedding"), ("logits", "logits")):
                stored = torch.from_numpy(store.read(name, own, np.full(len(own), view)))
                assert torch.cosine_similarity(stored, live[key]).min() > 0.999
            other = torch.from_numpy(store.read("embeddings", own, np.full(len(own), (view + 1) % 3)))
            assert torch.cosine_similarity(other, live["embedding"]).min() < 0.99  # views differ


# ------------------------------------------------------------------------------------- interrupted, sharded, processes


def start(*args):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "extract_embeddings.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=script_environment(),
    )


def test_stopped_and_continued(extracted, teacher, tmp_path):
    """By SIGTERM, which ends the process at once, as SIGKILL does, but for one line."""
    flags = ["--checkpoint", teacher / "best.pth", *SAVE, "--rotation", 20, "--output", tmp_path / "e"]
    process, done = start(*flags), tmp_path / "e" / "train_embeddings" / "done.npy.part"
    end = time.time() + 100
    while not (done.exists() and done.stat().st_size > 800 and np.load(done).any()):
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    left = int((np.load(done) == 0).sum())
    assert 0 < left < 808, "it was stopped in the middle of train"
    assert errors.startswith("interrupted") and len(errors.splitlines()) == 1
    with pytest.raises(UserError, match="not finished"):
        Store(tmp_path / "e" / "train_embeddings")
    kept = np.load(done).copy()
    marked = np.load(str(done).replace("done", "embeddings"), "r+")
    first = int(np.flatnonzero(kept)[0])
    marked[first] = 7  # rows that are done are not made again
    marked.flush()
    succeed("extract_embeddings.py", *flags)
    store = np.load(tmp_path / "e" / "train_embeddings" / "embeddings.npy", "r+")
    assert (store[first] == 7).all()
    store[first] = np.load(extracted / "train_embeddings" / "embeddings.npy")[first]
    store.flush()
    assert_equal_stores(extracted, tmp_path / "e")


def test_three_shards_merged(extracted, teacher, tmp_path):
    flags = ["--checkpoint", teacher / "best.pth", *SAVE, "--rotation", 20, "--output", tmp_path / "e"]
    for i in (2, 0):
        succeed("extract_embeddings.py", *flags, "--shard", f"{i}/3")
    done = run_script("extract_embeddings.py", "--merge", 3, "--output", tmp_path / "e")
    assert done.returncode == 2 and "shard 1 of 3" in done.stderr and "--shard 1/3" in done.stderr
    succeed("extract_embeddings.py", *flags, "--shard", "1/3")
    with pytest.raises(UserError, match="--merge"):
        Store(tmp_path / "e" / "train_embeddings")
    succeed("extract_embeddings.py", "--merge", 3, "--output", tmp_path / "e")
    assert_equal_stores(extracted, tmp_path / "e")
    assert json.loads((tmp_path / "e/val_embeddings/meta.json").read_text())["count"] == 270


def test_two_processes_write_disjoint_rows(extracted, teacher, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(ROOT / "extract_embeddings.py"),
            "--checkpoint",
            str(teacher / "best.pth"),
            *map(str, SAVE),
            "--rotation",
            "20",
            "--output",
            str(tmp_path / "e"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**script_environment(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert_equal_stores(extracted, tmp_path / "e")


@pytest.mark.parametrize("count, parts", [(10, 3), (2, 3), (7, 7), (1, 1)])
def test_shards_hold_every_row_once(count, parts):
    rows = [row for i in range(parts) for row in range(*shard_rows(count, (i, parts)))]
    assert rows == list(range(count))


# --------------------------------------------------------------------------------------------------------------
# refusals


def test_another_extraction_is_refused(extracted, teacher):
    before = (extracted / "val_embeddings" / "embeddings.npy").read_bytes()
    for flags, words in (
        (["--rotation", 10], "policy"),
        (["--rotation", 20, "--seed", 1], "seed"),
        (["--rotation", 20, "--num-views", 2], "num_views: 3, not 2"),
    ):
        done = run_script(
            "extract_embeddings.py", "--checkpoint", teacher / "best.pth", *SAVE, *flags, "--output", extracted
        )
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    done = succeed(
        "extract_embeddings.py", "--checkpoint", teacher / "best.pth", *SAVE, "--rotation", 20, "--output", extracted
    )
    assert done.stdout.count("complete") == 3
    assert (extracted / "val_embeddings" / "embeddings.npy").read_bytes() == before


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--checkpoint"),
        (["--model", "resnet8", "--checkpoint", "x.pth"], "one of"),
        (["--model", "resnet8", "--pooling", "cls"], "class token"),
        (["--model", "resnet8", "--limit-train", "5"], "--limit-train"),
        (["--model", "resnet8", "--shard", "3/3"], "3/3"),
        (["--model", "resnet8", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--merge", "2"], "embeddings"),
    ],
)
def test_bad_flags(tmp_path, flags, words):
    done = run_script("extract_embeddings.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not any(tmp_path.iterdir())


def small_writer(folder, **options):
    meta = {"seed": 0, "policy": Policy().to_dict(), "num_views": 2}
    return Writer(str(folder), meta, [f"id{i}" for i in range(6)], np.arange(6), {"embeddings": (2, 4)}, **options)


def small_store(folder):
    writer = small_writer(folder)
    writer.write(np.arange(6), {"embeddings": np.arange(48).reshape(6, 2, 4)})
    writer.finish()
    return Store(str(folder))


def test_rows_are_found_by_id(tmp_path):
    store = small_store(tmp_path / "s")
    assert store.rows(["id4", "id0", "id4"]).tolist() == [4, 0, 4]
    assert store.read("embeddings", store.rows(["id4", "id0"]), [1, 0]).tolist() == [[36, 37, 38, 39], [0, 1, 2, 3]]
    with pytest.raises(UserError, match="lacks 2 of 3 images, the first is other"):
        store.rows(["id1", "other", "zzz"])
    with pytest.raises(UserError, match="--num-views 3"):
        store.check_views(3)
    with pytest.raises(UserError, match="--save-logits"):
        store.read("logits", [0], [0])


def test_damaged_stores(tmp_path):
    small_store(tmp_path / "s")

    def damaged(name, change):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(tmp_path / "s", tmp_path / "d")
        change(tmp_path / "d" / name)
        return str(tmp_path / "d")

    for name, change, words in (
        ("embeddings.npy", lambda p: p.write_bytes(p.read_bytes()[:-8]), "truncated"),
        ("embeddings.npy", lambda p: p.unlink(), "missing"),
        ("embeddings.npy", lambda p: np.save(p, np.zeros((5, 2, 4), np.float16)), r"meta.json says"),
        ("embeddings.npy", lambda p: p.write_bytes(b""), "truncated"),
        ("ids.npy", lambda p: np.save(p, np.array(["a"])), r"ids <U1 \(1,\)"),
        ("ids.npy", lambda p: np.save(p, np.array("a")), r"ids <U1 \(\)"),
        ("labels.npy", lambda p: np.save(p, np.array(["a"] * 6)), r"labels <U1 \(6,\)"),
        ("labels.npy", lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True), "damaged"),
        ("meta.json", lambda p: p.write_text("{"), "not valid JSON"),
        ("meta.json", lambda p: p.write_text('{"format": 9}'), "format"),
        ("meta.json", lambda p: p.write_text(p.read_text().replace('"policy"', '"police"')), "meta.json lacks policy"),
    ):
        with pytest.raises(UserError, match=words):
            Store(damaged(name, change))
    part = small_writer(tmp_path / "p").path("embeddings") + ".part"
    open(part, "wb").close()
    with pytest.raises(UserError, match="embeddings.npy.part is truncated or damaged"):
        small_writer(tmp_path / "p")
    nan = np.arange(48, dtype=np.float16).reshape(6, 2, 4)
    nan[3, 1, 2] = np.nan
    store = Store(damaged("embeddings.npy", lambda p: np.save(p, nan)))
    store.read("embeddings", [3, 1], [0, 1])
    with pytest.raises(UserError, match="NaN or infinity at id3"):
        store.read("embeddings", [1, 3], [1, 1])
    with pytest.raises(UserError, match="is not a folder of stored"):
        Store(str(tmp_path / "nowhere"))


def test_values_that_do_not_fit(tmp_path):
    values = np.zeros((2, 2, 4))
    values[1, 0, 0] = 1e6
    with pytest.raises(UserError, match="id3 does not fit float16"):
        small_writer(tmp_path / "a").write([2, 3], {"embeddings": values})
    small_writer(tmp_path / "b", dtype="float32").write([2, 3], {"embeddings": values})
    values[1, 0, 0] = np.nan
    with pytest.raises(UserError, match="id3 is not finite"):
        small_writer(tmp_path / "c").write([2, 3], {"embeddings": values})


def test_shards_of_other_extractions_are_not_joined(tmp_path):
    folder = tmp_path / "s"
    for i, seed in ((0, 0), (1, 5)):
        meta = {"seed": seed, "policy": Policy().to_dict(), "num_views": 2}
        writer = Writer(
            str(folder), meta, [f"id{i}" for i in range(6)], np.arange(6), {"embeddings": (2, 4)}, shard=(i, 2)
        )
        writer.write(np.arange(3 * i, 3 * i + 3), {"embeddings": np.ones((3, 2, 4))})
        writer.finish()
    with pytest.raises(UserError, match="seed"):
        merge(str(folder), 2)
    with pytest.raises(UserError, match="shards of one extraction only"):
        merge(str(folder), 1)
    short = folder / "embeddings.1-of-2.npy"
    (folder / "meta.1-of-2.json").write_text((folder / "meta.0-of-2.json").read_text())
    np.save(short, np.ones((2, 2, 4), np.float16))
    with pytest.raises(UserError, match="rows overlap or are lacking"):
        merge(str(folder), 2)
    assert not (folder / "meta.json").exists() and (folder / "embeddings.0-of-2.npy").exists()


def test_difference_names_what_differs():
    assert difference({"a": 1, "environment": 1}, {"a": 1, "environment": 2}) is None
    assert difference({"a": 1, "b": 2}, {"a": 1}) == "b: null, not 2"


def test_unfinished_rows_are_not_finished(tmp_path):
    writer = small_writer(tmp_path / "s")
    writer.write([0, 1], {"embeddings": np.ones((2, 2, 4))})
    assert writer.todo.tolist() == [2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="4 rows"):
        writer.finish()
    assert small_writer(tmp_path / "s").todo.tolist() == [2, 3, 4, 5]  # as a second process finds it
    assert small_writer(tmp_path / "s", overwrite=True).todo.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_does_not_grow_with_the_images(tmp_path):
    """Peak memory at 4,000 images beyond that at 500 stays below a tenth of what the added values take."""
    code = (
        "import sys, resource, numpy as np; sys.path.insert(0, sys.argv[1]);"
        "from common.embeddings import Writer; n = int(sys.argv[3]);"
        "w = Writer(sys.argv[2], {}, [f'id{i}' for i in range(n)], np.zeros(n), {'tokens': (1, 64, 512)}, 'float32');"
        "x = np.ones((50, 1, 64, 512), np.float32);"
        "f = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) / 1024;"
        "[w.write(np.arange(i, i + 50), {'tokens': x}) for i in range(0, n, 50)]; print(f())"
    )
    peaks = []
    for n in (500, 4000):
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT), str(tmp_path / str(n)), str(n)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
        shutil.rmtree(tmp_path / str(n))
    assert peaks[1] - peaks[0] < 0.1 * (4000 - 500) * 64 * 512 * 4 / 2**20, peaks


def test_random_weights_by_name_are_the_seed_s(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        succeed(
            "extract_embeddings.py",
            "--model",
            "vit_6_192",
            "--pooling",
            "mean",
            "--splits",
            "val",
            "--seed",
            seed,
            "--output",
            tmp_path / name,
        )
    a, b, c = (np.load(tmp_path / name / "val_embeddings/embeddings.npy") for name in "abc")
    assert a.shape == (270, 1, 192) and np.array_equal(a, b) and not np.array_equal(a, c)


# ------------------------------------------------------------------------------------------------ teaching from a store


def test_the_view_is_a_function_of_seed_epoch_and_key(tmp_path):
    writer = Writer(
        str(tmp_path / "s"),
        {"seed": 0, "policy": Policy().to_dict(), "num_views": 4},
        [f"id{i}" for i in range(200)],
        np.arange(200),
        {"embeddings": (4, 2)},
    )
    values = np.stack([np.stack([np.full(200, v), np.arange(200)], 1) for v in range(4)], 1)  # (200, 4, 2): (view, row)
    writer.write(np.arange(200), {"embeddings": values})
    writer.finish()
    store = Store(str(tmp_path / "s"))

    class Dataset:
        ids = [f"id{i}" for i in range(199, -1, -1)]  # in another order than the store's

    def teacher(**options):
        return StoredTeacher(
            dict.fromkeys(("train", "val", "test"), store), {"train": Dataset}, ["embeddings"], **options
        )

    def batch(epoch, index):
        index = torch.tensor(index)
        return {
            "index": index,
            "key": index * 77,
            "view": torch.full_like(index, epoch),
            "image": torch.zeros(len(index)),
        }

    everything = list(range(200))
    seen = torch.stack([teacher().choose_view(batch(epoch, everything))["view"] for epoch in range(1, 5)])
    assert all(sorted(column.tolist()) == [0, 1, 2, 3] for column in seen.T)  # each view once in four epochs
    assert all(40 < count < 60 or 30 < count < 70 for count in torch.bincount(seen[0]).tolist())
    alone = teacher().choose_view(batch(2, [5, 3]))["view"]
    assert alone.tolist() == seen[1][[5, 3]].tolist()  # not of the batch
    assert not torch.equal(teacher(seed=1).choose_view(batch(1, everything))["view"], seen[0])
    assert teacher(num_views=2).choose_view(batch(3, everything))["view"].max() == 1
    chosen = teacher().choose_view(batch(1, [0, 7]))
    told = teacher().targets(chosen)["embedding"]
    assert told.tolist() == [[chosen["view"][0], 199], [chosen["view"][1], 192]]  # by id, of the view that is shown


@pytest.mark.parametrize(
    "method, terms",
    [
        (["--method", "response"], ["ce", "kl"]),
        (
            [
                "--loss",
                *"ce=1 kl=1 projection=1 crd=1 rkd_distance=1 rkd_angle=1 mmd=1".split(),
            ],
            ["ce", "kl", "projection", "crd", "rkd_distance", "rkd_angle", "mmd"],
        ),
    ],
)
def test_distillation_from_the_store_is_that_of_the_live_teacher(extracted, teacher, tmp_path, method, terms):
    """Plain images: the same losses, up to float16."""
    flags = ["--resolution", 8, "--limit-train", 160, "--epochs", 2, "--lr", 0.001, "--device", "cpu", *method]
    live = [*flags, "--dataset", "digits", "--augment", "none", "--teacher-checkpoint", teacher / "best.pth"]
    succeed("distill.py", *live, "--output", tmp_path / "live")
    done = succeed(
        "distill.py", *flags, "--teacher-embeddings", extracted, "--num-views", 1, "--output", tmp_path / "stored"
    )
    assert "1 stored views" in done.stdout
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("live", "stored"))
    for x, y in zip(a, b):
        for name in terms:
            assert x[f"train_{name}"] == pytest.approx(y[f"train_{name}"], rel=0.01), name
    ours, theirs = (
        json.loads((tmp_path / name / "results.json").read_text())["teacher"] for name in ("live", "stored")
    )
    assert ours["sha256"] == theirs["sha256"] and ours["val"]["accuracy"] == pytest.approx(
        theirs["val"]["accuracy"], abs=0.005
    )


def test_embedding_distillation_stops_and_resumes_exactly(extracted, tmp_path):
    from test_resume import same, stopped

    flags = [
        "--teacher-embeddings",
        extracted,
        "--method",
        "embedding",
        "--loss-options",
        "embedding.teacher_projector=frozen-orthogonal",
        "embedding.shared_dim=32",
        "--optimizer",
        "adamw",
        "--limit-train",
        160,
        "--epochs",
        3,
        "--device",
        "cpu",
    ]
    succeed("distill.py", *flags, "--output", tmp_path / "whole")
    row = json.loads((tmp_path / "whole" / "metrics.json").read_text())[-1]
    assert row["train_teacher_variance"] > 1e-4 and {"train_embedding", "val_agreement"} <= row.keys()
    stopped("epoch 1/3:", signal.SIGTERM, "distill.py", *flags, "--output", tmp_path / "run")
    succeed("distill.py", "--resume", tmp_path / "run")
    same(*(torch.load(tmp_path / name / "latest.pth", weights_only=True) for name in ("run", "whole")))


def test_an_extraction_of_other_images_does_not_go_on(tmp_path):
    """The same settings, as many images, other ids: neither an unfinished store nor a whole one is taken for its
    own."""
    writer = small_writer(tmp_path / "s")
    writer.write([0, 1], {"embeddings": np.ones((2, 2, 4))})
    arguments = (
        {"seed": 0, "policy": Policy().to_dict(), "num_views": 2},
        [f"other{i}" for i in range(6)],
        np.arange(6),
        {"embeddings": (2, 4)},
    )
    with pytest.raises(UserError, match="other images"):
        Writer(str(tmp_path / "s"), *arguments)
    small_store(tmp_path / "t")
    with pytest.raises(UserError, match="other images"):
        Writer(str(tmp_path / "t"), *arguments)
    assert list(Store(str(tmp_path / "t")).ids) == [f"id{i}" for i in range(6)]


def test_the_student_is_shown_the_views_of_the_store_s_seed(here, tmp_path):
    """A student that is the teacher, and does not learn, has the teacher's distances, up to float16, on those views
    alone."""
    flags = ["--resolution", 8, "--weights", "w.pth", "--device", "cpu", "--model", "vit_6_192"]
    torch.save(build_model("vit_6_192", 10, 8).backbone.state_dict(), tmp_path / "w.pth")
    assert (
        here("extract_embeddings.py", *flags, "--num-views", 2, "--seed", 5, "--rotation", 90, "--brightness", 0.9)[0]
        == 0
    )
    losses = {}
    for seed in (5, 6):
        for meta in (tmp_path / "embeddings").glob("*/meta.json"):
            meta.write_text(json.dumps({**json.loads(meta.read_text()), "seed": seed}))
        code, _, errors = here(
            "distill.py",
            *flags,
            "--teacher-embeddings",
            "embeddings",
            "--loss",
            "rkd_distance=1",
            "--lr",
            1e-12,
            "--limit-train",
            128,
            "--epochs",
            2,
            "--output",
            f"run{seed}",
        )
        assert code == 0, errors
        losses[seed] = json.loads((tmp_path / f"run{seed}/metrics.json").read_text())[-1]["train_rkd_distance"]
    assert losses[5] < 1e-5 < 1e-3 < losses[6], losses


FLAGS = {
    "val_split": 0.3,
    "split_seed": 7,
    "folds": None,
    "fold": None,
    "decode_size": 256,
    "window": None,
    "dataset": "digits",
    "data_root": None,
}


@pytest.mark.parametrize(
    "given, words",
    [
        ([], None),
        (["--split-seed", 7, "--val-split", 0.3], None),
        (["--split-seed", 0], "--split-seed 0: t.pth was trained with 7"),
        (["--val-split", 0.1], "--val-split 0.1: t.pth was trained with 0.3"),
        (["--folds", 3, "--fold", 0], "--folds 3: t.pth was trained with none"),
        (["--dataset", "cifar10", "--split-seed", 0], None),
        (["--data-root", "elsewhere", "--split-seed", 1], None),
    ],
)
@pytest.mark.parametrize("script", ["distill", "extract_embeddings"])
def test_the_division_is_the_teacher_s(monkeypatch, script, given, words):
    """What was val for the teacher stays val, whatever the flags' own defaults; another division of its data is
    refused."""
    module = importlib.import_module(script)
    args = module.build_parser().parse_args(
        [str(flag) for flag in ["--checkpoint", "t.pth"] * (script != "distill") + given]
    )
    monkeypatch.setattr(
        "extract_embeddings.load_checkpoint", lambda path: {"flags": FLAGS, "kind": "image", "classes": []}
    )

    def settle():
        if script == "distill":
            return module.settle_flags(args, {"ce": 1.0}, True, [Found({}, None, "t.pth", {"flags": FLAGS})])
        module.settle_flags(args)
        return args

    if words:
        with pytest.raises(UserError, match=words):
            settle()
    else:
        settled = settle()
        own = "--dataset" in given
        expected = {"--dataset": (None, 0, 512), "--data-root": (0.3, 1, 256)}.get((given or ["-"])[0], (0.3, 7, 256))
        values = settled.val_split, settled.split_seed, settled.decode_size
        assert values == expected and settled.dataset == ("cifar10" if own else "digits")


def test_the_default_share_of_val_is_no_other_division():
    flags = vars(importlib.import_module("distill").build_parser().parse_args(["--val-split", "0.25"]))
    settled = data.dataset_flags(flags, {"flags": {**FLAGS, "val_split": None}}, "t.pth")
    assert settled["dataset"] == "digits" and flags["val_split"] == 0.25, "that of digits"
    with pytest.raises(UserError, match="--val-split 0.2: t.pth was trained with none"):
        data.dataset_flags({**flags, "val_split": 0.2}, {"flags": {**FLAGS, "val_split": None}}, "t.pth")


@pytest.mark.parametrize(
    "given, words",
    [
        ([], None),
        (["--folds", 3, "--fold", 2], None),
        (["--fold", 0], "--fold 0: the embeddings were made with 2"),
        (["--split-seed", 0], "--split-seed 0: the embeddings were made with 3"),
        (["--decode-size", 512], "--decode-size 512: the embeddings were made with 256"),
        (["--rotation", 0], "--rotation and --teacher-embeddings"),
    ],
)
def test_zero_beside_a_store_is_a_flag_that_was_given(tmp_path, given, words):
    meta = {
        **dict.fromkeys(data.STORED_FLAGS),
        "dataset": "digits",
        "folds": 3,
        "fold": 2,
        "split_seed": 3,
        "decode_size": 256,
        "seed": 0,
        "policy": Policy().to_dict(),
        "num_views": 2,
    }
    for split in ("train", "val", "test"):
        writer = Writer(
            split_folder(tmp_path, split),
            {**meta, "split": split, "sha256": split},
            ["a"],
            np.zeros(1, int),
            {"embeddings": (2, 4)},
        )
        writer.write([0], {"embeddings": np.ones((1, 2, 4))})
        writer.finish()
    distill, stores = importlib.import_module("distill"), open_stores(str(tmp_path))
    assert set(stores) == {"train", "val", "test"}
    args = distill.build_parser().parse_args(["--teacher-embeddings", str(tmp_path), *map(str, given)])
    teachers = [Found({}, stores, None, None)]
    if words:
        with pytest.raises(UserError, match=words):
            distill.settle_flags(args, {"ce": 1.0}, True, teachers)
    else:
        args = distill.settle_flags(args, {"ce": 1.0}, True, teachers)
        assert (args.folds, args.fold, args.split_seed, args.decode_size) == (3, 2, 3, 256)


def test_stores_that_do_not_fit_the_run(extracted, tmp_path):
    store = ["--teacher-embeddings", extracted]
    for flags, words in (
        ([*store, "--num-views", 4], "holds 3"),
        ([*store, "--split-seed", 1], "--split-seed 1: the embeddings were made with 0"),
        ([*store, "--dataset", "cifar10"], "--dataset cifar10"),
        ([*store, "--rotation", 5], "--rotation"),
        ([*store, "--method", "feature"], "feature maps"),
        ([*store, "--teacher-checkpoint", "x.pth"], "x.pth: no such file"),  # two teachers
        (["--num-views", 2], "--teacher-embeddings"),
        (["--teacher-embeddings", tmp_path], "is not a folder of stored"),
    ):
        done = run_script("distill.py", *flags, "--output", tmp_path / "run")
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, (
            flags,
            done.stderr,
        )
    assert not (tmp_path / "run").exists()
