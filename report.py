"""Read many runs and write one comparison: report.html (one page that needs no other file), report.md, report.json,
report.csv and figures.

    python report.py runs
    python report.py runs/teacher runs/student runs/distill --output report
    python report.py runs --metric balanced_accuracy
    python report.py runs/sweep --select val_loss                # name the best point of a sweep, chosen on val
    python report.py runs --watch 60                             # again and again, while runs go on
    python report.py runs --reevaluate --device cpu              # load every checkpoint and test it again

A group is the seeds, or the folds, of one distilled student: same test set, classes, training data, teacher, method and
flags. It is compared with its teacher, found by the SHA-256 of its checkpoint, and with its baseline: the same student
on the same labels without a teacher. What is missing is named and left empty. With several tasks, --metric takes a
task's figures, as location_accuracy, or their mean, accuracy.

The gain over the baseline has two 95 % intervals: one over test images, by a paired bootstrap of the predictions (of
whole lesions, patients or cases where the dataset has such groups), and one over seeds or folds, by Student's t. It
counts as a gain if neither interval includes 0.

Files of common: augment, cli, metrics, page, run, statistics; page.html beside them.  --reevaluate needs evaluate.py
and what that needs, the gallery data and the files that the run's dataset needs (see train_student.py).
Packages: torch, numpy, pillow, matplotlib, scikit-learn, jinja2 (it comes with torch); with --reevaluate timm too.
"""

import base64
import io
import sys
import time
from pathlib import Path

from common import cli

with cli.torch_later():  # only --reevaluate needs it
    from common.cli import data_root as find_data_root
    from common.page import (
        comparison_tables,
        cost_notes,
        csv_text,
        draw_report,
        group_cost,
        headline,
        html,
        markdown,
        page_template,
        ranking,
        repeat_command,
        summarize,
    )
    from common.run import UserError, atomic_write, write_json
    from common.statistics import (
        DISTILLED,
        KINDS,
        by_seed,
        collect,
        disagreements,
        find_run_folders,
        gain_evidence,
        is_label_free,
        load_predictions,
        measured,
        number,
        predictions_by_seed,
        read_runs,
        repeat_name,
        select,
        stats,
    )


def build_parser():
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders searched for them")
    parser.add_argument("--output", default="report", help="folder for report.html, .md, .json, .csv and figures")
    parser.add_argument("--metric", default="accuracy", help="test metric for tables and verdicts")
    parser.add_argument(
        "--select",
        metavar="val_METRIC",
        help="rank the settings by this val metric, such as val_loss, and name the best; by default several settings "
        "of one student are ranked by the metric that chose their epochs",
    )
    parser.add_argument(
        "--mode", choices=("max", "min"), help="direction of --select; by default min for losses, else max"
    )
    parser.add_argument(
        "--gallery",
        type=cli.NATURAL,
        default=12,
        metavar="N",
        help="show up to N test images per group on which the students differ; 0 shows none",
    )
    cli.switch(parser.add_argument, "--reevaluate", "measure test metrics and cost again, from the checkpoints")
    parser.add_argument(
        "--watch",
        type=cli.POSITIVE,
        metavar="SECONDS",
        help="write the report again every so many seconds, until Ctrl-C; the page loads itself anew",
    )
    parser.add_argument("--device", default="auto", help="device for --reevaluate: auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--batch-size", type=cli.POSITIVE, default=256, help="batch size for --reevaluate, in images")
    return parser


def evaluation_functions():
    """What --reevaluate needs, and nothing else here does."""
    try:
        from evaluate import evaluate_checkpoint, measure_checkpoint
    except ModuleNotFoundError as error:
        raise UserError(f"--reevaluate needs {missing_part(error)}") from None
    return evaluate_checkpoint, measure_checkpoint


