"""The planner/worker causal LM: causality, cycles, gate, cache, losses, saving, TRL, tokenizer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

from enhanced import model as enhanced
from enhanced.config import CycleMeter, EnhancedHRMConfig
from enhanced.layers import Chosen, ThoughtHead, causal_mask, certainty
from enhanced.model import EnhancedHRMForCausalLM, create_hrm_model_and_tokenizer
from enhanced.reasoning_format import REASONING_TOKENS
from enhanced.tokenizer import CHAT_TEMPLATE, check_reasoning_tokenizer, reasoning_tokenizer

SHAPE = {"d_model": 32, "n_heads": 2, "n_planner_layers": 1, "n_worker_layers": 2, "thought_dim": 16, "max_cycles": 4}


@pytest.fixture(scope="module")
def reasoner(tiny_host):
    return reasoning_tokenizer(str(tiny_host))


def small(reasoner, seed: int = 0, **settings) -> EnhancedHRMForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_hrm_model_and_tokenizer(**(SHAPE | settings), tokenizer=reasoner)[0].eval()


def stopping(reasoner, **settings) -> EnhancedHRMForCausalLM:
    """A model whose gate stops about half of the running tokens after each cycle, for reasons of their own."""
    model = small(reasoner, entropy_threshold=0.5, confidence_threshold=0.5, **settings)
    gate, row = model.model.gate, torch.randn(64, generator=torch.Generator().manual_seed(7))
    states = model.model(random_ids(8, 12, seed=99), adaptive_cycles=False, every_state=True).worker_states
    with torch.no_grad():
        middle = (F.silu(gate.inner(torch.cat(states))) @ row).median()
        gate.outer.weight.copy_(torch.stack([row, -row]) * 5)
        gate.outer.bias.copy_(torch.stack([-middle, middle]) * 5)
    return model


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 300, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: int = 3, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask): row i starts with 2 i pads."""
    ids, mask = random_ids(rows, tokens), torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return ids, mask


# --- size -------------------------------------------------------------------------------------------------------------


def test_the_default_model_has_16_7_million_parameters_at_32025_tokens():
    model = EnhancedHRMForCausalLM(EnhancedHRMConfig())
    shares = model.parameter_shares()
    layer = 4 * 256 * 256 + 3 * 256 * 736
    heads = 3 * 256 * 256 + (256 * 64 + 64 * 2 + 2)
    assert shares == {
        "embedding": 32_025 * 256,  # 8.20 M, also the token head
        "planner": 4 * layer,  # 3.31 M
        "worker": 6 * layer,  # 4.96 M
        "head": 0,
        "heads": heads,  # 0.21 M: thought projection and predictor, gate
        "cycles": 4 * 256 + 256,  # cycle embedding, skip
    }
    assert sum(shares.values()) == sum(p.numel() for p in model.parameters()) == 16_686_722
    assert abs(sum(shares.values()) - 16.7e6) < 0.2e6


# --- what reaches what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [False, True])
def test_no_later_token_changes_an_earlier_logit(reasoner, gate):
    model, ids = stopping(reasoner), random_ids(2, 10)
    before = model(ids, adaptive_cycles=gate)
    for place in (9, 6, 1):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 7) % 300
        after = model(changed, adaptive_cycles=gate)
        torch.testing.assert_close(after.logits[:, :place], before.logits[:, :place], atol=1e-5, rtol=0)
        assert torch.equal(after.cycles_used[:, :place], before.cycles_used[:, :place])
        assert (after.logits[:, place:] - before.logits[:, place:]).abs().amax() > 1e-3


def test_every_earlier_token_matters(reasoner):
    model, ids = small(reasoner), random_ids(1, 8)
    last = model(ids).logits[:, -1]
    for place in range(8):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 7) % 300
        assert (model(changed).logits[:, -1] - last).abs().max() > 1e-3, place


def test_each_cycle_changes_the_result_and_the_input_enters_every_cycle(reasoner):
    model, ids = small(reasoner), random_ids(2, 6)
    results = [model(ids, max_cycles=n, adaptive_cycles=False).logits for n in (1, 2, 3, 4, 6)]
    for fewer, more in zip(results, results[1:], strict=False):
        assert (fewer - more).abs().max() > 1e-2
    seen = []
    step = model.model.step
    model.model.step = lambda plan, work, before, x, cycle: seen.append(x) or step(plan, work, before, x, cycle)
    model(ids, adaptive_cycles=False)
    embedded = model.model.embed_tokens(ids) * 32**0.5
    assert len(seen) == 4 and all(torch.equal(x, embedded) for x in seen)


