"""A frozen LLM shared by several processes with FSDP2: each holds a part of every decoder layer, none a whole one.

accelerate's launcher asks for it by environment variables (ACCELERATE_USE_FSDP, FSDP_VERSION and more), and its plugin
reads them. `Accelerator.prepare` is left out: it shards all that it is given, what trains included, and rebuilds the
optimizers. Here torch's `fully_shard` takes the frozen decoder layers alone. What trains is small and stays whole in
each process, its gradients averaged by DDP as ever; so optimizers, checkpoints, clipping and logs are those of any run.

A layer is put together for as long as it runs, by an exchange between all processes. So each must run the LLM as often
as the others, or they wait for it forever. In training they do: every process has as many micro-batches. transformers
generates until the last process is done, and `idle_turns` evens out the number of batches of an evaluation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.placement import device_of

ASKS = "ACCELERATE_USE_FSDP"
TRUE = ("1", "true", "yes", "on", "y", "t")
MARK = "_is_fsdp_managed_module"  # transformers' `generate` looks for it, and then keeps the processes in step
# Settings of accelerate's that would change nothing here.
UNKNOWN = {
    "FSDP_ACTIVATION_CHECKPOINTING": "activations are kept; a smaller --batch_size takes less memory",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "activations are kept; a smaller --batch_size takes less memory",
    "FSDP_IGNORED_MODULES": "the frozen decoder layers are sharded, and nothing else",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "every decoder layer is a unit by itself",
    "ACCELERATE_MIXED_PRECISION": "--mixed_precision of train.py decides",
    "ACCELERATE_DYNAMO_BACKEND": "nothing is compiled beside a sharded LLM",
}


@dataclass(frozen=True)
class ShardConfig:
    """What a run does beside a sharded LLM; each field is the flag of its name."""

    device: str = "auto"
    load_in: str = "none"
    device_map: str = "none"
    cache_hidden: str = "off"
    eval_only: bool = False
    objective: str = "ce"
    eval_suite: str | None = None


@dataclass(frozen=True)
class Sharding:
    """How an LLM is sharded, as accelerate's plugin reads it from the environment.

    reshard: a layer is taken apart again after its forward pass (True), or stays whole until its backward pass.
    offload: each process keeps its parts in memory, and on the device only what runs.
    first_loads: the first process of each machine reads the LLM's files; the others get their parts from the first.
    """

    reshard: bool = True
    offload: bool = False
    first_loads: bool = False

    @property
    def reads_files(self) -> bool:
        """Whether this process reads the LLM's files."""
        return not self.first_loads or os.environ.get("LOCAL_RANK", "0") == "0"


# --- what is asked for ------------------------------------------------------------------------------------------------


def asks_for_fsdp() -> bool:
    """Whether the environment asks accelerate for FSDP."""
    return os.environ.get(ASKS, "").lower() in TRUE


def sharding_asked() -> Sharding | None:
    """What the environment asks for; None: nothing is sharded.

    Raises:
        ValueError: accelerate cannot read its variables.
    """
    if not asks_for_fsdp():
        return None
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, ImportError) as error:
        raise ValueError(f"{ASKS}: accelerate cannot read its FSDP_ variables: {error}") from error
    return Sharding(
        bool(plugin.reshard_after_forward),
        isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        bool(plugin.cpu_ram_efficient_loading),
    )


def check_sharding(config: ShardConfig, device: str) -> None:
    """Raises ValueError where the environment asks for FSDP that this run, which trains on `device`, cannot do."""
    if not asks_for_fsdp():
        return

    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"{ASKS} with FSDP_VERSION={version}: the frozen LLM is sharded by FSDP version 2 alone; "
            "--fsdp_version 2 of accelerate launch, or fsdp_version: 2 in its config file"
        )

    # What an exchange needs.
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise ValueError(
            f"{ASKS} with one process: FSDP shares the LLM among several; start more (--num_processes), or unset it"
        )
    if device not in ("cpu", "cuda"):
        raise ValueError(f"{ASKS} with --device {device}: FSDP is for cuda, and for several processes on a cpu")

    _check_variables()
    _check_flags(config)
    sharding_asked()


def _check_variables() -> None:
    """Raises ValueError for a setting of accelerate's that would change nothing."""
    for name, instead in UNKNOWN.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "false", "none", "no", "0"):
            raise ValueError(f"{name}={value} is not supported: {instead}; leave it out of accelerate's config")

    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if policy.upper() != "TRANSFORMER_BASED_WRAP":
        raise ValueError(
            f"FSDP_AUTO_WRAP_POLICY={policy} is not supported: every decoder layer is a unit by itself; choose "
            "TRANSFORMER_BASED_WRAP in accelerate's config"
        )


def _check_flags(config: ShardConfig) -> None:
    """Raises ValueError for a flag that a sharded LLM cannot serve."""
    has_cache = config.cache_hidden != "off" and not config.eval_only
    unfit = {
        "load_in": (config.load_in != "none", "packed weights cannot be sharded"),
        "device_map": (config.device_map != "none", "one process spreads the LLM, and several shard it"),
        "cache_hidden": (has_cache, "each process fills its share of the cache alone, and none can run the LLM alone"),
        "objective": (config.objective == "grpo", "TRL's processes generate without waiting for each other"),
        "eval_suite": (bool(config.eval_suite), "one process measures the suite, and none can run the LLM alone"),
    }

    for name, (is_unfit, reason) in unfit.items():
        if is_unfit:
            raise ValueError(f"{ASKS} and --{name} {getattr(config, name)}: {reason}; leave one out")


