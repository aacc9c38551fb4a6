"""Any causal LM read token by token: its decoder run on a cache of past tokens, and whether that gives what it should.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.placement import device_of, to_device

MOST_APART = 0.1  # of the states' norm: rounding in half precision stays far below, a wrong state far above


class UnfitError(ValueError):
    """The LLM cannot be read token by token; the message is one line for the user."""


def position_arguments(decoder: nn.Module, positions: Tensor) -> dict[str, Tensor]:
    """`positions` (B, N) as keyword arguments for a decoder's forward; none where the family takes no positions."""
    return {"position_ids": positions} if "position_ids" in arguments_of(decoder) else {}


def arguments_of(decoder: nn.Module) -> frozenset[str]:
    """Names of what a decoder's forward takes, looked up once a class: it is asked at every token."""
    if "forward" in vars(decoder):  # replaced in this module alone, as for a spread LLM
        return frozenset(inspect.signature(decoder.forward).parameters)
    return _arguments_of(type(decoder).forward)


@functools.lru_cache(maxsize=16)
def _arguments_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def run_decoder(decoder: nn.Module, cache: Any = None, **arguments: Any) -> tuple[Any, Any]:
    """(output, cache) of a decoder's forward on the tokens behind those that `cache` holds; None begins anew.

    Families whose state is no list of keys and values (Mamba2) take and return it as `cache_params`, and cannot count
    its tokens: they are counted here, see `cached_tokens`.
    """
    name = "past_key_values"
    if name not in arguments_of(decoder):
        name = "cache_params"
    past = cached_tokens(cache)

    # The parts of a spread LLM compute on several devices; its states come back to that of the tokens.
    given: Any = arguments.get("input_ids", arguments.get("inputs_embeds"))
    device = device_of(decoder)
    arguments = {key: to_device(value, device) for key, value in arguments.items()}
    out = decoder(**{name: cache}, **arguments)
    out.last_hidden_state = out.last_hidden_state.to(given.device)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = to_device(out.hidden_states, given.device)
    cache = getattr(out, name, None)
    if cache is not None:
        cache.tokens_read = past + out.last_hidden_state.shape[1]
    return out, cache


def cached_tokens(cache: Any) -> int:
    """Tokens that a cache holds; 0 for None."""
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except ValueError:  # a cache of recurrent states alone holds no row per token
        return getattr(cache, "tokens_read", 0)


@torch.no_grad()
def check_cache(host) -> None:
    """Reads a short text at once, and token by token behind pads: a family for which these differ cannot answer.

    Raises:
        UnfitError: they differ, or the family keeps no cache of past tokens, or cannot read so.
    """
    unfit = f"model family {host.config.model_type} cannot be the host of an add-on: "
    advice = "; choose another base model, see docs/hosts.md"
    ids = torch.arange(1, 9, device=device_of(host))[None]
    ids = ids % host.config.get_text_config().vocab_size
    try:
        whole = host.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        pieces = _read_by_token(host.base_model, ids)
    except Exception as error:  # of whatever kind: a family's forward is foreign code
        reason = " ".join(str(error).split())[:200]
        raise UnfitError(f"{unfit}it cannot read a text token by token ({reason}){advice}") from error

    if pieces is None:
        raise UnfitError(f"{unfit}it keeps no cache of past tokens{advice}")
    apart = float((pieces - whole).norm() / whole.norm())
    if not apart < MOST_APART:  # nan is not below
        raise UnfitError(
            f"{unfit}a padded text read token by token gives other states than read at once ({apart:.0%} apart){advice}"
        )


def _read_by_token(decoder: nn.Module, ids: Tensor) -> Tensor | None:
    """Last hidden states (1, 8, D) of ids (1, 8), read as `generate` does; None where no cache is kept.

    First a prompt of two pads and three tokens, then one token at a time.
    """
    padded = torch.cat([ids[:, :2], ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)

    cache = None
    pieces = []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
        arguments = {"input_ids": padded[:, start:end], "attention_mask": mask[:, :end], "use_cache": True}
        arguments |= position_arguments(decoder, positions[:, start:end])
        out, cache = run_decoder(decoder, cache, **arguments)
        if cache is None:
            return None
        pieces.append(out.last_hidden_state.float())

    return torch.cat(pieces, dim=1)[:, 2:]
