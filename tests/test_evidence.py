"""common/statistics.py: intervals, tests and verdicts against scipy, statsmodels' formula and plain loops."""

import math

import numpy as np
import pytest
import scipy.stats

from common import page, statistics
from common.statistics import Predictions


def predictions(right, groups=None, classes=3, seed=0):
    """One task whose answers are right where `right` says, with random confidence."""
    right, rng = np.asarray(right), np.random.default_rng(seed)
    labels = rng.integers(classes, size=len(right))
    logits = rng.normal(size=(len(right), classes)).astype(np.float32)
    logits[np.arange(len(right)), np.where(right, labels, (labels + 1) % classes)] += 8
    names = [f"class {c}" for c in range(classes)]
    return Predictions(
        np.array([f"i{i}" for i in range(len(right))]), groups, {"label": labels}, {"label": logits}, {"label": names}
    )


@pytest.fixture
def students():
    rng = np.random.default_rng(1)
    before = [predictions(rng.random(400) < 0.7, seed=9) for _ in range(3)]
    return before, [predictions(run.correct("label") | (rng.random(400) < 0.2), seed=9) for run in before]


def test_bootstrap_against_scipy(students):
    """The interval of one seed and of three, against scipy's paired percentile bootstrap of the differences."""
    for count in (1, 3):
        before, after = (some[:count] for some in students)
        found = statistics.paired_bootstrap(before, after, repeats=6000)
        difference = np.mean(
            [b.correct("label").astype(float) - a.correct("label") for a, b in zip(before, after)], axis=0
        )
        expected = scipy.stats.bootstrap(
            (difference,), np.mean, n_resamples=6000, method="percentile", rng=5
        ).confidence_interval
        assert found["gain"] == pytest.approx(difference.mean(), abs=1e-12)
        assert found["interval"] == pytest.approx(list(expected), abs=0.004)  # steps of 1/400, and the draws differ
        assert found["units"] == 400


def test_groups_are_drawn_whole(students):
    """Four equal copies of each image as one group: the interval of the images alone, not one half as wide."""
    before, after = (some[:1] for some in students)

    def copied(run):
        rows = np.repeat(np.arange(400), 4)
        part = {key: {"label": getattr(run, key)["label"][rows]} for key in ("targets", "logits")}
        return Predictions(np.arange(1600).astype(str), run.ids[rows], part["targets"], part["logits"], run.classes)

    whole = statistics.paired_bootstrap(before, after, repeats=6000)["interval"]
    grouped = statistics.paired_bootstrap([copied(before[0])], [copied(after[0])], repeats=6000)
    assert grouped["interval"] == pytest.approx(whole, abs=0.004) and grouped["units"] == 400
    alone = [copied(before[0]), copied(after[0])]
    for run in alone:
        run.groups = None
    narrow = statistics.paired_bootstrap(alone[:1], alone[1:], repeats=6000)["interval"]
    assert narrow[1] - narrow[0] == pytest.approx((whole[1] - whole[0]) / 2, rel=0.15)


def test_students_equal_on_every_image_have_no_gain(students):
    """Pairing: unpaired intervals of two students of 70 % on 400 images would be 13 points wide."""
    found = statistics.paired_bootstrap(students[0], students[0])
    assert (found["gain"], found["interval"]) == (0, [0, 0])


@pytest.mark.parametrize("metric", ["balanced_accuracy", "auc"])
def test_gain_of_other_metrics(students, metric):
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    def value(run):
        if metric == "auc":
            return roc_auc_score(run.targets["label"], run.probabilities("label"), multi_class="ovr")
        return balanced_accuracy_score(run.targets["label"], run.logits["label"].argmax(1))

    (before, *_), (after, *_) = students
    found = statistics.paired_bootstrap([before], [after], metric, repeats=200)
    assert found["gain"] == pytest.approx(value(after) - value(before), abs=1e-9)
    assert found["interval"][0] < found["gain"] < found["interval"][1]
    assert statistics.paired_bootstrap([before], [after], "macro_f1") is None


