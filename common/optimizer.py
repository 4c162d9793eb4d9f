"""Optimizer, learning rate and the step that uses them.

Needs cli.py, distributed.py and metrics.py of `common` (and what these need) and torch.
"""

import math

import torch
from torch import nn

from common import distributed, metrics
from common.cli import UserError

CHECK_EVERY = 50  # steps between looks at the device for a loss that is not finite


class NonFiniteLoss(Exception):
    """The loss overflowed or became NaN: a fault of the run, not of the command line."""

    exit_code = 1


def make_optimizer(
    name,
    modules,
    lr,
    weight_decay=None,
    momentum=0.9,
    nesterov=False,
    projectors=None,
    projector_decay=0.0,
    backbone_lr=None,
):
    """Optimizer over the modules' parameters, no decay on norms, biases, class tokens and positions.

    lr: None is 0.02 for sgd, 0.001 for adam and adamw; weight_decay: None is 5e-4 for sgd, 0.05 for adamw, 0 for adam;
    projectors: a module with a decay of its own; backbone_lr: of what a module's `backbones()` holds.
    """
    if nesterov and (name != "sgd" or momentum == 0):
        other = f"--optimizer {name}" if name != "sgd" else "--momentum 0"
        raise UserError(f"--nesterov and {other} contradict each other: it is a kind of momentum of sgd")
    if lr is None:
        lr = 0.02 if name == "sgd" else 1e-3
    if weight_decay is None:
        weight_decay = {"sgd": 5e-4, "adamw": 0.05, "adam": 0.0}[name]
    decayed, free, backbones = [], [], set()
    for module in modules:
        skip = set()
        if backbone_lr is not None:
            backbones |= {p for side in module.backbones().values() for p in side.parameters()}
        for prefix, child in module.named_modules():
            if hasattr(child, "no_weight_decay"):
                skip |= {f"{prefix}.{n}" if prefix else n for n in child.no_weight_decay()}
        for n, p in module.named_parameters():
            if p.requires_grad:
                (free if p.ndim <= 1 or n in skip else decayed).append(p)
    groups = []
    for parameters, decay in ((decayed, weight_decay), (free, 0.0)):
        groups.append({"params": [p for p in parameters if p not in backbones], "weight_decay": decay})
        groups.append(
            {
                "params": [p for p in parameters if p in backbones],
                "weight_decay": decay,
                "scale": (backbone_lr or lr) / lr,
            }
        )
    if projectors is not None:
        own = [p for p in projectors.parameters() if p.requires_grad]
        groups.append({"params": [p for p in own if p.ndim > 1], "weight_decay": projector_decay})
        groups.append({"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0})
    groups = [g for g in groups if g["params"]]
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](groups, lr=lr, fused=fused)


class Schedule:
    """Learning rate by step: linear warm-up, then cosine to 0, multistep, plateau or constant."""

    def __init__(self, kind, peak, epochs, steps_per_epoch, warmup_epochs=0.0, milestones=None, gamma=0.1, patience=5):
        if warmup_epochs > epochs:
            raise UserError(f"--warmup-epochs {warmup_epochs} is longer than --epochs {epochs}")
        if milestones and kind != "multistep":
            raise UserError(f"--milestones and --schedule {kind} contradict each other")
        if kind == "multistep" and not milestones:
            raise UserError("--schedule multistep needs --milestones EPOCH ...")
        self.kind, self.peak, self.gamma, self.patience = kind, peak, gamma, patience
        self.total, self.warmup = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch
        self.milestones = [m * steps_per_epoch for m in milestones or []]
        self.factor, self.best, self.waited = 1.0, None, 0  # of plateau

    def __call__(self, step):
        """The rate of step number `step`, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.total - self.warmup)))
        if self.kind == "multistep":
            return self.peak * self.gamma ** sum(step >= m for m in self.milestones)
        return self.peak * self.factor

    def end_epoch(self, metric, value):
        """plateau: lower the rate after `patience` epochs without gain."""
        if metrics.better(metric, value, self.best):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
            if self.kind == "plateau" and self.waited >= self.patience:
                self.factor, self.waited = self.factor * self.gamma, 0

    def state_dict(self):
        return {"factor": self.factor, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state):
        self.factor, self.best, self.waited = state["factor"], state["best"], state["waited"]


class Updater:
    """One optimizer step: rate, backward, clipping, step, average of the weights, and an eye on the loss.

    accumulate: calls that make one step, each with a part of the batch; parallel: the module under DDP, where the
    forward pass goes through it: its gradients are averaged over the processes in a step's last call.

    The number of the first step whose loss was not finite stays on the device and is read every 50 steps and before
    anything is saved, so that no step waits for the device.
    """

    def __init__(self, model, optimizer, schedule, precision, clip_grad=0.0, ema=0.0, accumulate=1, parallel=None):
        self.model, self.optimizer, self.schedule, self.precision = model, optimizer, schedule, precision
        self.clip_grad, self.steps, self.lr = clip_grad, 0, schedule(0)
        self.accumulate, self.parallel, self.calls = accumulate, parallel, 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.first_bad = torch.full((), 2**31 - 1, dtype=torch.int32, device=self.parameters[0].device)
        self.average = None
        if ema:
            from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))
        self._average_gradients()

    @property
    def evaluated_model(self):
        """The weights that are judged and kept: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def _average_gradients(self):
        """DDP averages in the forward and backward pass that completes a step, and only there."""
        if hasattr(self.parallel, "require_backward_grad_sync"):
            self.parallel.require_backward_grad_sync = (self.calls + 1) % self.accumulate == 0

    def __call__(self, loss):
        """Backward, and after `accumulate` calls the optimizer's step."""
        step = torch.where(torch.isfinite(loss.detach()), 2**31 - 1, self.steps + 1)
        self.first_bad = torch.minimum(self.first_bad, step.to(torch.int32))
        self.precision.scaler.scale(loss / self.accumulate).backward()
        self.calls += 1
        self._average_gradients()
        if self.calls % self.accumulate == 0:
            self._step()

    def _step(self):
        self.lr = self.schedule(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("scale", 1.0)
        scaler = self.precision.scaler
        if self.clip_grad:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.steps += 1
        if self.steps % CHECK_EVERY == 0:
            self.check_finite()

    def check_finite(self):
        first = distributed.smallest(self.first_bad).item()
        if first < 2**31 - 1:
            lr = self.schedule(first - 1)
            raise NonFiniteLoss(
                f"the loss of step {first} is not finite (learning rate {lr:.3g}): lower --lr, or use --warmup-epochs, "
                "--clip-grad or --amp off"
            )

    def state_dict(self):
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.steps = state["steps"]
        self.lr = self.schedule(max(0, self.steps - 1))  # of the last step: an epoch may have no step left to set it


def backbone_lr(args, model):
    rate = getattr(args, "backbone_lr", None)
    if rate is not None and not hasattr(model, "backbones"):
        raise UserError("--backbone-lr is for image + text models")
    return rate


def make_updater(args, model, precision, steps, projectors=None, module=None, unused=False):
    """Updater by --optimizer, --schedule and the flags beside them; its `parallel` is what the forward pass goes
    through.

    steps: an epoch; projectors: of the loss, trained too; module: what holds model and projectors, for DDP, if it is
    not
    the model; unused: whether some parameters get no gradient.
    """
    optimizer = make_optimizer(
        args.optimizer,
        [model],
        args.lr,
        args.weight_decay,
        args.momentum,
        args.nesterov,
        projectors,
        getattr(args, "projector_weight_decay", 0.0),
        backbone_lr(args, model),
    )
    schedule = Schedule(
        args.schedule,
        optimizer.defaults["lr"],
        args.epochs,
        steps,
        args.warmup_epochs,
        args.milestones,
        args.gamma,
        args.plateau_patience,
    )
    parallel = distributed.data_parallel(module or model, precision.device, unused=unused)
    return Updater(model, optimizer, schedule, precision, args.clip_grad, args.ema, args.accumulation_steps, parallel)
