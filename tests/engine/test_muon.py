"""muon: torch's but for rounding, in ordinary training; steps that gradients no longer ask for do not happen."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from engine import muon
from engine.muon import OUTLIER, Muon, following
from engine.optimizer_state import pack_optimizer, unpack_optimizer

SHAPES = [(24, 16), (16, 24), (16, 16), (8, 24), (16, 24)]  # tall, wide, square, alone, and one that comes again
LR = 1e-2


def matrices(seed: int = 0) -> list[nn.Parameter]:
    """One parameter of each of `SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def ours(parameters: list[nn.Parameter], decay: float = 0.1) -> Muon:
    return Muon([{"params": parameters, "weight_decay": decay}], LR, decay)


def of_torch(parameters: list[nn.Parameter], decay: float = 0.1) -> torch.optim.Muon:
    return torch.optim.Muon(parameters, lr=LR, weight_decay=decay, adjust_lr_fn="match_rms_adamw")


def give(parameters: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    """Random gradients of batch `step`, of about `scale` times the usual size."""
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(1000 * step + index)
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def step_norm(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float:
    """How far one step moves a parameter, as a share of a full one."""
    before = parameter.detach().clone()
    optimizer.step()
    full = LR * 0.2 * math.sqrt(max(parameter.shape)) * math.sqrt(min(parameter.shape))
    return float((parameter.detach() - before).norm()) / full


@pytest.mark.parametrize("native", [False, True])
def test_a_step_is_that_of_torch_within_the_rounding_of_bfloat16(native, monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: native)
    mine = matrices()
    theirs = matrices()
    one = ours(mine)
    other = of_torch(theirs)
    for step in range(20):
        give(mine, step, 1 + 0.5 * math.sin(step))
        give(theirs, step, 1 + 0.5 * math.sin(step))
        before = [parameter.detach().clone() for parameter in mine]
        one.step()
        other.step()

        # Each step anew, from the same weights: differences must not add up to something else.
        for own, torchs, old in zip(mine, theirs, before, strict=True):
            moved = torchs.detach() - old
            assert float((own.detach() - torchs.detach()).norm() / moved.norm()) < 0.05
            own.data.copy_(torchs.data)
            assert torch.equal(one.state[own]["momentum_buffer"], other.state[torchs]["momentum_buffer"])


def test_training_ends_where_torchs_ends():
    """A regression on noisy batches: both optimizers reach the same loss, and the guards never act."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(16, 24, generator=generator)
    losses = []
    for build in (ours, of_torch):
        weight = nn.Parameter(torch.zeros(16, 24))
        optimizer = build([weight])
        for step in range(150):
            inputs = torch.randn(64, 24, generator=torch.Generator().manual_seed(step))
            loss = ((inputs @ weight.T - inputs @ target.T) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] < 15


def test_a_tall_matrix_steps_as_its_transpose():
    wide, tall = nn.Parameter(torch.zeros(8, 24)), nn.Parameter(torch.zeros(24, 8))
    give([wide], 0)
    tall.grad = wide.grad.mT.contiguous()
    ours([wide, tall]).step()
    assert float(wide.abs().sum()) > 0
    torch.testing.assert_close(wide.detach(), tall.detach().mT)


def test_a_matrix_without_a_gradient_stays_and_one_of_zeros_only_decays():
    still, zero, moved = matrices()[:3]
    before = [parameter.detach().clone() for parameter in (still, zero, moved)]
    zero.grad = torch.zeros_like(zero)
    give([moved], 0)
    optimizer = ours([still, zero, moved])
    optimizer.step()
    assert torch.equal(still, before[0]) and still not in optimizer.state
    torch.testing.assert_close(zero.detach(), before[1] * (1 - LR * 0.1))
    assert not torch.equal(moved, before[2])


# --- gradients that vanish ---


@pytest.mark.parametrize("left", [0.0, 1e-30, 1e-12, 1e-6])
@pytest.mark.parametrize("steady", [False, True])
def test_steps_end_with_the_gradients(left, steady):
    """Torch takes full steps in the old direction for up to 380 batches after the gradients have become zero."""
    (parameter,) = parameters = matrices()[:1]
    optimizer = ours(parameters, decay=0.0)
    for step in range(60):
        give(parameters, 0 if steady else step)
        optimizer.step()
    assert step_norm(optimizer, parameter) > 0.7

    old = optimizer.state[parameter]["momentum_buffer"].clone()
    way = 0.0
    for step in range(320):
        give(parameters, 1000 + step, left)
        before = parameter.detach().clone()
        optimizer.step()
        moved = parameter.detach() - before
        way += max(-float((moved * old).sum() / old.norm() / (LR * 0.2 * math.sqrt(24) * 4)), 0.0)
    assert way < 80, f"the old direction was followed for {way:.0f} full steps"


def test_a_gradient_of_exactly_zero_asks_for_no_step():
    (parameter,) = parameters = matrices()[:1]
    optimizer = ours(parameters, decay=0.0)
    for step in range(30):
        give(parameters, step)
        optimizer.step()
    for _ in range(200):
        parameter.grad = torch.zeros_like(parameter)
        assert step_norm(optimizer, parameter) == 0

    # A matrix whose gradients come back goes on at once.
    give(parameters, 99)
    assert step_norm(optimizer, parameter) > 0.7


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 10.0, 1e5])
def test_lasting_gradients_of_another_size_have_full_steps_again(scale):
    (parameter,) = parameters = matrices()[:1]
    optimizer = ours(parameters)
    for step in range(350):
        give(parameters, step, 1.0 if step < 50 else scale)
        optimizer.step()
    give(parameters, 350, scale)
    assert step_norm(optimizer, parameter) > 0.7


# --- gradients that jump ---


@pytest.mark.parametrize("jump", [30.0, 1e3, 1e8])
@pytest.mark.parametrize("when", [1, 5, 60])
def test_one_outlier_does_not_steer(jump, when):
    """The steps after it are those of a run in which that batch was an ordinary one."""
    (hit,), (spared,) = matrices()[:1], matrices()[:1]
    optimizers = [ours([hit]), ours([spared])]
    for step in range(when + 10):
        give([hit], step, jump if step == when else 1.0)
        give([spared], step)
        before = hit.detach().clone(), spared.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
    moved, ordinary = hit.detach() - before[0], spared.detach() - before[1]
    assert float(nn.functional.cosine_similarity(moved.flatten(), ordinary.flatten(), dim=0)) > 0.9


def test_an_outlier_at_the_very_first_step_makes_steps_small_until_it_is_forgotten():
    (parameter,) = parameters = matrices()[:1]
    optimizer = ours(parameters, decay=0.0)
    give(parameters, 0, 1e6)
    optimizer.step()
    give(parameters, 1)
    assert step_norm(optimizer, parameter) < 0.01


def test_the_usual_norm_rises_fast_falls_slowly_and_an_outlier_cannot_set_it():
    assert following(0.0, 3.0) == 3.0
    assert following(1.0, 2.0) == 1.5 and following(1.0, 1e9) == 2.0
    assert 0.9 < following(1.0, 1e-9) < 1.0
    usual = 1.0
    for _ in range(12):
        usual = following(usual, 1e3)
    assert 1e3 < OUTLIER * usual


# --- checkpoints ---


def test_a_resumed_optimizer_goes_on_bit_for_bit():
    through, cut = matrices(), matrices()
    whole, first = ours(through), ours(cut)
    for step in range(6):
        give(through, step, 50.0 if step == 4 else 1.0)
        whole.step()
    for step in range(3):
        give(cut, step)
        first.step()

    names = [str(index) for index in range(len(cut))]
    tensors, document = pack_optimizer(first, names)
    again = [nn.Parameter(parameter.detach().clone()) for parameter in cut]
    second = ours(again)
    unpack_optimizer(second, names, tensors, json.loads(json.dumps(document)))
    for step in range(3, 6):
        give(again, step, 50.0 if step == 4 else 1.0)
        second.step()
    assert all(torch.equal(one, other) for one, other in zip(through, again, strict=True))


def test_a_checkpoint_of_torchs_muon_goes_on_here():
    old, names = matrices(), [str(index) for index in range(len(SHAPES))]
    theirs = of_torch(old)
    give(old, 0)
    theirs.step()
    tensors, document = pack_optimizer(theirs, names)

    new = copy.deepcopy(old)
    mine = ours(new)
    unpack_optimizer(mine, names, tensors, document)
    give(old, 1)
    give(new, 1)
    theirs.step()
    mine.step()
    for one, other in zip(old, new, strict=True):
        assert torch.equal(theirs.state[one]["momentum_buffer"], mine.state[other]["momentum_buffer"])
        torch.testing.assert_close(one.detach(), other.detach(), atol=0.03 * LR, rtol=0)
