"""The suite: the spec, the files, and rows with n and intervals from a model that is really asked."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.files import json_lines
from engine.intervals import wilson
from engine.logs import RunLog
from engine.records import question_hash
from engine.report import stamped
from engine.tables import EVAL_HEADER
from host import load_host
from reasoning_gym_wrapper import Reserve, make_tasks, reserved_sums
from sandbox import runner as code_runner
from suite.language import WINDOW, cut_windows, read_documents, window_pairs
from suite.measure import run_suite
from suite.questions import SuiteError, SuiteItem, chosen, read_questions
from suite.spec import parse_suite, suite_problems, with_sums
from suite.text_model import Cuts
from text_model import CausalTextModel
from tiny_runs import tiny_model

GSM8K = [
    {"prompt": "Tom has 3 and gets 4. How many?", "answer": "3 + 4 = 7\n#### 7", "source": "gsm8k",
     "steps": "3 + 4 = 7", "final_answer": "7"},
    {"prompt": "How much is 1,000 + 200?", "answer": "#### 1200", "source": "gsm8k", "final_answer": "1200"},
    {"prompt": "How much is half of 5?", "answer": "#### 2.5", "source": "gsm8k", "final_answer": "2.5"},
]
MBPP = [
    {"prompt": "Write add.", "answer": "", "source": "mbpp", "code": "def add(a, b): return a + b",
     "setup": "import math", "tests": ["assert add(1, 2) == 3", "assert add(math.floor(2.5), 2) == 4"]},
    {"prompt": "Write neg.", "answer": "", "source": "mbpp", "code": "def neg(a): return -a", "setup": "",
     "tests": ["assert neg(1) == -1"]},
]
SCIENCE = [
    {"prompt": "What is water?\n(A) a solid\n(B) a liquid", "answer": "", "source": "science_qa", "answer_index": 1,
     "choices": ["a solid", "a liquid"], "rationale": "Water flows downhill and it fills every cup."},
    {"prompt": "What is ice?\n(A) a solid\n(B) a liquid", "answer": "", "source": "science_qa", "answer_index": 0,
     "choices": ["a solid", "a liquid"], "rationale": "Ice keeps the shape that it has."},
]
STORY = "Once there was a hen who counted eggs. " * 40


class Told:
    """A model of fixed answers and of `rate` nats for each character of a continuation, one token each."""

    def __init__(self, replies: dict[str, str] | None = None, rate: float = 2.0, segments: float | None = None):
        self.replies, self.rate, self.segments_used = replies or {}, rate, segments
        self.asked: list[tuple[list[str], int]] = []

    def generate(self, prompts, max_new_tokens, progress=lambda done: None):
        self.asked.append((list(prompts), max_new_tokens))
        progress(len(prompts))
        return [self.replies.get(prompt, "") for prompt in prompts]

    def log_likelihoods(self, pairs):
        return [(-self.rate * len(continuation), len(continuation)) for _, continuation in pairs]


@pytest.fixture
def write(tmp_path):
    def lines(name: str, rows: list[dict]):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return lines


def rows_of(result) -> dict[tuple[str, str], dict]:
    """(task, metric) -> its row as a run's loop writes it."""
    return {(row["task"], row["metric"]): row for row in stamped(result.rows(), 7, 1.5)}


def lines_of(result) -> list[dict]:
    """Predictions as a run's loop writes them."""
    return stamped(result.predictions(), 7)


def sums(n: int) -> SuiteItem:
    """The entry `synthetic` as a run hands it to the suite."""
    (item,) = with_sums([SuiteItem("synthetic")], reserved_sums, n)
    return item


# --- the spec


def test_a_spec_is_names_and_files(write):
    gsm8k, mbpp = write("g.jsonl", GSM8K), write("m.jsonl", MBPP)
    items = parse_suite(f"gsm8k={gsm8k}, mbpp={mbpp},synthetic")
    assert items == [SuiteItem("gsm8k", gsm8k), SuiteItem("mbpp", mbpp), SuiteItem("synthetic")]


