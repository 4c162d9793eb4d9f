"""Metrics of classification, calibration and fidelity.

Needs numpy, for intervals the scipy that scikit-learn brings, and no other file of `common`.
Inputs are numpy arrays: logits (N, C) float, labels (N,) int.  Everything is computed from float64 log-softmax, so
logits and log-probabilities give the same values.  Fractions, not per cent; a metric that is undefined is None.
"""

import numpy as np

CLASSIFICATION = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "quadratic_kappa",
    "auc",
    "average_precision",
    "pauc",
    "sensitivity_at_90_specificity",
    "top5_accuracy",
    "loss",
    "ece",
)
FIDELITY = ("agreement", "teacher_right_kept", "teacher_kl")
RESAMPLED = ("accuracy", "balanced_accuracy", "auc", "average_precision", "pauc")  # metrics that get intervals


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) -> (N, C) float64; rows that hold NaN or infinity become NaN."""
    logits = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def finite_or_none(values: dict) -> dict:
    """{name: number or None} with None for what is not finite: a model that overflows must not end a run."""
    return {name: value if value is not None and np.isfinite(value) else None for name, value in values.items()}


def classification(logits: np.ndarray, labels: np.ndarray, positive: int = 1) -> dict:
    """All metrics of one task: {name: float or None}; positive: of two classes, the index of the positive one.

    loss: mean negative log-likelihood in nats; top5_accuracy: from ten classes on; balanced_accuracy: mean recall of
    the classes that occur; macro_f1: mean over the classes that occur or are predicted; quadratic_kappa: of grades, by
    the number of their class (Cohen 1968), None where all agree on one class; auc, average_precision, pauc,
    sensitivity_at_90_specificity: see `ranking`; ece: see `expected_calibration_error`.
    """
    labels, log_probabilities = np.asarray(labels), log_softmax(logits)
    counts = confusion_matrix(logits, labels)
    right, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    result = {
        "accuracy": float(right.sum() / len(labels)),
        "balanced_accuracy": float(np.mean(right[true > 0] / true[true > 0])),
        "macro_f1": float(np.mean(2 * right[true + predicted > 0] / (true + predicted)[true + predicted > 0])),
        "quadratic_kappa": quadratic_kappa(counts),
        **ranking(log_probabilities, labels, positive=positive),
        "ece": expected_calibration_error(np.exp(log_probabilities), labels),
        "loss": float(-np.mean(log_probabilities[np.arange(len(labels)), labels])),
    }
    if logits.shape[1] >= 10:
        top5 = np.argpartition(-np.asarray(logits), 5, axis=1)[:, :5]
        result["top5_accuracy"] = float(np.mean((top5 == labels[:, None]).any(1)))
    return finite_or_none(result)


def ranking(scores, labels, names=("auc", "average_precision", "pauc", "sensitivity_at_90_specificity"), positive=1):
    """Metrics of the order in which samples are ranked: {name: float or None}.

    scores: (N, C) logits or log-probabilities;
    auc: area under the ROC curve; average_precision: mean precision over the positives' ranks; pauc: area between the
    curve and the line of a true-positive rate of 0.8, from 0 to 0.2 (chance: 0.02), as the ISIC 2024 challenge defines
    it; sensitivity_at_90_specificity: the largest true-positive rate at a false-positive rate up to 0.1.
    Of two classes number `positive` is the positive one; of more, each stands against the rest, and the mean is over
    the classes that have both kinds.  Samples are ranked by log-odds, as by probability but without its ties near 1.
    None where no class has both kinds or the scores hold NaN.
    """
    log_odds, classes, broken = ranked_scores(scores, np.asarray(labels), positive)
    if broken.any():
        return dict.fromkeys(names)
    if not classes:
        return dict.fromkeys(names)
    by_class = [curve_metrics(*curve(labels == c, log_odds[:, c]), names) for c in classes]
    return {name: float(np.mean([values[name] for values in by_class])) for name in names}


def ranked_scores(scores, labels, positive=1):
    """What `ranking` ranks: log-odds (N, C), the classes that have both kinds, and which rows hold NaN (N,) bool."""
    log_probabilities = log_softmax(scores)
    broken = np.isnan(log_probabilities).any(1)
    log_probabilities[broken] = 0
    log_odds = np.nan_to_num(class_log_odds(log_probabilities))  # of a probability of exactly 0 or 1: inf
    classes = [positive] if log_odds.shape[1] == 2 else range(log_odds.shape[1])
    classes = [c for c in classes if 0 < np.count_nonzero(labels == c) < len(labels)]
    return log_odds, classes, broken


def curve(positive, scores):
    """(tps, fps), each (S, 1) float64: positives and negatives above falling thresholds, from none to all.

    positive (N,) bool; scores (N,).  Of the thresholds those at which the ROC curve can bend, beside positives' scores:
    a class with few positives takes one sort of numbers.
    """
    ours, others = np.sort(scores[positive]), np.sort(scores[~positive])
    values, counts = np.unique(ours, return_counts=True)
    counts = counts[::-1]
    tied, higher = (len(others) - np.searchsorted(others, values[::-1], side) for side in ("left", "right"))
    hits = np.cumsum(counts)
    tps = [0, *np.stack([hits - counts, hits], 1).flatten(), len(ours)]
    fps = [0, *np.stack([higher, tied], 1).flatten(), len(others)]
    return np.array(tps, np.float64)[:, None], np.array(fps, np.float64)[:, None]


def class_recalls(logits: np.ndarray, labels: np.ndarray) -> list:
    """Recall of each class (C floats); None for a class that does not occur."""
    labels, predicted = np.asarray(labels), np.asarray(logits).argmax(1)
    classes = range(np.shape(logits)[1])
    return [float(np.mean(predicted[labels == c] == c)) if (labels == c).any() else None for c in classes]


def resamples(count, groups=None, repeats=1000, seed=0):
    """Weights (N, R) int32, a part of the columns at a time: how often each of N = count samples is drawn.

    repeats: resamples in all; groups (N,): drawn whole, with replacement, as many as there are; None: samples are.
    """
    rng = np.random.default_rng(seed)
    _, group = np.unique(np.arange(count) if groups is None else np.asarray(groups), return_inverse=True)
    units, step = group.max() + 1, max(1, 2**21 // count)  # 8 MB of weights, and about ten arrays of up to twice that
    for start in range(0, repeats, step):
        drawn = [
            np.bincount(rng.integers(units, size=units), minlength=units) for _ in range(min(step, repeats - start))
        ]
        yield np.array(drawn, np.int32).T[group]


def bootstrap(*args, **options):
    """{name: `interval`} of the metrics that `resampled` gives of the same arguments."""
    return {name: interval(values) for name, values in resampled(*args, **options).items()}


def resampled(logits, labels, groups=None, repeats=1000, seed=0, names=RESAMPLED, positive=1):
    """Metrics of resamples with replacement (Efron 1979): {name: (repeats,) float64, NaN where a class is absent}.

    groups (N,): lesions or patients, drawn whole, since their images are not independent; None: samples.  The same are
    drawn for all logits and labels of these samples.  names, positive: see `weighing`.
    """
    weighed = weighing(logits, labels, names, positive)
    parts = [weighed(weights) for weights in resamples(len(labels), groups, repeats, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def interval(values):
    """95 % percentile interval [low, high] of a metric of resamples (R,); None where fewer than half have it."""
    finite = values[np.isfinite(values)]
    return [float(v) for v in np.percentile(finite, (2.5, 97.5))] if len(finite) >= len(values) / 2 else None


def weighing(logits, labels, names, positive=1):
    """A function of weights (N, R) int32, how often each sample occurs: {name: (R,) float64, NaN where undefined}.

    names: accuracy, balanced_accuracy and those of `ranking`; positive: see `ranking`.  Equal to `classification` of
    the samples repeated that often.  Each class is sorted once, here; what sums the weights is a sparse matrix.
    """
    labels, right = np.asarray(labels), np.asarray(logits).argmax(1) == labels
    class_number = np.unique(labels, return_inverse=True)[1]  # of the classes that occur
    curves = [name for name in names if not name.endswith("accuracy")]
    members, hits = sums(class_number, np.ones_like(right)), sums(class_number, right)
    log_odds, classes, broken = ranked_scores(log_softmax(logits), labels, positive) if curves else (None, (), None)
    thresholds = [bends(labels == c, log_odds[:, c]) for c in classes]  # the same ties as in `classification`

    def weighed(weights):
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0: no such sample is drawn
            present, correct = members @ weights, hits @ weights  # (classes that occur, R)
            result = {
                "accuracy": correct.sum(0) / present.sum(0),
                "balanced_accuracy": np.nanmean(correct / present, axis=0),
            }
            by_class = [curve_metrics(*(above(matrix @ weights) for matrix in pair), curves) for pair in thresholds]
            for name in curves:
                values = np.array([metrics[name] for metrics in by_class]).reshape(-1, weights.shape[1])
                mean = np.nansum(values, axis=0) / np.isfinite(values).sum(0)  # NaN where no class has both kinds
                result[name] = np.where(weights[broken].any(0), np.nan, mean)
        return {name: result[name] for name in names}

    return weighed


def sums(rows, chosen):
    """Sparse (rows, N) int32 matrix: for each row number in rows (N,) the sum of the samples that are chosen.

    chosen: (N,) bool.
    """
    from scipy import sparse  # takes a fifth of a second, and only intervals need it

    columns = np.flatnonzero(chosen)
    return sparse.csr_matrix(
        (np.ones(len(columns), np.int32), (rows[columns], columns)), shape=(rows.max() + 1, len(rows))
    )


def bends(positive, scores):
    """The two `sums` of positives and of negatives (N,) bool at each falling threshold at which the ROC curve can bend.

    Negatives between two positives' scores are one horizontal step.
    """
    order = np.argsort(-scores, kind="stable")
    falling, is_positive = scores[order], positive[order]
    new = np.append(True, falling[1:] != falling[:-1])
    tie = np.cumsum(new) - 1
    mixed = (np.bincount(tie, is_positive) > 0)[tie]  # equal scores of which one is a positive's
    step = np.empty(len(scores), np.int64)
    step[order] = np.cumsum(new & (mixed | np.append(True, mixed[:-1]))) - 1
    return sums(step, positive), sums(step, ~positive)


def above(counts):
    """(S, R) counts at falling thresholds -> (S + 1, R) float64 counts above them, from 0 to all."""
    return np.cumsum(np.concatenate([np.zeros((1, counts.shape[1])), counts]), axis=0)


def curve_metrics(tps, fps, names, min_tpr=0.8, specificity=0.9):
    """`ranking`'s metrics of one class: {name: (R,)}, NaN where a kind is absent.

    tps, fps: (S, R) its positives and negatives above falling thresholds.
    """
    tpr, fpr = tps / tps[-1], fps / fps[-1]
    up, right, result = np.diff(tpr, axis=0), np.diff(fpr, axis=0), {}
    undefined = 0 * fpr[-1]  # NaN without negatives, else 0
    if "auc" in names:
        result["auc"] = (right * (tpr[1:] + tpr[:-1])).sum(0) / 2
    if "average_precision" in names:
        result["average_precision"] = (up * tps[1:] / np.maximum(tps[1:] + fps[1:], 1)).sum(0) + undefined
    if "pauc" in names:  # what is right of the curve and above the line
        low = np.maximum(tpr[:-1], min_tpr)
        part = (low - tpr[:-1]) / np.where(up > 0, up, 1)
        left = fpr[:-1] + right * part  # false-positive rate where the step passes `low`
        result["pauc"] = (np.maximum(tpr[1:] - low, 0) * (1 - (left + fpr[1:]) / 2)).sum(0)
    if "sensitivity_at_90_specificity" in names:
        result["sensitivity_at_90_specificity"] = np.where(fpr <= 1 - specificity + 1e-12, tpr, 0).max(0) + undefined
    return result


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


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by their counts.

    Guo et al. 2017, arXiv:1706.04599, 15 bins, (low, high] as there.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    which = np.clip(np.ceil(np.nan_to_num(confidence) * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def quadratic_kappa(counts: np.ndarray) -> float | None:
    """Cohen's kappa with quadratic weights of a confusion matrix (C, C): 1 - sum(d^2 counts) / sum(d^2 expected)."""
    distance = np.subtract.outer(np.arange(len(counts)), np.arange(len(counts))) ** 2
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    chance = (distance * expected).sum()
    return float(1 - (distance * counts).sum() / chance) if chance else None


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C, C) int64 counts: rows are the true classes, columns the predicted ones."""
    count = np.shape(logits)[1]
    cells = np.asarray(labels, np.int64) * count + np.asarray(logits).argmax(1)
    return np.bincount(cells, minlength=count * count).reshape(count, count)


def fidelity(student_logits: np.ndarray, teacher_logits: np.ndarray, labels: np.ndarray | None = None) -> dict:
    """How the student follows the teacher: {name: float or None}.

    agreement: share of equal predictions; teacher_kl: mean KL(teacher || student) in nats at temperature 1;
    teacher_right_kept: share of the teacher's right answers that the student also gives (with labels).
    """
    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    same = np.asarray(student_logits).argmax(1) == np.asarray(teacher_logits).argmax(1)
    result = {
        "agreement": float(np.mean(same)),
        # a class that the teacher rules out costs 0, not 0 * inf
        "teacher_kl": float(np.mean((np.exp(teacher) * (np.maximum(teacher, -1e300) - student)).sum(1))),
    }
    if labels is not None:
        right = np.asarray(teacher_logits).argmax(1) == labels
        result["teacher_right_kept"] = float(np.mean(same[right])) if right.any() else None
    return finite_or_none(result)
