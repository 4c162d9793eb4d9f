"""The report as Markdown, CSV and one HTML page.

Needs comparison.py and evidence.py of `common` (and what these need), pillow, and jinja2, which comes with torch.
"""

import base64
import csv
import io
from pathlib import Path

from PIL import Image

from common.comparison import (
    KEYS,
    KINDS,
    NAMES,
    NOT_PERCENT,
    cell,
    how_to_repeat,
    label,
    number,
    repeat_name,
    shown,
    title,
)
from common.evidence import span

COSTS = (
    ("parameters", "parameters"),
    ("weight_bytes", "weights (MB)"),
    ("multiply_adds", "multiply-adds"),
    ("images_per_second", "images/s"),
    ("latency_ms", "ms for one image"),
    ("checkpoint_bytes", "best.pth, to resume from (MB)"),
    ("train_seconds", "training (s)"),
)
FIDELITY = (
    ("agreement", "agreement with the teacher (%)"),
    ("teacher_right_kept", "the teacher's right answers kept (%)"),
    ("teacher_kl", "KL(teacher || student), nats"),
)


def short(value):
    """11173962 as 11.17 M, 0.5 as 0.5."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g} {unit}"
    return f"{value:.4g}"


def cost_rows(group):
    """[[kind, ...]] of COSTS, as text."""
    return [
        [
            kind,
            *(
                "-" if cost[key] is None else short(cost[key] * (1e-6 if key.endswith("bytes") else 1))
                for key, _ in COSTS
            ),
        ]
        for kind, cost in group["cost"].items()
    ]


def metric_rows(group):
    """[[name, value of each of KINDS]] of test metrics, mean over seeds, and of fidelity, as text: the one place that prints them all."""
    fidelity, rows = group["evidence"].get("fidelity", {}), []
    for key, found in group["metrics"].items():
        if not key.endswith(tuple(dict(FIDELITY))):
            name = title(key) + ("" if key.endswith(NOT_PERCENT) else " (%)")
            rows.append([name, *(cell(found[kind]["mean"], key, found[kind]["std"]) for kind in KINDS)])
    return rows + [
        [name, *(cell(fidelity.get(kind, {}).get(key), key) for kind in KINDS)] for key, name in FIDELITY if fidelity
    ]


def mcnemar_rows(group):
    """[[seed, task, gained, lost, p]] as text."""
    return [
        [repeat_name(test["seed"]), test["task"], str(test["gained"]), str(test["lost"]), f"{test['p']:.3g}"]
        for test in group["evidence"].get("mcnemar", [])
    ]


def headline(groups):
    """Sentences of each distilled group: whether the gain is larger than the noise, what to be warned of, what each side saw."""
    result = []
    for group in groups:
        if "sentence" in group["evidence"]:
            result.append(f"{label(group)}: {group['evidence']['sentence']}")
        result += [f"warning: {label(group)}: {text}" for text in group["warnings"]]
        if group["method"]:
            result.append(f"{label(group)}: {saw(group)}")
    return result


def saw(group):
    """'trained on 808 labels (teacher), 100 labels (student without KD), 100 labels and 708 images without (student with KD)'"""
    return "trained on " + ", ".join(f"{text} ({kind})" for kind, text in group["trained_on"].items())


def csv_text(runs):
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


def comparison_rows(groups, metric):
    """A head and a row a group that was trained with labels, as text."""
    groups = [group for group in groups if not group["label_free"]]
    many = "folds" if all(group["folds"] for group in groups) else "seeds"
    points = "" if metric.endswith(NOT_PERCENT) else " (points)"
    rows = [
        [
            *NAMES,
            *(kind.removeprefix("student ") for kind in KINDS),
            f"difference{points}",
            "95 % over test images",
            f"95 % over {many}",
            "verdict",
            many,
        ]
    ]
    for group in groups:
        part, evidence = group if metric == "accuracy" else group[metric], group["evidence"]
        kinds = [part[key.format(metric)] for key in KEYS]
        gain, without, with_kd = part["gain_paired"] or {"mean": part["gain"]}, kinds[1]["n"], kinds[2]["n"]
        unequal = without and with_kd and without != with_kd
        rows.append(
            [
                *names(group),
                *(cell(kind["mean"], metric, kind["std"]) for kind in kinds),
                cell(gain["mean"], metric, part["gain_std"], "+"),
                *(span(evidence.get(key), metric, False) for key in ("interval", "seeds_interval")),
                evidence.get("verdict", "-"),
                f"{without} without, {with_kd} with" if unequal else str(with_kd or without),
            ]
        )
    return rows


def label_free_rows(groups):
    """A head and a row a group that was trained without labels, as text."""
    rows = [[*NAMES, "val distillation loss", "val k-NN (%)", "teacher's k-NN (%)", "seeds"]]
    for group in groups:
        if group["label_free"]:
            loss, knn = group["val_distillation_loss"], group["knn"]
            rows.append(
                [
                    *names(group),
                    cell(loss["mean"], "loss", loss["std"]),
                    cell(knn["student"], "knn"),
                    cell(knn["teacher"], "knn"),
                    str(loss["n"]),
                ]
            )
    return rows


def comparison_tables(groups, metric):
    """Both, those that have a row."""
    return [rows for rows in (comparison_rows(groups, metric), label_free_rows(groups)) if rows[1:]]


def names(group):
    """The cells under NAMES."""
    method = ", ".join(filter(None, (group["method"], group["variant"])))
    return [group["dataset"], group["teacher"] or "-", group["student"], method or "-"]


def ranking_rows(selected, metric):
    """A head and a row a setting of `select`, as text; the test figure of the best alone, for the choice is val's."""
    tests = [cell(selected["test"]["mean"], metric, selected["test"]["std"])] + [""] * len(selected["ranked"])
    return [
        [selected["metric"], f"test {metric}", "runs", *selected["ranked"][0]["flags"]],
        *(
            [f"{setting['value']:.4f}", test, ", ".join(setting["runs"]), *map(shown, setting["flags"].values())]
            for setting, test in zip(selected["ranked"], tests)
        ),
    ]