def test_a_file_of_the_suite_may_have_a_comma_in_its_path(write, tmp_path):
    odd = tmp_path / "runs, of may" / "g,s.jsonl"
    odd.parent.mkdir()
    write("g.jsonl", GSM8K).rename(odd)
    mbpp = write("m.jsonl", MBPP)
    expected = [SuiteItem("gsm8k", odd), SuiteItem("mbpp", mbpp)]
    escaped = str(odd).replace(",", "\\,")
    assert parse_suite(f"gsm8k={odd},mbpp={mbpp}") == expected == parse_suite(f"gsm8k={escaped},mbpp={mbpp}")


def test_all_problems_of_a_spec_are_told_at_once(write, tmp_path):
    swapped = write("m.jsonl", MBPP)
    spec = f"gsm8=x,gsm8k,mbpp={tmp_path}/none,science_qa={swapped},perplexity={tmp_path},synthetic,synthetic,=y"
    with pytest.raises(SuiteError) as raised:
        parse_suite(spec)
    told = str(raised.value)
    assert "\n" not in told
    for part in ("unknown entry 'gsm8', the nearest is gsm8k", "gsm8k needs a file: write gsm8k=FILE",
                 "none is no file", "choices must be a list of at least 2 texts",
                 "expected the keys prompt, choices, answer_index", "is a folder", "synthetic is named twice",
                 "entry '=y' has no name"):
        assert part in told, part
    assert len(suite_problems(spec)) == 7


@pytest.mark.parametrize(("name", "content", "told"), [
    ("gsm8k", "", "holds no question"), ("gsm8k", "[1]\n", "expected a JSON object, got list"),
    ("gsm8k", "not json\n", "line 1: no JSON"), ("gsm8k", '{"prompt": "a"}\n', "question must be non-empty text"),
    ("gsm8k", '{"question": "a", "answer": "none"}\n', "holds no number"), ("gsm8k", "{}\n", "got none"),
    ("mbpp", '{"prompt": "a", "tests": []}\n', "tests must be a list of at least 1"),
    ("mbpp", '{"prompt": "a", "tests": [1]}\n', "tests must be a list of at least 1"),
    ("science_qa", '{"prompt": "a", "choices": ["b", "c"], "answer_index": 2}\n', "answer_index must be"),
    ("science_qa", '{"prompt": "a", "choices": ["b", "c"], "answer_index": "A"}\n', "answer_index must be"),
    ("synthetic", '{"prompt": "", "answer": "3"}\n', "prompt must be non-empty text"),
    ("perplexity", '{"prompt": "a"}\n', "expected the key text, got prompt"), ("perplexity", "", "holds no text"),
    ("gsm8k", '{"question": "\\ud83d", "answer": "3"}\n', "line 1: no JSON (it holds \\ud83d, half of a character"),
    ("gsm8k", "[" * 100_000, "line 1: no JSON (it is nested too deeply)"),
    ("gsm8k", "\udcff", "no UTF-8 text")])
def test_a_wrong_first_line_is_told(tmp_path, name, content, told):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    (problem,) = suite_problems(f"{name}={path}")
    assert told in problem and str(path) in problem


def test_a_wrong_later_line_is_named_before_anything_is_asked(write):
    path = write("g.jsonl", [*GSM8K, {"prompt": "x", "final_answer": "none"}])
    model = Told()
    with pytest.raises(SuiteError, match=r"g\.jsonl, line 4: the gold answer holds no number"):
        run_suite(model, [sums(4), *parse_suite(f"gsm8k={path}")], 4)
    assert model.asked == []


def test_sums_are_handed_to_the_entry_without_a_file_alone(write):
    asked = []

    def sums_of(n: int) -> list[tuple[str, str]]:
        asked.append(n)
        return [("1+1", "2")]

    own = SuiteItem("synthetic", write("q.jsonl", [{"prompt": "p", "answer": "1"}]))
    others = [SuiteItem("gsm8k", write("g.jsonl", GSM8K)), own]
    assert with_sums(others, sums_of, 3) == others and asked == []
    assert with_sums([*others, SuiteItem("synthetic")], sums_of, 3)[2].pairs == (("1+1", "2"),) and asked == [3]
    with pytest.raises(SuiteError, match="synthetic has neither a file nor pairs"):
        run_suite(Told(), [SuiteItem("synthetic")])


