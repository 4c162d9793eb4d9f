"""Which runs are repeats of one another, which is whose teacher and baseline, and what each group's figures are.

Repeats differ in --seed, or in --fold of one cross-validation.

Needs cli.py and metrics.py of `common` (and what these need).
"""

import json
import math
import shlex
import statistics
from pathlib import Path

from common import cli
from common.metrics import better

# Flags that say where and how fast a run ran, not what it learned, and those whose outcome results.json tells. Data and
# teacher are told apart by their fingerprints, so their paths may differ from machine to machine.
NOT_SETTINGS = {
    "seed",
    "fold",
    "limit_train",
    "limit_labels",
    "output",
    "device",
    "workers",
    "overwrite",
    "resume",
    "cache",
    "config",
    "sweep",
    "sweep_index",
    "save_every",
    "save_samples",
    "download",
    "data_root",
    "teacher_checkpoint",
    "dataset",
    "model",
    "method",
    "resolution",
    "eval_dataset",
    "eval_data_root",
    "eval_every",
    "positive",
}
NEEDED = {
    "flags.seed": int,
    "dataset.name": str,
    "dataset.sha256.train": str,
    "dataset.sizes.train": int,
    "model.name": str,
    "model.family": str,
}
OPTIONAL = {
    "environment": dict,
    "teacher": dict,
    "val": dict,
    "test": dict,
    "final_val": dict,
    "final_test": dict,
    "script": str,
    "checkpoint": str,
    "select_metric": str,
}  # of results.json, empty where absent
OF_DISTILLED = {"method": str, "teacher.name": str}
OF_LABELLED = {"dataset.sha256.test": str, "test.accuracy": (int, float)}
ROLES = ("teacher", "student", "distill")
NAMES = ("dataset", "teacher", "student", "method")
TEST = ("test", "classes", "positive")  # must agree where two test figures are compared
STUDENT = ("dataset", "labels", *TEST, "student", "resolution")  # and these between a student and its baseline
NOT_PERCENT = ("loss", "teacher_kl", "ece", "pauc")  # metrics that are not shown in per cent
POSITIVE = ("average_precision", "pauc", "sensitivity_at_90_specificity")  # metrics of one of two classes
KINDS = {"teacher": "#0072B2", "student without KD": "#E69F00", "student with KD": "#009E73"}  # Okabe-Ito colours
KEYS = ("teacher_{}", "student_{}_without_kd", "student_{}_with_kd")  # of report.json, with the metric's name


def find_run_folders(paths):
    folders = {}  # resolved path -> path as given, so that a run named twice is read once
    for path in map(Path, paths):
        if not path.is_dir():
            raise cli.UserError(f"{path} is no folder: give run folders, or folders that hold them")
        # not in hidden folders: a batch job may be copying its results there
        found = {
            file.parent
            for name in ("results.json", "config.json")
            for file in path.rglob(name)
            if not any(part.startswith(".") for part in file.relative_to(path).parts)
        }
        for folder in [path] if path in found else sorted(found):
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise cli.UserError(
            f"no run in {', '.join(paths)}: neither results.json nor config.json was found; give folders that "
            "train_teacher.py, train_student.py or distill.py wrote"
        )
    return list(folders.values())


def number(value):
    """A finite number, or None: a metric that is NaN or absent is missing, not zero."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def mean(values):
    """The mean of a list, or None where it is empty or holds None."""
    return statistics.fmean(values) if values and None not in values else None


def is_label_free(results):
    """Whether a run's student has no head, and so neither accuracy nor predictions: see distill.py --method tokens."""
    return results["select_metric"] == "distillation_loss" and "accuracy" not in results["test"]


