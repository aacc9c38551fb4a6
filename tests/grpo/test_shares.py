"""What several processes share in GRPO and its warm start: examples, measurements, a stage's completions."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from batching import PromptFormat
from enhanced.model import create_hrm_model_and_tokenizer
from enhanced.tokenizer import reasoning_tokenizer
from grpo import measure as grpo_measure
from grpo.measure import measure
from grpo.problems import problem_of, task_source
from grpo.stage_folder import as_begun
from grpo.stages import GrpoConfig, HeldOut, Stage, rewards_of
from grpo.worked_examples import ExampleData, ExamplesConfig

SUMS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}


def stage(name: str, **config) -> Stage:
    return Stage(name, 1, 8, (task_source(SUMS),), {"math": 1.0, "format": 1.0}, 5, 1.0, config=GrpoConfig(**config))


@pytest.fixture(scope="module")
def prompt_format(tiny_host) -> PromptFormat:
    return PromptFormat(reasoning_tokenizer(str(tiny_host)))


def problems(count: int):
    (task,) = task_source(SUMS).tasks
    return [problem_of(example) for _, (_, example) in zip(range(count), task.items(3), strict=False)]


def process(rank: int = 0, world: int = 1) -> SimpleNamespace:
    """A process, without the others."""
    def of_main(read):
        return read()

    return SimpleNamespace(rank=rank, world=world, is_main=rank == 0, device="cpu", said=[], of_main=of_main,
                           say=lambda text: None)


def examples_of(prompt_format, world: int, accum: int, size: int = 3) -> list[ExampleData]:
    """The warm start's data in each of `world` processes."""
    config = ExamplesConfig(batch_size=size, grad_accum_steps=accum)
    stages = [stage("format"), stage("math")]
    held = HeldOut({name: problems(2) for name in ("format", "math")}, set(), [])
    return [ExampleData(config, stages, held, prompt_format, process(rank, world)) for rank in range(world)]


def taken(processes: list[ExampleData], count: int) -> list[list[list[int]]]:
    """The token ids of the micro-batches of all processes, `count` times, in an order of their own."""
    found = []
    for _ in range(count):
        batch = [micro["input_ids"].tolist() for data in processes for micro in data.next_batches()]
        found.append(sorted(batch))
    return found


def test_processes_share_the_micro_batches_of_one(prompt_format):
    whole = taken(examples_of(prompt_format, 1, 4), 3)
    assert taken(examples_of(prompt_format, 2, 2), 3) == whole and whole[0] != whole[1]
    assert taken(examples_of(prompt_format, 4, 1), 3) == whole


def test_the_warm_start_goes_on_with_another_number_of_processes(prompt_format):
    (alone,) = examples_of(prompt_format, 1, 4)
    taken([alone], 2)
    two = examples_of(prompt_format, 2, 2)
    taken(two, 2)
    state = json.loads(json.dumps(two[0].state()))
    assert two[1].state() == state == alone.state()
    one = examples_of(prompt_format, 1, 2, size=6)
    one[0].load_state(state)  # batches of another size, too
    taken(one, 1)
    assert one[0].state()["sizes"] == [[3, 8], [6, 2]]  # behind what was drawn, not behind as many larger batches
    again = examples_of(prompt_format, 1, 2, size=6)
    again[0].load_state(json.loads(json.dumps(one[0].state())))
    assert taken(one, 2) == taken(again, 2)

    # A checkpoint from before sizes were kept.
    older = examples_of(prompt_format, 1, 4)
    older[0].load_state({"drawn": state["drawn"]})
    assert taken(older, 2) == taken([alone], 2)


@pytest.mark.parametrize("count", [1, 5])
def test_a_measurement_is_shared_and_put_back_in_order(prompt_format, count, monkeypatch):
    """A process may have nothing to answer."""
    torch.manual_seed(0)
    model, _ = create_hrm_model_and_tokenizer(16, 2, 2, 1, 1, 8, prompt_format.tokenizer)
    asked = problems(count)
    functions, _ = rewards_of(stage("math"))
    call = (model, prompt_format, "math")
    whole = measure(*call, asked, functions, 6)

    # What each process would hand to the others, and then what all of them get.
    shares = []

    def hand_over(own):
        shares.extend(own)
        raise InterruptedError

    monkeypatch.setattr(grpo_measure, "gather_object", hand_over)
    for rank in (0, 1):
        with pytest.raises(InterruptedError):
            measure(*call, asked, functions, 6, machine=process(rank, 2))
    assert [len(columns[0]) for columns, _ in shares] == [(count + 1) // 2, count // 2]
    monkeypatch.setattr(grpo_measure, "gather_object", lambda own: shares)
    for rank in (0, 1):
        assert measure(*call, asked, functions, 6, machine=process(rank, 2)) == whole


def test_an_interrupted_stage_keeps_its_completions_a_step(tmp_path):
    begun = stage("math", grpo_batch_size=4, grpo_accum_steps=2)
    assert as_begun(begun, tmp_path, process(0, 2), goes_on=False) is begun
    assert as_begun(begun, tmp_path, process(0, 2), goes_on=True) is begun
    assert as_begun(begun, tmp_path, process(), goes_on=True).config.grpo_accum_steps == 4
    assert as_begun(begun, tmp_path, process(1, 4), goes_on=True).config.grpo_accum_steps == 1
    with pytest.raises(ValueError, match="stage math began with 16 completions a step, which 3 processes"):
        as_begun(begun, tmp_path, process(2, 3), goes_on=True)
