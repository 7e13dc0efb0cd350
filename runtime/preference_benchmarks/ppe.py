"""PPE, Preference Proxy Evaluations (arXiv 2410.14872): human preference, and correctness on five data sets.

Human preference: the response that a person preferred must score higher; ties of people do not count. Correctness: of K
responses to a question, sampled pairs of a right and a wrong one; the right one must score higher. Equal scores lose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.common.errors import ConversationError
from runtime.conversations.rows.readers import arena_verdict
from runtime.preference_benchmarks.benchmark import Benchmark, Outcome, Row, Weights, pooled

HUMAN, CORRECTNESS = "human preference", "correctness"
DATA_SETS = {"mmlu-pro": "MMLU-Pro", "math": "MATH", "gpqa": "GPQA", "ifeval": "IFEval", "mbpp-plus": "MBPP-Plus"}


def judge_preference(row: Row, scores: Sequence[float], where: str) -> list[Outcome]:
    """One comparison, none if people found both responses equally good."""
    return [] if arena_verdict(row["winner"]) == 0 else [Outcome(HUMAN, scores[0] > scores[1])]


def judge_correctness(row: Row, scores: Sequence[float], where: str) -> list[Outcome]:
    """The sampled pairs."""
    truth, pairs = row["scores"], row["sampled_conflict_pairs"]
    for first, second in pairs:
        if truth[first] == truth[second]:
            raise ConversationError(
                f"{where}: sampled_conflict_pairs has ({first}, {second}), whose scores are equal; a right and a wrong "
                "response were expected."
            )
    won = sum(scores[a] > scores[b] if truth[a] > truth[b] else scores[b] > scores[a] for a, b in pairs)
    return [Outcome(CORRECTNESS, won, len(pairs))] if len(pairs) else []


def sections(comparisons: Mapping[str, int]) -> dict[str, Weights]:
    """The only section."""
    return {group: pooled(comparisons, group) for group in comparisons}


HUMAN_PREFERENCE = Benchmark(
    name="ppe-human",
    title="PPE human preference",
    needs=("prompt", "response_1", "response_2", "winner"),
    judge=judge_preference,
    sections=sections,
    source="lmarena-ai/PPE-Human-Preference-V1",
    format="ppe",
    id_keys=("question_id",),
)
CORRECTNESS_BENCHMARKS = tuple(
    Benchmark(
        name=f"ppe-{name}",
        title=f"PPE {title}",
        needs=("prompt", "response_1", "response_2", "scores", "sampled_conflict_pairs"),
        judge=judge_correctness,
        sections=sections,
        source=f"lmarena-ai/PPE-{title}-Best-of-K",
        format="ppe-best-of-k",
        id_keys=("question_id",),
    )
    for name, title in DATA_SETS.items()
)
