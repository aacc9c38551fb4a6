"""What an evaluation of the add-on is: generated answers to held-out items, verified, beside those of the bare LLM."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from accelerate.utils import gather_object

from addon.bare import BareAnswers, BareLLM
from addon.held_out import held_out_loss
from addon.items import AddonData
from batching import Batch
from engine.machine import Machine
from engine.optimization import BaseTrainer
from engine.report import Report, format_table, metric_row
from engine.system import Evaluator
from evaluation import Answer, Decoding, Evaluation, answer, evaluate
from model import AdapterController
from reasoning_gym_wrapper import Example
from tasks.chance import chance_notes
from text_data.taken import TEXT

GENERIC = "its last number did (no number asked for: its box, tag or bare text)"
# What is taken out of a text by --answer_from, for people.
TAKEN = {
    "text": GENERIC,
    "last_number": GENERIC,
    "tags": "what its last <answer> tag holds did",
    "boxed": r"what its last \boxed{} holds did",
}


class AddonEvaluator(Evaluator):
    """Generated answers to the held-out items, verified by their tasks, beside those of the bare LLM.

    The bare LLM does not learn: it is asked once for each set of items. With `measures_loss` the loss on their gold
    answers is measured as well.
    """

    def __init__(
        self, data: AddonData, model: AdapterController, trainer: BaseTrainer, decoding: Decoding, machine: Machine,
        bare: BareLLM, measures_loss: bool = False,
    ):
        self.data = data
        self.measures_loss = measures_loss
        self.bare = bare
        self.model = model
        self.trainer = trainer
        self.decoding = decoding
        self.machine = machine
        self._bare = BareAnswers()  # of all ranks
        self._bare_examples: list[Example] | None = None  # the items that `_bare` answers

    def evaluate(self, step: int) -> Report:
        """Generates and verifies on the whole evaluation set, shared among ranks."""
        examples = self.data.eval_examples
        mine = slice(self.machine.rank, None, self.machine.world)
        self._ask_bare(examples, mine)

        # One limit for all ranks, whose shares of the items have different longest targets.
        decoding = replace(self.decoding, max_new_tokens=self.data.budget)
        with self.trainer.evaluation_weights():
            part = evaluate(
                self.model, self.data.format, examples[mine], decoding, self._bare.plain[mine], self.trainer.autocast()
            )
            nats, tokens = self._held_out_loss(examples[mine])

        chances = self.data.chances() if self.machine.is_main else {}
        answers = self._gathered(part.answers)
        shots = self.bare.config.few_shot
        report = self._report(Evaluation(answers, self._bare.plain, chances, self._bare.few_shot, shots))
        if not tokens:
            return report

        # Of all tasks together: what is watched is one figure.
        row = metric_row(report.details.tasks()[-1], "held_out_loss", nats / tokens, tokens)
        return replace(report, rows=[*report.rows, row], loss=nats / tokens)

    def _held_out_loss(self, examples: list[Example]) -> tuple[float, int]:
        """(summed nats, answer tokens) of the items of all ranks, given those of this one; nothing where not asked."""
        if not self.measures_loss:
            return 0.0, 0
        own = held_out_loss(
            self.model, self.data.format, examples, self.decoding.batch_size, self.trainer.autocast,
            self.data.eval_examples,
        )
        shares = gather_object([own]) if self.machine.world > 1 else [own]
        return sum(nats for nats, _ in shares), sum(tokens for _, tokens in shares)

    def _ask_bare(self, examples: list[Example], mine: slice) -> None:
        """Asks the bare LLM, unless it has answered these items; a curriculum that went up has others."""
        if self._bare_examples is examples:
            return
        with self.trainer.evaluation_weights():
            part = self.bare.answers(self.model, examples[mine], self.decoding)
        few_shot = self._gathered(part.few_shot) if self.bare.config.few_shot else []
        self._bare = BareAnswers(self._gathered(part.plain), few_shot)
        self._bare_examples = examples

    def _gathered(self, answers: list[Answer]) -> list[Answer]:
        """The answers of all ranks in the order of the evaluation set, given those of this rank."""
        if self.machine.world == 1:
            return answers

        # Examples hold verifiers, which do not travel between processes: everything else does.
        examples = self.data.eval_examples
        mine = range(self.machine.rank, len(examples), self.machine.world)
        names = [field.name for field in fields(Answer) if field.name != "example"]
        packed = []
        for index, given in zip(mine, answers, strict=True):
            packed.append((index, {name: getattr(given, name) for name in names}))
        everyone = sorted(gather_object(packed), key=lambda pair: pair[0])
        return [Answer(example=examples[index], **values) for index, values in everyone]

    def _report(self, evaluation: Evaluation) -> Report:
        """What the loop writes down and shows of an evaluation."""
        curriculum = self.data.curriculum
        rows = evaluation.rows()
        value = evaluation.solved_rate()
        notes = self._reading_notes(evaluation)

        # A higher level counts more than a better rate below it, so the mean level is added to the rate.
        if curriculum:
            levels = curriculum.rows()
            rows += levels
            value += sum(row["value"] for row in levels) / max(len(levels), 1)
            notes.append(f"curriculum level: {curriculum.summary()}")
            added = curriculum.added_rows(evaluation.of)
            rows += added
            for row in added:
                notes.append(f"{row['task']}: {100 * row['value']:.1f} % of the {row['n']} items that its level adds")

        # What makes a rate look worse than the model is.
        errors = sum(answer.raised for answer in evaluation.answers)
        late = sum(answer.timed_out for answer in evaluation.answers)
        if errors:
            notes.append(f"the scorer raised on {errors} answers, counted as wrong")
        if late:
            notes.append(f"{late} answers ran out of time (--score_timeout_s), counted as wrong")

        # What was neither trained on nor asked, and what a scorer alone would have called right.
        refused = sum(answer.refused for answer in evaluation.answers)
        if refused:
            notes.append(f"{refused} answers of a full score were refused (--verifier_strict 1), counted as wrong")
        notes += self.data.left_out_notes()
        if self.data.config.batch_tokens and self.data.batches:
            notes.append(self.data.batches.padding.words())

        if evaluation.chances:
            notes += chance_notes(evaluation.chances)

        # The heading of the model's column names its adapter.
        table = format_table(evaluation.table(f"LLM + {self.model.title}"))
        return Report(
            rows=rows,
            predictions=evaluation.predictions(),
            table=table,
            value=value,
            notes="; ".join(notes),
            question=self.data.eval_examples[0].question,
            details=evaluation,
            tokens={"model": self.data.budget, "bare LLM": self.bare.budget},
        )

    def _reading_notes(self, evaluation: Evaluation) -> list[str]:
        """What the columns of the table mean, and what would be fairer to the bare LLM."""
        way = self.data.format.answer_from
        reading = "strict" if way == TEXT else "extracted"
        limit = f"{self.data.budget} tokens"
        if self.bare.budget != self.data.budget:
            limit += f" (bare LLM: {self.bare.budget})"
        notes = [
            "strict = the whole text scored exactly 1.0 by the task's verifier, Wilson 95 % interval",
            f"extracted = {TAKEN[way]}",
            f"cut at {limit}",
            f"gain = {reading} rate over the bare LLM's best",
        ]

        # An LLM that was never shown the form of the answers explains them, and is cut amid it.
        cut = sum(not answer.finished for answer in evaluation.bare)
        if cut > len(evaluation.bare) / 2 and self.bare.budget == self.data.budget:
            notes.append(
                f"{cut} of {len(evaluation.bare)} bare answers were cut: --bare_max_new_tokens N gives it more room"
            )
        return notes

    def samples(self, turn: int, count: int = 2) -> list[str]:
        """Prompt, target and prediction of `count` evaluation items, others each turn."""
        start = turn * count % len(self.data.eval_examples)
        examples = self.data.eval_examples[start : start + count]

        # The next training step puts the model back into training mode itself.
        self.model.eval()
        with self.trainer.evaluation_weights(), self.trainer.autocast():
            answers = answer(self.model, self.data.format, examples, self.decoding)

        # `repr` keeps every answer on one line of its own.
        texts = []
        for given in answers:
            prompt, target = given.example.question, given.example.target
            texts.append(f"prompt: {prompt!r}\n  target: {target!r}  prediction: {given.text!r}")
        return texts

    def verdicts(self, batch: Batch) -> torch.Tensor:
        """(B,) floats, 1 where the task's verifier calls the answer that the model generates now solved, else 0."""
        # Amid a training step, so with the weights of now and not with the averaged ones.
        was_training = self.model.training
        self.model.eval()
        with self.trainer.autocast():
            answers = answer(self.model, self.data.format, batch.examples, self.decoding)
        self.model.train(was_training)

        return torch.tensor([float(given.solved) for given in answers], device=self.machine.device)
