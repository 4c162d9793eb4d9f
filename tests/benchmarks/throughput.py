"""Images/s of each script's real loop over those of a bare loop, in one run.

    python tests/benchmarks/throughput.py                                   # CPU: ResNet-18, ResNet-8, 32 px, batch 128
    python tests/benchmarks/throughput.py --device cuda --amp bf16 --compile on --steps 200
    python tests/benchmarks/throughput.py --tokens --teacher vit_tiny --student vit_6_192 --batch-size 64

The bare loop has the same models, batch, memory format, precision, compile setting, loss and optimizer, on tensors made
beforehand: no decoding, no augmentation, no metrics.  The script runs as a user runs it, on as many random images as
its epochs need; its figure is the training images/s that it writes itself.  Both alternate, and the ratio is that of
the medians.  Run it on an idle machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.losses import DistillationLoss, cross_entropy, loss_settings, temperature_kl
from common.models import build_model
from common.training import Precision, make_optimizer, place


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", default="off", help="off, bf16, fp16")
    parser.add_argument("--compile", default="off", help="on or off")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--resolution", type=int, default=32, help="pixels")
    parser.add_argument("--steps", type=int, default=6, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="how often script and bare loop alternate")
    parser.add_argument("--teacher", default="resnet18", help="model")
    parser.add_argument("--student", default="resnet8", help="model")
    parser.add_argument("--tokens", action="store_true", help="distill.py --method tokens alone, of two ViTs")
    return parser.parse_args()


def bare(args, name, teacher_name=None):
    """Images/s of the bare loop; two epochs' worth of steps after a warm-up."""
    device, precision = torch.device(args.device), Precision(args.amp, torch.device(args.device))
    models = [build_model(n, 10, args.resolution) for n in (name, teacher_name) if n]
    for model in models:
        place(model, device, args.compile)
    model, teacher = models[0].train(), models[1].eval().requires_grad_(False) if teacher_name else None
    optimizer = make_optimizer(model, optimizer="sgd", lr=0.05)
    images = torch.randn(args.batch_size, 3, args.resolution, args.resolution, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch_size,), device=device)

    def step():
        with precision.autocast():
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher({"image": images})["logits"]
            logits = model({"image": images})["logits"]
        loss = cross_entropy(logits, labels)
        if teacher is not None:
            loss = 0.5 * loss + 0.5 * temperature_kl(logits, taught, 4.0)
        return loss

    return timed(args, step, optimizer, precision)


def bare_tokens(args, live):
    """Images/s of the bare loop of --method tokens: a teacher that is run, or its tokens made beforehand."""
    device, precision = torch.device(args.device), Precision(args.amp, torch.device(args.device))
    model, teacher = (build_model(name, 0, args.resolution).to(device) for name in (args.student, args.teacher))
    model.with_tokens = teacher.with_tokens = True
    teacher.eval().requires_grad_(False)
    images = torch.randn(args.batch_size, 3, args.resolution, args.resolution, device=device)
    with torch.no_grad():
        taught, criterion = teacher({"image": images}), DistillationLoss(*loss_settings("tokens"))
        criterion.build(model({"image": images}), taught)
    if place(args.compile, device):
        model.compile(), teacher.compile()
    optimizer = make_optimizer(model, criterion, optimizer="adamw", lr=5e-4)

    def step(taught=taught):
        with precision.autocast():
            if live:
                with torch.no_grad():
                    taught = teacher({"image": images})
            return criterion(model({"image": images}), taught, None)

    return timed(args, step, optimizer, precision)


