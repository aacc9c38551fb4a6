"""Generate, verify, count: solved rate with its Wilson interval, per task and overall, beside the bare LLM.

Accuracy is what the model GENERATES, judged by the task's strict rule and its own scorer; solved means that the rule
accepts it at a score of exactly 1.0. Every text is judged as a whole (strict) and by the answer taken out of it
(extracted); `--answer_from` says which of them `solved` is. Of a gold answer nothing is known before the verifier sees
it but whether it is a number.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList

from batching import PromptFormat, needed_segments, pad
from engine.batches import by_length
from engine.confidence import Confidence
from engine.decoding import AnswerConfig, Decoding, Generated, generated_length
from engine.intervals import wilson
from engine.placement import device_of
from engine.report import AnswerLine, TaskLines, metric_row, prediction_line
from engine.sharding import idle_turns
from host import end_ids
from reasoning_gym_wrapper import Example
from tasks.chance import Chance, overall
from verify.reading import read_answer

__all__ = ["AnswerConfig", "Decoding", "Generated"]  # as most that use them know this module

TARGET_MARGIN = 4  # tokens beyond the longest target that an answer may take before it counts as truncated
NO_GOLD_BUDGET = 64  # tokens of an answer where no item has a gold target
IDLE = "1"  # what is asked where only the other processes still have questions
OVERALL = "overall"
READINGS = ("strict", "extracted")  # how a text is judged: as a whole, and by the answer taken out of it


@dataclass(frozen=True)
class Answer:
    """One generated answer and its verdict, by the way that --answer_from names."""

    example: Example
    text: str
    score: float
    finished: bool  # False: cut off at max_new_tokens
    raised: bool  # the scorer raised; the score is 0
    segments: int  # HRM segments spent on it; 0 for the bare LLM
    timed_out: bool = False  # scoring took longer than it may; the score is 0
    refused: bool = False  # the score is full, and the task's strict rule refuses the answer
    strict: bool | None = None  # the whole text is solved; None: as `solved`
    extracted: bool | None = None  # the answer taken out of it is solved; None: as `solved`
    read: str | None = None  # what the score is of, as --answer_from reads it; None: the text
    confidence: float | None = None  # probability that the model gave its tokens, where `Decoding` asks for it

    def solved_by(self, reading: str) -> bool:
        """Whether it is solved by one of `READINGS`."""
        value = getattr(self, reading)
        return self.solved if value is None else value

    @property
    def answer(self) -> str:
        """What the score is of: the text, or the answer taken out of it."""
        return self.text if self.read is None else self.read

    @property
    def solved(self) -> bool:
        """Only a full score that is not refused is a solved item, see `verify.judge.Verdict`."""
        return self.score == 1.0 and not self.refused


@dataclass
class Evaluation:
    """The answers of a model and of the bare LLM on the same items, in the same order, and the level of chance."""

    answers: list[Answer]
    bare: list[Answer] = field(default_factory=list)
    chances: Mapping[str, Chance] = field(default_factory=dict)  # task -> what a constant solves of its items
    few_shot: list[Answer] = field(default_factory=list)  # the bare LLM's behind solved examples
    shots: int = 0  # how many of them

    def tasks(self) -> list[str]:
        """Task names in order of first appearance, then `overall` where there are several."""
        names = list(dict.fromkeys(answer.example.task for answer in self.answers))
        if len(names) > 1:
            names.append(OVERALL)
        return names

    def of(self, task: str, bare: bool = False) -> list[Answer]:
        """The answers to one task's items, or to all with `overall`; with `bare` those of the bare LLM."""
        return of_task(self.bare if bare else self.answers, task)

    def rows(self) -> list[dict[str, Any]]:
        """Long-form CSV rows of each task: a row for each of `METRICS`, for the bare LLM's few-shot prompt, and `gain`.

        A task whose scorer ran out of time has `scorer_timeouts` as well, the share of such answers. `solved` has the
        level of chance beside it where it is known.
        """
        rows = []
        for task in self.tasks():
            ours = self.of(task)
            bare = self.of(task, bare=True)
            n = len(ours)
            used = mean(ours, "segments")
            for metric, measure in METRICS.items():
                value = measure(ours)
                bare_value = measure(bare) if bare else None
                if metric == "scorer_timeouts" and not (value or bare_value):
                    continue
                # Only a count of successes has Wilson's interval.
                interval = wilson(round(value * n), n) if metric.startswith("solved") else None
                row = metric_row(task, metric, value, n, interval=interval, bare=bare_value, segments_used=used)
                if self.chances and metric == "solved":
                    row["chance"] = self.chance(task)
                rows.append(row)
            rows += self._bare_rows(task)
        return rows

    def _bare_rows(self, task: str) -> list[dict[str, Any]]:
        """Rows of what the bare LLM alone was given, and of the gain over its best protocol."""
        if not self.bare:
            return []
        rows = []
        shown = of_task(self.few_shot, task)
        for reading in READINGS if shown else ():
            value = rate_by(shown, reading)
            interval = wilson(round(value * len(shown)), len(shown))
            rows.append(metric_row(task, f"bare_few_shot_{reading}", value, len(shown), interval=interval))
        if shown:
            rows.append(metric_row(task, "bare_few_shot_truncated", truncated_rate(shown), len(shown)))

        ours = self.of(task)
        _, best = self.best_bare(task)
        gain = solved_rate(ours) - best
        rows.append(metric_row(task, "gain", gain, len(ours), bare=best, segments_used=mean(ours, "segments")))
        return rows

    def best_bare(self, task: str) -> tuple[str, float]:
        """(name, rate) of the bare LLM's best protocol: a prompt, and a reading of its answers. The first wins ties."""
        protocols: dict[str, float] = {}
        for prompt, answers in (("", self.bare), (f"{self.shots}-shot ", self.few_shot)):
            given = of_task(answers, task)
            if given:
                protocols |= {prompt + reading: rate_by(given, reading) for reading in READINGS}
        name = max(protocols, key=protocols.__getitem__)
        return name, protocols[name]

    def chance(self, task: str) -> float:
        """Share of a task's items, or of all with `overall`, that the best constant answers solve."""
        if task == OVERALL:
            return overall(self.chances)
        return self.chances[task].rate

    def table(self, label: str = "LLM + HRM") -> list[TaskLines]:
        """The closing table; `label` names the model."""
        tasks = []
        for task in self.tasks():
            given = {"bare LLM": self.bare, f"bare, {self.shots}-shot": self.few_shot, label: self.answers}
            lines = []
            for name, answers in given.items():
                mine = of_task(answers, task)
                if mine:
                    lines.append(counted(name, mine))

            chance = self.chance(task) if self.chances else None
            gain, over = None, ""
            if self.bare:
                over, best = self.best_bare(task)
                gain = solved_rate(self.of(task)) - best
            tasks.append(TaskLines(task, lines, gain, over, chance))
        return tasks

    def predictions(self) -> list[dict[str, Any]]:
        """One line per item, for paired statistics; `refused` stands in lines of full scores that are refused."""
        lines = []
        seen: dict[str, int] = {}  # items of each task so far
        nothing: list[Answer | None] = [None] * len(self.answers)
        for answer, other, shown in zip(
            self.answers, self.bare or nothing, self.few_shot or nothing, strict=True
        ):
            task = answer.example.task
            index = seen.get(task, 0)
            seen[task] = index + 1
            beside = {"bare_score": None} | answer_fields("bare_", other) | answer_fields("few_shot_", shown)
            own = {"answer": answer.answer, "segments_used": answer.segments, "finished": answer.finished}
            item = answer.example
            line = prediction_line(task, index, item.question, answer.text, answer.score, item.target, **own, **beside)
            lines.append(line | remarks("", answer))
        return lines

    def solved_rate(self, bare: bool = False) -> float:
        """Share of solved items over all tasks; with `bare` the bare LLM's."""
        return solved_rate(self.bare if bare else self.answers)