def test_the_cycle_embedding_tells_cycles_apart(reasoner):
    model, ids = small(reasoner), random_ids(2, 6)
    before = model(ids).logits
    with torch.no_grad():
        model.model.cycle_embedding[2] = model.model.cycle_embedding[0]
    assert (model(ids).logits - before).abs().max() > 1e-2
    assert torch.equal(model(ids, max_cycles=2).logits, small(reasoner)(ids, max_cycles=2).logits)


def test_the_skip_brings_back_the_state_of_two_cycles_ago(reasoner):
    model, ids = small(reasoner), random_ids(2, 6)
    states = model.model(ids, adaptive_cycles=False, every_state=True).worker_states
    seen = []
    step = model.model.step
    model.model.step = lambda plan, work, before, x, cycle: seen.append(before) or step(plan, work, before, x, cycle)
    skipped = model(ids, adaptive_cycles=False).logits
    expected = [torch.zeros_like(states[0])] * 2 + [states[0], states[1]]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    with torch.no_grad():
        model.model.skip.zero_()
    assert (model(ids, adaptive_cycles=False).logits - skipped).abs().max() > 1e-2


def test_gradient_reaches_every_trainable_parameter(reasoner):
    model, (ids, mask) = small(reasoner).train(), left_padded()
    torch.manual_seed(0)
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []
    assert all(p.requires_grad for p in model.parameters())


# --- loss -------------------------------------------------------------------------------------------------------------


def test_a_position_is_scored_on_the_next_label_alone(reasoner):
    model, ids = small(reasoner), random_ids(2, 7)
    labels = ids.clone()
    labels[:, :4] = -100
    out = model(ids, labels=labels)
    log_p = F.log_softmax(model(ids, adaptive_cycles=False).logits, dim=-1)
    gold = torch.stack([log_p[row, t, ids[row, t + 1]] for row in range(2) for t in range(3, 6)])
    torch.testing.assert_close(out.metrics["loss_token"], -gold.mean())
    parts, config = out.metrics, model.config
    thought = parts["loss_thought_next"] + config.variance_weight * parts["loss_thought_variance"]
    thought = thought + config.covariance_weight * parts["loss_thought_covariance"]
    total = parts["loss_token"] + config.cycle_weight * parts["loss_cycle"] + config.thought_weight * thought
    total = total + config.gate_weight * parts["loss_gate"] + config.exit_weight * parts["loss_exit"]
    torch.testing.assert_close(out.loss.detach(), total)


def test_the_cycle_loss_is_the_mean_change_between_successive_worker_states(reasoner):
    model, (ids, mask) = small(reasoner), left_padded()
    out = model.model(ids, attention_mask=mask, adaptive_cycles=False, every_state=True)
    real = [state[mask.bool()] for state in out.worker_states]
    changes = [(before - after).pow(2).mean() for before, after in zip(real, real[1:], strict=False)]
    labels = ids.masked_fill(mask == 0, -100)
    told = model(ids, attention_mask=mask, labels=labels).metrics["loss_cycle"]
    torch.testing.assert_close(told, torch.stack(changes).mean())
    assert len(changes) == 3 and told > 0
    assert model(ids, labels=ids, max_cycles=1).metrics["loss_cycle"] == 0


