"""Several teachers of one student: the flags, outputs and loss of each; and outputs that are standardized over train.

    sources = [...]                                     # of each, see teacher.Source
    source = join(sources, [2.0, 1.0])                  # targets(batch) -> {"_1": outputs, "_2": outputs}
    criterion = SeveralLosses(make, [2.0, 1.0])         # make() -> DistillationLoss; then build it and call it as one
    standardize(criterion, "phi-s", map(source.targets, batches))

Needs losses.py and run.py of `common` and torch (embeddings.py for several stores).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from common.losses import TERMS, DistillationLoss, LossError, loss_words, terms_on
from common.run import UserError, gather_objects, optional, world_size

OF_A_MODEL = ("teacher_resolution", "teacher_pooling")  # flags that stores have not
IMAGES = 4096  # of train, as they are shown in epoch 1, whose outputs tell mean and spread


# --------------------------------------------------------------------------------------------------------------- flags


def listed(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def shared_out(flags: dict, name: str, count: int, what: str) -> list:
    """A flag's value for each of `count` teachers, of which it has one for all or one for each.  Raises UserError."""
    values = listed(flags[name]) or [None]
    if len(values) not in (1, count):
        given = f"--{name.replace('_', '-')} {' '.join(map(str, values))}"
        raise UserError(f"{given}: give one value for all {what} or one for each, there are {count}")
    return values if len(values) == count else values * count


def flags_of_each(flags: dict, kinds: Sequence[str], student_layers: int) -> list[dict]:
    """The flags of each teacher, in the order of kinds; those of another kind are off.  Raises UserError.

    flags: teacher.TEACHER_FLAGS, lists where several values are given; kinds: teacher.TEACHER_KINDS; student_layers:
    how many --student-layer names: as many of --teacher-layer are for all, else they are those of one teacher after
    another.
    """
    named = [(kind, value) for kind in kinds for value in listed(flags[kind])]
    live, models = (
        sum(kind in some for kind, _ in named) for some in (("teacher_checkpoint", "teacher_model"), ("teacher_model",))
    )
    layers = flags["teacher_layer"]
    one_each = len(layers) == student_layers * live
    settings = {
        **{name: shared_out(flags, name, live, "teachers that are run") for name in OF_A_MODEL},
        "teacher_layer": [layers[i * student_layers :][:student_layers] if one_each else layers for i in range(live)],
    }
    settings = iter([dict(zip(settings, values)) for values in zip(*settings.values())])
    weights, result = iter(shared_out(flags, "teacher_weights", models, "--teacher-model")), []
    for kind, value in named:
        own = {**flags, **dict.fromkeys(kinds), kind: value}
        if kind != "teacher_embeddings":
            own.update(next(settings), num_views=flags["num_views"] if len(named) == live else None)
        elif live:
            own.update(dict.fromkeys(OF_A_MODEL))
        if kind == "teacher_model":
            own["teacher_weights"] = next(weights)
        elif models:
            own.update(teacher_pretrained=False, teacher_weights=None)
        result.append(own)
    return result


def check_stores(stores: list[dict], names: Sequence[str], num_views: int | None) -> None:
    """Refuse stores of other data or views than the first's; names: the flags of the data.  Raises UserError."""
    keys = ("dataset", *names, "seed", *(() if num_views else ("num_views",)))

    def described(store):  # an older store lacks flags and settings that are newer, which were off then
        given = {key: store.meta.get(key) for key in keys}
        given = {key: None if value is False else value for key, value in given.items()}
        return {**given, "policy": store.policy.to_dict()}

    metas = [described(one["train"]) for one in stores]
    for one, meta in zip(stores[1:], metas[1:]):
        differs = optional("common.embeddings", "--teacher-embeddings").difference(metas[0], meta)
        if differs:
            raise UserError(
                f"{one['train'].folder} and {stores[0]['train'].folder} cannot teach together, they were made with "
                f"other flags ({differs})" + ": --num-views K uses the first K" * differs.startswith("num_views")
            )


# ------------------------------------------------------------------------------------------------------------- outputs


