"""Rules of the tasks that have one right text: equal to the gold answer but for harmless whitespace, case and commas.

Some scorers take a beginning of the gold answer, or go no further than its end. Equality knows neither.
"""

from __future__ import annotations

import re
from typing import Any

from verify.forms import from_json, items, lines, number, parts, rows, same_json, words
from verify.table import Entry, Shown, strict

CURRENCY = re.compile(r"(?<![\w.])[$€£¥]\s?(?=[-\u2212]?[0-9.])")

LITERAL = re.compile(r"""[\s\d\[\],'"A-EQ_]{1,5000}""", re.A)


def is_literal(answer: str, entry: Entry) -> bool:
    """Whether a text holds no more than lists of numbers and of the tasks' letters: its scorer runs it as Python."""
    return LITERAL.fullmatch(answer) is not None


@strict(
    "ab", "acre", "base_conversion", "bf", "caesar_cipher", "circuit_logic", "course_schedule", "emoji_mystery",
    "isomorphic_strings", "letter_jumble", "mahjong_puzzle", "path_star", "ransom_note", "string_manipulation",
    "string_splitting", "string_synthesis", "syllogism",
    name="the gold text", one_answer=True,
)
@strict("spiral_matrix", "string_insertion", name="the gold text", one_answer=True, readable=is_literal)
def same_words(answer: str, entry: Entry) -> bool:
    return words(answer) == words(entry["answer"])


@strict(
    "color_cube_rotation", "family_relationships", "game_of_life_halting", "sentence_reordering",
    "spell_backward", "tsumego", "zebra_puzzles",
    name="the gold text in any case", one_answer=True,
)
def same_words_in_any_case(answer: str, entry: Entry) -> bool:
    return words(answer.lower()) == words(entry["answer"].lower())


@strict("dice", "figlet_font", "needle_haystack", name="the gold text, case and spaces aside", one_answer=True)
def same_letters(answer: str, entry: Entry) -> bool:
    return "".join(words(answer.lower())) == "".join(words(entry["answer"].lower()))


@strict(
    "arc_1d", "arc_agi", "manipulate_matrix", "mini_sudoku", "modulo_grid", "rearc", "rotate_matrix",
    "sudoku", "survo",
    name="the gold grid", one_answer=True,
)
@strict("binary_matrix", name="the gold grid", one_answer=True, readable=is_literal)
def same_rows(answer: str, entry: Entry) -> bool:
    return rows(answer) == rows(entry["answer"])


@strict("futoshiki", name="the gold grid with its signs", one_answer=True)
def same_lines(answer: str, entry: Entry) -> bool:
    return lines(answer) == lines(entry["answer"])


@strict("n_queens", name="one of the right boards", readable=is_literal)
def one_of_the_boards(answer: str, entry: Entry) -> bool:
    return answer in entry["metadata"]["valid_answers"]


@strict(
    "aiw", "basic_arithmetic", "binary_alternation", "chain_sum", "count_bits", "count_primes", "decimal_chain_sum",
    "gcd", "largest_island", "lcm", "leg_counting", "letter_counting", "maze", "number_sequence", "products",
    "rectangle_count", "rotten_oranges", "self_reference", "simple_equations", "simple_geometry",
    name="one number, equal to the gold", one_answer=True,
)
def same_number(answer: str, entry: Entry) -> bool:
    return number(answer) == number(entry["answer"])


@strict("number_filtering", "number_sorting", name="a list of the gold numbers", one_answer=True)
def same_numbers(answer: str, entry: Entry) -> bool:
    return [number(item) for item in items(answer)] == [number(item) for item in items(entry["answer"])]


@strict("word_sequence_reversal", "word_sorting", name="the gold words, commas between", one_answer=True)
def same_list_of_words(answer: str, entry: Entry) -> bool:
    return parts(answer) == parts(entry["answer"])


@strict("game_of_life", "list_functions", name="a JSON list equal to the gold", one_answer=True)
def same_json_list(answer: str, entry: Entry) -> bool:
    return same_json(from_json(answer), from_json(entry["answer"]))


@strict("codeio", name="JSON equal to the gold, or its text", one_answer=True)
def same_value(answer: str, entry: Entry) -> bool:
    gold = entry["answer"].strip()
    return answer == gold or same_json(from_json(answer), from_json(gold))


@strict("group_anagrams", name="lists of the gold groups in any order", one_answer=True)
def same_groups(answer: str, entry: Entry) -> bool:
    return _groups(from_json(answer)) == _groups(entry["metadata"]["solution"])


@strict("palindrome_partitioning", name="lists of the gold partitions in any order, each once", one_answer=True)
def same_partitions(answer: str, entry: Entry) -> bool:
    gold = {tuple(part) for part in entry["metadata"]["solution"]}
    return sorted(map(tuple, from_json(answer))) == sorted(gold)


def _groups(value: Any) -> list[list[str]]:
    """Lists of words, both in order. Raises ValueError where the value is none."""
    if not isinstance(value, list) or not all(isinstance(group, list) for group in value):
        raise ValueError("not a list of lists")
    return sorted(sorted(group) for group in value)


def _plain_gold(entry: Entry) -> Shown:
    """A gold number without commas and sign: the scorer reads neither."""
    plain = entry["answer"].replace(",", "").lstrip("-")
    return plain, {**entry, "answer": plain}


@strict("gsm_symbolic", name="one number, equal to the gold; a currency sign may stand before it", one_answer=True,
        gold=_plain_gold)
def same_amount(answer: str, entry: Entry) -> bool:
    if len(answer) > 2 and answer[0] == answer[-1] == "$":  # LaTeX
        answer = answer[1:-1]
    amount = CURRENCY.sub("", answer, count=1)
    return number(amount) == number(entry["answer"])
