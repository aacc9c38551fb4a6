"""`HRMBackbone`: the frozen host and the HRM add-on in one backbone whose last hidden states are already injected.

Shapes: B batch, N tokens, S prompt tokens, T answer slots, D LLM width, d HRM width, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hrm_blocks import (
    Carry,
    Context,
    HRMCore,
    last_column,
    last_state,
    linear,
    relative_change,
    rms_norm,
    token_positions,
)
from injector import INJECTORS, Slots, Thought, VocabularyBias
from single_pass import SinglePassCore

CORES = {"hrm": HRMCore, "mlp": SinglePassCore}  # by `adapter`


class HRMAddonConfig(PreTrainedConfig):
    """Everything that fixes the add-on's shape, beside the host's own config."""

    model_type = "hrm_addon"
    sub_configs = {"base_config": AutoConfig}
    auto_map = {}  # TRL reads it when it loads a reference model whose class transformers does not export

    def __init__(
        self,
        base_config: PreTrainedConfig | dict | None = None,
        base_model_name: str = "",
        d_h: int = 128,
        h_layers: int = 1,
        l_layers: int = 1,
        share_hl: bool = False,
        n_heads: int = 4,
        segments: int = 4,
        inner_T: int = 2,
        reset_l: bool = False,
        grad_horizon: str = "full",
        hrm_input: str = "tokens",
        hrm_read: str = "embed+last",
        init_state: str = "fixed",
        state_mix: str = "sum",
        injector: str = "cab",
        cab_mem: int = 0,
        cab_gate_init: float = 1.0,
        grb_gate_init: float = 0.0,
        logit_bias_head: bool = False,
        lora_layers: int = 0,
        lora_rank: int = 8,
        use_act: bool = False,
        halt_detach: bool = False,
        halt_max_segments: int = 0,
        halt_settled: float = 0.0,
        eval_readout: str = "last",
        verifier_head: bool = False,
        train_injector_scale: float = 1.0,
        eval_injector_scale: float = 1.0,
        adapter: str = "hrm",
        **kwargs: Any,
    ):
        if isinstance(base_config, dict):
            base_config = AutoConfig.for_model(**base_config)
        # A copy: transformers sets the attention of sub-configs to None below, and a host that shared it with us
        # would silently lose its causal mask.
        self.base_config = base_config = copy.deepcopy(base_config)
        self.base_model_name = base_model_name
        self.d_h, self.h_layers, self.l_layers, self.n_heads = d_h, h_layers, l_layers, n_heads
        self.share_hl = share_hl
        self.adapter, self.segments = adapter, segments if adapter == "hrm" else 1
        self.inner_T, self.reset_l, self.grad_horizon = inner_T, reset_l, grad_horizon
        self.hrm_input, self.hrm_read, self.init_state = hrm_input, hrm_read, init_state
        self.state_mix = state_mix
        self.injector, self.cab_mem, self.cab_gate_init = injector, cab_mem, cab_gate_init
        self.grb_gate_init, self.logit_bias_head = grb_gate_init, logit_bias_head
        self.lora_layers, self.lora_rank = lora_layers, lora_rank
        self.use_act, self.halt_max_segments, self.verifier_head = use_act, halt_max_segments, verifier_head
        self.halt_detach, self.halt_settled, self.eval_readout = halt_detach, halt_settled, eval_readout
        self.train_injector_scale, self.eval_injector_scale = train_injector_scale, eval_injector_scale
        if base_config is not None:
            text = base_config.get_text_config()
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                kwargs.setdefault(name, getattr(text, name, None))
        kwargs.setdefault("tie_word_embeddings", False)  # tying is the host's own affair
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The host's text config: cache creation and TRL ask it for layers, heads and vocabulary."""
        return self.base_config.get_text_config(*args, **kwargs) if self.base_config is not None else self


@dataclass
class HostStates:
    """What the frozen LLM says of a batch; the seam where a cache of hidden states sits."""

    features: Tensor  # (B, S, k D) normed features of the prompt, k by `hrm_read`
    context: Context  # mask and RoPE of the prompt's positions
    slots: Slots  # the T positions that predict the target


@dataclass
class BackboneOutput(ModelOutput):
    """Last hidden states with the injection already added."""

    last_hidden_state: Tensor | None = None  # (B, N or kept, D)
    past_key_values: Any = None
    thought: Any = None  # Thought, to be handed back while decoding
    segments_used: Tensor | None = None  # (B,)
    logit_bias: Tensor | None = None  # (B, kept, V)


