"""The Cholesky factor of a Hessian, shared by all the linears that see the same input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.hessian import mirror
from quantize.settings import GPTQSettings
from runtime.errors import LostJobError

SMALLEST_RETRY = 1e-4  # where a first damp_percent of 0 goes on
LARGEST_RETRY = 10.0  # ten times the mean eigenvalue: what still fails then is not a Hessian


@dataclass(frozen=True)
class Factor:
    """P (H + damp I) P^T = U^T diag(pivots) U, with the columns to be quantized first placed last.

    Attributes:
        columns: int64 [K], the input feature at each position; quantization runs from the last to the first.
        upper: fp32 [K, K]; above the diagonal U, whose diagonal counts as 1; below it H in the order of `columns`.
        diagonal: fp32 [K], H's damped one in that order.
        pivots: fp32 [K], the variance of each position that the positions before it do not explain.
        damp: what was added to it.
        dead: int64 [D], input features that calibration never saw differ from 0.
        notes: fallbacks taken, for the report.
    """

    columns: Tensor
    upper: Tensor
    diagonal: Tensor
    pivots: Tensor
    damp: float
    dead: Tensor
    notes: tuple[str, ...] = ()

    @property
    def importance(self) -> Tensor:
        """fp32 [K], `pivots` by input feature: what a squared rounding error in its weights costs.

        The plain diagonal of H overrates inputs whose error the others can absorb.
        """
        return torch.empty_like(self.pivots).index_copy_(0, self.columns, self.pivots)

    def solve_in_place(self, right: Tensor) -> None:
        """Replace right fp32 [K, N], its rows by input feature, by (H + damp I)^-1 right."""
        for part in right.split(1024, dim=1):  # bounds the temporaries
            solved = torch.linalg.solve_triangular(self.upper.T, part[self.columns], upper=False, unitriangular=True)
            solved /= self.pivots[:, None]
            part[self.columns] = torch.linalg.solve_triangular(self.upper, solved, upper=True, unitriangular=True)

    def into_hessian(self) -> Tensor:
        """H + damp I, fp32 [K, K] in the order of `columns`. It takes the place of `upper`, so solving is over."""
        self.upper.diagonal().copy_(self.diagonal)
        mirror(self.upper.T)
        return self.upper

    def energy(self, columns: Tensor, block_size: int = 512) -> float:
        """tr(C^T H C), undamped, of C [K, N] fp32 in `self.columns` order: its mean squared output norm."""
        total = torch.zeros((), dtype=torch.float64, device=columns.device)
        for start in range(0, len(columns), block_size):
            stop = min(start + block_size, len(columns))
            here = columns[start:stop]
            square = self.upper[start:stop, start:stop].triu(1)
            outputs = torch.addmm(here, square, here).addmm_(self.upper[start:stop, stop:], columns[stop:])
            total += weighted_square(outputs, self.pivots[start:stop])
            total -= self.damp * weighted_square(here)
        return max(total.item(), 0.0)


def weighted_square(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """float64 scalar: the sum of squares of values [R, N], each row times weights [R]."""
    rows = values.square().sum(dim=1, dtype=torch.float64)
    return rows.sum() if weights is None else rows @ weights.double()


def factorise(hessian: Tensor, settings: GPTQSettings, name: str = "this linear") -> Factor:
    """Order, damp and factorise H [K, K], which is left as it was; one more K x K buffer is taken.

    Where rounding makes H indefinite the damping is multiplied by ten until the factorisation succeeds,
    and a note says so.

    Raises:
        LostJobError: it failed at every damping; `name` names the linear.
    """
    diagonal = hessian.diagonal().clone()
    dead = (diagonal == 0).nonzero().flatten()
    mean = diagonal.mean().item() or 1.0
    first_to_last = _order(diagonal) if settings.activation_order else torch.arange(len(diagonal))
    columns = first_to_last.to(hessian.device).flip(0)
    notes: list[str] = []
    damp_percent = settings.damp_percent
    upper = torch.empty_like(hessian)
    while True:
        _gather(hessian, columns, upper)
        damped = diagonal + damp_percent * mean
        damped[dead] = 1.0
        damped = damped[columns]
        upper.diagonal().copy_(damped)
        if _cholesky_in_place(upper):
            break
        damp_percent = max(10 * damp_percent, SMALLEST_RETRY)
        if damp_percent > LARGEST_RETRY:
            raise LostJobError(
                f"{name}: the Hessian of its inputs could not be factorised at any damping; "
                "start afresh with more --rows, or with --dtype float32."
            )
        notes = [f"{name}: damp_percent raised from {settings.damp_percent:g} to {damp_percent:g}"]
    roots = upper.diagonal().clone()
    _divide_above_diagonal(upper, roots)
    return Factor(columns, upper, damped, roots.square(), damp_percent * mean, dead, tuple(notes))


def _order(diagonal: Tensor) -> Tensor:
    """Most active column first: its error is spread while the most columns are still free to absorb it."""
    return diagonal.argsort(descending=True, stable=True)


def _gather(hessian: Tensor, columns: Tensor, into: Tensor) -> None:
    """Few rows at a time on a CPU: two copies of them stand beside both matrices, and they should stay in cache."""
    block_size = 512 if hessian.is_cuda else 32
    for start in range(0, len(columns), block_size):
        into[start : start + block_size] = hessian[columns[start : start + block_size]][:, columns]


def _divide_above_diagonal(matrix: Tensor, divisors: Tensor, block_size: int = 512) -> None:
    """Divide each row of a matrix [K, K] by its divisor [K], from the diagonal on."""
    for start in range(0, len(matrix), block_size):
        stop = start + block_size
        by, square = divisors[start:stop, None], matrix[start:stop, start:stop]
        square.copy_((square.triu() / by).add_(square.tril(-1)))
        matrix[start:stop, stop:] /= by


def _cholesky_in_place(matrix: Tensor) -> bool:
    """Replace the upper triangle of a symmetric matrix [K, K] by R with R^T R = matrix; whether it succeeded.

    Left-looking and blocked, so that nearly all of the K^3 / 3 multiplications are matrix products. It takes
    no second buffer, leaves what is below the diagonal as it is, and is faster than LAPACK's on a CPU.
    """
    block_size = 1024 if matrix.is_cuda else 256
    for start in range(0, len(matrix), block_size):
        stop = min(start + block_size, len(matrix))
        above, panel = matrix[:start, start:], matrix[start:stop, start:]
        below = panel[:, : stop - start].tril(-1)
        panel.addmm_(above[:, : stop - start].T, above, alpha=-1)
        root, failed = torch.linalg.cholesky_ex(panel[:, : stop - start], upper=True)
        if failed.item():
            return False
        panel[:, : stop - start] = below.add_(root)
        panel[:, stop - start :] = torch.linalg.solve_triangular(root.T, panel[:, stop - start :], upper=False)
    return True
