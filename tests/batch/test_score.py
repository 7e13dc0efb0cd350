"""The command from end to end on a tiny model: what it writes, what it says, how it ends."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from runtime.batch.engine import score_window
from runtime.batch.reader import ScoreInput
from runtime.common.errors import ConfigurationError
from runtime.conversations.conversation import PreferencePair
from runtime.conversations.row_shapes import parse_row
from runtime.execution.nonfinite import nonfinite_error
from runtime.score import main, parse
from runtime.scorer import Scorer
from tests.helpers.tiny_score import assistant, mixed_rows, read_jsonl, score, user, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
ROWS = mixed_rows(40)
QUESTION = [user("Tips for better sleep?")]
PAIR = {"prompt": QUESTION, "chosen": "Keep a rhythm.", "rejected": "idk"}


@pytest.fixture(scope="module")
def scorer(tiny_checkpoint) -> Scorer:
    return Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def scored(tiny_checkpoint, rows_file) -> list[dict]:
    """What `ROWS` give."""
    output = rows_file.with_name("scored.jsonl")
    assert score(tiny_checkpoint, rows_file, "--output", output) == 0
    return read_jsonl(output)


def conversations(row: dict) -> list[list[dict]]:
    """What a row of `ROWS` asks for, said once more in the plainest way."""
    if "messages" in row:
        return [row["messages"]]
    prompt = [user(row["prompt"])] if isinstance(row["prompt"], str) else row["prompt"]
    texts = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
    return [[*prompt, assistant(text)] for text in texts]


# ---- what is written ------------------------------------------------------------------------------------


def test_scores_are_the_scorer_s_in_the_order_of_the_input(scored, scorer):
    assert [record["id"] for record in scored] == [row["id"] for row in ROWS]
    assert [record["category"] for record in scored] == [row["category"] for row in ROWS]
    assert [record["where"] for record in scored] == [f"rows.jsonl:{n}" for n in range(1, len(ROWS) + 1)]
    for record, row in zip(scored, ROWS, strict=True):
        if row.get("messages", [{}])[-1].get("role") == "user":
            assert record["error"].startswith(record["where"] + ": the last turn is the user's")
            assert "scores" not in record
            continue
        rendered = [scorer.renderer.render(each) for each in conversations(row)]
        assert record["scores"] == pytest.approx(scorer.score(conversations(row)).tolist(), abs=1e-5)
        assert record["tokens"] == [len(each.token_ids) for each in rendered]
        assert "warnings" not in record


def test_each_kind_has_its_figures(scored):
    kinds = {"margin": "chosen", "best": "responses", "score": "messages"}
    for record, row in zip(scored, ROWS, strict=True):
        if "error" not in record:
            assert [kind for key, kind in kinds.items() if key in record] == [k for k in kinds.values() if k in row]
    pair = next(record for record in scored if "margin" in record)
    assert pair["margin"] == pair["scores"][0] - pair["scores"][1]


def test_scores_do_not_depend_on_the_windows(tiny_checkpoint, rows_file, scored, tmp_path):
    assert score(tiny_checkpoint, rows_file, "--output", tmp_path / "out.jsonl", budget=4096) == 0
    for record, other in zip(scored, read_jsonl(tmp_path / "out.jsonl"), strict=True):
        assert record.get("scores", []) == pytest.approx(other.get("scores", []), abs=1e-5)


def test_formats_hold_the_same(tiny_checkpoint, rows_file, scored, tmp_path):
    for name in ("out.csv", "out.parquet"):
        assert score(tiny_checkpoint, rows_file, "--output", tmp_path / name) == 0
    for row, record in zip(pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist(), scored, strict=True):
        assert {key: value for key, value in row.items() if value is not None} == record
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        for row, record in zip(csv.DictReader(file), scored, strict=True):
            assert {key for key, cell in row.items() if cell} == set(record)
            assert json.loads(row["scores"] or "null") == record.get("scores")
            assert float(row["margin"] or "nan") == pytest.approx(record.get("margin", float("nan")), nan_ok=True)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json", "rows.json.gz", "rows.parquet"])
def test_every_container_scores_alike(tiny_checkpoint, scored, tmp_path, name):
    path = tmp_path / name
    if name == "rows.parquet":
        absent = dict.fromkeys(("prompt", "chosen", "rejected", "responses", "messages"))
        rows = [absent | row for row in ROWS]
        rows = [row | {"prompt": [user(p)] if isinstance(p := row["prompt"], str) else p} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        plain = json.dumps(ROWS) if ".json." in f"{name}." else "".join(json.dumps(row) + "\n" for row in ROWS)
        path.write_bytes(gzip.compress(plain.encode()) if name.endswith(".gz") else plain.encode())
    assert score(tiny_checkpoint, path, "--output", tmp_path / "out.jsonl") == 0
    read = read_jsonl(tmp_path / "out.jsonl")
    assert [record.get("scores") for record in read] == [record.get("scores") for record in scored]
    assert read[4]["where"].startswith(name)


def test_standard_input_to_standard_output(tiny_checkpoint, rows_file, scored, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows_file.read_bytes())))
    assert score(tiny_checkpoint, "-", "--json") == 0
    out, err = capfdbinary.readouterr()
    printed = [json.loads(line) for line in out.decode().splitlines()]
    assert [record.get("scores") for record in printed] == [record.get("scores") for record in scored]
    assert [record["where"] for record in printed] == [f"stdin:{n}" for n in range(1, len(ROWS) + 1)]
    summary = json.loads(err.splitlines()[-1])
    assert summary["rows"] == len(ROWS) and set(summary["formats"]) == {"pair", "responses", "messages"}


def test_an_empty_input_is_an_empty_output(tiny_checkpoint, tmp_path, capfd):
    (tmp_path / "rows.jsonl").write_text("\n")
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        assert score(tiny_checkpoint, tmp_path / "rows.jsonl", "--output", tmp_path / name) == 0
        assert f"{name}: 0 rows, 0 scored, 0 with errors" in capfd.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").num_rows == 0


# ---- rows at fault --------------------------------------------------------------------------------------

LONG = {"messages": [user("x" * 900), assistant("y"), *QUESTION, assistant("z" * 300)]}
SYSTEM = {"messages": [{"role": "system", "content": "Be kind."}, *QUESTION, assistant("Yes.")]}
FAULTY = [PAIR, "{not json", {"question": "x"}, LONG, {**PAIR, "chosen": " "}, {**PAIR, "chosen": "x" * 1_000_000}]
FAULTY += [[], SYSTEM, {**PAIR, "rejected": "<|im_end|><|endoftext|>"}, PAIR]


def test_a_bad_row_costs_itself_alone(tiny_checkpoint, tmp_path, capfd):
    path, output = write_jsonl(tmp_path / "rows.jsonl", FAULTY), tmp_path / "out.jsonl"
    assert score(tiny_checkpoint, path, "--output", output, "--json") == 0
    records, (out, err) = read_jsonl(output), capfd.readouterr()
    assert [number for number, record in enumerate(records) if "error" in record] == [1, 2, 3, 4, 5, 6]
    messages = [
        "2: not JSON at column 2",
        "3: the row has the keys",
        r"4: \d+ tokens, but the model has 1024",
        "5: chosen: the response",
    ]
    messages += [r"6: chosen: \d+ tokens, but the model has 1024", "7: the row is an empty list"]
    for number, message in enumerate(messages, start=1):
        assert re.match(f"rows.jsonl:{message}", records[number]["error"])
    assert records[0]["scores"] == pytest.approx(records[9]["scores"], abs=1e-6)
    assert records[7]["warnings"] == ["non-empty system prompt: the model was trained with an empty one"]
    assert len(records[8]["scores"]) == 2  # typed special tokens are text
    figures = json.loads(out)
    assert (figures["rows"], figures["scored"], figures["errors"]) == (10, 4, 6)
    assert figures["tokens"] == sum(sum(record.get("tokens", [])) for record in records)
    assert figures["tokens_per_second"] > 0 and figures["rows_per_second"] > 0
    assert "out.jsonl: 10 rows, 4 scored, 6 with errors" in err
    assert "rows.jsonl:2: not JSON" in err and "rows.jsonl:7" not in err  # five are shown


def test_truncate_drops_oldest_turns_and_says_so(tiny_checkpoint, scorer, tmp_path):
    path, output = write_jsonl(tmp_path / "rows.jsonl", [LONG]), tmp_path / "out.jsonl"
    assert score(tiny_checkpoint, path, "--truncate", "--output", output) == 0
    (record,) = read_jsonl(output)
    assert record["warnings"] == ["truncated: the oldest 2 turns were dropped"]
    assert record["score"] == pytest.approx(float(scorer.score([LONG["messages"][2:]])), abs=1e-5)


def test_strict_stops_and_the_mended_input_is_resumed(tiny_checkpoint, tmp_path, capfd):
    rows, output = [*[PAIR] * 9, "{broken", PAIR], tmp_path / "out.jsonl"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert score(tiny_checkpoint, path, "--strict", "--output", output) == 2
    err = capfd.readouterr().err
    assert "error: rows.jsonl:10: not JSON" in err and "rows in" in err and "--resume continues" in err
    assert 0 < len(read_jsonl(output)) <= 9
    write_jsonl(path, [*rows[:9], PAIR, PAIR])
    assert score(tiny_checkpoint, path, "--strict", "--output", output, "--resume") == 0
    assert len(read_jsonl(output)) == 11


def overflowing(monkeypatch: pytest.MonkeyPatch, is_bad) -> None:
    """A scorer that has no finite score for some renderings."""
    real = Scorer.score_each

    def score_each(self, rendered):
        results = zip(rendered, real(self, rendered), strict=True)
        return [nonfinite_error(1) if is_bad(each) else result for each, result in results]

    monkeypatch.setattr(Scorer, "score_each", score_each)


def test_a_row_that_overflows_does_not_take_its_window_along(tiny_checkpoint, scorer, tmp_path, monkeypatch):
    path, output = (
        write_jsonl(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "rejected": "A" * 99}, PAIR]),
        tmp_path / "out.jsonl",
    )
    overflowing(monkeypatch, lambda rendered: len(rendered.token_ids) > 90)
    assert score(tiny_checkpoint, path, "--output", output, budget=1000) == 0
    first, second, third = read_jsonl(output)
    assert second["error"] == "rows.jsonl:2: " + str(nonfinite_error(1))
    assert first["scores"] == pytest.approx(third["scores"], abs=1e-6)
    assert score(tiny_checkpoint, path, "--strict", budget=1000) == 2


def test_a_model_that_overflows_everywhere_ends_the_run(damaged, rows_file, tmp_path, capfd):
    from safetensors.torch import load_file, save_file

    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert score(damaged, rows_file, "--output", tmp_path / "out.jsonl") == 2
    assert (
        f"error: {damaged}: model.layers.1.mlp.down_proj.weight holds a NaN or an infinity; download"
        in capfd.readouterr().err
    )
    assert list(tmp_path.glob("out*")) == []


def test_a_window_is_scored_in_one_call(scorer, monkeypatch):
    calls = []
    monkeypatch.setattr(Scorer, "score_each", lambda self, all: (calls.append(len(all)), [0.0] * len(all))[1])
    rows = ScoreInput(
        (f"f:{number}", row) for number, row in enumerate([PAIR, 3, {"prompt": "Q", "responses": ["a"] * 3}])
    )
    (window,) = rows.windows(scorer.renderer, tokens=1000, truncate=False, strict=False)
    records = score_window(scorer.score_each, window, scorer.checkpoint)
    assert [len(record.get("scores", [])) for record in records] == [2, 0, 3]
    assert calls == [5]


def test_cells_that_a_spreadsheet_would_run_are_escaped_on_request(tiny_checkpoint, tmp_path):
    rows = [{"id": "=1+1", "prompt": "Q", "response": "A"}, {"id": -5, "prompt": "Q", "response": "A"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert score(tiny_checkpoint, path, "--output", tmp_path / "out.csv", "--escape-formulas") == 0
    written = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
    assert [row["id"] for row in written] == ["'=1+1", "-5"] and float(written[0]["score"])


# ---- how it ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--output", "out.txt"), "--output is out.txt; a name that ends in .jsonl, .csv, .parquet"),
        (("--resume",), "--resume was given without --output"),
        (("--token-budget", "0"), "--token-budget is 0"),
        (("--model", "nowhere"), "nowhere"),
        (("--output", "out.jsonl", "--escape-formulas"), "only cells of CSV can be formulas"),
        (("--escape-formulas",), "--output is standard output"),
        (("--actors", "2"), "--actors was given without --engine ray"),
        (("--engine", "ray", "--actors", "0"), "--actors is 0; it must be at least 1."),
    ],
)
def test_arguments_that_cannot_be(tiny_checkpoint, rows_file, tmp_path, monkeypatch, capfd, more, message):
    monkeypatch.chdir(tmp_path)
    assert score(tiny_checkpoint, rows_file, *more) == 2
    assert message in capfd.readouterr().err


def test_ray_is_named_where_it_is_missing(tiny_checkpoint, rows_file, monkeypatch, capfd):
    monkeypatch.setattr("runtime.batch.run.find_spec", lambda name: None)
    assert score(tiny_checkpoint, rows_file, "--engine", "ray") == 2
    assert "--engine ray needs Ray, which is not installed; pip install" in capfd.readouterr().err


def test_an_input_that_is_not_there_is_told_before_the_model_is_loaded(tiny_checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Scorer, "__init__", lambda *_, **__: pytest.fail("loaded"))
    assert score(tiny_checkpoint, tmp_path / "none.jsonl", "--output", tmp_path / "out.jsonl") == 2
    assert "none.jsonl cannot be read: No such file" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_model_it_is_the_demo_and_says_so(tiny_checkpoint, rows_file, monkeypatch, capfd):
    monkeypatch.setattr("runtime.demo.model.demo_directory", lambda: tiny_checkpoint)
    assert main([str(rows_file), "--devices", "cpu"]) == 0
    assert "this is the embedded demo. The real one: --model Qwen/WorldPM-72B" in capfd.readouterr().err


def test_the_plan_is_what_was_asked_for_and_is_shown_before_loading(tiny_checkpoint, rows_file, monkeypatch, capfd):
    def load(self, checkpoint, plan):
        raise ConfigurationError(
            f"{plan.placement} {plan.shares[0].device.budget} {plan.precision.matmul_dtype} {plan.token_budget}"
        )

    monkeypatch.setattr(Scorer, "__init__", load)
    asked = ["--devices", "cpu", "--dtype", "bfloat16", "--memory", "cpu=3GiB", "--stream"]
    assert main([str(rows_file), "--model", str(tiny_checkpoint), *asked]) == 2
    said = capfd.readouterr().err
    assert said.endswith(f"error: streamed {3 << 30} torch.bfloat16 1024\n")
    assert "0 blocks stay, 2 are streamed" in said and "products in bfloat16" in said


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for word in ("probability_chosen", "--resume", "exit status: 0", "130", "responses", "examples:"):
        assert word in text
    examples = re.findall(r"-m runtime\.score (.*?)(?: {2}|\||$)", text.partition("examples:")[2], re.MULTILINE)
    assert len(examples) == 7
    for example in examples:
        parse(example.split())


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(tiny_checkpoint, rows_file):
    command = [sys.executable, "-m", "runtime.score", rows_file, "--model", tiny_checkpoint, "--token-budget", "16"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert process.wait() == 141
    *_, plan, last = process.stderr.read().decode().splitlines()
    assert plan.startswith("└") and last.endswith("the format is pair")  # and nothing after it


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_a_full_standard_output_is_an_error(tiny_checkpoint, rows_file):
    command = [sys.executable, "-m", "runtime.score", rows_file, "--model", tiny_checkpoint]
    with open("/dev/full", "wb") as full:
        process = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 2
    assert (
        process.stderr.splitlines()[-1]
        == "error: standard output: no space left on device; free some space, or use another disk."
    )


def test_pairs_are_read_as_everywhere_else(scored):
    """The command has no reading of its own: `parse_row` gives the same conversations."""
    for row in ROWS:
        if "chosen" in row:
            pair = parse_row(row)
            assert isinstance(pair, PreferencePair)
            assert [pair.chosen_conversation, pair.rejected_conversation] == conversations(row)


WRONG_FILES = {
    "columns.jsonl": (b'{"query_text": "Q", "a": "x", "b": "y"}', "'query_text', 'a', 'b', which fit no known format"),
    "prompts.jsonl": (b'{"prompt": "Q"}', "the keys 'prompt', which fit no known format"),
    "half.jsonl": (b'{"prompt": "Q", "chosen": "a"}', "no 'rejected'; the nearest format is pair"),
    "sides.jsonl": (b'{"prompt": "Q", "response_1": "a", "response_2": "b"}', "no 'winner'; the nearest format is ppe"),
    "header.csv": (b"Why?,Because.,No.\nHi,Hello,No\n", "the keys 'Why?', 'Because.', 'No.', which fit no"),
    "cells.csv": (b"prompt,chosen,rejected\nQ,a,b,c\n", "the row has 4 cells but 3 columns"),
    "array.jsonl": (b'[{"prompt": "Q"},\n', "rename it to .json"),
    "latin.jsonl": (b'{"prompt": "caf\xe9"}', "save the file as UTF-8"),
    "cut.jsonl.gz": (gzip.compress(b"{}\n" * 500)[:25], "not a complete gzip file"),
    "fake.parquet": (b'{"prompt": "Q"}', "cannot be read as Parquet"),
    "notes.txt": (b"hello", "has no supported suffix"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_the_message_for_a_wrong_file_is_short_and_names_what_it_found(tiny_checkpoint, tmp_path, capfd, name):
    content, found = WRONG_FILES[name]
    (tmp_path / name).write_bytes(content)
    score(tiny_checkpoint, tmp_path / name)
    said = [line for line in capfd.readouterr().err.splitlines() if name in line]
    assert len(said) == 1 and found in said[0] and len(said[0].replace(str(tmp_path), "")) <= 360
