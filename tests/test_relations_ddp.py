"""Losses that compare the images of a batch: two processes learn what one learns from the whole batch."""

import os
import sys

import pytest
import torch
from conftest import ROOT, restored
from test_distributed import ends, start
from torch import nn

from common.losses import TERMS, DistillationLoss


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(rows):
    """Of rows (B, D): an embedding, whose first five columns are logits too."""
    return {"embedding": rows, "logits": rows[:, :5]}


class Small(nn.Module):
    """A model and its loss, as distill.py puts them under DDP."""

    def __init__(self, criterion):
        super().__init__()
        self.model, self.criterion = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)), criterion

    def forward(self, images, teacher):
        return self.criterion(outputs(self.model(images)), outputs(teacher), None)


def learn(terms, half=False):
    """Loss and gradients of a batch of eight, of which each process there is holds a part; the loss in eval mode."""
    from common import distributed
    from common.run import rank, world_size
    from common.training import select_device

    device = select_device("cpu")
    part = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
    gather = distributed.gather_rows if world_size() > 1 else lambda rows: rows
    images, teacher = rand(8, 7), rand(8, 9, seed=1)
    torch.manual_seed(0)
    criterion = DistillationLoss({"projection": 0.5, **dict.fromkeys(terms, 1.0)}, gather=gather)
    small = Small(criterion)
    criterion.build(outputs(small.model(images.float())), outputs(teacher.float()))
    parallel = small if half else small.double()
    if world_size() > 1:
        parallel = distributed.data_parallel(parallel, device)
    images, teacher = (x[part].float() if half else x[part] for x in (images, teacher))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        loss = parallel(images, teacher)
    loss.backward()
    gradients = {name: p.grad for name, p in small.named_parameters()}
    small.eval()
    with torch.no_grad():
        alone = small(images, teacher)
    return {"loss": loss.detach(), "alone": alone, "gradients": gradients}


def shared_gradient():
    """Two gathered tensors in one sum: autograd gives both the same gradient, which must be left as it is."""
    from common import distributed
    from common.run import world_size

    gather = distributed.gather_rows if world_size() > 1 else lambda rows: rows
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    both = gather(a) + gather(b)
    (both * torch.ones_like(both)).sum().backward()  # a product: its gradient is a tensor of its own size in memory
    return {"a": a.grad, "b": b.grad, "size": world_size()}


RELATIONS = tuple(term for term, row in TERMS.items() if row.compares_images)
RUNS = [*((name,) for name in RELATIONS), RELATIONS]


def computed():
    return {"runs": [learn(terms) for terms in RUNS], "half": learn(RELATIONS, half=True), "shared": shared_gradient()}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """{number of processes: [what each computed]}."""
    folder = tmp_path_factory.mktemp("processes")
    codes, _, errors = ends(start(2, "tests/test_relations_ddp.py", folder / "rank"))
    assert codes == [0, 0], errors
    with restored():
        one = computed()
    return {1: [one], 2: [torch.load(folder / f"rank.{rank}", weights_only=True) for rank in range(2)]}


@pytest.mark.parametrize("run", range(len(RUNS)), ids=["-".join(terms) for terms in RUNS])
def test_two_processes_learn_from_the_whole_batch(processes, run):
    one, ranks = processes[1][0]["runs"][run], [r["runs"][run] for r in processes[2]]
    for r in ranks:
        for name, gradient in one["gradients"].items():
            assert gradient.abs().max() > 1e-6, name
            assert (r["gradients"][name] - gradient).abs().max() < 1e-13 * max(1, gradient.abs().max()), name
    assert sum(r["loss"] for r in ranks).item() / 2 == pytest.approx(one["loss"].item(), rel=1e-13)
    assert one["alone"].item() == pytest.approx(one["loss"].item(), rel=1e-13)
    assert all(abs(r["alone"] - one["loss"]) > 1e-4 for r in ranks)  # of its own half


def test_two_processes_in_bfloat16(processes):
    """Rows in half precision can be sent, and the gradient is that of one process but for rounding."""
    one, ranks = processes[1][0]["half"], [r["half"] for r in processes[2]]
    for r in ranks:
        for name, gradient in one["gradients"].items():
            assert (r["gradients"][name] - gradient).norm() < 0.02 * gradient.norm(), name


def test_a_shared_gradient_is_not_changed(processes):
    for r in processes[2]:
        assert r["shared"]["size"] == 2
        assert torch.equal(r["shared"]["a"], torch.full((2, 3), 2.0)) and torch.equal(
            r["shared"]["b"], torch.full((2, 3), 2.0)
        )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.save(computed(), f"{sys.argv[1]}.{os.environ.get('RANK', 0)}")
