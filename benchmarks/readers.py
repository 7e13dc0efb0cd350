"""Compare the scores of transformers, with gptqmodel or bitsandbytes, with ours.

    python benchmarks/readers.py output/demo-gptq-4bit output/demo-nf4 --count 64

Prints one JSON line per checkpoint, with differences in standard deviations of our scores over bundled conversations,
for three ways to load it:

    widened  all tensors cast to float32 after loading; only a different interpretation of the stored tensors differs
    float32  `dtype=torch.float32`; gptqmodel still rounds weights to fp16, bitsandbytes multiplies in bf16, and
             LLM.int8 rounds activations to int8
    stored   the checkpoint's dtype, bf16, which most users run

GPTQ needs the `interop` extra.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibration.sampling import sample  # noqa: E402
from calibration.sources import load_rows  # noqa: E402
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from runtime.checkpoints.transformers_model import Qwen2ForRewardModel  # noqa: E402
from runtime.conversations.rendering import RenderedConversation, Renderer  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402

READINGS = ("widened", "float32", "stored")


def main() -> int:
    arguments = parse()
    for directory in arguments.models:
        with redirect_stdout(sys.stderr):  # gptqmodel prints a banner
            result = compare(open_checkpoint(directory), arguments)
        print(json.dumps({"model": str(directory)} | result), flush=True)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL_DIR")
    parser.add_argument("--count", type=int, default=64, help="conversations (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="skip longer conversations (default %(default)s)")
    parser.add_argument("--calibration", help="file of conversations (default: the bundled ones)")
    parser.add_argument(
        "--readings", nargs="+", choices=READINGS, default=READINGS, help="ways to load (default: all three)"
    )
    return parser.parse_args()


def compare(checkpoint: Checkpoint, arguments: argparse.Namespace) -> dict[str, Any]:
    """Differences between the reader's scores and ours, in standard deviations of ours."""
    rows = draw_rows(checkpoint, arguments)
    ours = Scorer(checkpoint).score_rendered(rows).double()
    result: dict[str, Any] = {"layout": layout(checkpoint), "conversations": len(rows), "score_std": float(ours.std())}
    for reading in arguments.readings:
        start = time.perf_counter()
        theirs = score(read(checkpoint, reading), rows)
        difference = (theirs - ours).abs() / ours.std()
        seconds = round(time.perf_counter() - start, 1)
        result[reading] = {"max": float(difference.max()), "mean": float(difference.mean()), "seconds": seconds}
    return result


def draw_rows(checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[RenderedConversation]:
    limit = min(arguments.max_tokens, checkpoint.model_config.max_position_embeddings)
    renderer = Renderer.from_directory(checkpoint.directory, limit)
    drawn = sample(load_rows(arguments.calibration), renderer, rows_wanted=arguments.count, parity_pairs=0)
    return [row.rendered for row in drawn.calibration]


def layout(checkpoint: Checkpoint) -> str:
    quantization = checkpoint.quantization
    return "16-bit" if quantization is None else f"{quantization.method}-{quantization.bits}"


def read(checkpoint: Checkpoint, reading: str) -> Qwen2ForRewardModel:
    """Load with transformers, in one of the `READINGS`."""
    method = checkpoint.quantization.method if checkpoint.quantization else None
    options: dict[str, Any] = {"dtype": checkpoint.model_config.dtype if reading == "stored" else torch.float32}
    if method == "gptq":
        from transformers import GPTQConfig

        # `backend="auto"` picks a kernel on CPUs that rounds more.
        options["quantization_config"] = GPTQConfig(bits=checkpoint.quantization.bits, backend="torch")
    model = Qwen2ForRewardModel.from_pretrained(checkpoint.directory, **options).eval()
    if reading == "widened":
        if method == "int8":
            model.dequantize(dtype=torch.float32)  # otherwise activations are rounded to int8
        widen(model)
    return model


def widen(model: Qwen2ForRewardModel) -> None:
    """Cast what is still 16-bit to fp32: GPTQ's scales and biases; norms and embedding under bitsandbytes."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' Linear4bit
            module.support_avx512bf16_for_cpu = False  # otherwise it multiplies in bf16 whatever the compute dtype
            module.compute_dtype = torch.float32


@torch.inference_mode()
def score(model: Qwen2ForRewardModel, rows: list[RenderedConversation]) -> torch.Tensor:
    """float64 [n], one conversation at a time, without padding."""
    with torch.compiler.set_stance("force_eager"):  # otherwise gptqmodel compiles a kernel for each shape
        return torch.cat([model(torch.tensor([row.token_ids])) for row in rows]).double()


if __name__ == "__main__":
    sys.exit(main())
