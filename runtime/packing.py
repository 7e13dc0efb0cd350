"""Packed tensors to codes and weights, and codes to packed tensors, in plain torch.

K = in_features, N = out_features, G = groups. These are the reference that device kernels are tested against.

GPTQ (Frantar et al., arXiv 2210.17323; layout of AutoGPTQ): W[n, k] = scale[g, n] * (code[k, n] - zero[g, n])
with g = g_idx[k]. NF4 with double quantization: Dettmers et al., QLoRA, arXiv 2305.14314, and LLM.int8:
arXiv 2208.07339, both in bitsandbytes' order of operations, so that the weights are its weights bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from runtime.errors import CheckpointError
from runtime.quantization import NF4_BLOCKSIZE, NF4_NESTED_BLOCKSIZE, NF4_STATE, whole_words

# One in every code of a word. Format v1 stores zero - 1; the difference is taken on the whole word, as
# GPTQModel does, so that a zero of 0 in its files (a borrow from the next code) is read back right.
ONES = {4: 0x11111111, 8: 0x01010101}
WEIGHTS_AT_ONCE = 1 << 20  # bounds the fp32 temporaries of a dequantization, whatever the layer's size
INVERSE_127 = 7.874015718698502e-3  # bitsandbytes multiplies by this float rather than divide by 127


def pack_gptq(
    codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, checkpoint_format: str = "gptq"
) -> dict[str, Tensor]:
    """Pack one linear: codes uint8 [K, N], zeros uint8 [G, N], scales [G, N], g_idx [K].

    Returns:
        qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32], scales fp16 [G, N], g_idx int32 [K].

    Raises:
        CheckpointError: K or N does not fill whole 32-bit words.
        ValueError: a zero of 0 in format v1, which readers take for 2^bits, or a scale that fp16 cannot hold.
    """
    whole_words(codes.shape[0], bits, "in_features")
    whole_words(codes.shape[1], bits, "out_features")
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
    """qweight int32 [K*bits/32, N] of codes uint8 [K, N]."""
    return _pack(codes.t(), bits).t().contiguous()


def pack_zeros(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """qzeros int32 [G, N*bits/32] of true zeros uint8 [G, N].

    Raises:
        ValueError: a zero of 0 in format v1, which readers take for 2^bits.
    """
    if checkpoint_format != "gptq":
        return _pack(zeros, bits)
    if not bool((zeros > 0).all()):
        raise ValueError("GPTQ format v1 has no unambiguous form for a zero of 0; keep zeros at 1 or above")
    return _pack(zeros, bits) - ONES[bits]


def unpack_gptq(tensors: Mapping[str, Tensor], bits: int, checkpoint_format: str = "gptq") -> tuple[Tensor, Tensor]:
    """Codes uint8 [K, N] and true zeros uint8 [G, N] of a packed linear."""
    zeros = gptq_zeros(tensors["qzeros"], bits, checkpoint_format)
    return _unpack(tensors["qweight"].t(), bits).t(), zeros


def gptq_zeros(qzeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """True zeros uint8 [G, N] of qzeros int32 [G, N*bits/32]."""
    return _unpack(qzeros + ONES[bits] if checkpoint_format == "gptq" else qzeros, bits)


def dequantize_gptq(
    tensors: Mapping[str, Tensor],
    bits: int,
    dtype: torch.dtype = torch.float32,
    checkpoint_format: str = "gptq",
) -> Tensor:
    """Weight [N, K], exact in fp32 (9 bits of code - zero times an 11-bit scale), rounded once to `dtype`."""
    qweight, scales, g_idx = tensors["qweight"], tensors["scales"], tensors["g_idx"]
    zeros = gptq_zeros(tensors["qzeros"], bits, checkpoint_format)
    weight = torch.empty(qweight.shape[1], len(g_idx), dtype=dtype, device=qweight.device)
    rows_at_once = max(1, WEIGHTS_AT_ONCE // len(g_idx))
    for start in range(0, len(weight), rows_at_once):
        rows = slice(start, start + rows_at_once)
        part = _unpack(qweight[:, rows].t(), bits).to(torch.float32)  # [n, K]
        part -= zeros[:, rows].t().to(torch.float32).index_select(1, g_idx)
        part *= scales[:, rows].t().to(torch.float32).index_select(1, g_idx)
        weight[rows] = part
    return weight


def nf4_state(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    """The JSON half of an NF4 linear, checked: its block sizes are the ones the tensors were laid out with.

    Raises:
        CheckpointError: the JSON is damaged or describes another layout than `shape` at block size 64.
    """
    try:
        state = json.loads(tensors[NF4_STATE].cpu().numpy().tobytes())
        found = {key: state.get(key) for key in ("quant_type", "blocksize", "shape")}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{NF4_STATE} is not the JSON text bitsandbytes writes ({error}).") from error
    expected: dict[str, Any] = {"quant_type": "nf4", "blocksize": NF4_BLOCKSIZE, "shape": list(shape)}
    if "weight.nested_absmax" in tensors:
        expected["nested_blocksize"] = NF4_NESTED_BLOCKSIZE
        found["nested_blocksize"] = state.get("nested_blocksize")
        offset = state.get("nested_offset")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise CheckpointError(f"{NF4_STATE} has nested_offset {offset!r}; a finite number was expected.")
    if found != expected:
        raise CheckpointError(f"{NF4_STATE} says {found}; {expected} was expected.")
    return dict(state)


def nf4_offset(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> float | None:
    """What double quantization took from each absmax; None without it.

    Raises:
        CheckpointError: as `nf4_state`.
    """
    state = nf4_state(tensors, shape)
    return float(state["nested_offset"]) if "weight.nested_absmax" in tensors else None


def nf4_absmax(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """fp32 [ceil(N*K / 64)]: the largest magnitude of each block, double quantization undone.

    Raises:
        CheckpointError: as `nf4_state`.
    """
    return nf4_absmax_at(tensors, nf4_offset(tensors, shape))


def nf4_absmax_at(tensors: Mapping[str, Tensor], offset: float | None) -> Tensor:
    """`nf4_absmax` with the offset known, and the JSON not read again."""
    absmax = tensors["weight.absmax"]
    if offset is None:
        return absmax
    values = tensors["weight.nested_quant_map"].index_select(0, absmax.to(torch.int32))
    return _scale_blocks(values, tensors["weight.nested_absmax"], NF4_NESTED_BLOCKSIZE) + offset


def dequantize_nf4(tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight [N, K] = `shape`: each code's table value times its block's absmax, rounded to `dtype`.

    Raises:
        CheckpointError: as `nf4_state`.
    """
    table = tensors["weight.quant_map"]
    pairs = torch.cartesian_prod(table, table)  # [256, 2]: both values of a byte, its high nibble first
    values = functional.embedding(tensors["weight"].flatten().to(torch.int32), pairs).flatten()
    values = values[: shape[0] * shape[1]]
    return _scale_blocks(values, nf4_absmax(tensors, shape), NF4_BLOCKSIZE).view(shape).to(dtype)


