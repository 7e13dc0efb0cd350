"""The score head of a reward model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.modeling.elementwise import rms_norm
from runtime.modeling.linear import batch_invariant_linear


@dataclass(frozen=True)
class ScoreHead:
    """Final norm, then `Linear -> ReLU -> Linear`. Never quantized; computed in the residual dtype.

    Attributes:
        norm: [H]; score_0_weight: [H, H]; score_0_bias: [H]; score_2_weight: [1, H]; score_2_bias: [1].
    """

    norm: torch.Tensor
    score_0_weight: torch.Tensor
    score_0_bias: torch.Tensor
    score_2_weight: torch.Tensor
    score_2_bias: torch.Tensor
    eps: float

    def cast(self, dtype: torch.dtype) -> ScoreHead:
        """Return the head with its tensors in `dtype`, in which it is then computed without a cast for each call."""
        return ScoreHead(
            self.norm.to(dtype),
            self.score_0_weight.to(dtype),
            self.score_0_bias.to(dtype),
            self.score_2_weight.to(dtype),
            self.score_2_bias.to(dtype),
            self.eps,
        )

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of the head, given hidden states [S, H] of the last block at the scored tokens."""
        return rms_norm(hidden, self.norm, self.eps)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Return scores fp32 [S] for features [S, H]."""
        dtype = features.dtype
        inner = batch_invariant_linear(features, self.score_0_weight.to(dtype), self.score_0_bias.to(dtype)).relu()
        # Not a matrix product: with a single output column, the order of summation can differ between rows.
        score = (inner.float() * self.score_2_weight.to(dtype).float()).sum(-1) + self.score_2_bias.to(dtype).float()
        return score.to(dtype).float()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(self.features(hidden))
