"""report.html, intervals and the CSV on runs that the scripts made of scikit-learn's digits, also in a browser."""

import base64
import csv
import html
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import SMALL, run_script, succeed
from PIL import Image

from common import page as report_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def study(teacher, tmp_path_factory):
    """Two seeds alone and by response, one by rkd, their teacher; and the report on them."""
    cwd = tmp_path_factory.mktemp("study")
    shutil.copytree(teacher, cwd / "runs" / "teacher")
    for seed in (0, 1):
        succeed("train_student.py", *SMALL, "--epochs", 2, "--seed", seed, "--output", f"runs/student_{seed}", cwd=cwd)
        taught = [*SMALL, "--epochs", 2, "--seed", seed, "--teacher-checkpoint", "runs/teacher/best.pth"]
        succeed("distill.py", *taught, "--output", f"runs/distill_{seed}", cwd=cwd)
    succeed("distill.py", *taught, "--method", "rkd", "--output", "runs/rkd_1", cwd=cwd)
    done = succeed("report.py", "runs", "--select", "val_accuracy", cwd=cwd)
    report = json.loads((cwd / "report/report.json").read_text())
    return cwd, report, done, (cwd / "report/report.html").read_text()


def group_of(report, method):
    (found,) = [group for group in report["groups"] if group["method"] == method]
    return found


def right(cwd, run):
    with np.load(cwd / "runs" / run / "predictions_test.npz", allow_pickle=False) as arrays:
        return arrays["logits"].argmax(1) == arrays["labels"]


def test_gain_and_its_interval(study):
    cwd, report, done, _ = study
    evidence = group_of(report, "response")["evidence"]
    gains = np.array([right(cwd, f"distill_{seed}").astype(float) - right(cwd, f"student_{seed}") for seed in (0, 1)])
    expected = scipy.stats.bootstrap(
        (gains.mean(0),), np.mean, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    assert (
        evidence["gain"]
        == pytest.approx(gains.mean(), abs=1e-9)
        == pytest.approx(group_of(report, "response")["gain"], abs=1e-9)
    )
    assert evidence["interval"] == pytest.approx(list(expected), abs=0.004)
    assert evidence["seeds_interval"] == pytest.approx(
        list(scipy.stats.ttest_1samp(gains.mean(1), 0).confidence_interval()), abs=1e-9
    )
    assert evidence["sentence"] in done.stdout and evidence["sentence"] in (cwd / "report/report.md").read_text()
    for seed, test in enumerate(evidence["mcnemar"]):
        gained, lost = int((gains[seed] > 0).sum()), int((gains[seed] < 0).sum())
        assert (test["gained"], test["lost"]) == (gained, lost)
        assert test["p"] == pytest.approx(scipy.stats.binomtest(gained, gained + lost).pvalue)


def test_one_distilled_seed_is_compared_with_its_own_baseline(study):
    cwd, report, _, _ = study
    evidence = group_of(report, "rkd")["evidence"]
    assert evidence["seeds"] == [1] and evidence["seeds_interval"] is None and "seed 1 alone" in evidence["sentence"]
    assert evidence["gain"] == pytest.approx(right(cwd, "rkd_1").mean() - right(cwd, "student_1").mean(), abs=1e-9)


def test_fidelity_and_calibration_are_those_of_the_results(study):
    cwd, report, _, _ = study
    evidence, shown = (group_of(report, "response")[key] for key in ("evidence", "metrics"))
    results = [json.loads((cwd / f"runs/distill_{seed}/results.json").read_text())["test"] for seed in (0, 1)]
    for name in ("agreement", "teacher_right_kept", "teacher_kl"):
        assert evidence["fidelity"]["student with KD"][name] == pytest.approx(
            np.mean([of[name] for of in results]), abs=1e-6
        )
    for name in ("ece", "balanced_accuracy", "auc", "average_precision", "pauc"):
        assert shown[name]["student with KD"]["mean"] == pytest.approx(np.mean([of[name] for of in results]), abs=1e-9)
    assert set(shown["ece"]) == {"teacher", "student without KD", "student with KD"}
    assert evidence["fidelity"]["student without KD"]["agreement"] < 1


def test_cost(study):
    """ResNet-8's multiply-adds at 8 px, by hand from its layers' shapes, stand in results.json."""
    cwd, report, _, _ = study
    cost = group_of(report, "response")["cost"]["student with KD"]
    import torch

    from common.models import build_model

    model, counted = build_model("resnet8", num_classes=10), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda m, _, out: counted.append(m.weight[0].numel() * out[0].numel()))
    model.eval()({"image": torch.zeros(1, 3, 8, 8)})
    assert cost["multiply_adds"] == sum(counted) > 0
    assert (
        cost["parameters"] == sum(p.numel() for p in model.parameters())
        and cost["weight_bytes"] == 4 * cost["parameters"]
    )
    assert cost["images_per_second"] > 0 and cost["latency_ms"] > 0
    sizes = [(cwd / f"runs/distill_{seed}/best.pth").stat().st_size for seed in (0, 1)]
    assert cost["checkpoint_bytes"] == pytest.approx(np.mean(sizes))


