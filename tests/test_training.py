"""training: one step equals a plain loop written here, what it refuses to do, and what it must never touch."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import options
from batching import Batch, PromptFormat, pad
from engine.batches import IGNORE
from engine.muon import Muon
from engine.optimization import (
    MAX_SCALER_SKIPS,
    Ema,
    NonFiniteError,
    OptimConfig,
    build_optimizers,
    seed_of_step,
)
from engine.schedule import COOLDOWN, ScheduleConfig, learning_rate
from evaluation import Decoding, answer
from host import HostError, host_logits
from hrm_blocks import Carry
from injector import Thought
from reasoning_gym_wrapper import Reserve, make_tasks
from tiny_families import randomise
from tiny_runs import TINY, controller_of, tiny_trainer
from training import AddonStepConfig, Trainer, learns_by_muon, segments_of_step

SCHEDULERS = ["cosine", "linear", "constant", "wsd"]
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def settings(**changes) -> options.Options:
    """Options of a tiny run: fixed initial states, deep supervision, no averaging, unless `changes` say otherwise."""
    opts = options.parse(TINY)
    plain = {"init_state": "fixed", "segments_sampling": "fixed", "supervised_segments": 0, "ema": 0.0, "lr": 1e-2,
             "optimizer": "adamw", "reset_l": False, "grad_horizon": "full"}
    assert set(changes) <= set(vars(opts))
    return options.replace(opts, **{**plain, **changes})


@pytest.fixture
def make(tiny_host):
    """Builds a Trainer; its model is the same each time, its zero factors random as after some training."""
    def build(trained=True, verdicts=None, precision="none", **changes) -> Trainer:
        opts = settings(model_name=str(tiny_host), **changes)
        torch.manual_seed(0)
        model = controller_of(opts)
        return tiny_trainer(opts, randomise(model) if trained else model, precision, verdicts)
    return build


@pytest.fixture(scope="module")
def prompts(tokenizer) -> PromptFormat:
    return PromptFormat(tokenizer)


@pytest.fixture(scope="module")
def batches(prompts) -> list[Batch]:
    """Three batches of eight; prompts and targets of several lengths."""
    examples = Reserve(make_tasks(["toy_add"], "default"), 24).examples
    return [prompts.batch(examples[start : start + 8]) for start in (0, 8, 16)]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def gradients(trainer: Trainer, batches: list[Batch], step: int = 0) -> tuple[list[dict], dict]:
    """(gradients of each supervised segment before clipping, metrics) of a step that is not taken."""
    taken = []

    def record(step: int, loss: float) -> float:
        taken.append({name: p.grad.clone() for name, p in trainer.parameters.items()})
        trainer._forget_gradients()
        return 0.0

    trainer._update = record
    metrics = trainer.step(batches, step, lr=0.0)
    return taken, metrics


# --- one step against a plain loop


class PlainAdamW:
    """AdamW (arXiv 1711.05101) as its paper writes it; decay on matrices alone."""

    def __init__(self, parameters, betas, decay):
        self.parameters, self.betas, self.decay, self.t = parameters, betas, decay, 0
        self.m = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, grads, lr):
        self.t += 1
        first, second = self.betas
        for name, p in self.parameters.items():
            g = grads[name]
            self.m[name] = first * self.m[name] + (1 - first) * g
            self.v[name] = second * self.v[name] + (1 - second) * g * g
            m, v = self.m[name] / (1 - first**self.t), self.v[name] / (1 - second**self.t)
            if p.ndim >= 2:
                p -= lr * self.decay * p
            p -= lr * m / (v.sqrt() + 1e-8)


def plain_segment(model, states, labels, carry) -> tuple[torch.Tensor, object]:
    """Loss of one segment: mean cross-entropy over the labelled tokens, position t predicting target t."""
    carry = model.model.advance(states.features, states.context, carry)
    hidden, _ = model.model.inject(states.slots, Thought(carry.z_high, states.context))
    logits = host_logits(model.host, hidden)
    losses = [F.cross_entropy(logits[row, t], labels[row, t]) for row, t in (labels != IGNORE).nonzero().tolist()]
    return torch.stack(losses).mean(), carry


def plain_training(trainer: Trainer, batches: list[Batch], lr: float, segments: int, burn_in: int) -> list[float]:
    """Trains a copy in the obvious way; returns the losses and leaves the copy's weights in `trainer.plain`."""
    optim, model = trainer.optim, copy.deepcopy(trainer.controller).train()
    parameters = model.addon_parameters()
    optimizer, losses = PlainAdamW(parameters, (optim.beta1, optim.beta2), optim.weight_decay), []
    for batch in batches:
        states, carry = model.encode(batch), None
        for segment in range(segments):
            with torch.set_grad_enabled(segment >= burn_in):
                loss, carry = plain_segment(model, states, batch.labels, carry)
            carry = carry.detach()
            if segment < burn_in:
                continue
            grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads.values()))
            if optim.grad_clip and norm > optim.grad_clip:
                grads = {name: g * optim.grad_clip / norm for name, g in grads.items()}
            optimizer.step(grads, lr)
            losses.append(float(loss.detach()))
    trainer.plain = {name: p.detach() for name, p in parameters.items()}
    return losses


