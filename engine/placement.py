"""Where the weights of a loaded LLM lie: on one device, packed on it, or spread by accelerate (`device_map="auto"`).

A spread LLM fills the accelerators, then memory, then the disk. accelerate's hooks bring a layer's weights to the
device that computes, for as long as the layer runs; before and after, the module holds a stand-in without data (torch's
`meta`). So modules may be called as ever, but a weight that is read directly is asked for by `real_tensor`, and a
device by `device_of`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.memory import free_memory

SHARE = 0.8  # of the machine's free memory that a spread LLM may fill; the add-on, batches and caches take the rest
EXAMPLE = '{"0": "10GiB", "cpu": "30GiB"}'


@dataclass(frozen=True)
class SpreadConfig:
    """How an LLM is spread; each field is the flag of its name.

    device_map: none (it lies on one device) or auto (on all accelerators, then in memory, then on the disk).
    max_memory: JSON text, the most that each place may hold; None: what is free. A place that is not named holds none.

    Two fields are no flags. `is_sharded`: the LLM is loaded into memory, to be shared by several processes
    (engine/sharding.py). `is_empty`: this process gets stand-ins without data (torch's `meta`) and another the weights.
    """

    device_map: str = "none"
    max_memory: str | None = None
    is_sharded: bool = False
    is_empty: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the LLM lies whole on one device."""
        return self.device_map == "none" and not self.is_sharded


ONE_DEVICE = SpreadConfig()


# --- what is asked for ------------------------------------------------------------------------------------------------


def check_spread(config: SpreadConfig, device: str) -> None:
    """Raises ValueError for an LLM that cannot be spread so on this machine, where `device` trains the add-on."""
    if config.device_map == "none":
        if config.max_memory is not None:
            raise ValueError(f"--max_memory {config.max_memory[:80]} does nothing without --device_map auto: add it, "
                             "or --max_memory none")
        return
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise ValueError(
            f"--device_map {config.device_map} is for one process, which uses all accelerators, and {processes} were "
            "started: start train.py without torchrun or accelerate launch"
        )
    most_memory(config, device)


def most_memory(config: SpreadConfig, device: str) -> dict[int | str, int] | None:
    """Place -> most bytes, as accelerate takes it; None: what accelerate finds free.

    Raises:
        ValueError: --max_memory does not say how much which place may hold, or names a place that is not here.
    """
    if config.max_memory is None:
        # By itself accelerate would use accelerators that --device cpu leaves alone, and see past a container's limit.
        return {"cpu": int(SHARE * free_memory())} if device == "cpu" else None

    accelerators = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, 0)
    names: dict[str, int | str] = {str(number): number for number in range(accelerators)}
    if device == "mps":
        names = {"mps": "mps"}
    here = [*names, "cpu"]
    most = _sizes(config.max_memory)
    for name in most:
        if name not in here:
            raise ValueError(f"--max_memory {config.max_memory} names {name}: with --device {device} the places here "
                             f"are {', '.join(here)}, and the disk takes the rest")
    if names and here[0] not in most:
        raise ValueError(f"--max_memory {config.max_memory} leaves out {here[0]}, which trains the add-on: name it, or "
                         "use --device cpu")
    return {names.get(name, name): size for name, size in most.items()}


def _sizes(text: str) -> dict[str, int]:
    """Place -> bytes of the JSON text of --max_memory. Raises ValueError."""
    from accelerate.utils import convert_file_size_to_int

    try:
        sizes = json.loads(text)
        if not isinstance(sizes, dict) or not sizes or not all(type(size) in (int, str) for size in sizes.values()):
            raise ValueError
        return {name: convert_file_size_to_int(size) for name, size in sizes.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--max_memory {text[:80]} is not legal: expected JSON of places and sizes such as {EXAMPLE}"
        ) from error


# --- loading ----------------------------------------------------------------------------------------------------------