def test_csv_has_a_row_a_run(study):
    cwd, report, _, _ = study
    rows = {row["run"]: row for row in csv.DictReader((cwd / "report/report.csv").open())}
    assert set(rows) == {run["run"] for run in report["runs"]} and len(rows) == 6
    results = json.loads((cwd / "runs/distill_1/results.json").read_text())
    row = rows["runs/distill_1"]
    assert (
        float(row["test_accuracy"]) == results["test"]["accuracy"] and float(row["val_loss"]) == results["val"]["loss"]
    )
    assert (row["method"], row["model"], row["seed"], row["teacher"]) == ("response", "resnet8", "1", "resnet8")


def test_the_template_has_lines_of_at_most_120_columns():
    """What ruff holds for Python."""
    template = Path(report_page.__file__).with_suffix(".html").read_text()
    assert [line for line in template.splitlines() if len(line) > 120] == []


def test_the_page_holds_everything(study):
    cwd, report, _, page = study
    assert (
        not re.search(r"(?:src|href)=[\"'](?!data:)", page)
        and "@import" not in page
        and "<script" not in page
        and "url(" not in page
    )
    figures = [base64.b64decode(text) for text in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)]
    drawn = [(cwd / "report" / name).read_bytes() for name in report["figures"]]
    assert set(figures) == set(drawn)
    names = " ".join(report["figures"])
    for kind in ("cost-digits", "curves-1", "reliability-1", "classes-1", "confusion-1"):
        assert kind in names
    for group in report["groups"]:
        assert group["evidence"]["sentence"] in html.unescape(page) and group["evidence"]["verdict"] in page
    for run in report["runs"]:
        assert run["run"] in page
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=cwd.parent).stdout.strip()
    assert "--teacher-checkpoint runs/teacher/best.pth" in page and (not commit or commit in page)


def test_selection_names_the_command_again(study):
    cwd, report, done, page = study
    command = report["selected"]["command"]
    path = report["selected"]["ranked"][0]["runs"][0]
    best = json.loads((cwd / path / "config.json").read_text())
    assert f"again: {command}" in done.stdout and report["selected"]["metric"] in page
    recorded = shlex.split(best["environment"]["command"])
    place = recorded.index("--output")
    expected = ["python", *recorded[:place], *recorded[place + 2 :], "--output", f"{path}_again"]
    assert shlex.split(command) == expected and recorded[0] in ("train_student.py", "train_teacher.py", "distill.py")
    assert not (cwd / expected[-1]).exists()  # or it would be refused


@pytest.mark.parametrize(
    "command, words",
    [
        (
            "/tmp/kd-0-7/code/train_student.py --data-root '/my images' --output 'runs/a b' --seed 3",
            ["--data-root", "/my images", "--seed", "3"],
        ),
        ("/tmp/kd-0-7/code/train_student.py --seed 3 --output='runs/a b'", ["--seed", "3"]),
        ("/tmp/kd-0-7/code/train_student.py --workers 2 --resume 'runs/a b'", ["--config", "runs/a b/config.json"]),
        ("/tmp/kd-0-7/code/train_student.py --resume='runs/a b'", ["--config", "runs/a b/config.json"]),
        (None, ["--config", "runs/a b/config.json"]),
    ],
)
def test_the_command_again_is_one_for_the_shell(command, words):
    """A job's copy of the script is gone, paths may have spaces, and the run that is repeated stays."""
    run = {"path": "runs/a b", "script": "train_student.py", "environment": {"command": command, "processes": 1}}
    again = report_page.repeat_command(run)
    assert shlex.split(again) == ["python", "train_student.py", *words, "--output", "runs/a b_again"]