def missing_part(error):
    """What a ModuleNotFoundError lacks, and what to do: a file of this project or a package."""
    package = error.name.split(".")[0]
    if package in ("common", "evaluate"):
        return f"{error.name.replace('.', '/')}.py, which is missing: copy it from the project"
    return f"the package {package}: pip install {package}"


def reevaluate(runs, metric, device, batch_size):
    """Replaces each run's test metrics by measured ones, keeps the recorded ones beside them; returns warnings."""
    evaluate_checkpoint, measure_checkpoint = evaluation_functions()
    warnings = []
    for run in runs:
        checkpoint, recorded = Path(run["path"], run["checkpoint"]), run["test"]
        try:
            again = evaluate_checkpoint(checkpoint, split="test", device=device, batch_size=batch_size, data_root=None)
            run["model"].update(measure_checkpoint(checkpoint, device, batch_size))
        except Exception as error:
            warnings.append(f"{run['path']} was not evaluated again, its recorded figures stand: {user_error(error)}")
            continue
        run["recorded_test"] = recorded
        run["recomputed_test"] = {key: again[key] for key in again if number(again[key]) is not None}
        run["test"] = {**recorded, **run["recomputed_test"]}
        for key in sorted({"accuracy", metric} & set(recorded) & set(run["recomputed_test"])):
            if number(recorded[key]) is None or abs(recorded[key] - again[key]) > 1e-4:
                warnings.append(
                    f"{run['path']}: test {key} was {recorded[key]}, evaluated again it is {again[key]:.6f}"
                )
    if not any("recomputed_test" in run for run in runs):
        raise UserError(f"--reevaluate could evaluate no checkpoint: {warnings[0]}")
    return warnings


def user_error(error):
    """The error's words where the user can mend it, as a checkpoint or data that are not here; else it is raised."""
    if isinstance(error, ModuleNotFoundError):
        return f"it needs {missing_part(error)}"
    if isinstance(error, KeyError):
        return f"its results.json or its checkpoint lacks {error}"
    if getattr(error, "exit_code", None) != 2 and not isinstance(error, (OSError, ImportError)):
        raise error
    return str(error)


def open_test_set(run, opened, notes):
    """The dataset of a run's test split, or None with a note where it is not here.  opened: {fingerprint: dataset} of
    those met before."""
    fingerprint, flags = run["dataset"]["sha256"]["test"], run["flags"]
    if fingerprint in opened:
        return opened[fingerprint]
    opened[fingerprint] = None
    try:
        from common.data import load_splits, split_options

        options = split_options(flags)
        for train_only in ("limit_train", "limit_labels", "unlabeled_root", "include_list", "extra_train"):
            options.pop(train_only, None)
        classes, folder = run["id"]["classes"] or None, find_data_root(flags.get("data_root"))
        splits = load_splits(flags["dataset"], folder, classes=classes, splits=("test",), **options)
        if splits.test.fingerprint(splits.classes) != fingerprint:
            raise UserError("the test images that are here now are not those of the run")
        opened[fingerprint] = splits.test
    except Exception as error:
        notes.append(f"no gallery for {run['id']['dataset']}: {user_error(error)}")
    return opened[fingerprint]