def test_the_token_loss_of_parts_of_a_batch_adds_up(reasoner):
    model, (ids, mask) = small(reasoner), left_padded()
    labels = ids.masked_fill(mask == 0, -100)
    count = int(((labels[:, 1:] != -100) & (mask[:, :-1] > 0)).sum())
    whole = model(ids, attention_mask=mask, labels=labels).metrics["loss_token"]
    parts = [model(ids[i : i + 1], attention_mask=mask[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count)
             for i in range(3)]
    torch.testing.assert_close(sum(part.metrics["loss_token"] for part in parts), whole)


def test_padding_changes_no_loss(reasoner):
    model, ids = small(reasoner), random_ids(2, 6)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = (padded > 0).long()
    alone = model(ids, labels=ids)
    beside = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    for name, value in alone.metrics.items():
        torch.testing.assert_close(beside.metrics[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_batch_without_labels_gives_a_finite_loss(reasoner):
    model, ids = small(reasoner).train(), random_ids(1, 1)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_labels_refuse_logits_to_keep(reasoner):
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="leave logits_to_keep out"):
        small(reasoner)(ids, labels=ids, logits_to_keep=2)


# --- gate -------------------------------------------------------------------------------------------------------------


def test_without_the_gate_every_token_runs_every_cycle(reasoner):
    model, (ids, mask) = stopping(reasoner), left_padded()
    out = model(ids, attention_mask=mask, adaptive_cycles=False)
    assert torch.equal(out.cycles_used, 4 * mask)
    with model.all_cycles():
        assert torch.equal(model(ids, attention_mask=mask).logits, out.logits)
    assert model.config.adaptive_cycles
    assert torch.equal(model.train()(ids, attention_mask=mask).cycles_used, 4 * mask)  # off in training mode
    model.eval().config.adaptive_cycles = False
    assert torch.equal(model(ids, attention_mask=mask).logits, out.logits)


def test_an_untrained_gate_stops_nothing(reasoner):
    model, (ids, mask) = small(reasoner), left_padded()
    assert torch.equal(model(ids, attention_mask=mask).cycles_used, 4 * mask)


def test_the_gate_stops_tokens_where_it_says_and_leaves_their_state(reasoner):
    model, ids = stopping(reasoner), random_ids(3, 12)
    meter = CycleMeter()
    used = model(ids, cycles_log=meter).cycles_used
    assert set(used.unique().tolist()) >= {1, 2, 4}  # stops early, later and never
    assert meter.tokens == 36 and meter.mean == pytest.approx(used.float().mean().item())
    first = model.model(ids, max_cycles=1).last_hidden_state
    torch.testing.assert_close(model.model(ids).last_hidden_state[used == 1], first[used == 1])
    assert torch.equal(model.model.stops(first), used == 1)


def test_stopped_tokens_cost_nothing(reasoner):
    model, ids = stopping(reasoner), random_ids(6, 1)
    seen = []
    for layer in model.model.worker:
        layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2].numel()))
    used = model(ids).cycles_used
    assert sum(seen) == 2 * int(used.sum()) < 2 * 4 * 6  # one token a row: rows are left out exactly
    seen.clear()
    ids = random_ids(2, 12)
    used = model(ids).cycles_used
    running = [used >= cycle for cycle in (1, 2, 3, 4)]
    widest = [int(mask.any(dim=1).sum() * mask.sum(dim=1).max()) for mask in running]
    assert sum(seen) == 2 * sum(widest) < 2 * 4 * 24


def test_later_tokens_read_a_stopped_token_as_it_was_when_it_stopped(reasoner):
    model, ids = stopping(reasoner), random_ids(2, 8)
    cache = DynamicCache()
    used = model(ids, past_key_values=cache, use_cache=True).cycles_used
    for row, place in (used < 4).nonzero().tolist():
        last = int(used[row, place]) - 1
        for cycle in range(last + 1, 4):
            for layer in range(3):
                kept, copied = cache.layers[last * 3 + layer], cache.layers[cycle * 3 + layer]
                assert torch.equal(copied.keys[row, :, place], kept.keys[row, :, place])
                assert torch.equal(copied.values[row, :, place], kept.values[row, :, place])


def test_packing_chosen_tokens_and_back_keeps_every_value():
    active = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    whole = torch.arange(12.0).view(3, 4, 1)
    chosen = Chosen.of(active)
    assert chosen.take(whole)[chosen.real].flatten().tolist() == [0, 2, 3, 9]
    back = chosen.put(whole, -chosen.take(whole))
    assert torch.equal(back, torch.where(active[..., None], -whole, whole))


