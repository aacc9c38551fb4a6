"""Rewards: what is right gets 1.0, what only looks right does not, and no text makes one raise or hang."""

from __future__ import annotations

import itertools
import json
import time
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from enhanced.reasoning_format import END_MARKS, REASONING_TOKENS, format_rate, format_score, split_completion
from grpo import rewards
from grpo.arithmetic import steps
from grpo.rewards import (
    COLUMNS,
    REWARDS,
    brevity_reward,
    build_rewards,
    chain_of_thought_reward,
    format_reward,
    item_text,
    math_reward,
    read_item,
    repetition,
    same_answer,
)
from reasoning_gym_wrapper import Example, Task
from sandbox.runner import confinement
from text_data.numbers import numbers

UNCONFINED = {"allow_unconfined_code": confinement() is not None}
PROMPT = "Ann has 12 apples and buys half as many again, then 7 more. How many has she?"
THOUGHT = "12 / 2 = 6 are added: 12 + 6 = 18, then 18 + 7 = 25."
TASK = Task("chain_sum")
EXAMPLE = next(TASK.items(0))[1]
TESTS = ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4", "assert f(4) == 5"]
COLUMN_VALUES = {"answer": "25", "tests": TESTS, "setup": "", "task": "chain_sum", "item": item_text(EXAMPLE.entry)}
RIGHT = {name: "25" for name in REWARDS} | {"code": "def f(x): return x + 1", "verifier": EXAMPLE.target}


def tagged(solution, thought=THOUGHT):
    return f"<think>{thought}</think>\n<SOLUTION>{solution}</SOLUTION>"


def score(name, completion, prompt=PROMPT, settings=None, **columns):
    """One completion's value of one reward, called as TRL calls it."""
    (function,), _ = build_rewards({name: 1.0}, **{**UNCONFINED, **(settings or {})})
    values = {key: [value] for key, value in {**COLUMN_VALUES, **columns}.items()}
    return function(prompts=[prompt], completions=[completion], completion_ids=None, trainer_state=None, **values)[0]


def chat(text):
    return [{"role": "assistant", "content": text}]


# --- every reward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_a_right_well_formed_answer_gets_all_of_each_reward(name):
    right = tagged(RIGHT[name])
    assert score(name, right) == 1.0
    assert score(name, chat(right), prompt=[{"role": "user", "content": PROMPT}]) == 1.0
    assert score(name, [{"role": "assistant", "content": [{"type": "text", "text": right}]}]) == 1.0


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("nothing", ["", " \n", "<think></think><SOLUTION></SOLUTION>", None, [], [{}], 7, chat(None)])
def test_nothing_earns_nothing_but_part_of_the_format(name, nothing):
    assert score(name, nothing) <= (0.4 if name == "format" else 0.0)


@pytest.mark.parametrize("name", REWARDS)
def test_rows_without_what_a_reward_needs_score_0(name):
    needed, optional = COLUMNS[name]
    if needed:
        assert REWARDS[name]([PROMPT], [tagged(RIGHT[name])]) == [0.0]
        for column in needed:
            for broken in (None, 7, float("nan"), [], {}, "no such thing", "{", [None]):
                assert score(name, tagged(RIGHT[name]), **{column: broken}) == 0.0, (column, broken)
    assert REWARDS[name]([], []) == []


TAG_SOUP = st.lists(st.sampled_from([*REASONING_TOKENS, *END_MARKS[:2], "25", "12 + 6 = 18", "\n", "=", "a", "-", "("]))


@pytest.mark.parametrize("name", [name for name in REWARDS if name != "code"])
@given(text=st.one_of(st.text(), TAG_SOUP.map("".join), st.text().map(tagged)), prompt=st.text(), tags=st.booleans())
@example(text="<SOLUTION>\ud800</SOLUTION>", prompt="\x00", tags=True)
@example(text=tagged("1" * 5000 + "/" + "0"), prompt="1" * 5000, tags=True)
@example(text=tagged("1e99999999"), prompt="", tags=True)
def test_any_text_scores_within_0_and_1(name, text, prompt, tags):
    value = score(name, text, prompt=prompt, settings={"tags": tags})
    assert isinstance(value, float) and 0.0 <= value <= 1.0
    columns = {key: text for key in COLUMNS[name][0]}
    assert 0.0 <= score(name, text, **columns) <= 1.0


