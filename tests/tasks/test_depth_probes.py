"""The depth probes in tasks/: their items against a slow truth, their knob, their length, chance, and their levels."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest

from addon.curriculum import Curriculum, CurriculumConfig, curriculum_problems, ladder
from addon.streams import TrainStream
from batching import PromptFormat
from engine.records import normalise
from host import DEFAULT_HOST, load_tokenizer
from reasoning_gym_wrapper import Example, Reserve, Task, TaskError
from tasks.chance import task_chances
from tasks.toy_base import FEW, StepsConfig
from tasks.toy_rewrite import rounds

# Name -> most steps that are tried at its default size.
PROBES = {"toy_chain": 12, "toy_chase": 17, "toy_automaton": 60, "toy_rewrite": 16}


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
    smaller = len(FEW) if name in ("toy_chain", "toy_chase") else 0  # levels of fewer letters, at one step
    assert [task.config["max_steps"] for task in curriculum.ladders[name]] == [1] * smaller + [1, 2, 3, 4]
    assert curriculum.levels == {name: 0}, "one step has questions enough"
    assert {steps_of(example) for example in curriculum.held_out[name][0]} == {1}
    assert {steps_of(example) for example in curriculum.held_out[name][smaller + 3]} == {1, 2, 3, 4}

    stream = TrainStream(curriculum.tasks(), curriculum.reserve, 0)
    trained = {normalise(next(stream).question) for _ in range(300)}
    assert not trained & curriculum.reserve.questions and len(curriculum.reserve.questions) > 64
    capped = Curriculum([Task(name, {"max_steps": 4})], CurriculumConfig(eval_n=8, curriculum_levels=2))
    assert len(capped.ladders[name]) == 3


@pytest.mark.parametrize("name", ["toy_chain", "toy_chase"])
def test_first_levels_have_few_nodes_of_few_letters(name):
    levels = Curriculum([Task(name, {"max_steps": 2})], CurriculumConfig(eval_n=32)).ladders[name]
    assert [(task.config["nodes"], task.config["letters"]) for task in levels] == [*FEW, (18, 26), (18, 26)]
    question = next(levels[0].items(0))[1].question
    assert set(question) - set(">,:1") <= set("ABCDEF")
    small = Task(name, {"max_steps": 2, "nodes": 10, "letters": 12} | ({"chains": 3} if name == "toy_chain" else {}))
    few = [(task.config["letters"], task.config["nodes"]) for task in ladder(small)]
    assert few == [(6, 4), (8, 6), (10, 8), (12, 10), (12, 10)], "levels larger than the task itself"


def test_decoys_are_other_chains_and_fit_each_level():
    with pytest.raises(TaskError, match="decoys must be from 0 to 5, got 6"):
        Task("toy_chain", {"decoys": 6})
    with pytest.raises(TaskError, match="2 decoys of 9 nodes do not fit 18 nodes in 6 chains: lower"):
        Task("toy_chain", {"decoys": 2, "max_steps": 8})
    with pytest.raises(TaskError, match="1 decoys of 9 nodes do not fit 17 nodes in 2 chains"):
        Task("toy_chain", {"decoys": 1, "nodes": 17, "chains": 2})
    levels = ladder(Task("toy_chain", {"decoys": 2, "letters": 18}))
    assert [level.config["decoys"] for level in levels] == [1, 2, 2, 2, 2, 2, 2, 2, 2]


def test_a_level_is_solved_by_the_items_that_it_adds():
    """Nine in ten items of level 9 are of the levels below: all of them solved are no ground to go up."""
    curriculum = Curriculum([Task("toy_chain", {"max_steps": 10}), Task("gcd")], CurriculumConfig(eval_n=64))
    curriculum.restore({"toy_chain": 16})
    examples = curriculum.examples()
    answers = [SimpleNamespace(example=example, solved=steps_of(example) < 10) for example in examples
               if example.task == "toy_chain"]
    judged = curriculum.judged("toy_chain", answers)
    assert {steps_of(answer.example) for answer in judged} == {10} and 1 <= len(judged) < 20
    without = [answer for answer in answers if steps_of(answer.example) < 10]
    assert curriculum.judged("toy_chain", without) == without
    others = [SimpleNamespace(example=example, solved=True) for example in examples if example.task == "gcd"]
    assert curriculum.judged("gcd", others) == others
    (row,) = curriculum.added_rows({"toy_chain": answers, "gcd": others}.__getitem__)
    assert (row["task"], row["metric"], row["value"], row["n"]) == ("toy_chain", "solved_added", 0.0, len(judged))
    assert 0.0 == row["ci_low"] < row["ci_high"] < 1.0


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
    for example in drawn("toy_chain", 300, max_steps=13, ends="none", nodes=24):
        pairs = pointers(example.question.split(":")[0])
        assert len(set(pairs.values()) - set(pairs)) == 6


def test_chains_are_all_as_long_while_the_steps_allow_it_so_that_length_says_nothing():
    large = {"ends": "none", "nodes": 24}
    for most, config, size in ((2, {}, 3), (3, large, 4)):
        for example in drawn("toy_chain", 200, max_steps=most, **config):
            text, start = example.question.removesuffix(">").split(":")
            assert set(chain_lengths(pointers(text), start).values()) == {size}
    for example in drawn("toy_chain", 200, min_steps=9, max_steps=9, **large):
        text, start = example.question.removesuffix(">").split(":")
        lengths = chain_lengths(pointers(text), start)
        assert lengths.pop(example.target) == 10 and sorted(lengths.values()) == [2, 3, 3, 3, 3]


@pytest.mark.parametrize(("config", "alike"), [
    ({"decoys": 2}, 3), ({"decoys": 1}, 2), ({"decoys": 1, "max_steps": 6}, 2), ({"decoys": 5, "max_steps": 2}, 6)])
def test_with_decoys_the_length_of_a_chain_does_not_tell_the_start_s(config, alike):
    """At each number of steps as many chains are the longest, the start's among them; without, it stands alone."""
    for own, count in ((config, alike), ({"min_steps": 3}, 1)):
        for example in drawn("toy_chain", 60, **own):
            text, start = example.question.removesuffix(">").split(":")
            lengths = chain_lengths(pointers(text), start)
            longest = [end for end, length in lengths.items() if length == max(lengths.values())]
            assert len(longest) == count and example.target in longest
            assert len(pointers(text)) == 18


