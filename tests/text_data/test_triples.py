"""text_data.triples and .batches: lines checked and read in flat memory, batches that resume and that ranks share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.batches import IGNORE
from patience import HANG_S
from text_data.batches import PreparedBatches, pad_batch
from text_data.synthetic import build_synthetic_dataset
from text_data.triples import LineIndex, PreparedData, Triple, read_meta

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
META = {"vocab_size": 104, "pad_id": 0, "bos_id": 1, "eos_id": 2, "tokenizer_sha256": "0" * 64, "max_seq_len": 32}


def write_folder(folder: Path, triples: list[Triple], meta: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        lines = [json.dumps(triple._asdict()) + "\n" for triple in triples]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    splits = {split: {"samples": len(triples)} for split in ("train", "val")}
    (folder / "meta.json").write_text(json.dumps(META | {"splits": splits} | (meta or {})), encoding="utf-8")
    return folder


def spoil(folder: Path, number: int, line: bytes) -> None:
    """Puts `line` in the place of line `number` (from 1) of train.jsonl."""
    lines = (folder / "train.jsonl").read_bytes().splitlines()
    lines[number - 1] = line
    (folder / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def take(batches: PreparedBatches, n: int) -> list[dict[str, torch.Tensor]]:
    return [next(batches) for _ in range(n)]


def prompts_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    rows = zip(batch["encoder_ids"].tolist(), batch["encoder_mask"].tolist(), strict=True)
    return [tuple(token for token, seen in zip(ids, mask, strict=True) if seen) for ids, mask in rows]


@pytest.fixture(scope="module")
def triples() -> list[Triple]:
    return build_synthetic_dataset(53, seed=1)


@pytest.fixture
def folder(tmp_path, triples) -> Path:
    return write_folder(tmp_path / "prepared", triples)


# --- lines ------------------------------------------------------------------------------------------------------------


@SHARED
@given(lines=st.lists(st.binary(max_size=9000).map(lambda line: line.replace(b"\n", b"")), max_size=40),
       ends=st.booleans())
def test_the_index_gives_every_line_of_any_file(tmp_path, lines, ends):
    content = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    expected = content.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    (tmp_path / "file").write_bytes(content)
    index = LineIndex(tmp_path / "file")
    assert [index[i] for i in range(len(index))] == expected


def test_the_index_joins_the_parts_it_reads(tmp_path):
    lines = [bytes(f"{i}:{'x' * (i * 37 % 900)}", "ascii") for i in range(400)]
    (tmp_path / "file").write_bytes(b"\n".join(lines))
    index = LineIndex(tmp_path / "file")
    for chunk in (97, 4096, 5000):
        index._file.seek(0)
        index._lines, index._offsets, index._count = index._scan(chunk)
        assert [index[i] for i in range(len(index))] == lines


def test_items_are_the_triples_in_file_order(folder, triples):
    data = PreparedData(folder, "train")
    assert len(data) == len(triples) and list(data) == triples
    assert data[0] == triples[0] and data[-1] == triples[-1]
    with pytest.raises(IndexError):
        data[len(triples)]


def test_long_triples_keep_the_end_of_the_encoder_and_the_beginning_of_the_decoder(tmp_path):
    triple = Triple([5, 6, 7, 8], [1, 9, 10], [9, 10, 2])
    data = PreparedData(write_folder(tmp_path, [triple]), "train", max_seq_len=2)
    assert data[0] == Triple([7, 8], [1, 9], [9, 10])


GOOD = {"encoder_ids": [5, 6], "decoder_input_ids": [1, 7, 8], "labels": [7, 8, 2]}
BAD = [
    (b'{"encoder_ids": [5', "not JSON"),
    (b"", "an empty line"),
    (b"\xff\xfe", "not JSON"),
    (b"[1]", "expected an object, got list"),
    (json.dumps({"encoder_ids": [5]}).encode(), "has no decoder_input_ids, labels"),
    (json.dumps(GOOD | {"encoder_ids": []}).encode(), "encoder_ids must be a list"),
    (json.dumps(GOOD | {"encoder_ids": [5, 6.0]}).encode(), "encoder_ids must be a list"),
    (json.dumps(GOOD | {"encoder_ids": [True]}).encode(), "encoder_ids must be a list"),
    (json.dumps(GOOD | {"encoder_ids": [104]}).encode(), "encoder_ids holds 104, expected ids from 0 to 103"),
    (json.dumps(GOOD | {"decoder_input_ids": [1, -7, 8]}).encode(), "decoder_input_ids holds -7"),
    (json.dumps(GOOD | {"decoder_input_ids": [1, IGNORE, 8]}).encode(), "decoder_input_ids holds -100"),
    (json.dumps(GOOD | {"labels": [IGNORE, -5, 2]}).encode(), "labels holds -5"),
    (json.dumps(GOOD | {"labels": [IGNORE] * 3}).encode(), "every label is -100"),
    (json.dumps(GOOD | {"labels": [7, 8]}).encode(), "3 decoder_input_ids and 2 labels"),
    (json.dumps(GOOD | {"labels": [7, 9, 2]}).encode(), "labels[1] is 9, but decoder_input_ids[2] is 8"),
    (json.dumps(GOOD | {"labels": [1, 7, 8]}).encode(), "labels[0] is 1, but decoder_input_ids[1] is 7"),
]


@pytest.mark.parametrize(("line", "told"), BAD)
def test_a_bad_line_is_named_with_its_file_and_number(folder, line, told):
    spoil(folder, 3, line)
    data = PreparedData(folder, "train")
    with pytest.raises(ValueError) as error:
        list(data)
    assert told in str(error.value) and "train.jsonl line 3:" in str(error.value)
    assert "\n" not in str(error.value)


def test_ignored_labels_are_good(folder):
    spoil(folder, 3, json.dumps(GOOD | {"labels": [IGNORE, 8, 2]}).encode())
    assert PreparedData(folder, "train")[2].labels == [IGNORE, 8, 2]


@pytest.mark.parametrize(("line", "told"), BAD)
def test_a_bad_line_can_be_skipped_and_is_counted(folder, triples, line, told):
    spoil(folder, 3, line)
    data = PreparedData(folder, "train", on_bad_line="skip")
    assert list(data) == triples[:2] + triples[3:]
    assert data[2] == triples[3]  # the next good line
    assert data.skipped == 1


def test_a_file_of_bad_lines_alone_ends_with_an_error(tmp_path, triples):
    folder = write_folder(tmp_path, triples[:2])
    (folder / "train.jsonl").write_text("{}\n[]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no good line"):
        PreparedData(folder, "train", on_bad_line="skip")[0]


@pytest.mark.parametrize(("change", "told"), [
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"pad_id": None}, "pad_id is None"),
    ({"eos_id": 104}, "eos_id 104 is not below vocab_size 104"),
    ({"max_seq_len": True}, "max_seq_len is True"),
    ({"tokenizer_sha256": 5}, "tokenizer_sha256 is missing"),
    ({"splits": {"train": {"samples": 3}}}, "splits.val.samples is missing"),
])
def test_a_broken_meta_is_told_in_one_line(tmp_path, triples, change, told):
    folder = write_folder(tmp_path, triples, change)
    for read in (lambda: read_meta(folder), lambda: PreparedData(folder, "train")):
        with pytest.raises(ValueError) as error:
            read()
        assert told in str(error.value) and "meta.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "\udcff"])
def test_a_missing_or_unreadable_meta_is_told_in_one_line(folder, content):
    (folder / "meta.json").unlink()
    if content is not None:
        (folder / "meta.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as error:
        read_meta(folder)
    assert "meta.json" in str(error.value) and "\n" not in str(error.value)


def test_an_empty_or_missing_split_is_refused(folder):
    (folder / "val.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="val.jsonl is empty"):
        PreparedData(folder, "val")
    (folder / "val.jsonl").unlink()
    with pytest.raises(ValueError, match="cannot read .*val.jsonl"):
        PreparedData(folder, "val")


# --- batches ----------------------------------------------------------------------------------------------------------


def test_padding_is_on_the_right_and_masked():
    batch = pad_batch([Triple([5], [1, 6], [6, 2]), Triple([7, 8, 9], [1], [2])], pad_id=3)
    assert batch["encoder_ids"].tolist() == [[5, 3, 3], [7, 8, 9]]
    assert batch["encoder_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["decoder_input_ids"].tolist() == [[1, 6], [1, 3]]
    assert batch["labels"].tolist() == [[6, 2], [2, IGNORE]]
    assert batch["decoder_mask"].tolist() == [[1, 1], [1, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("bucket", [1, 3])
def test_streaming_gives_the_batches_of_the_list_in_memory(folder, triples, bucket):
    data = PreparedData(folder, "train")
    streamed, listed = (PreparedBatches(source, 4, 7, 0, bucket=bucket) for source in (data, triples))
    assert all(same(a, b) for a, b in zip(take(streamed, 40), take(listed, 40), strict=True))


@SHARED
@given(length=st.integers(1, 40), size=st.integers(1, 7), bucket=st.integers(1, 4), world=st.integers(1, 3),
       seed=st.integers(0, 5))
def test_every_epoch_holds_every_triple_once(length, size, bucket, world, seed):
    triples = [Triple([i], [1, *[5] * (i % 7)], [*[5] * (i % 7), 2]) for i in range(length)]
    ranks = [PreparedBatches(triples, size, seed, 0, rank, world, bucket=bucket) for rank in range(world)]
    window, seen = size * world * bucket, []
    windows = -(-3 * length // window)
    for _ in range(windows * bucket):
        shares = [prompts_of(next(rank)) for rank in ranks]
        assert [len(share) for share in shares] == [size] * world
        seen += [prompt[0] for row in zip(*shares, strict=True) for prompt in row]  # in the order of the draw
    # Bucketing moves triples within a window only, so whole windows hold what the epochs joined end to end hold.
    whole = len(seen) // length
    counts = [seen.count(i) for i in range(length)]
    assert set(counts) <= {whole, whole + 1}
    if bucket == 1:
        assert all(sorted(seen[k * length: (k + 1) * length]) == list(range(length)) for k in range(whole))


def test_the_order_changes_with_the_epoch_and_the_seed(triples):
    batches = PreparedBatches(triples, len(triples), 0, 0)
    first, second = (prompts_of(next(batches)) for _ in range(2))
    other = prompts_of(next(PreparedBatches(triples, len(triples), 1, 0)))
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second and first != other and first != [tuple(triple.encoder_ids) for triple in triples]


def test_epoch_counts_whole_passes_by_all_ranks(triples):
    batches = PreparedBatches(triples[:12], 2, 0, 0, rank=1, world=3)
    assert [(next(batches), batches.epoch)[1] for _ in range(5)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("bucket", [1, 4])
def test_ranks_share_what_one_process_would_draw(triples, world, bucket):
    alone = PreparedBatches(triples, 2 * world, 3, 0, bucket=bucket)
    ranks = [PreparedBatches(triples, 2, 3, 0, rank, world, bucket=bucket) for rank in range(world)]
    for _ in range(30):
        shares = [prompts_of(next(rank)) for rank in ranks]
        assert sorted(prompt for share in shares for prompt in share) == sorted(prompts_of(next(alone)))


def test_ranks_stay_in_step_when_one_meets_a_bad_line(folder, triples):
    spoil(folder, 5, b"{")
    data = [PreparedData(folder, "train", on_bad_line="skip") for _ in range(2)]
    spoilt = [PreparedBatches(data[rank], 3, 0, 0, rank, 2) for rank in range(2)]
    replaced = triples[:4] + [triples[5]] + triples[5:]
    clean = [PreparedBatches(replaced, 3, 0, 0, rank, 2) for rank in range(2)]
    for _ in range(25):
        assert all(same(next(a), next(b)) for a, b in zip(spoilt, clean, strict=True))


@pytest.mark.parametrize("bucket", [1, 3])
def test_workers_do_not_change_the_order(folder, bucket):
    data = PreparedData(folder, "train")
    alone, helped = (PreparedBatches(data, 4, 2, 0, workers=workers, bucket=bucket) for workers in (0, 2))
    assert all(same(next(alone), next(helped)) for _ in range(50))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bucket", [1, 4])
@pytest.mark.parametrize("done", [0, 1, 4, 6, 14])
def test_a_resumed_stream_goes_on_exactly(folder, done, bucket, workers):
    data = PreparedData(folder, "train")
    batches = PreparedBatches(data, 4, 5, 0, workers=workers, bucket=bucket)
    take(batches, done)
    state = json.loads(json.dumps(batches.state_dict()))
    expected, epoch = take(batches, 20), batches.epoch
    resumed = PreparedBatches(data, 4, 5, 0, workers=workers, bucket=bucket)
    take(resumed, 3)  # whatever it did before
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(expected, take(resumed, 20), strict=True))
    assert resumed.epoch == epoch


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9)), min_size=2,
                max_size=4))
def test_batches_of_another_number_of_processes_go_on_behind_the_last_item(calls):
    triples = [Triple([5] * (1 + i * 7 % 11), [1], [i]) for i in range(23)]
    seen, state, given = [], None, 0
    for size, world, bucket, count in calls:
        processes = [PreparedBatches(triples, size, 3, 0, rank, world, bucket=bucket) for rank in range(world)]
        for batches in processes:
            if state:
                batches.load_state_dict(json.loads(json.dumps(state)))
            seen += [label for batch in take(batches, count) for label in batch["labels"].flatten().tolist()]
        given += size * world * count
        state = processes[0].state_dict()
        assert all(batches.state_dict() | {"rank": 0} == state | {"rank": 0} for batches in processes)
        assert len(seen) == given and processes[0].epoch == given // len(triples)

    # To the end of the window at hand: then all items have come that one process would have drawn.
    while processes[0]._given % bucket or processes[0]._head[processes[0]._given * size * world :]:
        for batches in processes:
            seen += next(batches)["labels"].flatten().tolist()
    whole = take(PreparedBatches(triples, 1, 3, 0), len(seen))
    assert sorted(seen) == sorted(batch["labels"].item() for batch in whole)


def test_a_bad_line_is_told_through_the_workers(folder):
    spoil(folder, 5, b"{")
    batches = PreparedBatches(PreparedData(folder, "train"), 4, 5, 0, workers=2)
    with pytest.raises(ValueError, match="train.jsonl line 5: not JSON"):
        take(batches, 20)


def test_a_state_of_other_batches_is_refused(triples):
    state = PreparedBatches(triples, 4, 5, 0).state_dict()
    with pytest.raises(ValueError, match="seed was 5 and is 6, length was 53 and is 52"):
        PreparedBatches(triples[1:], 3, 6, 0).load_state_dict(state)


def test_every_bad_number_is_told_at_once(triples):
    with pytest.raises(ValueError) as error:
        PreparedBatches([], 0, -1, 0, rank=2, world=2, workers=-1, bucket=0)
    for told in ("size is 0", "seed is -1", "rank 2 is not below world 2", "workers is -1", "bucket is 0", "no data"):
        assert told in str(error.value)


def test_buckets_spend_less_on_padding():
    triples = [Triple([5] * (1 + i % 50), [1], [2]) for i in range(400)]

    def pads(bucket: int) -> int:
        return sum(int((batch["encoder_mask"] == 0).sum())
                   for batch in take(PreparedBatches(triples, 8, 0, 0, bucket=bucket), 50))

    assert pads(10) < 0.4 * pads(1)


MEMORY = """
import sys, psutil
from text_data.batches import PreparedBatches
from text_data.triples import PreparedData
process = psutil.Process()
before = process.memory_info().rss
data = PreparedData(sys.argv[1], "train")
batches = PreparedBatches(data, 16, 0, 0)
for _ in range(100): next(batches)
for i in range(0, len(data), max(len(data) // 2000, 1)): data[i]
print(len(data), process.memory_info().rss - before)
"""


def grown_memory(folder: Path, triple: Triple, megabytes: float) -> tuple[int, int]:
    """(lines, bytes of resident memory gained by opening and reading) of a fresh process."""
    write_folder(folder, [triple])
    line = (folder / "train.jsonl").read_bytes()
    with open(folder / "train.jsonl", "wb") as file:
        for _ in range(round(megabytes)):
            file.write(line * (1_000_000 // len(line)))
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", MEMORY, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=HANG_S)
    lines, gained = map(int, done.stdout.split())
    (folder / "train.jsonl").unlink()
    return lines, gained


SHORT = Triple([5, 6], [1, 7], [7, 2])  # lines of 70 bytes, the index's hardest case


def test_memory_hardly_grows_with_the_file(tmp_path):
    lines, gained = zip(*(grown_memory(tmp_path / str(size), SHORT, size) for size in (3, 30)), strict=True)
    assert lines[1] > 9 * lines[0]
    assert gained[1] - gained[0] < 5e6


@pytest.mark.slow
@pytest.mark.parametrize("triple", [SHORT, Triple([50] * 500, [1] + [60] * 500, [60] * 500 + [2])])
def test_memory_grows_by_less_than_50_mb_from_50_to_500_mb(tmp_path, triple):
    _, gained = zip(*(grown_memory(tmp_path / str(size), triple, size) for size in (50, 500)), strict=True)
    assert gained[1] - gained[0] < 50e6
