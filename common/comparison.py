"""Which runs are repeats of one another, which is whose teacher and baseline, and what each group's figures are.

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
NOT_SETTINGS = {"seed", "output", "device", "workers", "overwrite", "resume", "cache", "config", "sweep", "sweep_index", "save_every",
                "save_samples", "download", "data_root", "teacher_checkpoint", "dataset", "model", "method", "resolution",
                "eval_dataset", "eval_data_root", "eval_every", "positive"}  # fmt: skip
NEEDED = {"flags.seed": int, "dataset.name": str, "dataset.sha256.train": str, "dataset.sha256.test": str, "model.name": str,
          "model.family": str, "test.accuracy": (int, float)}  # fmt: skip
OF_DISTILLED = {"method": str, "teacher.name": str}
NAMES = ("dataset", "teacher", "student", "method")
TEST = ("test", "classes", "positive")  # must agree where two test figures are compared
STUDENT = ("dataset", "train", *TEST, "student", "resolution")  # and these between a student and its baseline
POSITIVE = ("average_precision", "pauc", "sensitivity_at_90_specificity")  # metrics of one of two classes
NOT_PERCENT = ("loss", "teacher_kl")  # metrics that are no share of 1
KINDS = {"teacher": "#0072B2", "student without KD": "#E69F00", "student with KD": "#009E73"}  # Okabe-Ito colours
KEYS = ("teacher_{}", "student_{}_without_kd", "student_{}_with_kd")  # of report.json, with the metric's name


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
    """Raises KeyError, ValueError, TypeError or AttributeError where results.json does not hold what a comparison needs."""
    if results["role"] not in ("teacher", "student", "distill"):
        raise ValueError(f"the role is {results['role']!r}, not teacher, student or distill")
    for dotted, kind in {**NEEDED, **(OF_DISTILLED if results["role"] == "distill" else {})}.items():
        value = results
        for key in dotted.split("."):
            value = value[key]
        if not isinstance(value, kind):
            raise ValueError(f"{dotted} is {value!r}")
    for name in ("script", "checkpoint"):
        if not isinstance(results.get(name) or "", str):
            raise ValueError(f"{name} is {results[name]!r}")
    shlex.split((results.get("environment") or {}).get("command") or "")  # as `how_to_repeat` does
    if not 0 <= results["test"]["accuracy"] <= 1:
        raise ValueError(f"the test accuracy is {results['test']['accuracy']}, not between 0 and 1")


def identity(results):
    """Everything in which the seeds of one group agree, flat, so that a label can show where groups differ."""
    dataset, teacher, flags = results["dataset"], results.get("teacher") or {}, dict(results["flags"])
    if flags.get("teacher_embeddings"):
        flags["teacher_embeddings"] = Path(flags["teacher_embeddings"]).name  # a staged copy keeps only its name
    return {"dataset": dataset["name"], "teacher": teacher.get("name"), "student": results["model"]["name"],
            "method": results.get("method"), "resolution": results["model"].get("resolution"), "test": dataset["sha256"]["test"],
            "train": dataset["sha256"]["train"], "classes": dataset.get("classes"),
            "positive": ", ".join(str(name) for key, name in results["test"].items() if key.endswith("positive")), "teacher sha256": teacher.get("sha256"),
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
    if metric.endswith(POSITIVE) and first["id"]["positive"]:
        notes.append(f"{metric}: the positive class is {first['id']['positive']}")
    if teacher and not distilled:
        group["teacher"] = teacher[0]["id"]["student"]
    if metric != "accuracy":
        group[metric] = compare(members, metric, notes)
    files = {"students": [run["path"] for run in baselines], "distilled": [run["path"] for run in distilled]}
    return {**group, "notes": notes, "runs": {"teacher": teacher[0]["path"] if teacher else None, **files}}


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


def label(group):
    models = f"{group['teacher']} to {group['student']}" if group["method"] else f"{group['student']} alone"
    return ", ".join(filter(None, (group["dataset"], models, group["method"], group["variant"])))


def run_cost(run):
    """What a run's student or teacher costs: parameters, multiply-adds of one image, images/s in inference and one image's latency on the
    run's own device, bytes of the weights in float32 and of best.pth (which holds the optimizer too), seconds of training.  None: not known.
    """
    results, file = run["results"], Path(run["path"], run["results"].get("checkpoint") or "best.pth")
    measured = {key: number(results["model"].get(key)) for key in ("parameters", "multiply_adds", "images_per_second", "latency_ms")}
    return {**measured, "weight_bytes": measured["parameters"] and 4 * measured["parameters"],
            "checkpoint_bytes": file.stat().st_size if file.is_file() else None, "train_seconds": number(results.get("wall_time_s"))}  # fmt: skip


def group_cost(members):
    """{kind: run_cost}, mean over seeds of what was measured; kinds without a run are left out."""
    found = {kind: [run_cost(run) for run in runs] for kind, runs in zip(KINDS, members) if runs}
    return {kind: {key: None if any(cost[key] is None for cost in costs) else statistics.fmean(cost[key] for cost in costs) for key in costs[0]}
            for kind, costs in found.items()}  # fmt: skip


def cost_notes(members):
    """A sentence where the images/s of a group were not all measured on one kind of device."""
    devices = {}
    for run in (run for runs in members for run in runs if number(run["results"]["model"].get("images_per_second"))):
        environment = run["results"].get("environment") or {}
        where = "this machine" if "recomputed" in run else f"{environment.get('device')} ({environment.get('threads')} threads)"
        devices.setdefault(where, []).append(run)
    if len(devices) < 2:
        return []
    return [f"images/s and latency are of different devices, --reevaluate measures all on one: {'; '.join(f'{d}: {paths(r)}' for d, r in devices.items())}"]


def how_to_repeat(run):
    """{"command", "commit", "versions", "hardware"} of a run, from its results.json."""
    environment, script = run["results"].get("environment") or {}, run["results"].get("script") or f"{run['results']['role']}.py"
    hardware = {key: environment.get(key) for key in ("device", "threads", "processes", "platform")}
    versions = {key: value for key, value in environment.items() if key not in (*hardware, "command", "git_commit")}
    words, count, path = shlex.split(environment.get("command") or ""), environment.get("processes") or 1, run["path"]
    if not words or any(word.split("=")[0] == "--resume" for word in words):  # what resumed a run does not repeat it
        words = [script, "--config", str(Path(path, "config.json"))]
    elif "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    command = shlex.join([script, *words[1:], "--output", f"{path}_again"])  # words[0] may be a copy in a job's $TMPDIR
    start = "python" if count == 1 else f"torchrun --nproc-per-node {count}"
    return {"command": f"{start} {command}", "commit": environment.get("git_commit"), "versions": versions, "hardware": hardware}


def cell(value, metric, std=None, sign=""):
    """0.9123 as '91.23', or '91.23 ± 0.40' where there are several seeds; losses stay as they are."""
    if number(value) is None:
        return "-"
    scale, digits = (1, 4) if metric.endswith(NOT_PERCENT) else (100, 2)
    return f"{scale * value:{sign}.{digits}f}" + ("" if std is None else f" ± {scale * std:.{digits}f}")
