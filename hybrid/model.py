"""The hybrid HRM x Mamba2 encoder-decoder: what users load, train and generate with, and its losses.

The encoder reads the prompt; H and L banks of tokens think about it for some cycles (arXiv 2506.21734, section 2); the
decoder reads the encoder and, through a branch of its own behind a gate, what HRM thought. `gate_scale` 0 is the plain
encoder-decoder, bit for bit. Shapes: B batch, S encoder tokens, T decoder tokens, D width, d HRM width, H slots of the
slow bank, m memory tokens, C cycles, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from engine.batches import IGNORE, all_correct
from engine.positions import mean_state
from hybrid.config import HybridConfig
from hybrid.encoder import HybridEncoder, HybridEncoderOutput, slot_mean_norm
from hybrid.layers import Decoder, Memory

HRM_MODULES = ("core", "bridge", "gate")  # of HybridEncoder; the decoder's memory branch belongs to them


@dataclass
class HybridOutput(ModelOutput):
    """`loss` is the mean cross-entropy of labelled tokens (plus auxiliary losses only in `training_loss`)."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T, V)
    past_key_values: EncoderDecoderCache | None = None
    encoder_last_hidden_state: Tensor | None = None
    gate: Tensor | None = None
    cycles_used: Tensor | None = None


@dataclass(frozen=True)
class LossWeights:
    """Weights of the auxiliary losses.

    Attributes:
        deep_supervision: of each earlier cycle's token loss, beside 1 for the last one's; 0 switches it off.
        halting: of the two halting losses; 0 switches them off.
        halting_target: what an example's halting probabilities shall sum to, in cycles.
    """

    deep_supervision: float = 0.0
    halting: float = 0.0
    halting_target: float = 1.0


