"""k-NN and the linear probe: equal to scikit-learn's, blind to the test labels, and as evaluate.py shows them."""

import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, succeed

from common.augment import hash_id
from common.data import chosen_rows, load_splits, stratified_rows
from common.embeddings import Store, Writer
from common.probes import ProbeError, fit, knn, linear_probe, predict


@pytest.fixture(scope="module")
def digits():
    """Real features: pixels of the digits, train (808, 64) and test (719, 64), with labels."""
    splits = load_splits("digits")
    return [
        torch.from_numpy(value)
        for part in (splits.train, splits.test)
        for value in (part.images.reshape(len(part), -1).astype(np.float32), part.labels)
    ]


def held_out_of(train, seed=0):
    rows = torch.zeros(len(train), dtype=torch.bool)
    rows[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(train) // 5]] = True
    return rows


# ------------------------------------------------------------------------------------------------ k nearest neighbours


def test_knn_equals_scikit_learn_s_with_uniform_weights(digits):
    """On unit vectors the Euclidean neighbours are the cosine's; equal votes go to the first class in both."""
    from sklearn.neighbors import KNeighborsClassifier

    train, labels, test, _ = digits
    found = knn(train, labels, test, 10, weights="uniform")
    assert list(found) == [10, 20, 100, 200]
    unit = [torch.nn.functional.normalize(x.double(), dim=1).numpy() for x in (train, test)]
    for k, scores in found.items():
        reference = KNeighborsClassifier(k, algorithm="brute").fit(unit[0], labels.numpy())
        assert np.array_equal(scores.numpy().argmax(1), reference.predict(unit[1])), k
        assert np.allclose(scores.numpy(), reference.predict_proba(unit[1]), atol=1e-6), k


def test_knn_equals_the_formula(digits):
    """Votes exp(similarity / 0.07), summed by class; a wrong temperature or plain distances would differ."""
    train, labels, test, test_labels = digits
    test = test[:40]
    scores = knn(train, labels, test, 10, k=(10, 20))
    for i, query in enumerate(test.double().numpy()):
        similar = np.array([x @ query / np.linalg.norm(x) / np.linalg.norm(query) for x in train.double().numpy()])
        order = np.argsort(-similar)
        for k, found in scores.items():
            votes = np.zeros(10)
            np.add.at(votes, labels.numpy()[order[:k]], np.exp(similar[order[:k]] / 0.07))
            assert np.allclose(found[i].numpy(), votes / votes.sum(), atol=1e-5), (i, k)
    # lengths do not matter, and the weights do: near neighbours outvote many far ones
    scaled = knn(train * torch.rand(len(train), 1).add(0.1), labels, test * 7, 10, k=(10, 20))
    assert all(torch.allclose(scaled[k], scores[k], atol=1e-4) for k in scores)
    x = torch.nn.functional.normalize(torch.tensor([[1, 0.0], [1, 0.9], [1, 1]]), dim=1)
    assert knn(x, torch.tensor([0, 1, 1]), x[:1], 2, k=[3])[3].argmax() == 0
    assert knn(x, torch.tensor([0, 1, 1]), x[:1], 2, k=[3], weights="uniform")[3].argmax() == 1


@pytest.mark.parametrize("chunk", [1, 7, 100, 5000])
def test_knn_in_chunks(digits, chunk):
    """Train (808) is cut too: 8 times the chunk of similarities are held for each query."""
    train, labels, test, _ = digits
    whole, parts = (knn(train, labels, test[:60], 10, chunk=c) for c in (10**6, chunk))
    assert all(torch.allclose(whole[k], parts[k], atol=1e-5) and len(parts[k]) == 60 for k in whole)


def test_knn_holds_no_more_than_a_chunk(monkeypatch):
    """The largest product of queries and train images is (chunk, 8 * chunk)."""
    largest, multiply = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: largest.append((len(a), b.shape[1])) or multiply(a, b))
    knn(torch.rand(500, 3), torch.zeros(500, dtype=torch.int64), torch.rand(90, 3), 2, chunk=20)
    assert (
        max(a for a, _ in largest) == 20
        and max(b for _, b in largest) == 160
        and sum(a * b for a, b in largest) == 500 * 90
    )


