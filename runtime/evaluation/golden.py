"""Golden scores: those published on the cards of WorldPM-72B and Qwen2.5-Math-RM-72B, and the check against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.conversations.conversation import ChatMessage

_MODEL_CARD = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
GOLDEN_CONVERSATIONS: list[list[ChatMessage]] = _MODEL_CARD["conversations"]
_OTHERS: dict[str, dict[str, Any]] = _MODEL_CARD["others"]  # models with an example of their own
PUBLISHED_SCORES: dict[str, tuple[float, ...] | None] = {
    name: scores and tuple(scores)
    for name, scores in (_MODEL_CARD["scores"] | {name: each["scores"] for name, each in _OTHERS.items()}).items()
}

# Largest accepted absolute difference. WorldPM's published scores have more digits than bf16 holds, so they come from
# an fp32 run; the other score comes from a bf16 run. A quantized model scores differently; its tolerances are several
# times the shift measured on the demo model, so they detect a broken model, not a small loss. WorldPM's two published
# scores differ by 2.27.
UNQUANTIZED_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}
QUANTIZED_TOLERANCES = {8: 0.15, 4: 0.5}


class GoldenResult(BaseModel):
    """Published scores (of WorldPM: good answer, bad answer) and the scores computed here.

    Every field except `model` is None if no scores are published for the model. `name` is the published model name.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    name: str | None = None
    published: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    tolerance: float | None = None

    @property
    def difference(self) -> float | None:
        """The largest absolute difference; None without published scores."""
        if self.published is None or self.scores is None:
            return None
        return max(abs(here - there) for here, there in zip(self.scores, self.published, strict=True))

    @property
    def met(self) -> bool:
        """Whether the difference is within the tolerance; True without published scores."""
        return self.difference is None or self.tolerance is None or self.difference <= self.tolerance

    def message(self) -> str:
        """The result in one line."""
        if self.difference is None:
            known = ", ".join(name for name, scores in PUBLISHED_SCORES.items() if scores)
            return (
                f"golden scores: none are published for {self.model}, only for {known}; a checkpoint is recognized by "
                "its name"
            )
        assert self.scores and self.published
        computed, published = (" and ".join(f"{each:+.4f}" for each in both) for both in (self.scores, self.published))
        return (
            f"golden scores of {self.name}: {'pass' if self.met else 'FAIL'}; computed {computed}, "
            f"published {published}; largest difference {self.difference:.2g}, tolerance {self.tolerance:g}"
        )


def golden_conversations(name: str | None) -> list[list[ChatMessage]]:
    """The conversations of the published model `name`, one for each of its scores; none of None."""
    if name is None:
        return []
    return _OTHERS[name]["conversations"] if name in _OTHERS else GOLDEN_CONVERSATIONS


def match_name(original: str, *, allow_suffix: bool = False) -> str | None:
    """The published name of a WorldPM model or a sibling, or None.

    Args:
        original: a hub id or directory name; case, owner and revision are ignored.
        allow_suffix: also match names that continue after a hyphen, such as ``WorldPM-72B-GPTQ-Int4``.
    """
    found = Path(original.partition("@")[0]).name.casefold()
    for name in sorted(PUBLISHED_SCORES, key=len, reverse=True):  # longest first: WorldPM-72B is a prefix of the others
        base_name = Path(name).name.casefold()
        if found == base_name or (allow_suffix and found.startswith(f"{base_name}-")):
            return name
    return None


def default_tolerance(name: str, matmul: torch.dtype, quantization: QuantizationConfig | None) -> float:
    """The tolerance of a golden score, from the bits of a quantized model, else from the dtypes of both runs."""
    if quantization:
        return QUANTIZED_TOLERANCES[quantization.bits]
    return UNQUANTIZED_TOLERANCES[torch.bfloat16 if name in _OTHERS else matmul]
