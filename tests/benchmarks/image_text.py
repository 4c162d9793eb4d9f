"""What reading costs in training on images and texts: tokenization and decoding as shares of an epoch, and images/s
over a bare loop.

    python tests/benchmarks/image_text.py --data-root MedPix-2-0
    python tests/benchmarks/image_text.py --data-root MedPix-2-0 --device cuda --amp bf16 --resolution 224

The bare loop has the same models, loss and optimizer and the very inputs of an epoch, made beforehand: no decoding, no
augmentation, no tokens to look up, no metrics.  The script's figure is the training images/s that it writes itself.
Both alternate, the ratio is that of the medians.  Run it on an idle machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.augment import Augmenter
from common.data import DATASETS, load_splits
from common.image_text import tokenize
from common.loader import Loader
from common.losses import DistillationLoss
from common.run import load_checkpoint
from common.training import Precision, load_model, make_optimizer, task_cross_entropy
from distill import loss_settings


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="MedPix-2-0")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", default="off", help="off, bf16, fp16")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step")
    parser.add_argument("--resolution", type=int, default=96, help="pixels")
    parser.add_argument("--limit-train", type=int, default=480, help="images an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="how often script and bare loop alternate")
    parser.add_argument(
        "--teacher", nargs=2, default=["timm:resnet18", "bert-mini-scratch"], help="image and text model"
    )
    parser.add_argument(
        "--student", nargs=2, default=["timm:resnet10t", "bert-tiny-scratch"], help="image and text model"
    )
    return parser.parse_args()


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def epoch_inputs(args, splits, preprocess):
    """[(inputs, targets)] of the first epoch's batches."""
    loader, augment = Loader(splits.train, args.batch_size, args.device, True), Augmenter(DATASETS["medpix"].policy, 0)
    return [
        (preprocess.inputs(batch, augment(batch, args.resolution)), batch["targets"]) for batch in loader.batches(1)
    ]


def bare(args, student, batches, teacher=None, teacher_batches=None):
    """Images/s of an epoch of bare steps, after a few."""
    precision, device = Precision(args.amp, torch.device(args.device)), torch.device(args.device)
    student.to(device).train()
    criterion = None
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
        criterion = DistillationLoss(*loss_settings("combined"))
        with torch.no_grad():
            criterion.build(student.eval()(batches[0][0]), teacher(teacher_batches[0][0]))
        student.train()
    optimizer = make_optimizer(student, criterion, optimizer="adamw", lr=5e-4)

    def epoch(count):
        for i in range(count):
            inputs, targets = batches[i]
            with precision.autocast():
                if teacher is None:
                    loss = task_cross_entropy(student(inputs), targets)
                else:
                    with torch.no_grad():
                        taught = teacher(teacher_batches[i][0])
                    loss = criterion(student(inputs), taught, targets)
            precision.scaler.scale(loss).backward()
            precision.scaler.step(optimizer)
            precision.scaler.update()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    epoch(3)
    return len(batches) * args.batch_size / seconds(lambda: epoch(len(batches)))


def real(args, script, folder, models, *flags):
    """The script's own training images/s: median of the epochs after the first."""
    done = subprocess.run(
        [
            sys.executable,
            *map(
                str,
                [
                    ROOT / script,
                    "--dataset",
                    "medpix",
                    "--data-root",
                    args.data_root,
                    "--resolution",
                    args.resolution,
                    "--batch-size",
                    args.batch_size,
                    "--limit-train",
                    args.limit_train,
                    "--epochs",
                    3,
                    "--optimizer",
                    "adamw",
                    "--lr",
                    5e-4,
                    "--device",
                    args.device,
                    "--amp",
                    args.amp,
                    "--compile",
                    "off",
                    "--image-model",
                    models[0],
                    "--text-model",
                    models[1],
                    "--overwrite",
                    "--output",
                    folder,
                    *flags,
                ],
            ),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return statistics.median(row["images_per_second"] for row in json.loads((folder / "metrics.json").read_text())[1:])


def main():
    args = parse()
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {hardware}, batch {args.batch_size}, {args.resolution} px, amp {args.amp}")
    splits = load_splits("medpix", args.data_root, limit_train=args.limit_train, splits=("train",))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        epochs = {"train_teacher.py": None, "distill.py": None}
        cases = {
            "train_teacher.py": (args.teacher, []),
            "distill.py": (
                args.student,
                [
                    "--method",
                    "combined",
                    "--teacher-checkpoint",
                    folder / "train_teacher.py/best.pth",
                    "--allow-weak-teacher",
                ],
            ),
        }
        for script, (models, flags) in cases.items():
            loops, scripts = [], []
            for _ in range(args.rounds):
                scripts.append(real(args, script, folder / script, models, *flags))
                loaded = {
                    name: load_model(load_checkpoint(str(folder / name / "best.pth")))
                    for name in epochs
                    if (folder / name).exists()
                }
                own = [
                    (model, epoch_inputs(args, splits, preprocess))
                    for model, preprocess in (loaded[script], loaded["train_teacher.py"])
                ]
                loops.append(bare(args, *own[0]) if script == "train_teacher.py" else bare(args, *own[0], *own[1]))
            epochs[script] = args.limit_train / statistics.median(scripts)
            print(
                f"{script:18} bare {statistics.median(loops):8.1f} images/s ({min(loops):.1f} to "
                f"{max(loops):.1f}), script {statistics.median(scripts):8.1f} "
                f"({min(scripts):.1f} to {max(scripts):.1f}), ratio "
                f"{statistics.median(scripts) / statistics.median(loops):.3f}",
                flush=True,
            )
        tokenizers = [load_model(load_checkpoint(str(folder / name / "best.pth")))[1] for name in epochs]
    once = {
        "tokenization by both": sum(
            seconds(lambda p=p: tokenize(splits.train.texts, p.tokens.tokenizer, p.tokens.max_length))
            for p in tokenizers
        ),
        "decoding": seconds(lambda: [splits.train[i]["image"] for i in range(len(splits.train))]),
    }
    for what, spent in once.items():
        shares = ", ".join(f"{100 * spent / epoch:.1f} % of an epoch of {script}" for script, epoch in epochs.items())
        print(f"{what:22} {spent:7.3f} s for {len(splits.train)} images, once a run: {shares}")


if __name__ == "__main__":
    main()
