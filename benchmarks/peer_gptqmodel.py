"""Compare our GPTQ with gptqmodel's (through optimum) and AutoRound: same model, rows, bits and group size.

    python benchmarks/peer_gptqmodel.py --work /tmp/peer --pairs pairs.jsonl.gz --count 500 --json result.json

Each quantizes the same token ids in its own process, with the same number of threads. Ours runs `quantize/run.py`,
whose time includes the reference and noise-floor hidden states and the report. Compared are:

- wall time, CPU time and peak memory of the processes;
- the relative output error of every linear on held-out conversations, with the unquantized model's inputs for all;
- scores on held-out pairs, all computed by worldpm-kit; ours with and without head recalibration.

Without --pairs, the bundled pairs outside the calibration set are used. Finished quantizations are kept in --work and
reused. Needs the `interop` extra, and the package auto-round for --peers auto-round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.variants import draw_pairs, slug  # noqa: E402
from calibration.sampling import Sample, sample  # noqa: E402
from calibration.sources import load_rows  # noqa: E402
from quantize.solver.settings import usable_group_size  # noqa: E402
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from runtime.checkpoints.heads import MLP_HEAD  # noqa: E402
from runtime.checkpoints.model_config import BLOCK_LINEARS  # noqa: E402
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS  # noqa: E402
from runtime.conversations.rendering import RenderedConversation, Renderer  # noqa: E402
from runtime.evaluation.metrics import measure_metrics  # noqa: E402
from runtime.execution.block_loading import read_head  # noqa: E402
from runtime.modeling.packed_batch import pack_batches  # noqa: E402
from runtime.modeling.precision import FLOAT32  # noqa: E402
from runtime.modeling.qwen2 import Block, RotaryEmbedding  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402

OURS = "worldpm-kit"
PEERS = {
    "gptqmodel": ["optimum_gptq.py"],
    "gptqmodel, damp 0.01": ["optimum_gptq.py", "--damp-percent", "0.01"],  # our default; optimum's is 0.1
    "auto-round": ["autoround_gptq.py"],
    "auto-round, 50 steps": ["autoround_gptq.py", "--iterations", "50"],
}


def main() -> int:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = open_checkpoint(arguments.model)
    drawn = draw_sample(model, arguments)
    if arguments.pairs:
        pairs = draw_pairs(arguments.model, arguments.pairs, arguments.count, arguments.max_tokens, arguments.seed)
    else:
        pairs = both_sides(drawn)
    widths = [model.model_config.linear_shape(name)[1] for name in BLOCK_LINEARS]
    group_size, _ = usable_group_size(arguments.group_size, widths)

    commands = {OURS: our_command(model, group_size, arguments)}
    commands |= {name: peer_command(name, model, group_size, drawn, arguments) for name in arguments.peers}
    rows = drawn.fingerprint()
    runs = {name: run_once(name, command, rows, arguments) for name, command in commands.items()}
    variants = {name: open_checkpoint(arguments.work / slug(name)) for name in runs}
    losses = layer_losses(model, variants, pairs[: arguments.loss_rows], arguments.token_budget)
    figures = score_figures(model, variants, pairs)
    print_tables(runs, losses, figures)
    result = {
        "model": arguments.model,
        "bits": arguments.bits,
        "group_size": group_size,
        "rows": len(drawn.calibration),
        "tokens": drawn.calibration_tokens,
        "pairs": len(pairs) // 2,
        "threads": arguments.threads,
        "runs": runs,
        "time_ratio": {name: round(runs[name]["seconds"] / runs[OURS]["seconds"], 2) for name in arguments.peers},
        "losses": losses,
        "mean_losses": mean_losses(losses),
        "figures": figures,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    else:
        print(json.dumps(result))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", type=int, default=64, help="calibration conversations (default %(default)s)")
    parser.add_argument("--calibration", help="pairs to calibrate on (default: the bundled ones)")
    parser.add_argument("--calibration-tokens", type=int, help="skip longer calibration rows")
    parser.add_argument("--pairs", help="held-out pairs in a TRL format (default: bundled ones)")
    parser.add_argument("--count", type=int, default=500, help="number of held-out pairs (default %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="skip longer conversations of --pairs (default %(default)s)"
    )
    parser.add_argument(
        "--loss-rows", type=int, default=32, help="held-out conversations for the output errors (default %(default)s)"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        metavar="NAME",
        default=["gptqmodel"],
        help=f"of {', '.join(map(repr, PEERS))}",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="per process (default %(default)s)")
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all quantizers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="directory for the quantized models")
    parser.add_argument("--json", type=Path, help="write the result here (default: standard output)")
    return parser.parse_args()


# ---- quantizing -----------------------------------------------------------------------------------------


def draw_sample(model: Checkpoint, arguments: argparse.Namespace) -> Sample:
    """The calibration set that `quantize/run.py` draws, and held-out pairs."""
    renderer = Renderer.from_directory(model.directory, model.model_config.max_position_embeddings)
    return sample(
        load_rows(arguments.calibration),
        renderer,
        rows_wanted=arguments.rows,
        seed=arguments.seed,
        parity_pairs=2 if arguments.pairs else None,
        max_tokens=arguments.calibration_tokens,
    )


def both_sides(drawn: Sample) -> list[RenderedConversation]:
    return [side for pair in drawn.parity for side in (pair.chosen, pair.rejected)]


def our_command(model: Checkpoint, group_size: int, arguments: argparse.Namespace) -> list[str]:
    options: dict[str, Any] = {
        "model": model.directory,
        "output": arguments.work / OURS,
        "bits": arguments.bits,
        "group-size": group_size,
        "rows": arguments.rows,
        "parity-pairs": 2,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "token-budget": arguments.token_budget,
        "device": "cpu",
        "calibration": arguments.calibration,
        "max-tokens": arguments.calibration_tokens,
    }
    flags = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "quantize" / "run.py"), *flags, "--json"]


def peer_command(
    name: str, model: Checkpoint, group_size: int, drawn: Sample, arguments: argparse.Namespace
) -> list[str]:
    rows = arguments.work / "rows.json"
    rows.write_text(json.dumps([row.rendered.token_ids for row in drawn.calibration]))
    script, *more = PEERS[name]
    command = [sys.executable, str(ROOT / "benchmarks" / script), str(model.directory), str(rows)]
    command += [str(arguments.work / slug(name)), "--bits", str(arguments.bits), "--group-size", str(group_size)]
    return [*command, "--dtype", arguments.dtype, *more]


def relative_to_root(word: str) -> str:
    """A path inside the repository relative to its root; anything else unchanged."""
    path = Path(word)
    return path.relative_to(ROOT).as_posix() if path.is_absolute() and path.is_relative_to(ROOT) else word


def identity(source: str) -> str:
    """Hash of the checkpoint's fingerprint and its head; the fingerprint covers headers only."""
    model = open_checkpoint(source)
    digest = hashlib.sha256(model.fingerprint().encode())
    for name in MLP_HEAD:
        digest.update(model.read(name).float().numpy().tobytes())
    return digest.hexdigest()


