"""batching: what the model is shown, what it is asked for, and what the verifier is shown."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from addon.streams import EpochStream, TrainStream, training_examples
from addon.train_batches import TrainBatches
from batching import (
    PLAIN_CUE,
    Batch,
    PromptConfig,
    PromptFormat,
    pad,
)
from conftest import SPECIAL, build_tokenizer
from engine.batches import IGNORE
from reasoning_gym_wrapper import Example, Reserve, Task

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
QUESTIONS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
SOURCE = Task("toy_add")


def example(question: str, target: str | None = "5") -> Example:
    return Example(question, target, "toy_add", {"metadata": {}}, SOURCE)


def no_special(text: str) -> bool:
    return not any(token in text for token in SPECIAL)


@pytest.fixture(scope="module")
def formats(tokenizer) -> dict[str, PromptFormat]:
    return {style: PromptFormat(tokenizer, PromptConfig(style)) for style in ("chat", "plain")}


# --- batches ----------------------------------------------------------------------------------------------------------


@SHARED
@given(st.lists(st.tuples(QUESTIONS, ANY_TEXT), min_size=1, max_size=5), st.sampled_from(["chat", "plain"]))
def test_a_batch_is_its_rows_with_pads_outside(formats, pairs, style):
    prompt_format = formats[style]
    examples = [example(question, target) for question, target in pairs]
    batch = prompt_format.batch(examples)
    prompts = prompt_format.prompts([question for question, _ in pairs])
    targets = prompt_format.targets([target for _, target in pairs])
    S, T = batch.prompt_ids.shape[1], batch.target_ids.shape[1]
    assert (S, T) == (max(map(len, prompts)), max(map(len, targets)))
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(pairs), S + T)
    assert batch.examples == examples
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        # Every prompt ends in column S - 1, every target starts in column S: no pad ever stands between them.
        start, end = S - len(prompt), S + len(target)
        assert batch.input_ids[i, start:end].tolist() == prompt + target
        assert batch.attention_mask[i].tolist() == [0] * start + [1] * (end - start) + [0] * (S + T - end)
        outside = batch.input_ids[i, :start].tolist() + batch.input_ids[i, end:].tolist()
        assert set(outside) <= {prompt_format.pad_id}
        assert batch.prompt_mask[i].tolist() == [0] * start + [1] * len(prompt)
        # Exactly the target is scored, its end of sequence included.
        assert batch.labels[i].tolist() == target + [IGNORE] * (T - len(target))
        assert target[-1] == prompt_format.tokenizer.eos_token_id


def test_masks_are_int64_as_transformers_expects(formats):
    batch = formats["chat"].batch([example("1 + 1?", "2"), example("What is 10 + 10?", "20")])
    for tensor in (batch.prompt_ids, batch.prompt_mask, batch.target_ids, batch.labels, batch.attention_mask):
        assert tensor.dtype == torch.int64
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, Batch) and moved.examples == batch.examples
    assert torch.equal(moved.input_ids, batch.input_ids) and torch.equal(moved.labels, batch.labels)


def test_end_of_sequence_is_scored_even_where_it_is_the_pad_token():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    prompt_format = PromptFormat(tokenizer)
    assert prompt_format.pad_id == tokenizer.eos_token_id
    batch = prompt_format.batch([example("a", "1"), example("a longer question", "123")])
    assert (batch.labels == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]
    assert batch.attention_mask.sum(1).tolist() == prompt_format.lengths(batch.examples)


def test_an_absent_target_is_an_empty_answer(formats):
    batch = formats["chat"].batch([example("1 + 1?", None)])
    assert batch.labels.tolist() == [[formats["chat"].tokenizer.eos_token_id]]


@given(st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_pad_keeps_the_rows(rows, side):
    ids, mask = pad(rows, 0, side)
    assert [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)] == rows
    for row, seen in zip(rows, mask.tolist(), strict=True):
        pads = [0] * (ids.shape[1] - len(row))
        assert seen == (pads + [1] * len(row) if side == "left" else [1] * len(row) + pads)
    assert ids[mask == 0].eq(0).all()


# --- prompts ----------------------------------------------------------------------------------------------------------


@SHARED
@given(QUESTIONS, ANY_TEXT, st.sampled_from([None, "Answer with a number."]))
def test_chat_prompts_and_targets_are_the_template_s_own_text(tokenizer, question, target, header):
    assume(no_special(question) and no_special(target))
    prompt_format = PromptFormat(tokenizer, PromptConfig("chat", header))
    turns = [{"role": "system", "content": header}] if header else []
    turns += [{"role": "user", "content": question.strip()}]
    whole = turns + [{"role": "assistant", "content": target}]
    [prompt], [answer] = prompt_format.prompts([question]), prompt_format.targets([target])
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    assert prompt + answer == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("header", [None, "Be brief."])
def test_plain_prompts_are_question_and_cue(tokenizer, header):
    prompt_format = PromptFormat(tokenizer, PromptConfig("plain", header))
    assert not prompt_format.chat
    [prompt], [target] = prompt_format.prompts([" What is 1 + 2?\n"]), prompt_format.targets(["3"])
    before = "Be brief.\n" if header else ""
    assert tokenizer.decode(prompt) == f"{before}What is 1 + 2?{PLAIN_CUE}"
    assert tokenizer.decode(target) == f" 3{tokenizer.eos_token}"
    assert prompt + target == tokenizer(f"{before}What is 1 + 2?\nAnswer: 3{tokenizer.eos_token}")["input_ids"]


def test_auto_is_chat_where_there_is_a_template(tokenizer, plain_tokenizer):
    assert PromptFormat(tokenizer).chat and not PromptFormat(plain_tokenizer).chat
    asked = ["What is 1 + 2?"]
    chat, plain = PromptConfig("chat"), PromptConfig("plain")
    assert PromptFormat(tokenizer).prompts(asked) == PromptFormat(tokenizer, chat).prompts(asked)
    assert PromptFormat(plain_tokenizer).prompts(asked) == PromptFormat(plain_tokenizer, plain).prompts(asked)
    assert PromptFormat(tokenizer, chat).prompts(asked) != PromptFormat(tokenizer, plain).prompts(asked)


def test_the_system_header_is_a_turn_of_its_own(tokenizer):
    [prompt] = PromptFormat(tokenizer, PromptConfig("chat", "Be brief.")).prompts(["1 + 1?"])
    assert tokenizer.decode(prompt) == "<|bos|><|system|>Be brief.<|user|>1 + 1?<|assistant|>"


def test_a_question_that_looks_like_the_marker_is_rendered_as_it_is(tokenizer):
    [prompt] = PromptFormat(tokenizer, PromptConfig("chat")).prompts(["QUESTION-GOES-HERE QUESTION-GOES-HERE"])
    assert tokenizer.decode(prompt).count("QUESTION-GOES-HERE") == 2


def test_tokenizers_that_frame_text_keep_prompts_open_and_start_them_once():
    """With bos and eos added by the tokenizer: one bos in front, no eos behind, none of either in targets."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", bos), ("<|eos|>", eos)]
    )
    assert tokenizer("x")["input_ids"][0] == bos and tokenizer("x")["input_ids"][-1] == eos
    for style in ("plain", "chat"):
        prompt_format = PromptFormat(tokenizer, PromptConfig(style))
        [prompt], [target] = prompt_format.prompts(["1 + 1?"]), prompt_format.targets(["2"])
        assert prompt.count(bos) == 1 and prompt[0] == bos and eos not in prompt
        assert target.count(eos) == 1 and target[-1] == eos and bos not in target


