"""Statistics of report.py: which runs are repeats of one another, which are their teacher and their baseline, and
whether the gain over the baseline is larger than noise.

A run is its results.json with a few keys added, see `read_run`. Repeats are runs that differ only in --seed, or in
--fold of one cross-validation. A group is the repeats of one student; its members are {kind: [run]} for all of KINDS.

Needs cli.py and metrics.py of `common`, numpy, and scipy, which scikit-learn brings.
"""

import json
import math
import re
import shlex
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import scipy

from common import metrics
from common.run import UserError, better

# Flags that say where and how fast a run ran, not what it learned, and those whose outcome results.json tells. Data and
# teacher are told apart by their fingerprints, so their paths may differ from machine to machine.
NOT_SETTINGS = set(
    "seed fold limit_train limit_labels output device workers overwrite resume cache config sweep sweep_index "
    "save_every save_samples download data_root teacher_checkpoint dataset model method resolution eval_dataset "
    "eval_data_root eval_every positive unlabeled_root".split()
)
# The parts of results.json and their types
OPTIONAL = {
    **dict.fromkeys(("environment", "teacher", "val", "test", "final_val", "final_test"), dict),
    **dict.fromkeys(("script", "checkpoint", "select_metric"), str),
}  # empty where absent
REQUIRED = {
    "flags.seed": int,
    "dataset.name": str,
    "dataset.sha256.train": str,
    "dataset.sizes.train": int,
    "model.name": str,
    "model.family": str,
}
REQUIRED_WHEN_DISTILLED = {"method": str, "teacher.name": str}
REQUIRED_WITH_LABELS = {"dataset.sha256.test": str, "test.accuracy": (int, float)}
ROLES = ("teacher", "student", "distill")
TEACHER, BASELINE, DISTILLED = KINDS = ("teacher", "student without KD", "student with KD")
REPORT_KEYS = ("teacher_{}", "student_{}_without_kd", "student_{}_with_kd")  # of KINDS, with the metric's name
# Keys of `identity`: what names a group; what must agree where test figures are compared, and where students are
NAMES = ("dataset", "teacher", "student", "method")
TEST = ("test", "classes", "positive")
STUDENT = ("dataset", "labels", *TEST, "student")
STUDENT_INPUT = (*STUDENT, "resolution")
NOT_PERCENT = ("loss", "teacher_kl", "ece", "pauc")  # metrics that are not shown in per cent
ONE_CLASS = ("average_precision", "pauc", "sensitivity_at_90_specificity")  # metrics of the positive one of two classes


# ------------------------------------------------------------------------------------------------------- reading runs


def find_run_folders(paths: list) -> list:
    """The run folders at or below these paths, each once.  Raises UserError where there is none."""
    folders = {}  # resolved path -> path as given
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give run folders, or folders that hold them")
        holders = {
            file.parent
            for file in path.rglob("*.json")
            if file.name in ("results.json", "config.json")
            and not any(part.startswith(".") for part in file.relative_to(path).parts)  # a job may be copying there
        }
        for folder in [path] if path in holders else sorted(holders):
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise UserError(
            f"no run in {', '.join(map(str, paths))}: neither results.json nor config.json was found; give folders "
            "that train_teacher.py, train_student.py or distill.py wrote"
        )
    return list(folders.values())


def number(value) -> float | None:
    """A finite number, or None: a metric that is NaN or absent is missing, not zero."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def mean(values) -> float | None:
    """The mean, or None where there are no values or one of them is None."""
    values = list(values)
    return fmean(values) if values and None not in values else None


def is_label_free(results: dict) -> bool:
    """Whether a run's student has no head, and so neither accuracy nor predictions: see distill.py --method tokens."""
    return results["select_metric"] == "distillation_loss" and "accuracy" not in results["test"]


def is_fold(flags: dict) -> bool:
    """Whether these are the flags of one fold of a cross-validation."""
    return None not in (flags.get("folds"), flags.get("fold"))


def check(results: dict):
    """Fills in what is optional.  Raises KeyError, ValueError, TypeError or AttributeError where more is missing."""
    if results["role"] not in ROLES:
        raise ValueError(f"the role is {results['role']!r}, not teacher, student or distill")
    if re.fullmatch(r"ce=\S+( fine-tuned,?)*", str(results.get("method"))):  # of distill.py, without its teacher
        results.update(role="student", method=None, teacher=None)
    elif results["role"] == "student" and results.get("method"):  # of train_student.py, fine-tuned after distill.py
        results["role"] = "distill"
    results.update((key, results.get(key) or kind()) for key, kind in OPTIONAL.items())
    required = {**OPTIONAL, **REQUIRED}
    if results["role"] == "distill":
        required.update(REQUIRED_WHEN_DISTILLED)
    if not is_label_free(results):
        required.update(REQUIRED_WITH_LABELS)
    for place, kind in required.items():
        value = results
        for key in place.split("."):
            value = value[key]
        if not isinstance(value, kind):
            raise ValueError(f"{place} is {value!r}")
    results["checkpoint"] = results["checkpoint"] or "best.pth"
    shlex.split(results["environment"].get("command") or "")  # raises ValueError, here and not in repeat_command
    if not 0 <= results["test"].get("accuracy", 0) <= 1:
        raise ValueError(f"the test accuracy is {results['test']['accuracy']}, not between 0 and 1")


