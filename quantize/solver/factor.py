"""The Cholesky factor of a damped Hessian, shared by all linears with the same input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.solver.settings import GPTQSettings
from runtime.common.errors import UnresumableJobError

MIN_RETRY_DAMP_PERCENT = 1e-4  # the first retry after a damp_percent of 0
MAX_RETRY_DAMP_PERCENT = 10.0  # ten times the diagonal; a Hessian that still fails is not usable


@dataclass(frozen=True)
class CholeskyFactor:
    """P (H + diag(damp)) P^T = U^T diag(pivots) U; P puts the columns in reverse order of quantization.

    The damping of a column is a fraction of its own diagonal entry (Marquardt 1963). GPTQ takes a fraction of the mean
    diagonal. Where tokens with massive activations (Sun et al. 2024, arXiv 2402.17762) dominate the mean, that is a
    hundred times the entry of an ordinary column, whose statistics then no longer count.

    Attributes:
        columns: int64 [K], the input feature at each position; quantization runs from the last position to the first.
        upper: fp32 [K, K]; U above the diagonal. U's diagonal is 1; it and what is below it are not stored.
        pivots: fp32 [K], the variance at each position that the positions before it do not explain.
        damp: fp32 [K], values added to the diagonal of H, in the order of `columns`.
        dead: int64 [D], input features that are 0 on all calibration tokens.
        notes: fallbacks, for the report.
    """

    columns: Tensor
    upper: Tensor
    pivots: Tensor
    damp: Tensor
    dead: Tensor
    notes: tuple[str, ...] = ()

    @property
    def importance(self) -> Tensor:
        """fp32 [K], `pivots` by input feature: the output error per squared rounding error of its weights.

        The diagonal of H would overestimate it for inputs whose error later columns can compensate.
        """
        return torch.empty_like(self.pivots).index_copy_(0, self.columns, self.pivots)

    def output_power(self, columns: Tensor, block_size: int = 512) -> float:
        """tr(C^T H C) without damping, for C fp32 [K, N] in the order of `columns`: the mean squared output."""
        total = torch.zeros((), dtype=torch.float64, device=columns.device)
        for start in range(0, len(columns), block_size):
            stop = min(start + block_size, len(columns))
            here = columns[start:stop]
            square = self.upper[start:stop, start:stop].triu(1)
            outputs = torch.addmm(here, square, here).addmm_(self.upper[start:stop, stop:], columns[stop:])
            total += weighted_square(outputs, self.pivots[start:stop])
            total -= weighted_square(here, self.damp[start:stop])
        return max(total.item(), 0.0)


def weighted_square(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of squares of values [R, N], row r weighted by weights[r], as a float64 scalar."""
    rows = values.square().sum(dim=1, dtype=torch.float64)
    return rows.sum() if weights is None else rows @ weights.double()


def factorise(hessian: Tensor, settings: GPTQSettings, name: str = "this linear") -> CholeskyFactor:
    """Order, damp and factorise H, fp32 [K, K]. H is not modified; the factor takes a second K x K buffer.

    If rounding made H indefinite, the damping is multiplied by ten until the factorisation succeeds, and a note
    records it.

    Args:
        name: the linears' name, for notes and error messages.

    Raises:
        UnresumableJobError: the factorisation failed at every damping.
    """
    diagonal = hessian.diagonal().clone()
    dead = (diagonal == 0).nonzero().flatten()
    quantization_order = _order(diagonal) if settings.activation_order else torch.arange(len(diagonal))
    columns = quantization_order.to(hessian.device).flip(0)
    notes: list[str] = []
    damp_percent = settings.damp_percent
    upper = torch.empty_like(hessian)
    while True:
        _gather(hessian, columns, upper)
        damp = (damp_percent * diagonal).index_fill_(0, dead, 1.0)[columns]
        upper.diagonal().add_(damp)
        if cholesky_in_place(upper):
            break
        damp_percent = max(10 * damp_percent, MIN_RETRY_DAMP_PERCENT)
        if damp_percent > MAX_RETRY_DAMP_PERCENT:
            raise UnresumableJobError(
                f"{name}: the Hessian of the inputs cannot be factorised at any damping up to "
                f"{MAX_RETRY_DAMP_PERCENT:g}; start a new job with more --rows or with --dtype float32."
            )
        notes = [f"{name}: damp_percent raised from {settings.damp_percent:g} to {damp_percent:g}"]
    roots = upper.diagonal().clone()
    upper /= roots[:, None]
    return CholeskyFactor(columns, upper, roots.square(), damp, dead, tuple(notes))


def _order(diagonal: Tensor) -> Tensor:
    """Order of quantization, most active column first: its error is compensated while most columns are still free."""
    return diagonal.argsort(descending=True, stable=True)


def _gather(hessian: Tensor, columns: Tensor, into: Tensor) -> None:
    """Write hessian[columns][:, columns] to `into`, in blocks of rows that limit memory and fit in the CPU cache."""
    block_size = 512 if hessian.is_cuda else 32
    for start in range(0, len(columns), block_size):
        into[start : start + block_size] = hessian[columns[start : start + block_size]][:, columns]


def cholesky_in_place(matrix: Tensor) -> bool:
    """Replace the upper triangle of a symmetric matrix [K, K] by R with R^T R = matrix; return whether it succeeded.

    Left-looking and blocked, so that nearly all of the K^3 / 3 multiplications are matrix products. It needs no second
    buffer and is faster than LAPACK on a CPU. Entries below the diagonal are not part of the result.
    """
    block_size = 1024 if matrix.is_cuda else 256
    for start in range(0, len(matrix), block_size):
        stop = min(start + block_size, len(matrix))
        above, panel = matrix[:start, start:], matrix[start:stop, start:]
        panel.addmm_(above[:, : stop - start].T, above, alpha=-1)
        root, failed = torch.linalg.cholesky_ex(panel[:, : stop - start], upper=True)
        if failed.item():
            return False
        panel[:, : stop - start] = root
        panel[:, stop - start :] = torch.linalg.solve_triangular(root.T, panel[:, stop - start :], upper=False)
    return True
