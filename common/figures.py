"""Figures of report.py.  Needs cli.py and comparison.py of `common` and matplotlib and pillow."""

import contextlib
import io
import math
import textwrap

from PIL import Image

from common.cli import atomic_write
from common.comparison import KINDS, number


@contextlib.contextmanager
def figure(path, height, title="", rows=1, width=5.5):
    """Yield a matplotlib figure and its axes, one below the other, so that a narrow screen shows them as large as a
    wide one; saved as PNG
    at the end.  Sizes in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "savefig.dpi": 130,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "text.parse_math": False,
        }
    )
    drawn, axes = plt.subplots(rows, 1, figsize=(width, height), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    drawn.suptitle(textwrap.fill(title, int(9 * width)), fontsize=12)
    yield drawn, axes
    image = io.BytesIO()
    drawn.savefig(image, format="png", bbox_inches="tight", pad_inches=0.15)
    plt.close(drawn)
    with atomic_write(path) as temporary:  # 128 colours: a third of the bytes, for report.html holds every figure
        Image.open(image).convert("RGB").quantize(128).save(temporary, "PNG")


def log_ticks(axis, formatter):
    """Numbers at 1, 2 and 5 of each decade of a logarithmic axis (axes.xaxis or axes.yaxis), so that a short range has
    some."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(ticker.NullFormatter())


def draw_curves(path, title, metric, scale, lines):
    """Train loss, the val metric that chooses the best epoch, times scale, and k-NN accuracy where there is one.

    lines: (name, colour, rows of metrics.json, results.json); lines of one name share a legend entry.
    A star is the best epoch, whose weights were tested; a bar at the end says that --patience stopped the run.
    """
    names, panels = (
        {},
        [
            ("train_loss", 1, "train loss", "-"),
            (f"val_{metric}", scale, f"val {metric}" + " (%)" * (scale == 100), "-"),
        ],
    )
    if any(number(row.get("val_knn")) is not None for _, _, rows, _ in lines for row in rows):
        panels += [
            (key, 100, "val k-NN accuracy (%)", style) for key, style in (("val_knn", "-"), ("val_teacher_knn", "--"))
        ]
    count = len({name for _, _, name, _ in panels})
    with figure(path, 0.9 + 3.1 * count, title, count) as (drawn, axes):
        for axis, (key, scale, name, style) in zip([*axes, axes[-1]], panels):
            for kind, colour, rows, results in lines:
                points = {row["epoch"]: scale * row[key] for row in rows if number(row.get(key)) is not None}
                if not points:
                    continue
                kind += ": its teacher" * (style == "--")
                (names[kind],) = axis.plot(
                    points.keys(),
                    points.values(),
                    style,
                    color=colour,
                    linewidth=1.2,
                    alpha=0.85,
                    marker="o" if len(points) < 20 else None,
                    markersize=3,
                )
                best, last = results.get("best_epoch"), max(points)
                if best in points and style == "-":
                    (names["best epoch"],) = axis.plot(
                        best, points[best], "*", color=colour, markersize=11, markeredgecolor="white"
                    )
                if results.get("stopped_early"):
                    (names["stopped early"],) = axis.plot(
                        last, points[last], "|", color=colour, markersize=16, markeredgewidth=2
                    )
            low, high = axis.dataLim.intervaly
            if scale == 1 and 0 < 20 * low < high < math.inf:
                axis.set_yscale("log")  # a distillation loss is a sum of terms and may dwarf the cross-entropy
                log_ticks(axis.yaxis, "{x:g}")
            axis.set(xlabel="epoch", ylabel=name)
            axis.xaxis.get_major_locator().set_params(integer=True)
        columns = max(1, min(3, 55 // max(map(len, names), default=1)))
        drawn.legend(names.values(), names, loc="outside lower center", ncols=columns)


def draw_confusion(path, title, counts, classes):
    """counts (C, C), rows are the true classes; the colour is the share of the true class."""
    size, share = len(counts), counts / counts.sum(axis=1, keepdims=True).clip(1)  # (C, C)
    names = [name if len(name) < 25 else name[:23] + "…" for name in map(str, classes)]
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    side = min(max(1.5 + 0.4 * size, 5.5), 11)
    with figure(path, side, title, width=side) as (drawn, axis):
        drawn.colorbar(
            axis.imshow(share, cmap="Blues", vmin=0, vmax=1), label="share of the true class", fraction=0.045
        )
        for row, column in [divmod(i, size) for i in range(size * size)] if size <= 12 else []:
            colour = "white" if share[row, column] > 0.6 else "black"
            axis.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=9, color=colour)
        if size <= 25:
            axis.set_xticks(range(size), names, **slant)
            axis.set_yticks(range(size), names)
        axis.set(xlabel="predicted class", ylabel="true class")
        axis.grid(False)


def draw_cost(path, title, points, xlabel, ylabel):
    """Accuracy against cost.  points: (name, colour, marker, cost, mean, std or None), cost above 0 on a log axis."""
    from matplotlib import ticker

    with figure(path, 4 + 0.25 * len({name for name, *_ in points}), title) as (drawn, axis):
        names, costs = {}, [x for _, _, _, x, _, _ in points]
        for name, colour, marker, x, mean, std in points:
            axis.errorbar(x, mean, yerr=std, fmt="none", color=colour, capsize=3)
            (names[textwrap.fill(name, 55)],) = axis.plot(x, mean, marker, color=colour, markersize=9)
        axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log", xlim=(min(costs) / 2, max(costs) * 2))
        log_ticks(axis.xaxis, ticker.EngFormatter(sep=""))
        axis.grid(True, which="both")
        drawn.legend(names.values(), names, loc="outside lower center", fontsize=10, labelspacing=0.8)


def draw_reliability(path, title, kinds):
    """Share of right answers against confidence, larger points where there are more images.

    kinds: (name, colour, {"confidence", "accuracy", "share" (bins,), "ece"}).
    """
    with figure(path, 5, title) as (drawn, axis):
        axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        for name, colour, found in kinds:
            x, y, share = (found[key][found["share"] > 0] for key in ("confidence", "accuracy", "share"))
            axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.6)
            axis.scatter(x, y, 8 + 220 * share, color=colour, alpha=0.8, label=f"{name}, ECE {found['ece']:.3f}")
        axis.set(
            xlabel="confidence (larger points hold more images)",
            ylabel="share of right answers",
            xlim=(0, 1.02),
            ylim=(0, 1.02),
        )
        for handle in drawn.legend(loc="outside lower center").legend_handles:
            handle.set_sizes([40])


