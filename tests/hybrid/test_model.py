"""hybrid: shut gate, causality, encoders, generation, files, and the losses against plain loops written here."""

from __future__ import annotations

import copy
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import AutoModelForSeq2SeqLM

from engine.attention import key_mask
from engine.batches import IGNORE
from engine.positions import mean_state
from hybrid import layers as hybrid_blocks
from hybrid.banks import BankCore, Bridge, Gate
from hybrid.layers import Mamba2Encoder, Memory, TransformerEncoder
from hybrid.model import HybridConfig, HybridModel, LossWeights, is_hrm_parameter, shifted
from text_data.triples import Triple
from tiny_hybrid import VOCABULARY, bare, batch_of, logits_of, tiny, triples

ENCODERS, BRIDGES = ("mamba2", "transformer"), ("prefix", "cross_attn")
BOTH = pytest.mark.parametrize("encoder,bridge", [("mamba2", "prefix"), ("transformer", "cross_attn")])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ALL_LOSSES = LossWeights(deep_supervision=0.3, halting=0.7, halting_target=1.5)


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def gradients(model: HybridModel, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return batch_of(triples(4))


# --- the shut gate


@BOTH
def test_a_shut_gate_is_the_encoder_decoder_without_hrm_bit_for_bit(batch, encoder, bridge):
    model = tiny(encoder=encoder, bridge=bridge, gate_scale=0.0)
    without = bare(model)
    for training in (True, False):
        losses = [each.train(training).training_loss(batch, ALL_LOSSES) for each in (model, without)]
        same(losses[0].loss, losses[1].loss)
        same(losses[0].metrics["teacher_forced_exact"], losses[1].metrics["teacher_forced_exact"])
        same(logits_of(model, batch), logits_of(without, batch))
    asked = {"input_ids": batch["encoder_ids"], "attention_mask": batch["encoder_mask"], "max_new_tokens": 6}
    for how in ({"do_sample": False}, {"num_beams": 3}, {"use_cache": False}):
        same(model.generate(**asked, **how), without.generate(**asked, **how))


@BOTH
def test_behind_a_shut_gate_lie_exactly_the_hrm_parameters(encoder, bridge):
    """With the gate shut, NaN in one of them changes nothing and in any other parameter shows; open, all show."""
    model, batch = tiny(encoder=encoder, bridge=bridge, decoder_layers=1), batch_of(triples(1))
    whole, hrm = logits_of(model, batch), set(model.hrm_parameters())
    model.config.gate_scale = 0.0
    shut = logits_of(model, batch)
    assert not torch.equal(whole, shut)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(float("nan"))
        model.config.gate_scale = 0.0
        assert torch.equal(logits_of(model, batch), shut) == (name in hrm), name
        model.config.gate_scale = 1.0
        assert torch.equal(logits_of(model, batch), whole) == ("core.halt" in name), name  # that one stops, not says
        with torch.no_grad():
            parameter.copy_(kept)


@pytest.mark.parametrize("bridge", BRIDGES)
def test_a_shut_gate_with_all_of_hrm_broken_trains_and_generates_the_same(batch, bridge):
    model = tiny(bridge=bridge, gate_scale=0.0, use_halting=True)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in broken.hrm_parameters().values():
            parameter.fill_(float("nan"))
    losses = [each.training_loss(batch, ALL_LOSSES).loss for each in (model, broken)]
    same(*losses)
    ours, theirs = (gradients(each, loss) for each, loss in zip((model, broken), losses, strict=True))
    for name, gradient in ours.items():
        assert (gradient is None) == is_hrm_parameter(name) == (theirs[name] is None), name
        if gradient is not None:
            same(gradient, theirs[name])
    texts = [each.generate(batch["encoder_ids"], attention_mask=batch["encoder_mask"], max_new_tokens=5)
             for each in (model, broken)]
    same(*texts)


@BOTH
def test_through_an_open_gate_every_parameter_learns(batch, encoder, bridge):
    model = tiny(encoder=encoder, bridge=bridge, gate_scale=0.1)
    found = gradients(model, model.training_loss(batch, ALL_LOSSES).loss)
    assert [name for name, gradient in found.items() if gradient is None or not gradient.any()] == []


def test_a_gate_of_zero_adds_nothing_to_any_token(batch):
    """Two softmaxes: even memory that is there takes no weight from the encoder's states."""
    model = tiny()
    states = model.encoder.encode(batch["encoder_ids"], batch["encoder_mask"])
    memory = Memory(torch.randn(4, 3, 16), torch.tensor([0.0, 0.0, 1.0, 0.0]))
    mask, ids = batch["encoder_mask"], batch["decoder_input_ids"]
    with torch.no_grad():
        without, beside = model.decode(ids, states, mask), model.decode(ids, states, mask, memory)
    changed = [not torch.equal(*rows) for rows in zip(without, beside, strict=True)]
    assert changed == [False, False, True, False]


def test_the_gate_scale_multiplies_the_gate(batch):
    model = tiny()
    with torch.no_grad():
        whole = model.encoder(batch["encoder_ids"], batch["encoder_mask"]).gate
        model.config.gate_scale = 0.25
        part = model.encoder(batch["encoder_ids"], batch["encoder_mask"]).gate
    assert ((whole > 0) & (whole < 1)).all() and whole.std() > 0
    same(part, whole * 0.25)


def test_the_gate_reads_the_mean_of_the_slow_bank_and_of_the_encoder():
    gate = Gate(4, 6)
    assert (gate(torch.randn(3, 2, 4), torch.randn(3, 6)) == 0.5).all()  # half open at first, whatever it reads
    torch.nn.init.normal_(gate.score.weight)
    bank, pooled = torch.randn(3, 2, 4), torch.randn(3, 6)
    for row in range(3):
        read = [*((bank[row, 0] + bank[row, 1]) / 2).tolist(), *pooled[row].tolist()]
        total = sum(w * x for w, x in zip(gate.score.weight[0].tolist(), read, strict=True)) / math.sqrt(10)
        assert math.isclose(gate(bank, pooled)[row].item(), 1 / (1 + math.exp(-total)), rel_tol=1e-5)


# --- who sees what


@BOTH
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_later_decoder_token_changes_no_earlier_logit_and_an_earlier_one_all_later(encoder, bridge, scale):
    model = tiny(encoder=encoder, bridge=bridge, gate_scale=scale)
    batch = batch_of(triples(2, longest=6))
    batch["decoder_input_ids"] = torch.arange(3, 15).reshape(2, 6)
    before = logits_of(model, batch)
    for place in range(6):
        ids = batch["decoder_input_ids"].clone()
        ids[:, place] += 20
        after = logits_of(model, batch | {"decoder_input_ids": ids})
        same(after[:, :place], before[:, :place])
        assert ((after != before).any(dim=-1) == (torch.arange(6) >= place)).all(), place


@BOTH
def test_every_encoder_token_matters_to_the_answer_and_to_the_memory(encoder, bridge):
    model = tiny(encoder=encoder, bridge=bridge)
    batch = batch_of(triples(3, seed=3))
    mask, ids = batch["encoder_mask"].bool(), batch["encoder_ids"]
    assert not mask.all()
    model.config.gate_scale = 0.0
    shut = logits_of(model, batch)
    model.config.gate_scale = 1.0
    before, thought = logits_of(model, batch), model.encoder(ids, mask)
    for column in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, column] = (changed[:, column] + 7) % VOCABULARY
        other = model.encoder(changed, mask)
        after = logits_of(model, batch | {"encoder_ids": changed})
        model.config.gate_scale = 0.0
        without = logits_of(model, batch | {"encoder_ids": changed})
        model.config.gate_scale = 1.0
        for row in range(3):
            moved = [not torch.equal(one[row], two[row]) for one, two in (
                (after, before), (without, shut), (other.memory, thought.memory), (other.gate, thought.gate))]
            assert moved == [bool(mask[row, column])] * 4, (row, column)


