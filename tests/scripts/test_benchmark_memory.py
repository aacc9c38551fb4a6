"""benchmark_memory: the random LLM is one that can be loaded, sizes that cannot be, the three runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import benchmark_memory
from host import load_host


def test_the_random_llm_loads_in_bf16_and_its_logits_differ_from_token_to_token(tmp_path):
    count = benchmark_memory.random_llm(tmp_path, 64, 1, 2048)
    host = load_host(str(tmp_path))
    assert sum(parameter.numel() for parameter in host.parameters()) == count
    logits = host(input_ids=host.get_input_embeddings().weight.new_tensor([[5, 6, 7]]).long()).logits[0]
    assert str(host.dtype) == "torch.bfloat16" and logits.isfinite().all()
    assert not logits[0].equal(logits[1]) and logits[0].float().std() > 0


@pytest.mark.parametrize("words,line", [
    ("--width 100", "--width 100 must be a multiple of 64, the width of an attention head"),
    ("--vocabulary 9", "--vocabulary 9 must be at least 2048"), ("--steps 0", "--steps 0 must be at least 1"),
])
def test_sizes_that_cannot_be_are_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark_memory.parse(words.split())
    assert end.value.code == 2 and line in capsys.readouterr().err


@pytest.mark.slow
def test_the_three_runs_end_with_equal_losses(tmp_path):
    figures = benchmark_memory.measure(benchmark_memory.parse("--width 64 --layers 1 --steps 2".split()), tmp_path)
    assert figures["equal"] and len(figures["losses"]) == 2
    assert all(peak > 1e8 for peak in figures["peak_bytes"].values())
