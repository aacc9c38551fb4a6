"""Train an HRM, as an add-on on a frozen LLM or as a hybrid, and measure it: `python train.py --help`.

Exit status: 0 done, 2 the user's mistake (one line a problem), 3 loss or gradient is not a number, 130 and 143 stopped
by Ctrl-C or SIGTERM; while it trains, with everything saved.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import options

# Flags that fix a model's shape: taken from the checkpoint on resume, refused when typed otherwise.
SHAPE = {
    "addon": (
        *("arch", "d_h", "h_layers", "l_layers", "n_heads", "hrm_input", "hrm_read", "injector", "cab_mem"),
        *("logit_bias_head", "lora_layers", "lora_rank", "use_act", "share_hl", "adapter", "virtual_tokens"),
        "state_mix",
    ),
    "enhanced": (
        *("arch", "d_model", "n_heads", "n_planner_layers", "n_worker_layers", "max_cycles", "thought_dim"),
        "tokenizer",
    ),
    "hybrid": (
        *("arch", "d_model", "n_heads", "encoder", "encoder_layers", "decoder_layers", "state_size", "tie_embeddings"),
        *("d_h", "h_layers", "l_layers", "h_len", "l_len", "bridge", "prefix_len"),
    ),
}


# Kept with the weights by --reset_progress, though another number may be typed.
COUNTS = ("segments", "h_cycles", "inner_T", "grad_horizon")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        opts, checkpoint, found = understand(argv)
        if found:
            return complain(found)
        run = run_of(opts)(opts, checkpoint)
        status = run.go()
        if opts.eval_suite and status == 0:
            measure_suite(run, opts)
        return status
    except KeyboardInterrupt:
        return complain(["interrupted: what was saved before stays, --resume goes on from there"], 130)
    except (ValueError, OSError) as error:
        if os.environ.get("HRM_TRACEBACK"):
            raise
        return complain([str(error)])


def run_of(opts: options.Options) -> type:
    """The class of a system's runs, which knows what is wrong with one (`problems`). transformers loads here."""
    if opts.objective == "grpo":
        from grpo.run import GrpoRun

        return GrpoRun
    if opts.arch == "enhanced":
        from grpo.warm_start import EnhancedRun

        return EnhancedRun
    if opts.arch == "hybrid":
        from hybrid.run import HybridRun

        return HybridRun
    from addon_run import AddonRun

    return AddonRun


def measure_suite(run: Any, opts: options.Options) -> None:
    """`--eval_suite`: measured once, on the weights that the run ends with."""
    from suite.after_run import SuiteConfig, measure_after_run

    subject = run.suite_subject()
    if subject is not None:
        measure_after_run(subject, options.part(SuiteConfig, opts))


def understand(argv: list[str] | None) -> tuple[options.Options, Path | None, list[str]]:
    """The options, the checkpoint this call goes on from, and all that is wrong with them, one line each."""
    saved, checkpoint, broken = {}, None, []
    asked = options.peek(argv)
    try:
        if asked.reset_progress and asked.run_name and own_checkpoint(asked):
            asked.resume, asked.reset_progress = None, False  # begun already: the run goes on by itself
        checkpoint = find_checkpoint(asked)
        saved = saved_options(checkpoint, asked.reset_progress) if checkpoint else {}
        addon = saved.get("arch", "addon") == "addon"
        if checkpoint and addon and "adapter" in asked.explicit and saved.get("adapter", "hrm") != asked.adapter:
            trained, saved = saved.get("adapter", "hrm"), {}  # its flags would only start further complaints
            raise ValueError(f"{checkpoint} holds --adapter {trained}, not {asked.adapter}: leave the flag out or start"
                             " a new run")
    except ValueError as error:
        broken = [str(error)]
    opts, found = options.collect(argv, saved)
    opts.resume, opts.reset_progress = asked.resume, asked.reset_progress
    opts = options.with_limits(opts)
    if broken:  # whatever else the run needs, it says in the checkpoint that cannot be read
        return opts, None, found + broken
    if checkpoint and saved.get("arch", "addon") != opts.arch:  # whatever else is typed belongs to another system
        arch = saved.get("arch", "addon")
        return opts, None, [f"{checkpoint} is a checkpoint of --arch {arch}, not of --arch {opts.arch}: leave --arch "
                            "out or name another checkpoint"]
    found += matched(opts, asked) if opts.match_params and not found else []
    shape = other_shape(opts, saved, checkpoint) if checkpoint else []
    return opts, checkpoint, found + shape + run_of(opts).problems(opts, checkpoint)


