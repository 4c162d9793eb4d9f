"""Tables, figures and the page of report.py.

A table is a list of rows {column: text}.

Needs cli.py and statistics.py of `common` (and what these need), page.html beside it, matplotlib, numpy, pillow,
scikit-learn, and jinja2, which comes with torch.
"""

import base64
import contextlib
import csv
import io
import itertools
import math
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import without_flags
from common.metrics import expected_calibration_error
from common.run import UserError, atomic_write
from common.statistics import (
    BASELINE,
    DISTILLED,
    KINDS,
    NAMES,
    TEACHER,
    cell,
    flag_text,
    group_by,
    mean,
    number,
    paths,
    repeat_name,
    scale,
    span,
)

COLOURS = dict(zip(KINDS, ("#0072B2", "#E69F00", "#009E73")))  # Okabe and Ito's
MORE_COLOURS = (  # of groups; eleven markers to twelve colours: 132 pairs
    "#009E73 #CC79A7 #56B4E9 #D55E00 #999933 #882255 #44AA99 #332288 #661100 #6699CC #AA4499 #117733".split()
)
MARKERS = "osD^vPX*<>h"
COSTS = {
    "parameters": "parameters",
    "weight_bytes": "weights (MB)",
    "multiply_adds": "multiply-adds",
    "images_per_second": "images/s",
    "latency_ms": "ms for one image",
    "checkpoint_bytes": "best.pth (MB)",
    "train_seconds": "training (s)",
}
FIDELITY = {
    "agreement": "agreement with the teacher (%)",
    "teacher_right_kept": "the teacher's right answers kept (%)",
    "teacher_kl": "KL(teacher || student), nats",
}


# -------------------------------------------------------------------------------------------------- names and commands


def joined(*parts: str | None) -> str:
    """The parts that are not empty, with commas."""
    return ", ".join(filter(None, parts))


def label(group: dict) -> str:
    """'digits, resnet18 to resnet8, response'."""
    models = f"{group['teacher']} to {group['student']}" if group["method"] else f"{group['student']} alone"
    return joined(group["dataset"], models, group["method"], group["variant"])


def title(metric: str) -> str:
    """A metric's name, and for the partial AUC its range, which its value alone does not show."""
    return metric + " (above 80 % true-positive rate; at most 0.2, chance 0.02)" * metric.endswith("pauc")


def training_data(group: dict) -> str:
    """'trained on 808 labels (teacher), 100 labels (student without KD)'."""
    return "trained on " + ", ".join(f"{text} ({kind})" for kind, text in group["trained_on"].items())


def short(value: float) -> str:
    """11173962 as 11.17 M, 0.5 as 0.5."""
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.4g} {unit}"
    return f"{value:.4g}"


def repeat_command(run: dict) -> str:
    """The command line that repeats a run, for a shell; the run that is there stays."""
    environment, path = run["environment"], run["path"]
    script, processes = run["script"] or f"{run['role']}.py", environment.get("processes") or 1
    words = shlex.split(environment.get("command") or "")[1:]  # the first may be a copy in a job's $TMPDIR
    if not words or any(word.split("=")[0] == "--resume" for word in words):  # what resumed a run does not repeat it
        words = ["--config", str(Path(path, "config.json"))]
    start = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    command = shlex.join([script, *without_flags(words, ("--output",)), "--output", f"{path}_again"])
    return f"{start} {command}"


# --------------------------------------------------------------------------------------------------------------- cost


def run_cost(run: dict) -> dict:
    """Keys of COSTS: parameters, multiply-adds of one image, images/s and one image's latency in inference on the run's
    own device, bytes of the weights in float32 and of best.pth, seconds of training.  None: not known."""
    file = Path(run["path"], run["checkpoint"])
    cost = {key: number(run["model"].get(key)) for key in COSTS}
    cost["weight_bytes"] = cost["parameters"] and 4 * cost["parameters"]
    cost["checkpoint_bytes"] = file.stat().st_size if file.is_file() else None
    cost["train_seconds"] = number(run.get("wall_time_s"))
    return cost


