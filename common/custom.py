"""Your own model and data: `--model FILE.py:FUNCTION` and `--dataset FILE.py:FUNCTION`.

A model: the function is called with the number of classes and returns an nn.Module that takes images (B, 3, H, W) and
gives logits (B, C), see CustomModel.

A dataset: the function is called with --data-root and returns {"train": samples, "val": samples, "test": samples}.
What is missing is split off train: val as --val-split says, test as a fixed fifth.  Samples are a sequence of (image,
label), as torchvision's datasets are:

    image   a file's path, a Pillow image, or an array (H, W) or (H, W, 3) of uint8
    label   an int from 0, or a class name

and may have attributes:

    targets   the N labels, so that no image is read to learn them
    classes   the class names in order, of train; by default the names in train, or "0", "1", ... for ints
    groups    N patients or lesions, none of which is in two splits

Needs models.py of `common` and torch; a dataset needs augment.py, data.py and run.py too, numpy and pillow.
"""

import importlib.util
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from common.models import ImageModel, Keep, ModelError, one_line


def import_function(source: str) -> Callable:
    """The function of "FILE.py:FUNCTION"; the file's folder can be imported from.  Raises ModelError."""
    path, _, name = os.path.abspath(source).rpartition(":")
    if not os.path.isfile(path):
        raise ModelError(f"{source} needs the file {path}, which does not exist")
    folder, module_name = os.path.dirname(path), re.sub(r"\W", "_", path)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"{path} cannot be imported: {_what_failed(error, path)}") from None
    if not callable(getattr(module, name, None)):
        defined = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        raise ModelError(f"{path} has no function {name!r}; it has {', '.join(defined) or 'none'}")
    return getattr(module, name)


def _what_failed(error, source):
    """What was raised, in one line, with the last line of this source's file that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if source.startswith(frame.filename)]
    line = f" (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{line}"


# --------------------------------------------------------------------------------------------------------------- model


class _WithoutEmbedding(dict):
    """The outputs of a model that has no embedding: asking for it says why."""

    def __missing__(self, key):
        raise ModelError(
            f"{self.model} has no {key}: the embedding is the input (B, D) of the last nn.Linear, so end the module "
            "with one, or choose what needs logits or features alone"
        )


class CustomModel(ImageModel):
    """A module of your own: images (B, 3, H, W) -> logits (B, C), behind the contract of ImageModel.

    The embedding is the input (B, D) of the nn.Linear that is called last, kept by a hook; a module without one has
    none.  With num_classes 0 that layer is taken off.  Features come from any module path, by hooks.  It has neither
    tokens nor pooling to choose.
    """

    def __init__(self, backbone: nn.Module, build_args: dict):
        super().__init__(backbone, build_args)
        self.head = self._last_linear()  # its module path, or None
        if self.head is None:
            return
        if not build_args["num_classes"]:
            parent, _, leaf = self.head.rpartition(".")
            setattr(backbone.get_submodule(parent), leaf, nn.Identity())
        backbone.get_submodule(self.head).register_forward_pre_hook(Keep(self._kept, ""))

    def _last_linear(self):
        """Check the logits of two black images; the path of the nn.Linear called last if it takes (B, D), or None."""
        called, side, classes = {}, self._side, self.build_args["num_classes"]
        linears = [(name, module) for name, module in self.backbone.named_modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_pre_hook(Keep(called, name)) for name, module in linears]
        try:
            with torch.no_grad():
                logits = self.backbone.eval()(self.example()["image"])
        except Exception as error:
            problem = _what_failed(error, self.build_args["name"])
            raise ModelError(f"{self.name} cannot take {side} px: {problem}") from None
        finally:
            self.backbone.train()
            for hook in hooks:
                hook.remove()
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if classes and shape != (2, classes):
            raise ModelError(f"{self.name} must give logits (B, C), for 2 images (2, {classes}), but gives {shape}")
        last = next(reversed(called), None)
        return last if last is not None and called[last].dim() == 2 else None

    def forward(self, batch: dict) -> dict:
        if self.with_tokens:
            raise ModelError(f"{self.name} has no tokens: only models of timm and Hugging Face have")
        logits, out = self.backbone(batch["image"]), {}
        if self.build_args["num_classes"]:
            out.update(self.heads(logits))
        if self.feature_layers:
            out["features"] = self._hooked_features()
        if self.head is not None:
            out["embedding"] = self._kept.pop("")  # (B, D)
        else:
            out = _WithoutEmbedding(out)
            out.model = self.name
        return out

    def set_pooling(self, pooling: str | None):
        if pooling:
            raise ModelError(f"--pooling {pooling}: the embedding of {self.name} is the input of its last nn.Linear")
        super().set_pooling(pooling)

    def _listed_layers(self):
        return []

    @property
    def classifiers(self) -> list[nn.Module]:
        if self.head is None:
            raise ModelError(f"{self.name} has no nn.Linear as its head: --dropout and --freeze-backbone need one")
        return [self.backbone.get_submodule(self.head)]

    @property
    def head_names(self) -> tuple[str, ...]:
        return () if self.head is None else (self.head,)

    @property
    def name(self) -> str:
        return self.build_args["name"].split(os.sep)[-1]  # my.py:function


def build_custom(build_args: dict, pretrained: bool) -> CustomModel:
    """build_model for FILE.py:FUNCTION; build_args: its name, num_classes and img_size, of which the name becomes a
    full path; pretrained: the function has loaded weights.  Raises ModelError."""
    source = build_args["name"] = os.path.abspath(build_args["name"])
    classes = build_args["num_classes"] or 1
    function = import_function(source)
    try:
        backbone = function(classes)
    except Exception as error:
        raise ModelError(f"{source}, called with {classes} classes: {_what_failed(error, source)}") from None
    if not isinstance(backbone, nn.Module) or not any(True for _ in backbone.parameters()):
        raise ModelError(f"{source} must return an nn.Module with parameters, but returns a {type(backbone).__name__}")
    model = CustomModel(backbone, build_args)
    if pretrained:  # by the function
        model.take_pretrained(build_args["num_classes"], True)
    return model


# ------------------------------------------------------------------------------------------------------------- dataset


class SampleImage(NamedTuple):
    """In the place of a file's path: the image of a sample (image, label)."""

    samples: Any
    row: int
    name: str

    def __str__(self):
        return self.name

    def image(self) -> Image.Image:
        content = self.samples[self.row][0]
        if isinstance(content, Image.Image):
            return content.copy()  # who asks for it closes it
        return Image.open(content) if isinstance(content, (str, os.PathLike)) else Image.fromarray(np.asarray(content))


