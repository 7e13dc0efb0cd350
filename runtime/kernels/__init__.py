"""Dequantization fast enough to be repeated for each chunk of tokens.

Every kernel's weights equal those of its plain torch twin in `runtime.packing`, in each dtype; but for the sign of a
zero, which no sum sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from runtime.kernels.gptq import GPTQWeight
from runtime.kernels.int8 import Int8Weight
from runtime.kernels.nf4 import NF4Weight
from runtime.quantization import Quantization


class PackedWeight(Protocol):
    """A weight W [N, K] that stays packed.

    Attributes:
        transposed: whether W is written fastest where its transpose [K, N] is contiguous.
    """

    transposed: bool

    def write(self, out: torch.Tensor) -> None:
        """Dequantize into `out` [N, K], of any strides, rounding once to its dtype."""


def packed_weight(
    tensors: Mapping[str, torch.Tensor], quantization: Quantization, shape: tuple[int, int]
) -> PackedWeight:
    """The packed weight [N, K] = `shape` stored as `tensors`, keyed by suffix.

    Raises:
        CheckpointError: the tensors do not say what `quantization` and `shape` do.
    """
    if quantization.method == "gptq":
        return GPTQWeight(tensors, quantization, shape)
    if quantization.method == "nf4":
        return NF4Weight(tensors, shape)
    return Int8Weight(tensors)
