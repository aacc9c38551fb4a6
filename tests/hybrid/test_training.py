"""hybrid_training, hybrid_data, hybrid_text: a step against a plain loop, who decays, which data, text in and out."""

from __future__ import annotations

import copy
import hashlib
import math
import random

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import options
from engine.batches import IGNORE
from engine.optimization import NonFiniteError, OptimConfig
from engine.schedule import ScheduleConfig, learning_rate
from hybrid import data as hybrid_data
from hybrid.data import (
    HybridData,
    HybridDataConfig,
    data_problems,
    dev_folders,
    open_data,
    training_batches,
    usable_workers,
    validation_batches,
)
from hybrid.model import HybridModel, LossWeights, is_hrm_parameter
from hybrid.run import hybrid_config
from hybrid.text import HybridText
from hybrid.training import HybridStepConfig, HybridTrainer, gate_scale, learns_by_muon
from text_data.synthetic import SimpleTokenizer, is_held_out, synthetic_questions
from text_data.triples import PreparedData
from tiny_hybrid import RUN, VOCABULARY, batch_of, logits_of, rows_of, tiny, triples, write_prepared

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def settings(**changes) -> options.Options:
    opts = options.parse([*RUN, "--dataset", "synthetic"])
    assert set(changes) <= set(vars(opts)), changes
    return options.replace(opts, **{"lr": 1e-2, **changes})


def data_config(**changes) -> HybridDataConfig:
    return options.part(HybridDataConfig, settings(**changes))


def opened(**changes) -> HybridData:
    return open_data(data_config(**changes))


def trainer_of(model: HybridModel, precision: str = "none", **changes) -> HybridTrainer:
    opts = settings(**changes)
    config = options.part(HybridStepConfig, opts)
    return HybridTrainer(config, options.part(OptimConfig, opts), model, Accelerator(cpu=True), precision)


def taken(trainer: HybridTrainer, batches: list, step: int = 0) -> tuple[dict, dict]:
    """(gradients before clipping, metrics) of a step that is not taken."""
    found = {}

    def record(step: int, loss: float) -> float:
        found.update({name: None if p.grad is None else p.grad.clone() for name, p in trainer.parameters.items()})
        trainer._forget_gradients()
        return 0.0

    trainer._update = record
    return found, trainer.step(batches, step, lr=0.0)


# --- schedules


