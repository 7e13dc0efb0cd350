"""The second moment of a layer's inputs, H = sum_t w_t x_t x_t^T / sum_t w_t.

The mean squared output error of a linear layer whose weight changes by D is tr(D H D^T) (OBS, Hassibi & Stork 1993;
GPTQ, Frantar et al. 2022, arXiv 2210.17323). GPTQ therefore needs no other statistic of the calibration data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from runtime.common.errors import NonFiniteError

TOKENS_AT_ONCE = 4096  # limits temporary memory: 4096 x 29568 fp32 is 0.5 GB
PANELS = 8  # only panels on and above the diagonal are computed: (PANELS + 1) / (2 PANELS) of the full product


class Hessian:
    """Accumulates H in one fp32 buffer [in_features, in_features] on `device`.

    bf16 activations are multiplied in bf16 with fp32 sums if the machine supports it. A product of two bf16 numbers is
    exact in fp32, so this loses no accuracy and is several times as fast.
    """

    def __init__(self, in_features: int, device: torch.device | str, name: str = "") -> None:
        self.in_features = in_features
        self.name = name
        self.tokens = 0
        self._sum: Tensor | None = torch.zeros(in_features, in_features, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self._divided = False

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens x [T, in_features] with weights [T] (1 if None)."""
        assert self._sum is not None, "the buffer was freed"
        assert x.ndim == 2 and x.shape[1] == self.in_features, (tuple(x.shape), self.in_features)
        for start in range(0, len(x), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            _add_upper_panels(self._sum, *_factors(x[rows], None if weights is None else weights[rows]))
        self._weight += len(x) if weights is None else weights.sum(dtype=torch.float64)
        self.tokens += len(x)

    @property
    def weight(self) -> float:
        """Sum of the token weights."""
        return float(self._weight)

    def matrix(self) -> Tensor:
        """Return H [in_features, in_features]. It is the accumulation buffer, not a copy: add no tokens after this.

        Raises:
            NonFiniteError: an input was NaN or infinite; the message names the input feature.
        """
        assert self._sum is not None, "the buffer was freed"
        if not self._divided:
            assert self.weight > 0, "no token was added"
            self._sum /= self.weight
            self._divided = True
        copy_upper_to_lower(self._sum)
        finite = self._sum.diagonal().isfinite()
        if not finite.all():
            feature = int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"{self.name or 'a linear layer'}: input feature {feature} was NaN or infinite in "
                "calibration; check the checkpoint for damage, or calibrate with --dtype float32."
            )
        return self._sum

    def free(self) -> None:
        """Drop the reference to the buffer."""
        self._sum = None


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right of [T, M] and [T, N] to total fp32 [M, N], with exact bf16 products as in `Hessian`."""
    if left.dtype != torch.bfloat16:
        total.addmm_(left.T, right)
    elif total.is_cuda:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        with _bf16_products(True):
            total.addmm_(left.float().T, right.float())


def _factors(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (left, right) of [T, K] with left^T right = sum_t w_t x_t x_t^T.

    bf16 tokens stay bf16: x_t sqrt(w_t) is rounded, whose error averages out over the tokens.
    """
    if x.dtype == torch.bfloat16:
        scaled = x if weights is None else (x * weights.sqrt()[:, None]).to(x.dtype)
        return scaled, scaled
    x = x.float()
    return (x if weights is None else x * weights[:, None].float()), x


def _add_upper_panels(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the upper triangle of left^T right to `total`, by panels of rows."""
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


def copy_upper_to_lower(matrix: Tensor) -> None:
    """Copy the upper triangle of a square matrix to its lower triangle, in place."""
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
    """Let oneDNN multiply fp32 tensors as bf16, with fp32 sums and output; exact if they hold bf16 values."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if enabled:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
