"""Losses of logits (decoupled KL, DIST, logit standardization, hard labels, Plackett-Luce) and of feature maps
(attention transfer, Wasserstein distance), against the papers' formulas in float64."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, run_script, succeed
from scipy.stats import pearsonr, zscore
from test_losses import kl_by_hand, pool_by_hand, rand

from common.losses import (
    TERMS,
    DistillationLoss,
    LossError,
    attention_transfer,
    decoupled_kl,
    dist,
    gaussian_wasserstein,
    hard_label,
    plackett_luce,
    standardized_kl,
    temperature_kl,
    terms_on,
)
from common.models import ImageModel, build_model
from distill import build_parser, check_loss, loss_settings, settle_flags

B, C = 6, 5
LOGIT_TERMS = ("kl", "dkd", "dist", "standardized_kl", "hard", "pld")
LABELS = torch.tensor([0, 3, 4, 3, 1, 2])
# (student, teacher) -> scalar, of logits (B, C) with LABELS
OF_LOGITS = {
    "dkd": lambda s, t: decoupled_kl(s, t, LABELS[: len(s)]),
    "dist": dist,
    "standardized_kl": standardized_kl,
    "hard": hard_label,
    "pld": lambda s, t: plackett_luce(s, t, LABELS[: len(s)]),
}
OF_MAPS = {"attention": attention_transfer, "wkd": gaussian_wasserstein}
ALL = {**OF_LOGITS, **OF_MAPS}


# -------------------------------------------------------------------------------------------------- formulas, by numpy


def softmax(row, temperature):
    exps = np.exp((row - row.max()) / temperature)
    return exps / exps.sum()


def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))


def dkd_by_hand(student, teacher, labels, temperature, alpha, beta):
    total = 0.0
    for s, t, label in zip(student, teacher, labels):
        p, q = softmax(t, temperature), softmax(s, temperature)
        binary = kl((p[label], 1 - p[label]), (q[label], 1 - q[label]))
        others = [c for c in range(len(p)) if c != label]
        within = kl([p[c] / (1 - p[label]) for c in others], [q[c] / (1 - q[label]) for c in others])
        total += alpha * binary + beta * within
    return temperature**2 * total / len(student)


def dist_by_hand(student, teacher, temperature, beta, gamma, flat=0.0):
    """flat: the least that the student's probabilities count as differing, as a share of them."""

    def distance(a, b):
        share = np.std(a) / max(np.std(a), flat * np.sqrt(np.mean(a**2)))
        return 1 - share * pearsonr(a, b).statistic

    p, q = (np.array([softmax(row, temperature) for row in x]) for x in (student, teacher))
    inter, intra = (np.mean([distance(a, b) for a, b in pairs]) for pairs in (zip(p, q), zip(p.T, q.T)))
    return temperature**2 * (beta * inter + gamma * intra)


def standardized_by_hand(student, teacher, temperature):
    pairs = zip(zscore(student, axis=1, ddof=1), zscore(teacher, axis=1, ddof=1))
    return temperature**2 * np.mean([kl(softmax(t, temperature), softmax(s, temperature)) for s, t in pairs])


def hard_by_hand(student, teacher):
    return -np.mean(
        [math.log(softmax(s, 1.0)[max(range(len(t)), key=t.__getitem__)]) for s, t in zip(student, teacher)]
    )


def pld_by_hand(student, teacher, labels, temperature=1.0):
    total = 0.0
    for s, t, label in zip(student, teacher, labels):
        confidence = softmax(t, temperature)
        left = [int(label), *sorted((c for c in range(len(t)) if c != label), key=lambda c: -t[c])]  # noqa: B023
        while left:
            choices = softmax(s[left], 1.0)
            total -= confidence[left.pop(0)] * math.log(choices[0])
    return total / len(student)


def wkd_by_hand(student, teacher, mean_weight=4.0):
    total = 0.0
    for s, t in zip(student, teacher):
        for a, b in zip(s, t):  # channels
            deviations = [math.sqrt(np.var(x) + 1e-5) for x in (a, b)]
            total += mean_weight * (np.mean(a) - np.mean(b)) ** 2 + (deviations[0] - deviations[1]) ** 2
    return total / len(student)


def attention_by_hand(student, teacher):
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:])]
    total, count = 0.0, len(student) * size[0] * size[1]
    for s, t in zip(pool_by_hand(student, size).numpy(), pool_by_hand(teacher, size).numpy()):
        s, t = ((sum(channel**2 for channel in x) / len(x)).ravel() for x in (s, t))
        total += sum((s / math.sqrt(sum(s**2)) - t / math.sqrt(sum(t**2))) ** 2)
    return total / count


# ---------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize(
    "temperature, alpha, beta", [(4.0, 1.0, 8.0), (1.0, 0.0, 1.0), (3.0, 1.0, 0.0), (0.5, 2.0, 0.5)]
)
def test_decoupled_kl(temperature, alpha, beta):
    student, teacher = rand(B, C, scale=2), rand(B, C, seed=1, scale=2)
    loss = decoupled_kl(student, teacher, LABELS, temperature, alpha, beta).item()
    assert loss == pytest.approx(
        dkd_by_hand(student.numpy(), teacher.numpy(), LABELS, temperature, alpha, beta), rel=1e-10
    )
    if (temperature, alpha, beta) == (4.0, 1.0, 8.0):
        assert decoupled_kl(student, teacher, LABELS).item() == loss