def test_knn_cuts_k_and_keeps_classes_that_train_lacks(digits):
    train, labels, test, _ = digits
    found = knn(train[:50], labels[:50], test, 10)
    assert list(found) == [10, 20, 50]
    few = torch.flatten(torch.nonzero(labels < 7))
    for scores in knn(train[few], labels[few], test, 12).values():
        assert (
            scores.shape == (719, 12)
            and (scores[:, 7:] == 0).all()
            and torch.allclose(scores.sum(1), torch.ones(719), atol=1e-5)
        )


# -------------------------------------------------------------------------------------------------------- linear probe


def test_probe_is_no_worse_than_scikit_learn_s(digits):
    """On pixels of digits, within one point (7 of 719 images)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, labels, test, test_labels = digits
    scaler = StandardScaler().fit(train.numpy())
    reference = LogisticRegression(max_iter=2000).fit(scaler.transform(train.numpy()), labels.numpy())
    logits, chosen = linear_probe(train, labels, held_out_of(train), test, 10)
    accuracy = float((logits.argmax(1) == test_labels).float().mean())
    assert accuracy >= reference.score(scaler.transform(test.numpy()), test_labels.numpy()) - 0.01
    assert chosen["held_out"] == 161 and 0 < chosen["held_out_loss"] < 0.5


def test_one_head_is_the_penalized_regression(digits):
    """weight_decay is that of the loss + weight_decay / 2 |W|^2: scikit-learn's optimum at C = 1 / (N weight_decay)."""
    from sklearn.linear_model import LogisticRegression

    train, labels, _, _ = digits
    few = torch.flatten(torch.nonzero(labels < 3))
    x, y = train[few], labels[few]
    heads = fit(x, y, 3, [(0.03, 0.05), (0.03, 0.5)], 800, 1024, 0)
    scaled = ((x - heads[0]) / heads[1]).numpy()
    for decay, logits in zip((0.05, 0.5), predict(heads, x)):
        reference = LogisticRegression(C=1 / (len(x) * decay), max_iter=5000, tol=1e-8).fit(scaled, y.numpy())
        assert np.allclose(logits.softmax(1).numpy(), reference.predict_proba(scaled), atol=5e-3), decay


def test_the_grid_is_what_each_point_alone_would_be(digits):
    """All heads at once, in batches: no head's rate or decay leaks into another."""
    train, labels, test, _ = digits
    points = [(0.01, 0.0), (0.1, 0.01)]
    both = list(predict(fit(train, labels, 10, points, 30, 200, 3), test))
    for point, logits in zip(points, both):
        assert torch.allclose(next(predict(fit(train, labels, 10, [point], 30, 200, 3), test)), logits, atol=1e-3)
    assert (both[0] - both[1]).abs().mean() > 0.1


def test_probe_is_deterministic_and_test_chooses_nothing(digits):
    train, labels, test, _ = digits
    rows = held_out_of(train)
    logits, chosen = linear_probe(train, labels, rows, test, 10, steps=60, batch_size=128)
    again, same = linear_probe(train, labels, rows, test, 10, steps=60, batch_size=128)
    assert torch.equal(logits, again) and chosen == same
    other, same = linear_probe(train, labels, rows, test.flip(0)[:100], 10, steps=60, batch_size=128)
    assert chosen == same and torch.allclose(other, logits.flip(0)[:100], atol=1e-4)  # no statistic of test either
    assert not torch.equal(linear_probe(train, labels, rows, test, 10, steps=60, batch_size=128, seed=1)[0], logits)


