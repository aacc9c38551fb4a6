"""LoRA and virtual tokens on disk: written by peft's own `save_pretrained`, so that plain peft reads the folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from addon.baselines import BaselineConfig, BaselineController
from engine.checkpoints import CheckpointError
from engine.files import reason_of

PEFTS = ("lora", "prompt")  # the values of --adapter that are peft's own kinds
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."  # of every name of LoRA's that peft writes
_PROMPT = "prompt_embeddings"


def library_of(adapter: str) -> str:
    """The library that a model card may name for `--adapter`; "" where none but this program loads the folder."""
    return "peft" if adapter in PEFTS else ""


def peft_files(controller: BaselineController) -> tuple[dict[str, Tensor], str]:
    """(tensors by peft's names, text of adapter_config.json) as peft's own `save_pretrained` writes them.

    Raises:
        CheckpointError: the folder for temporary files cannot be written.
    """
    import safetensors.torch

    try:
        with tempfile.TemporaryDirectory(prefix="hrm_peft_") as folder:
            # Without a look at the LLM's embeddings, for which peft would ask the hub.
            controller.peft_model().save_pretrained(folder, save_embedding_layers=False)
            tensors = safetensors.torch.load((Path(folder) / PEFT_WEIGHTS).read_bytes())
            text = (Path(folder) / PEFT_CONFIG).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"peft cannot write its files into {tempfile.gettempdir()}: {reason_of(error)}; free space there, or set "
            "TMPDIR to another folder"
        ) from error
    return tensors, text


def own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder under the names that the controller has for them.

    Names of earlier versions, which are the controller's, stay as they are.
    """
    named = {}
    for name, tensor in tensors.items():
        if name == _PROMPT:
            name = "prompt.embedding.weight"
        elif name.startswith(_PEFT_PREFIX):
            inner = name.removeprefix(_PEFT_PREFIX)
            name = "host." + inner.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        named[name] = tensor
    return named


def is_pefts(config: Any) -> bool:
    """Whether an adapter's config describes one of peft's kinds."""
    return isinstance(config, BaselineConfig) and config.adapter in PEFTS
