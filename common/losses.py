"""Losses of knowledge distillation: one function a term, the table of terms, and their weighted sum.

Needs torch and no other file of `common`, so it can be copied alone.  In a training loop of your own:

    criterion = DistillationLoss({"ce": 0.5, "kl": 0.5, "embedding": 1.0}, {"kl.temperature": 2.0})
    with torch.no_grad():
        criterion.build(student(images), teacher(images))  # outputs {"logits": (B, C), "embedding": (B, D)}
    optimizer = torch.optim.AdamW([*student.parameters(), *criterion.parameters()])
    for images, labels in batches:
        with torch.no_grad():
            targets = teacher(images)
        loss = criterion(student(images), targets, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

Every loss returns one scalar, in float32 also under autocast.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The smallest standard deviation of a student's logits (`standardized_kl`), or spread of its probabilities as a share
# of them (`dist`), that is divided by: with 0.01 a head of zeros overshoots, as measured.
FLAT = 0.1
ROUNDING = 1e-5  # share of the largest logit that may be float32's rounding error, which is 6e-8 an operation
COLLAPSED = 0.1  # share of its first variance below which the shared space counts as collapsed (0.014 measured)


class LossError(ValueError):
    """Loss settings, or outputs of teacher and student, that do not fit each other: the user's mistake."""

    exit_code = 2


# ------------------------------------------------------------------------------------------------------- small helpers


def _float32(*tensors):
    return [t.float() if torch.is_tensor(t) and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def in_float32(loss: Callable) -> Callable:
    """Decorator of a loss(student, teacher, ...): without autocast, and half-precision tensors in float32."""

    @functools.wraps(loss)
    def wrapped(student, teacher, *args, **options):
        with torch.autocast(student.device.type, enabled=False):
            return loss(*_float32(student, teacher), *args, **options)

    return wrapped


# ------------------------------------------------------------------------------------------------------ terms on logits


def _kl(student, teacher):
    """KL(softmax(teacher) || softmax(student)) of logits (B, C), summed over classes, averaged over the batch.

    A class whose teacher logit is minus infinity contributes 0, where `F.kl_div` with log_target gives 0 * inf = NaN.
    """
    absent = teacher == -math.inf
    student, teacher = F.log_softmax(student, 1), F.log_softmax(teacher, 1).masked_fill(absent, -math.inf)
    return (teacher.exp() * (teacher - student).masked_fill(absent, 0.0)).sum(1).mean()


@in_float32
def temperature_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), summed over classes, averaged over the batch.

    `batchmean`, not `mean`: the latter is C times smaller.  T^2 always, so that the gradient does not shrink with T.
    Both logits (B, C).  Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    return temperature**2 * _kl(student_logits / temperature, teacher_logits / temperature)


@in_float32
def decoupled_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """DKD: T^2 * (alpha * KL of (target, all others) + beta * KL among the others), teacher || student, batchmean.

    Logits (B, C), C of at least 2 (the second KL is 0 at 2); labels (B,) int64, where one is -1 the teacher's class
    stands in its place.  Zhao et al. 2022, arXiv:2203.08679.
    """
    labels = torch.where(labels < 0, teacher_logits.argmax(1), labels)
    columns = torch.arange(student_logits.shape[1] - 1, device=labels.device).expand(len(labels), -1)
    columns = columns + (columns >= labels[:, None])  # (B, C - 1), the target is left out
    binary, others = [], []
    for logits in (student_logits, teacher_logits):
        logits = logits / temperature
        others.append(logits.gather(1, columns))
        binary.append(torch.cat([logits.gather(1, labels[:, None]), others[-1].logsumexp(1, keepdim=True)], 1))
    return temperature**2 * (alpha * _kl(*binary) + beta * _kl(*others))


