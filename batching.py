"""From `Example`s to token batches: the prompt's format, and `Batch` with prompts left-padded, targets right-padded.

Prompts are padded on the left so that every prompt ends in the same column, and are joined to their targets after
padding: no pad ever stands between a prompt and its answer. Shapes: B batch, S prompt tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from engine.batches import IGNORE
from engine.decoding import answer_length
from reasoning_gym_wrapper import Example
from tasks.steps import steps_of
from text_data.frames import PLAIN_CUE as PLAIN_CUE
from text_data.frames import Frame, Guard, anchors_of, continuation_ids, give_template, render_frame

SHOWN = 5  # rows that are too long are named one by one up to so many
NO_LIMIT = 2**31  # segments of an item whose task does not say how many steps it needs


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

    @property
    def columns(self) -> int:
        """Tokens and pads: B (S + T)."""
        return self.prompt_ids.numel() + self.target_ids.numel()

    @property
    def tokens(self) -> int:
        """Tokens of prompts and targets, without pads."""
        return int(self.prompt_mask.sum()) + int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            prompt_ids=self.prompt_ids.to(device),
            prompt_mask=self.prompt_mask.to(device),
            target_ids=self.target_ids.to(device),
            labels=self.labels.to(device),
            examples=self.examples,
        )


def needed_segments(examples: Sequence[Example]) -> Tensor:
    """(B,) int64, the steps that each item needs; a number that no model reaches where its task does not say.

    So an item without a solution takes all segments: those of its batch in training, of the model at evaluation.
    """
    return torch.tensor([steps_of(example.entry) or NO_LIMIT for example in examples])


def hardest(examples: Sequence[Example]) -> int:
    """The most steps that one of the items needs, of those that say it; 0 where none does."""
    return max((steps_of(example.entry) or 0 for example in examples), default=0)


@dataclass(frozen=True)
class PromptConfig:
    """How questions are shown to the LLM and its answers are read; each field is the flag of its name.

    prompt_style: auto (chat where the tokenizer has a template), chat or plain.
    system_header: text before every prompt, or `rg:` and the name of a prompt of Reasoning Gym's; None = none.
    sentinel: text that ends every target, at which generation stops; None = none.
    max_seq_len: most tokens of a prompt, 8 or more.
    answer_from: how the answer is taken out of a generated text, see `text_data.taken`.
    chat_template: a Jinja file in place of the tokenizer's template; None = the tokenizer's own.
    chat_template_kwargs: JSON object, the values of the template's variables; None = none.
    """

    prompt_style: str = "auto"
    system_header: str | None = None
    sentinel: str | None = None
    max_seq_len: int = 512
    answer_from: str = "text"
    chat_template: str | None = None
    chat_template_kwargs: str | None = None


class PromptFormat:
    """Renders questions and targets for one tokenizer.

    `auto` uses the tokenizer's chat template where it has one, else plain text `question\\nAnswer:` with the target
    after a space. The sentinel, where given, ends every target before the token that ends a turn of the chat template
    (of plain text: the end of sequence).

    Args:
        tokenizer: any Hugging Face tokenizer.
        config: how questions are shown.
        rows: rows of the LLM's embedding table; None = not known, and no id is checked against it.
        frame: what to write around a question; None renders it now.

    Raises:
        ValueError: `chat` without a chat template; a tokenizer without an end of sequence that the LLM can generate; as
            `give_template`.
    """

    def __init__(
        self, tokenizer: Any, config: PromptConfig = PromptConfig(), rows: int | None = None, frame: Frame | None = None
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token, so no answer could end: choose another model")
        self.tokenizer = tokenizer
        self.config = config
        self.answer_from = config.answer_from
        self.sentinel = config.sentinel
        self.max_seq_len = config.max_seq_len
        self.frame = frame or self._new_frame()
        self.chat = self.frame.chat
        self.prefix = self.frame.prefix
        self.suffix = self.frame.suffix
        self._anchors = anchors_of(tokenizer, self.suffix)
        self._guard = Guard(tokenizer)

        # Pads are masked wherever they stand, so a tokenizer without one may use its end of sequence.
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = tokenizer.eos_token_id
        self.rows: int | None = None
        self._has_more = False  # the tokenizer has ids beyond the table
        if rows is not None:
            self.fit_table(rows)

    def _new_frame(self) -> Frame:
        """Today's frame, with the template that the flags give. Raises ValueError as `__init__`."""
        config = self.config
        give_template(self.tokenizer, config.chat_template, config.chat_template_kwargs)
        frame = render_frame(self.tokenizer, config.prompt_style, config.system_header, config.chat_template)
        if config.chat_template or config.chat_template_kwargs:
            return replace(frame, template=self.tokenizer.chat_template)
        return frame

    def fit_table(self, rows: int) -> None:
        """From now on no id is beyond the `rows` of the LLM's embedding table, not even a pad.

        Raises:
            ValueError: the end of a target is.
        """
        self.rows = rows
        self._has_more = max(self.tokenizer.get_vocab().values()) >= rows
        if self.frame.end >= rows:
            token = self.tokenizer.convert_ids_to_tokens(self.frame.end)
            raise ValueError(
                f"an answer ends with the token {token!r} (id {self.frame.end}), but the LLM has {rows} embeddings, "
                "which end before it, so no answer could end: choose another model"
            )

        # Some tokenizers have a pad that the LLM was never given. A pad is masked: any token serves.
        if self.pad_id >= rows:
            self.pad_id = self.frame.end

    def check_ids(self, rows: Sequence[Sequence[int]]) -> None:
        """Raises ValueError naming a token of these rows of ids that the LLM has no embedding of."""
        if self.rows is None or not self._has_more:
            return
        highest = max((max(row) for row in rows if len(row)), default=0)
        if highest >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise ValueError(
                f"a text holds the token {token!r} (id {highest}), but the LLM has {self.rows} embeddings, which end "
                f"before it: keep that token out of the texts, or choose a model whose tokenizer fits"
            )

    def names_special(self, text: str) -> bool:
        """Whether the text names a special token, which in a frame would be one."""
        return self._guard.names_one(text)

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer whatever the LLM: the end of every target, and the tokenizer's end of sequence."""
        return frozenset((self.frame.end, self.tokenizer.eos_token_id))

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of each rendered prompt; in a question the name of a special token is text.

        Raises:
            ValueError: as `check_ids`.
        """
        if not questions:  # a process may have no question of an evaluation; tokenizers fail there
            return []
        questions = [question.strip() for question in questions]
        texts = [self.prefix + question + self.suffix for question in questions]
        ids = self.tokenizer(texts, add_special_tokens=not self.chat, return_attention_mask=False)["input_ids"]
        for index, question in enumerate(questions):
            if self._guard.names_one(question):
                ids[index] = self._guard.framed(self.prefix, question, self.suffix, opened=not self.chat)
        self.check_ids(ids)
        if self.suffix.endswith(self.tokenizer.eos_token):
            return ids

        # Some tokenizers close plain text with an end of sequence. A prompt must stay open.
        eos = self.tokenizer.eos_token_id
        return [row[:-1] if row[-1:] == [eos] else row for row in ids]

    def targets(self, targets: Sequence[str]) -> list[list[int]]:
        """Token ids of each target: the answer alone, the sentinel if any, the end.

        They are those that follow the prompt's where both are tokenized as one text: SentencePiece would put a second
        space in front of an answer that is tokenized alone.

        Raises:
            ValueError: a target holds the sentinel, so the answer cut at it could never be right; as `check_ids`.
        """
        # In plain text the answer stands behind a space, as a word does; a chat template opens the turn by itself.
        lead = "" if self.chat else " "
        sentinel = self.sentinel or ""
        if sentinel:
            for target in targets:
                if (lead + target + sentinel).index(sentinel) < len(lead + target):
                    raise ValueError(f"--sentinel {sentinel!r} is part of the gold answer {target!r}: choose another")
        texts = [lead + target + sentinel for target in targets]
        ids = continuation_ids(self.tokenizer, texts, self._anchors)
        for index, target in enumerate(targets):
            if self._guard.names_one(target):
                ids[index] = self._guard.continued(texts[index], self._anchors)
        self.check_ids(ids)
        return [[*row, self.frame.end] for row in ids]

    def answer_text(self, ids: Tensor, ends: Collection[int] | None = None) -> tuple[str, bool]:
        """(answer, finished) of generated ids (N,), cut at the first of `ends` (default: ours) and at the sentinel.

        `finished` is False where the answer was cut off by the limit of tokens.
        """
        row = ids.tolist()
        length = answer_length(row, self.ends if ends is None else ends)
        text = self.tokenizer.decode(row[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self.sentinel and self.sentinel in text:
            return text.split(self.sentinel)[0].strip(), True
        return text.strip(), length < len(row)

    def shown(self, example: Example, reader: str = "") -> list[str]:
        """Lines that show one example as the LLM reads it: prompt and target, as text and as ids, and the masks.

        A mask is written in runs over the tokens of prompt and target: `0 x 12, 1 x 3`. `reader` names what is given
        the prompt's mask, such as HRM; "" = nothing is.
        """
        batch = self.batch([example])
        lines = []
        for what, ids in (("prompt", batch.prompt_ids[0].tolist()), ("target", batch.target_ids[0].tolist())):
            text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            lines.append(f"  {what}, {len(ids)} tokens: {text!r} = {ids}")

        # Taken from the batch that trains, so what is shown is what is done.
        masks = {"the LLM reads": batch.attention_mask[0].tolist()}
        if reader:
            masks[f"{reader} reads"] = batch.prompt_mask[0].tolist() + [0] * batch.target_ids.shape[1]
        masks["the loss is on"] = [0] * batch.prompt_ids.shape[1] + (batch.labels[0] != IGNORE).long().tolist()
        lines += [f"  mask, {what}: {in_runs(mask)}" for what, mask in masks.items()]
        return ["one example as the LLM reads it; the loss is on the target's tokens alone:", *lines]

    def prompt_lengths(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of each example's prompt."""
        return [len(prompt) for prompt in self.prompts([example.question for example in examples])]

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of prompt and target together, per example; an absent gold target counts 0."""
        prompts = self.prompt_lengths(examples)
        targets = self.targets([example.target or "" for example in examples])
        return [prompt + len(target) for prompt, target in zip(prompts, targets, strict=True)]

    def fitting(self, examples: Sequence[Example], overlong: str, what: str) -> list[Example]:
        """The examples whose prompt and target have at most max_seq_len tokens; `what` names them in the error.

        Raises:
            ValueError: with `overlong="error"` when some are longer, or when none is left.
        """
        lengths = self.lengths(examples)
        kept: list[Example] = []
        longer: list[Example] = []
        for example, length in zip(examples, lengths, strict=True):
            (kept if length <= self.max_seq_len else longer).append(example)

        if longer and (overlong == "error" or not kept):
            places = places_of(longer)
            places = places and f"; {places}"
            raise ValueError(
                f"{len(longer)} of {len(examples)} {what} examples are longer than --max_seq_len {self.max_seq_len} "
                f"tokens (the longest has {max(lengths)}{places}): raise it, or leave them out with --overlong drop"
            )
        return kept

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The padded batch of these examples, in their order. Targets that are None count as empty answers."""
        prompts = self.prompts([example.question for example in examples])
        targets = self.targets([example.target or "" for example in examples])
        prompt_ids, prompt_mask = pad(prompts, self.pad_id, "left")
        target_ids, target_mask = pad(targets, self.pad_id, "right")

        # Pads are no targets; an end of sequence that serves as pad elsewhere still is one where it ends an answer.
        labels = target_ids.masked_fill(target_mask == 0, IGNORE)
        return Batch(prompt_ids, prompt_mask, target_ids, labels, list(examples))


def places_of(examples: Iterable[Example]) -> str:
    """Where the first rows of own data among the examples stand, file and line; "" where there are none."""
    places = [example.entry.get("metadata", {}).get("place") for example in examples]
    known = [place for place in places if place]

    more = len(known) - SHOWN
    return ", ".join(known[:SHOWN]) + (f" and {more} more" if more > 0 else "")


# --- padding ----------------------------------------------------------------------------------------------------------


def in_runs(mask: Sequence[int]) -> str:
    """A mask for people, equal neighbours counted: [0, 0, 1] -> `0 x 2, 1 x 1`."""
    return ", ".join(f"{value} x {len(list(run))}" for value, run in groupby(mask))


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, longest) int64, padded with `value` on `side`, which is left or right."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        columns = slice(0, len(row))
        if side == "left":
            columns = slice(longest - len(row), None)
        ids[index, columns] = torch.tensor(row, dtype=torch.int64)
        mask[index, columns] = 1
    return ids, mask
