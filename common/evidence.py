"""What the stored predictions of runs say: is a gain larger than the noise, does the student follow the teacher, where
does it fail.

Needs comparison.py and metrics.py of `common` (and what these need), numpy, scipy and scikit-learn (which brings
scipy).
"""

import zipfile
from dataclasses import dataclass, field

import numpy as np

from common import metrics
from common.comparison import NOT_PERCENT, cell, mean, repeat_name


@dataclass
class Predictions:
    """A run's outputs on one split.  ids (N,); groups (N,) or None; targets {task: (N,)}; logits {task: (N, C)};
    classes {task: [name]}."""

    ids: np.ndarray
    groups: np.ndarray | None
    targets: dict
    logits: dict
    classes: dict
    positive: dict = field(
        default_factory=dict
    )  # {task of two classes: index of the positive one}, 1 where it is not known

    def probabilities(self, task):
        """(N, C) float64."""
        return np.exp(metrics.log_softmax(self.logits[task]))

    def right(self, task):
        """(N,) bool."""
        return self.logits[task].argmax(1) == self.targets[task]

    def measure(self, metric):
        """A function of weights (N, R) that gives (R,) of a metric of metrics.RESAMPLED, the mean over tasks, or
        <task>_<metric>.

        None where it is another one, or of curves of more than 100 classes, which take hours.
        """
        named = {f"{task}_{name}": ([task], name) for task in self.targets for name in metrics.RESAMPLED}
        named.update((name, (self.targets, name)) for name in metrics.RESAMPLED)
        tasks, name = named.get(metric, ((), None))
        if not tasks or name not in metrics.RESAMPLED[:2] and max(len(self.classes[task]) for task in tasks) > 100:
            return None
        weighed = [
            metrics.weighing(self.logits[task], self.targets[task], (name,), self.positive.get(task, 1))
            for task in tasks
        ]
        return lambda weights: np.mean([of(weights)[name] for of in weighed], axis=0)

    def value(self, metric):
        """`measure` of all rows once (1,), or None."""
        measure = self.measure(metric)
        return measure and measure(np.ones((len(self.ids), 1), np.int32))


def read_predictions(file):
    """Predictions of a predictions_<split>.npz.  Raises OSError, ValueError or KeyError where it is damaged or not
    finite."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = dict(arrays)
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    result = Predictions(found["ids"], found.get("groups"), {}, {}, {})
    for end in [name.removeprefix("logits") for name in found if name.startswith("logits")]:
        task, logits, labels = end[1:] or "label", found["logits" + end], found["labels" + end]
        classes = [str(name) for name in found["classes" + end]]
        if logits.shape != (len(result.ids), len(classes)) or len(labels) != len(result.ids):
            raise ValueError(f"{len(result.ids)} ids and {len(classes)} classes with logits of shape {logits.shape}")
        if not np.isfinite(logits).all():
            raise ValueError("some logits are not finite")
        result.targets[task], result.logits[task], result.classes[task] = labels, logits, classes
        if "positive" + end in found:
            result.positive[task] = classes.index(str(found["positive" + end]))
    return result


def align(predictions, like):
    """`predictions` with the rows in the order of `like`.  Raises ValueError where images, labels or classes differ."""
    rows = {sample: row for row, sample in enumerate(predictions.ids)}
    if set(rows) != set(like.ids):
        raise ValueError(f"its {len(rows)} test images are not the {len(like.ids)} of the other runs")
    if predictions.classes != like.classes:
        raise ValueError("its classes, or their order, are not those of the other runs")
    same = np.array_equal(predictions.ids, like.ids)  # a slice copies nothing
    order = slice(None) if same else [rows[sample] for sample in like.ids]
    part = Predictions(
        like.ids,
        like.groups,
        *({task: values[order] for task, values in of.items()} for of in (predictions.targets, predictions.logits)),
        like.classes,
        like.positive,
    )
    if any((part.targets[task] != like.targets[task]).any() for task in like.targets):
        raise ValueError("its test labels are not those of the other runs")
    return part


def by_images(runs):
    """Lists of positions in `runs` (Predictions) whose rows are the same images: all of them, or a list for each
    fold's."""
    found = {}
    for position, run in enumerate(runs):
        found.setdefault(run.ids.tobytes(), []).append(position)
    return list(found.values())