@in_float32
def dist(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """T^2 * (beta * inter + gamma * intra), each 1 - Pearson correlation of both models' softmax(logits / T).

    inter: over the classes, mean over images; intra: over the images of the batch, mean over classes.  Logits (B, C), B
    of at least 2.  Huang et al. 2022, arXiv:2205.10536; T^2 and the eps of 1e-8, which quiets classes that no image of
    the batch is given, are their code's.  Student probabilities that differ by less than FLAT of their size count as
    that far apart, so that equal ones have a gradient, and a bounded one.
    """
    _need_two(student_logits)
    pair = [student_logits / temperature, teacher_logits / temperature]
    floors = [x.softmax(1) * _rounding(x).clamp(min=least) for x, least in zip(pair, (FLAT, ROUNDING))]  # (B, C)
    losses = []
    for dim in (1, 0):
        centred = [x - x.mean(dim, keepdim=True) for x in (x.softmax(1) for x in pair)]
        norms = [torch.maximum(x.norm(dim=dim), floor.detach().norm(dim=dim)) for x, floor in zip(centred, floors)]
        losses.append(1 - ((centred[0] * centred[1]).sum(dim) / (norms[0] * norms[1] + 1e-8)).mean())
    return temperature**2 * (beta * losses[0] + gamma * losses[1])


def _rounding(logits):
    """(B, 1): a generous bound of float32's rounding error in each row of logits (B, C); minus infinity is exact."""
    return ROUNDING * logits.detach().masked_fill(logits == -math.inf, 0.0).abs().amax(1, keepdim=True)


def _standardized(logits, least):
    """Logits (B, C) with mean 0 and deviation 1 of those above minus infinity; deviations below `least` count as it."""
    finite = logits > -math.inf
    count = finite.sum(1, keepdim=True)
    centred = logits - logits.masked_fill(~finite, 0.0).sum(1, keepdim=True) / count
    deviation = centred.masked_fill(~finite, 0.0).norm(dim=1, keepdim=True) / (count - 1).clamp(min=1).sqrt()
    return centred / torch.maximum(deviation, _rounding(logits).clamp(min=least))


@in_float32
def standardized_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """`temperature_kl` of logits (B, C) with mean 0 and (unbiased) deviation 1 over the classes, C of at least 2.

    The student need not match the teacher's scale then.  Sun et al. 2024, arXiv:2403.01427.  A student's deviation
    below FLAT counts as FLAT, where their code's eps of 1e-7 gives equal logits a gradient of 1e7.
    """
    return temperature_kl(_standardized(student_logits, FLAT), _standardized(teacher_logits, 1e-7), temperature)


@in_float32
def hard_label(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean cross-entropy of the student's logits (B, C) with the class that the teacher finds most likely.

    Touvron et al. 2021 (DeiT), arXiv:2012.12877, equation 3, which halves it and the cross-entropy with the labels.
    """
    return F.cross_entropy(student_logits, teacher_logits.argmax(1))


@in_float32
def plackett_luce(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """PLD: cross-entropies of choosing the classes one by one, the label first, the others as the teacher ranks them.

    Each is over the classes that are left and weighs what softmax(teacher / T) gives the class that is chosen; summed
    over classes, averaged over the batch.  The first is the labels' cross-entropy.  Logits (B, C); labels (B,) int64,
    where one is -1 the teacher's class is the first.  Bassam et al. 2025, arXiv:2506.12542, section 4.2.
    """
    labels = torch.where(labels < 0, teacher_logits.argmax(1), labels)
    order = teacher_logits.scatter(1, labels[:, None], math.inf).argsort(dim=1, descending=True, stable=True)
    weights = (teacher_logits / temperature).softmax(1).gather(1, order)  # (B, C)
    chosen = student_logits.clamp(min=torch.finfo(student_logits.dtype).min).gather(1, order)  # no -inf - -inf
    left = chosen.flip(1).logcumsumexp(1).flip(1)  # of each class and those ranked below it
    return (weights * (left - chosen)).sum(1).mean()


# -------------------------------------------------------------------------------------------------------- several tasks


def task_logits(out: dict) -> dict[str, Tensor]:
    """{task: (B, C)} of a model's output: `logits` are those of the task "label", `logits_<task>` of another."""
    return {
        name.removeprefix("logits_") if name != "logits" else "label": value
        for name, value in out.items()
        if name.split("_")[0] == "logits"
    }


def task_mean(losses: dict[str, Tensor], task_weights: dict[str, float] | None = None) -> Tensor:
    """Mean over tasks of {task: loss}, weighted by {task: weight} where they are given."""
    if len(losses) == 1:
        return next(iter(losses.values()))
    weights = {task: (task_weights or {}).get(task, 1.0) for task in losses}
    total = sum((weights[task] * loss for task, loss in losses.items()), torch.zeros(()))
    return total / sum(weights.values())


def mean_cross_entropy(
    out: dict, targets: dict[str, Tensor], batch_targets: dict | None = None, task_weights: dict | None = None
) -> Tensor:
    """Mean over tasks of the cross-entropy in nats; targets: {task: (B,) int64}, -1 is no label."""
    logits = {task: _float32(values)[0] for task, values in task_logits(out).items()}
    losses = {task: F.cross_entropy(values, targets[task], ignore_index=-1) for task, values in logits.items()}
    return task_mean(losses, task_weights)


# ----------------------------------------------------------------------------------------------- terms on feature maps


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps (B, C, H, W) to the smaller one's height and width."""
    size = min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1])
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


@in_float32
def feature_loss(student: Tensor, teacher: Tensor, distance: Literal["mse", "cosine"] = "mse") -> Tensor:
    """Distance of two maps (B, C, H, W) of equal width; the larger is pooled to the smaller.

    mse: mean squared error over all elements, the hint loss of FitNets, Romero et al. 2015, arXiv:1412.6550,
    equation 3, as a mean.  cosine: 1 - cosine over channels, averaged over positions and batch.
    """
    student, teacher = same_size(student, teacher)
    if distance == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
    return F.mse_loss(student, teacher)


