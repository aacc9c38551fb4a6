"""Every causal LM, bare or with the add-on, as text in, text out: what the evaluation suite asks of a model.

Shapes: B batch, S context tokens, T continuation tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batching import PromptFormat, pad
from engine.batches import by_length
from engine.placement import device_of
from evaluation import Decoding, Generated, generate_all
from suite.text_model import Cuts, TextModel
from text_data.frames import adds_space, anchors_of, continuation_ids, text_ids

__all__ = ["CausalTextModel", "TextModel", "adds_space"]

MOST_LOGITS = 2**27  # of one batch, 0.5 GiB in float32: a large vocabulary makes batches smaller


@dataclass(frozen=True)
class Piece:
    """A part of one continuation, scored in one row of a batch.

    pair: index of the pair it belongs to.
    start: index of its first token in the continuation.
    context_ids: what the model reads before it.
    ids: the tokens to score.
    """

    pair: int
    start: int
    context_ids: list[int]
    ids: list[int]


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
        if not isinstance(prompt_format, PromptFormat):
            prompt_format = PromptFormat(prompt_format)
        self.format: PromptFormat = prompt_format
        self.model = model
        self.batch_size = batch_size
        self.bare = bare
        self.autocast = autocast
        self.segments_used: float | None = None
        self.cuts = Cuts()

        # The tokens that prompt and answer may have together; virtual tokens of an adapter take some of them.
        text_config = model.config.get_text_config()
        self.positions: float = getattr(text_config, "max_position_embeddings", None) or math.inf
        if not bare:
            self.positions -= getattr(model, "virtual_tokens", 0)
        self.vocab_size = text_config.vocab_size
        if self.format.rows is None:
            self.format.fit_table(self.vocab_size)
        self._anchors = anchors_of(self.format.tokenizer, "")  # no anchor is part of a context

    @contextlib.contextmanager
    def _ready(self) -> Iterator[tuple[Any, torch.device]]:
        """(the model that answers, its device), in evaluation mode, without gradient."""
        was_training = self.model.training
        self.model.eval()
        if self.bare:
            answering = self.model.bare()
            autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
        else:
            answering = contextlib.nullcontext(self.model)
            autocast = self.autocast()
        try:
            with answering as model, autocast, torch.no_grad():
                yield model, device_of(model)
        finally:
            self.model.train(was_training)

    # --- answers ---

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, progress: Callable[[int], None] = lambda done: None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """As `TextModel.generate`. A prompt that fills the LLM's positions gets fewer new tokens, or none and "".

        Generation ends at any text of `stop`, which is still part of the answer.
        """
        if not prompts:
            self.segments_used = None
            self.cuts = Cuts()
            return []

        # Prompts that leave room for the same number of new tokens are generated together, the longest answers first.
        lengths = list(map(len, self.format.prompts(prompts)))
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            budget = int(min(max_new_tokens, self.positions - length))
            groups.setdefault(budget, []).append(index)

        texts = [""] * len(prompts)
        cut = [True] * len(prompts)  # no room at all cuts an answer, too
        segments: list[int] = []
        done = sum(len(indices) for budget, indices in groups.items() if budget < 1)  # these stay empty

        def count(answers: int) -> None:
            nonlocal done
            done += answers
            progress(done)

        with self._ready() as (model, device), torch.random.fork_rng(_cuda(device)):
            for budget in sorted(groups, reverse=True):
                if budget < 1:
                    break
                indices = groups[budget]
                questions = [prompts[index] for index in indices]
                sizes = [lengths[index] for index in indices]
                run = functools.partial(self._answers, model, budget=budget, segments=segments, count=count, stop=stop)
                answers = by_length(questions, sizes, self.batch_size, run)
                for index, answer in zip(indices, answers, strict=True):
                    texts[index] = answer.text
                    cut[index] = not answer.finished
        self.segments_used = _mean(segments)
        self.cuts = Cuts((False,) * len(prompts), tuple(cut))  # questions are read whole
        return texts

    def _answers(
        self, model: Any, questions: list[str], budget: int, segments: list[int], count: Callable[[int], None],
        stop: Sequence[str] = (),
    ) -> list[Generated]:
        """Answers of one batch, whose size `count` gets.

        An HRM model's segments, one number a question, are added to `segments`.
        """
        log: list[Tensor] = []
        extra: dict[str, Any] = {"stop_strings": list(stop)}
        if "segments_log" in inspect.signature(model.forward).parameters:
            extra["segments_log"] = log
        answers = generate_all(model, self.format, questions, Decoding(max_new_tokens=budget), **extra)
        if log:
            segments.extend(log[0].tolist())
        count(len(answers))
        return answers

    # --- likelihood ---

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """As `TextModel.log_likelihoods`."""
        return [(float(terms.sum()), len(terms)) for terms in self.token_log_probs(pairs)]

    def token_log_probs(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
        """(continuation tokens,) float64 log p of each continuation token, per pair; see `token_scores`."""
        return [scores[0] for scores in self.token_scores(pairs)]

    def token_scores(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
        """(2, continuation tokens) float64 per pair: log p of each token, and 1 where no token is likelier, else 0.

        Where the LLM's positions are too few, the context loses its beginning, and a long continuation is predicted
        piece by piece, each from all that fits before it.
        """
        if not pairs:
            self.segments_used = None
            self.cuts = Cuts()
            return []

        # Cut every continuation into pieces that fit, and sort them by length, so that batches waste little padding.
        contexts = self._context_ids([context for context, _ in pairs])
        continuations = self._continuation_ids([continuation for _, continuation in pairs])
        pieces: list[Piece] = []
        cut = [len(context) + len(ids) > self.positions for context, ids in zip(contexts, continuations, strict=True)]
        self.cuts = Cuts(tuple(cut))
        for pair, (context_ids, ids) in enumerate(zip(contexts, continuations, strict=True)):
            pieces.extend(self._pieces(pair, context_ids, ids))
        pieces.sort(key=lambda piece: len(piece.context_ids) + len(piece.ids))

        # Score the pieces.
        terms: dict[tuple[int, int], Tensor] = {}
        segments: list[int] = []
        with self._ready() as (model, device):
            for batch in batches_of(pieces, self.batch_size, self.vocab_size):
                scored = self._score(model, device, batch, segments)
                for piece, row in zip(batch, scored, strict=True):
                    terms[piece.pair, piece.start] = row
        self.segments_used = _mean(segments)

        # Put the pieces of each continuation together again, in their order.
        rows: list[list[Tensor]] = [[torch.zeros(2, 0, dtype=torch.float64)] for _ in pairs]
        for pair, start in sorted(terms):
            rows[pair].append(terms[pair, start])
        return [torch.cat(row, dim=1) for row in rows]

    def _context_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Opened as the tokenizer opens texts and never closed; an empty one holds a single special token."""
        tokenizer = self.format.tokenizer
        eos = tokenizer.eos_token_id
        first = tokenizer.bos_token_id
        if first is None:
            first = eos
        opened = text_ids(tokenizer, texts, opened=True)
        plain = text_ids(tokenizer, texts)

        rows = []
        for row, own in zip(opened, plain, strict=True):
            # An end that the tokenizer added is taken off; one that the text itself holds stays.
            if row[-1:] == [eos] and own[-1:] != [eos]:
                row = row[:-1]
            rows.append(row or [first])
        return self._checked(rows)

    def _continuation_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenized apart from the contexts, as text that goes on: no special tokens, no space put in front."""
        return self._checked(continuation_ids(self.format.tokenizer, texts, self._anchors, text_ids))

    def _checked(self, rows: list[list[int]]) -> list[list[int]]:
        """The rows as they are. Raises ValueError as `PromptFormat.check_ids`."""
        self.format.check_ids(rows)
        return rows

    def _pieces(self, pair: int, context_ids: list[int], ids: list[int]) -> Iterator[Piece]:
        """Pieces that fit the LLM's positions and cover `ids` once."""
        if len(context_ids) + len(ids) <= self.positions:
            if ids:
                yield Piece(pair, 0, context_ids, ids)
            return

        # Half of the positions for the tokens to score, the rest for what comes before them.
        bos = self.format.tokenizer.bos_token_id
        size = int(self.positions) // 2
        for start in range(0, len(ids), size or 1):
            piece = ids[start : start + size]
            before = context_ids + ids[:start]
            room = int(self.positions) - len(piece)
            if len(before) > room and before[:1] == [bos]:
                # Some LLMs are lost without their first token, so it stays when the beginning is cut.
                before = before[:1] + before[len(before) - room + 1 :]
            elif len(before) > room:
                before = before[-room:]
            yield Piece(pair, start, before, piece)

    def _score(self, model: Any, device: torch.device, batch: list[Piece], segments: list[int]) -> list[Tensor]:
        """(2, tokens) float64 of each piece, as `token_scores`; an HRM model's segments are added to `segments`.

        Contexts are padded on the left, so all end in column S - 1. Columns S - 1 to S + T - 2 predict the T tokens.
        """
        context_ids, context_mask = pad([piece.context_ids for piece in batch], self.format.pad_id, "left")
        target_ids, target_mask = pad([piece.ids for piece in batch], self.format.pad_id, "right")
        ids = torch.cat([context_ids, target_ids], dim=1)[:, :-1].to(device)
        mask = torch.cat([context_mask, target_mask], dim=1)[:, :-1].to(device)
        prompt_mask = torch.cat([context_mask, torch.zeros_like(target_mask)], dim=1)[:, :-1].to(device)

        # Each family's forward takes what it knows of these.
        width = target_ids.shape[1]
        arguments = {
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            "logits_to_keep": width,
            "prompt_mask": prompt_mask,
            "use_cache": False,
        }
        accepted = inspect.signature(model.forward).parameters.keys() & arguments.keys()
        out = model(input_ids=ids, attention_mask=mask, **{name: arguments[name] for name in accepted})
        used = getattr(out, "segments_used", None)
        if used is not None:
            segments.extend(used.tolist())

        # log p = logit - logsumexp, row by row, so that no (B, T, V) tensor in float32 is made.
        rows = []
        for logits, piece in zip(out.logits[:, -width:], batch, strict=True):
            own = logits[: len(piece.ids)].float()
            picked = own.gather(1, torch.tensor(piece.ids, device=device)[:, None])[:, 0]
            log_p = (picked - own.logsumexp(dim=-1)).double()
            is_top = (picked >= own.amax(dim=-1)).double()
            rows.append(torch.stack([log_p, is_top]).cpu())
        return rows


def batches_of(pieces: list[Piece], size: int, vocabulary: int) -> Iterator[list[Piece]]:
    """Pieces in batches of at most `size` whose logits stay below MOST_LOGITS."""
    batch: list[Piece] = []
    longest = 0
    for piece in pieces:
        longest = max(longest, len(piece.ids))
        full = len(batch) == size or (len(batch) + 1) * longest * vocabulary > MOST_LOGITS
        if batch and full:
            yield batch
            batch = []
            longest = len(piece.ids)
        batch.append(piece)
    if batch:
        yield batch


def _cuda(device: torch.device) -> list[torch.device]:
    """The devices whose random state must be kept beside the CPU's."""
    return [device] if device.type == "cuda" else []


def _mean(numbers: list[int]) -> float | None:
    """None of nothing."""
    return sum(numbers) / len(numbers) if numbers else None
