"""Losses of knowledge distillation.  Needs torch alone and no other file of `common`.

Every function returns one scalar in float32, whatever the autocast, and takes (B, ...) tensors.  `DistillationLoss`
is the weighted sum of them that a method names.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

TERMS = (
    "ce",
    "kl",
    "feature",
    "embedding",
    "cls",
    "patch",
    "projection",
    "contrastive",
    "rkd_distance",
    "rkd_angle",
    "mmd",
    "dkd",
    "dist",
    "standardized_kl",
    "attention",
)
# Weights a published combination sets, others are 0; --ce-weight, --kl-weight, ... override one by one, 0 leaves a term
# out.
METHODS = {
    "response": {"ce": 0.5, "kl": 0.5},  # Hinton et al. 2015, arXiv:1503.02531
    "feature": {"ce": 0.5, "kl": 0.5, "feature": 1.0},  # the same and a hint, Romero et al. 2015, arXiv:1412.6550
    "feature_matching": {
        "ce": 0.5,
        "feature": 0.5,
    },  # with labels, intermediate maps of Swins and ViTs in place of logits
    "embedding": {
        "ce": 1.0,
        "embedding": 1.0,
    },  # stored or live embeddings in a shared space, with labels; --ce-weight 0 without
    "tokens": {"cls": 1.0, "patch": 0.5},  # without labels: class token and patch tokens
    "vanilla": {"ce": 1.0, "kl": 1.0, "projection": 100.0},  # logits and projected sides of image + text models
    "combined": {"ce": 1.0, "kl": 1.0, "projection": 100.0, "contrastive": 1.0},
    "crd": {"ce": 1.0, "contrastive": 1.0},  # Tian et al. 2020, arXiv:1910.10699, with the batch's negatives
    "rkd": {"ce": 1.0, "rkd_distance": 25.0, "rkd_angle": 50.0},  # Park et al. 2019, arXiv:1904.05068
    "mmd": {"ce": 1.0, "mmd": 1.0},  # Huang and Wang 2017, arXiv:1707.01219, on embeddings
    "dkd": {
        "ce": 1.0,
        "dkd": 1.0,
    },  # Zhao et al. 2022, arXiv:2203.08679; their code warms it up over 20 of 240 epochs: `warm_up`
    "dist": {
        "ce": 1.0,
        "dist": 2.0,
    },  # Huang et al. 2022, arXiv:2205.10536: both relations weigh 2 there, 1 each within our term
    "logit_standardization": {
        "ce": 0.1,
        "standardized_kl": 9.0,
    },  # Sun et al. 2024, arXiv:2403.01427, their code's weights
    "attention": {
        "ce": 1.0,
        "attention": 1000.0,
    },  # Zagoruyko and Komodakis 2017, arXiv:1612.03928; theirs sums over layers, ours is the mean
}
TEMPERATURES = {
    "vanilla": 2.0,
    "combined": 2.0,
    "dist": 1.0,
    "logit_standardization": 2.0,
}  # of methods, by default; others: 4
LOGIT_TERMS = ("kl", "dkd", "dist", "standardized_kl")  # terms that need the teacher's logits, of the student's classes
FEATURE_TERMS = ("feature", "attention")  # terms that need feature maps of both
RELATIONS = ("contrastive", "rkd_distance", "rkd_angle", "mmd", "dist")  # terms that compare the images of a batch
ALPHA = {
    "response": ("ce", "kl"),
    "feature": ("ce", "kl"),
    "feature_matching": ("feature", "ce"),
}  # alpha weighs the first, 1 - alpha the second
FEATURE_LOSSES = ("mse", "cosine")
# Smallest deviation of a student's logits, or (as a share) probabilities, that `standardized_kl` and `dist` divide by:
# with
# 0.01 a head of zeros overshoots, as measured.
FLAT = 0.1
ROUNDING = 1e-5  # share of the largest logit that counts as float32's rounding, which is 6e-8 a step
COLLAPSED = 0.1  # share of its first variance below which the shared space counts as collapsed (0.014 measured)
TEACHER_PROJECTORS = ("identity", "frozen-orthogonal", "learned")


class LossError(ValueError):
    """Loss settings, or outputs of teacher and student, that do not fit each other (a user's mistake)."""

    exit_code = 2


def _float32(*tensors):
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def class_weights(spec, labels, num_classes):
    """Weights of the classes (C,) float32 or None: spec is "none", "balanced" or numbers with commas, one a class.

    balanced: N / (C * n_c), so that each class has the same sum and the mean over samples is 1 (King and Zeng 2001).
    labels: (N,) of train; those of -1 do not count.
    """
    if spec == "none":
        return None
    if spec == "balanced":
        labels = torch.as_tensor(labels)
        labels = labels[labels >= 0]
        counts = torch.bincount(labels, minlength=num_classes)
        if not counts.all():
            raise LossError(
                f"--class-weights balanced: class number {int((counts == 0).nonzero()[0])} has no image in train"
            )
        return len(labels) / (num_classes * counts.float())
    try:
        weights = torch.tensor([float(word) for word in spec.split(",")])
    except ValueError:
        raise LossError(f"--class-weights {spec}: give none, balanced or numbers with commas, as 1,4.5") from None
    if len(weights) != num_classes or not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
        raise LossError(f"--class-weights {spec}: {num_classes} numbers from 0 on are needed, one a class")
    return weights


def cross_entropy(logits, labels, label_smoothing=0.0, weights=None, batch_labels=None):
    """Mean cross-entropy in nats.  logits (B, C); labels (B,) int64; weights (C,) of the classes: a weighted mean.

    An image whose label is -1 has none and does not count; without any label the loss is 0.
    batch_labels: those of the whole batch where `labels` are one process's or one step's part of it.  Its mean weight
    is the divisor, so that the mean over equal parts is the weighted mean of the whole.
    """
    with torch.autocast(logits.device.type, enabled=False):
        (logits,) = _float32(logits)
        losses = F.cross_entropy(
            logits,
            labels,
            None if weights is None else weights.to(logits),
            ignore_index=-1,
            label_smoothing=label_smoothing,
            reduction="none",
        )  # (B,), 0 without a label
        labels = labels if batch_labels is None else batch_labels
        counted = (labels >= 0).to(logits)
        if weights is not None:
            counted = counted * weights.to(logits)[labels.clamp(min=0)]
        return losses.mean() / counted.mean().clamp(min=torch.finfo(logits.dtype).tiny)


def _kl(student, teacher):
    """KL(softmax(teacher) || softmax(student)) of logits (B, C), summed over classes, averaged over the batch.

    A class whose teacher logit is minus infinity contributes 0, where `F.kl_div` with log_target gives 0 * inf = NaN.
    """
    absent = teacher == -math.inf
    student, teacher = F.log_softmax(student, 1), F.log_softmax(teacher, 1).masked_fill(absent, -math.inf)
    return (teacher.exp() * (teacher - student).masked_fill(absent, 0.0)).sum(1).mean()


def temperature_kl(student_logits, teacher_logits, temperature=4.0):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), summed over classes, averaged over the batch.

    `batchmean`, not `mean`: the latter is C times smaller.  T^2 always, so that the gradient does not shrink with T.
    Both logits (B, C).  Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        return temperature**2 * _kl(*(x / temperature for x in _float32(student_logits, teacher_logits)))


