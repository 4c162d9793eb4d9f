"""Which samples go to which split.  Needs augment.py and images.py of `common`, torch and numpy.

Choices are made by hashes of (seed, key), so they depend on no order of files and on no other random number.
"""

import numpy as np
import torch

from common.augment import uniform


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


def split_off(dataset, count, seed, stream):
    """(rest, chosen): `count` samples chosen as in `stratified_rows`."""
    chosen = stratified_rows(dataset.labels, dataset.keys, count, seed, stream)
    rest = np.setdiff1d(np.arange(len(dataset)), chosen)
    return dataset.subset(rest), dataset.subset(chosen)
