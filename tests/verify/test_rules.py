"""The strict rules: what satisfied a scorer without answering is refused, and what is right in another form is not."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

import reasoning_gym_wrapper as rg
from grpo.rewards import item_text, read_item
from reasoning_gym_wrapper import Example, Task
from tasks.built_in import BUILT_IN
from tasks.limits import JudgeConfig
from tasks.plugins import PLUGINS
from verify.judge import Verdict, gold_fails, is_full, rule_name, scored, verdict
from verify.table import RULES, strict

N = 5  # items of a task; the scorers' faults show on most of them
LOOSE = JudgeConfig(verifier_strict=False)
Attack = Callable[[Example], str]

# Items of tasks that take seconds to draw, or that need none.
BLANK = {"question": "q", "answer": None}
SOKOBAN = """+ + + + + +
+ * @ - X +
+ - - - - +
+ + + + + +
"""
MADE: dict[str, dict[str, Any]] = {
    "sokoban": BLANK | {"answer": "RR", "metadata": {"gamestr": SOKOBAN}},
    "puzzle24": BLANK | {"answer": "1*(7*4 - 4)", "metadata": {"numbers": [7, 4, 4, 1]}},
    "countdown": BLANK | {"answer": "40*(94 - 90) + 83 - 74",
                          "metadata": {"numbers": [83, 94, 74, 90, 40], "target": 169}},
    "rush_hour": BLANK | {"metadata": {"board_config": "o" * 12 + "AAooBo" + "ooooBo" + "o" * 12}},
    "boxnet": BLANK | {"metadata": {"initial_state": {
        "0.5_0.5": ["box_blue"], "0.5_1.5": [], "1.5_0.5": ["target_blue"], "1.5_1.5": []}}},
    "knight_swap": BLANK | {"answer": "No", "metadata": {"is_possible": False}},
    "group_anagrams": BLANK | {"answer": '[["lucks", "sculk"], ["davis", "divas"]]',
                               "metadata": {"solution": [["lucks", "sculk"], ["davis", "divas"]]}},
    "survo": BLANK | {"answer": "7 1 8\n2 3 5\n9 4 13",
                      "metadata": {"board_size": 3, "solution": [[7, 1, 8], [2, 3, 5], [9, 4, 13]]}},
}


@functools.cache
def task_of(name: str, strict: bool = True) -> Task:
    return Task(name, None, JudgeConfig(verifier_strict=strict))


@functools.cache
def drawn(name: str) -> list[Example]:
    task = task_of(name)
    if name in MADE:
        return [Example("q", MADE[name]["answer"], name, MADE[name], task)]
    return [example for _, example in itertools.islice(task.items(123), N)]


def first(name: str) -> Example:
    """One item, without the time that others take to draw."""
    return drawn(name)[0] if name in MADE else next(task_of(name).items(123))[1]


def loosely(example: Example, answer: str) -> Verdict:
    """The scorer's word alone."""
    return Example(example.question, example.target, example.task, example.entry, task_of(example.task, False)).verify(
        answer
    )


def facts(example: Example) -> dict[str, Any]:
    return example.entry["metadata"]


def other(example: Example) -> str:
    """A wrong answer: the gold of another item."""
    return next(item.target for item in drawn(example.task) if item.target != example.target)


def followed(mark: str) -> Attack:
    return lambda example: example.target + mark + other(example)


def constant(text: str) -> Attack:
    return lambda example: text


def not_gold(example: Example) -> str:
    return f"not {example.target}"


def joined(sign: str) -> Attack:
    def attack(example: Example) -> str:
        first, second = facts(example)["premises"][:2]
        return f"({first}) {sign} ({second})"

    return attack


def more_digits(example: Example) -> str:
    return re.sub(r"(\.\d\d\d?)\b", r"\g<1>04", example.target)


def rounded(example: Example) -> str:
    return f"{float(example.target):.3f}"