# --- published forms


def test_published_forms_are_read_as_the_builder_writes_them(write, tmp_path):
    (gsm8k,) = read_questions(SuiteItem("gsm8k", write("g.jsonl", [
        {"question": "How many?", "answer": "It is <<3+4=7>>7.\n#### 1,007"}])))
    assert gsm8k.prompt == "How many?" and gsm8k.answer.endswith("1,007")
    (mbpp,) = read_questions(SuiteItem("mbpp", write("m.jsonl", [
        {"text": "Write add.", "code": "", "test_list": ["assert add(1) == 2\r\n", "assert add(2) == 3"],
         "test_setup_code": "import math"}])))
    assert mbpp.prompt == "Write add.\nThe code must pass this test:\nimport math\nassert add(1) == 2"
    assert len(mbpp.tests) == 2 and mbpp.setup == "import math"
    problems = {
        "4": {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "Look.", "image": None,
              "lecture": "L.", "solution": "S."},
        "9": {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png"},
    }
    path = tmp_path / "problems.json"
    for text in (json.dumps(problems), json.dumps(list(problems.values())[0]) + "\n"):
        path.write_text(text, encoding="utf-8")
        (science,) = read_questions(SuiteItem("science_qa", path))
        assert science.prompt == "Look.\nWhich?\n(A) a\n(B) b"
        assert (science.choices, science.answer_index, science.rationale) == (("a", "b"), 1, "L.\nS.")


@pytest.mark.parametrize("form", ["lines", "bom", "crlf", "list", "indented list", "by id", "indented by id", "gaps"])
def test_every_form_of_a_file_holds_the_same_questions(tmp_path, form):
    rows = [{"question": f"Number {n}?\u2028", "answer": f"It is {n}.\x85\n#### {n}"} for n in range(3)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = {
        "lines": "\n".join(lines), "bom": "\ufeff" + "\n".join(lines), "crlf": "\r\n".join(lines),
        "list": json.dumps(rows),
        "indented list": json.dumps(rows, indent=2), "by id": json.dumps(dict(enumerate(rows))),
        "indented by id": "\ufeff" + json.dumps(dict(enumerate(rows)), indent=1), "gaps": "\n\n" + "\n \n".join(lines),
    }[form]  # fmt: skip
    path = tmp_path / "g.json"
    path.write_text(text, encoding="utf-8", newline="")
    questions = read_questions(SuiteItem("gsm8k", path))
    assert [(question.index, question.answer[-1]) for question in questions] == [(0, "0"), (1, "1"), (2, "2")]


def test_sanitized_tasks_are_read_with_their_imports(write):
    (mbpp,) = read_questions(SuiteItem("mbpp", write("m.jsonl", [
        {"source_file": "n.ipynb", "task_id": 2, "prompt": "Write root.", "code": "", "test_imports": ["import math"],
         "test_list": ["assert math.isclose(root(4), 2)"]}])))
    assert mbpp.setup == "import math" and mbpp.tests == ("assert math.isclose(root(4), 2)",)
    assert mbpp.prompt == "Write root.\nThe code must pass this test:\nimport math\nassert math.isclose(root(4), 2)"


@pytest.mark.parametrize(("content", "told"), [
    ('{\n "1": {"question": "a"\n "answer": "1"}}', "line 3: no JSON"), ('{"1": {}, "1": {}}\n', "it holds '1' twice"),
    ('{"question": "a", "answer": "1"},\n', "line 1: no JSON (Extra data"), ('{\n', "no JSON")])
def test_a_broken_file_of_any_form_is_told_by_its_line(tmp_path, content, told):
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SuiteError, match=re.escape(told)):
        read_questions(SuiteItem("gsm8k", path))


# --- language


@given(st.text(st.sampled_from("ab \n\u00e9"), max_size=200), st.integers(1, 30))
def test_windows_join_to_the_text_and_stay_small(text, size):
    pieces = cut_windows(text, size)
    assert "".join(pieces) == text and all(len(piece) <= size for piece in pieces)
    pairs = window_pairs(text, size)
    assert "".join(continuation for _, continuation in pairs) == text[len(pieces[0]) :]
    place = len(pieces[0])
    for context, continuation in pairs:  # each window is read right up to where it goes on
        assert context and text[place - len(context) : place] == context
        place += len(continuation)


def test_windows_are_cut_before_white_space():
    assert cut_windows("one two three four", 9) == ["one two", " three", " four"]


def test_documents_of_each_kind_of_file(write, tmp_path):
    assert read_documents(write("d.jsonl", [{"text": " a "}, {"text": " "}, {"text": "b"}])) == ["a", "b"]
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = One = \n \n text \n = = Part = = \n more \n \n = Two = \n \n other\n", encoding="utf-8")
    assert read_documents(path) == ["= One = \n \n text \n = = Part = = \n more", "= Two = \n \n other"]
    path.write_text("para one\n\npara two\n", encoding="utf-8")
    assert read_documents(path) == ["para one\n\npara two"]


def test_perplexity_counts_every_window_but_the_first_once(write):
    texts = [STORY, STORY[: WINDOW + 100], "short", "\u00e9" * (WINDOW + 50)]
    path = write("d.jsonl", [{"text": text} for text in texts])
    firsts = [len(cut_windows(text.strip())[0]) for text in texts]
    rest = [text.strip()[first:] for text, first in zip(texts, firsts, strict=True)]
    result = run_suite(Told(rate=2.0), parse_suite(f"perplexity={path}"), bare=Told(rate=3.0))
    rows = rows_of(result)
    perplexity, bits = rows["suite/perplexity", "perplexity"], rows["suite/perplexity", "bits_per_byte"]
    tokens, size = sum(map(len, rest)), sum(len(text.encode()) for text in rest)
    assert perplexity["n"] == tokens and perplexity["value"] == pytest.approx(math.exp(2))
    assert perplexity["bare"] == pytest.approx(math.exp(3))
    assert bits["n"] == size and bits["value"] == pytest.approx(2 * tokens / math.log(2) / size)
    assert bits["ci_low"] < bits["value"] < bits["ci_high"]
    lines = lines_of(result)
    assert [line["id"] for line in lines] == [f"suite/perplexity/0000{place}" for place in (0, 1, 3)]
    assert {(line["score"], line["bare_score"]) for line in lines} == {(-2.0, -3.0)}


def test_a_single_document_is_resampled_in_blocks_and_short_ones_are_refused(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(STORY * 20, encoding="utf-8")
    rows = rows_of(run_suite(Told(), [SuiteItem("perplexity", path)]))
    assert rows["suite/perplexity", "perplexity"]["ci_low"] is not None
    path.write_text("too short", encoding="utf-8")
    with pytest.raises(SuiteError, match="no document of .* is longer than its first window"):
        run_suite(Told(), [SuiteItem("perplexity", path)])


def test_n_caps_windows_drawn_from_all_documents(write):
    path = write("d.jsonl", [{"text": STORY}] * 20)
    result = run_suite(Told(), [SuiteItem("perplexity", path)], 15, seed=1)
    assert 8 <= len(result.predictions()) <= 15


# --- questions


def test_every_metric_has_its_n_interval_and_bare_value(write):
    said = {
        GSM8K[0]["prompt"]: "3 + 4 = 7, so #### $7.00.", GSM8K[1]["prompt"]: "It is 1,200", GSM8K[2]["prompt"]: "3",
        SCIENCE[0]["prompt"]: "Water flows downhill and fills every cup.\nThe answer is (B).",
        SCIENCE[1]["prompt"]: "B", "1+1": "2.", "2+2": "2 + 2 = 4",
    }
    ours, bare = Told(said, segments=2.5), Told({GSM8K[0]["prompt"]: "7"})
    items = [SuiteItem("gsm8k", write("g.jsonl", GSM8K)), SuiteItem("science_qa", write("s.jsonl", SCIENCE)),
             SuiteItem("synthetic", pairs=(("1+1", "2"), ("2+2", "4")))]
    told: list[tuple] = []
    result = run_suite(ours, items, bare=bare, progress=lambda *done: told.append(done))
    rows = rows_of(result)
    shares = {("gsm8k", "accuracy"): (2, 3, 1 / 3), ("science_qa", "accuracy"): (1, 2, 0),
              ("synthetic", "exact"): (1, 2, 0), ("synthetic", "final_number"): (2, 2, 0)}
    for (name, metric), (hits, n, bare_value) in shares.items():
        low, high = wilson(hits, n)
        assert rows[f"suite/{name}", metric] == {
            "step": 7, "task": f"suite/{name}", "metric": metric, "value": hits / n, "n": n, "ci_low": low,
            "ci_high": high, "bare": bare_value, "segments_used": 2.5, "elapsed_s": 1.5}
    for metric in ("bleu", "rouge_l"):
        row = rows["suite/science_qa", metric]
        assert row["n"] == 2 and row["ci_low"] <= row["value"] <= row["ci_high"] and row["value"] > row["bare"] == 0
    assert len(rows) == 6 and all(set(row) == set(EVAL_HEADER) for row in rows.values())
    assert ours.asked == bare.asked
    assert told == [(name + whose, n, n) for name, n in (("gsm8k", 3), ("science_qa", 2), ("synthetic", 2))
                    for whose in ("", " (bare LLM)")]
    lines = lines_of(result)
    assert lines[0] == {"step": 7, "id": "suite/gsm8k/00000", "task": "suite/gsm8k", "score": 1.0, "bare_score": 1.0,
                        "prompt_hash": question_hash(GSM8K[0]["prompt"]), "prediction": said[GSM8K[0]["prompt"]],
                        "question": GSM8K[0]["prompt"], "gold": "7", "bare_prediction": "7"}
    assert [line["score"] for line in lines] == [1, 1, 0, 1, 0, 1, 0]


class Cutting(Told):
    """Reads three words of a question or context, and stops an answer of more than one word."""

    cuts = Cuts()

    def generate(self, prompts, max_new_tokens, progress=lambda done: None):
        answers = super().generate(prompts, max_new_tokens, progress)
        self.cuts = Cuts(tuple(len(prompt.split()) > 3 for prompt in prompts),
                         tuple(" " in answer for answer in answers))
        return answers

    def log_likelihoods(self, pairs):
        self.cuts = Cuts(tuple(len(context.split()) > 3 for context, _ in pairs))
        return super().log_likelihoods(pairs)


def test_what_was_cut_stands_in_the_records_and_in_the_table(write):
    pairs = (("1 + 1 + 2", "4"), ("1 + 1", "2"), ("1+2", "3"))
    words = [{"text": "word " * 40 * size} for size in (3, 6)]
    items = [SuiteItem("synthetic", pairs=pairs), SuiteItem("perplexity", write("d.jsonl", words))]
    model, bare = Cutting({"1 + 1": "so 2", "1+2": "so 3"}), Cutting({"1+2": "so 3"})
    result = run_suite(model, items, bare=bare)
    rows = rows_of(result)
    for metric, hits, bare_hits in (("questions_cut", 1, 1), ("answers_cut", 2, 1)):
        low, high = wilson(hits, 3)
        row = rows["suite/synthetic", metric]
        assert (row["value"], row["n"], row["ci_low"], row["ci_high"]) == (hits / 3, 3, low, high)
        assert row["bare"] == bare_hits / 3
    windows = sum(len(window_pairs(row["text"].strip())) for row in words)
    row = rows["suite/perplexity", "questions_cut"]
    assert (row["value"], row["n"]) == (1.0, windows) and ("suite/perplexity", "answers_cut") not in rows
    table = result.table()
    assert any(line.split()[:3] == ["synthetic", "answers_cut", "3"] and "66.7 %" in line for line in table)
    notes = [line for line in table if line.startswith("note: ")]
    assert notes == [
        "note: 1 of 3 answers to suite/synthetic are empty",
        "note: 1 of 3 questions of suite/synthetic lost their beginning: they have more tokens than the model reads "
        "(--max_seq_len)",
        "note: 2 of 3 answers to suite/synthetic were cut at the limit of tokens (--max_new_tokens)",
        f"note: {windows} of {windows} contexts of suite/perplexity lost their beginning: they have more tokens than "
        "the model reads (--max_seq_len)",
    ]


def published(splits: str) -> dict:
    """ScienceQA's own form, one question for each letter: e(ntrance) to te(st)."""
    names = {"r": "train", "v": "val", "t": "test"}
    return {str(place): {"question": f"Which is number {place}?", "choices": ["one", "two"], "answer": place % 2,
                         "image": None, "hint": "", "lecture": "", "solution": "", "split": names[letter]}
            for place, letter in enumerate(splits)}


def test_a_file_of_several_splits_is_asked_one_that_is_named(tmp_path):
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(published("rrvtt")), encoding="utf-8")
    (problem,) = suite_problems(f"science_qa={path}")
    assert "splits test (2), train (2), val (1) are mixed: name one with --eval_suite_split" in problem
    with pytest.raises(SuiteError, match="are mixed"):
        read_questions(SuiteItem("science_qa", path))
    (problem,) = suite_problems(f"science_qa={path}", "dev")
    assert "no row is of --eval_suite_split dev" in problem
    (item,) = parse_suite(f"science_qa={path}", "test")
    assert [question.index for question in read_questions(item)] == [3, 4]
    assert len(read_questions(SuiteItem("science_qa", path, split="all"))) == 5
    # The only split needs no name.
    path.write_text(json.dumps(published("rr")), encoding="utf-8")
    assert suite_problems(f"science_qa={path}") == [] and len(read_questions(SuiteItem("science_qa", path))) == 2


def test_language_rows_of_several_splits_are_not_mixed_either(write):
    path = write("d.jsonl", [{"text": STORY, "split": "train"}, {"text": STORY + "!", "split": "test"}])
    (problem,) = suite_problems(f"perplexity={path}")
    assert "are mixed" in problem and suite_problems(f"perplexity={path}", "test") == []
    assert read_documents(path, split="test") == [STORY + "!"] and len(read_documents(path, split="all")) == 2


def test_items_that_were_trained_on_are_left_out_and_counted(write):
    trained = [GSM8K[0]["prompt"], STORY.strip()]
    items = [SuiteItem("gsm8k", write("g.jsonl", GSM8K)),
             SuiteItem("perplexity", write("d.jsonl", [{"text": STORY}, {"text": STORY + "The end."}]))]
    model = Told()
    result = run_suite(model, items, trained_on=trained)
    assert model.asked[0][0] == [row["prompt"] for row in GSM8K[1:]]
    rows = rows_of(result)
    assert rows["suite/gsm8k", "accuracy"]["n"] == 2
    assert [(row["task"], row["value"]) for row in rows.values() if row["metric"] == "trained_on"] == [
        ("suite/gsm8k", 1), ("suite/perplexity", 1)]
    assert [line["id"] for line in result.predictions()][:2] == ["suite/gsm8k/00001", "suite/gsm8k/00002"]
    notes = [line for line in result.table() if "trained on them" in line]
    assert notes[0] == "note: 1 items of suite/gsm8k were left out: the model was trained on them" and len(notes) == 2
    with pytest.raises(SuiteError, match="gsm8k: all 3 questions of .* were trained on: give a held-out file"):
        run_suite(model, items[:1], trained_on=[row["prompt"] for row in GSM8K])
    with pytest.raises(SuiteError, match="perplexity: all 2 documents of .* were trained on"):
        run_suite(model, items[1:], trained_on=[STORY.strip(), (STORY + "The end.").strip()])


def test_rows_and_predictions_go_into_a_runs_records(tmp_path, write):
    result = run_suite(Told(), [SuiteItem("gsm8k", write("g.jsonl", GSM8K))])
    with RunLog(tmp_path / "run", None, [], {}) as log:
        log.eval_rows(stamped(result.rows(), 3, 2.0))
        log.predictions(stamped(result.predictions(), 3))
    with open(tmp_path / "run" / "eval.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert [row[key] for key in ("task", "metric", "value", "n", "bare")] == ["suite/gsm8k", "accuracy", "0", "3", ""]
    assert len(list(json_lines(tmp_path / "run" / "predictions.jsonl"))) == 3


def test_the_table_shows_values_with_intervals_and_tells_of_empty_answers(write):
    stories = write("d.jsonl", [{"text": STORY}] * 3)
    items = [SuiteItem("gsm8k", write("g.jsonl", GSM8K)), SuiteItem("perplexity", stories)]
    lines = run_suite(Told({GSM8K[0]["prompt"]: "7"}), items, bare=Told(rate=3)).table()
    assert lines[0].split() == ["suite", "metric", "n", "bare", "LLM", "model"]
    assert lines[1].endswith(" 33.3 % [6.1, 79.2]") and " 0.0 % [0.0, 56.1] " in lines[1]
    assert lines[2].split()[:2] == ["perplexity", "perplexity"] and "7.389 [7.389, 7.389]" in lines[2]
    assert lines[4:] == ["note: 2 of 3 answers to suite/gsm8k are empty"]
    assert len(run_suite(Told(), items[1:]).table()) == 3 and "bare" not in run_suite(Told(), items[1:]).table()[0]


def test_without_gold_rationales_there_is_accuracy_alone(write):
    path = write("s.jsonl", [{**row, "rationale": ""} for row in SCIENCE])
    assert [row["metric"] for row in run_suite(Told(), [SuiteItem("science_qa", path)]).rows()] == ["accuracy"]


def test_a_line_says_what_one_option_gets_right(write):
    path = write("s.jsonl", [{**SCIENCE[0], "answer_index": place} for place in (1, 0, 1, 1)])
    lines = run_suite(Told(), [SuiteItem("science_qa", path)]).table()
    assert "note: one option, always the same, is right in 75.0 % of suite/science_qa" in lines


def test_n_caps_items_by_a_seeded_draw_that_grows(write):
    path = write("q.jsonl", [{"prompt": f"p{place}", "answer": "1"} for place in range(50)])

    def ids(n: int, seed: int) -> list[str]:
        return [line["id"] for line in run_suite(Told(), [SuiteItem("synthetic", path)], n, seed).predictions()]

    assert len(ids(0, 0)) == 50 and len(ids(10, 0)) == 10 and ids(10, 0) != ids(10, 1)
    assert set(ids(10, 0)) < set(ids(20, 0)) and ids(10, 0) == sorted(ids(10, 0))


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 3))
def test_chosen_places_are_distinct_sorted_and_as_many_as_asked(count, n, seed):
    places = chosen(count, n, seed)
    assert places == sorted(set(places)) and set(places) <= set(range(count))
    assert len(places) == (min(n, count) if n else count)