def trained_on(results: dict) -> str:
    """'100 labels and 708 images without'."""
    dataset = results["dataset"]
    images = dataset["sizes"]["train"]
    labelled = (dataset.get("labelled") or {}).get("train", images) if dataset.get("classes") else 0
    if not labelled:
        return f"{images} images without labels"
    without = f" and {images - labelled} images without" * (images > labelled and results["role"] == "distill")
    return f"{labelled} labels{without}{', after distillation' * ('fine-tuned' in (results.get('method') or ''))}"


def identity(results: dict) -> dict:
    """Everything in which the repeats of a group agree, flat, so that a label can show where groups differ."""
    dataset, model, teacher, flags = results["dataset"], results["model"], results["teacher"], dict(results["flags"])
    sha256 = dataset["sha256"]
    if stores := flags.get("teacher_embeddings"):
        stores = stores if isinstance(stores, list) else [stores]
        flags["teacher_embeddings"] = "/".join(Path(store).name for store in stores)  # of a staged copy only it stays
    result = {
        "dataset": dataset["name"],
        "teacher": teacher.get("name"),
        "student": model["name"],
        "method": results.get("method"),
        "resolution": model.get("resolution"),
        "classes": dataset.get("classes"),
        "positive": ", ".join(str(name) for key, name in results["test"].items() if key.endswith("positive")),
        "trained on": trained_on(results),
        "test": sha256.get("test"),
        "train": sha256["train"],
        "labels": (dataset.get("labelled") or {}).get("sha256", sha256["train"]),
        "teacher sha256": teacher.get("sha256"),
    }
    if start := flags.get("init_checkpoint"):  # of runs/pretrained_3, whose number is that of a seed, `pretrained`
        flags["init_checkpoint"] = re.sub(r"_\d+$", "", Path(start).parent.name)
    if is_fold(flags):  # each has its own images, which choose_baselines and find_teachers compare fold by fold
        images = flags.get("limit_train") or 0
        labels = flags.get("limit_labels") or images
        result.update(
            {"test": "a fold", "train": f"{images} of a fold", "labels": f"{labels} of a fold", "trained on": ""}
        )
    return {**result, **{f"--{key.replace('_', '-')}": flags[key] for key in flags if key not in NOT_SETTINGS}}


def read_run(folder: Path) -> dict | None:
    """results.json of a folder with "path", "written" (its time), "id" and "seed"; None for another tool's config.json.

    Raises ValueError in words that follow the folder's name.
    """
    file = folder / "results.json"
    try:
        if file.is_file():
            run = json.loads(file.read_text(encoding="utf-8"))
            check(run)
            flags, seed = run["flags"], run["flags"]["seed"]
            seed = f"fold {flags['fold']}, seed {seed}" if is_fold(flags) else seed
            return {**run, "path": str(folder), "written": file.stat().st_mtime, "id": identity(run), "seed": seed}
        if "flags" not in json.loads((folder / "config.json").read_text(encoding="utf-8")):
            return None  # a Hugging Face model's, say
    except KeyError as error:
        raise ValueError(f"is left out: its results.json lacks {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is left out: its results.json or config.json is damaged: {error}") from None
    raise ValueError(f"is unfinished: it holds config.json but no results.json{progress(folder)}")


def progress(folder: Path) -> str:
    """How far a run is that has no results yet, in words that follow; "" where nothing is known."""
    try:
        last = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))[-1]
        epochs = json.loads((folder / "config.json").read_text(encoding="utf-8"))["flags"]["epochs"]
        accuracy = f", val accuracy {last['val_accuracy']:.4f}" if last.get("val_accuracy") is not None else ""
        return f"; {last['epoch']} of {epochs} epochs are done{accuracy}"
    except (OSError, ValueError, TypeError, LookupError):
        return ""


def read_rows(file: Path, missing: list) -> list:
    """The rows of metrics.json; none, and a sentence in `missing`, where it cannot be read."""
    try:
        return [row for row in json.loads(file.read_text(encoding="utf-8")) if number(row["epoch"]) is not None]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        missing.append(f"no learning curve from {file}: {error}")
        return []


def read_runs(folders: list) -> tuple:
    """The usable runs, with metrics.json as "rows", and a sentence for each of the others."""
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
        raise UserError(f"no finished run in {len(folders)} folders: {'; '.join(missing) or 'none is a run'}")
    for repeats in group_by([run for run in runs if is_fold(run["flags"])], "id"):
        if len({run["flags"]["fold"] for run in repeats}) == 1:  # each fold has a teacher of its own
            for run in repeats:
                run["id"]["teacher sha256"] = None
    return runs, missing