def decoupled_kl(student_logits, teacher_logits, labels, temperature=4.0, alpha=1.0, beta=8.0):
    """DKD: T^2 * (alpha * KL of (target, all others) + beta * KL among the others alone), teacher || student,
    batchmean.

    Logits (B, C), C of at least 2 (the second KL is 0 at 2); labels (B,) int64, where one is -1 the teacher's class
    stands in its place.  Zhao et al. 2022, arXiv:2203.08679.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        labels = torch.where(labels < 0, teacher_logits.argmax(1), labels)
        columns = torch.arange(student_logits.shape[1] - 1, device=labels.device).expand(len(labels), -1)
        columns = columns + (columns >= labels[:, None])  # (B, C - 1), the target is left out
        sides = []
        for logits in _float32(student_logits, teacher_logits):
            own, others = ((logits / temperature).gather(1, i) for i in (labels[:, None], columns))
            sides.append([torch.cat([own, others.logsumexp(1, keepdim=True)], 1), others])
        target, rest = (_kl(student, teacher) for student, teacher in zip(*sides))
        return temperature**2 * (alpha * target + beta * rest)


def dist(student_logits, teacher_logits, temperature=1.0, beta=1.0, gamma=1.0):
    """T^2 * (beta * inter + gamma * intra), each 1 - Pearson correlation of softmax(logits / T), student's and
    teacher's.

    inter: over the classes, mean over images; intra: over the images of the batch, mean over classes.  Logits (B, C), B
    of at least 2.  Huang et al. 2022, arXiv:2205.10536; T^2 and the eps of 1e-8, which quiets classes that no image of
    the
    batch is given, are their code's.  Student probabilities that differ by less than FLAT of their size count as that
    far
    apart, so that equal ones have a gradient, and a bounded one.
    """
    _several(student_logits)
    with torch.autocast(student_logits.device.type, enabled=False):
        pair = [x / temperature for x in _float32(student_logits, teacher_logits)]
        floors = [x.softmax(1) * _rounding(x).clamp(min=least) for x, least in zip(pair, (FLAT, ROUNDING))]  # (B, C)
        losses = []
        for dim in (1, 0):
            centred = [x - x.mean(dim, keepdim=True) for x in (x.softmax(1) for x in pair)]
            norms = [torch.maximum(x.norm(dim=dim), floor.detach().norm(dim=dim)) for x, floor in zip(centred, floors)]
            losses.append(1 - ((centred[0] * centred[1]).sum(dim) / (norms[0] * norms[1] + 1e-8)).mean())
        return temperature**2 * (beta * losses[0] + gamma * losses[1])


def _rounding(logits):
    """(B, 1), what float32 may have lost of each row of logits (B, C), generously; a logit of minus infinity is
    exact."""
    return ROUNDING * logits.detach().masked_fill(logits == -math.inf, 0.0).abs().amax(1, keepdim=True)


def _standardized(logits, least):
    """Logits (B, C) with mean 0 and deviation 1 of those above minus infinity; deviations below `least` count as it."""
    finite = logits > -math.inf
    count = finite.sum(1, keepdim=True)
    centred = logits - logits.masked_fill(~finite, 0.0).sum(1, keepdim=True) / count
    deviation = centred.masked_fill(~finite, 0.0).norm(dim=1, keepdim=True) / (count - 1).clamp(min=1).sqrt()
    return centred / torch.maximum(deviation, _rounding(logits).clamp(min=least))


def standardized_kl(student_logits, teacher_logits, temperature=2.0):
    """`temperature_kl` of logits (B, C) with mean 0 and (unbiased) deviation 1 over the classes, C of at least 2.

    The student need not match the teacher's scale then.  Sun et al. 2024, arXiv:2403.01427.  A student's deviation
    below
    FLAT counts as FLAT, where their code's eps of 1e-7 gives equal logits a gradient of 1e7.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        pair = zip(_float32(student_logits, teacher_logits), (FLAT, 1e-7))
        return temperature_kl(*(_standardized(x, least) for x, least in pair), temperature)


