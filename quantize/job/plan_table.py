"""Print a plan as a table."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from quantize.job.options import TOKENS_PER_INPUT
from quantize.job.plan import FP32_STAGES, QuantizationPlan, widest_input
from runtime.common.terminal import format_size
from runtime.conversations.scoring_rule import ScoringRule
from runtime.execution.devices import is_device_available, matmul_rate

OVERHEAD = 1.3  # of the measured time over floating-point operations divided by the matmul rate


def print_plan(
    plan: QuantizationPlan, model: str, output: Path, console: Console, rule: ScoringRule | None = None
) -> None:
    """Print disk, memory and time of the quantization; and which token is scored, if the template is at hand."""
    table = Table(title="Plan", title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for name, value in plan_rows(plan, model, output, rule):
        table.add_row(name, value)
    console.print(table)
    if warning := token_warning(plan):
        console.print(f"warning: {warning}", style="bold yellow")


def plan_rows(
    plan: QuantizationPlan, model: str, output: Path, rule: ScoringRule | None = None
) -> list[tuple[str, str]]:
    """Return (name, value) for each row of the table."""
    model_config, quantization, token_counts = plan.model_config, plan.quantization, plan.token_counts
    about = "about " if token_counts.estimated else ""
    group = f" in groups of {quantization.group_size}" if quantization.group_size > 0 else ""
    rows = [
        (
            "model",
            f"{model}: {model_config.num_hidden_layers} blocks, hidden {model_config.hidden_size}, "
            f"{plan.block_weights * model_config.num_hidden_layers / 1e9:.2f} G weights in blocks",
        ),
        *([("scored at", rule.description)] if rule else []),
        ("method", f"{quantization.method}, {plan.bits:g} bits{group}, {plan.bits_per_weight:.2f} bits a weight"),
        (
            "tokens",
            f"{about}{token_counts.calibration_tokens:,} for calibration"
            + (f" ({plan.tokens_per_input:.1f} per input of the widest linear)" if plan.gradients else "")
            + f", {about}{token_counts.parity_tokens:,} for parity",
        ),
        (
            "disk",
            f"reads {format_size(plan.disk_read)} {_times(plan.reads)}, writes {format_size(plan.disk_written)} and, "
            f"until the end, {format_size(plan.temporary_bytes)} of activations",
        ),
        (
            "activations",
            f"memory-mapped in {output / 'job' / 'streams'}; rewritten for every block, "
            f"{format_size(plan.temporary_writes)} in total",
        ),
        (
            "peak memory",
            f"{format_size(plan.peak_host_bytes)}, with the next block {'' if plan.prefetch else 'not '}read ahead",
        ),
    ]
    if plan.peak_gpu_bytes:
        rows.append(("peak on the GPU", f"{format_size(plan.peak_gpu_bytes)} on {plan.device}"))
    return [*rows, ("time", _time(plan)), ("output", str(output))]


def token_warning(plan: QuantizationPlan) -> str | None:
    """A warning if there are fewer calibration tokens than `TOKENS_PER_INPUT` for each input of the widest linear."""
    if plan.gradients is None or plan.tokens_per_input >= 0.9 * TOKENS_PER_INPUT:
        return None
    width = widest_input(plan.model_config)
    rank = ", so its Hessian is rank-deficient" if plan.tokens_per_input < 1 else ""
    return (
        f"{plan.token_counts.calibration_tokens:,} calibration tokens are {plan.tokens_per_input:.1f} for each of the "
        f"{width:,} inputs of the widest linear{rank}. Scores move less with {TOKENS_PER_INPUT} "
        f"({TOKENS_PER_INPUT * width:,} tokens): give more data with --calibration, or more --rows."
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _time(plan: QuantizationPlan) -> str:
    if not is_device_available(plan.device):
        return "not estimated: this machine has no such device"
    exact = matmul_rate(torch.float32, plan.device)
    rate = exact if plan.matmul_bytes == 4 else matmul_rate(torch.bfloat16, plan.device)
    seconds = sum(flops / (exact if stage in FP32_STAGES else rate) for stage, flops in plan.flops().items())
    rates = f"{rate / 1e12:.2g} TFLOP/s" + (f" ({exact / 1e12:.2g} in float32)" if rate != exact else "")
    whole = OVERHEAD * seconds * plan.model_config.num_hidden_layers
    return f"about {_duration(whole)} at {rates}, measured on this machine"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
