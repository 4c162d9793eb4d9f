"""Predictions, the frozen teacher, what a model costs, and the results of a run.

Needs augment.py, cli.py, data.py, distributed.py, images.py, loader.py, metrics.py, models.py and training.py of
`common` (and what
these need), torch and numpy.
"""

import math
import os
import time

import numpy as np
import torch

from common import distributed, metrics
from common.augment import Augmenter, Policy
from common.cli import UserError, atomic_write, read_json, split_flags, write_array, write_json
from common.cli import data_root as find_data_root
from common.data import SPLITS, load_splits
from common.images import TASK, logits_name, tasks_of
from common.loader import Loader
from common.models import multiply_adds
from common.training import Precision, file_sha256, load_checkpoint, load_model, peak_memory_mb, select_device


def predict(model, loader, preprocess, precision, interrupts=None):
    """{task: logits (N, C) float32 numpy} of a loader's samples on their plain images, the model in eval mode."""
    names = {task: logits_name(task) for task in loader.dataset.targets}
    found = outputs(model, loader, preprocess, precision, tuple(names.values()), interrupts)
    return {task: found[name] for task, name in names.items()}


def task_metrics(logits, targets, teacher=None, positive=None):
    """Metrics of {task: logits (N, C)} against {task: labels (N,)}, and fidelity to a teacher's logits {task: (N, C)}.

    positive: {task: index} of the positive class of two (1).  Of several tasks <task>_<metric> for each, and <metric>,
    their mean (None where one is).
    """
    found = {
        task: metrics.classification(values, targets[task], (positive or {}).get(task, 1))
        for task, values in logits.items()
    }
    for task, of in found.items() if teacher is not None else ():
        of.update(metrics.fidelity(logits[task], teacher[task], targets[task]))
    if len(found) == 1:
        return next(iter(found.values()))
    columns = {name: [of[name] for of in found.values()] for name in next(iter(found.values()))}
    means = {name: None if None in values else float(np.mean(values)) for name, values in columns.items()}
    return {**means, **{f"{task}_{name}": value for task, of in found.items() for name, value in of.items()}}


def outputs(model, loader, preprocess, precision, names=("logits", "embedding"), interrupts=None):
    """{name: (N, ...) float32 numpy}: the model's outputs on a loader's plain images, in eval mode, without
    augmentation.

    Several processes share the batches; each has the outputs of all.
    """
    was_training, augment, parts, rows = model.training, Augmenter(Policy(), 0), [], []
    model.eval()
    distributed.broadcast(model.buffers())  # each process's BatchNorm has seen other images
    with torch.no_grad():
        for number, batch in enumerate(loader.batches(), 1):
            with precision.autocast():
                out = model(preprocess.inputs(batch, augment(batch, preprocess.resolution)))
            parts.append([out[name][: batch["valid"]].float() for name in names])
            rows.append(batch["index"][: batch["valid"]])
            if interrupts is not None and number <= len(loader) // distributed.size():  # as many in each process
                interrupts.check()
    model.train(was_training)
    own = torch.cat(rows).numpy() if rows else None, [torch.cat(values).cpu().numpy() for values in zip(*parts)]
    gathered = [part for part in distributed.gather(own) if part[0] is not None]
    result = {
        name: np.empty((len(loader.dataset), *value.shape[1:]), np.float32)
        for name, value in zip(names, gathered[0][1])
    }
    for index, values in gathered:
        for name, value in zip(names, values):
            result[name][index] = value
    if interrupts is not None:
        interrupts.check()
    return result


@torch.no_grad()
def distillation_loss(model, criterion, targets, loader, preprocess, precision, interrupts=None):
    """Mean loss of a split's plain images without its cross-entropy: what a run without labels is judged by.

    A last batch of one image is left out where the loss compares images.

    criterion: losses.DistillationLoss, whose projectors have no average under --ema; targets: of the teacher, for
    batches of this split.
    """
    was_training, augment, total, count = model.training, Augmenter(Policy(), 0), 0.0, 0
    model.eval(), criterion.eval()
    distributed.broadcast(model.buffers())
    for number, batch in enumerate(loader.batches(), 1):
        if interrupts is not None and number <= len(loader) // distributed.size():
            interrupts.check()
        with precision.autocast():
            out = model(preprocess.inputs(batch, augment(batch, preprocess.resolution)))
        valid = batch["valid"]
        if valid == 1 and criterion.compares:
            continue
        loss = criterion(_rows(out, valid), _rows(targets(batch), valid), _rows(batch["targets"], valid), ce=False)
        total, count = total + loss * valid, count + valid
    model.train(was_training), criterion.train()
    parts = distributed.gather((float(total), count))
    if interrupts is not None:
        interrupts.check()
    return sum(part[0] for part in parts) / sum(part[1] for part in parts)


