"""The pairs that quantization changed most: the report's "Worst pairs" section."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.evaluation.scored_pair import ScoredPair, ScoredPairWithTexts

WORST_PAIR_COUNT = 10


def worst_pairs(pairs: Sequence[ScoredPairWithTexts], count: int = WORST_PAIR_COUNT) -> list[ScoredPairWithTexts]:
    """The `count` pairs whose margin changed most, disagreements first; pairs with an unchanged margin are left out."""
    changed = [pair for pair in pairs if _margin_change(pair) > 0]
    return sorted(changed, key=lambda pair: (pair.agrees, -_margin_change(pair)))[:count]


def _margin_change(pair: ScoredPair) -> float:
    return abs(pair.quantized_margin - pair.reference_margin)
