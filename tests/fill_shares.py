"""Fills a cache on disk of the tiny host as one of several processes, and writes down what it read.

    python -m torch.distributed.run --nproc_per_node 2 tests/fill_shares.py HOST CACHE_DIR OUT

Each process writes OUT/RANK.json: the items that it read, the shards that it wrote, the sum of a batch's features.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from addon.cache_shards import ShardStore  # noqa: E402
from addon.hidden_cache import HiddenCache  # noqa: E402
from tiny_cache import Parts, in_small_shards  # noqa: E402


def main(host: str, folder: str, out: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    parts = Parts(Path(host))
    items, shards = [], []
    read, write = HiddenCache._states, ShardStore._write

    def noted_read(self, controller, which):
        items.extend(range(which.start, min(which.stop, len(self.plan.rows))))
        return read(self, controller, which)

    def noted_write(self, shard, tensors):
        shards.append(shard.number)
        write(self, shard, tensors)

    HiddenCache._states, ShardStore._write = noted_read, noted_write
    time.sleep(2 * rank)  # whoever begins earlier leaves the others' shares alone
    with in_small_shards():
        cache = parts.cache(Path(folder), share=(rank, world))
        total = float(parts.features(cache).double().sum())
    result = {"items": items, "shards": shards, "of": len(cache.store.shards), "total": total}
    (Path(out) / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