@pytest.mark.parametrize("changes,burn_in", [
    ({}, 0), ({"grad_clip": 0.05}, 0), ({"grad_clip": 0.0, "weight_decay": 0.0}, 0),
    ({"supervised_segments": 1}, 2), ({"supervised_segments": 2, "grad_horizon": "one_step", "inner_T": 2}, 1)])
def test_a_step_equals_a_plain_loop(make, batches, changes, burn_in):
    trainer = make(segments=3, **changes)
    losses = plain_training(trainer, batches, 3e-3, segments=3, burn_in=burn_in)
    told = [trainer.step([batch], step, 3e-3) for step, batch in enumerate(batches)]
    supervised = 3 - burn_in
    assert [m["loss"] for m in told] == pytest.approx(losses[supervised - 1 :: supervised], rel=1e-5)
    for name, weight in weights(trainer).items():
        torch.testing.assert_close(weight, trainer.plain[name], rtol=1e-4, atol=1e-5, msg=name)
    steps = {int(state["step"]) for state in trainer.optimizers[0][0].state.values()}
    assert steps == {supervised * len(batches)}  # one optimizer step per supervised segment


def test_metrics_say_what_was_done(make, batches):
    told = make(segments=3).step([batches[0]], 0, 1e-3)
    assert told["lr"] == 1e-3 and told["segments"] == 3 and told["examples"] == 8
    assert told["tokens"] == int((batches[0].labels != IGNORE).sum())
    assert told["loss"] == told["answer_loss"] > 0 and 0 <= told["teacher_forced_exact"] <= 1 and told["grad_norm"] > 0


def test_two_micro_batches_equal_one_batch_in_loss_and_gradients(make, prompts, batches):
    examples = sorted(batches[0].examples, key=lambda e: len(e.question) + len(e.target))  # halves of unlike lengths
    whole, halves = prompts.batch(examples), [prompts.batch(examples[:4]), prompts.batch(examples[4:])]
    assert int((halves[0].labels != IGNORE).sum()) != int((halves[1].labels != IGNORE).sum())
    one, told = gradients(make(segments=3), [whole])
    two, told_two = gradients(make(segments=3), halves)
    assert told_two["loss"] == pytest.approx(told["loss"], rel=1e-6) and told_two["tokens"] == told["tokens"]
    assert told_two["teacher_forced_exact"] == pytest.approx(told["teacher_forced_exact"])
    for ours, theirs in zip(two, one, strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], **CLOSE, msg=name)


def test_lora_is_read_anew_in_every_segment_and_learns(make, batches):
    trainer = make(segments=3, lora_layers=1)
    before = weights(trainer)
    trainer.step([batches[0]], 0, 1e-2)
    moved = [name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])]
    assert set(moved) == set(before) and any("lora_A" in name for name in before)
    grads, _ = gradients(make(segments=3, lora_layers=1), [batches[0]])
    assert len(grads) == 3 and all(g["model.addon.read.weight"].abs().sum() > 0 for g in grads)


def test_the_same_step_draws_the_same_numbers_whatever_came_before(make, batches):
    trainer = make(init_state="random", segments=2)
    first, _ = gradients(trainer, [batches[0]], step=5)
    torch.randn(7)
    again, _ = gradients(trainer, [batches[0]], step=5)
    other, _ = gradients(trainer, [batches[0]], step=6)
    name = "model.addon.read.weight"
    assert torch.equal(first[0][name], again[0][name]) and not torch.equal(first[0][name], other[0][name])


# --- schedule, segments, seeds, optimizer


