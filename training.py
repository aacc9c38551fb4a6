"""One training step of the add-on: the draw of segments, the losses of a segment, the update after each.

Deep supervision (HRM, section 2): each segment is forward, loss, backward, optimizer step, and its carry is detached,
so memory does not grow with segments. With `--supervised_segments N` only the last N segments do so; those before run
without gradient (a burn-in), which costs no memory and little time. With `--grad_horizon segments:N` the gradient of a
supervised segment runs through the N - 1 before it as well: what takes several segments is learnt as a whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addon.adapters import (
    ADAPTER,
    adapter_documents,
    adapter_weights,
    check_adapter,
    check_fingerprint,
    record_of,
)
from addon.peft_files import own_names
from addon.retain import Retained, bare_log_probs, divergence, gate_loss, open_gates
from batching import NO_LIMIT, Batch, PromptConfig, hardest, needed_segments
from engine.batches import IGNORE
from engine.checkpoints import Checkpoint
from engine.optimization import BaseTrainer, MicroLoss, OptimConfig, build_optimizers
from host import HostError
from hrm_blocks import segments_with_gradient
from model import ADDON_PREFIX, AdapterController, SegmentLoss
from text_data.frames import Frame

HALT_HEAD = "core.halt."  # in the names of the halting head's weights


@dataclass(frozen=True)
class AddonStepConfig:
    """What a step of the add-on consists of; each field is the flag of its name.

    segments: recurrence segments of a batch, 1 or more.
    segments_sampling: fixed (all), uniform (1 to all, drawn for each batch), growing (1 to a number that rises),
        steps (from the most steps that an item of the batch needs to `segments_stretch` times as many, at most all) or
        item (each item as many as it needs steps, at most all).
    segments_stretch: see above, 1 or more.
    supervised_segments: the last N segments have a loss and an optimizer step; 0 = all of them.
    carry_state: True begins a supervised segment from the states of the one before, False from the initial ones.
    grad_horizon: calls that carry gradient, see `hrm_blocks.segments_with_gradient`.
    use_act: True trains the halting head.
    act_penalty: weight of the mean of 1 - p(halt), 0 or more; needs `use_act`.
    verifier_weight: weight of the verifier head's loss, 0 or more; 0 = off.
    verifier_every: batches between two sets of answers that are generated for that head, 1 or more.
    batch_tokens: above 0 measures how much of a batch is padding.
    seed: of the draw of segments.
    retain_weight: weight of the divergence from the bare LLM on other text, above 0, see `addon.retain`.
    """

    segments: int = 1
    segments_sampling: str = "fixed"
    segments_stretch: int = 2
    supervised_segments: int = 0
    carry_state: bool = True
    grad_horizon: str = "full"
    use_act: bool = False
    act_penalty: float = 0.0
    verifier_weight: float = 0.0
    verifier_every: int = 50
    batch_tokens: int = 0
    seed: int = 0
    retain_weight: float = 1.0


def segments_of_step(config: AddonStepConfig, step: int, progress: float = 1.0, needed: int = 1) -> int:
    """Segments of batch `step`, alike on all ranks: all, or drawn from 1..segments with `uniform` and with ACT.

    With `growing` the largest that may be drawn rises from 1 to `segments` in equal parts of the run, whose share
    `progress` in [0, 1] is done. With `steps` they are drawn from `needed`, the most steps of an item of the batch, to
    `segments_stretch` times as many, so that every item has enough of them and none has a number to count on;
    `segments` is the limit.
    With `item` they are as many as `needed`: the other items stop before.
    """
    if config.segments_sampling == "fixed" and not config.use_act:
        return config.segments

    # Drawn from seed and step alone, so that ranks agree and a resumed run draws what the other drew.
    least = 1
    most = config.segments
    if config.segments_sampling == "growing":
        most = min(1 + int(progress * most), most)
    if config.segments_sampling == "item":
        return min(needed, most)
    if config.segments_sampling == "steps":
        least = min(needed, most)
        most = min(config.segments_stretch * needed, most)
    return random.Random(f"segments/{config.seed}/{step}").randint(least, most)


def mean_segments(config: AddonStepConfig) -> float:
    """Segments of an average batch, as `segments_of_step` draws them over a whole run."""
    most = config.segments
    drawn = (1 + most) / 2  # mean of 1..most
    if config.segments_sampling == "growing":
        return (1 + drawn) / 2  # `most` itself grows from 1
    if config.segments_sampling == "steps":
        return (most / config.segments_stretch + most) / 2  # where the longest draw of the hardest items is all
    if config.segments_sampling == "item":
        return most  # where the hardest items need all
    if config.segments_sampling == "uniform" or config.use_act:
        return drawn
    return most


def halting_loss(logits: Tensor, correct: Tensor) -> Tensor:
    """Summed binary cross-entropy of "the answer is right", logits and truth of one shape."""
    assert logits.shape == correct.shape, f"halting: {logits.shape} against {correct.shape}"
    return F.binary_cross_entropy_with_logits(logits, correct.to(logits.dtype), reduction="sum")


def learns_by_muon(name: str, parameter: nn.Parameter) -> bool:
    """HRM's hidden matrices and LoRA's factors take Muon; HRM's zero projections, heads, learned tokens take AdamW."""
    if ".lora_A." in name or ".lora_B." in name:
        return parameter.ndim == 2

    # Muon's steps have one size; what begins at zero must leave it slowly.
    inner = name.removeprefix(ADDON_PREFIX)
    zero_or_head = ("injector.out.", "vocabulary_bias.out.", HALT_HEAD, "verifier.", "injector.memory", "prompt_gate.")
    return parameter.ndim == 2 and inner != name and not (inner + ".").startswith(zero_or_head)


