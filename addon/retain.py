"""Text that the add-on is to leave alone (`--retain`): batches of it, and how far the LLM's answers moved there.

An add-on is on for every prompt, so training it on sums changes what the LLM says to everything else. Beside the
loss on the tasks stands KL(bare LLM || LLM with the add-on), in nats a token, on other text. Nothing is taught there
but to stay as the LLM was.

A gate (`--prompt_gate`) learns from the same text when to be shut. It sees it as plain text and framed as a question,
in pieces of any length, or it would learn to look for a frame or for a short prompt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from batching import Batch, PromptFormat, pad
from engine.batches import IGNORE
from engine.positions import token_positions
from injector import within_radius
from text_data.documents import Document, read_documents, source_files
from text_data.frames import text_ids

MOST_DOCUMENTS = 20_000  # the first of the file: more would only fill memory
LEAST_TOKENS = 4  # of a text: two to read, two to predict
EMPTY = 1 / 16  # of the pieces that a gate learns from hold nothing
FRAMED = 0.5  # of the other ones are put as a question is
Row = tuple[list[int], list[int]]  # tokens that HRM reads, tokens that follow


@dataclass(frozen=True)
class RetainConfig:
    """What is retained; each field is the flag of its name.

    retain: a file or folder of text; None = nothing.
    retain_batch_size: texts of each batch, in each process.
    max_seq_len: most tokens of a text; longer ones are cut.
    prompt_gate: True shows each text in ways that a gate learns from.
    seed: of the draw.
    """

    retain: str | None = None
    retain_batch_size: int = 16
    max_seq_len: int = 512
    prompt_gate: bool = False
    seed: int = 0


def retain_problems(retain: str | None) -> list[str]:
    """What is wrong with --retain, at most one line."""
    try:
        if retain and not first_documents(retain, 1):
            return [f"--retain {retain} holds no text: give rows with text, or with prompt and answer"]
    except (ValueError, OSError) as error:
        reason = str(error).replace("--source", "--retain")
        return [reason if reason.startswith("--retain") else f"--retain {retain}: {reason}"]
    return []


def first_documents(place: str, most: int) -> list[Document]:
    """The first documents of a file or folder. Raises ValueError and OSError for what cannot be read."""
    documents = []
    for document in read_documents(source_files(Path(place))):
        documents.append(document)
        if len(documents) == most:
            break
    return documents


class Retained:
    """The texts of `--retain` as batches, a new draw each step, the same on a resumed run.

    A row with `prompt` and `answer` is put as a task's question is, and its answer follows. Any other text is cut at a
    random place: HRM reads what stands before. With a gate a piece of it, from any place and of any length, is read,
    every other time as a question is put; then rows with `prompt` and `answer` are shown as plain text, too.

    Raises:
        ValueError: no text is long enough, or a token has no embedding.
    """

    def __init__(self, config: RetainConfig, prompt_format: PromptFormat):
        self.config = config
        self.format = prompt_format
        documents = first_documents(config.retain or "", MOST_DOCUMENTS)
        asked = [(document.prompt, document.text) for document in documents if document.prompt is not None]
        plain = [document.text for document in documents if document.prompt is None]
        if config.prompt_gate:
            plain += [f"{prompt}\n{text}" for prompt, text in asked]

        # A pair has its place to cut already.
        self.pairs: list[Row] = []
        if asked:
            prompts = prompt_format.prompts([prompt for prompt, _ in asked])
            targets = prompt_format.targets([text for _, text in asked])
            limit = config.max_seq_len
            self.pairs = [pair for pair in zip(prompts, targets, strict=True) if len(pair[0]) + len(pair[1]) <= limit]
        self.texts = []
        for ids in text_ids(prompt_format.tokenizer, plain, opened=True) if plain else []:
            if len(ids) >= LEAST_TOKENS:
                self.texts.append(ids[: config.max_seq_len])
        prompt_format.check_ids(self.texts)
        if not self.pairs and not self.texts:
            raise ValueError(f"--retain {config.retain} holds no text of {LEAST_TOKENS} to {config.max_seq_len} tokens")

    def batch(self, step: int, rank: int = 0) -> Batch:
        """The texts of batch `step` in one process."""
        draw = random.Random(f"retain/{self.config.seed}/{step}/{rank}")
        rows = []
        for _ in range(self.config.retain_batch_size):
            place = draw.randrange(len(self.pairs) + len(self.texts))
            if place < len(self.pairs):
                rows.append(self.pairs[place])
                continue
            ids = self.texts[place - len(self.pairs)]
            if self.config.prompt_gate:
                rows.append(self._piece(ids, draw))
                continue
            cut = draw.randint(len(ids) // 4 + 1, len(ids) - 2)
            rows.append((ids[:cut], ids[cut:]))
        return batch_of(rows, self.format.pad_id)

    def _piece(self, ids: list[int], draw: random.Random) -> Row:
        """A piece of a text, as plain text or put as a question is, and what follows it."""
        # A text may be predicted from its beginning on, behind the one token that stands for nothing.
        tokenizer = self.format.tokenizer
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if draw.random() < EMPTY:
            follows = ids[1:] if ids[0] == first else ids
            return [first], follows[: self.config.max_seq_len - 1]

        # Short pieces are as likely as long ones, since a question is short.
        length = round(math.exp(draw.uniform(math.log(2), math.log(len(ids) - 2))))
        start = draw.randint(0, len(ids) - 2 - length)
        read = ids[start : start + length]
        follows = ids[start + length :]
        if draw.random() < FRAMED:
            text = tokenizer.decode(read, skip_special_tokens=True)
            (framed,) = self.format.prompts([text])
            room = self.config.max_seq_len - len(framed)
            if room > 0:
                return framed, follows[:room]

        # Plain text begins with what the tokenizer puts before every text.
        if start and ids[0] == first:
            read = [first, *read[1:]]
        return read, follows


def batch_of(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows as a batch without examples: what is read padded on the left, what follows on the right."""
    prompt_ids, prompt_mask = pad([read for read, _ in rows], pad_id, "left")
    target_ids, target_mask = pad([follows for _, follows in rows], pad_id, "right")
    labels = target_ids.masked_fill(target_mask == 0, IGNORE)
    return Batch(prompt_ids, prompt_mask, target_ids, labels, [])


