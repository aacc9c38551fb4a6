"""evaluation: accuracy is generated text with a score of exactly 1.0, beside the bare LLM, with its interval."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from batching import PromptConfig, PromptFormat, pad
from engine.intervals import wilson
from engine.records import question_hash
from engine.report import AnswerLine, stamped
from evaluation import (
    OVERALL,
    TARGET_MARGIN,
    Answer,
    Decoding,
    Evaluation,
    answer,
    answer_budget,
    evaluate,
    generate_texts,
    solved_rate,
)
from reasoning_gym_wrapper import Example, Reserve, make_tasks
from tiny_runs import tiny_model

# --- a model that says what it is told to, through transformers' real `generate` --------------------------------------


class Parrot(PreTrainedModel, GenerationMixin):
    """Spells `replies[question]`, then end of sequence if `closes`; being shown the gold answer is an error."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, prompt_format: PromptFormat, replies: dict[str, str], bare: Parrot | None = None, closes=True):
        super().__init__(PreTrainedConfig(vocab_size=len(prompt_format.tokenizer)))
        self.format, self.closes, self._bare = prompt_format, closes, bare
        self.weight = torch.nn.Parameter(torch.zeros(1))
        tokenizer = prompt_format.tokenizer
        ids = tokenizer(list(replies.values()), add_special_tokens=False)["input_ids"]
        asked = prompt_format.prompts(list(replies))
        self.spoken = {tuple(q): row + [tokenizer.eos_token_id] * closes for q, row in zip(asked, ids, strict=True)}
        self.seen: list[torch.Tensor] = []
        self.autocast: list[bool] = []
        self.modes: list[bool] = []

    @contextlib.contextmanager
    def bare(self):
        yield self._bare

    def generate(self, input_ids, attention_mask, **kwargs):
        self.asked = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        self.start = input_ids.shape[1]
        self.seen.append(input_ids)
        return super().generate(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)

    def forward(self, input_ids, attention_mask=None, labels=None, segments_log=None, **_):
        assert labels is None, "evaluation fed the gold answer to the model"
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        self.modes.append(self.training)
        if segments_log is not None:
            segments_log.append(torch.arange(1, len(input_ids) + 1))
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, asked in enumerate(self.asked):
            spoken = self.spoken[asked]
            logits[row, -1, spoken[(input_ids.shape[1] - self.start) % len(spoken)]] = 9.0
        return CausalLMOutput(logits=logits + self.weight)


class Scorer:
    """Full score for the gold answer, 0.01 for any other number (as gsm_symbolic), an error for `boom`."""

    def __init__(self):
        self.heard: list[str] = []

    def score_answer(self, text, entry):
        self.heard.append(text)
        if text == "boom":
            raise RuntimeError("odd text")
        return 1.0 if text == entry["answer"] else 0.01 if text.isdigit() else 0.0


class Source:
    def __init__(self):
        self.scorer = Scorer()


def example(question: str, target: str | None, task: str = "sums", source: Source | None = None) -> Example:
    return Example(question, target, task, {"question": question, "answer": target, "metadata": {}}, source or Source())


def given_answer(score: float = 1.0, task: str = "a", finished=True, raised=False, segments=2, question="q") -> Answer:
    return Answer(example(question, "1", task), "text", score, finished, raised, segments)


@pytest.fixture
def prompts(tokenizer) -> PromptFormat:
    return PromptFormat(tokenizer)


# --- what counts as right


def test_a_model_right_under_teacher_forcing_and_wrong_when_generating_is_wrong(prompts):
    examples = [example("1 + 1", "2"), example("2 + 2", "4")]
    parrot = Parrot(prompts, {"1 + 1": "3", "2 + 2": "4"})
    answers = answer(parrot, prompts, examples, Decoding())
    assert [a.text for a in answers] == ["3", "4"] and [a.solved for a in answers] == [False, True]
    assert parrot.seen[0].shape[1] == max(map(len, prompts.prompts(["1 + 1", "2 + 2"])))  # the question and no more


def test_the_gold_answer_changes_no_generated_text(prompts, model, questions):
    decoding = Decoding(max_new_tokens=5)
    texts = [a.text for a in answer(model, prompts, questions, decoding)]
    other = [example(e.question, "7" * 9, "sums") for e in questions]
    assert [a.text for a in answer(model, prompts, other, decoding)] == texts and any(texts)


