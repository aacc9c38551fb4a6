"""The probability of a generated answer is that of its tokens, computed anew here, and watching changes no answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from batching import PromptConfig, PromptFormat
from engine.confidence import Confidence
from engine.decoding import Decoding, generated_length
from evaluation import generate_answers, stop_ids
from host import load_host, load_tokenizer

QUESTIONS = ["12 + 7 =", "Calculate 5 * 8. What is the answer?", "1"]


@pytest.fixture(scope="module")
def loaded(tiny_host):
    tokenizer = load_tokenizer(str(tiny_host))
    return load_host(str(tiny_host)), PromptFormat(tokenizer, PromptConfig())


@torch.no_grad()
def by_hand(model, prompt_format: PromptFormat, question: str, budget: int) -> tuple[float, int]:
    """(probability of the likeliest tokens up to the end, their number), one question without padding or cache."""
    (ids,) = prompt_format.prompts([question])
    ids, ends, chance, count = list(ids), stop_ids(model, prompt_format), 1.0, 0
    while count < budget:
        chances = model(torch.tensor([ids])).logits[0, -1].double().softmax(dim=-1)
        ids.append(int(chances.argmax()))
        chance *= float(chances.max())
        count += 1
        if ids[-1] in ends:
            break
    return chance, count


def test_the_confidence_is_the_probability_of_the_tokens_up_to_the_end(loaded, monkeypatch):
    model, prompt_format = loaded
    # The first token of one answer becomes an end, so that rows end at different lengths.
    (ids,) = prompt_format.prompts(QUESTIONS[:1])
    first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first])
    expected = [by_hand(model, prompt_format, question, 5) for question in QUESTIONS]
    assert len({count for _, count in expected}) > 1, "the case needs answers of different lengths"

    decoding = Decoding(confidence=True)
    answers = generate_answers(model, prompt_format, QUESTIONS, 5, decoding, torch.device("cpu"))
    assert [answer.tokens for answer in answers] == [count for _, count in expected]
    assert [answer.confidence for answer in answers] == pytest.approx([chance for chance, _ in expected], rel=1e-4)

    silent = generate_answers(model, prompt_format, QUESTIONS, 5, replace(decoding, confidence=False),
                              torch.device("cpu"))
    assert [replace(answer, confidence=None) for answer in answers] == silent


def test_padding_behind_a_stop_string_is_no_part_of_an_answer(loaded, monkeypatch):
    """With a pad that is no end, a row that a stop string ends early is filled up with it."""
    model, prompt_format = loaded
    pad_id = max(set(prompt_format.tokenizer.all_special_ids) - set(stop_ids(model, prompt_format)))
    monkeypatch.setattr(prompt_format, "pad_id", pad_id)
    alone = [generate_answers(model, prompt_format, [question], 12, Decoding(confidence=True), torch.device("cpu"),
                              stop_strings=["e", "a", "o"])[0] for question in QUESTIONS]
    assert len({answer.tokens for answer in alone}) > 1, "the case needs rows that stop at different lengths"
    together = generate_answers(model, prompt_format, QUESTIONS, 12, Decoding(confidence=True), torch.device("cpu"),
                                stop_strings=["e", "a", "o"])
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    expected = [answer.confidence for answer in alone]
    assert [answer.confidence for answer in together] == pytest.approx(expected, rel=1e-3)


def test_a_length_counts_the_end_and_no_padding():
    assert generated_length([5, 6, 2, 0, 0], {2}, 0) == 3
    assert generated_length([5, 6, 0, 0], {2}, 0) == 2  # a stop string
    assert generated_length([5, 0, 0], {0}, 0) == 2  # the pad is the end
    assert generated_length([5, 6, 7], {2}, 0) == 3 and generated_length([0, 0], {2}, 0) == 1


def test_sampled_answers_have_no_confidence():
    with pytest.raises(ValueError, match="temperature 0 alone"):
        Decoding(temperature=1.0, confidence=True)


def test_a_logit_that_is_no_number_gives_no_confidence():
    watch = Confidence()
    watch(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0.0, torch.nan]]))
    assert watch.of([1]) == [0.0]


def test_rounding_makes_no_probability_above_one():
    watch = Confidence()
    logits = torch.full((2, 9), -1e4)
    logits[:, 3] = 1e4
    assert watch(torch.zeros(2, 1, dtype=torch.int64), logits) is logits
    assert watch.of([1, 0]) == [1.0, 1.0]
