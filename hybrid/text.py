"""The hybrid as text in, text out: answers and log-likelihoods, for evaluation, the suite and `generate.py`."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.batches import IGNORE, by_length
from hybrid.model import HybridModel
from suite.text_model import Cuts
from text_data.batches import pad_batch
from text_data.tokenizer import parse_tokenizer
from text_data.triples import Triple

NO_TARGET = (0,)  # stands for the decoder's side where only the encoder's is needed; any id will do


def _no_progress(done: int) -> None:
    """Shows nothing."""


class HybridText:
    """A hybrid with its tokenizer; it gives answers and log-likelihoods.

    Args:
        model: the hybrid.
        tokenizer_json: text of a `tokenizers` file.
        batch_size: prompts of one batch, at most.
        max_seq_len: most tokens of a prompt, whose END is kept; 0: no limit.
        autocast: makes the context in which the model runs.
        gate_scale: replaces the model's own while this object uses it; 0 is the encoder-decoder without HRM. None:
            the model's own.

    Raises:
        ValueError: the text is no tokenizer.

    Attributes:
        segments_used: mean number of HRM cycles over the examples of the latest call; None before any.
        cuts: which of its questions and contexts lost their beginning to `max_seq_len`, which answers met the limit.
    """

    def __init__(
        self,
        model: HybridModel,
        tokenizer_json: str,
        batch_size: int = 32,
        max_seq_len: int = 0,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        gate_scale: float | None = None,
    ):
        self.model = model
        self.tokenizer = parse_tokenizer(tokenizer_json, "the tokenizer of the data or of the checkpoint")
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.autocast = autocast
        self.gate_scale = gate_scale
        self.segments_used: float | None = None
        self.cuts = Cuts()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end of sequence; ignored labels and special tokens left out."""
        eos = self.model.config.eos_token_id
        labelled = (token for token in ids if token != IGNORE)
        kept = list(itertools.takewhile(lambda token: token != eos, labelled))
        return self.tokenizer.decode(kept, skip_special_tokens=True)

    @contextlib.contextmanager
    def _ready(self) -> Iterator[torch.device]:
        """Evaluation mode with this object's gate; gives the model's device and puts everything back."""
        was_training = self.model.training
        scale = self.model.config.gate_scale
        self.model.eval()
        if self.gate_scale is not None:
            self.model.config.gate_scale = self.gate_scale

        try:
            with torch.no_grad(), self.autocast():
                yield self.model.device
        finally:
            self.model.config.gate_scale = scale
            self.model.train(was_training)

    def _triple(self, context: Sequence[int], target: Sequence[int]) -> Triple:
        """The end of a context (a lone bos where it is empty) for the encoder, the target for the decoder."""
        bos = self.model.config.bos_token_id
        context = list(context) or [bos]
        if self.max_seq_len:
            context = context[-self.max_seq_len :]
        return Triple(context, [bos, *target[:-1]], list(target))

    def _batch(self, triples: Sequence[Triple], device: torch.device) -> dict[str, Tensor]:
        batch = pad_batch(triples, self.model.config.pad_token_id)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        progress: Callable[[int], None] = _no_progress,
        **sampling: Any,
    ) -> list[str]:
        """The answer to each prompt, in order.

        Args:
            prompts: the questions.
            max_new_tokens: tokens of an answer, at most.
            progress: called after each batch with the number of answers so far.
            sampling: arguments of the model's `generate`; greedy without any.
        """
        return self.generate_ids([self.encode(prompt) for prompt in prompts], max_new_tokens, progress, **sampling)

    def generate_ids(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        progress: Callable[[int], None] = _no_progress,
        **sampling: Any,
    ) -> list[str]:
        """`generate` from token ids."""
        how = {"do_sample": False, "num_beams": 1} | sampling
        cycles = 0  # of all examples together
        done = 0

        with self._ready() as device:

            def answers(ids: list[list[int]]) -> list[tuple[str, bool]]:
                nonlocal cycles, done
                batch = self._batch([self._triple(prompt, NO_TARGET) for prompt in ids], device)
                mask = batch["encoder_mask"]

                # The prompt is encoded here, not inside `generate`, to see how many cycles it took.
                encoded = self.model.encoder(batch["encoder_ids"], mask)
                generated = self.model.generate(
                    attention_mask=mask, encoder_outputs=encoded, max_new_tokens=max_new_tokens, **how
                )

                cycles += int(encoded.cycles_used.sum())
                done += len(ids)
                rows = [row[1:] for row in generated.tolist()]  # without the bos they start with
                progress(done)
                return [(self.decode(row), self.model.config.eos_token_id not in row) for row in rows]

            answered = by_length(prompts, list(map(len, prompts)), self.batch_size, answers)

        self.segments_used = cycles / max(len(prompts), 1)
        self.cuts = Cuts(self._too_long(prompts), tuple(cut for _, cut in answered))
        return [text for text, _ in answered]

    def _too_long(self, prompts: Sequence[Sequence[int]]) -> tuple[bool, ...]:
        """For each row of ids, whether its beginning is cut off."""
        most = self.max_seq_len or math.inf
        return tuple(len(prompt) > most for prompt in prompts)

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """(sum of log p(continuation | context) in nats, tokens) of each pair; the encoder reads the context."""
        sums: list[tuple[float, int]] = []
        cut: list[bool] = []
        cycles = 0
        with self._ready() as device:
            for start in range(0, len(pairs), self.batch_size):
                # In the order given: the length that a batch is padded to changes sums in their last digits.
                part = pairs[start : start + self.batch_size]
                contexts = [self.encode(context) for context, _ in part]
                targets = [self.encode(continuation) for _, continuation in part]

                # A continuation without a token cannot be padded: a stand-in keeps its place.
                rows = zip(contexts, targets, strict=True)
                triples = [self._triple(context, target or NO_TARGET) for context, target in rows]
                terms, used = self._log_probabilities(self._batch(triples, device))
                cycles += used
                cut += self._too_long(contexts)

                for target, total in zip(targets, terms, strict=True):
                    sums.append((total if target else 0.0, len(target)))

        self.segments_used = cycles / max(len(pairs), 1)
        self.cuts = Cuts(tuple(cut))
        return sums

    def _log_probabilities(self, batch: dict[str, Tensor]) -> tuple[list[float], int]:
        """(log probability of each row's labels in nats, summed over them; HRM cycles of all rows together)."""
        mask = batch["encoder_mask"]
        encoded = self.model.encoder(batch["encoder_ids"], mask)
        logits = self.model(
            attention_mask=mask, encoder_outputs=encoded, decoder_input_ids=batch["decoder_input_ids"]
        ).logits.float()

        # Pads get some valid index; the product below drops their terms.
        labels = batch["labels"]
        indices = labels.clamp(min=0)[..., None]
        terms = logits.log_softmax(dim=-1).gather(-1, indices).squeeze(-1)
        sums = (terms * (labels != IGNORE)).sum(dim=1)
        return sums.tolist(), int(encoded.cycles_used.sum())