def test_the_schedule_warms_up_and_falls_to_its_floor():
    schedule = ScheduleConfig(lr=0.4, lr_scheduler="linear", lr_min_ratio=0.25)
    assert [learning_rate(schedule, step, step / 100, 4) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    for scheduler, half in (("linear", 0.25), ("cosine", 0.25), ("constant", 0.4), ("wsd", 0.4)):
        schedule = ScheduleConfig(lr=0.4, lr_scheduler=scheduler, lr_min_ratio=0.25)
        start, middle, end = (learning_rate(schedule, 50, progress, 4) for progress in (0.0, 0.5, 1.0))
        assert start == pytest.approx(0.4) and middle == pytest.approx(half)
        assert end == pytest.approx(0.4 if scheduler == "constant" else 0.1)
    cosine, linear = (ScheduleConfig(lr=1.0, lr_scheduler=name) for name in ("cosine", "linear"))
    assert learning_rate(cosine, 9, 0.25, 0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(linear, 9, 0.25, 0) == pytest.approx(0.75)


@given(st.sampled_from(SCHEDULERS), st.floats(0, 1), st.floats(0, 1), st.integers(0, 50))
def test_after_the_warmup_the_rate_stays_between_floor_and_peak(scheduler, floor, progress, warmup):
    schedule = ScheduleConfig(lr=0.3, lr_scheduler=scheduler, lr_min_ratio=floor)
    assert 0.3 * floor - 1e-12 <= learning_rate(schedule, warmup, progress, warmup) <= 0.3 + 1e-12


@given(st.sampled_from(SCHEDULERS), st.floats(0, 1), st.integers(1, 200), st.integers(0, 300))
def test_the_rate_reaches_its_peak_once_and_never_drops_at_once(scheduler, floor, total, warmup):
    """Up to the peak, then down from it: over what the warmup leaves, however long the warmup is."""
    schedule = ScheduleConfig(lr=0.3, lr_scheduler=scheduler, lr_min_ratio=floor)
    warmed = min(warmup / total, 1.0)
    rates = [learning_rate(schedule, step, step / total, warmup, warmed) for step in range(total)]
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    assert max(rates) == pytest.approx(0.3 if warmup <= total else 0.3 * total / warmup)
    if rise and fall:
        assert rise[-1] == pytest.approx(0.3) and fall[0] == pytest.approx(0.3)
    steps_down = [earlier - later for earlier, later in zip(fall, fall[1:], strict=False)]
    steepest = 1 / COOLDOWN if scheduler == "wsd" else math.pi / 2
    assert all(step <= 0.3 * steepest / len(fall) + 1e-12 for step in steps_down), "no step is a leap"


def test_over_the_whole_run_the_rate_is_that_of_older_runs():
    before = ScheduleConfig(lr=1.0, lr_fall="whole_run")
    assert learning_rate(before, 50, 0.5, 50, 0.5) == pytest.approx(0.5)
    now = ScheduleConfig(lr=1.0)
    assert learning_rate(now, 50, 0.5, 50, 0.5) == pytest.approx(1.0)
    assert [learning_rate(now, step, step / 9, 0, 0.0) for step in range(9)] == [
        learning_rate(before, step, step / 9, 0, 0.0) for step in range(9)]


def test_drawn_segments_cover_their_range_and_depend_on_seed_and_step_alone():
    config = AddonStepConfig(segments=4, segments_sampling="uniform")
    drawn = [segments_of_step(config, step) for step in range(400)]
    assert {drawn.count(n) > 60 for n in range(1, 5)} == {True} and set(drawn) == {1, 2, 3, 4}
    torch.manual_seed(9)
    assert drawn == [segments_of_step(config, step) for step in range(400)]
    other = AddonStepConfig(segments=4, segments_sampling="uniform", seed=1)
    assert drawn != [segments_of_step(other, step) for step in range(400)]
    assert {segments_of_step(AddonStepConfig(segments=4), step) for step in range(50)} == {4}
    assert len({segments_of_step(AddonStepConfig(segments=4, use_act=True), step) for step in range(50)}) == 4


def test_growing_segments_begin_with_one_and_end_with_all():
    config = AddonStepConfig(segments=4, segments_sampling="growing")
    most = [max(segments_of_step(config, step, progress) for step in range(60)) for progress in
            (0.0, 0.24, 0.25, 0.5, 0.75, 1.0)]
    assert most == [1, 1, 2, 3, 4, 4]
    assert {segments_of_step(config, step, 1.0) for step in range(60)} == {1, 2, 3, 4}
    uniform = AddonStepConfig(segments=4, segments_sampling="uniform")
    assert segments_of_step(config, 7, 1.0) == segments_of_step(uniform, 7)


def test_a_trainer_draws_by_the_share_of_the_run_that_the_loop_gives_it(make, batches):
    trainer = make(segments=4, segments_sampling="growing", supervised_segments=1)
    counts = {}
    for progress in (0.0, 1.0):
        trainer.progress = progress
        counts[progress] = {gradients(trainer, [batches[0]], step)[1]["segments"] for step in range(12)}
    assert counts == {0.0: {1}, 1.0: {1, 2, 3, 4}}


@pytest.mark.parametrize("split", [1, 2])
def test_segments_follow_the_items_that_say_their_steps_however_a_batch_is_split(make, batches, split):
    trainer = make(segments=8, segments_sampling="item", supervised_segments=1)
    needed = [2, 3, None, None]  # a grid without a solution says none
    entries = [{"metadata": {} if steps is None else {"steps": steps}} for steps in needed]
    examples = [replace(example, entry=entry) for example, entry in zip(batches[0].examples[:4], entries, strict=True)]
    size = len(examples) // split
    parts = [replace(batches[0], examples=examples[start : start + size]) for start in range(0, len(examples), size)]
    assert trainer._segments(parts, 0) == 3

    # Where no item says its steps, all segments are taken.
    assert trainer._segments([replace(batches[0], examples=examples[2:])], 0) == 8


def test_without_carried_states_every_supervised_segment_is_the_first(make, batches):
    grads = {carry: gradients(make(segments=3, carry_state=carry), [batches[0]])[0] for carry in (True, False)}
    name = "model.addon.read.weight"
    assert len(grads[True]) == len(grads[False]) == 3 and torch.equal(grads[True][0][name], grads[False][0][name])
    assert all(torch.equal(later[name], grads[False][0][name]) for later in grads[False][1:])
    assert not any(torch.equal(later[name], grads[True][0][name]) for later in grads[True][1:])


def through_segments(trainer: Trainer, batch: Batch, before: int, length: int) -> dict[str, torch.Tensor]:
    """The gradient of the last of `length` segments through all of them, after `before` ones without gradient."""
    model = copy.deepcopy(trainer.controller).train()
    parameters = model.addon_parameters()
    states, carry = model.encode(batch), None
    for _ in range(before):
        carry = model.model.advance(states.features, states.context, carry).detach()
    for _ in range(length - 1):
        carry = model.model.advance(states.features, states.context, carry)
    loss, _ = plain_segment(model, states, batch.labels, carry)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, grads, strict=True) if g is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("horizon,before,length", [("full", 3, 1), ("segments:1", 3, 1), ("segments:2", 2, 2),
                                                   ("segments:4", 0, 4), ("segments:9", 0, 4)])
def test_the_gradient_runs_through_as_many_segments_as_named(make, batches, horizon, before, length, recompute):
    trainer = make(segments=4, supervised_segments=1, grad_horizon=horizon, recompute_segments=recompute,
                   state_mix="sum")
    taken, _ = gradients(trainer, [batches[0]])
    expected = through_segments(trainer, batches[0], before, length)
    assert len(taken) == 1 and len(expected) > 5
    for name, gradient in expected.items():
        torch.testing.assert_close(taken[0][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_horizon_slides_along_with_the_supervised_segments(make, batches):
    trainer = make(segments=4, supervised_segments=4, grad_horizon="segments:2", state_mix="sum")
    taken, _ = gradients(trainer, [batches[0]])
    for segment, (before, length) in enumerate([(0, 1), (0, 2), (1, 2), (2, 2)]):
        expected = through_segments(trainer, batches[0], before, length)
        for name, gradient in expected.items():
            torch.testing.assert_close(taken[segment][name], gradient, rtol=1e-4, atol=1e-6, msg=f"{segment} {name}")


def test_segments_are_drawn_from_the_steps_that_the_batch_needs(make, prompts):
    config = AddonStepConfig(segments=8, segments_sampling="steps")
    assert {segments_of_step(config, step, needed=3) for step in range(100)} == {3, 4, 5, 6}
    assert {segments_of_step(config, step, needed=6) for step in range(100)} == {6, 7, 8}
    assert {segments_of_step(config, step, needed=20) for step in range(100)} == {8}

    longer = AddonStepConfig(segments=16, segments_sampling="steps", segments_stretch=4)
    assert {segments_of_step(longer, step, needed=3) for step in range(200)} == set(range(3, 13))
    assert {segments_of_step(longer, step, needed=5) for step in range(200)} == set(range(5, 17))

    trainer = make(segments=8, segments_sampling="steps", supervised_segments=1)
    examples = Reserve(make_tasks(["toy_chain"], '{"toy_chain": {"max_steps": 3}}'), 24).examples
    hard = [example for example in examples if example.entry["metadata"]["steps"] == 3]
    easy = [example for example in examples if example.entry["metadata"]["steps"] == 1]
    for chosen, needed in ((hard[:1] + easy[:3], 3), (easy[:4], 1)):
        batch = prompts.batch(chosen)
        counts = {gradients(trainer, [batch], step)[1]["segments"] for step in range(12)}
        assert counts == set(range(needed, 2 * needed + 1))


def test_noise_blurs_the_carried_state_in_training_alone(make, batches):
    controller = make(segments=2, carry_noise=0.5).controller
    states = controller.encode(batches[0])
    model = controller.model.train()
    first = model.advance(states.features, states.context, None)
    assert torch.equal(first.z_high, model.advance(states.features, states.context, None).z_high)
    blurred = [model.advance(states.features, states.context, first).z_high for _ in range(2)]
    assert not torch.equal(*blurred)
    model.eval()
    plain = [model.advance(states.features, states.context, first).z_high for _ in range(2)]
    assert torch.equal(*plain) and not torch.equal(plain[0], blurred[0])


def test_noise_is_a_share_of_the_state():
    torch.manual_seed(0)
    size = torch.tensor([1.0, 10.0])[:, None, None]  # of each example
    state = size * torch.randn(2, 40, 64)
    noisy = Carry(state, state, torch.zeros(2), torch.zeros(2)).noisy(0.1)
    for z in (noisy.z_high, noisy.z_low):
        added = (z - state).square().mean(dim=(1, 2)).sqrt()
        torch.testing.assert_close(added, 0.1 * size.flatten(), rtol=0.1, atol=0)
    assert not torch.equal(noisy.z_high, noisy.z_low)


def test_each_item_has_as_many_segments_as_it_needs_steps(make, prompts):
    trainer = make(segments=8, segments_sampling="item", supervised_segments=1, grad_horizon="segments:8")
    examples = Reserve(make_tasks(["toy_chain"], '{"toy_chain": {"max_steps": 3}}'), 24).examples
    by_steps = {steps: [item for item in examples if item.entry["metadata"]["steps"] == steps] for steps in (1, 3)}
    mixed = prompts.batch([by_steps[3][0], by_steps[1][0]])
    (states,) = trainer._encode([mixed])
    assert states.context.needed.tolist() == [3, 1]

    # The easy item's state after three segments is the one it had after its own.
    carries = [trainer.controller.model.advance(states.features, states.context, None)]
    for _ in range(2):
        carries.append(trainer.controller.model.advance(states.features, states.context, carries[-1]))
    assert carries[-1].steps.tolist() == [3, 1]
    assert torch.equal(carries[-1].z_high[1], carries[0].z_high[1])
    assert not torch.equal(carries[-1].z_high[0], carries[0].z_high[0])

    # So the batch's gradient is the mean of what each gives alone, the answers being equally long.
    (whole,), metrics = gradients(trainer, [mixed])
    assert metrics["segments"] == 3
    parts = []
    for steps in (3, 1):
        (part,), metrics = gradients(trainer, [prompts.batch(by_steps[steps][:1])])
        assert metrics["segments"] == steps
        parts.append(part)
    for name, gradient in whole.items():
        expected = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6, msg=name)


def test_answers_are_given_after_as_many_segments_as_the_item_needs(make, prompts):
    model = make(segments=4, state_mix="sum").controller.eval()
    examples = Reserve(make_tasks(["toy_chain"], '{"toy_chain": {"max_steps": 6}}'), 24).examples
    answers = answer(model, prompts, examples, Decoding(item_segments=True, max_new_tokens=2))
    expected = [min(item.entry["metadata"]["steps"], 4) for item in examples]
    assert [given.segments for given in answers] == expected and len(set(expected)) == 4
    assert {given.segments for given in answer(model, prompts, examples, Decoding(max_new_tokens=2))} == {4}


def test_a_drawn_count_below_the_supervised_ones_supervises_all(make, batches):
    trainer = make(segments=3, segments_sampling="uniform", supervised_segments=2)
    for step in range(12):
        grads, told = gradients(trainer, [batches[0]], step)
        assert len(grads) == min(2, told["segments"])


def test_every_step_and_rank_has_a_seed_of_its_own():
    seeds = {seed_of_step(seed, step, rank, 2) for seed in range(3) for step in range(100) for rank in range(2)}
    assert len(seeds) == 600 and all(0 <= seed < 2**63 for seed in seeds)
    assert 0 <= seed_of_step(2**31 - 1, 2**40, 7, 8) < 2**63


def test_decay_is_for_matrices_alone_and_names_follow_the_optimizers_order(make):
    trainer = make(use_act=True, cab_mem=2)
    ((optimizer, names),) = trainer.optimizers
    decayed, plain = optimizer.param_groups
    assert {p.ndim >= 2 for p in decayed["params"]} == {True} and {p.ndim >= 2 for p in plain["params"]} == {False}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0) and decayed["betas"] == (0.9, 0.95)
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(trainer.parameters[name] is p for name, p in zip(names, ordered, strict=True))
    assert set(names) == set(trainer.parameters)


def test_muon_takes_hidden_matrices_and_adamw_the_rest(make, batches):
    trainer = make(optimizer="muon", use_act=True, cab_mem=2, lora_layers=1, logit_bias_head=True, verifier_weight=0.1,
                   verdicts=lambda batch: torch.ones(len(batch.examples)), verifier_every=1)
    (adamw, rest), (muon, hidden) = trainer.optimizers
    assert (type(adamw), type(muon)) == (torch.optim.AdamW, Muon)
    assert sorted(rest + hidden) == sorted(trainer.parameters)
    for optimizer, names in trainer.optimizers:
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(trainer.parameters[name] is p for name, p in zip(names, ordered, strict=True))
    short = {name.removeprefix("model.addon.") for name in hidden}
    assert {"read.weight", "core.h_block.layers.0.attention.qkv.weight", "injector.readout.down.weight"} <= short
    assert not {name for name in short if name.startswith(("injector.out", "vocabulary_bias.out", "core.halt", "ver"))}
    assert all(name in short for name in trainer.parameters if "lora_" in name)
    assert not {name for name in short if name.endswith((".bias", ".gate", "injector.memory"))}
    before = weights(trainer)
    trainer.step([batches[0]], 0, 1e-2)
    moved = {name: weight - before[name] for name, weight in weights(trainer).items()}
    assert all(float(change.abs().sum()) > 0 for change in moved.values())
    assert {group["lr"] for optimizer, _ in trainer.optimizers for group in optimizer.param_groups} == {1e-2}


def test_muon_moves_a_matrix_by_an_orthogonal_step_of_adamws_size():
    matrix = torch.nn.Parameter(torch.zeros(24, 16))
    config = OptimConfig(optimizer="muon", weight_decay=0.0, lr=1e-2)
    parameters = {"model.addon.read.weight": matrix, "b": torch.nn.Parameter(torch.ones(2))}
    _, (muon, names) = build_optimizers(config, parameters, learns_by_muon)
    matrix.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    muon.step()
    values = torch.linalg.svdvals(matrix.detach()) / (config.lr * 0.2 * math.sqrt(24))
    assert names == ["model.addon.read.weight"] and 0.6 < float(values.min()) and float(values.max()) < 1.4
    left, _, right = torch.linalg.svd(matrix.grad, full_matrices=False)
    direction = -matrix.detach() / (config.lr * 0.2 * math.sqrt(24))
    assert float((direction * (left @ right)).sum()) / 16 > 0.8  # the polar factor of the gradient


def test_the_8_bit_optimizer_is_the_8_bit_one_and_steps(make, batches):
    trainer = make(optimizer="adamw_8bit", d_h=64)
    before = weights(trainer)
    trainer.step([batches[0]], 0, 1e-2)
    ((optimizer, _),) = trainer.optimizers
    assert {state["state1"].dtype for state in optimizer.state.values()} >= {torch.uint8}
    assert all(not torch.equal(w, before[name]) and w.isfinite().all() for name, w in weights(trainer).items())
    plain = OptimConfig(optimizer="adamw")
    assert type(build_optimizers(plain, trainer.parameters, learns_by_muon)[0][0]) is torch.optim.AdamW


# --- averaging


def test_the_average_follows_its_formula_in_float32():
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, 0.9)
    expected = parameter.detach().double()
    for t in range(1, 120):
        parameter.data.normal_(generator=torch.Generator().manual_seed(t))
        ema.update()
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * parameter.detach().double()
    assert ema.average["w"].dtype == torch.float32 and ema.updates == 119
    torch.testing.assert_close(ema.average["w"].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_slow_average_still_moves_where_bfloat16_would_not():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, 0.9999)
    ema.updates = 10**6
    parameter.data.fill_(2.0)
    ema.update()
    assert torch.equal(torch.ones(3, dtype=torch.bfloat16) * 0.9999 + 2e-4, torch.ones(3, dtype=torch.bfloat16))
    torch.testing.assert_close(ema.average["w"], torch.full((3,), 1.0001))


