"""The second moment of a layer's inputs: H = sum_t w_t x_t x_t^T / sum_t w_t.

Half the squared output error of a linear layer is the quadratic form of H (OBS, Hassibi & Stork 1993;
GPTQ, Frantar et al. 2022, arXiv 2210.17323), so H is all that the solver needs of the calibration data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from runtime.errors import NonFiniteError

TOKENS_AT_ONCE = 4096  # bounds the temporaries: 4096 x 29568 fp32 is 0.5 GB
PANELS = 8  # upper panels only: (PANELS + 1) / (2 PANELS) of the full product's work


class Hessian:
    """Accumulates H in one fp32 [in_features, in_features] buffer on `device`.

    bf16 activations are multiplied in bf16 with fp32 sums wherever the machine can: every product of two
    bf16 numbers is exact in fp32, so this costs no accuracy and is several times as fast.
    """

    def __init__(self, in_features: int, device: torch.device | str, name: str = "") -> None:
        self.in_features = in_features
        self.name = name
        self.tokens = 0
        self._sum: Tensor | None = torch.zeros(in_features, in_features, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self._divided = False

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens x [T, in_features], each counted `weights` [T] times (once without weights)."""
        assert self._sum is not None, "this Hessian was finished"
        assert x.ndim == 2 and x.shape[1] == self.in_features, (tuple(x.shape), self.in_features)
        for start in range(0, len(x), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            for left, right in _factors(x[rows], None if weights is None else weights[rows]):
                _add_upper_panels(self._sum, left, right)
        self._weight += len(x) if weights is None else weights.sum(dtype=torch.float64)
        self.tokens += len(x)

    @property
    def weight(self) -> float:
        """Sum of the tokens' weights."""
        return float(self._weight)

    def matrix(self) -> Tensor:
        """The symmetric H [in_features, in_features], divided by the total weight.

        This is the accumulation buffer itself, not a copy, so the first call ends the accumulation.

        Raises:
            NonFiniteError: an input was NaN or infinite; the message names the input feature.
        """
        assert self._sum is not None, "this Hessian was finished"
        if not self._divided:
            assert self.weight > 0, "no token was added"
            self._sum /= self.weight
            self._divided = True
        mirror(self._sum)
        finite = self._sum.diagonal().isfinite()
        if not finite.all():
            feature = int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"{self.name or 'a linear layer'}: input feature {feature} was NaN or infinite in "
                "calibration; look for a damaged checkpoint, or calibrate in fp32."
            )
        return self._sum

    def finish(self) -> None:
        """Free the buffer."""
        self._sum = None


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right of [T, M] and [T, N] to total fp32 [M, N], as `Hessian` multiplies."""
    if left.dtype != torch.bfloat16:
        total.addmm_(left.T, right)
    elif total.is_cuda:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        with _bf16_products(True):
            total.addmm_(left.float().T, right.float())


def _factors(x: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (left, right) of [T, K] whose products left^T right add up to sum_t w_t x_t x_t^T.

    bf16 tokens are counted once in a product that is exact, and the few that weigh more are added.
    """
    if x.dtype == torch.bfloat16:
        yield x, x
        if weights is not None:
            heavy = (weights != 1).nonzero()[:, 0]
            few = x[heavy].float()
            yield few * (weights[heavy, None] - 1), few
    else:
        x = x.float()
        yield (x if weights is None else x * weights[:, None].float()), x


def _add_upper_panels(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the upper triangle of left^T right to `total`, in panels of rows."""
    step = _panel(len(total))
    exact = left.dtype == torch.bfloat16
    if exact and not total.is_cuda:
        left, right = left.float(), right.float()
    with _bf16_products(exact and not total.is_cuda):
        for start in range(0, len(total), step):
            panel = total[start : start + step, start:]
            rows, columns = left[:, start : start + step].T, right[:, start:]
            if exact and total.is_cuda:
                panel += torch.mm(rows, columns, out_dtype=torch.float32)
            else:
                panel.addmm_(rows, columns)


def mirror(matrix: Tensor) -> None:
    """Copy the upper triangle onto the lower one, in place."""
    step = _panel(len(matrix))
    for start in range(0, len(matrix), step):
        stop = start + step
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def _panel(size: int) -> int:
    return max(128, -(-size // (64 * PANELS)) * 64)


@contextmanager
def _bf16_products(enabled: bool) -> Iterator[None]:
    """Let oneDNN multiply fp32 tensors that hold bf16 values in bf16, with fp32 sums and fp32 output."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if enabled:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
