"""The second moment of a linear's output gradients, B = sum_t g_t g_t^T, as a low-rank matrix and a diagonal.

B [N, N] of gate_proj of the 72B takes 3.5 GB, too much to keep for every block. It is sketched with a random matrix
Omega, Y = B Omega, and approximated by Y (Omega^T Y)^-1 Y^T (Nystroem; Halko, Martinsson & Tropp 2011, arXiv 0909.4061,
algorithm 5.5). Of the rest, only the diagonal is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.solver.hessian import accumulate

RANK = 128
OVERSAMPLING = 8  # further columns of the sketch
SMALLEST_EIGENVALUE = 1e-6  # of Omega^T Y, relative to the largest; smaller ones are rounding errors


class OutputMoment:
    """Accumulates B of one linear with `out_features` outputs."""

    def __init__(self, out_features: int, device: torch.device | str) -> None:
        self._test = _test_matrix(out_features).to(device)
        self._sketch = torch.zeros(out_features, self._test.shape[1], device=device)
        self._diagonal = torch.zeros(out_features, device=device)

    def add(self, gradients: Tensor) -> Tensor:
        """Add g [T, N] of T tokens and return |g|^2, fp32 [T]."""
        projected = (gradients @ self._test.to(gradients.dtype)).to(gradients.dtype)
        accumulate(self._sketch, gradients, projected)
        squares = gradients.float().square()
        self._diagonal += squares.sum(dim=0)
        return squares.sum(dim=1)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return V fp32 [N, R] with V V^T ~ B, and the diagonal of B, fp32 [N]."""
        inner = (self._test.T @ self._sketch).double()
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        kept = values > SMALLEST_EIGENVALUE * values[-1].clamp_min(torch.finfo(torch.float32).tiny)
        basis = vectors[:, kept] / values[kept].sqrt()
        return (self._sketch.double() @ basis).float(), self._diagonal


def _test_matrix(out_features: int) -> Tensor:
    """Omega, fp32 [N, rank]: the same for every linear of this width. Its entries are +-1, which bf16 holds exactly."""
    rank = RANK + OVERSAMPLING
    if out_features <= rank:
        return torch.eye(out_features)
    generator = torch.Generator().manual_seed(out_features)
    return torch.randint(0, 2, (out_features, rank), generator=generator).mul_(2).sub_(1).float()
