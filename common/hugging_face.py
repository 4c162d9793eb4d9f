"""Vision models of transformers, `hf:NAME_OR_FOLDER`: needed by these names alone.  Needs models.py of `common`.

A model is a linear head on the body that AutoModel loads; no code of a hub's repository is ever run.
"""

import inspect
import logging

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.image_processing_base import ImageProcessingMixin

from common.models import ImageModel, ModelError, linear_head, one_line


class HuggingFaceBackbone(nn.Module):
    """A vision model of transformers with a linear head on its class token, else on the mean of its map or tokens.

    source: the name on the hub or the folder that it came from.
    """

    UNDECAYED = (
        "cls_token",
        "class_embedding",
        "distillation_token",
        "register_tokens",
        "mask_token",
        "position_embed",
        "relative_position_bias",
    )

    def __init__(self, body: nn.Module, num_classes: int, source: str):
        super().__init__()
        self.body, self.source = body, source
        config = body.config
        self.num_features = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        parameters = {name.split(".")[-1]: parameter for name, parameter in body.named_parameters()}
        self.has_class_token = "cls_token" in parameters or "class_embedding" in parameters  # Swin, SigLIP have none
        registers = parameters["register_tokens"].shape[1] if "register_tokens" in parameters else 0
        self.num_prefix_tokens = int(self.has_class_token) + int("distillation_token" in parameters) + registers
        # signature, not __code__: the methods are decorated
        resizes = "interpolate_pos_encoding" in inspect.signature(body.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if resizes else {}
        self.head = linear_head(self.num_features, num_classes)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if any(part in name for part in self.UNDECAYED)}

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(pixel_values=x, **self.options).last_hidden_state  # (B, N, D) or (B, D, H, W)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if x.dim() == 4:
            pooled = x.mean((2, 3))
        else:
            pooled = x[:, 0] if self.has_class_token else x.mean(1)
        return pooled if pre_logits else self.head(pooled)

    def hub_normalization(self) -> tuple[list | None, list | None]:
        """(mean, std) from the model's preprocessor_config.json, or (None, None) where it does not say."""
        try:
            config, _ = ImageProcessingMixin.get_image_processor_dict(self.source)
        except OSError:  # it has none
            return None, None
        if not config.get("do_normalize", True):
            return [0.0] * 3, [1.0] * 3
        complete = config.get("image_mean") and config.get("image_std")
        return (list(config["image_mean"]), list(config["image_std"])) if complete else (None, None)


def build_hugging_face(build_args: dict, pretrained: bool, hf_config: dict | None) -> ImageModel:
    """build_model for `hf:` names; hf_config: its config in a checkpoint, and then no hub or folder is asked.

    build_args: name, num_classes and img_size of build_model, to which the config is added.  Raises ModelError.
    """
    source = build_args["name"].removeprefix("hf:")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line of ours, not one for each retry
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
    except Exception as error:  # the hub's and the models' errors are of many kinds
        raise ModelError(
            f"cannot load {source} ({one_line(error)}): download its config.json and model.safetensors into a folder "
            "by hand and name the folder, hf:FOLDER"
        ) from None
    config = body.config
    has_width = hasattr(config, "hidden_size") or hasattr(config, "hidden_sizes")
    if getattr(body, "main_input_name", "pixel_values") != "pixel_values" or not has_width:
        raise ModelError(f"{source} is not an image model that this project knows ({config.model_type})")
    build_args["hf_config"] = {k: v for k, v in config.to_dict().items() if k != "torch_dtype" and k != "dtype"}
    backbone = HuggingFaceBackbone(body.float(), build_args["num_classes"], source)  # some are stored in half
    model = ImageModel(backbone, build_args)
    model.check_side(build_args["img_size"])
    if pretrained:
        model.take_pretrained(*_take_head(model))
    return model


def _take_head(model):
    """Copy the head of a fine-tuned classifier that has as many classes.  Returns (its classes, whether it is kept).

    Classifiers pool in many ways: the head is kept only where it gives the classifier's own logits here.
    """
    config, head, source = model.backbone.body.config, model.backbone.head, model.backbone.source
    if not any("ForImageClassification" in name for name in config.architectures or ()):
        return 0, False
    if config.num_labels != model.build_args["num_classes"]:
        return config.num_labels, False
    whole = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=False).float().eval()
    theirs = [module for module in whole.modules() if isinstance(module, nn.Linear)][-1]
    if theirs.weight.shape != head.weight.shape:
        return config.num_labels, False
    head.load_state_dict(theirs.state_dict())
    example = model.example(rows=1)
    example["image"] += torch.linspace(-1, 1, example["image"].shape[-1])
    with torch.no_grad():
        expected, got = whole(pixel_values=example["image"]).logits, model.eval()(example)["logits"]
    model.train()
    return config.num_labels, torch.allclose(expected, got, rtol=1e-3, atol=1e-4)
