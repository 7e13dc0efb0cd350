"""The devices that a model may use, and how much of each one's memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import psutil
import torch

from runtime.errors import PlanError
from runtime.sizes import parse_size

HOST = "cpu"
FREE_SHARE = 0.9  # of what is free now; others take and give memory too, and allocators round up

Names = str | Sequence[str]
Memory = str | Mapping[str, str | int]


@dataclass(frozen=True)
class Device:
    """A place to compute.

    Attributes:
        name: `cpu`, `cuda:N`, or `cpu:N`: a share of the CPU that passes for a device with memory of its own.
        budget: bytes that may be used there.
    """

    name: str
    budget: int

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return self.name.partition(":")[0]

    @property
    def is_host(self) -> bool:
        """Whether its memory is the host's."""
        return self.name == HOST

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name if self.kind == "cuda" else "cpu")


@dataclass(frozen=True)
class Devices:
    """What was asked for, or found.

    Attributes:
        wanted: in order; for `auto` those with most memory first.
        host: the host's memory, whether or not it computes.
        all_needed: whether each of them is to be used; otherwise as few as will do.
    """

    wanted: tuple[Device, ...]
    host: Device
    all_needed: bool

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return self.wanted[0].kind


def find_devices(names: Names = "auto", memory: Memory | None = None) -> Devices:
    """Look the devices up, and what they have free where `memory` does not say what may be used.

    Args:
        names: `auto`, or devices as a list or with commas between them.
        memory: by device, as in `{"cuda:0": "20GiB"}` or `cuda:0=20GiB,cpu=40GiB`; `cpu` is the host's.

    Raises:
        PlanError: a device is not there, or a name or size cannot be read.
    """
    budgets = parse_memory(memory)
    wanted = [names] if isinstance(names, str) else list(names)
    wanted = [name.strip() for each in wanted for name in each.split(",")]
    automatic = wanted == ["auto"]
    if automatic:
        wanted = [f"cuda:{index}" for index in range(cuda_devices())] or [HOST]
    wanted = ["cuda:0" if name == "cuda" else name for name in wanted]
    _check_names(wanted)
    idle = sorted(budgets.keys() - {*wanted, HOST})
    if idle:
        raise PlanError(f"memory is given for {idle[0]}, which is not among the devices {', '.join(wanted)}; name it.")
    devices = [Device(name, budgets.get(name) or _free(name)) for name in wanted]
    if automatic:
        devices.sort(key=lambda device: -device.budget)
    return Devices(tuple(devices), Device(HOST, budgets.get(HOST) or _free(HOST)), not automatic)


def parse_memory(memory: Memory | None) -> dict[str, int]:
    """Bytes by device.

    Raises:
        PlanError: it is not of the form `cuda:0=20GiB,cpu=40GiB`, or a size is none.
    """
    if memory is None:
        return {}
    if isinstance(memory, str):
        parts = [part.strip().partition("=") for part in memory.split(",")]
        memory = {name: size for name, _, size in parts}
    budgets = {}
    for name, size in memory.items():
        budgets[_canonical(name)] = found = parse_size(str(size))
        if not found:
            raise PlanError(f"memory is {str(size)!r}; sizes such as cuda:0=20GiB or cpu=500MB were expected.")
    return budgets


def _canonical(name: str) -> str:
    return "cuda:0" if name == "cuda" else name


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
            raise PlanError(f"devices has {name!r}; auto, cpu, cuda:N, or several with commas were expected.")
        if name.startswith("cuda:") and int(name[5:]) >= (count := cuda_devices()):
            raise PlanError(f"{name}: this machine has {count} CUDA devices that torch can use; try cpu.")
    if len({*names}) < len(names):
        raise PlanError(f"devices is {','.join(names)}; name each device once.")
    if len({name.partition(":")[0] for name in names}) > 1:
        raise PlanError(
            f"devices is {','.join(names)}; a GPU would wait for the CPU there. Name the GPUs alone: what does not fit "
            "them is streamed."
        )
    if HOST in names and len(names) > 1:
        raise PlanError(f"devices is {','.join(names)}; cpu is all of the CPU, so name it alone.")


def is_here(name: str) -> bool:
    """Whether this machine has the device `cpu` or `cuda:N`."""
    return name == "cpu" or int(name.removeprefix("cuda:")) < cuda_devices()


def cuda_devices() -> int:
    """How many torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _free(name: str) -> int:
    if not name.startswith("cuda"):
        return int(FREE_SHARE * psutil.virtual_memory().available)
    torch.cuda.empty_cache()  # what torch keeps of a model that is gone is free too
    return int(FREE_SHARE * torch.cuda.mem_get_info(name)[0])


def at_work(device: torch.device) -> AbstractContextManager[object]:
    """What a thread computes in: Triton launches on the current GPU, wherever the tensors are.

    From then on the whole process sums bf16 products in fp32; cuBLAS may otherwise add parts of a long sum in bf16.
    """
    if device.type != "cuda":
        return nullcontext()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.cuda.device(device)