# --- cache and generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("cycles", [1, 3, 6])
def test_cached_equals_uncached_with_left_padding(reasoner, gate, cycles):
    model, (ids, mask) = stopping(reasoner), left_padded(rows=4, tokens=14)
    whole = model(ids, attention_mask=mask, adaptive_cycles=gate, max_cycles=cycles)
    cache = DynamicCache(config=model.config)
    logits, used, start = [], [], 0
    for stop in (8, 9, 10, 13, 14):  # a prompt, single tokens, several at once
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True,
                    adaptive_cycles=gate, max_cycles=cycles)
        logits, used, start = logits + [out.logits], used + [out.cycles_used], stop
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], whole.logits[real], atol=1e-4, rtol=0)
    assert torch.equal(torch.cat(used, 1), whole.cycles_used)
    assert all(layer.get_seq_length() == 14 for layer in cache.layers[: cycles * 3])


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0}, {"max_cycles": 2}]
)
def test_generate_gives_the_same_with_and_without_the_cache(reasoner, gate, how):
    model, (ids, mask) = stopping(reasoner), left_padded()
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        arguments = {"do_sample": False, "max_new_tokens": 8, "adaptive_cycles": gate} | how
        answers.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **arguments))
    assert torch.equal(*answers)
    assert answers[0].shape[1] > 12 and len(answers[0]) == 3 * how.get("num_return_sequences", 1)


def test_generate_obeys_max_cycles_and_reports_cycles(reasoner):
    model, (ids, mask) = small(reasoner), left_padded()
    meters = {}
    for cycles in (None, 2, 6):
        meters[cycles] = CycleMeter()
        model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                       max_cycles=cycles, cycles_log=meters[cycles])
    assert [meters[cycles].mean for cycles in (None, 2, 6)] == [4, 2, 6]
    assert meters[2].tokens == int(mask.sum()) + 3 * 3


def test_generation_in_a_padded_batch_equals_generation_alone(reasoner):
    model, (ids, mask) = stopping(reasoner), left_padded()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, 2 * row :], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(together[row, 9:], alone[0, 9 - 2 * row :])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"max_cycles": 0}, "max_cycles must be at least 1"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must be \(B, past \+ tokens\)"),
    ],
)
def test_a_call_that_cannot_be_right_is_refused(reasoner, arguments, told):
    with pytest.raises(ValueError, match=told):
        small(reasoner)(random_ids(2, 4), **arguments)


def test_a_static_cache_is_refused(reasoner):
    with pytest.raises(ValueError, match="static caches are not supported"):
        small(reasoner).generate(random_ids(1, 4), max_new_tokens=2, cache_implementation="static")


# --- heads ------------------------------------------------------------------------------------------------------------


def counted(rows: int, seed: int) -> torch.Tensor:
    """(rows, 12) ids: a random start of 20, then its two successors, again and again: 2 of 3 tokens are certain."""
    start = torch.randint(20, (rows, 4, 1), generator=torch.Generator().manual_seed(seed))
    return (50 + (start + torch.arange(3)) % 20).flatten(1)


