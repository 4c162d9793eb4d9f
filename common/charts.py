"""Which figures report.py draws of which runs.

Needs cli.py, comparison.py, evidence.py, figures.py and metrics.py of `common` (and what these need), numpy,
scikit-learn and matplotlib.
"""

import itertools
import re
from pathlib import Path

import numpy as np

from common import figures
from common.comparison import KEYS, KINDS, gather, label, scale, title
from common.evidence import reliability

MARKERS = "osD^vPX*<>h"  # eleven to twelve colours: 132 pairs
COLOURS = (
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#999933",
    "#882255",
    "#44AA99",
    "#332288",
    "#661100",
    "#6699CC",
    "#AA4499",
    "#117733",
)


class Charts:
    """Draws figures into a folder and remembers them: `titles` {file name: title}."""

    def __init__(self, folder, metric, missing):
        self.folder, self.metric, self.missing, self.titles = folder, metric, missing, {}
        self.scale = scale(metric)
        self.axis = f"test {title(metric)}" + " (%)" * (self.scale == 100)

    def add(self, draw, name, title, *content):
        name = re.sub(r"[^\w.-]+", "-", name)
        while f"{name}.png".lower() in map(str.lower, self.titles):  # tasks "a b" and "a-b"
            name += "_"
        name += ".png"
        draw(self.folder / name, *content)
        self.titles[name] = title

    def of_group(self, draw_all, *content):
        """Names of the figures that draw_all(*content) adds."""
        before = len(self.titles)
        draw_all(*content)
        return list(self.titles)[before:]

    def costs(self, groups):
        """One figure a dataset: teachers, baselines and each method against multiply-adds, or parameters where those
        are not known."""
        for dataset in dict.fromkeys(group["dataset"] for group in groups):
            own = [group for group in groups if group["dataset"] == dataset and not group["label_free"]]
            known = all(cost["multiply_adds"] for group in own for cost in group["cost"].values())
            key, name = ("multiply_adds", "multiply-adds of one image") if known else ("parameters", "parameters")
            points = {}
            for group in own:
                part = group if self.metric == "accuracy" else group[self.metric]
                alone = "" if group["method"] else group["variant"]
                names = (
                    f"{group['teacher']} (teacher)",
                    ", ".join(filter(None, (group["student"], "alone", alone))),
                    ", ".join(filter(None, (group["student"], group["method"], group["variant"]))),
                )
                for kind, stats_key, point in zip(KINDS, KEYS, names):
                    stats, x = part[stats_key.format(self.metric)], group["cost"].get(kind, {}).get(key)
                    if stats["mean"] is not None and x:
                        points.setdefault((kind, point, x, stats["mean"]), stats["std"])
            styles = {kind: zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS)) for kind in KINDS}
            drawn = []
            for (kind, point, x, mean), std in points.items():
                colour, marker = next(styles[kind])
                drawn.append(
                    (
                        point if len(points) <= 30 else kind,  # a longer legend would hide the figure
                        colour if kind == "student with KD" else KINDS[kind],
                        marker,
                        x,
                        self.scale * mean,
                        std and self.scale * std,
                    )
                )
            if len(drawn) > 1:
                self.add(
                    figures.draw_cost,
                    f"cost-{dataset}",
                    f"Test {self.metric} against cost, {dataset}",
                    f"{dataset}: {self.metric} against cost",
                    drawn,
                    name,
                    self.axis,
                )

    def curves(self, name, heading, runs):
        """runs: [(name, colour, run)]; the last one's metric is shown."""
        metric = runs[-1][2]["select_metric"] or "accuracy"
        lines = [(kind, colour, run["rows"], run) for kind, colour, run in runs if run["rows"]]
        if lines:
            self.add(figures.draw_curves, name, f"Training curves: {heading}", heading, metric, scale(metric), lines)

    def group(self, index, members, group):
        repeats = "folds" if group["folds"] else "seeds"
        lines = [
            (f"{kind} ({len(some)} {repeats})" if some[1:] else kind, colour, run)
            for (kind, colour), some in zip(KINDS.items(), members)
            for run in some
        ]
        self.curves(f"curves-{index}", label(group), lines)

    def predicted(self, index, group, kinds):
        """kinds: {kind: [Predictions]}, the group's evidence beside: reliability, ROC and precision-recall, classes."""
        from sklearn.metrics import precision_recall_curve, roc_curve

        first = next(iter(kinds.values()))[0]
        for task, classes in first.classes.items():
            heading = label(group) + f", {task}" * (len(first.classes) > 1)
            drawn = [(kind, KINDS[kind], reliability(runs, task)) for kind, runs in kinds.items()]
            self.add(figures.draw_reliability, f"reliability-{index}-{task}", f"Calibration: {heading}", heading, drawn)
            if len(classes) == 2 and len(set(first.targets[task])) == 2:
                curves, positive = [], first.positive.get(task, 1)
                for kind, runs in kinds.items():
                    for run in runs:
                        true, scores = run.targets[task] == positive, run.probabilities(task)[:, positive]
                        curves.append(
                            (kind, KINDS[kind], *roc_curve(true, scores)[:2], *precision_recall_curve(true, scores)[:2])
                        )
                self.add(
                    figures.draw_two_class,
                    f"curves-{index}-{task}-two-class",
                    f"ROC and precision-recall: {heading}",
                    heading,
                    classes[positive],
                    curves,
                )
            rows = group["evidence"].get("classes", {}).get(task, [])
            if 1 < len(rows) <= 100:
                self.add(
                    figures.draw_class_gains,
                    f"classes-{index}-{task}",
                    f"Recall of each class: {heading}",
                    heading,
                    rows,
                )

    def confusion(self, index, run):
        heading = f"{run['path']}: {run['role']} {run['id']['student']}"
        for file in sorted(Path(run["path"]).glob("confusion_test_*.npy")):
            task, classes = file.stem.removeprefix("confusion_test_"), run["dataset"].get("classes") or []
            classes, drawn = classes.get(task, []) if isinstance(classes, dict) else classes, f"{heading}, {task}"
            try:
                counts = np.load(file, allow_pickle=False)
                if counts.ndim != 2 or len(set(counts.shape)) != 1 or not counts.size:
                    raise ValueError(f"its shape is {counts.shape}")
            except (OSError, ValueError, EOFError) as error:
                self.missing.append(f"no figure of {file}: {error}")
                continue
            classes = classes if len(classes) == len(counts) else range(len(counts))
            self.add(
                figures.draw_confusion,
                f"confusion-{index}-{task}",
                f"Confusion matrix, {drawn}",
                drawn,
                counts,
                classes,
            )


