"""`--match_params N`: the width, rank or number of virtual tokens with which an adapter has N trainable parameters.

Counts are those of the real modules, built on torch's meta device from the LLM's config alone: no weight is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from addon.baselines import BaselineConfig
from addon.host_dtype import meta_host
from engine.memory import check_memory
from host import HostConfig, add_lora, decoder_layers
from model import AdapterConfig, HRMAddon, HRMAddonConfig

LARGE = 1024  # widths and ranks up to it are not asked for their memory
TOLERANCE = 0.05  # largest distance from the wanted number, as a share of it


@dataclass(frozen=True)
class Size:
    """One way to size an adapter: the flag that holds it, its smallest value and its step, and what a value costs."""

    flag: str
    low: int
    step: int
    count: Callable[[int], int]  # trainable parameters, never falling
    high: int | None = None
    limit: str = ""  # where `high` comes from, for the user

    def nearest(self, wanted: int) -> list[tuple[int, int]]:
        """The (value, parameters) on either side of `wanted`, ascending; one pair where it is met or out of range."""
        # Doubling finds a number of steps that costs enough, halving then the smallest such number.
        top = None if self.high is None else max((self.high - self.low) // self.step, 0)
        last = 1
        while self._cost(last) < wanted and (top is None or last < top):
            last *= 2
        if top is not None:
            last = min(last, top)
        first = 0
        while first < last:
            middle = (first + last) // 2
            if self._cost(middle) < wanted:
                first = middle + 1
            else:
                last = middle

        places = [first] if first == 0 else [first - 1, first]
        pairs = [(self.low + self.step * place, self._cost(place)) for place in places]
        return [pair for pair in pairs if pair[1] == wanted] or pairs

    def _cost(self, steps: int) -> int:
        """Parameters at `steps` above the smallest value."""
        return self.count(self.low + self.step * steps)


@dataclass(frozen=True)
class Match:
    """The size that comes nearest to the wanted number of parameters."""

    flag: str  # d_h, lora_rank or virtual_tokens
    value: int
    parameters: int
    line: str  # for the user


def trainable(module: torch.nn.Module) -> int:
    """Parameters that ask for gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def lora_parameters(host: Any, layers: int | None = None) -> int:
    """Parameters of LoRA of rank 1 on the top `layers` layers, all when None, which `host` (on meta) has afterwards.

    Rank r has r times as many.
    """
    add_lora(host, len(decoder_layers(host)[1]) if layers is None else layers, 1)
    return trainable(host)


def addon_parameters(config: HRMAddonConfig, host: Any, d_h: int) -> int:
    """Parameters of the HRM, or single pass, that `config` describes, at width `d_h`, without LoRA beside it."""
    sized = HRMAddonConfig(base_config=host.config, **config.settings() | {"d_h": d_h})
    text = host.config.get_text_config()
    with torch.device("meta"):
        width = host.get_output_embeddings().weight.shape[-1]
        addon = HRMAddon(sized, width, text.num_hidden_layers, text.vocab_size)
    addon.core.halt.requires_grad_(config.use_act)
    return trainable(addon)


def size_of(host: HostConfig, config: AdapterConfig, max_seq_len: int) -> Size:
    """How an adapter is sized. Raises HostError as `host.load_config`."""
    if isinstance(config, HRMAddonConfig):
        return _width(host, config)
    assert isinstance(config, BaselineConfig) and config.adapter != "none", "nothing trains, so nothing has a size"
    model = meta_host(host)
    if config.adapter == "lora":
        each = lora_parameters(model)
        return Size("lora_rank", 1, 1, lambda rank: rank * each)

    # Virtual tokens stand before a prompt: together they must fit the LLM's positions.
    width = model.get_input_embeddings().weight.shape[-1]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = None if positions is None else max(positions - max_seq_len, 1)
    limit = f", no more tokens fit the {positions} positions beside --max_seq_len {max_seq_len}"
    return Size("virtual_tokens", 1, 1, lambda tokens: tokens * width, room, limit)


def _width(host: HostConfig, config: HRMAddonConfig) -> Size:
    """The width of an HRM or single pass: a multiple of twice its heads, at least 8."""
    model = meta_host(host)
    step = 2 * config.n_heads
    beside = 0
    if config.lora_layers:
        beside = config.lora_rank * lora_parameters(meta_host(host), config.lora_layers)

    @functools.cache
    def count(d_h: int) -> int:
        return addon_parameters(config, model, d_h) + beside

    lowest = -(-8 // step) * step
    return Size("d_h", lowest, step, count)


def check_size(host: HostConfig, config: AdapterConfig, max_seq_len: int) -> None:
    """Raises ValueError for a large adapter that this machine has no memory for; loads nothing."""
    sizes = [getattr(config, flag, 0) for flag in ("d_h", "lora_rank", "virtual_tokens")]
    if getattr(config, "adapter", "hrm") == "none" or max(sizes) <= LARGE:
        return
    size = size_of(host, config, max_seq_len)
    check_memory(size.count(getattr(config, size.flag)))


def match(host: HostConfig, config: AdapterConfig, match_params: int, max_seq_len: int) -> Match:
    """The value of d_h, lora_rank or virtual_tokens that gives the adapter `match_params` parameters.

    Args:
        host: the LLM that the adapter sits on.
        config: the adapter's other settings.
        match_params: wanted number of trainable parameters.
        max_seq_len: most tokens of a prompt, which virtual tokens leave room for.

    Raises:
        ValueError: no value comes within 5 %, with the nearest ones; or as `host.load_config`.
    """
    size = size_of(host, config, max_seq_len)
    pairs = size.nearest(match_params)
    value, parameters = min(pairs, key=lambda pair: abs(pair[1] - match_params))

    if abs(parameters - match_params) > TOLERANCE * match_params:
        near = " and ".join(f"{count:,} (--{size.flag} {at})" for at, count in pairs)
        verb = "are" if len(pairs) > 1 else "is"
        is_at_the_top = size.high is not None and pairs[-1][0] >= size.high
        limit = size.limit if is_at_the_top and parameters < match_params else ""
        raise ValueError(
            f"--match_params {match_params}: adapter {config.adapter} cannot come within 5 %: nearest {verb} {near}"
            f"{limit}; ask for one of these"
        )

    share = 100 * (parameters / match_params - 1)
    line = (
        f"--match_params {match_params}: --{size.flag} {value} gives {parameters:,} trainable parameters "
        f"({share:+.1f} %)"
    )
    return Match(size.flag, value, parameters, line)
