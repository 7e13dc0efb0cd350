"""The command `python -m runtime.bench`: measure how fast a model scores on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from runtime.bench.figures import Timing
from runtime.bench.rows import generate_rows, load_rows_from_file
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.common.command import make_parser, run_command
from runtime.common.errors import ConfigurationError
from runtime.common.process_memory import peak_memory
from runtime.common.terminal import print_table
from runtime.common.version import kit_version
from runtime.conversations.rendering import RenderedConversation, Renderer
from runtime.execution.devices import matmul_rate, used_devices
from runtime.modeling.packed_batch import pack_batches
from runtime.options import ModelOptions, add_model_arguments
from runtime.scorer import Scorer

DEMO = "demo"
PEAK_SECONDS = 0.5  # of each measurement of the matmul rate
RESUME_HINT = "no result was printed."

DESCRIPTION = """\
Measure how fast a reward model scores on this machine, and what share of the machine's matmul rate that is.

Without a FILE it scores generated preference pairs: two responses per prompt, of mixed lengths, the same on every
machine.
"""

EXAMPLES = """\
output:
  tokens/s         computed tokens per second; a prompt that several responses share counts once, padding does not exist
  as rendered      tokens of all conversations, with shared prompts counted for each
  TFLOP/s          of the linears' products for the computed tokens; attention is not counted
  share of peak    TFLOP/s as a share of a large matrix product's, in the same run and dtype (bfloat16 for fp8)
  load             seconds from opening the checkpoint to a loaded model
  first score      seconds from opening the checkpoint to the score of one conversation
  peak memory      of the whole process; on GPUs, of tensors

examples:
  python -m runtime.bench                                      the embedded demo model
  python -m runtime.bench --model worldpm-72b-gptq-4bit --rows 500
  python -m runtime.bench --model output/demo-gptq-4bit pairs.jsonl --devices cpu --dtype float32
  python -m runtime.bench --json >> speed.jsonl

exit status: 0 done; 2 an error that the message explains; 130 stopped
"""


@dataclass(frozen=True)
class BenchOptions:
    """Options of the command.

    Attributes:
        file: rows to score; None for generated pairs.
        model: a directory or hub id; None for the demo.
        rows: number of rows or pairs to score.
        rounds: how often to score them.
        json: print one JSON line in place of the table.

    Raises:
        ConfigurationError: `rows` or `rounds` is below 1.
    """

    file: str | None
    model: str | None
    rows: int
    rounds: int
    json: bool
    model_options: ModelOptions

    def __post_init__(self) -> None:
        for name, count in (("--rows", self.rows), ("--rounds", self.rounds)):
            if count < 1:
                raise ConfigurationError(f"{name} is {count}; it must be at least 1.")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, run, lambda _: RESUME_HINT, argv)


def parse(argv: list[str] | None = None) -> BenchOptions:
    """Parse the command line.

    Raises:
        ConfigurationError: an argument has an invalid value.
    """
    arguments = _parser().parse_args(argv)
    return BenchOptions(
        arguments.file,
        arguments.model,
        arguments.rows,
        arguments.rounds,
        arguments.json,
        ModelOptions.from_arguments(arguments),
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m runtime.bench", DESCRIPTION, EXAMPLES)
    group = parser.add_argument_group("rows")
    group.add_argument(
        "file", metavar="FILE", nargs="?", help="rows in a format of runtime.score (default: generated pairs)"
    )
    group.add_argument("--rows", type=int, default=64, metavar="N", help="score the first N rows (default %(default)s)")
    group.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="score them N times and report the median (default %(default)s)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON line in place of the table")
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", help="a directory, a hub id (OWNER/NAME or OWNER/NAME@REVISION), or `demo` (default)")
    add_model_arguments(group)
    return parser


def run(options: BenchOptions, console: Console) -> int:
    """Run the command end to end: read the rows, load the model, time the rounds, print the result."""
    model = options.model or DEMO
    if options.model is None:
        console.print("No --model given, so this is the embedded demo. The real one: --model Qwen/WorldPM-72B")

    # 1. Validate the checkpoint and the rows before the model is loaded.
    checkpoint = open_checkpoint(model)
    renderer = checkpoint.renderer()
    rows, errors = load_or_generate_rows(options, renderer)

    # 2. Load the model and time the rounds.
    scorer, timing = measure(options, model, rows)

    # 3. Print the result.
    devices, matmul_dtype = used_devices(), str(scorer.precision.matmul_dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    if options.json:
        settings = {
            "model": model,
            "kit_version": kit_version(),
            "devices": devices,
            "threads": threads,
            "dtype": scorer.precision.name,
            "matmul_dtype": matmul_dtype,
            "token_budget": scorer.token_budget,
            "file": options.file,
            "errors": errors,
        }
        print(json.dumps(settings | timing.metrics(checkpoint.model_config)))
        return 0
    where = ", ".join(devices) if devices != ["cpu"] else f"{threads} CPU thread{'s' if threads > 1 else ''}"
    title = f"{model} in {scorer.precision.name}, {options.file or 'generated pairs'}"
    print_table(timing.table(checkpoint.model_config, f"{matmul_dtype} on {where}"), console, title)
    if errors:
        console.print(f"{errors:,} rows of {options.file} cannot be scored and were left out")
    return 0


def load_or_generate_rows(options: BenchOptions, renderer: Renderer) -> tuple[list[RenderedConversation], int]:
    """Conversations to score, and the number of rows in the file that cannot be scored."""
    if options.file is not None:
        return load_rows_from_file(options.file, options.rows, renderer)
    return generate_rows(options.rows, renderer), 0


def measure(options: BenchOptions, model: str, rows: Sequence[RenderedConversation]) -> tuple[Scorer, Timing]:
    """Load the model, score one conversation, then score all `rows` in every round.

    The matmul rate is measured before and after the rounds, and the higher value counts.
    """
    start = time.perf_counter()
    scorer = options.model_options.load(model)
    loaded = time.perf_counter()
    scorer.score_rendered(rows[:1])
    scored = time.perf_counter()

    devices, dtype = used_devices(), scorer.precision.matmul_dtype
    rate = total_matmul_rate(devices, dtype)
    rounds = [time_round(scorer, rows) for _ in range(options.rounds)]
    return scorer, Timing(
        conversations=len(rows),
        rendered_tokens=sum(len(row.token_ids) for row in rows),
        computed_tokens=sum(batch.tokens for batch in pack_batches(rows, scorer.token_budget)),
        rounds=rounds,
        matmul_rate=max(rate, total_matmul_rate(devices, dtype)),
        load=loaded - start,
        first_score=scored - start,
        memory=peak_memory(),
        gpu_memory={device: torch.cuda.max_memory_allocated(device) for device in devices if device != "cpu"},
    )


def total_matmul_rate(devices: Sequence[str], dtype: torch.dtype) -> float:
    """Sum of the devices' matmul rates, in FLOP/s."""
    return sum(matmul_rate(dtype, device, PEAK_SECONDS) for device in devices)


def time_round(scorer: Scorer, rows: Sequence[RenderedConversation]) -> float:
    """Seconds until all scores are on the CPU."""
    start = time.perf_counter()
    scorer.score_rendered(rows)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
