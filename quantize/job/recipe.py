"""The recipe of a job: everything that determines the bytes of the packed checkpoint, unchanged on resuming."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from quantize.solver.settings import GPTQSettings
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.errors import ConfigurationError, JobError

_FINGERPRINT_CHANGES = {
    "model": "the model differs (--model)",
    "errors_of": "the variant differs (--errors-of)",
    "conversations": "the conversations differ (--calibration, --rows, --parity-pairs, --max-tokens or --seed)",
}
# Fields whose flags have another name: fields are keys in job.json and parity.json and keep their names.
_LABELS = {"refine_passes": "descent_passes", "repair": "recalibration"}


@dataclass(frozen=True)
class Recipe:
    """The arguments and input fingerprints of one quantization. Field names are keys in job.json and parity.json.

    Attributes:
        model: fingerprint of the 16-bit checkpoint.
        conversations: fingerprint of the rendered calibration and parity rows.
        method: `gptq`, `nf4`, `int8` (bitsandbytes LLM.int8) or `rtn` (round to nearest, the baseline).
        calibrated: whether calibration activations are used: always for gptq, never for int8 and rtn.
        bits: 4 or 8, or a number between: the average of linears with 4 bits and finer ones.
        errors_of: fingerprint of the variant whose errors tell which linears get more bits; empty if none was given.
        refine_passes: coordinate descent passes after the GPTQ solve.
        score_gradients: weight tokens and outputs by the gradients of the scores.
        scored_share: without `score_gradients`, share of a row's Hessian weight that its scored token gets; 0 for equal
            token weights.
        correction: correct target weights for the quantization error of earlier layers.
        token_budget: tokens per batch; it determines the order of sums.
        dtype: dtype of matmul inputs, `float32` or `bfloat16`.
        repair: whether the score head is recalibrated.

    Raises:
        ConfigurationError: a value is out of range, or as `GPTQSettings`.
    """

    model: str
    conversations: str
    method: str
    calibrated: bool
    bits: float
    errors_of: str
    group_size: int
    sym: bool
    desc_act: bool
    damp_percent: float
    static_groups: bool
    activation_order: bool
    importance_scales: bool
    refine_passes: int
    score_gradients: bool
    scored_share: float
    correction: bool
    token_budget: int
    dtype: str
    device: str
    repair: bool

    def __post_init__(self) -> None:
        if not 0 <= self.scored_share < 1:
            raise ConfigurationError(f"--scored-share is {self.scored_share}; it must be at least 0 and below 1.")
        if not 4 <= self.bits <= 8:
            raise ConfigurationError(f"--bits is {self.bits:g}; it must be at least 4 and at most 8.")
        if self.mixed and not self.score_gradients:
            raise ConfigurationError(
                f"--bits is {self.bits:g}, which gives more bits to the linears that move the scores most: that needs "
                "--method gptq with score gradients. Choose --bits 4 or 8, or drop --no-score-gradients."
            )
        self.settings(self.quantization())  # validates the solver's values
        if self.score_gradients and not self.static_groups:
            raise ConfigurationError(
                "--no-static-groups cannot choose scales with score gradients; add --no-score-gradients."
            )

    def choices(self) -> dict[str, Any]:
        """All fields except the fingerprints, for the report and the model card."""
        return {name: value for name, value in asdict(self).items() if name not in _FINGERPRINT_CHANGES}

    @property
    def mixed(self) -> bool:
        """Whether linears are stored with different numbers of bits or group sizes."""
        return self.bits not in (4, 8)

    def settings(self, quantization: QuantizationConfig) -> GPTQSettings:
        """The GPTQ solver's settings for a linear that is stored as `quantization`."""
        names = {field.name for field in fields(GPTQSettings)}
        shared = {name: value for name, value in asdict(self).items() if name in names}
        if quantization.method == "gptq":
            shared |= {"bits": quantization.bits, "group_size": quantization.group_size}
        return GPTQSettings(**shared, nf4=self.method == "nf4", descent_passes=self.refine_passes)

    def quantization(self) -> QuantizationConfig:
        """The stored format, with the bits of most linears if they are mixed; `rtn` is stored in GPTQ's."""
        bits = 4 if self.mixed else int(self.bits)
        if self.method in ("nf4", "int8"):
            return QuantizationConfig(method=self.method, bits=bits)  # type: ignore[arg-type]
        return QuantizationConfig(
            method="gptq",
            bits=bits,
            group_size=self.group_size,
            sym=self.sym,
            desc_act=self.desc_act,
            damp_percent=self.damp_percent,
            static_groups=self.static_groups,
        )

    def check_unchanged(self, recorded: dict[str, Any], where: str) -> None:
        """Compare this recipe with the `recorded` one of a started job.

        Args:
            where: the job, for messages.

        Raises:
            JobError: an argument differs; the message names each of them with both values.
        """
        now = asdict(self)
        if recorded.keys() != now.keys():
            raise JobError(
                f"{where} was started by a version of the kit with other arguments "
                f"({', '.join(sorted(recorded.keys() ^ now.keys()))}); finish it with that version, or start a new job "
                "in another --output."
            )
        changes = [
            _FINGERPRINT_CHANGES.get(name, f"{_LABELS.get(name, name)} was {recorded[name]!r} and is now {value!r}")
            for name, value in now.items()
            if recorded[name] != value
        ]
        if changes:
            raise JobError(
                f"{where} was started with other arguments: {'; '.join(changes)}. Resume with the original "
                "arguments, or start a new job in another --output."
            )
