"""One training step of the hybrid: the gate's schedule, the losses over micro-batches, the update."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.batches import IGNORE
from engine.checkpoints import Checkpoint
from engine.optimization import (
    SEPARATE_DECAY,
    BaseTrainer,
    LossModule,
    MicroLoss,
    OptimConfig,
    build_optimizers,
    load_weights,
    model_weights,
)
from hybrid.model import HybridModel, LossWeights, is_hrm_parameter

CONFIG_JSON = "config.json"
TOKENIZER_JSON = "tokenizer.json"
# Tables, heads, gates and queries take AdamW; hidden matrices may take Muon.
NOT_FOR_MUON = ("embed.weight", "lm_head.weight", "halt.weight", "score.weight", "queries", "_slots")
BATCH = ("encoder_ids", "decoder_input_ids", "labels", "encoder_mask")


@dataclass(frozen=True)
class HybridStepConfig:
    """What a step of the hybrid consists of; each field is the flag of its name.

    hrm_gate_warmup_steps: first batches, in which the gate is shut and HRM is not computed; 0 = none.
    hrm_gate_ramp_steps: batches after them in which the gate's scale rises from 0; 0 or 1 = it opens at once.
    hrm_gate_scale: the scale that the gate reaches, 0 to 1; 0 = never any HRM.
    deep_supervision: True gives z_H of earlier cycles a decoder loss too.
    ds_weight: weight of each such loss, 0 or more.
    use_halting: True trains the halting head.
    halting_weight: weight of its losses, 0 or more.
    halting_target: what the sum of halting probabilities over cycles shall be, 0 or more.
    dataset: name or folder of the data, for messages; None = none.
    """

    hrm_gate_warmup_steps: int = 0
    hrm_gate_ramp_steps: int = 0
    hrm_gate_scale: float = 1.0
    deep_supervision: bool = False
    ds_weight: float = 0.1
    use_halting: bool = False
    halting_weight: float = 0.01
    halting_target: float = 1.0
    dataset: str | None = None


def gate_scale(config: HybridStepConfig, step: int) -> float:
    """Scale of the gate in batch `step` (from 0): 0 through the warmup, then linear up to `hrm_gate_scale`."""
    opened = step - config.hrm_gate_warmup_steps
    if opened < 0:
        return 0.0

    # The first open batch has one step of the ramp already: at 0 it would be a shut one.
    return config.hrm_gate_scale * min(1.0, (opened + 1) / max(config.hrm_gate_ramp_steps, 1))


def loss_weights(config: HybridStepConfig) -> LossWeights:
    """Weights of the losses beside the tokens'; 0 for one that is off."""
    return LossWeights(
        deep_supervision=config.ds_weight if config.deep_supervision else 0.0,
        halting=config.halting_weight if config.use_halting else 0.0,
        halting_target=config.halting_target,
    )


def learns_by_muon(name: str, parameter: nn.Parameter) -> bool:
    """Hidden matrices alone."""
    return parameter.ndim == 2 and not name.endswith(NOT_FOR_MUON)


