"""Ask a linear for what the reference gives, not for what its weight makes of inputs that are already off.

GPTQ rounds W so that Q x is near W x, x being what the packed layers before it bring. But the reference stream
knows what they should have brought. What is asked for is W x~, x~ being the reference's input. As far as x can tell,
that is

    W* x,   W* = W + W E[(x~ - x) x^T] (H + damp I)^-1

and Q is then solved for W* under the same H. This is the target of GPTAQ (Li et al. 2025, arXiv 2504.02692), which
folds it into its solver; here it comes before, so the scales are searched for the weight that is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.factor import Factor
from quantize.hessian import accumulate
from runtime.linear import Linear


class Correction:
    """The moment E[(x~ - x) x^T] of linears with one input, accumulated over calibration tokens.

    It is [K, K] where several linears share it. For a linear alone it is kept as x and what its output lacks,
    [K, N], which is the smaller for the widest input there is.
    """

    def __init__(self, linears: Sequence[Linear], in_features: int, device: torch.device | str) -> None:
        """`linears` have their original weights."""
        self._alone = linears[0] if len(linears) == 1 else None
        columns = in_features if self._alone is None else self._alone.shape[0]
        self._sum: Tensor | None = torch.zeros(in_features, columns, device=device)

    def add(self, x: Tensor, wanted: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x, wanted: [T, K], the input that there is and the reference's.
            weights: [T], None where all tokens weigh alike.
        """
        assert self._sum is not None, "this correction was used"
        lacking = (wanted.float() - x).to(x.dtype)  # the reference still needs what was wanted
        if self._alone is not None:
            lacking = lacking @ self._alone.weight(x.dtype).T
        if weights is not None:
            lacking = (lacking * weights[:, None]).to(x.dtype)
        accumulate(self._sum, x, lacking)

    def target(self, linear: Linear, factor: Factor, total_weight: float) -> Tensor:
        """W* fp32 [N, K] of one of the linears. A linear alone can be asked for once."""
        assert self._sum is not None, "this correction was used"
        weight = linear.weight(torch.float32)
        if self._alone is None:
            moment = self._sum @ weight.T
        else:
            moment, self._sum = self._sum, None  # its buffer becomes the target
        factor.solve_in_place(moment)
        return moment.div_(total_weight).add_(weight.T).T
