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
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel

from engine.batches import IGNORE
from enhanced.config import CycleMeter, EnhancedBackboneOutput, EnhancedHRMConfig, EnhancedOutput
from enhanced.layers import CausalLayer, Chosen, Cycle, GateHead, Slots, ThoughtHead, causal_mask, usable_cache
from enhanced.tokenizer import check_reasoning_tokenizer, reasoning_tokenizer
from hrm_blocks import rms_norm, rope


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

    def adaptive(self, asked: bool | None) -> bool:
        """Whether the gate stops tokens: as asked, else never in training mode, else as the config says."""
        return asked if asked is not None else self.config.adaptive_cycles and not self.training

    @contextlib.contextmanager
    def all_cycles(self) -> Iterator[None]:
        """Inside, every token runs every cycle, in evaluation mode too: GRPO compares log-probabilities there."""
        before, self.config.adaptive_cycles = self.config.adaptive_cycles, False
        try:
            yield
        finally:
            self.config.adaptive_cycles = before


class EnhancedHRMModel(EnhancedHRMPreTrainedModel):
    """Embedding, planner, worker and gate: everything before the output embedding, as TRL expects of `base_model`."""

    def __init__(self, config: EnhancedHRMConfig):
        super().__init__(config)
        d, planners = config.d_model, config.n_planner_layers
        indices = range(planners + config.n_worker_layers)
        layers = [CausalLayer(d, config.n_heads, config.mlp_hidden, index) for index in indices]
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        nn.init.trunc_normal_(self.embed_tokens.weight, std=d**-0.5, a=-2 * d**-0.5, b=2 * d**-0.5)
        self.planner, self.worker = nn.ModuleList(layers[:planners]), nn.ModuleList(layers[planners:])
        self.cycle_embedding = nn.Parameter(torch.randn(config.max_cycles, d))
        self.skip = nn.Parameter(torch.full((d,), 0.5))
        self.gate = GateHead(d)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def _run(self, layers: nn.ModuleList, x: Tensor, cycle: Cycle) -> Tensor:
        # A layer that writes slots cannot be run a second time in the backward pass.
        again = self.gradient_checkpointing and self.training and cycle.slots.cache is None and not cycle.slots.carry
        for layer in layers:
            x = self._gradient_checkpointing_func(layer.__call__, x, cycle) if again else layer(x, cycle)
        return x

    def step(self, plan: Tensor, work: Tensor, before: Tensor, x: Tensor, cycle: Cycle) -> tuple[Tensor, Tensor]:
        """One cycle: (plan, work), each (R, A, d); `before` is the worker's state one cycle before `work`."""
        x = x + self.cycle_embedding[min(cycle.index, len(self.cycle_embedding) - 1)]
        plan = self._run(self.planner, rms_norm(plan + work + x), cycle)
        return plan, self._run(self.worker, rms_norm(work + plan + x + self.skip * before), cycle)

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
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        layers = self.config.n_planner_layers + self.config.n_worker_layers
        cache = usable_cache(past_key_values, cycles * layers)
        adaptive = self.adaptive(adaptive_cycles)
        first, readable = self._first_cycle(input_ids, attention_mask, Slots(layers, cache, carry=adaptive))
        x = self.embed_tokens(input_ids) * self.config.d_model**0.5
        plan = work = before = torch.zeros_like(x)
        active, used, states = torch.ones_like(readable), torch.zeros_like(input_ids), []
        for index in range(cycles):
            chosen = None
            if adaptive and not bool(active.all()):
                if not bool(active.any()):
                    first.slots.repeat(index)
                    continue
                chosen = Chosen.of(active)
            used = used + active
            parts = [plan, work, before, x] if chosen is None else [chosen.take(t) for t in (plan, work, before, x)]
            new_plan, new_work = self.step(*parts, first.of(index, chosen))
            if adaptive and index < cycles - 1:
                going = ~self.stops(new_work)
                active = readable & (going if chosen is None else chosen.put(torch.zeros_like(active), going))
            before = work
            plan = new_plan if chosen is None else chosen.put(plan, new_plan)
            work = new_work if chosen is None else chosen.put(work, new_work)
            if every_state:
                states.append(work)
        return EnhancedBackboneOutput(work, past_key_values, used * readable, tuple(states) if every_state else None)

    def _first_cycle(self, input_ids: Tensor, attention_mask: Tensor | None, slots: Slots) -> tuple[Cycle, Tensor]:
        """(cycle 0 of all tokens, which tokens (B, T) are no padding)."""
        tokens = input_ids.shape[1]
        length = tokens + (slots.cache.get_seq_length() if slots.cache is not None else 0)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), length)
        if attention_mask.shape != (len(input_ids), length):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be (B, past + tokens) = {(len(input_ids), length)}, got {shape}")
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens:]
        cos, sin = rope(positions, self.config.d_model // self.config.n_heads, self.config.rope_theta)
        return Cycle(0, cos, sin, causal_mask(attention_mask, tokens), slots), attention_mask[:, -tokens:].bool()


class EnhancedHRMForCausalLM(EnhancedHRMPreTrainedModel, GenerationMixin):
    """The planner/worker causal LM with its token head and its thought head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EnhancedHRMConfig):
        super().__init__(config)
        self.model = EnhancedHRMModel(config)
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
        shares = dict.fromkeys(("embedding", "planner", "worker", "head", "heads", "cycles"), 0)
        owner = {"embed_tokens": "embedding", "planner": "planner", "worker": "worker", "gate": "heads"}
        for name, parameter in self.named_parameters():
            part = name.removeprefix("model.").split(".")[0]
            part = {"lm_head": "head", "thought_head": "heads"}.get(part) or owner.get(part, "cycles")
            shares[part] += parameter.numel() * parameter.requires_grad
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
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of every position: leave logits_to_keep out, or the labels")
        if labels is not None:
            use_cache = False
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.lm_head(state[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else kept])
        loss = metrics = None
        if labels is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            loss, metrics = self._losses(out, logits, labels, mask, num_items_in_batch)
        return EnhancedOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            thoughts=self.thought_head(state),
            cycles_used=out.cycles_used,
            metrics=metrics,
        )

    def _losses(
        self, out: EnhancedBackboneOutput, logits: Tensor, labels: Tensor, mask: Tensor, items: Tensor | int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted sum, its unweighted parts): tokens, cycle consistency, thoughts, gate, early exits."""
        scored = (labels[:, 1:] != IGNORE) & mask[:, :-1].bool()  # a left pad does not guess the first token
        target = labels[:, 1:][scored]
        chosen = logits[:, :-1][scored].float()
        summed = F.cross_entropy(chosen, target, reduction="sum")
        count = len(target) if items is None else items
        share = len(target) / count if items is not None else 1.0  # of the auxiliary means, across accumulated calls
        token = summed / (count if items is not None else max(count, 1))
        thought = self.thought_head.losses(out.last_hidden_state, mask)
        gate, early = self._gate_losses(out, logits, labels, mask.bool(), scored)
        cycle = self._cycle_loss(out.worker_states, mask)
        config = self.config
        thought_loss = thought["next"] + config.variance_weight * thought["variance"]
        thought_loss = thought_loss + config.covariance_weight * thought["covariance"]
        auxiliary = config.cycle_weight * cycle + config.thought_weight * thought_loss
        auxiliary = auxiliary + config.gate_weight * gate + config.exit_weight * early
        used = out.cycles_used[mask.bool()].float()
        metrics = {
            "loss_token": token,
            "loss_cycle": cycle,
            **{f"loss_thought_{name}": thought[name] for name in ("next", "variance", "covariance")},
            "loss_gate": gate,
            "loss_exit": early,
            "thought_spread": thought["spread"],
            "thought_mean_error": thought["mean_error"],
            "cycles_used": used.mean() if len(used) else used.sum(),
        }
        return token + share * auxiliary, {name: value.detach() for name, value in metrics.items()}

    def _cycle_loss(self, states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """Mean squared change of the worker's state from cycle to cycle.

        Each state is pulled towards the next and never the next towards it, which idle cycles would satisfy.
        """
        readable = mask.bool()
        steps = [F.mse_loss(a[readable], b[readable].detach()) for a, b in zip(states, states[1:], strict=False)]
        return torch.stack(steps).mean() if steps and bool(readable.any()) else states[0].sum() * 0.0

    def _gate_losses(
        self, out: EnhancedBackboneOutput, logits: Tensor, labels: Tensor, readable: Tensor, scored: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(gate's error on readable tokens, cross-entropy of early exits on scored ones).

        While training, at most `exit_sample` tokens are drawn, and the gate learns from the logits at hand and from
        those of one earlier cycle, drawn at random, which are trained too: a token that stops there is answered there.
        """
        gate, states, places = self.model.gate, out.worker_states, readable.nonzero()
        if self.training:
            places = places[torch.randperm(len(places), device=places.device)[: self.config.exit_sample]]
        rows, columns = places.unbind(dim=1)
        error = gate.loss(out.last_hidden_state[rows, columns], logits[rows, columns])
        if not self.training or len(states) < 2:
            return error, logits.sum() * 0.0
        state = states[int(torch.randint(len(states) - 1, ()))][rows, columns]
        early = self.lm_head(state).float()
        known = F.pad(scored, (0, 1))[rows, columns]
        target = labels.roll(-1, dims=1)[rows, columns][known]
        exits = F.cross_entropy(early[known], target, reduction="sum") / max(len(target), 1)
        return (error + gate.loss(state, early)) / 2, exits

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers'; without a mask, one of ones as long as all tokens so far."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = torch.ones_like(input_ids)
        return inputs


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

    `tokenizer` is a hub name, a folder, None for the embedded one, or a tokenizer that already holds the reasoning
    tokens; `settings` are further fields of `EnhancedHRMConfig`.

    Raises:
        ValueError: no such tokenizer, one without reasoning tokens, settings out of range.
    """
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = reasoning_tokenizer(tokenizer)
    check_reasoning_tokenizer(tokenizer)
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
    return EnhancedHRMForCausalLM(config), tokenizer


AutoConfig.register(EnhancedHRMConfig.model_type, EnhancedHRMConfig, exist_ok=True)
AutoModelForCausalLM.register(EnhancedHRMConfig, EnhancedHRMForCausalLM, exist_ok=True)
