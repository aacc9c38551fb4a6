"""One file made of several modules: what it takes, in which order, and what it refuses."""

from __future__ import annotations

import pytest

import single_file
from single_file import single_file as made

LOW = '''
import math as m
from collections import OrderedDict

LIMIT = 3  # why


def unused():
    return OrderedDict()


def low(x: float) -> float:
    # A comment inside.
    return m.floor(x) + LIMIT
'''
HIGH = '''
from __future__ import annotations

from below.low import low

TABLE = {"low": low}


class Base:
    """A class."""

    def run(self, x):
        return TABLE["low"](x)

    def train(self):
        """Only training calls it."""
        return helper()


class Model(Base):
    """Another."""


def helper():
    return 7
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes modules of a project: name -> text."""
    monkeypatch.setattr(single_file, "ROOT", tmp_path)

    def write(**texts: str) -> None:
        for name, text in texts.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return write


def test_the_file_holds_what_is_reached_in_an_order_that_runs(project):
    project(below__low=LOW, high=HIGH)
    text = made([("high", "Model")], "Title.", ["Base.train"])
    space = {"__name__": "made"}
    exec(compile(text, "made.py", "exec"), space)
    assert space["Model"]().run(2.5) == 5
    assert "# why" in text and "# A comment inside." in text and "import math as m" in text
    for absent in ("unused", "helper", "OrderedDict", "def train", "below.low"):
        assert absent not in text
    assert text.index("def low") < text.index("TABLE") < text.index("class Base") < text.index("class Model")


def test_what_is_left_out_must_be_there_and_not_be_called(project):
    project(below__low=LOW, high=HIGH)
    with pytest.raises(ValueError, match="Base.gone is to be left out, and nothing taken defines it"):
        made([("high", "Model")], "T", ["Base.gone"])
    project(high=HIGH.replace("return TABLE", "self.train()\n        return TABLE"))
    with pytest.raises(ValueError, match="Base.train is to be left out, and something taken still calls it"):
        made([("high", "Model")], "T", ["Base.train"])


@pytest.mark.parametrize("line,words", [
    ("from below.low import low as other", "imports below.low.low as other"),
    ("from below.low import *", "imports \\*"),
])
def test_imports_that_one_file_cannot_hold_are_refused(project, line, words):
    text = HIGH.replace("from below.low import low", line)
    project(below__low=LOW, high=text.replace('"low": low', '"low": other') if "other" in line else text)
    with pytest.raises(ValueError, match=words):
        made([("high", "Model")], "T")


def test_one_name_for_two_definitions_is_refused(project):
    project(high=HIGH, below__low="def helper():\n    return 3\n\n\ndef low(x):\n    return helper()\n")
    with pytest.raises(ValueError, match="helper is defined in"):
        made([("high", "Model")], "T")


def test_an_import_of_the_project_inside_a_function_is_refused(project):
    project(below__low=LOW, high=HIGH.replace("        return TABLE", "        from below.low import LIMIT\n"
                                              "        return LIMIT + TABLE"))
    with pytest.raises(ValueError, match="inside a function"):
        made([("high", "Model")], "T")


def test_a_name_that_a_module_only_hands_on_is_taken_from_where_it_is_defined(project):
    project(labels="IGNORE = -100\n", batches="from labels import IGNORE\n\nWIDE = 3\n",
            top="from batches import IGNORE, WIDE\nfrom labels import IGNORE as IGNORE\n\ndef both():\n"
                "    return IGNORE + WIDE\n")
    space: dict = {}
    text = made([("top", "both")], "Title.")
    exec(text, space)
    assert space["both"]() == -97 and text.count("IGNORE = -100") == 1
