"""What the GPTQ solver may be told, and the group size a model can take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.errors import PlanError

SMALLEST_GROUP = 16


@dataclass(frozen=True)
class GPTQSettings:
    """Defaults give the best result that every GPTQ reader takes; each idea can be switched off.

    activation_order: quantize the columns with the largest mean square input first. Without `desc_act`
        the groups stay k // group_size, so `g_idx` stays in order and a reader pays nothing.
    static_groups: choose all scales before the solve, from the original weights; otherwise each group's
        from its updated weights when the solver enters it, which needs groups that are solved one by one.
    desc_act: form the groups along the activation order; `g_idx` is then a permutation's.
    importance_scales: search each scale for the least squared error, each weight's counted at what it costs
        at the output, instead of taking min-max.
    refine_passes: how often all codes, and the scales of groups of up to 1,024 columns, are visited after the solve.
    damp_percent: this fraction of the Hessian's mean diagonal is added to the diagonal.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    damp_percent: float = 0.01
    static_groups: bool = True
    activation_order: bool = True
    importance_scales: bool = True
    refine_passes: int = 3
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise PlanError(f"bits is {self.bits}; the GPTQ formats that readers share are 4 and 8.")
        if self.group_size != -1 and self.group_size < 1:
            raise PlanError(f"group_size is {self.group_size}; give a positive size, or -1 for one group a row.")
        if not 0 <= self.damp_percent <= 1:
            raise PlanError(f"damp_percent is {self.damp_percent}; it is a fraction between 0 and 1.")
        if self.refine_passes < 0:
            raise PlanError(f"refine_passes is {self.refine_passes}; 0 or more were expected.")
        if self.desc_act and not self.activation_order:
            raise PlanError("desc_act needs activation_order: its groups are formed along that order.")
        if self.activation_order and not self.desc_act and not self.static_groups and self.group_size != -1:
            raise PlanError(
                "activation_order visits the groups interleaved, so scales cannot wait until a group is "
                "entered; keep static_groups, or set desc_act, or switch activation_order off."
            )


def usable_group_size(wanted: int, in_features: Iterable[int]) -> tuple[int, str | None]:
    """The largest of wanted, wanted/2, wanted/4, ... that divides every layer's width.

    Returns:
        (group size, a sentence for the report or None). -1, one group a row, stays; it is also what is left
        where nothing down to 16 divides.
    """
    widths = sorted(set(in_features))
    size = wanted
    while size >= SMALLEST_GROUP and any(width % size for width in widths):
        size //= 2
    if wanted == -1 or size == wanted:
        return wanted, None
    culprit = next(width for width in widths if width % wanted)
    if size < SMALLEST_GROUP:
        return -1, f"group size {wanted} does not divide a width of {culprit}; each row became one group."
    return size, f"group size {wanted} does not divide a width of {culprit}; {size} was used."
