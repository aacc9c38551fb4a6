"""injector: a no-op at step 0, formulas against slow loops, who reads what."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.attention import rope
from hrm_blocks import Context
from injector import INJECTORS, SEES, InjectorCAB, InjectorGRB, Slots, Thought, VocabularyBias

B, S, T, D, WIDTH, HEADS, V = 2, 5, 3, 20, 16, 2, 11
VARIANTS = {"cab": ("cab", 0), "cab_mem": ("cab", 3), "grb": ("grb", 0)}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str, trained: bool = True, gate: float | None = None):
    torch.manual_seed(0)
    kind, mem = VARIANTS[variant]
    gate = {"cab": 1.0, "grb": 0.0}[kind] if gate is None else gate
    injector = INJECTORS[kind](D, WIDTH, HEADS, gate, mem)
    if trained:  # step 0 would hide everything
        torch.nn.init.normal_(injector.out.weight)
    return injector


def thought_of(lengths=(S, 3), seed: int = 1, shift: int = 0) -> Thought:
    torch.manual_seed(seed)
    mask = torch.stack([torch.arange(S) >= S - n for n in lengths])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0) + shift
    z_high = torch.randn(len(lengths), S, WIDTH, requires_grad=True)
    return Thought(z_high, Context(mask, *rope(positions, WIDTH // HEADS)), torch.full((len(lengths),), S - 1))


def slots_of(seed: int = 2, shift: int = 0, lengths=(S, 3)) -> Slots:
    torch.manual_seed(seed)
    positions = torch.stack([torch.arange(n - 1, n - 1 + T) for n in lengths]) + shift
    return Slots(torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D, requires_grad=True), positions)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


# --- step 0 and gradients ---------------------------------------------------------------------------------------------


@every_variant
def test_no_op_at_step_0_and_only_the_zero_factor_has_gradient(variant):
    injector = build(variant, trained=False)
    bias = injector(slots_of(), thought_of())
    assert bias.shape == (B, T, D) and torch.count_nonzero(bias) == 0
    bias.backward(torch.randn(B, T, D))
    moved = {name for name, p in injector.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"out.weight"}


@every_variant
def test_every_parameter_has_gradient_once_trained(variant):
    injector = build(variant)
    injector(slots_of(), thought_of()).backward(torch.randn(B, T, D))
    still = [name for name, p in injector.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert still == []


@pytest.mark.parametrize("kind", ["cab", "grb"])
def test_an_injector_that_sees_the_token_alone_reads_nothing_of_the_llms_state(kind):
    slots, thought = slots_of(), thought_of()
    other = Slots(torch.randn(B, T, D), slots.embedded, slots.positions)
    differs = {}
    for sees in SEES:
        torch.manual_seed(0)
        injector = INJECTORS[kind](D, WIDTH, HEADS, 1.0, 0, sees)
        head = VocabularyBias(D, WIDTH, V, sees)
        for part in (injector, head):
            torch.nn.init.normal_(part.out.weight)
        differs[sees] = [not torch.equal(part(slots, thought), part(other, thought)) for part in (injector, head)]
    assert differs == {"hidden+embed": [True, True], "embed": [False, False]}
    with pytest.raises(ValueError, match="injector_sees must be hidden\\+embed or embed, got 'last'"):
        INJECTORS[kind](D, WIDTH, HEADS, 1.0, 0, "last")


def test_vocabulary_bias_at_step_0_and_after():
    torch.manual_seed(0)
    head, slots, thought = VocabularyBias(D, WIDTH, V), slots_of(), thought_of()
    bias = head(slots, thought)
    assert bias.shape == (B, T, V) and torch.count_nonzero(bias) == 0
    bias.backward(torch.randn(B, T, V))
    assert head.out.weight.grad.abs().max() > 0 and head.gate.weight.grad.abs().max() == 0
    torch.nn.init.normal_(head.out.weight)
    bias = head(slots, thought)
    seen = torch.cat([unit(slots.hidden), unit(slots.embedded)], dim=-1)
    expected = torch.sigmoid(seen @ head.gate.weight.T) * (thought.z_high[:, -1] @ head.out.weight.T)[:, None]
    torch.testing.assert_close(bias, expected, atol=1e-5, rtol=0)


# --- formulas ---------------------------------------------------------------------------------------------------------


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """RoPE of one head's vector (e,), pair by pair, as a rotation in the complex plane."""
    half = len(x) // 2
    angle = position * 10_000.0 ** (-torch.arange(half) * 2.0 / len(x))
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([pairs.real, pairs.imag])


def attend(query, keys, values):
    """One head: query (e,), keys and values lists of (e,)."""
    weights = torch.softmax(torch.stack([query @ key for key in keys]) / len(query) ** 0.5, dim=0)
    return sum(w * value for w, value in zip(weights, values, strict=True))


def swiglu(module, x):
    gate, up = (module.gate_up.weight @ x).chunk(2)
    return module.down.weight @ (F.silu(gate) * up)


