"""Metrics against scikit-learn and against numbers worked out by hand."""

import itertools
import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import metrics as sk

from common.metrics import (
    CLASSIFICATION,
    FIDELITY,
    bootstrap,
    class_recalls,
    classification,
    confusion_matrix,
    expected_calibration_error,
    fidelity,
    log_softmax,
    ranking,
    weighing,
)
from common.run import LOWER_IS_BETTER, UserError, better
from common.teacher import chance_auc, check_teacher, judge_teacher


def make(samples=400, classes=12, seed=0, scale=2.0):
    """Unbalanced labels and logits that know something of them."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.25, samples) - 1, classes - 1)
    logits = rng.normal(size=(samples, classes)) * scale
    logits[np.arange(samples), labels] += 1.5
    return logits, labels


def softmax(logits):
    exps = np.exp(logits - logits.max(1, keepdims=True))
    return exps / exps.sum(1, keepdims=True)


def logits_of(predictions, classes):
    """Logits that predict these classes."""
    return np.eye(classes)[np.asarray(predictions)] * 3.0


def auc_by_pairs(scores, positive):
    """Share of (positive, negative) pairs in the right order, ties half."""
    higher = scores[positive][:, None] - scores[~positive][None]
    return float(np.mean((higher > 0) + 0.5 * (higher == 0)))


# ------------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_against_scikit_learn(dtype):
    logits, labels = make()
    logits = logits.astype(dtype)
    exact = logits.astype(np.float64)
    probabilities, predicted = softmax(exact), exact.argmax(1)
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "macro_f1": sk.f1_score(labels, predicted, average="macro"),
        "quadratic_kappa": sk.cohen_kappa_score(labels, predicted, weights="quadratic"),
        "auc": sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
        "loss": sk.log_loss(labels, probabilities),
        "top5_accuracy": sk.top_k_accuracy_score(labels, exact, k=5, labels=np.arange(12)),
    }
    got = classification(logits, labels)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert set(got) - set(expected) == {"ece", "average_precision", "pauc", "sensitivity_at_90_specificity"}
    assert all(type(value) is float for value in got.values())
    json.dumps(got, allow_nan=False)


def test_worked_by_hand():
    """True 0 0 0 1 1 2, predicted 0 0 1 1 2 2."""
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), [0, 0, 1, 1, 2, 2]
    logits = logits_of(predicted, 3)
    assert confusion_matrix(logits, labels).tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    got = classification(logits, labels)
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert got["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    f1 = [2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1 + 1), 2 * 1 / (2 * 1 + 1)]  # 2 TP / (2 TP + FP + FN)
    assert got["macro_f1"] == pytest.approx(sum(f1) / 3)
    # squared distances: two errors by one grade are 2, and by chance those of all pairs of a true and a predicted class
    chance = sum((i - j) ** 2 * true * said for i, true in enumerate((3, 2, 1)) for j, said in enumerate((2, 2, 2))) / 6
    assert got["quadratic_kappa"] == pytest.approx(1 - 2 / chance)
    right, wrong = math.log(1 + 2 * math.exp(-3)), 3 + math.log(1 + 2 * math.exp(-3))
    assert got["loss"] == pytest.approx((4 * right + 2 * wrong) / 6)
    assert "top5_accuracy" not in got


def test_accuracy_of_the_majority_is_not_balanced():
    labels = np.array([0] * 93 + [1] * 7)
    got = classification(logits_of(np.zeros(100, int), 2), labels)
    assert got["accuracy"] == pytest.approx(0.93) and got["balanced_accuracy"] == pytest.approx(0.5)
    assert got["auc"] == pytest.approx(0.5), "all alike: every pair is a tie"
    assert got["macro_f1"] == pytest.approx((2 * 93 / (2 * 93 + 7) + 0) / 2)


def test_top5_by_hand():
    """Rank of the true class: 1, 5, 6, 10; from ten classes on."""
    order = np.arange(10, 0, -1.0)
    logits = np.tile(order, (4, 1))
    labels = np.array([0, 4, 5, 9])
    assert classification(logits, labels)["top5_accuracy"] == 0.5
    assert classification(logits[:, ::-1], labels)["top5_accuracy"] == 0.5
    assert "top5_accuracy" not in classification(logits[:, :9], np.array([0, 4, 5, 8]))


def test_confusion_matrix_has_all_classes():
    matrix = confusion_matrix(logits_of([3, 3], 5), np.array([1, 1]))
    assert matrix.shape == (5, 5) and matrix.dtype.kind == "i" and matrix[1, 3] == 2 and matrix.sum() == 2


def test_absent_classes():
    """Class 2 of 3 never occurs; it may be predicted."""
    labels = np.array([0, 0, 1, 1])
    logits = np.array([[2.0, 0, 0], [0, 0, 2.0], [0, 2.0, 0], [0, 2.0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = classification(logits, labels)
    assert got["balanced_accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert got["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3), "class 2 is predicted, wrongly: F1 of 0"
    # class 0: positives have p of .787 and .107, negatives .107 twice: 1, 1, tie, tie; class 1 is in perfect order
    assert got["auc"] == pytest.approx((0.75 + 1) / 2)
    one_kind = classification(logits[:2], labels[:2])
    assert one_kind["auc"] is None and one_kind["balanced_accuracy"] == 0.5


def test_overflowed_logits_are_undefined_and_raise_nothing():
    """A run whose loss became NaN must reach its own message, not scikit-learn's complaint."""
    logits, labels = make(20)
    for bad in (np.nan, np.inf):
        broken = logits.copy()
        broken[3, 1] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got, follows = classification(broken, labels), fidelity(broken, logits, labels)
        assert got["auc"] is got["ece"] is got["loss"] is follows["teacher_kl"] is None
        assert 0 <= got["accuracy"] <= 1 and 0 <= follows["agreement"] <= 1


