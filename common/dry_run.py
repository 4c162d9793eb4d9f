"""--dry-run: what a training script would read, build, take and write, printed before the run folder is made.

    dry_run.show(recorder, splits, [train, val], preprocess)

Needs data.py, models.py, run.py and training.py of `common`, torch and numpy.  MB are 2^20 bytes, as in results.json.
"""

import copy

import numpy as np
import torch

from common.data import TASK, Splits, tasks_of
from common.models import multiply_adds
from common.run import Recorder, barrier, device_name, load_checkpoint, rank, world_size
from common.training import Preprocess

MOST_CLASSES = 20  # a table lists no more
PROBED = (2, 4)  # images of the forward passes from which the activations are extrapolated


def show(
    recorder: Recorder,
    splits: Splits,
    loaders: list,
    preprocess: Preprocess,
    weights_from: str | None = None,
    save_samples: str | None = None,
    *,
    source=None,
    views: list | None = None,
) -> None:
    """Print all of it, from one process; nothing is trained or written.

    loaders: of train, of val and any others that cache images; weights_from: where the model's weights come from, or
    None; source: teacher.Source of a distillation; views: [(side in pixels, views of an image a step)], by default one
    at the model's resolution.  Raises UserError where the checkpoint that is resumed is damaged.
    """
    updater, run, criterion = recorder.updater, recorder.run, recorder.criterion
    model = copy.copy(updater.model)  # a copy shares the weights but is not compiled, which takes minutes
    done = load_checkpoint(run.path("latest.pth"))["epoch"] - 1 if run.resume else 0
    if rank() == 0:
        lines = ["dry run: nothing is trained or written"]
        lines += about_data(splits, preprocess.resolution) + [""]
        lines += about_models(model, preprocess.resolution, source, criterion, weights_from)
        lines += [described("normalization", preprocess), ""]
        lines += about_steps(loaders[0], recorder.epochs, done if run.resume else None) + [""]
        lines += about_memory(model, updater, loaders, source, criterion, views or [(preprocess.resolution, 1)]) + [""]
        lines += about_files(recorder, splits, done, save_samples)
        print("\n".join(lines), flush=True)
    barrier()  # rank 0 keeps the others' meeting place


# --------------------------------------------------------------------------------------------------------------- lines


