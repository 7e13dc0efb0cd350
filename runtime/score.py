"""Score a file of rows: `python -m runtime.score pairs.jsonl --model DIR --output scores.jsonl`.

`score` is the story; `runtime.command` handles how a run can end.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import closing
from typing import Any

from rich.console import Console

from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.command import run_command
from runtime.engine import Engine, open_engine
from runtime.errors import ConversationError
from runtime.placement import Plan
from runtime.score_arguments import parse
from runtime.score_file import ScoreFile
from runtime.score_input import ScoreInput
from runtime.score_progress import ScoreProgress
from runtime.standard_output import StandardOutput
from runtime.written import Written


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, score, way_on, argv)


def score(arguments: Namespace, console: Console) -> int:
    """The whole story: look at everything, load, score window by window, say what came of it."""
    model = arguments.model or "demo"
    if arguments.model is None:
        console.print("No --model given, so this is the embedded demo. The real one: --model Qwen/WorldPM-72B")

    # 1. Look at model, machine, output and input, before anything heavy happens.
    checkpoint = open_checkpoint(model)
    begun = recipe_begun_with(arguments)
    with open_engine(arguments, checkpoint, begun.get("token_budget"), console) as engine:
        window = begun.get("window", engine.plan.window_tokens)
        with open_output(arguments, checkpoint, engine.plan, window) as output:
            rows = ScoreInput.open(arguments.file)
            if earlier := output.written.rows:
                console.print(f"resuming after row {earlier:,}")
                rows.skip(earlier, output.written.input)

            # 2. Load the model.
            engine.show(console)
            engine.load()

            # 3. Score window by window; each counts once it is on disk.
            total = rows.count() if console.is_terminal else None
            with ScoreProgress(console, output.written, total, quiet=_shows_rows(arguments)) as progress:
                score_windows(rows, window, engine, output, progress, arguments)

            # 4. Make the output what it is to be.
            output.finish()

    # 5. Say what came of it.
    announce(output.written, earlier, progress, arguments, console)
    return 0


def recipe_begun_with(arguments: Namespace) -> dict[str, Any]:
    """What the run that is to go on was begun with: rows are grouped as then, however much memory is free now."""
    written = Written.load(arguments.output) if arguments.resume else None
    return written.recipe if written and written.rows else {}


def open_output(arguments: Namespace, checkpoint: Checkpoint, plan: Plan, window: int) -> ScoreFile | StandardOutput:
    """Standard output, or the file to begin or to go on with."""
    if arguments.output is None:
        return StandardOutput()
    recipe = {
        "model": checkpoint.fingerprint(),
        # What `auto` came to: where it comes to something else, what is written already was computed in another way.
        "devices": plan.shares[0].device.kind if arguments.devices == "auto" else arguments.devices,
        "dtype": plan.numerics.name,
        "token_budget": plan.token_budget,
        "window": window,
        "products": "joined" if plan.stacked else "apart",
        "truncate": arguments.truncate,
    }
    return ScoreFile(arguments.output, recipe, resume=arguments.resume)


def score_windows(
    rows: ScoreInput,
    tokens: int,
    engine: Engine,
    output: ScoreFile | StandardOutput,
    progress: ScoreProgress,
    arguments: Namespace,
) -> None:
    """Read, score and write what is left of the input, `tokens` tokens at a time."""
    windows = rows.windows(engine.renderer, tokens=tokens, truncate=arguments.truncate, strict=arguments.strict)
    with closing(engine.scored((window, rows.digest) for window in windows)) as scored:
        for records, digest in scored:
            for error in (record["error"] for record in records if "error" in record):
                if arguments.strict:
                    raise ConversationError(error)
                progress.complain(error)
            output.write(records, sum(sum(record.get("tokens", ())) for record in records), digest)
            progress.update(output.written)


def announce(written: Written, earlier: int, progress: ScoreProgress, arguments: Namespace, console: Console) -> None:
    """One line for people, and one for machines where it was asked for."""
    speed = {"rows_per_second": progress.rows_per_second, "tokens_per_second": progress.tokens_per_second}
    seconds, scored = progress.seconds, written.rows - written.errors
    place = arguments.output or "standard output"
    console.print(
        f"{place}: {written.rows:,} rows, {scored:,} scored, {written.errors:,} with errors; {written.tokens:,} tokens"
        f"; took {seconds:.1f} s, {speed['rows_per_second']:,.1f} rows/s, {speed['tokens_per_second']:,.0f} tokens/s"
    )
    if arguments.json:
        figures: dict[str, Any] = {"output": arguments.output and str(arguments.output), "rows": written.rows}
        figures |= {"scored": scored, "errors": written.errors, "tokens": written.tokens, "rows_before": earlier}
        figures |= {"seconds": round(seconds, 3)} | {name: round(rate, 2) for name, rate in speed.items()}
        print(json.dumps(figures), file=sys.stdout if arguments.output else sys.stderr)


def way_on(arguments: Namespace) -> str:
    """What a stopped run has left, and how to go on with it."""
    if arguments.output is None:
        return "the rows above are whole; with --output a stopped run can be resumed."
    written = Written.load(arguments.output)
    if written is None and arguments.output.is_file():
        return f"{arguments.output} is finished."
    if written is None or not written.rows:
        return "no row was written yet; the same command starts again."
    same = " with the same rows on standard input" if arguments.file == "-" else ""
    return (
        f"{written.rows:,} rows are in {arguments.output}, and the same command{same} and --resume goes on after them."
    )


def _shows_rows(arguments: Namespace) -> bool:
    """Whether the rows themselves appear on the terminal, where a progress line would cut into them."""
    return arguments.output is None and sys.stdout.isatty()


if __name__ == "__main__":
    sys.exit(main())
