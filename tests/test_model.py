"""model: the add-on on a frozen host. Generation has its own file, test_generation.py.

Most checks are empty at step 0, where the injection is zero, so they run on controllers whose zero factors are random.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batching import Batch, pad
from engine.batches import IGNORE, all_correct
from engine.positions import relative_change, token_positions
from hrm_blocks import Carry
from injector import Thought
from model import HRMAddonConfig, HRMController, is_addon_parameter, prompt_before
from tiny_families import EOS, FAMILIES, SCALED, VOCABULARY, left_padded, random_ids, tiny_controller, tiny_host

VARIANTS = {
    "cab": {},
    "cab_mem": {"cab_mem": 3},
    "grb": {"injector": "grb"},
    "bias": {"logit_bias_head": True},
    "pooled": {"hrm_input": "pooled"},
    "last": {"hrm_read": "last"},
    "all": {"hrm_read": "all", "injector": "grb"},
    "one_step": {"grad_horizon": "one_step", "reset_l": True, "inner_T": 3},
    "random": {"init_state": "random"},
    "gated": {"state_mix": "gated", "init_state": "zero"},
    "act": {"use_act": True, "verifier_head": True, "halt_max_segments": 3},
}
# Attention over the one pooled position is no attention: what asks it cannot learn.
# The first segment from zero states reads no z_H, so the gates of z_H learn nothing of it.
DEAD = {"pooled": {"model.addon.injector.query.weight"},
        "gated": {"model.addon.core.high_gate", "model.addon.core.carry_gate"}}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_family = pytest.mark.parametrize("family", FAMILIES + SCALED)
LENGTHS = (7, 4, 2)


def prompts(lengths=LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    return [random_ids(1, n, seed + i)[0] for i, n in enumerate(lengths)]


def batch_of(questions: list[torch.Tensor], lengths=(3, 1, 4), seed: int = 50) -> Batch:
    """A batch whose targets, ending in EOS, have these lengths."""
    lengths = lengths[: len(questions)]
    answers = [torch.cat([random_ids(1, n, seed + i)[0][: n - 1], torch.tensor([EOS])]) for i, n in enumerate(lengths)]
    prompt_ids, prompt_mask = pad([q.tolist() for q in questions], 0, "left")
    target_ids, target_mask = pad([a.tolist() for a in answers], 0, "right")
    labels = target_ids.masked_fill(target_mask == 0, IGNORE)
    return Batch(prompt_ids, prompt_mask, target_ids, labels, [None] * len(questions))


def full_labels(batch: Batch) -> torch.Tensor:
    """(B, S + T) labels of an ordinary causal-LM call on the same batch."""
    return torch.cat([torch.full_like(batch.prompt_ids, IGNORE), batch.labels], dim=1)


def bare_logits(host, ids, mask) -> torch.Tensor:
    """The host's own logits, its positions counted over attended tokens, as its `generate` does."""
    with torch.no_grad():
        return host(ids, attention_mask=mask, position_ids=token_positions(mask)).logits


def logits_of(model) -> torch.Tensor:
    """Logits of `prompts()`, all of which is prompt."""
    ids, mask = left_padded(prompts())
    return model(ids, mask, prompt_mask=mask).logits


def think(controller: HRMController, batch: Batch, segments: int = 1) -> Carry:
    states, carry = controller.encode(batch), None
    for _ in range(segments):
        carry = controller.model.advance(states.features, states.context, carry)
    return carry


def train_step(controller, batch, carry=None, optimizer=None):
    """One segment of deep supervision with the heads' losses, as `Trainer` composes them."""
    out = controller.segment(controller.encode(batch), labels=batch.labels, carry=carry)
    loss = out.loss
    for name in ("halt_logits", "verdict_logits"):
        if name in out.metrics:
            loss = loss + F.binary_cross_entropy_with_logits(out.metrics[name], out.metrics["correct"].float())
    loss.backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()
    return out


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


