"""hrm_blocks: layers against transformers' own, the recurrence against the paper's equations and HRM-Text."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from engine.attention import rope, rotate
from engine.positions import last_column, last_state, mean_state
from hrm_blocks import (
    Attention,
    Carry,
    Context,
    EncoderLayer,
    HBlock,
    HRMCore,
    LBlock,
    ShortConv,
    SwiGLU,
    first_call_with_gradient,
    init_linear,
    recur,
    rms_norm,
)

WIDTH, HEADS = 24, 2
HORIZONS = ("one_step", "full", "k:1", "k:2", "k:9")


def llama_config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "rms_norm_eps": 1e-5}
    return LlamaConfig(**{**sizes, "intermediate_size": 64, "attn_implementation": "eager", **changes})


def padding(*lengths: int, side: str = "left") -> torch.Tensor:
    """(B, longest) bool mask of rows with these lengths."""
    columns = torch.arange(max(lengths))
    rows = [columns >= max(lengths) - n if side == "left" else columns < n for n in lengths]
    return torch.stack(rows)


def place(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def context_of(mask: torch.Tensor) -> Context:
    return Context(mask, *rope(place(mask), WIDTH // HEADS))


def core_of(seed: int = 0, **changes) -> HRMCore:
    torch.manual_seed(seed)
    return HRMCore(**{"d": WIDTH, "heads": HEADS, "h_layers": 1, "l_layers": 2, "inner_T": 2, **changes}).eval()


def run(core: HRMCore, x: torch.Tensor, mask: torch.Tensor, segments: int = 1) -> Carry:
    context, carry = core.context(mask, place(mask)), core.initial_carry(mask)
    for _ in range(segments):
        carry = core(x, context, carry)
    return carry


# --- layers -----------------------------------------------------------------------------------------------------------


def test_rms_norm_equals_llama_with_unit_weight():
    x = torch.randn(3, 5, WIDTH) * 4
    assert torch.equal(rms_norm(x), LlamaRMSNorm(WIDTH, eps=1e-5)(x))
    tiny = torch.full((1, WIDTH), 1e-4)  # here the value of eps shows
    torch.testing.assert_close(rms_norm(tiny), LlamaRMSNorm(WIDTH, eps=1e-5)(tiny))


def test_rope_equals_llama():
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 7, 500]])
    config = llama_config(max_position_embeddings=1024)
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(2, 4, WIDTH), positions)
    ours = rope(positions, WIDTH // HEADS)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    query, key = torch.randn(2, HEADS, 4, WIDTH // HEADS), torch.randn(2, HEADS, 4, WIDTH // HEADS)
    expected = apply_rotary_pos_emb(query, key, *ours)
    torch.testing.assert_close((rotate(query, *ours), rotate(key, *ours)), expected, atol=1e-6, rtol=0)


def test_rope_stays_in_float32_for_far_positions():
    far = torch.tensor([[4095, 4096]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, _ = rope(far, 8)
    assert cos.dtype == torch.float32 and float((cos[0, 0] - cos[0, 1]).abs().max()) > 0.1


@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 3, 1)], ids=["whole", "padded"])
def test_attention_equals_llama_attention_without_its_causal_mask(lengths):
    torch.manual_seed(0)
    ours, theirs = Attention(WIDTH, HEADS), LlamaAttention(llama_config(), layer_idx=0)
    with torch.no_grad():
        projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
        for projection, weight in zip(projections, ours.qkv.weight.chunk(3), strict=True):
            projection.weight.copy_(weight)
        theirs.o_proj.weight.copy_(ours.out.weight)
    mask, x = padding(*lengths), torch.randn(3, 7, WIDTH)
    hidden = torch.zeros(3, 1, 7, 7).masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min)
    embeddings = LlamaRotaryEmbedding(llama_config())(x, place(mask))
    expected = theirs(x, position_embeddings=embeddings, attention_mask=hidden)[0]
    torch.testing.assert_close(ours(x, context_of(mask))[mask], expected[mask], atol=1e-5, rtol=0)


def test_swiglu_equals_llama_mlp():
    torch.manual_seed(0)
    ours, theirs = SwiGLU(WIDTH), LlamaMLP(llama_config())
    assert ours.down.in_features == 64  # 8/3 of 24
    with torch.no_grad():
        for projection, weight in zip((theirs.gate_proj, theirs.up_proj), ours.gate_up.weight.chunk(2), strict=True):
            projection.weight.copy_(weight)
        theirs.down_proj.weight.copy_(ours.down.weight)
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_layer_is_post_norm():
    torch.manual_seed(0)
    layer, mask, x = EncoderLayer(WIDTH, HEADS), padding(4, 4), torch.randn(2, 4, WIDTH)
    norm, context = LlamaRMSNorm(WIDTH, eps=1e-5), context_of(mask)
    middle = norm(x + layer.attention(x, context))
    torch.testing.assert_close(layer(x, context), norm(middle + layer.mlp(middle)), atol=1e-6, rtol=0)
    assert all(p.ndim == 2 for p in layer.parameters()), "no biases, no norm weights"


@pytest.mark.parametrize("block", [HBlock, LBlock])
def test_every_readable_position_reads_every_other_and_none_a_pad(block):
    torch.manual_seed(0)
    block, mask, x = block(WIDTH, HEADS, 1), padding(5, 3), torch.randn(2, 5, WIDTH, requires_grad=True)
    context = context_of(mask)
    for row, column in mask.nonzero().tolist():
        (reach,) = torch.autograd.grad(block(x, context)[row, column].pow(3).sum(), x)
        read = reach.abs().amax(-1) > 1e-7
        read[row, column] = False  # the residual path, no attention
        expected = mask & (torch.arange(2) == row)[:, None]
        expected[row, column] = False
        assert torch.equal(read, expected), (row, column)


def test_linear_maps_start_as_hrm_says():
    torch.manual_seed(0)
    weight = init_linear(torch.nn.Linear(400, 300)).weight
    assert float(weight.detach().abs().max()) <= 2 / math.sqrt(400)
    truncated = 0.8796 / math.sqrt(400)  # deviation of a normal cut at two deviations
    assert float(weight.detach().std()) == pytest.approx(truncated, rel=0.02)


# --- recurrence -------------------------------------------------------------------------------------------------------


def papers_equations(core: HRMCore, x, context, z_high, z_low, horizon: str, cycles: int):
    """Equations of the paper, section 2, as straight code; a call outside the horizon starts from detached values."""
    keep = {"full": 10**6, "one_step": 1}.get(horizon) or int(horizon[2:])
    left = cycles * core.inner_T
    for _ in range(cycles):
        for _ in range(core.inner_T):
            z_low = core.l_block(z_low + z_high + x, context)
            left -= 1
            if left >= keep:
                z_low = z_low.detach()
        z_high = core.h_block(z_high + z_low, context)
        if left >= keep:
            z_high = z_high.detach()
    return z_high, z_low


def test_a_shared_block_makes_both_steps_and_is_stored_once():
    core, twin = core_of(l_layers=1, share=True), core_of(l_layers=1)
    assert {name.split(".")[0] for name in core.state_dict()} == {"h_block", "halt", "z_high_init", "z_low_init"}
    twin.load_state_dict(core.state_dict(), strict=False)
    twin.l_block.load_state_dict(core.h_block.state_dict())  # two blocks of equal weights are the slow truth
    mask = padding(5, 3)
    context, x = core.context(mask, place(mask)), torch.randn(2, 5, WIDTH)
    found, expected = (c(x, context, c.initial_carry(mask)) for c in (core, twin))
    assert torch.equal(found.z_high, expected.z_high) and torch.equal(found.z_low, expected.z_low)
    weight = torch.randn(2, 5, WIDTH)
    (found.z_high * weight).sum().backward()
    (expected.z_high * weight).sum().backward()
    ours = core.h_block.layers[0].mlp.down.weight.grad
    both = [block.layers[0].mlp.down.weight.grad for block in (twin.h_block, twin.l_block)]
    torch.testing.assert_close(ours, both[0] + both[1])
    with pytest.raises(ValueError, match="h_layers 1 and l_layers 2 must be equal"):
        core_of(share=True)


@pytest.mark.parametrize("cycles", [1, 2])
@pytest.mark.parametrize("inner_T", [1, 3])
@pytest.mark.parametrize("horizon", HORIZONS)
def test_recurrence_equals_the_papers_equations(horizon, inner_T, cycles):
    core, mask = core_of(inner_T=inner_T, horizon=horizon), padding(5, 3)
    context = core.context(mask, place(mask))
    start, weight = core.initial_carry(mask), torch.randn(2, 5, WIDTH)
    results = []
    for plain in (False, True):
        x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if plain:
            states = papers_equations(core, x, context, start.z_high, start.z_low, horizon, cycles)
        else:
            states = recur(lambda low, high, x=x: core.l_block(low + high + x, context),
                           lambda high, low: core.h_block(high + low, context), start.z_high, start.z_low, inner_T,
                           cycles, horizon)
        parameters = [x, *core.l_block.parameters(), *core.h_block.parameters()]
        gradients = torch.autograd.grad(sum((z * weight).sum() for z in states), parameters)
        assert all(float(g.abs().max()) > 0 for g in gradients)
        results.append((states, gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_a_segment_is_one_cycle_of_the_recurrence(horizon):
    core, mask, x = core_of(inner_T=3, horizon=horizon), padding(4, 2), torch.randn(2, 4, WIDTH)
    context, carry = core.context(mask, place(mask)), core.initial_carry(mask)
    for segment in range(3):
        expected = papers_equations(core, x, context, carry.z_high, carry.z_low, horizon, 1)
        carry = core(x, context, carry).detach()
        torch.testing.assert_close((carry.z_high, carry.z_low), expected, atol=1e-5, rtol=0)
        assert carry.steps.tolist() == [segment + 1] * 2


@pytest.mark.parametrize(
    ("horizon", "inner_T", "cycles", "expected"),
    [
        ("one_step", 3, 1, "l l L H"),
        ("one_step", 2, 2, "l l h l L H"),
        ("full", 2, 2, "L L H L L H"),
        ("k:2", 3, 1, "l L L H"),
        ("k:3", 2, 2, "l L H L L H"),  # the H call after a call within the horizon carries gradient too
        ("k:2", 2, 2, "l l h L L H"),
        ("k:9", 2, 1, "L L H"),
        ("one_step", 1, 1, "L H"),
    ],
)
def test_gradient_flows_only_through_the_calls_that_the_horizon_names(horizon, inner_T, cycles, expected):
    seen = []

    def step(letter):
        def call(own, other):
            seen.append(letter.upper() if torch.is_grad_enabled() else letter)
            return torch.tanh(own + other + x)

        return call

    x = torch.randn(1, 2, 4, requires_grad=True)
    z_high, z_low = recur(step("l"), step("h"), torch.ones(1, 2, 4), torch.ones(1, 2, 4), inner_T, cycles, horizon)
    assert " ".join(seen) == expected and z_high.requires_grad and z_low.requires_grad
    seen.clear()
    with torch.no_grad():  # no horizon switches gradient on where the caller switched it off
        recur(step("l"), step("h"), torch.ones(1, 2, 4), torch.ones(1, 2, 4), inner_T, cycles, horizon)
    assert " ".join(seen) == expected.lower()


@pytest.mark.parametrize("horizon", ["one_step", "k:2", "full"])
def test_the_cores_calls_under_gradient(horizon):
    core, mask = core_of(inner_T=3, horizon=horizon), padding(3)
    seen = []
    core.l_block.register_forward_hook(lambda *_: seen.append("L" if torch.is_grad_enabled() else "l"))
    core.h_block.register_forward_hook(lambda *_: seen.append("H" if torch.is_grad_enabled() else "h"))
    run(core, torch.randn(1, 3, WIDTH), mask)
    assert "".join(seen) == {"one_step": "llLH", "k:2": "lLLH", "full": "LLLH"}[horizon]


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("horizon", ["one_step", "k:2"])
def test_calls_without_gradient_do_not_rob_the_later_ones_under_autocast(horizon, precision):
    """Autocast caches cast weights; a cast made without gradient must not be used where gradient is wanted."""
    core, mask, x = core_of(inner_T=3, horizon=horizon), padding(4), torch.randn(1, 4, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is not None):
        run(core, x, mask).z_high.float().pow(3).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for block in (core.l_block, core.h_block) for p in block.parameters())


@pytest.mark.parametrize("horizon", ["two_step", "k:0", "k:-1", "k:", "", "k:1.5", "FULL"])
def test_another_horizon_is_refused(horizon):
    with pytest.raises(ValueError, match="one_step, full, k:N, segments:N"):
        first_call_with_gradient(horizon, 3)
    with pytest.raises(ValueError, match="one_step, full, k:N, segments:N"):
        core_of(horizon=horizon)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_order_states_and_gradients_equal_transformers_hrm_text(keep):
    """HRM-Text with one high cycle is our recurrence with x = 0 from z_H = its embeddings: calls, states, gradients."""
    from transformers import HrmTextConfig, HrmTextModel

    torch.manual_seed(0)
    config = HrmTextConfig(vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                           num_attention_heads=2, head_dim=8, H_cycles=1, L_cycles=3, L_bp_cycles=[keep],
                           initializer_range=0.2)
    oracle = HrmTextModel(config).train()
    ids, weight = torch.randint(0, 19, (2, 5)), torch.randn(2, 5, 16)
    seen, shared = [], {}
    for letter, module in (("l", oracle.L_module), ("h", oracle.H_module)):
        def note(module, args, kwargs, letter=letter):
            seen.append(letter.upper() if torch.is_grad_enabled() else letter)
            shared.update({**kwargs, "past_key_values": None})

        module.register_forward_pre_hook(note, with_kwargs=True)
    expected = oracle(ids, use_cache=False).last_hidden_state
    theirs = "".join(seen)
    parameters = [p for p in oracle.parameters() if p.requires_grad]
    expected_gradients = torch.autograd.grad((expected * weight).sum(), parameters)
    seen.clear()
    arguments = dict(shared)
    z_high = oracle.embed_tokens(ids) * oracle.embedding_scale
    z_low = oracle.z_L_init.expand_as(z_high)
    found, _ = recur(lambda low, high: oracle.L_module(low + high, **arguments),
                     lambda high, low: oracle.H_module(high + low, **arguments), z_high, z_low, 3, horizon=f"k:{keep}")
    assert "".join(seen) == theirs == "lll"[: 3 - keep] + "LLL"[:keep] + "H"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), parameters), expected_gradients)


# --- carry ------------------------------------------------------------------------------------------------------------


def test_carry_rows_and_detach():
    carry = Carry(torch.randn(3, 2, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True),
                  torch.tensor([1, 2, 3]), torch.tensor([False, True, False]))
    part = carry.rows(torch.tensor([True, False, True]))
    assert torch.equal(part.z_high, carry.z_high[[0, 2]]) and torch.equal(part.z_low, carry.z_low[[0, 2]])
    assert part.steps.tolist() == [1, 3] and part.halted.tolist() == [False, False]
    cut = carry.detach()
    assert not cut.z_high.requires_grad and not cut.z_low.requires_grad and torch.equal(cut.z_high, carry.z_high)
    assert cut.steps.tolist() == [1, 2, 3] and cut.halted.tolist() == [False, True, False]


def test_without_a_slow_block_the_fast_one_recurs_alone():
    for mix in ("sum", "gated"):
        core = HRMCore(WIDTH, HEADS, 0, 1, 2, init_state="zero", state_mix=mix)
        names = {name.partition(".")[0] for name, _ in core.named_parameters()}
        assert names == {"l_block", "halt"} | ({"low_gate"} if mix == "gated" else set())
        if mix == "gated":
            torch.nn.init.normal_(core.low_gate)
        mask = padding(4, 7)
        x = torch.randn(2, 7, WIDTH)
        carry = core(x, context_of(mask), core(x, context_of(mask), core.initial_carry(mask)))
        z = torch.zeros_like(x)
        for _ in range(4):
            z = core.l_block(x + (z if mix == "sum" else core.low_gate * z), context_of(mask))
        assert carry.z_high is carry.z_low
        torch.testing.assert_close(carry.z_low, z)


def test_the_short_convolution_mixes_a_token_with_those_before_it_and_with_no_pad():
    conv = ShortConv(WIDTH, 3)
    x = torch.randn(2, 6, WIDTH)
    mask = padding(4, 6)
    mixed = conv(x, mask)
    own, before, first = conv.mix.weight.split(WIDTH, dim=1)
    torch.testing.assert_close(mixed[1, 4], own @ x[1, 4] + before @ x[1, 3] + first @ x[1, 2])
    torch.testing.assert_close(mixed[0, 2], own @ x[0, 2], msg="a row's first token reads pads")
    torch.testing.assert_close(mixed[0, 2:], conv(x[:1, 2:], mask[:1, 2:])[0])


def test_initial_states_are_saved_fixed_and_not_trained():
    core, mask = core_of(), padding(4, 2)
    start = core.initial_carry(mask)
    for state, name in ((start.z_high, "z_high_init"), (start.z_low, "z_low_init")):
        assert torch.equal(state, core.state_dict()[name].expand(2, 4, WIDTH))
        assert name not in dict(core.named_parameters()) and 0.5 < float(core.state_dict()[name].std()) < 1.3
        assert float(core.state_dict()[name].abs().max()) <= 2
    assert not torch.equal(core.z_high_init, core.z_low_init)
    assert start.steps.tolist() == [0, 0] and not start.halted.any()


def test_random_initial_states_in_training_alone():
    core, mask = core_of(init_state="random"), padding(4, 2)
    assert torch.equal(core.initial_carry(mask).z_high, core.z_high_init.expand(2, 4, WIDTH))
    core.train()
    first, second = core.initial_carry(mask), core.initial_carry(mask)
    for one, other in ((first.z_high, second.z_high), (first.z_low, second.z_low), (first.z_high, first.z_low)):
        assert not torch.equal(one, other)
    assert not torch.equal(first.z_high[0], first.z_high[1]), "each example starts from its own vector"
    assert torch.equal(first.z_high[:, :1].expand(-1, 4, -1), first.z_high), "all positions of an example share it"


def test_from_zero_states_one_short_segment_is_a_plain_pass_through_l_and_h():
    core, mask, x = core_of(init_state="zero", inner_T=1), padding(4, 2), torch.randn(2, 4, WIDTH)
    context = core.context(mask, place(mask))
    assert torch.equal(run(core, x, mask).z_high, core.h_block(core.l_block(x, context), context))
    assert torch.equal(core.train().initial_carry(mask).z_low, torch.zeros(2, 4, WIDTH))


@pytest.mark.parametrize("init_state", ["zero", "fixed"])
def test_shut_gates_make_every_segment_the_single_pass(init_state):
    core, mask, x = core_of(state_mix="gated", init_state=init_state), padding(4, 2), torch.randn(2, 4, WIDTH)
    context = core.context(mask, place(mask))
    expected = core.h_block(core.l_block(x, context), context)
    for segments in (1, 3):
        assert torch.equal(run(core, x, mask, segments=segments).z_high, expected)


@pytest.mark.parametrize(("segments", "learning"), [(1, {"low_gate"}), (2, {"low_gate", "high_gate", "carry_gate"})])
def test_from_zero_states_the_gates_of_z_high_learn_from_the_second_segment_on(segments, learning):
    core, mask = core_of(state_mix="gated", init_state="zero"), padding(4, 2)
    run(core, torch.randn(2, 4, WIDTH), mask, segments=segments).z_high.sum().backward()
    assert {name for name, p in core.named_parameters() if name.endswith("_gate") and p.grad.abs().sum()} == learning


def test_open_gates_are_the_published_sum_and_every_gate_learns():
    gated, summed = core_of(state_mix="gated"), core_of()
    gated.load_state_dict(gated.state_dict() | summed.state_dict())
    mask, x = padding(4, 2), torch.randn(2, 4, WIDTH)
    run(gated, x, mask).z_high.sum().backward()
    gates = [gated.low_gate, gated.high_gate, gated.carry_gate]
    assert all(float(gate.grad.abs().min()) > 0 for gate in gates)
    assert all(gate.ndim == 1 for gate in gates), "Muon takes matrices"
    with torch.no_grad():
        for gate in gates:
            gate.fill_(1.0)
    torch.testing.assert_close(run(gated, x, mask, segments=3).z_high, run(summed, x, mask, segments=3).z_high)


@pytest.mark.parametrize("reset_l", [False, True])
def test_low_state_is_reset_at_each_segment_as_asked(reset_l):
    core, mask, x = core_of(reset_l=reset_l), padding(4, 2), torch.randn(2, 4, WIDTH)
    context, carry = core.context(mask, place(mask)), run(core, x, mask)
    other = Carry(carry.z_high, torch.randn_like(carry.z_low), carry.steps, carry.halted)
    same = torch.equal(core(x, context, carry).z_high, core(x, context, other).z_high)
    assert same == reset_l


def test_padding_changes_nothing_and_an_unreadable_row_stays_finite():
    core, lengths = core_of(), (6, 4, 1)
    rows = [torch.randn(n, WIDTH) for n in lengths]
    for side in ("left", "right"):
        mask = padding(*lengths, side=side)
        x = torch.randn(3, 6, WIDTH) * 9  # what stands in pads does not matter
        x[mask] = torch.cat(rows)
        together = run(core, x, mask, segments=3)
        for row, (alone, n) in enumerate(zip(rows, lengths, strict=True)):
            expected = run(core, alone[None], padding(n), segments=3).z_high[0]
            torch.testing.assert_close(together.z_high[row][mask[row]], expected, atol=1e-4, rtol=0)
    mask = torch.tensor([[False, False], [False, True]])
    keys = core.context(mask, place(mask)).keys.flatten(1)
    assert keys.tolist() == [[True, True], [False, True]], "some kernels give NaN where nothing may be read"
    assert torch.isfinite(run(core, torch.randn(2, 2, WIDTH), mask).z_high).all()


def test_context_rows_equal_a_context_of_those_rows():
    mask, chosen = padding(5, 3, 5), torch.tensor([True, False, True])
    part, own = context_of(mask).rows(chosen), context_of(mask[chosen])
    assert torch.equal(part.mask, own.mask) and torch.equal(part.cos, own.cos) and torch.equal(part.sin, own.sin)
    assert part.keys is None and own.keys is None and context_of(mask).keys is not None


@pytest.mark.parametrize(("d", "heads"), [(25, 2), (24, 5), (6, 2), (24, 8)])
def test_width_must_be_an_even_multiple_of_the_heads(d, heads):
    with pytest.raises(ValueError, match="even multiple"):
        core_of(d=d, heads=heads)


# --- halting head -----------------------------------------------------------------------------------------------------


def test_halting_head_starts_at_never():
    core, mask = core_of(), padding(4, 2)
    assert torch.equal(core.halt.weight, torch.zeros(1, WIDTH)) and core.halt.bias.tolist() == [-5.0]
    assert core.halt_logits(torch.randn(2, 4, WIDTH), mask).tolist() == [-5.0, -5.0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_halting_head_reads_the_last_readable_column(side):
    core, mask = core_of(), padding(5, 3, 1, side=side)
    torch.nn.init.normal_(core.halt.weight)
    z = torch.randn(3, 5, WIDTH, requires_grad=True)
    logits = core.halt_logits(z, mask)
    assert logits.shape == (3,)
    (reach,) = torch.autograd.grad(logits.sum(), z)
    last = {"left": [4, 4, 4], "right": [4, 2, 0]}[side]
    expected = F.one_hot(torch.tensor(last), 5).bool()
    assert torch.equal(reach.abs().amax(-1) > 0, expected)
    assert last_column(mask).tolist() == last
    assert torch.equal(last_state(z, mask), z[torch.arange(3), torch.tensor(last)])


def test_mean_state_counts_readable_columns_alone():
    z = torch.tensor([[[1.0], [2.0], [6.0]], [[5.0], [7.0], [9.0]]])
    mask = torch.tensor([[False, True, True], [False] * 3])
    assert mean_state(z, mask).tolist() == [[4.0], [0.0]]
    assert last_column(mask).tolist() == [2, 0]
