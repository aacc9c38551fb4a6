"""Config and outputs of the planner/worker model. Shapes: B batch, T tokens, d width, V vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput


class EnhancedHRMConfig(PreTrainedConfig):
    """Everything that fixes the model's shape, its gate and the weights of its losses.

    Raises:
        ValueError: one line that names every value out of range.
    """

    model_type = "enhanced_hrm"
    attribute_map = {"hidden_size": "d_model", "num_attention_heads": "n_heads"}
    keys_to_ignore_at_inference = ["past_key_values"]
    auto_map = {}  # TRL reads it when it loads a reference model whose class transformers does not export

    def __init__(
        self,
        vocab_size: int = 32_025,
        d_model: int = 256,
        n_heads: int = 4,
        n_planner_layers: int = 4,
        n_worker_layers: int = 6,
        max_cycles: int = 4,
        thought_dim: int = 256,
        mlp_hidden: int | None = None,
        adaptive_cycles: bool = True,
        entropy_threshold: float = 0.03,
        confidence_threshold: float = 0.95,
        cycle_weight: float = 0.05,
        thought_weight: float = 0.1,
        variance_weight: float = 1.0,
        covariance_weight: float = 0.04,
        gate_weight: float = 0.1,
        exit_weight: float = 0.1,
        exit_sample: int = 128,
        thought_ema: float = 0.99,
        rope_theta: float = 10_000.0,
        **kwargs: Any,
    ):
        self.vocab_size, self.d_model, self.n_heads = vocab_size, d_model, n_heads
        self.n_planner_layers, self.n_worker_layers, self.max_cycles = n_planner_layers, n_worker_layers, max_cycles
        # 23/8 of the width, in steps of 8: with the defaults and 32,025 tokens the model has 16.7 M parameters.
        self.thought_dim, self.mlp_hidden = thought_dim, mlp_hidden or math.ceil(d_model * 23 / 8 / 8) * 8
        self.adaptive_cycles = adaptive_cycles
        self.entropy_threshold, self.confidence_threshold = entropy_threshold, confidence_threshold
        self.cycle_weight, self.thought_weight = cycle_weight, thought_weight
        self.variance_weight, self.covariance_weight = variance_weight, covariance_weight
        self.gate_weight, self.exit_weight, self.exit_sample = gate_weight, exit_weight, exit_sample
        self.thought_ema, self.rope_theta = thought_ema, rope_theta
        kwargs.pop("num_hidden_layers", None)  # follows from the others
        self.num_hidden_layers = max_cycles * (n_planner_layers + n_worker_layers)  # key/value slots: what caches ask
        kwargs.setdefault("tie_word_embeddings", True)
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        faults = []
        for name in ("vocab_size", "n_planner_layers", "n_worker_layers", "max_cycles", "thought_dim", "mlp_hidden"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_heads < 1 or self.d_model % self.n_heads or self.d_model // self.n_heads % 2 or self.d_model < 1:
            faults.append(f"d_model {self.d_model} must be an even multiple of n_heads {self.n_heads}")
        for name in ("entropy_threshold", "confidence_threshold", "thought_ema"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} must lie in 0..1, got {getattr(self, name)}")
        weights = [name for name in vars(self) if name.endswith("_weight")]
        faults += [f"{name} must not be negative, got {getattr(self, name)}" for name in weights
                   if not getattr(self, name) >= 0]
        if faults:
            raise ValueError("enhanced HRM: " + "; ".join(faults))


@dataclass
class EnhancedBackboneOutput(ModelOutput):
    """Worker states after the last cycle that each token ran."""

    last_hidden_state: Tensor | None = None  # (B, T, d)
    past_key_values: Any = None
    cycles_used: Tensor | None = None  # (B, T) int64, 0 at padding
    worker_states: tuple[Tensor, ...] | None = None  # one (B, T, d) per cycle


@dataclass
class EnhancedOutput(ModelOutput):
    """Causal-LM output with thoughts, cycles and the parts of the loss."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T or kept, V)
    past_key_values: Any = None
    thoughts: Tensor | None = None  # (B, T, thought_dim)
    cycles_used: Tensor | None = None  # (B, T)
    metrics: dict[str, Tensor] | None = None  # unweighted parts of the loss, detached


@dataclass
class CycleMeter:
    """Running mean of cycles per token; hand it to `forward` or `generate` as `cycles_log`."""

    cycles: int = 0
    tokens: int = 0

    def add(self, cycles_used: Tensor) -> None:
        self.cycles += int(cycles_used.sum())
        self.tokens += int((cycles_used > 0).sum())

    @property
    def mean(self) -> float:
        return self.cycles / self.tokens if self.tokens else float("nan")