@in_float32
def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of attention maps: squares averaged over channels, flattened, scaled to unit length.

    Maps (B, C, H, W) of any width, the larger pooled to the smaller, of more than one position.  Zagoruyko and
    Komodakis 2017, arXiv:1612.03928, equation 2 with p 2; the mean over batch and positions, as in their code, is what
    the weight of 1000 belongs to.
    """
    sizes = [list(x.shape[-2:]) for x in (student, teacher)]
    maps = [F.normalize(x.square().mean(1).flatten(1), dim=1) for x in same_size(student, teacher)]  # (B, H * W)
    if maps[0].shape[1] == 1:
        raise LossError(
            f"the term attention compares positions, but maps of {sizes[0]} and {sizes[1]} share only one: "
            "choose earlier layers"
        )
    return F.mse_loss(maps[0], maps[1])


@in_float32
def gaussian_wasserstein(student: Tensor, teacher: Tensor, mean_weight: float = 4.0) -> Tensor:
    """mean_weight * ||mean difference||^2 + ||deviation difference||^2 of each channel's values over the positions.

    Maps (B, C, H, W) of equal width and any size; summed over channels, averaged over the batch.  The squared
    2-Wasserstein distance of diagonal Gaussians at mean_weight 1.  WKD-F, Lv et al. 2024, arXiv:2412.08139; the sum,
    the variance's eps of 1e-5 and the 4 are those of a copy of their code, for CIFAR-100.
    """
    means = student.mean((2, 3)) - teacher.mean((2, 3))  # (B, C)
    deviations = [(x.var((2, 3), correction=0) + 1e-5).sqrt() for x in (student, teacher)]
    return (mean_weight * means.square() + (deviations[0] - deviations[1]).square()).sum(1).mean()


# ------------------------------------------------------------------------------------------ terms on embeddings, tokens


@in_float32
def embedding_loss(student: Tensor, teacher: Tensor, lambda_feat: float = 1.0, lambda_cos: float = 1.0) -> Tensor:
    """lambda_feat * ||t - s||^2 / D + lambda_cos * (1 - cos(t, s)) of embeddings (B, D), mean over the batch.

    Summed over dimensions, as lambda_feat = D makes it, the squared error of wide teachers drowns a cross-entropy.
    """
    cosine = F.cosine_similarity(student, teacher, dim=1)
    return lambda_feat * F.mse_loss(student, teacher) + lambda_cos * (1 - cosine).mean()


@in_float32
def embedding_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements of embeddings (B, D) of equal width."""
    return F.mse_loss(student, teacher)


@in_float32
def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of vectors (..., D) scaled to unit length, 2 - 2 cosine: summed over D, averaged over vectors.

    Not averaged over D: values and gradients some hundred times smaller would drown in AdamW's eps and the log's
    digits.
    """
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1).mean()


@in_float32
def patch_loss(student: Tensor, teacher: Tensor, cosine: float = 2.0, smooth_l1: float = 0.0) -> Tensor:
    """cosine * (1 - cos(t, s)) + smooth_l1 * smooth L1 of patch tokens (B, N, D), the teacher's grid resized.

    The mean over tokens, of the smooth L1 (from 1 on linear) over D too.  With the defaults `normalized_mse`; 0.9 and
    0.1 are those of AM-RADIO, Ranzinger et al. 2024, arXiv:2312.06709.
    """
    teacher = resize_grid(teacher, student.shape[1])
    loss = cosine / 2 * normalized_mse(student, teacher)
    return loss + smooth_l1 * F.smooth_l1_loss(student, teacher) if smooth_l1 else loss


@in_float32
def patch_relations(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """KL(teacher || student) of each patch token's cosines with the image's other tokens, divided by the temperature.

    Tokens (B, N, D) of any two widths, the teacher's grid resized; the mean over tokens.  As the relations of TinyMIM,
    Ren et al. 2023, arXiv:2301.01296, of the tokens themselves in place of queries, keys and values.
    """
    teacher, count, rows = resize_grid(teacher, student.shape[1]), student.shape[1], []
    if count < 2:
        raise LossError("patch_relation compares the patch tokens of an image, and there is one: raise the resolution")
    for tokens in (student, teacher):
        unit = F.normalize(tokens, dim=2)
        cosines = (unit @ unit.mT / temperature).flatten(1)  # without the diagonal: N - 1 runs of N between its places
        rows.append(cosines[:, 1:].unflatten(1, (count - 1, count + 1))[:, :, :-1].reshape(-1, count - 1))
    return _kl(*rows)


def resize_grid(tokens: Tensor, count: int) -> Tensor:
    """Tokens (B, N, D) of a square grid, row by row, as `count` tokens: bilinear, antialiased where it shrinks."""
    if tokens.shape[1] == count:
        return tokens
    before, after = (math.isqrt(n) for n in (tokens.shape[1], count))
    if [before**2, after**2] != [tokens.shape[1], count]:
        raise LossError(
            f"the teacher's {tokens.shape[1]} patch tokens and the student's {count} are not two square grids: "
            "change a resolution"
        )
    grid = _float32(tokens)[0].transpose(1, 2).unflatten(2, (before, before))
    grid = F.interpolate(grid, (after, after), mode="bilinear", align_corners=False, antialias=after < before)
    return grid.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------- terms that compare a batch's images


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances (B, B) of rows (B, D), from differences: products would cost the digits of close rows.

    The gradient between equal rows is 0, where a root's is infinite.
    """
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


