"""Two processes that share the tiny LLM with LoRA inside: what each of them holds, and what the LLM gives.

    python tests/sharded_llm.py HOST OUT.json

OUT.json has a list for each way of sharding, with what every process reports. Nothing trains here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from addon import adapters  # noqa: E402
from addon.baselines import BaselineConfig  # noqa: E402
from engine.sharding import Sharding, held_bytes, idle_turns, is_part  # noqa: E402
from host import HostConfig, lora_layers  # noqa: E402

WORLD = 2
WAYS = {
    "plain": Sharding(),
    "kept_whole_until_backward": Sharding(reshard=False),
    "offloaded": Sharding(offload=True),
    "one_loads": Sharding(first_loads=True),
}


def report(host: str, rank: int, sharding: Sharding | None) -> dict[str, Any]:
    """What this process holds and computes; None: the LLM whole."""
    seen: dict[str, Any] = {}
    if sharding is not None:
        shard = adapters.shard_llm

        def watched(model, *rest):
            seen["stand_ins"] = sum(parameter.is_meta for parameter in model.parameters())
            shard(model, *rest)

        adapters.shard_llm = watched
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(sharding.first_loads)

    torch.manual_seed(0)
    config = BaselineConfig(adapter="lora", lora_rank=2)
    model = adapters.build_controller(HostConfig(host), config, "cpu", sharding).eval()
    if sharding is not None:
        adapters.shard_llm = shard

    frozen = [p for _, layer in lora_layers(model.host) for p in layer.parameters() if not p.requires_grad]
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    answers = model.generate(input_ids=ids[:1], max_new_tokens=2 + 3 * rank, do_sample=False)  # one is done before
    held, whole = held_bytes(model)
    return {
        **seen,
        "held": held,
        "whole": whole,
        "layers_held": sum(p.to_local().nbytes if is_part(p) else p.nbytes for p in frozen),
        "layers_whole": sum(p.numel() * p.element_size() for p in frozen),
        "trained_parts": sum(is_part(p) for p in model.parameters() if p.requires_grad),
        "logits": logits.double().sum(dim=(0, 1))[:8].tolist(),
        "answer": answers[0, 6:].tolist(),
        "idle": idle_turns(model, 3 - rank),
    }


def process(host: str, rank: int, store: str, out: Path) -> None:
    """One of the processes; writes its reports."""
    os.environ.update(LOCAL_RANK=str(rank), ACCELERATE_USE_FSDP="true")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    found = {name: report(host, rank, way) for name, way in WAYS.items()}
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    found["whole"] = report(host, rank, None)
    out.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    out = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(WORLD):
            child = os.fork()
            if not child:
                status = 1
                try:
                    process(sys.argv[1], rank, f"{folder}/store", out.with_suffix(f".{rank}"))
                    status = 0
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    if any(statuses):
        sys.exit(1)
    reports = [json.loads(out.with_suffix(f".{rank}").read_text(encoding="utf-8")) for rank in range(WORLD)]
    found = {name: [report[name] for report in reports] for name in reports[0]}
    out.write_text(json.dumps(found), encoding="utf-8")
