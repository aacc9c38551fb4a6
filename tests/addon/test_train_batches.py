"""Training batches that go on in other batches: no item is left out, none comes twice."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from addon.streams import training_examples
from addon.train_batches import TrainBatches
from batching import PromptConfig, PromptFormat
from reasoning_gym_wrapper import Reserve, Task

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)


@pytest.fixture(scope="module")
def prompt_format(tokenizer) -> PromptFormat:
    return PromptFormat(tokenizer, PromptConfig(max_seq_len=512))


def ranks(prompt_format: PromptFormat, size: int, world: int, window: int, tokens: int, train_n: int):
    """The batches of each of `world` processes."""
    made = []
    for rank in range(world):
        stream = training_examples([Task("toy_add", {"max_value": 60})], Reserve([], 0), 0, train_n)
        made.append(TrainBatches(stream, prompt_format, size, window, 5, rank=rank, world=world, tokens=tokens))
    return made


def taken(processes: list[TrainBatches], count: int) -> list[str]:
    """The questions of the next `count` batches of all processes, whose positions stay alike."""
    questions = []
    for _ in range(count):
        for batches in processes:
            questions += [example.question for part in batches.parts() for example in part.examples]
    positions = [batches.state_dict() for batches in processes]
    for position in positions:
        position.pop("padding", None)  # each process counts its own
    assert all(position == positions[0] for position in positions)
    return questions


def through(processes: list[TrainBatches]) -> list[str]:
    """The questions up to the end of the window at hand."""
    questions = taken(processes, 1) if not processes[0]._batches else []
    while processes[0]._place < len(processes[0]._batches):
        questions += taken(processes, 1)
    return questions


@SHARED
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 5)), min_size=2, max_size=4),
       st.sampled_from([1, 3]), st.sampled_from([0, 120]), st.sampled_from([0, 11]))
def test_batches_of_another_number_of_processes_go_on_behind_the_last_item(prompt_format, calls, window, tokens, n):
    seen = []
    state = None
    for size, world, count in calls:
        processes = ranks(prompt_format, size, world, window, tokens, n)
        for batches in processes:
            if state:
                batches.load_state_dict(state)
        seen += taken(processes, count)
        state = json.loads(json.dumps(processes[0].state_dict()))

        # Loading what was saved at once, before a batch is drawn, is loading the same position.
        again = ranks(prompt_format, size, world, window, tokens, n)
        for batches in again:
            batches.load_state_dict(state)
        ahead = ranks(prompt_format, size, world, window, tokens, n)
        for batches in ahead:
            batches.load_state_dict(again[0].state_dict())
        assert taken(again, 2) == taken(ahead, 2)

    seen += through(processes)
    (whole,) = ranks(prompt_format, 1, 1, 1, 0, n)
    assert sorted(seen) == sorted(taken([whole], len(seen)))


def test_two_processes_go_on_as_one_with_twice_the_batch(prompt_format):
    two = ranks(prompt_format, 2, 2, 3, 0, 0)
    taken(two, 4)
    (one,) = ranks(prompt_format, 4, 1, 3, 0, 0)
    one.load_state_dict(two[0].state_dict())
    for _ in range(5):
        assert sorted(taken([one], 1)) == sorted(taken(two, 1))