class HybridTrainer(BaseTrainer):
    """Runs one batch (of one or more micro-batches) of the hybrid at a time.

    Args:
        config: what a step consists of.
        optim: how weights are moved.
        model: the hybrid.
        accelerator, precision: as `BaseTrainer` takes them.
        tokenizer_json: the data's tokenizer, which checkpoints keep; None where the data have none.
    """

    def __init__(
        self,
        config: HybridStepConfig,
        optim: OptimConfig,
        model: HybridModel,
        accelerator: Any,
        precision: str,
        tokenizer_json: str | None = None,
    ):
        parameters = dict(model.named_parameters())
        optimizers = build_optimizers(optim, parameters, learns_by_muon, separate_decay=is_hrm_parameter)

        loss = LossModule(model, HybridModel.training_loss)
        super().__init__(optim, model, loss, accelerator, precision, parameters, optimizers)
        self.config = config
        self.tokenizer_json = tokenizer_json
        self.weights_of_losses = loss_weights(config)

    # --- what a checkpoint holds ---

    def weights(self) -> dict[str, Tensor]:
        """The whole model's; a tied table once."""
        return model_weights(self.model)

    def documents(self) -> dict[str, str]:
        """transformers' own files, so that `from_pretrained` loads a checkpoint folder."""
        files = {CONFIG_JSON: self.model.config.to_json_string()}
        if self.tokenizer_json:
            files[TOKENIZER_JSON] = self.tokenizer_json
        return files

    def load(self, saved: Checkpoint, folder: Path) -> None:
        """Raises ValueError for another tokenizer or another shape."""
        if self.tokenizer_json and saved.documents.get(TOKENIZER_JSON) != self.tokenizer_json:
            raise ValueError(f"{folder} was trained with another tokenizer than --dataset {self.config.dataset} was "
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

        # A checkpoint keeps the scale of its last batch, by which it is evaluated.
        scale = gate_scale(self.config, step)
        self.model.config.gate_scale = scale
        self._decay_hrm(bool(scale))

        tokens, examples, read = self.totals([_counts(batch) for batch in batches])
        sums, spreads = self._losses(batches, tokens, examples)
        norm = self._update(step, sums["loss"])
        return {
            **sums,
            **spreads,
            "grad_norm": norm,
            "lr": lr,
            "gate_scale": scale,
            "segments": 1,
            "cycles_used": self.model.config.h_cycles if scale else 0,
            "tokens": tokens,
            "examples": examples,
            "tokens_read": read,
        }

    def _decay_hrm(self, decays: bool) -> None:
        """Switches the weight decay of HRM's own groups."""
        for optimizer, _ in self.optimizers:
            for group in optimizer.param_groups:
                if group.get(SEPARATE_DECAY):
                    group["weight_decay"] = self.optim.weight_decay if decays else 0.0

    def _losses(
        self, batches: Sequence[dict[str, Tensor]], tokens: int, examples: int
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Gradients over all micro-batches; (loss parts of the global batch, gate and halting over its examples)."""
        world = self.accelerator.num_processes
        rows: dict[str, list[Tensor]] = {}  # (B,) values of each micro-batch

        def loss_of(batch: dict[str, Tensor]) -> MicroLoss:
            inputs = {name: batch[name] for name in BATCH}
            out = self.wrapped(inputs, self.weights_of_losses, tokens / world, examples / world)

            # Scalars add up; values of each example are kept, for their extremes over the global batch.
            parts = {}
            for name, value in out.metrics.items():
                if value.ndim:
                    rows.setdefault(name, []).append(value.float())
                else:
                    parts[name] = value

            # z_norm is a mean of the micro-batch; the losses are shares of the global batch already.
            return MicroLoss(out.loss, parts, {"z_norm": len(batch["labels"]) / (examples / world)})

        sums = self.accumulate(batches, loss_of)

        spreads: dict[str, float] = {}
        for name, values in sorted(rows.items()):
            spreads |= _spread(name, self.accelerator.gather(torch.cat(values)))
        return sums, spreads


def _counts(batch: dict[str, Tensor]) -> list[int]:
    """[labelled tokens, examples, tokens read by encoder and decoder] of a micro-batch."""
    read = batch["encoder_mask"].sum() + batch["decoder_mask"].sum()
    return [int((batch["labels"] != IGNORE).sum()), len(batch["labels"]), int(read)]


def _spread(name: str, values: Tensor) -> dict[str, float]:
    """Mean, extremes and deviation of a batch's (B,) values, as metrics called after `name`."""
    return {
        f"{name}_mean": float(values.mean()),
        f"{name}_min": float(values.min()),
        f"{name}_max": float(values.max()),
        f"{name}_std": float(values.std(correction=0)),
    }
