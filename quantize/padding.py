"""Pad the MLP of a packed GPTQ block to a larger intermediate size without changing its output.

Tensor-parallel engines give each GPU whole groups of down_proj's inputs. The 72B's 29568 inputs are 231 groups of 128,
which do not split evenly over two GPUs. Padded weights are exactly 0, and the packed words of existing weights keep
their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.kernels.reference import gptq_zeros, pack_codes, pack_zeros
from runtime.modeling.linear import Tensors

MARLIN_INPUTS = 128  # Marlin kernels need a multiple of 128 inputs per GPU for every group size


def padded_size(size: int, group_size: int, tensor_parallel: int) -> int:
    """Smallest intermediate size >= `size` that gives each of `tensor_parallel` GPUs whole groups and Marlin tiles."""
    step = math.lcm(MARLIN_INPUTS, max(group_size, 1)) * tensor_parallel
    return -(-size // step) * step


def pad_block(block: Tensors, quantizations: Mapping[str, QuantizationConfig], size: int) -> Tensors:
    """Pad a GPTQ block, named as by `Checkpoint.read_block`, to the intermediate size `size`.

    Args:
        quantizations: of each linear, by name.
    """
    padded = dict(block)
    for linear, pad in (("mlp.gate_proj", pad_outputs), ("mlp.up_proj", pad_outputs), ("mlp.down_proj", pad_inputs)):
        prefix = linear + "."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in block.items() if name.startswith(prefix)}
        padded |= {prefix + suffix: tensor for suffix, tensor in pad(tensors, quantizations[linear], size).items()}
    return padded


def pad_outputs(tensors: Tensors, quantization: QuantizationConfig, outputs: int) -> Tensors:
    """Pad a packed linear without bias to `outputs` outputs. The new outputs are always 0."""
    bits, (num_groups, present) = quantization.bits, tensors["scales"].shape
    codes = _zero_codes(len(tensors["g_idx"]), outputs - present, bits)
    zeros = _zero_codes(num_groups, outputs - present, bits)
    return tensors | {
        "qweight": torch.cat([tensors["qweight"], pack_codes(codes, bits)], 1),
        "qzeros": torch.cat([tensors["qzeros"], pack_zeros(zeros, bits, quantization.checkpoint_format)], 1),
        "scales": torch.cat([tensors["scales"], tensors["scales"].new_zeros(zeros.shape)], 1),
    }


def pad_inputs(tensors: Tensors, quantization: QuantizationConfig, inputs: int) -> Tensors:
    """Pad a packed linear to `inputs` inputs. The weights of the new inputs are 0.

    A short last group is filled first, with codes equal to its zero points; the other new groups have scale 0.
    """
    bits, stored_as, (num_groups, outputs) = quantization.bits, quantization.checkpoint_format, tensors["scales"].shape
    more = _zero_codes(quantization.num_groups(inputs) - num_groups, outputs, bits)
    zeros = torch.cat([gptq_zeros(tensors["qzeros"], bits, stored_as), more])
    group_size = inputs if quantization.group_size == -1 else quantization.group_size
    g_idx = torch.arange(len(tensors["g_idx"]), inputs, dtype=torch.int32) // group_size
    return tensors | {
        "qweight": torch.cat([tensors["qweight"], pack_codes(zeros[g_idx], bits)]),
        "qzeros": torch.cat([tensors["qzeros"], pack_zeros(more, bits, stored_as)]),
        "scales": torch.cat([tensors["scales"], tensors["scales"].new_zeros(more.shape)]),
        "g_idx": torch.cat([tensors["g_idx"], g_idx]),
    }


def _zero_codes(rows: int, columns: int, bits: int) -> Tensor:
    """Codes that symmetric readers dequantize to 0. Their scale is 0 as well, for readers that use another zero."""
    return torch.full((rows, columns), 1 << (bits - 1), dtype=torch.uint8)