# --- encoders: one contract


def encoder_of(kind: str) -> Mamba2Encoder | TransformerEncoder:
    torch.manual_seed(0)
    return (Mamba2Encoder(16, 2, 4) if kind == "mamba2" else TransformerEncoder(16, 2, 2)).eval()


def read(encoder, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        return encoder(x, mask, positions)


@pytest.mark.parametrize("kind", ENCODERS)
def test_where_the_padding_stands_and_what_it_holds_makes_no_difference(kind):
    encoder, lengths = encoder_of(kind), (9, 5, 1)
    rows = [torch.randn(length, 16) for length in lengths]
    alone = [read(encoder, row[None], torch.ones(1, len(row), dtype=torch.int64))[0] for row in rows]
    assert all(state.shape == row.shape for state, row in zip(alone, rows, strict=True))
    for side in ("right", "left", "both", "between"):
        x, mask = 100 * torch.randn(3, 12, 16), torch.zeros(3, 12, dtype=torch.int64)
        for index, row in enumerate(rows):
            start = {"right": 0, "left": 12 - len(row), "both": 2, "between": 0}[side]
            places = torch.arange(start, start + len(row))
            if side == "between":
                places = torch.randperm(12)[: len(row)].sort().values
            x[index, places], mask[index, places] = row, 1
        states = read(encoder, x, mask)
        pooled = mean_state(states, mask)
        for index, state in enumerate(alone):
            torch.testing.assert_close(states[index][mask[index].bool()], state, **CLOSE)
            torch.testing.assert_close(pooled[index], state.mean(dim=0), **CLOSE)
            single = read(encoder, x[index : index + 1], mask[index : index + 1])[0]  # a batch of one is masked too
            torch.testing.assert_close(single[mask[index].bool()], state, **CLOSE)


@pytest.mark.parametrize("kind,causal", [("mamba2", True), ("transformer", False)])
def test_what_an_encoder_state_knows(kind, causal):
    """Mamba2 the tokens up to its own, the Transformer all of them."""
    encoder, x, mask = encoder_of(kind), torch.randn(1, 6, 16), torch.ones(1, 6, dtype=torch.int64)
    before = read(encoder, x, mask)
    for place in range(6):
        other = x.clone()
        other[:, place] += 1
        moved = (read(encoder, other, mask) - before).abs().amax(dim=-1)[0] > 1e-6
        assert moved.tolist() == [not causal or column >= place for column in range(6)]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 65])
