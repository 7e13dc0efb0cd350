"""How fast a model scores here, and how much of the machine that uses: `python -m runtime.bench --model MODEL`.

`bench` is the story; `runtime.command` handles how a run can end.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence

import torch
from rich.console import Console

from runtime.batching import pack
from runtime.bench_arguments import parse
from runtime.bench_rows import made_up_rows, rows_of_file
from runtime.chat import Rendered, Renderer
from runtime.checkpoint import open_checkpoint
from runtime.command import run_command
from runtime.machine import matmul_rate, used_devices
from runtime.machine_arguments import load_scorer
from runtime.memory import peak_memory
from runtime.scorer import Scorer
from runtime.speed import Timing
from runtime.table import print_table
from runtime.version import kit_version

PEAK_SECONDS = 0.5
WAY_ON = "nothing was measured to the end."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, bench, lambda _: WAY_ON, argv)


def bench(arguments: Namespace, console: Console) -> int:
    """The whole story: look at model and rows, load, score, say what came of it."""
    model = arguments.model or "demo"
    if arguments.model is None:
        console.print("No --model given, so this is the embedded demo. The real one: --model Qwen/WorldPM-72B")

    # 1. Look at model and rows, before anything heavy happens.
    checkpoint = open_checkpoint(model)
    renderer = Renderer.from_directory(checkpoint.directory, checkpoint.architecture.max_position_embeddings)
    rows, errors = choose_rows(arguments, renderer)

    # 2. Load the model, and score one conversation.
    start = time.perf_counter()
    scorer = load_scorer(model, arguments)
    loaded = time.perf_counter()
    scorer.score_rendered(rows[:1])
    scored = time.perf_counter()

    # 3. Score them all, some times; measure what the machine can before and after.
    devices, dtype = used_devices(), scorer.numerics.matmul
    rate = machine_rate(devices, dtype)
    rounds = [time_round(scorer, rows) for _ in range(arguments.rounds)]
    timing = Timing(
        conversations=len(rows),
        rendered_tokens=sum(len(row.token_ids) for row in rows),
        computed_tokens=sum(batch.tokens for batch in pack(rows, scorer.token_budget)),
        rounds=rounds,
        matmul_rate=max(rate, machine_rate(devices, dtype)),
        load=loaded - start,
        first_score=scored - start,
        memory=peak_memory(),
        gpu_memory={device: torch.cuda.max_memory_allocated(device) for device in devices if device != "cpu"},
    )

    # 4. Say what came of it.
    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    if arguments.json:
        about = {"model": model, "kit_version": kit_version(), "devices": devices, "threads": threads}
        about |= {
            "dtype": scorer.numerics.name,
            "matmul_dtype": name,
            "token_budget": scorer.token_budget,
            "file": arguments.file,
            "errors": errors,
        }
        print(json.dumps(about | timing.figures(checkpoint.architecture)))
        return 0
    where = ", ".join(devices) if devices != ["cpu"] else f"{threads} CPU thread{'s' if threads > 1 else ''}"
    title = f"{model} in {scorer.numerics.name}, {arguments.file or 'made-up pairs'}"
    print_table(timing.table(checkpoint.architecture, f"{name} on {where}"), console, title)
    if errors:
        console.print(f"{errors:,} rows of {arguments.file} cannot be scored and were left out")
    return 0


def choose_rows(arguments: Namespace, renderer: Renderer) -> tuple[list[Rendered], int]:
    """Conversations to score, and how many rows of the file have none that can be."""
    if arguments.file is not None:
        return rows_of_file(arguments.file, arguments.rows, renderer)
    return made_up_rows(arguments.rows, renderer), 0


def machine_rate(devices: Sequence[str], dtype: torch.dtype) -> float:
    """Floating-point operations a second that the devices multiply at together."""
    return sum(matmul_rate(dtype, device, PEAK_SECONDS) for device in devices)


def time_round(scorer: Scorer, rows: Sequence[Rendered]) -> float:
    """Seconds until every row has its score on the CPU."""
    start = time.perf_counter()
    scorer.score_rendered(rows)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
