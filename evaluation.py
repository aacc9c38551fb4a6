"""Generate, verify, count: solved rate with its Wilson interval, per task and overall, beside the bare LLM.

Accuracy is what the model GENERATES, scored by the task's own verifier; solved means a score of exactly 1.0. Nothing
here sees a gold answer before the verifier does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from batching import PromptFormat, pad
from engine.intervals import wilson
from engine.report import metric_row, prediction_line
from reasoning_gym_wrapper import Example

TARGET_MARGIN = 4  # tokens beyond the longest target that an answer may take before it counts as truncated
OVERALL = "overall"


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded. temperature 0 is greedy; max_new_tokens 0 is the longest target plus a margin."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 0
    batch_size: int = 128
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `generate`; every sampling field is set, so no host default sneaks in."""
        plain = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        if self.temperature == 0:
            return {**plain, "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {**plain, "do_sample": True, **sampled}


@dataclass(frozen=True)
class AnswerConfig:
    """How `generate.py` puts questions to a checkpoint.

    decoding: how answers are generated, and their greatest length in tokens.
    eval_segments: HRM segments or cycles of an answer; 0 = as trained.
    compare: also answer with what the model is compared with.
    trust_remote_code: run Python code that comes with a hub model.
    """

    decoding: Decoding = Decoding()
    eval_segments: int = 0
    compare: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Answer:
    """One generated answer and its verdict."""

    example: Example
    text: str
    score: float
    finished: bool  # False: cut off at max_new_tokens
    raised: bool  # the scorer raised; the score is 0
    segments: int  # HRM segments spent on it; 0 for the bare LLM

    @property
    def solved(self) -> bool:
        return self.score == 1.0


@dataclass
class Evaluation:
    """The answers of a model and of the bare LLM on the same items, in the same order."""

    answers: list[Answer]
    bare: list[Answer] = field(default_factory=list)

    def tasks(self) -> list[str]:
        """Task names in order of first appearance, then `overall` where there are several."""
        names = list(dict.fromkeys(answer.example.task for answer in self.answers))
        return [*names, OVERALL] if len(names) > 1 else names

    def of(self, task: str, bare: bool = False) -> list[Answer]:
        answers = self.bare if bare else self.answers
        return [answer for answer in answers if task in (OVERALL, answer.example.task)]

    def rows(self) -> list[dict[str, Any]]:
        """Long-form CSV rows: solved, mean_score, truncated and scorer_errors of each task."""
        rows = []
        for task in self.tasks():
            ours = self.of(task)
            bare = self.of(task, bare=True)
            n = len(ours)
            used = sum(a.segments for a in ours) / n
            for metric, measure in METRICS.items():
                interval = None
                if metric == "solved":
                    interval = wilson(sum(a.solved for a in ours), n)
                rows.append(
                    metric_row(
                        task,
                        metric,
                        measure(ours),
                        n,
                        interval=interval,
                        bare=measure(bare) if bare else None,
                        segments_used=used,
                    )
                )
        return rows

    def table(self) -> list[dict[str, Any]]:
        """Rows of the closing table, rates in 0..1."""
        rows = []
        for task in self.tasks():
            ours, bare = self.of(task), self.of(task, bare=True)
            row: dict[str, Any] = {"task": task, "n": len(ours)}
            for prefix, answers in (("", ours), ("bare_", bare)):
                if not answers:
                    continue
                solved = sum(a.solved for a in answers)
                row[prefix + "low"], row[prefix + "high"] = wilson(solved, len(answers))
                row["value" if not prefix else "bare"] = solved / len(answers)
            rows.append(row)
        return rows

    def predictions(self) -> list[dict[str, Any]]:
        """One line per item, which paired statistics need."""
        lines = []
        seen: dict[str, int] = {}  # items of each task so far
        bare: Sequence[Answer | None] = self.bare or [None] * len(self.answers)
        for answer, other in zip(self.answers, bare, strict=True):
            task = answer.example.task
            index = seen.get(task, 0)
            seen[task] = index + 1
            lines.append(
                prediction_line(
                    task,
                    index,
                    answer.example.question,
                    answer.text,
                    answer.score,
                    bare_score=other.score if other else None,
                    segments_used=answer.segments,
                    finished=answer.finished,
                )
            )
        return lines

    def solved_rate(self, bare: bool = False) -> float:
        return solved_rate(self.bare if bare else self.answers)


def solved_rate(answers: Sequence[Answer]) -> float:
    """Share of answers with a score of exactly 1.0."""
    return sum(answer.solved for answer in answers) / len(answers)


METRICS: dict[str, Callable[[Sequence[Answer]], float]] = {
    "solved": solved_rate,
    "mean_score": lambda answers: sum(a.score for a in answers) / len(answers),
    "truncated": lambda answers: sum(not a.finished for a in answers) / len(answers),
    "scorer_errors": lambda answers: sum(a.raised for a in answers) / len(answers),
}


def answer_budget(prompt_format: PromptFormat, examples: Sequence[Example], asked: int) -> int:
    """Tokens an answer may have: as asked, or the longest gold target plus a margin (64 without gold answers)."""
    if asked:
        return asked
    golds = [example.target for example in examples if example.target is not None]
    return max(map(len, prompt_format.targets(golds))) + TARGET_MARGIN if golds else 64


@torch.no_grad()
def answer(
    model: Any,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    decoding: Decoding,
    progress: Callable[[int], None] = lambda done: None,
    thinks: bool = True,
) -> list[Answer]:
    """Answers of any model with transformers' `generate`, in the order of `examples`.

    Examples are batched by prompt length. The caller's random state is left as it was: sampling draws from `seed`.
    `thinks` asks an HRM model to report the segments it used.
    """
    budget = answer_budget(prompt_format, examples, decoding.max_new_tokens)
    lengths = [len(ids) for ids in prompt_format.prompts([example.question for example in examples])]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    found: dict[int, Answer] = {}
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(decoding.seed)
        for start in range(0, len(order), decoding.batch_size):
            chosen = order[start : start + decoding.batch_size]
            answers = _answer_batch(
                model, prompt_format, [examples[i] for i in chosen], budget, decoding, device, thinks
            )
            found.update(zip(chosen, answers, strict=True))
            progress(len(found))
    return [found[i] for i in range(len(examples))]


def _answer_batch(model, prompt_format, examples, budget, decoding, device, thinks) -> list[Answer]:
    """Answers of one batch, scored."""
    log: list[torch.Tensor] = []
    extra = {"segments_log": log} if thinks else {}
    ids = generate_ids(model, prompt_format, [e.question for e in examples], budget, decoding, device, **extra)
    used = log[0].tolist() if log else [0] * len(examples)
    answers = []
    for example, row, segments in zip(examples, ids, used, strict=True):
        text, finished = prompt_format.answer_text(row)
        verdict = example.verify(text)
        answers.append(Answer(example, text, verdict.score, finished, verdict.raised, segments))
    return answers


def generate_ids(
    model: Any, prompt_format: PromptFormat, questions: Sequence[str], budget: int, decoding: Decoding,
    device: torch.device, **extra: Any,
) -> torch.Tensor:
    """(B, at most `budget`) ids generated for `questions`, on `device`; a row is padded behind its end.

    `extra` goes to `generate`.
    """
    tokenizer = prompt_format.tokenizer
    prompt_ids, prompt_mask = pad(prompt_format.prompts(questions), prompt_format.pad_id, "left")
    if prompt_format.sentinel:
        extra |= {"stop_strings": [prompt_format.sentinel], "tokenizer": tokenizer}
    out = model.generate(
        input_ids=prompt_ids.to(device),
        attention_mask=prompt_mask.to(device),
        max_new_tokens=budget,
        pad_token_id=prompt_format.pad_id,
        eos_token_id=tokenizer.eos_token_id,
        **decoding.arguments(),
        **extra,
    )
    return out[:, prompt_ids.shape[1] :]


@torch.no_grad()
def generate_texts(
    model: Any, prompt_format: PromptFormat, questions: Sequence[str], decoding: Decoding, **extra: Any
) -> list[str]:
    """Answers to bare questions, without a verifier; `extra` goes to `generate`."""
    device = next(model.parameters()).device
    torch.manual_seed(decoding.seed)
    ids = generate_ids(model, prompt_format, questions, decoding.max_new_tokens, decoding, device, **extra)
    return [prompt_format.answer_text(row)[0] for row in ids]


def evaluate(
    model: Any,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    decoding: Decoding,
    bare: list[Answer] | None = None,
    autocast: contextlib.AbstractContextManager | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """The model's answers beside the bare LLM's on the same items; `bare` hands in answers already known.

    The bare LLM decodes by the same rules from the same prompts, in its own dtype.
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
