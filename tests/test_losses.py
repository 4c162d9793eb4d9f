"""Every loss against a formula written out here, in float64, gradients included; the traps of PITFALLS."""

import math

import numpy as np
import pytest
import torch

from common.losses import (
    METHODS,
    TERMS,
    DistillationLoss,
    EmbeddingProjectors,
    LossError,
    class_weights,
    cross_entropy,
    decoupled_kl,
    embedding_loss,
    feature_cosine,
    feature_mse,
    method_weights,
    orthogonal,
    same_size,
    task_accuracy,
    temperature_kl,
)
from common.models import build_model

B, C = 5, 7


def full(**given):
    """The weights of all terms: those that are not given are 0."""
    return {**dict.fromkeys(TERMS, 0.0), **given}


def rand(*shape, seed=0, scale=1.0, grad=False):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.requires_grad_(grad)


LABELS = torch.tensor([0, 3, 6, 3, 1])


# ---------------------------------------------------------------------------------------- formulas, in plain Python


def softmax_row(row, temperature=1.0):
    exps = [math.exp((v - max(row)) / temperature) for v in row]
    return [e / sum(exps) for e in exps]


def ce_by_hand(logits, labels, smoothing=0.0):
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        for c, p in enumerate(softmax_row(row)):
            target = smoothing / len(row) + (1 - smoothing) * (c == label)
            total -= target * math.log(p)
    return total / len(labels)


def kl_by_hand(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        p, q = softmax_row(t, temperature), softmax_row(s, temperature)
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
    return temperature**2 * total / len(student)


def pool_by_hand(maps, size):
    """Means over windows floor(i * n / s) to ceil((i + 1) * n / s)."""
    height, width = maps.shape[-2:]
    rows = []
    for i in range(size[0]):
        top, bottom = i * height // size[0], -(-(i + 1) * height // size[0])
        row = []
        for j in range(size[1]):
            left, right = j * width // size[1], -(-(j + 1) * width // size[1])
            row.append(maps[:, :, top:bottom, left:right].sum((2, 3)) / ((bottom - top) * (right - left)))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def feature_by_hand(kind, student, teacher, projector):
    weight, bias = projector.weight[:, :, 0, 0], projector.bias
    student = torch.einsum("bchw,dc->bdhw", student, weight) + bias[:, None, None]
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:])]
    student, teacher = pool_by_hand(student, size), pool_by_hand(teacher, size)
    if kind == "mse":
        return ((student - teacher) ** 2).sum() / teacher.numel()
    dots = (student * teacher).sum(1)  # (B, H, W)
    lengths = (student**2).sum(1).sqrt() * (teacher**2).sum(1).sqrt()
    return (1 - dots / lengths).sum() / dots.numel()


# --------------------------------------------------------------------------------------------------- cross-entropy, KL


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    logits = rand(B, C, grad=True)
    loss = cross_entropy(logits, LABELS, smoothing)
    assert loss.item() == pytest.approx(ce_by_hand(logits, LABELS, smoothing), rel=1e-12)
    loss.backward()
    target = torch.full((B, C), smoothing / C, dtype=torch.float64)
    target[torch.arange(B), LABELS] += 1 - smoothing
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(1) - target) / B, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_temperature_kl(temperature):
    student, teacher = rand(B, C, scale=3, grad=True), rand(B, C, seed=1, scale=3)
    loss = temperature_kl(student, teacher, temperature)
    assert loss.item() == pytest.approx(kl_by_hand(student, teacher, temperature), rel=1e-10)
    loss.backward()  # closed form: T * (softmax(s / T) - softmax(t / T)) / B, which does not shrink with T
    expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)) / B
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-9, atol=1e-14)


def test_kl_is_averaged_over_the_batch_and_summed_over_classes():
    student, teacher = rand(1, C), rand(1, C, seed=1)
    one = temperature_kl(student, teacher).item()
    assert temperature_kl(student.repeat(9, 1), teacher.repeat(9, 1)).item() == pytest.approx(one, rel=1e-12)
    # the same two classes among 98 that neither believes in: `mean` would divide by 100
    pad = torch.full((1, 98), -1e3, dtype=torch.float64)
    few, many = rand(1, 2), rand(1, 2, seed=1)
    wide = temperature_kl(torch.cat([few, pad], 1), torch.cat([many, pad], 1))
    assert wide.item() == pytest.approx(temperature_kl(few, many).item(), rel=1e-12)