def test_gallery_shows_images_on_which_the_students_differ(study):
    cwd, _, _, page = study
    gallery = re.search(r'<ul class="gallery">.*?</ul>', page, re.S).group()
    items = re.findall(
        r'<li><img alt="test image ([^"]+)" src="data:image/jpeg;base64,([^"]+)">.*?true: <b>(\w+)</b>.*?'
        r"without KD: (\w+)\s+(\d+) %.*?with KD: (\w+)\s+(\d+) %",
        gallery,
        re.S,
    )
    assert 2 <= len(items) <= 12
    with np.load(cwd / "runs/student_0/predictions_test.npz", allow_pickle=False) as arrays:
        ids, logits, labels = list(arrays["ids"]), arrays["logits"].astype(float), arrays["labels"]
    for sample, image, true, without, percent, with_kd, _ in items:
        row = ids.index(sample)
        p = np.exp(logits[row] - logits[row].max())
        assert (
            int(true) == labels[row]
            and int(without) == logits[row].argmax()
            and abs(int(percent) - 100 * p.max() / p.sum()) < 0.51
        )
        assert (without == true) != (with_kd == true)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))
        from sklearn.datasets import load_digits

        original = load_digits().images[int(re.search(r"\d+", sample).group())] / 16 * 255
        assert np.corrcoef(pixels.mean(2).ravel(), original.ravel())[0, 1] > 0.95


