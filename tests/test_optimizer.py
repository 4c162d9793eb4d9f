"""Optimizer, schedules and the step, against closed formulas, torch's schedulers and loops written out here; the frozen
teacher beside them."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import cli
from common.augment import Augmenter, Policy, normalize, render, sample_parameters
from common.losses import DistillationLoss
from common.models import build_model
from common.run import UserError, better
from common.training import (
    CHECK_EVERY,
    NonFiniteLoss,
    Precision,
    Preprocess,
    Schedule,
    Updater,
    live_teacher,
    make_optimizer,
)
from distill import build_parser, check_loss, loss_settings, settle_flags

CPU = torch.device("cpu")
OFF = Precision("off", CPU)


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 9, 4),
        nn.LayerNorm(4),
        nn.Linear(4, 4),
    )


def data(step):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(6, 3, 5, 5, generator=generator), torch.randint(0, 4, (6,), generator=generator)


def loss_of(net, step):
    x, y = data(step)
    return F.cross_entropy(net(x), y)


def decays(optimizer, module):
    """{parameter's name: its weight decay}."""
    found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in module.named_parameters() if id(p) in found}


# ------------------------------------------------------------------------------------------------------------ optimizer

TINY_HF_VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.mark.parametrize(
    "name, options, weights, positions",
    [
        ("resnet8", {}, ["conv1.weight", "layer2.0.shortcut.0.weight", "fc.weight"], []),
        (
            "vit_6_192",
            {},
            ["patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "head.weight"],
            ["cls_token", "pos_embed"],
        ),
        ("timm:test_vit", {}, ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"], ["cls_token", "pos_embed"]),
        ("timm:test_vit2", {}, ["blocks.0.attn.qkv.weight"], ["reg_token", "pos_embed"]),
        ("timm:test_convnext", {}, ["stem.0.weight"], []),
        (
            "hf:tiny",
            {"hf_config": TINY_HF_VIT},
            ["body.embeddings.patch_embeddings.projection.weight", "head.weight"],
            ["body.embeddings.cls_token", "body.embeddings.position_embeddings"],
        ),
        (
            "hf:tiny",
            {"hf_config": {**TINY_HF_VIT, "model_type": "dinov2_with_registers", "num_register_tokens": 4}},
            ["head.weight"],
            [
                f"body.embeddings.{name}"
                for name in ("cls_token", "mask_token", "register_tokens", "position_embeddings")
            ],
        ),
    ],
)
def test_no_decay_on_norms_biases_tokens_and_positions(name, options, weights, positions):
    model = build_model(name, 4, 32, **options)
    got = decays(make_optimizer(model, optimizer="adamw", weight_decay=0.07), model)
    assert got.keys() == dict(model.named_parameters()).keys(), "every parameter, once"
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    norms = {id(p) for m in norms for p in m.parameters(recurse=False)}
    for full, parameter in model.named_parameters():
        free = full.endswith("bias") or id(parameter) in norms or parameter.ndim == 1
        free |= full.removeprefix("backbone.") in positions
        assert got[full] == (0 if free else 0.07), full
    assert all(got[f"backbone.{w}"] == 0.07 for w in weights) and all(got[f"backbone.{p}"] == 0 for p in positions)


def test_decay_acts_on_weights_alone():
    """Without gradients a step of AdamW multiplies by 1 - lr * decay."""
    net = small_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = make_optimizer(net, optimizer="adamw", lr=0.1, weight_decay=0.5)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        factor = 0.95 if name in ("0.weight", "4.weight", "6.weight") else 1
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_defaults_and_groups():
    net = small_net()
    sgd, adam, adamw = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
    for name, kind, lr, decay in (("sgd", sgd, 0.02, 5e-4), ("adam", adam, 1e-3, 0), ("adamw", adamw, 1e-3, 0.05)):
        optimizer = make_optimizer(net, optimizer=name)
        assert type(optimizer) is kind and optimizer.defaults["lr"] == lr
        assert decays(optimizer, net)["0.weight"] == decay and decays(optimizer, net)["6.bias"] == 0
    for group in make_optimizer(
        net, optimizer="sgd", lr=0.3, weight_decay=0.0, momentum=0.8, nesterov=True
    ).param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.8, True, 0)


def test_the_projectors_decay_is_the_flag_s():
    args = build_parser().parse_args(
        ["--method", "feature", "--projector-weight-decay", "0.3", "--weight-decay", "0.2"]
    )
    weights, _, labelled = check_loss(args)
    args = settle_flags(args, weights, labelled)
    net, projectors = small_net(), DistillationLoss({"feature": 1.0})
    maps = {"features": {"a": torch.zeros(2, 3, 2, 2)}}
    projectors.build(maps, maps)
    optimizer = make_optimizer(net, projectors, **cli.options(make_optimizer, vars(args)))
    assert decays(optimizer, projectors) == {"projectors.feature.0.weight": 0.3, "projectors.feature.0.bias": 0}
    assert set(decays(optimizer, net).values()) == {0, 0.2}


def test_projectors_have_a_decay_of_their_own():
    net, projectors = small_net(), DistillationLoss({"feature": 1.0})
    maps = {"features": {"a": torch.zeros(1, 3, 2, 2)}}
    projectors.build(maps, maps)
    got = decays(make_optimizer(net, projectors, optimizer="sgd", projector_weight_decay=0.01), projectors)
    assert got == {"projectors.feature.0.weight": 0.01, "projectors.feature.0.bias": 0}
    assert set(decays(make_optimizer(net, projectors, optimizer="sgd", weight_decay=0.1), projectors).values()) == {0}
    nothing = make_optimizer(net, DistillationLoss({"ce": 1.0}), optimizer="sgd")
    assert len(nothing.param_groups) == 2, "a loss without projectors adds no group"


def test_frozen_parameters_stay_out():
    net = small_net()
    net[0].requires_grad_(False)
    assert "0.weight" not in decays(make_optimizer(net, optimizer="sgd"), net)


@pytest.mark.parametrize("name, momentum, other", [("adamw", 0.9, "--optimizer adamw"), ("sgd", 0.0, "--momentum 0")])
def test_nesterov_without_momentum_is_refused(name, momentum, other):
    with pytest.raises(UserError) as caught:
        make_optimizer(small_net(), optimizer=name, momentum=momentum, nesterov=True)
    assert caught.value.exit_code == 2 and "--nesterov" in str(caught.value) and other in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ schedules


def torchs(make, steps, lr=0.4):
    """Rates of a torch scheduler."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(steps, kind, peak, epochs, steps_per_epoch, **options):
    schedule = Schedule(peak, steps_per_epoch, schedule=kind, epochs=epochs, **options)
    return [schedule(step) for step in range(steps)]


def test_cosine():
    from torch.optim.lr_scheduler import CosineAnnealingLR

    got = ours(50, "cosine", 0.4, 5, 10)
    assert got == pytest.approx(torchs(lambda o: CosineAnnealingLR(o, 50), 50))
    assert got[0] == 0.4 and got[25] == pytest.approx(0.2)
    assert got[10] == pytest.approx(0.4 * math.cos(math.pi / 10) ** 2) and 0 < got[-1] < 0.4 / 500


def test_warmup_then_cosine():
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    def reference(optimizer):
        parts = [LinearLR(optimizer, 1 / 11, total_iters=10), CosineAnnealingLR(optimizer, 40)]
        return SequentialLR(optimizer, parts, milestones=[10])

    got = ours(50, "cosine", 0.4, 5, 10, warmup_epochs=1)
    assert got == pytest.approx(torchs(reference, 50))
    assert got[:11] == pytest.approx([0.4 * (step + 1) / 11 for step in range(11)]), "rises to the peak in equal steps"
    half = ours(50, "constant", 0.4, 5, 10, warmup_epochs=0.5)
    assert half[:6] == pytest.approx([0.4 * (step + 1) / 6 for step in range(6)]) and set(half[5:]) == {0.4}


def test_multistep():
    from torch.optim.lr_scheduler import MultiStepLR

    got = ours(100, "multistep", 0.4, 10, 10, milestones=[5, 8], gamma=0.2)
    assert got == pytest.approx(torchs(lambda o: MultiStepLR(o, [50, 80], 0.2), 100))
    assert (got[49], got[50]) == pytest.approx((0.4, 0.08)) and got[80] == pytest.approx(0.016)
    warm = ours(100, "multistep", 0.4, 10, 10, warmup_epochs=2, milestones=[5, 8], gamma=0.2)
    assert warm[20:] == got[20:] and warm[0] == pytest.approx(0.4 / 21)


@pytest.mark.parametrize("metric, mode", [("accuracy", "max"), ("loss", "min")])
def test_plateau(metric, mode):
    """torch counts the epochs beyond its patience: its 2 is our 3."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    values = [0.5, 0.6, 0.6, 0.5, 0.6, 0.59, 0.7, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.9, 0.1]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    reference = ReduceLROnPlateau(optimizer, mode, 0.5, patience=2, threshold=0)
    schedule, got, expected = Schedule(0.4, 10, schedule="plateau", epochs=20, gamma=0.5, plateau_patience=3), [], []
    best = None
    for epoch, value in enumerate(values):
        got.append(schedule(epoch * 10))
        expected.append(optimizer.param_groups[0]["lr"])
        schedule.end_epoch(better(metric, value, best))
        best = value if better(metric, value, best) else best
        reference.step(value)
    assert got == pytest.approx(expected) and len(set(got)) >= 3
    again = Schedule(0.4, 10, schedule="plateau", epochs=20, gamma=0.5, plateau_patience=3)
    again.load_state_dict(schedule.state_dict())
    assert again(0) == schedule(0) < 0.4 and again.state_dict() == schedule.state_dict()


def test_plateau_counts_epochs_without_gain():
    schedule = Schedule(1.0, 10, schedule="plateau", epochs=20, gamma=0.1, plateau_patience=2)
    rates = []
    for gain in (True, False, False, True, False, False, True):
        schedule.end_epoch(gain)
        rates.append(schedule(0))
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"schedule": "cosine", "warmup_epochs": 6}, ["--warmup-epochs 6", "--epochs 5"]),
        ({"schedule": "cosine", "milestones": [2]}, ["--milestones", "--schedule cosine"]),
        ({"schedule": "multistep"}, ["--milestones", "--schedule multistep"]),
    ],
)
def test_contradicting_schedules(settings, words):
    with pytest.raises(UserError) as caught:
        Schedule(0.1, 10, epochs=5, **settings)
    assert caught.value.exit_code == 2 and all(word in str(caught.value) for word in words)