# ------------------------------------------------------------------------------------------------------------------ AUC


def test_auc_counts_pairs():
    logits, labels = make(120, 5, seed=3)
    probabilities = softmax(logits)
    expected = np.mean([auc_by_pairs(probabilities[:, c], labels == c) for c in range(5)])
    assert ranking(logits, labels)["auc"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_auc_of_certain_models_has_no_ties(classes):
    """Margins of 20 to 80 are all probability 1 in float32, and from 37 on in float64; the logits still rank them."""
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    logits = np.zeros((8, classes), np.float32)
    logits[:, 0] = [80, 60, 50, 45, 44, 43, 30, 20]
    assert np.all(softmax(logits.astype(np.float32))[:, 0] == 1)
    assert np.all(softmax(logits.astype(np.float64))[:6, 0] == 1)
    assert auc_by_pairs(softmax(logits)[:, 0], labels == 0) == 0.5
    for scores in (logits, log_softmax(logits), logits + 1000, logits.astype(np.float64)):
        got = ranking(scores, labels)["auc"]
        if classes == 2:
            assert got == 1  # class 1 is ranked the other way round, as well perfectly
        else:
            assert got == pytest.approx((1 + 1) / 2)
    logits[3, 0], logits[4, 0] = 44, 45  # one pair of sixteen in the wrong order
    assert ranking(logits, labels)["auc"] == pytest.approx(15 / 16)


def test_logits_and_log_probabilities_give_the_same():
    logits, labels = make(300, 10, seed=5, scale=6)
    for a, b in ((logits, log_softmax(logits)), (logits, np.log(softmax(logits))), (logits, logits - 50)):
        assert classification(a, labels) == pytest.approx(classification(b, labels), rel=1e-9)
        assert fidelity(a, logits[::-1], labels) == pytest.approx(fidelity(b, logits[::-1], labels), rel=1e-9)


# ------------------------------------------------------------------------------------------------------------------ ECE


def test_ece_by_hand():
    """Of ten samples: five at 0.80 (bin 12), three right: gap .2; four at 0.55 (bin 9), all right: gap .45; one at
    0.99 (bin 15), wrong: gap .99.  (5 * .2 + 4 * .45 + .99) / 10."""
    confidence = np.array([0.8] * 5 + [0.55] * 4 + [0.99])
    labels = np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 1])
    probabilities = np.stack([confidence, 1 - confidence], 1)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.379)
    assert classification(np.log(probabilities), labels)["ece"] == pytest.approx(0.379)


