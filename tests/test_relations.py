"""Losses that compare the images of a batch and those of several tasks or sides, against loops in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.losses import (
    TERMS,
    DistillationLoss,
    LossError,
    contrastive,
    embedding_mse,
    log_sum_distance,
    mmd,
    pairwise_distances,
    probabilistic_transfer,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
    task_logits,
    task_mean,
)
from common.training import task_accuracy, task_class_weights, task_cross_entropy
from distill import build_parser, check_loss, loss_settings, make_loss

LOSSES = {
    "crd": contrastive,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "mmd": mmd,
    "pkt": probabilistic_transfer,
    "sp": similarity_preserving,
    "srd": log_sum_distance,
}
NAMES = list(LOSSES)
B, D = 6, 5


def rand(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def with_gradient(loss, student, teacher):
    """(value, gradient with respect to the student's rows) of a loss."""
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher)
    if value.requires_grad:
        value.backward()
    return value.detach(), torch.zeros_like(student) if student.grad is None else student.grad


# --------------------------------------------- formulas: loops over single numbers (0-d tensors, for autograd)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def difference(a, b):
    return [x - y for x, y in zip(a, b)]


def equal(a, b):
    return all(x.item() == y.item() for x, y in zip(a, b))


def distance(a, b):
    return 0.0 if equal(a, b) else dot(difference(a, b), difference(a, b)) ** 0.5


def huber(a, b):
    error = abs(a - b)
    return 0.5 * error**2 if error <= 1 else error - 0.5


def rkd_distance_by_hand(student, teacher):
    relations = []
    for rows in (list(student), list(teacher)):
        table = [[distance(a, b) for b in rows] for a in rows]
        mean = sum(d for row in table for d in row) / (
            len(rows) * (len(rows) - 1)
        )  # over all pairs i != j, equal rows too
        relations.append([d / mean if mean else d for row in table for d in row])
    return sum(huber(s, t) for s, t in zip(*relations)) / len(student) ** 2


def rkd_angle_by_hand(student, teacher):
    """The angle at i between the ways to j and to k."""
    relations = []
    for rows in (list(student), list(teacher)):
        count, cosines = range(len(rows)), []
        lengths = [[distance(a, b) for b in rows] for a in rows]
        for i in count:
            for j in count:
                for k in count:
                    if equal(rows[i], rows[j]) or equal(rows[i], rows[k]):
                        cosines.append(0.0)
                    else:
                        inner = dot(difference(rows[j], rows[i]), difference(rows[k], rows[i]))
                        cosines.append(inner / (lengths[i][j] * lengths[i][k]))
        relations.append(cosines)
    return sum(huber(s, t) for s, t in zip(*relations)) / len(student) ** 3


def contrastive_by_hand(student, teacher, temperature=0.07, base_temperature=0.07):
    count, total = len(student), 0.0
    scaled = [[[v / dot(row, row) ** 0.5 for v in row] for row in x] for x in (student, teacher)]
    alike = [[dot(s, t) / temperature for t in scaled[1]] for s in scaled[0]]
    for i in range(count):
        for others in (alike[i], [alike[j][i] for j in range(count)]):
            most = max(v.item() for v in others)
            total += sum((v - most).exp() for v in others).log() + most - alike[i][i]
    return temperature / base_temperature * total / (2 * count)


def mmd_by_hand(student, teacher):
    count, rows = len(student), torch.cat([student, teacher])
    squared = [[dot(difference(a, b), difference(a, b)) for b in rows] for a in rows]
    mean = sum(math.sqrt(v.item()) for row in squared for v in row) / (2 * count * (2 * count - 1))
    total = 0.0
    for i, row in enumerate(squared):
        for j, value in enumerate(row):
            sign = 1 if (i < count) == (j < count) else -1
            total += sign * sum((-value / (2 * (scale * mean) ** 2)).exp() for scale in (0.25, 0.5, 1, 2, 4)) / 5
    return total / count**2


def pkt_by_hand(student, teacher):
    count, shares = len(student), []
    for rows in (list(student), list(teacher)):
        table = [[(1 + dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5) / 2 for b in rows] for a in rows]
        shares.append([[v / sum(row) for v in row] for row in table])
    pairs = [(q, p) for qs, ps in zip(*shares) for q, p in zip(qs, ps)]
    return sum(p * ((p + 1e-7) / (q + 1e-7)).log() for q, p in pairs) / count**2


