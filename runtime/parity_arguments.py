"""The command line of `python -m runtime.parity`."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.command import make_parser
from runtime.errors import PlanError
from runtime.machine_arguments import add_machine, check_machine

DESCRIPTION = """\
Compare the scores that reward models give here and now with what they should be.

A quantized model is held against the scores of the model it was made from. Those are stored beside it, so that the
16-bit model is not needed again: on other hardware, with another dtype or after an update, this shows whether the
variant still ranks, and scores, like the original. Several models are compared on the same pairs, side by side.
"""

EXAMPLES = """\
what with:
  reference_scores.json   beside a model that the kit quantized: the original's scores, filed under a hash of each
                          conversation's tokens. Pairs without a stored score, and those that the model was
                          calibrated on, are left out and counted
  --reference MODEL       any other checkpoint, scored here first: then every pair can be compared on
  --golden                the two scores on WorldPM-72B's model card, for a checkpoint of that name or made from it

on which pairs:
  parity_pairs.jsonl      beside a model that the kit quantized: those it was compared on then
  --pairs FILE            others, as JSONL or JSON (.gz too) or Parquet; one of these a row, with messages in place
                          of text, or without a prompt, as in TRL:
                          {"prompt": "...", "chosen": "...", "rejected": "..."}

examples:
  python -m runtime.parity output/demo-gptq-4bit
  python -m runtime.parity output/demo-gptq-4bit --reference demo --pairs my-pairs.jsonl --output reports
  python -m runtime.parity demo-gptq-4bit demo-gptq-8bit demo-nf4 --max-shift 0.2
  python -m runtime.parity worldpm-72b-gptq-4bit --golden

exit status: 0 all is within its limits; 1 a threshold or a golden score was missed; 2 an error that the message
explains; 130 stopped
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        PlanError: one has a value that cannot be.
    """
    arguments = _parser().parse_args(argv)
    check_machine(arguments)
    if arguments.tolerance is not None and not arguments.golden:
        raise PlanError("--tolerance was given without --golden; it says how far a golden score may be off.")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m runtime.parity", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="a directory, a hub id such as Qwen/WorldPM-72B, or `demo`"
    )
    _add_reference(parser.add_argument_group("what they are compared with"))
    _add_report(parser.add_argument_group("report"))
    add_machine(parser.add_argument_group("machine"))
    return parser


def _add_reference(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pairs",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="preference pairs to compare scores on (default: the parity_pairs.jsonl beside the models)",
    )
    group.add_argument(
        "--reference",
        metavar="MODEL",
        help="a checkpoint to score with first (default: the scores stored beside each model)",
    )
    group.add_argument("--golden", action="store_true", help="hold the model card's example against its scores, too")
    group.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="how far a golden score may be off (default: 0.001 in float32, 0.05 in bfloat16, 0.15 at 8 bits, "
        "0.5 at 4 bits)",
    )


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-agreement", type=float, metavar="P", help="exit 1 when pair agreement is below P")
    group.add_argument(
        "--max-shift", type=float, metavar="S", help="exit 1 when the mean absolute shift exceeds S standard deviations"
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write parity.html, parity.json and parity.junit.xml there, with several models in a directory each, "
        "and side_by_side.json (default: nothing is written)",
    )
    group.add_argument("--json", action="store_true", help="end with one JSON line of figures")
