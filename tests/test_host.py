"""host: found, loaded, refused with one line; logits as the family makes them; LoRA in place; quantised loading."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import host as host_module
from addon.adapters import build_controller
from engine.past_tokens import check_cache
from host import (
    DEFAULT_HOST,
    ROOT,
    HostConfig,
    HostError,
    add_lora,
    check_logits,
    decoder_layers,
    freeze,
    host_logits,
    hub_unreachable,
    load_config,
    load_host,
    load_tokenizer,
    lora_layers,
    resolve_name,
    without_lora,
)
from model import HRMAddonConfig, HRMController
from patience import HANG_S
from tiny_families import FAMILIES, SCALED, left_padded, random_ids
from tiny_families import tiny_host as family_host


def refused(call, *words: str) -> str:
    with pytest.raises(HostError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, "one line for the user"
    for word in words:
        assert word in message, message
    return message


# --- finding and loading ----------------------------------------------------------------------------------------------


def test_a_local_folder_loads_frozen_and_in_evaluation_mode(tiny_host):
    host, tokenizer = load_host(str(tiny_host)), load_tokenizer(str(tiny_host))
    assert not host.training and not any(p.requires_grad for p in host.parameters())
    assert tokenizer.padding_side == "left" and load_config(str(tiny_host)).model_type == "llama"


def test_the_host_keeps_the_dtype_it_was_saved_in(tmp_path):
    family_host("llama").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_host(str(tmp_path)).parameters()} == {torch.bfloat16}


def test_a_name_is_a_folder_here_or_in_the_repository_or_left_alone(tiny_host, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_host.parent)
    assert resolve_name(tiny_host.name) == str(tiny_host.resolve())
    monkeypatch.setattr(host_module, "ROOT", tiny_host.parent)
    monkeypatch.chdir(tmp_path)
    assert resolve_name(tiny_host.name) == str(tiny_host.resolve())
    assert resolve_name("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"


@pytest.mark.parametrize("call", [load_config, load_host])
def test_an_unreachable_hub_is_one_line_with_the_local_default(call):
    refused(lambda: call("Qwen/Qwen2.5-1.5B"), "Qwen/Qwen2.5-1.5B", "hub", "assets/tiny_host")


def test_an_unreachable_hub_is_told_at_once(monkeypatch, caplog):
    """The hub's library would retry, aloud, for half a minute: one request is made in all, none of them its own."""
    import huggingface_hub
    from huggingface_hub import constants

    requests = []

    def send(client, request, **named):
        requests.append((str(request.url).rstrip("/"), request.extensions["timeout"]["connect"]))
        raise OSError("no route to the hub")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(type(huggingface_hub.get_session()), "send", send)  # all requests go through it
    hub_unreachable.cache_clear()
    try:
        assert hub_unreachable()
        refused(lambda: load_config("Qwen/Qwen2.5-1.5B"), "assets/tiny_host")
        refused(lambda: load_tokenizer("Qwen/Qwen2.5-1.5B"), "tokenizer")
        assert requests == [(constants.ENDPOINT, 5)] and "Retrying" not in caplog.text
    finally:
        hub_unreachable.cache_clear()


def test_a_reachable_hub_is_asked(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: types.SimpleNamespace(head=lambda *_, **__: None))
    hub_unreachable.cache_clear()
    try:
        assert not hub_unreachable() and not host_module._source("Qwen/Qwen2.5-1.5B", None)["local_files_only"]
    finally:
        hub_unreachable.cache_clear()


def test_an_impossible_name_is_one_line():
    refused(lambda: load_config("no such/name/at all"), "no such/name/at all", "OWNER/NAME", "check the path")


def test_a_folder_without_weights(tiny_host, tmp_path):
    shutil.copy(tiny_host / "config.json", tmp_path)
    refused(lambda: load_config(str(tmp_path)), str(tmp_path), "no weights")


def test_a_folder_without_config(tiny_host, tmp_path):
    shutil.copy(tiny_host / "model.safetensors", tmp_path)
    refused(lambda: load_config(str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize("keep", [0, 100, 2000], ids=["empty", "header", "tensors"])
def test_truncated_weights(tiny_host, tmp_path, keep):
    folder = shutil.copytree(tiny_host, tmp_path / "broken")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:keep])
    refused(lambda: load_host(str(folder)), str(folder), "cannot be loaded")


def test_weights_of_another_shape(tiny_host, tmp_path):
    folder = shutil.copytree(tiny_host, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}), encoding="utf-8")
    refused(lambda: load_host(str(folder)), str(folder))