def test_several_tasks_are_averaged_or_named(students):
    (one, other, _), _ = students
    two = Predictions(
        one.ids,
        None,
        {"a": one.targets["label"], "b": other.targets["label"]},
        {"a": one.logits["label"], "b": other.logits["label"]},
        {"a": one.classes["label"], "b": other.classes["label"]},
    )
    shares = [run.correct("label").mean() for run in (one, other)]
    assert two.value("accuracy") == pytest.approx(np.mean(shares))
    assert [two.value(f"{task}_accuracy") for task in "ab"] == pytest.approx(shares)
    near = Predictions(
        one.ids, None, *({"organ": of["a"], "organ_side": of["b"]} for of in (two.targets, two.logits, two.classes))
    )
    assert [near.value(f"{task}_accuracy") for task in ("organ", "organ_side")] == pytest.approx(shares)


def test_curves_of_many_classes_are_left_out():
    many = predictions([True] * 5, classes=101)
    assert many.value("auc") is None and many.value("balanced_accuracy") == 1


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (7, 2), (3, 3), (25, 40), (1500, 1300)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    """Twice the tail of Binomial(n, 1/2), summed over whole numbers; as statsmodels' mcnemar(exact=True)."""
    before = np.array([True] * 10 + [False] * gained + [True] * lost + [False] * 5)
    after = np.array([True] * 10 + [True] * gained + [False] * lost + [False] * 5)
    n = gained + lost
    expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n)
    found = statistics.mcnemar(before, after)
    assert (found["gained"], found["lost"]) == (gained, lost) and found["p"] == pytest.approx(expected, rel=1e-9)


def test_interval_over_seeds():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), 4.302653 is Student's t for two degrees of freedom."""
    assert statistics.seeds_interval([1.0, 2.0, 3.0]) == pytest.approx(
        [2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5], abs=1e-5
    )
    assert statistics.seeds_interval([1.0]) is None


@pytest.mark.parametrize(
    ("gain", "images", "seeds", "word", "said"),
    [
        (0.02, [0.01, 0.03], [0.005, 0.035], "gain", "exclude 0"),
        (0.02, [0.01, 0.03], None, "gain", "one seed says nothing"),
        (-0.02, [-0.03, -0.01], [-0.03, -0.01], "loss", "exclude 0"),
        (
            0.02,
            [-0.01, 0.05],
            [0.01, 0.03],
            "within noise",
            "over test images, includes 0 (+1.00 to +3.00 points over seeds does not)",
        ),
        (0.02, [0.01, 0.03], [-0.01, 0.05], "within noise", "over seeds, includes 0"),
        (0.02, [-0.01, 0.05], [-0.01, 0.05], "within noise", "include 0"),
        (0.0, [0.0, 0.0], None, "within noise", "includes 0"),
    ],
)
def test_verdicts(gain, images, seeds, word, said):
    found, sentence = statistics.judge_gain(gain, {"test images": images, "seeds": seeds})
    assert found == word and said in sentence and f"of {100 * abs(gain):.2f} points" in sentence


