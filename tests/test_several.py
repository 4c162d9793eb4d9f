"""Several teachers: each with flags, outputs, terms and projectors of its own; standardized outputs; --method radio."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, succeed
from test_distributed import two
from test_resume import assert_same_run, stopped

import common.teacher
from common.losses import DistillationLoss, LossError, patch_loss
from common.run import UserError
from common.several import SeveralLosses, Standardizer, equal_variances, flags_of_each, standardize
from common.teacher import TEACHER_FLAGS, TEACHER_KINDS
from distill import build_parser, loss_settings

RANDOM = torch.Generator().manual_seed(0)
DATA = ["--dataset", "digits", "--batch-size", 32, "--limit-train", 160, "--device", "cpu", "--epochs", 3]


def rand(*size):
    return torch.randn(*size, generator=RANDOM)


# ---------------------------------------------------------------------------------------------------------------- loss

B, C = 6, 5
LABELS = torch.tensor([0, 1, 4, -1, 2, 2])


def outputs(width, classes=C):
    out = {"embedding": rand(B, width), "tokens": rand(B, 4, width)}
    return {**out, "logits": 3 * rand(B, classes)} if classes else out


def kl(student, teacher, temperature=4.0):
    """By the formula, in float64."""
    p, q = ((x.double() / temperature).softmax(1) for x in (teacher, student))
    return temperature**2 * (p * (p / q).log()).sum().item() / len(student)


def test_terms_are_averaged_over_the_teachers_that_have_them():
    """Three teachers with shares 1, 2 and 5; the third knows no classes, so that kl has 1 and 2 of 3."""
    weights, shares = {"ce": 0.3, "kl": 0.7, "embedding": 2.0, "cls": 4.0}, [1.0, 2.0, 5.0]
    student, teachers = outputs(8), {"_1": outputs(8), "_2": outputs(12), "_3": outputs(16, None)}
    loss = SeveralLosses(lambda: DistillationLoss(weights), shares)
    loss.build(student, teachers)
    local = rand(2, B, 8)
    total = loss(student, teachers, LABELS, local_crops=local)
    known = LABELS >= 0
    ce = F.cross_entropy(student["logits"].double()[known], LABELS[known]).item()
    expected = 0.3 * ce
    for number, (name, share) in enumerate(zip(teachers, shares)):
        one, guide = loss.teachers[number], teachers[name]
        if number < 2:
            value = kl(student["logits"], guide["logits"])
            assert loss.terms[f"kl_{number + 1}"].item() == pytest.approx(value, rel=1e-5)
            expected += 0.7 * share / 3 * value
        linear = one.projectors["embedding"][0].student
        mapped = (student["embedding"] @ linear.weight.T + linear.bias).double()
        target = guide["embedding"].double()
        value = ((mapped - target) ** 2).mean() + (1 - F.cosine_similarity(mapped, target)).mean()
        assert loss.terms[f"embedding_{number + 1}"].item() == pytest.approx(value.item(), rel=1e-5)
        expected += 2 * share / 8 * value.item()
        linear = one.projectors["cls"][0]
        for rows in (student["embedding"], local):
            mapped = (rows @ linear.weight.T + linear.bias).double()
            expected += 4 * share / 8 * (2 - 2 * F.cosine_similarity(mapped, target, dim=-1)).mean().item()
    assert "kl_3" not in loss.terms and "ce_1" not in loss.terms
    assert loss.terms["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    without = loss(student, teachers, LABELS, local_crops=local, ce=False)
    assert (total - without).item() == pytest.approx(0.3 * ce, rel=1e-4)
    loss.warm_up(1, 4)
    assert loss(student, teachers, LABELS, local_crops=local).item() == pytest.approx(
        0.3 * ce + (expected - 0.3 * ce) / 4, rel=1e-5
    )


def test_probabilities_are_averaged_once():
    student, teachers = outputs(8), {"_1": outputs(8), "_2": outputs(8, None), "_3": outputs(8)}
    loss = SeveralLosses(lambda: DistillationLoss({"ce": 1, "kl": 2, "cls": 0.5}), [1.0, 7.0, 3.0], "probabilities")
    loss.build(student, teachers)
    loss(student, teachers, LABELS)
    first, third = (teachers[name]["logits"].double().softmax(1) for name in ("_1", "_3"))
    value = kl(student["logits"], (0.25 * first + 0.75 * third).log())
    assert loss.terms["kl"].item() == pytest.approx(value, rel=1e-5)
    assert set(loss.terms) == {"ce", "kl", "cls_1", "cls_2", "cls_3"}
    tasks = [{f"logits_{task}": rand(B, n) for task, n in (("organ", 3), ("sign", 2))} for _ in range(3)]
    loss = SeveralLosses(lambda: DistillationLoss({"kl": 1}), [1.0, 1.0], "probabilities")
    teachers = dict(zip(("_1", "_2"), tasks[1:]))
    loss.build(tasks[0], teachers)
    means = {name: (sum(one[name].double().softmax(1) for one in tasks[1:]) / 2).log() for name in tasks[0]}
    value = sum(kl(tasks[0][name], means[name]) for name in means) / 2
    assert loss(tasks[0], teachers).item() == pytest.approx(value, rel=1e-5)


def test_teachers_that_do_not_fit_are_named():
    def build(weights, *teachers, average="terms"):
        loss = SeveralLosses(lambda: DistillationLoss(weights), [1.0] * len(teachers), average)
        loss.build(outputs(8), {f"_{i}": one for i, one in enumerate(teachers, 1)})

    with pytest.raises(LossError, match="no teacher knows the data's classes, which kl compares"):
        build({"ce": 1, "kl": 1}, outputs(8, None), outputs(8, None))
    for average in ("terms", "probabilities"):
        with pytest.raises(LossError, match="teacher 2 has no part in the loss ce=1 kl=1"):
            build({"ce": 1, "kl": 1}, outputs(8), outputs(8, None), average=average)
    with pytest.raises(LossError, match="teacher 2: the teacher gives no tokens, which the term patch compares"):
        build({"patch": 1}, outputs(8), {"embedding": rand(B, 8)})


def test_a_collapse_names_the_teacher():
    loss = SeveralLosses(lambda: DistillationLoss({"embedding": 1}), [1.0, 1.0])
    student, teachers = outputs(8), {"_1": outputs(8), "_2": outputs(8)}
    loss.build(student, teachers)
    loss(student, teachers)
    means = {name: float(value) for name, value in loss.terms.items()}
    assert loss.collapsed(means) is None
    warning = loss.collapsed({**means, "teacher_variance_2": 1e-6})
    assert warning.startswith("teacher 2: the learned projectors collapse")


def test_radio_by_its_formula():
    """1 - cosine of class tokens, and 0.9 (1 - cosine) + 0.1 smooth L1 of patch tokens; smooth L1 by its two cases."""

    student, teacher = outputs(8, None), {name: 2 * value for name, value in outputs(12, None).items()}
    loss = DistillationLoss(*loss_settings("radio"))
    loss.build(student, teacher)
    mapped = {}
    for term, name in (("cls", "embedding"), ("patch", "tokens")):
        linear = loss.projectors[term][0]
        mapped[name] = (student[name] @ linear.weight.T + linear.bias).double()
    cosine = {name: F.cosine_similarity(mapped[name], teacher[name].double(), dim=-1) for name in mapped}
    difference = (mapped["tokens"] - teacher["tokens"].double()).abs()
    assert (difference < 1).any() and (difference > 1).any()
    smooth = torch.where(difference < 1, difference.square() / 2, difference - 0.5).mean()
    spatial = 0.9 * (1 - cosine["tokens"]).mean() + 0.1 * smooth
    assert loss.terms == {} and loss(student, teacher).item() == pytest.approx(
        ((1 - cosine["embedding"]).mean() + spatial).item(), rel=1e-5
    )
    assert loss.terms["patch"].item() == pytest.approx(spatial.item(), rel=1e-5)
    low = patch_loss(student["tokens"].bfloat16(), student["tokens"].bfloat16() + 1, smooth_l1=1.0)
    assert low.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------- standardization


def correlated(count, width):
    """Rows whose variances lie far apart and whose channels depend on each other."""
    mixing = rand(width, width).double() * torch.logspace(-2, 1, width, dtype=torch.float64)
    return rand(count, width).double() @ mixing.T + 5 * rand(width).double()


@pytest.mark.parametrize("width", [1, 2, 7, 12, 48, 64, 96, 130])
def test_a_rotation_gives_each_channel_the_mean_variance(width):
    covariance = torch.atleast_2d(torch.cov(correlated(4 * width + 8, width).T))
    rotation = equal_variances(covariance)
    assert torch.allclose(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    variances = (rotation @ covariance @ rotation.T).diagonal()
    assert torch.allclose(variances, covariance.trace() / width, rtol=1e-9)


def test_of_a_power_of_two_the_principal_axes_have_equal_parts():
    """Each channel is a sum of all principal axes with the same size of weight: Hadamard's matrix behind PCA."""
    covariance = torch.cov(correlated(300, 16).T)
    axes = torch.linalg.eigh(covariance)[1]
    assert torch.allclose((equal_variances(covariance) @ axes).abs(), torch.tensor(0.25, dtype=torch.float64))