@pytest.fixture(scope="module")
def trained(reasoner):
    model = small(reasoner, max_cycles=2, thought_weight=1.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(250):
            ids = counted(32, seed=step)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_ema()
    return model.eval()


def test_thoughts_predict_the_next_better_than_their_mean_and_do_not_collapse(trained):
    ids = counted(64, seed=10_000)
    parts = trained(ids, labels=ids).metrics
    assert parts["loss_thought_next"] < 0.8 * parts["thought_mean_error"]
    assert parts["thought_spread"] > 0.9
    thoughts = trained(ids).thoughts.detach()
    assert thoughts.shape == (64, 12, 16)
    assert torch.linalg.matrix_rank(thoughts.flatten(0, 1) - thoughts.mean((0, 1)), rtol=0.05) >= 8


def test_the_gate_learns_the_entropy_of_the_token_head(trained):
    ids = counted(64, seed=10_001)
    out = trained(ids, adaptive_cycles=False)
    guessed, sure = trained.model.gate(trained.model(ids, adaptive_cycles=False).last_hidden_state)
    entropy, confidence = certainty(out.logits)
    for guess, truth in ((guessed, entropy), (sure, confidence)):
        assert (guess - truth).pow(2).mean() < 0.1 * truth.var()
    guessed, sure = trained.model.gate(trained.model(ids, max_cycles=1).last_hidden_state)  # after one cycle too
    entropy, confidence = certainty(trained(ids, max_cycles=1).logits)
    assert (sure - confidence).pow(2).mean() < 0.3 * confidence.var()
    trained.config.confidence_threshold, trained.config.entropy_threshold = 0.8, 0.1
    used = trained(counted(64, seed=10_002)).cycles_used[:, 2:]
    starts = torch.arange(2, 12) % 3 == 2  # the next token is a fresh start
    assert used[:, starts].float().mean() > 1.9 > 1.4 > used[:, ~starts].float().mean()


def test_certainty_of_known_distributions():
    entropy, confidence = certainty(torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(entropy, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(confidence, torch.tensor([0.25, 1.0]))


def test_the_gate_s_loss_moves_the_gate_alone(reasoner):
    model, ids = small(reasoner), random_ids(2, 6)
    out = model.model(ids)
    logits = model.lm_head(out.last_hidden_state)
    model.model.gate.loss(out.last_hidden_state.flatten(0, 1), logits.flatten(0, 1)).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        f"model.gate.{name}" for name in ("inner.weight", "outer.weight", "outer.bias")
    }


def test_the_thought_target_follows_by_ema_is_saved_and_is_not_trained(reasoner, tmp_path):
    model = small(reasoner)
    head = model.thought_head
    assert "thought_head.target" not in dict(model.named_parameters()) and not head.target.requires_grad
    with torch.no_grad():
        head.project.weight.add_(1.0)
    before, goal = head.target.clone(), head.project.weight.detach()
    model.update_ema()
    torch.testing.assert_close(head.target, 0.99 * before + 0.01 * goal)
    model.save_pretrained(tmp_path)
    loaded = EnhancedHRMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.thought_head.target, head.target)  # float32: bfloat16 would round each update away
    assert loaded.thought_head.project.weight.dtype == torch.bfloat16


def test_thought_losses_of_known_states():
    head = ThoughtHead(4, 4)
    with torch.no_grad():
        head.project.weight.copy_(torch.eye(4))
        head.target.copy_(2 * torch.eye(4))
    head.predict = torch.nn.Identity()
    state = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 3)
    mask[0, 0] = 0  # a left pad: its pair is left out
    here, after = state[:, :-1].reshape(-1, 4)[1:], state[:, 1:].reshape(-1, 4)[1:]
    losses = head.losses(state, mask)
    torch.testing.assert_close(losses["next"], F.mse_loss(here, 2 * after))
    torch.testing.assert_close(losses["mean_error"], F.mse_loss((2 * after).mean(0).expand_as(after), 2 * after))
    covariance = torch.cov(here.T)
    apart = covariance - torch.diag(covariance.diag())
    torch.testing.assert_close(losses["covariance"], apart.pow(2).sum() / 4)
    torch.testing.assert_close(losses["variance"], F.relu(1 - (covariance.diag() + 1e-4).sqrt()).mean())


# --- saving, libraries ------------------------------------------------------------------------------------------------


def test_a_saved_model_is_loaded_by_the_auto_classes_with_its_tied_embedding(reasoner, tmp_path):
    model, ids = stopping(reasoner), random_ids(2, 6)
    model.save_pretrained(tmp_path)
    reasoner.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is EnhancedHRMForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    answer = pipeline("text-generation", model=str(tmp_path), device="cpu")
    text = answer("12 + 7 =", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    prompt = reasoner("12 + 7 =", return_tensors="pt").input_ids
    ours = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
    assert text == reasoner.decode(ours, skip_special_tokens=True)


def test_an_untied_model_keeps_its_own_head(reasoner, tmp_path):
    model, ids = small(reasoner, tie_word_embeddings=False), random_ids(1, 5)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and model.parameter_shares()["head"] > 0
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_gradient_checkpointing_changes_no_gradient(reasoner):
    model, (ids, mask) = small(reasoner).train(), left_padded()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert model.is_activation_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)  # in training mode, with a cache


def test_trl_s_log_probabilities_are_the_model_s_own(reasoner, tmp_path):
    from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id

    model, (ids, mask) = small(reasoner).train(), left_padded()
    labels = ids.masked_fill(mask == 0, -100)
    logits = model(ids, attention_mask=mask, logits_to_keep=5).logits[:, :-1] / 0.7
    own = F.log_softmax(logits, dim=-1).gather(2, ids[:, -4:, None])[..., 0]
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(theirs[:, -4:], own, atol=1e-5, rtol=1e-5)
    reference = create_model_from_path(get_config_model_id(model.config))  # what GRPO does where beta > 0
    assert torch.equal(reference.lm_head.weight, model.lm_head.weight)