def check(results):
    """Fills in what is optional.  Raises KeyError, ValueError, TypeError or AttributeError where more is missing."""
    if results["role"] not in ROLES:
        raise ValueError(f"the role is {results['role']!r}, not teacher, student or distill")
    results.update((key, results.get(key) or kind()) for key, kind in OPTIONAL.items())
    needed = {**OPTIONAL, **NEEDED, **(OF_DISTILLED if results["role"] == "distill" else {})}
    if not is_label_free(results):
        needed.update(OF_LABELLED)
    for dotted, kind in needed.items():
        value = results
        for key in dotted.split("."):
            value = value[key]
        if not isinstance(value, kind):
            raise ValueError(f"{dotted} is {value!r}")
    results["checkpoint"] = results["checkpoint"] or "best.pth"
    shlex.split(results["environment"].get("command") or "")  # as `how_to_repeat` does
    if not 0 <= results["test"].get("accuracy", 0) <= 1:
        raise ValueError(f"the test accuracy is {results['test']['accuracy']}, not between 0 and 1")


def trained_on(results):
    """'100 labels and 708 images without'."""
    dataset = results["dataset"]
    images = dataset["sizes"]["train"]
    labelled = (dataset.get("labelled") or {}).get("train", images) if dataset.get("classes") else 0
    if not labelled:
        return f"{images} images without labels"
    return f"{labelled} labels" + f" and {images - labelled} images without" * (images > labelled)


def identity(results):
    """Everything in which the repeats of one group agree, flat, so that a label can show where groups differ."""
    dataset, teacher, flags = results["dataset"], results["teacher"], dict(results["flags"])
    if flags.get("teacher_embeddings"):
        flags["teacher_embeddings"] = Path(flags["teacher_embeddings"]).name  # a staged copy keeps only its name
    found = {
        "dataset": dataset["name"],
        "teacher": teacher.get("name"),
        "student": results["model"]["name"],
        "method": results.get("method"),
        "resolution": results["model"].get("resolution"),
        "classes": dataset.get("classes"),
        "positive": ", ".join(str(name) for key, name in results["test"].items() if key.endswith("positive")),
        "trained on": trained_on(results),
        "test": dataset["sha256"].get("test"),
        "train": dataset["sha256"]["train"],
        "labels": (dataset.get("labelled") or {}).get("sha256", dataset["sha256"]["train"]),
        "teacher sha256": teacher.get("sha256"),
    }
    if is_fold(flags):  # each has its own images, which choose_baselines and find_teacher compare fold by fold
        images = flags.get("limit_train") or 0
        labels = flags.get("limit_labels") or images
        found.update(
            {"test": "a fold", "train": f"{images} of a fold", "labels": f"{labels} of a fold", "trained on": ""}
        )
    return {**found, **{f"--{key.replace('_', '-')}": flags[key] for key in flags if key not in NOT_SETTINGS}}


def is_fold(flags):
    return None not in (flags.get("folds"), flags.get("fold"))


def read_run(folder):
    """results.json of a folder with "path", "written", "id" and "seed"; None where its config.json is of another tool.

    Raises ValueError in words that follow the folder's name.
    """
    file = folder / "results.json"
    try:
        if file.is_file():
            run = json.loads(file.read_text(encoding="utf-8"))
            check(run)
            flags, seed = run["flags"], run["flags"]["seed"]
            return {
                **run,
                "path": str(folder),
                "written": file.stat().st_mtime,
                "id": identity(run),
                "seed": f"fold {flags['fold']}, seed {seed}" if is_fold(flags) else seed,
            }
        if "flags" not in json.loads((folder / "config.json").read_text(encoding="utf-8")):
            return None  # a Hugging Face model's, say
    except KeyError as error:
        raise ValueError(f"is left out: its results.json lacks {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is left out: its results.json or config.json is damaged: {error}") from None
    raise ValueError("is unfinished: it holds config.json but no results.json")


def read_rows(file, missing):
    """The rows of metrics.json; none, and a sentence, where it cannot be read."""
    try:
        return [row for row in json.loads(file.read_text(encoding="utf-8")) if number(row["epoch"]) is not None]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        missing.append(f"no learning curve of {file}: {error}")
        return []


