"""Read many runs and write one comparison: report.html (one page, nothing else needed), report.md, report.json,
report.csv and figures.

    python report.py runs
    python report.py runs/teacher runs/student runs/distill --output report
    python report.py runs --metric balanced_accuracy
    python report.py runs/sweep --select val_loss                # name the best point of a sweep, chosen on val
    python report.py runs --reevaluate --device cpu              # load every checkpoint, test it again

A group is the seeds, or the folds, of one distilled student: same test set, classes, training data, teacher file,
student, method
and flags. Beside it stand its teacher, found by the SHA-256 of its checkpoint, and its baseline: the same student on
the same labels without a teacher. What is missing is named and left empty. Of several tasks --metric takes each task's
figures,
as location_accuracy, or their mean, accuracy.

The gain over the baseline has a 95 % interval by a paired bootstrap of the test predictions, whole lesions, patients or
cases where the
dataset has such groups, and one over seeds or folds by Student's t; a gain is called one where neither interval holds
0.

Needs from common: augment.py, charts.py, cli.py, comparison.py, data.py, dermatology.py, distributed.py, evidence.py,
figures.py, images.py,
metrics.py, page.py, splitting.py, tables.py; with --reevaluate also evaluation.py, loader.py, models.py, training.py.
Runs on images and texts need image_text.py too, and multimodal.py with --reevaluate.
Packages: torch, numpy, pillow, matplotlib, scikit-learn, jinja2 (it comes with torch); with --reevaluate timm too.
"""

import base64
import io
import sys
from pathlib import Path

from common import cli, comparison
from common.charts import draw_report
from common.comparison import KINDS, number, repeat_name
from common.evidence import align, disagreements, read_predictions, weigh
from common.page import comparison_tables, csv_text, headline, html, markdown, ranking, summarize, table


def build_parser():
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders searched for them")
    parser.add_argument("--output", default="report", help="folder for report.html, .md, .json, .csv and figures")
    parser.add_argument("--metric", default="accuracy", help="test metric of tables and verdicts")
    parser.add_argument(
        "--select",
        metavar="val_METRIC",
        help="rank the settings by this val metric and name the best; as val_loss; by default the "
        "settings of one student, where there are several, by the metric that chose their epochs",
    )
    parser.add_argument("--mode", choices=("max", "min"), help="of --select; by default min for losses, else max")
    parser.add_argument(
        "--gallery",
        type=cli.NATURAL,
        default=12,
        metavar="N",
        help="test images a group on which the students differ; 0 for none",
    )
    parser.add_argument(
        "--reevaluate",
        action="store_true",
        help="compute test metrics and cost again from the checkpoints, on this machine; by default off",
    )
    parser.add_argument("--device", default="auto", help="of --reevaluate: auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--batch-size", type=cli.POSITIVE, default=256, help="of --reevaluate: images a step")
    return parser


def reevaluate(runs, args):
    """Replaces each run's test metrics by recomputed ones, keeps the recorded beside them; returns warnings."""
    from common.evaluation import evaluate_checkpoint, measure_checkpoint

    warnings = []
    for run in runs:
        checkpoint, recorded = Path(run["path"], run["checkpoint"]), run["test"]
        try:
            again = evaluate_checkpoint(
                checkpoint, split="test", device=args.device, batch_size=args.batch_size, data_root=None
            )
            run["model"].update(measure_checkpoint(checkpoint, args.device, args.batch_size))
        except Exception as error:
            if getattr(error, "exit_code", None) != 2 and not isinstance(error, OSError):
                raise  # our own fault; the others are the user's to mend, as a checkpoint or data that are not here
            warnings.append(f"{run['path']} was not evaluated again, its recorded figures stand: {error}")
            continue
        run["recorded_test"] = recorded
        run["recomputed_test"] = {key: again[key] for key in again if number(again[key]) is not None}
        run["test"] = {**recorded, **run["recomputed_test"]}
        for key in sorted({"accuracy", args.metric} & set(recorded) & set(run["recomputed_test"])):
            if number(recorded[key]) is None or abs(recorded[key] - again[key]) > 1e-4:
                warnings.append(
                    f"{run['path']}: test {key} was {recorded[key]}, evaluated again it is {again[key]:.6f}"
                )
    if not any("recomputed_test" in run for run in runs):
        raise cli.UserError(f"--reevaluate could evaluate no checkpoint: {warnings[0]}")
    return warnings


