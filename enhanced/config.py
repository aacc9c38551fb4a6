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

    The defaults are those of `train.py --arch enhanced`; there the tokenizer gives the vocabulary. With 32,025 tokens
    the model has 16.7 M parameters.

    Args:
        vocab_size: tokens of the vocabulary.
        d_model: width of planner and worker; an even multiple of n_heads.
        n_heads: attention heads.
        n_planner_layers, n_worker_layers: layers of each, 1 or more.
        max_cycles: planner-then-worker cycles of a token, 1 or more.
        thought_dim: width of a thought.
        mlp_hidden: width inside the feed-forward layers; None or 0 = 23/8 of d_model, rounded up to a multiple of 8.
        adaptive_cycles: whether the gate stops tokens in evaluation mode.
        entropy_threshold: a token stops where the gate's guess of the entropy, as a share of log V, lies below it...
        confidence_threshold: ...and its guess of the largest probability above this one. Both in [0, 1].
        cycle_weight: weight of the change of the worker's state from cycle to cycle.
        thought_weight: weight of the thought losses; variance_weight and covariance_weight are factors inside them.
        gate_weight: weight of the gate's error.
        exit_weight: weight of the token loss at an earlier cycle.
        exit_sample: most tokens of a batch on which gate and early exits are trained.
        thought_ema: decay of the thought target's moving average, in [0, 1].
        rope_theta: base of the rotary position embedding.
        kwargs: as transformers takes them.

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
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_planner_layers = n_planner_layers
        self.n_worker_layers = n_worker_layers
        self.max_cycles = max_cycles
        self.thought_dim = thought_dim
        self.mlp_hidden = mlp_hidden or math.ceil(d_model * 23 / 8 / 8) * 8
        self.adaptive_cycles = adaptive_cycles
        self.entropy_threshold = entropy_threshold
        self.confidence_threshold = confidence_threshold
        self.cycle_weight = cycle_weight
        self.thought_weight = thought_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.gate_weight = gate_weight
        self.exit_weight = exit_weight
        self.exit_sample = exit_sample
        self.thought_ema = thought_ema
        self.rope_theta = rope_theta
        # Caches are sized by this name: one slot per cycle and layer. A saved config's number follows from the others.
        kwargs.pop("num_hidden_layers", None)
        self.num_hidden_layers = max_cycles * (n_planner_layers + n_worker_layers)
        kwargs.setdefault("tie_word_embeddings", True)
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        """Raises ValueError naming every value out of range."""
        faults = []
        for name in ("vocab_size", "n_planner_layers", "n_worker_layers", "max_cycles", "thought_dim", "mlp_hidden"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")

        # Rotary embeddings turn pairs of a head's components, so a head's width must be even.
        if self.n_heads < 1 or self.d_model % self.n_heads or self.d_model // self.n_heads % 2 or self.d_model < 1:
            faults.append(f"d_model {self.d_model} must be an even multiple of n_heads {self.n_heads}")

        for name in ("entropy_threshold", "confidence_threshold", "thought_ema"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} must lie in 0..1, got {getattr(self, name)}")

        for name, value in vars(self).items():
            if name.endswith("_weight") and not value >= 0:  # not a number is no weight either
                faults.append(f"{name} must not be negative, got {value}")

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
    tokens: int = 0  # padding left out

    def add(self, cycles_used: Tensor) -> None:
        """Counts the tokens of cycles_used (B, T), which is 0 at padding."""
        self.cycles += int(cycles_used.sum())
        self.tokens += int((cycles_used > 0).sum())

    @property
    def mean(self) -> float:
        """Cycles per token; nan before the first one."""
        return self.cycles / self.tokens if self.tokens else float("nan")
