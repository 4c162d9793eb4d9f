"""Rare classes and runs without labels: balanced sampling, frozen backbones, dropout, feature matching, the loss on
val."""

import importlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, run_script, succeed

from common import cli, run
from common.augment import Augmenter, Policy
from common.data import DataError, ImageDataset, load_splits
from common.loader import REPEAT_STRIDE, Loader, repeats
from common.losses import DistillationLoss
from common.models import build_model
from common.run import load_checkpoint
from common.training import load_model
from distill import loss_settings

LABELS = [0] * 40 + [1] * 7 + [2] * 3


def loader_of(labels=LABELS, batch_size=10, **options):
    images = np.arange(len(labels) * 48, dtype=np.uint32).astype(np.uint8).reshape(-1, 4, 4, 3)
    dataset = ImageDataset([f"{i:03d}" for i in range(len(labels))], labels, images)
    return Loader(dataset, batch_size, "cpu", shuffle=True, **{"seed": 5, "balanced": 3, **options})


# ------------------------------------------------------------------------------------------------------------ sampling


def test_balanced_sampling_takes_each_class_equally_often():
    loader = loader_of()
    orders = [loader.order(epoch).flatten() for epoch in (1, 2)]
    for order in orders:
        labels = torch.tensor(LABELS)[order]
        assert torch.bincount(labels).tolist() == [16, 17, 17]  # of 50
        rare = torch.bincount(order, minlength=50)[40:47]
        assert rare.sum() == 17 and set(rare.tolist()) == {2, 3}, "all of a class before one of it comes again"
        assert torch.bincount(order)[:40].max() == 1
    assert not torch.equal(*orders), "each epoch in its own order"
    assert torch.equal(orders[0], loader_of().order(1).flatten()), "fixed by seed and epoch"
    assert not torch.equal(orders[0], loader_of(seed=6).order(1).flatten())


def test_an_image_that_comes_again_is_seen_differently():
    seen = [(int(i), int(v)) for batch in loader_of().batches(4) for i, v in zip(batch["index"], batch["view"])]
    assert len(seen) == len(set(seen)) == 50
    assert {v for _, v in seen} == {4 + n * REPEAT_STRIDE for n in range(6)}  # 17 of class 2 are six rounds of three
    for views in range(2, 20):  # stored views differ too, but where there are fewer of them than repeats
        assert len({(4 + n * REPEAT_STRIDE) % views for n in range(min(6, views))}) == min(6, views)
    epochs = [{int(v) for batch in loader_of().batches(e) for v in batch["view"]} for e in range(1, 40)]
    assert sum(map(len, epochs)) == len(set.union(*epochs)), "no epoch sees another one's view"


def test_repeats_by_hand():
    assert repeats(torch.tensor([7, 2, 7, 7, 0, 2])).tolist() == [0, 0, 1, 2, 0, 1]


def test_balanced_batches_begin_anywhere_and_split():
    def flat(batches):
        return [(b["index"].tolist(), b["view"].tolist()) for b in batches]

    whole = flat(loader_of().batches(3))
    assert flat(loader_of().batches(3, start=2)) == whole[2:]
    parts = flat(loader_of(accumulate=2).batches(3))
    assert [x for index, _ in parts for x in index] == [x for index, _ in whole for x in index]
    assert [x for _, views in parts for x in views] == [x for _, views in whole for x in views]


def test_balanced_sampling_of_an_empty_class(tmp_path):
    with pytest.raises(DataError, match="--sampler balanced: class number 3 has no image in train"):
        loader_of(balanced=4).order(1)
    flags = [*SMALL, "--limit-train", 5, "--batch-size", 5, "--sampler", "balanced", "--output", tmp_path / "run"]
    done = run_script("train_student.py", *flags)
    assert done.returncode == 2 and "has no image in train" in done.stderr and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )


def test_balanced_sampling_counts_the_classes_of_one_task():
    assert cli.balanced_classes("balanced", {"organ": ["liver", "lung", "skin"]}) == 3
    with pytest.raises(run.UserError, match="--sampler balanced is for one task, here are organ, side"):
        cli.balanced_classes("balanced", {"organ": ["liver", "lung", "skin"], "side": ["left", "right"]})
    assert cli.balanced_classes("shuffle", {"organ": ["liver", "lung"], "side": ["left", "right"]}) == 0


class Stop(Exception):
    pass


