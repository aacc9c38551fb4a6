"""Peak memory of training from a cache on disk with the LLM loaded and without it, on a random LLM made for it.

    python scripts/benchmark_memory.py                                # 0.34 B parameters, which fp32 holds in 1.3 GB
    python scripts/benchmark_memory.py --width 2048 --layers 24

A random LLM is written to a temporary folder in bf16. One process fills a cache of a few sums (`--cache_mode fill`),
one trains from it with the LLM in memory (`both`, without an evaluation amid training), one without (`train`). Each is
`python train.py` in a process of its own with one thread; shown is the most memory that each held, as the system counts
it, and whether the losses of the two trainings are equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from script_tools import ScriptParser, run_script

ROOT = Path(__file__).resolve().parent.parent
UNIT = 1 if sys.platform == "darwin" else 1024  # of what the system counts memory in
BLOCK = 1_000_003  # random numbers, repeated where a weight has more: drawing hundreds of millions takes minutes
RUNS = {"fill": "fill the cache", "both": "train, the LLM in memory", "train": "train, without the LLM"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--width", type=int, default=1024, help="of the LLM, a multiple of 64")
    parser.add_argument("--layers", type=int, default=18, help="of the LLM")
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens of the LLM, at least 2048")
    parser.add_argument("--steps", type=int, default=3, help="training steps of 4 items")
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    args = parser.parse_args(argv)

    for name, least in {"width": 64, "layers": 1, "vocabulary": 2048, "steps": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} must be at least {least}")
    if args.width % 64:
        parser.error(f"--width {args.width} must be a multiple of 64, the width of an attention head")
    return args


def random_llm(folder: Path, width: int, layers: int, vocabulary: int) -> int:
    """Writes a random Llama in bf16, with the embedded LLM's tokenizer. Returns its number of parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny_host")
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)

    # Norms stay near 1, else the states would vanish.
    block = 0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    state = {}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        numbers = block.repeat(count // BLOCK + 1)[:count].reshape(parameter.shape)
        state[name] = (numbers + 1 if parameter.dim() == 1 else numbers).bfloat16()

    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def peak_of(argv: list[str]) -> int:
    """Bytes that `python train.py` with these words holds at most. Raises ValueError with its stderr where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, env=environment, stderr=told,
                                   stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        if status:
            raise ValueError(f"train.py failed: {told.read().decode(errors='replace')[-600:]}")
    return usage.ru_maxrss * UNIT


def losses_of(run: Path) -> list[float]:
    """The loss of each step of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures, with everything that is written in `folder`."""
    parameters = random_llm(folder / "llm", args.width, args.layers, args.vocabulary)
    words = (
        f"--model_name {folder / 'llm'} --task chain_sum --task_config small --train_n 64 --cache_hidden disk "
        f"--cache_dir {folder / 'cache'} --save_dir {folder / 'runs'} --max_steps {args.steps} --batch_size 4 "
        "--lr 1e-3 --eval_n 1 --max_new_tokens 1 --log_steps 1 --eval_every 0 --report 0 --device cpu "
        "--host_dtype fp32 --mixed_precision none --num_threads 1"
    ).split()

    peaks = {}
    for mode in RUNS:
        peaks[mode] = peak_of([*words, "--cache_mode", mode, "--run_name", mode])
    losses = [losses_of(folder / "runs" / mode) for mode in ("both", "train")]
    return {"parameters": parameters, "peak_bytes": peaks, "losses": losses[0], "equal": losses[0] == losses[1]}


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="memory-") as place:
        figures = measure(args, Path(place))

    print(f"random LLM of {figures['parameters'] / 1e6:.1f} M parameters, held in fp32 "
          f"({4 * figures['parameters'] / 1e9:.2f} GB)")
    for mode, what in RUNS.items():
        print(f"{what:26} at most {figures['peak_bytes'][mode] / 1e6:7,.0f} MB")
    print(f"losses of the two trainings equal bit for bit: {'yes' if figures['equal'] else 'NO'}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if figures["equal"] else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
