"""MixUp and CutMix: against timm's and torchvision's, as functions of (seed, view, key), with their labels, stored."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, succeed
from scipy import stats
from test_augment import load, splitmix_uniform
from test_resume import assert_same_run, stopped
from timm.data.mixup import Mixup, rand_bbox
from timm.loss import SoftTargetCrossEntropy
from torchvision.transforms import v2

sys.path.insert(0, str(ROOT))

from common import losses
from common.augment import Augmenter, Policy, PolicyError, hash_id, mix, mix_labels, sample_mixing
from common.data import ImageDataset
from common.embeddings import Store, StoredTeacher, split_folder
from common.loader import Loader
from common.losses import DistillationLoss, LossError
from common.teacher import several_views
from common.training import (
    check_mixing,
    cross_entropy,
    load_checkpoint,
    load_model,
    task_accuracy,
    task_cross_entropy,
)

SEED, VIEW, STREAM, C = 5, 3, 3000, 10
BOTH = Policy("pad", hflip=0.5, rotation=20, brightness=0.3, mixup=0.4, cutmix=1.0, mix_probability=0.8)


def ids(count):
    return [f"image {i}" for i in range(count)]


def expected_mixing(policy, names, view=VIEW):
    """[(row, share outside the box, box, share)] of a split's rows, by the test's own integers and scipy's Beta."""
    by_key, drawn = sorted(range(len(names)), key=lambda i: hash_id(names[i])), []
    for i, name in enumerate(names):
        mixed, kind, row, quantile, x, y = splitmix_uniform(SEED, view, STREAM, hash_id(name), 6)
        if mixed >= policy.mix_probability:
            drawn.append((i, 1.0, None, 1.0))
            continue
        cut = kind < 0.5 if policy.mixup and policy.cutmix else bool(policy.cutmix)
        alpha = policy.cutmix if cut else policy.mixup
        share, partner = stats.beta.ppf(quantile, alpha, alpha), by_key[int(row * len(names))]
        if not cut:
            drawn.append((partner, share, None, share))
            continue
        half = (1 - share) ** 0.5 / 2
        left, right, top, bottom = (min(max(v, 0), 1) for v in (x - half, x + half, y - half, y + half))
        drawn.append((partner, 1.0, (left, top, right, bottom), 1 - (right - left) * (bottom - top)))
    return drawn


def draw(policy, names, view=VIEW):
    key = torch.tensor([hash_id(name) for name in names])
    views = torch.full((len(names),), view)
    return sample_mixing(policy, SEED, views, key, torch.arange(len(names)), key.argsort())


# -------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("policy", [BOTH, Policy(mixup=0.2), Policy(cutmix=0.7), Policy(mixup=1.0, mix_probability=0)])
def test_partner_share_and_box_are_those_of_the_draws(policy):
    names, drawn = ids(200), draw(policy, ids(200))
    for i, (row, weight, box, share) in enumerate(expected_mixing(policy, names)):
        assert drawn["partner"][i] == row
        assert drawn["weight"][i].item() == pytest.approx(weight, abs=1e-6)
        assert drawn["share"][i].item() == pytest.approx(share, abs=1e-6)
        if box is None:
            assert drawn["box"][i, 0] == drawn["box"][i, 2] and drawn["box"][i, 1] == drawn["box"][i, 3]
        else:
            assert drawn["box"][i].tolist() == pytest.approx(box, abs=1e-6)


def test_the_draws_have_their_distributions():
    count = 4000
    drawn = draw(Policy(mixup=0.3), ids(count))
    assert stats.kstest(drawn["share"].numpy(), stats.beta(0.3, 0.3).cdf).pvalue > 1e-3
    assert stats.kstest(drawn["partner"].numpy() / count, "uniform").pvalue > 1e-3
    assert (drawn["partner"] != torch.arange(count)).float().mean() > 0.99
    drawn = draw(replace(BOTH, mix_probability=0.6), ids(count))
    mixed, cut = drawn["partner"] != torch.arange(count), drawn["box"][:, 2] > drawn["box"][:, 0]
    assert mixed.float().mean().item() == pytest.approx(0.6, abs=0.03)
    assert cut[mixed].float().mean().item() == pytest.approx(0.5, abs=0.04) and cut[~mixed].sum() < 5  # themselves
    assert torch.corrcoef(torch.stack([drawn["share"][mixed], drawn["partner"][mixed].float()]))[0, 1].abs() < 0.08


