"""Print a placement plan as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from runtime.common.terminal import format_size
from runtime.conversations.scoring_rule import ScoringRule
from runtime.execution.placement_plan import DeviceShare, PlacementPlan


def print_placement(plan: PlacementPlan, rule: ScoringRule, console: Console) -> None:
    """Print which device holds which blocks, how they are computed, and which token is scored."""
    table = Table(title="Placement", title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for name, value in placement_rows(plan, rule):
        table.add_row(name, value)
    console.print(table)


def placement_rows(plan: PlacementPlan, rule: ScoringRule) -> list[tuple[str, str]]:
    """Rows (name, value) of the table."""
    rows = [("placement", _describe_placement(plan))]
    rows += [(share.device.name, _describe_share(share)) for share in plan.shares]
    weights = "dequantized once and kept" if plan.keep_dequantized else "as stored"
    return [
        *rows,
        ("weights", f"{weights}; products in {plan.precision.name}"),
        ("tokens", f"{plan.token_budget:,} at once"),
        ("scored at", rule.description),
    ]


def _describe_placement(plan: PlacementPlan) -> str:
    names = " and ".join(share.device.name for share in plan.shares)
    if plan.placement == "resident":
        return f"resident: all blocks on {names}"
    if plan.placement == "split":
        return f"split by layer over {names}"
    source = "host memory" if plan.source == "host" else "disk"
    prefetch = "the next block read ahead" if plan.block_buffers == 2 else "no block read ahead"
    return f"streamed: blocks go through {names} from {source}, {prefetch}"


def _describe_share(share: DeviceShare) -> str:
    streamed = len(share.blocks) - len(share.resident)
    blocks = f"blocks {share.blocks[0]} to {share.blocks[-1]}"
    if streamed:
        blocks = f"{len(share.resident)} blocks stay, {streamed} are streamed"
    return f"{blocks}; {format_size(share.nbytes)} of {format_size(share.device.budget)}"