def read_runs(folders):
    """The usable runs, and a sentence for each of the others."""
    runs, missing = [], []
    for folder in folders:
        try:
            run = read_run(folder)
        except ValueError as error:
            missing.append(f"{folder} {error}")
            continue
        if run:
            runs.append({**run, "rows": read_rows(folder / "metrics.json", missing)})
    if not runs:
        raise cli.UserError(f"no finished run in {len(folders)} folders: {'; '.join(missing) or 'none is a run'}")
    for few in gather([run for run in runs if is_fold(run["flags"])], "id"):
        if len({run["flags"]["fold"] for run in few}) == 1:  # each fold has a teacher of its own
            for run in few:
                run["id"]["teacher sha256"] = None
    return runs, missing


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


def repeat_name(seed):
    """'seed 1', or of a cross-validation 'fold 1, seed 0'."""
    return seed if isinstance(seed, str) else f"seed {seed}"


def newest_per_seed(runs, notes):
    copies = gather(runs, "seed")
    notes += [
        f"{repeat_name(newest['seed'])} stands more than once: {newest['path']} is the newest and is used, left "
        f"out: {paths(older)}"
        for *older, newest in copies
        if older
    ]
    return sorted((group[-1] for group in copies), key=lambda run: run["seed"])


def shown(value):
    """A flag's value; one that was not given has the default."""
    return "default" if value is None else "/".join(map(str, value)) if isinstance(value, list) else str(value)


def varying(runs):
    """The keys of `identity` in which runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run["id"])
    return [key for key in keys if len({json.dumps(run["id"].get(key)) for run in runs}) > 1]


def differences(run, other):
    """Flags that both runs have, with different values: '--epochs 10 (not 30)'."""
    return [
        f"{key} {shown(value)} (not {shown(other['id'][key])})"
        for key, value in run["id"].items()
        if key.startswith("--") and key in other["id"] and other["id"][key] != value
    ]


def choose_baselines(distilled, students, notes, missing):
    """The baseline whose flags agree best with the distilled runs', one run a seed; other settings are named."""
    first = distilled[0]
    ranked = sorted(
        gather([run for run in students if same(run, first, STUDENT)], "id"),
        key=lambda runs: (len(differences(runs[0], first)), -len({run["seed"] for run in runs})),
    )
    if not ranked:
        near = paths(run for run in students if same(run, first, ("dataset", "student")))
        near = near and f"; other test set, classes, training data or resolution: {near}"
        missing.append(
            f"no baseline student {first['id']['student']} on {first['id']['dataset']} for {paths(distilled)}{near}"
        )
        return []
    chosen, *rest = ranked
    for others in rest:
        how = ", ".join(differences(others[0], chosen[0])) or "flags that the one used lacks"
        notes.append(f"other baselines are left out: {paths(others)}, with {how}")
    changed = ", ".join(differences(chosen[0], first))
    if changed:
        notes.append(f"the baseline has other flags than the distilled runs: {changed}")
    baselines, twins = newest_per_seed(chosen, notes), {run["seed"]: run for run in distilled}
    strangers = [run for run in baselines if not same_images(run, twins.get(run["seed"], run), ("test", "val"))]
    if strangers:
        missing.append(
            f"{paths(strangers)} are left out: their folds hold other images than those of {paths(distilled)}"
        )
        baselines = [run for run in baselines if run not in strangers]
    seeds, others = [[run["seed"] for run in kind] for kind in (distilled, baselines)]
    if seeds != others:
        missing.append(f"seeds differ: {paths(distilled)} have {seeds}, their baselines {others}")
    return baselines


def same_images(run, other, splits):
    """Of two runs, or of two runs' folds."""
    one, two = (of["dataset"]["sha256"] for of in (run, other))
    return all(one.get(split) == two.get(split) for split in splits)


