"""What an evaluation of the add-on is: generated answers to held-out items, verified, beside those of the bare LLM."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate.utils import gather_object

from addon.items import AddonData
from batching import Batch
from engine.machine import Machine
from engine.optimization import BaseTrainer
from engine.report import Report, format_table
from engine.system import Evaluator
from evaluation import Answer, Decoding, Evaluation, answer, evaluate
from model import AdapterController
from reasoning_gym_wrapper import Example
from tasks.chance import chance_notes


class AddonEvaluator(Evaluator):
    """Generated answers to the held-out items, verified by their tasks, beside those of the bare LLM.

    The bare LLM does not learn: it is asked once for each set of items.
    """

    def __init__(
        self, data: AddonData, model: AdapterController, trainer: BaseTrainer, decoding: Decoding, machine: Machine
    ):
        self.data = data
        self.model = model
        self.trainer = trainer
        self.decoding = decoding
        self.machine = machine
        self._bare: list[Answer] | None = None
        self._bare_examples: list[Example] | None = None  # the items that `_bare` answers

    def evaluate(self, step: int) -> Report:
        """Generates and verifies on the whole evaluation set, shared among ranks."""
        # A curriculum that went up has other items, whose bare answers nobody knows yet.
        examples = self.data.eval_examples
        mine = slice(self.machine.rank, None, self.machine.world)
        own_bare = None
        if self._bare is not None and self._bare_examples is examples:
            own_bare = self._bare[mine]

        # One limit for all ranks, whose shares of the items have different longest targets.
        decoding = replace(self.decoding, max_new_tokens=self.data.budget)
        with self.trainer.evaluation_weights():
            part = evaluate(
                self.model, self.data.format, examples[mine], decoding, own_bare, self.trainer.autocast()
            )

        self._bare = self._gathered(part.bare)
        self._bare_examples = examples
        chances = self.data.chances() if self.machine.is_main else {}
        return self._report(Evaluation(self._gathered(part.answers), self._bare, chances))

    def _gathered(self, answers: list[Answer]) -> list[Answer]:
        """The answers of all ranks in the order of the evaluation set, given those of this rank."""
        if self.machine.world == 1:
            return answers

        # Examples hold verifiers, which do not travel between processes: their numbers do.
        examples = self.data.eval_examples
        mine = range(self.machine.rank, len(examples), self.machine.world)
        packed = []
        for index, given in zip(mine, answers, strict=True):
            verdict = (given.score, given.finished, given.raised, given.segments, given.timed_out, given.refused)
            packed.append((index, given.text, *verdict))
        everyone = sorted(gather_object(packed))
        return [Answer(examples[index], *verdict) for index, *verdict in everyone]

    def _report(self, evaluation: Evaluation) -> Report:
        """What the loop writes down and shows of an evaluation."""
        curriculum = self.data.curriculum
        rows = evaluation.rows()
        value = evaluation.solved_rate()
        notes = ["solved = generated answer scored exactly 1.0 by the task's verifier, Wilson 95 % interval"]

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
        cut = sum(not answer.finished for answer in evaluation.answers)
        errors = sum(answer.raised for answer in evaluation.answers)
        late = sum(answer.timed_out for answer in evaluation.answers)
        if cut:
            notes.append(f"{cut} answers were cut at the token limit")
        if errors:
            notes.append(f"the scorer raised on {errors} answers, counted as wrong")
        if late:
            notes.append(f"{late} answers ran out of time (--score_timeout_s), counted as wrong")

        # What was neither trained on nor asked, and what a scorer alone would have called right.
        refused = sum(answer.refused for answer in evaluation.answers)
        if refused:
            notes.append(f"{refused} answers of a full score were refused (--verifier_strict 1), counted as wrong")
        notes += self.data.left_out_notes()

        if evaluation.chances:
            notes += chance_notes(evaluation.chances)

        # The heading of the model's column names its adapter.
        label = f"LLM + {self.model.title}"
        table = format_table([{**row, "label": label} for row in evaluation.table()])
        return Report(
            rows=rows,
            predictions=evaluation.predictions(),
            table=table,
            value=value,
            notes="; ".join(notes),
            question=self.data.eval_examples[0].question,
            details=evaluation,
        )

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
