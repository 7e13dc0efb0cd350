"""Ask a linear for what the reference gives, not for what its weight makes of inputs that are already off.

GPTQ rounds W so that Q x is near W x, x being what the packed layers before it bring. But the reference stream
knows what they should have brought. What is asked for is W x~ + r, where x~ is the reference's input and r is what
the residual stream lacks already, for a linear that writes to it. As far as x can tell, that is

    W* x,   W* = W + E[e x^T] (H + damp I)^-1,   e = W (x~ - x) + r

and Q is then solved for W* under the same H. (GPTAQ, Li et al. 2025, arXiv 2504.02692, asks for W x~ and folds its
correction into the solver; r is ours.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.factor import Factor
from quantize.hessian import accumulate
from runtime.linear import Linear


class Correction:
    """E[e x^T] of linears with one input, accumulated over calibration tokens.

    Linears that write to the residual stream have one sum [K, N] of their own. The others, several and wide, share
    one [K, K] of the inputs alone, which their weights are multiplied with in the end.
    """

    def __init__(self, linears: Sequence[Linear], in_features: int, device: torch.device | str) -> None:
        """`linears` have their original weights."""
        self._linears = linears
        self._in_features = in_features
        self._device = device
        self._sum: Tensor | None = None  # [K, N] or [K, K]
        self._to_residual = False

    def add(self, x: Tensor, wanted: Tensor, lacking: Tensor | None, weights: Tensor | None) -> None:
        """Add tokens.

        Args:
            x, wanted: [T, K], the input that there is and the reference's.
            lacking: [T, N], reference less quantized residual stream, None for linears that do not write to it.
            weights: [T], None where all tokens weigh alike.
        """
        difference = (wanted.float() - x.float()).to(x.dtype)
        if lacking is not None:
            (linear,) = self._linears
            difference = difference @ linear.weight(x.dtype).T + lacking
            self._to_residual = True
        if weights is not None:
            difference = difference * weights[:, None]
        if self._sum is None:
            self._sum = torch.zeros(self._in_features, difference.shape[1], device=self._device)
        accumulate(self._sum, x, difference.to(x.dtype))

    def target(self, linear: Linear, factor: Factor, total_weight: float) -> Tensor:
        """W* fp32 [N, K] of one of the linears. One that writes to the residual stream can be asked for once."""
        assert self._sum is not None, "no token was added"
        weight = linear.weight(torch.float32)
        if self._to_residual:
            moment, self._sum = self._sum, None
        else:
            moment = self._sum @ weight.T
        factor.solve_in_place(moment)
        return moment.div_(total_weight).add_(weight.T).T
