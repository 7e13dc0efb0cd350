"""The command line of `python quantize/run.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from quantize.recipe import METHODS
from runtime.command import make_parser
from runtime.errors import PlanError
from runtime.sizes import parse_size

DESCRIPTION = """\
Quantize a WorldPM reward model and measure what it cost.

One read of the 16-bit checkpoint, block by block in bounded memory, gives the packed checkpoint, the
reference scores and a parity report. Stop it at any moment; the same command with --resume goes on.
"""

EXAMPLES = """\
examples:
  python quantize/run.py --bits 4                              the embedded demo model, in a few minutes
  python quantize/run.py --model Qwen/WorldPM-72B --dry-run    what the real one will cost, before it does
  python quantize/run.py --model Qwen/WorldPM-72B --bits 4 --output worldpm-72b-gptq-4bit
  python quantize/run.py --model ./WorldPM-72B --bits 4 --calibration my-pairs.jsonl --rows 256
  python quantize/run.py --method nf4                          bitsandbytes NF4, needs no calibration

exit status: 0 done; 1 a threshold was missed; 2 an error that the message explains; 130 stopped, resumable
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the arguments and settle those that depend on each other.

    Raises:
        PlanError: --bits contradicts --method, or there is nothing to work on.
    """
    arguments = _parser().parse_args(argv)
    only = {"nf4": 4, "int8": 8}.get(arguments.method)
    if only and arguments.bits not in (None, only):
        raise PlanError(f"--method {arguments.method} has {only} bits, but --bits is {arguments.bits}; drop --bits.")
    arguments.bits = only or arguments.bits or 4
    _check_counts(arguments)
    return arguments


def _check_counts(arguments: argparse.Namespace) -> None:
    rows, pairs = arguments.rows, arguments.parity_pairs
    for name, count in (("--rows", rows), ("--parity-pairs", pairs)):
        if count < 0:
            raise PlanError(f"{name} is {count}; a count was expected.")
    if not rows and arguments.method == "gptq":
        raise PlanError("--rows is 0, and gptq calibrates on them; ask for some, or take --method nf4.")
    if not rows and not pairs:
        raise PlanError("--rows and --parity-pairs are both 0, so nothing would go through the model; ask for some.")


def default_output(model: str, method: str, bits: int) -> Path:
    """`output/NAME-METHOD`, with the bits where the method leaves them open."""
    name = Path(model).name.lower()
    return Path("output") / (f"{name}-{method}" if method in ("nf4", "int8") else f"{name}-{method}-{bits}bit")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("quantize/run.py", DESCRIPTION, EXAMPLES)
    _add_main(parser.add_argument_group("what"))
    _add_rows(parser.add_argument_group("conversations"))
    _add_solver(parser.add_argument_group("GPTQ solver (the defaults are the best measured)"))
    _add_machine(parser.add_argument_group("machine"))
    _add_report(parser.add_argument_group("report"))
    return parser


def _add_main(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="a directory, a hub id such as Qwen/WorldPM-72B, or `demo` (default)")
    group.add_argument("--bits", type=int, choices=(4, 8), help="bits per weight, scales not counted (default 4)")
    group.add_argument(
        "--method",
        choices=METHODS,
        default="gptq",
        help="gptq (default); nf4 or int8: bitsandbytes layouts, no calibration; rtn: round to nearest, the baseline",
    )
    group.add_argument("--output", type=Path, help="directory to make (default output/NAME-METHOD-BITS)")
    group.add_argument("--resume", action="store_true", help="go on with the job that --output holds")
    group.add_argument(
        "--dry-run", action="store_true", help="print the plan and stop; --model may then be a bare config.json"
    )


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="preference pairs: JSONL, JSON or Parquet in TRL's formats, or a hub dataset id "
        "(default: the bundled pairs)",
    )
    group.add_argument("--rows", type=int, default=128, help="conversations to calibrate on (default %(default)s)")
    group.add_argument(
        "--parity-pairs",
        type=int,
        default=64,
        metavar="N",
        help="pairs to compare scores on, none of whose prompts is calibrated on (default %(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="leave out longer conversations (default: the model's positions); none is ever cut",
    )
    group.add_argument("--seed", type=int, default=0, help="which rows are drawn (default %(default)s)")


def _add_solver(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--group-size",
        type=int,
        default=128,
        metavar="N",
        help="input columns that share a scale, -1 for all (default %(default)s; a smaller one is "
        "taken, and reported, where it does not divide the model's widths)",
    )
    group.add_argument("--asymmetric", action="store_true", help="give each group a zero point of its own")
    group.add_argument(
        "--desc-act",
        action="store_true",
        help="group columns in activation order too (a permuted g_idx; slower in most engines)",
    )
    group.add_argument(
        "--damp-percent",
        type=float,
        default=0.01,
        metavar="P",
        help="share of the Hessian's mean diagonal added to it (default %(default)s)",
    )
    group.add_argument(
        "--scored-share",
        type=float,
        default=1 / 8,
        metavar="P",
        help="share of a row's weight that the scored token carries (default 1/8; 0: all tokens alike)",
    )
    group.add_argument(
        "--no-correction", action="store_true", help="do not correct linears towards the reference stream"
    )
    group.add_argument(
        "--refine-passes",
        type=int,
        default=3,
        metavar="N",
        help="how often codes and scales are visited again after the solve (default %(default)s; 0: never)",
    )
    group.add_argument("--no-static-groups", action="store_true", help="choose scales when a group is entered")
    group.add_argument("--no-activation-order", action="store_true", help="solve columns in their stored order")
    group.add_argument("--no-importance-scales", action="store_true", help="plain min-max scales")
    group.add_argument("--no-repair", action="store_true", help="leave the score head's bytes untouched")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto (default), cpu, or cuda:N")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="inputs of matrix products; the residual stream is float32 always "
        "(default: bfloat16 on cuda and on a cpu that is faster in it, else float32)",
    )
    group.add_argument(
        "--token-budget", type=int, default=2048, metavar="N", help="tokens a batch (default %(default)s)"
    )
    group.add_argument(
        "--ram-budget",
        type=_bytes,
        metavar="SIZE",
        help="most host memory to use, such as 48GiB (default: what is available)",
    )


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-agreement", type=float, metavar="P", help="exit 1 when pair agreement is below P")
    group.add_argument(
        "--max-shift", type=float, metavar="S", help="exit 1 when the mean absolute shift exceeds S standard deviations"
    )
    group.add_argument("--json", action="store_true", help="end with one JSON line of figures")


def _bytes(text: str) -> int:
    size = parse_size(text)
    if not size or not text.endswith("B"):  # 48 bytes are not what anybody meant
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 48GiB or 500MB")
    return size
