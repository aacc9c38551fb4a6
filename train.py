"""Train an HRM, as an add-on on a frozen LLM or as a model of its own, and measure it: `python train.py --help`.

Exit status: 0 done, 2 the user's mistake (one line a problem), 3 loss or gradient is not a number, 4 another process of
the run has died, 130 and 143 stopped by Ctrl-C or SIGTERM; while it trains, with everything saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import options
from engine.environment import prepare
from flags import ARCHS, FIND, FLAGS, GROUPS, METAVARS, Flag

EXAMPLES = f"""examples:
  python {options.PROG}                                                  the defaults: embedded LLM, two tasks
  python {options.PROG} --task basic_arithmetic --segments 3 --train_n 2000 --eval_n 256 --batch_size 16
  python {options.PROG} --config runs/NAME/config.resolved.yaml --seed 1

Switches take 0, 1, true or false, or stand alone. Where none is the default, `none` takes back what --config gave.
A value that begins with -- is written --flag=value."""
MORE = """These are the common flags. To see the rest, with the legal values of each:
  python train.py --help --arch hybrid    the flags of one system: addon, hybrid or enhanced
  python train.py --help all              the flags of every system; docs/flags.md has them as tables
"""


MEMORY = "memory has run out: choose smaller sizes, a smaller --batch_size or --eval_batch_size; what was saved stays"


ORDERLY = (0, 3, 130, 143)  # exit statuses that all processes of a run have together


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    prepare()  # before torch loads
    status = None
    try:
        status = command(argv)
        return status
    finally:
        leave_watch(failed=status not in ORDERLY)


def leave_watch(failed: bool) -> None:
    """Tells the run's other processes that this one ends, by an error of its own if it `failed`."""
    if "engine.watch" in sys.modules:  # where torch was needed at all
        sys.modules["engine.watch"].leave_watch(failed)


def command(argv: list[str] | None) -> int:
    """What `main` does, with the user's mistakes told."""
    try:
        given = options.read(argv)
        if given.help is not None:
            print(help_text(help_topic(given)), end="")
            return 0

        opts, checkpoint, problems = understand(given)
        if problems:
            return complain(problems)
        opts = with_threads(opts)
        run = run_of(opts)(opts, checkpoint)
        status = run.go()
        if opts.eval_suite and status == 0:
            measure_suite(run, opts)
        return status
    except KeyboardInterrupt:
        leave_watch(failed=True)  # amid anything, and perhaps alone
        return complain(["interrupted: what was saved before stays, --resume goes on from there"], 130)
    except (ValueError, OSError) as error:
        if os.environ.get("HRM_TRACEBACK"):
            raise
        return complain([str(error)])
    except (MemoryError, RuntimeError) as error:
        from engine.memory import lacks_memory
        from engine.watch import explain_failed_exchange

        explain_failed_exchange(error)
        if os.environ.get("HRM_TRACEBACK") or not lacks_memory(error):
            raise
        return complain([f"{MEMORY} ({error})" if str(error) else MEMORY])