def test_the_built_in_sums_are_those_that_training_rejects():
    questions = read_questions(sums(32))
    reserve = Reserve(make_tasks(["toy_add"], "default"), 32)
    assert len({question.prompt for question in questions}) == 32
    for question in questions:
        left, right = map(int, question.prompt.removeprefix("What is ").removesuffix("?").split(" + "))
        assert question.answer == str(left + right) and question.prompt in reserve and max(left, right) < 100
    right = Told({question.prompt: question.answer for question in questions})
    assert run_suite(right, [sums(32)], 32).rows()[0]["value"] == 1.0
    assert len(read_questions(sums(0))) == 256


def test_budgets_are_each_entrys_own_unless_told(write):
    model, items = Told(), [SuiteItem("gsm8k", write("g.jsonl", GSM8K)), SuiteItem("synthetic", pairs=(("1+1", "2"),))]
    run_suite(model, items)
    run_suite(model, items, max_new_tokens=5)
    budgets = [budget for _, budget in model.asked]
    assert budgets[0] > budgets[1] > 5 and budgets[2:] == [5, 5]


# --- code


@pytest.fixture
def jobs(monkeypatch):
    """Every job that the real code runner is given, with whether it may run unconfined."""
    seen, run_many = [], code_runner.run_many

    def watched(given, **settings):
        given = list(given)
        seen.extend((job, settings["allow_unconfined"]) for job in given)
        return run_many(given, **settings)

    monkeypatch.setattr(code_runner, "run_many", watched)
    return seen


