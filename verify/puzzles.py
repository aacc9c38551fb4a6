"""Rules of the puzzles with several right answers: the whole text is an answer, and every move of it can be made.

Their scorers find the goal state themselves; most pick what they understand out of any text, and pass over the rest.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from verify.forms import from_json, is_text_list, matched, words
from verify.table import Entry, strict, strict_form

CELLS = re.compile(r"[01\s,\[\]]{1,5000}")
WALK = re.compile(r"[LDUR]{1,20000}|[LDUR](?:,? [LDUR]){0,10000}")
PRESSES = re.compile(r"[A-Ca-c](?:\s*(?:→|->|,|\s)?\s*[A-Ca-c]){0,500}")
HANOI = re.compile(r"Move disk \d{1,3} from Peg \d{1,3} to Peg \d{1,3}\.?", re.A)
TURN = re.compile(r"[UDLRFBMESXYZxyz]w?'?[1-3]?'?")
MOST_TURNS = 2_000
SHIFT = re.compile(r"([A-Z])([+-])([1-5])")
MOST_SHIFTS = 500
POUR = re.compile(r"(?:fill|empty) [A-Z]|pour [A-Z]->[A-Z]")
KNIGHT = re.compile(r"[wB],[A-Z]\d{1,2},[A-Z]\d{1,2}", re.A)
LETTER = re.compile(r"([A-Z])\s*=\s*(\d)", re.A)
AGENT = re.compile(r"Agent\[(\d+\.\d+), ?(\d+\.\d+)\]", re.A)
MOVE = re.compile(r"move\((box_\w+), (?:(target_\w+)|square\[(\d+\.\d+), ?(\d+\.\d+)\])\)", re.A)
Board = dict[str, list[str]]


strict_form("kakurasu", CELLS, name="a grid of 0 and 1 alone")
strict_form("sokoban", WALK, name="the letters L, D, U and R alone")
strict_form("quantum_lock", PRESSES, name="buttons alone")


@strict("tower_of_hanoi", name="one move a line, nothing else")
def only_disks(answer: str, entry: Entry) -> bool:
    return all(HANOI.fullmatch(line.strip()) for line in answer.splitlines() if line.strip())


def are_turns(answer: str, entry: Entry) -> bool:
    """Whether a text is turns of a cube: the scorer repeats one as often as a number behind it says."""
    turns = words(answer)
    return len(turns) <= MOST_TURNS and all(TURN.fullmatch(turn) for turn in turns)


@strict("rubiks_cube", name="turns alone", readable=are_turns, floor=0.01)
def only_turns(answer: str, entry: Entry) -> bool:
    return are_turns(answer, entry)


def are_shifts(answer: str, entry: Entry) -> bool:
    """Whether a text is moves of cars: the scorer makes one as often as its number says."""
    shifts = words(answer.replace(",", " "))
    return 0 < len(shifts) <= MOST_SHIFTS and all(SHIFT.fullmatch(shift) for shift in shifts)


@strict("rush_hour", name="moves alone, each of which can be made", readable=are_shifts)
def possible_shifts(answer: str, entry: Entry) -> bool:
    if not are_shifts(answer, entry):
        return False
    from reasoning_gym.games.rush_hour import Board as Cars

    # One space after another: what a car cannot do leaves the board as it was.
    cars = Cars(entry["metadata"]["board_config"])
    for car, sign, spaces in SHIFT.findall(answer):
        for _ in range(int(spaces)):
            before = cars.board_str()
            cars.perform_moves(f"{car}{sign}1")
            if cars.board_str() == before:
                return False
    return True


@strict("jugs", name="a JSON list of moves alone")
def only_pours(answer: str, entry: Entry) -> bool:
    moves = from_json(answer)
    return is_text_list(moves) and all(POUR.fullmatch(move) for move in moves)


@strict("knight_swap", name="a JSON list of moves alone, or No")
def only_knights(answer: str, entry: Entry) -> bool:
    if answer.lower() == "no":
        return True
    moves = from_json(answer)
    return is_text_list(moves) and all(KNIGHT.fullmatch(move) for move in moves)


@strict("graph_color", name="a JSON map with one color for each vertex")
def one_color_each(answer: str, entry: Entry) -> bool:
    colors = from_json(answer)
    puzzle = entry["metadata"]["puzzle"]
    vertices = {str(vertex) for vertex in puzzle["vertices"]}
    return set(colors) == vertices and all(type(color) is int for color in colors.values())


@strict("cryptarithm", name="one digit for each letter, once")
def one_digit_each(answer: str, entry: Entry) -> bool:
    pairs = [matched(LETTER, pair.strip()) for pair in answer.split(",")]
    letters = [pair[1] for pair in pairs]
    return sorted(letters) == sorted(entry["metadata"]["letters"])


@strict("shortest_path", name="directions alone, or infeasible")
def only_directions(answer: str, entry: Entry) -> bool:
    return answer == "infeasible" or set(words(answer)) <= {"up", "down", "left", "right"}


@strict("word_ladder", name="words alone, commas between")
def only_words(answer: str, entry: Entry) -> bool:
    return all(word.strip().isalpha() for word in answer.split(","))


@strict("palindrome_generation", name="the given letters alone")
def only_letters(answer: str, entry: Entry) -> bool:
    return sorted(answer.lower()) == sorted(entry["metadata"]["letters"])


@strict("boxnet", name="a JSON list of plans, each move of which can be made")
def possible_plans(answer: str, entry: Entry) -> bool:
    plans = from_json(answer)
    if not isinstance(plans, list):
        return False

    board = copy.deepcopy(entry["metadata"]["initial_state"])
    for plan in plans:
        for agent, action in plan.items():
            if not _moved(board, AGENT.fullmatch(agent), MOVE.fullmatch(action)):
                return False
    return True


def _moved(board: Board, agent: Any, move: Any) -> bool:
    """Makes one move on the board; False where it cannot be made. The arguments are matches of `AGENT` and `MOVE`."""
    x, y = agent.groups()
    box, target, to_x, to_y = move.groups()
    here = board[f"{x}_{y}"]
    if box not in here:
        return False

    # To a target in the same square, or to a square next to it.
    if target:
        if target not in here or target.removeprefix("target_") != box.removeprefix("box_"):
            return False
        here.remove(target)
    else:
        if abs(float(x) - float(to_x)) + abs(float(y) - float(to_y)) != 1:
            return False
        board[f"{to_x}_{to_y}"].append(box)
    here.remove(box)
    return True
