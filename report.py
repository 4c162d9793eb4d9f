"""Read many runs and write one comparison: report.json, report.md and figures.

    python report.py runs
    python report.py runs/teacher runs/student runs/distill --output report
    python report.py runs --metric balanced_accuracy
    python report.py runs --dataset cifar10 --method response    # which group fills the entries cnn and vit
    python report.py runs/sweep --select val_loss                # name the best point of a sweep, chosen on val
    python report.py runs --reevaluate --device cpu              # load every checkpoint and test it again

A group is the seeds of one distilled student: same test set, classes, training data, teacher file, student, method
and flags. Beside it stand its teacher, found by the SHA-256 of its checkpoint, and its baseline: the same student on
the same data without a teacher. What is missing is named and left empty. Of several tasks --metric takes each task's figures,
as location_accuracy, or their mean, accuracy. The entries cnn and vit hold students that read images alone.

Needs from common: augment.py, cli.py, data.py, dermatology.py, distributed.py, figures.py, images.py, metrics.py, splitting.py,
tables.py; with --reevaluate also evaluation.py, loader.py, models.py, training.py.
Runs on images and texts need image_text.py and multimodal.py too with --reevaluate.
Packages: torch, numpy, pillow, matplotlib, scikit-learn; with --reevaluate timm too.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

from common import cli
from common.figures import draw_bars, draw_confusion, draw_curves
from common.metrics import better

# Flags that say where and how fast a run ran, not what it learned, and those whose outcome results.json tells. Data and
# teacher are told apart by their fingerprints, so their paths may differ from machine to machine.
NOT_SETTINGS = {"seed", "output", "device", "workers", "overwrite", "resume", "cache", "config", "sweep", "sweep_index", "save_every",
                "save_samples", "download", "data_root", "teacher_checkpoint", "dataset", "model", "method", "resolution",
                "eval_dataset", "eval_data_root", "eval_every"}  # fmt: skip
NEEDED = {"flags.seed": int, "dataset.name": str, "dataset.sha256.train": str, "dataset.sha256.test": str, "model.name": str,
          "model.family": str, "test.accuracy": (int, float)}  # fmt: skip
OF_DISTILLED = {"method": str, "teacher.name": str}
NAMES = ("dataset", "teacher", "student", "method")
TEST = ("test", "classes")  # must agree where two test figures are compared
STUDENT = ("dataset", "train", *TEST, "student", "resolution")  # and these between a student and its baseline
NOT_PERCENT = ("loss", "teacher_kl")  # metrics that are no share of 1
KINDS = {"teacher": "#0072B2", "student without KD": "#E69F00", "student with KD": "#009E73"}  # Okabe-Ito colours
KEYS = ("teacher_{}", "student_{}_without_kd", "student_{}_with_kd")  # of report.json, with the metric's name


def build_parser():
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders searched for them")
    parser.add_argument("--output", default="report", help="folder for report.json, report.md and figures")
    parser.add_argument("--metric", default="accuracy", help="test metric of table and bars; cnn and vit always hold accuracy")
    parser.add_argument("--select", metavar="val_METRIC", help="rank the settings by this val metric and name the best; as val_loss")
    parser.add_argument("--mode", choices=("max", "min"), help="of --select; by default min for losses, else max")
    parser.add_argument("--method", help="only a group of this method fills the entries cnn and vit; by default any")
    parser.add_argument("--dataset", help="only a group on this dataset fills the entries cnn and vit; by default any")
    parser.add_argument("--reevaluate", action="store_true", help="compute the test metrics again from the checkpoints; by default off")
    parser.add_argument("--device", default="auto", help="of --reevaluate: auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--batch-size", type=cli.POSITIVE, default=256, help="of --reevaluate: images a step")
    return parser


def find_run_folders(paths):
    folders = {}  # resolved path -> path as given, so that a run named twice is read once
    for path in map(Path, paths):
        if not path.is_dir():
            raise cli.UserError(f"{path} is no folder: give run folders, or folders that hold them")
        files = [file for name in ("results.json", "config.json") for file in path.rglob(name)]
        # not in hidden folders: a batch job may be copying its results there
        found = {file.parent for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)}
        for folder in [path] if path in found else sorted(found):
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise cli.UserError(f"no run in {', '.join(paths)}: neither results.json nor config.json was found; give folders that "
                            "train_teacher.py, train_student.py or distill.py wrote")  # fmt: skip
    return list(folders.values())


def number(value):
    """A finite number, or None: a metric that is NaN or absent is missing, not zero."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def check(results):
    """Raises KeyError or ValueError where results.json does not hold what a comparison needs."""
    if results["role"] not in ("teacher", "student", "distill"):
        raise ValueError(f"the role is {results['role']!r}, not teacher, student or distill")
    for dotted, kind in {**NEEDED, **(OF_DISTILLED if results["role"] == "distill" else {})}.items():
        value = results
        for key in dotted.split("."):
            value = value[key]
        if not isinstance(value, kind):
            raise ValueError(f"{dotted} is {value!r}")
    if not 0 <= results["test"]["accuracy"] <= 1:
        raise ValueError(f"the test accuracy is {results['test']['accuracy']}, not between 0 and 1")


