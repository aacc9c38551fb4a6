"""What training from a full cache needs of the frozen LLM, kept beside the cache: its head and some embeddings.

A training step reads cached states, embeds tokens of the cached items, and asks the head for logits. `keep_head` writes
these two beside a cache; `find_head` finds them for a run that never loads the LLM, and `controller_on` builds the
adapter on them (`HeadAlone`). Embeddings are kept as the LLM's own module gives them, scaling and all.

A cache's key holds a digest of all the LLM's weights, which nobody can compute who has not loaded them. So that digest
is kept, too: whoever reads the cache makes the key anew from it and from what it sees itself (items, tokenizer, flags),
and compares the LLM's files, or its name, with those of the filling run.
Shapes: K tokens that occur in the items, D LLM width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from addon.cache_plan import GB, CachePlan
from addon.cache_shards import NAMED, checksum, folder_of
from addon.hidden_cache import key_of
from addon.host_dtype import attention_of, host_dtype, host_parameters
from engine.files import reason_of, write_bytes_aside
from engine.placement import device_of, real_tensor
from host import freeze, resolve_name, weight_files
from model import AdapterConfig, HRMAddonConfig, HRMController

FILE = "head.safetensors"
PIECES = 1024  # of each file of weights, that its digest looks at
PIECE = 4096  # bytes
ADVICE = "delete it, and write it again with --cache_mode fill"


class HeadError(ValueError):
    """No head is kept that serves; the message is one line for the user."""


@dataclass(frozen=True)
class HeadFacts:
    """What is kept of an LLM beside its head.

    weights: digest of all its weights as they were held.
    model_name, commit: as the filling run named it, and the hub's commit of it, "" for a folder.
    files: digest of parts of its files, "" where they lay on the hub.
    host_dtype: what its weights were held in.
    parameters: how many it has.
    attention: how it computed attention; None in files of earlier versions.
    """

    weights: str
    model_name: str
    commit: str
    files: str
    host_dtype: str
    parameters: int
    attention: str | None = None

    def flags(self, attention: str | None) -> dict[str, str | None]:
        """The flags by which the LLM was held and computed; `attention`, where one is typed, comes first."""
        return {"host_dtype": self.host_dtype, "attn_implementation": attention or self.attention}


@dataclass(frozen=True)
class KeptHead:
    """A head that was found: its file, the key of the cache that it lies beside, what is known of its LLM."""

    path: Path
    key: str
    facts: HeadFacts


def files_digest(name: str) -> str:
    """Digest of parts of every file of weights in a model's folder; "" where they are not in one."""
    folder = resolve_name(name)
    paths = weight_files(folder) if Path(folder).is_dir() else []

    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())

        # Training changes nearly every number, so parts of each file tell.
        with open(path, "rb") as file:
            for start in range(0, size, max(size // PIECES, PIECE)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest() if paths else ""


def head_bytes(host_config: Any) -> int:
    """At most so many bytes a head and the embeddings take."""
    text = host_config.get_text_config()
    return 2 * 4 * text.vocab_size * text.hidden_size


# --- keeping ----------------------------------------------------------------------------------------------------------


def check_keepable(host: PreTrainedModel) -> None:
    """Raises HeadError for an LLM whose head is more than a linear map."""
    head = host.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise HeadError(f"--cache_mode fill keeps a head that is a linear map, and that of {host.config.model_type} is "
                        f"a {type(head).__name__}: use --cache_mode both")


@torch.no_grad()
def keep_head(controller: HRMController, plan: CachePlan, key: str, weights: str, pad_id: int) -> int:
    """Writes the head, and the embeddings of the items' tokens and of pads, beside the cache. Returns the bytes.

    Args:
        controller: whose LLM.
        plan, key: of the cache.
        weights: digest of all the LLM's weights, as it is in the key.
        pad_id: the token of pads.

    Raises:
        HeadError: as `check_keepable`.
        WriteError: the disk refuses.
    """
    import safetensors.torch

    host = controller.host
    check_keepable(host)
    head = host.get_output_embeddings()
    ids = torch.tensor(sorted({pad_id}.union(*plan.rows)))
    rows = controller.embed(ids.to(device_of(controller))[None])[0]

    tensors = {"ids": ids, "rows": rows, "weight": real_tensor(head)}
    if head.bias is not None:
        tensors["bias"] = real_tensor(head, "bias")
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}

    name = controller.config.base_model_name
    facts = HeadFacts(
        weights, name, getattr(host.config, "_commit_hash", None) or "", files_digest(name),
        host_dtype(host), host_parameters(host), attention_of(host),
    )
    record = {"key": key, "facts": json.dumps(asdict(facts))}
    record["crc32"] = _crc(record, tensors)
    content = safetensors.torch.save(tensors, metadata=record)
    write_bytes_aside(folder_of(plan, key) / FILE, content, "--cache_dir")
    return len(content)


def _crc(record: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """CRC-32 of all that a file says."""
    said = zlib.crc32(f"{record['key']}{record['facts']}".encode())
    return f"{said:08x}{checksum(tensors)}"


# --- finding ----------------------------------------------------------------------------------------------------------


def find_head(plan: CachePlan, tokenizer: Any, name: str, commit: str | None, dtype: str) -> KeptHead:
    """The head beside the cache of a plan, found without the LLM.

    Args:
        plan: what the run would cache.
        tokenizer: the LLM's.
        name, commit: of the LLM that the run names.
        dtype: what its weights shall have been held in; auto = whatever.

    Raises:
        HeadError: there is none, only of another LLM or dtype, a damaged one, or several.
    """
    assert plan.config.cache_dir is not None  # told before: a cache on disk has a folder
    folder = Path(plan.config.cache_dir)
    of_items = []
    damaged = []
    for path in sorted(folder.glob(f"{plan.items_digest[:NAMED]}-*/{FILE}")):
        head = _read_facts(path)
        if isinstance(head, HeadError):
            damaged.append(head)
            continue
        key = key_of(head.facts.weights, plan.config.hrm_read, tokenizer, plan)
        if key == head.key and folder_of(plan, key) == path.parent:
            of_items.append(head)
    if damaged and not of_items:
        raise damaged[0]
    if not of_items:
        raise HeadError(f"--cache_mode train finds no cache of these {len(plan.rows)} items in --cache_dir {folder}: "
                        "fill one with --cache_mode fill and otherwise the same flags")

    # Caches of several LLMs may lie there, and of one that was held in several ways.
    files = files_digest(name)
    of_llm = [head for head in of_items if _is_of(head.facts, name, commit or "", files)]
    if not of_llm:
        other = of_items[0]
        raise HeadError(f"--model_name {name} is not the LLM that filled {other.path.parent}, "
                        f"{other.facts.model_name}: name that one, or fill a cache of yours with --cache_mode fill")

    return _held_in(of_llm, name, folder, dtype)


def _held_in(of_llm: list[KeptHead], name: str, folder: Path, dtype: str) -> KeptHead:
    """The one of an LLM's heads in `folder` that is held in `dtype`. Raises HeadError unless there is one."""
    held = [head for head in of_llm if dtype in ("auto", head.facts.host_dtype)]
    names = " and ".join(sorted({head.facts.host_dtype for head in of_llm}))
    if not held:
        raise HeadError(f"--host_dtype {dtype}: {of_llm[0].path.parent} was filled by an LLM held in {names}: leave "
                        "the flag out")

    if len({head.facts.host_dtype for head in held}) > 1:
        raise HeadError(f"--cache_dir {folder} holds caches of these items by the LLM held in {names}: choose one with "
                        "--host_dtype")
    if len(held) > 1:
        places = " and ".join(str(head.path.parent) for head in held)
        raise HeadError(f"several LLMs that --model_name {name} may mean filled {places}: delete what you do not want, "
                        "or fill another --cache_dir")
    return held[0]


def _is_of(facts: HeadFacts, name: str, commit: str, files: str) -> bool:
    """Whether a cache was filled by the LLM that a run names: by its files, else its commit, else its name."""
    if files and facts.files:
        return files == facts.files
    if commit and facts.commit:
        return commit == facts.commit and name == facts.model_name
    return Path(name).name == Path(facts.model_name).name


def _read_facts(path: Path) -> KeptHead | HeadError:
    """What a file says of its LLM; what is wrong where it says nothing that can be read."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = file.metadata() or {}
        return KeptHead(path, record["key"], HeadFacts(**json.loads(record["facts"])))
    except (safetensors.SafetensorError, OSError) as error:
        return HeadError(f"{path} is damaged ({reason_of(error)}): {ADVICE}")
    except (KeyError, ValueError, TypeError):
        return HeadError(f"{path} is damaged (it does not say of what it is): {ADVICE}")


# --- an LLM that is not in memory -------------------------------------------------------------------------------------


class KeptRows(nn.Module):
    """Embeddings of the tokens `ids` (K,), ascending; `weight` (K, D) is what the LLM's own table gave for them."""

    ids: Tensor

    def __init__(self, ids: Tensor, rows: Tensor):
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.weight = nn.Parameter(rows, requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(..., D) of tokens (...), all of which are kept: they are those of cached items."""
        return self.weight[torch.searchsorted(self.ids, input_ids.contiguous())]


class HeadAlone(PreTrainedModel):
    """An LLM of which the head and a few embeddings are in memory, and no layer."""

    config_class = PreTrainedConfig
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: Any, embeddings: KeptRows, head: nn.Linear, facts: HeadFacts):
        super().__init__(config)
        self.embeddings = embeddings
        self.head = head
        self.parameters_noted = facts.parameters  # of the whole LLM
        self.attention_noted = facts.attention
        self.generation_config = GenerationConfig()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: the weights are the LLM's."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Raises RuntimeError: there is nothing to run."""
        raise RuntimeError("the LLM's layers are not in memory: --cache_mode train reads what they computed")


def controller_on(head: KeptHead, config: AdapterConfig, host_config: Any, name: str, device: str) -> HRMController:
    """A new adapter with the settings of `config` on an LLM that is not in memory, which `name` names.

    Raises:
        HeadError: the file is damaged.
    """
    tensors = _read_tensors(head)
    weight = tensors["weight"]
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
    linear.load_state_dict({part: tensors[part] for part in ("weight", "bias") if part in tensors}, assign=True)

    # As `from_base` builds it on a whole LLM: what is added begins with the same random numbers.
    host = HeadAlone(host_config, KeptRows(tensors["ids"], tensors["rows"]), linear, head.facts).to(device)
    freeze(host)
    controller = HRMController(
        HRMAddonConfig(base_config=host.config, base_model_name=name, **config.settings()), host
    )
    controller.model.addon.to(device)
    return controller


def _read_tensors(head: KeptHead) -> dict[str, Tensor]:
    """The tensors of a kept head, in memory of their own. Raises HeadError where they are not what was written."""
    import safetensors

    try:
        with safetensors.safe_open(head.path, framework="pt") as file:
            record = file.metadata() or {}
            # Copied: products of weights at an address that is not aligned may differ in their last bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise HeadError(f"{head.path} is damaged ({reason_of(error)}): {ADVICE}") from error

    if record.get("crc32") != _crc(record, tensors):
        raise HeadError(f"{head.path} is damaged (its content does not have its checksum): {ADVICE}")
    return tensors


def size_text(head: KeptHead) -> str:
    """What is in memory in place of the LLM, for the user."""
    return (f"the LLM ({head.facts.parameters / 1e6:.1f} M parameters) is not loaded: its head and the embeddings that "
            f"are needed, {head.path.stat().st_size / GB:.3f} GB, come from {head.path}")
