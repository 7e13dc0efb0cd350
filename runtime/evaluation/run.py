"""Run the parity command, `python -m runtime.parity`: select pairs, score, compare, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from runtime.common.errors import ConfigurationError, NonFiniteError
from runtime.conversations.rows.context import RowOptions
from runtime.evaluation.comparison import VariantScores, build_parity_report, check_golden_scores
from runtime.evaluation.golden import GoldenResult, golden_conversations
from runtime.evaluation.pairs import (
    PARITY_PAIRS_FILE,
    PairReferenceScores,
    Selection,
    read_pairs,
    select_pairs,
    stored_pair_files,
)
from runtime.evaluation.reference_scores import REFERENCE_SCORES_FILE
from runtime.evaluation.report import Thresholds
from runtime.evaluation.side_by_side import (
    VariantResult,
    print_results,
    report_directories,
    results_to_dict,
    write_results,
)
from runtime.evaluation.variant import Variant, open_variants
from runtime.options import ModelOptions

RESUME_HINT = "the same command starts again."


@dataclass(frozen=True)
class ParityOptions:
    """Options of the parity command.

    Attributes:
        models: the checkpoints to compare.
        pairs: files of preference pairs; empty uses the parity_pairs.jsonl beside the models.
        reference: a checkpoint to score first; None uses the scores stored beside each model.
        golden: also check the golden scores.
        tolerance: largest accepted difference of a golden score; None uses `default_tolerance`.
        thresholds: limits that every report must meet.
        output: directory for the reports; None writes none.
        print_json: print the metrics as one JSON line.
        model_options: devices, memory and dtype.
        row_options: how the rows of `pairs` are read.

    Raises:
        ConfigurationError: `tolerance` without `golden`.
    """

    models: Sequence[str]
    pairs: Sequence[Path] = ()
    reference: str | None = None
    golden: bool = False
    tolerance: float | None = None
    thresholds: Thresholds = Thresholds()
    output: Path | None = None
    print_json: bool = False
    model_options: ModelOptions = ModelOptions()
    row_options: RowOptions = RowOptions()

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.golden:
            raise ConfigurationError("--tolerance applies to golden scores only; add --golden or omit it.")

    @property
    def reference_model_options(self) -> ModelOptions:
        """How the reference is scored. fp8 is a property of the models under test, so the reference never uses it."""
        return replace(self.model_options, dtype="auto") if self.model_options.dtype == "fp8" else self.model_options


def run(options: ParityOptions, console: Console) -> int:
    """Run the command and return its exit status: 0 if every model passes, else 1.

    Raises:
        KitError: a model, a file or an option cannot be used. All are checked before the first model is loaded.
    """
    # 1. Check models, pairs and output directories, and plan the placement of every model.
    opened = open_variants([*options.models, *([options.reference] if options.reference else [])])
    models, reference = opened[: len(options.models)], opened[-1] if options.reference else None
    directory_by_label = report_directories(options.output, models) if options.output else {}
    selection = choose_pairs(options, models, reference, console)
    for model in models:
        options.model_options.plan(model.checkpoint)  # for its errors; scoring plans again with the memory free by then

    # 2. Score with the reference, if one was given.
    measured = None
    if reference is not None:
        console.print(f"{reference.source}: scoring {2 * len(selection.pairs):,} conversations, as the reference")
        scored = score_variant(reference, selection, options.reference_model_options)
        measured = PairReferenceScores.from_run(reference, scored.scores, scored.arithmetic)

    # 3. Score with each model, one at a time in memory, and compare.
    results = [evaluate_model(model, selection, measured, options, console) for model in models]

    # 4. Print and write the results.
    print_results(results, console)
    if options.output:
        for path in write_results(results, options.output, directory_by_label):
            console.print(f"wrote {path}")
    if options.print_json:
        print(json.dumps(results_to_dict(results)))
    return 0 if all(result.passed for result in results) else 1


def choose_pairs(
    options: ParityOptions, models: Sequence[Variant], reference: Variant | None, console: Console
) -> Selection:
    """Select the pairs to compare on; none if only golden scores are checked.

    Raises:
        ConfigurationError: a model has no reference scores, or there are no pairs.
        ConversationError: the pairs cannot be read, or no pair can be used.
    """
    paths = options.pairs or stored_pair_files(models)
    if not paths and options.golden and reference is None:
        if not any(model.golden_name for model in models):
            names = ", ".join(model.label for model in models)
            raise ConfigurationError(f"{GoldenResult(model=names).message()}; pass --pairs.")
        return Selection([], {}, {})
    if not paths:
        raise ConfigurationError(f"no model has a {PARITY_PAIRS_FILE} beside it; pass --pairs.")
    for model in models:
        if reference is None and model.stored_reference is None:
            raise ConfigurationError(
                f"{model.checkpoint.directory} has no {REFERENCE_SCORES_FILE}, which quantization writes; pass "
                f"--reference to compare {model.label} with a checkpoint."
            )
    note = console.print if options.pairs else None  # the pairs beside a model have the kit's own format
    return select_pairs(read_pairs(paths, options.row_options, note), models, reference)


def evaluate_model(
    model: Variant, selection: Selection, measured: PairReferenceScores | None, options: ParityOptions, console: Console
) -> VariantResult:
    """Score one model and compare it with the reference and golden scores.

    Args:
        measured: scores of the reference checkpoint; None uses those stored beside `model`.
    """
    golden_count = len(golden_conversations(model.golden_name)) if options.golden else 0
    if not selection.pairs and not golden_count:
        return VariantResult(model, None, GoldenResult(model=model.label))
    console.print(f"{model.label}: scoring {2 * len(selection.pairs) + golden_count:,} conversations")
    variant_scores = score_variant(model, selection, options.model_options, golden=bool(golden_count))
    golden = check_golden_scores(model, variant_scores, options.tolerance) if options.golden else None
    if not selection.pairs:
        return VariantResult(model, None, golden)
    reference_scores = measured or PairReferenceScores.from_files(model, selection)
    report = build_parity_report(
        model,
        variant_scores,
        reference_scores,
        selection,
        golden,
        str(options.model_options.devices),
        options.thresholds,
    )
    return VariantResult(model, report, golden)


def score_variant(
    variant: Variant, selection: Selection, model_options: ModelOptions, *, golden: bool = False
) -> VariantScores:
    """Load a variant, score the selected pairs and, with `golden`, the model card's conversations, and free it.

    All conversations are scored in one call, so that a streamed model is read once.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    rendered = [each for pair in selection.rendered.get(variant.label, []) for each in pair]
    if golden:
        rendered += [variant.renderer.render(each) for each in golden_conversations(variant.golden_name)]
    scorer = model_options.load(variant.source)
    try:
        scores = scorer.scores(rendered)
    except NonFiniteError as error:
        raise NonFiniteError(f"{variant.label}: {error} Conversations are counted from 0, two per pair.") from error
    count = 2 * len(selection.pairs)
    return VariantScores(
        list(zip(scores[:count:2], scores[1:count:2], strict=True)),
        tuple(scores[count:]) or None,
        scorer.precision.product_dtype,
        scorer.token_budget,
    )