def test_ece_bins():
    """(low, high]: 0.6 = 9 / 15 belongs with 0.59; within a bin gaps cancel, between bins they do not."""
    probabilities = np.array([[0.6, 0.4], [0.59, 0.41]])
    assert expected_calibration_error(probabilities, np.array([1, 0])) == pytest.approx(abs(1 - 1.19) / 2)
    for low, high in ((0.59, 0.61), (0.61, 0.69)):  # on two sides of 9 / 15, of 10 / 15
        probabilities = np.array([[high, 1 - high], [low, 1 - low]])
        assert expected_calibration_error(probabilities, np.array([1, 0])) == pytest.approx((high + 1 - low) / 2)
    certain = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert expected_calibration_error(certain, np.array([0, 0])) == 0
    assert expected_calibration_error(certain, np.array([0, 1])) == 0.5


# ------------------------------------------------------------------------------------------------------------- fidelity


def test_fidelity_by_hand():
    labels = np.array([0, 1, 2, 0, 1])
    teacher = logits_of([0, 1, 2, 1, 0], 3)  # right on the first three
    student = logits_of([0, 1, 0, 0, 0], 3)  # agrees on 1, 2 and 5; keeps two of the three
    got = fidelity(student, teacher, labels)
    assert got["agreement"] == pytest.approx(3 / 5)
    assert got["teacher_right_kept"] == pytest.approx(2 / 3)
    assert "teacher_right_kept" not in fidelity(student, teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fidelity(student, logits_of([1, 0, 0, 1, 0], 3), labels)["teacher_right_kept"] is None
    assert fidelity(teacher, teacher, labels) == {"agreement": 1.0, "teacher_kl": 0.0, "teacher_right_kept": 1.0}


def test_kl_is_from_teacher_to_student():
    teacher, student = np.log([[0.9, 0.1], [0.5, 0.5]]), np.log([[0.5, 0.5], [0.5, 0.5]])
    forward = (0.9 * math.log(1.8) + 0.1 * math.log(0.2)) / 2  # mean over the samples, sum over the classes
    assert fidelity(student, teacher)["teacher_kl"] == pytest.approx(forward)
    assert fidelity(teacher, student)["teacher_kl"] == pytest.approx((0.5 * math.log(5 / 9) + 0.5 * math.log(5)) / 2)
    far = fidelity(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]]))
    assert far == {"agreement": 0.0, "teacher_kl": 1e4}
    never = fidelity(np.array([[0.0, 0.0, 0.0]]), np.array([[0.0, 0.0, -math.inf]]))
    assert never["teacher_kl"] == pytest.approx(math.log(3 / 2))  # ln 3 - ln 2: the class that cannot be costs nothing


# --------------------------------------------------------------------------------------------------------------- better


