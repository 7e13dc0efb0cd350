"""Plain torch reference for packed weights: dequantize GPTQ, NF4 and LLM.int8, pack and unpack GPTQ.

`runtime.kernels.packed_weight` has the fast versions, tested against `dequantize_gptq`, `dequantize_nf4` and
`dequantize_int8` here. Quantization packs with `pack_gptq`.

Shapes: N = out_features, K = in_features, G = groups along K. Methods and layouts:
    GPTQ: Frantar et al., arXiv 2210.17323; layout of AutoGPTQ:
        W[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k].
    NF4 with double quantization: Dettmers et al., QLoRA, arXiv 2305.14314. LLM.int8: arXiv 2208.07339. Both in the
        order of operations of bitsandbytes, so the weights equal its weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from runtime.checkpoints.quantization_config import (
    NF4_BLOCKSIZE,
    NF4_NESTED_BLOCKSIZE,
    packed_word_count,
)
from runtime.checkpoints.tensor_spec import read_nf4_quant_state
from runtime.common.errors import CheckpointError

# A 1 in every code of a word. Format v1 stores zero - 1. The 1 is subtracted from and added to whole words, as
# GPTQModel does, so that a zero of 0 in its files (which borrows from the next code) is read correctly.
ZERO_OFFSET = {4: 0x11111111, 8: 0x01010101}
DEQUANTIZE_CHUNK_WEIGHTS = 1 << 20  # bounds the fp32 temporaries, independent of the size of the layer
INVERSE_127 = 7.874015718698502e-3  # bitsandbytes multiplies by this float instead of dividing by 127


def pack_gptq(
    codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, checkpoint_format: str = "gptq"
) -> dict[str, Tensor]:
    """Pack one linear: codes uint8 [K, N], zeros uint8 [G, N], scales [G, N], g_idx [K].

    Returns:
        qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32], scales fp16 [G, N], g_idx int32 [K].

    Raises:
        CheckpointError: K or N does not fill whole 32-bit words.
        ValueError: a zero is 0 in format v1, where readers take it for 2^bits; or a scale does not fit fp16.
    """
    packed_word_count(codes.shape[0], bits, "in_features")
    packed_word_count(codes.shape[1], bits, "out_features")
    assert max(int(codes.max()), int(zeros.max())) < 1 << bits
    qzeros = pack_zeros(zeros, bits, checkpoint_format)
    stored_scales = scales.to(torch.float16)
    if not bool(stored_scales.isfinite().all()):
        raise ValueError(f"scales up to {float(scales.abs().max()):g} do not fit fp16")
    return {
        "qweight": pack_codes(codes, bits),
        "qzeros": qzeros,
        "scales": stored_scales.contiguous(),
        "g_idx": g_idx.to(torch.int32).contiguous(),
    }


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [K, N] to qweight int32 [K*bits/32, N]."""
    return _pack(codes.t(), bits).t().contiguous()


