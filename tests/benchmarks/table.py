"""The results that the READMEs show, as data: results.jsonl, and the table made of it.

    python report.py runs --output report
    python tests/benchmarks/table.py --add report/report.json --title "CIFAR-10, 18,000 images"
    python tests/benchmarks/table.py                    # prints the table as Markdown

A line of results.jsonl is either {"run": results.json of a run, without what is long}, or {"comparison": what report.py
found in a group of runs, with both intervals}.  A title's lines are replaced when it is added again.
"""

import argparse
import json
from pathlib import Path

FILE = Path(__file__).with_name("results.jsonl")
LONG = ("class_recalls", "final_val", "final_test")  # of a run, left out
KEPT = (
    "dataset",
    "teacher",
    "teachers",
    "student",
    "method",
    "variant",
    "resolution",
    "trained_on",
    "gain",
    "gain_std",
)


def read_lines(path: Path = FILE) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def without_folder(value):
    """The name of a file that is given by its whole path: where a machine keeps its files says nothing."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def collected(report: dict, title: str, metric: str) -> list[dict]:
    """The lines of a report.json."""
    lines = []
    for group in report["groups"]:
        evidence = {
            key: group["evidence"].get(key) for key in ("gain", "interval", "seeds_interval", "seeds", "verdict")
        }
        metrics = {name: group["metrics"].get(name) for name in dict.fromkeys((metric, "accuracy", "ece", "auc"))}
        kept = {key: group.get(key) for key in KEPT}
        kept["runs"] = {kind: [Path(run).name for run in group["runs"][kind]] for kind in ("students", "distilled")}
        lines.append(
            {"title": title, "metric": metric, "comparison": {**kept, "metrics": metrics, "evidence": evidence}}
        )
    for run in report["runs"]:
        results = json.loads((Path(run["run"]) / "results.json").read_text(encoding="utf-8"))
        results["flags"] = {key: without_folder(value) for key, value in results["flags"].items()}
        command = results["environment"]["command"].split(" ")
        results["environment"]["command"] = " ".join(map(without_folder, command))
        kept = {key: value for key, value in results.items() if key not in LONG}
        lines.append({"title": title, "name": Path(run["run"]).name, "run": kept})
    return lines


def percent(stats: dict | None) -> str:
    """'62.7 ± 1.6' of {"mean", "std"} in shares, or nothing."""
    if not stats or stats["mean"] is None:
        return ""
    return f"{100 * stats['mean']:.1f}" + (f" ± {100 * stats['std']:.1f}" if stats["std"] is not None else "")


def interval(values: list | None) -> str:
    return " to ".join(f"{100 * value:+.1f}" for value in values)


def row(line: dict) -> str:
    """A line of the table: data, method, teacher, alone, distilled, gain with its intervals, verdict."""
    group, metric = line["comparison"], line["metric"]
    stats, evidence = group["metrics"][metric], group["evidence"]
    method = f"`{group['method']}`" + (f", {group['variant']}" if group["variant"] else "")
    values = [percent(stats[kind]) for kind in ("teacher", "student without KD", "student with KD")]
    if group.get("teachers"):  # several
        values[0] = " + ".join(f"{100 * teacher[metric]:.1f}" for teacher in group["teachers"])
    gain = "" if evidence["gain"] is None else f"{100 * evidence['gain']:+.1f}"
    gain += f" ({'; '.join(interval(evidence[key]) for key in ('interval', 'seeds_interval') if evidence[key])})"
    verdict = f"**{evidence['verdict']}**" if evidence["verdict"] in ("gain", "loss") else evidence["verdict"] or ""
    verdict = verdict if evidence["seeds_interval"] else "one seed"
    return f"| {' | '.join([line['title'], method, *values, gain, verdict])} |"


def rows(lines: list[dict]) -> list[str]:
    """The table's rows; a title stands in the first of its own."""
    rows, title = [], None
    for line in (line for line in lines if "comparison" in line):
        rows.append(row({**line, "title": "" if line["title"] == title else line["title"]}))
        title = line["title"]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, metavar="report.json", help="a report whose runs are added")
    parser.add_argument("--title", help="what the data are called")
    parser.add_argument("--metric", default="accuracy", help="test metric of the table")
    args = parser.parse_args()
    lines = read_lines()
    if args.add:
        lines = [line for line in lines if line["title"] != args.title]
        lines += collected(json.loads(args.add.read_text(encoding="utf-8")), args.title, args.metric)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        FILE.write_text(text, encoding="utf-8")
    print("\n".join(rows(lines)))


if __name__ == "__main__":
    main()
