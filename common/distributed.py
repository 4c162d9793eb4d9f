"""More than one process: torchrun or srun start them, DDP averages their gradients, rank 0 writes.

    torchrun --nproc-per-node 4 train_teacher.py ...
    srun --ntasks 8 python train_teacher.py ...

Needs torch alone.  In a single process every function here does nothing or returns what it was given.
"""

import contextlib
import datetime
import os
import re
import socket
import subprocess
import threading
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = datetime.timedelta(minutes=30)  # for processes that wait for a download or a checkpoint of rank 0
MEETING = datetime.timedelta(seconds=60)  # until all have started
_cpu_group, _alone = None, False


class Processes(NamedTuple):
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this node
    local_size: int = 1


def environment():
    """Which of how many processes this is, from torchrun's variables or a step's of srun."""
    get = os.environ.get
    if get("RANK") and get("WORLD_SIZE"):
        size = int(get("WORLD_SIZE"))
        return Processes(int(get("RANK")), size, int(get("LOCAL_RANK") or 0), int(get("LOCAL_WORLD_SIZE") or size))
    if get("SLURM_STEP_ID") and get("SLURM_PROCID"):  # the batch script itself has no step's id
        size = int(get("SLURM_STEP_NUM_TASKS") or 1)
        counts = []  # "2(x3),1" -> [2, 2, 2, 1] tasks on each node
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", get("SLURM_STEP_TASKS_PER_NODE", "1")):
            counts += [int(count)] * int(times or 1)
        node = int(get("SLURM_NODEID") or 0)
        return Processes(
            int(get("SLURM_PROCID")), size, int(get("SLURM_LOCALID") or 0), counts[node] if node < len(counts) else 1
        )
    return Processes()


def start(device):
    """Join the other processes, if there are any: nccl between GPUs, gloo between CPUs.  Raises RuntimeError,
    ValueError.

    Says whom it waits for after some seconds and gives up after a minute: a shell of `srun --pty`, or one where RANK
    and
    WORLD_SIZE were left, promises processes that nobody starts.
    """
    global _cpu_group, _alone
    here = environment()
    if here.size == 1 or dist.is_initialized():
        return
    if not os.environ.get("MASTER_ADDR"):  # torchrun sets it
        names = []
        with contextlib.suppress(OSError):
            hosts = ["scontrol", "show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")]
            names = subprocess.run(hosts, capture_output=True, text=True).stdout.split()
        os.environ["MASTER_ADDR"] = names[0] if names else "127.0.0.1"
    if not os.environ.get("MASTER_PORT"):
        job, step = (int(os.environ.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ["MASTER_PORT"] = str(20000 + (job * 7 + step) % 20000)
    backend = "nccl" if device.type == "cuda" else "gloo"
    own = device if device.type == "cuda" else None
    whence = "WORLD_SIZE" if os.environ.get("RANK") else "SLURM_STEP_NUM_TASKS"
    waiting = (
        f"process {here.rank} waits for the others of {here.size} ({whence}={here.size}) at "
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    )
    advice = "start them with torchrun or srun; for one process alone: env -u RANK -u SLURM_STEP_ID python ..."
    timer = threading.Timer(5, print, [f"{waiting}: {advice}"], {"flush": True})
    timer.daemon, _alone = True, True
    timer.start()
    try:
        if here.rank:
            _await_first()
        store, *_ = next(dist.rendezvous("env://", here.rank, here.size, timeout=MEETING))
        store.set_timeout(MEETING)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default_pg", store),
            rank=here.rank,
            world_size=here.size,
            timeout=TIMEOUT,
            device_id=own,
        )
        _cpu_group = dist.new_group(
            backend="gloo", timeout=TIMEOUT
        )  # for objects and signals, which must not wait for a GPU
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"{waiting}, in vain ({str(error).splitlines()[0][:100]}): {advice}") from None
    finally:
        timer.cancel()
    _alone = False


def _await_first():
    """Until rank 0 listens: torch's own attempts take longer and print a stack trace each.  Raises RuntimeError."""
    end = time.monotonic() + MEETING.total_seconds()
    while True:
        try:
            return socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(str(error)) from None
        time.sleep(0.2)


def stop():
    """Leave the others; at the end of a script that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    """Rows of all processes; each process's rows get the gradient of every process's loss."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        ctx.count = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may hand the same tensor to others
        torch.distributed.all_reduce(gradient)
        return gradient[rank() * ctx.count : (rank() + 1) * ctx.count]


def gather_rows(rows):
    """(B, D) of this process -> (processes * B, D) of all, in order of rank; equal B in each.

    Where all compute the same loss of the whole batch and DDP averages their gradients, the result is the gradient of
    one process with the whole batch.
    """
    return rows if size() == 1 else _GatherRows.apply(rows)


def barrier():
    if size() > 1:
        dist.barrier(group=_cpu_group)


def first_to_fail():
    """Whether this process is the first that ends with an error: it alone says why."""
    if not dist.is_initialized():
        return _alone or environment().rank == 0  # bad flags: all processes were given the same
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except (RuntimeError, ValueError):  # rank 0, which keeps the count, has gone
        return rank() == 0


def lost(error):
    """Whether this error says that another process is no longer there."""
    return size() > 1 and any(word in str(error) for word in ("Connection", "Timed out", "NCCL", "gloo"))


def gather(value):
    """List of every process's value (anything that pickles), by rank; the same list everywhere."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


def broadcast(tensors):
    """Overwrite these tensors with rank 0's."""
    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def smallest(tensor):
    """The least value that any process has, elementwise."""
    if size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def data_parallel(module, device, unused=False):
    """The module under DDP; its gradients become means over the processes.  unused: some parameters get no gradient."""
    if size() == 1:
        return module
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=unused)


class Agreement:
    """The largest value that any process gave.  A call returns what was agreed on in the call before, so that nobody
    waits for a slow process within a step; every process must call it equally often."""

    def __init__(self):
        self.pending = None

    def __call__(self, value):
        if size() == 1:
            return value
        agreed = 0
        if self.pending:
            work, tensor = self.pending
            work.wait()
            agreed = int(tensor)
        tensor = torch.tensor(value)
        self.pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_cpu_group, async_op=True), tensor
        return agreed