def remarks(whose: str, answer: Answer) -> dict[str, bool]:
    """Fields of a prediction line that are mostly absent; `whose` begins their names.

    They say that the strict rule refuses a full score, and that an answer is solved once it is taken out of its text.
    """
    fields = {}
    if answer.refused:
        fields[f"{whose}refused"] = True
    if answer.solved_by("extracted") and not answer.solved_by("strict"):
        fields[f"{whose}extracted"] = True
    return fields


def answer_fields(whose: str, answer: Answer | None) -> dict[str, Any]:
    """Fields of a prediction line for an answer beside the model's own; none where there is no such answer."""
    if answer is None:
        return {}
    fields = {"score": answer.score, "prediction": answer.text, "answer": answer.answer}
    return {whose + name: value for name, value in fields.items()} | remarks(whose, answer)


def of_task(answers: Sequence[Answer], task: str) -> list[Answer]:
    """The answers to one task's items, or all with `overall`."""
    return [answer for answer in answers if task in (OVERALL, answer.example.task)]


def counted(name: str, answers: Sequence[Answer]) -> AnswerLine:
    """The line of the closing table of these answers, given by what `name` says."""
    strict, extracted = (sum(answer.solved_by(reading) for answer in answers) for reading in READINGS)
    cut = sum(not answer.finished for answer in answers)
    return AnswerLine(name, len(answers), strict, extracted, cut)


