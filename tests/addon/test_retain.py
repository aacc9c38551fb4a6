"""retain: what moves on other text is KL to the bare LLM, and training lowers it; runs keep it and resume."""

from __future__ import annotations

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch

import options
from addon.retain import RetainConfig, Retained, bare_log_probs, divergence
from batching import PromptConfig, PromptFormat
from engine.batches import IGNORE
from reasoning_gym_wrapper import Reserve, make_tasks
from tiny_runs import TINY, controller_of, newest, tensors, tiny_model, tiny_trainer

pytestmark = pytest.mark.usefixtures("no_curve")
NO_HRM = ("--d_h", "128", "--n_heads", "4", "--segments", "1", "--inner_T", "2")
PAIRS = [{"prompt": f"What is the capital of land {index}?", "answer": f"city {index}"} for index in range(6)]
TEXTS = [{"text": f"The sea was calm on day {index}, and the boats stayed out until evening."} for index in range(6)]


@pytest.fixture
def other(tmp_path):
    """A file of questions with answers and of plain texts."""
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS + TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def retained(other, tokenizer) -> Retained:
    return Retained(RetainConfig(str(other), 5, max_seq_len=64), PromptFormat(tokenizer))


def test_a_batch_shows_questions_in_the_frame_and_cuts_other_text_anywhere(retained, tokenizer):
    seen = [retained.batch(step) for step in range(12)]
    texts = []
    for batch in seen:
        assert batch.prompt_ids.shape[0] == 5 and batch.input_ids.shape[1] <= 128
        for read, mask, labels in zip(batch.prompt_ids, batch.prompt_mask, batch.labels, strict=True):
            assert mask.sum() >= 1 and (labels != IGNORE).sum() >= 1
            texts.append((tokenizer.decode(read[mask.bool()]), tokenizer.decode(labels[labels != IGNORE])))
    framed = [pair for pair in texts if "capital" in pair[0]]
    assert framed and all(read.endswith("<|assistant|>") and follows.startswith("city ") for read, follows in framed)
    plain = [read + follows for read, follows in texts if "capital" not in read + follows]
    assert {text.removeprefix("<|bos|>") for text in plain} <= {row["text"] for row in TEXTS}
    assert len({read for read, _ in texts if "sea" in read}) > 6, "cut at many places"


def test_the_draw_depends_on_seed_step_and_process_alone(retained, other, tokenizer):
    again = Retained(RetainConfig(str(other), 5, max_seq_len=64), PromptFormat(tokenizer))
    assert torch.equal(retained.batch(7).input_ids, again.batch(7).input_ids)
    assert not torch.equal(retained.batch(7, 1).prompt_ids, retained.batch(7, 0).prompt_ids)


