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
_LABELS = {"repair": "recalibration"}


@dataclass(frozen=True)
class Recipe:
    """The arguments and input fingerprints of one quantization. Field names are keys in job.json and parity.json.

    Attributes:
        model: fingerprint of the 16-bit checkpoint.
        conversations: fingerprint of the rendered calibration and parity rows.
        method: `gptq`, `nf4`, `int8` (bitsandbytes LLM.int8) or `rtn` (round to nearest, the baseline).
        calibrated: whether calibration rows are used, and so gradients: always for gptq, never for int8 and rtn.
        bits: 4 or 8, or a number between: the average of linears with 4 bits and finer ones.
        errors_of: fingerprint of the variant whose errors tell which linears get more bits; empty if none was given.
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
    activation_order: bool
    importance_scales: bool
    token_budget: int
    dtype: str
    device: str
    repair: bool

    def __post_init__(self) -> None:
        if not 4 <= self.bits <= 8:
            raise ConfigurationError(f"--bits is {self.bits:g}; it must be at least 4 and at most 8.")
        if self.mixed and self.method != "gptq":
            raise ConfigurationError(
                f"--bits is {self.bits:g}, which gives more bits to the linears that move the scores most: that needs "
                "--method gptq. Choose --bits 4 or 8, or drop --method."
            )
        self.settings(self.quantization())  # validates the solver's values

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
        return GPTQSettings(**shared, nf4=self.method == "nf4")

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
            static_groups=True,
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