# ------------------------------------------------------------------------------------------------------------- groups


def agree(run: dict, other: dict, keys: tuple) -> bool:
    """Whether two runs have the same values of these keys of `identity`."""
    return all(run["id"][key] == other["id"][key] for key in keys)


def same_images(run: dict, other: dict, splits: tuple) -> bool:
    """Whether these splits of two runs, or of two runs' folds, hold the same images."""
    return all(run["dataset"]["sha256"].get(split) == other["dataset"]["sha256"].get(split) for split in splits)


def paths(runs) -> str:
    """'runs/a, runs/b'."""
    return ", ".join(run["path"] for run in runs)


def of_role(runs: list, role: str) -> list:
    """The runs of one of ROLES."""
    return [run for run in runs if run["role"] == role]


def group_by(runs: list, key: str) -> list:
    """Lists of the runs that share run[key], in the order of their first run; each list newest last."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(run[key], sort_keys=True), []).append(run)
    return [sorted(group, key=lambda run: (run["written"], run["path"])) for group in groups.values()]


def repeat_name(seed: int | str) -> str:
    """'seed 1', or of a cross-validation 'fold 1, seed 0'."""
    return seed if isinstance(seed, str) else f"seed {seed}"


def newest_per_seed(runs: list, notes: list) -> list:
    """One run for each seed, in order; a sentence in `notes` names the older ones that are left out."""
    copies = group_by(runs, "seed")
    notes += [
        f"{repeat_name(newest['seed'])} occurs more than once: {newest['path']} is the newest and is used; left out: "
        f"{paths(older)}"
        for *older, newest in copies
        if older
    ]
    return sorted((group[-1] for group in copies), key=lambda run: run["seed"])


def flag_text(value) -> str:
    """A flag's value; one that was not given has the default."""
    return "default" if value is None else "/".join(map(str, value)) if isinstance(value, list) else str(value)


def varying(runs: list) -> list:
    """The keys of `identity` in which runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run["id"])
    return [key for key in keys if len({json.dumps(run["id"].get(key)) for run in runs}) > 1]


def flag_differences(run: dict, other: dict) -> list:
    """Flags that both runs have, with different values: '--epochs 10 (not 30)'."""
    mine, theirs = run["id"], other["id"]
    return [
        f"{key} {flag_text(mine[key])} (not {flag_text(theirs[key])})"
        for key in mine
        if key.startswith("--") and key in theirs and theirs[key] != mine[key]
    ]


def choose_baselines(distilled: list, students: list, notes: list, missing: list) -> list:
    """The baseline whose flags agree best with the distilled runs', one run a seed; other settings are named."""
    first, names = distilled[0], paths(distilled)
    ranked = sorted(
        group_by([run for run in students if agree(run, first, STUDENT_INPUT)], "id"),
        key=lambda runs: (len(flag_differences(runs[0], first)), -len({run["seed"] for run in runs})),
    )
    if not ranked:
        near = paths(run for run in students if agree(run, first, ("dataset", "student")))
        near = near and f"; with another test set, classes, training data or resolution: {near}"
        missing.append(f"no baseline student {first['id']['student']} on {first['id']['dataset']} for {names}{near}")
        return []
    chosen, *rest = ranked
    for others in rest:
        how = ", ".join(flag_differences(others[0], chosen[0])) or "flags that the one used lacks"
        notes.append(f"other baselines are left out: {paths(others)}, with {how}")
    changed = ", ".join(flag_differences(chosen[0], first))
    if changed:
        notes.append(f"the baseline has other flags than the distilled runs: {changed}")
    baselines, twins = newest_per_seed(chosen, notes), {run["seed"]: run for run in distilled}
    strangers = [run for run in baselines if not same_images(run, twins.get(run["seed"], run), ("test", "val"))]
    if strangers:
        missing.append(f"{paths(strangers)} are left out: their folds hold other images than those of {names}")
        baselines = [run for run in baselines if run not in strangers]
    seeds, baseline_seeds = ([run["seed"] for run in runs] for runs in (distilled, baselines))
    if seeds != baseline_seeds:
        missing.append(f"seeds differ: {names} have {seeds}, their baselines {baseline_seeds}")
    return baselines


def taught_by(run: dict) -> list:
    """What results.json says of each teacher of a distilled run."""
    return run["teacher"].get("teachers") or [run["teacher"]]


