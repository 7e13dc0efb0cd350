"""Random packed linears in every stored format, and their reference weights."""

from __future__ import annotations

import json

import torch

from runtime.checkpoints.quantization_config import NF4_QUANT_STATE, QuantizationConfig
from runtime.kernels.reference import dequantize_gptq, dequantize_int8, dequantize_nf4, pack_gptq

Tensors = dict[str, torch.Tensor]


def gptq_tensors(shape, quantization: QuantizationConfig, *, permuted=False, seed=0) -> Tensors:
    """A weight [N, K] = `shape` with every code, zero and sign of scale."""
    (out_features, in_features), bits = shape, quantization.bits
    generator = torch.Generator().manual_seed(seed)
    num_groups = quantization.num_groups(in_features)
    codes = torch.randint(0, 1 << bits, (in_features, out_features), generator=generator).to(torch.uint8)
    zeros = torch.randint(1, 1 << bits, (num_groups, out_features), generator=generator).to(torch.uint8)
    if quantization.sym:
        zeros.fill_(1 << (bits - 1))
    scales = torch.randn(num_groups, out_features, generator=generator)
    g_idx = torch.arange(in_features) // (in_features if quantization.group_size == -1 else quantization.group_size)
    if permuted:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    return pack_gptq(codes, zeros, scales, g_idx, bits, quantization.checkpoint_format)


def nf4_tensors(shape, quantization: QuantizationConfig, *, seed=0) -> Tensors:
    """A weight [N, K] = `shape` of arbitrary bytes, with bitsandbytes' sizes and a table that is no other's."""
    generator = torch.Generator().manual_seed(seed)
    state = {"quant_type": "nf4", "blocksize": 64, "shape": list(shape)}
    if quantization.double_quant:
        state |= {"nested_blocksize": 256, "nested_offset": 0.0123456789}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    made = {}
    for suffix, (dtype, size) in quantization.linear_tensors(*shape, bias=False).items():
        if suffix == NF4_QUANT_STATE:
            made[suffix] = text
        elif dtype == torch.uint8:
            made[suffix] = torch.randint(0, 256, size, generator=generator).to(torch.uint8)
        else:
            made[suffix] = torch.rand(size, generator=generator)
    return made


def int8_tensors(shape, *, seed=0) -> Tensors:
    """A weight [N, K] = `shape` of arbitrary codes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randint(-128, 128, shape, generator=generator).to(torch.int8),
        "SCB": torch.rand(shape[0], generator=generator) * 5,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def packed_tensors(shape, quantization: QuantizationConfig, *, permuted=False, seed=0) -> Tensors:
    """A weight [N, K] = `shape` in the format that `quantization` names."""
    if quantization.method == "gptq":
        return gptq_tensors(shape, quantization, permuted=permuted, seed=seed)
    return (
        nf4_tensors(shape, quantization, seed=seed) if quantization.method == "nf4" else int8_tensors(shape, seed=seed)
    )


def reference_weight(tensors: Tensors, quantization: QuantizationConfig, shape, dtype=torch.float32) -> torch.Tensor:
    """The weight [N, K] = `shape` by the reference in `runtime.kernels.reference`."""
    if quantization.method == "gptq":
        return dequantize_gptq(tensors, quantization.bits, dtype, quantization.checkpoint_format)
    return dequantize_nf4(tensors, shape, dtype) if quantization.method == "nf4" else dequantize_int8(tensors, dtype)
