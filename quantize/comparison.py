"""The parity report of a finished sweep, and the reference scores kept with the checkpoint."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from quantize.inputs import Inputs
from quantize.outcome import Outcome, parity_pairs
from runtime.architecture import DTYPES
from runtime.parity_report import BlockError, ParityReport, Subject, Thresholds, measure_parity
from runtime.reference import ReferenceScores
from runtime.version import kit_version


def compare(
    inputs: Inputs, outcome: Outcome, blocks: list[dict[str, Any]], arguments: Namespace
) -> ParityReport | None:
    """Hold the quantized scores of the parity pairs against the reference's; None without pairs."""
    if not inputs.sample.parity:
        return None
    return measure_parity(
        parity_pairs(outcome, inputs.sample),
        _subject(inputs),
        block_errors=[_block_error(block) for block in blocks],
        repair=outcome.repair.figures() if outcome.repair else None,
        notes=[*inputs.notes, *inputs.sample.notes, *_solver_notes(blocks)],
        thresholds=Thresholds(min_agreement=arguments.min_agreement, max_shift=arguments.max_shift),
    )


def reference_scores(inputs: Inputs, outcome: Outcome) -> ReferenceScores:
    """Scores of the unquantized model for every row of the run, by rendered tokens."""
    sample = inputs.sample
    rows = [row.rendered for row in sample.calibration]
    rows += [rendered for pair in sample.parity for rendered in (pair.chosen, pair.rejected)]
    scores = {row.key: float(score) for row, score in zip(rows, outcome.reference, strict=True)}
    return ReferenceScores(inputs.checkpoint.name, inputs.recipe.model, _reference_dtype(inputs), scores)


def _subject(inputs: Inputs) -> Subject:
    recipe = inputs.recipe
    return Subject(
        model=inputs.checkpoint.name,
        method=recipe.method,
        bits=recipe.bits,
        bits_per_weight=inputs.plan.bits_per_weight,
        group_size=recipe.group_size,
        reference_dtype=_reference_dtype(inputs),
        kit_version=kit_version(),
        settings=recipe.choices(),
    )


def _reference_dtype(inputs: Inputs) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return f"{names[inputs.checkpoint.architecture.dtype]} weights, {inputs.recipe.dtype} arithmetic"


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
        notes.append(f"{dead} input features were always zero in calibration; their weights became zero")
    return list(dict.fromkeys(notes))
