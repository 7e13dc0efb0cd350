"""Correct a linear's target weight for the error that its quantized input already has.

GPTQ chooses Q so that Q x is close to W x, where x comes from the quantized layers before it. The better target is
W x~, where x~ is the input in the unquantized model. The least-squares estimate of W x~ from x is

    W* x,   W* = W + W E[(x~ - x) x^T] (H + diag(damp))^-1

and Q is then solved for W* under the same H. This is the target of GPTAQ (Li et al. 2025, arXiv 2504.02692). GPTAQ
applies it inside its solver; here it is applied before the solve, so that scales are searched for W*.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.solver.factor import CholeskyFactor
from quantize.solver.hessian import accumulate
from runtime.modeling.linear import Linear


class TargetCorrection:
    """Accumulates the moment E[x (x~ - x)^T] of linears that share one input, over calibration tokens.

    For several linears the moment is [K, K]. For a single linear it is E[x (x~ - x)^T] W^T, [K, N], which is smaller
    for down_proj, the linear with the widest input.
    """

    def __init__(self, linears: Sequence[Linear], in_features: int, device: torch.device | str) -> None:
        """
        Args:
            linears: the unquantized linears.
        """
        self._single = linears[0] if len(linears) == 1 else None
        columns = in_features if self._single is None else self._single.shape[0]
        self._sum: Tensor | None = torch.zeros(in_features, columns, device=device)

    def add(self, x: Tensor, reference_x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x, reference_x: [T, K], inputs in the quantized and in the unquantized model. Neither is modified.
            weights: [T], or None if all tokens have weight 1.
        """
        assert self._sum is not None, "the moment was already used by target()"
        difference = (reference_x.float() - x).to(x.dtype)
        if self._single is not None:
            difference = difference @ self._single.weight(x.dtype).T
        if weights is not None:
            difference = (difference * weights[:, None]).to(x.dtype)
        accumulate(self._sum, x, difference)

    def target(self, linear: Linear, factor: CholeskyFactor, total_weight: float) -> Tensor:
        """Compute W*, fp32 [N, K], of one of the linears. For a single linear this can be called only once.

        Args:
            total_weight: sum of the token weights.
        """
        assert self._sum is not None, "the moment was already used by target()"
        weight = linear.weight(torch.float32)
        if self._single is None:
            moment = self._sum @ weight.T
        else:
            moment, self._sum = self._sum, None  # reuse its buffer for the target
        factor.solve_in_place(moment)
        return moment.div_(total_weight).add_(weight.T).T