def test_the_averaged_weights_are_lent_and_taken_back(make, batches):
    trainer = make(ema=0.9)
    trainer.step([batches[0]], 0, 1e-2)
    live = weights(trainer)
    with pytest.raises(ZeroDivisionError), trainer.evaluation_weights():
        for name, parameter in trainer.parameters.items():
            torch.testing.assert_close(parameter.detach(), trainer.ema.average[name], **EXACT)
            assert not torch.equal(parameter, live[name])
        raise ZeroDivisionError
    assert all(torch.equal(p, live[name]) for name, p in trainer.parameters.items())
    with make().evaluation_weights():  # without averaging: the live ones
        pass


# --- halting


def test_the_halting_target_is_greedy_generation_giving_the_gold_tokens(make, batches, prompts):
    trainer = make(use_act=True, segments=2)
    model, eos = trainer.controller.eval(), prompts.tokenizer.eos_token_id
    batch = batches[0]
    said = model.generate(batch.prompt_ids, attention_mask=batch.prompt_mask, max_new_tokens=3, do_sample=False,
                          eos_token_id=eos, pad_token_id=prompts.pad_id)[:, batch.prompt_ids.shape[1]:]
    gold = [row.tolist() for row in said]
    for row, place in ((1, 0), (4, 1), (6, 2)):  # wrong at the first, a middle, the last token
        gold[row][place] = (gold[row][place] + 1) % 300 + 6
    ids, mask = pad(gold, prompts.pad_id, "right")
    asked = Batch(batch.prompt_ids, batch.prompt_mask, ids, ids.masked_fill(mask == 0, IGNORE), batch.examples)
    states, carry = model.encode(asked), None
    for _ in range(2):
        out = model.segment(states, labels=asked.labels, carry=carry)
        carry = out.carry
    assert out.metrics["correct"].tolist() == [row not in (1, 4, 6) for row in range(8)]


