"""JudgeBench (arXiv 2410.12784; rules of the public repository ScalerLab/JudgeBench).

A reward model decides for the first response if it scores higher, else for the second. So equal scores are right where
the second response is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import describe_value
from runtime.preference_benchmarks.benchmark import Benchmark, Outcome, Row, Weights, pooled, read_text, without_empty

SECTIONS = {
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}


def judge(row: Row, scores: Sequence[float], where: str) -> list[Outcome]:
    """One comparison in the row's source. The scores are those of the right and the wrong response."""
    label, source = row["label"], read_text(row, "source", where)
    if label not in ("A>B", "B>A"):
        raise ConversationError(f"{where}: label is {describe_value(label)}; A>B or B>A was expected.")
    right, wrong = scores
    return [Outcome(source, right > wrong if label == "A>B" else right >= wrong)]


def sections(comparisons: Mapping[str, int]) -> dict[str, Weights]:
    """The four categories, and all rows."""
    found = {name: pooled(comparisons, prefix) for name, prefix in SECTIONS.items()}
    return without_empty(found | {"overall": pooled(comparisons)})


JUDGE_BENCH = Benchmark(
    name="judgebench",
    title="JudgeBench",
    needs=("question", "response_A", "response_B", "source", "label"),
    judge=judge,
    sections=sections,
    source="ScalerLab/JudgeBench",
    files="*gpt*",
    format="judgebench",
    id_keys=("pair_id",),
)