@in_float32
def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the distances of all pairs, each side's divided by its mean over the pairs i != j.

    Embeddings (B, D_s), (B, D_t), B of at least 2.  Park et al. 2019, arXiv:1904.05068, equations 3 and 4.
    """
    _need_two(student)
    pairs, relative = len(student) * (len(student) - 1), []
    for x in (student, teacher):
        distances = pairwise_distances(x)
        relative.append(distances / (distances.sum() / pairs).clamp(min=1e-12))  # equal rows alone: zeros
    return F.smooth_l1_loss(relative[0], relative[1])


@in_float32
def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles of all triples; embeddings as in `rkd_distance`, equation 6 there.

    Rows equal up to rounding have no direction: their cosines are 0 without a gradient, which would be 1 / distance.
    """
    _need_two(student)
    cosines = []
    for x in (student, teacher):
        lengths = pairwise_distances(x)
        lengths = lengths.masked_fill(lengths <= 1e-5 * lengths.mean(), math.inf)
        edges = (x[None] - x[:, None]) / lengths[:, :, None]  # (B, B, D)
        cosines.append(edges @ edges.transpose(1, 2))  # (B, B, B)
    return F.smooth_l1_loss(cosines[0], cosines[1])


@in_float32
def contrastive(student: Tensor, teacher: Tensor, temperature: float = 0.07, base_temperature: float = 0.07) -> Tensor:
    """Each student embedding must find its own image's teacher embedding among the batch's, and the other way round.

    Embeddings (B, D) of equal width, scaled to unit length; what the teacher has beyond B rows are more negatives, see
    `with_queue`.  temperature / base_temperature weighs the sum (as in supervised contrastive learning).  InfoNCE with
    in-batch negatives in place of the memory bank of CRD, Tian et al. 2020, arXiv:1910.10699.
    """
    _need_two(student)
    logits = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T / temperature  # (B, B + Q)
    same = torch.arange(len(student), device=student.device)
    both = F.cross_entropy(logits, same) + F.cross_entropy(logits[:, : len(student)].T, same)
    return both / 2 * (temperature / base_temperature)


@in_float32
def mmd(student: Tensor, teacher: Tensor, scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)) -> Tensor:
    """Squared maximum mean discrepancy of two samples (B, D), biased estimate, mean over Gaussian kernels.

    Bandwidths are multiples of the mean distance between all rows, which gets no gradient: a fixed one tells nothing
    apart at hundreds of dimensions.  Gretton et al. 2012, JMLR 13.
    """
    _need_two(student)
    both, count = torch.cat([student, teacher]), len(student)
    both = both - both.mean(0).detach()
    norms = both.square().sum(1)
    squared = (norms[:, None] + norms[None] - 2 * both @ both.T).clamp(min=0)  # products: no (2B, 2B, D) in memory
    mean = (pairwise_distances(both.detach()).sum() / (2 * count * (2 * count - 1))).clamp(min=1e-12)
    kernel = sum(torch.exp(-squared / (2 * (scale * mean) ** 2)) for scale in scales) / len(scales)
    return kernel[:count, :count].mean() + kernel[count:, count:].mean() - 2 * kernel[:count, count:].mean()


def _directions(rows):
    """Rows (B, D) at unit length; one next to zero has no direction: 0 without its gradient of 1 / length."""
    lengths = rows.norm(dim=1, keepdim=True)
    return rows / lengths.masked_fill(lengths <= 1e-5 * lengths.mean(), math.inf)


@in_float32
def probabilistic_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """PKT: KL(teacher || student) of each image's neighbours: (1 + cosine) / 2, divided by the sum over the batch.

    Embeddings (B, D_s), (B, D_t), B of at least 2.  Passalis and Tefas 2018, arXiv:1803.10837; the image itself counts,
    the eps is 1e-7 and the mean is over all B^2 pairs, as in their code, which a weight of 30000 belongs to.
    """
    _need_two(student)
    probabilities = []
    for x in map(_directions, (student, teacher)):
        similarity = (1 + x @ x.T) / 2  # (B, B)
        probabilities.append(similarity / similarity.sum(1, keepdim=True))
    q, p = probabilities
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


@in_float32
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """SP: mean squared difference of the products of all pairs of images, each image's (B,) scaled to unit length.

    Embeddings (B, D_s), (B, D_t), B of at least 2.  Tung and Mori 2019, arXiv:1907.09682, equations 2 to 4; the mean
    over B^2 pairs is what their weight of 3000 belongs to.
    """
    _need_two(student)
    return F.mse_loss(*(_directions(x @ x.T) for x in (student, teacher)))


@in_float32
def log_sum_distance(student: Tensor, teacher: Tensor, exponent: float = 4.0) -> Tensor:
    """SRD: log of the sum of |s - t|^exponent over batch and dimensions, both sides normalized over the batch.

    Embeddings (B, D) of equal width, B of at least 2.  The normalization is BatchNorm without weights, by the
    statistics of this batch also in evaluation.  Miles and Mikolajczyk 2023, arXiv:2303.11098; BatchNorm's eps of 1e-4
    and the 1e-5 that keeps the log finite are their code's.
    """
    _need_two(student)
    pair = (x - x[:1] for x in (student, teacher))  # shifts nothing, but equal rows have no rounding error then
    student, teacher = (F.batch_norm(x, None, None, training=True, eps=1e-4) for x in pair)
    return ((student - teacher).abs().pow(exponent).sum() + 1e-5).log()


