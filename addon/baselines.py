"""What HRM is compared with, on the same frozen LLM: LoRA, prompt tuning, and the LLM as it is.

`BaselineController` trains and answers as `model.AdapterController` says. Its adapters are peft's:

    lora    LoRA (arXiv 2106.09685) on every linear map of every decoder layer, rank `lora_rank`, alpha twice that
    prompt  prompt tuning (arXiv 2104.08691): `virtual_tokens` learned embeddings before every prompt, which start as
            those of random tokens
    none    the bare LLM; nothing trains

LoRA starts as the bare LLM. Prompt tuning cannot, because every token attends to what stands before it. Both run the
LLM forward and backward in every step, so none of its states can be cached. The single pass, `mlp`, is an
`HRMController` with another core (`hrm_blocks.SinglePassCore`).
Shapes: B batch, N tokens, S prompt tokens, T target tokens, D LLM width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from batching import Batch
from engine.batches import IGNORE, all_correct
from engine.past_tokens import cached_tokens, position_arguments, run_decoder
from engine.placement import ONE_DEVICE, SpreadConfig
from engine.positions import token_positions
from host import (
    HostError,
    add_lora,
    freeze,
    host_logits,
    load_host,
    lora_layers,
)
from model import AdapterConfig, AdapterController, ControllerOutput, causal_loss


class BaselineConfig(AdapterConfig):
    """Which baseline; each setting is named after the flag of `train.py` that sets it.

    Attributes:
        adapter: "lora", "prompt" or "none".
        lora_rank: rank of LoRA, at least 1.
        virtual_tokens: learned embeddings of prompt tuning, at least 1.
    """

    model_type = "hrm_baseline"

    adapter: str = "none"
    lora_rank: int = 8
    virtual_tokens: int = 20


class BaselineController(AdapterController):
    """A frozen LLM with LoRA, with virtual tokens, or as it is."""

    config_class = BaselineConfig
    base_model_prefix = "host"
    addon_prefix = "prompt."
    recurrent = False

    def __init__(self, config: BaselineConfig, host: PreTrainedModel):
        super().__init__(config)
        self.host = host
        self.generation_config = copy.deepcopy(host.generation_config)
        self.prompt: nn.Module | None = None
        self.post_init()
        freeze(host)
        if config.adapter == "lora":
            # Beside the modules: its parameters are the host's, and would be counted twice.
            lora = add_lora(host, len(lora_layers(host)), config.lora_rank, config.base_model_name)
            self.__dict__["peft_lora"] = lora
        elif config.adapter == "prompt":
            self.prompt = prompt_embedding(host, config.virtual_tokens)

    @classmethod
    def from_base(cls, name: str, load_in: str = "none", trust_remote_code: bool = False, device: str = "cpu",
                  host_dtype: str = "stored", revision: str | None = None, attn_implementation: str | None = None,
                  spread: SpreadConfig = ONE_DEVICE, **settings: Any) -> BaselineController:
        """A new baseline on the causal LM `name` (hub name or folder). Raises HostError as `host.load_host`."""
        host = load_host(name, load_in, trust_remote_code, device, host_dtype, revision, attn_implementation, spread)
        controller = cls(BaselineConfig(base_config=host.config, base_model_name=name, **settings), host)
        if controller.prompt is not None and not spread.is_sharded:
            controller.prompt.to(device)
        if controller.config.adapter == "lora" and load_in == "none" and spread.is_whole:
            host.to(device)
        return controller

    # --- what every adapter says of itself ---

    @property
    def virtual_tokens(self) -> int:
        """Positions that the adapter takes before the prompt."""
        return self.config.virtual_tokens if self.prompt is not None else 0

    @property
    def title(self) -> str:
        if self.config.adapter == "lora":
            return f"LoRA rank {self.config.lora_rank}"
        return "no adapter" if self.prompt is None else f"{self.virtual_tokens} virtual tokens"

    def parts(self) -> dict[str, nn.Module]:
        """Name -> module of what trains, for counting."""
        if self.config.adapter == "lora":
            return {"lora": self.host}
        return {} if self.prompt is None else {"prompt": self.prompt}

    def shape(self) -> dict[str, Any]:
        """What of an adapter document says how to build this baseline anew."""
        return {"baseline": self.config.settings()}

    def peft_model(self) -> Any:
        """LLM and adapter as peft's own model (PeftModel), with the weights of now; None where there is no adapter."""
        if self.prompt is None:
            return self.__dict__.get("peft_lora")

        # Made when it is asked for: in training, virtual tokens are read at other positions than peft's.
        with torch.random.fork_rng(devices=[]):
            return peft_prompt_model(self.host, self.prompt, self.config)

    # --- running the host ---

    def run_host(self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, use_cache: bool = False
                 ) -> tuple[Tensor, Any]:
        """(last hidden states (B, N, D) of the ids alone, cache), virtual tokens in front where the cache is empty.

        `attention_mask` (B, past + N) does not count virtual tokens. Positions come from the mask, as HRM's do, so that
        padding changes nothing; peft's own prompt tuning lets the host count pads.
        """
        past = cached_tokens(cache)
        mask = attention_mask
        order = None
        if self.prompt is not None:
            order = columns_behind_pads(mask, self.virtual_tokens)
            mask = torch.cat([mask.new_ones(len(mask), self.virtual_tokens), mask], dim=1).gather(1, order)
        decoder = self.host.base_model
        arguments = {"attention_mask": mask, "use_cache": use_cache}
        arguments |= position_arguments(decoder, token_positions(mask)[:, past:])

        # With an empty cache the virtual tokens are read first; later calls find them in the cache.
        if self.prompt is not None and not past:
            embedded = self.embed(input_ids)
            virtual = self.prompt(torch.arange(self.virtual_tokens, device=embedded.device)).to(embedded.dtype)
            virtual = virtual.expand(len(embedded), -1, -1)
            joined = torch.cat([virtual, embedded], dim=1)
            arguments["inputs_embeds"] = joined.gather(1, order[..., None].expand_as(joined))
        else:
            arguments["input_ids"] = input_ids

        with self._precision(input_ids.device.type):
            out, cache = run_decoder(decoder, cache, **arguments)
        return out.last_hidden_state[:, -input_ids.shape[1] :], cache

    def _precision(self, device: str) -> contextlib.AbstractContextManager:
        """Autocast as it is for what trains; the bare LLM runs in its own dtype."""
        if self.config.adapter == "none":
            return torch.autocast(device, enabled=False)
        return contextlib.nullcontext()

    # --- training ---

    def encode(self, batch: Batch) -> Batch:
        """The batch as it is: LoRA and prompt tuning run inside the LLM, so there is nothing to precompute."""
        return batch

    def segment(self, states: Batch, labels: Tensor, carry: None = None, denominator: float | None = None,
                earlier: int = 0) -> ControllerOutput:
        """As `AdapterController.segment`, without a carry. Columns S - 1 to S + T - 2 predict the T target tokens."""
        last, _ = self.run_host(states.input_ids[:, :-1], states.attention_mask[:, :-1])
        labelled = labels != IGNORE
        logits = host_logits(self.host, last[:, -labels.shape[1] :][labelled])
        target = labels[labelled]
        loss = F.cross_entropy(logits, target, reduction="sum") / (denominator or max(len(target), 1))
        return ControllerOutput(loss=loss, logits=logits, metrics={"correct": all_correct(logits, labels)})

    # --- the causal LM ---

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        segments_log: list[Tensor] | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> ControllerOutput:
        """A causal LM: logits (B, N or logits_to_keep, V), and with `labels` (B, N) their mean loss.

        `segments_log` is accepted and left as it is, because there are no segments; `position_ids` are accepted and
        ignored, because positions come from the mask.
        """
        if attention_mask is None:
            past = max(cached_tokens(past_key_values) - self.virtual_tokens, 0)
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        last, cache = self.run_host(input_ids, attention_mask, past_key_values, bool(use_cache))
        logits = host_logits(self.host, last[:, -logits_to_keep:] if labels is None else last)
        loss = None if labels is None else causal_loss(logits, labels)
        return ControllerOutput(loss=loss, logits=logits, past_key_values=cache)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Raises ValueError for a static cache, whose tokens cannot be counted."""
        if isinstance(kwargs.get("past_key_values"), StaticCache):
            raise ValueError("static caches are refused: virtual tokens are counted by the cache's length")
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


def columns_behind_pads(mask: Tensor, virtual: int) -> Tensor:
    """(B, virtual + N) columns of virtual tokens and tokens joined, in the order in which the LLM reads them.

    Virtual tokens stand behind the pads on a row's left: between them and the prompt, pads would wear away the state of
    a recurrent LLM. `mask` is (B, N).
    """
    places = torch.arange(virtual + mask.shape[1], device=mask.device).expand(len(mask), -1)
    pads = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    behind_pads = torch.where(places < pads + virtual, places - pads, places)
    return torch.where(places < pads, places + virtual, behind_pads)


def prompt_config(host: PreTrainedModel, tokens: int, **settings: Any) -> Any:
    """peft's PromptTuningConfig of `tokens` virtual tokens for this host. Raises HostError where peft is missing."""
    try:  # one who loads an exported add-on of another kind needs no peft
        from peft import PromptTuningConfig
    except ImportError as error:
        raise HostError("prompt tuning needs the package peft: install it (pip install peft)") from error

    # Sizes that peft would look for in the config, under names that not every family has.
    text = host.config.get_text_config()
    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, token_dim=host.get_input_embeddings().weight.shape[-1],
        num_transformer_submodules=1, prompt_tuning_init="SAMPLE_VOCAB", num_layers=text.num_hidden_layers,
        num_attention_heads=getattr(text, "num_attention_heads", None) or 1, **settings,
    )


def prompt_embedding(host: PreTrainedModel, tokens: int) -> nn.Module:
    """peft's table of `tokens` virtual tokens in float32, which starts as the embeddings of random tokens."""
    config = prompt_config(host, tokens)
    from peft import PromptEmbedding

    return PromptEmbedding(config, host.get_input_embeddings()).requires_grad_(True)


def peft_prompt_model(host: PreTrainedModel, prompt: nn.Module, config: BaselineConfig) -> Any:
    """The host as peft's own model (PeftModel) whose virtual tokens are those of `prompt`."""
    name = config.base_model_name
    peft_config = prompt_config(host, config.virtual_tokens, base_model_name_or_path=name, inference_mode=True)
    from peft import PeftModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a name that transformers will drop
        model = PeftModelForCausalLM(host, peft_config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt.embedding.weight)
    return model
