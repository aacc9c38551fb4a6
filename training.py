"""One training step of the add-on, and what it needs: schedule, optimizer, EMA, the draw of segments.

Deep supervision (HRM, section 2): each segment is forward, loss, backward, optimizer step, and its carry is detached,
so memory does not grow with segments. With `--supervised_segments N` only the last N segments do so; those before run
without gradient (a burn-in), which costs no memory and little time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addon.adapters import ADAPTER, ADAPTER_CONFIG, adapter_document, check_adapter, check_fingerprint
from batching import Batch
from engine.batches import IGNORE
from engine.checkpoints import Checkpoint
from engine.optimization import BaseTrainer, build_optimizers
from host import HostError
from model import ADDON_PREFIX, AdapterController, SegmentLoss


def segments_of_step(opts: argparse.Namespace, step: int, progress: float = 1.0) -> int:
    """Segments of batch `step`, alike on all ranks: all, or drawn from 1..segments with `uniform` and with ACT.

    With `growing` the largest that may be drawn rises from 1 to `segments` in equal parts of the run, whose share
    `progress` in [0, 1] is done.
    """
    if opts.segments_sampling == "fixed" and not opts.use_act:
        return opts.segments
    most = opts.segments
    if opts.segments_sampling == "growing":
        most = min(1 + int(progress * most), most)
    return random.Random(f"segments/{opts.seed}/{step}").randint(1, most)


def learns_by_muon(name: str, parameter: nn.Parameter) -> bool:
    """HRM's hidden matrices and LoRA's factors take Muon; HRM's zero projections, heads, learned tokens take AdamW."""
    if ".lora_A." in name or ".lora_B." in name:
        return parameter.ndim == 2
    inner = name.removeprefix(ADDON_PREFIX)
    zero_or_head = ("injector.out.", "vocabulary_bias.out.", "core.halt.", "verifier.", "injector.memory")
    return parameter.ndim == 2 and inner != name and not (inner + ".").startswith(zero_or_head)


class Trainer(BaseTrainer):
    """Runs one batch (of one or more micro-batches) of the add-on at a time.

    `answer_verdicts` maps a batch to (B,) floats, the task verifier's verdict on answers generated now, for
    `--verifier_weight`.
    """

    stem = ADAPTER

    def __init__(self, opts: argparse.Namespace, controller: AdapterController, accelerator: Any, precision: str,
                 answer_verdicts: Any = None):
        parameters = controller.addon_parameters()
        if not parameters and opts.adapter != "none":
            raise HostError("nothing to train: the add-on has no trainable parameter")
        optimizers = build_optimizers(opts, parameters, learns_by_muon)
        super().__init__(opts, controller, accelerator, precision, parameters, optimizers)
        self.controller, self.answer_verdicts = controller, answer_verdicts
        self.encode = controller.encode  # what a batch becomes before its segments; a cache may stand in
        loss = SegmentLoss(controller)
        self.wrapped = accelerator.prepare_model(loss) if accelerator.num_processes > 1 else loss

    def weights(self) -> dict[str, Tensor]:
        """The add-on's, never the LLM's."""
        return self.controller.addon_state()

    def documents(self) -> dict[str, str]:
        return {ADAPTER_CONFIG: adapter_document(self.controller, self.opts)}

    def load(self, saved: Checkpoint, folder: Path) -> None:
        """Raises ValueError for another base model or another shape."""
        document = json.loads(saved.documents[ADAPTER_CONFIG])
        check_fingerprint(self.controller.host, document, folder)
        check_adapter(self.controller, document, folder)
        self.controller.load_addon_state(saved.tensors[ADAPTER])

    def step(self, batches: Sequence[Batch], step: int, lr: float) -> dict[str, float]:
        """All segments of batch `step`, whose micro-batches are `batches`; returns its metrics.

        Raises:
            NonFiniteError: before the optimizer step that would have spoilt the weights.
        """
        opts = self.opts
        self.begin(step, lr)
        verdicts = self._verdicts(batches, step)
        self.wrapped.train()
        tokens, examples = self._global_counts(batches)
        count = segments_of_step(opts, step, self.progress) if self.controller.recurrent else 1
        supervised = min(opts.supervised_segments or count, count)
        states, carries = self._encode(batches), [None] * len(batches)
        for _ in range(count - supervised):
            carries = self._advance(states, carries)
        for segment in range(supervised):
            if segment and self.controller.config.lora_layers:
                states = self._encode(batches)  # the last backward spent the graph, the last step moved the weights
            metrics, carries = self._supervise(batches, states, carries, verdicts, tokens, examples)
            metrics["grad_norm"] = self._update(step, metrics["loss"])
            if not opts.carry_state:
                carries = [None] * len(batches)
        if "halt_square" in metrics:
            variance = metrics.pop("halt_square") - metrics["halt_probability"] ** 2
            metrics["halt_deviation"] = max(variance, 0.0) ** 0.5  # among the batch's examples
        return {**metrics, "lr": lr, "segments": count, "tokens": tokens, "examples": examples}

    def _encode(self, batches: Sequence[Batch]) -> list[Any]:
        with self.autocast():
            return [self.encode(batch) for batch in batches]

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
                out = self.wrapped(state, batch.labels, carry, tokens / world)
                loss, parts = self._total_loss(out, verdicts[index], examples / world)
                self.scaler.scale(loss).backward()
            following.append(out.carry and out.carry.detach())
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
            chance = logits.detach().sigmoid()
            parts |= {"halt_loss": halting.detach(), "halt_probability": chance.sum() / examples,
                      "halt_square": chance.square().sum() / examples}
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
