"""A checkpoint's model as a file that needs nothing of this project, run again by the file's own runtime and compared.

    FILE.safetensors    weights under timm's names (or the model's own), for timm.create_model(...).load_state_dict(...)
    FILE.onnx           for onnxruntime; whole: uint8 images of any size in, probabilities out
    FILE.pt2            for torch.export.load

Beside each FILE.json says what goes in and what comes out, and README.md is a model card in the format of Hugging Face,
made from the run's results.json.  Needs data.py, loader.py, models.py, run.py and training.py of `common` (onnx,
onnxscript and onnxruntime for .onnx).
"""

import contextlib
import glob
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from common.data import logits_name, tasks_of
from common.loader import Loader
from common.models import build_model, one_line
from common.run import UserError, atomic_write, file_sha256, read_json, write_json
from common.training import Preprocess, load_model, task_metrics

KINDS = (".safetensors", ".onnx", ".pt2")
CALIBRATION = 256  # images of train, for --quantize
MARK = "<!-- model card by evaluate.py --export -->"  # a README.md with it may be replaced
TEXT_INPUTS = ("input_ids", "attention_mask")


# ---------------------------------------------------------------------------------------------------- what is exported


def plain_view(images: Tensor, resolution: int, crop_mode: str) -> Tensor:
    """The plain image of augment.py in operations that exporters know: uint8 (B, 3, H, W) -> (B, 3, R, R) in 0..1.

    Both axes are products with a triangle's weights, as wide as the image is shrunk (as torchvision's antialias=True).
    """
    down, across = (torch.ones_like(images[0, 0, :, 0]), torch.ones_like(images[0, 0, 0]))
    positions = [
        ones.float().cumsum(0) - 0.5 for ones in (down, across)
    ]  # of the pixels' centres, whatever their number
    sizes = torch.stack([at[-1] + 0.5 for at in positions])
    shown = sizes.min().expand(2) if crop_mode == "center" else sizes
    start = torch.floor((sizes - shown) / 2)
    weights = []
    for axis, at in enumerate(positions):
        scale = shown[axis] / resolution
        centre = start[axis] + (torch.arange(resolution, device=images.device) + 0.5)[:, None] * scale  # (R, 1)
        near = (1 - (at - centre).abs() / scale.clamp(min=1)).clamp(min=0)  # (R, H)
        near = near * ((at > start[axis]) & (at < start[axis] + shown[axis]))
        weights.append(near / near.sum(1, keepdim=True))
    return weights[0] @ (images.float() / 255) @ weights[1].mT


class Exported(nn.Module):
    """A model of tensors instead of dicts, in eval mode.

    whole False: image (B, 3, R, R), normalized, and input_ids, attention_mask (B, L) of a model that reads texts ->
    a tuple of its `outputs`.  whole True: image (B, 3, H, W) uint8, and probabilities come out.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, outputs: list[str], whole: bool):
        super().__init__()
        self.model, self.outputs, self.whole = model.eval(), outputs, whole
        self.resolution, self.crop_mode = preprocess.resolution, preprocess.crop_mode
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocess, name)).view(3, 1, 1), persistent=False)

    def forward(self, image, input_ids=None, attention_mask=None):
        if self.whole:
            image = (plain_view(image, self.resolution, self.crop_mode) - self.mean) / self.std
        out = self.model({"image": image, "input_ids": input_ids, "attention_mask": attention_mask})
        values = [out[name] for name in self.outputs]
        return tuple(value.softmax(1) for value in values) if self.whole else tuple(values)


def output_names(classes: list | dict) -> list[str]:
    """The model outputs of an export: its logits, or the embedding of a model that was trained without labels."""
    return [logits_name(task) for task in tasks_of(classes)] if classes else ["embedding"]


# ------------------------------------------------------------------------------------------------------------- writers


def write_safetensors(path: str, model: nn.Module, described: dict) -> None:
    """The backbone's weights under its own names (of a model of images and texts all), `described` in the metadata."""
    from safetensors.torch import save

    weights = {name: value.detach().clone().contiguous() for name, value in _bare(model).state_dict().items()}
    with open(path, "wb") as file:  # their save_file lets nobody else read it
        file.write(save(weights, metadata={"format": "pt", "description": json.dumps(described)}))


