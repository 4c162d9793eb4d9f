"""Models that read an image and a text.  Needs data.py, models.py, run.py and training.py of `common`, torch, timm and
transformers.

    model = build_image_text_model("timm:resnet18", "bert-mini-scratch", {"modality": 2, "location": 5}, 96,
    texts=train_texts)
    out = model({"image": images, "input_ids": ids, "attention_mask": mask})    # (B, 3, H, W), (B, L), (B, L)
    out["logits_modality"], out["logits_location"]    # (B, 2), (B, 5): one for each task
    out["embedding"]                                  # (B, F), both sides fused
    out["img_raw"], out["txt_raw"]                    # (B, D_v), (B, D_t), what the two backbones give
    out["img_proj"], out["txt_proj"]                  # (B, F), projected to one width

The image side is any model of models.py, or one of IMAGE_MODELS; the text side is `hf:NAME_OR_FOLDER`, one of
TEXT_MODELS, or one of SCRATCH_MODELS, whose weights are random and whose vocabulary comes from the texts.  Texts become
numbers by `model.tokenizer`, cut to `model.max_length`.
"""

import contextlib
import heapq
import json
import logging
import os
import tempfile
from collections import Counter, defaultdict

import torch
import torch.nn.functional as F
from torch import nn

from common.data import logits_name
from common.models import ModelError, build_model, one_line
from common.run import UserError
from common.training import start_weights

IMAGE_MODELS = {
    "vit-large": "hf:google/vit-large-patch16-224",
    "deit-base": "hf:facebook/deit-base-patch16-224",
    "deit-small": "hf:facebook/deit-small-patch16-224",
}
TEXT_MODELS = {"bio-clinical-bert": "hf:emilyalsentzer/Bio_ClinicalBERT", "distilbert": "hf:distilbert-base-uncased"}
SCRATCH_MODELS = {
    "bert-tiny-scratch": (2, 128),
    "bert-mini-scratch": (4, 256),
}  # layers, width: Turc et al. 2019, arXiv:1908.08962
INPUTS = ("both", "image", "text")
HEAD_WIDTH = 64  # of an attention head, as in BERT and ViT
SCRATCH_LENGTH = 512  # positions of the models from scratch, as BERT's


# ---------------------------------------------------------------------------------------------------------- vocabulary


def train_wordpiece(texts, size=8192, min_frequency=2):
    """WordPiece vocabulary of texts: its pieces in order, at most `size` of them.

    The most frequent pair of neighbours becomes a piece, again and again (Sennrich et al. 2016, arXiv:1508.07909), with
    ## before what goes on within a word.  Written here, for that of the package tokenizers differs from run to run:
    ties
    are broken by the pieces' names.  min_frequency: of a pair, in all texts.
    """
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer, splitter, counts = BertNormalizer(lowercase=True), BertPreTokenizer(), Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    frequencies = [counts[word] for word in sorted(counts)]
    words = [[word[0], *("##" + letter for letter in word[1:])] for word in sorted(counts)]
    vocabulary = dict.fromkeys(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({piece for word in words for piece in word})]
    )
    pairs, places = Counter(), defaultdict(set)  # of two neighbours: how often, and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += frequencies[i]
            places[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(vocabulary) < size:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            continue  # it has changed since, and stands in the heap as it is now
        if -count < min_frequency:
            break
        piece, changed = pair[0] + pair[1].removeprefix("##"), set()
        vocabulary[piece] = None
        for i in places.pop(pair):
            before, words[i] = words[i], _merged(words[i], pair, piece)
            for old in zip(before, before[1:]):
                pairs[old] -= frequencies[i]
                changed.add(old)
            for new in zip(words[i], words[i][1:]):
                pairs[new] += frequencies[i]
                places[new].add(i)
                changed.add(new)
        for other in changed:
            if pairs[other] > 0:
                heapq.heappush(heap, (-pairs[other], other))
    return list(vocabulary)


def _merged(word, pair, piece):
    """Pieces of a word with each `pair` of neighbours made one."""
    out = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] = piece
        else:
            out.append(part)
    return out


# ----------------------------------------------------------------------------------------------------------- text side


def _drop_pooler(body):
    """Take the pooler off a model of transformers: its output is not used, and a parameter without a gradient stops
    DDP."""
    if any(name.startswith("pooler.") for name, _ in body.named_parameters()):
        body.pooler = None


