"""Runs on own data: refused in one line, kept by the checkpoint, told where it changed; GRPO and plugins."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

import generate
import train
from engine.records import question_hash
from tiny_rows import PLUGIN, sums, write
from tiny_runs import arguments, assert_same_run, error_lines, newest, records

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py
SIX = "--max_steps 6 --save_every 2 --eval_every 3 --checkpoint_limit 0".split()
OWN = ("--task", "none", "--verifier", "number", "--run_name", "mine")


@pytest.fixture
def data(tmp_path) -> Path:
    return Path(write(tmp_path / "mine.jsonl", sums(40)))


def rows_of(run: Path) -> list[dict]:
    with open(run / "eval.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def held_out(run: Path) -> set[str]:
    return {record["prompt_hash"] for record in records(run)["predictions"]}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("typed", "told"), [
    ("--data nowhere.jsonl", "--data nowhere.jsonl: there is no such file"),
    ("--data {data} --question_field prompt", "no row has the field prompt: name one of question, answer, id with -"),
    ("--data {data} --messages_field chat", "has the field chat: name one of question, answer, id with --messages"),
    ("--data {empty}", "--data empty.jsonl holds no rows"),
    ("--data {data} --verifier regex:\\d+[", "is no regular expression: unterminated character set"),
    ("--data {data} --verifier choice", "none of its 40 rows can be used; the first: line 1 has an answer that names"),
    ("--data {data} --verifier nowhere.at:all", "--verifier nowhere.at:all cannot be imported (ModuleNotFoundError"),
    ("--data {data} --verifier raising_judge:f", "on which --verifier raising_judge:f raises: KeyError: 'x'"),
    ("--data {data} --verifier same", "--verifier same is not legal: expected exact, number, choice, regex:PATTERN or"),
    ("--data {data} --eval_n 40", "40 usable questions, too few to hold out --eval_n 40 of them: lower --eval_n to 8,"),
    ("--data {data} --eval_data nowhere.csv", "--eval_data nowhere.csv: there is no such file"),
    ("--data {data} --mix yours=2", "--mix names yours, which is no task of this run: choose from mine"),
    ("--data {data} --mix mine", "--mix mine is not legal: expected NAME=WEIGHT,NAME=WEIGHT"),
    ("--verifier number", "--verifier number does nothing without --data"),
    ("--data {data} --messages_field a --answer_field b", "--messages_field a stands in place of --question_field and"),
    ("--data {data} --curriculum", "has no levels of difficulty: leave one out"),
    ("--plugin nowhere.py", "--plugin nowhere.py cannot be read"),
])
def test_a_mistake_is_one_line_before_any_model_loads(call, data, tmp_path, monkeypatch, typed, told):
    monkeypatch.setattr("addon_run.build_controller", None)  # a model that loads would raise another error
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "raising_judge.py").write_text("def f(answer, entry): return {}['x']\n", encoding="utf-8")
    places = {"data": str(data), "empty": str(tmp_path / "empty.jsonl")}
    words = [word.format(**places) for word in typed.split()]
    status, _, err = call("--task", "none", *words)
    assert status == 2 and told in err and len(error_lines(err)) == 1
    assert not (tmp_path / "runs").exists()


# --- what the checkpoint knows ----------------------------------------------------------------------------------------


def test_resumed_without_flags_equals_an_uninterrupted_run(call, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--data", "mine.jsonl", *OWN, *SIX)[0] == 0
    run = tmp_path / "runs" / "mine"
    shutil.copytree(run, tmp_path / "runs" / "cut")
    shutil.rmtree(newest(tmp_path / "runs" / "cut"))

    # From another folder: the checkpoint names the data by an absolute path.
    monkeypatch.chdir(tmp_path.parent)
    assert train.main(["--resume", str(tmp_path / "runs" / "cut")]) == 0
    assert_same_run(run, tmp_path / "runs" / "cut")
    assert {row["task"] for row in rows_of(run)} == {"mine"}
    record = json.loads((newest(run) / "own_data.json").read_text(encoding="utf-8"))["data"]
    assert record["sources"][0]["path"] == str(data) and record["sources"][0]["questions"] == 40
    assert (record["task"], record["fields"], record["verifier"]) == ("mine", ["question", "answer"], "number")


def test_evaluation_only_asks_the_same_questions_and_tells_of_changed_data(call, data, tmp_path):
    assert call("--data", str(data), *OWN, *SIX)[0] == 0
    run = tmp_path / "runs" / "mine"
    asked = held_out(run)
    status, out, err = call("--task", "none", "--resume", str(run), "--eval_only")
    assert status == 0 and held_out(run) == asked and "has changed" not in out + err

    write(data, sums(41))
    status, out, err = call("--task", "none", "--resume", str(run), "--eval_only")
    assert status == 0 and "--data mine.jsonl has changed since the checkpoint (sha256 " in out + err
    assert "40 questions, now 41" in out + err
    assert len([line for line in (out + err).splitlines() if "has changed" in line]) == 1

    # Beyond the questions that were set aside, those are asked that were not trained on.
    status, out, err = call("--task", "none", "--resume", str(run), "--eval_only", "--eval_n", "9")
    assert status == 0 and "questions are left out, since the checkpoint was trained on them" in out + err
    assert "WARNING: training kept off" not in out + err

    data.unlink()
    status, out, err = call("--task", "none", "--resume", str(run), "--eval_only")
    assert status == 2 and "there is no such file" in error_lines(err)[0]


def test_epochs_and_the_cache_know_own_data_as_a_fixed_set(call, data, tmp_path):
    status, out, err = call("--data", str(data), *OWN, "--epochs", "1", "--max_steps", "0", "--cache_hidden", "ram")
    assert status == 0, err
    assert "of 36 items" in out + err
    assert newest(tmp_path / "runs" / "mine").name == "step-00000009"  # 36 rows in batches of 4


def test_a_mix_trains_on_both_and_evaluates_both(call, data, tmp_path, monkeypatch):
    from addon.train_batches import TrainBatches

    seen = []
    plain = TrainBatches.parts

    def note(self):
        batches = plain(self)
        seen.extend((example.task, question_hash(example.question)) for part in batches for example in part.examples)
        return batches

    monkeypatch.setattr(TrainBatches, "parts", note)
    status, _, err = call("--data", str(data), *OWN, "--task", "toy_add", "--mix", "mine=3", "--max_steps", "6")
    assert status == 0, err
    tasks = [task for task, _ in seen]
    assert tasks.count("mine") == 18 and tasks.count("toy_add") == 6
    run = tmp_path / "runs" / "mine"
    assert {row["task"] for row in rows_of(run)} == {"toy_add", "mine", "overall"}
    assert not held_out(run) & {question for _, question in seen}


def test_rows_left_out_are_told_once(call, data):
    with open(data, "a", encoding="utf-8") as file:
        file.write('{"question": "0 and 0?", "answer": 5}\nnonsense\n')
    status, out, err = call("--data", str(data), *OWN)
    assert status == 0
    assert (out + err).count("mine.jsonl line 42 is not JSON") == 1
    assert "1 of 42 rows repeat a question and are left out; 1 of them have another answer" in out + err


# --- a verifier of one's own, GRPO, generate.py -----------------------------------------------------------------------

JUDGE = '''
def near(answer, entry):
    return entry["metadata"]["row"]["id"] >= 0 and answer.strip() == entry["answer"]

def short(prompts, completions, answer, task, **columns):
    assert all(isinstance(text, str) for text in prompts + completions) and set(task) == {"mine"}
    return [1 / (1 + len(text)) for text in completions]

def wrong(completions, **columns):
    return 1.0
'''


@pytest.fixture
def judged(call, data, tmp_path, monkeypatch) -> Path:
    """A run judged by a function of the user's own."""
    (tmp_path / "judge_of_mine.py").write_text(JUDGE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert call("--data", str(data), *OWN, "--verifier", "judge_of_mine:near")[0] == 0
    return tmp_path / "runs" / "mine"


def stages(**rewards: float) -> str:
    rewards = {name.replace("__", ":"): weight for name, weight in rewards.items()}
    return json.dumps({"task": {"epochs": 1, "size": 4, "eval_n": 4, "rewards": rewards}})


GRPO = "--objective grpo --num_generations 2 --grpo_batch_size 2 --grpo_accum_steps 1 --max_completion_length 4".split()


def test_grpo_takes_data_and_verifier_from_the_checkpoint_and_a_reward_by_name(judged, capsys):
    argv = ["--resume", str(judged), *GRPO, "--stages", stages(verifier=1.0, judge_of_mine__short=0.5)]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "judge_of_mine:short 0." in out and "verifier" in out
    assert (newest(judged) / "own_data.json").is_file() and (newest(judged) / "grpo.json").is_file()
    assert generate.main(["--checkpoint", str(judged), "--prompt", "1 and 2?"]) == 0
    assert train.main(["--resume", str(judged), "--eval_only", "--objective", "ce"]) == 0


@pytest.mark.parametrize(("reward", "told"), [
    ("judge_of_mine__wrong", "reward judge_of_mine:wrong returned float: expected a list of 1 numbers"),
    ("judge_of_mine__near", "reward judge_of_mine:near raises (TypeError: near() got an unexpected keyword argument"),
    ("judge_of_mine__none", "judge_of_mine has no function of the name none"),
    ("os__system", "reward os:system names a module of Python itself"),
])
def test_a_reward_that_cannot_be_used_is_one_line_before_any_model_loads(judged, capsys, monkeypatch, reward, told):
    monkeypatch.setattr("addon_run.build_controller", None)
    assert train.main(["--resume", str(judged), *GRPO, "--stages", stages(**{reward: 1.0})]) == 2
    assert told in error_lines(capsys.readouterr().err)[0]


# --- plugins ----------------------------------------------------------------------------------------------------------


def test_a_plugin_runs_only_when_it_is_typed_and_is_known_by_its_hash(tiny_host, tmp_path, capsys):
    path = tmp_path / "doubling.py"
    text = PLUGIN + "TASKS = {'doubling': (Doubles, Config)}\nprint('RAN')\n"
    path.write_text(text, encoding="utf-8")
    run = tmp_path / "runs" / "mine"
    assert train.main(arguments(tiny_host, tmp_path / "runs", "--plugin", str(path), "--task", "doubling", "--run_name",
                                "mine")) == 0
    assert "RAN" in capsys.readouterr().out
    assert str(path) not in (newest(run) / "config.resolved.yaml").read_text(encoding="utf-8")
    record = json.loads((newest(run) / "own_data.json").read_text(encoding="utf-8"))["plugin"]
    assert (record["path"], record["tasks"]) == (str(path), ["doubling"])

    # By the run alone its Python does not run: the user is told what to type.
    path.write_text(text + "\n", encoding="utf-8")
    assert train.main(["--resume", str(run), "--eval_only"]) == 2
    said = capsys.readouterr()
    assert said.err.strip().endswith(f"which runs only when it is typed: add --plugin {path}") and "RAN" not in said.out
    assert train.main(["--resume", str(run), "--eval_only", "--plugin", str(path)]) == 0
    said = capsys.readouterr()
    assert "RAN" in said.out and "--plugin doubling.py has changed since the checkpoint" in said.out + said.err
