"""Quantize a few blocks with the 72B's shapes on this machine, and project the time of 80 blocks on an H100.

    python benchmarks/true_shapes.py --work /tmp/true-shapes                 about 20 GB of disk, 14 GB of memory
    python benchmarks/true_shapes.py --work /tmp/toy --divide 16             the same with 1/16 of the width

The script writes a checkpoint of random weights with outlier channels (hidden size 8192, intermediate size 29568, 64
heads, 8 key-value heads, the demo's vocabulary) and quantizes it with `quantize/run.py`. It prints a table and one JSON
line: peak memory and the plan's estimate, seconds per stage, and the projection with its assumptions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quantize.job.gradient_plan import GradientPlan  # noqa: E402
from quantize.job.plan import QuantizationPlan, TokenCounts  # noqa: E402
from runtime.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig, block_prefix  # noqa: E402
from runtime.checkpoints.quantization_config import QuantizationConfig  # noqa: E402
from runtime.common.terminal import GIB, parse_size  # noqa: E402

# Assumed sustained FLOP/s of an H100 (dense, below the data sheet's peak) per stage of `QuantizationPlan.flops`.
H100 = {
    "reference stream": 550e12,  # bf16 products
    "quantized stream": 520e12,  # the same, with weights dequantized once per batch
    "second gate and up": 520e12,
    "Hessians": 450e12,  # bf16 products with fp32 sums; the symmetric half is computed, 9/16 of the count
    "backward sweep": 450e12,  # bf16 products; attention tile by tile
    "correction": 200e12,  # bf16 moments; its triangular solves are fp32
    "factorisation": 25e12,  # fp32, blocked
    "solve": 20e12,  # fp32 products of thin tiles, limited by memory bandwidth
}
STEP = 40e-6  # seconds: some ten kernel launches for each diagonal of the solve, of which a linear has 2 (in + out)
PCIE = 25e9  # bytes/s from host memory


def main() -> int:
    arguments = parse()
    model, output = arguments.work / "model", arguments.work / "quantized"
    if not (model / "config.json").exists():
        write_checkpoint(model, arguments.layers, arguments.divide, arguments.seed)
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        str(ROOT / "quantize" / "run.py"),
        "--model",
        str(model),
        "--output",
        str(output),
        "--json",
        "--dtype",
        "bfloat16",
        "--rows",
        str(arguments.rows),
        "--parity-pairs",
        str(arguments.parity_pairs),
        "--max-tokens",
        str(arguments.max_tokens),
        *arguments.extra,
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    sys.stderr.write(run.stderr)
    if run.returncode:
        return run.returncode
    result = measure(output, json.loads(run.stdout.splitlines()[-1]), run.stderr)
    for name, value in result.items():
        print(f"{name:<24} {value}", file=sys.stderr)
    print(json.dumps(result))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the checkpoint and its variant")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--divide", type=int, default=1, help="divide all widths by this, for a quick run")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--parity-pairs", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("extra", nargs="*", help="further arguments of quantize/run.py, after --")
    return parser.parse_args()


def write_checkpoint(directory: Path, layers: int, divide: int, seed: int) -> None:
    """Write random weights scaled like trained ones, with a few outlier channels."""
    directory.mkdir(parents=True)
    demo = open_checkpoint("demo")
    for file in demo.tokenizer_files():
        shutil.copyfile(file, directory / file.name)
    config = {
        "architectures": ["Qwen2ForRewardModel"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 8192 // divide,
        "intermediate_size": 29568 // divide,
        "num_hidden_layers": layers,
        "num_attention_heads": 64 // min(divide, 8),
        "num_key_value_heads": 8 // min(divide, 8),
        "vocab_size": demo.model_config.vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "dtype": "bfloat16",
    }
    model_config = ModelConfig.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    outliers = torch.randperm(model_config.hidden_size, generator=generator)[: max(4, model_config.hidden_size // 500)]
    weight_map: dict[str, str] = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {name: random_tensor(name, shape, outliers, generator) for name, shape in shapes.items()}
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(layers):
        shapes = {block_prefix(index) + name: shape for name, shape in model_config.block_shapes().items()}
        save(f"block-{index}.safetensors", shapes)
    save("outer.safetensors", model_config.non_block_shapes())
    index_file = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def random_tensor(
    name: str, shape: tuple[int, ...], outliers: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Norms near 1, but 20 in outlier channels; biases near 0.1; weights with standard deviation 1 / sqrt(in)."""
    values = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
    if "norm" in name:
        values = 1 + 0.1 * values
        values[outliers] = 20
    elif name.endswith("bias"):
        values *= 0.1
    elif name != "model.embed_tokens.weight":
        values *= shape[1] ** -0.5
    return values


def measure(output: Path, result: dict, log: str) -> dict:
    """Memory, seconds per stage of the slowest block, and the projection."""
    blocks = [json.loads(line) for line in (output / "job" / "blocks.jsonl").read_text().splitlines()]
    slowest = max(blocks, key=lambda block: block["seconds"]["all"])
    planned = re.search(r"peak memory\W+([\d.]+ [KMG]iB)", log)
    assert planned is not None, log
    losses = {name: round(figures["relative_loss"], 6) for name, figures in slowest["linears"].items()}
    return {
        "seconds": result["seconds"],
        "peak_gib": round(result["peak_memory"] / GIB, 2),
        "plan_peak_gib": round(parse_size(planned[1]) / GIB, 2),
        "block_seconds": {name: round(value, 1) for name, value in slowest["seconds"].items()},
        "relative_losses": losses,
        "projection": project(),
    }


def project(tokens: int = 8 * 29568, parity_tokens: int = 375_000, blocks: int = 80) -> dict:
    """Project the time on an H100 from the plan's operation counts: eight tokens an input, 500 pairs of 750 tokens."""
    model_config = ModelConfig(8192, 29568, blocks, 64, 8, 128, 152064, 32768, 1e-6, 1e6, torch.bfloat16)
    plan = QuantizationPlan(
        model_config,
        QuantizationConfig("gptq", 4, 128),
        4,
        TokenCounts(tokens, parity_tokens, 16384),
        matmul_bytes=2,
        prefetch=True,
        device="cuda:0",
        gradients=GradientPlan(model_config, tokens, 16384, 2),
    )
    assert plan.gradients is not None
    stages = {name: work / H100[name] for name, work in plan.flops().items()}
    stages["Hessians"] *= 9 / 16
    stages["solve steps"] = STEP * sum(2 * sum(model_config.linear_shape(name)) for name in BLOCK_LINEARS)
    activations = (12 * tokens + 5 * parity_tokens) * 4 * 8192 + 3 * plan.gradients.writes / blocks
    stages["transfers"] = (plan.reads * plan.block_bytes + activations) / PCIE
    return {
        "assumptions": {"rates": H100, "step_s": STEP, "pcie_bytes_s": PCIE}
        | {"tokens": tokens, "parity_tokens": parity_tokens},
        "block_seconds": {name: round(seconds, 2) for name, seconds in stages.items()},
        "all_minutes": round(sum(stages.values()) * blocks / 60, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
