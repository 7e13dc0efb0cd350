"""A row that a benchmark cannot use is an error that names file, row and key, before any model is loaded."""

from __future__ import annotations

import random
import re

import pytest

from runtime.common.errors import ConfigurationError, ConversationError, JobError, KitError
from runtime.preference_benchmarks.registry import BENCHMARKS, parse_benchmark
from runtime.preference_benchmarks.rows import BenchmarkRows
from tests.helpers.benchmark_rows import ROWS
from tests.helpers.tiny_score import write_jsonl

CASES = [
    (name, key)
    for name, make in ROWS.items()
    for key in sorted({key for row in make(4) for key in row})
    if key in BENCHMARKS[name].needs or key in ("prompt", "question", "chosen", "rejected", "reject", "response_2")
]


def check(name, rows, directory):
    return BenchmarkRows.check(BENCHMARKS[name], str(write_jsonl(directory / "rows.jsonl", rows)))


@pytest.mark.parametrize("name", ROWS)
def test_good_rows_are_counted_and_digested(tmp_path, name):
    rows = ROWS[name](9)
    found = check(name, rows, tmp_path)
    assert found.count == len(rows) and found.digest == check(name, rows, tmp_path).digest
    assert found.digest != check(name, rows[::-1], tmp_path).digest


@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_missing_key_is_named_with_file_and_row(tmp_path, name, key):
    rows = ROWS[name](12)
    index = next(index for index in range(5, len(rows)) if key in rows[index])
    del rows[index][key]
    with pytest.raises(ConversationError, match=rf"^rows.jsonl:{index + 1}: .*{key}"):
        check(name, rows, tmp_path)


@pytest.mark.parametrize("seed", range(60))
def test_no_value_of_a_key_is_a_traceback(tmp_path, seed):
    """A row with random wrong values is good or an error with its location."""
    draw = random.Random(seed)
    name = draw.choice(list(ROWS))
    rows = ROWS[name](6)
    values = [
        None,
        "",
        "x",
        0,
        3,
        -1,
        1.5,
        True,
        [],
        ["x"],
        [[0, 1]],
        [[9, 1]],
        [1, 2],
        {},
        {"answer": "x"},
        float("nan"),
    ]
    for key in draw.sample(sorted(rows[2]), 2):
        rows[2][key] = draw.choice(values)
    try:
        check(name, rows, tmp_path)
    except KitError as error:
        assert re.match(r"rows.jsonl:3: .+", str(error)), error


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rewardbench-2", {"num_correct": 2}, "num_correct is a number 2; the number of chosen responses, 1,"),
        ("rewardbench-2", {"subset": "Ties", "id": "7"}, "id is text '7'; ref:NUMBER or tied:NUMBER was expected"),
        ("rewardbench-2", {"subset": "Ties", "id": "tied:7"}, "num_correct is 1; a tied row of Ties needs at least 2"),
        ("rm-bench", {"domain": "cooking"}, "domain is text 'cooking'; one of chat, code, math"),
        ("rm-bench", {"chosen": ["a", "b"]}, "chosen has 2 responses; 3 styles were expected"),
        ("rmb", {"category_path": "Chat"}, "category_path is text 'Chat'; a path that starts with"),
        ("rmb", {"bon_best": "x", "loser_list": [], "chosen": None}, "loser_list is an empty list"),
        ("judgebench", {"label": "A=B"}, "label is text 'A=B'; A>B or B>A was expected"),
        ("ppe-human", {"winner": "me"}, "winner is text 'me', which names neither"),
        (
            "ppe-math",
            {"sampled_conflict_pairs": [[0, 0]]},
            r"sampled_conflict_pairs has \(0, 0\), whose scores are equal",
        ),
    ],
)
def test_a_value_that_the_rule_cannot_use_is_named(tmp_path, name, change, message):
    rows = ROWS[name](3)
    rows[1] |= change
    with pytest.raises(ConversationError, match=rf"^rows.jsonl:2: {message}"):
        check(name, rows, tmp_path)


def test_ties_without_their_reference_form_are_refused(tmp_path):
    rows = [row for row in ROWS["rewardbench-2"](9) if not row["id"].startswith("ref")]
    with pytest.raises(ConversationError, match="Ties: no prompt has a ref and a tied row"):
        check("rewardbench-2", rows, tmp_path)


def test_scores_of_other_rows_are_refused(tmp_path):
    found = check("rewardbench", ROWS["rewardbench"](3), tmp_path)
    scores = write_jsonl(tmp_path / "scores.jsonl", [{"where": "rows.jsonl:1", "scores": [1, 0]}])
    with pytest.raises(JobError, match=r"scores.jsonl does not have the scores of rows.jsonl:2"):
        found.judge(scores)


def test_rows_of_which_none_counts_are_refused(tmp_path):
    with pytest.raises(ConversationError, match="has no row that counts; rows of RewardBench were expected"):
        check("rewardbench", [], tmp_path)
    with pytest.raises(ConversationError, match="has no row that counts"):
        check("ppe-human", [row for row in ROWS["ppe-human"](12) if row["winner"] == "tie"], tmp_path)


def test_a_blank_response_is_scored(tmp_path):
    rows = ROWS["rmb"](2)
    rows[0]["reject"]["answer"] = ""
    assert check("rmb", rows, tmp_path).count == 2


def test_benchmarks_and_their_sources():
    assert parse_benchmark("rewardbench") == (BENCHMARKS["rewardbench"], "allenai/reward-bench")
    assert parse_benchmark("rmb=some/where=else")[1] == "some/where=else"
    with pytest.raises(ConfigurationError, match="--benchmark is 'rewardbench3'; one of rewardbench, rewardbench-2"):
        parse_benchmark("rewardbench3")
    with pytest.raises(ConfigurationError, match="RMB is in no hub data set.* --benchmark rmb=DIRECTORY"):
        parse_benchmark("rmb")
