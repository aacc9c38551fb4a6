"""One training step of the hybrid: the gate's schedule, the losses over micro-batches, the update."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.batches import IGNORE
from engine.checkpoints import Checkpoint
from engine.optimization import BaseTrainer, build_optimizers, load_weights, model_weights
from hybrid.model import HybridModel, TrainingLoss, Weights, is_hrm_parameter

CONFIG_JSON, TOKENIZER_JSON = "config.json", "tokenizer.json"
# Tables, heads, gates and queries take AdamW; hidden matrices may take Muon.
NOT_FOR_MUON = ("embed.weight", "lm_head.weight", "halt.weight", "score.weight", "queries", "_slots")
BATCH = ("encoder_ids", "decoder_input_ids", "labels", "encoder_mask")


def gate_scale(opts: argparse.Namespace, step: int) -> float:
    """Scale of the gate in batch `step` (from 0): 0 through the warmup, then linear up to `--hrm_gate_scale`."""
    opened = step - opts.hrm_gate_warmup_steps
    if opened < 0:
        return 0.0
    return opts.hrm_gate_scale * min(1.0, (opened + 1) / max(opts.hrm_gate_ramp_steps, 1))


def learns_by_muon(name: str, parameter: nn.Parameter) -> bool:
    """Hidden matrices alone."""
    return parameter.ndim == 2 and not name.endswith(NOT_FOR_MUON)


class LossOf(nn.Module):
    """The model as a module whose forward is its training loss: what DDP wraps."""

    def __init__(self, model: HybridModel):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], weights: Weights, tokens: float, examples: float) -> TrainingLoss:
        return self.model.training_loss(batch, weights, tokens, examples)


class HybridTrainer(BaseTrainer):
    """Runs one batch (of one or more micro-batches) of the hybrid at a time; `tokenizer_json` goes into checkpoints."""

    stem = "model"

    def __init__(self, opts: argparse.Namespace, model: HybridModel, accelerator: Any, precision: str,
                 tokenizer_json: str | None = None):
        parameters = dict(model.named_parameters())
        optimizers = build_optimizers(opts, parameters, learns_by_muon, apart=is_hrm_parameter)
        super().__init__(opts, model, accelerator, precision, parameters, optimizers)
        self.tokenizer_json = tokenizer_json
        loss = LossOf(model)
        self.wrapped = accelerator.prepare_model(loss) if accelerator.num_processes > 1 else loss
        self.weights_of_losses = Weights(
            deep_supervision=opts.ds_weight if opts.deep_supervision else 0.0,
            halting=opts.halting_weight if opts.use_halting else 0.0, halting_target=opts.halting_target,
        )

    # --- what a checkpoint holds ---

    def weights(self) -> dict[str, Tensor]:
        return model_weights(self.model)

    def documents(self) -> dict[str, str]:
        """transformers' own files, so that `from_pretrained` loads a checkpoint folder."""
        files = {CONFIG_JSON: self.model.config.to_json_string()}
        return files | ({TOKENIZER_JSON: self.tokenizer_json} if self.tokenizer_json else {})

    def load(self, saved: Checkpoint, folder: Path) -> None:
        """Raises ValueError for another tokenizer or another shape."""
        if self.tokenizer_json and saved.documents.get(TOKENIZER_JSON) != self.tokenizer_json:
            raise ValueError(f"{folder} was trained with another tokenizer than --dataset {self.opts.dataset} was "
                             f"prepared with: prepare it with --tokenizer {folder / TOKENIZER_JSON}")
        load_weights(self.model, saved.tensors[self.stem], folder)
        self.model.config.gate_scale = json.loads(saved.documents[CONFIG_JSON])["gate_scale"]

    # --- a step ---

    def step(self, batches: Sequence[dict[str, Tensor]], step: int, lr: float) -> dict[str, float]:
        """Losses and update of batch `step`, whose micro-batches are `batches`; returns its metrics.

        While the gate is shut HRM is not even computed, and its weights are kept out of weight decay.

        Raises:
            NonFiniteError: before the optimizer step that would have spoilt the weights.
        """
        self.begin(step, lr)
        self.wrapped.train()
        scale = self.model.config.gate_scale = gate_scale(self.opts, step)
        for optimizer, _ in self.optimizers:
            for group in optimizer.param_groups:
                if group.get("apart"):
                    group["weight_decay"] = self.opts.weight_decay if scale else 0.0
        tokens, examples, read = self._global_counts(batches)
        sums, spreads = self._losses(batches, tokens, examples)
        norm = self._update(step, sums["loss"])
        return {**sums, **spreads, "grad_norm": norm, "lr": lr, "gate_scale": scale, "segments": 1,
                "cycles_used": self.model.config.h_cycles if scale else 0,
                "tokens": tokens, "examples": examples, "tokens_read": read}

    def _global_counts(self, batches: Sequence[dict[str, Tensor]]) -> list[int]:
        """[labelled tokens, examples, all tokens read] of the batch over micro-batches and ranks."""
        counts = [[int((b["labels"] != IGNORE).sum()), len(b["labels"]),
                   int(b["encoder_mask"].sum() + b["decoder_mask"].sum())] for b in batches]
        return self.accelerator.reduce(torch.tensor(counts, device=self.accelerator.device).sum(dim=0), "sum").tolist()

    def _losses(self, batches: Sequence[dict[str, Tensor]], tokens: int, examples: int
                ) -> tuple[dict[str, float], dict[str, float]]:
        """Backward over all micro-batches; (loss parts of the whole batch, gate and halting over its examples)."""
        world = self.accelerator.num_processes  # gradients are averaged over ranks, the loss is a share of the whole
        sums: dict[str, float] = {}
        rows: dict[str, list[Tensor]] = {}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.autocast():
                    inputs = {name: batch[name] for name in BATCH}
                    out = self.wrapped(inputs, self.weights_of_losses, tokens / world, examples / world)
                self.scaler.scale(out.loss).backward()
            for name, value in out.metrics.items():
                if value.ndim:
                    rows.setdefault(name, []).append(value.float())
                else:
                    share = len(batch["labels"]) / (examples / world) if name == "z_norm" else 1.0
                    sums[name] = sums.get(name, 0.0) + float(value) * share / world
        if world > 1:
            names = sorted(sums)
            mine = torch.tensor([sums[name] for name in names], device=self.accelerator.device)
            sums = dict(zip(names, self.accelerator.reduce(mine, "sum").tolist(), strict=True))
        spreads: dict[str, float] = {}
        for name, parts in sorted(rows.items()):
            values = self.accelerator.gather(torch.cat(parts))
            spreads |= {f"{name}_mean": float(values.mean()), f"{name}_min": float(values.min()),
                        f"{name}_max": float(values.max()), f"{name}_std": float(values.std(correction=0))}
        return sums, spreads
