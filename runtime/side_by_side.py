"""What came of comparing one model or several: on the terminal, for programs, and as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from runtime.errors import PlanError
from runtime.files import write_whole
from runtime.golden import GoldenResult
from runtime.parity_report import ParityReport
from runtime.report import write_report
from runtime.summary import describe, describe_threshold, summary_table, tabulate, verdict
from runtime.table import print_table
from runtime.variant import Variant
from runtime.version import kit_version

SCHEMA_VERSION = 1
FILE_NAME = "side_by_side.json"


@dataclass
class Result:
    """One model's.

    Attributes:
        report: its parity on the pairs, None where only golden scores were asked for.
        golden: its golden scores, None where they were not asked for.
    """

    variant: Variant
    report: ParityReport | None = None
    golden: GoldenResult | None = None

    @property
    def passed(self) -> bool:
        """Whether it meets every threshold and misses no golden score."""
        return (self.report is None or self.report.passed) and (self.golden is None or self.golden.met)

    def figures(self) -> dict[str, Any]:
        """What programs want to know, without the scores of every pair."""
        report, golden = self.report, self.golden
        return {
            "model": self.variant.label,
            "source": self.variant.source,
            "passed": self.passed,
            "subject": report and report.subject.model_dump(),
            "figures": report and report.figures.model_dump(),
            "noise_floor": report and report.noise_floor and report.noise_floor.model_dump(),
            "thresholds": [threshold.model_dump() for threshold in report.thresholds] if report else [],
            "golden": golden and golden.model_dump() | {"difference": golden.difference, "met": golden.met},
            "notes": report.notes if report else [],
        }


def report_directories(output: Path, variants: Sequence[Variant]) -> dict[str, Path]:
    """Where the report of each goes, by label: `output` itself, or with several a directory each in it.

    Raises:
        PlanError: a checkpoint lies there, whose own report would be lost, or a file is in the way.
    """
    several = len(variants) > 1
    places = {variant.label: output / variant.label if several else output for variant in variants}
    for place in (output, *places.values()):
        if place.exists() and not place.is_dir():
            raise PlanError(f"--output: {place} is a file; name a directory for the reports.")
        if (place / "config.json").exists():
            raise PlanError(
                f"--output: {place} holds a checkpoint, whose own parity.json would be lost; name another directory."
            )
    return places


def write_results(results: Sequence[Result], output: Path, places: dict[str, Path]) -> list[Path]:
    """Each model's report as HTML, JSON and JUnit, and the figures of all in one file; the paths."""
    paths = [path for each in results if each.report for path in write_report(each.report, places[each.variant.label])]
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / FILE_NAME, json.dumps(summarise(results), indent=2) + "\n")
    return [*paths, output / FILE_NAME]


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """The figures of all models, for `--json` and for the file."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kit_version": kit_version(),
        "passed": all(result.passed for result in results),
        "models": [result.figures() for result in results],
    }


def print_results(results: Sequence[Result], console: Console) -> None:
    """A table of figures, one column a model, and beneath it what else there is to say of each."""
    reports = {result.variant.label: result.report for result in results if result.report}
    if len(reports) == 1:
        (report,) = reports.values()
        print_table(summary_table(report), console, verdict(report).headline)
    elif reports:
        print_table(side_by_side(reports), console)
    for result in results:
        for line in _lines(result, verdict_too=len(reports) > 1):
            console.print(f"{result.variant.label}: {line}")


def side_by_side(reports: dict[str, ParityReport]) -> list[tuple[str, ...]]:
    """Rows of cells, one column a model: what it is, what it was compared with, every figure."""
    header, *figures = tabulate({label: report.figures for label, report in reports.items()})
    about = [
        ("Stored as", *(describe(report.subject) for report in reports.values())),
        ("Reference", *(report.subject.reference for report in reports.values())),
        ("Pairs", *(f"{report.figures.pairs:,}" for report in reports.values())),
    ]
    return [header, *about, *figures]


def _lines(result: Result, *, verdict_too: bool) -> list[str]:
    lines = []
    if result.report:
        lines += [verdict(result.report).headline] if verdict_too else []
        lines += [describe_threshold(threshold) for threshold in result.report.thresholds]
        lines += result.report.notes
    elif result.golden:
        lines.append(result.golden.sentence())
    return lines