def test_templates_and_tokenizers_that_cannot_serve_are_refused(plain_tokenizer):
    with pytest.raises(ValueError, match="--prompt_style chat needs a chat template"):
        PromptFormat(plain_tokenizer, PromptConfig("chat"))
    plain_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"chat template failed \(no system role\): try --prompt_style plain"):
        PromptFormat(plain_tokenizer, PromptConfig("chat", "header"))
    for template in ("nothing", "{{ messages[0]['content'] }} {{ messages[0]['content'] }}"):
        plain_tokenizer.chat_template = template
        with pytest.raises(ValueError, match="does not show the question once"):
            PromptFormat(plain_tokenizer)
    plain_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        PromptFormat(plain_tokenizer, PromptConfig("plain"))


# --- targets and answers ----------------------------------------------------------------------------------------------


@SHARED
@given(ANY_TEXT, st.sampled_from(["chat", "plain"]), st.sampled_from([None, "####", "<<END>>", "\n", " .", "é!"]))
def test_targets_come_back_as_answers(tokenizer, target, style, sentinel):
    assume(no_special(target))
    lead = " " if style == "plain" else ""
    assume(sentinel is None or (lead + target + sentinel).index(sentinel) == len(lead + target))
    prompt_format = PromptFormat(tokenizer, PromptConfig(style, sentinel=sentinel))
    [ids] = prompt_format.targets([target])
    assert prompt_format.answer_text(torch.tensor(ids)) == (target.strip(), True)
    assert ids[-1] == tokenizer.eos_token_id
    if sentinel:
        assert tokenizer.decode(ids[:-1]).endswith(target + sentinel)


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_the_sentinel_ends_every_target_and_no_verifier_sees_it(tokenizer, style):
    prompt_format = PromptFormat(tokenizer, PromptConfig(style, sentinel="[DONE]"))
    for ids in prompt_format.targets(["12", "_ 1\n2 _", ""]):
        assert tokenizer.decode(ids).endswith(f"[DONE]{tokenizer.eos_token}")
    assert prompt_format.batch([example("q", "7")]).labels.tolist() == prompt_format.targets(["7"])

    def answer(text: str) -> tuple[str, bool]:
        return prompt_format.answer_text(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))

    assert answer(" 12[DONE]") == answer("12[DONE]<|eos|><|pad|>") == ("12", True)
    assert answer("12[DONE] and on [DONE] and on") == ("12", True)
    assert answer("12<|eos|>[DONE]") == ("12", True)  # whichever comes first
    assert answer("12[DON") == ("12[DON", False)
    assert answer("12<|pad|>") == ("12", False)