def test_better():
    for name in ("accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "auc", *FIDELITY[:2]):
        assert better(name, 0.6, 0.5) and not better(name, 0.5, 0.6)
    for name in ("loss", "ece", "teacher_kl"):
        assert better(name, 0.5, 0.6) and not better(name, 0.6, 0.5)
    for name in ("accuracy", "loss"):
        assert not better(name, 0.5, 0.5), "no gain"
        assert better(name, 0.0, None), "zero is a value"
        for nothing in (None, math.nan, math.inf, -math.inf):
            assert not better(name, nothing, None) and not better(name, nothing, 0.5)
            assert better(name, 0.5, nothing), "an undefined first epoch must not stay the best"


def test_the_lists_of_metrics_are_complete():
    logits, labels = make(50)
    assert {*classification(logits, labels)} == {*CLASSIFICATION}
    assert {*fidelity(logits, logits, labels)} == {*FIDELITY}
    assert LOWER_IS_BETTER < {*CLASSIFICATION, *FIDELITY, "distillation_loss"}  # the last is the run's own


@pytest.mark.parametrize("counts", [(930, 7), (20, 20, 20), (400, 60, 6)])
def test_guesses_stay_below_the_auc_of_chance(counts):
    """Two standard deviations: of two classes 2.3 % of guesses pass, of more, whose scores do not depend on each other,
    fewer."""
    labels = np.repeat(np.arange(len(counts)), counts)
    rng = np.random.default_rng(0)
    aucs = []
    for c, n in list(enumerate(counts))[len(counts) == 2 :]:
        ranks = rng.random((2000, len(labels))).argsort(1).argsort(1) + 1
        aucs.append((ranks[:, labels == c].sum(1) - n * (n + 1) / 2) / (n * (len(labels) - n)))
    above = np.mean(np.mean(aucs, 0) > chance_auc(labels))
    assert (0.012 if len(counts) == 2 else 0) <= above < 0.035


def test_the_auc_of_chance_by_all_orders():
    """Two against three: the variance over all ten ways to order them; one class alone says nothing."""
    aucs = [
        np.mean([[i > j for j in range(5) if j not in ones] for i in ones])
        for ones in itertools.combinations(range(5), 2)
    ]
    assert len(aucs) == 10 and np.mean(aucs) == pytest.approx(0.5)
    assert chance_auc(np.array([0, 1, 0, 1, 0])) == pytest.approx(0.5 + 2 * np.std(aucs))
    assert chance_auc(np.ones(9, int)) == math.inf


def test_a_teacher_is_judged_by_its_ranking():
    """Under imbalance it names one class alone, balanced accuracy 0.5, and still ranks: AUC 0.75 is accepted, 0.5
    refused."""
    labels = np.array([0] * 380 + [1] * 20)
    positive = np.where(
        labels == 1, np.tile([1.0, 3.0], 200), np.arange(400) / 400 * 2
    )  # half of the positives above all negatives
    found = classification(np.stack([np.full(400, 9.0), positive], 1), labels)
    assert found["balanced_accuracy"] == 0.5 and found["auc"] == pytest.approx(sk.roc_auc_score(labels, positive))
    assert f"in organ AUC {found['auc']:.4f}" in check_teacher(found["auc"], labels, False, "in organ ")
    for auc in (0.5, 0.1, None):
        with pytest.raises(UserError, match="in organ no better than chance") as caught:
            check_teacher(auc, labels, False, "in organ ")
        assert auc is None or f"AUC {auc:.4f}, guessing gives up to 0.63" in str(caught.value)
        assert check_teacher(auc, labels, True)
    assert "too few" in check_teacher(1.0, np.array([0, 0, 1]), False), "perfect, but guessing does it in one of three"


def test_each_task_of_a_teacher_is_judged():
    rng, labels = np.random.default_rng(0), np.arange(200) % 2
    logits = {"organ": np.stack([1.0 - labels, labels], 1), "sign": rng.normal(size=(200, 2))}
    splits = SimpleNamespace(
        val=SimpleNamespace(targets=dict.fromkeys(logits, labels)),
        classes={"organ": ["a", "b"], "sign": ["c", "d"]},
        positive={"organ": 1, "sign": 1},
    )
    source = SimpleNamespace(title="teacher", described={}, model=None)
    with pytest.raises(UserError, match="in sign no better than chance"):
        judge_teacher(source, logits, splits, None, False)
    text = judge_teacher(source, {**logits, "sign": logits["organ"]}, splits, None, False)
    assert "in organ AUC 1.0000" in text and "in sign AUC 1.0000" in text


# --------------------------------------------------------------------------------------------------------- imbalance


def two_classes(count=600, share=0.07, seed=3):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < share).astype(int)
    logits = rng.normal(size=(count, 2))
    logits[:, 1] += 1.5 * labels - 2
    return logits, labels