def test_warmup_of_the_whole_run():
    got = ours(50, "cosine", 0.4, 5, 10, warmup_epochs=5)
    assert got == pytest.approx([0.4 * (step + 1) / 51 for step in range(50)])


# -------------------------------------------------------------------------------------------------------------- updater


def updater_of(net, name="sgd", kind="cosine", steps=20, clip=0.0, ema=0.0, lr=0.1, precision=OFF, decay=0.01):
    optimizer = make_optimizer(net, optimizer=name, lr=lr, weight_decay=decay, nesterov=name == "sgd")
    schedule = Schedule(lr, steps // 2, schedule=kind, epochs=2, warmup_epochs=0.5)
    return Updater(net, optimizer, schedule, precision, clip_grad=clip, ema=ema)


def train(updater, first, last):
    for step in range(first, last):
        updater(loss_of(updater.model, step))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_updater_is_a_plain_loop(name, fused):
    """To the last bit with torch's fused optimizer, closely with its plain one."""
    net, reference = small_net(), small_net()
    train(updater_of(net, name), 0, 20)
    weights = [p for p in reference.parameters() if p.ndim > 1]
    rest = [p for p in reference.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    options = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    optimizer = kinds[name](groups, lr=0.1, fused=fused, foreach=False, **options)
    for step in range(20):
        rate = 0.1 * (step + 1) / 6 if step < 5 else 0.05 * (1 + math.cos(math.pi * (step - 5) / 15))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss_of(reference, step).backward()
        optimizer.step()
    for (key, value), expected in zip(net.state_dict().items(), reference.state_dict().values()):
        assert torch.equal(value, expected) if fused else torch.allclose(value, expected, rtol=1e-4, atol=1e-5), key


def test_clipping_by_hand():
    """All parameters that are trained, projectors too, are scaled by clip / norm where the norm is larger."""
    for clip, scaled in ((0.01, True), (1e6, False)):
        net, projectors = nn.Linear(3, 2), nn.Linear(2, 2)
        before = [p.detach().clone() for p in (*net.parameters(), *projectors.parameters())]
        optimizer = make_optimizer(net, projectors, optimizer="sgd", lr=1.0, weight_decay=0.0, momentum=0.0)
        updater = Updater(net, optimizer, Schedule(1.0, 10, schedule="constant", epochs=1), OFF, clip_grad=clip)
        loss = (projectors(net(torch.tensor([[1.0, 2.0, 3.0]]))) ** 2).sum()
        parameters = [*net.parameters(), *projectors.parameters()]
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in grads))
        updater(loss)
        factor = clip / norm if scaled else 1
        assert (norm > clip) == scaled
        for p, old, g in zip(parameters, before, grads):
            torch.testing.assert_close(old - p.detach(), factor * g, rtol=1e-3, atol=1e-7)


