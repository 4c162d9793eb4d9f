"""The report as Markdown, CSV and one HTML page.

Needs comparison.py of `common` (and what it needs), and jinja2, which comes with torch.
"""

import base64
import csv
import io
from pathlib import Path

from common.comparison import KEYS, KINDS, NOT_PERCENT, cell, how_to_repeat, label, number

COSTS = (("parameters", "parameters"), ("weight_bytes", "weights (MB)"), ("multiply_adds", "multiply-adds"),
         ("images_per_second", "images/s"), ("latency_ms", "ms for one image"),
         ("checkpoint_bytes", "best.pth, to resume from (MB)"), ("train_seconds", "training (s)"))  # fmt: skip
FIDELITY = (("agreement", "agreement with the teacher (%)"), ("teacher_right_kept", "the teacher's right answers kept (%)"),
            ("teacher_kl", "KL(teacher || student), nats"))  # fmt: skip


def short(value):
    """11173962 as 11.17 M, 0.5 as 0.5."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g} {unit}"
    return f"{value:.4g}"


def cost_rows(group):
    """[[kind, ...]] of COSTS, as text."""
    scale = {"checkpoint_bytes": 1e-6, "weight_bytes": 1e-6}
    return [[kind, *("-" if cost[key] is None else short(cost[key] * scale.get(key, 1)) for key, _ in COSTS)] for kind, cost in group["cost"].items()]


def trust_rows(group):
    """[[name, value of each kind]] of fidelity and calibration, as text; kinds are the columns of KINDS."""
    evidence, rows = group.get("evidence") or {}, []
    for key, name in FIDELITY:
        found = {kind: of[key] for kind, of in evidence.get("fidelity", {}).items()}
        if found:
            rows.append([name, *(cell(found.get(kind), key) for kind in KINDS)])
    for task in next(iter(evidence.get("calibration", {}).values()), {}):
        name = "expected calibration error" + ("" if task == "label" else f", {task}")
        values = [evidence["calibration"].get(kind, {}).get(task) for kind in KINDS]
        rows.append([name, *("-" if value is None else f"{value:.3f}" for value in values)])
    return rows


def mcnemar_rows(group):
    """[[seed, task, gained, lost, p]] as text."""
    return [[str(test["seed"]), test["task"], str(test["gained"]), str(test["lost"]), f"{test['p']:.3g}"]
            for test in (group.get("evidence") or {}).get("mcnemar", [])]  # fmt: skip


def interval(group):
    """'-0.40 to +1.80', in points, or '-'."""
    bounds = (group.get("evidence") or {}).get("interval")
    return f"{100 * bounds[0]:+.2f} to {100 * bounds[1]:+.2f}" if bounds else "-"


def answers(groups):
    """A sentence a distilled group: was the gain larger than the noise?"""
    return [f"{label(group)}: {group['evidence']['sentence']}" for group in groups if (group.get("evidence") or {}).get("sentence")]


def csv_text(runs):
    """A row a run of report.json: names, cost, and each val and test metric that is a number."""
    rows = []
    for run in runs:
        names = {key: run.get(key) for key in ("run", "role", "method", "dataset", "seed")}
        names.update(teacher=(run.get("teacher") or {}).get("name"), model=run["model"]["name"], resolution=run["model"].get("resolution"),
                     **{key: run.get(key) for key in ("best_epoch", "last_epoch", "stopped_early")}, **run["cost"])  # fmt: skip
        metrics = {f"{split}_{key}": value for split in ("val", "test") for key, value in (run.get(split) or {}).items() if number(value) is not None}
        rows.append({**names, **metrics})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def comparison_table(groups, metric):
    return table(comparison_rows(groups, metric))


def comparison_rows(groups, metric):
    """A head and a row a group, as text."""
    points = "" if metric.endswith(NOT_PERCENT) else " (points)"
    rows = [["dataset", "teacher", "student", "method", *KINDS, f"difference{points}", "seeds"]]
    for group in groups:
        part = group if metric == "accuracy" else group[metric]
        kinds = [part[key.format(metric)] for key in KEYS]
        method = ", ".join(filter(None, (group["method"], group["variant"]))) or "-"
        without, with_kd = kinds[1]["n"], kinds[2]["n"]
        seeds = str(with_kd) if with_kd == without else f"{without} without, {with_kd} with"
        rows.append([group["dataset"], group["teacher"] or "-", group["student"], method,
                     *(cell(kind["mean"], metric, kind["std"]) for kind in kinds),
                     cell(part["gain_paired"]["mean"] if part["gain_paired"] else part["gain"], metric, part["gain_std"], "+"), seeds])  # fmt: skip
    return rows


def ranking_rows(selected, wanted):
    """A head and a row a setting of `select`, as text."""
    flags = list(selected[0]["flags"])
    return [[wanted, "runs", *flags],
            *([f"{s['value']:.4f}", ", ".join(s["runs"]), *(str(s["flags"][flag]) for flag in flags)] for s in selected)]  # fmt: skip


def ranking(selected, wanted, command):
    """The settings as a table, then the best one's name, then the command that repeats it."""
    best = selected[0]
    return f"{table(ranking_rows(selected, wanted))}\nbest {wanted}: {best['value']:.4f}, {', '.join(best['runs'])}\nagain: {command}"