def test_what_cannot_be_used_is_named_and_never_mixed_in(study, tmp_path):
    """Predictions of other images, predictions that are not those of the results, none, a class name with markup; data
    that are gone."""
    shutil.copytree(study[0] / "runs", tmp_path / "runs")
    (tmp_path / "runs/distill_0/predictions_test.npz").unlink()
    with np.load(tmp_path / "runs/distill_1/predictions_test.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    np.savez(
        tmp_path / "runs/distill_1/predictions_test.npz", **{**found, "logits": np.roll(found["logits"], 1, axis=1)}
    )
    with np.load(tmp_path / "runs/student_0/predictions_test.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    np.savez(tmp_path / "runs/student_0/predictions_test.npz", **{**found, "ids": np.char.add(found["ids"], "x")})
    whole = (tmp_path / "runs/rkd_1/predictions_test.npz").read_bytes()
    (tmp_path / "runs/rkd_1/predictions_test.npz").write_bytes(whole[: len(whole) // 2])
    shutil.copytree(tmp_path / "runs/student_1", tmp_path / "runs/<b>bold $x_")
    done = succeed("report.py", "runs", "--output", "out", cwd=tmp_path)
    report, page = json.loads((tmp_path / "out/report.json").read_text()), (tmp_path / "out/report.html").read_text()
    named = "\n".join(report["missing"])
    assert (
        "calibration or gallery: runs/distill_0" in named and "distill_1/predictions_test.npz cannot be used" in named
    )
    assert (
        "student_0/predictions_test.npz cannot be used" in named
        and "test images" in named
        and "rkd_1/predictions_test.npz" in named
    )
    assert (
        all("sentence" not in group["evidence"] for group in report["groups"])
        and "missing: no predictions" in done.stdout
    )
    assert "<b>bold" not in page and "&lt;b&gt;bold $x_" in page


def test_what_differs_is_said(study, tmp_path):
    """Seeds that one kind lacks, a run that was resumed, one of two processes, speeds of two devices, a changed test
    set."""
    shutil.copytree(study[0] / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/rkd_1")
    shutil.rmtree(tmp_path / "runs/student_1")

    def change(run, **environment):
        file = tmp_path / "runs" / run / "results.json"
        results = json.loads(file.read_text())
        results["environment"].update(environment)
        if run.startswith("distill"):
            results["dataset"]["sha256"]["test"] = "0" * 64
        file.write_text(json.dumps(results))

    for run in ("teacher", "student_0"):
        file = tmp_path / "runs" / run / "results.json"
        file.write_text(file.read_text().replace(json.loads(file.read_text())["dataset"]["sha256"]["test"], "0" * 64))
    change("distill_0", command="distill.py --resume runs/distill_0", device="NVIDIA H200")
    change("distill_1", processes=2)
    done = succeed("report.py", "runs", cwd=tmp_path)
    report, page = (
        json.loads((tmp_path / "report/report.json").read_text()),
        (tmp_path / "report/report.html").read_text(),
    )
    (group,) = report["groups"]
    one = right(tmp_path, "distill_0").mean() - right(tmp_path, "student_0").mean()
    assert (
        f"<td>{100 * one:+.2f}</td>" in page
        and f"| {100 * one:+.2f} " in done.stdout
        and "On seed 0 alone" in group["evidence"]["sentence"]
    )
    assert "one seed</td>" in page or "within noise</td>" in page
    assert "python distill.py --config runs/distill_0/config.json --output runs/distill_0_again" in page
    assert "torchrun --nproc-per-node 2 " in page
    assert "different devices" in " ".join(group["notes"]) and "NVIDIA H200" in done.stdout
    assert "no gallery for digits: the test images that are here now are not those of the run" in done.stdout


def test_no_gallery_without_data_or_by_flag(study, tmp_path):
    shutil.copytree(study[0] / "runs", tmp_path / "runs")
    for file in (tmp_path / "runs").rglob("results.json"):
        results = json.loads(file.read_text())
        results["flags"].update(dataset="imagefolder", data_root="gone")
        file.write_text(json.dumps(results))
    flags = ["runs/student_1", "runs/distill_1", "--output", "out"]
    done = succeed("report.py", *flags, cwd=tmp_path)
    assert (
        "note: no gallery for digits: " in done.stdout
        and "gone" in done.stdout
        and '<ul class="gallery">' not in (tmp_path / "out/report.html").read_text()
    )
    assert "no gallery" not in succeed("report.py", *flags, "--gallery", 0, cwd=tmp_path).stdout
    assert run_script("report.py", *flags, "--gallery", -1, cwd=tmp_path).returncode == 2


BLINK = 101845102  # Chromium's annotation of what a page asks for, beside what the browser itself does


def browse(page, picture, dark):
    """A screenshot of a page; returns what its console said and the addresses that it fetched; no host is found."""
    log = picture.with_suffix(".json")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={picture}.profile",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--window-size=1100,2400",
            "--enable-logging=stderr",
            f"--log-net-log={log}",
            f"--screenshot={picture}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert picture.exists(), done.stderr
    asked = re.findall(rf'"traffic_annotation":{BLINK},"url":"([^"]+)"', log.read_text())
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], [
        url for url in asked if not url.startswith(("data:", "file:"))
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser(study, tmp_path):
    """Light and dark are drawn, the console is silent, nothing is fetched."""
    page = study[0] / "report/report.html"
    assert browse(page, tmp_path / "light.png", False) == browse(page, tmp_path / "dark.png", True) == ([], [])
    light, dark = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"), float) for name in ("light", "dark"))
    assert np.median(light) > 240 and np.median(dark) < 40
    assert len(np.unique(light)) > 50 and len(np.unique(dark)) > 50
    loud = tmp_path / "loud.html"  # both checks can fail
    loud.write_text(
        page.read_text().replace(
            "</body>", '<script>console.error("x")</script><img src="https://example.org/a.png"></body>'
        )
    )
    said, asked = browse(loud, tmp_path / "loud.png", False)
    assert len(said) == 1 and asked and set(asked) == {"https://example.org/a.png"}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_figures_and_tables_fit_the_window(study, tmp_path, width):
    """The page itself never scrolls sideways, what is wider scrolls within, and no figure is shrunk until its letters
    cannot be read."""
    inner = tmp_path / "page.html"
    inner.write_text((study[0] / "report/report.html").read_text().replace("<details>", "<details open>"))
    outer = tmp_path / "frame.html"  # a headless window is at least 500 px wide
    outer.write_text(f"""<iframe src="page.html" style="width: {width}px; height: 3000px; border: 0"></iframe><script>
        onload = () => {{
            const page = document.querySelector("iframe").contentDocument
            const figures = [...page.querySelectorAll("img.figure")]
            const shrunk = Math.min(...figures.map(f => f.clientWidth / f.naturalWidth))
            document.title = JSON.stringify([page.documentElement.scrollWidth, figures.length, shrunk]) }}</script>""")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path}/profile",
            "--window-size=1400,3200",
            "--dump-dom",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    wide, figures, shrunk = json.loads(re.search(r"<title>(.*)</title>", done.stdout)[1])
    assert wide <= width and figures > 10 and shrunk > 0.44
