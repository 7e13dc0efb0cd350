"""One quantized linear layer before it is packed: codes, zeros, scales and its output error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SolvedLinear:
    """One quantized linear; K = in_features, N = out_features, G = groups.

    Attributes:
        codes: uint8 [K, N].
        zeros: uint8 [G, N].
        scales: fp16 [G, N].
        g_idx: int32 [K].
        loss: mean squared output error over the calibration tokens, tr(D H D^T) without damping.
        output_power: mean squared output, tr(W H W^T).
        damp: mean of the values added to the Hessian's diagonal.
        dead_columns: number of input features that were 0 on all calibration tokens; their weights became 0.
        notes: fallbacks, for the report.
        quant_state: for NF4, the state for `pack_nf4`; `scales` is then absmax in fp32, and `zeros` is 0.
        levels: for NF4, its 16 levels, fp32.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor
    loss: float
    output_power: float
    damp: float
    dead_columns: int
    notes: tuple[str, ...]
    quant_state: Any = None
    levels: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Dequantized weight fp32 [N, K], as a reader of the packed tensors computes it."""
        return dequantize_codes(self.codes, self.zeros, self.scales, self.g_idx, self.levels)

    @property
    def relative_loss(self) -> float:
        """`loss` divided by `output_power`; 0 if the outputs are all 0."""
        return self.loss / self.output_power if self.output_power > 0 else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of the output in decibels."""
        return -10 * math.log10(self.relative_loss) if self.relative_loss > 0 else math.inf


def dequantize_codes(
    codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, levels: Tensor | None = None
) -> Tensor:
    """Compute scale * (code - zero), fp32 [N, K], from codes [K, N], zeros and scales [G, N] and g_idx [K].

    With `levels`, it is scale * level[code].
    """
    weight = torch.empty(codes.shape[1], codes.shape[0], device=codes.device)
    for start in range(0, len(codes), 256):
        groups = g_idx[start : start + 256].long()
        chunk = codes[start : start + 256]
        steps = chunk.float() - zeros[groups].float() if levels is None else levels[chunk.long()]
        weight[:, start : start + 256] = (steps * scales[groups].float()).T
    return weight