def test_ema_by_hand():
    """From the first step's weights on: average = decay * average + (1 - decay) * weights; buffers are copied."""
    net = small_net()
    updater = updater_of(net, ema=0.8)
    expected = None
    for step in range(12):
        train(updater, step, step + 1)
        if expected is None:
            expected = {name: p.detach().double().clone() for name, p in net.named_parameters()}
        else:
            expected = {name: 0.8 * expected[name] + 0.2 * p.detach().double() for name, p in net.named_parameters()}
    average = updater.evaluated_model
    assert average is not net and type(average) is type(net)
    for name, p in average.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(p, net.get_parameter(name))
    assert all(torch.equal(a, b) for a, b in zip(average.buffers(), net.buffers()))
    plain = updater_of(small_net())
    assert plain.evaluated_model is plain.model


def test_ema_does_not_change_the_training():
    one, two = small_net(), small_net()
    train(updater_of(one, ema=0.9), 0, 10)
    train(updater_of(two), 0, 10)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_ema_of_a_model_with_features():
    """The average is copied after the hooks were set and has its own."""
    model = build_model("resnet8", 4, 16)
    model.set_feature_layers(["layer3"])
    updater = updater_of(model, ema=0.5)
    images = torch.randn(4, 3, 16, 16)
    updater(model({"image": images})["logits"].square().mean())
    updater(model({"image": images})["logits"].square().mean())
    with torch.no_grad():
        maps = [m.eval()({"image": images})["features"]["layer3"] for m in (updater.evaluated_model, model)]
    assert maps[0].shape == maps[1].shape == (4, 256, 4, 4) and not torch.equal(*maps)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named_with_step_and_rate(bad):
    """The first one, although it is read later."""
    updater = updater_of(small_net())
    train(updater, 0, 6)
    updater.check_finite()
    for step in range(6, 9):
        updater(loss_of(updater.model, step) * (bad if step >= 7 else 1))
    with pytest.raises(NonFiniteLoss) as caught:
        updater.check_finite()
    rate = 0.05 * (1 + math.cos(math.pi * (7 - 5) / 15))
    assert caught.value.exit_code == 1
    assert "step 8 " in str(caught.value) and f"learning rate {rate:.3g})" in str(caught.value)