def understand(given: options.Given) -> tuple[options.Options, Path | None, list[str]]:
    """The options, the checkpoint that this call goes on from, and all that is wrong with them, one line each.

    What the table, the rules and the checkpoint's documents can tell is told first, and without importing torch. Only
    a call without such a problem is put to the system that it is for.
    """
    # What the call says by itself decides which checkpoint it goes on from. A wrong flag has its default here, and is
    # told later.
    asked, _ = options.settle(given)
    try:
        if asked.reset_progress and asked.run_name and own_checkpoint(asked):  # begun already: it goes on by itself
            asked = options.replace(asked, resume=None, reset_progress=False)
        checkpoint = find_checkpoint(asked)
        saved = saved_options(checkpoint, asked.reset_progress) if checkpoint else {}
        if checkpoint:
            warn_of_damage(asked, checkpoint)
            check_adapter(asked, saved, checkpoint)  # the flags of another adapter would only start more complaints
    except ValueError as error:
        # Whatever else the run needs stands in the checkpoint that cannot be read.
        opts, lines = options.settle(given)
        return opts, None, [*lines, str(error)]

    # What the checkpoint's run was told holds on below what this call says.
    opts, lines = options.settle(given, saved)
    opts = options.replace(opts, resume=asked.resume, reset_progress=asked.reset_progress)
    trained = saved.get("arch", "addon")
    if checkpoint and trained != opts.arch:
        # Whatever else is typed belongs to another system.
        line = f"{checkpoint} is a checkpoint of --arch {trained}, not of --arch {opts.arch}: leave --arch out or name "
        return opts, None, [line + "another checkpoint"]

    # The size that --match_params chooses must fit the checkpoint's weights, too.
    if opts.match_params and not lines:
        opts, lines = matched(opts, asked.explicit)
    lines += other_shape(opts, saved, checkpoint)
    if lines:
        return opts, checkpoint, lines

    trust_what_is_typed(opts, checkpoint)
    opts = with_places(options.resolve(opts))
    return opts, checkpoint, run_of(opts).problems(opts, checkpoint)


def trust_what_is_typed(opts: options.Options, checkpoint: Path | None) -> None:
    """Lets the functions of the user's own be imported that this call names on its command line.

    Those of a checkpoint are looked for where they lay.
    """
    from own_tasks.record import folders_before
    from own_tasks.trusted import functions_of, type_in

    type_in(functions_of({name: getattr(opts, name) for name in opts.typed}), folders_before(checkpoint))


def with_places(opts: options.Options) -> options.Options:
    """Options that name own data and caches by absolute paths, so that the run goes on from any folder."""
    from own_tasks.source import source_of

    places: dict[str, Any] = {}
    if opts.cache_dir:
        places["cache_dir"] = str(Path(opts.cache_dir).absolute())
    for name in ("data", "eval_data"):
        text = getattr(opts, name)
        try:
            places[name] = source_of(text, f"--{name}").text if text else None
        except ValueError:  # told with the system's other problems
            places[name] = text
    return options.replace(opts, **places)


def with_threads(opts: options.Options) -> options.Options:
    """Options with the number of threads that is fastest on this machine now, where the user has not chosen one.

    It is recorded like a typed one, since the last bits of a sum depend on it: a resumed run equals another.
    """
    from engine.hardware import best_threads
    from engine.machine import pick_device

    if opts.num_threads or "OMP_NUM_THREADS" in os.environ or pick_device(opts.device) != "cpu":
        return opts
    return options.replace(opts, num_threads=best_threads())


def run_of(opts: options.Options) -> type[Any]:
    """The class of a system's runs, which knows what is wrong with one (`problems`). torch loads here."""
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


def matched(opts: options.Options, set_here: Set[str]) -> tuple[options.Options, list[str]]:
    """Options whose adapter is sized by --match_params, and at most one problem; says on stderr which size it is.

    `set_here` names the flags that this call sets: a size among them contradicts --match_params.
    """
    from addon.param_matching import match
    from addon_run import adapter_config
    from host import HostConfig

    sizes = {"d_h", "lora_rank", "virtual_tokens"}
    if opts.lora_layers:  # then the rank is of the LoRA beside HRM, and d_h is what is sized
        sizes.remove("lora_rank")
    typed = sorted(sizes & set_here)
    if typed:
        return opts, [f"--match_params {opts.match_params} and --{typed[0]} are both set: keep one"]
    try:
        size = match(
            options.part(HostConfig, opts), adapter_config(opts), opts.match_params, opts.max_seq_len
        )
    except ValueError as error:
        return opts, [str(error)]

    if os.environ.get("RANK", "0") == "0":  # of several processes one
        print(size.line, file=sys.stderr)
    return options.replace(opts, **{size.flag: size.value}, explicit=opts.explicit | {size.flag}), []


