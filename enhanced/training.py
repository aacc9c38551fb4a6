"""One supervised training step of the planner/worker LM: prompts and well-formed answers in, weights moved."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batching import PromptFormat, pad
from engine.batches import IGNORE
from engine.checkpoints import Checkpoint
from engine.optimization import BaseTrainer, build_optimizers, load_weights, model_weights
from enhanced.model import EnhancedHRMForCausalLM

CONFIG_JSON = "config.json"


def learns_by_muon(name: str, parameter: nn.Parameter) -> bool:
    """Matrices of planner and worker; tables and heads take AdamW."""
    return parameter.ndim == 2 and (".planner." in name or ".worker." in name)


def token_batch(prompt_format: PromptFormat, prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, S + T): prompts left-padded, answers right-padded.

    The prompt is not scored.
    """
    prompt_ids, prompt_mask = pad(prompt_format.prompts(prompts), prompt_format.pad_id, "left")
    answer_ids, answer_mask = pad(prompt_format.targets(answers), prompt_format.pad_id, "right")
    unscored = torch.full_like(prompt_ids, IGNORE)
    return {
        "input_ids": torch.cat([prompt_ids, answer_ids], dim=1),
        "attention_mask": torch.cat([prompt_mask, answer_mask], dim=1),
        "labels": torch.cat([unscored, answer_ids.masked_fill(answer_mask == 0, IGNORE)], dim=1),
    }


def model_documents(model: Any, tokenizer: Any) -> dict[str, str]:
    """File name -> text of what `from_pretrained` reads beside the weights, tokenizer included."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    model.config.architectures = [type(model).__name__]
    texts = {}
    for name, content in files.items():
        with contextlib.suppress(UnicodeDecodeError):  # a SentencePiece model: tokenizer.json holds the same
            texts[name] = content.decode()
    return {CONFIG_JSON: model.config.to_json_string(use_diff=False), **texts}


class LossOf(nn.Module):
    """The model as a module whose forward is its training loss: what DDP wraps."""

    def __init__(self, model: EnhancedHRMForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], items: float) -> Any:
        return self.model(**batch, num_items_in_batch=items)


class EnhancedTrainer(BaseTrainer):
    """Runs one batch (of one or more micro-batches) at a time."""

    stem = "model"

    def __init__(self, opts: argparse.Namespace, model: EnhancedHRMForCausalLM, accelerator: Any, precision: str,
                 prompt_format: PromptFormat):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(opts, model, accelerator, precision, parameters,
                         build_optimizers(opts, parameters, learns_by_muon))
        self.format = prompt_format
        loss = LossOf(model)
        self.wrapped = accelerator.prepare_model(loss) if accelerator.num_processes > 1 else loss

    def weights(self) -> dict[str, Tensor]:
        return model_weights(self.model)

    def documents(self) -> dict[str, str]:
        """transformers' own files, so that `from_pretrained` loads a checkpoint folder."""
        return model_documents(self.model, self.format.tokenizer)

    def load(self, saved: Checkpoint, folder: Path) -> None:
        """Raises ValueError for another shape or another tokenizer."""
        stored = json.loads(saved.documents[CONFIG_JSON])
        if stored.get("vocab_size") != self.model.config.vocab_size:
            here = self.model.config.vocab_size
            raise ValueError(f"{folder} has {stored.get('vocab_size')} tokens, --tokenizer {here}: pass --tokenizer "
                             f"{folder}")
        load_weights(self.model, saved.tensors[self.stem], folder)

    def begin(self, step: int, lr: float) -> None:
        """Muon stands the full rate; what AdamW trains beside it takes a share of it."""
        super().begin(step, lr)
        if len(self.optimizers) > 1:
            for group in self.optimizers[0][0].param_groups:
                group["lr"] = lr * self.opts.adamw_lr_ratio

    def step(self, batches: Sequence[dict[str, Tensor]], step: int, lr: float) -> dict[str, float]:
        """Losses and update of batch `step`, whose micro-batches are `batches`; returns its metrics.

        Raises:
            NonFiniteError: before the optimizer step that would have spoilt the weights.
        """
        self.begin(step, lr)
        self.wrapped.train()
        world = self.accelerator.num_processes
        counts = torch.tensor([[int((b["labels"][:, 1:] != IGNORE).sum()), len(b["labels"])] for b in batches])
        tokens, examples = self.accelerator.reduce(counts.sum(dim=0).to(self.accelerator.device), "sum").tolist()
        sums: dict[str, float] = {}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.autocast():
                    out = self.wrapped(batch, tokens / world)  # gradients are averaged over ranks
                self.scaler.scale(out.loss).backward()
            sums["loss"] = sums.get("loss", 0.0) + float(out.loss.detach()) / world
            for name, value in out.metrics.items():  # token losses are shares already, the rest are means
                share = 1.0 if name == "loss_token" else 1.0 / len(batches)
                sums[name] = sums.get(name, 0.0) + float(value) * share / world
        norm = self._update(step, sums["loss"])
        self.model.update_ema()
        return {**sums, "answer_loss": sums["loss_token"], "grad_norm": norm, "lr": lr, "segments": 1,
                "tokens": tokens, "examples": examples}
