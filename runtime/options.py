"""Options that every command takes when it loads a model: devices, memory, dtype.

A command parses its arguments into a frozen dataclass that contains a `ModelOptions`. The `argparse.Namespace` stays
in the command's module.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.common.errors import ConfigurationError
from runtime.conversations.rows.context import RowOptions
from runtime.conversations.rows.shapes import FORMATS
from runtime.execution.devices import DeviceNames, MemoryLimits
from runtime.execution.placement import plan_placement
from runtime.execution.placement_plan import PlacementPlan
from runtime.modeling.precision import PRECISIONS
from runtime.scorer import Scorer


@dataclass(frozen=True)
class ModelOptions:
    """Where a model is placed and in which dtype it computes; see `Scorer.from_pretrained` for the fields.

    Raises:
        ConfigurationError: `token_budget` is below 1.
    """

    devices: DeviceNames = "auto"
    memory: MemoryLimits | None = None
    dtype: str = "auto"
    token_budget: int | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        if self.token_budget is not None and self.token_budget < 1:
            raise ConfigurationError(f"--token-budget is {self.token_budget}; it must be at least 1.")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ModelOptions:
        """The values of the flags that `add_model_arguments` added."""
        return cls(arguments.devices, arguments.memory, arguments.dtype, arguments.token_budget, arguments.stream)

    def plan(self, checkpoint: Checkpoint, default_token_budget: int | None = None) -> PlacementPlan:
        """Plan the placement of `checkpoint`.

        Args:
            default_token_budget: used when `token_budget` is None, in place of the planner's choice.

        Raises:
            ConfigurationError: as `plan_placement`.
        """
        return plan_placement(
            checkpoint,
            devices=self.devices,
            memory=self.memory,
            dtype=self.dtype,
            token_budget=self.token_budget or default_token_budget,
            stream=self.stream,
        )

    def load(self, source: str | Path) -> Scorer:
        """Open `source` and load it with these options.

        Raises:
            CheckpointError, ConfigurationError: as `Scorer.from_pretrained`.
        """
        checkpoint = open_checkpoint(source)
        return Scorer(checkpoint, self.plan(checkpoint))


ROW_ARGUMENTS = ("format", "columns", "lenient")


def add_row_arguments(group: argparse._ArgumentGroup) -> None:
    """Add `--format`, `--columns` and `--lenient`."""
    group.add_argument(
        "--format", choices=FORMATS, metavar="NAME", help="format of the rows (default: recognised from their keys)"
    )
    group.add_argument(
        "--columns",
        metavar="NAMES",
        help="columns of other names, such as prompt=question,chosen=a,rejected=b",
    )
    group.add_argument(
        "--lenient", action="store_true", help="render tool calls and images as text (default: the row gets an error)"
    )


def read_row_options(arguments: argparse.Namespace) -> RowOptions:
    """The values of the flags that `add_row_arguments` added.

    Raises:
        ConfigurationError: `--columns` is not of the form NAME=COLUMN,NAME=COLUMN.
    """
    columns: dict[str, str] = {}
    for each in (arguments.columns or "").split(",") if arguments.columns else ():
        name, separator, column = (part.strip() for part in each.partition("="))
        if not separator or not name or not column or name in columns:
            raise ConfigurationError(
                f"--columns is {arguments.columns!r}; NAME=COLUMN,NAME=COLUMN was expected, such as prompt=question."
            )
        columns[name] = column
    return RowOptions(arguments.format, columns, arguments.lenient)


def add_model_arguments(group: argparse._ArgumentGroup, token_budget_help: str = "") -> None:
    """Add `--devices`, `--memory`, `--stream`, `--dtype` and `--token-budget`.

    Args:
        token_budget_help: appended to the help of `--token-budget`.
    """
    group.add_argument(
        "--devices",
        default="auto",
        metavar="NAMES",
        help="auto (default), cpu, or GPUs separated by commas, such as cuda:0,cuda:1; the blocks are split over them",
    )
    group.add_argument(
        "--memory",
        metavar="SIZES",
        help="memory limit per device, such as cuda:0=20GiB,cpu=40GiB, where cpu is host memory (default: 90%% of what "
        "is free); blocks that do not fit are streamed",
    )
    group.add_argument(
        "--stream",
        action="store_true",
        help="keep no block in memory: read every block from disk for every batch, which takes the least memory",
    )
    group.add_argument(
        "--dtype",
        "--compute",  # a second name for users who look for fp8
        choices=("auto", *PRECISIONS),
        default="auto",
        help="dtype of matmul inputs (default: bfloat16 on GPUs and on CPUs that multiply it faster, else float32); "
        "fp8 needs 4-bit GPTQ weights and a GPU of Ada or later; it changes scores, run `python -m runtime.parity` to "
        "see by how much",
    )
    group.add_argument(
        "--token-budget",
        type=int,
        metavar="N",
        help=f"tokens per batch (default: chosen from device and memory){token_budget_help}",
    )