@torch.no_grad()
def cab_by_hand(injector: InjectorCAB, slots: Slots, thought: Thought) -> torch.Tensor:
    out, e = torch.zeros(B, T, D), WIDTH // HEADS
    for b in range(B):
        readable = thought.context.mask[b].nonzero().flatten().tolist()
        columns, place = [thought.z_high[b, c] for c in readable], list(range(len(readable)))
        if injector.mem:
            heads = []
            for h in range(HEADS):
                part = slice(h * e, (h + 1) * e)
                keys = [injector.memory_key_value.weight[:WIDTH][part] @ z for z in columns]
                values = [injector.memory_key_value.weight[WIDTH:][part] @ z for z in columns]
                heads.append(torch.stack([attend(query[part], keys, values) for query in injector.memory]))
            columns, place = list(unit(torch.cat(heads, dim=-1))), None
        for t in range(T):
            seen = torch.cat([unit(slots.hidden[b, t]), unit(slots.embedded[b, t])])
            asked = unit(injector.query_in.weight @ seen)
            answers = []
            for h in range(HEADS):
                part = slice(h * e, (h + 1) * e)
                query = injector.query.weight[part] @ asked
                keys = [injector.key_value.weight[:WIDTH][part] @ z for z in columns]
                values = [injector.key_value.weight[WIDTH:][part] @ z for z in columns]
                if place is not None:
                    query = turned(query, int(slots.positions[b, t]))
                    keys = [turned(key, p) for key, p in zip(keys, place, strict=True)]
                answers.append(attend(query, keys, values))
            read = swiglu(injector.readout, torch.cat([asked, *answers]))
            out[b, t] = injector.gate * (injector.out.weight @ unit(read))
    return out


@torch.no_grad()
def grb_by_hand(injector: InjectorGRB, slots: Slots, thought: Thought) -> torch.Tensor:
    out = torch.zeros(B, T, D)
    for b in range(B):
        columns = thought.z_high[b][thought.context.mask[b]]
        summary = torch.cat([columns[-1], columns.mean(0)])
        bias = injector.out.weight @ unit(swiglu(injector.readout, summary))
        for t in range(T):
            token = injector.token.weight @ torch.cat([unit(slots.hidden[b, t]), unit(slots.embedded[b, t])])
            gate = torch.sigmoid(injector.gate.weight @ torch.cat([token, summary]) + injector.gate_bias)
            out[b, t] = gate * bias
    return out


@every_variant
def test_bias_equals_the_formula_written_as_loops(variant):
    injector, slots, thought = build(variant, gate=0.7), slots_of(), thought_of()
    by_hand = grb_by_hand if variant == "grb" else cab_by_hand
    torch.testing.assert_close(injector(slots, thought), by_hand(injector, slots, thought), atol=1e-5, rtol=1e-5)


# --- who reads what ---------------------------------------------------------------------------------------------------


@every_variant
def test_each_slot_reads_its_own_token_and_its_own_prompt(variant):
    injector, slots, thought = build(variant), slots_of(), thought_of()
    for b in range(B):
        for t in range(T):
            bias = injector(slots, thought)[b, t].pow(3).sum()
            hidden, embedded, z = torch.autograd.grad(bias, [slots.hidden, slots.embedded, thought.z_high])
            own = torch.zeros(B, T, dtype=torch.bool)
            own[b, t] = True
            for reach in (hidden, embedded):
                assert torch.equal(reach.abs().amax(-1) > 0, own), "another slot's token, perhaps a later one, was read"
            own = thought.context.mask & (torch.arange(B) == b)[:, None]
            assert torch.equal(z.abs().amax(-1) > 0, own), "a pad or another prompt was read, or a prompt token was not"


@every_variant
def test_positions_differ(variant):
    bias = build(variant)(slots_of(), thought_of())
    directions = F.normalize(bias[0].detach(), dim=-1)
    assert float((directions[0] - directions[1]).abs().max()) > 1e-2


def test_the_bridge_knows_where_a_token_stands():
    injector, slots, thought = build("cab"), slots_of(), thought_of()
    slots.hidden, slots.embedded = (x[:, :1].expand(-1, T, -1) for x in (slots.hidden, slots.embedded))
    bias = injector(slots, thought)
    assert float((bias[:, 0] - bias[:, 1]).detach().abs().max()) > 1e-3


def test_only_distances_count():
    injector = build("cab")
    here, there = (injector(slots_of(shift=n), thought_of(shift=n)).detach() for n in (0, 9))
    torch.testing.assert_close(here, there, atol=1e-4, rtol=0)
    moved = injector(slots_of(shift=9), thought_of()).detach()
    assert float((here - moved).abs().max()) > 1e-3


@every_variant
def test_size_of_hidden_states_does_not_matter(variant):
    injector, slots = build(variant), slots_of()
    expected = injector(slots, thought_of())
    slots.hidden, slots.embedded = slots.hidden * 100, slots.embedded * 0.5
    torch.testing.assert_close(injector(slots, thought_of()), expected, atol=1e-3, rtol=1e-3)


def test_gates_start_as_asked():
    assert build("cab", gate=0.25).gate.item() == 0.25
    torch.testing.assert_close(build("cab", gate=0.5)(slots_of(), thought_of()),
                               0.5 * build("cab", gate=1.0)(slots_of(), thought_of()))
    assert build("grb", gate=-3.0).gate_bias.tolist() == [-3.0] * D
    closed = build("grb", gate=-60.0)(slots_of(), thought_of())
    assert float(closed.detach().abs().max()) < 1e-6


@every_variant
def test_host_states_of_half_precision_are_read_in_float32(variant):
    injector, slots = build(variant), slots_of()
    slots.hidden, slots.embedded = slots.hidden.bfloat16(), slots.embedded.bfloat16()
    assert slots.seen().dtype == torch.float32
    bias = injector(slots, thought_of())
    torch.testing.assert_close(bias, build(variant)(slots_of(), thought_of()), atol=0.2, rtol=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(injector(slots, thought_of())).all()


@every_variant
def test_another_width_is_refused_with_the_likely_cause(variant):
    slots = slots_of()
    slots.hidden = torch.randn(B, T, D + 4)
    with pytest.raises(ValueError, match=f"expects hidden width {D}, got {D + 4}.*another base model"):
        build(variant)(slots, thought_of())
