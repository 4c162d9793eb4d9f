"""Image models behind one contract.  Needs torch and timm, no other file of `common` but for names that say so.

    model = build_model("resnet8", num_classes=10, img_size=32)
    out = model({"image": images})     # images (B, 3, H, W), normalized for this model
    out["logits"]                      # (B, C); not there with num_classes=0; with findings=[...] see `heads`
    out["embedding"]                   # (B, D), pooled: see model.set_pooling
    out["tokens"]                      # (B, N, D), the grid's, without class token and registers; if model.with_tokens
    out["features"]["layer3"]          # (B, C_l, H_l, W_l), where model.set_feature_layers(["layer3"]) asked for it

Names: `resnet8` and `resnet18` are written here, for small images; `vit_6_192` and `vit_tiny` are timm's ViT of width
192 with 6 and 12 layers and patches of 4 pixels; `cifar_resnet20` and the like are those of published CIFAR tables (see
cifar_models.py); `FILE.py:FUNCTION` is a function of your own (see custom.py), and `hf:NAME_OR_FOLDER` a Hugging Face
vision model (see hugging_face.py); any other name is timm's (`timm:resnet18` for timm's where both have it), and so are
`dinov2_vits14` and its kind.
"""

import contextlib
import difflib
import importlib
import logging
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class ModelError(ValueError):
    """A model, layer or weight file that does not exist or does not fit (a user's mistake)."""

    exit_code = 2


def one_line(error: Exception) -> str:
    """An exception's message in one line of at most 200 characters, or its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------------------------------- ResNet


def linear_head(width: int, num_classes: int) -> nn.Module:
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, He et al. 2016, arXiv:1512.03385."""

    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet for small images: 3x3 stride-1 stem, no max-pool, widths 64 to 512.

    `blocks` a stage: [1, 1, 1, 1] is ResNet-8 here (4.9 M parameters), [2, 2, 2, 2] ResNet-18 (11.2 M).
    """

    def __init__(self, blocks, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width_in = 64
        for i, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512)), 1):
            stride = 1 if i == 1 else 2
            stage = [BasicBlock(width_in if j == 0 else width, width, stride if j == 0 else 1) for j in range(count)]
            setattr(self, f"layer{i}", nn.Sequential(*stage))
            width_in = width
        self.num_features = width_in
        self.fc = linear_head(width_in, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self):
        return self.fc

    def forward_features(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 512, H / 8, W / 8)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))  # (B, 512)
        return x if pre_logits else self.fc(x)


# ----------------------------------------------------------------------------------------------------------- the model


class Keep:
    """A forward hook that keeps a layer's output, as a pre-hook its input; an object, so that a deep copy of a model
    (EMA) keeps its own."""

    def __init__(self, kept, layer):
        self.kept, self.layer = kept, layer

    def __call__(self, module, inputs, output=None):
        self.kept[self.layer] = inputs[0] if output is None else output


class _Dropout:
    """A forward pre-hook: dropout of a layer's input; an object, as Keep."""

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, module, inputs):
        return (F.dropout(inputs[0], self.probability, module.training), *inputs[1:])