def find_teachers(distilled: list, runs: list, notes: list, missing: list) -> list:
    """The runs whose checkpoints taught these: one, one a fold, or one for each of several teachers."""
    teachers = {}
    for run, about in [(each, about) for each in distilled for about in taught_by(each)]:
        sha256 = about.get("sha256")
        if sha256 in teachers:
            continue
        candidates = [other for other in runs if sha256 and other.get("checkpoint_sha256") == sha256]
        comparable = [
            other
            for other in candidates
            if is_label_free(run) or same_images(other, run, ("test",)) and agree(other, run, ("classes", "positive"))
        ]
        teacher = max(comparable, key=lambda other: other["written"], default=None)  # copies have the same figures
        teachers[sha256] = teacher
        if not candidates:
            missing.append(
                f"the teacher run of {about['name']} ({about.get('checkpoint')}, sha256 "
                f"{str(sha256)[:12]}) is not among RUNS; it taught {paths(distilled)}"
            )
        elif not teacher:
            missing.append(
                f"the teacher run {paths(candidates)} was tested on other images, or with its classes in another "
                f"order, than {paths(distilled)}: its figures are left out"
            )
        elif not agree(teacher, run, ("dataset",)) or (
            agree(teacher, run, ("trained on",)) and not same_images(teacher, run, ("train",))
        ):
            notes.append("the teacher was trained on other data than the student")
    return [teacher for teacher in teachers.values() if teacher]


def collect(runs: list, metric: str, missing: list) -> tuple:
    """Two lists, with an entry for each group: its members and its description, see `describe`."""
    teachers, students, distilled = (of_role(runs, role) for role in ROLES)
    alone = [run for run in students if not any(agree(run, other, STUDENT_INPUT) for other in distilled)]
    members, notes, several = [], [], []  # several: the runs of a group's teachers where there is more than one
    for repeats in group_by([*distilled, *alone], "id"):
        notes.append([])
        kept = newest_per_seed(repeats, notes[-1])
        first = kept[0]
        if first["role"] == "distill":
            baselines = [] if is_label_free(first) else choose_baselines(kept, students, notes[-1], missing)
            found = find_teachers(kept, runs, notes[-1], missing)
            several.append(found if len(taught_by(first)) > 1 else [])
            kinds = [] if several[-1] else found, baselines, kept
        else:
            suitable = [run for run in teachers if agree(run, first, TEST)]
            several.append([])
            kinds = suitable if len(suitable) == 1 else [], kept, []  # of several, which would teach is not known
            missing.append(
                f"no distilled student {first['id']['student']} on {first['id']['dataset']} for {paths(kept)}"
            )
        members.append(dict(zip(KINDS, kinds)))
    firsts = [(kinds[DISTILLED] or kinds[BASELINE])[0] for kinds in members]
    groups = [describe(*pair, metric, firsts, runs) for pair in zip(members, notes)]
    for group, found in zip(groups, several):
        group["teachers"] = [
            {"run": run["path"], "name": run["id"]["student"], metric: number(run["test"].get(metric))} for run in found
        ]
    return members, groups


# ------------------------------------------------------------------------------------------------- figures of a group


def measured(runs: list) -> dict:
    """{name: None} of the test metrics that are a number in any run."""
    return dict.fromkeys(key for run in runs for key, value in run["test"].items() if number(value) is not None)


def by_seed(runs: list, metric: str, split: str = "test", notes: list | None = None) -> dict:
    """{seed: value} of the runs that have this metric; a sentence in `notes` names those that lack it."""
    values = {run["seed"]: number(run[split].get(metric)) for run in runs}
    absent = [run for run in runs if values[run["seed"]] is None]
    if absent and notes is not None:
        notes.append(f"no {split} {metric} in {paths(absent)}")
    return {seed: value for seed, value in values.items() if value is not None}


def stats(values: dict) -> dict:
    """Mean, sample standard deviation (None for fewer than two), n and seeds of {seed: value}."""
    std = stdev(values.values()) if len(values) > 1 else None
    return {"mean": mean(values.values()), "std": std, "n": len(values), "seeds": list(values)}


def compare(members: dict, metric: str, notes: list | None) -> dict:
    """Statistics of each kind; the gain over all seeds, and over the seeds that both kinds of student have."""
    values = [by_seed(runs, metric, notes=notes) for runs in members.values()]
    _, before, after = values
    pairs = {seed: after[seed] - before[seed] for seed in after if seed in before}
    return {
        **{key.format(metric): stats(part) for key, part in zip(REPORT_KEYS, values)},
        "gain": mean(after.values()) - mean(before.values()) if before and after else None,
        "gain_std": stats(pairs)["std"],  # of the paired differences
        "gain_paired": {"mean": mean(pairs.values()), "seeds": list(pairs)} if pairs else None,
    }


def baseline_warnings(members: dict, metric: str, runs: list) -> list:
    """What a reader of the gain must know: a teacher worse than the student alone, a student alone that beats the
    baseline."""
    teacher, before, after = (mean(by_seed(members[kind], metric).values()) for kind in KINDS)
    warnings = []
    if teacher is not None and better(metric, before, teacher):
        warnings.append(
            f"the teacher ({cell(teacher, metric)}) is worse than the student alone ({cell(before, metric)})"
        )
    if before is None or not better(metric, after, before):
        return warnings
    baseline, best, rivals = members[BASELINE][0], before, None
    for repeats in group_by(of_role(runs, "student"), "id"):
        value = mean(by_seed(repeats, metric).values())
        if agree(repeats[0], baseline, STUDENT) and better(metric, value, best):
            best, rivals = value, repeats
    if rivals:
        how = ", ".join(flag_differences(rivals[0], baseline)) or f"resolution {rivals[0]['id']['resolution']}"
        most = f", and than the student with KD ({cell(after, metric)})" * better(metric, best, after)
        warnings.append(
            f"another student alone, with {how}, is better ({cell(best, metric)}) than this baseline "
            f"({cell(before, metric)}){most}: {paths(rivals)}"
        )
    return warnings


