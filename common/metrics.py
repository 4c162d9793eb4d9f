"""Metrics of classification, calibration and fidelity.  Needs numpy and scikit-learn and no other file of `common`.

Inputs are numpy arrays: logits (N, C) float, labels (N,) int.  Everything is computed from float64 log-softmax, so
logits and log-probabilities give the same values.  Fractions, not per cent; a metric that is undefined is None.
"""

import numpy as np
from sklearn import metrics as sk

CLASSIFICATION = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "top5_accuracy", "loss", "ece")
FIDELITY = ("agreement", "teacher_right_kept", "teacher_kl")
LOWER_IS_BETTER = {"loss", "ece", "teacher_kl"}


def log_softmax(logits):
    """(N, C) -> (N, C) float64; rows that hold NaN or infinity become NaN."""
    logits = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def finite_or_none(values):
    """{name: number or None} with None for what is not finite: a model that overflows must not end a run."""
    return {name: value if value is not None and np.isfinite(value) else None for name, value in values.items()}


def classification(logits, labels):
    """All metrics of one task: {name: float or None}.

    loss: mean negative log-likelihood in nats; top5_accuracy: from ten classes on; balanced_accuracy: mean recall of
    the classes that occur; macro_f1: mean over the classes that occur or are predicted; auc: one-against-rest area
    under the ROC curve, mean over the classes that have both kinds; ece: see `expected_calibration_error`.
    """
    labels, log_probabilities = np.asarray(labels), log_softmax(logits)
    probabilities, predicted = np.exp(log_probabilities), np.asarray(logits).argmax(1)
    rows = np.arange(len(labels))
    recalls = [np.mean(predicted[labels == c] == c) for c in np.unique(labels)]
    result = {
        "accuracy": float(np.mean(predicted == labels)),
        "balanced_accuracy": float(np.mean(recalls)),
        "macro_f1": float(sk.f1_score(labels, predicted, average="macro", zero_division=0)),
        "auc": one_against_rest_auc(log_probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
        "loss": float(-np.mean(log_probabilities[rows, labels])),
    }
    if logits.shape[1] >= 10:
        top5 = np.argpartition(-np.asarray(logits), 5, axis=1)[:, :5]
        result["top5_accuracy"] = float(np.mean((top5 == labels[:, None]).any(1)))
    return finite_or_none(result)


def one_against_rest_auc(scores, labels):
    """Mean over classes of the area under the ROC curve; scores (N, C) are logits or log-probabilities.

    Samples are ranked by log-odds, as by probability but without its ties near 1.  Classes with one kind only are left
    out; None where none is left or the scores hold NaN.
    """
    log_probabilities = log_softmax(scores)
    if np.isnan(log_probabilities).any():
        return None
    log_odds, areas = np.nan_to_num(class_log_odds(log_probabilities)), []  # of a probability of exactly 0 or 1: inf
    for c in range(log_odds.shape[1]):
        positive = labels == c
        if positive.any() and not positive.all():
            areas.append(sk.roc_auc_score(positive, log_odds[:, c]))
    return float(np.mean(areas)) if areas else None


def class_log_odds(log_probabilities):
    """log p - log(1 - p) of each class, (N, C) float64.

    1 - p of the likeliest class is the sum of the others: from p itself it would be 0 beyond a margin of 37.
    """
    rows, likeliest = np.arange(len(log_probabilities)), log_probabilities.argmax(1)
    others = log_probabilities.copy()
    others[rows, likeliest] = -np.inf
    log_odds = others - np.log1p(-np.minimum(np.exp(others), 0.5))  # they have p <= 1/2
    log_odds[rows, likeliest] = log_probabilities[rows, likeliest] - np.logaddexp.reduce(others, axis=1)
    return log_odds


def expected_calibration_error(probabilities, labels, bins=15):
    """Mean gap between confidence and accuracy over equal-width bins, weighted by their counts.

    Guo et al. 2017, arXiv:1706.04599, 15 bins, (low, high] as there.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    which = np.clip(np.ceil(np.nan_to_num(confidence) * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def confusion_matrix(logits, labels):
    """(C, C) int64 counts: rows are the true classes, columns the predicted ones."""
    return sk.confusion_matrix(labels, np.asarray(logits).argmax(1), labels=np.arange(logits.shape[1]))


def fidelity(student_logits, teacher_logits, labels=None):
    """How the student follows the teacher: {name: float or None}.

    agreement: share of equal predictions; teacher_kl: mean KL(teacher || student) in nats at temperature 1;
    teacher_right_kept: share of the teacher's right answers that the student also gives (with labels).
    """
    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    same = np.asarray(student_logits).argmax(1) == np.asarray(teacher_logits).argmax(1)
    result = {
        "agreement": float(np.mean(same)),
        "teacher_kl": float(np.mean((np.exp(teacher) * (teacher - student)).sum(1))),
    }
    if labels is not None:
        right = np.asarray(teacher_logits).argmax(1) == labels
        result["teacher_right_kept"] = float(np.mean(same[right])) if right.any() else None
    return finite_or_none(result)


def better(name, value, best):
    """Whether `value` of metric `name` beats `best`; an undefined or non-finite value never does and always loses."""
    if value is None or not np.isfinite(value):
        return False
    if best is None or not np.isfinite(best):
        return True
    return value < best if name in LOWER_IS_BETTER else value > best
