"""Image + text models: fusions, padding, rebuilding without hub or folder, text models of every origin.  No network."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, script_environment
from torch import nn
from torch.nn import functional as F

from common import multimodal
from common.image_text import token_batch, tokenize
from common.models import ModelError, build_model
from common.multimodal import (
    FUSIONS,
    AttentionBlock,
    Gated,
    build_image_text_model,
    build_text_model,
    start_model,
    train_wordpiece,
)
from common.run import UserError
from common.training import make_optimizer, task_cross_entropy

TEXTS = [
    "ct of the chest",
    "mr of the head and the neck, axial",
    "",
    "the mass in the chest",
    "t2 of the knee",
    "pelvis",
]
TASKS = {"modality": 2, "location": 5}
IMAGE = "resnet8"
KEYS = {
    "img_raw": 512,
    "txt_raw": 128,
    "img_proj": 64,
    "txt_proj": 64,
    "embedding": 64,
    "logits_modality": 2,
    "logits_location": 5,
}


def build(image=IMAGE, text="bert-tiny-scratch", **options):
    torch.manual_seed(0)
    options = {"texts": TEXTS, "fusion_dim": 64, **options}
    return build_image_text_model(image, text, TASKS, 16, **options)


def refusal(call, *args, **options):
    """The message of a ModelError, which must be one line and exit 2."""
    with pytest.raises(ModelError) as caught:
        call(*args, **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def batch_of(model, rows=(0, 1, 3)):
    image = torch.randn(len(rows), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    text = (
        token_batch(tokenize(TEXTS, model.tokenizer, model.max_length), torch.tensor(rows)) if model.tokenizer else {}
    )
    return {"image": image, **text}


def forward(model, batch):
    with torch.no_grad():
        return model.eval()(batch)


def padded(batch, count, token=7):
    """The same texts with `count` more positions, which hold a token that is no padding."""
    rows = len(batch["input_ids"])
    return {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], torch.full((rows, count), token)], 1),
        "attention_mask": F.pad(batch["attention_mask"], (0, count)),
    }


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Folders as one downloads them: a BERT with tokenizer.json, a cased DistilBERT with vocab.txt, others that are not
    usable."""
    import transformers

    folder, small = (
        tmp_path_factory.mktemp("hub"),
        {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    )
    pieces = train_wordpiece(TEXTS)
    (folder / "distilbert").mkdir()
    (folder / "distilbert" / "vocab.txt").write_text("".join(f"{piece}\n" for piece in [*pieces, "CT", "MR"]))
    (folder / "distilbert" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False})
    )
    configs = {
        "bert": transformers.BertConfig(
            vocab_size=len(pieces) + 3, hidden_size=32, max_position_embeddings=40, **small
        ),
        "distilbert": transformers.DistilBertConfig(
            vocab_size=len(pieces) + 2, dim=48, n_layers=1, n_heads=2, hidden_dim=64
        ),
    }
    for name, config in configs.items():
        torch.manual_seed(3)
        transformers.AutoModel.from_config(config).to(
            torch.bfloat16 if name == "bert" else torch.float32
        ).save_pretrained(folder / name)
    transformers.AutoTokenizer.from_pretrained(folder / "distilbert").save_pretrained(folder / "converted")
    (folder / "bert_vocabulary").mkdir()
    (folder / "bert_vocabulary" / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    (folder / "bert_vocabulary" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    transformers.AutoTokenizer.from_pretrained(folder / "bert_vocabulary").save_pretrained(folder / "bert")
    assert (folder / "bert" / "tokenizer.json").exists()
    configs["bert"].save_pretrained(folder / "no_tokenizer")
    shutil.copytree(folder / "bert", folder / "few_words")
    transformers.BertConfig(vocab_size=8, hidden_size=32, **small).save_pretrained(folder / "few_words")
    transformers.ViTConfig(hidden_size=32, image_size=16, patch_size=8, **small).save_pretrained(folder / "vit")
    transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(
        folder / "t5"
    )
    return folder


# ------------------------------------------------------------------------------------------------------------ contract


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("image", [IMAGE, "vit_tiny"])
def test_outputs_and_gradients(fusion, image):
    """Keys and widths as promised; every parameter gets a gradient from the logits, which DDP asks for."""
    model = build(image, fusion=fusion, fusion_layers=2)
    out = model(batch_of(model))
    widths = {**KEYS, "img_raw": 512 if image == IMAGE else 192}
    assert {key: tuple(value.shape) for key, value in out.items()} == {key: (3, width) for key, width in widths.items()}
    sum(F.cross_entropy(out[f"logits_{task}"], torch.tensor([0, 1, 1])) for task in TASKS).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    assert model.name == f"{image}+bert-tiny-scratch" and model.family == ("cnn+bert" if image == IMAGE else "vit+bert")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_padding_changes_nothing(fusion):
    """Neither more positions nor what stands there, nor the other texts of the batch; each output of each sample."""
    model = build("vit_tiny", fusion=fusion, fusion_layers=2)
    batch = batch_of(model, (0, 1, 2, 3))
    out = forward(model, batch)
    for other in (padded(batch, 5), padded(batch, 60, token=3)):
        for key, value in forward(model, other).items():
            torch.testing.assert_close(
                value, out[key], atol=2e-5, rtol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        alone = {
            key: value[row : row + 1, :length] if key != "image" else value[row : row + 1]
            for key, value in batch.items()
        }
        for key, value in forward(model, alone).items():
            torch.testing.assert_close(value[0], out[key][row], atol=2e-5, rtol=2e-5)
    changed = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert not torch.allclose(forward(model, changed)["embedding"], out["embedding"], atol=1e-3), (
        "a mask that is ignored would pass"
    )


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_finite(fusion, dtype):
    """Also with a text without a single token and with rows that are equal, in both directions."""
    model = build("vit_tiny", fusion=fusion)
    batch = batch_of(model, (0, 0, 1))
    batch["attention_mask"][2] = 0
    with torch.autocast("cpu", dtype=dtype):
        out = model.eval()(batch)
    assert all(value.isfinite().all() for value in out.values())
    plain = forward(model, batch)
    assert F.cosine_similarity(out["embedding"].float(), plain["embedding"]).min() > 0.99
    (out["logits_modality"].float().logsumexp(1).sum() + out["embedding"].float().pow(3).sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_side_reaches_the_embedding(fusion):
    model = build("vit_tiny", fusion=fusion)
    batch = batch_of(model)
    out = forward(model, batch)["embedding"]
    image = forward(model, {**batch, "image": batch["image"].flip(0)})["embedding"]
    text = forward(
        model, {**batch, "input_ids": batch["input_ids"].flip(0), "attention_mask": batch["attention_mask"].flip(0)}
    )["embedding"]
    for other in (image, text):  # rows 0 and 2 have changed places on one side, row 1 is as before
        assert (other - out).abs().amax(1)[[0, 2]].min() > 1e-3
        torch.testing.assert_close(other[1], out[1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("inputs, keys", [("image", {"img_raw", "img_proj"}), ("text", {"txt_raw", "txt_proj"})])
def test_one_side_alone(inputs, keys):
    model = build("vit_tiny", inputs=inputs, fusion="cross_attention")
    assert (model.image is None) == (inputs == "text") and (model.text is None) == (inputs == "image")
    batch = batch_of(model) if inputs == "image" else {k: v for k, v in batch_of(model).items() if k != "image"}
    out = model(batch)
    assert set(out) == keys | {"embedding", "logits_modality", "logits_location"} and out["embedding"].shape == (3, 64)
    (out["logits_modality"].sum() + out["logits_location"].sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.name == ("vit_tiny" if inputs == "image" else "bert-tiny-scratch")
    rebuilt = build_image_text_model(**model.build_args)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(forward(rebuilt, batch)["logits_location"], forward(model, batch)["logits_location"])


# ------------------------------------------------------------------------------------------------ independent formulas


def test_text_pooling_is_the_mean_of_the_texts_own_tokens():
    model, first = build(), build(text_pooling="cls")
    batch = batch_of(model)
    out, cls = forward(model, batch)["txt_raw"], forward(first, batch)["txt_raw"]
    for row, mask in enumerate(batch["attention_mask"].bool()):
        with torch.no_grad():
            hidden = model.text.body(input_ids=batch["input_ids"][row][mask][None]).last_hidden_state[0]
        torch.testing.assert_close(out[row], hidden.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cls[row], hidden[0], atol=1e-5, rtol=1e-5)


def test_attention_block_equals_torchs():
    """Against nn.MultiheadAttention with the same weights, in float64; its mask is the complement."""
    torch.manual_seed(0)
    block, reference = AttentionBlock(128).double(), nn.MultiheadAttention(128, 2, batch_first=True).double()
    x, context = torch.randn(2, 3, 128).double(), torch.randn(2, 5, 128).double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool()
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
        reference.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
        reference.out_proj.weight.copy_(block.project.weight)
        reference.out_proj.bias.copy_(block.project.bias)
        for source, valid in ((context, mask), (None, None)):
            keys = block.norm(x if source is None else source)
            attended = reference(block.norm(x), keys, keys, key_padding_mask=None if valid is None else ~valid)[0]
            wanted = x + attended
            wanted = wanted + block.mlp.mlp(block.mlp.norm(wanted))
            torch.testing.assert_close(block(x, source, valid), wanted)


@pytest.mark.parametrize("layers", [1, 2])
def test_both_sides_of_cross_attention_see_what_the_other_was(layers):
    """Each layer's two blocks read the layer's input: none reads what the other made of it."""
    torch.manual_seed(0)
    fusion = FUSIONS["cross_attention"](64, layers)
    sides, mask = (torch.randn(3, 5, 64), torch.randn(3, 4, 64)), torch.ones(3, 4, dtype=torch.bool)
    image, text = sides
    for i in range(layers):
        before = image.clone(), text.clone()
        image = fusion.image[i](before[0], before[1], mask)
        text = fusion.text[i](before[1], before[0])
    expected = F.linear(torch.cat([image[:, 0], text[:, 0]], 1), fusion.project.weight, fusion.project.bias)
    torch.testing.assert_close(fusion(*sides, mask), expected)


def test_gate_mixes_the_two_sides():
    """h = z tanh(W_v v) + (1 - z) tanh(W_t t): at an open and at a closed gate one side alone is left."""
    gated, image, text = Gated(8, 1), torch.randn(4, 8), torch.randn(4, 8)
    for bias, side, of_side in ((50.0, image, gated.image[0]), (-50.0, text, gated.text[0])):
        with torch.no_grad():
            gated.gate[0].weight.zero_()
            gated.gate[0].bias.fill_(bias)
            torch.testing.assert_close(gated(image, text), (side @ of_side.weight.T + of_side.bias).tanh())
    with torch.no_grad():
        gated.gate[0].bias.zero_()
        half = (gated.image[0](image).tanh() + gated.text[0](text).tanh()) / 2
        torch.testing.assert_close(gated(image, text), half)


def test_simple_and_concat_by_hand():
    torch.manual_seed(0)
    image, text = torch.randn(4, 8), torch.randn(4, 8)
    simple, concat = FUSIONS["simple"](8, 1), FUSIONS["concat_mlp"](8, 1)
    mean = (image + text) / 2
    inner, outer = simple.layers[0].mlp[0], simple.layers[0].mlp[2]
    hidden = F.gelu(F.layer_norm(mean, (8,)) @ inner.weight.T + inner.bias)
    torch.testing.assert_close(simple(image, text), mean + hidden @ outer.weight.T + outer.bias)
    inner, outer = concat.mlp[0], concat.mlp[3]
    hidden = F.gelu(F.layer_norm(torch.hstack([image, text]) @ inner.weight.T + inner.bias, (16,)))
    torch.testing.assert_close(concat(image, text), hidden @ outer.weight.T + outer.bias)


def test_depth_of_fusions():
    def count(fusion, layers):
        return sum(p.numel() for p in FUSIONS[fusion](64, layers).parameters())

    for fusion in FUSIONS:
        assert count(fusion, 3) - count(fusion, 2) == count(fusion, 2) - count(fusion, 1) > 0


# ---------------------------------------------------------------------------------------------------------- vocabulary


def test_wordpiece_by_hand():
    """low x 5, lower x 2, newest x 6, widest x 3, the example of Sennrich et al. 2016: es, est, low and so on."""
    texts = ["low " * 5 + "Lower lower", "newest " * 6, "widest widest widest"]
    pieces = train_wordpiece(texts)
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = ["##d", "##e", "##i", "##o", "##r", "##s", "##t", "##w", "l", "n", "w"]
    assert pieces[5:16] == letters
    assert pieces[16:18] == ["##es", "##est"], "9 each"
    assert pieces[18:20] == ["##ow", "low"], "7 each; of lo and ow the one whose name comes first"
    assert {"newest", "widest", "lower"} <= set(pieces)
    assert train_wordpiece(texts, size=18) == pieces[:18]
    assert "lower" not in train_wordpiece(texts, min_frequency=3)


def test_wordpiece_agrees_with_the_package():
    """Without ties the same pieces as those of the package tokenizers."""
    from tokenizers import BertWordPieceTokenizer

    words = {"abcd": 101, "abce": 53, "fgh": 29, "fgij": 13, "klm": 7}
    texts = [f"{word} " * count for word, count in words.items()]
    reference = BertWordPieceTokenizer(lowercase=True)
    reference.train_from_iterator(texts, vocab_size=100, min_frequency=2, show_progress=False)
    own = train_wordpiece(texts, 100)
    full = {"abcd", "abce", "fgh", "fgij", "klm"}
    assert full <= set(own) and full <= set(reference.get_vocab())
    tokenizer = build_text_model("bert-tiny-scratch", texts=texts).tokenizer
    for text in ("abcd fgij", "KLM, abce"):
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[1:-1] == reference.encode(text).tokens


def test_vocabulary_depends_on_the_texts_alone():
    """In another process, whose hashes differ, and for texts in another order."""
    code = f"from common.multimodal import train_wordpiece; print(train_wordpiece({TEXTS[::-1]!r}))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**script_environment(), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == repr(train_wordpiece(TEXTS)), done.stderr


def test_scratch_tokenizer():
    text = build_text_model("bert-tiny-scratch", texts=TEXTS)
    tokens = text.tokenizer.convert_ids_to_tokens(text.tokenizer("The CHEST \u4e2d")["input_ids"])
    assert tokens == ["[CLS]", "the", "chest", "[UNK]", "[SEP]"], "lower-cased; what train has not is unknown"
    assert text.tokenizer("")["input_ids"] == [2, 3]
    for name, layers, width in (("bert-tiny-scratch", 2, 128), ("bert-mini-scratch", 4, 256)):
        config = build_text_model(name, texts=TEXTS).body.config
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (
            layers,
            width,
            width // 64,
        )
    assert "needs the texts of train" in refusal(build_text_model, "bert-tiny-scratch")
    assert "all texts of train are empty" in refusal(build_text_model, "bert-tiny-scratch", texts=["", " "])


# ---------------------------------------------------------------------------------------------------- folders and hubs


@pytest.mark.parametrize(
    "text, fusion", [("bert", "cross_attention"), ("distilbert", "transformer_concat"), ("bert-tiny-scratch", "gated")]
)
def test_rebuilt_without_the_folder(text_folder, tmp_path, text, fusion):
    name, gone = text, tmp_path / "gone"
    if text != "bert-tiny-scratch":
        shutil.copytree(text_folder / text, gone)
        name = f"hf:{gone}" if text == "bert" else str(gone)
    model = build("vit_tiny", name, fusion=fusion, max_length=24)
    batch = batch_of(model)
    out = forward(model, batch)
    torch.save({"args": model.build_args, "model": model.state_dict()}, tmp_path / "checkpoint.pth")
    shutil.rmtree(gone, ignore_errors=True)
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    rebuilt = build_image_text_model(**saved["args"])
    rebuilt.load_state_dict(saved["model"], strict=True)
    again = batch_of(rebuilt)
    assert all(torch.equal(again[key], batch[key]) for key in batch), "the same tokens"
    for key, value in forward(rebuilt, again).items():
        assert torch.equal(value, out[key]), key
    assert (
        rebuilt.build_args == model.build_args
        and rebuilt.max_length == 24
        and rebuilt.num_parameters == model.num_parameters
    )


@pytest.mark.parametrize("text, width", [("bert", 32), ("distilbert", 48)])
def test_pretrained_weights_and_their_tokenizer(text_folder, text, width):
    """The folder's weights, in float32, and its own words: the DistilBERT is cased."""
    import transformers

    model = build_text_model(f"hf:{text_folder / text}", 24, pretrained=True)
    reference = transformers.AutoModel.from_pretrained(text_folder / text).float().eval()
    own = transformers.AutoTokenizer.from_pretrained(text_folder / text)
    ids = torch.tensor([model.tokenizer("CT of the chest")["input_ids"]])
    assert ids[0].tolist() == own("CT of the chest")["input_ids"]
    assert ("CT" in own.convert_ids_to_tokens(ids[0])) == (text == "distilbert")
    with torch.no_grad():
        hidden = model.eval()(ids, torch.ones_like(ids))
        torch.testing.assert_close(hidden, reference(input_ids=ids).last_hidden_state)
    assert hidden.shape[-1] == width and {p.dtype for p in model.parameters()} == {torch.float32}
    fresh = build_text_model(f"hf:{text_folder / text}", 24)
    assert not torch.equal(next(fresh.parameters()), next(model.parameters()))
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_short_names():
    assert multimodal.IMAGE_MODELS["vit-large"] == "hf:google/vit-large-patch16-224"
    assert multimodal.IMAGE_MODELS["deit-small"] == "hf:facebook/deit-small-patch16-224"
    assert multimodal.TEXT_MODELS["distilbert"] == "hf:distilbert-base-uncased"
    assert multimodal.TEXT_MODELS["bio-clinical-bert"] == "hf:emilyalsentzer/Bio_ClinicalBERT"


def test_an_image_model_of_a_folder(text_folder):
    model = build(
        f"hf:{text_folder / 'vit'}", f"hf:{text_folder / 'distilbert'}", fusion="transformer_concat", max_length=24
    )
    out = model(batch_of(model))
    (out["logits_modality"].sum() + out["logits_location"].sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == [], (
        "DDP would stop at a pooler that is not used"
    )
    assert out["img_raw"].shape == (3, 32) and out["txt_raw"].shape == (3, 48) and model.family == "vit+distilbert"
    args = copy.deepcopy(model.build_args)
    args["image_name"], args["image_args"]["name"] = "hf:/nowhere", "hf:/nowhere"
    rebuilt = build_image_text_model(**args)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(forward(rebuilt, batch_of(model))["embedding"], forward(model, batch_of(model))["embedding"])


def test_bad_models(text_folder, capsys):
    for name in ("no_tokenizer", "few_words", "vit", "t5", "nothing"):
        text = refusal(build_text_model, f"hf:{text_folder / name}", 16)
        wanted = {
            "no_tokenizer": "has no tokenizer",
            "few_words": "the model knows 8",
            "vit": "is not a text encoder",
            "t5": "is not a text encoder",
            "nothing": "cannot load",
        }
        assert wanted[name] in text, text
    assert "choose of bio-clinical-bert, distilbert, bert-tiny-scratch" in refusal(build_text_model, "bert-tiny")
    assert "--max-length" in refusal(build_text_model, f"hf:{text_folder / 'bert'}", 41, pretrained=True)
    assert capsys.readouterr().err == "", "no bar and no report while it loads"
    assert build_text_model(f"hf:{text_folder / 'bert'}", 40).max_length == 40
    assert "must be positive" in refusal(build_text_model, "distilbert", 0)
    assert "by hand" in refusal(build_text_model, "hf:nobody/nothing-of-that-name")
    assert "simple, concat_mlp" in refusal(build, fusion="sum")
    assert "both, image, text" in refusal(build, inputs="all")
    assert "multiple of 64" in refusal(build, fusion="cross_attention", fusion_dim=100)
    assert build(fusion_dim=100).build_args["fusion_dim"] == 100
    assert "positive" in refusal(build, fusion_layers=0)
    assert "cannot be named" in refusal(build_image_text_model, IMAGE, "bert-tiny-scratch", {"a.b": 2}, 16, texts=TEXTS)


# ------------------------------------------------------------------------------------------- as the scripts will use it


def test_names_of_tasks_are_free():
    """Also those that nn.Module has as attributes."""
    model = build_image_text_model(IMAGE, "bert-tiny-scratch", {"type": 3, "half": 2}, 16, texts=TEXTS, fusion_dim=64)
    assert {key for key in model(batch_of(model)) if key.startswith("logits")} == {"logits_type", "logits_half"}


def test_a_task_named_as_that_of_image_models():
    """Its logits have the same name as theirs, which all that follows looks for."""
    model = build_image_text_model(IMAGE, "bert-tiny-scratch", {"label": 3, "organ": 2}, 16, texts=TEXTS, fusion_dim=64)
    out = model(batch_of(model))
    assert {key: len(out[key][0]) for key in out if key.startswith("logits")} == {"logits": 3, "logits_organ": 2}
    targets = {"label": torch.tensor([2, 0, 1]), "organ": torch.tensor([0, 1, 1])}
    own = [F.cross_entropy(out[key], targets[task]) for task, key in (("label", "logits"), ("organ", "logits_organ"))]
    assert torch.allclose(task_cross_entropy(out, targets), (own[0] + own[1]) / 2)


def test_freezing_and_dropout():
    model = build()
    model.freeze_backbone(["text"])
    model.train()
    assert (
        not model.text.training and model.image.training and not any(p.requires_grad for p in model.text.parameters())
    )
    model.freeze_backbone()
    model.train()
    assert (
        not model.image.training
        and model.fusion.training
        and all(p.requires_grad for head in model.classifiers for p in head.parameters())
    )
    batch = batch_of(model)
    with torch.no_grad():
        plain, again = model(batch)["logits_modality"], model(batch)["logits_modality"]
        assert torch.equal(plain, again), "frozen backbones draw no dropout"
        model.set_dropout(0.5)
        assert not torch.equal(model(batch)["logits_modality"], plain)
        assert torch.equal(model.eval()(batch)["logits_modality"], plain)


def test_weight_decay_leaves_positions_and_tokens_out():
    model = build("vit_tiny", fusion="transformer_concat")
    groups = make_optimizer(model, optimizer="adamw", lr=1e-3).param_groups
    free, decayed = sorted(groups, key=lambda group: group["weight_decay"])
    names = {id(p): name for name, p in model.named_parameters()}
    free_names = {names[id(p)] for p in free["params"] if p.ndim > 1}
    assert free_names == {
        "image.backbone.cls_token",
        "image.backbone.pos_embed",
        "fusion.cls_token",
        "fusion.kinds",
        "text.body.embeddings.position_embeddings.weight",
        "text.body.embeddings.token_type_embeddings.weight",
    }
    assert decayed["weight_decay"] == 0.05 and len(decayed["params"]) + len(free["params"]) == len(names)


def test_copies_features_and_other_sides():
    model = build("vit_tiny")
    twin = copy.deepcopy(model)  # the average of the weights is one
    batch = batch_of(model)
    assert torch.equal(forward(twin, batch)["embedding"], forward(model, batch)["embedding"])
    plain = forward(model, batch)["embedding"]
    model.set_feature_layers(["blocks.3"])
    model.with_tokens = True
    out = forward(model, batch)
    assert out["features"]["blocks.3"].shape == (3, 192, 4, 4) and out["tokens"].shape == (3, 16, 192)
    assert torch.equal(out["embedding"], plain)
    model.set_resolution(32)
    wide = forward(model, {**batch, "image": torch.zeros(3, 3, 32, 32)})
    assert wide["tokens"].shape == (3, 64, 192)
    assert {
        value.shape[0] for value in forward(model, model.example()).values() if isinstance(value, torch.Tensor)
    } == {2}
    assert "no image side" in refusal(build(inputs="text").set_feature_layers, ["blocks.3"])


def test_the_mean_and_std_of_the_image_side(text_folder):
    model = build()
    assert (model.mean, model.std) == (None, None)
    model.image.mean, model.image.std = [0.5] * 3, [0.5] * 3
    assert multimodal.ImageTextModel(model.image, model.text, model.build_args).mean == [0.5] * 3


@pytest.mark.parametrize("fusion", FUSIONS)
def test_it_learns_from_both_sides(fusion):
    """A label that neither side alone tells (a grey level and a word, four classes) is learnt."""
    texts = ["ct of the chest", "mr of the chest"]
    torch.manual_seed(0)
    model = build_image_text_model(
        IMAGE, "bert-tiny-scratch", {"both": 4}, 8, fusion=fusion, fusion_dim=64, texts=texts
    )
    tokens = token_batch(tokenize(texts, model.tokenizer, 16), torch.tensor([0, 1, 0, 1]))
    batch = {
        "image": torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None, None, None].expand(4, 3, 8, 8).contiguous(),
        **tokens,
    }
    labels = torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch)["logits_both"], labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_weights_are_those_of_the_image_side(text_folder, tmp_path):
    """With --pretrained the text side has those of its folder or hub; the image side asks none."""
    import transformers

    reference = transformers.AutoModel.from_pretrained(text_folder / "bert").state_dict()
    theirs = build_model("timm:resnet10t", 5, 32).backbone.state_dict()
    torch.save(theirs, tmp_path / "w.pth")
    flags = {"model": "resnet10t", "seed": 0, "text_model": f"hf:{text_folder / 'bert'}", "max_length": 16}
    flags.update(weights=str(tmp_path / "w.pth"), fusion_dim=64)
    for pretrained in (False, True):
        model, note = start_model({"organ": ["a", "b"]}, 32, ["x"], pretrained=pretrained, **flags)
        assert note == f"weights of {tmp_path / 'w.pth'}"
        assert model.mean == [0.485, 0.456, 0.406], "what these weights expect"
        ours = model.image.backbone.state_dict()
        assert ours and all(torch.equal(value, theirs[name]) for name, value in ours.items())
        found, name = model.text.body.state_dict(), "encoder.layer.0.output.dense.weight"
        assert torch.equal(found[name], reference[name]) == pretrained
    with pytest.raises(UserError, match="--weights are those of the image side, and --inputs text has none"):
        start_model({"organ": ["a", "b"]}, 32, ["x"], inputs="text", **flags)
