"""The speed benchmark command: its rows, figures, output and exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from runtime.bench.__main__ import main, parse
from runtime.bench.rows import generate_rows, load_rows_from_file
from runtime.common.errors import ConversationError
from runtime.conversations.chat_template import ChatTemplate
from runtime.conversations.rendering import Renderer
from runtime.modeling.packed_batch import pack_batches
from runtime.options import ModelOptions
from runtime.scorer import Scorer
from tests.helpers.tiny import CHAT_TEMPLATE, tiny_tokenizer
from tests.helpers.tiny_score import mixed_rows, write_jsonl


@pytest.fixture(autouse=True)
def _measure_quickly(monkeypatch):
    monkeypatch.setattr("runtime.bench.__main__.PEAK_SECONDS", 0.01)


@pytest.fixture(scope="module")
def renderer(tiny_checkpoint) -> Renderer:
    return Renderer.from_directory(tiny_checkpoint, 1024)


@pytest.fixture
def rows_file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", mixed_rows(40))


def bench(model: Path, *more: str | Path) -> int:
    return main([*map(str, more), "--model", str(model), "--devices", "cpu", "--dtype", "float32", "--rounds", "2"])


# ---- rows -----------------------------------------------------------------------------------------------


def test_made_up_rows_are_pairs_of_mixed_lengths_and_always_the_same(renderer):
    rows = generate_rows(20, renderer)
    assert len(rows) == 40 and rows == generate_rows(20, renderer) and rows[:10] == generate_rows(5, renderer)
    lengths = [len(row.token_ids) for row in rows]
    assert max(lengths) > 3 * min(lengths)
    whole, shared = sum(lengths), sum(batch.tokens for batch in pack_batches(rows, 10**6))
    assert shared < 0.85 * whole  # the two of a pair begin alike
    assert len({tuple(row.token_ids) for row in rows}) == 40


@pytest.mark.parametrize("positions", [400, 1024, 4096])
def test_made_up_rows_fit_the_model(positions):
    rows = generate_rows(50, Renderer(tiny_tokenizer(), ChatTemplate(CHAT_TEMPLATE), positions))
    assert max(len(row.token_ids) for row in rows) > positions / 8


def test_rows_of_a_file_are_those_that_can_be_scored(renderer, rows_file, tmp_path):
    rows, errors = load_rows_from_file(str(rows_file), 10, renderer)
    scored = [row for number, row in enumerate(mixed_rows(40)[:10]) if number % 7 != 3]
    assert errors == 1
    assert len(rows) == sum(2 if "chosen" in row else len(row.get("responses", [1])) for row in scored)
    with pytest.raises(ConversationError, match="broken.jsonl:1: not JSON"):
        load_rows_from_file(str(write_jsonl(tmp_path / "broken.jsonl", ["{"])), 9, renderer)
    with pytest.raises(ConversationError, match="empty.jsonl has no rows"):
        load_rows_from_file(str(write_jsonl(tmp_path / "empty.jsonl", [])), 9, renderer)


# ---- output ---------------------------------------------------------------------------------------------


def test_json_is_one_line_that_counts_what_was_scored(tiny_checkpoint, rows_file, renderer, capfd):
    assert bench(tiny_checkpoint, rows_file, "--rows", "15", "--token-budget", "500", "--json") == 0
    said = capfd.readouterr()
    figures = json.loads(said.out)
    rows, errors = load_rows_from_file(str(rows_file), 15, renderer)
    assert said.err == "" and figures["errors"] == errors == 2
    assert figures["conversations"] == len(rows)
    assert figures["rendered_tokens"] == sum(len(row.token_ids) for row in rows)
    assert (
        figures["computed_tokens"]
        == sum(batch.tokens for batch in pack_batches(rows, 500))
        < figures["rendered_tokens"]
    )
    assert len(figures["seconds"]) == 2 and figures["token_budget"] == 500
    assert (figures["devices"], figures["dtype"], figures["threads"]) == (["cpu"], "float32", torch.get_num_threads())
    assert figures["first_score_seconds"] > figures["load_seconds"] > 0
    assert figures["matmul_share"] == pytest.approx(figures["flops"] / figures["matmul_flops"], abs=1e-4)
    assert figures["peak_memory"] > 1 << 20 and figures["gpu_peak_memory"] == {}


def test_a_table_for_people(tiny_checkpoint, rows_file, capfd):
    assert bench(tiny_checkpoint, rows_file, "--rows", "5") == 0
    said = capfd.readouterr()
    assert said.out == "" and "1 rows of" in said.err
    for part in ("tokens/s", "as rendered", "TFLOP/s", "% of", "first score", "peak memory", "float32 on 1 CPU thread"):
        assert part in said.err


def test_every_round_scores_every_row(tiny_checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(Scorer, "score_rendered", lambda self, rows: calls.append(len(rows)))
    assert bench(tiny_checkpoint, "--rows", "3", "--json") == 0
    assert calls == [1, 6, 6]


# ---- errors and help ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rows", "0"), "--rows is 0; it must be at least 1"),
        (("--rounds", "0"), "--rounds is 0; it must be at least 1"),
        (("--token-budget", "0"), "--token-budget is 0"),
        (("nothing.jsonl",), "nothing.jsonl cannot be read"),
    ],
)
def test_invalid_arguments_are_errors_before_the_model_is_loaded(tiny_checkpoint, monkeypatch, capfd, more, message):
    monkeypatch.setattr(ModelOptions, "load", lambda *_: pytest.fail("loaded"))
    assert main(["--model", str(tiny_checkpoint), *more]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and message in said


def test_without_a_model_it_is_the_demo_and_says_so(tiny_checkpoint, monkeypatch, capfd):
    monkeypatch.setattr("runtime.demo.model.demo_directory", lambda: tiny_checkpoint)
    assert main(["--rows", "1", "--rounds", "1", "--devices", "cpu"]) == 0
    assert "this is the embedded demo. The real one: --model Qwen/WorldPM-72B" in capfd.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for word in ("tokens/s", "share of peak", "first score", "exit status: 0", "130", "examples:"):
        assert word in text
    examples = re.findall(r"-m runtime\.bench ?(.*?)(?: {2}|>>|$)", text.partition("examples:")[2], re.MULTILINE)
    assert len(examples) == 4
    for example in examples:
        parse(example.split())
