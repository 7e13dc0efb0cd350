"""The Cholesky factor of the second moment of a linear's output gradients.

A weight change D moves a score by about sum_t g_t . D x_t, where g_t is the gradient of the score by the linear's
output at token t. If x_t and g_t are independent, the mean square of that is tr(B D H D^T) up to a factor, with
B = E[g g^T] and H = E[x x^T]. GPTQ takes B = I. YAQA (Tseng et al. 2025, arXiv 2505.22988) rounds for a B from the
gradients of a language model's loss; here it is the score that is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.solver.factor import cholesky_in_place

IDENTITY_SHARE = 0.5  # share of B's trace that is spread over all outputs


@dataclass(frozen=True)
class OutputFactor:
    """B = L^T diag(pivots) L with L unit lower triangular, so outputs can be quantized from the first to the last.

    Attributes:
        lower: fp32 [N, N], L below the diagonal and 0 elsewhere.
    """

    lower: Tensor

    @classmethod
    def from_low_rank(cls, vectors: Tensor, diagonal: Tensor, share: float = IDENTITY_SHARE) -> OutputFactor:
        """Factorise (1 - share) B / mean(diag(B)) + share I for B = V V^T + a diagonal matrix.

        Args:
            vectors: V, [N, R].
            diagonal: diag(B), fp32 [N].
        """
        mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
        vectors = vectors.float().flip(0) / mean.sqrt()
        diagonal = diagonal.flip(0) / mean
        matrix = (1 - share) * (vectors @ vectors.T)
        matrix.diagonal().copy_((1 - share) * diagonal.maximum(vectors.square().sum(1)) + share)
        if not cholesky_in_place(matrix):
            raise AssertionError("a positive definite matrix could not be factorised")
        matrix /= matrix.diagonal().clone()[:, None]
        return cls(matrix.triu_(1).flip(0, 1))
