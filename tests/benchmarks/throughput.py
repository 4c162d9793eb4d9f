"""What the scripts add to their models: images/s over those of a bare loop, and what a step costs beside its models.

    python tests/benchmarks/throughput.py                            # CPU: ResNet-18, ResNet-8, 32 px, batch 128
    python tests/benchmarks/throughput.py --device cuda --amp bf16 --compile on --steps 200
    python tests/benchmarks/throughput.py --tokens --teacher vit_tiny --student vit_6_192 --batch-size 64
    python tests/benchmarks/throughput.py --steps-alone              # operations and host time of a step, at many sizes
    python tests/benchmarks/throughput.py --files FOLDER --workers 2 # a tree of JPEGs without a cache

The bare loop has the same models, batch, memory format, precision, compile setting, loss and optimizer, on tensors made
beforehand: no decoding, no augmentation, no metrics.  The script runs as a user runs it, on as many random images as
its epochs need; its figure is the training images/s that it writes itself.  Both alternate, and the ratio is that of
the medians.  --tree FOLDER measures the scripts of another checkout in the same rounds.  Run it on an idle machine.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.augment import PRESETS, Augmenter, Policy
from common.data import ImageDataset
from common.loader import Loader
from common.losses import DistillationLoss, temperature_kl
from common.models import build_model
from common.training import Precision, Preprocess, Schedule, Updater, cross_entropy, make_optimizer, place
from common.unlabeled import load_folder
from distill import loss_settings

CLASSES = 10


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; meta, for --steps-alone: what a GPU is given, on any machine"
    )
    parser.add_argument("--amp", default="off", help="off, bf16, fp16")
    parser.add_argument("--compile", default="off", help="on or off")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--resolution", type=int, default=32, help="pixels")
    parser.add_argument("--steps", type=int, default=6, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="how often script and bare loop alternate")
    parser.add_argument("--teacher", default="resnet18", help="model")
    parser.add_argument("--student", default="resnet8", help="model")
    parser.add_argument("--tokens", action="store_true", help="distill.py --method tokens alone, of two ViTs")
    parser.add_argument("--steps-alone", action="store_true", help="a linear layer in place of the models")
    parser.add_argument("--files", metavar="FOLDER", help="images/s of --cache off over those of decoding alone")
    parser.add_argument("--workers", type=int, default=2, help="of --files")
    parser.add_argument("--tree", type=Path, action="append", default=[], help="another checkout to measure beside")
    return parser.parse_args()


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def images_per_second(step, args):
    """Of two epochs' worth of steps, after a warm-up."""
    for _ in range(3 if args.device == "cpu" else 30):
        step()
    synchronize(args.device)
    start = time.perf_counter()
    for _ in range(2 * args.steps):
        step()
    synchronize(args.device)
    return 2 * args.steps * args.batch_size / (time.perf_counter() - start)


# ----------------------------------------------------------------------------------------- scripts beside a bare loop


def bare(args, student, teacher=None, method="response", stored=False):
    """Images/s of the bare loop; stored: the teacher's outputs are made beforehand too."""
    device, tokens = torch.device(args.device), method == "tokens"
    precision, classes = Precision(args.amp, device), 0 if tokens else CLASSES
    model = build_model(student, classes, args.resolution)
    batch = torch.randn(args.batch_size, 3, args.resolution, args.resolution, device=device)
    batch = {"image": batch.contiguous(memory_format=torch.channels_last)}
    labels = {"label": torch.randint(0, CLASSES, (args.batch_size,), device=device)}
    place(model, device)
    criterion = frozen = taught = None
    if teacher:
        frozen = build_model(teacher, classes, args.resolution).eval().requires_grad_(False)
        model.with_tokens = frozen.with_tokens = tokens
        place(frozen, device, args.compile)
        with torch.no_grad():
            taught, criterion = frozen(batch), DistillationLoss(*loss_settings(method))
            criterion.build(model(batch), taught)
        criterion.to(device)
    if args.compile == "on":
        model.compile()
    optimizer = make_optimizer(model, criterion, optimizer="adamw" if tokens else "sgd", lr=5e-4)
    model.train()

    def step():
        with precision.autocast():
            with torch.no_grad():
                targets = taught if stored or not teacher else frozen(batch)
            out = model(batch)
            if tokens:
                loss = criterion(out, targets, None)
            else:
                loss = cross_entropy(out["logits"], labels["label"])
                if teacher:
                    loss = 0.5 * loss + 0.5 * temperature_kl(out["logits"], targets["logits"], 4.0)
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return images_per_second(step, args)


