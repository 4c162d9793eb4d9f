"""Every loss against a formula written out here, in float64, gradients included; the traps of PITFALLS."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL

from common import cli, losses, run
from common.losses import (
    TERMS,
    DistillationLoss,
    EmbeddingProjectors,
    LossError,
    decoupled_kl,
    embedding_loss,
    feature_loss,
    loss_words,
    orthogonal,
    same_size,
    temperature_kl,
    term_options,
)
from common.models import build_model
from common.training import class_weights, cross_entropy, task_accuracy, task_cross_entropy
from distill import METHODS, build_parser, check_loss, loss_settings

B, C = 5, 7


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
        lambda cast: feature_loss(cast(maps), cast(guide)[..., :4, :4]),
        lambda cast: feature_loss(cast(maps), cast(guide)[..., :4, :4], "cosine"),
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
    criterion = DistillationLoss({"ce": 0.0, "kl": 0.0, "feature": 2.5}, {"feature.distance": kind})
    criterion.build(student, teacher)
    criterion.double()
    loss = criterion(student, teacher, None)
    values = [feature_by_hand(kind, s, t, p) for s, t, p in zip(maps, guides, criterion.projectors["feature"])]
    expected = 2.5 * (values[0] + values[1]) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert criterion.terms["feature"].item() == pytest.approx(expected.item() / 2.5, rel=1e-11)
    inputs = [*maps, *criterion.parameters()]
    assert len(inputs) == 6
    for got, want in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_feature_gradients_by_finite_differences(distance):
    loss = lambda s, t: feature_loss(s, t, distance)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (rand(2, 3, 4, 4, grad=True), rand(2, 3, 2, 2, seed=1)))


def test_feature_cosine_is_finite_for_dead_features():
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    loss = feature_loss(student, torch.ones(2, 3, 2, 2), "cosine")
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
    criterion = DistillationLoss({"feature": 1.0}, {"feature.distance": "cosine"})
    with torch.no_grad():
        taught = teacher.eval()({"image": images})
        criterion.build(student.eval()({"image": images}), taught)
    out = student.train()({"image": images})
    width = {"resnet8": {"layer2": 128, "layer3": 256}, "vit_6_192": {"blocks.1": 192, "blocks.2": 192}}
    wanted = (width[names[2]][names[3]], width[names[0]][names[1]], 1, 1)
    assert criterion.projectors["feature"][0].weight.shape == wanted
    loss = criterion(out, taught, None)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in student.backbone.named_parameters()}
    first = "conv1.weight" if names[0] == "resnet8" else "patch_embed.proj.weight"
    last = "layer4.0.conv1.weight" if names[0] == "resnet8" else "blocks.5.attn.qkv.weight"
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


def test_methods_are_sums():
    """The published weights, written out; the temperature of all terms on logits is each term's or the method's."""
    expected = {
        "response": ({"ce": 0.5, "kl": 0.5}, 4),
        "feature": ({"ce": 0.5, "kl": 0.5, "feature": 1}, 4),
        "feature_matching": ({"ce": 0.5, "feature": 0.5}, None),
        "embedding": ({"ce": 1, "embedding": 1}, None),
        "tokens": ({"cls": 1, "patch": 0.5}, None),
        "radio": ({"cls": 0.5, "patch": 1}, None),
        "projection": ({"ce": 1, "kl": 1, "projection": 100}, 2),
        "combined": ({"ce": 1, "kl": 1, "projection": 100, "crd": 1}, 2),
        "crd": ({"ce": 1, "crd": 1}, None),
        "rkd": ({"ce": 1, "rkd_distance": 25, "rkd_angle": 50}, None),
        "mmd": ({"ce": 1, "mmd": 1}, None),
        "dkd": ({"ce": 1, "dkd": 1}, 4),
        "dist": ({"ce": 1, "dist": 2}, 1),
        "logit_standardization": ({"ce": 0.1, "standardized_kl": 9}, 2),
        "attention": ({"ce": 1, "attention": 1000}, None),
        "pkt": ({"ce": 1, "pkt": 30000}, None),
        "sp": ({"ce": 1, "sp": 3000}, None),
        "srd": ({"ce": 1, "srd": 1}, None),
        "hard": ({"ce": 0.5, "hard": 0.5}, None),
        "pld": ({"pld": 1}, 1),
        "wkd": ({"ce": 1, "wkd": 0.006}, None),
    }
    assert expected.keys() == METHODS.keys()
    for method, (weights, temperature) in expected.items():
        found, options = loss_settings(method)
        assert found == weights, method
        on_logits = {value for key, value in options.items() if key in LOGIT_TEMPERATURES}
        assert on_logits == ({temperature} if temperature else set()), method


LOGIT_TEMPERATURES = {f"{term}.temperature" for term in ("kl", "dkd", "dist", "standardized_kl", "pld")}


def test_a_sum_of_the_user_s():
    """--loss replaces the method; an option is special to its term, --temperature is of all terms on logits."""
    words = ["ce=0", "kl=2", "dist=0.5", "crd=3", "embedding=1"]
    weights, options = loss_settings("tokens", words)
    assert weights == {"kl": 2, "dist": 0.5, "crd": 3, "embedding": 1}
    assert options == {
        "kl.temperature": 4,
        "dist.temperature": 1,
        "dist.beta": 1,
        "dist.gamma": 1,
        "crd.temperature": 0.07,
        "crd.base_temperature": 0.07,
        "embedding.lambda_feat": 1,
        "embedding.lambda_cos": 1,
        "embedding.teacher_projector": "identity",
    }
    given = ["dist.temperature=3", "crd.temperature=0.1", "embedding.shared_dim=8", "embedding.lambda_cos=0"]
    _, changed = loss_settings("tokens", words, [*given, "embedding.teacher_projector=learned"], temperature=2.5)
    assert changed == {
        **options,
        "kl.temperature": 2.5,
        "dist.temperature": 3,
        "crd.temperature": 0.1,
        "embedding.shared_dim": 8,
        "embedding.lambda_cos": 0,
        "embedding.teacher_projector": "learned",
    }
    assert isinstance(changed["embedding.shared_dim"], int)
    assert loss_settings("projection", temperature=3)[1] == {"kl.temperature": 3}
    assert loss_settings("projection", None, ["kl.temperature=5"], 3)[1] == {"kl.temperature": 5}


@pytest.mark.parametrize("method", METHODS)
def test_the_words_of_a_sum_can_be_pasted(method):
    """After --loss and --loss-options; alpha's weights too."""
    for alpha in (None, 0.3, 0.7) if method in ("response", "feature", "feature_matching") else (None,):
        settings = loss_settings(method, alpha=alpha)
        words, options = map(loss_words, settings)
        for again in (
            loss_settings("response", words.split(), options.split()),
            loss_settings("response", [*words.split(), *options.split()]),
        ):
            assert again[0] == pytest.approx(settings[0], rel=1e-11) and again[1] == settings[1]
        assert loss_words(again[0]) == words
    assert loss_words(loss_settings("response")[0]) == "ce=0.5 kl=0.5"
    assert loss_words(loss_settings("dkd")[1]) == "dkd.temperature=4 dkd.alpha=1 dkd.beta=8"


