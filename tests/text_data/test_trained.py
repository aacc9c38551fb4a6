"""text_data.trained: what a checkpoint keeps of the questions it was trained on."""

from __future__ import annotations

import json

import pytest

from text_data import trained
from text_data.trained import TRAINED, TrainedQuestions, trained_by, trained_in


def record_of(*questions: str) -> TrainedQuestions:
    record = TrainedQuestions()
    for question in questions:
        record.add(question)
    return record


def test_a_record_comes_back_as_it_was_and_knows_questions_by_their_words():
    documents = record_of("What is 1 + 1?", "What  is 2 + 2?").documents()
    again = trained_in(documents, goes_on=True)
    assert "what is 1 + 1?" in again.own and "What is 2 + 2?" in again and "What is 3 + 3?" not in again
    assert again.is_whole and len(again.earlier) == 0 and again.documents() == documents


def test_for_the_next_stage_all_is_earlier_and_is_handed_on():
    first = record_of("a").documents()
    second = trained_in(first, goes_on=False)
    assert "a" in second.earlier and len(second.own) == 0
    second.add("b")
    second.add("a")
    assert len(second.own) == 1
    third = trained_in(second.documents(), goes_on=False)
    assert "a" in third.earlier and "b" in third.earlier
    resumed = trained_in(second.documents(), goes_on=True)
    assert "a" in resumed.earlier and "b" not in resumed.earlier and "b" in resumed.own


def test_a_checkpoint_without_a_record_and_one_of_too_many_questions_are_not_whole(monkeypatch):
    assert not trained_in({}, goes_on=True).is_whole
    assert trained_by(None, goes_on=False).is_whole
    monkeypatch.setattr(trained, "MOST", 2)
    record = record_of("a", "b", "a")
    assert record.is_whole
    record.add("c")
    assert not record.is_whole and "c" not in record
    assert not trained_in(record.documents(), goes_on=False).is_whole


def test_a_record_takes_eight_bytes_a_question():
    many = record_of(*map(str, range(1000)))
    assert len(many.documents()[TRAINED]) == pytest.approx(8000, abs=60)
    assert set(json.loads(many.documents()[TRAINED])) == {"earlier", "own", "whole"}
