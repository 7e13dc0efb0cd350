"""The options of `python -m runtime.score`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.batch.formats import OUTPUT_SUFFIXES
from runtime.common.errors import ConfigurationError
from runtime.conversations.rows.context import RowOptions
from runtime.options import ModelOptions


@dataclass(frozen=True)
class ScoreOptions:
    """What to score, with which model and engine, and where to write.

    Attributes:
        file: the input file, a directory of files, a pattern of their names, or ``-`` for JSONL on standard input.
        output: the output file; None for standard output.
        model: directory or hub id; None for the embedded demo model.
        resume: continue a partly written `output`.
        json: end with one line of JSON statistics.
        truncate: drop the oldest turns of conversations that are too long, instead of failing the row.
        strict: stop at the first row that cannot be scored.
        engine: score in this process, or on a Ray cluster.
        actors: number of Ray actors; None for one per GPU, or one per machine.
        row_options: how rows are read.
        escape_formulas: put an apostrophe before CSV cells that a spreadsheet takes for formulas.
        model_options: placement and dtype; with Ray, of each actor's model.

    Raises:
        ConfigurationError: options contradict each other, or a value is out of range.
    """

    file: str
    output: Path | None = None
    model: str | None = None
    resume: bool = False
    json: bool = False
    truncate: bool = False
    strict: bool = False
    engine: Literal["local", "ray"] = "local"
    actors: int | None = None
    model_options: ModelOptions = field(default_factory=ModelOptions)
    row_options: RowOptions = RowOptions()
    escape_formulas: bool = False

    def __post_init__(self) -> None:
        if self.output is None and self.resume:
            raise ConfigurationError("--resume was given without --output; name the output file to resume.")
        if self.output is not None and self.output.suffix not in OUTPUT_SUFFIXES:
            raise ConfigurationError(
                f"--output is {self.output}; a name that ends in {', '.join(OUTPUT_SUFFIXES)} was expected."
            )
        if self.output and Path(self.file).is_dir() and self.output.resolve().is_relative_to(Path(self.file).resolve()):
            raise ConfigurationError(
                f"--output is {self.output}, inside the directory of the input, where it would be read as input; "
                "choose another directory."
            )
        if self.escape_formulas and (self.output is None or self.output.suffix != ".csv"):
            raise ConfigurationError(
                f"--escape-formulas was given, but --output is {self.output or 'standard output'}; only cells of CSV "
                "can be formulas. Name a .csv file, or remove the option."
            )
        if self.actors is not None and self.engine != "ray":
            raise ConfigurationError("--actors was given without --engine ray; add --engine ray or remove --actors.")
        if self.actors is not None and self.actors < 1:
            raise ConfigurationError(f"--actors is {self.actors}; it must be at least 1.")
