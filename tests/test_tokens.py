"""Distillation without labels: token losses, several crops, DINOv2 teachers, unlabelled images, k-NN while training."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import run_script, succeed
from PIL import Image
from test_resume import assert_same_run, stopped

from common import losses, unlabeled
from common.augment import Augmenter, Policy
from common.data import DataError, ImageDataset, load_splits
from common.loader import Loader
from common.losses import DistillationLoss, LossError, normalized_mse, resize_grid
from common.models import build_model
from common.run import load_checkpoint
from common.teacher import several_views
from common.training import load_model
from common.unlabeled import listed_images

TOKENS = ["--method", "tokens", "--model", "vit_6_192", "--patch-size", 4, "--device", "cpu", "--batch-size", 32]
RANDOM = torch.Generator().manual_seed(0)


# -------------------------------------------------------------------------------------------------------------- losses


def test_normalized_mse_is_two_minus_two_cosines():
    student, teacher = torch.randn(5, 7, 24, generator=RANDOM) * 9, torch.randn(5, 7, 24, generator=RANDOM)
    expected = (2 - 2 * F.cosine_similarity(student.double(), teacher.double(), dim=2)).mean()
    assert normalized_mse(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    assert normalized_mse(teacher * 3, teacher).item() == pytest.approx(0, abs=1e-9)
    with torch.autocast("cpu", torch.bfloat16):
        low = normalized_mse(student.bfloat16(), teacher.bfloat16())
    assert low.dtype == torch.float32 and low.item() == pytest.approx(expected.item(), rel=0.02)


def test_a_grid_is_resized_as_pillow_does():
    """16 x 16 to 14 x 14 and to 4 x 4 (both antialiased), to 20 x 20 (plain bilinear); row by row."""
    grid = torch.randn(1, 256, 3, generator=RANDOM)
    for side in (14, 4, 20):
        resized = resize_grid(grid, side * side).view(side, side, 3)
        for channel in range(3):
            picture = Image.fromarray(grid[0, :, channel].view(16, 16).numpy())
            expected = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
            assert np.allclose(resized[:, :, channel].numpy(), expected, atol=1e-4), side
    assert resize_grid(grid, 256) is grid
    with pytest.raises(LossError, match="256 .* 12"):
        resize_grid(grid, 12)


def outputs(count, grid, width):
    return {
        "embedding": torch.randn(count, width, generator=RANDOM),
        "tokens": torch.randn(count, grid, width, generator=RANDOM),
    }


def test_token_terms_by_hand():
    student, teacher = outputs(6, 4, 8), outputs(6, 16, 12)
    loss = DistillationLoss({"cls": 0.7, "patch": 0.5})
    loss.build(student, teacher)
    assert [n for n, _ in loss.named_parameters()] == [
        f"projectors.{t}.0.{n}" for t in ("cls", "patch") for n in ("weight", "bias")
    ]
    total = loss(student, teacher, None)
    pooled = teacher["tokens"].view(
        6, 4, 4, 12
    )  # of the resizing only its being linear and symmetric is used: see above
    pooled = (
        F.interpolate(pooled.permute(0, 3, 1, 2), (2, 2), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    )
    expected = {}
    for term, key, target in (("cls", "embedding", teacher["embedding"]), ("patch", "tokens", pooled)):
        projector = loss.projectors[term][0]
        mapped = student[key] @ projector.weight.T + projector.bias
        expected[term] = (2 - 2 * F.cosine_similarity(mapped, target, dim=-1)).mean().item()
        assert loss.terms[term].item() == pytest.approx(expected[term], rel=1e-5)
    assert total.item() == pytest.approx(0.7 * expected["cls"] + 0.5 * expected["patch"], rel=1e-5)


def test_local_crops_meet_every_global_crop_of_their_own_image():
    """Two global and three local crops of four images, rows crop after crop; one image's local crops are moved."""
    student, teacher, local = outputs(8, 4, 5), outputs(8, 4, 5), torch.randn(3, 4, 5, generator=RANDOM)
    loss = DistillationLoss({"cls": 2.0})
    loss.build(student, teacher)
    without = loss(student, teacher, None)
    total = loss(student, teacher, local_crops=local)
    pairs = [(n, g, b) for n in range(3) for g in range(2) for b in range(4)]
    expected = [
        2
        - 2
        * F.cosine_similarity(loss.project("cls", local[n, b], None)[0], teacher["embedding"][4 * g + b], dim=0).item()
        for n, g, b in pairs
    ]
    assert loss.terms["local"].item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert (total - without).item() == pytest.approx(2 * np.mean(expected), rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- crops


def loader_of(count=12, batch_size=4):
    pictures = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return Loader(
        ImageDataset([f"{i}" for i in range(count)], [-1] * count, pictures), batch_size, "cpu", shuffle=True, seed=3
    )


def test_several_views_are_numbered_on_and_on():
    loader, seen = loader_of(), []
    assert (plain := next(loader.batches(1))) is several_views(plain, 1)
    for epoch in (1, 2, 3):
        for raw, batch in zip(loader.batches(epoch), loader.batches(epoch, plan=lambda plan: several_views(plan, 2))):
            assert batch["view"].tolist() == [2 * epoch - 1] * 4 + [2 * epoch] * 4
            for key in ("index", "key", "image", "size"):
                assert torch.equal(batch[key], torch.cat([raw[key], raw[key]])), key
            assert len(batch["targets"]["label"]) == len(batch["batch_targets"]["label"]) == 8
            seen += list(zip(batch["index"].tolist(), batch["view"].tolist()))
    assert len(seen) == len(set(seen)) == 72
    one_by_one = [Augmenter(Policy("resized"), 5)({**raw, "view": torch.full((4,), view)}, 8) for view in (5, 6)]
    assert torch.equal(Augmenter(Policy("resized"), 5)(batch, 8), torch.cat(one_by_one))


def test_local_crops_are_streams_of_the_view():
    from distill import build_parser, local_augmenters

    args = build_parser().parse_args(["--local-crops", "3", "--seed", "4", "--resolution", "16"])
    side, crops = 8, local_augmenters(args, Policy("pad", hflip=0.5))
    batches = [next(loader_of().batches(epoch)) for epoch in (1, 2)]
    made = [crop(batch, side) for batch in batches for crop in crops]
    assert side == 8 and {tuple(m.shape) for m in made} == {(4, 3, 8, 8)}
    made.append(Augmenter(crops[0].policy, 4)(batches[0], side))  # the view's own stream
    assert all(not torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])
    small = {**batches[0], **{k: batches[0][k][1:2] for k in ("key", "view", "size", "image")}}
    small.pop("pixels")
    assert torch.equal(crops[1](small, side), made[1][1:2]), "the same in a batch of one"
    # a crop of 5 to 25 % of the area: a ramp shows by its slope what share of the width is seen, at most sqrt(0.25 * 4
    # / 3)
    ramp = torch.arange(64).mul(4).byte().expand(200, 3, 64, 64)
    keys = torch.arange(200)
    batch = {"image": ramp, "size": torch.full((200, 2), 64), "key": keys, "view": torch.ones(200, dtype=torch.int64)}
    seen = Augmenter(Policy("resized", crop_scale=(0.05, 0.25)), 4, 1)(batch, 8)
    span = (seen[:, 0, 4, -1] - seen[:, 0, 4, 0]) * 255 / 4 / 64 * 8 / 7
    assert 0.18 < span.min() < 0.3 and 0.45 < span.max() < 0.6


