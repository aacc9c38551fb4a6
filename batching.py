"""From `Example`s to token batches: the prompt's format, and `Batch` with prompts left-padded, targets right-padded.

Prompts are padded on the left so that every prompt ends in the same column, and are joined to their targets after
padding: no pad ever stands between a prompt and its answer. Shapes: B batch, S prompt tokens, T target tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.batches import IGNORE
from reasoning_gym_wrapper import MAX_REJECTED, Example, Reserve, Task, TaskError, train_seed

PLAIN_CUE = "\nAnswer:"
_MARK = "QUESTION-GOES-HERE"


@dataclass
class Batch:
    """Token batch of B examples; every mask is int64 0/1, as transformers expects."""

    prompt_ids: Tensor  # (B, S) left-padded
    prompt_mask: Tensor  # (B, S)
    target_ids: Tensor  # (B, T) right-padded
    labels: Tensor  # (B, T) target ids, IGNORE at pads; targets[:, t] is predicted at column S - 1 + t
    examples: list[Example]

    @property
    def input_ids(self) -> Tensor:
        """(B, S + T)"""
        return torch.cat([self.prompt_ids, self.target_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, S + T)"""
        return torch.cat([self.prompt_mask, (self.labels != IGNORE).to(self.prompt_mask.dtype)], dim=1)

    def to(self, device: torch.device) -> Batch:
        tensors = (self.prompt_ids, self.prompt_mask, self.target_ids, self.labels)
        return Batch(*(tensor.to(device) for tensor in tensors), self.examples)


@dataclass(frozen=True)
class PromptConfig:
    """How questions are shown to the LLM; each field is the flag of its name.

    prompt_style: auto (chat where the tokenizer has a template), chat or plain.
    system_header: text before every prompt; None = none.
    sentinel: text that ends every target, at which generation stops; None = none.
    max_seq_len: most tokens of a prompt, 8 or more.
    """

    prompt_style: str = "auto"
    system_header: str | None = None
    sentinel: str | None = None
    max_seq_len: int = 512