@dataclass
class TrainingLoss:
    """The loss with graph and, detached, what the log shows."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class HybridModel(PreTrainedModel, GenerationMixin):
    """The encoder-decoder that users hold: `training_loss` trains it, `generate` answers.

    `input_ids` are the encoder's tokens, `decoder_input_ids` begin with bos.
    """

    config_class = HybridConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "encoder.embed.weight"}
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.encoder = HybridEncoder(config)
        self.decoder = Decoder(config.d_model, config.n_heads, config.decoder_layers)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=config.d_model**-0.5)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: every module initialises itself."""

    def get_input_embeddings(self) -> nn.Module:
        """The table of the encoder's and the decoder's tokens."""
        return self.encoder.embed

    def get_output_embeddings(self) -> nn.Module:
        """The head, which may share that table."""
        return self.lm_head

    def get_encoder(self, modality: str | None = None) -> HybridEncoder:
        """What `generate` calls once per prompt."""
        return self.encoder

    def hrm_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything behind the gate: no logit depends on it while the gate is shut."""
        return {name: parameter for name, parameter in self.named_parameters() if is_hrm_parameter(name)}

    def decode(
        self,
        decoder_input_ids: Tensor,
        states: Tensor,
        mask: Tensor,
        memory: Memory | None = None,
        decoder_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """(B, T, D) decoder states; `lm_head` makes logits of them. Arguments as `Decoder.forward`, but token ids."""
        return self.decoder(self.encoder.embedded(decoder_input_ids), states, mask, memory, decoder_mask, cache)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: HybridEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> HybridOutput:
        """Logits (B, T, V) of the next decoder tokens; `labels` (B, T) align with `decoder_input_ids`.

        Raises:
            ValueError: neither encoder tokens nor their states, or neither decoder tokens nor labels.
        """
        # `generate` encodes once and hands the output on to every further token.
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("the hybrid needs input_ids, or encoder_outputs of an earlier call")
            encoder_outputs = self.encoder(input_ids, attention_mask)

        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("the hybrid needs decoder_input_ids, or labels to make them from")
            decoder_input_ids = shifted(labels, self.config.decoder_start_token_id, self.config.pad_token_id)

        # What the decoder reads beside its tokens.
        states = encoder_outputs.last_hidden_state
        mask = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask
        memory = None
        if encoder_outputs.memory is not None:
            memory = Memory(encoder_outputs.memory, encoder_outputs.gate)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())

        out = self.decode(decoder_input_ids, states, mask, memory, decoder_attention_mask, past_key_values)
        logits = self.lm_head(out)

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        return HybridOutput(loss, logits, past_key_values, states, encoder_outputs.gate, encoder_outputs.cycles_used)

    # --- training ---

    def training_loss(
        self,
        batch: dict[str, Tensor],
        weights: LossWeights,
        tokens: float | None = None,
        examples: float | None = None,
    ) -> TrainingLoss:
        """Cross-entropy of the last cycle's answer plus auxiliary losses.

        Args:
            batch: as `text_data.batches.pad_batch` makes it.
            weights: of the auxiliary losses.
            tokens: labelled tokens of the whole batch, where this is a part of it (default: this one's).
            examples: examples of the whole batch (default: this one's).

        Returns:
            The loss, and parts of it for the log. Those of shape (B,) are of each example.
        """
        labels = batch["labels"]
        tokens = tokens or max(int((labels != IGNORE).sum()), 1)
        examples = examples or len(labels)
        states = self.encoder.encode(batch["encoder_ids"], batch["encoder_mask"])
        if self.config.gate_scale == 0:
            return self._loss_without_hrm(batch, states, tokens, examples)
        return self._loss_with_hrm(batch, states, weights, tokens, examples)

    def _loss_without_hrm(
        self, batch: dict[str, Tensor], states: Tensor, tokens: float, examples: float
    ) -> TrainingLoss:
        """`training_loss` with the gate shut."""
        loss, right = self._token_loss(batch, states, None, tokens)
        metrics = {
            "loss": loss.detach(),
            "token_loss": loss.detach(),
            "teacher_forced_exact": right.sum() / examples,
            "gate": loss.new_zeros(len(right)),
        }
        return TrainingLoss(loss, metrics)

    def _loss_with_hrm(
        self, batch: dict[str, Tensor], states: Tensor, weights: LossWeights, tokens: float, examples: float
    ) -> TrainingLoss:
        """`training_loss` with the gate open."""
        mask = batch["encoder_mask"]
        pooled = mean_state(states, mask)
        cycles = self.encoder.cycles(states, mask)

        # The tokens that the decoder predicts after each cycle; those after the last one are the answer.
        memories = [self.encoder.memory(cycle.z_high, pooled, self.config.gate_scale) for cycle in cycles]
        final, right = self._token_loss(batch, states, memories[-1], tokens)
        earlier, correct = self._earlier_cycles(batch, states, memories[:-1], weights, tokens)
        correct.append(right)

        gate = memories[-1].gate.detach()
        metrics = {
            "token_loss": final.detach(),
            "teacher_forced_exact": right.sum() / examples,
            "gate": gate,
            "z_norm": slot_mean_norm(cycles[-1].z_high.detach()).mean(),
        }

        # Deep supervision: a mean over the cycles, in which the last one weighs 1.
        loss = final
        if weights.deep_supervision and earlier:
            supervised = sum(earlier)
            loss = (final + weights.deep_supervision * supervised) / (1 + weights.deep_supervision * len(earlier))
            metrics["deep_supervision_loss"] = supervised.detach() / len(earlier)

        # Halting. The gate is detached: were it not, shutting it would lower this loss.
        halt = torch.stack([cycle.halt_logits for cycle in cycles], dim=1).float()  # (B, C)
        metrics["halt_sum"] = halt.detach().sigmoid().sum(dim=1)
        if weights.halting:
            budget, judged = halting_losses(halt, torch.stack(correct, dim=1), weights.halting_target, examples)
            loss = loss + weights.halting * gate.mean() * (budget + judged)
            metrics["halting_loss"] = budget.detach()
            metrics["halting_bce"] = judged.detach()

        metrics["loss"] = loss.detach()
        return TrainingLoss(loss, metrics)

    def _earlier_cycles(
        self, batch: dict[str, Tensor], states: Tensor, memories: list[Memory], weights: LossWeights, tokens: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(token losses from the latest cycle to the first, (B,) bool "all right" from the first to the latest).

        Empty where no auxiliary loss needs them. Halting alone needs no gradient of theirs.
        """
        losses: list[Tensor] = []
        correct: list[Tensor] = []
        if not weights.deep_supervision and not weights.halting:
            return losses, correct

        for memory in reversed(memories):
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights.deep_supervision > 0):
                token_loss, right = self._token_loss(batch, states, memory, tokens)
            losses.append(token_loss)
            correct.insert(0, right)
        return losses, correct

    def _token_loss(
        self, batch: dict[str, Tensor], states: Tensor, memory: Memory | None, tokens: float
    ) -> tuple[Tensor, Tensor]:
        """(cross-entropy summed over labelled tokens / tokens, (B,) bool: all of them right)."""
        labels = batch["labels"]
        labelled = labels != IGNORE
        out = self.decode(batch["decoder_input_ids"], states, batch["encoder_mask"], memory)

        # (labelled tokens, V): pads cost no softmax.
        logits = self.lm_head(out[labelled]).float()
        loss = F.cross_entropy(logits, labels[labelled], reduction="sum") / tokens
        return loss, all_correct(logits.detach(), labels)


def halting_losses(halt: Tensor, correct: Tensor, target: float, examples: float) -> tuple[Tensor, Tensor]:
    """What an example's halting logits after each cycle are trained on.

    Args:
        halt: logits (B, C).
        correct: (B, C) bool, all labelled tokens are right after that cycle.
        target: what the probabilities of an example shall sum to.
        examples: of the whole batch, of which this may be a part.

    Returns:
        (squared distance of the probabilities' sum from the target, binary cross-entropy of each probability with
        "the answer is right"), both means over the whole batch's examples.
    """
    judgement = correct.float()
    assert halt.shape == judgement.shape, f"halting: {halt.shape} against {judgement.shape}"
    budget = (halt.sigmoid().sum(dim=1) - target).square().sum() / examples
    judged = F.binary_cross_entropy_with_logits(halt, judgement, reduction="sum") / (examples * halt.shape[1])
    return budget, judged


def is_hrm_parameter(name: str) -> bool:
    """True for what lies behind the gate: core, bridge, gate, and the decoder's memory branch."""
    return name.startswith(tuple(f"encoder.{module}." for module in HRM_MODULES)) or ".from_memory." in name


def shifted(labels: Tensor, start: int, pad: int) -> Tensor:
    """(B, T) decoder inputs of labels (B, T): `start`, then all but the last; ignored labels become pads."""
    inputs = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return inputs.masked_fill(inputs == IGNORE, pad)


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(HybridConfig, HybridModel, exist_ok=True)
