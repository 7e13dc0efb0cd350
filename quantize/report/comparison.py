"""The parity report, and the reference scores that are stored with the checkpoint."""

from __future__ import annotations

from typing import Any

from quantize.job.inputs import JobInputs
from quantize.report.scores import FinalScores, parity_pairs
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.evaluation.comparison import measure_parity
from runtime.evaluation.reference_scores import ReferenceScores, describe_precision
from runtime.evaluation.report import BlockError, ParityReport, Subject, Thresholds


def build_parity_report(
    inputs: JobInputs,
    quantization: QuantizationConfig,
    final_scores: FinalScores,
    blocks: list[dict[str, Any]],
    thresholds: Thresholds,
) -> ParityReport | None:
    """Compare the quantized scores of the parity pairs with the reference scores; None if there are no pairs.

    Args:
        quantization: of the packed checkpoint.
        blocks: metrics of all blocks, from the job's log.
    """
    if not inputs.sample.parity:
        return None
    return measure_parity(
        parity_pairs(final_scores, inputs.sample),
        _subject(inputs, quantization),
        block_errors=[_block_error(block) for block in blocks],
        repair=final_scores.recalibration.summary() if final_scores.recalibration else None,
        notes=[*inputs.notes, *inputs.sample.notes, *_solver_notes(blocks)],
        thresholds=thresholds,
    )


def reference_scores(inputs: JobInputs, final_scores: FinalScores) -> ReferenceScores:
    """Scores of the unquantized model for all calibration and parity rows, keyed by rendered tokens."""
    sample = inputs.sample
    rows = [row.rendered for row in sample.calibration]
    rows += [rendered for pair in sample.parity for rendered in (pair.chosen, pair.rejected)]
    scores = {row.key: float(score) for row, score in zip(rows, final_scores.reference, strict=True)}
    return ReferenceScores(
        inputs.checkpoint.name, inputs.recipe.model, describe_precision(inputs.checkpoint, inputs.recipe.dtype), scores
    )


def _subject(inputs: JobInputs, quantization: QuantizationConfig) -> Subject:
    commit = inputs.checkpoint.commit
    return Subject.from_configs(
        inputs.checkpoint.name,
        inputs.checkpoint.model_config,
        quantization,
        method=inputs.recipe.method,
        reference_dtype=describe_precision(inputs.checkpoint, inputs.recipe.dtype),
        settings=inputs.recipe.choices() | ({"base_commit": commit} if commit else {}),
    )


def _block_error(block: dict[str, Any]) -> BlockError:
    linears = block["linears"]
    return BlockError(
        block=block["block"],
        mean_error=block["hidden_error_mean"],
        max_error=block["hidden_error_max"],
        linear_losses={name: each["relative_loss"] for name, each in linears.items()},
        sqnr={name: each["sqnr_db"] for name, each in linears.items()},
    )


def _solver_notes(blocks: list[dict[str, Any]]) -> list[str]:
    notes = [note for block in blocks for linear in block["linears"].values() for note in linear["notes"]]
    dead = sum(linear["dead_columns"] for block in blocks for linear in block["linears"].values())
    if dead:
        notes.append(f"{dead} input features were 0 on all calibration tokens; their weights were set to 0")
    return list(dict.fromkeys(notes))