@pytest.mark.skipif(code_runner.confinement() is not None, reason="no confinement here")
def test_a_row_whose_own_code_fails_its_tests_is_named_before_a_model_is_loaded(write):
    wrong = {"text": "Write inc.", "code": "def inc(a):\r\n  return a", "test_list": ["assert inc(1) == 2"]}
    path = write("m.jsonl", [MBPP[0], wrong, {**MBPP[1], "code": ""}])
    told = "mbpp: the reference code fails its own tests at .*m.jsonl, line 2 .failed: test 1: AssertionError"
    for read in (lambda: read_questions(SuiteItem("mbpp", path)), lambda: parse_suite(f"mbpp={path}")):
        with pytest.raises(SuiteError, match=told):
            read()
    assert len(read_questions(SuiteItem("mbpp", write("right.jsonl", MBPP)))) == len(MBPP)


def test_code_is_unfenced_and_run_against_all_its_tests(write, jobs):
    said = {"Write add.": f"Sure:\n```python\n{MBPP[0]['code']}\n```\nDone.", "Write neg.": "def neg(a): return a"}
    unconfined = code_runner.confinement() is not None  # where namespaces are refused, verdicts are still tested
    items = [SuiteItem("mbpp", write("m.jsonl", MBPP))]
    result = run_suite(Told(said), items, bare=Told(), allow_unconfined=unconfined)
    (row,) = result.rows()
    assert (row["metric"], row["value"], row["n"], row["bare"]) == ("passed", 0.5, 2, 0.0)
    assert [line["score"] for line in result.predictions()] == [1.0, 0.0]
    ours = code_runner.CodeJob(f"{MBPP[0]['code']}\n", tuple(MBPP[0]["tests"]), "import math")
    assert (ours, unconfined) in jobs and len(jobs) == 4


