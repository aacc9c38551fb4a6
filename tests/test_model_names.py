"""Flags of the LLM that cannot be meant are told before anything loads, in one line each."""

from __future__ import annotations

import pytest

import host
from enhanced.tokenizer import reasoning_tokenizer
from tiny_runs import error_lines


@pytest.mark.parametrize(("name", "told"), [
    ("/no/such/none.gguf", "there is no such GGUF file: check the path"),
    ("none.gguf", "there is no such GGUF file: check the path"),
    ("/no/such/folder", "there is no such folder, and a name of the hub is OWNER/NAME: check the path"),
    ("./a/b/c", "there is no such folder, and a name of the hub is OWNER/NAME: check the path"),
])
def test_a_path_at_which_nothing_lies_is_no_name_of_the_hub(name, told):
    for load in (host.load_config, host.load_tokenizer, host.load_host):
        with pytest.raises(host.HostError) as error:
            load(name)
        assert str(error.value) == f"--model_name {name}: {told}"
    with pytest.raises(ValueError) as error:
        reasoning_tokenizer(name)
    assert str(error.value) == f"--tokenizer {name}: {told}"


def test_a_name_that_the_hub_may_have_is_asked_for():
    with pytest.raises(host.HostError, match="no/such: no such folder here, and the hub could not give it"):
        host.load_config("no/such")


def test_a_chat_template_beside_the_plain_style_is_refused_where_it_is_typed(call):
    status, _, err = call("--chat_template_kwargs", '{"a": 1}', "--prompt_style", "plain")
    assert status == 2
    assert error_lines(err) == ['--chat_template_kwargs {"a": 1} does nothing with --prompt_style plain: keep one']


def test_a_revision_of_a_folder_is_refused_where_it_is_typed(call, tiny_host):
    status, _, err = call("--revision", "v2")
    assert status == 2
    assert error_lines(err) == [f"--revision v2 does nothing with --model_name {tiny_host}, which lies on this "
                                "machine: leave it out, or name a model of the hub"]