@pytest.mark.parametrize("script", ["train_student", "train_teacher", "distill"])
def test_smoothing_and_class_weights_reach_the_cross_entropy(script, tmp_path, request, monkeypatch):
    """The flag's smoothing, and the weights of train's own class counts, in the first step."""
    taken = []

    def stop(logits, labels, weight=None, label_smoothing=0.0, **_):
        taken.append((weight, label_smoothing))
        raise Stop

    module = importlib.import_module(script)
    flags = [
        *SMALL,
        "--epochs",
        1,
        "--class-weights",
        "balanced",
        "--label-smoothing",
        0.3,
        "--output",
        tmp_path / "run",
    ]
    if script == "distill":
        flags += ["--teacher-checkpoint", request.getfixturevalue("teacher") / "best.pth"]
    monkeypatch.setattr(F, "cross_entropy", stop)
    with pytest.raises(Stop):
        module.main(module.build_parser().parse_args([*map(str, flags)]))
    splits = load_splits("digits", limit_train=160)
    counts = {
        name: np.bincount(labels, minlength=10)
        for name, labels in (("train", splits.train.labels), ("val", splits.val.labels))
    }
    balanced = {name: torch.tensor(n.sum() / (10 * n)).float() for name, n in counts.items()}
    assert (balanced["train"] - balanced["val"]).abs().max() > 0.005
    ((weight, smoothing),) = taken
    assert smoothing == 0.3 and torch.allclose(weight, balanced["train"], rtol=1e-5)


# -------------------------------------------------------------------------------------------- frozen backbones, dropout


@pytest.mark.parametrize(
    "name",
    ["resnet8", "vit_6_192", "timm:resnet10t", "timm:vit_tiny_patch16_224", "timm:deit_tiny_distilled_patch16_224"],
)
def test_a_frozen_backbone(name):
    torch.manual_seed(0)
    model = build_model(name, 3, 32)
    model.freeze_backbone()
    model.train()
    heads = {id(p) for layer in model.classifiers for p in layer.parameters()}
    assert heads and {id(p) for p in model.parameters() if p.requires_grad} == heads
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        F.cross_entropy(model({"image": torch.randn(4, 3, 32, 32)})["logits"], torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    changed = {
        k for k, v in model.state_dict().items() if not torch.equal(v, before[k])
    }  # BatchNorm's statistics neither
    assert changed == {k for k, p in model.named_parameters() if id(p) in heads}


@pytest.mark.parametrize("name", ["resnet8", "vit_6_192", "timm:resnet10t", "timm:swin_tiny_patch4_window7_224"])
def test_dropout_is_of_the_head_s_input(name):
    torch.manual_seed(0)
    model = build_model(name, 3, 32)
    images = {"image": torch.randn(4, 3, 32, 32)}
    plain = model.eval()(images)
    model.set_dropout(0.4)
    assert torch.equal(model.eval()(images)["logits"], plain["logits"])
    (head,) = model.classifiers
    head.train()
    torch.manual_seed(1)
    out = model(images)
    assert torch.equal(out["embedding"], plain["embedding"])
    torch.manual_seed(1)
    expected = F.linear(F.dropout(plain["embedding"], 0.4), head.weight, head.bias)
    torch.testing.assert_close(out["logits"], expected)


def test_frozen_training_by_script(tmp_path, teacher):
    flags = [*SMALL, "--epochs", 1, "--output", tmp_path / "run", "--freeze-backbone"]
    done = run_script("train_student.py", *flags)
    assert done.returncode == 2 and "--freeze-backbone needs" in done.stderr
    succeed(
        "train_student.py", *flags, "--init-checkpoint", teacher / "best.pth", "--dropout", 0.2, "--sampler", "balanced"
    )
    before, after = (load_checkpoint(str(folder / "best.pth"))["model"] for folder in (teacher, tmp_path / "run"))
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"backbone.fc.weight", "backbone.fc.bias"}
    accuracy = json.loads((tmp_path / "run" / "results.json").read_text())["test"]["accuracy"]
    assert accuracy > 0.3, "the features are the teacher's"


def test_the_student_s_pooling_is_kept(tmp_path, teacher):
    flags = [
        *SMALL,
        "--epochs",
        1,
        "--limit-train",
        64,
        "--model",
        "vit_6_192",
        "--teacher-checkpoint",
        teacher / "best.pth",
    ]
    succeed("distill.py", *flags, "--method", "embedding", "--pooling", "mean", "--output", tmp_path / "run")
    model, _ = load_model(load_checkpoint(str(tmp_path / "run" / "best.pth")))
    assert model.pooling == "mean"
    images = torch.randn(2, 3, 8, 8)
    hidden = model.backbone.forward_features(images)
    torch.testing.assert_close(model({"image": images})["embedding"], hidden[:, 1:].mean(1))


# ------------------------------------------------------------------------------------------------------------- the loss


