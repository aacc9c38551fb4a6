"""`HRMController`: a frozen causal LM with an HRM add-on; its config, and the backbone that holds both.

How data flows (B batch, N tokens, S prompt tokens, T target tokens, D LLM width, d HRM width, V vocabulary):

    states = controller.encode(batch)                 runs the frozen LLM, no gradient, once per batch
    out = controller.segment(states, labels, carry)   x = norm(proj(features)), L x inner_T, H, inject, LM head
    controller.generate(ids, mask)                    prefill, segments once on the prompt, cached decoding with z_H

z_H reads the whole prompt in both directions. It may therefore change only the positions from the last prompt token on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import ModelOutput

from batching import Batch
from engine.batches import IGNORE, all_correct
from engine.growing_cache import with_room
from engine.optimization import check_fit
from engine.past_tokens import cached_tokens, position_arguments, run_decoder
from engine.placement import ONE_DEVICE, SpreadConfig, device_of
from engine.positions import last_column, last_state, token_positions
from host import (
    add_lora,
    freeze,
    host_logits,
    load_host,
    without_lora,
)
from hrm_blocks import Carry, Context, HRMCore, ShortConv, SinglePassCore, linear, rms_norm
from injector import INJECTORS, PromptGate, Slots, Thought, VocabularyBias
from thinking.segments import StopRule, first_slot, think_until

ADDON_PREFIX = "model.addon."
CORES = {"hrm": HRMCore, "mlp": SinglePassCore}  # by `HRMAddonConfig.adapter`
# What a saved record without the key was made with, where that is not today's default.
OLD_DEFAULTS = {"segments": 4, "init_state": "fixed", "state_mix": "sum", "halt_settled_at": "prompt"}


class AdapterConfig(PreTrainedConfig):
    """What the configs of all adapters share: the LLM they sit on. Only keyword arguments are taken.

    Attributes:
        base_config: the LLM's own config; a dict of it is accepted.
        base_model_name: folder or hub name that the LLM was loaded from.
    """

    sub_configs = {"base_config": AutoConfig}

    base_config: PreTrainedConfig | dict | None = None
    base_model_name: str = ""

    def __post_init__(self, **kwargs: Any) -> None:
        base: Any = self.base_config
        if isinstance(base, dict):
            base = AutoConfig.for_model(**base)
        # A copy: transformers sets the attention of sub-configs to None below, and a host that shared it with us
        # would silently lose its causal mask.
        self.base_config = copy.deepcopy(base)

        # `generate` asks the outer config for the special tokens.
        if base is not None:
            text = base.get_text_config()
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                kwargs.setdefault(name, getattr(text, name, None))
        kwargs.setdefault("tie_word_embeddings", False)  # tying is the host's own affair
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The host's text config: cache creation and TRL ask it for layers, heads and vocabulary."""
        base: Any = self.base_config  # no dict any more
        if base is None:
            return self
        return base.get_text_config(*args, **kwargs)

    def settings(self) -> dict[str, Any]:
        """Name -> value of the adapter's own settings, in their order: with an LLM, they rebuild the adapter."""
        shared = {field.name for field in dataclasses.fields(AdapterConfig)}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in shared}


