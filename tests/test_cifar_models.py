"""The models of the published CIFAR distillation tables: against the tables, and against the official definitions
written anew with torch.nn.functional, by the official names of the weights."""

import pytest
import torch
from conftest import SMALL, succeed
from test_models import forward, images, refusal
from torch.nn import functional as F

from common.cifar_models import CIFAR_MODELS, checkpoint_filter_fn
from common.models import build_model, multiply_adds
from common.weights import load_weights

PUBLISHED = {  # millions of parameters at 100 classes; of resnet44, which the tables lack, by its architecture
    "cifar_resnet20": 0.28,
    "cifar_resnet32": 0.47,
    "cifar_resnet44": 0.67,
    "cifar_resnet56": 0.86,
    "cifar_resnet110": 1.74,
    "cifar_resnet8x4": 1.23,
    "cifar_resnet32x4": 7.43,
    "cifar_wrn_16_2": 0.70,
    "cifar_wrn_40_1": 0.57,
    "cifar_wrn_40_2": 2.26,
    "cifar_vgg8": 3.97,
    "cifar_vgg13": 9.46,
    "cifar_mobilenetv2": 0.81,
}
EMBEDDING = {"resnet": 64, "x4": 256, "wrn_16_2": 128, "wrn_40_1": 64, "wrn_40_2": 128, "vgg": 512, "mobile": 1280}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_shapes_and_gradients(name):
    model = build_model(name, 100, 32)
    assert round(model.num_parameters / 1e6, 2) == PUBLISHED[name]
    width = [value for part, value in EMBEDDING.items() if part in name][-1]
    for side in (32, 16):
        model.set_resolution(side)
        shapes = {key: tuple(value.shape) for key, value in forward(model, images(side)).items()}
        assert shapes == {"logits": (2, 100), "embedding": (2, width)}
    labels = torch.tensor([3, 71])
    F.cross_entropy(model.train()({"image": images()})["logits"], labels).backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert all(grad.abs().max() > 0 for key, grad in grads.items() if key.endswith("weight"))
    assert model.family == "cnn" and set(forward(build_model(name, 0, 32), images())) == {"embedding"}


def test_all_names_are_tested_and_others_refused():
    assert set(CIFAR_MODELS) == set(PUBLISHED)
    message = refusal(build_model, "cifar_resnet2", 10)
    assert "unknown model 'cifar_resnet2'" in message and "cifar_resnet20" in message
    assert "cifar_own.py, which does not exist" in refusal(build_model, "cifar_own.py:net", 10)
    assert "--pretrained" in refusal(build_model, "cifar_vgg8", 10, pretrained=True)
    assert "--patch-size 4" in refusal(build_model, "cifar_vgg8", 10, patch_size=4)


# --------------------------------------------------------------------------------------------- the official definition


