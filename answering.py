"""A checkpoint of any system as something that answers questions: what `generate.py` talks to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Protocol

import torch

from addon.adapters import ADAPTER_CONFIG, load_controller
from batching import PromptFormat
from engine.checkpoints import read_checkpoint, resolve_resume
from engine.machine import pick_device
from enhanced.config import CycleMeter, EnhancedHRMConfig
from enhanced.model import EnhancedHRMForCausalLM
from enhanced.reasoning_format import split_completion
from evaluation import Decoding, generate_texts
from host import load_tokenizer
from hybrid.model import HybridConfig, HybridModel
from hybrid.text import HybridText
from hybrid.training import CONFIG_JSON, TOKENIZER_JSON, HybridTrainer
from options import read_resolved

RESOLVED = "config.resolved.yaml"


class Answerer(Protocol):
    """A loaded checkpoint; `title` says what it is."""

    title: str

    def check_length(self, question: str) -> None:
        """Raises ValueError when prompt and answer cannot fit."""

    def answers(self, question: str) -> list[tuple[str, str]]:
        """(label, answer), with --compare also of what it is compared with, first."""


def sampling(opts: argparse.Namespace) -> Decoding:
    """Decoding as the command line asks for."""
    return Decoding(opts.decode_temperature, opts.decode_top_p, opts.decode_top_k, opts.max_new_tokens, seed=opts.seed)


def dataset_of(folder: Path) -> str | None:
    """What the run of a checkpoint was trained on; None for the add-on."""
    return read_resolved(read_checkpoint(folder, stems=[]).documents[RESOLVED]).get("dataset")


def load_answerer(opts: argparse.Namespace) -> Answerer:
    """The answerer of `--checkpoint`, else of the checkpoint written last in `--save_dir` (on `--dataset`, if given).

    Raises:
        ValueError: no such checkpoint, a broken one, or one trained on another data set than `--dataset`.
    """
    def fits(folder: Path) -> bool:
        return opts.dataset is None or dataset_of(folder) == opts.dataset

    folder = resolve_resume(opts.checkpoint or "auto", Path(opts.save_dir), "--checkpoint", fits)
    if not fits(folder):
        raise ValueError(f"{folder} was trained on {dataset_of(folder) or 'Reasoning Gym tasks'}, not on --dataset "
                         f"{opts.dataset}: leave one of them out")
    documents = read_checkpoint(folder, stems=[]).documents
    device = pick_device(opts.device)
    if ADAPTER_CONFIG in documents:
        return AddonAnswerer(opts, folder, device)
    kind = json.loads(documents[CONFIG_JSON]).get("model_type")
    return (EnhancedAnswerer if kind == EnhancedHRMConfig.model_type else HybridAnswerer)(opts, folder, device)


class AddonAnswerer:
    """A frozen LLM with its trained add-on, in the prompt format it was trained with."""

    def __init__(self, opts: argparse.Namespace, folder: Path, device: str):
        self.opts = opts
        self.model, document = load_controller(folder, device, opts.trust_remote_code)
        if opts.eval_segments and self.model.recurrent:
            self.model.config.segments = opts.eval_segments
        prompt = document["prompt"]
        tokenizer = load_tokenizer(document["base_model_name_or_path"], opts.trust_remote_code)
        self.format = PromptFormat(
            tokenizer, prompt["prompt_style"], prompt["system_header"], prompt["sentinel"], prompt["max_seq_len"]
        )
        self.title = f"{folder}: {document['base_model_name_or_path']} + {self.model.title} on {device}"

    def check_length(self, question: str) -> None:
        host = self.model.host.config.get_text_config()
        tokens = len(self.format.prompts([question])[0]) + self.opts.max_new_tokens + self.model.virtual_tokens
        if tokens > (getattr(host, "max_position_embeddings", None) or tokens):
            raise ValueError(
                f"prompt and answer may take {tokens} tokens, the LLM has {host.max_position_embeddings} positions: "
                "shorten the prompt or lower --max_new_tokens"
            )

    def answers(self, question: str) -> list[tuple[str, str]]:
        decoding, found = sampling(self.opts), []
        if self.opts.compare:
            with self.model.bare() as host:
                found.append(("bare LLM", generate_texts(host, self.format, [question], decoding)[0]))
        return [*found, (f"LLM + {self.model.title}", generate_texts(self.model, self.format, [question], decoding)[0])]


class EnhancedAnswerer:
    """A trained planner/worker LM: the solution, with `--compare` also the thought before it and the cycles spent."""

    def __init__(self, opts: argparse.Namespace, folder: Path, device: str):
        self.opts = opts
        self.model = EnhancedHRMForCausalLM.from_pretrained(folder).to(device).eval()
        settings = read_resolved(read_checkpoint(folder, stems=[]).documents[RESOLVED])
        self.format = PromptFormat(load_tokenizer(str(folder)), max_seq_len=settings.get("max_seq_len", 0))
        self.cycles = {"max_cycles": opts.eval_segments} if opts.eval_segments else {}
        self.title = f"{folder}: planner/worker LM on {device}"

    def check_length(self, question: str) -> None:
        tokens, most = len(self.format.prompts([question])[0]), self.format.max_seq_len
        if most and tokens > most:
            raise ValueError(f"the prompt has {tokens} tokens, the model was trained with at most {most}: shorten it")

    def answers(self, question: str) -> list[tuple[str, str]]:
        meter = CycleMeter()
        with self.model.all_cycles():  # as it was trained and measured
            text = generate_texts(self.model, self.format, [question], sampling(self.opts), cycles_log=meter,
                                  **self.cycles)[0]
        parsed = split_completion(text)
        solution = parsed.solution if parsed.well_formed else text
        if not self.opts.compare:
            return [("solution" if parsed.well_formed else "text", solution)]
        thought = parsed.thought or "(none)"
        return [("thought", thought), ("solution", parsed.solution or f"(none, not well-formed: {text})"),
                ("cycles", f"{meter.mean:.1f} a token")]


class HybridAnswerer:
    """A trained hybrid. `--compare` shows it with its gate shut, which is its encoder-decoder alone."""

    def __init__(self, opts: argparse.Namespace, folder: Path, device: str):
        self.opts = opts
        saved = read_checkpoint(folder, stems=[HybridTrainer.stem])
        self.model = HybridModel(HybridConfig(**json.loads(saved.documents[CONFIG_JSON])))
        self.model.load_state_dict(saved.tensors[HybridTrainer.stem], strict=False)
        self.model.to(device).eval()
        if opts.eval_segments:
            self.model.encoder.core.h_cycles = self.model.config.h_cycles = opts.eval_segments
        settings = read_resolved(saved.documents[RESOLVED])
        tokenizer, longest = saved.documents[TOKENIZER_JSON], settings.get("max_seq_len", 0)
        self.text = HybridText(self.model, tokenizer, max_seq_len=longest)
        self.shut = HybridText(self.model, tokenizer, max_seq_len=longest, gate_scale=0.0)
        self.title = f"{folder}: hybrid trained on {settings.get('dataset')}, on {device}"

    def check_length(self, question: str) -> None:
        tokens = len(self.text.encode(question))
        if not tokens:
            raise ValueError("the prompt has no token that the hybrid's tokenizer knows: type another")
        if tokens > (self.text.max_seq_len or tokens):
            raise ValueError(f"the prompt has {tokens} tokens, the hybrid was trained with {self.text.max_seq_len}: "
                             "shorten it")

    def answers(self, question: str) -> list[tuple[str, str]]:
        pairs = [("gate shut", self.shut), ("hybrid", self.text)]
        found = []
        for label, text in pairs if self.opts.compare else pairs[1:]:
            torch.manual_seed(self.opts.seed)
            found.append((label, text.generate([question], self.opts.max_new_tokens,
                                               **sampling(self.opts).arguments())[0]))
        return found