def run(tree, script, *flags):
    done = subprocess.run([sys.executable, tree / script, *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(map(str, flags))}\n{done.stderr}")


def real(args, tree, script, data, folder, *flags):
    """The script's own training images/s: median of the epochs after the first."""
    views = [] if "--teacher-embeddings" in flags else ["--crop", "pad", "--hflip", 0.5]
    given = ["--resolution", args.resolution, "--batch-size", args.batch_size, "--epochs", 3, "--device", args.device]
    given += ["--amp", args.amp, "--compile", args.compile, "--overwrite", "--output", folder]
    run(tree, script, "--dataset", "medmnist", "--data-root", data, *given, *views, *flags)
    return statistics.median(row["images_per_second"] for row in json.loads((folder / "metrics.json").read_text())[1:])


def scripts(args, data, folder):
    """{title: (the bare loop's arguments, script, its flags)}"""
    teacher, store = folder / "teacher" / "best.pth", folder / "store"
    trained = ["--model", args.teacher, "--resolution", args.resolution, "--epochs", 1, "--device", args.device]
    run(ROOT, "train_teacher.py", "--dataset", "medmnist", "--data-root", data, *trained, "--output", teacher.parent)
    save = "--save-tokens" if args.tokens else "--save-logits"
    views = ["--num-views", 2, "--crop", "pad", "--hflip", 0.5, "--device", args.device]
    run(ROOT, "extract_embeddings.py", "--checkpoint", teacher, *views, save, "--output", store)
    method = "tokens" if args.tokens else "response"
    flags = ["--model", args.student, "--method", method]
    pair = {"student": args.student, "teacher": args.teacher, "method": method}
    live = ["--teacher-checkpoint", teacher, "--allow-weak-teacher", *flags]
    cases = {
        f"distill.py, {method}": (pair, "distill.py", live),
        f"distill.py, {method}, stored": (
            {**pair, "stored": True},
            "distill.py",
            ["--teacher-embeddings", store, "--allow-weak-teacher", *flags],
        ),
    }
    alone = {
        script: ({"student": model}, script, ["--model", model])
        for script, model in (("train_teacher.py", args.teacher), ("train_student.py", args.student))
    }
    return cases if args.tokens else {**alone, **cases}


def compare_scripts(args, folder):
    random = np.random.default_rng(0)
    counts = {"train": args.steps * args.batch_size, "val": args.batch_size, "test": args.batch_size}
    shape = (args.resolution, args.resolution, 3)
    arrays = {f"{s}_images": random.integers(0, 256, (n, *shape), np.uint8) for s, n in counts.items()}
    arrays.update({f"{s}_labels": (np.arange(n) % CLASSES)[:, None] for s, n in counts.items()})
    np.savez(folder / "random.npz", **arrays)
    trees = [ROOT, *args.tree]
    for title, (models, script, flags) in scripts(args, folder / "random.npz", folder).items():
        figures = {"bare": []} | {tree: [] for tree in trees}
        for _ in range(args.rounds):
            figures["bare"].append(bare(args, **models))
            for tree in trees:
                figures[tree].append(real(args, tree, script, folder / "random.npz", folder / "run", *flags))
        medians = {name: statistics.median(values) for name, values in figures.items()}
        line = f"{title:32} bare {medians['bare']:9.1f} images/s"
        for tree in trees:
            low, high = min(figures[tree]), max(figures[tree])
            name = "script" if tree == ROOT else tree.name
            line += (
                f", {name} {medians[tree]:9.1f} ({low:.1f} to {high:.1f}), ratio {medians[tree] / medians['bare']:.3f}"
            )
        print(line, flush=True)


# ---------------------------------------------------------------------------------------- a step without its models


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Linear(torch.nn.Module):
    """The cheapest model: one number a channel."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, CLASSES)

    def forward(self, batch):
        return {"logits": self.layer(batch["image"].mean((2, 3)))}


def step_alone(args, side, resolution, policy):
    """(operations of the input, of the whole step, milliseconds of the whole step) with a linear layer as the model."""
    count = 12 * args.batch_size
    sides = [side, side] if isinstance(side, int) else side
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, *sides, 3), np.uint8)
    dataset = ImageDataset([f"image {i}" for i in range(count)], np.arange(count) % CLASSES, images=images)
    loader = Loader(dataset, args.batch_size, args.device, True, cache="device")
    if not isinstance(side, int):  # uneven: parts of these
        cut = [max(1, s // 2) for s in sides]
        tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
        loader.cache.hold(
            [t[:, : sides[0] - i % cut[0], : sides[1] - i % cut[1]] for i, t in enumerate(tensors)], args.device
        )
    device, model = torch.device(args.device), Linear()
    place(model, device)
    optimizer = make_optimizer(model, optimizer="sgd", lr=0.01)
    if args.device == "meta":  # which has no autocast, that losses switch off
        torch.autocast = lambda *args, **more: contextlib.nullcontext()
    updater = Updater(model, optimizer, Schedule(0.01, 12, schedule="constant", epochs=9), Precision("off", device))
    augment, preprocess = Augmenter(policy, 0), Preprocess(resolution, [0.5] * 3, [0.25] * 3)

    def inputs(batch):
        return preprocess.inputs(batch, augment(batch, resolution))

    def step(batch):
        out = updater.parallel(inputs(batch))
        updater(cross_entropy(out["logits"], batch["targets"]["label"]))

    batches, counts = loader.batches(1, plan=augment.plan), []
    for act in (step, step, inputs, step):
        with Count() as counter:
            act(next(batches))
        counts.append(counter.operations)
    seconds = []
    for epoch in (2, 3):
        synchronize(args.device)
        start = time.perf_counter()
        for batch in loader.batches(epoch, plan=augment.plan):
            step(batch)
        host = time.perf_counter() - start  # what Python took; the device may still work
        seconds.append(host / len(loader))
    return counts[2], counts[3], 1000 * min(seconds)


def compare_steps(args):
    shift = Policy(crop="pad", hflip=0.5)
    print("operations of a step's input, of the whole step; milliseconds of the whole step on the host")
    for side, resolution in ((16, 16), (32, 32), (64, 64), (64, 32), (224, 224), ((300, 240), 224)):
        batch = args.batch_size
        args.batch_size = batch if resolution < 100 else max(8, batch // 8)
        for name, policy in (("crop and flip", shift), ("all colours", PRESETS["derm"])):
            given, whole, milliseconds = step_alone(args, side, resolution, policy)
            size = f"{side} px" if isinstance(side, int) else "uneven sizes"
            print(
                f"{size:12} to {resolution:3} px, batch {args.batch_size:3}, {name:13}: {given:4} {whole:4} "
                f"{milliseconds:8.2f} ms",
                flush=True,
            )
        args.batch_size = batch


# ----------------------------------------------------------------------------------------------------- without a cache


def compare_files(args):
    """A tree of image files, read in each epoch, over decoding alone by as many workers."""
    dataset = load_folder(args.files)
    augment, preprocess = Augmenter(Policy("resized", hflip=0.5), 0), Preprocess(args.resolution, [0.5] * 3, [0.25] * 3)
    loader = Loader(dataset, args.batch_size, args.device, True, cache="off", workers=args.workers)
    decoding = torch.utils.data.DataLoader(
        dataset, args.batch_size, num_workers=args.workers, collate_fn=len, persistent_workers=args.workers > 0
    )
    figures = {"decoding alone": [], "loader": [], "loader and augmentation": []}
    for epoch in range(1, args.rounds + 2):  # the first starts the workers
        for name, values in figures.items():
            start = time.perf_counter()
            if name == "decoding alone":
                count = sum(decoding)
            else:
                plan, count = augment.plan if "augmentation" in name else None, 0
                for batch in loader.batches(epoch, plan=plan):
                    count += batch["valid"]
                    if plan:
                        preprocess.inputs(batch, augment(batch, args.resolution))
            synchronize(args.device)
            values.append(count / (time.perf_counter() - start))
    medians = {name: statistics.median(values[1:]) for name, values in figures.items()}
    for name, value in medians.items():
        print(f"{name:24} {value:9.1f} images/s, ratio {value / medians['decoding alone']:.3f}", flush=True)


def main():
    args = parse()
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {hardware}, batch {args.batch_size}, {args.resolution} px, amp {args.amp}, "
        f"compile {args.compile}"
    )
    if args.steps_alone:
        return compare_steps(args)
    if args.files:
        return compare_files(args)
    with tempfile.TemporaryDirectory() as temporary:
        compare_scripts(args, Path(temporary))


if __name__ == "__main__":
    main()