# -------------------------------------------------------------------------------------------------------------- DINOv2


@pytest.mark.parametrize(
    "name, timm_name, prefix",
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2", 1),
        ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2", 5),
    ],
)
def test_dinov2_by_the_hub_s_name(name, timm_name, prefix):
    """Class token and grid as timm's own forward gives them, at 196 px: 14 x 14 as a /16 student has at 224."""
    torch.manual_seed(1)
    model = build_model(name, 0, 196).eval()
    model.with_tokens = True
    reference = timm.create_model(timm_name, img_size=196, num_classes=0).eval()
    reference.load_state_dict(model.backbone.state_dict())
    images = torch.randn(1, 3, 196, 196, generator=RANDOM)
    with torch.no_grad():
        out, tokens = model({"image": images}), reference.forward_features(images)
    assert tokens.shape == (1, prefix + 196, 384) and "logits" not in out
    assert torch.allclose(out["embedding"], tokens[:, 0], atol=1e-5) and torch.allclose(
        out["tokens"], tokens[:, prefix:], atol=1e-5
    )
    assert build_model(**model.build_args).backbone.pos_embed.shape == reference.pos_embed.shape


def test_every_hub_name_is_timm_s():
    from common.models import DINOV2

    assert len(DINOV2) == 8 and set(DINOV2.values()) <= set(timm.list_pretrained("*dinov2*"))