# --- step 0 and scale 0 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"cab_mem": 3}, {"injector": "grb", "logit_bias_head": True}, {"lora_layers": 1}],
    ids=["cab", "cab_mem", "grb+bias", "lora"],
)
@every_family
def test_step_0_is_the_bare_llm(family, settings):
    host = tiny_host(family)
    (ids, mask), whole = left_padded(prompts()), random_ids(2, 5)
    expected, plain = bare_logits(host, ids, mask), host(whole).logits
    controller = tiny_controller(family, trained=False, host=host, **settings)
    found = controller(ids, mask, prompt_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    torch.testing.assert_close(controller(whole, prompt_mask=torch.ones_like(whole)).logits, plain, atol=1e-5, rtol=0)


@every_variant
@every_family
def test_scale_0_is_the_bare_llm_bit_for_bit(family, variant):
    host, batch = tiny_host(family), batch_of(prompts())
    controller = tiny_controller(family, host=host, **VARIANTS[variant])
    ids, mask = batch.input_ids, batch.attention_mask
    expected, trained = bare_logits(host, ids, mask), controller(ids, mask, labels=full_labels(batch)).logits
    assert not torch.allclose(trained, expected[:, -trained.shape[1] :], atol=0.1), "the injection does something"
    controller.config.eval_injector_scale = 0.0
    assert torch.equal(controller(ids, mask, prompt_mask=mask).logits, expected)
    out = controller.segment(controller.encode(batch), labels=batch.labels)
    torch.testing.assert_close(out.logits, expected[:, 6:-1][batch.labels != IGNORE], atol=1e-5, rtol=0)
    controller.train()
    assert not torch.allclose(controller(ids, mask, prompt_mask=mask).logits, expected, atol=0.1)
    controller.config.train_injector_scale = 0.0
    assert torch.equal(controller(ids, mask, prompt_mask=mask).logits, expected)


def test_scale_0_skips_the_branch():
    """Nothing is multiplied by zero: even a spoilt add-on leaves the bare LLM."""
    host, batch = tiny_host(), batch_of(prompts())
    controller = tiny_controller(host=host, eval_injector_scale=0.0, logit_bias_head=True)
    with torch.no_grad():
        controller.model.addon.injector.out.weight.fill_(float("nan"))
        controller.model.addon.vocabulary_bias.out.weight.fill_(float("nan"))
    expected = bare_logits(host, batch.input_ids, batch.attention_mask)
    called = []
    controller.model.addon.core.register_forward_hook(lambda *_: called.append(1))
    found = controller(batch.input_ids, batch.attention_mask, labels=full_labels(batch)).logits
    assert torch.equal(found, expected[:, -found.shape[1] :]) and not called
    out = controller.segment(controller.encode(batch), labels=batch.labels)
    torch.testing.assert_close(out.logits, expected[:, 6:-1][batch.labels != IGNORE], atol=1e-5, rtol=0)


def test_the_two_scales_are_used_in_their_own_mode():
    controller, batch = tiny_controller(logit_bias_head=True), batch_of(prompts())

    def logits(training: bool, train_scale: float, eval_scale: float) -> torch.Tensor:
        controller.config.train_injector_scale, controller.config.eval_injector_scale = train_scale, eval_scale
        controller.train(training)
        return controller.segment(controller.encode(batch), labels=batch.labels).logits

    bare, whole = logits(False, 9.0, 0.0), logits(False, 9.0, 1.0)
    torch.testing.assert_close(logits(False, 9.0, 0.5), (bare + whole) / 2, atol=1e-4, rtol=0)  # llama's head is linear
    torch.testing.assert_close(logits(True, 1.0, 9.0), whole)
    torch.testing.assert_close(logits(True, 0.0, 9.0), bare)


@every_family
def test_an_empty_prompt_is_the_bare_llm(family):
    host = tiny_host(family)
    controller, (ids, mask) = tiny_controller(family, host=host, logit_bias_head=True), left_padded(prompts())
    expected = bare_logits(host, ids, mask)
    assert torch.equal(controller(ids, mask, prompt_mask=torch.zeros_like(mask)).logits, expected)
    labels = ids.masked_fill(mask == 0, IGNORE)  # every token is scored: nothing is prompt
    out = controller(ids, mask, labels=labels)
    assert torch.equal(out.logits, expected)
    one = mask.clone()
    one[1] = 0
    mixed = controller(ids, mask, prompt_mask=one).logits
    assert torch.equal(mixed[1], expected[1]) and not torch.allclose(mixed[0], expected[0], atol=0.1)


def test_a_host_that_shares_its_config_stays_causal():
    """Making a config sets the attention of its sub-configs to None, with which transformers drops the causal mask."""
    host, ids = tiny_host("llama"), random_ids(1, 6)
    expected = host(ids).logits
    config = HRMAddonConfig(base_config=host.config, d_h=16, n_heads=2)
    assert host.config._attn_implementation == "sdpa" and config.base_config is not host.config
    HRMController(config, host=host)
    HRMAddonConfig(base_config=host.config)
    assert torch.equal(host(ids).logits, expected)


# --- loss -------------------------------------------------------------------------------------------------------------


@every_variant
def test_loss_predicts_the_next_token_as_an_explicit_loop_does(variant):
    controller, batch = tiny_controller(**VARIANTS[variant]), batch_of(prompts())
    ids, labels = batch.input_ids, full_labels(batch)
    logits = controller(ids, batch.attention_mask, prompt_mask=prompt_before(labels, batch.attention_mask)).logits
    total, count = 0.0, 0
    for row in range(3):
        for column in range(ids.shape[1] - 1):
            token = int(labels[row, column + 1])
            if token != IGNORE:
                assert token == int(ids[row, column + 1])
                total, count = total - torch.log_softmax(logits[row, column], -1)[token].item(), count + 1
    out = controller(ids, batch.attention_mask, labels=labels)
    assert out.loss.item() == pytest.approx(total / count, abs=1e-4)
    assert out.logits.shape[1] == batch.labels.shape[1] + 1, "logits only where a label needs them"


@every_variant
@pytest.mark.parametrize("segments", [1, 3])
def test_an_ordinary_call_equals_the_final_training_segment(variant, segments):
    """Loss, logits and gradient: what libraries that know only `forward(labels=...)` train is the same thing."""
    controller = tiny_controller(**{**VARIANTS[variant], "segments": segments, "halt_max_segments": segments})
    batch, gradients = batch_of(prompts()), []
    states, carry = controller.encode(batch), None
    for _ in range(segments):
        carry = carry.detach() if carry else None
        out = controller.segment(states, labels=batch.labels, carry=carry)
        carry = out.carry
    whole = controller(batch.input_ids, batch.attention_mask, labels=full_labels(batch))
    torch.testing.assert_close(whole.loss, out.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.logits[:, :-1][batch.labels != IGNORE], out.logits, atol=1e-4, rtol=0)
    assert whole.segments_used.tolist() == [segments] * 3
    for loss in (out.loss, whole.loss):
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in controller.named_parameters() if p.grad is not None})
        controller.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-3)


def test_an_explicit_prompt_mask_goes_before_the_labels():
    controller, ids = tiny_controller(), random_ids(2, 7)
    labels = ids.clone()
    labels[:, :5] = IGNORE
    prompt = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0] * 7])
    expected = controller(ids, prompt_mask=prompt).logits
    out = controller(ids, labels=labels, prompt_mask=prompt)
    torch.testing.assert_close(out.logits, expected[:, 4:], atol=1e-5, rtol=0)
    scored = expected[:, 4:-1].flatten(0, 1)
    torch.testing.assert_close(out.loss, F.cross_entropy(scored, ids[:, 5:].flatten()), atol=1e-5, rtol=0)


