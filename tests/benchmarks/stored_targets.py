"""What stored targets cost: extraction against the bare teacher, a step from the store against the student alone,
memory.

    python tests/benchmarks/stored_targets.py                        # CPU: ResNet-18 at 64 px, ResNet-8 at 32 px
    python tests/benchmarks/stored_targets.py --device cuda --amp bf16 --compile on --images 20000
    python tests/benchmarks/stored_targets.py --only memory          # extraction of 1,000 and of 20,000 images

Extraction: images x views a second that extract_embeddings.py prints over those of the teacher's forward pass on
tensors
made beforehand.  Step: training images/s of distill.py from the store over those of train_student.py; both of the same
model, data and flags, each with its own augmentation.  Memory: the largest resident set of extract_embeddings.py with
the images read from files.  Scripts run as a user runs them, alternating; medians.  Run it on an idle machine.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.models import build_model
from common.training import Precision, place


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("extraction", "step", "memory"), help="one of the three measurements")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", default="off", help="off, bf16, fp16")
    parser.add_argument("--compile", default="off", help="on or off")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    parser.add_argument("--images", type=int, default=768, help="of train")
    parser.add_argument("--views", type=int, default=2, help="of each image")
    parser.add_argument("--rounds", type=int, default=3, help="how often the compared ones alternate")
    parser.add_argument("--teacher", default="resnet18", help="model, run at 64 px")
    parser.add_argument("--student", default="resnet8", help="model, run at 32 px")
    return parser.parse_args()


def run(script, *flags):
    """Run a script; returns what it printed."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def show(title, names, figures):
    """A line: medians and spread of the two, and the ratio of the second to the first."""
    medians = [statistics.median(values) for values in figures]
    parts = [f"{name} {m:8.1f} ({min(v):.1f} to {max(v):.1f})" for name, m, v in zip(names, medians, figures)]
    print(f"{title}: {', '.join(parts)} images/s, ratio {medians[1] / medians[0]:.3f}", flush=True)


def bare_forward(args):
    """Images/s of the teacher's forward pass alone."""
    device = torch.device(args.device)
    precision, model = Precision(args.amp, device), build_model(args.teacher, 10, 64)
    model.eval()
    place(model, device, args.compile)
    images = torch.randn(args.batch_size, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    steps = max(4, args.images * args.views // args.batch_size)
    for count in (3 if args.device == "cpu" else 30, steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad(), precision.autocast():
            for _ in range(count):
                model({"image": images})
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return steps * args.batch_size / seconds


def random_set(folder, args):
    """A MedMNIST file of random 64 px images."""
    random, counts = np.random.default_rng(0), {"train": args.images, "val": args.batch_size, "test": args.batch_size}
    arrays = {f"{s}_images": random.integers(0, 256, (n, 64, 64, 3), np.uint8) for s, n in counts.items()}
    arrays.update({f"{s}_labels": (np.arange(n) % 10)[:, None] for s, n in counts.items()})
    np.savez(folder / "random.npz", **arrays)
    return ["--dataset", "medmnist", "--data-root", folder / "random.npz"]


def extraction(args, folder, data, shared):
    """Compare extraction with the bare forward pass; leaves the store in folder/store."""
    extract = [
        *data,
        "--model",
        args.teacher,
        "--resolution",
        64,
        "--num-views",
        args.views,
        "--save-logits",
        "--crop",
        "resized",
        "--hflip",
        0.5,
        *shared,
        "--output",
        folder / "store",
        "--overwrite",
    ]
    loops, scripts = [], []
    for _ in range(args.rounds):
        loops.append(bare_forward(args))
        printed = run("extract_embeddings.py", *extract)
        scripts.append(
            args.views * float(re.search(r"train_embeddings: .* ([\d,]+) images/s", printed)[1].replace(",", ""))
        )
    show("extraction", ("bare forward", "extract_embeddings.py"), (loops, scripts))


def step(args, folder, data, shared):
    """Compare a step from the store with one of the student alone, in time."""
    common = [
        *shared,
        "--resolution",
        32,
        "--model",
        args.student,
        "--epochs",
        3,
        "--optimizer",
        "adamw",
        "--overwrite",
    ]
    runs = {
        "train_student.py": [*data, *common, "--crop", "resized", "--hflip", 0.5, "--output", folder / "alone"],
        "distill.py": [
            "--data-root",
            data[-1],
            *common,
            "--teacher-embeddings",
            folder / "store",
            "--loss",
            "ce=1",
            "embedding=1",
            "kl=1",
            "--allow-weak-teacher",
            "--output",
            folder / "distill",
        ],
    }
    figures = {script: [] for script in runs}
    for _ in range(args.rounds):
        for script, flags in runs.items():
            run(script, *flags)
            rows = json.loads((flags[flags.index("--output") + 1] / "metrics.json").read_text())
            figures[script].append(statistics.median(row["images_per_second"] for row in rows[1:]))
    show("step from the store", tuple(figures), tuple(figures.values()))
    times = [1 / statistics.median(values) for values in figures.values()]
    print(f"step time {times[1] / times[0]:.3f} of the student's alone", flush=True)


def memory(args, folder, shared):
    """Largest resident set of an extraction from files, by number of images."""
    base = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for count in (1_000, 20_000):
        root = folder / f"files_{count}"
        for split, images in (("train", count), ("test", 10)):
            for label in range(10):
                (root / split / str(label)).mkdir(parents=True)
            for i in range(images):
                base[i % 64, (i // 64) % 64] += 1  # no two alike
                Image.fromarray(base).save(root / split / str(i % 10) / f"{i:06d}.png", compress_level=1)
        run_flags = [
            "--dataset",
            "imagefolder",
            "--data-root",
            root,
            "--model",
            "resnet8",
            "--resolution",
            16,
            "--num-views",
            2,
            "--splits",
            "train",
            "--workers",
            0,
            *shared,
            "--output",
            folder / f"store_{count}",
        ]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "extract_embeddings.py"), *map(str, run_flags)], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)  # of this process alone
        if status:
            sys.exit(1)
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        print(f"memory: {count:6,} images, peak {usage.ru_maxrss * unit / 2**20:,.0f} MB", flush=True)


def main():
    args = parse()
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {hardware}, batch {args.batch_size}, {args.teacher} at 64 px, {args.student} "
        f"at 32 px, amp {args.amp}"
    )
    shared = ["--batch-size", args.batch_size, "--device", args.device, "--amp", args.amp, "--compile", args.compile]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = random_set(folder, args)
        if args.only != "memory":
            extraction(args, folder, data, shared)
        if args.only in (None, "step"):
            step(args, folder, data, shared)
        if args.only in (None, "memory"):
            memory(args, folder, shared)


if __name__ == "__main__":
    main()
