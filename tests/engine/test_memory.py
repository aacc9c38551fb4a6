"""memory: a model that the machine cannot hold is refused before anything of it is filled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import train
from engine import memory
from engine.memory import check_memory, check_model, free_memory, lacks_memory

H = "--arch hybrid --dataset synthetic --encoder transformer"


def test_the_free_memory_is_that_of_the_machine_or_of_a_limit_below_it(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = free_memory()
    assert whole > 0
    for limit, free in (("max", None), ("3000000", 1000000), ("1000000", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n", encoding="utf-8")
        (tmp_path / "memory.current").write_text("2000000\n", encoding="utf-8")
        assert free_memory() == free if free is not None else free_memory() > 10**7


def test_a_model_needs_room_for_weights_and_gradients(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 8e6)
    check_memory(1_000_000)
    with pytest.raises(ValueError, match="1 million parameters, which need more than 0.0 GiB") as caught:
        check_memory(1_000_001)
    assert "\n" not in str(caught.value)
    check_model(lambda: nn.Linear(1000, 999))
    with pytest.raises(ValueError, match="choose smaller sizes"):
        check_model(lambda: nn.Linear(1000, 1000))


def test_looking_draws_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_model(lambda: nn.Linear(8, 8))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("flags", [
    "--d_h 800000", "--adapter lora --lora_rank 10000000", "--match_params 1000000000000", f"{H} --d_model 100000",
    "--arch enhanced --d_model 65536"])
def test_sizes_that_no_machine_holds_are_one_line(flags, tmp_path, capsys):
    words = [*flags.split(), "--device", "cpu", "--save_dir", str(tmp_path / "runs"), "--eval_n", "2"]
    assert train.main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train.py: error: the model would have ") and line.endswith("choose smaller sizes")
    assert not (tmp_path / "runs").exists()


def test_an_allocator_that_refuses_is_one_line_and_other_errors_are_not_hidden(monkeypatch, tmp_path, capsys):
    refusal = None
    for size in (2**62, 2**50):
        try:
            torch.empty(size // 4)
        except RuntimeError as error:
            refusal = error
    for error, known in ((refusal, True), (MemoryError(), True), (torch.OutOfMemoryError("GPU"), True),
                         (RuntimeError("shapes differ"), False)):
        assert lacks_memory(error) is known, error

        def fails(*arguments, error=error):
            raise error

        monkeypatch.setattr(train, "run_of", fails)
        words = ["--task", "toy_add", "--save_dir", str(tmp_path)]
        if known:
            assert train.main(words) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert line.startswith(f"train.py: error: {train.MEMORY}")
        else:
            with pytest.raises(RuntimeError, match="shapes differ"):
                train.main(words)