def identity(results):
    """Everything in which the seeds of one group agree, flat, so that a label can show where groups differ."""
    dataset, teacher, flags = results["dataset"], results.get("teacher") or {}, dict(results["flags"])
    if flags.get("teacher_embeddings"):
        flags["teacher_embeddings"] = Path(flags["teacher_embeddings"]).name  # a staged copy keeps only its name
    return {"dataset": dataset["name"], "teacher": teacher.get("name"), "student": results["model"]["name"],
            "method": results.get("method"), "resolution": results["model"].get("resolution"), "test": dataset["sha256"]["test"],
            "train": dataset["sha256"]["train"], "classes": dataset.get("classes"), "teacher sha256": teacher.get("sha256"),
            **{f"--{key.replace('_', '-')}": flags[key] for key in flags if key not in NOT_SETTINGS}}  # fmt: skip


def read_runs(folders):
    """The usable runs, and a sentence for each of the others."""
    runs, missing = [], []
    for folder in folders:
        file = folder / "results.json"
        try:
            if file.is_file():
                results = json.loads(file.read_text(encoding="utf-8"))
                check(results)
                runs.append({"path": str(folder), "results": results, "seed": results["flags"]["seed"],
                             "written": file.stat().st_mtime, "id": identity(results)})  # fmt: skip
            elif "flags" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
                missing.append(f"{folder} is unfinished: it holds config.json but no results.json")
            # else a config.json of another tool, as a Hugging Face model's
        except KeyError as error:
            missing.append(f"{folder} is left out: its results.json lacks {error}")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            missing.append(f"{folder} is left out: its results.json or config.json is damaged: {error}")
    if not runs:
        raise cli.UserError(f"no finished run in {len(folders)} folders: {'; '.join(missing) or 'none is a run'}")
    return runs, missing


def reevaluate(runs, args):
    """Replaces each run's test metrics by recomputed ones, keeps the recorded beside them; returns warnings."""
    from common.evaluation import evaluate_checkpoint

    warnings = []
    for run in runs:
        checkpoint, recorded = Path(run["path"], run["results"].get("checkpoint") or "best.pth"), run["results"]["test"]
        try:
            again = evaluate_checkpoint(checkpoint, split="test", device=args.device, batch_size=args.batch_size, data_root=None)
        except Exception as error:
            if getattr(error, "exit_code", None) != 2 and not isinstance(error, OSError):
                raise  # our own fault; the others are the user's to mend, as a checkpoint or data that are not here
            warnings.append(f"{run['path']} was not evaluated again, its recorded figures stand: {error}")
            continue
        run["recorded"], run["recomputed"] = recorded, {key: again[key] for key in again if number(again[key]) is not None}
        run["results"]["test"] = {**recorded, **run["recomputed"]}
        for key in sorted({"accuracy", args.metric} & set(recorded) & set(run["recomputed"])):
            if number(recorded[key]) is None or abs(recorded[key] - again[key]) > 1e-4:
                warnings.append(f"{run['path']}: test {key} was {recorded[key]}, evaluated again it is {again[key]:.6f}")
    if not any("recomputed" in run for run in runs):
        raise cli.UserError(f"--reevaluate could evaluate no checkpoint: {warnings[0]}")
    return warnings


