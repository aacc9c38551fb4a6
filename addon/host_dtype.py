"""How the frozen LLM is held and computed: chosen for the machine, recorded with what is trained on it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.hardware import multiplies_bf16
from engine.memory import free_memory
from host import DTYPES, HostConfig, load_config

MOST_OF_MEMORY = 0.8  # share of the free memory that weights held in float32 may take


def meta_host(host: HostConfig) -> Any:
    """The LLM without its weights. Raises HostError as `load_config`."""
    from transformers import AutoModelForCausalLM

    config = load_config(host.model_name, host.trust_remote_code, host.revision, needs_weights=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=host.trust_remote_code)
    return model.requires_grad_(False)


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name that `--host_dtype` has for a dtype; "stored" where it has none."""
    return next((name for name, known in DTYPES.items() if known == dtype), "stored")


def pick_dtype(host: HostConfig, device: str) -> tuple[str, str]:
    """What the LLM's weights are held in, as `load_host` takes it, and a line for the user, "" where there is no need.

    `auto` is the dtype that they are saved in where `device` multiplies it natively. Elsewhere it is float32, which is
    the same LLM computed several times as fast, if that fits the memory. Raises HostError as `load_config`.
    """
    if host.host_dtype != "auto":
        return host.host_dtype, ""
    if host.load_in != "none":
        return "stored", ""

    # Most LLMs whose config does not tell are saved in 16 bits.
    config = load_config(host.model_name, host.trust_remote_code, host.revision)
    stored = config.dtype or config.get_text_config().dtype or torch.bfloat16
    slow = {torch.bfloat16: not multiplies_bf16(device), torch.float16: device == "cpu"}
    if device == "mps" or not slow.get(stored, False):
        return dtype_name(config.dtype), ""

    # Known before any weight is read, or downloaded.
    needed = 4 * sum(parameter.numel() for parameter in meta_host(host).parameters())
    free = free_memory(device)
    name = dtype_name(stored)
    if needed > MOST_OF_MEMORY * free:
        return dtype_name(config.dtype), (
            f"WARNING: {host.model_name} stays in {name}, which this {device} multiplies several times more slowly "
            f"than fp32: in fp32 it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )
    return "fp32", (
        f"{host.model_name} is held in fp32 ({needed / 1e9:.2f} GB, twice its size on disk): this {device} multiplies "
        f"{name} several times more slowly"
    )


def host_dtype(host: PreTrainedModel) -> str:
    """What the weights of a base model are held in, as `--host_dtype` names it; stored where they are quantised."""
    if getattr(host, "is_quantized", False):
        return "stored"
    return dtype_name(host.get_output_embeddings().weight.dtype)


def load_in(host: PreTrainedModel) -> str:
    """How `--load_in` names what was done to the weights while loading; none where they are held as they are saved."""
    quantizer = getattr(host, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return "none"
    config = quantizer.quantization_config
    for name in ("4bit", "8bit"):
        if getattr(config, f"load_in_{name}", False):
            return name
    return "none"


def attention_of(host: PreTrainedModel) -> str | None:
    """How `--attn_implementation` names a base model's attention; None where it is not known.

    Of an LLM that is not in memory, what was noted when it was.
    """
    noted = getattr(host, "attention_noted", None)
    return noted or getattr(host.config, "_attn_implementation", None)


def host_parameters(host: PreTrainedModel) -> int:
    """Parameters of the LLM without what an adapter put into it; packed weights count as many as they stand for.

    Of an LLM that is not in memory, the number that was noted when it was.
    """
    noted = getattr(host, "parameters_noted", None)
    if noted is not None:
        return noted
    spread = any(parameter.is_meta for parameter in host.parameters())
    if not spread and not getattr(host, "is_quantized", False):
        return sum(parameter.numel() for parameter in host.parameters() if not parameter.requires_grad)

    # A packed tensor holds several weights in a byte, each method in its own way, and of a spread LLM stand-ins of tied
    # weights count twice: the config tells the shapes.
    with torch.device("meta"):
        whole = type(host)(plain_config(host))
    return sum(parameter.numel() for parameter in whole.parameters())


def plain_config(host: PreTrainedModel) -> Any:
    """A copy of a host's config that says nothing of quantisation."""
    config = copy.deepcopy(host.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
