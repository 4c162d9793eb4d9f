"""slurm/submit_best_gpu.sh on a real Slurm (slurm_lab.py): what it chooses is read from the jobs themselves."""

import shutil
import time
from pathlib import Path

import pytest
from slurm_lab import slurm  # noqa: F401

SUBMITTER = Path(__file__).resolve().parent.parent / "slurm" / "submit_best_gpu.sh"
# what a user of this machine may have set; site.sh is left out by running a copy in a folder of its own
SETTINGS = ("GPU_PREFERENCE", "GPU_CONSTRAINT", "VENV", "PYTHON", "MODULES", "DATA_ROOT", "STAGE_DATA")
JOB = "#!/bin/bash\n#SBATCH --gres=gpu:1 --time=00:05:00\nprintf '<%s>\\n' \"$@\"\n"


class Submitter:
    def __init__(self, lab, folder):
        self.lab, self.folder, self.drained = lab, folder, set()
        (folder / "slurm").mkdir()
        self.script = shutil.copy(SUBMITTER, folder / "slurm")
        (folder / "job.sbatch").write_text(JOB)

    def __call__(self, *args, env=None):
        return self.lab.run("bash", self.script, *args, cwd=self.folder, env={**dict.fromkeys(SETTINGS), **(env or {})})

    def job(self, *flags, file="job.sbatch", args=(), env=None):
        """Submit; returns (job as scontrol shows it, what the submitter said)."""
        done = self("--parsable", *flags, file, *args, env=env)
        assert done.returncode == 0, done.stderr
        return self.lab.jobs(done.stdout.strip())[0], done.stderr

    def refused(self, *args, env=None):
        """It must end with exit code 2 and one line of error, and submit nothing; returns that line."""
        before = self.known()
        done = self(*args, env=env)
        assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert self.known() == before
        return done.stderr

    def known(self):
        """The numbers of all jobs; squeue's order changes where one starts to run."""
        return set(self.lab.run("squeue", "-h", "-t", "all", "-o", "%i").stdout.split())

    def occupy(self, node, gpus, minutes=30):
        """GPUs of a node are taken by somebody's job, which ends in `minutes` at the latest."""
        job = self.lab.sbatch(
            f"--gres=gpu:{gpus}",
            "-w",
            self.lab.nodes[node],
            "-p",
            "gpu,untyped",
            f"--time={minutes}",
            "--output=/dev/null",
            "--wrap",
            "sleep 600",
        )
        self.lab.wait(job, "RUNNING", 20)
        return job

    def drain(self, *nodes):
        for node in nodes:
            self.lab.run(
                "scontrol", "update", f"nodename={self.lab.nodes[node]}", "state=drain", "reason=test", check=True
            )
            self.drained.add(node)

    def resume(self, *nodes):
        for node in nodes:
            self.lab.run("scontrol", "update", f"nodename={self.lab.nodes[node]}", "state=resume", check=True)
        end = time.monotonic() + 20
        while (
            "*" in self.lab.run("sinfo", "-h", "-N", "-o", "%T").stdout
        ):  # idle*: not before the node has answered a ping
            assert time.monotonic() < end
            time.sleep(0.1)
        self.drained -= set(nodes)


@pytest.fixture
def submit(slurm, tmp_path):  # noqa: F811
    submitter = Submitter(slurm, tmp_path)
    yield submitter
    slurm.cancel_all()
    submitter.resume(*submitter.drained)


def gres(job):
    return job["TresPerNode"].removeprefix("gres:")


def test_all_free(submit):
    job, said = submit.job()
    assert gres(job) == "gpu:a100:1" and job["Partition"] == "gpu"
    assert "a100 in partition gpu: 1 free now on" in said and said.count("\n") == 1
    submit.lab.wait(job["JobId"], "COMPLETED", 20)


def test_best_type_busy(submit):
    submit.occupy("a1", 2)
    assert gres(submit.job()[0]) == "gpu:a100:1"  # a2 has them still, and its job may be over by now
    submit.lab.cancel_all()
    submit.occupy("a1", 2), submit.occupy("a2", 2)
    job, said = submit.job()
    assert gres(job) == "gpu:v100:1" and "of a100 not" in said