def test_view_0_is_plain_and_the_order_of_files_does_not_matter():
    drawn = draw(BOTH, ids(50), view=0)
    assert drawn["partner"].tolist() == list(range(50)) and (drawn["share"] == 1).all() and (drawn["weight"] == 1).all()
    names = ids(50)
    forth, back = draw(BOTH, names), draw(BOTH, names[::-1])
    assert [names[i] for i in forth["partner"]] == [names[::-1][i] for i in back["partner"].flip(0)]
    for name in ("weight", "box", "share"):
        assert torch.equal(forth[name], back[name].flip(0))


@pytest.mark.parametrize("values", [{"mixup": -1}, {"cutmix": float("nan")}, {"mixup": 0.1, "mix_probability": 1.5}])
def test_policy_errors(values):
    with pytest.raises(PolicyError, match=f"--{list(values)[-1].replace('_', '-')}"):
        Policy(**values)
    with pytest.raises(PolicyError, match="--mix-probability 0.5 needs --mixup ALPHA or --cutmix ALPHA"):
        Policy(mix_probability=0.5)


# --------------------------------------------------------------------------------------------- timm's and torchvision's


def soft(labels):
    """(B, C) float64 of three tensors (B,)."""
    first, second, share = labels
    one_hot = F.one_hot(torch.stack([first, second]), C).double()
    return share[:, None].double() * one_hot[0] + (1 - share[:, None].double()) * one_hot[1]


def check_mixed(images, labels, others, mixed, probabilities, box=None):
    """Ours of the share that a library drew gives its image and its target."""
    order = torch.arange(len(labels))
    apart = (labels != labels[others]).nonzero()[0, 0]
    share = probabilities[apart, labels[apart]].float().expand(len(labels))
    weight = share if box is None else torch.ones(len(labels))
    edges = torch.tensor(box or (0, 0, 0, 0)).expand(len(labels), 4) / images.shape[-1]
    both = torch.cat([images[order], images[others]])
    ours = mix(both, weight.view(-1, 1, 1, 1), edges[..., None, None])
    assert (ours - mixed).abs().max() < 1e-6 and not torch.allclose(ours, images)
    ours = mix_labels(labels, labels[others], share)
    assert (ours[2] >= 0.5).all() and (soft(ours) - probabilities.double()).abs().max() < 1e-6
    if box:
        area = (box[2] - box[0]) * (box[3] - box[1]) / images.shape[-1] ** 2
        assert share[0].item() == pytest.approx(1 - area, abs=1e-6)


def box_of(images, others, mixed):
    """Edges of the pixels that are the partner's."""
    theirs = ((mixed == images[others]) & (mixed != images)).any(1).any(0).nonzero()  # row, column
    (top, left), (bottom, right) = theirs.amin(0).tolist(), (theirs.amax(0) + 1).tolist()
    return left, top, right, bottom


@pytest.fixture
def photos():
    images, rng = load("photos")[:16, :, :64, :64].float() / 255, torch.Generator().manual_seed(0)
    return images, torch.randint(0, C, (16,), generator=rng)


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0)])
def test_values_are_timm_s(photos, alphas):
    images, labels = photos
    np.random.seed(3)
    for _ in range(5):
        library = Mixup(*alphas, label_smoothing=0, num_classes=C)
        mixed, target = library(images.clone(), labels)
        others = torch.arange(15, -1, -1)
        check_mixed(images, labels, others, mixed, target.cpu(), box_of(images, others, mixed) if alphas[1] else None)


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_values_are_torchvision_s(photos, kind):
    images, labels = photos
    torch.manual_seed(3)
    for _ in range(5):
        mixed, target = getattr(v2, kind)(alpha=1.0, num_classes=C)(images, labels)
        others = torch.arange(16).roll(1)
        check_mixed(images, labels, others, mixed, target, box_of(images, others, mixed) if kind == "CutMix" else None)


