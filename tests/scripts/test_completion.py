"""completion: bash itself completes flags and values of train.py, as the table has them."""

from __future__ import annotations

import shlex
import subprocess

import pytest

import completion
from flags import FIND, FLAGS


def completed(*words: str, shell: str = "bash") -> list[str]:
    """What bash proposes for the last of `words`."""
    line = " ".join(map(shlex.quote, words))
    asked = f"\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _hrm_train; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "--norc", "-c", completion.script(shell) + asked], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("begin", [("python", "train.py"), ("python3", "./train.py"), ("train.py",)])
def test_a_flag_is_completed_behind_each_way_to_call(begin):
    assert completed(*begin, "--injec") == ["--injector", "--injector_sees"]
    assert set(completed(*begin, "--learn")) == {"--learning_rate"}, "other spellings as well"


@pytest.mark.parametrize("words,expected", [
    (("--injector", ""), ["cab", "grb"]), (("--injector", "g"), ["grb"]), (("--injector", "=", "c"), ["cab"]),
    (("--injector", "="), ["cab", "grb"]), (("--use_act", ""), ["0", "1"]), (("--lr", ""), []),
    (("--help", "h"), ["hybrid"]), (("--arch", "e"), ["enhanced"])])
def test_values_are_those_of_the_table(words, expected):
    assert completed("python", "train.py", *words) == expected


def test_a_switch_that_stands_alone_is_followed_by_flags():
    assert "--segments" in completed("python", "train.py", "--use_act", "--seg")


def test_a_systems_own_flags_are_completed():
    everything = [name for flag in FLAGS for name in completion.flag_names(flag)]
    for arch in ("addon", "hybrid", "enhanced"):
        own = set(completed("python", "train.py", "--arch", arch, "--")) - {"--help"}
        assert own == {name for name in everything if arch in FIND[name[2:]].archs}


def test_files_are_completed_where_a_path_belongs(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").touch()
    assert completed("python", "train.py", "--config", str(tmp_path / "mi")) == [str(tmp_path / "mine.yaml")]


def test_other_python_files_are_left_to_the_shell():
    assert completed("python", "other.py", "--injec") == [] == completed("python", "tra")


def test_zsh_reads_the_same_behind_its_emulation_of_bash():
    assert completion.script("zsh") == completion.ZSH + completion.script("bash")