class HRMAddonConfig(AdapterConfig):
    """Shape and settings of the add-on, each named after the flag of `train.py` that sets it.

    The defaults are those of `train.py`.

    Attributes:
        d_h: width of the HRM; a multiple of 2 x n_heads.
        h_layers, l_layers: layers of the slow block H (0: there is none) and of the fast block L, at least 1.
        share_hl: one block is both H and L, as in TRM; needs h_layers == l_layers.
        n_heads: attention heads of the blocks and of the injector.
        segments: segments of inference; a single pass always has 1.
        inner_T: L steps before each H step.
        reset_l: z_L starts anew at each segment.
        grad_horizon: calls that carry gradient: "one_step", "full", "k:N" of a segment, or all of "segments:N".
        recompute_segments: what the gradient reads of earlier segments is computed again, which takes less memory.
        carry_noise: Gaussian noise on the carried states in training, as a share of their root mean square.
        hrm_input: "tokens" reads every prompt token, "pooled" one vector made of their mean and the last.
        hrm_read: LLM states that HRM reads: "embed", "last", "embed+last" or "all".
        hrm_conv: tokens that HRM reads together, see `ShortConv`; 1 = each alone.
        init_state: first z_H and z_L: "random", "fixed" or "zero", see `HRMCore`.
        state_mix: earlier states enter a block by "sum" or by "gated", see `HRMCore`.
        injector: "cab" or "grb", see injector.py.
        injector_sees: what it sees of a position beside z_H: "hidden+embed" or, without the LLM's state, "embed".
        cab_mem: memory tokens of cab; 0 = it reads all of z_H.
        cab_gate_init, grb_gate_init: initial gate of cab (a factor) and of grb (a logit).
        logit_bias_head: also a gated bias over the vocabulary.
        prompt_gate: a gate decides for each prompt whether anything is injected; shut, the answer is the bare LLM's.
        lora_layers: top layers of the LLM with LoRA beside HRM; 0 = none.
        lora_rank: rank of that LoRA.
        use_act: a halting head learns, and halts examples at evaluation.
        halt_detach: the halting head's loss leaves z_H alone.
        halt_max_segments: most segments at evaluation with use_act; 0 = `segments`.
        halt_settled: share of a norm, 0 to 1; at evaluation an example stops when a segment changes what
            `halt_settled_at` names by less than that; 0 = off.
        halt_settled_at: "answer", what the injector writes at the last prompt token, which predicts the first token of
            the answer; or "prompt", z_H over the whole prompt.
        eval_readout: segment that answers: "last", or "best_halt" for the one of the highest halting score.
        verifier_head: a head learns the task verifier's verdict.
        train_injector_scale, eval_injector_scale: factor on the injection; 0 = the bare LLM.
        adapter: "hrm", or "mlp" for HRM's blocks in a single pass.
    """

    model_type = "hrm_addon"
    # TRL reads it when it loads a reference model whose class transformers does not export.
    auto_map: ClassVar[dict[str, str]] = {}

    d_h: int = 128
    h_layers: int = 1
    l_layers: int = 1
    share_hl: bool = False
    n_heads: int = 4
    segments: int = 1
    inner_T: int = 2
    reset_l: bool = False
    grad_horizon: str = "full"
    recompute_segments: bool = False
    carry_noise: float = 0.0
    hrm_input: str = "tokens"
    hrm_read: str = "embed+last"
    hrm_conv: int = 1
    init_state: str = "zero"
    state_mix: str = "gated"
    injector: str = "cab"
    injector_sees: str = "hidden+embed"
    cab_mem: int = 0
    cab_gate_init: float = 1.0
    grb_gate_init: float = 0.0
    logit_bias_head: bool = False
    prompt_gate: bool = False
    lora_layers: int = 0
    lora_rank: int = 8
    use_act: bool = False
    halt_detach: bool = False
    halt_max_segments: int = 0
    halt_settled: float = 0.0
    halt_settled_at: str = "answer"
    eval_readout: str = "last"
    verifier_head: bool = False
    train_injector_scale: float = 1.0
    eval_injector_scale: float = 1.0
    adapter: str = "hrm"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.adapter != "hrm":
            self.segments = 1
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'. A setting that an older version left out of the record has the value it had then."""
        return super().from_dict(OLD_DEFAULTS | config_dict, **kwargs)


@dataclass
class HostStates:
    """What the frozen LLM computes for a batch; a cache of hidden states stands in here."""

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


@dataclass
class ControllerOutput(ModelOutput):
    """Loss and logits of one segment, or of an ordinary causal-LM call."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, kept, V); of one segment: (labelled tokens, V)
    past_key_values: Any = None
    carry: Any = None
    metrics: dict[str, Tensor] | None = None
    thought: Any = None
    segments_used: Tensor | None = None


# --- what every adapter on a frozen LLM shares ------------------------------------------------------------------------


class FrozenHostModel(PreTrainedModel):
    """A model around `host`, a frozen causal LM that stays in evaluation mode."""

    host: PreTrainedModel
    _supports_sdpa = True
    _supports_flash_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: what trains initialises itself, and the host comes with its weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.host.get_input_embeddings()

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, N, D) embeddings of tokens (B, N), on their device, wherever the LLM's table is."""
        return self.host.get_input_embeddings()(input_ids).to(input_ids.device)

    @property
    def device(self) -> torch.device:
        """Where tokens are taken and what is added computes."""
        return device_of(self)

    def train(self, mode: bool = True) -> FrozenHostModel:
        """Trains what is added; the host stays in evaluation mode, its dropout off."""
        super().train(mode)
        self.host.eval()
        return self