def paired_bootstrap(before, after, metric="accuracy", repeats=2000, seed=0):
    """The gain in `metric` and its 95 % percentile interval {"gain", "interval" [low, high], "units"}, or None for a
    metric not known.

    before, after: lists of Predictions, each pair on the same rows, one a seed or fold; the gain is the mean of after -
    before.  Each
    resample draws the same images for all pairs that have the same, whole lesions, patients or cases where there are
    groups (Efron and
    Tibshirani 1993, chapter 8).  It covers the choice of test images, not that of seeds.
    """
    measures = [(one.measure(metric), two.measure(metric)) for one, two in zip(before, after)]
    if None in measures[0]:
        return None
    gains, units = 0, 0
    for shift, positions in enumerate(by_images(before)):
        first = before[positions[0]]
        gains += np.concatenate(
            [
                sum(measures[i][1](weights) - measures[i][0](weights) for i in positions)
                for weights in metrics.resamples(len(first.ids), first.groups, repeats, seed + shift)
            ]
        )
        units += len(first.ids if first.groups is None else set(first.groups))
    gains = gains[np.isfinite(gains)] / len(before)  # a resample without a class has no curve of it
    whole = seed_gains(before, after, metric)
    if len(gains) < repeats / 2 or not np.isfinite(whole).all():
        return None
    return {"gain": float(np.mean(whole)), "interval": np.percentile(gains, (2.5, 97.5)).tolist(), "units": units}


def seed_gains(before, after, metric):
    """The gain in `metric` of each pair."""
    return [float((two.value(metric) - one.value(metric))[0]) for one, two in zip(before, after)]


def mcnemar(before, after):
    """Exact two-sided test of McNemar (1947) of two students' accuracy: of the images that one alone gets right, is
    either's share above
    one half?

    before, after (N,) bool: what is right.  {"gained": images right in `after` alone, "lost": in `before` alone, "p":
    value}.
    """
    from scipy.stats import binomtest

    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return {
        "gained": gained,
        "lost": lost,
        "p": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }


def seeds_interval(gains):
    """95 % interval [low, high] of the mean of the seeds' gains by Student's t, or None for fewer than two."""
    from scipy.stats import t

    if len(gains) < 2:
        return None
    half = t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / np.sqrt(len(gains))
    return (np.mean(gains) + half * np.array([-1, 1])).tolist()


def span(interval, metric, unit=True):
    """'-0.40 to +1.80 points', or '-' for None."""
    points = " points" * (unit and not metric.endswith(NOT_PERCENT))
    return " to ".join(cell(bound, metric, sign="+") for bound in interval) + points if interval else "-"


def verdict(gain, images, seeds, metric="accuracy", over=("test images", "seeds")):
    """(word, sentence) for a gain in `metric`, its 95 % interval over test images and the one over seeds or None; over:
    their names.

    Words: gain, loss, "within noise".
    """
    noisy, clear = [], []
    for interval, name in zip((images, seeds), over):
        if interval:
            (noisy if interval[0] <= 0 <= interval[1] else clear).append(f"{span(interval, metric)} over {name}")
    word = "gain" if gain >= 0 else "loss"
    start = f"The {word} of {cell(abs(gain), metric)}{'' if metric.endswith(NOT_PERCENT) else ' points'} is"
    if noisy:
        holds = f"its 95 % interval{'s' * (len(noisy) > 1)}, {' and '.join(noisy)}, hold{'s' * (len(noisy) == 1)} 0"
        return "within noise", f"{start} within noise: {holds}{f' ({clear[0]} does not)' if clear else ''}."
    if not seeds:
        return (
            word,
            f"{start} larger than the noise of the {over[0]} (95 % interval {clear[0]}); one seed says nothing of "
            "training's noise.",
        )
    return word, f"{start} larger than noise: its 95 % intervals, {' and '.join(clear)}, exclude 0."


def mean_fidelity(students, teachers):
    """`metrics.fidelity` of Predictions {seed: ...} to their teachers', mean over tasks and seeds; None where it is
    undefined."""
    found = [
        metrics.fidelity(student.logits[task], teachers[seed].logits[task], student.targets[task])
        for seed, student in students.items()
        if seed in teachers
        for task in student.logits
    ] or [{}]
    return {name: mean([of[name] for of in found]) for name in found[0]}