def test_the_gate_opens_after_its_warmup_step_by_step():
    config = HybridStepConfig(hrm_gate_warmup_steps=3, hrm_gate_ramp_steps=4, hrm_gate_scale=0.8)
    found = [gate_scale(config, step) for step in range(9)]
    assert found == pytest.approx([0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert [gate_scale(HybridStepConfig(), step) for step in (0, 1)] == [1.0, 1.0]
    at_once = HybridStepConfig(hrm_gate_warmup_steps=2, hrm_gate_ramp_steps=1)
    assert [gate_scale(at_once, step) for step in range(4)] == [0, 0, 1, 1]
    never = HybridStepConfig(hrm_gate_scale=0.0)
    assert {gate_scale(never, step) for step in range(5)} == {0.0}


@given(warmup=st.integers(0, 50), ramp=st.integers(0, 50), scale=st.floats(0, 1), step=st.integers(0, 200))
def test_the_gate_never_closes_again_and_never_passes_its_scale(warmup, ramp, scale, step):
    config = HybridStepConfig(hrm_gate_warmup_steps=warmup, hrm_gate_ramp_steps=ramp, hrm_gate_scale=scale)
    now, later = gate_scale(config, step), gate_scale(config, step + 1)
    assert 0 <= now <= later <= scale and (now == 0) == (step < warmup or now == 0)
    assert gate_scale(config, warmup + ramp) == scale


@given(scheduler=st.sampled_from(["cosine", "linear"]), ratio=st.floats(0, 1), lr=st.floats(1e-8, 1),
       warmup=st.integers(0, 20), after=st.integers(0, 1000), progress=st.floats(0, 1))
def test_the_learning_rate_never_falls_under_its_floor(scheduler, ratio, lr, warmup, after, progress):
    schedule = ScheduleConfig(lr_scheduler=scheduler, lr_min_ratio=ratio, lr=lr)
    assert lr * ratio * (1 - 1e-12) <= learning_rate(schedule, warmup + after, progress, warmup) <= lr * (1 + 1e-12)
    assert learning_rate(schedule, warmup + after, 1.0, warmup) == pytest.approx(lr * ratio)
    assert learning_rate(schedule, warmup + after, 0.0, warmup) == pytest.approx(lr)


# --- a step


def test_one_step_is_adamw_on_the_training_loss_with_decay_on_matrices():
    model = tiny()
    plain, batch = copy.deepcopy(model), batch_of(triples(4))
    trainer = trainer_of(model, optimizer="adamw", weight_decay=0.1, grad_clip=0.5, deep_supervision=True,
                         use_halting=True, ds_weight=0.3, halting_weight=0.2, halting_target=2.0)
    loss = plain.training_loss(batch, LossWeights(0.3, 0.2, 2.0)).loss
    metrics = trainer.step([batch], 0, lr=0.01)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, p in plain.named_parameters():
        grad = p.grad * min(1.0, 0.5 / norm)
        decayed = p.detach() * (1 - 0.01 * 0.1 if p.ndim >= 2 else 1)
        expected = decayed - 0.01 * grad / (grad.abs() + 1e-8)  # the first step of Adam
        found, large = dict(model.named_parameters())[name], grad.abs() > 1e-6
        torch.testing.assert_close(found[large], expected[large], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_micro_batches_have_the_gradient_of_the_whole_batch(scale):
    rows = triples(6, seed=3)
    changes = {"deep_supervision": True, "hrm_gate_scale": scale, "h_cycles": 2}
    whole, metrics = taken(trainer_of(tiny(), **changes), [batch_of(rows)])
    parts, split = taken(trainer_of(tiny(), **changes), [batch_of(rows[:1]), batch_of(rows[1:4]), batch_of(rows[4:])])
    for name, gradient in whole.items():
        assert (gradient is None) == (parts[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert metrics.keys() == split.keys()
    for name, value in metrics.items():
        assert split[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert metrics["examples"] == 6 and metrics["tokens"] == sum(len(row.labels) for row in rows)
    assert metrics["tokens_read"] == sum(len(row.labels) + len(row.encoder_ids) for row in rows)


def test_the_metrics_of_gate_and_halting_are_over_the_examples_of_the_batch():
    rows, model = triples(5, seed=6), tiny()
    _, metrics = taken(trainer_of(model, use_halting=True), [batch_of(rows[:2]), batch_of(rows[2:])])
    out = model.training_loss(batch_of(rows), LossWeights(halting=0.01))
    for name in ("gate", "halt_sum"):
        values = out.metrics[name]
        expected = {"mean": values.mean(), "min": values.min(), "max": values.max(), "std": values.std(correction=0)}
        for kind, value in expected.items():
            assert metrics[f"{name}_{kind}"] == pytest.approx(value.item(), rel=1e-4), (name, kind)
    assert metrics["z_norm"] == pytest.approx(out.metrics["z_norm"].item(), rel=1e-4)
    assert metrics["gate_std"] > 0 and metrics["halt_sum_std"] > 0


def test_losses_that_are_off_are_off():
    for changes, absent in (({}, {"deep_supervision_loss", "halting_loss", "halting_bce"}),
                            ({"deep_supervision": True}, {"halting_loss", "halting_bce"}),
                            ({"use_halting": True}, {"deep_supervision_loss"})):
        gradients, metrics = taken(trainer_of(tiny(), **changes), [batch_of(triples(2))])
        assert not absent & set(metrics)
        assert (gradients["encoder.core.halt.bias"] is None) == ("use_halting" not in changes)
        if not changes:
            assert metrics["loss"] == metrics["token_loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw_8bit"])
def test_hrm_neither_moves_nor_decays_while_the_gate_is_shut(optimizer):
    model = tiny(d_model=32, d_h=32)
    trainer = trainer_of(model, optimizer=optimizer, weight_decay=0.5, hrm_gate_warmup_steps=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def decays(apart: bool) -> set[float]:
        return {group["weight_decay"] for each, _ in trainer.optimizers for group in each.param_groups
                if bool(group.get("apart")) == apart and any(p.ndim >= 2 for p in group["params"])}

    for step in range(2):
        metrics = trainer.step([batch_of(triples(3, seed=step))], step, lr=0.01)
        assert metrics["gate_scale"] == 0 and decays(True) == {0.0} and decays(False) == {0.5}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == is_hrm_parameter(name), name
    trainer.step([batch_of(triples(3))], 2, lr=0.01)
    assert decays(True) == decays(False) == {0.5}
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"encoder.core.halt.weight", "encoder.core.halt.bias"}  # its loss is off


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw_8bit"])
def test_a_zero_gradient_does_not_decay_hrm_either(optimizer):
    """As under DDP, whose unused weights may come with zeros for a gradient: only the switched decay holds them."""
    model = tiny(d_model=32, d_h=32)
    trainer = trainer_of(model, optimizer=optimizer, weight_decay=0.5, hrm_gate_warmup_steps=2)
    before = {name: p.detach().clone() for name, p in model.hrm_parameters().items()}
    plain = trainer._update

    def with_zeros(step: int, loss: float) -> float:
        for p in model.hrm_parameters().values():
            p.grad = torch.zeros_like(p)
        return plain(step, loss)

    trainer._update = with_zeros
    trainer.step([batch_of(triples(3))], 0, lr=0.01)
    for name, p in model.hrm_parameters().items():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0, msg=name)


def test_muon_takes_the_hidden_matrices_and_each_weight_has_one_optimizer():
    model = tiny(encoder="mamba2", tie_word_embeddings=False)
    trainer = trainer_of(model, optimizer="muon")
    names = {type(optimizer).__name__: set(order) for optimizer, order in trainer.optimizers}
    assert names["Muon"] | names["AdamW"] == set(dict(model.named_parameters())) and not names["Muon"] & names["AdamW"]
    assert {"encoder.core.l_block.layers.0.mlp.down.weight", "decoder.out.weight",
            "encoder.backbone.scan.layers.0.mixer.in_proj.weight"} <= names["Muon"]
    assert {"encoder.embed.weight", "lm_head.weight", "encoder.core.halt.weight", "encoder.gate.score.weight",
            "encoder.bridge.queries", "encoder.core.high_slots", "encoder.core.low_slots",
            "encoder.backbone.scan.layers.0.mixer.A_log"} <= names["AdamW"]
    for name, p in model.named_parameters():
        assert learns_by_muon(name, p) == (name in names["Muon"])


def test_a_step_that_is_no_number_changes_nothing():
    model = tiny()
    trainer = trainer_of(model, use_halting=True)
    with torch.no_grad():
        model.encoder.bridge.out.weight[0, 0] = float("inf")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteError, match="batch 0: loss nan"):
        trainer.step([batch_of(triples(2))], 0, lr=0.1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("encoder", ["mamba2", "transformer"])
def test_it_learns_a_handful_of_triples_by_heart(encoder):
    """Twelve steps halve the loss: nothing in the chain from tokens to weights is cut."""
    model, batch = tiny(awake=False, encoder=encoder), batch_of(triples(4))
    trainer = trainer_of(model, optimizer="adamw", weight_decay=0.0, deep_supervision=True, use_halting=True)
    losses = [trainer.step([batch], step, lr=0.02)["token_loss"] for step in range(15)]
    assert losses[-1] < losses[0] / 2, losses


def test_a_checkpoint_of_another_tokenizer_or_shape_does_not_load(tmp_path):
    from engine.checkpoints import Checkpoint

    trainer = trainer_of(tiny())
    trainer.tokenizer_json = "ours"
    documents = trainer.documents()
    assert documents["tokenizer.json"] == "ours" and "lm_head.weight" not in trainer.weights()
    trainer.load(Checkpoint(tmp_path, {"model": trainer.weights()}, documents), tmp_path)
    with pytest.raises(ValueError, match="another tokenizer"):
        trainer.load(Checkpoint(tmp_path, {"model": trainer.weights()}, documents | {"tokenizer.json": "x"}), tmp_path)
    other = trainer_of(tiny(h_len=3)).weights()
    with pytest.raises(ValueError, match="encoder.core.high_slots is .*expected"):
        trainer.load(Checkpoint(tmp_path, {"model": other}, documents), tmp_path)


# --- data


def test_the_synthetic_splits_share_no_pair_in_either_order():
    def pairs(split: str) -> set[tuple[int, int]]:
        found = set()
        for prompt, answer in synthetic_questions(10_000, 0, split):
            a, b = (int(word.rstrip("?")) for word in prompt.removeprefix("What is ").split(" + "))
            assert int(answer) == a + b and is_held_out(a, b) == is_held_out(b, a) == (split == "val")
            found |= {(a, b), (b, a)}
        return found

    train, val = pairs("train"), pairs("val")
    assert not train & val and len(train | val) == 10_000 and 700 < len(val) < 1300


def test_synthetic_data_as_the_options_say(monkeypatch):
    monkeypatch.setattr(hybrid_data, "SYNTHETIC_TRAIN", 40)
    data = opened(eval_n=7, seed=3)
    tokenizer = Tokenizer.from_str(data.tokenizer_json)
    assert len(data.train) == 40 and len(data.val) == len(data.questions) == 7
    for triple, (prompt, answer) in zip(data.val, data.questions, strict=True):
        assert tokenizer.decode(triple.encoder_ids) == prompt and triple.labels[-1] == data.eos_id
        assert tokenizer.decode(triple.labels[:-1]) == answer and triple.decoder_input_ids[0] == data.bos_id
    other = opened(eval_n=7, seed=4)
    assert other.val == data.val and other.train != data.train  # what is validated does not hang on the seed


@given(rows=st.integers(1, 23), size=st.integers(1, 5), world=st.integers(1, 3), most=st.integers(0, 30))
def test_validation_reads_every_sample_once_over_all_ranks(rows, size, world, most):
    part = triples(rows, seed=rows)
    seen = []
    for rank in range(world):
        for batch in validation_batches(part, size, 0, most, rank, world):
            assert 1 <= len(batch["labels"]) <= size
            seen += [tuple(ids[mask.bool()].tolist()) for ids, mask in
                     zip(batch["encoder_ids"], batch["encoder_mask"], strict=True)]
    assert sorted(seen) == sorted(tuple(row.encoder_ids) for row in part[: min(most or rows, rows)])


def test_ranks_share_the_training_batches(tmp_path):
    folder = write_prepared(tmp_path / "data", train=12)
    config = data_config(dataset=str(folder), batch_size=2)
    data = open_data(config)
    shares = [training_batches(data, config, rank, 2, 0) for rank in range(2)]
    seen = [tuple(ids[mask.bool()].tolist()) for _ in range(3) for share in shares for batch in [next(share)]
            for ids, mask in zip(batch["encoder_ids"], batch["encoder_mask"], strict=True)]
    assert sorted(seen) == sorted(tuple(row.encoder_ids) for row in rows_of(folder, "train"))


def test_dev_sets_by_name(tmp_path):
    assert dev_folders(None) == {}
    assert {name: str(path) for name, path in dev_folders("math=a/b,c.o-de=../x").items()} == {
        "math": "a/b", "c.o-de": "../x"}
    for wrong in ("math", "=x", "a=,b=c", "a=b,", "a b=c"):
        with pytest.raises(SystemExit):
            options.parse([*RUN, "--dataset", "synthetic", "--dev_sets", wrong])
    folder = write_prepared(tmp_path / "a, b")
    assert dev_folders(f"one={folder},two={folder}") == {"one": folder, "two": folder}
    for wrong, told in ((f"one={folder},one={folder}", "one is named twice"), (f"one={folder},b", "'b' is no NAME=DIR"),
                        (f"one={folder},b c={folder}", "is no NAME=DIR")):
        assert [line for line in data_problems(str(folder), wrong) if told in line], wrong
    data = opened(dataset=str(folder), dev_sets=f"one={folder}", max_seq_len=5)
    assert isinstance(data.train, PreparedData) and list(data.dev) == ["one"]
    assert list(data.dev["one"]) == list(data.val) and max(len(t.encoder_ids) for t in data.val) <= 5
    assert opened(dataset=str(folder), eval_only=True).train is None
    assert hashlib.sha256(data.tokenizer_json.encode()).hexdigest() == data.val.meta["tokenizer_sha256"]


def test_problems_of_the_data_one_line_each(tmp_path):
    one = write_prepared(tmp_path / "one")
    other = write_prepared(tmp_path / "other", characters="abc ")
    assert data_problems("synthetic", None) == data_problems(str(one), f"a={one}") == []
    (told,) = data_problems(str(one), f"a={other}")
    assert "prepared with different tokenizers" in told
    (told,) = data_problems(str(tmp_path / "none"), None)
    assert "has no meta.json" in told and "prepare_language_dataset.py" in told
    assert len(data_problems(str(tmp_path / "x"), f"a={tmp_path / 'y'}")) == 2


def test_workers_are_capped_to_the_cores_with_a_warning(monkeypatch):
    monkeypatch.setattr(hybrid_data.os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert usable_workers(3) == (3, None)
    workers, told = usable_workers(8)
    assert workers == 3 and told.startswith("WARNING: --dataset_workers 8: this machine has 3 cores")


def test_random_tokens_fill_the_longest_batch():
    opts = settings(dataset=None, dry_run=True, max_seq_len=30, batch_size=3)
    config = options.part(HybridDataConfig, opts)
    data = open_data(config)
    batch = next(training_batches(data, config, 0, 1, 0))
    assert all(batch[name].shape == (3, 30) for name in batch) and batch["encoder_mask"].all()
    assert data.tokenizer_json is None and not data.questions
    torch.manual_seed(0)
    assert HybridModel(hybrid_config(opts, data)).training_loss(batch, LossWeights()).loss.isfinite()


# --- text


@pytest.fixture(scope="module")
def text() -> HybridText:
    model = tiny(vocab_size=SimpleTokenizer().vocab_size, use_halting=True, h_cycles=3)
    return HybridText(model, SimpleTokenizer().tokenizer.to_str(), batch_size=2)


PROMPTS = ["What is 1 + 2?", "x", "a longer prompt than all of the others", "", "What is 34 + 5?"]


def test_answers_come_in_the_order_of_the_prompts_and_do_not_hang_on_the_batch(text):
    told = []
    together = text.generate(PROMPTS, 6, told.append)
    used = text.segments_used
    assert together == [text.generate([prompt], 6)[0] for prompt in PROMPTS] and told == [2, 4, 5]
    assert len(set(together)) > 2
    cycles = []
    for prompt in PROMPTS:
        text.generate([prompt], 1)
        cycles.append(text.segments_used)
    assert used == pytest.approx(sum(cycles) / len(cycles))
    assert text.generate([], 4) == []
    torch.manual_seed(5)
    drawn = text.generate(PROMPTS[:2], 6, do_sample=True, top_k=0)
    torch.manual_seed(5)
    assert text.generate(PROMPTS[:2], 6, do_sample=True, top_k=0) == drawn != together[:2]


def test_an_answer_ends_at_the_end_of_sequence_and_shows_no_special_token(text):
    tokenizer = SimpleTokenizer()
    ids = tokenizer.encode("19")
    assert text.decode([*ids, tokenizer.eos_id, *ids]) == text.decode([IGNORE, *ids, tokenizer.pad_id]) == "19"
    assert text.encode("19") == ids


def test_a_long_prompt_keeps_its_end(text):
    short = HybridText(text.model, SimpleTokenizer().tokenizer.to_str(), max_seq_len=5)
    assert short.generate(["abcdefghij"], 5) == text.generate(["fghij"], 5)
    assert short.log_likelihoods([("abcdefghij", "xy")]) == text.log_likelihoods([("fghij", "xy")])


def test_questions_and_answers_that_are_cut_are_told(text):
    short = HybridText(text.model, SimpleTokenizer().tokenizer.to_str(), batch_size=2, max_seq_len=14)
    answers = short.generate(PROMPTS, 6)
    assert short.cuts.questions == (False, False, True, False, True)
    ended = [len(short.encode(answer)) < 6 for answer in answers]
    assert all(cut != end for cut, end in zip(short.cuts.answers, ended, strict=True))
    assert True in short.cuts.answers
    short.log_likelihoods([(prompt, "3") for prompt in PROMPTS])
    assert short.cuts.questions == (False, False, True, False, True) and short.cuts.answers == ()
    text.generate(PROMPTS, 6)
    assert not any(text.cuts.questions)


def test_log_likelihoods_token_by_token(text):
    pairs = [("What is 1 + 2?", "3"), ("a", "quite long"), ("", "x"), ("nothing", "")]
    found, tokenizer = text.log_likelihoods(pairs), SimpleTokenizer()
    for (context, continuation), (total, count) in zip(pairs, found, strict=True):
        ids, expected = tokenizer.encode(continuation), 0.0
        read = tokenizer.encode(context) or [1]
        for place, token in enumerate(ids):
            with torch.no_grad():
                logits = text.model(torch.tensor([read]), decoder_input_ids=torch.tensor([[1, *ids[:place]]])).logits
            expected += logits[0, -1].log_softmax(dim=-1)[token].item()
        assert count == len(ids) and total == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 1 <= text.segments_used <= 3


def test_text_with_another_gate_leaves_the_model_as_it_was(text):
    shut = HybridText(text.model, SimpleTokenizer().tokenizer.to_str(), gate_scale=0.0)
    text.model.train()
    one = shut.log_likelihoods([("a", "bc")])
    assert text.model.training and text.model.config.gate_scale == 1.0 and shut.segments_used == 0
    text.model.eval()
    assert one != text.log_likelihoods([("a", "bc")])
    text.model.config.gate_scale = 0.0
    try:
        assert one == text.log_likelihoods([("a", "bc")])
    finally:
        text.model.config.gate_scale = 1.0


def test_teacher_forced_exact_is_greedy_generation(text):
    """What halting learns from: all labels are argmax exactly when generation gives them."""
    model, draw = text.model, random.Random(0)
    model.config.use_halting = False
    try:
        for row in triples(4, seed=2):
            answer = model.generate(torch.tensor([row.encoder_ids]), max_new_tokens=5, do_sample=False)[0, 1:].tolist()
            wrong = [*answer]
            wrong[draw.randrange(len(answer))] ^= 1
            for labels, right in ((answer, 1.0), (wrong, 0.0)):
                batch = batch_of([row._replace(decoder_input_ids=[1, *labels[:-1]], labels=labels)])
                out = model.training_loss(batch, LossWeights())
                assert out.metrics["teacher_forced_exact"].item() == right
                assert logits_of(model, batch).shape[1] == len(labels) and VOCABULARY <= model.config.vocab_size
    finally:
        model.config.use_halting = True