@pytest.mark.parametrize(
    ("config", "told"),
    [({"nodes": 24}, "24 nodes in 6 chains with ends self are 24 pairs, .* at most 18: lower nodes by 6"),
     ({"nodes": 27, "chains": 9}, "nodes must be at most the 26 letters, got 27"),
     ({"max_steps": 14, "ends": "none", "nodes": 24}, "24 nodes in 6 chains .* room for 13 steps, got max_steps 14"),
     ({"nodes": 10, "ends": "none"}, "6 chains with ends none need 12 nodes, got 10"),
     ({"chains": 0}, "chains must be 1 or more, got 0"),
     ({"ends": "loop"}, "ends must be none or self, got 'loop'")],
)
def test_chains_that_do_not_fit_are_refused_with_what_would(config, told):
    with pytest.raises(TaskError, match=told):
        Task("toy_chain", config)


# --- toy_chase --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "most"), [("cycle", 17), ("permutation", 40), ("function", 40)])
def test_the_answer_is_so_many_hops_from_the_start(kind, most):
    for example in drawn("toy_chase", 200, max_steps=most, map=kind):
        text, asked = example.question.removesuffix(">").split(":")
        pairs = pointers(text)
        node = asked[0]
        assert int(asked[1:]) == steps_of(example) and len(pairs) == 18
        for _ in range(steps_of(example)):
            node = pairs[node]
        assert node == example.target
        assert kind == "function" or set(pairs.values()) == set(pairs)


def test_a_cycle_passes_through_all_letters_before_it_returns():
    for example in drawn("toy_chase", 50):
        text, asked = example.question.removesuffix(">").split(":")
        pairs = pointers(text)
        seen = [asked[0]]
        while pairs[seen[-1]] != seen[0]:
            seen.append(pairs[seen[-1]])
        assert len(seen) == 18


@pytest.mark.parametrize(
    ("config", "told"),
    [({"max_steps": 18}, "a cycle of 18 nodes is back at its start after 18 steps, got max_steps 18: lower it"),
     ({"max_steps": 100, "map": "function"}, "max_steps must be 99 or fewer, got 100"),
     ({"nodes": 19}, "nodes must be from 2 to 18, got 19"),
     ({"map": "loop"}, "map must be cycle, permutation or function, got 'loop'")],
)
def test_a_chase_that_cannot_be_is_refused(config, told):
    with pytest.raises(TaskError, match=told):
        Task("toy_chase", config)


# --- toy_automaton ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objects", "orders"), [(3, 6), (5, 120)])
def test_the_answer_is_the_order_after_all_moves(objects, orders):
    reached = set()
    for example in drawn("toy_automaton", 2000, max_steps=20, objects=objects):
        start, moves = example.question.removesuffix(">").split(":")
        assert len(moves) == steps_of(example) and len(set(start)) == objects
        row = start
        for move in map(int, moves):
            row = row[1:] + row[0] if move == 0 else row[: move - 1] + row[move] + row[move - 1] + row[move + 1 :]
        assert row == example.target
        assert not any(a == b != "0" for a, b in itertools.pairwise(moves))
        reached.add(tuple(start.index(letter) for letter in row))
    assert len(reached) == orders


@pytest.mark.parametrize(
    ("config", "told"),
    [({"objects": 2}, "objects must be from 3 to 9, got 2"), ({"max_steps": 70}, "must be 69 or fewer")],
)
def test_an_automaton_that_cannot_be_is_refused(config, told):
    with pytest.raises(TaskError, match=told):
        Task("toy_automaton", config)


# --- toy_rewrite ------------------------------------------------------------------------------------------------------


def test_what_is_left_of_a_word_is_the_same_in_any_order_and_takes_so_many_rounds():
    for example in drawn("toy_rewrite", 300, max_steps=16):
        word = example.question.removesuffix(">")
        assert len(word) == 2 * 16 + 3
        stack: list[str] = []
        for letter in word:
            if stack[-1:] == [letter]:
                stack.pop()
            else:
                stack.append(letter)
        assert "".join(stack) == example.target and len(stack) == 3
        assert rounds(word) == (steps_of(example), example.target)


@pytest.mark.parametrize(("word", "expected"), [("", (0, "")), ("AB", (0, "AB")), ("ABBA", (2, "")), ("AAA", (1, "A")),
                                                ("BAADDB", (2, "")), ("DAAEABBAEF", (3, "DF"))])
def test_a_round_cancels_what_is_equal_now(word, expected):
    assert rounds(word) == expected


@pytest.mark.parametrize(
    ("config", "told"),
    [({"max_steps": 17}, "16 pairs take 16 steps at most, got max_steps 17"), ({"kept": 0}, "kept must be 1 or more"),
     ({"pairs": 37}, "pairs must be 36 or fewer beside 3 kept letters, got 37")],
)
def test_a_word_that_cannot_be_is_refused(config, told):
    with pytest.raises(TaskError, match=told):
        Task("toy_rewrite", config)