def draw_two_class(path, title, positive, lines):
    """ROC and precision-recall curves of one class.

    lines: (name, colour, fpr, tpr, precision, recall); of one name one legend entry.
    """
    with figure(path, 7.1, title, rows=2) as (drawn, (roc, pr)):
        names = {}
        for name, colour, fpr, tpr, precision, recall in lines:
            (names[name],) = roc.plot(fpr, tpr, color=colour, linewidth=1.3, alpha=0.85)
            pr.step(recall, precision, where="post", color=colour, linewidth=1.3, alpha=0.85)
        roc.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        roc.set(
            xlabel=f"false-positive rate (positive: {positive})",
            ylabel="true-positive rate",
            xlim=(-0.01, 1),
            ylim=(0, 1.02),
        )
        pr.set(xlabel=f"recall (positive: {positive})", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
        drawn.legend(names.values(), names, loc="outside lower center")


def draw_class_gains(path, title, rows):
    """Recall of each class without and with KD.  rows: [{"class", "images", "before", "after"}]."""
    with figure(path, 1.9 + 0.35 * len(rows), title) as (drawn, axis):
        before, after = ([100 * found[key] for found in rows] for key in ("before", "after"))
        axis.hlines(range(len(rows)), before, after, color="grey", linewidth=1.5, zorder=1)
        for recalls, name in ((before, "student without KD"), (after, "student with KD")):
            axis.scatter(recalls, range(len(rows)), color=KINDS[name], s=55, label=name, zorder=2)
        axis.set_yticks(range(len(rows)), [f"{found['class'][:28]} ({found['images']})" for found in rows])
        axis.set(xlabel="recall on test (%); in brackets: test images", ylim=(len(rows) - 0.5, -0.5), xlim=(-2, 102))
        axis.grid(False, axis="y")
        drawn.legend(loc="outside lower center", ncols=2)