def variant(run: dict, others: list) -> str:
    """In what a run's group differs from the groups of these other runs that have the same NAMES."""
    differ, parts = varying([other for other in others if agree(other, run, NAMES)]), []
    for key in differ:
        if key != "labels" and not (key == "train" and "trained on" in differ):  # which a reader knows
            text = flag_text(run["id"].get(key))
            parts.append(f"{key} {text[:8] if len(text) == 64 else text[:24]}")  # 64: a SHA-256
    return ", ".join(parts)


def describe(members: dict, notes: list, metric: str, firsts: list, runs: list) -> dict:
    """A group's entry of report.json.  firsts: a student's run of every group; runs: all that there are."""
    teachers, baselines, distilled = members.values()
    first = (distilled or baselines)[0]
    label_free = is_label_free(first)
    said = None if label_free else notes
    group = {
        **{name: first["id"][name] for name in (*NAMES, "resolution")},
        "variant": variant(first, firsts),
        "domain": first["dataset"].get("domain"),
        "family": first["model"]["family"],
        "label_free": label_free,
        "findings": findings_of(first["dataset"].get("classes")),
        **compare(members, "accuracy", said),
        "metrics": {
            key: {kind: stats(by_seed(members[kind], key)) for kind in KINDS}
            for key in measured(sum(members.values(), []))
        },
        "trained_on": {kind: trained_on(members[kind][0]) for kind in KINDS if members[kind]},
        "notes": notes,
        "warnings": baseline_warnings(members, metric, runs),
        "folds": is_fold(first["flags"]),
        "runs": {
            "teacher": teachers[0]["path"] if teachers else None,
            "students": [run["path"] for run in baselines],
            "distilled": [run["path"] for run in distilled],
        },
    }
    if metric.endswith(ONE_CLASS) and first["id"]["positive"]:
        notes.append(f"{metric}: the positive class is {first['id']['positive']}")
    if teachers and not distilled:
        group["teacher"] = teachers[0]["id"]["student"]
    if metric != "accuracy":
        group[metric] = compare(members, metric, said)
    if label_free:
        group["val_distillation_loss"] = stats(by_seed(distilled, "distillation_loss", "val", notes))
        group["knn"] = {
            role: mean(last(run["rows"], key) for run in distilled)
            for role, key in (("teacher", "val_teacher_knn"), ("student", "val_knn"))
        }
        group["knn"]["teachers"] = [
            mean(last(run["rows"], f"val_teacher_knn_{i}") for run in distilled)
            for i, _ in enumerate(first["teacher"].get("teachers", []), 1)
        ]
    return group


def findings_of(classes: list | dict | None) -> list:
    """The findings of a run whose images have several: tasks of the classes absent and present; else []."""
    several = isinstance(classes, dict) and all(names == ["absent", "present"] for names in classes.values())
    return [*classes] if several else []


def last(rows: list, key: str) -> float | None:
    """The last number in a column of metrics.json, or None."""
    return [None, *(row[key] for row in rows if number(row.get(key)) is not None)][-1]


def select(runs: list, wanted: str | None, mode: str | None) -> dict | None:
    """{"metric", "ranked"}: settings ranked by a val metric, best first, as [{"runs", "value": the mean over seeds,
    "flags": those in which the settings differ}].

    wanted: val_METRIC, over all runs; None: the metric that chose the runs' epochs, if they are several settings of one
    student, else the result is None.
    """
    if not wanted:
        runs = of_role(runs, "distill") or of_role(runs, "student")
        metric = runs[0]["select_metric"] if runs else None
        if len(group_by(runs, "id")) < 2 or not all(
            agree(run, runs[0], ("dataset", "train", *TEST, "student"))
            and run["select_metric"] == metric
            and number(run["val"].get(metric)) is not None
            for run in runs
        ):
            return None
        wanted = f"val_{metric}"
    known, metric = sorted({f"val_{key}" for run in runs for key in run["val"]}), wanted.removeprefix("val_")
    if wanted not in known:
        raise UserError(f"--select {wanted} is not a val metric of these runs: choose one of {', '.join(known)}")
    differ = [key for key in varying(runs) if key.startswith("--") or key in (*NAMES, "resolution", "trained on")]
    ranked = []
    for repeats in group_by(runs, "id"):
        repeats = newest_per_seed(repeats, [])
        value = mean(number(run["val"].get(metric)) for run in repeats)
        if value is not None:
            flags = {key: repeats[0]["id"].get(key) for key in differ}
            ranked.append({"runs": [run["path"] for run in repeats], "value": value, "flags": flags})
    if not ranked:
        raise UserError(f"--select {wanted}: no setting has it in all of its runs")
    highest_first = mode == "max" if mode else better(metric, 1, 0)
    return {"metric": wanted, "ranked": sorted(ranked, key=lambda setting: setting["value"], reverse=highest_first)}


