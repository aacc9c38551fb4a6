"""hardware: threads are those that multiply fastest now; the user's own number is obeyed."""

from __future__ import annotations

import os

import pytest
import torch

import options
import train
from engine import hardware


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


def test_idle_threads_sleep_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    train.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    train.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
