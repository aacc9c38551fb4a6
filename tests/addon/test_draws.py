"""Slow items: a level is drawn for its time alone, everything is said, and a run that goes on draws the same."""

from __future__ import annotations

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest

import reasoning_gym_wrapper as rg
import train
from addon import draws as draws_module
from addon.curriculum import FEWEST, Curriculum, CurriculumConfig
from addon.draws import DrawProgress, Draws, agreed
from engine.records import normalise
from patience import HANG_S
from reasoning_gym_wrapper import Task, TaskError
from tasks.limits import JudgeConfig
from tasks.toy_add import ToyAddConfig, ToyAddDataset
from tiny_runs import arguments, assert_same_run, error_lines, newest, only_run

LEVEL_S = 0.9  # time of a level


@dataclasses.dataclass
class LevelConfig(ToyAddConfig):
    """`gives`: items of one seed range that come at once; the next ones never come."""

    max_value: int = 999
    gives: int = 10**9


class Level(ToyAddDataset):
    fast = False  # True: a machine on which nothing is slow

    def __getitem__(self, index):
        if not self.fast and (self.seed + index) % 500_000 >= self.config.gives:
            time.sleep(HANG_S)
        return super().__getitem__(index)


@pytest.fixture(autouse=True)
def level_task(monkeypatch):
    """`level_add` has levels whose items come ever fewer."""
    tasks = {**rg.registry(), "level_add": (Level, LevelConfig)}
    monkeypatch.setattr(rg, "registry", lambda: tasks)
    monkeypatch.setattr("addon.curriculum.ENOUGH", 30)


@pytest.fixture
def levels(monkeypatch):
    """Sets how many items each level gives in time."""

    def set_levels(*gives):
        configs = [{"gives": count} for count in gives]
        monkeypatch.setattr("addon.curriculum.level_configs", lambda task, highest: configs)

    return set_levels


def climb(record=None, draw_s=LEVEL_S, eval_n=6):
    said: list[str] = []
    config = CurriculumConfig(eval_n=eval_n, curriculum_draw_s=draw_s)
    return Curriculum([Task("level_add")], config, draws=record, say=said.append), said


def questions(curriculum):
    return [[example.question for example in level] for level in curriculum.held_out["level_add"]]


def test_a_slow_level_is_used_with_what_it_gives_in_its_time(levels):
    levels(FEWEST, 40)
    curriculum, said = climb()
    assert [len(level) for level in curriculum.held_out["level_add"]] == [6, 6]
    assert curriculum.starts == {"level_add": 0}  # its questions do not repeat: they are enough to learn from
    assert said == [f"curriculum: level_add level 0 gave {FEWEST} of 30 items in {LEVEL_S} s and is used "
                    "with these (--curriculum_draw_s)"]
    assert curriculum.draws.document() == {"levels": {"level_add": [[FEWEST, 1], [12, 0]]}}


def test_a_slow_level_is_none_to_begin_at_where_a_lower_one_gives_more(levels, monkeypatch):
    monkeypatch.setattr("addon.curriculum.ENOUGH", 10**4)
    configs = [{"max_value": 3}, {"gives": FEWEST}]
    monkeypatch.setattr("addon.curriculum.level_configs", lambda task, highest: configs)
    curriculum, _ = climb()
    assert len(curriculum.ladders["level_add"]) == 2 and curriculum.starts == {"level_add": 0}


def test_the_ladder_ends_below_a_level_that_makes_next_to_nothing(levels):
    levels(10**6, FEWEST - 1, 10**6)
    curriculum, said = climb()
    assert len(curriculum.ladders["level_add"]) == 1
    assert said == [f"curriculum ends at level 0 of level_add: task level_add: level 1 gave {FEWEST - 1} items in "
                    f"{LEVEL_S} s, {FEWEST} are needed: raise --curriculum_draw_s, lower the difficulty with "
                    "--task_config or choose another task"]


def test_a_first_level_that_makes_nothing_is_refused_in_one_line(levels):
    levels(0, 10**6)
    with pytest.raises(TaskError, match=r"^task level_add: level 0 gave 0 items in 0.9 s, 8 are needed: raise "):
        climb()


def test_what_the_clock_decided_is_repeated_on_a_machine_where_nothing_is_slow(levels, monkeypatch):
    levels(FEWEST + 1, 20, 0, 10**6)
    first, _ = climb()
    document = json.loads(json.dumps(first.draws.document()))
    monkeypatch.setattr(Level, "fast", True)
    second, said = climb(Draws.of(document, repeats=True))
    assert questions(second) == questions(first) and second.starts == first.starts and said == []
    assert len(second.ladders["level_add"]) == 2 and second.draws.document() == document
    other, _ = climb()
    assert questions(other) != questions(first)


def test_no_clock_decides_anything_when_items_are_drawn_again(levels):
    levels(10**6)
    curriculum, said = climb(Draws(repeats=True), draw_s=1e-9)
    assert len(curriculum.held_out["level_add"][0]) == 6 and said == []


def test_a_quick_ladder_leaves_no_record(levels):
    levels(10**6)
    assert climb()[0].draws.document() == {}


def test_evaluated_questions_of_a_slow_level_are_reserved(levels):
    levels(FEWEST)
    curriculum, _ = climb()
    assert curriculum.reserve.questions == {normalise(text) for text in questions(curriculum)[0]}


