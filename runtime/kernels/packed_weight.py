"""Weights that stay packed in memory and are dequantized for each matrix product: GPTQ, NF4, LLM.int8.

Each class dequantizes chunk by chunk in torch; GPTQ and NF4 use a Triton kernel on CUDA. The results equal
`runtime.kernels.reference` bit for bit in each dtype, except for the sign of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from runtime.checkpoints.quantization_config import NF4_BLOCKSIZE, QuantizationConfig
from runtime.kernels.reference import (
    INVERSE_127,
    check_row_order,
    gptq_zeros,
    nf4_absmax_with_offset,
    nf4_nested_offset,
)
from runtime.kernels.workspace import Workspace, chunks, items_per_chunk


class PackedWeight(Protocol):
    """A weight W [N, K] that stays packed.

    Attributes:
        transposed: whether dequantization is fastest into an `out` whose transpose [K, N] is contiguous.
    """

    transposed: bool

    def dequantize_into(self, out: Tensor) -> None:
        """Dequantize into `out` [N, K], of any strides, rounding once to its dtype."""


def packed_weight(
    tensors: Mapping[str, Tensor], quantization: QuantizationConfig, shape: tuple[int, int]
) -> PackedWeight:
    """Return the packed weight [N, K] = `shape` stored as `tensors`, keyed by suffix.

    Raises:
        CheckpointError: the tensors contradict `quantization` or `shape`.
    """
    if quantization.method == "gptq":
        return GPTQWeight(tensors, quantization, shape)
    if quantization.method == "nf4":
        return NF4Weight(tensors, shape)
    return Int8Weight(tensors)


class GPTQWeight:
    """GPTQ, 4 or 8 bits: W[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k].

    Reference: `dequantize_gptq`. Weights are dequantized transposed, [K, N], as they are packed: a word holds codes of
    consecutive rows of W^T, so shifting whole words gives whole rows, and the scales of a group are one contiguous row.

    On CPUs it also keeps the zeros in fp16: 2 bytes per group and output, 3 % of 4-bit weights at group_size 128.
    """

    transposed = True

    def __init__(self, tensors: Mapping[str, Tensor], quantization: QuantizationConfig, shape: tuple[int, int]):
        """Use qweight, qzeros, scales and g_idx of a weight [N, K] = `shape`."""
        self.tensors = tensors
        self.bits, self.checkpoint_format = quantization.bits, quantization.checkpoint_format
        self.group_size = shape[1] if quantization.group_size == -1 else quantization.group_size

    @cached_property
    def words_per_group(self) -> int | None:
        """Words per group along K; None if groups are permuted or do not start at a word."""
        g_idx = self.tensors["g_idx"]
        words, rest = divmod(self.group_size, 32 // self.bits)
        in_order = torch.arange(len(g_idx), device=g_idx.device) // self.group_size
        return None if rest or not torch.equal(g_idx, in_order.to(g_idx.dtype)) else words

    @cached_property
    def _negated_zeros(self) -> Tensor:
        return gptq_zeros(self.tensors["qzeros"], self.bits, self.checkpoint_format).to(torch.float16).neg_()

    def dequantize_into(self, out: Tensor) -> None:
        """Dequantize into `out` [N, K], of any strides, rounding once to its dtype."""
        if out.is_cuda and _has_triton():
            from runtime.kernels.triton_gptq import dequantize_gptq_triton

            dequantize_gptq_triton(self.tensors, self.bits, self.checkpoint_format, self.words_per_group, out)
        else:
            self._dequantize_chunks(out.t())

    def _dequantize_chunks(self, out: Tensor) -> None:
        """Dequantize into out [K, N]. code * scale - zero * scale is exact in fp32: an 8-bit code, an 11-bit scale."""
        qweight, g_idx = self.tensors["qweight"], self.tensors["g_idx"]
        (words, columns), codes_per_word, device = qweight.shape, 32 // self.bits, out.device
        workspace, group = Workspace.of(device), self.words_per_group
        scales, offsets = self._scales_and_offsets(workspace)
        for chunk in chunks(words, items_per_chunk(codes_per_word * columns, device), group or 1):
            codes = workspace.get_buffer("values", (chunk.stop - chunk.start, codes_per_word, columns), torch.int32)
            torch.bitwise_right_shift(qweight[chunk, None], _code_shifts(self.bits, device), out=codes)
            codes.bitwise_and_((1 << self.bits) - 1)
            values = codes.view(torch.float32).copy_(codes)  # in place: both dtypes have 4 bytes
            rows = slice(chunk.start * codes_per_word, chunk.stop * codes_per_word)
            if group is None:
                scale = _gather_rows(scales, g_idx[rows], workspace, "scale rows")
                offset = _gather_rows(offsets, g_idx[rows], workspace, "offset rows")
                values = values.view(-1, columns)
            else:
                groups = slice(chunk.start // group, -(-chunk.stop // group))
                scale, offset = scales[groups, None], offsets[groups, None]
                values = values.view(len(scale), -1, columns)
            torch.addcmul(offset, values, scale, out=values)
            out[rows].copy_(values.view(-1, columns))

    def _scales_and_offsets(self, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """Return scales and -zero * scale, both fp32 [G, N]."""
        stored = self.tensors["scales"]
        scales, offsets = (
            workspace.get_buffer(name, tuple(stored.shape), torch.float32) for name in ("scales", "offsets")
        )
        torch.mul(scales.copy_(stored), self._negated_zeros, out=offsets)
        return scales, offsets


class NF4Weight:
    """bitsandbytes NF4, with or without double quantization: W = quant_map[code] * absmax of its block of 64.

    Reference: `dequantize_nf4`. It also keeps a table of the two values that each byte stands for.
    """

    transposed = False

    def __init__(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]):
        """Use the tensors of a weight [N, K] = `shape`, as `QuantizationConfig.linear_tensors` lists them.

        Raises:
            CheckpointError: see `read_nf4_quant_state`.
        """
        self.tensors, self.shape = tensors, shape
        self.nested_offset = nf4_nested_offset(tensors, shape)

    @cached_property
    def _pairs(self) -> Tensor:
        """int64 [256]: both fp32 values of a byte as one number, high nibble first, so one lookup gives two weights."""
        table = self.tensors["weight.quant_map"]
        return torch.cartesian_prod(table, table).view(torch.int64).flatten()

    def dequantize_into(self, out: Tensor) -> None:
        """Dequantize into `out` [N, K], of any strides, rounding once to its dtype."""
        contiguous = out if out.is_contiguous() else torch.empty(self.shape, dtype=out.dtype, device=out.device)
        if out.is_cuda and _has_triton():
            from runtime.kernels.triton_nf4 import dequantize_nf4_triton

            dequantize_nf4_triton(self.tensors, self.nested_offset, contiguous.view(-1))
        else:
            self._dequantize_chunks(contiguous.view(-1))
        if contiguous is not out:
            out.copy_(contiguous)

    def _dequantize_chunks(self, out: Tensor) -> None:
        """Dequantize into out [N*K]."""
        workspace, packed = Workspace.of(out.device), self.tensors["weight"].flatten()
        absmax = nf4_absmax_with_offset(self.tensors, self.nested_offset)[:, None]
        for blocks in chunks(len(absmax), items_per_chunk(NF4_BLOCKSIZE, out.device)):
            codes = packed[blocks.start * NF4_BLOCKSIZE // 2 : blocks.stop * NF4_BLOCKSIZE // 2]
            index = workspace.get_buffer("index", (len(codes),), torch.int32).copy_(codes)
            values = workspace.get_buffer("values", (blocks.stop - blocks.start, NF4_BLOCKSIZE), torch.float32)
            looked_up = values.view(torch.int64).view(-1)[: len(codes)]  # the last block may be shorter
            torch.index_select(self._pairs, 0, index, out=looked_up)
            values *= absmax[blocks]
            part = out[blocks.start * NF4_BLOCKSIZE : blocks.stop * NF4_BLOCKSIZE]
            part.copy_(values.view(-1)[: len(part)])


class Int8Weight:
    """LLM.int8: W[n, k] = code[n, k] * SCB[n] / 127. Reference: `dequantize_int8`."""

    transposed = False

    def __init__(self, tensors: Mapping[str, Tensor]):
        """Use weight, SCB and weight_format.

        Raises:
            CheckpointError: the codes are not stored in row order.
        """
        check_row_order(tensors)
        self.codes, self.row_scales = tensors["weight"], tensors["SCB"].view(-1, 1)

    def dequantize_into(self, out: Tensor) -> None:
        """Dequantize into `out` [N, K], of any strides, rounding once to its dtype."""
        (count, columns), workspace = self.codes.shape, Workspace.of(out.device)
        for rows in chunks(count, items_per_chunk(columns, out.device)):
            values = workspace.get_buffer("values", (rows.stop - rows.start, columns), torch.float32)
            values.copy_(self.codes[rows]).mul_(self.row_scales[rows]).mul_(INVERSE_127)
            out[rows].copy_(values)


@cache
def _has_triton() -> bool:
    """Return whether Triton is installed; torch wheels for CUDA include it, CPU wheels do not."""
    return find_spec("triton") is not None


def _gather_rows(table: Tensor, g_idx: Tensor, workspace: Workspace, name: str) -> Tensor:
    """Return row g_idx[k] of `table` [G, N] for each k: fp32 [len(g_idx), N]."""
    shape = (len(g_idx), table.shape[1])
    return torch.index_select(table, 0, g_idx, out=workspace.get_buffer(name, shape, torch.float32))


@cache
def _code_shifts(bits: int, device: torch.device) -> Tensor:
    """int32 [codes per word, 1]: the bit position of each code."""
    with torch.inference_mode(False):
        return torch.arange(0, 32, bits, dtype=torch.int32, device=device)[:, None]
