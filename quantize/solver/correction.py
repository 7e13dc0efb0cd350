"""Correct the weights that a linear is quantized to for the error that its input already has.

GPTQ chooses Q so that Q x is close to W x, where x comes from the quantized layers before it. The better target is
W x~, where x~ is the input in the unquantized model. The ridge regression of W (x~ - x) on x gives

    W* = W + strength W E[(x~ - x) x^T] (H + damp I)^-1

and Q is then solved for W* under H. GPTAQ (Li et al. 2025, arXiv 2504.02692) and QEP (Arai & Ichikawa 2025,
arXiv 2504.09629) have this target. Strength and damping are QEP's: one half, and the mean of H's diagonal. With less
damping, W* fits the noise of the calibration tokens in directions in which the inputs hardly vary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.solver.factor import cholesky_in_place
from quantize.solver.hessian import accumulate
from runtime.common.errors import UnresumableJobError
from runtime.modeling.linear import Linear

STRENGTH = 0.5
DAMP = 1.0  # times the mean of H's diagonal
COLUMNS_AT_ONCE = 1024  # of a triangular solve; limits temporary memory


class TargetCorrection:
    """Accumulates the moment E[x (x~ - x)^T] of linears that share one input, over calibration tokens.

    For several linears the moment is [K, K]. For a single linear it is E[x (x~ - x)^T] W^T, [K, N], which is smaller
    for down_proj, the linear with the widest input.
    """

    def __init__(self, linears: Sequence[Linear], device: torch.device | str) -> None:
        """
        Args:
            linears: the unquantized linears.
        """
        self._linears = linears
        in_features = linears[0].shape[1]
        columns = linears[0].shape[0] if len(linears) == 1 else in_features
        self._sum = torch.zeros(in_features, columns, device=device)

    def add(self, x: Tensor, reference_x: Tensor, weights: Tensor) -> None:
        """Add tokens with their weights [T].

        Args:
            x, reference_x: [T, K], inputs in the quantized and in the unquantized model. Neither is modified.
        """
        difference = (reference_x.float() - x).to(x.dtype)
        if len(self._linears) == 1:
            difference = difference @ self._linears[0].weight(x.dtype).T
        accumulate(self._sum, x, (difference * weights[:, None]).to(x.dtype))

    def targets(self, hessian: Tensor, total_weight: float) -> list[Tensor]:
        """Return W*, fp32 [N, K], of every linear. The moment is consumed.

        Args:
            hessian: H, fp32 [K, K]; not modified.
            total_weight: sum of the token weights.

        Raises:
            UnresumableJobError: the damped Hessian cannot be factorised.
        """
        root = hessian.clone()
        root.diagonal().add_(DAMP * hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
        if not cholesky_in_place(root):
            raise UnresumableJobError(
                "the Hessian of the inputs cannot be factorised; start a new job with more --rows or with --dtype "
                "float32."
            )
        moment = self._sum.mul_(STRENGTH / total_weight)
        del self._sum
        if len(self._linears) == 1:
            return [_target(self._linears[0], root, moment)]
        return [_target(linear, root, moment @ linear.weight(torch.float32).T) for linear in self._linears]


def _target(linear: Linear, root: Tensor, moment: Tensor) -> Tensor:
    """W + ((R^T R)^-1 M)^T for the upper triangular R and the moment M [K, N], which is overwritten."""
    for part in moment.split(COLUMNS_AT_ONCE, dim=1):
        solved = torch.linalg.solve_triangular(root.T, part, upper=False)
        part.copy_(torch.linalg.solve_triangular(root, solved, upper=True))
    return moment.add_(linear.weight(torch.float32).T).T
