"""Compare scoring speed with other implementations, on the same weights and rows.

    python benchmarks/scoring.py --pairs pairs.jsonl.gz --best-of-n best.jsonl.gz --count 300 --json result.json

Rows are `--count` conversations of preference pairs, and as many of best-of-N sets. Contenders:

    card       the model card's loop: transformers in bf16, one conversation at a time
    padded     transformers in bf16, batches of eight, padded on the right
    ours       worldpm-kit, 16-bit weights, bf16 products
    gptq-4     worldpm-kit, the demo quantized by `quantize/run.py --bits 4`, bf16 products
    nf4        transformers with bitsandbytes, the demo quantized by `quantize/run.py --method nf4`, one at a time
    gptqmodel  transformers with gptqmodel and its default kernel for this machine, one at a time
    ours-float32, gptq-4-float32  worldpm-kit with fp32 products, its default on CPUs that are slower in bf16

`share_of_matmul` is the FLOP/s of the linears, with shared prompts counted once, relative to dense bf16 products of the
same shapes in the same run. Each contender scores the rows `--rounds` times and the fastest round counts; the JSON has
all rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibration.sources import load_rows  # noqa: E402
from runtime.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig  # noqa: E402
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS  # noqa: E402
from runtime.checkpoints.transformers_model import Qwen2ForRewardModel  # noqa: E402
from runtime.common.errors import ConversationError  # noqa: E402
from runtime.conversations.rendering import RenderedConversation, Renderer  # noqa: E402
from runtime.conversations.row_files import read_rows  # noqa: E402
from runtime.modeling.packed_batch import pack_batches  # noqa: E402
from runtime.modeling.precision import BFLOAT16, FLOAT32  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402

Score = Callable[[list[RenderedConversation]], torch.Tensor]
CONTENDERS = ("card", "padded", "ours", "gptq-4", "nf4", "gptqmodel", "ours-float32", "gptq-4-float32")


def main() -> int:
    arguments = parse()
    checkpoint = open_checkpoint("demo")
    renderer = Renderer.from_directory(checkpoint.directory, arguments.max_tokens)
    sets = {"pairs": draw_pairs(arguments, renderer), "best-of-n": draw_best_of_n(arguments, renderer)}
    rate = matmul_rate(checkpoint.model_config, arguments.token_budget)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "matmul_gflops": round(rate / 1e9), "sets": {}}
    for name, rows in sets.items():
        tokens = sum(len(row.token_ids) for row in rows)
        computed = sum(batch.tokens for batch in pack_batches(rows, arguments.token_budget))
        result["sets"][name] = {"conversations": len(rows), "tokens": tokens, "computed_tokens": computed, "runs": {}}
    for contender in arguments.only or CONTENDERS:
        with redirect_stdout(sys.stderr):
            score = load(contender, arguments)
        for name, rows in sets.items():
            run = time_rounds(score, rows, arguments)
            about = result["sets"][name]
            work = flops_per_token(checkpoint.model_config) * about["computed_tokens"]
            run["share_of_matmul"] = round(work * run["conversations"] / len(rows) / run["seconds"] / rate, 3)
            about["runs"][contender] = run
            print(name, contender, json.dumps(run), file=sys.stderr, flush=True)
        del score
    for about in result["sets"].values():
        runs = about["runs"]
        for run in runs.values():
            run["against"] = {other: round(run["per_second"] / runs[other]["per_second"], 2) for other in runs}
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    else:
        print(text)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="preference pairs in a TRL format")
    parser.add_argument("--best-of-n", type=Path, required=True, help='rows {"prompt": ..., "responses": [...]}')
    parser.add_argument("--count", type=int, default=300, help="conversations per set (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="skip longer conversations (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default %(default)s)")
    parser.add_argument("--token-budget", type=int, default=1024, help="tokens per batch (default %(default)s)")
    parser.add_argument("--gptq", type=Path, default=ROOT / "output" / "demo-gptq-4bit", help="GPTQ-4 variant")
    parser.add_argument("--nf4", type=Path, default=ROOT / "output" / "demo-nf4", help="NF4 variant")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="contenders to run (default: all)")
    parser.add_argument("--json", type=Path, help="write the result here (default: standard output)")
    return parser.parse_args()


# ---- rows -----------------------------------------------------------------------------------------------


def draw_pairs(arguments: argparse.Namespace, renderer: Renderer) -> list[RenderedConversation]:
    pairs = load_rows(arguments.pairs).pairs
    random.Random(0).shuffle(pairs)
    return fill(arguments.count, renderer, ((pair.chosen_conversation, pair.rejected_conversation) for pair in pairs))


def draw_best_of_n(arguments: argparse.Namespace, renderer: Renderer) -> list[RenderedConversation]:
    rows = [row for _, row in read_rows(arguments.best_of_n)]
    random.Random(0).shuffle(rows)
    return fill(
        arguments.count,
        renderer,
        ([[*row["prompt"], {"role": "assistant", "content": each}] for each in row["responses"]] for row in rows),
    )


def fill(count: int, renderer: Renderer, groups: Any) -> list[RenderedConversation]:
    """Render groups of conversations until there are `count`; groups with one that is too long are skipped."""
    rows: list[RenderedConversation] = []
    for group in groups:
        if len(rows) >= count:
            break
        try:
            rows += [renderer.render(conversation) for conversation in group]
        except ConversationError:  # too long
            continue
    return rows[:count]


# ---- contenders -----------------------------------------------------------------------------------------


def load(contender: str, arguments: argparse.Namespace) -> Score:
    demo = open_checkpoint("demo").directory
    if contender.startswith(("ours", "gptq-4")):
        source = open_checkpoint(demo if contender.startswith("ours") else arguments.gptq)
        precision = FLOAT32 if contender.endswith("float32") else BFLOAT16
        return Scorer(source, precision=precision, token_budget=arguments.token_budget).score_rendered
    source = {"nf4": arguments.nf4, "gptqmodel": arguments.gptq}.get(contender, demo)
    model = Qwen2ForRewardModel.from_pretrained(source, dtype=torch.bfloat16).eval()
    return partial(padded, model, 8) if contender == "padded" else partial(padded, model, 1)


@torch.inference_mode()
def padded(model: Qwen2ForRewardModel, size: int, rows: list[RenderedConversation]) -> torch.Tensor:
    """Score batches of `size` in the given order, padded on the right."""
    scores = []
    with torch.compiler.set_stance("force_eager"):  # otherwise gptqmodel compiles a kernel for each length
        for start in range(0, len(rows), size):
            ids = [torch.tensor(row.token_ids) for row in rows[start : start + size]]
            if size == 1:
                scores.append(model(ids[0][None]))
                continue
            batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
            scores.append(model(batch, attention_mask=mask))
    return torch.cat(scores)


def time_rounds(score: Score, rows: list[RenderedConversation], arguments: argparse.Namespace) -> dict[str, Any]:
    score(rows[:8])
    seconds = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        score(rows)
        seconds.append(round(time.perf_counter() - start, 2))
    best = min(seconds)
    return {"conversations": len(rows), "seconds": best, "per_second": round(len(rows) / best, 2), "rounds": seconds}


# ---- FLOP/s ---------------------------------------------------------------------------------------------


def flops_per_token(model_config: ModelConfig) -> float:
    """FLOPs of the linears per token; attention and the shortcut in the last block are not counted."""
    weights = sum(out * inner for out, inner in map(model_config.linear_shape, BLOCK_LINEARS))
    return 2.0 * weights * model_config.num_hidden_layers


def matmul_rate(model_config: ModelConfig, tokens: int, rounds: int = 40) -> float:
    """FLOP/s of bf16 products with one block's shapes, the best of `rounds`."""
    products = []
    for names in BLOCK_LINEAR_GROUPS:
        shapes = [model_config.linear_shape(name) for name in names]
        weight = torch.randn(sum(out for out, _ in shapes), shapes[0][1]).bfloat16()
        products.append((torch.randn(tokens, shapes[0][1]).bfloat16(), weight))
    work = sum(2.0 * x.numel() * len(weight) for x, weight in products)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        for x, weight in products:
            torch.nn.functional.linear(x, weight)
        best = max(best, work / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    sys.exit(main())
