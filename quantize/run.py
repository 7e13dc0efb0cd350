"""From a 16-bit reward model to a packed one and its parity report: `python quantize/run.py --bits 4`.

`quantize` is the story; `runtime.command` handles how a run can end.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put quantize/ first on the path, the tree belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from rich.console import Console

from quantize.arguments import default_output, parse
from quantize.card import describe_variant, render_card
from quantize.comparison import compare, reference_scores
from quantize.inputs import Inputs, plan_without_weights, read_inputs
from quantize.job import Job, refuse_foreign
from quantize.outcome import Outcome, conclude
from quantize.plan import check_disk, fit_memory
from quantize.plan_table import print_plan
from quantize.progress import BlockProgress
from quantize.repair import head_tensors
from quantize.streams import Streams
from quantize.sweep_job import sweep
from quantize.writer import Writer
from runtime.checkpoint import open_checkpoint
from runtime.command import run_command
from runtime.devices import at_work
from runtime.errors import PlanError
from runtime.files import write_whole
from runtime.hub import is_hub_id
from runtime.memory import peak_memory
from runtime.numerics import BFLOAT16, FLOAT32
from runtime.parity_pairs import write_pairs
from runtime.parity_report import ParityReport, Thresholds, hold, read_report
from runtime.report import JSON_FILE, write_report
from runtime.sizes import show_size
from runtime.summary import summary_table, verdict
from runtime.sweep import read_head
from runtime.table import print_table
from runtime.version import kit_version

WAY_ON = "finished blocks are kept, and the same command with --resume goes on from there."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, quantize, lambda _: WAY_ON, argv)


def quantize(arguments: Namespace, console: Console) -> int:
    """The whole story: plan, sweep, repair, write, compare."""
    start = time.perf_counter()
    model = arguments.model or "demo"
    output = arguments.output or default_output(model, arguments.method, arguments.bits)
    if arguments.model is None:
        console.print("No --model given, so this is the embedded demo. The real one: --model Qwen/WorldPM-72B")

    # 1. Say what will happen, before anything heavy does.
    if arguments.dry_run:
        return foresee(arguments, model, output, console)
    refuse_foreign(output)
    if is_hub_id(model) and not Path(model).exists():  # before all of it is fetched
        fit_memory(plan_without_weights(arguments, model), arguments.ram_budget)
    inputs = read_inputs(arguments, model)
    print_plan(inputs.plan, inputs.checkpoint.name, output, console)
    console.print(f"{inputs.rows.summary()}\n{inputs.sample.summary()}", style="dim")

    # 2. Take up the job where it stands.
    with Job.open(output, inputs.recipe, resume=arguments.resume) as job:
        if not job.finished:
            check_disk(inputs.plan, output)
            torch.set_num_threads(job.threads)
            writer = Writer(output, inputs.checkpoint, inputs.recipe.quantization())

            # 3. Sweep the blocks, then score and repair.
            with at_work(torch.device(inputs.recipe.device)):
                outcome = sweep_and_conclude(job, inputs, writer, console)

            # 4. Compare, and write what makes it a checkpoint.
            report = compare(inputs, outcome, job.blocks, arguments)
            write_rest(job, inputs, writer, outcome, report)
            job.finish()

    # 5. Say what came of it.
    return announce(output, time.perf_counter() - start, arguments, console)


def foresee(arguments: Namespace, model: str, output: Path, console: Console) -> int:
    """The plan from the config alone, and whether the job could begin here and now."""
    plan = plan_without_weights(arguments, model)
    print_plan(plan, model, output, console)
    try:
        if not fit_memory(plan, arguments.ram_budget).prefetch:
            console.print("For the memory that there is here, the next block would not be read ahead.")
        check_disk(plan, output)
    except PlanError as error:
        console.print(f"Here and now it would be refused: {error}")
    return 0


def sweep_and_conclude(job: Job, inputs: Inputs, writer: Writer, console: Console) -> Outcome:
    """Quantize the blocks that are left, and bring the scores together."""
    checkpoint, recipe, sample = inputs.checkpoint, inputs.recipe, inputs.sample
    streams = Streams(
        checkpoint.architecture,
        FLOAT32 if recipe.dtype == "float32" else BFLOAT16,
        [row.rendered for row in sample.calibration],
        [rendered for pair in sample.parity for rendered in (pair.chosen, pair.rejected)],
        token_budget=recipe.token_budget,
        device=recipe.device,
        directory=job.streams,
        finished_blocks=len(job.blocks),
    )
    if job.blocks:
        console.print(f"resuming after block {len(job.blocks) - 1}")
    with BlockProgress(checkpoint.architecture.num_hidden_layers, len(job.blocks), console) as progress:
        sweep(job, checkpoint, recipe, streams, writer, progress, prefetch=inputs.plan.prefetch)
    return conclude(streams, read_head(checkpoint), sample, recipe)


def write_rest(job: Job, inputs: Inputs, writer: Writer, outcome: Outcome, report: ParityReport | None) -> None:
    """Head, index, configuration, tokenizer, reference scores, reports and card; then read it all back."""
    repair = outcome.repair
    job.record_shard(*writer.write_head(head_tensors(repair.head) if repair and repair.changed else None))
    writer.write_index(job.shards)
    writer.write_config()
    writer.copy_tokenizer()
    reference_scores(inputs, outcome).save(job.output)
    if report is not None:
        write_report(report, job.output)
        write_pairs((each.pair for each in inputs.sample.parity), job.output)
    variant = describe_variant(report, inputs.recipe)
    card = render_card(inputs.recipe, inputs.checkpoint.name, variant, report, kit_version())
    write_whole(job.output / "README.md", card)
    open_checkpoint(job.output)  # every header, shape and the head, as any reader will meet them


def announce(output: Path, seconds: float, arguments: Namespace, console: Console) -> int:
    """Print the figures and where things are; the status tells whether the thresholds were met."""
    report = read_report(output / JSON_FILE) if (output / JSON_FILE).exists() else None
    if report is not None:
        results = hold(report.figures, Thresholds(min_agreement=arguments.min_agreement, max_shift=arguments.max_shift))
        report = report.model_copy(update={"thresholds": results})  # a finished job may be held to others
        print_table(summary_table(report), console, verdict(report).headline)
        console.print(f"report      {output / 'parity.html'}")
    console.print(f"checkpoint  {output}")
    console.print(f"took {seconds:.0f} s, peak memory {show_size(peak_memory())}")
    if arguments.json:
        figures = {"output": str(output), "seconds": round(seconds, 1), "peak_memory": peak_memory()}
        print(json.dumps(figures | ({"parity": report.figures.model_dump()} if report else {})))
    return 0 if report is None or report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
