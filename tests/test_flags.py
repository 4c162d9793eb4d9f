"""Every flag of every script does something: with another value a run differs in what the flag is for.

Each line of a table is a command line of tiny data and models, run twice in this process, once with the flag's words
and once
without (or with those behind it); what must differ is named: weights (of best.pth and latest.pth), lines (what is
printed),
results, rows (metrics.json), files, calls (what cannot be done here) or what the stored arrays hold.  What a run says
of its own
flags (config.json) does not count.
"""

import hashlib
import inspect
import json
import re
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn

import common.data
import common.loader
import common.medical
import common.metrics
import common.models
import common.multimodal
import common.page
import common.training
from common import cli
from common.data import ImageDataset

sys.path.insert(0, str(ROOT))
TRAINING = ("train_teacher", "train_student", "distill")
TIMES = re.compile(r"[\d,.]+ images/s|[\d,]+ MB")


class Narrow(common.models.ResNet):
    """ResNet-8 with 4 to 8 channels."""

    def __init__(self, num_classes):
        nn.Module.__init__(self)
        self.conv1, self.bn1, self.num_features = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), 8
        for i, (width_in, width) in enumerate(((4, 4), (4, 8), (8, 8), (8, 8)), 1):
            setattr(self, f"layer{i}", nn.Sequential(common.models.BasicBlock(width_in, width, 1 if i == 1 else 2)))
        self.fc = common.models.linear_head(8, num_classes)


def narrow_vit(num_classes, side, patch):
    sizes = {"img_size": side, "patch_size": patch, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, dynamic_img_size=True, **sizes)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    """Models of some hundred weights in place of the small ones, few resamples, and no measurement of speed."""
    for name in ("resnet8", "resnet18"):
        monkeypatch.setitem(common.models.SMALL_MODELS, name, lambda classes, side, patch: Narrow(classes))
    for name in ("vit_6_192", "vit_tiny"):
        monkeypatch.setitem(common.models.SMALL_MODELS, name, narrow_vit)
    monkeypatch.setattr(common.training, "cost", lambda model, *args, **options: {"parameters": model.num_parameters})
    monkeypatch.setattr(
        common.metrics,
        "resampled",
        lambda *args, names=common.metrics.RESAMPLED, **options: {name: np.array([0.25, 0.75]) for name in names},
    )
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(
        common.multimodal, "SCRATCH_MODELS", {"bert-tiny-scratch": (1, 64), "bert-mini-scratch": (2, 64)}
    )
    monkeypatch.setattr(common.medical, "read_isic2024", read_isic2024)
    monkeypatch.setattr(common.medical, "opencv", lambda: None)
    monkeypatch.setattr(common.medical, "remove_hair", lambda image: 255 - image)
    # what cannot be done here is noted instead: the hub, a download, a compiler, workers
    medmnist, build, loads = common.medical.read_medmnist, common.models._build, torch.utils.data.DataLoader
    splits = {"train", "val", "test"}
    monkeypatch.setattr(
        common.data,
        "read_cifar",
        lambda name, root, download: CALLS.append(f"download {download}") or medmnist(root, splits),
    )
    monkeypatch.setattr(
        common.models,
        "_build",
        lambda name, *args: CALLS.append(f"{name} pretrained {args[3]}") or build(name, *args[:3], False, *args[4:]),
    )
    monkeypatch.setattr(nn.Module, "compile", lambda self: CALLS.append("compile"))
    start = common.loader.Loader.__init__

    def noted(self, *args, **options):
        given = inspect.signature(start).bind(self, *args, **options).arguments
        CALLS.append(f"batches of {given['batch_size']}, cache {given.get('cache')}")
        start(self, *args, **options)

    monkeypatch.setattr(common.loader.Loader, "__init__", noted)
    monkeypatch.setattr(common.page, "draw_report", no_figures)
    monkeypatch.setattr(
        torch.utils.data,
        "DataLoader",
        lambda *args, num_workers, persistent_workers, worker_init_fn, **options: (
            CALLS.append(f"{num_workers} workers") or loads(*args, **options)
        ),
    )
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def no_figures(folder, metric, members, groups, *others):
    Image.new("L", (1, 1)).save(folder / "one.png")
    for group in groups:
        group["figures"] = []
    return {"one.png": "one"}


