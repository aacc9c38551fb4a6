"""Train an HRM add-on on a frozen LLM, and measure it against the bare LLM: `python train.py --help`.

Exit status: 0 done, 2 the user's mistake (one line a problem), 3 loss or gradient is not a number, 130 and 143 stopped by
Ctrl-C or SIGTERM with everything saved.
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
INVOCATION = ("resume", "eval_only", "dry_run")  # said of one call, never inherited from the run that is resumed


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        checkpoint = find_checkpoint(options.peek(argv))
        saved = saved_options(checkpoint) if checkpoint else {}
        opts = options.parse(argv, saved)
        if checkpoint:
            refuse_other_shape(opts, saved, checkpoint)
        from run import Run  # torch and transformers load here, after the cheap checks
        from run_setup import ConfigurationError

        try:
            return Run(opts, checkpoint).go()
        except ConfigurationError as error:
            return complain(error.problems)
    except ValueError as error:
        if os.environ.get("HRM_TRACEBACK"):
            raise
        return complain([str(error)])


def complain(problems: list[str]) -> int:
    """One line a problem on stderr; exit status 2."""
    for problem in problems:
        print(f"{options.PROG}: error: {' '.join(problem.split())}", file=sys.stderr)
    return 2


def find_checkpoint(opts: options.Options) -> Path | None:
    """The checkpoint this call goes on from: `--resume`, or by itself that of an existing `--run_name`."""
    if opts.resume is None and opts.run_name is None:
        return None
    from checkpointing import newest_checkpoint, resolve_resume

    run = Path(opts.save_dir) / (opts.run_name or "")
    if opts.resume is None or (opts.resume == "auto" and opts.run_name):
        found = newest_checkpoint(run) if run.is_dir() else None
        if found is None and (opts.eval_only or opts.resume):
            raise ValueError(f"run {opts.run_name} in {opts.save_dir} has no checkpoint: train it first, or name another")
        return found
    return resolve_resume(opts.resume, Path(opts.save_dir))


def saved_options(checkpoint: Path) -> dict[str, Any]:
    """The options that the checkpoint's run was started with. Raises ValueError on a broken or foreign checkpoint."""
    from checkpointing import read_checkpoint

    text = read_checkpoint(checkpoint, stems=[]).documents["config.resolved.yaml"]
    saved = options.read_resolved(text)
    return {name: value for name, value in saved.items() if name not in INVOCATION}


def refuse_other_shape(opts: options.Options, saved: dict[str, Any], checkpoint: Path) -> None:
    """Raises ValueError naming every typed flag that contradicts the weights of the checkpoint."""
    other = [name for name in SHAPE if getattr(opts, name) != saved.get(name, getattr(opts, name))]
    if other:
        told = ", ".join(f"--{name} {getattr(opts, name)} (checkpoint: {saved[name]})" for name in other)
        raise ValueError(f"{checkpoint} was trained with another shape: {told}; leave these flags out or start a new run")


if __name__ == "__main__":
    sys.exit(main())
