"""`HRMController`: a frozen causal LM with an HRM add-on, and `build_model`.

Data flow (B batch, S prompt tokens, T target tokens, D LLM width, d HRM width, V vocabulary):

    states = controller.encode(batch)           the frozen LLM, no grad, once per batch
    out = controller(states=states, carry=...)  one segment: x = norm(proj(features)), L x inner_T, H, inject, LM head
    controller.generate(ids, mask)              prefill, segments once on the prompt, cached decoding with z_H kept

z_H reads the whole prompt in both directions, so it may touch only positions from the last prompt token on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, StaticCache
from transformers.utils import ModelOutput

from backbone import HostStates, HRMAddonConfig, HRMBackbone
from batching import Batch
from engine.batches import IGNORE
from engine.checkpoints import read_checkpoint
from engine.optimization import check_fit
from host import add_lora, freeze, host_logits, load_host, without_lora
from hrm_blocks import Carry, all_correct, last_state, token_positions
from injector import Slots, Thought

ADDON_PREFIX = "model.addon."


def is_addon_parameter(name: str) -> bool:
    """The one predicate that freezing, the optimizer, counting and saving ask."""
    return name.startswith(ADDON_PREFIX) or "lora_" in name


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


class HRMController(PreTrainedModel, GenerationMixin):
    """The causal LM that users hold: trains by `encode` and `forward(states=...)`, answers by `generate`."""

    config_class = HRMAddonConfig
    base_model_prefix = "model"
    virtual_tokens = 0  # positions that the adapter takes before the prompt
    _supports_sdpa = True
    _supports_flash_attn = True
    _supported_generation_modes = ["greedy_search", "sample", "beam_search", "beam_sample"]  # others guess
    _keep_in_fp32_modules_strict = {"addon", "lora_A", "lora_B"}

    def __init__(self, config: HRMAddonConfig, host: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = HRMBackbone(config, host)
        self.generation_config = copy.deepcopy(self.model.host.generation_config)
        self.post_init()
        freeze(self.model.host)
        if config.lora_layers:
            add_lora(self.model.host, config.lora_layers, config.lora_rank)
        self._set_trainable()

    def _set_trainable(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_addon_parameter(name))
        self.model.addon.core.halt.requires_grad_(self.config.use_act)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; then freezes again, because what is frozen is not saved."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._set_trainable()
        return loaded

    @classmethod
    def from_base(cls, name: str, load_in: str = "none", trust_remote_code: bool = False, device: str = "cpu",
                  **settings: Any) -> HRMController:
        """A new add-on on the causal LM `name` (hub name or folder). Raises HostError as `host.load_host`."""
        host = load_host(name, load_in, trust_remote_code, device)
        config = HRMAddonConfig(base_config=copy.deepcopy(host.config), base_model_name=name, **settings)
        controller = cls(config, host)
        controller.model.addon.to(device)
        return controller

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do, as for the backbone."""

    @property
    def host(self) -> PreTrainedModel:
        """The frozen LLM; with `lora_layers` its top layers carry LoRA."""
        return self.model.host

    def get_input_embeddings(self) -> nn.Module:
        return self.host.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.host.get_output_embeddings()

    @contextlib.contextmanager
    def bare(self) -> Iterator[PreTrainedModel]:
        """The bare LLM, LoRA switched off inside."""
        with without_lora(self.host):
            yield self.host

    def addon_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that trains."""
        return {name: p for name, p in self.named_parameters() if is_addon_parameter(name) and p.requires_grad}

    def addon_state(self) -> dict[str, Tensor]:
        """Name -> tensor of everything a checkpoint keeps: the add-on with its buffers and LoRA, nothing of the LLM."""
        return {name: tensor for name, tensor in self.state_dict().items() if is_addon_parameter(name)}

    def load_addon_state(self, state: dict[str, Tensor]) -> None:
        """Restores `addon_state`. Raises ValueError naming the first difference in names or shapes."""
        check_fit(self.addon_state(), state)
        self.load_state_dict(state, strict=False)

    @property
    def recurrent(self) -> bool:
        """Whether there are segments to draw, supervise and count."""
        return self.config.adapter == "hrm"

    @property
    def title(self) -> str:
        return "HRM" if self.recurrent else "single pass"

    def parts(self) -> dict[str, nn.Module]:
        """Name -> module of what trains, for counting."""
        lora = {"lora": self.host} if self.config.lora_layers else {}
        return dict(self.model.addon.named_children()) | lora

    def shape(self) -> dict[str, Any]:
        """What of an adapter document says how to build this add-on anew."""
        names = [name for name in inspect.signature(HRMAddonConfig).parameters if name not in NOT_SHAPE]
        return {"peft_type": "HRM", "hrm": {name: getattr(self.config, name) for name in names}}

    # --- training ---

    def encode(self, batch: Batch) -> HostStates:
        """The frozen LLM over prompt and target, once: prompt features and the slots that predict the target.

        Without gradient, unless LoRA layers train. Columns S - 1 to S + T - 2 predict the T target tokens.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.lora_layers > 0):
            ids, mask = batch.input_ids[:, :-1], batch.attention_mask[:, :-1]
            positions = token_positions(mask)
            last, read, _ = self.model.run_host(ids, mask, positions)
            return self.host_states(batch, last, read)

    def host_states(self, batch: Batch, last: Tensor, read: list[Tensor]) -> HostStates:
        """What `encode` makes of the LLM's last hidden states and of what HRM reads, (B, S + T - 1, D) each."""
        length = batch.prompt_ids.shape[1]
        positions = token_positions(batch.attention_mask[:, :-1])
        features, context = self.model.prompt_features(
            [part[:, :length] for part in read], batch.prompt_mask.bool(), positions[:, :length]
        )
        embedded = self.host.get_input_embeddings()(batch.input_ids[:, length - 1 : -1])
        return HostStates(features, context, Slots(last[:, length - 1 :], embedded, positions[:, length - 1 :]))

    def segment(
        self, states: HostStates, labels: Tensor, carry: Carry | None, denominator: float | None
    ) -> ControllerOutput:
        """One segment of deep supervision: states, labels (B, T), carry in; loss, logits (N, V), carry out.

        The loss is cross-entropy summed over labelled tokens and divided by `denominator` (their number in the global
        batch; the local number when None). `metrics` holds per-example tensors: `correct` (B,) bool, every target token
        is the argmax; `halt_logits` and `verdict_logits` (B,) where those heads exist.
        """
        carry = self.model.advance(states.features, states.context, carry)
        thought = Thought(carry.z_high, states.context)
        hidden, bias = self.model.inject(states.slots, thought)
        labelled = labels != IGNORE
        logits = host_logits(self.host, hidden[labelled])
        if bias is not None:
            logits = logits + bias[labelled].float()
        target = labels[labelled]
        loss = F.cross_entropy(logits, target, reduction="sum") / (denominator or max(len(target), 1))
        metrics = {"correct": all_correct(logits, labels)}
        if self.config.use_act:
            read = carry.z_high.detach() if self.config.halt_detach else carry.z_high
            metrics["halt_logits"] = self.model.addon.core.halt_logits(read, states.context.mask)
        if self.model.addon.verifier is not None:
            state = last_state(carry.z_high, states.context.mask)
            metrics["verdict_logits"] = self.model.addon.verifier(state).squeeze(-1)
        return ControllerOutput(loss=loss, logits=logits, carry=carry, metrics=metrics)

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
        states: HostStates | None = None,
        carry: Carry | None = None,
        denominator: float | None = None,
        segments_log: list[Tensor] | None = None,  # out: segments used (B,) by each call that thinks
        position_ids: Tensor | None = None,  # accepted and ignored: positions come from the mask
        **_: Any,
    ) -> ControllerOutput:
        """With `states`: one training segment, see `segment`. Else an ordinary causal LM call.

        `prompt_mask` (B, N) marks what HRM may read; without it, it is made from `labels` (B, N): the attended tokens
        before a row's first label. With labels, logits cover only the columns from the first scored one on.

        Raises:
            ValueError: neither prompt mask nor labels nor thought.
        """
        if states is not None:
            return self.segment(states, labels, carry, denominator)
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
        )
        if segments_log is not None and out.segments_used is not None:
            segments_log.append(out.segments_used)
        logits = host_logits(self.host, out.last_hidden_state)
        if out.logit_bias is not None:
            logits = logits + out.logit_bias.float()
        loss = None
        if labels is not None:
            target = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), ignore_index=IGNORE)
        return ControllerOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            thought=out.thought,
            segments_used=out.segments_used,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, prompt_mask: Tensor | None = None,
                                      attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        """Sets the prompt mask on the first call: everything attended that was handed to `generate`.

        Raises:
            ValueError: a static cache, or one filled elsewhere, without the thought that belongs to it.
        """
        cache, thought = kwargs.get("past_key_values"), kwargs.get("thought")
        if isinstance(cache, StaticCache):
            raise ValueError("static caches are refused: HRM counts the cache's tokens; leave cache_implementation out")
        if kwargs.get("is_first_iteration") and thought is None and cache is not None and cache.get_seq_length():
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
        mask, thought = model_kwargs.get("prompt_mask"), outputs.thought
        if mask is None:
            mask = model_kwargs.get("attention_mask")
        if mask is None and thought is not None:  # `generate` drops a mask of ones: every row is prompt up to its start
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