class Trainer(BaseTrainer):
    """Runs one batch (of one or more micro-batches) of the add-on at a time.

    Args:
        config: what a step consists of.
        optim: how weights are moved.
        prompt: how questions are shown; checkpoints record it.
        controller: the frozen LLM with its add-on.
        accelerator, precision: as `BaseTrainer` takes them.
        answer_verdicts: maps a batch to (B,) floats, the task verifier's verdict on answers generated now; needed
            with a `verifier_weight`.

    Raises:
        HostError: there is nothing to train.
    """

    stem = ADAPTER
    autocast_backward = True  # LoRA's gradients in bf16 depend on it, and runs repeat bit for bit

    def __init__(
        self,
        config: AddonStepConfig,
        optim: OptimConfig,
        prompt: PromptConfig,
        controller: AdapterController,
        accelerator: Any,
        precision: str,
        answer_verdicts: Any = None,
    ):
        parameters = controller.addon_parameters()
        if not parameters and controller.config.adapter != "none":
            raise HostError("nothing to train: the add-on has no trainable parameter")

        optimizers = build_optimizers(optim, parameters, learns_by_muon)
        super().__init__(optim, controller, SegmentLoss(controller), accelerator, precision, parameters, optimizers)
        self.config = config
        self.prompt = prompt
        self.more_documents: dict[str, str] = {}  # file name -> text that checkpoints are to keep beside the adapter's
        self.frame: Frame | None = None  # what is written around each question, where checkpoints are to keep it
        self.controller = controller
        self.answer_verdicts = answer_verdicts
        self.retained: Retained | None = None  # other text, which the LLM is to answer as before
        # What a batch becomes before its segments; a cache may stand in.
        self.encode: Callable[[Batch], Any] = controller.encode

    def weights(self) -> dict[str, Tensor]:
        """The adapter's, never the LLM's, by the names that a checkpoint has for them."""
        return adapter_weights(self.controller)

    def documents(self) -> dict[str, str]:
        """The adapter's description, from which it can be rebuilt, and what the run adds."""
        described = adapter_documents(self.controller, self.prompt, self.frame, self.precision)
        return {**described, **self.more_documents}

    def load(self, saved: Checkpoint, folder: Path) -> None:
        """Raises ValueError for another base model or another shape."""
        document = record_of(saved.documents)
        check_fingerprint(self.controller.host, document, folder)
        check_adapter(self.controller, document, folder)
        tensors = own_names(saved.tensors[ADAPTER])

        # A head that nothing has trained is no part of what was learnt: a next stage begins it.
        if self.config.use_act and not document.get("hrm", {}).get("use_act", True):
            tensors |= {name: value for name, value in self.weights().items() if HALT_HEAD in name}
        self.controller.load_addon_state(tensors)

    # --- a step ---

    def step(self, batches: Sequence[Batch], step: int, lr: float) -> dict[str, float]:
        """All segments of batch `step`, whose micro-batches are `batches`; returns its metrics.

        Raises:
            NonFiniteError: before the optimizer step that would have spoilt the weights.
        """
        self.begin(step, lr)
        verdicts = self._verdicts(batches, step)
        self.wrapped.train()

        # Losses are sums over the global batch, divided by its counts, however it is cut.
        answer_tokens = [int((batch.labels != IGNORE).sum()) for batch in batches]
        counts = [[tokens, len(batch.examples)] for tokens, batch in zip(answer_tokens, batches, strict=True)]
        tokens, examples = self.totals(counts)

        # The burn-in: segments whose states alone matter.
        count = self._segments(batches, step) if self.controller.recurrent else 1
        supervised = min(self.config.supervised_segments or count, count)
        horizon = segments_with_gradient(self.config.grad_horizon)
        earlier = min(count - supervised, horizon - 1)
        states = self._encode(batches)
        carries = [None] * len(batches)
        for _ in range(count - supervised - earlier):
            carries = self._advance(states, carries)

        # Each supervised segment is a step of its own; its carry goes on without gradient.
        for segment in range(supervised):
            if segment and self.controller.config.lora_layers:
                states = self._encode(batches)  # the last backward spent the graph, the last step moved the weights
            other = self._other_text(step, count, segment == supervised - 1)
            items = [*other, *zip(batches, states, carries, verdicts, strict=True)]
            metrics, following = self._supervise(items, tokens, examples, earlier)
            metrics["grad_norm"] = self._update(step, metrics["loss"])

            # The next one's gradient runs through as many segments, or through one more where there were fewer.
            if not self.config.carry_state:
                carries = [None] * len(batches)
            elif horizon == 1:
                carries = following
            elif earlier < horizon - 1:
                earlier += 1
            elif segment + 1 < supervised:
                carries = self._advance(states, carries)

        if "halt_square" in metrics:
            # Var p = E p^2 - (E p)^2, over the examples of the batch; rounding may take it below zero.
            variance = metrics.pop("halt_square") - metrics["halt_probability"] ** 2
            metrics["halt_deviation"] = max(variance, 0.0) ** 0.5
        seen = {"segments": count, "tokens": tokens, "examples": examples}
        return {**metrics, **self._padding(batches), "lr": lr, **seen}

    def _padding(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The share of the global batch that is padding, where batches are made to have little."""
        if not self.config.batch_tokens:
            return {}
        tokens, columns = self.totals([[batch.tokens, batch.columns] for batch in batches])
        return {"padding": 1 - tokens / columns}

    def _segments(self, batches: Sequence[Batch], step: int) -> int:
        """How many segments batch `step` has, alike on all ranks."""
        needed = 1
        if self.config.segments_sampling in ("steps", "item"):
            own = max(hardest(batch.examples) for batch in batches)
            most = int(self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).max())
            needed = most or NO_LIMIT  # of the global batch no item says its steps
        return segments_of_step(self.config, step, self.progress, needed)

    def _encode(self, batches: Sequence[Batch]) -> list[Any]:
        with self.autocast():
            states = [self.encode(batch) for batch in batches]
        if self.config.segments_sampling == "item":
            for state, batch in zip(states, batches, strict=True):
                state.context.needed = needed_segments(batch.examples).to(batch.labels.device)
        return states

    @torch.no_grad()
    def _advance(self, states: list[Any], carries: list[Any]) -> list[Any]:
        """The carries after one segment without gradient."""
        with self.autocast():
            pairs = zip(states, carries, strict=True)
            return [self.controller.model.advance(s.features, s.context, carry) for s, carry in pairs]

    def _supervise(self, items: list[tuple], tokens: int, examples: int, earlier: int
                   ) -> tuple[dict[str, float], list[Any]]:
        """Gradients of one segment, over micro-batches given as (batch, states, carry, verdict).

        One of other text is given as (batch, segments).

        They run through `earlier` segments before it. Returns the metrics of the global batch, which has `tokens`
        answer tokens and `examples`, and the carries.
        """
        world = self.accelerator.num_processes
        following = []
        has_other = len(items[0]) == 2

        def loss_of(item: tuple) -> MicroLoss:
            if len(item) == 2:
                return self._retain_loss(*item)
            batch, state, carry, verdict = item
            out = self.wrapped(state, batch.labels, carry, tokens / world, earlier)
            following.append(out.carry and out.carry.detach())
            return self._total_loss(out, verdict, examples / world, has_other)

        return self.accumulate(items, loss_of), following

    def _other_text(self, step: int, count: int, is_last: bool) -> list[tuple[Batch, int]]:
        """What `--retain` adds to a segment of batch `step`, which has `count`: this process's texts, with the last."""
        if self.retained is None or not is_last:
            return []
        return [(self.retained.batch(step, self.accelerator.process_index).to(self.accelerator.device), count)]

    def _retain_loss(self, batch: Batch, count: int) -> MicroLoss:
        """How far the answers to other text are from the bare LLM's after `count` segments; the last one learns."""
        with torch.autocast(self.accelerator.device.type, enabled=False):  # the bare LLM has its own precision
            bare = bare_log_probs(self.controller, batch)
        states = self.controller.encode(batch)
        carry = None
        for _ in range(count - 1):
            (carry,) = self._advance([states], [carry])
        out = self.wrapped(states, batch.labels, carry, 1.0, 0)

        # A mean over the tokens of this process; DDP takes the mean over processes. Heads take part in every backward.
        moved = divergence(out.logits, bare) / max(len(bare), 1)
        loss = self.config.retain_weight * moved
        parts = {"retain_loss": moved.detach()}
        if "gate_distance" in out.metrics:
            distance = out.metrics["gate_distance"]
            loss = loss + gate_loss(distance, is_open=False) / len(distance)
            parts["gate_open_other"] = open_gates(distance) / len(distance)
        for name in ("halt_logits", "verdict_logits"):
            if name in out.metrics:
                loss = loss + 0.0 * out.metrics[name].sum()
        return MicroLoss(loss, parts)

    def _total_loss(self, out: Any, verdict: Tensor | None, examples: float, has_other: bool) -> MicroLoss:
        """Answer loss plus the heads' losses. `out` is of one micro-batch, `examples` are those of the global batch.

        The gate learns to be open where it learns on other text (`has_other`) to be shut.
        """
        loss = out.loss
        metrics = out.metrics
        parts = {"answer_loss": out.loss.detach(), "teacher_forced_exact": metrics["correct"].sum() / examples}

        if self.config.use_act:
            # The head learns whether the answer is right as it stands; the penalty asks it to halt early.
            logits = metrics["halt_logits"].float()
            halting = halting_loss(logits, metrics["correct"]) / examples
            if "earlier_correct" in metrics:
                # All segments that ran weigh alike, as halting looks at each of them.
                earlier = halting_loss(metrics["earlier_halt_logits"].float(), metrics["earlier_correct"]) / examples
                halting = (halting + earlier) / (1 + len(metrics["earlier_correct"]))
            penalty = (1 - logits.sigmoid()).sum() / examples
            loss = loss + halting + self.config.act_penalty * penalty
            chance = logits.detach().sigmoid()
            parts["halt_loss"] = halting.detach()
            parts["halt_probability"] = chance.sum() / examples
            parts["halt_square"] = chance.square().sum() / examples

        if "gate_distance" in metrics:
            near = gate_loss(metrics["gate_distance"], is_open=True) / examples
            loss = loss + float(has_other) * near  # every parameter takes part in every backward, as DDP expects
            parts["gate_open"] = open_gates(metrics["gate_distance"]) / examples

        if "verdict_logits" in metrics:
            logits = metrics["verdict_logits"].float()
            loss = loss + 0.0 * logits.sum()  # every parameter takes part in every backward, as DDP expects
            if verdict is not None:
                assert logits.shape == verdict.shape, f"verifier: {logits.shape} against {verdict.shape}"
                judged = F.binary_cross_entropy_with_logits(logits, verdict, reduction="sum") / examples
                loss = loss + self.config.verifier_weight * judged
                parts["verifier_loss"] = judged.detach()
                parts["generated_solved"] = verdict.sum() / examples
        return MicroLoss(loss, {"loss": loss.detach(), **parts})

    def _verdicts(self, batches: Sequence[Batch], step: int) -> list[Tensor | None]:
        """(B,) verdicts of each micro-batch; None in the steps between."""
        if not self.config.verifier_weight or step % self.config.verifier_every:
            return [None] * len(batches)
        return [self.answer_verdicts(batch) for batch in batches]
