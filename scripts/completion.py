"""Prints what makes a shell complete the flags of `train.py`, and their values, made from the table of flags.

    source <(python scripts/completion.py)                  # in ~/.bashrc, with the path of this repository
    source <(python scripts/completion.py --shell zsh)      # in ~/.zshrc, behind compinit

It works behind `python`, `python3` and the path of the file. Flags of other systems than the one of a typed `--arch`
are left out. Only the table is read, so a new shell waits some tens of milliseconds.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flags import ARCHS, FLAGS, Flag  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402

SHELLS = ("bash", "zsh")
# zsh runs bash's function by its own emulation, which has the same variables.
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
SCRIPT = """# Completes `train.py`; made by scripts/completion.py.
_hrm_train() {{
    local current previous word arch names place at
    current=${{COMP_WORDS[COMP_CWORD]}}
    previous=${{COMP_WORDS[COMP_CWORD-1]}}
    COMPREPLY=()

    # Behind python it is the file that counts; files are completed where it is another one.
    at=0
    case ${{COMP_WORDS[0]##*/}} in python*) at=1 ;; esac
    if [[ ${{COMP_WORDS[at]##*/}} != train.py || $COMP_CWORD -le $at ]]; then
        return 0
    fi

    # --flag=value comes as three words.
    if [[ $current == "=" ]]; then
        current=""
    elif [[ $previous == "=" ]]; then
        previous=${{COMP_WORDS[COMP_CWORD-2]}}
    fi

    case $previous in
{values}
    esac

    # The flags of the system that is typed, else of the add-on.
    arch=addon
    for ((place = 1; place < COMP_CWORD; place++)); do
        if [[ ${{COMP_WORDS[place]}} == --arch ]]; then
            arch=${{COMP_WORDS[place+1]}}
            if [[ $arch == "=" ]]; then arch=${{COMP_WORDS[place+2]}}; fi
        fi
    done
    case $arch in
{systems}
    esac
    COMPREPLY=($(compgen -W "$names" -- "$current"))
}}
complete -o bashdefault -o default -F _hrm_train python python3 train.py ./train.py
"""


def flag_names(flag: Flag) -> list[str]:
    """The flag as it may be typed."""
    return [f"--{name}" for name in (flag.name, *flag.aliases)]


def values_of(flag: Flag) -> list[str]:
    """The words that a flag may have for its value; empty where there is no list of them."""
    words = list(flag.choices or ())
    if flag.type == "bool":
        words = ["0", "1"]
    if flag.nullable and words:
        words.append("none")
    return words


def value_cases(flags: Iterable[Flag]) -> list[str]:
    """The lines that complete a value: one of some words, a file, or nothing. Flags with the same answer share one."""
    answers: dict[str, list[str]] = {}
    for flag in flags:
        words = shlex.quote(" ".join(values_of(flag)))
        answer = "return 0 ;;"
        if flag.type == "path" or (flag.type == "str" and flag.name in ("data", "eval_data")):
            answer = 'COMPREPLY=($(compgen -f -- "$current")); return 0 ;;'
        elif flag.type == "bool":
            # A switch may stand alone, so the next flag may follow as well.
            answer = f'if [[ $current != -* ]]; then COMPREPLY=($(compgen -W {words} -- "$current")); return 0; fi ;;'
        elif values_of(flag):
            answer = f'COMPREPLY=($(compgen -W {words} -- "$current")); return 0 ;;'
        answers.setdefault(answer, []).extend(flag_names(flag))

    answers['COMPREPLY=($(compgen -W ' + shlex.quote(" ".join(("all", *ARCHS))) + ' -- "$current")); return 0 ;;'] = [
        "--help"
    ]
    return [f"        {'|'.join(names)}) {answer}" for answer, names in answers.items()]


def system_cases(flags: Sequence[Flag]) -> list[str]:
    """The lines that name the flags of each system; an unknown system has those of all."""
    lines = []
    for arch in (*ARCHS, "*"):
        names = ["--help"]
        for flag in flags:
            if arch in ("*", *flag.archs):
                names += flag_names(flag)
        lines.append(f"        {arch}) names={shlex.quote(' '.join(names))} ;;")
    return lines


def script(shell: str) -> str:
    """The text for a shell to read."""
    text = SCRIPT.format(values="\n".join(value_cases(FLAGS)), systems="\n".join(system_cases(FLAGS)))
    return ZSH + text if shell == "zsh" else text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--shell", default="bash", choices=SHELLS, help="the shell that is to read it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the text."""
    print(script(parse(argv).shell), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
