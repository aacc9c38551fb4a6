"""The enhanced HRM: a causal LM that plans and works in cycles over the same layers.

    x = embedding(tokens)                                              (B, T, d), enters every cycle
    per cycle c:  plan = Planner(norm(plan + work + x + e_c))           e_c: learned, one vector per cycle
                  work = Worker(norm(work + plan + x + e_c + skip * work two cycles back))
    logits = work @ embedding^T,  thought = projection of work

After Hierarchical Reasoning Model (arXiv 2506.21734), made causal: each (cycle, layer) has keys and values of its own,
so decoding with a cache equals one pass over everything. Cycles share positions, and a constant RoPE offset per cycle
would cancel inside attention, hence e_c. An entropy gate may stop a token before `max_cycles`.
Shapes: B batch, T tokens, d width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel

from engine.attention import rope
from engine.memory import check_model
from enhanced.config import CycleMeter, EnhancedBackboneOutput, EnhancedHRMConfig, EnhancedOutput
from enhanced.layers import (
    CausalLayer,
    Chosen,
    CycleContext,
    GateHead,
    KeyValueSlots,
    ThoughtHead,
    causal_mask,
    put,
    take,
    usable_cache,
)
from enhanced.losses import training_loss
from enhanced.tokenizer import check_reasoning_tokenizer, reasoning_tokenizer
from hrm_blocks import rms_norm


class EnhancedHRMPreTrainedModel(PreTrainedModel):
    """What backbone and causal LM share."""

    config_class = EnhancedHRMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CausalLayer"]
    _keep_in_fp32_modules_strict = {"thought_head.target"}

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: every module initialises itself."""

    def is_adaptive(self, choice: bool | None) -> bool:
        """Whether the gate stops tokens: the caller's choice, else never in training mode, else as the config says."""
        if choice is not None:
            return choice

        return self.config.adaptive_cycles and not self.training

    @contextlib.contextmanager
    def all_cycles(self) -> Iterator[None]:
        """Inside, every token runs every cycle, in evaluation mode too: GRPO compares log-probabilities there."""
        before = self.config.adaptive_cycles
        self.config.adaptive_cycles = False
        try:
            yield
        finally:
            self.config.adaptive_cycles = before


