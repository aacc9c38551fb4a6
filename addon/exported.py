"""An add-on and its LLM as a causal LM of its own: the classes that a folder of `scripts/export_model.py` is loaded by.

The script writes these classes, with all that they need of this project, into one file of that folder. Whoever loads
the folder by `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs nothing else of this project.
"""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from addon.baselines import BaselineConfig, BaselineController
from engine.placement import device_of, quantisation
from host import DTYPES, freeze, host_fingerprint
from model import AdapterController, HRMAddonConfig, HRMController

ADDON_WEIGHTS = "model.safetensors"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class HRMForCausalLMConfig(HRMAddonConfig):
    """Shape of the add-on, and the LLM that it was trained on.

    Attributes:
        host_in_folder: the LLM's weights lie in the folder; else it is loaded by `base_model_name`.
        base_revision: commit of the LLM on the hub; None for a folder.
        base_fingerprint: family, sizes and a digest of the LLM's head, see `host.host_fingerprint`.
        load_in: the LLM is packed while it loads: none, 8bit or 4bit.
        host_dtype: of the LLM's weights: bf16, fp32, fp16 or stored (as they are saved).
        host_attention: how the LLM computed attention in training, a name of transformers'; None = not known.
        frame: prefix, suffix and kind of the text around a question; `end` is the id that ends an answer.
    """

    model_type = "hrm_for_causal_lm"

    host_in_folder: bool = False
    base_revision: str | None = None
    base_fingerprint: dict | None = None
    load_in: str = "none"
    host_dtype: str = "stored"
    host_attention: str | None = None
    frame: dict | None = None


class PromptForCausalLMConfig(BaselineConfig):
    """Virtual tokens, and the LLM that they were trained on; attributes as those of `HRMForCausalLMConfig`."""

    model_type = "prompt_for_causal_lm"

    host_in_folder: bool = False
    base_revision: str | None = None
    base_fingerprint: dict | None = None
    load_in: str = "none"
    host_dtype: str = "stored"
    host_attention: str | None = None
    frame: dict | None = None


class HRMForCausalLM(HRMController):
    """A frozen LLM with HRM, or with HRM's blocks in a single pass, from an exported folder."""

    config_class = HRMForCausalLMConfig

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; an LLM that lies elsewhere is loaded as it was in training.

        Raises:
            ValueError: that LLM is another one today.
        """
        config = kwargs.get("config") or cls.config_class.from_pretrained(name, **hub_arguments(kwargs))
        if config.host_in_folder:
            return super().from_pretrained(name, *args, **attention_arguments(config) | kwargs)
        return on_named_host(cls, name, config, kwargs)


class VirtualTokens(nn.Module):
    """A table of `tokens` virtual tokens, (tokens, width), in float32."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)

    def forward(self, index: Tensor) -> Tensor:
        """(N, width) of the tokens that `index` (N,) names."""
        return self.embedding(index)


class PromptForCausalLM(BaselineController):
    """A frozen LLM with virtual tokens before every prompt, from an exported folder."""

    config_class = PromptForCausalLMConfig
    _keep_in_fp32_modules_strict = {"prompt"}

    def __init__(self, config: PromptForCausalLMConfig, host: PreTrainedModel | None = None):
        AdapterController.__init__(self, config)
        self.host = host if host is not None else AutoModelForCausalLM.from_config(config.base_config)
        self.prompt = VirtualTokens(config.virtual_tokens, self.host.get_input_embeddings().weight.shape[-1])
        self.post_init()
        freeze(self.host)

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Any:
        """As `HRMForCausalLM.from_pretrained`."""
        config = kwargs.get("config") or cls.config_class.from_pretrained(name, **hub_arguments(kwargs))
        if config.host_in_folder:
            return super().from_pretrained(name, *args, **attention_arguments(config) | kwargs)
        return on_named_host(cls, name, config, kwargs)


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where a file is found."""
    return {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}


def attention_arguments(config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the attention of the training, where transformers may choose another.

    sdpa is its own choice wherever it can. Any other than eager needs a package, which not every machine has.
    """
    asked = config._attn_implementation  # where transformers puts what the caller asks for
    name = asked or ("eager" if config.host_attention == "eager" else None)
    return {"attn_implementation": name} if name else {}


def on_named_host(kind: type, name: str, config: Any, kwargs: dict[str, Any]) -> Any:
    """A model of class `kind` whose LLM is loaded by its name, and whose own weights lie in the folder `name`.

    `kwargs` are those of `from_pretrained`: dtype, device_map, attn_implementation and the like go to the LLM.

    Raises:
        ValueError: the LLM is another one than in training; weights that do not fit.
    """
    where = hub_arguments(kwargs)
    skipped = (*HUB_ARGUMENTS, "config", "output_loading_info", "adapter_kwargs", "trust_remote_code", "_from_auto")
    given = {key: value for key, value in kwargs.items() if key not in skipped}
    dtype = given.pop("dtype", None) or given.pop("torch_dtype", None) or "auto"
    if dtype == "auto":
        dtype = DTYPES.get(config.host_dtype, "auto")
    given = quantisation(config.load_in, "cuda" if torch.cuda.is_available() else "cpu") | given
    given = attention_arguments(config) | given
    host = AutoModelForCausalLM.from_pretrained(
        config.base_model_name, revision=config.base_revision or "main", dtype=dtype, **given
    )
    check_same_host(host, config)

    # What the folder holds is float32, whatever the LLM is held in.
    model = kind(config, host)
    path = cached_file(name, ADDON_WEIGHTS, **where)
    model.load_addon_state(safetensors.torch.load_file(path))
    for part in model.parts().values():
        part.to(device_of(host))
    model.generation_config = GenerationConfig.from_pretrained(name, **where)
    return model.eval()


def check_same_host(host: PreTrainedModel, config: Any) -> None:
    """Raises ValueError naming how an LLM differs from the one that the add-on was trained on.

    Weights held in another dtype than in training have another digest, which then tells nothing.
    """
    ours = host_fingerprint(host)
    theirs = dict(config.base_fingerprint or {})
    if config.load_in == "none" and DTYPES.get(config.host_dtype, host.dtype) != host.dtype:
        theirs.pop("head_digest", None)
    for key, value in theirs.items():
        if ours.get(key) != value:
            raise ValueError(
                f"the add-on was trained on another {config.base_model_name}: its {key} was {value}, today it is "
                f"{ours.get(key)}; give the LLM of its training"
            )