@pytest.mark.parametrize(
    "method, weights",
    [
        ("response", {"ce": 0.3, "kl": 0.7}),
        ("feature", {"ce": 0.3, "kl": 0.7, "feature": 1}),
        ("feature_matching", {"ce": 0.7, "feature": 0.3}),
    ],
)
def test_alpha_is_translated_into_weights(method, weights):
    assert loss_settings(method, alpha=0.3)[0] == pytest.approx(weights)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"alpha": 0.5, "loss": ["ce=1"]}, ["--alpha 0.5", "--loss"]),
        *(
            ({"alpha": 0.5, "method": method}, [f"--method {method}"])
            for method in ("embedding", "dkd", "dist", "logit_standardization", "attention")
        ),
        ({"loss": ["hint=1"]}, ["'hint'", *TERMS]),
        ({"loss": ["ce=1", "kl.temperature=1"]}, ["'kl.temperature'", "the loss ce=1"]),
        ({"loss": ["kl.temperature=1"]}, ["no term has a weight"]),
        ({"loss": ["kl=-1"]}, ["kl=-1", "at least 0"]),
        ({"loss": ["kl=inf"]}, ["kl=inf", "at least 0"]),
        ({"loss": ["kl=nan"]}, ["kl=nan", "at least 0"]),
        ({"loss": ["kl=much"]}, ["kl=much", "kl=VALUE"]),
        ({"loss": ["kl"]}, ["--loss kl: write kl=VALUE"]),
        ({"loss": ["kl=1", "ce=1", "kl=1"]}, ["kl is given twice"]),
        ({"loss": ["ce=0", "kl=0"]}, ["no term has a weight above 0"]),
        ({"loss_options": ["dkd.beta=2"]}, ["'dkd.beta'", "ce=0.5 kl=0.5", "choose from kl.temperature"]),
        ({"method": "dkd", "loss_options": ["dkd.bta=2"]}, ["'dkd.bta'", "dkd.temperature, dkd.alpha, dkd.beta"]),
        ({"method": "dkd", "loss_options": ["ce.label_smoothing=1"]}, ["'ce.label_smoothing'"]),
        ({"method": "rkd", "loss_options": ["beta=2"]}, ["'beta'", "choose from none"]),
        ({"method": "dkd", "loss_options": ["dkd.beta"]}, ["dkd.beta=VALUE with a number of at least 0"]),
        ({"method": "dkd", "loss_options": ["dkd.beta=-1"]}, ["dkd.beta=-1", "with a number of at least 0"]),
        ({"method": "dkd", "loss_options": ["dkd.beta=inf"]}, ["dkd.beta=inf"]),
        ({"method": "dkd", "loss_options": ["dkd.temperature=0"]}, ["dkd.temperature=VALUE with a number above 0"]),
        ({"method": "crd", "loss_options": ["crd.base_temperature=0"]}, ["with a number above 0"]),
        ({"method": "feature", "loss_options": ["feature.distance=l1"]}, ["with one of mse, cosine"]),
        ({"method": "embedding", "loss_options": ["embedding.shared_dim=0"]}, ["with a whole number above 0"]),
        ({"method": "embedding", "loss_options": ["embedding.shared_dim=2.5"]}, ["with a whole number above 0"]),
        *(({"temperature": t}, [f"kl.temperature={t}"]) for t in (0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_impossible_settings(settings, words):
    with pytest.raises(LossError) as caught:
        loss_settings(**settings)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_the_loss_itself_refuses_unknown_names():
    with pytest.raises(LossError, match="'hint'.*crd"):
        DistillationLoss({"hint": 1.0})
    with pytest.raises(LossError, match="'dkd.bta'.*dkd.beta"):
        DistillationLoss({"dkd": 1}, {"dkd.bta": 2})
    with pytest.raises(LossError, match="the teacher gives no tokens, which the term patch compares"):
        DistillationLoss({"patch": 1}).build({"tokens": rand(2, 4, 3)}, {"logits": rand(2, 3)})


def test_options_are_what_has_a_default_and_a_plain_type():
    assert [*term_options("ce")] == [*term_options("mmd")] == [*term_options("cls")] == []
    assert [*term_options("feature")] == ["feature.distance"]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_alpha_weighs_the_cross_entropy_and_t_squared_is_always_there(alpha):
    student, teacher = rand(B, C, scale=2, grad=True), rand(B, C, seed=1, scale=2)
    criterion = DistillationLoss(
        *loss_settings("response", alpha=alpha),
        cross_entropy=lambda out, labels, _: task_cross_entropy(out, labels, label_smoothing=0.1),
    )
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
    ce = DistillationLoss(*loss_settings("response", alpha=1.0))
    ce.build({"logits": logits}, {})
    assert ce({"logits": logits}, {}, LABELS).item() == pytest.approx(ce_by_hand(logits, LABELS), rel=1e-10)
    kl = DistillationLoss(*loss_settings("response", alpha=0.0))
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
        "projectors.feature.0.weight": (5, 3, 1, 1),
        "projectors.feature.0.bias": (5,),
    }
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.3)
    before, first = [p.clone() for p in criterion.parameters()], None
    for _ in range(30):
        loss = criterion(student, teacher, None)
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(criterion.projectors["feature"]) == 1, "nothing may be made in forward"
    assert all(not torch.equal(p, q) for p, q in zip(before, criterion.parameters()))
    assert loss.item() < first - 0.05
    again = DistillationLoss({"feature": 1.0})
    again.build(student, teacher)
    again.load_state_dict(criterion.state_dict())
    assert torch.equal(again(student, teacher, None), criterion(student, teacher, None))