def find_teacher(distilled, runs, notes, missing):
    """The runs whose checkpoints taught these: one, or one a fold."""
    used = {}
    for first in distilled:
        teacher = first["teacher"]
        sha = teacher.get("sha256")
        if sha in used:
            continue
        found = [run for run in runs if sha and run.get("checkpoint_sha256") == sha]
        fitting = [
            run
            for run in found
            if is_label_free(first) or same_images(run, first, ("test",)) and same(run, first, ("classes", "positive"))
        ]
        used[sha] = max(fitting, key=lambda run: run["written"], default=None)  # copies have the same figures
        if not found:
            missing.append(
                f"the teacher run of {teacher['name']} ({teacher.get('checkpoint')}, sha256 "
                f"{str(sha)[:12]}) is not among RUNS; it taught {paths(distilled)}"
            )
        elif not fitting:
            missing.append(
                f"the teacher run {paths(found)} was tested on other images, or with its classes in another "
                f"order, than {paths(distilled)}: its figures are left out"
            )
        elif (
            not same(used[sha], first, ("dataset",))
            or not same_images(used[sha], first, ("train",))
            and same(used[sha], first, ("trained on",))
        ):
            notes.append("the teacher was trained on other data than the student")
    return [run for run in used.values() if run]


def of_role(runs, role):
    return [run for run in runs if run["role"] == role]


def collect(runs, missing):
    """One (members, notes) a group; members are three lists of runs: teacher, baselines, distilled."""
    teachers, students, taught = (of_role(runs, role) for role in ROLES)
    alone = [run for run in students if not any(same(run, other, STUDENT) for other in taught)]
    groups = []
    for twins in gather([*taught, *alone], "id"):
        notes = []
        kept = newest_per_seed(twins, notes)
        if twins[0]["role"] == "distill":
            baselines = [] if is_label_free(kept[0]) else choose_baselines(kept, students, notes, missing)
            members = find_teacher(kept, runs, notes, missing), baselines, kept
        else:
            able = [run for run in teachers if same(run, kept[0], TEST)]  # of several, which would teach is not known
            members = able if len(able) == 1 else [], kept, []
            missing.append(
                f"no distilled student {kept[0]['id']['student']} on {kept[0]['id']['dataset']} for {paths(kept)}"
            )
        groups.append((members, notes))
    return groups


def measured(runs):
    """{name: None} of the test metrics that are a number in any run."""
    return dict.fromkeys(key for run in runs for key, value in run["test"].items() if number(value) is not None)


def stats(runs, metric, notes, split="test"):
    """Mean, sample standard deviation, n and seeds; and the values by seed."""
    values = {run["seed"]: number(run[split].get(metric)) for run in runs}
    absent = paths(run for run in runs if values[run["seed"]] is None)
    if absent:
        notes.append(f"no {split} {metric} in {absent}")
    values = {seed: value for seed, value in values.items() if value is not None}
    return {
        "mean": mean(list(values.values())),
        "std": statistics.stdev(values.values()) if len(values) > 1 else None,
        "n": len(values),
        "seeds": list(values),
    }, values


def compare(members, metric, notes):
    """The three statistics; the gain over all seeds, and over the seeds that both kinds of student have."""
    parts, (_, before, after) = zip(*(stats(runs, metric, notes) for runs in members))
    pairs = {seed: after[seed] - before[seed] for seed in after if seed in before}
    return {
        **{key.format(metric): part for key, part in zip(KEYS, parts)},
        "gain": parts[2]["mean"] - parts[1]["mean"] if before and after else None,
        "gain_std": statistics.stdev(pairs.values()) if len(pairs) > 1 else None,  # of the paired differences
        "gain_paired": {"mean": mean(list(pairs.values())), "seeds": list(pairs)} if pairs else None,
    }


def cautions(members, metric, runs):
    """What a reader of the gain must know: a teacher worse than the student alone, a student alone that beats the
    baseline."""
    teacher, before, after = (stats(some, metric, [])[0]["mean"] for some in members)
    result = []
    if teacher is not None and better(metric, before, teacher):
        result.append(f"the teacher ({cell(teacher, metric)}) is worse than the student alone ({cell(before, metric)})")
    if before is None or not better(metric, after, before):
        return result
    first, best, rivals = members[1][0], before, None
    for twins in gather(of_role(runs, "student"), "id"):
        value = stats(twins, metric, [])[0]["mean"]
        if same(twins[0], first, ("dataset", "labels", *TEST, "student")) and better(metric, value, best):
            best, rivals = value, twins
    if rivals:
        how = ", ".join(differences(rivals[0], first)) or f"resolution {rivals[0]['id']['resolution']}"
        most = f", and than the student with KD ({cell(after, metric)})" * better(metric, best, after)
        result.append(
            f"another student alone, with {how}, is better ({cell(best, metric)}) than this baseline "
            f"({cell(before, metric)}){most}: {paths(rivals)}"
        )
    return result