def off_by_half(example: Example) -> str:
    numbers = json.loads(example.target.replace("'", '"'))
    return json.dumps([str(round(float(number) + 0.4, 2)) for number in numbers])


def halves(example: Example) -> str:
    """A matrix with every number one percent off."""
    return "\n".join(" ".join(f"{float(cell) * 1.009:.4f}" for cell in line.split()) for line in
                     example.target.splitlines())


# --- what scorers take for an answer ----------------------------------------------------------------------------------

FAULTS: list[tuple[str, str, Attack]] = [
    ("coin_flip", "a prefix", constant("0")),
    ("coin_flip", "a longer prefix", lambda example: example.target[:3]),
    ("complex_arithmetic", "NaN", constant("nan")),
    ("puzzle24", "other numbers", constant("6*4*1*1")),
    ("puzzle24", "a fraction more", constant("10*9/4 + 2")),
    *[("propositional_logic", f"premises joined by {sign}", joined(sign)) for sign in "∧∨→↔"],
    ("propositional_logic", "a premise and nothing said", lambda e: f"({facts(e)['premises'][0]}) ∧ (P ∨ ¬P)"),
    ("string_insertion", "nothing", constant("[]")),
    ("string_insertion", "a list", lambda e: str(list(e.target))),
    ("decimal_arithmetic", "a digit more than asked for", lambda e: f"{e.target}{'0' * 12}4"),
    ("advanced_geometry", "a digit more than asked for", more_digits),
    ("letter_jumble", "another style", lambda e: e.target.swapcase()),
    ("polynomial_multiplication", "a comment", lambda e: f"{e.target} # or x"),
    ("word_sorting", "one word more", followed(", ")),
    ("gsm_symbolic", "another number behind", followed(" or ")),
    ("gsm_symbolic", "the wrong sign", lambda example: f"-{example.target}"),
    ("gsm_symbolic", "not", not_gold),
    ("letter_jumble", "more words", followed(" ")),
    ("fraction_simplification", "another behind", followed(" or ")),
    ("time_intervals", "another behind", followed(", ")),
    ("spell_backward", "more letters", followed(" ")),
    ("decimal_arithmetic", "three decimals", rounded),
    ("knights_knaves", "not", not_gold),
    ("knights_knaves", "both ways", lambda example: f"{example.target} or not"),
    ("sokoban", "not", not_gold),
    ("sokoban", "another behind", lambda example: f"{example.target}\nD"),
    ("kakurasu", "not", not_gold),
    ("survo", "not", not_gold),
    ("quantum_lock", "not", not_gold),
    ("tower_of_hanoi", "a bullet", lambda example: f"-{example.target}"),
    ("game_of_life_halting", "anything", constant("perhaps")),
    ("game_of_life", "one row more", lambda example: f"{example.target[:-1]},[1,1]]"),
    ("number_sorting", "other numbers", off_by_half),
    ("pool_matrix", "one percent off", halves),
    ("number_format", "no candidate", lambda example: f"{float(example.target) + 0.008}"),
    ("cryptarithm", "a letter twice", lambda example: re.sub(r"^(\w)=(\d)", r"\1=0,\1=\2", example.target)),
    ("polynomial_equations", "words for no root", lambda example: f"{example.target}, or none"),
    ("graph_color", "a vertex twice", lambda example: f"{colors_text(example)[:-1]}, {colors_text(example)[1:]}"),
    ("rush_hour", "moves that cannot be made", constant("B+5 B+5 A-3 A+5")),
    ("rush_hour", "words between", constant("first B+2 then A+4")),
    ("boxnet", "moves of boxes that are not there", lambda example: plans("box_red", "box_blue")),
    ("knight_swap", "no with a reason", constant("no way")),
    ("prime_factorization", "a sign too many", lambda example: f"{example.target} ×"),
]


def colors(example: Example) -> dict[str, int]:
    return {str(vertex): color for vertex, color in facts(example)["possible_answer"].items()}