def complain(problems: list[str], status: int = 2) -> int:
    """One line a problem on stderr. Returns the exit status."""
    for problem in problems:
        print(f"{options.PROG}: error: {' '.join(problem.split())}", file=sys.stderr)
    return status


# --- the checkpoint that a call goes on from ---


def find_checkpoint(opts: options.Options) -> Path | None:
    """The checkpoint that this call goes on from: `--resume`, or by itself that of an existing `--run_name`.

    Raises:
        ValueError: there is none where one is asked for, or two runs are named.
    """
    if opts.resume is None and opts.run_name is None:
        return None
    from engine.checkpoints import FOLDER
    from engine.resume import resolve_resume

    if opts.resume is None or (opts.resume == "auto" and opts.run_name):
        checkpoint = own_checkpoint(opts)
        if checkpoint is None and (opts.eval_only or opts.resume):
            raise ValueError(f"run {opts.run_name} in {opts.save_dir} has no checkpoint: train it first, name another")
        return checkpoint

    # Weights to begin anew from may be of any run, but a run goes on from its own checkpoints.
    checkpoint = resolve_resume(opts.resume, Path(opts.save_dir))
    inside_a_run = checkpoint.parent.name == FOLDER
    if opts.run_name and not opts.reset_progress and inside_a_run:
        named = Path(opts.save_dir) / opts.run_name
        if checkpoint.parent.parent.resolve() != named.resolve():
            raise ValueError(f"--resume {opts.resume} and --run_name {opts.run_name} are different runs: leave one out")
    return checkpoint


def own_checkpoint(opts: options.Options) -> Path | None:
    """The newest checkpoint of the run that `--run_name` names."""
    from engine.checkpoints import checkpoint_folders, newest_checkpoint
    from engine.resume import newest_damage

    run = Path(opts.save_dir) / opts.run_name
    if not run.is_dir():
        return None
    newest = newest_checkpoint(run)
    if newest is None and checkpoint_folders(run):  # to begin anew would overwrite what can perhaps be mended
        raise ValueError(
            f"run {opts.run_name} in {opts.save_dir} has no whole checkpoint ({newest_damage(run)}): copy one back, or "
            "choose another --run_name"
        )
    return newest


def warn_of_damage(opts: options.Options, checkpoint: Path) -> None:
    """Names the damaged checkpoints that are passed over where the call has not named one itself."""
    from engine.checkpoints import FOLDER
    from engine.resume import passed_over

    by_path = opts.resume is not None and Path(opts.resume).resolve() == checkpoint.resolve()
    inside_a_run = checkpoint.parent.name == FOLDER
    if by_path or not inside_a_run or (opts.resume or "").endswith("@best") or os.environ.get("RANK", "0") != "0":
        return
    anywhere = opts.resume == "auto" and not opts.run_name
    for line in passed_over(checkpoint, Path(opts.save_dir) if anywhere else None):
        print(f"WARNING: {line}", file=sys.stderr)


def saved_options(checkpoint: Path, anew: bool = False) -> dict[str, Any]:
    """The options of the checkpoint's run that hold for this call, too; see `kept`.

    Raises:
        ValueError: a broken or foreign checkpoint.
    """
    from engine.checkpoints import read_checkpoint

    text = read_checkpoint(checkpoint, stems=[]).documents["config.resolved.yaml"]
    return kept(options.read_resolved(text), anew)


def kept(saved: Mapping[str, Any], anew: bool) -> dict[str, Any]:
    """Of a run's options those with which another call goes on: all but what was said of the one call.

    `anew` begins step, optimizer and data again: it keeps only what the weights bring, their shape and their depth.
    """
    values = {}
    for name, value in saved.items():
        flag = FIND[name]
        if flag.shape or flag.depth or not (anew or flag.one_call):
            values[name] = value
    return values