def sp_by_hand(student, teacher):
    tables = []
    for rows in (list(student), list(teacher)):
        table = [[dot(a, b) for b in rows] for a in rows]
        tables.append([v / dot(row, row) ** 0.5 for row in table for v in row])
    return sum((s - t) ** 2 for s, t in zip(*tables)) / len(student) ** 2


def srd_by_hand(student, teacher, exponent=4.0):
    total = 0.0
    for columns in zip(student.T, teacher.T):
        scores = []
        for column in columns:
            values = list(column)
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            scores.append([(v - mean) / (variance + 1e-4) ** 0.5 for v in values])
        total += sum(abs(s - t) ** exponent for s, t in zip(*scores))
    return (total + 1e-5).log()


BY_HAND = {
    "crd": contrastive_by_hand,
    "rkd_distance": rkd_distance_by_hand,
    "rkd_angle": rkd_angle_by_hand,
    "mmd": mmd_by_hand,
    "pkt": pkt_by_hand,
    "sp": sp_by_hand,
    "srd": srd_by_hand,
}


def samples(case, seed=0):
    """Student (B, D) and teacher (B, D), float64; rows may be equal."""
    student, teacher = rand(B, D, seed=seed), 1.3 * rand(B, D, seed=seed + 100) + 0.4
    if case in ("student's", "both's"):
        student[4] = student[1]
    if case in ("teacher's", "both's"):
        teacher[4] = teacher[1]
    if case == "all the student's":
        student[:] = student[0].clone()
    if case == "all the teacher's":
        teacher[:] = teacher[0].clone()
    return student, teacher


CASES = ("none", "student's", "teacher's", "both's", "all the student's", "all the teacher's")


# -------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_loops_agree(name, case):
    """Values and gradients, with equal rows too."""
    for scale in (1.0, 1e3, 1e-3):
        student, teacher = (x * scale for x in samples(case))
        value, gradient = with_gradient(LOSSES[name], student, teacher)
        by_hand, gradient_by_hand = with_gradient(BY_HAND[name], student, teacher)
        assert value.item() == pytest.approx(by_hand.item(), rel=1e-10, abs=1e-12)
        assert (gradient - gradient_by_hand).abs().max() < 1e-10 * max(1 / scale, gradient.abs().max())
        assert case.startswith("all") or (
            abs(value) > 1e-3 and gradient.abs().max() * scale > 1e-4
        )  # the comparison says something


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mmd"])
def test_gradients_by_finite_differences(name):
    """Not of mmd: its bandwidth is a constant there, see `test_the_bandwidth_of_mmd_gets_no_gradient`."""
    student, teacher = samples("none", seed=3)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student.requires_grad_())


def test_the_bandwidth_of_mmd_gets_no_gradient():
    """Where it had one, scaling both samples could not change the loss: the gradient along them would be 0."""
    student, teacher = (x.requires_grad_() for x in samples("none", seed=3))
    assert mmd(3 * student, 3 * teacher).item() == pytest.approx(mmd(student, teacher).item(), rel=1e-12)
    gradients = torch.autograd.grad(mmd(student, teacher), (student, teacher))
    along = sum((g * x).sum() for g, x in zip(gradients, (student, teacher)))
    assert abs(along) > 1e-3


@pytest.mark.parametrize("temperature, base", [(0.07, 0.07), (0.5, 0.07), (0.1, 1.0)])
def test_contrastive_temperatures(temperature, base):
    student, teacher = samples("none", seed=8)
    loss = lambda s, t: contrastive(s, t, temperature, base)  # noqa: E731
    by_hand = lambda s, t: contrastive_by_hand(s, t, temperature, base)  # noqa: E731
    (value, gradient), (expected, expected_gradient) = (with_gradient(f, student, teacher) for f in (loss, by_hand))
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


def test_contrastive_temperatures_of_the_flags():
    args = build_parser().parse_args(
        ["--loss", "crd=1", "--loss-options", "crd.temperature=0.5", "crd.base_temperature=0.2"]
    )
    weights, options, _ = check_loss(args)
    student, teacher = ({"embedding": x.float()} for x in samples("none", seed=8))
    criterion = make_loss(args, weights, options, None, {}, SimpleNamespace(parts=())).eval()
    criterion.build(student, teacher)
    with torch.no_grad():
        projected, _ = criterion.project("crd", student["embedding"], None)
        expected = contrastive_by_hand(projected, teacher["embedding"], temperature=0.5, base_temperature=0.2)
        assert criterion(student, teacher, None).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 4.5])
