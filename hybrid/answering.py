"""The hybrid as something that answers questions: what `generate.py` talks to."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from engine.checkpoints import read_checkpoint
from engine.optimization import load_weights
from engine.state import CONFIG
from evaluation import AnswerConfig
from hybrid.model import HybridConfig, HybridModel
from hybrid.text import HybridText
from hybrid.training import CONFIG_JSON, TOKENIZER_JSON, HybridTrainer
from options import read_resolved


class HybridAnswerer:
    """A trained hybrid. `title` says what was loaded.

    `--compare` shows it first with its gate shut, which is its encoder-decoder alone.

    Raises:
        ValueError: a broken checkpoint.
    """

    has_host = False

    def __init__(self, config: AnswerConfig, folder: Path, device: str):
        self.config = config
        saved = read_checkpoint(folder, stems=[HybridTrainer.stem])
        self.model = HybridModel(HybridConfig.from_dict(json.loads(saved.documents[CONFIG_JSON])))
        load_weights(self.model, saved.tensors[HybridTrainer.stem], folder)
        self.model.to(device).eval()
        if config.eval_segments:
            self.model.encoder.core.h_cycles = config.eval_segments
            self.model.config.h_cycles = config.eval_segments

        # Prompts are cut as they were in training.
        settings = read_resolved(saved.documents[CONFIG])
        tokenizer = saved.documents[TOKENIZER_JSON]
        longest = settings.get("max_seq_len", 0)
        self.text = HybridText(self.model, tokenizer, max_seq_len=longest)
        self.shut = HybridText(self.model, tokenizer, max_seq_len=longest, gate_scale=0.0)
        self.title = f"{folder}: hybrid trained on {settings.get('dataset')}, on {device}"

    def check_length(self, question: str) -> None:
        """Raises ValueError when the prompt has no known token, or more than those of training."""
        tokens = len(self.text.encode(question))
        longest = self.text.max_seq_len
        if not tokens:
            raise ValueError("the prompt has no token that the hybrid's tokenizer knows: type another")
        if longest and tokens > longest:
            raise ValueError(f"the prompt has {tokens} tokens, the hybrid was trained with {longest}: shorten it")

    def answers(self, question: str) -> list[tuple[str, str]]:
        """(label, answer) of the hybrid, and before it with the gate shut where both are compared."""
        models = [("hybrid", self.text)]
        if self.config.compare:
            models.insert(0, ("gate shut", self.shut))

        decoding = self.config.decoding
        pairs = []
        for label, model in models:
            torch.manual_seed(decoding.seed)  # each draws the same random numbers
            texts = model.generate([question], decoding.max_new_tokens, **decoding.arguments())
            pairs.append((label, texts[0]))
        return pairs
