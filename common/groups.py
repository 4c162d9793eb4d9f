"""Choices in whole groups (patients, lesions), and folds: where a dataset has groups, and for --folds.

Needs augment.py, data.py and run.py of `common`, torch and numpy.  All is decided by hashes of (seed, group).
"""

import numpy as np
import torch

from common.augment import hash_id, uniform
from common.data import DataError, ImageDataset, without_rows

STREAM_FOLDS = 1006  # of the counter-based generator, see data.py


def rows_by_rarest_class(labels: np.ndarray, groups: np.ndarray, seed: int, stream: int) -> list[tuple]:
    """[(class, [(rows of that class in the group, group's rows)])], rare classes first, groups in order of their hash.

    A group stands under the rarest class that it holds, so that rare samples are dealt out while there is still choice.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    rarity = {c: r for r, c in enumerate(classes[np.argsort(sizes, kind="stable")])}
    members, order = {}, np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(groups[order][1:] != groups[order][:-1]) + 1):
        members[str(groups[rows[0]])] = rows
    draws = uniform(seed, 0, stream, torch.tensor([hash_id(group) for group in members]))[:, 0].tolist()
    strata = {c: [] for c in rarity}
    for _, _, rows in sorted(zip(draws, members, members.values()), key=lambda item: item[:2]):
        rarest = min(labels[rows].tolist(), key=rarity.get)
        strata[rarest].append((int((labels[rows] == rarest).sum()), rows))
    return list(strata.items())


def grouped_rows(labels: np.ndarray, groups: np.ndarray, count: int, seed: int, stream: int) -> np.ndarray:
    """Choose about `count` of N rows in whole groups, each class in proportion, by a hash of (seed, group).

    labels: (N,) int64; groups: (N,) strings.  Returns sorted rows, to within half a group for each class.
    """
    taken, chosen = dict.fromkeys(np.unique(labels).tolist(), 0), []
    for c, members in rows_by_rarest_class(labels, groups, seed, stream):
        target = (labels == c).sum() * (count / len(labels))
        for size, rows in members:
            if taken[c] + size / 2 <= target:
                chosen.append(rows)
                for label in labels[rows].tolist():
                    taken[label] += 1
    return np.sort(np.concatenate(chosen)) if chosen else np.array([], int)


def fold_of_rows(
    labels: np.ndarray, keys: np.ndarray | None, groups: np.ndarray | None, folds: int, seed: int, stream: int
) -> np.ndarray:
    """The fold (0 to folds - 1) of each of N rows: classes in proportion, groups whole (each row its own where None).

    keys: (N,) of `hash_id`, used where groups is None.  Raises DataError where there are fewer groups than folds.
    """
    if groups is None:
        groups = np.char.mod("%d", np.asarray(keys))
    count = len(np.unique(groups))
    if folds > count:
        raise DataError(f"--folds {folds} of {count} groups: a fold would be empty")
    totals, result = np.zeros(folds, int), np.empty(len(labels), int)
    number = {c: i for i, c in enumerate(np.unique(labels).tolist())}
    held = np.zeros((len(number), folds), int)  # samples by class and fold
    for c, members in rows_by_rarest_class(labels, groups, seed, stream):
        for _, rows in sorted(members, key=lambda item: -item[0]):  # large groups first: small ones level what is left
            fold = np.lexsort((totals, held[number[c]]))[0]
            result[rows] = fold
            totals[fold] += len(rows)
            for label in labels[rows].tolist():
                held[number[label], fold] += 1
    return result


def split_fold(dataset: ImageDataset, folds: int, fold: int, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """(rest, the fold's samples)"""
    fold_numbers = fold_of_rows(dataset.labels, dataset.keys, dataset.groups, folds, seed, STREAM_FOLDS)
    chosen = np.flatnonzero(fold_numbers == fold)
    return without_rows(dataset, chosen), dataset.subset(chosen)


def check_groups(parts: dict[str, ImageDataset]) -> None:
    """Refuse splits {name: dataset} of which two share a group.  Raises DataError."""
    split_of = {}
    for split, part in parts.items():
        for group in [] if part.groups is None else np.unique(part.groups).tolist():
            if group in split_of:
                raise DataError(
                    f"the group {group!r} is in {split_of[group]} and in {split}: a model would be judged on what it "
                    "has seen"
                )
            split_of[group] = split