def draw_report(folder, metric, members, groups, predictions, runs, missing):
    """Writes all figures; {file name: title}.  Each group gets the names of its own as group["figures"].

    members: three lists of runs a group; predictions: {kind: [Predictions]} a group.
    """
    charts, shown, grouped = Charts(folder, metric, missing), {}, set()
    charts.costs(groups)
    for index, (some, group, kinds) in enumerate(zip(members, groups, predictions), 1):
        some = ([], *some[1:]) if group["label_free"] else some  # a teacher with labels has another metric
        group["figures"] = charts.of_group(charts.group, index, some, group)
        if kinds:
            group["figures"] += charts.of_group(charts.predicted, index, group, kinds)
        for run in (seeds[0] for seeds in some if seeds):  # confusion matrices: the first seed's, drawn once a run
            if run["path"] not in shown:
                shown[run["path"]] = charts.of_group(charts.confusion, len(shown) + 1, run)
            group["figures"] += shown[run["path"]]
        grouped |= {run["path"] for seeds in some for run in seeds}
    others = [run for run in runs if run["path"] not in grouped]
    for own in gather(others, "select_metric"):
        for start in range(0, len(own), 6):  # more lines in a figure could not be told apart
            lines = [(run["path"], f"C{index}", run) for index, run in enumerate(own[start : start + 6])]
            charts.curves(f"curves-others-{len(charts.titles)}", "Runs in no group", lines)
    for index, run in enumerate(others, len(shown) + 1):
        charts.confusion(index, run)
    return charts.titles
