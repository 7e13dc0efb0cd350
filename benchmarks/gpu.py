"""Run all GPU benchmarks with one command: one JSON line per figure, within ten minutes.

    python benchmarks/gpu.py --work /tmp/gpu     CUDA machine: true shapes of the 72B, 45 GB of disk
    python benchmarks/gpu.py --toy               any machine: on the CPU, 1/32 of the width, a few blocks
    python benchmarks/gpu.py --device cpu --only peak forward --tokens 2048      true shapes without a GPU

Figures, in this order (`--only` selects):

    peak       FLOP/s of a large bf16 matrix product
    kernels    every dequantization and fp8 products: equality with the reference, bandwidth
    attention  difference between bf16 attention on the device and fp32 attention on the CPU
    forward    tokens/s of one block, 16-bit, GPTQ-4, GPTQ-4 in fp8 and NF4, and the share of the peak
    quantize   seconds per stage of quantizing one block
    model      a whole GPTQ-4 model: load time, memory, tokens/s, latency of a comparison; also in fp8 and streamed

Weights are random and generated here. If a figure fails, its line has the error, the others still run, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.block_stages import stage_seconds  # noqa: E402
from benchmarks.dequantize import KINDS, measure  # noqa: E402
from benchmarks.giant import giant_config, write_giant  # noqa: E402
from benchmarks.random_block import RandomBlock  # noqa: E402
from quantize.job.gradient_plan import GradientPlan  # noqa: E402
from quantize.job.plan import QuantizationPlan, TokenCounts  # noqa: E402
from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig  # noqa: E402
from runtime.checkpoints.quantization_config import QuantizationConfig  # noqa: E402
from runtime.conversations.rendering import RenderedConversation  # noqa: E402
from runtime.execution.devices import device_context, matmul_rate  # noqa: E402
from runtime.modeling.attention import causal_attention  # noqa: E402
from runtime.modeling.fp8 import E4M3, make_float8_linear, quantize_rows, scaled_mm_reference  # noqa: E402
from runtime.modeling.packed_batch import pack_batches  # noqa: E402
from runtime.modeling.qwen2 import Block  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402

FIGURES = ("peak", "kernels", "attention", "forward", "quantize", "model")
SEQUENCE = 512  # tokens of each random conversation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small shapes on the CPU, to check that everything runs")
    parser.add_argument("--work", type=Path, help="directory for the whole model (default: a temporary one)")
    parser.add_argument("--device", help="default: cuda:0, with --toy cpu")
    parser.add_argument(
        "--only", nargs="+", choices=FIGURES, default=FIGURES, metavar="NAME", help="figures to run (default: all)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help=f"batch sizes of `forward`, multiples of {SEQUENCE}")
    arguments = parser.parse_args()
    device = arguments.device or ("cpu" if arguments.toy else "cuda:0")
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {device}; torch finds no CUDA device here, try --toy or --device cpu")
    if any(tokens % SEQUENCE for tokens in arguments.tokens or []):
        parser.error(f"--tokens is {arguments.tokens}; each must be a multiple of {SEQUENCE}")
    bench = Bench(device, divide=32 if arguments.toy else 1, work=arguments.work, sizes=arguments.tokens)
    with device_context(torch.device(device)):
        for figure in FIGURES:
            if figure in arguments.only:
                bench.attempt(figure, getattr(bench, figure))
    return int(bench.failed)


class Bench:
    """The figures, on one device and for one model size."""

    def __init__(self, device: str, divide: int, work: Path | None, sizes: list[int] | None = None):
        self.device = device
        heads = 64 // min(divide, 8)
        hidden, inner = 8192 // divide, 29568 // divide // 32 * 32
        self.model_config = ModelConfig(
            hidden, inner, 1, heads, heads // 8, hidden // heads, 1000, 32768, 1e-6, 1e6, torch.bfloat16
        )
        self.group_size = 128 if divide == 1 else 32
        self.quantization = QuantizationConfig("gptq", 4, self.group_size)
        self.sizes = sizes or ([1024, 4096, 16384] if divide == 1 else [512])
        self.calibration_tokens = 262_144 if divide == 1 else 1024
        self.divide, self.work = divide, work
        self.layers = 80 if divide == 1 else 4
        self.vocabulary = giant_config(1, divide)["vocab_size"]
        self.streamed: dict[str, Any] = {"memory": {device: "20GiB"}} if divide == 1 else {"stream": True}
        self.seconds = 2.0 if divide == 1 else 0.2
        self.random_block = RandomBlock(self.model_config, self.quantization, device)
        self.failed = False

    def attempt(self, what: str, figure: Callable[[], Any]) -> Any:
        """Return what `figure` returns; if it fails, print a line with the error and return None."""
        try:
            return figure()
        except Exception as error:  # of any kind: the other figures must still run
            self.failed = True
            traceback.print_exc()
            say(what, failed=f"{type(error).__name__}: {error}")
        gc.collect()  # free what the failed figure held on the device
        return None

    @cached_property
    def rate(self) -> float:
        """FLOP/s of a large bf16 matrix product."""
        return matmul_rate(torch.bfloat16, self.device, 1.0)

    def peak(self) -> None:
        """Print the matmul rate."""
        say("matmul_peak", tflops=round(self.rate / 1e12, 1), device=self.name())

    def kernels(self) -> None:
        """Every format's dequantization compared with the reference, and its bandwidth."""
        for kind in KINDS:
            self.attempt(f"dequantize {kind}", partial(self.kernel, kind))
        self.attempt("float8", self.float8)

    def kernel(self, kind: str) -> None:
        shape = self.model_config.linear_shape("mlp.up_proj")
        say("dequantize", kind=kind, **measure(kind, shape, self.group_size, 2048, self.device, self.seconds))

    def float8(self) -> None:
        """fp8 weights and products compared with the reference, and the bandwidth."""
        packed = self.random_block.linear("self_attn.q_proj", "gptq-4")
        linear, plain = make_float8_linear(packed), make_float8_linear(replace(packed, tensors=to_cpu(packed.tensors)))
        out = torch.empty(linear.shape, dtype=E4M3, device=self.device)
        codes = plain.scaled_linear.weight(E4M3).float()
        same = torch.equal(linear.scaled_linear.weight(E4M3, out).cpu().float(), codes)
        x = torch.randn(512, linear.shape[1], device=self.device, generator=self.random_block.generator).bfloat16()
        expected = scaled_mm_reference(*map(torch.Tensor.cpu, quantize_rows(x)), codes.to(E4M3), plain.row_scales)
        difference = (linear(x).cpu() - expected).abs().max() / expected.abs().max()
        seconds = self.timed(lambda: linear.scaled_linear.weight(E4M3, out), 20)
        written = sum(each.numel() * each.dtype.itemsize for each in (*packed.tensors.values(), out))
        say(
            "float8",
            weights_equal=same,
            largest_difference=round(float(difference), 5),
            gigabytes_per_second=round(written / seconds / 1e9),
        )

    def attention(self) -> None:
        """bf16 attention on the device compared with fp32 on the CPU, with shared prefixes and odd lengths."""
        lengths = ((300, 90), (300, 777), (0, 33))
        rows = [RenderedConversation([*range(shared), *range(400, 400 + own)], 0) for shared, own in lengths]
        (batch,) = pack_batches(rows, 10_000)
        heads, kv_heads = self.model_config.num_attention_heads, self.model_config.num_key_value_heads
        tensors = [
            torch.randn(batch.tokens, n, self.model_config.head_dim).bfloat16() for n in (heads, kv_heads, kv_heads)
        ]
        plain = causal_attention(*(each.float() for each in tensors), batch.segments)
        there = causal_attention(*(each.to(self.device) for each in tensors), batch.segments).cpu().float()
        say("attention", largest_difference=round(float((there - plain).abs().max()), 5))

    def forward(self) -> None:
        """Tokens/s of one block, and the FLOP/s of its products as a share of the peak.

        `share_of_products` is relative to dense bf16 products of the same shapes.
        """
        plain = {tokens: self.attempt(f"products of {tokens}", partial(self.products, tokens)) for tokens in self.sizes}
        for kind in ("16-bit", "gptq-4", "gptq-4 fp8", "nf4"):
            block = self.attempt(f"block {kind}", partial(self.random_block.block, kind, SEQUENCE))
            for tokens in self.sizes if block else []:
                what = f"block_forward {kind} {tokens}"
                self.attempt(what, partial(self.forward_once, kind, block, tokens, plain[tokens]))

    def forward_once(self, kind: str, block: Block, tokens: int, plain: float | None) -> None:
        rows = [RenderedConversation([0] * SEQUENCE, SEQUENCE - 1)] * (tokens // SEQUENCE)
        batch = pack_batches(rows, tokens, share_prefixes=False)[0].to(self.device)
        hidden = torch.randn(tokens, self.model_config.hidden_size, device=self.device)
        seconds = self.timed(lambda: block(hidden, batch))
        share = 2 * self.plan(tokens).block_weights * tokens / seconds / self.rate
        say(
            "block_forward",
            kind=kind,
            tokens=tokens,
            tokens_per_second=round(tokens / seconds),
            share_of_peak=round(share, 3),
            share_of_products=round(plain / seconds, 3) if plain else None,
        )

    def products(self, tokens: int) -> float:
        """Seconds of a block's products alone, as dense bf16 products in torch."""
        pairs = [
            (torch.randn(tokens, weight.shape[1], device=self.device).bfloat16(), weight)
            for weight in map(self.random_block.weight, BLOCK_LINEARS)
        ]
        return self.timed(lambda: [torch.nn.functional.linear(x, weight) for x, weight in pairs])

    def quantize(self) -> None:
        """Seconds per stage of quantizing one block, without the two forward passes; extrapolated to 80 blocks."""
        self.peak_memory()  # reset the peak
        model, block = self.model_config, self.random_block
        stages = stage_seconds(
            model, self.group_size, self.calibration_tokens, block.generator, block.weight, self.once
        )
        say(
            "quantize_block",
            tokens=self.calibration_tokens,
            peak_gib=self.peak_memory(),
            eighty_blocks_minutes=round(sum(stages.values()) * 80 / 60, 1),
            **{f"{stage}_seconds": round(seconds, 2) for stage, seconds in stages.items()},
        )

    def model(self) -> None:
        """A whole GPTQ-4 model from disk: resident, resident in fp8, and streamed."""
        if self.work:
            self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work) as directory:
            giant = Path(directory) / "giant"
            seconds = self.once(lambda: write_giant(giant, self.layers, self.divide))
            say("write_model", blocks=self.layers, seconds=round(seconds, 1))
            rows = self.mixed_pairs(64 if self.divide == 1 else 4)
            placements = {"resident": {}, "resident, fp8": {"dtype": "fp8"}, "streamed": self.streamed}
            rates = {
                placement: self.attempt(f"model {placement}", partial(self.score, giant, placement, rows, options))
                for placement, options in placements.items()
            }
            if rates["resident"] and rates["streamed"]:
                say("streamed_against_resident", share=round(rates["streamed"] / rates["resident"], 3))

    def score(self, model: Path, placement: str, rows: list[RenderedConversation], options: dict[str, Any]) -> float:
        """Print load time, latency, tokens/s and memory of one placement; return tokens/s."""
        gc.collect()  # free the previous model, so that the peak is this model's
        self.peak_memory()
        loaded: list[Scorer] = []
        seconds = self.once(lambda: loaded.append(Scorer.from_pretrained(model, devices=self.device, **options)))
        scorer = loaded[0]
        say(
            "load",
            placement=placement,
            found=scorer.plan.placement,
            seconds=round(seconds, 1),
            allocated_gib=self.peak_memory(),
        )
        scorer.score_rendered(rows[:2])
        latency = self.timed(lambda: scorer.score_rendered(rows[:2]), 3)
        tokens = sum(batch.tokens for batch in pack_batches(rows, scorer.token_budget))
        rate = tokens / self.timed(lambda: scorer.score_rendered(rows), 1, warm=1)
        say(
            "model_forward",
            placement=placement,
            tokens=tokens,
            tokens_per_second=round(rate),
            comparison_seconds=round(latency, 3),
            peak_gib=self.peak_memory(),
        )
        return rate

    def mixed_pairs(self, count: int) -> list[RenderedConversation]:
        """Two responses to each of `count` prompts, with random lengths and tokens."""
        draw = random.Random(0)

        def tokens(least: int, most: int) -> list[int]:
            return [draw.randrange(self.vocabulary) for _ in range(draw.randint(least, most))]

        rows = []
        for _ in range(count):
            prompt = tokens(20, 600)
            rows += [[*prompt, *tokens(20, 900)] for _ in range(2)]
        return [RenderedConversation(row, len(row) - 1) for row in rows]

    def plan(self, tokens: int) -> QuantizationPlan:
        return QuantizationPlan(
            self.model_config,
            self.quantization,
            self.quantization.bits,
            TokenCounts(tokens, 0, tokens),
            matmul_bytes=2,
            prefetch=False,
            device=self.device,
            gradients=GradientPlan(self.model_config, tokens, tokens, 2),
        )

    def timed(self, action: Callable[[], Any], rounds: int = 5, warm: int = 2) -> float:
        """Median seconds of `rounds` runs, after `warm` ones."""
        return statistics.median([self.once(action) for _ in range(warm + rounds)][warm:])

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
        """Peak GPU memory since the previous call, in GiB."""
        if self.device == "cpu":
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 1)


def to_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def say(figure: str, **values: Any) -> None:
    """Print one JSON line and flush it."""
    print(json.dumps({"figure": figure, **values}), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