class RecurrentCache(DynamicCache):
    """A cache of recurrent states alone (Mamba2), which hold no row per token: `run_decoder` counts the tokens."""

    tokens_read = 0
    is_compileable = False  # else transformers would hand on prepared masks in place of the padding mask

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens_read


class AdapterController(FrozenHostModel, GenerationMixin):
    """A frozen LLM with something small that trains: HRM, its single pass, LoRA, virtual tokens, or nothing.

    A training step calls `encode` once per batch and `segment` once per segment, by way of `SegmentLoss`. Answers come
    from `generate`.
    """

    addon_prefix: str  # of the names of what trains, beside LoRA
    virtual_tokens = 0  # positions that the adapter takes before the prompt

    @property
    def recurrent(self) -> bool:
        """Whether there are segments to draw, supervise and count."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What trains, in a few words for the user."""
        raise NotImplementedError

    @classmethod
    def from_base(cls, name: str, load_in: str = "none", trust_remote_code: bool = False, device: str = "cpu",
                  host_dtype: str = "stored", revision: str | None = None, attn_implementation: str | None = None,
                  spread: SpreadConfig = ONE_DEVICE, **settings: Any) -> AdapterController:
        """A new adapter on the causal LM `name`, loaded as `host.load_host` does, with `settings` of its config.

        Raises:
            HostError: as `host.load_host`.
        """
        raise NotImplementedError

    def encode(self, batch: Batch) -> Any:
        """What `segment` needs of a batch that does not change from segment to segment."""
        raise NotImplementedError

    def segment(self, states: Any, labels: Tensor, carry: Any = None, denominator: float | None = None,
                earlier: int = 0) -> ControllerOutput:
        """Loss of one training segment.

        Args:
            states: what `encode` returned for the batch.
            labels: (B, T) target ids, IGNORE where there is no loss.
            carry: the state that the segment before returned; None before the first.
            denominator: what the summed cross-entropy is divided by, the labelled tokens of the global batch; None:
                those of this batch.
            earlier: segments that run before the scored one without a loss; its gradient runs through them.

        Returns:
            Loss, logits (N, V) of the N labelled tokens in row-major order, carry, and `metrics` per example, each
            (B,): `correct`, bool, every target token is the argmax; `halt_logits`, `verdict_logits` and `gate_distance`
            where those heads exist.
        """
        raise NotImplementedError

    def parts(self) -> dict[str, nn.Module]:
        """Name -> module of what trains, for counting."""
        raise NotImplementedError

    def shape(self) -> dict[str, Any]:
        """What of an adapter document says how to build this adapter anew."""
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Module:
        return self.host.get_output_embeddings()

    @contextlib.contextmanager
    def bare(self) -> Iterator[PreTrainedModel]:
        """The bare LLM, LoRA switched off inside."""
        with without_lora(self.host):
            yield self.host

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any,
                                      **kwargs: Any) -> None:
        """As transformers', with room for the answer; where no layer of the cache counts tokens, one that does."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache: Any = model_kwargs.get("past_key_values")
        counts = any(isinstance(layer, CacheLayerMixin) for layer in getattr(cache, "layers", ()))
        if type(cache) is DynamicCache and not counts and cache.layers:
            model_kwargs["past_key_values"] = RecurrentCache(config=self.config.get_text_config())
        with_room(cache)

    def addon_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that trains: never one of the LLM."""
        trained = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and is_addon_parameter(name, self.addon_prefix):
                trained[name] = parameter
        return trained

    def addon_state(self) -> dict[str, Tensor]:
        """Name -> tensor of everything a checkpoint keeps: what is added with its buffers, nothing of the LLM."""
        state = self.state_dict()
        return {name: tensor for name, tensor in state.items() if is_addon_parameter(name, self.addon_prefix)}

    def load_addon_state(self, state: dict[str, Tensor]) -> None:
        """Restores `addon_state`. Raises ValueError naming the first difference in names or shapes."""
        check_fit(self.addon_state(), state)
        self.load_state_dict(state, strict=False)