def _need_two(rows):
    if len(rows) < 2:
        raise LossError(
            "the loss compares the images of a batch: --batch-size (of each step's part) must be at least 2"
        )


# ----------------------------------------------------------------------------------------------------------- projectors


def map_projector(student_width: int, teacher_width: int) -> nn.Module:
    """A 1x1 convolution of the student's feature maps (B, C, H, W) to the teacher's width."""
    return nn.Conv2d(student_width, teacher_width, 1)


def with_queue(student_width: int, teacher_width: int, queue: int | None = None) -> nn.Module:
    """A linear layer that keeps the teacher's embeddings of the last `queue` images, as MoCo does (He et al. 2020,
    arXiv:1911.05722), random ones at first."""
    projector, generator = nn.Linear(student_width, teacher_width), torch.Generator().manual_seed(0)
    if queue:
        projector.register_buffer("queue", torch.randn(queue, teacher_width, generator=generator))
    return projector


def linear_without_bias(student_width: int, teacher_width: int) -> nn.Module:
    """A linear map of the student's embeddings (B, D); for `log_sum_distance`, which takes any bias away."""
    return nn.Linear(student_width, teacher_width, bias=False)


def orthogonal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns) with orthonormal rows, or columns where there are fewer of them; a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(values)[0].float()
    return q if rows >= columns else q.T