def test_reliability_by_hand():
    """Confidences 0.9 (right), 0.9 (wrong) and 0.58 (right) in 15 bins."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.42, 0.58]])
    logits = np.log(probabilities).astype(np.float32)
    run = Predictions(
        np.array(["a", "b", "c"]), None, {"label": np.array([0, 1, 1])}, {"label": logits}, {"label": ["x", "y"]}
    )
    found = page.reliability([run, run], "label")
    assert np.flatnonzero(found["share"]).tolist() == [8, 13]  # (8/15, 9/15] and (13/15, 14/15]
    assert found["share"][[8, 13]] == pytest.approx([1 / 3, 2 / 3]) and found["accuracy"][[8, 13]] == pytest.approx(
        [1, 0.5]
    )
    assert found["confidence"][[8, 13]] == pytest.approx([0.58, 0.9], abs=1e-6) and found["ece"] == pytest.approx(
        0.42 / 3 + 0.4 * 2 / 3, abs=1e-6
    )


def kinds(*predictions):
    return dict(zip(statistics.KINDS, predictions))


def test_one_common_seed_of_three_is_said(students):
    before, after = students
    found = statistics.gain_evidence(kinds({}, {0: before[0], 1: before[1]}, {1: after[1], 2: after[2]}), "accuracy", 3)
    assert found["seeds"] == [1] and found["sentence"].startswith(
        "On seed 1 alone, for which both kinds have predictions: the gain"
    )
    assert found["gain"] == pytest.approx(after[1].correct("label").mean() - before[1].correct("label").mean())
    whole = statistics.gain_evidence(kinds({}, dict(enumerate(before)), dict(enumerate(after))), "accuracy", 3)
    assert whole["seeds"] == [0, 1, 2] and whole["sentence"].startswith("The gain") and whole["grouped"] is False
    assert [test["seed"] for test in whole["mcnemar"]] == [0, 1, 2] and "fidelity" not in whole


def test_gain_of_each_class():
    before = predictions([True, False, True, False, False, True], seed=3)
    after = predictions([True] * 6, seed=3)
    labels = before.targets["label"]
    for row in statistics.class_gains([before], [after], "label"):
        own = labels == int(row["class"].split()[1])
        assert (
            row["images"] == own.sum()
            and row["before"] == pytest.approx(before.correct("label")[own].mean())
            and row["after"] == 1
        )


def test_disagreements_are_balanced_ordered_and_of_distinct_groups():
    rng = np.random.default_rng(4)
    right = rng.random(60) < 0.5
    before, after = predictions(right, seed=5), predictions(~right, seed=5)
    rows = statistics.disagreements(before, after, "label", 10)
    gained = [after.correct("label")[row] for row in rows]
    assert gained == [True] * 5 + [False] * 5
    change = [
        abs(after.probabilities("label") - before.probabilities("label"))[row, before.targets["label"][row]]
        for row in rows
    ]
    assert change[:5] == sorted(change[:5], reverse=True) and change[5:] == sorted(change[5:], reverse=True)
    before.groups = np.array([f"case {i // 6}" for i in range(60)])
    rows = statistics.disagreements(before, after, "label", 40)
    kinds = [(before.groups[row], bool(after.correct("label")[row])) for row in rows]
    assert len(set(kinds)) == len(kinds) > 10  # of a case at most one gained and one lost
    assert statistics.disagreements(before, before, "label") == []
    for most in range(1, 6):
        assert len(statistics.disagreements(before, after, "label", most)) == most


def test_predictions_are_read_and_aligned(tmp_path):
    run = predictions([True, False, True], groups=np.array(["p", "p", "q"]))
    arrays = {
        "ids": run.ids,
        "groups": run.groups,
        "labels": run.targets["label"],
        "logits": run.logits["label"],
        "classes": np.array(run.classes["label"]),
    }
    np.savez(tmp_path / "whole.npz", **arrays)
    found = statistics.read_predictions(tmp_path / "whole.npz")
    assert found.classes == run.classes and found.value("accuracy") == pytest.approx(2 / 3)
    order = [2, 0, 1]
    np.savez(
        tmp_path / "turned.npz",
        **{**{key: value[order] for key, value in arrays.items() if key != "classes"}, "classes": arrays["classes"]},
    )
    turned = statistics.read_predictions(tmp_path / "turned.npz")
    assert turned.correct("label").tolist() == [True, True, False] and statistics.align(turned, found).correct(
        "label"
    ).tolist() == [True, False, True]
    for key, value, words in (
        ("ids", np.array(["i0", "i1", "other"]), "test images"),
        ("classes", arrays["classes"][::-1], "classes"),
        ("labels", (arrays["labels"] + 1) % 3, "test labels"),
    ):
        np.savez(tmp_path / "other.npz", **{**arrays, key: value})
        with pytest.raises(ValueError, match=words):
            statistics.align(statistics.read_predictions(tmp_path / "other.npz"), found)
    np.savez(tmp_path / "cut.npz", **{**arrays, "logits": arrays["logits"][:2]})
    with pytest.raises(ValueError, match="logits of shape"):
        statistics.read_predictions(tmp_path / "cut.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])  # an interrupted copy
    with pytest.raises(ValueError, match="zip file"):
        statistics.read_predictions(tmp_path / "half.npz")
    np.savez(
        tmp_path / "nan.npz",
        **{**arrays, "logits": np.where(arrays["logits"] == arrays["logits"].max(), np.nan, arrays["logits"])},
    )
    with pytest.raises(ValueError, match="not finite"):
        statistics.read_predictions(tmp_path / "nan.npz")
    np.savez(tmp_path / "hostile.npz", **{**arrays, "ids": np.array([object()] * 3)})
    with pytest.raises(ValueError, match="allow_pickle"):
        statistics.read_predictions(tmp_path / "hostile.npz")


def test_several_tasks_in_a_file(tmp_path):
    run = predictions([True, False, True])
    np.savez(
        tmp_path / "p.npz",
        ids=run.ids,
        **{
            f"{key}_{task}": value
            for task in ("organ", "left_or_right")
            for key, value in (
                ("labels", run.targets["label"]),
                ("logits", run.logits["label"]),
                ("classes", np.array(run.classes["label"])),
            )
        },
    )
    found = statistics.read_predictions(tmp_path / "p.npz")
    assert list(found.targets) == ["organ", "left_or_right"] and found.groups is None


def test_a_task_named_label_among_several_is_read(tmp_path):
    """write_predictions leaves that one's arrays without a suffix."""
    from types import SimpleNamespace

    from common.data import Splits
    from common.training import write_predictions

    rng, classes = np.random.default_rng(0), {"organ": ["a", "b"], "label": ["x", "y", "z"], "side": ["left", "right"]}
    targets = {task: rng.integers(len(names), size=5) for task, names in classes.items()}
    logits = {task: rng.normal(size=(5, len(names))).astype(np.float32) for task, names in classes.items()}
    dataset = SimpleNamespace(ids=[f"i{i}" for i in range(5)], groups=None, targets=targets)
    write_predictions(str(tmp_path), "test", dataset, logits, Splits("toy", "natural", classes, None, None, None))
    found = statistics.read_predictions(tmp_path / "predictions_test.npz")
    assert found.classes == classes
    for task in classes:
        assert (found.targets[task] == targets[task]).all() and (found.logits[task] == logits[task]).all()