def _rows(out, count):
    """The first `count` samples of a model's output."""
    return {k: _rows(v, count) if isinstance(v, dict) else v[:count] for k, v in out.items()}


def live_teacher(teacher, preprocess, augment, precision):
    """`targets(batch) -> dict`: the frozen teacher's outputs on its own input, made from the raw batch.

    no_grad, not inference_mode: outputs of the latter cannot be saved for backward.
    """
    teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def targets(batch):
        with precision.autocast():
            return teacher(preprocess.inputs(batch, augment(batch, preprocess.resolution)))

    return targets


def chance_auc(labels):
    """The AUC that guesses on `labels` (N,) stay below: 0.5 and two standard deviations; infinity for one class alone.

    Of guesses the AUC of n1 against n0 has the variance (n1 + n0 + 1) / (12 n1 n0), Mann and Whitney 1947.  The mean
    over classes deviates by the mean of their deviations at most, however their scores depend on each other.
    """
    counts = np.unique(labels, return_counts=True)[1].astype(float)
    others = len(labels) - counts
    return math.inf if len(counts) < 2 else 0.5 + 2 * float(np.sqrt((len(labels) + 1) / (12 * counts * others)).mean())


def write_results(
    run,
    splits,
    loaders,
    recorder,
    preprocess,
    precision,
    *,
    script,
    method=None,
    teacher=None,
    teacher_logits=None,
    judge=None,
):
    """Judge best and last weights on val and test, once, at the end; write results.json, predictions, confusions.

    Intervals and recalls of the classes are of the best weights alone.

    loaders: {"val", "test": Loader}; teacher: dict for results.json; teacher_logits: {"val", "test": {task: (N, C)}};
    judge:
    (split, loader) -> metrics of the student where it has no logits, and so no predictions.  Returns the results.
    """
    model, writes, best_logits = recorder.updater.evaluated_model, distributed.rank() == 0, {}
    config = read_json(run.path("config.json")) if writes else {}
    results = {
        "role": recorder.content["role"],
        "script": script,
        "method": method,
        **config,
        "dataset": splits.describe(),
        "model": {
            "name": recorder.updater.model.name,
            "family": recorder.updater.model.family,
            "parameters": recorder.updater.model.num_parameters,
            "resolution": preprocess.resolution,
        },
        "teacher": teacher,
    }
    for prefix in ("final_", ""):
        if not prefix:
            parts = {
                "model": model,
                **({"loss": recorder.loss} if recorder.loss is not None else {}),
            }  # projectors are of an epoch too
            best = load_checkpoint(run.path("best.pth")) if writes else None  # the file may be on rank 0's node alone
            for name, part in parts.items():
                if writes:
                    part.load_state_dict(best[name])
                distributed.broadcast(part.state_dict().values())
        for split, loader in loaders.items():
            if judge is not None:
                results[prefix + split] = judge(split, loader)
                continue
            logits = predict(model, loader, preprocess, precision, recorder.interrupts)
            found = task_metrics(
                logits, loader.dataset.targets, teacher_logits and teacher_logits[split], splits.positive
            )
            results[prefix + split] = {**found, **splits.positive_names()}
            if not prefix and writes:
                write_predictions(run.folder, split, loader.dataset, logits, splits)
                best_logits[split] = logits
    if not writes:
        return results
    results.update(
        checkpoint="best.pth",
        checkpoint_sha256=file_sha256(run.path("best.pth")),
        select_metric=recorder.metric,
        best_epoch=recorder.best_epoch,
        last_epoch=len(run.rows),
        stopped_early=recorder.stopped_early,
        processes=distributed.size(),
        throughput=throughput(run.rows),
        peak_memory_mb=peak_memory_mb(precision.device),
        wall_time_s=round(recorder.seconds, 1),
    )
    # after the peak of memory was read, and while no other process waits
    found = {split: uncertainty(logits, loaders[split].dataset, splits) for split, logits in best_logits.items()}
    results.update({key: {split: of[key] for split, of in found.items()} for key in ("intervals", "class_recalls")})
    write_json(run.path("results.json"), results)
    try:  # the figures above are safe by now
        fresh, _ = load_model(best, precision.device)  # neither compiled nor wrapped
        batch = min(next(iter(loaders.values())).batch_size, 64)
        results["model"].update(cost(fresh, preprocess.resolution, batch, precision.device, precision, at_least=0.2))
        write_json(run.path("results.json"), results)
    except RuntimeError as error:  # out of memory above all
        run.log(f"warning: the model's cost could not be measured: {str(error).splitlines()[0]}")
    run.log(verdict(results, run.path("results.json")))
    return results