def test_feature_matching_by_hand():
    weights, _ = loss_settings("feature_matching", alpha=0.3)
    assert weights == {"ce": 0.7, "feature": 0.3}
    torch.manual_seed(0)
    student = {"logits": torch.randn(4, 3), "features": {"a": torch.randn(4, 5, 6, 6), "b": torch.randn(4, 7, 2, 2)}}
    teacher = {"logits": torch.randn(4, 3), "features": {"x": torch.randn(4, 6, 3, 3), "y": torch.randn(4, 8, 4, 4)}}
    loss, labels = DistillationLoss(weights), torch.tensor([0, 1, 2, 1])
    loss.build(student, teacher)
    pairs = []
    for projector, s, t in zip(loss.projectors["feature"], student["features"].values(), teacher["features"].values()):
        w, b = projector.weight[:, :, 0, 0], projector.bias
        projected = torch.einsum("oc,nchw->nohw", w, s) + b[:, None, None]
        side = min(s.shape[-1], t.shape[-1])
        small = [v.unflatten(2, (side, -1)).unflatten(4, (side, -1)).mean((3, 5)) for v in (projected, t)]
        pairs.append((small[0] - small[1]).square().mean())
    expected = 0.7 * F.cross_entropy(student["logits"], labels) + 0.3 * sum(pairs) / 2
    torch.testing.assert_close(loss(student, teacher, labels), expected)
    torch.testing.assert_close(loss(student, teacher, None), 0.3 * sum(pairs) / 2)


def test_a_collapse_is_seen():
    torch.manual_seed(0)
    student, teacher = ({"logits": torch.zeros(64, 2), "embedding": torch.randn(64, d)} for d in (6, 8))
    loss = DistillationLoss({"embedding": 1.0}, {"embedding.teacher_projector": "learned", "embedding.shared_dim": 4})
    loss.build(student, teacher)
    projectors = loss.projectors["embedding"][0]
    w = projectors.teacher.weight
    assert projectors.first_variance == pytest.approx(
        (teacher["embedding"] @ w.T).var(0, correction=0).mean().item(), rel=1e-4
    )
    loss(student, teacher, None)
    assert loss.collapsed(loss.terms) is None
    with torch.no_grad():
        w *= 0.05  # 1/400 of the variance
    loss(student, teacher, None)
    assert "collapse" in loss.collapsed(loss.terms)
    fixed = DistillationLoss({"embedding": 1.0})
    fixed.build(student, teacher)
    with torch.no_grad():
        fixed.projectors["embedding"][0].student.weight *= 0.01
    fixed(student, teacher, None)
    assert "hardly differs" in fixed.collapsed(fixed.terms)
    assert DistillationLoss({"ce": 1.0}).collapsed({}) is None


def test_a_run_without_labels_is_judged_by_its_loss_on_val(tmp_path, teacher):
    """The best epoch has the least mean loss on plain val images; the last batch of 270 is short."""
    options = ["--loss-options", "embedding.lambda_cos=2", "embedding.lambda_feat=0.5"]
    flags = [*SMALL, "--epochs", 3, "--loss", "embedding=1", *options]
    succeed("distill.py", *flags, "--teacher-checkpoint", teacher / "best.pth", "--output", tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())
    losses = [row["val_distillation_loss"] for row in rows]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["select_metric"] == "distillation_loss" and results["best_epoch"] == 1 + int(np.argmin(losses))
    assert results["flags"]["optimizer"] == "sgd" and "train_ce" not in rows[0]
    saved = load_checkpoint(str(tmp_path / "run" / "best.pth"))
    dataset, said = load_splits("digits").val, []
    for checkpoint in (saved, load_checkpoint(str(teacher / "best.pth"))):
        model, preprocess = load_model(checkpoint)
        (batch,) = Loader(dataset, 270, "cpu").batches()
        said.append(model({"image": preprocess(Augmenter(Policy(), 0)(batch, 8))})["embedding"])
    s = F.linear(
        said[0],
        saved["loss"]["projectors.embedding.0.student.weight"],
        saved["loss"]["projectors.embedding.0.student.bias"],
    )
    expected = 0.5 * (said[1] - s).square().mean() + 2 * (1 - F.cosine_similarity(s, said[1])).mean()
    assert min(losses) == pytest.approx(expected.item(), rel=1e-4)


def test_the_method_s_optimizer():
    import distill

    def settled(*argv):
        args = distill.build_parser().parse_args(argv)
        weights, _, labelled = distill.check_loss(args)
        args = distill.settle_flags(args, weights, labelled)
        return args.optimizer, args.select_metric

    assert (
        settled() == settled("--method", "embedding") == ("sgd", "accuracy")
    )  # the student's own, or a gain may be the optimizer's
    assert settled("--loss", "embedding=1") == ("sgd", "distillation_loss")
    assert settled("--method", "tokens") == ("adamw", "distillation_loss")
    with pytest.raises(run.UserError, match="the loss embedding=1 has neither ce"):
        settled("--loss", "embedding=1", "--select-metric", "auc")
