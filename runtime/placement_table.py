"""A placement as a table, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from runtime.placement import Plan, Share
from runtime.sizes import show_size


def print_placement(plan: Plan, console: Console) -> None:
    """Print what lives where."""
    table = Table(title="Placement", title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for name, value in placement_rows(plan):
        table.add_row(name, value)
    console.print(table)


def placement_rows(plan: Plan) -> list[tuple[str, str]]:
    """(name, value) of each line of the plan."""
    rows = [("placement", _placement(plan))]
    rows += [(share.device.name, _share(share)) for share in plan.shares]
    weights = "dequantized once and kept" if plan.keep else "as stored"
    return [
        *rows,
        ("weights", f"{weights}; products in {plan.numerics.name}"),
        ("tokens", f"{plan.token_budget:,} at once"),
    ]


def _placement(plan: Plan) -> str:
    names = " and ".join(share.device.name for share in plan.shares)
    if plan.placement == "resident":
        return f"resident: all blocks on {names}"
    if plan.placement == "split":
        return f"split by layer over {names}"
    source = "host memory" if plan.source == "host" else "disk"
    ahead = "the next block read ahead" if plan.buffers == 2 else "no block read ahead"
    return f"streamed: blocks go through {names} from {source}, {ahead}"


def _share(share: Share) -> str:
    streamed = len(share.blocks) - len(share.resident)
    blocks = f"blocks {share.blocks[0]} to {share.blocks[-1]}"
    if streamed:
        blocks = f"{len(share.resident)} blocks stay, {streamed} are streamed"
    return f"{blocks}; {show_size(share.nbytes)} of {show_size(share.device.budget)}"