def load_predictions(members, missing, read):
    """The three kinds of runs as {seed: Predictions}, on the same rows; runs without usable ones are named in
    `missing`.

    read: {path: Predictions, None or False} of runs met before.
    """
    first, found = {}, ({}, {}, {})  # first: of each test set, as folds have several
    for part, runs in zip(found, members):
        for run in runs:
            path, file = run["path"], Path(run["path"], "predictions_test.npz")
            try:
                if path not in read:
                    read[path] = False  # `examine` names these together
                    if not file.exists():
                        continue
                    read[path] = None  # named once
                    predictions, recorded = read_predictions(file), run.get("recorded_test", run["test"])["accuracy"]
                    accuracy = predictions.value("accuracy")[0]
                    if abs(accuracy - recorded) > 1e-6:
                        raise ValueError(f"their accuracy is {accuracy:.4f}, that of results.json {recorded:.4f}")
                    read[path] = predictions
                if read[path]:
                    like = first.setdefault(run["dataset"]["sha256"]["test"], read[path])
                    part[run["seed"]] = align(read[path], like)
            except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
                missing.append(f"{file} cannot be used, so {path} has no interval, calibration or gallery: {error}")
    return found


def open_test_set(run, opened, notes):
    """The dataset of a run's test split, or None with a note where it is not here.  opened: {fingerprint: dataset} of
    those met before."""
    from common.data import load_splits

    flags, key = run["flags"], run["dataset"]["sha256"]["test"]
    if key not in opened:
        opened[key] = None
        options = {
            name: value
            for name, value in cli.split_flags(flags).items()
            if name not in ("limit_train", "limit_labels", "include_list", "extra_train")
        }
        try:
            found = load_splits(
                flags["dataset"],
                cli.data_root(flags.get("data_root")),
                classes=run["id"]["classes"] or None,
                splits=("test",),
                **options,
            )
            if found.test.fingerprint(found.classes) != key:
                raise cli.UserError("the test images that are here now are others than the run's")
            opened[key] = found.test
        except Exception as error:
            notes.append(f"no gallery for {run['id']['dataset']}: {picture_trouble(error)}")
    return opened[key]


def picture_trouble(error):
    """The error's words where it is the user's, as data that are not here, which costs the pictures alone; else it is
    raised again."""
    if getattr(error, "exit_code", None) != 2 and not isinstance(error, (OSError, KeyError, ImportError)):
        raise error
    return str(error)


