"""The streams of a quantizing sweep: who is in them, what goes through them, what is left on disk."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import torch

from quantize.sweep.hidden_states import SweepStates
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.common.errors import JobError
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.block_loading import read_blocks, read_head
from runtime.modeling.precision import FLOAT32, PURE_BFLOAT16
from runtime.modeling.qwen2 import Block
from runtime.scorer import Scorer


def make_rows(count: int, seed: int) -> list[RenderedConversation]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 60, (count,), generator=draw).tolist()
    rows = [torch.randint(0, 300, (length,), generator=draw).tolist() for length in lengths]
    return [RenderedConversation(row, len(row) - 1) for row in rows]


CALIBRATION, PARITY = make_rows(7, 0), make_rows(4, 1)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


def make_streams(checkpoint: Checkpoint, **more) -> SweepStates:
    return SweepStates(checkpoint.model_config, FLOAT32, CALIBRATION, PARITY, token_budget=100, **more)


def sweep(states: SweepStates, checkpoint: Checkpoint, blocks: range) -> None:
    """Both streams through unquantized blocks."""
    for index, tensors in read_blocks(checkpoint, blocks):
        states.reference.advance(states.block(tensors), index)
        states.advance_noise_floor(tensors, index)
        states.quantized.advance(states.block(tensors), index)
        states.sync()
        states.swap_buffers()


def test_rows_are_numbered_through_and_no_batch_holds_both_kinds(checkpoint):
    states = make_streams(checkpoint)
    rows = [states.quantized.batches[index].rows for index in states.calibration_batches]
    assert sorted(row for batch in rows for row in batch) == list(range(7))
    rows = [states.quantized.batches[index].rows for index in states.parity_batches]
    assert sorted(row for batch in rows for row in batch) == list(range(7, 11))
    assert len(states.calibration_batches) + len(states.parity_batches) == len(states.reference.batches)
    assert sum(len(batch.rows) for batch in states.noise_floor.batches) == 4
    assert states.calibration_rows == 7


def test_all_start_at_the_embedding_each_in_its_own_dtype(checkpoint):
    states = make_streams(checkpoint)
    embedding = checkpoint.read("model.embed_tokens.weight")
    states.embed(embedding)
    tokens = torch.cat([batch.token_ids for batch in states.reference.batches])
    for hidden_states in (states.reference, states.quantized):
        assert hidden_states.current_buffer.dtype == torch.float32 and torch.equal(
            hidden_states.current_buffer, embedding[tokens].float()
        )
    floor = states.noise_floor
    tokens = torch.cat([batch.token_ids for batch in floor.batches])
    assert floor.current_buffer.dtype == torch.bfloat16 and torch.equal(floor.current_buffer, embedding[tokens])


def test_what_the_head_sees_gives_the_scores_of_the_model(checkpoint, tiny_checkpoint):
    states = make_streams(checkpoint)
    states.embed(checkpoint.read("model.embed_tokens.weight"))
    sweep(states, checkpoint, range(2))
    head = read_head(checkpoint)
    reference, quantized, floor = states.features(head)
    expected = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32").score_rendered(
        [*CALIBRATION, *PARITY]
    )
    for features in (reference, quantized):
        assert (head.score(features) - expected).abs().max() < 1e-5 * expected.std()
    shift = head.score(floor) - expected[7:]
    assert floor.dtype == torch.bfloat16 and 1e-4 < shift.abs().mean() / expected.std() < 0.2


def test_the_noise_floor_is_computed_all_in_bf16(checkpoint):
    states = make_streams(checkpoint)
    states.embed(checkpoint.read("model.embed_tokens.weight"))
    tensors = checkpoint.read_block(0)
    states.advance_noise_floor(tensors, 0)
    block = Block.from_tensors(checkpoint.model_config, tensors, states.rotary, PURE_BFLOAT16)
    hidden_states = states.noise_floor
    for index, batch in enumerate(hidden_states.batches):
        assert torch.equal(hidden_states.read(index, next_buffer=True), block(hidden_states.read(index), batch))


def test_hidden_errors_are_of_parity_rows_at_their_scored_tokens(checkpoint):
    states = make_streams(checkpoint)
    states.embed(checkpoint.read("model.embed_tokens.weight"))
    tensors = checkpoint.read_block(0)
    states.reference.advance(states.block(tensors), 0)
    states.quantized.advance(states.block(tensors), 0)
    assert torch.equal(states.hidden_errors(), torch.zeros(4))
    start = 0
    for batch in states.quantized.batches:
        for row, scored in zip(batch.rows, batch.scored.tolist(), strict=True):
            states.quantized.next_buffer[start + scored] *= 1 + 0.01 * row
        start += batch.tokens
    assert torch.allclose(states.hidden_errors(), 0.01 * torch.arange(7, 11), rtol=1e-4)


# ---- on disk --------------------------------------------------------------------------------------------


def test_a_later_process_goes_on_from_the_files(checkpoint, tmp_path):
    """The block that was at work is done again, over whatever it left."""
    whole = make_streams(checkpoint)
    whole.embed(checkpoint.read("model.embed_tokens.weight"))
    sweep(whole, checkpoint, range(2))

    first = make_streams(checkpoint, directory=tmp_path)
    first.embed(checkpoint.read("model.embed_tokens.weight"))
    sweep(first, checkpoint, range(1))
    first.reference.advance(first.block(checkpoint.read_block(1)), 1)
    first.advance_noise_floor(checkpoint.read_block(1), 1)
    first.quantized.next_buffer.fill_(torch.nan)
    del first
    second = make_streams(checkpoint, directory=tmp_path, finished_blocks=1)
    sweep(second, checkpoint, range(1, 2))
    for one, other in zip(whole.all, second.all, strict=True):
        assert torch.equal(one.current_buffer, other.current_buffer)


def names_and_sizes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in directory.iterdir()}


def test_files_are_as_large_as_the_plan_says(checkpoint, tmp_path):
    make_streams(checkpoint, directory=tmp_path)
    tokens = sum(len(row.token_ids) for row in [*CALIBRATION, *PARITY])
    parity = sum(len(row.token_ids) for row in PARITY)
    wide, narrow = 64 * 4 * tokens, 64 * 2 * parity
    expected = {"reference": wide, "quantized": wide, "noise-floor": narrow}
    assert names_and_sizes(tmp_path) == {f"{name}.{turn}.bin": expected[name] for name in expected for turn in (0, 1)}


def test_room_is_reserved_where_the_disk_itself_cannot(checkpoint, tmp_path, monkeypatch):
    """glibc then reads and writes, which fails on what was opened to append or to write alone."""

    def emulated(handle, offset, length):
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDWR and not flags & os.O_APPEND
        os.ftruncate(handle, offset + length)

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    make_streams(checkpoint, directory=tmp_path)
    assert len(names_and_sizes(tmp_path)) == 6


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_lost_files_are_named(checkpoint, tmp_path, damage):
    make_streams(checkpoint, directory=tmp_path)
    file = tmp_path / "reference.1.bin"
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(JobError, match=r"reference\.1\.bin is missing or not \d+ bytes long"):
        make_streams(checkpoint, directory=tmp_path, finished_blocks=1)


def test_without_parity_rows_there_is_no_noise_floor_and_no_file_of_it(checkpoint, tmp_path):
    states = SweepStates(checkpoint.model_config, FLOAT32, CALIBRATION, [], token_budget=100, directory=tmp_path)
    states.embed(checkpoint.read("model.embed_tokens.weight"))
    sweep(states, checkpoint, range(1))
    assert len(states.hidden_errors()) == 0
    assert not list(tmp_path.glob("noise-floor*"))
    reference, _, floor = states.features(read_head(checkpoint))
    assert len(reference) == 7 and len(floor) == 0
    SweepStates(
        checkpoint.model_config, FLOAT32, CALIBRATION, [], token_budget=100, directory=tmp_path, finished_blocks=1
    )  # fmt: skip