def same(run, other, keys):
    return all(run["id"][key] == other["id"][key] for key in keys)


def paths(runs):
    return ", ".join(run["path"] for run in runs)


def gather(runs, key):
    """Lists of the runs that share run[key], in the order of their first run; each list newest last."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(run[key], sort_keys=True), []).append(run)
    return [sorted(group, key=lambda run: (run["written"], run["path"])) for group in groups.values()]


def newest_per_seed(runs, notes):
    copies = gather(runs, "seed")
    notes += [f"seed {newest['seed']} stands more than once: {newest['path']} is the newest and is used, left out: {paths(older)}"
              for *older, newest in copies if older]  # fmt: skip
    return sorted((group[-1] for group in copies), key=lambda run: run["seed"])


def differences(run, other):
    """Flags that both runs have, with different values: '--epochs 10 (not 30)'."""
    return [f"{key} {value} (not {other['id'][key]})" for key, value in run["id"].items()
            if key.startswith("--") and key in other["id"] and other["id"][key] != value]  # fmt: skip


def choose_baselines(distilled, students, notes, missing):
    """The baseline whose flags agree best with the distilled runs', one run a seed; other settings are named."""
    first = distilled[0]
    ranked = sorted(gather([run for run in students if same(run, first, STUDENT)], "id"),
                    key=lambda runs: (len(differences(runs[0], first)), -len({run["seed"] for run in runs})))  # fmt: skip
    if not ranked:
        near = paths(run for run in students if same(run, first, ("dataset", "student")))
        near = near and f"; other test set, classes, training data or resolution: {near}"
        missing.append(f"no baseline student {first['id']['student']} on {first['id']['dataset']} for {paths(distilled)}{near}")
        return []
    for others in ranked[1:]:
        how = ", ".join(differences(others[0], ranked[0][0])) or "flags that the one used lacks"
        notes.append(f"other baselines are left out: {paths(others)}, with {how}")
    if differences(ranked[0][0], first):
        notes.append(f"the baseline has other flags than the distilled runs: {', '.join(differences(ranked[0][0], first))}")
    baselines = newest_per_seed(ranked[0], notes)
    seeds, others = [[run["seed"] for run in kind] for kind in (distilled, baselines)]
    if seeds != others:
        missing.append(f"seeds differ: {paths(distilled)} have {seeds}, their baselines {others}")
    return baselines


def find_teacher(distilled, runs, notes, missing):
    """A list of the one run whose checkpoint taught these, or of none."""
    first, teacher, sha = distilled[0], distilled[0]["results"]["teacher"], distilled[0]["id"]["teacher sha256"]
    found = [run for run in runs if sha and run["results"].get("checkpoint_sha256") == sha]
    *copies, used = sorted((run for run in found if same(run, first, TEST)), key=lambda run: run["written"]) or [None]
    if not found:
        missing.append(f"the teacher run of {teacher['name']} ({teacher.get('checkpoint')}, sha256 {str(sha)[:12]}) is not among "
                       f"RUNS; it taught {paths(distilled)}")  # fmt: skip
    elif not used:
        missing.append(f"the teacher run {paths(found)} was tested on other images, or with its classes in another order, than "
                       f"{paths(distilled)}: its figures are left out")  # fmt: skip
    elif not same(used, first, ("dataset", "train")):
        notes.append("the teacher was trained on other data than the student")
    if copies:
        notes.append(f"the teacher's checkpoint stands more than once: {used['path']} is used, left out: {paths(copies)}")
    return [used] if used else []