def colors_text(example: Example) -> str:
    return json.dumps(colors(example))


def plans(*boxes: str) -> str:
    """The same walk for each of the boxes."""
    steps = []
    for box in boxes:
        steps.append({"Agent[0.5, 0.5]": f"move({box}, square[1.5, 0.5])"})
        steps.append({"Agent[1.5, 0.5]": f"move({box}, target_{box[4:]})"})
    return json.dumps(steps)


@pytest.mark.parametrize(("name", "what", "attack"), FAULTS, ids=[f"{name}-{what}" for name, what, _ in FAULTS])
def test_what_answers_nothing_is_refused_whatever_the_scorer_says(name, what, attack):
    fooled = 0
    for example in drawn(name):
        answer = attack(example)
        if example.target is not None and answer.strip() == example.target:
            continue
        fooled += is_full(loosely(example, answer).score)
        strictly = example.verify(answer)
        assert not strictly.solved, (answer, example.target)
        assert strictly.reward < 1.0
    expected = what not in ("nothing", "no with a reason", "a list", "a letter twice")
    assert fooled or not expected, "the scorer is not fooled: the attack shows nothing"


@pytest.mark.parametrize("name", ["simple_integration", "intermediate_integration"])
@pytest.mark.parametrize("form", ["Integral({f}, {x})", "integrate({f}, {x})", "nan", "{x}*0 + Integral({f}, {x}) + C",
                                  "diff({f}, {x})", "({f})._integral()", "9**9**9**9", "exit()"])
def test_an_integral_is_solved_by_a_function_alone(name, form):
    for example in drawn(name)[:1]:
        answer = form.replace("{f}", facts(example)["integrand"]).replace("{x}", facts(example)["variable"])
        assert example.verify(answer) == Verdict(0.0)  # the scorer is not asked: it would evaluate the text


@pytest.mark.parametrize("more", [" + 1/0", " + log(0)", " + tan(pi/2)", " + 1/(1 - 1)", " # or x", "7"])
def test_an_integral_is_finite_and_stands_alone(more):
    example = drawn("simple_integration")[0]
    assert loosely(example, example.target + more).solved and not example.verify(example.target + more).solved


def test_the_given_string_is_right_only_where_nothing_is_inserted():
    examples = [example for _, example in itertools.islice(task_of("string_insertion").items(123), 200)]
    right = [facts(example)["string"] == example.target for example in examples]
    assert [example.verify(facts(example)["string"]).solved for example in examples] == right
    assert not all(right)


def test_an_unsolved_integral_satisfied_the_scorer():
    example = drawn("simple_integration")[0]
    answer = f"Integral({facts(example)['integrand']}, {facts(example)['variable']})"
    assert loosely(example, answer).solved and not example.verify(answer).solved


NOISE = ["0", "1", "-1", "nan", "inf", "-inf", "True", "x", "[]", "{}", "()", "None", "1e999999999", "a" * 60_000,
         "((((", "\u0661", "1_0", "9**9**9**9**9", "__import__('os')", "¬¬", "U999999999", "A+999999999", "0x"]


SLOW = {"acre", "arc_agi", "codeio", "figlet_font", "futoshiki", "rearc", "zebra_puzzles"}  # to draw


@pytest.mark.parametrize("name", sorted(set(RULES) - SLOW))
def test_no_constant_is_right_unless_it_is_the_answer(name):
    example = first(name)
    for text in NOISE:
        if example.verify(text).solved:
            assert text == example.target or float(text) == float(example.target), text


# --- right answers in another form ------------------------------------------------------------------------------------

SPACED: list[tuple[str, str, str]] = [  # task, what stands in the gold, what may stand there as well
    ("word_sorting", ", ", ","),
    ("list_functions", " ", ""),
    ("string_splitting", " ", "  "),
    ("mini_sudoku", "\n", " \n"),
    ("rotate_matrix", "\n", " \n\n"),
    ("dice", "/", " / "),
    ("number_filtering", "'", ""),
    ("survo", " ", "   "),
    ("path_star", " ", "\n"),
    ("word_sequence_reversal", ", ", " ,  "),
]


