"""Run `python -m runtime.score`: check everything, load the model, then read, score and write window by window."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from runtime.batch.engine import Engine, LocalEngine
from runtime.batch.options import ScoreOptions
from runtime.batch.output_file import OutputFile, OutputWriter, StandardOutput, is_finished, remove_converted_rows
from runtime.batch.output_state import OutputState
from runtime.batch.progress_bar import ScoringProgressBar
from runtime.batch.reader import ScoreInput
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.common.errors import ConfigurationError, ConversationError
from runtime.conversations.rows.context import RowOptions
from runtime.execution.placement_plan import PlacementPlan


def run(options: ScoreOptions, console: Console) -> int:
    """Score a file and return the exit status."""
    if options.model is None:
        console.print("No --model given, so this is the embedded demo. The real one: --model Qwen/WorldPM-72B")

    if options.resume and options.output and is_finished(options.output, options.file):
        remove_converted_rows(options.output)
        console.print(f"{options.output} is finished; there is nothing left to score.")
        return 0

    # 1. Open and check the model, the devices, the output and the input, before the slow steps.
    checkpoint = open_checkpoint(options.model or "demo")
    recipe = load_resumed_recipe(options)
    with open_engine(use_resumed_token_budget(options, recipe), checkpoint, console) as engine:
        window_tokens = recipe.get("window", engine.plan.window_tokens)
        with open_output(options, checkpoint, engine.plan, window_tokens) as output:
            rows = ScoreInput.open(options.file, options.row_options)
            if rows_before := output.state.rows:
                console.print(f"resuming after row {rows_before:,}")
                rows.skip(rows_before, output.state.input)

            # 2. Load the model.
            engine.print_plan(console)
            engine.load()

            # 3. Score window by window.
            total = rows.count() if console.is_terminal else None
            quiet = options.output is None and sys.stdout.isatty()  # else the bar would overwrite rows
            with ScoringProgressBar(console, output.state, total, quiet=quiet) as progress:
                score_rows(rows, window_tokens, engine, output, progress, options)

            # 4. Complete the output.
            output.finish()

    # 5. Print the summary.
    print_summary(output.state, rows_before, progress, options, console)
    return 0


def load_resumed_recipe(options: ScoreOptions) -> dict[str, Any]:
    """The recipe of the run to resume; empty if there is none or it wrote no rows."""
    state = OutputState.load(options.output) if options.resume and options.output else None
    return state.recipe if state and state.rows else {}


def use_resumed_token_budget(options: ScoreOptions, recipe: dict[str, Any]) -> ScoreOptions:
    """Options with the token budget of the run to resume, unless --token-budget was given.

    The free memory may have changed, but batches must be the same for the same bytes.
    """
    model_options = options.model_options
    token_budget = model_options.token_budget or recipe.get("token_budget")
    return replace(options, model_options=replace(model_options, token_budget=token_budget))


def open_engine(options: ScoreOptions, checkpoint: Checkpoint, console: Console) -> Engine:
    """Create the engine of `--engine`. The model is planned but not loaded.

    Raises:
        ConfigurationError: Ray is not installed, or the model does not fit.
    """
    if options.engine == "local":
        return LocalEngine(checkpoint, options.model_options)
    if find_spec("ray") is None:
        raise ConfigurationError(
            "--engine ray needs Ray, which is not installed; pip install -c constraints.txt -e '.[ray]'."
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports to the makers of Ray
    if not os.environ.get("RAY_ADDRESS"):
        # Makes Ray listen on 127.0.0.1 only. Ray reads it on import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from runtime.batch.ray_engine import RayEngine

    return RayEngine(checkpoint, options, console)


def open_output(options: ScoreOptions, checkpoint: Checkpoint, plan: PlacementPlan, window_tokens: int) -> OutputWriter:
    """Open the output file to start or to resume, or standard output.

    Raises:
        JobError: as `OutputFile`.
    """
    if options.output is None:
        return StandardOutput()
    devices = options.model_options.devices
    recipe = {
        "model": checkpoint.fingerprint(),
        # The resolved values of `auto`: a machine that resolves them differently would compute other scores.
        "devices": plan.shares[0].device.kind if devices == "auto" else devices,
        "dtype": plan.precision.name,
        "token_budget": plan.token_budget,
        "window": window_tokens,
        "products": "joined" if plan.stacked else "apart",
        "truncate": options.truncate,
    }
    if options.row_options != RowOptions():
        row_options = options.row_options
        recipe |= {
            "format": row_options.format,
            "columns": dict(row_options.columns),
            "lenient": row_options.lenient,
            "allow_blank": row_options.allow_blank,
        }
    if options.escape_formulas:
        recipe["escape_formulas"] = True
    return OutputFile(options.output, recipe, resume=options.resume, escape_formulas=options.escape_formulas)


def score_rows(
    rows: ScoreInput,
    window_tokens: int,
    engine: Engine,
    output: OutputWriter,
    progress: ScoringProgressBar,
    options: ScoreOptions,
) -> None:
    """Read, score and write the remaining rows of the input.

    Raises:
        ConversationError: a row cannot be scored, and `options.strict` is set.
    """
    windows = rows.windows(engine.renderer, tokens=window_tokens, truncate=options.truncate, strict=options.strict)
    with closing(engine.score_windows((window, rows.digest) for window in windows)) as scored:
        for records, digest in scored:
            for note in rows.take_notes():
                progress.print_note(note)
            for error in (record["error"] for record in records if "error" in record):
                if options.strict:
                    raise ConversationError(error)
                progress.print_error(error)
            output.write(records, digest, rows.formats)
            progress.update(output.state)


def print_summary(
    state: OutputState, rows_before: int, progress: ScoringProgressBar, options: ScoreOptions, console: Console
) -> None:
    """Print one line of text and, with `--json`, one line of JSON."""
    seconds, scored = progress.seconds, state.rows - state.errors
    rates = {"rows_per_second": progress.rows_per_second, "tokens_per_second": progress.tokens_per_second}
    console.print(
        f"{options.output or 'standard output'}: {state.rows:,} rows, {scored:,} scored, {state.errors:,} with errors; "
        f"{state.tokens:,} tokens; took {seconds:.1f} s, {rates['rows_per_second']:,.1f} rows/s, "
        f"{rates['tokens_per_second']:,.0f} tokens/s"
    )
    if options.json:
        summary = {
            "output": options.output and str(options.output),
            "rows": state.rows,
            "scored": scored,
            "errors": state.errors,
            "tokens": state.tokens,
            "rows_before": rows_before,
            "formats": state.formats,
            "seconds": round(seconds, 3),
        } | {name: round(rate, 2) for name, rate in rates.items()}
        print(json.dumps(summary), file=sys.stdout if options.output else sys.stderr)


def resume_hint(options: ScoreOptions) -> str:
    """What a stopped run left behind and how to resume it, for the message of Ctrl-C."""
    if options.output is None:
        return "the rows above are complete; only runs with --output can be resumed."
    state = OutputState.load(options.output)
    if state is None and options.output.is_file():
        return f"{options.output} is finished."
    if state is None or not state.rows:
        return "no row was written yet; the same command starts again."
    same = " with the same rows on standard input" if options.file == "-" else ""
    return f"{state.rows:,} rows are in {options.output}, and the same command{same} and --resume continues after them."