def mean_logits(logits: list[Tensor], shares: Sequence[float]) -> Tensor:
    """Log of the mean of these softmaxes, weighted by shares: logits (B, C) whose softmax is the mean."""
    total = sum(shares)
    parts = [one.float().log_softmax(1) + math.log(share / total) for one, share in zip(logits, shares)]
    return torch.stack(parts).logsumexp(0)


def logits_of(outputs: dict) -> dict:
    """{name: (B, C)} of a model's output: `logits`, or `logits_<task>` of each."""
    return {name: value for name, value in outputs.items() if name.split("_")[0] == "logits"}


def join(sources: list, shares: Sequence[float]):
    """One teacher.Source of several: outputs {"_1": of the first, ...}, without logits of other classes.

    Its `logits`, which the student's fidelity is measured against, are `mean_logits` of those that know the data's.
    """
    parts = []
    for number, one in enumerate(sources, 1):
        lines = [f"teacher {number}{line.removeprefix('teacher')}" for line in one.title.splitlines()]
        parts.append(one._replace(title="\n".join(lines)))

    def targets(batch, split="train"):
        outputs = {f"_{number}": one.targets(batch, split) for number, one in enumerate(parts, 1)}
        for key, one in zip(outputs, parts):
            dropped = () if one.has_head else logits_of(outputs[key])
            outputs[key] = {name: value for name, value in outputs[key].items() if name not in dropped}
        return outputs

    def choose_view(batch):
        chosen = dict(batch)
        for one in parts:  # stores come last, and show the same view
            chosen.update(one.choose_view(batch))
        return chosen

    @functools.cache
    def logits(split, loader):
        known = [(one.logits(split, loader), share) for one, share in zip(parts, shares)]
        known = [pair for pair in known if pair[0] is not None]
        return {
            task: mean_logits(
                [torch.from_numpy(values[task]) for values, _ in known], [share for _, share in known]
            ).numpy()
            for task in (known[0][0] if known else ())
        } or None

    described = {
        "name": " + ".join(one.described["name"] for one in parts),
        "sha256": [one.described["sha256"] for one in parts],
        "shares": [share / sum(shares) for share in shares],
        "teachers": [one.described for one in parts],
    }
    return parts[0]._replace(
        targets=targets,
        choose_view=choose_view,
        logits=logits,
        described=described,
        has_head=any(one.has_head for one in parts),
        parts=tuple(parts),
    )


# ---------------------------------------------------------------------------------------------------------------- loss


