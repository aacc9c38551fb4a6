"""CPU seconds of training steps on a random LLM beside what scripts/cost_model.py makes of its sizes.

    python scripts/benchmark_cost.py
    python scripts/benchmark_cost.py --width 2048 --layers 2 --d_h 512

One thread, float32. The model counts the products of a step; their number is divided by the speed that this processor
has in large products, measured in turn with the steps. Shown are medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_memory import ROOT, random_llm
from cost_model import Addon, Llm
from script_tools import ScriptParser, run_script

SIDE = 1024  # of the matrices that the speed is measured with


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    sizes = {"width": 1024, "layers": 4, "vocabulary": 8192, "d_h": 256, "batch_size": 16, "repeats": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(argv)
    if args.width % 64 or args.width < 64 or args.vocabulary < 2048 or min(vars(args).values()) < 1:
        parser.error("--width must be a multiple of 64, --vocabulary at least 2048, the others at least 1")
    return args


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def prepared(args: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any]:
    """(trainer, controller, a batch of sums) on a random LLM, which is written to `folder`."""
    import torch  # here and below: --help needs none of it
    from accelerate import Accelerator

    import options
    from addon.adapters import build_controller
    from addon_run import adapter_config
    from batching import PromptConfig, PromptFormat
    from engine.optimization import OptimConfig
    from host import HostConfig, load_tokenizer
    from reasoning_gym_wrapper import make_tasks
    from training import AddonStepConfig, Trainer

    random_llm(folder, args.width, args.layers, args.vocabulary)
    words = f"--model_name {folder} --d_h {args.d_h} --host_dtype fp32 --device cpu --mixed_precision none"
    opts = options.parse(words.split())
    torch.manual_seed(0)
    model = build_controller(options.part(HostConfig, opts), adapter_config(opts), "cpu")
    parts = [options.part(kind, opts) for kind in (AddonStepConfig, OptimConfig, PromptConfig)]
    trainer = Trainer(*parts, model, Accelerator(cpu=True), "none")

    (task,) = make_tasks(["chain_sum"], "small")
    examples = [example for _, example in itertools.islice(task.items(0), args.batch_size)]
    prompt_format = PromptFormat(load_tokenizer(str(folder)), options.part(PromptConfig, opts))
    return trainer, model, prompt_format.batch(examples)


def measured(trainer: Any, model: Any, batch: Any, repeats: int) -> dict[str, float]:
    """Median CPU seconds of a large product, of the LLM's forward pass, of a step without and with it."""
    import torch

    states = model.encode(batch)
    square = torch.randn(SIDE, SIDE)

    def cached() -> None:
        trainer.encode = lambda batch: states
        trainer.step([batch], 1, 1e-4)

    def whole() -> None:
        trainer.encode = model.encode
        trainer.step([batch], 1, 1e-4)

    # The first of each makes what later ones find.
    works = {"square": lambda: square @ square, "encode": lambda: model.encode(batch), "cached": cached, "whole": whole}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            spent = seconds(work)
            if repeat:
                taken[name].append(spent)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> int:
    args = parse()
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cost-") as place:
        trainer, model, batch = prepared(args, Path(place))
    median = measured(trainer, model, batch, args.repeats)

    # What the model makes of the same sizes.
    llm = Llm(args.width, args.layers, args.width // 64, args.width // 64, 4 * args.width, args.vocabulary, qkv_bias=0)
    addon = Addon(d_h=args.d_h)
    size = (len(batch.examples), batch.prompt_ids.shape[1], batch.labels.shape[1])
    counted = {
        "encode": size[0] * llm.flops(size[1] + size[2] - 1),
        "cached": addon.step_flops(llm, *size, cached=True),
        "whole": addon.step_flops(llm, *size, cached=False),
    }

    rate = 2 * SIDE**3 / median["square"]
    print(f"{size[0]} texts of {size[1]} and {size[2]} tokens; large products: {rate / 1e9:.0f} GFLOP/s")
    for name, flops in counted.items():
        print(f"{name:7} {flops / 1e9:8.2f} GFLOP  expected {flops / rate:.3f} s  took {median[name]:.3f} s  "
              f"({median[name] * rate / flops:.2f} times)")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
