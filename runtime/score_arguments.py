"""The command line of `python -m runtime.score`."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.command import make_parser
from runtime.errors import PlanError
from runtime.machine_arguments import add_machine, check_machine
from runtime.score_formats import SUFFIXES

DESCRIPTION = """\
Score conversations, preference pairs or N responses to a prompt with a WorldPM reward model.

Rows are read, scored and written a few at a time, so a file may have any length. Each row of the input gives one
row of the output, in the same order. With --output it can be stopped at any moment; the same command with
--resume goes on, and ends with the bytes of a run that nobody stopped.
"""

EXAMPLES = """\
input, one of these a row, as JSONL or JSON (.gz too), CSV or Parquet, or with - as JSONL on standard input:
  {"prompt": "...", "chosen": "...", "rejected": "..."}      a pair; messages in place of text, or no prompt, as in TRL
  {"prompt": "...", "responses": ["...", "...", "..."]}      any number of responses, as for best-of-N
  {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}              one conversation
  `id` and `category` are kept; other keys are not looked at. CSV has the columns prompt, chosen and rejected, or prompt
  and response, all of them text.

output, by row:
  where                       the row's place, such as pairs.jsonl:12; then its id and category
  scores, tokens              one a conversation: chosen and rejected, or the responses in their order
  margin, probability_chosen  of a pair: chosen score less rejected score, and the sigmoid of that
  ranks, best                 of N responses: 1 is the highest score; index of the best, from 0
  score                       of a single conversation
  warnings                    a system prompt that is not empty, turns that were dropped
  error                       in place of scores: why the row could not be scored, with its file and line

examples:
  python -m runtime.score pairs.jsonl                          to standard output, with the embedded demo model
  python -m runtime.score pairs.jsonl --model worldpm-72b-gptq-4bit --output scores.jsonl
  python -m runtime.score pairs.jsonl --model worldpm-72b-gptq-4bit --output scores.jsonl --resume
  python -m runtime.score best-of-n.parquet --output scores.csv
  python -m runtime.score pairs.jsonl --model WorldPM-72B --memory cpu=12GiB --stream     more model than memory
  python -m runtime.score pairs.jsonl --model worldpm-72b-gptq-4bit --output scores.jsonl --engine ray --actors 4
  zcat logs.jsonl.gz | python -m runtime.score - | jq .margin

exit status: 0 done, rows with errors counted; 2 an error that the message explains; 130 stopped, resumable
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        PlanError: they contradict each other, or one has a value that cannot be.
    """
    arguments = _parser().parse_args(argv)
    if arguments.output is None and arguments.resume:
        raise PlanError("--resume was given without --output; name the file to go on with.")
    if arguments.output is not None and arguments.output.suffix not in SUFFIXES:
        raise PlanError(f"--output is {arguments.output}; a name that ends in {', '.join(SUFFIXES)} was expected.")
    if arguments.actors is not None and arguments.engine != "ray":
        raise PlanError("--actors was given, but only --engine ray has any; add that, or leave --actors out.")
    if arguments.actors is not None and arguments.actors < 1:
        raise PlanError(f"--actors is {arguments.actors}; at least 1 was expected.")
    check_machine(arguments)
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m runtime.score", DESCRIPTION, EXAMPLES)
    _add_rows(parser.add_argument_group("rows"))
    _add_output(parser.add_argument_group("output"))
    _add_machine(parser.add_argument_group("model and machine"))
    _add_engine(parser.add_argument_group("more machines"))
    return parser


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument("file", metavar="FILE", help="rows to score; - is JSONL on standard input")
    group.add_argument(
        "--truncate",
        action="store_true",
        help="drop whole oldest turns of a conversation that is too long (default: such a row has an error)",
    )
    group.add_argument("--strict", action="store_true", help="stop at the first row that cannot be scored")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", type=Path, metavar="FILE", help=f"{', '.join(SUFFIXES)} (default: JSONL on standard output)"
    )
    group.add_argument("--resume", action="store_true", help="go on with the partly written --output")
    group.add_argument(
        "--json",
        action="store_true",
        help="end with one JSON line of figures, on standard output, or on standard error where rows go to the former",
    )


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="a directory, a hub id such as Qwen/WorldPM-72B, or `demo` (default)")
    add_machine(
        group,
        "; four times as many, or more where blocks are streamed or split, are read, scored and written at a time, "
        "which is what a kill may cost",
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local (default), or ray: several models on the Ray cluster that RAY_ADDRESS names, or on this machine; "
        "the kit and the checkpoint must be on every machine, at the same path",
    )
    group.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="models at a time with --engine ray (default: one a GPU, or one a machine)",
    )
