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
from quantize.solver.settings import GPTQSettings
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
        outputs: weights the output error; None weights all outputs equally, which is GPTQ.
        name: the linear's name, for error messages.

    Raises:
        NonFiniteError: the weight contains a NaN or an infinity.
    """
    columns = factor.columns
    weight = weight.to(columns.device)
    if len(factor.dead):
        weight = weight.index_fill(1, factor.dead, 0)
    work = weight.T[columns].float()  # [K, N]
    output_power = factor.output_power(work)
    if not math.isfinite(output_power):
        raise NonFiniteError(f"{name}: a weight is NaN or infinite; the checkpoint is damaged, download it again.")
    grid = NF4Grid(weight, factor, settings) if settings.nf4 else UniformGrid(weight, factor, settings)
    lower = outputs.lower if outputs else work.new_zeros(len(weight), len(weight))
    solved, error, residual = solve_two_sided(work, factor.upper, lower, grid.whole())
    loss = weighted_square(residual, factor.pivots) - weighted_square(error, factor.damp)
    return SolvedLinear(
        codes=torch.empty_like(solved).index_copy_(0, columns, solved),
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