def test_the_exponent_of_the_log_sum_distance(exponent):
    student, teacher = samples("none", seed=8)
    (value, gradient), (expected, expected_gradient) = (
        with_gradient(lambda s, t: loss(s, t, exponent), student, teacher)  # noqa: B023
        for loss in (log_sum_distance, srd_by_hand)
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-13)
    assert loss_settings("srd")[1] == {"srd.exponent": 4}


def test_distances_of_close_rows_keep_their_digits():
    """Products of rows, |a|^2 + |b|^2 - 2ab, are off by 4 % here in float32; numpy's differences are not."""
    rows = rand(8, 512).float()
    rows[5] = rows[2] + 1e-3 * rand(512, seed=9).float()
    wide = rows.double().numpy()
    expected = np.sqrt(((wide[:, None] - wide[None]) ** 2).sum(2))
    assert np.allclose(pairwise_distances(rows).numpy(), expected, rtol=1e-5, atol=0)


def test_embedding_mse():
    student, teacher = samples("none")
    value, gradient = with_gradient(embedding_mse, student, teacher)
    pairs = [(s, t) for a, b in zip(student.tolist(), teacher.tolist()) for s, t in zip(a, b)]
    assert value.item() == pytest.approx(sum((s - t) ** 2 for s, t in pairs) / len(pairs), rel=1e-12)
    assert torch.allclose(gradient, 2 * (student - teacher) / (B * D), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda s: embedding_mse(s, teacher), student.requires_grad_())


# ----------------------------------------------------------------------------------------------------- half precision


def under_autocast(loss, dtype):
    """The loss of a forward pass under autocast; the backward pass is outside, as in training."""

    def run(student, teacher):
        with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype):
            return loss(student, teacher)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [*NAMES, "embedding_mse"])
def test_half_precision(name, dtype):
    """Under autocast, of rows rounded to half precision: the value of float64 on the same rows, a gradient of its size.

    Also for a batch of two and where rows are equal: the direction between them would have a gradient of 1 / eps.
    """
    loss = {**LOSSES, "embedding_mse": embedding_mse}[name]
    for case in CASES:
        for scale in (1e3, 1.0, 1e-3):
            for count in (2, B):
                student, teacher = ((x[-count:] * scale).to(dtype) for x in samples(case, seed=11))
                if count == 2 and case in ("student's", "both's"):
                    student[1] = student[0]
                value, gradient = with_gradient(under_autocast(loss, dtype), student, teacher)
                expected, wide = with_gradient(loss, student.double(), teacher.double())
                assert value.dtype == torch.float32 and gradient.isfinite().all()
                assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), (case, scale, count)
                if scale >= 1e-2 and dtype != torch.float16:  # float16 has no digits left for gradients of 1e-6
                    rounding = 1e-5 if name == "srd" else 1e-6  # two rows normalized are 1 and -1, without a gradient
                    error = (gradient.double() - wide).norm()
                    assert error <= 1e-2 * wide.norm() + rounding / scale, (case, scale, count)
                if name in NAMES:  # of srd, BatchNorm's eps of 1e-4 is the smallest variance that is divided by
                    least = 0.1 if name == "srd" else math.inf
                    assert gradient.double().norm() * min(scale, least) < 20, (case, scale, count)


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_equal_everywhere(name):
    """Student and teacher collapsed to one point: the loss of knowing nothing, no gradient."""
    for scale in (1e3, 1.0, 1e-4):
        for dim in (3, 512):
            row = rand(1, dim, seed=1, scale=scale).float()
            value, gradient = with_gradient(LOSSES[name], row.repeat(8, 1), row.repeat(8, 1))
            nothing = {"crd": math.log(8), "srd": math.log(1e-5)}
            assert value.item() == pytest.approx(nothing.get(name, 0.0), abs=1e-5)
            assert gradient.norm() * scale < 1e-4


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "mmd"])
def test_a_collapsed_side_costs_what_it_should(name):
    """The loss of one side at one point has the size of any other: no division by an eps."""
    student, teacher = rand(8, 16).float(), rand(1, 16, seed=1).float().repeat(8, 1)
    for pair in ((student, teacher), (teacher, student)):
        value, gradient = with_gradient(LOSSES[name], *pair)
        assert 0.1 < value < 2 and gradient.norm() < 5


