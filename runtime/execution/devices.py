"""Find the devices that a model may use and their memory budgets; measure their matmul rate."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import psutil
import torch

from runtime.common.errors import ConfigurationError
from runtime.common.terminal import parse_size

HOST = "cpu"
FREE_MEMORY_FRACTION = 0.9  # of the memory free now: other processes' use varies, and allocators round up

DeviceNames = str | Sequence[str]
MemoryLimits = str | Mapping[str, str | int]


@dataclass(frozen=True)
class Device:
    """A device and the memory that a model may use on it.

    Attributes:
        name: `cpu`, `cuda:N`, or `cpu:N`, a simulated device that computes on the CPU with a memory budget of its own.
        budget: bytes that may be used.
    """

    name: str
    budget: int

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return self.name.partition(":")[0]

    @property
    def is_host(self) -> bool:
        """Whether its memory is host memory."""
        return self.name == HOST

    @property
    def torch_device(self) -> torch.device:
        """The torch device that computes; `cpu` for simulated devices."""
        return torch.device(self.name if self.kind == "cuda" else "cpu")


@dataclass(frozen=True)
class DeviceSelection:
    """The devices that a placement may use.

    Attributes:
        selected: in the order they were named; for `auto` by memory budget, largest first.
        host: the host memory, whether or not the CPU computes.
        use_all: whether every selected device must be used; if False, the placement uses as few as possible.
    """

    selected: tuple[Device, ...]
    host: Device
    use_all: bool

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return self.selected[0].kind


def find_devices(names: DeviceNames = "auto", memory: MemoryLimits | None = None) -> DeviceSelection:
    """Resolve device names and give each device a memory budget.

    Args:
        names: `auto`, or device names as a list or separated by commas.
        memory: budget per device, such as `{"cuda:0": "20GiB"}` or `cuda:0=20GiB,cpu=40GiB`; `cpu` is host memory. A
            device that is not listed gets 90 % of its free memory.

    Raises:
        ConfigurationError: a device does not exist, or a name or size is malformed.
    """
    budgets = parse_memory(memory)
    selected = [names] if isinstance(names, str) else list(names)
    selected = [name.strip() for each in selected for name in each.split(",")]
    automatic = selected == ["auto"]
    if automatic:
        selected = [f"cuda:{index}" for index in range(cuda_device_count())] or [HOST]
    selected = [_canonical(name) for name in selected]
    _check_names(selected)
    unused = sorted(budgets.keys() - {*selected, HOST})
    if unused:
        raise ConfigurationError(
            f"memory is given for {unused[0]}, which is not among the devices {', '.join(selected)}; "
            "add it to the devices, or remove its limit."
        )
    devices = [Device(name, budgets.get(name) or _free_memory(name)) for name in selected]
    if automatic:
        devices.sort(key=lambda device: -device.budget)
    return DeviceSelection(tuple(devices), Device(HOST, budgets.get(HOST) or _free_memory(HOST)), not automatic)


def parse_memory(memory: MemoryLimits | None) -> dict[str, int]:
    """Parse memory limits into bytes per device.

    Raises:
        ConfigurationError: the text is not of the form `cuda:0=20GiB,cpu=40GiB`, or a size is malformed or 0.
    """
    if memory is None:
        return {}
    if isinstance(memory, str):
        parts = [part.strip().partition("=") for part in memory.split(",")]
        memory = {name: size for name, _, size in parts}
    budgets = {}
    for name, size in memory.items():
        budgets[_canonical(name)] = nbytes = parse_size(str(size))
        if not nbytes:
            raise ConfigurationError(f"memory is {str(size)!r}; sizes such as cuda:0=20GiB or cpu=500MB were expected.")
    return budgets


def is_device_available(name: str) -> bool:
    """Whether this machine has the device `cpu` or `cuda:N`."""
    return name == "cpu" or int(name.removeprefix("cuda:")) < cuda_device_count()


def cuda_device_count() -> int:
    """Number of CUDA devices that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def used_devices() -> list[str]:
    """The CUDA devices on which this process has allocated tensors; `["cpu"]` without any."""
    return [f"cuda:{index}" for index in range(cuda_device_count()) if torch.cuda.max_memory_allocated(index)] or [
        "cpu"
    ]


def device_context(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current CUDA device: Triton launches on the current device, wherever the tensors are.

    For CUDA it also turns off reduced-precision reduction of bf16 matmuls, for the whole process and permanently.
    Otherwise cuBLAS may add partial sums in bf16.
    """
    if device.type != "cuda":
        return nullcontext()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.cuda.device(device)


def matmul_rate(dtype: torch.dtype, device: str, seconds: float = 0.2) -> float:
    """Measure the FLOP/s of a large square matrix product, for about `seconds`."""
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a  # warm up
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        b = a @ a
        b[0, 0].item()  # synchronize
        done += 1
    return 2.0 * size**3 * done / (time.perf_counter() - start)


def _canonical(name: str) -> str:
    return "cuda:0" if name == "cuda" else name


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
            raise ConfigurationError(
                f"devices has {name!r}; auto, cpu, cuda:N, or several separated by commas were expected."
            )
        if name.startswith("cuda:") and int(name[5:]) >= (count := cuda_device_count()):
            raise ConfigurationError(f"{name}: this machine has {count} CUDA devices that torch can use; try cpu.")
    if len({*names}) < len(names):
        raise ConfigurationError(f"devices is {','.join(names)}; name each device once.")
    if len({name.partition(":")[0] for name in names}) > 1:
        raise ConfigurationError(
            f"devices is {','.join(names)}; GPUs and CPU cannot be mixed, since the GPU would wait for the CPU. Name "
            "the GPUs alone; blocks that do not fit on them are streamed."
        )
    if HOST in names and len(names) > 1:
        raise ConfigurationError(f"devices is {','.join(names)}; cpu is all of the CPU, so name it alone.")


def _free_memory(name: str) -> int:
    if not name.startswith("cuda"):
        return int(FREE_MEMORY_FRACTION * psutil.virtual_memory().available)
    torch.cuda.empty_cache()  # so that memory cached for a deleted model counts as free
    return int(FREE_MEMORY_FRACTION * torch.cuda.mem_get_info(name)[0])
