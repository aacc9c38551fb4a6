"""Held-out questions answered and judged: solved, format rate, length and every reward, before and after a stage.

Completions are generated greedily with every cycle run. Solved is the task's own verdict (a score of exactly 1.0),
every test passed for code, the right number for anything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from batching import PromptFormat
from engine.batches import by_length
from engine.intervals import wilson
from engine.machine import Machine
from engine.placement import device_of
from engine.report import Report, metric_row, percent, prediction_line, text_table
from enhanced.config import CycleMeter
from enhanced.reasoning_format import format_rate
from evaluation import Decoding, Generated, generate_answers
from grpo.problems import Problem
from grpo.rewards import RewardSettings, parse, repetition, same_answer
from tasks.chance import Chance, chance_of
from text_data.taken import TEXT
from verify.reading import verdict_by

RATES = ("solved", "format_rate")  # shares of the questions, which get an interval


@dataclass
class Measured:
    """The completions of one stage's held-out questions and their judgements. All lists are in the same order.

    Args:
        stage: the stage's name.
        problems: the questions.
        completions: what the model wrote.
        lengths: tokens of each completion, the end of sequence included.
        finished: whether it ended by itself, and was not cut off.
        solved: the verdict on its solution.
        rewards: reward name -> its value of each completion, in [0, 1].
        cycles: mean cycles (add-on: segments) spent on a token; None where the model counts none.
        chance: what the best constant answer solves of the questions; None where tests judge programs.
    """

    stage: str
    problems: Sequence[Problem]
    completions: list[str]
    lengths: list[int]
    finished: list[bool]
    solved: list[bool]
    rewards: dict[str, list[float]]
    cycles: float | None
    chance: Chance | None = None

    @property
    def rate(self) -> float:
        """Share of questions solved."""
        return _mean(self.solved)

    @property
    def format_rate(self) -> float:
        """Share of well-formed completions."""
        return format_rate(self.completions)

    def means(self) -> dict[str, float]:
        """Metric -> value, as the CSV names them."""
        cut_off = len(self.finished) - sum(self.finished)
        means = {
            "solved": self.rate,
            "format_rate": self.format_rate,
            "mean_length": _mean(self.lengths),
            "truncated": cut_off / max(len(self.finished), 1),
            "repetition": _mean(list(map(repetition, self.completions))),
        }

        # One column for each reward, whatever its weight.
        for name, values in self.rewards.items():
            means[f"reward_{name}"] = _mean(values)
        return means

    def report(self, start: Mapping[str, float] | None = None) -> Report:
        """Rows, predictions and a line for people. `start` holds the metrics at the start of the stage."""
        return Report(self.rows(start), self.predictions(), self.line(start), self.rate)

    def rows(self, start: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """Rows of eval.csv, one for each metric; the column `bare` holds the value at the start of the stage."""
        n = len(self.problems)
        bare = start or {}

        rows = []
        for metric, value in self.means().items():
            interval = None
            if metric in RATES:
                interval = wilson(round(value * n), n)
            row = metric_row(
                self.stage, metric, value, n, interval=interval, bare=bare.get(metric), segments_used=self.cycles
            )
            if metric == "solved" and self.chance:
                row["chance"] = self.chance.rate
            rows.append(row)
        return rows

    def predictions(self) -> list[dict[str, Any]]:
        """Lines of predictions.jsonl, one for each question."""
        lines = []
        for index, problem in enumerate(self.problems):
            score = float(self.solved[index])
            line = prediction_line(
                self.stage, index, problem.question, self.completions[index], score, problem.answer or None,
                finished=self.finished[index],
            )

            lines.append(line)
        return lines

    def samples(self, count: int = 12) -> list[dict[str, Any]]:
        """The first questions with their completions and rewards."""
        samples = []
        for index, problem in enumerate(self.problems[:count]):
            sample = {
                "question": problem.question,
                "answer": problem.answer,
                "completion": self.completions[index],
                "solved": self.solved[index],
                "rewards": {name: values[index] for name, values in self.rewards.items()},
            }
            samples.append(sample)
        return samples

    def line(self, start: Mapping[str, float] | None = None) -> str:
        """The measurement for people. `start` holds the metrics at the start of the stage."""
        n = len(self.problems)
        solved = percent(self.rate, wilson(sum(self.solved), len(self.solved)))
        before = ""
        if start:
            before = f" (before {percent(start['solved'])})"
        if self.chance:
            before += f" (chance {percent(self.chance.rate)})"
        rewards = ", ".join(f"{name} {_mean(values):.2f}" for name, values in self.rewards.items())
        return (
            f"{self.stage}: solved {solved}{before} of {n}, format {percent(self.format_rate)}, "
            f"{_mean(self.lengths):.1f} tokens; {rewards}"
        )


@dataclass(frozen=True)
class Change:
    """What a stage did to its own held-out questions.

    Args:
        stage: the stage's name.
        weights: reward name -> its weight in training.
        n: number of questions.
        start: metrics before the stage, as `Measured.means`.
        end: metrics after it.
    """

    stage: str
    weights: Mapping[str, float]
    n: int
    start: Mapping[str, float]
    end: Mapping[str, float]


def change_table(changes: Sequence[Change]) -> str:
    """What each stage did to its own held-out questions, for people: start -> end, Wilson 95 % intervals.

    `reward` is the mean over the questions of all rewards, weighted as in training, as a share of the most there is.
    """
    table = [("stage", "n", "solved", "format", "reward")]
    for change in changes:
        moments = (change.start, change.end)

        # A share's interval needs the number of questions behind it.
        shares = []
        for metric in RATES:
            texts = []
            for moment in moments:
                share = moment[metric]
                texts.append(percent(share, wilson(round(share * change.n), change.n)))
            shares.append(" -> ".join(texts))

        reward = " -> ".join(f"{_reward(moment, change.weights):.3f}" for moment in moments)
        table.append((change.stage, str(change.n), *shares, reward))
    return text_table(table)


def _reward(metrics: Mapping[str, float], weights: Mapping[str, float]) -> float:
    total = sum(weight * metrics[f"reward_{name}"] for name, weight in weights.items())
    return total / sum(weights.values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@torch.no_grad()
def completions(
    model: Any, prompt_format: PromptFormat, questions: Sequence[str], longest: int, batch_size: int = 128
) -> tuple[list[str], list[int], list[bool], float | None]:
    """Greedy completions of `longest` tokens at most, in the order of `questions`.

    Returns (texts, their tokens, whether each ended by itself, mean cycles or segments).
    """
    texts, lengths, finished, (used, count) = _completions(model, prompt_format, questions, longest, batch_size)
    return texts, lengths, finished, used / count if count else None


def _completions(
    model: Any, prompt_format: PromptFormat, questions: Sequence[str], longest: int, batch_size: int
) -> tuple[list[str], list[int], list[bool], tuple[float, int]]:
    """As `completions`, with (summed cycles or segments, of how many tokens or examples) in place of their mean."""
    device = device_of(model)

    # The planner/worker LM counts the cycles of every token, the add-on the segments of every example.
    meter = CycleMeter()
    segments: list[torch.Tensor] = []
    extra = {"cycles_log": meter} if hasattr(model, "all_cycles") else {"segments_log": segments}

    def complete(batch: list[str]) -> list[Generated]:
        return generate_answers(model, prompt_format, batch, longest, Decoding(), device, **extra)

    # Batches of similar length waste little padding.
    prompts = prompt_format.prompts(questions)
    answers = by_length(questions, list(map(len, prompts)), batch_size, complete)
    texts = [generated.text for generated in answers]
    lengths = [generated.tokens for generated in answers]
    finished = [generated.finished for generated in answers]

    used = (float(meter.cycles), meter.tokens)
    if segments:
        every = torch.cat(segments)
        used = (float(every.sum()), len(every))
    return texts, lengths, finished, used


def measure(
    model: Any, prompt_format: PromptFormat, stage: str, problems: Sequence[Problem], functions: Sequence[Any],
    longest: int, tags: bool = True, batch_size: int = 128, autocast: contextlib.AbstractContextManager | None = None,
    machine: Machine | None = None,
) -> Measured:
    """Answers and judges `problems`. Leaves the model's mode as it was.

    Args:
        model: either system's causal LM.
        prompt_format: renders the questions.
        stage: the stage's name.
        problems: held-out questions.
        functions: the stage's reward functions.
        longest: longest completion in tokens.
        tags: False where a completion without reasoning tags is itself the solution.
        batch_size: completions generated at a time.
        autocast: the context that the model runs in; None = full precision.
        machine: its processes, all of which call this, answer and judge a share each, and all get the whole; None =
            this process does everything.
    """
    rank, world = (machine.rank, machine.world) if machine else (0, 1)
    own = problems[rank::world]
    questions = [problem.question for problem in own]
    was_training = model.training
    model.eval()

    # As GRPO trains it: the gate of the planner/worker LM stops nothing.
    every_cycle = contextlib.nullcontext()
    if hasattr(model, "all_cycles"):
        every_cycle = model.all_cycles()
    try:
        with every_cycle, autocast or contextlib.nullcontext():
            texts, lengths, finished, used = _completions(model, prompt_format, questions, longest, batch_size)
    finally:
        model.train(was_training)

    # Tests judge a program; they run only where the stage has the code reward.
    rewards: dict[str, list[Any]] = {function.__name__: [] for function in functions}
    if own:  # a share may be empty
        rewards = judge(own, texts, functions)
    solved = _verdicts(own, texts, rewards, tags, prompt_format.answer_from)

    columns: list[list[Any]] = [texts, lengths, finished, solved, *rewards.values()]
    if world > 1:
        columns, used = _gathered(columns, used, len(problems))
    cycles = used[0] / used[1] if used[1] else None
    judged = dict(zip(rewards, columns[4:], strict=True))
    return Measured(stage, problems, *columns[:4], judged, cycles, stage_chance(problems))


def _verdicts(
    problems: Sequence[Problem], texts: Sequence[str], rewards: Mapping[str, list[Any]], tags: bool, answer_from: str
) -> list[bool]:
    """Whether each completion solves its problem: the code reward says it where there are tests."""
    code_scores = rewards.get("code", [0.0] * len(problems))

    solved = []
    for problem, text, code_score in zip(problems, texts, code_scores, strict=True):
        if problem.tests:
            solved.append(code_score == 1.0)
        else:
            solved.append(_solved(problem, text, tags, answer_from))
    return solved


def _gathered(columns: list[list[Any]], used: tuple[float, int], count: int) -> tuple[list[list[Any]], Any]:
    """(each column in the order of the `count` problems, `used` summed), given this process's share of both."""
    shares = gather_object([(columns, used)])

    whole: list[list[Any]] = [[None] * count for _ in columns]
    for rank, (parts, _) in enumerate(shares):
        for column, part in zip(whole, parts, strict=True):
            column[rank :: len(shares)] = part  # raises ValueError where a share is too long or too short

    return whole, tuple(map(sum, zip(*(share[1] for share in shares), strict=True)))