def test_zero_rows():
    """A student of dead features alone, a zero vector among others: finite."""
    for rows in (slice(None), slice(2, 3)):
        student, teacher = (x.float() for x in samples("none"))
        student[rows] = 0
        for name in NAMES:
            value, gradient = with_gradient(LOSSES[name], student, teacher)
            assert value.isfinite() and gradient.isfinite().all(), name
            if name in ("pkt", "sp"):  # no projector's bias lies between: a row of zeros has no direction
                assert gradient.norm() < 5, name


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_is_refused(name):
    with pytest.raises(LossError, match="--batch-size .* at least 2"):
        LOSSES[name](rand(1, D), rand(1, D))


# -------------------------------------------------------------------------------------------------------- known cases


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_rkd_knows_no_rotation_scale_or_shift(name):
    student = rand(B, D, seed=2)
    turned = student @ torch.linalg.qr(rand(D, D, seed=3))[0] * 7.5 - 40
    value, gradient = with_gradient(LOSSES[name], student, turned)
    assert value < 1e-25 and gradient.abs().max() < 1e-13
    stretched = student * torch.tensor([4.0, 1, 1, 1, 1])
    assert LOSSES[name](student, stretched) > 1e-3
    wider = torch.cat([student, torch.zeros(B, 3)], 1)  # widths may differ
    assert LOSSES[name](student, wider) < 1e-25


def test_rkd_by_a_triangle():
    """Sides 3, 4, 5 against an equilateral triangle."""
    student, teacher = (
        torch.tensor([[0.0, 0], [3, 0], [0, 4]]),
        torch.tensor([[0.0, 0], [1, 0], [0.5, math.sqrt(0.75)]]),
    )
    assert rkd_distance(student, teacher).item() == pytest.approx(2 * (0.5 * 0.25**2 + 0 + 0.5 * 0.25**2) / 9, rel=1e-5)
    cosines = [(0 - 0.5), (0.6 - 0.5), (0.8 - 0.5)]  # each twice; j = k is 1 on both sides
    assert rkd_angle(student, teacher).item() == pytest.approx(2 * sum(0.5 * c**2 for c in cosines) / 27, rel=1e-5)


def test_rkd_distance_counts_equal_rows():
    """Two of three rows equal: distances 0, 5, 5 with mean 10 / 3 are 0, 1.5, 1.5; 1, 2, sqrt(5) are divided by their
    mean."""
    student, teacher = (
        torch.tensor([[0.0, 0], [0, 0], [3, 4]], requires_grad=True),
        torch.tensor([[0.0, 0], [1, 0], [0, 2]]),
    )
    mean = (1 + 2 + math.sqrt(5)) / 3
    errors = (0 - 1 / mean, 1.5 - 2 / mean, 1.5 - math.sqrt(5) / mean)
    value = rkd_distance(student, teacher)
    assert (
        value.item()
        == pytest.approx(2 * sum(0.5 * e**2 for e in errors) / 9, rel=1e-5)
        == pytest.approx(0.05573, abs=5e-6)
    )
    assert torch.autograd.grad(value, student)[0].isfinite().all()


@pytest.mark.parametrize("name", ["pkt", "sp"])
def test_similarities_know_no_rotation_or_scale(name):
    """pkt knows no image's length either; both know shifts, unlike the distances of rkd."""
    student = rand(B, D, seed=2)
    turned = student @ torch.linalg.qr(rand(D, D, seed=3))[0] * 7.5
    value, gradient = with_gradient(LOSSES[name], student, turned)
    assert abs(value) < 1e-16 and gradient.abs().max() < 1e-8
    wider = torch.cat([student, torch.zeros(B, 3)], 1)
    assert abs(LOSSES[name](student, wider)) < 1e-16
    assert LOSSES[name](student, turned + 9) > 1e-3
    longer = LOSSES[name](student, student * torch.arange(1, B + 1)[:, None])
    assert abs(longer) < 1e-16 if name == "pkt" else longer > 1e-3


