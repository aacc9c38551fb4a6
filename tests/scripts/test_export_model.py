"""Exported folders: transformers reads them in a process without this repository and answers as we do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import export_model
import train
from addon.adapters import load_controller, saved_format
from apart import run_apart, text_of
from evaluation import Decoding, generate_texts
from export_card import card_text
from host import load_tokenizer
from hub_stand_in import Hub
from tiny_families import random_ids
from tiny_runs import ROOT, arguments, command, newest

QUESTION = "What is 64 + 76?"
TRAINED = ("--lr", "0.05", "--warmup_steps", "0", "--ema", "0", "--eval_n", "4", "--max_new_tokens", "6")
# Flags of HRM among the tiny run's are refused with other adapters unless they have their defaults.
NO_HRM = ("--d_h", "128", "--n_heads", "4", "--segments", "1", "--inner_T", "2")
RUNS = {
    "hrm": (),
    "grb": ("--injector", "grb", "--logit_bias_head", "--use_act", "--hrm_read", "all", "--state_mix", "sum"),
    "both": ("--lora_layers", "1", "--lora_rank", "2"),
    "bf16": ("--host_dtype", "bf16"),
    "mlp": ("--adapter", "mlp", "--segments", "1", "--inner_T", "2"),
    "prompt": ("--adapter", "prompt", "--virtual_tokens", "3", "--max_seq_len", "128", *NO_HRM),
    "lora": ("--adapter", "lora", "--lora_rank", "2", *NO_HRM),
}
WHOLE = ("hrm", "both", "bf16", "prompt", "lora")  # those that are exported with the LLM's weights as well
EXPORTS = [*RUNS, *(f"{name}-whole" for name in WHOLE)]
PUSH = ("--merge_host", "--push", "user/name", "--device", "cpu")
READ = """
import json
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
for name, folder in json.loads(folders).items():
    # peft's folder does not say what the LLM is held in.
    dtype = torch.float32 if name == "lora" else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    assert not model.training
    ids = torch.tensor([[int(part) for part in question.split()]])
    prompt_mask = {"prompt_mask": torch.ones_like(ids)} if "HRM" in type(model).__name__ else {}
    with torch.no_grad():
        out[f"{name} logits"] = model(input_ids=ids, **prompt_mask).logits.float()
    out[f"{name} dtype"] = next(model.parameters()).new_zeros(1)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig.from_pretrained(folder)
    chat = [{"role": "user", "content": words}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = model.generate(asked.input_ids, attention_mask=asked.attention_mask, generation_config=config)
    answer = tokenizer.decode(told[0, asked.input_ids.shape[1]:], skip_special_tokens=True)
    out[f"{name} answer"] = answer.strip()

for name, folder in json.loads(folders).items():
    if name not in ("hrm", "hrm-whole", "prompt", "lora"):
        continue
    # transformers reads the generation config of a LoRA's LLM, not that of the LoRA's folder.
    how = {"generation_config": GenerationConfig.from_pretrained(folder)} if name == "lora" else {}
    pipe = pipeline("text-generation", folder, trust_remote_code=True, dtype=torch.float32)
    out[f"{name} pipeline"] = pipe(chat, return_full_text=False, **how)[0]["generated_text"].strip()
    code = open(folder + "/README.md").read().split("```python")[1].split("```")[0]
    space = {}
    exec(code.replace("'FOLDER'", repr(folder)).replace("'What is the capital of France?'", repr(words)), space)
    out[f"{name} card"] = space["answer"]
"""


@pytest.fixture(scope="module")
def runs(tiny_host, tmp_path_factory) -> dict[str, Path]:
    """Name -> the folder of a run of three steps."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.loop.draw_curve", lambda *anything: None)
        for name, flags in RUNS.items():
            assert train.main(arguments(tiny_host, place, *TRAINED, *flags, "--run_name", name)) == 0
    return {name: place / name for name in RUNS}


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory) -> dict[str, Path]:
    """Name -> exported folder."""
    place = tmp_path_factory.mktemp("exported")
    for name in EXPORTS:
        run, _, whole = name.partition("-")
        more = ["--merge_host"] if whole else []
        assert export_model.main([str(runs[run]), "--to", str(place / name), "--device", "cpu", *more]) == 0
    return {name: place / name for name in EXPORTS}