def stage_chance(problems: Sequence[Problem]) -> Chance | None:
    """What one constant solution solves of the questions; None where tests judge programs, or there are none."""
    if not problems or any(problem.tests for problem in problems):
        return None
    golds = [problem.answer for problem in problems]
    return chance_of(problems, golds, lambda problem, text: _solved(problem, text, tags=False))


def judge(problems: Sequence[Problem], texts: Sequence[str], functions: Sequence[Any]) -> dict[str, list[float]]:
    """Reward name -> one value in [0, 1] per completion."""
    rows = [problem.row() for problem in problems]
    columns: dict[str, list[Any]] = {}
    if rows:
        columns = {name: [row[name] for row in rows] for name in rows[0]}

    # As TRL calls a reward: prompts and completions by place, the other columns by name.
    prompts = columns.pop("prompt", [])
    return {function.__name__: function(prompts, list(texts), **columns) for function in functions}


def _solved(problem: Problem, text: str, tags: bool, answer_from: str = TEXT) -> bool:
    """The task's own verdict where there is one, else whether the solution is the gold answer.

    `answer_from` says how the answer is taken out of the solution that the task judges.
    """
    solution = parse(text, RewardSettings(tags=tags)).solution
    if problem.example is not None:
        example = problem.example
        return verdict_by(example.verify, solution, example.target, answer_from).solved
    return same_answer(solution, problem.answer)
