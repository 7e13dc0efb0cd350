"""Options of every command that loads a model: where it computes, and in what."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.errors import PlanError
from runtime.scorer import Scorer


def add_machine(group: argparse._ArgumentGroup, budget_remark: str = "") -> None:
    """Add `--devices`, `--dtype` and `--token-budget`; `budget_remark` ends the help of the last."""
    group.add_argument("--devices", default="auto", metavar="NAMES", help="auto (default), cpu, or cuda:0 and so on")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="inputs of matrix products (default: bfloat16 on cuda and on a cpu that multiplies it natively, else "
        "float32)",
    )
    group.add_argument(
        "--token-budget",
        type=int,
        metavar="N",
        help=f"tokens computed at once (default: the scorer's choice){budget_remark}",
    )


def check_machine(arguments: argparse.Namespace) -> None:
    """Raise PlanError for a value that cannot be."""
    if arguments.token_budget is not None and arguments.token_budget < 1:
        raise PlanError(f"--token-budget is {arguments.token_budget}; at least 1 was expected.")


def load_scorer(source: str | Path, arguments: argparse.Namespace) -> Scorer:
    """A checkpoint loaded as the options say."""
    chosen = {} if arguments.token_budget is None else {"token_budget": arguments.token_budget}
    return Scorer.from_pretrained(source, devices=arguments.devices, dtype=arguments.dtype, **chosen)
