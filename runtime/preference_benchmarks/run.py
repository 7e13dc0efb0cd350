"""Run the evaluation command, `python -m runtime.evaluate`: check rows and models, score, judge, compare, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from runtime.batch.options import ScoreOptions
from runtime.batch.run import run as score_file
from runtime.checkpoints.source import must_download
from runtime.common.errors import ConfigurationError, JobError
from runtime.common.files import write_file_atomically
from runtime.conversations.row_sources import find_rows
from runtime.evaluation.report import JSON_FILE, read_report
from runtime.evaluation.report_files import write_report
from runtime.evaluation.variant import Variant, open_variants
from runtime.options import ModelOptions
from runtime.preference_benchmarks.accuracy import measure
from runtime.preference_benchmarks.benchmark import Benchmark
from runtime.preference_benchmarks.result import Result, write_result
from runtime.preference_benchmarks.rows import BenchmarkRows
from runtime.preference_benchmarks.tables import print_results

RESUME_HINT = "the same command with --resume continues."


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of the evaluation command.

    Attributes:
        models: the variants to evaluate.
        benchmarks: each with the source of its rows.
        reference: the model that every variant is compared with; None compares nothing.
        output: directory of the results.
        resume: continue what an earlier run left in `output`.
        add_to_report: also add the results to the parity report beside each model.
        truncate: drop the oldest turns of conversations that are too long; by default such a row counts as lost.
        print_json: print the results as one JSON line.
        model_options: devices, memory and dtype.

    Raises:
        ConfigurationError: `output` is a file or a checkpoint, or a benchmark is named twice.
    """

    models: Sequence[str]
    benchmarks: Sequence[tuple[Benchmark, str]]
    reference: str | None = None
    output: Path = Path("evaluation")
    resume: bool = False
    add_to_report: bool = False
    truncate: bool = False
    print_json: bool = False
    model_options: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        names = [benchmark.name for benchmark, _ in self.benchmarks]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"--benchmark names one twice: {', '.join(names)}; name each once.")
        if (self.output.exists() and not self.output.is_dir()) or (self.output / "config.json").exists():
            raise ConfigurationError(f"--output is {self.output}, a file or a checkpoint; name another directory.")


def run(options: EvaluateOptions, console: Console) -> int:
    """Run the command and return its exit status.

    Raises:
        KitError: a model, a row or an option cannot be used. All rows and all headers are checked before the first
            model is loaded.
    """
    # 1. Open the models, the reference first, and check every row of every benchmark.
    others = [model for model in options.models if model != options.reference]
    opened = open_variants([*([options.reference] if options.reference else []), *others])
    reports = find_reports(opened) if options.add_to_report else {}
    benchmarks = []
    for benchmark, source in options.benchmarks:
        rows = BenchmarkRows.check(benchmark, find_rows(source, benchmark.files))
        console.print(f"{benchmark.title}: {rows.count:,} rows in {rows.source}")
        benchmarks.append(rows)

    # 2. Score with one model after the other.
    for variant in opened:
        for rows in benchmarks:
            score(rows, variant, options, console)

    # 3. Judge the scores, compare, write and print, one benchmark after the other.
    results = []
    for rows in benchmarks:
        found = evaluate(rows, opened, options)
        print_results(found, rows.count, console)
        results += found
    console.print(f"wrote the results to {options.output}")
    for directory in add_to_reports(results, reports):
        console.print(f"added the results to the parity report in {directory}")
    if options.print_json:
        print(json.dumps([result.to_dict() for result in results]))
    return 0


def score(rows: BenchmarkRows, variant: Variant, options: EvaluateOptions, console: Console) -> None:
    """Score the rows of a benchmark with the scoring command, or what an earlier run left of them.

    Raises:
        JobError: the directory has scores, and `--resume` was not given, or they are of other rows or options.
    """
    path = _path(rows, variant, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model": variant.checkpoint.fingerprint(),
        "rows": rows.digest,
        "dtype": options.model_options.dtype,
        "truncate": options.truncate,
    }
    _claim(path.with_name(f"{path.stem}_recipe.json"), recipe, resume=options.resume)
    console.print(f"{variant.label}: scoring {rows.benchmark.title}")
    score_file(
        ScoreOptions(
            file=rows.source,
            output=_scores_path(path),
            model=variant.source,
            resume=options.resume,
            truncate=options.truncate,
            model_options=options.model_options,
            row_options=rows.row_options,
        ),
        console,
    )


def evaluate(rows: BenchmarkRows, variants: Sequence[Variant], options: EvaluateOptions) -> list[Result]:
    """Judge the scores of every variant on a benchmark, and write the results."""
    results: list[Result] = []
    for variant in variants:
        path = _path(rows, variant, options)
        judged = rows.judge(_scores_path(path))
        reference = results[0] if options.reference and results else None
        results.append(Result.make(rows.benchmark, variant, measure(rows.benchmark, judged), reference))
        write_result(results[-1], judged, path)
    return results


def find_reports(variants: Sequence[Variant]) -> dict[str, Path]:
    """The directory of each variant that has a parity report, by label.

    Raises:
        ConfigurationError: none has one that can be changed.
        KitError: a report is damaged.
    """
    found = {}
    for variant in variants:
        directory = variant.checkpoint.directory
        if (directory / JSON_FILE).is_file() and not must_download(variant.source):
            read_report(directory / JSON_FILE)
            found[variant.label] = directory
    if not found:
        raise ConfigurationError(
            f"--add-to-report: no model is a local directory with a {JSON_FILE}; remove the option."
        )
    return found


def add_to_reports(results: Sequence[Result], directories: dict[str, Path]) -> list[Path]:
    """Add the results to the parity reports of their models; return the changed directories."""
    for label, directory in directories.items():
        report = read_report(directory / JSON_FILE)
        for result in results:
            if result.variant.label == label:
                report = report.with_benchmark(result.to_report())
        write_report(report, directory)
    return list(directories.values())


def _claim(path: Path, recipe: dict[str, object], *, resume: bool) -> None:
    """Keep beside the scores what they depend on, so that those of another model or other rows are not taken."""
    if not path.exists():
        write_file_atomically(path, json.dumps(recipe, indent=1) + "\n")
        return
    if not resume:
        raise JobError(
            f"{path.parent} has results of an earlier run; add --resume to use them, or choose another --output."
        )
    try:
        earlier = json.loads(path.read_bytes())
        changed = [name for name, value in recipe.items() if earlier.get(name) != value]
    except (ValueError, AttributeError) as error:
        raise JobError(f"{path} is damaged ({error}); choose another --output.") from error
    if changed:
        raise JobError(f"{path} is of an earlier run with another {' and '.join(changed)}; choose another --output.")


def _path(rows: BenchmarkRows, variant: Variant, options: EvaluateOptions) -> Path:
    return options.output / rows.benchmark.name / f"{variant.label}.json"


def _scores_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_scores.jsonl")