class EnhancedHRMModel(EnhancedHRMPreTrainedModel):
    """Embedding, planner, worker and gate: everything before the output embedding, as TRL expects of `base_model`."""

    def __init__(self, config: EnhancedHRMConfig):
        super().__init__(config)
        d = config.d_model
        planners = config.n_planner_layers

        # The order in which parameters are made fixes their random values for a seed.
        layers = []
        for index in range(planners + config.n_worker_layers):
            layers.append(CausalLayer(d, config.n_heads, config.mlp_hidden, index))
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        nn.init.trunc_normal_(self.embed_tokens.weight, std=d**-0.5, a=-2 * d**-0.5, b=2 * d**-0.5)
        self.planner = nn.ModuleList(layers[:planners])
        self.worker = nn.ModuleList(layers[planners:])

        # What tells one cycle from another, the worker's skip connection, and the gate that may stop a token.
        self.cycle_embedding = nn.Parameter(torch.randn(config.max_cycles, d))
        self.skip = nn.Parameter(torch.full((d,), 0.5))
        self.gate = GateHead(d)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def _run(self, layers: nn.ModuleList, x: Tensor, cycle: CycleContext) -> Tensor:
        """Planner or worker on x (R, A, d)."""
        # A layer that writes slots cannot be run a second time in the backward pass.
        writes_slots = cycle.slots.cache is not None or cycle.slots.carry
        runs_twice = self.gradient_checkpointing and self.training and not writes_slots
        for layer in layers:
            if runs_twice:
                x = self._gradient_checkpointing_func(layer.__call__, x, cycle)
            else:
                x = layer(x, cycle)
        return x

    def step(self, plan: Tensor, work: Tensor, before: Tensor, x: Tensor, cycle: CycleContext) -> tuple[Tensor, Tensor]:
        """One cycle: (plan, work), each (R, A, d); `before` is the worker's state one cycle before `work`."""
        # More cycles than the model was trained with reuse the last one's embedding.
        x = x + self.cycle_embedding[min(cycle.index, len(self.cycle_embedding) - 1)]
        plan = self._run(self.planner, rms_norm(plan + work + x), cycle)
        work = self._run(self.worker, rms_norm(work + plan + x + self.skip * before), cycle)
        return plan, work

    def stops(self, work: Tensor) -> Tensor:
        """(...) bool of states (..., d): the gate takes the token head to be sure."""
        entropy, confidence = self.gate(work)
        return (entropy < self.config.entropy_threshold) & (confidence > self.config.confidence_threshold)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        max_cycles: int | None = None,
        adaptive_cycles: bool | None = None,
        every_state: bool = False,
        **_: Any,
    ) -> EnhancedBackboneOutput:
        """Runs the cycles over input_ids (B, T); positions come from the mask (B, past + T), so padding may be left.

        Cycles beyond the config's `max_cycles` reuse the last cycle's embedding. A sequence must be decoded with as
        many cycles as its cache was filled with.

        Raises:
            ValueError: no cycles, a mask that is not (B, past + T), a static cache.
        """
        cycles = self.config.max_cycles if max_cycles is None else max_cycles
        if cycles < 1:
            raise ValueError(f"max_cycles must be at least 1, got {cycles}")

        # A cache has one slot of keys and values per cycle and layer.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        layers = self.config.n_planner_layers + self.config.n_worker_layers
        cache = usable_cache(past_key_values, cycles * layers)
        adaptive = self.is_adaptive(adaptive_cycles)
        slots = KeyValueSlots(layers, cache, carry=adaptive)
        first, readable = self._first_cycle(input_ids, attention_mask, slots)

        # The embedding begins with a deviation of d ** -0.5, so this makes its components of size 1.
        x = self.embed_tokens(input_ids) * self.config.d_model**0.5
        used = torch.zeros_like(input_ids)
        states = []
        for work, active in self._cycles(x, first, readable, cycles, adaptive):
            used = used + active
            if every_state:
                states.append(work)
        return EnhancedBackboneOutput(work, past_key_values, used * readable, tuple(states) if every_state else None)

    def _cycles(
        self, x: Tensor, first: CycleContext, readable: Tensor, cycles: int, adaptive: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(worker's state (B, T, d), tokens (B, T) that ran) after each cycle that some token runs.

        Args:
            x: embedded tokens (B, T, d).
            first: the first cycle, of all tokens.
            readable: (B, T) bool, False at padding, which runs no further than the first cycle.
            cycles: most cycles of a token, 1 or more.
            adaptive: whether the gate stops tokens.
        """
        plan = work = before = torch.zeros_like(x)
        active = torch.ones_like(readable)
        for index in range(cycles):
            # None: all tokens run, without packing.
            chosen = None
            if adaptive and not bool(active.all()):
                if not bool(active.any()):
                    first.slots.repeat(index)
                    continue
                chosen = Chosen.of(active)
            ran = active

            # Each cycle writes back what its tokens have changed; the others keep their last state.
            parts = [take(chosen, whole) for whole in (plan, work, before, x)]
            new_plan, new_work = self.step(*parts, first.of(index, chosen))
            if adaptive and index < cycles - 1:
                active = readable & put(chosen, torch.zeros_like(active), ~self.stops(new_work))

            before = work
            plan = put(chosen, plan, new_plan)
            work = put(chosen, work, new_work)
            yield work, ran

    def _first_cycle(
        self, input_ids: Tensor, attention_mask: Tensor | None, slots: KeyValueSlots
    ) -> tuple[CycleContext, Tensor]:
        """(cycle 0 of all tokens, which tokens (B, T) are no padding). Raises ValueError for another mask."""
        tokens = input_ids.shape[1]
        length = tokens
        if slots.cache is not None:
            length += slots.cache.get_seq_length()

        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), length)
        if attention_mask.shape != (len(input_ids), length):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be (B, past + tokens) = {(len(input_ids), length)}, got {shape}")

        # Pads do not count as positions, so a prompt is read alike wherever its padding stands.
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens:]
        cos, sin = rope(positions, self.config.d_model // self.config.n_heads, self.config.rope_theta)
        first = CycleContext(0, cos, sin, causal_mask(attention_mask, tokens), slots)
        return first, attention_mask[:, -tokens:].bool()


class EnhancedHRMForCausalLM(EnhancedHRMPreTrainedModel, GenerationMixin):
    """The planner/worker causal LM with its token head and its thought head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EnhancedHRMConfig):
        super().__init__(config)
        self.model = EnhancedHRMModel(config)

        # Tied to the embedding by `post_init` unless the config says otherwise.
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.thought_head = ThoughtHead(config.d_model, config.thought_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def update_ema(self) -> None:
        """Moves the thought target towards the thought head; the training loop calls it after each optimizer step."""
        self.thought_head.update_ema(self.config.thought_ema)

    def parameter_shares(self) -> dict[str, int]:
        """Trainable parameters by part; a tied embedding counts once and `head` is what an untied one adds."""
        owner = {
            "embed_tokens": "embedding",
            "planner": "planner",
            "worker": "worker",
            "lm_head": "head",
            "thought_head": "heads",
            "gate": "heads",
        }
        shares = dict.fromkeys(("embedding", "planner", "worker", "head", "heads", "cycles"), 0)

        # A tied head is no parameter of its own, so it is not named.
        for name, parameter in self.named_parameters():
            part = name.removeprefix("model.").split(".")[0]
            if parameter.requires_grad:
                shares[owner.get(part, "cycles")] += parameter.numel()
        return shares

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        max_cycles: int | None = None,
        adaptive_cycles: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cycles_log: CycleMeter | None = None,
        position_ids: Tensor | None = None,  # accepted and ignored: positions come from the mask
        **_: Any,
    ) -> EnhancedOutput:
        """Logits of the next token, thoughts and, with labels (B, T; -100 is not scored), the loss.

        Position t is scored on the label at t + 1. `max_cycles` and `adaptive_cycles` override the config for this
        call: a share of training steps with the gate on teaches the model to read tokens that stopped.
        `num_items_in_batch` is the number of scored tokens of the global batch, where it spans several calls.

        Raises:
            ValueError: as the backbone; labels together with `logits_to_keep`.
        """
        if labels is not None:
            if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
                raise ValueError("labels need the logits of every position: leave logits_to_keep out, or the labels")
            use_cache = False  # a training step reads nothing twice

        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            max_cycles=max_cycles,
            adaptive_cycles=adaptive_cycles,
            every_state=labels is not None,
        )

        if cycles_log is not None:
            cycles_log.add(out.cycles_used)

        state = out.last_hidden_state
        logits = self.lm_head(state[:, kept_columns(logits_to_keep)])
        loss = metrics = None
        if labels is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            loss, metrics = training_loss(self, out, logits, labels, mask, num_items_in_batch)
        thoughts = self.thought_head(state)
        return EnhancedOutput(loss, logits, out.past_key_values, thoughts, out.cycles_used, metrics)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers'; without a mask, one of ones as long as all tokens so far."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)

        # The backbone counts positions by the mask, past tokens included.
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = torch.ones_like(input_ids)
        return inputs