def _bare(model):
    return getattr(model, "backbone", model)


def _dimensions(module, example):
    """Those of each input that may change: batch, sides of whole images, tokens."""
    from torch.export import Dim

    batch = Dim("batch", min=1, max=4096)
    sides = {2: Dim("height", min=1, max=16384), 3: Dim("width", min=1, max=16384)} if module.whole else {}
    dimensions = {"image": {0: batch, **sides}}
    if len(example) > 1:
        length = Dim("length", min=3, max=max(3, module.model.max_length))  # of 1 and 2 a constant is made
        dimensions.update({name: {0: batch, 1: length} for name in TEXT_INPUTS})
    return dimensions


def write_graph(path: str, module: Exported, example: tuple, described: dict) -> None:
    """.pt2 or .onnx of a module; example: its inputs.  Raises what the exporter raises."""
    dimensions = _dimensions(module, example)
    with torch.no_grad():
        if path.endswith(".pt2"):
            program = torch.export.export(module, example, dynamic_shapes=dimensions, strict=False)
            return torch.export.save(program, path, extra_files={"description.json": json.dumps(described)})
        torch.onnx.export(
            module,
            example,
            path,
            dynamo=True,
            external_data=False,
            input_names=list(dimensions),
            output_names=described["outputs"],
            dynamic_shapes=dimensions,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet():
    """Exporters warn of what the comparison afterwards would show."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------------ runtimes


def open_export(path: str, checkpoint: dict) -> Callable[..., list[np.ndarray]]:
    """run(image, input_ids, attention_mask) -> outputs, by the runtime of the file: numpy arrays in and out."""
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        return lambda *inputs: session.run(None, dict(zip(names, inputs)))
    if path.endswith(".pt2"):
        module = torch.export.load(path).module()
    else:
        module = _rebuilt(path, checkpoint)

    def run(*inputs):
        with torch.no_grad():
            return [value.numpy() for value in module(*map(torch.from_numpy, inputs))]

    return run


def _rebuilt(path, checkpoint):
    """The weights in a new model: timm's own where it is one, else one of this project."""
    from safetensors.torch import load_file

    arguments, classes, weights = timm_arguments(checkpoint), checkpoint["classes"], load_file(path)
    model, preprocess = load_model(checkpoint)
    if arguments and classes:
        import timm

        bare = timm.create_model(**arguments).eval()
        bare.load_state_dict(weights)
        return lambda image: tuple(model.heads(bare(image)).values())
    for value in _bare(model).state_dict().values():
        value.zero_()  # what counts is the file
    _bare(model).load_state_dict(weights)
    return Exported(model, preprocess, output_names(classes), False)


def timm_arguments(checkpoint: dict) -> dict | None:
    """The arguments of timm.create_model that rebuild an image model, or None where it is not one of timm's."""
    arguments = checkpoint["model_args"]
    if checkpoint["kind"] != "image" or ".py:" in arguments["name"] or arguments["name"].startswith("hf:"):
        return None
    return getattr(build_model(**arguments).backbone, "timm_arguments", None)


# ---------------------------------------------------------------------------------------------------------- comparison


def batches_of(loader: Loader, preprocess: Preprocess, whole: bool):
    """(inputs of the export as numpy, batch, number of images that count) of a loader's plain images."""
    for batch in loader.batches(plan=preprocess.plain_view.plan):
        plain = preprocess.plain(batch)
        texts = [plain[name].numpy() for name in TEXT_INPUTS if name in plain]
        if not whole:
            yield [np.ascontiguousarray(plain["image"].numpy()), *texts], plain, batch["valid"]
            continue
        sizes = batch["size"][: batch["valid"]]
        together = len(sizes) if (sizes == sizes[0]).all() else 1  # unequal images go in one by one
        for first in range(0, len(sizes), together):
            height, width = sizes[first].tolist()
            rows = slice(first, first + together)
            image = batch["image"][rows, :, :height, :width].contiguous().numpy()
            part = {name: value[rows] for name, value in plain.items()}
            yield [image, *(text[rows] for text in texts)], part, len(image)


def compare(
    run: Callable, model: nn.Module, preprocess: Preprocess, loader: Loader, outputs: list, whole: bool
) -> dict:
    """{"difference": the largest of any output, "ours", "theirs": {output: (N, C)}} on a loader's images."""
    ours, theirs = [], []
    with torch.no_grad():
        for inputs, plain, count in batches_of(loader, preprocess, whole):
            out = model(plain)
            values = [out[name].softmax(1) if whole else out[name] for name in outputs]
            ours.append([value[:count].numpy() for value in values])
            theirs.append([value[:count] for value in run(*inputs)])
    ours, theirs = (dict(zip(outputs, map(np.concatenate, zip(*parts)))) for parts in (ours, theirs))
    difference = max(float(np.abs(ours[name] - theirs[name]).max()) for name in outputs)
    return {"difference": difference, "ours": ours, "theirs": theirs}


def scores_of(values: dict, loader: Loader, classes: list | dict, positive: dict | None, whole: bool) -> dict:
    """Metrics of exported outputs; {} without classes."""
    if not classes:
        return {}
    if whole:  # probabilities
        values = {name: np.log(value.clip(min=1e-30)) for name, value in values.items()}
    logits = {task: values[logits_name(task)] for task in tasks_of(classes)}
    return task_metrics(logits, loader.dataset.targets, positive=positive)


def latency(run: Callable, inputs: list, repeats: int = 30) -> float:
    """Median milliseconds of one image."""
    one, times = [value[:1] for value in inputs], []
    for _ in range(repeats):
        start = time.perf_counter()
        run(*one)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def quantize(path: str, target: str, loader: Loader, preprocess: Preprocess, whole: bool) -> None:
    """Write the int8 form of an .onnx file: weights by channel, activations calibrated on images of a loader."""
    from onnxruntime import quantization

    def examples():
        seen = 0
        for inputs, _, count in batches_of(loader, preprocess, whole):
            yield dict(zip(("image", *TEXT_INPUTS), inputs))
            seen += count
            if seen >= CALIBRATION:
                return

    class Reader(quantization.CalibrationDataReader):
        rows = examples()

        def get_next(self):
            return next(self.rows, None)

    quantization.quantize_static(path, target, Reader(), per_channel=True)


# ---------------------------------------------------------------------------------------------------------------- card


def model_card(described: dict, results: dict, exports: list[dict]) -> str:
    """README.md in the format of Hugging Face: what results.json of the run says, and nothing else.

    exports: what their FILE.json say, of all exports of the checkpoint that lie there.
    """
    licence = described["data_licence"]
    scores, intervals = results.get("test") or results.get("val") or {}, results.get("intervals") or {}
    split = "test" if results.get("test") else "val"
    spread, dataset = intervals.get(split) or {}, results.get("dataset") or {}
    front = {"library_name": "timm" if described["timm"] else "pytorch", "pipeline_tag": "image-classification"}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "---", MARK, f"# {described['name']}", ""]
    teacher = results.get("teacher") or {}
    taught = f", distilled by `{results.get('method')}` from {teacher.get('name')}" if teacher else ", supervised"
    lines += [f"{described['parameters']:,} parameters, {described['preprocessing']['resolution']} px{taught}.", ""]
    lines += ["## Data", ""] + [f"- {key}: {value}" for key, value in dataset.items() if not isinstance(value, dict)]
    lines += [f"- licence of the data: {licence or 'not given'}", "", "## Classes", ""]
    for task, names in tasks_of(described["classes"]).items() if described["classes"] else ():
        lines.append(f"- {task}: {', '.join(names)}")
    lines += ["", f"## Metrics on {split}", "", "| metric | value | 95 % interval over images |", "|---|---|---|"]
    for name, value in scores.items():
        if isinstance(value, float):
            low_high = " to ".join(f"{v:.4f}" for v in spread[name]) if spread.get(name) else ""
            lines.append(f"| {name} | {value:.4f} | {low_high} |")
    lines += [
        "",
        "## Limits",
        "",
        "The figures hold for images like those of the data named above, no others were judged.",
    ]
    lines += ["", "## Files", ""]
    for export in exports:
        names = " and ".join(f"`{name}`" for name in (export["file"], export.get("quantized")) if name)
        ends = f"inputs {', '.join(export['inputs'])}; outputs {', '.join(export['outputs'])}"
        lines.append(f"- {names}: {ends}; normalization and sides in `{export['file']}.json`.")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------------- export


