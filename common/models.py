"""Image models behind one contract.  Needs torch and timm (transformers for `hf:` names), no other file of `common`.

    model = build_model("resnet8", num_classes=10, img_size=32)
    out = model({"image": images})     # images (B, 3, H, W), normalized for this model
    out["logits"]                      # (B, C); not there with num_classes=0
    out["embedding"]                   # (B, D), pooled: see model.set_pooling
    out["tokens"]                      # (B, N, D), the grid's, without class token and registers; if model.with_tokens
    out["features"]["layer3"]          # (B, C_l, H_l, W_l), where model.set_feature_layers(["layer3"]) asked for it

`resnet8`, `resnet18`, `vit_6_192`, `vit_tiny` are written here, for small images; any other name is timm's
(`timm:resnet18` is timm's where both have it; `dinov2_vits14` and its kind are), `hf:NAME_OR_FOLDER` is a Hugging
Face vision model.
"""

import contextlib
import inspect
import logging
import math
import os
import re
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class ModelError(ValueError):
    """A model, layer or weight file that does not exist or does not fit (a user's mistake)."""

    exit_code = 2


# ------------------------------------------------------------------------------------------------------------- ResNet


def linear_head(width, num_classes):
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

    def forward_features(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 512, H / 8, W / 8)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))  # (B, 512)
        return x if pre_logits else self.fc(x)