def test_best_nodes_drained(submit):
    submit.drain("a1", "a2")
    job, _ = submit.job()
    assert gres(job) == "gpu:v100:1"
    submit.lab.wait(job["JobId"], "COMPLETED", 20)
    # draining: a job still runs there, so that the node is not idle
    submit.resume("a1")
    submit.occupy("a1", 1)
    submit.drain("a1")
    assert gres(submit.job()[0]) == "gpu:v100:1"


def test_every_node_drained(submit):
    submit.drain("a1", "a2", "v1")
    job, said = submit.job()
    assert gres(job) == "gpu:a100:1" and job["JobState"] == "PENDING" and "down or drained" in said


def test_nothing_free(submit):
    submit.occupy("a1", 2, 50), submit.occupy("v1", 4, 20)
    a2 = submit.occupy("a2", 2, 60)
    job, said = submit.job()
    assert gres(job) == "gpu:v100:1" and "nothing is free now; it starts first, at 20" in said
    submit.lab.run("scancel", job["JobId"])
    submit.lab.run("scontrol", "update", f"jobid={a2}", "timelimit=10", check=True)
    assert gres(submit.job()[0]) == "gpu:a100:1"


def test_several_gpus_must_be_on_one_node(submit):
    assert gres(submit.job("--gpus", 2)[0]) == "gpu:a100:2"
    submit.lab.cancel_all()
    submit.occupy("a1", 1), submit.occupy("a2", 1)
    assert gres(submit.job("--gpus", 2)[0]) == "gpu:v100:2"
    assert gres(submit.job("--gpus=1")[0]) == "gpu:a100:1"
    assert "5 GPUs are more than any node of partition gpu has: at most --gpus 4" in submit.refused(
        "--gpus", 5, "job.sbatch"
    )


def test_scattered_devices_are_counted(submit):
    """GPUs 0 and 2 in use are shown as (IDX:0,2): the comma is no separator."""
    jobs = [submit.occupy("v1", 1) for _ in range(3)]
    submit.lab.run("scancel", jobs[1])
    submit.lab.wait(jobs[1])
    assert "(IDX:0,2)" in submit.lab.run("sinfo", "-h", "-N", "-n", submit.lab.nodes["v1"], "-O", "GresUsed:64").stdout
    prefer = {"GPU_PREFERENCE": "v100"}
    _, said = submit.job("--gpus=2", env=prefer)
    assert "v100 in partition gpu: 2 free now" in said
    submit.drain("a1", "a2")
    assert "nothing is free" in submit("--dry-run", "--gpus=3", "job.sbatch", env=prefer).stderr


def test_a_task_for_each_gpu(submit):
    """One process drives one GPU: what the job itself sees; flags or a file that name the tasks win."""

    def tasks(*flags, lines="--gres=gpu:1"):
        (submit.folder / "own.sbatch").write_text(f'#!/bin/bash\n#SBATCH {lines}\necho "tasks: ${{SLURM_NTASKS:-1}}"\n')
        job, _ = submit.job(*flags, file="own.sbatch")
        submit.lab.wait(job["JobId"], "COMPLETED", 20)
        return submit.lab.log(job["JobId"])

    assert tasks() == "tasks: 1\n"
    assert tasks("--gpus=4") == "tasks: 4\n"
    assert tasks(lines="--gres=gpu:2") == "tasks: 2\n"
    for flags in (["--ntasks=1"], ["-n1"], ["--ntasks-per-node=1"]):
        assert tasks("--gpus=2", *flags) == "tasks: 1\n", flags
    for own in ("--ntasks=1", "-n 1", "--ntasks-per-node 1"):
        assert tasks(lines=f"--gres=gpu:2 {own}") == "tasks: 1\n", own


