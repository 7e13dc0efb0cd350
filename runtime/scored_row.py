"""A row of input with its scores, as one flat record: what every output format is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.preference import probability_preferred
from runtime.scorable import Scorable

Record = dict[str, Any]
COLUMNS = (
    "where",
    "id",
    "category",
    "score",
    "scores",
    "margin",
    "probability_chosen",
    "ranks",
    "best",
    "tokens",
    "warnings",
    "error",
)
"""Every key that a record may have, in order. One that does not apply to a row is absent."""


def scored_record(row: Scorable, scores: Sequence[float]) -> Record:
    """The record of a row: its place, its `id` and `category` if it has them, and

    * of every row that could be scored `scores` and `tokens`, one a conversation in the row's order
      (chosen, rejected), and `warnings` where there are any;
    * of a pair `margin`, the chosen score less the rejected one, and `probability_chosen`, its sigmoid;
    * of N responses `ranks`, where 1 is the highest score and equals share a rank, and `best`, the index
      from 0 of the first with rank 1;
    * of a single conversation `score`;
    * of a row that could not be scored `error`.
    """
    record: Record = {"where": row.where}
    if row.id is not None:
        record["id"] = row.id
    if row.category:
        record["category"] = row.category
    if row.error:
        return record | {"error": row.error}
    if row.kind == "conversation":
        record["score"] = scores[0]
    record["scores"] = list(scores)
    if row.kind == "pair":
        record["margin"] = scores[0] - scores[1]
        record["probability_chosen"] = probability_preferred(record["margin"])
    elif row.kind == "responses":
        record["ranks"] = ranks_of(scores)
        record["best"] = record["ranks"].index(1)
    record["tokens"] = [len(rendered.token_ids) for rendered in row.rendered]
    if warnings := row.warnings():
        record["warnings"] = warnings
    return record


def ranks_of(scores: Sequence[float]) -> list[int]:
    """The rank of each score, 1 for the highest; equals share the better one."""
    first: dict[float, int] = {}
    for rank, score in enumerate(sorted(scores, reverse=True), start=1):
        first.setdefault(score, rank)
    return [first[score] for score in scores]
