"""The frozen LLM: how it is found, loaded, read and, on request, given LoRA layers.

Everything that depends on a host's family is here: logits (scaling, soft-capping), decoder layers, positions.
Shapes: B batch, N tokens, D LLM width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.frozen import keep_as_packed, keep_fast
from engine.gguf import SUFFIX, folder_of, no_place
from engine.past_tokens import UnfitError, check_cache
from engine.placement import ONE_DEVICE, SpreadConfig, device_of, keep_offloaded, quantisation, real_tensor, spreading
from text_data.tokenizer import read_whole

ROOT = Path(__file__).resolve().parent
DEFAULT_HOST = "assets/tiny_host"
MAMBA_MIXERS = ("falcon_h1", "mamba2", "nemotron_h")  # families with a mixer that peft adapts in part
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


class HostError(ValueError):
    """The base model cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class HostConfig:
    """Which LLM is frozen, and how it is loaded; each field is the flag of its name.

    model_name: a local folder, a GGUF file or a hub name.
    load_in: none, 8bit or 4bit.
    host_dtype: of its weights: stored (as they are saved), bf16, fp32, fp16 or auto (see addon/host_dtype.py).
    trust_remote_code: run Python code that comes with a hub model.
    revision: branch, tag or commit of a hub model; None = its main branch.
    attn_implementation: of its attention, a name of transformers'; None = transformers' choice.
    device_map, max_memory: how it is spread, see `engine.placement.SpreadConfig`.
    """

    model_name: str = DEFAULT_HOST
    load_in: str = "none"
    host_dtype: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    attn_implementation: str | None = None
    device_map: str = "none"
    max_memory: str | None = None


def resolve_name(name: str) -> str:
    """A local folder as an absolute path (tried from here, then from the repository), any other name as it is.

    A GGUF file is the folder that it is converted to. Raises ValueError as `engine.gguf.folder_of`.
    """
    for candidate in (Path(name), ROOT / name):
        if candidate.is_dir():
            return str(candidate.resolve())
        if candidate.suffix and candidate.is_file():
            return str(folder_of(candidate))
    return name


@functools.cache
def hub_unreachable() -> bool:
    """True when one quick request to the hub fails: the hub's library itself would retry, aloud, for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever kind: the hub did not answer
        return True
    return False


def _source(name: str, revision: str | None) -> dict:
    """Where transformers finds `name`: a folder, the hub, or, with the hub unreachable, what it once downloaded."""
    path = resolve_name(name)
    local = Path(path).is_dir()
    return {"pretrained_model_name_or_path": path, "local_files_only": not local and hub_unreachable(),
            "revision": revision or "main"}


def _one_line(error: Exception) -> str:
    """The beginning of a library's message, its line breaks taken out."""
    if type(error).__name__ == "UnpicklingError":  # torch says how to read it all the same
        return "its .bin file holds more than tensors, so it is not read: save it as safetensors where you trust it"
    return " ".join(str(error).split())[:200]


def _no_host(name: str, error: Exception) -> HostError:
    """The message for a name that is neither a folder nor on the hub."""
    if no_place(name):
        return HostError(f"--model_name {name}: {no_place(name)}")
    reason = type(error).__name__
    if str(error).strip():
        reason = str(error).strip().splitlines()[0][:160]
    return HostError(
        f"--model_name {name}: no such folder here, and the hub could not give it ({reason}): check the name and the "
        f"network, or use the local default {DEFAULT_HOST}"
    )


def weight_files(folder: str) -> list[Path]:
    """The files of a folder that hold an LLM's weights, or say which ones do."""
    return sorted(path for pattern in WEIGHT_PATTERNS for path in Path(folder).glob(pattern))


