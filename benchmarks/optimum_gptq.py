"""Quantize a reward model with gptqmodel through optimum, for `peer_gptqmodel.py`.

    python benchmarks/optimum_gptq.py MODEL ROWS.json OUTPUT --bits 4 --group-size 128

ROWS.json is a list of lists of token ids. Settings that are not options here keep optimum's defaults. gptqmodel's own
interface cannot be used, since it loads every Qwen2 as a language model and drops the score head. The last output line
is JSON: seconds per stage, and the loss that gptqmodel reports for each linear.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # avoids a C++ build at first use
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", os.environ.get("OMP_NUM_THREADS", "2"))

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS, QuantizationConfig  # noqa: E402
from runtime.checkpoints.transformers_model import Qwen2ForRewardModel  # noqa: E402
from runtime.common.process_memory import peak_memory  # noqa: E402

if TYPE_CHECKING:
    from optimum.gptq import GPTQQuantizer


def main() -> int:
    arguments = parse()
    from optimum.gptq import GPTQQuantizer  # after `parse`, so that --help works without optimum

    seconds: dict[str, float] = {}
    start = time.perf_counter()
    model = Qwen2ForRewardModel.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    seconds["load"] = time.perf_counter() - start
    losses = record_losses()
    quantizer = GPTQQuantizer(
        bits=arguments.bits,
        group_size=arguments.group_size,
        dataset=read_rows(arguments.rows),
        modules_in_block_to_quantize=[list(group) for group in BLOCK_LINEAR_GROUPS],
        block_name_to_quantize="model.layers",
        **({} if arguments.damp_percent is None else {"damp_percent": arguments.damp_percent}),
    )
    start = time.perf_counter()
    quantizer.quantize_model(model)
    seconds["quantize"] = time.perf_counter() - start
    start = time.perf_counter()
    save(quantizer, model, arguments)
    seconds["save"] = time.perf_counter() - start
    settings = {name: getattr(quantizer, name) for name in ("damp_percent", "desc_act", "act_group_aware", "sym")}
    memory = peak_memory()
    print(json.dumps({"seconds": seconds, "peak_memory": memory, "settings": settings, "losses": losses}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("rows", type=Path, help="JSON file of token id lists")
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--damp-percent", type=float, help="default: optimum's, 0.1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def read_rows(path: Path) -> list[dict[str, list[list[int]]]]:
    rows = json.loads(path.read_text())
    return [{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in rows]


def record_losses() -> list[float]:
    """Patch optimum to append the average loss of every linear to the returned list, in order of quantization."""
    from optimum.gptq import quantizer as optimum_quantizer

    losses: list[float] = []

    class Recording(optimum_quantizer.GPTQ):
        def fasterquant(self, *arguments: Any, **options: Any) -> tuple:
            outputs = super().fasterquant(*arguments, **options)
            losses.append(outputs[4])
            return outputs

    optimum_quantizer.GPTQ = Recording
    return losses


def save(quantizer: GPTQQuantizer, model: Qwen2ForRewardModel, arguments: argparse.Namespace) -> None:
    """Write the checkpoint with a correct quantization_config; optimum labels its v1 weights gptq_v2."""
    config = json.loads((arguments.model / "config.json").read_text())
    stored = getattr(torch, config.get("torch_dtype") or config["dtype"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)  # embedding, norms and head keep their stored dtype
    quantizer.save(model, str(arguments.output))
    for file in arguments.model.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json") and file.is_file():
            shutil.copy(file, arguments.output)
    layout = QuantizationConfig(method="gptq", bits=arguments.bits, group_size=arguments.group_size)
    config["quantization_config"] = layout.to_config() | {"damp_percent": quantizer.damp_percent}
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2))
    (arguments.output / "quantize_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
