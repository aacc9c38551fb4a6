"""bare: what the bare LLM is given beside the add-on: room for its answer, and solved examples of the same task."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import train
from addon.adapters import read_adapter
from addon.bare import format_with_examples, solved_examples
from batching import PLAIN_CUE, PromptConfig, PromptFormat
from conftest import SPECIAL
from engine.records import normalise
from reasoning_gym_wrapper import NO_GOLD, Reserve, Task, train_seed
from text_data.frames import frame_with_examples
from tiny_runs import arguments, error_lines, newest, only_run, records

pytestmark = pytest.mark.usefixtures("no_curve")

SOLVED = [("1 + 1?", "2"), ("2 + 2?", "4")]
ROUGH = "--lr 0.05 --warmup_steps 0 --ema 0 --max_steps 2".split()


def shown(prompt_format: PromptFormat, question: str = "3 + 3?") -> str:
    return prompt_format.tokenizer.decode(prompt_format.prompts([question])[0], skip_special_tokens=False)


# --- the prompt -------------------------------------------------------------------------------------------------------


def test_examples_are_turns_of_a_chat(tokenizer):
    prompt_format = PromptFormat(tokenizer, PromptConfig(system_header="Be brief."))
    end = tokenizer.eos_token
    few = format_with_examples(prompt_format, SOLVED)
    assert shown(few) == (f"<|bos|><|system|>Be brief.<|user|>1 + 1?<|assistant|>2{end}<|user|>2 + 2?"
                          f"<|assistant|>4{end}<|user|>3 + 3?<|assistant|>")
    assert shown(prompt_format) == "<|bos|><|system|>Be brief.<|user|>3 + 3?<|assistant|>", "the add-on's prompt stays"


def test_examples_stand_above_a_plain_question_and_an_answer_ends_where_they_do(plain_tokenizer):
    prompt_format = PromptFormat(plain_tokenizer, PromptConfig(system_header="Be brief."))
    few = format_with_examples(prompt_format, SOLVED)
    assert shown(few).removeprefix(SPECIAL[1]) == (
        f"Be brief.\n1 + 1?{PLAIN_CUE} 2\n\n2 + 2?{PLAIN_CUE} 4\n\n3 + 3?{PLAIN_CUE}")
    ids = plain_tokenizer(" 6\n\n4 + 4?\nAnswer: 8", return_tensors="pt")["input_ids"][0]
    assert few.answer_text(ids) == ("6", True)
    assert prompt_format.sentinel is None
    assert format_with_examples(prompt_format, [("a", "1\n\n2")]).sentinel is None, "answers may hold blank lines"


def test_examples_are_written_as_answers_are_read(tokenizer):
    config = PromptConfig(answer_from="tags", sentinel="##")
    few = format_with_examples(PromptFormat(tokenizer, config), SOLVED)
    assert "<|assistant|><answer>2</answer>##" in shown(few)
    boxed = format_with_examples(PromptFormat(tokenizer, PromptConfig("plain", answer_from="boxed")), SOLVED)
    assert "Answer: \\boxed{4}" in shown(boxed)


def test_the_kept_beginning_of_a_prompt_stays_before_examples(tokenizer):
    frame = PromptFormat(tokenizer).frame
    kept = frame.__class__("<|bos|>Monday <|user|>", frame.suffix, True, frame.end)
    few = frame_with_examples(kept, tokenizer, None, SOLVED)
    assert few.prefix.startswith("<|bos|>Monday <|user|>1 + 1?<|assistant|>2") and few.suffix == frame.suffix


def test_a_template_of_one_turn_shows_examples_inside_it(tiny_host):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_host)
    tokenizer.chat_template = "{{ bos_token }}<|user|>{{ messages[-1]['content'] }}<|assistant|>"
    few = format_with_examples(PromptFormat(tokenizer), SOLVED)
    assert shown(few) == f"<|bos|><|user|>1 + 1?{PLAIN_CUE} 2\n\n2 + 2?{PLAIN_CUE} 4\n\n3 + 3?<|assistant|>"


# --- the examples -----------------------------------------------------------------------------------------------------


class Data:
    """What solved examples are drawn with: a reserve of nearly all the sums of numbers up to 3."""

    def __init__(self, prompt_format: PromptFormat, held_out: int = 8):
        self.task = Task("toy_add", {"max_value": 3})
        self.reserve = Reserve([self.task], held_out)
        self.format = prompt_format
        self.config = type("Config", (), {"seed": 7})


def test_examples_are_training_items_and_never_evaluated(tokenizer):
    data = Data(PromptFormat(tokenizer))
    solved = solved_examples(data.task, data, 4)
    questions = {normalise(question) for question, _ in solved}
    assert len(questions) == 4 and not questions & data.reserve.questions
    drawn = {example.question for _, example in itertools.islice(data.task.items(train_seed(7)), 200)}
    assert {question for question, _ in solved} <= drawn
    assert solved == solved_examples(data.task, Data(data.format), 4), "the same each time"


def test_too_few_examples_are_told(tokenizer):
    data = Data(PromptFormat(tokenizer), held_out=14)
    with pytest.raises(ValueError, match=r"--few_shot 9: task toy_add has only \d examples to show among 200 training"):
        solved_examples(data.task, data, 9)


def test_a_text_that_names_a_special_token_is_no_example(tokenizer):
    data = Data(PromptFormat(tokenizer))
    data.format.names_special = lambda text: "0" in text.split("\n")[0]
    assert all("0" not in question for question, _ in solved_examples(data.task, data, 3))
    assert PromptFormat(tokenizer).names_special("a <|eos|>") and not PromptFormat(tokenizer).names_special("a eos")


# --- a run ------------------------------------------------------------------------------------------------------------


def test_the_bare_llm_gets_its_own_room_and_prompt_and_the_add_on_stays_as_it_was(call, tmp_path, tiny_host):
    status, out, err = call("--run_name", "plain", *ROUGH)
    assert status == 0, err
    status, out, err = call("--run_name", "fair", "--bare_max_new_tokens", "9", "--few_shot", "2", *ROUGH)
    assert status == 0, err
    assert out.splitlines()[2].split()[:2] == ["bare,", "2-shot"]
    plain, fair = (records(tmp_path / "runs" / name) for name in ("plain", "fair"))
    texts = [[line["prediction"] for line in run["predictions"]] for run in (plain, fair)]
    assert texts[0] == texts[1] and any(texts[0])
    assert "few_shot_score" in fair["predictions"][0] and "few_shot_score" not in plain["predictions"][0]
    metrics = {row["metric"] for row in fair["eval"]}
    assert {"solved_strict", "solved_extracted", "bare_few_shot_strict", "bare_few_shot_extracted", "gain"} <= metrics
    assert "cut at 4 tokens (bare LLM: 9)" in out


def test_the_bare_llm_is_asked_once(call, monkeypatch):
    from addon.bare import BareLLM

    asked = []
    whole = BareLLM.answers
    monkeypatch.setattr(BareLLM, "answers", lambda *args: asked.append(1) or whole(*args))
    assert call("--eval_every", "1", "--max_steps", "3", "--few_shot", "1")[0] == 0
    assert len(asked) == 1


def test_a_bare_llm_that_is_cut_amid_its_answers_is_told_of(call):
    status, out, _ = call("--max_new_tokens", "1", "--max_steps", "1")
    assert status == 0 and "bare answers were cut: --bare_max_new_tokens N gives it more room" in out
    _, out, _ = call("--max_new_tokens", "1", "--bare_max_new_tokens", "2", "--max_steps", "1")
    assert "gives it more room" not in out


def test_a_task_without_gold_answers_has_no_examples(tiny_host, tmp_path, capsys):
    name = sorted(NO_GOLD)[0]
    assert train.main(arguments(tiny_host, tmp_path / "runs", "--task", name, "--few_shot", "2")) == 2
    told = f"--few_shot 2: task {name} has no gold answers to show: choose another task, or 0"
    assert any(line.endswith(told) for line in error_lines(capsys.readouterr().err))


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_remembers_how_answers_are_read(call, tmp_path):
    assert call("--run_name", "r", "--answer_from", "boxed", "--system_header", "rg:simple", *ROUGH)[0] == 0
    document, _ = read_adapter(newest(tmp_path / "runs" / "r"))
    assert document["prompt"]["answer_from"] == "boxed" and document["prompt"]["system_header"] == "rg:simple"
    assert "between <answer> and </answer> tags" in document["frame"]["prefix"]
    status, out, err = call("--run_name", "r", "--eval_only")
    assert status == 0 and r"extracted = what its last \boxed{} holds did" in out, err
    status, out, err = call("--run_name", "r", "--eval_only", "--answer_from", "tags")
    assert status == 0 and "extracted = what its last <answer> tag holds did" in out, err


def test_an_old_checkpoint_is_read_as_whole_texts():
    folder = Path(__file__).parent.parent / "fixtures" / "old_checkpoints" / "addon"
    document, _ = read_adapter(newest(folder))
    assert PromptConfig(**document["prompt"]).answer_from == "text"


def test_generate_says_what_it_reads(call, tmp_path, capsys, monkeypatch):
    import addon.answering
    import generate

    assert call("--run_name", "r", "--answer_from", "tags", "--max_steps", "1")[0] == 0
    monkeypatch.setattr(addon.answering, "generate_texts", lambda *args: ["It is <answer>7</answer>."])
    assert generate.main(["--checkpoint", str(only_run(tmp_path / "runs")), "--prompt", "3 + 4?", "--compare"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "bare LLM   It is <answer>7</answer>.", "read as    7", "LLM + HRM  It is <answer>7</answer>.", "read as    7"]


def test_an_unknown_prompt_of_reasoning_gym_is_one_line(call, tmp_path):
    status, _, err = call("--system_header", "rg:plain")
    (line,) = error_lines(err)
    assert status == 2 and not (tmp_path / "runs").exists()
    assert line == ("--system_header rg:plain: Reasoning Gym has no prompt of that name; choose from rg:DeepSeekZero, "
                    "rg:default, rg:simple, rg:direct, rg:chain_of_draft")
