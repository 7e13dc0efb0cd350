"""The plan as a table, for people."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from quantize.plan import FP32_STAGES, Plan
from runtime.devices import is_here
from runtime.machine import matmul_rate
from runtime.sizes import show_size


def print_plan(plan: Plan, model: str, output: Path, console: Console) -> None:
    """Print what will be read, written, held and taken."""
    table = Table(title="Plan", title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for name, value in plan_rows(plan, model, output):
        table.add_row(name, value)
    console.print(table)


def plan_rows(plan: Plan, model: str, output: Path) -> list[tuple[str, str]]:
    """(name, value) of each line of the plan."""
    architecture, quantization, load = plan.architecture, plan.quantization, plan.load
    about = "about " if load.estimated else ""
    group = f" in groups of {quantization.group_size}" if quantization.group_size > 0 else ""
    rows = [
        (
            "model",
            f"{model}: {architecture.num_hidden_layers} blocks, hidden {architecture.hidden_size}, "
            f"{plan.block_weights * architecture.num_hidden_layers / 1e9:.2f} G weights in blocks",
        ),
        ("method", f"{quantization.method}, {quantization.bits} bits{group}, {plan.bits_per_weight:.2f} bits a weight"),
        ("tokens", f"{about}{load.calibration_tokens:,} to calibrate on, {about}{load.parity_tokens:,} to compare on"),
        (
            "disk",
            f"reads {show_size(plan.disk_read)} once, writes {show_size(plan.disk_written)} and, until the end, "
            f"{show_size(plan.stream_bytes)} of activations",
        ),
        ("activations", f"memory-mapped files in {output / 'job' / 'streams'}"),
        (
            "peak memory",
            f"{show_size(plan.host_peak)}, with the next block {'read ahead' if plan.prefetch else 'not read ahead'}",
        ),
    ]
    if plan.gpu_peak:
        rows.append(("peak on the GPU", f"{show_size(plan.gpu_peak)} on {plan.device}"))
    return [*rows, ("time", _time(plan)), ("output", str(output))]


def _time(plan: Plan) -> str:
    if not is_here(plan.device):
        return "not estimated: no such device here"
    exact = matmul_rate(torch.float32, plan.device)
    rate = exact if plan.matmul_bytes == 4 else matmul_rate(torch.bfloat16, plan.device)
    seconds = sum(work / (exact if stage in FP32_STAGES else rate) for stage, work in plan.work().items())
    rates = f"{rate / 1e12:.2g} TFLOP/s" + (f", {exact / 1e12:.2g} in float32," if rate != exact else "")
    whole = 1.3 * seconds * plan.architecture.num_hidden_layers
    return f"about {_duration(whole)} at the {rates} this machine multiplies at"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
