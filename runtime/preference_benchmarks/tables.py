"""The tables that the evaluation command prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from runtime.common.terminal import print_table
from runtime.evaluation.metrics import Estimate
from runtime.preference_benchmarks.result import Result

SHOWN_ERRORS = 3


def print_results(results: Sequence[Result], rows: int, console: Console) -> None:
    """Print the results of all variants on one benchmark: accuracy, then changes against the reference."""
    title = f"{results[0].benchmark.title}: accuracy in percent (95 % interval), {rows:,} rows"
    print_table(accuracy_table(results), console, title)
    compared = [result for result in results if result.reference]
    if compared and (reference := compared[0].reference):
        print_table(changes_table(compared), console, f"Rows that differ from {reference.variant.label}")
    for result in results:
        if errors := result.accuracy.errors:
            console.print(f"{result.variant.label}: {len(errors):,} rows have no scores and count as lost:")
            for error in errors[:SHOWN_ERRORS]:
                console.print(f"  {error}")


def accuracy_table(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A column for each variant, and one for the paper's numbers of each published model. Header first."""
    papers = {result.variant.published_name: result.published for result in results if result.published}
    header = ("section", "rows", *(result.variant.label for result in results), *(f"paper, {name}" for name in papers))
    return [
        header,
        *(
            (
                name,
                f"{section.rows:,}",
                *(_with_interval(result.accuracy.sections[name].accuracy) for result in results),
                *(f"{100 * paper[name]:.2f}" if name in paper else "" for paper in papers.values()),
            )
            for name, section in results[0].accuracy.sections.items()
        ),
    ]


def changes_table(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Flips and McNemar's test, a column for each variant. Header first."""
    rows = [("section", *(result.variant.label for result in results))]
    for name in results[0].changes:
        changes = [result.changes[name] for result in results]
        rows.append(
            (
                name,
                *(
                    f"{each.flips:,} ({each.better:,} better, {each.worse:,} worse), p = {each.p_value:.2g}"
                    for each in changes
                ),
            )
        )
    return rows


def _with_interval(accuracy: Estimate) -> str:
    if accuracy.value is None:
        return ""
    value = f"{100 * accuracy.value:.2f}"
    if accuracy.low is None or accuracy.high is None:
        return value
    return f"{value} ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f})"