def group_cost(members: dict) -> dict:
    """{kind: run_cost}, mean over seeds of what was measured; kinds without a run are left out."""
    costs = {kind: [run_cost(run) for run in runs] for kind, runs in members.items() if runs}
    return {kind: {key: mean(cost[key] for cost in costs[kind]) for key in COSTS} for kind in costs}


def cost_notes(members: dict) -> list:
    """A sentence where the images/s of a group were not all measured on one kind of device."""
    devices = {}
    for run in sum(members.values(), []):
        environment = run["environment"]
        device = f"{environment.get('device')} ({environment.get('threads')} threads)"
        if number(run["model"].get("images_per_second")):
            devices.setdefault("this machine" if "recomputed_test" in run else device, []).append(run)
    if len(devices) < 2:
        return []
    places = "; ".join(f"{device}: {paths(runs)}" for device, runs in devices.items())
    return [f"images/s and latency were measured on different devices; --reevaluate measures all on one: {places}"]


# ------------------------------------------------------------------------------------------------------------- tables


def cost_rows(group: dict) -> list:
    """A row for each kind of model."""
    return [
        {
            "model": kind,
            **{
                name: "-" if cost[key] is None else short(cost[key] * (1e-6 if key.endswith("bytes") else 1))
                for key, name in COSTS.items()
            },
        }
        for kind, cost in group["cost"].items()
    ]


def of_one_finding(group: dict, metric: str) -> bool:
    """Whether a metric is one finding's, where images have several."""
    return metric.startswith(tuple(f"{finding}_" for finding in group["findings"]))


def finding_rows(group: dict) -> list:
    """A row for each finding: its AUC and average precision in %, of each kind of model."""
    shown = {"AUC": "auc", "AP": "average_precision"}
    return [
        {
            "finding": finding,
            **{
                f"{name} (%), {kind}": cell(stats["mean"], metric, stats["std"])
                for name, metric in shown.items()
                for kind, stats in group["metrics"][f"{finding}_{metric}"].items()
            },
        }
        for finding in group["findings"]
        if f"{finding}_auc" in group["metrics"]
    ]


def name_cells(group: dict) -> dict:
    """The first cells of a group's row."""
    method = joined(group["method"], group["variant"]) or "-"
    return dict(zip(NAMES, (group["dataset"], group["teacher"] or "-", group["student"], method)))


def comparison_rows(groups: list, metric: str) -> list:
    """A row for each group that was trained with labels."""
    groups, rows = [group for group in groups if not group["label_free"]], []
    repeats = "folds" if all(group["folds"] for group in groups) else "seeds"
    columns = "teacher ", "without KD", "with KD"  # the space tells it from the teacher's name
    for group in groups:
        evidence, gains = group["evidence"], group if metric == "accuracy" else group[metric]
        gain = gains["gain_paired"] or {"mean": gains["gain"]}
        figures = [group["metrics"].get(metric, {}).get(kind, {"mean": None, "std": None, "n": 0}) for kind in KINDS]
        cells = {column: cell(figure["mean"], metric, figure["std"]) for column, figure in zip(columns, figures)}
        if group["teachers"]:
            cells[columns[0]] = " / ".join(f"{one['name']} {cell(one[metric], metric)}" for one in group["teachers"])
        without, with_kd = figures[1]["n"], figures[2]["n"]
        unequal = without and with_kd and without != with_kd
        rows.append(
            {
                **name_cells(group),
                **cells,
                "difference" + " (points)" * (scale(metric) == 100): cell(gain["mean"], metric, gains["gain_std"], "+"),
                "95 % over test images": span(evidence.get("interval"), metric, unit=False),
                f"95 % over {repeats}": span(evidence.get("seeds_interval"), metric, unit=False),
                "verdict": evidence.get("verdict", "-"),
                repeats: f"{without} without, {with_kd} with" if unequal else with_kd or without,
            }
        )
    return rows


