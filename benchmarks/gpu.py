"""Everything there is to measure on a GPU, in one command: one JSON line a figure, within ten minutes.

    python benchmarks/gpu.py                     on a CUDA machine: true shapes of the 72B
    python benchmarks/gpu.py --toy               anywhere, on the CPU, shapes a 32nd as wide

Figures so far: the matmul peak; one true-shape 72B block scoring packed conversations, 16-bit and GPTQ-4, as
tokens a second and share of that peak; one block quantized, seconds by stage. Weights are random and made on
the device, so it needs nothing but torch and this repository.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quantize.correction import Correction  # noqa: E402
from quantize.factor import factorise  # noqa: E402
from quantize.gptq import solve  # noqa: E402
from quantize.hessian import Hessian  # noqa: E402
from quantize.plan import Load, Plan  # noqa: E402
from quantize.settings import GPTQSettings  # noqa: E402
from runtime.architecture import BLOCK_LINEARS, BLOCK_NORMS, Architecture  # noqa: E402
from runtime.batching import pack  # noqa: E402
from runtime.chat import Rendered  # noqa: E402
from runtime.linear import DenseLinear, make_linear  # noqa: E402
from runtime.machine import matmul_rate  # noqa: E402
from runtime.numerics import BFLOAT16  # noqa: E402
from runtime.packing import pack_gptq  # noqa: E402
from runtime.quantization import BLOCK_LINEAR_GROUPS, Quantization  # noqa: E402
from runtime.qwen2 import Block, Rotary  # noqa: E402

SEQUENCE = 512  # tokens of each random conversation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small shapes on the CPU, to see that everything runs")
    arguments = parser.parse_args()
    bench = Bench("cpu" if arguments.toy else "cuda:0", divide=32 if arguments.toy else 1)
    bench.peak()
    bench.forward()
    bench.quantize()
    return 0


class Bench:
    """One device, one block of one size."""

    def __init__(self, device: str, divide: int):
        self.device = device
        heads = 64 // min(divide, 8)
        hidden, inner = 8192 // divide, 29568 // divide // 32 * 32
        self.architecture = Architecture(
            hidden, inner, 1, heads, heads // 8, hidden // heads, 1000, 32768, 1e-6, 1e6, torch.bfloat16
        )
        self.group_size = 128 if divide == 1 else 32
        self.quantization = Quantization("gptq", 4, self.group_size)
        self.sizes = (1024, 4096, 16384) if divide == 1 else (512,)
        self.calibration_tokens = 262_144 if divide == 1 else 1024
        self.generator = torch.Generator(device).manual_seed(0)
        self.rate = 0.0

    def peak(self) -> None:
        """The machine's bf16 matrix product."""
        self.rate = matmul_rate(torch.bfloat16, self.device, 1.0)
        say("matmul_peak", tflops=round(self.rate / 1e12, 1), device=self.name())

    def forward(self) -> None:
        """Tokens a second through one block, and the share of the peak that its products reach."""
        for kind in ("16-bit", "gptq-4"):
            block = self.block(packed=kind == "gptq-4")
            for tokens in self.sizes:
                rows = [Rendered([0] * SEQUENCE, SEQUENCE - 1)] * (tokens // SEQUENCE)
                batch = pack(rows, tokens, share=False)[0].to(self.device)
                hidden = torch.randn(tokens, self.architecture.hidden_size, device=self.device)
                seconds = self.timed(lambda block=block, hidden=hidden, batch=batch: block(hidden, batch))
                share = 2 * self.plan(tokens).block_weights * tokens / seconds / self.rate
                say(
                    "block_forward",
                    kind=kind,
                    tokens=tokens,
                    tokens_per_second=round(tokens / seconds),
                    share_of_peak=round(share, 3),
                )

    def quantize(self) -> None:
        """Hessian, factorisation and solve of each group of one block, and 80 blocks of that."""
        stages = dict.fromkeys(("hessian", "correction", "factorise", "solve"), 0.0)
        settings = GPTQSettings(group_size=self.group_size)
        for group in BLOCK_LINEAR_GROUPS:
            in_features = self.architecture.linear_shape(group[0])[1]
            x = torch.randn(4096, in_features, device=self.device, generator=self.generator).bfloat16()
            hessian = Hessian(in_features, self.device)
            rounds = max(1, self.calibration_tokens // len(x))
            stages["hessian"] += self.once(lambda h=hessian, x=x, n=rounds: [h.add(x) for _ in range(n)])
            matrix = hessian.matrix()
            found: list[Any] = []
            stages["factorise"] += self.once(lambda m=matrix, f=found: f.append(factorise(m, settings)))
            linears = [DenseLinear(self.weight(name)) for name in group]
            correction, weight = Correction(linears, in_features, self.device), hessian.weight
            lacking = torch.randn(len(x), 1, device=self.device) if len(group) == 1 else None
            stages["correction"] += self.once(
                lambda c=correction, x=x, r=lacking, n=rounds: [c.add(x, 0.9 * x, r, None) for _ in range(n)]
            )
            for linear in linears:
                targets: list[Any] = []
                stages["correction"] += self.once(
                    lambda t=targets, c=correction, f=found, each=linear, w=weight: t.append(c.target(each, f[0], w))
                )
                stages["solve"] += self.once(lambda t=targets, f=found: solve(t[0], f[0], settings))
        say(
            "quantize_block",
            tokens=self.calibration_tokens,
            peak_gib=self.peak_memory(),
            eighty_blocks_minutes=round(sum(stages.values()) * 80 / 60, 1),
            **{f"{stage}_seconds": round(seconds, 2) for stage, seconds in stages.items()},
        )

    def block(self, packed: bool) -> Block:
        """A block of random weights."""
        linears = {name: self.linear(name, packed) for name in BLOCK_LINEARS}
        norms = {name: torch.ones(self.architecture.hidden_size, device=self.device) for name in BLOCK_NORMS}
        return Block(self.architecture, norms, linears, Rotary(self.architecture, SEQUENCE, self.device), BFLOAT16)

    def linear(self, name: str, packed: bool) -> Any:
        out_features, in_features = shape = self.architecture.linear_shape(name)
        if not packed:
            return DenseLinear(self.weight(name))
        groups = self.quantization.groups(in_features)
        codes = torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8, device=self.device)
        zeros = torch.full((groups, out_features), 8, dtype=torch.uint8, device=self.device)
        scales = torch.full((groups, out_features), 0.25 * in_features**-0.5, dtype=torch.float16, device=self.device)
        g_idx = torch.arange(in_features, device=self.device) // self.group_size
        return make_linear(pack_gptq(codes, zeros, scales, g_idx, 4), self.quantization, shape)

    def weight(self, name: str) -> torch.Tensor:
        out_features, in_features = self.architecture.linear_shape(name)
        weight = torch.randn(out_features, in_features, device=self.device, generator=self.generator)
        return (weight * in_features**-0.5).bfloat16()

    def plan(self, tokens: int) -> Plan:
        return Plan(self.architecture, self.quantization, Load(tokens, 0, tokens), True, True, 2, False, self.device)

    def timed(self, action: Callable[[], Any], rounds: int = 5) -> float:
        """Median seconds of `rounds` runs, after two to warm up."""
        return statistics.median([self.once(action) for _ in range(rounds + 2)][2:])

    def once(self, action: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def name(self) -> str:
        return "cpu" if self.device == "cpu" else torch.cuda.get_device_name()

    def peak_memory(self) -> float | None:
        return None if self.device == "cpu" else round(torch.cuda.max_memory_allocated() / 2**30, 1)


def say(figure: str, **values: Any) -> None:
    """One JSON line, at once."""
    print(json.dumps({"figure": figure, **values}), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