def official_pauc(labels, scores, min_tpr=0.8):
    """The ISIC 2024 challenge's score, by its description: the area between the curve and the line at 80 % TPR.

    Worked out on the unflipped curve, one threshold after another: width in (1 - FPR) above the line.
    """
    thresholds = np.sort(np.unique(scores))[::-1]
    points = [(0.0, 0.0)] + [(np.mean(scores[labels == 0] >= t), np.mean(scores[labels == 1] >= t)) for t in thresholds]
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        low, high = max(y0, min_tpr), max(y1, min_tpr)  # the part of this step above the line
        if high > low:
            at = lambda y: x0 + (x1 - x0) * (y - y0) / (y1 - y0)  # noqa: E731, B023
            area += (high - low) * (1 - (at(low) + at(high)) / 2)
    return area


def test_pauc_against_its_description_and_scikit_learn():
    for seed in range(5):
        logits, labels = two_classes(seed=seed)
        margin = logits[:, 1] - logits[:, 0]
        got = classification(logits, labels)["pauc"]
        assert got == pytest.approx(official_pauc(labels, margin), abs=1e-12)
        scaled = sk.roc_auc_score(1 - labels, -margin, max_fpr=0.2)  # McClish's standardized form of the same area
        assert got == pytest.approx(0.02 + (scaled - 0.5) / 0.5 * (0.2 - 0.02))
        assert got != pytest.approx(sk.roc_auc_score(labels, margin, max_fpr=0.2), abs=1e-3)  # another metric


def test_pauc_of_perfect_and_worst_and_tied_scores():
    labels = np.array([0] * 90 + [1] * 10)
    for scores, expected in ((labels, 0.2), (1 - labels, 0.0), (np.zeros(100), 0.02)):
        assert ranking(np.stack([-scores, scores], 1).astype(float), labels)["pauc"] == pytest.approx(expected)


def test_ranking_of_logits_and_probabilities_is_the_same():
    """Raw logits put through 1 - score gave 0.0138 instead of 0.1576 in published code; certain models tie in float."""
    logits, labels = two_classes()
    for values in (logits, logits * 30):
        from_logits, from_probabilities = ranking(values, labels), ranking(np.log(softmax(values)), labels)
        assert from_logits == pytest.approx(from_probabilities, abs=1e-9)
    assert ranking(logits * 30, labels) == pytest.approx(ranking(logits, labels))
    assert 0.02 < ranking(logits, labels)["pauc"] < 0.2


def test_ranking_against_scikit_learn():
    logits, labels = two_classes()
    margin, got = logits[:, 1] - logits[:, 0], ranking(logits, labels)
    assert got["average_precision"] == pytest.approx(sk.average_precision_score(labels, margin))
    assert got["auc"] == pytest.approx(sk.roc_auc_score(labels, margin))
    negatives = np.sort(margin[labels == 0])
    assert all(
        np.mean(negatives < t) < 0.9 or np.mean(margin[labels == 1] >= t) <= got["sensitivity_at_90_specificity"]
        for t in margin
    )
    t = negatives[
        int(np.ceil(0.9 * len(negatives))) - 1
    ]  # at least 90 % of the negatives are below all that count as positive
    assert got["sensitivity_at_90_specificity"] == pytest.approx(np.mean(margin[labels == 1] > t))
    logits, labels = make(classes=4)
    expected = [sk.average_precision_score(labels == c, softmax(logits)[:, c]) for c in range(4)]
    assert ranking(logits, labels)["average_precision"] == pytest.approx(np.mean(expected))


