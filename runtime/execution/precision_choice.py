"""Choose the dtypes that a model computes in, from what the devices and the checkpoint support."""

from __future__ import annotations

import torch

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.model_config import BLOCK_LINEARS
from runtime.common.errors import ConfigurationError
from runtime.execution.devices import DeviceSelection, cuda_device_count
from runtime.modeling.fp8 import FLOAT8_SIZE_MULTIPLE
from runtime.modeling.precision import FLOAT32, PRECISIONS, Precision

AMPERE, ADA = (8, 0), (8, 9)
REQUIRED_CAPABILITY = {"bfloat16": (AMPERE, "Ampere"), "fp8": (ADA, "Ada")}
"""Per dtype: the lowest CUDA compute capability whose tensor cores multiply it, and that architecture's name."""


def choose_precision(dtype: str, selection: DeviceSelection) -> Precision:
    """The precision named `dtype`; for `auto`, bfloat16 if it is faster on every selected device, else float32.

    Raises:
        ConfigurationError: as `resolve_dtype`.
    """
    dtypes = [resolve_dtype(dtype, device.name) for device in selection.selected]
    return FLOAT32 if "float32" in dtypes else PRECISIONS[dtypes[0]]


def resolve_dtype(wanted: str, device: str) -> str:
    """Resolve `auto` to bfloat16 where the device multiplies it faster than float32, else to float32.

    Args:
        wanted: `auto` or a key of `PRECISIONS`.
        device: `cpu`, `cpu:N`, `cuda:N`, or `cuda` for all GPUs.

    Raises:
        ConfigurationError: the dtype is unknown, or the GPU does not support it.
    """
    if wanted not in ("auto", *PRECISIONS):
        raise ConfigurationError(f"dtype is {wanted!r}; one of {', '.join(PRECISIONS)} was expected.")
    if device.startswith("cpu"):
        fast = _cpu_is_faster_in_bfloat16()
    else:
        capability = _min_capability(device)
        fast = capability >= AMPERE
        required, architecture = REQUIRED_CAPABILITY.get(wanted, ((0, 0), ""))
        if capability < required:
            raise ConfigurationError(
                f"dtype is {wanted!r}, which needs compute capability {_format_capability(required)} ({architecture}) "
                f"or later; {device} has {_format_capability(capability)}, so use {'bfloat16' if fast else 'float32'}."
            )
    return wanted if wanted != "auto" else "bfloat16" if fast else "float32"


def check_precision(checkpoint: Checkpoint, precision: Precision) -> None:
    """Check that fp8, if chosen, can be computed with this checkpoint's weights.

    Raises:
        ConfigurationError: the weights are not 4-bit GPTQ, or a linear's size is not a multiple of 16.
    """
    if not precision.float8:
        return
    shapes = map(checkpoint.model_config.linear_shape, BLOCK_LINEARS)
    blocks = map(checkpoint.block_quantization, range(checkpoint.model_config.num_hidden_layers))
    found = {(each.method, each.bits) for block in blocks for each in (block or {}).values()}
    if found != {("gptq", 4)}:
        stored = " and ".join(f"{method}, {bits} bits" for method, bits in sorted(found)) or "not quantized"
        raise ConfigurationError(
            f"dtype is 'fp8', which needs 4-bit GPTQ weights; {checkpoint.directory} is {stored}, and fp8 would lose "
            "its extra precision, so use auto."
        )
    if odd := [size for shape in shapes for size in shape if size % FLOAT8_SIZE_MULTIPLE]:
        raise ConfigurationError(
            f"dtype is 'fp8', which needs linears whose sizes are multiples of {FLOAT8_SIZE_MULTIPLE}; "
            f"{checkpoint.directory} has one of {odd[0]}, so use auto."
        )


def _min_capability(device: str) -> tuple[int, int]:
    """Lowest compute capability of `cuda:N`, or of all GPUs for `cuda`; Ada's for a GPU that is not on this machine."""
    indices = [index for index in range(cuda_device_count()) if device in ("cuda", f"cuda:{index}")]
    return min(map(torch.cuda.get_device_capability, indices), default=ADA)


def _format_capability(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _cpu_is_faster_in_bfloat16() -> bool:
    """Decide from the CPU's instruction sets; a measurement could give another dtype, and other scores, next time.

    avx512_bf16 alone is not enough: with it AMD cores multiply bf16 at twice the rate of fp32, Intel cores at half the
    rate. Intel cores are fast with AMX, which virtual machines often hide. Only AMD cores have sse4a.
    """
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and cpu.get("sse4a")))
