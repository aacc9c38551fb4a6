"""A cache of past tokens with room for those to come: transformers' own copies all of it for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens that a full layer makes room for, or half as many as it holds, whichever is more


class GrowingLayer(DynamicLayer):
    """Keys and values (B, heads, tokens, e) as the first tokens of tensors that have room for more.

    It holds what `DynamicLayer` holds, bit for bit. Whatever else replaces its keys and values (beams that change
    places, rows that leave, tokens that are cropped) is noticed at the next token.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer.update`; with gradient nothing is written in place."""
        if torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)
            self.keys = key_states[..., :0, :]
            self.values = value_states[..., :0, :]
        assert self.keys is not None and self.values is not None
        self.keys = self._extended("keys", self.keys, key_states)
        self.values = self._extended("values", self.values, value_states)
        return self.keys, self.values

    def _extended(self, name: str, past: Tensor, new: Tensor) -> Tensor:
        """`past` and behind it `new`, which is written into the room there is, or into a larger one."""
        held = past.shape[-2]
        end = held + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or end > room.shape[-2] or not _begins(room, past):
            size = end + max(ROOM, end // 2)
            room = past.new_empty(*past.shape[:-2], size, past.shape[-1])
            room[..., :held, :] = past
            self._rooms[name] = room
        room[..., held:end, :] = new
        return room[..., :end, :]

    def reset(self) -> None:
        """Forgets all tokens."""
        self._rooms = {}
        super().reset()


def _begins(room: Tensor, past: Tensor) -> bool:
    """Whether `past` is the first tokens of `room` itself, not a copy of them or another choice of rows."""
    same = room.data_ptr() == past.data_ptr() and room.stride() == past.stride()
    return same and room.shape[:-2] == past.shape[:-2] and room.shape[-1] == past.shape[-1]


def with_room(cache: Any) -> None:
    """Gives the empty layers of a new `DynamicCache` room to grow; layers of other kinds stay as they are."""
    if type(cache) is not DynamicCache:
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()
