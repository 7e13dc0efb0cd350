"""Results of the parity command for one or several models: terminal table, JSON and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from runtime.common.errors import ConfigurationError
from runtime.common.files import write_file_atomically
from runtime.common.terminal import print_table
from runtime.common.version import kit_version
from runtime.evaluation.golden import GoldenResult
from runtime.evaluation.report import ParityReport
from runtime.evaluation.report_files import write_report
from runtime.evaluation.variant import Variant
from runtime.evaluation.verdict import describe_quantization, describe_threshold, metrics_table, summary_table, verdict

SCHEMA_VERSION = 1
SIDE_BY_SIDE_FILE = "side_by_side.json"


@dataclass
class VariantResult:
    """The result of one model.

    Attributes:
        report: its parity report; None if only golden scores were checked.
        golden: its golden scores; None if they were not checked.
    """

    variant: Variant
    report: ParityReport | None = None
    golden: GoldenResult | None = None

    @property
    def passed(self) -> bool:
        """Whether all thresholds and golden scores are met."""
        return (self.report is None or self.report.passed) and (self.golden is None or self.golden.met)

    def figures(self) -> dict[str, Any]:
        """The entry in side_by_side.json: metrics and results, without the scores of the pairs."""
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
    """The directory of each model's report, by label: `output`, or with several models a subdirectory each.

    Raises:
        ConfigurationError: a directory holds a checkpoint, or a file has its name.
    """
    several = len(variants) > 1
    directory_by_label = {variant.label: output / variant.label if several else output for variant in variants}
    for directory in (output, *directory_by_label.values()):
        if directory.exists() and not directory.is_dir():
            raise ConfigurationError(f"--output: {directory} is a file; pass a directory for the reports.")
        if (directory / "config.json").exists():
            raise ConfigurationError(
                f"--output: {directory} holds a checkpoint, whose parity.json would be overwritten; pass another one."
            )
    return directory_by_label


def write_results(results: Sequence[VariantResult], output: Path, directory_by_label: dict[str, Path]) -> list[Path]:
    """Write the reports of all models, and side_by_side.json into `output`; return the paths."""
    paths = [
        path
        for each in results
        if each.report
        for path in write_report(each.report, directory_by_label[each.variant.label])
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_file_atomically(output / SIDE_BY_SIDE_FILE, json.dumps(results_to_dict(results), indent=2) + "\n")
    return [*paths, output / SIDE_BY_SIDE_FILE]


def results_to_dict(results: Sequence[VariantResult]) -> dict[str, Any]:
    """The content of side_by_side.json and of `--json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kit_version": kit_version(),
        "passed": all(result.passed for result in results),
        "models": [result.figures() for result in results],
    }


def print_results(results: Sequence[VariantResult], console: Console) -> None:
    """Print a table of metrics with a column for each model, then each model's verdict, thresholds and notes."""
    reports = {result.variant.label: result.report for result in results if result.report}
    if len(reports) == 1:
        (report,) = reports.values()
        print_table(summary_table(report), console, verdict(report).headline)
    elif reports:
        print_table(side_by_side(reports), console)
    for result in results:
        for line in _result_lines(result, include_verdict=len(reports) > 1):
            console.print(f"{result.variant.label}: {line}")


def side_by_side(reports: dict[str, ParityReport]) -> list[tuple[str, ...]]:
    """A table with a column for each model: format, reference, pairs and metrics. Rows of cells, header first."""
    header, *metric_rows = metrics_table({label: report.figures for label, report in reports.items()})
    description = [
        ("Stored as", *(describe_quantization(report.subject) for report in reports.values())),
        ("Reference", *(report.subject.reference for report in reports.values())),
        ("Pairs", *(f"{report.figures.pairs:,}" for report in reports.values())),
    ]
    return [header, *description, *metric_rows]


def _result_lines(result: VariantResult, *, include_verdict: bool) -> list[str]:
    lines = []
    if result.report:
        lines += [verdict(result.report).headline] if include_verdict else []
        lines += [describe_threshold(threshold) for threshold in result.report.thresholds]
        lines += result.report.notes
    elif result.golden:
        lines.append(result.golden.message())
    return lines
