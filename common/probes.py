"""What frozen features are worth: k nearest neighbours and a linear probe.  Needs torch and no other file of `common`.

    scores = knn(train_features, train_labels, features, num_classes)[20]                  # (N, C), sums to 1
    logits, chosen = linear_probe(train_features, train_labels, held_out, features, num_classes)

Features (N, D) float, labels (N,) int64, all on one device; computed in float32.  The number of classes is always given:
train may lack the last one.
"""

import itertools
import math

import torch

NEIGHBOURS = (10, 20, 100, 200)  # as DINO reports
LRS, WEIGHT_DECAYS = (0.1, 1.0, 10.0), (0.0, 1e-6, 1e-5, 1e-4, 1e-3)  # on features of mean squared norm 1


class ProbeError(ValueError):
    """Features or labels that allow no probe (a user's mistake)."""

    exit_code = 2


def check(train_features, train_labels, features, num_classes):
    """Raise ProbeError on labels or values that mean nothing."""
    if not len(train_features):
        raise ProbeError("train holds no images: k-NN and the linear probe need some")
    if len(train_labels) != len(train_features) or train_features.shape[1:] != features.shape[1:]:
        raise ProbeError(f"train has features {tuple(train_features.shape)} and {len(train_labels)} labels, the judged split features {tuple(features.shape)}")
    low, high = int(train_labels.min()), int(train_labels.max())
    if low < 0:
        raise ProbeError(f"train holds images without a label ({low}): k-NN and the linear probe need one of each")
    if high >= num_classes:
        raise ProbeError(f"train holds the label {high}, of {num_classes} classes")
    if not (torch.isfinite(train_features).all() and torch.isfinite(features).all()):
        raise ProbeError("features hold NaN or infinity")


# ------------------------------------------------------------------------------------------------ k nearest neighbours


def knn(train_features, train_labels, features, num_classes, k=NEIGHBOURS, temperature=0.07, weights="distance", chunk=2048):
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
    found = {one: [] for one in cut}
    for queries in features.split(chunk):
        similar, labels = nearest(unit(queries), train_features, train_labels, cut[-1], 8 * chunk)  # (B, K)
        for one in cut:
            near = similar[:, :one]
            share = (near / temperature).softmax(1) if weights == "distance" else torch.full_like(near, 1 / one)
            found[one].append(near.new_zeros(len(near), num_classes).scatter_add_(1, labels[:, :one], share))
    return {one: torch.cat(parts) for one, parts in found.items()}


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


def linear_probe(train_features, train_labels, held_out, features, num_classes, lrs=LRS, weight_decays=WEIGHT_DECAYS,
                 steps=1000, batch_size=1024, seed=0):  # fmt: skip
    """Multinomial logistic regression on frozen features: (logits (N, C) float32, what was chosen as a dict).

    All heads of the grid lrs x weight_decays are trained at once on the part of train that held_out (M,) bool leaves;
    the one with the best balanced accuracy on the held-out part, of equal ones with the lowest loss there, is trained
    again on all of train and asked for `features` once.  SGD with momentum 0.9 and a cosine schedule, as DINO's, whose
    grid of heads is DINOv2's (arXiv:2304.07193); unlike there `features` choose nothing.  Features are standardized by
    the images that train the head; the L2 penalty is weight_decay / 2 * |W|^2.  seed: the order.  Raises ProbeError.
    """
    check(train_features, train_labels, features, num_classes)
    held_out = held_out.to(train_features.device)
    if held_out.all() or not held_out.any():
        raise ProbeError(f"of {len(held_out)} images of train {int(held_out.sum())} are held out: the linear probe needs some and must leave some")
    rest, labels = ~held_out, train_labels[held_out]
    points = list(itertools.product(lrs, weight_decays))
    heads = fit(train_features[rest], train_labels[rest], num_classes, points, steps, batch_size, seed)
    best = None
    for point, logits in zip(points, predict(heads, train_features[held_out])):
        right = logits.argmax(1) == labels
        recalls = [float(right[labels == c].float().mean()) for c in labels.unique()]
        accuracy, loss = sum(recalls) / len(recalls), float(torch.nn.functional.cross_entropy(logits, labels))
        if math.isfinite(loss) and (best is None or (accuracy, -loss) > best[:2]):
            best = accuracy, -loss, point
    if best is None:
        raise ProbeError("no head of the linear probe has a finite loss on the held-out images")
    heads = fit(train_features, train_labels, num_classes, [best[2]], steps, batch_size, seed)
    chosen = {"lr": best[2][0], "weight_decay": best[2][1], "held_out_balanced_accuracy": best[0], "held_out": len(labels)}
    return predict(heads, features)[0], chosen


def fit(features, labels, num_classes, points, steps, batch_size, seed):
    """Train H linear heads, one for each (lr, weight_decay) of points: (mean (D,), scale (D,), weight (D, H, C), bias (H, C))."""
    features = features.float()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # a dimension that hardly varies in train is not blown up; with |x|^2 of 1 on average a rate suits any width
    scale = deviation.clamp(min=0.01 * float(deviation.square().mean().sqrt()) + 1e-12) * math.sqrt(features.shape[1])
    rates, decays = (torch.tensor(column, device=features.device)[:, None] for column in zip(*points))  # (H, 1)
    weight = features.new_zeros(features.shape[1], len(points), num_classes)  # convex: zero is as good as any start
    bias = features.new_zeros(len(points), num_classes)
    speeds = torch.zeros_like(weight), torch.zeros_like(bias)
    order, generator = torch.empty(0, dtype=torch.int64), torch.Generator().manual_seed(seed)
    for step in range(steps):
        if len(order) < min(batch_size, len(features)):
            order = torch.randperm(len(features), generator=generator)
        rows, order = order[:batch_size].to(features.device), order[batch_size:]
        x = (features[rows] - mean) / scale  # (B, D)
        error = (x @ weight.flatten(1)).view(len(x), *bias.shape).add_(bias).softmax(2)  # (B, H, C)
        error[torch.arange(len(x)), :, labels[rows]] -= 1  # the gradient of the loss with respect to the logits
        gradients = (x.T @ error.flatten(1)).view_as(weight) / len(x) + decays * weight, error.mean(0)
        rate = rates * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for value, speed, gradient in zip((weight, bias), speeds, gradients):
            speed.mul_(0.9).add_(gradient)
            value.sub_(rate * speed)
    return mean, scale, weight, bias


def predict(heads, features):
    """Logits (H, N, C) of the heads of `fit`."""
    mean, scale, weight, bias = heads
    return torch.stack([((features.float() - mean) / scale) @ weight[:, i] + bias[i] for i in range(len(bias))])