def thumbnail(pixels, side=200):
    """A picture (H, W, 3) uint8 as base64 of a small JPEG."""
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def gallery(members, predictions, most, opened, notes):
    """Test images on which the students of one seed differ, with the answers of all: a list of dicts for the page."""
    run = next((run for run in members[2] if all(run["seed"] in of for of in predictions[1:])), None)
    dataset, items = open_test_set(run, opened, notes) if run and most else None, []
    if dataset is None:
        return items
    rows, texts = {sample: row for row, sample in enumerate(dataset.ids)}, getattr(dataset, "texts", None)
    teacher, before, after = (of.get(run["seed"]) for of in predictions)
    for task, classes in after.classes.items():
        for row in disagreements(before, after, task, most // len(after.classes)):
            sample = str(after.ids[row])
            try:
                picture = thumbnail(dataset.read(rows[sample]))
            except Exception as error:
                notes.append(f"no picture of {sample}: {picture_trouble(error)}")
                continue
            found = {
                kind: of.probabilities(task)[row]
                for kind, of in (("teacher", teacher), ("without KD", before), ("with KD", after))
                if of
            }
            true = int(after.targets[task][row])
            text = texts[rows[sample]] if texts is not None else ""
            items.append(
                {
                    "id": sample,
                    "task": task * (len(after.classes) > 1),
                    "true": classes[true],
                    "seed": repeat_name(run["seed"]),
                    "image": picture,
                    "text": text[:160] + "…" * (len(text) > 160),
                    "answers": [
                        {
                            "kind": kind,
                            "name": classes[p.argmax()],
                            "probability": float(p.max()),
                            "right": int(p.argmax()) == true,
                        }
                        for kind, p in found.items()
                    ],
                }
            )
    return items


def examine(members, groups, args, missing, notes):
    """Adds cost and evidence to each group.  Returns two lists, an entry a group: {kind: [Predictions]}, and the
    gallery's items."""
    read, opened, galleries = {}, {}, []
    predictions = [
        ({}, {}, {}) if group["label_free"] else load_predictions(some, missing, read)
        for some, group in zip(members, groups)
    ]
    absent = [path for path, found in read.items() if found is False]
    if absent:
        missing.append(f"no predictions_test.npz, and so no interval, calibration or gallery: {', '.join(absent)}")
    for some, group, (teachers, before, after) in zip(members, groups, predictions):
        by_file = {teacher.get("checkpoint_sha256"): teachers.get(teacher["seed"]) for teacher in some[0]}
        taught = {run["seed"]: by_file.get(run["teacher"].get("sha256")) for run in some[2]}
        taught = {seed: teacher for seed, teacher in taught.items() if teacher}
        group["cost"] = comparison.group_cost(some)
        group["evidence"] = weigh(taught, before, after, args.metric, max(map(len, some[1:])))
        group["notes"] += comparison.cost_notes(some)
        galleries.append(gallery(some, (taught, before, after), args.gallery, opened, notes))
    return [{kind: [*of.values()] for kind, of in zip(KINDS, some) if of} for some in predictions], galleries


def main(args):
    output = Path(args.output)
    runs, missing = comparison.read_runs(comparison.find_run_folders(args.runs))
    known = comparison.measured(runs)
    if args.metric not in known and not all(comparison.is_label_free(run) for run in runs):
        raise cli.UserError(f"--metric {args.metric} stands in no run; there are: {', '.join(sorted(known))}")
    if output.exists() and not output.is_dir():
        raise cli.UserError(f"--output {output} is a file: give a folder")
    selected = comparison.select(runs, args.select, args.mode)
    output.mkdir(parents=True, exist_ok=True)
    notes = reevaluate(runs, args) if args.reevaluate else []
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    found = comparison.collect(runs, missing)
    groups = [comparison.describe(members, own, found, args.metric, runs) for members, own in found]
    members = [some for some, _ in found]
    predictions, galleries = examine(members, groups, args, missing, notes)
    figures = draw_report(output, args.metric, members, groups, predictions, runs, missing)
    if selected:
        best = [run for run in runs if run["path"] in selected["ranked"][0]["runs"]]
        selected.update(
            test=comparison.stats(best, args.metric, [])[0], command=comparison.how_to_repeat(best[0])["command"]
        )
    report = {
        "runs": [{**summarize(run), "cost": comparison.run_cost(run)} for run in runs],
        "groups": groups,
        "missing": missing,
        "notes": notes,
        "figures": figures,
        "selected": selected,
    }
    cli.write_json(output / "report.json", report)
    for name, text in (
        ("report.csv", csv_text(report["runs"])),
        ("report.md", markdown(report, args.metric)),
        ("report.html", html(report, runs, args.metric, output, galleries)),
    ):
        with cli.atomic_write(output / name) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")
    print(
        "\n\n".join(map(table, comparison_tables(groups, args.metric))),
        *headline(groups),
        *(f"missing: {sentence}" for sentence in missing),
        *(f"note: {sentence}" for sentence in sum((group["notes"] for group in groups), notes)),
        *(ranking(selected, args.metric) if selected else []),
        f"report: {output / 'report.html'}",
        sep="\n",
    )


if __name__ == "__main__":
    cli.run_script(main, build_parser)
