"""Figures of report.py.  Needs cli.py of `common` and matplotlib."""

import contextlib
import io
import math
import textwrap
from pathlib import Path

from common.cli import atomic_write


@contextlib.contextmanager
def figure(path, width, height, columns=1):
    """Yield a matplotlib figure and its axes; saved as PNG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130})
    drawn, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    yield drawn, axes
    image = io.BytesIO()
    drawn.savefig(image, format="png", bbox_inches="tight", pad_inches=0.15)
    plt.close(drawn)
    with atomic_write(path) as temporary:
        Path(temporary).write_bytes(image.getvalue())


def draw_curves(path, title, lines):
    """lines: (name, colour, rows of metrics.json); lines of one name share a legend entry."""
    names, panels = {}, (("train_loss", 1, "train loss"), ("val_accuracy", 100, "val accuracy (%)"))
    with figure(path, 10, 4.6, columns=2) as (drawn, axes):
        for axis, (key, scale, name) in zip(axes, panels):
            for kind, colour, rows in lines:
                points = [(row["epoch"], scale * row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
                (names[kind],) = axis.plot(*(zip(*points) if points else ([], [])), color=colour, linewidth=1.2, alpha=0.85,
                                           marker="o" if len(points) < 20 else None, markersize=3)  # fmt: skip
            low, high = axis.dataLim.intervaly
            if key == "train_loss" and 0 < 20 * low < high < math.inf:
                axis.set_yscale("log")  # a distillation loss is a sum of terms and may dwarf the cross-entropy
            axis.set(xlabel="epoch", ylabel=name)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        drawn.suptitle(textwrap.fill(title, 90), fontsize=12)
        drawn.legend(names.values(), names, loc="outside lower center", ncols=max(1, min(3, 110 // max(map(len, names)))), frameon=False)


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