def ranking(selected, metric):
    """Paragraphs: the settings as a table, the best one's name, the command that repeats it."""
    best = selected["ranked"][0]
    return [
        table(ranking_rows(selected, metric)),
        f"best {selected['metric']}: {best['value']:.4f}, {', '.join(best['runs'])}",
        f"again: {selected['command']}",
    ]


def table(rows):
    """Markdown, aligned, so that it also reads on a terminal."""
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def summarize(run):
    """A run in short: results.json without flags, environment and class names."""
    left_out = ("flags", "environment", "script", "dataset", "path", "written", "id", "rows")
    return {
        "run": run["path"],
        "dataset": run["id"]["dataset"],
        **{key: run[key] for key in run if key not in left_out},
    }


def run_rows(runs, metric):
    """A head and a row a run, as text; runs: of `summarize`.  A run without that test metric shows on val what chose its best epoch."""
    rows = [
        [
            "run",
            "role",
            "method",
            "model",
            "dataset",
            "seed",
            "best epoch",
            "epochs",
            f"test {metric}",
            "at the last epoch",
        ]
    ]
    for run in runs:
        row = [
            run["run"],
            run["role"],
            run.get("method") or "-",
            run["model"]["name"],
            run["dataset"],
            run["seed"],
            run.get("best_epoch"),
            run.get("last_epoch"),
        ]
        split, shown, of = "test", metric, ""
        if number(run["test"].get(metric)) is None:
            split, shown = "val", run["select_metric"] or metric
            of = f" (val {shown})"
        values = [number(run[part].get(shown)) for part in (split, f"final_{split}")]
        rows.append([*map(str, row), *("-" if value is None else cell(value, shown) + of for value in values)])
    return rows