def test_decoupled_kl_is_the_kl_where_beta_is_what_the_teacher_leaves():
    """KL = target's KL + (1 - p_teacher(target)) * KL among the others, image by image."""
    student, teacher = rand(B, C, scale=3), rand(B, C, seed=1, scale=3)
    for i, label in enumerate(LABELS):
        own = slice(i, i + 1)
        beta = 1 - (teacher[i] / 2.5).softmax(0)[label].item()
        expected = kl_by_hand(student[own], teacher[own], 2.5)
        assert decoupled_kl(student[own], teacher[own], LABELS[own], 2.5, 1.0, beta).item() == pytest.approx(
            expected, rel=1e-10
        )


def test_two_classes_leave_nothing_among_the_others():
    student, teacher, labels = rand(B, 2, grad=True), rand(B, 2, seed=1), LABELS % 2
    assert decoupled_kl(student, teacher, labels, 3.0, 1.0, 50.0).item() == pytest.approx(
        kl_by_hand(student, teacher, 3.0), rel=1e-10
    )
    (gradient,) = torch.autograd.grad(decoupled_kl(student, teacher, labels, 3.0, 0.0, 50.0), student)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    for loss in (dist, standardized_kl):  # two classes tell the sign alone: finite
        value = loss(student, teacher)
        assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


@pytest.mark.parametrize(
    "temperature, beta, gamma", [(1.0, 1.0, 1.0), (4.0, 2.0, 0.0), (2.0, 0.0, 1.0), (0.5, 1.0, 3.0)]
)
def test_dist(temperature, beta, gamma):
    student, teacher = rand(B, C), rand(B, C, seed=1)
    loss = dist(student, teacher, temperature, beta, gamma).item()
    assert loss == pytest.approx(
        dist_by_hand(student.numpy(), teacher.numpy(), temperature, beta, gamma), rel=1e-5
    )  # the eps of 1e-8
    if (temperature, beta, gamma) == (1.0, 1.0, 1.0):
        assert dist(student, teacher).item() == loss