# --- config, tokenizer ------------------------------------------------------------------------------------------------


def test_every_bad_setting_is_told_at_once():
    with pytest.raises(ValueError) as caught:
        EnhancedHRMConfig(d_model=30, n_heads=4, max_cycles=0, thought_ema=1.5, gate_weight=-1.0)
    told = str(caught.value)
    assert "\n" not in told
    for part in ("d_model 30", "max_cycles must be at least 1", "thought_ema must lie in 0..1", "gate_weight must not"):
        assert part in told


def test_reasoning_tags_are_single_tokens_that_survive_decoding(reasoner):
    assert len({reasoner.convert_tokens_to_ids(tag) for tag in REASONING_TOKENS}) == 10
    text = "a<think>12 + 7</think><SOLUTION>19</SOLUTION>."
    ids = reasoner.encode(text, add_special_tokens=False)
    for tag in ("<think>", "</think>", "<SOLUTION>", "</SOLUTION>"):
        assert ids.count(reasoner.convert_tokens_to_ids(tag)) == 1
    assert reasoner.decode(ids + [reasoner.eos_token_id], skip_special_tokens=True) == text


def test_the_embedded_tokenizer_is_the_default_and_fits_the_model():
    model, tokenizer = create_hrm_model_and_tokenizer(d_model=32, n_heads=2, n_planner_layers=1, n_worker_layers=1)
    check_reasoning_tokenizer(tokenizer)
    assert model.config.vocab_size == len(tokenizer) == len(model.model.embed_tokens.weight)
    assert (model.config.max_cycles, model.config.thought_dim) == (4, 256)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id


def test_a_bare_tokenizer_gains_padding_and_a_chat_template_that_survives_saving(plain_tokenizer, tmp_path):
    plain_tokenizer.pad_token = plain_tokenizer.eos_token
    plain_tokenizer.save_pretrained(tmp_path / "plain")
    made = reasoning_tokenizer(str(tmp_path / "plain"))
    made.save_pretrained(tmp_path / "made")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "made")
    chat = [{"role": "user", "content": "2 + 2?"}]
    for tokenizer in (made, loaded, reasoning_tokenizer(str(tmp_path / "made"))):
        check_reasoning_tokenizer(tokenizer)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id and len(tokenizer) == len(made)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids[-1] == made.convert_tokens_to_ids("<|assistant|>")
        assert ids[:-1] == tokenizer.apply_chat_template(chat, return_dict=False)
    assert loaded.chat_template == CHAT_TEMPLATE and loaded.padding_side == "left"


def test_a_tokenizer_without_the_tags_is_refused_in_one_line(tokenizer):
    for refuse in (check_reasoning_tokenizer, lambda t: create_hrm_model_and_tokenizer(tokenizer=t)):
        with pytest.raises(ValueError, match="no single token for <think>") as caught:
            refuse(tokenizer)
        assert "\n" not in str(caught.value)


def test_tags_that_decoding_drops_are_refused(plain_tokenizer):
    plain_tokenizer.add_special_tokens({"additional_special_tokens": list(REASONING_TOKENS)})
    with pytest.raises(ValueError, match="decoding drops <think>"):
        check_reasoning_tokenizer(plain_tokenizer)


def test_an_unknown_tokenizer_is_refused_in_one_line():
    with pytest.raises(ValueError, match="--tokenizer no/such-tokenizer") as caught:
        reasoning_tokenizer("no/such-tokenizer")
    assert "\n" not in str(caught.value)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_the_mask_lets_nobody_read_later_columns_or_pads():
    mask = causal_mask(torch.tensor([[0, 1, 1, 1]]), tokens=2)
    assert mask[0, 0].tolist() == [[False, True, True, False], [False, True, True, True]]
    assert causal_mask(torch.ones(2, 5), tokens=1) is None


def test_the_module_says_what_it_registers():
    assert enhanced.AutoConfig.for_model("enhanced_hrm").num_hidden_layers == 40
    assert math.isnan(CycleMeter().mean)