def test_a_hugging_face_dinov2_folder_teaches(tmp_path):
    """End to end from a saved Dinov2Model: 28 px and patches of 14 give 2 x 2 tokens, the student has 4 x 4."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28
    )
    torch.manual_seed(0)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "BitImageProcessor",
                "do_normalize": True,
                "image_mean": [0.1, 0.2, 0.3],
                "image_std": [0.4, 0.5, 0.6],
            }
        )
    )
    tree(tmp_path / "images", 40)
    done = succeed(
        "distill.py",
        *TOKENS,
        "--teacher-model",
        f"hf:{tmp_path / 'dinov2'}",
        "--teacher-pretrained",
        "--teacher-resolution",
        28,
        "--dataset",
        "unlabeled",
        "--data-root",
        tmp_path / "images",
        "--resolution",
        16,
        "--epochs",
        2,
        "--batch-size",
        8,
        "--output",
        tmp_path / "run",
    )
    assert "it is not judged" in done.stdout and "28 px" in done.stdout
    saved = load_checkpoint(str(tmp_path / "run" / "best.pth"))
    # val's loss by hand: the teacher's own mean and std, its grid of 2 x 2 enlarged to 4 x 4
    model, preprocess = load_model(saved)
    model.with_tokens = True
    (batch,) = Loader(load_splits("unlabeled", str(tmp_path / "images"), labels=False).val, 2, "cpu").batches()
    augment = Augmenter(Policy(), 0)
    body = transformers.Dinov2Model.from_pretrained(tmp_path / "dinov2").eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    with torch.no_grad():
        out = model({"image": preprocess(augment(batch, 16))})
        hidden = body(pixel_values=(augment(batch, 28) - mean) / std).last_hidden_state
    grid = (
        F.interpolate(hidden[:, 1:].transpose(1, 2).unflatten(2, (2, 2)), (4, 4), mode="bilinear")
        .flatten(2)
        .transpose(1, 2)
    )
    expected = 0
    for term, weight, student, teacher in (
        ("cls", 1, out["embedding"], hidden[:, 0]),
        ("patch", 0.5, out["tokens"], grid),
    ):
        projector = [saved["loss"][f"projectors.{term}.0.{name}"] for name in ("weight", "bias")]
        expected += weight * (2 - 2 * F.cosine_similarity(F.linear(student, *projector), teacher, dim=-1)).mean().item()
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert min(row["val_distillation_loss"] for row in rows) == pytest.approx(expected, rel=1e-4)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (
        results["val"] == {"distillation_loss": pytest.approx(expected, rel=1e-4)}
        and "test" not in results
        and saved["classes"] == []
    )


def test_dinov2_from_timm_end_to_end(tmp_path):
    """vit_small_patch14 with registers from a weight file, cut to 28 px, into a timm ViT with local crops."""
    torch.manual_seed(0)
    weights = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, num_classes=0).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    tree(tmp_path / "images", 24)
    done = succeed(
        "distill.py",
        "--method",
        "tokens",
        "--teacher-model",
        "dinov2_vits14_reg",
        "--teacher-weights",
        tmp_path / "weights.pth",
        "--teacher-resolution",
        28,
        "--model",
        "vit_tiny_patch16_224",
        "--resolution",
        32,
        "--local-crops",
        2,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--dataset",
        "unlabeled",
        "--data-root",
        tmp_path / "images",
        "--output",
        tmp_path / "run",
        "--device",
        "cpu",
    )
    assert "timm" not in done.stderr
    saved = load_checkpoint(str(tmp_path / "run" / "latest.pth"))
    model, _ = load_model(saved)  # rebuilt, it takes the local crops' side too
    assert model({"image": torch.zeros(1, 3, 16, 16)})["embedding"].shape == (1, 192)
    flags = saved["flags"]
    assert (flags["lr"], flags["weight_decay"], flags["optimizer"], flags["save_every"]) == (5e-4, 0.04, "adamw", 10)


# --------------------------------------------------------------------------------------------------- unlabelled images


def tree(folder, count):
    """Unlabelled images of several sizes and depths, beside them what is none."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("a" if i % 3 else "b/c") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (12 + i % 5, 16, 3), np.uint8)).save(path)
    (folder / ".hidden.png").write_text("x")
    (folder / "notes.txt").write_text("x")
    return folder