class TextModel(nn.Module):
    """A text model of transformers: `input_ids`, `attention_mask` (B, L) -> its last layer (B, L, D).

    files: {name: text} of its config and tokenizer, which rebuild it; tokenizer: what makes its input_ids; max_length:
    tokens to which texts are cut.
    """

    def __init__(self, body, tokenizer, files, name, max_length):
        super().__init__()
        self.body, self.tokenizer, self.files, self.name, self.max_length = body, tokenizer, files, name, max_length
        _drop_pooler(body)

    def no_weight_decay(self):
        return {
            name
            for name, _ in self.named_parameters()
            if "position_embeddings" in name or "token_type_embeddings" in name
        }

    def forward(self, input_ids, attention_mask):
        return self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def check(self):
        """Its width D; raises ModelError where a text of max_length tokens does not go through."""
        ids = torch.full((1, self.max_length), 1 if self.tokenizer.pad_token_id != 1 else 2)
        try:
            with torch.no_grad():
                return self.eval()(ids, torch.ones_like(ids)).shape[-1]
        except Exception as error:  # each model complains in its own way
            raise ModelError(
                f"{self.name} cannot take texts of {self.max_length} tokens (--max-length): {one_line(error)}"
            ) from None
        finally:
            self.train()


def build_text_model(name, max_length=128, pretrained=False, texts=None, files=None):
    """Build a TextModel; see the head of this file for names.

    max_length: tokens; pretrained: hub weights; texts: those of train, for the vocabulary of a model from scratch;
    files: of a checkpoint, and then no hub or folder is asked.  Raises ModelError.
    """
    if max_length < 1:
        raise ModelError(f"--max-length {max_length} must be positive")
    if files is None and name in SCRATCH_MODELS:
        if texts is None:
            raise ModelError(f"{name} needs the texts of train: its vocabulary comes from them")
        if not any(map(str.strip, texts)):
            raise ModelError(f"{name}: all texts of train are empty, --inputs image trains on the images alone")
        files, pretrained = _scratch_files(*SCRATCH_MODELS[name], train_wordpiece(texts)), False
    if files is not None:
        with tempfile.TemporaryDirectory() as folder:
            for file, text in files.items():
                with open(os.path.join(folder, os.path.basename(file)), "w", encoding="utf-8", newline="") as out:
                    out.write(text)
            body, tokenizer = _load(folder, name, False)
    else:
        source = TEXT_MODELS.get(name, name)
        if not source.startswith("hf:") and not os.path.isdir(source):
            known = ", ".join([*TEXT_MODELS, *SCRATCH_MODELS])
            raise ModelError(f"unknown text model {name!r}: choose of {known}, hf:NAME or hf:FOLDER")
        body, tokenizer = _load(source.removeprefix("hf:"), name, pretrained)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            body.config.save_pretrained(folder)
            files = _text_files(folder)
    model = TextModel(body, tokenizer, files, name, max_length)
    model.num_features = model.check()
    return model


def _load(source, name, pretrained):
    """(model in float32, tokenizer) from a folder or a hub."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line of ours, not one for each retry
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)  # None would ask on the terminal
            body = (
                AutoModel.from_pretrained(source, trust_remote_code=False)
                if pretrained
                else AutoModel.from_config(config, trust_remote_code=False)
            )
    except Exception as error:  # the hub's and the models' errors are of many kinds
        raise ModelError(
            f"cannot load the text model {source} ({one_line(error)}): download its config.json, "
            "model.safetensors and "
            "tokenizer files into a folder by hand and name the folder, hf:FOLDER"
        ) from None
    if (
        getattr(body, "main_input_name", "input_ids") != "input_ids"
        or getattr(config, "is_encoder_decoder", False)
        or hasattr(config, "vision_config")
    ):
        raise ModelError(f"{name} is not a text encoder that this project knows ({config.model_type})")
    missing = f"{name} has no tokenizer: its folder needs tokenizer.json, or vocab.txt, beside config.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        known = len(tokenizer)
    except Exception as error:
        raise ModelError(f"{missing} ({one_line(error)})") from None
    if known <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise ModelError(missing)
    if known > config.vocab_size:
        raise ModelError(f"the tokenizer of {name} has {known} tokens, the model knows {config.vocab_size}")
    return body.float(), tokenizer


@contextlib.contextmanager
def _quiet():
    """Without transformers' progress bar, and its report of the weights of heads that a checkpoint has beside its
    body."""
    from transformers.utils import logging as messages

    verbosity, bar = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if bar:
            messages.enable_progress_bar()


def _text_files(folder):
    """{name: text} of a folder's files, those that are no text left out (they repeat what tokenizer.json has)."""
    files = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        try:
            with open(path, encoding="utf-8", newline="") as file:
                files[name] = file.read()
        except (UnicodeDecodeError, IsADirectoryError):
            continue
    return files


