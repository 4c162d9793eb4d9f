"""A real Slurm for tests: `from slurm_lab import slurm  # noqa: F401` and take the fixture `slurm`.

It is started once for the whole session by slurmlab.sh (nodes and partitions are described there) and stopped at its
end;
where slurm-wlm is not installed the tests skip. What it offers:

    job = slurm.sbatch("slurm/distill.sbatch", "--method", "response", cwd=folder, env={"VENV": ...})   # the job id
    slurm.wait(job)                                  # until it has ended; -> a dict of `scontrol show job` for each
    array task
    slurm.wait(job, ["RUNNING"], seconds=20)         # or until it is in one of these states; AssertionError after
    `seconds`
    slurm.exit_code(job)                             # of the job; 128 + signal where one ended it; the largest of an
    array
    slurm.log(job)                                   # what the job has printed so far
    slurm.run("scancel", "--batch", "--signal=USR1", job)      # any command in the lab's environment ->
    CompletedProcess
    slurm.env, slurm.nodes                           # that environment; node names by those in slurmlab.sh:
    slurm.nodes["a1"]
"""

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "slurmlab.sh"
NODES = ["a1", "a2", "v1", "u1", "u2", "c1"]
ENDED = [
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
]
# what a user may have set for a cluster of his own must not reach the lab
FOREIGN = ("SLURM", "SBATCH_", "SINFO_", "SQUEUE_", "SRUN_", "SALLOC_", "SCONTROL_")


class Slurm:
    def __init__(self, folder, port, nodes):
        self.folder, self.nodes = Path(folder), dict(zip(NODES, nodes))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        self.env["PATH"] = with_sbin(self.env.get("PATH", ""))
        self.env["SLURM_CONF"] = str(self.folder / "etc" / "slurm.conf")
        lab = {
            "SLURMLAB_DIR": folder,
            "SLURMLAB_PORT": port,
            "SLURMLAB_NODES": " ".join(nodes),
            "SLURMLAB_OWNER": os.getpid(),
        }
        self.lab_env = {**self.env, **{k: str(v) for k, v in lab.items()}}

    def control(self, action):
        return subprocess.run(
            ["bash", str(SCRIPT), action], env=self.lab_env, capture_output=True, text=True, timeout=90
        )

    def run(self, *command, cwd=None, env=None, check=False, timeout=60):
        """Run a command in the lab's environment; `env` is added to it, a value of None takes a variable away."""
        environment = {k: str(v) for k, v in {**self.env, **(env or {})}.items() if v is not None}
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def sbatch(self, *args, cwd=None, env=None):
        """Submit; returns the job id as a string."""
        return self.run("sbatch", "--parsable", *args, cwd=cwd, env=env, check=True).stdout.strip()

    def jobs(self, job):
        """`scontrol show job` as a list of dicts: one, or one for each array task that has started."""
        done = self.run("scontrol", "-o", "show", "job", job)
        assert done.returncode == 0, done.stderr
        # a value reaches to the next " Name=" (it may have spaces, as in Command); the first of a name counts
        pairs = [
            re.findall(r"(?:^| )([A-Za-z/:]+)=(.*?)(?= [A-Za-z/:]+=|$)", line)
            for line in done.stdout.splitlines()
            if line
        ]
        return sorted(
            ({k: v.strip() for k, v in reversed(line)} for line in pairs),
            key=lambda j: j.get("ArrayTaskId", "").zfill(9),
        )

    def wait(self, job, states=ENDED, seconds=180):
        """Wait until the job (each task of an array) is in one of `states`; returns jobs(job)."""
        end, states = time.monotonic() + seconds, [states] if isinstance(states, str) else states
        while True:
            jobs = self.jobs(job)
            if jobs and all(j["JobState"] in states for j in jobs):
                return jobs
            if time.monotonic() > end:
                seen = [{name: j.get(name) for name in ("JobState", "Reason", "ExitCode", "NodeList")} for j in jobs]
                raise AssertionError(f"job {job} not {states} in {seconds} s: {seen}\n{self.log(job)}")
            time.sleep(0.1)

    def exit_code(self, job):
        codes = [[int(part) for part in j["ExitCode"].split(":")] for j in self.jobs(job)]
        return max(128 + signal if signal else code for code, signal in codes)

    def log(self, job):
        files = [Path(j[name]) for j in self.jobs(job) for name in ("StdOut", "StdErr") if name in j]
        return "\n".join(f.read_text(errors="replace") for f in dict.fromkeys(files) if f.is_file())

    def cancel_all(self):
        """End every job and wait until the nodes are free."""
        self.run("scancel", "--full", "-u", str(os.getuid()))
        end = time.monotonic() + 60
        while (queue := self.run("squeue", "-h").stdout).strip():
            assert time.monotonic() < end, f"jobs do not end: {queue}"
            time.sleep(0.1)


def with_sbin(path):
    return os.pathsep.join([*filter(None, path.split(os.pathsep)), "/usr/sbin", "/sbin"])


def resolves(name):
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return False


def node_names():
    """Names that reach this machine: the lab's own (root adds them to the hosts file), else loopback addresses."""
    missing = [name for name in NODES if not resolves(name)]
    if missing and os.getuid() == 0 and os.access("/etc/hosts", os.W_OK):
        with open("/etc/hosts", "a") as hosts:
            hosts.write(f"127.0.0.1 {' '.join(missing)}\n")
    if all(resolves(name) for name in NODES):
        return NODES
    return [f"127.0.0.{2 + k}" for k in range(len(NODES))]


def free_ports(count):
    """The first of `count` free ports in a row, below those that the system hands out."""
    for first in range(20000 + os.getpid() % 1000 * 10, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def slurm():
    if not all(
        shutil.which(name, path=with_sbin(os.environ.get("PATH", "")))
        for name in ("sbatch", "slurmctld", "slurmd", "munged")
    ):
        pytest.skip("slurm-wlm is not installed: apt-get install slurm-wlm munge")
    folder = tempfile.mkdtemp(prefix="slurmlab")
    lab = Slurm(folder, free_ports(len(NODES) + 1), node_names())
    try:
        started = lab.control("start")
        assert started.returncode == 0, f"slurmlab.sh start failed\n{started.stdout}\n{started.stderr}"
        yield lab
    finally:
        lab.control("stop")
        shutil.rmtree(folder, ignore_errors=True)