def test_unlabelled_images(tmp_path):
    tree(tmp_path, 40)
    splits = load_splits("unlabeled", str(tmp_path), labels=False)
    assert len(splits.train) == 38 and len(splits.val) == 2 and splits.test is None and splits.classes == []
    assert set(splits.train.labels) == {-1} and {"a/001.png", "b/c/000.png"} < {*splits.train.ids, *splits.val.ids}
    assert splits.describe()["sizes"] == {"train": 38, "val": 2}
    with pytest.raises(DataError, match="no labels"):
        load_splits("unlabeled", str(tmp_path))
    (tmp_path / "a" / "broken.jpg").write_bytes(b"no image")
    good = load_splits("unlabeled", str(tmp_path), labels=False, on_bad_image="skip")
    assert len(good.train) + len(good.val) == 40


def test_the_list_of_files_is_kept_while_no_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, walks, walk = tree(tmp_path / "images", 9), [], unlabeled.images_below
    monkeypatch.setattr(unlabeled, "images_below", lambda *args: walks.append(1) or walk(*args))
    first = listed_images(str(folder))
    assert len(first) == 9 and not (tmp_path / "cache").exists(), "just written: a file may follow within the same tick"
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (1e9, 1e9))
    assert listed_images(str(folder)) == first and len(walks) == 2
    assert listed_images(str(folder)) == first and len(walks) == 2, "from the list"
    (folder / "b" / "c" / "new.png").write_bytes(b"")
    again = listed_images(str(folder))
    assert len(walks) == 3 and sorted([*first, str(folder / "b" / "c" / "new.png")]) == sorted(again)
    (tmp_path / "cache" / "distillation").joinpath(os.path.basename(unlabeled.list_cache(str(folder)))).write_text(
        "no JSON"
    )
    os.utime(folder / "b" / "c", (1e9, 1e9))
    assert listed_images(str(folder)) == again and len(walks) == 4


def test_a_hugging_face_dataset_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((6, 9, 3), 5 * i, np.uint8)) for i in range(30)]
    rows = datasets.Dataset.from_dict(
        {"label": list(range(30)), "picture": pictures},
        datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()}),
    )
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    rows.remove_columns("picture").save_to_disk(tmp_path / "no_images")
    splits = load_splits("unlabeled", labels=False, hf_dataset=str(tmp_path / "saved"))
    assert len(splits.train) + len(splits.val) == 30
    for part in (splits.train, splits.val):
        for i, name in enumerate(part.ids):
            assert part.read(i).shape == (6, 9, 3) and (part.read(i) == 5 * int(name.split("/")[1])).all()
    with pytest.raises(DataError, match="no column of images"):
        load_splits("unlabeled", labels=False, hf_dataset=str(tmp_path / "no_images"))
    with pytest.raises(DataError, match="save_to_disk"):
        load_splits("unlabeled", labels=False, hf_dataset=str(tmp_path / "absent" / "set"))
    teacher_of(tmp_path)
    succeed(
        "distill.py",
        *TOKENS,
        "--teacher-checkpoint",
        tmp_path / "teacher.pth",
        "--hf-dataset",
        tmp_path / "saved",
        "--resolution",
        8,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--cache",
        "off",
        "--workers",
        1,
        "--output",
        tmp_path / "run",
    )


# ------------------------------------------------------------------------------------------------------------- scripts


def teacher_of(folder, epochs=1):
    """A small ViT's checkpoint, hardly trained."""
    succeed(
        "train_teacher.py",
        "--model",
        "vit_6_192",
        "--patch-size",
        4,
        "--epochs",
        epochs,
        "--optimizer",
        "adamw",
        "--output",
        folder / "teacher_run",
        "--device",
        "cpu",
        "--batch-size",
        32,
        "--limit-train",
        320,
    )
    os.replace(folder / "teacher_run" / "best.pth", folder / "teacher.pth")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """(folder with teacher.pth and run/) of a run without labels, with two global and two local crops."""
    folder = tmp_path_factory.mktemp("tokens")
    teacher_of(folder, 6)
    flags = [
        *TOKENS,
        "--teacher-checkpoint",
        folder / "teacher.pth",
        "--epochs",
        3,
        "--global-crops",
        2,
        "--local-crops",
        2,
        "--ema",
        0.9,
        "--eval-dataset",
        "digits",
        "--eval-every",
        2,
        "--limit-train",
        160,
        "--rotation",
        10,
    ]
    succeed("distill.py", *flags, "--output", folder / "run")
    return folder, flags