def scale(metric: str) -> int:
    """100 for a metric that is shown in per cent, else 1."""
    return 1 if metric.endswith(NOT_PERCENT) else 100


def cell(value: float | None, metric: str, std: float | None = None, sign: str = "") -> str:
    """0.9123 as '91.23', or '91.23 ± 0.40' where there are several seeds; losses stay as they are."""
    if number(value) is None:
        return "-"
    factor = scale(metric)
    digits = 2 if factor == 100 else 4
    return f"{factor * value:{sign}.{digits}f}" + ("" if std is None else f" ± {factor * std:.{digits}f}")


# ----------------------------------------------------------------------------------------------------------- evidence


@dataclass
class Predictions:
    """A run's outputs on one split.  ids (N,); groups (N,) or None; targets {task: (N,)}; logits {task: (N, C)};
    classes {task: [name]}; positive {task of two classes: index of the positive one}, 1 where it is not known."""

    ids: np.ndarray
    groups: np.ndarray | None
    targets: dict
    logits: dict
    classes: dict
    positive: dict = field(default_factory=dict)

    def probabilities(self, task: str) -> np.ndarray:
        """(N, C) float64."""
        return np.exp(metrics.log_softmax(self.logits[task]))

    def correct(self, task: str) -> np.ndarray:
        """(N,) bool."""
        return self.logits[task].argmax(1) == self.targets[task]

    def weighted_metric(self, metric: str):
        """A function of weights (N, R), how often each image counts, that gives (R,) values of a metric of
        metrics.RESAMPLED, the mean over tasks, or of <task>_<metric>.

        None where it is another one, or of curves of more than 100 classes, which take hours.
        """
        known = {f"{task}_{name}": ([task], name) for task in self.targets for name in metrics.RESAMPLED}
        known.update((name, (self.targets, name)) for name in metrics.RESAMPLED)
        tasks, name = known.get(metric, ((), None))
        if not tasks or not name.endswith("accuracy") and max(len(self.classes[task]) for task in tasks) > 100:
            return None
        functions = [
            metrics.weighing(self.logits[task], self.targets[task], (name,), self.positive.get(task, 1))
            for task in tasks
        ]
        once = np.ones((len(self.ids), 1), np.int32)
        functions = [function for function in functions if np.isfinite(function(once)[name][0])] or functions
        return lambda weights: np.mean([function(weights)[name] for function in functions], axis=0)

    def value(self, metric: str) -> float | None:
        """A metric that `weighted_metric` knows, of all rows; else None."""
        function = self.weighted_metric(metric)
        return function and float(function(np.ones((len(self.ids), 1), np.int32))[0])


def read_predictions(file: Path) -> Predictions:
    """A predictions_<split>.npz.  Raises OSError, ValueError or KeyError where it is damaged or not finite."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    result = Predictions(arrays["ids"], arrays.get("groups"), {}, {}, {})
    for suffix in [name.removeprefix("logits") for name in arrays if name.startswith("logits")]:
        task, logits, labels = suffix[1:] or "label", arrays["logits" + suffix], arrays["labels" + suffix]
        classes = [str(name) for name in arrays["classes" + suffix]]
        if logits.shape != (len(result.ids), len(classes)) or len(labels) != len(result.ids):
            raise ValueError(f"{len(result.ids)} ids and {len(classes)} classes with logits of shape {logits.shape}")
        if not np.isfinite(logits).all():
            raise ValueError("some logits are not finite")
        result.targets[task], result.logits[task], result.classes[task] = labels, logits, classes
        if "positive" + suffix in arrays:
            result.positive[task] = classes.index(str(arrays["positive" + suffix]))
    return result


def align(predictions: Predictions, reference: Predictions) -> Predictions:
    """`predictions` in the row order of `reference`.  Raises ValueError where images, labels or classes differ."""
    rows = {sample: row for row, sample in enumerate(predictions.ids)}
    if set(rows) != set(reference.ids):
        raise ValueError(f"its {len(rows)} test images are not the {len(reference.ids)} of the other runs")
    if predictions.classes != reference.classes:
        raise ValueError("its classes, or their order, are not those of the other runs")
    order = slice(None)  # which copies nothing
    if not np.array_equal(predictions.ids, reference.ids):
        order = [rows[sample] for sample in reference.ids]
    targets, logits = (
        {task: values[order] for task, values in arrays.items()} for arrays in (predictions.targets, predictions.logits)
    )
    if any((targets[task] != reference.targets[task]).any() for task in targets):
        raise ValueError("its test labels are not those of the other runs")
    return replace(reference, targets=targets, logits=logits)


def load_predictions(runs: list, missing: list):
    """Adds "predictions" to each run: those of one test set in one row order, or None where none can be used."""
    references, absent = {}, []  # {test set: Predictions}
    for run in runs:
        if "predictions" in run:
            continue  # of another group too
        path, run["predictions"] = run["path"], None
        file = Path(path, "predictions_test.npz")
        if not file.exists():
            absent.append(path)
            continue
        try:
            predictions, recorded = read_predictions(file), run.get("recorded_test", run["test"])["accuracy"]
            accuracy = predictions.value("accuracy")
            if abs(accuracy - recorded) > 1e-6:
                raise ValueError(f"their accuracy is {accuracy:.4f}, that of results.json {recorded:.4f}")
            test_set = run["dataset"]["sha256"]["test"], json.dumps(predictions.classes)
            run["predictions"] = align(predictions, references.setdefault(test_set, predictions))
        except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
            missing.append(f"{file} cannot be used, so {path} has no interval, calibration or gallery: {error}")
    if absent:
        missing.append(f"no predictions_test.npz, and so no interval, calibration or gallery: {', '.join(absent)}")


def predictions_by_seed(members: dict) -> dict:
    """{kind: {seed: Predictions}} of a group; the teacher's stand under the seeds of the students that it taught."""
    by_checkpoint = {run.get("checkpoint_sha256"): run.get("predictions") for run in members[TEACHER]}
    taught = members[DISTILLED] if members[TEACHER] else []
    by_kind = {TEACHER: {run["seed"]: by_checkpoint.get(run["teacher"].get("sha256")) for run in taught}}
    for kind in (BASELINE, DISTILLED):
        by_kind[kind] = {run["seed"]: run.get("predictions") for run in members[kind]}
    return {kind: {seed: part for seed, part in seeds.items() if part} for kind, seeds in by_kind.items()}


