"""Everything there is to measure on a GPU, in one command: one JSON line a figure, within ten minutes.

    python benchmarks/gpu.py --work /tmp/gpu     on a CUDA machine: true shapes of the 72B, 45 GB of disk
    python benchmarks/gpu.py --toy               anywhere, on the CPU, shapes a 32nd as wide and a few blocks
    python benchmarks/gpu.py --device cpu --only peak forward --tokens 2048      true shapes where there is no GPU

In order: the matmul peak; every dequantization against its plain twin, and its bandwidth against a copy's; fp8 products
and flash attention against the plain ones; one block scoring packed conversations, 16-bit, GPTQ-4, the same in fp8, and
NF4, as tokens a second and share of the bf16 peak; one block quantized, seconds by stage; then a whole packed model
from disk: load, memory, tokens a second on pairs of mixed length, one comparison's latency, the same in fp8, and the
same streamed within a budget. Weights are random and made here, so it needs nothing but torch and this repository. A
figure that fails says so in its line, and the rest goes on; the exit status then is 1.
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
from quantize.plan import Load, Plan  # noqa: E402
from quantize.settings import GPTQSettings  # noqa: E402
from runtime.architecture import BLOCK_LINEARS, BLOCK_NORMS, Architecture  # noqa: E402
from runtime.attention import causal_attention  # noqa: E402
from runtime.batching import pack  # noqa: E402
from runtime.chat import Rendered  # noqa: E402
from runtime.devices import at_work  # noqa: E402
from runtime.float8 import E4M3, in_float8, multiply_plainly, round_rows  # noqa: E402
from runtime.linear import DenseLinear, make_linear  # noqa: E402
from runtime.machine import matmul_rate  # noqa: E402
from runtime.numerics import BFLOAT16, FLOAT8  # noqa: E402
from runtime.quantization import Quantization  # noqa: E402
from runtime.qwen2 import Block, Rotary  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402
from tests.packed import packed_tensors  # noqa: E402

FIGURES = ("peak", "kernels", "attention", "forward", "quantize", "model")
SEQUENCE = 512  # tokens of each random conversation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small shapes on the CPU, to see that everything runs")
    parser.add_argument("--work", type=Path, help="directory for the whole model (default: a temporary one)")
    parser.add_argument("--device", help="default: cuda:0, with --toy cpu")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, metavar="NAME", help="of the figures")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"multiples of {SEQUENCE} that one block scores at once")
    arguments = parser.parse_args()
    device = arguments.device or ("cpu" if arguments.toy else "cuda:0")
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"{device}: torch can use no CUDA device here; try --toy, or --device cpu")
    if any(tokens % SEQUENCE for tokens in arguments.tokens or []):
        parser.error(f"--tokens is {arguments.tokens}; multiples of {SEQUENCE} were expected")
    bench = Bench(device, divide=32 if arguments.toy else 1, work=arguments.work, sizes=arguments.tokens)
    with at_work(torch.device(device)):
        for figure in FIGURES:
            if figure in arguments.only:
                bench.attempt(figure, getattr(bench, figure))
    return int(bench.failed)


class Bench:
    """One device, one block of one size."""

    def __init__(self, device: str, divide: int, work: Path | None, sizes: list[int] | None = None):
        self.device = device
        heads = 64 // min(divide, 8)
        hidden, inner = 8192 // divide, 29568 // divide // 32 * 32
        self.architecture = Architecture(
            hidden, inner, 1, heads, heads // 8, hidden // heads, 1000, 32768, 1e-6, 1e6, torch.bfloat16
        )
        self.group_size = 128 if divide == 1 else 32
        self.quantization = Quantization("gptq", 4, self.group_size)
        self.sizes = sizes or ([1024, 4096, 16384] if divide == 1 else [512])
        self.calibration_tokens = 262_144 if divide == 1 else 1024
        self.divide, self.work = divide, work
        self.layers = 80 if divide == 1 else 4
        self.vocabulary = giant_config(1, divide)["vocab_size"]
        self.streamed: dict[str, Any] = {"memory": {device: "20GiB"}} if divide == 1 else {"stream": True}
        self.seconds = 2.0 if divide == 1 else 0.2
        self.generator = torch.Generator(device).manual_seed(0)
        self.failed = False

    def attempt(self, what: str, figure: Callable[[], Any]) -> Any:
        """What `figure` returns; None, and a line that says why, where it fails."""
        try:
            return figure()
        except Exception as error:  # whatever it is, the other figures are still wanted
            self.failed = True
            traceback.print_exc()
            say(what, failed=f"{type(error).__name__}: {error}")
        gc.collect()  # what the failure held on the device
        return None

    @cached_property
    def rate(self) -> float:
        """Operations a second of the machine's bf16 matrix product."""
        return matmul_rate(torch.bfloat16, self.device, 1.0)

    def peak(self) -> None:
        """The machine's bf16 matrix product."""
        say("matmul_peak", tflops=round(self.rate / 1e12, 1), device=self.name())

    def kernels(self) -> None:
        """Every format's weights against the plain twin's, and the bandwidth of writing them."""
        for kind in KINDS:
            self.attempt(f"dequantize {kind}", partial(self.kernel, kind))
        self.attempt("float8", self.float8)

    def kernel(self, kind: str) -> None:
        shape = self.architecture.linear_shape("mlp.up_proj")
        say("dequantize", kind=kind, **measure(kind, shape, self.group_size, 2048, self.device, self.seconds))

    def float8(self) -> None:
        """The device's fp8 weights and products against the plain ones, as shares of the largest; and its bandwidth."""
        packed = self.linear("self_attn.q_proj", "gptq-4")
        linear, plain = in_float8(packed), in_float8(replace(packed, tensors=to_cpu(packed.tensors)))
        out = torch.empty(linear.shape, dtype=E4M3, device=self.device)
        codes = plain.scaled.weight(E4M3).float()
        same = torch.equal(linear.scaled.weight(E4M3, out).cpu().float(), codes)
        x = torch.randn(512, linear.shape[1], device=self.device, generator=self.generator).bfloat16()
        expected = multiply_plainly(*map(torch.Tensor.cpu, round_rows(x)), codes.to(E4M3), plain.units)
        difference = (linear(x).cpu() - expected).abs().max() / expected.abs().max()
        seconds = self.timed(lambda: linear.scaled.weight(E4M3, out), 20)
        written = sum(each.numel() * each.dtype.itemsize for each in (*packed.tensors.values(), out))
        say(
            "float8",
            weights_equal=same,
            largest_difference=round(float(difference), 5),
            gigabytes_per_second=round(written / seconds / 1e9),
        )

    def attention(self) -> None:
        """Shared prefixes and odd lengths, in bf16 on the device against fp32 on the CPU."""
        lengths = ((300, 90), (300, 777), (0, 33))
        rows = [Rendered([*range(shared), *range(400, 400 + own)], 0) for shared, own in lengths]
        (batch,) = pack(rows, 10_000)
        heads, kv_heads = self.architecture.num_attention_heads, self.architecture.num_key_value_heads
        tensors = [
            torch.randn(batch.tokens, n, self.architecture.head_dim).bfloat16() for n in (heads, kv_heads, kv_heads)
        ]
        plain = causal_attention(*(each.float() for each in tensors), batch.segments)
        there = causal_attention(*(each.to(self.device) for each in tensors), batch.segments).cpu().float()
        say("attention", largest_difference=round(float((there - plain).abs().max()), 5))

    def forward(self) -> None:
        """Tokens a second through one block, and the share of the peak that its products reach.

        `share_of_products` is of the rate that plain bf16 products of the same shapes reach.
        """
        plain = {tokens: self.attempt(f"products of {tokens}", partial(self.products, tokens)) for tokens in self.sizes}
        for kind in ("16-bit", "gptq-4", "gptq-4 fp8", "nf4"):
            block = self.attempt(f"block {kind}", partial(self.block, kind))
            for tokens in self.sizes if block else []:
                what = f"block_forward {kind} {tokens}"
                self.attempt(what, partial(self.forward_once, kind, block, tokens, plain[tokens]))

    def forward_once(self, kind: str, block: Block, tokens: int, plain: float | None) -> None:
        rows = [Rendered([0] * SEQUENCE, SEQUENCE - 1)] * (tokens // SEQUENCE)
        batch = pack(rows, tokens, share=False)[0].to(self.device)
        hidden = torch.randn(tokens, self.architecture.hidden_size, device=self.device)
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
        """Seconds of a block's products alone, as torch does them."""
        pairs = [
            (torch.randn(tokens, weight.shape[1], device=self.device).bfloat16(), weight)
            for weight in map(self.weight, BLOCK_LINEARS)
        ]
        return self.timed(lambda: [torch.nn.functional.linear(x, weight) for x, weight in pairs])

    def quantize(self) -> None:
        """Every stage of quantizing one block but for the two streams, and 80 blocks of that."""
        self.peak_memory()  # what was before is not of this figure
        stages = stage_seconds(
            self.architecture, self.group_size, self.calibration_tokens, self.generator, self.weight, self.once
        )
        say(
            "quantize_block",
            tokens=self.calibration_tokens,
            peak_gib=self.peak_memory(),
            eighty_blocks_minutes=round(sum(stages.values()) * 80 / 60, 1),
            **{f"{stage}_seconds": round(seconds, 2) for stage, seconds in stages.items()},
        )

    def model(self) -> None:
        """A whole packed model from disk, resident and streamed."""
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

    def score(self, model: Path, placement: str, rows: list[Rendered], options: dict[str, Any]) -> float:
        """Tokens a second of one placement, and what else there is to say of it."""
        gc.collect()  # the model before, so that this one's memory is its own
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
        tokens = sum(batch.tokens for batch in pack(rows, scorer.token_budget))
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

    def mixed_pairs(self, count: int) -> list[Rendered]:
        """Two responses to each of `count` prompts, all of random lengths and tokens."""
        draw = random.Random(0)

        def tokens(least: int, most: int) -> list[int]:
            return [draw.randrange(self.vocabulary) for _ in range(draw.randint(least, most))]

        rows = []
        for _ in range(count):
            prompt = tokens(20, 600)
            rows += [[*prompt, *tokens(20, 900)] for _ in range(2)]
        return [Rendered(row, len(row) - 1) for row in rows]

    def block(self, kind: str) -> Block:
        """A block of random weights."""
        linears = {name: self.linear(name, kind) for name in BLOCK_LINEARS}
        norms = {name: torch.ones(self.architecture.hidden_size, device=self.device) for name in BLOCK_NORMS}
        numerics = FLOAT8 if kind.endswith("fp8") else BFLOAT16
        block = Block(self.architecture, norms, linears, Rotary(self.architecture, SEQUENCE, self.device), numerics)
        block.stack()
        if numerics.float8:
            block.to_float8()
        return block

    def linear(self, name: str, kind: str) -> Any:
        if kind == "16-bit":
            return DenseLinear(self.weight(name))
        shape = self.architecture.linear_shape(name)
        quantization = Quantization("nf4", 4) if kind == "nf4" else self.quantization
        tensors = {suffix: each.to(self.device) for suffix, each in packed_tensors(shape, quantization).items()}
        if "scales" in tensors:
            tensors["scales"] = torch.full_like(tensors["scales"], 0.2 * shape[1] ** -0.5)
        return make_linear(tensors, quantization, shape)

    def weight(self, name: str) -> torch.Tensor:
        out_features, in_features = self.architecture.linear_shape(name)
        weight = torch.randn(out_features, in_features, device=self.device, generator=self.generator)
        return (weight * in_features**-0.5).bfloat16()

    def plan(self, tokens: int) -> Plan:
        return Plan(
            self.architecture,
            self.quantization,
            Load(tokens, 0, tokens),
            calibrated=True,
            correction=True,
            refine_passes=GPTQSettings().refine_passes,
            matmul_bytes=2,
            prefetch=False,
            device=self.device,
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
        """The most since the last asking, in GiB."""
        if self.device == "cpu":
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 1)


def to_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same on the CPU."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def say(figure: str, **values: Any) -> None:
    """One JSON line, at once."""
    print(json.dumps({"figure": figure, **values}), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