def replaced(old: str, new: str) -> Attack:
    return lambda example: example.target.replace(old, new)


RIGHT: list[tuple[str, str, Attack]] = [
    *[(name, "other whitespace", replaced(old, new)) for name, old, new in SPACED],
    ("coin_flip", "the fraction", lambda e: "{numerator}/{denominator}".format(**facts(e)["rational"])),
    ("coin_flip", "five decimals", lambda e: f"{float(e.target):.5f}"),
    ("complex_arithmetic", "without decimals", lambda e: e.target.replace(".00", "").replace(".0", "")),
    ("complex_arithmetic", "in brackets", lambda e: f"({e.target.replace(' ', '').replace('i', 'j')})"),
    ("puzzle24", "another order", constant("(7 * 4 - 4) / 1")),
    ("puzzle24", "a minus before", constant("-4 + 7*4*1")),
    ("countdown", "another order", constant("83 - 74 + (94 - 90) * 40")),
    ("simple_integration", "another constant", lambda e: e.target.replace("+ C", "+ 5")),
    *[("simple_integration", f"+ {name}", lambda e, name=name: e.target.replace("+ C", f"+ {name}"))
      for name in ("C1", "C_1", "c", "c_2", "K", "D", "const")],
    ("polynomial_multiplication", "in brackets", lambda e: f"({e.target})"),
    ("gsm_symbolic", "LaTeX", lambda e: f"${e.target}$"),
    ("simple_integration", "no constant", lambda e: e.target.replace(" + C", "")),
    ("simple_integration", "the constant first", lambda e: "K + " + e.target.replace(" + C", "")),
    ("polynomial_multiplication", "the other way round", lambda e: reversed_sum(e.target)),
    ("lcm", "commas", lambda e: f"{int(e.target):,}"),
    ("products", "commas and decimals", lambda e: f"{int(e.target):,}.00"),
    ("decimal_chain_sum", "a zero more", lambda e: e.target + ("0" if "." in e.target else ".0")),
    ("decimal_arithmetic", "a zero more", lambda e: e.target + ("0" if "." in e.target else ".0")),
    ("chain_sum", "a plus", lambda e: e.target if e.target.startswith("-") else f"+{e.target}"),
    ("fraction_simplification", "plain",
     lambda e: f"{facts(e)['simplified_numerator']}/{facts(e)['simplified_denominator']}"),
    ("fraction_simplification", "LaTeX",
     lambda e: f"$\\frac{{{facts(e)['simplified_numerator']}}}{{{facts(e)['simplified_denominator']}}}$"),
    ("graph_color", "its own", colors_text),
    ("propositional_logic", "brackets and blanks", lambda e: f" ( {e.entry['metadata']['example_answer']} ) "),
    ("rubiks_cube", "another way", lambda e: facts(e)["example_correct_answer"]),
    ("rush_hour", "first make way", constant("B+2 A+4")),
    ("rush_hour", "one space at a time", constant("B+1, B+1, A+1, A+3")),
    ("boxnet", "over two squares", constant(plans("box_blue"))),
    ("sokoban", "another way", constant("DURR")),
    ("sokoban", "apart", constant("R R")),
    ("knight_swap", "no", constant("no")),
    ("cryptarithm", "another order", lambda e: ", ".join(reversed(e.target.split(",")))),
    ("quantum_lock", "arrows of ASCII", lambda e: e.target.replace("→", "->").lower()),
    ("kakurasu", "as lists", lambda e: "[" + e.target.replace(" ", ",").replace("\n", "\n,") + "]"),
    ("bitwise_arithmetic", "decimal", lambda e: str(int(e.target, 16))),
    ("number_sorting", "double quotes", lambda e: e.target.replace("'", '"')),
    ("knights_knaves", "the other way round", lambda e: ", and ".join(reversed(e.target.rstrip(".").split(", and ")))),
    ("calendar_arithmetic", "itself", lambda e: f" {e.target}\n"),
    ("palindrome_partitioning", "another order", lambda e: json.dumps(json.loads(e.target)[::-1])),
    ("group_anagrams", "another order", lambda e: json.dumps([group[::-1] for group in json.loads(e.target)][::-1])),
    ("color_cube_rotation", "capitals", lambda e: e.target.upper()),
    ("needle_haystack", "capitals", lambda e: e.target.upper()),
    ("time_intervals", "no zero before", lambda e: e.target.removeprefix("0")),
    ("power_function", "three digits", lambda e: f"{float(e.target):.2e}"),
    ("palindrome_generation", "another palindrome", lambda e: turned(e.target)),
    ("tower_of_hanoi", "blank lines", lambda e: e.target.replace("\n", "\n\n")),
]


