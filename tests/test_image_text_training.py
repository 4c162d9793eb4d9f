"""Image + text models trained by the scripts: methods, one side alone, foreign text models, resume, two processes, bad
input."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import run_script, succeed, unpack
from PIL import Image
from test_distributed import two
from test_resume import assert_same_run, stopped

from common.data import load_splits
from common.multimodal import build_image_text_model
from common.run import load_checkpoint
from common.training import load_model

ORGANS, SIGNS = ("brain", "liver", "lung"), ("absent", "present")
SMALL = [
    "--resolution",
    16,
    "--batch-size",
    12,
    "--optimizer",
    "adamw",
    "--lr",
    0.002,
    "--device",
    "cpu",
    "--fusion-dim",
    64,
    "--max-length",
    16,
]
IMAGES, TEXTS = ["--image-model", "resnet8"], ["--text-model", "bert-tiny-scratch"]
STUDENT = [*SMALL, *IMAGES, *TEXTS, "--epochs", 1]


def write_folder(root, sizes, seed=0):
    """Noise whose brightness tells the organ, texts that tell the sign; two images of a patient."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    for split, count in sizes.items():
        lines = []
        for i in range(count):
            organ, sign = i % 3, i // 3 % 2
            name = f"{split}-{i}.png"
            Image.fromarray((40 + 70 * organ + rng.integers(0, 40, (20, 20, 3))).astype(np.uint8)).save(
                root / "images" / name
            )
            words = rng.choice(["seen", "today", "again", "axial"], 3).tolist()
            lines.append(
                {
                    "image": name,
                    "text": " ".join([*words, ("no finding", "a mass")[sign]]),
                    "organ": ORGANS[organ],
                    "sign": SIGNS[sign],
                    "group": f"{split} {i // 2}",
                }
            )
        (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("data") / "pairs", {"train": 96, "val": 24, "test": 24})
    return ["--dataset", "image_text", "--data-root", root, "--tasks", "organ", "sign"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory, data):
    """Run folder of a teacher that knows both tasks."""
    folder = tmp_path_factory.mktemp("image_text_teacher") / "run"
    succeed("train_teacher.py", *data, *SMALL, *IMAGES, *TEXTS, "--epochs", 6, "--output", folder)
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def refused(script, *args, **options):
    """The one line of a refusal."""
    done = run_script(script, *args, **options)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, (done.returncode, done.stdout, done.stderr)
    return done.stderr


# ------------------------------------------------------------------------------------------------------------- training


def test_a_teacher_learns_both_tasks(taught):
    found = results(taught)
    test = found["test"]
    assert test["organ_accuracy"] > 0.8 and test["sign_accuracy"] > 0.8  # chance is a third and a half
    assert test["accuracy"] == pytest.approx((test["organ_accuracy"] + test["sign_accuracy"]) / 2)
    assert {"organ_auc", "organ_macro_f1", "sign_auc", "sign_macro_f1", "organ_loss"} <= test.keys()
    rows = json.loads((taught / "metrics.json").read_text())
    assert {"val_organ_accuracy", "val_sign_auc", "val_accuracy"} <= rows[-1].keys() and len(rows) == 6
    assert found["model"]["family"] == "cnn+bert" and found["dataset"]["classes"] == {
        "organ": list(ORGANS),
        "sign": list(SIGNS),
    }
    for split in ("val", "test"):
        for task, count in (("organ", 3), ("sign", 2)):
            confusion = np.load(taught / f"confusion_{split}_{task}.npy", allow_pickle=False)
            assert confusion.shape == (count, count) and confusion.sum() == 24
            assert confusion.trace() / 24 == pytest.approx(found[split][f"{task}_accuracy"])


