"""Command line of the evaluation command, `python -m runtime.evaluate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runtime.common.command import make_parser, run_command
from runtime.options import ModelOptions, add_model_arguments
from runtime.preference_benchmarks.registry import BENCHMARKS, parse_benchmark
from runtime.preference_benchmarks.run import RESUME_HINT, EvaluateOptions, run

DESCRIPTION = """\
Evaluate reward models on public benchmarks, by each benchmark's own rules, and compare variants with a reference.

Rows are scored as by the scoring command: streamed, prefixes shared, resumable. All rows are checked before a model is
loaded.
"""

EXAMPLES = """\
benchmarks:
{benchmarks}
  a local copy is a file, a directory or a quoted pattern, as in rmb=RMB_dataset

results, in DIR/BENCHMARK:
  MODEL.json              accuracy, extra_results by subset as RewardBench publishes them; sections with intervals,
                          the WorldPM paper's numbers, and the comparison with the reference
  MODEL_outputs.jsonl     scores and result of every row
  MODEL_scores.jsonl      what the scoring command wrote; --resume continues it

examples:
  python -m runtime.evaluate worldpm-72b-gptq-4bit --benchmark rewardbench
  python -m runtime.evaluate gptq-4bit nf4 --reference Qwen/WorldPM-72B-HelpSteer2 \\
      --benchmark rm-bench=RM-Bench/data --benchmark judgebench

exit status: 0 done; 2 an error, explained by the message; 130 stopped, can be resumed
"""


def parse(argv: list[str] | None = None) -> EvaluateOptions:
    """Parse the arguments.

    Raises:
        ConfigurationError: a value is invalid.
    """
    arguments = _parser().parse_args(argv)
    return EvaluateOptions(
        models=arguments.models,
        benchmarks=[parse_benchmark(text) for text in arguments.benchmark],
        reference=arguments.reference,
        output=arguments.output,
        resume=arguments.resume,
        add_to_report=arguments.add_to_report,
        truncate=arguments.truncate,
        print_json=arguments.json,
        model_options=ModelOptions.from_arguments(arguments),
    )


def _parser() -> argparse.ArgumentParser:
    lines = (f"  {each.name:<23} {each.title}; {each.source or 'local copies only'}" for each in BENCHMARKS.values())
    parser = make_parser("python -m runtime.evaluate", DESCRIPTION, EXAMPLES.format(benchmarks="\n".join(lines)))
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="a directory, a hub id such as Qwen/WorldPM-72B, or `demo`"
    )
    parser.add_argument(
        "--benchmark",
        action="append",
        required=True,
        metavar="NAME[=ROWS]",
        help="a benchmark, and its rows: a local copy or a hub data set (default: its own on the hub); repeatable",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="a model, such as the unquantized one, that is evaluated first and compared with every other",
    )
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="drop the oldest turns of a conversation that is too long (default: the row counts as lost)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation"), metavar="DIR", help="for the results (default: evaluation)"
    )
    parser.add_argument("--resume", action="store_true", help="use and continue the scores in --output")
    parser.add_argument(
        "--add-to-report",
        action="store_true",
        help="also add the results to the parity report (parity.json and parity.html) beside each local model",
    )
    parser.add_argument("--json", action="store_true", help="print the results as one JSON line on standard output")
    add_model_arguments(parser.add_argument_group("machine"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, run, lambda _: RESUME_HINT, argv)


if __name__ == "__main__":
    sys.exit(main())
