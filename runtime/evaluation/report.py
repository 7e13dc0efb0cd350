"""The parity report: the schema of parity.json, and reading it.

`comparison.measure_parity` makes a report. Its parts come from `metrics`, `breakdowns` and `worst_pairs`; `verdict` and
`report_files` present it. It has no timestamp, so identical scores give identical bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, field_validator

from runtime.checkpoints.model_config import ModelConfig
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.errors import KitError
from runtime.common.version import kit_version
from runtime.evaluation.breakdowns import BenchmarkAccuracy, GroupMetrics
from runtime.evaluation.metrics import Estimate, ParityMetrics
from runtime.evaluation.scored_pair import ScoredPair, ScoredPairWithTexts

SCHEMA_VERSION = 1
JSON_FILE = "parity.json"


class Subject(BaseModel):
    """The model under test and its reference.

    Attributes:
        model: label of the model under test. In a report of the quantization itself, the model that was quantized.
        method: `gptq`, `rtn`, `nf4`, `int8`, or `unquantized`.
        group_size: -1 without groups.
        reference: name of the reference model.
        reference_dtype: dtypes of the reference run, such as `bfloat16 weights, float32 arithmetic`.
        settings: of the quantization and of this run, for display.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    method: str
    bits: int | float  # whole numbers stay whole in parity.json
    bits_per_weight: float
    group_size: int = -1
    reference: str = "the unquantized model"
    reference_dtype: str
    kit_version: str
    settings: dict[str, JsonValue] = {}

    @classmethod
    def from_configs(
        cls,
        model: str,
        model_config: ModelConfig,
        quantization: QuantizationConfig | None,
        *,
        method: str | None = None,
        reference: str = "the unquantized model",
        reference_dtype: str,
        settings: Mapping[str, JsonValue],
    ) -> Subject:
        """Describe a model from its checkpoint's configs; `method` defaults to how the weights are stored."""
        weight_bits = 8 * model_config.dtype.itemsize
        return cls(
            model=model,
            method=method or (quantization.method if quantization else "unquantized"),
            bits=quantization.nominal_bits(model_config) if quantization else weight_bits,
            bits_per_weight=quantization.bits_per_weight(model_config) if quantization else weight_bits,
            group_size=quantization.group_size if quantization else -1,
            reference=reference,
            reference_dtype=reference_dtype,
            kit_version=kit_version(),
            settings=dict(settings),
        )


class BlockError(BaseModel):
    """Error of one quantized block's output, and of its linear layers.

    Attributes:
        mean_error, max_error: over conversations, of ||quantized - reference|| / ||reference|| of the hidden states at
            the scored token.
        linear_losses: relative loss by linear layer.
        sqnr: signal-to-quantization-noise ratio in dB by linear layer; None if the layer was quantized without error.
    """

    model_config = ConfigDict(frozen=True)

    block: int
    mean_error: float
    max_error: float
    linear_losses: dict[str, float] = {}
    sqnr: dict[str, float | None] = {}

    @field_validator("sqnr")
    @classmethod
    def _infinite_sqnr_to_none(cls, sqnr: dict[str, float | None]) -> dict[str, float | None]:
        return {name: None if ratio == math.inf else ratio for name, ratio in sqnr.items()}


class Thresholds(BaseModel):
    """Limits that decide whether a report passes; None sets no limit.

    Attributes:
        min_agreement: lowest accepted pair agreement, 0 to 1.
        max_shift: highest accepted mean absolute shift, in standard deviations of the reference scores.
    """

    model_config = ConfigDict(frozen=True)

    min_agreement: float | None = None
    max_shift: float | None = None


class ThresholdResult(BaseModel):
    """One limit, the measured value, and whether the limit is met. An undefined value (None) does not meet it."""

    model_config = ConfigDict(frozen=True)

    name: Literal["min_agreement", "max_shift"]
    limit: float
    value: float | None
    met: bool


class ParityReport(BaseModel):
    """The content of parity.json.

    Attributes:
        reference_mean, reference_std: of the reference scores of all conversations.
        reference_accuracy: share of pairs whose chosen response gets the higher reference score.
        figures: metrics of the quantized model.
        noise_floor: metrics of the unquantized model with all arithmetic in bf16; None if not measured.
        before_repair: metrics with the original score head; None if the head was not recalibrated.
        by_style: breakdowns by `length` and `markdown`.
        block_errors: only in the report that quantization writes.
        repair: how the score head was recalibrated; None if it was not.
        worst: the pairs whose margin changed most, with texts.
        scores: all pairs, without texts.
        benchmarks: evaluations that were added later.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    subject: Subject
    reference_mean: float
    reference_std: float
    reference_accuracy: Estimate
    figures: ParityMetrics
    noise_floor: ParityMetrics | None
    before_repair: ParityMetrics | None
    by_margin: list[GroupMetrics]
    by_area: list[GroupMetrics]
    by_category: list[GroupMetrics]
    by_style: dict[str, list[GroupMetrics]]
    thresholds: list[ThresholdResult]
    block_errors: list[BlockError]
    repair: dict[str, JsonValue] | None
    notes: list[str]
    worst: list[ScoredPairWithTexts]
    scores: list[ScoredPair]
    benchmarks: list[BenchmarkAccuracy] = []

    @property
    def passed(self) -> bool:
        """Whether every threshold is met; True without thresholds."""
        return all(threshold.met for threshold in self.thresholds)

    def with_benchmark(self, added: BenchmarkAccuracy) -> ParityReport:
        """A copy with an evaluation in place of an earlier one on the same benchmark."""
        others = [each for each in self.benchmarks if each.title != added.title]
        return self.model_copy(update={"benchmarks": [*others, added]})

    def to_json(self) -> str:
        """The report as indented JSON; `read_report` restores it unchanged."""
        return self.model_dump_json(indent=2) + "\n"


def check_thresholds(figures: ParityMetrics, thresholds: Thresholds) -> list[ThresholdResult]:
    """Check the metrics against every limit that is set."""
    results = []
    if (limit := thresholds.min_agreement) is not None:
        value = figures.agreement.value
        met = value is not None and value >= limit
        results.append(ThresholdResult(name="min_agreement", limit=limit, value=value, met=met))
    if (limit := thresholds.max_shift) is not None:
        value = figures.mean_shift.value
        met = value is not None and value <= limit
        results.append(ThresholdResult(name="max_shift", limit=limit, value=value, met=met))
    return results


def _finite(text: str) -> float:
    """The number, which a report writes as null if it is not finite."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.20} is no finite number")
    return value


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def read_report(path: str | Path) -> ParityReport:
    """Read a parity.json.

    Raises:
        KitError: the file is not a parity report, or has another schema version.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite, parse_int=_whole)
        version = content["schema_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise KitError(f"{path} is not a parity report ({error!r}); pass a parity.json of this kit.") from error
    if version != SCHEMA_VERSION:
        raise KitError(f"{path}: schema_version is {version!r}, this kit reads {SCHEMA_VERSION}; measure parity again.")
    try:
        return ParityReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first_error = error.errors()[0]
        location = ".".join(map(str, first_error["loc"]))
        raise KitError(f"{path}: {location}: {first_error['msg']}; measure parity again.") from error