def collect(runs, missing):
    """One (members, notes) a group; members are three lists of runs: teacher, baselines, distilled."""
    teachers, students, taught = ([run for run in runs if run["results"]["role"] == role] for role in ("teacher", "student", "distill"))
    groups = []
    for twins in gather([*taught, *(run for run in students if not any(same(run, other, STUDENT) for other in taught))], "id"):
        notes = []
        kept = newest_per_seed(twins, notes)
        if twins[0]["results"]["role"] == "distill":
            members = find_teacher(kept, runs, notes, missing), choose_baselines(kept, students, notes, missing), kept
        else:
            able = [run for run in teachers if same(run, kept[0], TEST)]  # of several, which would teach is not known
            members = able if len(able) == 1 else [], kept, []
            notes += ["the teacher is the only one on this test set; nothing here was distilled from it"] if members[0] else []
            missing.append(f"no distilled student {kept[0]['id']['student']} on {kept[0]['id']['dataset']} for {paths(kept)}")
        groups.append((members, notes))
    return groups


def stats(runs, metric, notes):
    """Mean, sample standard deviation, n and seeds; and the values by seed."""
    values = {run["seed"]: number(run["results"]["test"].get(metric)) for run in runs}
    if None in values.values():
        notes.append(f"no test {metric} in {paths(run for run in runs if values[run['seed']] is None)}")
    values = {seed: value for seed, value in values.items() if value is not None}
    return {"mean": statistics.fmean(values.values()) if values else None,
            "std": statistics.stdev(values.values()) if len(values) > 1 else None,
            "n": len(values), "seeds": list(values)}, values  # fmt: skip


def compare(members, metric, notes):
    """The three statistics; the gain over all seeds, and over the seeds that both kinds of student have."""
    parts, (_, before, after) = zip(*(stats(runs, metric, notes) for runs in members))
    pairs = {seed: after[seed] - before[seed] for seed in after if seed in before}
    return {**{key.format(metric): part for key, part in zip(KEYS, parts)},
            "gain": parts[2]["mean"] - parts[1]["mean"] if before and after else None,
            "gain_std": statistics.stdev(pairs.values()) if len(pairs) > 1 else None,  # of the paired differences
            "gain_paired": {"mean": statistics.fmean(pairs.values()), "seeds": list(pairs)} if pairs else None}  # fmt: skip


def describe(members, notes, everyone, metric):
    """One entry of report.json's groups; `variant` says in what it differs from groups of the same names."""
    teacher, baselines, distilled = members
    first, *others = ((kinds[2] or kinds[1])[0] for kinds, _ in [(members, notes), *everyone])
    peers = [run["id"] for run in others if same(run, first, NAMES)]
    variant = []
    for key in dict.fromkeys(key for peer in peers for key in peer):
        value = first["id"].get(key)
        if any(peer.get(key) != value for peer in peers):
            text = "/".join(map(str, value)) if isinstance(value, list) else str(value)
            variant.append(f"{key} {text[:8] if len(text) == 64 else text[:24]}")  # 64: a SHA-256
    group = {**{name: first["id"][name] for name in NAMES}, "resolution": first["id"]["resolution"], "variant": ", ".join(variant),
             "domain": first["results"]["dataset"].get("domain"), "family": first["results"]["model"]["family"],
             **compare(members, "accuracy", notes)}  # fmt: skip
    if teacher and not distilled:
        group["teacher"] = teacher[0]["id"]["student"]
    if metric != "accuracy":
        group[metric] = compare(members, metric, notes)
    files = {"students": [run["path"] for run in baselines], "distilled": [run["path"] for run in distilled]}
    return {**group, "notes": notes, "runs": {"teacher": teacher[0]["path"] if teacher else None, **files}}