@pytest.mark.parametrize("text", ["\ud800", "\x00", "ü" * 100, "(" * 1000, "def f(x): return '\ud800'", "<think>" * 9])
def test_any_code_scores_within_0_and_1(text):
    assert 0.0 <= score("code", tagged(text)) < 1.0


# CPU seconds: ample for a linear scan of a megabyte on a slow and busy machine, far too few for a quadratic one.
LINEAR_S = 20.0
PIECES = ("<think>", "</think>", "<SOLUTION>", "<", "1", "1+", "1=", "1,111,", "1 ", ".1", "1 1/", "\\frac{", "</s>")


@pytest.mark.parametrize("piece", [*PIECES, "1 + 1 = 2 ", "$-", "\n"])
def test_a_megabyte_is_scored_fast(piece):
    long = piece * (10**6 // len(piece))
    for text in (tagged("25") + long, tagged(long), tagged("25", long)):
        for name in REWARDS:
            started = time.process_time()
            assert 0.0 <= REWARDS[name]([text], [text], **{k: [v] for k, v in COLUMN_VALUES.items()})[0] <= 1.0
            assert time.process_time() - started < LINEAR_S, name
    assert 0.0 <= repetition(long) < 1.0


# --- format -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["", "\n", " </s>", "<|im_end|>\n", "<|eos|><|pad|><|pad|>"])
def test_white_space_and_end_marks_may_follow(tail):
    assert format_score(" " + tagged("25") + tail) == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("25", 0.0),
        ("<think>", 0.0),
        ("<think>a</think>", 0.3),
        ("<think></think>", 0.2),
        ("<SOLUTION>25</SOLUTION>", 0.3),
        ("<SOLUTION>25</SOLUTION><think>a</think>", 0.3),
        ("<think></think><SOLUTION>25</SOLUTION>", 0.5),
        ("<think> \n</think><SOLUTION>25</SOLUTION>", 0.5),
        ("<think>a</think><SOLUTION> </SOLUTION>", 0.5),
        (tagged("25") + "more", 0.6),
        ("well " + tagged("25"), 0.6),
        ("<think>a</think> so <SOLUTION>25</SOLUTION>", 0.6),
        (tagged("25") + "<SOLUTION>26</SOLUTION>", 0.3),
        (tagged("25") * 2, 0.0),
        ("<think>a</think>" * 5 + "<SOLUTION>25</SOLUTION>", 0.3),
        ("<think>a <SOLUTION>25</SOLUTION></think>", 0.3),
        ("<think><think>a</think></think><SOLUTION>25</SOLUTION>", 0.3),
        ("<think>a</think><SOLUTION><work>25</work></SOLUTION>", 0.6),
        ("<THINK>a</THINK><SOLUTION>25</SOLUTION>", 0.3),
    ],
)
def test_parts_of_the_format_earn_parts_of_the_reward(text, value):
    assert format_reward([""], [text]) == [pytest.approx(value)]
    assert not split_completion(text).well_formed


def test_the_parts_of_a_completion():
    assert split_completion(tagged(" 25 ", " a ")) == rewards.Parsed("a", "25", True)
    assert split_completion("<SOLUTION>25</SOLUTION>") == rewards.Parsed("", "25", False)
    assert split_completion("<think>never closed <SOLUTION>25</SOLUTION>").solution == ""
    assert split_completion("<think>a <SOLUTION>1</SOLUTION></think><SOLUTION>25</SOLUTION>").solution == "25"
    assert split_completion("</SOLUTION>25<SOLUTION>").solution == ""
    assert format_rate([tagged("25"), "25"]) == 0.5 and format_rate([]) == 0.0


CONTENT = st.text().filter(lambda text: text.strip() and not any(tag in text for tag in REASONING_TOKENS))


@given(CONTENT, CONTENT)
def test_what_was_tagged_comes_back(thought, solution):
    assert split_completion(tagged(solution, thought)) == rewards.Parsed(thought.strip(), solution.strip(), True)


