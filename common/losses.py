"""Losses of knowledge distillation.  Needs torch alone and no other file of `common`.

Every function returns one scalar in float32, whatever the autocast, and takes (B, ...) tensors.  `DistillationLoss`
is the weighted sum of them that a method names.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

TERMS = ("ce", "kl", "feature", "embedding", "cls", "patch")
# Weights a published combination sets, others are 0; --ce-weight, --kl-weight, ... override one by one, 0 leaves a term out.
METHODS = {
    "response": {"ce": 0.5, "kl": 0.5},  # Hinton et al. 2015, arXiv:1503.02531
    "feature": {"ce": 0.5, "kl": 0.5, "feature": 1.0},  # the same and a hint, Romero et al. 2015, arXiv:1412.6550
    "feature_matching": {"ce": 0.5, "feature": 0.5},  # with labels, intermediate maps of Swins and ViTs in place of logits
    "embedding": {"ce": 1.0, "embedding": 1.0},  # stored or live embeddings in a shared space, with labels; --ce-weight 0 without
    "tokens": {"cls": 1.0, "patch": 0.5},  # without labels: class token and patch tokens
}
ALPHA = {"response": ("ce", "kl"), "feature": ("ce", "kl"), "feature_matching": ("feature", "ce")}  # alpha weighs the first, 1 - alpha the second
FEATURE_LOSSES = ("mse", "cosine")
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
    labels: (N,) of train.
    """
    if spec == "none":
        return None
    if spec == "balanced":
        counts = torch.bincount(torch.as_tensor(labels), minlength=num_classes)
        if not counts.all():
            raise LossError(f"--class-weights balanced: class number {int((counts == 0).nonzero()[0])} has no image in train")
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

    batch_labels: those of the whole batch where `labels` are one process's or one step's part of it.  Its mean weight
    is the divisor, so that the mean over equal parts is the weighted mean of the whole.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if weights is None:
            return F.cross_entropy(*_float32(logits), labels, label_smoothing=label_smoothing)
        logits, weights = *_float32(logits), weights.to(logits)
        losses = F.cross_entropy(logits, labels, weights, label_smoothing=label_smoothing, reduction="none")
        return losses.mean() / weights[labels if batch_labels is None else batch_labels].mean()


