"""One CUDA GPU checked and measured in one run of a few minutes, alone: the file that docs/performance.md quotes.

    python scripts/benchmark_gpu.py                                        # docs/results/gpu.json
    python scripts/benchmark_gpu.py --device cpu --hosts embedded --steps 2 --repeats 1 --output /tmp/cpu.json

    agreement   the embedded LLM with an add-on: loss and gradient of one batch on the GPU against the CPU in fp32
    training    `python train.py` on the embedded LLM in fp32, bf16 and fp16: the last loss, alike in all
    speed       for LLMs of Qwen2.5's shapes, as scripts/benchmark_adapters.py: an uncached step in bare forward passes
                (the aim is at most 1.5), a cached step in steps of LoRA (at least 10), memory
    decoding    tokens a second with HRM against the bare LLM's own `generate`, same batch, dtype and length
    compiled    a segment of HRM under `torch.compile` against the same without, forward and backward

With --device cpu the same is measured there: that shows whether the command works, not what a GPU does. Each part that
fails leaves its error in the file in place of figures, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402

import benchmark_adapters as adapters  # noqa: E402
import options  # noqa: E402
from engine.decoding import Decoding  # noqa: E402
from engine.files import write_text_aside  # noqa: E402
from engine.machine import pick_precision  # noqa: E402
from evaluation import generate_answers  # noqa: E402
from host import DEFAULT_HOST, freeze, load_host  # noqa: E402
from model import HRMAddonConfig, HRMController  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402

NEW_TOKENS = 32
CLOSE = 1e-3  # relative difference of loss and gradient in fp32, CPU against GPU
ALIKE = 0.1  # relative difference of the last losses in two precisions


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--hosts", default=",".join(adapters.SHAPES), help=f"comma list among {adapters.HOSTS}")
    parser.add_argument("--batch", type=int, default=16, help="examples a step, and answers at a time")
    parser.add_argument("--steps", type=int, default=8, help="steps of each arm in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train_steps", type=int, default=60, help="of `python train.py`, in each precision")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "gpu.json")
    args = parser.parse_args(argv)
    args.hosts = args.hosts.split(",")
    unknown = set(args.hosts) - set(adapters.HOSTS)
    if unknown:
        parser.error(f"--hosts {', '.join(sorted(unknown))} is unknown: choose among {', '.join(adapters.HOSTS)}")
    for name in ("batch", "steps", "repeats", "train_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not legal: expected at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA GPU that torch sees: --device cpu shows whether the command works")
    return args


def asked_of(args: argparse.Namespace) -> argparse.Namespace:
    """The same as a command line of benchmark_adapters.py."""
    words = ["--train_n", str(4 * args.batch), "--repeats", str(args.repeats), "--device", args.device]
    return adapters.parse(words)


def add_on(host: Any, device: str) -> HRMController:
    """The default add-on on `host`, its injector opened: at its start it writes zeros."""
    torch.manual_seed(0)
    controller = HRMController(options.part(HRMAddonConfig, options.parse([]), base_config=host.config), host)
    torch.nn.init.normal_(controller.model.addon.injector.out.weight, std=0.02)
    return controller.to(device)


# --- parts ------------------------------------------------------------------------------------------------------------


def agreement(args: argparse.Namespace) -> dict[str, float]:
    """Loss and gradient norm of one batch in fp32, on the CPU and on the device. Raises ValueError: they differ."""
    found = {}
    for device in ("cpu", args.device):
        host = load_host(DEFAULT_HOST, device=device, host_dtype="fp32")
        freeze(host)
        controller = add_on(host, device).train()
        _, _, batches = adapters.items(asked_of(args), args.batch, torch.device(device))
        out = controller.segment(controller.encode(batches[0]), batches[0].labels)
        out.loss.backward()
        squares = [p.grad.square().sum() for p in controller.addon_parameters().values() if p.grad is not None]
        found["device" if found else "cpu"] = (out.loss.item(), float(torch.stack(squares).sum().sqrt()))

    for one, other, name in zip(*found.values(), ("loss", "gradient"), strict=True):
        if abs(one - other) > CLOSE * abs(one):
            raise ValueError(f"{name} is {one} on the CPU and {other} on {args.device}")
    return {"loss_cpu": found["cpu"][0], "loss": found["device"][0],
            "gradient_cpu": found["cpu"][1], "gradient": found["device"][1]}


def training(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The last loss of a short run in each precision of the device. Raises ValueError: a run failed, or is far off."""
    found: dict[str, dict[str, float]] = {}
    for precision in ("none", "bf16", "fp16") if args.device == "cuda" else ("none", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, str(ROOT / "train.py"), "--device", args.device, "--mixed_precision", precision,
                 "--max_steps", str(args.train_steps), "--warmup_steps", "5", "--eval_n", "32", "--save_dir", folder,
                 "--run_name", "gpu"],
                capture_output=True, text=True, cwd=folder,
            )
            if done.returncode:
                raise ValueError(f"train.py in {precision} ended with {done.returncode}: {done.stderr[-400:]}")
            lines = (Path(folder) / "gpu" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        found[precision] = {"loss": losses[-1], "seconds": time.monotonic() - began}
        if not abs(losses[-1] - found["none"]["loss"]) <= ALIKE * found["none"]["loss"]:
            raise ValueError(f"the loss in {precision} is {losses[-1]}, in fp32 {found['none']['loss']}")
    return found


def speed(args: argparse.Namespace, host: Any) -> dict[str, Any]:
    """What benchmark_adapters.py measures of one LLM, and the two ratios that are aimed at."""
    asked = asked_of(args)
    accelerator = Accelerator(cpu=args.device == "cpu")
    prompt_format, examples, batches = adapters.items(asked, args.batch, accelerator.device)
    precision = pick_precision("auto", args.device)
    arms, facts = adapters.build_arms(asked, host, prompt_format, examples, batches, accelerator, precision)
    forward = adapters.measure(arms, batches, args.steps, asked, accelerator.device)

    found = adapters.summarise(arms, forward, facts)
    found["step_in_forwards"] = 1 / found["frozen_share"]["median"]
    found["cached_in_lora_steps"] = found["arms"]["hrm cached"]["times_lora"]["median"]
    return found


def decoding(args: argparse.Namespace, host: Any) -> dict[str, float]:
    """Tokens a second of answers of `NEW_TOKENS` tokens, with HRM and bare."""
    prompt_format, examples, _ = adapters.items(asked_of(args), args.batch, torch.device(args.device))
    questions = [example.question for example in examples[: args.batch]]
    controller = add_on(host, args.device).eval()
    greedy = Decoding()
    speeds: dict[str, list[float]] = {"hrm": [], "bare": []}
    for repeat in range(args.repeats + 1):
        for name, model in (("hrm", controller), ("bare", host)):
            adapters.synchronise(torch.device(args.device))
            began = time.perf_counter()
            generate_answers(model, prompt_format, questions, NEW_TOKENS, greedy, torch.device(args.device),
                             min_new_tokens=NEW_TOKENS)
            adapters.synchronise(torch.device(args.device))
            if repeat:  # the first pays for what libraries set up
                speeds[name].append(len(questions) * NEW_TOKENS / (time.perf_counter() - began))

    ratios = [one / other for one, other in zip(speeds["hrm"], speeds["bare"], strict=True)]
    return {f"{name}_tokens_per_second": statistics.median(values) for name, values in speeds.items()} | {
        "of_bare": statistics.median(ratios)}


def compiled(args: argparse.Namespace, host: Any) -> dict[str, float]:
    """Seconds of HRM's core, forward and backward over a batch of prompts, as it is and compiled."""
    controller = add_on(host, args.device).train()
    _, _, batches = adapters.items(asked_of(args), args.batch, torch.device(args.device))
    states = controller.encode(batches[0])
    core = controller.model.addon.core
    x = controller.model.addon.inputs(states.features, states.context.mask).detach()
    fast: Any = torch.compile(core)

    def seconds(run: Any) -> float:
        adapters.synchronise(x.device)
        began = time.perf_counter()
        for _ in range(args.steps):
            run(x, states.context, core.initial_carry(states.context.mask)).z_high.sum().backward()
        adapters.synchronise(x.device)
        return (time.perf_counter() - began) / args.steps

    seconds(core)
    began = time.perf_counter()
    seconds(fast)
    built = time.perf_counter() - began
    pairs = [(seconds(core), seconds(fast)) for _ in range(args.repeats)]
    plain, quick = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {"plain_s": plain, "compiled_s": quick, "times_as_fast": plain / quick, "compile_s": built}


# --- the command ------------------------------------------------------------------------------------------------------


def tried(title: str, part: Callable[[], Any]) -> Any:
    """What a part finds, or its error, and a line of progress."""
    began = time.monotonic()
    try:
        found = part()
    except Exception as error:  # the other parts are still worth measuring
        found = {"error": f"{type(error).__name__}: {error}"}
    print(f"{title}: {time.monotonic() - began:.0f} s  {json.dumps(found)[:160]}", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where a part failed."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    found: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__,
        "agreement": tried("agreement", lambda: agreement(args)),
        "training": tried("training", lambda: training(args)),
        "hosts": {},
    }
    for shape in args.hosts:
        host = adapters.frozen_host(shape, args.device)
        parts = {part.__name__: tried(f"{shape}: {part.__name__}", lambda part=part, host=host: part(args, host))
                 for part in (decoding, compiled, speed)}
        found["hosts"][shape] = parts
        del host
        torch.cuda.empty_cache()

    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    write_text_aside(args.output, text + "\n", "--output")
    print(f"written: {args.output}")
    return 1 if '"error"' in text else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