# --- math -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        *[("12", 12), ("12", "12.0"), ("12.", "12"), ("The answer is 12 apples", "12"), ("$12", "12"), ("x = 12", 12)],
        *[("1,234", "1234"), ("$1,234.50", "1234.5"), ("1/2", "0.5"), ("0.5", "1/2"), ("-1/2", "-0.5"), ("2/4", "1/2")],
        *[("−3", "-3"), ("-$3", "-3"), ("12%", "12 %"), (r"\boxed{12}", "12"), (r"\frac{1}{2}", "0.5"), ("12km", "12")],
        *[("72", "48 + 24 = 72\n#### 72"), ("1 1/2", "1.5"), ("1e3", "1000"), (" Blue ", "blue"), ("10:30", "10:30")],
        *[("minus 12", "-12"), ("Negative $3", "-3"), ("12 percent", "12%"), ("9 m²", "9")],
        *[("12 million", "12 Million"), (".5", "0.50"), ("7" * 300, "7" * 300), ("(3, 4)", "(3, 4)"), ("0", "-0")],
    ],
)
def test_equal_numbers_are_equal_however_written(solution, answer):
    assert same_answer(solution, answer)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        *[("13", "12"), ("12 13", "12"), ("12, 13", "12"), ("12 or 13", "13"), ("1 2", "12"), ("12 12", 12), ("", 12)],
        *[("-12", "12"), ("- 12", "12"), ("12%", "12"), ("12%", "0.12"), ("120", "12"), ("1.2", "12"), ("1/2", "12")],
        *[("3 + 9 = 12", "12"), ("10-2", "8"), ("0.333", "1/3"), ("12/0", "12"), ("twelve", "12"), ("12", "twelve")],
        *[("minus 12", "12"), ("negative 12", "12"), ("\u2011 12", "12"), ("\uff0d12", "12"), ("12 percent", "12")],
        *[("12 million", "12"), ("12k", "12"), ("3²", "3"), ("√9", "9"), ("$\\sqrt{9}$", "9"), ("1½", "1")],
        *[("12", None), ("", ""), ("12", ""), ("12", float("nan")), ("1,2", "12"), ("12" + " " * 2000, "12")],
        *[(" ".join(map(str, range(100))), "12"), (",".join(map(str, range(10, 14))), "12"), ("10:30", "10")],
    ],
)
def test_other_numbers_and_lists_of_numbers_are_wrong(solution, answer):
    assert not same_answer(solution, answer)


@pytest.mark.parametrize(("solution", "answer"), [
    (r"\boxed{B}", "B"), ("<answer>B</answer>", "B"), ("(B)", "B"), ("B.", "B"), ("B) a text", "B"),
    ("Answer: B", "b"), ("**B**", "B"),
    ("The answer is B because A is wrong", "B"), ("b", "B"), ("B", "(B)"), ("B", "(B) Paris"),
    ("(B) Paris", "(B) Paris"),
    ("Yes.", "Yes"), ("**yes**", "Yes"), (r"\text{Yes}", "yes"), ('"Paris"', "Paris"), ("[1, 2]", "[1,2]"),
    ("(3,4)", "(3, 4)"),
    ("72", "#### 72 clips"), ("72", "72 #### "), ("72", "48 + 24 = <<48+24=72>>72\n#### 72"), ("5", "x = 5"),
    ("5 km", "5"),
    (r"70{,}000", "70,000"), ("-\u20ac5", "-5"), ("5!", "5!"), ("Paris 2024", "paris 2024")])
def test_options_and_texts_are_equal_however_written(solution, answer):
    assert same_answer(solution, answer)


@pytest.mark.parametrize(("solution", "answer"), [
    ("B or C", "B"), ("not B", "B"), ("A", "B"), ("C", "(B) Paris"), ("A force", "A"), ("London 2024", "Paris 2024"),
    ("66", "Route 66"),
    ("Yes.", "No"), ("5!", "5"), ("5 squared", "5"), ("5M", "5"), ("sqrt(9)", "9"), ("half of 10", "10"),
    ("not 5", "5"), ("5", "5!"),
    ("5-6", "5"), ("1,5", "1.5"), ("5 of 6", "5"), (r"\boxed{5!}", "5"), ("0x5", "0"), ("f(5)", "5")])
def test_what_only_holds_the_answer_is_not_the_answer(solution, answer):
    assert not same_answer(solution, answer)


@given(st.fractions(max_denominator=1000), st.sampled_from(["{}", "about {} apples", "$ {}", "{}."]))
def test_every_fraction_equals_itself_and_not_its_neighbour(value, form):
    assert same_answer(form.format(value), str(value))
    assert not same_answer(form.format(value), str(value + 1))
    assert [number.value for number in numbers(str(value))] == [value]


@given(st.integers(), st.integers(0, 10**6))
def test_commas_and_decimals_do_not_matter(whole, part):
    text = f"{whole:,}.{part:06d}"
    assert numbers(text) == numbers(text.replace(",", "")) and len(numbers(text)) == 1
    assert abs(numbers(text)[0].value) == abs(whole) + Fraction(part, 10 ** max(6, len(str(part))))