def test_the_positive_class_may_be_the_first():
    """Cancer before normal in the alphabet: what is asked of cancer, by scikit-learn on its own margin and share."""
    logits, labels = two_classes()
    cancer, margin = labels == 0, logits[:, 0] - logits[:, 1]
    got, other = classification(logits, labels, positive=0), classification(logits, labels)
    assert (
        got["average_precision"] == pytest.approx(sk.average_precision_score(cancer, margin))
        and got["average_precision"] > other["average_precision"] + 0.1
    )
    assert got["pauc"] == pytest.approx(official_pauc(cancer.astype(int), margin), abs=1e-12)
    t = np.sort(margin[~cancer])[int(np.ceil(0.9 * (~cancer).sum())) - 1]
    assert got["sensitivity_at_90_specificity"] == pytest.approx(np.mean(margin[cancer] > t))
    assert got["auc"] == pytest.approx(other["auc"]) and got["accuracy"] == other["accuracy"]
    swapped = classification(logits[:, ::-1], 1 - labels)
    assert got == pytest.approx(swapped, abs=1e-12)
    names = ("average_precision", "pauc")
    once = weighing(logits, labels, names, positive=0)(np.ones((len(labels), 1), np.int32))
    intervals = bootstrap(logits, labels, repeats=50, names=names, positive=0)
    for name in names:
        assert once[name][0] == pytest.approx(got[name], abs=1e-12)
        assert intervals[name][0] < got[name] < intervals[name][1]


def test_ranking_of_one_class_is_undefined():
    logits, _ = two_classes()
    assert set(ranking(logits, np.zeros(600, int)).values()) == {None}
    assert set(ranking(np.full((4, 2), np.nan), np.array([0, 1, 0, 1])).values()) == {None}


def test_class_recalls():
    logits, labels = make()
    expected = sk.recall_score(labels, logits.argmax(1), average=None, labels=np.unique(labels))
    got = class_recalls(logits, labels)
    assert [v for v in got if v is not None] == pytest.approx(list(expected))
    assert class_recalls(np.eye(3), np.array([0, 1, 1])) == [1.0, 0.5, None]


def test_bootstrap_resamples_groups():
    """Each sample ten times over: by groups the interval is that of the samples, by images far too narrow."""
    logits, labels = two_classes(count=300, share=0.3)
    single = bootstrap(logits, labels, repeats=400)
    copied = [np.repeat(a, 10, axis=0) for a in (logits, labels)]
    grouped = bootstrap(*copied, groups=np.repeat([f"p{i}" for i in range(300)], 10), repeats=400)
    naive = bootstrap(*copied, repeats=400)
    for name in ("auc", "balanced_accuracy", "average_precision", "pauc"):
        (low, high), exact = single[name], classification(logits, labels)[name]
        assert low < exact < high
        assert high - low == pytest.approx(grouped[name][1] - grouped[name][0], rel=0.2)
        assert naive[name][1] - naive[name][0] < 0.5 * (high - low)
    assert bootstrap(logits, labels, repeats=50) == bootstrap(logits, labels, repeats=50)
    assert bootstrap(logits, np.zeros(300, int), repeats=50)["auc"] is None


RESAMPLED = ("accuracy", "balanced_accuracy", "auc", "average_precision", "pauc", "sensitivity_at_90_specificity")


def cases_to_resample():
    """{name: (logits, labels, groups)}"""
    rng = np.random.default_rng(1)
    logits, labels = two_classes(count=150, share=0.2)
    seven, of_seven = make(200, 7, seed=2)
    tied = np.round(rng.normal(size=(120, 2)), 0) + 0.5  # a handful of different scores
    rare, of_rare = make(40, 4, seed=4)
    certain = np.where(rng.random((60, 3)) < 0.2, -np.inf, 40 * np.round(rng.normal(size=(60, 3)), 0))
    certain[:, 0] = np.maximum(
        certain[:, 0], -80
    )  # a class of probability 0 is a score; a row of nothing else is broken
    return {
        "two": (logits, labels, None),
        "seven": (seven, of_seven, None),
        "groups": (seven, of_seven, rng.integers(60, size=200)),
        "half precision": (seven.astype(np.float16), of_seven, None),
        "ties": (tied, rng.integers(2, size=120), None),
        "all tied": (np.zeros((50, 3)), rng.integers(3, size=50), None),
        "ties of seven": (np.round(seven), of_seven, np.array([f"p{i}" for i in rng.integers(90, size=200)])),
        "more positives": (logits, 1 - labels, None),
        "a class absent": (rare, np.where(of_rare == 2, 0, of_rare), None),
        "one kind": (logits, np.ones(150, int), None),
        "few": (np.eye(3)[[0, 1, 1, 2]], np.array([0, 1, 2, 0]), None),
        "groups of one class": (logits, labels, labels * 3 + np.arange(150) % 3),
        "probabilities of 0": (certain, rng.integers(3, size=60), None),
    }