def by_images(runs: list) -> list:
    """Lists of positions in `runs` whose rows are the same images: all of them, or a list for each fold's."""
    positions = {}
    for position, run in enumerate(runs):
        positions.setdefault(run.ids.tobytes(), []).append(position)
    return list(positions.values())


def paired_bootstrap(
    before: list,
    after: list,
    metric: str = "accuracy",
    repeats: int = 2000,
    seed: int = 0,
) -> dict | None:
    """{"gains": of each pair, "gain": their mean, "interval": its 95 % percentile interval [low, high], "units": how
    many are resampled}, or None for a metric that has none.

    before, after: pairs on the same rows, one a seed or fold.  Each resample draws the same images for all pairs that
    have the same, whole lesions, patients or cases where there are groups (Efron and Tibshirani 1993, chapter 8).  The
    interval covers the choice of test images, not that of seeds.
    """
    functions = [(one.weighted_metric(metric), two.weighted_metric(metric)) for one, two in zip(before, after)]
    if None in functions[0]:
        return None
    resampled, units = 0, 0
    for shift, positions in enumerate(by_images(before)):
        first = before[positions[0]]
        resampled += np.concatenate(
            [
                sum(functions[i][1](weights) - functions[i][0](weights) for i in positions)
                for weights in metrics.resamples(len(first.ids), first.groups, repeats, seed + shift)
            ]
        )
        units += len(first.ids if first.groups is None else set(first.groups))
    resampled = resampled[np.isfinite(resampled)] / len(before)  # a resample without a class has no curve of it
    gains = [two.value(metric) - one.value(metric) for one, two in zip(before, after)]
    if len(resampled) < repeats / 2 or not np.isfinite(gains).all():
        return None
    interval = np.percentile(resampled, (2.5, 97.5)).tolist()
    return {"gains": gains, "gain": fmean(gains), "interval": interval, "units": units}


def mcnemar(before: np.ndarray, after: np.ndarray) -> dict:
    """Exact two-sided test of two students' accuracy (McNemar 1947): of the images that only one gets right, does
    either get more than half?

    before, after (N,) bool: what is right.  {"gained": images right in `after` alone, "lost": in `before` alone, "p"}.
    """
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    p = float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "p": p}


def seeds_interval(gains: list) -> list | None:
    """95 % interval [low, high] of the mean of the seeds' gains by Student's t, or None for fewer than two."""
    if len(gains) < 2:
        return None
    half = scipy.stats.t.ppf(0.975, len(gains) - 1) * stdev(gains) / math.sqrt(len(gains))
    return [float(fmean(gains) + sign * half) for sign in (-1, 1)]


def span(interval: list | None, metric: str, unit: bool = True) -> str:
    """'-0.40 to +1.80 points', or '-' for None."""
    points = " points" * (unit and scale(metric) == 100)
    return " to ".join(cell(bound, metric, sign="+") for bound in interval) + points if interval else "-"