# --- the add-on on disk -----------------------------------------------------------------------------------------------

ADAPTER = "adapter_model"
ADAPTER_CONFIG = "adapter_config.json"
PROMPT_FIELDS = ("prompt_style", "system_header", "sentinel", "max_seq_len")


def host_fingerprint(host: PreTrainedModel) -> dict[str, Any]:
    """What identifies a base model wherever it lies: family, sizes and a digest of some of its weights."""
    text, head = host.config.get_text_config(), host.get_output_embeddings().weight
    rows = head.detach()[:: max(len(head) // 64, 1)].float().cpu().numpy().tobytes()
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "head_digest": hashlib.sha256(rows).hexdigest()[:16],
    }


def adapter_document(controller: Any, opts: argparse.Namespace) -> str:
    """JSON text that lets an adapter be rebuilt: base model, its fingerprint, shape, prompt format."""
    document = {
        **controller.shape(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": controller.config.base_model_name,
        "base_fingerprint": host_fingerprint(controller.host),
        "prompt": {name: getattr(opts, name) for name in PROMPT_FIELDS},
    }
    return json.dumps(document, indent=2)


NOT_SHAPE = ("base_config", "base_model_name", "kwargs")


def adapter_of(document: dict[str, Any]) -> str:
    """The `--adapter` that an adapter document describes."""
    return next(document[key].get("adapter", "hrm") for key in ("hrm", "baseline") if key in document)


def check_adapter(controller: Any, document: dict[str, Any], folder: Path) -> None:
    """Raises ValueError when the checkpoint holds another kind of adapter."""
    found, ours = adapter_of(document), controller.config.adapter
    if found != ours:
        raise ValueError(f"{folder} holds an adapter of kind {found}, not {ours}: pass --adapter {found}")


def check_fingerprint(host: PreTrainedModel, document: dict[str, Any], folder: Path) -> None:
    """Raises ValueError naming how this base model differs from the one the checkpoint was trained on."""
    expected, found = document["base_fingerprint"], host_fingerprint(host)
    other = [f"{key} {found[key]} (checkpoint: {expected[key]})" for key in expected if found.get(key) != expected[key]]
    if other:
        raise ValueError(
            f"{folder} was trained on another base model, {document['base_model_name_or_path']}: this one has "
            f"{', '.join(other)}; pass --model_name {document['base_model_name_or_path']}"
        )


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter document, add-on tensors) of a verified checkpoint. Raises ValueError (CheckpointError)."""
    saved = read_checkpoint(folder, stems=[ADAPTER])
    return json.loads(saved.documents[ADAPTER_CONFIG]), saved.tensors[ADAPTER]


def load_adapter(
    folder: Path, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[HRMController, dict[str, Any]]:
    """The controller of a checkpoint with its weights for inference, in evaluation mode, and its adapter document.

    Raises:
        ValueError: a broken checkpoint, one of a baseline, or a base model that is missing or another one.
    """
    document, tensors = read_adapter(folder)
    if "hrm" not in document:
        raise ValueError(f"{folder} holds a {adapter_of(document)} baseline: load it with baselines.load_controller")
    controller = HRMController.from_base(
        document["base_model_name_or_path"], device=device, trust_remote_code=trust_remote_code, **document["hrm"]
    )
    check_fingerprint(controller.host, document, folder)
    controller.load_addon_state(tensors)
    return controller.eval(), document


def build_model(opts: argparse.Namespace, device: str) -> HRMController:
    """The HRM, or with `--adapter mlp` its single pass, that the options describe. Raises HostError."""
    names = [name for name in inspect.signature(HRMAddonConfig).parameters if hasattr(opts, name)]
    settings = {name: getattr(opts, name) for name in names} | {"verifier_head": opts.verifier_weight > 0}
    return HRMController.from_base(opts.model_name, opts.load_in, opts.trust_remote_code, device, **settings)


AutoConfig.register(HRMAddonConfig.model_type, HRMAddonConfig, exist_ok=True)
AutoModelForCausalLM.register(HRMAddonConfig, HRMController, exist_ok=True)
