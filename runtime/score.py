"""Score a file of rows: `python -m runtime.score pairs.jsonl --model DIR --output scores.jsonl`.

`score` is the story; `runtime.command` handles how a run can end.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from runtime.chat import Rendered
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.command import run_command
from runtime.errors import ConversationError, NonFiniteError
from runtime.machine_arguments import plan_scorer
from runtime.placement import Plan
from runtime.placement_table import print_placement
from runtime.scorable import Scorable
from runtime.score_arguments import parse
from runtime.score_file import ScoreFile
from runtime.score_input import ScoreInput
from runtime.score_progress import ScoreProgress
from runtime.scored_row import Record, scored_record
from runtime.scorer import Scorer
from runtime.standard_output import StandardOutput
from runtime.written import Written

Score = Callable[[list[Rendered]], list[float]]
"""Scores of conversations that are tokens already; raises NonFiniteError."""


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
    plan = plan_scorer(checkpoint, arguments, begun.get("token_budget"))
    window = begun.get("window", plan.window_tokens)
    with open_output(arguments, checkpoint, plan, window) as output:
        rows = ScoreInput.open(arguments.file)
        if earlier := output.written.rows:
            console.print(f"resuming after row {earlier:,}")
            rows.skip(earlier, output.written.input)

        # 2. Load the model.
        print_placement(plan, console)
        scorer = Scorer(checkpoint, plan)

        # 3. Score window by window; each counts once it is on disk.
        total = rows.count() if console.is_terminal else None
        with ScoreProgress(console, output.written, total, quiet=_shows_rows(arguments)) as progress:
            score_windows(rows, window, scorer, output, progress, arguments)

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
        "devices": arguments.devices,
        "dtype": arguments.dtype,
        "token_budget": plan.token_budget,
        "window": window,
        "products": "joined" if plan.stacked else "apart",
        "truncate": arguments.truncate,
    }
    return ScoreFile(arguments.output, recipe, resume=arguments.resume)


def score_windows(
    rows: ScoreInput,
    tokens: int,
    scorer: Scorer,
    output: ScoreFile | StandardOutput,
    progress: ScoreProgress,
    arguments: Namespace,
) -> None:
    """Read, score and write what is left of the input, `tokens` tokens at a time."""
    for window in rows.windows(scorer.renderer, tokens=tokens, truncate=arguments.truncate, strict=arguments.strict):
        records = score_window(lambda rendered: scorer.score_rendered(rendered).tolist(), window)
        for row in window:
            if row.error and arguments.strict:
                raise ConversationError(row.error)
            if row.error:
                progress.complain(row.error)
        output.write(records, sum(row.tokens for row in window), rows.digest)
        progress.update(output.written)


def score_window(score: Score, window: Sequence[Scorable]) -> list[Record]:
    """Records of rendered rows, scored in one call of `score`.

    Raises:
        NonFiniteError: not one row has a finite score, so that it is the model's fault rather than a row's.
    """
    try:
        scores = iter(_scores(score, window))
    except NonFiniteError:
        scores = iter(_scores_alone(score, window))
    return [scored_record(row, [next(scores) for _ in row.rendered]) for row in window]


def _scores(score: Score, rows: Sequence[Scorable]) -> list[float]:
    rendered = [each for row in rows for each in row.rendered]
    return score(rendered) if rendered else []


def _scores_alone(score: Score, window: Sequence[Scorable]) -> list[float]:
    """Of the rows that have finite ones; the others fail."""
    scores: list[float] = []
    faults: list[str] = []
    for row in window:
        try:
            scores += _scores(score, [row])
        except NonFiniteError as fault:
            row.fail(fault)
            faults.append(row.error)
    if not scores:
        raise NonFiniteError(faults[0])
    return scores


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
