"""What a benchmark is: rows that name their data, a rule that judges a row by its scores, and sections of the result.

A row makes comparisons, each in a group: RewardBench's groups are its subsets, RM-Bench's are a domain and a level. A
section is a weighted mean of the shares of comparisons won in its groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import describe_value

Row = dict[str, Any]
Weights = dict[str, float]
"""Weight of each group in a section; only their ratios count."""


@dataclass(frozen=True)
class Outcome:
    """The comparisons of one row in one group: `won` of `of`. A win may be shared by equal scores."""

    group: str
    won: float
    of: int = 1


@dataclass(frozen=True)
class JudgedRow:
    """A row and what its scores mean.

    Attributes:
        where: its location, such as ``total_dataset.json row 12``.
        id: its id in the benchmark, None without one.
        chosen, rejected: the scores of the preferred and of the other responses.
        outcomes: its comparisons; empty if the benchmark does not count it, such as a tie of people.
        error: why it has no scores; then it won nothing.
    """

    where: str
    id: str | int | float | None
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
    outcomes: tuple[Outcome, ...]
    error: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and its rules.

    Attributes:
        name: for `--benchmark`.
        title: for tables.
        needs: keys that every row has.
        judge: the outcomes of a row, from the row, its scores in the order of its conversations, and its location;
            raises a ConversationError for a value that it cannot use.
        sections: the weights of each section, from the comparisons of every group; the last section is the benchmark's
            overall accuracy.
        source: the hub data set; empty if there is none.
        files: pattern of the names of its files that count, see `find_rows`.
        format: name of its row format; None recognises the format of each row.
        id_keys: the keys of a row's id; the first that a row has counts.
        special_scores: groups whose score is no share of comparisons, computed from all rows.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    judge: Callable[[Row, Sequence[float], str], list[Outcome]]
    sections: Callable[[Mapping[str, int]], dict[str, Weights]]
    source: str = ""
    files: str = ""
    format: str | None = None
    id_keys: tuple[str, ...] = ("id",)
    special_scores: Callable[[Sequence[JudgedRow]], Mapping[str, float]] = lambda rows: {}


def read_text(row: Row, key: str, where: str) -> str:
    """A text of a row.

    Raises:
        ConversationError: it is none.
    """
    if not isinstance(row[key], str) or not row[key]:
        raise ConversationError(f"{where}: {key} is {describe_value(row[key])}; text was expected.")
    return row[key]


def pooled(comparisons: Mapping[str, int], prefix: str = "") -> Weights:
    """Every comparison of the groups with this prefix counts once."""
    return {group: count for group, count in comparisons.items() if group.startswith(prefix)}


def mean_of(sections: Iterable[Weights]) -> Weights:
    """Every section counts once; those without groups do not count."""
    mean: Weights = {}
    for section in filter(None, sections):
        total = sum(section.values())
        for group, weight in section.items():
            mean[group] = mean.get(group, 0) + weight / total
    return mean


def without_empty(sections: Mapping[str, Weights]) -> dict[str, Weights]:
    """The sections that have a group."""
    return {name: weights for name, weights in sections.items() if weights}