def test_probe_chooses_on_the_held_out_part_and_trains_on_all():
    """Held-out labels at random: the strongest penalty is right there, though the rest fits best with none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    y = (x[:, 0] > 0).long()
    rows = torch.arange(400) < 200
    noise = torch.where(rows, torch.randint(2, (400,), generator=generator), y)
    options = {"lrs": (0.05,), "weight_decays": (0.0, 10.0), "steps": 100}
    assert linear_probe(x, y, rows, x, 2, **options)[1]["weight_decay"] == 0
    assert linear_probe(x, noise, rows, x, 2, **options)[1]["weight_decay"] == 10
    # they are not trained on: labels that wide features could learn by heart are no better without a penalty
    wide, guess = torch.randn(80, 200, generator=generator), torch.randint(2, (80,), generator=generator)
    assert linear_probe(wide, guess, rows[160:240], wide, 2, **options)[1]["weight_decay"] == 10
    # a class that only the held-out images have is known to the head that is reported
    third = torch.where(rows & (x[:, 1] > 0.5), 2, y)
    logits, _ = linear_probe(x, third, rows, x, 3, **{**options, "weight_decays": (0.0,)})
    assert (logits.argmax(1) == 2).any()


def test_dead_and_constant_features():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 5 + 1e-6 * torch.randn(60)  # constant but for rounding
    y = (x[:, 0] > 0).long()
    new = x.clone()
    new[:, 2] = torch.randn(60)  # varies in test alone
    logits, _ = linear_probe(x, y, torch.arange(60) < 12, new, 3, steps=200)
    assert torch.isfinite(logits).all() and torch.equal(
        logits, linear_probe(x, y, torch.arange(60) < 12, x, 3, steps=200)[0]
    )
    assert (logits.argmax(1) == y).float().mean() > 0.9 and logits.shape == (60, 3)


def test_bad_features_and_labels():
    x, y = torch.rand(20, 3), torch.arange(20) % 2
    rows = torch.arange(20) < 4
    cases = [
        (x, y - 1, x, "without a label"),
        (x, y + 1, x, "label 2"),
        (x[:0], y[:0], x, "no images"),
        (x, y, x[:, :2], "features"),
        (x / 0, y, x, "NaN"),
        (x, y[:9], x, "9 labels"),
    ]
    for train, labels, features, words in cases:
        with pytest.raises(ProbeError, match=words):
            knn(train, labels, features, 2)
        with pytest.raises(ProbeError, match=words):
            linear_probe(train, labels, rows[: len(train)], features, 2)
    for none in (rows & False, rows | True):
        with pytest.raises(ProbeError, match="held out"):
            linear_probe(x, y, none, x, 2)


class Data:
    def __init__(self, ids, labels, groups=None):
        self.ids, self.labels, self.groups = ids, np.asarray(labels), groups

    def __len__(self):
        return len(self.ids)


def test_held_out_part_is_stratified_and_keeps_groups_whole():
    labels, ids = np.arange(200) % 4 == 0, [f"i{i}" for i in range(200)]
    rows = chosen_rows(Data(ids, labels.astype(int)), 40, 0, 1007)
    assert len(rows) == 40 and labels[rows].sum() == 10
    assert np.array_equal(rows, stratified_rows(labels.astype(int), np.array([hash_id(i) for i in ids]), 40, 0, 1007))
    assert not np.array_equal(rows, chosen_rows(Data(ids, labels.astype(int)), 40, 1, 1007))
    groups = np.array([f"lesion {i // 5}" for i in range(200)])
    rows = chosen_rows(Data(ids, labels.astype(int), groups), 40, 0, 1007)
    assert 30 <= len(rows) <= 50 and not set(groups[rows]) & set(np.delete(groups, rows))


def test_a_store_keeps_groups(tmp_path):
    meta = {"seed": 0, "policy": {}, "num_views": 1}
    for overwrite, groups in ((False, np.array(["a", "a", "b"])), (True, None)):
        writer = Writer(
            tmp_path / "e", meta, list("xyz"), [0, 1, 0], {"embeddings": (1, 2)}, overwrite=overwrite, groups=groups
        )
        writer.write([0, 1, 2], {"embeddings": np.ones((3, 1, 2))})
        writer.finish()
        store = Store(tmp_path / "e")
        assert store.groups is None if groups is None else list(store.groups) == ["a", "a", "b"]


# ------------------------------------------------------------------------------------------------------------ evaluate


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("probed") / "e"
    succeed(
        "extract_embeddings.py",
        "--checkpoint",
        teacher / "best.pth",
        "--save-logits",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--num-views",
        2,
        "--splits",
        "train",
        "test",
        "--output",
        folder,
    )
    return folder


def read(path):
    return json.loads((path / "evaluation.json").read_text())


def test_evaluate_a_checkpoint_and_its_store(tmp_path, teacher, embeddings):
    """The same features live and stored: the same table; k-NN equals scikit-learn's on the stored ones; kept is 100
    %."""
    probing = ["--knn", "--linear-probe", "--device", "cpu"]
    succeed("evaluate.py", teacher / "best.pth", *probing, "--batch-size", 32, "--output", tmp_path / "live")
    done = succeed(
        "evaluate.py", embeddings, *probing, "--teacher-embeddings", embeddings, "--output", tmp_path / "stored"
    )
    live, both = read(tmp_path / "live"), read(tmp_path / "stored")
    assert (
        live["teacher"] is None
        and live["dataset"] == both["dataset"]
        and live["dataset"]["sizes"] == {"train": 808, "test": 719}
    )
    for role in ("student", "teacher"):
        assert list(both[role]["knn"]) == ["10", "20", "100", "200"]
        for k, found in both[role]["knn"].items():
            assert (
                found["accuracy"] == pytest.approx(live["student"]["knn"][k]["accuracy"], abs=0.002)
                and found["accuracy"] > 0.8
            )
        assert both[role]["linear_probe"]["accuracy"] == pytest.approx(
            live["student"]["linear_probe"]["accuracy"], abs=0.005
        )
        assert both[role]["linear_probe"]["held_out"] == live["student"]["linear_probe"]["held_out"] == 162
        assert (
            both[role]["accuracy"] == pytest.approx(live["student"]["accuracy"], abs=0.002)
            and both[role]["parameters"] == 4_903_242
        )
    kept = both["student"]["kept"]
    assert list(kept) == ["accuracy", "balanced_accuracy", "knn_10", "knn_20", "knn_100", "knn_200", "linear_probe"]
    assert set(kept.values()) == {1.0} and both["student"]["agreement"] == 1
    lines = {line[:30].strip(): line.split() for line in done.stdout.splitlines()}
    assert lines["knn_20"][1:3] == [f"{both['student']['knn']['20']['accuracy']:.4f}"] * 2
    assert lines["linear_probe"][1] == f"{both['student']['linear_probe']['accuracy']:.4f}"
    assert lines["kept knn_20"][2:] == ["100.0", "%"] and lines["of 100 M parameters"][4:6] == ["4.9", "%"]
    assert not done.stderr and "note:" not in done.stdout


def rewrite(folder, name, change):
    np.save(folder / name, change(np.load(folder / name, allow_pickle=False)))


def keep_rows(folder, rows):
    """Cut a store to these rows, as if the split held no others."""
    meta = json.loads((folder / "meta.json").read_text())
    for name in ("ids", "labels", *meta["shapes"]):
        rewrite(folder, f"{name}.npy", lambda values: values[rows])
    (folder / "meta.json").write_text(json.dumps({**meta, "count": len(rows)}))


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Run the whole script in this process, which has imported torch: (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args), "--device", "cpu"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


def test_small_train_without_a_class(tmp_path, embeddings, evaluate):
    """k is cut and a class is lacking: one note each, for student and teacher together, and the class counts as
    wrong."""
    shutil.copytree(embeddings, tmp_path / "e")
    labels = np.load(tmp_path / "e/train_embeddings/labels.npy")
    keep_rows(tmp_path / "e/train_embeddings", np.flatnonzero(labels != 9)[:60])
    code, out, _ = evaluate(
        tmp_path / "e", "--knn", "--linear-probe", "--teacher-embeddings", tmp_path / "e", "--output", tmp_path / "o"
    )
    notes = [line for line in out.splitlines() if line.startswith("note:")]
    assert code == 0 and len(notes) == 2 and "100, 200" in notes[0] and "60" in notes[0] and "no image of 9" in notes[1]
    found = read(tmp_path / "o")["student"]
    assert list(found["knn"]) == ["10", "20", "60"] and 0.3 < found["knn"]["10"]["accuracy"] < 0.92


def test_bad_input(tmp_path, teacher, embeddings, evaluate, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(*args, words):
        code, _, errors = evaluate(*args)
        assert code == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1, (code, errors)
        assert all(str(word) in errors for word in words), errors

    for split in ("train", "test"):
        shutil.copytree(embeddings, split)
        rewrite(tmp_path / split / f"{split}_embeddings", "labels.npy", lambda labels: np.full_like(labels, -1))
        refused(split, "--knn", words=["labels (-1)", split])
    refused(teacher / "best.pth", "--knn", "--split", "train", words=["--split train", "--knn"])
    refused(teacher, "--knn", words=["train_embeddings", "best.pth"])
    refused(embeddings, "--knn", "--dataset", "digits", words=["--dataset", "stored"])
    refused(embeddings, "--knn", "--teacher-checkpoint", teacher / "best.pth", words=["--teacher-checkpoint", "stored"])
    shutil.copytree(embeddings, "other")
    meta = json.loads((tmp_path / "other/test_embeddings/meta.json").read_text())
    meta["teacher"].update(sha256="0", weights="hub")
    (tmp_path / "other/test_embeddings/meta.json").write_text(json.dumps(meta))
    refused("other", "--knn", words=["different models", "sha256"])
    refused("other", words=["logits", "--knn"])  # of a head that was never trained
    assert not (tmp_path / "runs").exists()