def test_kl_goes_from_teacher_to_student():
    """KL((0.9, 0.1) || (0.5, 0.5)) = 0.9 ln 1.8 + 0.1 ln 0.2; the other way it is 0.5 ln(0.5 / 0.9) + 0.5 ln 5."""
    teacher, student = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.9, 0.1], [0.5, 0.5]))
    assert temperature_kl(student, teacher, 1.0).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))


def test_large_margins_stay_finite():
    """log(softmax) would be -inf.  Teacher (1, 0) against a student certain of the other: 16 * 1e4 / 4 by hand."""
    student = torch.tensor([[0.0, 1e4]], requires_grad=True)
    loss = temperature_kl(student, torch.tensor([[1e4, 0.0]]), 4.0)
    assert loss.item() == pytest.approx(40000, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-4.0, 4.0]]))
    assert cross_entropy(student, torch.tensor([0])).item() == pytest.approx(1e4)
    assert temperature_kl(student, student.detach()).item() == 0


def test_float32_scalars_under_autocast():
    """bfloat16 model outputs give exactly the float32 loss of those numbers, inside autocast and outside."""
    logits, taught = (rand(B, C, seed=s, scale=20).to(torch.bfloat16) for s in (0, 1))
    maps, guide = (rand(B, 6, 9, 9, seed=s).to(torch.bfloat16) for s in (2, 3))
    projected = DistillationLoss({"feature": 1.0})
    projected.build({"features": {"a": maps}}, {"features": {"b": guide[:, :4]}})
    terms = [
        lambda cast: cross_entropy(cast(logits), LABELS, 0.1),
        lambda cast: temperature_kl(cast(logits), cast(taught)),
        lambda cast: feature_mse(cast(maps), cast(guide)[..., :4, :4]),
        lambda cast: feature_cosine(cast(maps), cast(guide)[..., :4, :4]),
        lambda cast: projected({"features": {"a": cast(maps)}}, {"features": {"b": cast(guide)[:, :4]}}, LABELS),
    ]
    for term in terms:
        exact = term(lambda tensor: tensor.float())
        assert exact.dtype == torch.float32 and exact.dim() == 0
        assert torch.equal(term(lambda tensor: tensor), exact)
        with torch.autocast("cpu", torch.bfloat16):
            inside = term(lambda tensor: tensor)
        assert inside.dtype == torch.float32 and torch.equal(inside, exact)


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("shape", [(8, 8), (4, 4), (7, 5), (1, 1)])
def test_same_size_pools_the_larger_map(shape):
    student, teacher = rand(2, 3, *shape), rand(2, 6, 4, 4, seed=1)
    small = [min(a, 4) for a in shape]
    pooled = same_size(student, teacher)
    torch.testing.assert_close(pooled[0], pool_by_hand(student, small), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pooled[1], pool_by_hand(teacher, small), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize(
    "shapes", [((6, 8, 8), (10, 4, 4)), ((10, 4, 4), (6, 8, 8)), ((6, 7, 7), (6, 4, 4)), ((5, 1, 1), (8, 1, 1))]
)
def test_feature_term(kind, shapes):
    """Two pairs of layers of other widths and sizes: value, and gradients of student and projectors, by autograd of
    the formula above."""
    maps = [rand(3, *shapes[0], seed=i, grad=True) for i in (0, 1)]
    guides = [rand(3, *shapes[1], seed=i + 2) for i in (0, 1)]
    student, teacher = {"features": dict(zip("ab", maps))}, {"features": dict(zip("xy", guides))}
    criterion = DistillationLoss({"ce": 0.0, "kl": 0.0, "feature": 2.5}, feature_loss=kind)
    criterion.build(student, teacher)
    criterion.double()
    loss = criterion(student, teacher, None)
    values = [feature_by_hand(kind, s, t, p) for s, t, p in zip(maps, guides, criterion.projectors)]
    expected = 2.5 * (values[0] + values[1]) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert criterion.terms["feature"].item() == pytest.approx(expected.item() / 2.5, rel=1e-11)
    inputs = [*maps, *criterion.parameters()]
    assert len(inputs) == 6
    for got, want in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("term", [feature_mse, feature_cosine])
def test_feature_gradients_by_finite_differences(term):
    assert torch.autograd.gradcheck(term, (rand(2, 3, 4, 4, grad=True), rand(2, 3, 2, 2, seed=1)))


def test_feature_cosine_is_finite_for_dead_features():
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    loss = feature_cosine(student, torch.ones(2, 3, 2, 2))
    assert loss.item() == 1
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    "names", [("resnet8", "layer3", "vit_6_192", "blocks.2"), ("vit_6_192", "blocks.1", "resnet8", "layer2")]
)
def test_a_cnn_and_a_vit_teach_each_other(names):
    """Real models; only what lies below the layer learns from its hint."""
    student, teacher = build_model(names[0], 4, 16, None), build_model(names[2], 4, 16, None)
    student.set_feature_layers([names[1]])
    teacher.set_feature_layers([names[3]])
    images = rand(2, 3, 16, 16).float()
    criterion = DistillationLoss({"feature": 1.0}, feature_loss="cosine")
    with torch.no_grad():
        taught = teacher.eval()({"image": images})
        criterion.build(student.eval()({"image": images}), taught)
    out = student.train()({"image": images})
    width = {"resnet8": {"layer2": 128, "layer3": 256}, "vit_6_192": {"blocks.1": 192, "blocks.2": 192}}
    wanted = (width[names[2]][names[3]], width[names[0]][names[1]], 1, 1)
    assert criterion.projectors[0].weight.shape == wanted
    loss = criterion(out, taught, None)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in student.backbone.named_parameters()}
    first = "conv1.weight" if names[0] == "resnet8" else "patch_embed.weight"
    last = "layer4.0.conv1.weight" if names[0] == "resnet8" else "blocks.5.qkv.weight"
    assert grads[first].abs().sum() > 0 and grads[last] is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in criterion.parameters())


