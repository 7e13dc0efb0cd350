"""Records: keys, ranks and values per kind of row."""

from __future__ import annotations

import math

import pytest

from runtime.batch.row import COLUMNS, InputRow, RowKind, make_output_record
from runtime.conversations.rendering import RenderedConversation


def row(kind: RowKind, count: int, **more) -> InputRow:
    rendered = [RenderedConversation([1] * (n + 2), 0) for n in range(count)]
    return InputRow("f:1", kind, rendered=rendered, names=[f"responses[{n}]" for n in range(count)], **more)


def test_a_pair():
    record = make_output_record(row("pair", 2, id=3, category="maths"), [1.5, -0.5])
    assert record == {
        "where": "f:1",
        "id": 3,
        "category": "maths",
        "scores": [1.5, -0.5],
        "margin": 2.0,
        "probability_chosen": pytest.approx(1 / (1 + math.exp(-2))),
        "tokens": [2, 3],
    }
    assert list(record) == [column for column in COLUMNS if column in record]


@pytest.mark.parametrize(
    ("scores", "ranks", "best"),
    [
        ([1.0], [1], 0),
        ([0.0, 2.0, 1.0], [3, 1, 2], 1),
        ([1.0, 5.0, 5.0, 0.0], [3, 1, 1, 4], 1),
        ([0.0, -0.0], [1, 1], 0),
    ],
)
def test_responses(scores, ranks, best):
    record = make_output_record(row("responses", len(scores)), scores)
    assert (record["ranks"], record["best"], record["scores"]) == (ranks, best, scores)
    assert "margin" not in record and "score" not in record


def test_a_conversation():
    record = make_output_record(row("conversation", 1), [0.25])
    assert record == {"where": "f:1", "score": 0.25, "scores": [0.25], "tokens": [2]}


def test_a_row_with_an_error_has_nothing_else():
    record = make_output_record(InputRow("f:1", id="x", error="f:1: bad"), [])
    assert record == {"where": "f:1", "id": "x", "error": "f:1: bad"}


@pytest.mark.parametrize(("margin", "probability"), [(0, 0.5), (1000, 1), (-1000, 0), (-30, math.exp(-30))])
def test_the_probability_does_not_overflow(margin, probability):
    assert make_output_record(row("pair", 2), [margin, 0])["probability_chosen"] == pytest.approx(probability, rel=1e-9)
