"""prompt_gate: where it is shut the answer is the bare LLM's, bit for bit; it learns when, and each row has its own."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

import options
from addon.retain import RetainConfig, Retained, gate_loss
from batching import Batch, PromptFormat, pad
from engine.batches import IGNORE
from host import load_tokenizer
from injector import GATE_RADIUS, PromptGate
from model import HRMAddonConfig, HRMController
from reasoning_gym_wrapper import Reserve, make_tasks
from text_model import CausalTextModel
from tiny_families import EOS, FAMILIES, PAD, left_padded, random_ids, tiny_controller, tiny_host
from tiny_runs import ROOT, TINY, newest, records, tensors, tiny_model, tiny_trainer

pytestmark = pytest.mark.usefixtures("no_curve")
VARIANTS = {
    "cab": {},
    "grb+bias": {"injector": "grb", "logit_bias_head": True},
    "pooled": {"hrm_input": "pooled"},
    "all": {"hrm_read": "all"},
    "act": {"use_act": True, "halt_max_segments": 3},
    "settled": {"segments": 4, "halt_settled": 0.3},
    "mlp": {"adapter": "mlp"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
TEXTS = [f"The sea was calm on day {index}, and the boats stayed out until evening." for index in range(8)]
PAIRS = [{"prompt": f"What is the capital of land {index}?", "answer": f"city {index}"} for index in range(4)]


def questions() -> list[torch.Tensor]:
    return [random_ids(1, length, seed)[0] for seed, length in enumerate((7, 5, 3, 6))]


def distances(model: HRMController, prompts: list[torch.Tensor]) -> torch.Tensor:
    """(B,) of each prompt alone, without padding."""
    gate = model.model.addon.prompt_gate
    found = []
    for prompt in prompts:
        mask = torch.ones(1, len(prompt), dtype=torch.bool)
        _, read, _ = model.model.run_host(prompt[None], mask.long(), torch.arange(len(prompt))[None])
        features, context = model.model.prompt_features(read, mask, torch.arange(len(prompt))[None])
        found.append(gate(features, context.mask))
    return torch.cat(found)


@torch.no_grad()
def half_open(model: HRMController, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Sets the gate so that half of the prompts find it open; (B,) bool, which."""
    gate = model.model.addon.prompt_gate
    sizes, _ = distances(model, prompts).sort()
    between = (sizes[len(sizes) // 2 - 1] + sizes[len(sizes) // 2]) / 2
    gate.look.weight *= (GATE_RADIUS / between) ** 0.5
    gate.centre *= (GATE_RADIUS / between) ** 0.5
    is_open = distances(model, prompts) < GATE_RADIUS
    assert 0 < int(is_open.sum()) < len(prompts)
    return is_open


@torch.no_grad()
def set_all(model: HRMController, is_open: bool) -> None:
    """Opens or shuts the gate for every prompt."""
    gate = model.model.addon.prompt_gate
    gate.look.weight.zero_()
    gate.centre.fill_(0.0 if is_open else 10.0)


def pair_of(family: str = "llama", **settings) -> tuple[HRMController, HRMController]:
    """(with a gate, the same add-on without one)."""
    host = tiny_host(family)
    gated = tiny_controller(family, host=host, prompt_gate=True, **settings)
    plain = tiny_controller(family, host=host, **settings)
    state = {name: tensor for name, tensor in gated.addon_state().items() if "prompt_gate" not in name}
    plain.load_addon_state(state)
    return gated, plain


@torch.no_grad()
def bare(model: HRMController, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with model.bare() as host:
        return host(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits


# --- shut is bare, open is the add-on ---------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shut_gate_is_the_bare_llm_and_an_open_one_the_add_on_bit_for_bit(family, variant):
    gated, plain = pair_of(family, **VARIANTS[variant])
    ids, mask = left_padded(questions())
    is_open = half_open(gated, questions())
    with torch.no_grad():
        ours = gated(ids, mask, prompt_mask=mask).logits
        theirs = plain(ids, mask, prompt_mask=mask).logits
    assert torch.equal(ours[~is_open], bare(gated, ids, mask)[~is_open])
    assert torch.equal(ours[is_open], theirs[is_open])
    assert not torch.allclose(theirs[~is_open], ours[~is_open], atol=0.1), "an open gate would have changed them"


@every_variant
def test_rows_of_one_batch_are_answered_as_each_alone(variant):
    gated, plain = pair_of(**VARIANTS[variant])
    is_open = half_open(gated, questions())
    ids, mask = left_padded(questions())
    how = {"max_new_tokens": 5, "pad_token_id": PAD, "eos_token_id": None, "do_sample": False}
    ours = gated.generate(ids, attention_mask=mask, **how)[:, ids.shape[1] :]
    assert torch.equal(ours, gated.generate(ids, attention_mask=mask, use_cache=False, **how)[:, ids.shape[1] :])
    for row, prompt in enumerate(questions()):
        model = plain if is_open[row] else plain.host
        alone = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **how)
        assert torch.equal(ours[row], alone[0, len(prompt) :])


@pytest.mark.parametrize("beams", [1, 3])
def test_the_decision_is_made_once_for_a_prompt(beams):
    """While decoding, the gate comes back with z_H: what is generated cannot open or shut it."""
    gated, _ = pair_of()
    half_open(gated, questions())
    ids, mask = left_padded(questions())
    seen = []
    gated.model.addon.prompt_gate.register_forward_hook(lambda gate, read, distance: seen.append(distance))
    gated.generate(ids, attention_mask=mask, max_new_tokens=4, pad_token_id=PAD, eos_token_id=None, num_beams=beams,
                   do_sample=False)
    assert [tuple(distance.shape) for distance in seen] == [(beams * len(ids),)]


def test_plain_text_behind_a_shut_gate_has_the_bare_llms_likelihood(tiny_host, tokenizer):
    """What the suite and lm-evaluation-harness ask: the gate reads the context; one token stands for an empty one."""
    model = tiny_model(tiny_host, prompt_gate=True, retain="x")
    pairs = [(text[:20], text[20:]) for text in TEXTS[:4]] + [("", TEXTS[5])]
    ours = CausalTextModel(model, tokenizer)
    bare_scores = CausalTextModel(model, tokenizer, bare=True).log_likelihoods(pairs)
    set_all(model, is_open=False)
    assert ours.log_likelihoods(pairs) == bare_scores
    set_all(model, is_open=True)
    moved = ours.log_likelihoods(pairs)
    assert all(one[0] != other[0] for one, other in zip(moved, bare_scores, strict=True))


@every_variant
def test_training_sees_what_evaluation_sees(variant):
    """A segment's logits behind an open gate are the add-on's, behind a shut one the bare LLM's."""
    gated, plain = pair_of(**VARIANTS[variant])
    is_open = half_open(gated, questions())
    batch = batch_of(questions())
    for model in (gated, plain):
        model.train()
    ours = gated.segment(gated.encode(batch), batch.labels)
    theirs = plain.segment(plain.encode(batch), batch.labels)
    rows = (batch.labels != IGNORE).nonzero()[:, 0]
    none = bare(gated, batch.input_ids, batch.attention_mask)[:, -batch.labels.shape[1] - 1 : -1]
    none = none[batch.labels != IGNORE]
    assert torch.equal(ours.logits[is_open[rows]], theirs.logits[is_open[rows]])
    torch.testing.assert_close(ours.logits[~is_open[rows]], none[~is_open[rows]], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.metrics["gate_distance"], distances(gated, questions()), atol=1e-4, rtol=1e-4)
    gate_loss(ours.metrics["gate_distance"], is_open=True).backward()
    assert all(float(part.grad.abs().max()) > 0 for part in gated.model.addon.prompt_gate.parameters())


def batch_of(prompts: list[torch.Tensor]) -> Batch:
    prompt_ids, prompt_mask = pad([prompt.tolist() for prompt in prompts], PAD, "left")
    target_ids, target_mask = pad([[3 + row, 4, EOS][: 2 + row % 2] for row in range(len(prompts))], PAD, "right")
    return Batch(prompt_ids, prompt_mask, target_ids, target_ids.masked_fill(target_mask == 0, IGNORE), [])


# --- the gate itself --------------------------------------------------------------------------------------------------


def test_the_gate_is_shut_far_from_what_it_is_open_for_in_every_direction():
    torch.manual_seed(0)
    gate = PromptGate(12)
    mask = torch.ones(50, 3, dtype=torch.bool)
    centre = torch.randn(1, 3, 12)
    with torch.no_grad():
        gate.centre.copy_(gate.look(torch.cat([centre[:, -1], centre.mean(1)], dim=-1))[0])
        near = centre + 0.1 * torch.randn(50, 3, 12)
        far = centre + 20 * torch.randn(50, 3, 12)
        assert bool(gate.opened(near, mask).all()) and not bool(gate.opened(far, mask).any())


def test_the_gate_reads_no_padding_and_decides_alike_under_autocast():
    torch.manual_seed(0)
    gate = PromptGate(6)
    features = torch.randn(1, 4, 6)
    mask = torch.tensor([[False, True, True, True]])
    other = features.clone()
    other[:, 0] = 100.0
    assert torch.equal(gate(features, mask), gate(other, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gate(features, mask)
    assert torch.equal(gate(features, mask), rounded) and rounded.dtype == torch.float32
    torch.testing.assert_close(gate(features, mask), gate(features[:, 1:], mask[:, 1:]))


def test_the_loss_is_the_cross_entropy_of_open_and_of_shut():
    distance = torch.tensor([0.3, 2.2])
    chance = [1 / (1 + math.exp(x - 1)) for x in distance.tolist()]
    assert float(gate_loss(distance, True)) == pytest.approx(-sum(map(math.log, chance)), rel=1e-5)
    assert float(gate_loss(distance, False)) == pytest.approx(-sum(math.log(1 - p) for p in chance), rel=1e-5)


# --- what it learns from ----------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.jsonl"
    rows = [*PAIRS, *({"text": text} for text in TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_other_text_is_shown_plain_and_framed_short_and_long(other, tokenizer):
    retained = Retained(RetainConfig(str(other), 8, max_seq_len=120, prompt_gate=True), PromptFormat(tokenizer))
    framed = []
    plain = []
    for batch in [retained.batch(step) for step in range(30)]:
        assert batch.input_ids.shape[1] <= 240
        for ids, mask, labels in zip(batch.prompt_ids, batch.prompt_mask, batch.labels, strict=True):
            assert 2 <= int(mask.sum()) + int((labels != IGNORE).sum()) <= 120 and bool((labels != IGNORE).any())
            text = tokenizer.decode(ids[mask.bool()])
            (framed if text.endswith("<|assistant|>") else plain).append(text)
    assert 60 < len(plain) < 150 and 60 < len(framed)
    for texts in (framed, plain):
        kinds = {"sea": "calm", "pair": "capital"}
        assert all(any(word in text for text in texts) for word in kinds.values()), "every text comes both ways"
        sizes = sorted(len(text) for text in texts)
        assert sizes[len(sizes) // 4] < 0.5 * sizes[-1], "short pieces are as likely as long ones"
    again = Retained(RetainConfig(str(other), 8, max_seq_len=120, prompt_gate=True), PromptFormat(tokenizer))
    assert torch.equal(again.batch(3).input_ids, retained.batch(3).input_ids)


def test_plain_text_keeps_the_token_that_begins_every_text(other, tokenizer):
    retained = Retained(RetainConfig(str(other), 16, max_seq_len=64, prompt_gate=True), PromptFormat(tokenizer))
    bos = tokenizer.bos_token_id
    retained.pairs = []
    retained.texts = [[bos, *range(10, 40)]]
    for batch in (retained.batch(step) for step in range(4)):
        for ids, mask, labels in zip(batch.prompt_ids, batch.prompt_mask, batch.labels, strict=True):
            read = ids[mask.bool()]
            assert read[0] == bos and read[-1] in (bos, tokenizer.convert_tokens_to_ids("<|assistant|>"), labels[0] - 1)


def test_a_text_is_also_shown_from_its_beginning_on(other, tokenizer):
    retained = Retained(RetainConfig(str(other), 32, max_seq_len=120, prompt_gate=True), PromptFormat(tokenizer))
    whole = []
    for batch in (retained.batch(step) for step in range(10)):
        for mask, ids, labels in zip(batch.prompt_mask, batch.prompt_ids, batch.labels, strict=True):
            if ids[mask.bool()].tolist() == [tokenizer.bos_token_id]:
                whole.append(tokenizer.decode(labels[labels != IGNORE]))
    assert set(TEXTS) & set(whole) and all(text in TEXTS or text.startswith("What is") for text in whole)


def test_a_framed_text_leaves_room_for_what_follows(other, tokenizer):
    retained = Retained(RetainConfig(str(other), 8, max_seq_len=20, prompt_gate=True), PromptFormat(tokenizer))
    for step in range(20):
        batch = retained.batch(step)
        whole = batch.prompt_mask.sum(1) + (batch.labels != IGNORE).sum(1)
        assert int(whole.max()) <= 20 and bool((batch.labels != IGNORE).any(dim=1).all())


@pytest.mark.parametrize("segments", [1, 3])
def test_training_opens_the_gate_for_the_task_and_shuts_it_for_the_rest(segments, other):
    """On the embedded LLM, whose states mean something, in few batches."""
    host = ROOT / "assets" / "tiny_host"
    words = ["--prompt_gate", "--ema", "0", "--segments", str(segments), "--task", "chain_sum"]
    opts = options.parse([*TINY, "--retain", str(other), *words])
    trainer = tiny_trainer(opts, tiny_model(host, prompt_gate=True, segments=segments))
    shown = PromptFormat(load_tokenizer(str(host)))
    trainer.retained = Retained(RetainConfig(str(other), 8, max_seq_len=64, prompt_gate=True), shown)
    examples = Reserve(make_tasks(["chain_sum"], "small"), 40).examples
    for step in range(12):
        metrics = trainer.step([shown.batch(examples[3 * step : 3 * step + 4])], step, lr=2e-3)
    assert metrics["gate_open"] == 1.0 and metrics["gate_open_other"] == 0.0, metrics

    # On items and texts that it was not trained on.
    model = trainer.controller.eval()
    fresh = shown.prompts([example.question for example in examples[37:]])
    texts = shown.prompts(["Nobody saw the harbour in the fog that day.", "Who wrote 12 letters to the king?"])
    found = distances(model, [torch.tensor(ids) for ids in fresh + texts])
    assert (found < GATE_RADIUS).tolist() == [True] * len(fresh) + [False] * 2


class Noted(torch.autograd.Function):
    """The same number; notes whose gradient is not zero."""

    @staticmethod
    def forward(ctx, number, name, notes):
        ctx.name = name
        ctx.notes = notes
        return number.clone()

    @staticmethod
    def backward(ctx, gradient):
        if float(gradient):
            ctx.notes.append(ctx.name)
        return gradient, None, None


def test_it_learns_in_the_segment_that_learns_from_other_text_alone(other, tiny_host, tokenizer, monkeypatch):
    """Else open would be learnt once for each segment, and shut once for each batch."""
    opts = options.parse([*TINY, "--retain", str(other), "--prompt_gate", "--ema", "0", "--segments", "3"])
    trainer = tiny_trainer(opts, tiny_model(tiny_host, prompt_gate=True, segments=3))
    trainer.retained = Retained(RetainConfig(str(other), 4, max_seq_len=64, prompt_gate=True), PromptFormat(tokenizer))
    asked = []

    def noted(distance: torch.Tensor, is_open: bool) -> torch.Tensor:
        return Noted.apply(gate_loss(distance, is_open), is_open, asked)

    monkeypatch.setattr("training.gate_loss", noted)
    batch = PromptFormat(tokenizer).batch(Reserve(make_tasks(["toy_add"], "default"), 4).examples)
    trainer.step([batch], 0, lr=1e-3)
    assert sorted(asked) == [False, True], "what has a gradient"


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--train_n", "8", "--cache_hidden", "ram"), ("--adapter", "mlp")],
                         ids=["hrm", "cache", "mlp"])
def test_a_run_logs_the_gate_and_resumes_bit_for_bit(more, call, other, tmp_path):
    if "mlp" in more:
        more = (*more, "--segments", "1", "--inner_T", "2")
    flags = ("--retain", str(other), "--retain_batch_size", "3", "--prompt_gate", "--save_every", "2", "--max_steps",
             "4", *more)
    assert call("--run_name", "whole", *flags)[0] == 0
    whole = tmp_path / "runs" / "whole"
    for line in records(whole)["metrics"]:
        assert 0 <= line["gate_open"] <= 1 and 0 <= line["gate_open_other"] <= 1
    name = "step-00000002"
    shutil.copytree(whole / "checkpoints" / name, tmp_path / "runs" / "part" / "checkpoints" / name)
    assert call("--run_name", "part", *flags)[0] == 0
    ours, theirs = (tensors(newest(tmp_path / "runs" / name)) for name in ("whole", "part"))
    assert any("prompt_gate" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("raw/"))

    # Evaluation needs no other text, and a checkpoint brings its gate.
    other.unlink()
    status, _, err = call("--resume", str(whole), "--eval_only", *more)
    assert status == 0, err


def test_cached_states_open_the_gate_as_the_llms_own_do(tiny_host):
    from tiny_cache import Parts

    parts = Parts(tiny_host, "--prompt_gate", "--retain", "x")
    cached = parts.features(parts.cache(None))
    own = parts.model.encode(parts.batch)
    gate = parts.model.model.addon.prompt_gate
    torch.testing.assert_close(gate(cached, own.context.mask), gate(own.features, own.context.mask), atol=2e-2, rtol=0)


def test_a_record_without_the_setting_has_no_gate():
    """As of a checkpoint that is older than the gate."""
    record = {name: value for name, value in HRMAddonConfig().settings().items() if name != "prompt_gate"}
    assert HRMAddonConfig(**record).prompt_gate is False
    assert not any("prompt_gate" in name for name in tiny_controller().addon_state())


def test_training_mode_decides_as_evaluation_mode_does():
    """GRPO scores in the one what was generated in the other."""
    gated, _ = pair_of()
    half_open(gated, questions())
    ids, mask = left_padded(questions())
    with torch.no_grad():
        assert torch.equal(gated.train()(ids, mask, prompt_mask=mask).logits,
                           gated.eval()(ids, mask, prompt_mask=mask).logits)


@pytest.mark.parametrize("typed,told", [
    ("--prompt_gate", "--prompt_gate needs --retain: without other text the gate would learn to be open for "
     "everything"),
    ("--prompt_gate --retain a.txt --lora_layers 1", "--prompt_gate cannot shut --lora_layers 1, which lie inside "
     "the LLM: leave one out"),
    ("--prompt_gate --retain a.txt --adapter lora", "--prompt_gate does nothing with --adapter lora, only with hrm and "
     "mlp: leave it out"),
])
def test_what_contradicts_the_gate_is_one_line(typed, told, capsys):
    with pytest.raises(SystemExit) as caught:
        options.parse(typed.split())
    assert caught.value.code == 2 and capsys.readouterr().err.splitlines() == [f"train.py: error: {told}"]
