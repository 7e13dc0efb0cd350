"""The command line of `python -m runtime.bench`."""

from __future__ import annotations

import argparse

from runtime.command import make_parser
from runtime.errors import PlanError
from runtime.machine_arguments import add_machine, check_machine

DESCRIPTION = """\
Measure how fast a reward model scores on this machine, and how much of the machine that uses.

Without a FILE it scores preference pairs that it makes up: two responses to a prompt, of mixed lengths, the same
ones on every machine.
"""

EXAMPLES = """\
what is printed:
  tokens/s         tokens that had to be computed: a prompt that several responses share counts once; there is no
                   padding to count
  as rendered      tokens of the conversations as the model sees each, so that what they share counts for each
  TFLOP/s          of the linears' products for the tokens that had to be computed; attention is not counted
  share of peak    the same over what a large matrix product reaches here, in the same run and dtype (for fp8, bfloat16)
  load             from opening the checkpoint to a model that can score
  first score      from the same moment to the score of one conversation
  peak memory      of the whole process; on GPUs, of tensors

examples:
  python -m runtime.bench                                      the embedded demo model
  python -m runtime.bench --model worldpm-72b-gptq-4bit --rows 500
  python -m runtime.bench --model output/demo-gptq-4bit pairs.jsonl --devices cpu --dtype float32
  python -m runtime.bench --json >> speed.jsonl

exit status: 0 done; 2 an error that the message explains; 130 stopped
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        PlanError: one has a value that cannot be.
    """
    arguments = _parser().parse_args(argv)
    check_machine(arguments)
    for name in ("rows", "rounds"):
        if getattr(arguments, name) < 1:
            raise PlanError(f"--{name} is {getattr(arguments, name)}; at least 1 was expected.")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m runtime.bench", DESCRIPTION, EXAMPLES)
    group = parser.add_argument_group("what is scored")
    group.add_argument(
        "file", metavar="FILE", nargs="?", help="rows as runtime.score takes them (default: pairs that are made up)"
    )
    group.add_argument(
        "--rows", type=int, default=64, metavar="N", help="how many, from the file's first (default %(default)s)"
    )
    group.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="times to score them; the median counts (default %(default)s)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON line of figures in place of the table")
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", help="a directory, a hub id such as Qwen/WorldPM-72B, or `demo` (default)")
    add_machine(group)
    return parser
