"""One supervised training step of the planner/worker LM: prompts and well-formed answers in, weights moved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batching import PromptConfig, PromptFormat, pad
from engine.batches import IGNORE
from engine.checkpoints import Checkpoint
from engine.optimization import (
    BaseTrainer,
    LossModule,
    MicroLoss,
    OptimConfig,
    build_optimizers,
    load_weights,
    model_weights,
)
from enhanced.model import EnhancedHRMForCausalLM
from text_data.frames import kept_frame

CONFIG_JSON = "config.json"
FRAME_JSON = "frame.json"  # what was written around each question


@dataclass(frozen=True)
class EnhancedStepConfig:
    """What a step of the planner/worker LM needs beside its optimizers; each field is the flag of its name.

    adamw_lr_ratio: learning rate of what AdamW trains beside Muon, as a share of Muon's, above 0.
    """

    adamw_lr_ratio: float = 0.2


def learns_by_muon(name: str, parameter: nn.Parameter) -> bool:
    """Matrices of planner and worker; tables and heads take AdamW."""
    return parameter.ndim == 2 and (".planner." in name or ".worker." in name)


def token_batch(prompt_format: PromptFormat, prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, S + T): prompts left-padded, answers right-padded.

    The prompt is not scored.
    """
    # Padded on both outer sides: no pad stands between a prompt and its answer.
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
    # transformers writes these files itself, so they are written and read back.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}

    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")  # as save_pretrained does, wherever it was called
    texts = {}
    for name, content in files.items():
        # A SentencePiece model is no text; tokenizer.json holds the same.
        with contextlib.suppress(UnicodeDecodeError):
            texts[name] = content.decode()
    return {CONFIG_JSON: model.config.to_json_string(use_diff=False), **texts}


def trained_format(
    tokenizer: Any, config: PromptConfig, documents: Mapping[str, str]
) -> tuple[PromptFormat, str | None]:
    """(the prompt format that a checkpoint of these documents was trained with, a note as `kept_frame` gives it)."""
    kept = None
    if FRAME_JSON in documents:
        kept = json.loads(documents[FRAME_JSON])
    frame, note = kept_frame(kept, tokenizer, config.prompt_style, config.system_header)
    return PromptFormat(tokenizer, config, frame=frame), note


def _loss(model: EnhancedHRMForCausalLM, batch: dict[str, Tensor], items: float) -> Any:
    """The model's output on a batch, its loss a share of that of `items` scored tokens."""
    return model(**batch, num_items_in_batch=items)


class EnhancedTrainer(BaseTrainer):
    """Runs one batch (of one or more micro-batches) at a time.

    Args:
        config: what a step needs beside its optimizers.
        optim: how weights are moved.
        model: the planner/worker LM.
        accelerator, precision: as `BaseTrainer` takes them.
        prompt_format: renders prompts, and holds the tokenizer that checkpoints keep.
    """

    def __init__(
        self,
        config: EnhancedStepConfig,
        optim: OptimConfig,
        model: EnhancedHRMForCausalLM,
        accelerator: Any,
        precision: str,
        prompt_format: PromptFormat,
    ):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizers = build_optimizers(optim, parameters, learns_by_muon)
        loss = LossModule(model, _loss)
        super().__init__(optim, model, loss, accelerator, precision, parameters, optimizers)
        self.config = config
        self.format = prompt_format
        self.more_documents: dict[str, str] = {}  # file name -> text that checkpoints are to keep beside the model's

    def weights(self) -> dict[str, Tensor]:
        """The whole model's; a tied table once."""
        return model_weights(self.model)

    def documents(self) -> dict[str, str]:
        """transformers' own files, so that `from_pretrained` loads a folder; the prompts' frame; what the run adds."""
        frame = json.dumps(dataclasses.asdict(self.format.frame))
        return {**model_documents(self.model, self.format.tokenizer), FRAME_JSON: frame, **self.more_documents}

    def load(self, saved: Checkpoint, folder: Path) -> None:
        """Raises ValueError for another shape or another tokenizer."""
        # Told before the shapes are: another tokenizer is the likelier mistake.
        stored = json.loads(saved.documents[CONFIG_JSON]).get("vocab_size")
        here = self.model.config.vocab_size
        if stored != here:
            raise ValueError(f"{folder} has {stored} tokens, --tokenizer {here}: pass --tokenizer {folder}")
        load_weights(self.model, saved.tensors[self.stem], folder)

    def begin(self, step: int, lr: float) -> None:
        """Muon stands the full rate; what AdamW trains beside it takes a share of it."""
        super().begin(step, lr)

        # Of two optimizers AdamW is the first.
        if len(self.optimizers) > 1:
            for group in self.optimizers[0][0].param_groups:
                group["lr"] = lr * self.config.adamw_lr_ratio

    def step(self, batches: Sequence[dict[str, Tensor]], step: int, lr: float) -> dict[str, float]:
        """Losses and update of batch `step`, whose micro-batches are `batches`; returns its metrics.

        Raises:
            NonFiniteError: before the optimizer step that would have spoilt the weights.
        """
        self.begin(step, lr)
        self.wrapped.train()

        # Divided by the global count per rank: DDP averages over ranks what is to be summed.
        tokens, examples = self.totals([[_scored(batch), len(batch["labels"])] for batch in batches])
        share = tokens / self.accelerator.num_processes

        def loss_of(batch: dict[str, Tensor]) -> MicroLoss:
            out = self.wrapped(batch, share)
            parts = {"loss": out.loss.detach(), **out.metrics}

            # The token loss is a share of the batch's already; the other metrics are means of a micro-batch.
            means = dict.fromkeys(out.metrics.keys() - {"loss_token"}, 1.0 / len(batches))
            return MicroLoss(out.loss, parts, means)

        sums = self.accumulate(batches, loss_of)
        norm = self._update(step, sums["loss"])
        self.model.update_ema()  # the thought target follows the weights that were just moved

        return {
            **sums,
            "answer_loss": sums["loss_token"],
            "grad_norm": norm,
            "lr": lr,
            "segments": 1,
            "tokens": tokens,
            "examples": examples,
        }


def _scored(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch that are scored: position t on the label at t + 1."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())