# --------------------------------------------------------------------------------------------------------- bad input


def test_other_numbers_of_classes_are_refused():
    criterion = DistillationLoss(*loss_settings("response"))
    with pytest.raises(LossError, match="the teacher has 7 classes, the student 3") as caught:
        criterion.build({"logits": rand(2, 3)}, {"logits": rand(2, 7)})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("layers", [(1, 2), (2, 1), (0, 1), (0, 0)])
def test_other_numbers_of_layers_are_refused(layers):
    def outputs(count):  # a model of which no layers are asked has no `features` at all
        out = {"logits": rand(2, 3)}
        return {**out, "features": {f"layer{i}": rand(2, 3, 4, 4) for i in range(count)}} if count else out

    criterion = DistillationLoss(*loss_settings("feature"))
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
        ("1,-1,2", "at least 0"),
        ("0,0,0", "at least 0"),
        ("1,nan,1", "at least 0"),
        ("", "balanced"),
    ],
)
def test_bad_class_weights(spec, words):
    with pytest.raises(run.UserError, match=words):
        class_weights(spec, np.array([0, 1, 2]), 3)


def test_balanced_weights_need_every_class():
    with pytest.raises(run.UserError, match="class number 1 "):
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
@pytest.mark.parametrize("term", ["embedding", "cls", "patch", "projection", "crd", "mmd", "rkd_distance", "rkd_angle"])
def test_no_term_drowns_the_labels_of_wide_teachers(term, width):
    """On embeddings of unit deviation a term times its method's weight is some times the cross-entropy, at any
    width."""
    torch.manual_seed(0)  # of the projectors
    weight = max(loss_settings(method)[0].get(term, 0) for method in METHODS)
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
    criterion = DistillationLoss(
        {"embedding": 1}, {"embedding.teacher_projector": "learned", "embedding.shared_dim": 4}
    )
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


