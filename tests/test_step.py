"""A step of each way of training, as a GPU sees it: nothing is copied to it, nothing waits for it, little dispatched.

The tensors lie on torch's "meta" device, which computes shapes alone: reading a value from it raises, and a copy to it
is seen.  So a copy or a read that someone adds to a step fails here, on a machine without a GPU.
"""

import contextlib
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.augment as augment_module
from common.augment import PRESETS, Augmenter, Policy
from common.data import ImageDataset
from common.embeddings import Store, StoredTeacher, Writer
from common.loader import ImageCache, Loader, pad_images
from common.losses import DistillationLoss
from common.models import build_model
from common.run import Meter
from common.teacher import distillation_loss, live_source
from common.training import (
    Precision,
    Preprocess,
    Schedule,
    Updater,
    live_teacher,
    make_optimizer,
    model_outputs,
    task_accuracy,
    task_cross_entropy,
)
from distill import Student, loss_settings, make_planner


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """The losses switch it off, which "meta" does not have."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: contextlib.nullcontext())


META, BATCH = torch.device("meta"), 8
SHIFT = Policy(crop="pad", hflip=0.5)
MIXED = Policy(crop="pad", hflip=0.5, mixup=0.4, cutmix=1.0)
COLOURS = Policy("resized", hflip=0.5, vflip=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)


class Watch(TorchDispatchMode):
    """Counts operations; refuses those that take a tensor of the host, but for a number, to the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), str(func)
        given, made = ([v for v in tree_leaves(tree) if torch.is_tensor(v)] for tree in ((args, kwargs), result))
        from_host = any(v.device.type == "cpu" and v.dim() for v in given)
        assert not (from_host and any(v.device == META for v in given + made)), f"{name} copies from the host"
        self.names.append(name)
        return result


def loader_of(side, count=4 * BATCH, device=META):
    height, width = side if isinstance(side, tuple) else (side, side)
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    dataset = ImageDataset([f"image {i}" for i in range(count)], np.arange(count) % 4, images=images)
    return Loader(dataset, BATCH, device, shuffle=True, cache="device")


def updater_of(model, criterion=None):
    """Updater whose `parallel` is the model, or a distillation script's Student."""
    module = Student(model.to(META), criterion.to(META)) if criterion is not None else model.to(META)
    optimizer = make_optimizer(model, criterion, optimizer="sgd", lr=0.1)
    schedule = Schedule(0.1, 4, schedule="cosine", epochs=5)
    return Updater(model, optimizer, schedule, Precision("off", META), module, clip_grad=1.0, ema=0.9)


def preprocess_of(side):
    return Preprocess(side, [0.5] * 3, [0.25] * 3)


def watch_third(batches, step):
    """Operations of the third step: the first two fill caches and make the optimizer's state."""
    for _ in range(2):
        step(next(batches))
    with Watch() as watch:
        step(next(batches))
    return watch.names


@pytest.mark.parametrize(
    "side, resolution, policy, most",
    [
        (32, 32, Policy(), 50),
        (32, 32, SHIFT, 50),
        (64, 32, SHIFT, 50),
        ((40, 30), 32, SHIFT, 50),
        (32, 32, PRESETS["derm"], 80),
        (64, 32, COLOURS, 80),
        (32, 32, MIXED, 50),
        ((40, 30), 32, MIXED, 50),
    ],
)
def test_the_input_of_a_step_takes_few_operations(side, resolution, policy, most):
    """Loading, crop, flip, colours, antialiasing and normalization."""
    augment, preprocess = Augmenter(policy, 0), preprocess_of(resolution)
    batches = loader_of(side).batches(1, plan=augment.plan)
    names = watch_third(batches, lambda batch: preprocess.inputs(batch, augment(batch, resolution)))
    assert 5 < len(names) <= most, (len(names), names)


def test_images_of_uneven_sizes_are_gathered_on_the_device():
    loader = loader_of(32)
    images = [
        torch.from_numpy(loader.dataset.images[i]).permute(2, 0, 1)[:, : 20 + i % 9, : 30 - i % 7] for i in range(32)
    ]
    loader.cache.hold(images, META)
    for policy, most in ((SHIFT, 80), (MIXED, 80)):
        augment = Augmenter(policy, 0)
        names = watch_third(loader.batches(1, plan=augment.plan), lambda batch, augment=augment: augment(batch, 16))
        assert len(names) <= most, (len(names), names)


