"""Settings of the GPTQ solver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.common.errors import ConfigurationError

MIN_GROUP_SIZE = 16


@dataclass(frozen=True)
class GPTQSettings:
    """The defaults keep to the format that every GPTQ reader supports; docs/decisions.md has their ablation.

    Attributes:
        nf4: round to NF4's levels in blocks of 64, and not to a uniform grid with `bits`, `group_size` and `sym`.
        group_size: input columns per scale, -1 for all.
        desc_act: form the groups in activation order, so that `g_idx` is permuted.
        damp_percent: fraction of each diagonal entry of the Hessian that is added to it.
        activation_order: quantize the columns with the largest mean square input first. Without `desc_act` the groups
            stay k // group_size, so `g_idx` stays sorted and readers lose no speed.
        importance_scales: search for the scales with the least weighted squared error instead of taking min-max.

    Raises:
        ConfigurationError: a value is out of range, or two settings contradict each other.
    """

    nf4: bool = False
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    damp_percent: float = 0.05
    activation_order: bool = True
    importance_scales: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigurationError(
                f"--bits is {self.bits}; it must be 4 or 8, the widths that all GPTQ readers support."
            )
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigurationError(
                f"--group-size is {self.group_size}; it must be positive, or -1 for one group per row."
            )
        if not 0 <= self.damp_percent <= 1:
            raise ConfigurationError(f"--damp-percent is {self.damp_percent}; it must be between 0 and 1.")
        if self.desc_act and not self.activation_order:
            raise ConfigurationError(
                "--desc-act forms its groups in activation order, which --no-activation-order turns off; drop one."
            )


def usable_group_size(requested: int, in_features: Iterable[int]) -> tuple[int, str | None]:
    """Find the largest of requested, requested/2, requested/4, ... that divides every layer's input width.

    Returns:
        (group size, note for the report or None). The group size is -1, one group per row, if -1 was requested or if
        no size of at least 16 divides all widths.
    """
    widths = sorted(set(in_features))
    size = requested
    while size >= MIN_GROUP_SIZE and any(width % size for width in widths):
        size //= 2
    if requested == -1 or size == requested:
        return requested, None
    culprit = next(width for width in widths if width % requested)
    if size < MIN_GROUP_SIZE:
        return -1, f"group size {requested} does not divide a width of {culprit}; each row became one group."
    return size, f"group size {requested} does not divide a width of {culprit}; {size} was used."