def test_dist_quiets_classes_that_no_image_is_given():
    """A class of probability 1e-6 on both sides: its correlation counts a hundredth or less, by the eps, whatever its
    noise."""
    student, teacher = rand(B, C), rand(B, C, seed=1)
    student[:, 2], teacher[:, 2] = student[:, 2] - 14, teacher[:, 2] - 14
    p, q = (x.softmax(1).numpy() for x in (student, teacher))
    found = [pearsonr(a, b).statistic for a, b in zip(p.T, q.T)]
    found[2] *= np.std(p[:, 2]) * np.std(q[:, 2]) * B / 1e-8
    assert abs(found[2]) < 0.01
    assert dist(student, teacher, 1.0, 0.0, 1.0).item() == pytest.approx(1 - np.mean(found), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_standardized_kl(temperature):
    student, teacher = rand(B, C, scale=3) + 7, rand(B, C, seed=1)
    loss = standardized_kl(student, teacher, temperature).item()
    assert loss == pytest.approx(
        standardized_by_hand(student.numpy(), teacher.numpy(), temperature), rel=1e-6
    )  # the eps of 1e-7
    assert standardized_kl(teacher, student, temperature).item() != pytest.approx(loss, rel=1e-3)
    if temperature == 2:
        assert standardized_kl(student, teacher).item() == loss


def test_standardized_kl_knows_no_scale_or_shift():
    student, teacher = rand(B, C), rand(B, C, seed=1)
    scale, shift = rand(B, 1, seed=2).abs() + 0.5, rand(B, 1, seed=3, scale=9)
    loss = standardized_kl(student, teacher).item()
    assert standardized_kl(student * scale + shift, teacher).item() == pytest.approx(loss, rel=1e-5)
    assert standardized_kl(student, teacher * scale + shift).item() == pytest.approx(loss, rel=1e-5)
    assert standardized_kl(student, student * scale + shift).item() < 1e-12
    assert temperature_kl(student, student * scale + shift, 2.0) > 1e-3


def test_hard_label():
    """The teacher's certainty says nothing; its smoothed labels are left out."""
    student, teacher = rand(B, C, scale=2), rand(B, C, seed=1, scale=2)
    loss = hard_label(student, teacher).item()
    assert loss == pytest.approx(hard_by_hand(student.numpy(), teacher.numpy()), rel=1e-10)
    assert hard_label(student, 9 * teacher + rand(B, 1, seed=2)).item() == loss
    tied = torch.zeros(B, C, dtype=torch.float64)  # a teacher that cannot tell names the first class
    assert hard_label(student, tied).item() == pytest.approx(hard_by_hand(student.numpy(), tied.numpy()), rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_plackett_luce(temperature):
    student, teacher = rand(B, C, scale=2), rand(B, C, seed=1, scale=2)
    loss = plackett_luce(student, teacher, LABELS, temperature).item()
    assert loss == pytest.approx(pld_by_hand(student.numpy(), teacher.numpy(), LABELS, temperature), rel=1e-10)
    if temperature == 1:
        assert plackett_luce(student, teacher, LABELS).item() == loss
    shift = rand(B, 1, seed=3, scale=9)
    assert plackett_luce(student + shift, teacher, LABELS, temperature).item() == pytest.approx(loss, rel=1e-10)
    assert plackett_luce(student, teacher + shift, LABELS, temperature).item() == pytest.approx(loss, rel=1e-10)
    unlabelled = torch.where(torch.arange(B) < 3, -1, LABELS)
    filled = torch.where(unlabelled < 0, teacher.argmax(1), LABELS)
    expected = pld_by_hand(student.numpy(), teacher.numpy(), filled, temperature)
    assert expected != pytest.approx(loss, rel=1e-3)
    assert plackett_luce(student, teacher, unlabelled, temperature).item() == pytest.approx(expected, rel=1e-10)


def test_plackett_luce_of_a_certain_teacher_is_the_cross_entropy():
    student = rand(B, C, grad=True)
    teacher = 1e4 * torch.nn.functional.one_hot(LABELS, C).double()
    value = plackett_luce(student, teacher, LABELS)
    expected = torch.nn.functional.cross_entropy(student, LABELS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(x, student)[0] for x in (value, expected)]
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-14)


def test_plackett_luce_learns_the_ranking():
    """By gradient descent on logits alone; the teacher ranks the label second, it comes first all the same."""
    teacher = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0]])
    student = torch.zeros(1, C, requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(plackett_luce(student, teacher, torch.tensor([1])), student)
        student = (student - gradient).detach().requires_grad_()
    assert student.argsort(descending=True).tolist() == [[1, 0, 2, 3, 4]]


@pytest.mark.parametrize("mean_weight", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("sizes", [((3, 4, 4), (3, 4, 4)), ((3, 8, 6), (3, 4, 2)), ((3, 2, 2), (3, 1, 1))])
def test_gaussian_wasserstein(sizes, mean_weight):
    """Of maps of any size: nothing is pooled."""
    student, teacher = rand(B, *sizes[0]), rand(B, *sizes[1], seed=1)
    loss = gaussian_wasserstein(student, teacher, mean_weight).item()
    assert loss == pytest.approx(wkd_by_hand(student.numpy(), teacher.numpy(), mean_weight), rel=1e-10)
    if mean_weight == 4:
        assert gaussian_wasserstein(student, teacher).item() == loss
    mixed = student.flatten(2)[..., torch.randperm(sizes[0][1] * sizes[0][2])].unflatten(2, sizes[0][1:])
    assert gaussian_wasserstein(mixed, teacher, mean_weight).item() == pytest.approx(loss, rel=1e-10)
    assert gaussian_wasserstein(student, -student + 2 * student.mean((2, 3), keepdim=True)).item() < 1e-20


def test_gaussian_wasserstein_is_the_distance_of_gaussians():
    """Of two samples of one channel that differ by shift and scale, against the sorted values of both."""
    values = rand(1, 1, 50, 50)
    student, teacher = 2 * values + 3, values
    squared = (student.flatten().sort()[0] - teacher.flatten().sort()[0]).square().mean()  # W2 of one dimension
    assert gaussian_wasserstein(student, teacher, 1.0).item() == pytest.approx(squared.item(), rel=1e-4)


@pytest.mark.parametrize(
    "sizes", [((3, 4, 4), (6, 4, 4)), ((6, 8, 8), (3, 4, 4)), ((2, 3, 5), (5, 6, 5)), ((1, 1, 2), (4, 2, 2))]
)
def test_attention_transfer(sizes):
    student, teacher = rand(B, *sizes[0]), rand(B, *sizes[1], seed=1)
    loss = attention_transfer(student, teacher).item()
    assert loss == pytest.approx(attention_by_hand(student, teacher), rel=1e-10)
    scale = rand(B, 1, 1, 1, seed=2).abs() + 0.1
    assert attention_transfer(student * scale, teacher).item() == pytest.approx(loss, rel=1e-10)
    assert attention_transfer(student, teacher / scale).item() == pytest.approx(loss, rel=1e-10)
    assert (
        attention_transfer(-student, student.flip(1) * scale).item() < 1e-20
    )  # signs and the order of channels say nothing


def samples(name, grad=False):
    shape = (B, 3, 4, 4) if name in OF_MAPS else (B, C)
    return rand(*shape, grad=grad), rand(*shape, seed=1)


@pytest.mark.parametrize("name", ALL)
def test_gradients_by_finite_differences(name):
    student, teacher = samples(name, grad=True)
    assert torch.autograd.gradcheck(ALL[name], (student, teacher))
    ALL[name](student, teacher).backward()
    assert student.grad.norm() > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_float32_scalars_of_bfloat16(name):
    """The float32 loss of those numbers, inside autocast and outside."""
    student, teacher = ((x * 5).to(torch.bfloat16) for x in samples(name))
    exact = ALL[name](student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        inside = ALL[name](student, teacher)
    for value in (inside, ALL[name](student, teacher)):
        assert value.dtype == torch.float32 and value.dim() == 0 and torch.equal(value, exact)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_extreme_logits_stay_finite(name):
    """Certain of the right class, of a wrong one, of nothing; all classes alike."""
    rows = torch.tensor(
        [
            [1e4, -1e4, 0, 0, 0],
            [-1e4, 1e4, 1e4, -1e4, -1e4],
            [0, 0, 0, 0, 0],
            [1e4, 1e4, 1e4, 1e4, 1e4],
            [0, 1, 2, 3, 4],
        ]
    )
    for shift in range(len(rows)):
        student, teacher = rows.clone().requires_grad_(), rows.roll(shift, 0).flip(1 if shift % 2 else 0)
        value = OF_LOGITS[name](student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite() and gradient.isfinite().all() and gradient.norm() < 100


@pytest.mark.parametrize("offset", [0.0, 1.0, 300.0, 1e4, 1e6])
def test_a_student_that_says_the_same_of_all(offset):
    """A head that starts at zero, and logits that differ by float32's rounding alone: the loss of knowing nothing.

    Equal logits have the gradient of deviations of 0.1, by hand; rounding has no say: never a larger one.
    """
    teacher = rand(B, C, seed=1).float()
    centred = (teacher.double() / 2).softmax(1) - 1 / C
    toward = -2 * centred / centred.norm(dim=1, keepdim=True) / (0.1 * math.sqrt(C) * B)  # inter at T 2, beta 1
    scores = torch.tensor(zscore(teacher.double().numpy(), axis=1, ddof=1))
    taught = (scores / 2).softmax(1)
    uniform = 4 * np.mean([kl(row, np.full(C, 1 / C)) for row in taught.numpy()])
    by_name = {  # loss, value, gradient
        "inter": (lambda s: dist(s, teacher, 2.0, 1.0, 0.0), 4, toward),
        "dist": (lambda s: dist(s, teacher, 2.0, 1.0, 3.0), 4 * (1 + 3), None),
        "standardized_kl": (lambda s: standardized_kl(s, teacher), uniform, 2 * (1 / C - taught) / (0.1 * B)),
    }
    steps = torch.randint(-1, 2, (B, C), generator=torch.Generator().manual_seed(0)) * np.spacing(np.float32(offset))
    for name, (loss, expected, by_hand) in by_name.items():
        student, noisy = (torch.full((B, C), offset).requires_grad_(), (offset + steps.float()).requires_grad_())
        value = loss(student)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == pytest.approx(expected, rel=1e-5), name
        assert 0.01 < gradient.norm() * max(1, offset / 1e4) and gradient.norm() < 20, name
        if by_hand is not None and offset < 1e3:
            assert torch.allclose(gradient.double(), by_hand, rtol=1e-4, atol=1e-6), name
        value = loss(noisy)
        assert value.item() == pytest.approx(expected, rel=0.01), name
        assert torch.autograd.grad(value, noisy)[0].norm() < 1.05 * gradient.norm(), name


@pytest.mark.parametrize("name", ["dist", "standardized_kl"])
def test_a_head_of_zeros_trains(name):
    """On this term alone, by plain SGD, until it names the teacher's classes."""
    images, rule = rand(64, 8).float(), rand(8, C, seed=1).float()
    head, teacher = torch.zeros(8, C, requires_grad=True), images @ rule
    for _ in range(100):
        (gradient,) = torch.autograd.grad(OF_LOGITS[name](images @ head, teacher), head)
        head = (head - 0.1 * gradient).detach().requires_grad_()
    assert ((images @ head).argmax(1) == teacher.argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize("name", ["kl", *OF_LOGITS])
@pytest.mark.parametrize("count", [2, C])
def test_a_teacher_logit_of_minus_infinity_contributes_nothing(name, count):
    """The loss of the other classes where they alone are compared; a class of zero probability costs nothing of its
    own."""
    loss = {"kl": lambda s, t: temperature_kl(s, t, 3.0), **OF_LOGITS}[name]
    student, teacher = rand(B, count, grad=True), rand(B, count, seed=1)
    labels = LABELS % count
    if name == "dkd":
        loss = lambda s, t: decoupled_kl(s, t, labels, 3.0)  # noqa: E731
    if name == "pld":
        loss = lambda s, t: plackett_luce(s, t, labels)  # noqa: E731
    teacher[0, 0] = teacher[1, count - 1] = -math.inf
    teacher[2, 1:] = -math.inf  # certain of one class
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()
    if name in ("kl", "dkd"):  # what a teacher that gives it next to no probability costs
        far = teacher.clone().masked_fill(teacher == -math.inf, -2000.0)
        rows = (
            slice(None) if name == "kl" else slice(0, 2)
        )  # among others that are all impossible there is nothing to compare
        labels = LABELS[rows] % count
        (expected,) = torch.autograd.grad(loss(student[rows], far[rows]), student)
        (found,) = torch.autograd.grad(loss(student[rows], teacher[rows]), student)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    if name == "kl":
        by_hand = 0.0
        for s, t in zip(student.detach().numpy(), teacher.numpy()):
            by_hand += sum(a * math.log(a / b) for a, b in zip(softmax(t, 3.0), softmax(s, 3.0)) if a)
        assert value.item() == pytest.approx(9 * by_hand / B, rel=1e-10)
    if name in ("hard", "pld"):
        pair = student.detach().numpy(), teacher.numpy()
        by_hand = hard_by_hand(*pair) if name == "hard" else pld_by_hand(*pair, labels)
        assert value.item() == pytest.approx(by_hand, rel=1e-10)
    if name in ("kl", "hard", "pld"):  # a head that masks the class as well
        masked = student.detach().masked_fill(teacher == -math.inf, -math.inf).requires_grad_()
        value = loss(masked, teacher)
        assert value.isfinite() and torch.autograd.grad(value, masked)[0].isfinite().all()
    if name == "standardized_kl" and count == C:  # standardized over the classes that there are
        kept = [
            zscore(row[np.isfinite(row)], ddof=1) if np.isfinite(row).sum() > 1 else np.zeros(1)
            for row in teacher.numpy()
        ]
        by_hand = 0.0
        for row, scores, s in zip(teacher.numpy(), kept, zscore(student.detach().numpy(), axis=1, ddof=1)):
            probability = np.zeros(C)
            probability[np.isfinite(row)] = softmax(scores, 2.0)
            by_hand += sum(a * math.log(a / b) for a, b in zip(probability, softmax(s, 2.0)) if a)
        assert value.item() == pytest.approx(4 * by_hand / B, rel=1e-6)


def test_minus_infinity_in_one_of_several_tasks():
    student, teacher = ({f"logits_{task}": rand(B, n, seed=seed + n) for task, n in SIZES.items()} for seed in (0, 20))
    teacher["logits_organ"][0, 2] = -math.inf
    for term in LOGIT_TERMS:
        assert DistillationLoss({term: 1.0})(student, teacher, TARGETS).isfinite(), term


def test_dead_maps_have_bounded_deviations():
    """Of a constant map the deviation counts as sqrt(1e-5), without a gradient."""
    student, teacher = torch.ones(2, 3, 4, 4, requires_grad=True), rand(2, 3, 4, 4).float()
    value = gaussian_wasserstein(student, teacher, 0.0)
    assert value.item() == pytest.approx(wkd_by_hand(np.ones((2, 3, 4, 4)), teacher.numpy(), 0.0), rel=1e-4)
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-6


def test_dead_maps_have_no_attention():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = attention_transfer(student, torch.ones(2, 5, 4, 4))
    assert value.item() == pytest.approx(1 / 16)
    assert torch.equal(torch.autograd.grad(value, student)[0], torch.zeros_like(student))


# ---------------------------------------------------------------------------------------------------- terms, methods


SIZES = {"organ": 4, "modality": 2}
TARGETS = {"organ": torch.tensor([0, 3, 1, 2, 0, 0]), "modality": torch.tensor([1, 0, 0, 1, 1, 1])}


@pytest.mark.parametrize("term", ["dkd", "dist", "standardized_kl", "hard", "pld"])
def test_terms_are_means_over_tasks(term):
    """With their settings, the temperature of all and the tasks' weights."""
    student, teacher = (
        {f"logits_{task}": rand(B, n, seed=seed + n, scale=9) for task, n in SIZES.items()} for seed in (30, 20)
    )
    options = {
        "dkd": {"dkd.temperature": 3.0, "dkd.alpha": 0.5, "dkd.beta": 3.0},
        "dist": {"dist.temperature": 3.0, "dist.beta": 0.5, "dist.gamma": 3.0},
        "standardized_kl": {"standardized_kl.temperature": 3.0},
        "hard": {},
        "pld": {"pld.temperature": 3.0},
    }[term]
    by_hand = {
        "dkd": lambda s, t, task: dkd_by_hand(s, t, TARGETS[task], 3.0, 0.5, 3.0),
        "dist": lambda s, t, _: dist_by_hand(s, t, 3.0, 0.5, 3.0),
        "standardized_kl": lambda s, t, _: standardized_by_hand(s, t, 3.0),
        "hard": lambda s, t, _: hard_by_hand(s, t),
        "pld": lambda s, t, task: pld_by_hand(s, t, TARGETS[task], 3.0),
    }[term]
    expected = {
        task: by_hand(student[f"logits_{task}"].numpy(), teacher[f"logits_{task}"].numpy(), task) for task in SIZES
    }
    assert expected["organ"] != pytest.approx(expected["modality"], rel=0.01)
    for task_weights, (a, b) in ((None, (1, 1)), ({"organ": 3.0, "modality": 1.0}, (3, 1))):
        criterion = DistillationLoss({term: 2.0}, options, task_weights=task_weights)
        criterion.build(student, teacher)
        mean = (a * expected["organ"] + b * expected["modality"]) / (a + b)
        assert criterion(student, teacher, TARGETS).item() == pytest.approx(2 * mean, rel=1e-5)
        assert criterion.terms[term].item() == pytest.approx(mean, rel=1e-5) and not list(criterion.parameters())


def test_cross_entropy_is_left_out_and_labels_still_reach_the_decoupled_kl():
    student, teacher = {"logits": rand(B, C)}, {"logits": rand(B, C, seed=1)}
    criterion = DistillationLoss(*loss_settings("dkd"))
    expected = dkd_by_hand(student["logits"].numpy(), teacher["logits"].numpy(), LABELS, 4.0, 1.0, 8.0)
    assert criterion(student, teacher, LABELS, ce=False).item() == pytest.approx(expected, rel=1e-9)
    assert criterion(student, teacher, LABELS).item() == pytest.approx(
        expected + torch.nn.functional.cross_entropy(student["logits"], LABELS).item()
    )


def test_warm_up_spares_the_cross_entropy_and_evaluation():
    student, teacher = {"logits": rand(B, C)}, {"logits": rand(B, C, seed=1)}
    criterion = DistillationLoss(*loss_settings("dkd"))
    ce = torch.nn.functional.cross_entropy(student["logits"], LABELS).item()
    whole = dkd_by_hand(student["logits"].numpy(), teacher["logits"].numpy(), LABELS, 4.0, 1.0, 8.0)
    for epoch, epochs, share in (
        (1, 4, 0.25),
        (3, 4, 0.75),
        (4, 4, 1),
        (9, 4, 1),
        (1, 2.5, 0.4),
        (1, 0.5, 1),
        (1, 0, 1),
    ):
        criterion.warm_up(epoch, epochs)
        assert criterion.train()(student, teacher, LABELS).item() == pytest.approx(ce + share * whole, rel=1e-9)
        assert criterion.terms["dkd"].item() == pytest.approx(whole, rel=1e-9)
        assert criterion.eval()(student, teacher, LABELS).item() == pytest.approx(ce + whole, rel=1e-9)


def test_warm_up_of_the_class_tokens_of_local_crops():
    student, teacher, local = {"embedding": rand(B, 4)}, {"embedding": rand(B, 4, seed=1)}, rand(3, B, 4, seed=2)
    criterion = DistillationLoss({"cls": 2.0}).double()
    criterion.build(student, teacher)
    criterion.double()
    whole = criterion(student, teacher, local_crops=local).item()
    criterion.warm_up(1, 4)
    assert criterion(student, teacher, local_crops=local).item() == pytest.approx(whole / 4, rel=1e-9)


def test_wasserstein_of_projected_layers():
    maps = {"a": rand(B, 3, 4, 4), "b": rand(B, 5, 2, 2, seed=1)}
    guides = {"x": rand(B, 7, 2, 2, seed=2), "y": rand(B, 4, 3, 3, seed=3)}
    criterion = DistillationLoss(*loss_settings("wkd", loss_options=["wkd.mean_weight=2"]))
    criterion.build({"features": maps, "logits": rand(B, C)}, {"features": guides})
    expected = []
    for projector, s, t in zip(criterion.double().projectors["wkd"], maps.values(), guides.values(), strict=True):
        weight, bias = (p.detach().numpy() for p in (projector.weight[:, :, 0, 0], projector.bias))
        projected = np.einsum("oc,bchw->bohw", weight, s.numpy()) + bias[:, None, None]
        expected.append(wkd_by_hand(projected, t.numpy(), 2.0))
    loss = criterion({"features": maps}, {"features": guides})
    assert loss.item() == pytest.approx(0.006 * np.mean(expected), rel=1e-9)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in criterion.parameters())


def test_attention_is_a_mean_over_layers_and_needs_no_projector():
    maps = {"a": rand(B, 3, 4, 4), "b": rand(B, 5, 2, 2, seed=1)}
    guides = {"x": rand(B, 7, 2, 2, seed=2), "y": rand(B, 4, 3, 3, seed=3)}
    expected = (attention_by_hand(maps["a"], guides["x"]) + attention_by_hand(maps["b"], guides["y"])) / 2
    criterion = DistillationLoss({"attention": 1000.0})
    criterion.build({"features": maps}, {"features": guides})
    assert criterion({"features": maps}, {"features": guides}, None).item() == pytest.approx(1000 * expected, rel=1e-9)
    assert not list(criterion.parameters())
    both = DistillationLoss({"attention": 1.0, "feature": 1.0})
    both.build({"features": maps}, {"features": guides})
    assert [tuple(p.weight.shape[:2]) for p in both.projectors["feature"]] == [(7, 3), (4, 5)]


@pytest.mark.parametrize("term", LOGIT_TERMS)
def test_other_numbers_of_classes_are_refused(term):
    with pytest.raises(LossError, match="the teacher has 7 classes, the student 3"):
        DistillationLoss({term: 1.0}).build({"logits": rand(2, 3)}, {"logits": rand(2, 7)})


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(LossError, match="at least 2"):
        dist(rand(1, C), rand(1, C))
    with pytest.raises(LossError, match="at least 2"):
        DistillationLoss({"dist": 1.0}).build({"logits": rand(1, C)}, {"logits": rand(1, C)})
    maps = lambda count, side: {"features": {f"layer{i}": rand(2, 3, side, side) for i in range(count)}}  # noqa: E731
    with pytest.raises(LossError, match="--student-layer names 1 layers and --teacher-layer 2"):
        DistillationLoss({"attention": 1.0}).build(maps(1, 4), maps(2, 4))
    with pytest.raises(LossError, match="share only one"):
        DistillationLoss({"attention": 1.0}).build(maps(1, 4), maps(1, 1))
    DistillationLoss({"feature": 1.0}).build(maps(1, 4), maps(1, 1))


@pytest.mark.parametrize(
    "flags, weights, temperature",
    [
        (["--method", "dkd"], {"ce": 1.0, "dkd": 1.0}, 4.0),
        (["--method", "dist"], {"ce": 1.0, "dist": 2.0}, 1.0),
        (["--method", "logit_standardization"], {"ce": 0.1, "standardized_kl": 9.0}, 2.0),
        (["--method", "attention"], {"ce": 1.0, "attention": 1000.0}, 4.0),
        (["--method", "projection"], {"ce": 1.0, "kl": 1.0, "projection": 100.0}, 2.0),
        (["--method", "response"], {"ce": 0.5, "kl": 0.5}, 4.0),
        (["--method", "hard"], {"ce": 0.5, "hard": 0.5}, None),
        (["--method", "pld"], {"pld": 1.0}, 1.0),
        (["--method", "pld", "--temperature", "4"], {"pld": 1.0}, 4.0),
        (["--method", "dist", "--temperature", "3"], {"ce": 1.0, "dist": 2.0}, 3.0),
        (["--method", "dkd", "--loss", "standardized_kl=2"], {"standardized_kl": 2.0}, 2.0),
        (["--loss", "standardized_kl=2", "--method", "dkd"], {"ce": 1.0, "dkd": 1.0}, 4.0),  # the later one counts
        (["--loss", "ce=1", "dist=2", "--loss-options", "dist.temperature=9"], {"ce": 1.0, "dist": 2.0}, 9.0),
    ],
)
def test_weights_and_temperature_of_the_flags(flags, weights, temperature):
    args = build_parser().parse_args(flags)
    found, options, labelled = check_loss(args)
    assert found == weights
    assert {options[f"{term}.temperature"] for term in terms_on(found, "logits") if term != "hard"} <= {temperature}
    assert labelled is True and settle_flags(args, found, labelled).select_metric == "accuracy"


def test_attention_alone_needs_no_head():
    args = build_parser().parse_args(
        ["--loss", "attention=1000", "--student-layer", "layer2", "--teacher-layer", "layer2"]
    )
    weights, _, labelled = check_loss(args)
    assert labelled is False and settle_flags(args, weights, labelled).select_metric == "distillation_loss"


def test_the_terms_on_logits():
    assert tuple(terms_on(TERMS, "logits")) == LOGIT_TERMS


# ----------------------------------------------------------------------------------------------------------- scripts


FLAGS = ["--resolution", 8, "--batch-size", 32, "--limit-train", 160, "--epochs", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("logits") / "all"
    succeed(
        "extract_embeddings.py",
        "--checkpoint",
        teacher / "best.pth",
        "--save-logits",
        "--device",
        "cpu",
        "--augment",
        "none",
        "--output",
        folder,
    )
    return folder


def read(folder):
    return json.loads((folder / "metrics.json").read_text())[0]


def batches(loss, *columns):
    """Mean over images of a loss of batches of 32, in order; the last is smaller."""
    count = len(columns[0])
    parts = [[column[start : start + 32] for column in columns] for start in range(0, count, 32)]
    return sum(loss(*part) * len(part[0]) for part in parts) / count


@pytest.mark.parametrize(
    "method, by_hand",
    [
        ("dkd", lambda s, t, labels: dkd_by_hand(s, t, labels, 4.0, 1.0, 8.0)),
        ("dist", lambda s, t, _: 2 * dist_by_hand(s, t, 1.0, 1.0, 1.0, 0.1)),  # an epoch leaves it rather flat
        ("logit_standardization", lambda s, t, _: 9 * standardized_by_hand(s, t, 2.0)),
        ("hard", lambda s, t, _: 0.5 * hard_by_hand(s, t)),
        ("pld", pld_by_hand),
    ],
)
def test_methods_of_logits_live_and_stored(extracted, teacher, tmp_path, method, by_hand):
    """The same losses on plain images, up to float16; val's distillation loss is the formula on what the run wrote."""
    flags = [
        *FLAGS,
        "--lr",
        0.01,
        "--method",
        method,
        "--select-metric",
        "distillation_loss",
    ]  # small steps: rounding must not grow
    succeed(
        "distill.py",
        *flags,
        "--dataset",
        "digits",
        "--augment",
        "none",
        "--teacher-checkpoint",
        teacher / "best.pth",
        "--output",
        tmp_path / "live",
    )
    succeed("distill.py", *flags, "--teacher-embeddings", extracted, "--output", tmp_path / "stored")
    live, stored = (read(tmp_path / name) for name in ("live", "stored"))
    weights = loss_settings(method)[0]
    for key in ("loss", *weights):
        assert live[f"train_{key}"] == pytest.approx(stored[f"train_{key}"], rel=0.02), key
    assert live["train_loss"] == pytest.approx(
        sum(weight * live[f"train_{key}"] for key, weight in weights.items()), rel=1e-4
    )
    written = np.load(tmp_path / "stored/predictions_val.npz", allow_pickle=False)
    ids, taught = (np.load(extracted / f"val_embeddings/{name}.npy", allow_pickle=False) for name in ("ids", "logits"))
    rows = [ids.tolist().index(name) for name in written["ids"]]
    expected = batches(
        by_hand, written["logits"].astype(np.float64), taught[rows, 0].astype(np.float64), written["labels"]
    )
    assert stored["val_distillation_loss"] == pytest.approx(expected, rel=1e-3)


def test_attention_teaches_with_and_without_labels(teacher, tmp_path):
    flags = [
        *SMALL,
        "--epochs",
        1,
        "--method",
        "attention",
        "--student-layer",
        "layer2",
        "layer3",
        "--teacher-layer",
        "layer2",
        "layer3",
        "--teacher-checkpoint",
        teacher / "best.pth",
    ]
    succeed("distill.py", *flags, "--output", tmp_path / "a")
    row = read(tmp_path / "a")
    assert row["train_attention"] > 0 and row["train_loss"] == pytest.approx(
        row["train_ce"] + 1000 * row["train_attention"], rel=1e-4
    )
    succeed("distill.py", *flags, "--loss", "attention=1000", "--output", tmp_path / "b")
    row = read(tmp_path / "b")
    assert "val_accuracy" not in row and "train_ce" not in row and 0 < row["val_distillation_loss"] < 1000


def test_warm_up_by_epoch(teacher, tmp_path):
    flags = [
        *SMALL,
        "--epochs",
        3,
        "--method",
        "dkd",
        "--distillation-warmup-epochs",
        2,
        "--teacher-checkpoint",
        teacher / "best.pth",
    ]
    succeed("distill.py", *flags, "--output", tmp_path / "a")
    rows = json.loads((tmp_path / "a" / "metrics.json").read_text())
    for row, share in zip(rows, (0.5, 1, 1), strict=True):
        assert (
            row["train_loss"] == pytest.approx(row["train_ce"] + share * row["train_dkd"], rel=1e-5)
            and row["train_dkd"] > 0.1
        )
    done = run_script("distill.py", *flags, "--distillation-warmup-epochs", 3.5, "--output", tmp_path / "b")
    assert (
        done.returncode == 2
        and "--distillation-warmup-epochs 3.5 is longer than --epochs 3" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
    assert not (tmp_path / "b").exists()


def test_stores_without_maps_or_logits_are_refused(extracted, teacher, tmp_path):
    run = ["--output", tmp_path / "run"]
    plain = tmp_path / "plain"
    succeed(
        "extract_embeddings.py",
        "--checkpoint",
        teacher / "best.pth",
        "--device",
        "cpu",
        "--augment",
        "none",
        "--output",
        plain,
    )
    for flags, words in (
        (
            ["--teacher-embeddings", extracted, "--method", "attention"],
            "a store holds no feature maps, which the loss ce=1 attention=1000 compares",
        ),
        (["--teacher-embeddings", plain, "--method", "dist"], "--save-logits"),
    ):
        done = run_script("distill.py", *FLAGS, *flags, *run)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_distilled_deit_s_second_head_learns_from_the_teacher(tmp_path):
    """Touvron et al. 2021: cross-entropy at the class token's head, the teacher's class at the distillation token's;
    prediction is the mean of both."""
    model = build_model("deit_tiny_distilled_patch16_224", 5, 32)
    images, teacher = {"image": torch.randn(4, 3, 32, 32)}, {"logits": torch.randn(4, 5)}
    labels = torch.tensor([0, 1, 2, 3])
    together = model.train()(images)
    assert "distilled" not in together  # of a student alone
    model.split_heads()
    out = model.train()(images)
    mean = (out["logits"] + out["distilled"]) / 2
    assert torch.allclose(together["logits"], mean, atol=1e-5) and torch.allclose(
        model.eval()(images)["logits"], mean, atol=1e-5
    )
    loss = DistillationLoss({"ce": 0.5, "hard": 0.5})(model.train()(images), teacher, labels)
    expected = 0.5 * F.cross_entropy(out["logits"], labels) + 0.5 * F.cross_entropy(
        out["distilled"], teacher["logits"].argmax(1)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    heads = model.backbone.head.weight, model.backbone.head_dist.weight
    gradients = torch.autograd.grad(loss, heads)
    for head, part in zip(heads, gradients):
        assert part.abs().sum() > 0 and part.shape == head.shape
    only = torch.autograd.grad(F.cross_entropy(model.train()(images)["logits"], labels), heads, allow_unused=True)
    assert only[1] is None


def test_distill_splits_the_heads_of_a_deit(tmp_path, teacher, monkeypatch):
    seen = []
    monkeypatch.setattr(ImageModel, "split_heads", lambda self: seen.append(self.name))
    flags = [*SMALL, "--model", "deit_tiny_distilled_patch16_224", "--resolution", 32, "--epochs", 1, "--dry-run"]
    flags += ["--teacher-checkpoint", teacher / "best.pth", "--output", tmp_path / "run"]
    succeed("distill.py", *flags, "--method", "hard")
    assert seen == ["deit_tiny_distilled_patch16_224"]
    succeed("distill.py", *flags, "--loss", "kl=1")
    assert len(seen) == 1  # without labels nothing would train the other head
