"""cost_model: its arithmetic against the built model, the shards, the optimizer's state and torch's count of FLOPs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import cost_model
import options
from cost_model import KNOWN, Addon, Llm
from engine.batches import IGNORE
from engine.sharding import held_bytes
from host import lora_layers
from tiny_cache import Parts, shards
from tiny_runs import ROOT, arguments, controller_of, tiny_trainer

SETTINGS = ["", "--d_h 24 --h_layers 2 --inner_T 3 --segments 2",
            "--injector grb --state_mix sum --grad_horizon one_step",
            "--hrm_read all --share_hl --l_layers 1", "--hrm_read last --h_layers 0 --l_layers 2 --injector_sees embed",
            "--hrm_conv 3 --optimizer adamw --ema 0 --grad_horizon k:2 --inner_T 3"]
NEAR = 0.2  # of what is measured


def llm_of(config) -> Llm:
    """The sizes in an LLM's config."""
    bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    return Llm(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
               config.intermediate_size, config.vocab_size, getattr(config, "head_dim", None) or 0,
               int(config.tie_word_embeddings), int(bias))


def addon_of(opts) -> Addon:
    """The sizes in flags."""
    return Addon(**{field.name: type(field.default)(getattr(opts, field.name)) for field in dataclasses.fields(Addon)})


def built(host, more: str, vocabulary: int = 0):
    """(options, the model as a run builds it, the arithmetic's LLM and add-on); `vocabulary` 0 is the LLM's own."""
    opts = options.parse([*arguments(host, ROOT), *more.split()])
    model = controller_of(opts)
    if vocabulary:
        model.host.resize_token_embeddings(vocabulary)
        model.host.requires_grad_(False)
    return opts, model, llm_of(model.host.config), addon_of(opts)


def flops_of(work) -> int:
    """Torch's count, with attention as plain products: it does not know the CPU's kernel of both."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("more", SETTINGS)
def test_parameters_are_those_of_the_built_model(tiny_host, more):
    _, model, llm, addon = built(tiny_host, more)
    assert addon.parameters(llm) == sum(parameter.numel() for parameter in model.addon_parameters().values())
    assert llm.parameters == sum(parameter.numel() for parameter in model.host.parameters())


def without_weights(llm: Llm, **config):
    """transformers' own model of these sizes, without weights."""
    made = AutoConfig.for_model(
        **config, hidden_size=llm.hidden, num_hidden_layers=llm.layers, num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads, intermediate_size=llm.intermediate, vocab_size=llm.vocabulary,
        tie_word_embeddings=bool(llm.tied), layer_types=None,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)


@pytest.mark.parametrize("name,config", [
    ("1.5B", {"model_type": "qwen2", "max_window_layers": 28}), ("8B", {"model_type": "llama"}),
    ("70B", {"model_type": "llama"}),
])
def test_a_known_llm_has_the_parameters_of_its_family(name, config):
    llm = KNOWN[name]
    model = without_weights(llm, **config)
    assert llm.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert llm.parameters == {"1.5B": 1_543_714_304, "8B": 8_030_261_248, "70B": 70_553_706_496}[name]


@pytest.fixture
def processes():
    """Makes this process the first of so many, the others imagined."""
    def imagine(world: int) -> DeviceMesh:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        return init_device_mesh("cpu", (world,))

    yield imagine
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 8])
def test_the_part_of_8_billion_parameters_is_what_fsdp_leaves_a_process(world, processes):
    llm = KNOWN["8B"]
    model = without_weights(llm, model_type="llama").requires_grad_(False)
    mesh = processes(world)
    for _, layer in lora_layers(model):
        fully_shard(layer, mesh=mesh)
    held, whole = held_bytes(model)
    assert held == 2 * llm.sharded(world) and whole == 2 * llm.parameters
    assert f"{held / 1e9:.2f} GB" in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("more", ["", "--hrm_read all", "--cache_dtype int8", "--hrm_read all --cache_dtype int8"])
def test_the_cache_s_bytes_are_those_in_the_shards(tiny_host, tmp_path, more):
    import safetensors.torch

    parts = Parts(tiny_host, *more.split())
    cache = parts.cache(tmp_path)
    parts.features(cache)
    lengths = [len(row) - 1 for row in cache.plan.rows]
    llm, addon = llm_of(parts.model.host.config), addon_of(parts.opts)
    on_disk = sum(tensor.nbytes for path in shards(tmp_path) for tensor in safetensors.torch.load_file(path).values())
    assert on_disk == sum(addon.cache_bytes(llm, length, parts.opts.cache_dtype) for length in lengths)


@pytest.mark.parametrize("vocabulary", [0, 20000])
@pytest.mark.parametrize("more", SETTINGS)
def test_a_step_s_state_and_products_are_those_that_torch_counts(tiny_host, more, vocabulary):
    """In a step over a wide vocabulary the head is nearly everything."""
    opts, model, llm, addon = built(tiny_host, more, vocabulary)
    batch = Parts(tiny_host).batch
    trainer = tiny_trainer(opts, model)
    answer = round(int((batch.labels != IGNORE).sum()) / len(batch.examples))  # pads are not scored
    size = (len(batch.examples), batch.prompt_ids.shape[1], answer)
    trainer.step([batch], 1, 1e-3)  # the first step makes the optimizer's state

    kept = 0
    for optimizer, _ in trainer.optimizers:
        for state in optimizer.state.values():
            kept += sum(value.nbytes for value in state.values() if torch.is_tensor(value))
    assert kept == addon.optimizer_bytes(llm)

    encoded = flops_of(lambda: model.encode(batch))
    assert encoded == size[0] * llm.flops(batch.input_ids.shape[1] - 1)
    whole = flops_of(lambda: trainer.step([batch], 2, 1e-3))
    assert whole == pytest.approx(addon.step_flops(llm, *size, cached=False), rel=NEAR)
    rest = whole - encoded
    assert rest == pytest.approx(addon.step_flops(llm, *size, cached=True), rel=NEAR)


@pytest.mark.parametrize("vocabulary", [0, 20000])
@pytest.mark.parametrize("more", SETTINGS)
def test_activations_are_about_what_autograd_keeps(tiny_host, more, vocabulary):
    """And the logits, which a step reads as well; a wide vocabulary outweighs everything else."""
    opts, model, llm, addon = built(tiny_host, more, vocabulary)
    batch = Parts(tiny_host).batch
    model.train()
    states = model.encode(batch)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.segment(states, batch.labels)
    keep(out.logits)
    answer = int((batch.labels != IGNORE).sum()) / len(batch.examples)
    expected = len(batch.examples) * addon.activation_bytes(llm, batch.prompt_ids.shape[1], round(answer))
    assert sum(kept.values()) == pytest.approx(expected, rel=NEAR)


def test_the_table_has_a_line_for_each_cost(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cost_model.py", "--known", "8B", "--processes", "8"])
    assert cost_model.main() == 0
    out = capsys.readouterr().out
    assert "8.03 B" in out and "16.06 GB" in out and len(out.splitlines()) == 15


@pytest.mark.parametrize("words,line", [("--hidden 0", "--hidden 0 must be at least 1"),
                                        ("--known 9B", "invalid choice: '9B'")])
def test_sizes_that_cannot_be_are_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as end:
        cost_model.parse(words.split())
    assert end.value.code == 2 and line in capsys.readouterr().err