@pytest.mark.parametrize(
    "completion",
    [
        "25",
        "<think>25</think>",
        "<think>a</think>25",
        "<think>a <SOLUTION>25</SOLUTION></think>",
        "<think>a</think><SOLUTION>24</SOLUTION><SOLUTION>25</SOLUTION>",
        "<think>a</think><SOLUTION>25</SOLUTION><SOLUTION>24</SOLUTION>",
        "".join(f"<SOLUTION>{n}</SOLUTION>" for n in range(50)),
        "<SOLUTION>24 25 26</SOLUTION>",
        "<think>a</think><SOLUTION>24</SOLUTION>25",
        PROMPT,
    ],
)
def test_a_number_outside_the_one_solution_earns_nothing(completion):
    assert math_reward([PROMPT], [completion], answer=["25"]) == [0.0]


@pytest.mark.parametrize(("prompt", "solution", "answer", "value"), [
    ("Calculate 24 / 2.", "24 / 2", "12", 0.0),
    ("Calculate 24 / 2.", "Calculate 24 / 2.", "12", 0.0),
    ("Calculate -2,400 ÷ -20.", "-2400/-20", "120", 0.0),
    ("Calculate 24 / 2.", "12", "12", 1.0),
    ("Calculate 24 / 2.", "12/1", "12", 1.0),
    ("Simplify 12/24.", "12/24", "1/2", 0.0),
    ("Simplify 12/24.", "1/2", "1/2", 1.0),
    ("Is 1/2 less than 1/3? Name the larger.", "1/2", "1/2", 1.0),
    ("What is half of 1?", "1/2", "0.5", 1.0),
])
def test_a_division_that_is_asked_for_is_no_answer_to_it(prompt, solution, answer, value):
    for asked in (prompt, [{"role": "user", "content": prompt}]):
        assert score("math", tagged(solution), prompt=asked, answer=answer) == value


def test_bare_text_counts_only_where_tags_are_not_asked_for():
    assert score("math", "25", settings={"tags": False}) == 1.0
    assert score("verifier", EXAMPLE.target, settings={"tags": False}) == 1.0
    assert score("math", "<think>25</think>", settings={"tags": False}) == 0.0
    assert score("chain_of_thought", THOUGHT, settings={"tags": False}) == 1.0


# --- brevity ----------------------------------------------------------------------------------------------------------


def test_short_is_better_than_long_and_said_once_better_than_twice():
    fresh = " ".join(f"word{n}" for n in range(3000))
    by_length = [brevity_reward([""], [fresh[:n]])[0] for n in (100, 1000, 2000, 3000, 4096, 8000)]
    assert by_length[:2] == [1.0, 1.0] and by_length == sorted(by_length, reverse=True) and by_length[-2:] == [0.0, 0.0]
    assert brevity_reward([""], ["so it is 25. " * 20])[0] < 0.2 < brevity_reward([""], [fresh[:260]])[0]
    assert brevity_reward([""], ["ab" * 200])[0] < 0.2


def test_length_is_counted_in_tokens_where_they_are_known():
    values = [brevity_reward([""], ["word"], [[0] * n])[0] for n in (10, 256, 640, 1024, 5000)]
    assert values == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert score("brevity", "word " * 3, settings={"free_tokens": 1, "max_tokens": 2}) == 0.0


def test_only_tags_and_marks_are_no_words():
    for text in ("</s>", "<think></think>", "...!", "<SOLUTION>" * 9):
        assert brevity_reward([""], [text]) == [0.0]


def test_repetition_is_the_share_of_repeated_4_grams():
    assert repetition("") == repetition("a b c") == repetition("a b c d e f g") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("no " * 1000) > 0.99 and repetition("no" * 1000) > 0.9
    assert repetition(THOUGHT) < 0.1


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("def f(x): return x + 1", 1.0),
        ("```python\ndef f(x): return x + 1\n```", 1.0),
        ("def f(x): return min(x + 1, 4)", 0.8),
        ("def f(x): return 2", 0.4),
        ("def f(x): return None", 0.2),
        ("raise SystemExit(0)", 0.2),
        ("def f(x) return x + 1", 0.0),
        ("The function adds one.", 0.0),
        ("# def f(x): return x + 1", 0.0),
        ("", 0.0),
    ],
)
def test_code_earns_by_the_tests_it_passes(code, value):
    assert score("code", tagged(code)) == pytest.approx(value)


