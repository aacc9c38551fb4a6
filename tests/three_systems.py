"""A few steps of a tiny trainer of each system; as a script, one of the processes that share the global batches.

    python -m torch.distributed.run --nproc_per_node 2 tests/three_systems.py HOST OUT.json

Four micro-batches make a global batch, whatever the number of processes: a process takes its share of them. Nothing
that a step draws at random may differ between processes, so that one process must log what two log.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DistributedDataParallelKwargs  # noqa: E402

import options  # noqa: E402
from batching import PromptFormat  # noqa: E402
from engine.optimization import BaseTrainer, OptimConfig  # noqa: E402
from enhanced.model import create_hrm_model_and_tokenizer  # noqa: E402
from enhanced.tokenizer import reasoning_tokenizer  # noqa: E402
from enhanced.training import EnhancedStepConfig, EnhancedTrainer, token_batch  # noqa: E402
from host import load_tokenizer  # noqa: E402
from hybrid.training import HybridStepConfig, HybridTrainer  # noqa: E402
from reasoning_gym_wrapper import Reserve, make_tasks  # noqa: E402
from tiny_hybrid import batch_of, tiny, triples  # noqa: E402
from tiny_runs import TINY, tiny_model, tiny_trainer  # noqa: E402

STEPS = 3
SIZES = (3, 1, 2, 4)  # examples of each micro-batch: unlike, so that a mean of means is not the mean
OPTIM = OptimConfig(optimizer="adamw", lr=1e-2, ema=0.0)


def micro_batches(items: list) -> list[list]:
    """The items cut into micro-batches of `SIZES`."""
    ends = [sum(SIZES[: index + 1]) for index in range(len(SIZES))]
    return [items[end - size : end] for size, end in zip(SIZES, ends, strict=True)]


def addon(host: Path, accelerator: Accelerator) -> tuple[BaseTrainer, list[Any]]:
    """The add-on with a halting head, over two segments."""
    opts = options.parse([*TINY, "--use_act", "--act_penalty", "0.1", "--segments", "2", "--optimizer", "adamw"])
    model = tiny_model(host, use_act=True, segments=2)
    examples = Reserve(make_tasks(["toy_add"], "default"), sum(SIZES)).examples
    prompt_format = PromptFormat(load_tokenizer(str(host)))
    trainer = tiny_trainer(opts, model, accelerator=accelerator)
    return trainer, [prompt_format.batch(part) for part in micro_batches(examples)]


def hybrid(host: Path, accelerator: Accelerator) -> tuple[BaseTrainer, list[Any]]:
    """The hybrid with every loss; its gate opens at the second step."""
    config = HybridStepConfig(hrm_gate_warmup_steps=1, deep_supervision=True, use_halting=True)
    trainer = HybridTrainer(config, OPTIM, tiny(), accelerator, "none")
    return trainer, [batch_of(part) for part in micro_batches(triples(sum(SIZES)))]


def enhanced(host: Path, accelerator: Accelerator) -> tuple[BaseTrainer, list[Any]]:
    """The planner/worker LM. Of two cycles there is one earlier one to draw, and every token is in the sample."""
    torch.manual_seed(0)
    model, tokenizer = create_hrm_model_and_tokenizer(
        32, 2, 2, 1, 1, 8, tokenizer=reasoning_tokenizer(str(host)), exit_sample=10_000
    )
    prompt_format = PromptFormat(tokenizer)
    trainer = EnhancedTrainer(EnhancedStepConfig(), OPTIM, model, accelerator, "none", prompt_format)
    questions = [f"What is {a} + {a * a}?" for a in range(sum(SIZES))]
    answers = [str(a + a * a) for a in range(sum(SIZES))]
    pairs = zip(micro_batches(questions), micro_batches(answers), strict=True)
    return trainer, [token_batch(prompt_format, *pair) for pair in pairs]


SYSTEMS = {"addon": addon, "hybrid": hybrid, "enhanced": enhanced}


def logged(name: str, host: Path) -> list[dict[str, float]]:
    """What each step of a system logs, in this process as one of all."""
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if name == "hybrid" else []
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
    trainer, batches = SYSTEMS[name](host, accelerator)
    own = batches[accelerator.process_index :: accelerator.num_processes]
    return [trainer.step(own, step, lr=1e-2) for step in range(STEPS)]


if __name__ == "__main__":
    found = {name: logged(name, Path(sys.argv[1])) for name in SYSTEMS}
    if Accelerator(cpu=True).is_main_process:
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
