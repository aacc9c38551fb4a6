"""A function of the user's own is imported only where it is typed, or once was."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import depth_curve
import train
from own_tasks.functions import function_record
from own_tasks.trusted import functions_of, refusal, remember, type_in
from own_tasks.verifiers import verifier_of
from tiny_rows import sums, write
from tiny_runs import arguments, error_lines, newest

OWN = ("--task", "none", "--question_field", "question", "--run_name", "mine")


@pytest.fixture
def theirs(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a module that leaves a file where it is imported; nothing is trusted yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))
    monkeypatch.setattr("sys.path", list(sys.path))
    folder = tmp_path / "theirs"
    folder.mkdir()
    mark = tmp_path / "it ran"
    text = (f"open({str(mark)!r}, 'a').close()\ndef near(answer, entry): return answer == entry['answer']\n"
            "def short(completions, **columns): return [1.0 for _ in completions]\n")
    (folder / "their_judge.py").write_text(text, encoding="utf-8")
    write(folder / "rows.jsonl", sums(40))
    (folder / "run.yaml").write_text("data: rows.jsonl\nverifier: their_judge:near\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    type_in([])
    yield folder
    type_in([])
    sys.modules.pop("their_judge", None)


def forget() -> None:
    """As another process: nothing is typed, and nothing is imported yet."""
    sys.modules.pop("their_judge", None)
    type_in([])


def test_a_file_s_verifier_is_imported_only_where_it_is_typed_or_once_was(theirs, tiny_host, tmp_path, capsys):
    words = arguments(tiny_host, tmp_path / "runs", *OWN, "--config", "run.yaml")
    assert train.main(words) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert line == ("--verifier their_judge:near is named by a file or a checkpoint, and importing their_judge "
                    f"({theirs / 'their_judge.py'}) runs its Python: read it, then type --trust_functions "
                    "their_judge:near")
    assert not (tmp_path / "it ran").exists() and not (tmp_path / "runs").exists()

    assert train.main([*words, "--trust_functions", "their_judge:near"]) == 0
    assert (tmp_path / "it ran").exists()
    forget()
    assert train.main(["--resume", str(tmp_path / "runs" / "mine"), "--eval_only"]) == 0  # typed before


def test_a_checkpoint_s_verifier_is_imported_only_where_it_is_typed(theirs, tiny_host, tmp_path, capsys):
    words = arguments(tiny_host, tmp_path / "runs", *OWN, "--data", "rows.jsonl")
    assert train.main([*words, "--verifier", "their_judge:near"]) == 0  # on the machine of whoever trained it
    shutil.rmtree(tmp_path / "states")
    (tmp_path / "it ran").unlink()
    forget()
    again = ["--resume", str(tmp_path / "runs" / "mine"), "--eval_only"]
    capsys.readouterr()
    assert train.main(again) == 2
    assert "type --trust_functions their_judge:near" in error_lines(capsys.readouterr().err)[0]
    curve = [str(tmp_path / "runs" / "mine"), "--segments", "1", "--device", "cpu"]
    with pytest.raises(ValueError, match="type --trust_functions their_judge:near"):
        depth_curve.main(curve)
    assert not (tmp_path / "it ran").exists()

    assert depth_curve.main([*curve, "--trust_functions", "their_judge:near"]) == 0
    (tmp_path / "it ran").unlink()
    shutil.rmtree(tmp_path / "states")
    forget()
    assert train.main([*again, "--verifier", "their_judge:near"]) == 0
    assert (tmp_path / "it ran").exists()


@pytest.fixture
def elsewhere(theirs, tiny_host, tmp_path, monkeypatch, capsys) -> list[str]:
    """The words that evaluate a run judged by a function of the user's own, from another folder, as another process."""
    on_path = list(sys.path)
    words = arguments(tiny_host, tmp_path / "runs", *OWN, "--data", "rows.jsonl", "--verifier", "their_judge:near")
    assert train.main(words) == 0
    forget()
    monkeypatch.setattr("sys.path", on_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    return ["--resume", str(tmp_path / "runs" / "mine"), "--eval_only"]


def test_a_run_goes_on_from_any_folder_with_its_own_verifier(elsewhere, theirs, tmp_path, monkeypatch, capsys):
    on_path = list(sys.path)
    assert train.main(elsewhere) == 0
    assert "has changed" not in "".join(capsys.readouterr())

    # On a machine where nothing was typed yet, the folder alone makes nobody trust it.
    shutil.rmtree(tmp_path / "states")
    (tmp_path / "it ran").unlink()
    forget()
    monkeypatch.setattr("sys.path", list(on_path))
    assert train.main(elsewhere) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert f"importing their_judge ({theirs / 'their_judge.py'}) runs its Python" in line
    assert not (tmp_path / "it ran").exists() and str(theirs) not in sys.path
    assert train.main([*elsewhere, "--trust_functions", "their_judge:near"]) == 0


def test_a_verifier_that_is_gone_is_told_with_its_folder(elsewhere, theirs, tmp_path, capsys):
    (theirs / "their_judge.py").rename(tmp_path / "their_judge.py")
    for more in ([], ["--trust_functions", "their_judge:near"]):
        assert train.main([*elsewhere, *more]) == 2
        (line,) = error_lines(capsys.readouterr().err)
        assert line.startswith(f"--verifier their_judge:near: there is no their_judge in {theirs}, where it was when ")


def test_a_verifier_of_other_bytes_is_told(elsewhere, theirs, capsys):
    path = theirs / "their_judge.py"
    path.write_text(path.read_text(encoding="utf-8").replace("return answer == entry['answer']", "return 1.0"),
                    encoding="utf-8")
    assert train.main(elsewhere) == 0
    told = "WARNING: their_judge:near has changed since the checkpoint (their_judge.py: sha256 "
    assert "".join(capsys.readouterr()).count(told) == 1
    forget()
    depth_curve.main([elsewhere[1], "--segments", "1", "--device", "cpu"])
    assert "".join(capsys.readouterr()).count(told) == 1


def test_a_package_of_the_users_is_found_by_the_folder_around_it(theirs, tmp_path, monkeypatch):
    os.makedirs("their_pack/inner")
    for place in ("their_pack/__init__.py", "their_pack/inner/__init__.py"):
        Path(place).write_text("", encoding="utf-8")
    Path("their_pack/inner/judge.py").write_text("def f(answer, entry): return 1.0\n", encoding="utf-8")
    type_in(["their_pack.inner.judge:f"])
    verifier_of("their_pack.inner.judge:f")
    record = function_record(["their_pack.inner.judge:f"])["their_pack.inner.judge:f"]
    assert record["folder"] == str(theirs)
    assert list(record["files"]) == [str(theirs / "their_pack" / "inner" / "judge.py")]


def test_a_file_s_reward_is_imported_only_where_it_is_typed(theirs, tiny_host, tmp_path, capsys):
    assert train.main(arguments(tiny_host, tmp_path / "runs", *OWN, "--data", "rows.jsonl")) == 0
    stages = {"task": {"epochs": 1, "size": 4, "eval_n": 4, "rewards": {"verifier": 1.0, "their_judge:short": 0.5}}}
    Path("grpo.yaml").write_text(json.dumps({"objective": "grpo", "stages": stages}), encoding="utf-8")
    small = "--num_generations 2 --grpo_batch_size 2 --grpo_accum_steps 1 --max_completion_length 4".split()
    words = ["--resume", str(tmp_path / "runs" / "mine"), "--config", "grpo.yaml", *small]
    capsys.readouterr()
    assert train.main(words) == 2
    assert "reward their_judge:short is named by a file or a checkpoint" in error_lines(capsys.readouterr().err)[0]
    assert not (tmp_path / "it ran").exists()

    assert train.main([*words, "--trust_functions", "their_judge:short"]) == 0
    assert (tmp_path / "it ran").exists()
    kept = json.loads((newest(tmp_path / "runs" / "mine") / "own_data.json").read_text(encoding="utf-8"))
    assert kept["functions"]["their_judge:short"]["folder"] == str(theirs)


def test_what_was_typed_counts_for_the_module_that_lay_there(theirs, tmp_path, monkeypatch):
    type_in(["their_judge:near"])
    verifier_of("their_judge:near")
    forget()
    assert refusal("their_judge:near", "--verifier") is None
    assert refusal("their_judge:short", "--verifier").endswith("then type --trust_functions their_judge:short")
    told = refusal("their_judge:short", "arm --trust_functions a", typed="--set trust_functions=")
    assert told.startswith("arm --trust_functions a their_judge:short is named by a file")
    assert told.endswith("then type --set trust_functions=their_judge:short")

    # A module of that name in another folder is another module.
    other = tmp_path / "other"
    shutil.copytree(theirs, other)
    monkeypatch.setattr("sys.path", [str(other), *sys.path])
    assert "their_judge:near" in refusal("their_judge:near", "--verifier")


def test_a_list_that_cannot_be_written_or_read_only_asks_again(theirs, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file stands where the folder would be", encoding="utf-8")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "taken"))
    type_in(["their_judge:near"])
    verifier_of("their_judge:near")
    forget()
    with pytest.raises(ValueError, match="type --trust_functions their_judge:near"):
        verifier_of("their_judge:near")

    folder = tmp_path / "states" / "hrm"
    folder.mkdir(parents=True)
    (folder / "trusted_functions").write_bytes(b"\xff\n[1]\n{}\n")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))
    assert refusal("their_judge:near", "--verifier")


def test_a_package_without_a_file_of_its_own_is_known_by_its_folder(theirs):
    os.makedirs("their_space/inner")
    Path("their_space/inner/judge.py").write_text("def f(answer, entry): return 1.0\n", encoding="utf-8")
    sys.path.append(os.getcwd())
    type_in(["their_space.inner.judge:f"])
    remember("their_space.inner.judge:f")
    type_in([])
    assert refusal("their_space.inner.judge:f", "--verifier") is None


@pytest.mark.parametrize("flags,found", [
    ({"verifier": "number"}, []), ({"verifier": "regex:abc"}, []), ({"verifier": "a.b:c"}, ["a.b:c"]),
    ({"stages": '{"s": {"rewards": {"math": 1, "m:f": 1}}}'}, ["m:f"]),
    ({"stages": {"s": {"rewards": {"m:f": 1}}}}, ["m:f"]),
    ({"stages": "{"}, []), ({"stages": '{"s": 1, "t": {"rewards": [1]}}'}, []), ({"stages": "[1]"}, []),
    ({"trust_functions": "a:b,c:d", "lr": 1}, ["a:b", "c:d"]), ({"trust_functions": None}, []),
])
def test_functions_are_found_in_flags(flags, found):
    assert functions_of(flags) == found