def reliability(runs, task, bins=15):
    """{"confidence", "accuracy", "share" (bins,), "ece"} of the answers of all runs (seeds); NaN in empty bins.  Bins
    as in metrics."""
    confidence = np.concatenate([run.probabilities(task).max(1) for run in runs])
    right = np.concatenate([run.right(task) for run in runs])
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (np.bincount(which, values, minlength=bins) / counts for values in (confidence, right))
    errors = [metrics.expected_calibration_error(run.probabilities(task), run.targets[task], bins) for run in runs]
    return {
        "confidence": confidence,
        "accuracy": accuracy,
        "share": counts / counts.sum(),
        "ece": float(np.mean(errors)),
    }


def class_gains(before, after, task):
    """[{"class", "images", "before", "after"}] recalls of each class that occurs, mean over seeds."""
    classes = before[0].classes[task]
    counts = sum(np.bincount(before[few[0]].targets[task], minlength=len(classes)) for few in by_images(before))
    recalls = (
        np.array([metrics.class_recalls(run.logits[task], run.targets[task]) for run in runs], float).T
        for runs in (before, after)
    )  # (C, runs), NaN for a class that a fold lacks
    return [
        {"class": name, "images": int(count), "before": float(np.nanmean(a)), "after": float(np.nanmean(b))}
        for name, count, a, b in zip(classes, counts, *recalls)
        if count
    ]


def disagreements(before, after, task, most=12):
    """Rows on which one of two students is right and the other wrong, half of them gained and half lost, largest
    changes of the true
    class's probability first, one image a group where there are groups.  before, after: Predictions of one seed.
    """
    labels, rows = before.targets[task], np.arange(len(before.ids))
    change = after.probabilities(task)[rows, labels] - before.probabilities(task)[rows, labels]
    found, half = [], most // 2
    for one, two, sign in ((after, before, -1), (before, after, 1)):
        rows = np.flatnonzero(one.right(task) & ~two.right(task))
        rows = rows[np.argsort(sign * change[rows], kind="stable")]
        if before.groups is not None:  # one image a lesion, patient or case
            rows = rows[np.sort(np.unique(before.groups[rows], return_index=True)[1])]
        found.append(rows)
    gained, lost = found
    return [*gained[: max(most - half, most - len(lost))], *lost[: max(half, most - len(gained))]]


def weigh(teachers, before, after, metric, runs):
    """What the predictions of a group say, for report.json.

    teachers, before, after: {seed: Predictions} of what taught, without and with KD, on the same rows where the seed is
    the same; runs: how
    many runs the larger kind of student has, with or without predictions.  Keys are absent where there is nothing to
    compare: gain,
    interval, units, seeds, seeds_interval, verdict, sentence, mcnemar, grouped, classes, fidelity.
    """
    seeds, result, paired = [seed for seed in after if seed in before], {"metric": metric}, None
    pairs = [before[seed] for seed in seeds], [after[seed] for seed in seeds]
    if seeds:
        paired, tasks = paired_bootstrap(*pairs, metric), after[seeds[0]].targets
        result["grouped"] = after[seeds[0]].groups is not None
        result["mcnemar"] = [
            {"seed": seed, "task": task, **mcnemar(one.right(task), two.right(task))}
            for seed, one, two in zip(seeds, *pairs)
            for task in tasks
        ]
        result["classes"] = {task: class_gains(*pairs, task) for task in tasks}
    if paired:
        result.update(paired, seeds=seeds, seeds_interval=seeds_interval(seed_gains(*pairs, metric)))
        over = (
            "groups of test images" if result["grouped"] else "test images",
            "folds" if isinstance(seeds[0], str) else "seeds",
        )
        result["verdict"], result["sentence"] = verdict(
            result["gain"], result["interval"], result["seeds_interval"], metric, over
        )
        if len(seeds) < runs:
            which = ", ".join(map(repeat_name, seeds))
            result["sentence"] = (
                f"On {which} alone, of which both kinds have predictions: "
                f"{result['sentence'][0].lower()}{result['sentence'][1:]}"
            )
    if teachers:
        kinds = ("student without KD", before), ("student with KD", after)
        result["fidelity"] = {kind: mean_fidelity(some, teachers) for kind, some in kinds if some}
    return result