def verdict(results, path):
    """The last line of a run."""
    metric, best = results["select_metric"], f"(best epoch {results['best_epoch']})"
    if "accuracy" not in results["val"]:
        parts = [f"{split} {metric} {results[split][metric]:.4f}" for split in ("val", "test") if split in results]
        return f"{', '.join(parts)} {best}; last epoch {results['final_val'][metric]:.4f}; {path}"
    test, intervals, tasks = results["test"], results["intervals"]["test"], tasks_of(results["dataset"]["classes"])
    names, bracketed = {"accuracy": "accuracy", "balanced_accuracy": "balanced"}, {metric}
    if len(tasks) > 1:  # their mean has no interval, each task's has
        names = {"accuracy": "accuracy", **{f"{task}_accuracy": task for task in tasks}}
        bracketed = {*names, metric}
    if metric in intervals:
        names.setdefault(metric, metric)
    figures = [
        f"{name} {test[key]:.4f}" + (f" {brackets(intervals[key])}" if key in bracketed and intervals.get(key) else "")
        for key, name in names.items()
    ]
    return f"test {', '.join(figures)} {best}; last epoch {results['final_test']['accuracy']:.4f}; {path}"


def uncertainty(logits, dataset, splits):
    """What stands beside a split's metrics: {"intervals": {metric: [low, high] or None}, "class_recalls": {class:
    recall or None}}.

    logits: {task: (N, C)}; splits: for classes and positive ones; of several tasks the keys are <task>_<metric> and
    <task>_<class>.  The intervals are of 95 %, by resampling lesions, patients or cases where the dataset has groups,
    else images.
    """
    result = {"intervals": {}, "class_recalls": {}}
    for task, names in tasks_of(splits.classes).items():
        labels, prefix = dataset.targets[task], f"{task}_" if len(logits) > 1 else ""
        chosen = (
            metrics.RESAMPLED if len(names) <= 100 else metrics.RESAMPLED[:2]
        )  # curves of each class take minutes on ImageNet
        found = metrics.bootstrap(
            logits[task], labels, dataset.groups, names=chosen, positive=splits.positive.get(task, 1)
        )
        result["intervals"].update({prefix + name: value for name, value in found.items()})
        recalls = metrics.class_recalls(logits[task], labels)
        result["class_recalls"].update({prefix + name: recall for name, recall in zip(names, recalls)})
    return result


def brackets(interval):
    """[0.887, 0.917]"""
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def throughput(rows):
    """Training images/s: median over epochs, without the first where there are more."""
    rates = [row["images_per_second"] for row in (rows[1:] or rows) if row["images_per_second"]]
    return round(float(np.median(rates)), 1) if rates else None


