"""scripts/code_density.py: each count on a small source, and each limit seen failing."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import code_density
from code_density import ANCHORS, LEAST, MOST, RATES, Counts, beyond_limits, count, main, python_files

DENSE = '''
"""Ten code lines, no comment, nothing but what is counted."""


def dense(x, y):
    """Two lines
    of docstring."""
    a, b = x, y
    c = a if b else y
    d = [n for n in x]
    e = lambda: x
    f = sum(n for n in y)
    g = {n: 1 for n in y}
    h = {n for n in y}
    i, j = f(), g
    return c, d, e, h
'''
PLAIN = '''
# What a reader must know.
def plain(pairs):
    total = 0

    # Unpacking a call's result is no tuple assignment, and neither is a loop's.
    low, high = min(pairs), max(pairs)  # this one is
    first, second = divmod(low, 2)
    for left, right in pairs:
        total += left

    return total
'''


def measured(folder: Path, source: str) -> Counts:
    path = folder / "module.py"
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return count(path)


def test_each_node_is_counted_once(tmp_path):
    counts = measured(tmp_path, DENSE)
    assert (counts.tuple_assignments, counts.conditional_expressions, counts.lambdas) == (2, 1, 1)
    assert counts.comprehensions == 4  # a list, a generator, a dictionary, a set
    assert (counts.code_lines, counts.comments) == (10, 0)
    assert counts.rates() == {
        "tuple_assignments": 200, "conditional_expressions": 100, "comprehensions": 400, "lambdas": 100,
        "blank_percent": 0, "comments": 0,
    }


def test_blank_lines_count_inside_functions_and_comments_everywhere(tmp_path):
    counts = measured(tmp_path, PLAIN)
    assert counts.tuple_assignments == 1
    assert (counts.blank_lines, counts.function_lines, counts.comments) == (2, 10, 3)
    assert counts.code_lines == 7
    assert counts.rates()["blank_percent"] == 20
    assert counts.rates()["comments"] == pytest.approx(100 * 3 / 7)


def test_docstrings_and_inner_functions_are_counted_right(tmp_path):
    counts = measured(tmp_path, '''
    class Outer:
        """A docstring

        with a blank line and a # that is no comment."""

        def method(self):
            """Another

            one."""

            def inner():

                return "# no comment"
            return inner
    ''')
    assert counts.comments == 0
    assert counts.code_lines == 5
    assert (counts.function_lines, counts.blank_lines) == (6, 2)  # the inner function's lines count once


def test_nothing_has_rates_too(tmp_path):
    assert set(measured(tmp_path, "").rates().values()) == {0}
    assert Counts().rates().keys() == RATES.keys() == {*MOST, *LEAST}
    assert all(len(rates) == len(RATES) for rates in ANCHORS.values())


def test_counts_of_files_add_up(tmp_path):
    one = measured(tmp_path, DENSE)
    other = Counts(code_lines=1, comments=2, too_long=["x"])
    both = one + other
    assert (both.code_lines, both.comments, both.comprehensions) == (11, 2, 4)
    assert (one + other).too_long == ["x"] and one.too_long == []


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        (Counts(tuple_assignments=11), "tuple_assignments 11.0: at most 10"),
        (Counts(conditional_expressions=23), "conditional_expressions 23.0: at most 22"),
        (Counts(comprehensions=43), "comprehensions 43.0: at most 42"),
        (Counts(lambdas=5), "lambdas 5.0: at most 4"),
        (Counts(blank_lines=5), "blank_percent 5.0: at least 6"),
        (Counts(comments=69), "comments 6.9: at least 7"),
    ],
)
def test_each_rate_has_a_limit_that_can_fail(counts, line):
    within = Counts(code_lines=1000, comments=70, function_lines=100, blank_lines=6, tuple_assignments=10,
                    conditional_expressions=22, comprehensions=42, lambdas=4)
    assert beyond_limits(within) == []
    for name, value in vars(counts).items():
        if value:
            setattr(within, name, value)
    assert beyond_limits(within) == [line]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def long():\n" + "    pass\n" * 50, ["module.py:1: long has 51 lines, 50 are allowed"]),
        ("async def long():\n" + "    pass\n" * 50, ["module.py:1: long has 51 lines, 50 are allowed"]),
        ("def short():\n" + "    pass\n" * 49, []),
        ("class Long:\n" + "    x = 1\n" * 250, ["module.py:1: Long has 251 lines, 250 are allowed"]),
        ("x = 1\n" * 451, ["module.py: 451 lines, a module may have 450"]),
        ("x = 1\n" * 450, []),
    ],
)
def test_what_is_too_long_is_named(tmp_path, source, lines):
    assert measured(tmp_path, source).too_long == lines


def test_the_module_that_reads_better_whole_may_be_long(tmp_path, monkeypatch):
    monkeypatch.setattr(code_density, "ROOT", tmp_path)
    for name, too_long in (("model.py", False), ("other.py", True)):
        (tmp_path / name).write_text("x = 1\n" * 451, encoding="utf-8")
        assert bool(count(tmp_path / name).too_long) == too_long


def test_tests_and_hidden_folders_are_left_out_unless_named(tmp_path):
    for name in ("a.py", "tests/b.py", ".venv/c.py", "package/d.py", "package/tests/e.py", "package/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    names = [path.relative_to(tmp_path).as_posix() for path in python_files([tmp_path])]
    assert names == ["a.py", "package/d.py"]
    named = tmp_path / "tests" / "b.py"
    assert python_files([named]) == [named]


def test_the_command_prints_a_line_for_each_place_and_fails_only_where_it_checks(tmp_path, capsys):
    for name, source in (("one.py", DENSE), ("two.py", PLAIN)):
        (tmp_path / name).write_text(source, encoding="utf-8")
    places = [str(tmp_path / "one.py"), str(tmp_path / "two.py")]
    assert main(places) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["lines", "tuple", "cond", "compr", "lambda", "blank", "%", "comment"]
    assert [line.split()[:2] for line in lines[1:4]] == [["one.py", "10"], ["two.py", "7"], ["all", "17"]]
    assert re.search(r"^allowed +<= 10 +<= 22 +<= 42 +<= 4 +>= 6 +>= 7$", "\n".join(lines), re.MULTILINE)
    assert "comprehensions 235.3: at most 42" in lines

    assert main([*places, "--check"]) == 1
    capsys.readouterr()
    assert main([str(tmp_path), "--by_file"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]] == [
        f"{tmp_path.name}/one.py", f"{tmp_path.name}/two.py", "all"]


def test_a_place_that_is_not_there_is_the_users_mistake(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "no such file or folder" in capsys.readouterr().err
