"""What the weights of the hybrid are worth: loss of every split, and generated answers to held-out additions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional

from engine.batches import IGNORE
from engine.intervals import wilson
from engine.machine import Machine
from engine.optimization import BaseTrainer
from engine.report import Report, metric_row, percent, prediction_line, text_table
from engine.stopping import stop_point
from engine.system import Evaluator
from hybrid.data import SYNTHETIC, HybridData, validation_batches
from hybrid.model import HybridModel
from hybrid.text import HybridText
from text_data.triples import PreparedData, Triple

VALIDATION = "validation"
LONGEST_SAMPLE = 64  # tokens generated for a sample that is shown
SHOWN = 200  # characters of a sample's prompt, target and prediction


@dataclass(frozen=True)
class SplitLoss:
    """Loss over the labelled tokens of one split.

    Attributes:
        loss: mean over the tokens, in nats.
        tokens: labelled tokens.
        samples: rows of the split.
        cycles: mean HRM cycles of a sample; None with the gate shut.
        diagnostics: of gate, halting and z_H over the samples, by name; empty with the gate shut.
    """

    loss: float
    tokens: int
    samples: int
    cycles: float | None
    diagnostics: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss), finite for any finite loss."""
        return math.exp(min(self.loss, 700.0))


@dataclass
class HybridEvaluation:
    """Validation and dev sets by name, and the generated answers of the synthetic task."""

    splits: dict[str, SplitLoss]
    answers: list[tuple[str, str, str]]  # (prompt, gold, generated)

    @property
    def solved(self) -> int:
        """Answers that are the gold one, letter for letter."""
        return sum(gold == text for _, gold, text in self.answers)

    def rows(self) -> list[dict[str, Any]]:
        """Long-form CSV rows."""
        rows = []
        for name, split in self.splits.items():
            # Losses are means over tokens, diagnostics over samples.
            losses = {"loss": split.loss, "perplexity": split.perplexity}
            for metric, value in losses.items():
                rows.append(metric_row(name, metric, value, split.tokens, segments_used=split.cycles))
            for metric, value in split.diagnostics.items():
                rows.append(metric_row(name, metric, value, split.samples, segments_used=split.cycles))

        n = len(self.answers)
        if n:
            cycles = self.splits[VALIDATION].cycles
            interval = wilson(self.solved, n)
            rows.append(metric_row(SYNTHETIC, "solved", self.solved / n, n, interval=interval, segments_used=cycles))
        return rows

    def predictions(self) -> list[dict[str, Any]]:
        """One line per held-out addition."""
        lines = []
        for index, (prompt, gold, text) in enumerate(self.answers):
            lines.append(prediction_line(SYNTHETIC, index, prompt, text, float(text == gold), gold))
        return lines

    def table(self) -> str:
        """The evaluation for people."""
        cells = [("set", "samples", "tokens", "loss", "perplexity", "cycles")]
        for name, split in self.splits.items():
            cycles = "-" if split.cycles is None else f"{split.cycles:.2f}"
            loss = f"{split.loss:.4f}"
            cells.append((name, str(split.samples), str(split.tokens), loss, f"{split.perplexity:.2f}", cycles))
        text = text_table(cells, "<>>>>>", (16, 7, 7, 7, 10, 6))

        n = len(self.answers)
        if n:
            rate = percent(self.solved / n, wilson(self.solved, n))
            text += f"\n{SYNTHETIC}: {self.solved} of {n} held-out additions solved, generated: {rate}"
        return text


@dataclass(frozen=True)
class HybridEvalConfig:
    """How much an evaluation reads and writes; each field is the flag of its name.

    eval_batch_size: samples of a batch on one rank.
    max_val_samples: samples of each split that are read; 0 = all.
    max_new_tokens: tokens of a generated answer; 0 = 8, more than any sum has.
    """

    eval_batch_size: int = 64
    max_val_samples: int = 0
    max_new_tokens: int = 0