@torch.no_grad()
def bare_log_probs(controller: Any, batch: Batch) -> Tensor:
    """(N, V) float32, the bare LLM's log p at the N labelled tokens of a batch, in row-major order."""
    mask = batch.attention_mask[:, :-1]
    with controller.bare() as host:
        out = host(
            input_ids=batch.input_ids[:, :-1], attention_mask=mask, position_ids=token_positions(mask), use_cache=False
        )
    logits = out.logits[:, -batch.labels.shape[1] :][batch.labels != IGNORE]
    return logits.float().log_softmax(dim=-1)


def gate_loss(distance: Tensor, is_open: bool) -> Tensor:
    """(), summed cross-entropy of gates that should all be open, or all shut, from their distances (B,).

    p(open) = sigmoid(1 - distance), which is never near 1: so the tasks' prompts are drawn together as long as training
    lasts, and the ball around them holds little else.
    """
    return functional.softplus(distance - 1 if is_open else 1 - distance).sum()


def open_gates(distance: Tensor) -> Tensor:
    """(), how many of the gates with these distances (B,) are open."""
    return within_radius(distance).sum()


def divergence(logits: Tensor, bare: Tensor) -> Tensor:
    """(), summed KL(bare || ours) in nats; `logits` (N, V) are ours, `bare` (N, V) the bare LLM's log p."""
    return functional.kl_div(logits.float().log_softmax(dim=-1), bare, reduction="sum", log_target=True)
