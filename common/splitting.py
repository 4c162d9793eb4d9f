"""Which samples go to which split.  Needs augment.py and images.py of `common`, torch and numpy.

Choices are made by hashes of (seed, key), so they depend on no order of files and on no other random number.
"""

import numpy as np
import torch

from common.augment import hash_id, uniform
from common.images import DataError


def stratified_rows(labels, keys, count, seed, stream):
    """Choose `count` of N rows, each class in proportion, by a hash of (seed, key).

    labels, keys: (N,) int64.  Returns sorted rows.  A sample's place in the order of its class depends on its own key
    alone, so one added file moves at most a sample or two of its class.
    """
    order = uniform(seed, 0, stream, torch.from_numpy(np.asarray(keys)))[:, 0].numpy()
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * (count / len(labels))
    counts = np.floor(shares).astype(int)
    remainders = np.argsort(-(shares - counts), kind="stable")  # the largest remainders get the rows that are left
    counts[remainders[: count - counts.sum()]] += 1
    rows = []
    for c, n in zip(classes, counts):
        members = np.flatnonzero(labels == c)
        rows.append(members[np.argsort(order[members], kind="stable")[:n]])
    return np.sort(np.concatenate(rows))


def _by_group(labels, groups, seed, stream):
    """[(class, [(rows of that class in the group, group's rows)])], rare classes first, groups in order of their hash.

    A group stands under the rarest class that it holds, so that rare samples are dealt out while there is still choice.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    rank = {c: r for r, c in enumerate(classes[np.argsort(sizes, kind="stable")])}
    members, order = {}, np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(groups[order][1:] != groups[order][:-1]) + 1):
        members[str(groups[rows[0]])] = rows
    draws = uniform(seed, 0, stream, torch.tensor([hash_id(g) for g in members]))[:, 0].tolist()
    strata = {c: [] for c in rank}
    for _, _, rows in sorted(zip(draws, members, members.values()), key=lambda item: item[:2]):
        rarest = min(labels[rows].tolist(), key=rank.get)
        strata[rarest].append((int((labels[rows] == rarest).sum()), rows))
    return list(strata.items())


def grouped_rows(labels, groups, count, seed, stream):
    """Choose about `count` of N rows in whole groups, each class in proportion, by a hash of (seed, group).

    labels: (N,) int64; groups: (N,) strings.  Returns sorted rows, to within half a group for each class.
    """
    taken, chosen = dict.fromkeys(np.unique(labels).tolist(), 0), []
    for c, members in _by_group(labels, groups, seed, stream):
        target = (labels == c).sum() * (count / len(labels))
        for size, rows in members:
            if taken[c] + size / 2 <= target:
                chosen.append(rows)
                for label in labels[rows].tolist():
                    taken[label] += 1
    return np.sort(np.concatenate(chosen)) if chosen else np.array([], int)


def fold_of_rows(labels, keys, groups, folds, seed, stream):
    """The fold (0 to folds - 1) of each of N rows: classes in proportion, groups whole (each row its own where None).

    Raises DataError where there are fewer groups than folds.
    """
    if groups is None:
        groups = np.char.mod("%d", np.asarray(keys))
    count = len(np.unique(groups))
    if folds > count:
        raise DataError(f"--folds {folds} of {count} groups: a fold would be empty")
    totals, result = np.zeros(folds, int), np.empty(len(labels), int)
    number = {c: i for i, c in enumerate(np.unique(labels).tolist())}
    held = np.zeros((len(number), folds), int)  # samples by class and fold
    for c, members in _by_group(labels, groups, seed, stream):
        for _, rows in sorted(members, key=lambda item: -item[0]):  # large groups first: small ones level what is left
            fold = np.lexsort((totals, held[number[c]]))[0]
            result[rows] = fold
            totals[fold] += len(rows)
            for label in labels[rows].tolist():
                held[number[label], fold] += 1
    return result


def split_off(dataset, count, seed, stream):
    """(rest, chosen): `count` samples chosen as in `stratified_rows`, whole groups where it has groups
    (`grouped_rows`)."""
    if dataset.groups is None:
        chosen = stratified_rows(dataset.labels, dataset.keys, count, seed, stream)
    else:
        chosen = grouped_rows(dataset.labels, dataset.groups, count, seed, stream)
    return without_rows(dataset, chosen), dataset.subset(chosen)


def held_out(data, share, seed, stream):
    """(N,) bool: the share of a dataset or a Store that `split_off` would choose; it needs their ids, labels and
    groups."""
    count, result = round(share * len(data)), np.zeros(len(data), bool)
    if data.groups is None:
        keys = np.array([hash_id(i) for i in data.ids], np.int64)
        result[stratified_rows(data.labels, keys, count, seed, stream)] = True
    else:
        result[grouped_rows(data.labels, data.groups, count, seed, stream)] = True
    return result


def split_fold(dataset, folds, fold, seed, stream):
    """(rest, fold's samples)."""
    chosen = np.flatnonzero(fold_of_rows(dataset.labels, dataset.keys, dataset.groups, folds, seed, stream) == fold)
    return without_rows(dataset, chosen), dataset.subset(chosen)


def limit(dataset, count, seed, stream):
    """`count` samples, classes in proportion; groups may be cut, for none leaves its split."""
    return dataset.subset(stratified_rows(dataset.labels, dataset.keys, count, seed, stream))


def without_rows(dataset, rows):
    return dataset.subset(np.setdiff1d(np.arange(len(dataset)), rows))


def check_groups(parts):
    """Refuse splits {name: dataset} of which two share a group."""
    owner = {}
    for split, part in parts.items():
        for group in [] if part.groups is None else np.unique(part.groups).tolist():
            if group in owner:
                raise DataError(
                    f"the group {group!r} is in {owner[group]} and in {split}: a model would be judged on what it "
                    "has seen"
                )
            owner[group] = split
