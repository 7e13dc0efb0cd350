"""Quantize a 16-bit reward model and report its parity: `python quantize/run.py --bits 4`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file: replace quantize/ on the path by the root of the tree
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn

from quantize.arguments import parse
from quantize.gradients.backward_sweep import BackwardSweep, statistics_file
from quantize.gradients.bit_allocation import ReadStatistics, describe_mix, mixed_quantization, storage_options
from quantize.gradients.statistics import GradientStatistics
from quantize.job.inputs import JobInputs, plan_from_config, read_inputs
from quantize.job.options import QuantizeOptions
from quantize.job.plan_table import print_plan
from quantize.job.progress import BlockProgress
from quantize.job.recipe import Recipe
from quantize.job.resources import check_disk, fit_memory
from quantize.job.state import Job, check_output_directory
from quantize.report.comparison import build_parity_report, reference_scores
from quantize.report.head_recalibration import head_tensors
from quantize.report.model_card import CARD_FILE, describe_variant, render_card
from quantize.report.scores import FinalScores, compute_final_scores
from quantize.sweep.blocks import quantize_blocks
from quantize.sweep.checkpoint_writer import CheckpointWriter
from quantize.sweep.hidden_states import SweepStates
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.checkpoints.source import must_download
from runtime.common.command import run_command
from runtime.common.errors import ConfigurationError
from runtime.common.files import write_file_atomically
from runtime.common.process_memory import peak_memory
from runtime.common.terminal import format_size, print_table, progress_line
from runtime.common.version import kit_version
from runtime.evaluation.pairs import write_pairs
from runtime.evaluation.report import JSON_FILE, ParityReport, Thresholds, check_thresholds, read_report
from runtime.evaluation.report_files import write_report
from runtime.evaluation.verdict import summary_table, verdict
from runtime.execution.block_loading import read_head
from runtime.execution.devices import device_context
from runtime.modeling.precision import BFLOAT16, FLOAT32, Precision

RESUME_HINT = "finished blocks are kept; run the same command with --resume to continue."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, run, lambda _: RESUME_HINT, argv)


def run(options: QuantizeOptions, console: Console) -> int:
    """Run the quantization from end to end and return the exit status."""
    start = time.perf_counter()
    output = options.output_directory
    if options.model is None:
        console.print("No --model given, so this is the embedded demo. The real one: --model Qwen/WorldPM-72B")

    # 1. With --dry-run, print the plan and exit.
    if options.dry_run:
        return print_dry_run(options, console)

    # 2. Validate the inputs and print the plan.
    check_output_directory(output)
    if must_download(options.source):  # check the plan before the weights are downloaded
        fit_memory(plan_from_config(options), options.ram_budget)
    inputs = read_inputs(options)
    print_plan(inputs.plan, inputs.checkpoint.name, output, console, inputs.rule)
    console.print(f"{inputs.rows.summary()}\n{inputs.sample.summary()}", style="dim")
    for note in inputs.notes:
        console.print(f"note: {note}", style="bold")

    # 3. Start the job, or resume it after its last finished block.
    with Job.open(output, inputs.recipe, resume=options.resume) as job:
        if not job.finished:
            check_disk(inputs.plan, output)
            torch.set_num_threads(job.threads)
            with device_context(torch.device(inputs.recipe.device)):
                # 4. Compute the gradients of the scores, and choose how the linears are stored.
                gradients = read_gradients(job, inputs, console) if inputs.recipe.calibrated else None
                quantization = choose_quantization(inputs, gradients, console)

                # 5. Quantize the blocks, recalibrate the score head and score all rows.
                writer = CheckpointWriter(output, inputs.checkpoint, quantization)
                final_scores = quantize_and_score(job, inputs, writer, gradients, console)

            # 6. Compare the scores and write the other files of the checkpoint.
            report = build_parity_report(inputs, quantization, final_scores, job.blocks, thresholds(options))
            write_remaining_files(job, inputs, writer, final_scores, report)
            job.finish()

    # 7. Print the results.
    return print_results(output, time.perf_counter() - start, options, console)


def print_dry_run(options: QuantizeOptions, console: Console) -> int:
    """Print the plan from the config alone, and whether it fits this machine now."""
    plan = plan_from_config(options)
    output = options.output_directory
    print_plan(plan, options.source, output, console)
    try:
        if not fit_memory(plan, options.ram_budget).prefetch:
            console.print("To fit the memory of this machine, the next block would not be prefetched.")
        check_disk(plan, output)
    except ConfigurationError as error:
        console.print(f"On this machine the job would be refused now: {error}")
    return 0


def quantize_and_score(
    job: Job, inputs: JobInputs, writer: CheckpointWriter, gradients: ReadStatistics | None, console: Console
) -> FinalScores:
    """Quantize the remaining blocks and compute the final scores."""
    checkpoint, recipe, sample = inputs.checkpoint, inputs.recipe, inputs.sample
    states = SweepStates(
        checkpoint.model_config,
        precision_of(recipe),
        [row.rendered for row in sample.calibration],
        [rendered for pair in sample.parity for rendered in (pair.chosen, pair.rejected)],
        token_budget=recipe.token_budget,
        device=recipe.device,
        directory=job.states_directory,
        finished_blocks=len(job.blocks),
    )
    if job.blocks:
        console.print(f"resuming after block {len(job.blocks) - 1}")
    layers = checkpoint.model_config.num_hidden_layers
    job.start_stage("blocks", layers, len(job.blocks))
    with BlockProgress(layers, len(job.blocks), console) as progress:
        quantize_blocks(
            job, checkpoint, recipe, states, writer, progress, prefetch=inputs.plan.prefetch, gradients=gradients
        )
    job.start_stage("scores and report", 1)
    return compute_final_scores(states, read_head(checkpoint), sample, recipe)


def choose_quantization(inputs: JobInputs, gradients: ReadStatistics | None, console: Console) -> QuantizationConfig:
    """How the linears are stored: all alike, or by a budget of bits."""
    recipe, model_config = inputs.recipe, inputs.checkpoint.model_config
    if not recipe.mixed:
        return recipe.quantization()
    assert gradients is not None
    quantization = mixed_quantization(recipe.quantization(), recipe.bits, model_config, gradients)
    console.print(describe_mix(quantization, model_config))
    return quantization


def read_gradients(job: Job, inputs: JobInputs, console: Console) -> ReadStatistics:
    """Run what is left of the backward sweep; return a function that reads the statistics of a block."""
    checkpoint, recipe = inputs.checkpoint, inputs.recipe
    assert inputs.plan.gradients is not None
    if job.gradient_passes < 2 * len(inputs.plan.gradients.segments):
        sweep = BackwardSweep(
            checkpoint,
            read_head(checkpoint, recipe.device),
            precision_of(recipe),
            [row.rendered for row in inputs.sample.calibration],
            token_budget=recipe.token_budget,
            device=recipe.device,
            directory=job.states_directory,
            finished_passes=job.gradient_passes,
            prefetch=inputs.plan.prefetch,
            options=storage_options(recipe.quantization()) if recipe.mixed else (),
            variant=inputs.variant,
        )
        with progress_line(console, "gradients", MofNCompleteColumn()) as progress:
            task = progress.add_task("", total=sweep.steps, completed=sweep.finished_steps)

            def advance() -> None:
                progress.advance(task)
                job.advance()

            job.start_stage("gradients", sweep.steps, sweep.finished_steps)
            sweep.run(job.finish_gradient_pass, advance)
        sweep.remove_buffers()
    return lambda index: GradientStatistics(statistics_file(job.states_directory, index), recipe.device)


def precision_of(recipe: Recipe) -> Precision:
    """The precision of activations and products."""
    return FLOAT32 if recipe.dtype == "float32" else BFLOAT16


def thresholds(options: QuantizeOptions) -> Thresholds:
    """The thresholds of the parity report."""
    return Thresholds(min_agreement=options.min_agreement, max_shift=options.max_shift)


def write_remaining_files(
    job: Job, inputs: JobInputs, writer: CheckpointWriter, final_scores: FinalScores, report: ParityReport | None
) -> None:
    """Write head, index, config, tokenizer, reference scores, reports and model card, then validate the checkpoint."""
    recalibration = final_scores.recalibration
    job.record_shard(
        *writer.write_head(head_tensors(recalibration.head) if recalibration and recalibration.changed else None)
    )
    writer.write_index(job.shards)
    writer.write_config()
    writer.copy_tokenizer()
    reference_scores(inputs, final_scores).save(job.output)
    if report is not None:
        write_report(report, job.output)
        write_pairs((each.pair for each in inputs.sample.parity), job.output)
    variant = describe_variant(report, inputs.recipe)
    scored_at = inputs.rule.description
    model_card = render_card(inputs.recipe, inputs.checkpoint, variant, scored_at, report, kit_version())
    write_file_atomically(job.output / CARD_FILE, model_card)
    open_checkpoint(job.output)  # validates every header and shape, and the head


def print_results(output: Path, seconds: float, options: QuantizeOptions, console: Console) -> int:
    """Print metrics and paths. Return exit status 1 if a threshold was missed, else 0."""
    report = read_report(output / JSON_FILE) if (output / JSON_FILE).exists() else None
    if report is not None:
        # A finished job can be resumed with other thresholds than those in its report.
        report = report.model_copy(update={"thresholds": check_thresholds(report.figures, thresholds(options))})
        print_table(summary_table(report), console, verdict(report).headline)
        console.print(f"report      {output / 'parity.html'}")
    console.print(f"checkpoint  {output}")
    console.print(f"took {seconds:.0f} s, peak memory {format_size(peak_memory())}")
    if options.json:
        figures = {"output": str(output), "seconds": round(seconds, 1), "peak_memory": peak_memory()}
        print(json.dumps(figures | ({"parity": report.figures.model_dump()} if report else {})))
    return 0 if report is None or report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