@pytest.mark.parametrize("score,solved", [(1.0, True), (0.01, False), (0.999999, False), (0.0, False)])
def test_solved_is_a_score_of_exactly_one(score, solved):
    assert given_answer(score).solved is solved
    assert solved_rate([given_answer(score)]) == float(solved)


def test_a_partial_score_counts_in_the_mean_and_not_as_solved(prompts):
    examples = [example("1 + 1", "2"), example("2 + 2", "4")]
    evaluation = Evaluation(answer(Parrot(prompts, {"1 + 1": "3", "2 + 2": "4"}), prompts, examples, Decoding()))
    values = {row["metric"]: row["value"] for row in evaluation.rows()}
    assert values["solved"] == 0.5 and values["mean_score"] == pytest.approx(0.505)


def test_a_raising_scorer_scores_zero_and_is_counted(prompts):
    examples = [example("1 + 1", "2"), example("2 + 2", "4")]
    answers = answer(Parrot(prompts, {"1 + 1": "boom", "2 + 2": "4"}), prompts, examples, Decoding(max_new_tokens=9))
    assert [(a.text, a.score, a.raised) for a in answers] == [("boom", 0.0, True), ("4", 1.0, False)]
    values = {row["metric"]: row["value"] for row in Evaluation(answers).rows()}
    assert values["scorer_errors"] == 0.5 and values["solved"] == 0.5


def test_answers_cut_at_the_limit_are_counted_as_truncated(prompts):
    examples = [example("1 + 1", "2"), example("2 + 2", "4")]
    endless = Parrot(prompts, {"1 + 1": "2", "2 + 2": "4"}, closes=False)
    cut = answer(endless, prompts, examples, Decoding(max_new_tokens=3))
    assert [(a.text, a.finished, a.solved) for a in cut] == [("222", False, False), ("444", False, False)]
    whole = answer(Parrot(prompts, {"1 + 1": "2", "2 + 2": "4"}), prompts, examples, Decoding(max_new_tokens=2))
    assert all(a.finished and a.solved for a in whole)
    values = {row["metric"]: row["value"] for row in Evaluation([cut[0], whole[1]]).rows()}
    assert values["truncated"] == 0.5


def test_generation_stops_at_the_sentinel_and_the_verifier_never_sees_it(tokenizer):
    prompts, source = PromptFormat(tokenizer, PromptConfig(sentinel="##")), Source()
    examples = [example("1 + 1", "2", source=source), example("2 + 2", "4", source=source)]
    parrot = Parrot(prompts, {"1 + 1": "2##9999999999", "2 + 2": "4##"})
    answers = answer(parrot, prompts, examples, Decoding(max_new_tokens=16))
    assert [(a.text, a.finished, a.solved) for a in answers] == [("2", True, True), ("4", True, True)]
    assert source.scorer.heard == ["2", "4"]
    assert len(parrot.autocast) < 6, "generation went on behind the sentinel"


def test_the_budget_is_the_longest_target_and_a_margin(prompts):
    examples = [example("1 + 1", "2"), example("9 * 9", "1234567"), example("2 + 2", None)]
    longest = len(prompts.tokenizer("1234567", add_special_tokens=False)["input_ids"]) + 1  # and end of sequence
    assert answer_budget(prompts, examples, 0) == longest + TARGET_MARGIN
    assert answer_budget(prompts, examples, 3) == 3
    assert answer_budget(prompts, examples[2:], 0) == 64


# --- how answers are decoded


@pytest.fixture(scope="module")
def model(tiny_host):
    return tiny_model(tiny_host)


@pytest.fixture(scope="module")
def questions() -> list[Example]:
    examples = Reserve(make_tasks(["toy_add"], "default"), 7).examples
    longer = [example(f"Now a longer one, please: {e.question}", e.target) for e in examples[:3]]
    return examples + longer


@torch.no_grad()
def greedy(model, prompts: PromptFormat, question: str, count: int) -> str:
    """The slow truth: one example, no padding, no cache, the whole sequence again for each token."""
    ids = torch.tensor(prompts.prompts([question]))
    start = ids.shape[1]
    for _ in range(count):
        mask = (torch.arange(ids.shape[1]) < start)[None].long()
        chosen = model(input_ids=ids, prompt_mask=mask).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, chosen[:, None]], dim=1)
    return prompts.answer_text(ids[0, start:])[0]


