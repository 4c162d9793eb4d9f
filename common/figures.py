"""Figures of report.py.  Needs cli.py of `common` and matplotlib and pillow."""

import contextlib
import io
import math
import textwrap
from pathlib import Path

from PIL import Image

from common.cli import atomic_write


@contextlib.contextmanager
def figure(path, width, height, columns=1):
    """Yield a matplotlib figure and its axes; saved as PNG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130, "text.parse_math": False})
    drawn, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    yield drawn, axes
    image, small = io.BytesIO(), io.BytesIO()
    drawn.savefig(image, format="png", bbox_inches="tight", pad_inches=0.15)
    plt.close(drawn)
    Image.open(image).convert("RGB").quantize(128).save(small, "PNG")  # a third of the bytes: report.html holds every figure
    with atomic_write(path) as temporary:
        Path(temporary).write_bytes(small.getvalue())


def draw_curves(path, title, lines):
    """lines: (name, colour, rows of metrics.json, results.json); lines of one name share a legend entry.

    A star is the best epoch, whose weights were tested; a bar at the end says that --patience stopped the run.
    """
    names, panels = {}, (("train_loss", 1, "train loss"), ("val_accuracy", 100, "val accuracy (%)"))
    with figure(path, 10, 4.6, columns=2) as (drawn, axes):
        for axis, (key, scale, name) in zip(axes, panels):
            for kind, colour, rows, results in lines:
                points = {row["epoch"]: scale * row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])}
                (names[kind],) = axis.plot(points.keys(), points.values(), color=colour, linewidth=1.2, alpha=0.85,
                                           marker="o" if len(points) < 20 else None, markersize=3)  # fmt: skip
                if results.get("best_epoch") in points:
                    best = axis.plot(results["best_epoch"], points[results["best_epoch"]], "*", color=colour, markersize=11, markeredgecolor="white")
                    names["best epoch"] = best[0]
                if results.get("stopped_early") and points:
                    stopped = axis.plot(max(points), points[max(points)], "|", color=colour, markersize=16, markeredgewidth=2)
                    names["stopped early"] = stopped[0]
            low, high = axis.dataLim.intervaly
            if key == "train_loss" and 0 < 20 * low < high < math.inf:
                axis.set_yscale("log")  # a distillation loss is a sum of terms and may dwarf the cross-entropy
            axis.set(xlabel="epoch", ylabel=name)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        drawn.suptitle(textwrap.fill(title, 90), fontsize=12)
        drawn.legend(names.values(), names, loc="outside lower center", ncols=max(1, min(5, 110 // max(map(len, names)))), frameon=False)


def draw_bars(path, rows, kinds, name, percent):
    """Horizontal bars, so that long names stay readable.

    rows: (label, [(mean or None, std or None, text)]), one bar for each of kinds {name: colour}; percent: values are 0 to 100.
    """
    with figure(path, 10, 1.6 + 1.15 * len(rows)) as (drawn, axis):
        for index, (kind, colour) in enumerate(kinds.items()):
            for row, (_, bars) in enumerate(rows):
                mean, std, text = bars[index]
                end, height = (mean or 0) + (std or 0), row + 0.27 * (index - 1)
                axis.barh(height, mean or 0, height=0.25, color=colour, label=None if row else kind, xerr=std or None, capsize=3)
                axis.annotate(text, (end, height), (6, 0), fontsize=9, va="center", textcoords="offset points")
        axis.set_yticks(range(len(rows)), [textwrap.fill(label, 40) for label, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(0, 118 if percent else 1.25 * axis.dataLim.xmax or 1)  # room for the numbers beside the bars
        axis.set_xlabel(name)
        drawn.legend(loc="outside upper center", ncols=3, frameon=False)


def draw_confusion(path, title, counts, classes):
    """counts (C, C), rows are the true classes; the colour is the share of the true class."""
    size, share = len(counts), counts / counts.sum(axis=1, keepdims=True).clip(1)  # (C, C)
    names = [name if len(name) < 25 else name[:23] + "…" for name in map(str, classes)]
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    side = min(max(3.4 + 0.55 * size, 5.5), 11)
    with figure(path, side, side) as (drawn, axis):
        drawn.colorbar(axis.imshow(share, cmap="Blues", vmin=0, vmax=1), label="share of the true class", fraction=0.045)
        for row, column in [divmod(i, size) for i in range(size * size)] if size <= 12 else []:
            colour = "white" if share[row, column] > 0.6 else "black"
            axis.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=9, color=colour)
        if size <= 25:
            axis.set_xticks(range(size), names, **slant)
            axis.set_yticks(range(size), names)
        axis.set(xlabel="predicted class", ylabel="true class")
        axis.set_title(textwrap.fill(title, 44), fontsize=11)


def draw_cost(path, title, points, xlabel, ylabel):
    """Accuracy against cost.  points: (name, colour, marker, cost, mean, std or None), cost above 0 on a log axis."""
    from matplotlib import ticker

    with figure(path, 9, 5) as (drawn, axis):
        named = set()
        for name, colour, marker, x, mean, std in points:
            text = None if name in named else textwrap.fill(name, 46)
            axis.errorbar(x, mean, yerr=std, fmt=marker, color=colour, markersize=9, capsize=3, label=text)
            named.add(name)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        costs = [x for _, _, _, x, _, _ in points]
        axis.set_xlim(min(costs) / 2, max(costs) * 2)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3, which="both")
        axis.set_title(textwrap.fill(title, 90), fontsize=12)
        drawn.legend(loc="outside right upper", frameon=False, fontsize=9)


def draw_reliability(path, title, kinds):
    """Share of right answers against confidence, and how the confidence is spread.

    kinds: (name, colour, {"confidence", "accuracy", "share" (bins,), "ece"}).
    """
    with figure(path, 10, 4.6, columns=2) as (drawn, (axis, spread)):
        axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        for index, (name, colour, found) in enumerate(kinds):
            full = found["share"] > 0
            axis.plot(found["confidence"][full], found["accuracy"][full], color=colour, linewidth=0.8, alpha=0.6)
            axis.scatter(found["confidence"][full], found["accuracy"][full], 8 + 220 * found["share"][full], color=colour, alpha=0.8,
                         label=f"{name}, ECE {found['ece']:.3f}")  # fmt: skip
            bins, width = len(full), 1 / len(full) / (len(kinds) + 0.5)
            spread.bar([(i + 0.2) / bins + index * width for i in range(bins)], found["share"], width, align="edge", color=colour)
        axis.set(xlabel="confidence", ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1.02))
        spread.set(xlabel="confidence", ylabel="share of test images", xlim=(0, 1))
        axis.grid(alpha=0.3)
        axis.set_title("larger points hold more images", fontsize=9)
        drawn.suptitle(textwrap.fill(title, 90), fontsize=12)
        for handle in drawn.legend(loc="outside lower center", ncols=3, frameon=False).legend_handles:
            handle.set_sizes([40])


def draw_two_class(path, title, positive, lines):
    """ROC and precision-recall curves of one class.  lines: (name, colour, fpr, tpr, recall, precision); of one name one legend entry."""
    with figure(path, 10, 4.9, columns=2) as (drawn, (roc, pr)):
        names = {}
        for name, colour, fpr, tpr, recall, precision in lines:
            (names[name],) = roc.plot(fpr, tpr, color=colour, linewidth=1.3, alpha=0.85)
            pr.step(recall, precision, where="post", color=colour, linewidth=1.3, alpha=0.85)
        roc.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        roc.set(xlabel="false-positive rate", ylabel="true-positive rate", title=f"ROC, positive: {positive}", xlim=(-0.01, 1), ylim=(0, 1.02))
        pr.set(xlabel="recall", ylabel="precision", title=f"precision and recall, positive: {positive}", xlim=(0, 1.01), ylim=(0, 1.02))
        for axis in (roc, pr):
            axis.grid(alpha=0.3)
        drawn.suptitle(textwrap.fill(title, 90), fontsize=12)
        drawn.legend(names.values(), names, loc="outside lower center", ncols=3, frameon=False)


def draw_class_gains(path, title, rows, colours):
    """Recall of each class without and with KD.  rows: [{"class", "images", "before", "after"}]; colours: of the two."""
    with figure(path, 9, 1.7 + 0.42 * len(rows)) as (drawn, axis):
        for row, found in enumerate(rows):
            axis.plot([100 * found["before"], 100 * found["after"]], [row, row], color="grey", linewidth=1.5, zorder=1)
        for key, name, colour in zip(("before", "after"), ("student without KD", "student with KD"), colours):
            axis.scatter([100 * found[key] for found in rows], range(len(rows)), color=colour, s=55, label=name, zorder=2)
        axis.set_yticks(range(len(rows)), [f"{found['class'][:40]} ({found['images']})" for found in rows])
        axis.set(xlabel="recall on test (%)", ylim=(len(rows) - 0.5, -0.5), xlim=(-2, 102))
        axis.grid(alpha=0.3, axis="x")
        axis.set_title(textwrap.fill(title, 80), fontsize=12)
        drawn.legend(loc="outside lower center", ncols=2, frameon=False)
