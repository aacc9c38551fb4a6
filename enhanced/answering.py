"""The planner/worker LM as something that answers questions: what `generate.py` talks to."""

from __future__ import annotations

import sys
from pathlib import Path

from batching import PromptConfig
from engine.checkpoints import read_checkpoint
from engine.state import CONFIG
from enhanced.config import CycleMeter
from enhanced.model import EnhancedHRMForCausalLM
from enhanced.reasoning_format import split_completion
from enhanced.training import trained_format
from evaluation import AnswerConfig, generate_texts
from host import load_tokenizer
from options import read_resolved


class EnhancedAnswerer:
    """A trained planner/worker LM. `title` says what was loaded.

    It gives the solution; `--compare` shows the thought before it, and after it the cycles spent.

    Raises:
        ValueError: a broken checkpoint.
    """

    has_host = False

    def __init__(self, config: AnswerConfig, folder: Path, device: str):
        self.config = config
        self.model = EnhancedHRMForCausalLM.from_pretrained(folder).to(device).eval()
        documents = read_checkpoint(folder, stems=[]).documents
        settings = read_resolved(documents[CONFIG])
        prompt = PromptConfig(max_seq_len=settings.get("max_seq_len", 0))
        self.format, note = trained_format(load_tokenizer(str(folder)), prompt, documents)
        if note:
            print(note, file=sys.stderr)
        self.cycles = {}  # as trained
        if config.eval_segments:
            self.cycles["max_cycles"] = config.eval_segments
        self.title = f"{folder}: planner/worker LM on {device}"

    def check_length(self, question: str) -> None:
        """Raises ValueError when the prompt is longer than those of training."""
        tokens = len(self.format.prompts([question])[0])
        longest = self.format.max_seq_len
        if longest and tokens > longest:
            raise ValueError(f"the prompt has {tokens} tokens, the model was trained with at most {longest}: shorten "
                             "it")

    def answers(self, question: str) -> list[tuple[str, str]]:
        """(label, text): the solution, or the whole text where it is not well-formed; more of it for `--compare`."""
        meter = CycleMeter()
        with self.model.all_cycles():  # as it was trained and measured
            texts = generate_texts(self.model, self.format, [question], self.config.decoding, cycles_log=meter,
                                   **self.cycles)
        parsed = split_completion(texts[0])

        if not self.config.compare:
            if parsed.well_formed:
                return [("solution", parsed.solution)]
            return [("text", texts[0])]

        solution = parsed.solution or f"(none, not well-formed: {texts[0]})"
        return [("thought", parsed.thought or "(none)"), ("solution", solution),
                ("cycles", f"{meter.mean:.1f} a token")]