@pytest.fixture(scope="module")
def read(folders, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What a process without this repository reads from all folders."""
    ids = " ".join(map(str, random_ids(1, 7)[0].tolist()))
    places = json.dumps({name: str(folder) for name, folder in folders.items()})
    return run_apart(READ, tmp_path_factory.mktemp("elsewhere"), folders=places, question=ids, words=QUESTION)


@pytest.fixture(scope="module")
def own(runs):
    """Name of a run -> (logits, answer) of our own controller."""
    found = {}
    for name, run in runs.items():
        model, record = load_controller(newest(run))
        ids = random_ids(1, 7)
        with torch.no_grad():
            logits = model(ids, prompt_mask=torch.ones_like(ids)).logits
        prompt, _ = saved_format(record, load_tokenizer(record["base_model_name_or_path"]), 320)
        found[name] = logits, generate_texts(model, prompt, [QUESTION], Decoding(max_new_tokens=6))[0]
    return found


@pytest.mark.parametrize("name", EXPORTS)
def test_a_process_without_this_repository_has_our_logits_and_answers(name, read, own):
    logits, answer = own[name.partition("-")[0]]
    merged_lora = name in ("both-whole", "lora-whole")  # a sum of weights rounds in another way than a sum of products
    torch.testing.assert_close(read[f"{name} logits"], logits, atol=1e-3 if merged_lora else 1e-5, rtol=1e-4)
    assert text_of(read[f"{name} answer"]) == answer


@pytest.mark.parametrize("name", ["hrm", "hrm-whole", "prompt", "lora"])
def test_a_pipeline_and_the_code_of_the_card_give_our_answers(name, read, own):
    _, answer = own[name.partition("-")[0]]
    assert text_of(read[f"{name} pipeline"]) == answer
    assert text_of(read[f"{name} card"]) == answer


SPREAD = """
from transformers import AutoModelForCausalLM
ids = torch.tensor([[int(part) for part in question.split()]])
for name, how in (("whole", {}), ("spread", {"device_map": "auto", "max_memory": {"cpu": 1}})):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how)
    out[f"{name} stand-ins"] = torch.tensor(sum(parameter.is_meta for parameter in model.parameters()))
    out[f"{name} answer"] = model.generate(ids, max_new_tokens=6)
