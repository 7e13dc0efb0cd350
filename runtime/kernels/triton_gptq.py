"""Triton kernels that dequantize GPTQ weights on a GPU. Import only if Triton is installed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from runtime.kernels.reference import ZERO_OFFSET

_MAX_TILE_WORDS, _TILE_COLUMNS = 16, 128  # per program; 16 x 128 words are 128 x 128 4-bit weights, 32 KiB in bf16
_ROW_TILE = (32, 128)  # N x K, per program of `gptq_rows_kernel`


def dequantize_gptq_triton(
    tensors: Mapping[str, torch.Tensor],
    bits: int,
    checkpoint_format: str,
    words_per_group: int | None,
    out: torch.Tensor,
) -> None:
    """Dequantize into `out` [N, K]; fastest if out.t() is contiguous along N.

    Args:
        tensors: qweight, qzeros, scales and g_idx.
        words_per_group: see `GPTQWeight.words_per_group`.
    """
    if out.dtype.itemsize == 1 and out.stride(1) == 1:  # fp8 products need W contiguous along K
        dequantize_gptq_rows_triton(tensors, bits, checkpoint_format, out)
        return
    words, columns = tensors["qweight"].shape
    # A tile within one group reads each scale once: use the largest power of two that divides the group.
    tile = _MAX_TILE_WORDS if words_per_group is None else min(_MAX_TILE_WORDS, words_per_group & -words_per_group)
    grid = (triton.cdiv(columns, _TILE_COLUMNS), triton.cdiv(words, tile))
    gptq_kernel[grid](
        tensors["qweight"],
        tensors["qzeros"],
        tensors["scales"],
        tensors["g_idx"],
        out,
        words,
        columns,
        words_per_group or 1,
        *out.stride(),
        BITS=bits,
        ZERO_OFFSET=_zero_offset(bits, checkpoint_format),
        IN_ORDER=words_per_group is not None,
        WORDS=tile,
        COLUMNS=_TILE_COLUMNS,
    )


def dequantize_gptq_rows_triton(
    tensors: Mapping[str, torch.Tensor], bits: int, checkpoint_format: str, out: torch.Tensor
) -> None:
    """Dequantize into `out` [N, K], contiguous along K."""
    columns, inner = out.shape
    grid = (triton.cdiv(columns, _ROW_TILE[0]), triton.cdiv(inner, _ROW_TILE[1]))
    gptq_rows_kernel[grid](
        tensors["qweight"],
        tensors["qzeros"],
        tensors["scales"],
        tensors["g_idx"],
        out,
        columns,
        inner,
        out.stride(0),
        BITS=bits,
        ZERO_OFFSET=_zero_offset(bits, checkpoint_format),
        ROWS=_ROW_TILE[0],
        INNER=_ROW_TILE[1],
    )


def _zero_offset(bits: int, checkpoint_format: str) -> int:
    return ZERO_OFFSET[bits] if checkpoint_format == "gptq" else 0


@triton.jit
def gptq_kernel(
    qweight: tl.tensor,
    qzeros: tl.tensor,
    scales: tl.tensor,
    g_idx: tl.tensor,
    out: tl.tensor,
    words: tl.tensor,
    columns: tl.tensor,
    words_per_group: tl.tensor,
    stride_n: tl.tensor,
    stride_k: tl.tensor,
    BITS: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    IN_ORDER: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Dequantize a tile of WORDS x COLUMNS words, read once along N, to WORDS * 32/BITS rows of W^T."""
    codes_per_word: tl.constexpr = 32 // BITS
    mask: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(1) * WORDS + tl.arange(0, WORDS)[:, None]
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < words) & (n < columns)
    packed = tl.load(qweight + row.to(tl.int64) * columns + n, mask=inside, other=0)
    # Zeros are packed along N. Format v1 stores zero - 1; ZERO_OFFSET adds 1 to every code of the word, so that a
    # borrow between codes is undone.
    zero_words = qzeros + n // codes_per_word
    zero_shift = (n % codes_per_word) * BITS
    if IN_ORDER:
        group = tl.program_id(1) * WORDS // words_per_group
        scale = tl.load(scales + group * columns + n, mask=n < columns, other=0).to(tl.float32)
        zero = tl.load(zero_words + group * (columns // codes_per_word), mask=n < columns, other=0) + ZERO_OFFSET
        zero = (zero >> zero_shift) & mask
    for code_index in tl.static_range(codes_per_word):
        k = row * codes_per_word + code_index
        if not IN_ORDER:
            group = tl.load(g_idx + k, mask=row < words, other=0)
            scale = tl.load(scales + group * columns + n, mask=inside, other=0).to(tl.float32)
            zero = tl.load(zero_words + group * (columns // codes_per_word), mask=inside, other=0) + ZERO_OFFSET
            zero = (zero >> zero_shift) & mask
        code = (packed >> (code_index * BITS)) & mask
        value = (code - zero).to(tl.float32) * scale
        pointer = out + k.to(tl.int64) * stride_k + n.to(tl.int64) * stride_n
        tl.store(pointer, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gptq_rows_kernel(
    qweight: tl.tensor,
    qzeros: tl.tensor,
    scales: tl.tensor,
    g_idx: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    inner: tl.tensor,
    stride_n: tl.tensor,
    BITS: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """Dequantize a ROWS x INNER tile of W, written along K for fp8 products. Adjacent lanes read the same word."""
    codes_per_word: tl.constexpr = 32 // BITS
    mask: tl.constexpr = (1 << BITS) - 1
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.program_id(1) * INNER + tl.arange(0, INNER)[None, :]
    inside = (n < columns) & (k < inner)
    packed = tl.load(qweight + (k // codes_per_word).to(tl.int64) * columns + n, mask=inside, other=0)
    group = tl.load(g_idx + k, mask=k < inner, other=0)
    scale = tl.load(scales + group * columns + n, mask=inside, other=0).to(tl.float32)
    zero = (
        tl.load(qzeros + group * (columns // codes_per_word) + n // codes_per_word, mask=inside, other=0) + ZERO_OFFSET
    )
    zero = (zero >> ((n % codes_per_word) * BITS)) & mask
    value = (((packed >> ((k % codes_per_word) * BITS)) & mask) - zero).to(tl.float32) * scale
    tl.store(out + n.to(tl.int64) * stride_n + k, value.to(out.dtype.element_ty), mask=inside)