class ImageModel(nn.Module):
    """A backbone behind `model(batch) -> dict`, see the head of this file.

    `build_args` rebuild it: `build_model(**build_args)`, never asking a hub.  `mean`, `std`: what its pretrained
    weights expect, or None.  `known_classes`: the number of classes of the head that came with its weights, 0 if none
    did that fits; None: the weights are random.
    """

    kind = "image"  # the checkpoint's

    def __init__(self, backbone: nn.Module, build_args: dict):
        super().__init__()
        self.backbone, self.build_args = backbone, build_args
        self.mean, self.std, self.known_classes = None, None, None
        self.feature_layers, self._indices, self._hooks, self._kept = [], {}, [], {}
        self.pooling, self.with_tokens, self.frozen = None, False, False
        self._side = build_args["img_size"]  # in pixels, see set_resolution

    def forward(self, batch: dict) -> dict:
        order = sorted(self._indices.values())
        if order:
            hidden, maps = self.backbone.forward_intermediates(batch["image"], indices=order, output_fmt="NCHW")
        else:
            hidden = self.backbone.forward_features(batch["image"])
        out = {"embedding": self._embedding(hidden)}  # (B, D)
        if self.build_args["num_classes"]:
            logits = self.backbone.forward_head(hidden)  # (B, C)
            if isinstance(logits, tuple):  # see split_heads
                logits, out["distilled"] = logits
            out.update(self.heads(logits))
        if self.with_tokens:
            out["tokens"] = self._tokens(hidden)  # (B, N, D)
        if order:
            out["features"] = {layer: maps[order.index(i)] for layer, i in self._indices.items()}
        elif self.feature_layers:  # after the head, which may be one of them
            out["features"] = self._hooked_features()
        return out

    def heads(self, logits: torch.Tensor) -> dict:
        """The backbone's (B, C) as the model's: `logits`, or of findings `logits_<finding>` (B, 2) each.

        A finding's two logits are 0 (absent) and its own: their softmax is its sigmoid, their cross-entropy the binary
        one, and their KL at a temperature the binary one.
        """
        names = self.build_args.get("findings")
        if not names:
            return {"logits": logits}
        pairs = torch.stack([torch.zeros_like(logits), logits], 2)  # (B, F, 2)
        return {f"logits_{name}": pair for name, pair in zip(names, pairs.unbind(1))}

    def _embedding(self, hidden):
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "mean":
            return self._tokens(hidden).mean(1)
        return self.backbone.forward_head(hidden, pre_logits=True)

    def _tokens(self, hidden):
        """Tokens (B, N, D) or a last map -> the grid's tokens, row by row."""
        if hidden.dim() == 4:
            return hidden.flatten(1, 2) if self._channels_last else hidden.flatten(2).transpose(1, 2)
        if hidden.dim() == 3:
            return hidden[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        raise ModelError(f"{self.name} has no tokens: its last layer gives {tuple(hidden.shape)}")

    @property
    def _channels_last(self):
        return getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"

    def example(self, resolution: int | None = None, rows: int = 2) -> dict:
        """A batch of black images, on the model's device, for a dry run."""
        side = resolution or self._side
        return {"image": torch.zeros(rows, 3, side, side, device=next(self.parameters()).device)}

    def set_pooling(self, pooling: str | None):
        """Choose the embedding: cls, the class token; mean, of the grid's tokens; map, the model's attention pooling;
        None, what its head takes.  The logits stay those of its head.  Raises ModelError."""
        has_class = getattr(self.backbone, "has_class_token", getattr(self.backbone, "cls_token", None) is not None)
        if pooling == "cls" and not has_class:
            raise ModelError(f"--pooling cls: {self.name} has no class token")
        if pooling == "map" and getattr(self.backbone, "attn_pool", None) is None:
            raise ModelError(f"--pooling map: {self.name} has no attention pooling")
        self.pooling = self.build_args["pooling"] = pooling

    @property
    def classifiers(self) -> list[nn.Module]:
        """The layers that make the logits: one, but two in timm's distilled DeiTs."""
        heads = self.backbone.get_classifier()
        return list(heads) if isinstance(heads, (tuple, list)) else [heads]

    @property
    def head_names(self) -> tuple[str, ...]:
        """What the names of the parameters that make the logits begin with."""
        names = (getattr(self.backbone, "pretrained_cfg", None) or {}).get("classifier") or ("head", "fc")
        return (names,) if isinstance(names, str) else tuple(names)

    def take_pretrained(self, known_classes: int, head_kept: bool):
        """Note that these weights are pretrained: their normalization, and a small new head if theirs is not kept.

        timm draws some heads so large (EfficientNet's from -0.41 to 0.41) that the first steps undo what was learned.
        """
        if hasattr(self.backbone, "hub_normalization"):  # Hugging Face's
            self.mean, self.std = self.backbone.hub_normalization()
        else:
            config = getattr(self.backbone, "pretrained_cfg", None) or {}
            self.mean, self.std = (list(config[name]) if config.get(name) else None for name in ("mean", "std"))
        self.known_classes = known_classes if head_kept or known_classes != self.build_args["num_classes"] else 0
        for layer in () if head_kept else self.classifiers:
            for module in layer.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.trunc_normal_(module.weight, std=0.01)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def split_heads(self):
        """In training timm's distilled DeiTs give `logits` of the class token's head and `distilled`, (B, C), of the
        distillation token's (Touvron et al. 2021, arXiv:2012.12877); in evaluation their mean.  Others stay as they
        are."""
        if hasattr(self.backbone, "set_distilled_training"):
            self.backbone.set_distilled_training()

    def set_dropout(self, probability: float):
        """Drop that share of the head's input in training.  Once, before compiling."""
        for layer in self.classifiers if probability else ():
            layer.register_forward_pre_hook(_Dropout(probability))

    def freeze_backbone(self):
        """Train the head alone: all else gets no gradient and stays in eval mode, BatchNorm's statistics too."""
        heads = self.classifiers
        self.requires_grad_(False)
        for layer in heads:
            layer.requires_grad_(True)
        self.frozen = True

    def train(self, mode: bool = True) -> "ImageModel":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
            for layer in self.classifiers:
                layer.train(mode)
        return self

    def set_feature_layers(self, layers: list[str]):
        """Return the maps of these module paths from now on.  Call before compiling: later hooks never fire."""
        modules = dict(self.backbone.named_modules())
        for layer in layers:
            if layer not in modules or layer == "":
                raise ModelError(f"{self.name} has no layer {layer!r}; it has {', '.join(self.layer_names())}")
            if layers.count(layer) > 1:
                raise ModelError(f"layer {layer} of {self.name} is named twice")
        for hook in self._hooks:
            hook.remove()
        self.feature_layers, self._indices, self._hooks = list(layers), {}, []
        known = self._listed_layers()
        if all(layer in known for layer in layers):
            self._indices = {layer: known.index(layer) for layer in layers}
        else:
            self._hooks = [modules[layer].register_forward_hook(Keep(self._kept, layer)) for layer in layers]

    def _listed_layers(self):
        """The module paths that timm's forward_intermediates gives, in order; others need hooks."""
        if not hasattr(self.backbone, "forward_intermediates"):
            return []
        return [entry["module"] for entry in getattr(self.backbone, "feature_info", ())]

    def _hooked_features(self):
        return {layer: self._as_map(layer, self._kept.pop(layer, None)) for layer in self.feature_layers}

    def _as_map(self, layer, value):
        """Output of a module -> (B, C, H, W): tokens lose their prefix and become a grid, channels-last maps turn."""
        if value is None:
            raise ModelError(f"layer {layer} of {self.name} is never called: name a layer in or around it")
        if not isinstance(value, torch.Tensor):  # Hugging Face layers may return a tuple or an output object
            value = value[0]
        if value.dim() == 4:
            channels_last = self._channels_last
            if (value.shape[1] == value.shape[2]) != (value.shape[2] == value.shape[3]):
                channels_last = value.shape[1] == value.shape[2]  # images are square: a layer may differ from its model
            return value.permute(0, 3, 1, 2) if channels_last else value
        if value.dim() == 3:
            for prefix in (getattr(self.backbone, "num_prefix_tokens", 0), 0):  # a patch embedding has no prefix yet
                tokens = value[:, prefix:]  # (B, N, D)
                side = math.isqrt(tokens.shape[1])
                if side * side == tokens.shape[1] and side:
                    return tokens.transpose(1, 2).unflatten(2, (side, side))
        if value.dim() == 2:
            return value[:, :, None, None]
        raise ModelError(
            f"layer {layer} of {self.name} gives {tuple(value.shape)}, which is neither a map nor a square grid"
        )

    def layer_names(self) -> list[str]:
        """Module paths that people name: stages and blocks (the first number of a path is its end), layers around."""
        names = []
        for name, module in self.backbone.named_modules():
            parts = name.split(".")
            block = parts[-1].isdigit() and not any(part.isdigit() for part in parts[:-1])
            if name and (len(parts) == 1 or block) and any(True for _ in module.parameters()):
                names.append(name)
        return names

    def set_resolution(self, resolution: int):
        """Make a model of fixed positions take another input side in pixels (others resize as they run)."""
        self.check_side(resolution, resize=resolution != self._side and hasattr(self.backbone, "set_input_size"))
        self._side = resolution

    def check_side(self, resolution: int, resize: bool = False):
        """Raise ModelError where one black image of this side does not go through; resize: tell the backbone first."""
        training = self.training
        try:
            if resize:
                self.backbone.set_input_size(img_size=(resolution, resolution))
            with torch.no_grad():
                self.eval()(self.example(resolution, 1))
        except ModelError:
            raise
        except Exception as error:  # each model complains in its own way
            raise ModelError(f"{self.name} cannot take {resolution} px: {one_line(error)}") from None
        finally:
            self.train(training)

    @property
    def name(self) -> str:
        return self.build_args["name"]

    @property
    def family(self) -> str:
        """cnn or vit: whether anything attends over tokens, but for a pooling at the end (as CLIP's ResNets have)."""
        for module in self.modules():
            name = type(module).__name__.lower()
            if ("attention" in name or hasattr(module, "num_heads")) and "pool" not in name:
                return "vit"
        return "cnn"

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


# ------------------------------------------------------------------------------------------------------------ building


def _vit(depth, num_classes, img_size, patch_size):
    import timm

    options = {"img_size": img_size, "patch_size": patch_size, "depth": depth, "dynamic_img_size": True}
    arguments = {"model_name": "vit_tiny_patch16_224", "num_classes": num_classes, **options}
    model = timm.create_model(**arguments)  # width 192, 3 heads
    model.timm_arguments = arguments  # see export.py
    model.pretrained_cfg = {}  # that of other patches and depth
    return model


SMALL_MODELS = {  # name: (number of classes, side, patch side in pixels) -> backbone
    "resnet8": lambda num_classes, *_: ResNet([1, 1, 1, 1], num_classes),
    "resnet18": lambda num_classes, *_: ResNet([2, 2, 2, 2], num_classes),
    "vit_6_192": lambda *sizes: _vit(6, *sizes),
    "vit_tiny": lambda *sizes: _vit(12, *sizes),
}


DINOV2 = {  # the names on torch's hub -> timm's
    f"dinov2_vit{side[0]}14{ours}": f"vit_{side}_patch14_{theirs}dinov2.lvd142m"
    for side in ("small", "base", "large", "giant")
    for ours, theirs in (("", ""), ("_reg", "reg4_"))
}


def build_model(
    name: str,
    num_classes: int,
    img_size: int = 32,
    patch_size: int | None = None,
    pretrained: bool = False,
    hf_config: dict | None = None,
    pooling: str | None = None,
    dynamic: bool = False,
    findings: list[str] | None = None,
) -> ImageModel:
    """Build an ImageModel; see the head of this file for names.

    img_size: input side in pixels; patch_size: a ViT's patch side in pixels, where not its own (4 of vit_6_192 and
    vit_tiny); pretrained: hub weights, with a new head, or those that a function of your own loads; hf_config: set when
    an `hf:` model is rebuilt from a checkpoint; pooling: see `set_pooling`; dynamic: images of other sides come too
    (local crops), for which timm's ViTs then resize their positions; findings: names of the num_classes logits, which
    are independent then.  num_classes 0: no head and no logits.  Raises ModelError.
    """
    model = _build(name, num_classes, img_size, patch_size, pretrained, hf_config, dynamic)
    if findings:
        model.build_args["findings"] = findings
    model.set_pooling(pooling)
    return model


def _build(name, num_classes, img_size, patch_size, pretrained, hf_config, dynamic):
    build_args = {"name": name, "num_classes": num_classes, "img_size": img_size}
    build_args.update({key: value for key, value in (("patch_size", patch_size), ("dynamic", dynamic)) if value})
    foreign = ".py:" in name or name.startswith("hf:")
    if name.startswith("cifar_") and not foreign:
        SMALL_MODELS.update(_optional("cifar_models", name).CIFAR_MODELS)
    small = name in SMALL_MODELS
    if small and name.startswith("vit"):
        patch_size = patch_size or 4
    elif patch_size and (small or foreign):
        raise ModelError(f"--patch-size {patch_size} is for timm's ViTs, vit_tiny and vit_6_192, not for {name}")
    if patch_size and img_size % patch_size:
        raise ModelError(f"--patch-size {patch_size} does not divide the resolution {img_size}")
    if ".py:" in name:
        return _optional("custom", name).build_custom(build_args, pretrained)
    if foreign:
        return _optional("hugging_face", name).build_hugging_face(build_args, pretrained, hf_config)
    if not small:
        return _build_timm(build_args, pretrained)
    if pretrained:
        raise ModelError(
            f"--pretrained: the hub has no weights of {name}; it has some of timm:resnet18 and vit_tiny_patch16_224"
        )
    return ImageModel(SMALL_MODELS[name](num_classes, img_size, patch_size), build_args)


def _optional(file, name):
    """The file of `common` that models of such names need, imported when one is built.  Raises ModelError."""
    try:
        return importlib.import_module(f"common.{file}")
    except ModuleNotFoundError as error:
        if error.name.startswith("common"):
            problem = f"the file common/{file}.py: copy it from the collection"
        else:
            problem = f"the package {error.name}: pip install {error.name}"
        raise ModelError(f"{name} needs {problem}") from None


def _build_timm(build_args, pretrained):
    import timm

    name, side = build_args["name"], build_args["img_size"]
    timm_name = name.removeprefix("timm:")
    timm_name = DINOV2.get(timm_name, timm_name)
    if not timm.is_model(timm_name.split(".")[0]):
        near = difflib.get_close_matches(timm_name, {*SMALL_MODELS, *timm.list_models()}, 3)
        hint = f"near: {', '.join(near)}" if near else f"ours: {', '.join(SMALL_MODELS)}, any other is timm's"
        raise ModelError(f"unknown model {name!r}; {hint}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line of ours, not one for each retry
    try:
        backbone = _create_timm(timm_name, build_args, pretrained)
    except ModelError:
        raise
    except Exception as error:  # each model complains in its own way
        problem = f"timm cannot build {timm_name} at {side} px: {one_line(error)}"
        if pretrained:
            with contextlib.suppress(Exception):  # where it builds without them, the weights are what is missing
                problem = _no_weights(timm_name, _create_timm(timm_name, build_args, False).pretrained_cfg, error)
        raise ModelError(problem) from None
    model = ImageModel(backbone, build_args)
    if pretrained:
        known = backbone.pretrained_cfg.get("num_classes", 0)
        model.take_pretrained(known, known == build_args["num_classes"])
    model.check_side(side)
    return model


def _create_timm(timm_name, build_args, pretrained):
    """timm.create_model without the options that this model does not take: a Swin has no dynamic_img_size, a CNN no
    img_size either.  Raises ModelError where one of them is patch_size."""
    import timm

    options = {"img_size": "img_size", "patch_size": "patch_size", "dynamic": "dynamic_img_size"}
    options = {theirs: build_args[ours] for ours, theirs in options.items() if build_args.get(ours)}
    while True:
        arguments = {"num_classes": build_args["num_classes"], **options}
        try:
            model = timm.create_model(timm_name, pretrained=pretrained, **arguments)
            model.timm_arguments = {"model_name": timm_name, **arguments}  # see export.py
            return model
        except TypeError as error:
            refused = [option for option in options if f"'{option}'" in str(error)]
            if "patch_size" in refused:
                raise ModelError(f"--patch-size {options['patch_size']}: {build_args['name']} takes none") from None
            if not refused:
                raise
            del options[refused[0]]


def _no_weights(timm_name, config, error):
    """Why the hub's weights did not come, and which file to fetch.  config: timm's pretrained_cfg, a dict."""
    hub, url = config.get("hf_hub_id"), config.get("url")
    if not hub and not url:
        return f"--pretrained: the hub has no weights of {timm_name}"
    file = f"{config.get('hf_hub_filename') or 'model.safetensors'} of {hub} on the Hugging Face hub" if hub else url
    return (
        f"cannot get the weights of {timm_name} ({type(error).__name__}): fetch {file} by hand and pass it with "
        "--weights FILE in place of --pretrained (a teacher's: --teacher-weights FILE)"
    )


def multiply_adds(model: nn.Module, resolution: int) -> int:
    """Multiply-adds of one image's forward pass: half the FLOPs, which count two each."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        warnings.simplefilter("ignore")  # MATH: fused attention is not counted on every device
        model(model.example(resolution, 1))
    model.train(training)
    return counter.get_total_flops() // 2
