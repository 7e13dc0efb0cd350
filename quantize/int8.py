"""The stored half of LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): one scale an output row."""

from __future__ import annotations

import torch

from runtime.linear import Tensors

ROW_ORDER = 0  # bitsandbytes' `weight_format` for codes in row order, the only one it still writes


def quantize_int8(weight: torch.Tensor) -> Tensors:
    """`weight` int8, `SCB` fp32 and `weight_format`, as bitsandbytes' `Linear8bitLt` saves weight [N, K].

    Row n of the weight is code * SCB[n] / 127. The arithmetic is bitsandbytes' own
    (`int8_vectorwise_quant`), in fp32 where it would round the weight to fp16 first.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1)
    codes = (wide * (127.0 / scales.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round_()
    return {
        "weight": codes.clamp_(-127, 127).to(torch.int8),
        "SCB": scales,
        "weight_format": torch.tensor(ROW_ORDER, dtype=torch.uint8),
    }
