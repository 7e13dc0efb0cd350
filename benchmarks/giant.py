"""Write a GPTQ-4 checkpoint with the 72B's shapes and random weights, for load and placement benchmarks.

    python benchmarks/giant.py /tmp/giant --layers 80

This takes about a minute. All blocks hold the same values, since only sizes matter here. Scales keep activations in
a normal range. The tokenizer is the tests' tiny one, so score token ids and not text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.checkpoints.model_config import BIASED_LINEARS, BLOCK_LINEARS, BLOCK_NORMS, ModelConfig, block_prefix  # noqa: E402
from runtime.checkpoints.quantization_config import QuantizationConfig  # noqa: E402
from runtime.kernels.reference import pack_gptq  # noqa: E402
from tests.helpers.tiny import write_tokenizer  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--divide", type=int, default=1, help="divide every width by this")
    arguments = parser.parse_args()
    write_giant(arguments.directory, arguments.layers, arguments.divide)
    return 0


def giant_config(layers: int, divide: int = 1) -> dict:
    """The 72B's `config.json`, with widths divided by `divide`."""
    heads = 64 // min(divide, 8)
    return {
        "architectures": ["Qwen2ForRewardModel"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 8192 // divide,
        "intermediate_size": 29568 // divide // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 8,
        "vocab_size": 152064 // divide,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "dtype": "bfloat16",
    }


def write_giant(directory: Path, layers: int, divide: int = 1) -> None:
    """Write the checkpoint, with group size 128, or 32 if widths are divided."""
    whole, directory = directory, directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(directory, ignore_errors=True)  # from an interrupted run
    directory.mkdir(parents=True)
    quantization = QuantizationConfig("gptq", 4, 128 if divide == 1 else 32)
    config = giant_config(layers, divide)
    model_config = ModelConfig.from_config(config)
    generator = torch.Generator().manual_seed(0)
    block = random_block(model_config, quantization, generator)
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(layers):
        save(f"block-{index:02}.safetensors", {block_prefix(index) + name: each for name, each in block.items()})
    outer = {
        name: torch.randn(shape, generator=generator).mul_(1.0 if "embed" in name else shape[-1] ** -0.5).bfloat16()
        for name, shape in model_config.non_block_shapes().items()
    }
    outer["model.norm.weight"].fill_(1)
    save("outer.safetensors", outer)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config["quantization_config"] = quantization.to_config()
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(directory)
    directory.rename(whole)


def random_block(
    model_config: ModelConfig, quantization: QuantizationConfig, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The tensors of one packed block, named without the `model.layers.N.` prefix."""
    tensors = {name: torch.ones(model_config.hidden_size).bfloat16() for name in BLOCK_NORMS}
    for name in BLOCK_LINEARS:
        out_features, in_features = model_config.linear_shape(name)
        num_groups = quantization.num_groups(in_features)
        codes = torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8, generator=generator)
        zeros = torch.full((num_groups, out_features), 8, dtype=torch.uint8)
        scales = torch.full((num_groups, out_features), 0.2 * in_features**-0.5, dtype=torch.float16)
        g_idx = torch.arange(in_features) // quantization.group_size
        packed = pack_gptq(codes, zeros, scales, g_idx, 4)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        if name in BIASED_LINEARS:
            tensors[f"{name}.bias"] = torch.zeros(out_features).bfloat16()
    return tensors


if __name__ == "__main__":
    sys.exit(main())
