"""Options of every command that loads a model: where it computes, and in what."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.errors import PlanError
from runtime.numerics import NUMERICS
from runtime.placement import Plan, make_plan
from runtime.scorer import Scorer


def add_machine(group: argparse._ArgumentGroup, budget_remark: str = "") -> None:
    """Add `--devices` to `--token-budget`; `budget_remark` ends the help of the last."""
    group.add_argument(
        "--devices",
        default="auto",
        metavar="NAMES",
        help="auto (default), cpu, or GPUs with commas between, as in cuda:0,cuda:1; each holds some of the blocks",
    )
    group.add_argument(
        "--memory",
        metavar="SIZES",
        help="what may be used, as in cuda:0=20GiB,cpu=40GiB, where cpu is the host's (default: most of what is free); "
        "blocks that do not fit are brought in whenever they are needed",
    )
    group.add_argument(
        "--stream",
        action="store_true",
        help="hold no block: read each from disk whenever it is needed, which takes the least memory",
    )
    group.add_argument(
        "--dtype",
        "--compute",  # a name for those who come for fp8
        choices=("auto", *NUMERICS),
        default="auto",
        help="inputs of matrix products (default: bfloat16 on cuda and on a cpu that is faster in it, else float32); "
        "fp8 is for GPTQ weights of 4 bits on GPUs since Ada; it moves scores, `python -m runtime.parity` says how far",
    )
    group.add_argument(
        "--token-budget",
        type=int,
        metavar="N",
        help=f"tokens computed at once (default: by device and memory){budget_remark}",
    )


def check_machine(arguments: argparse.Namespace) -> None:
    """Raise PlanError for a value that cannot be."""
    if arguments.token_budget is not None and arguments.token_budget < 1:
        raise PlanError(f"--token-budget is {arguments.token_budget}; at least 1 was expected.")


def plan_scorer(checkpoint: Checkpoint, arguments: argparse.Namespace, token_budget: int | None = None) -> Plan:
    """Where the options put the blocks; `token_budget` counts where they name none."""
    return make_plan(
        checkpoint,
        devices=arguments.devices,
        memory=arguments.memory,
        dtype=arguments.dtype,
        token_budget=arguments.token_budget or token_budget,
        stream=arguments.stream,
    )


def load_scorer(source: str | Path, arguments: argparse.Namespace) -> Scorer:
    """A checkpoint loaded as the options say."""
    checkpoint = open_checkpoint(source)
    return Scorer(checkpoint, plan_scorer(checkpoint, arguments))