def test_a_gather_on_the_device_gives_the_images():
    images = [torch.randint(0, 256, (3, 5 + i % 4, 9 - i % 3), dtype=torch.uint8) for i in range(12)]
    rows = torch.tensor([3, 11, 0, 3])
    there = ImageCache.__new__(ImageCache)
    there.on_device = True  # though it is not
    there.hold(images, "cpu")
    assert torch.equal(there.batch(rows, there.sizes[rows].amax(0)), pad_images([images[i] for i in rows])[0])
    assert torch.equal(there.batch(rows[:2], torch.tensor([8, 9])), pad_images([images[3], images[11]])[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("policy", [SHIFT, MIXED])
def test_a_supervised_step_waits_for_nothing(smoothing, policy):
    augment, preprocess, meter = Augmenter(policy, 0), preprocess_of(32), Meter()
    updater = updater_of(build_model("resnet8", 4, 32))
    weights = {"label": torch.ones(4, device=META)}

    def step(batch):
        out = updater.parallel(preprocess.inputs(batch, augment(batch, 32)))
        loss = task_cross_entropy(out, batch["targets"], smoothing, weights, batch["batch_targets"])
        updater(loss)
        meter.add(loss=loss, accuracy=task_accuracy(out, batch["targets"]))

    watch_third(loader_of(32).batches(1, plan=augment.plan), step)


def store_of(folder, ids, shapes, policy=SHIFT):
    folder = folder / "train_embeddings"
    writer = Writer(
        str(folder), {"seed": 0, "policy": policy.to_dict(), "num_views": 2}, ids, np.arange(len(ids)), shapes
    )
    writer.write(np.arange(len(ids)), {name: np.ones((len(ids), *shape)) for name, shape in shapes.items()})
    writer.finish()
    return Store(str(folder))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("method", ["response", "mixed", "dkd", "rkd", "tokens"])
def test_a_distillation_step_waits_for_nothing(tmp_path, method, stored):
    """A live teacher at twice the resolution, or a store; of tokens with two global and three local crops."""
    tokens, policy = method == "tokens", MIXED if method == "mixed" else SHIFT
    name, classes = ("vit_6_192", 0) if tokens else ("resnet8", 4)
    loader = loader_of(32)
    weights, options = loss_settings(method if method != "mixed" else "response")
    criterion = DistillationLoss(weights, options, cross_entropy=lambda *given: task_cross_entropy(*given[:2]))
    student = build_model(name, classes, 32, dynamic=tokens)
    student.with_tokens = tokens
    augment, preprocess, meter = Augmenter(policy, 0), preprocess_of(32), Meter()
    teacher = build_model(name, classes, 64)
    teacher.with_tokens = tokens
    shown = teacher({"image": torch.zeros(2, 3, 64, 64)})
    if stored:
        names = {"logits": "logits", "embedding": "embeddings", "tokens": "tokens"}
        shapes = {names[key]: (2, *value.shape[1:]) for key, value in shown.items() if key in names}
        store = store_of(tmp_path, loader.dataset.ids, shapes, policy)
        source = StoredTeacher({"train": store}, {"train": loader.dataset}, list(shapes), device=META)
        choose_view, targets = source.choose_view, source.targets
    else:
        choose_view, targets = (
            lambda batch: batch,
            live_teacher(teacher.to(META), preprocess_of(64), augment, Precision("off", META)),
        )
    criterion.build(student({"image": torch.zeros(2, 3, 32, 32)}), shown)
    local = [Augmenter(COLOURS, 0, stream) for stream in (1, 2, 3)] if tokens else []
    plan = make_planner(SimpleNamespace(choose_view=choose_view), augment, local, 2 if tokens else 1)
    updater = updater_of(student, criterion)

    def step(batch):
        taught = targets(batch)
        inputs = preprocess.inputs(batch, augment(batch, 32))
        crops = [preprocess(crop(batch, 16)) for crop in local]
        out, loss = updater.parallel(inputs, taught, batch["targets"], batch["batch_targets"], crops)
        updater(loss)
        meter.add(loss=loss, **criterion.terms)

    watch_third(loader.batches(1, plan=plan), step)


def test_what_is_refused_in_a_step():
    """The watch itself: copies from the host and reads of the device are seen."""
    there, here = torch.empty(3, device=META), torch.ones(3)
    for act in (lambda: here.to(META), lambda: there.sum().item(), lambda: there.copy_(here), lambda: there.nonzero()):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Watch():
            act()


# ------------------------------------------------------------------------------------- what a GPU computes, on the CPU


@pytest.mark.parametrize("policy", [SHIFT, MIXED, COLOURS, PRESETS["derm"]])
@pytest.mark.parametrize("resolution", [16, 48, 100])
def test_the_gpu_s_way_gives_the_cpu_s_images_to_rounding(monkeypatch, policy, resolution):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 70, 50), dtype=torch.uint8, generator=rng)
    images[:6, :, 40:] = 0
    batch = {
        "image": images,
        "size": torch.tensor([[40, 50]] * 6 + [[70, 50]] * 6),
        "key": torch.arange(12),
        "view": torch.arange(12) % 4,
    }
    if policy is MIXED:
        split = {"by_key": torch.arange(12), "key": batch["key"], "size": batch["size"], "targets": {}}
        planned = Augmenter(policy, 0).plan({**batch, "index": torch.arange(12), "split": split, "targets": {}})
        batch = {**planned, "image": torch.cat([images, images[planned["partner"]]])}
    exact = Augmenter(policy, 0)(dict(batch), resolution)
    monkeypatch.setattr("common.augment._exact", lambda images: False)
    monkeypatch.setattr("common.augment._resample_in_parts", None)
    other = Augmenter(policy, 0)(dict(batch), resolution)
    assert (exact - other).abs().max() < 1e-4 and not torch.equal(exact, torch.zeros_like(exact))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("side", [32, (40, 30)])
