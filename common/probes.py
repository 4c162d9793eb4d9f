"""What frozen features are worth: k nearest neighbours and a linear probe.  Needs torch and no other file of `common`.

    scores = knn(train_features, train_labels, features, num_classes)[20]                  # (N, C), sums to 1
    logits, chosen = linear_probe(train_features, train_labels, held_out, features, num_classes)

Features (N, D) float, labels (N,) int64, all on one device; computed in float32.  The number of classes is always
given:
train may lack the last one.
"""

import itertools
import math

import torch

NEIGHBOURS = (10, 20, 100, 200)  # as DINO reports
LRS, WEIGHT_DECAYS = (1e-3, 1e-2, 1e-1), (0.0, 1e-4, 1e-3, 1e-2)  # of Adam on standardized features


class ProbeError(ValueError):
    """Features or labels that allow no probe (a user's mistake)."""

    exit_code = 2


def check(train_features, train_labels, features, num_classes):
    """Raise ProbeError on labels or values that mean nothing."""
    if not len(train_features):
        raise ProbeError("train holds no images: k-NN and the linear probe need some")
    if len(train_labels) != len(train_features) or train_features.shape[1:] != features.shape[1:]:
        raise ProbeError(
            f"train has features {tuple(train_features.shape)} and {len(train_labels)} labels, the judged split "
            f"features {tuple(features.shape)}"
        )
    low, high = int(train_labels.min()), int(train_labels.max())
    if low < 0:
        raise ProbeError(f"train holds images without a label ({low}): k-NN and the linear probe need one of each")
    if high >= num_classes:
        raise ProbeError(f"train holds the label {high}, of {num_classes} classes")
    if not (torch.isfinite(train_features).all() and torch.isfinite(features).all()):
        raise ProbeError("features hold NaN or infinity")


# ------------------------------------------------------------------------------------------------ k nearest neighbours


def knn(
    train_features, train_labels, features, num_classes, k=NEIGHBOURS, temperature=0.07, weights="distance", chunk=2048
):
    """Votes of the k most similar train images by cosine: {k: (N, C) float32, each row a distribution over classes}.

    weights: "distance" gives a neighbour of similarity s exp(s / temperature) votes, as DINO does (Caron et al. 2021,
    arXiv:2104.14294, after Wu et al. 2018, arXiv:1805.01978), "uniform" one.  A k beyond the train images is cut to
    them, so there may be fewer keys than asked for.  argmax of equal votes is the first class, as in scikit-learn.
    chunk: (chunk, 8 * chunk) similarities are held at a time, whatever the number of images.  Raises ProbeError.
    """
    check(train_features, train_labels, features, num_classes)
    if weights not in ("distance", "uniform"):
        raise ValueError(f"weights={weights!r} is neither 'distance' nor 'uniform'")
    cut = sorted({min(one, len(train_features)) for one in k})
    shares = {neighbours: [] for neighbours in cut}
    for queries in features.split(chunk):
        similar, labels = nearest(unit(queries), train_features, train_labels, cut[-1], 8 * chunk)  # (B, K)
        for neighbours in cut:
            near = similar[:, :neighbours]
            share = (near / temperature).softmax(1) if weights == "distance" else torch.full_like(near, 1 / neighbours)
            shares[neighbours].append(
                near.new_zeros(len(near), num_classes).scatter_add_(1, labels[:, :neighbours], share)
            )
    return {neighbours: torch.cat(parts) for neighbours, parts in shares.items()}


def nearest(queries, train_features, train_labels, count, chunk):
    """Similarities (B, count), falling, and labels (B, count) of the train images nearest to unit vectors (B, D)."""
    similar = queries.new_full((len(queries), 0), 0.0)
    labels = train_labels.new_zeros(len(queries), 0)
    for others, their in zip(train_features.split(chunk), train_labels.split(chunk)):
        values, order = (queries @ unit(others).T).topk(min(count, len(others)), dim=1)
        similar, labels = torch.cat([similar, values], 1), torch.cat([labels, their[order]], 1)
        similar, order = similar.topk(min(count, similar.shape[1]), dim=1)
        labels = labels.gather(1, order)
    return similar, labels