class SeveralLosses(nn.Module):
    """The cross-entropy once, and the other terms against each teacher, weighted by its share; used as a
    `DistillationLoss`.

    make: () -> DistillationLoss of all terms; each teacher gets one, with projectors of its own.  shares: of each
    teacher, which are divided by their sum over the teachers that have the term: one whose outputs hold no logits has
    none of the terms on logits.  average: "terms": mean of the terms on logits; "probabilities": the terms on
    `mean_logits`.  `terms` holds "kl_1", "kl_2", ..., or of what is not of one teacher "ce", "kl".
    """

    def __init__(self, make: Callable[[], DistillationLoss], shares: Sequence[float], average: str = "terms"):
        super().__init__()
        self.common, self.teachers = make(), nn.ModuleList(make() for _ in shares)
        self.shares, self.average, self.terms, self.compares = shares, average, {}, self.common.compares

    @torch.no_grad()
    def build(self, student: dict, teachers: dict) -> None:
        """As DistillationLoss.build; teachers: {name: outputs} of each.  Raises LossError, which names the teacher."""
        weights, on_logits = self.common.weights, terms_on(self.common.weights, "logits")
        knowing = [bool(logits_of(outputs)) for outputs in teachers.values()]
        if on_logits and not any(knowing):
            raise LossError(f"no teacher knows the data's classes, which {' and '.join(on_logits)} compares")
        common = {"ce", *(on_logits if self.average == "probabilities" else ())}
        for number, (loss, knows) in enumerate(zip(self.teachers, knowing), 1):
            loss.weights = {t: w for t, w in weights.items() if t not in common and (knows or t not in on_logits)}
            if not loss.weights and not (knows and common & {*on_logits}):
                raise LossError(
                    f"teacher {number} has no part in the loss {loss_words(weights)}: its classes are not the data's, "
                    "and no term is on anything else"
                )
        self.common.weights = {term: weight for term, weight in weights.items() if term in common}
        for term in {*weights} - common:
            having = [(loss, share) for loss, share in zip(self.teachers, self.shares) if term in loss.weights]
            for loss, share in having:
                loss.weights[term] *= share / sum(share for _, share in having)
        self.common.build(student, self.mean(teachers))
        for number, (loss, outputs) in enumerate(zip(self.teachers, teachers.values()), 1):
            try:
                loss.build(student, outputs)
            except LossError as error:
                raise LossError(f"teacher {number}: {error}") from None

    def mean(self, teachers: dict) -> dict:
        """The logits that all teachers' terms share, see `average`."""
        if self.average == "terms":
            return {}
        known = [(logits_of(outputs), share) for outputs, share in zip(teachers.values(), self.shares)]
        known = [pair for pair in known if pair[0]]
        shares = [share for _, share in known]
        return {name: mean_logits([logits[name] for logits, _ in known], shares) for name in known[0][0]}

    def forward(
        self,
        student: dict,
        teachers: dict,
        labels: Tensor | dict | None = None,
        batch_labels: Tensor | dict | None = None,
        local_crops: Tensor | None = None,
        ce: bool = True,
    ) -> Tensor:
        """As DistillationLoss.forward; teachers: {name: outputs} of each."""
        total = self.common(student, self.mean(teachers), labels, batch_labels, ce=ce)
        self.terms = dict(self.common.terms)
        for name, loss, outputs in zip(teachers, self.teachers, teachers.values()):
            total = total + loss(student, outputs, labels, local_crops=local_crops)
            self.terms.update({f"{term}{name}": value for term, value in loss.terms.items()})
        return total

    def warm_up(self, epoch: int, epochs: float) -> None:
        """As DistillationLoss.warm_up."""
        for loss in (self.common, *self.teachers):
            loss.warm_up(epoch, epochs)

    def collapsed(self, means: dict) -> str | None:
        """As DistillationLoss.collapsed, of each teacher."""
        warnings = []
        for number, loss in enumerate(self.teachers, 1):
            own = {name.removesuffix(f"_{number}"): mean for name, mean in means.items() if name.endswith(f"_{number}")}
            warnings.append((number, loss.collapsed(own)))
        return "; ".join(f"teacher {number}: {words}" for number, words in warnings if words) or None


# ----------------------------------------------------------------------------------------------------- standardization


