"""The small models of the published CIFAR distillation tables.  Needs torch, no other file of `common`.

    model = CIFAR_MODELS["cifar_resnet20"](100)
    logits = model(images)     # (B, 3, 32, 32) -> (B, 100); other small sides go too

Layers are those of the official code of CRD (Tian et al. 2020, arXiv:1910.10699, RepDistiller), which mdistiller
shares; the weights of their teachers load.  Three things differ: the mean is over the whole map, which is the same at
32 px; the VGGs do not pool once more at 64 px; heads and biases are drawn as PyTorch draws them.
"""

from functools import partial

from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------------- blocks


def conv_bn_relu(width_in, width, side=3, stride=1, groups=1, bias=False):
    """Three layers, of which some blocks take the first one or two."""
    conv = nn.Conv2d(width_in, width, side, stride, side // 2, groups=groups, bias=bias)
    return [conv, nn.BatchNorm2d(width), nn.ReLU()]


class Residual(nn.Module):
    """body(x) + shortcut(x), both lists of layers; without any, the shortcut is x."""

    def __init__(self, body, shortcut=()):
        super().__init__()
        self.body, self.shortcut = nn.Sequential(*body), nn.Sequential(*shortcut)

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


def basic_block(width_in, width, stride):
    """Two 3x3 convolutions and a shortcut, then ReLU: He et al. 2016, arXiv:1512.03385."""
    body = [*conv_bn_relu(width_in, width, 3, stride), *conv_bn_relu(width, width)[:2]]
    shortcut = [] if width_in == width else conv_bn_relu(width_in, width, 1, stride)[:2]
    return nn.Sequential(Residual(body, shortcut), nn.ReLU())


def wide_block(width_in, width, stride):
    """BatchNorm and ReLU before each convolution: Zagoruyko and Komodakis 2016, arXiv:1605.07146.

    Where the width changes, the shortcut begins after the first ReLU.
    """
    first = [nn.BatchNorm2d(width_in), nn.ReLU()]
    body = [*conv_bn_relu(width_in, width, 3, stride), *conv_bn_relu(width, width)[:1]]
    if width_in == width:
        return Residual([*first, *body])
    return nn.Sequential(*first, Residual(body, conv_bn_relu(width_in, width, 1, stride)[:1]))


def vgg_block(width_in, width, stride):
    """A 3x3 convolution, for stride 2 after max-pooling: Simonyan and Zisserman 2015, arXiv:1409.1556."""
    pool = [nn.MaxPool2d(2)] if stride == 2 else []
    return nn.Sequential(*pool, *conv_bn_relu(width_in, width, bias=True))


def inverted_block(width_in, width, stride, expansion=6):
    """1x1 to a larger width, 3x3 in each channel, 1x1 back without ReLU: Sandler et al. 2018, arXiv:1801.04381."""
    wide = width_in * expansion
    depthwise = conv_bn_relu(wide, wide, 3, stride, wide)
    body = [*conv_bn_relu(width_in, wide, 1), *depthwise, *conv_bn_relu(wide, width, 1)[:2]]
    return Residual(body) if stride == 1 and width_in == width else nn.Sequential(*body)


# -------------------------------------------------------------------------------------------------------------- model


class CifarModel(nn.Module):
    """A stem, stages (`layer1`, ...), a tail, the mean over the map, a linear head: (B, 3, H, W) -> logits (B, C).

    widths: after the stem and each stage; counts, strides: of each stage's blocks, and of its first one, which also
    changes the width; embedding: the width after the tail.  With num_classes 0 there is no head.
    """

    def __init__(self, stem, block, widths, counts, strides, tail, embedding, num_classes):
        super().__init__()
        self.stem = nn.Sequential(*stem)
        for i, (count, stride) in enumerate(zip(counts, strides), 1):
            others = [block(widths[i], widths[i], 1) for _ in range(count - 1)]
            self.add_module(f"layer{i}", nn.Sequential(block(widths[i - 1], widths[i], stride), *others))
        self.tail = nn.Sequential(*tail)
        self.fc = nn.Linear(embedding, num_classes) if num_classes else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self):
        return self.fc

    def forward_features(self, x):
        for layer in list(self.children())[:-1]:
            x = layer(x)
        return x  # (B, D, H', W')

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))  # (B, D)
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The official code's weights, in the same order, under the names here; called for foreign weights, as timm's."""
    theirs, ours = ([name for name in names if "num_batches" not in name] for names in (state, model.state_dict()))
    if ours[0] in state or len(theirs) != len(ours):
        return state
    return {name: state[old] for name, old in zip(ours, theirs)}


def resnet(depth: int, widths: tuple, num_classes: int, *_) -> CifarModel:
    """6n + 2 layers.  All four take the number of classes last; the sides that build_model adds, none needs."""
    stem, n = conv_bn_relu(3, widths[0]), depth // 6
    return CifarModel(stem, basic_block, widths, (n, n, n), (1, 2, 2), [], widths[-1], num_classes)


def wide_resnet(depth: int, factor: int, num_classes: int, *_) -> CifarModel:
    """6n + 4 layers."""
    n, width = depth // 6, 64 * factor
    stem, tail = conv_bn_relu(3, 16)[:1], [nn.BatchNorm2d(width), nn.ReLU()]
    widths = (16, width // 4, width // 2, width)
    return CifarModel(stem, wide_block, widths, (n, n, n), (1, 2, 2), tail, width, num_classes)


def vgg(n: int, num_classes: int, *_) -> CifarModel:
    """5n convolutions."""
    widths = (3, 64, 128, 256, 512, 512)
    return CifarModel([], vgg_block, widths, (n, n, n, n, n), (1, 2, 2, 2, 1), [], 512, num_classes)


def mobilenetv2(num_classes: int, *_) -> CifarModel:
    """MobileNetV2 of half the width but for the tail, with ReLU for ReLU6; at 32 px, its last map is 2x2."""
    stem, tail = [*conv_bn_relu(3, 16, 3, 2), inverted_block(16, 8, 1, 1)], conv_bn_relu(160, 1280, 1)
    widths, counts, strides = (8, 12, 16, 32, 48, 80, 160), (2, 3, 4, 3, 3, 1), (1, 2, 2, 1, 2, 1)
    return CifarModel(stem, inverted_block, widths, counts, strides, tail, 1280, num_classes)


CIFAR_MODELS = {  # name: number of classes -> model
    **{f"cifar_resnet{depth}": partial(resnet, depth, (16, 16, 32, 64)) for depth in (20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}x4": partial(resnet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    "cifar_wrn_16_2": partial(wide_resnet, 16, 2),
    "cifar_wrn_40_1": partial(wide_resnet, 40, 1),
    "cifar_wrn_40_2": partial(wide_resnet, 40, 2),
    "cifar_vgg8": partial(vgg, 1),
    "cifar_vgg13": partial(vgg, 2),
    "cifar_mobilenetv2": mobilenetv2,
}
