"""Training speed of HRM, with and without its cache of hidden states, against LoRA, prompt tuning and a single pass.

    python scripts/benchmark_adapters.py                                   # both LLMs, about 3 minutes on 2 idle cores
    python scripts/benchmark_adapters.py --hosts embedded --repeats 7 --embedded_steps 8
    python scripts/benchmark_adapters.py --hosts qwen2-0.5b --large_batch 4 --large_steps 2 --num_threads 2

LLMs: the embedded one, and with random weights one of Qwen2.5-0.5B's or 1.5B's shape, in bfloat16. One process, one
machine; the arms take turns, in another order in each repeat, and ratios are taken within a repeat. Shown are medians
with the smallest and largest value seen. A step is a whole training step (forward, backward, optimizer, average);
drawing and tokenizing items is left out, as it is the same for all. LoRA's rank is the one that comes nearest HRM's
number of parameters. `limit` is what HRM would gain if the frozen forward pass, whose share is shown, cost nothing.
Memory is what the process (or the GPU) held at most beyond the loaded LLM, hidden-state cache included.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402

import options  # noqa: E402
from addon.baselines import BaselineConfig, BaselineController  # noqa: E402
from addon.cache_plan import GB, CacheConfig, plan_cache  # noqa: E402
from addon.hidden_cache import HiddenCache, cache_key  # noqa: E402
from addon.param_matching import lora_parameters  # noqa: E402
from addon.streams import training_examples  # noqa: E402
from addon.train_batches import TrainBatches  # noqa: E402
from batching import Batch, PromptConfig, PromptFormat  # noqa: E402
from engine.files import write_text_aside  # noqa: E402
from engine.machine import pick_device, pick_precision  # noqa: E402
from engine.optimization import OptimConfig  # noqa: E402
from host import DEFAULT_HOST, freeze, load_host, load_tokenizer  # noqa: E402
from model import AdapterController, HRMAddonConfig, HRMController  # noqa: E402
from reasoning_gym_wrapper import Reserve, default_tasks, make_tasks  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402
from training import AddonStepConfig, Trainer  # noqa: E402

ARMS = ("hrm cached", "hrm", "mlp", "lora", "prompt")
FROZEN = "frozen forward"
EMBEDDED = "embedded"
SHAPES = {  # of the configs of Qwen/Qwen2.5-0.5B and Qwen/Qwen2.5-1.5B
    "qwen2-0.5b": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "qwen2-1.5b": {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
}
HOSTS = (EMBEDDED, *SHAPES)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--hosts", default=f"{EMBEDDED},qwen2-0.5b", help=f"comma list among {', '.join(HOSTS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--embedded_batch", type=int, default=32, help="examples a step on the embedded LLM")
    parser.add_argument("--embedded_steps", type=int, default=4, help="steps of each arm in a repeat")
    parser.add_argument("--large_batch", type=int, default=4, help="the same for an LLM of Qwen2.5's shape")
    parser.add_argument("--large_steps", type=int, default=1)
    parser.add_argument("--train_n", type=int, default=64, help="items, all of which the cache keeps")
    parser.add_argument("--d_h", type=int, default=128, help="width of HRM")
    parser.add_argument("--segments", type=int, default=1, help="segments of HRM, each supervised")
    parser.add_argument("--virtual_tokens", type=int, default=20, help="of prompt tuning")
    parser.add_argument("--task_config", default="small", choices=("small", "default"))
    parser.add_argument("--num_threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"),
                        help="cpu = seconds of this process on all cores, for a machine that others use, too")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmark.json", help="JSON of all figures")
    asked = parser.parse_args(argv)
    unknown = set(asked.hosts.split(",")) - set(HOSTS)
    if unknown:
        parser.error(f"--hosts {asked.hosts}: {', '.join(sorted(unknown))} is unknown: choose among {', '.join(HOSTS)}")
    numbers = ("repeats", "embedded_batch", "embedded_steps", "large_batch", "large_steps", "train_n", "segments",
               "virtual_tokens")
    for name in numbers:
        if getattr(asked, name) < 1:
            parser.error(f"--{name} {getattr(asked, name)} must be at least 1")
    if asked.d_h < 8 or asked.d_h % 8:
        parser.error(f"--d_h {asked.d_h} must be a multiple of 8")
    return asked


# --- memory -----------------------------------------------------------------------------------------------------------


class Peak:
    """Most bytes held beyond those at the start; None where the system does not tell."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        if platform.system() == "Linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed by other arms must not hide this one's
        self.before = psutil.Process().memory_info().rss
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: the high-water mark begins anew
            self.known = True
        except OSError:
            self.known = False

    def read(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        if not self.known:
            return None
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 - self.before


# --- arms -------------------------------------------------------------------------------------------------------------


@dataclass
class Arm:
    """One way to train, ready to step."""

    name: str
    trainer: Trainer
    title: str
    parameters: int
    peak: int | None = None  # bytes
    speeds: list[float] = field(default_factory=list)  # examples a second, one a repeat


def random_qwen2(shape: str) -> Any:
    """A causal LM of one of `SHAPES` with random weights."""
    config = transformers.Qwen2Config(**SHAPES[shape], max_position_embeddings=2048)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def frozen_host(name: str, device: str) -> Any:
    """One of `HOSTS`, frozen, on `device`."""
    torch.manual_seed(0)
    host = load_host(DEFAULT_HOST, device=device) if name == EMBEDDED else random_qwen2(name).to(device)
    freeze(host)
    return host


def twin(host: Any) -> Any:
    """The same LLM with the same weights in memory, to which LoRA may be added."""
    weights = {id(tensor): tensor for tensor in (*host.parameters(), *host.buffers())}
    return copy.deepcopy(host, weights)


def training_options(asked: argparse.Namespace, adapter: str) -> options.Options:
    """The parser's defaults but for what was asked."""
    words = ["--adapter", adapter, "--train_n", str(asked.train_n)]
    if adapter in ("hrm", "mlp"):
        words += ["--d_h", str(asked.d_h)]
    if adapter == "hrm":
        words += ["--segments", str(asked.segments), "--segments_sampling", "fixed", "--supervised_segments", "0"]
    if adapter == "prompt":
        words += ["--virtual_tokens", str(asked.virtual_tokens)]
    return options.parse(words)


def controller(opts: options.Options, host: Any) -> AdapterController:
    """The adapter of the options on a loaded LLM."""
    if opts.adapter in ("hrm", "mlp"):
        return HRMController(options.part(HRMAddonConfig, opts, base_config=host.config), host)
    config = options.part(BaselineConfig, opts, base_config=host.config)
    return BaselineController(config, twin(host) if opts.adapter == "lora" else host)


def items(asked: argparse.Namespace, size: int, device: torch.device) -> tuple[PromptFormat, list[Any], list[Batch]]:
    """(format, training items, batches of one epoch): the default tasks, read by the embedded LLM's tokenizer."""
    tasks = make_tasks(default_tasks(), asked.task_config)
    stream = training_examples(tasks, Reserve(tasks, 8), 0, asked.train_n)
    prompt_format = PromptFormat(load_tokenizer(DEFAULT_HOST))
    batches = TrainBatches(stream, prompt_format, size)
    return prompt_format, stream.examples, [next(batches).to(device) for _ in range(max(asked.train_n // size, 1))]


def matched_rank(host: Any, wanted: int) -> int:
    """The LoRA rank whose number of parameters is nearest to `wanted`."""
    with torch.device("meta"):
        shape = transformers.AutoModelForCausalLM.from_config(host.config).requires_grad_(False)
    return max(round(wanted / lora_parameters(shape)), 1)


def build_arms(asked: argparse.Namespace, host: Any, prompt_format: PromptFormat, examples: list[Any],
               batches: list[Batch], accelerator: Accelerator, precision: str) -> tuple[list[Arm], dict[str, float]]:
    """Every arm after its first steps, and what the cache took (GB, seconds to fill)."""
    arms, facts, rank = [], {}, 1
    for name in (ARMS[1], *ARMS):  # the first, which pays for what libraries set up, is thrown away
        adapter, *cached = name.split()
        opts = options.replace(training_options(asked, adapter), lora_rank=rank)
        peak = Peak(accelerator.device)
        torch.manual_seed(0)
        model = controller(opts, host).to(accelerator.device)
        parts = [options.part(kind, opts) for kind in (AddonStepConfig, OptimConfig, PromptConfig)]
        trainer = Trainer(*parts, model, accelerator, precision)
        held = 0
        if cached:
            plan = plan_cache(options.part(CacheConfig, opts, cache_hidden="ram"), host.config, prompt_format, examples)
            key = cache_key(model, prompt_format.tokenizer, plan)
            cache = HiddenCache(key, plan, prompt_format)
            trainer.encode = cache.encoder(model, key)
            trainer.encode(batches[0])
            facts = {"cache_gb": cache.store.nbytes / GB, "fill_seconds": cache.fill_seconds}
            held, peak = cache.store.nbytes, Peak(accelerator.device)  # filling is done once, in larger batches
        count = sum(p.numel() for p in trainer.parameters.values())
        if adapter == "hrm":
            rank = matched_rank(host, count)
        longest = max(batches, key=lambda batch: batch.input_ids.numel())
        for step in range(2):
            trainer.step([longest], step, opts.lr)
        read = peak.read()
        arms.append(Arm(name, trainer, model.title, count, None if read is None else read + held))
        print(f"  {name}: ready", file=sys.stderr, flush=True)
    return arms[1:], facts


# --- measuring --------------------------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Waits for a GPU, whose work would else be timed with whoever comes next."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Any, batches: list[Batch], steps: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Examples a second of `work(batch, step)` over `steps` batches."""
    synchronise(device)
    started, seen = clock(), 0
    for step in range(steps):
        batch = batches[step % len(batches)]
        work(batch, step)
        seen += len(batch.examples)
    synchronise(device)
    return seen / (clock() - started)


def measure(arms: list[Arm], batches: list[Batch], steps: int, asked: argparse.Namespace, device: torch.device
            ) -> list[float]:
    """Fills the arms' speeds; returns those of the frozen forward pass alone."""
    plain, forward = next(arm.trainer for arm in arms if arm.name == "hrm"), []
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[asked.clock]

    def encode(batch: Batch, step: int) -> None:
        with plain.autocast():
            plain.controller.encode(batch)

    for repeat in range(asked.repeats):
        turn = repeat % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            trainer = arm.trainer
            trainer.wrapped.train()

            def step(batch: Batch, number: int, trainer: Trainer = trainer) -> None:
                trainer.step([batch], number, 1e-4)

            arm.speeds.append(timed(step, batches, steps, device, clock))
        forward.append(timed(encode, batches, steps, device, clock))
    return forward


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarise(arms: list[Arm], forward: list[float], facts: dict[str, float]) -> dict[str, Any]:
    """Figures of one LLM; ratios and shares are of the same repeat."""
    speeds = {arm.name: arm.speeds for arm in arms}
    shares = [own / frozen for own, frozen in zip(speeds["hrm"], forward, strict=True)]
    share = statistics.median(speeds["hrm"]) / statistics.median(forward)
    rows = {arm.name: {
        "adapter": arm.title,
        "parameters": arm.parameters,
        "examples_per_second": spread(arm.speeds),
        "times_hrm": spread([a / b for a, b in zip(arm.speeds, speeds["hrm"], strict=True)]),
        "times_lora": spread([a / b for a, b in zip(arm.speeds, speeds["lora"], strict=True)]),
        "peak_gb": None if arm.peak is None else arm.peak / GB,
    } for arm in arms}
    return {"arms": rows, FROZEN: spread(forward), "frozen_share": spread(shares),
            "limit": 1 / (1 - share) if share < 1 else None, **facts}


def table(name: str, found: dict[str, Any], batch: int, tokens: float, clock: str) -> str:
    """The figures of one LLM, fixed width."""
    def shown(values: dict[str, float], form: str) -> str:
        return f"{values['median']:{form}} [{values['low']:{form}}, {values['high']:{form}}]"

    lines = [("arm", "adapter", "parameters", f"examples/{clock} s", "times HRM", "times LoRA", "peak GB")]
    for arm, row in found["arms"].items():
        peak = "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
        lines.append((arm, row["adapter"], f"{row['parameters']:,}", shown(row["examples_per_second"], ".1f"),
                      shown(row["times_hrm"], ".2f"), shown(row["times_lora"], ".2f"), peak))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    share = {key: 100 * value for key, value in found["frozen_share"].items()}
    limit = "an unknown factor (too noisy)" if found["limit"] is None else f"{found['limit']:.2f} times"
    text += [f"frozen forward: {shown(found[FROZEN], '.1f')} examples/s, {shown(share, '.0f')} % of an uncached HRM "
             f"step, so a cache gains at most {limit}",
             f"cache: {found['cache_gb']:.4f} GB, filled in {found['fill_seconds']:.1f} s"]
    return "\n".join([f"{name}: batches of {batch}, {tokens:.0f} tokens an example", *text])


def main() -> int:
    asked = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if asked.num_threads:
        torch.set_num_threads(asked.num_threads)
    device = pick_device(asked.device)
    accelerator, precision = Accelerator(cpu=device == "cpu"), pick_precision("auto", device)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "device": device, "precision": precision, "torch": torch.__version__, "load": os.getloadavg()[0]}
    everything: dict[str, Any] = {
        "machine": machine, "asked": {name: str(value) for name, value in vars(asked).items()}, "hosts": {}}
    for name in asked.hosts.split(","):
        print(f"{name}: loading", file=sys.stderr, flush=True)
        large = name != EMBEDDED
        host = frozen_host(name, device)
        size, steps = (asked.large_batch, asked.large_steps) if large else (asked.embedded_batch, asked.embedded_steps)
        prompt_format, examples, batches = items(asked, size, accelerator.device)
        tokens = sum(int(b.attention_mask.sum()) for b in batches) / sum(len(b.examples) for b in batches)
        arms, facts = build_arms(asked, host, prompt_format, examples, batches, accelerator, precision)
        found = summarise(arms, measure(arms, batches, steps, asked, accelerator.device), facts)
        found |= {"batch": size, "steps": steps, "tokens_per_example": tokens,
                  "host_parameters": sum(p.numel() for p in host.parameters() if not p.requires_grad)}
        everything["hosts"][name] = found
        print(table(name, found, size, tokens, asked.clock), flush=True)
        del arms, host
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_aside(asked.output, json.dumps(everything, indent=1) + "\n", "--output")
    print(f"written: {asked.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
