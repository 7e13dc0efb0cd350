"""Check that a plan fits the disk, the host memory and the GPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from quantize.job.plan import QuantizationPlan
from runtime.common.errors import ConfigurationError
from runtime.common.terminal import format_size
from runtime.execution.devices import is_device_available


def fit_memory(plan: QuantizationPlan, budget: int | None) -> QuantizationPlan:
    """Return the plan, without prefetch if it fits only then.

    Args:
        budget: host memory limit in bytes; None for what is available now.

    Raises:
        ConfigurationError: the plan does not fit the host or the GPU; the message states what is needed.
    """
    limit = psutil.virtual_memory().available if budget is None else budget
    for prefetch in (True, False):
        candidate = replace(plan, prefetch=prefetch)
        if _needed(candidate, budget) <= limit:
            break
    else:
        raise ConfigurationError(_memory_message(candidate, budget, limit))
    _check_gpu(candidate)
    return candidate


def _needed(plan: QuantizationPlan, budget: int | None) -> int:
    """Host bytes that must be free. The kernel can drop mapped pages, so they count only against a given budget."""
    return plan.peak_host_bytes - (plan.mapped_bytes if budget is None else 0)


def _memory_message(plan: QuantizationPlan, budget: int | None, limit: int) -> str:
    without_states = plan.peak_host_bytes - plan.mapped_bytes
    tokens = int((limit - without_states) / max(1, plan.mapped_bytes) * plan.token_counts.tokens)
    remedy = (
        f"lower --rows and --parity-pairs (about {tokens:,} tokens would fit)"
        if tokens > 0
        else f"one block alone needs {format_size(without_states)}: use a machine with more memory"
    )
    source = "allowed by --ram-budget" if budget is not None else "available"
    return f"peak memory would be {format_size(_needed(plan, budget))}, but {format_size(limit)} is {source}; {remedy}."


def _check_gpu(plan: QuantizationPlan) -> None:
    if plan.device == "cpu" or not is_device_available(plan.device):
        return
    free = torch.cuda.mem_get_info(plan.device)[0]
    if plan.peak_gpu_bytes > free:
        raise ConfigurationError(
            f"{plan.device} has {format_size(free)} free, but one block needs {format_size(plan.peak_gpu_bytes)}; "
            "use --device cpu or a GPU with more memory."
        )


def check_disk(plan: QuantizationPlan, output: Path) -> None:
    """Raise ConfigurationError if the disk of `output` has no room for what the job has not written yet."""
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    needed = plan.disk_written + plan.temporary_bytes - written
    check_free_space(
        output, needed, "free some space, choose an --output on another disk, or lower --rows and --parity-pairs"
    )


def check_free_space(output: Path, nbytes: int, remedy: str) -> None:
    """Raise ConfigurationError, ending with `remedy`, if the disk of `output` has less than `nbytes` free."""
    existing = output
    while not existing.exists():
        existing = existing.parent
    if nbytes > (free := shutil.disk_usage(existing).free):
        raise ConfigurationError(
            f"{existing} has {format_size(free)} free, but {format_size(nbytes)} will be written; {remedy}."
        )