def load_config(name: str, trust_remote_code: bool = False, revision: str | None = None, needs_weights: bool = True):
    """The config of a base model without its weights, to refuse a bad name before anything heavy is loaded.

    Raises:
        HostError: no such model, hub unreachable, a folder without config, not a causal LM; with `needs_weights` a
            folder without weights.
    """
    from transformers import AutoConfig

    path = resolve_name(name)
    local = Path(path).is_dir()
    if local and needs_weights and not weight_files(path):
        packed = sorted(Path(path).glob(f"*{SUFFIX}"))
        advice = f"give the GGUF file itself, --model_name {packed[0]}" if packed else "give a saved model"
        raise HostError(f"--model_name {name}: the folder {path} holds no weights (*.safetensors): {advice}")

    try:
        config = AutoConfig.from_pretrained(**_source(name, revision), trust_remote_code=trust_remote_code)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a family's code raises at a file that it does not expect
        if "trust_remote_code=True" in str(error):
            raise HostError(
                f"--model_name {name}: it brings its own Python code, which runs only where that is typed: read it, "
                "then add --trust_remote_code"
            ) from error
        if not local:
            raise _no_host(name, error) from error
        raise HostError(
            f"--model_name {name}: {path} is no causal LM that transformers can load: {_one_line(error)}"
        ) from error

    if config.is_encoder_decoder:
        raise HostError(f"--model_name {name}: {config.model_type} is an encoder-decoder; choose a causal LM")
    return config


def load_tokenizer(name: str, trust_remote_code: bool = False, revision: str | None = None):
    """The tokenizer of a base model. Raises HostError as `load_config`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**_source(name, revision), trust_remote_code=trust_remote_code)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - as in `load_config`
        reason = "" if Path(resolve_name(name)).is_dir() else no_place(name)
        reason = reason or f"its tokenizer cannot be loaded: {_one_line(error)}"
        raise HostError(f"--model_name {name}: {reason}") from error
    tokenizer.padding_side = "left"

    # A file may carry a length to cut to, and padding, from its use elsewhere.
    if tokenizer.is_fast:
        read_whole(tokenizer.backend_tokenizer)
    return tokenizer


def load_host(name: str, load_in: str = "none", trust_remote_code: bool = False, device: str = "cpu",
              host_dtype: str = "stored", revision: str | None = None, attn_implementation: str | None = None,
              spread: SpreadConfig = ONE_DEVICE):
    """The causal LM (quantised or spread on request), frozen, in evaluation mode, its logits checked.

    Args:
        name: hub name or folder.
        load_in: "none", "8bit" or "4bit".
        trust_remote_code: run Python code that comes with a hub model.
        device: "cpu", "cuda" or "mps".
        host_dtype: what its weights are held in: "stored" as they are saved, else a name of `DTYPES`.
        revision: branch, tag or commit of a hub model; None = its main branch.
        attn_implementation: eager, sdpa, flash_attention_2 and the like; None = transformers' choice.
        spread: over which devices, memory and disk; by default all of it lies on `device`.

    Raises:
        HostError: as `load_config`; broken weights; a family whose logits `host_logits` does not reproduce.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name, trust_remote_code, revision)
    arguments = {"config": config, "dtype": DTYPES.get(host_dtype, "auto"), **quantisation(load_in, device)}
    if attn_implementation:
        arguments["attn_implementation"] = attn_implementation
    try:
        # Some families draw random numbers while they load on one device: what is added begins alike without them.
        with torch.random.fork_rng(devices=[]), spreading(spread, device) as placed:
            host, info = AutoModelForCausalLM.from_pretrained(
                **_source(name, revision), **arguments | placed, trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        keep_offloaded(host, placed)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - as in `load_config`
        raise HostError(f"--model_name {name}: the model cannot be loaded: {_one_line(error)}") from error
    if info["missing_keys"]:
        # transformers would draw them at random and say so in a warning alone.
        missing = info["missing_keys"]
        raise HostError(f"--model_name {name}: {len(missing)} weights are missing, the first is {min(missing)}")

    # A quantised or spread model is where it belongs already, and may not be moved.
    if load_in == "none" and spread.is_whole:
        host.to(device)
    freeze(host)
    if not spread.is_sharded:  # this process may have no weights yet: who shards it, checks it
        check_family(host, name, load_in)
    return host


def check_family(host, name: str, load_in: str) -> None:
    """Raises HostError for a loaded LLM that the add-on cannot be added to faithfully."""
    try:
        check_logits(host)
        check_cache(host)
        end_ids(host, None)
    except (HostError, UnfitError) as error:
        raise HostError(f"--model_name {name}: {error}") from error
    except Exception as error:  # bitsandbytes cannot multiply every shape, and a family's forward is foreign code
        reason = f"the model cannot be loaded: {_one_line(error)}"
        raise HostError(f"--model_name {name} --load_in {load_in}: {reason}") from error


def freeze(host: Any) -> None:
    """No gradient, no dropout, see `engine.frozen`. transformers saves none of it: call this after every load."""
    host.requires_grad_(False)
    host.eval()
    keep_fast(host.get_output_embeddings())
    keep_as_packed(host)


def host_logits(host, hidden: Tensor) -> Tensor:
    """(..., V) float32 logits of final hidden states (..., D), exactly as the host's own forward makes them.

    Cohere multiplies, Granite divides, Gemma 2 caps; `check_logits` proves at load that nothing is missing.
    """
    head = host.get_output_embeddings()
    config = host.config.get_text_config()
    if head.weight.is_floating_point():  # a quantised head takes what it is given
        hidden = hidden.to(head.weight.dtype)

    with torch.autocast(hidden.device.type, enabled=False):
        logits = head(hidden)
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "final_logit_softcapping", None):
            cap = config.final_logit_softcapping
            logits = torch.tanh(logits / cap) * cap
    return logits.float().to(hidden.device)  # of a spread LLM the head may be elsewhere


