"""Foreign weights: a state dict from anywhere into a model, strictly.  Needs models.py of `common` and torch.

load_weights(model, torch.load("dino.pth", weights_only=True), "dino.pth")     # for --weights, --teacher-weights
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator

import torch

from common.models import ImageModel, ModelError, one_line

# where a file holds several state dicts that fit, the first of these is taken: averages before what they average
PREFERRED = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict", "teacher")


def load_weights(model: ImageModel, state: dict, source: str) -> str:
    """Load a foreign state dict into the backbone, strictly; a head of another number of classes is made anew.

    state: {name: tensor}, or a dict that holds such dicts; all names of the backbone may have a prefix ("module.",
    "teacher.backbone."), and what lies outside it is left out.  source: for messages.  Returns in words what
    was taken.  Raises ModelError.
    """
    candidates = sorted(_state_dicts(state), key=lambda candidate: _preference(candidate[0]))
    fits = [
        (path, tensors, prefix, *_fit(model, tensors, prefix))
        for path, tensors in candidates
        for prefix in _prefixes(tensors, next(iter(model.backbone.state_dict())))
    ]
    fitting = [fit for fit in fits if not fit[-1]]
    if not fitting:
        keys = f"its keys: {_few(state)}" if isinstance(state, dict) else f"it is a {type(state).__name__}"
        text = "holds no state dict of tensors"
        if fits:
            _, tensors, *_, wrong = min(fits, key=lambda fit: len(fit[-1]))
            begin = _few(re.match(r"(\w+\.){0,2}", name)[0] or name for name in tensors)
            text = f"does not fit {model.name}: {wrong[0]} (differences: {len(wrong)}); its names begin with {begin}"
        raise ModelError(f"{source} {text}; {keys}")
    path, tensors, prefix, part, known, kept, _ = fitting[0]
    alike = [f"{fit[2]}*" for fit in fitting if fit[0] == path and fit[2]]
    if len(alike) > 1:
        raise ModelError(f"{source} has several parts that fit {model.name}, {_few(alike)}: save the one that is meant")
    model.backbone.load_state_dict(part, strict=True)
    model.take_pretrained(known, kept)
    others = _few(fit[0] for fit in fitting if fit[0] != path)
    outside = (name.split(".")[: prefix.count(".")] for name in tensors if not name.startswith(prefix))
    left = _few(".".join(parts) + ".*" for parts in outside)
    taken = path + (others and f", not {others}"), prefix and f"{prefix}*", left and f"left out: {left}"
    return f"{source} ({'; '.join(filter(None, taken))})" if any(taken) else source


def _few(names: Iterable) -> str:
    return ", ".join(dict.fromkeys(map(str, names)))[:200]


def _preference(path: str) -> int:
    """Where the state dict at this path of keys stands among those that fit."""
    return min((PREFERRED.index(key) for key in path.split(".") if key in PREFERRED), default=len(PREFERRED))


def _state_dicts(state: dict, path: str = "") -> Iterator[tuple[str, dict]]:
    """(its keys, joined by dots; {name: tensor}) of each state dict in nested dicts."""
    if isinstance(state, dict) and state:
        if all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
            yield path, state
        else:
            for key, value in state.items():
                yield from _state_dicts(value, f"{path}.{key}" if path else str(key))


def _prefixes(names: Iterable[str], first: str) -> dict:
    """What may stand before the backbone's names: what stands before its first one, and, for a file that lacks that
    one or has older names, which timm converts, what all names begin with, or nothing."""
    before = [name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")]
    shared = os.path.commonprefix(list(names))
    return dict.fromkeys([*before, shared[: shared.rfind(".") + 1], ""])


def _fit(model, tensors, prefix):
    """(state dict for the backbone, classes of the file's head, whether it is kept, [what does not fit])."""
    expected = model.backbone.state_dict()
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not any(re.match(r"blocks\.\d+\.\d+\.", name) for name in expected):  # DINOv2 saves its blocks in chunks
        state = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name): value for name, value in state.items()}
    convert = getattr(sys.modules.get(type(model.backbone).__module__), "checkpoint_filter_fn", None)
    if convert:  # timm's own, as for hub weights: resizes positions to the image's grid, knows older names
        try:
            state = convert(state, model.backbone)
        except Exception as error:  # meant for weights of this model, so anything goes for others
            return None, 0, False, [one_line(error)] * len(expected)
    heads = tuple(f"{name}." for name in model.head_names)
    head = [name for name in expected if name.startswith(heads)]
    kept = all(name in state and state[name].shape == expected[name].shape for name in head)
    known = next((len(state[name]) for name in head if name.endswith("weight") and name in state), 0)
    if not heads:  # a module of the user's own, whose logits come from anywhere
        known = model.build_args["num_classes"]
    if not kept or not head:  # a label-free model leaves out the file's head
        state = {name: value for name, value in state.items() if not name.startswith(heads)}
        state.update({name: expected[name] for name in head})
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    state = {**counters, **state}  # older files have none
    file_shapes, model_shapes = ({n: tuple(value.shape) for n, value in part.items()} for part in (state, expected))
    wrong = [
        f"{name} is {file_shapes.get(name, 'missing')} in it, {model_shapes.get(name, 'missing')} in the model"
        for name in {**model_shapes, **file_shapes}
        if file_shapes.get(name) != model_shapes.get(name)
    ]
    return state, known, kept, wrong
