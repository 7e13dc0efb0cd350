"""Dtypes that a block computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Dtypes of the residual stream and of matrix products.

    Attributes:
        residual_dtype: residual stream and elementwise operations (norms, rotary embedding, SwiGLU).
        matmul_dtype: inputs of matrix products and attention; products accumulate in fp32.
        float8: whether weights and inputs of the block linears are also rounded to fp8; see `runtime.modeling.fp8`.
    """

    residual_dtype: torch.dtype
    matmul_dtype: torch.dtype
    float8: bool = False

    @property
    def name(self) -> str:
        """Value of `--dtype`."""
        return "fp8" if self.float8 else str(self.matmul_dtype).removeprefix("torch.")

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype that the block linears multiply in."""
        return torch.float8_e4m3fn if self.float8 else self.matmul_dtype


# A small model of this family has activations near 1.5e4 in one channel at the scored token. A bf16 residual stream
# loses the precision that the head needs there, so the stream is fp32 even when products are bf16.
FLOAT32 = Precision(torch.float32, torch.float32)
BFLOAT16 = Precision(torch.float32, torch.bfloat16)
FLOAT8 = Precision(torch.float32, torch.bfloat16, float8=True)
# As transformers with dtype=bfloat16; the noise floor of parity reports.
PURE_BFLOAT16 = Precision(torch.bfloat16, torch.bfloat16)

PRECISIONS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "fp8": FLOAT8}
"""By value of `--dtype`."""
