"""HRMController.generate: cached = uncached = a loop written here, batched = alone, all families and ways to decode."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from engine.growing_cache import GrowingLayer
from tiny_families import EOS, FAMILIES, PAD, SCALED, left_padded, random_ids, tiny_controller, tiny_host

NEW = 5
VARIANTS = {
    "cab": {},
    "cab_mem": {"cab_mem": 3},
    "grb": {"injector": "grb"},
    "bias": {"logit_bias_head": True, "injector": "grb"},
    "pooled": {"hrm_input": "pooled"},
    "all": {"hrm_read": "all"},
    "act": {"use_act": True, "halt_max_segments": 3},
    "prompt_gate": {"prompt_gate": True},
    "lora": {"lora_layers": 1},
}
DECODING = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "sample": {"do_sample": True, "top_k": 0},
    "beam sample": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_family = pytest.mark.parametrize("family", FAMILIES + SCALED)


def questions(*lengths: int) -> list[torch.Tensor]:
    return [random_ids(1, n, i)[0] for i, n in enumerate(lengths or (8, 5, 3))]


def generate(model, ids, mask=None, new: int = NEW, **arguments):
    torch.manual_seed(0)
    given = {} if mask is None else {"attention_mask": mask}
    return model.generate(ids, **given, max_new_tokens=new, pad_token_id=PAD, return_dict_in_generate=True,
                          output_logits=True, **{"eos_token_id": None, "do_sample": False, **arguments})


def same(found, expected) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(expected.logits)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def greedy_by_hand(controller, prompt: torch.Tensor, new: int = NEW) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and logits of one prompt, no padding and no cache: the whole row again for each token."""
    row, logits = prompt, []
    for _ in range(new):
        prompt_mask = (torch.arange(len(row)) < len(prompt))[None]
        logits.append(controller(row[None], prompt_mask=prompt_mask).logits[0, -1])
        row = torch.cat([row, logits[-1].argmax()[None]])
    return row[len(prompt) :].tolist(), torch.stack(logits)


# --- cached = uncached = by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", DECODING)
@every_family
def test_cached_equals_uncached_for_every_family(family, decoding):
    controller, (ids, mask) = tiny_controller(family), left_padded(questions())
    cached, uncached = (generate(controller, ids, mask, use_cache=c, **DECODING[decoding]) for c in (True, False))
    same(cached, uncached)
    assert cached.past_key_values is not None and uncached.past_key_values is None


@pytest.mark.parametrize("decoding", DECODING)
@every_variant
def test_cached_equals_uncached_for_every_variant(variant, decoding):
    controller, (ids, mask) = tiny_controller(**VARIANTS[variant]), left_padded(questions())
    same(*(generate(controller, ids, mask, use_cache=c, **DECODING[decoding]) for c in (True, False)))


@every_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_a_loop_over_each_prompt_alone(family, variant):
    controller = tiny_controller(family, **VARIANTS[variant])
    ids, mask = left_padded(questions())
    out = generate(controller, ids, mask)
    for row, question in enumerate(questions()):
        tokens, logits = greedy_by_hand(controller, question)
        assert out.sequences[row, ids.shape[1] :].tolist() == tokens
        torch.testing.assert_close(torch.stack([step[row] for step in out.logits]), logits, atol=1e-4, rtol=0)


@every_family
def test_the_answer_differs_from_the_bare_llms(family):
    """Else all of these tests could hold with the injection lost somewhere in `generate`."""
    host, (ids, mask) = tiny_host(family), left_padded(questions())
    bare, ours = generate(host, ids, mask), generate(tiny_controller(family, host=host), ids, mask)
    for one, other in zip(bare.logits[:1], ours.logits[:1], strict=True):
        assert (one - other).abs().amax(-1).min() > 0.1
    untrained = generate(tiny_controller(family, trained=False, host=host), ids, mask)
    same(untrained, bare)
    controller = tiny_controller(family, host=host, eval_injector_scale=0.0)
    for use_cache in (True, False):
        same(generate(controller, ids, mask, use_cache=use_cache), bare)


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_new_token_is_injected(use_cache):
    controller, prompt = tiny_controller(), questions()[0][None]
    out = generate(controller, prompt, use_cache=use_cache)
    with torch.no_grad():
        bare = controller.host(out.sequences[:, :-1]).logits[0, prompt.shape[1] - 1 :]
    assert all((step[0] - own).abs().max() > 0.1 for step, own in zip(out.logits, bare, strict=True))