def thumbnail(pixels, side=200):
    """A picture (H, W, 3) uint8 as base64 of a small JPEG."""
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def gallery(members, most, opened, notes):
    """Up to `most` test images on which the students of one seed differ, with all answers: dicts for the page."""
    by_kind = predictions_by_seed(members)
    run = next((run for run in members[DISTILLED] if all(run["seed"] in by_kind[kind] for kind in KINDS[1:])), None)
    dataset = open_test_set(run, opened, notes) if run and most else None
    if dataset is None:
        return []
    predictions = {kind: by_kind[kind][run["seed"]] for kind in KINDS if run["seed"] in by_kind[kind]}
    before, after = (predictions[kind] for kind in KINDS[1:])
    rows, texts, items = {sample: row for row, sample in enumerate(dataset.ids)}, getattr(dataset, "texts", None), []
    for task, classes in after.classes.items():
        probabilities = {kind: outputs.probabilities(task) for kind, outputs in predictions.items()}
        for row in disagreements(before, after, task, most // len(after.classes)):
            sample, true, answers = str(after.ids[row]), int(after.targets[task][row]), []
            try:
                picture = thumbnail(dataset.read(rows[sample]))
            except Exception as error:
                notes.append(f"no picture of {sample}: {user_error(error)}")
                continue
            for kind in probabilities:
                p, name = probabilities[kind][row], kind.removeprefix("student ")
                best = int(p.argmax())
                answers.append({"kind": name, "name": classes[best], "probability": p[best], "right": best == true})
            text = texts[rows[sample]] if texts is not None else ""
            items.append(
                {
                    "id": sample,
                    "task": task * (len(after.classes) > 1),
                    "true": classes[true],
                    "seed": repeat_name(run["seed"]),
                    "image": picture,
                    "text": text[:160] + "…" * (len(text) > 160),
                    "answers": answers,
                }
            )
    return items


def add_evidence(members, groups, metric, missing):
    """Adds cost and evidence to each group, and predictions to the runs."""
    labelled = [kinds for kinds, group in zip(members, groups) if not group["label_free"]]
    load_predictions([run for kinds in labelled for runs in kinds.values() for run in runs], missing)
    for kinds, group in zip(members, groups):
        group["cost"] = group_cost(kinds)
        group["evidence"] = gain_evidence(predictions_by_seed(kinds), metric, max(len(kinds[k]) for k in KINDS[1:]))
        group["notes"] += cost_notes(kinds)


def main(args):
    if not args.watch:
        return write_report(args)
    while True:
        try:
            write_report(args)
        except UserError as error:  # no run has ended yet, or one is being replaced
            print(f"waiting: {error}", flush=True)
        time.sleep(args.watch)


def write_report(args):
    output = Path(args.output)
    runs, missing = read_runs(find_run_folders(args.runs))
    known = measured(runs)
    if args.metric not in known and not all(is_label_free(run) for run in runs):
        raise UserError(f"--metric {args.metric} is in none of these runs; they have: {', '.join(sorted(known))}")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a folder")
    selected, template = select(runs, args.select, args.mode), page_template()
    output.mkdir(parents=True, exist_ok=True)
    notes = reevaluate(runs, args.metric, args.device, args.batch_size) if args.reevaluate else []
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)

    members, groups = collect(runs, args.metric, missing)
    add_evidence(members, groups, args.metric, missing)
    opened = {}
    galleries = [gallery(kinds, args.gallery, opened, notes) for kinds in members]
    figures = draw_report(output, args.metric, members, groups, runs, missing)
    if selected:
        best = [run for run in runs if run["path"] in selected["ranked"][0]["runs"]]
        selected["test"] = stats(by_seed(best, args.metric))
        selected["command"] = repeat_command(best[0])

    report = {
        "runs": [summarize(run) for run in runs],
        "groups": groups,
        "missing": missing,
        "notes": notes,
        "figures": figures,
        "selected": selected,
        "refresh": args.watch,
    }
    write_json(output / "report.json", report)
    for name, text in (
        ("report.csv", csv_text(report["runs"])),
        ("report.md", markdown(report, args.metric)),
        ("report.html", html(template, report, runs, args.metric, output, galleries)),
    ):
        with atomic_write(output / name) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")
    print("\n\n".join(comparison_tables(groups, args.metric)))
    for line in (
        *headline(groups),
        *(f"missing: {sentence}" for sentence in missing),
        *(f"note: {sentence}" for sentence in sum((group["notes"] for group in groups), notes)),
        *(ranking(selected, args.metric) if selected else []),
        f"report: {output / 'report.html'}",
    ):
        print(line)


if __name__ == "__main__":
    cli.run_script(main, build_parser)