def rate_by(answers: Sequence[Answer], reading: str) -> float:
    """Share of answers that are solved by one of `READINGS`."""
    return sum(answer.solved_by(reading) for answer in answers) / len(answers)


def mean(answers: Sequence[Answer], name: str) -> float:
    """Mean of one attribute of `Answer`; of a bool the share of True."""
    return sum(getattr(answer, name) for answer in answers) / len(answers)


def count_solved(answers: Sequence[Answer]) -> int:
    """How many answers are solved."""
    return sum(answer.solved for answer in answers)


def solved_rate(answers: Sequence[Answer]) -> float:
    """Share of answers that are solved."""
    return count_solved(answers) / len(answers)


def truncated_rate(answers: Sequence[Answer]) -> float:
    """Share of answers that were cut off at the token limit."""
    return sum(not answer.finished for answer in answers) / len(answers)


METRICS: dict[str, Callable[[Sequence[Answer]], float]] = {
    "solved": solved_rate,
    "mean_score": functools.partial(mean, name="score"),
    "truncated": truncated_rate,
    "scorer_errors": functools.partial(mean, name="raised"),
    "scorer_timeouts": functools.partial(mean, name="timed_out"),
    "solved_strict": functools.partial(rate_by, reading="strict"),
    "solved_extracted": functools.partial(rate_by, reading="extracted"),
}


# --- generating and verifying -----------------------------------------------------------------------------------------


def answer_budget(prompt_format: PromptFormat, examples: Sequence[Example], max_new_tokens: int) -> int:
    """Tokens an answer may have: max_new_tokens, or with 0 the longest gold target plus a margin.

    Without any gold answer it is `NO_GOLD_BUDGET`.
    """
    if max_new_tokens:
        return max_new_tokens
    golds = [example.target for example in examples if example.target is not None]
    if not golds:
        return NO_GOLD_BUDGET
    return max(map(len, prompt_format.targets(golds))) + TARGET_MARGIN


def nobody(done: int) -> None:
    """The `progress` of a call that nobody watches."""


