"""One training step of the add-on, and what it needs: schedule, optimizer, EMA, the draw of segments.

Deep supervision (HRM, section 2): each segment is forward, loss, backward, optimizer step, and its carry is detached,
so memory does not grow with segments. With `--supervised_segments N` only the last N segments do so; those before run
without gradient (a burn-in), which costs no memory and little time.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batching import IGNORE, Batch
from host import HostError
from model import ADDON_PREFIX, HRMController

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


def segments_of_step(opts: argparse.Namespace, step: int) -> int:
    """Segments of batch `step`; drawn from 1..segments with `uniform` and always with ACT, alike on all ranks."""
    if opts.segments_sampling == "fixed" and not opts.use_act:
        return opts.segments
    return random.Random(f"segments/{opts.seed}/{step}").randint(1, opts.segments)


def seed_of_step(seed: int, step: int, rank: int, world: int) -> int:
    """Random seed of batch `step` on one rank. Because it needs no history, a resumed run draws what the other drew."""
    return ((seed * 1_000_003 + step) * world + rank) % 2**63


def learns_by_muon(name: str, parameter: nn.Parameter) -> bool:
    """Hidden matrices take Muon; projections that start at zero, heads, LoRA and memory tokens take AdamW."""
    inner = name.removeprefix(ADDON_PREFIX)
    zero_or_head = ("injector.out.", "vocabulary_bias.out.", "core.halt.", "verifier.", "injector.memory")
    return parameter.ndim == 2 and "lora_" not in name and not (inner + ".").startswith(zero_or_head)


def build_optimizers(
    opts: argparse.Namespace, parameters: dict[str, nn.Parameter]
) -> list[tuple[torch.optim.Optimizer, list[str]]]:
    """Each optimizer with its parameters' names in its own order; weight decay on matrices alone.

    `muon` orthogonalises the updates of hidden matrices (scaled to AdamW's size, so one learning rate serves both) and
    leaves the rest to AdamW.
    """
    by_muon = [name for name, p in parameters.items() if opts.optimizer == "muon" and learns_by_muon(name, p)]
    rest = {name: p for name, p in parameters.items() if name not in set(by_muon)}
    decayed = [name for name, p in rest.items() if p.ndim >= 2]
    plain = [name for name, p in rest.items() if p.ndim < 2]
    groups = [
        {"params": [rest[name] for name in decayed], "weight_decay": opts.weight_decay},
        {"params": [rest[name] for name in plain], "weight_decay": 0.0},
    ]
    betas = (opts.beta1, opts.beta2)
    if opts.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return [(AdamW8bit(groups, lr=opts.lr, betas=betas), decayed + plain)]
    optimizers: list[tuple[torch.optim.Optimizer, list[str]]] = [
        (torch.optim.AdamW(groups, lr=opts.lr, betas=betas), decayed + plain)
    ]
    if by_muon:
        matrices = [parameters[name] for name in by_muon]
        muon = torch.optim.Muon(matrices, lr=opts.lr, weight_decay=opts.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append((muon, by_muon))
    return optimizers


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

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


class Trainer:
    """Owns optimizers, EMA and scaler, and runs one batch (of one or more micro-batches) at a time.

    `accelerator` gives device, ranks and gradient averaging; `answer_verdicts` maps a batch to (B,) floats, the task
    verifier's verdict on answers generated now, for `--verifier_weight`.
    """

    def __init__(self, opts: argparse.Namespace, controller: HRMController, accelerator: Any, precision: str,
                 answer_verdicts: Any = None):
        self.opts, self.controller, self.accelerator, self.precision = opts, controller, accelerator, precision
        self.answer_verdicts = answer_verdicts
        self.parameters = controller.addon_parameters()
        if not self.parameters:
            raise HostError("nothing to train: the add-on has no trainable parameter")
        self.optimizers = build_optimizers(opts, self.parameters)
        self.ema = Ema(self.parameters, opts.ema) if opts.ema else None
        self.scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
        self.scaler_skips = 0
        self.wrapped = accelerator.prepare_model(controller) if accelerator.num_processes > 1 else controller

    def autocast(self) -> contextlib.AbstractContextManager:
        """Reduced precision for the add-on; the host keeps its own dtype."""
        if self.precision == "none":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.accelerator.device.type, dtype=dtype)

    def evaluation_weights(self) -> contextlib.AbstractContextManager:
        """The averaged weights where there are any."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    def step(self, batches: Sequence[Batch], step: int, lr: float) -> dict[str, float]:
        """All segments of batch `step`, whose micro-batches are `batches`; returns its metrics.

        Raises:
            NonFiniteError: before the optimizer step that would have spoilt the weights.
        """
        opts, world = self.opts, self.accelerator.num_processes
        torch.manual_seed(seed_of_step(opts.seed, step, self.accelerator.process_index, world))
        for optimizer, _ in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        verdicts = self._verdicts(batches, step)
        self.wrapped.train()
        tokens, examples = self._global_counts(batches)
        count = segments_of_step(opts, step)
        supervised = min(opts.supervised_segments or count, count)
        states, carries = self._encode(batches), [None] * len(batches)
        for _ in range(count - supervised):
            carries = self._advance(states, carries)
        for segment in range(supervised):
            if segment and self.controller.config.lora_layers:
                states = self._encode(batches)  # the last backward spent the graph, the last step moved the weights
            metrics, carries = self._supervise(batches, states, carries, verdicts, tokens, examples)
            metrics["grad_norm"] = self._update(step, metrics["loss"])
        return {**metrics, "lr": lr, "segments": count, "tokens": tokens, "examples": examples}

    def _encode(self, batches: Sequence[Batch]) -> list[Any]:
        with self.autocast():
            return [self.controller.encode(batch) for batch in batches]

    @torch.no_grad()
    def _advance(self, states: list[Any], carries: list[Any]) -> list[Any]:
        with self.autocast():
            pairs = zip(states, carries, strict=True)
            return [self.controller.model.advance(s.features, s.context, carry) for s, carry in pairs]

    def _global_counts(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """(answer tokens, examples) of the batch over all micro-batches and ranks."""
        counts = torch.tensor(
            [sum(int((b.labels != IGNORE).sum()) for b in batches), sum(len(b.examples) for b in batches)],
            device=self.accelerator.device,
        )
        tokens, examples = self.accelerator.reduce(counts, "sum").tolist()
        return tokens, examples

    def _supervise(self, batches, states, carries, verdicts, tokens, examples) -> tuple[dict[str, float], list[Any]]:
        """Forward and backward of one segment over all micro-batches; gradients add up to those of the global batch."""
        world = self.accelerator.num_processes  # gradients are averaged over ranks, the loss is a share of the whole
        sums: dict[str, float] = {}
        following = []
        for index, (batch, state, carry) in enumerate(zip(batches, states, carries, strict=True)):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped), self.autocast():
                out = self.wrapped(states=state, labels=batch.labels, carry=carry, denominator=tokens / world)
                loss, parts = self._total_loss(out, verdicts[index], examples / world)
                self.scaler.scale(loss).backward()
            following.append(out.carry.detach())
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) / world
        if world > 1:
            names = sorted(sums)
            mine = torch.tensor([sums[name] for name in names], device=self.accelerator.device)
            sums = dict(zip(names, self.accelerator.reduce(mine, "sum").tolist(), strict=True))
        return sums, following

    def _total_loss(self, out: Any, verdict: Tensor | None, examples: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Answer loss plus the heads' losses, and the parts to log (each a share of the batch's mean)."""
        loss, metrics = out.loss, out.metrics
        parts = {"answer_loss": out.loss.detach(), "teacher_forced_exact": metrics["correct"].sum() / examples}
        if self.opts.use_act:
            logits = metrics["halt_logits"].float()
            target = metrics["correct"].to(logits.dtype)
            assert logits.shape == target.shape, f"halting: {logits.shape} against {target.shape}"
            halting = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / examples
            penalty = (1 - logits.sigmoid()).sum() / examples
            loss = loss + halting + self.opts.act_penalty * penalty
            parts |= {"halt_loss": halting.detach(), "halt_probability": logits.detach().sigmoid().sum() / examples}
        if "verdict_logits" in metrics:
            logits = metrics["verdict_logits"].float()
            loss = loss + 0.0 * logits.sum()  # every parameter takes part in every backward, as DDP expects
            if verdict is not None:
                assert logits.shape == verdict.shape, f"verifier: {logits.shape} against {verdict.shape}"
                judged = F.binary_cross_entropy_with_logits(logits, verdict, reduction="sum") / examples
                loss = loss + self.opts.verifier_weight * judged
                parts |= {"verifier_loss": judged.detach(), "generated_solved": verdict.sum() / examples}
        return loss, {"loss": loss.detach(), **parts}

    def _verdicts(self, batches: Sequence[Batch], step: int) -> list[Tensor | None]:
        if not self.opts.verifier_weight or step % self.opts.verifier_every:
            return [None] * len(batches)
        return [self.answer_verdicts(batch) for batch in batches]

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