def _scratch_files(layers, width, vocabulary):
    config = {
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": SCRATCH_LENGTH,
    }
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": SCRATCH_LENGTH}
    return {
        "config.json": json.dumps(config),
        "tokenizer_config.json": json.dumps(tokenizer),
        "vocab.txt": "".join(f"{piece}\n" for piece in vocabulary),
    }


# ------------------------------------------------------------------------------------------------------------- fusions


class ResidualMLP(nn.Module):
    """x (..., D) + an MLP of it, normalized before."""

    def __init__(self, dim, expansion=1):
        super().__init__()
        self.norm, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim)),
        )

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class AttentionBlock(nn.Module):
    """Tokens (B, N, D) attend to a context (B, M, D), or to themselves, then an MLP; pre-norm."""

    def __init__(self, dim):
        super().__init__()
        self.heads = dim // HEAD_WIDTH
        self.norm, self.query, self.key_value, self.project = (
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )
        self.mlp = ResidualMLP(dim, 4)

    def forward(self, x, context=None, mask=None):
        """mask: (B, M) bool, True where the context counts: in each row somewhere, for a row of none would give NaN."""
        normed = self.norm(x)
        query = self._by_head(self.query(normed))  # (B, heads, N, 64)
        key, value = (
            self._by_head(part)
            for part in self.key_value(normed if context is None else self.norm(context)).chunk(2, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, None if mask is None else mask[:, None, None])
        return self.mlp(x + self.project(attended.transpose(1, 2).flatten(2)))

    def _by_head(self, x):
        return x.unflatten(2, (self.heads, HEAD_WIDTH)).transpose(1, 2)


class Simple(nn.Module):
    """The mean of the two projections, then a residual MLP a layer; what one side alone gets too."""

    uses_tokens = False

    def __init__(self, dim, layers):
        super().__init__()
        self.layers = nn.Sequential(*[ResidualMLP(dim) for _ in range(layers)])

    def forward(self, *projections):  # (B, F) each
        return self.layers(sum(projections) / len(projections))


class ConcatMLP(nn.Module):
    """Both projections side by side, then an MLP with a hidden layer of 2 F a layer."""

    uses_tokens = False

    def __init__(self, dim, layers):
        super().__init__()
        hidden = [
            part for _ in range(layers) for part in (nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU())
        ]
        self.mlp = nn.Sequential(*hidden, nn.Linear(2 * dim, dim))

    def forward(self, image, text):
        return self.mlp(torch.cat([image, text], -1))


class Gated(nn.Module):
    """Gated multimodal units, Arevalo et al. 2017, arXiv:1702.01992: h = z tanh(W_v v) + (1 - z) tanh(W_t t), with
    z = sigmoid(W_z [v; t]).  Each further layer sees v + h and t + h."""

    uses_tokens = False

    def __init__(self, dim, layers):
        super().__init__()
        self.image, self.text = (nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers)) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(layers))

    def forward(self, image, text):
        for of_image, of_text, of_both in zip(self.image, self.text, self.gate):
            gate = torch.sigmoid(of_both(torch.cat([image, text], -1)))  # (B, F), 1: the image alone
            fused = gate * torch.tanh(of_image(image)) + (1 - gate) * torch.tanh(of_text(text))
            image, text = image + fused, text + fused
        return fused


class CrossAttention(nn.Module):
    """Each side's tokens attend to the other's, both at once in each layer (co-attention, Lu et al. 2019,
    arXiv:1908.02265); a side's projection stands before its tokens and is what it gives."""

    uses_tokens = True

    def __init__(self, dim, layers):
        super().__init__()
        self.image, self.text = (nn.ModuleList(AttentionBlock(dim) for _ in range(layers)) for _ in range(2))
        self.project = nn.Linear(2 * dim, dim)

    def forward(self, image, text, mask):  # (B, 1 + N, F), (B, 1 + L, F), (B, 1 + L)
        for of_image, of_text in zip(self.image, self.text):
            image, text = of_image(image, text, mask), of_text(text, image)
        return self.project(torch.cat([image[:, 0], text[:, 0]], -1))


