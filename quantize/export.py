"""Write a packed model for tensor-parallel engines, or upload it: `python -m quantize.export MODEL --push-to A/B`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console

from quantize.publish.push import PushOptions, push
from quantize.tensor_parallel import export_padded
from runtime.common.command import make_parser, run_command
from runtime.common.errors import ConfigurationError

DESCRIPTION = """\
Write a GPTQ model for tensor-parallel engines, or upload a quantized model to the Hugging Face hub.

--tensor-parallel: engines give each GPU a share of every weight, and a share must consist of whole groups. If it would
not, intermediate_size is raised to the next size that splits. The added weights are exactly 0, so scores do not change.

--push-to: uploads the checkpoint, its reports and a model card. Conversations stay here: the compared pairs, and the
worst pairs in the reports, are uploaded only with --include-rows. A new repository is private unless --public is given.
"""

EXAMPLES = """\
examples:
  python -m quantize.export worldpm-72b-gptq-4bit --tensor-parallel 2 --output worldpm-72b-gptq-4bit-tp2
  python -m quantize.export worldpm-72b-gptq-4bit --tensor-parallel 8 --output worldpm-72b-gptq-4bit-tp8
  python -m quantize.export worldpm-72b-gptq-4bit --push-to me/WorldPM-72B-GPTQ-Int4 --dry-run
  python -m quantize.export worldpm-72b-gptq-4bit --push-to me/WorldPM-72B-GPTQ-Int4 --public

With groups of 128, the 72B gets an intermediate_size of 29696 for 2, 4 and 8 GPUs.

exit status: 0 done; 2 an error that the message explains; 130 stopped: a directory is written whole or not at all, and
the same --push-to command continues an upload
"""


@dataclass(frozen=True)
class ExportOptions:
    """The arguments of an export: either `tensor_parallel` and `output`, or `push`.

    Attributes:
        model: a quantized checkpoint, a directory or hub id.
        tensor_parallel: number of GPUs that share every weight.
        output: directory to create.
        push: what to upload, and where to.

    Raises:
        ConfigurationError: neither or both are given, or `tensor_parallel` is below 2.
    """

    model: str
    tensor_parallel: int | None
    output: Path | None
    push: PushOptions | None

    def __post_init__(self) -> None:
        if (self.tensor_parallel is None) == (self.push is None):
            raise ConfigurationError("give either --tensor-parallel N with --output DIR, or --push-to OWNER/NAME.")
        if (self.tensor_parallel is None) != (self.output is None):
            raise ConfigurationError("--tensor-parallel N and --output DIR go together.")
        if self.tensor_parallel is not None and self.tensor_parallel < 2:
            raise ConfigurationError(f"--tensor-parallel is {self.tensor_parallel}; it must be at least 2.")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, export, resume_hint, argv)


def parse(argv: list[str] | None = None) -> ExportOptions:
    """Parse the command line.

    Raises:
        ConfigurationError: as `ExportOptions` and `PushOptions`; or an option of --push-to without it.
    """
    parser = make_parser("python -m quantize.export", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a quantized checkpoint: directory or hub id")
    padding = parser.add_argument_group("write for tensor parallelism (GPTQ only)")
    padding.add_argument("--tensor-parallel", type=int, metavar="N", help="GPUs that share every weight")
    padding.add_argument("--output", type=Path, metavar="DIR", help="directory to create")
    _add_push_arguments(parser.add_argument_group("upload"))
    arguments = vars(parser.parse_args(argv))
    pushed = {each.name: arguments.pop(each.name) for each in fields(PushOptions)}
    if pushed["repository"] is None and any(pushed.values()):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name, value in pushed.items() if value)
        raise ConfigurationError(f"{flags}: only for an upload; add --push-to OWNER/NAME.")
    return ExportOptions(**arguments, push=PushOptions(**pushed) if pushed["repository"] is not None else None)


def _add_push_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--push-to", dest="repository", metavar="OWNER/NAME", help="repository on the hub")
    group.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and what not and why")
    group.add_argument(
        "--public", action="store_true", help="create a public repository (default: private; one that exists stays)"
    )
    group.add_argument(
        "--include-rows", action="store_true", help="also upload the compared conversations, here and in the reports"
    )
    group.add_argument("--overwrite", action="store_true", help="replace files of the repository that differ")
    group.add_argument(
        "--base-model", metavar="OWNER/NAME", help="the original's hub id, for the card (default: as recorded)"
    )
    group.add_argument("--license", metavar="ID", help="licence for the card, such as mit (default: as recorded)")
    group.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="results of worldpm-evaluate on this model, for the card",
    )


def export(options: ExportOptions, console: Console) -> int:
    """Run the export from end to end and return the exit status."""
    if options.push is not None:
        push(options.model, options.push, console)
    elif options.tensor_parallel is not None and options.output is not None:
        export_padded(options.model, options.tensor_parallel, options.output, console)
        console.print(f"checkpoint  {options.output}")
    return 0


def resume_hint(options: ExportOptions) -> str:
    """What a stopped export left behind."""
    if options.output is None:
        return "what was uploaded is kept; the same command continues."
    return f"{options.output} is finished." if options.output.exists() else "nothing was written."


if __name__ == "__main__":
    sys.exit(main())