def test_code_is_run_once_per_distinct_program_and_keeps_its_row():
    good, bad = tagged("def f(x): return x + 1"), tagged("def f(x): return x")
    (function,), _ = build_rewards({"code": 1}, **UNCONFINED)
    values = function([PROMPT] * 5, [good, bad, "", good, good], tests=[TESTS, TESTS, TESTS, TESTS, None], setup=None)
    assert values == [1.0, pytest.approx(0.2), 0.0, 1.0, 0.0]


def test_a_setup_column_is_used():
    assert score("code", tagged("def f(x): return x + STEP"), setup="STEP = 1") == 1.0


def test_code_in_the_thought_earns_nothing():
    assert score("code", "<think><SOLUTION>def f(x): return x + 1</SOLUTION></think>") == 0.0


# --- chain of thought -------------------------------------------------------------------------------------------------


def cot(thought, prompt=PROMPT):
    return chain_of_thought_reward([prompt], [tagged("25", thought)])[0]


@pytest.mark.parametrize(
    ("thought", "value"),
    [
        (THOUGHT, 1.0),
        ("12 + 7 = 19", 1.0),
        ("12 + 7 = 20", 0.0),
        ("12 + 7 = 19, 19 - 7 = 13", 0.5),
        ("12 + 7 = 19. " * 9 + "12 - 7 = 4", 0.5),
        ("12 + 7 = 19, 7 + 12 = 19, 12 - 7 = 4", 0.5),
        ("12 + 7 = 19, 19 + 7 = 26, 12 - 7 = 4", 2 / 3),
        ("12 + 7 + 12 = 31", 1.0),
        ("7 - 12 = -5 and -5 * 7 = -35", 1.0),
        ("12 / 7 = 1.71", 1.0),
        ("12 / 7 = 1.7", 0.0),
        ("12 / 7 = 1.72", 0.0),
        ("12 * 0.5 = 6", 0.0),
        ("$12 x 7 = $84", 1.0),
        ("12 × 7 = <<12*7=84>>84", 1.0),
        ("12 + 7 = 7 + 12", 1.0),
        ("no sums at all", 0.0),
        ("", 0.0),
        ("0 + 0 = 0", 0.0),
        ("0 + 0 = 0 " * 50, 0.0),
        ("1 + 1 = 2, 3 + 4 = 7, 100 - 1 = 99", 0.0),
        ("12 + 0 = 12, 7 * 1 = 7", 0.0),
        ("12 - 12 = 0, 12 + 0 = 12, 7 + 0 = 7, 12 + 7 = 18", 0.5),
        ("12 + 7 = 18, 18 + 7 = 25", 0.0),
        ("(12 + 7) * 2 = 38", 0.0),
        ("12 / 0 = 0", 0.0),
        ("12 = 7 + 5", 0.0),
    ],
)
def test_steps_earn_by_the_share_that_is_right_and_follows(thought, value):
    assert cot(thought) == pytest.approx(value)


def test_steps_count_only_in_the_thought_and_not_if_the_prompt_holds_them():
    assert chain_of_thought_reward([PROMPT], [f"{THOUGHT}<SOLUTION>{THOUGHT}</SOLUTION>"]) == [0.0]
    prompt = "Like 2 + 3 = 5: what is 2 * 3?"
    assert cot("2 + 3 = 5", prompt) == cot(prompt, prompt) == 0.0 and cot("2 * 3 = 6", prompt) == 1.0


@pytest.mark.parametrize(
    ("prompt", "thought"),
    [
        ("half of 12", "12 / 2 = 6"),
        ("three dozen", "3 * 12 = 36"),
        ("20% of 50", "20 / 100 = 0.2, 0.2 * 50 = 10"),
        ("12 dollars an hour for 50 minutes", "12 / 60 = 0.2, 0.2 * 50 = 10"),
        ("1/4 of 12", "12 / 4 = 3"),
        ("3.50 each for 1,200", "1200 * 3.5 = 4,200"),
    ],
)
def test_a_prompt_mentions_numbers_in_words_and_units_too(prompt, thought):
    assert cot(thought, prompt) == 1.0 and cot(thought, "nothing") == 0.0


def test_numbers_of_a_chat_prompt_are_the_users():
    chat_prompt = [{"role": "system", "content": "Use 5 lines."}, {"role": "user", "content": "12 and 7?"}]
    assert cot("12 + 7 = 19", chat_prompt) == 1.0 and cot("12 + 5 = 17", chat_prompt) == 0.0