def test_items_that_were_passed_over_are_remembered_by_task_difficulty_and_seed():
    task = Task("level_add", {"gives": 5}, JudgeConfig(0.01, 0.01))
    draws = Draws()
    with draws.clock([task]):
        task.passed_over = {10**9: [3]}
    again = Task("level_add", {"gives": 5})
    other = Task("level_add", {"gives": 6})
    record = Draws.of(json.loads(json.dumps(draws.document())), repeats=False)
    with record.clock([again, other]):
        assert again.passed_over == {10**9: [3]} and other.passed_over == {}


def test_long_drawing_is_told(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(draws_module.time, "monotonic", lambda: now[0])
    said: list[str] = []
    tell = DrawProgress("drawing items of {task}", 100, said.append)
    for done in range(1, 101):
        now[0] += 6
        tell("sokoban", done)
    assert said[0] == "drawing items of sokoban: 3 of 100 items, 4 s each, 6:28 left"
    assert 20 < len(said) < 40 and not any("100 of 100" in line for line in said)


# --- a run ------------------------------------------------------------------------------------------------------------


class Gaps(ToyAddDataset):
    """Every seventh item never comes."""

    def __getitem__(self, index):
        if (self.seed + index) % 7 == 3:
            time.sleep(HANG_S)
        return super().__getitem__(index)


def test_an_evaluation_asks_the_same_items_on_a_faster_machine(tiny_host, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("addon.items.PROBE", 4)
    monkeypatch.setattr(rg, "registry", lambda: {"gap_add": (Gaps, ToyAddConfig)})
    flags = ("--task=gap_add", "--max_steps=1", "--draw_timeout_s=0.3", "--eval_every=0", "--eval_n=6")
    assert train.main(arguments(tiny_host, tmp_path, *flags)) == 0
    assert "an item took longer than --draw_timeout_s 0.3 to make and is passed over" in capsys.readouterr().err
    run = only_run(tmp_path)
    state = json.loads((newest(run) / "training_state.json").read_text(encoding="utf-8"))
    (seeds,) = state["extra"]["draws"]["passed_over"].values()
    assert seeds[str(10**9)] == [4]

    # Here every item would come at once.
    monkeypatch.setattr(rg, "registry", lambda: {"gap_add": (ToyAddDataset, ToyAddConfig)})
    assert train.main(["--resume", str(run), "--save_dir", str(tmp_path), "--eval_only"]) == 0
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    hashes = [json.loads(line)["prompt_hash"] for line in lines]
    assert hashes[:6] == hashes[-6:]


def test_a_run_out_of_time_resumes_exactly(tiny_host, tmp_path, monkeypatch):
    monkeypatch.setattr("addon.items.PROBE", 8)
    monkeypatch.setattr(rg, "registry", lambda: {"gap_add": (Gaps, ToyAddConfig)})
    flags = ("--task=gap_add", "--max_steps=4", "--draw_timeout_s=0.3", "--warmup_steps=0",
             "--lr_scheduler=constant", "--eval_every=0")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(tiny_host, whole, *flags)) == 0
    assert train.main(arguments(tiny_host, parts, *flags, "--max_steps=2", "--run_name=a")) == 0
    (parts / "a" / "eval.csv").unlink()
    (parts / "a" / "predictions.jsonl").unlink()
    assert train.main(["--resume", str(parts / "a"), "--save_dir", str(parts), "--max_steps=4"]) == 0
    assert_same_run(only_run(whole), parts / "a")


def test_a_task_that_makes_nothing_in_time_ends_the_command_in_one_line(tiny_host, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rg, "registry", lambda: {"level_add": (Level, LevelConfig)})
    status = train.main(arguments(tiny_host, tmp_path, "--task=level_add", '--task_config={"gives": 0}',
                                  "--draw_timeout_s=0.3"))
    assert status == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert line.startswith("task level_add: 3 items in a row took longer than --draw_timeout_s 0.3 to make")
    assert not list(tmp_path.iterdir())


# --- several processes ------------------------------------------------------------------------------------------------


class Ranks:
    """Two processes, one after the other: what the first one gathers, the second one receives."""

    def __init__(self, monkeypatch):
        self.sent: list[tuple] = []
        monkeypatch.setattr(draws_module, "gather_object", self.gather)

    def gather(self, packed):
        self.sent += packed
        return self.sent

    def draw(self, rank, hold_out):
        """The record that process `rank` ends up with."""
        machine = SimpleNamespace(world=2, is_main=rank == 0)
        data = SimpleNamespace(draws=Draws())
        agreed(lambda: hold_out(data.draws), machine, data)
        return data.draws


def test_the_first_process_decides_and_the_others_repeat_it(monkeypatch):
    ranks = Ranks(monkeypatch)
    clocks = []

    def hold_out(draws):
        clocks.append(not draws.repeats)
        if not draws.repeats:
            draws.levels["level_add"] = [[9, 1]]

    first, second = ranks.draw(0, hold_out), ranks.draw(1, hold_out)
    assert clocks == [True, False] and first.document() == second.document() == {"levels": {"level_add": [[9, 1]]}}
    assert not first.repeats and not second.repeats


def test_a_mistake_of_the_first_process_is_every_processs(monkeypatch):
    ranks = Ranks(monkeypatch)

    def hold_out(draws):
        raise TaskError("no items in time")

    for rank in (0, 1):
        with pytest.raises(ValueError, match="^no items in time$"):
            ranks.draw(rank, hold_out)
    assert len(ranks.sent) == 2


def test_items_drawn_before_need_no_agreement():
    data = SimpleNamespace(draws=Draws(repeats=True))
    called = []
    agreed(lambda: called.append(1), SimpleNamespace(world=2, is_main=False), data)
    assert called == [1]
