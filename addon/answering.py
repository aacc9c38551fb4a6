"""The add-on as something that answers questions: what `generate.py` talks to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from addon.adapters import load_controller, saved_format
from engine.placement import spread_text
from evaluation import AnswerConfig, generate_texts
from host import load_tokenizer
from text_data.taken import taken_answer


class AddonAnswerer:
    """A frozen LLM with its trained adapter, in the prompt format it was trained with.

    `title` says what was loaded. `--compare` shows the bare LLM's answer first.

    Raises:
        ValueError: a broken checkpoint, or a base model that is missing or another one.
    """

    has_host = True

    def __init__(self, config: AnswerConfig, folder: Path, device: str):
        self.config = config
        self.model, document = load_controller(folder, device, config.trust_remote_code, config.spread)
        if config.eval_segments and self.model.recurrent:
            self.model.config.segments = config.eval_segments

        # Questions are put as they were in training.
        base = document["base_model_name_or_path"]
        tokenizer = load_tokenizer(base, config.trust_remote_code, document.get("base_revision"))
        rows = self.model.host.get_input_embeddings().weight.shape[0]
        self.format, note = saved_format(document, tokenizer, rows)
        if note:
            print(note, file=sys.stderr)
        packed = "" if document["load_in"] == "none" else f" in {document['load_in']}"
        self.title = f"{folder}: {base}{packed} + {self.model.title} on {device}"
        if spread_text(self.model.host):
            self.title += f"; {spread_text(self.model.host)}"

    def check_length(self, question: str) -> None:
        """Raises ValueError when prompt and answer may outgrow the LLM's positions."""
        host = self.model.host.config.get_text_config()
        prompt = len(self.format.prompts([question])[0])
        tokens = prompt + self.config.decoding.max_new_tokens + self.model.virtual_tokens
        positions = getattr(host, "max_position_embeddings", None)
        if positions and tokens > positions:
            raise ValueError(
                f"prompt and answer may take {tokens} tokens, the LLM has {positions} positions: shorten the prompt or "
                "lower --max_new_tokens"
            )

    def answers(self, question: str) -> list[tuple[str, str]]:
        """(label, answer) of the LLM with its adapter, and before it of the bare LLM where both are compared.

        Behind a text that holds more than the answer stands what --answer_from takes out of it.
        """
        pairs = []
        if self.config.compare:
            with self.model.bare() as host:
                pairs += self._answer("bare LLM", host, question)
        return pairs + self._answer(f"LLM + {self.model.title}", self.model, question)

    def _answer(self, label: str, model: Any, question: str) -> list[tuple[str, str]]:
        """The labelled text of one model, and the answer taken out of it where that is another text."""
        text = generate_texts(model, self.format, [question], self.config.decoding)[0]
        taken = taken_answer(text, self.format.answer_from, numeric=True)
        if taken == text:
            return [(label, text)]
        return [(label, text), ("read as", taken)]