def test_targets_made_under_no_grad_can_be_matched():
    """MSE saves the teacher's maps for backward, which outputs of inference_mode refuse (see test_optimizer.py too)."""
    net, x = torch.nn.Conv2d(3, 4, 1), rand(2, 3, 4, 4).float()
    with torch.no_grad():
        taught = {"features": {"t": net(x)}, "logits": net(x).mean((2, 3))}
    maps = x.clone().requires_grad_()
    out = {"features": {"s": maps}, "logits": maps.mean((2, 3)) @ torch.ones(3, 4)}
    criterion = DistillationLoss({"kl": 1.0, "feature": 1.0})
    criterion.build(out, taught)
    criterion(out, taught, None).backward()
    assert maps.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in criterion.parameters())
    assert all(p.grad is None for p in net.parameters())


# ----------------------------------------------------------------------------------------------------------- weights


def test_method_weights_defaults():
    assert method_weights("response") == full(ce=0.5, kl=0.5)
    assert method_weights("feature") == full(ce=0.5, kl=0.5, feature=1.0)
    assert method_weights("feature", 0.3) == full(ce=0.3, kl=0.7, feature=1.0)
    assert method_weights("response", ce=2.0, kl=None, feature=0.1) == full(ce=2.0, kl=0.5, feature=0.1)
    assert METHODS["response"] == {"ce": 0.5, "kl": 0.5}, "the table itself must not change"