def task_logits(out):
    """{task: (B, C)} of a model's output: `logits` are those of the task "label", `logits_<task>` of another."""
    return {
        name.removeprefix("logits_") if name != "logits" else "label": value
        for name, value in out.items()
        if name.split("_")[0] == "logits"
    }


def task_class_weights(spec, targets, sizes):
    """{task: class_weights} of labels {task: (N,)} with {task: number of classes}."""
    return {task: class_weights(spec, labels, sizes[task]) for task, labels in targets.items()}


def task_accuracy(out, targets):
    """Share of right answers among a batch's labelled images, mean over tasks; a tensor on the device, NaN where none
    is.

    out: a model's output; targets: {task: (B,)}, -1 without a label.
    """
    shares = [
        (logits.argmax(1) == targets[task]).sum() / (targets[task] >= 0).sum()
        for task, logits in task_logits(out).items()
    ]
    return torch.stack(shares).mean()


def task_mean(losses, task_weights=None):
    """Mean over tasks of {task: loss}, weighted by {task: weight} where they are given."""
    weights = {task: (task_weights or {}).get(task, 1.0) for task in losses}
    return sum(weights[task] * loss for task, loss in losses.items()) / sum(weights.values())


def task_cross_entropy(out, targets, label_smoothing=0.0, weights=None, batch_targets=None, task_weights=None):
    """Mean over tasks of `cross_entropy`.  out: a model's output; targets, batch_targets: {task: labels}; weights:
    {task: (C,) or None}."""
    losses = {
        task: cross_entropy(
            logits, targets[task], label_smoothing, (weights or {}).get(task), (batch_targets or targets)[task]
        )
        for task, logits in task_logits(out).items()
    }
    return task_mean(losses, task_weights)