def test_boxes_are_timm_s(monkeypatch):
    """Side ratio, centre and clipping, of the same share and centre, to a pixel and a half of 2000."""
    side, names = 2000, ids(200)
    drawn, clipped = draw(Policy(cutmix=1.0), names), 0
    for name, box in zip(names, drawn["box"] * side):
        _, _, _, quantile, x, y = splitmix_uniform(SEED, VIEW, STREAM, hash_id(name), 6)
        centres = iter([y, x])
        monkeypatch.setattr(np.random, "randint", lambda low, high, size, at=centres: int(next(at) * side))
        top, bottom, left, right = rand_bbox((side, side), float(quantile))  # Beta(1, 1) is uniform
        assert np.abs(np.array([left, top, right, bottom]) - box.numpy()).max() <= 1.5
        clipped += 0 in (left, top)
    assert 20 < clipped < 180


# -------------------------------------------------------------------------------------------------------------- the box


@pytest.mark.parametrize("side", [7, 32, 33, 224])
def test_what_shows_of_the_partner_is_the_box_s_area(side):
    drawn = draw(BOTH, ids(100))
    black_on_white = torch.cat([torch.zeros(100, 3, side, side), torch.ones(100, 3, side, side)])
    shown = mix(black_on_white, drawn["weight"].view(-1, 1, 1, 1), drawn["box"][..., None, None])
    assert (1 - shown.double().mean((1, 2, 3)) - drawn["share"]).abs().max() < 1e-6
    assert ((shown > 0.01) & (shown < 0.99)).any(), "a box ends within pixels"


def test_the_teacher_sees_the_student_s_box():
    """At twice the side each pixel's four quarters have its mean."""
    drawn = draw(Policy(cutmix=1.0), ids(50))
    masks = []
    for side in (16, 32):
        pair = torch.cat([torch.zeros(50, 3, side, side), torch.ones(50, 3, side, side)])
        masks.append(mix(pair, drawn["weight"].view(-1, 1, 1, 1), drawn["box"][..., None, None]))
    assert (F.avg_pool2d(masks[1], 2) - masks[0]).abs().max() < 1e-5


# -------------------------------------------------------------------------------------------------------- from a loader


def dataset_of(unequal, count=40):
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(count) % 5 == 4, -1, np.arange(count) % 3)
    if not unequal:
        return ImageDataset(ids(count), labels, images=rng.integers(0, 256, (count, 12, 12, 3), np.uint8))
    dataset = ImageDataset(ids(count), labels, paths=ids(count))
    images = [rng.integers(0, 256, (12 + i % 5, 12 + 2 * (i % 3), 3), np.uint8) for i in range(count)]
    dataset.read = lambda i: images[i]
    return dataset


def shown(loader, plan, augment, epoch=2, start=0, sides=(8, 20)):
    """{(row, view): (pixels at two sides, first label, second label, share)} of an epoch."""
    seen = {}
    for batch in loader.batches(epoch, start, plan):
        pixels = [augment(batch, side) for side in sides]
        first, second, share = batch["targets"]["label"]
        for i, (row, view) in enumerate(zip(batch["index"].tolist(), batch["view"].tolist())):
            seen[row, view] = (*(p[i] for p in pixels), first[i], second[i], share[i])
    return seen


def assert_same_views(one, other):
    for key in one.keys() & other.keys():
        assert all(torch.equal(a, b) for a, b in zip(one[key], other[key])), key
    assert len(one.keys() & other.keys()) > 7