def label_free_rows(groups: list) -> list:
    """A row for each group that was trained without labels."""
    return [
        {
            **name_cells(group),
            "val distillation loss": cell(loss["mean"], "loss", loss["std"]),
            "val k-NN (%)": cell(knn["student"], "knn"),
            "teacher's k-NN (%)": " / ".join(cell(value, "knn") for value in knn["teachers"] or [knn["teacher"]]),
            "seeds": loss["n"],
        }
        for group in groups
        if group["label_free"]
        for loss, knn in [(group["val_distillation_loss"], group["knn"])]
    ]


def comparison_tables(groups: list, metric: str) -> list:
    """Both as Markdown, those that have a row."""
    return [table(rows) for rows in (comparison_rows(groups, metric), label_free_rows(groups)) if rows]


def ranking_rows(selected: dict, metric: str) -> list:
    """A row a setting of `select`; the test figure of the best alone, for the choice is val's."""
    test = cell(selected["test"]["mean"], metric, selected["test"]["std"])
    return [
        {
            selected["metric"]: f"{setting['value']:.4f}",
            f"test {metric}": "" if place else test,
            "runs": ", ".join(setting["runs"]),
            **{flag: flag_text(value) for flag, value in setting["flags"].items()},
        }
        for place, setting in enumerate(selected["ranked"])
    ]


def ranking(selected: dict, metric: str) -> list:
    """Paragraphs: the settings as a table, the best one's name, the command that repeats it."""
    best = selected["ranked"][0]
    return [
        table(ranking_rows(selected, metric)),
        f"best {selected['metric']}: {best['value']:.4f}, {', '.join(best['runs'])}",
        f"again: {selected['command']}",
    ]


def run_rows(runs: list, metric: str) -> list:
    """A row a run of report.json.  Without that test metric it shows on val what chose its best epoch."""
    rows = []
    for run in runs:
        split, shown, note = "test", metric, ""
        if number(run["test"].get(metric)) is None:
            split, shown = "val", run["select_metric"] or metric
            note = f" (val {shown})"
        best, final = (number(run[part].get(shown)) for part in (split, f"final_{split}"))
        rows.append(
            {
                "run": run["run"],
                "role": run["role"],
                "method": run.get("method") or "-",
                "model": run["model"]["name"],
                "dataset": run["dataset"],
                "seed": run["seed"],
                "best epoch": run.get("best_epoch"),
                "epochs": run.get("last_epoch"),
                f"test {metric}": cell(best, shown) + note * (best is not None),
                "at the last epoch": cell(final, shown) + note * (final is not None),
            }
        )
    return rows