@pytest.mark.parametrize("policy", [COLOURS, MIXED])
def test_a_step_on_a_gpu_does_not_synchronize(side, policy):
    device = torch.device("cuda")
    loader = loader_of(side, device=device)
    augment, preprocess, model = Augmenter(policy, 0), preprocess_of(32), build_model("resnet8", 4, 32).to(device)
    optimizer = make_optimizer(model, optimizer="sgd", lr=0.1)
    schedule = Schedule(0.1, 4, schedule="cosine", epochs=5)
    updater, meter = Updater(model, optimizer, schedule, Precision("bf16", device)), Meter()
    for number, batch in enumerate(loader.batches(1, plan=augment.plan)):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            with updater.precision.autocast():
                out = updater.parallel(preprocess.inputs(batch, augment(batch, 32)))
                loss = task_cross_entropy(out, batch["targets"], 0.1)
            updater(loss)
            meter.add(loss=loss, accuracy=task_accuracy(out, batch["targets"]))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("what", ["model_outputs", "distillation_loss"])
def test_evaluation_is_planned_at_once(monkeypatch, what):
    """Not batch by batch: on a GPU each would wait for the host."""
    calls, draw = [], augment_module.sample_parameters
    monkeypatch.setattr(augment_module, "sample_parameters", lambda *args: calls.append(args) or draw(*args))
    loader, model, preprocess = loader_of(32, device="cpu"), build_model("resnet8", 4, 32), preprocess_of(32)
    precision = Precision("off", torch.device("cpu"))
    if what == "model_outputs":
        model_outputs(model, loader, preprocess, precision)
    else:
        weights, splits = {"kl": 1.0}, SimpleNamespace(train=loader.dataset, val=loader.dataset)
        squashed = Policy(hflip=0.5, crop_mode=preprocess.crop_mode)
        parts = build_model("resnet8", 4, 32), preprocess_of(32), {"weights": "", "parameters": 1, "name": ""}
        source = live_source(*parts, weights, splits, Augmenter(squashed, 0), precision, True, compile="off")
        targets = functools.partial(source.targets, split="val")
        distillation_loss(model, DistillationLoss(weights), targets, loader, preprocess, precision)
    assert len(loader) == 4 and len(calls) == 1


def test_a_batch_s_rows_on_the_device_are_its_index():
    loader = loader_of(8, device=torch.device("cpu"))
    plan = Augmenter(SHIFT, 0).plan
    for batch in loader.batches(1, plan=plan):
        assert torch.equal(batch["rows"], batch["index"]) and batch["parameters"]
        assert torch.equal(batch["image"], loader.cache.uniform[batch["index"]])


def test_a_store_that_does_not_fit_is_read_step_by_step(tmp_path, monkeypatch):
    """The same values as from memory; with the thread that a GPU has, too."""
    loader = loader_of(8, device=torch.device("cpu"))
    ids, shape = loader.dataset.ids, (2, 3)
    store = store_of(tmp_path, ids, {"embeddings": shape})
    store.arrays["embeddings"] = np.arange(len(ids) * 6, dtype=np.float16).reshape(len(ids), *shape)
    datasets = {"train": loader.dataset}
    kept = StoredTeacher({"train": store}, datasets, ["embeddings"])
    monkeypatch.setattr("common.embeddings.free_memory", lambda device: 0)
    read = StoredTeacher({"train": store}, datasets, ["embeddings"])
    assert kept.kept and read.kept is None
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    for ahead in (False, True):

        def plan(batch, ahead=ahead):
            batch = read.choose_view(batch)
            batch[read.key].pinned = ahead
            return batch

        for one, other in zip(loader.batches(1, plan=kept.choose_view), loader.batches(1, plan=plan)):
            expected = np.stack([store.arrays["embeddings"][i, v] for i, v in zip(one["index"], one["view"])])
            assert np.array_equal(kept.targets(one)["embedding"], expected)
            assert np.array_equal(read.targets(other)["embedding"], expected)