def reversed_sum(text: str) -> str:
    """The terms of `a - b + c` in the other order."""
    terms = re.sub(r" ([+-]) ", r" \1", text).split(" ")
    return "".join(term if term[0] in "+-" else f"+{term}" for term in reversed(terms))


def turned(text: str) -> str:
    """A palindrome with the letters of its halves turned round."""
    half = len(text) // 2
    start = text[:half][::-1]
    return start + text[half : len(text) - half] + start[::-1]


@pytest.mark.parametrize(("name", "what", "form"), RIGHT, ids=[f"{name}-{what}" for name, what, _ in RIGHT])
def test_a_right_answer_in_another_form_is_solved(name, what, form):
    for example in drawn(name):
        assert example.verify(form(example)) == Verdict(1.0), (form(example), example.target)


def amount(gold: str) -> Example:
    entry = {"question": "How much?", "answer": gold, "metadata": {}}
    return Example("How much?", gold, "gsm_symbolic", entry, task_of("gsm_symbolic"))


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("1,234", ["1,234", "1234", "1234.0", "$1,234", " 1,234.00\n", "+1234"],
         ["1,23", "-1,234", "1,2345", "1234 5", "1"]),
        ("1234", ["1,234", "1234", "$1234"], ["12,34", "1 234", "2341", "1234, 5", "not 1234"]),
        ("-5", ["-5", "-$5", "$-5", "- 5", "\u22125", "-5.0"], ["5", "--5", "-5-5"]),
        ("0.5", ["0.5", ".5", "0.50"], ["5", "0,5", "-0.5"]),
        ("12,345,678", ["12345678", "12,345,678"], ["12,345", "12345,678", "12,345,678.5"]),
    ],
)
def test_amounts_may_have_commas_and_must_have_their_sign(gold, right, wrong):
    example = amount(gold)
    for text in right:
        assert example.verify(text) == Verdict(1.0), text
    for text in wrong:
        assert not example.verify(text).solved, text


@pytest.mark.parametrize(
    ("premises", "example", "right", "wrong"),
    [
        (["(P ∧ R)", "Q"], "(P ↔ R)", ["P ↔ R", "(R ↔ P)", "P → R", "P ∧ Q"],
         ["P ∧ R → Q", "Q ↔ (P ∧ R)", "Q ∧ (P ∨ ¬P)", "Q", "P ∧ R", "R ∧ P", "¬¬Q", "Q ∧ (P ∧ R)",
          "(P ∧ R ∧ Q)", "Q ∨ S", "P", "Q ∨ R", "P ∨ ¬P", "¬Q", "not P",
          ""]),
        (["(P → Q)", "P"], "(P ∧ Q)", ["P ∧ Q", "P ↔ Q"], ["P → Q", "(P → Q) ∧ P", "P", "Q ∨ P ∨ ¬P"]),
        (["(P ∨ Q)", "¬P", "(Q → R)"], "(R ∧ Q)", ["Q ∧ R", "¬P ∧ Q", "R ∨ (P ∧ Q)", "¬¬(Q ∧ R)"],
         ["Q ∨ P", "P ∨ Q ∨ R", "(P ∨ Q) ∧ ¬P", "(P ∨ Q) ↔ (Q → R)", "(Q → R) ∨ (P ∨ Q)", "¬P ∨ R",
          "(Q → R) → (P ∨ Q)"]),
    ],
)
def test_a_conclusion_must_look_into_a_premise(premises, example, right, wrong):
    variables = ["P", "Q", "R"]
    entry = BLANK | {"metadata": {"premises": premises, "variables": variables, "example_answer": example}}
    item = Example("q", None, "propositional_logic", entry, task_of("propositional_logic"))
    for text in right:
        assert item.verify(text).solved, text
    for text in wrong:
        assert not item.verify(text).solved, text


