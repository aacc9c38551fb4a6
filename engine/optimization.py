"""What every training step shares: schedule, optimizers, EMA, mixed precision, an update that refuses NaN."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints import Checkpoint

MAX_SCALER_SKIPS = 10


class NonFiniteError(RuntimeError):
    """A loss or gradient that is no number, found before the optimizer step: the weights are still good."""


def learning_rate(opts: argparse.Namespace, step: int, progress: float, warmup: int) -> float:
    """Learning rate of batch `step` (from 0): linear warmup, then by the schedule over `progress` in [0, 1].

    cosine and linear never fall under `lr_min_ratio x lr`.
    """
    if step < warmup:
        return opts.lr * (step + 1) / warmup
    falling = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return opts.lr * (opts.lr_min_ratio + (1 - opts.lr_min_ratio) * falling[opts.lr_scheduler])


def check_fit(own: dict[str, Tensor], state: dict[str, Tensor], what: str = "checkpoint") -> None:
    """Raises ValueError naming the first difference in names or shapes of a model's own tensors and those of `what`."""
    for name in sorted(own.keys() | state.keys()):
        ours, theirs = (tuple(s[name].shape) if name in s else "absent" for s in (own, state))
        if ours != theirs:
            raise ValueError(f"{what} does not fit this model: {name} is {theirs} there, expected {ours}")