class PromptFormat:
    """Renders questions and targets for one tokenizer.

    `auto` uses the tokenizer's chat template where it has one, else plain text `question\\nAnswer:` with the target
    after a space. The sentinel, where given, ends every target before the end-of-sequence token.

    Raises:
        ValueError: `chat` without a chat template; a tokenizer without an end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer,
        style: str = "auto",
        system_header: str | None = None,
        sentinel: str | None = None,
        max_seq_len: int = 512,
    ):
        if style == "chat" and not tokenizer.chat_template:
            raise ValueError("--prompt_style chat needs a chat template, this tokenizer has none: use auto or plain")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token, so no answer could end: choose another model")
        self.tokenizer, self.sentinel, self.max_seq_len = tokenizer, sentinel, max_seq_len
        self.chat = bool(tokenizer.chat_template) if style == "auto" else style == "chat"
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.prefix, self.suffix = self._chat_frame(system_header) if self.chat else self._plain_frame(system_header)

    def _plain_frame(self, header: str | None) -> tuple[str, str]:
        return (f"{header}\n" if header else "", PLAIN_CUE)

    def _chat_frame(self, header: str | None) -> tuple[str, str]:
        """The template's text before and after a question, rendered once: templates are slow, questions are many."""
        turns = [{"role": "user", "content": _MARK}]
        if header:
            turns.insert(0, {"role": "system", "content": header})
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are foreign code: a role they refuse raises TemplateError and the like
            raise ValueError(f"the tokenizer's chat template failed ({error}): try --prompt_style plain") from error
        if text.count(_MARK) != 1:
            raise ValueError("the tokenizer's chat template does not show the question once: use --prompt_style plain")
        prefix, suffix = text.split(_MARK)
        return prefix, suffix

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of each rendered prompt."""
        texts = [self.prefix + question.strip() + self.suffix for question in questions]
        ids = self.tokenizer(texts, add_special_tokens=not self.chat, return_attention_mask=False)["input_ids"]
        eos = self.tokenizer.eos_token_id  # some tokenizers close plain text with it, a prompt must stay open
        return [row[:-1] if row and row[-1] == eos and not self.suffix.endswith(self.tokenizer.eos_token) else row
                for row in ids]

    def targets(self, targets: Sequence[str]) -> list[list[int]]:
        """Token ids of each target: the answer alone, the sentinel if any, end of sequence.

        Raises:
            ValueError: a target holds the sentinel, so the answer cut at it could never be right.
        """
        lead = "" if self.chat else " "
        for target in targets if self.sentinel else ():
            if (lead + target + self.sentinel).index(self.sentinel) < len(lead + target):
                raise ValueError(f"--sentinel {self.sentinel!r} is part of the gold answer {target!r}: choose another")
        texts = [lead + target + (self.sentinel or "") for target in targets]
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [[*row, self.tokenizer.eos_token_id] for row in ids]

    def answer_text(self, ids: Tensor) -> tuple[str, bool]:
        """(answer, finished) of generated ids (N,), cut at end of sequence and at the sentinel: no verifier sees it."""
        row = ids.tolist()
        finished = self.tokenizer.eos_token_id in row
        if finished:
            row = row[: row.index(self.tokenizer.eos_token_id)]
        text = self.tokenizer.decode(row, skip_special_tokens=True)
        if self.sentinel and self.sentinel in text:
            return text.split(self.sentinel)[0].strip(), True
        return text.strip(), finished

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of prompt and target together, per example; an absent gold target counts 0."""
        prompts = self.prompts([example.question for example in examples])
        targets = self.targets([example.target or "" for example in examples])
        return [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]

    def fitting(self, examples: Sequence[Example], overlong: str, what: str) -> list[Example]:
        """The examples within max_seq_len.

        Raises:
            ValueError: with `overlong="error"` when some are longer, or when none is left.
        """
        lengths = self.lengths(examples)
        kept = [example for example, length in zip(examples, lengths, strict=True) if length <= self.max_seq_len]
        dropped = len(examples) - len(kept)
        if dropped and (overlong == "error" or not kept):
            raise ValueError(
                f"{dropped} of {len(examples)} {what} examples are longer than --max_seq_len {self.max_seq_len} tokens "
                f"(the longest has {max(lengths)}): raise it, or leave them out with --overlong drop"
            )
        return kept

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The padded batch of these examples, in their order. Targets that are None count as empty answers."""
        prompts = self.prompts([example.question for example in examples])
        targets = self.targets([example.target or "" for example in examples])
        prompt_ids, prompt_mask = pad(prompts, self.pad_id, "left")
        target_ids, target_mask = pad(targets, self.pad_id, "right")
        labels = target_ids.masked_fill(target_mask == 0, IGNORE)
        return Batch(prompt_ids, prompt_mask, target_ids, labels, list(examples))


# --- training items ---------------------------------------------------------------------------------------------------


class TrainStream:
    """Endless training items, balanced to within one example per task, none of them in the reserve.

    The position is a small JSON-able state, so that a resumed run sees exactly the items an uninterrupted one would.

    Raises:
        TaskError: a task has no gold answer, or (nearly) all of its questions are reserved for evaluation.
    """

    def __init__(self, tasks: Sequence[Task], reserve: Reserve, seed: int):
        self.tasks, self.reserve, self.seed = list(tasks), reserve, seed
        self._next = [0] * len(self.tasks)
        self._turn = 0
        self._open()

    def _open(self) -> None:
        pairs = zip(self.tasks, self._next, strict=True)
        self._items = [task.items(self.seed, start) for task, start in pairs]

    def __iter__(self) -> TrainStream:
        return self

    def __next__(self) -> Example:
        turn = self._turn
        for _ in range(MAX_REJECTED):
            index, example = next(self._items[turn])
            self._next[turn] = index + 1
            if example.target is None:
                raise TaskError(f"task {example.task} has an item without a gold answer: it cannot be trained on")
            if not self.reserve.rejects(example):
                self._turn = (turn + 1) % len(self.tasks)
                return example
        raise TaskError(
            f"task {self.tasks[turn].name}: {MAX_REJECTED} draws in a row were evaluation questions, nothing is left "
            "to train on: lower --eval_n or raise the difficulty with --task_config"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"next": list(self._next), "turn": self._turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next, self._turn = list(state["next"]), int(state["turn"])
        self._open()


class EpochStream:
    """A fixed training set of `n` items, in a new order every epoch (a function of seed and epoch alone)."""

    def __init__(self, examples: Sequence[Example], seed: int):
        self.examples, self.seed = list(examples), seed
        self.drawn = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> EpochStream:
        return self

    def __next__(self) -> Example:
        epoch, place = divmod(self.drawn, len(self.examples))
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        self.drawn += 1
        return self.examples[self._order[1][place]]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = int(state["drawn"])


def training_examples(tasks: Sequence[Task], reserve: Reserve, seed: int, n: int) -> TrainStream | EpochStream:
    """`--train_n`: a fixed set of n items, or with 0 fresh items without end; both reject the reserve's questions."""
    stream = TrainStream(tasks, reserve, train_seed(seed))
    if n == 0:
        return stream
    return EpochStream([next(stream) for _ in range(n)], seed)