def dequantize_int8(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight [N, K] of an LLM.int8 linear: code * SCB[n] / 127, rounded to `dtype`.

    Raises:
        CheckpointError: the codes are not stored in row order.
    """
    check_row_order(tensors)
    return (tensors["weight"] * tensors["SCB"].view(-1, 1) * INVERSE_127).to(dtype)


def check_row_order(tensors: Mapping[str, Tensor]) -> None:
    """Refuse an LLM.int8 linear whose codes are stored in another order than by row.

    Raises:
        CheckpointError: its `weight_format` says so.
    """
    weight_format = int(tensors["weight_format"])
    if weight_format != 0:
        raise CheckpointError(f"weight_format is {weight_format}; only 0, row order, is supported.")


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] to int32 [R, C*bits/32], low bits first."""
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes.contiguous().view(torch.int32)  # little-endian, as every machine torch runs on


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [R, C*bits/32] to uint8 [R, C]. Works on bytes: an eighth of the traffic of 64-bit shifts."""
    codes = words.contiguous().flatten().view(torch.uint8).view(len(words), -1)  # a lone column may have any stride
    return codes if bits == 8 else torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)


def _scale_blocks(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Multiply each run of `blocksize` values, the last perhaps shorter, by its own absmax."""
    whole = values.numel() // blocksize * blocksize
    scaled = (values[:whole].view(-1, blocksize) * absmax[: whole // blocksize, None]).flatten()
    return scaled if whole == values.numel() else torch.cat([scaled, values[whole:] * absmax[-1]])