def archive(path, seed, counts=(24, 9, 9), classes=3, dtype=np.uint8, side=8):
    """A MedMNIST file of coloured noise whose mean tells the class, half of the images being of the first."""
    rng, arrays = np.random.default_rng(seed), {}
    for split, count in zip(("train", "val", "test"), counts):
        labels = np.where(np.arange(count) % 2, np.arange(count) % classes, 0)
        labels[:classes] = np.arange(classes)
        top = 60 if dtype == np.uint8 else 900
        images = rng.integers(0, top, (count, side, side, 3)) + (labels[:, None, None, None] * top // 2)
        arrays.update({f"{split}_images": images.astype(dtype), f"{split}_labels": labels[:, None].astype(np.uint8)})
    np.savez(path, **arrays)


def table(folder, count=60):
    """Coloured images, two of a patient, in a table with two columns of each kind and two findings, and a second table
    without its last four rows."""
    rng, parts = np.random.default_rng(3), ("train", "train", "train", "val", "test")
    lines = ["image,other_image,label,other,patient_id,ward,split,part,red,blue"]
    folder.mkdir()
    for i in range(count):
        shade = (30 + 60 * (i % 2), 90, 20 + 2 * i)
        Image.fromarray((rng.integers(0, 40, (12, 16, 3)) + shade).astype(np.uint8)).save(folder / f"{i}.png")
        classes, groups = f"{('cancer', 'normal')[i % 2]},{'abc'[i % 3]}", f"p{i // 2},w{i // 4}"
        splits, findings = f"{parts[i // 2 % 5]},{parts[i // 2 % 4 + 1]}", f"{i % 2},{int(i // 2 % 10 > 4)}"
        lines.append(f"{i}.png,{(i + 2) % count}.png,{classes},{groups},{splits},{findings}")
    for name, kept in (
        ("one.csv", lines),
        ("two.csv", lines[:-4]),
        ("gone.csv", [*lines, "gone.png,1.png,normal,a,p,w,train,train,0,0"]),
    ):
        (folder / name).write_text("\n".join(kept) + "\n")


def pairs(folder):
    """Images with two texts and two tasks."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    for split, count in (("train", 24), ("val", 12), ("test", 12)):
        rows = []
        for i in range(count):
            Image.fromarray(rng.integers(0, 90, (8, 8, 3), np.uint8) + np.uint8(50 * (i % 2))).save(
                folder / f"{split}{i}.png"
            )
            rows.append(
                {
                    "image": f"{split}{i}.png",
                    "text": f"one {'abc'[i % 3]} of many words {i}",
                    "other": f"seen {i % 2}",
                    "organ": "xyz"[i % 3],
                    "sign": ("no", "yes")[i % 2],
                    "group": f"{split}{i // 2}",
                    "ward": f"{split}{i // 4}",
                }
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lesions(folder):
    """HAM10000's layout: 84 lesions of seven kinds."""
    rng, lines = np.random.default_rng(6), ["lesion_id,image_id,dx"]
    (folder / "images").mkdir(parents=True)
    for i in range(84):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / "images" / f"i{i}.jpg")
        lines.append(f"l{i},i{i},{('akiec', 'bcc', 'bkl', 'df', 'mel', 'nv', 'vasc')[i % 7]}")
    (folder / "HAM10000_metadata.csv").write_text("\n".join(lines) + "\n")