def test_the_prompt_is_thought_about_once():
    controller, (ids, mask), log = tiny_controller(segments=3), left_padded(questions()), []
    calls = []
    controller.model.addon.core.register_forward_hook(lambda *_: calls.append(1))
    generate(controller, ids, mask, segments_log=log)
    assert len(calls) == 3 and [used.tolist() for used in log] == [[3, 3, 3]]
    generate(controller, ids, mask, segments_log=log, num_beams=2)
    assert len(calls) == 6 and [len(used) for used in log] == [3, 6]


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant, layer", [("cab", "key_value"), ("cab_mem", "memory_key_value"), ("grb", "out")])
def test_what_the_injector_makes_of_the_prompt_is_made_once(variant, layer):
    controller = tiny_controller("llama", **VARIANTS[variant])
    calls = []
    module = getattr(controller.model.addon.injector, layer)
    module.register_forward_hook(lambda *_: calls.append(None))
    generate(controller, *left_padded(questions()))
    assert len(calls) == 1


def test_the_cache_has_room_for_the_answer():
    found = generate(tiny_controller("llama"), *left_padded(questions()))
    assert {type(layer) for layer in found.past_key_values.layers} == {GrowingLayer}


@pytest.mark.parametrize("use_cache", [True, False])
@every_family
def test_without_an_attention_mask_all_is_prompt(family, use_cache):
    """`generate` drops a mask of ones, and infers one from pads where none is given."""
    controller, ids = tiny_controller(family), random_ids(2, 6)
    expected = [greedy_by_hand(controller, row) for row in ids]
    for mask in (None, torch.ones_like(ids)):
        out = generate(controller, ids, mask, use_cache=use_cache)
        assert out.sequences[:, 6:].tolist() == [tokens for tokens, _ in expected]
        logits = torch.stack([logits for _, logits in expected], dim=1)
        torch.testing.assert_close(torch.stack(out.logits), logits, atol=1e-4, rtol=0)
    padded, _ = left_padded(questions())
    inferred, given = (generate(controller, padded, m, use_cache=use_cache) for m in (None, (padded != PAD).long()))
    same(inferred, given)