def same_size(student, teacher):
    """Average-pool the larger of two maps (B, C, H, W) to the smaller one's height and width."""
    size = [min(s, t) for s, t in zip(student.shape[-2:], teacher.shape[-2:])]
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def feature_mse(student, teacher):
    """Mean squared error over all elements of two maps (B, C, H, W) of equal width; sizes are pooled to the smaller.

    The hint loss of FitNets, Romero et al. 2015, arXiv:1412.6550, equation 3, as a mean.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(*same_size(*_float32(student, teacher)))


def feature_cosine(student, teacher):
    """1 - cosine over channels, averaged over positions and batch; maps (B, C, H, W), sizes pooled to the smaller."""
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = same_size(*_float32(student, teacher))
        return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()


def attention_transfer(student, teacher):
    """Mean squared difference of attention maps: squares of (B, C, H, W) averaged over channels, flattened, at unit
    length.

    Widths may differ, sizes are pooled to the smaller.  Zagoruyko and Komodakis 2017, arXiv:1612.03928, equation 2 with
    p 2;
    the mean over batch and positions, as in their code, is what the weight of 1000 belongs to.
    """
    with torch.autocast(student.device.type, enabled=False):
        maps = (F.normalize(x.square().mean(1).flatten(1), dim=1) for x in same_size(*_float32(student, teacher)))
        return F.mse_loss(*maps)


def embedding_loss(student, teacher, lambda_feat=1.0, lambda_cos=1.0):
    """lambda_feat * ||t - s||^2 / D + lambda_cos * (1 - cos(t, s)) of embeddings (B, D), mean over the batch.

    Summed over dimensions, as lambda_feat = D makes it, the squared error of wide teachers drowns a cross-entropy.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = _float32(student, teacher)
        cosine = F.cosine_similarity(student, teacher, dim=1)
        return lambda_feat * F.mse_loss(student, teacher) + lambda_cos * (1 - cosine).mean()