# --- the layer itself -------------------------------------------------------------------------------------------------


class Scorer:
    def __init__(self, score: Any):
        self.score = score
        self.seen: list[str] = []

    def score_answer(self, answer, entry):
        self.seen.append(answer)
        return self.score


def test_every_task_has_one_rule_and_says_its_name():
    tasks = set(rg.registry()) - set(BUILT_IN)
    assert tasks == set(RULES) and all(rule_name(name).strip() for name in tasks)
    assert rule_name("toy_add") == "the task's own scorer alone"
    with pytest.raises(ValueError, match="task lcm has two strict rules"):
        strict("lcm", name="another")(lambda answer, entry: True)


def test_an_item_that_came_as_text_is_judged_alike():
    for name in ("graph_color", "knights_knaves", "pool_matrix", "tower_of_hanoi", "coin_flip", "boxnet"):
        for example in drawn(name)[:2]:
            entry = read_item(item_text(example.entry))
            for text in (example.target or colors_text(drawn("graph_color")[0]), "nan", "not"):
                assert verdict(name, text, entry, task_of(name).scorer) == example.verify(text), name


def test_the_scorers_word_stays_and_a_full_one_is_refused_where_the_rule_says_no():
    entry = {"question": "q", "answer": "7", "metadata": {}}
    for score, refused in [(1, True), (0.999999999999, True), (1.0000000000000002, True), (0.5, False), (0, False)]:
        given = verdict("lcm", "8", entry, Scorer(score))
        assert given.refused == refused and not given.solved
        assert given.score == (1.0 if refused else score) and given.reward == (0.0 if refused else score)

    # What the rule accepts needs the scorer's word as well, which is asked about the gold as it is written.
    assert not verdict("lcm", "7.0", entry, Scorer(0.4)).solved
    asked = Scorer(1.0000000000000002)
    assert verdict("lcm", "7.0", entry, asked) == Verdict(1.0) and asked.seen == ["7"]


def test_without_strictness_the_scorer_alone_decides():
    entry = {"question": "q", "answer": "7", "metadata": {}}
    assert verdict("lcm", "8", entry, Scorer(1), LOOSE) == Verdict(1.0)
    assert verdict("lcm", "8", entry, Scorer(0.99999999999999), LOOSE) == Verdict(0.99999999999999)
    assert verdict("an_unknown_task", "8", entry, Scorer(1)) == Verdict(1.0)
    assert scored(Scorer(float("nan")), "8", entry, 0) == Verdict(0.0)


UNSAFE = {
    "puzzle24": "9**9**9**9", "countdown": "__import__('os').getpid()", "simple_integration": "exit()",
    "intermediate_integration": "9**9**9**9*x", "polynomial_multiplication": "factorial(10**9)",
    "string_insertion": "exit()", "binary_matrix": "[[0]*10**9]*10**9", "spiral_matrix": "quit()",
    "n_queens": "open('x', 'w')", "rubiks_cube": "U999999999", "rush_hour": "A+999999999", "coin_flip": "1e999999999",
    "power_function": "1e999999999",
}


