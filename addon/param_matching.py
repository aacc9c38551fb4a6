"""`--match_params N`: the width, rank or number of virtual tokens with which an adapter has N trainable parameters.

Counts are those of the real modules, built on torch's meta device from the LLM's config alone: no weight is loaded.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from host import add_lora, decoder_layers, load_config
from model import HRMAddon, HRMAddonConfig

TOLERANCE = 0.05


@dataclass(frozen=True)
class Size:
    """One way to size an adapter: the flag that holds it, its smallest value and its step, and what a value costs."""

    flag: str
    low: int
    step: int
    count: Callable[[int], int]  # trainable parameters, never falling
    high: int | None = None
    limit: str = ""  # what `high` comes from, for the user

    def nearest(self, wanted: int) -> list[tuple[int, int]]:
        """The (value, parameters) on either side of `wanted`, ascending; one pair where it is met or out of range."""
        steps = 1
        top = None if self.high is None else max((self.high - self.low) // self.step, 0)
        while self.count(self.low + self.step * steps) < wanted and (top is None or steps < top):
            steps *= 2
        first, last = 0, steps if top is None else min(steps, top)
        while first < last:  # the first value that costs at least `wanted`
            middle = (first + last) // 2
            if self.count(self.low + self.step * middle) < wanted:
                first = middle + 1
            else:
                last = middle
        values = [self.low + self.step * place for place in (first - 1, first) if place >= 0]
        pairs = [(value, self.count(value)) for value in values]
        return [pair for pair in pairs if pair[1] == wanted] or pairs


def trainable(module: torch.nn.Module) -> int:
    """Parameters that ask for gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def meta_host(opts: argparse.Namespace) -> Any:
    """The LLM of the options without its weights. Raises HostError as `host.load_config`."""
    from transformers import AutoModelForCausalLM

    config = load_config(opts.model_name, opts.trust_remote_code)
    with torch.device("meta"):
        host = AutoModelForCausalLM.from_config(config, trust_remote_code=opts.trust_remote_code)
    return host.requires_grad_(False)


def lora_parameters(host: Any, layers: int | None = None) -> int:
    """Parameters of LoRA of rank 1 on the top `layers` layers, all when None, which `host` (on meta) has afterwards.

    Rank r has r times as many.
    """
    add_lora(host, len(decoder_layers(host)[1]) if layers is None else layers, 1)
    return trainable(host)


def addon_parameters(opts: argparse.Namespace, host: Any, d_h: int) -> int:
    """Parameters of the HRM, or single pass, of width `d_h`, without LoRA beside it."""
    names = [name for name in inspect.signature(HRMAddonConfig).parameters if hasattr(opts, name)]
    settings = {name: getattr(opts, name) for name in names} | {"d_h": d_h, "verifier_head": opts.verifier_weight > 0}
    config, text = HRMAddonConfig(base_config=host.config, **settings), host.config.get_text_config()
    with torch.device("meta"):
        width = host.get_output_embeddings().weight.shape[-1]
        addon = HRMAddon(config, width, text.num_hidden_layers, text.vocab_size)
    addon.core.halt.requires_grad_(opts.use_act)
    return trainable(addon)


def size_of(opts: argparse.Namespace) -> Size:
    """How the adapter of the options is sized. Raises HostError as `host.load_config`."""
    if opts.adapter == "lora":
        each = lora_parameters(meta_host(opts))
        return Size("lora_rank", 1, 1, lambda rank: rank * each)
    if opts.adapter == "prompt":
        host = meta_host(opts)
        width = host.get_input_embeddings().weight.shape[-1]
        positions = getattr(host.config.get_text_config(), "max_position_embeddings", None)
        room = None if positions is None else max(positions - opts.max_seq_len, 1)
        told = f", no more tokens fit the {positions} positions beside --max_seq_len {opts.max_seq_len}"
        return Size("virtual_tokens", 1, 1, lambda tokens: tokens * width, room, told)
    host, beside, step = meta_host(opts), 0, 2 * opts.n_heads
    if opts.lora_layers:
        beside = opts.lora_rank * lora_parameters(meta_host(opts), opts.lora_layers)
    known: dict[int, int] = {}

    def count(d_h: int) -> int:
        if d_h not in known:
            known[d_h] = addon_parameters(opts, host, d_h) + beside
        return known[d_h]

    return Size("d_h", -(-8 // step) * step, step, count)


def match(opts: argparse.Namespace) -> tuple[dict[str, int], str]:
    """({d_h, lora_rank or virtual_tokens: the value that gives the adapter `match_params` parameters}, what to tell).

    Raises:
        ValueError: no value comes within 5 %, with the nearest ones; or as `host.load_config`.
    """
    wanted, size = opts.match_params, size_of(opts)
    pairs = size.nearest(wanted)
    value, found = min(pairs, key=lambda pair: abs(pair[1] - wanted))
    if abs(found - wanted) > TOLERANCE * wanted:
        near = " and ".join(f"{count:,} (--{size.flag} {at})" for at, count in pairs)
        limit = size.limit if size.high is not None and pairs[-1][0] >= size.high and found < wanted else ""
        raise ValueError(f"--match_params {wanted}: adapter {opts.adapter} cannot come within 5 %: nearest "
                         f"{'are' if len(pairs) > 1 else 'is'} {near}{limit}; ask for one of these")
    told = (f"--match_params {wanted}: --{size.flag} {value} gives {found:,} trainable parameters "
            f"({100 * (found / wanted - 1):+.1f} %)")
    return {size.flag: value}, told
