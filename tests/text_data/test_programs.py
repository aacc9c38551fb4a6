"""text_data.programs: the program that a completion gives, whatever stands around it."""

from __future__ import annotations

import contextlib
import io
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text_data.programs import called_names, program_of

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ("assert add(1, 2) == 3",)
WRONG = ADD.replace("+", "-")
DOCUMENTED = '''def add(a, b):
    """Adds.

    ```
    add(1, 2)
    ```
    """
    return a + b
'''
STATE = """import sys

def add(a, b):
    return total[a] + b

total = {}
for n in range(9):
    total[n] = n
sys.setrecursionlimit(2000)
"""
# Completions that hold a right `add`.
RIGHT = {
    "plain": ADD,
    "fenced": f"```python\n{ADD}```",
    "prose around": f"Here it is:\n\n```python\n{ADD}```\nIt works:\n```\n3\n```",
    "no line end": f"```python\n{ADD.rstrip()}```",
    "no language": f"```\n{ADD}```",
    "unfinished": f"```py\n{ADD}",
    "capital": f"```Python\n{ADD}```",
    "attributes": f'```python title="a.py"\n{ADD}```',
    "braces": f"```{{python}}\n{ADD}```",
    "tildes": f"~~~python\n{ADD}~~~",
    "four": f"````python\n{ADD}````",
    "indented": textwrap.indent(f"```python\n{ADD}```", "  "),
    "in a list": "1. So:\n\n" + textwrap.indent(f"```python\n{ADD}```", "   "),
    "glued": "```python def add(a, b):\n    return a + b\n```",
    "glued without language": "```def add(a, b):\n    return a + b\n```",
    "behind prose": f"The code: ```python\n{ADD}```",
    "on one line": "```python def add(a, b): return a + b```",
    "lone closing fence": f"{ADD}```\nThis adds two numbers.\n",
    "lone closing fence, one word": f"{ADD}```\nDone\n",
    "lone glued fence": f"{ADD.rstrip()}```\nThis adds.",
    "bash first": f"```bash\npip install nothing\n```\n```python\n{ADD}```",
    "plan first": f"```\nreturn the sum\n```\nThen:\n```python\n{ADD}```",
    "output behind": f"```python\n{ADD}```\n```text\n3\n```\n```json\n[1]\n```",
    "fence in a docstring": f"```python\n{DOCUMENTED}```",
    "wrong, then corrected": f"```python\n{WRONG}```\nNo:\n```python\n{ADD}```",
    "helper before": "```python\nimport operator\nprint(operator)\n```\nThen:\n```python\n"
    "def add(a, b):\n    return operator.add(a, b)\n```",
    "use behind": f"```python\n{ADD}```\nUse it:\n```python\nprint(add(1, 2))\n```",
    "console": ">>> def add(a, b):\n...     return a + b\n...\n>>> add(1, 2)\n3\n",
    "code then prose": f"{ADD}\nThis function adds two numbers.",
    "code then question": f"{ADD}\n\nQuestion: another?\nAnswer: yes",
    "code then one word": f"{ADD}\nDone",
    "prose then code": f"Sure! The function is this one.\n\n{ADD}",
    "prose around code": f"Sure, here:\n\n{ADD}\nIt's what you need.",
    "cut in a second function": f"{ADD}\ndef helper(x):\n    return (x +",
    "cut in a second function, fenced": f"```python\n{ADD}\ndef helper(x):\n    return (x +",
    "line ends": ADD.replace("\n", "\r\n"),
    "leading space": f" {ADD}",
    "indented code": textwrap.indent(ADD, "    "),
    "byte order mark": f"\ufeff{ADD}",
    "language alone": f"python\n{ADD}",
    "input": f"{ADD}\nx = input()\nprint(add(int(x), 1))",
    "input first": f"n = int(input())\n{ADD}",
    "main": f"{ADD}\ndef main():\n    print(add(int(input()), 1))\n\nmain()",
    "main guard": f"{ADD}\nif __name__ == '__main__':\n    import sys\n    sys.exit(add(1, 2))",
    "exit": f"import sys\n{ADD}\nsys.exit(0)",
    "own wrong test": f"{ADD}\nassert add(1, 1) == 3",
    "state": STATE,
    "bound later": f"{WRONG.replace('add', 'other')}\nadd = lambda a, b: a + b",
    "attribute": "def add(a, b):\n    return a + b + add.start\n\nadd.start = 0",
    "decorated": f"import functools\n\n@functools.cache\n{ADD}",
    "marks of few shots": f"[BEGIN]\n{ADD}[DONE]\n",
    "language and file": f"```python:add.py\n{ADD}```",
    "language and colon": f"```python:\n{ADD}```",
    "quoted": textwrap.indent(f"```python\n{ADD}```", "> "),
    "console below code": f"```python\n{ADD}\n>>> add(1, 2)\n3\n```",
    "input of the arguments' names": f"{ADD}\na = int(input('a'))\nb = int(input('b'))\nprint(add(a, b))",
    "end of a turn": f"{ADD.rstrip()}<|im_end|>\n",
    "end of a turn at a body": "def add(a, b):\n    total = a + b\n    return total<|im_end|>",
    "end of a text": f"```python\n{ADD}```</s>\nadd",
    "helper behind": "```python\ndef add(a, b):\n    return _plus(a, b)\n```\nwith\n```python\n"
    "def _plus(a, b):\n    return a + b\n\nprint(_plus(1, 2))\n```",
    "code in one line of prose": "`add = lambda a, b: a + b`",
    "label": f"Code: {ADD}",
    "tags": f'<pre><code class="language-python">{ADD}</code></pre>',
    "narrow spaces": f"```python\n{ADD.replace('    ', chr(160) * 4)}```",
    "invisible spaces": f"```python\n\u200b{ADD}```",
    "own test run": f"import unittest\n\n{ADD}\nclass Case(unittest.TestCase):\n    pass\n\nunittest.main()",
    "indented block below prose": f"The function is:\n\n{textwrap.indent(ADD, '    ')}\nIt returns the sum.",
    "notebook": f"```python\n%matplotlib inline\n!pip install nothing\n{ADD}```",
    "sketch behind": f"```python\n{ADD}```\nIn general:\n```python\ndef add(*numbers):\n    ...\n```",
    "own test first": f"assert add(1, 2) == 3\n\n{ADD}",
    "attribute by name": "def add(a, b):\n    return a + b + add.start\n\nsetattr(add, 'start', 0)",
    "built by a call": "table = []\n\ndef add(a, b):\n    return table[a] + b\n\ndef build():\n"
    "    table.extend(range(9))\n\nbuild()\nprint(add(1, 2))",
    "global set by a call": "start = None\n\ndef add(a, b):\n    return start + a + b\n\ndef begin():\n"
    "    global start\n    start = 0\n\nbegin()",
    "package nobody has": f"import nobody_has_this as plt\n{ADD}",
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_program_is_found(name):
    scope: dict = {"__name__": "program"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program_of(RIGHT[name], TESTS), scope)  # noqa: S102 - our own texts
        exec(TESTS[0], scope)  # noqa: S102
    assert printed.getvalue() == "", "a demonstration was run"


@pytest.mark.parametrize("name", [name for name in RIGHT if name not in ("input", "input first", "main", "exit",
    "own wrong test", "input of the arguments' names",
    "own test first")])
def test_the_program_of_a_program_is_itself(name):
    code = program_of(RIGHT[name], TESTS)
    assert program_of(code, TESTS) == code


@pytest.mark.parametrize("text", [
    "The function adds one.", "", "# def add(a, b): return a + b", "def add(a, b) return a + b",
    "raise SystemExit(0)", "print(1)",
    "def other(a):\n    return a\n\nother(1)\n", "\ud800", "\x00", "(" * 1000, "x = '\ud800'"])
def test_a_text_without_the_function_comes_back_as_it_is(text):
    assert program_of(text, TESTS) == text


@pytest.mark.parametrize(("text", "code"), [
    ("```python\nx = 1\n```", "x = 1\n"), ("\n```\nx = 1\n```  \n", "x = 1\n"), ("x = 1\n", "x = 1\n"),
    ("```py\nx = 1\n", "x = 1\n"),
    ("```\ntext = '''one\n```\ntwo'''\n```", "text = '''one\n```\ntwo'''\n"), ("```bash\nls\n```\nx = 1", "x = 1")])
def test_without_tests_the_last_python_counts(text, code):
    assert program_of(text) == code


def test_names_that_tests_call():
    assert called_names(["assert add(1, x) == sum([y for y in z])", "import math\nassert math.isclose(f(), 1)"]) == {
        "add", "x", "z", "f"}
    assert called_names(["not python ("]) == set() and called_names(["assert sum(10, 15) == 6"]) == {"sum"}


@given(st.text(st.sampled_from(list("`~ \n>def():x=1'\"#")), max_size=60))
def test_any_text_gives_a_program_or_itself(text):
    assert isinstance(program_of(text, TESTS), str)
    assert isinstance(program_of(text), str)


@pytest.mark.parametrize("piece", ["```\n", "```python\n", "x = (\n", "def f(:\n", "'''\n", ">>> \n", "x=1;", "~~~ "])
def test_a_long_text_is_read_in_bounded_time(piece):
    long = piece * (20_000 // len(piece))
    assert isinstance(program_of(long, TESTS), str)
    assert isinstance(program_of(ADD + long, TESTS), str)