def normalized_mse(student, teacher):
    """Squared distance of vectors (..., D) scaled to unit length, 2 - 2 cosine: summed over D, averaged over the
    vectors.

    Not over D too: values and gradients some hundred times smaller would drown in AdamW's eps and the log's digits.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = (F.normalize(x, dim=-1) for x in _float32(student, teacher))
        return (student - teacher).square().sum(-1).mean()


def resize_grid(tokens, count):
    """Tokens (B, N, D) of a square grid, row by row, as `count` tokens: bilinear, antialiased where it shrinks.  Raises
    LossError."""
    if tokens.shape[1] == count:
        return tokens
    sides = [math.isqrt(n) for n in (tokens.shape[1], count)]
    if [side * side for side in sides] != [tokens.shape[1], count]:
        raise LossError(
            f"the teacher's {tokens.shape[1]} patch tokens and the student's {count} are no two square grids: "
            "change a resolution"
        )
    grid = _float32(tokens)[0].transpose(1, 2).unflatten(2, (sides[0], sides[0]))
    grid = F.interpolate(
        grid, (sides[1], sides[1]), mode="bilinear", align_corners=False, antialias=sides[1] < sides[0]
    )
    return grid.flatten(2).transpose(1, 2)


def pairwise_distances(x):
    """Euclidean distances (B, B) of rows (B, D), from differences: products would cost the digits of close rows.

    The gradient between equal rows is 0, where a root's is infinite.
    """
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def rkd_distance(student, teacher):
    """Huber loss between the distances of all pairs, each side's divided by its mean over the pairs i != j.

    Embeddings (B, D_s), (B, D_t), B of at least 2.  Park et al. 2019, arXiv:1904.05068, equations 3 and 4.
    """
    _several(student)
    with torch.autocast(student.device.type, enabled=False):
        distances = [pairwise_distances(x) for x in _float32(student, teacher)]
        pairs = len(student) * (len(student) - 1)
        return F.smooth_l1_loss(*(d / (d.sum() / pairs).clamp(min=1e-12) for d in distances))  # equal rows alone: zeros


def rkd_angle(student, teacher):
    """Huber loss between the cosines of the angles of all triples; embeddings as in `rkd_distance`, equation 6 there.

    Rows equal up to rounding have no direction: their cosines are 0, without a gradient, which would be of 1 /
    distance.
    """
    _several(student)
    with torch.autocast(student.device.type, enabled=False):
        cosines = []
        for x in _float32(student, teacher):
            lengths = pairwise_distances(x)
            lengths = lengths.masked_fill(lengths <= 1e-5 * lengths.mean(), math.inf)
            edges = (x[None] - x[:, None]) / lengths[:, :, None]  # (B, B, D)
            cosines.append(edges @ edges.transpose(1, 2))  # (B, B, B)
        return F.smooth_l1_loss(*cosines)


def contrastive(student, teacher, temperature=0.07, base_temperature=0.07):
    """Each student embedding must find its own image's teacher embedding among the batch's, and the other way round.

    Embeddings (B, D) of equal width, scaled to unit length; temperature / base_temperature weighs the sum (as in
    supervised contrastive learning).  InfoNCE with in-batch negatives in place of the memory bank of CRD, Tian et al.
    2020, arXiv:1910.10699.
    """
    _several(student)
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = (F.normalize(x, dim=1) for x in _float32(student, teacher))
        logits, own = student @ teacher.T / temperature, torch.arange(len(student), device=student.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2 * (temperature / base_temperature)


def mmd(student, teacher, scales=(0.25, 0.5, 1.0, 2.0, 4.0)):
    """Squared maximum mean discrepancy of two samples (B, D) of equal width, biased estimate, mean over Gaussian
    kernels.

    Bandwidths are multiples of the mean distance between all rows, which gets no gradient: a fixed one tells nothing
    apart at hundreds of dimensions.  Gretton et al. 2012, JMLR 13.
    """
    _several(student)
    with torch.autocast(student.device.type, enabled=False):
        both = torch.cat(_float32(student, teacher))
        both, count = both - both.mean(0).detach(), len(student)
        norms = both.square().sum(1)
        squared = (norms[:, None] + norms[None] - 2 * both @ both.T).clamp(min=0)  # products: no (2B, 2B, D) in memory
        mean = (pairwise_distances(both.detach()).sum() / (2 * count * (2 * count - 1))).clamp(min=1e-12)
        kernel = sum(torch.exp(-squared / (2 * (scale * mean) ** 2)) for scale in scales) / len(scales)
        return kernel[:count, :count].mean() + kernel[count:, count:].mean() - 2 * kernel[:count, count:].mean()


def _several(student):
    if len(student) < 2:
        raise LossError(
            "this method compares the images of a batch: --batch-size (of each step's part) must be at least 2"
        )


def orthogonal(rows, columns, seed=0):
    """(rows, columns) with orthonormal rows, or columns where there are fewer of them; the same for a seed
    everywhere."""
    values = torch.randn(
        max(rows, columns), min(rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    q = torch.linalg.qr(values)[0].float()
    return q if rows >= columns else q.T


def feature_error(student, teacher):
    """Mean squared error over all elements of embeddings (B, D) of equal width."""
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(*_float32(student, teacher))


def _by_task(value):
    """A tensor of the one task "label" as {task: tensor}; a dict and None are left as they are."""
    return {"label": value} if isinstance(value, torch.Tensor) else value


def _classes(counts):
    return (
        ", ".join(f"{count} classes" + ("" if task == "label" else f" of {task}") for task, count in counts.items())
        or "none"
    )


def uses(weights, terms):
    """Whether any of these terms weighs something; weights: {term: float}."""
    return any(weights.get(term) for term in terms)


class EmbeddingProjectors(nn.Module):
    """Linear maps of student (B, D_s) and teacher (B, D_t) into a space of shared_dim.

    teacher: identity, shared_dim is D_t then; frozen-orthogonal, a fixed random projection; learned.  A learned one can
    fall to a constant together with the student's, which costs nothing: watch the variance.
    """

    def __init__(self, student_dim, teacher_dim, shared_dim=None, teacher="identity"):
        super().__init__()
        if teacher == "identity" and shared_dim not in (None, teacher_dim):
            raise LossError(
                f"--shared-dim {shared_dim} with --teacher-projector identity: the teacher's width is {teacher_dim}"
            )
        shared_dim = shared_dim or teacher_dim
        self.student = nn.Linear(student_dim, shared_dim)
        self.teacher = (
            nn.Identity() if teacher == "identity" else nn.Linear(teacher_dim, shared_dim, bias=teacher == "learned")
        )
        if teacher == "frozen-orthogonal":
            self.teacher.weight = nn.Parameter(orthogonal(shared_dim, teacher_dim), requires_grad=False)

    def forward(self, student, teacher):
        student = self.student(student.to(self.student.weight.dtype))
        return student, self.teacher(teacher.to(student.dtype))


def method_weights(method, alpha=None, **overrides):
    """Weights {term: float} of a method.

    alpha: weighs cross-entropy, 1 - alpha the KL (response, feature), or the features, 1 - alpha cross-entropy
    (feature_matching); 0.5 where it is None.
    overrides: of TERMS, a number each, or None for the method's own.  Raises LossError.
    """
    weights = {**dict.fromkeys(TERMS, 0.0), **METHODS[method]}
    given = {name: value for name, value in overrides.items() if value is not None}
    if alpha is not None:
        if method not in ALPHA:
            raise LossError(f"--alpha with --method {method}: it has no such weight, give --ce-weight and the others")
        clash = [name for name in ALPHA[method] if name in given]
        if clash:
            raise LossError(f"--alpha and --{clash[0]}-weight both set the weight of {clash[0]}: give one of them")
        if not 0 <= alpha <= 1:
            raise LossError(f"--alpha {alpha} is not in 0 to 1")
        weights.update(zip(ALPHA[method], (alpha, 1 - alpha)))
    weights.update(given)
    wrong = [name for name, value in weights.items() if not 0 <= value < math.inf]
    if wrong:
        raise LossError(f"--{wrong[0]}-weight {weights[wrong[0]]} is no number from 0 on")
    if not any(weights.values()):
        raise LossError("every weight of the loss is 0: nothing to train on")
    return weights


class DistillationLoss(nn.Module):
    """Sum of the terms whose weight is not 0; owns the projectors.

    weights: {of TERMS: float}; embedding: settings of that term, {"shared_dim", "teacher",
    "lambda_feat", "lambda_cos"}, see EmbeddingProjectors and embedding_loss; temperature: of all LOGIT_TERMS;
    feature_loss: "mse" or "cosine"; dkd, dist: {"alpha", "beta"} and {"beta", "gamma"} of decoupled_kl and dist.

    `build(student, teacher)` once, on outputs of a dry batch and before optimizer, EMA and DDP see the parameters,
    makes a 1x1 projector from the student's width to the teacher's for each pair of features.
    `loss(student, teacher, labels)` (labels None or ce False: without cross-entropy): model outputs (`logits` (B, C),
    `features` {layer: (B, C_l, H_l, W_l)}, paired in order) and (B,) int64 labels -> scalar; `loss.terms` holds each
    term's value, unweighted and detached.
    local: class tokens (N, B, D) of N local crops of each image, for the term cls, where the others' rows are G global
    crops of B images, crop after crop.
    The mean over equal parts of a batch (processes, accumulation) is the loss of the batch; `batch_labels`, those of
    the whole batch, make it so for class weights, and gather for terms that compare images: in training it turns one
    process's rows (B, D) into all processes'.  Accumulation's parts are compared each on its own.
    """

    def __init__(
        self,
        weights,
        temperature=4.0,
        feature_loss="mse",
        label_smoothing=0.0,
        class_weights=None,
        embedding=None,
        task_weights=None,
        contrastive=None,
        gather=None,
        dkd=None,
        dist=None,
    ):
        super().__init__()
        if not 0 < temperature < math.inf:
            raise LossError(f"--temperature {temperature} is no number above 0")
        self.weights = {name: float(value) for name, value in weights.items() if value}
        self.temperature, self.label_smoothing, self.class_weights = temperature, label_smoothing, class_weights
        self.feature_term = {"mse": feature_mse, "cosine": feature_cosine}[feature_loss]
        self.projectors = nn.ModuleList()
        self.embedding = {
            "shared_dim": None,
            "teacher": "identity",
            "lambda_feat": 1.0,
            "lambda_cos": 1.0,
            **(embedding or {}),
        }
        self.embedding_projectors = None
        self.token_projectors, self.side_projectors = nn.ModuleDict(), nn.ModuleDict()
        self.task_weights, self.contrastive = (
            task_weights,
            {"temperature": 0.07, "base_temperature": 0.07, **(contrastive or {})},
        )
        self.dkd, self.dist = dkd or {}, dist or {}
        self.gather = gather or (lambda rows: rows)
        self.compares = uses(self.weights, RELATIONS)  # a batch of one says nothing then
        self.share, self.terms = 1.0, {}

    def warm_up(self, epoch, epochs):
        """In training all terms but the cross-entropy have epoch / epochs of their weights, from epoch 1, until it is 1
        (0: at once).

        Per epoch, as in the code of DKD (arXiv:2203.08679), whose large weight drowns the labels of an untrained
        student.
        """
        self.share = min(1.0, epoch / epochs) if epochs else 1.0

    def build(self, student, teacher):
        if uses(self.weights, LOGIT_TERMS):
            ours, theirs = (
                {task: logits.shape[1] for task, logits in task_logits(out).items()} for out in (student, teacher)
            )
            if ours != theirs:
                raise LossError(f"the teacher has {_classes(theirs)}, the student {_classes(ours)}")
        if self.compares:
            _several(
                self.gather(
                    student["embedding"] if "embedding" in student else next(iter(task_logits(student).values()))
                )
            )
        self._build_sides(student, teacher)
        if "embedding" in self.weights:
            widths = (out["embedding"].shape[1] for out in (student, teacher))
            self.embedding_projectors = EmbeddingProjectors(
                *widths, self.embedding["shared_dim"], self.embedding["teacher"]
            )
            self.embedding_projectors.to(student["embedding"].device)
            self.embedded(student["embedding"], teacher["embedding"])
            self.first_variance = float(self.terms["teacher_variance"])
        for term, key in (("cls", "embedding"), ("patch", "tokens")):
            if term in self.weights:
                self.token_projectors[term] = nn.Linear(student[key].shape[-1], teacher[key].shape[-1]).to(
                    student[key].device
                )
        if "patch" in self.weights:
            resize_grid(teacher["tokens"], student["tokens"].shape[1])  # refuses grids that cannot be aligned
        if uses(self.weights, FEATURE_TERMS):
            self._build_features(student, teacher)

    def _build_features(self, student, teacher):
        """Projectors of the term feature, after a look at the pairs of maps."""
        students, teachers = (list(out.get("features", {}).values()) for out in (student, teacher))
        if len(students) != len(teachers) or not students:
            raise LossError(
                f"--student-layer names {len(students)} layers and --teacher-layer {len(teachers)}: "
                "they are paired in order, give the same number (at least 1)"
            )
        for s, t in zip(students, teachers):
            if "attention" in self.weights and same_size(s, t)[0][0, 0].numel() == 1:
                raise LossError(
                    f"the term attention compares positions, maps of {[*s.shape[-2:]]} and {[*t.shape[-2:]]} "
                    "share but one: take earlier layers"
                )
            if "feature" in self.weights:
                self.projectors.append(nn.Conv2d(s.shape[1], t.shape[1], 1).to(s.device))

    def forward(self, student, teacher, labels, batch_labels=None, local=None, ce=True):
        loss, share, self.terms = 0.0, self.share if self.training else 1.0, {}
        for name, weight in self.weights.items():
            if name == "ce" and (labels is None or not ce):
                continue
            if name == "ce":
                term = task_cross_entropy(
                    student,
                    _by_task(labels),
                    self.label_smoothing,
                    _by_task(self.class_weights),
                    _by_task(batch_labels),
                    self.task_weights,
                )
            elif name in LOGIT_TERMS:
                term = self.on_logits(name, task_logits(student), task_logits(teacher), _by_task(labels))
            elif name == "projection":
                term = torch.stack(
                    [feature_error(self.side(key, student[key]), teacher[key]) for key in self.sides]
                ).mean()
            elif name in RELATIONS:
                term = self.relation(name, student["embedding"], teacher["embedding"])
            elif name == "feature":
                term = self.feature(student["features"], teacher["features"])
            elif name == "attention":
                pairs = zip(*(out["features"].values() for out in (student, teacher)), strict=True)
                term = torch.stack([attention_transfer(*pair) for pair in pairs]).mean()
            elif name == "embedding":
                term = self.embedded(student["embedding"], teacher["embedding"])
            elif name == "cls":
                term = normalized_mse(self.projected("cls", student["embedding"]), teacher["embedding"])
            elif name == "patch":
                tokens = self.projected("patch", student["tokens"])
                term = normalized_mse(tokens, resize_grid(teacher["tokens"], tokens.shape[1]))
            loss = loss + (weight if name == "ce" else share * weight) * term
            self.terms[name] = term.detach()
        if local is not None:
            term = self.local(local, teacher["embedding"])
            loss = loss + share * self.weights["cls"] * term
            self.terms["local"] = term.detach()
        return loss

    def on_logits(self, name, student, teacher, labels):
        """A term on logits {task: (B, C)}, mean over tasks; labels: {task: (B,)}, for dkd."""

        def of_task(task):
            pair = student[task], teacher[task]
            if name == "dkd":
                return decoupled_kl(*pair, labels[task], self.temperature, **self.dkd)
            if name == "dist":  # over all processes in training, as in `relation`
                return dist(*(map(self.gather, pair) if self.training else pair), self.temperature, **self.dist)
            return {"kl": temperature_kl, "standardized_kl": standardized_kl}[name](*pair, self.temperature)

        return task_mean({task: of_task(task) for task in student}, self.task_weights)

    def _build_sides(self, student, teacher):
        """Linear maps from the student's width to the teacher's: of both models' sides, else of their embeddings."""
        self.sides = [key for key in ("img_proj", "txt_proj") if key in student and key in teacher] or ["embedding"]
        keys = [
            *(self.sides if "projection" in self.weights else []),
            *(["embedding"] if {"contrastive", "mmd"} & self.weights.keys() else []),
        ]
        for key in dict.fromkeys(keys):
            self.side_projectors[key] = nn.Linear(student[key].shape[1], teacher[key].shape[1]).to(student[key].device)

    def side(self, key, student):
        """A student's embedding (B, D_s) in the teacher's width, in float32."""
        with torch.autocast(student.device.type, enabled=False):
            return self.side_projectors[key](student.to(self.side_projectors[key].weight.dtype))

    def relation(self, name, student, teacher):
        """A term that compares images, in training of all processes' parts of the batch: each has its gradient, see
        `gather`."""
        if name in ("contrastive", "mmd"):
            student = self.side("embedding", student)
        if self.training:
            student, teacher = self.gather(student), self.gather(teacher)
        if name == "contrastive":
            return contrastive(student, teacher, **self.contrastive)
        return {"rkd_distance": rkd_distance, "rkd_angle": rkd_angle, "mmd": mmd}[name](student, teacher)

    def local(self, student, teacher):
        """Class tokens (N, B, D_s) of N local crops against the teacher's (G * B, D_t) of G global ones: mean over all
        pairs of an image."""
        student, teacher = self.projected("cls", student), teacher.unflatten(0, (-1, student.shape[1]))
        return normalized_mse(*torch.broadcast_tensors(student[:, None], teacher[None]))  # (N, G, B, D_t)

    def projected(self, term, student):
        """The student's class token or patch tokens (..., D_s) in the teacher's width, in float32."""
        with torch.autocast(student.device.type, enabled=False):
            return self.token_projectors[term](student.to(self.token_projectors[term].weight.dtype))

    def embedded(self, student, teacher):
        """The loss in the shared space; notes the variance there, mean over dimensions: near 0 all images look
        alike."""
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = self.embedding_projectors(student, teacher)
        for who, values in (("student", student), ("teacher", teacher)):
            self.terms[f"{who}_variance"] = values.detach().var(0, correction=0).mean()
        return embedding_loss(student, teacher, self.embedding["lambda_feat"], self.embedding["lambda_cos"])

    def collapsed(self, means):
        """A warning where the shared space has lost its variance, else None; means: {term: its mean over an epoch}."""
        if self.embedding_projectors is None or not self.first_variance:
            return None
        teacher, student = means["teacher_variance"], means["student_variance"]
        if teacher < COLLAPSED * self.first_variance:
            return (
                "the learned projectors collapse: the teacher's variance in the shared space fell from "
                f"{self.first_variance:.3g} to "
                f"{teacher:.3g}, so all images look alike there; --teacher-projector identity or "
                "frozen-orthogonal cannot"
            )
        if student < 0.1 * COLLAPSED * teacher:
            return (
                f"the student's embedding hardly differs between images (variance {student:.3g}, the teacher's "
                f"{teacher:.3g}): it follows nothing yet"
            )
        return None

    def feature(self, student, teacher):
        """Mean of the feature loss over the pairs of layers, the student's maps projected to the teacher's width."""
        with torch.autocast(self.projectors[0].weight.device.type, enabled=False):
            terms = [
                self.feature_term(projector(s.to(projector.weight.dtype)), t)
                for projector, s, t in zip(self.projectors, student.values(), teacher.values(), strict=True)
            ]
        return torch.stack(terms).mean()
