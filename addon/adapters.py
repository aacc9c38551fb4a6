"""Adapters of every kind: built, described in a checkpoint's record, loaded from there.

The record is `adapter_config.json`. Where the adapter is peft's own kind, peft writes that file and the weights, and
the record is `adapter_record.json` beside them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import options
from addon.baselines import BaselineConfig, BaselineController
from addon.host_dtype import attention_of, host_dtype, load_in, pick_dtype
from addon.peft_files import PEFT_CONFIG, PEFTS, is_pefts, own_names, peft_files
from batching import PromptConfig, PromptFormat
from engine.batches import IGNORE
from engine.checkpoints import read_checkpoint
from engine.placement import ONE_DEVICE, SpreadConfig, check_spread, device_of
from engine.sharding import Sharding, shard_llm
from host import HostConfig, HostError, check_family, host_fingerprint, lora_layers
from model import OLD_DEFAULTS, AdapterConfig, AdapterController, HRMAddonConfig, HRMController
from text_data.frames import Frame, kept_frame

ADAPTER = "adapter_model"  # file stem of the weights in a checkpoint
ADAPTER_CONFIG = PEFT_CONFIG  # the record of HRM and of checkpoints of earlier versions
ADAPTER_RECORD = "adapter_record.json"  # the record beside peft's own file of the name above
ANYWHERE = ("eager", "sdpa")  # attention that every machine has
CONTROLLERS = {HRMAddonConfig: HRMController, BaselineConfig: BaselineController}


def config_class(adapter: str) -> type[AdapterConfig]:
    """The config that describes `--adapter`."""
    return HRMAddonConfig if adapter in ("hrm", "mlp") else BaselineConfig


def build_controller(host: HostConfig, config: AdapterConfig, device: str, sharding: Sharding | None = None
                     ) -> AdapterController:
    """A new adapter with the settings of `config` on the LLM that `host` names; `device` is torch's name of one.

    With `sharding` all processes of the run call this together, and share the LLM.

    Raises:
        HostError: as `host.load_host`; more LoRA layers than the LLM has; an LLM that the adapter cannot run in.
    """
    kind = CONTROLLERS[type(config)]
    dtype, _ = pick_dtype(host, device)
    spread = SpreadConfig(host.device_map, host.max_memory)
    if sharding is not None:
        spread = SpreadConfig(is_sharded=True, is_empty=not sharding.reads_files)
    controller = kind.from_base(
        host.model_name, host.load_in, host.trust_remote_code, device, dtype, host.revision, host.attn_implementation,
        spread, **config.settings(),
    )
    if sharding is not None:
        layers = [layer for _, layer in lora_layers(controller.host)]
        shard_llm(controller, controller.host, layers, sharding, torch.device(device))
        check_family(controller.host, host.model_name, host.load_in)
    check_forward(controller)
    return controller


@torch.no_grad()
def check_forward(controller: AdapterController) -> None:
    """Runs a short text through LLM and adapter, so that what a family cannot do is told before anything is trained.

    Random state and mode stay as they were.

    Raises:
        HostError: the forward pass fails.
    """
    device = device_of(controller)
    ids = torch.arange(1, 9, device=device)[None] % controller.config.get_text_config().vocab_size
    was_training = controller.training
    controller.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            controller(input_ids=ids, labels=ids.masked_fill(ids < 6, IGNORE))
    except Exception as error:  # of whatever kind: a family's forward is foreign code
        reason = " ".join(str(error).split())[:200]
        raise HostError(
            f"--model_name {controller.config.base_model_name}: {controller.title} cannot run in a model of the family "
            f"{controller.host.config.model_type} ({reason}): change the adapter's flags or choose another base model"
        ) from error
    finally:
        controller.train(was_training)


# --- the document -----------------------------------------------------------------------------------------------------


def adapter_document(controller: AdapterController, prompt: PromptConfig, frame: Frame | None = None,
                     precision: str = "none") -> str:
    """JSON text from which an adapter can be rebuilt: its shape, the LLM and all that its numbers depend on.

    `frame` is what was written around each question; None leaves it to the tokenizer's template. `precision` is that of
    the adapter's autocast in training and evaluation: none, bf16 or fp16.
    """
    document = {
        **controller.shape(),
        "base_model_name_or_path": controller.config.base_model_name,
        "base_revision": getattr(controller.host.config, "_commit_hash", None),  # of the hub; None for a folder
        "base_fingerprint": host_fingerprint(controller.host),
        "host_dtype": host_dtype(controller.host),
        "load_in": load_in(controller.host),
        "attn_implementation": attention_of(controller.host),
        "mixed_precision": precision,
        "prompt": dataclasses.asdict(prompt),
    }
    if frame is not None:
        document["frame"] = dataclasses.asdict(frame)
    return json.dumps(document, indent=2)


def adapter_documents(controller: AdapterController, prompt: PromptConfig, frame: Frame | None = None,
                      precision: str = "none") -> dict[str, str]:
    """File name -> text of a checkpoint's record, and of the file that peft writes of its own kinds.

    Raises:
        CheckpointError: as `peft_files`.
    """
    record = adapter_document(controller, prompt, frame, precision)
    if not is_pefts(controller.config):
        return {ADAPTER_CONFIG: record}
    _, text = peft_files(controller)
    return {ADAPTER_CONFIG: text, ADAPTER_RECORD: record}


def adapter_weights(controller: AdapterController) -> dict[str, Tensor]:
    """What a checkpoint keeps of an adapter, by peft's names where it is peft's kind. Raises as `peft_files`."""
    if is_pefts(controller.config):
        return peft_files(controller)[0]
    return controller.addon_state()


def record_of(documents: Mapping[str, str]) -> dict[str, Any]:
    """The record among a checkpoint's documents.

    An older one does not say how the LLM was quantised: the flags of its run do.
    """
    record = json.loads(documents[ADAPTER_RECORD] if ADAPTER_RECORD in documents else documents[ADAPTER_CONFIG])
    if "load_in" not in record:
        flags = options.read_resolved(documents["config.resolved.yaml"]) if "config.resolved.yaml" in documents else {}
        record["load_in"] = flags.get("load_in", "none")
    return record


def trained_revision(documents: Mapping[str, str], name: str) -> str | None:
    """The hub's commit of the LLM `name` that a checkpoint of these documents was trained on; None: not known."""
    if ADAPTER_CONFIG not in documents:
        return None
    record = record_of(documents)
    if record.get("base_model_name_or_path") != name:
        return None
    return record.get("base_revision")