def judge_gain(gain: float, intervals: dict, metric: str = "accuracy") -> tuple:
    """A gain's verdict ("gain", "loss" or "within noise") and a sentence that says why.

    intervals: {what was resampled: the 95 % interval}, test images first; the one over seeds is None for one seed.
    """
    noisy, clear = [], []
    for name, interval in intervals.items():
        if interval:
            (noisy if interval[0] <= 0 <= interval[1] else clear).append(f"{span(interval, metric)} over {name}")
    word = "gain" if gain >= 0 else "loss"
    start = f"The {word} of {cell(abs(gain), metric)}{' points' * (scale(metric) == 100)} is"
    if noisy:
        why = f"its 95 % interval{'s' * (len(noisy) > 1)}, {' and '.join(noisy)}, include{'s' * (len(noisy) == 1)} 0"
        return "within noise", f"{start} within noise: {why}{f' ({clear[0]} does not)' if clear else ''}."
    if len(clear) == 1:
        return word, (
            f"{start} larger than the noise of the {[*intervals][0]} (95 % interval {clear[0]}); one seed says nothing "
            "about the noise of training."
        )
    return word, f"{start} larger than noise: its 95 % intervals, {' and '.join(clear)}, exclude 0."


def mean_fidelity(students: dict, teachers: dict) -> dict:
    """`metrics.fidelity` of Predictions {seed: ...} to their teachers', mean over tasks and seeds; None where it is
    undefined."""
    results = [
        metrics.fidelity(student.logits[task], teachers[seed].logits[task], student.targets[task])
        for seed, student in students.items()
        if seed in teachers
        for task in student.logits
    ] or [{}]
    return {name: mean(result[name] for result in results) for name in results[0]}


def class_gains(before: list, after: list, task: str) -> list:
    """[{"class", "images", "before", "after"}]: recalls of each class that occurs, mean over seeds."""
    classes = before[0].classes[task]
    counts = sum(np.bincount(before[same[0]].targets[task], minlength=len(classes)) for same in by_images(before))
    recalls = (
        np.array([metrics.class_recalls(run.logits[task], run.targets[task]) for run in runs], float).T
        for runs in (before, after)
    )  # (C, runs), NaN for a class that a fold lacks
    return [
        {"class": name, "images": int(count), "before": float(np.nanmean(a)), "after": float(np.nanmean(b))}
        for name, count, a, b in zip(classes, counts, *recalls)
        if count
    ]


def disagreements(before: Predictions, after: Predictions, task: str, most: int = 12) -> list:
    """Rows on which one of two students is right and the other wrong, half of them gained and half lost, largest
    changes of the true class's probability first, one image a group where there are groups."""
    labels, rows = before.targets[task], np.arange(len(before.ids))
    change = after.probabilities(task)[rows, labels] - before.probabilities(task)[rows, labels]
    parts, half = [], most // 2
    for one, two, sign in ((after, before, -1), (before, after, 1)):
        rows = np.flatnonzero(one.correct(task) & ~two.correct(task))
        rows = rows[np.argsort(sign * change[rows], kind="stable")]
        if before.groups is not None:  # one image a lesion, patient or case
            rows = rows[np.sort(np.unique(before.groups[rows], return_index=True)[1])]
        parts.append(rows)
    gained, lost = parts
    return [*gained[: max(most - half, most - len(lost))], *lost[: max(half, most - len(gained))]]


def gain_evidence(predictions: dict, metric: str, runs: int) -> dict:
    """What the predictions of a group say, for report.json.

    predictions: of `predictions_by_seed`; runs: how many runs the larger kind of student has, with or without
    predictions.  Keys are absent where there is nothing to compare: gain, interval, units, seeds, seeds_interval,
    verdict, sentence, mcnemar, grouped, classes, fidelity.
    """
    result, teachers = {"metric": metric}, predictions[TEACHER]
    seeds = [seed for seed in predictions[DISTILLED] if seed in predictions[BASELINE]]
    before, after = ([predictions[kind][seed] for seed in seeds] for kind in (BASELINE, DISTILLED))
    if seeds:
        result["grouped"] = after[0].groups is not None
        result["mcnemar"] = [
            {"seed": seed, "task": task, **mcnemar(one.correct(task), two.correct(task))}
            for seed, one, two in zip(seeds, before, after)
            for task in one.targets
        ]
        result["classes"] = {task: class_gains(before, after, task) for task in after[0].targets}
    if seeds and (paired := paired_bootstrap(before, after, metric)):
        over_seeds = seeds_interval(paired.pop("gains"))
        intervals = {
            "groups of test images" if result["grouped"] else "test images": paired["interval"],
            "folds" if isinstance(seeds[0], str) else "seeds": over_seeds,
        }
        verdict, sentence = judge_gain(paired["gain"], intervals, metric)
        if len(seeds) < runs:
            alone = f"On {', '.join(map(repeat_name, seeds))} alone, for which both kinds have predictions: "
            sentence = alone + sentence[0].lower() + sentence[1:]
        result.update(paired, seeds=seeds, seeds_interval=over_seeds, verdict=verdict, sentence=sentence)
    if teachers:
        students = {kind: predictions[kind] for kind in (BASELINE, DISTILLED) if predictions[kind]}
        result["fidelity"] = {kind: mean_fidelity(students[kind], teachers) for kind in students}
    return result
