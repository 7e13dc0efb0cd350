"""Compare scores computed here and now with reference scores: `python -m runtime.parity MODEL`.

`parity` is the story; `runtime.command` handles how a run can end.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
from pydantic import JsonValue
from rich.console import Console

from runtime.command import run_command
from runtime.errors import PlanError
from runtime.figures import spread
from runtime.golden import PUBLISHED, GoldenResult, usual_tolerance
from runtime.machine_arguments import plan_scorer
from runtime.parity_arguments import parse
from runtime.parity_pairs import FILE_NAME as PAIRS_FILE
from runtime.parity_pairs import Selection, read_pairs, select_pairs, stored_pairs
from runtime.parity_report import ParityReport, Thresholds, measure_parity
from runtime.reference import FILE_NAME as REFERENCE_FILE
from runtime.scored_pair import PairScores, Scores
from runtime.side_by_side import Result, print_results, report_directories, summarise, write_results
from runtime.variant import Variant, open_variants
from runtime.variant_run import Run, Yardstick, run_variant

WAY_ON = "no report was written; the same command starts again."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, parity, lambda _: WAY_ON, argv)


def parity(arguments: Namespace, console: Console) -> int:
    """The whole story: look at everything, score with the reference and each model, compare, say what came of it."""
    # 1. Look at models, pairs and the place for reports, before anything heavy happens.
    opened = open_variants([*arguments.models, *([arguments.reference] if arguments.reference else [])])
    models, reference = opened[: len(arguments.models)], opened[-1] if arguments.reference else None
    places = report_directories(arguments.output, models) if arguments.output else {}
    selection = choose_pairs(arguments, models, reference)
    for model in models:
        plan_scorer(model.checkpoint, arguments)  # what cannot be computed is refused before another has been

    # 2. Score with the reference, unless its scores are stored.
    measured = None
    if reference is not None:
        console.print(f"{reference.source}: scoring {2 * len(selection.pairs):,} conversations, as the reference")
        measured = Yardstick.measured(reference, run_variant(reference, selection, for_reference(arguments)))

    # 3. Score with each model, one at a time in memory, and compare.
    results = [examine(model, selection, measured, arguments, console) for model in models]

    # 4. Say what came of it.
    print_results(results, console)
    if arguments.output:
        for path in write_results(results, arguments.output, places):
            console.print(f"wrote {path}")
    if arguments.json:
        print(json.dumps(summarise(results)))
    return 0 if all(result.passed for result in results) else 1


def for_reference(arguments: Namespace) -> Namespace:
    """The same, but for fp8, which is a trait of what is compared."""
    return Namespace(**vars(arguments) | {"dtype": "auto"}) if arguments.dtype == "fp8" else arguments


def choose_pairs(arguments: Namespace, models: Sequence[Variant], reference: Variant | None) -> Selection:
    """The pairs to compare on, which are none where golden scores alone were asked for.

    Raises:
        PlanError: there is nothing to compare a model with, or no pairs to do it on.
        ConversationError: the pairs cannot be read, or not one is of use.
    """
    paths = arguments.pairs or stored_pairs(models)
    if not paths and arguments.golden and reference is None:
        if not any(model.golden for model in models):
            names = ", ".join(model.label for model in models)
            raise PlanError(f"{GoldenResult(model=names).sentence()}; compare on --pairs.")
        return Selection([], {}, {})
    if not paths:
        raise PlanError(f"no --pairs were given, and no model has a {PAIRS_FILE} beside it; name a file of pairs.")
    for model in models:
        if reference is None and model.stored is None:
            raise PlanError(
                f"{model.checkpoint.directory} has no {REFERENCE_FILE}, which quantizing writes; name a --reference to "
                f"compare {model.label} with."
            )
    return select_pairs(read_pairs(paths), models, reference)


def examine(
    model: Variant, selection: Selection, measured: Yardstick | None, arguments: Namespace, console: Console
) -> Result:
    """Score with one model, and hold its scores against the reference's and the published ones."""
    has_golden = arguments.golden and model.golden is not None
    if not selection.pairs and not has_golden:
        return Result(model, None, GoldenResult(model=model.label))
    console.print(f"{model.label}: scoring {2 * (len(selection.pairs) + has_golden):,} conversations")
    run = run_variant(model, selection, arguments, golden=has_golden)
    golden = judge(model, run, arguments.tolerance) if arguments.golden else None
    if not selection.pairs:
        return Result(model, None, golden)
    yardstick = measured or Yardstick.stored(model, selection)
    thresholds = Thresholds(min_agreement=arguments.min_agreement, max_shift=arguments.max_shift)
    return Result(model, compare(model, run, yardstick, selection, golden, arguments.devices, thresholds), golden)


def judge(model: Variant, run: Run, tolerance: float | None) -> GoldenResult:
    """Hold the model card's example against its published scores, where there are any for this model."""
    if model.golden is None or run.golden is None:
        return GoldenResult(model=model.label)
    if tolerance is None:
        tolerance = usual_tolerance(run.products, model.checkpoint.quantization)
    published = PUBLISHED[model.golden]
    return GoldenResult(
        model=model.label, name=model.golden, published=published, scores=run.golden, tolerance=tolerance
    )


def compare(
    model: Variant,
    run: Run,
    yardstick: Yardstick,
    selection: Selection,
    golden: GoldenResult | None,
    devices: str,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
) -> ParityReport:
    """The parity report of one model on the selected pairs; `devices` is what it ran on, in words."""
    floors: Sequence[Scores | None] = yardstick.noise_floor or [None] * len(selection.pairs)
    pairs = [
        PairScores(
            id=pair.id,
            category=pair.category,
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            reference=reference,
            quantized=scores,
            noise_floor=floor,
        )
        for pair, reference, scores, floor in zip(selection.pairs, yardstick.scores, run.scores, floors, strict=True)
    ]
    here: dict[str, JsonValue] = {"devices": devices, "arithmetic": run.arithmetic}
    here["token_budget"] = run.token_budget
    golden_notes = [golden.sentence()] if golden else []
    return measure_parity(
        pairs,
        model.subject(yardstick.name, yardstick.dtype, {"here": here}),
        notes=[*selection.notes[model.label], *_stranger(model, yardstick), *_drift(model, pairs), *golden_notes],
        thresholds=thresholds,
    )


def _stranger(model: Variant, yardstick: Yardstick) -> list[str]:
    if model.stored is None or model.stored.fingerprint == yardstick.fingerprint:
        return []
    return [f"it was made from {model.stored.model}, which is not the checkpoint it is compared with here"]


def _drift(model: Variant, pairs: Sequence[PairScores]) -> list[str]:
    """How far scores are from those of the same model when it was quantized, on another machine perhaps."""
    then = {pair.id: pair.quantized for pair in model.report.scores} if model.report else {}
    both = [(pair.quantized, then[pair.id]) for pair in pairs if pair.id in then]
    unit = spread(np.array([pair.reference for pair in pairs]))
    if not both or not unit:
        return []
    here, before = np.array(both).swapaxes(0, 1)
    return [
        f"its scores are within {np.abs(here - before).max() / unit:.2g} sd of those in its own parity.json, "
        f"on {len(both):,} pairs"
    ]


if __name__ == "__main__":
    sys.exit(main())
