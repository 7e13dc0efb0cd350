"""The options of one quantization, as given on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import ConfigurationError
from runtime.common.hub import short_name
from runtime.conversations.rows.context import RowOptions

METHODS = ("gptq", "nf4", "int8", "rtn")
FIXED_BITS = {"nf4": 4, "int8": 8}
TOKENS_PER_INPUT = 8  # calibration tokens per input of the widest linear; a choice, not yet a measured knee
PARITY_PAIRS = 500  # an agreement of 98 % is then known to 1.2 points
DEMO_PARITY_PAIRS = 64


@dataclass(frozen=True)
class QuantizeOptions:
    """The arguments of one quantization. Flags and fields have the same names, except the `--no-...` flags.

    Attributes:
        model: directory, hub id or `demo`; None if --model was not given.
        errors_of: 4-bit variant of the model, a directory or hub id, whose errors tell which linears get more bits.
        output: directory of the packed checkpoint; None for the default.
        calibration: file or hub dataset of preference pairs; None for the bundled pairs.
        rows: number of calibration conversations; None for as many as give `TOKENS_PER_INPUT` tokens for each input of
            the widest linear.
        parity_pairs: number of held-out pairs; None for `DEMO_PARITY_PAIRS` or `PARITY_PAIRS`, or for as many as the
            data has.
        max_tokens: longer conversations are left out; None for the model's limit.
        row_options: how the rows of `calibration` are read.
        ram_budget: host memory limit in bytes; None for what is available.
        min_agreement, max_shift: thresholds of the parity report; None for no threshold.

    Raises:
        ConfigurationError: `rows` or `parity_pairs` is negative, or there are too few of them; or `errors_of` was given
            with 4 or 8 bits.
    """

    model: str | None
    bits: float
    errors_of: str | None
    method: str
    output: Path | None
    resume: bool
    dry_run: bool
    calibration: str | None
    rows: int | None
    parity_pairs: int | None
    max_tokens: int | None
    seed: int
    group_size: int
    sym: bool
    desc_act: bool
    damp_percent: float
    activation_order: bool
    importance_scales: bool
    recalibration: bool
    device: str
    dtype: str
    token_budget: int
    ram_budget: int | None
    min_agreement: float | None
    max_shift: float | None
    json: bool
    row_options: RowOptions = RowOptions()

    def __post_init__(self) -> None:
        for flag, count in (("--rows", self.rows), ("--parity-pairs", self.parity_pairs)):
            if count is not None and count < 0:
                raise ConfigurationError(f"{flag} is {count}; it must be at least 0.")
        if self.errors_of and self.bits in (4, 8):
            raise ConfigurationError(f"--errors-of tells where more bits go, but --bits is {self.bits}; try 4.5.")
        if self.rows == 0 and self.method == "gptq":
            raise ConfigurationError("--rows is 0, but gptq needs calibration rows; raise --rows or use --method nf4.")
        if self.rows == 0 and self.parity_pairs == 0:
            raise ConfigurationError("--rows and --parity-pairs are both 0; at least one must be positive.")

    @property
    def parity_pairs_wanted(self) -> int:
        """Number of held-out pairs to look for; fewer are an error only if --parity-pairs was given."""
        if self.parity_pairs is not None:
            return self.parity_pairs
        return DEMO_PARITY_PAIRS if self.source == "demo" else PARITY_PAIRS

    @property
    def source(self) -> str:
        """The model to quantize: a directory, a hub id or `demo`."""
        return self.model or "demo"

    @property
    def output_directory(self) -> Path:
        """`output`, or `output/NAME-METHOD`, with the number of bits if the method leaves it open."""
        if self.output is not None:
            return self.output
        name = f"{short_name(self.source).lower()}-{self.method}"
        return Path("output") / (name if self.method in FIXED_BITS else f"{name}-{self.bits:g}bit")