def test_similarities_of_two_images():
    """Embeddings at 0 and 60 degrees against 0 and 90."""
    student, teacher = torch.tensor([[2.0, 0], [0.5, math.sqrt(0.75)]]), torch.tensor([[1.0, 0], [0, 3]])
    q, p = (1 / 1.75, 0.75 / 1.75), (1 / 1.5, 0.5 / 1.5)
    by_hand = sum(a * math.log(a / b) for a, b in zip(p, q)) * 2 / 4
    assert probabilistic_transfer(student, teacher).item() == pytest.approx(by_hand, rel=1e-4)
    rows = (4 / math.sqrt(17), 1 / math.sqrt(17)), (1 / math.sqrt(2), 1 / math.sqrt(2))  # of the products 4, 1 and 1, 1
    by_hand = sum((rows[0][i] - (1, 0)[i]) ** 2 + (rows[1][i] - (0, 1)[i]) ** 2 for i in (0, 1)) / 4
    assert similarity_preserving(student, teacher).item() == pytest.approx(by_hand, rel=1e-5)


def test_the_log_sum_distance_knows_no_scale_or_shift_of_a_dimension():
    student, scale, shift = rand(B, D, seed=2), rand(D, seed=3).abs() + 0.5, rand(D, seed=4, scale=9)
    assert log_sum_distance(student, student * scale + shift).item() == pytest.approx(math.log(1e-5), abs=0.01)
    other = rand(B, D, seed=5)
    value = log_sum_distance(student, other)
    assert log_sum_distance(student * scale + shift, other).item() == pytest.approx(value.item(), abs=0.01)
    assert log_sum_distance(student, -student) > value > 0  # signs count


def test_contrastive_finds_the_own_image():
    rows = rand(32, 16)
    assert contrastive(torch.ones(32, 16), torch.ones(32, 16)).item() == pytest.approx(math.log(32), rel=1e-6)
    random = torch.stack([contrastive(rand(32, 4096, seed=s), rand(32, 4096, seed=s + 50)) for s in range(5)]).mean()
    assert random.item() == pytest.approx(math.log(32), abs=0.1)  # far apart rows have a cosine near 0
    matched, shuffled = contrastive(rows, 5 * rows), contrastive(rows, rows.roll(1, 0))
    assert matched < 0.1 < math.log(32) < shuffled


def test_mmd_tells_samples_apart_at_512_dimensions():
    """Zero for the same sample in another order; one bandwidth of 1 sees nothing, for every distance is about 32."""
    rows, other = rand(64, 512), rand(64, 512, seed=1)
    assert abs(mmd(rows, rows.flip(0)).item()) < 1e-12
    same, shifted = mmd(rows, other).item(), mmd(rows, other + 0.5).item()
    assert shifted > 2 * same > 0
    fixed = torch.exp(-torch.cdist(rows, other + 0.5).square() / 2)
    assert fixed.max() < 1e-30
    _, gradient = with_gradient(mmd, rows, other + 0.5)
    assert (gradient.mean(0) < 0).double().mean() > 0.9  # downhill leads towards the shifted sample


def test_angles_of_a_large_batch():
    """Batch 128 at 512 dimensions, forwards and backwards."""
    value, gradient = with_gradient(rkd_angle, rand(128, 512).float(), rand(128, 512, seed=1).float())
    assert 0 < value < 0.1 and 0 < gradient.norm() < 1


# ----------------------------------------------------------------------------------------------- several tasks, sides


SIZES = {"organ": 4, "modality": 2}
TARGETS = {"organ": torch.tensor([0, 3, 1, 2, 0, 0]), "modality": torch.tensor([1, 0, 0, 1, 1, 1])}


def outputs(seed, width=D, sizes=SIZES, sides=("img_proj", "txt_proj")):
    """What an image + text model gives, with a gradient."""
    names = (
        {f"logits_{task}": count for task, count in sizes.items()}
        | dict.fromkeys(sides, width + 1)
        | {"embedding": width}
    )
    return {name: rand(B, count, seed=seed + i).requires_grad_() for i, (name, count) in enumerate(names.items())}


def log_softmax(row, temperature=1.0):
    return [v / temperature - math.log(sum(math.exp(w / temperature) for w in row)) for v in row]