@pytest.mark.parametrize("case", cases_to_resample())
def test_weights_are_the_resamples(case):
    """One pass over weights gives what scikit-learn gives for each resample written out."""
    logits, labels, groups = cases_to_resample()[case]
    rng, groups = np.random.default_rng(0), np.arange(len(labels)) if groups is None else groups
    names = np.unique(groups)
    resamples = []
    for _ in range(40):
        drawn = names[rng.integers(len(names), size=len(names))]
        resamples.append(np.concatenate([np.flatnonzero(groups == name) for name in drawn]))
    weights = np.stack([np.bincount(rows, minlength=len(labels)) for rows in resamples], 1).astype(np.int32)
    expected = []
    for rows in resamples:
        got = ranking(log_softmax(logits)[rows], labels[rows])
        got["accuracy"] = sk.accuracy_score(labels[rows], logits[rows].argmax(1))
        kinds = np.unique(labels[rows])
        got["balanced_accuracy"] = sk.recall_score(
            labels[rows], logits[rows].argmax(1), average="macro", labels=kinds, zero_division=0
        )
        expected.append(got)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = weighing(logits, labels, RESAMPLED)(weights)
        intervals = bootstrap(logits, labels, groups, repeats=40, names=RESAMPLED)
    for name in RESAMPLED:
        values = np.array([row[name] for row in expected], float)  # None is NaN
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-12, err_msg=name)
        values = values[np.isfinite(values)]
        assert (intervals[name] is None) == (len(values) < 20)
        if len(values) >= 20:  # the same draws
            np.testing.assert_allclose(intervals[name], np.percentile(values, (2.5, 97.5)), rtol=0, atol=1e-12)
    assert {*intervals} == {*RESAMPLED}


def test_bootstrap_in_parts():
    """More samples than fit at a time (2**21 weights) are the same draws."""
    logits, labels = make(300_000, 2)
    rng = np.random.default_rng(0)
    values = [np.mean((logits.argmax(1) == labels)[rng.integers(300_000, size=300_000)]) for _ in range(20)]
    got = bootstrap(logits, labels, repeats=20, names=("accuracy",))["accuracy"]
    assert got == pytest.approx(list(np.percentile(values, (2.5, 97.5))), abs=1e-12)


def test_bootstrap_of_overflowed_logits():
    """A row without scores spoils the ranking of the resamples that hold it: 63 of 100; the accuracies stay."""
    logits, labels = make(200, 3)
    logits[5, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bootstrap(logits, labels, repeats=50)
    assert found["auc"] is found["pauc"] is found["average_precision"] is None
    assert found["accuracy"][0] < np.mean(logits.argmax(1) == labels) < found["accuracy"][1]


def test_bootstrap_width_is_that_of_theory():
    """The standard error of an accuracy on balanced classes is sqrt(p (1 - p) / n)."""
    rng = np.random.default_rng(0)
    labels = np.arange(1000) % 2
    predicted = np.where(rng.random(1000) < 0.8, labels, 1 - labels)
    low, high = bootstrap(logits_of(predicted, 2), labels, names=("balanced_accuracy",))["balanced_accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 1000), rel=0.1)