def check_export(path: str, with_preprocessing: bool, quantized: str | None, overwrite: bool) -> None:
    """Refuse what cannot be written.  Raises UserError."""
    kind = os.path.splitext(path)[1]
    if kind not in KINDS:
        raise UserError(f"--export {path}: name a file that ends in {', '.join(KINDS)}")
    for flag, given in (("--with-preprocessing", with_preprocessing), ("--quantize", quantized)):
        if given and (kind == ".safetensors" or flag == "--quantize" and kind != ".onnx"):
            raise UserError(f"{flag} cannot be combined with --export {path}: {kind} holds {_holds(kind)}")
    if kind == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            try:
                __import__(package)
            except ImportError:
                raise UserError(f"--export {path} needs the package {package}: pip install {package}") from None
    folder = os.path.dirname(os.path.abspath(path))
    for file in (path, quantized_path(path, quantized)) if quantized else (path,):
        if os.path.exists(file) and not overwrite:
            raise UserError(f"{file} is there: --overwrite replaces it, --export names another file")
    card = os.path.join(folder, "README.md")
    if os.path.exists(card) and MARK not in open(card, encoding="utf-8", errors="replace").read():
        raise UserError(f"--export {path}: {card} is not a model card of an export, name a file in another folder")


def quantized_path(path: str, quantized: str) -> str:
    """model.onnx -> model.int8.onnx"""
    return f"{os.path.splitext(path)[0]}.{quantized}.onnx"


