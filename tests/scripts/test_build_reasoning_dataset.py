"""scripts/build_reasoning_dataset.py: each upstream's raw format, what is left out and told, generated tasks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reasoning_gym_wrapper as rg
from engine.records import normalise
from patience import HANG_S
from suite.questions import SuiteItem, read_questions
from text_data.answers import CALCULATOR
from upstream_rows import gsm8k_row

ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("build", ROOT / "scripts" / "build_reasoning_dataset.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

GSM8K = [
    {"question": "How many clips?",
     "answer": "She sold 48/2 = <<48/2=24>>24 clips, 5 < 6.\nIn all <<1+1=2>>2.\n#### 1,072"},
    {"question": "How cold?", "answer": "It fell.\n#### -3"},
]
MBPP = [
    {"text": "Add two.", "code": "def add(a, b):\r\n\treturn a + b\r\n", "task_id": 11, "test_setup_code": "",
     "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "challenge_test_list": []},
    {"text": "Find the root.", "code": "def root(n): return n", "task_id": 700, "test_setup_code": "n = 1 \r\nm = 2",
     "test_list": ["assert root(n) == 1"], "challenge_test_list": []},
]
SCIENCE = {
    "1": {"question": "Which is north?", "choices": ["Ohio", "Utah"], "answer": 0, "hint": "", "image": "image.png",
          "lecture": "Maps have a rose.", "solution": "Look up.", "split": "train"},
    "7": {"question": "Which melts?", "choices": ["ice", "stone", "iron"], "answer": 1, "hint": "It is hot.",
          "image": None, "lecture": "Heat melts.", "solution": "So it does.", "split": "train"},
    "8": {"question": "Which floats?", "choices": ["wood", "lead"], "answer": 0, "hint": "", "image": None,
          "lecture": "", "solution": "", "split": "test"},
}


def call(*words) -> int:
    return build.main([str(word) for word in words])


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out" / "rows.jsonl"


@pytest.fixture
def science(tmp_path) -> Path:
    (tmp_path / "problems.json").write_text(json.dumps(SCIENCE), encoding="utf-8")
    return tmp_path / "problems.json"


def test_gsm8k_keeps_steps_and_final_answer_apart_without_calculator_marks(tmp_path, output):
    call("--dataset", "gsm8k", "--source", lines(tmp_path / "raw.jsonl", GSM8K), "--output", output)
    first, second = rows(output)
    assert first == {
        "prompt": "How many clips?", "source": "gsm8k", "final_answer": "1072",
        "steps": "She sold 48/2 = 24 clips, 5 < 6.\nIn all 2.",
        "answer": "She sold 48/2 = 24 clips, 5 < 6.\nIn all 2.\n#### 1072",
    }
    assert second["final_answer"] == "-3"


@given(parts=st.lists(st.sampled_from(["<<1+1=2>>", "<", ">", "a < b", "24", "\n", " "])), final=st.integers())
def test_gsm8k_steps_hold_no_whole_mark_and_lose_nothing_else(parts, final):
    row = gsm8k_row({"question": "q", "answer": "".join(parts) + f"\n#### {final:,}"})
    assert row["final_answer"] == str(final) and row["answer"].splitlines()[-1] == f"#### {final}"
    assert row["steps"] == CALCULATOR.sub("", "".join(parts)).strip()


def test_mbpp_keeps_its_tests_and_set_up_and_shows_the_first_test(tmp_path, output):
    call("--dataset", "mbpp", "--source", lines(tmp_path / "raw.jsonl", MBPP), "--output", output)
    first, second = rows(output)
    assert first["code"] == first["answer"] == "def add(a, b):\n\treturn a + b"
    assert first["tests"] == ["assert add(1, 2) == 3", "assert add(0, 0) == 0"] and first["setup"] == ""
    assert first["prompt"].startswith("Add two.") and first["tests"][0] in first["prompt"]
    assert first["tests"][1] not in first["prompt"]
    assert second["setup"] == "n = 1 \nm = 2" and second["setup"] in second["prompt"]
    scope: dict = {}
    exec("\n".join([first["setup"], first["answer"], *first["tests"]]), scope)  # what evaluation will do


def test_sanitized_mbpp_is_read_as_the_suite_reads_it(tmp_path, output):
    item = {"prompt": "Write root.", "task_id": 2, "code": "import math\ndef root(x):\n    return math.sqrt(x)",
            "test_imports": ["import math"], "test_list": ["assert math.isclose(root(4), 2)", "assert root(9) == 3"]}
    call("--dataset", "mbpp", "--source", lines(tmp_path / "raw.jsonl", [item]), "--output", output)
    (row,) = rows(output)
    (question,) = read_questions(SuiteItem("mbpp", tmp_path / "raw.jsonl"))
    (built,) = read_questions(SuiteItem("mbpp", output))
    assert (row["setup"], row["tests"], row["code"]) == ("import math", item["test_list"], item["code"])
    assert (question.prompt, question.tests, question.setup) == (built.prompt, built.tests, built.setup)
    assert question.prompt == row["prompt"]


def test_indented_problems_with_a_mark_are_read_as_the_suite_reads_them(tmp_path, output):
    path = tmp_path / "problems.json"
    path.write_text("\ufeff" + json.dumps(SCIENCE, indent=2), encoding="utf-8")
    call("--dataset", "science_qa", "--split", "test", "--source", path, "--output", output)
    questions = read_questions(SuiteItem("science_qa", path, split="test"))
    assert [question.prompt for question in questions] == [row["prompt"] for row in rows(output)] != []


@pytest.mark.parametrize(("split", "ids"), [("test", [11]), ("train", [700])])
def test_mbpp_splits_are_its_authors_ranges(tmp_path, output, capsys, split, ids):
    source = lines(tmp_path / "raw.jsonl", MBPP)
    call("--dataset", "mbpp", "--source", source, "--output", output, "--split", split)
    assert [row["task_id"] for row in rows(output)] == ids
    assert "left out: 1 of other splits" in capsys.readouterr().out


def test_science_qa_shows_hint_and_choices_and_answers_with_lecture_and_solution(science, output, capsys):
    call("--dataset", "science_qa", "--source", science, "--output", output, "--split", "all")
    first, second = rows(output)
    assert first["prompt"] == "It is hot.\nWhich melts?\n(A) ice\n(B) stone\n(C) iron"
    assert first["answer"] == "Heat melts.\nSo it does.\nThe answer is (B)."
    assert first["rationale"] == "Heat melts.\nSo it does."
    assert first["choices"] == ["ice", "stone", "iron"] and first["answer_index"] == 1
    assert second["answer"] == "The answer is (A)." and second["rationale"] == ""
    told = capsys.readouterr().out
    assert "left out: 1 with images" in told and "mixed: items of the splits test (1), train (2)" in told


def test_a_file_of_several_splits_is_not_mixed_unasked(tmp_path, science, output, capsys):
    with pytest.raises(ValueError, match=r"splits test \(1\), train \(2\) are mixed: name one with --split"):
        call("--dataset", "science_qa", "--source", science, "--output", output)
    with pytest.raises(ValueError, match=r"no row is of --split dev, there are test \(1\), train \(2\)"):
        call("--dataset", "science_qa", "--source", science, "--output", output, "--split", "dev")
    assert not output.exists()
    call("--dataset", "science_qa", "--source", science, "--output", output, "--split", "train")
    assert [row["split"] for row in rows(output)] == ["train"]
    assert "the source has items of: test (1), train (2)" in capsys.readouterr().out
    # One split alone needs no choice.
    (tmp_path / "problems.json").write_text(json.dumps({"8": SCIENCE["8"]}), encoding="utf-8")
    call("--dataset", "science_qa", "--source", science, "--output", output)
    assert [row["split"] for row in rows(output)] == ["test"]


def test_a_mixed_mbpp_file_says_what_was_mixed(tmp_path, output, capsys):
    call("--dataset", "mbpp", "--source", lines(tmp_path / "raw.jsonl", MBPP), "--output", output)
    assert "mixed: items of the splits test (1), train (1); --split takes one" in capsys.readouterr().out


def test_science_qa_chooses_by_split(science, output):
    call("--dataset", "science_qa", "--source", science, "--output", output, "--split", "test")
    assert [row["prompt"].splitlines()[0] for row in rows(output)] == ["Which floats?"]


@pytest.mark.parametrize("unpacked", [False, True])
def test_kept_image_questions_name_their_picture(tmp_path, science, output, unpacked):
    if unpacked:
        from PIL import Image

        place = tmp_path / "images" / "train" / "1"
        place.mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(place / "image.png")
    call("--dataset", "science_qa", "--source", science, "--output", output, "--image-questions", "keep",
         "--split", "all")
    first = rows(output)[0]
    shown = "[picture, 40 x 30 pixels]" if unpacked else "[picture]"
    assert first["prompt"].splitlines() == [shown, "Which is north?", "(A) Ohio", "(B) Utah"]
    assert first["image"] == {"name": "image.png"} | ({"width": 40, "height": 30} if unpacked else {})
    assert "image" not in rows(output)[1]


def test_pillow_is_imported_for_pictures_alone(tmp_path, science, output):
    raw = lines(tmp_path / "raw.jsonl", GSM8K)
    for arguments in (["gsm8k", "--source", str(raw)], ["science_qa", "--source", str(science), "--split", "all"]):
        code = ("import sys; sys.path.insert(0, 'scripts'); import build_reasoning_dataset as b\n"
                f"b.main(['--dataset', *{arguments}, '--output', {str(output)!r}])\nassert 'PIL' not in sys.modules")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
        assert done.returncode == 0, done.stderr


def test_limit_takes_the_first_rows(tmp_path, output):
    call("--dataset", "gsm8k", "--source", lines(tmp_path / "raw.jsonl", GSM8K), "--output", output, "--limit", 1)
    assert len(rows(output)) == 1


@pytest.mark.parametrize(("dataset", "raw", "told"), [
    ("gsm8k", [{"question": "q", "answer": "no mark"}], ["line 1: answer has no final line"]),
    ("gsm8k", [GSM8K[0], {"question": "q"}, {"question": 5, "answer": "#### 1"}],
     ["line 2: answer must be text", "line 3: question must be text"]),
    ("gsm8k", [[]], ["line 1: expected an object, got list"]),
    ("mbpp", [MBPP[0] | {"test_list": []}], ["line 1: test_list must be"]),
    ("mbpp", [MBPP[0] | {"code": " "}], ["line 1: code is empty"]),
    ("science_qa", {"3": SCIENCE["7"] | {"answer": 3}}, ["item 3: answer is 3, expected an index from 0 to 2"]),
    ("science_qa", {"3": SCIENCE["7"] | {"choices": ["one"]}}, ["item 3: choices must be"]),
    ("science_qa", [1], ["holds a list"]),
])
def test_broken_items_are_named_and_nothing_is_written(tmp_path, output, dataset, raw, told):
    source = tmp_path / "raw"
    if isinstance(raw, dict) or raw == [1]:
        source.write_text(json.dumps(raw), encoding="utf-8")
    else:
        lines(source, raw)
    with pytest.raises(ValueError) as error:
        call("--dataset", dataset, "--source", source, "--output", output, "--limit", 2)
    found = str(error.value).splitlines()
    assert all(text in line for text, line in zip(told, found, strict=False)) and len(found) >= len(told)
    assert not list(output.parent.glob("*"))


def test_a_source_without_a_fitting_row_is_told(tmp_path, output):
    source = lines(tmp_path / "raw.jsonl", MBPP)
    with pytest.raises(ValueError, match="2 of other splits"):
        call("--dataset", "mbpp", "--source", source, "--output", output, "--split", "validation")


def test_every_wrong_option_is_told_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        call("--dataset", "gsm9k", "--limit", -1, "--seed", -1, "--source", tmp_path, "--output", tmp_path)
    assert len(str(error.value).splitlines()) == 5


def test_the_hub_out_of_reach_is_one_line_and_exit_status_2(output):
    command = [sys.executable, "scripts/build_reasoning_dataset.py", "--dataset", "gsm8k", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--source" in done.stderr and not list(output.parent.glob("*"))


# --- generated tasks --------------------------------------------------------------------------------------------------


def test_generated_rows_are_balanced_distinct_right_and_no_evaluation_question(output):
    call("--dataset", "reasoning_gym:chain_sum,lcm", "--task_config", "small", "--limit", 60, "--output", output)
    found = rows(output)
    tasks = rg.make_tasks(["chain_sum", "lcm"], "small")
    reserve = rg.Reserve(tasks, build.RESERVED, must_fill=False)
    assert len({normalise(row["prompt"]) for row in found}) == 60
    assert abs(sum(row["task"] == "lcm" for row in found) - 30) <= 10
    assert not any(row["prompt"] in reserve for row in found)
    for row in found:
        if row["task"] == "chain_sum":
            assert eval(row["prompt"].split(":")[1].strip(" =")) == int(row["answer"])


def test_the_seed_and_the_split_choose_the_items(tmp_path):
    drawn = {}
    for seed, split in ((0, "train"), (0, "again"), (1, "train"), (0, "test")):
        path = tmp_path / f"{seed}{split}.jsonl"
        call("--dataset", "reasoning_gym:chain_sum", "--limit", 20, "--output", path, "--seed", seed,
             "--split", split.replace("again", "train"))
        drawn[seed, split] = [row["prompt"] for row in rows(path)]
    assert drawn[0, "train"] == drawn[0, "again"] != drawn[1, "train"]
    reserve = rg.Reserve(rg.make_tasks(["chain_sum"], "default"), 20)
    assert drawn[0, "test"] == [example.question for example in reserve.examples]


@pytest.mark.parametrize(("arguments", "told"), [
    (["reasoning_gym:chain_sun"], "unknown task 'chain_sun'"),
    (["reasoning_gym:countdown"], "executes code"),
    (["reasoning_gym:graph_color"], "no gold answers"),
    (["reasoning_gym"], "needs tasks"),
    (["reasoning_gym:chain_sum", "--split", "dev"], "expected train or test"),
    (["reasoning_gym:chain_sum", "--task_config", "{min_terms: 9, max_terms: 2}"], "refuses the config"),
])
def test_tasks_that_cannot_be_used_are_told(output, arguments, told):
    with pytest.raises(ValueError, match=told):
        call("--output", output, "--dataset", *arguments)
    assert not list(output.parent.glob("*"))


@pytest.mark.parametrize(("content", "reason"), [
    (b"[" * 100_000, "problems.json is not JSON (it is nested too deeply)"),
    (b'{"1": {"question":\n "\\ud83d"}}', "problems.json line 2 is no text: it holds \\ud83d"),
    (b'{"1":\n "\xff"}', "problems.json is not UTF-8 text (line 2"), (b"", "problems.json is not JSON")])
def test_a_problems_file_that_nobody_can_read_is_told_in_one_line(tmp_path, output, content, reason):
    (tmp_path / "problems.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        call("--dataset", "science_qa", "--source", tmp_path / "problems.json", "--output", output)
    assert reason in str(error.value) and "\n" not in str(error.value) and not output.exists()
