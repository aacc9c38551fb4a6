"""Tiny caches of hidden states on disk: what they are made of, in shards of a few items, and how one is damaged."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
import torch

import options
from addon import cache_plan, cache_shards
from addon.cache_plan import CacheConfig, plan_cache
from addon.hidden_cache import HiddenCache, cache_key
from addon.streams import training_examples
from batching import PromptConfig, PromptFormat
from host import load_tokenizer
from reasoning_gym_wrapper import Reserve, make_tasks
from tiny_families import randomise
from tiny_runs import ROOT, arguments, controller_of

ITEMS = 30


class Parts:
    """What a cache is made of, on the tiny host: controller, format, items, one batch of them."""

    def __init__(self, host: Path, *more: str):
        words = [*arguments(host, ROOT), "--cache_hidden", "ram", "--train_n", str(ITEMS), "--ema", "0", *more]
        self.opts = options.parse(words)
        torch.manual_seed(0)
        self.model = randomise(controller_of(self.opts), size=0.05)
        self.format = PromptFormat(load_tokenizer(str(host)), options.part(PromptConfig, self.opts))
        tasks = make_tasks(["toy_add", "chain_sum"], "small")
        self.examples = training_examples(tasks, Reserve(tasks, 4), 0, ITEMS).examples
        self.batch = self.format.batch(self.examples[:8])

    def cache(self, folder: Path | None, **more) -> HiddenCache:
        """A cache in the folder, or in RAM."""
        kind = {"cache_hidden": "disk", "cache_dir": str(folder)} if folder else {}
        config = options.part(CacheConfig, options.replace(self.opts, **kind))
        plan = plan_cache(config, self.model.host.config, self.format, self.examples)
        return HiddenCache(cache_key(self.model, self.format.tokenizer, plan), plan, self.format, **more)

    def features(self, cache: HiddenCache) -> torch.Tensor:
        return cache.encoder(self.model, cache.key)(self.batch).features


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@contextlib.contextmanager
def in_small_shards():
    """Inside, shards as in `small_shards`, and items that take a while to read."""
    plain = HiddenCache._states

    def slow(*arguments):
        time.sleep(0.1)
        return plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_plan, "FILL_BATCH", 3)
        patch.setattr(cache_shards, "SHARD_BYTES", 9000)
        patch.setattr(HiddenCache, "_states", slow)
        yield


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