@pytest.mark.parametrize("unequal", [False, True])
def test_a_mixed_view_is_both_views_in_their_shares(unequal):
    """By hand from the unmixed views of both images, and the labels."""
    dataset, augment = dataset_of(unequal), Augmenter(BOTH, SEED)
    plain = Augmenter(replace(BOTH, mixup=0.0, cutmix=0.0, mix_probability=1.0), SEED)
    single = {}
    for batch in Loader(dataset, 40, "cpu", True, SEED).batches(2):
        for i, row in enumerate(batch["index"].tolist()):
            single[row] = [plain(batch, side)[i].double() for side in (8, 20)]
    drawn, kinds = expected_mixing(BOTH, dataset.ids, view=2), set()
    seen = shown(Loader(dataset, 8, "cpu", True, SEED), augment.plan, augment)
    for (row, _), (*pixels, first, second, share) in seen.items():
        partner, weight, box, expected = drawn[row]
        for at, side in enumerate((8, 20)):
            mask = torch.full((side, side), weight, dtype=torch.float64)
            if box:  # each of 100 x 100 points of a pixel
                points = (torch.arange(side * 100) + 0.5) / (side * 100)
                inside = [(points > low) & (points < high) for low, high in (box[0::2], box[1::2])]
                mask = 1 - (inside[1][:, None] & inside[0]).double().view(side, 100, side, 100).mean((1, 3))
            by_hand = mask * single[row][at] + (1 - mask) * single[partner][at]
            assert (pixels[at] - by_hand).abs().max() < (0.03 if box else 1e-6)
        labels = [dataset.labels[i] for i in ((row, partner) if expected >= 0.5 else (partner, row))]
        labels = [-1, -1] if -1 in labels else labels
        assert [int(first), int(second)] == labels and share.item() == pytest.approx(
            max(expected, 1 - expected), abs=1e-6
        )
        kinds.add("box" if box else "blend" if partner != row else "plain")
        if partner == row and not box:
            assert all(torch.equal(p, s.float()) for p, s in zip(pixels, single[row]))
    assert kinds == {"box", "blend", "plain"}


@pytest.mark.parametrize("unequal", [False, True])
def test_the_same_views_for_any_cache_workers_and_batch(unequal):
    dataset, augment = dataset_of(unequal), Augmenter(BOTH, SEED)
    whole = shown(Loader(dataset, 8, "cpu", True, cache="ram"), augment.plan, augment)
    for batch_size, cache, workers, accumulate in (
        (8, "off", 0, 1),
        (8, "off", 2, 1),
        (4, "ram", 0, 1),
        (40, "off", 0, 1),
        (8, "ram", 0, 2),
        (8, "off", 0, 4),
    ):
        loader = Loader(dataset, batch_size, "cpu", True, 0, cache, workers, accumulate)
        assert_same_views(whole, shown(loader, augment.plan, augment))
        assert_same_views(whole, shown(loader, augment.plan, augment, start=2)) if batch_size < 40 else None


def test_several_views_have_partners_of_their_own():
    dataset, augment = dataset_of(True), Augmenter(BOTH, SEED)
    views = [shown(Loader(dataset, 8, "cpu", True), augment.plan, augment, epoch) for epoch in (3, 4)]
    for cache in ("ram", "off"):
        loader = Loader(dataset, 8, "cpu", True, cache=cache, workers=0)
        both = shown(loader, lambda batch: augment.plan(several_views(batch, 2)), augment)
        assert {view for _, view in both} == {3, 4}
        for one in views:
            assert_same_views(one, both)


def test_the_labels_of_the_whole_batch_come_with_its_parts():
    dataset, augment = dataset_of(False), Augmenter(BOTH, SEED)
    whole = [batch["targets"]["label"] for batch in Loader(dataset, 8, "cpu", True).batches(1, plan=augment.plan)]
    for i, part in enumerate(Loader(dataset, 8, "cpu", True, accumulate=4).batches(1, plan=augment.plan)):
        at, batch = divmod(i, 4)[::-1]
        for ours, theirs, batch_labels in zip(part["targets"]["label"], whole[batch], part["batch_targets"]["label"]):
            assert torch.equal(ours, theirs[2 * at : 2 * at + 2]) and torch.equal(batch_labels, theirs)


def test_views_that_mix_are_planned():
    batch = next(Loader(dataset_of(False), 8, "cpu", True).batches(1))
    with pytest.raises(ValueError, match="planned"):
        Augmenter(BOTH, SEED)(batch, 8)
    plain = {**batch, "view": torch.zeros_like(batch["view"])}
    assert torch.equal(Augmenter(BOTH, SEED)(plain, 8), Augmenter(Policy(crop_mode="center"), 1)(dict(plain), 8))


# -------------------------------------------------------------------------------------------------------- cross-entropy