class TransformerConcat(nn.Module):
    """A class token and both sides' projections and tokens in one sequence, each side with an embedding of its kind,
    through a transformer, as in Chen et al. 2020 (UNITER), arXiv:1909.11740; the class token is what it gives."""

    uses_tokens = True

    def __init__(self, dim, layers):
        super().__init__()
        self.cls_token, self.kinds = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(2, dim))
        self.layers = nn.ModuleList(AttentionBlock(dim) for _ in range(layers))
        for parameter in (self.cls_token, self.kinds):
            nn.init.trunc_normal_(parameter, std=0.02)

    def no_weight_decay(self):
        return {"cls_token", "kinds"}

    def forward(self, image, text, mask):
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), image + self.kinds[0], text + self.kinds[1]], 1)
        mask = F.pad(mask, (x.shape[1] - mask.shape[1], 0), value=True)  # the class token and the image count
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x[:, 0]


FUSIONS = {
    "simple": Simple,
    "concat_mlp": ConcatMLP,
    "cross_attention": CrossAttention,
    "gated": Gated,
    "transformer_concat": TransformerConcat,
}


# ----------------------------------------------------------------------------------------------------------- the model


class ImageTextModel(nn.Module):
    """An image model and a text model, projected to one width, fused, and a linear head a task; see the head of this
    file.  `build_args` rebuild it: `build_image_text_model(**build_args)`, never asking a hub.  One side alone: the
    other is None, and so are its outputs missing.  `mean`, `std`: what pretrained image weights expect, or None.
    """

    kind = "image_text"  # of a checkpoint

    def __init__(self, image, text, build_args):
        super().__init__()
        self.image, self.text, self.build_args = image, text, build_args
        self.mean, self.std = (None, None) if image is None else (image.mean, image.std)
        self.tokenizer, self.max_length = (None, None) if text is None else (text.tokenizer, text.max_length)
        self.dropout, self.frozen, self.with_tokens = 0.0, set(), False
        width, one_side = build_args["fusion_dim"], image is None or text is None
        self.fusion = (Simple if one_side else FUSIONS[build_args["fusion"]])(width, build_args["fusion_layers"])
        self.projections, self.token_projections = nn.ModuleDict(), nn.ModuleDict()
        for side, (pooled, tokens) in self._widths(build_args["img_size"]).items():
            self.projections[side] = nn.Sequential(nn.Linear(pooled, width), nn.LayerNorm(width))
            if self.fusion.uses_tokens:
                self.token_projections[side] = nn.Sequential(nn.Linear(tokens, width), nn.LayerNorm(width))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict(
            {logits_name(task): nn.Linear(width, classes) for task, classes in build_args["tasks"].items()}
        )

    def _widths(self, img_size):
        """{side: (width of its embedding, width of its tokens)}."""
        widths = {}
        if self.image is not None:
            self.image.with_tokens = self.fusion.uses_tokens
            with torch.no_grad():
                out = self.image.eval()({"image": torch.zeros(1, 3, img_size, img_size)})
            self.image.train()
            widths["image"] = (out["embedding"].shape[-1], out["tokens"].shape[-1] if self.fusion.uses_tokens else None)
        if self.text is not None:
            widths["text"] = (self.text.num_features,) * 2
        return widths

    def forward(self, batch):
        out, tokens = {}, {}
        if self.image is not None:
            self.image.with_tokens = self.with_tokens or self.fusion.uses_tokens
            seen = self.image(batch)
            out["img_raw"], tokens["image"] = seen["embedding"], seen.get("tokens")  # (B, D_v), (B, N, D)
            out["img_proj"] = self.projections["image"](out["img_raw"])  # (B, F)
            out.update(
                {
                    key: seen[key]
                    for key in ("features", "tokens")
                    if key in seen and (key == "features" or self.with_tokens)
                }
            )
        if self.text is not None:
            mask = batch["attention_mask"].bool()  # (B, L)
            mask = torch.cat(
                [mask[:, :1] | ~mask.any(1, keepdim=True), mask[:, 1:]], 1
            )  # a text without a token keeps its first padding
            tokens["text"] = self.text(batch["input_ids"], mask.long())  # (B, L, D_t)
            out["txt_raw"] = self._pooled(tokens["text"], mask)  # (B, D_t)
            out["txt_proj"] = self.projections["text"](out["txt_raw"])  # (B, F)
        projections = [out[key] for key in ("img_proj", "txt_proj") if key in out]
        if self.fusion.uses_tokens:
            sides = [
                torch.cat([first[:, None], self.token_projections[side](tokens[side])], 1)
                for side, first in zip(("image", "text"), projections)
            ]
            fused = self.fusion(*sides, F.pad(mask, (1, 0), value=True))
        else:
            fused = self.fusion(*projections)
        out["embedding"] = self.norm(fused)  # (B, F)
        dropped = F.dropout(out["embedding"], self.dropout, self.training)
        out.update({name: head(dropped) for name, head in self.heads.items()})  # (B, C) a task
        return out

    def _pooled(self, hidden, mask):
        """Tokens (B, L, D) -> (B, D): the first, which is [CLS], or the mean of those that are no padding."""
        if self.build_args["text_pooling"] == "cls":
            return hidden[:, 0]
        hidden = hidden.float() * mask[:, :, None]
        return hidden.sum(1) / mask.sum(1, keepdim=True)

    @property
    def classifiers(self):
        """The layers that make the logits."""
        return list(self.heads.values())

    def set_dropout(self, probability):
        """Drop that share of the heads' input in training."""
        self.dropout = probability

    def backbones(self):
        """{"image": module, "text": module}, those that there are; all else is projections, fusion and heads."""
        return {name: side for name, side in (("image", self.image), ("text", self.text)) if side is not None}

    def freeze_backbone(self, sides=("image", "text")):
        """The backbones of these sides get no gradient and stay in eval mode."""
        for name, side in self.backbones().items():
            if name in sides:
                side.requires_grad_(False)
                side.eval()
                self.frozen.add(name)

    def train(self, mode=True):
        super().train(mode)
        for name, side in self.backbones().items():
            if name in self.frozen:
                side.eval()
        return self

    def set_feature_layers(self, layers):
        """Return the maps of these layers of the image side from now on; see ImageModel."""
        if self.image is None and layers:
            raise ModelError(f"{self.name} has no image side, of which layers could be taken")
        if self.image is not None:
            self.image.set_feature_layers(layers)

    def layer_names(self):
        return [] if self.image is None else self.image.layer_names()

    def set_resolution(self, resolution):
        """Make the image side take another input side in pixels; see ImageModel."""
        if self.image is not None:
            self.image.set_resolution(resolution)

    def example(self, resolution=None, rows=2):
        """A batch of black images and texts of max_length tokens, on the model's device, for a dry run or to
        measure."""
        side, device = resolution or self.build_args["img_size"], next(self.parameters()).device
        ids = torch.full(
            (rows, self.max_length or 1), self.tokenizer.pad_token_id or 0 if self.tokenizer else 0, device=device
        )
        return {
            "image": torch.zeros(rows, 3, side, side, device=device),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }

    @property
    def name(self):
        return "+".join(side.name for side in self.backbones().values())

    @property
    def family(self):
        """cnn or vit of the image side, and the text side's model type, as "vit+bert"."""
        families = ([] if self.image is None else [self.image.family]) + (
            [] if self.text is None else [self.text.body.config.model_type]
        )
        return "+".join(families)

    @property
    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())