@pytest.mark.parametrize("width", [16, 24, 33])
@pytest.mark.parametrize("kind", ["channel", "phi-s"])
def test_standardized_rows(kind, width):
    """Mean 0 and variance 1 in each channel; phi-s keeps angles and the ratios of distances, channel does not."""
    rows = correlated(500, width)
    module = Standardizer(kind, width)
    assert torch.equal(module(rows[:3].float()), rows[:3].float())
    module.add(rows[:200].float()), module.add(rows[200:].float())
    module.fit()
    done = module(rows.float()).double()
    assert torch.allclose(done.mean(0), torch.zeros(width, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(done.var(0, correction=0), torch.ones(width, dtype=torch.float64), rtol=1e-3)
    ratios = torch.pdist(done[:40]) / torch.pdist(rows[:40])
    centred = rows - rows.mean(0)
    cosines = [F.cosine_similarity(x[:40, None], x[None, :40], dim=2) for x in (done, centred)]
    similar = (ratios.max() / ratios.min() - 1 < 1e-3) and torch.allclose(*cosines, atol=1e-3)
    assert similar == (kind == "phi-s")
    tokens = rows[:60].float().unflatten(0, (20, 3))
    assert torch.equal(module(tokens).flatten(0, 1), module(rows[:60].float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(rows.float()).double(), done)


def test_outputs_without_spread_are_refused_and_dead_channels_stay_small():
    module = Standardizer("channel", 3)
    rows = rand(50, 3) * torch.tensor([1.0, 1.0, 0.0]) + 2
    module.add(rows), module.fit()
    assert module(rows).isfinite().all() and module(rows + 1e-6)[:, 2].abs().max() < 0.01
    for kind in ("channel", "phi-s"):
        module = Standardizer(kind, 3)
        module.add(torch.full((9, 3), 0.3))
        with pytest.raises(LossError, match="the same for all images"):
            module.fit()


def test_standardize_a_loss_from_batches():
    """Of each teacher, of the compared outputs, until enough rows were seen; a saved state is taken as it is."""
    batches = [{"_1": outputs(8), "_2": outputs(12)} for _ in range(4)]

    def make():
        return SeveralLosses(lambda: DistillationLoss({"ce": 1, "kl": 1, "cls": 1}), [1.0, 1.0])

    loss = make()
    standardize(loss, "channel", iter(batches), images=3 * B)
    assert [list(one.standardizers) for one in loss.teachers] == [["embedding"], ["embedding"]]
    for number, name in enumerate(("_1", "_2")):
        rows = torch.cat([batch[name]["embedding"] for batch in batches[:3]]).double()
        module = loss.teachers[number].standardizers["embedding"]
        assert torch.allclose(module.mean.double(), rows.mean(0), atol=1e-6)
        assert torch.allclose(module.scale.double(), 1 / rows.std(0, correction=0), rtol=1e-5)
    student = outputs(8)
    loss.build(student, batches[0])
    loss(student, batches[3], LABELS)
    linear, guide = loss.teachers[1].projectors["cls"][0], loss.teachers[1].standardizers["embedding"]
    mapped = student["embedding"] @ linear.weight.T + linear.bias
    target = (batches[3]["_2"]["embedding"] - guide.mean) * guide.scale
    assert loss.terms["cls_2"].item() == pytest.approx((2 - 2 * F.cosine_similarity(mapped, target)).mean().item())
    again = make()
    standardize(again, "channel", iter(batches[3:]), saved=loss.state_dict())
    for one, two_ in zip(loss.teachers, again.teachers):
        assert torch.equal(one.standardizers["embedding"].mean, two_.standardizers["embedding"].mean)
    alone = DistillationLoss({"patch": 1})
    standardize(alone, "phi-s", iter(batch["_2"] for batch in batches))
    assert list(alone.standardizers) == ["tokens"] and alone.standardizers["tokens"].scale.shape == (12, 12)


# --------------------------------------------------------------------------------------------------------------- flags


def each(*words):
    args = build_parser().parse_args(list(map(str, words)))
    flags = {name: getattr(args, name) for name in TEACHER_FLAGS}
    return flags_of_each(flags, TEACHER_KINDS, len(args.student_layer))


def test_one_value_for_all_or_one_for_each():
    words = ["--teacher-embeddings", "s", "--teacher-model", "m", "n", "--teacher-checkpoint", "a"]
    kinds = [next((kind, one[kind]) for kind in TEACHER_KINDS if one[kind]) for one in each(*words)]
    assert kinds == [
        ("teacher_checkpoint", "a"),
        ("teacher_model", "m"),
        ("teacher_model", "n"),
        ("teacher_embeddings", "s"),
    ]
    for values, expected in (([8], [8, 8, 8, None]), ([8, 12, 16], [8, 12, 16, None])):
        assert [one["teacher_resolution"] for one in each(*words, "--teacher-resolution", *values)] == expected
    found = each(*words, "--teacher-pooling", "cls", "mean", "map", "--num-views", 2, "--teacher-weights", "x", "y")
    assert [one["teacher_pooling"] for one in found] == ["cls", "mean", "map", None]
    assert [one["teacher_weights"] for one in found] == [None, "x", "y", None]
    assert [one["num_views"] for one in found] == [None, None, None, 2]
    found = each(*words, "--teacher-pretrained")
    assert [one["teacher_pretrained"] for one in found] == [False, True, True, False]
    layers = ["--student-layer", "p", "q", "--teacher-layer"]
    for names, expected in (("uv", ["uv"] * 3), ("uvwxyz", ["uv", "wx", "yz"])):
        assert ["".join(one["teacher_layer"]) for one in each(*words, *layers, *names)[:3]] == expected
    with pytest.raises(UserError, match="--teacher-resolution 8 12: give one value for all .* there are 3"):
        each(*words, "--teacher-resolution", 8, 12)


def test_one_teacher_is_what_it_was():
    """Its flags are plain values, as config.json has had them."""
    args = build_parser().parse_args(["--teacher-checkpoint", "a.pth", "--teacher-resolution", "12"])
    assert (args.teacher_checkpoint, args.teacher_resolution) == ("a.pth", 12)


# -------------------------------------------------------------------------------------------------------------- scripts


@pytest.fixture(scope="module")
def places(tmp_path_factory, teacher):
    """{name: folder}: a ResNet and a ViT that have learned a little, and stores of both."""
    root = tmp_path_factory.mktemp("several")
    vit = ["--model", "vit_6_192", "--patch-size", 4, "--optimizer", "adamw", "--epochs", 3, "--limit-train", 640]
    succeed("train_teacher.py", *SMALL, *vit, "--output", root / "vit")
    found = {"resnet": teacher, "vit": root / "vit"}
    for name in ("resnet", "vit"):
        found[f"{name} store"] = root / f"{name}_store"
        flags = ["--checkpoint", found[name] / "best.pth", "--num-views", 2, "--save-logits", "--save-tokens"]
        succeed("extract_embeddings.py", *flags, "--device", "cpu", "--output", found[f"{name} store"])
    return found


def probabilities(folder):
    """(N, C) float64 of a run's val images."""
    with np.load(folder / "predictions_val.npz") as stored:
        return torch.from_numpy(stored["logits"]).double().softmax(1).numpy()


def mixed(places):
    """One live and one stored teacher."""
    teachers = ["--teacher-checkpoint", places["resnet"] / "best.pth", "--teacher-embeddings", places["vit store"]]
    return [*DATA, *teachers, "--loss", "ce=1", "kl=1", "embedding=1", "crd=0.1", "--standardize-teachers", "phi-s"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, places):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, succeed("distill.py", *mixed(places), "--teacher-shares", 3, 1, "--output", folder)


def test_a_live_and_a_stored_teacher(whole, places):
    folder, done = whole
    log = done.stdout
    assert "\nteacher 1 resnet8: " in "\n" + log and "\nteacher 2 vit_6_192: " in log and "2 stored views" in log
    row = json.loads((folder / "metrics.json").read_text())[0]
    mean = {term: (3 * row[f"train_{term}_1"] + row[f"train_{term}_2"]) / 4 for term in ("kl", "embedding", "crd")}
    total = row["train_ce"] + mean["kl"] + mean["embedding"] + 0.1 * mean["crd"]
    assert row["train_loss"] == pytest.approx(total, rel=1e-4)
    assert row["train_teacher_variance_1"] == pytest.approx(1, rel=0.3)  # of batches
    results = json.loads((folder / "results.json").read_text())
    about = results["teacher"]
    assert about["name"] == "resnet8 + vit_6_192" and about["shares"] == [0.75, 0.25]
    assert [one["val"]["accuracy"] > 0.2 for one in about["teachers"]] == [True, True]
    assert about["teachers"][0]["checkpoint"] and about["teachers"][1]["embeddings"] == str(places["vit store"])
    assert results["test"]["accuracy"] > 0.3
    student, mean = (
        probabilities(folder),
        sum(share * probabilities(places[name]) for name, share in (("resnet", 0.75), ("vit", 0.25))),
    )
    same = (student.argmax(1) == mean.argmax(1)).mean()
    assert same > 0.3 and results["val"]["agreement"] == pytest.approx(same, abs=0.01)  # float16 is stored
    kl_of_mean = (mean * np.log(mean / student)).sum(1).mean()
    assert results["val"]["teacher_kl"] == pytest.approx(kl_of_mean, rel=0.01)
    loss = torch.load(folder / "best.pth", weights_only=True)["loss"]
    assert [tuple(loss[f"teachers.{i}.standardizers.embedding.scale"].shape) for i in (0, 1)] == [
        (512,) * 2,
        (192,) * 2,
    ]


def test_resumed_bit_for_bit(tmp_path, whole, places, monkeypatch):
    run = tmp_path / "run"
    flags = [*mixed(places), "--teacher-shares", 3, 1, "--output", run]
    stopped("epoch 1/3:", signal.SIGTERM, "distill.py", *flags)

    def never(*args):
        raise AssertionError("a resumed run has its mean and scale")

    monkeypatch.setattr(Standardizer, "fit", never)
    succeed("distill.py", "--resume", run)
    assert_same_run(run, whole[0])


def test_two_processes_take_the_steps_of_one(tmp_path, places):
    """Losses of the first epoch and what standardizes are those of one process, but for rounding and BatchNorm."""
    vit = ["--model", "vit_6_192", "--patch-size", 4, "--method", "radio", "--standardize-teachers", "channel"]
    flags = [*DATA, *vit, "--teacher-checkpoint", places["resnet"] / "best.pth", "--teacher-embeddings"]
    flags = [*flags, places["vit store"], "--epochs", 1]
    succeed("distill.py", *flags, "--output", tmp_path / "one")
    two("distill.py", *flags, "--output", tmp_path / "two")
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text())[0] for name in ("one", "two"))
    names = [name for name in one if name.startswith(("train_", "val_"))]
    assert {"train_cls_1", "train_patch_1", "train_cls_2", "train_patch_2"} < {*names}
    assert [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)
    states = [torch.load(tmp_path / name / "latest.pth", weights_only=True)["loss"] for name in ("one", "two")]
    for name, value in states[0].items():
        if "standardizers" in name:
            assert torch.allclose(value, states[1][name], rtol=1e-4, atol=1e-5), name


def test_two_cost_the_sum_of_two(tmp_path, places, monkeypatch):
    """Each is run as often as alone."""
    calls, make = [], common.teacher.live_teacher

    def counted(model, *args):
        targets = make(model, *args)
        return lambda batch: calls.append(model.name) or targets(batch)

    monkeypatch.setattr(common.teacher, "live_teacher", counted)
    paths = [places[name] / "best.pth" for name in ("resnet", "vit")]
    counts = []
    for number, teachers in enumerate((paths[:1], paths[1:], paths)):
        calls.clear()
        flags = [*SMALL, "--epochs", 1, "--method", "mmd", "--teacher-checkpoint", *teachers]
        succeed("distill.py", *flags, "--output", tmp_path / str(number))
        counts.append({name: calls.count(name) for name in ("resnet8", "vit_6_192")})
    steps = 160 // 32 + 1  # and the dry batch
    assert counts == [
        {"resnet8": steps, "vit_6_192": 0},
        {"resnet8": 0, "vit_6_192": steps},
        {"resnet8": steps, "vit_6_192": steps},
    ]


def test_a_teacher_of_other_classes_teaches_by_its_embeddings(tmp_path, places):
    """It saw medical images of two classes; the average for fidelity is the other one's alone."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("val", 32), ("test", 32)):
        labels = np.arange(count) % 2
        arrays[f"{split}_images"] = rng.integers(0, 80, (count, 8, 8, 3), np.uint8) + np.uint8(90) * labels[
            :, None, None, None
        ].astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None]
    np.savez(tmp_path / "two.npz", **arrays)
    medical = ["--dataset", "medmnist", "--data-root", tmp_path / "two.npz", "--resolution", 8, "--device", "cpu"]
    succeed("train_teacher.py", *medical, "--model", "resnet8", "--epochs", 2, "--output", tmp_path / "other")
    paths = [places["resnet"] / "best.pth", tmp_path / "other" / "best.pth"]
    flags = [*SMALL, "--epochs", 1, "--loss", "ce=1", "kl=1", "embedding=1", "--teacher-checkpoint"]
    done = succeed("distill.py", *flags, *paths, "--output", tmp_path / "run")
    assert "it is not judged" in done.stdout
    row = json.loads((tmp_path / "run" / "metrics.json").read_text())[0]
    assert "train_kl_1" in row and "train_kl_2" not in row and "train_embedding_2" in row
    mean = probabilities(places["resnet"])
    same = (probabilities(tmp_path / "run").argmax(1) == mean.argmax(1)).mean()
    assert row["val_agreement"] == pytest.approx(same, abs=1e-6)


def test_what_does_not_go_together_is_refused(refused, places, tmp_path):
    a, b = (places[name] / "best.pth" for name in ("resnet", "vit"))
    flags = [*SMALL, "--epochs", 1, "--teacher-checkpoint"]
    refused("distill.py", *flags, a, b, "--teacher-shares", 1, words=["--teacher-shares 1: give one for each of the 2"])
    for words in (["--teacher-shares", 1], ["--teacher-average", "probabilities"]):
        refused("distill.py", *flags, a, *words, words=["need several teachers"])
    refused("distill.py", *flags, a, "--teacher-resolution", 8, 12, words=["--teacher-resolution 8 12", "there are 1"])
    refused("distill.py", *flags, a, b, "--num-views", 2, words=["--num-views needs --teacher-embeddings"])
    refused("distill.py", *flags, a, b, "--teacher-pretrained", words=["need --teacher-model"])
    words = ["--teacher-average probabilities: the loss ce=1 mmd=1 has no term on logits"]
    refused("distill.py", *flags, a, b, "--method", "mmd", "--teacher-average", "probabilities", words=words)
    words = ["--standardize-teachers channel: the loss ce=0.5 kl=0.5 has no term on embeddings or tokens"]
    refused("distill.py", *flags, a, "--standardize-teachers", "channel", words=words)
    flags = ["--checkpoint", a, "--num-views", 2, "--seed", 5, "--device", "cpu", "--output", tmp_path / "seed"]
    succeed("extract_embeddings.py", *flags)
    stores = ["--teacher-embeddings", places["vit store"], tmp_path / "seed"]
    refused("distill.py", *DATA, *stores, words=["cannot teach together", "seed: 5, not 0"])
    flags = ["--checkpoint", a, "--num-views", 3, "--save-logits", "--device", "cpu", "--output", tmp_path / "three"]
    succeed("extract_embeddings.py", *flags)
    stores = ["--teacher-embeddings", places["vit store"], tmp_path / "three", "--method", "mmd"]
    refused("distill.py", *DATA, *stores, words=["num_views: 3, not 2", "--num-views K"])
    succeed("distill.py", *DATA, *stores, "--num-views", 2, "--epochs", 1, "--output", tmp_path / "stores")


def test_a_weak_teacher_is_named(refused, places, tmp_path):
    state = torch.load(places["vit"] / "best.pth", weights_only=True)
    state["model"] = {name: torch.zeros_like(value) for name, value in state["model"].items()}
    torch.save(state, tmp_path / "flat.pth")
    teachers = ["--teacher-checkpoint", places["resnet"] / "best.pth", tmp_path / "flat.pth"]
    name = f"the teacher vit_6_192 ({tmp_path / 'flat.pth'}) is no better than chance"
    refused("distill.py", *SMALL, *teachers, words=[name])


def test_two_stores_read_their_own_rows(places, tmp_path, monkeypatch):
    """One is kept in memory and one is read from its files: the same as both kept."""
    teachers = ["--teacher-embeddings", places["resnet store"], places["vit store"], "--method", "mmd", "--epochs", 1]
    succeed("distill.py", *DATA, *teachers, "--output", tmp_path / "kept")
    import common.embeddings

    memory = iter([1e12, 0])
    monkeypatch.setattr(common.embeddings, "free_memory", lambda device: next(memory))
    succeed("distill.py", *DATA, *teachers, "--output", tmp_path / "read")
    one, other = (torch.load(tmp_path / name / "latest.pth", weights_only=True)["model"] for name in ("kept", "read"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_dry_run_and_report_show_each(places, whole, here, tmp_path):
    code, out, errors = here("distill.py", *mixed(places), "--dry-run")
    assert code == 0, errors
    columns = next(line for line in out.splitlines() if "teacher 1" in line and "student" in line)
    assert columns.split() == ["student", "teacher", "1", "teacher", "2", "(stored)"]
    assert str(places["vit store"]) in out and "\nteacher 1 " in out
    code, out, errors = here("report.py", places["resnet"], places["vit"], whole[0], "--output", "report")
    assert code == 0, errors
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (group,) = report["groups"]
    tests = [json.loads((places[name] / "results.json").read_text())["test"]["accuracy"] for name in ("resnet", "vit")]
    assert [one["accuracy"] for one in group["teachers"]] == tests
    page = (tmp_path / "report" / "report.html").read_text()
    assert "resnet8 + vit_6_192 to resnet8" in page
    assert f"resnet8 {100 * tests[0]:.2f} / vit_6_192 {100 * tests[1]:.2f}" in page


def test_k_nearest_neighbours_of_each(places, tmp_path):
    vit = ["--model", "vit_6_192", "--patch-size", 4, "--method", "tokens", "--eval-dataset", "digits", "--epochs", 1]
    paths = [places[name] / "best.pth" for name in ("resnet", "vit")]
    done = succeed("distill.py", *SMALL, *vit, "--teacher-checkpoint", *paths, "--output", tmp_path / "run")
    row = json.loads((tmp_path / "run" / "metrics.json").read_text())[0]
    assert done.stdout.count("k-NN accuracy") == 2 and row["val_teacher_knn_1"] != row["val_teacher_knn_2"]


def test_an_older_store_lacks_the_newer_flags(places, tmp_path):
    """Which were off when it was made: it still teaches beside a newer one."""
    old = tmp_path / "old"
    shutil.copytree(places["vit store"], old)
    for path in old.glob("*/meta.json"):
        meta = json.loads(path.read_text())
        assert meta.pop("hair_removal") is False and meta["policy"].pop("mixup") == 0
        path.write_text(json.dumps(meta))
    teachers = ["--teacher-embeddings", old, places["resnet store"], "--method", "mmd", "--epochs", 1]
    succeed("distill.py", *DATA, *teachers, "--output", tmp_path / "run")