def _holds(kind):
    return "weights alone" if kind == ".safetensors" else "float32 values alone"


def export(
    path: str,
    checkpoint: dict,
    source: str,
    test,
    train,
    *,
    batch_size: int,
    with_preprocessing: bool = False,
    quantize_to: str | None = None,
    positive: dict | None = None,
    licence: str | None = None,
) -> list[str]:
    """Write a checkpoint's model to `path`, the files beside it, and compare; returns lines that say how it went.

    source: the checkpoint's file, beside which results.json lies; test: dataset on which is compared; train: that of
    the calibration.  Raises UserError where the model cannot be exported.
    """
    model, preprocess = load_model(checkpoint, path=source)
    preprocess.prepare(test)
    outputs = output_names(checkpoint["classes"])
    loader = Loader(test, batch_size, "cpu")
    module, whole = Exported(model, preprocess, outputs, with_preprocessing), with_preprocessing
    inputs = next(batches_of(loader, preprocess, whole))[0]
    described = description(path, checkpoint, source, model, preprocess, outputs, inputs, whole)
    example = tuple(torch.from_numpy(np.repeat(value[:1], 2, 0)) for value in inputs)  # of one image a constant is made
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as beside:  # renamed when it is whole
        part = os.path.join(beside, os.path.basename(path))
        try:
            if path.endswith(".safetensors"):
                write_safetensors(part, model, described)
            else:
                with _quiet():
                    write_graph(part, module, example, described)
        except Exception as error:  # each exporter complains in its own way
            raise UserError(f"{model.name} cannot be exported to {path}: {one_line(error)}") from None
        os.replace(part, path)
    lines = [report_line(path, model, preprocess, loader, inputs, described, checkpoint, positive)]
    if quantize_to:
        small = quantized_path(path, quantize_to)
        preprocess.prepare(train)
        with atomic_write(small) as temporary, _quiet():
            quantize(path, temporary, Loader(train, min(batch_size, 32), "cpu"), preprocess, whole)
        lines.append(report_line(small, model, preprocess, loader, inputs, described, checkpoint, positive))
        described["quantized"] = os.path.basename(small)
    write_beside(path, described, source, model, licence)
    return [*lines, f"{path}.json, {os.path.join(os.path.dirname(path), 'README.md')}"]