@pytest.mark.parametrize(("name", "text"), UNSAFE.items())
def test_a_scorer_never_sees_what_it_would_run_or_count_for_ever(name, text):
    entry = {"question": "q", "answer": "x", "metadata": {"variable": "x"}}
    asked = Scorer(1.0)
    assert not verdict(name, text, entry, asked).solved and asked.seen == []


# --- items whose gold answer fails ------------------------------------------------------------------------------------


class Dozens:
    """A data set whose every third gold answer is one that its scorer does not take."""

    def __init__(self, config):
        self.seed = config.seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.seed + index
        gold = "No solution" if place % 3 == 0 else str(place)
        return {"question": f"{place}?", "answer": gold, "metadata": {"place": place}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(answer == str(entry["metadata"]["place"]))


@pytest.fixture
def dozens(monkeypatch):
    monkeypatch.setitem(PLUGINS, "dozens", (Dozens, rg.registry()["toy_add"][1]))
    return lambda strict: Task("dozens", None, JudgeConfig(verifier_strict=strict))


def taken(task: Task, count: int, start: int = 0) -> list[tuple[int, str]]:
    return [(index, example.target) for index, example in itertools.islice(task.items(100, start), count)]


def test_items_whose_gold_answer_fails_are_left_out_and_counted(dozens):
    task = dozens(True)
    assert taken(task, 4) == [(0, "100"), (1, "101"), (3, "103"), (4, "104")]
    assert len(task.left_out) == 1 and taken(task, 4) and len(task.left_out) == 1  # drawn again, counted once

    # The stream goes on from any index as if nothing had happened.
    assert taken(task, 3, 2) == taken(task, 5)[2:]
    assert taken(dozens(False), 4) == [(0, "100"), (1, "101"), (2, "No solution"), (3, "103")]


@pytest.mark.parametrize(
    ("name", "gold", "fails"),
    [
        ("jugs", "No solution", True),
        ("jugs", '["fill A"]', False),
        ("intermediate_integration", "3*Integral(x*sin(x), x) + C", True),
        ("intermediate_integration", "x*asin(3*x) + sqrt(1 - 9*x**2)/3 + C", False),
        ("gsm_symbolic", "1,234", False),
        ("gsm_symbolic", "-5", False),
        ("rubiks_cube", None, False),
        ("propositional_logic", None, False),
    ],
)
def test_a_gold_answer_fails_where_its_own_verifier_says_so(name, gold, fails):
    metadata = {"puzzle": {"jug_capacities": [3, 5], "target": 3}, "variable": "x", "premises": ["(P ∧ Q)"],
                "example_answer": "P"}
    entry = {"question": "q", "answer": gold, "metadata": metadata}
    assert gold_fails(name, entry, task_of(name).scorer) is fails


@pytest.mark.parametrize("example", ["P", "(P)", "¬¬P", "(P ∧ Q)", "(Q ∨ P)", "(P → Q)", "(P ↔ Q)", "((P ∧ Q) ∨ P)"])
def test_an_item_whose_only_example_repeats_premises_is_left_out(example):
    metadata = {"premises": ["P", "Q", "(Q → R)"], "variables": ["P", "Q", "R"], "example_answer": example}
    assert gold_fails("propositional_logic", BLANK | {"metadata": metadata}, Scorer(1.0))
    metadata["example_answer"] = "(Q ∧ R)"
    assert not gold_fails("propositional_logic", BLANK | {"metadata": metadata}, Scorer(1.0))


def test_a_premise_weakened_is_right_where_it_is_the_example_alone():
    metadata = {"premises": ["P", "Q"], "variables": ["P", "Q", "R"], "example_answer": "(P ∨ R)"}
    item = Example("q", None, "propositional_logic", BLANK | {"metadata": metadata}, task_of("propositional_logic"))
    assert item.verify("R ∨ P").solved
    assert not item.verify("R ∨ Q").solved and not item.verify("P ∧ (R ∨ ¬R)").solved
