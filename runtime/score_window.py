"""Scores of one window of rows: what every engine calls, wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.errors import NonFiniteError
from runtime.scorable import Scorable
from runtime.scored_row import Record, scored_record
from runtime.scorer import Scorer


def score_window(scorer: Scorer, window: Sequence[Scorable]) -> list[Record]:
    """Records of rendered rows, scored in one call.

    Raises:
        NonFiniteError: not one row has a finite score, so that it is the model's fault rather than a row's.
    """
    try:
        scores = iter(_scores(scorer, window))
    except NonFiniteError:
        scores = iter(_scores_alone(scorer, window))
    return [scored_record(row, [next(scores) for _ in row.rendered]) for row in window]


def _scores(scorer: Scorer, rows: Sequence[Scorable]) -> list[float]:
    rendered = [each for row in rows for each in row.rendered]
    return scorer.score_rendered(rendered).tolist() if rendered else []


def _scores_alone(scorer: Scorer, window: Sequence[Scorable]) -> list[float]:
    """Of the rows that have finite ones; the others fail."""
    scores: list[float] = []
    faults: list[str] = []
    for row in window:
        try:
            scores += _scores(scorer, [row])
        except NonFiniteError as fault:
            row.fail(fault)
            faults.append(row.error)
    if not scores:
        raise NonFiniteError(faults[0])
    return scores
