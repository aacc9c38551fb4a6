"""What every training step shares: optimizers, micro-batches, EMA, an update that refuses NaN."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints import Checkpoint
from engine.muon import Muon
from engine.sharding import replicated, without_exchange

MAX_SCALER_SKIPS = 10  # consecutive overflows of fp16 after which a run is lost
SEPARATE_DECAY = "apart"  # mark of a group whose decay is switched; checkpoints hold it under this name
Optimizers = list[tuple[torch.optim.Optimizer, list[str]]]  # each with its parameters' names, in its own order


class NonFiniteError(RuntimeError):
    """A loss or gradient that is no number, found before the optimizer step: the weights are still good.

    loss, norm: of the batch, the norm of all its gradients; None where it was not measured.
    """

    def __init__(self, message: str, loss: float | None = None, norm: float | None = None):
        super().__init__(message)
        self.loss = loss
        self.norm = norm


def spoilt(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that is not all numbers; None: all are."""
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            return name
    return None


def check_weights(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    """Raises NonFiniteError where weights that train are not all numbers: nothing that follows is worth keeping."""
    name = spoilt(parameters.items())
    if name is not None:
        raise NonFiniteError(f"after batch {step} the weights {name} are not all numbers")


@dataclass(frozen=True)
class OptimConfig:
    """How weights are moved; each field is the flag of its name.

    optimizer: muon (Muon on hidden matrices, AdamW on the rest), adamw or adamw_8bit.
    lr: peak learning rate, above 0.
    weight_decay: per unit of learning rate, 0 or more; of matrices alone.
    beta1, beta2: decays of AdamW's moments, in [0, 1).
    grad_clip: largest norm of all gradients together; 0 = off.
    ema: decay of the averaged weights, in [0, 1); 0 = no average.
    seed: of the random numbers that a step draws.
    """

    optimizer: str = "muon"
    lr: float = 3e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    ema: float = 0.998
    seed: int = 0


def seed_of_step(seed: int, step: int, rank: int, world: int) -> int:
    """Random seed of batch `step` on one rank. Because it needs no history, a resumed run draws what the other drew."""
    return ((seed * 1_000_003 + step) * world + rank) % 2**63


# --- weights ----------------------------------------------------------------------------------------------------------


def check_fit(own: dict[str, Tensor], state: dict[str, Tensor], what: str = "checkpoint") -> None:
    """Raises ValueError naming the first difference in names or shapes of a model's own tensors and those of `what`."""
    for name in sorted(own.keys() | state.keys()):
        ours = _shape_in(own, name)
        theirs = _shape_in(state, name)
        if ours != theirs:
            raise ValueError(f"{what} does not fit this model: {name} is {theirs} there, expected {ours}")


def _shape_in(state: dict[str, Tensor], name: str) -> tuple[int, ...] | str:
    """The shape of a tensor, or "absent"."""
    return tuple(state[name].shape) if name in state else "absent"


def model_weights(model: Any) -> dict[str, Tensor]:
    """Everything a checkpoint of a whole transformers model keeps; a tied table once."""
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else ()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def load_weights(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Restores `model_weights`. Raises ValueError as `check_fit`."""
    check_fit(model_weights(model), weights, f"checkpoint {folder}")
    model.load_state_dict(model.state_dict() | weights)  # a tied table's second name is that same storage


class Ema:
    """Exponential moving average of the weights in float32 (in bf16 a decay of 0.999 rounds to no update).

    The decay warms up as (1 + t) / (10 + t), so that the random start is soon forgotten.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters = parameters
        self.decay = decay
        self.updates = 0
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights of now."""
        self.updates += 1

        # Kernels over all parameters at once: one by one they would cost a step's time on a GPU.
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


# --- optimizers -------------------------------------------------------------------------------------------------------


def build_optimizers(
    config: OptimConfig,
    parameters: dict[str, nn.Parameter],
    by_muon: Callable[[str, nn.Parameter], bool],
    separate_decay: Callable[[str], bool] | None = None,
) -> Optimizers:
    """The optimizers of a run; weight decay on matrices alone.

    Muon orthogonalises the updates of hidden matrices, scaled to the size of AdamW's, so that one learning rate serves
    both (Liu et al. 2025, Muon is Scalable for LLM Training).

    Args:
        config: which optimizer, and its numbers.
        parameters: name -> parameter; the order of a group is the order of this dict.
        by_muon: True for a parameter that `muon` takes; AdamW takes the others.
        separate_decay: True puts a parameter in its own group, so that the trainer can switch its weight decay. Such
            a group has the key `SEPARATE_DECAY`.
    """
    hidden, matrices, vectors = _by_kind(parameters, by_muon if config.optimizer == "muon" else None)

    # Checkpoints store moments by this order of groups: decayed matrices, then vectors.
    groups, order = _groups(parameters, matrices, config.weight_decay, separate_decay)
    plain_groups, plain_order = _groups(parameters, vectors, 0.0, None)
    groups += plain_groups
    order += plain_order
    betas = (config.beta1, config.beta2)

    # Imported here: bitsandbytes is slow to load and rarely asked for.
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return [(AdamW8bit(groups, lr=config.lr, betas=betas), order)]

    optimizers: Optimizers = []
    if order:
        optimizers.append((torch.optim.AdamW(groups, lr=config.lr, betas=betas), order))
    if hidden:
        groups, order = _groups(parameters, hidden, config.weight_decay, separate_decay)
        optimizers.append((Muon(groups, config.lr, config.weight_decay), order))
    return optimizers


def _by_kind(
    parameters: dict[str, nn.Parameter], by_muon: Callable[[str, nn.Parameter], bool] | None
) -> tuple[list[str], list[str], list[str]]:
    """Names of what Muon takes, of the other matrices, and of vectors and scalars, each in the order given."""
    hidden: list[str] = []
    matrices: list[str] = []
    vectors: list[str] = []
    for name, parameter in parameters.items():
        if by_muon and by_muon(name, parameter):
            hidden.append(name)
        elif parameter.ndim >= 2:
            matrices.append(name)
        else:
            vectors.append(name)
    return hidden, matrices, vectors


def _groups(
    parameters: dict[str, nn.Parameter],
    names: list[str],
    decay: float,
    separate_decay: Callable[[str], bool] | None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Parameter groups of `names`, and the names in the groups' order."""
    together: list[str] = []
    separate: list[str] = []
    for name in names:
        if separate_decay and separate_decay(name):
            separate.append(name)
        else:
            together.append(name)

    # The first group stays where it is empty: the optimizer of an older checkpoint has it too.
    groups: list[dict[str, Any]] = [{"params": [parameters[name] for name in together], "weight_decay": decay}]
    if separate:
        group = {"params": [parameters[name] for name in separate], "weight_decay": decay, SEPARATE_DECAY: True}
        groups.append(group)
    return groups, together + separate


# --- a trainer --------------------------------------------------------------------------------------------------------


@dataclass
class MicroLoss:
    """What one micro-batch gives to a step.

    loss: (), its share of the global batch's loss; gradients are taken of it.
    parts: name -> () value to log, a share of the global batch's value unless `shares` says otherwise.
    shares: name -> factor that makes a part such a share; 1 where a name is missing.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    shares: dict[str, float] = field(default_factory=dict)


class LossModule(nn.Module):
    """A model as a module whose forward is `loss(model, *inputs)`: DDP synchronises through forward alone."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any]):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *inputs: Any) -> Any:
        return self.loss(self.model, *inputs)


class BaseTrainer:
    """Owns a model's optimizers, EMA and scaler. Subclasses say what a step is and what a checkpoint keeps.

    Args:
        optim: how weights are moved.
        model: what a checkpoint keeps and what evaluation runs.
        loss: the module whose forward gives the loss; DDP wraps it, the attribute `wrapped`, where there are ranks.
        accelerator: gives device, ranks and gradient averaging.
        precision: none, bf16 or fp16.
        parameters: name -> parameter of those that train.
        optimizers: as `build_optimizers` makes them.

    Attributes:
        progress: share of the run that is done, 0 to 1; the loop sets it before each step.
    """

    stem = "model"  # file stem of the weights in a checkpoint
    autocast_backward = False  # True: the backward pass runs inside autocast as well

    def __init__(
        self,
        optim: OptimConfig,
        model: nn.Module,
        loss: nn.Module,
        accelerator: Any,
        precision: str,
        parameters: dict[str, nn.Parameter],
        optimizers: Optimizers,
    ):
        self.optim = optim
        self.model = model
        self.accelerator = accelerator
        self.precision = precision
        self.parameters = parameters
        self.optimizers = optimizers
        self.restart_ema()
        self.scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
        self.scaler_skips = 0
        self.progress = 1.0

        # DDP copies the main process's weights to the others.
        self.wrapped = replicated(loss, accelerator)

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

    # --- a step and its parts ---

    def step(self, batches: Sequence[Any], step: int, lr: float) -> dict[str, float]:
        """One update, or one for each segment, from the micro-batches of batch `step`. Returns its metrics.

        Raises:
            NonFiniteError: before the optimizer step that would have spoilt the weights.
        """
        raise NotImplementedError

    def autocast(self) -> contextlib.AbstractContextManager:
        """Reduced precision for what trains."""
        if self.precision == "none":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.accelerator.device.type, dtype=dtype)

    def evaluation_weights(self) -> contextlib.AbstractContextManager:
        """The averaged weights where there are any."""
        if self.ema:
            return self.ema.applied()
        return contextlib.nullcontext()

    def restart_ema(self) -> None:
        """The average begins anew at the weights of now."""
        self.ema = Ema(self.parameters, self.optim.ema) if self.optim.ema else None

    def end_training(self) -> None:
        """Leaves the averaged weights in the model for good, and lets the optimizers go: no step follows."""
        if self.ema:
            self.ema.settle()
        self.ema = None
        self.optimizers = []

    def begin(self, step: int, lr: float) -> None:
        """Random state and learning rate of batch `step`."""
        rank = self.accelerator.process_index
        world = self.accelerator.num_processes
        torch.manual_seed(seed_of_step(self.optim.seed, step, rank, world))

        for optimizer, _ in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def totals(self, counts: Sequence[Sequence[int]]) -> list[int]:
        """Column sums of `counts`, one row for each micro-batch of this rank, over all ranks as well."""
        own = torch.tensor(counts, device=self.accelerator.device).sum(dim=0)
        return self.accelerator.reduce(own, "sum").tolist()

    def accumulate(self, batches: Sequence[Any], loss_of: Callable[[Any], MicroLoss]) -> dict[str, float]:
        """Gradients of the global batch, by forward and backward of each micro-batch in turn.

        DDP averages gradients over ranks. A loss is therefore to be divided by the global counts over the number of
        ranks, so that gradients of micro-batches and ranks add up to those of the global batch.

        Args:
            batches: micro-batches of this rank; gradients are exchanged once, with the last.
            loss_of: runs `wrapped` on one of them, under autocast.

        Returns:
            name -> the part's value for the global batch, over micro-batches and ranks; the same on every rank.
        """
        world = self.accelerator.num_processes
        sums: dict[str, float] = {}
        for index, batch in enumerate(batches):
            # DDP exchanges gradients in the backward pass, unless it is told to wait.
            is_last = index == len(batches) - 1
            exchange = contextlib.nullcontext() if is_last else without_exchange(self.wrapped)
            with exchange, contextlib.ExitStack() as reduced:
                reduced.enter_context(self.autocast())
                micro = loss_of(batch)
                if not self.autocast_backward:
                    reduced.close()
                self.scaler.scale(micro.loss).backward()

            # Only now, so that the backward pass is queued before the first value is waited for.
            for name, value in micro.parts.items():
                share = micro.shares.get(name, 1.0)
                sums[name] = sums.get(name, 0.0) + float(value) * share / world

        # Every process logs the whole, not its share.
        if world == 1:
            return sums
        names = sorted(sums)
        own = torch.tensor([sums[name] for name in names], device=self.accelerator.device)
        return dict(zip(names, self.accelerator.reduce(own, "sum").tolist(), strict=True))

    def _update(self, step: int, loss: float) -> float:
        """Clips and steps, unless something is not a number. Returns the gradient norm before clipping."""
        # Gradients of fp16 are scaled up; the norm is that of the true ones.
        for optimizer, _ in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.optim.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))

        finite = math.isfinite(norm) and math.isfinite(loss)
        if not finite:
            # With fp16 the scaler overflows now and then by design, and skips that step itself.
            self.scaler_skips += 1
            overflow = self.precision == "fp16" and math.isfinite(loss) and self.scaler_skips < MAX_SCALER_SKIPS
            if not overflow:
                self.scaler.update()  # closes the step for it, too: another batch may follow
                self._forget_gradients()
                raise NonFiniteError(f"batch {step}: loss {loss}, gradient norm {norm}", loss, norm)

        for optimizer, _ in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self._forget_gradients()

        # A step that the scaler skipped has moved nothing, so there is nothing to average.
        if finite:
            self.scaler_skips = 0
            if self.ema:
                self.ema.update()
        return norm

    def _forget_gradients(self) -> None:
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