def build_image_text_model(
    image_name,
    text_name,
    tasks,
    img_size,
    fusion="simple",
    fusion_layers=1,
    fusion_dim=512,
    pretrained=False,
    *,
    inputs="both",
    texts=None,
    max_length=128,
    text_pooling="mean",
    image_args=None,
    text_files=None,
):
    """Build an ImageTextModel; see the head of this file for names.

    tasks: {task: its number of classes}; img_size: input side in pixels; fusion: of FUSIONS, with fusion_layers of its
    layers at the width fusion_dim; pretrained: hub weights of both sides (none for a model from scratch), or a tuple of
    those sides that have them; inputs: both,
    or image or text alone, which has no other side to be fused with (it gets `Simple`); texts: those of train, for the
    vocabulary of a model from scratch; max_length: tokens to which texts are cut; text_pooling: mean or cls, see
    `ImageTextModel`; image_args, text_files: set when it is rebuilt from a checkpoint.  Raises ModelError.
    """
    if fusion not in FUSIONS:
        raise ModelError(f"--fusion {fusion} is not one of {', '.join(FUSIONS)}")
    if inputs not in INPUTS:
        raise ModelError(f"--inputs {inputs} is not one of {', '.join(INPUTS)}")
    if text_pooling not in ("mean", "cls"):
        raise ModelError(f"--text-pooling {text_pooling} is not one of mean, cls")
    if fusion_layers < 1 or fusion_dim < 1:
        raise ModelError(f"--fusion-layers {fusion_layers} --fusion-dim {fusion_dim}: both must be positive")
    if FUSIONS[fusion].uses_tokens and fusion_dim % HEAD_WIDTH:
        raise ModelError(
            f"--fusion-dim {fusion_dim} is not a multiple of {HEAD_WIDTH}, the width of a head in --fusion {fusion}"
        )
    for task in tasks:
        if not task or "." in task:
            raise ModelError(f"a task cannot be named {task!r}")
    image = text = None
    from_hub = ("image", "text") if pretrained is True else pretrained or ()
    if inputs != "text":
        new_args = {
            "name": IMAGE_MODELS.get(image_name, image_name),
            "num_classes": 0,
            "img_size": img_size,
            "pretrained": "image" in from_hub,
        }
        image = build_model(**(image_args or new_args))
        _drop_pooler(getattr(image.backbone, "body", nn.Identity()))
    if inputs != "image":
        text = build_text_model(text_name, max_length, "text" in from_hub, texts, text_files)
        if text_pooling == "cls" and text.tokenizer.cls_token_id is None:
            raise ModelError(f"--text-pooling cls: {text_name} has no class token")
    build_args = {
        "image_name": image_name,
        "text_name": text_name,
        "tasks": dict(tasks),
        "img_size": img_size,
        "fusion": fusion,
        "fusion_layers": fusion_layers,
        "fusion_dim": fusion_dim,
        "inputs": inputs,
        "max_length": max_length,
        "text_pooling": text_pooling,
        "image_args": None if image is None else image.build_args,
        "text_files": None if text is None else text.files,
    }
    return ImageTextModel(image, text, build_args)