# ---------------------------------------------------------------------------------------------------------------- ViT


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, Dosovitskiy et al. 2021, arXiv:2010.11929."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT with a class token and learned positions, which are resized where the image's grid differs."""

    num_prefix_tokens = 1

    def __init__(self, depth, dim, heads, patch_size, img_size, num_classes):
        super().__init__()
        self.patch_size = patch_size
        self.check_patches(img_size)
        self.num_features, self.grid = dim, img_size // patch_size
        self.patch_embed = nn.Conv2d(3, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.blocks = nn.Sequential(*[TransformerBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = linear_head(dim, num_classes)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def check_patches(self, side):
        if side % self.patch_size:
            raise ModelError(f"--patch-size {self.patch_size} does not divide the resolution {side}")

    def no_weight_decay(self):
        return {"cls_token", "pos_embed"}

    def positions(self, height, width):
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward_features(self, x):
        x = self.patch_embed(x)  # (B, D, H / P, W / P)
        height, width = x.shape[-2:]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return self.norm(self.blocks(x + self.positions(height, width)))  # (B, 1 + N, D)

    def forward_head(self, x, pre_logits=False):
        return x[:, 0] if pre_logits else self.head(x[:, 0])


# -------------------------------------------------------------------------------------------------------- Hugging Face


class HuggingFaceBackbone(nn.Module):
    """A vision model of transformers with a linear head on its class token, else on the mean of its map or tokens."""

    UNDECAYED = (
        "cls_token",
        "class_embedding",
        "distillation_token",
        "register_tokens",
        "mask_token",
        "position_embed",
        "relative_position_bias",
    )

    def __init__(self, body, num_classes):
        super().__init__()
        self.body = body
        config = body.config
        self.num_features = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        named = {name.split(".")[-1]: parameter for name, parameter in body.named_parameters()}
        self.has_class_token = "cls_token" in named or "class_embedding" in named  # Swin and SigLIP have none
        registers = named["register_tokens"].shape[1] if "register_tokens" in named else 0
        self.num_prefix_tokens = int(self.has_class_token) + int("distillation_token" in named) + registers
        # signature, not __code__: the methods are decorated
        resizes = "interpolate_pos_encoding" in inspect.signature(body.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if resizes else {}
        self.head = linear_head(self.num_features, num_classes)

    def no_weight_decay(self):
        return {name for name, _ in self.named_parameters() if any(part in name for part in self.UNDECAYED)}

    def forward_features(self, x):
        return self.body(pixel_values=x, **self.options).last_hidden_state  # (B, N, D) or (B, D, H, W)

    def forward_head(self, x, pre_logits=False):
        if x.dim() == 4:
            pooled = x.mean((2, 3))
        else:
            pooled = x[:, 0] if self.has_class_token else x.mean(1)
        return pooled if pre_logits else self.head(pooled)


# ----------------------------------------------------------------------------------------------------------- the model


class _Keep:
    """A forward hook that notes a layer's output; an object, so that a deep copy of a model (EMA) notes its own."""

    def __init__(self, kept, layer):
        self.kept, self.layer = kept, layer

    def __call__(self, module, inputs, output):
        self.kept[self.layer] = output


class _Dropout:
    """A forward pre-hook: dropout of a layer's input; an object, as _Keep."""

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, module, inputs):
        return (F.dropout(inputs[0], self.probability, module.training), *inputs[1:])


class ImageModel(nn.Module):
    """A backbone (ours, timm's or Hugging Face's) behind `model(batch) -> dict`, see the head of this file.

    `build_args` rebuild it: `build_model(**build_args)`, never asking a hub.  `mean`, `std`: what its pretrained
    weights expect, or None.  `known_classes`: of the head that came with its weights, 0 if none did that fits; None:
    they are random.
    """

    kind = "image"  # of a checkpoint

    def __init__(self, backbone, build_args):
        super().__init__()
        self.backbone, self.build_args = backbone, build_args
        self.mean, self.std, self.known_classes = None, None, None
        self.feature_layers, self._indices, self._hooks, self._hooked = [], None, [], {}
        self.pooling, self.with_tokens, self.frozen = None, False, False
        self._side = build_args["img_size"]  # in pixels, see set_resolution

    def forward(self, batch):
        if self._indices is None:
            hidden = self.backbone.forward_features(batch["image"])
        else:
            order = sorted(self._indices)
            hidden, maps = self.backbone.forward_intermediates(batch["image"], indices=order, output_fmt="NCHW")
        tokens = self._tokens(hidden) if self.with_tokens or self.pooling == "mean" else None  # (B, N, D)
        if self.pooling == "cls":
            embedding = hidden[:, 0]
        else:
            embedding = (
                tokens.mean(1) if self.pooling == "mean" else self.backbone.forward_head(hidden, pre_logits=True)
            )
        out = {"embedding": embedding}  # (B, D)
        if self.build_args["num_classes"]:
            out["logits"] = self.backbone.forward_head(hidden)  # (B, C)
        if self.with_tokens:
            out["tokens"] = tokens
        if self._indices is not None:
            out["features"] = {layer: maps[order.index(i)] for layer, i in zip(self.feature_layers, self._indices)}
        elif self.feature_layers:  # after the head, which may be one of them
            kept = self._hooked
            out["features"] = {layer: self._as_map(layer, kept.pop(layer, None)) for layer in self.feature_layers}
        return out

    def _tokens(self, hidden):
        """Tokens (B, N, D) or a last map -> the grid's tokens, row by row."""
        if hidden.dim() == 4:
            nhwc = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            return hidden.flatten(1, 2) if nhwc else hidden.flatten(2).transpose(1, 2)
        if hidden.dim() == 3:
            return hidden[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        raise ModelError(f"{self.name} has no tokens: its last layer gives {tuple(hidden.shape)}")

    def example(self, resolution=None, rows=2):
        """A batch of black images, on the model's device, for a dry run."""
        side = resolution or self._side
        return {"image": torch.zeros(rows, 3, side, side, device=next(self.parameters()).device)}

    def set_pooling(self, pooling):
        """What is the embedding: cls, the class token; mean, of the grid's tokens; map, the model's attention pooling;
        None, what its own head takes.  The logits stay those of its own head.  Raises ModelError."""
        backbone = self.backbone
        named = {name for name, _ in backbone.named_parameters(recurse=False)}
        has_class = getattr(backbone, "has_class_token", "cls_token" in named)
        if pooling == "cls" and not has_class:
            raise ModelError(f"--pooling cls: {self.name} has no class token")
        if pooling == "map" and getattr(backbone, "attn_pool", None) is None:
            raise ModelError(f"--pooling map: {self.name} has no attention pooling")
        self.pooling = self.build_args["pooling"] = pooling

    @property
    def classifiers(self):
        """The layers that make the logits: one, but two in timm's distilled DeiTs."""
        if hasattr(self.backbone, "get_classifier"):
            found = self.backbone.get_classifier()
        else:
            found = getattr(self.backbone, "fc", None) or self.backbone.head
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def take_pretrained(self, known_classes, head_kept):
        """Note that these weights are pretrained: their normalization, and a small new head if theirs is not kept.

        timm draws some heads so large (EfficientNet's from -0.41 to 0.41) that the first steps undo what was learned.
        """
        if self.name.startswith("hf:"):
            self.mean, self.std = _hugging_face_normalization(self.name.removeprefix("hf:"))
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

    def set_dropout(self, probability):
        """Drop that share of the head's input in training.  Once, before compiling."""
        for layer in self.classifiers if probability else ():
            layer.register_forward_pre_hook(_Dropout(probability))

    def freeze_backbone(self):
        """Train the head alone: all else gets no gradient and stays in eval mode, BatchNorm's statistics too."""
        self.requires_grad_(False)
        for layer in self.classifiers:
            layer.requires_grad_(True)
        self.frozen = True

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
            for layer in self.classifiers:
                layer.train(mode)
        return self

    def set_feature_layers(self, layers):
        """Return the maps of these module paths from now on.  Call before compiling: later hooks never fire."""
        modules = dict(self.backbone.named_modules())
        for layer in layers:
            if layer not in modules or layer == "":
                raise ModelError(f"{self.name} has no layer {layer!r}; it has {', '.join(self.layer_names())}")
            if layers.count(layer) > 1:
                raise ModelError(f"layer {layer} of {self.name} is named twice")
        for hook in self._hooks:
            hook.remove()
        self.feature_layers, self._indices, self._hooks = list(layers), None, []
        info = getattr(self.backbone, "feature_info", None)
        known = [entry["module"] for entry in info] if info and hasattr(self.backbone, "forward_intermediates") else []
        if layers and all(layer in known for layer in layers):
            self._indices = [known.index(layer) for layer in layers]
            return
        for layer in layers:
            self._hooks.append(modules[layer].register_forward_hook(_Keep(self._hooked, layer)))

    def _as_map(self, layer, value):
        """Output of a module -> (B, C, H, W): tokens lose their prefix and become a grid, channels-last maps turn."""
        if value is None:
            raise ModelError(f"layer {layer} of {self.name} is never called: name a layer in or around it")
        if not isinstance(value, torch.Tensor):  # Hugging Face layers may return a tuple or an output object
            value = value[0]
        if value.dim() == 4:
            nhwc = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            if (value.shape[1] == value.shape[2]) != (value.shape[2] == value.shape[3]):
                nhwc = value.shape[1] == value.shape[2]  # images are square: a layer may differ from its model's format
            return value.permute(0, 3, 1, 2) if nhwc else value
        if value.dim() == 3:
            for prefix in (getattr(self.backbone, "num_prefix_tokens", 0), 0):  # a patch embedding has no prefix yet
                tokens = value[:, prefix:]  # (B, N, D)
                side = math.isqrt(tokens.shape[1])
                if side * side == tokens.shape[1] and side:
                    return tokens.transpose(1, 2).unflatten(2, (side, side))
        if value.dim() == 2:
            return value[:, :, None, None]
        raise ModelError(f"layer {layer} of {self.name} gives {tuple(value.shape)}, which is no map and no square grid")

    def layer_names(self):
        """Module paths that people name: stages and blocks (the first number of a path is its end), layers around."""
        names = []
        for name, module in self.backbone.named_modules():
            parts = name.split(".")
            block = parts[-1].isdigit() and not any(part.isdigit() for part in parts[:-1])
            if name and (len(parts) == 1 or block) and any(True for _ in module.parameters()):
                names.append(name)
        return names

    def set_resolution(self, resolution):
        """Make a model of fixed positions take another input side (ours and Hugging Face's resize as they run)."""
        if isinstance(self.backbone, VisionTransformer):
            return self.backbone.check_patches(resolution)
        if self._side != resolution and hasattr(self.backbone, "set_input_size"):
            try:
                self.backbone.set_input_size(img_size=(resolution, resolution))
            except (AssertionError, ValueError, RuntimeError) as error:
                raise ModelError(f"{self.name} cannot take {resolution} px: {_one_line(error)}") from None
            self._side = resolution
        self.check_side(resolution)

    def check_side(self, resolution):
        """Raise ModelError where one black image of this side does not go through."""
        if isinstance(self.backbone, VisionTransformer):
            self.backbone.check_patches(resolution)
        training, device = self.training, next(self.parameters()).device
        try:
            with torch.no_grad():
                self.eval()({"image": torch.zeros(1, 3, resolution, resolution, device=device)})
        except Exception as error:  # each model complains in its own way
            raise ModelError(f"{self.name} cannot take {resolution} px: {_one_line(error)}") from None
        finally:
            self.train(training)

    @property
    def name(self):
        return self.build_args["name"]

    @property
    def family(self):
        """cnn or vit: whether anything attends over tokens, but for a pooling at the end (as CLIP's ResNets have)."""
        for module in self.modules():
            name = type(module).__name__.lower()
            attends = isinstance(module, TransformerBlock) or "attention" in name or hasattr(module, "num_heads")
            if attends and "pool" not in name:
                return "vit"
        return "cnn"

    @property
    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())


SMALL_MODELS = {
    "resnet8": lambda classes, img_size, patch: ResNet([1, 1, 1, 1], classes),
    "resnet18": lambda classes, img_size, patch: ResNet([2, 2, 2, 2], classes),
    "vit_6_192": lambda classes, img_size, patch: VisionTransformer(6, 192, 3, patch or 4, img_size, classes),
    "vit_tiny": lambda classes, img_size, patch: VisionTransformer(12, 192, 3, patch or 4, img_size, classes),
}


DINOV2 = {  # the names on torch's hub -> timm's
    f"dinov2_vit{side[0]}14{ours}": f"vit_{side}_patch14_{theirs}dinov2.lvd142m"
    for side in ("small", "base", "large", "giant")
    for ours, theirs in (("", ""), ("_reg", "reg4_"))
}


def build_model(
    name, num_classes, img_size=32, patch_size=None, pretrained=False, hf_config=None, pooling=None, dynamic=False
):
    """Build an ImageModel; see the head of this file for names.

    img_size: input side in pixels; patch_size: of our ViTs (4 where None); pretrained: hub weights, with a new head;
    hf_config: dict, set when an `hf:` model is rebuilt from a checkpoint; pooling: see `set_pooling`; dynamic: images
    of
    other sides come too (local crops), for which timm's ViTs then resize their positions.  num_classes 0: no head and
    no logits.  Raises ModelError.
    """
    model = _build(name, num_classes, img_size, patch_size, pretrained, hf_config, dynamic)
    model.set_pooling(pooling)
    return model


def _build(name, num_classes, img_size, patch_size, pretrained, hf_config, dynamic):
    build_args = {
        "name": name,
        "num_classes": num_classes,
        "img_size": img_size,
        **({"dynamic": True} if dynamic else {}),
    }
    if name in SMALL_MODELS:
        if pretrained:
            raise ModelError(f"--pretrained: there are no hub weights of {name}; timm:{name} may have some")
        if patch_size and not name.startswith("vit"):
            raise ModelError(f"--patch-size is for our ViTs; {name} has no patches")
        build_args["patch_size"] = patch_size
        return ImageModel(SMALL_MODELS[name](num_classes, img_size, patch_size), build_args)
    if patch_size:
        raise ModelError(f"--patch-size is for vit_tiny and vit_6_192; the name {name} fixes it")
    if name.startswith("hf:"):
        return _build_hugging_face(name, num_classes, build_args, pretrained, hf_config)
    return _build_timm(name, num_classes, img_size, build_args, pretrained, dynamic)


def _build_timm(name, num_classes, img_size, build_args, pretrained, dynamic):
    import timm

    timm_name = name.removeprefix("timm:")
    timm_name = DINOV2.get(timm_name, timm_name)
    if not timm.is_model(timm_name.split(".")[0]):
        import difflib

        near = difflib.get_close_matches(timm_name, {*SMALL_MODELS, *timm.list_models()}, 3)
        hint = f"; near: {', '.join(near)}" if near else f"; ours: {', '.join(SMALL_MODELS)}, any other is timm's"
        raise ModelError(f"unknown model {name!r}{hint}")

    def create(pretrained):
        arguments = {"pretrained": pretrained, "num_classes": num_classes}
        kinds = [{"img_size": img_size, "dynamic_img_size": True}] if dynamic else []
        for sides in [*kinds, {"img_size": img_size}]:  # a Swin takes the second, a CNN none
            try:
                return timm.create_model(timm_name, **sides, **arguments)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return timm.create_model(timm_name, **arguments)

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line of ours, not one for each retry
    try:
        backbone = create(pretrained)
    except Exception as error:  # each model complains in its own way
        problem = f"timm cannot build {timm_name} at {img_size} px: {_one_line(error)}"
        if pretrained:
            with contextlib.suppress(Exception):  # where it builds without them, the weights are what is missing
                problem = _no_weights(timm_name, create(False).pretrained_cfg, error)
        raise ModelError(problem) from None
    model = ImageModel(backbone, build_args)
    if pretrained:
        known = backbone.pretrained_cfg.get("num_classes", 0)
        model.take_pretrained(known, known == num_classes)
    model.check_side(img_size)
    return model


def _no_weights(timm_name, config, error):
    """Why the hub's weights did not come, and which file to fetch.  config: timm's pretrained_cfg, a dict."""
    hub, url = config.get("hf_hub_id"), config.get("url")
    if not hub and not url:
        return f"--pretrained: there are no hub weights of {timm_name}"
    file = f"{config.get('hf_hub_filename') or 'model.safetensors'} of {hub} on the Hugging Face hub" if hub else url
    why = type(error).__name__
    return (
        f"cannot get the weights of {timm_name} ({why}): fetch {file} by hand and pass it with --weights FILE in "
        "place of --pretrained "
        "(a teacher's: --teacher-weights FILE)"
    )


def _build_hugging_face(name, num_classes, build_args, pretrained, hf_config):
    from transformers import AutoConfig, AutoModel

    source = name.removeprefix("hf:")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if hf_config is not None:
            hf_config = dict(hf_config)
            config = AutoConfig.for_model(hf_config.pop("model_type"), **hf_config)
            body = AutoModel.from_config(config, trust_remote_code=False)
        elif pretrained:
            body = AutoModel.from_pretrained(source, trust_remote_code=False)  # None would ask on the terminal
        else:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            body = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"cannot load {source} ({_one_line(error)}): download config.json and model.safetensors of it into a "
            "folder by hand and name the folder, hf:FOLDER"
        ) from None
    config = body.config
    has_width = hasattr(config, "hidden_size") or hasattr(config, "hidden_sizes")
    if getattr(body, "main_input_name", "pixel_values") != "pixel_values" or not has_width:
        raise ModelError(f"{source} is no image model that this project knows ({config.model_type})")
    build_args["hf_config"] = {k: v for k, v in config.to_dict().items() if k != "torch_dtype" and k != "dtype"}
    model = ImageModel(HuggingFaceBackbone(body.float(), num_classes), build_args)  # some are stored in half
    model.check_side(build_args["img_size"])
    if pretrained:
        model.take_pretrained(*_take_hugging_face_head(model, source))
    return model


def _take_hugging_face_head(model, source):
    """Copy the head of a fine-tuned classifier whose classes are as many.  Returns (its classes, whether it is kept).

    Classifiers pool in many ways: the head is kept only where it gives the classifier's own logits here.
    """
    config, own = model.backbone.body.config, model.backbone.head
    if not any("ForImageClassification" in name for name in config.architectures or ()):
        return 0, False
    if config.num_labels != model.build_args["num_classes"]:
        return config.num_labels, False
    from transformers import AutoModelForImageClassification

    whole = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=False).float().eval()
    theirs = [m for m in whole.modules() if isinstance(m, nn.Linear)][-1]
    if theirs.weight.shape != own.weight.shape:
        return config.num_labels, False
    own.load_state_dict(theirs.state_dict())
    example = model.example(rows=1)
    example["image"] += torch.linspace(-1, 1, example["image"].shape[-1])
    with torch.no_grad():
        expected, got = whole(pixel_values=example["image"]).logits, model.eval()(example)["logits"]
    model.train()
    return config.num_labels, torch.allclose(expected, got, rtol=1e-3, atol=1e-4)


def _hugging_face_normalization(source):
    """(mean, std) by a model's preprocessor_config.json, or (None, None) where it does not say."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:  # it has none
        return None, None
    if not config.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    named = config.get("image_mean") and config.get("image_std")
    return (list(config["image_mean"]), list(config["image_std"])) if named else (None, None)


def _one_line(error):
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


# of several state dicts that fit, the first of these is taken: averages before what they average, as in timm
PREFERRED = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict", "teacher")


def load_weights(model, state, source):
    """Load a foreign state dict into the backbone, strictly; a head of another number of classes is made anew.

    state: {name: tensor}, or a dict that holds such dicts; all names of the backbone may have a prefix ("module.",
    "teacher.backbone."), and what lies outside it is left out.  source: for messages.  Returns in words what
    was taken.  Raises ModelError.
    """

    def rank(found):
        return min((PREFERRED.index(key) for key in found[0].split(".") if key in PREFERRED), default=len(PREFERRED))

    own = model.backbone.state_dict()
    tried = [
        (path, names, prefix, *_fit(model, own, names, prefix))
        for path, names in sorted(_state_dicts(state), key=rank)
        for prefix in _prefixes(names, own)
    ]
    fitting = [fit for fit in tried if not fit[-1]]
    if not fitting:
        text = "holds no state dict of tensors"
        if tried:
            _, names, *_, wrong = min(tried, key=lambda fit: len(fit[-1]))
            begin = _few(re.match(r"(\w+\.){0,2}", name)[0] or name for name in names)
            text = f"does not fit {model.name}: {wrong[0]} (differences: {len(wrong)}); its names begin with {begin}"
        raise ModelError(f"{source} {text}; its keys: {_few(state if isinstance(state, dict) else [])}")
    path, names, prefix, part, known, kept, _ = fitting[0]
    alike = [f"{fit[2]}*" for fit in fitting if fit[0] == path]
    if len(alike) > 1:
        raise ModelError(f"{source} has several parts that fit {model.name}, {_few(alike)}: save the one that is meant")
    model.backbone.load_state_dict(part, strict=True)
    model.take_pretrained(known, kept)
    others = _few(fit[0] for fit in fitting[1:])
    left = _few(".".join(name.split(".")[: prefix.count(".")]) + ".*" for name in names if not name.startswith(prefix))
    taken = path + (others and f", not {others}"), prefix and f"{prefix}*", left and f"left out: {left}"
    return f"{source} ({'; '.join(filter(None, taken))})" if any(taken) else source


def _few(names):
    return ", ".join(dict.fromkeys(map(str, names)))[:200]


def _state_dicts(state, path=""):
    """(its keys, joined by dots; {name: tensor}) of each state dict in nested dicts."""
    if isinstance(state, dict) and state:
        if all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
            yield path, state
        else:
            for key, value in state.items():
                yield from _state_dicts(value, f"{path}.{key}" if path else str(key))


def _prefixes(names, own):
    """What stands before the backbone's first name; where that is missing, what all names begin with, or nothing."""
    first, shared = next(iter(own)), os.path.commonprefix(list(names))
    found = [name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")]
    return found or list(dict.fromkeys([shared[: shared.rfind(".") + 1], ""]))  # older names, which timm converts


def _fit(model, own, names, prefix):
    """(state dict for the backbone, classes of the file's head, whether it is kept, [what does not fit])."""
    state = {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
    if not any(re.match(r"blocks\.\d+\.\d+\.", name) for name in own):  # DINOv2 saves its blocks in chunks
        state = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name): value for name, value in state.items()}
    convert = getattr(sys.modules[type(model.backbone).__module__], "checkpoint_filter_fn", None)
    if convert:  # timm's own, as for hub weights: resizes positions to the image's grid, knows older names
        try:
            state = convert(state, model.backbone)
        except Exception as error:  # meant for weights of this model, so anything goes for others
            return None, 0, False, [_one_line(error)] * len(own)
    config = getattr(model.backbone, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ("head", "fc")
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    head = [name for name in own if name.startswith(heads)]
    kept = bool(head) and all(name in state and state[name].shape == own[name].shape for name in head)
    known = next((len(state[name]) for name in head if name.endswith("weight") and name in state), 0)
    if not kept:
        state = {name: value for name, value in state.items() if not name.startswith(heads)}
        state.update({name: own[name] for name in head})
    has, wanted = (
        {
            name: tuple(value.shape)
            for name, value in of.items()
            if name in state or not name.endswith("num_batches_tracked")
        }
        for of in (state, own)
    )
    wrong = [
        f"{name} is {has.get(name, 'missing')} in it, {wanted.get(name, 'missing')} in the model"
        for name in {**wanted, **has}
        if has.get(name) != wanted.get(name)
    ]
    return state, known, kept, wrong


def multiply_adds(model, resolution):
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