def check_adapter(asked: options.Options, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises ValueError when this call sets another adapter than the checkpoint holds."""
    trained = saved.get("adapter", "hrm")
    of_addon = saved.get("arch", "addon") == "addon"
    if of_addon and "adapter" in asked.explicit and trained != asked.adapter:
        raise ValueError(f"{checkpoint} holds --adapter {trained}, not {asked.adapter}: leave the flag out or start a "
                         "new run")


def adds_halting(opts: options.Options, saved: Mapping[str, Any]) -> bool:
    """Whether a next stage trains a halting head on weights that had none: they fit, and the head begins anew."""
    return opts.reset_progress and opts.use_act and not saved.get("use_act", False)


def other_shape(opts: options.Options, saved: Mapping[str, Any], checkpoint: Path | None) -> list[str]:
    """At most one line, naming every flag that contradicts the weights of `checkpoint`, whose options are `saved`."""
    other = []
    for flag in FLAGS:
        value = getattr(opts, flag.name)
        if flag.name == "use_act" and adds_halting(opts, saved):
            continue
        if flag.shape and saved.get(flag.name, value) != value:
            other.append(f"--{flag.name} {value} (checkpoint: {saved[flag.name]})")
    if not other:
        return []
    shapes = ", ".join(other)
    return [f"{checkpoint} was trained with another shape: {shapes}; leave these flags out or start a new run"]


# --- help ---


def help_topic(given: options.Given) -> str:
    """What `--help` asks for: the word after it, else the system typed beside it, else the common flags."""
    for word in (given.help, given.typed.get("arch")):
        if word in ("all", *ARCHS):
            return word
    return "common"


def help_text(topic: str) -> str:
    """The text of `--help`: of the `common` flags, of one system's, or of `all`."""
    epilog = EXAMPLES
    if topic == "common":
        epilog = f"{MORE}\n{EXAMPLES}"
    parser = argparse.ArgumentParser(
        prog=options.PROG,
        usage=f"{options.PROG} [--config FILE.yaml] [--FLAG VALUE ...]",
        description="Train a Hierarchical Reasoning Model (HRM), as an add-on on a frozen language model or inside a "
        "model of its own, and measure it.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    sections = {group: parser.add_argument_group(group) for group in GROUPS}
    for flag in FLAGS:
        shown = {"common": flag.common, "all": True}.get(topic, topic in flag.archs)
        if shown:
            add_to_help(sections[flag.group], flag, topic)
    return parser.format_help()


def add_to_help(section: Any, flag: Flag, topic: str) -> None:
    """Adds a flag to a section of the help: names, what it does, default; legal values too, but for `common`."""
    notes = [default_words(flag, topic)]
    if topic != "common":
        notes.append(flag.legal)
    text = f"{flag.help} ({'; '.join(notes)})"

    metavar = METAVARS[flag.type]
    if flag.choices and flag.type == "str":
        metavar = "|".join(flag.choices)
    names = [f"--{name}" for name in (flag.name, *flag.aliases)]
    optional = "?" if flag.type == "bool" else None
    section.add_argument(*names, metavar=metavar, nargs=optional, help=text.replace("%", "%%"))


def default_words(flag: Flag, topic: str) -> str:
    """`default 64, hybrid 32`: the defaults of the systems that know the flag; of one system its own, `default 32`."""
    words = {}
    for arch in flag.archs:
        value = flag.default_in(arch)
        words[arch] = "none" if value in (None, "") else str(value)
    if topic in ARCHS:
        return f"default {words[topic]}"

    # The first system's default, and those of the others where they differ.
    first = flag.archs[0]
    text = f"default {words[first]}"
    for arch, word in words.items():
        if word != words[first]:
            text += f", {arch} {word}"
    if flag.archs != ARCHS:
        text = f"{' and '.join(flag.archs)} only; {text}"
    return text


if __name__ == "__main__":
    sys.exit(main())