def family_entry(groups, family, args, notes):
    """The three mean accuracies of the one group with a student of this family, or None."""
    chosen = [group for group in groups if group["family"] == family and args.dataset in (None, group["dataset"])
              and args.method in (None, group["method"])]  # fmt: skip
    chosen = [group for group in chosen if group["method"]] or chosen  # a lone baseline yields to a distilled group
    if len(chosen) > 1:
        notes.append(f"the entry {family} is empty, {len(chosen)} groups have such a student: {'; '.join(map(label, chosen))}; "
                     "pick one with --dataset and --method, or by naming its runs")  # fmt: skip
    keys = [key.format("accuracy") for key in KEYS]
    return {key: chosen[0][key]["mean"] for key in keys} if len(chosen) == 1 else None


def select(runs, wanted, mode):
    """Settings ranked by a val metric, best first: [{"runs", "value" (mean over seeds), "flags" in which they differ}]."""
    split, _, metric = wanted.partition("_")
    known = {key for run in runs for key in run["results"].get("val") or {}}
    if split != "val" or metric not in known:
        raise cli.UserError(f"--select {wanted}: choose on val, by one of {', '.join(f'val_{key}' for key in sorted(known))}")
    flags = {key: {json.dumps(run["id"].get(key)) for run in runs} for run in runs for key in run["id"]
             if key.startswith("--") or key in (*NAMES, "resolution")}  # fmt: skip
    ranked = []
    for twins in gather(runs, "id"):
        values = [number((run["results"].get("val") or {}).get(metric)) for run in twins]
        if None not in values:
            own = {key: twins[0]["id"].get(key) for key in flags if len(flags[key]) > 1}
            ranked.append({"runs": [run["path"] for run in twins], "value": statistics.fmean(values), "flags": own})
    if not ranked:
        raise cli.UserError(f"--select {wanted}: no setting has it in all of its runs")
    low = mode == "min" if mode else better(metric, 0, 1)
    return sorted(ranked, key=lambda setting: setting["value"] if low else -setting["value"])


def ranking(selected, wanted):
    """The settings as a table, and the best one's name as the last line."""
    flags = list(selected[0]["flags"])
    rows = [[wanted, "runs", *flags]]
    rows += [[f"{s['value']:.4f}", ", ".join(s["runs"]), *(str(s["flags"][flag]) for flag in flags)] for s in selected]
    return f"{table(rows)}\nbest {wanted}: {selected[0]['value']:.4f}, {', '.join(selected[0]['runs'])}"


def summarize(run):
    """A run in short: results.json without flags, environment and class names."""
    left_out = ("flags", "environment", "script", "dataset", "final_val")
    short = {key: value for key, value in run["results"].items() if key not in left_out}
    both = {f"{key}_test": run[key] for key in ("recorded", "recomputed") if key in run}
    return {"run": run["path"], "dataset": run["id"]["dataset"], "seed": run["seed"], **short, **both}


def cell(value, metric, std=None, sign=""):
    """0.9123 as '91.23', or '91.23 ± 0.40' where there are several seeds; losses stay as they are."""
    if number(value) is None:
        return "-"
    scale, digits = (1, 4) if metric.endswith(NOT_PERCENT) else (100, 2)
    return f"{scale * value:{sign}.{digits}f}" + ("" if std is None else f" ± {scale * std:.{digits}f}")


def label(group):
    models = f"{group['teacher']} to {group['student']}" if group["method"] else f"{group['student']} alone"
    return ", ".join(filter(None, (group["dataset"], models, group["method"], group["variant"])))