def act_out(correct: list[bool], logits: list[float]) -> SimpleNamespace:
    metrics = {"correct": torch.tensor(correct), "halt_logits": torch.tensor(logits, requires_grad=True)}
    return SimpleNamespace(loss=torch.tensor(2.0, requires_grad=True), metrics=metrics)


def test_halting_adds_binary_cross_entropy_and_its_penalty(make):
    out = act_out([True, False, False], [0.5, -1.0, 2.0])
    p = [1 / (1 + math.exp(-x)) for x in (0.5, -1.0, 2.0)]
    bce = -(math.log(p[0]) + math.log(1 - p[1]) + math.log(1 - p[2])) / 3
    penalty = sum(1 - x for x in p) / 3
    micro = make(use_act=True)._total_loss(out, None, 3, has_other=False)
    loss, parts = micro.loss, micro.parts
    assert float(loss) == pytest.approx(2 + bce) and float(parts["halt_loss"]) == pytest.approx(bce)
    assert float(parts["teacher_forced_exact"]) == pytest.approx(1 / 3) and float(parts["answer_loss"]) == 2.0
    assert float(parts["halt_probability"]) == pytest.approx(sum(p) / 3)
    micro = make(use_act=True, act_penalty=0.7)._total_loss(out, None, 3, has_other=False)
    loss, parts = micro.loss, micro.parts
    assert float(loss) == pytest.approx(2 + bce + 0.7 * penalty) and float(parts["loss"]) == float(loss.detach())
    micro = make()._total_loss(out, None, 3, has_other=False)
    assert float(micro.loss) == 2.0 and "halt_loss" not in micro.parts