def timed(args, forward, optimizer, precision):
    """Images/s of two epochs' worth of steps, after a warm-up; forward() -> loss."""

    def step():
        precision.scaler.scale(forward()).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3 if args.device == "cpu" else 30):
        step()
    if args.device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(2 * args.steps):
        step()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return 2 * args.steps * args.batch_size / (time.perf_counter() - start)


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def real(args, script, data, folder, *flags):
    """The script's own training images/s: median of the epochs after the first."""
    views = [] if "--teacher-embeddings" in flags else ["--crop", "pad", "--hflip", 0.5]
    run(
        ROOT / script,
        "--dataset",
        "medmnist",
        "--data-root",
        data,
        "--resolution",
        args.resolution,
        "--batch-size",
        args.batch_size,
        "--epochs",
        3,
        "--device",
        args.device,
        "--amp",
        args.amp,
        "--compile",
        args.compile,
        *views,
        "--overwrite",
        "--output",
        folder,
        *flags,
    )
    return statistics.median(row["images_per_second"] for row in json.loads((folder / "metrics.json").read_text())[1:])


def main():
    args = parse()
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {hardware}, batch {args.batch_size}, {args.resolution} px, amp {args.amp}, "
        f"compile {args.compile}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        temporary, random = Path(temporary), np.random.default_rng(0)
        counts = {"train": args.steps * args.batch_size, "val": args.batch_size, "test": args.batch_size}
        shape = (args.resolution, args.resolution, 3)
        arrays = {f"{s}_images": random.integers(0, 256, (n, *shape), np.uint8) for s, n in counts.items()}
        arrays.update({f"{s}_labels": (np.arange(n) % 10)[:, None] for s, n in counts.items()})
        np.savez(temporary / "random.npz", **arrays)
        data = temporary / "random.npz"
        if args.tokens:
            return tokens(args, data, temporary)
        cases = {
            "train_teacher.py": ((args.teacher,), ["--model", args.teacher]),
            "train_student.py": ((args.student,), ["--model", args.student]),
            "distill.py": (
                (args.student, args.teacher),
                [
                    "--model",
                    args.student,
                    "--allow-weak-teacher",
                    "--teacher-checkpoint",
                    temporary / "train_teacher.py" / "best.pth",
                ],
            ),
        }
        for script, (models, flags) in cases.items():
            compare(
                args,
                script,
                lambda models=models: bare(args, *models),
                lambda script=script, flags=flags: real(args, script, data, temporary / script, *flags),
            )


def tokens(args, data, folder):
    """--method tokens of a live teacher and from stored tokens, one epoch's views of each image."""
    flags, teacher = ["--method", "tokens", "--model", args.student], folder / "teacher" / "best.pth"
    run(
        ROOT / "train_teacher.py",
        "--dataset",
        "medmnist",
        "--data-root",
        data,
        "--model",
        args.teacher,
        "--resolution",
        args.resolution,
        "--epochs",
        1,
        "--output",
        folder / "teacher",
        "--device",
        args.device,
    )
    run(
        ROOT / "extract_embeddings.py",
        "--checkpoint",
        teacher,
        "--num-views",
        2,
        "--save-tokens",
        "--crop",
        "pad",
        "--hflip",
        0.5,
        "--device",
        args.device,
        "--output",
        folder / "store",
    )
    for title, live, given in (
        ("live teacher", True, ["--teacher-checkpoint", teacher, "--allow-weak-teacher"]),
        ("stored tokens", False, ["--teacher-embeddings", folder / "store"]),
    ):
        compare(
            args,
            title,
            lambda live=live: bare_tokens(args, live),
            lambda given=given: real(args, "distill.py", data, folder / "run", *flags, *given),
        )


def compare(args, title, loop, script):
    """Alternate the bare loop and the script; print both and their ratio."""
    loops, scripts = [], []
    for _ in range(args.rounds):
        loops.append(loop())
        scripts.append(script())
    ratio = statistics.median(scripts) / statistics.median(loops)
    print(
        f"{title:18} bare {statistics.median(loops):9.1f} images/s ({min(loops):.1f} to {max(loops):.1f}), script "
        f"{statistics.median(scripts):9.1f} ({min(scripts):.1f} to {max(scripts):.1f}), ratio {ratio:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