class Official:
    """Functions that draw a weight under its official name when it is first used; evaluation mode, float64."""

    def __init__(self):
        self.state, self.generator = {}, torch.Generator().manual_seed(0)

    def draw(self, name, *shape, low=-1.0, high=1.0):
        value = torch.rand(*shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return self.state.setdefault(name, value.float()).double()

    def conv(self, name, x, width, side=3, stride=1, groups=1, bias=False):
        bound = (3 * groups / (x.shape[1] * side**2)) ** 0.5
        weight = self.draw(f"{name}.weight", width, x.shape[1] // groups, side, side, low=-bound, high=bound)
        return F.conv2d(x, weight, self.draw(f"{name}.bias", width) if bias else None, stride, side // 2, 1, groups)

    def bn(self, name, x):
        scale, shift = self.draw(f"{name}.weight", x.shape[1], low=0.5), self.draw(f"{name}.bias", x.shape[1])
        mean, var = self.draw(f"{name}.running_mean", x.shape[1]), self.draw(f"{name}.running_var", x.shape[1], low=0.5)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return x * scale[:, None, None] + shift[:, None, None]

    def linear(self, name, x):
        return x @ self.draw(f"{name}.weight", 10, x.shape[1]).T + self.draw(f"{name}.bias", 10)

    def resnet(self, x, n, widths):
        x = self.bn("bn1", self.conv("conv1", x, widths[0])).relu()
        for stage in (1, 2, 3):
            for i in range(n):
                at, stride, shortcut = f"layer{stage}.{i}.", 2 if stage > 1 and i == 0 else 1, x
                width = widths[stage]
                x = self.bn(f"{at}bn1", self.conv(f"{at}conv1", x, width, 3, stride)).relu()
                x = self.bn(f"{at}bn2", self.conv(f"{at}conv2", x, width))
                if shortcut.shape != x.shape:
                    shortcut = self.conv(f"{at}downsample.0", shortcut, width, 1, stride)
                    shortcut = self.bn(f"{at}downsample.1", shortcut)
                x = (x + shortcut).relu()
        return self.linear("fc", F.avg_pool2d(x, 8).flatten(1))

    def wide_resnet(self, x, n, factor):
        x = self.conv("conv1", x, 16)
        for stage in (1, 2, 3):
            for i in range(n):
                at, stride = f"block{stage}.layer.{i}.", 2 if stage > 1 and i == 0 else 1
                width = 8 * factor * 2**stage
                active = self.bn(f"{at}bn1", x).relu()
                equal = x.shape[1] == width
                out = self.bn(f"{at}bn2", self.conv(f"{at}conv1", active, width, 3, stride)).relu()
                out = self.conv(f"{at}conv2", out, width)
                x = out + (x if equal else self.conv(f"{at}convShortcut", active, width, 1, stride))
        return self.linear("fc", F.avg_pool2d(self.bn("bn1", x).relu(), 8).flatten(1))

    def vgg(self, x, n):
        for block, width in enumerate((64, 128, 256, 512, 512)):
            for i in range(n):
                x = self.conv(f"block{block}.{3 * i}", x, width, bias=True)
                x = self.bn(f"block{block}.{3 * i + 1}", x).relu()
            if block < 3:
                x = F.max_pool2d(x, 2)
        return self.linear("classifier", F.adaptive_avg_pool2d(x, 1).flatten(1))

    def mobilenetv2(self, x):
        x = self.bn("conv1.1", self.conv("conv1.0", x, 16, 3, 2)).relu()
        table = [
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        for stage, (expansion, width, count, stride) in enumerate(table):
            for i in range(count):
                at, wide, step, before = f"blocks.{stage}.{i}.conv.", expansion * x.shape[1], stride if i == 0 else 1, x
                x = self.bn(f"{at}1", self.conv(f"{at}0", x, wide, 1)).relu()
                x = self.bn(f"{at}4", self.conv(f"{at}3", x, wide, 3, step, groups=wide)).relu()
                x = self.bn(f"{at}7", self.conv(f"{at}6", x, width // 2, 1))
                x = x + before if step == 1 and before.shape == x.shape else x
        x = self.bn("conv2.1", self.conv("conv2.0", x, 1280, 1)).relu()
        return self.linear("classifier.0", F.avg_pool2d(x, 2, ceil_mode=True).flatten(1))


@pytest.mark.parametrize(
    "name, family, options",
    [
        ("cifar_resnet20", "resnet", (3, (16, 16, 32, 64))),
        ("cifar_resnet56", "resnet", (9, (16, 16, 32, 64))),
        ("cifar_resnet8x4", "resnet", (1, (32, 64, 128, 256))),
        ("cifar_wrn_16_2", "wide_resnet", (2, 2)),
        ("cifar_wrn_40_1", "wide_resnet", (6, 1)),
        ("cifar_vgg8", "vgg", (1,)),
        ("cifar_vgg13", "vgg", (2,)),
        ("cifar_mobilenetv2", "mobilenetv2", ()),
    ],
)
def test_official_weights_load_and_give_the_official_logits(name, family, options):
    """Their files hold BatchNorm's counters too, and the weights under a key beside another entry."""
    official = Official()
    logits = getattr(official, family)(images().double(), *options)
    state = {}
    for key, value in official.state.items():
        state[key] = value
        if key.endswith("running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    model = build_model(name, 10, 32)
    if name == "cifar_mobilenetv2":  # no table's teacher: load_weights takes its names for those of DINOv2
        counters = {key: value for key, value in model.backbone.state_dict().items() if "num_batches" in key}
        model.backbone.load_state_dict({**counters, **checkpoint_filter_fn(state, model.backbone)}, strict=True)
    else:
        load_weights(model, {"epoch": 240, "model": state}, "official.pth")
    out = forward(model.double(), images().double())["logits"]
    torch.testing.assert_close(out, logits, rtol=1e-6, atol=1e-6 * float(logits.abs().max()))
    assert logits.std() > 0.01


def test_own_weights_load_in_any_order_and_of_another_model_do_not():
    state = build_model("cifar_vgg8", 10).backbone.state_dict()
    model = build_model("cifar_vgg8", 10)
    load_weights(model, dict(sorted(state.items())), "own.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())
    assert "does not fit cifar_vgg13" in refusal(load_weights, build_model("cifar_vgg13", 10), state, "own.pth")


def test_multiply_adds():
    """ResNet-20 at 32 px: 3x3 convolutions of 3 stages at 32, 16 and 8 px, two 1x1 shortcuts, the head."""
    pixels, total = 32 * 32, 3 * 16 * 9 * 32 * 32
    total += 6 * 16 * 16 * 9 * pixels
    for width in (32, 64):
        pixels //= 4
        total += (width // 2 * width * 9 + 5 * width * width * 9 + width // 2 * width) * pixels
    assert multiply_adds(build_model("cifar_resnet20", 100), 32) == total + 64 * 100


def test_layers_have_one_name_in_all_families():
    for name, width, side in (("cifar_resnet32x4", 256, 8), ("cifar_wrn_16_2", 128, 8), ("cifar_vgg8", 256, 8)):
        model = build_model(name, 10)
        model.set_feature_layers(["layer3"])
        assert forward(model, images())["features"]["layer3"].shape == (2, width, side, side)
    assert "layer3" in refusal(model.set_feature_layers, ["block3"])


# ------------------------------------------------------------------------------------------------------------- scripts


def test_scripts(tmp_path):
    """A teacher, a student, feature distillation, a resumed run, and what reads their checkpoints."""
    small = [*SMALL, "--epochs", "1"]
    succeed("train_teacher.py", *small, "--model", "cifar_wrn_16_2", "--output", "teacher", cwd=tmp_path)
    succeed("train_student.py", *small, "--model", "cifar_resnet20", "--output", "student", cwd=tmp_path)
    layers = ["--method", "feature", "--student-layer", "layer3", "--teacher-layer", "layer3", "--allow-weak-teacher"]
    flags = [*small, *layers, "--model", "cifar_resnet20", "--teacher-checkpoint", "teacher/best.pth"]
    flags += ["--init-checkpoint", "student/best.pth", "--output", "distill"]
    succeed("distill.py", *flags, cwd=tmp_path)
    succeed("distill.py", "--resume", "distill", "--epochs", "2", cwd=tmp_path)
    saved = torch.load(tmp_path / "distill" / "best.pth", weights_only=True)
    assert saved["model_args"]["name"] == "cifar_resnet20"
    model = build_model(**saved["model_args"])
    model.load_state_dict(saved["model"], strict=True)
    succeed("evaluate.py", "distill/best.pth", "--device", "cpu", cwd=tmp_path)
    succeed("extract_embeddings.py", "--checkpoint", "teacher/best.pth", "--splits", "val", cwd=tmp_path)
    torch.save(model.backbone.state_dict(), tmp_path / "own.pth")
    flags = ["--model", "cifar_resnet20", "--weights", "own.pth", "--output", "again"]
    done = succeed("train_student.py", *small, *flags, cwd=tmp_path)
    assert "own.pth" in done.stdout + done.stderr
