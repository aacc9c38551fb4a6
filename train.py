"""Train an HRM add-on on a frozen LLM, and measure it against the bare LLM: `python train.py --help`.

Exit status: 0 done, 2 the user's mistake (one line a problem), 3 loss or gradient is not a number, 130 and 143 stopped
by Ctrl-C or SIGTERM; while it trains, with everything saved.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import options

# Flags that fix the add-on's shape: taken from the checkpoint on resume, refused when typed otherwise.
SHAPE = (
    *("d_h", "h_layers", "l_layers", "n_heads", "hrm_input", "hrm_read", "injector", "cab_mem", "logit_bias_head"),
    *("lora_layers", "lora_rank", "use_act"),
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        opts, checkpoint, found = understand(argv)
        if found:
            return complain(found)
        from run import Run  # transformers loads here, after the cheap checks

        return Run(opts, checkpoint).go()
    except KeyboardInterrupt:
        return complain(["interrupted: what was saved before stays, --resume goes on from there"], 130)
    except (ValueError, OSError) as error:
        if os.environ.get("HRM_TRACEBACK"):
            raise
        return complain([str(error)])


def understand(argv: list[str] | None) -> tuple[options.Options, Path | None, list[str]]:
    """The options, the checkpoint this call goes on from, and all that is wrong with them, one line each."""
    saved, checkpoint, broken = {}, None, []
    try:
        checkpoint = find_checkpoint(options.peek(argv))
        saved = saved_options(checkpoint) if checkpoint else {}
    except ValueError as error:
        broken = [str(error)]
    opts, found = options.collect(argv, saved)
    if broken:  # whatever else the run needs, it says in the checkpoint that cannot be read
        return opts, None, found + broken
    from run_setup import check

    shape = other_shape(opts, saved, checkpoint) if checkpoint else []
    return opts, checkpoint, found + shape + check(opts, checkpoint)


def complain(problems: list[str], status: int = 2) -> int:
    """One line a problem on stderr. Returns the exit status."""
    for problem in problems:
        print(f"{options.PROG}: error: {' '.join(problem.split())}", file=sys.stderr)
    return status


def find_checkpoint(opts: options.Options) -> Path | None:
    """The checkpoint this call goes on from: `--resume`, or by itself that of an existing `--run_name`."""
    if opts.resume is None and opts.run_name is None:
        return None
    from checkpointing import FOLDER, newest_checkpoint, resolve_resume

    run = Path(opts.save_dir) / (opts.run_name or "")
    if opts.resume is None or (opts.resume == "auto" and opts.run_name):
        found = newest_checkpoint(run) if run.is_dir() else None
        if found is None and (opts.eval_only or opts.resume):
            raise ValueError(f"run {opts.run_name} in {opts.save_dir} has no checkpoint: train it first, name another")
        return found
    found = resolve_resume(opts.resume, Path(opts.save_dir))
    if opts.run_name and found.parent.name == FOLDER and found.parent.parent.resolve() != run.resolve():
        raise ValueError(f"--resume {opts.resume} and --run_name {opts.run_name} are different runs: leave one out")
    return found


def saved_options(checkpoint: Path) -> dict[str, Any]:
    """The options that the checkpoint's run was started with. Raises ValueError on a broken or foreign checkpoint."""
    from checkpointing import read_checkpoint

    text = read_checkpoint(checkpoint, stems=[]).documents["config.resolved.yaml"]
    saved = options.read_resolved(text)
    return {name: value for name, value in saved.items() if name not in options.INVOCATION}


def other_shape(opts: options.Options, saved: dict[str, Any], checkpoint: Path) -> list[str]:
    """At most one line, naming every flag that contradicts the weights of the checkpoint."""
    other = [name for name in SHAPE if getattr(opts, name) != saved.get(name, getattr(opts, name))]
    told = ", ".join(f"--{name} {getattr(opts, name)} (checkpoint: {saved[name]})" for name in other)
    line = f"{checkpoint} was trained with another shape: {told}; leave these flags out or start a new run"
    return [line] if other else []


if __name__ == "__main__":
    sys.exit(main())
