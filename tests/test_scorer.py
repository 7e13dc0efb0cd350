"""Scores are equal in every placement; errors name block and conversation; no thread or file is left behind."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from runtime import Scorer
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.common.errors import CheckpointError, ConfigurationError, ConversationError, NonFiniteError
from runtime.execution import streaming
from runtime.execution.placement import plan_placement
from runtime.modeling.qwen2 import Block
from tests.helpers.placed import GPTQ4, TOKENS, pack_checkpoint, placements, room, rounds_rows_alike
from tests.helpers.processes import default_sigint
from tests.helpers.tiny import write_tiny_checkpoint

NAMES = ["kept", "as stored", "a device", "halves", "1 and 5", "thirds", "streamed", "some stay", "one buffer"]
NAMES += ["from host", "from disk", "dealt"]

QUESTION = [{"role": "user", "content": "Tips for better sleep?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [*QUESTION, {"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def scorer(tiny_checkpoint) -> Scorer:
    return Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 90)), min_size=2, max_size=9),
    token_budget=st.integers(1, 600),
)
@pytest.mark.slow
def test_order_and_other_conversations_change_nothing(tiny_checkpoint, dtype, words, token_budget):
    """Order, other conversations, shared prefixes and chunk sizes are bitwise neutral."""
    scorer = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype=dtype)
    chunked = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype=dtype, token_budget=token_budget)
    conversations = [
        [{"role": "user", "content": "why " * asked}, {"role": "assistant", "content": "word " * said}]
        for asked, said in words
    ]
    alone = torch.cat([scorer.score([each]) for each in conversations])
    others = [scorer.score(conversations), scorer.score(conversations[::-1]).flip(0), chunked.score(conversations)]
    assert all((each - alone).abs().max() < 1e-5 for each in others) or dtype == "bfloat16"
    if rounds_rows_alike(getattr(torch, dtype)):
        assert all(torch.equal(each, alone) for each in others)


def test_compare_is_the_two_scores(scorer):
    comparison = scorer.compare("Tips for better sleep?", "Keep a rhythm.", "idk")
    scores = scorer.score([answer("Keep a rhythm."), answer("idk")])
    assert [comparison.score_a, comparison.score_b] == pytest.approx(scores.tolist(), abs=1e-6)
    assert comparison.margin == comparison.score_a - comparison.score_b
    assert comparison.probability_a == pytest.approx(1 / (1 + math.exp(-comparison.margin)))


def test_bfloat16_products_stay_close(tiny_checkpoint, scorer):
    conversations = [answer("word " * count) for count in range(1, 20)]
    exact = scorer.score(conversations)
    rounded = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="bfloat16").score(conversations)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.std()


def test_errors_name_the_conversation(scorer):
    with pytest.raises(ConversationError, match="conversation 1"):
        scorer.score([answer("fine"), QUESTION])


def test_a_head_that_overflows_is_an_error_not_a_score(tiny_checkpoint):
    scorer = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32")
    scorer.head.tensors["score.2.bias"].fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="conversation 0: a non-finite score: the score head overflowed"):
        scorer.score([answer("x")])


def test_unknown_dtype_is_refused(tiny_checkpoint):
    with pytest.raises(ConfigurationError, match="'float16'"):
        Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float16")


# ---- placements -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> dict[str, Path]:
    """A model of six blocks, 16-bit and packed."""
    place = tmp_path_factory.mktemp("six")
    stored = write_tiny_checkpoint(place / "16-bit", layers=6, shards=1)
    return {"16-bit": stored, "gptq": pack_checkpoint(shutil.copytree(stored, place / "gptq"), GPTQ4)}


def placed(directory: Path, name: str, token_budget: int = TOKENS) -> Scorer:
    how, placement = placements(open_checkpoint(directory))[name]
    scorer = Scorer.from_pretrained(directory, dtype="float32", token_budget=token_budget, **how)
    assert scorer.plan.placement == placement or token_budget > TOKENS
    return scorer


CONVERSATIONS = [answer("word " * count) for count in (1, 30, 7, 90, 2, 55, 8, 9)] + [answer("Other. " * 40)]


@pytest.fixture(scope="module")
def expected(six) -> dict[str, torch.Tensor]:
    """Scores of single conversations on one device."""
    scores = {}
    for model, directory in six.items():
        scorer = placed(directory, "as stored")
        scores[model] = torch.cat([scorer.score([each]) for each in CONVERSATIONS])
    return scores


@pytest.mark.parametrize("model", ["16-bit", "gptq"])
@pytest.mark.parametrize("name", NAMES)
def test_every_placement_gives_the_same_scores(six, expected, name, model):
    scorer = placed(six[model], name)
    limit = 1e-5 * expected[model].std()
    assert (scorer.score(CONVERSATIONS) - expected[model]).abs().max() < limit
    assert (scorer.score(CONVERSATIONS[::-1]).flip(0) - expected[model]).abs().max() < limit
    assert (scorer.score(CONVERSATIONS[3:4]) - expected[model][3]).abs().max() < limit
    assert scorer.score([]).shape == (0,)


@pytest.mark.parametrize("token_budget", [1, 16, 200, 100_000])
@pytest.mark.parametrize("name", ["a device", "halves", "streamed"])
def test_chunks_of_any_size_give_the_same_scores(six, expected, name, token_budget):
    scores = placed(six["gptq"], name, token_budget).score(CONVERSATIONS)
    assert (scores - expected["gptq"]).abs().max() < 1e-5 * expected["gptq"].std()


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_names_block_and_conversation_wherever_the_block_is(six, tmp_path, name):
    directory = shutil.copytree(six["16-bit"], tmp_path / "damaged")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    before = threading.active_count()
    with pytest.raises(NonFiniteError, match=r"^conversation 0: block 3: a non-finite activation; check the weights"):
        placed(directory, name).score(CONVERSATIONS)
    assert threading.active_count() == before


def test_hidden_states_in_files_give_the_very_scores_of_those_in_memory(six, monkeypatch, tmp_path):
    checkpoint = open_checkpoint(six["gptq"])
    plan = plan_placement(checkpoint, devices="cpu", stream=True, token_budget=TOKENS)
    in_memory = Scorer(checkpoint, plan).score(CONVERSATIONS)
    monkeypatch.setattr(streaming, "gettempdir", lambda: tmp_path)
    left = []
    real = streaming.sweep

    def sweep(hidden_states, *more):
        left.append([*tmp_path.iterdir()])
        return real(hidden_states, *more)

    monkeypatch.setattr(streaming, "sweep", sweep)
    shares = tuple(replace(share, spare_bytes=0) for share in plan.shares)
    in_files = Scorer(checkpoint, replace(plan, shares=shares, spare_host_bytes=0)).score(CONVERSATIONS)
    assert torch.equal(in_files, in_memory)
    assert left and not any(left), "files that a killed process would leave"


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.integers(0, 60_000))
def test_a_call_is_cut_into_sweeps_that_have_room(sizes, room):
    batches = [SimpleNamespace(tokens=size) for size in sizes]
    parts = streaming.split_batches(batches, room)
    assert [batch for part in parts for batch in part] == batches and all(parts)
    totals = [sum(batch.tokens for batch in part) for part in parts]
    if room >= streaming.MIN_SWEEP_TOKENS + max(sizes):
        assert max(totals) <= room and max(totals) - min(totals) <= 2 * max(sizes)
    else:
        assert len(parts) == 1


@pytest.mark.parametrize("token_budget", [64, 5000])
def test_warming_up_computes_a_full_chunk(six, monkeypatch, token_budget):
    scorer, packed = placed(six["gptq"], "a device", token_budget), []
    real = Block.__call__
    monkeypatch.setattr(
        Block,
        "__call__",
        lambda block, hidden, batch, **options: (packed.append(batch.tokens), real(block, hidden, batch))[1],
    )
    scorer.warm_up()
    assert set(packed) == {token_budget}


def test_several_sweeps_give_the_very_scores_of_one(six, monkeypatch):
    checkpoint = open_checkpoint(six["gptq"])
    plan = plan_placement(checkpoint, devices="cpu", stream=True, token_budget=TOKENS)
    scorer, swept, real = Scorer(checkpoint, plan), [], streaming.sweep
    one = scorer.score(CONVERSATIONS)
    monkeypatch.setattr(streaming, "sweep", lambda stream, *more: (swept.append(stream), real(stream, *more))[1])
    monkeypatch.setattr(streaming, "split_batches", lambda batches, room: [batches[:2], batches[2:]])
    assert torch.equal(scorer.score(CONVERSATIONS), one)
    assert len(swept) == 2


def test_the_hidden_states_of_one_sweep_are_freed_before_the_next(six, monkeypatch):
    checkpoint = open_checkpoint(six["gptq"])
    scorer = Scorer(checkpoint, plan_placement(checkpoint, devices="cpu", stream=True, token_budget=TOKENS))
    alive: weakref.WeakSet = weakref.WeakSet()
    counts = []

    class Watched(streaming.HiddenStates):
        def __init__(self, *args, **kwargs):
            counts.append(len(alive))
            super().__init__(*args, **kwargs)
            alive.add(self)

    monkeypatch.setattr(streaming, "HiddenStates", Watched)
    monkeypatch.setattr(streaming, "split_batches", lambda batches, room: [batches[:1], batches[1:2], batches[2:]])
    scorer.score(CONVERSATIONS)
    assert counts == [0, 0, 0]


@pytest.mark.parametrize(("name", "beyond"), [("streamed", 2), ("some stay", 2), ("one buffer", 1), ("from disk", 2)])
def test_no_more_blocks_in_memory_than_planned(six, monkeypatch, name, beyond):
    alive: weakref.WeakSet = weakref.WeakSet()
    peaks = []
    real = Checkpoint.read_block

    def read_block(self, index):
        tensors = real(self, index)
        alive.add(tensors["mlp.down_proj.weight"])  # which the block holds as it is
        peaks.append(len(alive))
        time.sleep(0.002)
        return tensors

    monkeypatch.setattr(Checkpoint, "read_block", read_block)
    scorer = placed(six["16-bit"], name)
    resident = sum(len(share.resident) for share in scorer.plan.shares)
    peaks.clear()
    for _ in range(2):
        scorer.score(CONVERSATIONS)
    assert len(peaks) == 2 * (6 - resident)
    assert max(peaks) == resident + beyond
    assert len(alive) == resident


@pytest.mark.parametrize("name", ["kept", "halves", "streamed", "dealt"])
def test_ctrl_c_leaves_no_thread_behind(six, expected, monkeypatch, name):
    scorer, before, calls = placed(six["16-bit"], name), threading.active_count(), []
    real = Block.__call__

    def interrupted(self, hidden, batch, **options):
        calls.append(batch)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return real(self, hidden, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "__call__", interrupted)
        with default_sigint(), pytest.raises(KeyboardInterrupt):
            scorer.score(CONVERSATIONS)
    assert threading.active_count() == before
    assert len(calls) < 15  # of the 25 and more that it would take
    assert (scorer.score(CONVERSATIONS) - expected["16-bit"]).abs().max() < 1e-5 * expected["16-bit"].std()


@pytest.mark.parametrize("name", ["halves", "thirds", "streamed", "dealt"])
def test_what_goes_wrong_in_a_thread_reaches_the_caller_and_the_next_call_works(six, expected, monkeypatch, name):
    scorer, before, calls = placed(six["16-bit"], name), threading.active_count(), []
    real = Block.__call__

    def broken(self, hidden, batch, **options):
        calls.append(batch)
        if len(calls) == 7:
            raise MemoryError("no room")
        return real(self, hidden, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "__call__", broken)
        with pytest.raises(MemoryError, match="no room"):
            scorer.score(CONVERSATIONS)
    assert threading.active_count() == before
    assert (scorer.score(CONVERSATIONS) - expected["16-bit"]).abs().max() < 1e-5 * expected["16-bit"].std()


def test_a_file_that_shrank_since_it_was_opened_is_an_error_when_its_block_is_due(six, tmp_path):
    directory = shutil.copytree(six["16-bit"], tmp_path / "cut")
    scorer, before = placed(directory, "streamed"), threading.active_count()
    os.truncate(directory / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match=r"model\.layers\.\d.* ends after .* bytes"):
        scorer.score(CONVERSATIONS)
    assert threading.active_count() == before


def test_devices_of_a_split_compute_at_the_same_time(six, monkeypatch):
    """The second device's first block meets the first device's first block of a later chunk."""
    scorer = placed(six["16-bit"], "halves")
    first, second = (blocks.resident[blocks.share.blocks[0]] for blocks in scorer._device_blocks)
    meeting, met = threading.Barrier(2, timeout=10), {first: 0, second: 0}
    real = Block.__call__

    def meet(self, hidden, batch, **options):
        if self in met:
            met[self] += 1
            if self is second and met[self] <= 2 or self is first and met[self] in (2, 3):
                meeting.wait()
        return real(self, hidden, batch)

    monkeypatch.setattr(Block, "__call__", meet)
    scorer.score(CONVERSATIONS)
    assert met[first] == met[second] > 3


PEAK = """
import re, sys
from pathlib import Path
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.execution.placement import plan_placement
from runtime.scorer import Scorer
def kilobytes(field): return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
Scorer(open_checkpoint(sys.argv[1]))  # whatever is imported or set up once
large, before = open_checkpoint(sys.argv[2]), kilobytes("VmRSS")
scorer = Scorer(large, plan_placement(large, devices="cpu", dtype=sys.argv[3], memory={"cpu": sys.argv[4]}))
assert scorer.plan.placement == "resident"
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak of resident memory")
@pytest.mark.parametrize(("model", "dtype"), [("16-bit", "bfloat16"), ("gptq", "float32")])
def test_loading_holds_no_second_copy(tmp_path, tiny_checkpoint, model, dtype):
    """Peak memory while loading, for a model of 32 blocks."""
    directory = tmp_path / "large"
    write_tiny_checkpoint(directory, layers=32, hidden=512, intermediate=1024, heads=8, kv_heads=4)
    if model == "gptq":
        pack_checkpoint(directory, replace(GPTQ4, group_size=64))
    checkpoint = open_checkpoint(directory)
    memory = room(checkpoint, 32, tokens=1024)
    command = [sys.executable, "-c", PEAK, tiny_checkpoint, directory, dtype, str(memory)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.2 * checkpoint.nbytes()