def test_folds_are_resampled_each_on_their_own(students):
    """Three folds of other images: the mean of three independent gains has a third of their variances' sum's root."""
    before, after = students
    for fold, pair in enumerate(zip(before, after)):
        for run in pair:
            run.ids = np.array([f"fold {fold} {name}" for name in run.ids])
    found = statistics.paired_bootstrap(before, after, repeats=4000)
    gains = [b.correct("label").astype(float) - a.correct("label") for a, b in zip(before, after)]
    half = 1.96 * math.sqrt(sum(gain.var() / 400 for gain in gains)) / 3
    assert found["gain"] == pytest.approx(np.mean(gains)) and found["units"] == 1200
    assert found["interval"] == pytest.approx([np.mean(gains) - half, np.mean(gains) + half], abs=0.004)


def test_intervals_of_results_are_of_whole_groups():
    """results.json's interval of ten equal images a lesion is that of the lesions: about 1.96 * sqrt(p (1 - p) / 100)
    on either side."""
    from types import SimpleNamespace

    from common.data import Splits
    from common.training import uncertainty

    right = np.repeat(np.random.default_rng(1).random(100) < 0.7, 10)
    logits, labels = np.stack([right, ~right], 1).astype(np.float32), np.zeros(1000, int)
    dataset = SimpleNamespace(targets={"label": labels}, groups=np.repeat([f"lesion {i}" for i in range(100)], 10))
    low, high = uncertainty({"label": logits}, dataset, Splits("toy", "natural", ["x", "y"], None, None, None))[
        "intervals"
    ]["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 100), rel=0.15)