def test_preference(submit):
    assert gres(submit.job(env={"GPU_PREFERENCE": "V100 a100"})[0]) == "gpu:v100:1"
    submit.lab.cancel_all()
    assert (
        gres(submit.job(env={"GPU_PREFERENCE": "nothing v1"})[0]) == "gpu:a100:1"
    )  # v1 is not in v100: that is another number


def test_constraint(submit):
    job, _ = submit.job(env={"GPU_CONSTRAINT": "gpu40g|gpu32g"})
    assert (gres(job), job["Features"]) == ("gpu:a100:1", "(gpu40g|gpu32g)")
    # an A100 is free on the other node only, and that does not help
    submit.occupy("a2", 2)
    job, _ = submit.job(env={"GPU_CONSTRAINT": "gpu40g|gpu32g"})
    assert gres(job) == "gpu:v100:1"


def test_by_feature(submit):
    job, said = submit.job("--partition", "untyped", args=["x"])
    assert (gres(job), job["Features"], job["Partition"]) == ("gpu:1", "l40s", "untyped") and "l40s" in said
    submit.lab.wait(job["JobId"], "COMPLETED", 20)
    submit.occupy("u1", 2)
    assert submit.job("--partition=untyped")[0]["Features"] == "rtx6000"
    job, _ = submit.job(
        "--partition=untyped", env={"GPU_PREFERENCE": "h100", "GPU_CONSTRAINT": "avx512"}
    )  # no word fits: any GPU
    assert (gres(job), job["Features"]) == ("gpu:1", "avx512")
    job, _ = submit.job("--partition=untyped", env={"GPU_PREFERENCE": "rtx", "GPU_CONSTRAINT": "avx512"})
    assert job["Features"] == "rtx6000&avx512"


# Forms that the lab's nodes do not have: nodes, Gres, GresUsed, state, features -> the request
FORMS = {
    "long names": (
        "n1 gpu:nvidia_a100-sxm4-80gb:4(S:0-1) gpu:nvidia_a100-sxm4-80gb:3(IDX:0,2-3) mixed x\n"
        "n2 gpu:Tesla_V100:4(S:0,1) gpu:Tesla_V100:0(IDX:N/A) idle x",
        "--gres=gpu:nvidia_a100-sxm4-80gb:1",
    ),
    "other gres": (
        "n1 shard:8,gpu:t4:2(S:0),gpu:a40:2(S:1),tmp:99 shard:0,gpu:t4:1(IDX:0),gpu:a40:2(IDX:0-1) mixed x",
        "--gres=gpu:t4:1",
    ),
    "a number inside another": (
        "n1 gpu:rtx_a4000:4 gpu:rtx_a4000:0(IDX:N/A) idle x\nn2 gpu:tesla_v100:1 gpu:tesla_v100:0(IDX:N/A) idle x",
        "--gres=gpu:tesla_v100:1",
    ),
    "slices of a card": (
        "n1 gpu:a100_1g.5gb:7 gpu:a100_1g.5gb:0(IDX:N/A) idle x\nn2 gpu:t4:1 gpu:t4:0(IDX:N/A) idle x",
        "--gres=gpu:t4:1",
    ),
    "no type in use": (
        "n1 gpu:4(S:0-1) gpu:(null):4(IDX:0-3) mixed a100\nn2 gpu:4(S:0-1) gpu:(null):3(IDX:0,2-3) mixed x,v100",
        "--gres=gpu:1 --constraint=v100",
    ),
    "several partitions": (
        "n1 gpu:t4:1 gpu:t4:0 idle x\nn1 gpu:t4:1 gpu:t4:0 idle x\nn2 gpu:k80:1 gpu:k80:0 idle x",
        "--gres=gpu:t4:1",
    ),
}


