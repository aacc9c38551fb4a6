"""The hybrid HRM x Mamba2 encoder-decoder: encoder, HRM core, bridge, gate, decoder, and their losses.

The encoder reads the prompt; H and L banks of tokens think about it for some cycles (arXiv 2506.21734, section 2); the
decoder reads the encoder and, through a branch of its own behind a gate, what HRM thought. `gate_scale` 0 is the plain
encoder-decoder, bit for bit. Shapes: B batch, S encoder tokens, T decoder tokens, D width, d HRM width, m memory
tokens, C cycles, V vocabulary.
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
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from engine.batches import IGNORE
from hrm_blocks import all_correct, token_positions
from hybrid.layers import (
    BankCore,
    Bridge,
    Cycle,
    Decoder,
    Gate,
    Mamba2Encoder,
    Memory,
    TransformerEncoder,
    key_mask,
    pooled_state,
)

HRM_MODULES = ("core", "bridge", "gate")  # of HybridEncoder; the decoder's memory branch belongs to them


# What a saved record without the key was made with, where that is not today's default.
OLD_DEFAULTS = {
    "d_model": 128, "n_heads": 4, "encoder_layers": 2, "decoder_layers": 2, "state_size": 32, "d_h": 128,
}


class HybridConfig(PreTrainedConfig):
    """Shape of the hybrid; the defaults are those of `train.py --arch hybrid`.

    `gate_scale` (0 to 1) multiplies the gate: training raises it, generation uses it as is.

    Raises:
        ValueError: widths that heads do not divide, unknown encoder or bridge.
    """

    model_type = "hrm_hybrid"

    def __init__(self, vocab_size: int = 512, d_model: int = 256, n_heads: int = 8, encoder: str = "mamba2",
                 encoder_layers: int = 4, decoder_layers: int = 4, state_size: int = 64, d_h: int = 256,
                 h_layers: int = 1, l_layers: int = 1, h_len: int = 8, l_len: int = 16, h_cycles: int = 2,
                 l_steps: int = 2, grad_horizon: str = "full", bridge: str = "prefix", prefix_len: int = 8,
                 gate_scale: float = 1.0, use_halting: bool = False, halt_threshold: float = 0.99,
                 tie_word_embeddings: bool = True, pad_token_id: int = 0, bos_token_id: int = 1, eos_token_id: int = 2,
                 **kwargs: Any):
        for name, width in (("d_model", d_model), ("d_h", d_h)):
            if width % (2 * n_heads):
                raise ValueError(f"{name} {width} must be a multiple of twice its {n_heads} heads: RoPE turns pairs")
        if encoder not in ("mamba2", "transformer") or bridge not in ("prefix", "cross_attn"):
            raise ValueError(f"encoder {encoder!r} and bridge {bridge!r}: expected mamba2 or transformer, and prefix "
                             "or cross_attn")
        self.vocab_size, self.d_model, self.n_heads, self.encoder = vocab_size, d_model, n_heads, encoder
        self.encoder_layers, self.decoder_layers, self.state_size = encoder_layers, decoder_layers, state_size
        self.d_h, self.h_layers, self.l_layers, self.h_len, self.l_len = d_h, h_layers, l_layers, h_len, l_len
        self.h_cycles, self.l_steps, self.grad_horizon = h_cycles, l_steps, grad_horizon
        self.bridge, self.prefix_len, self.gate_scale = bridge, prefix_len, gate_scale
        self.use_halting, self.halt_threshold = use_halting, halt_threshold
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = d_model, decoder_layers, n_heads
        super().__init__(is_encoder_decoder=True, tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id,
                         bos_token_id=bos_token_id, eos_token_id=eos_token_id,
                         decoder_start_token_id=kwargs.pop("decoder_start_token_id", bos_token_id), **{
                             key: value for key, value in kwargs.items() if key != "is_encoder_decoder"})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'. A setting that an older version left out of the record has the value it had then."""
        return super().from_dict(OLD_DEFAULTS | config_dict, **kwargs)


@dataclass
class HybridEncoderOutput(ModelOutput):
    """What the decoder reads."""

    last_hidden_state: Tensor | None = None  # (B, S, D)
    memory: Tensor | None = None  # (B, m, D); None while the gate is shut
    gate: Tensor | None = None  # (B,) scaled gate
    cycles_used: Tensor | None = None  # (B,) int64
    halt_sum: Tensor | None = None  # (B,) halting probabilities summed over the cycles used
    z_norm: Tensor | None = None  # (B,) norm of the mean of z_H's slots


