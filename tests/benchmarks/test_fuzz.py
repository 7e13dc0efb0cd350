"""A short fixed part of the fuzzing, and what the harness must notice."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks.fuzz.__main__ import NAMES, _load
from benchmarks.fuzz.engines import LastInput, Recorder, run_hypothesis
from benchmarks.fuzz.mutation import mutate_json
from benchmarks.fuzz.target import Target
from runtime.common.errors import KitError

SECONDS = 5  # of each target at most; for a busy machine
INPUTS = {"template": 3, "tokenizer-config": 6, "block": 15, "report": 20, "tokenizer": 30}


def finds(target: Target, tmp_path, inputs: int, seconds: float = 60) -> dict[str, str]:
    record = Recorder(target, tmp_path, tmp_path / "finds")
    run_hypothesis(target, record, seconds, inputs, seed=1)
    assert record.progress.inputs >= min(inputs, len(target.seeds()))
    return record.progress.finds


@pytest.mark.parametrize("name", NAMES)
def test_readers_refuse_or_read(name, tmp_path):
    assert not finds(_load(name), tmp_path, INPUTS.get(name, 100), SECONDS)


def test_every_seed_is_read(tmp_path):
    """Inputs are near valid documents only if the seeds are valid."""
    for name in (
        "safetensors",
        "index",
        "block",
        "tokenizer-config",
        "jsonl",
        "json",
        "csv",
        "parquet",
        "gzip",
        "report",
    ):
        target = _load(name)
        scratch = tmp_path / name
        scratch.mkdir()
        for data in target.seeds():
            target.check(data, scratch)


def _writes(data, scratch):
    (scratch.parent.parent / "elsewhere").write_bytes(data)


def _fails(message):
    def check(data, scratch):
        raise KitError(message)

    return check


def _calls(function):
    return lambda data, scratch: function()


@pytest.mark.parametrize(
    ("check", "what"),
    [
        (lambda data, scratch: json.loads(data)["a"]["b"], "TypeError"),
        (_fails(""), "the message is not printable"),
        (_calls(lambda: sum(range(4_000_000))), "it took"),
        (_calls(lambda: bytes(600 << 20)[::4096] and b"x" * (600 << 20)), "MiB of memory"),
        (_writes, "it wrote"),
        (_fails("as it should be"), None),
    ],
)
def test_violations_are_found_and_stored(check, what, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "work"))
    target = Target("planted", [], lambda: [b'{"a": 1}'], mutate_json, check, seconds=0.02 if what == "it took" else 20)
    work = tmp_path / "work"
    found = finds(target, work, 1)
    assert bool(found) == (what is not None)
    if what:
        assert any(what in name for name in found), found
        assert os.path.getsize(next(iter(found.values()))) and LastInput.read(work / LastInput.NAME)
