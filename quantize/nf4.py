"""NF4 with double quantization (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), through bitsandbytes itself."""

from __future__ import annotations

import torch

from runtime.linear import Tensors
from runtime.quantization import NF4_BLOCKSIZE


def quantize_nf4(weight: torch.Tensor) -> Tensors:
    """The tensors that transformers reads an NF4 linear from, keyed by suffix.

    Args:
        weight: [N, K] in the checkpoint's dtype, which readers dequantize to.
    """
    # Imported here: it brings torch's compiler, takes as long as all else together, and logs what its CPU
    # backend lacks, which concerns nobody who takes another method.
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCKSIZE, compress_statistics=True, quant_type="nf4"
    )
    stored = {"weight": packed} | {f"weight.{name}": each for name, each in state.as_dict(packed=True).items()}
    return {name: tensor.to(weight.device) for name, tensor in stored.items()}
