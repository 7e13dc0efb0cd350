"""NF4's grid for the GPTQ solver: searched absmax, stored as bitsandbytes stores it.

NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) rounds w / absmax to one of 16 levels, in blocks of 64 consecutive
weights of a row. bitsandbytes takes the largest magnitude of a block as its absmax and rounds each weight by itself.
A reader needs neither: it computes absmax * level[code]. So absmax can be searched as the scales of GPTQ are, and GPTQ
can choose the codes.

absmax is stored in 8 bits (double quantization), so it is fixed before the solve.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize.solver.scale_search import TINY
from runtime.checkpoints.quantization_config import NF4_BLOCKSIZE, NF4_NESTED_BLOCKSIZE
from runtime.modeling.linear import Tensors

SHRINKS = (0.6, 1.05)  # searched range of absmax, as a fraction of the largest magnitude
CANDIDATE_COUNT = 16
REFITS = 2  # rounds of alternating codes and least-squares absmax


def nf4_levels(device: torch.device | str) -> Tensor:
    """The 16 levels, fp32, ascending from -1 to 1."""
    import bitsandbytes.functional as bnb  # here, as in data_free.py

    return bnb.get_4bit_type("nf4", device=device)


def choose_absmax(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Any]:
    """Search absmax for weight [N, K], K a multiple of 64, and quantize it as bitsandbytes does.

    Args:
        importance: [K], weight of each column's squared error; None for equal weights.

    Returns:
        absmax as a reader computes it, fp32 [K / 64, N], and the quant state of bitsandbytes for `pack_nf4`.
    """
    import bitsandbytes.functional as bnb

    rows, columns = weight.shape
    levels = nf4_levels(weight.device)
    wanted = search_absmax(weight, importance, levels)
    offset = wanted.mean()
    stored, nested = bnb.quantize_blockwise(wanted.flatten() - offset, blocksize=NF4_NESTED_BLOCKSIZE)
    state = bnb.QuantState(
        absmax=stored,
        shape=torch.Size((rows, columns)),
        code=levels,
        blocksize=NF4_BLOCKSIZE,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=offset,
        state2=nested,
    )
    absmax = bnb.dequantize_blockwise(stored, nested) + offset
    return absmax.view(rows, columns // NF4_BLOCKSIZE).T.contiguous(), state


def pack_nf4(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensors:
    """The tensors that transformers reads, by suffix, of codes uint8 [K, N]; `dtype` is the one to dequantize to."""
    state.dtype = dtype
    pairs = codes.T.reshape(-1, 2)  # consecutive weights of a row, the first in the high bits
    stored = {"weight": (pairs[:, :1] << 4) | pairs[:, 1:]}
    stored |= {f"weight.{name}": each for name, each in state.as_dict(packed=True).items()}
    return {name: tensor.to(codes.device) for name, tensor in stored.items()}


def search_absmax(weight: Tensor, importance: Tensor | None, levels: Tensor) -> Tensor:
    """The absmax, fp32 [N, K / 64], with the least weighted squared error of each block of weight [N, K].

    As in `scale_search`: the least-squares absmax of the best candidate's codes is refined, and the best one is kept.
    """
    rows, columns = weight.shape
    blocks = columns // NF4_BLOCKSIZE
    importance = torch.ones(columns, device=weight.device) if importance is None else importance.float()
    importance = importance.view(blocks, NF4_BLOCKSIZE)
    importance = importance / importance.mean(dim=1, keepdim=True).clamp_min(TINY)
    result = torch.empty(rows, blocks, device=weight.device)
    shrinks = torch.linspace(*SHRINKS, CANDIDATE_COUNT, device=weight.device)
    rows_at_once = max(1, (2**24 if weight.is_cuda else 2**17) // columns)
    for start in range(0, rows, rows_at_once):
        chunk = weight[start : start + rows_at_once].float().view(-1, blocks, NF4_BLOCKSIZE)
        largest = chunk.abs().amax(dim=2).clamp_(min=TINY)
        best, least = largest, torch.full_like(largest, torch.inf)
        fitted = largest
        for candidate in (*(shrink * largest for shrink in shrinks), *[None] * REFITS):
            absmax = fitted if candidate is None else candidate
            error, refit = _error_and_fit(chunk, importance, absmax, levels)
            better = error < least
            best, least = torch.where(better, absmax, best), torch.where(better, error, least)
            fitted = torch.where(better, refit, fitted)
        result[start : start + rows_at_once] = best
    return result


def _error_and_fit(weight: Tensor, importance: Tensor, absmax: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted squared error of weight [R, G, 64] at absmax [R, G], and the least-squares absmax of its codes."""
    rounded = levels[torch.bucketize(weight / absmax[..., None], (levels[1:] + levels[:-1]) / 2)]
    weighted = rounded * importance
    across, square = (weighted * weight).sum(dim=2), (weighted * rounded).sum(dim=2)
    power = (weight.square() * importance).sum(dim=2)
    error = power - 2 * absmax * across + absmax.square() * square
    return error, torch.where(square > TINY, across / square.clamp_min(TINY), absmax).clamp_min(TINY)