def by_hand(logits, labels, smoothing, weights):
    """Sum of weighted losses of probabilities, and sum of their weights, in float64."""
    total = weight = 0.0
    log = logits.double().log_softmax(1)
    for row, first, second, share in zip(log, *labels):
        if first < 0:
            continue
        target = torch.zeros(C, dtype=torch.float64)
        target[first] += share.double()
        target[second] += 1 - share.double()
        weight += (target * weights).sum()
        total += -((target * (1 - smoothing) + smoothing / C) * weights * row).sum()
    return total, weight


@pytest.fixture
def mixture():
    rng = torch.Generator().manual_seed(1)
    labels, others = torch.randint(-1, C, (2, 64), generator=rng)
    share = torch.rand(64, generator=rng)
    return torch.randn(64, C, generator=rng) * 3, labels, others, share


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_that_of_probabilities(mixture, smoothing, weighted):
    logits, labels, others, share = mixture
    weights = torch.rand(C, generator=torch.Generator().manual_seed(2)) * 4 if weighted else None
    mixed = mix_labels(labels, others, share)
    assert (mixed[0] < 0).sum() == ((labels < 0) | (others < 0)).sum() > 3
    factors = torch.ones(C, dtype=torch.float64) if weights is None else weights.double()
    total, weight = by_hand(logits, mixed, smoothing, factors)
    value = cross_entropy(logits, mixed, smoothing, weights)
    assert value.item() == pytest.approx((total / weight).item(), rel=1e-5)
    # torch's of probabilities, which divides by the number of images
    known = mixed[0] >= 0
    torchs = F.cross_entropy(
        logits[known].double(), soft([v[known] for v in mixed]), factors, label_smoothing=smoothing
    )
    assert (value.double() * weight / known.sum()).item() == pytest.approx(torchs.item(), rel=1e-5)
    parts = [cross_entropy(logits[i::4], tuple(v[i::4] for v in mixed), smoothing, weights, mixed) for i in range(4)]
    assert torch.stack(parts).mean().item() == pytest.approx(value.item(), rel=1e-5)


def test_cross_entropy_is_timm_s(mixture):
    logits, labels, others, share = mixture
    mixed = mix_labels(labels.clamp(min=0), others.clamp(min=0), share)
    expected = SoftTargetCrossEntropy()(logits.double(), soft(mixed))
    assert cross_entropy(logits, mixed).item() == pytest.approx(expected.item(), rel=1e-5)
    unmixed = labels, labels, torch.ones(64)
    assert cross_entropy(logits, unmixed).item() == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)


def test_several_tasks_and_accuracy(mixture):
    logits, labels, others, share = mixture
    tasks = {
        "organ": mix_labels(labels, others, share),
        "sign": mix_labels(others.clamp(max=3), labels.clamp(max=3), share),
    }
    out = {"logits_organ": logits, "logits_sign": -logits}
    each = [cross_entropy(out[f"logits_{task}"], mixed) for task, mixed in tasks.items()]
    value = task_cross_entropy(out, tasks, task_weights={"organ": 3.0, "sign": 1.0})
    assert value.item() == pytest.approx(((3 * each[0] + each[1]) / 4).item(), rel=1e-6)
    one = tasks["organ"]
    known = one[0] >= 0
    expected = (logits.argmax(1) == one[0])[known].double().mean()
    assert task_accuracy({"logits": logits}, {"label": one}).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_sum_takes_mixed_labels_and_refuses_terms_of_one_class(mixture):
    logits, labels, others, share = mixture
    mixed, teacher = mix_labels(labels, others, share), {"logits": logits.flip(1)}
    criterion = DistillationLoss(
        {"ce": 0.5, "kl": 2.0},
        cross_entropy=lambda out, labels, _: task_cross_entropy(out, labels, label_smoothing=0.1),
    )
    value = criterion({"logits": logits}, teacher, mixed)
    kl = losses.temperature_kl(logits, logits.flip(1))
    assert value.item() == pytest.approx((0.5 * cross_entropy(logits, mixed, 0.1) + 2 * kl).item(), rel=1e-6)
    for term in ("dkd", "pld"):
        with pytest.raises(LossError, match=f"{term} needs one class"):
            DistillationLoss({term: 1.0})({"logits": logits}, teacher, mixed)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("flags", [["--mixup", 0.2], ["--cutmix", 1]])