def test_end_of_sequence_ends_an_answer(formats):
    tokenizer = formats["chat"].tokenizer
    ids = tokenizer("12<|eos|>13<|eos|><|pad|>", add_special_tokens=False)["input_ids"]
    assert formats["chat"].answer_text(torch.tensor(ids)) == ("12", True)
    assert formats["chat"].answer_text(torch.tensor(ids[:2])) == ("12", False)
    assert formats["chat"].answer_text(torch.tensor([], dtype=torch.int64)) == ("", False)


@pytest.mark.parametrize(("sentinel", "target"), [(".", "3.5"), ("\n", "1 2\n3 4"), ("aa", "ba"), (" .", ".5")])
def test_a_sentinel_that_would_cut_a_gold_answer_is_refused(tokenizer, sentinel, target):
    plain = PromptConfig("plain", sentinel=sentinel)  # plain targets start with a space
    prompt_format = PromptFormat(tokenizer, plain)
    prompt_format.targets(["3"])
    with pytest.raises(ValueError, match="is part of the gold answer .*: choose another"):
        prompt_format.targets(["3", target])


# --- training batches -------------------------------------------------------------------------------------------------


def stream_of(prompt_format: PromptFormat, train_n: int) -> TrainStream | EpochStream:
    """Targets of two lengths, so that some examples are longer than others."""
    return training_examples([Task("toy_add", {"max_value": 60})], Reserve([], 0), 0, train_n)


def contents(batch: Batch) -> tuple[list[str], list[list[int]]]:
    return [example.question for example in batch.examples], batch.input_ids.tolist()


@SHARED
@given(st.integers(1, 4), st.integers(0, 10), st.integers(1, 6), st.sampled_from([0, 7]), st.booleans())
def test_training_batches_resume_exactly_at_any_point(formats, window, split, after, train_n, drop):
    prompt_format = PromptFormat(formats["chat"].tokenizer, PromptConfig(max_seq_len=16 if drop else 512))

    def batches() -> TrainBatches:
        stream = stream_of(prompt_format, train_n)
        return TrainBatches(stream, prompt_format, 3, window, seed=5, overlong="drop" if drop else "error")

    first, resumed = batches(), batches()
    for _ in range(split):
        next(first)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(after):
        assert contents(next(resumed)) == contents(next(first))
        assert resumed.state_dict() == first.state_dict()


@pytest.mark.parametrize("window", [1, 4])
def test_training_batches_hold_the_stream_s_items_each_once(formats, window):
    prompt_format = formats["chat"]
    batches = TrainBatches(stream_of(prompt_format, 0), prompt_format, 6, window, seed=1)
    drawn = [next(batches).examples for _ in range(8)]
    expected = [next(items) for items in [stream_of(prompt_format, 0)] for _ in range(48)]
    for start in range(0, 8, window):
        of_window = [example.question for batch in drawn[start : start + window] for example in batch]
        assert sorted(of_window) == sorted(e.question for e in expected[start * 6 : (start + window) * 6])
    if window == 1:
        assert [example.question for batch in drawn for example in batch] == [e.question for e in expected]
        return
    # Within a window the lengths of different batches do not interleave, and the batches come in no order of length.
    spans = []
    for batch in drawn[:window]:
        lengths = [len(ids) for ids in prompt_format.prompts([example.question for example in batch])]
        spans.append((min(lengths), max(lengths)))
    ordered = sorted(spans)
    assert all(shorter[1] <= longer[0] for shorter, longer in pairwise(ordered))
    orders = set()
    for seed in range(6):
        fresh = TrainBatches(stream_of(prompt_format, 0), prompt_format, 6, window, seed=seed)
        orders.add(tuple(tuple(e.question for e in next(fresh).examples) for _ in range(window)))
    assert len(orders) > 1