@torch.no_grad()
def answer(
    model: Any,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    decoding: Decoding,
    progress: Callable[[int], None] = nobody,
    thinks: bool = True,
) -> list[Answer]:
    """Answers of any model with transformers' `generate`, in the order of `examples`.

    Args:
        model: a causal LM, with or without an adapter.
        prompt_format: how its questions are shown.
        examples: what is asked; batched by prompt length.
        decoding: how answers are generated. The caller's random state is left as it was: sampling draws from `seed`.
        progress: called with the number of answers so far, after each batch.
        thinks: asks an HRM model to report the segments it used.
    """
    budget = answer_budget(prompt_format, examples, decoding.max_new_tokens)
    device = device_of(model)
    done = 0

    def answer_batch(batch: list[Example]) -> list[Answer]:
        nonlocal done
        answers = _answer_batch(model, prompt_format, batch, budget, decoding, device, thinks)
        done += len(answers)
        progress(done)
        return answers

    lengths = prompt_format.prompt_lengths(examples)
    idle = idle_turns(model, -(-len(examples) // decoding.batch_size))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(decoding.seed)
        answers = by_length(examples, lengths, decoding.batch_size, answer_batch)
        for _ in range(idle):
            generate_answers(model, prompt_format, [IDLE], 1, decoding, device)
        return answers


def _answer_batch(
    model: Any,
    prompt_format: PromptFormat,
    examples: list[Example],
    budget: int,
    decoding: Decoding,
    device: torch.device,
    thinks: bool,
) -> list[Answer]:
    """Answers of one batch, scored."""
    log: list[torch.Tensor] = []  # one entry, (B,) segments used, of a model that thinks
    extra: dict[str, Any] = {"segments_log": log} if thinks else {}
    if thinks and decoding.item_segments:
        extra["segments_needed"] = needed_segments(examples).to(device)
    questions = [example.question for example in examples]
    texts = generate_answers(model, prompt_format, questions, budget, decoding, device, **extra)
    used = log[0].tolist() if log else [0] * len(examples)

    answers = []
    for example, generated, segments in zip(examples, texts, used, strict=True):
        read = read_answer(example.verify, generated.text, example.target, prompt_format.answer_from)
        verdict = read.verdict
        answers.append(
            Answer(
                example, generated.text, verdict.score, generated.finished, verdict.raised, segments,
                verdict.timed_out, verdict.refused, read.strict, read.extracted, read.answer, generated.confidence,
            )
        )
    return answers


def stop_ids(model: Any, prompt_format: PromptFormat) -> list[int]:
    """Ids at which an answer of `model` stops and is cut: all that its family names, and the end of the targets."""
    return sorted(end_ids(model, prompt_format.tokenizer) | prompt_format.ends)


def generate_answers(
    model: Any, prompt_format: PromptFormat, questions: Sequence[str], budget: int, decoding: Decoding,
    device: torch.device, **extra: Any,
) -> list[Generated]:
    """Answers of at most `budget` tokens to `questions`, in one batch on `device`; `extra` goes to `generate`."""
    prompt_ids, prompt_mask = pad(prompt_format.prompts(questions), prompt_format.pad_id, "left")
    ends = stop_ids(model, prompt_format)

    # transformers needs the tokenizer to see the sentinel in what it has generated.
    stops = list(extra.pop("stop_strings", ()))
    if prompt_format.sentinel:
        stops.append(prompt_format.sentinel)
    if stops:
        extra |= {"stop_strings": stops, "tokenizer": prompt_format.tokenizer}
    confidence = Confidence() if decoding.confidence else None
    if confidence:
        extra["logits_processor"] = LogitsProcessorList([*extra.get("logits_processor", ()), confidence])
    out = model.generate(
        input_ids=prompt_ids.to(device),
        attention_mask=prompt_mask.to(device),
        max_new_tokens=budget,
        pad_token_id=prompt_format.pad_id,
        eos_token_id=ends,
        **decoding.arguments(),
        **extra,
    )

    # Behind its end a row is padding.
    rows = out[:, prompt_ids.shape[1] :]
    tokens = [generated_length(row.tolist(), ends, prompt_format.pad_id) for row in rows]
    texts = [prompt_format.answer_text(row, ends) for row in rows]
    sure = confidence.of(tokens) if confidence else [None] * len(rows)
    return [Generated(*text, count, chance) for text, count, chance in zip(texts, tokens, sure, strict=True)]


@torch.no_grad()
def generate_all(
    model: Any, prompt_format: PromptFormat, questions: Sequence[str], decoding: Decoding, **extra: Any
) -> list[Generated]:
    """Answers to bare questions, without a verifier; `extra` goes to `generate`."""
    torch.manual_seed(decoding.seed)
    return generate_answers(
        model, prompt_format, questions, decoding.max_new_tokens, decoding, device_of(model), **extra
    )


def generate_texts(
    model: Any, prompt_format: PromptFormat, questions: Sequence[str], decoding: Decoding, **extra: Any
) -> list[str]:
    """The texts of `generate_all`."""
    return [generated.text for generated in generate_all(model, prompt_format, questions, decoding, **extra)]


def evaluate(
    model: Any,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    decoding: Decoding,
    bare: list[Answer] | None = None,
    autocast: contextlib.AbstractContextManager | None = None,
    progress: Callable[[int], None] = nobody,
) -> Evaluation:
    """The model's answers beside the bare LLM's on the same items; `bare` hands in answers already known.

    The bare LLM decodes by the same rules from the same prompts, in its own dtype; `autocast` is the context of the
    model's answers alone. `progress` is called as `answer` calls it.
    """
    was_training = model.training
    model.eval()
    try:
        if bare is None:
            with model.bare() as host:
                bare = answer(host, prompt_format, examples, decoding, thinks=False)
        with autocast or contextlib.nullcontext():
            return Evaluation(answer(model, prompt_format, examples, decoding, progress), bare)
    finally:
        model.train(was_training)