def model_weights(model: Any) -> dict[str, Tensor]:
    """Everything a checkpoint of a whole transformers model keeps; a tied table once."""
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else ()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def load_weights(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Restores `model_weights`. Raises ValueError as `check_fit`."""
    check_fit(model_weights(model), weights, f"checkpoint {folder}")
    model.load_state_dict(model.state_dict() | weights)  # a tied table's second name is that same storage


def seed_of_step(seed: int, step: int, rank: int, world: int) -> int:
    """Random seed of batch `step` on one rank. Because it needs no history, a resumed run draws what the other drew."""
    return ((seed * 1_000_003 + step) * world + rank) % 2**63


def build_optimizers(
    opts: argparse.Namespace,
    parameters: dict[str, nn.Parameter],
    by_muon: Callable[[str, nn.Parameter], bool],
    apart: Callable[[str], bool] = lambda name: False,
) -> list[tuple[torch.optim.Optimizer, list[str]]]:
    """Each optimizer with its parameters' names in its own order; weight decay on matrices alone.

    `muon` orthogonalises the updates of the matrices that `by_muon` names (scaled to AdamW's size, so one learning rate
    serves both) and leaves the rest to AdamW. Parameters that `apart` names stand in groups of their own, marked
    `apart`, whose weight decay the trainer may switch.
    """
    muon = [name for name, p in parameters.items() if opts.optimizer == "muon" and by_muon(name, p)]
    rest = [name for name in parameters if name not in set(muon)]
    matrices = [name for name in rest if parameters[name].ndim >= 2]
    groups, order = _groups(opts, parameters, matrices, opts.weight_decay, apart)
    vectors, names = _groups(opts, parameters, [name for name in rest if parameters[name].ndim < 2], 0.0, None)
    groups, order, betas = groups + vectors, order + names, (opts.beta1, opts.beta2)
    if opts.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return [(AdamW8bit(groups, lr=opts.lr, betas=betas), order)]
    optimizers: list[tuple[torch.optim.Optimizer, list[str]]] = []
    if order:
        optimizers.append((torch.optim.AdamW(groups, lr=opts.lr, betas=betas), order))
    if muon:
        groups, order = _groups(opts, parameters, muon, opts.weight_decay, apart)
        optimizers.append((torch.optim.Muon(groups, lr=opts.lr, weight_decay=opts.weight_decay,
                                            adjust_lr_fn="match_rms_adamw"), order))
    return optimizers


def _groups(opts: argparse.Namespace, parameters: dict[str, nn.Parameter], names: list[str], decay: float,
            apart: Callable[[str], bool] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Parameter groups of these names, and the names in the groups' order."""
    inside = [name for name in names if apart is None or not apart(name)]
    outside = [name for name in names if name not in set(inside)]
    groups = [{"params": [parameters[name] for name in inside], "weight_decay": decay}]
    if outside:
        groups.append({"params": [parameters[name] for name in outside], "weight_decay": decay, "apart": True})
    return groups, inside + outside


class Ema:
    """Exponential moving average of the weights in float32 (in bf16 a decay of 0.999 rounds to no update).

    The decay warms up as (1 + t) / (10 + t), so that the random start is soon forgotten.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model carries the averaged weights."""
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(live)

    def settle(self) -> None:
        """Leaves the averaged weights in the model for good."""
        self._copy(self.average)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


class BaseTrainer:
    """Owns the model's optimizers, EMA and scaler. Subclasses say what a step is and what a checkpoint keeps.

    `accelerator` gives device, ranks and gradient averaging; `parameters` are those that train. `progress`, which the
    loop sets before each step, is the share of the run that is done, 0 to 1.
    """

    stem = "model"  # file stem of the weights in a checkpoint

    def __init__(self, opts: argparse.Namespace, model: nn.Module, accelerator: Any, precision: str,
                 parameters: dict[str, nn.Parameter],
                 optimizers: list[tuple[torch.optim.Optimizer, list[str]]]):
        self.opts, self.model, self.accelerator, self.precision = opts, model, accelerator, precision
        self.parameters, self.optimizers = parameters, optimizers
        self.ema = Ema(parameters, opts.ema) if opts.ema else None
        self.scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
        self.scaler_skips = 0
        self.progress = 1.0

    # --- what a checkpoint holds ---

    def weights(self) -> dict[str, Tensor]:
        """Name -> tensor of what a checkpoint keeps."""
        raise NotImplementedError

    def documents(self) -> dict[str, str]:
        """File name -> text of what describes the weights."""
        raise NotImplementedError

    def load(self, saved: Checkpoint, folder: Path) -> None:
        """Restores `weights`. Raises ValueError when the checkpoint does not fit this model."""
        raise NotImplementedError

    # --- a step's parts ---

    def autocast(self) -> contextlib.AbstractContextManager:
        """Reduced precision for what trains."""
        if self.precision == "none":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.accelerator.device.type, dtype=dtype)

    def evaluation_weights(self) -> contextlib.AbstractContextManager:
        """The averaged weights where there are any."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    def restart_ema(self) -> None:
        """The average begins anew at the weights of now."""
        self.ema = Ema(self.parameters, self.opts.ema) if self.opts.ema else None

    def end_training(self) -> None:
        """Leaves the averaged weights in the model for good, and lets the optimizers go: no step follows."""
        if self.ema:
            self.ema.settle()
        self.ema = None
        self.optimizers = []

    def begin(self, step: int, lr: float) -> None:
        """Random state and learning rate of batch `step`."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(seed_of_step(self.opts.seed, step, rank, world))
        for optimizer, _ in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def _update(self, step: int, loss: float) -> float:
        """Clips and steps, unless something is not a number. Returns the gradient norm before clipping."""
        for optimizer, _ in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.opts.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        finite = math.isfinite(norm) and math.isfinite(loss)
        if not finite:
            self.scaler_skips += 1
            overflow = self.precision == "fp16" and math.isfinite(loss) and self.scaler_skips < MAX_SCALER_SKIPS
            if not overflow:  # with fp16 the scaler overflows now and then by design, and skips that step itself
                self._forget_gradients()
                raise NonFiniteError(f"batch {step}: loss {loss}, gradient norm {norm}")
        for optimizer, _ in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self._forget_gradients()
        if finite:
            self.scaler_skips = 0
            if self.ema:
                self.ema.update()
        return norm

    def _forget_gradients(self) -> None:
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