def test_the_halting_head_learns_from_every_segment_of_the_horizon_and_moves_no_state(make, batches):
    """Each segment's logit against whether its own answer is right; nothing else learns from that."""
    plain = {"segments": 3, "supervised_segments": 1, "grad_horizon": "segments:3", "segments_sampling": "uniform",
             "state_mix": "sum", "halt_detach": True, "use_act": True}
    trainer = make(**plain)
    step = next(step for step in range(50) if segments_of_step(trainer.config, step) == 3)
    (taken,), told = gradients(trainer, [batches[0]], step)

    model = copy.deepcopy(trainer.controller).train()
    states, carry = model.encode(batches[0]), None
    expected = 0.0
    for _ in range(3):
        carry = model.model.advance(states.features, states.context, carry)
        hidden, _ = model.model.inject(states.slots, Thought(carry.z_high, states.context))
        logits = host_logits(model.host, hidden)
        right = ((logits.argmax(-1) == batches[0].labels) | (batches[0].labels == IGNORE)).all(dim=1)
        chance = model.model.addon.core.halt_logits(carry.z_high, states.context.mask)
        expected = expected + F.binary_cross_entropy_with_logits(chance, right.float()) / 3
    assert told["halt_loss"] == pytest.approx(float(expected), rel=1e-4)

    without = make(**plain | {"use_act": False, "halt_detach": False})
    (bare,), _ = gradients(without, [batches[0]], step)
    for name, gradient in bare.items():
        torch.testing.assert_close(taken[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_penalty_makes_halting_likelier(make, batches):
    def halting(penalty: float) -> float:
        trainer = make(use_act=True, act_penalty=penalty, lr=1e-2)
        return [trainer.step([batches[0]], step, 1e-2)["halt_probability"] for step in range(12)][-1]

    assert halting(20.0) > 2 * halting(0.0)


def test_a_halting_head_without_act_stays_as_it_was(make, batches):
    trainer = make(segments=2)
    trainer.step([batches[0]], 0, 1e-2)
    halt = trainer.controller.model.addon.core.halt
    assert halt.weight.abs().sum() == 0 and float(halt.bias) == -5.0 and not halt.weight.requires_grad


# --- the verifier's head


def test_the_verifier_head_learns_the_verdicts_of_its_batch(make, batches):
    verdicts = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    trainer = make(verdicts=lambda batch: verdicts, verifier_weight=1.0, verifier_every=1)
    told = [trainer.step([batches[0]], step, 1e-2) for step in range(40)]
    assert told[-1]["verifier_loss"] < 0.3 * told[0]["verifier_loss"] and told[0]["generated_solved"] == 0.5
    assert told[0]["loss"] == pytest.approx(told[0]["answer_loss"] + told[0]["verifier_loss"])
    assert make(verifier_weight=0.0).controller.model.addon.verifier is None


def test_answers_for_the_verifier_head_are_generated_every_k_batches(make, batches):
    asked = []
    trainer = make(verdicts=lambda batch: asked.append(batch) or torch.ones(len(batch.examples)), verifier_weight=0.5,
                   verifier_every=3)
    told = [trainer.step([batches[0]], step, 1e-3) for step in range(7)]
    assert ["verifier_loss" in metrics for metrics in told] == [True, False, False, True, False, False, True]
    assert len(asked) == 3


# --- what is no number


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_no_number_is_found_before_the_step(make, batches, monkeypatch, value, where):
    trainer = make(segments=2, ema=0.9, optimizer="muon")
    trainer.step([batches[0]], 0, 1e-2)
    before, average = weights(trainer), {name: t.clone() for name, t in trainer.ema.average.items()}
    moments = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer, _ in trainer.optimizers]
    if where == "loss":
        plain = trainer.controller.segment

        def spoilt(*args):
            out = plain(*args)
            out.loss = out.loss + value
            return out

        monkeypatch.setattr(trainer.controller, "segment", spoilt)
    else:
        trainer.parameters["model.addon.read.weight"].register_hook(lambda grad: grad * value)
    with pytest.raises(NonFiniteError, match="batch 1: loss"):
        trainer.step([batches[1]], 1, 1e-2)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in trainer.ema.average.items())
    assert trainer.ema.updates == 2
    for (optimizer, _), kept in zip(trainer.optimizers, moments, strict=True):
        for key, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(kept[key][k])) for k in state)
    assert all(p.grad is None for p in trainer.parameters.values())