def test_the_loss_is_looked_at_every_50_steps():
    assert CHECK_EVERY == 50
    net = nn.Linear(1, 1)
    updater = Updater(
        net, make_optimizer(net, optimizer="sgd", lr=0.1), Schedule(0.1, 200, schedule="constant", epochs=1), OFF
    )
    for step in range(49):
        updater(net(torch.ones(1, 1)).sum() * (math.nan if step == 2 else 1))
    with pytest.raises(NonFiniteLoss, match="step 3 "):
        updater(net(torch.ones(1, 1)).sum())


@pytest.mark.parametrize("name, ema", [("sgd", 0.0), ("adamw", 0.9)])
def test_state_goes_round(tmp_path, name, ema):
    """Saved at step 7 of 20 and continued in fresh parts: weights, average and rate of an uninterrupted run, bit for
    bit."""

    def fresh():
        return updater_of(small_net(), name, ema=ema, clip=1.0)

    whole = fresh()
    train(whole, 0, 20)
    first = fresh()
    train(first, 0, 7)
    torch.save({"model": first.model.state_dict(), "updater": first.state_dict()}, tmp_path / "latest.pth")
    saved = torch.load(tmp_path / "latest.pth", weights_only=True)
    second = updater_of(small_net(seed=5), name, ema=ema, clip=1.0)
    second.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["updater"])
    assert (second.steps, second.lr) == (7, first.lr), "an epoch that is resumed after its last step logs its rate"
    train(second, 7, 20)
    for updater in (whole, second):
        assert updater.steps == 20 and updater.lr == whole.lr
    for part in ("model", "evaluated_model"):
        a, b = (getattr(updater, part).state_dict() for updater in (whole, second))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_plateau_goes_round():
    one = updater_of(small_net(), kind="plateau")
    for epoch in range(12):
        one.schedule.end_epoch(epoch == 0)
    train(one, 0, 6)
    two = updater_of(small_net(), kind="plateau")
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.lr == one.lr == pytest.approx(0.1 * 0.1**2), "two falls of five epochs without gain each"