def comparison(groups, metric):
    points = "" if metric.endswith(NOT_PERCENT) else " (points)"
    rows = [["dataset", "teacher", "student", "method", *KINDS, f"difference{points}", "seeds"]]
    for group in groups:
        part = group if metric == "accuracy" else group[metric]
        kinds = [part[key.format(metric)] for key in KEYS]
        method = ", ".join(filter(None, (group["method"], group["variant"]))) or "-"
        without, with_kd = kinds[1]["n"], kinds[2]["n"]
        seeds = str(with_kd) if with_kd == without else f"{without} without, {with_kd} with"
        rows.append([group["dataset"], group["teacher"] or "-", group["student"], method,
                     *(cell(kind["mean"], metric, kind["std"]) for kind in kinds), cell(part["gain"], metric, part["gain_std"], "+"),
                     seeds])  # fmt: skip
    return table(rows)


def table(rows):
    """Markdown, aligned, so that it also reads on a terminal."""
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def markdown(report, metric):
    rows = [["run", "role", "method", "model", "dataset", "seed", "best epoch", "epochs", f"test {metric}", "at the last epoch"]]
    for run in report["runs"]:
        names = [run["run"], run["role"], run.get("method") or "-", run["model"]["name"], run["dataset"], run["seed"]]
        names += [run.get("best_epoch"), run.get("last_epoch")]
        rows.append([*map(str, names), *(cell((run.get(part) or {}).get(metric), metric) for part in ("test", "final_test"))])
    notes = [f"{label(group)}: {note}" for group in report["groups"] for note in group["notes"]] + report["notes"]
    parts = ["# Report", f"## Test {metric}" + ("" if metric.endswith(NOT_PERCENT) else " in %"), comparison(report["groups"], metric),
             "Mean ± sample standard deviation over seeds; that of the difference is over the differences between runs of one seed.",
             "## Runs", table(rows)]  # fmt: skip
    if report["selected"]:
        parts += ["## Selection", ranking(report["selected"]["ranked"], report["selected"]["metric"]).replace("\nbest", "\n\nbest")]
    for title, sentences in (("Missing", report["missing"]), ("Notes", notes)):
        parts += [f"## {title}", "\n".join(f"- {sentence}" for sentence in sentences)] if sentences else []
    parts += ["## Figures", *(f"![{title}]({name})" for name, title in report["figures"].items())]
    return "\n\n".join(parts) + "\n"


def read(file, missing):
    """The rows of metrics.json or a confusion matrix (C, C); None, and a sentence, where the file cannot be read."""
    import numpy

    try:
        if file.suffix == ".json":
            return [row for row in json.loads(file.read_text(encoding="utf-8")) if number(row["epoch"]) is not None]
        counts = numpy.load(file)
        if counts.ndim != 2 or len(set(counts.shape)) != 1 or not counts.size:
            raise ValueError(f"its shape is {counts.shape}")
        return counts
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        missing.append(f"no figure of {file}: {error}")


def bars(group, metric):
    """(label, [(mean, std, text)]) of a group, as figures.draw_bars takes it."""
    scale, part = 1 if metric.endswith(NOT_PERCENT) else 100, group if metric == "accuracy" else group[metric]
    found = [part[key.format(metric)] for key in KEYS]
    return label(group), [(kind["mean"] and scale * kind["mean"], kind["std"] and scale * kind["std"],
                           "missing" if kind["mean"] is None else cell(kind["mean"], metric, kind["std"])) for kind in found]  # fmt: skip