@pytest.mark.parametrize(
    "others, words",
    [
        (["--method", "dkd"], "the term dkd"),
        (["--loss", "ce=1", "pld=1"], "the term pld"),
        (["--method", "tokens", "--local-crops", 2], "--local-crops"),
        (["--dataset", "medpix"], "--dataset medpix"),
    ],
)
def test_what_does_not_fit_is_refused_before_data_are_read(refused, teacher, flags, others, words):
    data = [] if "--dataset" in others else ["--dataset", "imagefolder"]  # whose folder is not there
    taught = ["--teacher-checkpoint", teacher / "best.pth", *data, "--data-root", "nowhere"]
    refused("distill.py", *flags, *others, *taught, words=["mixed views (--mixup, --cutmix)", words])


def test_texts_and_lone_probabilities_are_refused(refused):
    refused("train_student.py", "--dataset", "medpix", "--mixup", 1, words=["--dataset medpix", "texts"])
    refused("train_student.py", "--mix-probability", 0.5, words=["--mix-probability 0.5 needs --mixup"])
    refused("train_student.py", "--augment", "none", "--mixup", 1, words=["--augment none and --mixup"])


def test_what_fits_is_not_refused():
    check_mixing(Policy(), "medpix", ["dkd"], 3)
    check_mixing(BOTH, "cifar10")


# ------------------------------------------------------------------------------------------------------ stored, resumed

MIX = ["--mixup", 0.8, "--cutmix", 1, "--rotation", 20, "--hflip", 0.5]


@pytest.fixture(scope="module")
def stored(tmp_path_factory, teacher):
    """Four views of each digit, of which three are mixed."""
    folder = tmp_path_factory.mktemp("mixed") / "all"
    flags = ["--checkpoint", teacher / "best.pth", "--num-views", 4, "--save-logits", "--device", "cpu", "--seed", 7]
    succeed("extract_embeddings.py", *flags, *MIX, "--output", folder)
    return folder, flags


def test_the_live_teacher_says_of_a_mixed_view_what_is_stored(stored, teacher):
    """Of the views that a student is shown again."""
    folder, _ = stored
    store = Store(split_folder(folder, "train"))
    assert store.policy.mixup == 0.8 and store.policy.cutmix == 1 and store.seed == 7
    checkpoint = load_checkpoint(teacher / "best.pth")
    model, preprocess = load_model(checkpoint)
    from common.data import load_splits

    splits = load_splits("digits")
    taught = StoredTeacher({"train": store}, {"train": splits.train}, ["embeddings", "logits"])
    augment = Augmenter(store.policy, store.seed)
    unmixed = Augmenter(replace(store.policy, mixup=0.0, cutmix=0.0), store.seed)
    cosines, others, mixed = [], [], 0
    loader = Loader(splits.train, 96, "cpu", True, 3)
    for batch in loader.batches(2, plan=lambda batch: augment.plan(taught.choose_view(batch))):
        told = taught.targets(batch)
        with torch.no_grad():
            out = model(preprocess.inputs(batch, augment(batch, 8)))
            alone = {key: batch[key] for key in ("view", "key", "size")}
            other = model(preprocess.inputs(batch, unmixed({**alone, "image": batch["image"][:96]}, 8)))
        for key in ("embedding", "logits"):
            cosines.append(F.cosine_similarity(out[key], told[key]))
            others.append(F.cosine_similarity(other[key], told[key])[batch["view"] > 0])
        mixed += (batch["targets"]["label"][2] < 1).sum()
        plain = batch["view"] == 0
        assert plain.any() and (batch["targets"]["label"][2][plain] == 1).all()
    assert torch.cat(cosines).min() > 0.999 and torch.cat(others).quantile(0.1) < 0.99
    assert mixed > 500