def test_the_denominator_replaces_the_local_token_count():
    controller, batch = tiny_controller(), batch_of(prompts())
    states, tokens = controller.encode(batch), int((batch.labels != IGNORE).sum())
    local = controller.segment(states, labels=batch.labels).loss
    shared = controller.segment(states, labels=batch.labels, denominator=4 * tokens).loss
    assert shared.item() == pytest.approx(local.item() / 4, rel=1e-5)


def test_logits_to_keep_are_the_last_ones():
    controller, (ids, mask) = tiny_controller(logit_bias_head=True), left_padded(prompts())
    whole = controller(ids, mask, prompt_mask=mask).logits
    kept = controller(ids, mask, prompt_mask=mask, logits_to_keep=2).logits
    torch.testing.assert_close(kept, whole[:, -2:], atol=1e-5, rtol=0)


def test_a_batch_joins_prompt_and_target_without_a_gap():
    batch = batch_of([torch.tensor([5, 6, 7]), torch.tensor([8])], lengths=(1, 3))
    other = batch.target_ids[1, :2].tolist()
    assert batch.input_ids.tolist() == [[5, 6, 7, EOS, 0, 0], [0, 0, 8, *other, EOS]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert batch.to(torch.device("cpu")).labels.tolist() == [[EOS, IGNORE, IGNORE], [*other, EOS]]


def test_all_correct_by_hand():
    labels = torch.tensor([[3, 2, IGNORE], [4, 2, 1], [IGNORE] * 3, [5, IGNORE, IGNORE]])
    flat = F.one_hot(torch.tensor([3, 2, 4, 0, 1, 5]), 6).float()  # the second row's middle token is wrong
    assert all_correct(flat, labels).tolist() == [True, False, False, True], "a row without labels is not correct"


def test_prompt_before_by_hand():
    labels = torch.tensor([[IGNORE, IGNORE, 5, IGNORE], [7, 7, IGNORE, IGNORE], [IGNORE] * 4])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    expected = [[False, True, False, False], [False] * 4, [True, True, True, False]]
    assert prompt_before(labels, mask).tolist() == expected
    assert prompt_before(labels, None)[0].tolist() == [True, True, False, False]


# --- padding and leaks ------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, variant):
    controller, questions = tiny_controller(family, **VARIANTS[variant]), prompts()
    batch = batch_of(questions)
    left = controller(batch.input_ids, batch.attention_mask, labels=full_labels(batch)).logits
    segment = controller.segment(controller.encode(batch), labels=batch.labels).logits
    rows = [torch.cat([q, label[label != IGNORE]]) for q, label in zip(questions, batch.labels, strict=True)]
    ids, mask = pad([row.tolist() for row in rows], 0, "right")
    prompt = torch.stack([torch.arange(ids.shape[1]) < len(q) for q in questions])
    right = controller(ids, mask, prompt_mask=prompt).logits
    first = batch_of(questions[:1])
    alone = controller.segment(controller.encode(first), labels=first.labels).logits
    torch.testing.assert_close(segment[:3], alone, atol=1e-4, rtol=0)
    for row, question in enumerate(questions):
        n = int((batch.labels[row] != IGNORE).sum())
        alone_prompt = torch.tensor([[1] * len(question) + [0] * n])
        alone = controller(rows[row][None], prompt_mask=alone_prompt).logits[0]
        torch.testing.assert_close(left[row, :n], alone[len(question) - 1 : -1], atol=1e-4, rtol=0)
        torch.testing.assert_close(right[row, : len(question) + n], alone, atol=1e-4, rtol=0)


@every_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_changes_no_earlier_logit(family, variant):
    controller, ids = tiny_controller(family, **VARIANTS[variant]), random_ids(1, 9)
    prompt = torch.tensor([[1] * 5 + [0] * 4])
    before = controller(ids, prompt_mask=prompt).logits
    for column in range(5, 9):
        other = ids.clone()
        other[0, column] = (ids[0, column] + 7) % VOCABULARY
        after = controller(other, prompt_mask=prompt).logits
        torch.testing.assert_close(after[:, :column], before[:, :column], atol=1e-5, rtol=0)
        assert not torch.allclose(after[:, column], before[:, column], atol=1e-2)


@every_variant
def test_prompt_logits_before_its_last_token_stay_the_bare_llms(variant):
    """z_H reads the prompt in both directions: injected earlier it would show a token's future to it."""
    host = tiny_host()
    controller, (ids, mask) = tiny_controller(host=host, **VARIANTS[variant]), left_padded(prompts())
    expected, found = bare_logits(host, ids, mask), controller(ids, mask, prompt_mask=mask).logits
    assert torch.equal(found[:, :-1][mask[:, :-1].bool()], expected[:, :-1][mask[:, :-1].bool()])
    assert (found[:, -1] - expected[:, -1]).detach().abs().amax(-1).min() > 0.1


@every_variant
def test_the_target_changes_no_state(variant):
    controller, questions = tiny_controller(**VARIANTS[variant]), prompts()
    first = think(controller, batch_of(questions, lengths=(3, 1, 4)), segments=3)
    second = think(controller, batch_of(questions, lengths=(3, 1, 4), seed=90), segments=3)
    assert torch.equal(first.z_high, second.z_high) and torch.equal(first.z_low, second.z_low)
    longer = think(controller, batch_of(questions, lengths=(2, 6, 1), seed=90), segments=3)
    torch.testing.assert_close(longer.z_high, first.z_high, atol=1e-4, rtol=0)


@pytest.mark.parametrize("read", ["embed", "last", "embed+last", "all"])
def test_every_prompt_token_changes_the_last_state(read):
    controller, ids = tiny_controller(hrm_read=read), random_ids(1, 6)
    before = think(controller, batch_of([ids[0]], lengths=(2,))).z_high
    for column in range(6):
        other = ids.clone()
        other[0, column] = (ids[0, column] + 7) % VOCABULARY
        after = think(controller, batch_of([other[0]], lengths=(2,))).z_high
        assert (after - before)[0, -1].detach().abs().max() > 1e-3
    spread = (before[0, 1:] - before[0, :-1]).detach().abs().amax(-1)
    assert spread.min() > 1e-2, "states differ across positions"


def test_the_last_state_reads_the_features_of_every_prompt_position_itself():
    """Not only by way of the host's last hidden state, which sums the prompt up already."""
    controller, batch = tiny_controller(), batch_of(prompts((6, 4)), lengths=(2, 2))
    states = controller.encode(batch)
    features = states.features.clone().requires_grad_()
    z_high = controller.model.advance(features, states.context, None).z_high
    (reach,) = torch.autograd.grad(z_high[:, -1].pow(3).sum(), features)
    assert torch.equal(reach.abs().amax(-1) > 0, batch.prompt_mask.bool())


def test_features_are_the_embedding_and_the_hosts_last_hidden_state():
    host, (ids, mask) = tiny_host("gpt2"), left_padded(prompts())
    with torch.no_grad():
        out = host(ids, attention_mask=mask, position_ids=token_positions(mask), output_hidden_states=True)
    embedded, last = host.transformer.wte(ids), out.hidden_states[-1]
    expected = {"embed": [embedded], "last": [last], "embed+last": [embedded, last], "all": list(out.hidden_states)}
    for read, parts in expected.items():
        controller = tiny_controller("gpt2", host=host, hrm_read=read)
        features = controller.encode(batch_of(prompts())).features
        torch.testing.assert_close(features[mask.bool()], torch.cat([unit(p) for p in parts], -1)[mask.bool()],
                                   atol=1e-5, rtol=0)


def test_pooled_input_is_the_mean_plus_the_last_token():
    controller, batch = tiny_controller(hrm_input="pooled"), batch_of(prompts())
    tokens = tiny_controller().encode(batch)
    states = controller.encode(batch)
    assert states.features.shape[1] == 1 and states.context.mask.all()
    for row, n in enumerate(LENGTHS):
        own = tokens.features[row, -n:]
        torch.testing.assert_close(states.features[row, 0], own.mean(0) + own[-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(states.context.cos[row, 0], tokens.context.cos[row, -1])


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(controller) -> dict[str, float]:
    return {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in controller.named_parameters()}


@pytest.mark.parametrize("after_evaluation", [False, True], ids=["fresh", "after generate"])
@every_variant
def test_at_step_0_only_the_zero_factor_learns_and_soon_all_do(variant, after_evaluation):
    controller, batch = tiny_controller(trained=False, **VARIANTS[variant]).train(), batch_of(prompts())
    if after_evaluation:
        controller.eval().generate(batch.prompt_ids, attention_mask=batch.prompt_mask, max_new_tokens=2, pad_token_id=0)
        with controller.bare() as host, torch.no_grad():
            host(batch.prompt_ids)
        controller.train()
    zero = ("injector.out.weight", "vocabulary_bias.out.weight")
    heads = ("core.halt.weight", "core.halt.bias", "verifier.weight", "verifier.bias")  # read z_H, not the injection
    controller.segment(controller.encode(batch), labels=batch.labels).loss.backward()
    learning = {name for name, size in gradients(controller).items() if size > 0}
    assert learning == {name for name in controller.addon_parameters() if name.endswith(zero)}
    controller.zero_grad()
    optimizer, carry = torch.optim.AdamW(controller.addon_parameters().values(), lr=1e-3), None
    for _ in range(3):
        carry = train_step(controller, batch, carry, optimizer).carry.detach()
    train_step(controller, batch, carry)
    active = set(controller.addon_parameters())
    assert active - {n for n, size in gradients(controller).items() if size > 0} <= DEAD.get(variant, set())
    assert any(n.endswith(heads) for n in active) == (variant == "act")


@pytest.mark.parametrize("lora_layers", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_host_parameter_ever_changes_or_asks_for_gradient(family, lora_layers):
    host = tiny_host(family)
    before = {n: t.clone() for n, t in host.state_dict().items()}
    controller, batch = tiny_controller(family, host=host, lora_layers=lora_layers).train(), batch_of(prompts())
    optimizer = torch.optim.AdamW([p for p in controller.parameters() if p.requires_grad], lr=1e-1, weight_decay=0.5)
    for _ in range(3):
        train_step(controller, batch, optimizer=optimizer)
        controller(batch.input_ids, batch.attention_mask, labels=full_labels(batch)).loss.backward()
    controller.generate(batch.prompt_ids, attention_mask=batch.prompt_mask, max_new_tokens=2, pad_token_id=0)
    after = {n.replace(".base_layer", ""): t for n, t in host.state_dict().items() if "lora_" not in n}
    assert after.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in after.items())
    for name, p in controller.named_parameters():
        assert p.requires_grad == (is_addon_parameter(name) and "core.halt" not in name), name
        assert p.grad is None or p.requires_grad, name
    assert any("lora_" in n for n in controller.addon_parameters()) == (lora_layers > 0)


@every_family
def test_lora_learns_beside_hrm_and_is_saved_with_it(family):
    host, batch = tiny_host(family), batch_of(prompts())
    ids, mask = batch.prompt_ids, batch.prompt_mask
    expected = bare_logits(host, ids, mask)
    controller = tiny_controller(family, trained=False, host=host, lora_layers=1).train()
    train_step(controller, batch)
    learning = {n for n, size in gradients(controller).items() if size > 0}
    assert any("lora_B" in n for n in learning) and not any("lora_A" in n for n in learning)
    optimizer = torch.optim.AdamW(controller.addon_parameters().values(), lr=1e-2)
    for _ in range(3):
        train_step(controller, batch, optimizer=optimizer)
    train_step(controller, batch)
    assert {n for n, size in gradients(controller).items() if size > 0} == set(controller.addon_parameters())
    state = controller.addon_state()
    adapted = {n for n in state if "lora_" in n}
    assert adapted == {n for n, _ in controller.named_parameters() if "lora_" in n} and adapted
    controller.eval()
    tuned = controller(ids, mask, prompt_mask=mask).logits
    with controller.bare() as bare:
        assert torch.equal(bare_logits(bare, ids, mask), expected)
    assert torch.equal(controller(ids, mask, prompt_mask=mask).logits, tuned)
    assert not torch.allclose(bare_logits(host, ids, mask), expected, atol=1e-3)
    other = tiny_controller(family, trained=False, seed=0, lora_layers=1)
    other.load_addon_state(state)
    torch.testing.assert_close(other(ids, mask, prompt_mask=mask).logits, tuned, atol=1e-5, rtol=0)


def test_the_host_runs_without_gradient_unless_lora_trains():
    batch = batch_of(prompts())
    for layers in (0, 1):
        states = tiny_controller(lora_layers=layers).encode(batch)
        assert states.features.requires_grad == states.slots.hidden.requires_grad == (layers > 0)
        with torch.no_grad():
            states = tiny_controller(lora_layers=layers).encode(batch)
        assert not states.features.requires_grad and not states.slots.hidden.requires_grad


class SavedBytes:
    """Bytes that autograd holds for the backward pass: now, and at most."""

    def __init__(self):
        self.live = self.peak = 0

    def hooks(self):
        counter = self

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor.detach()  # with its graph, an operation's output would keep that operation alive
                self.size = tensor.numel() * tensor.element_size()
                counter.live += self.size
                counter.peak = max(counter.peak, counter.live)

            def __del__(self):
                counter.live -= self.size

        return torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)


def peak_of_training(segments: int, lora_layers: int) -> int:
    controller, batch, counter = tiny_controller(lora_layers=lora_layers).train(), batch_of(prompts()), SavedBytes()
    carry, states = None, controller.encode(batch)
    for _ in range(segments):
        with counter.hooks():
            states = controller.encode(batch) if lora_layers else states
            out = controller.segment(states, labels=batch.labels, carry=carry)
        out.loss.backward()
        carry = out.carry.detach()
    return counter.peak


@pytest.mark.parametrize("lora_layers", [0, 1])
def test_memory_is_flat_in_segments(lora_layers):
    two, sixteen = peak_of_training(2, lora_layers), peak_of_training(16, lora_layers)
    assert two > 10_000 and sixteen <= 1.05 * two


def test_memory_of_an_ordinary_call_is_flat_in_segments():
    peaks = []
    for segments in (2, 16):
        controller, batch, counter = tiny_controller(segments=segments).train(), batch_of(prompts()), SavedBytes()
        with counter.hooks():
            loss = controller(batch.input_ids, batch.attention_mask, labels=full_labels(batch)).loss
        loss.backward()
        peaks.append(counter.peak)
    assert peaks[0] > 10_000 and peaks[1] <= 1.05 * peaks[0]


# --- halting ----------------------------------------------------------------------------------------------------------


QUESTIONS = (7, 4, 2, 5, 6, 3, 7, 1)
LIMIT = 5


@torch.no_grad()
def segments_by_hand(controller, question) -> int:
    """Segments that one example alone takes, by the rule: stop once the head says "right", at the latest at LIMIT."""
    states, carry = controller.encode(batch_of([question], lengths=(1,))), None
    for segment in range(1, LIMIT):
        carry = controller.model.advance(states.features, states.context, carry)
        if controller.model.addon.core.halt_logits(carry.z_high, states.context.mask).item() > 0:
            return segment
    return LIMIT


def halting_controller(**settings) -> tuple[HRMController, torch.Tensor]:
    """A controller whose random halting head lets QUESTIONS go at three or more different segments; those segments."""
    controller = tiny_controller(use_act=True, segments=2, halt_max_segments=LIMIT, **settings)
    head = controller.model.addon.core.halt
    for seed in range(60):
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.constant_(head.bias, -3.0)
        used = torch.tensor([segments_by_hand(controller, question) for question in prompts(QUESTIONS)])
        if len(used.unique()) >= 3 and used.max() == LIMIT:
            return controller, used
    raise AssertionError("no random head lets examples go at different segments: these tests would mean nothing")


@pytest.mark.parametrize("settings", [{}, {"injector": "grb"}, {"cab_mem": 2}, {"reset_l": True}],
                         ids=["cab", "grb", "cab_mem", "reset_l"])
def test_halted_examples_leave_the_batch_and_answer_as_they_do_alone(settings):
    (controller, expected), questions = halting_controller(**settings), prompts(QUESTIONS)
    entered = []
    handle = controller.model.addon.core.register_forward_pre_hook(lambda _, args: entered.append(len(args[0])))
    ids, mask = left_padded(questions)
    with torch.no_grad():
        out = controller(ids, mask, prompt_mask=mask)
    handle.remove()
    assert out.segments_used.tolist() == expected.tolist()
    assert entered == [int((expected > n).sum()) for n in range(int(expected.max()))], "rows that the core computes"
    for row, question in enumerate(questions):
        alone = controller(question[None], prompt_mask=torch.ones(1, len(question))).logits[0, -1]
        torch.testing.assert_close(out.logits[row, -1], alone, atol=1e-4, rtol=0)


def test_compacted_equals_padded():
    """The batch that shrinks gives what the whole batch gives when nobody leaves and states are taken at the halt."""
    (controller, _), questions = halting_controller(), prompts(QUESTIONS)
    batch = batch_of(questions, lengths=(1,) * len(questions))
    states, carry = controller.encode(batch), None
    expected, core = torch.zeros(len(questions), states.features.shape[1], 16), controller.model.addon.core
    waiting = torch.ones(len(questions), dtype=torch.bool)
    with torch.no_grad():
        for segment in range(1, LIMIT + 1):
            carry = controller.model.advance(states.features, states.context, carry)
            done = waiting & ((core.halt_logits(carry.z_high, states.context.mask) > 0) | (segment == LIMIT))
            expected[done], waiting = carry.z_high[done], waiting & ~done
        found, used = controller.model.think(states.features, states.context, states.slots)
    mask = batch.prompt_mask.bool()
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=0)
    assert used.max() == LIMIT and used.min() < LIMIT


def test_without_act_every_example_takes_all_segments():
    controller, (ids, mask) = tiny_controller(segments=4, halt_max_segments=9), left_padded(prompts())
    nn.init.constant_(controller.model.addon.core.halt.bias, 9.0)
    assert controller(ids, mask, prompt_mask=mask).segments_used.tolist() == [4, 4, 4]


def test_with_act_the_limit_is_its_own_or_the_segments():
    (ids, mask) = left_padded(prompts())
    for limit, expected in ((0, 2), (6, 6)):
        controller = tiny_controller(use_act=True, segments=2, halt_max_segments=limit)
        assert controller(ids, mask, prompt_mask=mask).segments_used.tolist() == [expected] * 3
        nn.init.constant_(controller.model.addon.core.halt.bias, 9.0)
        assert controller(ids, mask, prompt_mask=mask).segments_used.tolist() == [1, 1, 1]


@pytest.mark.parametrize("place", ["answer", "prompt"])
@pytest.mark.parametrize("use_act", [False, True])
@torch.no_grad()
def test_an_example_stops_at_the_first_segment_that_hardly_changes_what_must_settle(use_act, place):
    """With a halting head or without; and it answers from the state it stopped at."""
    settings = {"segments": LIMIT, "state_mix": "sum", "init_state": "fixed", "halt_settled_at": place}
    controller, questions = tiny_controller(use_act=use_act, **settings), prompts(QUESTIONS)
    nn.init.normal_(controller.model.addon.injector.out.weight)
    states = controller.encode(batch_of(questions, lengths=(1,) * len(questions)))
    mask, carry = states.context.mask, None
    seen, walk = [], []
    for _ in range(LIMIT):
        carry = controller.model.advance(states.features, states.context, carry)
        written = controller.model.addon.injector(states.slots, Thought(carry.z_high, states.context))
        seen.append((written[:, :1], None) if place == "answer" else (carry.z_high, mask))
        walk.append(carry.z_high)
    nothing = torch.full((len(questions),), torch.inf)  # what one segment alone has changed says nothing
    changes = torch.stack([nothing, *(relative_change(seen[k - 1][0], *seen[k]) for k in range(1, LIMIT))])
    limit = float(changes[2].median()) * 1.0001
    settled = changes < limit
    settled[-1] = True
    expected = settled.int().argmax(dim=0) + 1
    assert len(expected.unique()) >= 2 and expected.min() > 1, "the case must have something to stop"
    controller.config.halt_settled = limit
    z_high, used = controller.model.think(states.features, states.context, states.slots)
    assert used.tolist() == expected.tolist()
    (ids, attended) = left_padded(questions)
    assert controller(ids, attended, prompt_mask=attended).segments_used.tolist() == expected.tolist()
    for row, segment in enumerate(expected.tolist()):
        torch.testing.assert_close(z_high[row][mask[row]], walk[segment - 1][row][mask[row]], atol=1e-4, rtol=0)


def test_settling_takes_nothing_back_that_the_halting_head_stopped():
    controller, expected = halting_controller(state_mix="sum", init_state="fixed", halt_settled_at="prompt")
    controller.config.halt_settled = 1e-9  # nothing settles: the head alone stops
    (ids, mask) = left_padded(prompts(QUESTIONS))
    with torch.no_grad():
        assert controller(ids, mask, prompt_mask=mask).segments_used.tolist() == expected.tolist()
        controller.config.halt_settled = 0.999
        both = controller(ids, mask, prompt_mask=mask).segments_used
    assert bool((both <= expected).all()) and both.max() < expected.max()


def test_segments_used_are_logged_on_request():
    controller, (ids, mask), log = tiny_controller(segments=3), left_padded(prompts()), []
    controller(ids, mask, prompt_mask=mask, segments_log=log)
    assert [used.tolist() for used in log] == [[3, 3, 3]]


def test_heads_give_one_logit_an_example():
    """Halting and verifier losses compare them with (B,) targets: (B, 1) against (B,) would broadcast."""
    controller, batch = tiny_controller(use_act=True, verifier_head=True), batch_of(prompts())
    metrics = controller.segment(controller.encode(batch), labels=batch.labels).metrics
    assert metrics["correct"].shape == metrics["halt_logits"].shape == metrics["verdict_logits"].shape == (3,)
    assert metrics["correct"].dtype == torch.bool and metrics["halt_logits"].tolist() == [-5.0] * 3


def test_the_verifier_head_reads_the_last_prompt_column():
    controller, questions = tiny_controller(verifier_head=True), prompts()
    batch = batch_of(questions)
    verdict = controller.segment(controller.encode(batch), labels=batch.labels).metrics["verdict_logits"]
    for row, question in enumerate(questions):
        alone = batch_of([question], lengths=(2,))
        expected = controller.segment(controller.encode(alone), labels=alone.labels).metrics["verdict_logits"][0]
        assert verdict[row].item() == pytest.approx(expected.item(), abs=1e-4)


# --- correctness is generation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"injector": "grb", "logit_bias_head": True}], ids=["cab", "grb+bias"])
def test_all_correct_is_greedy_generation_giving_the_gold_answer_and_its_end(settings):
    controller = tiny_controller(trained=False, **settings)
    batch = batch_of(prompts((6, 4, 5, 3)), lengths=(3, 1, 4, 2))
    golds = [row[label != IGNORE].tolist() for row, label in zip(batch.target_ids, batch.labels, strict=True)]
    optimizer = torch.optim.AdamW(controller.addon_parameters().values(), lr=1e-2)
    seen = []
    for _ in range(40):
        controller.eval()
        with torch.no_grad():
            states, carry = controller.encode(batch), None
            for _ in range(controller.config.segments):
                out = controller.segment(states, labels=batch.labels, carry=carry)
                carry = out.carry
        tokens = controller.generate(batch.prompt_ids, attention_mask=batch.prompt_mask, max_new_tokens=4,
                                     do_sample=False, eos_token_id=EOS, pad_token_id=0)[:, batch.prompt_ids.shape[1] :]
        generated = [row[: len(gold)] == gold for row, gold in zip(tokens.tolist(), golds, strict=True)]
        assert out.metrics["correct"].tolist() == generated
        seen.append(sum(generated))
        if seen[-1] == len(golds):
            break
        controller.train()
        carry = None
        for _ in range(controller.config.segments):
            carry = train_step(controller, batch, carry, optimizer).carry.detach()
    assert seen[-1] == len(golds), f"the add-on could not learn four examples: {seen}"
    assert any(0 < count < len(golds) for count in seen), f"both verdicts must have been compared: {seen}"


# --- as a library calls it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["cab", "cab_mem", "grb", "pooled"])
@every_family
def test_backbone_times_output_embedding_is_forward(family, variant):
    """TRL calls the backbone and the output embedding by itself (and scales as the family's config says)."""
    from host import host_logits

    controller, batch = tiny_controller(family, **VARIANTS[variant]), batch_of(prompts())
    ids, mask = batch.input_ids, batch.attention_mask
    prompt = prompt_before(full_labels(batch), mask)
    assert controller.base_model is controller.model
    expected = controller(ids, mask, prompt_mask=prompt).logits
    hidden = controller.base_model(input_ids=ids, attention_mask=mask, prompt_mask=prompt).last_hidden_state
    torch.testing.assert_close(host_logits(controller.host, hidden), expected, atol=1e-5, rtol=0)
    if family in ("llama", "qwen2", "gpt2", "gpt_neox"):
        torch.testing.assert_close(controller.get_output_embeddings()(hidden), expected, atol=1e-5, rtol=0)


def test_which_tokens_hrm_reads_is_never_guessed():
    controller, (ids, mask) = tiny_controller(), left_padded(prompts())
    for call in (controller, controller.model):
        with pytest.raises(ValueError, match="prompt_mask is missing"):
            call(ids, attention_mask=mask)
        with pytest.raises(ValueError, match=r"shape of input_ids \(3, 7\), got \(3, 6\)"):
            call(ids, attention_mask=mask, prompt_mask=mask[:, :-1])
    cache = controller.host(ids, attention_mask=mask, use_cache=True).past_key_values
    longer = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
    with pytest.raises(ValueError, match="without the thought"):
        controller(ids[:, :1], longer, prompt_mask=mask[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask must be"):
        controller(ids, mask[:, None, None, :], prompt_mask=mask)


def test_a_prompt_mask_never_names_pads():
    controller, (ids, mask) = tiny_controller(), left_padded(prompts())
    expected = controller(ids, mask, prompt_mask=mask).logits
    assert torch.equal(controller(ids, mask, prompt_mask=torch.ones_like(mask)).logits, expected)


def test_positions_come_from_the_mask_and_not_from_the_caller():
    controller, (ids, mask) = tiny_controller("gpt2"), left_padded(prompts())
    expected = controller(ids, mask, prompt_mask=mask).logits
    assert torch.equal(controller(ids, mask, prompt_mask=mask, position_ids=torch.zeros_like(ids)).logits, expected)
    assert token_positions(torch.tensor([[0, 0, 1, 1, 0]])).tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_train_never_switches_the_hosts_dropout_on(family):
    rate = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "gpt_neox": ("hidden_dropout", "attention_dropout")}
    host = tiny_host(family, **dict.fromkeys(rate.get(family, ("attention_dropout",)), 0.5))
    controller, batch = tiny_controller(family, host=host), batch_of(prompts())
    expected = controller.segment(controller.encode(batch), labels=batch.labels).logits
    controller.train()
    assert controller.training and controller.model.addon.training and not any(m.training for m in host.modules())
    for _ in range(2):
        assert torch.equal(controller.segment(controller.encode(batch), labels=batch.labels).logits, expected)
    controller.model.train()
    assert not any(m.training for m in host.modules())


@every_variant
@pytest.mark.parametrize("precision", ["bf16 autocast", "bf16 host", "both"])
def test_half_precision_is_finite_and_the_addon_stays_in_float32(variant, precision):
    host = tiny_host().bfloat16() if precision != "bf16 autocast" else tiny_host()
    controller, batch = tiny_controller(host=host, **VARIANTS[variant]).train(), batch_of(prompts())
    whole_call = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": full_labels(batch)}
    reference = tiny_controller(**VARIANTS[variant]).train()
    torch.manual_seed(3)  # of the random initial states, where there are any
    expected = reference(**whole_call)
    with torch.autocast("cpu", torch.bfloat16) if precision != "bf16 host" else contextlib.nullcontext():
        out = train_step(controller, batch)
        torch.manual_seed(3)
        whole = controller(**whole_call)
        answer = controller.generate(batch.prompt_ids, attention_mask=batch.prompt_mask, max_new_tokens=2)
    assert out.logits.dtype == whole.logits.dtype == torch.float32 and answer.shape[0] == 3
    assert {p.dtype for p in controller.addon_parameters().values()} == {torch.float32}
    still = {n for n in controller.addon_parameters() if gradients(controller)[n] == 0}
    assert still <= DEAD.get(variant, set())
    assert float(whole.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=0.15)


def test_autocast_rounds_the_addon_but_not_the_host():
    controller, batch = tiny_controller(), batch_of(prompts())
    expected = controller.encode(batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = controller.encode(batch)
        hidden = controller.model(batch.input_ids, batch.attention_mask, prompt_mask=batch.attention_mask * 0)
    assert torch.equal(found.slots.hidden, expected.slots.hidden) and torch.equal(found.features, expected.features)
    torch.testing.assert_close(hidden.last_hidden_state[:, 6:-1], expected.slots.hidden, rtol=0, atol=1e-5)  # bf16: .01
    with torch.autocast("cpu", torch.bfloat16):
        assert controller.model.addon.read(found.features).dtype == torch.bfloat16


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*VARIANTS, "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_save_and_load_give_the_same_model(family, variant, tmp_path):
    controller = tiny_controller(family, **VARIANTS.get(variant, {"lora_layers": 1}))
    controller.save_pretrained(tmp_path)
    loaded, info = HRMController.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = loaded.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in controller.state_dict().items())
    torch.testing.assert_close(logits_of(loaded), logits_of(controller), atol=1e-5, rtol=0)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == list(controller.addon_parameters())
    assert not loaded.training and not loaded.host.training and loaded.generation_config.eos_token_id == EOS
    ignored = ("base_config", "transformers_version", "architectures", "dtype", "_name_or_path")
    first, second = ({k: v for k, v in c.config.to_dict().items() if k not in ignored} for c in (controller, loaded))
    assert first == second


@pytest.mark.parametrize("settings", [{}, {"lora_layers": 1}], ids=["plain", "lora"])
def test_a_half_precision_host_keeps_its_dtype_and_the_addon_float32(settings, tmp_path):
    tiny_host().bfloat16().save_pretrained(tmp_path / "host")
    controller = HRMController.from_base(str(tmp_path / "host"), d_h=16, n_heads=2, **settings).eval()
    with torch.no_grad():
        nn.init.normal_(controller.model.addon.injector.out.weight)
        controller.model.addon.read.weight += 1e-4  # no bf16 number
    controller.save_pretrained(tmp_path / "whole")
    for arguments in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}):
        loaded = HRMController.from_pretrained(tmp_path / "whole", **arguments)
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == (torch.float32 if is_addon_parameter(name) else torch.bfloat16), name
        state = loaded.state_dict()
        assert all(torch.equal(t, state[n]) for n, t in controller.state_dict().items())
        torch.testing.assert_close(logits_of(loaded), logits_of(controller), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_host_weights_survive(family, tied, tmp_path):
    controller = tiny_controller(family, host=tiny_host(family, tie_word_embeddings=tied))
    controller.save_pretrained(tmp_path)
    loaded = HRMController.from_pretrained(tmp_path)
    for model in (controller, loaded):
        one, other = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (one is other) == tied and torch.equal(one, other) == tied
    torch.testing.assert_close(logits_of(loaded), logits_of(controller), atol=1e-5, rtol=0)


def test_the_auto_classes_know_the_addon(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    controller = tiny_controller(injector="grb")
    controller.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, HRMAddonConfig) and config.injector == "grb" and config.base_config.model_type == "llama"
    assert config.get_text_config().num_hidden_layers == 2 and config.eos_token_id == EOS
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, HRMController)
    torch.testing.assert_close(logits_of(loaded), logits_of(controller), atol=1e-5, rtol=0)