def temperature_kl(student_logits, teacher_logits, temperature=4.0):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), summed over classes, averaged over the batch.

    `batchmean`, not `mean`: the latter is C times smaller.  T^2 always, so that the gradient does not shrink with T.
    Both logits (B, C).  Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = _float32(student_logits, teacher_logits)
        student = F.log_softmax(student / temperature, dim=1)
        teacher = F.log_softmax(teacher / temperature, dim=1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


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


def embedding_loss(student, teacher, lambda_feat=1.0, lambda_cos=1.0):
    """lambda_feat * ||t - s||^2 + lambda_cos * (1 - cos(t, s)) of embeddings (B, D) of equal width.

    The squared error is summed over dimensions, both terms are averaged over the batch.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = _float32(student, teacher)
        squared = (teacher - student).square().sum(1).mean()
        return lambda_feat * squared + lambda_cos * (1 - F.cosine_similarity(student, teacher, dim=1)).mean()


def normalized_mse(student, teacher):
    """Squared distance of vectors (..., D) scaled to unit length, 2 - 2 cosine: summed over D, averaged over the vectors.

    Not over D too: values and gradients some hundred times smaller would drown in AdamW's eps and the log's digits.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = (F.normalize(x, dim=-1) for x in _float32(student, teacher))
        return (student - teacher).square().sum(-1).mean()


def resize_grid(tokens, count):
    """Tokens (B, N, D) of a square grid, row by row, as `count` tokens: bilinear, antialiased where it shrinks.  Raises LossError."""
    if tokens.shape[1] == count:
        return tokens
    sides = [math.isqrt(n) for n in (tokens.shape[1], count)]
    if [side * side for side in sides] != [tokens.shape[1], count]:
        raise LossError(f"the teacher's {tokens.shape[1]} patch tokens and the student's {count} are no two square grids: change a resolution")
    grid = _float32(tokens)[0].transpose(1, 2).unflatten(2, (sides[0], sides[0]))
    grid = F.interpolate(grid, (sides[1], sides[1]), mode="bilinear", align_corners=False, antialias=sides[1] < sides[0])
    return grid.flatten(2).transpose(1, 2)


def orthogonal(rows, columns, seed=0):
    """(rows, columns) with orthonormal rows, or columns where there are fewer of them; the same for a seed everywhere."""
    values = torch.randn(max(rows, columns), min(rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = torch.linalg.qr(values)[0].float()
    return q if rows >= columns else q.T


class EmbeddingProjectors(nn.Module):
    """Linear maps of student (B, D_s) and teacher (B, D_t) into a space of shared_dim.

    teacher: identity, shared_dim is D_t then; frozen-orthogonal, a fixed random projection; learned.  A learned one can
    fall to a constant together with the student's, which costs nothing: watch the variance.
    """

    def __init__(self, student_dim, teacher_dim, shared_dim=None, teacher="identity"):
        super().__init__()
        if teacher == "identity" and shared_dim not in (None, teacher_dim):
            raise LossError(f"--shared-dim {shared_dim} with --teacher-projector identity: the teacher's width is {teacher_dim}")
        shared_dim = shared_dim or teacher_dim
        self.student = nn.Linear(student_dim, shared_dim)
        self.teacher = nn.Identity() if teacher == "identity" else nn.Linear(teacher_dim, shared_dim, bias=teacher == "learned")
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
    "lambda_feat", "lambda_cos"}, see EmbeddingProjectors and embedding_loss; temperature: of the KL; feature_loss: "mse" or "cosine".

    `build(student, teacher)` once, on outputs of a dry batch and before optimizer, EMA and DDP see the parameters,
    makes a 1x1 projector from the student's width to the teacher's for each pair of features.
    `loss(student, teacher, labels)` (labels None: without cross-entropy): model outputs (`logits` (B, C), `features` {layer: (B, C_l, H_l, W_l)}, paired in
    order) and (B,) int64 labels -> scalar; `loss.terms` holds each term's value, unweighted and detached.
    local: class tokens (N, B, D) of N local crops of each image, for the term cls, where the others' rows are G global
    crops of B images, crop after crop.
    The mean over equal parts of a batch (processes, accumulation) is the loss of the batch; `batch_labels`, those of
    the whole batch, make it so for class weights.  A term that compares samples must gather the parts first.
    """

    def __init__(self, weights, temperature=4.0, feature_loss="mse", label_smoothing=0.0, class_weights=None, embedding=None):
        super().__init__()
        if not 0 < temperature < math.inf:
            raise LossError(f"--temperature {temperature} is no number above 0")
        self.weights = {name: float(value) for name, value in weights.items() if value}
        self.temperature, self.label_smoothing, self.class_weights = temperature, label_smoothing, class_weights
        self.feature_term = {"mse": feature_mse, "cosine": feature_cosine}[feature_loss]
        self.projectors = nn.ModuleList()
        self.embedding = {"shared_dim": None, "teacher": "identity", "lambda_feat": 1.0, "lambda_cos": 1.0, **(embedding or {})}
        self.embedding_projectors = None
        self.token_projectors = nn.ModuleDict()
        self.terms = {}

    def build(self, student, teacher):
        if "kl" in self.weights and student["logits"].shape != teacher["logits"].shape:
            raise LossError(
                f"the teacher has {teacher['logits'].shape[1]} classes, the student {student['logits'].shape[1]}"
            )
        if "embedding" in self.weights:
            widths = (out["embedding"].shape[1] for out in (student, teacher))
            self.embedding_projectors = EmbeddingProjectors(*widths, self.embedding["shared_dim"], self.embedding["teacher"])
            self.embedding_projectors.to(student["embedding"].device)
            self.embedded(student["embedding"], teacher["embedding"])
            self.first_variance = float(self.terms["teacher_variance"])
        for term, key in (("cls", "embedding"), ("patch", "tokens")):
            if term in self.weights:
                self.token_projectors[term] = nn.Linear(student[key].shape[-1], teacher[key].shape[-1]).to(student[key].device)
        if "patch" in self.weights:
            resize_grid(teacher["tokens"], student["tokens"].shape[1])  # refuses grids that cannot be aligned
        if "feature" not in self.weights:
            return
        students, teachers = (list(out.get("features", {}).values()) for out in (student, teacher))
        if len(students) != len(teachers) or not students:
            raise LossError(
                f"--student-layer names {len(students)} layers and --teacher-layer {len(teachers)}: "
                "the feature term pairs them in order, give the same number (at least 1)"
            )
        for s, t in zip(students, teachers):
            self.projectors.append(nn.Conv2d(s.shape[1], t.shape[1], 1).to(s.device))

    def forward(self, student, teacher, labels, batch_labels=None, local=None):
        loss, self.terms = 0.0, {}
        for name, weight in self.weights.items():
            if name == "ce" and labels is None:
                continue
            if name == "ce":
                term = cross_entropy(student["logits"], labels, self.label_smoothing, self.class_weights, batch_labels)
            elif name == "kl":
                term = temperature_kl(student["logits"], teacher["logits"], self.temperature)
            elif name == "feature":
                term = self.feature(student["features"], teacher["features"])
            elif name == "embedding":
                term = self.embedded(student["embedding"], teacher["embedding"])
            elif name == "cls":
                term = normalized_mse(self.projected("cls", student["embedding"]), teacher["embedding"])
            elif name == "patch":
                tokens = self.projected("patch", student["tokens"])
                term = normalized_mse(tokens, resize_grid(teacher["tokens"], tokens.shape[1]))
            loss = loss + weight * term
            self.terms[name] = term.detach()
        if local is not None:
            term = self.local(local, teacher["embedding"])
            loss = loss + self.weights["cls"] * term
            self.terms["local"] = term.detach()
        return loss

    def local(self, student, teacher):
        """Class tokens (N, B, D_s) of N local crops against the teacher's (G * B, D_t) of G global ones: mean over all pairs of an image."""
        student, teacher = self.projected("cls", student), teacher.unflatten(0, (-1, student.shape[1]))
        return normalized_mse(*torch.broadcast_tensors(student[:, None], teacher[None]))  # (N, G, B, D_t)

    def projected(self, term, student):
        """The student's class token or patch tokens (..., D_s) in the teacher's width, in float32."""
        with torch.autocast(student.device.type, enabled=False):
            return self.token_projectors[term](student.to(self.token_projectors[term].weight.dtype))

    def embedded(self, student, teacher):
        """The loss in the shared space; notes the variance there, mean over dimensions: near 0 all images look alike."""
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
            return (f"the learned projectors collapse: the teacher's variance in the shared space fell from {self.first_variance:.3g} to "
                    f"{teacher:.3g}, so all images look alike there; --teacher-projector identity or frozen-orthogonal cannot")  # fmt: skip
        if student < 0.1 * COLLAPSED * teacher:
            return f"the student's embedding hardly differs between images (variance {student:.3g}, the teacher's {teacher:.3g}): it follows nothing yet"
        return None

    def feature(self, student, teacher):
        """Mean of the feature loss over the pairs of layers, the student's maps projected to the teacher's width."""
        with torch.autocast(self.projectors[0].weight.device.type, enabled=False):
            terms = [
                self.feature_term(projector(s.to(projector.weight.dtype)), t)
                for projector, s, t in zip(self.projectors, student.values(), teacher.values(), strict=True)
            ]
        return torch.stack(terms).mean()