@pytest.mark.parametrize(
    "method, alpha, given, words",
    [
        ("response", 0.5, {"ce": 1.0}, ["--alpha", "--ce-weight"]),
        ("feature", 0.5, {"kl": 0.0}, ["--alpha", "--kl-weight"]),
        ("response", 1.5, {}, ["--alpha", "1.5"]),
        ("response", -0.1, {}, ["--alpha", "-0.1"]),
        ("response", math.nan, {}, ["--alpha", "nan"]),
        ("response", None, {"kl": -1.0}, ["--kl-weight", "-1.0"]),
        ("response", None, {"feature": math.inf}, ["--feature-weight", "inf"]),
        ("response", None, {"ce": math.nan}, ["--ce-weight", "nan"]),
        ("response", None, {"ce": 0.0, "kl": 0.0}, ["0"]),
    ],
)
def test_contradicting_or_impossible_weights(method, alpha, given, words):
    with pytest.raises(LossError) as caught:
        method_weights(method, alpha, **given)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_impossible_temperature(temperature):
    with pytest.raises(LossError) as caught:
        DistillationLoss(method_weights("response"), temperature)
    assert caught.value.exit_code == 2 and "--temperature" in str(caught.value)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_alpha_weighs_the_cross_entropy_and_t_squared_is_always_there(alpha):
    student, teacher = rand(B, C, scale=2, grad=True), rand(B, C, seed=1, scale=2)
    criterion = DistillationLoss(method_weights("response", alpha), temperature=4.0, label_smoothing=0.1)
    criterion.build({"logits": student}, {"logits": teacher})
    loss = criterion({"logits": student}, {"logits": teacher}, LABELS)
    ce, kl = ce_by_hand(student, LABELS, 0.1), kl_by_hand(student, teacher, 4.0)
    assert loss.item() == pytest.approx(alpha * ce + (1 - alpha) * kl, rel=1e-10)
    assert not list(criterion.parameters())
    expected = {name: value for name, value, weight in (("ce", ce, alpha), ("kl", kl, 1 - alpha)) if weight}
    assert {name: term.item() for name, term in criterion.terms.items()} == pytest.approx(expected, rel=1e-10)
    assert not any(term.requires_grad for term in criterion.terms.values())
    onehot = torch.full((B, C), 0.1 / C, dtype=torch.float64)
    onehot[torch.arange(B), LABELS] += 0.9
    gradient = alpha * (student.softmax(1) - onehot) / B
    gradient = gradient + (1 - alpha) * 4 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)) / B
    loss.backward()
    torch.testing.assert_close(student.grad, gradient.detach(), rtol=1e-9, atol=1e-13)


def test_terms_of_weight_zero_are_not_computed():
    """Nothing that only a missing term needs has to be there."""
    logits = rand(B, C)
    ce = DistillationLoss(method_weights("response", 1.0))
    ce.build({"logits": logits}, {})
    assert ce({"logits": logits}, {}, LABELS).item() == pytest.approx(ce_by_hand(logits, LABELS), rel=1e-10)
    kl = DistillationLoss(method_weights("response", 0.0))
    assert kl({"logits": logits}, {"logits": logits + 1}, None).item() == pytest.approx(0, abs=1e-12)
    features = {"features": {"a": rand(2, 3, 4, 4)}}
    hint = DistillationLoss({"ce": 0.0, "kl": 0.0, "feature": 1.0})
    hint.build(features, features)
    hint.double()
    assert list(hint({**features}, features, None).shape) == [] and list(hint.terms) == ["feature"]


def test_projectors_are_built_before_the_optimizer_and_trained():
    student = {"features": {"a": rand(4, 3, 4, 4).float()}}
    teacher = {"features": {"b": rand(4, 5, 2, 2, seed=1).float()}}
    criterion = DistillationLoss({"feature": 1.0})
    assert not list(criterion.parameters())
    criterion.build(student, teacher)
    assert {name: tuple(p.shape) for name, p in criterion.named_parameters()} == {
        "projectors.0.weight": (5, 3, 1, 1),
        "projectors.0.bias": (5,),
    }
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.3)
    before, first = [p.clone() for p in criterion.parameters()], None
    for _ in range(30):
        loss = criterion(student, teacher, None)
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(criterion.projectors) == 1, "nothing may be made in forward"
    assert all(not torch.equal(p, q) for p, q in zip(before, criterion.parameters()))
    assert loss.item() < first - 0.05
    again = DistillationLoss({"feature": 1.0})
    again.build(student, teacher)
    again.load_state_dict(criterion.state_dict())
    assert torch.equal(again(student, teacher, None), criterion(student, teacher, None))


# --------------------------------------------------------------------------------------------------------- bad input


def test_other_numbers_of_classes_are_refused():
    criterion = DistillationLoss(method_weights("response"))
    with pytest.raises(LossError, match="the teacher has 7 classes, the student 3") as caught:
        criterion.build({"logits": rand(2, 3)}, {"logits": rand(2, 7)})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("layers", [(1, 2), (2, 1), (0, 1), (0, 0)])