def test_code_that_nothing_confines_is_not_run_unless_allowed(write, jobs, monkeypatch):
    model, items = Told({"Write add.": MBPP[0]["code"]}), [SuiteItem("mbpp", write("m.jsonl", MBPP))]
    monkeypatch.setattr(code_runner, "confinement", lambda: "no namespaces")
    with pytest.raises(SuiteError, match=r"cannot be confined here \(no namespaces\)"):
        run_suite(model, items)
    assert model.asked == [] and jobs == []
    assert run_suite(model, items, allow_unconfined=True).rows()[0]["value"] == 0.5
    assert len(jobs) == 2 and all(allowed for _, allowed in jobs)


# --- real models


def test_the_suite_runs_on_a_bare_llm_and_on_the_addon(tiny_host, tokenizer, write):
    items = [SuiteItem("perplexity", write("d.jsonl", [{"text": STORY}, {"text": STORY[:700]}])),
             SuiteItem("gsm8k", write("g.jsonl", GSM8K)), sums(4)]
    host, addon = load_host(str(tiny_host)), tiny_model(tiny_host, segments=2)
    bare = run_suite(CausalTextModel(host, tokenizer), items, 4, max_new_tokens=6)
    both = run_suite(CausalTextModel(addon, tokenizer), items, 4, max_new_tokens=6,
                     bare=CausalTextModel(addon, tokenizer, bare=True))
    alone, paired = bare.rows(), both.rows()
    for ours, theirs in zip(paired, alone, strict=True):
        assert ours["bare"] == pytest.approx(theirs["value"], rel=1e-4) and ours["n"] == theirs["n"]
        assert ours["segments_used"] == 2 and theirs["segments_used"] is None
    perplexity = paired[0]
    assert perplexity["metric"] == "perplexity" and perplexity["ci_low"] <= perplexity["ci_high"]
    assert abs(perplexity["value"] / perplexity["bare"] - 1) > 1e-3  # the add-on speaks
