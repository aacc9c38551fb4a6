"""Every causal LM, bare or with the add-on, as text in, text out: what the evaluation suite asks of a model.

Shapes: B batch, S context tokens, T continuation tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from batching import PromptFormat, pad
from evaluation import Decoding, generate_texts
from suite.text_model import TextModel

__all__ = ["CausalTextModel", "TextModel", "adds_space"]

MOST_LOGITS = 2**27  # of one batch, 0.5 GiB in float32: a large vocabulary makes batches smaller
ANCHOR = "\n"
Job = tuple[int, int, list[int], list[int]]  # place of the pair, start in its continuation, context ids, piece of ids


class CausalTextModel:
    """Any Hugging Face causal LM, `HRMController` included, as a `suite.text_model.TextModel`.

    Prompts of `generate` are rendered by the prompt format; texts of `log_likelihoods` are taken as they are, and HRM
    reads the context. `bare` asks an `HRMController` for its bare LLM, in its own dtype; `autocast` makes the context
    of every other call.

    Raises:
        ValueError: as PromptFormat, where a tokenizer is given in its place.
    """

    def __init__(self, model: Any, prompt_format: Any, batch_size: int = 16, bare: bool = False,
                 autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext) -> None:
        given = isinstance(prompt_format, PromptFormat)
        self.format: PromptFormat = prompt_format if given else PromptFormat(prompt_format)
        self.model, self.batch_size, self.bare, self.autocast = model, batch_size, bare, autocast
        self.segments_used: float | None = None
        text = model.config.get_text_config()
        self.positions: float = getattr(text, "max_position_embeddings", None) or math.inf
        self.positions -= 0 if bare else getattr(model, "virtual_tokens", 0)
        self.vocab_size = text.vocab_size
        self._dummy_space = adds_space(self.format.tokenizer)

    @contextlib.contextmanager
    def _ready(self) -> Iterator[tuple[Any, torch.device]]:
        """(the model that answers, its device), in evaluation mode, without gradient."""
        was_training = self.model.training
        self.model.eval()
        asked = self.model.bare() if self.bare else contextlib.nullcontext(self.model)
        autocast = contextlib.nullcontext() if self.bare else self.autocast()
        try:
            with asked as model, autocast, torch.no_grad():
                yield model, next(model.parameters()).device
        finally:
            self.model.train(was_training)

    # --- answers ---

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, progress: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """As `TextModel.generate`. A prompt that fills the LLM's positions gets fewer new tokens, or none and ""."""
        lengths = [len(ids) for ids in self.format.prompts(prompts)] if prompts else []
        budgets = [int(min(max_new_tokens, self.positions - length)) for length in lengths]
        order = sorted(range(len(prompts)), key=lambda place: (-budgets[place], lengths[place]))
        texts, segments = [""] * len(prompts), []
        done = sum(budget < 1 for budget in budgets)
        with self._ready() as (model, device), torch.random.fork_rng([device] if device.type == "cuda" else []):
            thinks = "segments_log" in inspect.signature(model.forward).parameters
            for budget, same in itertools.groupby(order, key=budgets.__getitem__):
                group = list(same) if budget > 0 else []
                for start in range(0, len(group), self.batch_size):
                    places, log = group[start : start + self.batch_size], []
                    questions, extra = [prompts[place] for place in places], {"segments_log": log} if thinks else {}
                    answers = generate_texts(model, self.format, questions, Decoding(max_new_tokens=budget), **extra)
                    for place, text in zip(places, answers, strict=True):
                        texts[place] = text
                    segments += log[0].tolist() if log else []
                    done += len(places)
                    progress(done)
        self.segments_used = sum(segments) / len(segments) if segments else None
        return texts

    # --- likelihood ---

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """As `TextModel.log_likelihoods`."""
        return [(float(terms.sum()), len(terms)) for terms in self.token_log_probs(pairs)]

    def token_log_probs(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
        """(continuation tokens,) float64 log p of each continuation token, per pair.

        Where the LLM's positions are too few, the context loses its beginning, and a long continuation is predicted
        piece by piece, each from all that fits before it.
        """
        contexts = self._context_ids([context for context, _ in pairs]) if pairs else []
        continuations = self._continuation_ids([continuation for _, continuation in pairs]) if pairs else []
        jobs = [job for place, ids in enumerate(zip(contexts, continuations, strict=True))
                for job in self._pieces(place, *ids)]
        jobs.sort(key=lambda job: len(job[2]) + len(job[3]))
        found: dict[tuple[int, int], Tensor] = {}
        segments: list[int] = []
        with self._ready() as (model, device):
            for batch in self._batches(jobs):
                terms = self._score(model, device, [job[2] for job in batch], [job[3] for job in batch], segments)
                found |= {job[:2]: row for job, row in zip(batch, terms, strict=True)}
        self.segments_used = sum(segments) / len(segments) if segments else None
        rows: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.float64)] for _ in pairs]
        for (place, _), terms in sorted(found.items(), key=lambda entry: entry[0]):
            rows[place].append(terms)
        return [torch.cat(row) for row in rows]

    def _context_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Opened as the tokenizer opens texts and never closed; an empty one holds a single special token."""
        tokenizer = self.format.tokenizer
        eos = tokenizer.eos_token_id
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        rows = tokenizer(list(texts), add_special_tokens=True, return_attention_mask=False)["input_ids"]
        plain = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        closed = [row[-1:] == [eos] and own[-1:] != [eos] for row, own in zip(rows, plain, strict=True)]
        return [(row[:-1] if shut else row) or [first] for row, shut in zip(rows, closed, strict=True)]

    def _continuation_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenized apart from the contexts, as text that goes on: no special tokens, no space put in front."""

        def ids(some: Sequence[str]) -> list[list[int]]:
            return self.format.tokenizer(list(some), add_special_tokens=False, return_attention_mask=False)["input_ids"]

        if not self._dummy_space:
            return ids(texts)
        anchor = ids([ANCHOR])[0]
        anchored = ids([ANCHOR + text for text in texts])
        return [row[len(anchor) :] if row[: len(anchor)] == anchor else alone
                for row, alone in zip(anchored, ids(texts), strict=True)]

    def _pieces(self, place: int, context: list[int], ids: list[int]) -> Iterator[Job]:
        """Jobs that fit the LLM's positions and cover `ids` once."""
        tokenizer = self.format.tokenizer
        fits = len(context) + len(ids) <= self.positions
        size = len(ids) if fits else int(self.positions) // 2
        for start in range(0, len(ids), size or 1):
            piece, before = ids[start : start + size], context + ids[:start]
            room = len(before) if fits else int(self.positions) - len(piece)
            opened = before[:1] == [tokenizer.bos_token_id]  # some LLMs are lost without their first token
            if len(before) > room:
                before = before[:1] + before[len(before) - room + 1 :] if opened else before[-room:]
            yield place, start, before, piece

    def _batches(self, jobs: list[Job]) -> Iterator[list[Job]]:
        """Jobs in batches whose logits stay below MOST_LOGITS."""
        batch: list[Job] = []
        longest = 0
        for job in jobs:
            longest = max(longest, len(job[3]))
            full = len(batch) == self.batch_size or (len(batch) + 1) * longest * self.vocab_size > MOST_LOGITS
            if batch and full:
                yield batch
                batch, longest = [], len(job[3])
            batch.append(job)
        if batch:
            yield batch

    def _score(self, model: Any, device: torch.device, contexts: list[list[int]], targets: list[list[int]],
               segments: list[int]) -> list[Tensor]:
        """Log p of each row's target tokens. Contexts end in one column, so columns S - 1 to S + T - 2 predict them."""
        context_ids, context_mask = pad(contexts, self.format.pad_id, "left")
        target_ids, target_mask = pad(targets, self.format.pad_id, "right")
        ids = torch.cat([context_ids, target_ids], dim=1)[:, :-1].to(device)
        mask = torch.cat([context_mask, target_mask], dim=1)[:, :-1].to(device)
        width = target_ids.shape[1]
        known = inspect.signature(model.forward).parameters
        offered = {
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            "logits_to_keep": width,
            "prompt_mask": torch.cat([context_mask, torch.zeros_like(target_mask)], dim=1)[:, :-1].to(device),
            "use_cache": False,
        }
        out = model(input_ids=ids, attention_mask=mask, **{name: offered[name] for name in offered if name in known})
        used = getattr(out, "segments_used", None)
        segments.extend(used.tolist() if used is not None else [])
        logits = out.logits[:, -width:]
        rows = []
        for row, target in zip(logits, targets, strict=True):
            own = row[: len(target)].float()
            picked = own.gather(1, torch.tensor(target, device=device)[:, None])[:, 0]
            rows.append((picked - own.logsumexp(dim=-1)).double().cpu())
        return rows


def adds_space(tokenizer: Any) -> bool:
    """The tokenizer puts a space in front of every text (SentencePiece's dummy prefix), so pieces do not join."""
    alone, spaced = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "\na"))
    return alone != spaced[-len(alone) :]
