"""The command line of `python quantize/run.py`, parsed into `QuantizeOptions`."""

from __future__ import annotations

import argparse
from pathlib import Path

from quantize.job.options import (
    DEMO_PARITY_PAIRS,
    FIXED_BITS,
    METHODS,
    PARITY_PAIRS,
    TOKENS_PER_INPUT,
    QuantizeOptions,
)
from runtime.common.command import make_parser
from runtime.common.errors import ConfigurationError
from runtime.common.terminal import parse_size
from runtime.options import ROW_ARGUMENTS, add_row_arguments, read_row_options

DESCRIPTION = """\
Quantize a WorldPM reward model and measure how far its scores move.

The 16-bit checkpoint is read once, block by block, in bounded memory. The result is a packed checkpoint,
the reference scores of the 16-bit model and a parity report. An interrupted run continues with --resume.
"""

EXAMPLES = """\
examples:
  python quantize/run.py --bits 4                              the embedded demo model, in a few minutes
  python quantize/run.py --model Qwen/WorldPM-72B --dry-run    disk, memory and time that the 72B will take
  python quantize/run.py --model Qwen/WorldPM-72B --bits 4 --output worldpm-72b-gptq-4bit
  python quantize/run.py --model ./WorldPM-72B --bits 4 --calibration my-pairs.jsonl --rows 256
  python quantize/run.py --model ./WorldPM-72B --bits 4.5      half a bit more, for the linears that need it
  python quantize/run.py --method nf4                          bitsandbytes NF4, calibrated; --rows 0: plain

exit status: 0 done; 1 a threshold was missed; 2 an error that the message explains; 130 stopped, resumable
"""


def parse(argv: list[str] | None = None) -> QuantizeOptions:
    """Parse the command line.

    Raises:
        ConfigurationError: --bits contradicts --method, or as `QuantizeOptions`.
    """
    arguments = _parser().parse_args(argv)
    fixed = FIXED_BITS.get(arguments.method)
    if fixed and arguments.bits not in (None, fixed):
        raise ConfigurationError(
            f"--method {arguments.method} has {fixed} bits, but --bits is {arguments.bits:g}; drop --bits."
        )
    arguments.bits = fixed or arguments.bits or 4
    row_options = read_row_options(arguments)
    values = {name: value for name, value in vars(arguments).items() if name not in ROW_ARGUMENTS}
    return QuantizeOptions(**values, row_options=row_options)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("quantize/run.py", DESCRIPTION, EXAMPLES)
    _add_model(parser.add_argument_group("model"))
    _add_conversations(parser.add_argument_group("conversations"))
    _add_solver(parser.add_argument_group("GPTQ solver (docs/decisions.md has the ablation behind the defaults)"))
    _add_machine(parser.add_argument_group("machine"))
    _add_report(parser.add_argument_group("report"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="directory, hub id (OWNER/NAME or OWNER/NAME@REVISION), or `demo` (default)")
    group.add_argument(
        "--bits",
        type=_bits,
        metavar="N",
        help="bits per weight, without scales: 4 (default), 8, or a number between, such as 4.5: then 4, and the extra "
        "bits go to the linears that move the scores most, as smaller groups or 8 bits",
    )
    group.add_argument(
        "--errors-of",
        metavar="VARIANT",
        help="4-bit variant of the model: bits between 4 and 8 go where it errs most (default: where rounding to "
        "nearest would err most, which is less exact)",
    )
    group.add_argument(
        "--method",
        choices=METHODS,
        default="gptq",
        help="gptq (default); nf4: bitsandbytes' format, calibrated too unless --rows is 0; int8: LLM.int8, "
        "no calibration; rtn: round to nearest, as a baseline",
    )
    group.add_argument("--output", type=Path, help="output directory (default output/NAME-METHOD-BITS)")
    group.add_argument("--resume", action="store_true", help="continue the job in --output")
    group.add_argument(
        "--dry-run", action="store_true", help="print the plan and exit; --model may then be a config.json alone"
    )


def _add_conversations(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="preference pairs: JSONL, JSON, CSV or Parquet in TRL's formats, or a hub dataset id, "
        "OWNER/NAME or OWNER/NAME@REVISION (default: the bundled pairs)",
    )
    group.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help=f"number of calibration rows (default: as many as give {TOKENS_PER_INPUT} tokens for each input of the "
        "widest linear, or all that the data has beside the parity pairs)",
    )
    group.add_argument(
        "--parity-pairs",
        type=int,
        metavar="N",
        help="held-out pairs to compare scores on; they share no prompt with the calibration rows "
        f"(default: {PARITY_PAIRS}, or as many as the data has; {DEMO_PARITY_PAIRS} for the demo)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="leave out longer conversations (default: the model's position limit); none is truncated",
    )
    add_row_arguments(group)
    group.add_argument("--seed", type=int, default=0, help="seed of the row selection (default %(default)s)")


def _add_solver(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--group-size",
        type=int,
        default=128,
        metavar="N",
        help="input columns per scale, -1 for all (default %(default)s; if it does not divide the model's widths, "
        "a smaller size is used and reported)",
    )
    group.add_argument("--asymmetric", dest="sym", action="store_false", help="store a zero point per group")
    group.add_argument(
        "--desc-act",
        action="store_true",
        help="form the groups in activation order (g_idx is permuted, which is slower in most engines)",
    )
    group.add_argument(
        "--damp-percent",
        type=float,
        default=0.05,
        metavar="P",
        help="fraction of each diagonal entry of the Hessian that is added to it (default %(default)s)",
    )
    _add_switch(group, "activation-order", "solve columns in stored order")
    _add_switch(group, "importance-scales", "use min-max scales")
    _add_switch(group, "recalibration", "do not recalibrate the score head; its tensors keep their bytes")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto (default), cpu, or cuda:N")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of matmul inputs; the residual stream is always float32 "
        "(default: bfloat16 on cuda and on CPUs that multiply it faster, else float32)",
    )
    group.add_argument(
        "--token-budget", type=int, default=2048, metavar="N", help="tokens per batch (default %(default)s)"
    )
    group.add_argument(
        "--ram-budget",
        type=_size,
        metavar="SIZE",
        help="host memory limit, such as 48GiB (default: what is available)",
    )


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-agreement", type=float, metavar="P", help="exit with 1 if pair agreement is below P")
    group.add_argument(
        "--max-shift",
        type=float,
        metavar="S",
        help="exit with 1 if the mean absolute shift exceeds S standard deviations",
    )
    group.add_argument("--json", action="store_true", help="print one JSON line of figures at the end")


def _add_switch(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    """Add `--no-NAME`, which sets `name` to False."""
    group.add_argument(f"--no-{name}", dest=name.replace("-", "_"), action="store_false", help=text)


def _bits(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 4 <= number <= 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 4 to 8")
    return int(number) if number.is_integer() else number


def _size(text: str) -> int:
    size = parse_size(text)
    if not size or not text.endswith("B"):  # a number without a unit is most likely a mistake
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 48GiB or 500MB")
    return size