def describe(members, notes, everyone, metric, runs):
    """One entry of report.json's groups; `variant` says in what it differs from groups of the same names."""
    teacher, baselines, distilled = members
    first, variant = (distilled or baselines)[0], []
    peers = ((kinds[2] or kinds[1])[0] for kinds, _ in everyone)
    differ = varying([run for run in peers if same(run, first, NAMES)])
    for key in differ:
        if key != "labels" and not (key == "train" and "trained on" in differ):  # which a reader knows
            text = shown(first["id"].get(key))
            variant.append(f"{key} {text[:8] if len(text) == 64 else text[:24]}")  # 64: a SHA-256
    free = is_label_free(first)
    said = [] if free else notes
    group = {
        **{name: first["id"][name] for name in (*NAMES, "resolution")},
        "variant": ", ".join(variant),
        "domain": first["dataset"].get("domain"),
        "family": first["model"]["family"],
        "label_free": free,
        **compare(members, "accuracy", said),
        "metrics": {
            key: {kind: stats(some, key, [])[0] for kind, some in zip(KINDS, members)}
            for key in measured(sum(members, []))
        },
        "trained_on": {kind: trained_on(some[0]) for kind, some in zip(KINDS, members) if some},
        "notes": notes,
        "warnings": cautions(members, metric, runs),
        "folds": isinstance(first["seed"], str),
        "runs": {
            "teacher": teacher[0]["path"] if teacher else None,
            "students": [run["path"] for run in baselines],
            "distilled": [run["path"] for run in distilled],
        },
    }
    if metric.endswith(POSITIVE) and first["id"]["positive"]:
        notes.append(f"{metric}: the positive class is {first['id']['positive']}")
    if teacher and not distilled:
        group["teacher"] = teacher[0]["id"]["student"]
    if metric != "accuracy":
        group[metric] = compare(members, metric, said)
    if free:
        group["val_distillation_loss"] = stats(distilled, "distillation_loss", notes, "val")[0]
        group["knn"] = {
            of: mean([last(run["rows"], key) for run in distilled])
            for of, key in (("teacher", "val_teacher_knn"), ("student", "val_knn"))
        }
    return group


def last(rows, key):
    """The last number of a column of metrics.json, or None."""
    return [None, *(row[key] for row in rows if number(row.get(key)) is not None)][-1]


def select(runs, wanted, mode):
    """{"metric", "ranked"}: settings ranked by a val metric, best first: [{"runs", "value" (mean over seeds), "flags"
    in which they differ}].

    wanted: val_METRIC, of all runs; None: the runs' own, where they hold several settings of one student, else the
    result is None.
    """
    if not wanted:
        runs = of_role(runs, "distill") or of_role(runs, "student")
        if len(gather(runs, "id")) < 2:
            return None
        metric = runs[0]["select_metric"]
        if not all(
            same(run, runs[0], ("dataset", "train", *TEST, "student"))
            and run["select_metric"] == metric
            and number(run["val"].get(metric)) is not None
            for run in runs
        ):
            return None
        wanted = f"val_{metric}"
    known, chosen = sorted({f"val_{key}" for run in runs for key in run["val"]}), wanted.removeprefix("val_")
    if wanted not in known:
        raise cli.UserError(f"--select {wanted}: choose on val, by one of {', '.join(known)}")
    differ = [key for key in varying(runs) if key.startswith("--") or key in (*NAMES, "resolution", "trained on")]
    ranked = []
    for twins in gather(runs, "id"):
        twins = newest_per_seed(twins, [])
        value = mean([number(run["val"].get(chosen)) for run in twins])
        if value is not None:
            ranked.append(
                {
                    "runs": [run["path"] for run in twins],
                    "value": value,
                    "flags": {key: twins[0]["id"].get(key) for key in differ},
                }
            )
    if not ranked:
        raise cli.UserError(f"--select {wanted}: no setting has it in all of its runs")
    high = mode == "max" if mode else better(chosen, 1, 0)
    return {"metric": wanted, "ranked": sorted(ranked, key=lambda setting: setting["value"], reverse=high)}


