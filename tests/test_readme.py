"""README.md: its size, its links, and the block that a reader copies into a loop of their own."""

import ast
import re
import shutil
from urllib.parse import unquote

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

PAGES = ("README.md", "slurm/README.md", "tests/benchmarks/README.md")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def test_readme_is_short_and_begins_with_commands():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 260 and max(map(len, lines)) <= 120
    assert lines.index("python train_teacher.py") < 25 and lines.index("<!-- tests -->") < 25


def anchors(page):
    """GitHub's anchors of a page's headings: lower case, spaces become hyphens, punctuation goes."""
    without_code = re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", without_code, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = text_of(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)
    for target in targets:
        path, _, anchor = unquote(target).partition("#")
        if path.startswith("https:"):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(ROOT.resolve()).as_posix()), target
    named = set(re.findall(r"\]\[([^\]]+)\]", text))
    assert named <= set(re.findall(r"^\[([^\]]+)\]: ", text, re.M))


def test_own_loop_runs_with_losses_alone(tmp_path, monkeypatch):
    code = text_of("README.md").split("<!-- own loop -->")[1].split("```python\n")[1].split("```")[0]
    source = (ROOT / "common" / "losses.py").read_text(encoding="utf-8")
    for part in (code, source):
        imports = [node for node in ast.walk(ast.parse(part)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
        assert not {name for name in names if name.split(".")[0] == "common"}
    shutil.copy(ROOT / "common" / "losses.py", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "losses", raising=False)
    torch.manual_seed(0)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    student, teacher = names["student_logits"] / 4, names["teacher_logits"] / 4
    kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean") * 16
    expected = 0.5 * F.cross_entropy(names["student_logits"], names["labels"]) + 0.5 * kl
    assert names["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert not torch.equal(names["student"](names["images"]), names["student_logits"])  # it has learned
