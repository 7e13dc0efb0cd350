"""Command line of the parity command, `python -m runtime.parity`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runtime.common.command import make_parser, run_command
from runtime.evaluation.report import Thresholds
from runtime.evaluation.run import RESUME_HINT, ParityOptions, run
from runtime.options import ModelOptions, add_model_arguments, add_row_arguments, read_row_options

DESCRIPTION = """\
Compare the scores of reward models with reference scores, and report how much they differ.

For a quantized model the reference scores come from the model it was made from. They are stored beside it, so the
16-bit model is not needed. Use this command after moving a model to other hardware, changing the dtype or updating,
to check that its rankings and scores still match. Several models are compared on the same pairs.
"""

EXAMPLES = """\
reference scores:
  reference_scores.json   beside a model that worldpm-kit quantized: scores of the original model, keyed by a hash of
                          each conversation's tokens. Pairs without stored scores, and pairs that the model was
                          calibrated on, are left out and counted
  --reference MODEL       any other checkpoint, which is scored first; works for pairs without stored scores
  --golden                the two scores on WorldPM-72B's model card; for that checkpoint, or one made from it

pairs:
  parity_pairs.jsonl      beside a model that worldpm-kit quantized: the held-out pairs it was compared on
  --pairs FILE            other pairs, one per row, in JSONL or JSON (also .gz and .zst), CSV or Parquet, in a
                          directory of such files or a quoted pattern such as 'data/*.parquet'; in any format of
                          docs/scoring.md that states a preference, such as
                          {"prompt": "...", "chosen": "...", "rejected": "..."}

examples:
  python -m runtime.parity output/demo-gptq-4bit
  python -m runtime.parity output/demo-gptq-4bit --reference demo --pairs my-pairs.jsonl --output reports
  python -m runtime.parity demo-gptq-4bit demo-gptq-8bit demo-nf4 --max-shift 0.2
  python -m runtime.parity worldpm-72b-gptq-4bit --golden

exit status: 0 all limits are met; 1 a threshold or a golden score is missed; 2 an error, explained by the message;
130 stopped
"""


def parse(argv: list[str] | None = None) -> ParityOptions:
    """Parse the arguments.

    Raises:
        ConfigurationError: a value is invalid.
    """
    arguments = _parser().parse_args(argv)
    return ParityOptions(
        models=arguments.models,
        pairs=arguments.pairs,
        reference=arguments.reference,
        golden=arguments.golden,
        tolerance=arguments.tolerance,
        thresholds=Thresholds(min_agreement=arguments.min_agreement, max_shift=arguments.max_shift),
        output=arguments.output,
        print_json=arguments.json,
        model_options=ModelOptions.from_arguments(arguments),
        row_options=read_row_options(arguments),
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m runtime.parity", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a directory, a hub id (OWNER/NAME or OWNER/NAME@REVISION), or `demo`",
    )
    _add_reference(parser.add_argument_group("reference"))
    _add_report(parser.add_argument_group("report"))
    add_model_arguments(parser.add_argument_group("machine"))
    return parser


def _add_reference(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pairs",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=[],
        help="preference pairs to compare on (default: the parity_pairs.jsonl beside the models)",
    )
    add_row_arguments(group)
    group.add_argument(
        "--reference",
        metavar="MODEL",
        help="a checkpoint to score first and compare with (default: the scores stored beside each model)",
    )
    group.add_argument(
        "--golden", action="store_true", help="also compare with the scores published on WorldPM-72B's model card"
    )
    group.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="largest accepted absolute difference from a golden score (default: 0.001 in float32, 0.05 in bfloat16, "
        "0.15 at 8 bits, 0.5 at 4 bits)",
    )


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-agreement", type=float, metavar="P", help="exit 1 if pair agreement is below P (0 to 1)")
    group.add_argument(
        "--max-shift",
        type=float,
        metavar="S",
        help="exit 1 if the mean absolute shift exceeds S standard deviations of the reference scores",
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write parity.html, parity.json and parity.junit.xml to DIR (several models: to a subdirectory each), "
        "and side_by_side.json to DIR (default: write nothing)",
    )
    group.add_argument("--json", action="store_true", help="print the metrics as one JSON line on standard output")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, run, lambda _: RESUME_HINT, argv)


if __name__ == "__main__":
    sys.exit(main())