def test_ranks_share_each_training_batch(formats):
    def drawn(size: int, rank: int, world: int) -> list[list[str]]:
        batches = TrainBatches(stream_of(formats["chat"], 0), formats["chat"], size, 2, 3, rank=rank, world=world)
        return [[example.question for example in next(batches).examples] for _ in range(5)]

    for whole, first, second in zip(drawn(8, 0, 1), drawn(4, 0, 2), drawn(4, 1, 2), strict=True):
        assert first == whole[::2] and second == whole[1::2]


def test_overlong_training_items_stop_the_run_or_are_left_out(formats):
    prompt_format = formats["chat"]
    lengths = prompt_format.lengths([next(items) for items in [stream_of(prompt_format, 0)] for _ in range(60)])
    limit = sorted(lengths)[len(lengths) // 4]
    assert limit < max(lengths)
    short = PromptFormat(prompt_format.tokenizer, PromptConfig(max_seq_len=limit))
    batches = TrainBatches(stream_of(short, 0), short, 4, 2, overlong="drop")
    for _ in range(6):
        batch = next(batches)
        assert len(batch.examples) == 4 and max(short.lengths(batch.examples)) <= limit
    with pytest.raises(ValueError, match=rf"longer than --max_seq_len {limit}: raise it, or leave .* --overlong drop"):
        next(TrainBatches(stream_of(short, 0), short, 20, 2, overlong="error"))


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_overlong_examples_stop_the_run_or_are_left_out(tokenizer):
    short, long = [example(f"{i} + 1?") for i in range(3)], [example("1 + " * 40 + "1?"), example("2 + " * 50 + "2?")]
    mixed = [short[0], long[0], short[1], long[1], short[2]]
    fits = max(PromptFormat(tokenizer).lengths(short))
    prompt_format = PromptFormat(tokenizer, PromptConfig(max_seq_len=fits))
    assert prompt_format.fitting(short, "error", "training") == short
    assert prompt_format.fitting(short, "drop", "training") == prompt_format.fitting(mixed, "drop", "training") == short
    longest = max(prompt_format.lengths(mixed))
    with pytest.raises(ValueError) as caught:
        prompt_format.fitting(mixed, "error", "evaluation")
    assert str(caught.value).startswith(f"2 of 5 evaluation examples are longer than --max_seq_len {fits} tokens")
    assert f"the longest has {longest}" in str(caught.value) and "--overlong drop" in str(caught.value)
    with pytest.raises(ValueError, match="2 of 2 training examples are longer"):  # nothing would be left
        prompt_format.fitting(long, "drop", "training")


def test_a_length_counts_prompt_and_target_with_their_frame(formats):
    for prompt_format in formats.values():
        batch = prompt_format.batch([example("1 + 1?", "2")])
        assert prompt_format.lengths([example("1 + 1?", "2")]) == [batch.input_ids.shape[1]]
        assert prompt_format.lengths([example("1 + 1?", None)]) == [batch.input_ids.shape[1] - 1]


def test_an_example_is_shown_as_the_llm_reads_it(tokenizer):
    prompt_format = PromptFormat(tokenizer)
    (example,) = Reserve([Task("chain_sum")], 1).examples
    heading, prompt, target, *masks = prompt_format.shown(example, "HRM")
    ids = prompt_format.prompts([example.question])[0]
    assert heading.endswith("the loss is on the target's tokens alone:")
    assert prompt == f"  prompt, {len(ids)} tokens: {tokenizer.decode(ids)!r} = {ids}" and example.question in prompt
    gold = prompt_format.targets([example.target])[0]
    assert target.startswith("  target, ") and target.endswith(f"{gold}")
    read, answered = len(ids), len(gold)
    assert masks == [
        f"  mask, the LLM reads: 1 x {read + answered}",
        f"  mask, HRM reads: 1 x {read}, 0 x {answered}",
        f"  mask, the loss is on: 0 x {read}, 1 x {answered}",
    ]
    assert [line for line in prompt_format.shown(example) if "HRM" in line] == []
