"""What the tests share: the scripts, in this process or their own, a small trained teacher, real datasets."""

import contextlib
import gc
import io
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tarfile
import traceback
import warnings
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ.pop("DATA_ROOT", None)
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
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def launch(name, *args, cwd=None, timeout=300, root=ROOT):
    """Run a script of the project as a user would, as a process of its own; returns the finished process."""
    return subprocess.run(
        [sys.executable, str(Path(root) / name), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=script_environment(),
        stdin=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def restored():
    """What a process takes with it when it ends is put back at the end of this block."""
    import numpy as np
    import torch

    folder, argv, variables, threads = os.getcwd(), sys.argv, dict(os.environ), torch.get_num_threads()
    modules, main = list(sys.path), sys.modules["__main__"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.chdir(folder)
        sys.argv, sys.path[:], sys.modules["__main__"] = argv, modules, main
        if os.environ != variables:
            os.environ.clear()
            os.environ.update(variables)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        random.setstate(numbers[0]), np.random.set_state(numbers[1]), torch.set_rng_state(numbers[2])
        if multiprocessing.active_children():
            gc.collect()  # a loader that nobody holds any more ends its workers


def run_script(name, *args, cwd=None):
    """The same in this process, which has imported torch already: it takes 0.01 s where a process takes 5."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with restored():
        os.chdir(cwd or ".")
        sys.argv = [name, *map(str, args)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / name), run_name="__main__")
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except Exception:  # a fault of ours: what Python does with it
                traceback.print_exc()
                code = 1
    return subprocess.CompletedProcess(
        [name, *args], code, *(stream.buffer.getvalue().decode() for stream in (out, err))
    )


def succeed(name, *args, run=run_script, **options):
    """The same, and it must exit 0."""
    done = run(name, *args, **options)
    assert done.returncode == 0, f"{name} {args} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(autouse=True, scope="session")
def this_machine_alone():
    """No test asks a network."""

    def local(call, host_of):
        def checked(*args, **options):
            host = host_of(*args)
            if host and not str(host).startswith(("127.", "::1", "localhost")):
                pytest.fail(f"a test asks for {host}")  # no Exception: what loads from a hub catches those
            return call(*args, **options)

        return checked

    def address(_, where):
        return where[0] if isinstance(where, tuple) else None  # else a file on this machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local(socket.socket.connect, address))
        patch.setattr(socket, "getaddrinfo", local(socket.getaddrinfo, lambda host, *_: host))
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Run folder of a ResNet-8 that is well above chance."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    succeed("train_teacher.py", *SMALL, "--model", "resnet8", "--limit-train", 640, "--epochs", 2, "--output", folder)
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
def here(monkeypatch, tmp_path):
    """Run a script in this process, in an empty folder where the test then stays: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(name, *args):
        done = run_script(name, *args)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def refused(here):
    """The script must exit 2 with one line on stderr that holds all of these words."""

    def check(name, *args, words=()):
        code, _, errors = here(name, *args)
        assert code == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1, (code, errors)
        for word in words:
            assert str(word) in errors, errors

    return check
