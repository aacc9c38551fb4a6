"""--chat_template: a file of no use is told by its own name."""

from __future__ import annotations

import pytest

from batching import PromptConfig, PromptFormat
from text_data.frames import template_text


@pytest.mark.parametrize(("text", "told"), [
    ("{{ nothing.there.at_all }}", "failed ('nothing' is undefined): correct it"),
    ("{% if %}", "failed (Expected an expression, got 'end of statement block'): correct it"),
    ("no question", "does not show the question once: write the content of each message"),
    (" \n", "is empty: give a Jinja file, or --prompt_style plain without it"),
])
def test_a_template_file_of_no_use_is_named(plain_tokenizer, tmp_path, text, told):
    file = tmp_path / "template.jinja"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        PromptFormat(plain_tokenizer, PromptConfig(chat_template=str(file)))
    assert str(error.value) == f"--chat_template {file} {told}"


def test_an_empty_file_is_told_before_a_tokenizer_loads(tmp_path):
    (tmp_path / "template.jinja").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="is empty"):
        template_text(str(tmp_path / "template.jinja"))