# --- sharding ---------------------------------------------------------------------------------------------------------


def shard_llm(
    model: nn.Module, llm: Any, layers: Iterable[nn.Module], sharding: Sharding, device: torch.device
) -> None:
    """Leaves this process its part of the frozen weights of `layers`, and brings everything else to `device`, in place.

    All processes call it together. A layer at a time is whole on `device`.

    Args:
        model: what trains, with the LLM inside; it lies in memory, or as stand-ins without data (torch's `meta`) in a
            process that did not read the LLM's files.
        llm: the LLM in it, a model of transformers' whose `base_model` runs the layers.
        layers: its decoder layers.
        sharding: how.
        device: what this process computes on.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if sharding.offload else OffloadPolicy()

    # Each layer is a unit. What trains inside it stays whole, and so do single numbers, which have no parts.
    for layer in dict.fromkeys(layers):
        _bring(layer, device, sharding.first_loads)
        whole = {parameter for parameter in layer.parameters() if parameter.requires_grad or not parameter.ndim}
        fully_shard(
            layer, mesh=mesh, reshard_after_forward=sharding.reshard, offload_policy=offload, ignored_params=whole
        )

    # Embeddings, last norm, head and what trains.
    _bring(model, device, sharding.first_loads)
    whole = {parameter for parameter in model.parameters() if not is_part(parameter)}

    # The decoder is a unit without weights of its own: the next of its layers is fetched while one runs.
    decoder = llm.base_model
    fully_shard(decoder, mesh=mesh, ignored_params=whole)

    # Its class is a new one, by which transformers looks up what states it can hand out.
    _CAN_RECORD_REGISTRY[decoder] = decoder._can_record_outputs
    for marked in (llm, model):
        setattr(marked, MARK, True)


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is one that processes share (a DTensor)."""
    return hasattr(tensor, "to_local")


def _bring(module: nn.Module, device: torch.device, is_sent: bool) -> None:
    """Brings the whole tensors below `module` to `device`; with `is_sent` their numbers are the first process's."""
    brought: dict[Tensor, nn.Parameter] = {}  # old -> new, so that tied weights stay tied

    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if is_part(parameter):
                continue

            if parameter not in brought:
                data = _data(parameter.detach(), device, is_sent)
                brought[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            owner._parameters[name] = brought[parameter]

        # Buffers that are not saved were made in each process.
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner._buffers[name] = _data(buffer, device, is_sent and name not in owner._non_persistent_buffers_set)


def _data(tensor: Tensor, device: torch.device, is_sent: bool) -> Tensor:
    """The numbers of a tensor on `device`, with `is_sent` those of the first process."""
    if tensor.is_meta:
        data = torch.empty_like(tensor, device=device)
    else:
        data = tensor.to(device)

    if is_sent:
        data = data.contiguous()
        dist.broadcast(data, src=0)
    return data


def is_sharded(model: nn.Module) -> bool:
    """Whether a model has an LLM inside that processes share."""
    return any(getattr(module, MARK, False) for module in model.modules())


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes that this process holds of the frozen weights, bytes of all of them)."""
    held = 0
    whole = 0

    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        own: Any = parameter
        if is_part(parameter):
            own = own.to_local()
        held += own.nbytes
        whole += parameter.numel() * parameter.element_size()

    return held, whole


def shard_text(model: nn.Module) -> str:
    """How much of the LLM each process holds, for the user; "" where it is not sharded."""
    if not is_sharded(model):
        return ""

    held, whole = held_bytes(model)
    return (f"the LLM is sharded by FSDP2 over {dist.get_world_size()} processes: this one holds {held / 1e9:.3g} of "
            f"{whole / 1e9:.3g} GB")


# --- in step ----------------------------------------------------------------------------------------------------------


def idle_turns(model: nn.Module, own: int) -> int:
    """How often this process must run the LLM beyond its `own` times, so that all processes do equally often.

    All call it together, before the first of these times; without a sharded LLM it is 0.
    """
    if not is_sharded(model):
        return 0

    most = torch.tensor(own, device=device_of(model))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most) - own


def replicated(loss: nn.Module, accelerator: Any) -> nn.Module:
    """`loss` as DDP runs it where there are several processes: the main one's weights everywhere, gradients averaged.

    Beside a sharded LLM, DDP sees what trains alone.
    """
    trains = any(parameter.requires_grad for parameter in loss.parameters())
    if accelerator.num_processes == 1 or not trains:
        return loss
    if not is_sharded(loss):
        return accelerator.prepare_model(loss)

    # DDP is told by name what to leave alone.
    frozen = [name for name, parameter in loss.named_parameters() if not parameter.requires_grad]
    replicate = nn.parallel.DistributedDataParallel
    replicate._set_params_and_buffers_to_ignore_for_model(loss, frozen)

    places = [accelerator.local_process_index] if accelerator.device.type == "cuda" else None
    return replicate(loss, device_ids=places)


def without_exchange(wrapped: nn.Module) -> contextlib.AbstractContextManager:
    """Inside, backward passes through a `replicated` module leave gradients as they are in each process."""
    no_sync: Any = getattr(wrapped, "no_sync", contextlib.nullcontext)
    return no_sync()