def table(rows: list) -> str:
    """Markdown, aligned, so that it also reads on a terminal."""
    lines = [[name.strip() for name in rows[0]], *(row.values() for row in rows)]
    lines = [[str(text).replace("|", "\\|") for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def headline(groups: list) -> list:
    """Sentences of each distilled group: its verdict, what to be warned of, what each side was trained on."""
    sentences = []
    for group in groups:
        if "sentence" in group["evidence"]:
            sentences.append(f"{label(group)}: {group['evidence']['sentence']}")
        sentences += [f"warning: {label(group)}: {text}" for text in group["warnings"]]
        if group["method"]:
            sentences.append(f"{label(group)}: {training_data(group)}")
    return sentences


def summarize(run: dict) -> dict:
    """A run in report.json: its results.json without flags, environment and class names, and its cost."""
    keys = run.keys() - {"flags", "environment", "script", "dataset", "path", "written", "id", "rows", "predictions"}
    names = {"run": run["path"], "dataset": run["id"]["dataset"]}
    return {**names, **{key: run[key] for key in run if key in keys}, "cost": run_cost(run)}


def csv_text(runs: list) -> str:
    """A row a run of report.json: names, cost, and each val and test metric that is a number."""
    rows = [
        {
            **{key: run.get(key) for key in ("run", "role", "method", "dataset", "seed")},
            "teacher": run["teacher"].get("name"),
            "model": run["model"]["name"],
            "resolution": run["model"].get("resolution"),
            **{key: run.get(key) for key in ("best_epoch", "last_epoch", "stopped_early")},
            **run["cost"],
            **{
                f"{split}_{key}": value
                for split in ("val", "test")
                for key, value in run[split].items()
                if number(value) is not None
            },
        }
        for run in runs
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(report: dict, metric: str) -> str:
    """report.md as text."""
    groups, selected = report["groups"], report["selected"]
    notes = [f"{label(group)}: {note}" for group in groups for note in group["notes"]] + report["notes"]
    costs = [{"group": label(group), **row} for group in groups for row in cost_rows(group)]
    parts = ["# Report"]
    if selected:
        parts += ["## Selection on val", *ranking(selected, metric)]
    parts += [
        f"## Test {title(metric)}" + " in %" * (scale(metric) == 100),
        *comparison_tables(groups, metric),
        "Mean ± sample standard deviation over seeds; the difference is between runs with the same seed, where both "
        "kinds have one.",
    ]
    for group in groups:
        parts += [f"## Findings: {label(group)}", table(finding_rows(group))] if finding_rows(group) else []
    if costs:
        parts += ["## Gain and noise", bullets(headline(groups)), "## Cost", table(costs)]
    parts += ["## Runs", table(run_rows(report["runs"], metric))]
    for heading, sentences in (("Missing", report["missing"]), ("Notes", notes)):
        parts += [f"## {heading}", bullets(sentences)] if sentences else []
    parts += ["## Figures", *(f"![{text}]({name})" for name, text in report["figures"].items())]
    return "\n\n".join(parts) + "\n"


def bullets(sentences: list) -> str:
    """A Markdown list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


# ------------------------------------------------------------------------------------------------------------ figures


class Figures:
    """Draws figures into a folder and keeps their titles: `titles` {file name: title}."""

    def __init__(self, folder: Path):
        self.folder, self.titles = Path(folder), {}

    @contextlib.contextmanager
    def new(self, name: str, title: str, height: float, rows: int = 1, width: float = 5.5):
        """Yields the axes of a new figure; saves it as PNG at the end, with one legend entry for each label.

        Axes are one below the other, so that a narrow screen shows them as large as a wide one.  Sizes in inches.
        """
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        look = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
        look.update({"font.size": 11, "legend.frameon": False, "savefig.dpi": 130, "text.parse_math": False})
        with plt.rc_context(look):
            figure, axes = plt.subplots(rows, 1, figsize=(width, height), layout="constrained")
            figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
            figure.suptitle(textwrap.fill(title, int(9 * width)), fontsize=12)
            yield axes
            handles = {}
            for axis in figure.axes:
                handles.update(zip(*axis.get_legend_handles_labels()[::-1]))
            if handles:
                columns = max(1, min(3, 50 // max(map(len, handles))))
                figure.set_figheight(height + 0.25 * len(handles) / columns)  # the axes stay as high
                figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
            image = io.BytesIO()
            figure.savefig(image, format="png", bbox_inches="tight", pad_inches=0.15)
            plt.close(figure)
        name = re.sub(r"[^\w.-]+", "-", name)
        while f"{name}.png".lower() in map(str.lower, self.titles):  # tasks "a b" and "a-b"
            name += "_"
        self.titles[f"{name}.png"] = title
        with atomic_write(
            self.folder / f"{name}.png"
        ) as file:  # 128 colours: a third of the bytes, for the page's sake
            Image.open(image).convert("RGB").quantize(128).save(file, "PNG")


def log_ticks(axis, formatter):
    """Numbers at 1, 2 and 5 of each decade of a logarithmic axis (axes.xaxis or axes.yaxis): a short range has some."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(ticker.NullFormatter())


def draw_curves(figures: Figures, name: str, heading: str, lines: list):
    """Train loss, the val metric that chooses the best epoch (the last run's), k-NN accuracy where there is one.

    lines: (name, colour, run).  A star is the best epoch, whose weights were tested; a bar at the end says that
    --patience stopped the run.
    """
    if not any(run["rows"] for _, _, run in lines):
        return
    metric = lines[-1][2]["select_metric"] or "accuracy"
    factor = scale(metric)
    panels = [
        ("train_loss", 1, "train loss", "-"),
        (f"val_{metric}", factor, f"val {metric}" + " (%)" * (factor == 100), "-"),
    ]
    if any(number(row.get("val_knn")) is not None for _, _, run in lines for row in run["rows"]):
        panels += [
            ("val_knn", 100, "val k-NN accuracy (%)", "-"),
            ("val_teacher_knn", 100, "val k-NN accuracy (%)", "--"),
        ]
    count = len({ylabel for _, _, ylabel, _ in panels})
    with figures.new(name, f"Training curves: {heading}", 0.9 + 3.1 * count, count) as axes:
        for axis, (key, factor, ylabel, style) in zip([*axes, axes[-1]], panels):
            for kind, colour, run in lines:
                draw_curve(axis, run, key, factor, style, colour, kind + ": its teacher" * (style == "--"))
            low, high = axis.dataLim.intervaly
            if factor == 1 and 0 < 20 * low < high < math.inf:
                axis.set_yscale("log")  # a distillation loss is a sum of terms and may dwarf the cross-entropy
                log_ticks(axis.yaxis, "{x:g}")
            axis.set(xlabel="epoch", ylabel=ylabel)
            axis.xaxis.get_major_locator().set_params(integer=True)


def draw_curve(axis, run: dict, key: str, factor: int, style: str, colour: str, label: str):
    """One column of a run's metrics.json, times factor."""
    points = {row["epoch"]: factor * row[key] for row in run["rows"] if number(row.get(key)) is not None}
    if not points:
        return
    marker, epochs, best = "o" if len(points) < 20 else None, list(points), run.get("best_epoch")
    look = {"linewidth": 1.2, "alpha": 0.85, "marker": marker, "markersize": 3}
    axis.plot(epochs, points.values(), style, color=colour, label=label, **look)
    if best in points and style == "-":
        look = {"markersize": 11, "markeredgecolor": "white"}
        axis.plot(best, points[best], "*", color=colour, label="best epoch", **look)
    if run.get("stopped_early"):
        look = {"markersize": 16, "markeredgewidth": 2}
        axis.plot(max(points), points[max(points)], "|", color=colour, label="stopped early", **look)


def draw_confusion(figures: Figures, name: str, heading: str, counts: np.ndarray, classes: list):
    """counts (C, C), rows are the true classes; the colour is the share of the true class."""
    size, share = len(counts), counts / counts.sum(axis=1, keepdims=True).clip(1)  # (C, C)
    names = [name if len(name) < 25 else name[:23] + "…" for name in map(str, classes)]
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    side = min(max(1.5 + 0.4 * size, 5.5), 11)
    with figures.new(name, f"Confusion matrix, {heading}", side, width=side) as axis:
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.figure.colorbar(image, label="share of the true class", fraction=0.045)
        for (row, column), count in np.ndenumerate(counts) if size <= 12 else ():
            colour = "white" if share[row, column] > 0.6 else "black"
            axis.text(column, row, int(count), ha="center", va="center", fontsize=9, color=colour)
        if size <= 25:
            axis.set_xticks(range(size), names, **slant)
            axis.set_yticks(range(size), names)
        axis.set(xlabel="predicted class", ylabel="true class")
        axis.grid(False)


def draw_confusions(figures: Figures, index: int, run: dict, missing: list):
    """The confusion matrix of each of a run's tasks."""
    for file in sorted(Path(run["path"]).glob("confusion_test_*.npy")):
        task, classes = file.stem.removeprefix("confusion_test_"), run["dataset"].get("classes") or []
        classes = classes.get(task, []) if isinstance(classes, dict) else classes
        try:
            counts = np.load(file, allow_pickle=False)
            if counts.ndim != 2 or len(set(counts.shape)) != 1 or not counts.size:
                raise ValueError(f"its shape is {counts.shape}")
        except (OSError, ValueError, EOFError) as error:
            missing.append(f"no figure from {file}: {error}")
            continue
        classes = classes if len(classes) == len(counts) else range(len(counts))
        heading = f"{run['path']}: {run['role']} {run['id']['student']}, {task}"
        draw_confusion(figures, f"confusion-{index}-{task}", heading, counts, classes)


def cost_points(groups: list, metric: str, key: str) -> list:
    """[(kind, name, cost, mean, std)], each once."""
    points = {}
    for group in groups:
        names = (
            f"{group['teacher']} (teacher)",
            joined(group["student"], "alone", "" if group["method"] else group["variant"]),
            joined(group["student"], group["method"], group["variant"]),
        )
        for name, (kind, stats) in zip(names, group["metrics"].get(metric, {}).items()):
            cost = group["cost"].get(kind, {}).get(key)
            if stats["n"] and cost:
                points[kind, name, cost, stats["mean"], stats["std"]] = None
    return list(points)


def draw_costs(figures: Figures, groups: list, metric: str):
    """A figure for each dataset: teachers, baselines and each method against multiply-adds, or parameters where they
    are not known."""
    from matplotlib.ticker import EngFormatter

    factor = scale(metric)
    for dataset in dict.fromkeys(group["dataset"] for group in groups):
        same = [group for group in groups if group["dataset"] == dataset and not group["label_free"]]
        known = all(cost["multiply_adds"] for group in same for cost in group["cost"].values())
        points = cost_points(same, metric, "multiply_adds" if known else "parameters")
        if len(points) < 2:
            continue
        styles = {kind: zip(itertools.cycle(MORE_COLOURS), itertools.cycle(MARKERS)) for kind in KINDS}
        height, costs = 4 + 0.25 * min(len(points), 30), [cost for _, _, cost, _, _ in points]
        with figures.new(f"cost-{dataset}", f"Test {metric} against cost, {dataset}", height) as axis:
            for kind, name, cost, mean, std in points:
                colour, marker = next(styles[kind])
                look = {"color": colour if kind == DISTILLED else COLOURS[kind]}
                if len(points) > 30:  # a longer legend would hide the figure
                    name = kind
                axis.errorbar(cost, factor * mean, yerr=std and factor * std, fmt="none", capsize=3, **look)
                axis.plot(cost, factor * mean, marker, markersize=9, label=textwrap.fill(name, 55), **look)
            axis.set(xlabel="multiply-adds of one image" if known else "parameters", xscale="log")
            axis.set(ylabel=f"test {title(metric)}" + " (%)" * (factor == 100), xlim=(min(costs) / 2, max(costs) * 2))
            log_ticks(axis.xaxis, EngFormatter(sep=""))
            axis.grid(True, which="both")


def reliability(runs: list, task: str, bins: int = 15) -> dict:
    """{"confidence", "accuracy", "share" (bins,), "ece"} of the answers of all runs (seeds); NaN in empty bins.  Bins
    as in metrics."""
    confidence = np.concatenate([run.probabilities(task).max(1) for run in runs])
    correct = np.concatenate([run.correct(task) for run in runs])
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (np.bincount(which, values, bins) / counts for values in (confidence, correct))
    ece = mean(expected_calibration_error(run.probabilities(task), run.targets[task], bins) for run in runs)
    return {"confidence": confidence, "accuracy": accuracy, "share": counts / counts.sum(), "ece": float(ece)}


def draw_reliability(figures: Figures, name: str, heading: str, predictions: dict, task: str):
    """Share of right answers against confidence, larger points where there are more images."""
    with figures.new(name, f"Calibration: {heading}", 5) as axis:
        axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        for kind, runs in predictions.items():
            bins = reliability(runs, task)
            x, y, share = (bins[key][bins["share"] > 0] for key in ("confidence", "accuracy", "share"))
            axis.plot(x, y, color=COLOURS[kind], linewidth=0.8, alpha=0.6)
            axis.scatter(x, y, 8 + 220 * share, color=COLOURS[kind], alpha=0.8)
            axis.scatter([], [], 40, color=COLOURS[kind], label=f"{kind}, ECE {bins['ece']:.3f}")
        axis.set(xlabel="confidence (larger points hold more images)", ylabel="share of right answers")
        axis.set(xlim=(0, 1.02), ylim=(0, 1.02))


def draw_two_classes(figures: Figures, name: str, heading: str, predictions: dict, task: str, positive: int):
    """ROC and precision-recall curves of each run; positive: the index of the positive class."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    with figures.new(name, f"ROC and precision-recall: {heading}", 7.1, rows=2) as (roc, pr):
        for kind, runs in predictions.items():
            look = {"color": COLOURS[kind], "linewidth": 1.3, "alpha": 0.85}
            for run in runs:
                true, scores = run.targets[task] == positive, run.probabilities(task)[:, positive]
                roc.plot(*roc_curve(true, scores)[:2], label=kind, **look)
                precision, recall, _ = precision_recall_curve(true, scores)
                pr.step(recall, precision, where="post", **look)
        roc.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        chosen = f"(positive: {runs[0].classes[task][positive]})"
        roc.set(xlabel=f"false-positive rate {chosen}", ylabel="true-positive rate", xlim=(-0.01, 1), ylim=(0, 1.02))
        pr.set(xlabel=f"recall {chosen}", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))


def draw_class_gains(figures: Figures, name: str, heading: str, rows: list):
    """Recall of each class without and with KD; rows: of `class_gains`."""
    with figures.new(name, f"Recall of each class: {heading}", 1.9 + 0.35 * len(rows)) as axis:
        before, after = ([100 * row[key] for row in rows] for key in ("before", "after"))
        axis.hlines(range(len(rows)), before, after, color="grey", linewidth=1.5, zorder=1)
        for recalls, kind in ((before, BASELINE), (after, DISTILLED)):
            axis.scatter(recalls, range(len(rows)), color=COLOURS[kind], s=55, label=kind, zorder=2)
        axis.set_yticks(range(len(rows)), [f"{row['class'][:28]} ({row['images']})" for row in rows])
        axis.set(xlabel="recall on test (%); in brackets: test images", ylim=(len(rows) - 0.5, -0.5), xlim=(-2, 102))
        axis.grid(False, axis="y")


def draw_group(figures: Figures, index: int, members: dict, group: dict):
    """A group's curves and, where there are predictions, calibration, ROC and precision-recall, recall of classes."""
    repeats, lines = "folds" if group["folds"] else "seeds", []
    for kind, runs in members.items():
        name = f"{kind} ({len(runs)} {repeats})" if runs[1:] else kind
        lines += [(name, COLOURS[kind], run) for run in runs]
    draw_curves(figures, f"curves-{index}", label(group), lines)
    predictions = {
        kind: [run["predictions"] for run in runs if run.get("predictions")] for kind, runs in members.items()
    }
    predictions = {kind: runs for kind, runs in predictions.items() if runs}
    first = next(iter(predictions.values()))[0] if predictions else None
    for task, classes in first.classes.items() if first else ():
        heading = label(group) + f", {task}" * (len(first.classes) > 1)
        draw_reliability(figures, f"reliability-{index}-{task}", heading, predictions, task)
        if len(classes) == 2 and len(set(first.targets[task])) == 2:
            positive = first.positive.get(task, 1)
            draw_two_classes(figures, f"curves-{index}-{task}-two-class", heading, predictions, task, positive)
        rows = group["evidence"].get("classes", {}).get(task, [])
        if 1 < len(rows) <= 100:
            draw_class_gains(figures, f"classes-{index}-{task}", heading, rows)


def draw_report(folder: Path, metric: str, members: list, groups: list, runs: list, missing: list) -> dict:
    """Draws all figures into a folder; returns {file name: title}.  Each group gets the names of its own as
    group["figures"].

    members, groups: of `collect`, with cost and evidence; runs: all, for those that are in no group.
    """
    figures, confusions, grouped = Figures(folder), {}, set()
    draw_costs(figures, groups, metric)
    for index, (kinds, group) in enumerate(zip(members, groups), 1):
        if group["label_free"]:
            kinds = {**kinds, TEACHER: []}  # one with labels has another metric
        start = len(figures.titles)
        draw_group(figures, index, kinds, group)
        group["figures"] = list(figures.titles)[start:]
        for first, *others in filter(None, kinds.values()):  # confusion matrices: the first seed's, drawn once a run
            path, start = first["path"], len(figures.titles)
            if path not in confusions:
                draw_confusions(figures, len(confusions) + 1, first, missing)
                confusions[path] = list(figures.titles)[start:]
            group["figures"] += confusions[path]
            grouped.update([path, *(run["path"] for run in others)])
    rest = [run for run in runs if run["path"] not in grouped]
    for alike in group_by(rest, "select_metric"):
        for start in range(0, len(alike), 6):  # more lines in a figure could not be told apart
            lines = [(run["path"], f"C{index}", run) for index, run in enumerate(alike[start : start + 6])]
            draw_curves(figures, f"curves-others-{len(figures.titles)}", "runs in no group", lines)
    for index, run in enumerate(rest, len(confusions) + 1):
        draw_confusions(figures, index, run, missing)
    return figures.titles


# --------------------------------------------------------------------------------------------------------------- page


def page_template():
    """page.html as a jinja2 template."""
    import jinja2

    file = Path(__file__).with_suffix(".html")
    if not file.is_file():
        raise UserError(f"{file} is missing: report.py makes report.html from it; copy it from the project's common/")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    functions = [cell, cost_rows, finding_rows, label, of_one_finding, repeat_command, repeat_name, scale]
    functions += [shown_verdict, title, training_data, zip]
    environment.globals.update({function.__name__: function for function in functions})
    environment.globals.update(KINDS=KINDS, FIDELITY=FIDELITY, FIDELITY_METRICS=tuple(FIDELITY))
    return environment.from_string(file.read_text(encoding="utf-8"))


def shown_verdict(group: dict) -> tuple:
    """(words, CSS class): the gain of one seed alone proves nothing, and has no colour."""
    word = group["evidence"].get("verdict", "-")
    if word not in ("gain", "loss"):
        return word, "noise"
    return (word, word) if group["evidence"]["seeds_interval"] else (f"{word}, one seed", "noise")


def html(template, report: dict, runs: list, metric: str, folder: Path, galleries: list) -> str:
    """report.html as text, the figures in `folder` within it.  galleries: a list of items for each group."""
    groups, images, families = report["groups"], {}, {}
    for name in report["figures"]:
        png = (Path(folder) / name).read_bytes()
        least = round(0.45 * Image.open(io.BytesIO(png)).width)  # smaller is not readable
        images[name] = {"png": base64.b64encode(png).decode(), "least": least}
    overview = [name for name in images if name.startswith("cost-")]
    placed = {*overview, *(name for group in groups for name in group["figures"])}
    labelled = [group for group in groups if not group["label_free"]]
    for group, row in zip(labelled, comparison_rows(groups, metric)):
        columns = [list(row)[i] for i in (3, 10, 7, 8, 9, 6, 5, 4, 11)]  # what distillation bought comes first
        models = f"{group['teacher']} to {group['student']}" if group["teacher"] else f"{group['student']} alone"
        families.setdefault(f"{group['dataset']}: {models}", []).append((group, {name: row[name] for name in columns}))
    return template.render(
        report=report,
        galleries=galleries,
        metric=metric,
        families=families,
        judged=[group for group in groups if "sentence" in group["evidence"]],
        images=images,
        overview=overview,
        rest=[name for name in images if name not in placed],
        label_free=label_free_rows(groups),
        ranking=report["selected"] and ranking_rows(report["selected"], metric),
        run_rows=run_rows(report["runs"], metric),
        runs=runs,
    )
