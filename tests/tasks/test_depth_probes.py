"""The depth probes in tasks/: their items against a slow truth, their knob, their length, chance, and their levels."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest

from addon.curriculum import Curriculum, CurriculumConfig, curriculum_problems
from batching import PromptFormat, TrainStream
from engine.records import normalise
from host import DEFAULT_HOST, load_tokenizer
from reasoning_gym_wrapper import Example, Reserve, Task, TaskError
from tasks.chance import task_chances
from tasks.toy_base import StepsConfig

PROBES = {"toy_chain": 13}  # name -> most steps at its default size


def drawn(name: str, n: int = 200, seed: int = 0, **config) -> list[Example]:
    return [example for _, example in itertools.islice(Task(name, config).items(seed), n)]


def steps_of(example: Example) -> int:
    return example.entry["metadata"]["steps"]


def pointers(text: str) -> dict[str, str]:
    pairs = dict(pair.split(">") for pair in text.split(","))
    assert len(pairs) == text.count(",") + 1, "each source has one pointer"
    return pairs


# --- every probe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBES)
def test_items_take_every_number_of_steps_from_the_least_to_the_most_alike(name):
    examples = drawn(name, 2000, min_steps=3, max_steps=7)
    counts = {steps: sum(steps_of(example) == steps for example in examples) for steps in range(3, 8)}
    assert sum(counts.values()) == 2000 and min(counts.values()) > 320
    metadata = examples[0].entry["metadata"]
    assert metadata["difficulty"] == {"steps": (3, 7)} and metadata["source_dataset"] == name
    json.dumps(metadata)


@pytest.mark.parametrize("name", PROBES)
def test_the_prompt_stays_under_80_tokens_of_the_embedded_llm(name):
    prompt = PromptFormat(load_tokenizer(DEFAULT_HOST, False))
    for most in (4, PROBES[name]):
        prompts = prompt.prompts([example.question for example in drawn(name, 300, max_steps=most)])
        assert max(map(len, prompts)) < 80


@pytest.mark.parametrize("name", PROBES)
def test_every_letter_and_digit_of_a_question_is_a_token_of_its_own(name):
    tokenizer = load_tokenizer(DEFAULT_HOST, False)
    for example in drawn(name, 300, max_steps=9):
        ids = tokenizer(example.question, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(example.question)


@pytest.mark.parametrize("name", PROBES)
def test_questions_hardly_repeat_at_one_step(name):
    """Level 0 of a curriculum has enough to learn from."""
    questions = {example.question for example in drawn(name, 3000, max_steps=1)}
    assert len(questions) > 2900


@pytest.mark.parametrize("name", PROBES)
def test_no_constant_solves_a_fifth_and_only_the_answer_is_right(name):
    examples = Reserve([Task(name, {"max_steps": PROBES[name]})], 500).examples
    assert task_chances(examples)[name].rate < 0.2
    for example in examples[:50]:
        assert example.target and len(example.target) <= 5
        assert example.verify(f" {example.target}\n").solved and not example.verify(example.target + "A").solved


@pytest.mark.parametrize(
    ("config", "told"),
    [({"min_steps": 5}, "need 1 <= min_steps <= max_steps, got 5 and 4"),
     ({"min_steps": 0}, "need 1 <= min_steps <= max_steps, got 0 and 4"),
     ({"max_steps": "9"}, "max_steps must be a whole number, got '9'"),
     ({"max_steps": True}, "max_steps must be a whole number, got True"),
     ({"max_steps": 10_000}, "10000"),
     ({"hops": 3}, "has no config field hops: choose from")],
)
@pytest.mark.parametrize("name", PROBES)
def test_a_config_that_cannot_be_is_refused_in_one_line(name, config, told):
    with pytest.raises(TaskError, match=f"task {name} .*{told}"):
        Task(name, config)


def test_the_levels_of_a_probe_are_one_more_step_each():
    assert StepsConfig(max_steps=3).levels() == [{"max_steps": 1}, {"max_steps": 2}, {"max_steps": 3}]
    assert StepsConfig(min_steps=2, max_steps=3).levels() == [{"max_steps": 2}, {"max_steps": 3}]


@pytest.mark.parametrize("name", PROBES)
def test_a_curriculum_climbs_from_one_step_and_keeps_off_the_evaluated_questions_of_all_levels(name):
    assert curriculum_problems([name]) == []
    curriculum = Curriculum([Task(name, {"max_steps": 4})], CurriculumConfig(eval_n=32))
    assert [task.config["max_steps"] for task in curriculum.ladders[name]] == [1, 2, 3, 4]
    assert curriculum.levels == {name: 0}, "one step has questions enough"
    assert {steps_of(example) for example in curriculum.held_out[name][0]} == {1}
    assert {steps_of(example) for example in curriculum.held_out[name][3]} == {1, 2, 3, 4}

    stream = TrainStream(curriculum.tasks(), curriculum.reserve, 0)
    trained = {normalise(next(stream).question) for _ in range(300)}
    assert not trained & curriculum.reserve.questions and len(curriculum.reserve.questions) > 64
    capped = Curriculum([Task(name, {"max_steps": 4})], CurriculumConfig(eval_n=8, curriculum_levels=2))
    assert len(capped.ladders[name]) == 3


def test_a_level_is_solved_by_the_items_that_it_adds():
    """Nine in ten items of level 9 are of the levels below: all of them solved are no ground to go up."""
    curriculum = Curriculum([Task("toy_chain", {"max_steps": 10}), Task("gcd")], CurriculumConfig(eval_n=64))
    curriculum.restore({"toy_chain": 9})
    examples = curriculum.examples()
    answers = [SimpleNamespace(example=example) for example in examples if example.task == "toy_chain"]
    judged = curriculum.judged("toy_chain", answers)
    assert {steps_of(answer.example) for answer in judged} == {10} and 1 <= len(judged) < 20
    without = [answer for answer in answers if steps_of(answer.example) < 10]
    assert curriculum.judged("toy_chain", without) == without
    others = [SimpleNamespace(example=example) for example in examples if example.task == "gcd"]
    assert curriculum.judged("gcd", others) == others


# --- toy_chain --------------------------------------------------------------------------------------------------------


def chain_lengths(pairs: dict[str, str], start: str) -> dict[str, int]:
    """End of each chain -> its nodes, ends that point at themselves counted once."""
    pairs = {source: target for source, target in pairs.items() if source != target}
    lengths = {}
    for first in set(pairs) - set(pairs.values()):
        node = first
        count = 1
        while node in pairs:
            node = pairs[node]
            count += 1
        lengths[node] = count
    return lengths


@pytest.mark.parametrize(("ends", "nodes", "most"), [("none", 24, 13), ("self", 18, 12)])
def test_a_start_leads_to_the_end_of_its_chain_in_so_many_steps(ends, nodes, most):
    for example in drawn("toy_chain", 300, max_steps=most, ends=ends, nodes=nodes):
        text, start = example.question.removesuffix(">").split(":")
        pairs = pointers(text)
        node = start
        for _ in range(steps_of(example)):
            assert pairs[node] != node
            node = pairs[node]
        assert node == example.target
        assert pairs.get(node) == (node if ends == "self" else None)
        assert len({*pairs, *pairs.values()}) == nodes


def test_a_guess_among_the_ends_solves_one_item_in_six():
    for example in drawn("toy_chain", 300, max_steps=13):
        pairs = pointers(example.question.split(":")[0])
        assert len(set(pairs.values()) - set(pairs)) == 6


def test_chains_of_trained_lengths_are_all_as_long_so_that_length_says_nothing():
    for example in drawn("toy_chain", 200, max_steps=3):
        text, start = example.question.removesuffix(">").split(":")
        assert set(chain_lengths(pointers(text), start).values()) == {4}
    for example in drawn("toy_chain", 200, min_steps=9, max_steps=9):
        text, start = example.question.removesuffix(">").split(":")
        lengths = chain_lengths(pointers(text), start)
        assert lengths.pop(example.target) == 10 and sorted(lengths.values()) == [2, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("config", "told"),
    [({"ends": "self"}, "24 nodes in 6 chains with ends self are 24 pairs, .* at most 18: lower nodes by 6"),
     ({"nodes": 27, "chains": 9}, "nodes must be 26 or fewer letters, got 27"),
     ({"max_steps": 14}, "24 nodes in 6 chains with ends none leave room for 13 steps, got max_steps 14"),
     ({"nodes": 10}, "6 chains with ends none need 12 nodes, got 10"),
     ({"chains": 0}, "chains must be 1 or more, got 0"),
     ({"ends": "loop"}, "ends must be none or self, got 'loop'")],
)
def test_chains_that_do_not_fit_are_refused_with_what_would(config, told):
    with pytest.raises(TaskError, match=told):
        Task("toy_chain", config)