def test_a_run_without_labels(taught, tmp_path):
    folder, _ = taught
    rows, results = (json.loads((folder / "run" / name).read_text()) for name in ("metrics.json", "results.json"))
    assert set(results["val"]) == set(results["test"]) == {"distillation_loss"} and results["intervals"] == {}
    assert {"train_cls", "train_patch", "train_local", "train_loss"} <= set(rows[0]) and not {
        "train_ce",
        "train_accuracy",
        "val_accuracy",
    } & set(rows[0])
    for row in rows:
        assert row["train_loss"] == pytest.approx(
            row["train_cls"] + row["train_local"] + 0.5 * row["train_patch"], rel=1e-4
        )
    assert [row["val_knn"] is None for row in rows] == [True, False, False], "every second epoch and the last"
    assert rows[-1]["val_distillation_loss"] < rows[0]["val_distillation_loss"]
    # k-NN while training is evaluate.py's
    for path, value in (
        (folder / "run" / "latest.pth", rows[-1]["val_knn"]),
        (folder / "teacher.pth", rows[-1]["val_teacher_knn"]),
    ):
        succeed("evaluate.py", path, "--knn", "--split", "val", "--output", tmp_path / "val")
        judged = json.loads((tmp_path / "val" / "evaluation.json").read_text())["student"]
        assert judged["knn"]["20"]["accuracy"] == pytest.approx(value, abs=1e-9)


def test_the_best_epoch_is_judged_with_its_own_projectors(taught, tmp_path):
    """One more epoch than the best, which is made unbeatable: results.json repeats the row of the best one."""
    run = tmp_path / "run"
    shutil.copytree(taught[0] / "run", run)
    checkpoint = load_checkpoint(str(run / "latest.pth"))
    torch.save({**checkpoint, "best": -1.0}, run / "latest.pth")
    succeed("distill.py", "--resume", run, "--epochs", 4)
    rows, results = (json.loads((run / name).read_text()) for name in ("metrics.json", "results.json"))
    assert (results["best_epoch"], results["last_epoch"]) == (3, 4)
    for key, row in (("val", rows[2]), ("final_val", rows[3])):
        assert results[key]["distillation_loss"] == pytest.approx(row["val_distillation_loss"], rel=1e-6), key


def test_knn_on_data_of_other_classes(taught, tmp_path):
    """A teacher of ten digits beside a student without labels, on two classes of pictures: embeddings need no head."""
    for split, count in (("train", 12), ("test", 4)):
        for label, shade in (("dark", 20), ("light", 220)):
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8, 3), shade + i, np.uint8)).save(
                    tmp_path / "pictures" / split / label / f"{i}.png"
                )
    flags = ["--dataset", "imagefolder", "--data-root", tmp_path / "pictures", "--output", tmp_path / "judged"]
    succeed(
        "evaluate.py",
        taught[0] / "run" / "best.pth",
        "--teacher-checkpoint",
        taught[0] / "teacher.pth",
        "--knn",
        *flags,
    )
    judged = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    for who in ("student", "teacher"):
        assert judged[who]["knn"]["10"]["accuracy"] == 1 and "accuracy" not in judged[who]
    succeed("evaluate.py", taught[0] / "teacher.pth", "--knn", *flags)
    done = run_script("evaluate.py", taught[0] / "teacher.pth", *flags)
    assert done.returncode == 2 and "dark, light" in done.stderr