def quantisation(load_in: str, device: str) -> dict:
    """Arguments of `from_pretrained` that quantise while loading; none for "none"."""
    if load_in == "none":
        return {}
    from transformers import BitsAndBytesConfig

    # Its cast to float16 is told by every layer in every forward pass.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())
    kinds: dict[str, dict[str, Any]] = {
        "8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    }
    return {"quantization_config": BitsAndBytesConfig(**kinds[load_in]), "device_map": {"": device}}


class _Once(logging.Filter):
    """Lets each message of a logger pass once, whatever its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = str(record.msg) not in self.seen
        self.seen.add(str(record.msg))
        return new


@contextlib.contextmanager
def spreading(config: SpreadConfig, device: str) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` that spread an LLM while it loads; none for one device.

    The disk's share of a model in safetensors is read from its own files. What has to be written anew lies in a folder
    below HF_HOME (else where temporary files lie), see `keep_offloaded`; the folder goes where loading fails.

    Raises:
        ValueError: as `most_memory`.
    """
    if config.device_map == "none":
        yield {"device_map": "meta"} if config.is_empty else {}
        return

    # It would say that weights are on no device, which is meant so.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    folder = _offload_folder()
    try:
        yield {"device_map": "auto", "max_memory": most_memory(config, device), "offload_folder": str(folder)}
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _offload_folder() -> Path:
    """A new folder for weights that are written to the disk."""
    from huggingface_hub.constants import HF_HOME

    try:
        Path(HF_HOME).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="offload-", dir=HF_HOME))
    except OSError:  # a cache that may be read alone
        return Path(tempfile.mkdtemp(prefix="offload-"))


def keep_offloaded(host: nn.Module, arguments: dict[str, Any]) -> None:
    """Removes the folder that `spreading` made: at once where it is empty, else with the LLM or with the process."""
    folder = arguments.get("offload_folder")
    if folder is None:
        return
    if os.listdir(folder):
        weakref.finalize(host, shutil.rmtree, folder, ignore_errors=True)
    else:
        os.rmdir(folder)


# --- asking a spread LLM ----------------------------------------------------------------------------------------------


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", [hook]))


def device_of(model: nn.Module) -> torch.device:
    """The device that a model takes its inputs on: that of its first weights or, where they are spread, that computes.

    Raises:
        ValueError: a model without weights.
    """
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        for parameter in module.parameters(recurse=False):
            return parameter.device
    raise ValueError("a model without weights is on no device")


def real_tensor(module: nn.Module, name: str = "weight") -> Tensor:
    """The parameter or buffer `name` of a module itself, with its data wherever a spread LLM keeps them."""
    tensor = getattr(module, name)
    if not tensor.is_meta:
        return tensor
    for hook in _hooks(module):
        if getattr(hook, "weights_map", None) is not None:
            return hook.weights_map[name]
    return tensor


def real_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model's state dict, each with its data; one at a time, since all might not fit memory."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            place, _, own = name.rpartition(".")
            tensor = real_tensor(model.get_submodule(place), own)
        yield name, tensor


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, and those inside a list or tuple, on `device`; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple) and all(isinstance(part, Tensor) for part in value):
        return type(value)(part.to(device) for part in value)
    return value


def spread_text(host: nn.Module) -> str:
    """How many gigabytes of a spread LLM lie where, for the user; "" where it is on one device."""
    places = getattr(host, "hf_device_map", None)
    if not places or (len(set(places.values())) == 1 and "disk" not in places.values()):
        return ""

    # Names are of modules; the longest that a parameter lies in says where it is.
    sizes: dict[str, int] = {}
    tied = getattr(host, "all_tied_weights_keys", {})
    for name, parameter in host.named_parameters():
        if name in tied:  # on the disk one table may stand for both
            continue
        inside = [module for module in places if not module or f"{name}.".startswith(f"{module}.")]
        place = str(places[max(inside, key=len)])
        sizes[place] = sizes.get(place, 0) + parameter.nbytes
    parts = []
    for place, size in sizes.items():
        where = {"cpu": "in memory", "disk": "on the disk"}.get(place, f"on device {place}")
        parts.append(f"{size / 1e9:.2f} GB {where}")
    return f"the LLM is spread: {', '.join(parts)}"