def saved_format(
    document: dict[str, Any], tokenizer: Any, rows: int, config: PromptConfig | None = None
) -> tuple[PromptFormat, str | None]:
    """(the prompt format that an adapter was trained with, a note where the template renders another one today).

    Args:
        document: the adapter's.
        tokenizer: that of its LLM.
        rows: rows of the LLM's embedding table.
        config: what is wanted now; with another style or header than the adapter's, the frame is rendered anew. None:
            the adapter's own.

    Raises:
        ValueError: as `PromptFormat`.
    """
    trained = PromptConfig(**document["prompt"])
    config = config or trained

    wishes = ("prompt_style", "system_header", "chat_template", "chat_template_kwargs")
    if any(getattr(config, name) != getattr(trained, name) for name in wishes):
        return PromptFormat(tokenizer, config, rows), None

    # The file of a template need not be where the checkpoint is: its text was kept.
    template = (document.get("frame") or {}).get("template")
    if template:
        tokenizer.chat_template = template
    frame, note = kept_frame(document.get("frame"), tokenizer, config.prompt_style, config.system_header)
    return PromptFormat(tokenizer, config, rows, frame), note


def adapter_of(document: dict[str, Any]) -> str:
    """The `--adapter` that an adapter document describes."""
    settings = document["hrm"] if "hrm" in document else document["baseline"]
    return settings.get("adapter", "hrm")


def check_adapter(controller: AdapterController, document: dict[str, Any], folder: Path) -> None:
    """Raises ValueError when the checkpoint in `folder` holds another kind of adapter."""
    theirs = adapter_of(document)
    ours = controller.config.adapter
    if theirs != ours:
        raise ValueError(f"{folder} holds an adapter of kind {theirs}, not {ours}: pass --adapter {theirs}")


def check_fingerprint(host: PreTrainedModel, document: dict[str, Any], folder: Path) -> None:
    """Raises ValueError naming how this base model differs from the one the checkpoint was trained on."""
    ours = host_fingerprint(host)
    theirs = dict(document["base_fingerprint"])
    if document.get("host_dtype", host_dtype(host)) != host_dtype(host):
        del theirs["head_digest"]  # weights rounded in another way have another one

    differences = []
    for key, value in theirs.items():
        if ours.get(key) != value:
            differences.append(f"{key} {ours[key]} (checkpoint: {value})")

    if differences:
        raise ValueError(
            f"{folder} was trained on another base model, {document['base_model_name_or_path']}: this one has "
            f"{', '.join(differences)}; pass --model_name {document['base_model_name_or_path']}"
        )


