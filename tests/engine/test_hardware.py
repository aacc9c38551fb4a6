"""hardware: threads are those that multiply fastest now; the user's own number is obeyed."""

from __future__ import annotations

import os

import pytest
import torch

import options
import train
from engine import environment, hardware


@pytest.fixture
def threads_again():
    """Leaves torch with the threads it had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("speed_up,chosen", [(1.9, 2), (1.1, 1), (0.1, 1)])
def test_more_threads_are_taken_where_they_pay(speed_up, chosen, monkeypatch, threads_again):
    torch.set_num_threads(2)
    monkeypatch.setattr(hardware, "_seconds_of_products", lambda threads: 1.0 if threads == 1 else 1 / speed_up)
    assert hardware.best_threads() == chosen == torch.get_num_threads()


def test_one_thread_needs_no_measurement(monkeypatch, threads_again):
    torch.set_num_threads(1)
    monkeypatch.setattr(hardware, "_seconds_of_products", lambda threads: 1 / 0)
    assert hardware.best_threads() == 1


def test_the_measurement_takes_a_few_products(threads_again):
    assert 0 < hardware._seconds_of_products(1)
    assert torch.get_num_threads() == 1


def test_what_the_user_says_is_obeyed(monkeypatch):
    monkeypatch.setattr(hardware, "best_threads", lambda: 7)
    opts = options.parse(["--device", "cpu"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert train.with_threads(opts).num_threads == 0
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert train.with_threads(opts).num_threads == 7
    assert train.with_threads(options.replace(opts, num_threads=2)).num_threads == 2


@pytest.mark.parametrize("name,value", environment.DEFAULTS.items())
def test_what_libraries_read_is_set_unless_the_environment_says_otherwise(monkeypatch, name, value):
    monkeypatch.delenv(name, raising=False)
    environment.prepare()
    assert os.environ[name] == value
    monkeypatch.setenv(name, "7")
    environment.prepare()
    assert os.environ[name] == "7"


def test_the_training_command_keeps_few_programs_of_matrix_products(monkeypatch):
    for name in environment.DEFAULTS:
        monkeypatch.setenv(name, "set")  # so that it is as before after the test
        del os.environ[name]
    assert train.main(["--help"]) == 0
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) <= 128
    assert int(os.environ["LRU_CACHE_CAPACITY"]) <= 128


@pytest.mark.parametrize("limit, native", [
    ("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True), ("", True),
])
def test_a_processor_held_to_older_instructions_multiplies_no_bf16(monkeypatch, limit, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", limit)
    assert hardware.multiplies_bf16.__wrapped__("cpu") is native