def pack_zeros(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Pack true zeros uint8 [G, N] to qzeros int32 [G, N*bits/32].

    Raises:
        ValueError: a zero is 0 in format v1, where readers take it for 2^bits.
    """
    if checkpoint_format != "gptq":
        return _pack(zeros, bits)
    if not bool((zeros > 0).all()):
        raise ValueError("a zero of 0 is ambiguous in GPTQ format v1; keep zeros at 1 or above")
    return _pack(zeros, bits) - ZERO_OFFSET[bits]


def unpack_gptq(tensors: Mapping[str, Tensor], bits: int, checkpoint_format: str = "gptq") -> tuple[Tensor, Tensor]:
    """Unpack qweight and qzeros to codes uint8 [K, N] and true zeros uint8 [G, N]."""
    zeros = gptq_zeros(tensors["qzeros"], bits, checkpoint_format)
    return _unpack(tensors["qweight"].t(), bits).t(), zeros


def gptq_zeros(qzeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Unpack qzeros int32 [G, N*bits/32] to true zeros uint8 [G, N]."""
    return _unpack(qzeros + ZERO_OFFSET[bits] if checkpoint_format == "gptq" else qzeros, bits)


def dequantize_gptq(
    tensors: Mapping[str, Tensor],
    bits: int,
    dtype: torch.dtype = torch.float32,
    checkpoint_format: str = "gptq",
) -> Tensor:
    """Return W [N, K], exact in fp32 (9-bit code - zero, 11-bit scale) and rounded once to `dtype`."""
    qweight, scales, g_idx = tensors["qweight"], tensors["scales"], tensors["g_idx"]
    zeros = gptq_zeros(tensors["qzeros"], bits, checkpoint_format)
    weight = torch.empty(qweight.shape[1], len(g_idx), dtype=dtype, device=qweight.device)
    rows_per_chunk = max(1, DEQUANTIZE_CHUNK_WEIGHTS // len(g_idx))
    for start in range(0, len(weight), rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        part = _unpack(qweight[:, rows].t(), bits).to(torch.float32)  # [n, K]
        part -= zeros[:, rows].t().to(torch.float32).index_select(1, g_idx)
        part *= scales[:, rows].t().to(torch.float32).index_select(1, g_idx)
        weight[rows] = part
    return weight


def nf4_nested_offset(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> float | None:
    """Return the mean that double quantization subtracted from each absmax, or None without double quantization.

    Raises:
        CheckpointError: see `read_nf4_quant_state`.
    """
    state = read_nf4_quant_state(tensors, shape)
    return float(state["nested_offset"]) if "weight.nested_absmax" in tensors else None


def nf4_absmax(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Return absmax of each block, fp32 [ceil(N*K / 64)], with double quantization undone.

    Raises:
        CheckpointError: see `read_nf4_quant_state`.
    """
    return nf4_absmax_with_offset(tensors, nf4_nested_offset(tensors, shape))


def nf4_absmax_with_offset(tensors: Mapping[str, Tensor], offset: float | None) -> Tensor:
    """Return the same as `nf4_absmax`, given `nf4_nested_offset`, without parsing the quant state again."""
    absmax = tensors["weight.absmax"]
    if offset is None:
        return absmax
    values = tensors["weight.nested_quant_map"].index_select(0, absmax.to(torch.int32))
    return _scale_blocks(values, tensors["weight.nested_absmax"], NF4_NESTED_BLOCKSIZE) + offset


def dequantize_nf4(tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W [N, K] = `shape`: quant_map[code] * absmax of the block, rounded to `dtype`.

    Raises:
        CheckpointError: see `read_nf4_quant_state`.
    """
    table = tensors["weight.quant_map"]
    pairs = torch.cartesian_prod(table, table)  # [256, 2]: the two values of a byte, high nibble first
    values = functional.embedding(tensors["weight"].flatten().to(torch.int32), pairs).flatten()
    values = values[: shape[0] * shape[1]]
    return _scale_blocks(values, nf4_absmax(tensors, shape), NF4_BLOCKSIZE).view(shape).to(dtype)


def dequantize_int8(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W [N, K] of an LLM.int8 linear: code * SCB[n] / 127, rounded to `dtype`.

    Raises:
        CheckpointError: the codes are not stored in row order.
    """
    check_row_order(tensors)
    return (tensors["weight"] * tensors["SCB"].view(-1, 1) * INVERSE_127).to(dtype)


def check_row_order(tensors: Mapping[str, Tensor]) -> None:
    """Check that the codes of an LLM.int8 linear are stored in row order.

    Raises:
        CheckpointError: `weight_format` is not 0.
    """
    weight_format = int(tensors["weight_format"])
    if weight_format != 0:
        raise CheckpointError(f"weight_format is {weight_format}; only 0 (row order) is supported.")


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [R, C] to int32 [R, C*bits/32], low bits first."""
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes.contiguous().view(torch.int32)  # assumes a little-endian machine


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 [R, C*bits/32] to uint8 [R, C]. Works on bytes: an eighth of the memory traffic of 64-bit shifts."""
    codes = (
        words.contiguous().flatten().view(torch.uint8).view(len(words), -1)
    )  # contiguous() keeps the stride of a single column, so flatten
    return codes if bits == 8 else torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)


def _scale_blocks(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Multiply each block of `blocksize` values by its absmax; the last block may be shorter."""
    whole = values.numel() // blocksize * blocksize
    scaled = (values[:whole].view(-1, blocksize) * absmax[: whole // blocksize, None]).flatten()
    return scaled if whole == values.numel() else torch.cat([scaled, values[whole:] * absmax[-1]])