@pytest.mark.parametrize("use_cache", [True, False])
@every_variant
def test_an_explicit_prompt_mask(variant, use_cache):
    """HRM reads the first tokens alone; what follows them belongs to the answer."""
    controller, ids = tiny_controller(**VARIANTS[variant]), random_ids(2, 7)
    prompt = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    out = generate(controller, ids, prompt_mask=prompt, use_cache=use_cache)
    sequences = ids
    for step in out.logits:
        grown = torch.cat([prompt, torch.zeros(2, sequences.shape[1] - 7, dtype=torch.int64)], dim=1)
        expected = controller(sequences, prompt_mask=grown).logits[:, -1]
        torch.testing.assert_close(step, expected, atol=1e-4, rtol=0)
        sequences = torch.cat([sequences, expected.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out.sequences, sequences)


@pytest.mark.parametrize("use_cache", [True, False])
@every_family
def test_an_empty_prompt_is_the_bare_llm(family, use_cache):
    host, (ids, mask) = tiny_host(family), left_padded(questions())
    controller = tiny_controller(family, host=host, logit_bias_head=True)
    bare = generate(host, ids, mask, use_cache=use_cache)
    same(generate(controller, ids, mask, prompt_mask=torch.zeros_like(mask), use_cache=use_cache), bare)
    mixed = generate(controller, ids, mask, prompt_mask=mask * torch.tensor([[1], [0], [1]]), use_cache=use_cache)
    assert torch.equal(mixed.sequences[1], bare.sequences[1]) and not torch.equal(mixed.logits[0], bare.logits[0])


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_end_early_do_not_disturb_the_others(use_cache):
    controller, (ids, mask) = tiny_controller(), left_padded(questions())
    free = generate(controller, ids, mask, new=8).sequences[:, 8:]
    end = int(free[1, 2])  # the second row's third token becomes the end
    out = generate(controller, ids, mask, new=8, eos_token_id=end, use_cache=use_cache).sequences[:, 8:]
    for row, ended in zip(free.tolist(), out.tolist(), strict=True):
        stop = row.index(end) + 1 if end in row else len(row)
        assert ended[:stop] == row[:stop] and set(ended[stop:]) <= {PAD}


def test_the_hosts_own_way_to_generate_is_the_default():
    host = tiny_host()
    host.generation_config.repetition_penalty = 1.7
    controller = tiny_controller(host=host)
    assert controller.generation_config.repetition_penalty == 1.7
    assert controller.generation_config.eos_token_id == EOS and controller.generation_config.pad_token_id == PAD
    controller.generation_config.max_new_tokens = 1
    assert controller.host.generation_config.max_new_tokens is None, "the host keeps a config of its own"


def test_training_mode_does_not_switch_the_hosts_dropout_on():
    controller, (ids, mask) = tiny_controller("gpt2", host=tiny_host("gpt2", resid_pdrop=0.5)), left_padded(questions())
    expected = generate(controller, ids, mask)
    same(generate(controller.train(), ids, mask), expected)


@pytest.mark.parametrize("variant", ["cab", "grb"])
def test_under_autocast(variant):
    """Evaluation runs so on hardware with bf16; the host keeps float32, only the add-on is rounded."""
    controller, (ids, mask) = tiny_controller(**VARIANTS[variant]), left_padded(questions())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached, uncached = (generate(controller, ids, mask, new=1, use_cache=c) for c in (True, False))
    torch.testing.assert_close(cached.logits[0], uncached.logits[0], atol=0.3, rtol=0.05)
    torch.testing.assert_close(cached.logits[0], generate(controller, ids, mask, new=1).logits[0], atol=0.5, rtol=0.1)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["argument", "config"])
def test_chunked_prefill_is_refused(through):
    controller, (ids, mask) = tiny_controller(), left_padded(questions())
    config = GenerationConfig(max_new_tokens=2, prefill_chunk_size=2)
    arguments = {"prefill_chunk_size": 2} if through == "argument" else {"generation_config": config}
    with pytest.raises(ValueError, match="prefill_chunk_size is refused.*whole prompt"):
        controller.generate(ids, attention_mask=mask, **arguments)


@pytest.mark.parametrize("filled", [3, 8])
def test_a_cache_that_hrm_has_not_filled_is_refused(filled):
    controller, (ids, mask) = tiny_controller(), left_padded(questions())
    cache = controller.host(ids[:, :filled], attention_mask=mask[:, :filled], use_cache=True).past_key_values
    assert cache.get_seq_length() == filled
    with pytest.raises(ValueError, match="holds tokens that HRM has not read"):
        generate(controller, ids, mask, past_key_values=cache)
    empty = generate(controller, ids, mask, past_key_values=DynamicCache(config=controller.host.config))
    same(empty, generate(controller, ids, mask))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_static_caches_are_refused(family):
    controller, (ids, mask) = tiny_controller(family), left_padded(questions())
    with pytest.raises(ValueError, match="static caches are refused"):
        generate(controller, ids, mask, cache_implementation="static")


@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": "llama"}])
def test_assisted_decoding_is_refused(arguments):
    """It shows guessed tokens together with the prompt, which HRM would read as prompt."""
    arguments = {k: tiny_host(v) if k == "assistant_model" else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match="only supports"):
        generate(tiny_controller(), random_ids(1, 6), **arguments)


def test_a_conversation_goes_on_with_cache_and_thought_together():
    controller, ids = tiny_controller(), random_ids(1, 6)
    with torch.no_grad():
        whole = controller(ids, prompt_mask=torch.tensor([[1, 1, 1, 1, 0, 0]])).logits
        first = controller(ids[:, :4], prompt_mask=torch.ones(1, 4), use_cache=True)
        second = controller(ids[:, 4:], past_key_values=first.past_key_values, thought=first.thought, use_cache=True)
    torch.testing.assert_close(second.logits, whole[:, 4:], atol=1e-4, rtol=0)