@pytest.mark.parametrize(
    "method, terms",
    [
        ("projection", {"ce", "kl", "projection"}),
        ("combined", {"ce", "kl", "projection", "crd"}),
        ("crd", {"ce", "crd"}),
        ("rkd", {"ce", "rkd_distance", "rkd_angle"}),
        ("mmd", {"ce", "mmd"}),
        ("dkd", {"ce", "dkd"}),
        ("dist", {"ce", "dist"}),
    ],
)
def test_each_method_teaches(tmp_path, data, taught, method, terms):
    """The teacher's dataset and tasks are the student's; the student's width and fusion are others."""
    done = succeed(
        "distill.py",
        *STUDENT,
        "--fusion",
        "gated",
        "--fusion-dim",
        48,
        "--method",
        method,
        "--teacher-checkpoint",
        taught / "best.pth",
        "--output",
        tmp_path / "run",
    )
    row = json.loads((tmp_path / "run/metrics.json").read_text())[0]
    assert {f"train_{term}" for term in terms} == {key for key in row if key.startswith("train_")} - {
        "train_loss",
        "train_accuracy",
    }
    assert all(np.isfinite(row[f"train_{term}"]) for term in terms)
    weights = {
        "ce": 1,
        "kl": 1,
        "projection": 100,
        "crd": 1,
        "rkd_distance": 25,
        "rkd_angle": 50,
        "mmd": 1,
        "dkd": 1,
        "dist": 2,
    }
    assert row["train_loss"] == pytest.approx(sum(weights[term] * row[f"train_{term}"] for term in terms), rel=1e-4)
    found = results(tmp_path / "run")
    assert 0 <= found["test"]["organ_agreement"] <= 1 and found["teacher"]["val"]["sign_accuracy"] > 0.8
    assert "teacher resnet8+bert-tiny-scratch" in done.stdout


def test_relations_teach_an_ordinary_image_model(tmp_path, teacher):
    """contrastive beside the temperature KL, mmd beside feature maps, between ResNets of other widths."""
    from conftest import SMALL as DIGITS

    for term, flags in (
        ("crd", ["--loss", "ce=1", "crd=1", "kl=0.5"]),
        ("mmd", ["--loss", "ce=1", "mmd=1", "feature=1", "--student-layer", "layer2", "--teacher-layer", "layer3"]),
    ):
        succeed(
            "distill.py",
            *DIGITS,
            "--epochs",
            1,
            *flags,
            "--teacher-checkpoint",
            teacher / "best.pth",
            "--output",
            tmp_path / term,
        )
        row = json.loads((tmp_path / term / "metrics.json").read_text())[0]
        assert np.isfinite(row[f"train_{term}"]) and row["val_accuracy"] > 0.1


@pytest.mark.parametrize("inputs, knows, does_not", [("image", "organ", "sign"), ("text", "sign", "organ")])
def test_one_side_alone(tmp_path, data, inputs, knows, does_not):
    """Brightness tells the organ and words the sign: a side alone learns its own task and not the other."""
    succeed(
        "train_teacher.py",
        *data,
        *SMALL,
        *IMAGES,
        *TEXTS,
        "--epochs",
        10,
        "--inputs",
        inputs,
        "--output",
        tmp_path / "run",
    )
    test = results(tmp_path / "run")["test"]
    assert test[f"{knows}_accuracy"] > 0.8
    assert test[f"{does_not}_accuracy"] < 0.75


def test_an_image_student_learns_from_an_image_and_text_teacher(tmp_path, data, taught):
    """Without labels: the fused embeddings' relations alone, judged by the loss."""
    flags = [
        *STUDENT,
        "--inputs",
        "image",
        "--loss",
        "rkd_distance=25",
        "rkd_angle=50",
        "--teacher-checkpoint",
        taught / "best.pth",
    ]
    succeed("distill.py", *flags, "--output", tmp_path / "run")
    assert set(results(tmp_path / "run")["val"]) == {"distillation_loss"}
    model, _ = load_model(load_checkpoint(str(tmp_path / "run/best.pth")))
    assert model.text is None and not model.heads