def equal_variances(covariance: Tensor) -> Tensor:
    """Rotation (D, D), float64, of the axes of this covariance to axes of which each has the mean variance.

    Of PHI-S, Ranzinger et al. 2024, arXiv:2410.01680: the principal axes behind a Hadamard matrix, whose entries have
    one size.  It exists for D of a power of two; of another D the largest such factor of it is taken, and rotations in
    planes of the smallest and the largest variance, of which each makes one of the two the mean, do the rest.
    """
    size, hadamard = len(covariance), torch.ones(1, 1, dtype=torch.float64)
    while size % (2 * len(hadamard)) == 0:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    rest = torch.eye(size // len(hadamard), dtype=torch.float64)
    rotation = torch.kron(hadamard / math.sqrt(len(hadamard)), rest) @ torch.linalg.eigh(covariance)[1].T
    rotated, mean = rotation @ covariance @ rotation.T, float(covariance.trace()) / size
    for _ in range(size):
        variances = rotated.diagonal() - mean
        low, high = int(variances.argmin()), int(variances.argmax())
        a, b, c = (float(value) for value in (variances[low], rotated[low, high], variances[high]))
        if min(-a, c) <= 1e-12 * mean:
            break
        tangent = (b - math.copysign(math.sqrt(b * b - a * c), b)) / c  # of a - 2 b t + c t^2 = 0 the smaller root
        cosine = 1 / math.hypot(1, tangent)
        turn = torch.tensor([[1, -tangent], [tangent, 1]], dtype=torch.float64) * cosine
        pair = [low, high]
        rotation[pair], rotated[pair] = turn @ rotation[pair], turn @ rotated[pair]
        rotated[:, pair] = rotated[:, pair] @ turn.T
    return rotation


class Standardizer(nn.Module):
    """A teacher's embeddings or tokens (..., D), less their mean, times `scale`: (D,) of the channels or (D, D).

    channel: 1 / the standard deviation of each.  phi-s: a rotation and one scale, after which each channel has variance
    1, and angles and the ratios of distances are those of the centred outputs.  Till `fit` it changes nothing.
    """

    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind, self.sums = kind, [0, 0.0, 0.0]
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width) if kind == "channel" else torch.eye(width))

    def forward(self, outputs: Tensor) -> Tensor:
        with torch.autocast(outputs.device.type, enabled=False):
            centred = outputs.to(self.mean.dtype) - self.mean
            return centred * self.scale if self.kind == "channel" else centred @ self.scale.T

    def add(self, outputs: Tensor) -> None:
        """Count outputs for `fit`."""
        rows = outputs.flatten(0, -2)
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # which has no float64
        products = rows.square().sum(0) if self.kind == "channel" else rows.T @ rows
        self.sums = [a + b for a, b in zip(self.sums, (len(rows), rows.sum(0).cpu(), products.cpu()))]

    def fit(self) -> None:
        """Mean and scale of all outputs that were added, in any process.  Raises LossError where they do not vary."""
        count, total, products = (sum(parts[1:], parts[0]) for parts in zip(*gather_objects(self.sums)))
        mean, self.sums = total / count, [0, 0.0, 0.0]
        if self.kind == "channel":
            variances = products / count - mean.square()
            scale = variances.clamp(min=1e-6 * float(variances.mean())).rsqrt()  # a dead channel is not blown up
        else:
            covariance = products / count - mean[:, None] * mean
            variances, scale = covariance.diagonal(), equal_variances(covariance)
            scale = scale / variances.mean().sqrt()
        if not variances.mean() > 1e-12 * mean.square().mean():
            raise LossError("a teacher's outputs are the same for all images: --standardize-teachers has no spread")
        self.mean.copy_(mean), self.scale.copy_(scale)


@torch.no_grad()
def standardize(
    criterion: nn.Module, kind: str, outputs: Iterable[dict], saved: dict | None = None, images: int = IMAGES
) -> None:
    """Give a loss, before it is built, what standardizes each teacher's outputs that its terms compare.

    criterion: DistillationLoss or SeveralLosses; kind: see `Standardizer`; outputs: of the teacher or {name: of each},
    batch after batch of train, until `images` rows of all processes were seen (0: none, nothing is fitted); saved: a
    criterion's state, whose mean and scale are taken instead.
    """
    alone, outputs, seen = isinstance(criterion, DistillationLoss), iter(outputs), 0
    losses = [criterion] if alone else list(criterion.teachers)
    first = next(outputs)
    for loss, said in zip(losses, [first] if alone else first.values()):
        for name in standardized_outputs(loss.weights):
            if name in said:
                loss.standardizers[name] = Standardizer(kind, said[name].shape[-1]).to(said[name].device)
    if saved is not None:
        criterion.load_state_dict({key: value for key, value in saved.items() if "standardizers." in key}, strict=False)
        return
    for batch in itertools.chain([first], outputs) if images else ():
        for loss, said in zip(losses, [batch] if alone else batch.values()):
            for name, standardizer in loss.standardizers.items():
                standardizer.add(said[name])
                rows = len(said[name]) * world_size()
        seen += rows
        if seen >= images:
            break
    for standardizer in (one for loss in losses for one in loss.standardizers.values() if images):
        standardizer.fit()


def standardized_outputs(terms: Iterable[str]) -> list[str]:
    """The outputs that these terms compare and that can be standardized."""
    outputs = {TERMS[term].output for term in terms if not TERMS[term].both_sides}
    return sorted(outputs & {"embedding", "tokens"})