def test_weights_that_lack_a_layer_are_not_made_up(tiny_host, tmp_path):
    folder = shutil.copytree(tiny_host, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    refused(lambda: load_host(str(folder)), str(folder), "layers.2")


def test_a_base_model_without_its_head_is_not_given_a_random_one(tmp_path):
    family_host("llama").model.save_pretrained(tmp_path)
    refused(lambda: load_host(str(tmp_path)), str(tmp_path), "lm_head.weight")


@pytest.mark.parametrize("family", FAMILIES + SCALED)
def test_each_family_loads_from_its_folder(family, tmp_path):
    host = family_host(family)
    host.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_host(str(tmp_path))(input_ids=random_ids(1, 5)).logits, host(random_ids(1, 5)).logits)


def test_an_encoder_decoder_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    refused(lambda: load_config(str(tmp_path)), "t5", "encoder-decoder", "causal LM")


def test_a_model_that_is_no_language_model(tmp_path):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
                       patch_size=4)).save_pretrained(tmp_path)
    refused(lambda: load_host(str(tmp_path)), str(tmp_path))


def test_a_broken_tokenizer(tiny_host, tmp_path):
    folder = shutil.copytree(tiny_host, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    refused(lambda: load_tokenizer(str(folder)), str(folder), "tokenizer")


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES + SCALED)
def test_logits_are_the_hosts_own(family):
    host, ids = family_host(family), random_ids(2, 7)
    with torch.no_grad():
        check_logits(host)
        own = host(input_ids=ids).logits
        ours = host_logits(host, host.base_model(input_ids=ids).last_hidden_state)
    assert torch.equal(own, ours)


@pytest.mark.parametrize("family", SCALED + ("gemma2",))
def test_the_families_with_scaling_do_scale(family):
    """Else the test above would hold for a `host_logits` without scaling."""
    host = family_host(family)
    hidden = torch.randn(1, 3, 32)
    assert not torch.allclose(host_logits(host, hidden), host.get_output_embeddings()(hidden), atol=0.1)