@pytest.mark.parametrize("adapter", ["hrm", "lora", "prompt"])
def test_the_loss_is_the_divergence_of_whole_distributions_and_0_for_the_bare_llm(adapter, retained, tiny_host):
    """Against the sum over the vocabulary, one token at a time, of the model's plain forward pass."""
    fresh = tiny_model(tiny_host)
    if adapter != "hrm":
        more = ("--virtual_tokens", "2") if adapter == "prompt" else ()
        opts = options.parse([*TINY, "--adapter", adapter, *NO_HRM, *more])
        fresh = controller_of(options.replace(opts, model_name=str(tiny_host))).eval()
        with torch.no_grad():
            for parameter in fresh.addon_parameters().values():
                parameter.normal_(std=0.3)
    batch = retained.batch(0)
    states = fresh.encode(batch)
    out = fresh.segment(states, batch.labels, None, 1.0, 1 if adapter == "hrm" else 0)
    moved = divergence(out.logits, bare_log_probs(fresh, batch))
    assert moved > 0.01

    expected = 0.0
    prompt_mask = torch.cat([batch.prompt_mask, torch.zeros_like(batch.target_ids)], dim=1)
    with torch.no_grad():
        ours = fresh(input_ids=batch.input_ids, attention_mask=batch.attention_mask, prompt_mask=prompt_mask).logits
        with fresh.bare() as host:
            positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
            bare = host(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
    width = batch.labels.shape[1]
    for row, column in (batch.labels != IGNORE).nonzero().tolist():
        place = -width - 1 + column
        p, q = bare[row, place].softmax(-1), ours[row, place].softmax(-1)
        expected += float((p * (p.log() - q.log())).sum())
    assert float(moved.detach()) == pytest.approx(expected, rel=1e-3)
    with fresh.bare() as host:
        plain = host(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
    own = plain[:, -width - 1 : -1][batch.labels != IGNORE]
    assert float(divergence(own, bare_log_probs(fresh, batch))) == pytest.approx(0, abs=1e-4)


def test_training_lowers_the_divergence(retained, tiny_host, tokenizer):
    """An add-on that has gone far comes back while the tasks' loss weighs little."""
    flags = [*TINY, "--retain_weight", "100", "--retain", "x", "--optimizer", "adamw", "--ema", "0", "--use_act"]
    opts = options.parse(flags)
    trainer = tiny_trainer(opts, tiny_model(tiny_host, use_act=True, segments=2))
    trainer.retained = retained
    shown = PromptFormat(tokenizer)
    batch = shown.batch(Reserve(make_tasks(["toy_add"], "default"), 4).examples)
    lost = [trainer.step([batch], step, lr=3e-3)["retain_loss"] for step in range(25)]
    assert sum(lost[-5:]) < 0.5 * sum(lost[:5]), lost


def test_a_run_retains_logs_it_and_resumes_bit_for_bit(call, other, tmp_path):
    flags = ("--retain", str(other), "--retain_batch_size", "3", "--save_every", "2", "--max_steps", "4")
    assert call("--run_name", "whole", *flags)[0] == 0
    whole = tmp_path / "runs" / "whole"
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lost = [line["retain_loss"] for line in lines]
    assert 0 < lost[0] < 1e-3 < lost[3], "it begins as the bare LLM, but for the first segment's step"
    name = "step-00000002"
    shutil.copytree(whole / "checkpoints" / name, tmp_path / "runs" / "part" / "checkpoints" / name)
    assert call("--run_name", "part", *flags)[0] == 0
    ours, theirs = (tensors(newest(tmp_path / "runs" / name)) for name in ("whole", "part"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("raw/"))
    assert call("--run_name", "without", "--max_steps", "4")[0] == 0
    without = tensors(newest(tmp_path / "runs" / "without"))
    assert any(not torch.equal(ours[name], without[name]) for name in without if name.startswith("raw/"))


def test_chats_and_questions_with_answers_are_put_as_a_task_s_question_is(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho"}]},
            {"question": "Hi?", "answer": "Ho"}, {"prompt": "Hi?", "answer": "Ho"}]
    for suffix in (".jsonl", ".parquet"):
        for row in rows:
            path = tmp_path / f"one{suffix}"
            path.write_text(json.dumps(row) + "\n", encoding="utf-8")
            if suffix == ".parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
            retained = Retained(RetainConfig(retain=str(path)), PromptFormat(tokenizer, PromptConfig()))
            (pair,) = retained.pairs
            assert tokenizer.decode(pair[0]) == "<|bos|><|user|>Hi?<|assistant|>" and not retained.texts


@pytest.mark.parametrize("content,told", [
    (None, "there is no such file or folder: check the path"), ("", "holds no text"), 
    ('{"question": "a"}\n', "line 1: expected prompt and answer, or text; found question (question and answer, or a"),
    ('{"messages": "a"}\n', "line 1: has no chat in its field messages"),
    ('{"text": "a"}\n', "holds no text of 4 to 512 tokens")])
def test_a_file_that_retains_nothing_is_one_line(call, tmp_path, content, told):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    status, out, err = call("--retain", str(path))
    (line,) = err.splitlines()[-1:]
    assert status == 2 and out == "" and f"--retain {path}" in line and told in line
    assert not (tmp_path / "runs").exists()