# --- batches of them --------------------------------------------------------------------------------------------------


class TrainBatches:
    """Endless training batches of `size` examples per rank, grouped by length so that little is spent on padding.

    `window` batches are drawn together, sorted by prompt length, cut into batches and put in random order; every rank
    draws the same items and keeps its share. The position is a small JSON-able state.

    Raises (from `next`):
        ValueError: with `overlong="error"`, an example longer than the format's max_seq_len.
    """

    def __init__(self, stream: Any, prompt_format: PromptFormat, size: int, window: int = 1, seed: int = 0,
                 overlong: str = "error", rank: int = 0, world: int = 1):
        self.stream, self.format, self.size, self.window, self.seed = stream, prompt_format, size, window, seed
        self.overlong, self.rank, self.world = overlong, rank, world
        self._start, self._windows, self._place = stream.state_dict(), -1, window
        self._batches: list[list[Example]] = []

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        if self._place >= self.window:
            self._open()
        self._place += 1
        return self.format.batch(self._batches[self._place - 1][self.rank :: self.world])

    def _open(self) -> None:
        """Draws the next window."""
        self._start, self._windows, self._place = self.stream.state_dict(), self._windows + 1, 0
        per_batch = self.size * self.world
        examples: list[Example] = []
        while len(examples) < per_batch * self.window:
            drawn = [next(self.stream) for _ in range(per_batch * self.window - len(examples))]
            lengths = self.format.lengths(drawn)
            if self.overlong == "error" and max(lengths) > self.format.max_seq_len:
                raise ValueError(
                    f"a training example of {max(lengths)} tokens is longer than --max_seq_len "
                    f"{self.format.max_seq_len}: raise it, or leave such items out with --overlong drop"
                )
            pairs = zip(drawn, lengths, strict=True)
            examples += [example for example, length in pairs if length <= self.format.max_seq_len]
        if self.window > 1:
            lengths = [len(ids) for ids in self.format.prompts([example.question for example in examples])]
            examples = [examples[i] for i in sorted(range(len(examples)), key=lengths.__getitem__)]
        self._batches = [examples[start : start + per_batch] for start in range(0, len(examples), per_batch)]
        random.Random(f"{self.seed}/{self._windows}").shuffle(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._start, "windows": self._windows, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self._start, self._windows, self._place = state["stream"], state["windows"], state["place"]
        if self._windows >= 0:  # also where the window is used up: the stream must stand behind it
            place, self._windows = self._place, self._windows - 1
            self._open()
            self._place = place


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, longest) int64, padded with `value` on `side`."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (out, seen) in zip(rows, zip(ids, mask, strict=True), strict=True):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        out[place] = torch.tensor(row, dtype=torch.int64)
        seen[place] = 1
    return ids, mask
