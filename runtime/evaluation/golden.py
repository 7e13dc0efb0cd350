"""Golden scores: the two scores published on WorldPM-72B's model card, and the check of a checkpoint against them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.conversations.conversation import ChatMessage
from runtime.evaluation.scored_pair import Scores

_MODEL_CARD = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
GOLDEN_CONVERSATIONS: list[list[ChatMessage]] = _MODEL_CARD["conversations"]
PUBLISHED_SCORES: dict[str, Scores | None] = {
    name: scores and tuple(scores) for name, scores in _MODEL_CARD["scores"].items()
}

# Largest accepted absolute difference. The published scores have more digits than bf16 holds, so they come from an
# fp32 run. A quantized model scores differently; its tolerances are several times the shift measured on the demo
# model, so they detect a broken model, not a small loss. The two published scores differ by 2.27.
UNQUANTIZED_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}
QUANTIZED_TOLERANCES = {8: 0.15, 4: 0.5}


class GoldenResult(BaseModel):
    """Published scores (good answer, bad answer) and the scores computed here.

    Every field except `model` is None if no scores are published for the model. `name` is the published model name.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    name: str | None = None
    published: Scores | None = None
    scores: Scores | None = None
    tolerance: float | None = None

    @property
    def difference(self) -> float | None:
        """The larger of the two absolute differences; None without published scores."""
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
        (good, bad), (published_good, published_bad) = self.scores, self.published
        return (
            f"golden scores of {self.name}: {'pass' if self.met else 'FAIL'}; computed {good:+.4f} and {bad:+.4f}, "
            f"published {published_good:+.4f} and {published_bad:+.4f}; largest difference {self.difference:.2g}, "
            f"tolerance {self.tolerance:g}"
        )


def match_name(original: str, *, allow_suffix: bool = False) -> str | None:
    """The published name of a WorldPM model, or None.

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


def default_tolerance(matmul: torch.dtype, quantization: QuantizationConfig | None) -> float:
    """The tolerance of a golden score, from the bits of a quantized model, else from the dtype of its matmuls."""
    return QUANTIZED_TOLERANCES[quantization.bits] if quantization else UNQUANTIZED_TOLERANCES[matmul]