def test_other_numbers_of_layers_are_refused(layers):
    def outputs(count):  # a model of which no layers are asked has no `features` at all
        out = {"logits": rand(2, 3)}
        return {**out, "features": {f"layer{i}": rand(2, 3, 4, 4) for i in range(count)}} if count else out

    criterion = DistillationLoss(method_weights("feature"))
    with pytest.raises(LossError) as caught:
        criterion.build(outputs(layers[0]), outputs(layers[1]))
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "--student-layer" in text and "--teacher-layer" in text and str(layers[0]) in text and str(layers[1]) in text


# ------------------------------------------------------------------------------------------------------ class weights


def test_class_weights_against_sklearn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0] * 7 + [1] * 2 + [2] * 11)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert np.allclose(class_weights("balanced", labels, 3).numpy(), expected)
    assert class_weights("none", labels, 3) is None and class_weights("1,0,2.5", labels, 3).tolist() == [1, 0, 2.5]


@pytest.mark.parametrize(
    "spec, words",
    [
        ("1,2", "3 numbers"),
        ("a,b,c", "balanced"),
        ("1,-1,2", "from 0 on"),
        ("0,0,0", "from 0 on"),
        ("1,nan,1", "from 0 on"),
        ("", "balanced"),
    ],
)
def test_bad_class_weights(spec, words):
    with pytest.raises(LossError, match=words):
        class_weights(spec, np.array([0, 1, 2]), 3)


def test_balanced_weights_need_every_class():
    with pytest.raises(LossError, match="class number 1 "):
        class_weights("balanced", np.array([0, 2, 2]), 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy(smoothing):
    """torch's weighted mean of the whole; the mean over equal parts is the same when they know the whole's labels."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, 3, generator=generator), torch.tensor([0, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 1])
    weights = torch.tensor([0.3, 5.0, 1.0])
    if not smoothing:  # by hand
        losses = [-weights[y] * torch.log_softmax(z, 0)[y] for z, y in zip(logits, labels)]
        assert torch.allclose(cross_entropy(logits, labels, 0, weights), sum(losses) / weights[labels].sum())
    whole = torch.nn.functional.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    assert torch.allclose(cross_entropy(logits, labels, smoothing, weights), whole)
    parts = [cross_entropy(logits[i : i + 4], labels[i : i + 4], smoothing, weights, labels) for i in (0, 4, 8)]
    assert torch.allclose(sum(parts) / 3, whole)
    alone = [cross_entropy(logits[i : i + 4], labels[i : i + 4], smoothing, weights) for i in (0, 4, 8)]
    assert abs(sum(alone) / 3 - whole) > 0.01  # what a mean of weighted means would be


@pytest.mark.parametrize("weights", [None, torch.tensor([0.3, 5.0, 1.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_image_without_a_label_does_not_count(weights, smoothing):
    """torch's mean over the labelled rows alone, also as the mean over equal parts of a batch, some without any
    label."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 3, generator=generator).requires_grad_()
    labels = torch.tensor([0, -1, 1, 1, -1, -1, -1, -1, -1, 2, -1, 0])
    kept = labels >= 0
    expected = torch.nn.functional.cross_entropy(logits[kept], labels[kept], weights, label_smoothing=smoothing)
    assert torch.allclose(cross_entropy(logits, labels, smoothing, weights), expected)
    parts = [cross_entropy(logits[i : i + 4], labels[i : i + 4], smoothing, weights, labels) for i in (0, 4, 8)]
    assert torch.allclose(sum(parts) / 3, expected) and parts[1] == 0
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels, smoothing, weights), logits)
    assert gradient[~kept].eq(0).all() and gradient[kept].ne(0).all()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, torch.full((12,), -1), smoothing, weights), logits)
    assert gradient.eq(0).all()  # and not NaN, where no image has a label


def test_what_needs_a_class_without_labels():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 5, generator=generator)
    labels, of_teacher = torch.tensor([1, -1, 3, -1]), teacher.argmax(1)
    filled = torch.tensor([1, of_teacher[1], 3, of_teacher[3]])
    assert decoupled_kl(student, teacher, labels) == decoupled_kl(student, teacher, filled)
    student[0, 1] = student[2, 0] = 9  # one right, one wrong of the two that have labels
    assert task_accuracy({"logits": student}, {"label": labels}) == 0.5
    assert task_accuracy({"logits": student}, {"label": torch.full((4,), -1)}).isnan()
    counts = class_weights("balanced", torch.tensor([0, 1, -1, 1, 1, -1]), 2)
    assert torch.allclose(counts, torch.tensor([4 / 2 / 1, 4 / 2 / 3]))