def test_an_enabled_scaler_is_used():
    """fp16 needs a GPU; here a scaler of 8 that must leave no trace in the weights and be saved."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=True)
    scaled = updater_of(small_net(), clip=0.5, precision=SimpleNamespace(scaler=scaler), lr=0.01)
    plain = updater_of(small_net(), clip=0.5, lr=0.01)
    train(scaled, 0, 10)
    train(plain, 0, 10)
    for a, b in zip(scaled.model.state_dict().values(), plain.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert scaled.state_dict()["scaler"]["scale"] == 8.0 and not plain.state_dict()["scaler"]


# ------------------------------------------------------------------------------------------ the teacher, the student


def raw_batch(count=8, side=20):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator),
        "size": torch.full((count, 2), side),
        "key": torch.arange(count),
        "view": torch.full((count,), 3),
        "targets": {"label": torch.arange(count) % 4},
    }


def test_the_teacher_is_frozen():
    """Its weights and buffers are bit-equal after steps in which the student trains; it is in eval mode whatever state
    it came in; what it gives can be saved for backward."""
    torch.manual_seed(0)
    teacher, student = build_model("resnet8", 4, 16), build_model("resnet8", 4, 16)
    teacher.set_feature_layers(["layer3"])
    student.set_feature_layers(["layer3"])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    preprocess = Preprocess(16, [0.5] * 3, [0.25] * 3)
    augment, batch = Augmenter(Policy(crop="pad", hflip=0.5), 0), raw_batch()
    teacher.train()
    targets = live_teacher(teacher, preprocess, augment, OFF)
    assert not teacher.training
    criterion = DistillationLoss(*loss_settings("feature"))
    with torch.no_grad():
        criterion.build(student.eval()({"image": preprocess(augment(batch, 16))}), targets(batch))
    optimizer = make_optimizer(student, criterion, optimizer="sgd", lr=0.05)
    projector = criterion.projectors["feature"][0].weight.detach().clone()
    updater = Updater(student, optimizer, Schedule(0.05, 100, schedule="constant", epochs=1), OFF)
    statistics = student.backbone.bn1.running_mean.clone()
    for _ in range(3):
        student.train()
        taught = targets(batch)
        assert not taught["logits"].requires_grad and not taught["logits"].is_inference()
        assert not taught["features"]["layer3"].is_inference()
        updater(criterion(student({"image": preprocess(augment(batch, 16))}), taught, batch["targets"]["label"]))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not torch.equal(student.backbone.bn1.running_mean, statistics), "the student's statistics do move"
    assert not torch.equal(criterion.projectors["feature"][0].weight, projector), "projectors are trained"
    scale = torch.ones(4, requires_grad=True)
    F.mse_loss(scale * taught["logits"], taught["logits"]).backward()  # raises on outputs of inference_mode


def test_the_teacher_has_its_own_resolution_and_normalization():
    """From the same pixels: the same crop and flip, at its side, with its mean and std."""

    class Spy(nn.Module):
        def forward(self, batch):
            self.seen = batch["image"]
            return {"logits": self.seen.mean((2, 3))}

    spy, policy, batch = Spy(), Policy(crop="pad", hflip=0.5, rotation=20), raw_batch()
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    targets = live_teacher(spy, Preprocess(24, mean, std), Augmenter(policy, 7), OFF)
    student = Preprocess(16, [0.5] * 3, [0.25] * 3)(Augmenter(policy, 7)(batch, 16))
    targets(batch)
    params = sample_parameters(policy, 7, batch["view"], batch["key"], batch["size"])
    for seen, side, shift, scale in ((spy.seen, 24, mean, std), (student, 16, [0.5] * 3, [0.25] * 3)):
        pixels = render(batch["image"], batch["size"], params, side)
        assert seen.shape == (8, 3, side, side)
        torch.testing.assert_close(seen, normalize(pixels, shift, scale))
        by_hand = torch.stack([(pixels[:, c] - shift[c]) / scale[c] for c in range(3)], 1)
        torch.testing.assert_close(seen, by_hand)


# ------------------------------------------------------------------------------------------------------ from the flags


def by_flags(*flags, steps=10):
    """(net, Updater) that a training script makes of these flags."""
    from train_student import build_parser

    args = build_parser().parse_args(
        ["--optimizer", "sgd", "--lr", "0.4", "--weight-decay", "0", "--momentum", "0", *flags]
    )
    net = small_net()
    args = cli.fill_defaults(vars(args), {"epochs": 32})
    optimizer = make_optimizer(net, **cli.options(make_optimizer, vars(args)))
    schedule = Schedule(optimizer.defaults["lr"], steps, **cli.options(Schedule, vars(args)))
    return net, Updater(net, optimizer, schedule, OFF, **cli.options(Updater, vars(args)))


def test_flags_of_the_schedule_reach_it():
    _, updater = by_flags("--schedule", "multistep", "--milestones", "2", "--gamma", "0.3", "--epochs", "9")
    assert [updater.schedule(step) for step in (19, 20)] == pytest.approx([0.4, 0.12])
    for patience in (1, 3):
        _, updater = by_flags("--schedule", "plateau", "--plateau-patience", str(patience), "--gamma", "0.3")
        rates = []
        for gain in (True, False, False, False):
            updater.schedule.end_epoch(gain)
            rates.append(updater.schedule(0))
        expected = {1: [0.4, 0.12, 0.036, 0.0108], 3: [0.4, 0.4, 0.4, 0.12]}[patience]
        assert rates == pytest.approx(expected), patience


def test_clip_grad_bounds_the_step():
    """Plain SGD moves by rate times gradient, whose norm is cut to 0.001."""
    moved = {}
    for clip in ("0", "0.001"):
        net, updater = by_flags("--schedule", "constant", "--clip-grad", clip)
        before = [p.detach().clone() for p in net.parameters()]
        updater(loss_of(net, 0))
        moved[clip] = math.sqrt(sum(float((p.detach() - b).square().sum()) for p, b in zip(net.parameters(), before)))
    assert moved["0.001"] == pytest.approx(0.4 * 0.001, rel=1e-3) and moved["0"] > 0.01


def test_the_average_is_of_steps_not_of_their_parts():
    """Each step in two parts: after two steps of weights w1, w2 it is w1 / 2 + w2 / 2 (it starts as a copy of w1)."""
    net, updater = by_flags("--schedule", "constant", "--ema", "0.5", "--accumulation-steps", "2")
    seen = []
    for step in range(4):
        updater(loss_of(net, step))
        seen.append([p.detach().clone() for p in net.parameters()])
    for average, w1, w2 in zip(updater.evaluated_model.parameters(), seen[1], seen[3]):
        torch.testing.assert_close(average, (w1 + w2) / 2)
