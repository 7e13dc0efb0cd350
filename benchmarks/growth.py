"""Measure how speed and memory depend on the number of rows, their length, loading and streaming.

    python benchmarks/growth.py --work /tmp/growth --model output/demo-gptq-4bit --json result.json

    rows      `runtime.score` on 100, 1,000 and 10,000 conversations of one length; tokens/s and peak memory should
              not change
    lengths   the same number of tokens in conversations of 256 to 8,192 tokens; time should grow by attention alone,
              memory linearly
    loading   loading a GPTQ-4 checkpoint, a quarter as wide as the 72B, compared with reading its bytes
    activations  one block of the 72B's widths on one conversation of 256 to 32,768 tokens: memory beside the weights,
              compared with the plan; --divide N takes 1/N of the widths
    streamed  that checkpoint with a memory budget of the embedding and a quarter of the blocks, compared with all
              blocks resident as stored; 16k tokens per sweep

Each figure is measured in its own process and printed as a JSON line. `--only NAME ...` selects measurements.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.giant import write_giant  # noqa: E402
from benchmarks.random_block import RandomBlock  # noqa: E402
from runtime.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from runtime.checkpoints.model_config import ModelConfig  # noqa: E402
from runtime.checkpoints.quantization_config import QuantizationConfig  # noqa: E402
from runtime.common.process_memory import keep_freed_memory, peak_memory  # noqa: E402
from runtime.conversations.rendering import RenderedConversation  # noqa: E402
from runtime.execution.memory_estimate import MemoryEstimate  # noqa: E402
from runtime.execution.placement_plan import CPU_CHUNK_TOKENS  # noqa: E402
from runtime.modeling.packed_batch import pack_batches  # noqa: E402
from runtime.modeling.precision import BFLOAT16  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402

Figure = dict[str, Any]
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ACTIVATION_LENGTHS = (256, 2048, 8192, 32_768)
SWEEP = 16_384  # tokens
DIVIDE, LAYERS = 4, 24
WORDS = ("the", "of", "to", "and", "in", "that", "it", "is", "was", "for", "on", "are", "with", "as", "this", "from")


def main() -> int:
    arguments = parse()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child[0]](*arguments.child[1:])))
        return 0
    arguments.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"model": arguments.model, "threads": torch.get_num_threads()}
    for name in arguments.only:
        result[name] = []
        for figure in MEASURES[name](arguments):
            result[name].append(figure)
            print(json.dumps({"measure": name} | figure), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="scored by `rows` and `lengths` (default: %(default)s)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("/tmp/growth"),
        help="directory for about 1 GB of files (default: %(default)s)",
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[100, 1000, 10_000], help="conversation counts of `rows`"
    )
    parser.add_argument("--divide", type=int, default=1, help="of the widths of `activations` (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=[*MEASURES], metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- measurements ---------------------------------------------------------------------------------------


def rows(arguments: argparse.Namespace) -> Iterator[Figure]:
    draw = random.Random(0)
    for count in arguments.counts:
        file = arguments.work / f"{count}.jsonl"
        with file.open("w") as lines:
            for _ in range(count):
                asked, said = (" ".join(draw.choices(WORDS, k=words)) for words in (20, 30))
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
                lines.write(json.dumps({"messages": turns}) + "\n")
        yield in_child("score", arguments.model, str(file)) | {"conversations": count}


def lengths(arguments: argparse.Namespace) -> Iterator[Figure]:
    for length in LENGTHS:
        yield in_child("by_length", arguments.model, str(length)) | {"tokens_each": length}


def loading(arguments: argparse.Namespace) -> Iterator[Figure]:
    giant = giant_of(arguments)
    yield in_child("load", str(giant))


def streamed(arguments: argparse.Namespace) -> Iterator[Figure]:
    giant = giant_of(arguments)
    for placement in ("resident", "quarter"):
        yield in_child("sweep", str(giant), placement) | {"blocks": placement}


def activations(arguments: argparse.Namespace) -> Iterator[Figure]:
    for tokens in ACTIVATION_LENGTHS:
        yield in_child("block_activations", str(arguments.divide), str(tokens)) | {"tokens": tokens}


def giant_of(arguments: argparse.Namespace) -> Path:
    directory = arguments.work / "giant"
    if not (directory / "config.json").exists():
        write_giant(directory, LAYERS, DIVIDE)
    return directory


def in_child(*words: str) -> Figure:
    command = [sys.executable, __file__, "--child", *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])


# ---- run in child processes -----------------------------------------------------------------------------


def score(model: str, file: str) -> Figure:
    from runtime.batch.output_state import progress_path
    from runtime.score import main as score_file

    output = Path(file).with_suffix(".scores.jsonl")
    for left in (output, progress_path(output)):  # from an interrupted run
        left.unlink(missing_ok=True)
    with redirect_stdout(StringIO()) as line:
        assert score_file([file, "--model", model, "--output", str(output), "--json"]) == 0
    figures = json.loads(line.getvalue())
    wanted = ("tokens", "seconds", "tokens_per_second")
    return {name: figures[name] for name in wanted} | {"peak_memory": peak_memory()}


def by_length(model: str, length: str) -> Figure:
    keep_freed_memory()
    scorer = Scorer.from_pretrained(model, devices="cpu")
    each = token_rows(scorer, int(length))
    scorer.score_rendered(each[:1])
    start = time.perf_counter()
    scorer.score_rendered(each)
    seconds = time.perf_counter() - start
    shape = scorer.checkpoint.model_config
    work = shape.linear_flops(SWEEP, len(each))
    attention = 2 * SWEEP * int(length) * shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
    figure = {"seconds": round(seconds, 2), "tokens_per_second": round(SWEEP / seconds, 1)}
    return figure | {"attention_share_of_work": round(attention / (attention + work), 3), "peak_memory": peak_memory()}


def load(directory: str) -> Figure:
    """Load time relative to reading the files from the page cache, and memory growth relative to their size."""
    files = sorted(Path(directory).glob("*.safetensors"))
    copies, copy_seconds = [], 0.0
    for _ in range(2):
        start = time.perf_counter()
        copies = [file.read_bytes() for file in files]
        copy_seconds = time.perf_counter() - start
    size = sum(map(len, copies))
    del copies
    alone = in_child("load_alone", directory)
    ratios = {"time_ratio": alone["load_seconds"] / copy_seconds, "memory_ratio": alone["grew_by"] / size}
    figure = alone | {"bytes": size, "copy_seconds": round(copy_seconds, 2)}
    return figure | {name: round(ratio, 2) for name, ratio in ratios.items()}


def load_alone(directory: str) -> Figure:
    open_checkpoint(directory)
    (
        torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
    ).sum()  # exclude memory that libraries allocate at first use
    memory = f"cpu={as_stored(directory)}"
    before, start = peak_memory(), time.perf_counter()
    scorer = Scorer.from_pretrained(directory, devices="cpu", memory=memory, dtype="bfloat16")
    seconds = time.perf_counter() - start
    return {"load_seconds": round(seconds, 2), "grew_by": peak_memory() - before, "kept": scorer.plan.keep_dequantized}


def sweep(directory: str, placement: str) -> Figure:
    keep_freed_memory()
    memory = {"resident": f"{as_stored(directory)}", "quarter": f"{quarter(directory)}"}[placement]
    scorer = Scorer.from_pretrained(directory, devices="cpu", memory=f"cpu={memory}", dtype="bfloat16")
    each = token_rows(scorer, 512)
    scorer.score_rendered(each[:1])
    start = time.perf_counter()
    scorer.score_rendered(each)
    seconds = time.perf_counter() - start
    plan, figure = scorer.plan, {"seconds": round(seconds, 2), "tokens_per_second": round(SWEEP / seconds, 1)}
    figure |= {
        "placement": plan.placement,
        "kept": plan.keep_dequantized,
        "blocks_that_stay": len(plan.shares[0].resident),
    }
    return figure | {"budget": plan.shares[0].device.budget, "peak_memory": peak_memory()}


def block_activations(divide: str, tokens: str) -> Figure:
    """Planned and measured bytes of one block on one conversation, in chunks as a CPU has them by default."""
    keep_freed_memory()
    config = json.loads((ROOT / "tests" / "shapes_72b.json").read_text())
    config |= {
        name: config[name] // int(divide) for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    }
    config |= {"max_position_embeddings": int(tokens)}
    model_config = ModelConfig.from_config(config)
    block = RandomBlock(model_config, QuantizationConfig("gptq", 4), "cpu").block("16-bit", int(tokens))
    rows = torch.randint(0, 100, (int(tokens),)).tolist()
    (batch,) = pack_batches([RenderedConversation(rows, len(rows) - 1)], CPU_CHUNK_TOKENS)
    hidden = torch.randn(len(rows), model_config.hidden_size)
    with torch.inference_mode():
        (short,) = pack_batches([RenderedConversation(rows[:64], 63)], 64)
        block(hidden[:64], short)  # compiles kernels
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before, start = psutil.Process().memory_info().rss - hidden.nbytes, time.perf_counter()
        block(hidden, batch, in_place=True)
    measured, seconds = peak_memory() - before, round(time.perf_counter() - start, 1)
    estimate = MemoryEstimate(SimpleNamespace(model_config=model_config), BFLOAT16)  # type: ignore[arg-type]
    planned = estimate.activation_bytes(min(CPU_CHUNK_TOKENS, len(rows)))
    return {"planned": planned, "measured": measured, "ratio": round(measured / planned, 2), "seconds": seconds}


def quarter(directory: str) -> int:
    """Budget in bytes: the embedding and a quarter of the blocks."""
    memory_estimate = MemoryEstimate(open_checkpoint(directory), BFLOAT16)
    return memory_estimate.embedding_bytes + memory_estimate.block_count * memory_estimate.stored_block_bytes // 4


def as_stored(directory: str) -> int:
    """Budget in bytes that fits all blocks as stored, but not dequantized."""
    memory_estimate = MemoryEstimate(open_checkpoint(directory), BFLOAT16)
    beside = (
        memory_estimate.embedding_bytes
        + memory_estimate.non_block_bytes
        + memory_estimate.product_buffer_bytes(keep_dequantized=False)
        + memory_estimate.activation_bytes(1024)
    )
    return beside + memory_estimate.block_count * memory_estimate.block_bytes(keep_dequantized=False)


def token_rows(scorer: Scorer, length: int) -> list[RenderedConversation]:
    """Conversations of `length` random tokens, `SWEEP` tokens in total."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(10, scorer.checkpoint.model_config.vocab_size, (SWEEP // length, length), generator=generator)
    return [RenderedConversation(row, length - 1) for row in drawn.tolist()]


MEASURES = {each.__name__: each for each in (rows, lengths, loading, streamed, activations)}
CHILDREN = {each.__name__: each for each in (score, by_length, load, load_alone, sweep, block_activations)}

if __name__ == "__main__":
    sys.exit(main())
