"""Optimizers and random generators to flat tensors and JSON documents, and back bit for bit."""

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


def _parameters(optimizer: torch.optim.Optimizer, names: list[str]) -> Iterator[tuple[str, Tensor, int]]:
    pairs = [(p, index) for index, group in enumerate(optimizer.param_groups) for p in group["params"]]
    return ((name, parameter, index) for name, (parameter, index) in zip(names, pairs, strict=True))


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as flat tensors (`optimizer/<parameter>/<key>`) and a JSON-able document.

    `names` are the parameters' names in param-group order. Tensors keep shape and dtype and are not copied.
    """
    tensors: dict[str, Tensor] = {}
    parameters: list[dict[str, Any]] = []
    for name, parameter, index in _parameters(optimizer, names):
        entry = {"name": name, "shape": list(parameter.shape), "group": index, "tensors": [], "scalars": {}}
        parameters.append(entry)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
                entry["tensors"].append(key)
            else:
                entry["scalars"][key] = value
    groups = [{k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k not in HOW_NOT_WHAT}
              for group in optimizer.param_groups]
    document = {"class": type(optimizer).__name__, "parameters": parameters, "groups": groups}
    json.dumps(document)  # our own invariant, found here and not after a night of training
    return tensors, document


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor],
                     document: dict[str, Any]) -> None:
    """Puts back what `pack_optimizer` took, bit for bit; changes nothing if anything differs (CheckpointError).

    How a step is carried out (`foreach`, `fused`, `capturable`) stays as this run chose it.
    """
    saved, kind = document["parameters"], type(optimizer).__name__
    if document["class"] != kind:
        raise CheckpointError(f"the checkpoint's optimizer is {document['class']}, this run's is {kind}; "
                              "resume with the --optimizer it was trained with")
    here = [f"{name} {list(p.shape)} of group {index}" for name, p, index in _parameters(optimizer, names)]
    there = [f"{entry['name']} {entry['shape']} of group {entry['group']}" for entry in saved]
    for index, (stored, current) in enumerate(zip_longest(there, here, fillvalue="no parameter")):
        if stored != current:
            raise CheckpointError(f"the checkpoint's optimizer has {stored} where this run has {current} (parameter "
                                  f"{index}); resume with the model options it was trained with")
    expected = {f"optimizer/{entry['name']}/{key}" for entry in saved for key in entry["tensors"]}
    odd = sorted(expected ^ {name for name in tensors if name.startswith("optimizer/")})
    if odd:
        what = "is missing from" if odd[0] in expected else "does not belong in"
        raise CheckpointError(f"optimizer tensor {odd[0]} {what} the checkpoint; {EARLIER}")
    for entry, (name, parameter, index) in zip(document["parameters"], _parameters(optimizer, names), strict=True):
        group, state = optimizer.param_groups[index], dict(entry["scalars"])
        for key in entry["tensors"]:
            # torch's own rule: the step counter stays on the CPU unless the kernel reads it on the device
            on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
            state[key] = tensors[f"optimizer/{name}/{key}"].to("cpu" if on_cpu else parameter.device, copy=True)
        optimizer.state.pop(parameter, None)
        if state:  # an empty one would make the optimizer believe that it had begun
            optimizer.state[parameter] = state
    for group, saved in zip(optimizer.param_groups, document["groups"], strict=True):
        for key, value in saved.items():
            old = group.get(key)
            if isinstance(old, Tensor):
                old.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) and not isinstance(old, list) else value


def pack_rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of torch (CPU, each CUDA device), python's random and numpy's legacy generator: tensors, document."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"rng/torch": torch.get_rng_state(), "rng/python": torch.tensor(words, dtype=torch.int64),
               "rng/numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda/{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": [version, gauss], "numpy": [kind, int(position), int(has_gauss), float(cached)]}


def unpack_rng(tensors: dict[str, Tensor], document: dict[str, Any]) -> list[str]:
    """Puts back what `pack_rng` took; returns a line for what this machine cannot restore."""
    version, gauss = document["python"]
    words, keys = tensors["rng/python"].tolist(), tensors["rng/numpy"].numpy().astype(np.uint32)
    torch.set_rng_state(tensors["rng/torch"])
    random.setstate((version, tuple(words), gauss))
    kind, *rest = document["numpy"]
    np.random.set_state((kind, keys, *rest))
    saved = sorted(int(name.removeprefix("rng/cuda/")) for name in tensors if name.startswith("rng/cuda/"))
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in saved[:here]:
        torch.cuda.set_rng_state(tensors[f"rng/cuda/{index}"], index)
    note = f"the checkpoint knows {len(saved)} CUDA devices, this machine {here}: random numbers there will differ"
    return [] if len(saved) == here else [note]