class HybridEvaluator(Evaluator):
    """Loss over the validation split and each dev set, and the synthetic task's generated answers.

    `text` is the model as text in, text out; None where the data have no tokenizer, and so no text.
    """

    def __init__(
        self, config: HybridEvalConfig, data: HybridData, model: HybridModel, trainer: BaseTrainer,
        text: HybridText | None, machine: Machine,
    ):
        self.config = config
        self.data = data
        self.model = model
        self.trainer = trainer
        self.text = text
        self.machine = machine

    @torch.no_grad()
    def evaluate(self, step: int) -> Report:
        """Every split in order; each rank takes its share of the rows.

        Raises:
            ValueError: a split without a good line.
        """
        # The model's mode and weights are put back: training goes on from them.
        was_training = self.model.training
        self.model.eval()
        with self.trainer.evaluation_weights():
            sets = {VALIDATION: self.data.val, **self.data.dev}
            losses = {name: self._split_loss(split) for name, split in sets.items()}
            evaluation = HybridEvaluation(losses, self._answers())
        self.model.train(was_training)

        # Only the synthetic task has a question that a user could ask again.
        question = None
        if self.data.questions:
            question = self.data.questions[0][0]
        loss = evaluation.splits[VALIDATION].loss
        solved = None
        if evaluation.answers:
            solved = evaluation.solved / len(evaluation.answers)
        return Report(
            rows=evaluation.rows(),
            predictions=evaluation.predictions(),
            table=evaluation.table(),
            value=-loss,  # more is better
            question=question,
            details=evaluation,
            solved=solved,
            loss=loss,
        )

    def _split_loss(self, split: PreparedData | Sequence[Triple]) -> SplitLoss:
        """Loss and diagnostics over one split."""
        machine = self.machine
        batches = validation_batches(
            split,
            self.config.eval_batch_size,
            self.data.pad_id,
            self.config.max_val_samples,
            machine.rank,
            machine.world,
        )

        # Sums over this rank's batches, in float64 as Python adds.
        loss_sum = 0.0  # nats
        tokens = 0
        rows: list[tuple[float, ...]] = []  # (cycles, gate, halting sum, norm of z_H) of each sample
        for batch in batches:
            stop_point()
            losses, labelled, diagnostics = self._batch_loss(batch)
            loss_sum += losses
            tokens += labelled
            rows += diagnostics

        # Sums of the whole split, in the order of the ranks.
        if machine.world > 1:
            shares = gather_object([(loss_sum, tokens, rows)])
            loss_sum = sum(share[0] for share in shares)
            tokens = sum(share[1] for share in shares)
            rows = [row for share in shares for row in share[2]]
        if not rows:
            raise ValueError(f"{split.path} has no good line: see them with scripts/validate_dataset.py")

        # Halting and gate are the whole split's, so their spread is not a mean of batches' spreads.
        loss = loss_sum / max(tokens, 1)
        if self.model.config.gate_scale == 0:
            return SplitLoss(loss, tokens, len(rows), None)
        cycles, gate, halt, norm = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
        diagnostics = {
            "gate_mean": float(gate.mean()),
            "gate_min": float(gate.min()),
            "gate_max": float(gate.max()),
            "halt_sum_mean": float(halt.mean()),
            "halt_sum_std": float(halt.std(correction=0)),
            "z_norm": float(norm.mean()),
        }
        return SplitLoss(loss, tokens, len(rows), float(cycles.mean()), diagnostics)

    def _batch_loss(self, batch: dict[str, Tensor]) -> tuple[float, int, list[tuple[float, ...]]]:
        """(summed loss in nats, labelled tokens, one row of diagnostics for each sample) of one batch."""
        # The encoder runs on its own, since the model's output leaves out what it says of gate and halting.
        batch = {name: tensor.to(self.machine.device) for name, tensor in batch.items()}
        with self.trainer.autocast():
            encoded = self.model.encoder(batch["encoder_ids"], batch["encoder_mask"])
            out = self.model(
                attention_mask=batch["encoder_mask"],
                encoder_outputs=encoded,
                decoder_input_ids=batch["decoder_input_ids"],
            )

        # The loss is added up in float32, whatever the logits are computed in.
        labels = batch["labels"]
        logits = out.logits.float().flatten(0, 1)
        losses = functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
        labelled = int((labels != IGNORE).sum())

        # With the gate shut nothing is computed that could be told: zeros keep the place.
        columns = []
        for values in (encoded.cycles_used, encoded.gate, encoded.halt_sum, encoded.z_norm):
            column = [0.0] * len(labels)
            if values is not None:
                column = values.float().tolist()
            columns.append(column)
        return float(losses), labelled, list(zip(*columns, strict=True))

    def _answers(self) -> list[tuple[str, str, str]]:
        """(prompt, gold, generated) of every held-out addition, shared among ranks, in their order."""
        questions = self.data.questions
        if not questions:
            return []
        mine = range(self.machine.rank, len(questions), self.machine.world)
        prompts = [questions[index][0] for index in mine]
        texts = self.text.generate(prompts, self.config.max_new_tokens or 8)

        # Back into the order of the questions.
        numbered = list(zip(mine, texts, strict=True))
        if self.machine.world > 1:
            numbered = sorted(gather_object(numbered))
        return [(*questions[index], text) for index, text in numbered]

    def samples(self, turn: int, count: int = 2) -> list[str]:
        """The first labels of `count` validation samples beside what the model generates for them."""
        if self.text is None:
            return []
        texts = []
        start = turn * count % len(self.data.val)
        for index in range(start, min(start + count, len(self.data.val))):
            triple = self.data.val[index]

            # Of a prompt the end counts, of an answer the beginning.
            prompt = self.text.decode(triple.encoder_ids)[-SHOWN:]
            target = self.text.decode(triple.labels)[:SHOWN]

            # A little longer than the target, so that one sees whether the model would stop.
            longest = min(len(triple.labels) + 4, LONGEST_SAMPLE)
            with self.trainer.evaluation_weights():
                text = self.text.generate_ids([triple.encoder_ids], longest)[0][:SHOWN]
            texts.append(f"prompt: {prompt!r}\n  target: {target!r}  prediction: {text!r}")
        return texts
