"""Time dequantizing a linear's weight against the matrix product with it: one JSON line per format and shape.

    python benchmarks/dequantize.py                          shapes of the 72B and the demo, on the CPU
    python benchmarks/dequantize.py --shapes demo --tokens 512 --device cuda:0

`share` is the time of the dequantization divided by that of a bf16 product with `--tokens` tokens, both the best of
alternating runs; `twin_share` is the same for the reference implementation. `gb_per_second` counts packed bytes read
and bf16 bytes written, `copy_gb_per_second` bytes read and written by a copy of the bf16 weight.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.checkpoints.quantization_config import QuantizationConfig  # noqa: E402
from runtime.execution.devices import device_context  # noqa: E402
from runtime.kernels.packed_weight import packed_weight  # noqa: E402
from runtime.kernels.reference import dequantize_gptq, dequantize_int8, dequantize_nf4  # noqa: E402
from tests.helpers.packed import packed_tensors  # noqa: E402

SHAPES = {
    "72b": ((8192, 8192), (29568, 8192), (8192, 29568)),
    "demo": ((576, 576), (1536, 576), (576, 1536)),
}
TOKENS = {"72b": 2048, "demo": 1024}
KINDS = ("gptq-4", "gptq-8", "gptq-4 permuted", "nf4", "int8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=sorted(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument(
        "--tokens", type=int, help="tokens in the product (default: 2048 for the 72b, 1024 for the demo)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time per line (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with device_context(torch.device(arguments.device)):
        for size in arguments.shapes:
            for shape, kind in itertools.product(SHAPES[size], arguments.kinds):
                tokens = arguments.tokens or TOKENS[size]
                group_size = 128 if size == "72b" else 64
                figures = measure(kind, shape, group_size, tokens, arguments.device, arguments.seconds)
                print(json.dumps({"kind": kind, "shape": shape, "tokens": tokens, **figures}), flush=True)
    return 0


def measure(
    kind: str, shape: tuple[int, int], group_size: int, tokens: int, device: str, seconds: float
) -> dict[str, Any]:
    """Best times for one format and shape [N, K], measured for about `seconds`."""
    quantization = quantization_of(kind, group_size)
    made = packed_tensors(shape, quantization, permuted="permuted" in kind)
    tensors = {suffix: tensor.to(device) for suffix, tensor in made.items()}
    weight = packed_weight(tensors, quantization, shape)
    out = torch.empty(shape[::-1] if weight.transposed else shape, dtype=torch.bfloat16, device=device)
    out = out.t() if weight.transposed else out
    dense = torch.randn(shape, device=device).bfloat16()
    other, x = torch.zeros_like(dense), torch.randn(tokens, shape[1], device=device).bfloat16()
    weight.dequantize_into(out)
    assert torch.equal(out, twin(tensors, quantization, shape))
    best = best_of(
        {
            "product": lambda: torch.nn.functional.linear(x, dense),
            "dequantize": lambda: weight.dequantize_into(out),
            "twin": lambda: twin(tensors, quantization, shape),
            "copy": lambda: other.copy_(dense),
        },
        seconds,
        torch.device(device),
    )
    packed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return {
        "share": round(best["dequantize"] / best["product"], 4),
        "twin_share": round(best["twin"] / best["product"], 4),
        "dequantize_ms": round(best["dequantize"] * 1e3, 3),
        "product_ms": round(best["product"] * 1e3, 3),
        "tflops": round(2 * tokens * math.prod(shape) / best["product"] / 1e12, 3),
        "gb_per_second": round((packed_bytes + out.nbytes) / best["dequantize"] / 1e9, 1),
        "copy_gb_per_second": round(2 * dense.nbytes / best["copy"] / 1e9, 1),
        "threads": torch.get_num_threads(),
    }


def quantization_of(kind: str, group_size: int) -> QuantizationConfig:
    if kind.startswith("gptq"):
        return QuantizationConfig("gptq", int(kind[5]), group_size, sym=False)
    return QuantizationConfig("nf4", 4) if kind == "nf4" else QuantizationConfig("int8", 8)


def twin(tensors: Mapping[str, torch.Tensor], quantization: QuantizationConfig, shape: tuple[int, int]) -> torch.Tensor:
    """The weight in bf16, by the reference implementation."""
    if quantization.method == "gptq":
        return dequantize_gptq(tensors, quantization.bits, torch.bfloat16)
    if quantization.method == "nf4":
        return dequantize_nf4(tensors, shape, torch.bfloat16)
    return dequantize_int8(tensors, torch.bfloat16)


def best_of(actions: dict[str, Callable[[], Any]], seconds: float, device: torch.device) -> dict[str, float]:
    """Minimum seconds of each action; actions alternate, so that other load on the machine affects all of them."""
    best = dict.fromkeys(actions, math.inf)
    end = time.perf_counter() + seconds
    while math.inf in best.values() or time.perf_counter() < end:
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