def markdown(report, metric):
    groups, chosen = report["groups"], report["selected"]
    notes = [f"{label(group)}: {note}" for group in groups for note in group["notes"]] + report["notes"]
    costs = [[label(group), *row] for group in groups for row in cost_rows(group)]
    parts = ["# Report"]
    if chosen:
        parts += ["## Selection on val", *ranking(chosen, metric)]
    parts += [
        f"## Test {title(metric)}" + ("" if metric.endswith(NOT_PERCENT) else " in %"),
        *map(table, comparison_tables(groups, metric)),
        "Mean ± sample standard deviation over seeds; the difference is that between runs of one seed, where "
        "both kinds have one.",
    ]
    if costs:
        parts += [
            "## Gain and noise",
            bullets(headline(groups)),
            "## Cost",
            table([["group", "model", *(name for _, name in COSTS)], *costs]),
        ]
    parts += ["## Runs", table(run_rows(report["runs"], metric))]
    for heading, sentences in (("Missing", report["missing"]), ("Notes", notes)):
        parts += [f"## {heading}", bullets(sentences)] if sentences else []
    parts += ["## Figures", *(f"![{text}]({name})" for name, text in report["figures"].items())]
    return "\n\n".join(parts) + "\n"


def bullets(sentences):
    return "\n".join(f"- {sentence}" for sentence in sentences)


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Knowledge distillation report</title>
<style>
:root { color-scheme: light dark; --text: #1d2026; --soft: #5b6270; --line: #d9dce2; --page: #fff; --band: #f5f6f8;
        --gain: #00714f; --loss: #b3261e; --noise: #5b6270; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --soft: #a3aab6; --line: #3a3f49; --page: #16181d; --band: #1f2229; --gain: #4fd1a5; --loss: #ff8a80; --noise: #a3aab6; }
  img.figure { filter: invert(0.91) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1080px; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 1rem 0 0.2rem; } h2 { font-size: 1.3rem; margin: 2.2rem 0 0.5rem; } h3 { font-size: 1.05rem; margin: 1.4rem 0 0.4rem; }
p, li, summary { max-width: 75ch; overflow-wrap: break-word; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; margin: 0.4rem 0; font-variant-numeric: tabular-nums; }
.figures td { white-space: nowrap; } .figures td:first-child { white-space: normal; min-width: 7rem; }
th, td { text-align: left; padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); vertical-align: top; } th { font-weight: 600; }
.verdict { font-weight: 600; white-space: nowrap; } .headline li { margin: 0.4rem 0; max-width: 90ch; }
.gain { color: var(--gain); } .loss { color: var(--loss); } .noise { color: var(--noise); }
details { border: 1px solid var(--line); border-radius: 8px; margin: 0.7rem 0; padding: 0.2rem 0.9rem; }
summary { cursor: pointer; padding: 0.45rem 0; font-weight: 600; }
img.figure { max-width: 100%; height: auto; display: block; margin: 0.4rem 0; background: #fff; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 0.8rem; align-items: start; }
.wide { grid-column: 1 / -1; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)); gap: 0.8rem; padding: 0; list-style: none; }
.gallery li { border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem; font-size: 0.82rem; line-height: 1.35; overflow-wrap: anywhere; }
.gallery img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--band); image-rendering: auto; }
code, pre { font: 0.84rem/1.45 ui-monospace, monospace; }
pre { background: var(--band); padding: 0.6rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
{% macro grid(head, rows, kind="figures") %}<div class="scroll"><table class="{{ kind }}">
<thead><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>{% endmacro %}
{% macro figures(names) %}{% if names %}<div class="row">{% for name in names %}
<div class="scroll{{ ' wide' if images[name].least > 400 }}"><img class="figure" loading="lazy"
 alt="{{ report.figures[name] }}" style="min-width: {{ images[name].least }}px" src="data:image/png;base64,{{ images[name].png }}"></div>
{% endfor %}</div>{% endif %}{% endmacro %}
<h1>Knowledge distillation report</h1>
<p class="soft">Runs: {{ report.runs|length }}. Groups: {{ groups|length }}. A group is the seeds or folds of one student trained in one way; figures are
 of the test set, of the epoch chosen on val.</p>

{% if selection %}<h2>Selection on val</h2>
<p>Best {{ report.selected.metric }}: <b>{{ selection[1][0] }}</b>, with test {{ title }} <b>{{ selection[1][1] }}</b>{{ percent }}: {{ selection[1][2] }}.
 <span class="soft">The setting is chosen on val; to choose it by the test figures below would flatter it.</span></p>
{{ grid(selection[0], selection[1:], "") }}<p>Again:</p><pre>{{ report.selected.command }}</pre>{% endif %}

{% if families %}<h2>{{ "What did distillation buy?" if judged else "Test figures" }}</h2>
<ul class="headline">{% for group in judged %}<li><b class="{{ verdict_of(group)[1] }}">{{ label(group) }}</b>: {{ group.evidence.sentence }}
{% for text in group.warnings %}<br><b class="loss">Warning:</b> {{ text }}.{% endfor %}<br><span class="soft">{{ saw(group) }}</span></li>
{% endfor %}</ul>
{% for heading, rows in families.items() %}<h3>{{ heading }}</h3>
<div class="scroll"><table class="figures"><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for method, verdict, cells in rows %}<tr><td>{{ method }}</td><td class="verdict {{ verdict[1] }}">{{ verdict[0] }}</td>
{% for value in cells %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>{% endfor %}
<p class="soft">Test {{ title }}{{ percent }}; mean ± sample standard deviation over seeds. The interval over test images resamples them (whole lesions,
 patients or cases where there are such groups), the same for both students; the one over seeds, or folds, is Student's t of their gains. A
 verdict of gain or loss needs both without 0. A single seed says nothing of training's noise; folds share training images, so that their
 interval is rather too narrow. {% if judged|length > 1 %}{{ judged|length }} differences are judged here, each as if it were the only one.
{% endif %}</p>
{% endif %}
{% if free[1:] %}<h2>Students without labels</h2>{{ grid(free[0], free[1:]) }}
<p class="soft">The distillation loss is of the epoch that it chose on val; k-NN accuracy is of the last epoch, where --eval-dataset was given.</p>{% endif %}
{{ figures(overview) }}

<h2>{{ "Can I trust it?" if judged else "In detail" }}</h2>
{% for group, gallery in groups %}
<details{% if loop.first %} open{% endif %}><summary>{{ label(group) }}</summary>
<p class="soft">{{ saw(group) }}</p>{% for note in group.notes %}<p class="soft">{{ note }}</p>{% endfor %}
{% if group.metrics %}<h3>Test metrics{% if group.evidence.fidelity %}, fidelity to the teacher{% endif %}</h3>
{{ grid([""] + kinds, metric_rows(group)) }}{% endif %}
{% if group.cost %}<h3>Cost</h3>{{ grid([""] + cost_names, cost_rows(group)) }}{% endif %}
{% if group.evidence.mcnemar %}<h3>McNemar's test of accuracy</h3>
<p class="soft">Of the images that one of two students alone gets right: do both have the same share? It is about the accuracy of each pair of
 runs on these test images, whatever metric the verdict is about, and not about training's noise.{% if group.evidence.grouped %} Several images
 are of one lesion, patient or case; the test takes them for independent, the interval above does not.{% endif %}</p>
{{ grid(["seed or fold", "task", "right with KD alone", "right without KD alone", "p, exact"], mcnemar_rows(group)) }}{% endif %}
{{ figures(group.figures) }}
{% if gallery %}<h3>Where the students differ</h3>
<p class="soft">Of the images that one student alone gets right, those with the largest change in the true class's probability
 ({{ gallery[0].seed }}): the extremes, no sample of the test set.</p>
<ul class="gallery">{% for item in gallery %}<li><img alt="test image {{ item.id }}" src="data:image/jpeg;base64,{{ item.image }}">
<div class="soft">{{ item.id }}{% if item.task %}, {{ item.task }}{% endif %}</div><div>true: <b>{{ item.true }}</b></div>
{% for answer in item.answers %}<div><span class="{{ 'gain' if answer.right else 'loss' }}">{{ '✓' if answer.right else '✗' }}</span>
 {{ answer.kind }}: {{ answer.name }} {{ '%.0f' % (100 * answer.probability) }} %</div>{% endfor %}
{% if item.text %}<div class="soft">{{ item.text }}</div>{% endif %}</li>{% endfor %}</ul>{% endif %}
</details>
{% endfor %}

{% for name, sentences in (("Missing", report.missing), ("Notes", report.notes)) %}{% if sentences %}<h2>{{ name }}</h2>
<ul>{% for sentence in sentences %}<li>{{ sentence }}</li>{% endfor %}</ul>{% endif %}{% endfor %}
{% if rest %}<h2>Runs in no group</h2>{{ figures(rest) }}{% endif %}

<h2>How to repeat each run</h2>
{{ grid(runs_table[0], runs_table[1:]) }}
{% for run in repeats %}<details><summary>{{ run.path }}</summary><pre>{{ run.command }}</pre>
<p class="soft">git commit {{ run.commit or "unknown" }}<br>
{% for name, value in run.hardware.items() %}{{ name }}: {{ value }}{{ ", " if not loop.last }}{% endfor %}<br>
{% for name, value in run.versions.items() %}{{ name }} {{ value }}{{ ", " if not loop.last }}{% endfor %}</p></details>{% endfor %}
</body>
</html>
"""


def verdict_of(group):
    """(word, CSS class): one seed alone is no proof, and has no colour."""
    word = group["evidence"].get("verdict", "-")
    if word not in ("gain", "loss"):
        return word, "noise"
    return (word, word) if group["evidence"]["seeds_interval"] else (f"{word}, one seed", "noise")


def html(report, runs, metric, folder, galleries):
    """The whole page as text, figures within.  runs: of read_runs; folder: of the figures; galleries: a list of items a group."""
    import jinja2

    groups, images, families = report["groups"], {}, {}
    for name in report["figures"]:
        png = (Path(folder) / name).read_bytes()
        images[name] = {
            "png": base64.b64encode(png).decode(),
            "least": round(0.45 * Image.open(io.BytesIO(png)).width),
        }  # smaller is not readable
    overview = [name for name in images if name.startswith("cost-")]
    placed = {*overview, *(name for group in groups for name in group["figures"])}
    order = 3, 7, 8, 9, 6, 5, 4, 11  # what distillation bought comes first
    head, *rows = ([row[i] for i in order] for row in comparison_rows(groups, metric))
    for group, (method, *cells) in zip([group for group in groups if not group["label_free"]], rows):
        models = f"{group['teacher']} to {group['student']}" if group["teacher"] else f"{group['student']} alone"
        families.setdefault(f"{group['dataset']}: {models}", []).append((method, verdict_of(group), cells))
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    return page.render(
        report=report,
        groups=list(zip(groups, galleries)),
        title=title(metric),
        percent="" if metric.endswith(NOT_PERCENT) else " in %",
        kinds=list(KINDS),
        families=families,
        columns=[head[0], "verdict", *head[1:]],
        cost_names=[name for _, name in COSTS],
        judged=[group for group in groups if "sentence" in group["evidence"]],
        images=images,
        overview=overview,
        free=label_free_rows(groups),
        rest=[name for name in images if name not in placed],
        selection=report["selected"] and ranking_rows(report["selected"], metric),
        runs_table=run_rows(report["runs"], metric),
        repeats=[{"path": run["path"], **how_to_repeat(run)} for run in runs],
        label=label,
        saw=saw,
        verdict_of=verdict_of,
        cost_rows=cost_rows,
        metric_rows=metric_rows,
        mcnemar_rows=mcnemar_rows,
    )