def test_what_follows_a_run_without_labels(taught, tmp_path):
    """evaluate.py judges it by k-NN and probe beside its teacher, train_student.py fine-tunes it."""
    folder, _ = taught
    done = succeed(
        "evaluate.py",
        folder / "run" / "best.pth",
        "--teacher-checkpoint",
        folder / "teacher.pth",
        "--knn",
        "--linear-probe",
        "--output",
        tmp_path / "both",
    )
    judged = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert (
        "accuracy" not in judged["student"]
        and judged["student"]["linear_probe"]["accuracy"] > 0.5
        and "kept knn_20" in done.stdout
    )
    done = run_script("evaluate.py", folder / "run" / "best.pth")
    assert done.returncode == 2 and "--knn" in done.stderr
    small = ["--model", "vit_6_192", "--patch-size", 4, "--epochs", 1, "--limit-train", 64, "--device", "cpu"]
    again = [*small, "--output", tmp_path / "again"]
    start = folder / "run" / "best.pth"
    done = succeed("train_student.py", "--init-checkpoint", start, *small, "--output", tmp_path / "tuned")
    assert "new head" in done.stdout
    succeed("train_student.py", "--init-checkpoint", tmp_path / "tuned" / "best.pth", *again)
    before = load_checkpoint(str(start))
    for name, method in (("tuned", "tokens, fine-tuned"), ("again", "tokens, fine-tuned, fine-tuned")):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert (results["role"], results["method"]) == ("student", method)
        assert results["teacher"]["sha256"] == before["teacher"]["sha256"], name
    done = run_script(
        "extract_embeddings.py",
        "--checkpoint",
        folder / "run" / "best.pth",
        "--save-logits",
        "--output",
        tmp_path / "store",
    )
    assert done.returncode == 2 and "--save-logits" in done.stderr
    done = run_script(
        "extract_embeddings.py",
        "--checkpoint",
        folder / "teacher.pth",
        "--save-logits",
        "--dataset",
        "unlabeled",
        "--data-root",
        tree(tmp_path / "images", 40),
        "--output",
        tmp_path / "store",
    )
    assert done.returncode == 2 and "--save-logits" in done.stderr


def test_stopped_in_the_middle_of_an_epoch(taught, tmp_path):
    folder, flags = taught
    run = tmp_path / "run"
    stopped("epoch 1/3:", signal.SIGTERM, "distill.py", *flags, "--output", run)
    succeed("distill.py", "--resume", run)
    assert_same_run(run, folder / "run")