def aligned(rows):
    """Rows of cells -> lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return [
        "  ".join(
            [row[0].ljust(max(24, widths[0])), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        ).rstrip()
        for row in rows
    ]


def described(label, text):
    return f"{label:24}  {text}"


def megabytes(count):
    return f"{count / 2**20:,.1f} MB"


def about_data(splits, resolution):
    """The images of each split, and those of each class: the most frequent of train where there are many classes."""
    parts = splits.parts
    rows = [["split", *parts], ["images", *(f"{len(part):,}" for part in parts.values())]]
    for task, names in tasks_of(splits.classes).items():
        counts = [
            np.bincount(part.targets[task][part.targets[task] >= 0], minlength=len(names)) for part in parts.values()
        ]
        shown = sorted(np.argsort(-counts[0], kind="stable")[:MOST_CLASSES])
        rows += [[f"{'' if task == TASK else task + ': '}{names[c]}", *(f"{of[c]:,}" for of in counts)] for c in shown]
        if len(names) > len(shown):
            rows.append([f"and {len(names) - len(shown)} more{'' if task == TASK else ' of ' + task}"])
    unlabelled = [] if splits.classes else ["no labels"]
    return [
        described("dataset", f"{splits.name} ({splits.domain})"),
        described("resolution", f"{resolution} px"),
        *aligned(rows),
        *unlabelled,
    ]


def about_models(model, resolution, source, criterion, weights_from):
    """Name and size of the model, and of what teaches it: a model, or a store, which knows its teacher's parameters
    alone."""
    columns = {"model" if source is None else "student": model_cells(model, resolution)}
    notes = [described("start", weights_from)] if weights_from else []
    for suffix, one in source.teachers.items() if source is not None else ():
        name, about = f"teacher{suffix.replace('_', ' ')}", one.described
        if one.model:
            columns[name] = model_cells(copy.copy(one.model[0]), one.resolution)
        else:
            columns[f"{name} (stored)"] = [about["name"], f"{about['parameters']:,}", "0", "0", ""]
            notes.append(described("store", about["embeddings"]))
    if source is not None:
        notes.append("the teacher is not judged on val in a dry run")
    names = ["name", "parameters", "of them trained", "multiply-adds an image", "checkpoint weights"]
    rows = [["", *columns], *([name, *cells] for name, cells in zip(names, zip(*columns.values())))]
    if trained_bytes(criterion):
        rows.append(["projectors, parameters", f"{trained_bytes(criterion) // 4:,}"])
    return aligned(rows) + notes


def model_cells(model, resolution):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [
        model.name,
        f"{model.num_parameters:,}",
        f"{trained:,}",
        f"{multiply_adds(model, resolution):,}",
        megabytes(state_bytes(model)),
    ]


def about_steps(train, epochs, done=None):
    """Steps and images; done: epochs of the run that is resumed, or None."""
    figures = {
        "steps an epoch": len(train),
        "epochs": epochs,
        "steps": len(train) * epochs,
        "images a step": train.batch_size,
    }
    cut = [f"{count} {name}" for count, name in ((world_size(), "processes"), (train.accumulate, "parts")) if count > 1]
    return [
        *aligned([[name, f"{figure:,}"] for name, figure in figures.items()]),
        *([described("a step is cut into", " x ".join(cut))] if cut else []),
        *([described("resumed", f"{done} of {epochs:,} epochs are done")] if done is not None else []),
    ]


def about_memory(model, updater, loaders, source, criterion, views):
    """What lies on the device in a step, and the cache of images, wherever it is."""
    device, train = updater.precision.device, loaders[0]
    passes = [(side, count * train.rows_at_once) for side, count in views if count]
    parts = {"weights": state_bytes(model) + state_bytes(criterion), **training_bytes(updater)}
    for suffix, one in source.teachers.items() if source is not None else ():
        if one.model:
            parts[f"teacher{suffix.replace('_', ' ')}"] = state_bytes(one.model[0])
    parts["activations"] = sum(activations(model, updater.precision, side, rows) for side, rows in passes)
    cached = {
        place: sum(cache_bytes(loader) for loader in loaders if loader.cache_kind == place)
        for place in ("device", "ram")
    }
    parts["data cache"] = cached["device"] + (cached["ram"] if device.type == "cpu" else 0)
    lines = aligned([[name, megabytes(size)] for name, size in {**parts, "together": sum(parts.values())}.items()])
    if device.type != "cpu":
        lines.append(described("data cache in memory", megabytes(cached["ram"])))
    seen = " + ".join(f"{rows} of {side} px" for side, rows in passes)
    return [
        f"memory on {device_name(device)}, estimate ({updater.precision.name}; images at once: {seen})",
        *lines,
        "the estimate leaves out the libraries' workspace, single batches and what a teacher or the loss keeps "
        "for a moment",
    ]


def about_files(recorder, splits, done, save_samples):
    """The run folder, and the disk that checkpoints take; done: epochs of the run that is resumed."""
    run, classes, every = recorder.run, recorder.content["classes"], recorder.save_every
    checkpoint = checkpoint_bytes(recorder.updater, recorder.criterion)
    held = bool(run.files())
    if run.resume:
        state = f"continued after epoch {done}"
    elif held and run.overwrite:
        state = "it holds a run, which is replaced"
    else:
        state = "it holds a run: --overwrite or --resume would be needed" if held else "new"
    judged = ["val"] + (["test"] if splits.test is not None else [])
    files = ["config.json", "metrics.csv", "metrics.json", "results.json", "log.txt"]
    files += [f"predictions_{split}.npz" for split in judged if classes]
    files += [f"confusion_{split}_{task}.npy" for split in judged if classes for task in tasks_of(classes)]
    kept = recorder.epochs // every if every else 0
    weights = ", ".join(["best.pth", "latest.pth", *([f"epoch_N.pth ({kept})"] if kept else [])])
    sizes = f"{megabytes(checkpoint)} each, {megabytes(checkpoint * (2 + kept))} together at most (estimate)"
    return [
        described("run folder", f"{run.folder} ({state})"),
        described("files", ", ".join(files)),
        described("checkpoints", f"{weights}: {sizes}"),
        *([described("samples", save_samples)] if save_samples else []),
    ]


# --------------------------------------------------------------------------------------------------------------- bytes


def state_bytes(module):
    """Of a module's weights and buffers as a checkpoint keeps them; 0 for None."""
    return (
        0
        if module is None
        else sum(value.nbytes for value in module.state_dict().values() if isinstance(value, torch.Tensor))
    )


def trained_bytes(module):
    return 0 if module is None else sum(p.nbytes for p in module.parameters() if p.requires_grad)


def training_bytes(updater):
    """{part: bytes} of what training adds to the weights: all parameters that the optimizer has get a gradient, sgd
    keeps
    one figure of each with momentum, adam and adamw two; under DDP each gradient has a second place, to be sent
    from."""
    trained, defaults = sum(p.nbytes for p in updater.parameters), updater.optimizer.defaults
    figures = 2 if "betas" in defaults else 1 if defaults["momentum"] else 0
    average = {} if updater.average is None else {"average of the weights": state_bytes(updater.average.module)}
    return {
        "gradients": trained * (2 if world_size() > 1 else 1),
        "optimizer state": trained * figures,
        **average,
    }


def checkpoint_bytes(updater, criterion):
    """Of a checkpoint: the weights, their average, the projectors and the optimizer's state."""
    added = training_bytes(updater)
    return (
        state_bytes(updater.model)
        + state_bytes(criterion)
        + sum(size for name, size in added.items() if name != "gradients")
    )


def cache_bytes(loader):
    """Of a loader's decoded images; 0 where they are not kept."""
    if loader.cache is None:
        return 0
    return (loader.cache.flat if loader.cache.uniform is None else loader.cache.uniform).nbytes


def activations(model, precision, side, rows):
    """Bytes that a forward pass of `rows` images of this side keeps for the backward pass, on a line through two small
    ones; texts have the length to which they are cut."""
    few, more = (kept_bytes(model, precision, side, count) for count in PROBED)
    an_image = (more - few) / (PROBED[1] - PROBED[0])
    return round(few + an_image * (rows - PROBED[0]))


def kept_bytes(model, precision, side, rows):
    """Bytes of the storages, weights apart, that autograd saves in one forward pass in training mode."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}  # address: bytes, for layers save the same tensor or views of it

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision.autocast():
        out = model(model.example(side, rows))
    del out  # till here, or an address might be given out twice
    return sum(kept.values())