def test_answers_are_the_greedy_continuation(model, prompts, questions):
    answers = answer(model, prompts, questions, Decoding(max_new_tokens=5))
    assert [a.text for a in answers] == [greedy(model, prompts, e.question, 5) for e in questions]
    assert len({a.text for a in answers}) > 1


def test_order_and_batch_size_change_no_answer(model, prompts, questions):
    first = answer(model, prompts, questions, Decoding(max_new_tokens=5, batch_size=4))
    for size, order in ((1, 1), (3, -1), (64, -1)):
        again = answer(model, prompts, questions[::order], Decoding(max_new_tokens=5, batch_size=size))
        assert again[::order] == first, (size, order)
    assert [a.example for a in first] == questions


def test_batches_are_no_larger_than_asked_and_progress_is_told(prompts):
    examples = [example(f"{i} + 1", "2") for i in range(5)]
    parrot, told = Parrot(prompts, {e.question: "2" for e in examples}), []
    answer(parrot, prompts, examples, Decoding(batch_size=2), told.append)
    assert [len(ids) for ids in parrot.seen] == [2, 2, 1] and told == [2, 4, 5]


def test_sampling_leaves_the_callers_random_state_alone_and_depends_on_the_seed(model, prompts, questions):
    def sampled(seed: int) -> list[str]:
        decoding = Decoding(temperature=2.0, max_new_tokens=6, seed=seed)
        return [a.text for a in answer(model, prompts, questions, decoding)]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sampled(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    assert sampled(1) == first != sampled(2)


def test_no_sampling_default_of_the_host_sneaks_in(model, prompts, questions, monkeypatch):
    greedy_texts = [a.text for a in answer(model, prompts, questions, Decoding(max_new_tokens=5))]
    for name, value in {"do_sample": True, "temperature": 3.0, "top_k": 2, "repetition_penalty": 9.0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert [a.text for a in answer(model, prompts, questions, Decoding(max_new_tokens=5))] == greedy_texts
    top = Decoding(temperature=5.0, top_k=1, max_new_tokens=5)  # among one token there is no choice
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.0)
    assert [a.text for a in answer(model, prompts, questions, top)] == greedy_texts


@pytest.mark.parametrize("decoding", [Decoding(0.7, 0.9, 5), Decoding(), Decoding(1.0, 0.5, 0)])
def test_decoding_hands_every_sampling_field_on(decoding):
    told = decoding.arguments()
    if decoding.temperature:
        assert (told["temperature"], told["top_p"], told["top_k"]) == (
            decoding.temperature, decoding.top_p, decoding.top_k)
    assert told["do_sample"] is (decoding.temperature > 0)
    assert {"temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "no_repeat_ngram_size"} <= set(told)


def test_generate_texts_answers_as_evaluation_does(model, prompts, questions):
    decoding = Decoding(max_new_tokens=5)
    texts = generate_texts(model, prompts, [e.question for e in questions], decoding)
    assert texts == [a.text for a in answer(model, prompts, questions, decoding)]


# --- beside the bare LLM


def test_the_bare_llm_answers_the_same_items_by_the_same_rules(prompts):
    examples = [example("1 + 1", "2"), example("2 + 2", "4")]
    bare = Parrot(prompts, {"1 + 1": "2", "2 + 2": "5555"})
    evaluation = evaluate(Parrot(prompts, {"1 + 1": "2", "2 + 2": "4"}, bare), prompts, examples, Decoding())
    assert [(a.text, a.finished) for a in evaluation.bare] == [("2", True), ("5555", True)]
    assert [a.example for a in evaluation.bare] == [a.example for a in evaluation.answers] == examples
    assert (evaluation.solved_rate(), evaluation.solved_rate(bare=True)) == (1.0, 0.5)
    assert {a.segments for a in evaluation.bare} == {0}
    again = evaluate(Parrot(prompts, {"1 + 1": "2", "2 + 2": "4"}), prompts, examples, Decoding(), evaluation.bare)
    assert again.bare is evaluation.bare  # known answers are not generated again


def test_autocast_covers_the_model_and_not_the_bare_llm(prompts):
    examples, replies = [example("1 + 1", "2")], {"1 + 1": "2"}
    bare = Parrot(prompts, replies)
    parrot = Parrot(prompts, replies, bare)
    evaluate(parrot, prompts, examples, Decoding(), autocast=torch.autocast("cpu", torch.bfloat16))
    assert set(bare.autocast) == {False} and set(parrot.autocast) == {True}


def test_evaluation_runs_in_evaluation_mode_and_restores_the_mode(prompts):
    examples, replies = [example("1 + 1", "2")], {"1 + 1": "2"}
    parrot = Parrot(prompts, replies, Parrot(prompts, replies)).train()
    evaluate(parrot, prompts, examples, Decoding(), bare=[])
    assert parrot.training and set(parrot.modes) == {False}
    parrot.spoken = {}
    with pytest.raises(KeyError):
        evaluate(parrot, prompts, examples, Decoding(), bare=[])
    assert parrot.training
    parrot = Parrot(prompts, replies).eval()
    evaluate(parrot, prompts, examples, Decoding(), bare=[])
    assert not parrot.training


def test_with_act_the_segments_really_used_are_reported_for_each_item(tiny_host, prompts, questions):
    model = tiny_model(tiny_host, use_act=True, segments=4)
    halt, alone = model.model.addon.core.halt, [4]
    halt.bias.data.fill_(0.0)
    for seed in range(20):  # the head is random: one that halts some examples early and not all is soon found
        if len(set(alone)) > 1:
            break
        halt.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
        alone = []
        for item in questions:
            ids, mask = pad(prompts.prompts([item.question]), prompts.pad_id, "left")
            alone.append(int(model(input_ids=ids, attention_mask=mask, prompt_mask=mask).segments_used))
    answers = answer(model, prompts, questions, Decoding(max_new_tokens=3, batch_size=4))
    assert [a.segments for a in answers] == alone and len(set(alone)) > 1
    rows = Evaluation(answers).rows()
    overall = [row for row in rows if row["task"] == OVERALL]
    assert {row["segments_used"] for row in overall} == {sum(alone) / len(alone)}


# --- the records


def test_rows_are_long_form_per_task_and_overall():
    ours = [given_answer(1.0, "a", segments=1), given_answer(0.01, "b", finished=False, segments=4),
            given_answer(0.0, "b", raised=True, segments=4), given_answer(1.0, "b", segments=3)]
    bare = [given_answer(0.0, "a", segments=0), *[given_answer(1.0, "b", segments=0)] * 3]
    rows = stamped(Evaluation(ours, bare).rows(), 40, 12.5)
    assert [row["task"] for row in rows[::7]] == ["a", "b", OVERALL]
    assert [row["metric"] for row in rows[:7]] == ["solved", "mean_score", "truncated", "scorer_errors",
                                                   "solved_strict", "solved_extracted", "gain"]
    found = {(row["task"], row["metric"]): row for row in rows}
    assert found["b", "solved"] == {
        "step": 40, "task": "b", "metric": "solved", "value": 1 / 3, "n": 3, "ci_low": wilson(1, 3)[0],
        "ci_high": wilson(1, 3)[1], "bare": 1.0, "segments_used": 11 / 3, "elapsed_s": 12.5}
    assert found["b", "truncated"]["value"] == found["b", "scorer_errors"]["value"] == 1 / 3
    assert found[OVERALL, "solved"]["value"] == 0.5 and found[OVERALL, "solved"]["n"] == 4
    assert found[OVERALL, "mean_score"]["bare"] == 0.75 and found[OVERALL, "mean_score"]["ci_low"] is None
    single = Evaluation(ours[1:]).rows()
    assert "gain" not in {row["metric"] for row in single}, "there is nothing to gain over"
    assert {row["task"] for row in single} == {"b"} and {row["bare"] for row in single} == {None}


def read(strict: bool, extracted: bool, finished=True, task="a", by="strict") -> Answer:
    """An answer whose text is solved as a whole or not, and once the answer is taken out of it or not."""
    score = float(strict if by == "strict" else extracted)
    return Answer(example("q", "1", task), "text", score, finished, False, 0, strict=strict, extracted=extracted)


def test_the_table_shows_both_readings_and_how_many_were_cut():
    ours = [read(True, True), read(False, False), read(True, True, task="b")]
    bare = [read(False, True, finished=False), read(False, True, finished=False), read(True, True, task="b")]
    first, second, overall = Evaluation(ours, bare).table("LLM + LoRA")
    assert first.lines == [AnswerLine("bare LLM", 2, 0, 2, cut=2), AnswerLine("LLM + LoRA", 2, 1, 1, cut=0)]
    assert (first.task, first.gain, first.over) == ("a", -0.5, "extracted")
    assert (second.gain, second.over) == (0.0, "strict"), "of equal protocols the simplest is named"
    assert (overall.task, overall.lines[0].n, overall.over) == (OVERALL, 3, "extracted")
    assert [line.name for line in Evaluation(ours).table()[0].lines] == ["LLM + HRM"]
    assert Evaluation(ours).table()[0].gain is None


def test_the_gain_is_over_the_best_of_all_protocols_of_the_bare_llm():
    ours = [read(True, True), read(True, True), read(False, False), read(False, False)]
    bare = [read(False, True), *[read(False, False)] * 3]
    shown = [read(False, True), read(True, True), read(False, True, finished=False), read(False, False)]
    evaluation = Evaluation(ours, bare, few_shot=shown, shots=3)
    (task,) = evaluation.table()
    assert (task.gain, task.over) == (0.5 - 0.75, "3-shot extracted")
    assert task.lines[1] == AnswerLine("bare, 3-shot", 4, 1, 3, 1)
    rows = {row["metric"]: row for row in evaluation.rows()}
    assert (rows["gain"]["value"], rows["gain"]["bare"]) == (-0.25, 0.75)
    assert (rows["solved"]["bare"], rows["solved_extracted"]["bare"]) == (0.0, 0.25)
    assert rows["bare_few_shot_extracted"]["value"] == 0.75 and rows["bare_few_shot_strict"]["value"] == 0.25
    assert rows["bare_few_shot_truncated"]["value"] == 0.25 and rows["truncated"]["bare"] == 0.0
    assert rows["bare_few_shot_strict"]["ci_low"] == wilson(1, 4)[0]


@pytest.mark.parametrize(("way", "solved"), [("text", 0), ("last_number", 1), ("tags", 0), ("boxed", 0)])
def test_answer_from_says_which_reading_solved_is_for_both_columns(tokenizer, way, solved):
    asked = PromptFormat(tokenizer, PromptConfig(answer_from=way))
    replies = {"2 + 2": "2 + 2 is 4"}
    parrot = Parrot(asked, replies, Parrot(asked, replies))
    evaluation = evaluate(parrot, asked, [example("2 + 2", "4")], Decoding(max_new_tokens=30))
    rows = {row["metric"]: (row["value"], row["bare"]) for row in evaluation.rows()}
    assert rows["solved"] == (solved, solved) and rows["solved_strict"] == (0.0, 0.0)
    assert rows["mean_score"] == (solved, solved)
    extracted = float(way in ("text", "last_number"))
    assert rows["solved_extracted"] == (extracted, extracted), "without a way the last number is read beside the text"


def test_predictions_are_one_line_per_item_paired_with_the_bare_score():
    ours = [given_answer(1.0, "a", question="Q  1"), given_answer(0.01, "b"), given_answer(0.0, "a", segments=5)]
    bare = [given_answer(0.5, "a"), given_answer(1.0, "b"), given_answer(0.0, "a")]
    lines = stamped(Evaluation(ours, bare).predictions(), 9)
    assert [line["id"] for line in lines] == ["a/00000", "b/00000", "a/00001"]
    assert lines[0] == {"step": 9, "id": "a/00000", "task": "a", "prompt_hash": question_hash("q 1"), "finished": True,
                        "prediction": "text", "score": 1.0, "bare_score": 0.5, "segments_used": 2,
                        "question": "Q  1", "gold": "1", "answer": "text", "bare_prediction": "text",
                        "bare_answer": "text"}
    assert [line["bare_score"] for line in Evaluation(ours).predictions()] == [None] * 3
    with pytest.raises(ValueError):
        Evaluation(ours, bare[:2]).predictions()


def test_a_prediction_says_whose_answer_had_to_be_taken_out_of_its_text():
    ours, bare, shown = read(True, True), read(False, True), read(False, True)
    (line,) = Evaluation([ours], [bare], few_shot=[shown], shots=2).predictions()
    assert (line["bare_extracted"], line["few_shot_extracted"], line["few_shot_score"]) == (True, True, 0.0)
    assert "extracted" not in line
