"""Shared fixtures: a real Hugging Face Llama, tiny and random, with its tokenizer in a local folder; no network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports transformers: a test that reaches for the hub fails at once, here and in its subprocesses.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

# What tests type is not kept in the user's own list of trusted functions.
STATES = tempfile.TemporaryDirectory(prefix="hrm-states-")
os.environ["XDG_STATE_HOME"] = STATES.name

# A shared, slow machine must not make a property fail; the example count is what each test can afford. Every run draws
# the same examples, so that a red test is the fault of the change; `--hypothesis-profile search` looks for new ones.
SLOW = [HealthCheck.too_slow]
settings.register_profile("repo", deadline=None, max_examples=50, suppress_health_check=SLOW, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=50, suppress_health_check=SLOW)
settings.load_profile("repo")

SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CORPUS = [
    "State the final answer to the following arithmetic problem: 12 + 7 - 30 =",
    "Calculate 5 * 8. What is the answer? Ensure to report the answer as an integer.",
    "Solve this 4x4 Mini Sudoku puzzle:\n_ 1 _ 4\n2 _ 3 _\n",
]


def build_tokenizer():
    """Byte-level BPE of fewer than 400 tokens: digits split, pad/bos/eos, a chat template, padding on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    pad, bos, eos = SPECIAL[:3]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="module", autouse=True)
def no_task_is_left_behind():
    """A plugin's tasks end with the tests that loaded it: the tables of tasks are the process's own."""
    from tasks import plugins

    tables = [plugins.PLUGINS, plugins.LOADED, plugins.published_tasks()]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="session")
def tiny_host(tmp_path_factory) -> Path:
    """A folder as `save_pretrained` leaves it: random float32 Llama (width 32, 2 layers, 2 heads) and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,  # random logits far apart, so that greedy answers differ from prompt to prompt
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.float32).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder = tmp_path_factory.mktemp("host") / "tiny_host"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_host):
    """The tokenizer of `tiny_host`, loaded from its folder. Shared by all tests: do not change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_host)


@pytest.fixture
def plain_tokenizer(tiny_host):
    """The same tokenizer without a chat template; a copy of one's own."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_host)
    loaded.chat_template = None
    return loaded


@pytest.fixture
def no_curve(monkeypatch):
    """Runs of the add-on draw nothing: drawing takes longer than a tiny run."""
    monkeypatch.setattr("engine.loop.draw_curve", lambda *arguments: None)


@pytest.fixture
def call(tiny_host, tmp_path, capsys):
    """Runs train.py in this process on the tiny host, in `tmp_path/runs`: (exit status, stdout, stderr)."""
    import train
    from tiny_runs import arguments

    def run_here(*more: str) -> tuple[int, str, str]:
        status = train.main(arguments(tiny_host, tmp_path / "runs", *more))
        return status, *capsys.readouterr()
    return run_here