def test_task_weights_and_the_backbones_own_rate(tmp_path, data):
    """A weight of 0 leaves a task's head as it began; a tiny rate leaves the backbones."""
    start_from = [*STUDENT, "--seed", 4]
    succeed(
        "train_student.py",
        *data,
        *start_from,
        "--task-weights",
        0,
        1,
        "--weight-decay",
        0,
        "--output",
        tmp_path / "weighted",
    )
    succeed(
        "train_student.py",
        *data,
        *start_from,
        "--backbone-lr",
        1e-12,
        "--weight-decay",
        0,
        "--output",
        tmp_path / "slow",
    )
    weighted, slow = (load_checkpoint(str(tmp_path / name / "latest.pth"))["model"] for name in ("weighted", "slow"))
    head, backbone = "heads.logits_organ.weight", "text.body.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(weighted[head], slow[head])
    texts = load_splits("image_text", str(data[3]), tasks=["organ", "sign"]).train.texts
    torch.manual_seed(4)  # the weights of the seed, as the script makes them
    first = build_image_text_model(
        "resnet8", "bert-tiny-scratch", {"organ": 3, "sign": 2}, 16, fusion_dim=64, texts=texts, max_length=16
    ).state_dict()
    assert torch.equal(first[head], weighted[head]) and not torch.equal(first[backbone], weighted[backbone])
    assert torch.allclose(first[backbone], slow[backbone], atol=1e-9) and not torch.equal(first[head], slow[head])


# ------------------------------------------------------------------------------------------------------ foreign text
# models


