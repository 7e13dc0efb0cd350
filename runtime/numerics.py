"""In which dtypes a block computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.devices import cuda_devices
from runtime.errors import PlanError


@dataclass(frozen=True)
class Numerics:
    """Dtypes of one way to compute.

    Attributes:
        stream: the residual stream and everything elementwise (norms, rotary embedding, SwiGLU).
        matmul: inputs of matrix products and attention; products accumulate in fp32.
        float8: whether weights and inputs of the blocks' linears are rounded to fp8 besides, as `runtime.float8` says.
    """

    stream: torch.dtype
    matmul: torch.dtype
    float8: bool = False

    @property
    def name(self) -> str:
        """What `--dtype` calls it."""
        return "fp8" if self.float8 else str(self.matmul).removeprefix("torch.")

    @property
    def products(self) -> torch.dtype:
        """What the blocks' linears multiply."""
        return torch.float8_e4m3fn if self.float8 else self.matmul


# A small model of this family carries activations near 1.5e4 in one channel at the scored token, where a
# bf16 residual loses what the head needs. So the stream is fp32 even when products are bf16.
FLOAT32 = Numerics(torch.float32, torch.float32)
BFLOAT16 = Numerics(torch.float32, torch.bfloat16)
FLOAT8 = Numerics(torch.float32, torch.bfloat16, float8=True)
# What a user gets from transformers with dtype=bfloat16: the noise floor that parity is held against.
PLAIN_BFLOAT16 = Numerics(torch.bfloat16, torch.bfloat16)

NUMERICS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "fp8": FLOAT8}
AMPERE, ADA = (8, 0), (8, 9)
GPUS = {"bfloat16": (AMPERE, "Ampere"), "fp8": (ADA, "Ada")}
"""Compute capability and name of the first that multiply it."""


def matmul_dtype(wanted: str, device: str) -> str:
    """`wanted`, or for `auto` bfloat16 where products in it are faster: on GPUs and CPUs that are built for it.

    Args:
        device: `cpu`, `cuda`, or one of several, `cpu:N` or `cuda:N`.

    Raises:
        PlanError: there is no such dtype, or none of it on this GPU.
    """
    if wanted not in ("auto", *NUMERICS):
        raise PlanError(f"dtype is {wanted!r}; one of {', '.join(NUMERICS)} was expected.")
    if device.startswith("cpu"):
        fast = _cpu_is_faster_in_bfloat16()
    else:
        capability = _least_capability(device)
        fast = capability >= AMPERE
        first, name = GPUS.get(wanted, ((0, 0), ""))
        if capability < first:
            raise PlanError(
                f"dtype is {wanted!r}, which GPUs multiply since compute capability {_dotted(first)} ({name}); "
                f"{device} has {_dotted(capability)}, so take {'bfloat16' if fast else 'float32'}."
            )
    return wanted if wanted != "auto" else "bfloat16" if fast else "float32"


def _least_capability(device: str) -> tuple[int, int]:
    """Of `cuda:N`, or of all GPUs; that of a GPU on another machine is taken to be enough."""
    meant = [index for index in range(cuda_devices()) if device in ("cuda", f"cuda:{index}")]
    return min(map(torch.cuda.get_device_capability, meant), default=ADA)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _cpu_is_faster_in_bfloat16() -> bool:
    """By its instructions and not by a stopwatch, which could say something else to the next run.

    avx512_bf16 alone is not enough: AMD's cores multiply bf16 at twice the rate of fp32 with it, Intel's at half that
    rate. Theirs are fast with AMX, which virtual machines often hide. No core but AMD's has sse4a.
    """
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and cpu.get("sse4a")))
