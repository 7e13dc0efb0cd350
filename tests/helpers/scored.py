"""Scored pairs for parity tests: given or random scores."""

from __future__ import annotations

import numpy as np

from runtime.evaluation.report import Subject
from runtime.evaluation.scored_pair import ScoredPairWithTexts

SUBJECT = Subject(
    model="tiny",
    method="gptq",
    bits=4,
    bits_per_weight=4.25,
    group_size=64,
    reference_dtype="bfloat16 weights, float32 arithmetic",
    kit_version="0",
)


def pair(reference, quantized, *, id="a", category="maths", chosen="yes", rejected="no", **runs) -> ScoredPairWithTexts:
    return ScoredPairWithTexts(
        id=id,
        category=category,
        reference=reference,
        quantized=quantized,
        prompt=[{"role": "user", "content": "Is it?"}],
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        **runs,
    )


def random_scores(pairs: int, noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    reference = generator.normal(size=(pairs, 2))
    return reference, 0.9 * reference + 0.2 + noise * generator.normal(size=(pairs, 2))


def random_pairs(pairs: int, seed: int = 0, **runs: bool) -> list[ScoredPairWithTexts]:
    reference, quantized = random_scores(pairs, seed=seed)
    noise, unrepaired = random_scores(pairs, 0.05, seed)[1], random_scores(pairs, 0.6, seed)[1]
    return [
        pair(
            tuple(reference[i]),
            tuple(quantized[i]),
            id=f"{i:03}",
            category=("objective/maths", "objective/code", "chat")[i % 3],
            noise_floor=tuple(noise[i]) if runs.get("noise") else None,
            unrepaired=tuple(unrepaired[i]) if runs.get("unrepaired") else None,
        )
        for i in range(pairs)
    ]