def matched(opts: options.Options, asked: options.Options) -> list[str]:
    """Sizes the adapter by --match_params, and says how. At most one problem; `asked` holds what this call set."""
    from addon.param_matching import match

    sizes = {"d_h", "lora_rank", "virtual_tokens"}
    unmatched = {"lora_rank"} if opts.lora_layers else set()
    typed = sorted((sizes - unmatched) & asked.explicit)
    if typed:
        return [f"--match_params {opts.match_params} and --{typed[0]} are both set: keep one"]
    try:
        told = match(opts)
    except ValueError as error:
        return [str(error)]
    if os.environ.get("RANK", "0") == "0":
        print(told, file=sys.stderr)
    return []


def complain(problems: list[str], status: int = 2) -> int:
    """One line a problem on stderr. Returns the exit status."""
    for problem in problems:
        print(f"{options.PROG}: error: {' '.join(problem.split())}", file=sys.stderr)
    return status


def find_checkpoint(opts: options.Options) -> Path | None:
    """The checkpoint this call goes on from: `--resume`, or by itself that of an existing `--run_name`."""
    if opts.resume is None and opts.run_name is None:
        return None
    from engine.checkpoints import FOLDER, resolve_resume

    run = Path(opts.save_dir) / (opts.run_name or "")
    if opts.resume is None or (opts.resume == "auto" and opts.run_name):
        found = own_checkpoint(opts)
        if found is None and (opts.eval_only or opts.resume):
            raise ValueError(f"run {opts.run_name} in {opts.save_dir} has no checkpoint: train it first, name another")
        return found
    found = resolve_resume(opts.resume, Path(opts.save_dir))
    anew = opts.reset_progress
    if opts.run_name and not anew and found.parent.name == FOLDER and found.parent.parent.resolve() != run.resolve():
        raise ValueError(f"--resume {opts.resume} and --run_name {opts.run_name} are different runs: leave one out")
    return found


def own_checkpoint(opts: options.Options) -> Path | None:
    """The newest checkpoint of the run that `--run_name` names."""
    from engine.checkpoints import newest_checkpoint

    run = Path(opts.save_dir) / opts.run_name
    return newest_checkpoint(run) if run.is_dir() else None


def saved_options(checkpoint: Path, shape_only: bool = False) -> dict[str, Any]:
    """The options that the checkpoint's run was started with, or only those that fix the shape of its weights.

    Raises:
        ValueError: a broken or foreign checkpoint.
    """
    from engine.checkpoints import read_checkpoint

    text = read_checkpoint(checkpoint, stems=[]).documents["config.resolved.yaml"]
    saved = options.read_resolved(text)
    shape = (*SHAPE[saved.get("arch", "addon")], *COUNTS)
    kept = shape if shape_only else set(saved) - set(options.INVOCATION)
    return {name: value for name, value in saved.items() if name in kept}


def other_shape(opts: options.Options, saved: dict[str, Any], checkpoint: Path) -> list[str]:
    """At most one line, naming every flag that contradicts the weights of the checkpoint."""
    shape = SHAPE[saved.get("arch", "addon")]
    other = [name for name in shape if getattr(opts, name) != saved.get(name, getattr(opts, name))]
    told = ", ".join(f"--{name} {getattr(opts, name)} (checkpoint: {saved[name]})" for name in other)
    line = f"{checkpoint} was trained with another shape: {told}; leave these flags out or start a new run"
    return [line] if other else []


if __name__ == "__main__":
    sys.exit(main())
