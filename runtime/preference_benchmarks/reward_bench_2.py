"""RewardBench 2 (arXiv 2506.01937; rules of the public repository allenai/reward-bench).

The chosen response must have the highest score of four; if others share it, the win is shared. In the subset Ties there
are several right answers: the score rewards that each right answer beats each wrong one, and that the right answers
differ less from each other than from the wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import describe_value
from runtime.preference_benchmarks.benchmark import (
    Benchmark,
    JudgedRow,
    Outcome,
    Row,
    Weights,
    read_text,
)

TIES = "Ties"


def judge(row: Row, scores: Sequence[float], where: str) -> list[Outcome]:
    """One comparison in the row's subset."""
    subset, right = read_text(row, "subset", where), row["num_correct"]
    if not isinstance(right, int) or isinstance(right, bool) or right != len(row["chosen"]):
        raise ConversationError(
            f"{where}: num_correct is {describe_value(right)}; the number of chosen responses, {len(row['chosen'])}, "
            "was expected."
        )
    if subset.lower() != TIES.lower():
        best = max(scores)
        return [Outcome(subset, 1 / list(scores).count(best) if scores[0] == best else 0)]
    kind, _ = _ties_id(row, where)
    if kind == "tied" and right < 2:
        raise ConversationError(f"{where}: num_correct is {right}; a tied row of {TIES} needs at least 2.")
    return [Outcome(TIES, min(scores[:right]) > max(scores[right:]))]


def sections(comparisons: Mapping[str, int]) -> dict[str, Weights]:
    """The subsets, and their mean, which is the leaderboard's score."""
    return {subset: {subset: 1.0} for subset in comparisons} | {"mean of subsets": dict.fromkeys(comparisons, 1.0)}


class Margins(NamedTuple):
    """Of one prompt: worst right minus best wrong score, and best minus worst right score."""

    over_wrong: float
    among_right: float


def ties_score(rows: Sequence[JudgedRow]) -> dict[str, float]:
    """The score of the subset Ties, from a prompt's tied answers and its reference form with one right answer.

    Raises:
        ConversationError: no prompt has both forms.
    """
    margins: dict[str, dict[str, Margins]] = {"ref": {}, "tied": {}}
    for row in rows:
        if any(outcome.group == TIES for outcome in row.outcomes):
            kind, number = str(row.id).split(":")
            right, wrong = np.array(row.chosen), np.array(row.rejected)
            with np.errstate(invalid="ignore"):  # rows without scores have infinities
                margins[kind][number] = Margins(right.min() - wrong.max(), right.max() - right.min())
    if not margins["ref"] and not margins["tied"]:
        return {}
    both = [(margins["ref"][number], margins["tied"][number]) for number in margins["tied"] if number in margins["ref"]]
    if not both:
        raise ConversationError(f"{TIES}: no prompt has a ref and a tied row; use the complete benchmark.")
    reference = np.array([each.over_wrong for each, _ in both])
    tied = np.array([each.over_wrong for _, each in both])
    spread = np.array([each.among_right for _, each in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        hard = np.minimum(reference, tied)
        closeness = np.nan_to_num(np.tanh(hard / spread - 1), nan=0.0)
    accuracies = [np.mean([each.over_wrong > 0 for each in margins[kind].values()]) for kind in ("ref", "tied")]
    score = 0.3 * sum(accuracies) + 0.2 * np.mean(tied > spread) + 0.2 * np.mean(hard > spread)
    return {TIES: float(score + 0.01 * np.mean(closeness))}


def _ties_id(row: Row, where: str) -> tuple[str, str]:
    kind, separator, number = read_text(row, "id", where).partition(":")
    if kind not in ("ref", "tied") or not separator or not number.isdecimal():
        raise ConversationError(f"{where}: id is {describe_value(row['id'])}; ref:NUMBER or tied:NUMBER was expected.")
    return kind, number


REWARD_BENCH_2 = Benchmark(
    name="rewardbench-2",
    title="RewardBench 2",
    needs=("prompt", "chosen", "rejected", "subset", "num_correct", "id"),
    judge=judge,
    sections=sections,
    source="allenai/reward-bench-2",
    files="test-*.parquet",
    format="rewardbench-2",
    special_scores=ties_score,
)
