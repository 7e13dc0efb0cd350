"""Quantize a reward model with AutoRound into the GPTQ layout, for `peer_gptqmodel.py`.

    python benchmarks/autoround_gptq.py MODEL ROWS.json OUTPUT --bits 4 --group-size 128

Arguments and output are those of `optimum_gptq.py`; `pip install auto-round` first. AutoRound tunes the rounding by
signed gradient descent, 200 steps per block by default. It masks the last token of every row in its loss and attention:
a language model predicts nothing from it, but in a reward model it is the scored token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.checkpoints.quantization_config import QuantizationConfig  # noqa: E402
from runtime.checkpoints.transformers_model import Qwen2ForRewardModel  # noqa: E402
from runtime.common.process_memory import peak_memory  # noqa: E402


def main() -> int:
    arguments = parse()
    from auto_round import AutoRound  # after `parse`, so that --help works without it

    start = time.perf_counter()
    model = Qwen2ForRewardModel.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    rows = read_rows(arguments.rows)
    tuner = AutoRound(
        model,
        PreTrainedTokenizerFast.from_pretrained(arguments.model),
        bits=arguments.bits,
        group_size=arguments.group_size,
        dataset=rows,
        nsamples=len(rows),
        seqlen=min(row["input_ids"].shape[1] for row in rows),  # AutoRound drops rows shorter than this
        iters=arguments.iterations,
        batch_size=1,  # rows differ in length; accumulation gives a step 8 rows, AutoRound's default batch
        gradient_accumulate_steps=min(8, len(rows)),
        device_map="cpu",
    )
    written = tuner.quantize_and_save(str(arguments.output / "auto-round"), format="auto_gptq")[1]
    settle(Path(written), arguments)
    seconds = {"all": time.perf_counter() - start}
    settings = {"iterations": arguments.iterations}
    print(json.dumps({"seconds": seconds, "peak_memory": peak_memory(), "settings": settings}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("rows", type=Path, help="JSON file of token id lists")
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def read_rows(path: Path) -> list[dict[str, torch.Tensor]]:
    rows = [torch.tensor([row]) for row in json.loads(path.read_text())]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def settle(written: Path, arguments: argparse.Namespace) -> None:
    """Move the weights from AutoRound's subdirectory to `output`, and copy the model's other files there."""
    for file in [*written.glob("*.safetensors"), *written.glob("*.index.json")]:
        file.rename(arguments.output / file.name)
    for file in arguments.model.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json") and file.is_file():
            shutil.copy(file, arguments.output)
    config: dict[str, Any] = json.loads((arguments.model / "config.json").read_text())
    layout = QuantizationConfig(method="gptq", bits=arguments.bits, group_size=arguments.group_size)
    config["quantization_config"] = layout.to_config()
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(arguments.output / "auto-round")


if __name__ == "__main__":
    sys.exit(main())
