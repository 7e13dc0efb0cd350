"""The scores that WorldPM's model card publishes for its example, and how near to them a checkpoint comes here."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from runtime.conversation import Message
from runtime.quantization import Quantization
from runtime.scored_pair import Scores

_CARD = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
CONVERSATIONS: list[list[Message]] = _CARD["conversations"]
PUBLISHED: dict[str, Scores | None] = {name: scores and tuple(scores) for name, scores in _CARD["scores"].items()}

# The published scores have more digits than bf16 holds, so they are of an fp32 run. A quantized model has scores
# of its own. What is tolerated there, some times what its bits move a score by on the demo, tells a broken model
# from a whole one and no more; the two published scores lie 2.27 apart.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}
QUANTIZED_TOLERANCES = {8: 0.15, 4: 0.5}


class GoldenResult(BaseModel):
    """Published scores (good answer, bad answer) against those computed here.

    All but `model` is None where nothing is published for it; `name` is the published one that it goes by.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    name: str | None = None
    published: Scores | None = None
    scores: Scores | None = None
    tolerance: float | None = None

    @property
    def difference(self) -> float | None:
        """The larger of the two differences."""
        if self.published is None or self.scores is None:
            return None
        return max(abs(here - there) for here, there in zip(self.scores, self.published, strict=True))

    @property
    def met(self) -> bool:
        """Whether nothing speaks against the checkpoint."""
        return self.difference is None or self.tolerance is None or self.difference <= self.tolerance

    def sentence(self) -> str:
        """What came of it, in one line."""
        if self.difference is None:
            known = ", ".join(name for name, scores in PUBLISHED.items() if scores)
            return f"golden scores: none are published for {self.model}, only for {known}, which is known by its name"
        assert self.scores and self.published
        (good, bad), (published_good, published_bad) = self.scores, self.published
        return (
            f"golden scores of {self.name}: {'pass' if self.met else 'FAIL'}; {good:+.4f} and {bad:+.4f} here, "
            f"{published_good:+.4f} and {published_bad:+.4f} published, a difference of {self.difference:.2g} where "
            f"{self.tolerance:g} is tolerated"
        )


def find_golden(original: str, *, renamed: bool = False) -> str | None:
    """The name that a model goes by, if it is one of the WorldPM models and scores are published for it.

    `original` is a hub id or the name of a directory; with `renamed` it may go on after a hyphen, as in
    ``WorldPM-72B-GPTQ-Int4``.
    """
    found = Path(original).name.casefold()
    for name in sorted(PUBLISHED, key=len, reverse=True):  # WorldPM-72B begins all the others
        bare = Path(name).name.casefold()
        if found == bare or (renamed and found.startswith(f"{bare}-")):
            return name if PUBLISHED[name] else None
    return None


def usual_tolerance(matmul: torch.dtype, quantization: Quantization | None) -> float:
    """How far a golden score may be off, by the dtype of matrix products or the bits of a quantized model."""
    return QUANTIZED_TOLERANCES[quantization.bits] if quantization else TOLERANCES[matmul]
