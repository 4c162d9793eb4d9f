"""What the tests share: the scripts as subprocesses, a small trained teacher, the real datasets where they are."""

import os
import runpy
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core: before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

# digits, two small and quick settings that all script tests use
SMALL = ["--dataset", "digits", "--resolution", "8", "--batch-size", "32", "--limit-train", "160", "--device", "cpu"]


def shared_archive(name):
    """The path of a real dataset's archive; the test skips, by its name, where it is absent."""
    archive = SHARED_DATA / name
    if not archive.exists():
        pytest.skip(f"{name} is not here")
    return archive


def unpack(name, folder):
    """Unpack a real dataset's archive into a folder; skips as `shared_archive` does."""
    with tarfile.open(shared_archive(name)) as tar:
        tar.extractall(
            folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )  # Python before 3.11.4 has none


def script_environment():
    environment = {k: v for k, v in os.environ.items() if k != "DATA_ROOT"}
    return {**environment, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run_script(name, *args, cwd=None, timeout=300, root=ROOT):
    """Run a script of the project as a user would; returns the finished process."""
    return subprocess.run(
        [sys.executable, str(Path(root) / name), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=script_environment(),
        stdin=subprocess.DEVNULL,
    )


def succeed(name, *args, **options):
    """The same, and it must exit 0."""
    done = run_script(name, *args, **options)
    assert done.returncode == 0, f"{name} {args} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Run folder of a small ResNet-18 that is well above chance."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    succeed("train_teacher.py", *SMALL, "--limit-train", 640, "--epochs", 3, "--output", folder)
    return folder


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory):
    """CIFAR-10 as an image folder: 20 train and 6 test images of each class; skips where the archive is absent."""
    archive = shared_archive("cifar10-jpg.tar.gz")
    folder, counts = tmp_path_factory.mktemp("cifar"), {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/")
            if not member.isfile():
                continue
            split, label = parts[-3], parts[-2]
            counts[split, label] = counts.get((split, label), 0) + 1
            if counts[split, label] <= (20 if split == "train" else 6):
                target = folder / split / label / parts[-1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    return folder


@pytest.fixture
def here(monkeypatch, capsys, tmp_path):
    """Run a whole script in this process, in an empty folder: (exit code, stdout, stderr)."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(here):
    """The script must exit 2 with one line on stderr that holds all of these words."""

    def check(name, *args, words=()):
        code, _, errors = here(name, *args)
        assert code == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1, (code, errors)
        for word in words:
            assert str(word) in errors, errors

    return check