def test_the_chunk_of_mamba_makes_no_difference(length, monkeypatch):
    encoder, x = encoder_of("mamba2"), torch.randn(2, length, 16)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, : length // 3] = 0
    seen = []
    for chunk in (8, 32, 256):
        monkeypatch.setitem(hybrid_blocks.MAMBA_CHUNK, "cpu", chunk)
        seen.append(read(encoder, x, mask)[mask.bool()])
        assert {layer.mixer.chunk_size for layer in encoder.scan.layers} == {chunk}
    torch.testing.assert_close(seen[1], seen[0], **CLOSE)
    torch.testing.assert_close(seen[2], seen[0], **CLOSE)


@BOTH
def test_an_example_in_a_batch_is_the_example_alone_padded_on_either_side(encoder, bridge):
    model, rows = tiny(encoder=encoder, bridge=bridge), triples(3, seed=5)
    together = batch_of(rows)
    left = {name: value.clone() for name, value in together.items()}
    for index, row in enumerate(rows):  # rolled, so that pads stand on the left
        shift = together["encoder_ids"].shape[1] - len(row.encoder_ids)
        for name in ("encoder_ids", "encoder_mask"):
            left[name][index] = left[name][index].roll(shift)
    assert not torch.equal(left["encoder_mask"], together["encoder_mask"])
    right_logits, left_logits = logits_of(model, together), logits_of(model, left)
    for index, row in enumerate(rows):
        alone, count = logits_of(model, batch_of([row]))[0], len(row.labels)
        torch.testing.assert_close(right_logits[index, :count], alone, **CLOSE)
        torch.testing.assert_close(left_logits[index, :count], alone, **CLOSE)


