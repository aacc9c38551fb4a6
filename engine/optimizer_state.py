"""Optimizers and random generators to flat tensors and JSON documents, and back bit for bit.

Torch's `get_optimizer_state_dict(flatten_optimizer_state_dict=True)` does not serve: it cannot put back a parameter
that has no state yet, such as HRM's behind a shut gate, nor the state of bitsandbytes' 8-bit AdamW.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoints import EARLIER, CheckpointError

HOW_NOT_WHAT = ("params", "foreach", "fused", "capturable", "differentiable")  # belong to the machine, not to the run
PREFIX = "optimizer/"


def _parameters(optimizer: torch.optim.Optimizer, names: list[str]) -> Iterator[tuple[str, Tensor, int]]:
    """(name, parameter, number of its group) in param-group order."""
    pairs = [(p, index) for index, group in enumerate(optimizer.param_groups) for p in group["params"]]
    for name, (parameter, index) in zip(names, pairs, strict=True):
        yield name, parameter, index


# --- optimizers -------------------------------------------------------------------------------------------------------


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as flat tensors (`optimizer/<parameter>/<key>`) and a JSON-able document.

    `names` are the parameters' names in param-group order. Tensors keep shape and dtype and are not copied.
    """
    # Of each parameter: its shape, which of its state are tensors, and the state that is not.
    tensors: dict[str, Tensor] = {}
    parameters: list[dict[str, Any]] = []
    for name, parameter, index in _parameters(optimizer, names):
        entry: dict[str, Any] = {"name": name}
        entry |= {"shape": list(parameter.shape), "group": index, "tensors": [], "scalars": {}}
        parameters.append(entry)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}{name}/{key}"] = value
                entry["tensors"].append(key)
            else:
                entry["scalars"][key] = value

    groups = [_group_document(group) for group in optimizer.param_groups]
    document = {"class": type(optimizer).__name__, "parameters": parameters, "groups": groups}
    json.dumps(document)  # our own invariant, found here and not after a night of training
    return tensors, document


def _group_document(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group; those that are tensors, as with `capturable`, become numbers."""
    document = {}
    for key, value in group.items():
        if key not in HOW_NOT_WHAT:
            document[key] = value.item() if isinstance(value, Tensor) else value
    return document


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor], document: dict[str, Any]
) -> None:
    """Puts back what `pack_optimizer` took, bit for bit.

    How a step is carried out (`foreach`, `fused`, `capturable`) stays as this run chose it.

    Args:
        optimizer: of the class and with the parameters of the saved one.
        names: of its parameters, in param-group order.
        tensors, document: as `pack_optimizer` made them.

    Raises:
        CheckpointError: anything differs; nothing is changed.
    """
    _check_class_and_parameters(optimizer, names, document)
    _check_tensors(tensors, document)

    # Copies: the caller keeps what it read, and a step must not write there.
    for entry, (name, parameter, index) in zip(document["parameters"], _parameters(optimizer, names), strict=True):
        group = optimizer.param_groups[index]
        state = dict(entry["scalars"])
        for key in entry["tensors"]:
            # torch's own rule: the step counter stays on the CPU unless the kernel reads it on the device.
            on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
            device = "cpu" if on_cpu else parameter.device
            state[key] = tensors[f"{PREFIX}{name}/{key}"].to(device, copy=True)
        optimizer.state.pop(parameter, None)
        if state:  # an empty one would make the optimizer believe that it had begun
            optimizer.state[parameter] = state

    for group, saved in zip(optimizer.param_groups, document["groups"], strict=True):
        for key, value in saved.items():
            _set_option(group, key, value)


def _check_class_and_parameters(
    optimizer: torch.optim.Optimizer, names: list[str], document: dict[str, Any]
) -> None:
    """Raises CheckpointError naming the first difference in class, or in name, shape and group of a parameter."""
    kind = type(optimizer).__name__
    if document["class"] != kind:
        raise CheckpointError(f"the checkpoint's optimizer is {document['class']}, this run's is {kind}; "
                              "resume with the --optimizer it was trained with")

    # By name, shape and group, so that the message can say which.
    here = [f"{name} {list(p.shape)} of group {index}" for name, p, index in _parameters(optimizer, names)]
    there = [f"{entry['name']} {entry['shape']} of group {entry['group']}" for entry in document["parameters"]]
    for index, (stored, current) in enumerate(zip_longest(there, here, fillvalue="no parameter")):
        if stored != current:
            raise CheckpointError(f"the checkpoint's optimizer has {stored} where this run has {current} (parameter "
                                  f"{index}); resume with the model options it was trained with")


def _check_tensors(tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Raises CheckpointError naming the first tensor that is missing or that the document does not know."""
    expected = {f"{PREFIX}{entry['name']}/{key}" for entry in document["parameters"] for key in entry["tensors"]}
    stored = {name for name in tensors if name.startswith(PREFIX)}
    odd = sorted(expected ^ stored)

    if odd:
        what = "is missing from" if odd[0] in expected else "does not belong in"
        raise CheckpointError(f"optimizer tensor {odd[0]} {what} the checkpoint; {EARLIER}")


def _set_option(group: dict[str, Any], key: str, value: Any) -> None:
    """Sets a group's option in the form it has here: JSON knows neither tensors nor tuples."""
    here = group.get(key)
    if isinstance(here, Tensor):
        here.fill_(value)
    elif isinstance(value, list) and not isinstance(here, list):
        group[key] = tuple(value)
    else:
        group[key] = value


# --- random generators ------------------------------------------------------------------------------------------------


def pack_rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of torch (CPU, each CUDA device), python's random and numpy's legacy generator: tensors, document."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # of the legacy generator always a tuple
    kind, keys, position, has_gauss, cached = numpy_state

    # safetensors has no unsigned 32-bit integers: wider signed ones hold the same words.
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/python": torch.tensor(words, dtype=torch.int64),
        "rng/numpy": torch.from_numpy(keys.astype(np.int64)),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng/cuda/{index}"] = state
    return tensors, {"python": [version, gauss], "numpy": [kind, int(position), int(has_gauss), float(cached)]}


def unpack_rng(tensors: dict[str, Tensor], document: dict[str, Any]) -> list[str]:
    """Puts back what `pack_rng` took; returns a line for what this machine cannot restore."""
    version, gauss = document["python"]
    kind, *rest = document["numpy"]
    torch.set_rng_state(tensors["rng/torch"])
    random.setstate((version, tuple(tensors["rng/python"].tolist()), gauss))
    np.random.set_state((kind, tensors["rng/numpy"].numpy().astype(np.uint32), *rest))

    # Of CUDA devices, as many as there are both there and here.
    saved = sorted(int(name.removeprefix("rng/cuda/")) for name in tensors if name.startswith("rng/cuda/"))
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in saved[:here]:
        torch.cuda.set_rng_state(tensors[f"rng/cuda/{index}"], index)
    if len(saved) == here:
        return []
    return [f"the checkpoint knows {len(saved)} CUDA devices, this machine {here}: random numbers there will differ"]
