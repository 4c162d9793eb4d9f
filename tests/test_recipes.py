"""The dermatology recipes of tests/benchmarks/README.md, run as they stand there on a part of HAM10000, with random
weights and one epoch."""

import csv
import io
import json
import re
import shlex
import tarfile

import pytest
from conftest import ROOT, shared_archive, succeed

MALIGNANT = ("mel", "bcc", "akiec")


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """HAM10000's layout with 30 benign and 30 malignant lesions, an image each; skips where the archive is absent."""
    archive = shared_archive("ham10000.tar")
    folder = tmp_path_factory.mktemp("part")
    (folder / "images").mkdir()
    with tarfile.open(archive) as tar:
        (name,) = [m.name for m in tar if m.name.endswith("HAM10000_metadata.csv")]
        rows = list(csv.DictReader(io.TextIOWrapper(tar.extractfile(name), "utf-8")))
        chosen, lesions = {}, set()
        for row in rows:
            malignant = row["dx"] in MALIGNANT
            if (
                row["lesion_id"] not in lesions
                and sum((r["dx"] in MALIGNANT) == malignant for r in chosen.values()) < 15
            ):
                chosen[row["image_id"]] = row
                lesions.add(row["lesion_id"])
        for member in tar:
            stem = member.name.rsplit("/", 1)[-1].removesuffix(".jpg")
            if stem in chosen:
                (folder / "images" / f"{stem}.jpg").write_bytes(tar.extractfile(member).read())
    with open(folder / "HAM10000_metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(chosen.values())
    return folder


def commands():
    """[(script, [flags])] of the block after the mark."""
    page = (ROOT / "tests/benchmarks/README.md").read_text()
    text = page.split("<!-- dermatology -->")[1].split("```")[1].replace("\\\n", " ")
    values = dict(re.findall(r'^([A-Z])="([^"]*)"', text, re.M))
    found = []
    for line in re.findall(r"^python (.*)$", text, re.M):
        for name, value in values.items():
            line = line.replace(f"${name} ", value + " ")
        script, *flags = shlex.split(line, comments=True)
        found.append((script, flags))
    return found


def test_dermatology_recipes_run_end_to_end(part, tmp_path):
    recipes = commands()
    assert [script for script, _ in recipes] == ["train_teacher.py", "train_student.py", "distill.py", "distill.py"]
    changed = {"--data-root": str(part), "--epochs": "1", "--batch-size": "4"}
    for script, flags in recipes:
        flags = [f for f in flags if f != "--pretrained"]
        for flag, value in changed.items():
            flags[flags.index(flag) + 1] = value
        more = ["--limit-train", 8, *(["--allow-weak-teacher"] if script == "distill.py" else [])]
        succeed(script, *flags, *more, "--device", "cpu", cwd=tmp_path)
    for name, method, side in (
        ("teacher", None, 256),
        ("student", None, 224),
        ("features", "feature_matching", 224),
        ("response", "response", 224),
    ):
        results = json.loads((tmp_path / "runs" / f"derm_{name}" / "results.json").read_text())
        assert results["model"]["resolution"] == side and results["method"] == method
        assert (
            0 <= results["test"]["pauc"] <= 0.2
            and results["select_metric"] == "pauc"
            and results["dataset"]["classes"] == ["benign", "malignant"]
        )
    rows = json.loads((tmp_path / "runs" / "derm_features" / "metrics.json").read_text())
    assert rows[0]["train_loss"] == pytest.approx(0.5 * rows[0]["train_ce"] + 0.5 * rows[0]["train_feature"], rel=1e-4)
    rows = json.loads((tmp_path / "runs" / "derm_response" / "metrics.json").read_text())
    assert rows[0]["train_loss"] == pytest.approx(0.6 * rows[0]["train_ce"] + 0.4 * rows[0]["train_kl"], rel=1e-4)
