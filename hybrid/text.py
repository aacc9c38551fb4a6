"""The hybrid as text in, text out: answers and log-likelihoods, for evaluation, the suite and `generate.py`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from engine.batches import IGNORE
from hybrid.model import HybridModel
from text_data.batches import pad_batch
from text_data.triples import Triple


class HybridText:
    """A hybrid with its tokenizer (text of a `tokenizers` file). Prompts longer than `max_seq_len` keep their end.

    `gate_scale` replaces the model's own; 0 is the encoder-decoder without HRM. `segments_used` is the mean number of
    cycles of the latest call.
    """

    def __init__(self, model: HybridModel, tokenizer_json: str, batch_size: int = 32, max_seq_len: int = 0,
                 autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
                 gate_scale: float | None = None):
        self.model, self.tokenizer = model, Tokenizer.from_str(tokenizer_json)
        self.batch_size, self.max_seq_len, self.autocast = batch_size, max_seq_len, autocast
        self.gate_scale, self.segments_used = gate_scale, None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end of sequence; ignored labels and special tokens left out."""
        eos = self.model.config.eos_token_id
        kept = itertools.takewhile(lambda token: token != eos, (token for token in ids if token != IGNORE))
        return self.tokenizer.decode(list(kept), skip_special_tokens=True)

    @contextlib.contextmanager
    def _ready(self) -> Iterator[torch.device]:
        was_training, scale = self.model.training, self.model.config.gate_scale
        self.model.eval()
        self.model.config.gate_scale = scale if self.gate_scale is None else self.gate_scale
        try:
            with torch.no_grad(), self.autocast():
                yield self.model.device
        finally:
            self.model.config.gate_scale = scale
            self.model.train(was_training)

    def _triple(self, context: list[int], target: list[int]) -> Triple:
        bos = self.model.config.bos_token_id
        return Triple(context[-self.max_seq_len :] if self.max_seq_len else context, [bos, *target[:-1]], target)

    def generate(self, prompts: Sequence[str], max_new_tokens: int,
                 progress: Callable[[int], None] = lambda done: None, **sampling: Any) -> list[str]:
        """The answer to each prompt, in order: greedy unless `sampling` (arguments of `generate`) says otherwise."""
        return self.generate_ids([self.encode(prompt) for prompt in prompts], max_new_tokens, progress, **sampling)

    def generate_ids(self, prompts: Sequence[list[int]], max_new_tokens: int,
                     progress: Callable[[int], None] = lambda done: None, **sampling: Any) -> list[str]:
        """`generate` from token ids."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, str] = {}
        used = 0.0
        with self._ready() as device:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                rows = [self._triple(prompts[index] or [self.model.config.bos_token_id], [0]) for index in chosen]
                batch = pad_batch(rows, self.model.config.pad_token_id)
                mask = batch["encoder_mask"].to(device)
                encoded = self.model.encoder(batch["encoder_ids"].to(device), mask)
                used += float(encoded.cycles_used.sum())
                ids = self.model.generate(attention_mask=mask, encoder_outputs=encoded, max_new_tokens=max_new_tokens,
                                          **({"do_sample": False, "num_beams": 1} | sampling))
                found.update((index, self.decode(row[1:])) for index, row in zip(chosen, ids.tolist(), strict=True))
                progress(len(found))
        self.segments_used = used / max(len(prompts), 1)
        return [found[index] for index in range(len(prompts))]

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """(sum of log p(continuation | context) in nats, tokens) of each pair; the encoder reads the context."""
        triples = [self._triple(self.encode(context) or [self.model.config.bos_token_id], self.encode(text))
                   for context, text in pairs]
        found: list[tuple[float, int]] = []
        used = 0.0
        with self._ready() as device:
            for start in range(0, len(triples), self.batch_size):
                part = triples[start : start + self.batch_size]
                batch = {name: tensor.to(device) for name, tensor in
                         pad_batch([t if t.labels else self._triple(t.encoder_ids, [0]) for t in part],
                                   self.model.config.pad_token_id).items()}
                encoded = self.model.encoder(batch["encoder_ids"], batch["encoder_mask"])
                used += float(encoded.cycles_used.sum())
                logits = self.model(attention_mask=batch["encoder_mask"], encoder_outputs=encoded,
                                    decoder_input_ids=batch["decoder_input_ids"]).logits.float()
                labels = batch["labels"]
                terms = logits.log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
                sums = (terms * (labels != IGNORE)).sum(dim=1).tolist()
                found += [(total if t.labels else 0.0, len(t.labels)) for total, t in zip(sums, part, strict=True)]
        self.segments_used = used / max(len(pairs), 1)
        return found