@pytest.fixture(scope="module")
def text_folders(tmp_path_factory):
    """A BERT-like and a DistilBERT-like folder with weights, as transformers saves them, each with a tokenizer of its
    own; and a ViT."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertTokenizerFast,
        DistilBertConfig,
        DistilBertForMaskedLM,
        DistilBertTokenizerFast,
        ViTConfig,
        ViTForImageClassification,
    )

    root, folders = tmp_path_factory.mktemp("text"), {}
    small = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "seen",
        "today",
        "again",
        "axial",
        "no",
        "finding",
        "a",
        "mass",
    ]
    vocabularies = {
        "bert": small,
        "distilbert": [*small, *(chr(97 + i) for i in range(1, 26)), *("##" + chr(97 + i) for i in range(26))],
    }
    torch.manual_seed(0)
    for kind, vocabulary in vocabularies.items():
        folder = folders[kind] = root / kind
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        if kind == "bert":
            model = BertForMaskedLM(
                BertConfig(
                    vocab_size=len(vocabulary),
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=64,
                    max_position_embeddings=40,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                )
            )
            tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
        else:
            model = DistilBertForMaskedLM(
                DistilBertConfig(
                    vocab_size=len(vocabulary), max_position_embeddings=40, n_layers=1, n_heads=2, dim=24, hidden_dim=48
                )
            )
            tokenizer = DistilBertTokenizerFast(str(folder / "vocab.txt"))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    folders["vit"] = root / "vit"
    vit = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    ViTForImageClassification(vit).save_pretrained(folders["vit"])
    return folders


def test_text_models_of_folders_from_end_to_end(tmp_path, data, text_folders):
    """A BERT-like folder and a ViT teach a DistilBERT-like one, with their weights; each text is read by both
    tokenizers."""
    bert, distilbert, vit = (f"hf:{text_folders[kind]}" for kind in ("bert", "distilbert", "vit"))
    succeed(
        "train_teacher.py",
        *data,
        *SMALL,
        "--image-model",
        vit,
        "--text-model",
        bert,
        "--epochs",
        2,
        "--pretrained",
        "--freeze",
        "text",
        "--output",
        tmp_path / "teacher",
        cwd=tmp_path,
    )
    succeed(
        "distill.py",
        *SMALL,
        *IMAGES,
        "--text-model",
        distilbert,
        "--epochs",
        1,
        "--method",
        "combined",
        "--teacher-checkpoint",
        tmp_path / "teacher/best.pth",
        "--allow-weak-teacher",
        "--output",
        tmp_path / "student",
    )
    moved = {
        kind: shutil.move(folder, folder.with_name(f"{kind}-moved")) for kind, folder in text_folders.items()
    }  # a checkpoint asks no folder
    teacher, student = (
        load_model(load_checkpoint(str(tmp_path / role / "best.pth")))[0] for role in ("teacher", "student")
    )
    for kind, folder in moved.items():
        shutil.move(folder, text_folders[kind])
    assert (teacher.text.body.config.model_type, student.text.body.config.model_type) == ("bert", "distilbert")
    assert [len(m.tokenizer("a mass")["input_ids"]) for m in (teacher, student)] == [4, 4] and len(
        teacher.tokenizer
    ) != len(student.tokenizer)
    from safetensors.torch import load_file

    saved, name = load_file(text_folders["bert"] / "model.safetensors"), "encoder.layer.0.output.dense.weight"
    assert torch.equal(teacher.state_dict()[f"text.body.{name}"], saved[f"bert.{name}"])  # the folder's, and frozen


# ------------------------------------------------------------------------------------------------- resume, two
# processes


COMBINED = [
    *SMALL,
    *IMAGES,
    *TEXTS,
    "--epochs",
    3,
    "--method",
    "combined",
    "--fusion",
    "cross_attention",
    "--ema",
    0.9,
    "--dropout",
    0.2,
    "--seed",
    3,
    "--backbone-lr",
    0.001,
]


def test_a_stopped_run_with_projectors_goes_on_exactly(tmp_path, taught):
    flags = [*COMBINED, "--teacher-checkpoint", taught / "best.pth"]
    succeed("distill.py", *flags, "--output", tmp_path / "whole")
    stopped("epoch 1/3:", signal.SIGTERM, "distill.py", *flags, "--output", tmp_path / "run")
    state = load_checkpoint(str(tmp_path / "run/latest.pth"))["loss"]
    assert {
        "projectors.projection.0.weight",
        "projectors.projection.1.weight",
        "projectors.crd.0.weight",
    } <= state.keys()
    succeed("distill.py", "--resume", tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_two_processes_compare_the_images_of_the_whole_batch(tmp_path, taught, text_folders):
    """Negatives, relations and MMD are of 12 images, not of 6: the losses of one process are those of two (no
    BatchNorm, no dropout)."""
    flags = [
        *SMALL,
        "--image-model",
        "vit_6_192",
        "--text-model",
        f"hf:{text_folders['bert']}",
        "--epochs",
        2,
        "--optimizer",
        "sgd",
        "--lr",
        0.01,
        "--clip-grad",
        1,
        "--loss",
        *"ce=1 kl=1 projection=100 crd=1 rkd_distance=25 rkd_angle=50 mmd=1".split(),
        "--temperature",
        2,
        "--teacher-checkpoint",
        taught / "best.pth",
    ]
    succeed("distill.py", *flags, "--output", tmp_path / "one")
    two("distill.py", *flags, "--output", tmp_path / "two")
    one, both = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    for x, y in zip(one, both, strict=True):
        for term in ("loss", "ce", "kl", "projection", "crd", "rkd_distance", "rkd_angle", "mmd"):
            assert x[f"train_{term}"] == pytest.approx(y[f"train_{term}"], rel=1e-4), term
        assert x["val_loss"] == pytest.approx(y["val_loss"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ bad input


def broken(tmp_path, change):
    """A folder of image_text in which `change(root, lines of train)` has broken something."""
    root = write_folder(tmp_path / "pairs", {"train": 24, "val": 12, "test": 12})
    lines = (root / "train.jsonl").read_text().splitlines()
    lines = change(root, lines) or lines
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    return ["--dataset", "image_text", "--data-root", root, "--tasks", "organ", "sign"]


def remove_two(root, lines):
    for i in (3, 5):
        (root / f"images/train-{i}.png").unlink()


@pytest.mark.parametrize(
    "change, words",
    [
        (remove_two, ["2 rows", "train-3.png"]),
        (lambda root, lines: [*lines[:4], "{", *lines[5:]], ["train.jsonl line 5", "not valid JSON"]),
        (
            lambda root, lines: [line.replace('"organ": "liver"', '"organ": null') for line in lines],
            ["train.jsonl line 2", "organ"],
        ),
        (lambda root, lines: [line.replace('"sign"', '"other"') for line in lines], ["train.jsonl line 1", "'sign'"]),
        (lambda root, lines: shutil.rmtree(root / "images"), ["24 rows", "train-0.png"]),
    ],
)
def test_broken_data(tmp_path, change, words):
    line = refused("train_student.py", *broken(tmp_path, change), *STUDENT, "--output", tmp_path / "run")
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--text-fields", "caption"], ["'caption'", "'text'"]),
        (["--tasks", "organ", "stage"], ["train.jsonl line 1", "'stage'"]),
        (["--text-model", "nobody/nothing"], ["unknown text model", "bert-tiny-scratch", "hf:"]),
        (
            ["--text-model", "distilbert"],
            ["distilbert-base-uncased", "tokenizer", "hf:FOLDER"],
        ),  # the hub cannot be reached
        (["--text-model", "hf:no-tokenizer"], ["no tokenizer", "vocab.txt"]),
        (["--max-length", "1000"], ["--max-length", "1000"]),
        (["--task-weights", "1"], ["2 are needed", "organ, sign"]),
        (["--init-checkpoint", "x.pth"], ["--init-checkpoint", "image models"]),
    ],
)
def test_bad_flags(tmp_path, data, flags, words):
    from transformers import BertConfig

    BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    ).save_pretrained(tmp_path / "no-tokenizer")
    line = refused("train_student.py", *data, *STUDENT, *flags, "--output", tmp_path / "run", cwd=tmp_path)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_teachers_that_do_not_fit(tmp_path, data, taught, teacher):
    """Other tasks; an image model for images and texts; one that reads texts for images without them."""
    student = [*STUDENT, "--output", tmp_path / "run"]
    one_task = ["--dataset", "image_text", "--data-root", data[3], "--tasks", "organ"]
    line = refused(
        "distill.py", *one_task, *student, "--method", "projection", "--teacher-checkpoint", taught / "best.pth"
    )
    assert "organ: 3" in line and "sign: 2" in line
    line = refused("distill.py", *data, *student, "--teacher-checkpoint", teacher / "best.pth")
    assert "different classes" in line
    line = refused(
        "distill.py",
        "--dataset",
        "digits",
        "--resolution",
        8,
        "--method",
        "rkd",
        "--teacher-checkpoint",
        taught / "best.pth",
        "--output",
        tmp_path / "run",
    )
    assert "images without texts" in line
    line = refused("distill.py", *data, *student, "--teacher-model", "resnet18", "--teacher-weights", "x.pth")
    assert "organ, sign" in line
    line = refused(
        "distill.py", *student, "--batch-size", 1, "--method", "rkd", "--teacher-checkpoint", taught / "best.pth"
    )
    assert "--batch-size" in line and "at least 2" in line
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------- MedPix


def test_medpix(tmp_path):
    """The real files: a teacher and a student of two tokenizers' vocabularies, images and captions, a few steps."""
    unpack("medpix-2-0.tar", tmp_path)
    root = tmp_path / "MedPix-2-0"
    flags = [
        "--resolution",
        32,
        "--decode-size",
        48,
        "--limit-train",
        300,
        "--epochs",
        1,
        "--batch-size",
        32,
        "--device",
        "cpu",
        "--optimizer",
        "adamw",
    ]
    succeed(
        "train_teacher.py",
        "--dataset",
        "medpix",
        "--data-root",
        root,
        *flags,
        "--image-model",
        "resnet8",
        "--text-fields",
        "Caption",
        "History",
        "--output",
        tmp_path / "teacher",
    )
    succeed(
        "distill.py",
        *flags,
        "--image-model",
        "resnet8",
        "--method",
        "rkd",
        "--teacher-checkpoint",
        tmp_path / "teacher/best.pth",
        "--allow-weak-teacher",
        "--output",
        tmp_path / "student",
    )
    found = results(tmp_path / "student")
    assert found["dataset"]["sizes"] == {"train": 300, "val": 197, "test": 200} and found["flags"]["text_fields"] == [
        "Caption",
        "History",
    ]
    assert found["test"]["modality_accuracy"] > 0.5 and found["intervals"]["test"]["location_accuracy"]