# --------------------------------------------------------------------------------------------------------- embeddings


def test_embedding_loss_by_hand():
    """Squared error averaged over dimensions, both terms over the batch; a lambda_feat of the width makes it the
    sum."""
    s, t = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    assert embedding_loss(s, t, 1, 0) == pytest.approx((2 + 4) / 4)
    assert embedding_loss(s, t, 2, 0) == pytest.approx((2 + 4) / 2)
    assert embedding_loss(s, t, 0, 1) == pytest.approx((1 + 0) / 2)
    assert embedding_loss(s, t, 0.5, 3) == pytest.approx(0.5 * 1.5 + 3 * 0.5)
    s, t = rand(B, C, grad=True), rand(B, C, seed=1)
    assert torch.autograd.gradcheck(lambda x: embedding_loss(x, t, 0.7, 1.3), s)
    half = embedding_loss(s.detach().half(), t.half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("width", [16, 1280])
@pytest.mark.parametrize(
    "term", ["embedding", "cls", "patch", "projection", "contrastive", "mmd", "rkd_distance", "rkd_angle"]
)
def test_no_term_drowns_the_labels_of_wide_teachers(term, width):
    """On embeddings of unit deviation a term times its method's weight is some times the cross-entropy, at any
    width."""
    torch.manual_seed(0)  # of the projectors
    weight = max(weights.get(term, 0) for weights in METHODS.values())
    student = {"logits": rand(B, C), "embedding": rand(B, 32).float(), "tokens": rand(B, 4, 32).float()}
    teacher = {"embedding": rand(B, width, seed=1).float(), "tokens": rand(B, 4, width, seed=1).float()}
    criterion = DistillationLoss({term: weight})
    criterion.build(student, teacher)
    bound = 150 if term == "projection" else 10  # 100 is published, as a mean: the same at any width
    assert 0.01 < criterion(student, teacher, LABELS).item() < bound


@pytest.mark.parametrize("rows, columns", [(3, 8), (8, 3), (5, 5)])
def test_orthogonal(rows, columns):
    q = orthogonal(rows, columns).double()
    small = q @ q.T if rows <= columns else q.T @ q
    assert torch.allclose(small, torch.eye(min(rows, columns), dtype=torch.float64), atol=1e-6)
    assert torch.equal(orthogonal(rows, columns), orthogonal(rows, columns))


@pytest.mark.parametrize("kind, trained", [("identity", 0), ("frozen-orthogonal", 0), ("learned", 2)])
def test_embedding_projectors(kind, trained):
    shared = None if kind == "identity" else 4
    projectors = EmbeddingProjectors(6, 10, shared, kind)
    s, t = projectors(torch.randn(B, 6), torch.randn(B, 10))
    assert s.shape == t.shape == (B, shared or 10)
    assert sum(p.requires_grad for p in projectors.teacher.parameters()) == trained
    embedding_loss(s, t).backward()
    assert all(p.grad is not None for p in projectors.parameters() if p.requires_grad)
    if kind == "identity":
        with pytest.raises(LossError, match="teacher's width is 10"):
            EmbeddingProjectors(6, 10, 4, kind)


def test_the_embedding_term_shows_a_collapse():
    criterion = DistillationLoss(method_weights("embedding", ce=0), embedding={"teacher": "learned", "shared_dim": 4})
    out = {"embedding": torch.randn(B, 6), "logits": torch.randn(B, C)}
    taught = {"embedding": torch.randn(B, 10)}
    criterion.build(out, taught)
    criterion(out, taught, LABELS)
    assert criterion.terms["teacher_variance"] > 0.01 and criterion.terms["student_variance"] > 0.01
    with torch.no_grad():
        for p in criterion.parameters():
            p.zero_()
    assert criterion(out, taught, LABELS) == 1  # no error but the cosine of nothing
    assert criterion.terms["teacher_variance"] == 0


def test_alpha_is_not_for_embeddings():
    with pytest.raises(LossError, match="--alpha with --method embedding"):
        method_weights("embedding", alpha=0.5)
    assert method_weights("embedding", ce=0)["ce"] == 0