def test_text_generation_pipeline(tiny_host, tokenizer, tmp_path):
    from transformers import pipeline

    controller = HRMController.from_base(str(tiny_host), d_h=16, n_heads=2).eval()
    with torch.no_grad():
        nn.init.normal_(controller.model.addon.injector.out.weight)
    controller.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    texts = ["12 + 7 =", "What is 5 * 8?"]
    found = generator(texts, max_new_tokens=4, do_sample=False, batch_size=2, return_full_text=False)
    for text, (out,) in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        own = controller.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert out["generated_text"] == tokenizer.decode(own, skip_special_tokens=True)


def test_addon_state_holds_the_addon_with_its_buffers_and_nothing_of_the_llm():
    controller, other = (tiny_controller(lora_layers=1, use_act=True) for _ in range(2))
    state, core = controller.addon_state(), "model.addon.core."
    assert {core + "z_high_init", core + "z_low_init", core + "halt.weight"} <= state.keys()
    assert set(controller.addon_parameters()) <= state.keys()
    assert all(n.startswith("model.addon.") or "lora_" in n for n in state)
    with torch.no_grad():
        for tensor in other.addon_state().values():
            tensor.zero_()
    assert not torch.allclose(logits_of(other), logits_of(controller), atol=0.1)
    other.load_addon_state(state)
    assert torch.equal(logits_of(other), logits_of(controller))


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"d_h": 24}, r"core\.h_block\S*attention\.out\.weight is \(16, 16\) there, expected \(24, 24\)"),
        ({"injector": "grb"}, r"model\.addon\.injector\.gate is \(\) there, expected absent"),
        ({"lora_layers": 1}, r"model\.host.*lora_A.*is absent there"),
        ({"logit_bias_head": True}, r"vocabulary_bias.*is absent there, expected"),
    ],
)
def test_a_state_that_does_not_fit_names_the_first_difference_and_changes_nothing(settings, first):
    state, other = tiny_controller().addon_state(), tiny_controller(**settings)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=first):
        other.load_addon_state(state)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
