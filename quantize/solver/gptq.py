"""GPTQ: round one column at a time and compensate its output error in the columns not yet rounded.

With H = U^T diag(pivots) U and the columns in reverse order of quantization, GPTQ (Frantar et al. 2022,
arXiv 2210.17323) is Babai's nearest plane algorithm (Chen et al. 2025, arXiv 2507.18553). The output error

    tr(D H D^T) = sum_j pivots[j] |target[j] - q[j]|^2
    target[j] = w[j] + sum_{k > j} U[j, k] (w[k] - q[k])

is a sum over columns, so from the last j to the first each q[j] is the grid point nearest to target[j]. This takes
one Cholesky factorisation of H and no inverse; the usual formulation needs the Cholesky factor of H^-1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantize.solver.factor import CholeskyFactor, weighted_square
from quantize.solver.group_grids import NF4Grid, UniformGrid
from quantize.solver.output_factor import OutputFactor
from quantize.solver.settings import INNER_BLOCK_SIZE, GPTQSettings
from quantize.solver.solved_linear import SolvedLinear
from quantize.solver.two_sided import solve_two_sided
from runtime.common.errors import NonFiniteError


def solve(
    weight: Tensor,
    factor: CholeskyFactor,
    settings: GPTQSettings,
    name: str = "a linear layer",
    outputs: OutputFactor | None = None,
) -> SolvedLinear:
    """Quantize weight [N, K] on the factor's device, minimising the output error under the factor's Hessian.

    Args:
        outputs: weights the output error, and makes the solve two-sided; None weights all outputs equally.
        name: the linear's name, for error messages.

    Raises:
        NonFiniteError: the weight contains a NaN or an infinity.
    """
    columns = factor.columns
    weight = weight.to(columns.device)
    if len(factor.dead):
        weight = weight.index_fill(1, factor.dead, 0)
    work = weight.T[columns].float()  # [K, N]: w, replaced by w - q in solved rows
    output_power = factor.output_power(work)
    if not math.isfinite(output_power):
        raise NonFiniteError(f"{name}: a weight is NaN or infinite; the checkpoint is damaged, download it again.")
    grid = NF4Grid(weight, factor, settings) if settings.nf4 else UniformGrid(weight, factor, settings)
    if outputs is None and isinstance(grid, UniformGrid):
        codes, loss = _solve_columns(work, factor, grid)
    else:
        lower = outputs.lower if outputs else work.new_zeros(len(weight), len(weight))
        solved, error, residual = solve_two_sided(work, factor.upper, lower, grid.whole())
        loss = weighted_square(residual, factor.pivots) - weighted_square(error, factor.damp)
        codes = torch.empty_like(solved).index_copy_(0, columns, solved)
    return SolvedLinear(
        codes=codes,
        zeros=grid.zeros,
        scales=grid.scales,
        g_idx=grid.g_idx,
        loss=max(loss.item(), 0.0),
        output_power=output_power,
        damp=float(factor.damp.mean()),
        dead_columns=len(factor.dead),
        notes=factor.notes,
        quant_state=grid.quant_state,
        levels=grid.levels,
    )


def _solve_columns(work: Tensor, factor: CholeskyFactor, grid: UniformGrid) -> tuple[Tensor, Tensor]:
    """Solve column by column: codes uint8 [K, N] by input feature, and the loss without damping.

    Args:
        work: weight fp32 [K, N] in the order of `factor.columns`; becomes w - q in place.
    """
    columns = factor.columns
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    loss = torch.zeros((), dtype=torch.float64, device=work.device)
    for stop in range(len(work), 0, -grid.block_size):
        start = max(stop - grid.block_size, 0)
        block, square = work[start:stop], factor.upper[start:stop, start:stop]
        target = torch.addmm(block, factor.upper[start:stop, stop:], work[stop:])
        if not grid.static:
            grid.choose_group_scales(start, stop, _updated_weights(block, target, square))
        zero, scale = grid.rows(start, stop)
        solved = _solve_block(square, target, block, zero, scale, grid.max_code)
        codes[columns[start:stop]] = solved.to(torch.uint8)
        target.addcmul_(zero, scale).addcmul_(solved, scale, value=-1)  # target - q
        loss += weighted_square(target, factor.pivots[start:stop]) - weighted_square(block, factor.damp[start:stop])
    return codes, loss


def _updated_weights(block: Tensor, target: Tensor, square: Tensor) -> Tensor:
    """The weights [B, N] of a block that minimise the output error given the columns already solved (the OBS update).

    They are w + U_bb^-1 U_b,solved (w - q)_solved.
    """
    shift = torch.linalg.solve_triangular(square, target - block, upper=True, unitriangular=True)
    return block + shift


def _solve_block(square: Tensor, target: Tensor, work: Tensor, zero: Tensor, scale: Tensor, max_code: int) -> Tensor:
    """Compute the codes fp32 [B, N] of one block, from the last row to the first.

    Args:
        square: the block's part [B, B] of the factor's `upper`.
        target: [B, N], w plus the compensation for all columns solved before this block; completed in place.
        work: [B, N], w; becomes w - q in place.
        zero, scale: [B, N].
        max_code: the largest code.
    """
    codes = torch.empty_like(target)
    work.addcmul_(zero, scale)  # so that w - q = work - code * scale
    tensors = (codes, target, work, zero, scale, square)
    rows = list(zip(*(tensor.unbind() for tensor in tensors), strict=True))
    for stop in range(len(target), 0, -INNER_BLOCK_SIZE):
        start = max(stop - INNER_BLOCK_SIZE, 0)
        target[start:stop].addmm_(square[start:stop, stop:], work[stop:])
        for row in range(stop - 1, start - 1, -1):
            code, target_row, error, zero_row, scale_row, factors = rows[row]
            if row + 1 < stop:
                target_row.addmv_(work[row + 1 : stop].T, factors[row + 1 : stop])
            torch.addcdiv(zero_row, target_row, scale_row, out=code).round_().clamp_(0, max_code)
            error.addcmul_(code, scale_row, value=-1)
    return codes