class HRMAddon(nn.Module):
    """All that trains: reading, HRM core, injector and heads; nothing of the host."""

    def __init__(self, config: HRMAddonConfig, width: int, host_layers: int, vocabulary: int):
        super().__init__()
        parts = {"last": 1, "embed+last": 2, "all": host_layers + 1}[config.hrm_read]
        self.read = linear(parts * width, config.d_h)
        self.core = CORES[config.adapter](
            config.d_h,
            config.n_heads,
            config.h_layers,
            config.l_layers,
            config.inner_T,
            horizon=config.grad_horizon,
            reset_l=config.reset_l,
            init_state=config.init_state,
            share=config.share_hl,
            state_mix=config.state_mix,
        )
        gate = config.cab_gate_init if config.injector == "cab" else config.grb_gate_init
        self.injector = INJECTORS[config.injector](width, config.d_h, config.n_heads, gate, config.cab_mem)
        self.vocabulary_bias = VocabularyBias(width, config.d_h, vocabulary) if config.logit_bias_head else None
        self.verifier = nn.Linear(config.d_h, 1) if config.verifier_head else None

    def inputs(self, features: Tensor) -> Tensor:
        """x (B, S, d), computed anew in each segment so that its projection learns from each."""
        return rms_norm(self.read(features))


class HRMBackbone(PreTrainedModel):
    """Host and add-on in one backbone whose last hidden state is already injected, so that libraries which call
    `model.base_model` and the output embedding by themselves (TRL) train the real thing."""

    config_class = HRMAddonConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: HRMAddonConfig, host: PreTrainedModel | None = None):
        super().__init__(config)
        self.host = host if host is not None else AutoModelForCausalLM.from_config(config.base_config)
        text = config.base_config.get_text_config()
        width = self.host.get_output_embeddings().weight.shape[-1]
        self.addon = HRMAddon(config, width, text.num_hidden_layers, text.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: every module of the add-on initialises itself, and the host comes with its weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.host.get_input_embeddings()

    def train(self, mode: bool = True) -> HRMBackbone:
        """Trains the add-on; the host stays in evaluation mode, its dropout off."""
        super().train(mode)
        self.host.eval()
        return self

    @property
    def scale(self) -> float:
        return self.config.train_injector_scale if self.training else self.config.eval_injector_scale

    # --- reading the host ---

    def run_host(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any = None, use_cache: bool = False
    ) -> tuple[Tensor, list[Tensor], Any]:
        """(last hidden state (B, N, D), features that `hrm_read` names, each (B, N, D), cache)."""
        decoder = self.host.base_model
        arguments: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache}
        if "position_ids" in inspect.signature(decoder.forward).parameters:
            arguments["position_ids"] = positions
        every_layer = self.config.hrm_read == "all"
        with torch.autocast(input_ids.device.type, enabled=False):  # the host runs in its own dtype
            out = decoder(input_ids, past_key_values=cache, output_hidden_states=every_layer, **arguments)
        last = out.last_hidden_state
        if every_layer:  # the last entry is already normed by the host; the norm below does not change its direction
            read = list(out.hidden_states)
        elif self.config.hrm_read == "embed+last":
            read = [self.host.get_input_embeddings()(input_ids), last]
        else:
            read = [last]
        return last, read, out.past_key_values

    def prompt_features(self, read: list[Tensor], mask: Tensor, positions: Tensor) -> tuple[Tensor, Context]:
        """Normed features (B, S, k D) of the prompt and their context; one pooled position with `hrm_input pooled`."""
        features = torch.cat([rms_norm(part.float()) for part in read], dim=-1)
        if self.config.hrm_input == "pooled":
            weight = mask[..., None].to(features.dtype)
            mean = (features * weight).sum(1) / weight.sum(1).clamp(min=1)
            features = (mean + last_state(features, mask))[:, None]
            positions = positions.gather(1, last_column(mask)[:, None])
            mask = mask.any(dim=1, keepdim=True)
        return features, self.addon.core.context(mask, positions)

    # --- thinking ---

    def advance(self, features: Tensor, context: Context, carry: Carry | None) -> Carry:
        """One segment: carry in, carry out."""
        carry = carry or self.addon.core.initial_carry(context.mask)
        return self.addon.core(self.addon.inputs(features), context, carry)

    def think(self, features: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """All segments of inference: (z_high (B, S, d), segments used (B,)).

        An example leaves the batch, and costs nothing more, when its halting head says "right" (`use_act`, logit > 0)
        or when a segment changed its z_high by a share less than `halt_settled`: more of the same would change nothing.
        """
        limit = (self.config.halt_max_segments if self.config.use_act else 0) or self.config.segments
        if self.config.use_act and self.config.eval_readout == "best_halt":
            return self._think_all(features, context, limit)
        core, x = self.addon.core, self.addon.inputs(features)
        carry = core.initial_carry(context.mask)
        z_high, used = torch.empty_like(x), torch.zeros_like(carry.steps)
        active, part = torch.arange(len(x), device=x.device), context
        for segment in range(limit):
            before = carry.detach()  # as in training, gradient stays within a segment
            carry = core(x, part, before)
            done = torch.full_like(carry.halted, segment == limit - 1)
            if self.config.use_act:
                done |= core.halt_logits(carry.z_high, part.mask) > 0
            if self.config.halt_settled:
                done |= relative_change(before.z_high, carry.z_high, part.mask) < self.config.halt_settled
            if not bool(done.any()):
                continue
            z_high[active[done]], used[active[done]] = carry.z_high[done].to(x.dtype), carry.steps[done]
            active, carry, x, part = active[~done], carry.rows(~done), x[~done], part.rows(~done)
            if not len(active):
                break
        return z_high, used

    def _think_all(self, features: Tensor, context: Context, limit: int) -> tuple[Tensor, Tensor]:
        """As `think`, all segments; each example answers from the (first) one of the highest halting score."""
        core, x = self.addon.core, self.addon.inputs(features)
        carry = core(x, context, core.initial_carry(context.mask))
        z_high, score = carry.z_high, core.halt_logits(carry.z_high, context.mask)
        for _ in range(limit - 1):
            carry = core(x, context, carry.detach())
            logits = core.halt_logits(carry.z_high, context.mask)
            z_high = torch.where((logits > score)[:, None, None], carry.z_high, z_high)
            score = torch.maximum(score, logits)
        return z_high.to(x.dtype), carry.steps

    def inject(self, slots: Slots, thought: Thought) -> tuple[Tensor, Tensor | None]:
        """(hidden states with z_H's bias (B, T, D), logit bias (B, T, V) or None); scale 0 skips the branch."""
        if self.scale == 0:
            return slots.hidden, None
        named = thought.context.mask.any(dim=1)[:, None, None]  # an empty prompt leaves the bare LLM
        allowed = named if slots.allowed is None else named & slots.allowed[..., None]
        bias = self.addon.injector(slots, thought).to(slots.hidden.dtype)
        hidden = torch.where(allowed, slots.hidden + self.scale * bias, slots.hidden)
        if self.addon.vocabulary_bias is None:
            return hidden, None
        return hidden, torch.where(allowed, self.scale * self.addon.vocabulary_bias(slots, thought), 0.0)

    # --- the backbone as a library calls it ---

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        past_key_values: Any = None,
        thought: Thought | None = None,
        use_cache: bool = False,
        keep: int = 0,
        **_: Any,
    ) -> BackboneOutput:
        """Injected last hidden states (B, N, D), or of the last `keep` columns alone.

        `prompt_mask` (B, N) marks the tokens that HRM may read; tokens before a row's last prompt token stay the bare
        LLM's. While decoding, `thought` carries z_H of the prompt.

        Raises:
            ValueError: no prompt mask and no thought (which tokens HRM may read is never guessed), or a cache of past
                tokens without the thought that belongs to it.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be (B, tokens), got {attention_mask.ndim} axes: static caches are not supported"
            )
        positions = token_positions(attention_mask)[:, past:]
        last, read, cache = self.run_host(input_ids, attention_mask, positions, past_key_values, use_cache)
        if self.scale == 0:
            return BackboneOutput(last[:, -keep:], cache)
        used = None
        if thought is None:
            prompt_mask = self._check_prompt(prompt_mask, input_ids, past) & attention_mask.bool()
            length = max(int(last_column(prompt_mask).max()) + 1, 1)
            mask = prompt_mask[:, :length]
            read = [part[:, :length] for part in read]
            features, context = self.prompt_features(read, mask, positions[:, :length])
            z_high, used = self.think(features, context)
            thought = Thought(z_high, context, last_column(prompt_mask))
        columns = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[-keep:]
        slots = Slots(
            last[:, -keep:],
            self.host.get_input_embeddings()(input_ids[:, -keep:]),
            positions[:, -keep:],
            allowed=columns >= thought.start[:, None],
        )
        hidden, bias = self.inject(slots, thought)
        return BackboneOutput(hidden, cache, thought, used, bias)

    def _check_prompt(self, prompt_mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor:
        if past:
            raise ValueError("a cache of past tokens came without the thought made from its prompt: pass back both")
        if prompt_mask is None:
            raise ValueError("prompt_mask is missing: HRM never guesses what the prompt is; pass it, or labels")
        if prompt_mask.shape != input_ids.shape:
            raise ValueError(
                f"prompt_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(prompt_mask.shape)}"
            )
        return prompt_mask.bool()