def kept_columns(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The columns whose logits transformers asks for: the last so many, all of them (0), or those of an index."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep

    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)


def create_hrm_model_and_tokenizer(
    d_model: int = 256,
    n_heads: int = 4,
    max_cycles: int = 4,
    n_planner_layers: int = 4,
    n_worker_layers: int = 6,
    thought_dim: int = 256,
    tokenizer: Any = None,
    **settings: Any,
) -> tuple[EnhancedHRMForCausalLM, Any]:
    """A new model (float32, random weights) and its tokenizer.

    Args:
        d_model, n_heads, max_cycles, n_planner_layers, n_worker_layers, thought_dim: as in `EnhancedHRMConfig`.
        tokenizer: a hub name, a folder, None for the embedded one, or a tokenizer that already holds the reasoning
            tokens.
        settings: further fields of `EnhancedHRMConfig`.

    Raises:
        ValueError: no such tokenizer, one without reasoning tokens, settings out of range.
    """
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = reasoning_tokenizer(tokenizer)
    check_reasoning_tokenizer(tokenizer)

    # The model keeps the tokenizer's special tokens: `generate` stops and pads by them.
    config = EnhancedHRMConfig(
        vocab_size=len(tokenizer),
        d_model=d_model,
        n_heads=n_heads,
        max_cycles=max_cycles,
        n_planner_layers=n_planner_layers,
        n_worker_layers=n_worker_layers,
        thought_dim=thought_dim,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **settings,
    )
    check_model(lambda: EnhancedHRMForCausalLM(config))
    return EnhancedHRMForCausalLM(config), tokenizer


AutoConfig.register(EnhancedHRMConfig.model_type, EnhancedHRMConfig, exist_ok=True)
AutoModelForCausalLM.register(EnhancedHRMConfig, EnhancedHRMForCausalLM, exist_ok=True)
