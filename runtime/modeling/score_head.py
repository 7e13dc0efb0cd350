"""The score head of a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from runtime.modeling.elementwise import rms_norm
from runtime.modeling.linear import batch_invariant_linear


@dataclass(frozen=True)
class ScoreHead:
    """Final norm, then `Linear -> ReLU -> Linear`, or one linear. Never quantized; computed in the residual dtype.

    Attributes:
        norm: [H].
        tensors: by their names in the checkpoint: `score.0.weight` [H, H], `score.0.bias` [H], `score.2.weight` [1, H]
            and `score.2.bias` [1]; or `score.weight` [1, H].
    """

    norm: torch.Tensor
    tensors: Mapping[str, torch.Tensor]
    eps: float

    @property
    def last_weight(self) -> str:
        """The name of the weight [1, H] that gives the score."""
        return "score.2.weight" if "score.2.weight" in self.tensors else "score.weight"

    @property
    def last_bias(self) -> str | None:
        """The name of the bias [1] of the score, or None if the head has none."""
        return "score.2.bias" if "score.2.bias" in self.tensors else None

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> ScoreHead:
        """Return the head with some of its tensors replaced."""
        return replace(self, tensors={**self.tensors, **tensors})

    def cast(self, dtype: torch.dtype) -> ScoreHead:
        """Return the head with its tensors in `dtype`, in which it is then computed without a cast for each call."""
        return ScoreHead(self.norm.to(dtype), {name: each.to(dtype) for name, each in self.tensors.items()}, self.eps)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of the head, given hidden states [S, H] of the last block at the scored tokens."""
        return rms_norm(hidden, self.norm, self.eps)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Return scores fp32 [S] for features [S, H]."""
        dtype = features.dtype
        if "score.0.weight" in self.tensors:
            inner_weight, inner_bias = (self.tensors[f"score.0.{name}"].to(dtype) for name in ("weight", "bias"))
            features = batch_invariant_linear(features, inner_weight, inner_bias).relu()
        # Not a matrix product: with a single output column, the order of summation can differ between rows.
        score = (features.float() * self.tensors[self.last_weight].to(dtype).float()).sum(-1)
        if self.last_bias is not None:
            score = score + self.tensors[self.last_bias].to(dtype).float()
        return score.to(dtype).float()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(self.features(hidden))