def start_model(
    classes: dict,
    resolution: int,
    texts: list,
    *,
    model: str,
    seed: int,
    patch_size: int | None = None,
    pretrained: bool = False,
    weights: str | None = None,
    init_checkpoint: str | None = None,
    freeze_backbone: bool = False,
    dropout: float = 0.0,
    freeze: list | None = None,
    image_model: str | None = None,
    text_model: str = "bert-tiny-scratch",
    fusion: str = "simple",
    fusion_layers: int = 1,
    fusion_dim: int = 512,
    inputs: str = "both",
    max_length: int = 128,
    text_pooling: str = "mean",
) -> tuple[ImageTextModel, str | None]:
    """(new model on the CPU, line for the log or None), as training.start_model; keywords are the flags.

    classes: {task: names}; texts: those of train, for a new vocabulary; weights: of the image side, --pretrained is the
    text side's then.  Raises UserError, ModelError.
    """
    torch.manual_seed(seed)
    if weights and inputs == "text":
        raise UserError("--weights are those of the image side, and --inputs text has none")
    refused = {"--init-checkpoint": init_checkpoint, "--patch-size": patch_size}
    for flag in (flag for flag, value in refused.items() if value):
        raise UserError(f"{flag} is for image models alone, not for images with texts")
    new = build_image_text_model(
        image_model or model,
        text_model,
        {task: len(names) for task, names in classes.items()},
        resolution,
        fusion,
        fusion_layers,
        fusion_dim,
        ("text",) * pretrained if weights else pretrained,
        inputs=inputs,
        texts=texts,
        max_length=max_length,
        text_pooling=text_pooling,
    )
    note = None
    if weights:
        note = start_weights(new.image, weights)
        new.mean, new.std = new.image.mean, new.image.std
    new.set_dropout(dropout)
    if freeze_backbone or freeze:
        new.freeze_backbone(("image", "text") if freeze_backbone else freeze)
    return new, note