def description(path, checkpoint, source, model, preprocess, outputs, inputs, whole) -> dict:
    """What FILE.json says."""
    names = ["image", *TEXT_INPUTS][: len(inputs)]
    image = "uint8 (B, 3, H, W), RGB" if whole else f"float32 (B, 3, {preprocess.resolution}, {preprocess.resolution})"
    shapes = {"image": image, **{name: "int64 (B, L)" for name in names[1:]}}
    return {
        "file": os.path.basename(path),
        "name": model.name,
        "timm": timm_arguments(checkpoint),
        "parameters": model.num_parameters,
        "classes": checkpoint["classes"],
        "preprocessing": {**preprocess.to_dict(), "inside": whole, "pixels": "0 to 1, then (x - mean) / std"},
        "inputs": [f"{name}: {shapes[name]}" for name in names],
        "outputs": [("probabilities" + name.removeprefix("logits") if whole else name) for name in outputs],
        "checkpoint_sha256": file_sha256(source),
    }


def report_line(path, model, preprocess, loader, inputs, described, checkpoint, positive) -> str:
    """Run an export by its own runtime on the loader's images and say how far it is from the checkpoint."""
    whole, outputs, classes = (
        described["preprocessing"]["inside"],
        output_names(checkpoint["classes"]),
        checkpoint["classes"],
    )
    run = open_export(path, checkpoint)
    found = compare(run, model, preprocess, loader, outputs, whole)
    ours, theirs = (scores_of(found[side], loader, classes, positive, whole) for side in ("ours", "theirs"))
    metrics = "".join(
        f", {name} {theirs[name]:.4f} (checkpoint {ours[name]:.4f})"
        for name in ("accuracy", "balanced_accuracy", "auc")
        if theirs.get(name) is not None
    )
    what = "probabilities" if whole and classes else outputs[0].partition("_")[0]
    size, ms = os.path.getsize(path) / 1e6, latency(run, inputs)
    difference = f"largest difference of {what} {found['difference']:.2g}"
    return f"{path}: {size:.2f} MB, {ms:.2f} ms an image; {len(loader.dataset):,} images: {difference}{metrics}"


def write_beside(path: str, described: dict, source: str, model: nn.Module, licence: str | None) -> None:
    """FILE.json, README.md and, of a model that reads texts, its tokenizer's files in FILE.tokenizer."""
    folder = glob.escape(os.path.dirname(path) or ".")
    files = [file for kind in KINDS for file in sorted(glob.glob(f"{folder}/*{kind}.json")) if file != path + ".json"]
    others = [one for one in map(read_json, files) if one.get("checkpoint_sha256") == described["checkpoint_sha256"]]
    known = (licence, *(one.get("data_licence") for one in others))
    described["data_licence"] = next(filter(None, known), None)
    write_json(path + ".json", described)
    results = os.path.join(os.path.dirname(source), "results.json")
    card = model_card(described, read_json(results) if os.path.exists(results) else {}, [described, *others])
    with atomic_write(os.path.join(os.path.dirname(path), "README.md")) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(card)
    files = getattr(getattr(model, "text", None), "files", None)
    if files:
        shutil.rmtree(path + ".tokenizer", ignore_errors=True)
        os.makedirs(path + ".tokenizer")
        for name, text in files.items():
            with open(os.path.join(path + ".tokenizer", name), "w", encoding="utf-8") as file:
                file.write(text)