class SegmentLoss(nn.Module):
    """A controller as a module whose forward is one training segment: what DDP wraps."""

    def __init__(self, controller: AdapterController):
        super().__init__()
        self.controller = controller

    def forward(self, states: Any, labels: Tensor, carry: Any = None, denominator: float | None = None,
                earlier: int = 0) -> ControllerOutput:
        """As `AdapterController.segment`."""
        return self.controller.segment(states, labels, carry, denominator, earlier)


def is_addon_parameter(name: str, prefix: str = ADDON_PREFIX) -> bool:
    """Whether a parameter or buffer is part of the adapter: freezing, optimizer, counting and saving all ask this."""
    return name.startswith(prefix) or "lora_" in name


# --- the HRM add-on ---------------------------------------------------------------------------------------------------


class HRMAddon(nn.Module):
    """All that trains: reading, HRM core, injector and heads; nothing of the host.

    `width` is D, `host_layers` the LLM's decoder layers, `vocabulary` V.
    """

    def __init__(self, config: HRMAddonConfig, width: int, host_layers: int, vocabulary: int):
        super().__init__()
        # The order in which modules are made fixes what random numbers each of them begins with.
        parts = {"embed": 1, "last": 1, "embed+last": 2, "all": host_layers + 1}[config.hrm_read]
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
        sees = config.injector_sees
        self.injector = INJECTORS[config.injector](width, config.d_h, config.n_heads, gate, config.cab_mem, sees)
        self.vocabulary_bias = VocabularyBias(width, config.d_h, vocabulary, sees) if config.logit_bias_head else None
        self.verifier = nn.Linear(config.d_h, 1) if config.verifier_head else None
        self.conv = ShortConv(config.d_h, config.hrm_conv) if config.hrm_conv > 1 else None
        self.prompt_gate = PromptGate(parts * width) if config.prompt_gate else None

    def inputs(self, features: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, d) of features under mask (B, S), computed anew in each segment, to learn from each."""
        x = rms_norm(self.read(features))
        return x if self.conv is None else rms_norm(self.conv(x, mask))


class HRMBackbone(FrozenHostModel):
    """Host and add-on in one backbone whose last hidden state is already injected.

    Libraries that call `model.base_model` and the output embedding by themselves (TRL) so train the real thing.
    """

    config_class = HRMAddonConfig
    base_model_prefix = "model"

    def __init__(self, config: HRMAddonConfig, host: PreTrainedModel | None = None):
        super().__init__(config)
        self.host = host if host is not None else AutoModelForCausalLM.from_config(config.base_config)
        text = config.get_text_config()
        width = self.host.get_output_embeddings().weight.shape[-1]
        self.addon = HRMAddon(config, width, text.num_hidden_layers, text.vocab_size)
        self.post_init()

    @property
    def scale(self) -> float:
        """Factor on the injection, in training or at evaluation."""
        return self.config.train_injector_scale if self.training else self.config.eval_injector_scale

    # --- reading the host ---

    def run_host(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any = None, use_cache: bool = False,
        reads: bool = True,
    ) -> tuple[Tensor, list[Tensor], Any]:
        """(last hidden state (B, N, D), features that `hrm_read` names, each (B, N, D), cache).

        Without `reads` there are no features: HRM has read its prompt.
        """
        decoder = self.host.base_model
        every_layer = reads and self.config.hrm_read == "all"

        # Autocast is off inside: the host runs in its own dtype.
        with torch.autocast(input_ids.device.type, enabled=False):
            out, cache = run_decoder(
                decoder,
                cache,
                input_ids=input_ids,
                output_hidden_states=every_layer,
                attention_mask=attention_mask,
                use_cache=use_cache,
                **position_arguments(decoder, positions),
            )

        last = out.last_hidden_state
        if every_layer:
            # The last entry is already normed by the host; a second norm does not change its direction.
            read = self._layer_states(input_ids, out)
        else:
            read = self.states_read(input_ids, last) if reads else []
        return last, read, cache

    def states_read(self, input_ids: Tensor, last: Tensor) -> list[Tensor]:
        """What `hrm_read` names, "all" aside: (B, N, D) each."""
        names = self.config.hrm_read.split("+")
        return [last if name == "last" else self.embed(input_ids) for name in names]

    def _layer_states(self, input_ids: Tensor, out: Any) -> list[Tensor]:
        """The states before, between and behind the decoder layers, num_hidden_layers + 1 tensors (B, N, D).

        Mamba2 lists each layer's output and the normed last one, without what its first layer reads: the embeddings.

        Raises:
            ValueError: the family gives other states than that.
        """
        states = list(out.hidden_states)
        count = self.config.get_text_config().num_hidden_layers + 1
        if len(states) != count or any(state.shape != out.last_hidden_state.shape for state in states):
            raise ValueError(f"--hrm_read all: the LLM does not give one state for each of {count - 1} layers")
        if not hasattr(out, "past_key_values"):
            states = [self.embed(input_ids), *states[:-2], states[-1]]
        return states

    def prompt_features(self, read: list[Tensor], mask: Tensor, positions: Tensor) -> tuple[Tensor, Context]:
        """Normed features (B, S, k D) of the prompt and their context; one pooled position with `hrm_input pooled`.

        `read` holds k tensors (B, S, D), `mask` (B, S) is True at prompt tokens, `positions` (B, S) are theirs.
        """
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
        """One segment: carry in, carry out; None: the initial state. In training `carry_noise` blurs what comes in."""
        if carry is not None and self.training and self.config.carry_noise:
            carry = carry.noisy(self.config.carry_noise)
        carry = carry or self.addon.core.initial_carry(context.mask)
        return self.addon.core(self.addon.inputs(features, context.mask), context, carry)

    def recomputed(self, features: Tensor, context: Context, carry: Carry | None) -> Carry:
        """As `advance`; with `recompute_segments` its activations are computed again in the backward pass, not kept."""
        if self.config.recompute_segments and torch.is_grad_enabled():
            return checkpoint(self.advance, features, context, carry, use_reentrant=False)
        return self.advance(features, context, carry)

    def think(self, features: Tensor, context: Context, slots: Slots) -> tuple[Tensor, Tensor]:
        """All segments of inference, as `think_until`; `slots` holds the last prompt token, T 1."""
        config = self.config
        rule = StopRule(
            most=(config.halt_max_segments if config.use_act else 0) or config.segments,
            by_head=config.use_act,
            best_of_all=config.eval_readout == "best_halt",
            settled=config.halt_settled,
            settled_at=config.halt_settled_at,
        )
        x = self.addon.inputs(features, context.mask)
        return think_until(rule, self.addon.core, self.addon.injector, x, context, slots)

    def opened(self, features: Tensor, context: Context) -> Tensor | None:
        """(B,) bool, for which prompts the gate is open; None where there is no gate."""
        gate = self.addon.prompt_gate
        return None if gate is None else gate.opened(features, context.mask)

    def inject(self, slots: Slots, thought: Thought) -> tuple[Tensor, Tensor | None]:
        """(hidden states with z_H's bias (B, T, D), logit bias (B, T, V) or None); scale 0 skips the branch."""
        if self.scale == 0:
            return slots.hidden, None

        # A row with an empty prompt keeps the bare LLM's states, and so does one whose gate is shut.
        allowed = thought.once("allowed", lambda: thought.context.mask.any(dim=1)[:, None, None])
        if slots.allowed is not None:
            allowed = allowed & slots.allowed[..., None]
        if thought.opened is not None:
            allowed = allowed & thought.opened[:, None, None]
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
        needed: Tensor | None = None,
        **_: Any,
    ) -> BackboneOutput:
        """Injected last hidden states (B, N, D), or of the last `keep` columns alone.

        `prompt_mask` (B, N) marks the tokens that HRM may read; tokens before a row's last prompt token stay the bare
        LLM's. While decoding, `thought` carries z_H of the prompt. `needed` (B,) limits each row's segments.

        Raises:
            ValueError: no prompt mask and no thought (which tokens HRM may read is never guessed), or a cache of past
                tokens without the thought that belongs to it.
        """
        past = cached_tokens(past_key_values)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be (B, tokens), got {attention_mask.ndim} axes: static caches are not supported"
            )
        positions = token_positions(attention_mask)[:, past:]
        thinks = thought is None and self.scale != 0
        last, read, cache = self.run_host(input_ids, attention_mask, positions, past_key_values, use_cache, thinks)
        if self.scale == 0:
            return BackboneOutput(last[:, -keep:], cache)

        # The prompt is thought about once; while decoding, its z_H comes back as `thought`.
        used = None
        if thought is None:
            prompt_mask = self._check_prompt(prompt_mask, input_ids, past) & attention_mask.bool()
            first = first_slot(self.embed, input_ids, last, prompt_mask, positions)
            thought, used = self._think_about(prompt_mask, read, positions, needed, first)

        # Behind all prompts, where answers are decoded, every position may be injected.
        allowed = None
        if thought.start is not None and past < thought.length:
            columns = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[-keep:]
            allowed = columns >= thought.start[:, None]
        slots = Slots(last[:, -keep:], self.embed(input_ids[:, -keep:]), positions[:, -keep:], allowed)
        hidden, bias = self.inject(slots, thought)
        return BackboneOutput(hidden, cache, thought, used, bias)

    def _think_about(self, prompt_mask: Tensor, read: list[Tensor], positions: Tensor, needed: Tensor | None,
                     first: Slots) -> tuple[Thought, Tensor]:
        """(thought, segments used (B,)) of the prompts that `prompt_mask` (B, N) marks, up to their tokens `first`."""
        last = last_column(prompt_mask)
        length = max(int(last.max()) + 1, 1)
        features, context = self.prompt_features(
            [part[:, :length] for part in read], prompt_mask[:, :length], positions[:, :length]
        )
        context.needed = needed
        z_high, used = self.think(features, context, first)
        return Thought(z_high, context, last, self.opened(features, context), length), used

    def _check_prompt(self, prompt_mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor:
        """The mask as bool. Raises ValueError as `forward`."""
        if past:
            raise ValueError("a cache of past tokens came without the thought made from its prompt: pass back both")
        if prompt_mask is None:
            raise ValueError("prompt_mask is missing: HRM never guesses what the prompt is; pass it, or labels")
        if prompt_mask.shape != input_ids.shape:
            raise ValueError(
                f"prompt_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(prompt_mask.shape)}"
            )
        return prompt_mask.bool()


# --- the causal LM that users hold ------------------------------------------------------------------------------------


class HRMController(AdapterController):
    """A frozen LLM with HRM, or with HRM's blocks in a single pass; a causal LM for transformers."""

    config_class = HRMAddonConfig
    base_model_prefix = "model"
    addon_prefix = ADDON_PREFIX
    _supported_generation_modes = ["greedy_search", "sample", "beam_search", "beam_sample"]  # others guess
    _keep_in_fp32_modules_strict = {"addon", "lora_A", "lora_B"}

    def __init__(self, config: HRMAddonConfig, host: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = HRMBackbone(config, host)
        self.generation_config = copy.deepcopy(self.model.host.generation_config)
        self.post_init()
        freeze(self.model.host)
        if config.lora_layers:
            self.__dict__["peft_lora"] = add_lora(self.model.host, config.lora_layers, config.lora_rank)  # no module
        self._set_trainable()

    def _set_trainable(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_addon_parameter(name))
        self.model.addon.core.halt.requires_grad_(self.config.use_act)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; then freezes again, because what is frozen is not saved."""
        loaded = super().from_pretrained(*args, **kwargs)
        controller = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info`
        controller._set_trainable()
        return loaded

    @classmethod
    def from_base(cls, name: str, load_in: str = "none", trust_remote_code: bool = False, device: str = "cpu",
                  host_dtype: str = "stored", revision: str | None = None, attn_implementation: str | None = None,
                  spread: SpreadConfig = ONE_DEVICE, **settings: Any) -> HRMController:
        """A new add-on on the causal LM `name` (hub name or folder). Raises HostError as `host.load_host`."""
        host = load_host(name, load_in, trust_remote_code, device, host_dtype, revision, attn_implementation, spread)
        config = HRMAddonConfig(base_config=host.config, base_model_name=name, **settings)
        controller = cls(config, host)
        if not spread.is_sharded:
            controller.model.addon.to(device)
        return controller

    @property
    def host(self) -> PreTrainedModel:
        """The frozen LLM; with `lora_layers` its top layers carry LoRA."""
        return self.model.host

    @property
    def recurrent(self) -> bool:
        return self.config.adapter == "hrm"

    @property
    def title(self) -> str:
        return "HRM" if self.recurrent else "single pass"

    def parts(self) -> dict[str, nn.Module]:
        """Name -> module of what trains, for counting."""
        parts = dict(self.model.addon.named_children())
        if self.config.lora_layers:
            parts["lora"] = self.host
        return parts

    def shape(self) -> dict[str, Any]:
        """What of an adapter document says how to build this add-on anew."""
        return {"hrm": self.config.settings()}

    # --- training ---

    def encode(self, batch: Batch) -> HostStates:
        """The frozen LLM over prompt and target, once: prompt features and the slots that predict the target.

        Without gradient, unless LoRA layers train. Columns S - 1 to S + T - 2 predict the T target tokens.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.lora_layers > 0):
            ids = batch.input_ids[:, :-1]
            mask = batch.attention_mask[:, :-1]
            last, read, _ = self.model.run_host(ids, mask, token_positions(mask))
            return self.host_states(batch, last, read)

    def host_states(self, batch: Batch, last: Tensor, read: list[Tensor]) -> HostStates:
        """What `encode` makes of the LLM's last hidden states and of what HRM reads, (B, S + T - 1, D) each."""
        length = batch.prompt_ids.shape[1]
        positions = token_positions(batch.attention_mask[:, :-1])
        features, context = self.model.prompt_features(
            [part[:, :length] for part in read], batch.prompt_mask.bool(), positions[:, :length]
        )
        embedded = self.embed(batch.input_ids[:, length - 1 : -1])
        return HostStates(features, context, Slots(last[:, length - 1 :], embedded, positions[:, length - 1 :]))

    def segment(self, states: HostStates, labels: Tensor, carry: Carry | None = None, denominator: float | None = None,
                earlier: int = 0) -> ControllerOutput:
        """One segment of deep supervision (HRM, section 2), see `AdapterController.segment`."""
        before = []
        for _ in range(earlier):
            carry = self.model.recomputed(states.features, states.context, carry)
            if self.config.use_act:
                before.append(self._halting_before(states, labels, carry.detach()))
        carry = self.model.advance(states.features, states.context, carry)
        logits = self._answer_logits(states, labels, carry)
        target = labels[labels != IGNORE]
        loss = F.cross_entropy(logits, target, reduction="sum") / (denominator or max(len(target), 1))

        # The heads read the new z_H; their losses are the trainer's.
        metrics = {"correct": all_correct(logits, labels)}
        if before:
            metrics["earlier_halt_logits"], metrics["earlier_correct"] = map(torch.stack, zip(*before, strict=True))
        if self.config.use_act:
            z_high = carry.z_high.detach() if self.config.halt_detach else carry.z_high
            metrics["halt_logits"] = self.model.addon.core.halt_logits(z_high, states.context.mask)
        if self.model.addon.prompt_gate is not None:
            metrics["gate_distance"] = self.model.addon.prompt_gate(states.features, states.context.mask)
        if self.model.addon.verifier is not None:
            state = last_state(carry.z_high, states.context.mask)
            metrics["verdict_logits"] = self.model.addon.verifier(state).squeeze(-1)
        return ControllerOutput(loss=loss, logits=logits, carry=carry, metrics=metrics)

    def _answer_logits(self, states: HostStates, labels: Tensor, carry: Carry) -> Tensor:
        """(labelled tokens, V): of labelled tokens alone, for a vocabulary is wide."""
        opened = self.model.opened(states.features, states.context)
        hidden, bias = self.model.inject(states.slots, Thought(carry.z_high, states.context, opened=opened))
        labelled = labels != IGNORE
        logits = host_logits(self.host, hidden[labelled])
        return logits if bias is None else logits + bias[labelled].float()

    def _halting_before(self, states: HostStates, labels: Tensor, carry: Carry) -> tuple[Tensor, Tensor]:
        """(halting logits, whether the answer is right), (B,) each, where no answer is asked for yet.

        `carry` is detached: the head learns to see that an answer is still wrong, and nothing else learns from it.
        """
        with torch.no_grad():
            correct = all_correct(self._answer_logits(states, labels, carry), labels)
        return self.model.addon.core.halt_logits(carry.z_high, states.context.mask), correct

    # --- the causal LM ---

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        past_key_values: Any = None,
        thought: Thought | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        segments_log: list[Tensor] | None = None,
        segments_needed: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> ControllerOutput:
        """A causal LM: logits (B, N or fewer columns, V), and with `labels` (B, N) their mean loss.

        `prompt_mask` (B, N) marks what HRM may read; without it, it is made from `labels`: the attended tokens before a
        row's first label. With labels, logits cover only the columns from the first scored one on. Each call that
        thinks appends the segments it used (B,) to `segments_log`; `segments_needed` (B,) limits each row's, within
        the config's number. `position_ids` are accepted and ignored: positions
        come from the mask.

        Raises:
            ValueError: neither prompt mask nor labels nor thought.
        """
        if labels is not None:
            if prompt_mask is None:
                prompt_mask = prompt_before(labels, attention_mask)
            scored = (labels[:, 1:] != IGNORE).any(dim=0).nonzero()
            logits_to_keep = labels.shape[1] - int(scored[0]) if len(scored) else 1

        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            prompt_mask=prompt_mask,
            past_key_values=past_key_values,
            thought=thought,
            use_cache=bool(use_cache),
            keep=logits_to_keep,
            needed=segments_needed,
        )
        if segments_log is not None and out.segments_used is not None:
            segments_log.append(out.segments_used)
        logits = host_logits(self.host, out.last_hidden_state)
        if out.logit_bias is not None:
            logits = logits + out.logit_bias.float()
        loss = None if labels is None else causal_loss(logits, labels)
        return ControllerOutput(loss=loss, logits=logits, past_key_values=out.past_key_values, thought=out.thought,
                                segments_used=out.segments_used)

    def prepare_inputs_for_generation(self, input_ids: Tensor, prompt_mask: Tensor | None = None,
                                      attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        """Sets the prompt mask on the first call: everything attended that was handed to `generate`.

        Raises:
            ValueError: a static cache, or one filled elsewhere, without the thought that belongs to it.
        """
        cache = kwargs.get("past_key_values")
        thought = kwargs.get("thought")
        if isinstance(cache, StaticCache):
            raise ValueError("static caches are refused: HRM counts the cache's tokens; leave cache_implementation out")
        if kwargs.get("is_first_iteration") and thought is None and cached_tokens(cache):
            raise ValueError("past_key_values holds tokens that HRM has not read: give generate the whole prompt")

        if prompt_mask is None and thought is None:
            prompt_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        inputs["prompt_mask"] = prompt_mask
        return inputs

    def _validate_generation_mode(self, generation_mode: Any, generation_config: Any, *args: Any) -> None:
        super()._validate_generation_mode(generation_mode, generation_config, *args)
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size is refused: HRM reads the whole prompt at once; leave it out")

    def _update_model_kwargs_for_generation(self, outputs: ControllerOutput, model_kwargs: dict[str, Any],
                                            *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Carries z_H along with the cache; without a cache the prompt mask grows by zeros and z_H is made again."""
        thought = outputs.thought
        mask = model_kwargs.get("prompt_mask")
        if mask is None:
            mask = model_kwargs.get("attention_mask")
        if mask is None and thought is not None:
            # `generate` drops a mask of ones: every row is prompt up to its start.
            mask = thought.start.new_ones(len(thought.start), int(thought.start[0]) + 1)

        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.past_key_values is not None:
            model_kwargs["thought"] = thought
        elif mask is not None:
            model_kwargs["prompt_mask"] = torch.cat([mask, mask.new_zeros(len(mask), 1)], dim=1)
        return model_kwargs


def prompt_before(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, N) bool: attended and before the row's first label; a row without labels is prompt throughout."""
    unlabelled = (labels != IGNORE).cumsum(dim=1) == 0
    return unlabelled if attention_mask is None else unlabelled & attention_mask.bool()


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of labels (B, N), each predicted one column earlier, by the last columns' logits (B, C, V)."""
    target = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), ignore_index=IGNORE)


AutoConfig.register(HRMAddonConfig.model_type, HRMAddonConfig, exist_ok=True)
AutoModelForCausalLM.register(HRMAddonConfig, HRMController, exist_ok=True)
