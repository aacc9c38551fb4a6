"""What a task at a difficulty is like before anything is trained on it, and whether depth is measured there."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import options  # noqa: E402
from ablation_grid import Job, arguments  # noqa: E402
from addon_run import chosen_tasks  # noqa: E402
from batching import PromptConfig, PromptFormat  # noqa: E402
from host import load_tokenizer  # noqa: E402
from reasoning_gym_wrapper import Reserve  # noqa: E402
from tasks.chance import MEANS_LITTLE, task_chances  # noqa: E402
from tasks.steps import steps_of  # noqa: E402

# Tokens, from which a run takes many minutes on a plain CPU.
LONGEST = 300  # of a prompt
LONGEST_ANSWER = 100


@dataclass(frozen=True)
class Setting:
    """A task at a difficulty, seen through its evaluation items.

    trained: the task, or task@difficulty.
    n: items looked at.
    prompt_tokens: the longest prompt's.
    answer_tokens: the median answer's, with the token that ends it.
    chance: what the best constant answer solves, 0 to 1; of several tasks the highest.
    steps: the fewest and the most steps that an item needs, of those that say it; None where none does.
    """

    trained: str
    n: int
    prompt_tokens: int
    answer_tokens: int
    chance: float
    steps: tuple[int, int] | None = None

    def refusal(self, longest: int = LONGEST) -> str | None:
        """Why depth is not measured here; None where it is."""
        reasons = []
        if self.prompt_tokens > longest:
            reasons.append(f"prompts of up to {self.prompt_tokens} tokens, more than {longest}")
        if self.answer_tokens > LONGEST_ANSWER:
            reasons.append(f"answers of {self.answer_tokens} tokens, more than {LONGEST_ANSWER}")
        if self.chance >= MEANS_LITTLE:
            reasons.append(f"one constant answer solves {100 * self.chance:.0f} % of the items")
        return ", ".join(reasons) or None


def settings_of(jobs: Sequence[Job]) -> dict[str, Setting]:
    """What each of the jobs is trained on -> how it is, in their order.

    Raises:
        ValueError: items cannot be drawn (TaskError), or the LLM's tokenizer cannot be loaded (HostError).
    """
    settings = {}
    for job in jobs:
        if job.trained not in settings:
            settings[job.trained] = _setting(job.trained, options.collect(arguments(job.flags))[0])
    return settings


def _setting(trained: str, opts: argparse.Namespace) -> Setting:
    """The setting that the flags of a run describe."""
    # The very items that its runs are evaluated on.
    examples = Reserve(chosen_tasks(opts), opts.eval_n, opts.eval_seed, by_group=opts.group_split).examples

    tokenizer = load_tokenizer(opts.model_name, opts.trust_remote_code, opts.revision)
    prompt = PromptFormat(tokenizer, options.part(PromptConfig, opts))
    prompts = prompt.prompts([example.question for example in examples])
    answers = prompt.targets([example.target for example in examples])

    needed = [steps for example in examples if (steps := steps_of(example.entry))]
    chances = task_chances(examples)
    return Setting(
        trained=trained,
        n=len(examples),
        prompt_tokens=max(map(len, prompts)),
        answer_tokens=round(statistics.median(map(len, answers))),
        chance=max(chance.rate for chance in chances.values()),
        steps=(min(needed), max(needed)) if needed else None,
    )