@dataclass
class HybridOutput(ModelOutput):
    """`loss` is the mean cross-entropy of labelled tokens (plus auxiliary losses only in `training_loss`)."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T, V)
    past_key_values: EncoderDecoderCache | None = None
    encoder_last_hidden_state: Tensor | None = None
    gate: Tensor | None = None
    cycles_used: Tensor | None = None


@dataclass
class Weights:
    """Weights of the auxiliary losses; 0 switches one off."""

    deep_supervision: float = 0.0
    halting: float = 0.0
    halting_target: float = 1.0


@dataclass
class TrainingLoss:
    """The loss with graph and, detached, what the log shows."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class HybridEncoder(nn.Module):
    """Token states, and HRM over them: what `generate` calls once per prompt."""

    main_input_name = "input_ids"

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config, width, heads = config, config.d_model, config.n_heads
        self.embed = nn.Embedding(config.vocab_size, width)  # the decoder embeds its tokens with it too
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.backbone = (Mamba2Encoder(width, config.encoder_layers, config.state_size) if config.encoder == "mamba2"
                         else TransformerEncoder(width, heads, config.encoder_layers))
        self.core = BankCore(config.d_h, heads, width, config.h_len, config.l_len, config.h_layers, config.l_layers,
                             config.h_cycles, config.l_steps, config.grad_horizon)
        self.bridge = Bridge(config.bridge, config.d_h, heads, width, config.prefix_len)
        self.gate = Gate(config.d_h, width)

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D) states of the tokens (B, S); padding may stand on either side."""
        return self.backbone(self.embedded(input_ids), mask, token_positions(mask))

    def embedded(self, ids: Tensor) -> Tensor:
        """(B, N, D) of unit variance."""
        return self.embed(ids) * self.config.d_model**0.5

    def cycles(self, states: Tensor, mask: Tensor) -> list[Cycle]:
        """All cycles of HRM over states (B, S, D), in order."""
        source, keys = self.core.read(states), key_mask(mask)
        z_high, z_low = self.core.start(len(states))
        done = []
        for _ in range(self.core.h_cycles):
            z_high, z_low = self.core.cycle(z_high, z_low, source, keys)
            done.append(Cycle(z_high, self.core.halt_logits(z_high)))
        return done

    def think(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(z_H, cycles used, summed halting probability) of evaluation: an example leaves the batch once that sum
        passes the threshold, and costs nothing from then on."""
        config = self.config
        keys, (key, value) = key_mask(mask), self.core.read(states)
        z_high, z_low = self.core.start(len(states))
        final = z_high.new_zeros(z_high.shape, dtype=states.dtype)
        used = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        total = torch.zeros(len(states), device=states.device)
        sums = total.clone()
        here = torch.arange(len(states), device=states.device)
        for count in range(1, config.h_cycles + 1):
            z_high, z_low = self.core.cycle(z_high, z_low, (key, value), keys)
            final[here], used[here] = z_high.to(final.dtype), count
            total = total + self.core.halt_logits(z_high).float().sigmoid()
            sums[here] = total
            on = total < config.halt_threshold
            if not config.use_halting or count == config.h_cycles:
                continue
            if not bool(on.any()):
                break
            if not bool(on.all()):
                here, total, z_high, z_low = here[on], total[on], z_high[on], z_low[on]
                key, value, keys = key[on], value[on], None if keys is None else keys[on]
        return final, used, sums

    def memory(self, z_high: Tensor, pooled: Tensor, scale: float) -> Memory:
        """What the decoder may read of z_H (B, H, d): memory tokens and the scaled gate."""
        return Memory(self.bridge(z_high), self.gate(z_high, pooled) * scale)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> HybridEncoderOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.encode(input_ids, mask)
        if self.config.gate_scale == 0:
            return HybridEncoderOutput(states, cycles_used=torch.zeros(len(states), dtype=torch.int64,
                                                                       device=states.device))
        if torch.is_grad_enabled() and self.training:
            last, used, sums = self.cycles(states, mask)[-1].z_high, None, None
        else:
            last, used, sums = self.think(states, mask)
        memory = self.memory(last, pooled_state(states, mask), self.config.gate_scale)
        return HybridEncoderOutput(states, memory.tokens, memory.gate, used, sums, slot_mean_norm(last))


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
        return self.encoder.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_encoder(self, modality: str | None = None) -> HybridEncoder:
        return self.encoder

    def hrm_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything behind the gate: no logit depends on it while the gate is shut."""
        return {name: p for name, p in self.named_parameters() if is_hrm_parameter(name)}

    def decode(self, decoder_input_ids: Tensor, states: Tensor, mask: Tensor, memory: Memory | None = None,
               decoder_mask: Tensor | None = None, cache: EncoderDecoderCache | None = None) -> Tensor:
        """(B, T, D) decoder states; `lm_head` makes logits of them."""
        return self.decoder(self.encoder.embedded(decoder_input_ids), states, mask, memory, decoder_mask, cache)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
                labels: Tensor | None = None, encoder_outputs: HybridEncoderOutput | None = None,
                past_key_values: EncoderDecoderCache | None = None, use_cache: bool | None = None,
                **kwargs: Any) -> HybridOutput:
        """Logits (B, T, V) of the next decoder tokens; `labels` (B, T) align with `decoder_input_ids`.

        Raises:
            ValueError: neither encoder tokens nor their states, or neither decoder tokens nor labels.
        """
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("the hybrid needs input_ids, or encoder_outputs of an earlier call")
            encoder_outputs = self.encoder(input_ids, attention_mask)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("the hybrid needs decoder_input_ids, or labels to make them from")
            decoder_input_ids = shifted(labels, self.config.decoder_start_token_id, self.config.pad_token_id)
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

    def training_loss(self, batch: dict[str, Tensor], weights: Weights, tokens: float | None = None,
                      examples: float | None = None) -> TrainingLoss:
        """Cross-entropy plus auxiliary losses of a batch as `text_data.batches.pad_batch` makes it.

        Deep supervision: the loss of every earlier cycle's z_H, divided by the total weight. Halting: squared distance
        of the summed halting probabilities from the target, and BCE of each cycle's probability with "all labelled
        tokens are right", both times the weight and the detached mean gate of the examples at hand (a micro-batch's
        own): were it not detached, shutting the gate would pay. `tokens` and `examples` are those of the whole batch
        when this is a part of it (default: its own).
        """
        labels, mask = batch["labels"], batch["encoder_mask"]
        tokens = tokens or max(int((labels != IGNORE).sum()), 1)
        examples = examples or len(labels)
        states = self.encoder.encode(batch["encoder_ids"], mask)
        if self.config.gate_scale == 0:
            loss, right = self._token_loss(batch, states, None, tokens)
            return TrainingLoss(loss, {"loss": loss.detach(), "token_loss": loss.detach(),
                                       "teacher_forced_exact": right.sum() / examples,
                                       "gate": loss.new_zeros(len(labels))})
        pooled, scale = pooled_state(states, mask), self.config.gate_scale
        cycles = self.encoder.cycles(states, mask)
        memories = [self.encoder.memory(cycle.z_high, pooled, scale) for cycle in cycles]
        final, right = self._token_loss(batch, states, memories[-1], tokens)
        loss, earlier, correct = final, [], [right]
        for memory in reversed(memories[:-1]):
            if not weights.deep_supervision and not weights.halting:
                break
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights.deep_supervision > 0):
                token_loss, right = self._token_loss(batch, states, memory, tokens)
            earlier.append(token_loss)
            correct.insert(0, right)
        gate = memories[-1].gate.detach()
        metrics = {"token_loss": final.detach(), "teacher_forced_exact": correct[-1].sum() / examples, "gate": gate,
                   "z_norm": slot_mean_norm(cycles[-1].z_high.detach()).mean()}
        if weights.deep_supervision and earlier:
            supervised = sum(earlier)
            loss = (final + weights.deep_supervision * supervised) / (1 + weights.deep_supervision * len(earlier))
            metrics["deep_supervision_loss"] = supervised.detach() / len(earlier)
        halt = torch.stack([cycle.halt_logits for cycle in cycles], dim=1).float()  # (B, C)
        metrics["halt_sum"] = halt.detach().sigmoid().sum(dim=1)
        if weights.halting:
            target = torch.stack(correct, dim=1).float()
            assert halt.shape == target.shape, f"halting: {halt.shape} against {target.shape}"
            budget = (halt.sigmoid().sum(dim=1) - weights.halting_target).square().sum() / examples
            judged = F.binary_cross_entropy_with_logits(halt, target, reduction="sum") / (examples * halt.shape[1])
            loss = loss + weights.halting * gate.mean() * (budget + judged)
            metrics |= {"halting_loss": budget.detach(), "halting_bce": judged.detach()}
        metrics["loss"] = loss.detach()
        return TrainingLoss(loss, metrics)

    def _token_loss(self, batch: dict[str, Tensor], states: Tensor, memory: Memory | None, tokens: float
                    ) -> tuple[Tensor, Tensor]:
        """(cross-entropy summed over labelled tokens / tokens, (B,) bool: all of them right)."""
        labels = batch["labels"]
        labelled = labels != IGNORE
        out = self.decode(batch["decoder_input_ids"], states, batch["encoder_mask"], memory)
        logits = self.lm_head(out[labelled]).float()  # (labelled tokens, V): pads cost no softmax
        loss = F.cross_entropy(logits, labels[labelled], reduction="sum") / tokens
        return loss, all_correct(logits.detach(), labels)


def slot_mean_norm(z_high: Tensor) -> Tensor:
    """(B,) norm of the mean of z_H's slots (B, H, d). Each slot has the norm sqrt(d): as much means that all agree."""
    return z_high.float().mean(dim=1).norm(dim=-1)


def is_hrm_parameter(name: str) -> bool:
    """True for what lies behind the gate: core, bridge, gate, and the decoder's memory branch."""
    return name.startswith(tuple(f"encoder.{module}." for module in HRM_MODULES)) or ".from_memory." in name


def shifted(labels: Tensor, start: int, pad: int) -> Tensor:
    """(B, T) decoder inputs of labels (B, T): `start`, then all but the last; ignored labels become pads."""
    inputs = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return inputs.masked_fill(inputs == IGNORE, pad)


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(HybridConfig, HybridModel, exist_ok=True)