def read_isic2024(root, **decoding):
    """In place of the reader, which needs h5py: the table's 60 images of 30 patients, 20 malignant."""
    labels, names = (np.arange(60) % 3 == 0).astype(int), [f"{i}.png" for i in range(60)]
    return {
        "train": ImageDataset(
            names, labels, paths=[f"{root}/{i}" for i in names], groups=[f"p{i // 2}" for i in range(60)]
        )
    }, ["benign", "malignant"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all data; what runs make of it is remembered by their command lines."""
    root = tmp_path_factory.mktemp("flags")
    archive(root / "a.npz", 1)
    archive(root / "b.npz", 2, counts=(24, 12, 9))
    archive(root / "two.npz", 4, classes=2)
    archive(root / "deep.npz", 1, dtype=np.uint16)
    table(root / "table")
    pairs(root / "pairs")
    lesions(root / "lesions")
    (root / "extra").mkdir()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(root / "extra" / "x.png")
    (root / "names.txt").write_text("".join(f"train/{i:06d}\n" for i in range(12)))
    (root / "grid.json").write_text('{"lr": [0.3, 0.03]}')
    (root / "flags.json").write_text('{"lr": 0.3}')
    torch.manual_seed(1)
    torch.save(Narrow(3).state_dict(), root / "narrow.pth")
    torch.save(Narrow(3).state_dict(), root / "other.pth")
    (root / "old.csv").write_text("old\n")
    flat = narrow_vit(3, 8, 4)
    nn.init.zeros_(flat.head.weight)
    torch.save(flat.state_dict(), root / "flat.pth")
    torch.save(narrow_vit(3, 8, 4).state_dict(), root / "vit.pth")
    return root


SEEN, CALLS = {}, []


def outcome(place, monkeypatch, capsys, script, words):
    """What a command line leaves, see `left`, and {"calls", "lines"}; of equal command lines the same object."""
    if (script, words) not in SEEN:
        folder = place / f"run{len(SEEN)}"
        monkeypatch.chdir(place)
        monkeypatch.setattr(
            sys,
            "argv",
            [f"{script}.py", *shlex.split(words), *([] if "--output" in words else ["--output", str(folder)])],
        )
        module, code = runpy.run_path(str(ROOT / f"{script}.py")), 0
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
        capsys.readouterr(), CALLS.clear()
        try:
            cli.run_script(module["main"], module["build_parser"])
        except SystemExit as stop:
            code = stop.code
        lines = (
            TIMES.sub("", "".join(capsys.readouterr()))
            .replace(str(folder), "RUN")
            .replace(folder.name, "RUN")
            .splitlines()
        )
        fresh = sorted(
            path for path in place.rglob("*") if path.is_file() and path.stat().st_mtime_ns != before.get(path)
        )
        SEEN[script, words] = {"calls": list(CALLS), "lines": [f"exit {code}", *lines], **left(place, folder, fresh)}
        for name in (folder, place / "elsewhere"):
            shutil.rmtree(name, ignore_errors=True)
    return SEEN[script, words]


def left(place, folder, fresh):
    """{"files", "arrays", "results", "rows", "weights"} of fresh files (paths); without times, and the run folder's
    name is RUN."""
    found = {"files": [str(path.relative_to(place)).replace(folder.name, "RUN") for path in fresh], "arrays": []}
    for path in fresh:
        if path.suffix in (".npy", ".npz") or path.name in ("kept.txt", "report.html"):
            found["arrays"].append(sha(path.read_bytes().replace(bytes(folder), b"RUN")))
        elif path.name in ("evaluation.json", "report.json"):
            content = json.loads(path.read_text().replace(str(folder), "RUN"))
            found["results"] = {
                key: value
                for key, value in content.items()
                if key not in ("environment", "peak_memory_mb", "batch_size", "split")
            }
        elif path.name == "results.json":
            kept = (
                "dataset",
                "val",
                "test",
                "final_val",
                "teacher",
                "select_metric",
                "best_epoch",
                "last_epoch",
                "method",
                "model",
            )
            found["results"] = {key: json.loads(path.read_text())[key] for key in kept}
        elif path.name == "metrics.json":
            found["rows"] = [
                {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in json.loads(path.read_text())
            ]
        elif path.name in ("best.pth", "latest.pth"):
            weights = torch.load(path, weights_only=True)["model"]
            found.setdefault("weights", []).append(
                {name: sha(value.contiguous().numpy().tobytes()) for name, value in weights.items()}
            )
    return found


def sha(content):
    return hashlib.sha256(content).hexdigest()


BASE = (
    "--dataset medmnist --data-root a.npz --resolution 8 --batch-size 8 --epochs 2 --model resnet8 --device cpu "
    "--workers 0"
)
WORDS = {
    "CSV": "--dataset csv --data-root table --table one.csv",
    "LOOSE": "--dataset csv --data-root table --table one.csv --split-column none",
    "TEXT": "--dataset image_text --data-root pairs --tasks organ sign --text-model bert-tiny-scratch --fusion-dim 16 "
    "--max-length 8",
    "ISIC": "--dataset isic2024 --data-root table",
    "START": "--init-checkpoint start/best.pth",
    "TAUGHT": "--teacher-checkpoint start/best.pth --allow-weak-teacher",
    "TWO": "--teacher-checkpoint start/best.pth vit/best.pth --allow-weak-teacher",
    "VIT": "--teacher-checkpoint vit/best.pth --allow-weak-teacher --model vit_6_192 --method tokens",
    "FEATURE": "--method feature --student-layer layer3 --teacher-layer layer3",
    "STORED": "--dataset medmnist --data-root a.npz --model resnet8",
    "RUN": "start/best.pth --device cpu --workers 0",
    "TABLED": "tabled/best.pth --device cpu --workers 0",
    "STILL": "--lr 1e-12 --epochs 6",  # no epoch gains what the one before has not
}
# the flag's words | those of both runs, beside BASE | those of the other run | what must differ
TRAINED = """
--output elsewhere | | | files
--save-every 1 | | | files
--seed 1 | | | weights
--seeds 1 2 | | | files
--device nowhere | | | lines
--config flags.json | | | weights
--sweep grid.json --sweep-index 0 | --output swept --overwrite | | files
--sweep-index 1 | --sweep grid.json --output index --overwrite | --sweep-index 0 | files
--dataset cifar10 | | | results
--data-root b.npz | | | weights
--download | --dataset cifar10 | | calls
--val-split 0.4 | LOOSE | | results
--folds 4 | LOOSE --fold 0 | --folds 3 | results
--fold 1 | LOOSE --folds 3 | --fold 0 | results
--split-seed 1 | LOOSE | | weights
--limit-train 12 | | | weights
--resolution 12 | | | weights
--batch-size 4 | | | weights
--cache off | | | lines
--workers 2 | --cache off | | calls
--on-bad-image skip | --dataset csv --data-root table --table gone.csv | | lines
--decode-size 8 | CSV | | weights
--window 0 500 | --data-root deep.npz | --window 0 900 | weights
--table two.csv | --dataset csv --data-root table | --table one.csv | results
--image-column other_image | CSV | | weights
--label-column other | CSV | | results
--label-columns red blue | CSV | | results
--group-column ward | LOOSE | | results
--split-column part | CSV | | results
--include-list names.txt | | | weights
--hair-removal | | | weights
--binary | --dataset ham10000 --data-root lesions | | results
--negatives 12 | ISIC | | results
--extra-train extra | ISIC | | results
--save-samples grid.png | | | files
--augment none | | | weights
--crop-mode squash | CSV | | weights
--crop resized | | | weights
--padding 0.5 | | | weights
--crop-scale 0.1 0.2 | --crop resized | | weights
--hflip 1 | | | weights
--vflip 1 | | | weights
--rotation 90 | | | weights
--scale 0.5 0.6 | | | weights
--brightness 0.9 | | | weights
--contrast 0.9 | | | weights
--saturation 0.9 | | | weights
--hue 0.5 | | | weights
--grayscale 0.5 | | | weights
--blur 1 | --resolution 32 | | weights
--solarize 1 | --brightness 1 | | weights
--random-erasing 0.5 | | | weights
--mixup 0.5 | | | weights
--cutmix 1 | --mixup 0.5 | | weights
--mix-probability 0.5 | --cutmix 1 | | weights
--model vit_6_192 | | | results
--patch-size 2 | --model vit_6_192 | | results
--pretrained | | | calls
--weights narrow.pth | | | weights
--init-checkpoint start/best.pth | | | weights
--freeze-backbone | START | | weights
--dropout 0.9 | | | weights
--text-fields other | TEXT | | weights
--tasks organ | TEXT | | results
--inputs image | TEXT | | results
--image-model vit_6_192 | TEXT | | results
--text-model bert-mini-scratch | TEXT | | results
--fusion gated | TEXT | | results
--fusion-layers 2 | TEXT --fusion gated | | results
--fusion-dim 8 | TEXT | | results
--max-length 3 | TEXT | | weights
--text-pooling cls | TEXT | | weights
--freeze image | TEXT --pretrained | | weights
--backbone-lr 0.5 | TEXT | | weights
--task-weights 1 0 | TEXT | | weights
--epochs 1 | | | rows
--optimizer adam | | | weights
--lr 0.3 | | | weights
--momentum 0 | | | weights
--nesterov | | | weights
--weight-decay 0.5 | | | weights
--schedule constant | | | weights
--milestones 1 | --schedule multistep | --milestones 5 | weights
--gamma 0.5 | --schedule multistep --milestones 1 | | weights
--plateau-patience 1 | STILL --schedule plateau | | rows
--warmup-epochs 1 | | | weights
--sampler balanced | | | weights
--class-weights balanced | | | weights
--label-smoothing 0.3 | | | weights
--accumulation-steps 2 | | | weights
--clip-grad 0.01 | | | weights
--ema 0.9 | | | weights
--patience 1 | STILL | | rows
--select-metric loss | | | results
--positive normal | CSV | | results
--amp bf16 | | | weights
--compile on | | | calls
"""
DISTILLED = """
--teacher-checkpoint vit/best.pth | --allow-weak-teacher | TAUGHT | weights
--teacher-model vit_6_192 | --allow-weak-teacher --teacher-weights vit.pth | TAUGHT | lines
--teacher-pretrained | --allow-weak-teacher --teacher-model resnet18 --method mmd | --teacher-weights narrow.pth | calls
--teacher-weights other.pth | --allow-weak-teacher --teacher-model resnet18 | --teacher-weights narrow.pth | weights
--teacher-embeddings stored | --allow-weak-teacher --method mmd | --teacher-checkpoint start/best.pth | weights
--num-views 1 | --allow-weak-teacher --teacher-embeddings stored --method mmd | | weights
--teacher-resolution 12 | TAUGHT | | weights
--teacher-pooling mean | VIT --method mmd | | weights
--teacher-shares 3 1 | TWO | | weights
--teacher-average probabilities | TWO | | weights
--standardize-teachers phi-s | TAUGHT --method mmd | | weights
--allow-weak-teacher | --teacher-model vit_6_192 --teacher-weights flat.pth | | lines
--method dkd | TAUGHT | | weights
--alpha 0.9 | TAUGHT | | weights
--limit-labels 8 | TAUGHT | | weights
--unlabeled-root table | TAUGHT | | weights
--labelled-share 0.5 | TAUGHT --limit-labels 8 | | weights
--temperature 8 | TAUGHT | | weights
--distillation-warmup-epochs 2 | TAUGHT | | weights
--loss ce=0.5 kl=3 | TAUGHT | | weights
--loss-options dkd.beta=3 | TAUGHT --method dkd | | weights
--student-layer layer2 | TAUGHT FEATURE | | weights
--teacher-layer layer2 | TAUGHT FEATURE | | weights
--global-crops 2 | VIT | | weights
--local-crops 1 | VIT | | weights
--local-resolution 8 | VIT --local-crops 1 | | weights
--local-crop-scale 0.5 0.9 | VIT --local-crops 1 | | weights
--pooling mean | VIT | | weights
--projector-weight-decay 0.5 | TAUGHT FEATURE | | weights
--eval-dataset medmnist | TAUGHT | | rows
--eval-data-root b.npz | TAUGHT --eval-dataset medmnist | --eval-data-root a.npz | rows
--eval-every 1 | TAUGHT --eval-dataset medmnist | | rows
"""
EXTRACTED = """
--output elsewhere | STORED | | files
--overwrite | STORED --seed 1 --output spare | | lines
--batch-size 4 | STORED | | calls
--cache ram | STORED | | calls
--checkpoint vit/best.pth | | --checkpoint start/best.pth | arrays
--model vit_6_192 | STORED | | arrays
--patch-size 2 | STORED --model vit_6_192 | | arrays
--pretrained | STORED | | calls
--weights narrow.pth | STORED | | arrays
--splits val | STORED | | files
--unlabeled-root table | STORED | | arrays
--images table | --model resnet8 | --dataset medmnist --data-root a.npz | files
--reference made --keep-fraction 0.5 | STORED | | files
--keep-fraction 0.9 | STORED --reference made | --keep-fraction 0.5 | arrays
--num-views 2 | STORED | | arrays
--mixup 0.5 | STORED --num-views 2 | | arrays
--cutmix 0.5 | STORED --num-views 2 | | arrays
--pooling mean | STORED --model vit_6_192 | | arrays
--save-logits | STORED | | files
--save-tokens | STORED --model vit_6_192 | | files
--dtype float32 | STORED | | arrays
--shard 0/2 | STORED | | files
--merge 2 | STORED --output sharded | | lines
--seed 1 | STORED | | arrays
--device nowhere | STORED | | lines
--amp bf16 | STORED | | arrays
--compile on | STORED | | calls
--limit-train 12 | STORED | | lines
--label-columns red blue | --model resnet8 CSV | | lines
--crop-mode squash | --dataset csv --data-root table --table one.csv --model resnet8 | | arrays
"""
EVALUATED = """
--teacher-checkpoint vit/best.pth | RUN | | results
--teacher-embeddings stored | RUN | | results
--knn | RUN | | results
--linear-probe | RUN | | results
--seed 1 | RUN --linear-probe | | results
--dataset digits | RUN | | lines
--data-root b.npz | RUN | | results
--split val | RUN | | results
--resolution 12 | RUN | | results
--teacher-resolution 12 | RUN --teacher-checkpoint start/best.pth | | results
--batch-size 4 | RUN | | calls
--device nowhere | RUN | | lines
--amp bf16 | RUN | | arrays
--output elsewhere | RUN | | files
--predict table | RUN --output new.csv | | files
--overwrite | RUN --predict table --output old.csv | | lines
--cache off | RUN | | calls
--workers 2 | RUN --cache off | | calls
--on-bad-image skip | TABLED --table gone.csv | | lines
--decode-size 8 | TABLED | | arrays
--window 0 500 | RUN --data-root deep.npz | --window 0 900 | arrays
--table two.csv | TABLED | | arrays
--image-column other_image | TABLED | | arrays
--label-column other | TABLED | | lines
--label-columns red blue | TABLED | | lines
--group-column none | TABLED | | arrays
--split-column part | TABLED | | arrays
--positive normal | TABLED | | results
--text-fields other | texted/best.pth | | arrays
--tasks organ | texted/best.pth | | lines
"""
REPORTED = """
--output elsewhere | one | | files
--metric auc | one | | lines
--select val_loss | one | | lines
--mode max | one --select val_loss | | lines
--gallery 0 | one | | arrays
--reevaluate | one | | results
--device nowhere | one --reevaluate | | lines
--batch-size 4 | one --reevaluate | | calls
"""
ELSEWHERE = {  # flags whose whole meaning has a test of its own
    "--resume": "test_resume.py",
    "--overwrite": "test_scripts.py",
    "--dry-run": "test_dry_run.py",
    "--hf-dataset": "test_tokens.py",
    "--help-all": "test_house.py",
    **dict.fromkeys(("--export", "--with-preprocessing", "--quantize", "--data-licence"), "test_export.py"),
    **dict.fromkeys(("--tensorboard", "--watch"), "test_watching.py"),
    **dict.fromkeys(("--frame", "--group-by-patient"), "test_dicom.py"),
}


def lines_of(text):
    return [tuple(part.strip() for part in line.split("|")) for line in text.strip().splitlines()]


def spelt(*parts):
    """The words of a command line, those of WORDS written out."""
    return " ".join(WORDS.get(word, word) for part in parts for word in part.split())


def flags_of(script):
    parser = runpy.run_path(str(ROOT / f"{script}.py"))["build_parser"]()
    return {action.option_strings[0] for action in parser._actions if action.option_strings} - {"-h"}


def of_extraction():
    """The lines of the training scripts on data and augmentation, for extract_embeddings.py: the views of its arrays
    tell them."""
    own = flags_of("extract_embeddings") - {line[0].split()[0] for line in lines_of(EXTRACTED)}
    kinds = {"lines": "lines", "calls": "calls"}
    return [
        (changed, f"--model resnet8 {both}", other, kinds.get(what, "arrays"))
        for changed, both, other, what in lines_of(TRAINED)
        if changed.split()[0] in own and "TEXT" not in both
    ]


BY_SCRIPT = {  # {script: [(words of every run, lines)]}
    "train_teacher": [(BASE, lines_of(TRAINED))],
    "train_student": [(BASE, lines_of(TRAINED))],
    "distill": [(f"{BASE} TAUGHT --method mmd", lines_of(TRAINED)), (BASE, lines_of(DISTILLED))],
    "extract_embeddings": [
        ("--device cpu --workers 0", lines_of(EXTRACTED)),
        ("--device cpu --workers 0 --resolution 8 --dataset medmnist --data-root a.npz --num-views 3", of_extraction()),
    ],
    "evaluate": [("", lines_of(EVALUATED))],
    "report": [("", lines_of(REPORTED))],
}
CASES = [
    pytest.param(script, words, *line, id=f"{script}{line[0].split()[0]}")
    for script, tables in BY_SCRIPT.items()
    for words, lines in tables
    for line in lines
]


READY = {  # what some command lines start from is made before the first of them: {folder: [(script, words)]}
    "start": [("train_teacher", f"{BASE} --output start")],
    "vit": [("train_teacher", f"{BASE} --model vit_6_192 --output vit")],
    "tabled": [("train_student", f"{BASE} CSV --output tabled")],
    "texted": [("train_student", f"{BASE} TEXT --output texted")],
    "turned": [("train_student", f"{BASE} CSV --positive normal --output turned")],
    "one": [
        ("train_student", f"{BASE} --output one/student"),
        ("train_teacher", f"{BASE} --output one/teacher"),
        (
            "distill",
            f"{BASE} --teacher-checkpoint one/teacher/best.pth --allow-weak-teacher --alpha 1 --epochs 15 "
            "--output one/distill",
        ),
    ],
    **{
        name: [("extract_embeddings", f"STORED --device cpu --resolution 8 --workers 0 --output {name}")]
        for name in ("made", "spare")
    },
    "stored": [
        (
            "extract_embeddings",
            "--checkpoint start/best.pth --device cpu --workers 0 --save-logits --num-views 2 --output stored",
        )
    ],
    "sharded": [
        ("extract_embeddings", f"STORED --device cpu --workers 0 --shard {i}/2 --output sharded") for i in range(2)
    ],
}
MADE = set()


@pytest.fixture
def leaves(place, monkeypatch, capsys):
    """What a command line leaves, see `outcome`."""

    def run(script, *parts):
        words = spelt(*parts)
        for name in {word.split("/")[0] for word in words.split()} & {*READY} - MADE:
            MADE.add(name)
            for earlier in READY[name]:
                found = run(*earlier)["lines"]
                assert found[0] == "exit 0", found
        return outcome(place, monkeypatch, capsys, script, words)

    return run


@pytest.mark.parametrize(
    "script, words",
    [
        ("train_teacher", BASE),
        ("train_student", BASE),
        ("distill", f"{BASE} TAUGHT"),
        ("extract_embeddings", "STORED --workers 0"),
        ("evaluate", "RUN"),
        ("report", "one"),
    ],
)
def test_the_same_flags_leave_the_same(leaves, script, words):
    """Else a difference would say nothing."""
    one, two = leaves(script, words), leaves(script, words, "" if script == "report" else "--workers 0", "--device cpu")
    assert one == two


@pytest.mark.parametrize("script, words, changed, both, other, what", CASES)
def test_a_flag_does_something(leaves, script, words, changed, both, other, what):
    one, two = (leaves(script, words, both, more) for more in (other, changed))
    assert what in ("lines", "files") or {one["lines"][0], two["lines"][0]} == {"exit 0"}, (one["lines"], two["lines"])
    assert one[what] != two[what]


@pytest.mark.parametrize("script", BY_SCRIPT)
def test_every_flag_has_a_line(script):
    tested = {line[0].split()[0] for _, lines in BY_SCRIPT[script] for line in lines}
    lacking = flags_of(script) - tested
    assert lacking <= {*ELSEWHERE}, lacking - {*ELSEWHERE}
    for flag in lacking:
        assert flag in (Path(__file__).parent / ELSEWHERE[flag]).read_text()


@pytest.mark.parametrize("script", BY_SCRIPT)
def test_a_default_is_what_its_text_would_be(script):
    """Else a run that was resumed, or repeated from its config.json, has another value (0.0 for 0) than the others of
    its group."""
    for action in runpy.run_path(str(ROOT / f"{script}.py"))["build_parser"]()._actions:
        for value in action.default if isinstance(action.default, list) else [action.default]:
            if action.type and isinstance(value, (int, float, str)) and value != "==SUPPRESS==":
                again = action.type(str(value))
                assert (again, type(again)) == (value, type(value)), action.dest


def test_the_positive_class_from_the_flag_to_the_figures(leaves, place):
    """Cancer and normal: by default cancer, as asked for normal; a checkpoint knows, evaluate.py may be told anew."""

    def average_precision(folder, name):
        with np.load(place / folder / "predictions_test.npz", allow_pickle=False) as stored:
            index, logits = stored["classes"].tolist().index(name), stored["logits"].astype(np.float64)
            return average_precision_score(stored["labels"] == index, logits[:, index] - logits[:, 1 - index])

    for folder, name, other in (("tabled", "cancer", "normal"), ("turned", "normal", "cancer")):
        log = leaves(*READY[folder][0])["lines"]
        results = json.loads((place / folder / "results.json").read_text())
        for split in ("val", "test", "final_test"):
            assert results[split]["positive"] == name
        assert results["test"]["average_precision"] == pytest.approx(average_precision(folder, name))
        assert any(f"positive class: {name}" in line for line in log)
        words = f"{folder}/best.pth --device cpu --workers 0"
        for flag, expected in (("", name), (f"--positive {other}", other)):
            found = leaves("evaluate", words, flag)
            assert found["results"]["student"]["positive"] == expected
            assert found["results"]["student"]["average_precision"] == pytest.approx(
                average_precision(folder, expected)
            )
        report = leaves("report", folder, "--metric average_precision")["lines"]
        assert any("average_precision: the positive class is " + name in line for line in report)
    for flag, expected in (("", "yes"), ("--positive no", "no")):  # of two tasks, of which organ has three classes
        student = leaves("evaluate", "texted/best.pth --device cpu --workers 0", flag)["results"]["student"]
        assert student["sign_positive"] == expected and "organ_positive" not in student and "positive" not in student
    refused = leaves("train_student", BASE, "CSV --positive cow")["lines"]
    assert refused[0] == "exit 2" and refused[-1] == "error: --positive cow is not a class: choose cancer, normal"
    assert (
        leaves("train_student", BASE, "--positive 1")["lines"][-1]
        == "error: --positive 1: no task here has two classes"
    )