def test_fp16_overflows_are_skipped_nine_times_and_not_ten(make):
    trainer = make(ema=0.9)
    skipped = SimpleNamespace(unscale_=lambda o: None, step=lambda o: None, update=lambda: None)
    trainer.precision, trainer.scaler = "fp16", skipped
    parameter = next(iter(trainer.parameters.values()))

    def update(value: float, loss: float = 1.0) -> None:
        parameter.grad = torch.full_like(parameter, value)
        trainer._update(3, loss)

    for _ in range(MAX_SCALER_SKIPS - 1):
        update(math.inf)
    update(1.0)  # a good one: counting begins anew
    for _ in range(MAX_SCALER_SKIPS - 1):
        update(math.inf)
    assert trainer.ema.updates == 1
    with pytest.raises(NonFiniteError):
        update(math.inf)
    trainer.scaler_skips = 0
    with pytest.raises(NonFiniteError):  # a loss that is no number is never the scaler's doing
        update(1.0, loss=math.nan)


# --- what is never touched, and precision


@pytest.mark.parametrize("changes", [{}, {"lora_layers": 2}, {"injector": "grb", "logit_bias_head": True},
                                     {"use_act": True, "verifier_weight": 0.1, "verifier_every": 1}])
def test_no_parameter_of_the_host_ever_changes(make, batches, changes):
    trainer = make(verdicts=lambda batch: torch.ones(len(batch.examples)), **changes)
    base = {name: p for name, p in trainer.controller.host.named_parameters() if "lora_" not in name}
    before = {name: p.detach().clone() for name, p in base.items()}
    buffers = {name: b.clone() for name, b in trainer.controller.host.named_buffers()}
    for step, batch in enumerate(batches):
        trainer.step([batch], step, 1e-1)
    assert all(torch.equal(p, before[name]) and p.grad is None and not p.requires_grad for name, p in base.items())
    assert all(torch.equal(b, buffers[name]) for name, b in trainer.controller.host.named_buffers())
    assert not set(trainer.parameters) & {f"model.host.{name}" for name in base}


def test_training_from_the_start_lowers_the_loss(make, batches):
    trainer = make(trained=False, d_h=32, lr=1e-2)
    losses = [trainer.step([batches[0]], step, 1e-2)["answer_loss"] for step in range(30)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("precision,dtype", [("none", None), ("bf16", torch.bfloat16)])
def test_autocast_covers_forward_and_evaluation_only_where_asked(make, batches, precision, dtype):
    trainer = make(precision=precision)
    with trainer.autocast():
        assert torch.is_autocast_enabled("cpu") is (dtype is not None)
        assert dtype in (None, torch.get_autocast_dtype("cpu"))
    full = make().step([batches[0]], 0, 1e-3)["loss"]
    assert trainer.step([batches[0]], 0, 1e-3)["loss"] == pytest.approx(full, rel=0 if dtype is None else 0.05)
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}


def test_a_model_with_nothing_to_train_is_refused(make):
    trainer = make()
    trainer.controller.requires_grad_(False)
    with pytest.raises(HostError, match="nothing to train"):
        tiny_trainer(settings(), trainer.controller)
