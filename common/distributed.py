"""What several processes need beyond one, started by torchrun or srun: to meet, to stop together, and gradients.

Imported by run.py, training.py and distill.py where more than one process was launched.  Needs run.py of `common`.
"""

import contextlib
import datetime
import os
import socket
import subprocess
import threading
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.run import UserError, launched_processes, rank, world_size

JOIN_TIMEOUT = datetime.timedelta(seconds=60)  # until all processes have started
TIMEOUT = datetime.timedelta(minutes=30)  # for processes that wait for a download or a checkpoint of rank 0


def join_processes(device: torch.device) -> None:
    """Join the other processes: nccl between GPUs, gloo between CPUs.  Raises UserError.

    Says whom it waits for after some seconds and gives up after a minute: a shell of `srun --pty`, or one where RANK
    and WORLD_SIZE were left, promises processes that nobody starts.
    """
    here = launched_processes()
    if dist.is_initialized():
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
    on_gpu = device.type == "cuda"
    variable = "WORLD_SIZE" if os.environ.get("RANK") else "SLURM_STEP_NUM_TASKS"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = f"process {here.rank} waits for the others of {here.size} ({variable}={here.size}) at {address}"
    advice = "start them with torchrun or srun; for one process alone: env -u RANK -u SLURM_STEP_ID python ..."
    timer = threading.Timer(5, print, [f"{waiting}: {advice}"], {"flush": True})
    timer.daemon, run.joining = True, True
    timer.start()
    try:
        if here.rank:
            _await_rank_zero()
        store, *_ = next(dist.rendezvous("env://", here.rank, here.size, timeout=JOIN_TIMEOUT))
        store.set_timeout(JOIN_TIMEOUT)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("default_pg", store),
            rank=here.rank,
            world_size=here.size,
            timeout=TIMEOUT,
            device_id=device if on_gpu else None,
        )
        # for objects and signals, which must not wait for a GPU
        run.cpu_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{waiting}, in vain ({str(error).splitlines()[0][:100]}): {advice}") from None
    finally:
        timer.cancel()
    run.joining = False


def _await_rank_zero() -> None:
    """Until rank 0 listens: torch's own attempts take longer and print a stack trace each.  Raises RuntimeError."""
    end = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while True:
        try:
            return socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(str(error)) from None
        time.sleep(0.2)


class Agreement:
    """The largest value that any process gave.  A call returns what was agreed on in the call before, so that nobody
    waits for a slow process within a step; every process must call it equally often."""

    def __init__(self):
        self.pending = None

    def __call__(self, value: int) -> int:
        agreed = 0
        if self.pending:
            work, tensor = self.pending
            work.wait()
            agreed = int(tensor)
        tensor = torch.tensor(value)
        self.pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=run.cpu_group, async_op=True), tensor
        return agreed


class _GatherRows(torch.autograd.Function):
    """Rows of all processes; each process's rows get the gradient of every process's loss."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.count = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may hand the same tensor to others
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.count : (rank() + 1) * ctx.count]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(B, D) of this process -> (processes * B, D) of all, in order of rank; equal B in each.

    Where all compute the same loss of the whole batch and DDP averages their gradients, the result is the gradient of
    one process with the whole batch.
    """
    return _GatherRows.apply(rows)


def data_parallel(module: nn.Module, device: torch.device, unused: bool = False) -> nn.Module:
    """The module under DDP; its gradients become means over the processes.  unused: some parameters get none."""
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=unused)