@torch.no_grad()
def check_logits(host) -> None:
    """Compares `host_logits` with the host's own logits on a short prompt.

    Raises:
        HostError: they differ, so this family does something to its logits that we do not know.
    """
    device = device_of(host)
    ids = torch.arange(8, device=device)[None] % host.config.get_text_config().vocab_size
    own = host(input_ids=ids).logits.float()
    if not bool(torch.isfinite(own).all()):
        raise HostError("its logits are not all numbers, so its weights are damaged: load it anew")

    ours = host_logits(host, host.base_model(input_ids=ids).last_hidden_state)

    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise HostError(
            f"model family {host.config.model_type} changes its logits in a way this program does not know, so HRM "
            "cannot be added to it faithfully: choose another base model"
        )


def host_fingerprint(host) -> dict[str, Any]:
    """What identifies a base model wherever it lies: family, sizes and a digest of some of its weights."""
    text = host.config.get_text_config()
    head = real_tensor(host.get_output_embeddings())
    rows = head.detach()[:: max(len(head) // 64, 1)].float().cpu().numpy().tobytes()
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "head_digest": hashlib.sha256(rows).hexdigest()[:16],
    }


def end_ids(model, tokenizer) -> frozenset[int]:
    """Ids of every token that ends an answer: those of the tokenizer, where there is one, of configs and their parts.

    Families such as Gemma, Phi-3 and Llama 3 name several, and the end of a turn often in generation_config alone. An
    id beyond the embedding table is left out: it cannot be generated.

    Raises HostError for an end that is no id.
    """
    config = model.config
    owners = [tokenizer, getattr(model, "generation_config", None), config, config.get_text_config()]
    owners.append(getattr(config, "base_config", None))  # the LLM's own config inside that of an adapter

    ids: set[int] = set()
    for owner in owners:
        own = getattr(owner, "eos_token_id", None)
        if isinstance(own, int):
            own = [own]
        if not all(isinstance(index, int) for index in own or ()):
            raise HostError(f"the model's eos_token_id is {own!r}: expected the id of a token, or a list of ids")
        ids.update(own or ())

    return frozenset(index for index in ids if 0 <= index < config.get_text_config().vocab_size)


# --- LoRA -------------------------------------------------------------------------------------------------------------


def decoder_layers(host) -> tuple[str, nn.ModuleList]:
    """(name, list) of the host's decoder layers. Raises HostError where none can be found."""
    count = host.config.get_text_config().num_hidden_layers
    for name, module in host.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise HostError(f"model family {host.config.model_type}: its list of {count} decoder layers was not found")


def lora_layers(host) -> list[tuple[str, nn.Module]]:
    """(name, module) of every decoder layer from the bottom to the top. Raises HostError where none can be found.

    A family whose layers run in several stacks (hrm_text counts a layer once for each of its cycles) has the layers of
    all stacks, in the order in which they stand in the model.
    """
    try:
        stacks = [decoder_layers(host)]
    except HostError:
        stacks = _stacks(host)
        if not stacks:
            raise

    layers = []
    for name, stack in stacks:
        layers += [(f"{name}.{index}", layer) for index, layer in enumerate(stack)]
    return layers


def _stacks(host) -> list[tuple[str, nn.ModuleList]]:
    """Lists of whole decoder layers: those whose elements attend, and stand in no other such list."""
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in host.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and hasattr(module[0], "self_attn"):
            stacks.append((name, module))
    return stacks


def _is_product(module: Any) -> bool:
    """False for a family's own kind of linear map that returns something else than a product, as some routers do."""
    if not type(module).__module__.startswith(("transformers.models.", "transformers_modules.")):
        return True
    try:
        return module(module.weight.new_zeros(1, 2, module.in_features)).shape == (1, 2, module.out_features)
    except Exception:  # of whatever kind: a family's forward is foreign code
        return False


def add_lora(host, layers: int, rank: int, base_model_name: str = "") -> Any:
    """Puts peft LoRA on every linear map of the host's top `layers` layers, in place; base weights stay as they are.

    The factors have `rank` and are kept in float32; LoRA's alpha is twice the rank (arXiv 2106.09685).

    Returns peft's own model around the host (PeftModel), which writes the factors as peft reads them;
    `base_model_name` is the name of the LLM that it writes.

    Raises:
        HostError: more layers asked for than the host has; peft is not installed.
    """
    try:  # one who loads an exported add-on without LoRA needs no peft
        from peft import LoraConfig, PeftModelForCausalLM
    except ImportError as error:
        raise HostError("LoRA needs the package peft: install it (pip install peft)") from error

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=_lora_targets(host, layers), bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path=base_model_name,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a name that transformers will drop
        model = PeftModelForCausalLM(host, config)

    for parameter_name, parameter in host.named_parameters():
        trained = "lora_" in parameter_name
        parameter.requires_grad_(trained)
        if trained:  # peft takes the base weight's dtype, in which small updates may round to none
            parameter.data = parameter.data.float()
    return model


def _lora_targets(host, layers: int) -> list[str]:
    """Full names of the linear maps of the host's top `layers` layers. Raises HostError where it has fewer layers."""
    from transformers.pytorch_utils import Conv1D

    stack = lora_layers(host)
    if layers > len(stack):
        raise HostError(f"--lora_layers {layers}: {host.config.model_type} has only {len(stack)} layers")

    # peft finds modules by their full names.
    targets = []
    for name, layer in stack[len(stack) - layers :]:
        for inner, module in layer.named_modules():
            # peft refuses a Mamba mixer's output map, which fast kernels read past the module.
            kernel_read = inner.endswith("out_proj") and host.config.model_type in MAMBA_MIXERS
            if isinstance(module, nn.Linear | Conv1D) and not kernel_read and _is_product(module):
                targets.append(f"{name}.{inner}")
    return targets


@contextlib.contextmanager
def without_lora(host) -> Iterator[None]:
    """Inside, the host is the bare LLM: its LoRA layers are switched off."""
    # Where peft is not imported, nobody has added LoRA. Importing it takes seconds.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        yield
        return

    layers = [module for module in host.modules() if isinstance(module, tuners.BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