def test_losses_are_means_over_tasks():
    student, teacher = outputs(0), outputs(20)
    assert {task: len(v[0]) for task, v in task_logits(student).items()} == SIZES
    assert set(task_logits({"logits": 1, "embedding": 2})) == {"label"}
    ce, kl, weighted, right = {}, {}, {}, {}
    spec = {"organ": [6 / (4 * n) for n in (3, 1, 1, 1)], "modality": [6 / (2 * n) for n in (2, 4)]}
    for task, targets in TARGETS.items():
        rows, theirs = student[f"logits_{task}"].tolist(), teacher[f"logits_{task}"].tolist()
        each = [-log_softmax(row)[label] for row, label in zip(rows, targets)]
        ce[task] = sum(each) / B
        weights = [spec[task][label] for label in targets]
        weighted[task] = sum(w * e for w, e in zip(weights, each)) / sum(weights)
        right[task] = sum(max(row) == row[label] for row, label in zip(rows, targets)) / B
        pairs = [(log_softmax([v / 3 for v in t]), log_softmax([v / 3 for v in s])) for s, t in zip(rows, theirs)]
        kl[task] = 9 * sum(math.exp(p) * (p - q) for ps, qs in pairs for p, q in zip(ps, qs)) / B
    near = lambda x: pytest.approx(x, rel=1e-6)  # noqa: E731
    balanced = task_class_weights("balanced", TARGETS, SIZES)
    for given, (a, b) in (
        (None, (1, 1)),
        ({"organ": 3.0, "modality": 1.0}, (3, 1)),
        ({"organ": 0.0, "modality": 2.0}, (0, 2)),
    ):
        mean = lambda values: (a * values["organ"] + b * values["modality"]) / (a + b)  # noqa: E731, B023
        assert task_mean(ce, given) == near(mean(ce))
        assert task_cross_entropy(student, TARGETS, task_weights=given).item() == near(mean(ce))
        assert task_cross_entropy(student, TARGETS, weights=balanced, task_weights=given).item() == near(mean(weighted))
        criterion = DistillationLoss({"ce": 1.0, "kl": 0.25}, {"kl.temperature": 3.0}, task_weights=given)
        criterion.build(student, teacher)
        loss = criterion(student, teacher, TARGETS)
        assert loss.item() == near(mean(ce) + 0.25 * mean(kl)) and criterion.terms["kl"].item() == near(mean(kl))
        gradients = torch.autograd.grad(loss, [student["logits_organ"], student["logits_modality"]])
        assert (gradients[0].abs().sum() > 0) == (a > 0) and gradients[1].abs().sum() > 0
    assert task_accuracy(student, TARGETS).item() == near(sum(right.values()) / 2)
    assert ce["organ"] != near(ce["modality"])


@pytest.mark.parametrize("sizes", [{"organ": 4, "modality": 3}, {"organ": 4}, {"organ": 4, "plane": 2}, {"label": 4}])
def test_other_classes_of_a_task_are_refused(sizes):
    words = ", ".join(f"{count} classes" + f" of {task}" for task, count in SIZES.items())
    with pytest.raises(LossError) as caught:
        DistillationLoss({"kl": 1.0}).build(outputs(0), outputs(9, sizes=sizes))
    assert f"the student {words}" in str(caught.value) and all(
        f"{n} classes of {t}" in str(caught.value) for t, n in sizes.items() if t != "label"
    )


@pytest.mark.parametrize(
    "student_sides, teacher_sides, expected",
    [
        (("img_proj", "txt_proj"), ("img_proj", "txt_proj"), ["img_proj", "txt_proj"]),
        ((), ("img_proj", "txt_proj"), ["embedding"]),
        (("img_proj", "txt_proj"), (), ["embedding"]),
    ],
)
def test_projected_sides(student_sides, teacher_sides, expected):
    student, teacher = outputs(0, 4, sides=student_sides), outputs(30, 9, sides=teacher_sides)
    criterion = DistillationLoss({"projection": 100.0})
    criterion.build(student, teacher)
    projectors = dict(zip(expected, criterion.projectors["projection"], strict=True))
    criterion.double()
    loss = criterion(student, teacher, None)
    errors = []
    for key in expected:
        weight, bias = (p.detach().numpy() for p in (projectors[key].weight, projectors[key].bias))
        errors.append(((student[key].detach().numpy() @ weight.T + bias - teacher[key].detach().numpy()) ** 2).mean())
    assert loss.item() == pytest.approx(100 * np.mean(errors), rel=1e-12)
    loss.backward()
    for key in expected:
        assert student[key].grad.abs().sum() > 0
        assert all(p.grad.abs().sum() > 0 for p in projectors[key].parameters())


