"""text_data.fences: code inside Markdown fences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text_data.fences import first_block, without_outer_fence


@pytest.mark.parametrize("text", [
    "```python\ndef f():\n    return 1\n```", "Here:\n```python\ndef f():\n    return 1\n```\nIt works:\n```\n1\n```",
    "```\ndef f():\n    return 1\n```", "```py\ndef f():\n    return 1\n", "def f():\n    return 1\n",
    "  ```python3\ndef f():\n    return 1\n  ```"])
def test_fences_are_stripped(text):
    assert first_block(text) == "def f():\n    return 1\n"


@given(st.text(st.characters(exclude_characters="`\r", codec="ascii"), max_size=80), st.text("ab \n", max_size=10))
def test_fenced_code_comes_back_as_it_was(code, around):
    assert first_block(f"{around}\n```python\n{code}\n```\n{around}") == code + "\n"
    assert first_block(code) == code


@pytest.mark.parametrize(("text", "code"), [
    ("```python\nx = 1\n```", "x = 1\n"), ("\n```\nx = 1\n```  \n", "x = 1\n"), ("```py\nx = 1\n", "x = 1"),
    ("x = 1\n", "x = 1\n"), ("  x = 1\n```\n", "  x = 1\n```\n"), ("```x = 1```", ""),
    ("```\ntext = 'one\n```\ntwo'\n```", "text = 'one\n```\ntwo'\n")])
def test_only_the_fence_around_everything_goes(text, code):
    assert without_outer_fence(text) == code
