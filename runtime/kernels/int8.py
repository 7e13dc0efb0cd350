"""LLM.int8 weights: one scale an output row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.kernels.pieces import at_once, pieces
from runtime.packing import INVERSE_127, check_row_order
from runtime.workspace import Workspace


class Int8Weight:
    """W[n, k] = code[n, k] * SCB[n] / 127; twin: `dequantize_int8`."""

    transposed = False

    def __init__(self, tensors: Mapping[str, Tensor]):
        """`tensors` are weight, SCB and weight_format.

        Raises:
            CheckpointError: the codes are not stored in row order.
        """
        check_row_order(tensors)
        self.codes, self.row_scales = tensors["weight"], tensors["SCB"].view(-1, 1)

    def write(self, out: Tensor) -> None:
        """Dequantize into `out` [N, K], of any strides, rounding once to its dtype."""
        (count, columns), space = self.codes.shape, Workspace.of(out.device)
        for rows in pieces(count, at_once(columns, out.device)):
            values = space.take("values", (rows.stop - rows.start, columns), torch.float32).copy_(self.codes[rows])
            values.mul_(self.row_scales[rows]).mul_(INVERSE_127)
            out[rows].copy_(values)
