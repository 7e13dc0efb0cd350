"""Placement plans, from headers and memory budgets alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.checkpoints.model_config import ModelConfig
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.checkpoints.safetensors_file import TensorInfo
from runtime.checkpoints.tensor_spec import expected_tensors
from runtime.common.errors import ConfigurationError
from runtime.common.terminal import GIB
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.memory_estimate import MemoryEstimate
from runtime.execution.placement import choose_resident_blocks, distribute_blocks, plan_placement
from runtime.execution.placement_plan import PlacementPlan
from runtime.execution.placement_table import placement_rows
from runtime.modeling.packed_batch import pack_batches
from runtime.modeling.precision import BFLOAT16, FLOAT32
from runtime.modeling.qwen2 import Block, RotaryEmbedding
from tests.helpers.placed import TOKENS, placements, room
from tests.helpers.tiny import WORLDPM, write_tiny_checkpoint

NAMES = ["kept", "as stored", "a device", "halves", "1 and 5", "thirds", "streamed", "some stay", "one buffer"]
NAMES += ["from host", "from disk", "dealt"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("six"), layers=6))


def planned(checkpoint: Checkpoint, name: str) -> PlacementPlan:
    return plan_placement(checkpoint, dtype="float32", token_budget=TOKENS, **placements(checkpoint)[name][0])


def large(quantization: QuantizationConfig | None) -> Checkpoint:
    """A checkpoint with the headers of a 72B and no tensor data."""
    config = json.loads((Path(__file__).parents[1] / "shapes_72b.json").read_text())
    model_config = ModelConfig.from_config(config)
    tensors = {}
    for name, (dtype, shape) in expected_tensors(model_config, quantization).items():
        dtype, shape = dtype or torch.bfloat16, shape or (100,)
        tensors[name] = TensorInfo(Path("none"), dtype, shape, 0, dtype.itemsize * torch.Size(shape).numel())
    return Checkpoint(Path(), "72b", config, model_config, quantization, tensors, ())


GPTQ4 = large(QuantizationConfig(method="gptq", bits=4, group_size=128))
ORIGINAL = large(None)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda name: (80 * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))


# ---- choosing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_block_has_one_place_and_no_budget_is_exceeded(checkpoint, name):
    plan = planned(checkpoint, name)
    assert plan.placement == placements(checkpoint)[name][1]
    if plan.placement != "streamed":
        assert [index for share in plan.shares for index in share.resident] == [*range(6)]
    for share in plan.shares:
        assert share.resident <= {*share.blocks}
        assert 0 <= share.spare_bytes == share.device.budget - share.nbytes


def test_placements_per_budget(checkpoint):
    plans = {name: planned(checkpoint, name) for name in NAMES}
    assert plans["kept"].keep_dequantized and plans["kept"].stacked
    assert not plans["as stored"].keep_dequantized and not plans["as stored"].stacked
    counts = {name: [len(share.resident) for share in plan.shares] for name, plan in plans.items()}
    assert counts["halves"] == [3, 3] and counts["1 and 5"] == [1, 5] and counts["thirds"] == [2, 2, 2]
    assert counts["streamed"] == [0] and counts["one buffer"] == [0]
    assert 0 < counts["some stay"][0] < 6
    assert plans["some stay"].block_buffers == 2 and plans["one buffer"].block_buffers == 1
    assert plans["from host"].source == "host" and plans["from disk"].source == "disk"
    assert plans["streamed"].source == plans["some stay"].source == "disk"  # its memory is the host's already


def test_weights_are_dequantized_only_if_they_differ_from_the_stored_ones(tmp_path, checkpoint):
    """Weights already stored in the matmul dtype are not copied."""
    assert plan_placement(checkpoint, devices="cpu", dtype="float32").keep_dequantized
    plan = plan_placement(checkpoint, devices="cpu", dtype=BFLOAT16)
    assert not plan.keep_dequantized and plan.stacked
    exact = open_checkpoint(write_tiny_checkpoint(tmp_path / "m", dtype=torch.float32))
    assert not plan_placement(exact, devices="cpu", dtype="float32").keep_dequantized


def test_dequantized_weights_are_dropped_before_residency(checkpoint):
    enough = room(checkpoint, 6, keep_dequantized=True)
    for memory, keep_dequantized in ((enough, True), (enough - 1, False)):
        plan = plan_placement(checkpoint, devices="cpu", dtype="float32", token_budget=TOKENS, memory={"cpu": memory})
        assert (plan.placement, plan.keep_dequantized) == ("resident", keep_dequantized)


def test_double_buffering_is_dropped_before_an_error(checkpoint):
    for blocks, block_buffers in ((2, 2), (1, 1)):
        memory = {"cpu": room(checkpoint, blocks)}
        plan = plan_placement(checkpoint, devices="cpu", dtype="float32", token_budget=TOKENS, memory=memory)
        assert (plan.placement, plan.block_buffers) == ("streamed", block_buffers)


def test_a_budget_below_one_block_is_refused_with_the_bytes_needed(checkpoint):
    enough = room(checkpoint, 1)
    message = f"cpu: {enough - 1:,} bytes may be used, but one block with {TOKENS} tokens at once needs {enough:,};"
    with pytest.raises(ConfigurationError, match=message):
        plan_placement(checkpoint, devices="cpu", dtype="float32", token_budget=TOKENS, memory={"cpu": enough - 1})


def test_a_host_without_room_for_the_embedding_is_refused(checkpoint):
    with pytest.raises(ConfigurationError, match="cpu: 1,000 bytes may be used, but the embedding"):
        plan_placement(checkpoint, devices="cpu:0", dtype="float32", memory={"cpu": 1000, "cpu:0": "1GiB"})


def test_an_explicit_token_budget_wins(checkpoint):
    assert plan_placement(checkpoint, devices="cpu").token_budget == 1024
    assert plan_placement(checkpoint, devices="cpu", token_budget=7).token_budget == 7
    assert plan_placement(checkpoint, devices="cpu", token_budget=50_000).token_budget == 50_000


def test_short_memory_shortens_chunks_before_blocks_have_to_move(checkpoint):
    memory = {"cpu": room(checkpoint, 6, tokens=256)}
    plan = plan_placement(checkpoint, devices="cpu", dtype="float32", memory=memory)
    assert (plan.placement, plan.token_budget) == ("resident", 256)


# ---- the 72B --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "memory", "placement", "devices", "resident"),
    [
        (GPTQ4, {}, "resident", ["cuda:0"], 80),
        (GPTQ4, {f"cuda:{i}": "44GiB" for i in range(4)}, "resident", ["cuda:0"], 80),
        (GPTQ4, {f"cuda:{i}": "30GiB" for i in range(4)}, "split", ["cuda:0", "cuda:1"], 80),
        (ORIGINAL, {}, "split", ["cuda:0", "cuda:1"], 80),
        (GPTQ4, {f"cuda:{i}": "8GiB" for i in range(4)}, "streamed", [f"cuda:{i}" for i in range(4)], None),
    ],
)
def test_as_few_gpus_as_possible(gpus, model, memory, placement, devices, resident):
    plan = plan_placement(model, memory=memory | {"cpu": "200GiB"})
    assert (plan.placement, [share.device.name for share in plan.shares]) == (placement, devices)
    assert plan.precision == BFLOAT16 and not plan.keep_dequantized
    if resident:
        assert sum(len(share.resident) for share in plan.shares) == resident
        sizes = [len(share.blocks) for share in plan.shares]
        assert max(sizes) - min(sizes) <= 1
    assert 1024 <= plan.token_budget <= 16384
    assert all(share.nbytes <= share.device.budget for share in plan.shares)


def test_a_24_gb_gpu_holds_some_blocks_and_streams_the_rest_from_host_memory(gpus):
    plan = plan_placement(GPTQ4, devices="cuda:0", memory="cuda:0=22GiB,cpu=64GiB")
    (share,) = plan.shares
    assert (plan.placement, plan.source, plan.block_buffers) == ("streamed", "host", 2)
    assert plan.token_budget == 16384 and 10 < len(share.resident) < 40
    assert plan_placement(GPTQ4, devices="cuda:0", memory="cuda:0=22GiB,cpu=16GiB").source == "disk"


def test_what_a_gpu_has_spare_holds_the_hidden_states_of_a_window(gpus):
    plan = plan_placement(GPTQ4, devices="cuda:0", memory="cuda:0=22GiB,cpu=64GiB")
    assert plan.shares[0].spare_bytes >= MemoryEstimate(GPTQ4, BFLOAT16).hidden_state_bytes(plan.window_tokens)


def test_pinned_memory_is_counted_by_the_powers_of_two_that_it_comes_in(gpus):
    memory_estimate = MemoryEstimate(ORIGINAL, BFLOAT16)
    assert 1.05 < memory_estimate.pinned_block_bytes / memory_estimate.stored_block_bytes < 1.15
    for budget, source in (("137GiB", "disk"), ("147GiB", "host")):
        plan = plan_placement(ORIGINAL, devices="cuda:0", memory=f"cuda:0=20GiB,cpu={budget}")
        assert plan.source == source, budget


def test_a_small_second_gpu_is_left_out_unless_named(gpus, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    memory = {"cuda:0": "2GiB", "cuda:1": "22GiB", "cpu": "64GiB"}
    assert [share.device.name for share in plan_placement(GPTQ4, memory=memory).shares] == ["cuda:1"]
    with pytest.raises(ConfigurationError, match="cuda:0: 2,147,483,648 bytes may be used"):
        plan_placement(GPTQ4, devices="cuda:0,cuda:1", memory=memory)
    with pytest.raises(ConfigurationError, match="one block with 1,024 tokens at once needs"):
        plan_placement(GPTQ4, memory={"cuda:0": "1GiB", "cuda:1": "1GiB"})


def test_the_original_on_a_small_cpu(gpus):
    plan = plan_placement(ORIGINAL, devices="cpu", memory="cpu=16GiB", dtype="bfloat16")
    assert (plan.placement, plan.source, plan.block_buffers) == ("streamed", "disk", 2)
    assert MemoryEstimate(ORIGINAL, BFLOAT16).stored_block_bytes == pytest.approx(1.755e9, rel=0.001)
    assert len(plan.shares[0].resident) == 5


# ---- arithmetic -----------------------------------------------------------------------------------------


@given(st.integers(1, 100), st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_blocks_are_dealt_alike_as_far_as_there_is_room(blocks, rooms):
    counts = distribute_blocks(blocks, rooms)
    if counts is None:
        assert sum(rooms) < blocks
        return
    assert sum(counts) == blocks
    assert all(count <= room for count, room in zip(counts, rooms, strict=True))
    most = max(counts)
    assert all(count >= most - 1 or count == room for count, room in zip(counts, rooms, strict=True))


@given(st.integers(1, 100), st.data())
def test_what_stays_is_spread_evenly(blocks, data):
    stay = data.draw(st.integers(0, blocks))
    resident = choose_resident_blocks(blocks, stay)
    assert len(resident) == stay and resident <= {*range(blocks)}
    gaps = [b - a for a, b in zip([-1, *sorted(resident)], [*sorted(resident), blocks], strict=True)]
    assert not stay or max(gaps) <= -(-blocks // stay)


def test_a_call_is_cut_finer_where_devices_would_wait(checkpoint):
    plan = planned(checkpoint, "halves")
    assert plan.window_tokens == 16 * TOKENS and plan.chunk_tokens(10) == TOKENS
    plan = plan_placement(checkpoint, devices="cpu:0,cpu:1", dtype="float32", memory="cpu:0=1GiB,cpu:1=1GiB")
    assert [plan.chunk_tokens(tokens) for tokens in (10, 4000, 100_000)] == [128, 500, 1024]
    assert planned(checkpoint, "kept").chunk_tokens(10) == TOKENS
    assert planned(checkpoint, "streamed").window_tokens == 16384


@pytest.mark.parametrize(("tokens", "chunk"), [(1024, 2048), (1024, 128)])
def test_activations_are_measured(checkpoint, tokens, chunk):
    """The estimate holds for the longest conversation, and is within a factor of two of the measured peak."""
    model_config = checkpoint.model_config
    block = Block.from_tensors(model_config, checkpoint.read_block(0), RotaryEmbedding(model_config, tokens), FLOAT32)
    (batch,) = pack_batches([RenderedConversation([*range(tokens)], tokens - 1)], chunk)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        block(torch.randn(batch.tokens, model_config.hidden_size), batch, in_place=True)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak < MemoryEstimate(checkpoint, FLOAT32).activation_bytes(chunk) < 2 * peak


# ---- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kept", {"resident: all blocks on cpu", "blocks 0 to 5; ", "dequantized once and kept; products in float32"}),
        ("1 and 5", {"split by layer over cpu:0 and cpu:1", "blocks 0 to 0; ", "blocks 1 to 5; "}),
        (
            "streamed",
            {"from disk, the next block read ahead", "0 blocks stay, 6 are streamed", "as stored", "64 at once"},
        ),
        ("one buffer", {"from disk, no block read ahead", "scored at the final `<|endoftext|>`"}),
        ("from host", {"streamed: blocks go through cpu:0 from host memory"}),
    ],
)
def test_the_table_describes_the_plan(checkpoint, name, words):
    text = "\n".join(f"{title} {value}" for title, value in placement_rows(planned(checkpoint, name), WORLDPM))
    assert not {each for each in words if each not in text}, text