def test_shards_and_what_is_cached_make_the_same_store(stored, tmp_path):
    folder, flags = stored
    for shard, cache in (("0/2", "ram"), ("1/2", "off")):
        more = ["--shard", shard, "--cache", cache, "--workers", 1, "--output", tmp_path / "all"]
        succeed("extract_embeddings.py", *flags, *MIX, *more)
    succeed("extract_embeddings.py", "--merge", 2, "--output", tmp_path / "all")
    for split in ("train", "val", "test"):
        for name in ("embeddings", "logits"):
            one, other = (np.load(f"{split_folder(f, split)}/{name}.npy") for f in (folder, tmp_path / "all"))
            # batches are cut elsewhere
            assert np.abs(one.astype(np.float32) - other.astype(np.float32)).max() <= 2e-3 * np.abs(one).max()


def test_a_student_learns_from_stored_mixed_views(stored, tmp_path):
    folder, _ = stored
    flags = ["--teacher-embeddings", folder, "--epochs", 2, "--batch-size", 32, "--device", "cpu", "--limit-labels", 0]
    succeed("distill.py", *flags, "--output", tmp_path / "run")
    content = torch.load(tmp_path / "run" / "best.pth", weights_only=True)
    assert content["augment"]["mixup"] == 0.8 and content["augment"]["cutmix"] == 1
    row = json.loads((tmp_path / "run" / "metrics.json").read_text())[-1]
    assert 0 < row["train_ce"] and 0 < row["train_kl"] < 20


@pytest.mark.parametrize("flags", [["--limit-train", 300], ["--mixup", 0.5], ["--method", "dkd"]])
def test_a_store_of_mixed_views_refuses(refused, stored, flags):
    words = {"--limit-train": ["mixed views of 808 images", "train has 300"], "--method": ["mixed views", "dkd"]}
    refused(
        "distill.py", "--teacher-embeddings", stored[0], *flags, words=words.get(flags[0], [flags[0], "stored ones"])
    )


def test_other_images_give_other_partners():
    """So a store's views are made again of all of its images, in any order."""
    names = ids(60)
    whole, part = draw(BOTH, names), draw(BOTH, names[:40])
    partners = [[names[i] for i in drawn["partner"][:40]] for drawn in (whole, part)]
    assert partners[0] != partners[1] and torch.equal(whole["share"][:40], part["share"])


@pytest.mark.parametrize("script", ["train_student.py", "distill.py"])
def test_a_mixed_run_stops_and_resumes_exactly(tmp_path, teacher, script):
    import signal

    flags = [*SMALL, *MIX, "--epochs", 3, "--accumulation-steps", 2, "--class-weights", "balanced", "--seed", 3]
    if script == "distill.py":
        flags += ["--teacher-checkpoint", teacher / "best.pth", "--limit-labels", 120]
    else:
        flags += ["--model", "resnet8"]
    succeed(script, *flags, "--output", tmp_path / "whole")
    stopped("epoch 1/3:", signal.SIGTERM, script, *flags, "--output", tmp_path / "run")
    succeed(script, "--resume", tmp_path / "run", "--workers", 0)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_samples_show_the_mixed_views(here, tmp_path, monkeypatch):
    """What is drawn is what the model is given: the views of the first batch."""
    import common.loader

    drawn = []
    monkeypatch.setattr(common.loader, "save_sample_grid", lambda path, rows: drawn.append(rows))
    flags = [*SMALL, "--model", "resnet8", "--epochs", 1, "--save-samples", "grid.png"]
    for more in ([], ["--mixup", 1]):
        code, _, errors = here("train_student.py", *flags, *more, "--output", f"run{len(more)}")
        assert code == 0, errors
    plain, mixed = (rows[0] for rows in drawn)
    assert len(plain) == len(mixed) == 32 and not torch.allclose(plain, mixed)
    from common.data import DATASETS, load_splits

    policy = replace(DATASETS["digits"].policy, mixup=1.0)
    augment = Augmenter(policy, 0)
    batch = next(Loader(load_splits("digits", limit_train=160).train, 32, "cpu", True).batches(1, plan=augment.plan))
    assert torch.equal(mixed, augment(batch, 8))


def test_a_dry_run_builds_and_shows_it(here):
    code, out, errors = here("train_student.py", *SMALL, "--model", "resnet8", "--mixup", 0.2, "--dry-run")
    assert code == 0 and "nothing is trained" in out, errors