class EmbeddingProjectors(nn.Module):
    """Linear maps of student (B, D_s) and teacher (B, D_t) into a space of shared_dim; watches the variance there.

    teacher_projector: identity, shared_dim is D_t then; frozen-orthogonal, a fixed random projection; learned, which
    can collapse to a constant together with the student's, at no cost.  `variances`: mean over dimensions, near 0 all
    images look alike.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        shared_dim: int | None = None,
        teacher_projector: Literal["identity", "frozen-orthogonal", "learned"] = "identity",
    ):
        super().__init__()
        if teacher_projector == "identity" and shared_dim not in (None, teacher_dim):
            raise LossError(
                f"the option embedding.shared_dim={shared_dim} cannot be combined with teacher_projector=identity: "
                f"the teacher's width is {teacher_dim}"
            )
        shared_dim = shared_dim or teacher_dim
        self.student, self.teacher = nn.Linear(student_dim, shared_dim), nn.Identity()
        if teacher_projector != "identity":
            self.teacher = nn.Linear(teacher_dim, shared_dim, bias=teacher_projector == "learned")
        if teacher_projector == "frozen-orthogonal":
            self.teacher.weight = nn.Parameter(orthogonal(shared_dim, teacher_dim), requires_grad=False)
        self.variances, self.first_variance = {}, None

    def forward(self, student, teacher):
        student, teacher = self.student(student), self.teacher(teacher.to(student.dtype))
        for name, values in (("student", student), ("teacher", teacher)):
            self.variances[f"{name}_variance"] = values.detach().var(0, correction=0).mean()
        if self.first_variance is None:
            self.first_variance = float(self.variances["teacher_variance"])
        return student, teacher

    def collapsed(self, means: dict) -> str | None:
        """A warning where the shared space has lost its variance; means: {name of `variances`: mean of an epoch}."""
        teacher, student = means["teacher_variance"], means["student_variance"]
        if teacher < COLLAPSED * self.first_variance:
            return (
                "the learned projectors collapse: the teacher's variance in the shared space fell from "
                f"{self.first_variance:.3g} to {teacher:.3g}, so all images look alike there; "
                "embedding.teacher_projector=identity or frozen-orthogonal in --loss-options cannot collapse"
            )
        if student < 0.1 * COLLAPSED * teacher:
            return (
                f"the student's embedding hardly differs between images (variance {student:.3g}, the teacher's "
                f"{teacher:.3g}): it does not follow the teacher yet"
            )
        return None


# ---------------------------------------------------------------------------------------------------- terms


class Term(NamedTuple):
    """A row of TERMS.  Its options are the arguments of `loss` and `projector` that have a default and are annotated as
    float, int or Literal."""

    loss: Callable  # (student's, teacher's tensor, **options) -> scalar; of several tasks or layers the mean is taken
    output: str  # the model output that is compared: logits, features, embedding or tokens; ce alone compares labels
    help: str
    projector: Callable | None = None  # (student's, teacher's width, **options) -> module of the student's tensor
    uses_labels: bool = False  # the loss has an argument `labels` (B,), after student and teacher
    compares_images: bool = False  # of a batch: needs at least two, and those of all processes in training
    both_sides: bool = False  # of image + text models compares img_proj and txt_proj, where both models have them


TERMS = {
    "ce": Term(F.cross_entropy, "labels", "cross-entropy with the labels"),
    "kl": Term(temperature_kl, "logits", "T^2 KL(teacher || student)"),
    "dkd": Term(decoupled_kl, "logits", "decoupled KL, T^2 (alpha target + beta others)", uses_labels=True),
    "dist": Term(dist, "logits", "1 - correlation, T^2 (beta classes + gamma images)", compares_images=True),
    "standardized_kl": Term(standardized_kl, "logits", "T^2 KL of logits with mean 0 and deviation 1"),
    "hard": Term(hard_label, "logits", "cross-entropy with the teacher's class"),
    "pld": Term(plackett_luce, "logits", "cross-entropies down the teacher's ranking", uses_labels=True),
    "feature": Term(feature_loss, "features", "distance of feature maps", map_projector),
    "attention": Term(attention_transfer, "features", "MSE of attention maps"),
    "wkd": Term(gaussian_wasserstein, "features", "Wasserstein distance of mean and deviation", map_projector),
    "embedding": Term(embedding_loss, "embedding", "lambda_feat MSE + lambda_cos (1 - cosine)", EmbeddingProjectors),
    "cls": Term(normalized_mse, "embedding", "2 - 2 cosine of class tokens", nn.Linear),
    "patch": Term(patch_loss, "tokens", "cosine (1 - cosine) + smooth_l1 of patch tokens", nn.Linear),
    "patch_relation": Term(patch_relations, "tokens", "KL of a patch token's relations to the others"),
    "projection": Term(embedding_mse, "embedding", "MSE of projected images and texts", nn.Linear, both_sides=True),
    "crd": Term(contrastive, "embedding", "InfoNCE of a batch and a queue", with_queue, compares_images=True),
    "rkd_distance": Term(rkd_distance, "embedding", "distances in a batch", compares_images=True),
    "rkd_angle": Term(rkd_angle, "embedding", "angles in a batch", compares_images=True),
    "mmd": Term(mmd, "embedding", "maximum mean discrepancy", nn.Linear, compares_images=True),
    "pkt": Term(probabilistic_transfer, "embedding", "KL of neighbours in a batch", compares_images=True),
    "sp": Term(similarity_preserving, "embedding", "similarities in a batch", compares_images=True),
    "srd": Term(log_sum_distance, "embedding", "log-sum distance", linear_without_bias, compares_images=True),
}


# These compare the classes of an image with each other.  A finding has two, absent and present: of dkd kl is left, dist
# and standardized_kl divide by what is the same for all images, and pld has nothing to rank.
BETWEEN_CLASSES = ("dkd", "dist", "standardized_kl", "pld")


def check_findings(terms: Iterable[str]) -> None:
    """Refuse terms that have no meaning where each image has several findings.  Raises LossError."""
    wrong = [term for term in terms if term in BETWEEN_CLASSES]
    if wrong:
        raise LossError(
            f"the term {wrong[0]} compares an image's classes with each other, findings are independent: "
            "take kl or hard in its place"
        )


def terms_on(terms: Iterable[str], *outputs: str) -> list[str]:
    """Those of these terms that compare one of these model outputs, or "labels"."""
    return [term for term in terms if TERMS[term].output in outputs]


def term_options(term: str) -> dict[str, inspect.Parameter]:
    """{"TERM.OPTION": parameter of the term's loss or projector}; those of ce are flags that all scripts share."""
    functions = (TERMS[term].loss, TERMS[term].projector)
    parameters = [p for f in functions if f and term != "ce" for p in inspect.signature(f).parameters.values()]
    return {
        f"{term}.{p.name}": p
        for p in parameters
        if p.default is not p.empty
        and (p.annotation in (float, int, int | None) or get_origin(p.annotation) is Literal)
    }


def loss_words(values: dict) -> str:
    """Weights or options as --loss and --loss-options take them: "ce=0.5 kl=0.5"."""
    return " ".join(f"{key}={f'{value:.12g}' if isinstance(value, float) else value}" for key, value in values.items())


def parse_loss(
    words: Sequence[str], loss_options: Sequence[str] = (), temperature: float | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """({term: weight above 0}, {"TERM.OPTION": value}) for `DistillationLoss`.

    words: TERM=WEIGHT or TERM.OPTION=VALUE; loss_options: TERM.OPTION=VALUE; temperature: of all terms on logits.  The
    later of these wins: an option's default, words, temperature, loss_options.  Raises LossError.
    """
    weights, special = {}, []
    for word in words:
        term = word.partition("=")[0]
        if "." in term:
            special.append(word)
            continue
        _check_term(term)
        if term in weights:
            raise LossError(f"--loss {word}: the term {term} is given twice")
        weights[term] = _parse("--loss", word, float)
    weights = {term: weight for term, weight in weights.items() if weight}
    if not weights:
        raise LossError("--loss: no term has a weight above 0, so there is nothing to train on")
    valid = {key: option for term in weights for key, option in term_options(term).items()}
    options = {key: option.default for key, option in valid.items() if option.default is not None}
    if temperature is not None:
        keys = [f"{term}.temperature" for term in terms_on(weights, "logits")]
        special += [f"{key}={temperature}" for key in keys if key in valid]
    for word in [*special, *loss_options]:
        key = word.partition("=")[0]
        _check_option(key, weights, valid)
        kind = valid[key].annotation
        options[key] = _parse("--loss-options", word, kind, kind is not float or key.endswith("temperature"))
    return weights, options


def _parse(flag, word, kind, positive=False):
    """The value of a word KEY=VALUE: one of a Literal's choices, or a number of at least 0, above 0 if positive."""
    key, _, text = word.partition("=")
    if get_origin(kind) is Literal:
        value, needed = text, f"one of {', '.join(get_args(kind))}"
        fits = text in get_args(kind)
    else:
        needed = ("a number " if kind is float else "a whole number ") + ("above 0" if positive else "of at least 0")
        try:
            value = float(text) if kind is float else int(text)
            fits = 0 <= value < math.inf and (value > 0 or not positive)
        except ValueError:
            fits = False
    if not fits:
        raise LossError(f"{flag} {word}: write {key}=VALUE with {needed}")
    return value


def _check_term(term):
    if term not in TERMS:
        raise LossError(f"--loss: there is no term {term!r}, choose from {', '.join(TERMS)}")


def _check_option(key, weights, valid):
    if key not in valid:
        choice = ", ".join(valid) or "none"
        raise LossError(f"--loss-options: the loss {loss_words(weights)} has no option {key!r}, choose from {choice}")


# ----------------------------------------------------------------------------------------------------- the weighted sum


def _by_task(value: Tensor | dict | None) -> dict | None:
    """Labels or a tensor of the one task "label" as {task: value}; a dict and None are left as they are."""
    return {"label": value} if isinstance(value, (Tensor, tuple)) else value


def _pairs(term, student, teacher):
    """{task, layer or output: (student's, teacher's tensor)} that a term compares in two model outputs."""
    output = TERMS[term].output
    if output == "logits":
        ours, theirs = task_logits(student), task_logits(teacher)
        if "distilled" in student:  # of a head of its own, see models.ImageModel
            ours = {"label": student["distilled"]}
        classes = [{task: logits.shape[1] for task, logits in side.items()} for side in (ours, theirs)]
        if classes[0] != classes[1] or not ours:
            raise LossError(f"the teacher has {_count(classes[1])}, the student {_count(classes[0])}")
        return {task: (ours[task], theirs[task]) for task in ours}
    if output == "features":
        ours, theirs = (out.get("features", {}) for out in (student, teacher))
        if len(ours) != len(theirs) or not ours:
            raise LossError(
                f"--student-layer names {len(ours)} layers and --teacher-layer {len(theirs)}: "
                "they are paired in order, give the same number (at least 1)"
            )
        return dict(zip(ours, zip(ours.values(), theirs.values())))
    sides = [name for name in ("img_proj", "txt_proj") if name in student and name in teacher]
    names = TERMS[term].both_sides and sides or [output]
    for model, out in (("student", student), ("teacher", teacher)):
        if names[0] not in out:
            raise LossError(f"the {model} gives no {output}, which the term {term} compares: leave it out of --loss")
    return {name: (student[name], teacher[name]) for name in names}


def _count(classes):
    """{task: number of classes} in words."""
    words = [f"{count} classes" + ("" if task == "label" else f" of {task}") for task, count in classes.items()]
    return ", ".join(words) or "none"


class DistillationLoss(nn.Module):
    """The weighted sum of terms, with the projectors that they need.

    weights: {term: float}, 0 leaves a term out; options: {"TERM.OPTION": value}, see `term_options`.
    cross_entropy: the term ce, (student, {task: labels}, {task: labels of the whole batch}) -> scalar, by default the
    plain one; see training.task_cross_entropy.  task_weights: {task: float}, of the terms on logits.
    gather: turns one process's rows (B, D) into those of all processes, for terms that compare images, in training.

    `build(student, teacher)` once, on the outputs of a dry batch, before optimizer, EMA and DDP see the parameters.
    `loss(student, teacher, labels)` then takes model outputs: `logits` (B, C) or `logits_<task>`, `embedding` (B, D),
    `tokens` (B, N, D), `features` {layer: (B, C_l, H_l, W_l)}, paired in order.  Labels are (B,) int64, three tensors
    of mixed images (see training.cross_entropy) or {task: either}; without them the term ce is left out.  `loss.terms`
    holds each term's value, unweighted and detached.
    The mean over equal parts of a batch (processes, accumulation) is the loss of the batch: `batch_labels`, those of
    the whole batch, make it so for class weights.  Accumulation's parts are compared each on its own.
    """

    def __init__(
        self,
        weights: dict[str, float],
        options: dict[str, Any] | None = None,
        *,
        cross_entropy: Callable | None = None,
        task_weights: dict[str, float] | None = None,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ):
        super().__init__()
        for term in weights:
            _check_term(term)
        self.weights = {term: float(weight) for term, weight in weights.items() if weight}
        self.options = options or {}
        valid = {key for term in weights for key in term_options(term)}
        for key in self.options:
            _check_option(key, weights, valid)
        self.task_weights = task_weights
        self.cross_entropy = cross_entropy or functools.partial(mean_cross_entropy, task_weights=task_weights)
        self.gather = gather
        self.compares = any(TERMS[term].compares_images for term in self.weights)  # a batch of one says nothing then
        self.losses = {term: self.with_options(term, TERMS[term].loss) for term in self.weights}
        self.projectors = nn.ModuleDict()  # {term: one for each pair}
        self.standardizers = nn.ModuleDict()  # {output: module that the teacher's goes through}, put in from outside
        self.share, self.terms = 1.0, {}

    def with_options(self, term: str, function: Callable) -> Callable:
        """The term's loss or projector with those of the options that it takes."""
        names = [name for name in inspect.signature(function).parameters if f"{term}.{name}" in self.options]
        return functools.partial(function, **{name: self.options[f"{term}.{name}"] for name in names})

    def warm_up(self, epoch: int, epochs: float) -> None:
        """From now on all terms but the cross-entropy have min(1, epoch / epochs) of their weights; epochs 0: all.

        In training alone, per epoch from 1 on, as in the code of DKD (arXiv:2203.08679), whose large weight drowns the
        labels of an untrained student.
        """
        self.share = min(1.0, epoch / epochs) if epochs else 1.0

    @torch.no_grad()
    def build(self, student: dict, teacher: dict) -> None:
        """Make the projectors and compute each term once, so that outputs which do not fit are a LossError now."""
        teacher = self.standardized(teacher)
        for term in self.weights:
            row = TERMS[term]
            if row.projector:
                projector, axis = self.with_options(term, row.projector), 1 if row.output == "features" else -1
                self.projectors[term] = nn.ModuleList(
                    projector(s.shape[axis], t.shape[axis]).to(_float32(s)[0])  # its device, and float64 where it is
                    for s, t in _pairs(term, student, teacher).values()
                )
            if row.output != "labels":
                self.term(term, student, teacher)

    def forward(
        self,
        student: dict,
        teacher: dict,
        labels: Tensor | dict | None = None,
        batch_labels: Tensor | dict | None = None,
        local_crops: Tensor | None = None,
        ce: bool = True,
    ) -> Tensor:
        """ce False: without the cross-entropy.  local_crops: the student's class tokens (N, B, D) of N local crops of
        each image, for the term cls; the rows of the other outputs are G global crops of B images, crop after crop."""
        total, share, self.terms = torch.zeros(()), self.share if self.training else 1.0, {}
        teacher, targets = self.standardized(teacher), _by_task(labels)
        for term, weight in self.weights.items():
            if term != "ce":
                value, weight = self.term(term, student, teacher, targets), share * weight
            elif ce and targets is not None:
                value = self.cross_entropy(student, targets, _by_task(batch_labels))
            else:
                continue
            total = total + weight * value
            self.terms[term] = value.detach()
        if local_crops is not None:
            value = self.local(local_crops, teacher["embedding"])
            total = total + share * self.weights["cls"] * value
            self.terms["local"] = value.detach()
        return total

    def standardized(self, teacher: dict) -> dict:
        """The teacher's outputs behind `standardizers`."""
        return {**teacher, **{name: module(teacher[name]) for name, module in self.standardizers.items()}}

    def term(self, term: str, student: dict, teacher: dict, labels: dict | None = None) -> Tensor:
        """The value of a term, without its weight; labels: {task: (B,)}, by default none are known."""
        row, values = TERMS[term], {}
        for number, (name, (s, t)) in enumerate(_pairs(term, student, teacher).items()):
            if row.projector:
                s, t = self.project(term, s, t, number)
            if row.compares_images and self.training:  # each image has its gradient, see the gather of distributed.py
                s, t = self.gather(s), self.gather(t)
            queue = getattr(self.projectors[term][number], "queue", None) if row.projector else None
            if queue is not None:
                t = torch.cat([t.to(queue), queue])
                if self.training and torch.is_grad_enabled():  # not of a dry batch
                    queue.copy_(t[: len(queue)])
            pair = [s, t]
            if row.uses_labels:
                if labels and not isinstance(labels[name], Tensor):
                    raise LossError(f"the term {term} needs one class an image, mixed images have two")
                pair.append(torch.full((len(s),), -1, device=s.device) if labels is None else labels[name])
            values[name] = self.losses[term](*pair)
        return task_mean(values, self.task_weights if row.output == "logits" else None)

    def project(self, term: str, student: Tensor, teacher: Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
        """A pair of tensors behind the term's projector, in float32."""
        projector = self.projectors[term][number]
        with torch.autocast(student.device.type, enabled=False):
            student = student.to(next(projector.parameters()).dtype)
            if not isinstance(projector, EmbeddingProjectors):
                return projector(student), teacher
            pair = projector(student, teacher)
            self.terms.update(projector.variances)
            return pair

    def local(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Class tokens (N, B, D_s) of N local crops against the teacher's (G * B, D_t) of G global ones: mean over all
        pairs of an image."""
        student, teacher = self.project("cls", student, teacher.unflatten(0, (-1, student.shape[1])))
        return normalized_mse(*torch.broadcast_tensors(student[:, None], teacher[None]))  # (N, G, B, D_t)

    def collapsed(self, means: dict) -> str | None:
        """The warning of `EmbeddingProjectors`, or None; means: {term: its mean over an epoch}."""
        return self.projectors["embedding"][0].collapsed(means) if "embedding" in self.projectors else None
