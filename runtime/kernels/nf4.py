"""NF4 weights: each code's table value times its block's absmax, block after block through [N, K]."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from runtime.kernels.gptq import find_triton
from runtime.kernels.pieces import at_once, pieces
from runtime.packing import nf4_absmax_at, nf4_offset
from runtime.quantization import NF4_BLOCKSIZE
from runtime.workspace import Workspace


class NF4Weight:
    """bitsandbytes NF4, with or without double quantization; twin: `dequantize_nf4`.

    Beside the packed tensors it holds the 256 pairs of values that a byte can mean.
    """

    transposed = False

    def __init__(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]):
        """`tensors` are a weight [N, K] = `shape` as `Quantization.linear_tensors` lists them.

        Raises:
            CheckpointError: as `nf4_state`.
        """
        self.tensors, self.shape = tensors, shape
        self.codes, self.table = tensors["weight"].flatten(), tensors["weight.quant_map"]
        self.nested_offset = nf4_offset(tensors, shape)

    @cached_property
    def _pairs(self) -> Tensor:
        """int64 [256]: both fp32 values of a byte as one number, its high nibble's first. One look-up for two."""
        return torch.cartesian_prod(self.table, self.table).view(torch.int64).flatten()

    def write(self, out: Tensor) -> None:
        """Dequantize into `out` [N, K], of any strides, rounding once to its dtype."""
        flat = out if out.is_contiguous() else torch.empty(self.shape, dtype=out.dtype, device=out.device)
        if out.is_cuda and find_triton():
            from runtime.kernels.triton_nf4 import write_nf4

            write_nf4(self, flat.view(-1))
        else:
            self._write_pieces(flat.view(-1))
        if flat is not out:
            out.copy_(flat)

    def _write_pieces(self, out: Tensor) -> None:
        """Into out [N*K]."""
        space = Workspace.of(out.device)
        absmax = nf4_absmax_at(self.tensors, self.nested_offset)[:, None]
        for blocks in pieces(len(absmax), at_once(NF4_BLOCKSIZE, out.device)):
            codes = self.codes[blocks.start * NF4_BLOCKSIZE // 2 : blocks.stop * NF4_BLOCKSIZE // 2]
            index = space.take("index", (len(codes),), torch.int32).copy_(codes)
            values = space.take("values", (blocks.stop - blocks.start, NF4_BLOCKSIZE), torch.float32)
            looked_up = values.view(torch.int64).view(-1)[: len(codes)]  # a last block may be shorter
            torch.index_select(self._pairs, 0, index, out=looked_up)
            values *= absmax[blocks]
            part = out[blocks.start * NF4_BLOCKSIZE : blocks.stop * NF4_BLOCKSIZE]
            part.copy_(values.view(-1)[: len(part)])
