"""GPTQ with error feedback on both sides: over the columns of a weight and over its rows.

With H = U^T diag(p) U (U unit upper) and B = L^T diag(d) L (L unit lower), the error E = w - q of a weight, here
[K, N], costs

    tr(B E^T H E) = sum_ji p_j d_i (U E L^T)_ji^2

The element (j, i) of U E L^T depends on E at (k, l) for k >= j and l <= i alone. So, from the last column j and the
first row i on, each code is the grid point nearest to

    target_ji = w_ji + sum_{k > j} U_jk E_ki + sum_{l < i} L_il R_jl,     R = U E

which is Babai's nearest plane algorithm, as GPTQ is with L = I (see gptq.py). YAQA (Tseng et al. 2025, arXiv
2505.22988) rounds in this way too.

Elements with the same j - i do not depend on each other and are solved together. The weight is cut into square tiles.
The tiles on one diagonal are solved at once, diagonal by diagonal within them, in about 2 (K + N) steps in total;
contributions from other tiles are matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.solver.rounding import Grid

TILE = 32


def solve_two_sided(weight: Tensor, upper: Tensor, lower: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize weight fp32 [K, N] on `grid`.

    Args:
        upper: [K, K], U above the diagonal; other entries are ignored.
        lower: [N, N], L below the diagonal, 0 elsewhere.

    Returns:
        codes uint8 [K, N], E and R, fp32 [K, N].
    """
    columns, rows = weight.shape
    pad_k, pad_n = -columns % TILE, -rows % TILE
    if pad_k or pad_n:  # weights and factors of the padding are 0, so it changes nothing
        weight = F.pad(weight, (0, pad_n, 0, pad_k))
        upper, lower = F.pad(upper, (0, pad_k, 0, pad_k)), F.pad(lower, (0, pad_n, 0, pad_n))
        grid = grid.padded(pad_k, pad_n)
    solver = _Wavefront(weight, upper, lower, grid)
    for first, stop, offset in solver.tile_diagonals():
        solver.solve_tiles(first, stop, offset)
    return tuple(each[:columns, :rows] for each in (solver.codes, solver.error, solver.residual))  # type: ignore[return-value]


class _Wavefront:
    """The state of one solve; K and N are multiples of TILE."""

    def __init__(self, weight: Tensor, upper: Tensor, lower: Tensor, grid: Grid) -> None:
        self.weight, self.grid = weight, grid
        self.upper = upper.unflatten(0, (-1, TILE))  # [J, TILE, K]
        self.lower = lower.unflatten(0, (-1, TILE))  # [I, TILE, N]
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.error, self.residual = torch.zeros_like(weight), torch.zeros_like(weight)
        self._upper_squares = _tiles(upper, 0, len(self.upper), 0).triu(1)
        self._lower_squares = _tiles(lower, 0, len(self.lower), 0).transpose(1, 2).contiguous()

    def tile_diagonals(self) -> Iterator[tuple[int, int, int]]:
        """Diagonals (first, stop, offset) of tiles (i + offset, i), first <= i < stop, in the order of solving."""
        tiles_k, tiles_n = len(self.upper), len(self.lower)
        for offset in range(tiles_k - 1, -tiles_n, -1):
            yield max(0, -offset), min(tiles_n, tiles_k - offset), offset

    def solve_tiles(self, first: int, stop: int, offset: int) -> None:
        """Solve one diagonal of tiles."""
        tiles_k = slice(first + offset, stop + offset)
        solved = (first + offset + 1) * TILE  # no earlier column is solved in the rows of these tiles
        error = self.error[solved:].unflatten(1, (-1, TILE))[:, first:stop].transpose(0, 1)
        weight = _tiles(self.weight, first, stop, offset).contiguous()
        planned = torch.bmm(self.upper[tiles_k, :, solved:], error).add_(weight)
        residual = self.residual[:, : stop * TILE].unflatten(0, (-1, TILE))[tiles_k]
        feedback = torch.bmm(residual, self.lower[first:stop, :, : stop * TILE].transpose(1, 2))
        scale, zero = self.grid.tiles(first, stop, offset, TILE)
        upper, lower = self._upper_squares[tiles_k], self._lower_squares[first:stop]
        codes = self._solve_inside(weight, planned, feedback, upper, lower, scale, zero)
        value = self.grid.value(codes, scale, zero)
        _tiles(self.codes, first, stop, offset).copy_(codes)
        _tiles(self.error, first, stop, offset).copy_(weight.sub_(value))
        _tiles(self.residual, first, stop, offset).copy_(planned.sub_(value))

    def _solve_inside(
        self, weight: Tensor, planned: Tensor, feedback: Tensor, upper: Tensor, lower: Tensor, scale: Tensor,
        zero: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute the codes of independent tiles; all tensors are fp32 [n, TILE, TILE].

        Args:
            planned: w plus the contributions of other columns; completed in place.
            feedback: the contributions of other rows; completed in place.
            upper, lower: the tiles of U, and the transposed tiles of L, on their diagonals.
        """
        codes = torch.empty_like(weight)
        for diagonal in range(TILE - 1, -TILE, -1):  # j - i
            count, j, i = TILE - abs(diagonal), max(0, diagonal), max(0, -diagonal)
            w, p, f, s, z, code = (
                each.diagonal(-diagonal, 1, 2) for each in (weight, planned, feedback, scale, zero, codes)
            )
            value = self.grid.round(p + f, s, z, code)
            planned[:, : j + count, i : i + count].addcmul_(upper[:, : j + count, j : j + count], (w - value)[:, None])
            feedback[:, j : j + count, i:].addcmul_((p - value)[:, :, None], lower[:, i : i + count, i:])
        return codes


def _tiles(matrix: Tensor, first: int, stop: int, offset: int) -> Tensor:
    """View of the tiles (i + offset, i), first <= i < stop, of a matrix [K, N]: [stop - first, TILE, TILE]."""
    tiled = matrix.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))[first + offset : stop + offset, :, first:stop]
    return tiled.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