def test_a_family_that_does_something_unknown_to_its_logits_is_refused(monkeypatch):
    host = family_host("llama")
    original = host.forward

    def scaling(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    monkeypatch.setattr(host, "forward", scaling)
    refused(lambda: check_logits(host), "llama", "logits")


def test_loading_checks_the_logits(tiny_host, monkeypatch):
    monkeypatch.setattr(host_module, "host_logits", lambda host, hidden: host.get_output_embeddings()(hidden) / 2)
    refused(lambda: load_host(str(tiny_host)), "llama")


def test_logits_are_float32_and_untouched_by_autocast():
    host = family_host("llama").bfloat16()
    hidden = torch.randn(2, 32)
    expected = host_logits(host, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(host_logits(host, hidden), expected)
    assert expected.dtype == torch.float32
    full, hidden = family_host("llama"), torch.randn(2, 32)
    expected = host_logits(full, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(host_logits(full, hidden), expected)


def test_freeze_switches_gradient_and_dropout_off():
    host = family_host("gpt2", resid_pdrop=0.5).train().requires_grad_(True)
    freeze(host)
    assert not any(m.training for m in host.modules()) and not any(p.requires_grad for p in host.parameters())


def test_a_frozen_head_multiplies_a_slice_of_the_states_in_one_piece():
    host = family_host("llama").requires_grad_(False)
    last = torch.randn(4, 6, 32)[:, -1:]
    assert "aten::bmm" in operators(host.lm_head, last)  # torch repeats the weights for every row

    for _ in range(2):  # models are frozen again after they are loaded
        freeze(host)
    assert "aten::bmm" not in operators(host.lm_head, last) and len(host.lm_head._forward_pre_hooks) == 1
    assert "aten::bmm" not in operators(copy.deepcopy(host).lm_head, last)
    assert torch.equal(host.lm_head(last), host.lm_head(last.contiguous()))


def operators(module: nn.Module, states: torch.Tensor) -> set[str]:
    """Names of torch's operators that a forward pass without gradient calls."""
    with torch.no_grad(), torch.profiler.profile() as watched:
        module(states)
    return {event.key for event in watched.key_averages()}


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES + SCALED)
def test_decoder_layers_are_found(family):
    _, layers = decoder_layers(family_host(family))
    assert len(layers) == 2 and isinstance(layers, nn.ModuleList)


@pytest.mark.parametrize("family", [name for name in FAMILIES + SCALED if name != "mamba2"])
def test_lora_is_put_on_every_linear_map_of_the_top_layers_alone(family):
    from transformers.pytorch_utils import Conv1D

    host = family_host(family)
    name, layers = decoder_layers(host)
    top = {f"{name}.1.{n}" for n, m in layers[1].named_modules() if isinstance(m, nn.Linear | Conv1D)}
    before = {n: p.clone() for n, p in host.named_parameters()}
    add_lora(host, 1, 4)
    adapted = {n.split(".lora_A")[0] for n, _ in host.named_parameters() if "lora_A" in n}
    assert adapted == top and len(top) >= 4
    after = dict(host.named_parameters())
    for n, p in before.items():
        found = after.get(n, after.get(".base_layer.".join(n.rsplit(".", 1))))
        assert torch.equal(p, found) and not found.requires_grad
    assert all(p.requires_grad for n, p in after.items() if "lora_" in n)


def test_lora_on_mamba2_leaves_the_map_that_kernels_read_past_the_module():
    host = family_host("mamba2")
    add_lora(host, 1, 4)
    adapted = {name.split(".lora_A")[0] for name, _ in host.named_parameters() if "lora_A" in name}
    assert adapted == {"backbone.layers.1.mixer.in_proj"}


def test_lora_leaves_a_familys_own_kind_of_linear_map_alone():
    """The router of phimoe is a linear map that returns a tuple."""
    host = family_host("phimoe", num_local_experts=2, num_experts_per_tok=2, num_key_value_heads=2)
    add_lora(host, 2, 4)
    with torch.no_grad():
        host(input_ids=random_ids(1, 5))
    assert any("lora_" in name for name, _ in host.named_parameters())

    # Falcon's linear maps are of its own kind, and products.
    host = family_host("falcon", num_kv_heads=4)
    add_lora(host, 2, 4)
    assert sum("lora_A" in name for name, _ in host.named_parameters()) == 2 * 4


def test_an_adapter_that_cannot_run_in_the_llm_is_one_line_before_training(tmp_path, monkeypatch):
    family_host("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("model.HRMBackbone._layer_states", lambda *_: [torch.zeros(1, 3)])
    config = HRMAddonConfig(d_h=16, n_heads=2, hrm_read="all")
    refused(lambda: build_controller(HostConfig(str(tmp_path)), config, "cpu"), "HRM cannot run", "llama")


def test_the_check_of_an_adapter_draws_no_random_number(tmp_path):
    family_host("llama").save_pretrained(tmp_path)
    config = HRMAddonConfig(d_h=16, n_heads=2, init_state="random")
    torch.manual_seed(0)
    controller = build_controller(HostConfig(str(tmp_path)), config, "cpu")
    after = torch.rand(1)
    torch.manual_seed(0)
    HRMController.from_base(str(tmp_path), d_h=16, n_heads=2, init_state="random")
    assert torch.equal(after, torch.rand(1)) and controller.training


def test_lora_on_the_layers_of_a_family_that_runs_them_in_cycles():
    """hrm_text counts its two layers once for each of its cycles."""
    host = family_host("hrm_text", head_dim=8)
    assert host.config.num_hidden_layers > 4
    add_lora(host, 3, 4)
    adapted = {name.split(".lora_A")[0].rsplit(".", 2)[0] for name, _ in host.named_parameters() if "lora_A" in name}
    assert len({name.rsplit(".", 1)[0] for name in adapted} | adapted) > 1
    layers = [name for name, _ in lora_layers(host)]
    assert len(layers) == 4 and all(any(name.startswith(layer) for layer in layers[1:]) for name in adapted)
    refused(lambda: add_lora(family_host("hrm_text", head_dim=8), 5, 4), "--lora_layers 5", "4 layers")


# --- the cache of past tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES + SCALED)
def test_a_family_that_reads_token_by_token_passes(family):
    check_cache(family_host(family))


@pytest.mark.parametrize(("family", "words"), [
    ("mamba", "other states than read at once"), ("falcon_mamba", "other states than read at once"),
    ("rwkv", "keeps no cache"), ("openai-gpt", "keeps no cache"), ("reformer", ""), ("cpmant", "token by token"),
])
def test_a_family_that_cannot_is_refused_while_it_loads(family, words, tmp_path):
    family_host(family).save_pretrained(tmp_path)
    refused(lambda: load_host(str(tmp_path)), family, words)


def test_a_decoder_of_an_encoder_decoder_is_one_line(tmp_path):
    """Such a folder opens as a causal LM, whose parts are not where those of causal LMs are."""
    family_host("bart").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": False}), encoding="utf-8")
    refused(lambda: load_host(str(tmp_path)), "bart")


def test_the_states_of_all_layers_begin_with_the_embeddings_and_end_normed():
    for family in FAMILIES:
        controller = HRMController(HRMAddonConfig(base_config=family_host(family).config, d_h=16, n_heads=2,
                                                  hrm_read="all"), family_host(family))
        ids = random_ids(2, 5)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            last, read, _ = controller.model.run_host(ids, mask, mask.cumsum(1) - 1)
            other = ids.clone()
            other[:, 0] = (other[:, 0] + 1).clamp(max=60)
            _, changed, _ = controller.model.run_host(other, mask, mask.cumsum(1) - 1)
        assert len(read) == 3 and torch.equal(read[-1], last), family
        assert torch.equal(read[0][:, 1:], changed[0][:, 1:]), f"{family}: the first states depend on earlier tokens"
        assert not torch.equal(read[1][:, 1:], changed[1][:, 1:]), family


def test_more_lora_layers_than_the_host_has():
    refused(lambda: add_lora(family_host("llama"), 3, 4), "--lora_layers 3", "2 layers")


def test_lora_trains_in_float32_on_a_half_precision_host():
    """bf16 weights would round small updates to none."""
    host = family_host("llama").bfloat16()
    add_lora(host, 2, 4)
    assert {p.dtype for n, p in host.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in host.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert host(input_ids=random_ids(1, 4)).logits.dtype == torch.bfloat16


def test_without_lora_is_the_bare_llm_and_ends():
    host, ids = family_host("llama"), random_ids(2, 6)
    with torch.no_grad():
        bare = host(input_ids=ids).logits
        add_lora(host, 1, 4)
        for name, p in host.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
        tuned = host(input_ids=ids).logits
        assert not torch.allclose(tuned, bare, atol=1e-2)
        with pytest.raises(RuntimeError, match="inside"), without_lora(host):
            assert torch.equal(host(input_ids=ids).logits, bare)
            raise RuntimeError("inside")
        assert torch.equal(host(input_ids=ids).logits, tuned)
    assert all(p.requires_grad == ("lora_" in n) for n, p in host.named_parameters())


# --- quantised --------------------------------------------------------------------------------------------------------


def test_int8_says_once_that_it_casts(tmp_path, caplog):
    folder = tmp_path / "host"
    family_host("llama", hidden_size=64, intermediate_size=64).save_pretrained(folder)
    host = load_host(str(folder), "8bit")
    with torch.no_grad():
        for _ in range(3):
            host(input_ids=random_ids(1, 5))
    assert sum("will be cast" in record.message for record in caplog.records) <= 1


@pytest.mark.parametrize("lora_layers", [0, 1])
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_the_addon_trains_and_answers_on_a_quantised_host(tmp_path, load_in, lora_layers):
    folder = tmp_path / "host"
    family_host("llama", hidden_size=64, intermediate_size=64).save_pretrained(folder)
    controller = HRMController.from_base(str(folder), load_in=load_in, d_h=16, n_heads=2, segments=2,
                                         lora_layers=lora_layers, lora_rank=2)
    assert any("bnb" in type(m).__module__ or "bitsandbytes" in type(m).__module__ for m in controller.host.modules())
    ids, mask = left_padded([random_ids(1, 6)[0], random_ids(1, 4, 1)[0]])
    labels = ids.clone()
    labels[:, :4] = -100
    controller.train()
    host_before = {n: t.clone() for n, t in controller.host.state_dict().items() if "lora_" not in n}
    optimizer = torch.optim.AdamW(controller.addon_parameters().values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = controller(ids, mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, tensor in controller.host.state_dict().items():
        assert "lora_" in name or torch.equal(tensor, host_before[name]), name
    answer = controller.eval().generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0)
    assert answer.shape[1] <= 9


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_reading_the_weights_of_a_quantised_host_leaves_its_answers_as_they_were(tmp_path, load_in):
    family_host("llama", hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    host = host_module.load_host(str(tmp_path), load_in)
    with torch.no_grad():
        before = host(input_ids=random_ids(1, 6)).logits
        for _ in range(2):
            host.state_dict()
            assert torch.equal(host(input_ids=random_ids(1, 6)).logits, before)


def test_a_revision_of_a_hub_model_is_the_one_that_is_read(tmp_path):
    """From the hub's own cache folder, as it lies after a download."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for name, commit, positions in (("main", "a" * 40, 512), ("v1", "b" * 40, 256)):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
        config = json.loads((ROOT / DEFAULT_HOST / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    code = (
        "import host\n"
        "for revision in (None, 'v1', 'b' * 40):\n"
        "    config = host.load_config('org/tiny', revision=revision)\n"
        "    print(config.max_position_embeddings)\n"
        "host.load_config('org/tiny', revision='v2')"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG_S)
    assert done.stdout.split("\n") == ["512", "256", "256", ""]
    assert "HostError: --model_name org/tiny: no such folder here" in done.stderr


def test_the_attention_of_the_host_is_the_one_that_is_asked_for():
    for name in ("eager", "sdpa"):
        assert load_host(DEFAULT_HOST, attn_implementation=name).config._attn_implementation == name
    with pytest.raises(HostError, match=f"--model_name {DEFAULT_HOST}: the model cannot be loaded: .*nonsense"):
        load_host(DEFAULT_HOST, attn_implementation="nonsense")