"""


def test_an_llm_on_the_disk_is_exported_and_read_as_one_in_memory(runs, folders, tmp_path, capsys):
    spread = ["--device_map", "auto", "--max_memory", '{"cpu": 1}', "--device", "cpu"]
    assert export_model.main([str(runs["hrm"]), "--to", str(tmp_path / "hrm"), *spread]) == 0
    for path in folders["hrm"].iterdir():
        assert (tmp_path / "hrm" / path.name).read_bytes() == path.read_bytes(), path.name

    ids = " ".join(map(str, random_ids(1, 7)[0].tolist()))
    read = run_apart(SPREAD, tmp_path, folder=str(tmp_path / "hrm"), question=ids)
    assert int(read["spread stand-ins"]) > int(read["whole stand-ins"]) == 0
    assert torch.equal(read["whole answer"], read["spread answer"])

    with pytest.raises(SystemExit):
        export_model.main([str(runs["hrm"]), "--to", str(tmp_path / "merged"), "--merge_host", *spread])
    assert "--merge_host reads the LLM as a whole" in capsys.readouterr().err


def test_the_llm_is_held_as_in_training(read):
    assert read["bf16 dtype"].dtype == read["bf16-whole dtype"].dtype == torch.bfloat16
    assert read["hrm dtype"].dtype == torch.float32


def test_the_adapters_change_the_answers(own, tiny_host):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(tiny_host)(random_ids(1, 7)).logits
    assert [name for name, (logits, _) in own.items() if torch.allclose(logits, bare, atol=1e-2)] == []


@pytest.mark.parametrize("name", EXPORTS)
def test_a_folder_holds_what_it_needs_and_no_path_of_the_training_machine(name, folders, tiny_host):
    folder = folders[name]
    files = {path.name for path in folder.iterdir()}
    assert {"README.md", "generation_config.json", "tokenizer.json"} <= files
    code = [file for file in files if file.endswith(".py")]
    assert len(code) == (0 if name.startswith("lora") else 1)
    assert ("adapter_config.json" in files) == (name == "lora")
    if name.endswith("-whole"):
        texts = [path.read_text(encoding="utf-8") for path in folder.iterdir() if path.suffix != ".safetensors"]
        assert not [text for text in texts if str(tiny_host.parent) in text or str(ROOT) in text]


def test_the_generated_file_is_whole_and_asks_for_no_package_without_need(folders):
    from transformers.dynamic_module_utils import get_imports

    for name, needs in (("hrm", {"einops"}), ("prompt", set())):
        (path,) = folders[name].glob("*.py")
        packages = set(get_imports(path)) & {"einops", "peft", "bitsandbytes", "accelerate", "reasoning_gym"}
        assert packages == needs
        assert not [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("from host")]


def test_a_record_and_a_card_name_the_precision_of_the_measurement(tiny_host, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.loop.draw_curve", lambda *anything: None)
    flags = ("--mixed_precision", "bf16", "--run_name", "bf16", *TRAINED)
    assert train.main(arguments(tiny_host, tmp_path, *flags)) == 0
    source = export_model.load(export_model.parse([str(tmp_path / "bf16"), "--to", str(tmp_path / "new")]))
    assert source.record["mixed_precision"] == "bf16"
    assert "bf16 autocast; this folder computes it in float32" in card_text(source)


def test_the_card_tells_rates_seeds_command_and_what_breaks(folders, runs):
    card = ModelCard.load(folders["hrm"] / "README.md")
    assert card.data.library_name == "transformers" and "peft" not in card.data.tags
    results = {result.metric_type: result for result in card.data.eval_results}
    assert "solved" in results and all("n = 4" in result.metric_name for result in results.values())
    row = re.search(r"\| toy_add \| solved \| 4 \| [\d.]+ % \| [\d.]+ % \[[\d.]+, [\d.]+\] \|", card.text)
    assert row and "seed 0" in card.text and "1000000000 for the items" in card.text
    assert "autocast" not in card.text
    assert "python train.py --model_name tiny_host" in card.text and "--task toy_add" in card.text
    assert "What it does to other prompts" in card.text and card.text.count("capital of France") == 2
    assert ModelCard.load(folders["lora"] / "README.md").data.library_name == "peft"
    assert ModelCard.load(folders["lora-whole"] / "README.md").data.library_name == "transformers"


def test_another_llm_under_the_same_name_is_refused(folders, tmp_path, tiny_host):
    import shutil

    from transformers import AutoModelForCausalLM

    other = shutil.copytree(tiny_host, tmp_path / "other")
    changed = AutoModelForCausalLM.from_pretrained(tiny_host)
    with torch.no_grad():
        changed.get_input_embeddings().weight.add_(1)
    changed.save_pretrained(other)
    folder = shutil.copytree(folders["hrm"], tmp_path / "hrm")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"base_model_name": str(other)}), encoding="utf-8")
    with pytest.raises(ValueError, match="trained on another .*head_digest"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_an_llm_in_4_bits_is_loaded_in_4_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.loop.draw_curve", lambda *anything: None)
    shipped = ROOT / "assets" / "tiny_host"
    flags = ("--load_in", "4bit", "--run_name", "packed", *TRAINED)
    assert train.main(arguments(shipped, tmp_path / "runs", *flags)) == 0
    run = tmp_path / "runs" / "packed"
    to = tmp_path / "packed"
    with pytest.raises(ValueError, match="packed in 4bit: leave --merge_host out"):
        export_model.main([str(run), "--to", str(to), "--merge_host", "--device", "cpu"])
    assert export_model.main([str(run), "--to", str(to), "--device", "cpu"]) == 0

    from transformers import AutoModelForCausalLM

    ids = random_ids(1, 7)
    theirs = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True)
    ours, _ = load_controller(newest(run))
    assert theirs.host.is_loaded_in_4bit
    with torch.no_grad():
        mask = torch.ones_like(ids)
        torch.testing.assert_close(theirs(ids, prompt_mask=mask).logits, ours(ids, prompt_mask=mask).logits)


# --- the user's mistakes


def error_of(*argv: str) -> str:
    """The message that ends the command."""
    with pytest.raises(ValueError) as error:
        export_model.main([*argv, "--device", "cpu"])
    return str(error.value)


def test_mistakes_are_told_before_anything_is_written(runs, tmp_path, capsys):
    to = tmp_path / "new"
    assert "does not exist" in error_of("no/such/run", "--to", str(to))
    hybrid = ROOT / "tests" / "fixtures" / "old_checkpoints" / "hybrid"
    assert "holds no add-on" in error_of(str(hybrid), "--to", str(to))
    assert "add --merge_host" in error_of(str(runs["hrm"]), "--to", str(to), "--push", "user/name")
    for more, words in ((["--private"], "add --push"), (["--push", "a b/c"], "--push a b/c")):
        with pytest.raises(SystemExit) as stop:
            export_model.main([str(runs["hrm"]), "--to", str(to), *more])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not to.exists()

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit):
        export_model.main([str(runs["hrm"]), "--to", str(tmp_path / "full")])
    assert "exists already" in capsys.readouterr().err


THEIRS = """
from transformers import LlamaConfig, LlamaForCausalLM

