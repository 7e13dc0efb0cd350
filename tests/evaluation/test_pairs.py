"""Reading pairs, selecting those that can be compared, and the notes on those left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.common.errors import ConversationError
from runtime.conversations.rows.context import RowOptions
from runtime.evaluation.pairs import read_pairs, select_pairs, stored_pair_files, write_pairs
from runtime.evaluation.variant import Variant, open_variants
from tests.helpers import tiny_job
from tests.helpers.tiny_job import PAIRS, ROWS, quantize, write_job_model

ROW = {"prompt": "Q", "chosen": "yes", "rejected": "no"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, 40 pairs, and the quantized model."""
    place = tmp_path_factory.mktemp("pairs")
    write_job_model(place / "model")
    tiny_job.write_pairs(place / "pairs.jsonl")
    assert quantize(place / "model", place / "pairs.jsonl", place / "packed", "--method", "nf4", "--bits", "4") == 0
    return place


@pytest.fixture(scope="module")
def packed(place) -> Variant:
    return Variant.open(str(place / "packed"))


@pytest.fixture(scope="module")
def pairs(place):
    return read_pairs([place / "pairs.jsonl"])


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_are_read_as_one_and_each_pair_once(tmp_path):
    blank, tied, other = {**ROW, "chosen": " "}, {**ROW, "rejected": "yes"}, {**ROW, "prompt": "R"}
    files = [write(tmp_path / "a.jsonl", ROW, blank, tied), write(tmp_path / "b.jsonl", other, ROW)]
    assert [pair.where for pair in read_pairs(files)] == ["a.jsonl:1", "b.jsonl:1"]
    with pytest.raises(ConversationError, match="a.jsonl: no usable preference pair"):
        read_pairs([write(tmp_path / "a.jsonl", tied)])
    single = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    with pytest.raises(ConversationError, match="a.jsonl:2: the row is a single conversation"):
        read_pairs([write(tmp_path / "a.jsonl", ROW, single)])
    with pytest.raises(ConversationError, match="a.jsonl:1: the row has"):
        read_pairs([write(tmp_path / "a.jsonl", {"question": "x"})])


def test_directories_and_patterns_are_read_with_the_options_of_rows(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl", {"q": "Q", "chosen": "yes", "rejected": "no"})
    write(tmp_path / "data" / "b.jsonl", *({"q": text, "chosen": ["a"], "rejected": ["b", "c"]} for text in "RS"))
    options, notes = RowOptions(columns={"prompt": "q"}), []
    for source in (tmp_path / "data", tmp_path / "data" / "*.jsonl"):
        pairs = read_pairs([source], options, notes.append)
        assert [pair.where for pair in pairs] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:1", "b.jsonl:2", "b.jsonl:2"]
    assert notes == ["a.jsonl:1: the format is pair", "b.jsonl:1: the format is rewardbench-2"] * 2
    with pytest.raises(ConversationError, match="fits this pattern"):
        read_pairs([tmp_path / "*.csv"])


def test_pairs_beside_a_model_are_those_of_its_report(packed):
    assert [pair.id for pair in read_pairs(stored_pair_files([packed]))] == [each.id for each in packed.report.scores]
    assert {pair.category for pair in read_pairs(stored_pair_files([packed]))} == {
        "objective",
        "adversarial",
        "subjective",
    }


def test_pairs_are_read_as_they_were_written(tmp_path):
    turns = [{"role": role, "content": f"{role} ünd\u2028"} for role in ("system", "user", "assistant", "user")]
    answer = {"role": "assistant", "content": "<|im_end|>\n"}
    rows = [
        {"prompt": turns, "chosen": [answer], "rejected": "no", "category": "a/b"},
        {"prompt": turns[:3], "chosen": [turns[3], answer], "rejected": [turns[3], {**answer, "content": "x"}]},
        {"chosen": [*turns, answer], "rejected": [*turns[:1], {"role": "user", "content": "?"}, answer]},
    ]
    pairs = read_pairs([write(tmp_path / "a.jsonl", *rows)])
    again = read_pairs([write_pairs(pairs, tmp_path)])
    assert [replace(pair, where="") for pair in pairs] == [replace(pair, where="") for pair in again]


def test_stored_scores_are_found_and_calibration_rows_left_out(packed, pairs):
    selection = select_pairs(pairs, [packed], None)
    assert {pair.id for pair in selection.pairs} == {each.id for each in packed.report.scores}
    for each in packed.report.scores:
        index = [pair.id for pair in selection.pairs].index(each.id)
        assert packed.stored_scores(selection.rendered[packed.label][index]) == each.reference
    calibrated, unknown = ROWS // 2, len(pairs) - PAIRS - ROWS // 2
    assert set(selection.notes[packed.label]) == {
        f"{calibrated} of 40 pairs are left out: this model was calibrated on them",
        f"{unknown} of 40 pairs are left out: no reference scores are stored for them",
    }


def test_with_a_reference_only_calibration_rows_and_long_pairs_are_left_out(place, packed, pairs, tmp_path):
    long = read_pairs([write(tmp_path / "long.jsonl", {**ROW, "rejected": "x" * 2000})])
    packed, reference = open_variants([str(place / "packed"), str(place / "model")])
    selection = select_pairs([*pairs, *long], [packed], reference)
    assert len(selection.pairs) == 40 - ROWS // 2
    assert set(selection.rendered) == {"packed", "model"}
    assert all(len(rendered) == len(selection.pairs) for rendered in selection.rendered.values())
    assert "1 of 41 pairs are left out: this model cannot render them" in selection.notes["model"]
    assert f"{ROWS // 2} of 41 pairs are left out: they are unusable for another model" in selection.notes["model"]


def test_half_a_pair_that_was_calibrated_on_is_enough_to_leave_it_out(packed, pairs):
    rendered = next(each for each in map(packed.render, pairs) if packed.stored_scores(each) is None)
    pair = next(pair for pair in pairs if packed.render(pair) == rendered)
    stored = packed.stored_reference
    half = replace(stored, scores=stored.scores | {rendered[0].key: 0.0})
    assert not packed.was_calibrated_on(pair, rendered)
    assert replace(packed, stored_reference=half).was_calibrated_on(pair, rendered)


def test_several_models_are_compared_on_the_same_pairs(packed, pairs):
    lost = next(pair for pair in pairs if pair.id == packed.report.scores[3].id)
    keys = {each.key for each in packed.render(lost)}
    scores = {key: score for key, score in packed.stored_reference.scores.items() if key not in keys}
    other = replace(packed, label="other", stored_reference=replace(packed.stored_reference, scores=scores))
    selection = select_pairs(pairs, [packed, other], None)
    assert len(selection.pairs) == PAIRS - 1 and lost not in selection.pairs
    assert "1 of 40 pairs are left out: they are unusable for another model" in selection.notes[packed.label]


def test_no_common_pair_is_an_error_that_says_why(packed, tmp_path):
    strange = read_pairs([write(tmp_path / "a.jsonl", ROW)])
    with pytest.raises(ConversationError, match=r"none of the 1 pairs .*packed: 1 of 1 .*no reference.*--reference"):
        select_pairs(strange, [packed], None)


def test_models_of_one_name_get_numbers(place):
    labels = [variant.label for variant in open_variants([str(place / "packed")] * 3 + [str(place / "model")])]
    assert labels == ["packed", "packed-2", "packed-3", "model"]