@pytest.fixture
def dry_run(submit):
    """Only sinfo's answer about the nodes is made up, all else is Slurm's; returns the sbatch command."""
    fake, real = submit.folder / "bin" / "sinfo", shutil.which("sinfo", path=submit.lab.env["PATH"])
    fake.parent.mkdir()

    def run(table):
        widths = (64, 256, 256, 32, 256)
        lines = [
            "".join(field.ljust(width) for field, width in zip(line.split(), widths)) for line in table.splitlines()
        ]
        fake.write_text(
            f'#!/bin/bash\nif [[ "$*" != *NodeList:64,Gres:256,GresUsed:256,StateLong:32* ]]; then exec {real} '
            '"$@"; fi\n' + "\n".join(["cat << END", *lines, "END\n"])
        )
        fake.chmod(0o755)
        done = submit("--dry-run", "job.sbatch", env={"PATH": f"{fake.parent}:{submit.lab.env['PATH']}"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_sinfo(dry_run, form):
    table, request = FORMS[form]
    assert dry_run(table) == f"sbatch --partition=gpu {request} job.sbatch\n"


def test_states(dry_run):
    """A node counts as free in three states only, whatever sbatch --test-only says about it."""
    nodes = "n1 gpu:a100:2 gpu:a100:0(IDX:N/A) {} x\nn2 gpu:v100:4 gpu:v100:3(IDX:0,2-3) mixed x"
    for state in ("idle", "mixed", "completing"):
        assert "a100" in dry_run(nodes.format(state))
    for state in "idle* idle~ mixed- allocated planned reserved maint draining drained down down*".split():
        assert "v100" in dry_run(nodes.format(state)), state


def test_arguments_reach_the_script(submit):
    args = ["--name", "two  words", "it's", '"quoted"', "$HOME *", "", "--gpus", "7", "--dry-run"]
    job, _ = submit.job("--output=log.txt", args=args)
    submit.lab.wait(job["JobId"], "COMPLETED", 20)
    assert (submit.folder / "log.txt").read_text() == "".join(f"<{arg}>\n" for arg in args)
    assert gres(job) == "gpu:a100:1"


def test_dry_run_submits_nothing(submit):
    before = submit.known()
    done = submit("--dry-run", "--account=me", "--time=1:00:00", "job.sbatch", "a b", "c")
    assert done.stdout == "sbatch --partition=gpu --account=me --gres=gpu:a100:1 --time=1:00:00 job.sbatch a\\ b c\n"
    assert done.returncode == 0 and submit.known() == before
    job = submit.lab.run("bash", "-c", done.stdout, cwd=submit.folder, check=True).stdout.split()[
        -1
    ]  # and the line can be pasted
    assert gres(submit.lab.jobs(job)[0]) == "gpu:a100:1"


def test_flags_for_sbatch(submit):
    first = submit.occupy("v1", 1)
    flags = ["--array=0-3%2", "--time=00:07:00", f"--dependency=afterok:{first}", "--job-name=two words"]
    job, _ = submit.job(*flags)
    assert (gres(job), job["ArrayTaskId"], job["TimeLimit"]) == ("gpu:a100:1", "0-3%2", "00:07:00")
    assert job["Dependency"].startswith(f"afterok:{first}") and job["JobName"] == "two words"
    assert "--gpus N" in submit.refused("--gres=gpu:v100:1", "job.sbatch")
    assert "--name=value" in submit.refused("--time", "5", "job.sbatch")


def test_requests_in_the_file(submit):
    def file(lines):
        (submit.folder / "own.sbatch").write_text(f"#!/bin/bash\n{lines}\nsleep 1\n")
        return submit("--dry-run", "own.sbatch").stdout

    assert (
        file("#SBATCH --gres=gpu:v100:2") == "sbatch --partition=gpu --gres=gpu:a100:2 --ntasks-per-node=2 own.sbatch\n"
    )
    assert (
        file("#SBATCH -p untyped --gpus 2")
        == "sbatch --partition=untyped --gres=gpu:2 --constraint=l40s --ntasks-per-node=2 own.sbatch\n"
    )
    assert (
        file('#SBATCH --constraint="gpu40g" --gres=gpu')
        == "sbatch --partition=gpu --gres=gpu:a100:1 --constraint=gpu40g own.sbatch\n"
    )
    assert (
        file("#SBATCH --gres=gpu:2 --time=00:05:00 --ntasks=1")
        == "sbatch --partition=gpu --gres=gpu:a100:2 own.sbatch\n"
    )


def test_no_gpu_wanted(submit):
    (submit.folder / "report.sbatch").write_text("#!/bin/bash\n##SBATCH --gres=gpu:1\n#SBATCH --mem=1G\ntrue\n")
    job, said = submit.job(file="report.sbatch")
    assert "TresPerNode" not in job and "asks for no GPU" in said
    job, _ = submit.job("--partition=cpu", file="report.sbatch")
    assert job["Partition"] == "cpu"
    assert gres(submit.job("--gpus=1", file="report.sbatch")[0]) == "gpu:a100:1"


def test_site_file(submit):
    (submit.folder / "slurm" / "site.sh").write_text(
        ': "${SBATCH_PARTITION:=untyped}" "${SBATCH_ACCOUNT:=lab}" "${GPU_PREFERENCE:=rtx}"\n'
        "export SBATCH_PARTITION SBATCH_ACCOUNT GPU_PREFERENCE\n"
    )
    job, _ = submit.job()
    assert (job["Partition"], job["Account"], job["Features"]) == ("untyped", "lab", "rtx6000")
    job, _ = submit.job(env={"SBATCH_PARTITION": "gpu"})  # the environment wins, a flag wins over both
    assert (job["Partition"], gres(job)) == ("gpu", "gpu:a100:1")
    assert submit.job("--partition=gpu", "--account=other")[0]["Account"] == "other"


def test_bad_partitions(submit):
    assert submit.refused("--partition=cpu", "job.sbatch") == (
        "error: partition cpu has no GPU of any kind: --partition with one of gpu untyped\n"
    )
    assert "unknown partition nope: choose one of: cpu gpu untyped" in submit.refused(
        "job.sbatch", env={"SBATCH_PARTITION": "nope"}
    )
    assert "unknown partition gp:" in submit.refused("--partition=gpu,gp", "job.sbatch")


def test_bad_settings(submit):
    missing = submit.folder / "nowhere"
    for name in ("VENV", "PYTHON", "DATA_ROOT", "STAGE_DATA"):
        line = submit.refused("job.sbatch", env={name: missing})
        assert name in line and str(missing) in line, line
    assert "bin/python" in submit.refused("job.sbatch", env={"VENV": submit.folder})
    assert str(missing) in submit.refused("job.sbatch", "--data-root", missing)
    assert str(missing) in submit.refused("job.sbatch", f"--data-root={missing}")
    assert submit("--dry-run", "job.sbatch", "--data-root", missing, "--download").returncode == 0
    good = {"PYTHON": "bash", "DATA_ROOT": submit.folder, "STAGE_DATA": submit.folder / "job.sbatch"}
    assert submit("--dry-run", "job.sbatch", "--data-root", ".", env=good).returncode == 0


def test_bad_calls(submit):
    assert "missing.sbatch is not a file" in submit.refused("missing.sbatch")
    assert "no FILE" in submit.refused("--dry-run")
    assert "--gpus has no value" in submit.refused("--gpus")
    assert "--gpus two" in submit.refused("--gpus", "two", "job.sbatch")


def test_without_slurm(submit):
    programs = submit.folder / "programs"
    programs.mkdir()
    for name in ("bash", "dirname", "sed", "grep", "awk", "sort", "date"):
        (programs / name).symlink_to(shutil.which(name))
    line = submit.refused("job.sbatch", "x", env={"PATH": programs})
    assert line == "error: sbatch is not here: 'bash job.sbatch ARGS' runs the stage on this machine\n"


def test_no_controller(submit):
    """Slurm is installed but does not answer: sinfo's own words and one line."""
    config = submit.folder / "slurm.conf"
    text = Path(submit.lab.env["SLURM_CONF"]).read_text()
    config.write_text(
        "\n".join(
            "SlurmctldPort=1\nMessageTimeout=1" if "SlurmctldPort" in line else line for line in text.splitlines()
        )
    )
    done = submit("job.sbatch", env={"SLURM_CONF": config})
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: sinfo does not answer"), done.stderr