def read_function(name: str, root: str | None, decode_size: int = 512, window: list | None = None) -> tuple[dict, list]:
    """({split: ImageDataset}, class names) of FILE.py:FUNCTION; see the head of this file.

    A sample's id is its split and row.  Raises DataError, ModelError.
    """
    from common.data import SPLITS, DataError, ImageDataset  # not for a model

    function = import_function(name)
    try:
        splits = function(root)
    except Exception as error:  # the user's code
        raise DataError(f"{name}, called with {root!r}: {_what_failed(error, os.path.abspath(name))}") from None
    if not isinstance(splits, dict) or "train" not in splits or set(splits) - set(SPLITS):
        got = f"a dict of {', '.join(map(repr, splits))}" if isinstance(splits, dict) else type(splits).__name__
        raise DataError(f"{name} must return a dict of train, val and test (train at least), not {got}")
    splits = {split: splits[split] for split in SPLITS if split in splits}
    labels = {split: _labels(name, split, samples) for split, samples in splits.items()}
    groups = _groups(name, splits)
    classes = _class_names(name, splits["train"], labels["train"])
    number_of, parts = {c: i for i, c in enumerate(classes)}, {}
    for split, samples in splits.items():
        numbers = [number_of.get(label, -1) if isinstance(label, str) else label for label in labels[split]]
        for row, number in enumerate(numbers):
            if not 0 <= number < len(classes):
                known = ", ".join(classes[:10])
                raise DataError(f"{name}: {split}[{row}] has the label {labels[split][row]!r}; the classes are {known}")
        ids = [f"{split}/{row:06d}" for row in range(len(numbers))]
        images = [SampleImage(samples, row, f"{name} {split}[{row}]") for row in range(len(numbers))]
        options = {"decode_size": decode_size, "window": window, "groups": groups[split]}
        parts[split] = ImageDataset(ids, numbers, paths=images, **options)
    return parts, classes


def _labels(name, split, samples):
    """N labels, ints or strings."""
    from common.data import DataError

    try:
        targets = getattr(samples, "targets", None)
        labels = [samples[row][1] for row in range(len(samples))] if targets is None else list(targets)
        if not labels or len(labels) != len(samples):
            raise ValueError(f"it has {len(samples)} samples and {len(labels)} labels")
        return [str(label) if isinstance(label, str) else operator.index(label) for label in labels]
    except Exception as error:  # the user's code and data
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{name}: {split} is not a sequence of (image, label) ({problem})") from None


def _class_names(name, train, labels):
    """The class names in order."""
    from common.data import DataError, sorted_classes

    classes = getattr(train, "classes", None)
    if classes is not None:
        classes = list(map(str, classes))
        if len(set(classes)) < len(classes):
            raise DataError(f"{name}: the classes of train have one name twice: {', '.join(classes[:10])}")
        return classes
    if len({type(label) for label in labels}) > 1:
        raise DataError(f"{name}: the labels of train are ints and class names: write them in one way")
    return sorted_classes(name, labels) if isinstance(labels[0], str) else [str(c) for c in range(max(labels) + 1)]


def _groups(name, splits):
    """{split: N strings}, or None for each where no split has groups."""
    from common.data import DataError

    groups = {split: getattr(samples, "groups", None) for split, samples in splits.items()}
    lacking = [split for split, names in groups.items() if names is None]
    if len(lacking) == len(groups):
        return groups
    if lacking:
        raise DataError(f"{name}: {lacking[0]} has no groups, other splits have: give them to all or to none")
    for split, names in groups.items():
        if len(names) != len(splits[split]):
            raise DataError(f"{name}: {split} has {len(splits[split])} samples and {len(names)} groups")
    return {split: list(map(str, names)) for split, names in groups.items()}