def table(rows):
    """Markdown, aligned, so that it also reads on a terminal."""
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def summarize(run):
    """A run in short: results.json without flags, environment and class names."""
    left_out = ("flags", "environment", "script", "dataset", "final_val")
    short = {key: value for key, value in run["results"].items() if key not in left_out}
    both = {f"{key}_test": run[key] for key in ("recorded", "recomputed") if key in run}
    return {"run": run["path"], "dataset": run["id"]["dataset"], "seed": run["seed"], **short, **both}


def run_rows(runs, metric):
    """A head and a row a run, as text; runs: of `summarize`."""
    rows = [["run", "role", "method", "model", "dataset", "seed", "best epoch", "epochs", f"test {metric}", "at the last epoch"]]
    for run in runs:
        names = [run["run"], run["role"], run.get("method") or "-", run["model"]["name"], run["dataset"], run["seed"]]
        names += [run.get("best_epoch"), run.get("last_epoch")]
        rows.append([*map(str, names), *(cell((run.get(part) or {}).get(metric), metric) for part in ("test", "final_test"))])
    return rows


def markdown(report, metric):
    rows = run_rows(report["runs"], metric)
    notes = [f"{label(group)}: {note}" for group in report["groups"] for note in group["notes"]] + report["notes"]
    costs = [[label(group), *row] for group in report["groups"] for row in cost_rows(group)]
    parts = ["# Report", f"## Test {metric}" + ("" if metric.endswith(NOT_PERCENT) else " in %"), comparison_table(report["groups"], metric),
             "Mean ± sample standard deviation over seeds; the difference is that between runs of one seed, where both kinds have one.",
             *(["## Gain and noise", "\n".join(f"- {sentence}" for sentence in answers(report["groups"]))] if answers(report["groups"]) else []),
             *(["## Cost", table([["group", "model", *(name for _, name in COSTS)], *costs])] if costs else []),
             "## Runs", table(rows)]  # fmt: skip
    if report["selected"]:
        parts += ["## Selection", ranking(*report["selected"].values()).replace("\nbest", "\n\nbest").replace("\nagain", "\n\nagain")]
    for title, sentences in (("Missing", report["missing"]), ("Notes", notes)):
        parts += [f"## {title}", "\n".join(f"- {sentence}" for sentence in sentences)] if sentences else []
    parts += ["## Figures", *(f"![{title}]({name})" for name, title in report["figures"].items())]
    return "\n\n".join(parts) + "\n"


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
p, li { max-width: 75ch; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; margin: 0.4rem 0; font-variant-numeric: tabular-nums; }
.figures td { white-space: nowrap; } .figures td:first-child { white-space: normal; }
th, td { text-align: left; padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); vertical-align: top; } th { font-weight: 600; }
.verdict { font-weight: 600; white-space: nowrap; } .gain { color: var(--gain); } .loss { color: var(--loss); } .noise { color: var(--noise); }
details { border: 1px solid var(--line); border-radius: 8px; margin: 0.7rem 0; padding: 0.2rem 0.9rem; }
summary { cursor: pointer; padding: 0.45rem 0; font-weight: 600; }
img.figure { max-width: 100%; height: auto; display: block; margin: 0.8rem 0; background: #fff; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 0.8rem; align-items: center; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(215px, 1fr)); gap: 0.8rem; padding: 0; list-style: none; }
.gallery li { border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem; font-size: 0.82rem; line-height: 1.35; overflow-wrap: anywhere; }
.gallery img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--band); image-rendering: auto; }
code, pre { font: 0.84rem/1.45 ui-monospace, monospace; }
pre { background: var(--band); padding: 0.6rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
{% macro grid(head, rows) %}<div class="scroll"><table><thead><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>{% endmacro %}
{% macro figure(name) %}<img class="figure" loading="lazy" alt="{{ titles[name] }}" src="data:image/png;base64,{{ images[name] }}">{% endmacro %}
<h1>Knowledge distillation report</h1>
<p class="soft">{{ report.runs|length }} runs, {{ groups|length }} groups. A group is the seeds of one student trained in one way; figures are of the test set,
 of the epoch chosen on val.</p>

<h2>What did distillation buy?</h2>
{% for heading, some in families.items() %}<h3>{{ heading }}</h3>
<div class="scroll"><table class="figures"><thead><tr><th>method</th><th>verdict</th><th>difference{{ points }}</th><th>95 % interval</th><th>with KD</th>
<th>without KD</th><th>teacher</th><th>seeds</th></tr></thead><tbody>
{% for group in some %}<tr><td>{{ group.method }}</td><td class="verdict {{ group.colour }}">{{ group.word }}</td><td>{{ group.difference }}</td>
<td>{{ group.interval }}</td>{% for value in group.accuracies %}<td>{{ value }}</td>{% endfor %}<td>{{ group.seeds }}</td></tr>{% endfor %}
</tbody></table></div>{% endfor %}
<p class="soft">Test {{ metric }}{{ percent }}; mean ± sample standard deviation over seeds. The interval resamples test images (whole lesions, patients
 or cases where there are such groups), the same for both students. A verdict of gain or loss needs an interval without 0 over images, and over
 seeds where there are several.
 A single seed says nothing of training's noise. {% if compared > 1 %}{{ compared }} differences are judged
 here, each as if it were the only one.{% endif %}</p>
{% for name in overview %}{{ figure(name) }}{% endfor %}
{% if bars %}<details><summary>The same as bars</summary>{{ figure(bars) }}</details>{% endif %}

<h2>Can I trust it?</h2>
{% for group in groups %}
<details{% if loop.first %} open{% endif %}><summary>{{ group.label }}</summary>
{% if group.sentence %}<p>{{ group.sentence }}</p>{% endif %}
{% for note in group.notes %}<p class="soft">{{ note }}</p>{% endfor %}
{% if group.cost %}<h3>Cost</h3>{{ grid([""] + cost_names, group.cost) }}{% endif %}
{% if group.trust %}<h3>Fidelity and calibration</h3>{{ grid([""] + kinds, group.trust) }}{% endif %}
{% if group.mcnemar %}<h3>McNemar's test</h3>{{ grid(["seed", "task", "right with KD alone", "right without KD alone", "p, exact"], group.mcnemar) }}
{% if group.grouped %}<p class="soft">Several images are of one lesion, patient or case; the test takes them for independent, the interval above
 does not.</p>{% endif %}{% endif %}
{% for name in group.wide %}{{ figure(name) }}{% endfor %}
{% if group.square %}<div class="row">{% for name in group.square %}{{ figure(name) }}{% endfor %}</div>{% endif %}
{% if group.gallery %}<h3>Where the students differ</h3>
<p class="soft">Of the images that one student alone gets right, those with the largest change in the true class's probability
 (seed {{ group.gallery[0].seed }}): the extremes, no sample of the test set.</p>
<ul class="gallery">{% for item in group.gallery %}<li><img alt="test image {{ item.id }}" src="data:image/jpeg;base64,{{ item.image }}">
<div class="soft">{{ item.id }}{% if item.task %}, {{ item.task }}{% endif %}</div><div>true: <b>{{ item.true }}</b></div>
{% for answer in item.answers %}<div><span class="{{ 'gain' if answer.right else 'loss' }}">{{ '✓' if answer.right else '✗' }}</span>
 {{ answer.kind }}: {{ answer.name }} {{ '%.0f' % (100 * answer.probability) }} %</div>{% endfor %}
{% if item.text %}<div class="soft">{{ item.text }}</div>{% endif %}</li>{% endfor %}</ul>{% endif %}
</details>
{% endfor %}

{% if selection %}<h2>Selection</h2>{{ grid(selection.head, selection.rows) }}
<p>Best {{ selection.metric }}: <b>{{ selection.value }}</b>, {{ selection.runs }}. Again:</p><pre>{{ selection.command }}</pre>{% endif %}
{% for name, sentences in lists %}{% if sentences %}<h2>{{ name }}</h2>
<ul>{% for sentence in sentences %}<li>{{ sentence }}</li>{% endfor %}</ul>{% endif %}{% endfor %}
{% if rest %}<h2>Runs in no group</h2>{% for name in rest %}{{ figure(name) }}{% endfor %}{% endif %}

<h2>How to repeat each run</h2>
{{ grid(run_names, run_rows) }}
{% for run in repeats %}<details><summary>{{ run.path }}</summary><pre>{{ run.command }}</pre>
<p class="soft">git commit {{ run.commit or "unknown" }}<br>
{% for name, value in run.hardware.items() %}{{ name }}: {{ value }}{{ ", " if not loop.last }}{% endfor %}<br>
{% for name, value in run.versions.items() %}{{ name }} {{ value }}{{ ", " if not loop.last }}{% endfor %}</p></details>{% endfor %}
</body>
</html>
"""


def group_view(group, metric, gallery):
    """What the template shows of a group."""
    evidence, (*_, method, teacher, without, with_kd, difference, seeds) = group.get("evidence") or {}, comparison_rows([group], metric)[1]
    word, colour = evidence.get("verdict", "-"), "noise"
    if word in ("gain", "loss"):
        word, colour = (word, word) if evidence["seeds_interval"] else (f"{word}, one seed", "noise")
    return {"label": label(group), "method": method, "accuracies": [with_kd, without, teacher], "difference": difference, "seeds": seeds,
            "interval": interval(group), "word": word, "colour": colour,
            "sentence": evidence.get("sentence"), "notes": group["notes"],
            "cost": cost_rows(group), "trust": trust_rows(group), "mcnemar": mcnemar_rows(group), "grouped": evidence.get("grouped"),
            "wide": [name for name in group["figures"] if not name.startswith("confusion")],
            "square": sorted((name for name in group["figures"] if name.startswith("confusion")), key=lambda name: name.split("-", 2)[2]),
            "gallery": gallery}  # fmt: skip


def html(report, runs, metric, folder, galleries):
    """The whole page as text, figures within.  runs: of read_runs; folder: of the figures; galleries: a list of items a group."""
    import jinja2

    groups, percent = report["groups"], not metric.endswith(NOT_PERCENT)
    titles = report["figures"]
    images = {name: base64.b64encode((Path(folder) / name).read_bytes()).decode() for name in titles}
    placed = {name for group in groups for name in group["figures"]}
    free = [name for name in titles if name not in placed]
    overview = [name for name in free if name.startswith("cost-")]
    bars = next(iter(titles)) if groups else None
    views, families = [group_view(group, metric, gallery) for group, gallery in zip(groups, galleries)], {}
    for group, view in zip(groups, views):
        models = f"{group['teacher']} to {group['student']}" if group["teacher"] else f"{group['student']} alone"
        families.setdefault(f"{group['dataset']}: {models}", []).append(view)
    selected = report["selected"] and selection_view(*report["selected"].values())
    head, *rows = run_rows(report["runs"], metric)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(TEMPLATE)
    return page.render(
        report=report, metric=metric, percent=" in %" if percent else "", points=" (points)" if percent else "", kinds=list(KINDS),
        groups=views, families=families, bars=bars, cost_names=[name for _, name in COSTS],
        compared=len(answers(groups)), titles=titles, images=images, overview=overview, rest=[name for name in free if name not in (*overview, bars)],
        selection=selected, lists=[("Missing", report["missing"]), ("Notes", report["notes"])], run_names=head, run_rows=rows,
        repeats=[{"path": run["path"], **how_to_repeat(run)} for run in runs],
    )  # fmt: skip


def selection_view(ranked, metric, command):
    """The settings of --select as the template shows them."""
    head, *rows = ranking_rows(ranked, metric)
    return {"head": head, "rows": rows, "metric": metric, "value": rows[0][0], "runs": rows[0][1], "command": command}
