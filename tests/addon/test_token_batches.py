"""--batch_tokens: runs of it, little padding on tasks of many lengths, exact resume, two ways to be refused."""

from __future__ import annotations

import re
import shutil

import pytest

import options
from addon.streams import training_examples
from addon.train_batches import TrainBatches
from batching import PromptConfig, PromptFormat
from reasoning_gym_wrapper import Reserve, make_tasks
from tiny_runs import assert_same_run, newest, records

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

TOKENS = "--tasks toy_add,chain_sum,gsm_symbolic,simple_equations --task none --batch_tokens 600 --eval_every 0".split()


def batches(tokenizer, **more) -> TrainBatches:
    tasks = make_tasks(["basic_arithmetic", "gsm_symbolic", "chain_sum", "simple_equations"], "default")
    stream = training_examples(tasks, Reserve(tasks, 4), 0, 0)
    return TrainBatches(stream, PromptFormat(tokenizer, PromptConfig()), 16, **more)


def test_four_tasks_have_at_most_a_tenth_of_pads(tokenizer):
    """By examples they have more than a half."""
    by_tokens = batches(tokenizer, tokens=2048)
    taken = [by_tokens.parts() for _ in range(12)]
    assert by_tokens.padding.worst <= 0.1
    assert all(sum(part.columns for part in parts) <= 2048 for parts in taken)
    by_examples = batches(tokenizer)
    for _ in range(4):
        next(by_examples)
    assert by_examples.padding.worst > 0.5


def test_a_position_amid_a_window_comes_back(tokenizer):
    one, other = batches(tokenizer, tokens=2048), batches(tokenizer, tokens=2048)
    for _ in range(3):
        one.parts()
    other.load_state_dict(one.state_dict())
    for _ in range(20):
        ours, theirs = one.parts(), other.parts()
        assert [part.examples for part in ours] == [part.examples for part in theirs]
    assert one.state_dict() == other.state_dict()


def test_a_position_before_the_first_batch_comes_back(tokenizer):
    stream = batches(tokenizer, tokens=2048)
    start = stream.state_dict()
    first = stream.parts()
    stream.load_state_dict(start)
    assert [part.examples for part in stream.parts()] == [part.examples for part in first]


def test_a_run_says_how_much_is_padding_and_goes_on_exactly(call, tmp_path):
    runs = tmp_path / "runs"
    flags = [*TOKENS, "--max_steps", "4", "--save_every", "2", "--checkpoint_limit", "0"]
    status, out, err = call("--run_name", "whole", *flags)
    assert status == 0, err
    shares = [line["padding"] for line in records(runs / "whole")["metrics"]]
    assert len(shares) == 4 and all(0 <= share <= 0.1 for share in shares)
    assert "4 steps of at most 600 tokens" in err
    told = re.search(r"padding: ([\d.]+) % of the training batches, ([\d.]+) % of the worst", out)
    assert float(told[2]) == pytest.approx(100 * max(shares), abs=0.06)

    shutil.copytree(runs / "whole", runs / "cut")
    shutil.rmtree(newest(runs / "cut"))
    assert call("--run_name", "cut", *flags)[0] == 0
    assert_same_run(runs / "whole", runs / "cut")


@pytest.mark.parametrize("words,told", [
    ("--batch_tokens 512 --epochs 2 --train_n 9", "nobody knows how many batches --epochs 2 would be"),
    ("--batch_tokens 100", "--batch_tokens 100 is less than --max_seq_len 512: one item might not fit"),
])
def test_what_it_cannot_go_with_is_told(words, told, capsys):
    with pytest.raises(SystemExit):
        options.parse(words.split())
    assert told in capsys.readouterr().err