class TheirConfig(LlamaConfig):
    model_type = "theirs"

class TheirLm(LlamaForCausalLM):
    config_class = TheirConfig
"""


@pytest.fixture
def their_host(tiny_host, tmp_path) -> Path:
    """The tiny LLM as a folder whose classes are code that lies beside its weights."""
    host = tmp_path / "theirs"
    shutil.copytree(tiny_host, host)
    config = json.loads((host / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirLm"}
    config |= {"model_type": "theirs", "architectures": ["TheirLm"], "auto_map": classes}
    (host / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (host / "theirs.py").write_text(THEIRS, encoding="utf-8")
    return host


def test_an_llm_with_code_of_its_own_is_exported_only_where_it_is_trusted(their_host, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("engine.loop.draw_curve", lambda *anything: None)
    lora, hrm = tmp_path / "runs" / "lora", tmp_path / "runs" / "hrm"
    for run in (lora, hrm):
        words = arguments(their_host, tmp_path / "runs", *TRAINED, *RUNS[run.name], "--run_name", run.name)
        assert train.main([*words, "--trust_remote_code"]) == 0

    to = tmp_path / "exported"
    assert "add --trust_remote_code" in error_of(str(lora), "--to", str(to))
    refused = error_of(str(hrm), "--to", str(to), "--trust_remote_code")
    assert "brings its own Python code" in refused and not to.exists()

    # peft's folder names the LLM, a merged one holds its code as well; the card says what both need.
    assert export_model.main([str(lora), "--to", str(to), "--device", "cpu", "--trust_remote_code"]) == 0
    whole = tmp_path / "whole"
    merge = ["--merge_host", "--trust_remote_code", "--device", "cpu"]
    assert export_model.main([str(lora), "--to", str(whole), *merge]) == 0
    assert (whole / "theirs.py").is_file()
    ids = random_ids(1, 7)
    with torch.no_grad():
        own = load_controller(newest(lora), trust_remote_code=True)[0](ids, prompt_mask=torch.ones_like(ids)).logits
        for folder in (to, whole):
            theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
            torch.testing.assert_close(theirs(ids).logits, own, atol=1e-3, rtol=1e-4)
            assert "trust_remote_code=True" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_failure_leaves_nothing_behind(runs, tmp_path, monkeypatch):
    def broken(*anything):
        raise OSError(28, "No space left on device", "here")

    monkeypatch.setattr(export_model, "write_code", broken)
    with pytest.raises(OSError, match="No space left"):
        export_model.main([str(runs["hrm"]), "--to", str(tmp_path / "new"), "--device", "cpu"])
    assert list(tmp_path.iterdir()) == []


# --- the hub


def test_a_folder_is_pushed_whole(runs, tmp_path):
    with Hub() as hub:
        argv = (str(runs["hrm"]), "--to", str(tmp_path / "new"), *PUSH)
        process = command(*argv, script="scripts/export_model.py", HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0",
                          HF_TOKEN="hf_of_a_test", HF_HOME=str(tmp_path / "hf_home"))
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"pushed: {hub.address}/user/name" in out
    assert hub.repositories == {"user/name"} and hub.tokens == {"Bearer hf_of_a_test"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert hub.files == written and "README.md" in written and "config.json" in written


def test_a_hub_that_refuses_leaves_the_folder_here(runs, tmp_path):
    with Hub(refuses=True) as hub:
        argv = (str(runs["lora"]), "--to", str(tmp_path / "new"), *PUSH)
        process = command(*argv, script="scripts/export_model.py", HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0",
                          HF_TOKEN="hf_of_a_test", HF_HOME=str(tmp_path / "hf_home"))
        _, err = process.communicate()
    assert process.returncode == 2 and "the hub did not take the folder" in err and "Traceback" not in err
    assert (tmp_path / "new" / "model.safetensors").is_file()