def test_from_stored_tokens(taught, tmp_path):
    """The same student, taught by stored plain views or by the live teacher on plain images: equal but for float16."""
    folder, _ = taught
    data = ["--limit-train", 256, "--epochs", 1]
    succeed(
        "extract_embeddings.py",
        "--checkpoint",
        folder / "teacher.pth",
        "--save-tokens",
        "--augment",
        "none",
        "--output",
        tmp_path / "store",
    )
    succeed("distill.py", *TOKENS, *data, "--teacher-embeddings", tmp_path / "store", "--output", tmp_path / "stored")
    succeed(
        "distill.py",
        *TOKENS,
        *data,
        "--teacher-checkpoint",
        folder / "teacher.pth",
        "--augment",
        "none",
        "--output",
        tmp_path / "live",
    )
    stored, live = (json.loads((tmp_path / name / "metrics.json").read_text())[0] for name in ("stored", "live"))
    for name in ("train_cls", "train_patch", "val_distillation_loss"):
        assert stored[name] == pytest.approx(live[name], rel=2e-3), name


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dataset", "unlabeled", "--data-root", "empty"], ["empty", "no images"]),
        (["--dataset", "unlabeled", "--data-root", "broken"], ["broken/", "--on-bad-image"]),
        (["--dataset", "unlabeled", "--data-root", "broken", "--on-bad-image", "skip"], ["all 30 images are broken"]),
        (["--dataset", "unlabeled", "--data-root", "absent"], ["absent", "not a folder"]),
        (["--dataset", "unlabeled", "--method", "response"], ["no labels"]),
        (["--local-crops", 2, "--loss", "patch=1"], ["--local-crops", "cls", "patch=1"]),
        (["--local-crops", 2, "--local-resolution", 6], ["patch", "6"]),
        (["--local-crops", 2, "--local-crop-scale", 0.5, 0.2], ["0.5", "0.2"]),
        (["--class-weights", "balanced"], ["--class-weights", "labels"]),
        (["--select-metric", "accuracy"], ["--select-metric", "distillation_loss"]),
        (["--eval-dataset", "imagefolder"], ["--data-root"]),
        (["--hf-dataset", "x", "--dataset", "digits"], ["--hf-dataset", "unlabeled"]),
        (["--hf-dataset", "x", "--data-root", "y"], ["--hf-dataset", "--data-root"]),
        (["--local-resolution", 4], ["--local-crops"]),
        (["--model", "resnet8", "--pooling", "cls"], ["resnet8", "class token"]),
    ],
)
def test_bad_flags(taught, tmp_path, flags, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(30):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no image")
    args = [*TOKENS, "--teacher-checkpoint", taught[0] / "teacher.pth", "--resolution", 8, *flags]
    if "--model" in flags or "--method" in flags:  # the last one counts
        args = [
            word
            for i, word in enumerate(args)
            if word != "--patch-size" and args[max(0, i - 1)] != "--patch-size" or word == "vit"
        ]
    done = run_script("distill.py", *args, "--output", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and all(str(word) in done.stderr for word in words), (
        done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_a_teacher_at_chance_level_by_knn(taught, tmp_path):
    """Constant features: every image is as near as any other."""
    checkpoint = load_checkpoint(str(taught[0] / "teacher.pth"))
    checkpoint["model"]["backbone.norm.weight"].zero_()
    checkpoint["classes"] = [f"other {i}" for i in range(10)]  # so that its head is not asked
    torch.save(checkpoint, tmp_path / "flat.pth")
    args = [
        *TOKENS,
        "--teacher-checkpoint",
        tmp_path / "flat.pth",
        "--dataset",
        "digits",
        "--eval-dataset",
        "digits",
        "--output",
        tmp_path / "run",
    ]
    done = run_script("distill.py", *args)
    assert done.returncode == 2 and "by k-NN no better than chance" in done.stderr
    done = run_script("distill.py", *args, "--allow-weak-teacher", "--epochs", 1, "--limit-train", 64)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------- teachers of today, CNN students


@pytest.mark.parametrize(
    "name, side, prefix",
    [
        ("vit_tiny_patch16_dinov3_qkvb", 64, 5),
        ("vit_pe_spatial_tiny_patch16_512", 64, 1),
        ("vit_small_patch14_reg4_dinov2", 56, 5),
    ],
)
def test_prefix_tokens_are_no_patches(name, side, prefix):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = build_model(name, 0, side).eval()
    model.with_tokens = True
    assert model.backbone.num_prefix_tokens == prefix
    with torch.no_grad():
        out = model({"image": torch.rand(2, 3, side, side)})
        every = model.backbone.forward_features(torch.rand(2, 3, side, side))
    assert out["tokens"].shape == (2, 16, every.shape[2]) and every.shape[1] == 16 + prefix


def test_a_cnn_learns_a_vit_s_tokens(here, tmp_path):
    """Its feature map is the grid, its embedding the class token; of another grid and width."""
    teacher = build_model("vit_6_192", 0, 16)
    torch.save(teacher.backbone.state_dict(), tmp_path / "teacher.pth")
    flags = ["--teacher-model", "vit_6_192", "--teacher-weights", "teacher.pth", "--teacher-resolution", 16]
    flags += ["--dataset", "digits", "--resolution", 16, "--model", "resnet8", "--limit-train", 64, "--batch-size", 16]
    code, log, errors = here(
        "distill.py", "--method", "tokens", *flags, "--epochs", 3, "--device", "cpu", "--output", "run"
    )
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert code == 0, errors
    assert rows[-1]["val_distillation_loss"] < rows[0]["val_distillation_loss"], "it learns something"
    assert all(rows[-1][f"train_{term}"] < rows[0][f"train_{term}"] for term in ("cls", "patch"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_patch_relations_by_hand(dtype):
    """Softmax over the other tokens of an image, KL(teacher || student), the mean over all tokens."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(3, 9, width, generator=generator).to(dtype) for width in (6, 4))
    total = 0.0
    for s, t in zip(student.double(), teacher.double()):
        for i in range(9):
            others = [j for j in range(9) if j != i]
            p, q = (
                torch.softmax(torch.stack([F.cosine_similarity(x[i], x[j], 0) / 0.2 for j in others]), 0)
                for x in (t, s)
            )
            total += (p * (p / q).log()).sum()
    value = losses.patch_relations(student, teacher, temperature=0.2)
    assert value.item() == pytest.approx(total.item() / 27, rel=1e-9 if dtype == torch.float64 else 2e-3)
    assert losses.patch_relations(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    larger = torch.randn(3, 16, 4, generator=generator).to(dtype)
    assert losses.patch_relations(student, larger).isfinite()  # the teacher's grid is resized
    with pytest.raises(LossError, match="there is one"):
        losses.patch_relations(student[:, :1], teacher[:, :1])


def test_patch_relations_have_gradients():
    student = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: losses.patch_relations(s, teacher), student)