@given(st.lists(st.integers(-999, 999), min_size=2, max_size=5), st.data())
def test_chains_are_judged_as_python_judges_them(operands, data):
    operators = data.draw(st.lists(st.sampled_from("+-*"), min_size=len(operands) - 1, max_size=len(operands) - 1))
    text = "".join(map(str, itertools.chain(*zip(operands, [f" {o} " for o in operators] + [""], strict=True))))
    value = eval(text)
    (right,), (wrong,) = steps(f"so {text} = {value}, ok"), steps(f"so {text} = {value + 1}")
    assert right.right and not wrong.right and right.operands == tuple(operands)


def test_a_number_cut_by_the_reading_window_is_no_operand():
    assert list(steps("9" * 200 + " + 1 = 2")) == [] and list(steps("1 + " * 100 + "1 = 41")) == []


# --- verifier ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gsm_symbolic", "letter_counting", "calendar_arithmetic", "rearc", "mini_sudoku"])
def test_the_verifier_is_the_tasks_own_scorer(name):
    example = next(Task(name).items(5))[1]
    item = item_text(example.entry)
    for answer in (example.target, "0", "12 apples"):
        assert score("verifier", tagged(answer), task=name, item=item) == example.verify(answer).score
    assert example.verify(example.target).score == 1.0


def test_the_verifier_uses_the_tasks_it_is_given():
    class Scorer:
        def score_answer(self, answer, entry):
            return 0.25

    task = Task("chain_sum")
    task.scorer = Scorer()
    assert score("verifier", tagged("1"), settings={"tasks": (task,)}) == 0.25


@pytest.mark.parametrize(("way", "value"), [("text", 0.0), ("tags", 1.0), ("boxed", 0.0), ("last_number", 1.0)])
def test_the_verifier_takes_the_answer_out_of_the_solution_as_it_is_told(way, value):
    solution = f"That makes <answer>{EXAMPLE.target}</answer>."
    rewarded = score("verifier", tagged(solution), settings={"answer_from": way})
    assert (rewarded == 1.0) is bool(value)
    assert score("verifier", tagged(EXAMPLE.target), settings={"answer_from": way}) == 1.0


def test_scorers_that_run_code_are_barred_unless_allowed():
    example = next(Task("countdown").items(0))[1]
    columns = {"task": "countdown", "item": item_text(example.entry)}
    assert score("verifier", tagged(example.target), **columns) == 0.0
    assert score("verifier", tagged(example.target), settings={"allow_code_tasks": True}, **columns) == 1.0


def test_items_come_back_as_they_were():
    metadata = {"a": (1, (2, [3])), "b": {1: {2}}, "c": {(1, 2): frozenset("x")}}
    entry = {"question": "q", "answer": None, "metadata": metadata}
    assert read_item(item_text(entry)) == entry
    assert read_item(json.dumps({"question": "q", "answer": "a"})) == {"question": "q", "answer": "a"}
    assert read_item("[" * 100_000) is None and read_item('{"__dict__": [1]}') is None and read_item("3") is None
    assert Example("q", None, "chain_sum", EXAMPLE.entry, TASK).item["metadata"]["task"] == "chain_sum"


# --- the registry -----------------------------------------------------------------------------------------------------


def test_functions_carry_their_names_and_weights():
    functions, weights = build_rewards({"math": 2, "format": 0.5}, tags=True)
    assert [function.__name__ for function in functions] == ["math", "format"] and weights == [2.0, 0.5]
    assert functions[0](prompts=[""], completions=[tagged("25")], answer=["25"], settings=["a column"]) == [1.0]


def test_all_problems_are_told_in_one_line(monkeypatch):
    monkeypatch.setattr(rewards, "confinement", lambda: "code cannot be confined here (unshare)")
    with pytest.raises(ValueError) as told:
        build_rewards({"maths": 1, "format": -1, "brevity": float("nan"), "code": 1}, colour=3, free_tokens=0)
    line = str(told.value)
    assert "\n" not in line
    for part in ("unknown reward 'maths'", "weight of format", "-1", "weight of brevity", "unknown setting 'colour'"):
        assert part in line
    assert "free_tokens" in line and "the code reward cannot run: code cannot be confined here (unshare)" in line
    build_rewards({"code": 1}, allow_unconfined_code=True)


@pytest.mark.parametrize("weights", [{}, {"math": 0.0}])
def test_no_reward_at_all_is_refused(weights):
    with pytest.raises(ValueError, match="no reward has a weight above 0"):
        build_rewards(weights)