def draw_figures(output, members, groups, runs, metric, missing):
    """Writes the figures; {file name: title}."""
    figures, shown, rows = {}, {}, {run["path"]: read(Path(run["path"], "metrics.json"), missing) or [] for run in runs}

    def add(draw, name, title, *content):
        name = re.sub(r"[^\w.-]+", "-", name) + ".png"
        draw(output / name, *content)
        figures[name] = title

    if groups:
        percent = not metric.endswith(NOT_PERCENT)
        add(draw_bars, metric, f"Test {metric}", [bars(group, metric) for group in groups], KINDS, f"test {metric}" + " (%)" * percent, percent)
    for index, (kinds, group) in enumerate(zip(members, groups), 1):
        lines = [(f"{kind} ({len(some)} seeds)" if some[1:] else kind, colour, rows[run["path"]])
                 for (kind, colour), some in zip(KINDS.items(), kinds) for run in some]  # fmt: skip
        add(draw_curves, f"curves-{index}", f"Training curves: {label(group)}", label(group), lines)
        shown.update((some[0]["path"], some[0]) for some in kinds if some)  # confusion matrices: the first seed's
    grouped = {run["path"] for kinds in members for some in kinds for run in some}
    others = [run for run in runs if run["path"] not in grouped]
    for start in range(0, len(others), 6):  # more lines in a figure could not be told apart
        lines = [(run["path"], f"C{index}", rows[run["path"]]) for index, run in enumerate(others[start : start + 6])]
        add(draw_curves, f"curves-others-{start // 6 + 1}", "Runs in no group", "Runs in no group", lines)
    for index, run in enumerate({**shown, **{run["path"]: run for run in others}}.values(), 1):
        title = f"{run['path']}: {run['results']['role']} {run['id']['student']}"
        for file in sorted(Path(run["path"]).glob("confusion_test_*.npy")):
            counts, task = read(file, missing), file.stem[len("confusion_test_") :]
            if counts is not None:
                classes, drawn = run["results"]["dataset"].get("classes") or [], title
                if isinstance(classes, dict):
                    classes, drawn = classes.get(task, []), f"{title}, {task}"
                classes = classes if len(classes) == len(counts) else range(len(counts))
                add(draw_confusion, f"confusion-{index}-{task}", f"Confusion matrix, {title}, {task}", drawn, counts, classes)
    return figures


def main(args):
    output = Path(args.output)
    runs, missing = read_runs(find_run_folders(args.runs))
    known = {key for run in runs for key in run["results"]["test"] if number(run["results"]["test"][key]) is not None}
    if args.metric not in known:
        raise cli.UserError(f"--metric {args.metric} stands in no run; there are: {', '.join(sorted(known))}")
    if output.exists() and not output.is_dir():
        raise cli.UserError(f"--output {output} is a file: give a folder")
    selected = select(runs, args.select, args.mode) if args.select else []
    output.mkdir(parents=True, exist_ok=True)
    notes = reevaluate(runs, args) if args.reevaluate else []
    print("".join(f"warning: {note}\n" for note in notes), end="", file=sys.stderr)
    found = collect(runs, missing)
    groups = [describe(members, own, found, args.metric) for members, own in found]
    for flag, name in (("method", args.method), ("dataset", args.dataset)):
        if name and name not in [group[flag] for group in groups]:
            missing.append(f"no group has the {flag} {name}")
    entries = {family: family_entry(groups, family, args, notes) for family in ("cnn", "vit")}
    figures = draw_figures(output, [members for members, _ in found], groups, runs, args.metric, missing)
    report = {"runs": [summarize(run) for run in runs], "groups": groups, "missing": missing, "notes": notes, **entries, "figures": figures,
              "selected": {"metric": args.select, "ranked": selected} if selected else None}  # fmt: skip
    cli.write_json(output / "report.json", report)
    with cli.atomic_write(output / "report.md") as temporary:
        Path(temporary).write_text(markdown(report, args.metric), encoding="utf-8")
    print(comparison(groups, args.metric))
    for kind, sentences in (("missing", missing), ("note", [*(note for group in groups for note in group["notes"]), *notes])):
        print("".join(f"{kind}: {sentence}\n" for sentence in sentences), end="")
    if selected:
        print(ranking(selected, args.select))
    print(f"report: {output / 'report.md'}")


if __name__ == "__main__":
    cli.run_script(main, build_parser)