def run_once(name: str, command: list[str], rows: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a quantization, unless an earlier run had the same inputs; return its time, memory and last output line."""
    record, log = (arguments.work / f"{slug(name)}.{suffix}" for suffix in ("json", "log"))
    inputs = {
        "model": identity(arguments.model),
        "rows": rows,
        "command": [relative_to_root(word) for word in command],
        "threads": arguments.threads,
    }
    earlier = json.loads(record.read_text()) if record.exists() else {}
    if earlier.get("inputs") == inputs:
        return earlier
    shutil.rmtree(arguments.work / slug(name), ignore_errors=True)  # from another or failed run
    threads = str(arguments.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": threads}
    start = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
        last = process.stdout.read().strip().splitlines()[-1:]
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{name} failed; its output is in {log}")
    reported = json.loads(last[0])
    result = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory": reported["peak_memory"],  # ru_maxrss would start from this process's peak
        "reported": reported,
        "inputs": inputs | {"model": identity(arguments.model)},
    }
    if result["inputs"] != inputs:
        raise SystemExit(f"{arguments.model} was changed while {name} quantized it; run this again.")
    record.write_text(json.dumps(result, indent=1))
    return result


# ---- comparison -----------------------------------------------------------------------------------------


@torch.inference_mode()
def layer_losses(
    model: Checkpoint, variants: dict[str, Checkpoint], rows: list[RenderedConversation], token_budget: int
) -> list[dict[str, Any]]:
    """Relative squared output error per linear and variant, on the unquantized model's inputs."""
    rotary = RotaryEmbedding(model.model_config, max(len(row.token_ids) for row in rows))
    batches = pack_batches(rows, token_budget)
    embedding = model.read("model.embed_tokens.weight")
    hidden = [embedding[batch.token_ids].float() for batch in batches]
    losses = []
    for index in range(model.model_config.num_hidden_layers):
        block = open_block(model, index, rotary)
        packed = {name: open_block(checkpoint, index, rotary) for name, checkpoint in variants.items()}
        sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        for place, batch in enumerate(batches):
            for group, x in zip(BLOCK_LINEAR_GROUPS, linear_inputs(block, hidden, place, batch), strict=True):
                for linear in group:
                    weight = block.linears[linear].weight(torch.float32)
                    sums[linear]["output"] += float((x @ weight.T).square().sum())
                    for name, other in packed.items():
                        error = x @ (other.linears[linear].weight(torch.float32) - weight).T
                        sums[linear][name] += float(error.square().sum())
        for linear, sum_of in sums.items():
            relative = {name: sum_of[name] / sum_of["output"] for name in variants}
            losses.append({"block": index, "linear": linear} | relative)
    return losses


def open_block(checkpoint: Checkpoint, index: int, rotary: RotaryEmbedding) -> Block:
    tensors = checkpoint.read_block(index)
    return Block.from_tensors(checkpoint.model_config, tensors, rotary, FLOAT32, checkpoint.block_quantization(index))


def linear_inputs(block: Block, hidden: list[torch.Tensor], place: int, batch) -> Iterator[torch.Tensor]:
    """Yield each linear group's input for one batch, then replace `hidden[place]` by the block's output."""
    x = block.attention_input(hidden[place])
    yield x
    context = block.attention_context(x, batch)
    yield context
    middle = block.after_attention(hidden[place], context)
    x = block.mlp_input(middle)
    yield x
    activation = block.mlp_activation(x)
    yield activation
    hidden[place] = block.after_mlp(middle, activation)


def score_figures(
    model: Checkpoint, variants: dict[str, Checkpoint], pairs: list[RenderedConversation]
) -> dict[str, dict[str, Any]]:
    """Parity metrics on held-out pairs for each variant, and for ours without head recalibration."""
    head = read_head(model)
    hidden = {name: Scorer(checkpoint).hidden_at_scored_tokens(pairs) for name, checkpoint in variants.items()}
    scores = {name: read_head(checkpoint)(hidden[name]) for name, checkpoint in variants.items()}
    scores[f"{OURS}, unrepaired"] = head(hidden[OURS])
    reference = by_pair(head(Scorer(model).hidden_at_scored_tokens(pairs)))
    return {name: measure_metrics(reference, by_pair(each)).model_dump() for name, each in scores.items()}


def by_pair(scores: torch.Tensor) -> np.ndarray:
    return scores.double().numpy().reshape(-1, 2)


def mean_losses(losses: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric mean over blocks of the relative error: by linear name or `all`, then by variant."""
    logs: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in losses:
        for name in row.keys() - {"block", "linear"}:
            for kind in (row["linear"], "all"):
                logs[kind][name].append(math.log(row[name]))
    return {
        kind: {name: math.exp(sum(values) / len(values)) for name, values in by_name.items()}
        for kind, by_name in logs.items()
    }


def print_tables(runs: dict[str, Any], losses: list[dict[str, Any]], figures: dict[str, dict[str, Any]]) -> None:
    console = Console(stderr=True, width=120)
    table = Table("process", "seconds", "CPU seconds", "peak memory")
    for name, run in runs.items():
        table.add_row(name, str(run["seconds"]), str(run["cpu_seconds"]), f"{run['peak_memory'] / 2**30:.2f} GiB")
    console.print(table)
    table = Table("linear", *runs, title="relative output error, geometric mean over blocks")
    means = mean_losses(losses)
    for kind in [*BLOCK_LINEARS, "all"]:
        ours = means[kind][OURS]
        table.add_row(kind, *(f"{means[kind][name]:.3e} ({means[kind][name] / ours:.2f})" for name in runs))
    console.print(table)
    shown = ("agreement", "spearman", "mean_shift", "shift_after_affine")
    table = Table("scores of", *shown, "flips")
    for name, each in figures.items():
        cells = (f"{each[key]['value']:.3f} ({each[key]['low']:.3f}-{each[key]['high']:.3f})" for key in shown)
        table.add_row(name, *cells, str(each["flips"]))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
