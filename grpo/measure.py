"""Held-out questions answered and judged: solved, format rate, length and every reward, before and after a stage.

Completions are generated greedily with every cycle run. Solved is the task's own verdict (a score of exactly 1.0),
every test passed for code, the right number for anything else.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from batching import PromptFormat, pad
from enhanced.config import CycleMeter
from enhanced.reasoning_format import split_completion
from evaluation import Decoding, question_hash, wilson
from grpo.problems import Problem
from grpo.rewards import RewardSettings, parse, repetition, same_answer


@dataclass
class Measured:
    """The completions of one stage's held-out questions and their judgements, all in the same order."""

    stage: str
    problems: Sequence[Problem]
    completions: list[str]
    lengths: list[int]  # tokens, the end of sequence included
    finished: list[bool]
    solved: list[bool]
    rewards: dict[str, list[float]]
    cycles: float | None  # mean cycles (add-on: segments) spent on a token

    @property
    def rate(self) -> float:
        return _mean(self.solved)

    @property
    def format_rate(self) -> float:
        return _mean([split_completion(text).well_formed for text in self.completions])

    def means(self) -> dict[str, float]:
        """Metric -> value, as the CSV names them."""
        return {
            "solved": self.rate,
            "format_rate": self.format_rate,
            "mean_length": _mean(self.lengths),
            "truncated": _mean([not done for done in self.finished]),
            "repetition": _mean([repetition(text) for text in self.completions]),
            **{f"reward_{name}": _mean(values) for name, values in self.rewards.items()},
        }

    def rows(self, step: int, start: dict[str, float] | None = None) -> list[dict[str, Any]]:
        """Long-form CSV rows; the column `bare` holds the value at the start of the stage."""
        rows = []
        n = len(self.problems)
        for metric, value in self.means().items():
            rate = metric in ("solved", "format_rate")
            low, high = wilson(round(value * n), n) if rate else (None, None)
            rows.append({"step": step, "task": self.stage, "metric": metric, "value": value, "n": n, "ci_low": low,
                         "ci_high": high, "bare": (start or {}).get(metric), "segments_used": self.cycles})
        return rows

    def predictions(self, step: int) -> list[dict[str, Any]]:
        """One line per question, which paired statistics need."""
        return [
            {"step": step, "id": f"{self.stage}/{index:05d}", "task": self.stage,
             "prompt_hash": question_hash(problem.question), "prediction": text, "score": float(solved),
             "finished": finished}
            for index, (problem, text, solved, finished) in enumerate(
                zip(self.problems, self.completions, self.solved, self.finished, strict=True))
        ]

    def samples(self, count: int = 12) -> list[dict[str, Any]]:
        """The first questions with their completions and rewards."""
        return [
            {"question": p.question, "answer": p.answer, "completion": text, "solved": solved,
             "rewards": {name: values[index] for name, values in self.rewards.items()}}
            for index, (p, text, solved) in enumerate(
                itertools.islice(zip(self.problems, self.completions, self.solved, strict=True), count))
        ]

    def line(self, start: dict[str, float] | None = None) -> str:
        """The measurement for people."""
        low, high = wilson(sum(self.solved), len(self.solved))
        before = f" (before {100 * start['solved']:.1f} %)" if start else ""
        rewards = ", ".join(f"{name} {_mean(values):.2f}" for name, values in self.rewards.items())
        solved = f"solved {100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]{before} of {len(self.problems)}"
        return (f"{self.stage}: {solved}, format {100 * self.format_rate:.1f} %, {_mean(self.lengths):.1f} tokens; "
                f"{rewards}")


# name, weight of each reward, number of questions, metrics at the start and at the end
Change = tuple[str, Mapping[str, float], int, Mapping[str, float], Mapping[str, float]]


def change_table(changes: Sequence[Change]) -> str:
    """What each stage did to its own held-out questions, for people: start -> end, Wilson 95 % intervals.

    `reward` is the mean over the questions of all rewards, weighted as in training, as a share of the most there is.
    """
    table = [("stage", "n", "solved", "format", "reward")]
    for name, weights, n, start, end in changes:
        solved, written = (" -> ".join(_rate(part[metric], n) for part in (start, end))
                           for metric in ("solved", "format_rate"))
        reward = " -> ".join(f"{_reward(part, weights):.3f}" for part in (start, end))
        table.append((name, str(n), solved, written, reward))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in table)


def _rate(value: float, n: int) -> str:
    low, high = wilson(round(value * n), n)
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _reward(metrics: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return sum(weight * metrics[f"reward_{name}"] for name, weight in weights.items()) / sum(weights.values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@torch.no_grad()
def completions(
    model: Any, prompt_format: PromptFormat, questions: Sequence[str], longest: int, batch_size: int = 128,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[str], list[int], list[bool], float | None]:
    """(texts, their tokens, whether each ended by itself, mean cycles or segments), greedy, in the order asked."""
    device = next(model.parameters()).device
    prompts = prompt_format.prompts(questions)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, tuple[str, int, bool]] = {}
    meter, segments = CycleMeter(), []
    extra = {"cycles_log": meter} if hasattr(model, "all_cycles") else {"segments_log": segments}
    eos = prompt_format.tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = pad([prompts[i] for i in chosen], prompt_format.pad_id, "left")
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=longest, **Decoding().arguments(),
            pad_token_id=prompt_format.pad_id, eos_token_id=eos, **extra,
        )[:, ids.shape[1] :]
        for index, row in zip(chosen, out, strict=True):
            text, finished = prompt_format.answer_text(row)
            length = row.tolist().index(eos) + 1 if finished else len(row)
            found[index] = (text, length, finished)
        progress(len(found))
    used = torch.cat(segments).float().mean().item() if segments else meter.mean if meter.tokens else None
    texts, lengths, finished = zip(*(found[i] for i in range(len(questions))), strict=True)
    return list(texts), list(lengths), list(finished), used


def measure(
    model: Any, prompt_format: PromptFormat, stage: str, problems: Sequence[Problem], functions: Sequence[Any],
    longest: int, tags: bool = True, batch_size: int = 128, autocast: contextlib.AbstractContextManager | None = None,
) -> Measured:
    """Answers and judges `problems`; `functions` are the stage's rewards. Leaves the model's mode as it was."""
    was_training = model.training
    model.eval()
    every = model.all_cycles() if hasattr(model, "all_cycles") else contextlib.nullcontext()
    try:
        with every, autocast or contextlib.nullcontext():
            questions = [problem.question for problem in problems]
            texts, lengths, finished, cycles = completions(model, prompt_format, questions, longest, batch_size)
    finally:
        model.train(was_training)
    rewards = judge(problems, texts, functions)
    passed = [score == 1.0 for score in rewards.get("code", [0.0] * len(problems))]
    solved = [passed[i] if p.tests else _solved(p, texts[i], tags) for i, p in enumerate(problems)]
    return Measured(stage, problems, texts, lengths, finished, solved, rewards, cycles)


def judge(problems: Sequence[Problem], texts: Sequence[str], functions: Sequence[Any]) -> dict[str, list[float]]:
    """Reward name -> one value per completion."""
    rows = [problem.row() for problem in problems]
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    prompts = columns.pop("prompt", [])
    return {function.__name__: function(prompts, list(texts), **columns) for function in functions}


def _solved(problem: Problem, text: str, tags: bool) -> bool:
    solution = parse(text, RewardSettings(tags=tags)).solution
    if problem.example is not None:
        return problem.example.verify(solution).solved
    return same_answer(solution, problem.answer)
