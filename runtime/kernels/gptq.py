"""GPTQ weights of 4 and 8 bits, dequantized the way they are packed: transposed, [K, N].

A word holds codes of consecutive rows of W^T, so shifts of whole words give whole rows, with nothing to interleave,
and a group's scales are one contiguous row. A matrix product takes W^T as readily as W.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

from runtime.kernels.pieces import at_once, pieces
from runtime.packing import gptq_zeros
from runtime.quantization import Quantization
from runtime.workspace import Workspace


class GPTQWeight:
    """W[n, k] = scale[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k]; twin: `dequantize_gptq`.

    Beside the packed tensors it holds, on a CPU, the zeros in fp16: 2 bytes a group and output, 3 % of 4-bit weights
    in groups of 128.
    """

    transposed = True

    def __init__(self, tensors: Mapping[str, Tensor], quantization: Quantization, shape: tuple[int, int]):
        """`tensors` are qweight, qzeros, scales and g_idx of a weight [N, K] = `shape`."""
        self.qweight, self.qzeros = tensors["qweight"], tensors["qzeros"]
        self.scales, self.g_idx = tensors["scales"], tensors["g_idx"]
        self.bits, self.checkpoint_format = quantization.bits, quantization.checkpoint_format
        self.group_size = shape[1] if quantization.group_size == -1 else quantization.group_size

    @cached_property
    def words_per_group(self) -> int | None:
        """How many words a group is high; None where groups are permuted or begin within a word."""
        words, rest = divmod(self.group_size, 32 // self.bits)
        in_order = torch.arange(len(self.g_idx), device=self.g_idx.device) // self.group_size
        return None if rest or not torch.equal(self.g_idx, in_order.to(self.g_idx.dtype)) else words

    @cached_property
    def _negated_zeros(self) -> Tensor:
        return gptq_zeros(self.qzeros, self.bits, self.checkpoint_format).to(torch.float16).neg_()

    def write(self, out: Tensor) -> None:
        """Dequantize into `out` [N, K], of any strides, rounding once to its dtype."""
        if out.is_cuda and find_triton():
            from runtime.kernels.triton_gptq import write_gptq

            write_gptq(self, out)
        else:
            self._write_pieces(out.t())

    def _write_pieces(self, out: Tensor) -> None:
        """Into out [K, N]. code * scale - zero * scale is exact in fp32: 8 bits of a code times 11 of a scale."""
        (words, columns), per_word, device = self.qweight.shape, 32 // self.bits, out.device
        space, group = Workspace.of(device), self.words_per_group
        scales, offsets = (space.take(name, tuple(self.scales.shape), torch.float32) for name in ("scales", "offsets"))
        torch.mul(scales.copy_(self.scales), self._negated_zeros, out=offsets)
        for piece in pieces(words, at_once(per_word * columns, device), group or 1):
            codes = space.take("values", (piece.stop - piece.start, per_word, columns), torch.int32)
            torch.bitwise_right_shift(self.qweight[piece, None], _shifts(self.bits, device), out=codes)
            codes.bitwise_and_((1 << self.bits) - 1)
            values = codes.view(torch.float32).copy_(codes)  # in place: both are 4 bytes wide
            rows = slice(piece.start * per_word, piece.stop * per_word)
            if group is None:
                scale = _gathered(scales, self.g_idx[rows], space, "scale rows")
                offset = _gathered(offsets, self.g_idx[rows], space, "offset rows")
                values = values.view(-1, columns)
            else:
                groups = slice(piece.start // group, -(-piece.stop // group))
                scale, offset = scales[groups, None], offsets[groups, None]
                values = values.view(len(scale), -1, columns)
            torch.addcmul(offset, values, scale, out=values)
            out[rows].copy_(values.view(-1, columns))


def _gathered(table: Tensor, g_idx: Tensor, space: Workspace, name: str) -> Tensor:
    """fp32 [rows, N]: each row's own group of `table` [G, N]."""
    shape = (len(g_idx), table.shape[1])
    return torch.index_select(table, 0, g_idx, out=space.take(name, shape, torch.float32))


@cache
def find_triton() -> bool:
    """Whether Triton is installed: it comes with torch for CUDA, not with torch for CPUs."""
    return find_spec("triton") is not None


@cache
def _shifts(bits: int, device: torch.device) -> Tensor:
    """int32 [codes in a word, 1]: how far each is from the low end."""
    with torch.inference_mode(False):
        return torch.arange(0, 32, bits, dtype=torch.int32, device=device)[:, None]