# ------------------------------------------------------------------------------------------------ the table, the flags


def test_the_file_is_used_alone(tmp_path, monkeypatch):
    """Copied into an empty folder, its docstring's loop runs, nothing of this project is imported, and it learns."""
    source = Path(losses.__file__)
    (tmp_path / "losses_alone.py").write_text(source.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "common", None)  # an import of it would fail
    alone = importlib.import_module("losses_alone")
    example = [line[4:] for line in alone.__doc__.splitlines() if line.startswith("    ")]
    assert len(example) < 20

    class Model(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body, self.head = torch.nn.Linear(6, width), torch.nn.Linear(width, 3)

        def forward(self, images):
            embedding = self.body(images)
            return {"embedding": embedding, "logits": self.head(embedding)}

    torch.manual_seed(0)
    images, labels = rand(8, 6).float(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    names = {
        "torch": torch,
        "DistillationLoss": alone.DistillationLoss,
        "student": Model(4),
        "teacher": Model(5),
        "images": images,
        "batches": [(images, labels)] * 40,
    }
    exec("\n".join(example), names)
    first = alone.DistillationLoss({"ce": 1.0})(Model(4)(images), {}, labels)
    assert names["criterion"].terms["ce"] < first and len(list(names["criterion"].parameters())) == 2


def chebyshev(student, teacher, power: float = 1.0):
    """Largest difference of each row, to a power, mean over the batch."""
    return (student - teacher).abs().amax(1).pow(power).mean()


def test_a_term_is_a_function_and_a_row(monkeypatch, here, refused, teacher, tmp_path):
    """It is in the help, has an option, is distilled with, live and stored; no other file knows of it."""
    row = losses.Term(chebyshev, "embedding", "largest difference", torch.nn.Linear)
    monkeypatch.setitem(losses.TERMS, "chebyshev", row)
    help_text = " ".join(build_parser().format_help(everything=True).split())
    assert "chebyshev: largest difference" in help_text and "chebyshev.power=1" in help_text
    flags = [*SMALL, "--epochs", 1, "--loss", "ce=1", "chebyshev=0.5", "--teacher-checkpoint", teacher / "best.pth"]
    refused("distill.py", *flags, "--loss-options", "chebyshev.power=x", words=["chebyshev.power=VALUE with a number"])
    code, out, errors = here("distill.py", *flags, "--loss-options", "chebyshev.power=2", "--output", "run")
    assert code == 0, errors
    assert "loss: ce=1 chebyshev=0.5\nloss options: chebyshev.power=2\n" in out
    row, results = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("metrics", "results"))
    assert row[0]["train_loss"] == pytest.approx(row[0]["train_ce"] + 0.5 * row[0]["train_chebyshev"], rel=1e-5)
    assert results["method"] == "ce=1 chebyshev=0.5"
    # only of the embedding, so without labels; the whole batch is compared
    whole = losses.Term(chebyshev, "embedding", "", torch.nn.Linear, compares_images=True)
    monkeypatch.setitem(losses.TERMS, "chebyshev", whole)
    student, guide = {"embedding": rand(B, 4)}, {"embedding": rand(B, 4, seed=1)}
    criterion = DistillationLoss({"chebyshev": 2}, {"chebyshev.power": 3.0}, gather=lambda rows: rows[:2])
    criterion.build(student, guide)
    projected = criterion.project("chebyshev", student["embedding"], None)[0]
    expected = [max(abs(a - b) for a, b in zip(s, t)) ** 3 for s, t in zip(projected.tolist(), guide["embedding"])]
    assert criterion(student, guide).item() == pytest.approx(2 * float(sum(expected[:2])) / 2)
    assert criterion.eval()(student, guide).item() == pytest.approx(2 * float(sum(expected)) / B)


def test_the_flags_of_the_sum_from_files(tmp_path):
    """--config, --sweep and --resume carry them; on the command line --method replaces the file's --loss."""
    loss = {"loss": ["ce=1", "dkd=2"], "loss_options": ["dkd.beta=1"], "method": None}
    config, grid = tmp_path / "config.json", tmp_path / "grid.json"
    config.write_text(json.dumps({"flags": loss}))
    grid.write_text(json.dumps({"loss": [["ce=1", "kl=1"], ["ce=1", "mmd=2"]]}))

    def parsed(*flags):
        (argv,) = cli.expand_seeds(build_parser(), list(map(str, flags)))
        return cli.parse_flags(build_parser(), argv)

    args = parsed("--config", config)
    assert {name: getattr(args, name) for name in loss} == loss
    assert check_loss(args)[0] == {"ce": 1, "dkd": 2} and check_loss(args)[1]["dkd.beta"] == 1
    args = parsed("--config", config, "--method", "dkd")
    assert check_loss(args)[0] == {"ce": 1, "dkd": 1} and args.loss is None
    assert check_loss(parsed("--config", config, "--loss", "kl=1", "--loss-options"))[0] == {"kl": 1}
    args = parsed("--sweep", grid, "--sweep-index", 1, "--method", "dkd")
    assert check_loss(args)[0] == {"ce": 1, "mmd": 2} and args.output.endswith("loss-ce-1-mmd-2")
    assert check_loss(parsed("--resume", tmp_path))[0] == {"ce": 1, "dkd": 2}
    for flags in (["--loss", "ce=1"], ["--method", "mmd"], ["--loss-options", "dkd.beta=3"]):
        with pytest.raises(run.UserError, match="with --resume: the run has"):
            parsed("--resume", tmp_path, *flags)
