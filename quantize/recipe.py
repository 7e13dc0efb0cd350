"""Everything that decides the bytes of a quantized checkpoint, and so may not change on resuming."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from quantize.settings import GPTQSettings
from runtime.errors import JobError, PlanError
from runtime.quantization import Quantization

METHODS = ("gptq", "nf4", "int8", "rtn")
# What to say of fields that hold a fingerprint.
_FINGERPRINTS = {
    "model": "the model differs (--model)",
    "conversations": "the conversations differ (--calibration, --rows, --parity-pairs, --max-tokens or --seed)",
}


@dataclass(frozen=True)
class Recipe:
    """The arguments and inputs of one quantization.

    Attributes:
        model: fingerprint of the 16-bit checkpoint.
        conversations: fingerprint of the rendered calibration and parity rows.
        method: `gptq`, `nf4`, `int8` (bitsandbytes LLM.int8) or `rtn` (round to nearest, the baseline).
        scored_share: share of a row's Hessian weight that its scored token carries; 0 weighs all alike.
        correction: ask linears for what the reference gives, not for what their inputs would give unrounded.
        token_budget: tokens a batch; it decides the order of sums.
        dtype: matmul inputs, `float32` or `bfloat16`.
    """

    model: str
    conversations: str
    method: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    damp_percent: float
    static_groups: bool
    activation_order: bool
    importance_scales: bool
    refine_passes: int
    scored_share: float
    correction: bool
    token_budget: int
    dtype: str
    device: str
    repair: bool

    def __post_init__(self) -> None:
        if not 0 <= self.scored_share < 1:
            raise PlanError(f"scored_share is {self.scored_share}; it is a fraction, at least 0 and below 1.")
        self.settings()  # refuses what the solver cannot do

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at activations."""
        return self.method == "gptq"

    def choices(self) -> dict[str, Any]:
        """What was chosen, without the fingerprints of what was read: for reports and cards."""
        return {name: value for name, value in asdict(self).items() if name not in ("model", "conversations")}

    def settings(self) -> GPTQSettings:
        """The solver's part."""
        names = {field.name for field in fields(GPTQSettings)}
        return GPTQSettings(**{name: value for name, value in asdict(self).items() if name in names})

    def quantization(self) -> Quantization:
        """The stored format's part. Round-to-nearest is stored as GPTQ is."""
        if self.method in ("nf4", "int8"):
            return Quantization(method=self.method, bits=self.bits)  # type: ignore[arg-type]
        return Quantization(
            method="gptq",
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            desc_act=self.desc_act,
            damp_percent=self.damp_percent,
        )

    def refuse_changes(self, recorded: dict[str, Any], where: str) -> None:
        """Compare with the recipe that a job was started with.

        Raises:
            JobError: naming each argument that differs, with both values.
        """
        now = asdict(self)
        if recorded.keys() != now.keys():
            raise JobError(
                f"{where} was started by a version of the kit with other arguments "
                f"({', '.join(sorted(recorded.keys() ^ now.keys()))}); finish it with that version, or start afresh in "
                "another --output."
            )
        changes = [
            _FINGERPRINTS.get(name, f"{name} was {recorded[name]!r} and is now {value!r}")
            for name, value in now.items()
            if recorded[name] != value
        ]
        if changes:
            raise JobError(
                f"{where} was started with other arguments: {'; '.join(changes)}. Resume with the first ones, "
                "or start afresh in another --output."
            )