@pytest.mark.parametrize("method", ["projection", "combined", "crd", "rkd", "mmd", "pkt", "sp", "srd"])
def test_methods(method):
    """The weighted sum of the terms; projectors exist before an optimizer could ask for them, and each learns."""
    student, teacher = outputs(0, 4), outputs(30, 9)
    criterion = DistillationLoss(*loss_settings(method))
    criterion.build(student, teacher)
    before = dict(criterion.double().named_parameters())
    loss = criterion(student, teacher, TARGETS)
    expected = {
        "projection": {"ce": 1, "kl": 1, "projection": 100},
        "combined": {"ce": 1, "kl": 1, "projection": 100, "crd": 1},
        "crd": {"ce": 1, "crd": 1},
        "rkd": {"ce": 1, "rkd_distance": 25, "rkd_angle": 50},
        "mmd": {"ce": 1, "mmd": 1},
        "pkt": {"ce": 1, "pkt": 30000},
        "sp": {"ce": 1, "sp": 3000},
        "srd": {"ce": 1, "srd": 1},
    }[method]
    assert set(criterion.terms) == set(expected)
    total = sum(w * criterion.terms[name].item() for name, w in expected.items())
    assert loss.item() == pytest.approx(total, rel=1e-12)
    loss.backward()
    assert dict(criterion.named_parameters()).keys() == before.keys() and all(
        p.grad.abs().sum() > 0 for p in before.values()
    )
    built = {"projection": {"projection": 2}, "combined": {"projection": 2, "crd": 1}, "rkd": {}, "pkt": {}, "sp": {}}
    assert {term: len(m) for term, m in criterion.projectors.items()} == built.get(method, {method: 1})
    for name in expected.keys() & set(NAMES):
        embedding = student["embedding"]
        if TERMS[name].projector:
            embedding, _ = criterion.project(name, embedding, teacher["embedding"])
        assert criterion.terms[name].item() == pytest.approx(
            BY_HAND[name](embedding, teacher["embedding"]).item(), rel=1e-9
        )


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_gathered_in_training_alone(name):
    """The rows of another process stand for it here; evaluation judges each process's own images."""
    student, teacher = outputs(0), outputs(30)
    criterion = DistillationLoss({name: 1.0}, gather=lambda rows: torch.cat([rows, rows.flip(1)]))
    criterion.build(student, teacher)
    ours = student["embedding"]
    if TERMS[name].projector:
        ours, _ = criterion.double().project(name, ours, None)
    theirs = teacher["embedding"]
    for training, rows in ((True, [torch.cat([x, x.flip(1)]) for x in (ours, theirs)]), (False, [ours, theirs])):
        criterion.train(training)
        assert criterion(student, teacher, None).item() == pytest.approx(BY_HAND[name](*rows).item(), rel=1e-9)


def test_a_queue_gives_the_student_more_negatives():
    """MoCo's: the teacher's embeddings of the last images, in training alone; rows of the queue are never positives."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        ({"embedding": torch.randn(4, 6, generator=generator)}, {"embedding": torch.randn(4, 5, generator=generator)})
        for _ in range(3)
    ]
    criterion = DistillationLoss({"crd": 1.0}, {"crd.queue": 6})
    criterion.build(*batches[0])
    projector = criterion.projectors["crd"][0]
    first = projector.queue.clone()
    assert first.shape == (6, 5) and torch.equal(first, torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    known = first
    for student, teacher in batches:
        value = criterion(student, teacher, None)
        s = torch.nn.functional.normalize(projector(student["embedding"]).double(), dim=1)
        rows = torch.cat([teacher["embedding"], known])
        t = torch.nn.functional.normalize(rows.double(), dim=1)
        logits = s @ t.T / 0.07
        columns = logits[:, :4] - logits[:, :4].logsumexp(0)
        expected = -((logits - logits.logsumexp(1, keepdim=True)).diagonal().mean() + columns.diagonal().mean()) / 2
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        known = rows[:6]
        assert torch.equal(projector.queue, known)
    value.backward()  # what was put into the queue later does not disturb it
    criterion.eval()
    criterion(*batches[0], None)
    assert torch.equal(projector.queue, known)
    again = DistillationLoss({"crd": 1.0}, {"crd.queue": 6})
    again.build(*batches[0])
    again.load_state_dict(criterion.state_dict())  # as a checkpoint does
    assert torch.equal(again.projectors["crd"][0].queue, known)
    assert not any("queue" in name for name, _ in criterion.named_parameters())
    plain = DistillationLoss({"crd": 1.0})
    plain.build(*batches[0])
    assert set(plain.state_dict()) == {"projectors.crd.0.weight", "projectors.crd.0.bias"}
