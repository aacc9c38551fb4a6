"""Adapters of every kind: built from options, written to a checkpoint's `adapter_config.json`, loaded from there."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from addon.baselines import PEFT_TYPES, SHAPE_FIELDS, BaselineController
from batching import PromptConfig
from engine.checkpoints import read_checkpoint
from model import OLD_DEFAULTS, AdapterController, HRMAddonConfig, HRMController

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


def adapter_document(controller: Any, prompt: PromptConfig) -> str:
    """JSON text that lets an adapter be rebuilt: base model, its fingerprint, shape, prompt format."""
    document = {
        **controller.shape(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": controller.config.base_model_name,
        "base_fingerprint": host_fingerprint(controller.host),
        "prompt": dataclasses.asdict(prompt),
    }
    return json.dumps(document, indent=2)


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
        raise ValueError(f"{folder} holds a {adapter_of(document)} baseline: load it with "
                         "addon.adapters.load_controller")
    settings = OLD_DEFAULTS | document["hrm"]
    controller = HRMController.from_base(
        document["base_model_name_or_path"], device=device, trust_remote_code=trust_remote_code, **settings
    )
    check_fingerprint(controller.host, document, folder)
    controller.load_addon_state(tensors)
    return controller.eval(), document


def build_model(opts: argparse.Namespace, device: str) -> HRMController:
    """The HRM, or with `--adapter mlp` its single pass, that the options describe. Raises HostError."""
    names = [name for name in inspect.signature(HRMAddonConfig).parameters if hasattr(opts, name)]
    settings = {name: getattr(opts, name) for name in names} | {"verifier_head": opts.verifier_weight > 0}
    return HRMController.from_base(opts.model_name, opts.load_in, opts.trust_remote_code, device, **settings)


def build_controller(opts: argparse.Namespace, device: str) -> AdapterController:
    """The adapter that the options describe, on its LLM: the only place that maps options to it. Raises HostError."""
    if opts.adapter not in PEFT_TYPES:
        return build_model(opts, device)
    settings = {name: getattr(opts, name) for name in SHAPE_FIELDS}
    return BaselineController.from_base(opts.model_name, opts.load_in, opts.trust_remote_code, device, **settings)


def load_controller(folder: Path, device: str = "cpu", trust_remote_code: bool = False
                    ) -> tuple[AdapterController, dict[str, Any]]:
    """The controller of a checkpoint of any adapter, in evaluation mode, and its adapter document.

    Raises:
        ValueError: a broken checkpoint, or a base model that is missing or another one.
    """
    document, tensors = read_adapter(folder)
    if adapter_of(document) not in PEFT_TYPES:
        return load_adapter(folder, device, trust_remote_code)
    controller = BaselineController.from_base(
        document["base_model_name_or_path"], trust_remote_code=trust_remote_code, device=device, **document["baseline"]
    )
    check_fingerprint(controller.host, document, folder)
    controller.load_addon_state(tensors)
    return controller.eval(), document