@BOTH
def test_bf16_autocast_trains_and_answers(batch, encoder, bridge):
    model = tiny(encoder=encoder, bridge=bridge, use_halting=True)
    exact = model.training_loss(batch, ALL_LOSSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.training_loss(batch, ALL_LOSSES)
        logits = logits_of(model, batch)
        model.generate(batch["encoder_ids"], attention_mask=batch["encoder_mask"], max_new_tokens=3)
    assert rough.loss.dtype == torch.float32 and logits.dtype == torch.bfloat16
    torch.testing.assert_close(rough.loss, exact.loss, rtol=0.05, atol=0)
    found = gradients(model, rough.loss)
    assert [name for name, gradient in found.items() if gradient is None or not gradient.isfinite().all()] == []


def test_a_row_without_a_readable_token_stays_finite(batch):
    assert key_mask(torch.ones(2, 3)) is None and key_mask(None) is None
    batch["encoder_mask"][1] = 0
    for encoder in ENCODERS:
        model = tiny(encoder=encoder)
        assert logits_of(model, batch).isfinite().all()
        found = gradients(model, model.training_loss(batch, ALL_LOSSES).loss)
        assert all(gradient.isfinite().all() for gradient in found.values())


# --- generation


def greedy(model: HybridModel, batch: dict[str, torch.Tensor], count: int) -> list[list[int]]:
    """Whole forward passes, one for each token, without cache or `generate`."""
    ids = torch.ones(len(batch["encoder_ids"]), 1, dtype=torch.int64)
    for _ in range(count):
        logits = logits_of(model, batch | {"decoder_input_ids": ids})
        ids = torch.cat([ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return [row[: row.index(2) + 1] if 2 in row else row for row in ids.tolist()]


def unpadded(ids: torch.Tensor) -> list[list[int]]:
    return [row[: row.index(2) + 1] if 2 in row else row for row in ids.tolist()]


@BOTH
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_cached_generation_equals_whole_passes(encoder, bridge, scale):
    model, batch = tiny(encoder=encoder, bridge=bridge, gate_scale=scale), batch_of(triples(4, seed=2))
    asked = {"input_ids": batch["encoder_ids"], "attention_mask": batch["encoder_mask"], "max_new_tokens": 7}
    found = model.generate(**asked, do_sample=False)
    assert unpadded(found) == greedy(model, batch, 7)
    assert len({tuple(row) for row in found.tolist()}) > 1
    for how in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
                {"do_sample": True}, {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
                {"do_sample": True, "num_beams": 2}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(7)
            results.append(model.generate(**asked, **how, use_cache=use_cache))
        same(*results)
        assert len(results[0]) == 4 * how.get("num_return_sequences", 1)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_cached_logits_equal_uncached_ones_also_in_pieces(encoder, batch):
    model = tiny(encoder=encoder)
    ids = torch.randint(3, VOCABULARY, (4, 6))
    whole, cache, found = logits_of(model, batch | {"decoder_input_ids": ids}), None, []
    with torch.no_grad():
        encoded = model.encoder(batch["encoder_ids"], batch["encoder_mask"])
        for piece in (ids[:, :1], ids[:, 1:4], ids[:, 4:5], ids[:, 5:]):
            out = model(attention_mask=batch["encoder_mask"], encoder_outputs=encoded, decoder_input_ids=piece,
                        past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, **CLOSE)


def test_a_decoder_prompt_padded_on_the_left_is_the_prompt_alone(batch):
    model = tiny()
    prompts = [[1, 5, 9, 11], [1, 8], [1], [1, 30, 4]]
    ids = torch.tensor([[0] * (4 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (4 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        found = model(batch["encoder_ids"], batch["encoder_mask"], ids, decoder_attention_mask=mask).logits
    for index, prompt in enumerate(prompts):
        row = {"encoder_ids": batch["encoder_ids"][index][batch["encoder_mask"][index].bool()][None],
               "encoder_mask": batch["encoder_mask"][index][batch["encoder_mask"][index].bool()][None],
               "decoder_input_ids": torch.tensor([prompt])}
        torch.testing.assert_close(found[index, 4 - len(prompt):], logits_of(model, row)[0], **CLOSE)
    texts = model.generate(batch["encoder_ids"], attention_mask=batch["encoder_mask"], decoder_input_ids=ids,
                           decoder_attention_mask=mask, max_new_tokens=4, do_sample=False)
    for index, prompt in enumerate(prompts):
        alone = model.generate(batch["encoder_ids"][index : index + 1], max_new_tokens=4, do_sample=False,
                               attention_mask=batch["encoder_mask"][index : index + 1],
                               decoder_input_ids=torch.tensor([prompt]))
        assert unpadded(alone[:, len(prompt):]) == unpadded(texts[index : index + 1, 4:])


def test_labels_alone_make_the_decoders_input(batch):
    labels = batch["labels"].clone()
    labels[0, 0] = IGNORE
    model = tiny()
    out = model(batch["encoder_ids"], batch["encoder_mask"], labels=labels)
    inputs = [[1, *(0 if token == IGNORE else token for token in row[:-1])] for row in labels.tolist()]
    assert shifted(labels, 1, 0).tolist() == inputs
    logits = logits_of(model, batch | {"decoder_input_ids": torch.tensor(inputs)})
    terms = [-logits[row, place].log_softmax(dim=-1)[label] for row, said in enumerate(labels.tolist())
             for place, label in enumerate(said) if label != IGNORE]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean(), **CLOSE)
    for missing in ({}, {"input_ids": batch["encoder_ids"]}):
        with pytest.raises(ValueError, match="the hybrid needs"):
            model(**missing)


# --- files


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_saved_and_loaded_is_the_same_model(tmp_path, batch, tied, encoder):
    model = tiny(encoder=encoder, tie_word_embeddings=tied, gate_scale=0.5, use_halting=True, halt_threshold=0.3)
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied) and "encoder.core.z_high_init" in stored
    before = logits_of(model, batch)
    for loader in (HybridModel, AutoModelForSeq2SeqLM):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is HybridModel and not loaded.training
        assert (loaded.lm_head.weight is loaded.encoder.embed.weight) == tied
        unlike = {name for name, value in loaded.config.to_dict().items() if model.config.to_dict().get(name) != value}
        assert unlike <= {"_name_or_path", "dtype"}
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            same(state[name], tensor)
        same(logits_of(loaded, batch), before)
        same(*(each.generate(batch["encoder_ids"], attention_mask=batch["encoder_mask"], max_new_tokens=5)
               for each in (model, loaded)))


def test_tied_tables_learn_as_one_and_untied_ones_apart(batch):
    tied, untied = tiny(), tiny(tie_word_embeddings=False)
    assert "lm_head.weight" not in dict(tied.named_parameters())
    with torch.no_grad():
        untied.load_state_dict(tied.state_dict())
    one, two = (gradients(model, model.training_loss(batch, LossWeights()).loss) for model in (tied, untied))
    both = two["encoder.embed.weight"] + two["lm_head.weight"]
    torch.testing.assert_close(one["encoder.embed.weight"], both, **CLOSE)


@pytest.mark.parametrize("wrong,told", [
    ({"d_model": 18, "n_heads": 4}, "d_model 18"), ({"d_h": 20, "n_heads": 4}, "d_h 20"),
    ({"encoder": "lstm"}, "'lstm'"), ({"bridge": "plank"}, "'plank'")])
def test_an_impossible_shape_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        HybridConfig(**wrong)
    with pytest.raises(ValueError, match="horizon"):
        tiny(grad_horizon="half")


# --- the decoder and the bridges against plain loops


def plain_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def plain_turn(x: torch.Tensor) -> torch.Tensor:
    """RoPE of one head (N, e), position by position, pair by pair."""
    half, rows = x.shape[1] // 2, []
    for position, vector in enumerate(x):
        turned = [None] * (2 * half)
        for pair in range(half):
            angle = position * 10_000.0 ** (-2 * pair / (2 * half))
            first, second = vector[pair], vector[pair + half]
            turned[pair] = first * math.cos(angle) - second * math.sin(angle)
            turned[pair + half] = second * math.cos(angle) + first * math.sin(angle)
        rows.append(torch.stack(turned))
    return torch.stack(rows)


def plain_heads(query, key, value, heads: int, turn: bool = False, causal: bool = False) -> torch.Tensor:
    """Attention of one example, (T, width) over (S, width), head by head."""
    parts = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        if turn:
            q, k = plain_turn(q), plain_turn(k)
        scores = q @ k.T / math.sqrt(q.shape[-1])
        if causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        parts.append(weights @ v)
    return torch.cat(parts, dim=-1)


def plain_cross(layer, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    key, value = (plain_norm(memory) @ layer.key_value.weight.T).chunk(2, dim=-1)
    return plain_heads(plain_norm(x) @ layer.query.weight.T, key, value, layer.heads) @ layer.out.weight.T


def plain_mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ mlp.gate_up.weight.T).chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up) @ mlp.down.weight.T


def plain_block(block, x: torch.Tensor) -> torch.Tensor:
    """HRM's post-norm layers over one bank (slots, d)."""
    for layer in block.layers:
        query, key, value = (x @ layer.attention.qkv.weight.T).chunk(3, dim=-1)
        mixed = plain_heads(query, key, value, layer.attention.heads, turn=True)
        x = plain_norm(x + mixed @ layer.attention.out.weight.T)
        x = plain_norm(x + plain_mlp(layer.mlp, x))
    return x


def plain_decoder(model: HybridModel, ids: list[int], states: torch.Tensor, memory: torch.Tensor, gate: torch.Tensor
                  ) -> torch.Tensor:
    """Logits (T, V) of one example from its readable encoder states (S, D)."""
    table = model.encoder.embed.weight
    x = table[ids] * math.sqrt(table.shape[1])
    for layer in model.decoder.layers:
        own = layer.attention
        query, key, value = (plain_norm(x) @ own.qkv.weight.T).chunk(3, dim=-1)
        x = x + plain_heads(query, key, value, own.heads, turn=True, causal=True) @ own.out.weight.T
        x = x + plain_cross(layer.from_encoder, x, states) + gate * plain_cross(layer.from_memory, x, memory)
        x = x + plain_mlp(layer.mlp, plain_norm(x))
    return plain_norm(x) @ model.decoder.out.weight.T @ model.lm_head.weight.T


@pytest.mark.parametrize("bridge", BRIDGES)
def test_the_decoder_hears_encoder_and_gated_memory_as_written(batch, bridge):
    model = tiny(bridge=bridge)
    with torch.no_grad():
        encoded, found = model.encoder(batch["encoder_ids"], batch["encoder_mask"]), logits_of(model, batch)
        for row, readable in enumerate(batch["encoder_mask"].bool()):
            ids = batch["decoder_input_ids"][row].tolist()
            expected = plain_decoder(model, ids, encoded.last_hidden_state[row][readable], encoded.memory[row],
                                     encoded.gate[row])
            torch.testing.assert_close(found[row], expected, **CLOSE)


def test_the_bridges_as_written():
    bank = torch.randn(2, 4, 8)
    prefix, vector = Bridge("prefix", 8, 2, 12, 3), Bridge("cross_attn", 8, 2, 12, 3)
    memory = prefix(bank)
    assert memory.shape == (2, 3, 12) and vector(bank).shape == (2, 1, 12)
    for row in range(2):
        heard = prefix.queries + plain_cross(prefix.read, prefix.queries, bank[row])
        torch.testing.assert_close(memory[row], plain_norm(heard) @ prefix.out.weight.T, **CLOSE)
        torch.testing.assert_close(vector(bank)[row, 0], bank[row].mean(dim=0) @ vector.out.weight.T, **CLOSE)


# --- the recurrence


def plain_cycle(core: BankCore, high: torch.Tensor, low: torch.Tensor, states: torch.Tensor, l_steps: int,
                first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One cycle of one example as the docstring of BankCore says; L calls before `first` carry no gradient."""
    for call in range(l_steps):
        low = low + core.low_slots
        x, plan = plain_cross(core.read_input, low, states), plain_cross(core.read_high, low, high)
        low = plain_block(core.l_block, low + plain_norm(x) + plain_norm(plan))
        if call < first:
            low = low.detach()
    high = high + core.high_slots
    return plain_block(core.h_block, high + plain_norm(plain_cross(core.read_low, high, low))), low


@pytest.mark.parametrize("horizon,first", [("one_step", 2), ("k:1", 2), ("k:2", 1), ("k:9", 0), ("full", 0)])
def test_the_recurrence_and_its_gradient_are_the_equations(horizon, first):
    torch.manual_seed(3)
    core = BankCore(8, 2, 12, h_len=2, l_len=3, h_layers=1, l_layers=2, h_cycles=2, l_steps=3, horizon=horizon)
    states = torch.randn(2, 4, 12, requires_grad=True)
    weight = torch.randn(2, 2, 2, 8)  # of every cycle's slow bank: losses read all of them
    source, (high, low), found = core.read(states), core.start(2), []
    for _ in range(2):
        high, low = core.cycle(high, low, source, None)
        found.append(high)
    (torch.stack(found) * weight).sum().backward()
    ours = {name: p.grad.clone() for name, p in core.named_parameters() if p.grad is not None} | {"x": states.grad}
    core.zero_grad(set_to_none=True)
    states.grad, expected = None, []
    for row in range(2):
        high, low, banks = core.z_high_init, core.z_low_init, []
        for _ in range(2):
            if horizon != "full":
                high, low = high.detach(), low.detach()
            high, low = plain_cycle(core, high, low, states[row], 3, first)
            banks.append(high)
        expected.append(torch.stack(banks))
    expected = torch.stack(expected, dim=1)
    torch.testing.assert_close(torch.stack(found), expected, **CLOSE)
    (expected * weight).sum().backward()
    theirs = {name: p.grad for name, p in core.named_parameters() if p.grad is not None} | {"x": states.grad}
    assert ours.keys() == theirs.keys() == {n for n, _ in core.named_parameters() if "halt" not in n} | {"x"}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("horizon,calls", [("one_step", [0, 0, 1]), ("k:2", [0, 1, 1]), ("full", [1, 1, 1])])
def test_only_the_calls_within_the_horizon_keep_a_graph(horizon, calls):
    model, seen = tiny(grad_horizon=horizon, l_steps=3), {"low": [], "high": []}
    for name, block in (("low", model.encoder.core.l_block), ("high", model.encoder.core.h_block)):
        block.register_forward_hook(lambda _, inputs, out, name=name: seen[name].append(out.requires_grad))
    model.train().training_loss(batch_of(triples(2)), LossWeights())
    assert seen == {"low": [bool(call) for call in calls] * 2, "high": [True] * 2}


def test_padding_of_the_encoder_is_hidden_from_hrm():
    model, states = tiny(), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    before = model.encoder.cycles(states, mask)[-1].z_high
    states[0, 3:] += 100
    after = model.encoder.cycles(states, mask)[-1].z_high
    torch.testing.assert_close(after, before, **CLOSE)


def test_what_hrm_hands_over_depends_on_the_input():
    """Of two prompts as different as random states are, the memories differ as much as the slots within one."""
    model = tiny(h_len=4, l_len=4, d_h=32, h_cycles=4)
    states = torch.randn(8, 100, 16)  # attention over many tokens is nearly their mean: this must not drown
    last = model.encoder.cycles(states, torch.ones(8, 100))[-1].z_high
    assert last.std(dim=0).mean() > 0.25 * last.std(dim=1).mean()


def test_cycles_and_slots_stay_apart():
    """Sixteen cycles later the slots of a bank still hold vectors of their own, and so do the cycles."""
    model = tiny(awake=False, h_len=4, l_len=4, d_h=32, h_cycles=16)
    banks = torch.stack([cycle.z_high for cycle in model.encoder.cycles(torch.randn(3, 6, 16), torch.ones(3, 6))])
    alike = F.cosine_similarity(banks[:, :, :, None], banks[:, :, None], dim=-1)  # (C, B, H, H)
    off = alike[-1][:, ~torch.eye(4, dtype=torch.bool)]
    assert off.max() < 0.97, off
    moved = (banks[1:] - banks[:-1]).flatten(2).norm(dim=-1)
    assert (moved[:4] > 0.1).all()  # thinking goes on: it does not fall into its end at once
    with torch.no_grad():  # the learned slots are what tells them apart
        model.encoder.core.high_slots.zero_()
        model.encoder.core.low_slots.zero_()
    last = model.encoder.cycles(torch.randn(3, 6, 16), torch.ones(3, 6))[-1].z_high
    alike = F.cosine_similarity(last[:, :, None], last[:, None], dim=-1)[:, ~torch.eye(4, dtype=torch.bool)]
    assert alike.mean() > off.mean()


# --- losses


def cycle_losses(model: HybridModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The loss of a run that ends at cycle 1, 2 ...: token by token, example by example."""
    found = []
    for cycles in range(1, model.config.h_cycles + 1):
        fewer = copy.deepcopy(model)
        fewer.config.h_cycles = fewer.encoder.core.h_cycles = cycles
        fewer.config.use_halting = False
        logits = logits_of(fewer, batch)
        terms = [-logits[row, place].log_softmax(dim=-1)[label]
                 for row, said in enumerate(batch["labels"].tolist())
                 for place, label in enumerate(said) if label != IGNORE]
        found.append(torch.stack(terms).mean())
    return found


def cycle_right(model: HybridModel, batch: dict[str, torch.Tensor]) -> list[list[float]]:
    """[example][cycle]: 1.0 where every labelled token is the argmax."""
    columns = []
    for cycles in range(1, model.config.h_cycles + 1):
        fewer = copy.deepcopy(model)
        fewer.config.h_cycles = fewer.encoder.core.h_cycles = cycles
        fewer.config.use_halting = False
        best = logits_of(fewer, batch).argmax(dim=-1).tolist()
        columns.append([float(all(b == label for b, label in zip(row, said, strict=True) if label != IGNORE))
                        for row, said in zip(best, batch["labels"].tolist(), strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


def half_right(model: HybridModel, batch: dict[str, torch.Tensor], cycle: int = 0) -> dict[str, torch.Tensor]:
    """The batch with labels of its first two rows that the model says itself after `cycle` (0: the last)."""
    fewer = copy.deepcopy(model)
    fewer.encoder.core.h_cycles = fewer.config.h_cycles = cycle or model.config.h_cycles
    fewer.config.use_halting = False
    labels, best = batch["labels"].clone(), logits_of(fewer, batch).argmax(dim=-1)
    labels[:2] = torch.where(labels[:2] == IGNORE, labels[:2], best[:2])
    return batch | {"labels": labels}


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("cycles", [1, 3])
def test_deep_supervision_is_divided_by_the_total_weight(batch, scale, cycles):
    model = tiny(h_cycles=cycles, gate_scale=scale)
    each = cycle_losses(model, batch)
    out = model.training_loss(batch, LossWeights(deep_supervision=0.3))
    expected = (each[-1] + 0.3 * sum(each[:-1])) / (1 + 0.3 * (cycles - 1))
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    torch.testing.assert_close(out.metrics["token_loss"], each[-1], **CLOSE)
    if cycles > 1:
        assert not torch.allclose(each[0], each[-1], rtol=1e-4)
        torch.testing.assert_close(out.metrics["deep_supervision_loss"], sum(each[:-1]) / (cycles - 1), **CLOSE)
    torch.testing.assert_close(model.training_loss(batch, LossWeights()).loss, each[-1], **CLOSE)


def test_deep_supervision_has_the_gradient_of_its_sum(batch):
    model = tiny(h_cycles=3)
    out = model.training_loss(batch, LossWeights(deep_supervision=0.5))
    ours = gradients(model, out.loss)
    cycles = model.encoder.cycles(states := model.encoder.encode(batch["encoder_ids"], batch["encoder_mask"]),
                                  batch["encoder_mask"])
    pooled, total = mean_state(states, batch["encoder_mask"]), 0.0
    for weight, cycle in zip((0.25, 0.25, 0.5), cycles, strict=True):
        memory = model.encoder.memory(cycle.z_high, pooled, 1.0)
        logits = model.lm_head(model.decode(batch["decoder_input_ids"], states, batch["encoder_mask"], memory))
        total = total + weight * F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)
    theirs = gradients(model, total)
    for name, gradient in theirs.items():
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("cycle", [0, 1])
def test_the_halting_loss_by_hand(batch, scale, cycle):
    model = tiny(h_cycles=3, gate_scale=scale)
    batch = half_right(model, batch, cycle)
    right = cycle_right(model, batch)
    assert {value for row in right for value in row} == {0.0, 1.0}
    weights = LossWeights(halting=0.7, halting_target=1.5)
    out, plain = model.training_loss(batch, weights), model.training_loss(batch, LossWeights())
    with torch.no_grad():
        encoded = model.encoder(batch["encoder_ids"], batch["encoder_mask"])
        cycles = model.encoder.cycles(encoded.last_hidden_state, batch["encoder_mask"])
    budget, judged, sums = 0.0, 0.0, []
    for row in range(4):
        p = []
        for bank in cycles:
            mean = [sum(column) / 2 for column in zip(*bank.z_high[row].tolist(), strict=True)]
            head = model.encoder.core.halt
            logit = sum(w * x for w, x in zip(head.weight[0].tolist(), mean, strict=True)) + head.bias.item()
            p.append(1 / (1 + math.exp(-logit)))
        sums.append(sum(p))
        budget += (sum(p) - 1.5) ** 2 / 4
        judged -= sum(math.log(x) if y else math.log(1 - x) for x, y in zip(p, right[row], strict=True)) / 12
    gate = sum(encoded.gate.tolist()) / 4
    assert math.isclose(out.loss.item(), plain.loss.item() + 0.7 * gate * (budget + judged), rel_tol=1e-5)
    assert math.isclose(out.metrics["halting_loss"].item(), budget, rel_tol=1e-4)
    assert math.isclose(out.metrics["halting_bce"].item(), judged, rel_tol=1e-4)
    torch.testing.assert_close(out.metrics["halt_sum"], torch.tensor(sums), **CLOSE)
    assert out.metrics["teacher_forced_exact"].item() == sum(row[-1] for row in right) / 4


def test_shutting_the_gate_does_not_pay_for_halting(batch):
    """The halting losses are weighted by the gate and train the halting head alone: nobody else learns from them."""
    model = tiny(h_cycles=3)
    with_halting = gradients(model, model.training_loss(batch, LossWeights(halting=50.0, halting_target=9.0)).loss)
    without = gradients(model, model.training_loss(batch, LossWeights()).loss)
    for name, gradient in with_halting.items():
        if "core.halt" in name:
            assert gradient.any() and without[name] is None
        else:
            same(gradient, without[name])
    with torch.no_grad():  # whatever the gate says, the loss of the tokens aside
        halting = [model.training_loss(batch, LossWeights(halting=1.0)), model.training_loss(batch, LossWeights())]
        model.encoder.gate.score.bias.add_(-1)
        shut = [model.training_loss(batch, LossWeights(halting=1.0)), model.training_loss(batch, LossWeights())]
    ratio = (shut[0].loss - shut[1].loss) / (halting[0].loss - halting[1].loss)
    torch.testing.assert_close(ratio, shut[1].metrics["gate"].mean() / halting[1].metrics["gate"].mean(),
                               rtol=1e-3, atol=0)


def test_ignored_labels_carry_no_loss(batch):
    model = tiny()
    labels = batch["labels"].clone()
    labels[:, 0] = labels[1] = IGNORE
    partly = batch | {"labels": labels}
    expected = cycle_losses(model, partly)[-1]
    torch.testing.assert_close(model.training_loss(partly, LossWeights()).loss, expected, **CLOSE)
    out = model.training_loss(partly, ALL_LOSSES)
    assert all(g is None or g.isfinite().all() for g in gradients(model, out.loss).values())
    nothing = batch | {"labels": torch.full_like(labels, IGNORE)}
    for scale in (0.0, 1.0):
        model.config.gate_scale = scale
        out = model.training_loss(nothing, LossWeights(deep_supervision=0.5))
        assert out.loss.item() == 0 and out.metrics["teacher_forced_exact"].item() == 0
        assert all(g is None or not g.any() for g in gradients(model, out.loss).values())


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_parts_of_a_batch_add_up_to_the_whole(scale):
    rows = triples(5, seed=8)
    model, weights = tiny(gate_scale=scale, h_cycles=3), LossWeights(deep_supervision=0.4)
    tokens = sum(len(row.labels) for row in rows)
    whole = model.training_loss(batch_of(rows), weights)
    expected = gradients(model, whole.loss)
    parts = [model.training_loss(batch_of(part), weights, tokens, len(rows)) for part in (rows[:1], rows[1:])]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss, **CLOSE)
    for name in ("token_loss", "teacher_forced_exact"):
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), whole.metrics[name], **CLOSE)
    found = gradients(model, parts[0].loss + parts[1].loss)
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


# --- halting at evaluation


def halting_model(**changes) -> tuple[HybridModel, dict[str, torch.Tensor], torch.Tensor]:
    """A model whose four examples stop at different cycles, a batch, and the sums of halting probabilities (B, C)."""
    model, batch = tiny(h_cycles=4, use_halting=True, **changes), batch_of(triples(4, seed=4))
    with torch.no_grad():
        model.encoder.core.halt.weight.mul_(4)
        states = model.encoder.encode(batch["encoder_ids"], batch["encoder_mask"])
        cycles = model.encoder.cycles(states, batch["encoder_mask"])
    sums = torch.stack([cycle.halt_logits.sigmoid() for cycle in cycles], dim=1).cumsum(dim=1)
    return model, batch, sums


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_example_stops_where_its_probability_passes_the_threshold_and_costs_nothing_more(encoder):
    model, batch, sums = halting_model(encoder=encoder)
    calls = []
    model.encoder.core.h_block.register_forward_hook(lambda _, inputs, out: calls.append(len(out)))
    seen = set()
    for threshold in (sums.min().item() / 2, sums[:, 0].median().item() + 1e-4, sums[:, 1].median().item() + 1e-4,
                      sums[:, 2].median().item() + 1e-4, sums.max().item() + 1):
        model.config.halt_threshold = threshold
        due = [next((c + 1 for c in range(3) if row[c] >= threshold), 4) for row in sums.tolist()]
        seen.add(tuple(due))
        calls.clear()
        with torch.no_grad():
            out = model.encoder(batch["encoder_ids"], batch["encoder_mask"])
        assert out.cycles_used.tolist() == due
        assert calls == [sum(used >= cycle for used in due) for cycle in range(1, max(due) + 1)]
        for row, used in enumerate(due):
            fewer = copy.deepcopy(model)
            fewer.config.use_halting, fewer.config.h_cycles = False, used
            with torch.no_grad():
                expected = fewer.encoder(batch["encoder_ids"], batch["encoder_mask"])
            torch.testing.assert_close(out.memory[row], expected.memory[row], **CLOSE)
            torch.testing.assert_close(out.gate[row], expected.gate[row], **CLOSE)
            torch.testing.assert_close(out.halt_sum[row], sums[row, used - 1], **CLOSE)
    assert len(seen) >= 4 and any(len(set(due)) > 1 for due in seen)


def test_without_halting_every_example_takes_all_cycles(batch):
    model, _, _ = halting_model(halt_threshold=1e-6)
    model.config.use_halting = False
    calls = []
    model.encoder.core.h_block.register_forward_hook(lambda _, inputs, out: calls.append(len(out)))
    with torch.no_grad():
        out = model.encoder(batch["encoder_ids"], batch["encoder_mask"])
        states = model.encoder.encode(batch["encoder_ids"], batch["encoder_mask"])
        assert out.cycles_used.tolist() == [4] * 4 and calls == [4] * 4
        same(model.encoder.think(states, batch["encoder_mask"])[0],
             model.encoder.cycles(states, batch["encoder_mask"])[-1].z_high)


def test_training_never_halts(batch):
    model, _, _ = halting_model(halt_threshold=1e-6)
    losses = []
    for use_halting in (True, False):
        model.config.use_halting = use_halting
        losses.append(model.train().training_loss(batch, LossWeights()).loss)
        logits = model(batch["encoder_ids"], batch["encoder_mask"], batch["decoder_input_ids"]).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE))
    torch.testing.assert_close(losses[0], losses[1], **CLOSE)
    same(losses[0], losses[2])


def test_halting_in_a_batch_is_halting_alone():
    model, batch, sums = halting_model()
    model.config.halt_threshold = sums[:, 1].median().item() + 1e-4
    rows = triples(4, seed=4)
    with torch.no_grad():
        together = model.encoder(batch["encoder_ids"], batch["encoder_mask"])
        alone = [model.encoder(torch.tensor([row.encoder_ids])) for row in rows]
    assert len(set(together.cycles_used.tolist())) > 1
    assert together.cycles_used.tolist() == [one.cycles_used.item() for one in alone]
    for index, one in enumerate(alone):
        torch.testing.assert_close(together.memory[index], one.memory[0], **CLOSE)
    answers = model.generate(batch["encoder_ids"], attention_mask=batch["encoder_mask"], max_new_tokens=4)
    for index, row in enumerate(rows):
        single = model.generate(torch.tensor([row.encoder_ids]), max_new_tokens=4)
        assert unpadded(single) == unpadded(answers[index : index + 1])


def test_triples_of_these_tests_have_the_form_of_prepared_data():
    from text_data.triples import line_problem

    for row in triples(20):
        assert line_problem(Triple(*row)._asdict(), VOCABULARY) is None