def check_read_only(document: dict[str, Any], folder: Path) -> None:
    """Raises ValueError where the adapter in `folder` needs more of its LLM than one that is spread can give."""
    reason = ""
    if document["load_in"] != "none":
        reason = f"its LLM is packed in {document['load_in']}, and stays on one device"
    elif adapter_of(document) in PEFTS or document.get("hrm", {}).get("lora_layers"):
        reason = "what was trained lies inside the LLM, and accelerate's hooks do not see it"
    if reason:
        raise ValueError(f"--device_map auto does not work with {folder}: {reason}; leave it out")


# --- loading ----------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(record, tensors by the controller's names) of a verified checkpoint. Raises ValueError (CheckpointError)."""
    saved = read_checkpoint(folder, stems=[ADAPTER])
    return record_of(saved.documents), own_names(saved.tensors[ADAPTER])


def load_controller(folder: Path, device: str = "cpu", trust_remote_code: bool = False,
                    spread: SpreadConfig = ONE_DEVICE) -> tuple[AdapterController, dict[str, Any]]:
    """The controller of a checkpoint of any adapter, in evaluation mode, and its adapter document.

    Raises:
        ValueError: a broken checkpoint, a base model that is missing or another one, or one that cannot be spread so.
    """
    document, tensors = read_adapter(folder)
    check_spread(spread, device)
    if spread.device_map != "none":
        check_read_only(document, folder)
    return _controller(folder, document, tensors, device, trust_remote_code, spread), document


def load_adapter(
    folder: Path, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[HRMController, dict[str, Any]]:
    """As `load_controller`, of HRM or its single pass alone.

    Raises:
        ValueError: as `load_controller`; a checkpoint of a baseline.
    """
    document, tensors = read_adapter(folder)
    if "hrm" not in document:
        raise ValueError(f"{folder} holds a {adapter_of(document)} baseline: load it with "
                         "addon.adapters.load_controller")
    return _controller(folder, document, tensors, device, trust_remote_code), document


def _controller(folder: Path, document: dict[str, Any], tensors: dict[str, Tensor], device: str,
                trust_remote_code: bool, spread: SpreadConfig = ONE_DEVICE) -> AdapterController:
    """The controller that `document` describes, with the weights of `tensors`."""
    if "hrm" in document:
        # A setting that an older version left out has the value it had then.
        config: AdapterConfig = HRMAddonConfig(**OLD_DEFAULTS | document["hrm"])
    else:
        config = BaselineConfig(**document["baseline"])
    host = HostConfig(
        document["base_model_name_or_path"],
        load_in=document["load_in"],
        host_dtype=document.get("host_dtype", "stored"),  # older versions kept what is saved
        attn_implementation=document.get("attn_implementation"),  # and took transformers' choice
        trust_remote_code=trust_remote_code,
        revision=document.get("base_revision"),  # the commit of its training
        device_map=spread.device_map,
        max_memory=spread.max_memory,
    )
    controller = _with_attention(host, config, device, folder)
    check_fingerprint(controller.host, document, folder)
    controller.load_addon_state(tensors)
    return controller.eval()


def _with_attention(host: HostConfig, config: AdapterConfig, device: str, folder: Path) -> AdapterController:
    """`build_controller`, with transformers' choice of attention where this machine lacks that of the training.

    A line on stderr then says so. An attention of the hub is code, which runs only where that is allowed.
    """
    name = host.attn_implementation
    if name in (None, *ANYWHERE):
        return build_controller(host, config, device)

    reason = "it is code of the hub: add --trust_remote_code"
    if "/" not in name or host.trust_remote_code:
        try:
            return build_controller(host, config, device)
        except HostError as error:
            reason = " ".join(str(error).split())[:200]

    controller = build_controller(dataclasses.replace(host, attn_implementation=None), config, device)

    print(f"WARNING: {folder} was trained with --attn_implementation {name}, and its LLM computes with "
          f"{attention_of(controller.host)} here, which rounds in another way ({reason})", file=sys.stderr)
    return controller
