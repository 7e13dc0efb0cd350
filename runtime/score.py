"""The command line of `python -m runtime.score`, which scores a file of rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runtime.batch.formats import OUTPUT_SUFFIXES
from runtime.batch.options import ScoreOptions
from runtime.batch.run import resume_hint, run
from runtime.common.command import make_parser, run_command
from runtime.options import ModelOptions, add_model_arguments, add_row_arguments, read_row_options

DESCRIPTION = """\
Score conversations, preference pairs or N responses to a prompt with a WorldPM reward model.

Input is streamed, so a file may have any length. Each input row gives one output row, in the same order. A run with
--output can be stopped at any time and continued by the same command with --resume; the result has the same bytes as
an uninterrupted run.
"""

EXAMPLES = """\
input rows, in JSONL or JSON (also .gz and .zst), CSV or Parquet; a directory of such files is read in
the order of their names, and so is a quoted pattern such as 'data/*.parquet'; - reads JSONL from standard input:
  {"prompt": "...", "chosen": "...", "rejected": "..."}      a pair; messages instead of text, or no prompt, as in TRL
  {"prompt": "...", "responses": ["...", "...", "..."]}      N responses to one prompt (best-of-N)
  {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}              one conversation
  and the formats of many data sets, listed in docs/scoring.md; the run says which one it took.
  `id` and `category` are copied to the output, and so are numbers such as `helpfulness`, as `labels`. CSV has any of
  these formats whose keys hold text, such as prompt,chosen,rejected or prompt,response.

output row:
  where                       location of the input row, such as pairs.jsonl:12; then its id, category and labels
  scores, tokens              one per conversation: chosen and rejected, or the responses in their order
  margin, probability_chosen  for a pair: chosen score - rejected score, and its sigmoid
  ranks, best                 for N responses: 1 is the highest score; index of the best, from 0
  score                       for a single conversation
  warnings                    a non-empty system prompt, or dropped turns
  error                       instead of scores: why the row could not be scored

examples:
  python -m runtime.score pairs.jsonl                          to standard output, with the embedded demo model
  python -m runtime.score pairs.jsonl --model worldpm-72b-gptq-4bit --output scores.jsonl
  python -m runtime.score pairs.jsonl --model worldpm-72b-gptq-4bit --output scores.jsonl --resume
  python -m runtime.score best-of-n.parquet --output scores.csv
  python -m runtime.score pairs.jsonl --model WorldPM-72B --memory cpu=12GiB --stream     model larger than memory
  python -m runtime.score pairs.jsonl --model worldpm-72b-gptq-4bit --output scores.jsonl --engine ray --actors 4
  zcat logs.jsonl.gz | python -m runtime.score - | jq .margin

exit status: 0 finished, also if rows had errors; 2 error; 130 stopped, can be resumed
"""


def parse(argv: list[str] | None = None) -> ScoreOptions:
    """Parse the command line.

    Raises:
        ConfigurationError: options contradict each other, or a value is out of range.
    """
    arguments = _parser().parse_args(argv)
    return ScoreOptions(
        file=arguments.file,
        output=arguments.output,
        model=arguments.model,
        resume=arguments.resume,
        json=arguments.json,
        truncate=arguments.truncate,
        strict=arguments.strict,
        engine=arguments.engine,
        actors=arguments.actors,
        model_options=ModelOptions.from_arguments(arguments),
        row_options=read_row_options(arguments),
        escape_formulas=arguments.escape_formulas,
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m runtime.score", DESCRIPTION, EXAMPLES)
    _add_rows(parser.add_argument_group("rows"))
    _add_output(parser.add_argument_group("output"))
    _add_model(parser.add_argument_group("model and devices"))
    _add_engine(parser.add_argument_group("several machines"))
    return parser


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "file",
        metavar="FILE",
        help="rows to score: a file, a directory of files, a pattern, or - for JSONL on standard input",
    )
    group.add_argument(
        "--truncate",
        action="store_true",
        help="drop the oldest turns of a conversation that is too long (default: the row gets an error)",
    )
    add_row_arguments(group)
    group.add_argument("--strict", action="store_true", help="stop at the first row that cannot be scored")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", type=Path, metavar="FILE", help=f"{', '.join(OUTPUT_SUFFIXES)} (default: JSONL on standard output)"
    )
    group.add_argument("--resume", action="store_true", help="continue a partly written --output")
    group.add_argument(
        "--escape-formulas",
        action="store_true",
        help="for CSV that a spreadsheet opens: put an apostrophe before texts that begin with =, +, -, @, a tab or a "
        "line break, which it would run as formulas; numbers stay numbers",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="end with one line of JSON statistics, on standard output, or on standard error without --output",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="a directory, a hub id (OWNER/NAME or OWNER/NAME@REVISION), or `demo` (default)")
    add_model_arguments(
        group,
        "; rows are read, scored and written in windows of at least four times as many tokens, more where blocks are "
        "streamed or split, and a killed run loses one window",
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local (default), or ray: several models on the Ray cluster at RAY_ADDRESS, or else on this machine; "
        "worldpm-kit and the checkpoint must be on every machine, at the same path",
    )
    group.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="number of models with --engine ray (default: one per GPU, or one per machine)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, run, resume_hint, argv)


if __name__ == "__main__":
    sys.exit(main())
