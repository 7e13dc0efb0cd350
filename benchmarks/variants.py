"""Quantize a model with many settings and compare each variant with the unquantized model on held-out pairs.

    python benchmarks/variants.py --pairs pairs.jsonl.gz --work /tmp/variants --json result.json
    python benchmarks/variants.py --pairs pairs.jsonl.gz --work /tmp/variants --testbed qwen2.5-0.5b --seeds 0 1 2

Each variant is made by `quantize/run.py` with its defaults, once per seed of the calibration rows, and scores the same
held-out pairs. Pairs come from the prompts that the score head's training held out. A test bed is calibrated on the
other prompts of --pairs, which have enough tokens for it; the demo on the bundled pairs. The table has one row per
variant, the mean over the seeds; the JSON has every seed with 95 % bootstrap intervals. `plain bf16` is the unquantized
model computed in bfloat16 throughout, as by transformers. `gptq-4, fp8 products` is the `gptq-4` variant, scored in
fp8. `--only NAME ...` selects variants. Finished variants and scores are kept in --work and reused.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.score_head.train import is_held_out  # noqa: E402
from benchmarks.testbeds import TESTBEDS, build  # noqa: E402
from calibration.sources import load_rows  # noqa: E402
from quantize.arguments import parse as parse_quantize  # noqa: E402
from quantize.job.inputs import read_inputs  # noqa: E402
from quantize.run import main as quantize  # noqa: E402
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from runtime.checkpoints.model_config import BLOCK_LINEARS  # noqa: E402
from runtime.common.errors import ConversationError  # noqa: E402
from runtime.conversations.rendering import RenderedConversation, Renderer  # noqa: E402
from runtime.evaluation.metrics import ParityMetrics, measure_metrics  # noqa: E402
from runtime.evaluation.report import JSON_FILE, read_report  # noqa: E402
from runtime.execution.block_loading import read_head  # noqa: E402
from runtime.modeling.precision import FLOAT8, PRECISIONS, PURE_BFLOAT16  # noqa: E402
from runtime.modeling.score_head import ScoreHead  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402

FP8 = "gptq-4, fp8 products"
FOUR_BITS = "gptq-4"  # among the arguments of another variant: this variant's directory
VARIANTS = {
    "gptq-8": ["--bits", "8"],
    FOUR_BITS: ["--bits", "4"],
    "gptq-4.25": ["--bits", "4.25", "--errors-of", FOUR_BITS],
    "gptq-4.5": ["--bits", "4.5", "--errors-of", FOUR_BITS],
    "gptq-4.5, by rounding": ["--bits", "4.5"],
    "gptq-4, groups of 32": ["--group-size", "32"],
    FP8: ["--bits", "4"],
    "nf4": ["--method", "nf4"],
    "nf4, plain": ["--method", "nf4", "--rows", "0"],
    "int8": ["--method", "int8"],
    "rtn-4": ["--method", "rtn"],
    "gptq-4, columns in order": ["--no-activation-order"],
    "gptq-4, min-max scales": ["--no-importance-scales"],
    "gptq-4, desc_act": ["--desc-act"],
    "gptq-4, asymmetric": ["--asymmetric"],
    "gptq-4, damp 0.01": ["--damp-percent", "0.01"],
    "gptq-4, damp 0.2": ["--damp-percent", "0.2"],
    "gptq-4, head unchanged": ["--no-recalibration"],
}


def main() -> int:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    setting = Setting.of(arguments)
    print(f"{len(setting.pairs) // 2} pairs, {setting.tokens:,} tokens", file=sys.stderr)
    floor = setting.hidden_states("floor", setting.model, setting.pairs).bfloat16()
    table = {"plain bf16": [Outcome(measure_metrics(setting.expected, by_pair(setting.head(floor))))]}
    for name in arguments.only or VARIANTS:
        table[name] = [setting.measure(name, seed) for seed in arguments.seeds]
        print_table({name: table[name]})
    print_table(table)
    result = setting.describe() | {"variants": {name: describe(name, outcomes) for name, outcomes in table.items()}}
    if arguments.json is None:
        print(json.dumps(result))
    else:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="preference pairs in a TRL format")
    parser.add_argument("--count", type=int, default=500, help="number of held-out pairs (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="skip longer conversations (default %(default)s)")
    parser.add_argument("--testbed", choices=TESTBEDS, help="build this test bed in --work (default: the demo)")
    parser.add_argument("--gguf", type=Path, help="the test bed's joined GGUF file (default: fetch it)")
    parser.add_argument("--work", type=Path, required=True, help="directory for variants and scores")
    parser.add_argument("--only", nargs="*", choices=[*VARIANTS], metavar="NAME", help="variants to run (default: all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="draws of calibration rows (default: 0)")
    parser.add_argument("--rows", type=int, help="calibration conversations (default: as quantize/run.py)")
    parser.add_argument("--json", type=Path, help="write the result here (default: standard output)")
    return parser.parse_args()


@dataclass(frozen=True)
class Outcome:
    """One variant from one draw of calibration rows, against the unquantized model.

    Attributes:
        metrics: with the recalibrated head; original: with the original head; kind: of the recalibration.
        tokens: calibration tokens; seconds: of quantizing.
    """

    metrics: ParityMetrics
    original: ParityMetrics | None = None
    kind: str = ""
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Setting:
    """A model, the held-out pairs, and what the unquantized model makes of them.

    Attributes:
        model: checkpoint directory or `demo`.
        calibration: file of calibration pairs; None for the bundled ones.
        max_tokens: of a pair's conversations, and of those that a test bed is calibrated on.
        rows: calibration conversations; None for the default.
        pairs: chosen and rejected conversations in turn.
    """

    work: Path
    model: str
    dtype: str
    calibration: Path | None
    max_tokens: int
    rows: int | None
    pairs: list[RenderedConversation]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Setting:
        """Build the test bed if needed, and draw the pairs."""
        if arguments.testbed is None:
            model, calibration, work = "demo", None, arguments.work
        else:
            work = arguments.work / arguments.testbed
            model, calibration = str(work / "model"), work / "calibration.jsonl"
            if not Path(model).exists():
                build(arguments.testbed, Path(model), arguments.gguf)
            calibration.write_text("".join(json.dumps(row) + "\n" for row in training_rows(arguments.pairs)))
        pairs = draw_pairs(model, arguments.pairs, arguments.count, arguments.max_tokens)
        return cls(work, model, arguments.dtype, calibration, arguments.max_tokens, arguments.rows, pairs)

    @property
    def tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.pairs)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.model)

    @cached_property
    def head(self) -> ScoreHead:
        return read_head(self.checkpoint)

    @cached_property
    def expected(self) -> np.ndarray:
        """Scores [pairs, 2] of the unquantized model."""
        return by_pair(self.head(self.hidden_states("reference", self.model, self.pairs)))

    def measure(self, name: str, seed: int) -> Outcome:
        """Make a variant from one draw of rows and compare its scores."""
        output = self.make(FOUR_BITS if name == FP8 else name, seed)
        hidden = self.hidden_states(f"{name}.{seed}", str(output), self.pairs)
        report = read_report(output / JSON_FILE)
        repaired, original = (by_pair(head(hidden)) for head in (read_head(open_checkpoint(output)), self.head))
        return Outcome(
            measure_metrics(self.expected, repaired),
            measure_metrics(self.expected, original),
            report.repair["kind"] if report.repair else "",
            *json.loads((output / "variant.json").read_text()),
        )

    def make(self, name: str, seed: int) -> Path:
        """Quantize, unless an earlier run did."""
        output = self.work / f"{slug(name)}.{seed}"
        if not (output / "variant.json").exists():
            command = ["--model", self.model, "--output", str(output), "--parity-pairs", "2", "--resume"]
            if self.calibration:
                command += ["--calibration", str(self.calibration), "--max-tokens", str(self.max_tokens)]
            command += ["--dtype", self.dtype, "--seed", str(seed)]
            command += [] if self.rows is None else ["--rows", str(self.rows)]
            command += [str(self.make(each, seed)) if each == FOUR_BITS else each for each in VARIANTS[name]]
            inputs = read_inputs(parse_quantize(command))  # for the number of tokens, outside the time
            start = time.perf_counter()
            assert quantize(command) == 0, name
            record = [inputs.plan.token_counts.calibration_tokens, round(time.perf_counter() - start, 1)]
            (output / "variant.json").write_text(json.dumps(record))
        return output

    def hidden_states(self, name: str, model: str, rows: list[RenderedConversation]) -> torch.Tensor:
        """Hidden states [rows, H] at the scored tokens, computed once and cached in a file."""
        file = self.work / f"{slug(name)}.{self.dtype}.{len(rows)}.npy"
        if not file.exists():
            special = {"floor": PURE_BFLOAT16, FP8: FLOAT8}
            precision = special.get(name.partition(".")[0], PRECISIONS[self.dtype])
            np.save(file, Scorer(open_checkpoint(model), precision=precision).hidden_at_scored_tokens(rows).numpy())
        return torch.from_numpy(np.load(file))

    def describe(self) -> dict[str, Any]:
        """The fields of the result that all variants share."""
        accuracy = float((self.expected[:, 0] > self.expected[:, 1]).mean())
        config = self.checkpoint.model_config
        weights = sum(math.prod(config.linear_shape(name)) for name in BLOCK_LINEARS) * config.num_hidden_layers
        return {
            "model": "demo" if self.model == "demo" else self.work.name,
            "block_weights": weights,
            "pairs": len(self.pairs) // 2,
            "accuracy": round(accuracy, 4),
            "dtype": self.dtype,
            "machine": describe_machine(),
        }


def training_rows(source: Path) -> list[dict[str, Any]]:
    """The pairs whose prompts the score head may have been trained on."""
    pairs = [pair for pair in load_rows(source).pairs if not is_held_out(pair)]
    return [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "category": pair.category}
        for pair in pairs
    ]


def draw_pairs(model: str, source: Path, count: int, max_tokens: int, seed: int = 0) -> list[RenderedConversation]:
    """Alternating chosen and rejected conversations of `count` held-out pairs from `source`.

    A prompt's second pair is drawn only when all prompts are used, since bootstrap intervals assume independent pairs.
    """
    renderer = Renderer.from_directory(open_checkpoint(model).directory, max_tokens)
    by_prompt: dict[str, list] = {}
    for pair in load_rows(source).pairs:
        if is_held_out(pair):
            by_prompt.setdefault(repr(pair.prompt), []).append(pair)
    generator = random.Random(seed)
    prompts = sorted(by_prompt)
    generator.shuffle(prompts)
    drawn: list[RenderedConversation] = []
    for turn in range(max(map(len, by_prompt.values()))):
        for prompt in prompts:
            if len(drawn) >= 2 * count:
                return drawn
            if turn < len(by_prompt[prompt]):
                pair = by_prompt[prompt][turn]
                try:
                    drawn += [renderer.render(each) for each in (pair.chosen_conversation, pair.rejected_conversation)]
                except ConversationError:
                    del drawn[len(drawn) // 2 * 2 :]
    return drawn


def by_pair(scores: torch.Tensor) -> np.ndarray:
    """Scores [2 pairs] to [pairs, 2]."""
    return scores.double().numpy().reshape(-1, 2)


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def describe(name: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """A variant's entry in the result."""
    return {
        "arguments": VARIANTS.get(name, []),
        "draws": [
            {
                "repair": each.kind,
                "tokens": each.tokens,
                "seconds": each.seconds,
                "repaired": each.metrics.model_dump(),
                "original_head": each.original.model_dump() if each.original else None,
            }
            for each in outcomes
        ],
    }


def print_table(rows: dict[str, list[Outcome]]) -> None:
    """Print metrics with the recalibrated head, the mean over the draws and their standard deviation."""
    table = Table(
        "variant", "agreement", "Spearman", "mean shift", "original head", "after affine", "repair", "seconds"
    )
    for name, outcomes in rows.items():
        metrics = [each.metrics for each in outcomes]
        table.add_row(
            name,
            _mean([each.agreement.value for each in metrics], 3),
            _mean([each.spearman.value for each in metrics], 4),
            _mean([each.mean_shift.value for each in metrics], 3),
            _mean([each.original.mean_shift.value for each in outcomes if each.original], 3),
            _mean([each.shift_after_affine.value for each in metrics], 3),
            ", ".join(sorted({each.kind for each in outcomes})),
            _mean([each.seconds for each in outcomes], 0),
        )
    Console(stderr=True, width=140).print(table)


def _mean(values: list[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if values else ""


if __name__ == "__main__":
    sys.exit(main())