def unit(features):
    return torch.nn.functional.normalize(features.float(), dim=1)


# -------------------------------------------------------------------------------------------------------- linear probe


def linear_probe(
    train_features,
    train_labels,
    held_out,
    features,
    num_classes,
    lrs=LRS,
    weight_decays=WEIGHT_DECAYS,
    steps=1000,
    batch_size=1024,
    seed=0,
):
    """Multinomial logistic regression on frozen features: (logits (N, C) float32, what was chosen as a dict).

    All heads of the grid lrs x weight_decays are trained at once (as DINOv2 does, arXiv:2304.07193) on the part of
    train
    that held_out (M,) bool leaves.  The one with the lowest cross-entropy on the held-out part is trained again on all
    of
    train and asked for `features` once; unlike there they choose nothing.  Not by accuracy: many heads have the same on
    a
    small part, and where nearly all images are of one class it prefers a head that never names another.  Adam with a
    cosine schedule on features standardized by the images that train the head; the penalty is weight_decay / 2 * |W|^2.
    seed: the order of batches, where train is larger than one.  Raises ProbeError.
    """
    check(train_features, train_labels, features, num_classes)
    held_out = held_out.to(train_features.device)
    if held_out.all() or not held_out.any():
        raise ProbeError(
            f"{int(held_out.sum())} of the {len(held_out)} images of train are held out: the linear probe needs "
            "some, and some more"
        )
    points, rest, labels = list(itertools.product(lrs, weight_decays)), ~held_out, train_labels[held_out]
    heads = fit(train_features[rest], train_labels[rest], num_classes, points, steps, batch_size, seed)
    losses = [
        float(torch.nn.functional.cross_entropy(logits, labels)) for logits in predict(heads, train_features[held_out])
    ]
    best = min(range(len(points)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    heads = fit(train_features, train_labels, num_classes, [points[best]], steps, batch_size, seed)
    chosen = {
        "lr": points[best][0],
        "weight_decay": points[best][1],
        "held_out_loss": losses[best],
        "held_out": len(labels),
    }
    return next(predict(heads, features)), chosen


def fit(features, labels, num_classes, points, steps, batch_size, seed):
    """Train H linear heads, one for each (lr, weight_decay) of points: (mean (D,), scale (D,), weight (D, H, C), bias
    (H, C))."""
    features = features.float()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    scale = deviation.masked_fill(
        deviation <= 1e-5 * mean.abs(), math.inf
    )  # what is constant in train is ignored, not blown up
    rates, decays = (torch.tensor(column, device=features.device)[:, None] for column in zip(*points))  # (H, 1)
    weight = features.new_zeros(features.shape[1], len(points), num_classes)  # convex: zero is as good a start as any
    bias = features.new_zeros(len(points), num_classes)
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in (weight, bias)]
    order, generator = torch.empty(0, dtype=torch.int64), torch.Generator().manual_seed(seed)
    for step in range(steps):
        if len(order) < min(batch_size, len(features)):
            order = torch.randperm(len(features), generator=generator)
        rows, order = order[:batch_size].to(features.device), order[batch_size:]
        x = (features[rows] - mean) / scale  # (B, D)
        error = (x @ weight.flatten(1)).view(len(x), *bias.shape).add_(bias).softmax(2)  # (B, H, C)
        error[torch.arange(len(x), device=x.device), :, labels[rows]] -= (
            1  # now the loss's gradient with respect to the logits
        )
        gradients = (x.T @ error.flatten(1)).view_as(weight) / len(x) + decays * weight, error.mean(0)
        rate = rates * (0.5 + 0.5 * math.cos(math.pi * step / steps)) / (1 - 0.9 ** (step + 1))
        for value, (first, second), gradient in zip((weight, bias), moments, gradients):
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            value.sub_(rate * first / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    return mean, scale, weight, bias


def predict(heads, features):
    """Yield each head's logits (N, C)."""
    mean, scale, weight, bias = heads
    features = (features.float() - mean) / scale
    for i in range(len(bias)):
        yield features @ weight[:, i] + bias[i]