def label(group):
    models = f"{group['teacher']} to {group['student']}" if group["method"] else f"{group['student']} alone"
    return ", ".join(filter(None, (group["dataset"], models, group["method"], group["variant"])))


def run_cost(run):
    """What a run's student or teacher costs: parameters, multiply-adds of one image, images/s in inference and one
    image's latency on the
    run's own device, bytes of the weights in float32 and of best.pth (which holds the optimizer too), seconds of
    training.  None: not known.
    """
    file = Path(run["path"], run["checkpoint"])
    names = ("parameters", "multiply_adds", "images_per_second", "latency_ms")
    measured = {key: number(run["model"].get(key)) for key in names}
    return {
        **measured,
        "weight_bytes": measured["parameters"] and 4 * measured["parameters"],
        "checkpoint_bytes": file.stat().st_size if file.is_file() else None,
        "train_seconds": number(run.get("wall_time_s")),
    }


def group_cost(members):
    """{kind: run_cost}, mean over seeds of what was measured; kinds without a run are left out."""
    found = {kind: [run_cost(run) for run in runs] for kind, runs in zip(KINDS, members) if runs}
    return {kind: {key: mean([cost[key] for cost in costs]) for key in costs[0]} for kind, costs in found.items()}


def cost_notes(members):
    """A sentence where the images/s of a group were not all measured on one kind of device."""
    devices = {}
    for run in sum(members, []):
        environment = run["environment"]
        where = f"{environment.get('device')} ({environment.get('threads')} threads)"
        where = "this machine" if "recomputed_test" in run else where
        if number(run["model"].get("images_per_second")):
            devices.setdefault(where, []).append(run)
    if len(devices) < 2:
        return []
    where = "; ".join(f"{device}: {paths(found)}" for device, found in devices.items())
    return [f"images/s and latency are of different devices, --reevaluate measures all on one: {where}"]


def how_to_repeat(run):
    """{"command", "commit", "versions", "hardware"} of a run, from its results.json."""
    environment, script = run["environment"], run["script"] or f"{run['role']}.py"
    hardware = {key: environment.get(key) for key in ("device", "threads", "processes", "platform")}
    versions = {key: value for key, value in environment.items() if key not in (*hardware, "command", "git_commit")}
    words, count, path = shlex.split(environment.get("command") or ""), environment.get("processes") or 1, run["path"]
    if not words or any(word.split("=")[0] == "--resume" for word in words):  # what resumed a run does not repeat it
        words = [script, "--config", str(Path(path, "config.json"))]
    words = cli.without_flags(words[1:], ("--output",))  # words[0] may be a copy in a job's $TMPDIR
    command = shlex.join([script, *words, "--output", f"{path}_again"])
    start = "python" if count == 1 else f"torchrun --nproc-per-node {count}"
    return {
        "command": f"{start} {command}",
        "commit": environment.get("git_commit"),
        "versions": versions,
        "hardware": hardware,
    }


def scale(metric):
    """100 for a metric that is shown in per cent, else 1."""
    return 1 if metric.endswith(NOT_PERCENT) else 100


def title(metric):
    """A metric's name, and of the partial AUC what it is of, which its value alone does not show."""
    return metric + " (above 80 % true-positive rate; at most 0.2, chance 0.02)" * metric.endswith("pauc")


def cell(value, metric, std=None, sign=""):
    """0.9123 as '91.23', or '91.23 ± 0.40' where there are several seeds; losses stay as they are."""
    if number(value) is None:
        return "-"
    by, digits = scale(metric), 4 if scale(metric) == 1 else 2
    return f"{by * value:{sign}.{digits}f}" + ("" if std is None else f" ± {by * std:.{digits}f}")