def timed(run, device, at_least=1.0, most=200):
    """Median seconds of run(), after two warm-up calls."""
    seconds, began = [], None
    for i in range(2 + most):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 2:
            began = began or start
            seconds.append(time.perf_counter() - start)
            if time.perf_counter() - began > at_least and len(seconds) >= 3:
                break
    return sorted(seconds)[len(seconds) // 2]


def cost(model, resolution, batch_size, device, precision, at_least=1.0):
    """Size and speed of a model: parameters, multiply-adds of one image, images/s at batch_size, latency at batch 1.

    at_least: seconds of each of the two measurements.
    A model that reads texts gets those of its max_length, the longest.
    """

    @torch.no_grad()
    def forward(count):
        batch = model.example(resolution, count)
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)

        def run():
            with torch.no_grad(), precision.autocast():
                model(batch)

        return run

    return {
        "parameters": model.num_parameters,
        "multiply_adds": multiply_adds(model, resolution),
        "images_per_second": round(batch_size / timed(forward(batch_size), device, at_least), 1),
        "latency_ms": round(1000 * timed(forward(1), device, at_least), 3),
    }


def write_predictions(folder, split, dataset, logits, splits):
    """predictions_<split>.npz and confusion_<split>_<task>.npy; logits: {task: (N, C)}."""
    with atomic_write(os.path.join(folder, f"predictions_{split}.npz")) as temporary, open(temporary, "wb") as file:
        arrays = {"ids": np.array(dataset.ids), **({} if dataset.groups is None else {"groups": dataset.groups})}
        for task, names in tasks_of(splits.classes).items():
            of = {
                "labels": dataset.targets[task],
                "logits": logits[task].astype(np.float32),
                "classes": np.array(names),
            }
            if task in splits.positive:
                of["positive"] = np.array(names[splits.positive[task]])
            arrays.update({name if task == TASK else f"{name}_{task}": value for name, value in of.items()})
        np.savez(file, **arrays)
    for task, values in logits.items():
        write_array(
            os.path.join(folder, f"confusion_{split}_{task}.npy"),
            metrics.confusion_matrix(values, dataset.targets[task]),
        )


def evaluate_checkpoint(path, split="test", device="auto", batch_size=128, data_root=None):
    """Metrics of a checkpoint on a split of its own dataset, read anew.  data_root: where it is now, if it moved."""
    device, checkpoint = select_device(device), load_checkpoint(path)
    model, preprocess = load_model(checkpoint, device, path=path)
    splits = splits_of(checkpoint, data_root=data_root, split=split)
    dataset = getattr(splits, split)
    logits = predict(model, Loader(dataset, batch_size, device), preprocess, Precision("off", device))
    return task_metrics(logits, dataset.targets, positive=splits.positive)


def measure_checkpoint(path, device="auto", batch_size=128):
    """`cost` of a checkpoint's model, in float32 and not compiled."""
    device, checkpoint = select_device(device), load_checkpoint(path)
    model, preprocess = load_model(checkpoint, device, path=path)
    return cost(model, preprocess.resolution, batch_size, device, Precision("off", device))


def splits_of(checkpoint, dataset=None, data_root=None, split="test", **reading):
    """Splits that hold `split` of a checkpoint's own dataset, or of another with the checkpoint's classes, if it has
    any.

    reading: keywords of `load_splits` that win over the checkpoint's flags.
    """
    flags = checkpoint["flags"]
    if dataset is None and flags["dataset"] == "unlabeled":
        raise UserError("this run's images have no labels: name a set that has, --dataset NAME --data-root DIR")
    own = dataset in (None, flags["dataset"])
    divided = own and split != "test"  # train and val are the run's own division
    options = {**split_flags(flags), "positive": checkpoint["classes"] and checkpoint.get("positive")}
    options.pop("limit_labels", None)  # to be judged, an image needs its label
    if not own:  # how images are read stays; which samples there are is another dataset's own matter
        options = {
            k: v for k, v in options.items() if k in ("split_seed", "decode_size", "window", "hair_removal", "positive")
        }
    if split != "train":  # what changes train alone may be gone by now
        options = {k: v for k, v in options.items() if k not in ("limit_train", "include_list", "extra_train")}
    result = load_splits(
        dataset or flags["dataset"],
        find_data_root(data_root or (flags["data_root"] if own else None)),
        classes=checkpoint["classes"] or None,
        splits=SPLITS if divided else (split,),
        **{**options, **reading},
    )
    if not divided:
        result.train, result.val, result.test = (getattr(result, k) if k == split else None for k in SPLITS)
    return result
