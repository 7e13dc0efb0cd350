"""GPTQ dequantization on a GPU. Imported only where there is Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from runtime.packing import ONES

if TYPE_CHECKING:
    from runtime.kernels.gptq import GPTQWeight

_MOST_WORDS, _COLUMNS = 16, 128  # a program's tile of words; its 128 x 128 4-bit weights are 32 KiB of bf16
_ROW_TILE = (32, 128)  # of W itself, where that is written


def write_gptq(weight: GPTQWeight, out: torch.Tensor) -> None:
    """Dequantize into `out` [N, K], fastest where out.t() is contiguous along N."""
    if out.dtype.itemsize == 1 and out.stride(1) == 1:  # for fp8 products
        write_gptq_rows(weight, out)
        return
    words, columns = weight.qweight.shape
    group = weight.words_per_group
    # A tile within one group reads each scale once: the largest power of two that divides a group.
    tile = _MOST_WORDS if group is None else min(_MOST_WORDS, group & -group)
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(words, tile))
    gptq_kernel[grid](
        weight.qweight,
        weight.qzeros,
        weight.scales,
        weight.g_idx,
        out,
        words,
        columns,
        group or 1,
        *out.stride(),
        BITS=weight.bits,
        ONES=_ones(weight),
        IN_ORDER=group is not None,
        WORDS=tile,
        COLUMNS=_COLUMNS,
    )


def write_gptq_rows(weight: GPTQWeight, out: torch.Tensor) -> None:
    """Dequantize into `out` [N, K], contiguous along K."""
    columns, inner = out.shape
    grid = (triton.cdiv(columns, _ROW_TILE[0]), triton.cdiv(inner, _ROW_TILE[1]))
    packed = (weight.qweight, weight.qzeros, weight.scales, weight.g_idx)
    gptq_rows_kernel[grid](*packed, out, columns, inner, out.stride(0), weight.bits, _ones(weight), *_ROW_TILE)


def _ones(weight: GPTQWeight) -> int:
    return ONES[weight.bits] if weight.checkpoint_format == "gptq" else 0


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
    ONES: tl.constexpr,
    IN_ORDER: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One tile of WORDS x COLUMNS words, read once along N, gives WORDS * 32/BITS rows of W^T."""
    per_word: tl.constexpr = 32 // BITS
    mask: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(1) * WORDS + tl.arange(0, WORDS)[:, None]
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < words) & (n < columns)
    packed = tl.load(qweight + row.to(tl.int64) * columns + n, mask=inside, other=0)
    # Zeros are packed along N. A word's ones are added to the word: v1 stores them less one, borrows and all.
    zero_words = qzeros + n // per_word
    zero_shift = (n % per_word) * BITS
    if IN_ORDER:
        group = tl.program_id(1) * WORDS // words_per_group
        scale = tl.load(scales + group * columns + n, mask=n < columns, other=0).to(tl.float32)
        zero = tl.load(zero_words + group * (columns // per_word), mask=n < columns, other=0) + ONES
        zero = (zero >> zero_shift) & mask
    for place in tl.static_range(per_word):
        k = row * per_word + place
        if not IN_ORDER:
            group = tl.load(g_idx + k, mask=row < words, other=0)
            scale = tl.load(scales + group * columns + n, mask=inside, other=0).to(tl.float32)
            zero = tl.load(zero_words + group * (columns // per_word), mask=inside, other=0) + ONES
            zero = (zero >> zero_shift) & mask
        code = (packed >> (place * BITS)) & mask
        value = (code - zero).to(tl.float32) * scale
        where = out + k.to(tl.int64) * stride_k + n.to(tl.int64) * stride_n
        tl.store(where, value.to(out.dtype.element_ty), mask=inside)


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
    ONES: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """One tile of W, ROWS x INNER, written along K, as fp8 products take it. Neighbours read the codes of one word."""
    per_word: tl.constexpr = 32 // BITS
    mask: tl.constexpr = (1 << BITS) - 1
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.program_id(1) * INNER + tl.arange(0, INNER)[None, :]
    inside = (n < columns) & (k < inner)
    packed = tl.load(qweight + (k // per_word).to(tl.int64) * columns + n, mask=inside, other=0)
    group = tl.load(g_idx + k, mask=k < inner, other=0)
    scale = tl.load(scales + group * columns + n, mask=inside, other=0).to(tl.float32)
    zero = tl.load(qzeros + group * (columns // per_word) + n // per_word, mask=inside, other=0) + ONES
    zero = (zero >> ((n % per_word) * BITS)) & mask
    value = (((packed >> ((k % per_word) * BITS)) & mask) - zero).to(tl.float32) * scale
    tl.store(out + n.to(tl.int64) * stride_n + k, value.to(out.dtype.element_ty), mask=inside)
