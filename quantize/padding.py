"""A GPTQ block with a wider MLP that computes the same: gate and up give 0 on the new width, and down ignores it.

Tensor-parallel engines hand each GPU whole groups of down_proj's inputs, and 29568, the 72B's width, has no two equal
halves of groups of 128. Stored words keep their bytes; words that mean exactly 0 follow them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from runtime.packing import gptq_zeros, pack_codes, pack_zeros
from runtime.quantization import Quantization

Tensors = dict[str, Tensor]

MARLIN_INPUTS = 128  # that a GPU's share of a linear must be a multiple of, whatever the group


def padded_size(size: int, group_size: int, tensor_parallel: int) -> int:
    """The next intermediate size that gives each of `tensor_parallel` GPUs whole groups and whole Marlin tiles."""
    step = math.lcm(MARLIN_INPUTS, max(group_size, 1)) * tensor_parallel
    return -(-size // step) * step


def pad_block(block: Tensors, quantization: Quantization, size: int) -> Tensors:
    """A GPTQ block, named as `Checkpoint.read_block` names it, with an intermediate size of `size`."""
    padded = dict(block)
    for linear, pad in (("mlp.gate_proj.", pad_outputs), ("mlp.up_proj.", pad_outputs), ("mlp.down_proj.", pad_inputs)):
        tensors = {name.removeprefix(linear): tensor for name, tensor in block.items() if name.startswith(linear)}
        padded |= {linear + suffix: tensor for suffix, tensor in pad(tensors, quantization, size).items()}
    return padded


def pad_outputs(tensors: Tensors, quantization: Quantization, outputs: int) -> Tensors:
    """A packed linear with `outputs` outputs, the new ones 0 whatever comes in. It has no bias."""
    bits, (groups, present) = quantization.bits, tensors["scales"].shape
    codes = _middle(len(tensors["g_idx"]), outputs - present, bits)
    zeros = _middle(groups, outputs - present, bits)
    return tensors | {
        "qweight": torch.cat([tensors["qweight"], pack_codes(codes, bits)], 1),
        "qzeros": torch.cat([tensors["qzeros"], pack_zeros(zeros, bits, quantization.checkpoint_format)], 1),
        "scales": torch.cat([tensors["scales"], tensors["scales"].new_zeros(zeros.shape)], 1),
    }


def pad_inputs(tensors: Tensors, quantization: Quantization, inputs: int) -> Tensors:
    """A packed linear with `inputs` inputs, of which it ignores the new ones.

    A group that is short is filled first: under its own scales, a code is 0 if it equals the group's zero.
    """
    bits, stored_as, (groups, outputs) = quantization.bits, quantization.checkpoint_format, tensors["scales"].shape
    more = _middle(quantization.groups(inputs) - groups, outputs, bits)
    zeros = torch.cat([gptq_zeros(tensors["qzeros"], bits, stored_as), more])
    group_size = inputs if quantization.group_size == -1 else quantization.group_size
    g_idx = torch.arange(len(tensors["g_idx"]), inputs, dtype=torch.int32) // group_size
    return tensors | {
        "qweight": torch.cat([tensors["qweight"], pack_codes(zeros[g_idx], bits)]),
        "qzeros": torch.cat([tensors["qzeros"], pack_zeros(more, bits, stored_as)]),
        "scales": torch.cat([tensors["scales"], tensors["scales"].new_zeros(more.shape)]),
        "g_idx": torch.cat([tensors["g_idx"], g_idx]),
    }


def _middle(rows: int, columns: int, bits: int) -> Tensor:
    """The code that symmetric readers take for 0; its scale is 0 too, for those that take another."""
    return torch.full((rows, columns), 1 << (bits - 1), dtype=torch.uint8)
