"""RewardBench (arXiv 2403.13787; rules of the public repository allenai/reward-bench).

A chosen response must score higher than the rejected one; equal scores lose. A section is the mean of its subsets,
weighted with the numbers of rows below. `math-prm` counts as many as the code subsets together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.preference_benchmarks.benchmark import (
    Benchmark,
    Outcome,
    Row,
    Weights,
    mean_of,
    pooled,
    read_text,
    without_empty,
)

SUBSETS: dict[str, Weights] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}


def judge(row: Row, scores: Sequence[float], where: str) -> list[Outcome]:
    """One comparison in the row's subset."""
    return [Outcome(read_text(row, "subset", where), scores[0] > scores[1])]


def sections(comparisons: Mapping[str, int]) -> dict[str, Weights]:
    """The four sections, their mean (the leaderboard's score), and the accuracy of all rows (the published JSON's)."""
    found = {
        name: {subset: rows for subset, rows in subsets.items() if subset in comparisons}
        for name, subsets in SUBSETS.items()
    }
    return without_empty(found | {"mean of sections": mean_of(found.values()), "all rows": pooled(comparisons)})


REWARD_BENCH = Benchmark(
    name="rewardbench",
    title="RewardBench",
    needs=("prompt", "chosen", "rejected", "subset"),
    judge=judge,
    sections=sections,
    source="allenai/reward-bench",
    files="filtered-*.parquet",
    format="pair",
)
